/*-------------------------------------------------------------------------
 *
 * shipper.c
 *	  Delivery: from the outbox to Polar to the ledger.
 *
 * One process of a database ships at a time, the worker or a session in
 * CALL aibilling.sync().  It goes round in turns.  A turn is a transaction
 * that settles the requests that have ended and moves the next rows from the
 * outbox into the ledger, followed by a wait outside any transaction while
 * requests fly.
 *
 * What is in memory here can be lost at any moment: every request is in
 * the ledger as "sending" before it is sent, and a later shipper sends it
 * again under the same external ids.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "catalog/pg_extension.h"
#include "catalog/pg_foreign_server.h"
#include "commands/dbcommands.h"
#include "commands/extension.h"
#include "executor/spi.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "storage/ipc.h"
#include "storage/lmgr.h"
#include "storage/lock.h"
#include "utils/acl.h"
#include "utils/inval.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"
#include "utils/timestamp.h"

#include "base/extension.h"
#include "base/idset.h"
#include "compat.h"
#include "polar/limits.h"
#include "polar/server.h"
#include "polar/token.h"
#include "queue/attachment.h"
#include "queue/database.h"
#include "queue/ledger.h"
#include "queue/outbox.h"
#include "queue/server_state.h"
#include "queue/shares.h"
#include "queue/wake.h"
#include "ship/batch.h"
#include "ship/fold.h"
#include "ship/guard.h"
#include "ship/http.h"
#include "ship/lane.h"
#include "ship/position.h"
#include "ship/quota.h"
#include "ship/settle.h"
#include "ship/shipment.h"
#include "ship/shipper.h"
#include "ship/turn.h"
#include "ship/unpriced.h"
#include "usage/rows.h"

/* Advisory locks of SQL have 1 or 2 here: no session can name ours. */
#define SHIP_LOCK_FIELD 3

#define SLOW_MS 100

/* Deliveries to a server, those that wait for a retry included, per request in flight. */
#define MAX_WAITING_SHARE 4

/* The longest wait for an answer without a look at the tables. */
#define IDLE_WAIT_MS 1000

/* After so many deliveries the ledger is summed up. */
#define SUM_UP_EVERY 1000

/* A server that has failed so often in a row is not waited for. */
#define FAILURES_BEFORE_GIVING_UP 5

/* When to look again at an extension that is being dropped. */
#define DROP_WAIT_MS 1000

/* How long a list of the attached tables is believed. */
#define TABLES_MS 1000

static Turn this_turn = {.room_left = true};
static Oid	known_extension = InvalidOid;
static bool recovered = false;	/* have unsettled deliveries been taken over? */

/* What abp_attachments last said, in tables_context. */
static MemoryContext tables_context = NULL;
static List *known_tables = NIL;
static TimestampTz tables_read_at = 0;

/* set by invalidation callbacks */
static bool tables_stale = true;
static bool prices_changed = true;
static bool servers_changed = false;
static Oid	watched_relids[5];

/* --- lock and transactions ------------------------------------------------- */

/* The lock whose holder is the database's shipper. */
static LOCKTAG
ship_lock_tag(void)
{
	LOCKTAG		tag;

	SET_LOCKTAG_ADVISORY(tag, MyDatabaseId, 0, 0, SHIP_LOCK_FIELD);

	/*
	 * Of the ordinary lock method, which gives session locks back when a
	 * transaction aborts; and pg_advisory_unlock_all() does not reach it.
	 */
	tag.locktag_lockmethodid = DEFAULT_LOCKMETHOD;
	return tag;
}

/*
 * Give the shipper's role up, if this process has it.
 */
void
abp_ship_unlock(void)
{
	LOCKTAG		tag = ship_lock_tag();

	if (abp_lock_held(&tag, ExclusiveLock))
		LockRelease(&tag, ExclusiveLock, true);
}

/* A process that ends outside a transaction aborts none: nobody else unlocks. */
static void
unlock_at_exit(int code, Datum arg)
{
	abp_ship_unlock();
}

