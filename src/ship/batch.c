/*-------------------------------------------------------------------------
 *
 * batch.c
 *	  A batch: from ids to a request that is in the ledger.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

#include "base/idset.h"
#include "polar/server.h"
#include "queue/attachment.h"
#include "queue/entry.h"
#include "queue/ledger.h"
#include "queue/outbox.h"
#include "queue/shares.h"
#include "ship/batch.h"
#include "ship/fill.h"
#include "ship/guard.h"
#include "ship/lane.h"
#include "ship/position.h"
#include "ship/shipment.h"
#include "ship/turn.h"
#include "usage/partitions.h"
#include "usage/rows.h"

/*
 * The scan over ready entries goes on where it ended.  It starts over to find
 * rows that committed late, spending at most this share of the time on it.
 */
#define RESTART_SHARE 20
#define RESTART_MS (10 * 1000)	/* at the latest, when there is always more */

/*
 * Rows that are gone are reported once, where they first are missed: those that have vanished
 * since there were "before".
 */
void
abp_batch_report_vanished(const Delivery *delivery, const UsageTable *table, int64 before)
{
	if (delivery->vanished > before)
		ereport(WARNING,
				(errcode(ERRCODE_NO_DATA_FOUND),
				 errmsg(INT64_FORMAT " usage rows of %s were gone before they were sent",
						delivery->vanished - before, table->name),
				 errhint("Rows leave the outbox when they are deleted through the attached table, not with a dropped or truncated partition.")));
}

/*
 * Take the next ids to send: those whose time has come first, then ready ones
 * from where the last scan ended.  Rows may commit later than rows of higher
 * ids, so that the scan starts over now and then, and whenever it finds
 * nothing.
 */
static IdSet
take_ids(Turn *turn, const UsageTable *table, Position *position, int64 max_ids,
		 TakenEntries *entries)
{
	TimestampTz start = GetCurrentTimestamp();
	int64		unused = 0;
	IdSet		ids;

	if (position->held.nranges > 0 && position->held_until <= start)
	{
		abp_idset_free(&position->held);
		position->cursor = PG_INT64_MIN;
	}
	ids = abp_outbox_take(table->relid, OUTBOX_WAITING, start, &position->held, &unused, max_ids,
						  entries);
	if (ids.nranges > 0)
		return ids;

	if (start >= position->restart_at + RESTART_MS * INT64CONST(1000))
		position->cursor = PG_INT64_MIN;
	for (;;)
	{
		bool		from_start = position->cursor == PG_INT64_MIN;

		ids = abp_outbox_take(table->relid, OUTBOX_READY, start, &position->held,
							  &position->cursor, max_ids, entries);
		if (from_start)
		{
			TimestampTz now = GetCurrentTimestamp();

			position->restart_at = now + (now - start) * RESTART_SHARE;
		}
		if (ids.nranges > 0 || from_start)
			return ids;
		if (start < position->restart_at)
		{
			abp_turn_due_at(turn, position->restart_at);
			return ids;
		}
		position->cursor = PG_INT64_MIN;
	}
}

/* What the rows of a request add up to is written down before it is sent. */
static void
write_share(const Delivery *delivery)
{
	abp_shares_write(delivery->id, delivery->usage_table, delivery->share, &delivery->counted);
}

