/*-------------------------------------------------------------------------
 *
 * attachment.c
 *	  Attached usage tables, their servers' states, and whether this database may send.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/table.h"
#include "access/xlog.h"
#include "catalog/pg_subscription_rel.h"
#include "foreign/foreign.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"
#include "utils/timestamp.h"

#include "base/extension.h"
#include "base/rights.h"
#include "base/statement.h"
#include "base/table_name.h"
#include "base/table_scan.h"
#include "base/text_view.h"
#include "queue/attachment.h"

/* The columns up to "serverid" of aibilling.attachment, as they lie in a tuple. */
typedef struct AttachmentForm
{
	Oid			usage;
	NameData	server;
	Oid			serverid;
} AttachmentForm;

#define ATTACHMENT_FORM(tuple) ((const AttachmentForm *) GETSTRUCT(tuple))

/* columns of aibilling.attachment */
#define Anum_attachment_usage 1
#define Anum_attachment_blocked_until 5
#define Anum_attachment_blocked_reason 6
#define Anum_attachment_ledger_from 7
#define Anum_attachment_not_queued 8

/* columns of aibilling.server_state */
#define Anum_state_server 1
#define Anum_state_paused 2
#define Anum_state_reason 3
#define Anum_state_failures 5
#define Anum_state_not_before 6
#define Anum_state_role 7		/* since 1.1 */

/* A tuple of aibilling.database_identity. */
typedef struct IdentityForm
{
	int64		system_identifier;
	Oid			database;
	int64		timeline;
} IdentityForm;

/*
 * The table of attachments: before 1.2 one with another name.
 */
const char *
abp_attachment_table(void)
{
	return OidIsValid(abp_extension_relation("attachment")) ? "attachment" : "usage_table";
}

/*
 * Is the state of a server kept by role?  Not before the extension's 1.1,
 * whose update waits for transactions that have asked.
 */
bool
abp_server_state_by_role(void)
{
	Relation	rel = table_open(abp_extension_relation("server_state"), AccessShareLock);
	bool		by_role = get_attnum(RelationGetRelid(rel), "role") != InvalidAttrNumber;

	table_close(rel, NoLock);
	return by_role;
}

/* Does a subscription of this database fill the tables by which rows are sent? */
static bool
outbox_is_subscribed(void)
{
	static const char *const tables[] = {
		"outbox_entry", "ledger", "attachment", "delivery", "usage_table"
	};
	Relation	rel = table_open(SubscriptionRelRelationId, AccessShareLock);
	bool		found = false;

	for (int i = 0; i < lengthof(tables) && !found; i++)
	{
		ScanKeyData key;
		SysScanDesc scan;

		ScanKeyInit(&key, Anum_pg_subscription_rel_srrelid, BTEqualStrategyNumber, F_OIDEQ,
					ObjectIdGetDatum(abp_extension_relation(tables[i])));
		scan = systable_beginscan(rel, SubscriptionRelSrrelidSrsubidIndexId, true, NULL, 1, &key);
		found = HeapTupleIsValid(systable_getnext(scan));
		systable_endscan(scan);
	}
	table_close(rel, AccessShareLock);
	return found;
}

/*
 * May this database send, for all that is written of who may?  A copy finds
 * another's identity instead of its own.  A subscriber to the extension's own
 * tables finds another's beside it, if not the subscription itself: outbox and
 * ledger are the publisher's, then, who sends what they hold.
 */
DatabaseStanding
abp_database_standing(void)
{
	Relation	rel = table_open(abp_extension_needed("database_identity"), AccessShareLock);
	bool		own = false;
	bool		other = false;
	SysScanDesc scan;
	HeapTuple	tuple;

	PushActiveSnapshot(GetLatestSnapshot());
	scan = systable_beginscan(rel, InvalidOid, false, GetActiveSnapshot(), 0, NULL);
	while ((tuple = systable_getnext(scan)) != NULL)
	{
		const IdentityForm *form = (const IdentityForm *) GETSTRUCT(tuple);

		if (form->system_identifier == (int64) GetSystemIdentifier() &&
			form->database == MyDatabaseId)
			own = true;
		else
			other = true;
	}
	systable_endscan(scan);
	PopActiveSnapshot();
	table_close(rel, NoLock);

	if ((own && other) || outbox_is_subscribed())
		return DATABASE_SUBSCRIBER;
	return other ? DATABASE_COPY : DATABASE_ARMED;
}