/*
 * Become this database's shipper.  Returns false if another process is.  The
 * role ends with abp_ship_unlock, with an error, or with the process.
 */
bool
abp_ship_lock(void)
{
	static bool registered = false;
	LOCKTAG		tag = ship_lock_tag();

	if (!registered)
		before_shmem_exit(unlock_at_exit, (Datum) 0);
	registered = true;
	return LockAcquire(&tag, ExclusiveLock, true, true) != LOCKACQUIRE_NOT_AVAIL;
}

/*
 * The process that is this database's shipper, 0 if none is.
 */
int
abp_ship_pid(void)
{
	LOCKTAG		tag = ship_lock_tag();
	LockData   *locks = GetLockStatusData();

	for (int i = 0; i < locks->nelements; i++)
	{
		const LockInstanceData *lock = &locks->locks[i];

		if (lock->holdMask != 0 && memcmp(&lock->locktag, &tag, sizeof(tag)) == 0)
			return lock->pid;
	}
	return 0;
}

/*
 * Begin a turn's transaction.
 */
void
abp_ship_begin(const ShipScope *scope)
{
	if (!scope->in_procedure)
	{
		SetCurrentStatementStartTimestamp();
		StartTransactionCommand();
	}

	/* Rows are read as they are after their ids have left the outbox. */
	XactIsoLevel = XACT_READ_COMMITTED;
	PushActiveSnapshot(GetTransactionSnapshot());
}

/*
 * End it.
 */
void
abp_ship_commit(const ShipScope *scope)
{
	PopActiveSnapshot();
	ForceSyncCommit();			/* what is sent must be in the ledger first */
	if (scope->in_procedure)
		SPI_commit();
	else
	{
		CommitTransactionCommand();
		pgstat_report_stat(true);
	}
}

/* --- state in memory -------------------------------------------------------- */

/* Which tables are attached may have changed, and what they cost. */
static void
on_relcache_change(Datum arg, Oid relid)
{
	tables_stale = true;
	for (int i = 0; i < lengthof(watched_relids); i++)
	{
		if (relid == watched_relids[i] || relid == InvalidOid)
			prices_changed = true;
	}
}

/* A server is new, gone or has other options: each table is to notice. */
static void
on_server_change(Datum arg, int cacheid, uint32 hashvalue)
{
	servers_changed = true;
	tables_stale = true;
}

/* Get ready to ship, once per process. */
static void
init_ship(void)
{
	if (abp_shipper_memory != NULL)
		return;

	abp_shipper_memory = AllocSetContextCreate(TopMemoryContext, "aibilling_polar shipper",
											   ALLOCSET_DEFAULT_SIZES);
	this_turn.context = AllocSetContextCreate(TopMemoryContext, "aibilling_polar shipper turn",
											  ALLOCSET_DEFAULT_SIZES);
	tables_context = AllocSetContextCreate(TopMemoryContext, "aibilling_polar shipper tables",
										   ALLOCSET_DEFAULT_SIZES);
	abp_server_init();
	CacheRegisterRelcacheCallback(on_relcache_change, (Datum) 0);
	CacheRegisterSyscacheCallback(FOREIGNSERVEROID, on_server_change, (Datum) 0);
	CacheRegisterSyscacheCallback(USERMAPPINGOID, on_server_change, (Datum) 0);
}

/*
 * Forget everything in memory, and every request in flight.  Nothing is lost
 * by it.  Called when the shipper's role begins and when it ends.
 */
void
abp_ship_reset(void)
{
	init_ship();
	abp_http_cancel_all();
	MemoryContextReset(abp_shipper_memory);
	abp_lanes_forget();
	abp_positions_forget();
	abp_shipments = NIL;
	recovered = false;
	prices_changed = true;
	tables_stale = true;
	this_turn.delivered = 0;
	abp_fold_reset();
}

