/*-------------------------------------------------------------------------
 *
 * outbox.c
 *	  The outbox, the ledger and the usage rows: all their SQL.
 *
 * The outbox holds entries of ids in one state.  No entry crosses a multiple
 * of OUTBOX_BLOCK, so that the entry of a given id is found by looking at the
 * entries that begin in the id's block, through the table's only index.
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
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"
#include "utils/timestamp.h"

#include "compat.h"
#include "outbox.h"

/* The most ids an entry can hold; see the head of this file. */
#define OUTBOX_BLOCK 1024

/* How far, in ids, a scan goes back when it continues. */
#define CURSOR_MARGIN (2 * OUTBOX_BLOCK)

/* In how many deliveries that are summed up the last error is looked for. */
#define LEDGER_ERRORS 1000

/* How many usage rows are read at a time. */
#define READ_CHUNK 50

/* The longest reason kept with an entry or a delivery, in bytes. */
#define MAX_ERROR_LEN 1000

/* columns of aibilling.outbox_entry */
#define Anum_entry_usage_table 1
#define Anum_entry_state 2
#define Anum_entry_attempts 3
#define Anum_entry_maybe_sent 4
#define Anum_entry_not_before 5
#define Anum_entry_first 6
#define Anum_entry_last 7
#define Anum_entry_ids 8
#define Anum_entry_error 9
#define Natts_entry 9

/* The columns up to "last" as they lie in a tuple: fixed lengths, no NULLs. */
typedef struct EntryForm
{
	Oid			usage_table;
	char		state;
	int32		attempts;
	bool		maybe_sent;
	TimestampTz not_before;
	int64		first;
	int64		last;
} EntryForm;

#define ENTRY_FORM(tuple) ((const EntryForm *) GETSTRUCT(tuple))

/* columns of aibilling.delivery that are read without SQL */
#define Anum_delivery_id 1
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

/* The columns up to "serverid" of aibilling.usage_table, as they lie in a tuple. */
typedef struct AttachmentForm
{
	Oid			usage;
	NameData	server;
	Oid			serverid;
} AttachmentForm;

#define ATTACHMENT_FORM(tuple) ((const AttachmentForm *) GETSTRUCT(tuple))

/* columns of aibilling.usage_table */
#define Anum_attachment_usage 1
#define Anum_attachment_blocked_until 5
#define Anum_attachment_blocked_reason 6

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

/* The plans that read one usage table, kept for the session. */
typedef struct ReadPlans
{
	Oid			relid;
	char	   *name;			/* the plans' text names the table so */
	SPIPlanPtr	by_range[2];	/* without and with the whole row */
	SPIPlanPtr	by_array[2];
} ReadPlans;

static List *read_plans = NIL;	/* of ReadPlans, in TopMemoryContext */

/*
 * Is the extension there, and all of it?  Not while it is being created.
 */
