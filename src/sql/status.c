/*-------------------------------------------------------------------------
 *
 * status.c
 *	  SQL functions that watch delivery: status and usage_status.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/xact.h"
#include "access/xlog.h"
#include "catalog/pg_authid.h"
#include "catalog/pg_type.h"
#include "commands/dbcommands.h"
#include "executor/spi.h"
#include "fmgr.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "storage/lmgr.h"
#include "utils/builtins.h"
#include "utils/datum.h"
#include "utils/guc.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"
#include "utils/varlena.h"

#include "base/extension.h"
#include "base/idset.h"
#include "base/rights.h"
#include "base/statement.h"
#include "base/usage_row.h"
#include "compat.h"
#include "config.h"
#include "queue/attachment.h"
#include "queue/database.h"
#include "queue/entry.h"
#include "queue/ledger.h"
#include "queue/outbox.h"
#include "queue/wake.h"
#include "ship/guard.h"
#include "ship/shipper.h"
#include "sql/close.h"
#include "sql/status.h"
#include "usage/attach.h"
#include "usage/lookup.h"
#include "usage/row.h"
#include "usage/rows.h"

/* How many waiting rows status counts one by one. */
#define STATUS_EXACT_LIMIT 100000

/* How many missing prices it names, found in how many entries of the outbox. */
#define STATUS_REASONS 3
#define STATUS_ENTRIES 100

PG_FUNCTION_INFO_V1(abp_sql_waiting_ids);
PG_FUNCTION_INFO_V1(abp_sql_usage_status);
PG_FUNCTION_INFO_V1(abp_sql_status);

/* May the caller see this table's outbox, ledger and status? */
static bool
may_see(Oid relid)
{
	return has_privs_of_role(GetUserId(), ROLE_PG_MONITOR) || abp_owns_table(relid, GetUserId());
}

/*
 * Is this database named in aibilling_polar.databases?  in_other_case: perhaps
 * with other capital letters, as a name without quotes is.
 */
bool
abp_status_lists_database(bool in_other_case)
{
	List	   *names;
	ListCell   *lc;
	char	   *mine = get_database_name(MyDatabaseId);

	if (abp_databases == NULL || !SplitIdentifierString(pstrdup(abp_databases), ',', &names))
		return false;
	foreach(lc, names)
	{
		if ((in_other_case ? pg_strcasecmp : strcmp) (lfirst(lc), mine) == 0)
			return true;
	}
	return false;
}

/* --- what the views ask --------------------------------------------------------- */

/*
 * aibilling.waiting_ids(usage_table, state, entry, id, ids): what is left of an
 * outbox entry.
 */
Datum
abp_sql_waiting_ids(PG_FUNCTION_ARGS)
{
	IdSet		ids = {0};

	for (int i = 0; i < 4; i++)
	{
		if (PG_ARGISNULL(i))
			PG_RETURN_NULL();
	}
	if (may_see(PG_GETARG_OID(0)))
	{
		if (PG_ARGISNULL(4))
			abp_idset_add(&ids, PG_GETARG_INT64(3), PG_GETARG_INT64(3), CurrentMemoryContext);
		else
			ids = abp_idset_from_multirange(PG_GETARG_DATUM(4));
		ids = abp_outbox_left(PG_GETARG_OID(0), PG_GETARG_CHAR(1),
							  (ItemPointer) PG_GETARG_POINTER(2), PG_GETARG_INT64(3), &ids);
	}
	PG_RETURN_DATUM(abp_idset_to_multirange(&ids));
}

/*
 * In flight, in the outbox, or delivered.  Each part finds its rows by an index
 * whatever the planner knows of the tables.
 */
