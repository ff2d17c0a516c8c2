/*-------------------------------------------------------------------------
 *
 * fill.c
 *	  A request's body, filled from usage rows.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "miscadmin.h"
#include "utils/jsonb.h"
#include "utils/timestamp.h"

#include "base/idset.h"
#include "base/usage_row.h"
#include "polar/event.h"
#include "polar/event_format.h"
#include "polar/server.h"
#include "queue/attachment.h"
#include "queue/entry.h"
#include "queue/ledger.h"
#include "queue/outbox.h"
#include "queue/shares.h"
#include "ship/families.h"
#include "ship/fill.h"
#include "ship/guard.h"
#include "ship/position.h"
#include "ship/shipment.h"
#include "ship/turn.h"
#include "ship/user_code.h"
#include "usage/fate.h"
#include "usage/parents.h"
#include "usage/partitions.h"
#include "usage/rows.h"

#define ROW_TOO_LARGE_TRIES 3	/* for our memory, before it is held */

/* A row does not go with this batch: its fate says where it goes. */
static void
set_aside(Filling *filling, int64 id, const RowState *fate)
{
	MemoryContext old = MemoryContextSwitchTo(filling->context);
	OutboxEntry *entry = palloc0(sizeof(OutboxEntry));

	entry->usage_table = filling->table->relid;
	entry->state = fate->state;
	entry->not_before = fate->not_before;
	entry->attempts = filling->shipment->delivery.prior_attempts;
	entry->outcome_unknown = filling->shipment->delivery.outcome_unknown;
	entry->error = fate->error == NULL ? NULL : pstrdup(fate->error);
	abp_idset_add(&entry->ids, id, id, filling->context);
	if (fate->state == OUTBOX_UNPRICED)
	{
		/* Its price may have come while it was in another state. */
		abp_position_look_again(filling->turn, filling->table->relid);
	}
	filling->exceptions = lappend(filling->exceptions, entry);
	MemoryContextSwitchTo(old);
}

/* Set a row aside until somebody fixes it. */
static void
reject(Filling *filling, int64 id, char *reason)
{
	RowState	fate = {OUTBOX_REJECTED, DT_NOBEGIN, reason};

	set_aside(filling, id, &fate);
}

/*
 * Set a row aside for now, and for longer each time that it fails; in the end
 * it is rejected.
 */
static void
put_off(Filling *filling, int64 id, char *reason)
{
	int			attempts = filling->shipment->delivery.prior_attempts;
	RowState	fate = {OUTBOX_WAITING, abp_turn_in_ms(HOLD_MS << Min(attempts, MAX_HOLDS)), reason};

	if (attempts >= MAX_HOLDS)
		fate.state = OUTBOX_REJECTED;
	set_aside(filling, id, &fate);
	((OutboxEntry *) llast(filling->exceptions))->attempts++;
	filling->put_off++;
}

/*
 * A row has come.  Returns false if no event is made of it now: it is not the
 * one that was sent under this id, or another transaction may be changing it,
 * or there are more rows than ids.
 */
static bool
notice_row(Filling *filling, const UsageRow *row)
{
	uint32		key;

	if (filling->taken_from == 0 &&
		abp_ledger_delivery_key(&filling->shipment->delivery, row->id, &key) &&
		key != abp_ledger_key_of(&row->external_id))
		return false;

	if (filling->nrows <= filling->max_rows)
		filling->row_ids[filling->nrows++] = row->id;
	if (filling->nrows > filling->max_rows)
		return false;
	abp_idset_add(&filling->seen, row->id, row->id, filling->context);
	if (filling->taken_from != 0 && row->maybe_changing)
	{
		abp_idset_add(&filling->changing, row->id, row->id, filling->context);
		return false;
	}
	return true;
}

/* A row goes into the request: if it names a parent, it may have to wait for that. */
static void
note_child(Filling *filling, const UsageRow *row)
{
	MemoryContext old;
	ChildRow   *child;

	if (row->parent_id.data == NULL)
		return;
	old = MemoryContextSwitchTo(filling->context);
	child = abp_parents_child(row);
	if (child != NULL)
		filling->children = lappend(filling->children, child);
	MemoryContextSwitchTo(old);
}

