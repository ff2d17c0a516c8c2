/*-------------------------------------------------------------------------
 *
 * lane.c
 *	  Lanes: a server's pace and pauses.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "common/hashfn.h"
#include "common/pg_prng.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

#include "polar/server.h"
#include "queue/attachment.h"
#include "queue/server_state.h"
#include "ship/guard.h"
#include "ship/lane.h"
#include "ship/position.h"
#include "ship/quota.h"
#include "ship/shipment.h"
#include "ship/turn.h"

#define BACKOFF_FIRST_MS 1000
#define BACKOFF_MAX_MS (60 * 1000)

static List *lanes = NIL;

/*
 * The lane of a server, for one role or InvalidOid; made at its first use.
 */
Lane	   *
abp_lane_of(const char *server, Oid role)
{
	MemoryContext old;
	ListCell   *lc;
	Lane	   *lane;

	foreach(lc, lanes)
	{
		lane = lfirst(lc);
		if (lane->role == role && strcmp(lane->server, server) == 0)
			return lane;
	}

	old = MemoryContextSwitchTo(abp_shipper_memory);
	lane = palloc0(sizeof(Lane));
	strlcpy(lane->server, server, NAMEDATALEN);
	lane->role = role;
	lane->not_before = DT_NOBEGIN;
	lanes = lappend(lanes, lane);
	MemoryContextSwitchTo(old);
	return lane;
}

/*
 * The lane by which the rows of a table go.
 */
Lane	   *
abp_lane_of_table(const UsageTable *table)
{
	return abp_lane_of(table->server, table->role);
}

/*
 * Options of the server that a table is delivered to; NULL without one.
 */
const ServerOptions *
abp_lane_options(const UsageTable *table)
{
	const ServerOptions *server;

	if (!OidIsValid(table->serverid))
		return NULL;
	server = abp_server_options(table->serverid);
	return server->kind == SERVER_POLAR ? server : NULL;
}

/* A lane in messages. */
static const char *
lane_name(const Lane *lane)
{
	const char *role = OidIsValid(lane->role) ? GetUserNameFromId(lane->role, true) : NULL;

	return role == NULL ? psprintf("server \"%s\"", lane->server) :
		psprintf("server \"%s\" by the user mapping for %s", lane->server, quote_identifier(role));
}

/* Under guard: what is in a lane is written down. */
static void
write_lane(void *arg)
{
	Lane	   *lane = arg;

	abp_server_state_save(lane->server, lane->role, lane->paused_by_answer ? "answer" : NULL,
						  lane->reason, lane->failures, lane->not_before);
}

/*
 * Write down how a lane does, unless another transaction has locked what
 * stands there: then later.
 */
static void
write_down(Turn *turn, Lane *lane)
{
	GuardError	error;
	GuardOutcome outcome;

	if (lane->write_at > GetCurrentTimestamp())
	{
		abp_turn_due_at(turn, lane->write_at);
		return;
	}
	outcome = abp_guard(NULL, write_lane, lane, &error);
	if (outcome != GUARD_DONE && error.sqlerrcode != ERRCODE_LOCK_NOT_AVAILABLE)
		abp_guard_rethrow(&error);
	lane->unwritten = outcome != GUARD_DONE;
	if (!lane->unwritten)
		return;
	lane->write_at = abp_turn_in_ms(HELD_MS);
	abp_turn_due_at(turn, lane->write_at);
}

/* Write down how a lane does, and why; NULL: it is open. */
static void
save_lane(Turn *turn, Lane *lane, const char *reason)
{
	char	   *copy = reason == NULL ? NULL : MemoryContextStrdup(abp_shipper_memory, reason);

	if (lane->reason != NULL)
		pfree(lane->reason);
	lane->reason = copy;
	lane->write_at = 0;
	lane->unwritten = true;
	write_down(turn, lane);
}

/*
 * Write down what could not be written before.
 */
void
abp_lanes_write_down(Turn *turn)
{
	ListCell   *lc;

	foreach(lc, lanes)
	{
		Lane	   *lane = lfirst(lc);

		if (lane->unwritten)
			write_down(turn, lane);
	}
}

/* Exponential, with jitter of a quarter, capped. */
int64
abp_lane_backoff_ms(int failures)
{
	int64		ms = BACKOFF_FIRST_MS;

	for (int i = 1; i < failures && ms < BACKOFF_MAX_MS; i++)
		ms *= 2;
	ms = Min(ms, BACKOFF_MAX_MS);
	return ms - ms / 8 + (int64) (pg_prng_uint64(&pg_global_prng_state) % (ms / 4 + 1));
}

/* A request has failed for no fault of its rows: leave the server alone for a while. */
void
abp_lane_back_off(Turn *turn, Lane *lane, int64 ms, const char *reason)
{
	if (lane->failures == 0 && !lane->paused_by_answer)
		ereport(WARNING,
				(errcode(ERRCODE_CONNECTION_EXCEPTION),
				 errmsg("could not deliver usage to %s: %s", lane_name(lane), reason),
				 errdetail("Delivery is tried again in %d seconds, and then more and more rarely.",
						   (int) ((ms + 999) / 1000))));
	lane->failures++;
	lane->not_before = abp_turn_in_ms(ms);
	save_lane(turn, lane, reason);
}

/*
 * The same for longer each time, where nobody says for how long.
 */
