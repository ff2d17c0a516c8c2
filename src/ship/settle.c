/*-------------------------------------------------------------------------
 *
 * settle.c
 *	  What becomes of a request.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_class.h"
#include "utils/lsyscache.h"
#include "utils/timestamp.h"

#include "base/idset.h"
#include "polar/server.h"
#include "polar/verdict.h"
#include "queue/attachment.h"
#include "queue/entry.h"
#include "queue/feed.h"
#include "queue/ledger.h"
#include "queue/outbox.h"
#include "queue/shares.h"
#include "ship/batch.h"
#include "ship/families.h"
#include "ship/fold.h"
#include "ship/http.h"
#include "ship/lane.h"
#include "ship/position.h"
#include "ship/quota.h"
#include "ship/settle.h"
#include "ship/shipment.h"
#include "ship/turn.h"

#define RATE_LIMITED_MS (60 * 1000) /* after a 429 without Retry-After */

#define SKEW_MS 5000			/* hold rows whose time Polar calls the future */

/* After so many server errors a batch is halved, and a single row suspected. */
#define ERRORS_BEFORE_HALVING 3
#define ERRORS_BEFORE_REJECTING 5
#define TIMEOUTS_BEFORE_HALVING 3

/*
 * Put ids of a delivery back into the outbox, in this state and with this reason.
 */
static void
put_back(Shipment *shipment, IdSet ids, char state, TimestampTz not_before,
		 const char *error, bool burn_attempt)
{
	OutboxEntry entry = {
		.usage_table = shipment->delivery.usage_table,
		.state = state,
		.attempts = shipment->delivery.prior_attempts +
		(burn_attempt ? shipment->delivery.attempts : 0),
		.outcome_unknown = shipment->delivery.outcome_unknown,
		.not_before = not_before,
		.ids = ids,
		.error = error
	};

	if (ids.nranges == 0)
		return;
	abp_outbox_put(&entry, 1);
	abp_shipment_disown(&shipment->delivery, &ids);
	if (state == OUTBOX_READY)
		abp_position_of(entry.usage_table)->cursor = PG_INT64_MIN;
}

/*
 * Of ids that are to go back, keep those whose rows are there.  A partition may have left
 * with the others, and other rows may have their ids: they are noted, to be sent when
 * they come back.  Returns false if that cannot be told just now.
 */
static bool
part_from_vanished(Turn *turn, Shipment *shipment, const UsageTable *table, IdSet *ids)
{
	Delivery   *delivery = &shipment->delivery;
	SentRows	sent = {.shipment = shipment,.ids = ids,.context = CurrentMemoryContext};
	const ServerOptions *server;
	IdSet		gone;

	if (table == NULL || get_rel_relkind(table->relid) != RELKIND_PARTITIONED_TABLE)
		return true;
	server = abp_lane_options(table);
	if (server == NULL ||
		abp_position_guarded(turn, abp_batch_find_sent, table, server, &sent) != GUARD_DONE)
		return false;

	gone = abp_idset_subtract(ids, &sent.there);
	if (gone.nranges == 0)
		return true;
	*ids = sent.there;
	abp_shipment_disown(delivery, &gone);
	abp_ledger_miss(delivery, &gone, false, shipment->context);
	delivery->vanished += abp_idset_count(&gone);
	abp_batch_report_vanished(delivery, table, delivery->vanished - abp_idset_count(&gone));
	return true;
}

/*
 * A limit was reached, in Polar's words.  If it was not our own, there are others
 * who send to the same organization: say what to do, palloc'd.
 */
static char *
rate_limit_words(const Lane *lane, const ServerOptions *server, char *error)
{
	int			recent;

	if (server == NULL || server->requests_per_minute == 0)
		return error;
	recent = abp_ledger_recent_requests(lane->server, server->requests_per_minute);
	if (recent >= server->requests_per_minute)
		return error;
	return psprintf("%s, although only %d of the %d requests were made in the last minute that requests_per_minute of server \"%s\" allows: other databases send to the same organization, whose limit is for all together; lower requests_per_minute in each so that their sum stays below it",
					error, recent, server->requests_per_minute, lane->server);
}

