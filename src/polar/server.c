/*-------------------------------------------------------------------------
 *
 * server.c
 *	  Options of CREATE SERVER: checked, decided by whom, kept.
 *
 * Foreign data wrapper "polar" has a validator and no handler: its servers
 * are PostgreSQL's own catalogue of connections, checked when they are
 * written.  One function, read_server_options, says what an option means; the
 * validator calls it to check, the cache calls it to load.
 *
 * No message repeats the value of url, proxy, a path or a token: whoever
 * pastes a secret into the wrong option must not find it in the log.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <unistd.h>

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/reloptions.h"
#include "access/table.h"
#include "access/xact.h"
#include "catalog/namespace.h"
#include "catalog/pg_authid.h"
#include "catalog/pg_foreign_server.h"
#include "catalog/pg_language.h"
#include "catalog/pg_proc.h"
#include "catalog/pg_user_mapping.h"
#include "commands/defrem.h"
#include "fmgr.h"
#include "foreign/foreign.h"
#include "miscadmin.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/fmgrprotos.h"
#include "utils/guc.h"
#include "utils/hsearch.h"
#include "utils/inval.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"
#include "utils/varlena.h"

#include "base/transaction.h"
#include "polar/limits.h"
#include "polar/option.h"
#include "polar/server.h"
#include "polar/url.h"

#define DEFAULT_TIMEOUT_MS 30000
#define MAX_TIMEOUT_MS (10 * 60 * 1000)
#define DEFAULT_BATCH_SIZE 500
#define MAX_BATCH_SIZE 1000
#define DEFAULT_BATCH_BYTES (5 * 1024 * 1024)
#define MIN_BATCH_BYTES (10 * 1024)
#define DEFAULT_MAX_IN_FLIGHT 4
#define MAX_MAX_IN_FLIGHT 32
#define MAX_REQUESTS_PER_MINUTE 60000

#define VALIDATOR_SYMBOL "aibilling_polar_fdw_validator"

/* Which kinds of server know an option. */
#define FOR_POLAR (1 << SERVER_POLAR)
#define FOR_PRICES (1 << SERVER_PRICES)
#define FOR_ALL (FOR_POLAR | FOR_PRICES)

typedef struct OptionName
{
	const char *name;
	Oid			catalog;		/* where it may stand */
	int			kinds;			/* FOR_... */
} OptionName;

static const OptionName option_names[] = {
	{"environment", ForeignServerRelationId, FOR_POLAR},
	{"url", ForeignServerRelationId, FOR_ALL},
	{"event_name", ForeignServerRelationId, FOR_POLAR},
	{"event_name_function", ForeignServerRelationId, FOR_POLAR},
	{"metadata_function", ForeignServerRelationId, FOR_POLAR},
	{"customer_id_key", ForeignServerRelationId, FOR_POLAR},
	{"external_customer_id_key", ForeignServerRelationId, FOR_POLAR},
	{"tag_prefix", ForeignServerRelationId, FOR_POLAR},
	{"access_token_file", ForeignServerRelationId, FOR_ALL},
	{"ca_file", ForeignServerRelationId, FOR_ALL},
	{"proxy", ForeignServerRelationId, FOR_ALL},
	{"timeout", ForeignServerRelationId, FOR_ALL},
	{"batch_size", ForeignServerRelationId, FOR_POLAR},
	{"batch_bytes", ForeignServerRelationId, FOR_POLAR},
	{"max_in_flight", ForeignServerRelationId, FOR_POLAR},
	{"requests_per_minute", ForeignServerRelationId, FOR_POLAR},
	{"unpriced", ForeignServerRelationId, FOR_POLAR},
	{"raw_usage", ForeignServerRelationId, FOR_POLAR},
	{"kind", ForeignServerRelationId, FOR_ALL},
	{"format", ForeignServerRelationId, FOR_PRICES},
	{"access_token", UserMappingRelationId, FOR_ALL}
};

/* Allowed values of the options that are a choice; NULL ends each list. */
static const char *const kinds[] = {"polar", "prices", NULL};
static const char *const environments[] = {"production", "sandbox", NULL};
static const char *const unpriced_choices[] = {"hold", "send", NULL};
static const char *const raw_usage_choices[] = {"keep", "strip", NULL};
static const char *const prices_formats[] = {
	"litellm", "models.dev", "genai-prices", "openrouter", "narev", NULL
};

