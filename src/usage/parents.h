/*-------------------------------------------------------------------------
 *
 * parents.h
 *	  Rows that name a parent: may they be sent before it?
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_PARENTS_H
#define ABP_PARENTS_H

#include "postgres.h"

#include "base/idset.h"
#include "base/usage_row.h"
#include "queue/attachment.h"
#include "queue/outbox.h"

/* A row that is about to be sent and names a parent. */
typedef struct ChildRow
{
	int64		id;
	char	   *external_id;
	char	   *parent_id;
	RowState	fate;			/* out: OUTBOX_READY if it may be sent */
	bool		with_parent;	/* out: and its parent goes with it, */
	int64		parent;			/* out: this row */
} ChildRow;

/* The rows among which it is. */
typedef struct ChildBatch
{
	IdSet	   *ids;			/* all that were looked at for the request */
	IdSet	   *sent;			/* those of them that the request is to hold */
	List	   *set_aside;		/* of OutboxEntry: what became of others */
	bool		outcome_unknown;	/* an earlier request may have stored them */
} ChildBatch;

extern ChildRow *abp_parents_child(const UsageRow *row);
extern void abp_parents_decide(const UsageTable *table, List *children,
							   const ChildBatch *batch);

#endif							/* ABP_PARENTS_H */
