/*-------------------------------------------------------------------------
 *
 * check_setup.c
 *	  aibilling.check_setup(): what must be right before usage is billed.
 *
 * One row per thing, in the order in which people set them up: is it right, what
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

#include "base/extension.h"
#include "compat.h"
#include "polar/server.h"
#include "queue/attachment.h"
#include "queue/database.h"
#include "sql/setup.h"
#include "usage/attach.h"

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

/*
 * Is a table attached?  If not, one that is named "usage" is probably meant to
 * be.
 */
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

/*
 * aibilling.check_setup(): one row per thing that must be right.  See the top of
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
		abp_setup_check_table(&setup, lfirst(lc));
	return (Datum) 0;
}
