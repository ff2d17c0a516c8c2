/*-------------------------------------------------------------------------
 *
 * extension.c
 *	  The extension in this database: is it there, and which relations has it?
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/namespace.h"
#include "commands/extension.h"
#include "utils/lsyscache.h"

#include "base/extension.h"

/*
 * Is the extension there, all of it and of this library's version?  Not while
 * it is being created, nor before it is updated.
 */
bool
abp_extension_installed(void)
{
	return OidIsValid(get_extension_oid("aibilling_polar", true)) &&
		OidIsValid(abp_extension_relation("database_identity")) &&
		OidIsValid(abp_extension_relation("ledger")) &&
		OidIsValid(abp_extension_relation("rollup"));
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
 * What one of our event triggers, aibilling.FUNCTION, is told of.  Raises an error if
 * it is called as something else.
 */
EventTriggerData *
abp_extension_event(FunctionCallInfo fcinfo, const char *function)
{
	if (!CALLED_AS_EVENT_TRIGGER(fcinfo))
		ereport(ERROR,
				(errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
				 errmsg("function \"aibilling.%s\" can only be called as an event trigger", function)));
	return (EventTriggerData *) fcinfo->context;
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
 * The OID of a relation of the extension that is needed.  Raises an error
 * without it.
 */
Oid
abp_extension_needed(const char *name)
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