/*
 * The server of a usage table, InvalidOid if it is gone.  In a copy of a
 * database the OID written down is that of the original's server, and may be
 * another's here: until aibilling.arm() binds the tables, the name alone
 * tells.
 */
static Oid
server_of(const AttachmentForm *form, bool armed)
{
	Oid			serverid = get_foreign_server_oid(NameStr(form->server), true);

	return armed && serverid != form->serverid ? InvalidOid : serverid;
}

/* What is kept of a server, or of one role's use of it. */
typedef struct ServerState
{
	char	   *server;
	Oid			role;			/* InvalidOid: of all who have no state of
								 * their own */
	char	   *paused;			/* NULL: not paused */
	char	   *reason;
	int			failures;
	TimestampTz not_before;
} ServerState;

/* A column that the extension has since 1.2, of a tuple; before that 0. */
static int64
new_column(HeapTuple tuple, AttrNumber column, TupleDesc desc)
{
	return column > desc->natts ? 0 : DatumGetInt64(abp_column_or(tuple, column, desc, 0));
}

/* Begin a scan over attachments, by the active snapshot. */
static void
begin_attachment_scan(OrderedScan *scan, int nkeys, ScanKey keys)
{
	const char *table = abp_attachment_table();

	abp_scan_begin(scan, table, psprintf("%s_pkey", table), nkeys, keys, AccessShareLock);
}

/* The states of all servers, a list in the current memory context. */
static List *
read_server_states(bool by_role)
{
	Relation	rel = table_open(abp_extension_needed("server_state"), AccessShareLock);
	TupleDesc	desc = RelationGetDescr(rel);
	SysScanDesc scan = systable_beginscan(rel, InvalidOid, false, GetActiveSnapshot(), 0, NULL);
	HeapTuple	tuple;
	List	   *list = NIL;

	while ((tuple = systable_getnext(scan)) != NULL)
	{
		ServerState *state = palloc0(sizeof(ServerState));

		state->server =
			pstrdup(NameStr(*DatumGetName(abp_column_or(tuple, Anum_state_server, desc, 0))));
		if (by_role)
			state->role = DatumGetObjectId(abp_column_or(tuple, Anum_state_role, desc, 0));
		state->paused = abp_column_string(tuple, Anum_state_paused, desc);
		state->reason = abp_column_string(tuple, Anum_state_reason, desc);
		state->failures = DatumGetInt32(abp_column_or(tuple, Anum_state_failures, desc, 0));
		state->not_before = DatumGetTimestampTz(abp_column_or(tuple, Anum_state_not_before, desc,
															  TimestampTzGetDatum(DT_NOBEGIN)));
		list = lappend(list, state);
	}
	systable_endscan(scan);
	table_close(rel, NoLock);
	return list;
}

/*
 * The state of a server, for one role or InvalidOid; NULL if none is kept.
 */
static const ServerState *
find_server_state(List *states, const char *server, Oid role)
{
	ListCell   *lc;

	foreach(lc, states)
	{
		const ServerState *state = lfirst(lc);

		if (state->role == role && strcmp(state->server, server) == 0)
			return state;
	}
	return NULL;
}

/* Fill in a table's owner and name, if there still is such a table. */
static void
describe_table(UsageTable *table)
{
	HeapTuple	tuple = SearchSysCache1(RELOID, ObjectIdGetDatum(table->relid));
	Form_pg_class form;

	if (!HeapTupleIsValid(tuple))
		return;
	form = (Form_pg_class) GETSTRUCT(tuple);
	table->owner = form->relowner;
	table->name = abp_table_name(table->relid);
	ReleaseSysCache(tuple);
}

