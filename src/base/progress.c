/*-------------------------------------------------------------------------
 *
 * progress.c
 *	  How far a session's long work is, for aibilling.progress.
 *
 * By PostgreSQL's own facility, which ends it with a failed transaction, under a
 * number that none of its views looks for.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "catalog/pg_authid.h"
#include "catalog/pg_class.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "utils/acl.h"
#include "utils/backend_progress.h"
#include "utils/backend_status.h"
#include "utils/builtins.h"
#include "utils/syscache.h"

#include "base/progress.h"
#include "compat.h"

PG_FUNCTION_INFO_V1(abp_sql_work_done);
PG_FUNCTION_INFO_V1(abp_sql_note_progress);

#define PROGRESS_COMMAND_OURS ((ProgressCommandType) 0x61627001)

/* Parameters of it. */
enum
{
	PARAM_DONE,
	PARAM_TOTAL,				/* 0: not known */
	PARAM_UNIT					/* index of units */
};

static const char *const units[] = {"rows", "pages", "prices"};

/* The index of a unit.  Raises invalid_parameter_value for any other word. */
static int
unit_number(const char *unit)
{
	for (int i = 0; i < lengthof(units); i++)
	{
		if (strcmp(units[i], unit) == 0)
			return i;
	}
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
			 errmsg("unknown unit of progress \"%s\"", unit)));
	return 0;					/* keep the compiler quiet */
}

/*
 * So many rows, pages or prices are done, of so many in all (0: not known).
 * relid: the table they are of, or InvalidOid.  Not within a command that tells
 * its own progress.
 */
void
abp_progress_report(Oid relid, const char *unit, int64 done, int64 total)
{
	static const int params[] = {PARAM_DONE, PARAM_TOTAL, PARAM_UNIT};
	int64		values[] = {done, total, unit_number(unit)};

	if (MyBEEntry == NULL)
		return;
	if (MyBEEntry->st_progress_command == PROGRESS_COMMAND_INVALID)
		pgstat_progress_start_command(PROGRESS_COMMAND_OURS, relid);
	if (MyBEEntry->st_progress_command == PROGRESS_COMMAND_OURS)
		pgstat_progress_update_multi_param(lengthof(params), params, values);
}

/*
 * How many rows a table has, as ANALYZE has found; 0: not known.
 */
int64
abp_progress_rows_about(Oid relid)
{
	HeapTuple	tuple = SearchSysCache1(RELOID, ObjectIdGetDatum(relid));
	int64		rows = 0;

	if (HeapTupleIsValid(tuple))
	{
		rows = (int64) Max(((Form_pg_class) GETSTRUCT(tuple))->reltuples, 0);
		ReleaseSysCache(tuple);
	}
	return rows;
}

/*
 * The work is done.
 */
void
abp_progress_end(void)
{
	if (MyBEEntry != NULL && MyBEEntry->st_progress_command == PROGRESS_COMMAND_OURS)
		pgstat_progress_end_command();
}

/*
 * aibilling.note_progress(usage, done, total, unit): of the caller's own work;
 * done NULL: its end.
 */
Datum
abp_sql_note_progress(PG_FUNCTION_ARGS)
{
	if (PG_ARGISNULL(1))
		abp_progress_end();
	else
		abp_progress_report(PG_ARGISNULL(0) ? InvalidOid : PG_GETARG_OID(0),
							text_to_cstring(PG_GETARG_TEXT_PP(3)), PG_GETARG_INT64(1),
							PG_ARGISNULL(2) ? 0 : Max(PG_GETARG_INT64(2), 0));
	PG_RETURN_VOID();
}

/*
 * aibilling.work_done(): of all sessions in this database that the caller may see
 * in pg_stat_activity.
 */
Datum
abp_sql_work_done(PG_FUNCTION_ARGS)
{
	ReturnSetInfo *result = (ReturnSetInfo *) fcinfo->resultinfo;
	bool		sees_all = has_privs_of_role(GetUserId(), ROLE_PG_READ_ALL_STATS);
	int			n = pgstat_fetch_stat_numbackends();

	InitMaterializedSRF(fcinfo, 0);
	for (int i = 1; i <= n; i++)
	{
		const PgBackendStatus *backend = abp_backend_status(i);
		const int64 *params = backend->st_progress_param;
		Datum		values[5];
		bool		nulls[5] = {false};

		if (backend->st_databaseid != MyDatabaseId ||
			backend->st_progress_command != PROGRESS_COMMAND_OURS ||
			!(sees_all || has_privs_of_role(GetUserId(), backend->st_userid)))
			continue;
		values[0] = Int32GetDatum(backend->st_procpid);
		values[1] = ObjectIdGetDatum(backend->st_progress_command_target);
		nulls[1] = !OidIsValid(backend->st_progress_command_target);
		values[2] = Int64GetDatum(params[PARAM_DONE]);
		values[3] = Int64GetDatum(params[PARAM_TOTAL]);
		nulls[3] = params[PARAM_TOTAL] == 0;
		values[4] = CStringGetTextDatum(units[params[PARAM_UNIT] % lengthof(units)]);
		tuplestore_putvalues(result->setResult, result->setDesc, values, nulls);
	}
	return (Datum) 0;
}