/* Nothing more becomes of a delivery than this. */
static void
finish_shipment(Turn *turn, Shipment *shipment, const char *state, const char *error)
{
	abp_ledger_finish(&shipment->delivery, state, error);
	abp_shipment_drop(turn, shipment);
}

/*
 * Keep a delivery whose rows may have been stored, or are to be sent again:
 * at retry_at, not before its server allows it.
 */
static void
keep_for_retry(Shipment *shipment, TimestampTz retry_at, const char *error)
{
	shipment->stage = SHIPMENT_WAITING;
	shipment->retry_at = retry_at;
	abp_shipment_forget_request(shipment);
	abp_ledger_note(&shipment->delivery, error, retry_at);
}

/*
 * Nothing of this request was stored, or so the answer says: unless an earlier
 * one may have been, its rows go back to be sent anew.
 */
static void
return_or_keep(Turn *turn, Shipment *shipment, const UsageTable *table, const char *error,
			   bool burn_attempt)
{
	IdSet		ids = shipment->delivery.ids;

	if (shipment->delivery.outcome_unknown || !part_from_vanished(turn, shipment, table, &ids))
	{
		keep_for_retry(shipment, shipment->lane->not_before, error);
		return;
	}
	put_back(shipment, ids, OUTBOX_READY, DT_NOBEGIN, error, burn_attempt);
	finish_shipment(turn, shipment, "failed", error);
}

/* What is left of a delivery's rows is added up when they are sent again. */
static void
forget_share(Delivery *delivery)
{
	delivery->share = NULL;
	abp_shares_write(delivery->id, delivery->usage_table, NULL,
					 delivery->knows_counted ? &delivery->counted : NULL);
}

/* From now on these rows, of those that it has, are all that a delivery has. */
static void
keep_ids(Shipment *shipment, IdSet *ids)
{
	Delivery   *delivery = &shipment->delivery;

	memset(&delivery->ids, 0, sizeof(IdSet));
	abp_idset_add_set(&delivery->ids, ids, shipment->context);
	delivery->nevents = abp_idset_count(&delivery->ids);
	forget_share(delivery);
}

/*
 * Whose fault?  Send each half by itself, children in that of their parents as
 * far as can be.
 */
void
abp_settle_by_halves(Shipment *shipment, const char *error)
{
	Delivery   *delivery = &shipment->delivery;
	Shipment   *half = abp_shipment_new(shipment->lane, shipment->delivery.server);
	IdSet		first = abp_families_half(&delivery->ids, shipment->kin, shipment->nkin);
	IdSet		second = abp_idset_subtract(&delivery->ids, &first);
	MemoryContext old = MemoryContextSwitchTo(half->context);

	half->delivery.usage_table = delivery->usage_table;
	half->delivery.prior_attempts = delivery->prior_attempts + delivery->attempts;
	half->delivery.outcome_unknown = delivery->outcome_unknown;
	half->delivery.ids = abp_idset_copy(&second);
	half->delivery.nevents = abp_idset_count(&second);
	abp_shipment_copy_keys(&half->delivery, delivery);
	half->delivery.knows_counted = delivery->knows_counted;
	half->delivery.counted = abp_idset_copy(&delivery->counted);
	MemoryContextSwitchTo(old);
	abp_shipment_set_kin(half, shipment->kin, shipment->nkin);

	abp_ledger_begin(&half->delivery);
	forget_share(&half->delivery);
	keep_for_retry(half, DT_NOBEGIN, error);

	keep_ids(shipment, &first);
	shipment->server_errors = 0;
	shipment->timeouts = 0;
	keep_for_retry(shipment, DT_NOBEGIN, error);
}

/* Settle a delivery of which no row can be sent: somebody must fix them. */
static void
reject_shipment(Turn *turn, Shipment *shipment, const UsageTable *table, const char *error)
{
	IdSet		ids = shipment->delivery.ids;

	if (!part_from_vanished(turn, shipment, table, &ids))
	{
		keep_for_retry(shipment, abp_turn_in_ms(LOCKED_MS), error);
		return;
	}
	put_back(shipment, ids, OUTBOX_REJECTED, DT_NOBEGIN, error, true);
	finish_shipment(turn, shipment, "rejected", error);
}

