/*-------------------------------------------------------------------------
 *
 * shares.h
 *	  What each delivery's rows add up to: the table aibilling.share.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_SHARES_H
#define ABP_SHARES_H

#include "postgres.h"

#include "nodes/pg_list.h"

#include "base/idset.h"

/* One delivery's share, not yet in the rollup. */
typedef struct Share
{
	int64		delivery;
	Oid			usage_table;
	bytea	   *sums;			/* as stored; NULL: not known, the rows tell */
	int			folded_rows;	/* so many, the first, are in the rollup */
	bool		knows_counted;	/* is "counted" known? */
	IdSet		counted;		/* rows that another delivery counts */
	IdSet		ids;			/* the delivery's rows; empty: see its sums */
	bool		delivered;		/* else it is being sent */
} Share;

extern void abp_shares_write(int64 delivery, Oid usage_table, bytea *sums, const IdSet *counted);
extern void abp_shares_set_sums(int64 delivery, bytea *sums);
extern void abp_shares_set_folded(int64 delivery, int rows);
extern void abp_shares_drop(const int64 *deliveries, int n);
extern bool abp_shares_load_counted(int64 delivery, IdSet *counted);
extern List *abp_shares_of(Oid usage_table);
extern List *abp_shares_to_fold(int64 from_delivery, int max_shares, bool unknown);
extern int64 abp_shares_first_open(void);
extern IdSet abp_shares_counted(Oid usage_table, IdSet *ids, int64 ledger_from);
extern void abp_shares_disown(int64 delivery, Oid usage_table, IdSet *ids);
extern void abp_shares_truncated(Oid usage_table);
extern void abp_shares_forget(Oid usage_table);

#endif							/* ABP_SHARES_H */
