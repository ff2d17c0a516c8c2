/*-------------------------------------------------------------------------
 *
 * check_setup.c
 *	  aibilling.check_setup(): what must be right before usage is billed.
 *
 * One row a thing, in the order in which people set them up: is it right, what
 * is wrong, and the statement or the command of a shell that fixes it.  Each
 * thing is looked at by itself, so that one call shows all that is to do; what
 * cannot be known before another thing is right is said to be unknown.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <sys/stat.h>
#include <unistd.h>

#include "access/xlog.h"
#include "catalog/namespace.h"
#include "commands/dbcommands.h"
#include "common/username.h"
#include "executor/spi.h"
#include "fmgr.h"
#include "foreign/foreign.h"
#include "funcapi.h"
#include "lib/stringinfo.h"
#include "miscadmin.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"
#include "utils/varlena.h"

#include "base/extension.h"
#include "base/idset.h"
#include "base/rights.h"
#include "compat.h"
#include "config.h"
#include "polar/limits.h"
#include "polar/server.h"
#include "polar/token.h"
#include "polar/verdict.h"
#include "queue/attachment.h"
#include "queue/entry.h"
#include "queue/ledger.h"
#include "queue/outbox.h"
#include "queue/wake.h"
#include "ship/http.h"
#include "sql/status.h"
#include "usage/attach.h"
#include "usage/row.h"

/* How long Polar may take to answer. */
#define MAX_TIMEOUT_MS 10000

/* How long after the server's start a worker may not be there yet. */
#define WORKER_START_MS 5000

#define DEFAULT_TOKEN_FILE "/etc/postgresql/polar.token"

PG_FUNCTION_INFO_V1(abp_sql_check_setup);

typedef enum Answer
{
	WRONG,
	RIGHT,
	UNKNOWN
} Answer;

typedef struct Setup
{
	ReturnSetInfo *result;
	int			step;
	bool		armed;
	List	   *tables;			/* of UsageTable: those that the caller may
								 * operate */
	List	   *servers;		/* of ServerOptions: those that the caller may
								 * use */
} Setup;

/*
 * Put the next row.  wrong and fix are NULL where there is nothing to say; what
 * is unknown has in "wrong" why.
 */
static void
put(Setup *setup, char *item, Answer answer, const char *wrong, const char *fix)
{
	Datum		values[5] = {
		Int32GetDatum(++setup->step), CStringGetTextDatum(item), BoolGetDatum(answer == RIGHT)
	};
	bool		nulls[5] = {false, false, answer == UNKNOWN, wrong == NULL, fix == NULL};

	if (wrong != NULL)
		values[3] = CStringGetTextDatum(wrong);
	if (fix != NULL)
		values[4] = CStringGetTextDatum(fix);
	tuplestore_putvalues(setup->result->setResult, setup->result->setDesc, values, nulls);
}

/* --- words and commands ------------------------------------------------------- */

/* A word of a shell's command, quoted where it must be. */
static char *
shell_word(const char *word)
{
	StringInfoData quoted;

	if (*word != '\0' &&
		strspn(word, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_/.:-") == strlen(word))
		return pstrdup(word);
	initStringInfo(&quoted);
	appendStringInfoChar(&quoted, '\'');
	for (const char *p = word; *p != '\0'; p++)
	{
		if (*p == '\'')
			appendStringInfoString(&quoted, "'\\''");
		else
			appendStringInfoChar(&quoted, *p);
	}
	appendStringInfoChar(&quoted, '\'');
	return quoted.data;
}

/* The operating system user of the server. */
static const char *
server_user(void)
{
	char	   *error;
	const char *name = get_user_name(&error);

	return name != NULL ? name : "postgres";
}

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
						pnstrdup(cluster, slash - cluster), shell_word(slash + 1));
	strlcpy(program, my_exec_path, sizeof(program));
	get_parent_directory(program);
	strlcat(program, "/pg_ctl", sizeof(program));
	return psprintf("sudo -u %s %s restart -D %s", shell_word(server_user()), shell_word(program),
					shell_word(DataDir));
}

