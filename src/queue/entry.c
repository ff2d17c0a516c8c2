/*-------------------------------------------------------------------------
 *
 * entry.c
 *	  How the outbox is stored: its entries, written and read.
 *
 * The outbox holds entries of ids in one state.  An entry of one id has it as
 * its key; one of several ids, which all lie in the same block of OUTBOX_BLOCK
 * ids, has the block's first id.  So the entries of a given id are found under
 * two keys, however much else waits.
 *
 * An UPDATE or DELETE of a usage row takes its id out of an entry by another
 * entry, a removal, whose state is the capital letter: what is left is the
 * entries less the removals, each id as often as it stands there.  So nobody
 * but the shipper changes an entry, and statements on different rows never
 * wait for each other.  The shipper brings entries and removals together.
 *
 * Entries are inserted and read through the table's access method, without
 * SQL: both happen for every batch, the first inside users' transactions.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/heapam.h"
#include "access/table.h"
#include "access/transam.h"
#include "access/xact.h"
#include "catalog/pg_index.h"
#include "executor/executor.h"
#include "miscadmin.h"
#include "storage/procarray.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/multirangetypes.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"
#include "utils/typcache.h"

#include "base/extension.h"
#include "base/idset.h"
#include "base/table_scan.h"
#include "base/text_view.h"
#include "queue/entry.h"

/* Where entries are written. */
typedef struct EntryWriter
{
	Relation	rel;
	Relation	index;			/* NULL: not as we have created them */
	Relation	waiting;		/* opened for the first entry that waits */
} EntryWriter;

/* Does an index hold plain columns of every tuple? */
static bool
is_plain_index(Relation index)
{
	return !index->rd_index->indisunique &&
		heap_attisnull(index->rd_indextuple, Anum_pg_index_indexprs, NULL) &&
		heap_attisnull(index->rd_indextuple, Anum_pg_index_indpred, NULL);
}

/* The two indexes that we have created, in this order, and no other? */
static bool
indexes_are_ours(List *indexes)
{
	const char *second = list_length(indexes) == 2 ? get_rel_name(lsecond_oid(indexes)) : NULL;

	return second != NULL && strcmp(second, "outbox_entry_waiting") == 0;
}

/*
 * Open the table of entries, and our index of it unless somebody has changed the indexes.
 */
static void
open_writer(EntryWriter *writer, Oid relid)
{
	List	   *indexes;

	writer->rel = table_open(relid, RowExclusiveLock);
	writer->index = writer->waiting = NULL;
	indexes = RelationGetIndexList(writer->rel);
	if (indexes_are_ours(indexes))
	{
		writer->index = index_open(linitial_oid(indexes), RowExclusiveLock);
		if (!is_plain_index(writer->index))
		{
			index_close(writer->index, NoLock);
			writer->index = NULL;
		}
	}
	list_free(indexes);
}

/* Close what open_writer has opened; the locks stay. */
static void
close_writer(EntryWriter *writer)
{
	if (writer->waiting != NULL)
		index_close(writer->waiting, NoLock);
	if (writer->index != NULL)
		index_close(writer->index, NoLock);
	table_close(writer->rel, NoLock);
}

/* Insert a tuple as the executor does, whatever indexes the table has. */
static void
insert_generally(Relation rel, HeapTuple tuple)
{
	EState	   *estate = CreateExecutorState();
	ResultRelInfo *target = makeNode(ResultRelInfo);
	TupleTableSlot *slot = MakeSingleTupleTableSlot(RelationGetDescr(rel), &TTSOpsHeapTuple);

	/* expressions and predicates may look at tables */
	PushActiveSnapshot(GetTransactionSnapshot());
	InitResultRelInfo(target, rel, 1, NULL, 0);
	ExecOpenIndices(target, false);
	ExecStoreHeapTuple(tuple, slot, false);
	ExecSimpleRelationInsert(target, estate, slot);
	ExecCloseIndices(target);
	ExecDropSingleTupleTableSlot(slot);
	FreeExecutorState(estate);
	PopActiveSnapshot();
}