static const char *const url_schemes[] = {"https", "http", NULL};
static const char *const proxy_schemes[] = {
	"http", "https", "socks5", "socks5h", NULL
};

/*
 * One server of the cache.  The options live in a context of their own, which
 * outlives them in the cache: see abp_server_options.
 */
typedef struct CachedServer
{
	Oid			serverid;		/* hash key; must be first */
	uint32		hash_value;		/* of the syscache entry */
	bool		stale;			/* changed since it was read */
	MemoryContext context;		/* NULL: not loaded */
	ServerOptions *options;
} CachedServer;

static HTAB *server_cache = NULL;

/* Replaced options: parent of contexts to delete at the transaction's end. */
static MemoryContext retired_context = NULL;

/* Counts invalidations, so that a load can see whether one came meanwhile. */
static uint64 invalidations = 0;

PG_FUNCTION_INFO_V1(aibilling_polar_fdw_validator);

static const OptionName *find_option(const char *name, Oid catalog);
static void report_unknown_option(const char *name, Oid catalog);

static void read_server_options(List *options, ServerOptions *server);

static DefElem *option_named(List *options, const char *name);
static bool same_option(List *a, List *b, const char *name);
static const char *changed_decision(List *before, List *after);
static void check_change(List *before, List *after);
static bool stands_elsewhere(List *options);
static void report_forbidden_option(const char *name);
static bool may_set(DefElem *def);
static bool may_use_function(DefElem *def, Oid result_type);
static bool is_polar_wrapper(Oid fdwid);
static void load_server(CachedServer *entry);
static void invalidate_servers(Datum arg, int cacheid, uint32 hash_value);
static void end_of_transaction(XactEvent event, void *arg);

/* --- the validator ------------------------------------------------------- */

/*
 * aibilling_polar_fdw_validator(text[], oid) returns void
 *
 * Called by CREATE and ALTER of foreign data wrapper, server and user mapping
 * with the whole list of options as it is going to be.
 */
Datum
aibilling_polar_fdw_validator(PG_FUNCTION_ARGS)
{
	List	   *options = untransformRelOptions(PG_GETARG_DATUM(0));
	Oid			catalog = PG_GETARG_OID(1);
	ListCell   *lc;

	foreach(lc, options)
	{
		DefElem    *def = lfirst_node(DefElem, lc);

		if (find_option(def->defname, catalog) == NULL)
			report_unknown_option(def->defname, catalog);

		if (catalog == UserMappingRelationId)
		{
			const char *token = defGetString(def);
			const char *fault = abp_option_token_fault(token, strlen(token));

			if (fault != NULL)
				abp_option_refuse(def->defname, NULL,
								  psprintf("The token %s.", fault),
								  "Give the token as Polar shows it, without blanks around it.");
		}
	}

	if (catalog == ForeignServerRelationId)
	{
		ServerOptions server;

		read_server_options(options, &server);
	}

	PG_RETURN_VOID();
}

/* Returns the option's entry, or NULL if it may not be in this catalogue. */
static const OptionName *
find_option(const char *name, Oid catalog)
{
	for (int i = 0; i < lengthof(option_names); i++)
	{
		if (option_names[i].catalog == catalog &&
			strcmp(option_names[i].name, name) == 0)
			return &option_names[i];
	}
	return NULL;
}

