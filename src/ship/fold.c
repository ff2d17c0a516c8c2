/*-------------------------------------------------------------------------
 *
 * fold.c
 *	  Into the rollup, when there is time for it.
 *
 * What deliveries add up to is folded into the rollup when for a while nothing
 * was delivered; while there is a backlog, with long pauses; while rows come, in
 * small pieces and with pauses, so that a row waits for one piece at most.
 * Deliveries of an older version, which has not added them up, are added up here
 * too, from their rows.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "miscadmin.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"
#include "utils/timestamp.h"

#include "base/statement.h"
#include "compat.h"
#include "queue/attachment.h"
#include "queue/shares.h"
#include "ship/fold.h"
#include "ship/guard.h"
#include "ship/turn.h"
#include "usage/rollup.h"
#include "usage/share_key.h"

/* For so long after a delivery others are likely to follow. */
#define LIVELY_MS 1000

/* A backlog that is gone by then is not held up. */
#define BACKLOG_MS (5 * 1000)

/* How many groups make a piece, some 30 us each: while rows come, while none do, with a backlog. */
#define LIVELY_GROUPS 100
#define QUIET_GROUPS 500
#define BACKLOG_GROUPS 6000

/* The pause after a piece, in times of what it took: with a backlog, and while rows come. */
#define BACKLOG_PAUSE 50
#define LIVELY_PAUSE 4

/* When to try again what has failed. */
#define AFTER_ERROR_MS (10 * 1000)
#define TABLE_ERROR_MS (5 * 60 * 1000)

/* How many deliveries of an older version are looked at in one step, and how long. */
#define SUM_SHARES 50
#define SUM_MS 100

static bool may_have_shares = true;
static int64 fold_from = 0;
static TimestampTz fold_at = 0; /* not before this, if lively or failed */
static TimestampTz lively_until = 0;
static bool had_backlog = false;	/* in the last turn */
static bool fold_failed = false;	/* the last time */

static bool may_have_unknown = true;
static int64 unknown_from = 0;
static bool unknown_failed = false; /* for a table, since unknown_from was 0 */
static TimestampTz unknown_at = 0;

/*
 * A new shipper knows nothing.
 */
void
abp_fold_reset(void)
{
	may_have_shares = may_have_unknown = true;
	fold_from = unknown_from = 0;
	fold_at = lively_until = unknown_at = 0;
	had_backlog = unknown_failed = fold_failed = false;
}

/*
 * A batch has been delivered.
 */
void
abp_fold_delivered(void)
{
	lively_until = abp_turn_in_ms(LIVELY_MS);
	if (!may_have_shares)
		fold_at = Max(fold_at, lively_until);
	may_have_shares = true;
}

/*
 * Nothing more will be delivered for a while.
 */
void
abp_fold_now(void)
{
	lively_until = 0;
}

/* May known shares be folded now, by somebody who has nothing else to do? */
static bool
may_fold(TimestampTz now)
{
	return may_have_shares && (fold_at <= now || (lively_until <= now && !fold_failed));
}

/*
 * Is there more to fold at once?
 */
bool
abp_fold_is_behind(void)
{
	TimestampTz now = GetCurrentTimestamp();

	return may_fold(now) || (may_have_unknown && unknown_at <= now);
}

/* One part of what was delivered. */
typedef struct FoldStep
{
	int			max_groups;
	bool		more;			/* result: may there be more? */
} FoldStep;

/* Under guard: add one part of what was delivered to the rollup. */
static void
fold_step(void *arg)
{
	FoldStep   *step = arg;

	CommandCounterIncrement();
	PushActiveSnapshot(GetLatestSnapshot());
	step->more = abp_rollup_fold(&fold_from, step->max_groups);
	PopActiveSnapshot();
}

/* A delivery whose rows are to be summed up. */
typedef struct SumStep
{
	const UsageTable *table;
	Share	   *share;
} SumStep;

/*
 * Under guard: read the rows of a delivery whose sums are not known, and add
 * them up.
 */
static void
sum_step(void *arg)
{
	SumStep    *step = arg;
	Share	   *share = step->share;
	IdSet		ids;
	IdSet		counted;

	CommandCounterIncrement();
	PushActiveSnapshot(GetLatestSnapshot());
	counted = share->knows_counted ? share->counted :
		abp_shares_counted(share->usage_table, &share->ids, step->table->ledger_from);
	ids = abp_idset_subtract(&share->ids, &counted);
	abp_guard_start_clock();
	abp_shares_set_sums(share->delivery,
						abp_rollup_sum_rows(step->table, &ids, abp_share_key_format(step->table->serverid)));
	PopActiveSnapshot();
}

