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
 * What is in memory here can be lost at any moment: every request stands in
 * the ledger as "sending" before it is sent, and a later shipper sends it
 * again under the same external ids.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/xact.h"
#include "catalog/namespace.h"
#include "catalog/pg_extension.h"
#include "catalog/pg_proc.h"
#include "catalog/pg_type.h"
#include "commands/dbcommands.h"
#include "commands/extension.h"
#include "commands/trigger.h"
#include "common/hashfn.h"
#include "common/pg_prng.h"
#include "executor/spi.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "port/pg_crc32c.h"
#include "storage/ipc.h"
#include "storage/lmgr.h"
#include "storage/lock.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/inval.h"
#include "utils/jsonb.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/resowner.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"
#include "utils/timeout.h"
#include "utils/timestamp.h"
#include "utils/regproc.h"

#include "compat.h"
#include "config.h"
#include "polar/polar.h"
#include "polar/server.h"
#include "queue/outbox.h"
#include "queue/wake.h"
#include "ship/guard.h"
#include "ship/http.h"
#include "ship/quota.h"
#include "ship/shipper.h"
#include "usage/parents.h"
#include "usage/usage.h"

/* Advisory locks of SQL have 1 or 2 here: no session can name ours. */
#define SHIP_LOCK_FIELD 3

#define BACKOFF_FIRST_MS 1000
#define BACKOFF_MAX_MS (60 * 1000)
#define RATE_LIMITED_MS (60 * 1000) /* after a 429 without Retry-After */
#define PROBE_MS (5 * 60 * 1000)	/* between tries while a server refuses us */
#define TRANSIENT_MS (10 * 1000)	/* after an error that passes by itself */
#define HELD_MS 1000			/* until a row that others change is looked at
								 * again */
#define SKEW_MS 5000			/* hold rows whose time Polar calls the future */

/* A row that fails for a reason that may pass is held so long, then doubled. */
#define HOLD_MS (10 * 1000)
#define MAX_HOLDS 5
#define ROW_TOO_LARGE_TRIES 3	/* for our memory, before it is held */

/*
 * After so long a turn ends, and what it has prepared departs.  Tables that
 * took more than SLOW_MS come last in the next ones.
 */
#define TURN_MS 250
#define SLOW_MS 100

/* When to try again a table that another transaction has locked. */
#define LOCKED_MS 250
#define LOCKED_LONG_MS (10 * 1000)	/* and when to call it blocked */

/* After so many server errors a batch is halved, and a single row suspected. */
#define ERRORS_BEFORE_HALVING 3
#define ERRORS_BEFORE_REJECTING 5
#define TIMEOUTS_BEFORE_HALVING 3

/* Deliveries to a server, those that wait for a retry included, per request in flight. */
#define MAX_WAITING_SHARE 4

/* The longest wait for an answer without a look at the tables. */
#define IDLE_WAIT_MS 1000

/* Why rows are rejected of which the outbox cannot tell one from the other. */
#define SHARED_ID "id: several rows have it; delete all but one, and insert them with ids of their own"

/* After so many deliveries the ledger is summed up. */
#define SUM_UP_EVERY 1000

/* When to look again at an extension that is being dropped. */
#define DROP_WAIT_MS 1000

/*
 * The time from a turn whose batch was not full to the next turn, for each row
 * of the batch, and its bounds: a stream of commits is sent in few batches, a
 * single one soon.
 */
#define GATHER_ROW_MS 4
#define GATHER_MIN_MS 10
#define GATHER_MAX_MS 100

/* How long a list of the attached tables is believed. */
#define TABLES_MS 1000

/* How many ids taken out of entries are dealt with in one turn, about. */
#define TIDY_PER_TURN 10000

/* How many unpriced entries are looked at in one turn. */
#define UNPRICED_PER_TURN 32

/*
 * The scan over ready entries goes on where it ended.  It starts over to find
 * rows that committed late, spending at most this share of the time on it.
 */
#define RESTART_SHARE 20
#define RESTART_MS (10 * 1000)	/* at the latest, when there is always more */

/*
 * What is known of a server, for the life of the process: of what it says to
 * the token that all share and, apart from that, to each role's own.
 */
typedef struct Lane
{
	char		server[NAMEDATALEN];
	Oid			role;			/* with a user mapping of its own; InvalidOid:
								 * the others together */
	int			shipments;		/* unsettled, in flight or waiting */
	int			failures;		/* in a row */
	TimestampTz not_before;
	bool		paused_by_answer;
	uint32		refused_token;	/* hash of the token that was refused, 0: none */
	bool		lacks_token;	/* is paused for want of one */
	TimestampTz last_success;
	int			batch_size;		/* adapted to slow answers; 0: as configured */

	/* what aibilling.server_state is to say */
	char	   *reason;			/* or NULL */
	bool		unwritten;
	TimestampTz write_at;		/* not before this */
} Lane;

/* Where the scans over a table's entries stand, and how it has behaved. */
typedef struct Position
{
	Oid			usage_table;
	int64		cursor;
	TimestampTz restart_at;
	IdSet		held;			/* rows that others were changing, */
	TimestampTz held_until;		/* to be looked at again then */
	TimestampTz held_since;		/* some of them, without a break */
	bool		backlog;		/* did the last look leave rows behind? */
	int			batch_size;		/* adapted to our memory; 0: as configured */
	int			row_too_large;	/* how often in a row one alone was too much */

	/* rows that wait for a price */
	EntryCursor unpriced_cursor;
	TimestampTz unpriced_at;	/* not before this */
	uint64		scanned_for;	/* generation of prices when the scan began */
	uint64		looked_for;		/* that of the last scan that was complete */
	bool		unpriced_left;	/* has this one passed any over? */

	/* when the table has its turn */
	uint64		servers_seen;	/* generation of servers at its last turn */
	TimestampTz served_at;
	TimestampTz try_at;			/* it is locked: not before this */
	TimestampTz locked_since;	/* 0: it is not */
	bool		slow;
	bool		failed;			/* in this turn: no more of it */
	bool		barred;			/* is not served at present */
	int			rests;			/* how often in a row nothing could be sent */
} Position;

typedef enum ShipmentStage
{
	SHIPMENT_PREPARED,			/* in the ledger, to be sent after commit */
	SHIPMENT_IN_FLIGHT,
	SHIPMENT_ANSWERED,			/* to be settled */
	SHIPMENT_WAITING			/* to be sent again at retry_at */
} ShipmentStage;

/* A delivery on its way. */
typedef struct Shipment
{
	MemoryContext context;		/* holds the shipment */
	Delivery	delivery;
	Lane	   *lane;
	ShipmentStage stage;
	HttpRequest *request;
	TimestampTz retry_at;
	int			server_errors;	/* in a row */
	TimestampTz first_error_at;
	int			timeouts;
} Shipment;

/* While a batch is filled from usage rows. */
typedef struct Filling
{
	Shipment   *shipment;
	const UsageTable *table;
	const ServerOptions *server;
	char		taken_from;		/* the rows' state, 0: they have been sent
								 * before */
	bool		rows_are_settled;	/* nobody is changing those that come now */
	int64		max_rows;
	int64		nrows;
	int64	   *row_ids;		/* of each row, as they came */
	uint32	   *event_keys;		/* of each event */
	IdSet		seen;
	IdSet		changing;		/* another transaction may be changing them */
	IdSet		sent;
	bool		full;			/* there were more than fit, or time for */
	IdSet		left;			/* to be sent later */
	List	   *exceptions;		/* of OutboxEntry */
	List	   *children;		/* of ChildRow: of "sent", those with a parent */
	int			put_off;		/* of them, for a while */
	bool		no_memory;		/* for one of these */
	bool		warned;			/* of one of them */
	MemoryContext context;
} Filling;

static MemoryContext ship_context = NULL;	/* lanes, positions, shipments */
static MemoryContext turn_context = NULL;	/* reset every turn */
static List *lanes = NIL;
static List *positions = NIL;
static List *shipments = NIL;
static Oid	known_extension = InvalidOid;
static bool recovered = false;	/* have unsettled deliveries been taken over? */
static TimestampTz next_due;
static bool more_to_build = false;	/* can another batch be built at once? */
static TimestampTz gather_until = 0;	/* no turn before this */
static bool backlog = false;	/* does any table have one? */
static bool room_left = true;	/* could more requests fly, if there were
								 * more? */
static int64 delivered = 0;		/* events */
static int	settled = 0;		/* deliveries since the ledger was summed up */

/* What abp_usage_tables last said, in tables_context. */
static MemoryContext tables_context = NULL;
static List *known_tables = NIL;
static TimestampTz tables_read_at = 0;

/* set by invalidation callbacks */
static bool tables_stale = true;
static bool prices_changed = true;
static bool servers_changed = false;
static Oid	price_relids[5];

/* How often work() has found these changed: what compares knows what it has missed. */
static uint64 prices_generation = 1;
static uint64 servers_generation = 1;

static TimestampTz turn_started = 0;

/* --- lock and transactions ------------------------------------------------- */

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

static void
on_relcache_change(Datum arg, Oid relid)
{
	tables_stale = true;
	for (int i = 0; i < lengthof(price_relids); i++)
	{
		if (relid == price_relids[i] || relid == InvalidOid)
			prices_changed = true;
	}
}

static void
on_server_change(Datum arg, int cacheid, uint32 hashvalue)
{
	servers_changed = true;
	tables_stale = true;
}