/*
 * Append one row's event to the request, or set the row aside.  Returns
 * whether there is room for more.
 */
static bool
add_event(const UsageRow *row, Jsonb *whole, void *arg)
{
	Filling    *filling = arg;
	Delivery   *delivery = &filling->shipment->delivery;
	StringInfo	body = &delivery->body;
	int			before = body->len;
	EventOverrides overrides = {{NULL}};
	RowState	fate;
	char	   *failure = NULL;

	if (filling->rows_are_settled)
		abp_idset_add(&filling->seen, row->id, row->id, filling->context);
	else if (!notice_row(filling, row))
		return filling->nrows <= filling->max_rows;
	if (delivery->nevents == filling->max_rows)
		return false;			/* rows share ids: shared_ids tells which */
	if (whole == NULL)
		abp_fate_before_encoding(row, filling->server, &fate);
	else
		abp_fate_of(row, filling->server, &fate);
	if (fate.state != OUTBOX_READY)
	{
		set_aside(filling, row->id, &fate);
		return true;
	}
	if (whole != NULL)
	{
		GuardOutcome outcome = abp_user_code_call(filling->server, whole, &overrides,
												  &failure);

		if (outcome == GUARD_FAILED)
			reject(filling, row->id, failure);
		else if (outcome != GUARD_DONE)
			put_off(filling, row->id, failure);
		filling->no_memory |= outcome == GUARD_NO_MEMORY;
		if (outcome != GUARD_DONE)
			return true;
	}

	resetStringInfo(&filling->reason);
	if (delivery->nevents > 0)
		appendStringInfoChar(body, ',');
	if (!abp_event_encode(body, row, &filling->server->format, &overrides, &filling->reason))
	{
		body->len = before;
		reject(filling, row->id, filling->reason.data);
	}
	else if (body->len + 2 > filling->server->batch_bytes && delivery->nevents > 0)
	{
		body->len = before;
		abp_idset_add(&filling->left, row->id, row->id, filling->context);
		filling->full = true;
		return false;
	}
	else
	{
		filling->event_keys[delivery->nevents] = abp_ledger_key_of(&row->external_id);
		abp_share_rows_add(&filling->shipment->share_rows, delivery->nevents, row,
						   &filling->server->format);
		delivery->event_ids[delivery->nevents++] = row->id;
		abp_idset_add(&filling->sent, row->id, row->id, filling->context);
		note_child(filling, row);
	}
	return true;
}

static int
compare_ids(const void *a, const void *b)
{
	int64		one = *(const int64 *) a;
	int64		other = *(const int64 *) b;

	return (one > other) - (one < other);
}

/* The ids of which more than one row has come. */
static IdSet
shared_ids(Filling *filling)
{
	IdSet		shared = {0};

	if (filling->nrows == abp_idset_count(&filling->seen))
		return shared;
	qsort(filling->row_ids, filling->nrows, sizeof(int64), compare_ids);
	for (int64 i = 1; i < filling->nrows; i++)
	{
		if (filling->row_ids[i] == filling->row_ids[i - 1])
			abp_idset_add(&shared, filling->row_ids[i], filling->row_ids[i], filling->context);
	}
	return shared;
}

/*
 * Ids of several rows: one that another transaction may just be taking away
 * leaves its id to the other, which waits until then.
 */
static void
note_shared(Filling *filling, IdSet *ids, IdSet *shared, IdSet *changing)
{
	IdSet		settled = abp_rows_settled(filling->table, ids);
	IdSet		others = abp_idset_subtract(ids, &settled);

	abp_idset_add_set(shared, &settled, filling->context);
	abp_idset_add_set(changing, &others, filling->context);
}

/* Rows to be read under guard. */
typedef struct GuardedRead
{
	Filling    *filling;
	IdSet	   *ids;
	bool		whole;
} GuardedRead;

/*
 * Users' functions take their time: what they leave of the batch is for
 * another one.
 */
static bool
add_in_time(const UsageRow *row, Jsonb *whole, void *arg)
{
	Filling    *filling = arg;

	if (!add_event(row, whole, arg))
		return false;
	filling->full = whole != NULL && abp_guard_elapsed_ms() > TURN_MS;
	return !filling->full;
}

