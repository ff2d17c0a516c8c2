/*-------------------------------------------------------------------------
 *
 * operate.c
 *	  SQL functions that operate delivery: preview, pause, resume, retry, arm.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "commands/dbcommands.h"
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
#include "base/usage_row.h"
#include "compat.h"
#include "polar/event.h"
#include "polar/event_format.h"
#include "polar/server.h"
#include "queue/attachment.h"
#include "queue/database.h"
#include "queue/entry.h"
#include "queue/ledger.h"
#include "queue/outbox.h"
#include "queue/server_state.h"
#include "queue/wake.h"
#include "ship/guard.h"
#include "ship/user_code.h"
#include "usage/attach.h"
#include "usage/collect.h"
#include "usage/fate.h"
#include "usage/rows.h"

PG_FUNCTION_INFO_V1(abp_sql_preview);
PG_FUNCTION_INFO_V1(abp_sql_pause);
PG_FUNCTION_INFO_V1(abp_sql_resume);
PG_FUNCTION_INFO_V1(abp_sql_retry);
PG_FUNCTION_INFO_V1(abp_sql_arm);

/* --- preview ------------------------------------------------------------------ */

typedef struct Preview
{
	const ServerOptions *server;
	ReturnSetInfo *result;
	MemoryContext context;
} Preview;

/* A row as it would be sent, or why it would not be. */
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
	abp_attach_check_owner(relid);
	table = abp_attach_needed(relid);
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
	List	   *tables;			/* of UsageTable: those that they own */
	List	   *owners;			/* of these tables, as OIDs */
} ServerShare;

/*
 * Whole servers are their owner's to operate.  Everybody else operates the
 * delivery of their own tables: others that share the server go on.
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
	List	   *tables = abp_attachments(&armed);
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

/*
 * The whole server, or only for the tables of those whose rights the caller
 * has.
 */
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

/* End the pauses that the caller may end, and warn of one that stays. */
static void
resume_server(const ServerShare *share)
{
	bool		armed;
	ListCell   *lc;

	/* The server may be tried again by all that use it. */
	abp_server_state_resume(share->server, InvalidOid, share->whole);
	foreach(lc, share->owners)
		abp_server_state_resume(share->server, lfirst_oid(lc), true);
	foreach(lc, share->tables)
		abp_attachment_unblock(((UsageTable *) lfirst(lc))->relid, true);

	foreach(lc, abp_attachments(&armed))
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
	abp_attach_check_owner(relid);
	table = abp_attach_needed(relid);

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
