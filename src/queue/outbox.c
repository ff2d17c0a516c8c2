/*-------------------------------------------------------------------------
 *
 * outbox.c
 *	  The outbox: rows that are neither delivered nor in flight.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/heapam.h"
#include "access/table.h"
#include "access/tableam.h"
#include "access/transam.h"
#include "access/xact.h"
#include "miscadmin.h"
#include "utils/fmgroids.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"

#include "base/extension.h"
#include "base/idset.h"
#include "base/statement.h"
#include "base/table_scan.h"
#include "queue/entry.h"
#include "queue/feed.h"
#include "queue/outbox.h"

/* How far, in ids, a scan goes back when it continues. */
#define CURSOR_MARGIN (2 * OUTBOX_BLOCK)

#define STATE_OF_REMOVAL(state) ((char) ((state) - 'A' + 'a'))

const char	abp_outbox_states[NUM_OUTBOX_STATES] = {
	OUTBOX_READY, OUTBOX_WAITING, OUTBOX_UNPRICED, OUTBOX_REJECTED
};

/*
 * Put ids into the outbox, in the current (sub)transaction.
 *
 * Needs no privileges: what reaches this function has been decided by a
 * trigger of an attached table, or by the shipper.
 */
void
abp_outbox_put(OutboxEntry *entries, int nentries)
{
	if (nentries > 0)
		abp_entries_put(abp_extension_needed("outbox_entry"), entries, nentries);
}

/*
 * The same just before the transaction commits.  Returns false, having done
 * nothing, if it has dropped the extension.
 */
bool
abp_outbox_put_at_commit(OutboxEntry *entries, int nentries)
{
	Oid			relid = abp_extension_relation("outbox_entry");

	if (!OidIsValid(relid))
		return false;
	if (nentries > 0)
		abp_entries_put(relid, entries, nentries);
	return true;
}

/* The entries and removals of one state in one block of ids. */
typedef struct IdBlock
{
	uint16		removed[OUTBOX_BLOCK];	/* how often each id was taken out */
	int64		first;
	bool		any;
} IdBlock;

/* Read how often each id of a block was taken out of a state. */
static void
read_removals(IdBlock *block, Oid usage_table, char state, int64 id)
{
	OrderedScan scan;
	HeapTuple	tuple;

	memset(block, 0, sizeof(*block));
	block->first = BLOCK_OF(id);
	abp_entry_scan_begin_at(&scan, usage_table, OUTBOX_REMOVAL(state), BTGreaterEqualStrategyNumber, F_INT8GE,
							block->first, GetActiveSnapshot());
	while ((tuple = abp_scan_next(&scan)) != NULL &&
		   BLOCK_OF(ENTRY_FORM(tuple)->id) == block->first)
	{
		IdWalk		walk = {0};
		IdSet		ids = abp_entry_ids(tuple, RelationGetDescr(scan.rel));

		block->any = true;
		while (abp_idset_walk(&ids, &walk))
			block->removed[walk.id - block->first]++;
		abp_idset_free(&ids);
	}
	abp_scan_end(&scan);
}

/* What is left of an entry's ids; each removal counts for one entry. */
static IdSet
left_of(const IdSet *ids, IdBlock *block)
{
	IdWalk		walk = {0};
	IdSet		left = {0};

	while (abp_idset_walk(ids, &walk))
	{
		if (block->removed[walk.id - block->first] > 0)
			block->removed[walk.id - block->first]--;
		else
			abp_idset_add(&left, walk.id, walk.id, CurrentMemoryContext);
	}
	return left;
}

/*
 * The ids of an entry that are still in its state, by the active snapshot, in
 * the current memory context.
 */
IdSet
abp_outbox_left(Oid usage_table, char state, ItemPointer tid, int64 id, IdSet *ids)
{
	IdBlock		block;
	IdSet		left = *ids;
	OrderedScan scan;
	HeapTuple	tuple;

	abp_idset_sort(ids);
	if (!abp_entries_have_removals(usage_table))
		return left;
	read_removals(&block, usage_table, state, id);
	if (!block.any)
		return left;
	abp_entry_scan_begin_at(&scan, usage_table, state, BTGreaterEqualStrategyNumber, F_INT8GE, block.first,
							GetActiveSnapshot());
	while ((tuple = abp_scan_next(&scan)) != NULL && BLOCK_OF(ENTRY_FORM(tuple)->id) == block.first)
	{
		IdSet		held = abp_entry_ids(tuple, RelationGetDescr(scan.rel));

		left = left_of(&held, &block);
		if (ItemPointerEquals(&tuple->t_self, tid))
			break;
	}
	abp_scan_end(&scan);
	return left;
}