static const char usage_status_query[] =
"SELECT s.state, s.delivery_id, s.sent_at, s.attempts, s.error FROM ("
" SELECT d.state, d.id AS delivery_id, d.started_at AS sent_at, d.attempts, d.error,"
"  CASE d.state WHEN 'sending' THEN 1 ELSE 3 END AS place"
"  FROM (SELECT * FROM aibilling.ledger l WHERE l.usage_ids @> $2 OFFSET 0) d"
"  WHERE d.usage_table = $1 AND (d.state = 'sending' OR d.state = 'delivered' AND d.id >"
"   coalesce((SELECT a.ledger_from FROM aibilling.attachment a WHERE a.usage = $1), 0))"
" UNION ALL SELECT CASE e.state WHEN 'u' THEN 'unpriced' WHEN 'r' THEN 'rejected' ELSE 'pending' END,"
"  NULL, NULL, e.attempts, e.error, 2 FROM ("
"   SELECT o.*, o.ctid FROM aibilling.outbox_entry o WHERE o.usage_table = $1"
"    AND o.state = ANY ('{p,u,r}'::\"char\"[]) AND o.not_before = '-infinity' AND o.id = ANY (ARRAY[$2, $2 & -1024])"
"   UNION ALL SELECT o.*, o.ctid FROM aibilling.outbox_entry o WHERE o.usage_table = $1"
"    AND o.state = 'w' AND o.id = ANY (ARRAY[$2, $2 & -1024])) e"
"  WHERE aibilling.waiting_ids(e.usage_table, e.state, e.ctid, e.id, e.ids) @> $2) s"
" ORDER BY s.place, s.delivery_id DESC LIMIT 1";

/*
 * aibilling.usage_status(usage, id): where a row stands.
 */
Datum
abp_sql_usage_status(PG_FUNCTION_ARGS)
{
	Oid			argtypes[2] = {REGCLASSOID, INT8OID};
	Datum		args[2] = {PG_GETARG_DATUM(0), PG_GETARG_DATUM(1)};
	TupleDesc	desc;
	Datum		values[5] = {0};
	bool		nulls[5] = {true, true, true, true, true};
	Oid			serverid;
	int64		ledger_from;
	SavedUser	saved;
	MemoryContext caller = CurrentMemoryContext;

	abp_extension_check_version();
	if (get_call_result_type(fcinfo, NULL, &desc) != TYPEFUNC_COMPOSITE)
		elog(ERROR, "return type must be a row type");
	if (!may_see(PG_GETARG_OID(0)))
		aclcheck_error(ACLCHECK_NOT_OWNER, OBJECT_TABLE, get_rel_name(PG_GETARG_OID(0)));

	abp_become_extension_owner(&saved);
	SPI_connect();
	SPI_execute_with_args(usage_status_query, 2, argtypes, args, NULL, true, 0);
	if (SPI_processed > 0)
	{
		for (int i = 0; i < 5; i++)
		{
			Datum		value = SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc,
											  i + 1, &nulls[i]);

			if (!nulls[i])
			{
				Form_pg_attribute att = TupleDescAttr(SPI_tuptable->tupdesc, i);
				MemoryContext old = MemoryContextSwitchTo(caller);

				values[i] = datumCopy(value, att->attbyval, att->attlen);
				MemoryContextSwitchTo(old);
			}
		}
	}
	SPI_finish();
	abp_restore_user(&saved);

	if (nulls[0])
	{
		/* of a table that is not attached, none is */
		values[0] = CStringGetTextDatum(!abp_attachment_find(PG_GETARG_OID(0), &serverid, &ledger_from) ||
										abp_lookup_exists(PG_GETARG_OID(0), PG_GETARG_INT64(1)) ?
										"not_sent" : "no_row");
		nulls[0] = false;
	}
	PG_RETURN_DATUM(HeapTupleGetDatum(heap_form_tuple(BlessTupleDesc(desc), values, nulls)));
}

/* Columns of aibilling.status. */
enum
{
	STATUS_USAGE_TABLE,
	STATUS_SERVER,
	STATUS_PENDING,
	STATUS_PENDING_ESTIMATED,
	STATUS_UNPRICED,
	STATUS_REJECTED,
	STATUS_IN_FLIGHT,
	STATUS_OLDEST,
	STATUS_LAST_DELIVERY,
	STATUS_LAST_ERROR,
	STATUS_DELIVERIES,
	STATUS_DELIVERED,
	STATUS_DUPLICATES,
	STATUS_UNEXPECTED,
	STATUS_VANISHED,
	STATUS_WORKER_PID,
	STATUS_WORDS,
	NUM_STATUS
};

/* Why is there no worker here? */
static char *
no_worker_words(void)
{
	char	   *error;

	if (!abp_preloaded)
		return "no worker: the library is not preloaded (shared_preload_libraries)";
	if (!abp_status_lists_database(false))
		return psprintf("no worker: aibilling_polar.databases does not name \"%s\"%s",
						get_database_name(MyDatabaseId),
						abp_status_lists_database(true) ? " (a name with capital letters is written in double quotes there)" : "");
	if (RecoveryInProgress())
		return "no worker: this server is a standby";
	error = abp_wake_worker_error(get_database_name(MyDatabaseId));
	if (error != NULL)
		return psprintf("no worker: it has ended with an error and will start again: %s", error);
	return "no worker: it is starting, or max_worker_processes is exhausted; see the server log";
}

