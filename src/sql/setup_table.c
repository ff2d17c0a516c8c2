/*-------------------------------------------------------------------------
 *
 * setup_table.c
 *	  check_setup(): what stops the delivery of a usage table, and is a row of it
 *	  delivered?
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/table.h"
#include "miscadmin.h"
#include "storage/lmgr.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/rel.h"
#include "utils/rls.h"
#include "utils/timestamp.h"

#include "base/idset.h"
#include "compat.h"
#include "polar/server.h"
#include "queue/attachment.h"
#include "queue/entry.h"
#include "queue/feed.h"
#include "queue/ledger.h"
#include "queue/outbox.h"
#include "sql/setup.h"
#include "usage/attach.h"
#include "usage/row.h"

/* Attaches a table again whose server is gone: to one of the same name, if there is one. */
static char *
attach_again(const Setup *setup, const UsageTable *table)
{
	const char *server = setup->servers == NIL ? table->server :
	((const ServerOptions *) linitial(setup->servers))->name;
	ListCell   *lc;

	foreach(lc, setup->servers)
	{
		if (strcmp(((const ServerOptions *) lfirst(lc))->name, table->server) == 0)
			server = table->server;
	}
	return psprintf("SELECT aibilling.attach(%s, server => %s%s);", quote_literal_cstr(table->name),
					quote_literal_cstr(server),
					abp_feed_replicated(table->relid) ? ", replicated => true" : "");
}

/* Whoever has locked a table, for whoever may end them. */
static char *
who_has_locked(const UsageTable *table)
{
	return psprintf("SELECT a.pid, a.usename, a.application_name, a.state, a.query FROM pg_locks l"
					" JOIN pg_stat_activity a USING (pid) WHERE l.granted AND l.mode = 'AccessExclusiveLock'"
					" AND l.relation = %s::regclass;", quote_literal_cstr(table->name));
}

/*
 * What is wrong with a table's columns, and the statements that fix it; NULL:
 * nothing.  The caller has locked the table, which ends here.
 */
static char *
columns_problem(const UsageTable *table, char **fix)
{
	Relation	rel = table_open(table->relid, NoLock);
	UsageColumns columns;
	char	   *problem;

	if (abp_row_columns_find(rel, &columns, &problem))
		problem = abp_row_columns_faults(table->relid);
	else
		problem = psprintf("%s; see that the statement does what you mean: a column may have been renamed or dropped", problem);
	*fix = abp_row_columns_fix(rel);
	table_close(rel, AccessShareLock);
	return *problem == '\0' ? NULL : problem;
}

/* Does something stop a table's delivery until somebody does something? */
static void
check_delivery(Setup *setup, const UsageTable *table)
{
	char	   *item = psprintf("usage table %s: nothing stops its delivery", table->name);
	char	   *resume = psprintf("SELECT aibilling.resume(%s);", quote_literal_cstr(table->server));
	char	   *problem;
	char	   *fix;

	if (!ConditionalLockRelationOid(table->relid, AccessShareLock))
	{
		abp_setup_put(setup, item, SETUP_WRONG,
					  "another transaction has locked the table; wait for its end, or end it with pg_terminate_backend(pid)",
					  who_has_locked(table));
		return;
	}
	problem = columns_problem(table, &fix);
	if (problem != NULL)
		abp_setup_put(setup, item, SETUP_WRONG, problem, *fix == '\0' ? NULL : fix);
	else if (!OidIsValid(table->serverid))
		abp_setup_put(setup, item, SETUP_WRONG, psprintf("its server \"%s\" does not exist any more", table->server),
					  attach_again(setup, table));
	else if (abp_server_aclcheck(table->serverid, table->owner) != ACLCHECK_OK)
		abp_setup_put(setup, item, SETUP_WRONG, "its owner may not use its server",
					  psprintf("GRANT USAGE ON FOREIGN SERVER %s TO %s;", quote_identifier(table->server),
							   quote_identifier(GetUserNameFromId(table->owner, false))));
	else if (abp_attach_ids_may_repeat(table->relid))
		abp_setup_put(setup, item, SETUP_WRONG, "nothing keeps two of its rows from having the same id",
					  psprintf("ALTER TABLE %s ADD UNIQUE (id);", table->name));
	else if (table->paused_by_operator || table->paused_by_answer)
		abp_setup_put(setup, item, SETUP_WRONG, psprintf("paused: %s", table->pause_reason), resume);
	else if (table->blocked_reason != NULL && check_enable_rls(table->relid, table->owner, true) == RLS_ENABLED)
		abp_setup_put(setup, item, SETUP_WRONG, psprintf("blocked: %s; rows are read as the table's owner, whom its policies hide some from", table->blocked_reason),
					  psprintf("ALTER TABLE %s NO FORCE ROW LEVEL SECURITY;", table->name));
	else if (table->blocked_reason != NULL)
		abp_setup_put(setup, item, SETUP_WRONG, psprintf("blocked: %s", table->blocked_reason), resume);
	else if (table->not_before > GetCurrentTimestamp())
		abp_setup_put(setup, item, SETUP_WRONG, psprintf("waits until %s after %d failures: %s",
														 timestamptz_to_str(table->not_before), table->failures,
														 table->pause_reason), resume);
	else
		abp_setup_put(setup, item, SETUP_RIGHT, NULL, NULL);
}

/* The reason and the fix of a table's first row in a state, or false if it has none. */
static bool
first_waiting(const UsageTable *table, const char *state, char **reason, char **fix)
{
	Oid			types[2] = {REGCLASSOID, TEXTOID};
	Datum		args[2] = {ObjectIdGetDatum(table->relid), CStringGetTextDatum(state)};

	*reason = abp_setup_ask("SELECT pg_catalog.format('row %s: %s', usage_id, error) FROM aibilling.outbox"
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

/* Has a row been delivered?  If not, what keeps the first one waiting? */
static void
check_first_row(Setup *setup, const UsageTable *table)
{
	char	   *item = psprintf("usage table %s: a row of it is delivered", table->name);
	LedgerTotals totals;
	char	   *reason;
	char	   *fix;

	abp_ledger_totals(table->relid, &totals);
	if (totals.delivered > 0)
		abp_setup_put(setup, item, SETUP_RIGHT, NULL, NULL);
	else if (totals.in_flight > 0 || abp_outbox_peek(table->relid, OUTBOX_READY, 1).nranges > 0)
		abp_setup_put(setup, item, SETUP_WRONG, "rows wait for what is wrong above, or are on their way", "CALL aibilling.sync();");
	else if (first_waiting(table, "rejected", &reason, &fix))
		abp_setup_put(setup, item, SETUP_WRONG, psprintf("rejected; UPDATE the row, which is checked again then; %s", reason), fix);
	else if (first_waiting(table, "unpriced", &reason, &fix))
		abp_setup_put(setup, item, SETUP_WRONG, psprintf("there is no price; the hint says what to do; %s", reason), fix);
	else
		abp_setup_put(setup, item, SETUP_WRONG, "no row has been inserted since it was attached; this one costs nothing, and no meter counts its event",
					  psprintf("INSERT INTO %s (event_name, external_customer_id, provider_cost) VALUES ('check_setup', 'check_setup', 0);",
							   table->name));
}

/*
 * A usage table of the caller's: what stops its delivery, and whether a row of
 * it has been delivered.
 */
void
abp_setup_check_table(Setup *setup, const UsageTable *table)
{
	check_delivery(setup, table);
	check_first_row(setup, table);
}