/* Raises the error for an option that may not be in this catalogue. */
static void
report_unknown_option(const char *name, Oid catalog)
{
	const char *closest = NULL;
	int			closest_distance = Min(4, (int) strlen(name) / 2) + 1;
	const char *hint;
	StringInfoData valid;

	if (find_option(name, ForeignServerRelationId) != NULL)
		hint = "It is an option of CREATE SERVER.";
	else if (find_option(name, UserMappingRelationId) != NULL)
		hint = catalog == ForeignServerRelationId ?
			"A token belongs in a file named by option \"access_token_file\", or in CREATE USER MAPPING." :
			"It is an option of CREATE USER MAPPING.";
	else
	{
		initStringInfo(&valid);
		for (int i = 0; i < lengthof(option_names); i++)
		{
			const char *candidate = option_names[i].name;

			if (option_names[i].catalog != catalog)
				continue;
			appendStringInfo(&valid, "%s%s", valid.len > 0 ? ", " : "",
							 candidate);

			/* Names from SQL are shorter; a direct call may give any text. */
			if (strlen(name) < NAMEDATALEN)
			{
				int			distance;

				distance = varstr_levenshtein_less_equal(name, strlen(name),
														 candidate,
														 strlen(candidate),
														 1, 1, 1,
														 closest_distance,
														 true);
				if (distance < closest_distance)
				{
					closest = candidate;
					closest_distance = distance;
				}
			}
		}

		if (closest != NULL)
			hint = psprintf("Perhaps you meant the option \"%s\".", closest);
		else if (valid.len > 0)
			hint = psprintf("Valid options in this context are: %s.",
							valid.data);
		else
			hint = "There are no valid options in this context.";
	}

	ereport(ERROR,
			(errcode(ERRCODE_FDW_INVALID_OPTION_NAME),
			 errmsg("invalid option \"%s\"", name),
			 errhint("%s", hint)));
}

/* Options while they are read: those that are understood together. */
typedef struct OptionReading
{
	ServerOptions *server;
	const char *environment;	/* NULL if not set */
	Url			url;
	Url			proxy;
	bool		has_requests_per_minute;
} OptionReading;

static bool
is_sandbox(const OptionReading *r)
{
	return r->environment != NULL && strcmp(r->environment, "sandbox") == 0;
}

/* Reads an option that says where requests go.  Returns whether it is one. */
static bool
read_address(OptionReading *r, DefElem *def)
{
	const char *name = def->defname;
	ServerOptions *server = r->server;

	if (strcmp(name, "environment") == 0)
		r->environment = environments[abp_option_choice(def, environments)];
	else if (strcmp(name, "url") == 0)
	{
		abp_url_read(def, url_schemes, server->kind == SERVER_PRICES, &r->url);
		if (strcmp(r->url.scheme, "http") == 0 && !r->url.loopback)
			abp_option_refuse(name, NULL,
							  "An unencrypted connection would show the token to the network.",
							  "Use https://; http:// is only for 127.0.0.0/8, [::1] and localhost.");
		server->url = defGetString(def);
	}
	else if (strcmp(name, "proxy") == 0)
	{
		abp_url_read(def, proxy_schemes, false, &r->proxy);
		if (!r->proxy.has_port || strcmp(r->proxy.rest, "") != 0)
			abp_option_refuse(name, NULL,
							  "A proxy is a scheme, a host and a port, without a path.",
							  "Write it like \"http://proxy.example.com:3128\".");
		server->proxy = defGetString(def);
	}
	else if (strcmp(name, "access_token_file") == 0)
		server->access_token_file = abp_option_path(def);
	else if (strcmp(name, "ca_file") == 0)
		server->ca_file = abp_option_path(def);
	else
		return false;
	return true;
}

/* Reads an option that says what is sent.  Returns whether it is one. */
static bool
read_content(OptionReading *r, DefElem *def)
{
	const char *name = def->defname;
	ServerOptions *server = r->server;

	if (strcmp(name, "event_name") == 0)
		server->format.event_name = abp_option_event_name(def);
	else if (strcmp(name, "event_name_function") == 0)
	{
		(void) abp_option_function_name(def);
		server->event_name_function = defGetString(def);
		server->format.has_event_name_function = true;
	}
	else if (strcmp(name, "metadata_function") == 0)
	{
		(void) abp_option_function_name(def);
		server->metadata_function = defGetString(def);
		server->format.has_metadata_function = true;
	}
	else if (strcmp(name, "customer_id_key") == 0)
		server->format.customer_id_key = abp_option_text(def);
	else if (strcmp(name, "external_customer_id_key") == 0)
		server->format.external_customer_id_key = abp_option_text(def);
	else if (strcmp(name, "tag_prefix") == 0)
		server->format.tag_prefix = abp_option_tag_prefix(def);
	else if (strcmp(name, "unpriced") == 0)
		server->send_unpriced = abp_option_choice(def, unpriced_choices) == 1;
	else if (strcmp(name, "raw_usage") == 0)
		server->strip_raw_usage = abp_option_choice(def, raw_usage_choices) == 1;
	else if (strcmp(name, "format") == 0)
		server->prices_format =
			prices_formats[abp_option_choice(def, prices_formats)];
	else
		return false;
	return true;
}

