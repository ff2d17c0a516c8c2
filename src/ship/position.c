/*-------------------------------------------------------------------------
 *
 * position.c
 *	  How a table stands: where its scans are, how it has behaved, and work on it that may fail.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "storage/lmgr.h"
#include "utils/timestamp.h"

#include "base/idset.h"
#include "polar/server.h"
#include "queue/attachment.h"
#include "queue/outbox.h"
#include "ship/guard.h"
#include "ship/position.h"
#include "ship/turn.h"

#define LOCKED_LONG_MS (10 * 1000)	/* and when to call it blocked */

static List *positions = NIL;

/* How often these were found changed: what compares knows what it has missed. */
static uint64 prices_generation = 1;
static uint64 servers_generation = 1;

/*
 * How a table stands; made at its first use.
 */
Position   *
abp_position_of(Oid usage_table)
{
	MemoryContext old;
	ListCell   *lc;
	Position   *position;

	foreach(lc, positions)
	{
		position = lfirst(lc);
		if (position->usage_table == usage_table)
			return position;
	}

	old = MemoryContextSwitchTo(abp_shipper_memory);
	position = palloc0(sizeof(Position));
	position->usage_table = usage_table;
	position->cursor = PG_INT64_MIN;
	position->unpriced_cursor = ENTRY_CURSOR_START;
	position->servers_seen = servers_generation;
	positions = lappend(positions, position);
	MemoryContextSwitchTo(old);
	return position;
}

/* Has no scan over the waiting rows begun since prices or servers changed? */
bool
abp_position_wants_prices(const Position *position)
{
	return position->looked_for != prices_generation;
}

/* Have servers or user mappings changed since the table's last turn? */
bool
abp_position_servers_are_new(const UsageTable *table)
{
	return abp_position_of(table->relid)->servers_seen != servers_generation;
}

/* The scan that is on its way, if any, has not seen all. */
void
abp_position_look_again(Turn *turn, Oid usage_table)
{
	Position   *position = abp_position_of(usage_table);

	position->scanned_for = position->looked_for = 0;
	turn->more_to_build = true;
}

/*
 * Leave a table alone until then.  Not longer than for a while, should the
 * reason be impossible to write down: its owner has locked what stands there.
 */
void
abp_position_block(Turn *turn, const UsageTable *table, const char *reason, TimestampTz until)
{
	if (!abp_attachment_block(table->relid, reason, until))
	{
		until = Min(until, abp_turn_in_ms(TRANSIENT_MS));
		abp_position_of(table->relid)->try_at = until;
	}
	abp_turn_due_at(turn, until);
}

/* Look at rows that others are changing again soon, if nothing tells before. */
void
abp_position_hold_rows(Turn *turn, const UsageTable *table, const IdSet *ids)
{
	Position   *position = abp_position_of(table->relid);
	TimestampTz now = GetCurrentTimestamp();

	abp_idset_add_set(&position->held, ids, abp_shipper_memory);
	if (TimestampDifferenceExceeds(position->held_until, now, HELD_MS))
		position->held_since = now;
	position->held_until = abp_turn_in_ms(HELD_MS);
	abp_turn_due_at(turn, position->held_until);
}

/* Another transaction has locked the table, or what we need of it. */
static void
note_locked(Turn *turn, const UsageTable *table)
{
	Position   *position = abp_position_of(table->relid);
	const char *reason = "another transaction has locked the table";
	TimestampTz until = abp_turn_in_ms(LOCKED_LONG_MS);

	position->failed = true;
	position->try_at = abp_turn_in_ms(LOCKED_MS);
	abp_turn_due_at(turn, position->try_at);
	if (position->locked_since == 0)
		position->locked_since = GetCurrentTimestamp();
	if (!TimestampDifferenceExceeds(position->locked_since, GetCurrentTimestamp(),
									LOCKED_LONG_MS))
		return;

	if (table->blocked_reason == NULL)
		ereport(WARNING,
				(errcode(ERRCODE_LOCK_NOT_AVAILABLE),
				 errmsg("usage rows of %s cannot be delivered: %s", table->name, reason)));
	abp_position_block(turn, table, reason, until);
}

typedef struct GuardedTableWork
{
	Turn	   *turn;
	TableWork	work;
	const UsageTable *table;
	const ServerOptions *server;
	void	   *arg;
} GuardedTableWork;

/* Under guard: the work itself. */
static void
do_table_work(void *arg)
{
	GuardedTableWork *guarded = arg;

	guarded->work(guarded->turn, guarded->table, guarded->server, guarded->arg);
}

/*
 * Do something with a table's rows.  An error (a policy, a changed column, a
 * failing trigger) undoes it and blocks the table for a while, not the others.
 * A lock of another transaction's is not waited for.
 */
