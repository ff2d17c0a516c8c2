/*-------------------------------------------------------------------------
 *
 * config.c
 *	  Settings of the server (GUCs).
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <limits.h>

#include "miscadmin.h"
#include "utils/guc.h"
#include "utils/varlena.h"

#include "config.h"

bool		abp_preloaded = false;
char	   *abp_databases = NULL;
bool		abp_enqueue = true;
int			abp_poll_interval = 60;

/*
 * aibilling_polar.databases is a list of names: refuse what is not, at the
 * server's start rather than by a worker that never comes.
 */
static bool
check_databases(char **newval, void **extra, GucSource source)
{
	char	   *copy;
	List	   *names;
	bool		valid;

	if (*newval == NULL || **newval == '\0')
		return true;

	copy = pstrdup(*newval);
	valid = SplitIdentifierString(copy, ',', &names);
	if (!valid)
		GUC_check_errdetail("Database names must be separated by commas, and quoted where needed.");

	pfree(copy);
	list_free(names);
	return valid;
}

/*
 * Define the settings.  Called once, when the library is loaded.  Without
 * preloading there is no worker, but the name of every setting is known all the
 * same: whoever sets it before they preload the library has not misspelt it.
 */
void
abp_config_init(void)
{
	abp_preloaded = process_shared_preload_libraries_in_progress;

	DefineCustomBoolVariable("aibilling_polar.enqueue",
							 gettext_noop("Puts inserted usage rows in the outbox."),
							 gettext_noop("Off loads history without sending it; honoured for the usage table's owner and superusers."),
							 &abp_enqueue,
							 true,
							 PGC_USERSET,
							 0,
							 NULL, NULL, NULL);

	DefineCustomIntVariable("aibilling_polar.poll_interval",
							gettext_noop("Sets how often an idle worker looks for rows whose wake-up it missed."),
							NULL,
							&abp_poll_interval,
							60, 1, INT_MAX / 1000,
							PGC_SIGHUP,
							GUC_UNIT_S,
							NULL, NULL, NULL);

	/*
	 * after the server's start, nothing that only its start can set is
	 * defined
	 */
	DefineCustomStringVariable("aibilling_polar.databases",
							   gettext_noop("Names the databases whose usage a background worker delivers."),
							   gettext_noop("A list of names, separated by commas; a name with capital letters or blanks is in double quotes. The library must be preloaded."),
							   &abp_databases,
							   "",
							   abp_preloaded ? PGC_POSTMASTER : PGC_SIGHUP,
							   GUC_LIST_INPUT,
							   check_databases, NULL, NULL);

	MarkGUCPrefixReserved("aibilling_polar");
}