/* Reads an option that is a limit.  Returns whether it is one. */
static bool
read_limit(OptionReading *r, DefElem *def)
{
	const char *name = def->defname;
	ServerOptions *server = r->server;

	if (strcmp(name, "timeout") == 0)
		server->timeout_ms = abp_option_int(def, GUC_UNIT_MS, 1, MAX_TIMEOUT_MS,
											"from 1 ms to 10 min; a number without unit is milliseconds");
	else if (strcmp(name, "batch_size") == 0)
		server->batch_size = abp_option_int(def, 0, 1, MAX_BATCH_SIZE,
											"a number of events from 1 to 1000");
	else if (strcmp(name, "batch_bytes") == 0)
		server->batch_bytes = abp_option_int(def, GUC_UNIT_BYTE, MIN_BATCH_BYTES,
											 MAX_BATCH_BYTES,
											 "from 10 kB to 10 MB; a number without unit is bytes");
	else if (strcmp(name, "max_in_flight") == 0)
		server->max_in_flight = abp_option_int(def, 0, 1, MAX_MAX_IN_FLIGHT,
											   "a number of requests from 1 to 32");
	else if (strcmp(name, "requests_per_minute") == 0)
	{
		server->requests_per_minute =
			abp_option_int(def, 0, 0, MAX_REQUESTS_PER_MINUTE,
						   "a number from 0 (no limit) to 60000");
		r->has_requests_per_minute = true;
	}
	else
		return false;
	return true;
}

/* Raises if a server of this kind has no option of this name. */
static void
check_name(const char *name, ServerKind kind)
{
	const OptionName *known = find_option(name, ForeignServerRelationId);

	if (known == NULL)
		report_unknown_option(name, ForeignServerRelationId);
	if ((known->kinds & (1 << kind)) == 0)
		ereport(ERROR,
				(errcode(ERRCODE_FDW_INVALID_OPTION_NAME),
				 errmsg("option \"%s\" does not apply to a server of kind \"%s\"",
						name, kinds[kind]),
				 errhint("Drop it, or set option \"kind\" to \"%s\".",
						 kinds[kind == SERVER_POLAR ? SERVER_PRICES : SERVER_POLAR])));
}

/* Raises if options that are there do not go together, or one is missing. */
static void
check_together(const OptionReading *r)
{
	const ServerOptions *server = r->server;

	if (server->kind == SERVER_PRICES &&
		(server->url == NULL || server->prices_format == NULL))
		ereport(ERROR,
				(errcode(ERRCODE_FDW_DYNAMIC_PARAMETER_VALUE_NEEDED),
				 errmsg("a server of kind \"prices\" needs options \"url\" and \"format\""),
				 errhint("Valid values of \"format\" are: %s.",
						 abp_option_choices(prices_formats))));
	if (server->url == NULL && r->environment == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_FDW_DYNAMIC_PARAMETER_VALUE_NEEDED),
				 errmsg("a server of wrapper \"polar\" needs option \"environment\" or \"url\""),
				 errhint("Add OPTIONS (environment 'sandbox') to try it out, or 'production' for real events.")));

	/* an http request passes a proxy in the clear, token and all */
	if (server->url != NULL && server->proxy != NULL &&
		strcmp(r->url.scheme, "http") == 0 && !r->proxy.loopback)
		abp_option_refuse("proxy", NULL,
						  "The proxy of an http:// URL sees the token, so it must be on this machine too.",
						  "Use https:// in option \"url\", or drop the proxy.");
}

/* The base of Polar's API that a URL names, without trailing slash. */
static char *
base_url(const char *url)
{
	char	   *base = pstrdup(url);
	int			len = strlen(base);
	int			path_len = strlen(POLAR_INGEST_PATH);

	while (base[len - 1] == '/')
		base[--len] = '\0';
	if (len > path_len && strcmp(base + len - path_len, POLAR_INGEST_PATH) == 0)
		abp_option_refuse("url", NULL,
						  "The path " POLAR_INGEST_PATH " is put behind it by itself.",
						  "Leave it out.");
	return base;
}

/*
 * Fills *server from the options of CREATE SERVER, defaults included, except
 * for what is not an option (serverid, owner, name).  Raises if a value is bad
 * or the options do not go together.  Strings point into the list.
 */
