/*-------------------------------------------------------------------------
 *
 * unpriced.c
 *	  Rows that wait for a price: priced when it has come.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "commands/trigger.h"
#include "miscadmin.h"
#include "utils/jsonb.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

#include "base/idset.h"
#include "base/usage_row.h"
#include "polar/server.h"
#include "queue/attachment.h"
#include "queue/entry.h"
#include "queue/outbox.h"
#include "ship/fill.h"
#include "ship/guard.h"
#include "ship/position.h"
#include "ship/turn.h"
#include "ship/unpriced.h"
#include "usage/fate.h"
#include "usage/rows.h"
#include "usage/priced.h"

/* How many unpriced entries are looked at in one turn. */
#define UNPRICED_PER_TURN 32

/* Rows of an unpriced entry, looked at again. */
typedef struct PriceLook
{
	const UsageTable *table;
	const ServerOptions *server;
	const OutboxEntry *entry;
	IdSet	   *ids;			/* the rows to look at */
	int64		nrows;
	IdSet		seen;
	IdSet		priced;			/* can be priced by now */
	IdSet		gone;			/* have no row: sending them will tell */
	IdSet		moved;			/* are in "others" */
	List	   *others;			/* OutboxEntry *, of rows that are ready by
								 * now, have another reason to wait, or are
								 * rejected */
	MemoryContext context;
} PriceLook;

/* A row leaves its entry for one of another state or reason. */
static void
move_to(PriceLook *look, int64 id, char state, TimestampTz not_before, const char *error)
{
	OutboxEntry *other = NULL;
	MemoryContext old = MemoryContextSwitchTo(look->context);
	ListCell   *lc;

	foreach(lc, look->others)
	{
		OutboxEntry *candidate = lfirst(lc);

		if (candidate->state == state && candidate->not_before == not_before &&
			(error == NULL ? candidate->error == NULL :
			 candidate->error != NULL && strcmp(candidate->error, error) == 0))
			other = candidate;
	}
	if (other == NULL)
	{
		other = palloc(sizeof(OutboxEntry));
		*other = *look->entry;
		memset(&other->ids, 0, sizeof(other->ids));
		other->state = state;
		other->not_before = not_before;
		other->error = error == NULL ? NULL : pstrdup(error);
		look->others = lappend(look->others, other);
	}
	abp_idset_add(&other->ids, id, id, look->context);
	abp_idset_add(&look->moved, id, id, look->context);
	MemoryContextSwitchTo(old);
}

/* Several rows leave their entry. */
static void
move_all(PriceLook *look, const IdSet *ids, char state, const char *error)
{
	IdWalk		walk = {0};

	while (abp_idset_walk(ids, &walk))
		move_to(look, walk.id, state, DT_NOBEGIN, error);
}

/* Has a row that waits a price by now, or another reason to wait? */
static bool
look_for_price(const UsageRow *row, Jsonb *whole, void *arg)
{
	PriceLook  *look = arg;
	RowState	fate;

	look->nrows++;
	abp_idset_add(&look->seen, row->id, row->id, look->context);
	abp_fate_by_price(row, &fate);
	if (fate.state == OUTBOX_READY)
		abp_idset_add(&look->priced, row->id, row->id, look->context);
	else if (fate.state != OUTBOX_UNPRICED || look->entry->error == NULL ||
			 strcmp(fate.error, look->entry->error) != 0)
		move_to(look, row->id, fate.state, DT_NOBEGIN, fate.error);
	return true;
}

/* What has the UPDATE made of a row that has a price? */
static bool
look_at_priced(const UsageRow *row, Jsonb *whole, void *arg)
{
	PriceLook  *look = arg;
	RowState	fate;

	abp_fate_of(row, look->server, &fate);
	if (fate.state == OUTBOX_UNPRICED)
	{
		fate.state = OUTBOX_REJECTED;
		fate.error = "it has a price, but a trigger or rule of its table keeps the cost from being stored";
	}
	move_to(look, row->id, fate.state, fate.not_before, fate.error);
	return true;
}

/*
 * Deferred triggers of the table's owner fire at the end of their statement:
 * at our commit they would run with our rights.
 */