/* Take over what an earlier shipper has left unsettled. */
static void
recover(List *tables)
{
	List	   *unsettled = abp_ledger_unsettled();
	ListCell   *lc;

	abp_database_check_timeline();

	foreach(lc, unsettled)
	{
		Delivery   *left = lfirst(lc);
		UsageTable *table = abp_attachment_of(tables, left->usage_table);
		Shipment   *shipment =
		abp_shipment_new(abp_lane_of(left->server, table == NULL ? InvalidOid : table->role),
						 left->server);
		char	   *server = shipment->delivery.server;
		MemoryContext old;

		shipment->delivery = *left;
		shipment->delivery.server = server;
		old = MemoryContextSwitchTo(shipment->context);
		shipment->delivery.ids = abp_idset_copy(&left->ids);
		abp_shipment_copy_keys(&shipment->delivery, left);
		shipment->delivery.knows_counted =
			abp_shares_load_counted(left->id, &shipment->delivery.counted);
		MemoryContextSwitchTo(old);
		shipment->delivery.nevents = abp_idset_count(&left->ids);
		shipment->stage = SHIPMENT_WAITING;
		shipment->retry_at = DT_NOBEGIN;
	}

	foreach(lc, tables)
	{
		UsageTable *table = lfirst(lc);
		Lane	   *lane = abp_lane_of_table(table);

		lane->failures = table->failures;
		lane->not_before = table->not_before;
		lane->paused_by_answer = table->paused_by_answer;
	}
	recovered = true;
}

/* resume() has cleared what is in the tables: clear it here too. */
static void
notice_resumed(List *tables)
{
	ListCell   *lc;

	foreach(lc, tables)
	{
		UsageTable *table = lfirst(lc);
		Lane	   *lane = abp_lane_of_table(table);

		if (!lane->unwritten && TIMESTAMP_NOT_FINITE(table->not_before) &&
			!TIMESTAMP_NOT_FINITE(lane->not_before))
		{
			lane->failures = 0;
			lane->paused_by_answer = false;
			abp_lane_try_now(lane);
		}
	}
}

/*
 * Does a shipper of this scope ship this table?
 */
bool
abp_ship_in_scope(const ShipScope *scope, const UsageTable *table)
{
	return (!OidIsValid(scope->owner) || abp_owns_table(table->relid, scope->owner)) &&
		(scope->server == NULL || strcmp(scope->server, table->server) == 0);
}

/*
 * A usage table is gone, and no event trigger of ours has seen it go, as with
 * session_replication_role = replica: its outbox goes, too.
 */
static void
forget_dropped(List *tables)
{
	ListCell   *lc;

	foreach(lc, tables)
	{
		UsageTable *table = lfirst(lc);
		int64		count;

		if (OidIsValid(table->owner) || abp_ledger_sending(table->relid))
			continue;
		count = abp_outbox_discard(table->relid);
		abp_attachment_forget(table->relid);
		abp_shares_forget(table->relid);
		tables_stale = true;
		if (count > 0)
			ereport(WARNING,
					(errcode(ERRCODE_UNDEFINED_TABLE),
					 errmsg("usage table with OID %u is gone, and with it " INT64_FORMAT " rows that were not delivered",
							table->relid, count)));
	}
}

/* Shipments go with their table, should its server or its token become another. */
static void
change_lanes(List *tables)
{
	ListCell   *lc;

	foreach(lc, abp_shipments)
	{
		Shipment   *shipment = lfirst(lc);
		UsageTable *table = abp_attachment_of(tables, shipment->delivery.usage_table);

		if (shipment->stage != SHIPMENT_WAITING || table == NULL ||
			abp_lane_of_table(table) == shipment->lane)
			continue;
		shipment->lane = abp_lane_of_table(table);
		shipment->delivery.server = MemoryContextStrdup(shipment->context, table->server);
	}
}

/* A request to make once the turn has committed. */
typedef struct Departure
{
	Shipment   *shipment;
	HttpTarget	target;
	char	   *token;
} Departure;

