/*-------------------------------------------------------------------------
 *
 * rights.c
 *	  Whose rights what follows runs with.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/table.h"
#include "miscadmin.h"
#include "utils/guc.h"
#include "utils/rel.h"

#include "base/extension.h"
#include "base/rights.h"

/* A setting until abp_restore_user. */
void
abp_set_locally(const char *name, const char *value)
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
	abp_set_locally("search_path", "pg_catalog, pg_temp");
}

/*
 * Run what follows with the rights of a usage table's owner, for statements
 * that read the table: no policy hides rows (it raises an error instead).
 */
void
abp_become_table_owner(Oid owner, SavedUser *saved)
{
	abp_become(owner, saved);
	abp_set_locally("row_security", "off");
}

/*
 * Run what follows with the rights of the extension's owner.  For statements
 * of this file only, which call nothing of a user's.
 */
void
abp_become_extension_owner(SavedUser *saved)
{
	Relation	rel = table_open(abp_extension_needed("outbox_entry"), AccessShareLock);
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
