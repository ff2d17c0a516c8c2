/*-------------------------------------------------------------------------
 *
 * entry.h
 *	  How the outbox is stored: its entries, written and read.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_ENTRY_H
#define ABP_ENTRY_H

#include "postgres.h"

#include "access/htup_details.h"
#include "datatype/timestamp.h"
#include "storage/itemptr.h"

#include "base/idset.h"
#include "base/table_scan.h"

/* The most ids an entry can hold; see the head of this file. */
#define OUTBOX_BLOCK 1024

/* columns of aibilling.outbox_entry */
#define Anum_entry_usage_table 1
#define Anum_entry_state 2
#define Anum_entry_attempts 3
#define Anum_entry_outcome_unknown 4
#define Anum_entry_not_before 5
#define Anum_entry_id 6
#define Anum_entry_ids 7
#define Anum_entry_error 8
#define Natts_entry 8

/* The columns up to "id" as they lie in a tuple: fixed lengths, no NULLs. */
typedef struct EntryForm
{
	Oid			usage_table;
	char		state;
	int32		attempts;
	bool		outcome_unknown;
	TimestampTz not_before;
	int64		id;
} EntryForm;

#define ENTRY_FORM(tuple) ((const EntryForm *) GETSTRUCT(tuple))

#define BLOCK_OF(id) ((id) & ~((int64) OUTBOX_BLOCK - 1))

/* States of an outbox entry, as stored. */
#define OUTBOX_READY 'p'		/* to be sent */
#define OUTBOX_WAITING 'w'		/* to be sent, but not before not_before */
#define OUTBOX_UNPRICED 'u'		/* waits for a price */
#define OUTBOX_REJECTED 'r'		/* waits for an UPDATE or retry() */
#define NUM_OUTBOX_STATES 4

/* Entries of rows that are only to be counted. */
#define OUTBOX_NOT_QUEUED 'n'	/* priced and not queued */
#define OUTBOX_SKIPPED 's'		/* a second one of its external_id */
#define OUTBOX_KEPT 'k'			/* not changed, since it was sent */
#define OUTBOX_VANISHED 'v'		/* deleted while it was in flight */
#define OUTBOX_IS_NOTE(state) (strchr("nskv", (state)) != NULL)

/* An entry that takes its ids out of a state again has the capital letter. */
#define OUTBOX_REMOVAL(state) ((char) ((state) - 'a' + 'A'))
#define OUTBOX_IS_REMOVAL(state) ((state) < 'a')

/* Ids of one usage table in one state.  All but "ids" may be shared. */
typedef struct OutboxEntry
{
	Oid			usage_table;
	char		state;
	int			attempts;
	bool		outcome_unknown;	/* an earlier request may have stored them */
	TimestampTz not_before;		/* OUTBOX_WAITING only, else DT_NOBEGIN */
	IdSet		ids;
	const char *error;			/* why it waits, or NULL */
	ItemPointerData tid;		/* of abp_outbox_next_unpriced only */
} OutboxEntry;

extern void abp_entries_put(Oid relid, OutboxEntry *entries, int nentries);
extern IdSet abp_entry_ids(HeapTuple tuple, TupleDesc desc);
extern OutboxEntry abp_entry_read(HeapTuple tuple, TupleDesc desc);
extern bool abp_entry_holds(HeapTuple tuple, TupleDesc desc, int64 id);
extern void abp_entry_scan_begin(OrderedScan *scan, Oid usage_table,
								 char state, int64 from_id, TimestampTz until,
								 LOCKMODE lockmode);
extern void abp_entry_scan_begin_removals(OrderedScan *scan, Oid usage_table,
										  LOCKMODE lockmode);
extern void abp_entry_scan_begin_at(OrderedScan *scan, Oid usage_table,
									char state, StrategyNumber strategy,
									RegProcedure compare, int64 key,
									Snapshot snapshot);
extern bool abp_entries_have_removals(Oid usage_table);
extern TransactionId abp_entry_deleter(HeapTuple tuple);

#endif							/* ABP_ENTRY_H */
