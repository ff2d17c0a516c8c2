/*-------------------------------------------------------------------------
 *
 * outbox.c
 *	  The outbox, the ledger and the usage rows: all their SQL.
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
 * Entries are inserted and taken through the table's access method, without
 * SQL: both happen for every batch, the first inside users' transactions.
 * So is read what a new session asks first, attachments and the ledger's
 * totals, which SQL would plan for longer than read.
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
#include "access/xlog.h"
#include "catalog/namespace.h"
#include "catalog/pg_index.h"
#include "catalog/pg_subscription_rel.h"
#include "catalog/pg_type.h"
#include "commands/extension.h"
#include "executor/executor.h"
#include "executor/spi.h"
#include "foreign/foreign.h"
#include "miscadmin.h"
#include "storage/bufmgr.h"
#include "storage/lmgr.h"
#include "storage/procarray.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/guc.h"
#include "utils/inval.h"
#include "utils/jsonb.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/multirangetypes.h"
#include "utils/portal.h"
#include "utils/rangetypes.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"
#include "utils/timestamp.h"
#include "utils/typcache.h"

#include "compat.h"
#include "queue/outbox.h"

/* The most ids an entry can hold; see the head of this file. */
#define OUTBOX_BLOCK 1024

/* How far, in ids, a scan goes back when it continues. */
#define CURSOR_MARGIN (2 * OUTBOX_BLOCK)

/* In how many deliveries that are summed up the last error is looked for. */
#define LEDGER_ERRORS 1000

/*
 * How many usage rows are read at a time.  As jsonb, only one: a few kB on disk
 * may be many megabytes then.
 */
#define READ_CHUNK 50
#define READ_CHUNK_WHOLE 1

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

/* columns of aibilling.ledger that are read without SQL */
#define Anum_delivery_id 1
#define Anum_delivery_usage_table 3
#define Anum_delivery_usage_ids 4
#define Anum_delivery_events 5
#define Anum_delivery_state 7
#define Anum_delivery_duplicates 11
#define Anum_delivery_unexpected_duplicates 12
#define Anum_delivery_vanished 13
#define Anum_delivery_finished_at 15
#define Anum_delivery_error 18

/* The columns up to "usage_table" as they lie in a tuple. */
typedef struct DeliveryForm
{
	int64		id;
	NameData	server;
	Oid			usage_table;
} DeliveryForm;

#define DELIVERY_FORM(tuple) ((const DeliveryForm *) GETSTRUCT(tuple))

/* A tuple of aibilling.delivery_total. */
typedef struct DeliveryTotalForm
{
	Oid			usage_table;
	int64		up_to;
	int64		deliveries;
	int64		delivered;
	int64		duplicates;
	int64		unexpected_duplicates;
	int64		vanished;
} DeliveryTotalForm;

/* The columns up to "serverid" of aibilling.attachment, as they lie in a tuple. */
typedef struct AttachmentForm
{
	Oid			usage;
	NameData	server;
	Oid			serverid;
} AttachmentForm;

#define ATTACHMENT_FORM(tuple) ((const AttachmentForm *) GETSTRUCT(tuple))

/* columns of aibilling.attachment */
#define Anum_attachment_usage 1
#define Anum_attachment_blocked_until 5
#define Anum_attachment_blocked_reason 6
#define Anum_attachment_ledger_from 7
#define Anum_attachment_not_queued 8

/* columns of aibilling.server_state */
#define Anum_state_server 1
#define Anum_state_paused 2
#define Anum_state_reason 3
#define Anum_state_failures 5
#define Anum_state_not_before 6
#define Anum_state_role 7		/* since 1.1 */

/* A tuple of aibilling.database_identity. */
typedef struct IdentityForm
{
	int64		system_identifier;
	Oid			database;
	int64		timeline;
} IdentityForm;

/* A statement that is prepared once a session. */
typedef struct Statement
{
	const char *sql;
	int			nargs;
	Oid			argtypes[10];
	SPIPlanPtr	plan;
} Statement;

/* What is read of usage rows. */
typedef enum ReadKind
{
	READ_COLUMNS,				/* a row as it is stored, header and all,
								 * where its table has our columns and no
								 * others */
	READ_COLUMNS_XMAX,			/* the same and xmax, where it has not */
	READ_WHOLE,					/* and the row as jsonb */
	NUM_READS
} ReadKind;

/* The plans that read one usage table, kept for the session. */
typedef struct ReadPlans
{
	Oid			relid;
	char	   *name;			/* the plans' text names the table so */
	SPIPlanPtr	by_range[NUM_READS];
	SPIPlanPtr	by_array[NUM_READS];
	bool		projects;		/* rows do not come as they are stored */
} ReadPlans;

static List *read_plans = NIL;	/* of ReadPlans, in TopMemoryContext */

/*
 * Is the extension there, all of it and of this library's version?  Not while
 * it is being created, nor before it is updated.
 */
bool
abp_extension_installed(void)
{
	return OidIsValid(get_extension_oid("aibilling_polar", true)) &&
		OidIsValid(abp_extension_relation("database_identity")) &&
		OidIsValid(abp_extension_relation("ledger"));
}

/*
 * The OID of a relation of the extension, InvalidOid if there is none.
 */
Oid
abp_extension_relation(const char *name)
{
	Oid			namespace = get_namespace_oid("aibilling", true);

	return OidIsValid(namespace) ? get_relname_relid(name, namespace) : InvalidOid;
}

/*
 * Raise an error if the extension is of an older version than its library,
 * which then only prices and queues new rows.
 */
void
abp_extension_check_version(void)
{
	if (OidIsValid(abp_extension_relation("outbox_entry")) &&
		!OidIsValid(abp_extension_relation("ledger")))
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("extension \"aibilling_polar\" of this database is older than its library"),
				 errdetail("The library is of version %s.  Until the extension is updated it prices and queues new usage rows, and does nothing else.",
						   ABP_VERSION),
				 errhint("Run ALTER EXTENSION aibilling_polar UPDATE.")));
}

/*
 * The table of attachments: before 1.2 one with another name.
 */
const char *
abp_attachment_table(void)
{
	return OidIsValid(abp_extension_relation("attachment")) ? "attachment" : "usage_table";
}

/* The same, of one that is needed. */
static Oid
needed_relation(const char *name)
{
	Oid			relid = abp_extension_relation(name);

	if (!OidIsValid(relid))
		abp_extension_check_version();
	if (!OidIsValid(relid))
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_TABLE),
				 errmsg("relation \"aibilling.%s\" does not exist", name),
				 errhint("Create the extension aibilling_polar in this database, or drop the triggers of this table.")));
	return relid;
}

/* --- rights --------------------------------------------------------------- */

/* A setting until abp_restore_user. */
static void
set_locally(const char *name, const char *value)
{
	(void) set_config_option(name, value, PGC_USERSET, PGC_S_SESSION,
							 GUC_ACTION_SAVE, true, 0, false);
}

/*
 * Run what follows with another role's rights, and with none of its powers
 * to change the session: no code of one role runs with the rights of another.
 */
void
abp_become(Oid userid, SavedUser *saved)
{
	GetUserIdAndSecContext(&saved->userid, &saved->sec_context);
	SetUserIdAndSecContext(userid, saved->sec_context | SECURITY_LOCAL_USERID_CHANGE |
						   SECURITY_RESTRICTED_OPERATION);
	saved->guc_level = NewGUCNestLevel();
	set_locally("search_path", "pg_catalog, pg_temp");
}

/*
 * Run what follows with the rights of a usage table's owner, for statements
 * that read the table: no policy hides rows (it raises an error instead).
 */
void
abp_become_table_owner(const UsageTable *table, SavedUser *saved)
{
	abp_become(table->owner, saved);
	set_locally("row_security", "off");
}

/*
 * Run what follows with the rights of the extension's owner.  For statements
 * of this file only, which call nothing of a user's.
 */
void
abp_become_extension_owner(SavedUser *saved)
{
	Relation	rel = table_open(needed_relation("outbox_entry"), AccessShareLock);
	Oid			owner = rel->rd_rel->relowner;

	table_close(rel, AccessShareLock);
	abp_become(owner, saved);
}

/*
 * Take back abp_become.  An error does the same: (sub)transaction abort
 * restores user and settings.
 */
void
abp_restore_user(const SavedUser *saved)
{
	AtEOXact_GUC(false, saved->guc_level);
	SetUserIdAndSecContext(saved->userid, saved->sec_context);
}

/* --- running statements --------------------------------------------------- */

static uint64
run(Statement *statement, Datum *values, const char *nulls)
{
	int			result;

	if (statement->plan == NULL)
	{
		SPIPlanPtr	plan = SPI_prepare(statement->sql, statement->nargs,
									   statement->argtypes);

		if (plan == NULL)
			elog(ERROR, "unexpected failure to prepare: %s",
				 SPI_result_code_string(SPI_result));
		SPI_keepplan(plan);
		statement->plan = plan;
	}

	result = SPI_execute_plan(statement->plan, values, nulls, false, 0);
	if (result < 0)
		elog(ERROR, "unexpected failure to execute: %s", SPI_result_code_string(result));
	return SPI_processed;
}

/*
 * Run a statement without a result, with the rights of the extension's owner.
 * Returns the number of rows.
 */
static uint64
run_alone(Statement *statement, Datum *values, const char *nulls)
{
	SavedUser	saved;
	uint64		nrows;

	abp_become_extension_owner(&saved);
	SPI_connect();
	nrows = run(statement, values, nulls);
	SPI_finish();
	abp_restore_user(&saved);
	return nrows;
}

static Datum
result_datum(uint64 row, int column, bool *isnull)
{
	return SPI_getbinval(SPI_tuptable->vals[row], SPI_tuptable->tupdesc, column, isnull);
}

/* A text column of the last result, copied to "context"; NULL stays NULL. */
static char *
result_string(uint64 row, int column, MemoryContext context)
{
	char	   *value = SPI_getvalue(SPI_tuptable->vals[row], SPI_tuptable->tupdesc, column);

	return value == NULL ? NULL : MemoryContextStrdup(context, value);
}

static int64
result_int64(uint64 row, int column, int64 if_null)
{
	bool		isnull;
	Datum		value = result_datum(row, column, &isnull);

	return isnull ? if_null : DatumGetInt64(value);
}

static Oid
result_oid(uint64 row, int column)
{
	bool		isnull;
	Datum		value = result_datum(row, column, &isnull);

	return isnull ? InvalidOid : DatumGetObjectId(value);
}

static IdSet
result_idset(uint64 row, int column, MemoryContext context)
{
	IdSet		ids = {0};
	bool		isnull;
	Datum		value = result_datum(row, column, &isnull);

	if (!isnull)
	{
		MemoryContext old = MemoryContextSwitchTo(context);

		ids = abp_idset_from_multirange(value);
		MemoryContextSwitchTo(old);
	}
	return ids;
}

static text *
error_text(const char *error)
{
	int			len = strlen(error);

	return cstring_to_text_with_len(error, len <= MAX_REASON_LEN ? len :
									pg_mbcliplen(error, len, MAX_REASON_LEN));
}

/* --- the outbox ----------------------------------------------------------- */

#define STATE_OF_REMOVAL(state) ((char) ((state) - 'A' + 'a'))

const char	abp_outbox_states[NUM_OUTBOX_STATES] = {
	OUTBOX_READY, OUTBOX_WAITING, OUTBOX_UNPRICED, OUTBOX_REJECTED
};

#define BLOCK_OF(id) ((id) & ~((int64) OUTBOX_BLOCK - 1))

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
		values[Anum_entry_error - 1] = PointerGetDatum(error_text(entry->error));

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
				writer->waiting = index_open(needed_relation("outbox_entry_waiting"),
											 RowExclusiveLock);
			insert_into_index(writer->rel, writer->waiting, tuple, values);
		}
	}
	heap_freetuple(tuple);
}