/* Those of its rows that another delivery is bringing to Polar, too. */
static void
add_rows_in_flight(const Shipment *shipment, IdSet *before)
{
	const Delivery *delivery = &shipment->delivery;
	ListCell   *lc;

	foreach(lc, abp_shipments)
	{
		Shipment   *other = lfirst(lc);
		IdSet		both;
		IdWalk		walk = {0};

		if (other == shipment || other->delivery.usage_table != delivery->usage_table)
			continue;
		both = abp_idset_intersect(unconstify(IdSet *, &delivery->ids), &other->delivery.ids);
		while (abp_idset_walk(&both, &walk))
		{
			uint32		key;
			uint32		other_key;

			if (abp_ledger_delivery_key(delivery, walk.id, &key) &&
				abp_ledger_delivery_key(&other->delivery, walk.id, &other_key) && key == other_key)
				abp_idset_add(before, walk.id, walk.id, CurrentMemoryContext);
		}
	}
	abp_idset_sort(before);
}

/* Rows of a delivery, all duplicates, are in what another one adds up to. */
static void
count_without(Shipment *shipment, const IdSet *ids)
{
	Delivery   *delivery = &shipment->delivery;

	abp_idset_add_set(&delivery->counted, ids, shipment->context);
	abp_idset_sort(&delivery->counted);
	abp_shipment_add_up(shipment);
	abp_shares_write(delivery->id, delivery->usage_table, delivery->share, &delivery->counted);
}

/* Polar has the events of a delivery. */
static void
settle_delivered(Turn *turn, Shipment *shipment, const Verdict *verdict, double elapsed_ms,
				 const ServerOptions *server, int64 ledger_from)
{
	Delivery   *delivery = &shipment->delivery;
	Lane	   *lane = shipment->lane;

	delivery->inserted = verdict->inserted;
	delivery->duplicates = verdict->duplicates;

	/*
	 * An id that was delivered before, or is just being, may be of a row that
	 * has come back.  Or the row that was to be sent has gone with its
	 * partition, and this one has its id: then it is looked at when it is
	 * there again.
	 */
	if (verdict->duplicates > 0 && !delivery->outcome_unknown)
	{
		IdSet		before = abp_ledger_delivered_before(delivery, ledger_from);

		add_rows_in_flight(shipment, &before);
		delivery->unexpected_duplicates = Max(0, verdict->duplicates - abp_idset_count(&before));
		if (before.nranges > 0 && verdict->duplicates >= abp_idset_count(&before))
			count_without(shipment, &before);
		abp_ledger_miss(delivery, &before, true, shipment->context);
	}
	if (delivery->unexpected_duplicates > 0)
	{
		ereport(WARNING,
				(errcode(ERRCODE_DATA_EXCEPTION),
				 errmsg(INT64_FORMAT " usage rows of delivery " INT64_FORMAT " were not counted: Polar had events with their external_id before",
						delivery->unexpected_duplicates, delivery->id),
				 errhint("Another producer, or a copy of this database, sends the same external ids.")));
	}
	abp_ledger_finish(delivery, "delivered", NULL);
	abp_feed_settled(delivery);
	abp_fold_delivered();
	turn->delivered += delivery->nevents;
	abp_lane_succeeded(turn, lane);

	/* Slow answers ask for smaller batches. */
	if (server != NULL)
	{
		int			size = lane->batch_size > 0 ? lane->batch_size : server->batch_size;

		if (elapsed_ms > server->timeout_ms / 3)
			lane->batch_size = Max(1, Min(size, delivery->nevents) / 2);
		else if (elapsed_ms < server->timeout_ms / 10)
			lane->batch_size = Min(size * 2, server->batch_size);
	}
	abp_shipment_drop(turn, shipment);
}