static void
fire_deferred_at_once(void)
{
	ConstraintsSetStmt *all = makeNode(ConstraintsSetStmt);

	AfterTriggerSetState(all);
}

/*
 * Of rows that share an id one may be delivered: they are not priced, but
 * rejected.
 */
static void
reject_shared(PriceLook *look)
{
	IdSet		shared = abp_rows_shared(look->table, &look->seen);
	ListCell   *lc;

	look->priced = abp_idset_subtract(&look->priced, &shared);
	foreach(lc, look->others)
	{
		OutboxEntry *other = lfirst(lc);

		other->ids = abp_idset_subtract(&other->ids, &shared);
	}
	move_all(look, &shared, OUTBOX_REJECTED, SHARED_ID);
}

/* Under guard: what has become of the rows? */
static void
look_at_rows(void *arg)
{
	PriceLook  *look = arg;

	if (look->server->send_unpriced)
		look->priced = abp_idset_copy(look->ids);
	else
	{
		abp_rows_read(look->table, look->ids, false, look_for_price, look);
		look->gone = abp_idset_subtract(look->ids, &look->seen);
		move_all(look, &look->gone, OUTBOX_READY, NULL);
	}
	if (look->nrows > abp_idset_count(&look->seen))
		reject_shared(look);
}

/* Price what can be priced, and tell where it belongs. */
static void
price_rows(void *arg)
{
	PriceLook  *look = arg;

	if (look->priced.nranges == 0)
		return;
	if (!look->server->send_unpriced)
	{
		fire_deferred_at_once();
		(void) abp_priced_reprice(look->table, &look->priced, true);
		CommandCounterIncrement();
	}
	PushActiveSnapshot(GetLatestSnapshot());
	abp_rows_read(look->table, &look->priced, false, look_at_priced, look);
	PopActiveSnapshot();
}

/* Under guard: both steps, for a row on its own. */
static void
look_and_price(void *arg)
{
	look_at_rows(arg);
	price_rows(arg);
}

/*
 * Under guard: does storing prices fail whatever the row, as where rights are
 * missing?
 */
static void
price_no_row(void *arg)
{
	PriceLook  *look = arg;
	IdSet		none = {0};

	(void) abp_priced_reprice(look->table, &none, true);
}

/* All rows that are looked at go on waiting, with this reason. */
static void
say_of_all(PriceLook *look, const char *problem)
{
	char	   *error = psprintf("no price of this table can be stored: %s", problem);

	if (look->entry->error != NULL && strcmp(look->entry->error, error) == 0)
		return;
	move_all(look, look->ids, OUTBOX_UNPRICED, error);
}

/*
 * A row cannot be priced: it is rejected, unless no row of the table can.
 * Returns whether to go on with the next one.
 */
static bool
refuse_price(PriceLook *look, int64 id, const GuardError *error)
{
	GuardError	general;

	if (look->moved.nranges == 0 &&
		abp_guard(look->table, price_no_row, look, &general) != GUARD_DONE)
	{
		say_of_all(look, general.message);
		return false;
	}
	move_to(look, id, OUTBOX_REJECTED, DT_NOBEGIN,
			psprintf("its price cannot be stored: %s", error->message));
	return true;
}

/*
 * The same with one row after the other: those that fail are rejected and keep
 * none of the others.  Returns whether all of them were looked at.
 */
