/*-------------------------------------------------------------------------
 *
 * operate.c
 *	  SQL functions that operate delivery: preview, pause, resume, retry, arm, reprice.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "commands/dbcommands.h"
#include "executor/spi.h"
#include "fmgr.h"
#include "foreign/foreign.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "nodes/value.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/jsonb.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "base/extension.h"
#include "base/idset.h"
#include "base/rights.h"
#include "base/usage_row.h"
#include "compat.h"
#include "polar/event.h"
#include "polar/event_format.h"
#include "polar/server.h"
#include "price/price.h"
#include "queue/attachment.h"
#include "queue/entry.h"
#include "queue/ledger.h"
#include "queue/outbox.h"
#include "queue/place.h"
#include "queue/wake.h"
#include "ship/guard.h"
#include "ship/user_code.h"
#include "usage/attach.h"
#include "usage/collect.h"
#include "usage/fate.h"
#include "usage/rows.h"
#include "usage/triggers.h"

PG_FUNCTION_INFO_V1(abp_sql_preview);
PG_FUNCTION_INFO_V1(abp_sql_pause);
PG_FUNCTION_INFO_V1(abp_sql_resume);
PG_FUNCTION_INFO_V1(abp_sql_retry);
PG_FUNCTION_INFO_V1(abp_sql_arm);
PG_FUNCTION_INFO_V1(abp_sql_reprice);

/* --- preview ------------------------------------------------------------------ */

typedef struct Preview
{
	const ServerOptions *server;
	ReturnSetInfo *result;
	MemoryContext context;
} Preview;

static bool
preview_row(const UsageRow *row, Jsonb *whole, void *arg)
{
	Preview    *preview = arg;
	EventOverrides overrides = {{NULL}};
	StringInfoData body;
	StringInfoData reason;
	RowState	fate;
	Datum		values[4];
	bool		nulls[4] = {false};
	char	   *problem = NULL;

	initStringInfo(&body);
	initStringInfo(&reason);
	abp_fate_of(row, preview->server, &fate);
	problem = fate.error;
	if (fate.state != OUTBOX_REJECTED &&
		(abp_user_code_call(preview->server, whole, &overrides, &problem) != GUARD_DONE ||
		 !abp_event_encode(&body, row, &preview->server->format, &overrides, &reason)))
	{
		fate.state = OUTBOX_REJECTED;
		if (problem == NULL)
			problem = reason.data;
	}

	values[0] = Int64GetDatum(row->id);
	values[1] = CStringGetTextDatum(fate.state == OUTBOX_REJECTED ? "rejected" :
									fate.state == OUTBOX_UNPRICED ? "unpriced" : "pending");
	nulls[2] = body.len == 0;
	if (!nulls[2])
		values[2] = DirectFunctionCall1(jsonb_in, CStringGetDatum(body.data));
	nulls[3] = problem == NULL;
	if (!nulls[3])
		values[3] = CStringGetTextDatum(problem);
	tuplestore_putvalues(preview->result->setResult, preview->result->setDesc, values, nulls);
	return true;
}

/*
 * aibilling.preview(usage, max_rows): the events of the next rows in the
 * outbox, exactly as they would be sent.
 */
Datum
abp_sql_preview(PG_FUNCTION_ARGS)
{
	Oid			relid = PG_GETARG_OID(0);
	int32		max_rows = PG_GETARG_INT32(1);
	Preview		preview = {0};
	UsageTable *table;
	IdSet		ids = {0};
	const char	states[] = {OUTBOX_READY, OUTBOX_REJECTED, OUTBOX_UNPRICED};

	InitMaterializedSRF(fcinfo, 0);
	abp_check_table_owner(relid);
	table = abp_attached_table(relid);
	if (!OidIsValid(table->serverid))
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_OBJECT),
				 errmsg("server \"%s\" does not exist", table->server)));
	if (max_rows < 0)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("max_rows must not be negative")));

	for (int i = 0; i < lengthof(states); i++)
	{
		int64		left = max_rows - abp_idset_count(&ids);
		IdSet		some;

		if (left <= 0)
			break;
		some = abp_outbox_peek(relid, states[i], left);
		for (int r = 0; r < some.nranges; r++)
			abp_idset_add(&ids, some.ranges[r].first, some.ranges[r].last, CurrentMemoryContext);
	}

	preview.server = abp_server_options(table->serverid);
	preview.result = (ReturnSetInfo *) fcinfo->resultinfo;
	abp_rows_read(table, &ids, true, preview_row, &preview);
	return (Datum) 0;
}

