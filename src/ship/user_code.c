/*-------------------------------------------------------------------------
 *
 * user_code.c
 *	  The functions that a server's options name, called as their owners.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "catalog/namespace.h"
#include "catalog/pg_proc.h"
#include "miscadmin.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/jsonb.h"
#include "utils/regproc.h"
#include "utils/syscache.h"

#include "base/rights.h"
#include "compat.h"
#include "polar/event_format.h"
#include "polar/server.h"
#include "ship/guard.h"
#include "ship/user_code.h"

/*
 * Look up a user's function.  Its server's owner must be allowed to run it,
 * and with the rights of its owner, today as when the option was set: what has
 * its name now may be another function.  Returns InvalidOid without one;
 * without a usable one, also says why in *problem.
 */
static Oid
find_function(const char *name, Oid result, const ServerOptions *server, char **problem)
{
	Oid			argtypes[1] = {JSONBOID};
	List	   *names;
	Oid			namespace;
	HeapTuple	tup = NULL;
	Form_pg_proc proc;
	Oid			funcid = InvalidOid;

	if (name == NULL)
		return InvalidOid;

	names = stringToQualifiedNameList(name ABP_NO_SOFT_ERROR);
	namespace = get_namespace_oid(strVal(linitial(names)), true);
	if (OidIsValid(namespace))
		tup = SearchSysCache3(PROCNAMEARGSNSP, CStringGetDatum(strVal(lsecond(names))),
							  PointerGetDatum(buildoidvector(argtypes, 1)),
							  ObjectIdGetDatum(namespace));
	proc = HeapTupleIsValid(tup) ? (Form_pg_proc) GETSTRUCT(tup) : NULL;
	if (proc == NULL || proc->prokind != PROKIND_FUNCTION || proc->proretset ||
		proc->prorettype != result)
		*problem = psprintf("function %s(jsonb) returning %s does not exist",
							name, format_type_be(result));
	else if (!abp_may_execute(proc->oid, server->owner))
		*problem = psprintf("the owner of server \"%s\" may not execute function %s(jsonb)",
							server->name, name);
	else if (!has_privs_of_role(server->owner, proc->proowner))
		*problem = psprintf("the owner of server \"%s\" is not a member of role %s, which owns function %s(jsonb)",
							server->name, quote_identifier(GetUserNameFromId(proc->proowner, false)),
							name);
	else
		funcid = proc->oid;
	if (tup != NULL)
		ReleaseSysCache(tup);
	return funcid;
}

/* A call of a user's function. */
typedef struct FunctionCall
{
	Oid			funcid;
	Jsonb	   *argument;
	Datum		result;			/* (Datum) 0: NULL */
} FunctionCall;

/* Under guard: call a function, as its owner. */
static void
call_guarded(void *arg)
{
	FunctionCall *call = arg;
	HeapTuple	proc = SearchSysCache1(PROCOID, ObjectIdGetDatum(call->funcid));
	Oid			proowner;
	FmgrInfo	flinfo;
	SavedUser	saved;

	LOCAL_FCINFO(fcinfo, 1);

	if (!HeapTupleIsValid(proc))
		elog(ERROR, "cache lookup failed for function %u", call->funcid);
	proowner = ((Form_pg_proc) GETSTRUCT(proc))->proowner;
	ReleaseSysCache(proc);

	abp_become(proowner, &saved);
	fmgr_info(call->funcid, &flinfo);
	InitFunctionCallInfoData(*fcinfo, &flinfo, 1, InvalidOid, NULL, NULL);
	fcinfo->args[0].value = JsonbPGetDatum(call->argument);
	fcinfo->args[0].isnull = false;
	call->result = FunctionCallInvoke(fcinfo);
	if (fcinfo->isnull)
		call->result = (Datum) 0;
	else
		call->result = PointerGetDatum(PG_DETOAST_DATUM_COPY(call->result));
	abp_restore_user(&saved);
}

/*
 * Call a user's function as its own owner.  If it fails its effects are rolled
 * back, and *reason says why.  The result is copied to the current memory
 * context; NULL is (Datum) 0.  Raised is only that the time is up.
 */
static GuardOutcome
call_function(Oid funcid, const char *option, Jsonb *whole, Datum *result,
			  char **reason)
{
	FunctionCall call = {funcid, whole};
	GuardError	error;
	GuardOutcome outcome = abp_guard(NULL, call_guarded, &call, &error);

	if (outcome == GUARD_TOO_LONG)
		abp_guard_rethrow(&error);
	if (outcome == GUARD_FAILED)
		*reason = psprintf("%s failed: %s", option, error.message);
	else if (outcome != GUARD_DONE)
		*reason = error.message;
	*result = call.result;
	return outcome;
}

/*
 * What the functions of a server's options make of a row, given as jsonb.
 * With another outcome than GUARD_DONE, *reason says which one cannot be
 * called, fails, or returns something else than text or a JSON object.
 */
GuardOutcome
abp_user_code_call(const ServerOptions *server, Jsonb *whole,
				   EventOverrides *overrides, char **reason)
{
	char	   *problem = NULL;
	Oid			event_name = find_function(server->event_name_function, TEXTOID, server, &problem);
	Oid			metadata = find_function(server->metadata_function, JSONBOID, server, &problem);
	Datum		result;
	GuardOutcome outcome;

	if (problem != NULL)
	{
		*reason = problem;
		return GUARD_FAILED;
	}
	if (OidIsValid(event_name))
	{
		outcome = call_function(event_name, "event_name_function", whole, &result, reason);
		if (outcome != GUARD_DONE)
			return outcome;
		if (result == (Datum) 0)
		{
			*reason = "event_name_function returned null";
			return GUARD_FAILED;
		}
		overrides->event_name = text_view_from_datum(result);
	}
	if (OidIsValid(metadata))
	{
		outcome = call_function(metadata, "metadata_function", whole, &result, reason);
		if (outcome != GUARD_DONE)
			return outcome;
		if (result == (Datum) 0 || !JB_ROOT_IS_OBJECT(DatumGetJsonbP(result)))
		{
			*reason = "metadata_function did not return an object";
			return GUARD_FAILED;
		}
		overrides->metadata = DatumGetJsonbP(result);
	}
	return GUARD_DONE;
}