/* The command that writes a token file: paste the token, Enter, Ctrl-D. */
static char *
write_token_command(const char *path)
{
	const char *word = shell_word(path);

	return psprintf("sudo sh -c %s",
					shell_word(psprintf("umask 077; cat > %s; chown %s %s", word,
										shell_word(server_user()), word)));
}

#define PASTE_TOKEN "; run the command, paste an organization access token of Polar that has the scope events:write, press Enter and Ctrl-D"

/* The first column of the first row of a query as the extension's owner, or NULL. */
static char *
ask(const char *query, int nargs, Oid *types, Datum *args)
{
	MemoryContext caller = CurrentMemoryContext;
	SavedUser	saved;
	char	   *value = NULL;

	abp_become_extension_owner(&saved);
	SPI_connect();
	if (SPI_execute_with_args(query, nargs, types, args, NULL, true, 1) == SPI_OK_SELECT &&
		SPI_processed > 0)
		value = SPI_getvalue(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1);
	if (value != NULL)
		value = MemoryContextStrdup(caller, value);
	SPI_finish();
	abp_restore_user(&saved);
	return value;
}

static char *
ask_of_text(const char *query, const char *argument)
{
	Oid			type = TEXTOID;
	Datum		arg = CStringGetTextDatum(argument);

	return ask(query, 1, &type, &arg);
}

/* What the configuration's files say of a setting now, or NULL. */
static char *
setting_in_files(const char *name)
{
	return ask_of_text("SELECT setting FROM pg_catalog.pg_file_settings WHERE name OPERATOR(pg_catalog.=) $1"
					   " ORDER BY seqno DESC LIMIT 1", name);
}

static bool
is_from_command_line(const char *name)
{
	char	   *source = ask_of_text("SELECT source FROM pg_catalog.pg_settings WHERE name OPERATOR(pg_catalog.=) $1", name);

	return source != NULL && strcmp(source, "command line") == 0;
}

#define FOR_SUPERUSERS "only a superuser sees and fixes it: let one call aibilling.check_setup()"