bool
abp_extension_installed(void)
{
	return OidIsValid(get_extension_oid("aibilling_polar", true)) &&
		OidIsValid(abp_extension_relation("database_identity"));
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

/* The same, of one that is needed. */
static Oid
needed_relation(const char *name)
{
	Oid			relid = abp_extension_relation(name);

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

/* Run a statement without a result, with the rights of the extension's owner. */
static void
run_alone(Statement *statement, Datum *values, const char *nulls)
{
	SavedUser	saved;

	abp_become_extension_owner(&saved);
	SPI_connect();
	run(statement, values, nulls);
	SPI_finish();
	abp_restore_user(&saved);
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

	return cstring_to_text_with_len(error, len <= MAX_ERROR_LEN ? len :
									pg_mbcliplen(error, len, MAX_ERROR_LEN));
}

/* --- the outbox ----------------------------------------------------------- */

/* Where entries are written. */
typedef struct EntryWriter
{
	Relation	rel;
	Relation	index;			/* NULL: not as we have created them */
} EntryWriter;

/* Does an index hold plain columns of every tuple? */
static bool
is_plain_index(Relation index)
{
	return !index->rd_index->indisunique &&
		heap_attisnull(index->rd_indextuple, Anum_pg_index_indexprs, NULL) &&
		heap_attisnull(index->rd_indextuple, Anum_pg_index_indpred, NULL);
}

static void
open_writer(EntryWriter *writer, Oid relid)
{
	List	   *indexes;

	writer->rel = table_open(relid, RowExclusiveLock);
	writer->index = NULL;
	indexes = RelationGetIndexList(writer->rel);
	if (list_length(indexes) == 1)
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

	/* beyond ours are the columns that a superuser has added */
	for (int i = 0; i < desc->natts; i++)
		nulls[i] = i >= Natts_entry;

	values[Anum_entry_usage_table - 1] = ObjectIdGetDatum(entry->usage_table);
	values[Anum_entry_state - 1] = CharGetDatum(entry->state);
	values[Anum_entry_attempts - 1] = Int32GetDatum(entry->attempts);
	values[Anum_entry_maybe_sent - 1] = BoolGetDatum(entry->maybe_sent);
	values[Anum_entry_not_before - 1] =
		TimestampTzGetDatum(entry->state == OUTBOX_WAITING ? entry->not_before : DT_NOBEGIN);
	values[Anum_entry_first - 1] = Int64GetDatum(ids->ranges[0].first);
	values[Anum_entry_last - 1] = Int64GetDatum(ids->ranges[ids->nranges - 1].last);
	if (ids->nranges > 1)
		values[Anum_entry_ids - 1] = abp_idset_to_multirange(ids);
	else
		nulls[Anum_entry_ids - 1] = true;
	if (entry->error != NULL)
		values[Anum_entry_error - 1] = PointerGetDatum(error_text(entry->error));
	else
		nulls[Anum_entry_error - 1] = true;

	tuple = heap_form_tuple(desc, values, nulls);
	if (writer->index == NULL)
		insert_generally(writer->rel, tuple);
	else
	{
		Form_pg_index index = writer->index->rd_index;
		Datum		key[INDEX_MAX_KEYS];
		bool		key_nulls[INDEX_MAX_KEYS] = {false};

		for (int i = 0; i < index->indnatts; i++)
			key[i] = values[index->indkey.values[i] - 1];
		simple_heap_insert(writer->rel, tuple);
		index_insert(writer->index, key, key_nulls, &tuple->t_self, writer->rel,
					 UNIQUE_CHECK_NO, false, NULL);
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
				int64		this_block = first & ~((int64) OUTBOX_BLOCK - 1);
				int64		end = Min(last, this_block + (OUTBOX_BLOCK - 1));

				CHECK_FOR_INTERRUPTS();

				if (block.nranges > 0 && this_block != block_of)
				{
					write_entry(&writer, &entries[i], &block);
					block.nranges = 0;
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

/* All of an entry's tuple, in the current memory context. */
static OutboxEntry
read_entry(HeapTuple tuple, TupleDesc desc)
{
	const EntryForm *form = ENTRY_FORM(tuple);
	OutboxEntry entry = {
		.usage_table = form->usage_table,
		.state = form->state,
		.attempts = form->attempts,
		.maybe_sent = form->maybe_sent,
		.not_before = form->not_before
	};
	bool		isnull;
	Datum		value;

	value = heap_getattr(tuple, Anum_entry_ids, desc, &isnull);
	if (isnull)
		abp_idset_add(&entry.ids, form->first, form->last, CurrentMemoryContext);
	else
		entry.ids = abp_idset_from_multirange(value);

	value = heap_getattr(tuple, Anum_entry_error, desc, &isnull);
	if (!isnull)
		entry.error = TextDatumGetCString(value);
	return entry;
}

/* A scan of one of the extension's tables, in the order of an index. */
typedef struct OrderedScan
{
	Relation	rel;
	Relation	index;
	SysScanDesc scan;
} OrderedScan;

static void
begin_ordered_scan(OrderedScan *scan, const char *table, const char *index,
				   int nkeys, ScanKey keys, LOCKMODE lockmode)
{
	scan->rel = table_open(needed_relation(table), lockmode);
	scan->index = index_open(needed_relation(index), lockmode);
	scan->scan = systable_beginscan_ordered(scan->rel, scan->index,
											GetActiveSnapshot(), nkeys, keys);
}

static void
end_ordered_scan(OrderedScan *scan)
{
	systable_endscan_ordered(scan->scan);
	index_close(scan->index, NoLock);
	table_close(scan->rel, NoLock);
}

/* Begin a scan over the entries of one table and state. */
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
		ScanKeyInit(&keys[3], Anum_entry_first, BTGreaterEqualStrategyNumber,
					F_INT8GE, Int64GetDatum(from_id));
		nkeys = 4;
	}
	begin_ordered_scan(scan, "outbox_entry", "outbox_entry_key", nkeys, keys, lockmode);
}

/*
 * Take up to max_ids ids out of the outbox: their entries are deleted in the
 * current transaction.  Entries that another transaction has locked (an
 * UPDATE of a pending row) are passed over, never waited for.
 *
 * OUTBOX_WAITING: entries whose not_before is at most "until".  Other states:
 * from *cursor on, which is moved to a little before the last entry seen: rows
 * of lower ids may commit a little later.
 *
 * Returns the ids, in the current memory context.
 */
IdSet
abp_outbox_take(Oid usage_table, char state, TimestampTz until,
				int64 *cursor, int64 max_ids, TakenEntries *entries)
{
	IdSet		taken = {0};
	int64		ntaken = 0;
	OrderedScan scan;
	HeapTuple	tuple;
	OutboxEntry rest = {0};

	memset(entries, 0, sizeof(TakenEntries));
	PushActiveSnapshot(GetLatestSnapshot());
	begin_entry_scan(&scan, usage_table, state, *cursor, until, RowExclusiveLock);

	while (ntaken < max_ids)
	{
		TM_FailureData failure;
		OutboxEntry entry;
		int64		first;

		CHECK_FOR_INTERRUPTS();

		tuple = systable_getnext_ordered(scan.scan, ForwardScanDirection);
		if (tuple == NULL)
			break;
		entry = read_entry(tuple, RelationGetDescr(scan.rel));
		first = entry.ids.ranges[0].first;
		*cursor = first > PG_INT64_MIN + CURSOR_MARGIN ? first - CURSOR_MARGIN : PG_INT64_MIN + 1;

		if (table_tuple_delete(scan.rel, &tuple->t_self, GetCurrentCommandId(true),
							   GetActiveSnapshot(), InvalidSnapshot, false,
							   &failure, false) != TM_Ok)
			continue;

		entries->attempts = Max(entries->attempts, entry.attempts);
		entries->maybe_sent |= entry.maybe_sent;
		if (ntaken + abp_idset_count(&entry.ids) > max_ids)
		{
			rest = entry;
			rest.ids = abp_idset_split(&entry.ids, max_ids - ntaken);
		}
		ntaken += abp_idset_count(&entry.ids);
		for (int i = 0; i < entry.ids.nranges; i++)
			abp_idset_add(&taken, entry.ids.ranges[i].first, entry.ids.ranges[i].last,
						  CurrentMemoryContext);
	}

	end_ordered_scan(&scan);
	PopActiveSnapshot();
	if (rest.ids.nranges > 0)
		abp_outbox_put(&rest, 1);
	CommandCounterIncrement();
	abp_idset_sort(&taken);
	return taken;
}

/*
 * Where does a row stand?  ROW_IN_OUTBOX: also its state in the outbox; its
 * entry is locked against the shipper until the end of the transaction, and
 * with for_change against others who find it.
 */
RowPlace
abp_outbox_find(Oid usage_table, int64 id, bool for_change, char *state)
{
	static Statement place = {
		"SELECT EXISTS (SELECT FROM aibilling.outbox_entry e"
		" WHERE e.usage_table = $1 AND e.state = ANY ('{p,w,u,r}'::pg_catalog.\"char\"[])"
		" AND e.first BETWEEN $3 AND $2 AND e.last >= $2"
		" AND (e.ids IS NULL OR e.ids @> $2)),"
		" (SELECT d.state = 'sending' FROM aibilling.delivery d"
		" WHERE d.usage_ids @> $2 AND d.usage_table = $1"
		" AND d.state IN ('sending', 'delivered') ORDER BY d.id DESC LIMIT 1)",
		3, {REGCLASSOID, INT8OID, INT8OID}
	};
	static Statement lock[2] = {
		{
			"SELECT e.state FROM aibilling.outbox_entry e"
			" WHERE e.usage_table = $1 AND e.state = ANY ('{p,w,u,r}'::pg_catalog.\"char\"[])"
			" AND e.first BETWEEN $3 AND $2 AND e.last >= $2"
			" AND (e.ids IS NULL OR e.ids @> $2) FOR KEY SHARE",
			3, {REGCLASSOID, INT8OID, INT8OID}
		},
		{
			"SELECT e.state FROM aibilling.outbox_entry e"
			" WHERE e.usage_table = $1 AND e.state = ANY ('{p,w,u,r}'::pg_catalog.\"char\"[])"
			" AND e.first BETWEEN $3 AND $2 AND e.last >= $2"
			" AND (e.ids IS NULL OR e.ids @> $2) FOR UPDATE",
			3, {REGCLASSOID, INT8OID, INT8OID}
		}
	};
	Datum		values[3] = {
		ObjectIdGetDatum(usage_table), Int64GetDatum(id),
		Int64GetDatum(id & ~((int64) OUTBOX_BLOCK - 1))
	};
	RowPlace	where = ROW_NOT_SENT;
	SavedUser	saved;

	abp_become_extension_owner(&saved);
	SPI_connect();

	/*
	 * The shipper may move the row between the look and the lock: then look
	 * again.  Each turn sees a later state of the tables.
	 */
	for (;;)
	{
		bool		isnull;
		bool		in_outbox;
		bool		sending;

		CHECK_FOR_INTERRUPTS();

		run(&place, values, NULL);
		in_outbox = DatumGetBool(result_datum(0, 1, &isnull));
		sending = DatumGetBool(result_datum(0, 2, &isnull));
		if (!in_outbox)
		{
			where = isnull ? ROW_NOT_SENT : sending ? ROW_SENDING : ROW_DELIVERED;
			break;
		}
		if (run(&lock[for_change ? 1 : 0], values, NULL) > 0)
		{
			where = ROW_IN_OUTBOX;
			*state = DatumGetChar(result_datum(0, 1, &isnull));
			break;
		}
	}

	SPI_finish();
	abp_restore_user(&saved);
	return where;
}

/*
 * Take one id out of the outbox.  The caller holds its entry
 * (abp_outbox_find with for_change).
 */
void
abp_outbox_remove(Oid usage_table, int64 id)
{
	static Statement removal = {
		"DELETE FROM aibilling.outbox_entry e"
		" WHERE e.usage_table = $1 AND e.state = ANY ('{p,w,u,r}'::pg_catalog.\"char\"[])"
		" AND e.first BETWEEN $3 AND $2 AND e.last >= $2"
		" AND (e.ids IS NULL OR e.ids @> $2)"
		" RETURNING e.state, e.attempts, e.not_before, coalesce(e.ids,"
		" pg_catalog.int8multirange(pg_catalog.int8range(e.first, e.last, '[]'))), e.error,"
		" e.maybe_sent",
		3, {REGCLASSOID, INT8OID, INT8OID}
	};
	Datum		values[3] = {
		ObjectIdGetDatum(usage_table), Int64GetDatum(id),
		Int64GetDatum(id & ~((int64) OUTBOX_BLOCK - 1))
	};
	IdSet		only = {0};
	OutboxEntry *rest;
	uint64		nrest;
	SavedUser	saved;
	MemoryContext caller = CurrentMemoryContext;

	abp_idset_add(&only, id, id, caller);
	abp_become_extension_owner(&saved);
	SPI_connect();
	nrest = run(&removal, values, NULL);
	rest = MemoryContextAllocZero(caller, sizeof(OutboxEntry) * Max(1, nrest));
	for (uint64 i = 0; i < nrest; i++)
	{
		bool		isnull;
		IdSet		ids = result_idset(i, 4, caller);
		MemoryContext old = MemoryContextSwitchTo(caller);

		rest[i].usage_table = usage_table;
		rest[i].state = DatumGetChar(result_datum(i, 1, &isnull));
		rest[i].attempts = DatumGetInt32(result_datum(i, 2, &isnull));
		rest[i].not_before = DatumGetTimestampTz(result_datum(i, 3, &isnull));
		rest[i].ids = abp_idset_subtract(&ids, &only);
		rest[i].error = result_string(i, 5, caller);
		rest[i].maybe_sent = DatumGetBool(result_datum(i, 6, &isnull));
		MemoryContextSwitchTo(old);
	}
	SPI_finish();
	abp_restore_user(&saved);

	abp_outbox_put(rest, nrest);
	CommandCounterIncrement();
}

/*
 * Count a table's ids in one state.  Exact up to exact_limit ids; beyond, the
 * rest is estimated from how densely the counted ids lie.  *first_id is the
 * lowest id, untouched if there is none.
 */
int64
abp_outbox_count(Oid usage_table, char state, int64 exact_limit,
				 bool *estimated, int64 *first_id)
{
	OrderedScan scan;
	HeapTuple	tuple;
	int64		count = 0;
	int64		lowest = 0;
	int64		reached = 0;

	*estimated = false;
	PushActiveSnapshot(GetLatestSnapshot());
	begin_entry_scan(&scan, usage_table, state, PG_INT64_MIN, DT_NOEND, AccessShareLock);
	while (count < exact_limit &&
		   (tuple = systable_getnext_ordered(scan.scan, ForwardScanDirection)) != NULL)
	{
		const EntryForm *form = ENTRY_FORM(tuple);

		CHECK_FOR_INTERRUPTS();

		if (count == 0)
			*first_id = lowest = form->first;
		reached = form->last;
		if (heap_attisnull(tuple, Anum_entry_ids, RelationGetDescr(scan.rel)))
			count += form->last - form->first + 1;
		else
		{
			OutboxEntry entry = read_entry(tuple, RelationGetDescr(scan.rel));

			count += abp_idset_count(&entry.ids);
			pfree(entry.ids.ranges);
		}
	}
	end_ordered_scan(&scan);

	/* Anything behind?  Then its end tells how much, about. */
	if (count >= exact_limit)
	{
		begin_entry_scan(&scan, usage_table, state, PG_INT64_MIN, DT_NOEND, AccessShareLock);
		tuple = systable_getnext_ordered(scan.scan, BackwardScanDirection);
		if (tuple != NULL && ENTRY_FORM(tuple)->last > reached)
		{
			*estimated = true;
			count += (int64) ((ENTRY_FORM(tuple)->last - reached) *
							  (double) count / (reached - lowest + 1));
		}
		end_ordered_scan(&scan);
	}
	PopActiveSnapshot();
	return count;
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
		OutboxEntry entry = read_entry(tuple, RelationGetDescr(rel));

		CHECK_FOR_INTERRUPTS();
		count += abp_idset_count(&entry.ids);
		pfree(entry.ids.ranges);
	}
	systable_endscan(scan);
	PopActiveSnapshot();
	table_close(rel, NoLock);
	return count;
}

/*
 * Drop a table's entries.  Returns how many ids they held.
 */
int64
abp_outbox_discard(Oid usage_table)
{
	static Statement discard = {
		"WITH gone AS (DELETE FROM aibilling.outbox_entry e WHERE e.usage_table = $1"
		" RETURNING e.first, e.last, e.ids)"
		" SELECT coalesce(sum(coalesce((SELECT sum(upper(r) - lower(r)) FROM unnest(ids) r),"
		" last - first + 1)), 0)::pg_catalog.int8 FROM gone",
		1, {REGCLASSOID}
	};
	Datum		values[1] = {ObjectIdGetDatum(usage_table)};
	int64		count;
	SavedUser	saved;

	abp_become_extension_owner(&saved);
	SPI_connect();
	run(&discard, values, NULL);
	count = result_int64(0, 1, 0);
	SPI_finish();
	abp_restore_user(&saved);
	return count;
}

/*
 * Up to max_ids ids of a table in one state, left where they are.
 */
IdSet
abp_outbox_peek(Oid usage_table, char state, int64 max_ids)
{
	IdSet		found = {0};
	OrderedScan scan;
	HeapTuple	tuple;

	PushActiveSnapshot(GetLatestSnapshot());
	begin_entry_scan(&scan, usage_table, state, PG_INT64_MIN, DT_NOEND, AccessShareLock);
	while (abp_idset_count(&found) < max_ids &&
		   (tuple = systable_getnext_ordered(scan.scan, ForwardScanDirection)) != NULL)
	{
		IdSet		ids = read_entry(tuple, RelationGetDescr(scan.rel)).ids;

		CHECK_FOR_INTERRUPTS();
		for (int i = 0; i < ids.nranges; i++)
			abp_idset_add(&found, ids.ranges[i].first, ids.ranges[i].last,
						  CurrentMemoryContext);
	}
	end_ordered_scan(&scan);
	PopActiveSnapshot();
	(void) abp_idset_split(&found, max_ids);
	return found;
}

/* Move ids of a table from one state to ready: all, or those of "only". */
static int64
make_ready(Oid usage_table, char state, IdSet *only)
{
	int64		count = 0;
	OrderedScan scan;
	HeapTuple	tuple;

	PushActiveSnapshot(GetLatestSnapshot());
	begin_entry_scan(&scan, usage_table, state, PG_INT64_MIN, DT_NOEND, RowExclusiveLock);
	while ((tuple = systable_getnext_ordered(scan.scan, ForwardScanDirection)) != NULL)
	{
		TM_FailureData failure;
		OutboxEntry out[2];		/* made ready, kept */

		CHECK_FOR_INTERRUPTS();

		out[0] = read_entry(tuple, RelationGetDescr(scan.rel));
		out[1] = out[0];
		out[1].ids = (IdSet)
		{
			0
		};
		if (only != NULL)
		{
			out[1].ids = abp_idset_subtract(&out[0].ids, only);
			out[0].ids = abp_idset_subtract(&out[0].ids, &out[1].ids);
		}
		if (out[0].ids.nranges == 0 ||
			table_tuple_delete(scan.rel, &tuple->t_self, GetCurrentCommandId(true),
							   GetActiveSnapshot(), InvalidSnapshot, true,
							   &failure, false) != TM_Ok)
			continue;

		out[0].state = OUTBOX_READY;
		out[0].attempts = 0;
		out[0].error = NULL;
		count += abp_idset_count(&out[0].ids);
		abp_outbox_put(out, 2);
	}
	end_ordered_scan(&scan);
	PopActiveSnapshot();
	CommandCounterIncrement();
	return count;
}

/*
 * Make a table's rejected ids ready again: all, or those of "only".  Returns
 * how many.
 */
int64
abp_outbox_retry(Oid usage_table, IdSet *only)
{
	return make_ready(usage_table, OUTBOX_REJECTED, only);
}

/*
 * Make those of a table's unpriced ids ready that have been priced.
 */
void
abp_outbox_release(Oid usage_table, IdSet *ids)
{
	(void) make_ready(usage_table, OUTBOX_UNPRICED, ids);
}

/*
 * The lowest and the highest id of a table's entries in one state, which is
 * not OUTBOX_WAITING.  Returns false if there is none.
 */
bool
abp_outbox_bounds(Oid usage_table, char state, int64 *first, int64 *last)
{
	OrderedScan scan;
	HeapTuple	tuple;
	bool		found;

	PushActiveSnapshot(GetLatestSnapshot());
	begin_entry_scan(&scan, usage_table, state, PG_INT64_MIN, DT_NOEND, AccessShareLock);
	tuple = systable_getnext_ordered(scan.scan, ForwardScanDirection);
	found = tuple != NULL;
	if (found)
	{
		*first = ENTRY_FORM(tuple)->first;
		end_ordered_scan(&scan);
		begin_entry_scan(&scan, usage_table, state, PG_INT64_MIN, DT_NOEND, AccessShareLock);
		tuple = systable_getnext_ordered(scan.scan, BackwardScanDirection);
		if (tuple != NULL)
			*last = ENTRY_FORM(tuple)->last;
	}
	end_ordered_scan(&scan);
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
	HeapTuple	tuple;

	PushActiveSnapshot(GetLatestSnapshot());
	begin_entry_scan(&scan, usage_table, OUTBOX_WAITING, 0, DT_NOEND, AccessShareLock);
	tuple = systable_getnext_ordered(scan.scan, ForwardScanDirection);
	if (tuple != NULL)
		due = ENTRY_FORM(tuple)->not_before;
	end_ordered_scan(&scan);
	PopActiveSnapshot();
	return due;
}

/*
 * The next unpriced entry of a table from *cursor on, which is moved behind
 * it; NULL at the end.  In the current memory context.
 */
OutboxEntry *
abp_outbox_next_unpriced(Oid usage_table, int64 *cursor)
{
	OutboxEntry *entry = NULL;
	OrderedScan scan;
	HeapTuple	tuple;

	PushActiveSnapshot(GetLatestSnapshot());
	begin_entry_scan(&scan, usage_table, OUTBOX_UNPRICED, *cursor, DT_NOEND, AccessShareLock);
	tuple = systable_getnext_ordered(scan.scan, ForwardScanDirection);
	if (tuple != NULL)
	{
		entry = palloc(sizeof(OutboxEntry));
		*entry = read_entry(tuple, RelationGetDescr(scan.rel));
		*cursor = entry->ids.ranges[0].first + 1;
	}
	end_ordered_scan(&scan);
	PopActiveSnapshot();
	return entry;
}

/* --- the ledger ----------------------------------------------------------- */

/*
 * Enter a delivery in the ledger, as sending its first request.  Sets its id.
 */
void
abp_ledger_begin(Delivery *delivery)
{
	static Statement begin = {
		"INSERT INTO aibilling.delivery (server, usage_table, usage_ids, events, bytes,"
		" state, attempts, vanished, outcome_unknown, started_at)"
		" VALUES ($1, $2, $3, $4, $5, 'sending', 1, $6, $7, pg_catalog.clock_timestamp())"
		" RETURNING id",
		7, {NAMEOID, REGCLASSOID, INT8MULTIRANGEOID, INT4OID, INT8OID, INT8OID, BOOLOID}
	};
	Datum		values[7] = {
		DirectFunctionCall1(namein, CStringGetDatum(delivery->server)),
		ObjectIdGetDatum(delivery->usage_table),
		abp_idset_to_multirange(&delivery->ids),
		Int32GetDatum(delivery->nevents),
		Int64GetDatum(delivery->body.len),
		Int64GetDatum(delivery->vanished),
		BoolGetDatum(delivery->outcome_unknown)
	};
	SavedUser	saved;

	abp_become_extension_owner(&saved);
	SPI_connect();
	run(&begin, values, NULL);
	delivery->id = result_int64(0, 1, 0);
	delivery->attempts = 1;
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
		"UPDATE aibilling.delivery SET usage_ids = $2, events = $3, bytes = $4,"
		" vanished = $5, outcome_unknown = $6, attempts = attempts + 1, not_before = NULL"
		" WHERE id = $1 RETURNING attempts::pg_catalog.int8",
		6, {INT8OID, INT8MULTIRANGEOID, INT4OID, INT8OID, INT8OID, BOOLOID}
	};
	Datum		values[6] = {
		Int64GetDatum(delivery->id),
		abp_idset_to_multirange(&delivery->ids),
		Int32GetDatum(delivery->nevents),
		Int64GetDatum(delivery->body.len),
		Int64GetDatum(delivery->vanished),
		BoolGetDatum(delivery->outcome_unknown)
	};
	SavedUser	saved;

	abp_become_extension_owner(&saved);
	SPI_connect();
	if (run(&resend, values, NULL) == 1)
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
		"UPDATE aibilling.delivery SET error = $2, not_before = $3, outcome_unknown = $4,"
		" http_status = nullif($5, 0), usage_ids = $6, events = $7"
		" WHERE id = $1",
		7, {INT8OID, TEXTOID, TIMESTAMPTZOID, BOOLOID, INT4OID, INT8MULTIRANGEOID, INT4OID}
	};
	Datum		values[7] = {
		Int64GetDatum(delivery->id),
		PointerGetDatum(error_text(error)),
		TimestampTzGetDatum(not_before),
		BoolGetDatum(delivery->outcome_unknown),
		Int32GetDatum(delivery->http_status),
		abp_idset_to_multirange(&delivery->ids),
		Int32GetDatum(delivery->nevents)
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
		"UPDATE aibilling.delivery SET state = $2, http_status = nullif($3, 0),"
		" inserted = $4, duplicates = $5, unexpected_duplicates = $6, vanished = $7,"
		" error = $8, not_before = NULL, finished_at = pg_catalog.clock_timestamp()"
		" WHERE id = $1",
		8, {INT8OID, TEXTOID, INT4OID, INT8OID, INT8OID, INT8OID, INT8OID, TEXTOID}
	};
	Datum		values[8] = {
		Int64GetDatum(delivery->id),
		CStringGetTextDatum(state),
		Int32GetDatum(delivery->http_status),
		Int64GetDatum(delivery->inserted),
		Int64GetDatum(delivery->duplicates),
		Int64GetDatum(delivery->unexpected_duplicates),
		Int64GetDatum(delivery->vanished)
	};
	char		nulls[9] = "        ";

	if (strcmp(state, "delivered") != 0)
		nulls[3] = nulls[4] = 'n';
	if (error == NULL)
		nulls[7] = 'n';
	else
		values[7] = PointerGetDatum(error_text(error));

	run_alone(&finish, values, nulls);
}