/* --- pause, resume, retry, arm -------------------------------------------------- */

/* What a caller may pause and resume of a server. */
typedef struct ServerShare
{
	const char *server;
	bool		whole;			/* all of it */
	List	   *tables;			/* of UsageTable: those that he owns */
	List	   *owners;			/* of these tables, as OIDs */
} ServerShare;

/*
 * Whole servers are their owner's to operate.  Everybody else operates the
 * delivery of his own tables: others that share the server go on.
 */
static ServerShare *
share_of(const char *server, List *tables)
{
	ServerShare *share = palloc0(sizeof(ServerShare));
	bool		owns_all = true;
	ListCell   *lc;

	share->server = server;
	share->whole = superuser();
	foreach(lc, tables)
	{
		UsageTable *table = lfirst(lc);

		if (strcmp(table->server, server) != 0)
			continue;
		if (OidIsValid(table->serverid) && abp_owns_server(table->serverid, GetUserId()))
			share->whole = true;
		if (!OidIsValid(table->owner))
			continue;
		if (abp_owns_table(table->relid, GetUserId()))
		{
			share->tables = lappend(share->tables, table);
			share->owners = list_append_unique_oid(share->owners, table->owner);
		}
		else
			owns_all = false;
	}

	/* Before 1.1 a pause can only be one of all tables. */
	if (!share->whole && share->tables != NIL && !abp_server_state_by_role())
	{
		if (!owns_all)
			ereport(ERROR,
					(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
					 errmsg("others have usage tables attached to server \"%s\" too", server),
					 errhint("To pause and resume your own ones, the extension must be updated: ALTER EXTENSION aibilling_polar UPDATE.")));
		share->whole = true;
	}
	return share;
}

/*
 * Call "action" for a server, or for all that have tables attached: for what
 * the caller may operate of them.
 */
static void
for_servers(FunctionCallInfo fcinfo, void (*action) (const ServerShare *share))
{
	const char *wanted = PG_ARGISNULL(0) ? NULL : NameStr(*PG_GETARG_NAME(0));
	bool		armed;
	List	   *tables = abp_usage_tables(&armed);
	List	   *done = NIL;
	bool		acted = false;
	ListCell   *lc;

	if (wanted != NULL)
		(void) GetForeignServerByName(wanted, false);

	foreach(lc, tables)
	{
		UsageTable *table = lfirst(lc);
		ServerShare *share;

		if ((wanted != NULL && strcmp(wanted, table->server) != 0) ||
			list_member(done, makeString(table->server)))
			continue;
		done = lappend(done, makeString(table->server));
		share = share_of(table->server, tables);
		if (!share->whole && share->tables == NIL)
			continue;
		action(share);
		acted = true;
	}

	if (wanted != NULL && done == NIL)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("no usage table is attached to server \"%s\"", wanted)));
	if (done != NIL && !acted)
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 wanted == NULL ?
				 errmsg("must be owner of a server or of a usage table attached to one") :
				 errmsg("must be owner of server \"%s\" or of a usage table attached to it",
						wanted)));
	abp_wake_at_commit();
}

static void
pause_server(const ServerShare *share)
{
	const char *reason = psprintf("paused by %s", GetUserNameFromId(GetUserId(), false));
	ListCell   *lc;

	if (share->whole)
		abp_server_state_save(share->server, InvalidOid, "operator", reason, 0, DT_NOBEGIN);
	else
		foreach(lc, share->owners)
			abp_server_state_save(share->server, lfirst_oid(lc), "operator", reason, 0, DT_NOBEGIN);
}