static void
read_server_options(List *options, ServerOptions *server)
{
	OptionReading r = {.server = server};
	ListCell   *lc;

	memset(server, 0, sizeof(ServerOptions));
	server->kind = SERVER_POLAR;
	server->format.tag_prefix = DEFAULT_TAG_PREFIX;
	server->timeout_ms = DEFAULT_TIMEOUT_MS;
	server->batch_size = DEFAULT_BATCH_SIZE;
	server->batch_bytes = DEFAULT_BATCH_BYTES;
	server->max_in_flight = DEFAULT_MAX_IN_FLIGHT;

	/* the kind decides how others are read */
	foreach(lc, options)
	{
		DefElem    *def = lfirst_node(DefElem, lc);

		if (strcmp(def->defname, "kind") == 0)
			server->kind = (ServerKind) abp_option_choice(def, kinds);
	}

	foreach(lc, options)
	{
		DefElem    *def = lfirst_node(DefElem, lc);

		check_name(def->defname, server->kind);
		if (strcmp(def->defname, "kind") != 0 &&
			!read_address(&r, def) && !read_content(&r, def) && !read_limit(&r, def))
			elog(ERROR, "unrecognized option: %s", def->defname);
	}
	check_together(&r);

	if (server->kind == SERVER_POLAR && server->url != NULL)
		server->url = base_url(server->url);
	if (server->url == NULL)
		server->url = is_sandbox(&r) ? SANDBOX_URL : PRODUCTION_URL;

	if (!r.has_requests_per_minute)
	{
		if (is_sandbox(&r))
			server->requests_per_minute = SANDBOX_REQUESTS_PER_MINUTE;
		else if (r.environment == NULL && r.url.loopback)
			server->requests_per_minute = 0;
		else
			server->requests_per_minute = PRODUCTION_REQUESTS_PER_MINUTE;
	}
}

/* --- privileges ---------------------------------------------------------- */

/*
 * abp_server_check_change
 *		Raises if the current user may not give a server the options it has now.
 *
 * To be called by the command that creates or alters the server, right after
 * it has written the catalogue: the caches still show the server as it was.
 * The validator could not tell: it sees neither which server it is nor what
 * was there before, so neither what is left out nor what is put together from
 * two servers.  Servers of other wrappers are none of our business.
 */
void
abp_server_check_change(Oid serverid)
{
	HeapTuple	tup = SearchSysCache1(FOREIGNSERVEROID, ObjectIdGetDatum(serverid));
	bool		created = !HeapTupleIsValid(tup);
	List	   *before = NIL;
	List	   *after = NIL;
	ScanKeyData key;
	Relation	rel;
	SysScanDesc scan;

	if (!created)
	{
		bool		isnull;
		Datum		datum = SysCacheGetAttr(FOREIGNSERVEROID, tup,
											Anum_pg_foreign_server_srvoptions, &isnull);

		if (!isnull)
			before = untransformRelOptions(datum);
		ReleaseSysCache(tup);
	}

	rel = table_open(ForeignServerRelationId, AccessShareLock);
	ScanKeyInit(&key, Anum_pg_foreign_server_oid, BTEqualStrategyNumber, F_OIDEQ,
				ObjectIdGetDatum(serverid));
	scan = systable_beginscan(rel, ForeignServerOidIndexId, true, SnapshotSelf, 1, &key);
	tup = systable_getnext(scan);
	if (HeapTupleIsValid(tup) &&
		is_polar_wrapper(((Form_pg_foreign_server) GETSTRUCT(tup))->srvfdw))
	{
		bool		isnull;
		Datum		datum = heap_getattr(tup, Anum_pg_foreign_server_srvoptions,
										 RelationGetDescr(rel), &isnull);

		if (!isnull)
			after = untransformRelOptions(datum);
		if (!created || !stands_elsewhere(after))
			check_change(before, after);
	}
	systable_endscan(scan);
	table_close(rel, AccessShareLock);
}

/*
 * Where requests go, whom they trust and what token they carry is one
 * decision: whoever changes a part of it, if only by leaving it out, must be
 * allowed to set each part, as it was and as it is going to be.  Otherwise a
 * server's owner could send a superuser's token to where nobody meant it to go.
 */