/*
 * The same of an entry that abp_outbox_next_unpriced has returned.
 */
IdSet
abp_outbox_entry_left(const OutboxEntry *entry)
{
	IdSet		ids = abp_idset_copy(&entry->ids);
	ItemPointerData tid = entry->tid;

	return abp_outbox_left(entry->usage_table, entry->state, &tid, ids.ranges[0].first, &ids);
}

/* Delete a tuple that we see, unless another transaction has it. */
static bool
delete_entry(Relation rel, HeapTuple tuple)
{
	TM_FailureData failure;

	return table_tuple_delete(rel, &tuple->t_self, GetCurrentCommandId(true), GetActiveSnapshot(),
							  InvalidSnapshot, false, &failure, false) == TM_Ok;
}

/*
 * Rewrite a block's entries in one state without what was taken out of them.
 * Returns how many removals are done with; 0 if another transaction is at one
 * of the entries: then all stays as it is.
 */
static int
tidy_block(Oid usage_table, char state, int64 first)
{
	MemoryContext context = AllocSetContextCreate(CurrentMemoryContext, "aibilling_polar outbox block",
												  ALLOCSET_DEFAULT_SIZES);
	MemoryContext old = MemoryContextSwitchTo(context);
	IdBlock    *block = palloc(sizeof(IdBlock));
	int			done = 0;

	read_removals(block, usage_table, state, first);
	for (int pass = 0; pass < 3; pass++)
	{
		/* first a look, as what is done halfway cannot be undone */
		bool		removals = pass == 2;
		OrderedScan scan;
		HeapTuple	tuple;

		abp_entry_scan_begin_at(&scan, usage_table, removals ? OUTBOX_REMOVAL(state) : state,
								BTGreaterEqualStrategyNumber, F_INT8GE, first, GetActiveSnapshot());
		while ((tuple = abp_scan_next(&scan)) != NULL && BLOCK_OF(ENTRY_FORM(tuple)->id) == first)
		{
			OutboxEntry entry;
			IdSet		left;

			if (TransactionIdIsValid(abp_entry_deleter(tuple)))
			{
				abp_scan_end(&scan);
				MemoryContextSwitchTo(old);
				MemoryContextDelete(context);
				return 0;
			}
			if (pass == 0)
				continue;
			if (removals)
			{
				done += delete_entry(scan.rel, tuple);
				continue;
			}
			entry = abp_entry_read(tuple, RelationGetDescr(scan.rel));
			left = left_of(&entry.ids, block);
			if (abp_idset_count(&left) == abp_idset_count(&entry.ids) ||
				!delete_entry(scan.rel, tuple))
				continue;
			entry.ids = left;
			abp_outbox_put(&entry, 1);
		}
		abp_scan_end(&scan);
	}
	MemoryContextSwitchTo(old);
	MemoryContextDelete(context);
	return done;
}

/* Add up a table's rows that were not queued. */
static void
sum_up_not_queued(Oid usage_table)
{
	static Statement add = {
		"WITH gone AS (DELETE FROM aibilling.outbox_entry WHERE usage_table = $1 AND state = 'n'"
		"  AND not_before = '-infinity' RETURNING ids)"
		" UPDATE aibilling.attachment SET not_queued = not_queued + (SELECT coalesce(sum("
		"  coalesce((SELECT sum(coalesce(upper(r), 9223372036854775807) - lower(r)) FROM unnest(g.ids) r), 1)), 0)"
		"  FROM gone g) WHERE usage = $1",
		1, {REGCLASSOID}
	};
	Datum		values[1] = {ObjectIdGetDatum(usage_table)};
	OrderedScan scan;
	bool		any;

	abp_entry_scan_begin(&scan, usage_table, OUTBOX_NOT_QUEUED, PG_INT64_MIN, DT_NOEND, AccessShareLock);
	any = abp_scan_next(&scan) != NULL;
	abp_scan_end(&scan);
	if (any)
		abp_statement_run_alone(&add, values, NULL);
}

/*
 * Bring a table's entries in order: UPDATE and DELETE of usage rows only note
 * what is to be taken out of them.  For the shipper, before it reads them, by
 * the active snapshot.  Returns false if there is more to do than max_removals,
 * or others are in the way.
 */