/* One delivery that Polar fails at does not hold up the others. */
static int
fewest_errors_first(const ListCell *a, const ListCell *b)
{
	const Shipment *one = lfirst(a);
	const Shipment *other = lfirst(b);

	if (one->server_errors != other->server_errors)
		return one->server_errors < other->server_errors ? -1 : 1;
	return one->delivery.id < other->delivery.id ? -1 : 1;
}

/*
 * The same, guarded.  What an error undoes in the tables must be as it was
 * here, too: rows that went back to the outbox are the shipment's again.
 */
static bool
retry_shipment(Turn *turn, const UsageTable *table, const ServerOptions *server, Shipment *shipment)
{
	Delivery   *delivery = &shipment->delivery;
	Delivery	before = *delivery;
	GuardOutcome outcome = abp_position_guarded(turn, abp_batch_again, table, server, shipment);

	if (outcome != GUARD_DONE)
	{
		shipment->stage = SHIPMENT_WAITING;
		abp_shipment_forget_request(shipment);
		delivery->ids = before.ids;
		delivery->nevents = before.nevents;
		delivery->vanished = before.vanished;
		memset(&delivery->vanished_rows, 0, sizeof(Vanished));
		delivery->attempts = before.attempts;

		/* As long as its table is blocked; halves for memory at once. */
		if (outcome == GUARD_NO_MEMORY && delivery->nevents > 1)
			abp_settle_by_halves(shipment, "out of memory");
		else
			shipment->retry_at = abp_turn_in_ms(outcome == GUARD_FAILED ? PROBE_MS :
												outcome == GUARD_PASSES ? LOCKED_MS : TRANSIENT_MS);
		return false;
	}

	if (table->blocked_reason != NULL && !abp_position_of(table->relid)->failed)
		abp_attachment_unblock(table->relid, false);
	if (delivery->nevents == 0)
	{
		abp_shipment_drop(turn, shipment);
		abp_quota_give_back(server);
	}
	else if (before.ids.ranges != NULL)
		pfree(before.ids.ranges);
	return true;
}

/*
 * Prepare deliveries of a table whose time to be sent again has come.  While
 * it is uncertain that any request gets through, those that have met server
 * errors are suspect: they come after all others, because only the success
 * of another tells whether a row of theirs is to blame.
 */
static void
retry_due_shipments(Turn *turn, const UsageTable *table, const ServerOptions *server, bool suspects)
{
	Lane	   *lane = abp_lane_of_table(table);
	Position   *position = abp_position_of(table->relid);
	List	   *all = list_copy(abp_shipments);
	ListCell   *lc;

	list_sort(all, fewest_errors_first);
	foreach(lc, all)
	{
		Shipment   *shipment = lfirst(lc);

		if (shipment->lane != lane || shipment->stage != SHIPMENT_WAITING ||
			shipment->delivery.usage_table != table->relid ||
			(lane->failures > 0 && shipment->server_errors > 0) != suspects)
			continue;
		if (shipment->retry_at > GetCurrentTimestamp())
			abp_turn_due_at(turn, shipment->retry_at);
		else if (position->failed || abp_turn_is_over(turn))
			turn->more_to_build |= !position->failed;
		else if (abp_lane_has_room(lane, server) && abp_lane_take_quota(turn, server) &&
				 !retry_shipment(turn, table, server, shipment))
			abp_quota_give_back(server);
	}
}