/* Polar has named the rows that it refuses; the others are sent again at once. */
static void
settle_refused(Turn *turn, Shipment *shipment, const UsageTable *table, const Verdict *verdict)
{
	Delivery   *delivery = &shipment->delivery;
	IdSet		refused = {0};
	IdSet		there;
	IdSet		rest;
	bool		only_skew = true;

	for (int i = 0; i < verdict->nrefused; i++)
	{
		int64		id = delivery->event_ids[verdict->refused[i].index];

		abp_idset_add(&refused, id, id, CurrentMemoryContext);
	}
	there = refused;
	if (!part_from_vanished(turn, shipment, table, &there))
	{
		keep_for_retry(shipment, abp_turn_in_ms(LOCKED_MS), verdict->error);
		return;
	}

	for (int i = 0; i < verdict->nrefused; i++)
	{
		RefusedEvent *event = &verdict->refused[i];
		int64		id = delivery->event_ids[event->index];
		IdSet		one = {0};

		if (!abp_idset_contains(&there, id))
			continue;
		abp_idset_add(&one, id, id, CurrentMemoryContext);
		if (event->clock_skew)
			put_back(shipment, one, OUTBOX_WAITING,
					 abp_turn_in_ms(SKEW_MS * Min(12, 1 + delivery->prior_attempts)),
					 event->reason, true);
		else
		{
			put_back(shipment, one, OUTBOX_REJECTED, DT_NOBEGIN, event->reason, true);
			only_skew = false;
		}
	}

	rest = abp_idset_subtract(&delivery->ids, &refused);
	if (rest.nranges == 0)
	{
		finish_shipment(turn, shipment, only_skew ? "failed" : "rejected", verdict->error);
		return;
	}

	keep_ids(shipment, &rest);
	keep_for_retry(shipment, DT_NOBEGIN, verdict->error);
}

/*
 * The server has failed.  If it goes on for one batch while others get
 * through, a row of the batch is to blame: find it by halving.
 */
static void
settle_server_error(Turn *turn, Shipment *shipment, const UsageTable *table,
					const Verdict *verdict)
{
	Delivery   *delivery = &shipment->delivery;
	Lane	   *lane = shipment->lane;
	bool		others_pass;

	delivery->outcome_unknown = true;
	if (shipment->server_errors++ == 0)
		shipment->first_error_at = GetCurrentTimestamp();
	others_pass = lane->last_success > shipment->first_error_at;

	if (delivery->nevents > 1 && shipment->server_errors >= ERRORS_BEFORE_HALVING)
		abp_settle_by_halves(shipment, verdict->error);
	else if (delivery->nevents == 1 && others_pass &&
			 shipment->server_errors >= ERRORS_BEFORE_REJECTING)
		reject_shipment(turn, shipment, table, verdict->error);
	else
	{
		int64		ms = verdict->retry_after_ms >= 0 ? verdict->retry_after_ms :
		abp_lane_backoff_ms(others_pass ? shipment->server_errors : lane->failures + 1);

		if (!others_pass)
			abp_lane_back_off(turn, lane, ms, verdict->error);
		keep_for_retry(shipment, abp_turn_in_ms(ms), verdict->error);
	}
}

/*
 * Settle a request that has ended; table: NULL if it is not attached any more.
 */
