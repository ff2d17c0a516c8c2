/*-------------------------------------------------------------------------
 *
 * place.h
 *	  Where a row stands: in the outbox, in flight, delivered.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_PLACE_H
#define ABP_PLACE_H

#include "postgres.h"

#include "queue/entry.h"

/* Where a row stands. */
typedef enum RowWhere
{
	ROW_NOT_SENT,				/* neither in the outbox nor in the ledger */
	ROW_IN_OUTBOX,
	ROW_SENDING,
	ROW_DELIVERED
} RowWhere;

typedef struct RowPlace
{
	RowWhere	where;
	char		state;			/* in the outbox, 0: not there */
	bool		outcome_unknown;	/* may Polar have it, though it is there? */
	int			count[NUM_OUTBOX_STATES];	/* how often it is there, in the
											 * order of abp_outbox_states */
} RowPlace;

extern void abp_place_find(Oid usage_table, int64 id, int64 ledger_from,
						   RowPlace *place);
extern bool abp_place_lock_shared_ids(Oid usage_table, bool wait);
extern bool abp_place_find_at_once(Oid usage_table, int64 id, int64 ledger_from,
								   RowPlace *place);

#endif							/* ABP_PLACE_H */