/* Prepare what one table has to send.  Appends to *departures. */
static void
prepare_table(Turn *turn, const UsageTable *table, const ServerOptions *server, List **departures)
{
	Lane	   *lane = abp_lane_of_table(table);
	Position   *position = abp_position_of(table->relid);
	StringInfoData reason;
	char	   *token;
	ListCell   *lc;
	bool		built = false;

	initStringInfo(&reason);
	token = abp_token_read(server, table->owner, &reason);

	/*
	 * A role whose mapping has come or gone since the tables were read waits
	 * a turn.
	 */
	if (OidIsValid(table->role) !=
		(abp_server_state_by_role() && abp_token_is_mapped(server->serverid, table->owner)))
	{
		abp_token_forget(token);
		tables_stale = true;
		turn->more_to_build = true;
		return;
	}
	if (abp_lane_is_closed(turn, lane, table, server, token, reason.data))
	{
		abp_token_forget(token);
		return;
	}

	retry_due_shipments(turn, table, server, false);

	/*
	 * One new batch a turn: it departs before the next is built.  Requests
	 * that were built together would also be answered together, and each slot
	 * would stand empty while the batches of all others are built.
	 */
	while (!position->failed && abp_lane_has_room(lane, server) &&
		   abp_lane_shipments(lane) < abp_lane_capacity(lane, server) * MAX_WAITING_SHARE)
	{
		NextBatch	next = {0};

		CHECK_FOR_INTERRUPTS();

		if (built)
		{
			turn->more_to_build = true;
			break;
		}
		if (!abp_lane_take_quota(turn, server))
			break;
		if (abp_position_guarded(turn, abp_batch_next, table, server, &next) != GUARD_DONE)
		{
			if (next.shipment != NULL)
				abp_shipment_drop(turn, next.shipment);
			abp_quota_give_back(server);
			break;
		}
		if (next.found && table->blocked_reason != NULL && !position->failed)
			abp_attachment_unblock(table->relid, false);
		if (next.shipment == NULL)
			abp_quota_give_back(server);
		else
		{
			built = true;
			if (next.gather_ms > 0)
				turn->gather_until = abp_turn_in_ms(next.gather_ms);
		}
		if (!next.found)
		{
			turn->room_left = true;
			break;
		}
	}
	retry_due_shipments(turn, table, server, true);
	turn->backlog |= position->backlog;

	foreach(lc, abp_shipments)
	{
		Shipment   *shipment = lfirst(lc);
		Departure  *departure;

		if (shipment->stage != SHIPMENT_PREPARED ||
			shipment->delivery.usage_table != table->relid)
			continue;
		departure = palloc0(sizeof(Departure));
		departure->shipment = shipment;
		departure->target.url = psprintf("%s%s", server->url, POLAR_INGEST_PATH);
		departure->target.ca_file = server->ca_file;
		departure->target.proxy = server->proxy;
		departure->target.timeout_ms = server->timeout_ms;
		departure->token = pstrdup(token);
		*departures = lappend(*departures, departure);
	}
	abp_token_forget(token);
}

/*
 * Keep the extension from being dropped until the transaction ends.  Returns
 * false if that is under way, or done: then its tables may go at any moment.
 *
 * A transaction that has dropped and created it is seen to have committed a
 * moment before the other sessions hear that what they know of the old tables
 * is void.  It holds its lock on a table, old or new, until then; nobody
 * locks the new extension itself.
 */
static bool
keep_extension(Oid extension, Oid outbox)
{
	LOCKTAG		tag;

	SET_LOCKTAG_OBJECT(tag, MyDatabaseId, ExtensionRelationId, extension, 0);
	if (LockAcquire(&tag, AccessShareLock, false, true) == LOCKACQUIRE_NOT_AVAIL ||
		!ConditionalLockRelationOid(outbox, AccessShareLock))
		return false;
	AcceptInvalidationMessages();
	return get_extension_oid("aibilling_polar", true) == extension &&
		abp_extension_relation("outbox_entry") == outbox;
}

/*
 * The attached tables.  Read again when something has changed, and now and
 * then in case it went unnoticed.
 */