/* Under guard: read the rows, and append their events. */
static void
read_guarded(void *arg)
{
	GuardedRead *read = arg;

	abp_rows_read(read->filling->table, read->ids, read->whole, add_in_time, read->filling);
}

/* That rows can be read is all that matters. */
static bool
pass_over(const UsageRow *row, Jsonb *whole, void *arg)
{
	return false;
}

/*
 * Can the table be read at all?  An error that is not a row's fault is raised.
 */
void
abp_fill_read_no_row(const UsageTable *table, bool whole)
{
	IdSet		none = {0};

	abp_idset_add(&none, PG_INT64_MIN, PG_INT64_MIN, CurrentMemoryContext);
	abp_rows_read(table, &none, whole, pass_over, NULL);
}

/*
 * One row of a batch has failed, alone: set it aside, unless waiting helps.
 * Returns whether to go on with the next one.
 */
static bool
set_failed_aside(Filling *filling, int64 id, bool whole, GuardOutcome outcome,
				 const GuardError *error)
{
	if (filling->seen.nranges == 0)
		abp_fill_read_no_row(filling->table, whole);
	if (outcome == GUARD_PASSES)
	{
		if (filling->seen.nranges == 0)
			abp_guard_rethrow(error);
		return false;
	}

	abp_idset_add(&filling->seen, id, id, filling->context);
	if (!filling->rows_are_settled && filling->nrows < filling->max_rows)
		filling->row_ids[filling->nrows++] = id;
	if (filling->table->blocked_reason == NULL && !filling->warned)
		ereport(WARNING,
				(errcode(error->sqlerrcode),
				 errmsg("usage row " INT64_FORMAT " of %s cannot be sent: %s",
						id, filling->table->name, error->message)));
	filling->warned = true;
	if (outcome == GUARD_FAILED)
		reject(filling, id, error->message);
	else
		put_off(filling, id, error->message);
	return outcome == GUARD_FAILED;
}

/* What reading has made of some rows, to be taken back. */
typedef struct FillingMark
{
	int			body_len;
	int			nevents;
	int64		nrows;
	int			nexceptions;
	int			nchildren;
	int			put_off;
	bool		full;
} FillingMark;

/* What has been read so far. */
static FillingMark
mark_filling(const Filling *filling)
{
	return (FillingMark)
	{
		.body_len = filling->shipment->delivery.body.len,
			.nevents = filling->shipment->delivery.nevents,
			.nrows = filling->nrows,
			.nexceptions = list_length(filling->exceptions),
			.nchildren = list_length(filling->children),
			.put_off = filling->put_off,
			.full = filling->full
	};
}

/* Forget all that has been read of these rows since the mark. */
static void
unread(Filling *filling, const FillingMark *mark, IdSet *ids)
{
	Delivery   *delivery = &filling->shipment->delivery;

	delivery->body.len = mark->body_len;
	delivery->body.data[mark->body_len] = '\0';
	delivery->nevents = mark->nevents;
	filling->nrows = mark->nrows;
	filling->exceptions = list_truncate(filling->exceptions, mark->nexceptions);
	filling->children = list_truncate(filling->children, mark->nchildren);
	filling->put_off = mark->put_off;
	filling->full = mark->full;
	filling->seen = abp_idset_subtract(&filling->seen, ids);
	filling->sent = abp_idset_subtract(&filling->sent, ids);
	filling->left = abp_idset_subtract(&filling->left, ids);
	if (!filling->rows_are_settled)
		filling->changing = abp_idset_subtract(&filling->changing, ids);
}

/*
 * Read rows one by one, each under guard: those that cannot be sent are set
 * aside with their reason and keep none of the others.  What takes long is
 * left for another batch.
 */
static void
read_carefully(Filling *filling, IdSet *ids, bool whole)
{
	IdWalk		walk = {0};
	TimestampTz start = GetCurrentTimestamp();

	while (!filling->full && abp_idset_walk(ids, &walk))
	{
		IdSet		one = {0};
		GuardedRead read = {filling, &one, whole};
		FillingMark mark = mark_filling(filling);
		GuardError	error;
		GuardOutcome outcome;

		CHECK_FOR_INTERRUPTS();

		abp_idset_add(&one, walk.id, walk.id, filling->context);
		abp_guard_start_clock();
		outcome = abp_guard(filling->table, read_guarded, &read, &error);
		if (outcome != GUARD_DONE)
		{
			abp_guard_start_clock();
			unread(filling, &mark, &one);
			if (!set_failed_aside(filling, walk.id, whole, outcome, &error))
				filling->full = true;
		}
		if (TimestampDifferenceExceeds(start, GetCurrentTimestamp(), TURN_MS))
			filling->full = true;
	}
	abp_guard_start_clock();
}