GuardOutcome
abp_position_guarded(Turn *turn, TableWork work, const UsageTable *table, const ServerOptions *server, void *arg)
{
	GuardedTableWork call = {turn, work, table, server, arg};
	Position   *position = abp_position_of(table->relid);
	GuardError	error;
	GuardOutcome outcome;
	TimestampTz until;

	if (!abp_attachment_hold(table->relid) ||
		!ConditionalLockRelationOid(table->relid, AccessShareLock))
	{
		note_locked(turn, table);
		return GUARD_PASSES;
	}
	outcome = abp_guard(table, do_table_work, &call, &error);
	if (outcome == GUARD_DONE)
	{
		position->locked_since = 0;
		return outcome;
	}

	position->cursor = PG_INT64_MIN;
	position->unpriced_cursor = ENTRY_CURSOR_START;
	position->failed = true;
	if (outcome == GUARD_PASSES && error.sqlerrcode == ERRCODE_LOCK_NOT_AVAILABLE)
	{
		note_locked(turn, table);
		return outcome;
	}
	position->locked_since = 0;
	if (table->blocked_reason == NULL)
		ereport(WARNING,
				(errcode(error.sqlerrcode),
				 errmsg("usage rows of %s cannot be delivered: %s", table->name, error.message),
				 errhint("Fix the cause; delivery of the table resumes by itself.")));

	/*
	 * What a batch needs is too much just now; those that pass let it grow
	 * again.
	 */
	if (outcome == GUARD_NO_MEMORY)
		position->batch_size = Max(1, (position->batch_size > 0 ? position->batch_size :
									   server->batch_size) / 2);
	until = abp_turn_in_ms(outcome == GUARD_FAILED ? PROBE_MS : TRANSIENT_MS);
	abp_position_block(turn, table, error.message, until);
	return outcome;
}

/* Keep a table from being delivered for a while, with the reason. */
void
abp_position_refuse(Turn *turn, const UsageTable *table, const char *reason)
{
	TimestampTz until = abp_turn_in_ms(PROBE_MS);

	if (table->blocked_reason == NULL)
		ereport(WARNING,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("usage rows of %s cannot be delivered: %s", table->name, reason),
				 errhint("Fix the cause; delivery of the table resumes by itself.")));
	abp_position_block(turn, table, reason, until);
}

/* Keep no positions of tables that are not attached any more. */
void
abp_positions_forget_except(List *tables)
{
	ListCell   *lc;

	foreach(lc, positions)
	{
		Position   *position = lfirst(lc);

		if (abp_attachment_of(tables, position->usage_table) == NULL)
		{
			positions = foreach_delete_current(positions, lc);
			abp_idset_free(&position->held);
			pfree(position);
		}
	}
}

/*
 * Have all rows of a table that wait for a price been compared with today's
 * prices?  InvalidOid: of all tables that are served at present.
 */
bool
abp_positions_saw_prices(Oid relid)
{
	ListCell   *lc;

	foreach(lc, positions)
	{
		const Position *position = lfirst(lc);

		if ((relid == InvalidOid ? !position->barred : position->usage_table == relid) &&
			abp_position_wants_prices(position) && position->unpriced_at <= GetCurrentTimestamp())
			return false;
	}
	return true;
}

/*
 * Have other transactions kept us from rows of a table for long?
 */
bool
abp_position_is_locked_out(Oid relid)
{
	const Position *position = abp_position_of(relid);
	TimestampTz now = GetCurrentTimestamp();

	return position->unpriced_left ||
		(position->locked_since != 0 &&
		 TimestampDifferenceExceeds(position->locked_since, now, LOCKED_LONG_MS)) ||
		(position->held.nranges > 0 &&
		 TimestampDifferenceExceeds(position->held_since, now, LOCKED_LONG_MS));
}

/*
 * Forget all positions; their memory is the caller's.
 */
void
abp_positions_forget(void)
{
	positions = NIL;
}

/*
 * Prices or servers have changed: every table is to notice.  A server that has
 * changed may send what has no price.
 */
void
abp_positions_note_changes(bool prices, bool servers)
{
	if (servers)
		servers_generation++;
	if (prices || servers)
		prices_generation++;
}

/*
 * A table's scan over the rows that wait for a price begins: what comes from
 * now on is for the next one.
 */
void
abp_position_begin_price_scan(Position *position)
{
	position->scanned_for = prices_generation;
	position->unpriced_left = false;
}

/*
 * A table has had its turn with the servers as they are.
 */
void
abp_position_saw_servers(Position *position)
{
	position->servers_seen = servers_generation;
}