static void
put_entries(Oid relid, OutboxEntry *entries, int nentries)
{
	EntryWriter writer;
	MemoryContext context = AllocSetContextCreate(CurrentMemoryContext,
												  "aibilling outbox entries",
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
		put_entries(needed_relation("outbox_entry"), entries, nentries);
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
		put_entries(relid, entries, nentries);
	return true;
}

/* The ids of an entry's tuple, in the current memory context. */
static IdSet
read_entry_ids(HeapTuple tuple, TupleDesc desc)
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
static OutboxEntry
read_entry(HeapTuple tuple, TupleDesc desc)
{
	const EntryForm *form = ENTRY_FORM(tuple);
	OutboxEntry entry = {
		.usage_table = form->usage_table,
		.state = form->state,
		.attempts = form->attempts,
		.outcome_unknown = form->outcome_unknown,
		.not_before = form->not_before,
		.ids = read_entry_ids(tuple, desc)
	};
	bool		isnull;
	Datum		value = heap_getattr(tuple, Anum_entry_error, desc, &isnull);

	if (!isnull)
		entry.error = TextDatumGetCString(value);
	return entry;
}

static bool
entry_holds(HeapTuple tuple, TupleDesc desc, int64 id)
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

/* A scan of one of the extension's tables, in the order of an index. */
typedef struct OrderedScan
{
	Relation	rel;
	Relation	index;
	SysScanDesc scan;
	MemoryContext context;		/* of the scan, which allocates as it goes */
} OrderedScan;

static void
begin_ordered_scan_as_of(OrderedScan *scan, const char *table, const char *index,
						 int nkeys, ScanKey keys, LOCKMODE lockmode, Snapshot snapshot)
{
	scan->rel = table_open(needed_relation(table), lockmode);
	scan->index = index_open(needed_relation(index), lockmode);
	scan->scan = systable_beginscan_ordered(scan->rel, scan->index, snapshot, nkeys, keys);
	scan->context = CurrentMemoryContext;
}

static void
begin_ordered_scan(OrderedScan *scan, const char *table, const char *index,
				   int nkeys, ScanKey keys, LOCKMODE lockmode)
{
	begin_ordered_scan_as_of(scan, table, index, nkeys, keys, lockmode, GetActiveSnapshot());
}

static void
end_ordered_scan(OrderedScan *scan)
{
	systable_endscan_ordered(scan->scan);
	index_close(scan->index, NoLock);
	table_close(scan->rel, NoLock);
}

static HeapTuple
next_ordered(OrderedScan *scan)
{
	MemoryContext old = MemoryContextSwitchTo(scan->context);
	HeapTuple	tuple = systable_getnext_ordered(scan->scan, ForwardScanDirection);

	MemoryContextSwitchTo(old);
	CHECK_FOR_INTERRUPTS();
	return tuple;
}

/*
 * Begin a scan, by the active snapshot, over the entries of one table and
 * state: those due by "until" where they wait for a time, else from from_id's
 * block on.
 */
static void
begin_entry_scan(OrderedScan *scan, Oid usage_table, char state, int64 from_id,
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
	begin_ordered_scan(scan, "outbox_entry", "outbox_entry_key", nkeys, keys, lockmode);
}

/* Begin a scan over the entries of one table and state with this key. */
static void
begin_key_scan(OrderedScan *scan, Oid usage_table, char state,
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
	begin_ordered_scan_as_of(scan, "outbox_entry",
							 waiting ? "outbox_entry_waiting" : "outbox_entry_key",
							 nkeys, keys, AccessShareLock, snapshot);
}

/* Has anything been taken out of a table's entries that still holds it? */
static bool
has_removals(Oid usage_table)
{
	ScanKeyData keys[2];
	OrderedScan scan;
	bool		found;

	ScanKeyInit(&keys[0], Anum_entry_usage_table, BTEqualStrategyNumber,
				F_OIDEQ, ObjectIdGetDatum(usage_table));
	ScanKeyInit(&keys[1], Anum_entry_state, BTLessStrategyNumber,
				F_CHARLT, CharGetDatum('a'));
	begin_ordered_scan(&scan, "outbox_entry", "outbox_entry_key", 2, keys, AccessShareLock);
	found = next_ordered(&scan) != NULL;
	end_ordered_scan(&scan);
	return found;
}

/*
 * The transaction that is deleting a tuple, or has just done so, of which we
 * see the state before; InvalidTransactionId if none.
 */
static TransactionId
deleter_of(HeapTuple tuple)
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

/*
 * Count the entries of one table and state, or the removals from it, that hold
 * an id.  *busy is a transaction that is about to change that, if there is
 * one.
 */
static int
count_holders(Oid usage_table, char state, int64 id, bool *outcome_unknown, TransactionId *busy)
{
	int64		keys[2] = {id, BLOCK_OF(id)};
	int			count = 0;

	for (int i = 0; i < (keys[0] == keys[1] ? 1 : 2); i++)
	{
		SnapshotData dirty;
		OrderedScan scan;
		HeapTuple	tuple;

		InitDirtySnapshot(dirty);
		begin_key_scan(&scan, usage_table, state, BTEqualStrategyNumber, F_INT8EQ, keys[i],
					   OUTBOX_IS_REMOVAL(state) ? &dirty : GetActiveSnapshot());
		while ((tuple = next_ordered(&scan)) != NULL)
		{
			TransactionId other;

			if (!entry_holds(tuple, RelationGetDescr(scan.rel), id))
				continue;
			other = OUTBOX_IS_REMOVAL(state) && TransactionIdIsValid(dirty.xmin) ? dirty.xmin :
				deleter_of(tuple);
			if (TransactionIdIsValid(other))
				*busy = other;
			*outcome_unknown |= ENTRY_FORM(tuple)->outcome_unknown;
			count++;
		}
		end_ordered_scan(&scan);
	}
	return count;
}

/* How often is an id in the outbox, in each state? */
static void
look_into_outbox(Oid usage_table, int64 id, RowPlace *place, TransactionId *busy)
{
	bool		removals = has_removals(usage_table);
	bool		ignored;

	place->state = 0;
	place->outcome_unknown = false;
	for (int i = 0; i < NUM_OUTBOX_STATES; i++)
	{
		bool		outcome_unknown = false;
		int			count = count_holders(usage_table, abp_outbox_states[i], id, &outcome_unknown, busy);

		if (count > 0 && removals)
			count -= count_holders(usage_table, OUTBOX_REMOVAL(abp_outbox_states[i]), id, &ignored, busy);
		place->count[i] = Max(count, 0);
		if (count > 0)
		{
			place->state = abp_outbox_states[i];
			place->outcome_unknown |= outcome_unknown;
		}
	}
}

/* The entries and removals of one state in one block of ids. */
typedef struct IdBlock
{
	uint16		removed[OUTBOX_BLOCK];	/* how often each id was taken out */
	int64		first;
	bool		any;
} IdBlock;

static void
read_removals(IdBlock *block, Oid usage_table, char state, int64 id)
{
	OrderedScan scan;
	HeapTuple	tuple;

	memset(block, 0, sizeof(*block));
	block->first = BLOCK_OF(id);
	begin_key_scan(&scan, usage_table, OUTBOX_REMOVAL(state), BTGreaterEqualStrategyNumber, F_INT8GE,
				   block->first, GetActiveSnapshot());
	while ((tuple = next_ordered(&scan)) != NULL &&
		   BLOCK_OF(ENTRY_FORM(tuple)->id) == block->first)
	{
		IdSet		ids = read_entry_ids(tuple, RelationGetDescr(scan.rel));

		block->any = true;
		for (int i = 0; i < ids.nranges; i++)
		{
			for (int64 at = ids.ranges[i].first; at - block->first <= ids.ranges[i].last - block->first; at++)
			{
				block->removed[at - block->first]++;
				if (at == ids.ranges[i].last)
					break;
			}
		}
		abp_idset_free(&ids);
	}
	end_ordered_scan(&scan);
}

/* What is left of an entry's ids; each removal counts for one entry. */
static IdSet
left_of(const IdSet *ids, IdBlock *block)
{
	IdSet		left = {0};

	for (int i = 0; i < ids->nranges; i++)
	{
		for (int64 id = ids->ranges[i].first;; id++)
		{
			if (block->removed[id - block->first] > 0)
				block->removed[id - block->first]--;
			else
				abp_idset_add(&left, id, id, CurrentMemoryContext);
			if (id == ids->ranges[i].last)
				break;
		}
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
	if (!has_removals(usage_table))
		return left;
	read_removals(&block, usage_table, state, id);
	if (!block.any)
		return left;
	begin_key_scan(&scan, usage_table, state, BTGreaterEqualStrategyNumber, F_INT8GE, block.first,
				   GetActiveSnapshot());
	while ((tuple = next_ordered(&scan)) != NULL && BLOCK_OF(ENTRY_FORM(tuple)->id) == block.first)
	{
		IdSet		held = read_entry_ids(tuple, RelationGetDescr(scan.rel));

		left = left_of(&held, &block);
		if (ItemPointerEquals(&tuple->t_self, tid))
			break;
	}
	end_ordered_scan(&scan);
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
	MemoryContext context = AllocSetContextCreate(CurrentMemoryContext, "aibilling outbox block",
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

		begin_key_scan(&scan, usage_table, removals ? OUTBOX_REMOVAL(state) : state,
					   BTGreaterEqualStrategyNumber, F_INT8GE, first, GetActiveSnapshot());
		while ((tuple = next_ordered(&scan)) != NULL && BLOCK_OF(ENTRY_FORM(tuple)->id) == first)
		{
			OutboxEntry entry;
			IdSet		left;

			if (TransactionIdIsValid(deleter_of(tuple)))
			{
				end_ordered_scan(&scan);
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
			entry = read_entry(tuple, RelationGetDescr(scan.rel));
			left = left_of(&entry.ids, block);
			if (abp_idset_count(&left) == abp_idset_count(&entry.ids) ||
				!delete_entry(scan.rel, tuple))
				continue;
			entry.ids = left;
			abp_outbox_put(&entry, 1);
		}
		end_ordered_scan(&scan);
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

	begin_entry_scan(&scan, usage_table, OUTBOX_NOT_QUEUED, PG_INT64_MIN, DT_NOEND, AccessShareLock);
	any = next_ordered(&scan) != NULL;
	end_ordered_scan(&scan);
	if (any)
		run_alone(&add, values, NULL);
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
	ScanKeyData keys[2];
	HeapTuple	tuple;
	char		state = 0;
	int64		first = 0;

	sum_up_not_queued(usage_table);
	ScanKeyInit(&keys[0], Anum_entry_usage_table, BTEqualStrategyNumber,
				F_OIDEQ, ObjectIdGetDatum(usage_table));
	ScanKeyInit(&keys[1], Anum_entry_state, BTLessStrategyNumber,
				F_CHARLT, CharGetDatum('a'));
	begin_ordered_scan(&scan, "outbox_entry", "outbox_entry_key", 2, keys, RowExclusiveLock);
	while ((tuple = next_ordered(&scan)) != NULL)
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
	end_ordered_scan(&scan);
	return finished;
}

/*
 * Take up to max_ids ids out of the outbox, by the active snapshot: their
 * entries are deleted in the current transaction.  Entries that another
 * transaction has are passed over, never waited for, and so are those that
 * begin with an id of "except".  All that are taken may have been stored by
 * Polar, or none.
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
	OrderedScan scan;
	HeapTuple	tuple;
	OutboxEntry rest = {0};

	memset(entries, 0, sizeof(TakenEntries));
	begin_entry_scan(&scan, usage_table, state, *cursor, until, RowExclusiveLock);

	while (ntaken < max_ids && (tuple = next_ordered(&scan)) != NULL)
	{
		OutboxEntry entry = read_entry(tuple, RelationGetDescr(scan.rel));
		int64		first = entry.ids.ranges[0].first;

		if (ntaken > 0 && entry.outcome_unknown != entries->outcome_unknown)
			break;
		*cursor = first > PG_INT64_MIN + CURSOR_MARGIN ? first - CURSOR_MARGIN : PG_INT64_MIN + 1;
		if (abp_idset_contains(except, first) || !delete_entry(scan.rel, tuple))
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
		abp_idset_add_set(&taken, &entry.ids, CurrentMemoryContext);
	}

	end_ordered_scan(&scan);
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
	Relation	rel = table_open(needed_relation("outbox_entry"), RowExclusiveLock);
	HeapTupleData tuple = {.t_self = entry->tid};
	bool		taken = delete_entry(rel, &tuple);

	table_close(rel, NoLock);
	CommandCounterIncrement();
	return taken;
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

	begin_entry_scan(&scan, usage_table, state, PG_INT64_MIN, DT_NOEND, AccessShareLock);
	while (count < exact_limit && (tuple = next_ordered(&scan)) != NULL)
	{
		const EntryForm *form = ENTRY_FORM(tuple);
		IdSet		ids = read_entry_ids(tuple, RelationGetDescr(scan.rel));

		lowest = Min(lowest, ids.ranges[0].first);
		highest = Max(highest, form->id);
		count += abp_idset_count(&ids);
		abp_idset_free(&ids);
	}
	end_ordered_scan(&scan);
	if (first_id != NULL && count > 0)
		*first_id = lowest;

	/* Anything behind?  Then its end tells how much, about. */
	if (count >= exact_limit)
	{
		int64		last = PG_INT64_MIN;

		begin_key_scan(&scan, usage_table, state, BTGreaterEqualStrategyNumber, F_INT8GE,
					   PG_INT64_MIN, GetActiveSnapshot());
		tuple = systable_getnext_ordered(scan.scan, BackwardScanDirection);
		if (tuple != NULL)
			last = ENTRY_FORM(tuple)->id;
		end_ordered_scan(&scan);
		if (last > highest)
		{
			float8		density = (float8) count / ((float8) highest - (float8) lowest + 1);

			*estimated = true;
			count += (int64) Min(((float8) last - (float8) highest) * density, 1e15);
		}
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
	if (has_removals(usage_table))
		count -= count_ids(usage_table, OUTBOX_REMOVAL(state), exact_limit, estimated, NULL);
	PopActiveSnapshot();
	return Max(count, 0);
}

/* How many waiting ids an entry adds, or takes away. */
static int64
counted_ids(HeapTuple tuple, TupleDesc desc)
{
	char		state = ENTRY_FORM(tuple)->state;
	IdSet		ids = read_entry_ids(tuple, desc);
	int64		count = abp_idset_count(&ids);

	CHECK_FOR_INTERRUPTS();
	abp_idset_free(&ids);
	return state == OUTBOX_NOT_QUEUED ? 0 : OUTBOX_IS_REMOVAL(state) ? -count : count;
}

/*
 * How many ids all entries hold, of whatever table.  Without an index: this is
 * asked while the outbox is being dropped, when its index is gone.
 */
int64
abp_outbox_count_all(void)
{
	Relation	rel = table_open(needed_relation("outbox_entry"), AccessShareLock);
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
	begin_ordered_scan(&scan, "outbox_entry", "outbox_entry_key", 1, &key, RowExclusiveLock);
	while ((tuple = next_ordered(&scan)) != NULL)
	{
		count += counted_ids(tuple, RelationGetDescr(scan.rel));
		simple_heap_delete(scan.rel, &tuple->t_self);
	}
	end_ordered_scan(&scan);
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

	while ((tuple = next_ordered(scan)) != NULL)
	{
		*entry = read_entry(tuple, RelationGetDescr(scan->rel));
		entry->tid = tuple->t_self;
		entry->ids = abp_outbox_left(entry->usage_table, entry->state, &tuple->t_self,
									 ENTRY_FORM(tuple)->id, &entry->ids);
		if (entry->ids.nranges > 0)
			return entry;
	}
	return NULL;
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
	begin_entry_scan(&scan, usage_table, state, PG_INT64_MIN, DT_NOEND, AccessShareLock);
	while (abp_idset_count(&found) < max_ids && next_left(&scan, &entry) != NULL)
		abp_idset_add_set(&found, &entry.ids, CurrentMemoryContext);
	end_ordered_scan(&scan);
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
	MemoryContext context = AllocSetContextCreate(CurrentMemoryContext, "aibilling outbox move",
												  ALLOCSET_DEFAULT_SIZES);
	MemoryContext old;

	PushActiveSnapshot(GetLatestSnapshot());
	begin_entry_scan(&scan, usage_table, state, PG_INT64_MIN, DT_NOEND, RowExclusiveLock);
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
	end_ordered_scan(&scan);
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
	begin_entry_scan(&scan, usage_table, state, PG_INT64_MIN, DT_NOEND, AccessShareLock);
	found = next_left(&scan, &entry) != NULL;
	end_ordered_scan(&scan);
	if (found)
	{
		*first = BLOCK_OF(entry.ids.ranges[0].first);
		begin_entry_scan(&scan, usage_table, state, PG_INT64_MIN, DT_NOEND, AccessShareLock);
		tuple = systable_getnext_ordered(scan.scan, BackwardScanDirection);
		*last = tuple == NULL ? *first : BLOCK_OF(ENTRY_FORM(tuple)->id) + (OUTBOX_BLOCK - 1);
		end_ordered_scan(&scan);
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
	begin_entry_scan(&scan, usage_table, OUTBOX_WAITING, 0, DT_NOEND, AccessShareLock);
	if (next_left(&scan, &entry) != NULL)
		due = entry.not_before;
	end_ordered_scan(&scan);
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

	begin_entry_scan(&scan, usage_table, OUTBOX_UNPRICED, cursor->id, DT_NOEND, AccessShareLock);
	while (!found && (tuple = next_ordered(&scan)) != NULL)
	{
		const EntryForm *form = ENTRY_FORM(tuple);

		/* entries of one key lie in the order of their places in the table */
		if (form->id < cursor->id ||
			(form->id == cursor->id && ItemPointerIsValid(&cursor->tid) &&
			 ItemPointerCompare(&tuple->t_self, &cursor->tid) <= 0))
			continue;
		cursor->id = form->id;
		cursor->tid = tuple->t_self;
		*entry = read_entry(tuple, RelationGetDescr(scan.rel));
		entry->tid = tuple->t_self;
		entry->ids = abp_outbox_left(usage_table, OUTBOX_UNPRICED, &tuple->t_self, form->id,
									 &entry->ids);
		found = entry->ids.nranges > 0;
	}
	end_ordered_scan(&scan);
	return found ? entry : NULL;
}

/* --- the ledger ----------------------------------------------------------- */

/* The ids of rows that were gone, for the ledger. */
static Datum
vanished_ids(Delivery *delivery)
{
	return abp_idset_to_multirange(&delivery->vanished_ids);
}

/*
 * What tells the rows of a request from others that have come to have their
 * ids: a checksum of each one's external_id, in the order of the ids.
 */
static Datum
event_keys(const Delivery *delivery)
{
	int64		count = abp_idset_count(unconstify(IdSet *, &delivery->ids));
	bytea	   *keys = palloc(VARHDRSZ + count * sizeof(uint32));
	char	   *at = VARDATA(keys);

	SET_VARSIZE(keys, VARHDRSZ + count * sizeof(uint32));
	if (delivery->keys != NULL &&
		abp_idset_count(unconstify(IdSet *, &delivery->key_ids)) == count)
	{
		memcpy(at, delivery->keys, count * sizeof(uint32));
		return PointerGetDatum(keys);
	}
	for (int i = 0; i < delivery->ids.nranges; i++)
	{
		for (int64 id = delivery->ids.ranges[i].first;; id++)
		{
			uint32		key = 0;

			(void) abp_delivery_key(delivery, id, &key);
			memcpy(at, &key, sizeof(key));
			at += sizeof(key);
			if (id == delivery->ids.ranges[i].last)
				break;
		}
	}
	return PointerGetDatum(keys);
}

/*
 * The checksum of the external_id that a row had when it was first sent.
 * Returns false if that is not known.
 */
bool
abp_delivery_key(const Delivery *delivery, int64 id, uint32 *key)
{
	int64		rank = abp_idset_rank(&delivery->key_ids, id);

	if (delivery->keys == NULL || rank < 0)
		return false;
	*key = delivery->keys[rank];
	return true;
}

/*
 * Enter a delivery in the ledger, as sending its first request, or as one that
 * waits for it if attempts is 0.  Sets its id.
 */
void
abp_ledger_begin(Delivery *delivery)
{
	static Statement begin = {
		"INSERT INTO aibilling.ledger (server, usage_table, usage_ids, events, bytes,"
		" state, attempts, vanished, outcome_unknown, vanished_ids, event_keys, started_at)"
		" VALUES ($1, $2, $3, $4, $5, 'sending', $6, $7, $8, $9, $10, pg_catalog.clock_timestamp())"
		" RETURNING id",
		10, {NAMEOID, REGCLASSOID, INT8MULTIRANGEOID, INT4OID, INT8OID, INT4OID, INT8OID, BOOLOID,
		INT8MULTIRANGEOID, BYTEAOID}
	};
	Datum		values[10] = {
		DirectFunctionCall1(namein, CStringGetDatum(delivery->server)),
		ObjectIdGetDatum(delivery->usage_table),
		abp_idset_to_multirange(&delivery->ids),
		Int32GetDatum(delivery->nevents),
		Int64GetDatum(delivery->body.len),
		Int32GetDatum(delivery->attempts),
		Int64GetDatum(delivery->vanished),
		BoolGetDatum(delivery->outcome_unknown),
		vanished_ids(delivery),
		event_keys(delivery)
	};
	char		nulls[11] = "          ";
	SavedUser	saved;

	abp_become_extension_owner(&saved);
	SPI_connect();
	nulls[8] = delivery->vanished_ids.nranges == 0 ? 'n' : ' ';
	run(&begin, values, nulls);
	delivery->id = result_int64(0, 1, 0);
	SPI_finish();
	abp_restore_user(&saved);
}

/*
 * Enter another request for a delivery, perhaps with fewer ids than before.
 */
void
abp_ledger_resend(Delivery *delivery)
{
	static Statement resend = {
		"UPDATE aibilling.ledger SET usage_ids = $2, events = $3, bytes = $4,"
		" vanished = $5, outcome_unknown = $6, vanished_ids = $7, event_keys = $8,"
		" attempts = attempts + 1, not_before = NULL"
		" WHERE id = $1 RETURNING attempts::pg_catalog.int8",
		8, {INT8OID, INT8MULTIRANGEOID, INT4OID, INT8OID, INT8OID, BOOLOID, INT8MULTIRANGEOID,
		BYTEAOID}
	};
	Datum		values[8] = {
		Int64GetDatum(delivery->id),
		abp_idset_to_multirange(&delivery->ids),
		Int32GetDatum(delivery->nevents),
		Int64GetDatum(delivery->body.len),
		Int64GetDatum(delivery->vanished),
		BoolGetDatum(delivery->outcome_unknown),
		vanished_ids(delivery),
		event_keys(delivery)
	};
	char		nulls[9] = "        ";
	SavedUser	saved;

	abp_become_extension_owner(&saved);
	SPI_connect();
	nulls[6] = delivery->vanished_ids.nranges == 0 ? 'n' : ' ';
	if (run(&resend, values, nulls) == 1)
		delivery->attempts = result_int64(0, 1, 1);
	SPI_finish();
	abp_restore_user(&saved);
}

/*
 * Note why a delivery is still unsettled, when it is tried again, and which
 * ids are left to it.
 */
void
abp_ledger_note(Delivery *delivery, const char *error, TimestampTz not_before)
{
	static Statement note = {
		"UPDATE aibilling.ledger SET error = $2, not_before = $3, outcome_unknown = $4,"
		" http_status = nullif($5, 0), usage_ids = $6, events = $7, event_keys = $8"
		" WHERE id = $1",
		8, {INT8OID, TEXTOID, TIMESTAMPTZOID, BOOLOID, INT4OID, INT8MULTIRANGEOID, INT4OID, BYTEAOID}
	};
	Datum		values[8] = {
		Int64GetDatum(delivery->id),
		PointerGetDatum(error_text(error)),
		TimestampTzGetDatum(not_before),
		BoolGetDatum(delivery->outcome_unknown),
		Int32GetDatum(delivery->http_status),
		abp_idset_to_multirange(&delivery->ids),
		Int32GetDatum(delivery->nevents),
		event_keys(delivery)
	};

	run_alone(&note, values, NULL);
}

/*
 * Settle a delivery: "delivered", "rejected" or "failed".
 */
void
abp_ledger_finish(Delivery *delivery, const char *state, const char *error)
{
	static Statement finish = {
		"UPDATE aibilling.ledger SET state = $2, http_status = nullif($3, 0),"
		" inserted = $4, duplicates = $5, unexpected_duplicates = $6, vanished = $7,"
		" error = $8, vanished_ids = $9, event_keys = NULL, not_before = NULL,"
		" finished_at = pg_catalog.clock_timestamp()"
		" WHERE id = $1",
		9, {INT8OID, TEXTOID, INT4OID, INT8OID, INT8OID, INT8OID, INT8OID, TEXTOID, INT8MULTIRANGEOID}
	};
	Datum		values[9] = {
		Int64GetDatum(delivery->id),
		CStringGetTextDatum(state),
		Int32GetDatum(delivery->http_status),
		Int64GetDatum(delivery->inserted),
		Int64GetDatum(delivery->duplicates),
		Int64GetDatum(delivery->unexpected_duplicates),
		Int64GetDatum(delivery->vanished),
		(Datum) 0,
		vanished_ids(delivery)
	};
	char		nulls[10] = "         ";

	if (strcmp(state, "delivered") != 0)
		nulls[3] = nulls[4] = 'n';
	if (delivery->vanished_ids.nranges == 0)
		nulls[8] = 'n';
	if (error == NULL)
		nulls[7] = 'n';
	else
		values[7] = PointerGetDatum(error_text(error));

	run_alone(&finish, values, nulls);
}

/* What event_keys has written, in the current memory context; NULL if nothing. */
static uint32 *
result_keys(uint64 row, int column, int64 count)
{
	bool		isnull;
	Datum		value = result_datum(row, column, &isnull);
	bytea	   *keys;
	uint32	   *copy;

	if (isnull)
		return NULL;
	keys = DatumGetByteaPP(value);
	if (VARSIZE_ANY_EXHDR(keys) != count * sizeof(uint32))
		return NULL;
	copy = palloc(Max(1, count) * sizeof(uint32));
	memcpy(copy, VARDATA_ANY(keys), count * sizeof(uint32));
	return copy;
}

/*
 * The deliveries whose fate an earlier shipper left open, as a list of
 * Delivery in the current memory context.
 */
List	   *
abp_ledger_unsettled(void)
{
	static Statement unsettled = {
		"SELECT d.id, d.server, d.usage_table, d.usage_ids, d.attempts, d.vanished,"
		" d.vanished_ids, d.event_keys"
		" FROM aibilling.ledger d WHERE d.state = 'sending' ORDER BY d.id",
		0, {0}
	};
	MemoryContext caller = CurrentMemoryContext;
	List	   *deliveries = NIL;
	uint64		n;
	SavedUser	saved;

	abp_become_extension_owner(&saved);
	SPI_connect();
	n = run(&unsettled, NULL, NULL);
	for (uint64 i = 0; i < n; i++)
	{
		Delivery   *delivery = MemoryContextAllocZero(caller, sizeof(Delivery));
		MemoryContext spi = MemoryContextSwitchTo(caller);
		bool		isnull;

		delivery->id = result_int64(i, 1, 0);
		delivery->server = result_string(i, 2, caller);
		delivery->usage_table = result_oid(i, 3);
		delivery->ids = result_idset(i, 4, caller);
		delivery->attempts = DatumGetInt32(result_datum(i, 5, &isnull));
		delivery->vanished = result_int64(i, 6, 0);
		delivery->vanished_ids = result_idset(i, 7, caller);
		delivery->key_ids = abp_idset_copy(&delivery->ids);
		delivery->keys = result_keys(i, 8, abp_idset_count(&delivery->ids));
		delivery->outcome_unknown = true;
		deliveries = lappend(deliveries, delivery);
		MemoryContextSwitchTo(spi);
	}
	SPI_finish();
	abp_restore_user(&saved);
	return deliveries;
}

/* Begin a scan over the unsettled deliveries of a table, by the active snapshot. */
static void
begin_sending_scan(OrderedScan *scan, Oid usage_table)
{
	ScanKeyData key;

	ScanKeyInit(&key, Anum_delivery_usage_table, BTEqualStrategyNumber, F_OIDEQ,
				ObjectIdGetDatum(usage_table));
	begin_ordered_scan(scan, "ledger", "ledger_sending", 1, &key, AccessShareLock);
}

/*
 * Is a delivery of this table unsettled?  By the latest state of the ledger,
 * whatever the transaction's snapshot.
 */
bool
abp_ledger_sending(Oid usage_table)
{
	OrderedScan scan;
	bool		found;

	PushActiveSnapshot(GetLatestSnapshot());
	begin_sending_scan(&scan, usage_table);
	found = next_ordered(&scan) != NULL;
	end_ordered_scan(&scan);
	PopActiveSnapshot();
	return found;
}

static bool
delivery_holds(HeapTuple tuple, TupleDesc desc, int64 id)
{
	TypeCacheEntry *type = lookup_type_cache(INT8MULTIRANGEOID, TYPECACHE_MULTIRANGE_INFO);
	bool		isnull;
	Datum		ids = heap_getattr(tuple, Anum_delivery_usage_ids, desc, &isnull);

	return !isnull &&
		multirange_contains_elem_internal(type->rngtype, DatumGetMultirangeTypeP(ids),
										  Int64GetDatum(id));
}

/* Is an id in flight, by the active snapshot? */
static bool
is_sending(Oid usage_table, int64 id)
{
	OrderedScan scan;
	HeapTuple	tuple;
	bool		found = false;

	begin_sending_scan(&scan, usage_table);
	while (!found && (tuple = next_ordered(&scan)) != NULL)
		found = delivery_holds(tuple, RelationGetDescr(scan.rel), id);
	end_ordered_scan(&scan);
	return found;
}

/*
 * The last delivery above "after" by which Polar has got an id, by the active
 * snapshot; 0 if there is none.
 */
static int64
last_delivered(Oid usage_table, int64 id, int64 after)
{
	Relation	rel = table_open(needed_relation("ledger"), AccessShareLock);
	Relation	index = index_open(needed_relation("ledger_usage_ids"), AccessShareLock);
	TupleTableSlot *slot = table_slot_create(rel, NULL);
	IndexScanDesc scan;
	ScanKeyData key;
	int64		found = 0;

	ScanKeyEntryInitialize(&key, 0, 1, RANGESTRAT_CONTAINS_ELEM, ANYELEMENTOID, InvalidOid,
						   F_MULTIRANGE_CONTAINS_ELEM, Int64GetDatum(id));
	scan = abp_index_beginscan(rel, index, GetActiveSnapshot(), 1);
	index_rescan(scan, &key, 1, NULL, 0);
	while (index_getnext_slot(scan, ForwardScanDirection, slot))
	{
		bool		should_free;
		HeapTuple	tuple = ExecFetchSlotHeapTuple(slot, false, &should_free);
		const DeliveryForm *form = DELIVERY_FORM(tuple);
		bool		isnull;

		CHECK_FOR_INTERRUPTS();

		if (form->usage_table == usage_table && form->id > Max(after, found) &&
			strcmp(TextDatumGetCString(heap_getattr(tuple, Anum_delivery_state,
													RelationGetDescr(rel), &isnull)),
				   "delivered") == 0 &&
			delivery_holds(tuple, RelationGetDescr(rel), id))
			found = form->id;
		if (should_free)
			heap_freetuple(tuple);
	}
	index_endscan(scan);
	ExecDropSingleTupleTableSlot(slot);
	index_close(index, NoLock);
	table_close(rel, NoLock);
	return found;
}

/*
 * Those of an unsettled delivery's ids that another one has brought to Polar
 * since the last TRUNCATE, in the current memory context.
 */
IdSet
abp_ledger_delivered_before(const Delivery *delivery, int64 ledger_from)
{
	IdSet		before = {0};

	PushActiveSnapshot(GetLatestSnapshot());
	for (int i = 0; i < delivery->ids.nranges; i++)
	{
		for (int64 id = delivery->ids.ranges[i].first;; id++)
		{
			if (last_delivered(delivery->usage_table, id, ledger_from) != 0)
				abp_idset_add(&before, id, id, CurrentMemoryContext);
			if (id == delivery->ids.ranges[i].last)
				break;
		}
	}
	PopActiveSnapshot();
	return before;
}

/* What the ledger, by the active snapshot, says of where a row stands. */
static void
look_into_ledger(Oid usage_table, int64 id, int64 ledger_from, RowPlace *place)
{
	if (is_sending(usage_table, id))
		place->where = ROW_SENDING;
	else if (place->state != 0)
		place->where = ROW_IN_OUTBOX;
	else if (last_delivered(usage_table, id, ledger_from) != 0)
		place->where = ROW_DELIVERED;
	else
		place->where = ROW_NOT_SENT;
}

/*
 * Where does a row stand?  By the latest state of the tables, whatever the
 * transaction's snapshot.  What the ledger has up to "ledger_from" speaks of
 * rows before the last TRUNCATE.
 *
 * Who holds the row's lock may rely on the answer until the transaction ends:
 * the shipper passes a row over that another transaction has locked, and if it
 * is taking the row at this moment, this function waits until it has.
 */
void
abp_outbox_find(Oid usage_table, int64 id, int64 ledger_from, RowPlace *place)
{
	for (;;)
	{
		TransactionId busy = InvalidTransactionId;

		CHECK_FOR_INTERRUPTS();

		memset(place, 0, sizeof(*place));
		PushActiveSnapshot(GetLatestSnapshot());
		look_into_outbox(usage_table, id, place, &busy);
		if (!TransactionIdIsValid(busy))
			look_into_ledger(usage_table, id, ledger_from, place);
		PopActiveSnapshot();
		if (!TransactionIdIsValid(busy))
			break;
		XactLockTableWait(busy, NULL, NULL, XLTW_None);
	}
}

/*
 * The same without waiting: false if another transaction is about to change it.
 */
bool
abp_outbox_find_at_once(Oid usage_table, int64 id, int64 ledger_from, RowPlace *place)
{
	TransactionId busy = InvalidTransactionId;

	memset(place, 0, sizeof(*place));
	PushActiveSnapshot(GetLatestSnapshot());
	look_into_outbox(usage_table, id, place, &busy);
	if (!TransactionIdIsValid(busy))
		look_into_ledger(usage_table, id, ledger_from, place);
	PopActiveSnapshot();
	return !TransactionIdIsValid(busy);
}

/*
 * Has Polar got a row, as far as the ledger knows?
 */
bool
abp_ledger_has(Oid usage_table, int64 id, int64 ledger_from)
{
	bool		found;

	PushActiveSnapshot(GetLatestSnapshot());
	found = last_delivered(usage_table, id, ledger_from) != 0;
	PopActiveSnapshot();
	return found;
}

/*
 * All ids of a table that are in flight or delivered since its last TRUNCATE,
 * in the current memory context.
 */
IdSet
abp_ledger_ids(Oid usage_table, int64 ledger_from)
{
	static Statement known = {
		"SELECT d.usage_ids FROM aibilling.ledger d WHERE d.usage_table = $1"
		" AND (d.state = 'sending' OR d.state = 'delivered' AND d.id > $2)",
		2, {REGCLASSOID, INT8OID}
	};
	Datum		values[2] = {ObjectIdGetDatum(usage_table), Int64GetDatum(ledger_from)};
	IdSet		all = {0};
	MemoryContext caller = CurrentMemoryContext;
	uint64		n;
	SavedUser	saved;

	abp_become_extension_owner(&saved);
	SPI_connect();
	n = run(&known, values, NULL);
	for (uint64 i = 0; i < n; i++)
	{
		IdSet		ids = result_idset(i, 1, CurrentMemoryContext);

		abp_idset_add_set(&all, &ids, caller);
		abp_idset_free(&ids);
	}
	SPI_finish();
	abp_restore_user(&saved);
	abp_idset_sort(&all);
	return all;
}

/*
 * The deliveries of a table, since its last TRUNCATE, that found rows gone: a
 * list of Delivery with id, vanished_ids and outcome_unknown, in the current
 * memory context.
 */
List	   *
abp_ledger_vanished(Oid usage_table, int64 ledger_from)
{
	static Statement vanished = {
		"SELECT d.id, d.vanished_ids, d.outcome_unknown FROM aibilling.ledger d"
		" WHERE d.usage_table = $1 AND d.vanished_ids IS NOT NULL AND d.id > $2",
		2, {REGCLASSOID, INT8OID}
	};
	Datum		values[2] = {ObjectIdGetDatum(usage_table), Int64GetDatum(ledger_from)};
	List	   *list = NIL;
	MemoryContext caller = CurrentMemoryContext;
	uint64		n;
	SavedUser	saved;

	abp_become_extension_owner(&saved);
	SPI_connect();
	n = run(&vanished, values, NULL);
	for (uint64 i = 0; i < n; i++)
	{
		Delivery   *delivery = MemoryContextAllocZero(caller, sizeof(Delivery));
		MemoryContext spi = MemoryContextSwitchTo(caller);
		bool		isnull;

		delivery->id = result_int64(i, 1, 0);
		delivery->usage_table = usage_table;
		delivery->vanished_ids = result_idset(i, 2, caller);
		delivery->outcome_unknown = DatumGetBool(result_datum(i, 3, &isnull));
		list = lappend(list, delivery);
		MemoryContextSwitchTo(spi);
	}
	SPI_finish();
	abp_restore_user(&saved);
	return list;
}

/*
 * Rows that a delivery found gone are there again.
 */
void
abp_ledger_returned(const Delivery *delivery, IdSet *ids)
{
	static Statement returned = {
		"UPDATE aibilling.ledger SET vanished_ids = nullif(vanished_ids - $2, '{}') WHERE id = $1",
		2, {INT8OID, INT8MULTIRANGEOID}
	};
	Datum		values[2] = {Int64GetDatum(delivery->id), abp_idset_to_multirange(ids)};

	run_alone(&returned, values, NULL);
}

/*
 * What is summed up of a table's deliveries is added to "totals".  *up_to is
 * the last of them, *all_up_to the last that is summed up of any table: later
 * ones are not summed up, and of this table there are none between the two.
 */
static void
add_summed_up(Oid usage_table, LedgerTotals *totals, int64 *up_to, int64 *all_up_to)
{
	Relation	rel = table_open(needed_relation("delivery_total"), AccessShareLock);
	SysScanDesc scan = systable_beginscan(rel, InvalidOid, false, GetActiveSnapshot(), 0, NULL);
	HeapTuple	tuple;

	*up_to = *all_up_to = 0;
	while ((tuple = systable_getnext(scan)) != NULL)
	{
		const DeliveryTotalForm *form = (const DeliveryTotalForm *) GETSTRUCT(tuple);

		*all_up_to = Max(*all_up_to, form->up_to);
		if (form->usage_table != usage_table)
			continue;
		*up_to = form->up_to;
		totals->deliveries += form->deliveries;
		totals->delivered += form->delivered;
		totals->duplicates += form->duplicates;
		totals->unexpected_duplicates += form->unexpected_duplicates;
		totals->vanished += form->vanished;
	}
	systable_endscan(scan);
	table_close(rel, NoLock);
}

/* Add one delivery to "totals": its numbers, unless they are summed up. */
static void
add_delivery(LedgerTotals *totals, HeapTuple tuple, TupleDesc desc, bool summed_up)
{
	Datum		values[MaxHeapAttributeNumber];
	bool		nulls[MaxHeapAttributeNumber];
	char	   *state;

#define VALUE(column) values[Anum_delivery_##column - 1]
#define IS_NULL(column) nulls[Anum_delivery_##column - 1]

	heap_deform_tuple(tuple, desc, values, nulls);
	state = TextDatumGetCString(VALUE(state));
	if (strcmp(state, "sending") == 0)
		totals->in_flight += DatumGetInt32(VALUE(events));
	else if (strcmp(state, "delivered") == 0)
	{
		if (!summed_up)
		{
			totals->deliveries++;
			totals->delivered += DatumGetInt32(VALUE(events));
		}
		if (TIMESTAMP_NOT_FINITE(totals->last_delivery))
			totals->last_delivery = DatumGetTimestampTz(VALUE(finished_at));
	}
	pfree(state);

	if (!summed_up)
	{
		if (!IS_NULL(duplicates))
			totals->duplicates += DatumGetInt64(VALUE(duplicates));
		totals->unexpected_duplicates += DatumGetInt64(VALUE(unexpected_duplicates));
		totals->vanished += DatumGetInt64(VALUE(vanished));
	}
	if (totals->last_error == NULL && !IS_NULL(error))
		totals->last_error = TextDatumGetCString(VALUE(error));

#undef VALUE
#undef IS_NULL
}

/* Begin a scan over the deliveries of ids above or up to one. */
static void
begin_delivery_scan(OrderedScan *scan, StrategyNumber strategy, RegProcedure compare, int64 id)
{
	ScanKeyData key;

	ScanKeyInit(&key, Anum_delivery_id, strategy, compare, Int64GetDatum(id));
	begin_ordered_scan(scan, "ledger", "ledger_pkey", 1, &key, AccessShareLock);
}

/*
 * What the ledger tells of a table, in the current memory context.  Without
 * SQL: three statements take a new session longer to plan than to run.
 */
void
abp_ledger_totals(Oid usage_table, LedgerTotals *totals)
{
	OrderedScan scan;
	HeapTuple	tuple;
	int64		up_to;
	int64		all_up_to;

	memset(totals, 0, sizeof(*totals));
	totals->last_delivery = DT_NOBEGIN;
	PushActiveSnapshot(GetLatestSnapshot());
	add_summed_up(usage_table, totals, &up_to, &all_up_to);

	begin_delivery_scan(&scan, BTGreaterStrategyNumber, F_INT8GT, all_up_to);
	while ((tuple = systable_getnext_ordered(scan.scan, BackwardScanDirection)) != NULL)
	{
		CHECK_FOR_INTERRUPTS();

		if (DELIVERY_FORM(tuple)->usage_table == usage_table)
			add_delivery(totals, tuple, RelationGetDescr(scan.rel), false);
	}
	end_ordered_scan(&scan);

	/* The last delivery and the last error may be summed up already. */
	begin_delivery_scan(&scan, BTLessEqualStrategyNumber, F_INT8LE, up_to);
	for (int seen = 0;; seen++)
	{
		bool		wants_delivery = totals->deliveries > 0 &&
		TIMESTAMP_NOT_FINITE(totals->last_delivery);
		bool		wants_error = totals->last_error == NULL && seen < LEDGER_ERRORS;

		CHECK_FOR_INTERRUPTS();

		if (!wants_delivery && !wants_error)
			break;
		tuple = systable_getnext_ordered(scan.scan, BackwardScanDirection);
		if (tuple == NULL)
			break;
		if (DELIVERY_FORM(tuple)->usage_table == usage_table)
			add_delivery(totals, tuple, RelationGetDescr(scan.rel), true);
	}
	end_ordered_scan(&scan);
	PopActiveSnapshot();
}

/*
 * Add what is settled to the totals.  For the shipper only: below the oldest
 * unsettled delivery nothing changes any more.
 */
void
abp_ledger_sum_up(void)
{
	static Statement sum_up = {
		"INSERT INTO aibilling.delivery_total AS t"
		" SELECT n.usage_table, n.up_to, r.* FROM"
		" (SELECT d.usage_table, max(d.id) AS up_to FROM aibilling.ledger d"
		"  WHERE d.id > (SELECT coalesce(max(o.up_to), 0) FROM aibilling.delivery_total o)"
		"  AND d.id < coalesce((SELECT min(u.id) FROM aibilling.ledger u"
		"   WHERE u.state = 'sending'), 9223372036854775807)"
		"  GROUP BY d.usage_table) n"
		" LEFT JOIN aibilling.delivery_total o ON o.usage_table = n.usage_table,"
		" LATERAL (SELECT count(*) FILTER (WHERE d.state = 'delivered') AS deliveries,"
		"  coalesce(sum(d.events) FILTER (WHERE d.state = 'delivered'), 0)::pg_catalog.int8 AS delivered,"
		"  coalesce(sum(d.duplicates), 0)::pg_catalog.int8 AS duplicates,"
		"  coalesce(sum(d.unexpected_duplicates), 0)::pg_catalog.int8 AS unexpected_duplicates,"
		"  coalesce(sum(d.vanished), 0)::pg_catalog.int8 AS vanished"
		"  FROM aibilling.ledger d WHERE d.usage_table = n.usage_table"
		"  AND d.id > coalesce(o.up_to, 0) AND d.id <= n.up_to) r"
		" ON CONFLICT (usage_table) DO UPDATE SET up_to = excluded.up_to,"
		" deliveries = t.deliveries + excluded.deliveries,"
		" delivered = t.delivered + excluded.delivered,"
		" duplicates = t.duplicates + excluded.duplicates,"
		" unexpected_duplicates = t.unexpected_duplicates + excluded.unexpected_duplicates,"
		" vanished = t.vanished + excluded.vanished",
		0, {0}
	};

	run_alone(&sum_up, NULL, NULL);
}

/*
 * How many requests went to a server in the last minute, counting up to
 * "limit": what is left of its quota after a restart.
 */
int
abp_ledger_recent_requests(const char *server, int limit)
{
	static Statement recent = {
		"SELECT coalesce(sum(r.attempts), 0)::pg_catalog.int8 FROM"
		" (SELECT d.attempts, d.started_at FROM aibilling.ledger d"
		"  WHERE d.server = $1 ORDER BY d.id DESC LIMIT $2) r"
		" WHERE r.started_at > pg_catalog.clock_timestamp() - interval '1 minute'",
		2, {NAMEOID, INT4OID}
	};
	Datum		values[2] = {
		DirectFunctionCall1(namein, CStringGetDatum(server)), Int32GetDatum(limit)
	};
	int			count;
	SavedUser	saved;

	abp_become_extension_owner(&saved);
	SPI_connect();
	run(&recent, values, NULL);
	count = Min(result_int64(0, 1, 0), limit);
	SPI_finish();
	abp_restore_user(&saved);
	return count;
}

/* --- usage tables and servers --------------------------------------------- */

/*
 * Is the state of a server kept by role?  Not before the extension's 1.1,
 * whose update waits for transactions that have asked.
 */
bool
abp_server_state_by_role(void)
{
	Relation	rel = table_open(abp_extension_relation("server_state"), AccessShareLock);
	bool		by_role = get_attnum(RelationGetRelid(rel), "role") != InvalidAttrNumber;

	table_close(rel, NoLock);
	return by_role;
}

/* Does a subscription of this database fill the tables by which rows are sent? */
static bool
outbox_is_subscribed(void)
{
	static const char *const tables[] = {
		"outbox_entry", "ledger", "attachment", "delivery", "usage_table"
	};
	Relation	rel = table_open(SubscriptionRelRelationId, AccessShareLock);
	bool		found = false;

	for (int i = 0; i < lengthof(tables) && !found; i++)
	{
		ScanKeyData key;
		SysScanDesc scan;

		ScanKeyInit(&key, Anum_pg_subscription_rel_srrelid, BTEqualStrategyNumber, F_OIDEQ,
					ObjectIdGetDatum(abp_extension_relation(tables[i])));
		scan = systable_beginscan(rel, SubscriptionRelSrrelidSrsubidIndexId, true, NULL, 1, &key);
		found = HeapTupleIsValid(systable_getnext(scan));
		systable_endscan(scan);
	}
	table_close(rel, AccessShareLock);
	return found;
}

/*
 * May this database send, for all that is written of who may?  A copy finds
 * another's identity instead of its own.  A subscriber to the extension's own
 * tables finds another's beside it, if not the subscription itself: outbox and
 * ledger are the publisher's, then, who sends what they hold.
 */
DatabaseStanding
abp_database_standing(void)
{
	Relation	rel = table_open(needed_relation("database_identity"), AccessShareLock);
	bool		own = false;
	bool		other = false;
	SysScanDesc scan;
	HeapTuple	tuple;

	PushActiveSnapshot(GetLatestSnapshot());
	scan = systable_beginscan(rel, InvalidOid, false, GetActiveSnapshot(), 0, NULL);
	while ((tuple = systable_getnext(scan)) != NULL)
	{
		const IdentityForm *form = (const IdentityForm *) GETSTRUCT(tuple);

		if (form->system_identifier == (int64) GetSystemIdentifier() &&
			form->database == MyDatabaseId)
			own = true;
		else
			other = true;
	}
	systable_endscan(scan);
	PopActiveSnapshot();
	table_close(rel, NoLock);

	if ((own && other) || outbox_is_subscribed())
		return DATABASE_SUBSCRIBER;
	return other ? DATABASE_COPY : DATABASE_ARMED;
}

/*
 * The server of a usage table, InvalidOid if it is gone.  In a copy of a
 * database the OID written down is that of the original's server, and may be
 * another's here: until aibilling.arm() binds the tables, the name alone
 * tells.
 */
static Oid
server_of(const AttachmentForm *form, bool armed)
{
	Oid			serverid = get_foreign_server_oid(NameStr(form->server), true);

	return armed && serverid != form->serverid ? InvalidOid : serverid;
}

/* What is kept of a server, or of one role's use of it. */
typedef struct ServerState
{
	char	   *server;
	Oid			role;			/* InvalidOid: of all who have no state of
								 * their own */
	char	   *paused;			/* NULL: not paused */
	char	   *reason;
	int			failures;
	TimestampTz not_before;
} ServerState;

static void
free_plans(ReadPlans *plans)
{
	for (int i = 0; i < 2 * NUM_READS; i++)
	{
		SPIPlanPtr *plan = i < NUM_READS ? &plans->by_range[i] : &plans->by_array[i - NUM_READS];

		if (*plan != NULL)
			SPI_freeplan(*plan);
		*plan = NULL;
	}
	plans->projects = false;
	if (plans->name != NULL)
		pfree(plans->name);
	plans->name = NULL;
}

/* Keep no plans for tables that are not attached any more. */
static void
forget_plans_except(List *tables)
{
	ListCell   *lc;

	foreach(lc, read_plans)
	{
		ReadPlans  *plans = lfirst(lc);
		bool		attached = false;
		ListCell   *t;

		foreach(t, tables)
			attached |= ((UsageTable *) lfirst(t))->relid == plans->relid;
		if (attached)
			continue;
		free_plans(plans);
		pfree(plans);
		read_plans = foreach_delete_current(read_plans, lc);
	}
}

/* A column of a tuple, or "if_null". */
static Datum
column_or(HeapTuple tuple, AttrNumber column, TupleDesc desc, Datum if_null)
{
	bool		isnull;
	Datum		value = heap_getattr(tuple, column, desc, &isnull);

	return isnull ? if_null : value;
}

/* A column that the extension has since 1.2, of a tuple; before that 0. */
static int64
new_column(HeapTuple tuple, AttrNumber column, TupleDesc desc)
{
	return column > desc->natts ? 0 : DatumGetInt64(column_or(tuple, column, desc, 0));
}

static void
begin_attachment_scan(OrderedScan *scan, int nkeys, ScanKey keys)
{
	const char *table = abp_attachment_table();

	begin_ordered_scan(scan, table, psprintf("%s_pkey", table), nkeys, keys, AccessShareLock);
}

/* A text column of a tuple, copied to the current memory context, or NULL. */
static char *
column_string(HeapTuple tuple, AttrNumber column, TupleDesc desc)
{
	Datum		value = column_or(tuple, column, desc, (Datum) 0);

	return value == (Datum) 0 ? NULL : TextDatumGetCString(value);
}

/* The states of all servers, a list in the current memory context. */
static List *
read_server_states(bool by_role)
{
	Relation	rel = table_open(needed_relation("server_state"), AccessShareLock);
	TupleDesc	desc = RelationGetDescr(rel);
	SysScanDesc scan = systable_beginscan(rel, InvalidOid, false, GetActiveSnapshot(), 0, NULL);
	HeapTuple	tuple;
	List	   *list = NIL;

	while ((tuple = systable_getnext(scan)) != NULL)
	{
		ServerState *state = palloc0(sizeof(ServerState));

		state->server =
			pstrdup(NameStr(*DatumGetName(column_or(tuple, Anum_state_server, desc, 0))));
		if (by_role)
			state->role = DatumGetObjectId(column_or(tuple, Anum_state_role, desc, 0));
		state->paused = column_string(tuple, Anum_state_paused, desc);
		state->reason = column_string(tuple, Anum_state_reason, desc);
		state->failures = DatumGetInt32(column_or(tuple, Anum_state_failures, desc, 0));
		state->not_before = DatumGetTimestampTz(column_or(tuple, Anum_state_not_before, desc,
														  TimestampTzGetDatum(DT_NOBEGIN)));
		list = lappend(list, state);
	}
	systable_endscan(scan);
	table_close(rel, NoLock);
	return list;
}

static const ServerState *
find_server_state(List *states, const char *server, Oid role)
{
	ListCell   *lc;

	foreach(lc, states)
	{
		const ServerState *state = lfirst(lc);

		if (state->role == role && strcmp(state->server, server) == 0)
			return state;
	}
	return NULL;
}

/* Fill in a table's owner and name, if there still is such a table. */
static void
describe_table(UsageTable *table)
{
	HeapTuple	tuple = SearchSysCache1(RELOID, ObjectIdGetDatum(table->relid));
	Form_pg_class form;

	if (!HeapTupleIsValid(tuple))
		return;
	form = (Form_pg_class) GETSTRUCT(tuple);
	table->owner = form->relowner;
	table->name = quote_qualified_identifier(get_namespace_name(form->relnamespace),
											 NameStr(form->relname));
	ReleaseSysCache(tuple);
}

static bool
paused_by(const ServerState *state, const char *whom)
{
	return state != NULL && state->paused != NULL && strcmp(state->paused, whom) == 0;
}

/* Fill in what is known of a table's server, and who has paused it. */
static void
describe_server(UsageTable *table, List *states)
{
	const ServerState *state = find_server_state(states, table->server, table->role);
	const ServerState *pause = find_server_state(states, table->server, InvalidOid);
	const char *reason = state != NULL ? state->reason : NULL;

	table->failures = state != NULL ? state->failures : 0;
	table->not_before = state != NULL ? state->not_before : DT_NOBEGIN;
	table->paused_by_answer = paused_by(state, "answer");

	/* An operator pauses a server for all, or for one owner of tables. */
	if (!paused_by(pause, "operator"))
		pause = find_server_state(states, table->server, table->owner);
	if (paused_by(pause, "operator") && pause->reason != NULL)
	{
		table->paused_by_operator = true;
		reason = pause->reason;
	}
	if (reason != NULL)
		table->pause_reason = pstrdup(reason);
}

/*
 * All attached tables, as a list of UsageTable in the current memory context.
 * *armed: is this the database that was armed, rather than a copy of it?  A
 * copy has another system identifier or another OID.
 *
 * Without SQL, and the catalogues through their caches: a session asks this
 * once as a rule, and statements take it longer to plan than to run.
 */
List	   *
abp_usage_tables(bool *armed)
{
	OrderedScan scan;
	HeapTuple	tuple;
	List	   *list = NIL;
	List	   *states;
	bool		by_role = abp_server_state_by_role();

	PushActiveSnapshot(GetLatestSnapshot());
	*armed = abp_database_standing() == DATABASE_ARMED;
	states = read_server_states(by_role);
	begin_attachment_scan(&scan, 0, NULL);
	while ((tuple = systable_getnext_ordered(scan.scan, ForwardScanDirection)) != NULL)
	{
		const AttachmentForm *form = ATTACHMENT_FORM(tuple);
		TupleDesc	desc = RelationGetDescr(scan.rel);
		UsageTable *table = palloc0(sizeof(UsageTable));

		CHECK_FOR_INTERRUPTS();

		table->relid = form->usage;
		table->server = pstrdup(NameStr(form->server));
		table->serverid = server_of(form, *armed);
		table->blocked_until =
			DatumGetTimestampTz(column_or(tuple, Anum_attachment_blocked_until, desc,
										  TimestampTzGetDatum(DT_NOBEGIN)));
		table->blocked_reason = column_string(tuple, Anum_attachment_blocked_reason, desc);
		table->ledger_from = new_column(tuple, Anum_attachment_ledger_from, desc);
		table->not_queued = new_column(tuple, Anum_attachment_not_queued, desc);

		describe_table(table);
		if (by_role && OidIsValid(table->owner) &&
			SearchSysCacheExists2(USERMAPPINGUSERSERVER, ObjectIdGetDatum(table->owner),
								  ObjectIdGetDatum(table->serverid)))
			table->role = table->owner;
		describe_server(table, states);

		list = lappend(list, table);
	}
	end_ordered_scan(&scan);
	PopActiveSnapshot();
	forget_plans_except(list);
	return list;
}

/*
 * Is a table attached?  Then *serverid is its server, InvalidOid if that is
 * gone, and *ledger_from the last delivery before its last TRUNCATE.
 */
bool
abp_usage_table_attached(Oid relid, Oid *serverid, int64 *ledger_from)
{
	ScanKeyData key;
	OrderedScan scan;
	HeapTuple	tuple;

	ScanKeyInit(&key, Anum_attachment_usage, BTEqualStrategyNumber, F_OIDEQ,
				ObjectIdGetDatum(relid));
	PushActiveSnapshot(GetLatestSnapshot());
	begin_attachment_scan(&scan, 1, &key);
	tuple = systable_getnext_ordered(scan.scan, ForwardScanDirection);
	if (tuple != NULL)
	{
		*serverid = server_of(ATTACHMENT_FORM(tuple), abp_database_standing() == DATABASE_ARMED);
		*ledger_from = new_column(tuple, Anum_attachment_ledger_from, RelationGetDescr(scan.rel));
	}
	end_ordered_scan(&scan);
	PopActiveSnapshot();
	return tuple != NULL;
}

/*
 * A server may have been renamed: its tables stay with it.  Not in a copy of a
 * database of another cluster (pg_upgrade, pg_restore): the OIDs that tell a
 * renamed server may be other servers' there, until aibilling.arm() has bound
 * the tables.
 */
void
abp_usage_tables_follow_servers(void)
{
	static Statement same_cluster = {
		"SELECT FROM aibilling.database_identity i WHERE i.system_identifier = $1",
		1, {INT8OID}
	};
	static Statement follow[] = {
		{
			"UPDATE aibilling.ledger d SET server = s.srvname"
			" FROM aibilling.attachment t JOIN pg_catalog.pg_foreign_server s ON s.oid = t.serverid"
			" WHERE d.state = 'sending' AND d.usage_table = t.usage"
			" AND d.server = t.server AND s.srvname <> t.server",
			0, {0}
		},
		{
			"DELETE FROM aibilling.server_state st"
			" USING aibilling.attachment t JOIN pg_catalog.pg_foreign_server s ON s.oid = t.serverid"
			" WHERE st.server = s.srvname AND s.srvname <> t.server",
			0, {0}
		},
		{
			"UPDATE aibilling.server_state st SET server = s.srvname"
			" FROM aibilling.attachment t JOIN pg_catalog.pg_foreign_server s ON s.oid = t.serverid"
			" WHERE st.server = t.server AND s.srvname <> t.server",
			0, {0}
		},
		{
			"UPDATE aibilling.attachment t SET server = s.srvname"
			" FROM pg_catalog.pg_foreign_server s"
			" WHERE s.oid = t.serverid AND s.srvname <> t.server",
			0, {0}
		}
	};
	Datum		values[1] = {Int64GetDatum((int64) GetSystemIdentifier())};
	SavedUser	saved;

	abp_become_extension_owner(&saved);
	SPI_connect();
	if (run(&same_cluster, values, NULL) > 0)
	{
		for (int i = 0; i < lengthof(follow); i++)
			run(&follow[i], NULL, NULL);
	}
	SPI_finish();
	abp_restore_user(&saved);
}

/*
 * A table is gone, or no longer attached: forget that it was.
 */
void
abp_usage_table_forget(Oid relid)
{
	static Statement forget = {
		"DELETE FROM aibilling.attachment t WHERE t.usage = $1", 1, {REGCLASSOID}
	};
	Datum		values[1] = {ObjectIdGetDatum(relid)};

	run_alone(&forget, values, NULL);
}

/*
 * A table has been emptied: what the ledger has of it so far does not speak of
 * the rows that come.
 */
void
abp_usage_table_truncated(Oid relid)
{
	static Statement note = {
		"UPDATE aibilling.attachment SET ledger_from ="
		" (SELECT coalesce(max(d.id), 0) FROM aibilling.ledger d) WHERE usage = $1",
		1, {REGCLASSOID}
	};
	Datum		values[1] = {ObjectIdGetDatum(relid)};

	run_alone(&note, values, NULL);
	CacheInvalidateRelcacheByRelid(abp_extension_relation("attachment"));
}

/* What abp_usage_tables returns has changed: a shipper elsewhere reads it again. */
static void
tell_shipper(void)
{
	CacheInvalidateRelcacheByRelid(abp_extension_relation("server_state"));
}

#define SET_BLOCKED(reason, until, lock) \
	"UPDATE aibilling.attachment SET blocked_reason = " reason ", blocked_until = " until \
	" WHERE usage = (SELECT t.usage FROM aibilling.attachment t WHERE t.usage = $1 FOR UPDATE" \
	lock ")"

/*
 * Note why a table's rows cannot be read, and when to try again.  Returns
 * false, having done nothing, if another transaction has locked what stands
 * there: the shipper waits for nobody.
 */
bool
abp_usage_table_block(Oid relid, const char *reason, TimestampTz until)
{
	static Statement block = {
		SET_BLOCKED("$2", "$3", " SKIP LOCKED"), 3, {REGCLASSOID, TEXTOID, TIMESTAMPTZOID}
	};
	Datum		values[3] = {
		ObjectIdGetDatum(relid), PointerGetDatum(error_text(reason)),
		TimestampTzGetDatum(until)
	};
	bool		done = run_alone(&block, values, NULL) > 0;

	tell_shipper();
	return done;
}

/*
 * A table's rows can be read again.  may_wait: also for a transaction that has
 * locked what stands there.
 */
void
abp_usage_table_unblock(Oid relid, bool may_wait)
{
	static Statement unblock[2] = {
		{
			SET_BLOCKED("NULL", "NULL", " SKIP LOCKED"), 1, {REGCLASSOID}
		},
		{
			SET_BLOCKED("NULL", "NULL", ""), 1, {REGCLASSOID}
		}
	};
	Datum		values[1] = {ObjectIdGetDatum(relid)};

	(void) run_alone(&unblock[may_wait], values, NULL);
	tell_shipper();
}

#define SAVE_STATE(column, value, key) \
	"INSERT INTO aibilling.server_state AS st" \
	" (server, paused, reason, failures, not_before, changed_at" column ")" \
	" VALUES ($1, $2, $3, $4, $5, pg_catalog.clock_timestamp()" value ")" \
	" ON CONFLICT (" key ") DO UPDATE SET" \
	" paused = CASE WHEN st.paused = 'operator' THEN st.paused ELSE excluded.paused END," \
	" reason = CASE WHEN st.paused = 'operator' THEN st.reason ELSE excluded.reason END," \
	" failures = excluded.failures," \
	" not_before = excluded.not_before, changed_at = excluded.changed_at"

/*
 * Keep a server's state, of one role or InvalidOid: paused (NULL, "operator",
 * "answer"), why, how many failures in a row, and when to try again
 * (DT_NOBEGIN: at once).  An operator's pause stays until abp_server_resume.
 * Without abp_server_state_by_role there is InvalidOid only.
 */
void
abp_server_state_save(const char *server, Oid role, const char *paused, const char *reason,
					  int failures, TimestampTz not_before)
{
	static Statement save[2] = {
		{
			SAVE_STATE("", "", "server"),
			5, {NAMEOID, TEXTOID, TEXTOID, INT4OID, TIMESTAMPTZOID}
		},
		{
			SAVE_STATE(", role", ", $6", "server, role"),
			6, {NAMEOID, TEXTOID, TEXTOID, INT4OID, TIMESTAMPTZOID, OIDOID}
		}
	};
	Datum		values[6] = {
		DirectFunctionCall1(namein, CStringGetDatum(server)),
		paused == NULL ? (Datum) 0 : CStringGetTextDatum(paused),
		reason == NULL ? (Datum) 0 : PointerGetDatum(error_text(reason)),
		Int32GetDatum(failures),
		TimestampTzGetDatum(not_before),
		ObjectIdGetDatum(role)
	};
	char		nulls[7] = "      ";

	if (paused == NULL)
		nulls[1] = 'n';
	if (reason == NULL)
		nulls[2] = 'n';
	if (TIMESTAMP_NOT_FINITE(not_before))
		nulls[4] = 'n';

	run_alone(&save[abp_server_state_by_role()], values, nulls);
	tell_shipper();
}

#define RESUME \
	"DELETE FROM aibilling.server_state st WHERE st.server = $1" \
	" AND ($2 OR st.paused IS DISTINCT FROM 'operator')"

/*
 * Clear a server's waits and the pause that its answer began, of one role or
 * InvalidOid; by_operator: an operator's pause too.
 */
void
abp_server_resume(const char *server, Oid role, bool by_operator)
{
	static Statement resume[2] = {
		{
			RESUME, 2, {NAMEOID, BOOLOID}
		},
		{
			RESUME " AND st.role = $3", 3, {NAMEOID, BOOLOID, OIDOID}
		}
	};
	Datum		values[3] = {
		DirectFunctionCall1(namein, CStringGetDatum(server)),
		BoolGetDatum(by_operator),
		ObjectIdGetDatum(role)
	};

	run_alone(&resume[abp_server_state_by_role()], values, NULL);
	tell_shipper();
}

/*
 * What waits now may have been sent by the server that this one descends
 * from: duplicates of it are no surprise.
 */
static void
mark_outcome_unknown(void)
{
	static Statement mark = {
		"UPDATE aibilling.outbox_entry SET outcome_unknown = true WHERE NOT outcome_unknown AND state >= 'a'", 0, {0}
	};

	run_alone(&mark, NULL, NULL);
}

/*
 * Write this database's identity: it may send from now on.  only_first: not
 * if an identity stands there, be it another's.  Otherwise usage tables are
 * bound to the servers that have their servers' names now: in a copy these
 * are others.
 */
void
abp_database_arm(bool only_first)
{
	static Statement forget = {
		"DELETE FROM aibilling.database_identity", 0, {0}
	};
	static Statement arm = {
		"INSERT INTO aibilling.database_identity (system_identifier, database, timeline)"
		" SELECT $1, $2, $3 WHERE NOT EXISTS (SELECT FROM aibilling.database_identity)",
		3, {INT8OID, OIDOID, INT8OID}
	};
	static Statement bind = {
		"UPDATE aibilling.attachment t SET serverid = s.oid"
		" FROM pg_catalog.pg_foreign_server s"
		" WHERE s.srvname = t.server AND s.oid <> t.serverid",
		0, {0}
	};
	Datum		values[3] = {
		Int64GetDatum((int64) GetSystemIdentifier()), ObjectIdGetDatum(MyDatabaseId),
		Int64GetDatum((int64) GetWALInsertionTimeLine())
	};

	if (!only_first)
	{
		run_alone(&forget, NULL, NULL);
		run_alone(&bind, NULL, NULL);
		CacheInvalidateRelcacheByRelid(abp_extension_relation("attachment"));
		mark_outcome_unknown();
	}
	run_alone(&arm, values, NULL);
	tell_shipper();
}

/*
 * After a failover, or a recovery to a point in time, the ledger may lack the
 * last deliveries: mark what waits.
 */
void
abp_database_check_timeline(void)
{
	static Statement note = {
		"UPDATE aibilling.database_identity i SET timeline = $1 WHERE i.timeline <> $1"
		" AND i.system_identifier = $2 AND i.database = $3",
		3, {INT8OID, INT8OID, OIDOID}
	};
	Datum		values[3] = {
		Int64GetDatum((int64) GetWALInsertionTimeLine()),
		Int64GetDatum((int64) GetSystemIdentifier()), ObjectIdGetDatum(MyDatabaseId)
	};
	bool		changed;
	SavedUser	saved;

	abp_become_extension_owner(&saved);
	SPI_connect();
	changed = run(&note, values, NULL) > 0;
	SPI_finish();
	abp_restore_user(&saved);
	if (changed)
		mark_outcome_unknown();
}

/* --- usage rows ----------------------------------------------------------- */

static ReadPlans *
plans_of(const UsageTable *table)
{
	ReadPlans  *plans = NULL;
	ListCell   *lc;

	foreach(lc, read_plans)
	{
		ReadPlans  *candidate = lfirst(lc);

		if (candidate->relid == table->relid)
			plans = candidate;
	}

	if (plans == NULL)
	{
		MemoryContext old = MemoryContextSwitchTo(TopMemoryContext);

		plans = palloc0(sizeof(ReadPlans));
		plans->relid = table->relid;
		read_plans = lappend(read_plans, plans);
		MemoryContextSwitchTo(old);
	}

	if (plans->name == NULL || strcmp(plans->name, table->name) != 0)
	{
		free_plans(plans);
		plans->name = MemoryContextStrdup(TopMemoryContext, table->name);
	}
	return plans;
}

static SPIPlanPtr
prepare_read(const UsageTable *table, ReadKind kind, bool by_range)
{
	StringInfoData sql;
	Oid			argtypes[2] = {by_range ? INT8OID : INT8ARRAYOID, INT8OID};
	SPIPlanPtr	plan;

	initStringInfo(&sql);
	appendStringInfoString(&sql, "SELECT ");
	for (int i = 0; i < NUM_USAGE_COLUMNS; i++)
		appendStringInfo(&sql, "%su.%s::%s", i > 0 ? ", " : "", abp_usage_columns[i].name,
						 format_type_be_qualified(abp_usage_columns[i].type));
	if (kind != READ_COLUMNS)
		appendStringInfoString(&sql, ", u.xmax");
	if (kind == READ_WHOLE)
		appendStringInfoString(&sql, ", pg_catalog.to_jsonb(u)");
	appendStringInfo(&sql, " FROM %s u WHERE u.id ", table->name);
	appendStringInfoString(&sql, by_range ?
						   "OPERATOR(pg_catalog.>=) $1 AND u.id OPERATOR(pg_catalog.<=) $2" :
						   "OPERATOR(pg_catalog.=) ANY ($1)");

	plan = SPI_prepare_cursor(sql.data, by_range ? 2 : 1, argtypes,
							  CURSOR_OPT_GENERIC_PLAN);
	if (plan == NULL)
		elog(ERROR, "unexpected failure to prepare: %s", SPI_result_code_string(SPI_result));
	SPI_keepplan(plan);
	pfree(sql.data);
	return plan;
}

/*
 * Settings under which rows are read and written by id: no plan walks through
 * the table.
 */
static void
settings_for_ids(void)
{
	set_locally("enable_seqscan", "off");
	set_locally("enable_bitmapscan", "off");
	set_locally("jit", "off");	/* costs of what is off are in the billions */
}

static Datum
ids_as_array(IdSet *ids)
{
	int64		count = abp_idset_count(ids);
	Datum	   *elements = palloc(sizeof(Datum) * Max(1, count));
	int64		n = 0;

	for (int i = 0; i < ids->nranges; i++)
	{
		for (int64 id = ids->ranges[i].first;; id++)
		{
			elements[n++] = Int64GetDatum(id);
			if (id == ids->ranges[i].last)
				break;
		}
	}
	return PointerGetDatum(construct_array(elements, n, INT8OID, sizeof(int64),
										   FLOAT8PASSBYVAL, TYPALIGN_DOUBLE));
}

/*
 * Rows that commit at the same time have ids with few gaps: to read from the
 * first to the last and pass over what is not wanted beats looking each up.
 * Not where a row is made into jsonb, which may call code of a user's.
 */
static bool
reads_by_range(IdSet *ids, bool whole)
{
	uint64		span = (uint64) ids->ranges[ids->nranges - 1].last -
	(uint64) ids->ranges[0].first;

	return ids->nranges == 1 || (!whole && span / 2 < (uint64) abp_idset_count(ids));
}

/*
 * May another transaction be changing a row that was read?  One that comes as
 * it is stored has its own header, one that was put together has none.
 */
static bool
may_be_changing(ReadPlans *plans, HeapTuple tuple, bool has_xmax, Datum xmax)
{
	if (has_xmax)
		return TransactionIdIsValid(DatumGetTransactionId(xmax));
	if (OidIsValid(tuple->t_tableOid))
		return (tuple->t_data->t_infomask & HEAP_XMAX_INVALID) == 0;
	plans->projects = true;		/* from the next time on xmax is asked for */
	return true;
}

/*
 * Read usage rows by the active snapshot, as the table's owner, and hand each
 * to the callback, until it returns false; with "whole", also as jsonb.  The rows live until the
 * callback returns; few are in memory at a time.  Ids without a row are passed
 * over.  Returns the number of rows handed over.
 *
 * Raises what reading raises: a policy, a column that changed its type.
 */
uint64
abp_usage_read(const UsageTable *table, IdSet *ids, bool whole,
			   UsageRowCallback callback, void *arg)
{
	bool		by_range;
	ReadPlans  *plans;
	ReadKind	kind;
	SPIPlanPtr *plan;
	Datum		args[2];
	int			guc_level;
	Portal		portal;
	SPITupleTable *rows;
	uint64		chunk = whole ? READ_CHUNK_WHOLE : READ_CHUNK;
	uint64		n;
	uint64		nrows = 0;
	bool		more = true;
	Relation	rel;
	UsageColumns columns;
	char	   *problem;
	SavedUser	saved;
	MemoryContext context;
	MemoryContext old;

	abp_idset_sort(ids);
	if (ids->nranges == 0)
		return 0;
	by_range = reads_by_range(ids, whole);

	abp_become_table_owner(table, &saved);
	SPI_connect();

	plans = plans_of(table);
	kind = whole ? READ_WHOLE : plans->projects ? READ_COLUMNS_XMAX : READ_COLUMNS;
	plan = by_range ? &plans->by_range[kind] : &plans->by_array[kind];
	if (*plan == NULL)
		*plan = prepare_read(table, kind, by_range);
	if (by_range)
	{
		args[0] = Int64GetDatum(ids->ranges[0].first);
		args[1] = Int64GetDatum(ids->ranges[ids->nranges - 1].last);
	}
	else
		args[0] = ids_as_array(ids);

	/* The settings are for this plan, not for those in users' functions. */
	guc_level = NewGUCNestLevel();
	settings_for_ids();
	portal = SPI_cursor_open(NULL, *plan, args, NULL, true);
	AtEOXact_GUC(true, guc_level);

	/* What the statement casts must be what we know how to write, too. */
	rel = table_open(table->relid, NoLock);
	if (!abp_usage_columns_find(rel, &columns, &problem))
		ereport(ERROR,
				(errcode(ERRCODE_DATATYPE_MISMATCH),
				 errmsg("usage table %s: %s", table->name, problem),
				 errhint("Give the column its type back.")));
	table_close(rel, NoLock);

	/* One context for what a row needs, emptied after each. */
	context = AllocSetContextCreate(CurrentMemoryContext, "aibilling usage row",
									ALLOCSET_DEFAULT_SIZES);
	do
	{
		SPI_cursor_fetch(portal, true, chunk);
		n = SPI_processed;
		rows = SPI_tuptable;
		old = MemoryContextSwitchTo(context);
		for (uint64 i = 0; i < n && more; i++)
		{
			Datum		values[NUM_USAGE_COLUMNS + 2];
			bool		nulls[NUM_USAGE_COLUMNS + 2];
			UsageRow	row;

			CHECK_FOR_INTERRUPTS();

			heap_deform_tuple(rows->vals[i], rows->tupdesc, values, nulls);
			if (by_range && ids->nranges > 1 &&
				!abp_idset_contains(ids, DatumGetInt64(values[COL_ID])))
				continue;
			abp_usage_row_read(values, nulls, &row);
			row.columns = &columns;
			row.maybe_changing = may_be_changing(plans, rows->vals[i], kind != READ_COLUMNS,
												 values[NUM_USAGE_COLUMNS]);
			more = callback(&row, whole ? DatumGetJsonbP(values[NUM_USAGE_COLUMNS + 1]) : NULL, arg);
			nrows++;
			MemoryContextReset(context);
		}
		MemoryContextSwitchTo(old);
		SPI_freetuptable(rows);
	} while (n == chunk && more);
	SPI_cursor_close(portal);

	SPI_finish();
	abp_restore_user(&saved);
	return nrows;
}

/* Is the version of a row that we see the last, which nobody is changing? */
static bool
is_settled(Relation rel, ItemPointer tid)
{
	HeapTupleData tuple = {.t_self = *tid};
	Buffer		buffer;
	bool		settled;

	if (!heap_fetch(rel, SnapshotAny, &tuple, &buffer, false))
		return false;
	LockBuffer(buffer, BUFFER_LOCK_SHARE);
	settled = TransactionIdIsCurrentTransactionId(HeapTupleHeaderGetRawXmax(tuple.t_data)) ||
		HeapTupleSatisfiesUpdate(&tuple, GetCurrentCommandId(false), buffer) == TM_Ok;
	LockBuffer(buffer, BUFFER_LOCK_UNLOCK);
	ReleaseBuffer(buffer);
	return settled;
}

/*
 * Those of the rows, by the active snapshot, that no other transaction has
 * changed since or is about to, in the current memory context.
 */
IdSet
abp_usage_settled(const UsageTable *table, IdSet *ids)
{
	MemoryContext caller = CurrentMemoryContext;
	IdSet		settled = {0};
	Oid			argtypes[1] = {INT8ARRAYOID};
	Datum		args[1];
	SavedUser	saved;

	abp_become_table_owner(table, &saved);
	settings_for_ids();
	SPI_connect();
	args[0] = ids_as_array(ids);
	SPI_execute_with_args(psprintf("SELECT u.id::pg_catalog.int8, u.tableoid, u.ctid FROM %s u"
								   " WHERE u.id OPERATOR(pg_catalog.=) ANY ($1)", table->name),
						  1, argtypes, args, NULL, true, 0);
	for (uint64 i = 0; i < SPI_processed; i++)
	{
		int64		id = result_int64(i, 1, 0);
		Relation	rel = table_open(result_oid(i, 2), AccessShareLock);
		bool		isnull;

		CHECK_FOR_INTERRUPTS();
		if (rel->rd_tableam != GetHeapamTableAmRoutine() ||
			is_settled(rel, (ItemPointer) DatumGetPointer(result_datum(i, 3, &isnull))))
			abp_idset_add(&settled, id, id, caller);
		table_close(rel, NoLock);
	}
	SPI_finish();
	abp_restore_user(&saved);
	return settled;
}

/* The first column of a statement about rows, run as the table's owner. */
static IdSet
select_ids(const UsageTable *table, const char *statement, IdSet *ids)
{
	MemoryContext caller = CurrentMemoryContext;
	IdSet		found = {0};
	Oid			argtypes[1] = {INT8ARRAYOID};
	Datum		args[1];
	SavedUser	saved;

	abp_become_table_owner(table, &saved);
	settings_for_ids();
	SPI_connect();
	args[0] = ids_as_array(ids);
	if (SPI_execute_with_args(psprintf(statement, table->name), 1, argtypes, args, NULL,
							  false, 0) < 0)
		elog(ERROR, "unexpected result of looking at usage rows");
	for (uint64 i = 0; i < SPI_processed; i++)
	{
		int64		id = result_int64(i, 1, 0);

		abp_idset_add(&found, id, id, caller);
	}
	SPI_finish();
	abp_restore_user(&saved);
	abp_idset_sort(&found);
	return found;
}

/*
 * Lock rows against changes until the transaction ends; those that others are
 * changing are waited for or passed over.  Returns the ids of the rows that we
 * have, in the current memory context.
 */
IdSet
abp_usage_lock(const UsageTable *table, IdSet *ids, bool wait)
{
#define LOCK_ROWS \
	"SELECT u.id::pg_catalog.int8 FROM %s u WHERE u.id OPERATOR(pg_catalog.=) ANY ($1) FOR NO KEY UPDATE"

	return select_ids(table, wait ? LOCK_ROWS : LOCK_ROWS " SKIP LOCKED", ids);
}

/*
 * The ids of which there is a row, in the current memory context.
 */
IdSet
abp_usage_visible(const UsageTable *table, IdSet *ids)
{
	return select_ids(table, "SELECT u.id::pg_catalog.int8 FROM %s u WHERE u.id OPERATOR(pg_catalog.=) ANY ($1)", ids);
}

/*
 * Price rows anew: an UPDATE that the table's own trigger turns into new
 * costs (usage.c).  Returns the ids of the rows that there are.
 */
IdSet
abp_usage_reprice(const UsageTable *table, IdSet *ids)
{
	return select_ids(table, "UPDATE %s u SET cost_status = u.cost_status"
					  " WHERE u.id OPERATOR(pg_catalog.=) ANY ($1) RETURNING u.id::pg_catalog.int8", ids);
}