/* Is a server paused by "operator" or "answer"? */
static bool
paused_by(const ServerState *state, const char *whom)
{
	return state != NULL && state->paused != NULL && strcmp(state->paused, whom) == 0;
}

/* Fill in what is known of a table's server, and who has paused it. */
static void
describe_server(UsageTable *table, List *states)
{
	const ServerState *state = find_server_state(states, table->server, table->role);
	const ServerState *pause = find_server_state(states, table->server, InvalidOid);
	const char *reason = state != NULL ? state->reason : NULL;

	table->failures = state != NULL ? state->failures : 0;
	table->not_before = state != NULL ? state->not_before : DT_NOBEGIN;
	table->paused_by_answer = paused_by(state, "answer");

	/* An operator pauses a server for all, or for one owner of tables. */
	if (!paused_by(pause, "operator"))
		pause = find_server_state(states, table->server, table->owner);
	if (paused_by(pause, "operator") && pause->reason != NULL)
	{
		table->paused_by_operator = true;
		reason = pause->reason;
	}
	if (reason != NULL)
		table->pause_reason = pstrdup(reason);
}

/*
 * All attached tables, as a list of UsageTable in the current memory context.
 * *armed: is this the database that was armed, rather than a copy of it?  A
 * copy has another system identifier or another OID.
 *
 * Without SQL, and the catalogues through their caches: a session asks this
 * once as a rule, and statements take it longer to plan than to run.
 */
List	   *
abp_attachments(bool *armed)
{
	OrderedScan scan;
	HeapTuple	tuple;
	List	   *list = NIL;
	List	   *states;
	bool		by_role = abp_server_state_by_role();

	PushActiveSnapshot(GetLatestSnapshot());
	*armed = abp_database_standing() == DATABASE_ARMED;
	states = read_server_states(by_role);
	begin_attachment_scan(&scan, 0, NULL);
	while ((tuple = systable_getnext_ordered(scan.scan, ForwardScanDirection)) != NULL)
	{
		const AttachmentForm *form = ATTACHMENT_FORM(tuple);
		TupleDesc	desc = RelationGetDescr(scan.rel);
		UsageTable *table = palloc0(sizeof(UsageTable));

		CHECK_FOR_INTERRUPTS();

		table->relid = form->usage;
		table->server = pstrdup(NameStr(form->server));
		table->serverid = server_of(form, *armed);
		table->blocked_until =
			DatumGetTimestampTz(abp_column_or(tuple, Anum_attachment_blocked_until, desc,
											  TimestampTzGetDatum(DT_NOBEGIN)));
		table->blocked_reason = abp_column_string(tuple, Anum_attachment_blocked_reason, desc);
		table->ledger_from = new_column(tuple, Anum_attachment_ledger_from, desc);
		table->not_queued = new_column(tuple, Anum_attachment_not_queued, desc);

		describe_table(table);
		if (by_role && OidIsValid(table->owner) &&
			SearchSysCacheExists2(USERMAPPINGUSERSERVER, ObjectIdGetDatum(table->owner),
								  ObjectIdGetDatum(table->serverid)))
			table->role = table->owner;
		describe_server(table, states);

		list = lappend(list, table);
	}
	abp_scan_end(&scan);
	PopActiveSnapshot();
	return list;
}

/*
 * A table that is not attached any more, in the current memory context: it has no
 * server, and nothing else is known of it than its owner and name, if it is there.
 */
UsageTable *
abp_attachment_former(Oid relid)
{
	UsageTable *table = palloc0(sizeof(UsageTable));

	table->relid = relid;
	describe_table(table);
	return table;
}

/*
 * The table of this OID in a list of UsageTable, or NULL.
 */
UsageTable *
abp_attachment_of(List *tables, Oid relid)
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

/*
 * Is a table attached?  Then *serverid is its server, InvalidOid if that is
 * gone, and *ledger_from the last delivery before its last TRUNCATE.
 */
