/*-------------------------------------------------------------------------
 *
 * rows.c
 *	  Usage rows, read and locked by their ids, as their table's owner.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/heapam.h"
#include "access/table.h"
#include "access/tableam.h"
#include "access/transam.h"
#include "access/xact.h"
#include "catalog/pg_type.h"
#include "executor/spi.h"
#include "executor/tuptable.h"
#include "miscadmin.h"
#include "storage/bufmgr.h"
#include "tcop/pquery.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/jsonb.h"
#include "utils/memutils.h"
#include "utils/portal.h"
#include "utils/snapmgr.h"

#include "base/idset.h"
#include "base/numeric_math.h"
#include "base/rights.h"
#include "base/statement.h"
#include "base/usage_row.h"
#include "queue/attachment.h"
#include "usage/row.h"
#include "usage/rows.h"

#define CACHE_LINE 64			/* of most machines, in bytes */

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

/* Free a table's plans, and the name that is in their text. */
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
void
abp_rows_forget_plans_except(List *tables)
{
	ListCell   *lc;

	foreach(lc, read_plans)
	{
		ReadPlans  *plans = lfirst(lc);

		if (abp_attachment_of(tables, plans->relid) != NULL)
			continue;
		free_plans(plans);
		pfree(plans);
		read_plans = foreach_delete_current(read_plans, lc);
	}
}

/* The plans of a table, to be made anew if it has another name by now. */
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

/*
 * A plan that serves any ids: a generic one, which finds them by the index on
 * id.
 */