bool
abp_outbox_tidy(Oid usage_table, int max_removals)
{
	int			done = 0;
	bool		finished = true;
	OrderedScan scan;
	HeapTuple	tuple;
	char		state = 0;
	int64		first = 0;

	sum_up_not_queued(usage_table);
	abp_feed_sum_up(usage_table);
	abp_entry_scan_begin_removals(&scan, usage_table, RowExclusiveLock);
	while ((tuple = abp_scan_next(&scan)) != NULL)
	{
		const EntryForm *form = ENTRY_FORM(tuple);
		int			tidied;

		if (state == form->state && first == BLOCK_OF(form->id))
			continue;			/* done with its block */
		if (done >= max_removals)
		{
			finished = false;
			break;
		}
		state = form->state;
		first = BLOCK_OF(form->id);
		tidied = tidy_block(usage_table, STATE_OF_REMOVAL(state), first);
		finished &= tidied > 0;
		done += tidied;
	}
	abp_scan_end(&scan);
	return finished;
}

/* Has one of the ids, sorted, been taken? */
static bool
is_taken(IdSet *taken, int64 highest, IdSet *ids)
{
	IdSet		again;

	if (ids->ranges[0].first > highest)
		return false;
	again = abp_idset_intersect(ids, taken);
	return again.nranges > 0;
}

/*
 * Take up to max_ids ids out of the outbox, by the active snapshot: their
 * entries are deleted in the current transaction.  Entries that another
 * transaction has are passed over, never waited for, and so are those that
 * begin with an id of "except", and of several of one id all but one: rows that
 * share it may each have theirs taken out of the outbox at this moment.  All
 * that are taken may have been stored by Polar, or none.
 *
 * OUTBOX_WAITING: entries whose not_before is at most "until".  Other states:
 * from *cursor on, which is moved to a little before the last entry seen: rows
 * of lower ids may commit a little later.
 *
 * The caller has brought the entries in order (abp_outbox_tidy).  Returns the
 * ids, in the current memory context.
 */
IdSet
abp_outbox_take(Oid usage_table, char state, TimestampTz until, IdSet *except,
				int64 *cursor, int64 max_ids, TakenEntries *entries)
{
	IdSet		taken = {0};
	int64		ntaken = 0;
	int64		highest = PG_INT64_MIN; /* id that is taken */
	OrderedScan scan;
	HeapTuple	tuple;
	OutboxEntry rest = {0};

	memset(entries, 0, sizeof(TakenEntries));
	abp_entry_scan_begin(&scan, usage_table, state, *cursor, until, RowExclusiveLock);

	while (ntaken < max_ids && (tuple = abp_scan_next(&scan)) != NULL)
	{
		OutboxEntry entry = abp_entry_read(tuple, RelationGetDescr(scan.rel));
		int64		first = entry.ids.ranges[0].first;

		if (ntaken > 0 && entry.outcome_unknown != entries->outcome_unknown)
			break;
		*cursor = first > PG_INT64_MIN + CURSOR_MARGIN ? first - CURSOR_MARGIN : PG_INT64_MIN + 1;
		if (abp_idset_contains(except, first) || is_taken(&taken, highest, &entry.ids) ||
			!delete_entry(scan.rel, tuple))
			continue;

		entries->attempts = Max(entries->attempts, entry.attempts);
		entries->outcome_unknown = entry.outcome_unknown;
		entries->state = state;
		if (ntaken + abp_idset_count(&entry.ids) > max_ids)
		{
			rest = entry;
			rest.ids = abp_idset_split(&entry.ids, max_ids - ntaken);
		}
		ntaken += abp_idset_count(&entry.ids);
		highest = Max(highest, entry.ids.ranges[entry.ids.nranges - 1].last);
		abp_idset_add_set(&taken, &entry.ids, CurrentMemoryContext);
	}

	abp_scan_end(&scan);
	if (rest.ids.nranges > 0)
		abp_outbox_put(&rest, 1);
	CommandCounterIncrement();
	abp_idset_sort(&taken);
	return taken;
}

/*
 * Take one entry, which abp_outbox_next_unpriced has returned, out of the
 * outbox.  Returns false if another transaction has it.
 */
bool
abp_outbox_take_entry(const OutboxEntry *entry)
{
	Relation	rel = table_open(abp_extension_needed("outbox_entry"), RowExclusiveLock);
	HeapTupleData tuple = {.t_self = entry->tid};
	bool		taken = delete_entry(rel, &tuple);

	table_close(rel, NoLock);
	CommandCounterIncrement();
	return taken;
}