/*
 * The deliveries whose fate an earlier shipper left open, as a list of
 * Delivery in the current memory context.
 */
List	   *
abp_ledger_unsettled(void)
{
	static Statement unsettled = {
		"SELECT d.id, d.server, d.usage_table, d.usage_ids, d.attempts, d.vanished"
		" FROM aibilling.delivery d WHERE d.state = 'sending' ORDER BY d.id",
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
		delivery->outcome_unknown = true;
		deliveries = lappend(deliveries, delivery);
		MemoryContextSwitchTo(spi);
	}
	SPI_finish();
	abp_restore_user(&saved);
	return deliveries;
}

/*
 * Is a delivery of this table unsettled?  InvalidOid: of any table.
 */
bool
abp_ledger_sending(Oid usage_table)
{
	static Statement sending = {
		"SELECT FROM aibilling.delivery d WHERE d.state = 'sending'"
		" AND ($1 = 0 OR d.usage_table = $1) LIMIT 1",
		1, {OIDOID}
	};
	Datum		values[1] = {ObjectIdGetDatum(usage_table)};
	bool		found;
	SavedUser	saved;

	abp_become_extension_owner(&saved);
	SPI_connect();
	found = run(&sending, values, NULL) > 0;
	SPI_finish();
	abp_restore_user(&saved);
	return found;
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
	begin_ordered_scan(scan, "delivery", "delivery_pkey", 1, &key, AccessShareLock);
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
		" (SELECT d.usage_table, max(d.id) AS up_to FROM aibilling.delivery d"
		"  WHERE d.id > (SELECT coalesce(max(o.up_to), 0) FROM aibilling.delivery_total o)"
		"  AND d.id < coalesce((SELECT min(u.id) FROM aibilling.delivery u"
		"   WHERE u.state = 'sending'), 9223372036854775807)"
		"  GROUP BY d.usage_table) n"
		" LEFT JOIN aibilling.delivery_total o ON o.usage_table = n.usage_table,"
		" LATERAL (SELECT count(*) FILTER (WHERE d.state = 'delivered') AS deliveries,"
		"  coalesce(sum(d.events) FILTER (WHERE d.state = 'delivered'), 0)::pg_catalog.int8 AS delivered,"
		"  coalesce(sum(d.duplicates), 0)::pg_catalog.int8 AS duplicates,"
		"  coalesce(sum(d.unexpected_duplicates), 0)::pg_catalog.int8 AS unexpected_duplicates,"
		"  coalesce(sum(d.vanished), 0)::pg_catalog.int8 AS vanished"
		"  FROM aibilling.delivery d WHERE d.usage_table = n.usage_table"
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
		" (SELECT d.attempts, d.started_at FROM aibilling.delivery d"
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

/* Does a subscription of this database fill the outbox? */
static bool
outbox_is_subscribed(void)
{
	Relation	rel = table_open(SubscriptionRelRelationId, AccessShareLock);
	ScanKeyData key;
	SysScanDesc scan;
	bool		found;

	ScanKeyInit(&key, Anum_pg_subscription_rel_srrelid, BTEqualStrategyNumber, F_OIDEQ,
				ObjectIdGetDatum(needed_relation("outbox_entry")));
	scan = systable_beginscan(rel, SubscriptionRelSrrelidSrsubidIndexId, true, NULL, 1, &key);
	found = HeapTupleIsValid(systable_getnext(scan));
	systable_endscan(scan);
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
	SPIPlanPtr *all[4] = {&plans->by_range[0], &plans->by_range[1],
	&plans->by_array[0], &plans->by_array[1]};

	for (int i = 0; i < lengthof(all); i++)
	{
		if (*all[i] != NULL)
			SPI_freeplan(*all[i]);
		*all[i] = NULL;
	}
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
	begin_ordered_scan(&scan, "usage_table", "usage_table_pkey", 0, NULL, AccessShareLock);
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
 * gone.
 */
bool
abp_usage_table_attached(Oid relid, Oid *serverid)
{
	ScanKeyData key;
	OrderedScan scan;
	HeapTuple	tuple;

	ScanKeyInit(&key, Anum_attachment_usage, BTEqualStrategyNumber, F_OIDEQ,
				ObjectIdGetDatum(relid));
	PushActiveSnapshot(GetLatestSnapshot());
	begin_ordered_scan(&scan, "usage_table", "usage_table_pkey", 1, &key, AccessShareLock);
	tuple = systable_getnext_ordered(scan.scan, ForwardScanDirection);
	if (tuple != NULL)
		*serverid = server_of(ATTACHMENT_FORM(tuple), abp_database_standing() == DATABASE_ARMED);
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
			"UPDATE aibilling.delivery d SET server = s.srvname"
			" FROM aibilling.usage_table t JOIN pg_catalog.pg_foreign_server s ON s.oid = t.serverid"
			" WHERE d.state = 'sending' AND d.usage_table = t.usage"
			" AND d.server = t.server AND s.srvname <> t.server",
			0, {0}
		},
		{
			"DELETE FROM aibilling.server_state st"
			" USING aibilling.usage_table t JOIN pg_catalog.pg_foreign_server s ON s.oid = t.serverid"
			" WHERE st.server = s.srvname AND s.srvname <> t.server",
			0, {0}
		},
		{
			"UPDATE aibilling.server_state st SET server = s.srvname"
			" FROM aibilling.usage_table t JOIN pg_catalog.pg_foreign_server s ON s.oid = t.serverid"
			" WHERE st.server = t.server AND s.srvname <> t.server",
			0, {0}
		},
		{
			"UPDATE aibilling.usage_table t SET server = s.srvname"
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
		"DELETE FROM aibilling.usage_table t WHERE t.usage = $1", 1, {REGCLASSOID}
	};
	Datum		values[1] = {ObjectIdGetDatum(relid)};

	run_alone(&forget, values, NULL);
}

/* What abp_usage_tables returns has changed: a shipper elsewhere reads it again. */
static void
tell_shipper(void)
{
	CacheInvalidateRelcacheByRelid(abp_extension_relation("server_state"));
}

/*
 * Note why a table's rows cannot be read, and when to try again.
 */
void
abp_usage_table_block(Oid relid, const char *reason, TimestampTz until)
{
	static Statement block = {
		"UPDATE aibilling.usage_table SET blocked_reason = $2, blocked_until = $3"
		" WHERE usage = $1",
		3, {REGCLASSOID, TEXTOID, TIMESTAMPTZOID}
	};
	Datum		values[3] = {
		ObjectIdGetDatum(relid), PointerGetDatum(error_text(reason)),
		TimestampTzGetDatum(until)
	};

	run_alone(&block, values, NULL);
	tell_shipper();
}

/*
 * A table's rows can be read again.
 */
void
abp_usage_table_unblock(Oid relid)
{
	static Statement unblock = {
		"UPDATE aibilling.usage_table SET blocked_reason = NULL, blocked_until = NULL"
		" WHERE usage = $1",
		1, {REGCLASSOID}
	};
	Datum		values[1] = {ObjectIdGetDatum(relid)};

	run_alone(&unblock, values, NULL);
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
mark_maybe_sent(void)
{
	static Statement mark = {
		"UPDATE aibilling.outbox_entry SET maybe_sent = true WHERE NOT maybe_sent", 0, {0}
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
		"UPDATE aibilling.usage_table t SET serverid = s.oid"
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
		CacheInvalidateRelcacheByRelid(abp_extension_relation("usage_table"));
		mark_maybe_sent();
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
		mark_maybe_sent();
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
prepare_read(const UsageTable *table, bool whole, bool by_range)
{
	StringInfoData sql;
	Oid			argtypes[2] = {by_range ? INT8OID : INT8ARRAYOID, INT8OID};
	SPIPlanPtr	plan;

	initStringInfo(&sql);
	appendStringInfoString(&sql, "SELECT ");
	for (int i = 0; i < NUM_USAGE_COLUMNS; i++)
		appendStringInfo(&sql, "%su.%s::%s", i > 0 ? ", " : "", abp_usage_columns[i].name,
						 format_type_be_qualified(abp_usage_columns[i].type));
	if (whole)
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
 * Read usage rows, as the table's owner, and hand each to the callback, until
 * it returns false; with "whole", also as jsonb.  The rows live until the
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
	SPIPlanPtr *plan;
	Datum		args[2];
	int			guc_level;
	Portal		portal;
	SPITupleTable *rows;
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
	plan = by_range ? &plans->by_range[whole] : &plans->by_array[whole];
	if (*plan == NULL)
		*plan = prepare_read(table, whole, by_range);
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
	portal = SPI_cursor_open(NULL, *plan, args, NULL, false);
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
		SPI_cursor_fetch(portal, true, READ_CHUNK);
		n = SPI_processed;
		rows = SPI_tuptable;
		old = MemoryContextSwitchTo(context);
		for (uint64 i = 0; i < n && more; i++)
		{
			Datum		values[NUM_USAGE_COLUMNS + 1];
			bool		nulls[NUM_USAGE_COLUMNS + 1];
			UsageRow	row;

			CHECK_FOR_INTERRUPTS();

			heap_deform_tuple(rows->vals[i], rows->tupdesc, values, nulls);
			if (by_range && ids->nranges > 1 &&
				!abp_idset_contains(ids, DatumGetInt64(values[COL_ID])))
				continue;
			abp_usage_row_read(values, nulls, &row);
			row.columns = &columns;
			more = callback(&row, whole ? DatumGetJsonbP(values[NUM_USAGE_COLUMNS]) : NULL, arg);
			nrows++;
			MemoryContextReset(context);
		}
		MemoryContextSwitchTo(old);
		SPI_freetuptable(rows);
	} while (n == READ_CHUNK && more);
	SPI_cursor_close(portal);

	SPI_finish();
	abp_restore_user(&saved);
	return nrows;
}

/*
 * Price rows anew: an UPDATE that the table's own trigger turns into new
 * costs (usage.c).  Returns the ids of the rows that there are.
 */
IdSet
abp_usage_reprice(const UsageTable *table, IdSet *ids)
{
	MemoryContext caller = CurrentMemoryContext;
	IdSet		updated = {0};
	Oid			argtypes[1] = {INT8ARRAYOID};
	Datum		args[1];
	SavedUser	saved;

	abp_become_table_owner(table, &saved);
	settings_for_ids();
	SPI_connect();
	args[0] = ids_as_array(ids);
	if (SPI_execute_with_args(psprintf("UPDATE %s u SET cost_status = u.cost_status"
									   " WHERE u.id OPERATOR(pg_catalog.=) ANY ($1)"
									   " RETURNING u.id::pg_catalog.int8",
									   table->name),
							  1, argtypes, args, NULL, false, 0) != SPI_OK_UPDATE_RETURNING)
		elog(ERROR, "unexpected result of pricing usage rows");
	for (uint64 i = 0; i < SPI_processed; i++)
	{
		int64		id = result_int64(i, 1, 0);

		abp_idset_add(&updated, id, id, caller);
	}
	SPI_finish();
	abp_restore_user(&saved);
	return updated;
}
