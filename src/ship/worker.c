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

#include "access/xact.h"
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

#include "compat.h"
#include "config.h"
#include "queue/wake.h"
#include "ship/quota.h"
#include "ship/shipper.h"
#include "ship/worker.h"

#define RESTART_SECONDS 1

/* How often to try while a session in CALL sync() ships. */
#define TAKE_OVER_MS 1000

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

/* Sleep until woken, or for this long. */
static void
sleep_until_woken(long timeout_ms)
{
	static uint32 wait_event = 0;

	if (wait_event == 0)
		wait_event = abp_wait_event_new("AibillingPolarMain");

	pgstat_report_activity(STATE_IDLE, NULL);
	(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
					 timeout_ms, wait_event);
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
		abp_worker_ends(edata->message);
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
		if (shipper)
		{
			long		due;

			pgstat_report_activity(STATE_RUNNING, "delivering usage to Polar");
			due = abp_ship(&everything);
			if (abp_ship_has_looked_for_prices(InvalidOid))
				abp_worker_has_looked();
			if (due == 0)
				continue;
			if (due > 0)
				timeout = Min(timeout, due);
		}
		else
			timeout = Min(timeout, TAKE_OVER_MS);
		sleep_until_woken(timeout);
	}
}