/* The id of the first or the last of a table's entries in one state, of which there are some. */
static int64
id_at_end(Oid usage_table, char state, ScanDirection direction)
{
	OrderedScan scan;
	HeapTuple	tuple;
	int64		id;

	abp_entry_scan_begin_at(&scan, usage_table, state, BTGreaterEqualStrategyNumber, F_INT8GE,
							PG_INT64_MIN, GetActiveSnapshot());
	tuple = systable_getnext_ordered(scan.scan, direction);
	id = tuple == NULL ? 0 : ENTRY_FORM(tuple)->id;
	abp_scan_end(&scan);
	return id;
}

/* Count a table's entries in one state, or removals from it; see below. */
static int64
count_ids(Oid usage_table, char state, int64 exact_limit, bool *estimated, int64 *first_id)
{
	OrderedScan scan;
	HeapTuple	tuple;
	int64		count = 0;
	int64		lowest = PG_INT64_MAX;
	int64		highest = PG_INT64_MIN;
	bool		more;

	abp_entry_scan_begin(&scan, usage_table, state, PG_INT64_MIN, DT_NOEND, AccessShareLock);
	while (count < exact_limit && (tuple = abp_scan_next(&scan)) != NULL)
	{
		const EntryForm *form = ENTRY_FORM(tuple);
		IdSet		ids = abp_entry_ids(tuple, RelationGetDescr(scan.rel));

		lowest = Min(lowest, ids.ranges[0].first);
		highest = Max(highest, form->id);
		count += abp_idset_count(&ids);
		abp_idset_free(&ids);
	}
	more = count >= exact_limit && abp_scan_next(&scan) != NULL;
	abp_scan_end(&scan);
	if (first_id != NULL && count > 0)
		*first_id = lowest;

	/* The ids that lie beyond those counted tell how many more, about. */
	if (more)
	{
		float8		density = (float8) count / ((float8) highest - (float8) lowest + 1);
		float8		beyond = (float8) id_at_end(usage_table, state, BackwardScanDirection) - (float8) highest;

		if (state == OUTBOX_WAITING)
			beyond += (float8) lowest - (float8) id_at_end(usage_table, state, ForwardScanDirection);
		*estimated = true;
		count += (int64) Min(Max(beyond, 0) * density, 1e15);
	}
	return count;
}

/*
 * Count a table's ids in one state.  Exact up to exact_limit ids; beyond, the
 * rest is estimated from how densely the counted ids lie, and *estimated is
 * set.  *first_id is about the lowest id, untouched if there is none.
 */
int64
abp_outbox_count(Oid usage_table, char state, int64 exact_limit,
				 bool *estimated, int64 *first_id)
{
	int64		count;

	*estimated = false;
	PushActiveSnapshot(GetLatestSnapshot());
	count = count_ids(usage_table, state, exact_limit, estimated, first_id);
	if (abp_entries_have_removals(usage_table))
		count -= count_ids(usage_table, OUTBOX_REMOVAL(state), exact_limit, estimated, NULL);
	PopActiveSnapshot();
	return Max(count, 0);
}

/* How many waiting ids an entry adds, or takes away. */
static int64
counted_ids(HeapTuple tuple, TupleDesc desc)
{
	char		state = ENTRY_FORM(tuple)->state;
	IdSet		ids = abp_entry_ids(tuple, desc);
	int64		count = abp_idset_count(&ids);

	CHECK_FOR_INTERRUPTS();
	abp_idset_free(&ids);
	return OUTBOX_IS_NOTE(state) ? 0 : OUTBOX_IS_REMOVAL(state) ? -count : count;
}

/*
 * How many ids all entries hold, of whatever table.  Without an index: this is
 * asked while the outbox is being dropped, when its index is gone.
 */
int64
abp_outbox_count_all(void)
{
	Relation	rel = table_open(abp_extension_needed("outbox_entry"), AccessShareLock);
	SysScanDesc scan;
	HeapTuple	tuple;
	int64		count = 0;

	PushActiveSnapshot(GetLatestSnapshot());
	scan = systable_beginscan(rel, InvalidOid, false, GetActiveSnapshot(), 0, NULL);
	while ((tuple = systable_getnext(scan)) != NULL)
	{
		count += counted_ids(tuple, RelationGetDescr(rel));
	}
	systable_endscan(scan);
	PopActiveSnapshot();
	table_close(rel, NoLock);
	return Max(count, 0);
}

/*
 * Drop a table's entries.  Returns how many ids they held.  The caller has
 * locked the table against those who change its rows, and the shipper.
 */