/*
 * Read rows and append their events to the request: together, and one by one
 * if one of them may be to blame for an error.
 */
static void
read_rows(Filling *filling, IdSet *ids, bool whole)
{
	GuardedRead read = {filling, ids, whole};
	FillingMark mark = mark_filling(filling);
	GuardError	error;
	GuardOutcome outcome = abp_guard(filling->table, read_guarded, &read, &error);

	if (outcome == GUARD_DONE)
		return;

	unread(filling, &mark, ids);
	if (outcome == GUARD_NO_MEMORY)
	{
		Position   *position = abp_position_of(filling->table->relid);

		/* A row that is too much again and again, alone, is set aside. */
		position->batch_size = abp_idset_count(ids);
		if (position->batch_size > 1)
			position->row_too_large = 0;
		else if (position->row_too_large++ >= ROW_TOO_LARGE_TRIES)
			outcome = GUARD_FAILED; /* read it alone */
	}
	if (outcome == GUARD_PASSES || outcome == GUARD_NO_MEMORY)
		abp_guard_rethrow(&error);
	read_carefully(filling, ids, whole);
}

/*
 * Read the rows of these ids and append their events to the request.  Rows that
 * others may be changing come last, if by then nobody is: Filling.changing is
 * left with the others.
 */
static void
read_batch(Filling *filling, IdSet *ids, bool whole)
{
	Delivery   *delivery = &filling->shipment->delivery;
	Position   *position = abp_position_of(filling->table->relid);
	MemoryContext old = MemoryContextSwitchTo(filling->shipment->context);

	abp_shipment_forget_request(filling->shipment);
	filling->max_rows = abp_idset_count(ids);
	initStringInfo(&delivery->body);
	enlargeStringInfo(&delivery->body, Min(filling->max_rows * position->event_bytes,
										   filling->server->batch_bytes));
	delivery->nevents = 0;
	delivery->event_ids = palloc(sizeof(int64) * Max(1, filling->max_rows));
	MemoryContextSwitchTo(old);

	filling->row_ids = palloc(sizeof(int64) * (filling->max_rows + 1));
	filling->event_keys = palloc(sizeof(uint32) * Max(1, filling->max_rows));
	initStringInfo(&filling->reason);
	abp_shipment_begin_sums(filling->shipment);
	appendStringInfoString(&delivery->body, "{\"events\":[");
	read_rows(filling, ids, whole);
	if (filling->changing.nranges > 0)
	{
		IdSet		settled = abp_rows_settled(filling->table, &filling->changing);
		bool		full = filling->full;

		filling->changing = abp_idset_subtract(&filling->changing, &settled);
		filling->rows_are_settled = true;
		filling->seen = abp_idset_subtract(&filling->seen, &settled);
		if (settled.nranges > 0 && (!full || delivery->nevents == 0))
		{
			/* there is time for one of them */
			filling->full = false;
			abp_guard_start_clock();
			read_rows(filling, &settled, whole);
			filling->full |= full;
		}
		abp_idset_add_set(&filling->left, &filling->changing, filling->context);
	}
	appendStringInfoString(&delivery->body, "]}");

	/* room for the next one's, and an eighth more: to grow is to copy */
	if (delivery->nevents > 0)
		position->event_bytes = delivery->body.len / delivery->nevents / 8 * 9;
}

typedef struct EventKey
{
	int64		id;
	uint32		key;
} EventKey;

static int
compare_event_keys(const void *a, const void *b)
{
	return compare_ids(&((const EventKey *) a)->id, &((const EventKey *) b)->id);
}

