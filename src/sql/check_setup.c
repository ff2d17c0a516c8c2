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

#include "catalog/namespace.h"
#include "fmgr.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

#include "base/extension.h"
#include "base/idset.h"
#include "compat.h"
#include "polar/server.h"
#include "queue/attachment.h"
#include "queue/entry.h"
#include "queue/ledger.h"
#include "queue/outbox.h"
#include "sql/setup.h"
#include "usage/attach.h"
#include "usage/row.h"

PG_FUNCTION_INFO_V1(abp_sql_check_setup);

static void
check_prices(Setup *setup)
{
	char	   *item = "there are prices";

	if (abp_setup_ask("SELECT 1 FROM aibilling.price LIMIT 1", 0, NULL, NULL) != NULL)
		abp_setup_put(setup, item, SETUP_RIGHT, NULL, NULL);
	else
		abp_setup_put(setup, item, SETUP_WRONG, "aibilling.price is empty: rows wait for a price, but for those with a provider_cost",
					  "SELECT aibilling.load_bundled_prices();");
}

static void
check_armed(Setup *setup)
{
	char	   *item = "the database may send";

	if (setup->armed)
		abp_setup_put(setup, item, SETUP_RIGHT, NULL, NULL);
	else if (abp_database_standing() == DATABASE_SUBSCRIBER)
		abp_setup_put(setup, item, SETUP_WRONG, "a subscription brings another database's outbox here, which is that one's to send; drop the subscription, or take schema aibilling out of the publication, before",
					  "SELECT aibilling.arm();");
	else
		abp_setup_put(setup, item, SETUP_WRONG, "it is a copy of another one, or was restored; if it is the one that is to bill customers",
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
		abp_setup_put(setup, item, SETUP_RIGHT, NULL, NULL);
	else if (OidIsValid(same) && abp_owns_table(same, GetUserId()))
		abp_setup_put(setup, item, SETUP_WRONG, "none is that you own; there is a table \"usage\"",
					  psprintf("SELECT aibilling.attach('usage', server => %s);", quote_literal_cstr(server)));
	else
		abp_setup_put(setup, item, SETUP_WRONG, "none is that you own",
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
		abp_setup_put(setup, item, SETUP_WRONG, psprintf("its server \"%s\" does not exist any more", table->server),
					  psprintf("SELECT aibilling.attach(%s, server => %s);", quote_literal_cstr(table->name),
							   quote_literal_cstr(setup->servers == NIL ? "polar" :
												  ((const ServerOptions *) linitial(setup->servers))->name)));
	else if (*faults != '\0')
		abp_setup_put(setup, item, SETUP_WRONG, faults, NULL);
	else if (abp_ids_may_repeat(table->relid))
		abp_setup_put(setup, item, SETUP_WRONG, "nothing keeps two of its rows from having the same id",
					  psprintf("ALTER TABLE %s ADD UNIQUE (id);", table->name));
	else if (table->paused_by_operator || table->paused_by_answer)
		abp_setup_put(setup, item, SETUP_WRONG, psprintf("paused: %s", table->pause_reason), resume);
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
	setup.servers = abp_setup_servers();

	abp_setup_check_worker(&setup);
	check_prices(&setup);
	abp_setup_check_servers(&setup);
	check_armed(&setup);
	check_attached(&setup);
	foreach(lc, setup.tables)
	{
		check_table(&setup, lfirst(lc));
		check_first_row(&setup, lfirst(lc));
	}
	return (Datum) 0;
}