/* The first few things that rows wait for. */
static void
append_missing_prices(StringInfo words, const UsageTable *table)
{
	List	   *reasons = NIL;
	EntryCursor cursor = ENTRY_CURSOR_START;
	ListCell   *lc;

	PushActiveSnapshot(GetLatestSnapshot());
	for (int i = 0; i < STATUS_ENTRIES; i++)
	{
		OutboxEntry *entry = abp_outbox_next_unpriced(table->relid, &cursor);
		bool		known = false;

		CHECK_FOR_INTERRUPTS();

		if (entry == NULL)
			break;
		if (entry->error == NULL)
			continue;
		foreach(lc, reasons)
			known |= strcmp(lfirst(lc), entry->error) == 0;
		if (known)
			continue;
		if (list_length(reasons) == STATUS_REASONS)
		{
			appendStringInfoString(words, ", and others");
			break;
		}
		appendStringInfo(words, "%s%s", reasons == NIL ? ": " : ", ", entry->error);
		reasons = lappend(reasons, unconstify(char *, entry->error));
	}
	PopActiveSnapshot();
}

/* The prices that an import found suspicious, for somebody to look at. */
static void
append_held_prices(StringInfo words)
{
	static Statement find = {
		"SELECT format('%s suspicious prices are held since %s (aibilling.price_quarantine)',"
		" count(*), min(quarantined_at)::timestamptz(0))"
		" FROM aibilling.price_quarantine HAVING count(*) > 0",
		0, {0}, true
	};
	MemoryContext caller = CurrentMemoryContext;
	char	   *held = NULL;
	SavedUser	saved;

	if (abp_statement_open(&find, NULL, NULL, &saved) > 0)
		held = abp_result_string(0, 1, caller);
	abp_statement_close(&saved);

	if (held != NULL)
		appendStringInfo(words, "; %s", held);
}

/* What happens now with a table, and why. */
static char *
status_words(const UsageTable *table, bool armed, int worker_pid, int shipper,
			 bool locked, int64 ready, int64 unpriced, bool unpriced_estimated,
			 int64 rejected, bool rejected_estimated,
			 int64 not_queued, const LedgerTotals *totals)
{
	StringInfoData words;
	char	   *error;
	char	   *faults;
	char	   *close_words;

	initStringInfo(&words);
	if (!armed && abp_database_standing() == DATABASE_SUBSCRIBER)
		appendStringInfoString(&words, "paused: a subscription brings another database's outbox here, which is that one's to send; take schema aibilling out of the publication, or drop the subscription; then run SELECT aibilling.arm()");
	else if (!armed)
		appendStringInfoString(&words, "paused: this database is a copy; run SELECT aibilling.arm() if it is to send");
	else if (!OidIsValid(table->serverid))
		appendStringInfo(&words, "waiting: the server \"%s\" that it was attached to does not exist; attach the table again", table->server);
	else if (table->paused_by_operator)
		appendStringInfo(&words, "paused: %s", table->pause_reason);
	else if (table->paused_by_answer)
		appendStringInfo(&words, "paused: %s", table->pause_reason);
	else if (table->blocked_reason != NULL)
		appendStringInfo(&words, "blocked: %s", table->blocked_reason);
	else if (table->not_before > GetCurrentTimestamp())
		appendStringInfo(&words, "waiting until %s after %d failures: %s",
						 timestamptz_to_str(table->not_before), table->failures,
						 table->pause_reason);
	else if (locked)
		appendStringInfoString(&words, "waiting: another transaction has locked the table");
	else if (worker_pid == 0)
		appendStringInfo(&words, "%s%s", no_worker_words(),
						 shipper != 0 || RecoveryInProgress() ? "" :
						 "; deliver with CALL aibilling.sync()");
	else if (ready > 0 || totals->in_flight > 0)
		appendStringInfoString(&words, "delivering");
	else
		appendStringInfoString(&words, "idle: everything that can be sent is delivered");
	error = worker_pid == 0 ? NULL : abp_wake_worker_error(get_database_name(MyDatabaseId));
	if (error != NULL)
		appendStringInfo(&words, "; the worker has ended with an error and was started again: %s",
						 error);
	if (shipper != 0 && shipper != worker_pid)
		appendStringInfo(&words, "; session %d delivers, in CALL aibilling.sync()", shipper);
	if (unpriced > 0)
	{
		appendStringInfo(&words, "; %s" INT64_FORMAT " rows wait for a price (aibilling.unpriced)",
						 unpriced_estimated ? "about " : "", unpriced);
		append_missing_prices(&words, table);
	}
	append_held_prices(&words);
	close_words = abp_close_words(table, GetCurrentTimestamp());
	if (close_words != NULL)
		appendStringInfo(&words, "; %s", close_words);
	if (rejected > 0)
		appendStringInfo(&words, "; %s" INT64_FORMAT " rows are rejected (aibilling.outbox)",
						 rejected_estimated ? "about " : "", rejected);
	if (not_queued > 0)
		appendStringInfo(&words, "; " INT64_FORMAT " rows were priced and not queued: aibilling_polar.enqueue was off",
						 not_queued);
	if (abp_attach_ids_may_repeat(table->relid))
		appendStringInfoString(&words, "; warning: nothing keeps two rows from having the same id; add a UNIQUE index on (id)");
	faults = abp_row_columns_faults(table->relid);
	if (*faults != '\0')
		appendStringInfo(&words, "; warning: %s", faults);
	if (totals->unexpected_duplicates > 0)
		appendStringInfo(&words, "; warning: " INT64_FORMAT " events were not counted, Polar had their external_id before",
						 totals->unexpected_duplicates);
	return words.data;
}