static bool
look_carefully(PriceLook *look)
{
	IdWalk		walk = {0};
	bool		all = true;
	TimestampTz start = GetCurrentTimestamp();

	while (abp_idset_walk(look->ids, &walk))
	{
		IdSet		one = {0};
		PriceLook	part = *look;
		GuardError	error;
		GuardOutcome outcome;
		ListCell   *lc;

		CHECK_FOR_INTERRUPTS();

		if (TimestampDifferenceExceeds(start, GetCurrentTimestamp(), TURN_MS))
			return false;
		abp_idset_add(&one, walk.id, walk.id, look->context);
		part.ids = &one;
		part.others = NIL;
		part.nrows = 0;
		memset(&part.seen, 0, sizeof(IdSet));
		memset(&part.priced, 0, sizeof(IdSet));
		memset(&part.moved, 0, sizeof(IdSet));
		abp_guard_start_clock();
		outcome = abp_guard(look->table, look_and_price, &part, &error);
		abp_guard_start_clock();
		if (outcome == GUARD_PASSES || outcome == GUARD_NO_MEMORY)
			all = false;
		else if (outcome != GUARD_DONE)
		{
			if (look->moved.nranges == 0)
				abp_fill_read_no_row(look->table, false);
			if (!refuse_price(look, walk.id, &error))
				return false;
		}
		else
		{
			foreach(lc, part.others)
			{
				OutboxEntry *other = lfirst(lc);

				if (abp_idset_contains(&other->ids, walk.id))
					move_to(look, walk.id, other->state, other->not_before, other->error);
			}
		}
	}
	return all;
}

/* Rows to be locked under guard. */
typedef struct GuardedLock
{
	const UsageTable *table;
	IdSet		ids;
	IdSet		locked;
} GuardedLock;

/* Under guard: lock the rows that nobody else is changing. */
static void
lock_rows(void *arg)
{
	GuardedLock *lock = arg;

	lock->locked = abp_rows_lock(lock->table, &lock->ids, false);
}

/* A step of the scan over a table's unpriced entries. */
typedef struct UnpricedStep
{
	bool		tidy;			/* false: nothing was done yet */
	bool		found;			/* an entry that was not the last one */
	bool		complete;		/* all of its rows were looked at */
} UnpricedStep;

/*
 * Price what can be priced of an unpriced entry, and tell where its rows
 * belong, row by row if need be.  Only such as we can lock, and that nobody
 * has taken out of the entry meanwhile: who changes a row decides where it
 * stands.  Returns whether these were all.
 */
static bool
price_entry(PriceLook *look, IdSet *wanted, GuardOutcome looked)
{
	PriceLook	before = *look;
	GuardedLock lock = {look->table, *wanted};
	GuardError	error;
	GuardOutcome outcome = abp_guard(look->table, lock_rows, &lock, &error);
	IdSet		still;
	IdSet	   *ours = palloc(sizeof(IdSet));
	ListCell   *lc;

	if (outcome == GUARD_PASSES)
		lock.locked.nranges = 0;
	abp_idset_add_set(&lock.locked, &look->gone, CurrentMemoryContext);
	PushActiveSnapshot(GetLatestSnapshot());
	still = abp_outbox_entry_left(look->entry);
	PopActiveSnapshot();
	*ours = abp_idset_intersect(outcome == GUARD_DONE || outcome == GUARD_PASSES ? &lock.locked :
								&lock.ids, &still);
	if (outcome != GUARD_DONE && outcome != GUARD_PASSES)
	{
		memset(&look->moved, 0, sizeof(IdSet));
		look->others = NIL;
		look->ids = ours;
		say_of_all(look, error.message);
		return false;
	}
	if (ours->nranges == 0)
	{
		look->others = NIL;
		return false;
	}

	if (looked == GUARD_DONE)
	{
		look->priced = abp_idset_intersect(&look->priced, ours);
		foreach(lc, look->others)
		{
			OutboxEntry *other = lfirst(lc);

			other->ids = abp_idset_intersect(&other->ids, ours);
		}
		look->moved = abp_idset_intersect(&look->moved, ours);
		abp_guard_start_clock();
		looked = abp_guard(look->table, price_rows, look, &error);
	}
	if (looked != GUARD_DONE)
	{
		*look = before;
		look->ids = ours;
		look->nrows = 0;
		memset(&look->seen, 0, sizeof(IdSet));
		memset(&look->priced, 0, sizeof(IdSet));
		memset(&look->moved, 0, sizeof(IdSet));
		look->others = NIL;
		if (!look_carefully(look))
			return false;
	}
	return abp_idset_count(ours) == abp_idset_count(wanted);
}

/*
 * Rows that wait for a price: price and release those that have one by now,
 * and have the others say what they lack by now.  Those that no price can help
 * are rejected.
 */
