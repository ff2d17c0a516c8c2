/*-------------------------------------------------------------------------
 *
 * outbox.h
 *	  The outbox: rows that are neither delivered nor in flight.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_OUTBOX_H
#define ABP_OUTBOX_H

#include "postgres.h"

#include "queue/entry.h"

extern const char abp_outbox_states[NUM_OUTBOX_STATES];

/* What the outbox makes of a row. */
typedef struct RowState
{
	char		state;
	TimestampTz not_before;		/* OUTBOX_WAITING only, else DT_NOBEGIN */
	char	   *error;			/* why it waits, or NULL */
	bool		outcome_unknown;	/* may Polar have it? */
} RowState;

/* Where a scan over entries stands; all zero but for "id" at the start. */
typedef struct EntryCursor
{
	int64		id;
	ItemPointerData tid;
} EntryCursor;

#define ENTRY_CURSOR_START ((EntryCursor) {PG_INT64_MIN})

/* What abp_outbox_take tells of the entries that it took, together. */
typedef struct TakenEntries
{
	char		state;
	int			attempts;		/* the most */
	bool		outcome_unknown;	/* of all of them, or of none */
} TakenEntries;

extern void abp_outbox_put(OutboxEntry *entries, int nentries);
extern bool abp_outbox_put_at_commit(OutboxEntry *entries, int nentries);
extern IdSet abp_outbox_left(Oid usage_table, char state, ItemPointer tid,
							 int64 id, IdSet *ids);
extern IdSet abp_outbox_entry_left(const OutboxEntry *entry);
extern bool abp_outbox_tidy(Oid usage_table, int max_removals);
extern IdSet abp_outbox_take(Oid usage_table, char state, TimestampTz until,
							 IdSet *except, int64 *cursor, int64 max_ids,
							 TakenEntries *entries);
extern bool abp_outbox_take_entry(const OutboxEntry *entry);
extern int64 abp_outbox_count(Oid usage_table, char state, int64 exact_limit,
							  bool *estimated, int64 *first_id);
extern int64 abp_outbox_count_all(void);
extern int64 abp_outbox_discard(Oid usage_table);
extern void abp_outbox_ids(Oid usage_table, IdSet *sure, IdSet *unsure);
extern IdSet abp_outbox_all_ids(Oid usage_table);
extern IdSet abp_outbox_peek(Oid usage_table, char state, int64 max_ids);
extern int64 abp_outbox_make_ready(Oid usage_table, char state, IdSet *only);
extern bool abp_outbox_bounds(Oid usage_table, char state, int64 *first,
							  int64 *last);
extern TimestampTz abp_outbox_next_due(Oid usage_table);
extern OutboxEntry *abp_outbox_next_unpriced(Oid usage_table,
											 EntryCursor *cursor);

#endif							/* ABP_OUTBOX_H */