static void
init_ship(void)
{
	if (ship_context != NULL)
		return;

	ship_context = AllocSetContextCreate(TopMemoryContext, "aibilling shipper",
										 ALLOCSET_DEFAULT_SIZES);
	turn_context = AllocSetContextCreate(TopMemoryContext, "aibilling shipper turn",
										 ALLOCSET_DEFAULT_SIZES);
	tables_context = AllocSetContextCreate(TopMemoryContext, "aibilling shipper tables",
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
	abp_quota_forget();
	MemoryContextReset(ship_context);
	lanes = NIL;
	positions = NIL;
	shipments = NIL;
	recovered = false;
	prices_changed = true;
	tables_stale = true;
	delivered = 0;
}

static Lane *
lane_of(const char *server, Oid role)
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

	old = MemoryContextSwitchTo(ship_context);
	lane = palloc0(sizeof(Lane));
	strlcpy(lane->server, server, NAMEDATALEN);
	lane->role = role;
	lane->not_before = DT_NOBEGIN;
	lanes = lappend(lanes, lane);
	MemoryContextSwitchTo(old);
	return lane;
}

static Lane *
lane_of_table(const UsageTable *table)
{
	return lane_of(table->server, table->role);
}

/* A lane in messages. */
static const char *
lane_name(const Lane *lane)
{
	const char *role = OidIsValid(lane->role) ? GetUserNameFromId(lane->role, true) : NULL;

	return role == NULL ? psprintf("server \"%s\"", lane->server) :
		psprintf("server \"%s\" by the user mapping for %s", lane->server, quote_identifier(role));
}

static Position *
position_of(Oid usage_table)
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

	old = MemoryContextSwitchTo(ship_context);
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
static bool
wants_prices(const Position *position)
{
	return position->looked_for != prices_generation;
}

/* Have servers or user mappings changed since the table's last turn? */
static bool
servers_are_new(const UsageTable *table)
{
	return position_of(table->relid)->servers_seen != servers_generation;
}

/* The scan that is on its way, if any, has not seen all. */
static void
look_for_prices_again(Oid usage_table)
{
	Position   *position = position_of(usage_table);

	position->scanned_for = position->looked_for = 0;
	more_to_build = true;
}

static Shipment *
new_shipment(Lane *lane)
{
	MemoryContext context = AllocSetContextCreate(ship_context, "aibilling shipment",
												  ALLOCSET_DEFAULT_SIZES);
	Shipment   *shipment = MemoryContextAllocZero(context, sizeof(Shipment));
	MemoryContext old = MemoryContextSwitchTo(ship_context);

	shipment->context = context;
	shipment->lane = lane;
	shipment->delivery.server = MemoryContextStrdup(context, lane->server);
	shipments = lappend(shipments, shipment);
	shipment->lane->shipments++;
	MemoryContextSwitchTo(old);
	return shipment;
}

static void
drop_shipment(Shipment *shipment)
{
	if (shipment->request != NULL)
		abp_http_release(shipment->request);
	settled++;
	shipment->lane->shipments--;
	shipments = list_delete_ptr(shipments, shipment);
	MemoryContextDelete(shipment->context);
}

static bool
turn_is_over(void)
{
	return TimestampDifferenceExceeds(turn_started, GetCurrentTimestamp(), TURN_MS);
}

static void
due_at(TimestampTz when)
{
	next_due = Min(next_due, when);
}

static TimestampTz
in_ms(int64 ms)
{
	return GetCurrentTimestamp() + ms * INT64CONST(1000);
}

/*
 * Leave a table alone until then.  Not longer than for a while, should the
 * reason be impossible to write down: its owner has locked what stands there.
 */
static void
block_table(const UsageTable *table, const char *reason, TimestampTz until)
{
	if (!abp_usage_table_block(table->relid, reason, until))
	{
		until = Min(until, in_ms(TRANSIENT_MS));
		position_of(table->relid)->try_at = until;
	}
	due_at(until);
}

/* --- a batch: from ids to a request body ------------------------------------ */

/*
 * Look up a user's function.  Its server's owner must be allowed to run it,
 * and with the rights of its owner, today as when the option was set: what has
 * its name now may be another function.  Returns InvalidOid without one;
 * without a usable one, also says why in *problem.
 */
static Oid
find_function(const char *name, Oid result, const ServerOptions *server, char **problem)
{
	Oid			argtypes[1] = {JSONBOID};
	List	   *names;
	Oid			namespace;
	HeapTuple	tup = NULL;
	Form_pg_proc proc;
	Oid			funcid = InvalidOid;

	if (name == NULL)
		return InvalidOid;

	names = stringToQualifiedNameList(name ABP_NO_SOFT_ERROR);
	namespace = get_namespace_oid(strVal(linitial(names)), true);
	if (OidIsValid(namespace))
		tup = SearchSysCache3(PROCNAMEARGSNSP, CStringGetDatum(strVal(lsecond(names))),
							  PointerGetDatum(buildoidvector(argtypes, 1)),
							  ObjectIdGetDatum(namespace));
	proc = HeapTupleIsValid(tup) ? (Form_pg_proc) GETSTRUCT(tup) : NULL;
	if (proc == NULL || proc->prokind != PROKIND_FUNCTION || proc->proretset ||
		proc->prorettype != result)
		*problem = psprintf("function %s(jsonb) returning %s does not exist",
							name, format_type_be(result));
	else if (!abp_may_execute(proc->oid, server->owner))
		*problem = psprintf("the owner of server \"%s\" may not execute function %s(jsonb)",
							server->name, name);
	else if (!has_privs_of_role(server->owner, proc->proowner))
		*problem = psprintf("the owner of server \"%s\" is not a member of role %s, which owns function %s(jsonb)",
							server->name, quote_identifier(GetUserNameFromId(proc->proowner, false)),
							name);
	else
		funcid = proc->oid;
	if (tup != NULL)
		ReleaseSysCache(tup);
	return funcid;
}

/* A call of a user's function. */
typedef struct FunctionCall
{
	Oid			funcid;
	Jsonb	   *argument;
	Datum		result;			/* (Datum) 0: NULL */
} FunctionCall;

static void
call_guarded(void *arg)
{
	FunctionCall *call = arg;
	HeapTuple	proc = SearchSysCache1(PROCOID, ObjectIdGetDatum(call->funcid));
	Oid			proowner;
	FmgrInfo	flinfo;
	SavedUser	saved;

	LOCAL_FCINFO(fcinfo, 1);

	if (!HeapTupleIsValid(proc))
		elog(ERROR, "cache lookup failed for function %u", call->funcid);
	proowner = ((Form_pg_proc) GETSTRUCT(proc))->proowner;
	ReleaseSysCache(proc);

	abp_become(proowner, &saved);
	fmgr_info(call->funcid, &flinfo);
	InitFunctionCallInfoData(*fcinfo, &flinfo, 1, InvalidOid, NULL, NULL);
	fcinfo->args[0].value = JsonbPGetDatum(call->argument);
	fcinfo->args[0].isnull = false;
	call->result = FunctionCallInvoke(fcinfo);
	if (fcinfo->isnull)
		call->result = (Datum) 0;
	else
		call->result = PointerGetDatum(PG_DETOAST_DATUM_COPY(call->result));
	abp_restore_user(&saved);
}

/*
 * Call a user's function as its own owner.  If it fails its effects are rolled
 * back, and *reason says why.  The result is copied to the current memory
 * context; NULL is (Datum) 0.  Raised is only that the time is up.
 */
static GuardOutcome
call_function(Oid funcid, const char *option, Jsonb *whole, Datum *result,
			  char **reason)
{
	FunctionCall call = {funcid, whole};
	GuardError	error;
	GuardOutcome outcome = abp_guard(NULL, call_guarded, &call, &error);

	if (outcome == GUARD_TOO_LONG)
		ereport(ERROR, (errcode(error.sqlerrcode), errmsg_internal("%s", error.message)));
	if (outcome == GUARD_FAILED)
		*reason = psprintf("%s failed: %s", option, error.message);
	else if (outcome != GUARD_DONE)
		*reason = error.message;
	*result = call.result;
	return outcome;
}

/* Free a shipment's request, which is built anew before it is sent again. */
static void
forget_request(Shipment *shipment)
{
	Delivery   *delivery = &shipment->delivery;

	if (shipment->request != NULL)
		abp_http_release(shipment->request);
	shipment->request = NULL;
	if (delivery->body.data != NULL)
		pfree(delivery->body.data);
	delivery->body.data = NULL;
	if (delivery->event_ids != NULL)
		pfree(delivery->event_ids);
	delivery->event_ids = NULL;
}

/* Look at rows that others are changing again soon, if nothing tells before. */
static void
hold_rows(const UsageTable *table, const IdSet *ids)
{
	Position   *position = position_of(table->relid);
	TimestampTz now = GetCurrentTimestamp();

	abp_idset_add_set(&position->held, ids, ship_context);
	if (TimestampDifferenceExceeds(position->held_until, now, HELD_MS))
		position->held_since = now;
	position->held_until = in_ms(HELD_MS);
	due_at(position->held_until);
}

