/*-------------------------------------------------------------------------
 *
 * worker.c
 *	  The background worker: one for each database named in the settings.
 *
 * It ships, sleeps on its latch until a commit or the next due time wakes it,
 * and otherwise polls.  It holds no transaction while it sleeps or waits for
 * the network.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/table.h"
#include "access/xact.h"
#include "catalog/pg_database.h"
#include "commands/dbcommands.h"
#include "commands/extension.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "nodes/value.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "storage/proc.h"
#include "tcop/tcopprot.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/varlena.h"

#include "base/extension.h"
#include "compat.h"
#include "config.h"
#include "queue/outbox.h"
#include "queue/wake.h"
#include "ship/position.h"
#include "ship/quota.h"
#include "ship/shipper.h"
#include "ship/worker.h"

#define RESTART_SECONDS 1

/* How often to try while a session in CALL sync() ships. */
#define TAKE_OVER_MS 1000

/* How often to look for the database, and for the extension in it. */
#define DATABASE_POLL_MS 2000

/*
 * Register a worker for each database of aibilling_polar.databases.  Called
 * when the library is loaded; without preloading there are no workers.
 */
void
abp_worker_init(void)
{
	List	   *names;
	List	   *databases = NIL;
	ListCell   *lc;

	if (!process_shared_preload_libraries_in_progress || abp_databases == NULL ||
		!SplitIdentifierString(pstrdup(abp_databases), ',', &names))
		return;

	/* each database once, however it was written */
	foreach(lc, names)
	{
		if (!list_member(databases, makeString(lfirst(lc))))
			databases = lappend(databases, makeString(lfirst(lc)));
		else
			ereport(LOG,
					(errmsg("database \"%s\" is named twice in aibilling_polar.databases and has one worker all the same",
							(char *) lfirst(lc))));
	}
	abp_wake_init(list_length(databases));
	abp_quota_init();

	/* pg_upgrade's servers deliver nothing. */
	if (IsBinaryUpgrade)
		return;

	foreach(lc, databases)
	{
		const char *database = strVal(lfirst(lc));
		BackgroundWorker worker = {0};

		worker.bgw_flags = BGWORKER_SHMEM_ACCESS | BGWORKER_BACKEND_DATABASE_CONNECTION |
			BGWORKER_INTERRUPTIBLE;
		worker.bgw_start_time = BgWorkerStart_RecoveryFinished;
		worker.bgw_restart_time = RESTART_SECONDS;
		snprintf(worker.bgw_library_name, sizeof(worker.bgw_library_name), "aibilling_polar");
		snprintf(worker.bgw_function_name, sizeof(worker.bgw_function_name),
				 "aibilling_polar_worker_main");
		snprintf(worker.bgw_name, sizeof(worker.bgw_name),
				 "aibilling_polar worker for database %s", database);
		snprintf(worker.bgw_type, sizeof(worker.bgw_type), "aibilling_polar worker");
		strlcpy(worker.bgw_extra, database, sizeof(worker.bgw_extra));
		worker.bgw_main_arg = Int32GetDatum(foreach_current_index(lc));
		RegisterBackgroundWorker(&worker);
	}
}

/* Sleep until woken, or for this long; activity is for pg_stat_activity, or NULL. */
static void
sleep_until_woken(long timeout_ms, const char *activity)
{
	static uint32 wait_event = 0;

	pgstat_report_activity(STATE_IDLE, activity);
	(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
					 timeout_ms, abp_wait_event(&wait_event, "AibillingPolarMain"));
	ResetLatch(MyLatch);
	CHECK_FOR_INTERRUPTS();

	if (ConfigReloadPending)
	{
		ConfigReloadPending = false;
		ProcessConfigFile(PGC_SIGHUP);
	}
}

/* Become the shipper, unless a session in CALL sync() is. */
static bool
become_shipper(void)
{
	bool		mine;

	StartTransactionCommand();
	mine = abp_ship_lock();
	CommitTransactionCommand();
	if (mine)
		abp_ship_reset();
	return mine;
}

static emit_log_hook_type next_emit_log_hook = NULL;

/* What ends a worker is for aibilling.status, too. */
static void
note_what_ends_us(ErrorData *edata)
{
	if (next_emit_log_hook)
		next_emit_log_hook(edata);
	if (edata->elevel >= ERROR && edata->sqlerrcode != ERRCODE_ADMIN_SHUTDOWN)
		abp_wake_worker_ends(edata->message, edata->sqlerrcode == ERRCODE_UNDEFINED_DATABASE);
}

/*
 * The database whose name differs from this one in capital letters only, in
 * the current memory context, or NULL.
 */