bool
abp_attachment_find(Oid relid, Oid *serverid, int64 *ledger_from)
{
	ScanKeyData key;
	OrderedScan scan;
	HeapTuple	tuple;

	ScanKeyInit(&key, Anum_attachment_usage, BTEqualStrategyNumber, F_OIDEQ,
				ObjectIdGetDatum(relid));
	PushActiveSnapshot(GetLatestSnapshot());
	begin_attachment_scan(&scan, 1, &key);
	tuple = systable_getnext_ordered(scan.scan, ForwardScanDirection);
	if (tuple != NULL)
	{
		*serverid = server_of(ATTACHMENT_FORM(tuple), abp_database_standing() == DATABASE_ARMED);
		*ledger_from = new_column(tuple, Anum_attachment_ledger_from, RelationGetDescr(scan.rel));
	}
	abp_scan_end(&scan);
	PopActiveSnapshot();
	return tuple != NULL;
}

/*
 * A server may have been renamed: its tables stay with it.  Not in a copy of a
 * database of another cluster (pg_upgrade, pg_restore): the OIDs that tell a
 * renamed server may be other servers' there, until aibilling.arm() has bound
 * the tables.
 */
void
abp_attachments_follow_servers(void)
{
	static Statement same_cluster = {
		"SELECT FROM aibilling.database_identity i WHERE i.system_identifier = $1",
		1, {INT8OID}
	};
	static Statement follow[] = {
		{
			"UPDATE aibilling.ledger d SET server = s.srvname"
			" FROM aibilling.attachment t JOIN pg_catalog.pg_foreign_server s ON s.oid = t.serverid"
			" WHERE d.state = 'sending' AND d.usage_table = t.usage"
			" AND d.server = t.server AND s.srvname <> t.server",
			0, {0}
		},
		{
			"DELETE FROM aibilling.server_state st"
			" USING aibilling.attachment t JOIN pg_catalog.pg_foreign_server s ON s.oid = t.serverid"
			" WHERE st.server = s.srvname AND s.srvname <> t.server",
			0, {0}
		},
		{
			"UPDATE aibilling.server_state st SET server = s.srvname"
			" FROM aibilling.attachment t JOIN pg_catalog.pg_foreign_server s ON s.oid = t.serverid"
			" WHERE st.server = t.server AND s.srvname <> t.server",
			0, {0}
		},
		{
			"UPDATE aibilling.attachment t SET server = s.srvname"
			" FROM pg_catalog.pg_foreign_server s"
			" WHERE s.oid = t.serverid AND s.srvname <> t.server",
			0, {0}
		}
	};
	Datum		values[1] = {Int64GetDatum((int64) GetSystemIdentifier())};
	SavedUser	saved;

	if (abp_statement_open(&same_cluster, values, NULL, &saved) > 0)
	{
		for (int i = 0; i < lengthof(follow); i++)
			abp_statement_run(&follow[i], NULL, NULL);
	}
	abp_statement_close(&saved);
}

/*
 * A table is gone, or no longer attached: forget that it was.
 */
void
abp_attachment_forget(Oid relid)
{
	static Statement forget = {
		"DELETE FROM aibilling.attachment t WHERE t.usage = $1", 1, {REGCLASSOID}
	};
	Datum		values[1] = {ObjectIdGetDatum(relid)};

	abp_statement_run_alone(&forget, values, NULL);
}

/*
 * A table has been emptied: what the ledger has of it so far does not speak of
 * the rows that come.
 */
void
abp_attachment_truncated(Oid relid)
{
	static Statement note = {
		"UPDATE aibilling.attachment SET ledger_from ="
		" (SELECT coalesce(max(d.id), 0) FROM aibilling.ledger d) WHERE usage = $1",
		1, {REGCLASSOID}
	};
	Datum		values[1] = {ObjectIdGetDatum(relid)};

	abp_statement_run_alone(&note, values, NULL);
	CacheInvalidateRelcacheByRelid(abp_extension_relation("attachment"));
}