static void
resume_server(const ServerShare *share)
{
	bool		armed;
	ListCell   *lc;

	/* The server may be tried again by all that use it. */
	abp_server_resume(share->server, InvalidOid, share->whole);
	foreach(lc, share->owners)
		abp_server_resume(share->server, lfirst_oid(lc), true);
	foreach(lc, share->tables)
		abp_usage_table_unblock(((UsageTable *) lfirst(lc))->relid, true);

	foreach(lc, abp_usage_tables(&armed))
	{
		UsageTable *table = lfirst(lc);

		if (table->paused_by_operator && strcmp(table->server, share->server) == 0 &&
			list_member_oid(share->owners, table->owner))
		{
			ereport(WARNING,
					(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
					 errmsg("server \"%s\" stays paused: %s", share->server, table->pause_reason),
					 errhint("That pause is one of the whole server; only its owner or a superuser can end it.")));
			break;
		}
	}
}

/*
 * aibilling.pause(server): send nothing until resume(); NULL: all servers.
 */
Datum
abp_sql_pause(PG_FUNCTION_ARGS)
{
	for_servers(fcinfo, pause_server);
	PG_RETURN_VOID();
}

/*
 * aibilling.resume(server): end a pause, whoever has begun it, and try now.
 */
Datum
abp_sql_resume(PG_FUNCTION_ARGS)
{
	for_servers(fcinfo, resume_server);
	PG_RETURN_VOID();
}

/*
 * Of a table's rejected ids, those whose rows we can lock, or that have no row:
 * an UPDATE that is under way decides itself what becomes of its row.
 */
static IdSet
retriable(const UsageTable *table, IdSet *only)
{
	IdSet		ids = abp_outbox_peek(table->relid, OUTBOX_REJECTED, PG_INT64_MAX);
	IdSet		own = abp_collect_changes(table->relid);
	IdSet		visible;
	IdSet		locked;

	if (only != NULL)
		ids = abp_idset_intersect(&ids, only);
	ids = abp_idset_subtract(&ids, &own);
	locked = abp_rows_lock(table, &ids, false);
	visible = abp_rows_visible(table, &ids);
	visible = abp_idset_subtract(&visible, &locked);
	return abp_idset_subtract(&ids, &visible);
}

/*
 * aibilling.retry(usage, ids): send rejected rows again.  Returns how many.
 */
Datum
abp_sql_retry(PG_FUNCTION_ARGS)
{
	Oid			relid;
	IdSet		only = {0};
	IdSet		ids;
	UsageTable *table;
	int64		count;

	if (PG_ARGISNULL(0))
		PG_RETURN_NULL();
	relid = PG_GETARG_OID(0);
	abp_check_table_owner(relid);
	table = abp_attached_table(relid);

	if (!PG_ARGISNULL(1))
	{
		Datum	   *elements;
		bool	   *nulls;
		int			n;

		deconstruct_array(PG_GETARG_ARRAYTYPE_P(1), INT8OID, sizeof(int64), FLOAT8PASSBYVAL,
						  TYPALIGN_DOUBLE, &elements, &nulls, &n);
		for (int i = 0; i < n; i++)
		{
			if (!nulls[i])
				abp_idset_add(&only, DatumGetInt64(elements[i]), DatumGetInt64(elements[i]),
							  CurrentMemoryContext);
		}
	}
	ids = retriable(table, PG_ARGISNULL(1) ? NULL : &only);
	count = abp_outbox_make_ready(relid, OUTBOX_REJECTED, &ids);
	abp_wake_at_commit();
	PG_RETURN_INT64(count);
}

/*
 * aibilling.arm(): let this copy of a database send.
 */
Datum
abp_sql_arm(PG_FUNCTION_ARGS)
{
	if (!abp_owns_database(MyDatabaseId, GetUserId()))
		aclcheck_error(ACLCHECK_NOT_OWNER, OBJECT_DATABASE, get_database_name(MyDatabaseId));
	abp_extension_check_version();
	abp_database_arm(false);
	abp_wake_at_commit();
	PG_RETURN_VOID();
}