static const char *const decided_together[] = {
	"url", "environment", "proxy", "ca_file", "access_token_file", NULL
};

/* The option of this name, or NULL if it is not in the list. */
static DefElem *
option_named(List *options, const char *name)
{
	ListCell   *lc;

	foreach(lc, options)
	{
		DefElem    *def = lfirst_node(DefElem, lc);

		if (strcmp(def->defname, name) == 0)
			return def;
	}
	return NULL;
}

/* Has the option the same value in both lists, or is it in neither? */
static bool
same_option(List *a, List *b, const char *name)
{
	DefElem    *in_a = option_named(a, name);
	DefElem    *in_b = option_named(b, name);

	if (in_a == NULL || in_b == NULL)
		return in_a == in_b;
	return strcmp(defGetString(in_a), defGetString(in_b)) == 0;
}

/* The first of the options decided together that differs, NULL if none does. */
static const char *
changed_decision(List *before, List *after)
{
	/* an environment says nothing beside a URL, which wins */
	bool		by_url = option_named(before, "url") != NULL &&
	option_named(after, "url") != NULL;

	for (int i = 0; decided_together[i] != NULL; i++)
	{
		const char *name = decided_together[i];

		if (!same_option(before, after, name) &&
			!(by_url && strcmp(name, "environment") == 0))
			return name;
	}
	return NULL;
}

/* Raises if the current user may not change the options of a server so. */
static void
check_change(List *before, List *after)
{
	const char *changed = changed_decision(before, after);
	ListCell   *lc;

	foreach(lc, after)
	{
		DefElem    *def = lfirst_node(DefElem, lc);

		if (!same_option(before, after, def->defname) && !may_set(def))
			report_forbidden_option(def->defname);
	}

	for (int i = 0; changed != NULL && decided_together[i] != NULL; i++)
	{
		const char *name = decided_together[i];
		DefElem    *was = option_named(before, name);

		if (was != NULL && !may_set(was))
			ereport(ERROR,
					(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
					 errmsg("permission denied to change option \"%s\"", changed),
					 errdetail("Option \"%s\" was set by a role with more rights, and where requests go, whom they trust and what token they carry is one decision.",
							   name),
					 errhint("Ask a superuser to change it; the server's owner can alter other options.")));
	}
}

/*
 * Does a server of the current user's have the same decision and functions?
 * Then nothing can be reached by another one that could not be before.
 */
static bool
stands_elsewhere(List *options)
{
	Relation	rel = table_open(ForeignServerRelationId, AccessShareLock);
	SysScanDesc scan = systable_beginscan(rel, InvalidOid, false, NULL, 0, NULL);
	bool		found = false;
	HeapTuple	tup;

	while (!found && HeapTupleIsValid(tup = systable_getnext(scan)))
	{
		Form_pg_foreign_server server = (Form_pg_foreign_server) GETSTRUCT(tup);
		bool		isnull;
		Datum		datum;

		CHECK_FOR_INTERRUPTS();
		if (!has_privs_of_role(GetUserId(), server->srvowner) ||
			!is_polar_wrapper(server->srvfdw))
			continue;
		datum = heap_getattr(tup, Anum_pg_foreign_server_srvoptions,
							 RelationGetDescr(rel), &isnull);
		if (!isnull)
		{
			List	   *others = untransformRelOptions(datum);

			found = changed_decision(others, options) == NULL &&
				same_option(others, options, "event_name_function") &&
				same_option(others, options, "metadata_function");
		}
	}

	systable_endscan(scan);
	table_close(rel, AccessShareLock);
	return found;
}

/* Raises the error for an option that one may not set to this value. */
static void
report_forbidden_option(const char *name)
{
	const char *detail;

	if (strcmp(name, "event_name_function") == 0 ||
		strcmp(name, "metadata_function") == 0)
		detail = "The function runs with the rights of its owner. It must exist, and to name it one needs USAGE on its schema, EXECUTE on it, and membership in the role that owns it.";
	else if (strcmp(name, "url") == 0 || strcmp(name, "proxy") == 0)
		detail = "Only superusers may set it.";
	else
		detail = "Only superusers and members of role \"pg_read_server_files\" may set it.";

	ereport(ERROR,
			(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
			 errmsg("permission denied to set option \"%s\"", name),
			 errdetail("%s", detail),
			 errhint("Ask a superuser to set it; the server's owner can then alter other options.")));
}