int64
abp_outbox_discard(Oid usage_table)
{
	int64		count = 0;
	OrderedScan scan;
	ScanKeyData key;
	HeapTuple	tuple;

	ScanKeyInit(&key, Anum_entry_usage_table, BTEqualStrategyNumber,
				F_OIDEQ, ObjectIdGetDatum(usage_table));
	PushActiveSnapshot(GetLatestSnapshot());
	abp_scan_begin(&scan, "outbox_entry", "outbox_entry_key", 1, &key, RowExclusiveLock);
	while ((tuple = abp_scan_next(&scan)) != NULL)
	{
		count += counted_ids(tuple, RelationGetDescr(scan.rel));
		simple_heap_delete(scan.rel, &tuple->t_self);
	}
	abp_scan_end(&scan);
	PopActiveSnapshot();
	CommandCounterIncrement();
	return Max(count, 0);
}

/*
 * A scan over a table's ids in one state, in memory of the caller's: entry by
 * entry what is left of each.  Returns NULL at the end.
 */
static OutboxEntry *
next_left(OrderedScan *scan, OutboxEntry *entry)
{
	HeapTuple	tuple;

	while ((tuple = abp_scan_next(scan)) != NULL)
	{
		*entry = abp_entry_read(tuple, RelationGetDescr(scan->rel));
		entry->tid = tuple->t_self;
		entry->ids = abp_outbox_left(entry->usage_table, entry->state, &tuple->t_self,
									 ENTRY_FORM(tuple)->id, &entry->ids);
		if (entry->ids.nranges > 0)
			return entry;
	}
	return NULL;
}

/*
 * All ids of a table by the active snapshot, in the current memory context: in
 * *unsure those that Polar may have.
 */
void
abp_outbox_ids(Oid usage_table, IdSet *sure, IdSet *unsure)
{
	bool		removals = abp_entries_have_removals(usage_table);

	for (int i = 0; i < NUM_OUTBOX_STATES; i++)
	{
		OrderedScan scan;
		HeapTuple	tuple;
		OutboxEntry entry;

		abp_entry_scan_begin(&scan, usage_table, abp_outbox_states[i], PG_INT64_MIN, DT_NOEND,
							 AccessShareLock);
		if (removals)
		{
			while (next_left(&scan, &entry) != NULL)
				abp_idset_add_set(entry.outcome_unknown ? unsure : sure, &entry.ids,
								  CurrentMemoryContext);
		}
		else
		{
			while ((tuple = abp_scan_next(&scan)) != NULL)
			{
				IdSet		ids = abp_entry_ids(tuple, RelationGetDescr(scan.rel));

				abp_idset_add_set(ENTRY_FORM(tuple)->outcome_unknown ? unsure : sure, &ids,
								  CurrentMemoryContext);
				abp_idset_free(&ids);
			}
		}
		abp_scan_end(&scan);
	}
	abp_idset_sort(sure);
	abp_idset_sort(unsure);
}

/*
 * The same, together.
 */
IdSet
abp_outbox_all_ids(Oid usage_table)
{
	IdSet		sure = {0};
	IdSet		unsure = {0};

	abp_outbox_ids(usage_table, &sure, &unsure);
	abp_idset_add_set(&sure, &unsure, CurrentMemoryContext);
	abp_idset_sort(&sure);
	return sure;
}

/*
 * Up to max_ids ids of a table in one state, left where they are.
 */
IdSet
abp_outbox_peek(Oid usage_table, char state, int64 max_ids)
{
	IdSet		found = {0};
	OrderedScan scan;
	OutboxEntry entry;

	PushActiveSnapshot(GetLatestSnapshot());
	abp_entry_scan_begin(&scan, usage_table, state, PG_INT64_MIN, DT_NOEND, AccessShareLock);
	while (abp_idset_count(&found) < max_ids && next_left(&scan, &entry) != NULL)
		abp_idset_add_set(&found, &entry.ids, CurrentMemoryContext);
	abp_scan_end(&scan);
	PopActiveSnapshot();
	(void) abp_idset_split(&found, max_ids);
	return found;
}

/*
 * Move those of "only" that are in one state to ready.  The caller has locked
 * their rows.  Returns how many.
 */