static void
set_aside(Filling *filling, int64 id, const RowState *verdict)
{
	MemoryContext old = MemoryContextSwitchTo(filling->context);
	OutboxEntry *entry = palloc0(sizeof(OutboxEntry));

	entry->usage_table = filling->table->relid;
	entry->state = verdict->state;
	entry->not_before = verdict->not_before;
	entry->attempts = filling->shipment->delivery.prior_attempts;
	entry->outcome_unknown = filling->shipment->delivery.outcome_unknown;
	entry->error = verdict->error == NULL ? NULL : pstrdup(verdict->error);
	abp_idset_add(&entry->ids, id, id, filling->context);
	if (verdict->state == OUTBOX_UNPRICED)
	{
		/* Its price may have come while it was in another state. */
		look_for_prices_again(filling->table->relid);
	}
	filling->exceptions = lappend(filling->exceptions, entry);
	MemoryContextSwitchTo(old);
}

static void
reject(Filling *filling, int64 id, char *reason)
{
	RowState	verdict = {OUTBOX_REJECTED, DT_NOBEGIN, reason};

	set_aside(filling, id, &verdict);
}

/*
 * Set a row aside for now, and for longer each time that it fails; in the end
 * it is rejected.
 */
static void
put_off(Filling *filling, int64 id, char *reason)
{
	int			attempts = filling->shipment->delivery.prior_attempts;
	RowState	verdict = {OUTBOX_WAITING, in_ms(HOLD_MS << Min(attempts, MAX_HOLDS)), reason};

	if (attempts >= MAX_HOLDS)
		verdict.state = OUTBOX_REJECTED;
	set_aside(filling, id, &verdict);
	((OutboxEntry *) llast(filling->exceptions))->attempts++;
	filling->put_off++;
}

/*
 * What the functions of a server's options make of a row, given as jsonb.
 * With another outcome than GUARD_DONE, *reason says which one cannot be
 * called, fails, or returns what is no event name or no object.
 */
GuardOutcome
abp_ship_call_functions(const ServerOptions *server, Jsonb *whole,
						EventOverrides *overrides, char **reason)
{
	char	   *problem = NULL;
	Oid			event_name = find_function(server->event_name_function, TEXTOID, server, &problem);
	Oid			metadata = find_function(server->metadata_function, JSONBOID, server, &problem);
	Datum		result;
	GuardOutcome outcome;

	if (problem != NULL)
	{
		*reason = problem;
		return GUARD_FAILED;
	}
	if (OidIsValid(event_name))
	{
		outcome = call_function(event_name, "event_name_function", whole, &result, reason);
		if (outcome != GUARD_DONE)
			return outcome;
		if (result == (Datum) 0)
		{
			*reason = "event_name_function returned null";
			return GUARD_FAILED;
		}
		overrides->event_name.data = VARDATA_ANY(DatumGetPointer(result));
		overrides->event_name.len = VARSIZE_ANY_EXHDR(DatumGetPointer(result));
	}
	if (OidIsValid(metadata))
	{
		outcome = call_function(metadata, "metadata_function", whole, &result, reason);
		if (outcome != GUARD_DONE)
			return outcome;
		if (result == (Datum) 0 || !JB_ROOT_IS_OBJECT(DatumGetJsonbP(result)))
		{
			*reason = "metadata_function did not return an object";
			return GUARD_FAILED;
		}
		overrides->metadata = DatumGetJsonbP(result);
	}
	return GUARD_DONE;
}