/* May the current user set this option to this value? */
static bool
may_set(DefElem *def)
{
	const char *name = def->defname;

	if (strcmp(name, "event_name_function") == 0)
		return may_use_function(def, TEXTOID);
	if (strcmp(name, "metadata_function") == 0)
		return may_use_function(def, JSONBOID);
	if (strcmp(name, "url") == 0 || strcmp(name, "proxy") == 0)
		return superuser();
	if (strcmp(name, "access_token_file") == 0 || strcmp(name, "ca_file") == 0)
		return has_privs_of_role(GetUserId(), ROLE_PG_READ_SERVER_FILES);
	return true;
}

/*
 * May the current user have this function called?  It is called as its own
 * owner, on data of the usage table's writers, so EXECUTE alone would lend the
 * owner's rights to anyone.
 *
 * For a superuser a function that does not exist is no more than a warning: a
 * restore may create it later.  Others must not name what someone else, with
 * other rights, may create one day.
 */
static bool
may_use_function(DefElem *def, Oid result_type)
{
	List	   *names = abp_option_function_name(def);
	const char *schema = linitial(names);
	const char *function = lsecond(names);
	Oid			argtypes[1] = {JSONBOID};
	Oid			namespace;
	HeapTuple	tup = NULL;
	Form_pg_proc proc;
	bool		fits;
	bool		allowed;

	namespace = get_namespace_oid(schema, true);
	if (OidIsValid(namespace))
		tup = SearchSysCache3(PROCNAMEARGSNSP,
							  CStringGetDatum(function),
							  PointerGetDatum(buildoidvector(argtypes, 1)),
							  ObjectIdGetDatum(namespace));
	if (!HeapTupleIsValid(tup))
	{
		if (!superuser())
			return false;
		ereport(WARNING,
				(errcode(ERRCODE_UNDEFINED_FUNCTION),
				 errmsg("function %s(jsonb) does not exist",
						quote_qualified_identifier(schema, function)),
				 errdetail("Option \"%s\" is set all the same.", def->defname),
				 errhint("Rows cannot be delivered until it is created.")));
		return true;
	}

	proc = (Form_pg_proc) GETSTRUCT(tup);
	fits = proc->prokind == PROKIND_FUNCTION && !proc->proretset &&
		proc->prorettype == result_type;
	allowed = has_privs_of_role(GetUserId(), proc->proowner) &&
		DatumGetBool(DirectFunctionCall2(has_schema_privilege_id,
										 ObjectIdGetDatum(namespace),
										 PointerGetDatum(cstring_to_text("USAGE")))) &&
		DatumGetBool(DirectFunctionCall2(has_function_privilege_id,
										 ObjectIdGetDatum(proc->oid),
										 PointerGetDatum(cstring_to_text("EXECUTE"))));
	ReleaseSysCache(tup);

	if (!fits)
		abp_option_refuse(def->defname, defGetString(def),
						  psprintf("It is not a function of one argument of type jsonb that returns %s.",
								   format_type_be(result_type)),
						  NULL);
	return allowed;
}

/*
 * Is it this extension's foreign data wrapper?  Known by its validator, since
 * wrappers can be renamed; only superusers create C functions and wrappers.
 */
static bool
is_polar_wrapper(Oid fdwid)
{
	ForeignDataWrapper *fdw = GetForeignDataWrapper(fdwid);
	HeapTuple	tup;
	bool		result = false;

	if (!OidIsValid(fdw->fdwvalidator))
		return false;
	tup = SearchSysCache1(PROCOID, ObjectIdGetDatum(fdw->fdwvalidator));
	if (HeapTupleIsValid(tup))
	{
		bool		isnull;
		Datum		symbol = SysCacheGetAttr(PROCOID, tup, Anum_pg_proc_prosrc,
											 &isnull);

		result = ((Form_pg_proc) GETSTRUCT(tup))->prolang == ClanguageId &&
			!isnull &&
			strcmp(TextDatumGetCString(symbol), VALIDATOR_SYMBOL) == 0;
		ReleaseSysCache(tup);
	}
	return result;
}

/* --- the cache ----------------------------------------------------------- */