void
abp_lane_failed(Turn *turn, Lane *lane, const char *reason)
{
	abp_lane_back_off(turn, lane, abp_lane_backoff_ms(lane->failures + 1), reason);
}

/* The server will not have us: stop, loudly, until something changes. */
void
abp_lane_pause(Turn *turn, Lane *lane, const char *reason)
{
	if (!lane->paused_by_answer)
		ereport(WARNING,
				(errcode(ERRCODE_CONNECTION_EXCEPTION),
				 errmsg("delivery to %s is paused: %s", lane_name(lane), reason),
				 errhint("Fix the server's options or its access token; delivery resumes by itself then, or with aibilling.resume().")));
	lane->paused_by_answer = true;
	lane->not_before = abp_turn_in_ms(PROBE_MS);
	save_lane(turn, lane, reason);
}

/* Wait no longer for a server, nor for the retries of its deliveries. */
void
abp_lane_try_now(Lane *lane)
{
	ListCell   *lc;

	lane->not_before = DT_NOBEGIN;
	foreach(lc, abp_shipments)
	{
		Shipment   *shipment = lfirst(lc);

		if (shipment->lane == lane)
			shipment->retry_at = DT_NOBEGIN;
	}
}

/* Nothing is known any more that holds the lane back. */
static void
open_lane(Turn *turn, Lane *lane)
{
	lane->failures = 0;
	lane->paused_by_answer = false;
	lane->lacks_token = false;
	lane->last_token = 0;
	lane->not_before = DT_NOBEGIN;
	save_lane(turn, lane, NULL);
}

/*
 * A request got through: nothing holds the lane back.
 */
void
abp_lane_succeeded(Turn *turn, Lane *lane)
{
	lane->last_success = GetCurrentTimestamp();
	if (lane->failures == 0 && !lane->paused_by_answer &&
		TIMESTAMP_NOT_FINITE(lane->not_before))
		return;

	ereport(LOG,
			(errmsg("delivery to %s works again", lane_name(lane))));
	if (lane->paused_by_answer)
		abp_lane_try_now(lane);
	open_lane(turn, lane);
}

/*
 * May a request be made now, by the server's limit of requests per minute?
 */
bool
abp_lane_take_quota(Turn *turn, const ServerOptions *server)
{
	TimestampTz next;

	if (abp_quota_take(server, &next))
		return true;
	abp_turn_due_at(turn, next);
	return false;
}

/*
 * Is a server to be left alone?  Then the next time to look is noted.
 */
bool
abp_lane_is_closed(Turn *turn, Lane *lane, const UsageTable *table, const ServerOptions *server,
				   const char *token, const char *token_problem)
{
	uint32		hash = token == NULL ? 0 :
	DatumGetUInt32(hash_any((const unsigned char *) token, strlen(token)));

	if (table->paused_by_operator)
		return true;

	if (token == NULL)
	{
		if (!lane->paused_by_answer || lane->last_token != 0 ||
			table->pause_reason == NULL || strcmp(table->pause_reason, token_problem) != 0)
		{
			lane->last_token = 0;
			abp_lane_pause(turn, lane, token_problem);
		}
		lane->lacks_token = true;
		abp_turn_due_at(turn, abp_turn_in_ms(PROBE_MS));
		return true;
	}
	if (lane->lacks_token)
	{
		ereport(LOG,
				(errmsg("delivery to %s resumes: there is an access token", lane_name(lane))));
		open_lane(turn, lane);
		abp_lane_try_now(lane);
	}

	/* What failed or was refused may have been fixed: try. */
	if (abp_position_servers_are_new(table) || (lane->paused_by_answer && hash != lane->last_token))
		abp_lane_try_now(lane);
	lane->last_token = hash;

	if (lane->not_before > GetCurrentTimestamp())
	{
		abp_turn_due_at(turn, lane->not_before);
		return true;
	}
	return false;
}

/* One request at a time while it is uncertain that any gets through. */
int
abp_lane_capacity(const Lane *lane, const ServerOptions *server)
{
	return lane->failures > 0 || lane->paused_by_answer ? 1 : server->max_in_flight;
}

/*
 * Could another request fly?  Those about to fly count, and not those whose table
 * keeps them from being settled.
 */
bool
abp_lane_has_room(const Lane *lane, const ServerOptions *server)
{
	int			in_lane = 0;
	int			to_server = 0;
	ListCell   *lc;

	foreach(lc, abp_shipments)
	{
		Shipment   *shipment = lfirst(lc);

		if (shipment->stage == SHIPMENT_WAITING || shipment->stage == SHIPMENT_ANSWERED)
			continue;
		if (shipment->lane == lane)
			in_lane++;
		if (strcmp(shipment->lane->server, lane->server) == 0)
			to_server++;
	}
	return in_lane < abp_lane_capacity(lane, server) && to_server < server->max_in_flight;
}

/*
 * How many deliveries of a lane are on their way, or wait to be sent again?
 */
int
abp_lane_shipments(const Lane *lane)
{
	int			count = 0;
	ListCell   *lc;

	foreach(lc, abp_shipments)
	{
		const Shipment *shipment = lfirst(lc);

		count += shipment->lane == lane && shipment->stage != SHIPMENT_ANSWERED;
	}
	return count;
}

/*
 * Forget all lanes; their memory is the caller's.
 */
void
abp_lanes_forget(void)
{
	lanes = NIL;
	abp_quota_forget();
}