/* Enter a tuple that is in the table into one of our indexes. */
static void
insert_into_index(Relation rel, Relation index, HeapTuple tuple, const Datum *values)
{
	Form_pg_index form = index->rd_index;
	Datum		key[INDEX_MAX_KEYS];
	bool		nulls[INDEX_MAX_KEYS] = {false};

	for (int i = 0; i < form->indnatts; i++)
		key[i] = values[form->indkey.values[i] - 1];
	index_insert(index, key, nulls, &tuple->t_self, rel, UNIQUE_CHECK_NO, false, NULL);
}

/* Before 1.2 an entry has its first and its last id: 1.2's update reads that. */
static bool
is_of_old_form(TupleDesc desc)
{
	return strcmp(NameStr(TupleDescAttr(desc, Anum_entry_id - 1)->attname), "first") == 0;
}

/* Make the values of an entry those of its old form. */
static void
take_old_form(Datum *values, bool *nulls, const IdSet *ids)
{
	values[Anum_entry_error] = values[Anum_entry_error - 1];
	nulls[Anum_entry_error] = nulls[Anum_entry_error - 1];
	values[Anum_entry_ids] = values[Anum_entry_ids - 1];
	nulls[Anum_entry_ids] = ids->nranges == 1;
	values[Anum_entry_id - 1] = Int64GetDatum(ids->ranges[0].first);
	values[Anum_entry_id] = Int64GetDatum(ids->ranges[ids->nranges - 1].last);
	nulls[Anum_entry_id] = false;
}

/*
 * Write one entry: nearly every commit of a usage row does, so without what
 * the executor would look up of indexes in general.
 */
static void
write_entry(EntryWriter *writer, const OutboxEntry *entry, IdSet *ids)
{
	TupleDesc	desc = RelationGetDescr(writer->rel);
	Datum		values[MaxHeapAttributeNumber];
	bool		nulls[MaxHeapAttributeNumber];
	HeapTuple	tuple;
	int64		first = ids->ranges[0].first;
	bool		single = ids->nranges == 1 && first == ids->ranges[0].last;

	/* beyond ours are the columns that a superuser has added */
	for (int i = 0; i < desc->natts; i++)
		nulls[i] = i >= Natts_entry;

	values[Anum_entry_usage_table - 1] = ObjectIdGetDatum(entry->usage_table);
	values[Anum_entry_state - 1] = CharGetDatum(entry->state);
	values[Anum_entry_attempts - 1] = Int32GetDatum(entry->attempts);
	values[Anum_entry_outcome_unknown - 1] = BoolGetDatum(entry->outcome_unknown);
	values[Anum_entry_not_before - 1] =
		TimestampTzGetDatum(entry->state == OUTBOX_WAITING ? entry->not_before : DT_NOBEGIN);
	values[Anum_entry_id - 1] = Int64GetDatum(single ? first : BLOCK_OF(first));
	nulls[Anum_entry_ids - 1] = single;
	if (!single)
		values[Anum_entry_ids - 1] = abp_idset_to_multirange(ids);
	nulls[Anum_entry_error - 1] = entry->error == NULL;
	if (entry->error != NULL)
		values[Anum_entry_error - 1] = PointerGetDatum(abp_reason_text(entry->error));

	if (writer->index == NULL && is_of_old_form(desc))
		take_old_form(values, nulls, ids);
	tuple = heap_form_tuple(desc, values, nulls);
	if (writer->index == NULL)
		insert_generally(writer->rel, tuple);
	else
	{
		simple_heap_insert(writer->rel, tuple);
		insert_into_index(writer->rel, writer->index, tuple, values);
		if (entry->state == OUTBOX_WAITING)
		{
			if (writer->waiting == NULL)
				writer->waiting = index_open(abp_extension_needed("outbox_entry_waiting"),
											 RowExclusiveLock);
			insert_into_index(writer->rel, writer->waiting, tuple, values);
		}
	}
	heap_freetuple(tuple);
}

/*
 * Write entries into the table of this OID, each cut into blocks.
 */