/* What abp_attachments returns has changed: a shipper elsewhere reads it again. */
static void
tell_shipper(void)
{
	CacheInvalidateRelcacheByRelid(abp_extension_relation("server_state"));
}

#define SET_BLOCKED(reason, until, lock) \
	"UPDATE aibilling.attachment SET blocked_reason = " reason ", blocked_until = " until \
	" WHERE usage = (SELECT t.usage FROM aibilling.attachment t WHERE t.usage = $1 FOR UPDATE" \
	lock ")"

/*
 * Note why a table's rows cannot be read, and when to try again.  Returns
 * false, having done nothing, if another transaction has locked what stands
 * there: the shipper waits for nobody.
 */
bool
abp_attachment_block(Oid relid, const char *reason, TimestampTz until)
{
	static Statement block = {
		SET_BLOCKED("$2", "$3", " SKIP LOCKED"), 3, {REGCLASSOID, TEXTOID, TIMESTAMPTZOID}
	};
	Datum		values[3] = {
		ObjectIdGetDatum(relid), PointerGetDatum(abp_reason_text(reason)),
		TimestampTzGetDatum(until)
	};
	bool		done = abp_statement_run_alone(&block, values, NULL) > 0;

	tell_shipper();
	return done;
}

/*
 * A table's rows can be read again.  may_wait: also for a transaction that has
 * locked what stands there.
 */
void
abp_attachment_unblock(Oid relid, bool may_wait)
{
	static Statement unblock[2] = {
		{
			SET_BLOCKED("NULL", "NULL", " SKIP LOCKED"), 1, {REGCLASSOID}
		},
		{
			SET_BLOCKED("NULL", "NULL", ""), 1, {REGCLASSOID}
		}
	};
	Datum		values[1] = {ObjectIdGetDatum(relid)};

	(void) abp_statement_run_alone(&unblock[may_wait], values, NULL);
	tell_shipper();
}

#define SAVE_STATE(column, value, key) \
	"INSERT INTO aibilling.server_state AS st" \
	" (server, paused, reason, failures, not_before, changed_at" column ")" \
	" VALUES ($1, $2, $3, $4, $5, pg_catalog.clock_timestamp()" value ")" \
	" ON CONFLICT (" key ") DO UPDATE SET" \
	" paused = CASE WHEN st.paused = 'operator' THEN st.paused ELSE excluded.paused END," \
	" reason = CASE WHEN st.paused = 'operator' THEN st.reason ELSE excluded.reason END," \
	" failures = excluded.failures," \
	" not_before = excluded.not_before, changed_at = excluded.changed_at"

/*
 * Keep a server's state, of one role or InvalidOid: paused (NULL, "operator",
 * "answer"), why, how many failures in a row, and when to try again
 * (DT_NOBEGIN: at once).  An operator's pause stays until abp_server_resume.
 * Without abp_server_state_by_role there is InvalidOid only.
 */
void
abp_server_state_save(const char *server, Oid role, const char *paused, const char *reason,
					  int failures, TimestampTz not_before)
{
	static Statement save[2] = {
		{
			SAVE_STATE("", "", "server"),
			5, {NAMEOID, TEXTOID, TEXTOID, INT4OID, TIMESTAMPTZOID}
		},
		{
			SAVE_STATE(", role", ", $6", "server, role"),
			6, {NAMEOID, TEXTOID, TEXTOID, INT4OID, TIMESTAMPTZOID, OIDOID}
		}
	};
	Datum		values[6] = {
		DirectFunctionCall1(namein, CStringGetDatum(server)),
		paused == NULL ? (Datum) 0 : CStringGetTextDatum(paused),
		reason == NULL ? (Datum) 0 : PointerGetDatum(abp_reason_text(reason)),
		Int32GetDatum(failures),
		TimestampTzGetDatum(not_before),
		ObjectIdGetDatum(role)
	};
	char		nulls[7] = "      ";

	if (paused == NULL)
		nulls[1] = 'n';
	if (reason == NULL)
		nulls[2] = 'n';
	if (TIMESTAMP_NOT_FINITE(not_before))
		nulls[4] = 'n';

	abp_statement_run_alone(&save[abp_server_state_by_role()], values, nulls);
	tell_shipper();
}

