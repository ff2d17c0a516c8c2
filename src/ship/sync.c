/*-------------------------------------------------------------------------
 *
 * sync.c
 *	  CALL aibilling.sync(): delivery at the caller's time, in their session.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "executor/spi.h"
#include "fmgr.h"
#include "foreign/foreign.h"
#include "miscadmin.h"
#include "nodes/parsenodes.h"
#include "storage/latch.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/portal.h"
#include "utils/timestamp.h"

#include "base/extension.h"
#include "base/idset.h"
#include "compat.h"
#include "queue/attachment.h"
#include "queue/entry.h"
#include "queue/ledger.h"
#include "queue/outbox.h"
#include "queue/wake.h"
#include "ship/fold.h"
#include "ship/http.h"
#include "ship/position.h"
#include "ship/shipper.h"

/* How often to look while another process ships. */
#define POLL_MS 20

/* How often to say how far it is. */
#define PROGRESS_MS 5000

/* When to give up a table of which nothing moves, for whatever reason. */
#define STALLED_MS (2 * 60 * 1000)

/* How long to add up what was delivered, at the end. */
#define FOLD_MS 2000

PG_FUNCTION_INFO_V1(abp_sql_sync);

/* What has to be delivered of one table. */
typedef struct Goal
{
	Oid			relid;
	int64		last;			/* highest id waiting at the start */
	TimestampTz start;

	/* how far it was when it last moved */
	int64		first;			/* lowest ready id */
	bool		sending;
	TimestampTz moved_at;
} Goal;

typedef struct Sync
{
	MemoryContext context;		/* for the whole CALL */
	ShipScope	scope;
	TimestampTz deadline;
	TimestampTz report_at;
	Goal	   *goals;
	int			ngoals;
	bool		shipper;		/* are we? */
	int			worker_pid;		/* else the worker, since worker_looks */
	uint64		worker_looks;
	int64		delivered;		/* before the shipper's role went to another */
	const char *gave_up;		/* why not all is delivered, or NULL */
	TimestampTz fold_until;		/* 0: not all is delivered yet */
} Sync;

/* It commits, so it cannot be in a transaction of the caller's. */
static void
check_call(FunctionCallInfo fcinfo)
{
	CallContext *call = (CallContext *) fcinfo->context;

	if (call == NULL || !IsA(call, CallContext) || call->atomic)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_TRANSACTION_TERMINATION),
				 errmsg("aibilling.sync() cannot run inside a transaction block"),
				 errhint("It commits as it goes; call it by itself: CALL aibilling.sync().")));
}

/*
 * The highest id that waits in a table, or is in flight and may come back;
 * PG_INT64_MIN if there is none.
 */
static int64
highest_pending(Oid relid)
{
	IdSet		flying = abp_ledger_sending_ids(relid);
	IdSet		departed;
	int64		first;
	int64		last;
	int64		highest = PG_INT64_MIN;

	if (abp_outbox_bounds(relid, OUTBOX_READY, &first, &last))
		highest = last;
	if (abp_outbox_bounds(relid, OUTBOX_UNPRICED, &first, &last))
		highest = Max(highest, last);
	departed = abp_ledger_sending_ids(relid);	/* since the first look */
	abp_idset_add_set(&flying, &departed, CurrentMemoryContext);
	abp_idset_sort(&flying);
	if (flying.nranges > 0)
		highest = Max(highest, flying.ranges[flying.nranges - 1].last);
	return highest;
}

/* Note what waits now: in tables of the caller's, for the server that is named. */
static void
set_goals(Sync *sync)
{
	bool		armed;
	bool		mine = false;
	List	   *tables = abp_attachments(&armed);
	ListCell   *lc;

	if (!armed)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("this database is a copy and does not send"),
				 errhint("If it is to bill customers from now on, run SELECT aibilling.arm().")));

	sync->goals = palloc0(sizeof(Goal) * Max(1, list_length(tables)));
	foreach(lc, tables)
	{
		UsageTable *table = lfirst(lc);
		Goal	   *goal = &sync->goals[sync->ngoals];

		if (!OidIsValid(table->owner) || !abp_ship_in_scope(&sync->scope, table))
			continue;
		mine = true;
		if (!OidIsValid(table->serverid) || table->paused_by_operator)
			continue;

		goal->relid = table->relid;
		goal->start = goal->moved_at = GetCurrentTimestamp();
		goal->first = PG_INT64_MIN;
		goal->last = highest_pending(table->relid);
		sync->ngoals++;
	}

	if (OidIsValid(sync->scope.owner) && !mine)
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 sync->scope.server == NULL ?
				 errmsg("must be owner of a usage table") :
				 errmsg("must be owner of a usage table attached to server \"%s\"",
						sync->scope.server)));
}