/* Sum up the rows of one delivery.  Returns false if they cannot be read. */
static bool
sum_up(List *tables, Share *share)
{
	UsageTable *table;
	SumStep		step = {.share = share};
	GuardError	error;

	if (!SearchSysCacheExists1(RELOID, ObjectIdGetDatum(share->usage_table)))
	{
		abp_shares_forget(share->usage_table);
		return true;
	}
	table = abp_attachment_of(tables, share->usage_table);
	step.table = table != NULL ? table : abp_attachment_former(share->usage_table);
	if (abp_guard(step.table, sum_step, &step, &error) == GUARD_DONE)
		return true;
	if (!unknown_failed)
		ereport(WARNING,
				(errcode(error.sqlerrcode),
				 errmsg("delivered rows of %s cannot be added up yet: %s", step.table->name, error.message)));
	return false;
}

/* Go on with the deliveries of an older version.  Returns whether there may be more. */
static bool
sum_up_some(List *tables)
{
	TimestampTz start = GetCurrentTimestamp();
	List	   *shares = abp_shares_to_fold(unknown_from, SUM_SHARES, true);
	ListCell   *lc;

	foreach(lc, shares)
	{
		Share	   *share = lfirst(lc);

		CHECK_FOR_INTERRUPTS();

		if (TimestampDifferenceExceeds(start, GetCurrentTimestamp(), SUM_MS))
			return true;
		unknown_from = share->delivery + 1;
		may_have_shares = true;
		fold_from = Min(fold_from, share->delivery);
		if (!sum_up(tables, share))
			unknown_failed = true;
	}
	if (list_length(shares) == SUM_SHARES)
		return true;

	/* Those that failed are tried again. */
	may_have_unknown = unknown_failed;
	unknown_at = unknown_failed ? GetCurrentTimestamp() + TABLE_ERROR_MS * INT64CONST(1000) : 0;
	unknown_from = 0;
	unknown_failed = false;
	return false;
}

/* The same for the shares that are known. */
static bool
fold_some(bool idle, bool backlog)
{
	TimestampTz start = GetCurrentTimestamp();
	bool		lively = !idle || lively_until > start;
	FoldStep	step = {
		.max_groups = backlog ? BACKLOG_GROUPS : lively ? LIVELY_GROUPS : QUIET_GROUPS
	};
	GuardError	error;

	if (abp_guard(NULL, fold_step, &step, &error) != GUARD_DONE)
	{
		if (!fold_failed)
			ereport(WARNING,
					(errcode(error.sqlerrcode),
					 errmsg("what was delivered cannot be added up yet: %s", error.message)));
		fold_failed = true;
		fold_from = 0;
		fold_at = GetCurrentTimestamp() + AFTER_ERROR_MS * INT64CONST(1000);
		return false;
	}
	fold_failed = false;
	may_have_shares = step.more;
	fold_at = GetCurrentTimestamp();
	if (lively)
		fold_at += (fold_at - start) * (idle ? LIVELY_PAUSE : BACKLOG_PAUSE);
	return step.more;
}

/*
 * Do some of it, in the shipper's transaction.  "idle": nothing else is to be
 * done at present.  Notes when there will be more to do.  Returns whether
 * there is more at once.
 */
bool
abp_fold(Turn *turn, List *tables, bool idle)
{
	TimestampTz now = GetCurrentTimestamp();
	bool		more = false;

	if (turn->backlog && !had_backlog)
		fold_at = Max(fold_at, now + BACKLOG_MS * INT64CONST(1000));
	had_backlog = turn->backlog;

	if (idle ? may_fold(now) : may_have_shares && fold_at <= now)
		more = fold_some(idle, turn->backlog) && may_fold(now);
	if (idle && may_have_unknown && unknown_at <= now)
		more |= sum_up_some(tables) || may_fold(now);
	if (may_have_shares && fold_at > now)
		abp_turn_due_at(turn, idle && !fold_failed ? Min(fold_at, lively_until) : fold_at);
	if (may_have_unknown && unknown_at > now)
		abp_turn_due_at(turn, unknown_at);
	return idle && more;
}