#define RESUME \
	"DELETE FROM aibilling.server_state st WHERE st.server = $1" \
	" AND ($2 OR st.paused IS DISTINCT FROM 'operator')"

/*
 * Clear a server's waits and the pause that its answer began, of one role or
 * InvalidOid; by_operator: an operator's pause too.
 */
void
abp_server_resume(const char *server, Oid role, bool by_operator)
{
	static Statement resume[2] = {
		{
			RESUME, 2, {NAMEOID, BOOLOID}
		},
		{
			RESUME " AND st.role = $3", 3, {NAMEOID, BOOLOID, OIDOID}
		}
	};
	Datum		values[3] = {
		DirectFunctionCall1(namein, CStringGetDatum(server)),
		BoolGetDatum(by_operator),
		ObjectIdGetDatum(role)
	};

	abp_statement_run_alone(&resume[abp_server_state_by_role()], values, NULL);
	tell_shipper();
}

/*
 * What waits now may have been sent by the server that this one descends
 * from: duplicates of it are no surprise.
 */
static void
mark_outcome_unknown(void)
{
	static Statement mark = {
		"UPDATE aibilling.outbox_entry SET outcome_unknown = true WHERE NOT outcome_unknown AND state >= 'a'", 0, {0}
	};

	abp_statement_run_alone(&mark, NULL, NULL);
}

/*
 * Write this database's identity: it may send from now on.  only_first: not
 * if an identity stands there, be it another's.  Otherwise usage tables are
 * bound to the servers that have their servers' names now: in a copy these
 * are others.
 */
void
abp_database_arm(bool only_first)
{
	static Statement forget = {
		"DELETE FROM aibilling.database_identity", 0, {0}
	};
	static Statement arm = {
		"INSERT INTO aibilling.database_identity (system_identifier, database, timeline)"
		" SELECT $1, $2, $3 WHERE NOT EXISTS (SELECT FROM aibilling.database_identity)",
		3, {INT8OID, OIDOID, INT8OID}
	};
	static Statement bind = {
		"UPDATE aibilling.attachment t SET serverid = s.oid"
		" FROM pg_catalog.pg_foreign_server s"
		" WHERE s.srvname = t.server AND s.oid <> t.serverid",
		0, {0}
	};
	Datum		values[3] = {
		Int64GetDatum((int64) GetSystemIdentifier()), ObjectIdGetDatum(MyDatabaseId),
		Int64GetDatum((int64) GetWALInsertionTimeLine())
	};

	if (!only_first)
	{
		abp_statement_run_alone(&forget, NULL, NULL);
		abp_statement_run_alone(&bind, NULL, NULL);
		CacheInvalidateRelcacheByRelid(abp_extension_relation("attachment"));
		mark_outcome_unknown();
	}
	abp_statement_run_alone(&arm, values, NULL);
	tell_shipper();
}

/*
 * After a failover, or a recovery to a point in time, the ledger may lack the
 * last deliveries: mark what waits.
 */
void
abp_database_check_timeline(void)
{
	static Statement note = {
		"UPDATE aibilling.database_identity i SET timeline = $1 WHERE i.timeline <> $1"
		" AND i.system_identifier = $2 AND i.database = $3",
		3, {INT8OID, INT8OID, OIDOID}
	};
	Datum		values[3] = {
		Int64GetDatum((int64) GetWALInsertionTimeLine()),
		Int64GetDatum((int64) GetSystemIdentifier()), ObjectIdGetDatum(MyDatabaseId)
	};

	if (abp_statement_run_alone(&note, values, NULL) > 0)
		mark_outcome_unknown();
}