static List *
current_tables(bool *armed)
{
	TimestampTz now = GetCurrentTimestamp();

	if (tables_stale || now < tables_read_at ||
		now > tables_read_at + TABLES_MS * INT64CONST(1000))
	{
		MemoryContext old = MemoryContextSwitchTo(tables_context);

		/* What changes while we read is read the next time. */
		tables_stale = false;
		tables_read_at = 0;
		known_tables = NIL;
		MemoryContextReset(tables_context);
		known_tables = abp_attachments(armed);
		abp_rows_forget_plans_except(known_tables);
		abp_positions_forget_except(known_tables);
		tables_read_at = now;
		MemoryContextSwitchTo(old);
	}
	*armed = abp_database_standing() == DATABASE_ARMED;
	return known_tables;
}

/*
 * Who changes a server's name, or drops it, has what the ledger says of its
 * deliveries until their transaction ends: these wait, and no others.  What we
 * get here we keep until ours does.
 */
static void
note_busy_servers(Turn *turn, List *tables)
{
	List	   *asked = NIL;
	ListCell   *lc;

	turn->busy_servers = NIL;
	foreach(lc, tables)
	{
		Oid			serverid = ((UsageTable *) lfirst(lc))->serverid;
		LOCKTAG		tag;

		if (!OidIsValid(serverid) || list_member_oid(asked, serverid))
			continue;
		asked = lappend_oid(asked, serverid);
		SET_LOCKTAG_OBJECT(tag, MyDatabaseId, ForeignServerRelationId, serverid, 0);
		if (LockAcquire(&tag, AccessShareLock, false, true) == LOCKACQUIRE_NOT_AVAIL)
			turn->busy_servers = lappend_oid(turn->busy_servers, serverid);
	}
	if (turn->busy_servers != NIL)
		abp_turn_due_at(turn, abp_turn_in_ms(LOCKED_MS));
}

/*
 * Tables whose owner's code is slow come last, else whoever was served longest
 * ago comes first.
 */
static int
quick_first(const ListCell *a, const ListCell *b)
{
	const Position *one = abp_position_of(((UsageTable *) lfirst(a))->relid);
	const Position *other = abp_position_of(((UsageTable *) lfirst(b))->relid);

	if (one->slow != other->slow)
		return one->slow ? 1 : -1;
	return one->served_at < other->served_at ? -1 : one->served_at > other->served_at;
}

/*
 * The order in which tables have their turn: who has waited longest comes
 * first, and who took long the last time comes after all others.
 */
static List *
in_order(List *tables)
{
	List	   *ordered = list_copy(tables);

	if (list_length(ordered) > 1)
		list_sort(ordered, quick_first);
	return ordered;
}

/* A table's turn. */
static void
serve_table(Turn *turn, const UsageTable *table, bool fresh, List **departures)
{
	Position   *position = abp_position_of(table->relid);
	const ServerOptions *server = abp_lane_options(table);
	TimestampTz start = GetCurrentTimestamp();
	TimestampTz due;

	position->failed = false;
	position->barred = true;
	position->served_at = start;
	if (server == NULL)
		return;

	/*
	 * Who has just become the shipper tries again: somebody may be waiting.
	 */
	if (table->blocked_until > start &&
		(table->blocked_until == DT_NOEND || (!abp_position_servers_are_new(table) && !fresh)))
	{
		abp_turn_due_at(turn, table->blocked_until);
		return;
	}
	if (position->try_at > start)
	{
		abp_turn_due_at(turn, position->try_at);
		return;
	}

	/*
	 * What was needed to attach is needed still: rights can be taken back.
	 */
	if (abp_server_aclcheck(table->serverid, table->owner) != ACLCHECK_OK)
	{
		abp_position_refuse(turn, table, psprintf("its owner has no USAGE on server \"%s\"",
												  table->server));
		return;
	}

	position->barred = false;
	abp_unpriced_scan(turn, table, server);
	if (!position->failed)
		prepare_table(turn, table, server, departures);
	abp_position_saw_servers(position);
	position->slow = position->failed ||
		TimestampDifferenceExceeds(start, GetCurrentTimestamp(), SLOW_MS);

	due = abp_outbox_next_due(table->relid);
	if (due > start)
		abp_turn_due_at(turn, due);
}