static SPIPlanPtr
prepare_read(const UsageTable *table, ReadKind kind, bool by_range)
{
	StringInfoData sql;
	Oid			argtypes[2] = {by_range ? INT8OID : INT8ARRAYOID, INT8OID};
	SPIPlanPtr	plan;

	initStringInfo(&sql);
	appendStringInfoString(&sql, "SELECT ");
	for (int i = 0; i < NUM_USAGE_COLUMNS; i++)
		appendStringInfo(&sql, "%su.%s::%s", i > 0 ? ", " : "", abp_row_columns[i].name,
						 format_type_be_qualified(abp_row_columns[i].type));
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
 * the table, and none leaves out partitions when it runs.  While a DETACH CONCURRENTLY
 * is under way, a plan that does (seen on PostgreSQL 15) passes over the partitions of
 * other partitions.
 */
static void
settings_for_ids(void)
{
	abp_set_locally("enable_partition_pruning", "off");
	abp_set_locally("enable_seqscan", "off");
	abp_set_locally("enable_bitmapscan", "off");
	abp_set_locally("jit", "off");	/* costs of what is off are in the
									 * billions */
}

/* The ids as a value of type bigint[], palloc'd. */
static Datum
ids_as_array(IdSet *ids)
{
	IdWalk		walk = {0};
	int64		count = abp_idset_count(ids);
	Datum	   *elements = palloc(sizeof(Datum) * Max(1, count));
	int64		n = 0;

	while (abp_idset_walk(ids, &walk))
		elements[n++] = Int64GetDatum(walk.id);
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

/* What takes rows as the executor finds them. */
typedef struct RowReceiver
{
	DestReceiver dest;			/* must be first */
	ReadPlans  *plans;
	ReadKind	kind;
	IdSet	   *wanted;			/* NULL: whatever comes */
	const UsageColumns *columns;
	MemoryContext context;		/* for what a row needs, emptied after each */
	UsageRowCallback callback;
	void	   *arg;
	uint64		nrows;			/* that it was given */
} RowReceiver;

/*
 * May another transaction be changing a row that was read?  One that comes as
 * it is stored has its own header, one that was put together has none.
 */
static bool
may_be_changing(const RowReceiver *receiver, TupleTableSlot *slot)
{
	if (receiver->kind != READ_COLUMNS)
		return TransactionIdIsValid(DatumGetTransactionId(slot->tts_values[NUM_USAGE_COLUMNS]));
	if (TTS_IS_BUFFERTUPLE(slot))
		return (((HeapTupleTableSlot *) slot)->tuple->t_data->t_infomask & HEAP_XMAX_INVALID) == 0;
	receiver->plans->projects = true;	/* from the next time on xmax is asked
										 * for */
	return true;
}

/*
 * The row behind this one in its page is mostly the next one to come.  To ask for
 * its memory now saves a fifth of the time that a row's delivery takes, which would
 * be spent waiting for it.  It does not matter what is there.
 */
static inline void
prefetch_next_row(TupleTableSlot *slot)
{
	Buffer		buffer = TTS_IS_BUFFERTUPLE(slot) ?
	((BufferHeapTupleTableSlot *) slot)->buffer : InvalidBuffer;
	OffsetNumber next = OffsetNumberNext(ItemPointerGetOffsetNumberNoCheck(&slot->tts_tid));
	Page		page;
	ItemId		item;

	if (!BufferIsValid(buffer))
		return;
	page = BufferGetPage(buffer);
	if (next > PageGetMaxOffsetNumber(page))
		return;
	item = PageGetItemId(page, next);
	for (unsigned at = 0; at < ItemIdGetLength(item); at += CACHE_LINE)
		__builtin_prefetch((const char *) page + ItemIdGetOffset(item) + at);
}

/* A row has come: hand it over, where it lies.  Returns whether to go on. */
static bool
receive_row(TupleTableSlot *slot, DestReceiver *self)
{
	RowReceiver *receiver = (RowReceiver *) self;
	MemoryContext old;
	UsageRow	row;
	Jsonb	   *whole = NULL;
	bool		more;

	CHECK_FOR_INTERRUPTS();

	prefetch_next_row(slot);
	slot_getallattrs(slot);
	if (receiver->wanted != NULL &&
		!abp_idset_contains(receiver->wanted, DatumGetInt64(slot->tts_values[COL_ID])))
		return true;

	old = MemoryContextSwitchTo(receiver->context);
	abp_row_read(slot->tts_values, slot->tts_isnull, &row);
	row.columns = receiver->columns;
	row.maybe_changing = may_be_changing(receiver, slot);
	row.cents_text = row.cost_cents == NULL ? NULL : numeric_text(row.cost_cents);
	if (receiver->kind == READ_WHOLE)
		whole = DatumGetJsonbP(slot->tts_values[NUM_USAGE_COLUMNS + 1]);
	more = receiver->callback(&row, whole, receiver->arg);
	receiver->nrows++;
	MemoryContextSwitchTo(old);
	MemoryContextReset(receiver->context);
	return more;
}

static void
receiver_starts(DestReceiver *self, int operation, TupleDesc desc)
{
}

static void
receiver_ends(DestReceiver *self)
{
}

/*
 * Read usage rows by the active snapshot, as the table's owner, and hand each
 * to the callback, until it returns false; with "whole", also as jsonb.  The rows live until the
 * callback returns; one is in memory at a time.  Ids without a row are passed
 * over.  Returns the number of rows handed over.
 *
 * Raises what reading raises: a policy, a column that changed its type.
 */
uint64
abp_rows_read(const UsageTable *table, IdSet *ids, bool whole,
			  UsageRowCallback callback, void *arg)
{
	bool		by_range;
	SPIPlanPtr *plan;
	Datum		args[2];
	int			guc_level;
	Portal		portal;
	Relation	rel;
	UsageColumns columns;
	char	   *problem;
	SavedUser	saved;
	RowReceiver receiver = {
		.dest = {receive_row, receiver_starts, receiver_ends, receiver_ends, DestNone},
		.columns = &columns,
		.callback = callback,
		.arg = arg
	};

	abp_idset_sort(ids);
	if (ids->nranges == 0)
		return 0;
	by_range = reads_by_range(ids, whole);
	if (by_range && ids->nranges > 1)
		receiver.wanted = ids;

	abp_become_table_owner(table->owner, &saved);
	SPI_connect();

	receiver.plans = plans_of(table);
	receiver.kind = whole ? READ_WHOLE :
		receiver.plans->projects ? READ_COLUMNS_XMAX : READ_COLUMNS;
	plan = by_range ? &receiver.plans->by_range[receiver.kind] :
		&receiver.plans->by_array[receiver.kind];
	if (*plan == NULL)
		*plan = prepare_read(table, receiver.kind, by_range);
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
	if (!abp_row_columns_find(rel, &columns, &problem))
		ereport(ERROR,
				(errcode(ERRCODE_DATATYPE_MISMATCH),
				 errmsg("usage table %s: %s", table->name, problem),
				 errhint("Give the column its type back.")));
	table_close(rel, NoLock);

	/* SPI would copy each row. */
	receiver.context = AllocSetContextCreate(CurrentMemoryContext, "aibilling_polar usage row",
											 ALLOCSET_DEFAULT_SIZES);
	(void) PortalRunFetch(portal, FETCH_FORWARD, FETCH_ALL, &receiver.dest);
	SPI_cursor_close(portal);

	SPI_finish();
	abp_restore_user(&saved);
	return receiver.nrows;
}

/*
 * Run a statement about rows, in which %s is their table and $1 their ids, as the
 * table's owner.  Returns the number of rows; abp_statement_close ends the use of
 * the result.
 */
static uint64
select_rows(const UsageTable *table, const char *statement, IdSet *ids, bool read_only,
			SavedUser *saved)
{
	Oid			argtypes[1] = {INT8ARRAYOID};
	Datum		args[1];

	abp_become_table_owner(table->owner, saved);
	settings_for_ids();
	SPI_connect();
	args[0] = ids_as_array(ids);
	if (SPI_execute_with_args(psprintf(statement, table->name), 1, argtypes, args, NULL,
							  read_only, 0) < 0)
		elog(ERROR, "unexpected result of looking at usage rows");
	return SPI_processed;
}

/*
 * Ask for "columns" of u, the rows with these external_ids (strings), by the active
 * snapshot and as the table's owner; by_index: without a walk through the table.
 * Returns the number of rows; abp_statement_close ends the use of the result.
 */
uint64
abp_rows_named(const UsageTable *table, const char *columns, List *external_ids, bool by_index,
			   SavedUser *saved)
{
	Oid			argtypes[1] = {TEXTARRAYOID};
	Datum	   *elements;
	Datum		args[1];
	int			n = 0;
	ListCell   *lc;

	abp_become_table_owner(table->owner, saved);
	if (by_index)
		abp_set_locally("enable_seqscan", "off");
	SPI_connect();
	elements = palloc(sizeof(Datum) * Max(1, list_length(external_ids)));
	foreach(lc, external_ids)
		elements[n++] = CStringGetTextDatum((char *) lfirst(lc));
	args[0] = PointerGetDatum(construct_array(elements, n, TEXTOID, -1, false, TYPALIGN_INT));
	if (SPI_execute_with_args(psprintf("SELECT %s FROM %s u WHERE u.external_id OPERATOR(pg_catalog.=) ANY ($1)",
									   columns, table->name), 1, argtypes, args, NULL, true, 0) < 0)
		elog(ERROR, "unexpected result of looking for usage rows");
	return SPI_processed;
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
 * Those of the ids of which no other transaction has changed a row that is there
 * by the active snapshot, or is about to, in the current memory context.
 */
IdSet
abp_rows_settled(const UsageTable *table, IdSet *ids)
{
	MemoryContext caller = CurrentMemoryContext;
	IdSet		settled = {0};
	IdSet		changing = {0};
	uint64		nrows;
	SavedUser	saved;

	nrows = select_rows(table, "SELECT u.id::pg_catalog.int8, u.tableoid, u.ctid FROM %s u"
						" WHERE u.id OPERATOR(pg_catalog.=) ANY ($1)", ids, true, &saved);
	for (uint64 i = 0; i < nrows; i++)
	{
		int64		id = abp_result_int64(i, 1, 0);
		Relation	rel = table_open(abp_result_oid(i, 2), AccessShareLock);
		bool		isnull;

		CHECK_FOR_INTERRUPTS();
		abp_idset_add(rel->rd_tableam != GetHeapamTableAmRoutine() ||
					  is_settled(rel, (ItemPointer) DatumGetPointer(abp_result_datum(i, 3, &isnull))) ?
					  &settled : &changing, id, id, caller);
		table_close(rel, NoLock);
	}
	abp_statement_close(&saved);
	return abp_idset_subtract(&settled, &changing);
}

/* The first column of a statement about rows, run as the table's owner. */
static IdSet
select_ids(const UsageTable *table, const char *statement, IdSet *ids, bool read_only)
{
	MemoryContext caller = CurrentMemoryContext;
	IdSet		found = {0};
	uint64		nrows;
	SavedUser	saved;

	nrows = select_rows(table, statement, ids, read_only, &saved);
	for (uint64 i = 0; i < nrows; i++)
	{
		int64		id = abp_result_int64(i, 1, 0);

		abp_idset_add(&found, id, id, caller);
	}
	abp_statement_close(&saved);
	abp_idset_sort(&found);
	return found;
}

/*
 * Lock rows against changes until the transaction ends; those that others are
 * changing are waited for or passed over.  Returns the ids of the rows that we
 * have, in the current memory context.
 */
IdSet
abp_rows_lock(const UsageTable *table, IdSet *ids, bool wait)
{
#define LOCK_ROWS \
	"SELECT u.id::pg_catalog.int8 FROM %s u WHERE u.id OPERATOR(pg_catalog.=) ANY ($1) FOR NO KEY UPDATE"

	return select_ids(table, wait ? LOCK_ROWS : LOCK_ROWS " SKIP LOCKED", ids, false);
}

/*
 * The ids of which there is a row, in the current memory context.
 */
IdSet
abp_rows_visible(const UsageTable *table, IdSet *ids)
{
	return select_ids(table, "SELECT u.id::pg_catalog.int8 FROM %s u WHERE u.id OPERATOR(pg_catalog.=) ANY ($1)", ids, false);
}

/*
 * The ids of several rows, by the active snapshot, in the current memory
 * context.
 */
IdSet
abp_rows_shared(const UsageTable *table, IdSet *ids)
{
	return select_ids(table, "SELECT u.id::pg_catalog.int8 FROM %s u WHERE u.id OPERATOR(pg_catalog.=) ANY ($1)"
					  " GROUP BY u.id HAVING pg_catalog.count(*) OPERATOR(pg_catalog.>) 1", ids, true);
}

/*
 * Price rows anew: an UPDATE that the table's own trigger turns into new
 * costs (triggers.c).  held: only rows without a cost; another row of such an id
 * may have been delivered, and come with its partition since it was looked for.
 * Returns the ids of the rows that there are.
 */
IdSet
abp_rows_update_prices(const UsageTable *table, IdSet *ids, bool held)
{
#define UPDATE_PRICES(more) \
	"UPDATE %s u SET cost_status = u.cost_status" \
	" WHERE u.id OPERATOR(pg_catalog.=) ANY ($1)" more " RETURNING u.id::pg_catalog.int8"

	return select_ids(table, held ? UPDATE_PRICES(" AND u.cost_nanos IS NULL") : UPDATE_PRICES(""), ids, false);
}

/*
 * Run a query that changes nothing on a usage table, as its owner, and give its
 * result to "callback", at_a_time rows at a time, in SPI's memory context.  The
 * callback may use SPI itself.  Raises what the query and the callback raise.
 */
void
abp_rows_query(const UsageTable *table, const char *query, int nargs, Oid *argtypes,
			   Datum *args, int at_a_time, QueryPartCallback callback, void *arg)
{
	Portal		cursor;
	SavedUser	saved;

	abp_become_table_owner(table->owner, &saved);
	SPI_connect();
	cursor = SPI_cursor_open_with_args(NULL, query, nargs, argtypes, args, NULL, true, 0);
	for (;;)
	{
		SPITupleTable *part;

		CHECK_FOR_INTERRUPTS();
		SPI_cursor_fetch(cursor, true, at_a_time);
		if (SPI_processed == 0)
			break;
		part = SPI_tuptable;
		callback(part, SPI_processed, arg);
		SPI_freetuptable(part);
	}
	SPI_cursor_close(cursor);
	SPI_finish();
	abp_restore_user(&saved);
}

/*
 * Add the ids in the first column of such rows, none of them NULL, to a set whose
 * ranges are in "context".
 */
void
abp_rows_query_ids(SPITupleTable *part, uint64 nrows, IdSet *ids, MemoryContext context)
{
	for (uint64 i = 0; i < nrows; i++)
	{
		bool		isnull;
		int64		id = DatumGetInt64(SPI_getbinval(part->vals[i], part->tupdesc, 1, &isnull));

		abp_idset_add(ids, id, id, context);
	}
}