/* --- reprice --------------------------------------------------------------------- */

/* How many rows are looked at a time. */
#define REPRICE_CHUNK 1000

/* How many of the rows that cannot be repriced a warning names. */
#define MAX_KEPT_NAMED 10

typedef struct Repricing
{
	const UsageTable *table;
	bool		dry_run;
	IdSet		differing;		/* of a chunk: the cost would be another */
	IdSet		changed;
	int64		kept;			/* rows that cannot be repriced */
	StringInfoData kept_names;	/* the first of them, with reasons */
	ReturnSetInfo *result;
	MemoryContext context;
} Repricing;

/*
 * Is the cost of a row by the prices of now another one, or not to be told?
 * Then *possible is false, and *problem says why, palloc'd.
 */
static bool
cost_differs(const UsageRow *row, PricedCost *cost, bool *possible, char **problem)
{
	*possible = abp_fate_cost(row, cost, problem);
	return !*possible || cost->known != row->has_cost_nanos ||
		(cost->known &&
		 (cost->cost_nanos != row->cost_nanos || row->cost_cents == NULL ||
		  !DatumGetBool(DirectFunctionCall2(numeric_eq, NumericGetDatum(cost->cost_cents),
											NumericGetDatum(row->cost_cents)))));
}

static bool
note_difference(const UsageRow *row, Jsonb *whole, void *arg)
{
	Repricing  *repricing = arg;
	PricedCost	cost;
	bool		possible;
	char	   *problem;

	if (cost_differs(row, &cost, &possible, &problem))
		abp_idset_add(&repricing->differing, row->id, row->id, repricing->context);
	return true;
}

static bool
reprice_row(const UsageRow *row, Jsonb *whole, void *arg)
{
	Repricing  *repricing = arg;
	PricedCost	cost;
	RowPlace	place;
	Datum		values[6];
	bool		nulls[6] = {false};
	const char *place_name;
	bool		may_change;
	bool		possible;
	char	   *problem;

	if (!cost_differs(row, &cost, &possible, &problem))
		return true;

	if (!abp_collect_find(repricing->table->relid, row->id, &place))
		abp_place_find(repricing->table->relid, row->id, repricing->table->ledger_from, &place);
	if (!possible)
	{
		/* The outbox tells of a row that has never had a cost. */
		if (!row->has_cost_nanos && place.where == ROW_IN_OUTBOX && place.state == OUTBOX_REJECTED)
			return true;
		if (repricing->kept++ < MAX_KEPT_NAMED)
			appendStringInfo(&repricing->kept_names, "%sRow " INT64_FORMAT ": %s.",
							 repricing->kept > 1 ? "\n" : "", row->id, problem);
	}
	may_change = possible &&
		(place.where == ROW_NOT_SENT ||
		 (place.where == ROW_IN_OUTBOX && !place.outcome_unknown &&
		  !abp_ledger_has(repricing->table->relid, row->id, repricing->table->ledger_from)));
	place_name = place.where == ROW_SENDING ? "sending" :
		place.where == ROW_DELIVERED ? "delivered" :
		place.where == ROW_NOT_SENT ? "not_sent" :
		place.state == OUTBOX_UNPRICED ? "unpriced" :
		place.state == OUTBOX_REJECTED ? "rejected" : "pending";

	values[0] = Int64GetDatum(row->id);
	values[1] = CStringGetTextDatum(place_name);
	nulls[2] = !row->has_cost_nanos;
	values[2] = Int64GetDatum(row->cost_nanos);
	nulls[3] = !possible || !cost.known;
	if (!nulls[3])
		values[3] = Int64GetDatum(cost.cost_nanos);
	nulls[4] = nulls[2] || nulls[3];
	if (!nulls[4])
		values[4] = DirectFunctionCall2(numeric_sub,
										NumericGetDatum(int64_to_numeric(cost.cost_nanos)),
										NumericGetDatum(int64_to_numeric(row->cost_nanos)));
	values[5] = CStringGetTextDatum(!possible ? "kept" :
									!may_change ? "reported" :
									repricing->dry_run ? "would change" : "changed");
	tuplestore_putvalues(repricing->result->setResult, repricing->result->setDesc, values, nulls);

	if (may_change && !repricing->dry_run)
		abp_idset_add(&repricing->changed, row->id, row->id, repricing->context);
	return true;
}

