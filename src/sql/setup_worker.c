/*-------------------------------------------------------------------------
 *
 * setup_worker.c
 *	  check_setup(): is there a worker, and what of the configuration keeps it away?
 *
 * What is set and what is in force differ until the server is restarted: the
 * configuration is looked at as it is in its files, too.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xlog.h"
#include "commands/dbcommands.h"
#include "lib/stringinfo.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/timestamp.h"
#include "utils/varlena.h"

#include "config.h"
#include "queue/wake.h"
#include "sql/setup.h"
#include "sql/status.h"

/* How long after the server's start a worker may not be there yet. */
#define WORKER_START_MS 5000

#define FOR_SUPERUSERS "only a superuser sees and fixes it: let one call aibilling.check_setup()"

/*
 * The command that restarts the server: Debian's, where its clusters have the
 * names that Debian gives them.
 */
static char *
restart_command(void)
{
	const char *cluster = GetConfigOption("cluster_name", true, false);
	const char *slash = cluster != NULL ? strchr(cluster, '/') : NULL;
	char		program[MAXPGPATH];

	if (PostmasterPid == 1)
		return pstrdup("restart the container");
	if (slash != NULL && strspn(cluster, "0123456789") == slash - cluster && slash[1] != '\0')
		return psprintf("sudo pg_ctlcluster %s %s restart",
						pnstrdup(cluster, slash - cluster), abp_setup_shell_word(slash + 1));
	strlcpy(program, my_exec_path, sizeof(program));
	get_parent_directory(program);
	strlcat(program, "/pg_ctl", sizeof(program));
	return psprintf("sudo -u %s %s restart -D %s", abp_setup_shell_word(abp_setup_server_user()), abp_setup_shell_word(program),
					abp_setup_shell_word(DataDir));
}

/* Ask with one text as the parameter; see abp_setup_ask. */
static char *
ask_of_text(const char *query, const char *argument)
{
	Oid			type = TEXTOID;
	Datum		arg = CStringGetTextDatum(argument);

	return abp_setup_ask(query, 1, &type, &arg);
}

/* What the configuration's files say of a setting now, or NULL. */
static char *
setting_in_files(const char *name)
{
	return ask_of_text("SELECT setting FROM pg_catalog.pg_file_settings WHERE name OPERATOR(pg_catalog.=) $1"
					   " ORDER BY seqno DESC LIMIT 1", name);
}

/*
 * Is a setting given on the command line, where ALTER SYSTEM cannot change it?
 */
static bool
is_from_command_line(const char *name)
{
	char	   *source = ask_of_text("SELECT source FROM pg_catalog.pg_settings WHERE name OPERATOR(pg_catalog.=) $1", name);

	return source != NULL && strcmp(source, "command line") == 0;
}

/* Does a list of libraries name this one? */
static bool
names_library(const char *libraries)
{
	List	   *names;
	ListCell   *lc;

	if (libraries == NULL || !SplitDirectoriesString(pstrdup(libraries), ',', &names))
		return false;
	foreach(lc, names)
	{
		const char *slash = strrchr(lfirst(lc), '/');

		if (strcmp(slash != NULL ? slash + 1 : lfirst(lc), "aibilling_polar") == 0)
			return true;
	}
	return false;
}

/* Does a list of databases name this one? */
static bool
names_database(const char *databases)
{
	List	   *names;
	ListCell   *lc;

	if (databases == NULL || !SplitIdentifierString(pstrdup(databases), ',', &names))
		return false;
	foreach(lc, names)
	{
		if (strcmp(lfirst(lc), get_database_name(MyDatabaseId)) == 0)
			return true;
	}
	return false;
}

/*
 * Is the library preloaded?  If not, it must be listed, or the server
 * restarted.
 */
static void
check_library(Setup *setup)
{
	char	   *item = "the library is preloaded";
	const char *libraries;
	List	   *names = NIL;
	ListCell   *lc;
	StringInfoData fix;

	if (abp_preloaded)
	{
		abp_setup_put(setup, item, SETUP_RIGHT, NULL, NULL);
		return;
	}
	if (!superuser())
	{
		abp_setup_put(setup, item, SETUP_WRONG, "shared_preload_libraries does not name aibilling_polar; " FOR_SUPERUSERS, NULL);
		return;
	}
	libraries = setting_in_files("shared_preload_libraries");
	if (names_library(libraries))
	{
		/* one restart is enough for both */
		if (names_database(setting_in_files("aibilling_polar.databases")))
			abp_setup_put(setup, item, SETUP_WRONG, "shared_preload_libraries names it, and the server has not been restarted since",
						  restart_command());
		else
			abp_setup_put(setup, item, SETUP_UNKNOWN, "shared_preload_libraries names it: restart the server once the next thing is right", NULL);
		return;
	}
	if (is_from_command_line("shared_preload_libraries"))
	{
		abp_setup_put(setup, item, SETUP_WRONG, "shared_preload_libraries is set on the server's command line and does not name aibilling_polar; add it there and restart",
					  NULL);
		return;
	}

	initStringInfo(&fix);
	appendStringInfoString(&fix, "ALTER SYSTEM SET shared_preload_libraries = ");
	if (libraries != NULL && SplitDirectoriesString(pstrdup(libraries), ',', &names))
	{
		foreach(lc, names)
			appendStringInfo(&fix, "%s, ", quote_literal_cstr(lfirst(lc)));
	}
	appendStringInfoString(&fix, "'aibilling_polar';");
	abp_setup_put(setup, item, SETUP_WRONG, "shared_preload_libraries does not name aibilling_polar, so there is no worker", fix.data);
}