/* --- the worker --------------------------------------------------------------- */

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
		put(setup, item, RIGHT, NULL, NULL);
		return;
	}
	if (!superuser())
	{
		put(setup, item, WRONG, "shared_preload_libraries does not name aibilling_polar; " FOR_SUPERUSERS, NULL);
		return;
	}
	libraries = setting_in_files("shared_preload_libraries");
	if (names_library(libraries))
	{
		/* one restart is enough for both */
		if (names_database(setting_in_files("aibilling_polar.databases")))
			put(setup, item, WRONG, "shared_preload_libraries names it, and the server has not been restarted since",
				restart_command());
		else
			put(setup, item, UNKNOWN, "shared_preload_libraries names it: restart the server once the next thing is right", NULL);
		return;
	}
	if (is_from_command_line("shared_preload_libraries"))
	{
		put(setup, item, WRONG, "shared_preload_libraries is set on the server's command line and does not name aibilling_polar; add it there and restart",
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
	put(setup, item, WRONG, "shared_preload_libraries does not name aibilling_polar, so there is no worker", fix.data);
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

static void
check_database(Setup *setup)
{
	char	   *item = "the database has a worker's place";
	char	   *wrong = psprintf("aibilling_polar.databases does not name \"%s\"",
								 get_database_name(MyDatabaseId));
	char	   *databases;

	if (abp_preloaded && abp_database_is_listed(false))
	{
		put(setup, item, RIGHT, NULL, NULL);
		return;
	}
	if (!superuser())
	{
		put(setup, item, WRONG, psprintf("%s; %s", wrong, FOR_SUPERUSERS), NULL);
		return;
	}
	databases = setting_in_files("aibilling_polar.databases");
	if (names_database(databases))
	{
		/* without the library, that is what the row above tells to do */
		put(setup, item, abp_preloaded ? WRONG : UNKNOWN,
			"aibilling_polar.databases names it, and the server has not been restarted since",
			restart_command());
		return;
	}
	if (is_from_command_line("aibilling_polar.databases"))
	{
		put(setup, item, WRONG,
			psprintf("%s; it is set on the server's command line (the image takes it from AIBILLING_DATABASES): change it there and restart",
					 wrong), NULL);
		return;
	}
	if (abp_database_is_listed(true))
		wrong = psprintf("%s: a name with capital letters is written in double quotes there", wrong);

	/*
	 * where the library is not preloaded, another session may not know the
	 * name
	 */
	put(setup, item, WRONG, wrong,
		psprintf("%sALTER SYSTEM SET aibilling_polar.databases = %s;",
				 abp_preloaded ? "" : "LOAD 'aibilling_polar';\n",
				 quote_literal_cstr(list_with_this_database(databases))));
}

static void
check_worker(Setup *setup)
{
	char	   *item = "the worker runs";
	char	   *error;
	char	   *slots;
	List	   *names = NIL;
	int			wanted;

	if (abp_wake_worker_pid() != 0)
	{
		put(setup, item, RIGHT, NULL, NULL);
		return;
	}
	if (!abp_preloaded || !abp_database_is_listed(false))
	{
		put(setup, item, UNKNOWN, "comes with the two things above; until then, deliver with CALL aibilling.sync()", NULL);
		return;
	}
	if (RecoveryInProgress())
	{
		put(setup, item, UNKNOWN, "this server is a standby: the worker runs on the primary", NULL);
		return;
	}
	error = abp_wake_worker_error(get_database_name(MyDatabaseId));
	if (error != NULL)
	{
		put(setup, item, WRONG, psprintf("it has ended with an error and starts again every second; the server's log has more: %s", error), NULL);
		return;
	}
	if (!TimestampDifferenceExceeds(PgStartTime, GetCurrentTimestamp(), WORKER_START_MS))
	{
		put(setup, item, UNKNOWN, "the server has just been started: look again in a moment", NULL);
		return;
	}
	if (!superuser())
	{
		put(setup, item, WRONG, "max_worker_processes is too low; " FOR_SUPERUSERS, NULL);
		return;
	}
	(void) SplitIdentifierString(pstrdup(abp_databases), ',', &names);
	wanted = max_worker_processes + list_length(names);
	slots = setting_in_files("max_worker_processes");
	if (slots != NULL && pg_strtoint32(slots) > max_worker_processes)
		put(setup, item, WRONG, "max_worker_processes was raised, and the server has not been restarted since",
			restart_command());
	else
		put(setup, item, WRONG, psprintf("max_worker_processes is %d, and other workers have all of these places",
										 max_worker_processes),
			psprintf("ALTER SYSTEM SET max_worker_processes = %d;", wanted));
}

/* --- prices and servers -------------------------------------------------------- */

static void
check_prices(Setup *setup)
{
	char	   *item = "there are prices";

	if (ask("SELECT 1 FROM aibilling.price LIMIT 1", 0, NULL, NULL) != NULL)
		put(setup, item, RIGHT, NULL, NULL);
	else
		put(setup, item, WRONG, "aibilling.price is empty: rows wait for a price, but for those with a provider_cost",
			"SELECT aibilling.load_bundled_prices();");
}

/* The servers of kind 'polar' that the caller may use. */
static List *
usable_servers(void)
{
	MemoryContext caller = CurrentMemoryContext;
	List	   *oids = NIL;
	List	   *servers = NIL;
	SavedUser	saved;
	ListCell   *lc;

	abp_become_extension_owner(&saved);
	SPI_connect();
	SPI_execute("SELECT s.oid FROM pg_catalog.pg_foreign_server s"
				" JOIN pg_catalog.pg_depend d ON d.classid OPERATOR(pg_catalog.=) 'pg_catalog.pg_foreign_data_wrapper'::pg_catalog.regclass"
				"  AND d.objid OPERATOR(pg_catalog.=) s.srvfdw AND d.deptype OPERATOR(pg_catalog.=) 'e'"
				" JOIN pg_catalog.pg_extension e ON e.oid OPERATOR(pg_catalog.=) d.refobjid"
				"  AND e.extname OPERATOR(pg_catalog.=) 'aibilling_polar'"
				" ORDER BY s.srvname", true, 0);
	for (uint64 i = 0; i < SPI_processed; i++)
	{
		bool		isnull;
		MemoryContext old = MemoryContextSwitchTo(caller);

		oids = lappend_oid(oids, DatumGetObjectId(SPI_getbinval(SPI_tuptable->vals[i],
																SPI_tuptable->tupdesc, 1, &isnull)));
		MemoryContextSwitchTo(old);
	}
	SPI_finish();
	abp_restore_user(&saved);

	foreach(lc, oids)
	{
		if (abp_server_aclcheck(lfirst_oid(lc), GetUserId()) == ACLCHECK_OK)
		{
			const ServerOptions *server = abp_server_options(lfirst_oid(lc));

			if (server->kind == SERVER_POLAR)
				servers = lappend(servers, unconstify(ServerOptions *, server));
		}
	}
	return servers;
}

static void
check_servers(Setup *setup)
{
	char	   *item = "there is a server to deliver to";

	if (setup->servers != NIL)
		put(setup, item, RIGHT, NULL, NULL);
	else
		put(setup, item, WRONG,
			superuser() ? "no server says where events go" :
			"no server that you may use says where events go; ask for GRANT USAGE ON FOREIGN SERVER, or let a superuser create one",
			"CREATE SERVER polar FOREIGN DATA WRAPPER polar"
			" OPTIONS (environment 'sandbox', event_name 'llm_usage', access_token_file '" DEFAULT_TOKEN_FILE "');");
}

/* The user mapping that holds for a role, as a statement names it. */
static const char *
mapping_of(const ServerOptions *server, Oid role)
{
	const char *whose = OidIsValid(role) && abp_token_is_mapped(server->serverid, role) ?
	quote_identifier(GetUserNameFromId(role, false)) : "PUBLIC";

	return psprintf("USER MAPPING FOR %s SERVER %s", whose, quote_identifier(server->name));
}

static bool
is_mapped(const ServerOptions *server, Oid role)
{
	return abp_token_is_mapped(server->serverid, InvalidOid) ||
		(OidIsValid(role) && abp_token_is_mapped(server->serverid, role));
}

/* What lets the server read a token that it cannot read. */
static char *
fix_of_token(const ServerOptions *server, Oid role)
{
	const char *path = server->access_token_file;
	struct stat st;

	if (path == NULL)
		return is_mapped(server, role) ?
			psprintf("ALTER %s OPTIONS (ADD access_token 'polar_oat_...');", mapping_of(server, role)) :
			psprintf("ALTER SERVER %s OPTIONS (ADD access_token_file '%s');",
					 quote_identifier(server->name), DEFAULT_TOKEN_FILE);
	if (is_mapped(server, role))
		return psprintf("DROP %s;", mapping_of(server, role));
	if (stat(path, &st) != 0)
		return write_token_command(path);
	if (!S_ISREG(st.st_mode))
		return psprintf("sudo mv %s %s", shell_word(path), shell_word(psprintf("%s.old", path)));
	if (st.st_uid != geteuid())
		return psprintf("sudo chown %s %s && sudo chmod 0600 %s", shell_word(server_user()),
						shell_word(path), shell_word(path));
	if ((st.st_mode & (S_IRWXG | S_IRWXO)) != 0 || (st.st_mode & S_IRUSR) == 0)
		return psprintf("sudo chmod 0600 %s", shell_word(path));
	return write_token_command(path);
}

/* What replaces a token that Polar refuses. */
static char *
fix_of_refusal(const ServerOptions *server, Oid role)
{
	return server->access_token_file != NULL ? write_token_command(server->access_token_file) :
		psprintf("ALTER %s OPTIONS (SET access_token 'polar_oat_...');", mapping_of(server, role));
}

/*
 * Send a request without events, which stores nothing.  NULL: the server was
 * not reached, and *error says why; otherwise *status is that of HTTP.
 */
static Verdict *
try_token(const ServerOptions *server, const char *token, char **error, long *status)
{
	static const char nothing[] = "{\"events\": []}";
	HttpTarget	target = {
		.url = psprintf("%s%s", server->url, POLAR_INGEST_PATH),
		.ca_file = server->ca_file,
		.proxy = server->proxy,
		.timeout_ms = Min(server->timeout_ms, MAX_TIMEOUT_MS)
	};
	Verdict    *volatile verdict = NULL;

	PG_TRY();
	{
		HttpRequest *request = abp_http_post(&target, token, nothing, strlen(nothing));
		const HttpReply *reply;

		while (abp_http_next_finished() != request)
			(void) abp_http_wait(-1);
		reply = abp_http_reply(request);
		if (reply->outcome == HTTP_ANSWERED)
		{
			*status = reply->status;
			verdict = abp_verdict_of(reply->status, reply->body, reply->body_len, reply->truncated,
									 reply->retry_after, 0, GetCurrentTimestamp());
		}
		else
			*error = pstrdup(reply->error);
		abp_http_release(request);
	}
	PG_FINALLY();
	{
		abp_http_cancel_all();
	}
	PG_END_TRY();
	return verdict;
}

/* What to do where a server is not reached, or is not Polar. */
static char *
fix_of_address(const ServerOptions *server, const char *error)
{
	const char *host = strstr(server->url, "://");

	if (host != NULL && error != NULL && strstr(error, "name look-up") != NULL)
		return psprintf("getent hosts %s", shell_word(pnstrdup(host + 3, strcspn(host + 3, ":/"))));
	return psprintf("curl -v %s%s", shell_word(server->url), POLAR_INGEST_PATH);
}

static void
check_answer(Setup *setup, const ServerOptions *server, Oid role, const char *token, char *item)
{
	char	   *error = NULL;
	long		status = 0;
	Verdict    *verdict = try_token(server, token, &error, &status);

	if (verdict == NULL)
		put(setup, item, WRONG,
			psprintf("%s was not reached: %s; see whether the command does better on this machine; if it is a proxy that is needed, ALTER SERVER ... OPTIONS (ADD proxy ...)",
					 server->url, error), fix_of_address(server, error));
	else if (verdict->kind == VERDICT_DELIVERED)
		put(setup, item, RIGHT, NULL, NULL);
	else if (verdict->kind == VERDICT_RATE_LIMITED)
		put(setup, item, UNKNOWN, psprintf("too many requests just now, look again in a minute: %s", verdict->error), NULL);
	else if (status == 401 || status == 403)
		put(setup, item, WRONG, psprintf("%s%s", verdict->error,
										 server->access_token_file != NULL ? PASTE_TOKEN : ""),
			fix_of_refusal(server, role));
	else
		put(setup, item, WRONG, verdict->error, fix_of_address(server, NULL));
}

/*
 * A server's token: that of a role with a user mapping of its own, or
 * InvalidOid: the one that all others share.  Tried only for whoever may set it.
 */
static void
check_token(Setup *setup, const ServerOptions *server, Oid role)
{
	const char *of = OidIsValid(role) ?
	psprintf("server %s, token of role %s", server->name, GetUserNameFromId(role, false)) :
	psprintf("server %s", server->name);
	char	   *readable = psprintf("%s: the token can be read", of);
	char	   *accepted = psprintf("%s: Polar accepts the token", of);
	StringInfoData reason;
	char	   *token;

	if (!superuser() && !(OidIsValid(role) ? has_privs_of_role(GetUserId(), role) :
						  abp_owns_server(server->serverid, GetUserId())))
	{
		put(setup, readable, UNKNOWN, "only the server's owner and superusers may try its token", NULL);
		return;
	}

	initStringInfo(&reason);
	token = abp_token_read(server, role, &reason);
	if (token == NULL)
	{
		char	   *fix = fix_of_token(server, role);

		put(setup, readable, WRONG,
			psprintf("%s%s", reason.data, strstr(fix, "cat > ") != NULL ? PASTE_TOKEN : ""), fix);
		put(setup, accepted, UNKNOWN, "known once the token can be read", NULL);
		return;
	}
	put(setup, readable, RIGHT, NULL, NULL);
	PG_TRY();
	{
		check_answer(setup, server, role, token, accepted);
	}
	PG_FINALLY();
	{
		abp_token_forget(token);
	}
	PG_END_TRY();
}

static void
check_tokens(Setup *setup)
{
	ListCell   *lc;

	foreach(lc, setup->servers)
	{
		const ServerOptions *server = lfirst(lc);
		List	   *roles = NIL;
		ListCell   *other;

		CHECK_FOR_INTERRUPTS();
		foreach(other, setup->tables)
		{
			UsageTable *table = lfirst(other);

			if (table->serverid == server->serverid)
				roles = list_append_unique_oid(roles, table->role);
		}
		/* nothing is attached yet: the one who will attach something */
		if (roles == NIL)
			roles = list_make1_oid(abp_token_is_mapped(server->serverid, GetUserId()) ?
								   GetUserId() : InvalidOid);
		foreach(other, roles)
			check_token(setup, server, lfirst_oid(other));
	}
}

/* --- usage tables -------------------------------------------------------------- */

static void
check_armed(Setup *setup)
{
	char	   *item = "the database may send";

	if (setup->armed)
		put(setup, item, RIGHT, NULL, NULL);
	else if (abp_database_standing() == DATABASE_SUBSCRIBER)
		put(setup, item, WRONG, "a subscription brings another database's outbox here, which is that one's to send; drop the subscription, or take schema aibilling out of the publication, before",
			"SELECT aibilling.arm();");
	else
		put(setup, item, WRONG, "it is a copy of another one, or was restored; if it is the one that is to bill customers",
			"SELECT aibilling.arm();");
}

static void
check_attached(Setup *setup)
{
	char	   *item = "a usage table is attached";
	const char *server = setup->servers == NIL ? "polar" :
	((const ServerOptions *) linitial(setup->servers))->name;
	Oid			same = RelnameGetRelid("usage");

	if (setup->tables != NIL)
		put(setup, item, RIGHT, NULL, NULL);
	else if (OidIsValid(same) && abp_owns_table(same, GetUserId()))
		put(setup, item, WRONG, "none is that you own; there is a table \"usage\"",
			psprintf("SELECT aibilling.attach('usage', server => %s);", quote_literal_cstr(server)));
	else
		put(setup, item, WRONG, "none is that you own",
			psprintf("SELECT aibilling.create_usage_table('usage', server => %s);", quote_literal_cstr(server)));
}

/* Does something stop a table's delivery until somebody does something? */
static void
check_table(Setup *setup, const UsageTable *table)
{
	char	   *item = psprintf("usage table %s: nothing stops its delivery", table->name);
	char	   *resume = psprintf("SELECT aibilling.resume(%s);", quote_literal_cstr(table->server));
	char	   *faults = abp_row_columns_faults(table->relid);

	if (!OidIsValid(table->serverid))
		put(setup, item, WRONG, psprintf("its server \"%s\" does not exist any more", table->server),
			psprintf("SELECT aibilling.attach(%s, server => %s);", quote_literal_cstr(table->name),
					 quote_literal_cstr(setup->servers == NIL ? "polar" :
										((const ServerOptions *) linitial(setup->servers))->name)));
	else if (*faults != '\0')
		put(setup, item, WRONG, faults, NULL);
	else if (abp_ids_may_repeat(table->relid))
		put(setup, item, WRONG, "nothing keeps two of its rows from having the same id",
			psprintf("ALTER TABLE %s ADD UNIQUE (id);", table->name));
	else if (table->paused_by_operator || table->paused_by_answer)
		put(setup, item, WRONG, psprintf("paused: %s", table->pause_reason), resume);
	else if (table->blocked_reason != NULL)
		put(setup, item, WRONG, psprintf("blocked: %s", table->blocked_reason), resume);
	else if (table->not_before > GetCurrentTimestamp())
		put(setup, item, WRONG, psprintf("waits until %s after %d failures: %s",
										 timestamptz_to_str(table->not_before), table->failures,
										 table->pause_reason), resume);
	else
		put(setup, item, RIGHT, NULL, NULL);
}

/* The reason and the fix of a table's first row in a state, or false if it has none. */
static bool
first_waiting(const UsageTable *table, const char *state, char **reason, char **fix)
{
	Oid			types[2] = {REGCLASSOID, TEXTOID};
	Datum		args[2] = {ObjectIdGetDatum(table->relid), CStringGetTextDatum(state)};

	*reason = ask("SELECT pg_catalog.format('row %s: %s', usage_id, error) FROM aibilling.outbox"
				  " WHERE usage_table OPERATOR(pg_catalog.=) $1 AND state OPERATOR(pg_catalog.=) $2"
				  " ORDER BY usage_id LIMIT 1", 2, types, args);
	if (*reason == NULL)
		return false;
	*fix = psprintf("SELECT * FROM aibilling.%s WHERE usage_table = %s::regclass%s;",
					strcmp(state, "unpriced") == 0 ? "unpriced" : "outbox",
					quote_literal_cstr(table->name),
					strcmp(state, "unpriced") == 0 ? "" : " AND state = 'rejected'");
	return true;
}

static void
check_first_row(Setup *setup, const UsageTable *table)
{
	char	   *item = psprintf("usage table %s: a row of it is delivered", table->name);
	LedgerTotals totals;
	char	   *reason;
	char	   *fix;

	abp_ledger_totals(table->relid, &totals);
	if (totals.delivered > 0)
		put(setup, item, RIGHT, NULL, NULL);
	else if (totals.in_flight > 0 || abp_outbox_peek(table->relid, OUTBOX_READY, 1).nranges > 0)
		put(setup, item, WRONG, "rows wait for what is wrong above, or are on their way", "CALL aibilling.sync();");
	else if (first_waiting(table, "rejected", &reason, &fix))
		put(setup, item, WRONG, psprintf("rejected; UPDATE the row, which is checked again then; %s", reason), fix);
	else if (first_waiting(table, "unpriced", &reason, &fix))
		put(setup, item, WRONG, psprintf("there is no price; the hint says what to do; %s", reason), fix);
	else
		put(setup, item, WRONG, "no row has been inserted since it was attached; this one costs nothing, and no meter counts its event",
			psprintf("INSERT INTO %s (event_name, external_customer_id, provider_cost) VALUES ('check_setup', 'check_setup', 0);",
					 table->name));
}

/*
 * aibilling.check_setup(): one row a thing that must be right.  See the top of
 * this file.
 */
Datum
abp_sql_check_setup(PG_FUNCTION_ARGS)
{
	Setup		setup = {.result = (ReturnSetInfo *) fcinfo->resultinfo};
	List	   *all;
	ListCell   *lc;

	/* The shipper calls users' functions while requests of its own fly. */
	if (InSecurityRestrictedOperation())
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("cannot check the setup within security-restricted operation")));
	abp_extension_check_version();
	InitMaterializedSRF(fcinfo, 0);

	all = abp_attachments(&setup.armed);
	foreach(lc, all)
	{
		UsageTable *table = lfirst(lc);

		if (OidIsValid(table->owner) && abp_owns_table(table->relid, GetUserId()))
			setup.tables = lappend(setup.tables, table);
	}
	setup.servers = usable_servers();

	check_library(&setup);
	check_database(&setup);
	check_worker(&setup);
	check_prices(&setup);
	check_servers(&setup);
	check_tokens(&setup);
	check_armed(&setup);
	check_attached(&setup);
	foreach(lc, setup.tables)
	{
		check_table(&setup, lfirst(lc));
		check_first_row(&setup, lfirst(lc));
	}
	return (Datum) 0;
}