/* The worker waits for an update of the extension, and says so once. */
static void
warn_of_old_version(const ShipScope *scope)
{
	static bool warned = false;

	if (warned || scope->in_procedure || OidIsValid(abp_extension_relation("ledger")))
		return;
	warned = true;
	ereport(WARNING,
			(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
			 errmsg("extension \"aibilling_polar\" of database \"%s\" is older than its library: usage is queued and not sent",
					get_database_name(MyDatabaseId)),
			 errhint("Run ALTER EXTENSION aibilling_polar UPDATE in it.")));
}

/*
 * A turn's transaction: settle what has ended, prepare what is next.  Returns
 * the requests to make, in turn->context.
 */
static List *
settle_and_prepare(Turn *turn, const ShipScope *scope)
{
	List	   *departures = NIL;
	List	   *tables;
	bool		armed;
	bool		fresh = !recovered;
	bool		idle;
	ListCell   *lc;
	Oid			extension = get_extension_oid("aibilling_polar", true);
	Oid			outbox = abp_extension_relation("outbox_entry");

	if (extension != known_extension)
	{
		abp_ship_reset();
		known_extension = extension;
	}
	if (!OidIsValid(extension) || !OidIsValid(outbox))
		return NIL;
	if (!keep_extension(extension, outbox))
	{
		abp_turn_due_at(turn, abp_turn_in_ms(DROP_WAIT_MS));
		return NIL;
	}
	if (!abp_extension_installed())
	{
		warn_of_old_version(scope);
		return NIL;
	}

	watched_relids[0] = abp_extension_relation("price");
	watched_relids[1] = abp_extension_relation("model_alias");
	watched_relids[2] = abp_extension_relation("service_tier_rule");
	watched_relids[3] = abp_extension_relation("price_source");
	watched_relids[4] = abp_extension_relation("attachment");	/* attached with rows */

	/* What is taken over must find its table: not by a list of a while ago. */
	if (!recovered)
		tables_stale = true;
	tables = current_tables(&armed);
	MemoryContextSwitchTo(turn->context);
	if (!recovered)
		recover(tables);
	notice_resumed(tables);
	note_busy_servers(turn, tables);
	abp_settle_answered(turn, tables);
	change_lanes(tables);
	abp_lanes_write_down(turn);
	if (turn->settled >= SUM_UP_EVERY)
	{
		abp_ledger_sum_up();
		turn->settled = 0;
	}
	if (!armed)
	{
		/* Before arm(), a dump may still be bringing deliveries. */
		recovered = abp_shipments != NIL;
		return NIL;
	}
	abp_settle_orphans(turn, tables);
	forget_dropped(tables);

	abp_positions_note_changes(prices_changed, servers_changed);
	prices_changed = servers_changed = false;

	foreach(lc, in_order(tables))
	{
		UsageTable *table = lfirst(lc);

		CHECK_FOR_INTERRUPTS();

		if (!OidIsValid(table->owner) || !abp_ship_in_scope(scope, table) ||
			list_member_oid(turn->busy_servers, table->serverid))
			continue;
		if (abp_turn_is_over(turn))
		{
			turn->more_to_build = true;
			break;
		}
		serve_table(turn, table, fresh, &departures);
	}

	idle = departures == NIL && !turn->more_to_build && !turn->backlog;
	turn->more_to_build |= abp_fold(turn, tables, idle);

	/* One table's backlog waits little for another's rows to gather. */
	if (turn->backlog)
		turn->gather_until = Min(turn->gather_until, abp_turn_in_ms(GATHER_MIN_MS));

	/*
	 * Every commit wakes us: not for nothing while there is nothing to do but
	 * to wait.
	 */
	if (departures == NIL && abp_shipments == NIL && !turn->room_left && !turn->more_to_build)
		turn->gather_until = abp_turn_in_ms(GATHER_MAX_MS);
	return departures;
}