/*
 * abp_server_init
 *		Makes this backend notice changes of servers.  May be called again.
 */
void
abp_server_init(void)
{
	HASHCTL		ctl = {0};

	if (server_cache != NULL)
		return;

	retired_context = AllocSetContextCreate(TopMemoryContext,
											"aibilling_polar retired servers",
											ALLOCSET_SMALL_SIZES);
	ctl.keysize = sizeof(Oid);
	ctl.entrysize = sizeof(CachedServer);
	ctl.hcxt = TopMemoryContext;
	server_cache = hash_create("aibilling_polar servers", 8, &ctl,
							   HASH_ELEM | HASH_BLOBS | HASH_CONTEXT);

	/* owner, name and options are all in pg_foreign_server */
	CacheRegisterSyscacheCallback(FOREIGNSERVEROID, invalidate_servers,
								  (Datum) 0);
	RegisterXactCallback(end_of_transaction, NULL);
}

/*
 * abp_server_options
 *		Returns the options of a server of wrapper "polar", defaults filled in.
 *
 * Usually one hash lookup.  What is returned is never changed, and stays valid
 * until the end of the current transaction even if the server is altered or
 * dropped meanwhile.  A caller that goes on without a transaction may use it
 * until the end of the first transaction that calls this function again.
 *
 * Must be called in a transaction.  Raises if there is no such server, if it
 * is not of this wrapper, or if its options are bad.
 */
const ServerOptions *
abp_server_options(Oid serverid)
{
	CachedServer *entry;
	bool		found;

	Assert(IsTransactionState());

	abp_server_init();
	entry = hash_search(server_cache, &serverid, HASH_ENTER, &found);
	if (!found)
	{
		entry->hash_value = GetSysCacheHashValue1(FOREIGNSERVEROID,
												  ObjectIdGetDatum(serverid));
		entry->stale = false;
		entry->context = NULL;
		entry->options = NULL;
	}

	if (entry->context != NULL && entry->stale)
	{
		MemoryContextSetParent(entry->context, retired_context);
		entry->context = NULL;
		entry->options = NULL;
	}
	if (entry->context == NULL)
		load_server(entry);
	return entry->options;
}

/* Reads a server's options into a new context of the entry's. */
static void
load_server(CachedServer *entry)
{
	uint64		invalidations_before = invalidations;
	MemoryContext context;
	MemoryContext oldcontext;
	ForeignServer *server;
	ServerOptions *options;

	/* under the caller's context until it is complete, should it fail */
	context = AllocSetContextCreate(CurrentMemoryContext,
									"aibilling_polar server",
									ALLOCSET_SMALL_SIZES);
	oldcontext = MemoryContextSwitchTo(context);

	server = GetForeignServer(entry->serverid);
	if (!is_polar_wrapper(server->fdwid))
		ereport(ERROR,
				(errcode(ERRCODE_WRONG_OBJECT_TYPE),
				 errmsg("server \"%s\" is not a server of foreign data wrapper \"polar\"",
						server->servername),
				 errhint("Create one with CREATE SERVER ... FOREIGN DATA WRAPPER polar.")));

	options = palloc(sizeof(ServerOptions));
	read_server_options(server->options, options);
	options->serverid = server->serverid;
	options->owner = server->owner;
	options->name = server->servername;

	MemoryContextSwitchTo(oldcontext);
	MemoryContextSetParent(context, TopMemoryContext);

	entry->options = options;
	entry->context = context;
	/* the catalogue may have been read before a change came in */
	entry->stale = invalidations != invalidations_before;
}

/* Syscache callback: the server with this hash value, or any if 0, changed. */
static void
invalidate_servers(Datum arg, int cacheid, uint32 hash_value)
{
	HASH_SEQ_STATUS status;
	CachedServer *entry;

	invalidations++;

	/* only marked: somebody may be reading what the entry points to */
	hash_seq_init(&status, server_cache);
	while ((entry = hash_seq_search(&status)) != NULL)
	{
		if (hash_value == 0 || entry->hash_value == hash_value)
			entry->stale = true;
	}
}

/* Transaction callback: nobody needs the options that were replaced. */
static void
end_of_transaction(XactEvent event, void *arg)
{
	if (abp_transaction_ends(event))
		MemoryContextReset(retired_context);
}