/*
 * Has the worker, if it ships, been through all there is to do since we woke
 * it?  It may have been about to end a turn just then: the second one counts.
 */
static bool
worker_has_looked(const Sync *sync)
{
	return sync->worker_pid == 0 || abp_wake_worker_pid() != sync->worker_pid ||
		abp_wake_look_count() >= sync->worker_looks + 2;
}

/* Have the rows that waited for a price at the start been compared with today's? */
static bool
has_looked_for_prices(const Sync *sync, const Goal *goal)
{
	int64		first;
	int64		last;

	if (sync->shipper ? abp_positions_saw_prices(goal->relid) : worker_has_looked(sync))
		return true;
	return !(abp_outbox_bounds(goal->relid, OUTBOX_UNPRICED, &first, &last) &&
			 first <= goal->last);
}

/*
 * Is what was pending of a table at the start delivered, or set aside?  Also
 * notes whether anything has moved.
 */
static bool
goal_is_reached(const Sync *sync, Goal *goal)
{
	int64		first = PG_INT64_MAX;
	int64		last;
	bool		sending = abp_ledger_sending(goal->relid);
	bool		ready = abp_outbox_bounds(goal->relid, OUTBOX_READY, &first, &last) &&
	first <= goal->last;

	sending |= abp_ledger_sending(goal->relid); /* it may just have departed */
	if (first != goal->first || sending || sending != goal->sending)
	{
		goal->first = first;
		goal->sending = sending;
		goal->moved_at = GetCurrentTimestamp();
	}
	return !ready && !sending && abp_outbox_next_due(goal->relid) > goal->start &&
		has_looked_for_prices(sync, goal);
}

/* NULL: it is not attached any more. */
static UsageTable *
find_table(List *tables, Oid relid)
{
	UsageTable *table = abp_attachment_of(tables, relid);

	return table != NULL && OidIsValid(table->owner) ? table : NULL;
}

#define TABLE_GONE "a usage table has been dropped or detached"

/* What keeps a table from being delivered until somebody does something, or NULL. */
static const char *
obstacle(const Sync *sync, const Goal *goal, List *tables)
{
	UsageTable *table = find_table(tables, goal->relid);

	if (table == NULL)
		return TABLE_GONE;
	if (!OidIsValid(table->serverid))
		return "the server of a usage table does not exist any more";
	if (table->paused_by_operator)
		return "the server is paused; see aibilling.status";
	if (abp_ship_gave_up(table))
	{
		const char *reason = table->pause_reason ? table->pause_reason : "see aibilling.status";

		return table->paused_by_answer ?
			psprintf("the server does not accept events: %s", reason) :
			psprintf("the server was not reached or has failed, %d times so far, and is tried again later: %s",
					 table->failures, reason);
	}
	if (table->blocked_until > GetCurrentTimestamp())
		return "a usage table is blocked; see aibilling.status";
	if (sync->shipper && abp_position_is_locked_out(goal->relid))
		return "another transaction has locked rows of a usage table";
	if (TimestampDifferenceExceeds(goal->moved_at, GetCurrentTimestamp(), STALLED_MS))
		return "nothing of a usage table has moved for two minutes; see aibilling.status";
	return NULL;
}

/*
 * Is nothing left to wait for?  "idle": whoever ships has nothing to do at
 * once.  Then sync->gave_up says why something is not delivered all the same.
 */
static bool
is_done(Sync *sync, bool idle)
{
	List	   *tables = NIL;
	bool		armed;

	sync->gave_up = NULL;
	for (int i = 0; i < sync->ngoals; i++)
	{
		Goal	   *goal = &sync->goals[i];
		const char *why;

		if (goal_is_reached(sync, goal))
			continue;
		if (!idle && !TimestampDifferenceExceeds(goal->moved_at, GetCurrentTimestamp(),
												 STALLED_MS))
			return false;
		if (tables == NIL)
			tables = abp_attachments(&armed);
		why = obstacle(sync, goal, tables);
		if (why == NULL)
			return false;
		sync->gave_up = MemoryContextStrdup(sync->context, why);
	}

	/* What is gone needs nothing any more, but was not delivered either. */
	tables = abp_attachments(&armed);
	for (int i = 0; i < sync->ngoals && sync->gave_up == NULL; i++)
	{
		if (sync->goals[i].last > PG_INT64_MIN && find_table(tables, sync->goals[i].relid) == NULL)
			sync->gave_up = TABLE_GONE;
	}
	return true;
}

/*
 * Take the shipper's role if it is free.  Whoever has it keeps others from
 * it, and an owner ships only their own tables: they leave it to the
 * worker, which ships all.
 */