/* A list of databases with this one in it, and without what was meant to be this one. */
static char *
list_with_this_database(const char *databases)
{
	const char *mine = get_database_name(MyDatabaseId);
	StringInfoData list;
	List	   *names = NIL;
	ListCell   *lc;

	initStringInfo(&list);
	if (databases != NULL)
		(void) SplitIdentifierString(pstrdup(databases), ',', &names);
	foreach(lc, names)
	{
		if (pg_strcasecmp(lfirst(lc), mine) != 0 || OidIsValid(get_database_oid(lfirst(lc), true)))
			appendStringInfo(&list, "%s, ", quote_identifier(lfirst(lc)));
	}
	appendStringInfoString(&list, quote_identifier(mine));
	return list.data;
}

/*
 * Has the database a worker's place?  If not, it must be listed, or the server
 * restarted.
 */
static void
check_database(Setup *setup)
{
	char	   *item = "the database has a worker's place";
	char	   *wrong = psprintf("aibilling_polar.databases does not name \"%s\"",
								 get_database_name(MyDatabaseId));
	char	   *databases;

	if (abp_preloaded && abp_status_lists_database(false))
	{
		abp_setup_put(setup, item, SETUP_RIGHT, NULL, NULL);
		return;
	}
	if (!superuser())
	{
		abp_setup_put(setup, item, SETUP_WRONG, psprintf("%s; %s", wrong, FOR_SUPERUSERS), NULL);
		return;
	}
	databases = setting_in_files("aibilling_polar.databases");
	if (names_database(databases))
	{
		/* without the library, that is what the row above tells to do */
		abp_setup_put(setup, item, abp_preloaded ? SETUP_WRONG : SETUP_UNKNOWN,
					  "aibilling_polar.databases names it, and the server has not been restarted since",
					  restart_command());
		return;
	}
	if (is_from_command_line("aibilling_polar.databases"))
	{
		abp_setup_put(setup, item, SETUP_WRONG,
					  psprintf("%s; it is set on the server's command line (the image takes it from AIBILLING_DATABASES): change it there and restart",
							   wrong), NULL);
		return;
	}
	if (abp_status_lists_database(true))
		wrong = psprintf("%s: a name with capital letters is written in double quotes there", wrong);

	/*
	 * where the library is not preloaded, another session may not know the
	 * name
	 */
	abp_setup_put(setup, item, SETUP_WRONG, wrong,
				  psprintf("%sALTER SYSTEM SET aibilling_polar.databases = %s;",
						   abp_preloaded ? "" : "LOAD 'aibilling_polar';\n",
						   quote_literal_cstr(list_with_this_database(databases))));
}

/*
 * Does the worker run?  If not: an error that ends it, one of the things
 * above, a standby, or no place for one more process.
 */
static void
check_worker(Setup *setup)
{
	char	   *item = "the worker runs";
	char	   *error;
	char	   *slots;
	List	   *names = NIL;
	int			wanted;

	/* one that ends again and again may be there just now */
	error = abp_wake_worker_error(get_database_name(MyDatabaseId));
	if (error != NULL)
	{
		abp_setup_put(setup, item, SETUP_WRONG,
					  psprintf("it has ended with an error, of which the server's log has more, and starts again every second; the statement shows whether the cause is gone: %s", error),
					  "CALL aibilling.sync();");
		return;
	}
	if (abp_wake_worker_pid() != 0)
	{
		abp_setup_put(setup, item, SETUP_RIGHT, NULL, NULL);
		return;
	}
	if (!abp_preloaded || !abp_status_lists_database(false))
	{
		abp_setup_put(setup, item, SETUP_UNKNOWN, "comes with the two things above; until then, deliver with CALL aibilling.sync()", NULL);
		return;
	}
	if (RecoveryInProgress())
	{
		abp_setup_put(setup, item, SETUP_UNKNOWN, "this server is a standby: the worker runs on the primary", NULL);
		return;
	}
	if (!TimestampDifferenceExceeds(PgStartTime, GetCurrentTimestamp(), WORKER_START_MS))
	{
		abp_setup_put(setup, item, SETUP_UNKNOWN, "the server has just been started: look again in a moment", NULL);
		return;
	}
	if (!superuser())
	{
		abp_setup_put(setup, item, SETUP_WRONG, "max_worker_processes is too low; " FOR_SUPERUSERS, NULL);
		return;
	}
	(void) SplitIdentifierString(pstrdup(abp_databases), ',', &names);
	wanted = max_worker_processes + list_length(names);
	slots = setting_in_files("max_worker_processes");
	if (slots != NULL && pg_strtoint32(slots) > max_worker_processes)
		abp_setup_put(setup, item, SETUP_WRONG, "max_worker_processes was raised, and the server has not been restarted since",
					  restart_command());
	else
		abp_setup_put(setup, item, SETUP_WRONG, psprintf("max_worker_processes is %d, and other workers have all of these places",
														 max_worker_processes),
					  psprintf("ALTER SYSTEM SET max_worker_processes = %d;", wanted));
}

/*
 * The library, the database's place, and the worker itself.
 */
void
abp_setup_check_worker(Setup *setup)
{
	check_library(setup);
	check_database(setup);
	check_worker(setup);
}