static void
release_unpriced(Turn *turn, const UsageTable *table, const ServerOptions *server, void *arg)
{
	UnpricedStep *step = arg;
	Position   *position = abp_position_of(table->relid);
	OutboxEntry *entry;
	PriceLook	look = {.table = table,.server = server,.context = CurrentMemoryContext};
	IdSet		wanted;
	GuardError	error;
	GuardOutcome outcome;
	OutboxEntry *out;
	int			nout = 0;
	ListCell   *lc;

	step->complete = true;
	step->tidy = abp_outbox_tidy(table->relid, TIDY_PER_TURN);
	if (!step->tidy)
		return;
	CommandCounterIncrement();
	UpdateActiveSnapshotCommandId();
	entry = abp_outbox_next_unpriced(table->relid, &position->unpriced_cursor);
	step->found = entry != NULL;
	if (entry == NULL)
		return;

	look.entry = entry;
	look.ids = &entry->ids;
	abp_guard_start_clock();
	outcome = abp_guard(table, look_at_rows, &look, &error);
	if (outcome == GUARD_DONE)
	{
		wanted = abp_idset_copy(&look.priced);
		abp_idset_add_set(&wanted, &look.moved, CurrentMemoryContext);
		if (wanted.nranges == 0)
			return;
	}
	else
		wanted = abp_idset_copy(&entry->ids);
	abp_idset_sort(&wanted);

	step->complete = price_entry(&look, &wanted, outcome);
	if (look.others == NIL)
		return;
	if (!abp_outbox_take_entry(entry))
		ereport(ERROR,
				(errcode(ERRCODE_LOCK_NOT_AVAILABLE),
				 errmsg("another transaction is at rows that wait for a price")));
	out = palloc((1 + list_length(look.others)) * sizeof(OutboxEntry));
	foreach(lc, look.others)
	{
		out[nout] = *(OutboxEntry *) lfirst(lc);
		if (out[nout++].state == OUTBOX_READY)
			position->cursor = PG_INT64_MIN;
	}
	out[nout] = *entry;
	out[nout++].ids = abp_idset_subtract(&entry->ids, &look.moved);
	abp_outbox_put(out, nout);
}

/* The same by one snapshot, of what is in the outbox and of the rows. */
static void
release_unpriced_at_once(Turn *turn, const UsageTable *table, const ServerOptions *server, void *arg)
{
	PushActiveSnapshot(GetLatestSnapshot());
	release_unpriced(turn, table, server, arg);
	PopActiveSnapshot();
}

/* Go on with the scan over a table's rows that wait for a price. */
void
abp_unpriced_scan(Turn *turn, const UsageTable *table, const ServerOptions *server)
{
	Position   *position = abp_position_of(table->relid);

	if (!abp_position_wants_prices(position))
		return;
	if (position->unpriced_at > GetCurrentTimestamp())
	{
		abp_turn_due_at(turn, position->unpriced_at);
		return;
	}

	if (position->unpriced_cursor.id == PG_INT64_MIN)
		abp_position_begin_price_scan(position);
	for (int i = 0; i < UNPRICED_PER_TURN && !abp_turn_is_over(turn); i++)
	{
		UnpricedStep step;

		CHECK_FOR_INTERRUPTS();

		if (abp_position_guarded(turn, release_unpriced_at_once, table, server, &step) != GUARD_DONE)
		{
			/* what is ready has its turn before */
			position->unpriced_at = abp_turn_in_ms(TRANSIENT_MS);
			return;
		}
		if (!step.tidy)
		{
			abp_turn_due_at(turn, abp_turn_in_ms(GATHER_MIN_MS));
			return;
		}
		position->unpriced_left |= !step.complete;
		if (step.found)
			continue;

		position->unpriced_cursor = ENTRY_CURSOR_START;
		if (!position->unpriced_left)
			position->looked_for = position->scanned_for;
		else
		{
			position->unpriced_at = abp_turn_in_ms(HELD_MS);
			abp_turn_due_at(turn, position->unpriced_at);
		}
		if (!abp_position_wants_prices(position) || position->unpriced_left)
			return;
	}
	turn->more_to_build = true;
}