static void
take_or_leave_role(Sync *sync)
{
	bool		leave = OidIsValid(sync->scope.owner) && abp_wake_worker_pid() != 0;

	if (sync->shipper && leave)
	{
		sync->delivered += abp_ship_delivered();
		abp_ship_reset();
		abp_ship_unlock();
		sync->shipper = false;
	}
	else if (!sync->shipper && !leave && abp_ship_lock())
	{
		sync->shipper = true;
		abp_ship_reset();
	}
}

/* Tell the client now and then how many events have been delivered. */
static void
report_progress(Sync *sync, TimestampTz now)
{
	if (now < sync->report_at)
		return;

	ereport(INFO,
			(errmsg("aibilling.sync(): " INT64_FORMAT " events delivered so far",
					sync->delivered + (sync->shipper ? abp_ship_delivered() : 0))));
	sync->report_at = now + PROGRESS_MS * INT64CONST(1000);
}

/*
 * All is delivered.  Where there is no worker, nobody else adds it to the
 * rollup: do so for a while.
 */
static bool
goes_on_folding(Sync *sync, TimestampTz now)
{
	if (!sync->shipper)
		return false;
	if (sync->fold_until == 0)
	{
		sync->fold_until = now + FOLD_MS * INT64CONST(1000);
		abp_fold_now();
	}
	return abp_fold_is_behind() && now < Min(sync->fold_until, sync->deadline);
}

/*
 * Be the shipper while nobody else is, else wake and watch the one that is.
 */
static void
deliver(Sync *sync)
{
	static uint32 wait_event = 0;

	for (;;)
	{
		long		due = POLL_MS;
		bool		done;
		TimestampTz now;

		CHECK_FOR_INTERRUPTS();

		take_or_leave_role(sync);
		if (sync->shipper)
			due = abp_ship(&sync->scope);
		else
			abp_wake_worker();

		abp_ship_begin(&sync->scope);
		done = is_done(sync, !sync->shipper || due != 0);
		abp_ship_commit(&sync->scope);
		now = GetCurrentTimestamp();
		if (done && !goes_on_folding(sync, now))
			return;
		if (now >= sync->deadline)
		{
			sync->gave_up = "the timeout was reached";
			return;
		}
		report_progress(sync, now);
		if (due == 0)
			continue;

		due = due < 0 ? POLL_MS : Min(due, PROGRESS_MS);
		if (sync->deadline != DT_NOEND)
			due = Min(due, Max(1, TimestampDifferenceMilliseconds(now, sync->deadline)));
		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
						 due, abp_wait_event(&wait_event, "AibillingPolarSync"));
		ResetLatch(MyLatch);
	}
}

/*
 * CALL aibilling.sync(server, timeout): deliver what is pending now, and
 * return when it is delivered or set aside.  While the worker ships, or
 * another session does, wake it and wait.
 */
Datum
abp_sql_sync(PG_FUNCTION_ARGS)
{
	Sync		sync = {
		.scope = {true, superuser() ? InvalidOid : GetUserId(), NULL},
		.deadline = DT_NOEND
	};

	check_call(fcinfo);
	abp_extension_check_version();

	/* Outlives the transactions that follow, and goes with the CALL. */
	sync.context = AllocSetContextCreate(PortalContext, "aibilling_polar sync", ALLOCSET_DEFAULT_SIZES);
	SPI_connect_ext(SPI_OPT_NONATOMIC);
	MemoryContextSwitchTo(sync.context);
	if (!PG_ARGISNULL(0))
	{
		sync.scope.server = pstrdup(NameStr(*PG_GETARG_NAME(0)));
		(void) GetForeignServerByName(sync.scope.server, false);
	}
	if (!PG_ARGISNULL(1))
		sync.deadline =
			DatumGetTimestampTz(DirectFunctionCall2(timestamptz_pl_interval,
													TimestampTzGetDatum(GetCurrentTimestamp()),
													PG_GETARG_DATUM(1)));
	sync.report_at = GetCurrentTimestamp() + PROGRESS_MS * INT64CONST(1000);
	set_goals(&sync);
	sync.worker_pid = abp_wake_worker_pid();
	sync.worker_looks = abp_wake_look_count();
	SPI_commit();

	PG_TRY();
	{
		deliver(&sync);
	}
	PG_CATCH();
	{
		/* The lock goes with the transaction; what was sent is settled later. */
		abp_http_cancel_all();
		PG_RE_THROW();
	}
	PG_END_TRY();

	if (sync.gave_up != NULL)
		ereport(WARNING,
				(errcode(ERRCODE_WARNING),
				 errmsg("aibilling.sync() stopped before everything was delivered: %s",
						sync.gave_up)));
	if (sync.shipper)
	{
		ereport(NOTICE,
				(errmsg("aibilling.sync() delivered " INT64_FORMAT " events",
						sync.delivered + abp_ship_delivered())));
		abp_ship_reset();
		abp_ship_unlock();
		abp_wake_worker();
	}
	SPI_finish();
	PG_RETURN_VOID();
}