void
abp_entries_put(Oid relid, OutboxEntry *entries, int nentries)
{
	EntryWriter writer;
	MemoryContext context = AllocSetContextCreate(CurrentMemoryContext,
												  "aibilling_polar outbox entries",
												  ALLOCSET_DEFAULT_SIZES);
	MemoryContext old = MemoryContextSwitchTo(context);

	open_writer(&writer, relid);

	for (int i = 0; i < nentries; i++)
	{
		IdSet	   *ids = &entries[i].ids;
		IdSet		block = {0};
		int64		block_of = 0;

		abp_idset_sort(ids);
		for (int r = 0; r < ids->nranges; r++)
		{
			int64		first = ids->ranges[r].first;
			int64		last = ids->ranges[r].last;

			for (;;)
			{
				int64		this_block = BLOCK_OF(first);
				int64		end = Min(last, this_block + (OUTBOX_BLOCK - 1));

				CHECK_FOR_INTERRUPTS();

				if (block.nranges > 0 && this_block != block_of)
				{
					write_entry(&writer, &entries[i], &block);
					abp_idset_clear(&block);
				}
				block_of = this_block;
				abp_idset_add(&block, first, end, context);
				if (end == last)
					break;
				first = end + 1;
			}
		}
		if (block.nranges > 0)
			write_entry(&writer, &entries[i], &block);
		abp_idset_free(&block);
	}
	close_writer(&writer);
	MemoryContextSwitchTo(old);
	MemoryContextDelete(context);
}

/* The ids of an entry's tuple, in the current memory context. */
IdSet
abp_entry_ids(HeapTuple tuple, TupleDesc desc)
{
	IdSet		ids = {0};
	int64		first = ENTRY_FORM(tuple)->id;
	int64		last = first;
	AttrNumber	column = Anum_entry_ids;
	bool		isnull;
	Datum		value;

	if (unlikely(is_of_old_form(desc)))
		last = DatumGetInt64(heap_getattr(tuple, column++, desc, &isnull));
	value = heap_getattr(tuple, column, desc, &isnull);
	if (isnull)
		abp_idset_add(&ids, first, last, CurrentMemoryContext);
	else
		ids = abp_idset_from_multirange(value);
	return ids;
}

/* All of an entry's tuple, in the current memory context. */
OutboxEntry
abp_entry_read(HeapTuple tuple, TupleDesc desc)
{
	const EntryForm *form = ENTRY_FORM(tuple);
	OutboxEntry entry = {
		.usage_table = form->usage_table,
		.state = form->state,
		.attempts = form->attempts,
		.outcome_unknown = form->outcome_unknown,
		.not_before = form->not_before,
		.ids = abp_entry_ids(tuple, desc)
	};
	bool		isnull;
	Datum		value = heap_getattr(tuple, Anum_entry_error, desc, &isnull);

	if (!isnull)
		entry.error = TextDatumGetCString(value);
	return entry;
}

/*
 * Does an entry's tuple hold an id?
 */
bool
abp_entry_holds(HeapTuple tuple, TupleDesc desc, int64 id)
{
	bool		isnull;
	Datum		ids = heap_getattr(tuple, Anum_entry_ids, desc, &isnull);
	TypeCacheEntry *type;

	if (isnull)
		return ENTRY_FORM(tuple)->id == id;
	type = lookup_type_cache(INT8MULTIRANGEOID, TYPECACHE_MULTIRANGE_INFO);
	return multirange_contains_elem_internal(type->rngtype, DatumGetMultirangeTypeP(ids),
											 Int64GetDatum(id));
}

/*
 * Begin a scan, by the active snapshot, over the entries of one table and
 * state: those due by "until" where they wait for a time, else from from_id's
 * block on.
 */