int64
abp_outbox_make_ready(Oid usage_table, char state, IdSet *only)
{
	int64		count = 0;
	OrderedScan scan;
	OutboxEntry entry;
	MemoryContext context = AllocSetContextCreate(CurrentMemoryContext, "aibilling_polar outbox move",
												  ALLOCSET_DEFAULT_SIZES);
	MemoryContext old;

	PushActiveSnapshot(GetLatestSnapshot());
	abp_entry_scan_begin(&scan, usage_table, state, PG_INT64_MIN, DT_NOEND, RowExclusiveLock);
	old = MemoryContextSwitchTo(context);
	while (next_left(&scan, &entry) != NULL)
	{
		entry.ids = abp_idset_intersect(&entry.ids, only);
		if (entry.ids.nranges > 0)
		{
			OutboxEntry change[2] = {
				{.usage_table = usage_table,.state = OUTBOX_REMOVAL(state),.ids = entry.ids},
				{.usage_table = usage_table,.state = OUTBOX_READY,
				.outcome_unknown = entry.outcome_unknown,.ids = entry.ids}
			};

			count += abp_idset_count(&entry.ids);
			abp_outbox_put(change, lengthof(change));
		}
		MemoryContextReset(context);
	}
	MemoryContextSwitchTo(old);
	MemoryContextDelete(context);
	abp_scan_end(&scan);
	PopActiveSnapshot();
	CommandCounterIncrement();
	return count;
}

/*
 * About the lowest and the highest id of a table's entries in one state, which
 * is not OUTBOX_WAITING: none is below *first or above *last.  Returns false
 * if there is no entry.
 */
bool
abp_outbox_bounds(Oid usage_table, char state, int64 *first, int64 *last)
{
	OrderedScan scan;
	OutboxEntry entry;
	HeapTuple	tuple;
	bool		found;

	PushActiveSnapshot(GetLatestSnapshot());
	abp_entry_scan_begin(&scan, usage_table, state, PG_INT64_MIN, DT_NOEND, AccessShareLock);
	found = next_left(&scan, &entry) != NULL;
	abp_scan_end(&scan);
	if (found)
	{
		*first = BLOCK_OF(entry.ids.ranges[0].first);
		abp_entry_scan_begin(&scan, usage_table, state, PG_INT64_MIN, DT_NOEND, AccessShareLock);
		tuple = systable_getnext_ordered(scan.scan, BackwardScanDirection);
		*last = tuple == NULL ? *first : BLOCK_OF(ENTRY_FORM(tuple)->id) + (OUTBOX_BLOCK - 1);
		abp_scan_end(&scan);
	}
	PopActiveSnapshot();
	return found;
}

/*
 * When is the next waiting entry of a table due?  DT_NOEND if none waits.
 */
TimestampTz
abp_outbox_next_due(Oid usage_table)
{
	TimestampTz due = DT_NOEND;
	OrderedScan scan;
	OutboxEntry entry;

	PushActiveSnapshot(GetLatestSnapshot());
	abp_entry_scan_begin(&scan, usage_table, OUTBOX_WAITING, 0, DT_NOEND, AccessShareLock);
	if (next_left(&scan, &entry) != NULL)
		due = entry.not_before;
	abp_scan_end(&scan);
	PopActiveSnapshot();
	return due;
}

/*
 * The next unpriced entry of a table behind *cursor, which is moved to it; NULL
 * at the end.  By the active snapshot, in the current memory context.
 */
OutboxEntry *
abp_outbox_next_unpriced(Oid usage_table, EntryCursor *cursor)
{
	OutboxEntry *entry = palloc(sizeof(OutboxEntry));
	OrderedScan scan;
	HeapTuple	tuple;
	bool		found = false;

	abp_entry_scan_begin(&scan, usage_table, OUTBOX_UNPRICED, cursor->id, DT_NOEND, AccessShareLock);
	while (!found && (tuple = abp_scan_next(&scan)) != NULL)
	{
		const EntryForm *form = ENTRY_FORM(tuple);

		/* entries of one key lie in the order of their places in the table */
		if (form->id < cursor->id ||
			(form->id == cursor->id && ItemPointerIsValid(&cursor->tid) &&
			 ItemPointerCompare(&tuple->t_self, &cursor->tid) <= 0))
			continue;
		cursor->id = form->id;
		cursor->tid = tuple->t_self;
		*entry = abp_entry_read(tuple, RelationGetDescr(scan.rel));
		entry->tid = tuple->t_self;
		entry->ids = abp_outbox_left(usage_table, OUTBOX_UNPRICED, &tuple->t_self, form->id,
									 &entry->ids);
		found = entry->ids.nranges > 0;
	}
	abp_scan_end(&scan);
	return found ? entry : NULL;
}