/* Make the requests that the turn has committed. */
static void
depart(List *departures)
{
	ListCell   *lc;

	foreach(lc, departures)
	{
		Departure  *departure = lfirst(lc);
		Shipment   *shipment = departure->shipment;

		shipment->request = abp_http_post(&departure->target, departure->token,
										  shipment->delivery.body.data,
										  shipment->delivery.body.len);
		shipment->stage = SHIPMENT_IN_FLIGHT;
		abp_token_forget(departure->token);
	}
}

/* Note which requests have ended: the next turn settles them. */
static void
collect_answers(void)
{
	HttpRequest *request;

	while ((request = abp_http_next_finished()) != NULL)
	{
		ListCell   *lc;

		foreach(lc, abp_shipments)
		{
			Shipment   *shipment = lfirst(lc);

			if (shipment->request == request)
				shipment->stage = SHIPMENT_ANSWERED;
		}
	}
}

/*
 * After a small batch, let more rows gather: a turn for each of many small
 * commits would take the machine's time and its disk's from those who commit.
 */
static void
gather(Turn *turn)
{
	for (;;)
	{
		TimestampTz now = GetCurrentTimestamp();

		/* a clock that was set back must not stop us */
		if (now >= turn->gather_until || turn->gather_until - now > GATHER_MAX_MS * 1000)
			return;
		(void) abp_http_wait(TimestampDifferenceMilliseconds(now, turn->gather_until));
		collect_answers();
	}
}

/*
 * One turn: settle, prepare, commit, send, and wait until an answer comes,
 * something else wakes us, or it is time for more.
 *
 * Returns 0 if there is more to do at once, else the milliseconds until there
 * may be (-1: nothing is known to become due); requests may be in flight only
 * when 0 is returned.  The caller holds the shipper's lock and is in no
 * transaction (in_procedure: in one without a snapshot).
 */
long
abp_ship(const ShipScope *scope)
{
	List	   *departures;
	MemoryContext caller = CurrentMemoryContext;

	init_ship();
	MemoryContextReset(this_turn.context);
	this_turn.next_due = DT_NOEND;
	this_turn.started = GetCurrentTimestamp();

	this_turn.more_to_build = false;
	this_turn.room_left = false;
	this_turn.backlog = false;
	if (!scope->in_procedure)
		gather(&this_turn);
	collect_answers();
	abp_wake_listen();
	abp_ship_begin(scope);
	departures = settle_and_prepare(&this_turn, scope);
	abp_ship_commit(scope);
	MemoryContextSwitchTo(this_turn.context);
	depart(departures);
	MemoryContextSwitchTo(caller);

	if (this_turn.more_to_build)
	{
		(void) abp_http_wait(0);
		return 0;
	}
	if (abp_http_in_flight() > 0)
	{
		/* A commit's wake-up is news only if another request could fly. */
		for (;;)
		{
			long		timeout = IDLE_WAIT_MS;

			if (this_turn.next_due != DT_NOEND)
				timeout = Min(timeout, TimestampDifferenceMilliseconds(GetCurrentTimestamp(),
																	   this_turn.next_due));
			if (abp_http_wait(timeout) || this_turn.room_left || timeout < IDLE_WAIT_MS ||
				(OidIsValid(scope->owner) && abp_wake_worker_pid() != 0))
				return 0;
		}
	}

	if (this_turn.next_due == DT_NOEND)
		return -1;
	return TimestampDifferenceMilliseconds(GetCurrentTimestamp(), this_turn.next_due);
}

/*
 * How many events have been delivered since abp_ship_reset.
 */
int64
abp_ship_delivered(void)
{
	return this_turn.delivered;
}

/*
 * Has a table's server failed so often, or refused us, that waiting for it is
 * idle?
 */
bool
abp_ship_gave_up(const UsageTable *table)
{
	return table->paused_by_answer || table->failures >= FAILURES_BEFORE_GIVING_UP;
}