static char *
database_in_other_case(const char *name)
{
	Relation	databases = table_open(DatabaseRelationId, AccessShareLock);
	SysScanDesc scan = systable_beginscan(databases, InvalidOid, false, NULL, 0, NULL);
	char	   *found = NULL;
	HeapTuple	tuple;

	while (found == NULL && HeapTupleIsValid(tuple = systable_getnext(scan)))
	{
		Form_pg_database database = (Form_pg_database) GETSTRUCT(tuple);

		if (pg_strcasecmp(NameStr(database->datname), name) == 0)
			found = pstrdup(NameStr(database->datname));
	}
	systable_endscan(scan);
	table_close(databases, AccessShareLock);
	return found;
}

/*
 * There is no database of this worker's name.  It says so once and waits for
 * one, connected to none, rather than fail every second; then it ends, so that
 * its next run connects.
 */
static void
wait_for_database(void)
{
	const char *name = MyBgworkerEntry->bgw_extra;
	bool		said = false;

	BackgroundWorkerInitializeConnection(NULL, NULL, 0);
	for (;;)
	{
		Oid			database;

		SetCurrentStatementStartTimestamp();
		StartTransactionCommand();
		database = get_database_oid(name, true);
		if (!OidIsValid(database) && !said)
		{
			char	   *other = database_in_other_case(name);

			ereport(WARNING,
					(errcode(ERRCODE_UNDEFINED_DATABASE),
					 errmsg("aibilling_polar worker waits for database \"%s\", which does not exist",
							name),
					 other != NULL ?
					 errhint("There is a database \"%s\": a name with capital letters is written in double quotes, as in aibilling_polar.databases = '\"%s\"'. Change it and restart the server.",
							 other, other) :
					 errhint("Create it, or take it out of aibilling_polar.databases and restart the server.")));
			said = true;
		}
		CommitTransactionCommand();
		if (OidIsValid(database))
		{
			abp_wake_has_database();
			proc_exit(1);
		}
		sleep_until_woken(DATABASE_POLL_MS, "waiting for the database to be created");
	}
}

/*
 * Is the extension in this database?  If not, says so, but once.
 */
static bool
has_extension(void)
{
	static bool said = false;
	static bool has = false;

	if (has)
		return true;

	SetCurrentStatementStartTimestamp();
	StartTransactionCommand();
	has = abp_extension_installed();
	if (!has && !said)
		ereport(LOG,
				(errmsg("aibilling_polar worker for database \"%s\" waits for the extension",
						MyBgworkerEntry->bgw_extra),
				 errhint("Run %s EXTENSION aibilling_polar%s in that database.",
						 OidIsValid(get_extension_oid("aibilling_polar", true)) ? "ALTER" : "CREATE",
						 OidIsValid(get_extension_oid("aibilling_polar", true)) ? " UPDATE" : "")));
	said = true;
	CommitTransactionCommand();
	return has;
}

/*
 * Entry point of a worker.
 */
void
aibilling_polar_worker_main(Datum arg)
{
	ShipScope	everything = {false, InvalidOid, NULL};
	bool		shipper = false;

	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	pqsignal(SIGTERM, die);
	abp_wake_use_slot(DatumGetInt32(arg), MyBgworkerEntry->bgw_extra);
	next_emit_log_hook = emit_log_hook;
	emit_log_hook = note_what_ends_us;
	BackgroundWorkerUnblockSignals();
	if (abp_wake_had_no_database())
		wait_for_database();
	BackgroundWorkerInitializeConnection(MyBgworkerEntry->bgw_extra, NULL, 0);

	SetConfigOption("application_name", MyBgworkerEntry->bgw_type, PGC_USERSET, PGC_S_SESSION);
	SetConfigOption("search_path", "pg_catalog, pg_temp", PGC_USERSET, PGC_S_SESSION);
	SetConfigOption("default_transaction_read_only", "off", PGC_USERSET, PGC_S_SESSION);

	/* Our statements are small, and before PostgreSQL 17 it leaks memory. */
	SetConfigOption("jit", "off", PGC_USERSET, PGC_S_SESSION);
	SetConfigOption("lock_timeout", "10s", PGC_USERSET, PGC_S_SESSION);

	abp_wake_register();
	ereport(LOG,
			(errmsg("aibilling_polar worker for database \"%s\" started",
					MyBgworkerEntry->bgw_extra)));

	for (;;)
	{
		long		timeout = abp_poll_interval * 1000L;

		CHECK_FOR_INTERRUPTS();

		if (!shipper)
		{
			abp_wake_listen();
			shipper = become_shipper();
		}
		if (!has_extension())
		{
			sleep_until_woken(DATABASE_POLL_MS, "waiting for extension aibilling_polar");
			continue;
		}
		if (shipper)
		{
			long		due;

			pgstat_report_activity(STATE_RUNNING, "delivering usage to Polar");
			due = abp_ship(&everything);
			if (abp_positions_saw_prices(InvalidOid))
				abp_wake_has_looked();
			if (due == 0)
				continue;
			if (due > 0)
				timeout = Min(timeout, due);
		}
		else
			timeout = Min(timeout, TAKE_OVER_MS);
		sleep_until_woken(timeout, NULL);
	}
}
