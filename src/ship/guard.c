/*-------------------------------------------------------------------------
 *
 * guard.c
 *	  Other people's code: its time is limited, its errors are its own.
 *
 * Reading and writing a usage table runs code of its owner's (triggers,
 * policies, generated columns), and a server's options name functions.  All
 * of it may raise any SQLSTATE that it likes, so that none of them tells
 * whether we are cancelled or ending: only signals and timers of our own do.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <signal.h>

#include "access/xact.h"
#include "libpq/pqsignal.h"
#include "miscadmin.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "storage/proc.h"
#include "tcop/tcopprot.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/resowner.h"
#include "utils/snapmgr.h"
#include "utils/timeout.h"
#include "utils/timestamp.h"

#include "compat.h"
#include "queue/attachment.h"
#include "ship/guard.h"

/* What one piece of work may take: others wait for it. */
#define WORK_MS 500

/* So often, at this distance, we wait for code that cannot be cancelled yet. */
#define MAX_TICKS 20

/* Who has locked what the work needs is not waited for. */
#define LOCK_TIMEOUT_SETTING "20ms"

/* How long a table is left alone whose code ended us by a timeout of its own. */
#define ENDED_MS (5 * 60 * 1000)

static int	depth = 0;			/* of abp_guard's calls in each other */
static const UsageTable *table_at_work = NULL;
static volatile sig_atomic_t cancel_came = false;
static TimeoutId work_timeout = MAX_TIMEOUTS;
static bool clock_runs = false;
static TimestampTz clock_started = 0;
static volatile sig_atomic_t time_was_up = false;
static volatile sig_atomic_t resisted = false;
static volatile sig_atomic_t ticks = 0;

/* SIGINT while guarded work runs: as PostgreSQL's own, but noted. */
static void
note_cancel(SIGNAL_ARGS)
{
	/* A lock timeout comes by the same signal, and code can cause one. */
	if (!get_timeout_indicator(LOCK_TIMEOUT, false))
		cancel_came = true;
	if (!proc_exit_inprogress)
	{
		InterruptPending = true;
		QueryCancelPending = true;
	}
	SetLatch(MyLatch);
}

/*
 * The time is up: cancel the work.  What catches the cancel and goes on ends
 * with the process, for nothing else stops it.  While the cancel is pending
 * the code has only not come to where it can be cancelled.
 */
static void
clock_ticks(void)
{
	if (!time_was_up)
	{
		time_was_up = true;
		QueryCancelPending = true;
	}
	else if (QueryCancelPending && ++ticks < MAX_TICKS)
		return;
	else
	{
		resisted = true;
		ProcDiePending = true;
	}
	InterruptPending = true;
	SetLatch(MyLatch);
}

/*
 * Work on a table has ended this process: the next one must not run into the
 * same.  After resistance the table stays blocked until resume().
 */
static void
block_who_ended_us(int code, Datum arg)
{
	const char *reason;
	TimestampTz until = DT_NOEND;

	if (table_at_work == NULL)
		return;
	if (resisted)
		reason = "code that runs when its rows are read resisted its cancellation; fix it, then call aibilling.resume()";
	else if (abp_transaction_timed_out())
	{
		reason = "code that runs when its rows are read has set transaction_timeout";
		until = GetCurrentTimestamp() + ENDED_MS * INT64CONST(1000);
	}
	else
		return;

	AbortOutOfAnyTransaction();
	StartTransactionCommand();
	PushActiveSnapshot(GetTransactionSnapshot());
	ereport(WARNING,
			(errcode(ERRCODE_QUERY_CANCELED),
			 errmsg("usage rows of %s cannot be delivered: %s", table_at_work->name, reason)));
	(void) abp_attachment_block(table_at_work->relid, reason, until);
	PopActiveSnapshot();
	CommitTransactionCommand();
}

/*
 * Start the clock of the work that is guarded, or start it again: a piece of
 * work that follows another has its own time.  Not before there is something
 * to do: PostgreSQL leaves its timer on when its timeouts are disabled, and it
 * would wake an idle worker.
 */
void
abp_guard_start_clock(void)
{
	EnableTimeoutParams limit = {
		.type = TMPARAM_EVERY,.delay_ms = WORK_MS
	};

	Assert(depth > 0);
	if (work_timeout == MAX_TIMEOUTS)
	{
		work_timeout = RegisterTimeout(USER_TIMEOUT, clock_ticks);
		before_shmem_exit(block_who_ended_us, (Datum) 0);
	}
	if (time_was_up && !cancel_came)
		QueryCancelPending = false; /* it was for the work before */
	time_was_up = false;
	ticks = 0;
	clock_started = GetCurrentTimestamp();
	clock_runs = true;
	limit.id = work_timeout;
	limit.fin_time = clock_started + WORK_MS * INT64CONST(1000);
	enable_timeouts(&limit, 1);
}