/* A checksum by which a row is known again. */
static uint32
external_id_key(const UsageRow *row)
{
	pg_crc32c	crc;

	INIT_CRC32C(crc);
	COMP_CRC32C(crc, row->external_id.data, row->external_id.len);
	FIN_CRC32C(crc);
	return crc;
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
		abp_delivery_key(&filling->shipment->delivery, row->id, &key) &&
		key != external_id_key(row))
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
	StringInfoData reason;
	RowState	verdict;
	char	   *failure = NULL;

	if (filling->rows_are_settled)
		abp_idset_add(&filling->seen, row->id, row->id, filling->context);
	else if (!notice_row(filling, row))
		return filling->nrows <= filling->max_rows;
	if (delivery->nevents == filling->max_rows)
		return false;			/* rows share ids: shared_ids tells which */
	abp_usage_judge(row, filling->server, &verdict);
	if (verdict.state != OUTBOX_READY)
	{
		set_aside(filling, row->id, &verdict);
		return true;
	}
	if (whole != NULL)
	{
		GuardOutcome outcome = abp_ship_call_functions(filling->server, whole, &overrides,
													   &failure);

		if (outcome == GUARD_FAILED)
			reject(filling, row->id, failure);
		else if (outcome != GUARD_DONE)
			put_off(filling, row->id, failure);
		filling->no_memory |= outcome == GUARD_NO_MEMORY;
		if (outcome != GUARD_DONE)
			return true;
	}

	initStringInfo(&reason);
	if (delivery->nevents > 0)
		appendStringInfoChar(body, ',');
	if (!abp_polar_encode(body, row, &filling->server->format, &overrides, &reason))
	{
		body->len = before;
		reject(filling, row->id, reason.data);
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
		filling->event_keys[delivery->nevents] = external_id_key(row);
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

static void
read_guarded(void *arg)
{
	GuardedRead *read = arg;

	abp_usage_read(read->filling->table, read->ids, read->whole, add_in_time, read->filling);
}

static bool
pass_over(const UsageRow *row, Jsonb *whole, void *arg)
{
	return false;
}

/*
 * Can the table be read at all?  An error that is no row's fault is raised.
 */
static void
read_no_row(const UsageTable *table, bool whole)
{
	IdSet		none = {0};

	abp_idset_add(&none, PG_INT64_MIN, PG_INT64_MIN, CurrentMemoryContext);
	abp_usage_read(table, &none, whole, pass_over, NULL);
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
		read_no_row(filling->table, whole);
	if (outcome == GUARD_PASSES)
	{
		if (filling->seen.nranges == 0)
			ereport(ERROR,
					(errcode(error->sqlerrcode), errmsg_internal("%s", error->message)));
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
	TimestampTz start = GetCurrentTimestamp();

	for (int r = 0; r < ids->nranges && !filling->full; r++)
	{
		for (int64 id = ids->ranges[r].first;; id++)
		{
			IdSet		one = {0};
			GuardedRead read = {filling, &one, whole};
			FillingMark mark = mark_filling(filling);
			GuardError	error;
			GuardOutcome outcome;

			CHECK_FOR_INTERRUPTS();

			abp_idset_add(&one, id, id, filling->context);
			abp_guard_start_clock();
			outcome = abp_guard(filling->table, read_guarded, &read, &error);
			if (outcome != GUARD_DONE)
			{
				abp_guard_start_clock();
				unread(filling, &mark, &one);
				if (!set_failed_aside(filling, id, whole, outcome, &error))
					filling->full = true;
			}
			if (TimestampDifferenceExceeds(start, GetCurrentTimestamp(), TURN_MS))
				filling->full = true;
			if (filling->full || id == ids->ranges[r].last)
				break;
		}
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
		Position   *position = position_of(filling->table->relid);

		/* A row that is too much again and again, alone, is set aside. */
		position->batch_size = abp_idset_count(ids);
		if (position->batch_size > 1)
			position->row_too_large = 0;
		else if (position->row_too_large++ >= ROW_TOO_LARGE_TRIES)
			outcome = GUARD_FAILED; /* read it alone */
	}
	if (outcome == GUARD_PASSES || outcome == GUARD_NO_MEMORY)
		ereport(ERROR,
				(errcode(error.sqlerrcode), errmsg_internal("%s", error.message)));
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
	MemoryContext old = MemoryContextSwitchTo(filling->shipment->context);

	forget_request(filling->shipment);
	initStringInfo(&delivery->body);
	delivery->nevents = 0;
	filling->max_rows = abp_idset_count(ids);
	delivery->event_ids = palloc(sizeof(int64) * Max(1, filling->max_rows));
	MemoryContextSwitchTo(old);

	filling->row_ids = palloc(sizeof(int64) * (filling->max_rows + 1));
	filling->event_keys = palloc(sizeof(uint32) * Max(1, filling->max_rows));
	appendStringInfoString(&delivery->body, "{\"events\":[");
	read_rows(filling, ids, whole);
	if (filling->changing.nranges > 0)
	{
		IdSet		settled = abp_usage_settled(filling->table, &filling->changing);
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

/*
 * None of a batch's rows can be sent, and some were only put off: leave the table
 * alone for a while, longer each time.
 */
static void
rest_table(const UsageTable *table, const Filling *filling)
{
	Position   *position = position_of(table->relid);
	const char *reason = ((OutboxEntry *) llast(filling->exceptions))->error;
	TimestampTz until = in_ms(HOLD_MS << position->rests);

	if (table->blocked_reason == NULL && !filling->warned)
		ereport(WARNING,
				(errcode(filling->no_memory ? ERRCODE_OUT_OF_MEMORY :
						 ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("usage rows of %s cannot be delivered: %s", table->name, reason)));
	position->rests = Min(position->rests + 1, MAX_HOLDS);
	position->failed = true;
	block_table(table, reason, until);
}

/*
 * The rows of a request, built from these ids, that are not to be sent without
 * their parents.  What becomes of them instead is added to *held, as
 * OutboxEntry.
 */
static IdSet
hold_children(Filling *filling, IdSet *ids, List **held)
{
	ChildBatch	batch = {ids, &filling->sent, filling->exceptions};
	IdSet		without = {0};
	ListCell   *lc;

	abp_parents_judge(filling->table, filling->children, &batch);
	foreach(lc, filling->children)
	{
		ChildRow   *child = lfirst(lc);

		if (child->verdict.state == OUTBOX_READY)
			continue;
		set_aside(filling, child->id, &child->verdict);
		*held = lappend(*held, llast(filling->exceptions));
		abp_idset_add(&without, child->id, child->id, CurrentMemoryContext);
	}
	return without;
}

/*
 * Build a shipment's request from the rows of these ids, by the active
 * snapshot: ids taken from the outbox in a state, or with 0 ids that have been
 * sent before.  Rows that cannot be sent now go back to the outbox with their
 * reason; the delivery's ids are those that can.  Returns false if there were
 * more than a request may hold.
 */
static bool
fill_shipment(Shipment *shipment, const UsageTable *table,
			  const ServerOptions *server, IdSet *ids, char taken_from)
{
	Delivery   *delivery = &shipment->delivery;
	Filling		filling;
	OutboxEntry *back;
	int			nback = 0;
	ListCell   *lc;
	IdSet		unseen;
	IdSet		shared = {0};
	List	   *held = NIL;
	IdSet		wanted = *ids;
	bool		whole = server->event_name_function != NULL || server->metadata_function != NULL;

	/*
	 * Ids of several rows are known by the rows, and so are children that
	 * have to wait for their parents: then without them.  Children that Polar
	 * may have are sent as they were.
	 */
	for (;;)
	{
		IdSet		more;

		CHECK_FOR_INTERRUPTS();

		filling = (Filling)
		{
			.shipment = shipment,.table = table,.server = server,.taken_from = taken_from,
				.context = CurrentMemoryContext
		};
		read_batch(&filling, &wanted, whole);
		more = shared_ids(&filling);
		abp_idset_add_set(&shared, &more, CurrentMemoryContext);
		if (more.nranges == 0 && filling.children != NIL && !delivery->outcome_unknown)
			more = hold_children(&filling, ids, &held);
		if (more.nranges == 0)
			break;
		wanted = abp_idset_subtract(&wanted, &more);
	}

	unseen = abp_idset_subtract(&wanted, &filling.seen);
	if (filling.full)
		abp_idset_add_set(&filling.left, &unseen, CurrentMemoryContext);
	else
	{
		delivery->vanished += abp_idset_count(&unseen);
		abp_idset_add_set(&delivery->vanished_ids, &unseen, shipment->context);
	}

	filling.exceptions = list_concat(held, filling.exceptions);
	back = palloc0(sizeof(OutboxEntry) * (list_length(filling.exceptions) + 2));
	foreach(lc, filling.exceptions)
		back[nback++] = *(OutboxEntry *) lfirst(lc);
	if (shared.nranges > 0)
		back[nback++] = (OutboxEntry)
	{
		.usage_table = table->relid,
			.state = OUTBOX_REJECTED,
			.attempts = delivery->prior_attempts,
			.outcome_unknown = delivery->outcome_unknown,
			.ids = shared,
			.error = SHARED_ID
	};
	if (filling.left.nranges > 0)
		back[nback++] = (OutboxEntry)
	{
		.usage_table = table->relid,
			.state = taken_from == 0 ? OUTBOX_READY : taken_from,
			.attempts = delivery->prior_attempts,
			.outcome_unknown = delivery->outcome_unknown,
			.not_before = GetCurrentTimestamp(),
			.ids = filling.left
	};
	abp_outbox_put(back, nback);

	memset(&delivery->ids, 0, sizeof(IdSet));
	abp_idset_add_set(&delivery->ids, &filling.sent, shipment->context);
	abp_idset_sort(&delivery->ids);
	if (taken_from != 0)
		keep_keys(&filling);
	if (filling.changing.nranges > 0)
		hold_rows(table, &filling.changing);
	if (filling.full)
		position_of(table->relid)->cursor = PG_INT64_MIN;
	if (filling.put_off > 0 && delivery->nevents == 0)
		rest_table(table, &filling);
	return !filling.full;
}

/* Rows that are gone are reported once, where they first are missed. */
static void
report_vanished(const Delivery *delivery, const UsageTable *table, int64 before)
{
	if (delivery->vanished > before)
		ereport(WARNING,
				(errcode(ERRCODE_NO_DATA_FOUND),
				 errmsg(INT64_FORMAT " usage rows of %s were gone before they were sent",
						delivery->vanished - before, table->name),
				 errhint("Rows leave the outbox when they are deleted through the attached table, not with a dropped or truncated partition.")));
}

/* --- what becomes of a request ---------------------------------------------- */

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

	abp_outbox_put(&entry, 1);
	if (state == OUTBOX_READY)
		position_of(entry.usage_table)->cursor = PG_INT64_MIN;
}

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
write_down(Lane *lane)
{
	GuardError	error;
	GuardOutcome outcome;

	if (lane->write_at > GetCurrentTimestamp())
	{
		due_at(lane->write_at);
		return;
	}
	outcome = abp_guard(NULL, write_lane, lane, &error);
	if (outcome != GUARD_DONE && error.sqlerrcode != ERRCODE_LOCK_NOT_AVAILABLE)
		ereport(ERROR,
				(errcode(error.sqlerrcode), errmsg_internal("%s", error.message)));
	lane->unwritten = outcome != GUARD_DONE;
	if (!lane->unwritten)
		return;
	lane->write_at = in_ms(HELD_MS);
	due_at(lane->write_at);
}

static void
save_lane(Lane *lane, const char *reason)
{
	char	   *copy = reason == NULL ? NULL : MemoryContextStrdup(ship_context, reason);

	if (lane->reason != NULL)
		pfree(lane->reason);
	lane->reason = copy;
	lane->write_at = 0;
	lane->unwritten = true;
	write_down(lane);
}

static void
write_down_lanes(void)
{
	ListCell   *lc;

	foreach(lc, lanes)
	{
		Lane	   *lane = lfirst(lc);

		if (lane->unwritten)
			write_down(lane);
	}
}

/* Exponential, with jitter of a quarter, capped. */
static int64
backoff_ms(int failures)
{
	int64		ms = BACKOFF_FIRST_MS;

	for (int i = 1; i < failures && ms < BACKOFF_MAX_MS; i++)
		ms *= 2;
	ms = Min(ms, BACKOFF_MAX_MS);
	return ms - ms / 8 + (int64) (pg_prng_uint64(&pg_global_prng_state) % (ms / 4 + 1));
}

/* A request has failed for no fault of its rows: leave the server alone for a while. */
static void
back_off(Lane *lane, int64 ms, const char *reason)
{
	if (lane->failures == 0 && !lane->paused_by_answer)
		ereport(WARNING,
				(errcode(ERRCODE_CONNECTION_EXCEPTION),
				 errmsg("could not deliver usage to %s: %s", lane_name(lane), reason),
				 errdetail("Delivery is tried again in %d seconds, and then more and more rarely.",
						   (int) ((ms + 999) / 1000))));
	lane->failures++;
	lane->not_before = in_ms(ms);
	save_lane(lane, reason);
}

/* The server will not have us: stop, loudly, until something changes. */
static void
pause_lane(Lane *lane, const char *reason)
{
	if (!lane->paused_by_answer)
		ereport(WARNING,
				(errcode(ERRCODE_CONNECTION_EXCEPTION),
				 errmsg("delivery to %s is paused: %s", lane_name(lane), reason),
				 errhint("Fix the server's options or its access token; delivery resumes by itself then, or with aibilling.resume().")));
	lane->paused_by_answer = true;
	lane->not_before = in_ms(PROBE_MS);
	save_lane(lane, reason);
}

/* Wait no longer for a server, nor for the retries of its deliveries. */
static void
try_now(Lane *lane)
{
	ListCell   *lc;

	lane->not_before = DT_NOBEGIN;
	foreach(lc, shipments)
	{
		Shipment   *shipment = lfirst(lc);

		if (shipment->lane == lane)
			shipment->retry_at = DT_NOBEGIN;
	}
}

/* Nothing is known any more that holds the lane back. */
static void
open_lane(Lane *lane)
{
	lane->failures = 0;
	lane->paused_by_answer = false;
	lane->lacks_token = false;
	lane->refused_token = 0;
	lane->not_before = DT_NOBEGIN;
	save_lane(lane, NULL);
}

static void
lane_succeeded(Lane *lane)
{
	lane->last_success = GetCurrentTimestamp();
	if (lane->failures == 0 && !lane->paused_by_answer &&
		TIMESTAMP_NOT_FINITE(lane->not_before))
		return;

	ereport(LOG,
			(errmsg("delivery to %s works again", lane_name(lane))));
	if (lane->paused_by_answer)
		try_now(lane);
	open_lane(lane);
}

/* Settle a delivery without success: its rows go back to be sent anew. */
static void
give_back(Shipment *shipment, const char *error, bool burn_attempt)
{
	put_back(shipment, shipment->delivery.ids, OUTBOX_READY, DT_NOBEGIN, error, burn_attempt);
	abp_ledger_finish(&shipment->delivery, "failed", error);
	drop_shipment(shipment);
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
	forget_request(shipment);
	abp_ledger_note(&shipment->delivery, error, retry_at);
}

/* Nothing of this request was stored, or so the answer says. */
static void
return_or_keep(Shipment *shipment, const char *error, bool burn_attempt)
{
	if (shipment->delivery.outcome_unknown)
		keep_for_retry(shipment, shipment->lane->not_before, error);
	else
		give_back(shipment, error, burn_attempt);
}

/* Two deliveries know the same rows again; in the current memory context. */
static void
copy_keys(Delivery *to, const Delivery *from)
{
	int64		count = abp_idset_count(unconstify(IdSet *, &from->key_ids));

	to->key_ids = abp_idset_copy(&from->key_ids);
	to->keys = NULL;
	if (from->keys != NULL)
	{
		to->keys = palloc(sizeof(uint32) * Max(1, count));
		memcpy(to->keys, from->keys, sizeof(uint32) * count);
	}
}

/* Whose fault?  Send each half by itself. */
static void
halve(Shipment *shipment, const char *error)
{
	Delivery   *delivery = &shipment->delivery;
	Shipment   *half = new_shipment(shipment->lane);
	MemoryContext old = MemoryContextSwitchTo(half->context);

	half->delivery.usage_table = delivery->usage_table;
	half->delivery.prior_attempts = delivery->prior_attempts + delivery->attempts;
	half->delivery.outcome_unknown = delivery->outcome_unknown;
	half->delivery.ids = abp_idset_split(&delivery->ids, delivery->nevents / 2);
	half->delivery.nevents = delivery->nevents - delivery->nevents / 2;
	copy_keys(&half->delivery, delivery);
	MemoryContextSwitchTo(old);

	abp_ledger_begin(&half->delivery);
	keep_for_retry(half, DT_NOBEGIN, error);

	delivery->nevents /= 2;
	shipment->server_errors = 0;
	shipment->timeouts = 0;
	keep_for_retry(shipment, DT_NOBEGIN, error);
}

static void
reject_shipment(Shipment *shipment, const char *error)
{
	put_back(shipment, shipment->delivery.ids, OUTBOX_REJECTED, DT_NOBEGIN, error, true);
	abp_ledger_finish(&shipment->delivery, "rejected", error);
	drop_shipment(shipment);
}

static void
settle_delivered(Shipment *shipment, const Verdict *verdict, double elapsed_ms,
				 const ServerOptions *server, int64 ledger_from)
{
	Delivery   *delivery = &shipment->delivery;
	Lane	   *lane = shipment->lane;

	delivery->inserted = verdict->inserted;
	delivery->duplicates = verdict->duplicates;

	/*
	 * An id that was delivered before may be of a row that has come back.  Or
	 * the row that was to be sent has gone with its partition, and this one
	 * has its id: then it is looked at when it is there again.
	 */
	if (verdict->duplicates > 0 && !delivery->outcome_unknown)
	{
		IdSet		before = abp_ledger_delivered_before(delivery, ledger_from);

		delivery->unexpected_duplicates = Max(0, verdict->duplicates - abp_idset_count(&before));
		abp_idset_add_set(&delivery->vanished_ids, &before, shipment->context);
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
	delivered += delivery->nevents;
	lane_succeeded(lane);

	/* Slow answers ask for smaller batches. */
	if (server != NULL)
	{
		int			size = lane->batch_size > 0 ? lane->batch_size : server->batch_size;

		if (elapsed_ms > server->timeout_ms / 3)
			lane->batch_size = Max(1, Min(size, delivery->nevents) / 2);
		else if (elapsed_ms < server->timeout_ms / 10)
			lane->batch_size = Min(size * 2, server->batch_size);
	}
	drop_shipment(shipment);
}

/* Polar has named the rows that it refuses; the others are sent again at once. */
static void
settle_refused(Shipment *shipment, const Verdict *verdict)
{
	Delivery   *delivery = &shipment->delivery;
	IdSet		refused = {0};
	IdSet		rest;
	bool		only_skew = true;

	for (int i = 0; i < verdict->nrefused; i++)
	{
		RefusedEvent *event = &verdict->refused[i];
		int64		id = delivery->event_ids[event->index];
		IdSet		one = {0};

		abp_idset_add(&one, id, id, CurrentMemoryContext);
		abp_idset_add(&refused, id, id, CurrentMemoryContext);
		if (event->clock_skew)
			put_back(shipment, one, OUTBOX_WAITING,
					 in_ms(SKEW_MS * Min(12, 1 + delivery->prior_attempts)),
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
		abp_ledger_finish(delivery, only_skew ? "failed" : "rejected", verdict->error);
		drop_shipment(shipment);
		return;
	}

	memset(&delivery->ids, 0, sizeof(IdSet));
	abp_idset_add_set(&delivery->ids, &rest, shipment->context);
	delivery->nevents = abp_idset_count(&delivery->ids);
	keep_for_retry(shipment, DT_NOBEGIN, verdict->error);
}

/*
 * The server has failed.  If it goes on for one batch while others get
 * through, a row of the batch is to blame: find it by halving.
 */
static void
settle_server_error(Shipment *shipment, const Verdict *verdict)
{
	Delivery   *delivery = &shipment->delivery;
	Lane	   *lane = shipment->lane;
	bool		others_pass;

	delivery->outcome_unknown = true;
	if (shipment->server_errors++ == 0)
		shipment->first_error_at = GetCurrentTimestamp();
	others_pass = lane->last_success > shipment->first_error_at;

	if (delivery->nevents > 1 && shipment->server_errors >= ERRORS_BEFORE_HALVING)
		halve(shipment, verdict->error);
	else if (delivery->nevents == 1 && others_pass &&
			 shipment->server_errors >= ERRORS_BEFORE_REJECTING)
		reject_shipment(shipment, verdict->error);
	else
	{
		int64		ms = verdict->retry_after_ms >= 0 ? verdict->retry_after_ms :
		backoff_ms(others_pass ? shipment->server_errors : lane->failures + 1);

		if (!others_pass)
			back_off(lane, ms, verdict->error);
		keep_for_retry(shipment, in_ms(ms), verdict->error);
	}
}

/*
 * Settle a request that has ended.
 */
static void
settle(Shipment *shipment, const ServerOptions *server, int64 ledger_from)
{
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
		back_off(lane, backoff_ms(lane->failures + 1), error);
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
			halve(shipment, error);
		else
			return_or_keep(shipment, error, true);
		return;
	}

	verdict = abp_polar_judge(reply->status, reply->body, reply->body_len,
							  reply->truncated, reply->retry_after,
							  delivery->nevents, GetCurrentTimestamp());
	if (verdict->kind != VERDICT_SERVER_ERROR)
		shipment->server_errors = 0;

	switch (verdict->kind)
	{
		case VERDICT_DELIVERED:
			settle_delivered(shipment, verdict, reply->elapsed_ms, server, ledger_from);
			break;
		case VERDICT_ROWS_REFUSED:
			lane_succeeded(lane);
			settle_refused(shipment, verdict);
			break;
		case VERDICT_BATCH_REFUSED:
		case VERDICT_TOO_LARGE:
			lane_succeeded(lane);
			if (delivery->nevents > 1)
				halve(shipment, verdict->error);
			else
				reject_shipment(shipment, verdict->error);
			break;
		case VERDICT_RATE_LIMITED:
			abp_quota_used_up(lane->server);
			back_off(lane, verdict->retry_after_ms >= 0 ? verdict->retry_after_ms :
					 RATE_LIMITED_MS, verdict->error);
			return_or_keep(shipment, verdict->error, false);
			break;
		case VERDICT_PAUSE:
			pause_lane(lane, verdict->error);
			return_or_keep(shipment, verdict->error, false);
			break;
		case VERDICT_SERVER_ERROR:
			settle_server_error(shipment, verdict);
			break;
		case VERDICT_UNKNOWN:
			delivery->outcome_unknown = true;
			back_off(lane, backoff_ms(lane->failures + 1), verdict->error);
			keep_for_retry(shipment, lane->not_before, verdict->error);
			break;
	}
}

/* --- what is to be sent ------------------------------------------------------ */

/* May a request be made now, by the server's limit of requests per minute? */
static bool
take_quota(const ServerOptions *server)
{
	TimestampTz next;

	if (abp_quota_take(server, &next))
		return true;
	due_at(next);
	return false;
}

/*
 * Is a server to be left alone?  Then the next time to look is noted.
 */
static bool
lane_is_closed(Lane *lane, const UsageTable *table, const ServerOptions *server,
			   const char *token, const char *token_problem)
{
	uint32		hash = token == NULL ? 0 :
	DatumGetUInt32(hash_any((const unsigned char *) token, strlen(token)));

	if (table->paused_by_operator)
		return true;

	if (token == NULL)
	{
		if (!lane->paused_by_answer || lane->refused_token != 0 ||
			table->pause_reason == NULL || strcmp(table->pause_reason, token_problem) != 0)
		{
			lane->refused_token = 0;
			pause_lane(lane, token_problem);
		}
		lane->lacks_token = true;
		due_at(in_ms(PROBE_MS));
		return true;
	}
	if (lane->lacks_token)
	{
		ereport(LOG,
				(errmsg("delivery to %s resumes: there is an access token", lane_name(lane))));
		open_lane(lane);
		try_now(lane);
	}

	/* What failed or was refused may have been fixed: try. */
	if (servers_are_new(table) || (lane->paused_by_answer && hash != lane->refused_token))
		try_now(lane);
	lane->refused_token = hash;

	if (lane->not_before > GetCurrentTimestamp())
	{
		due_at(lane->not_before);
		return true;
	}
	return false;
}

/* One request at a time while it is uncertain that any gets through. */
static int
lane_capacity(const Lane *lane, const ServerOptions *server)
{
	return lane->failures > 0 || lane->paused_by_answer ? 1 : server->max_in_flight;
}

/* Could another request fly?  Those about to fly count. */
static bool
lane_has_room(const Lane *lane, const ServerOptions *server)
{
	int			in_lane = 0;
	int			to_server = 0;
	ListCell   *lc;

	foreach(lc, shipments)
	{
		Shipment   *shipment = lfirst(lc);

		if (shipment->stage == SHIPMENT_WAITING)
			continue;
		if (shipment->lane == lane)
			in_lane++;
		if (strcmp(shipment->lane->server, lane->server) == 0)
			to_server++;
	}
	return in_lane < lane_capacity(lane, server) && to_server < server->max_in_flight;
}

/*
 * Take the next ids to send: those whose time has come first, then ready ones
 * from where the last scan ended.  Rows may commit later than rows of higher
 * ids, so that the scan starts over now and then, and whenever it finds
 * nothing.
 */
static IdSet
take_ids(const UsageTable *table, Position *position, int64 max_ids,
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
			due_at(position->restart_at);
			return ids;
		}
		position->cursor = PG_INT64_MIN;
	}
}

/* Another transaction has locked the table, or what we need of it. */
static void
note_locked(const UsageTable *table)
{
	Position   *position = position_of(table->relid);
	const char *reason = "another transaction has locked the table";
	TimestampTz until = in_ms(LOCKED_LONG_MS);

	position->failed = true;
	position->try_at = in_ms(LOCKED_MS);
	due_at(position->try_at);
	if (position->locked_since == 0)
		position->locked_since = GetCurrentTimestamp();
	if (!TimestampDifferenceExceeds(position->locked_since, GetCurrentTimestamp(),
									LOCKED_LONG_MS))
		return;

	if (table->blocked_reason == NULL)
		ereport(WARNING,
				(errcode(ERRCODE_LOCK_NOT_AVAILABLE),
				 errmsg("usage rows of %s cannot be delivered: %s", table->name, reason)));
	block_table(table, reason, until);
}

/* Work on one table that fails without harm to others. */
typedef void (*TableWork) (const UsageTable *table, const ServerOptions *server, void *arg);

typedef struct GuardedTableWork
{
	TableWork	work;
	const UsageTable *table;
	const ServerOptions *server;
	void	   *arg;
} GuardedTableWork;

static void
do_table_work(void *arg)
{
	GuardedTableWork *guarded = arg;

	guarded->work(guarded->table, guarded->server, guarded->arg);
}

/*
 * Do something with a table's rows.  An error (a policy, a changed column, a
 * failing trigger) undoes it and blocks the table for a while, not the others.
 * A lock of another transaction's is not waited for.
 */
static GuardOutcome
guarded(TableWork work, const UsageTable *table, const ServerOptions *server, void *arg)
{
	GuardedTableWork call = {work, table, server, arg};
	Position   *position = position_of(table->relid);
	GuardError	error;
	GuardOutcome outcome;
	TimestampTz until;

	if (!ConditionalLockRelationOid(table->relid, AccessShareLock))
	{
		note_locked(table);
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
		note_locked(table);
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
	until = in_ms(outcome == GUARD_FAILED ? PROBE_MS : TRANSIENT_MS);
	block_table(table, error.message, until);
	return outcome;
}

/* Take the next rows of a table and enter them in the ledger. */
typedef struct NextBatch
{
	bool		found;
	int			gather_ms;		/* if less was waiting than may be sent */
	Shipment   *shipment;
} NextBatch;

static void
prepare_next(const UsageTable *table, const ServerOptions *server, void *arg)
{
	NextBatch  *next = arg;
	Lane	   *lane = lane_of_table(table);
	Position   *position = position_of(table->relid);
	Delivery   *delivery;
	TakenEntries entries;
	int			size = server->batch_size;
	IdSet		ids;
	int64		count;

	if (lane->batch_size > 0)
		size = Min(size, lane->batch_size);
	if (position->batch_size > 0)
		size = Min(size, position->batch_size);
	ids = take_ids(table, position, size, &entries);
	if (position->held.nranges > 0)
		due_at(position->held_until);

	position->backlog = false;
	if (ids.nranges == 0)
		return;

	next->found = true;
	count = abp_idset_count(&ids);
	next->shipment = new_shipment(lane);
	delivery = &next->shipment->delivery;
	delivery->usage_table = table->relid;
	delivery->attempts = 1;
	delivery->prior_attempts = entries.attempts;
	delivery->outcome_unknown = entries.outcome_unknown;
	abp_guard_start_clock();
	if (!fill_shipment(next->shipment, table, server, &ids, entries.state) || count == size)
		position->backlog = true;
	else
		next->gather_ms = Min(Max(count * GATHER_ROW_MS, GATHER_MIN_MS), GATHER_MAX_MS);
	report_vanished(delivery, table, 0);
	if (delivery->nevents > 0 || delivery->vanished > 0)
		abp_ledger_begin(delivery);
	if (delivery->nevents > 0)
	{
		next->shipment->stage = SHIPMENT_PREPARED;
		position->rests = 0;
		position->row_too_large = 0;
		if (position->batch_size > 0)
			position->batch_size = position->batch_size < server->batch_size / 2 ?
				position->batch_size * 2 : 0;
	}
	else
	{
		if (delivery->vanished > 0)
			abp_ledger_finish(delivery, "failed", "the rows were gone before they were sent");
		drop_shipment(next->shipment);
		next->shipment = NULL;
	}
}

/*
 * The same by one snapshot, of what is in the outbox and of the rows: a
 * transaction that changes a row changes both.
 */
static void
prepare_next_at_once(const UsageTable *table, const ServerOptions *server, void *arg)
{
	PushActiveSnapshot(GetLatestSnapshot());
	if (abp_outbox_tidy(table->relid, TIDY_PER_TURN))
	{
		CommandCounterIncrement();
		UpdateActiveSnapshotCommandId();
		prepare_next(table, server, arg);
	}
	else
		due_at(in_ms(GATHER_MIN_MS));
	PopActiveSnapshot();
}

/*
 * Build a waiting shipment's request anew and enter another attempt, unless
 * none of its rows is left.
 */
static void
rebuild(const UsageTable *table, const ServerOptions *server, void *arg)
{
	Shipment   *shipment = arg;
	Delivery   *delivery = &shipment->delivery;
	int64		vanished = delivery->vanished;
	IdSet		ids = delivery->ids;

	abp_guard_start_clock();
	CommandCounterIncrement();	/* what was settled in this transaction */
	PushActiveSnapshot(GetLatestSnapshot());
	(void) fill_shipment(shipment, table, server, &ids, 0);
	PopActiveSnapshot();
	report_vanished(delivery, table, vanished);
	if (delivery->nevents > 0)
	{
		abp_ledger_resend(delivery);
		shipment->stage = SHIPMENT_PREPARED;
	}
	else
		abp_ledger_finish(delivery, "failed", "none of the rows could be sent again");
}

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

static void
move_all(PriceLook *look, const IdSet *ids, char state, const char *error)
{
	for (int i = 0; i < ids->nranges; i++)
	{
		for (int64 id = ids->ranges[i].first;; id++)
		{
			move_to(look, id, state, DT_NOBEGIN, error);
			if (id == ids->ranges[i].last)
				break;
		}
	}
}

static bool
look_for_price(const UsageRow *row, Jsonb *whole, void *arg)
{
	PriceLook  *look = arg;
	RowState	verdict;

	look->nrows++;
	abp_idset_add(&look->seen, row->id, row->id, look->context);
	abp_usage_judge_price(row, &verdict);
	if (verdict.state == OUTBOX_READY)
		abp_idset_add(&look->priced, row->id, row->id, look->context);
	else if (verdict.state != OUTBOX_UNPRICED || look->entry->error == NULL ||
			 strcmp(verdict.error, look->entry->error) != 0)
		move_to(look, row->id, verdict.state, DT_NOBEGIN, verdict.error);
	return true;
}

/* What has the UPDATE made of a row that has a price? */
static bool
look_at_priced(const UsageRow *row, Jsonb *whole, void *arg)
{
	PriceLook  *look = arg;
	RowState	verdict;

	abp_usage_judge(row, look->server, &verdict);
	if (verdict.state == OUTBOX_UNPRICED)
	{
		verdict.state = OUTBOX_REJECTED;
		verdict.error = "it has a price, but a trigger or rule of its table keeps the cost from being stored";
	}
	move_to(look, row->id, verdict.state, verdict.not_before, verdict.error);
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

static bool
count_row(const UsageRow *row, Jsonb *whole, void *arg)
{
	return true;
}

/*
 * Of rows that share an id one may be delivered: they are not priced, but
 * rejected.
 */
static void
reject_shared(PriceLook *look)
{
	IdSet		shared = {0};
	ListCell   *lc;

	for (int i = 0; i < look->seen.nranges; i++)
	{
		for (int64 id = look->seen.ranges[i].first;; id++)
		{
			IdSet		one = {0};

			abp_idset_add(&one, id, id, look->context);
			if (abp_usage_read(look->table, &one, false, count_row, NULL) > 1)
				abp_idset_add(&shared, id, id, look->context);
			abp_idset_free(&one);
			if (id == look->seen.ranges[i].last)
				break;
		}
	}

	look->priced = abp_idset_subtract(&look->priced, &shared);
	foreach(lc, look->others)
	{
		OutboxEntry *other = lfirst(lc);

		other->ids = abp_idset_subtract(&other->ids, &shared);
	}
	move_all(look, &shared, OUTBOX_REJECTED, SHARED_ID);
}

static void
look_at_rows(void *arg)
{
	PriceLook  *look = arg;

	if (look->server->send_unpriced)
		look->priced = abp_idset_copy(look->ids);
	else
	{
		abp_usage_read(look->table, look->ids, false, look_for_price, look);
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
		(void) abp_usage_price_again(look->table, &look->priced);
		CommandCounterIncrement();
	}
	PushActiveSnapshot(GetLatestSnapshot());
	abp_usage_read(look->table, &look->priced, false, look_at_priced, look);
	PopActiveSnapshot();
}

static void
look_and_price(void *arg)
{
	look_at_rows(arg);
	price_rows(arg);
}

static void
price_no_row(void *arg)
{
	PriceLook  *look = arg;
	IdSet		none = {0};

	(void) abp_usage_price_again(look->table, &none);
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
	bool		all = true;
	TimestampTz start = GetCurrentTimestamp();

	for (int r = 0; r < look->ids->nranges; r++)
	{
		for (int64 id = look->ids->ranges[r].first;; id++)
		{
			IdSet		one = {0};
			PriceLook	part = *look;
			GuardError	error;
			GuardOutcome outcome;
			ListCell   *lc;

			CHECK_FOR_INTERRUPTS();

			if (TimestampDifferenceExceeds(start, GetCurrentTimestamp(), TURN_MS))
				return false;
			abp_idset_add(&one, id, id, look->context);
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
					read_no_row(look->table, false);
				if (!refuse_price(look, id, &error))
					return false;
			}
			else
			{
				foreach(lc, part.others)
				{
					OutboxEntry *other = lfirst(lc);

					if (abp_idset_contains(&other->ids, id))
						move_to(look, id, other->state, other->not_before, other->error);
				}
			}
			if (id == look->ids->ranges[r].last)
				break;
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

static void
lock_rows(void *arg)
{
	GuardedLock *lock = arg;

	lock->locked = abp_usage_lock(lock->table, &lock->ids, false);
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
release_unpriced(const UsageTable *table, const ServerOptions *server, void *arg)
{
	UnpricedStep *step = arg;
	Position   *position = position_of(table->relid);
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
release_unpriced_at_once(const UsageTable *table, const ServerOptions *server, void *arg)
{
	PushActiveSnapshot(GetLatestSnapshot());
	release_unpriced(table, server, arg);
	PopActiveSnapshot();
}

/* Go on with the scan over a table's rows that wait for a price. */
static void
scan_unpriced(const UsageTable *table, const ServerOptions *server)
{
	Position   *position = position_of(table->relid);

	if (!wants_prices(position))
		return;
	if (position->unpriced_at > GetCurrentTimestamp())
	{
		due_at(position->unpriced_at);
		return;
	}

	/* What comes from now on is for the next scan. */
	if (position->unpriced_cursor.id == PG_INT64_MIN)
	{
		position->scanned_for = prices_generation;
		position->unpriced_left = false;
	}
	for (int i = 0; i < UNPRICED_PER_TURN && !turn_is_over(); i++)
	{
		UnpricedStep step;

		CHECK_FOR_INTERRUPTS();

		if (guarded(release_unpriced_at_once, table, server, &step) != GUARD_DONE)
		{
			/* what is ready has its turn before */
			position->unpriced_at = in_ms(TRANSIENT_MS);
			return;
		}
		if (!step.tidy)
		{
			due_at(in_ms(GATHER_MIN_MS));
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
			position->unpriced_at = in_ms(HELD_MS);
			due_at(position->unpriced_at);
		}
		if (!wants_prices(position) || position->unpriced_left)
			return;
	}
	more_to_build = true;
}

static UsageTable *
find_table(List *tables, Oid relid)
{
	ListCell   *lc;

	foreach(lc, tables)
	{
		UsageTable *table = lfirst(lc);

		if (table->relid == relid)
			return table;
	}
	return NULL;
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
		UsageTable *table = find_table(tables, left->usage_table);
		Shipment   *shipment =
		new_shipment(lane_of(left->server, table == NULL ? InvalidOid : table->role));
		char	   *server = shipment->delivery.server;
		MemoryContext old;

		shipment->delivery = *left;
		shipment->delivery.server = server;
		old = MemoryContextSwitchTo(shipment->context);
		shipment->delivery.ids = abp_idset_copy(&left->ids);
		shipment->delivery.vanished_ids = abp_idset_copy(&left->vanished_ids);
		copy_keys(&shipment->delivery, left);
		MemoryContextSwitchTo(old);
		shipment->delivery.nevents = abp_idset_count(&left->ids);
		shipment->stage = SHIPMENT_WAITING;
		shipment->retry_at = DT_NOBEGIN;
	}

	foreach(lc, tables)
	{
		UsageTable *table = lfirst(lc);
		Lane	   *lane = lane_of_table(table);

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
		Lane	   *lane = lane_of_table(table);

		if (!lane->unwritten && TIMESTAMP_NOT_FINITE(table->not_before) &&
			!TIMESTAMP_NOT_FINITE(lane->not_before))
		{
			lane->failures = 0;
			lane->paused_by_answer = false;
			try_now(lane);
		}
	}
}

/* Options of a table's server; NULL without a server to deliver to. */
static const ServerOptions *
options_of(const UsageTable *table)
{
	const ServerOptions *server;

	if (!OidIsValid(table->serverid))
		return NULL;
	server = abp_server_options(table->serverid);
	return server->kind == SERVER_POLAR ? server : NULL;
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

static void
settle_answered(List *tables)
{
	ListCell   *lc;
	List	   *all = list_copy(shipments);

	foreach(lc, all)
	{
		Shipment   *shipment = lfirst(lc);

		if (shipment->stage == SHIPMENT_ANSWERED)
		{
			UsageTable *table = find_table(tables, shipment->delivery.usage_table);

			settle(shipment, table == NULL ? NULL : options_of(table),
				   table == NULL ? 0 : table->ledger_from);
		}
	}
}

/* Settle what can never be sent again: its table is gone. */
static void
settle_orphans(List *tables)
{
	ListCell   *lc;
	List	   *all = list_copy(shipments);

	foreach(lc, all)
	{
		Shipment   *shipment = lfirst(lc);
		UsageTable *table = find_table(tables, shipment->delivery.usage_table);

		if (shipment->stage != SHIPMENT_WAITING ||
			(table != NULL && OidIsValid(table->owner)))
			continue;
		shipment->delivery.vanished += shipment->delivery.nevents;
		abp_ledger_finish(&shipment->delivery, "failed",
						  "the usage table is gone; the last request's outcome is not known");
		drop_shipment(shipment);
	}
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
		abp_usage_table_forget(table->relid);
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

	foreach(lc, shipments)
	{
		Shipment   *shipment = lfirst(lc);
		UsageTable *table = find_table(tables, shipment->delivery.usage_table);

		if (shipment->stage != SHIPMENT_WAITING || table == NULL ||
			lane_of_table(table) == shipment->lane)
			continue;
		shipment->lane->shipments--;
		shipment->lane = lane_of_table(table);
		shipment->lane->shipments++;
		shipment->delivery.server = MemoryContextStrdup(shipment->context, table->server);
	}
}

/* Keep a table from being delivered for a while, with the reason. */
static void
refuse_table(const UsageTable *table, const char *reason)
{
	TimestampTz until = in_ms(PROBE_MS);

	if (table->blocked_reason == NULL)
		ereport(WARNING,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("usage rows of %s cannot be delivered: %s", table->name, reason),
				 errhint("Fix the cause; delivery of the table resumes by itself.")));
	block_table(table, reason, until);
}

/* A request to make once the turn has committed. */
typedef struct Departure
{
	Shipment   *shipment;
	HttpTarget	target;
	char	   *token;
} Departure;

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
prepare_again(const UsageTable *table, const ServerOptions *server, Shipment *shipment)
{
	Delivery   *delivery = &shipment->delivery;
	Delivery	before = *delivery;
	GuardOutcome outcome = guarded(rebuild, table, server, shipment);

	if (outcome != GUARD_DONE)
	{
		shipment->stage = SHIPMENT_WAITING;
		forget_request(shipment);
		delivery->ids = before.ids;
		delivery->nevents = before.nevents;
		delivery->vanished = before.vanished;
		delivery->attempts = before.attempts;

		/* As long as its table is blocked; halves for memory at once. */
		if (outcome == GUARD_NO_MEMORY && delivery->nevents > 1)
			halve(shipment, "out of memory");
		else
			shipment->retry_at = in_ms(outcome == GUARD_FAILED ? PROBE_MS :
									   outcome == GUARD_PASSES ? LOCKED_MS : TRANSIENT_MS);
		return false;
	}

	if (table->blocked_reason != NULL && !position_of(table->relid)->failed)
		abp_usage_table_unblock(table->relid, false);
	if (delivery->nevents == 0)
	{
		drop_shipment(shipment);
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
prepare_waiting(const UsageTable *table, const ServerOptions *server, bool suspects)
{
	Lane	   *lane = lane_of_table(table);
	Position   *position = position_of(table->relid);
	List	   *all = list_copy(shipments);
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
			due_at(shipment->retry_at);
		else if (position->failed || turn_is_over())
			more_to_build |= !position->failed;
		else if (lane_has_room(lane, server) && take_quota(server) &&
				 !prepare_again(table, server, shipment))
			abp_quota_give_back(server);
	}
}

/* Prepare what one table has to send.  Appends to *departures. */
static void
prepare_table(const UsageTable *table, const ServerOptions *server, List **departures)
{
	Lane	   *lane = lane_of_table(table);
	Position   *position = position_of(table->relid);
	StringInfoData reason;
	char	   *token;
	ListCell   *lc;
	bool		built = false;

	initStringInfo(&reason);
	token = abp_server_token(server, table->owner, &reason);

	/*
	 * A role whose mapping has come or gone since the tables were read waits
	 * a turn.
	 */
	if (OidIsValid(table->role) !=
		(abp_server_state_by_role() && abp_server_is_mapped(server->serverid, table->owner)))
	{
		abp_forget_token(token);
		tables_stale = true;
		more_to_build = true;
		return;
	}
	if (lane_is_closed(lane, table, server, token, reason.data))
	{
		abp_forget_token(token);
		return;
	}

	prepare_waiting(table, server, false);

	/*
	 * One new batch a turn: it departs before the next is built.  Requests
	 * that were built together would also be answered together, and each slot
	 * would stand empty while the batches of all others are built.
	 */
	while (!position->failed && lane_has_room(lane, server) &&
		   lane->shipments < lane_capacity(lane, server) * MAX_WAITING_SHARE)
	{
		NextBatch	next = {0};

		CHECK_FOR_INTERRUPTS();

		if (built)
		{
			more_to_build = true;
			break;
		}
		if (!take_quota(server))
			break;
		if (guarded(prepare_next_at_once, table, server, &next) != GUARD_DONE)
		{
			if (next.shipment != NULL)
				drop_shipment(next.shipment);
			abp_quota_give_back(server);
			break;
		}
		if (next.found && table->blocked_reason != NULL && !position->failed)
			abp_usage_table_unblock(table->relid, false);
		if (next.shipment == NULL)
			abp_quota_give_back(server);
		else
		{
			built = true;
			if (next.gather_ms > 0)
				gather_until = in_ms(next.gather_ms);
		}
		if (!next.found)
		{
			room_left = true;
			break;
		}
	}
	prepare_waiting(table, server, true);
	backlog |= position->backlog;

	foreach(lc, shipments)
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
	abp_forget_token(token);
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

/* Keep no positions of tables that are not attached any more. */
static void
forget_positions_except(List *tables)
{
	ListCell   *lc;

	foreach(lc, positions)
	{
		Position   *position = lfirst(lc);

		if (find_table(tables, position->usage_table) == NULL)
		{
			positions = foreach_delete_current(positions, lc);
			abp_idset_free(&position->held);
			pfree(position);
		}
	}
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
		known_tables = abp_usage_tables(armed);
		forget_positions_except(known_tables);
		tables_read_at = now;
		MemoryContextSwitchTo(old);
	}
	*armed = abp_database_standing() == DATABASE_ARMED;
	return known_tables;
}

static int
quick_first(const ListCell *a, const ListCell *b)
{
	const Position *one = position_of(((UsageTable *) lfirst(a))->relid);
	const Position *other = position_of(((UsageTable *) lfirst(b))->relid);

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
serve_table(const UsageTable *table, bool fresh, List **departures)
{
	Position   *position = position_of(table->relid);
	const ServerOptions *server = options_of(table);
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
		(table->blocked_until == DT_NOEND || (!servers_are_new(table) && !fresh)))
	{
		due_at(table->blocked_until);
		return;
	}
	if (position->try_at > start)
	{
		due_at(position->try_at);
		return;
	}

	/*
	 * What was needed to attach is needed still: rights can be taken back.
	 */
	if (abp_server_aclcheck(table->serverid, table->owner) != ACLCHECK_OK)
	{
		refuse_table(table, psprintf("its owner has no USAGE on server \"%s\"",
									 table->server));
		return;
	}

	position->barred = false;
	scan_unpriced(table, server);
	if (!position->failed)
		prepare_table(table, server, departures);
	position->servers_seen = servers_generation;
	position->slow = position->failed ||
		TimestampDifferenceExceeds(start, GetCurrentTimestamp(), SLOW_MS);

	due = abp_outbox_next_due(table->relid);
	if (due > start)
		due_at(due);
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
 * the requests to make, in turn_context.
 */
static List *
work(const ShipScope *scope)
{
	List	   *departures = NIL;
	List	   *tables;
	bool		armed;
	bool		fresh = !recovered;
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
		due_at(in_ms(DROP_WAIT_MS));
		return NIL;
	}
	if (!abp_extension_installed())
	{
		warn_of_old_version(scope);
		return NIL;
	}

	price_relids[0] = abp_extension_relation("price");
	price_relids[1] = abp_extension_relation("model_alias");
	price_relids[2] = abp_extension_relation("service_tier_rule");
	price_relids[3] = abp_extension_relation("price_source");
	price_relids[4] = abp_extension_relation("attachment"); /* attached with rows */

	tables = current_tables(&armed);
	MemoryContextSwitchTo(turn_context);
	if (!recovered)
		recover(tables);
	notice_resumed(tables);
	settle_answered(tables);
	settle_orphans(tables);
	change_lanes(tables);
	write_down_lanes();
	if (settled >= SUM_UP_EVERY)
	{
		abp_ledger_sum_up();
		settled = 0;
	}
	if (!armed)
		return NIL;
	forget_dropped(tables);

	if (servers_changed)
		servers_generation++;
	if (prices_changed || servers_changed)
		prices_generation++;
	prices_changed = servers_changed = false;

	foreach(lc, in_order(tables))
	{
		UsageTable *table = lfirst(lc);

		CHECK_FOR_INTERRUPTS();

		if (!OidIsValid(table->owner) || !abp_ship_in_scope(scope, table))
			continue;
		if (turn_is_over())
		{
			more_to_build = true;
			break;
		}
		serve_table(table, fresh, &departures);
	}

	/* One table's backlog waits little for another's rows to gather. */
	if (backlog)
		gather_until = Min(gather_until, in_ms(GATHER_MIN_MS));

	/* Every commit wakes us: not for nothing while nothing may be sent. */
	if (departures == NIL && shipments == NIL && !room_left)
		gather_until = in_ms(GATHER_MAX_MS);
	return departures;
}

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
		abp_forget_token(departure->token);
	}
}

static void
collect_answers(void)
{
	HttpRequest *request;

	while ((request = abp_http_next_finished()) != NULL)
	{
		ListCell   *lc;

		foreach(lc, shipments)
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
gather(void)
{
	for (;;)
	{
		TimestampTz now = GetCurrentTimestamp();

		/* a clock that was set back must not stop us */
		if (now >= gather_until || gather_until - now > GATHER_MAX_MS * 1000)
			return;
		(void) abp_http_wait(TimestampDifferenceMilliseconds(now, gather_until));
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
	MemoryContextReset(turn_context);
	next_due = DT_NOEND;
	turn_started = GetCurrentTimestamp();

	more_to_build = false;
	room_left = false;
	backlog = false;
	if (!scope->in_procedure)
		gather();
	collect_answers();
	abp_wake_listen();
	abp_ship_begin(scope);
	departures = work(scope);
	abp_ship_commit(scope);
	MemoryContextSwitchTo(turn_context);
	depart(departures);
	MemoryContextSwitchTo(caller);

	if (more_to_build)
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

			if (next_due != DT_NOEND)
				timeout = Min(timeout, TimestampDifferenceMilliseconds(GetCurrentTimestamp(),
																	   next_due));
			if (abp_http_wait(timeout) || room_left || timeout < IDLE_WAIT_MS ||
				(OidIsValid(scope->owner) && abp_worker_pid() != 0))
				return 0;
		}
	}

	if (next_due == DT_NOEND)
		return -1;
	return TimestampDifferenceMilliseconds(GetCurrentTimestamp(), next_due);
}

/*
 * How many events have been delivered since abp_ship_reset.
 */
int64
abp_ship_delivered(void)
{
	return delivered;
}

/*
 * Has a table's server failed so often, or refused us, that waiting for it is
 * idle?
 */
bool
abp_ship_gave_up(const UsageTable *table)
{
	return table->paused_by_answer || table->failures >= ERRORS_BEFORE_REJECTING;
}

/*
 * Have all rows of a table that wait for a price been compared with today's
 * prices?  InvalidOid: of all tables that are served at present.
 */
bool
abp_ship_has_looked_for_prices(Oid relid)
{
	ListCell   *lc;

	foreach(lc, positions)
	{
		const Position *position = lfirst(lc);

		if ((relid == InvalidOid ? !position->barred : position->usage_table == relid) &&
			wants_prices(position) && position->unpriced_at <= GetCurrentTimestamp())
			return false;
	}
	return true;
}

/*
 * Have other transactions kept us from rows of a table for long?
 */
bool
abp_ship_is_locked_out(Oid relid)
{
	const Position *position = position_of(relid);
	TimestampTz now = GetCurrentTimestamp();

	return position->unpriced_left ||
		(position->locked_since != 0 &&
		 TimestampDifferenceExceeds(position->locked_since, now, LOCKED_LONG_MS)) ||
		(position->held.nranges > 0 &&
		 TimestampDifferenceExceeds(position->held_since, now, LOCKED_LONG_MS));
}
