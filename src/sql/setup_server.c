/*-------------------------------------------------------------------------
 *
 * setup_server.c
 *	  check_setup(): where events go, the token, and what Polar says to it.
 *
 * A request without events asks, and stores nothing.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <sys/stat.h>
#include <unistd.h>

#include "foreign/foreign.h"
#include "lib/stringinfo.h"
#include "miscadmin.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

#include "base/statement.h"
#include "compat.h"
#include "polar/limits.h"
#include "polar/server.h"
#include "polar/token.h"
#include "polar/verdict.h"
#include "queue/attachment.h"
#include "ship/http.h"
#include "sql/setup.h"

/* How long Polar may take to answer. */
#define MAX_TIMEOUT_MS 10000

#define DEFAULT_TOKEN_FILE "/etc/postgresql/polar.token"

#define PASTE_TOKEN "; run the command, paste an organization access token of Polar that has the scope events:write, press Enter and Ctrl-D"

/* The command that writes a token file: paste the token, Enter, Ctrl-D. */
static char *
write_token_command(const char *path)
{
	const char *word = abp_setup_shell_word(path);

	return psprintf("sudo sh -c %s",
					abp_setup_shell_word(psprintf("umask 077; cat > %s; chown %s %s", word,
												  abp_setup_shell_word(abp_setup_server_user()), word)));
}

/*
 * The servers of kind 'polar' that the caller may use, as a list of
 * ServerOptions.
 */
List	   *
abp_setup_servers(void)
{
	static Statement find = {
		"SELECT s.oid FROM pg_catalog.pg_foreign_server s"
		" JOIN pg_catalog.pg_depend d ON d.classid OPERATOR(pg_catalog.=) 'pg_catalog.pg_foreign_data_wrapper'::pg_catalog.regclass"
		"  AND d.objid OPERATOR(pg_catalog.=) s.srvfdw AND d.deptype OPERATOR(pg_catalog.=) 'e'"
		" JOIN pg_catalog.pg_extension e ON e.oid OPERATOR(pg_catalog.=) d.refobjid"
		"  AND e.extname OPERATOR(pg_catalog.=) 'aibilling_polar'"
		" ORDER BY s.srvname",
		0, {0}, true
	};
	uint64		nrows;
	MemoryContext caller = CurrentMemoryContext;
	List	   *oids = NIL;
	List	   *servers = NIL;
	SavedUser	saved;
	ListCell   *lc;

	nrows = abp_statement_open(&find, NULL, NULL, &saved);
	for (uint64 i = 0; i < nrows; i++)
	{
		MemoryContext old = MemoryContextSwitchTo(caller);

		oids = lappend_oid(oids, abp_result_oid(i, 1));
		MemoryContextSwitchTo(old);
	}
	abp_statement_close(&saved);

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
check_some_server(Setup *setup)
{
	char	   *item = "there is a server to deliver to";

	if (setup->servers != NIL)
		abp_setup_put(setup, item, SETUP_RIGHT, NULL, NULL);
	else
		abp_setup_put(setup, item, SETUP_WRONG,
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

/* Is there a token for the role, its own or the one for all? */
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
		return psprintf("sudo mv %s %s", abp_setup_shell_word(path), abp_setup_shell_word(psprintf("%s.old", path)));
	if (st.st_uid != geteuid())
		return psprintf("sudo chown %s %s && sudo chmod 0600 %s", abp_setup_shell_word(abp_setup_server_user()),
						abp_setup_shell_word(path), abp_setup_shell_word(path));
	if ((st.st_mode & (S_IRWXG | S_IRWXO)) != 0 || (st.st_mode & S_IRUSR) == 0)
		return psprintf("sudo chmod 0600 %s", abp_setup_shell_word(path));
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
		return psprintf("getent hosts %s", abp_setup_shell_word(pnstrdup(host + 3, strcspn(host + 3, ":/"))));
	return psprintf("curl -v %s%s", abp_setup_shell_word(server->url), POLAR_INGEST_PATH);
}

/* Does Polar take the token?  By a request that stores nothing. */
static void
check_answer(Setup *setup, const ServerOptions *server, Oid role, const char *token, char *item)
{
	char	   *error = NULL;
	long		status = 0;
	Verdict    *verdict = try_token(server, token, &error, &status);

	if (verdict == NULL)
		abp_setup_put(setup, item, SETUP_WRONG,
					  psprintf("%s was not reached: %s; see whether the command does better on this machine; if it is a proxy that is needed, ALTER SERVER ... OPTIONS (ADD proxy ...)",
							   server->url, error), fix_of_address(server, error));
	else if (verdict->kind == VERDICT_DELIVERED)
		abp_setup_put(setup, item, SETUP_RIGHT, NULL, NULL);
	else if (verdict->kind == VERDICT_RATE_LIMITED)
		abp_setup_put(setup, item, SETUP_UNKNOWN, psprintf("too many requests just now, look again in a minute: %s", verdict->error), NULL);
	else if (status == 401 || status == 403)
		abp_setup_put(setup, item, SETUP_WRONG, psprintf("%s%s", verdict->error,
														 server->access_token_file != NULL ? PASTE_TOKEN : ""),
					  fix_of_refusal(server, role));
	else
		abp_setup_put(setup, item, SETUP_WRONG, verdict->error, fix_of_address(server, NULL));
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
		abp_setup_put(setup, readable, SETUP_UNKNOWN, "only the server's owner and superusers may try its token", NULL);
		return;
	}

	initStringInfo(&reason);
	token = abp_token_read(server, role, &reason);
	if (token == NULL)
	{
		char	   *fix = fix_of_token(server, role);

		abp_setup_put(setup, readable, SETUP_WRONG,
					  psprintf("%s%s", reason.data, strstr(fix, "cat > ") != NULL ? PASTE_TOKEN : ""), fix);
		abp_setup_put(setup, accepted, SETUP_UNKNOWN, "known once the token can be read", NULL);
		return;
	}
	abp_setup_put(setup, readable, SETUP_RIGHT, NULL, NULL);
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

/* One for each server, and for each role that has its own. */
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

/*
 * The servers that the caller may use, and the tokens that they may try.
 */
void
abp_setup_check_servers(Setup *setup)
{
	check_some_server(setup);
	check_tokens(setup);
}