/* Note by what the rows of a first request are known again. */
static void
keep_keys(Filling *filling)
{
	Delivery   *delivery = &filling->shipment->delivery;
	EventKey   *keys = palloc(sizeof(EventKey) * Max(1, delivery->nevents));
	bool		ascending = true;

	for (int i = 0; i < delivery->nevents; i++)
	{
		keys[i].id = delivery->event_ids[i];
		keys[i].key = filling->event_keys[i];
		ascending &= i == 0 || keys[i - 1].id < keys[i].id;
	}
	if (!ascending)
		qsort(keys, delivery->nevents, sizeof(EventKey), compare_event_keys);

	delivery->keys = MemoryContextAlloc(filling->shipment->context,
										sizeof(uint32) * Max(1, delivery->nevents));
	for (int i = 0; i < delivery->nevents; i++)
		delivery->keys[i] = keys[i].key;
	memset(&delivery->key_ids, 0, sizeof(IdSet));
	abp_idset_add_set(&delivery->key_ids, &delivery->ids, filling->shipment->context);
}

/* Add up what the events of a request are: those that older deliveries count are theirs. */
static void
add_up(Filling *filling)
{
	Delivery   *delivery = &filling->shipment->delivery;

	if (!delivery->knows_counted)
	{
		IdSet		counted = {0};

		if (delivery->outcome_unknown)
			counted = abp_shares_counted(delivery->usage_table, &delivery->ids,
										 filling->table->ledger_from);
		abp_idset_add_set(&delivery->counted, &counted, filling->shipment->context);
		delivery->knows_counted = true;
	}
	abp_shipment_add_up(filling->shipment);
}

/*
 * None of a batch's rows can be sent, and some were only put off: leave the table
 * alone for a while, longer each time.
 */