/* The oldest waiting row of a table. */
typedef struct OldestRow
{
	const UsageTable *table;
	IdSet		ids;			/* its id */
	TimestampTz occurred_at;	/* DT_NOEND if it cannot be read */
} OldestRow;

static bool
note_oldest(const UsageRow *row, Jsonb *whole, void *arg)
{
	((OldestRow *) arg)->occurred_at = row->occurred_at;
	return true;
}

/* Under guard: read the time of the row. */
static void
read_oldest(void *arg)
{
	OldestRow  *oldest = arg;

	abp_guard_start_clock();
	abp_rows_read(oldest->table, &oldest->ids, false, note_oldest, oldest);
}

/*
 * When did the oldest waiting row occur?  DT_NOEND if its table cannot be
 * read, *locked if another transaction keeps us from it.
 */
static TimestampTz
oldest_time(const UsageTable *table, int64 id, bool *locked)
{
	OldestRow	oldest = {.table = table,.occurred_at = DT_NOEND};
	GuardError	error;

	if (!ConditionalLockRelationOid(table->relid, AccessShareLock))
		*locked = true;
	else
	{
		abp_idset_add(&oldest.ids, id, id, CurrentMemoryContext);
		if (abp_guard(table, read_oldest, &oldest, &error) == GUARD_PASSES)
			*locked = true;
		UnlockRelationOid(table->relid, AccessShareLock);
	}
	return oldest.occurred_at;
}

