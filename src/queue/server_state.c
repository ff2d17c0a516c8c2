/*-------------------------------------------------------------------------
 *
 * server_state.c
 *	  Servers that are paused, or wait after failures: the table aibilling.server_state.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/table.h"
#include "catalog/pg_type.h"
#include "utils/builtins.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

#include "base/extension.h"
#include "base/statement.h"
#include "base/table_scan.h"
#include "base/text_view.h"
#include "queue/server_state.h"

/* columns of aibilling.server_state */
#define Anum_state_server 1
#define Anum_state_paused 2
#define Anum_state_reason 3
#define Anum_state_failures 5
#define Anum_state_not_before 6
#define Anum_state_role 7		/* since 1.1 */

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

/*
 * The states of all servers, a list of ServerState in the current memory context.
 */
List	   *
abp_server_states(bool by_role)
{
	Relation	rel = table_open(abp_extension_needed("server_state"), AccessShareLock);
	TupleDesc	desc = RelationGetDescr(rel);
	SysScanDesc scan = systable_beginscan(rel, InvalidOid, false, GetActiveSnapshot(), 0, NULL);
	HeapTuple	tuple;
	List	   *list = NIL;

	while ((tuple = systable_getnext(scan)) != NULL)
	{
		ServerState *state = palloc0(sizeof(ServerState));

		state->server =
			pstrdup(NameStr(*DatumGetName(abp_column_or(tuple, Anum_state_server, desc, 0))));
		if (by_role)
			state->role = DatumGetObjectId(abp_column_or(tuple, Anum_state_role, desc, 0));
		state->paused = abp_column_string(tuple, Anum_state_paused, desc);
		state->reason = abp_column_string(tuple, Anum_state_reason, desc);
		state->failures = DatumGetInt32(abp_column_or(tuple, Anum_state_failures, desc, 0));
		state->not_before = DatumGetTimestampTz(abp_column_or(tuple, Anum_state_not_before, desc,
															  TimestampTzGetDatum(DT_NOBEGIN)));
		list = lappend(list, state);
	}
	systable_endscan(scan);
	table_close(rel, NoLock);
	return list;
}

/*
 * The state of a server, for one role or InvalidOid; NULL if none is kept.
 */
const ServerState *
abp_server_state_find(List *states, const char *server, Oid role)
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

/*
 * What abp_attachments returns has changed: a shipper elsewhere reads it again.
 */
void
abp_server_state_tell_shipper(void)
{
	CacheInvalidateRelcacheByRelid(abp_extension_relation("server_state"));
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
 * (DT_NOBEGIN: at once).  An operator's pause stays until abp_server_state_resume.
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
		reason == NULL ? (Datum) 0 : PointerGetDatum(abp_reason_text(reason)),
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

	abp_statement_run_alone(&save[abp_server_state_by_role()], values, nulls);
	abp_server_state_tell_shipper();
}

#define RESUME \
	"DELETE FROM aibilling.server_state st WHERE st.server = $1" \
	" AND ($2 OR st.paused IS DISTINCT FROM 'operator')"

/*
 * Clear a server's waits and the pause that its answer began, of one role or
 * InvalidOid; by_operator: an operator's pause too.
 */
void
abp_server_state_resume(const char *server, Oid role, bool by_operator)
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

	abp_statement_run_alone(&resume[abp_server_state_by_role()], values, NULL);
	abp_server_state_tell_shipper();
}