void
abp_entry_scan_begin(OrderedScan *scan, Oid usage_table, char state, int64 from_id,
					 TimestampTz until, LOCKMODE lockmode)
{
	ScanKeyData keys[4];
	int			nkeys = 3;

	ScanKeyInit(&keys[0], Anum_entry_usage_table, BTEqualStrategyNumber,
				F_OIDEQ, ObjectIdGetDatum(usage_table));
	ScanKeyInit(&keys[1], Anum_entry_state, BTEqualStrategyNumber,
				F_CHAREQ, CharGetDatum(state));
	if (state == OUTBOX_WAITING)
		ScanKeyInit(&keys[2], Anum_entry_not_before, BTLessEqualStrategyNumber,
					F_TIMESTAMPTZ_LE, TimestampTzGetDatum(until));
	else
	{
		ScanKeyInit(&keys[2], Anum_entry_not_before, BTEqualStrategyNumber,
					F_TIMESTAMPTZ_EQ, TimestampTzGetDatum(DT_NOBEGIN));
		ScanKeyInit(&keys[3], Anum_entry_id, BTGreaterEqualStrategyNumber,
					F_INT8GE, Int64GetDatum(BLOCK_OF(from_id)));
		nkeys = 4;
	}
	abp_scan_begin(scan, "outbox_entry", "outbox_entry_key", nkeys, keys, lockmode);
}

/* Begin a scan over the entries of one table and state with this key. */
void
abp_entry_scan_begin_at(OrderedScan *scan, Oid usage_table, char state,
						StrategyNumber strategy, RegProcedure compare, int64 key, Snapshot snapshot)
{
	ScanKeyData keys[4];
	int			nkeys = 0;
	bool		waiting = state == OUTBOX_WAITING;

	ScanKeyInit(&keys[nkeys++], Anum_entry_usage_table, BTEqualStrategyNumber,
				F_OIDEQ, ObjectIdGetDatum(usage_table));
	if (!waiting)
	{
		ScanKeyInit(&keys[nkeys++], Anum_entry_state, BTEqualStrategyNumber,
					F_CHAREQ, CharGetDatum(state));
		ScanKeyInit(&keys[nkeys++], Anum_entry_not_before, BTEqualStrategyNumber,
					F_TIMESTAMPTZ_EQ, TimestampTzGetDatum(DT_NOBEGIN));
	}
	ScanKeyInit(&keys[nkeys++], Anum_entry_id, strategy, compare, Int64GetDatum(key));
	abp_scan_begin_as_of(scan, "outbox_entry",
						 waiting ? "outbox_entry_waiting" : "outbox_entry_key",
						 nkeys, keys, AccessShareLock, snapshot);
}

/* Begin a scan over a table's removals, by state and block. */
void
abp_entry_scan_begin_removals(OrderedScan *scan, Oid usage_table, LOCKMODE lockmode)
{
	ScanKeyData keys[2];

	ScanKeyInit(&keys[0], Anum_entry_usage_table, BTEqualStrategyNumber,
				F_OIDEQ, ObjectIdGetDatum(usage_table));
	ScanKeyInit(&keys[1], Anum_entry_state, BTLessStrategyNumber,
				F_CHARLT, CharGetDatum('a'));
	abp_scan_begin(scan, "outbox_entry", "outbox_entry_key", 2, keys, lockmode);
}

/* Has anything been taken out of a table's entries that still holds it? */
bool
abp_entries_have_removals(Oid usage_table)
{
	OrderedScan scan;
	bool		found;

	abp_entry_scan_begin_removals(&scan, usage_table, AccessShareLock);
	found = abp_scan_next(&scan) != NULL;
	abp_scan_end(&scan);
	return found;
}

/*
 * The transaction that is deleting a tuple, or has just done so, of which we
 * see the state before; InvalidTransactionId if none.
 */
TransactionId
abp_entry_deleter(HeapTuple tuple)
{
	HeapTupleHeader header = tuple->t_data;
	TransactionId xid;

	if ((header->t_infomask & HEAP_XMAX_INVALID) || HEAP_XMAX_IS_LOCKED_ONLY(header->t_infomask))
		return InvalidTransactionId;
	xid = HeapTupleHeaderGetUpdateXid(header);
	if (TransactionIdIsCurrentTransactionId(xid) ||
		(!TransactionIdIsInProgress(xid) && !TransactionIdDidCommit(xid)))
		return InvalidTransactionId;
	return xid;
}