static void
settle(Turn *turn, Shipment *shipment, const UsageTable *table)
{
	const ServerOptions *server = table == NULL ? NULL : abp_lane_options(table);
	const HttpReply *reply = abp_http_reply(shipment->request);
	Delivery   *delivery = &shipment->delivery;
	Lane	   *lane = shipment->lane;
	Verdict    *verdict;

	delivery->http_status = reply->status;
	if (reply->outcome != HTTP_ANSWERED)
	{
		char	   *error = pstrdup(reply->error);
		bool		out_of_memory = reply->out_of_memory;
		bool		timed_out = reply->outcome == HTTP_UNKNOWN && server != NULL &&
		reply->elapsed_ms >= server->timeout_ms;

		if (reply->outcome == HTTP_UNKNOWN)
			delivery->outcome_unknown = true;
		abp_lane_failed(turn, lane, error);
		if (timed_out || out_of_memory)
			lane->batch_size = Max(1, delivery->nevents / 2);

		/*
		 * What never is answered in time, or is more than our memory, is too
		 * much at once.
		 */
		if (timed_out)
			shipment->timeouts++;
		if (delivery->outcome_unknown && delivery->nevents > 1 &&
			(out_of_memory || shipment->timeouts >= TIMEOUTS_BEFORE_HALVING))
			abp_settle_by_halves(shipment, error);
		else
			return_or_keep(turn, shipment, table, error, true);
		return;
	}

	verdict = abp_verdict_of(reply->status, reply->body, reply->body_len,
							 reply->truncated, reply->retry_after,
							 delivery->nevents, GetCurrentTimestamp());
	if (verdict->kind != VERDICT_SERVER_ERROR)
		shipment->server_errors = 0;

	switch (verdict->kind)
	{
		case VERDICT_DELIVERED:
			settle_delivered(turn, shipment, verdict, reply->elapsed_ms, server,
							 table == NULL ? 0 : table->ledger_from);
			break;
		case VERDICT_ROWS_REFUSED:
			abp_lane_succeeded(turn, lane);
			settle_refused(turn, shipment, table, verdict);
			break;
		case VERDICT_BATCH_REFUSED:
		case VERDICT_TOO_LARGE:
			abp_lane_succeeded(turn, lane);
			if (delivery->nevents > 1)
				abp_settle_by_halves(shipment, verdict->error);
			else
				reject_shipment(turn, shipment, table, verdict->error);
			break;
		case VERDICT_RATE_LIMITED:
			abp_quota_used_up(lane->server);
			verdict->error = rate_limit_words(lane, server, verdict->error);
			abp_lane_back_off(turn, lane, verdict->retry_after_ms >= 0 ? verdict->retry_after_ms :
							  RATE_LIMITED_MS, verdict->error);
			return_or_keep(turn, shipment, table, verdict->error, false);
			break;
		case VERDICT_PAUSE:
			abp_lane_pause(turn, lane, verdict->error);
			return_or_keep(turn, shipment, table, verdict->error, false);
			break;
		case VERDICT_SERVER_ERROR:
			settle_server_error(turn, shipment, table, verdict);
			break;
		case VERDICT_UNKNOWN:
			delivery->outcome_unknown = true;
			abp_lane_failed(turn, lane, verdict->error);
			keep_for_retry(shipment, lane->not_before, verdict->error);
			break;
	}
}

/*
 * Settle all requests that have ended, but for those of tables that others are
 * dropping, or bringing a partition to: we would wait for their transaction.
 */
void
abp_settle_answered(Turn *turn, List *tables)
{
	ListCell   *lc;
	List	   *all = list_copy(abp_shipments);

	foreach(lc, all)
	{
		Shipment   *shipment = lfirst(lc);
		UsageTable *table = abp_attachment_of(tables, shipment->delivery.usage_table);

		if (shipment->stage != SHIPMENT_ANSWERED ||
			(table != NULL && list_member_oid(turn->busy_servers, table->serverid)))
			continue;
		if (!abp_attachment_hold(shipment->delivery.usage_table))
		{
			abp_turn_due_at(turn, abp_turn_in_ms(LOCKED_MS));
			continue;
		}
		settle(turn, shipment, table);
	}
}

/* Settle what can never be sent again: its table is gone. */
void
abp_settle_orphans(Turn *turn, List *tables)
{
	ListCell   *lc;
	List	   *all = list_copy(abp_shipments);

	foreach(lc, all)
	{
		Shipment   *shipment = lfirst(lc);
		UsageTable *table = abp_attachment_of(tables, shipment->delivery.usage_table);

		if (shipment->stage != SHIPMENT_WAITING ||
			(table != NULL && OidIsValid(table->owner)))
			continue;
		shipment->delivery.vanished += shipment->delivery.nevents;
		finish_shipment(turn, shipment, "failed",
						"the usage table is gone; the last request's outcome is not known");
	}
}