static void
rest_table(const UsageTable *table, const Filling *filling)
{
	Position   *position = abp_position_of(table->relid);
	const char *reason = ((OutboxEntry *) llast(filling->exceptions))->error;
	TimestampTz until = abp_turn_in_ms(HOLD_MS << position->rests);

	if (table->blocked_reason == NULL && !filling->warned)
		ereport(WARNING,
				(errcode(filling->no_memory ? ERRCODE_OUT_OF_MEMORY :
						 ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("usage rows of %s cannot be delivered: %s", table->name, reason)));
	position->rests = Min(position->rests + 1, MAX_HOLDS);
	position->failed = true;
	abp_position_block(filling->turn, table, reason, until);
}

/*
 * The rows of a request, built from these ids, that are not to be sent without
 * their parents.  What becomes of them instead is added to *held, as
 * OutboxEntry.
 */
static IdSet
hold_children(Filling *filling, IdSet *ids, List **held)
{
	ChildBatch	batch = {
		ids, &filling->sent, filling->exceptions, filling->shipment->delivery.outcome_unknown
	};
	IdSet		without = {0};
	ListCell   *lc;

	abp_parents_decide(filling->table, filling->children, &batch);
	foreach(lc, filling->children)
	{
		ChildRow   *child = lfirst(lc);

		if (child->fate.state == OUTBOX_READY)
			continue;
		set_aside(filling, child->id, &child->fate);
		*held = lappend(*held, llast(filling->exceptions));
		abp_idset_add(&without, child->id, child->id, CurrentMemoryContext);
	}
	return without;
}

/* Note which children go with their parents, should the request be halved. */
static void
keep_kin(Filling *filling)
{
	Kinship    *kin = palloc(sizeof(Kinship) * Max(1, list_length(filling->children)));
	int			nkin = 0;
	ListCell   *lc;

	foreach(lc, filling->children)
	{
		ChildRow   *child = lfirst(lc);

		if (!child->with_parent)
			continue;
		kin[nkin].child = child->id;
		kin[nkin++].parent = child->parent;
	}
	abp_shipment_set_kin(filling->shipment, kin, nkin);
}

/*
 * Rows that are not sent now go back to the outbox: those set aside, those that
 * share their ids with others, and those that are left to be sent later.
 */
static void
put_rest_back(Filling *filling, IdSet shared)
{
	Delivery   *delivery = &filling->shipment->delivery;
	OutboxEntry *back;
	int			nback = 0;
	ListCell   *lc;

	back = palloc0(sizeof(OutboxEntry) * (list_length(filling->exceptions) + 2));
	foreach(lc, filling->exceptions)
		back[nback++] = *(OutboxEntry *) lfirst(lc);
	if (shared.nranges > 0)
		back[nback++] = (OutboxEntry)
	{
		.usage_table = filling->table->relid,
			.state = OUTBOX_REJECTED,
			.attempts = delivery->prior_attempts,
			.outcome_unknown = delivery->outcome_unknown,
			.ids = shared,
			.error = SHARED_ID
	};
	if (filling->left.nranges > 0)
		back[nback++] = (OutboxEntry)
	{
		.usage_table = filling->table->relid,
			.state = filling->taken_from == 0 ? OUTBOX_READY : filling->taken_from,
			.attempts = delivery->prior_attempts,
			.outcome_unknown = delivery->outcome_unknown,
			.not_before = GetCurrentTimestamp(),
			.ids = filling->left
	};
	abp_outbox_put(back, nback);
	for (int i = 0; filling->taken_from == 0 && i < nback; i++)
		abp_shipment_disown(delivery, &back[i].ids);
}

/*
 * Build a shipment's request from the rows of these ids, by the active
 * snapshot: ids taken from the outbox in a state, or with 0 ids that have been
 * sent before.  Rows that cannot be sent now go back to the outbox with their
 * reason; the delivery's ids are those that can.  Returns false if there were
 * more than a request may hold.
 */
bool
abp_fill_shipment(Turn *turn, Shipment *shipment, const UsageTable *table,
				  const ServerOptions *server, IdSet *ids, char taken_from)
{
	Delivery   *delivery = &shipment->delivery;
	Filling		filling;
	IdSet		unseen;
	IdSet		shared = {0};
	IdSet		changing = {0};
	List	   *held = NIL;
	IdSet		wanted = *ids;
	bool		whole = server->event_name_function != NULL || server->metadata_function != NULL;
	bool		all_seen = true;

	/*
	 * Ids of several rows are known by the rows, and so are children that
	 * have to wait for their parents: then without them.
	 */
	for (;;)
	{
		IdSet		more;

		CHECK_FOR_INTERRUPTS();

		filling = (Filling)
		{
			.turn = turn,.shipment = shipment,.table = table,.server = server,.taken_from = taken_from,
				.context = CurrentMemoryContext
		};
		read_batch(&filling, &wanted, whole);
		/* A batch that has become full has not read all of their rows. */
		more = filling.full && taken_from != 0 ? abp_rows_shared(table, &wanted) :
			shared_ids(&filling);
		if (more.nranges > 0)
			note_shared(&filling, &more, &shared, &changing);
		if (more.nranges == 0 && filling.children != NIL)
			more = hold_children(&filling, ids, &held);
		if (more.nranges == 0)
			break;
		wanted = abp_idset_subtract(&wanted, &more);
	}

	/* Of two rows of an id we have seen but one. */
	if (taken_from != 0)
		all_seen = abp_partitions_leaving(table->relid, ids, &delivery->vanished_rows,
										  shipment->context);
	unseen = abp_idset_subtract(&wanted, &filling.seen);
	if (filling.full)
		abp_idset_add_set(&filling.left, &unseen, CurrentMemoryContext);
	else
	{
		delivery->vanished += abp_idset_count(&unseen);
		abp_ledger_miss(delivery, &unseen, false, shipment->context);
	}

	abp_idset_add_set(&filling.left, &changing, CurrentMemoryContext);
	abp_idset_add_set(&filling.changing, &changing, CurrentMemoryContext);
	filling.exceptions = list_concat(held, filling.exceptions);
	put_rest_back(&filling, shared);

	memset(&delivery->ids, 0, sizeof(IdSet));
	abp_idset_add_set(&delivery->ids, &filling.sent, shipment->context);
	abp_idset_sort(&delivery->ids);
	add_up(&filling);
	keep_kin(&filling);
	if (taken_from != 0 || delivery->keys == NULL)
		keep_keys(&filling);
	if (!all_seen)
		abp_ledger_miss(delivery, ids, true, shipment->context);
	if (filling.changing.nranges > 0)
		abp_position_hold_rows(turn, table, &filling.changing);
	if (filling.full)
		abp_position_of(table->relid)->cursor = PG_INT64_MIN;
	if (filling.put_off > 0 && delivery->nevents == 0)
		rest_table(table, &filling);
	return !filling.full;
}