/* The row of one table. */
static void
status_of_table(const UsageTable *table, bool armed, int shipper, ReturnSetInfo *result)
{
	Datum		values[NUM_STATUS] = {0};
	bool		nulls[NUM_STATUS] = {false};
	LedgerTotals totals;
	bool		estimated;
	bool		estimated_waiting;
	bool		unpriced_estimated;
	bool		rejected_estimated;
	bool		ignored;
	bool		locked = false;
	int64		first = 0;
	int64		unused = 0;
	int64		ready;
	int64		waiting;
	int64		unpriced;
	int64		rejected;
	int64		not_queued;
	int			worker_pid = abp_wake_worker_pid();

	ready = abp_outbox_count(table->relid, OUTBOX_READY, STATUS_EXACT_LIMIT, &estimated, &first);
	waiting = abp_outbox_count(table->relid, OUTBOX_WAITING, STATUS_EXACT_LIMIT,
							   &estimated_waiting, &unused);
	unpriced = abp_outbox_count(table->relid, OUTBOX_UNPRICED, STATUS_EXACT_LIMIT,
								&unpriced_estimated, &unused);
	rejected = abp_outbox_count(table->relid, OUTBOX_REJECTED, STATUS_EXACT_LIMIT,
								&rejected_estimated, &unused);
	not_queued = table->not_queued +
		abp_outbox_count(table->relid, OUTBOX_NOT_QUEUED, STATUS_EXACT_LIMIT, &ignored, &unused);
	abp_ledger_totals(table->relid, &totals);

	values[STATUS_USAGE_TABLE] = ObjectIdGetDatum(table->relid);
	values[STATUS_SERVER] = DirectFunctionCall1(namein, CStringGetDatum(table->server));
	values[STATUS_PENDING] = Int64GetDatum(ready + waiting);
	values[STATUS_PENDING_ESTIMATED] = BoolGetDatum(estimated || estimated_waiting);
	values[STATUS_UNPRICED] = Int64GetDatum(unpriced);
	values[STATUS_REJECTED] = Int64GetDatum(rejected);
	values[STATUS_IN_FLIGHT] = Int64GetDatum(totals.in_flight);

	nulls[STATUS_OLDEST] = true;
	if (ready > 0)
	{
		TimestampTz oldest = oldest_time(table, first, &locked);

		nulls[STATUS_OLDEST] = oldest == DT_NOEND;
		values[STATUS_OLDEST] = TimestampTzGetDatum(oldest);
	}
	nulls[STATUS_LAST_DELIVERY] = TIMESTAMP_NOT_FINITE(totals.last_delivery);
	values[STATUS_LAST_DELIVERY] = TimestampTzGetDatum(totals.last_delivery);
	nulls[STATUS_LAST_ERROR] = totals.last_error == NULL;
	if (totals.last_error != NULL)
		values[STATUS_LAST_ERROR] = CStringGetTextDatum(totals.last_error_at >= totals.last_delivery ? totals.last_error :
														psprintf("%s (of %s, before the last delivery)", totals.last_error,
																 timestamptz_to_str(totals.last_error_at)));
	values[STATUS_DELIVERIES] = Int64GetDatum(totals.deliveries);
	values[STATUS_DELIVERED] = Int64GetDatum(totals.delivered);
	values[STATUS_DUPLICATES] = Int64GetDatum(totals.duplicates);
	values[STATUS_UNEXPECTED] = Int64GetDatum(totals.unexpected_duplicates);
	values[STATUS_VANISHED] = Int64GetDatum(totals.vanished);
	nulls[STATUS_WORKER_PID] = worker_pid == 0;
	values[STATUS_WORKER_PID] = Int32GetDatum(worker_pid);
	values[STATUS_WORDS] = CStringGetTextDatum(status_words(table, armed, worker_pid, shipper, locked, ready,
															unpriced, unpriced_estimated,
															rejected, rejected_estimated, not_queued,
															&totals));
	tuplestore_putvalues(result->setResult, result->setDesc, values, nulls);
}

/*
 * aibilling.status_rows(): one row per usage table that the caller may see.
 */
Datum
abp_sql_status(PG_FUNCTION_ARGS)
{
	ReturnSetInfo *result = (ReturnSetInfo *) fcinfo->resultinfo;
	bool		armed;
	int			shipper;
	List	   *tables;
	bool		sees_any = false;
	ListCell   *lc;

	abp_extension_check_version();
	InitMaterializedSRF(fcinfo, 0);
	tables = abp_attachments(&armed);
	shipper = abp_ship_pid();
	foreach(lc, tables)
	{
		UsageTable *table = lfirst(lc);

		CHECK_FOR_INTERRUPTS();
		if (OidIsValid(table->owner) && may_see(table->relid))
		{
			status_of_table(table, armed, shipper, result);
			sees_any = true;
		}
	}

	if (tables != NIL && !sees_any)
		ereport(NOTICE,
				(errmsg("no usage table is role \"%s\"'s to see", GetUserNameFromId(GetUserId(), false)),
				 errhint("Its owner sees it, and who is granted the owner's role or pg_monitor.")));
	if (tables == NIL)
	{
		Datum		values[NUM_STATUS] = {0};
		bool		nulls[NUM_STATUS];
		int			worker_pid = abp_wake_worker_pid();
		StringInfoData words;

		memset(nulls, true, sizeof(nulls));
		nulls[STATUS_WORDS] = false;
		nulls[STATUS_WORKER_PID] = worker_pid == 0;
		values[STATUS_WORKER_PID] = Int32GetDatum(worker_pid);
		initStringInfo(&words);
		appendStringInfo(&words, "no usage table is attached; create one with aibilling.create_usage_table%s%s",
						 worker_pid == 0 ? "; " : "", worker_pid == 0 ? no_worker_words() : "");
		append_held_prices(&words);
		values[STATUS_WORDS] = CStringGetTextDatum(words.data);
		tuplestore_putvalues(result->setResult, result->setDesc, values, nulls);
	}
	return (Datum) 0;
}