/* Stop the clock, and take back a cancel of it that came too late. */
static void
stop_clock(void)
{
	if (!clock_runs)
		return;
	clock_runs = false;
	disable_timeout(work_timeout, false);
	if (time_was_up && !cancel_came)
		QueryCancelPending = false; /* it came after the work was done */
	time_was_up = false;
}

/*
 * How long the piece of work has taken that the clock was started for; 0
 * before it was.
 */
int64
abp_guard_elapsed_ms(void)
{
	return clock_runs ?
		TimestampDifferenceMilliseconds(clock_started, GetCurrentTimestamp()) : 0;
}

/* Guarded work begins; a part of other guarded work changes nothing. */
static void
enter(const UsageTable *table)
{
	if (depth++ > 0)
		return;
	table_at_work = table;
	cancel_came = false;
	pqsignal(SIGINT, note_cancel);
}

/* Guarded work ends, one way or the other. */
static void
leave(void)
{
	if (--depth > 0)
		return;
	pqsignal(SIGINT, StatementCancelHandler);
	stop_clock();
	table_at_work = NULL;
}

/* What an error says of the work. */
static GuardOutcome
outcome_of(int sqlerrcode, bool too_long)
{
	if (too_long)
		return GUARD_TOO_LONG;
	if (sqlerrcode == ERRCODE_OUT_OF_MEMORY)
		return GUARD_NO_MEMORY;
	if (sqlerrcode == ERRCODE_LOCK_NOT_AVAILABLE ||
		ERRCODE_TO_CATEGORY(sqlerrcode) == ERRCODE_TRANSACTION_ROLLBACK ||
		ERRCODE_TO_CATEGORY(sqlerrcode) == ERRCODE_INSUFFICIENT_RESOURCES)
		return GUARD_PASSES;
	return GUARD_FAILED;
}

/*
 * Do something with a usage table's rows, in a subtransaction and without
 * waiting for locks.  An error undoes it and is returned in *error: never
 * taken for a cancel or the end of this process, whatever its code says.  A
 * cancel of ours is raised.
 *
 * May be called within guarded work, for a part of it that may fail alone:
 * then the clock runs on, and whoever gets GUARD_TOO_LONG starts it again or
 * gives up.
 */
GuardOutcome
abp_guard(const UsageTable *table, GuardedWork work, void *arg, GuardError *error)
{
	MemoryContext caller = CurrentMemoryContext;
	ResourceOwner owner = CurrentResourceOwner;
	volatile GuardOutcome outcome = GUARD_DONE;
	volatile int guc_level = 0;
	volatile bool failed = false;

	BeginInternalSubTransaction(NULL);
	MemoryContextSwitchTo(caller);
	enter(table);
	PG_TRY();
	{
		if (depth == 1)
		{
			guc_level = NewGUCNestLevel();
			(void) set_config_option("lock_timeout", LOCK_TIMEOUT_SETTING, PGC_USERSET,
									 PGC_S_SESSION, GUC_ACTION_SAVE, true, 0, false);
		}
		work(arg);

		/* A cancel that was caught has had no effect. */
		if (time_was_up && !QueryCancelPending)
			ereport(ERROR,
					(errcode(ERRCODE_QUERY_CANCELED),
					 errmsg("canceling statement due to its time limit")));
		if (depth == 1)
			AtEOXact_GUC(false, guc_level);
		ReleaseCurrentSubTransaction();
	}
	PG_CATCH();
	{
		ErrorData  *caught;
		bool		too_long = time_was_up;
		bool		cancelled = cancel_came;

		leave();
		failed = true;

		/* first of all: whatever fails from here on must not leave it open */
		RollbackAndReleaseCurrentSubTransaction();
		if (cancelled)
			PG_RE_THROW();

		MemoryContextSwitchTo(caller);
		caught = CopyErrorData();
		FlushErrorState();
		outcome = outcome_of(caught->sqlerrcode, too_long);
		error->sqlerrcode = too_long ? ERRCODE_QUERY_CANCELED : caught->sqlerrcode;
		error->message = too_long ?
			psprintf("code that runs when its rows are read took longer than %d ms", WORK_MS) :
			caught->message;
	}
	PG_END_TRY();
	MemoryContextSwitchTo(caller);
	CurrentResourceOwner = owner;
	if (failed)
		return outcome;

	leave();
	if (cancel_came)
	{
		/* The work is done, be it that it has caught the cancel. */
		InterruptPending = true;
		QueryCancelPending = true;
	}
	return outcome;
}

/*
 * Raise the error of guarded work after all, in its words and with its code.
 */
void
abp_guard_rethrow(const GuardError *error)
{
	ereport(ERROR,
			(errcode(error->sqlerrcode), errmsg_internal("%s", error->message)));
}