/* Take ids, fill a request with their rows, and enter it in the ledger. */
static void
prepare_next(Turn *turn, const UsageTable *table, const ServerOptions *server, void *arg)
{
	NextBatch  *next = arg;
	Lane	   *lane = abp_lane_of_table(table);
	Position   *position = abp_position_of(table->relid);
	Delivery   *delivery;
	TakenEntries entries;
	int			size = server->batch_size;
	IdSet		ids;
	int64		count;
	bool		gone;

	if (lane->batch_size > 0)
		size = Min(size, lane->batch_size);
	if (position->batch_size > 0)
		size = Min(size, position->batch_size);
	ids = take_ids(turn, table, position, size, &entries);
	if (position->held.nranges > 0)
		abp_turn_due_at(turn, position->held_until);

	position->backlog = false;
	if (ids.nranges == 0)
		return;

	next->found = true;
	count = abp_idset_count(&ids);
	next->shipment = abp_shipment_new(lane, table->server);
	delivery = &next->shipment->delivery;
	delivery->usage_table = table->relid;
	delivery->attempts = 1;
	delivery->prior_attempts = entries.attempts;
	delivery->outcome_unknown = entries.outcome_unknown;
	abp_guard_start_clock();
	if (!abp_fill_shipment(turn, next->shipment, table, server, &ids, entries.state) || count == size)
		position->backlog = true;
	else
		next->gather_ms = Min(Max(count * GATHER_ROW_MS, GATHER_MIN_MS), GATHER_MAX_MS);
	abp_batch_report_vanished(delivery, table, 0);
	gone = delivery->vanished_rows.ids.nranges > 0;
	if (delivery->nevents > 0 || gone)
		abp_ledger_begin(delivery);
	if (delivery->nevents > 0)
	{
		write_share(delivery);
		next->shipment->stage = SHIPMENT_PREPARED;
		position->rests = 0;
		position->row_too_large = 0;
		if (position->batch_size > 0)
			position->batch_size = position->batch_size < server->batch_size / 2 ?
				position->batch_size * 2 : 0;
	}
	else
	{
		if (gone)
			abp_ledger_finish(delivery, "failed", "the rows were gone before they were sent");
		abp_shipment_drop(turn, next->shipment);
		next->shipment = NULL;
	}
}

/*
 * The same by one snapshot, of what is in the outbox and of the rows: a
 * transaction that changes a row changes both.
 */
void
abp_batch_next(Turn *turn, const UsageTable *table, const ServerOptions *server, void *arg)
{
	PushActiveSnapshot(GetLatestSnapshot());
	if (abp_outbox_tidy(table->relid, TIDY_PER_TURN))
	{
		CommandCounterIncrement();
		UpdateActiveSnapshotCommandId();
		prepare_next(turn, table, server, arg);
	}
	else
		abp_turn_due_at(turn, abp_turn_in_ms(GATHER_MIN_MS));
	PopActiveSnapshot();
}

/*
 * Build a waiting shipment's request anew and enter another attempt, unless
 * none of its rows is left.
 */
void
abp_batch_again(Turn *turn, const UsageTable *table, const ServerOptions *server, void *arg)
{
	Shipment   *shipment = arg;
	Delivery   *delivery = &shipment->delivery;
	int64		vanished = delivery->vanished;
	IdSet		ids = delivery->ids;

	abp_guard_start_clock();
	CommandCounterIncrement();	/* what was settled in this transaction */
	PushActiveSnapshot(GetLatestSnapshot());
	(void) abp_fill_shipment(turn, shipment, table, server, &ids, 0);
	PopActiveSnapshot();
	abp_batch_report_vanished(delivery, table, vanished);
	if (delivery->nevents > 0)
	{
		abp_ledger_resend(delivery);
		write_share(delivery);
		shipment->stage = SHIPMENT_PREPARED;
	}
	else
		abp_ledger_finish(delivery, "failed", "none of the rows could be sent again");
}

/* A row has the id of one that was sent: is it that one? */
static bool
note_sent(const UsageRow *row, Jsonb *whole, void *arg)
{
	SentRows   *sent = arg;
	uint32		key;

	if (!abp_ledger_delivery_key(&sent->shipment->delivery, row->id, &key) ||
		key == abp_ledger_key_of(&row->external_id))
		abp_idset_add(&sent->there, row->id, row->id, sent->context);
	return true;
}

/*
 * Find those rows of a shipment's that are there still: not those that have left with
 * their partition, be it that others have their ids now.
 */
void
abp_batch_find_sent(Turn *turn, const UsageTable *table, const ServerOptions *server, void *arg)
{
	SentRows   *sent = arg;

	abp_guard_start_clock();
	PushActiveSnapshot(GetLatestSnapshot());
	(void) abp_rows_read(table, sent->ids, false, note_sent, sent);
	PopActiveSnapshot();
}