/*
 * aibilling.reprice(usage, from_time, to_time, dry_run): recompute costs.  A
 * row a cost that differs; delivered ones and those in flight are reported
 * only.  A row whose cost cannot be told keeps what it has, and keeps no other
 * from being repriced.
 */
Datum
abp_sql_reprice(PG_FUNCTION_ARGS)
{
	Repricing	repricing = {NULL, PG_GETARG_BOOL(3)};
	IdSet		own;
	Oid			argtypes[2] = {TIMESTAMPTZOID, TIMESTAMPTZOID};
	Datum		args[2] = {PG_GETARG_DATUM(1), PG_GETARG_DATUM(2)};
	UsageTable *table;
	Portal		cursor;
	SavedUser	saved;

	InitMaterializedSRF(fcinfo, 0);
	abp_check_table_owner(PG_GETARG_OID(0));
	table = abp_attached_table(PG_GETARG_OID(0));
	repricing.table = table;
	repricing.result = (ReturnSetInfo *) fcinfo->resultinfo;
	repricing.context = CurrentMemoryContext;
	initStringInfo(&repricing.kept_names);

	abp_become_table_owner(table->owner, &saved);
	SPI_connect();
	cursor = SPI_cursor_open_with_args(NULL,
									   psprintf("SELECT id::pg_catalog.int8 FROM %s"
												" WHERE occurred_at >= $1 AND occurred_at < $2",
												table->name),
									   2, argtypes, args, NULL, true, 0);
	for (;;)
	{
		IdSet		ids = {0};

		CHECK_FOR_INTERRUPTS();
		SPI_cursor_fetch(cursor, true, REPRICE_CHUNK);
		if (SPI_processed == 0)
			break;
		for (uint64 i = 0; i < SPI_processed; i++)
		{
			bool		isnull;
			int64		id = DatumGetInt64(SPI_getbinval(SPI_tuptable->vals[i],
														 SPI_tuptable->tupdesc, 1, &isnull));

			abp_idset_add(&ids, id, id, CurrentMemoryContext);
		}
		SPI_freetuptable(SPI_tuptable);
		if (!repricing.dry_run)
		{
			/* Who has a row's lock can rely on where it is: it is not sent. */
			abp_rows_read(table, &ids, false, note_difference, &repricing);
			if (repricing.differing.nranges == 0)
				continue;
			ids = abp_rows_lock(table, &repricing.differing, true);
			abp_idset_free(&repricing.differing);
		}
		abp_rows_read(table, &ids, false, reprice_row, &repricing);
	}
	SPI_cursor_close(cursor);
	SPI_finish();
	abp_restore_user(&saved);

	if (repricing.changed.nranges > 0)
	{
		abp_price_rows_again(table, &repricing.changed);
		own = abp_collect_changes(table->relid);
		repricing.changed = abp_idset_subtract(&repricing.changed, &own);
		(void) abp_outbox_make_ready(table->relid, OUTBOX_UNPRICED, &repricing.changed);
		abp_wake_at_commit();
	}
	if (repricing.kept > 0)
		ereport(WARNING,
				(errcode(ERRCODE_WARNING),
				 errmsg_plural(INT64_FORMAT " usage row of %s cannot be repriced and stays as it is",
							   INT64_FORMAT " usage rows of %s cannot be repriced and stay as they are",
							   repricing.kept, repricing.kept, table->name),
				 errdetail_internal("%s%s", repricing.kept_names.data,
									repricing.kept > MAX_KEPT_NAMED ? "\nAnd others." : ""),
				 errhint("Correct the prices or the rows, and call aibilling.reprice() again; such rows have the action \"kept\".")));
	return (Datum) 0;
}
