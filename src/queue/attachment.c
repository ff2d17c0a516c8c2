/*-------------------------------------------------------------------------
 *
 * attachment.c
 *	  Attached usage tables: the table aibilling.attachment.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "catalog/pg_class.h"
#include "catalog/pg_type.h"
#include "foreign/foreign.h"
#include "miscadmin.h"
#include "storage/lmgr.h"
#include "storage/lock.h"
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
#include "base/table_scan.h"
#include "base/text_view.h"
#include "queue/attachment.h"
#include "queue/database.h"
#include "queue/server_state.h"

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

/*
 * The table of attachments: before 1.2 one with another name.
 */
const char *
abp_attachment_table(void)
{
	return OidIsValid(abp_extension_relation("attachment")) ? "attachment" : "usage_table";
}

/*
 * The server of a usage table, InvalidOid if it is gone.  Not by its name, which
 * may be changing just now.  But in a copy of a database the OID written down is
 * that of the original's server, and may be another's here: until aibilling.arm()
 * binds the tables, the name alone tells.
 */
static Oid
server_of(const AttachmentForm *form, bool armed)
{
	if (!armed)
		return get_foreign_server_oid(NameStr(form->server), true);
	return SearchSysCacheExists1(FOREIGNSERVEROID, ObjectIdGetDatum(form->serverid)) ?
		form->serverid : InvalidOid;
}

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
	table->name = abp_statement_table_name(table->relid);
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
	const ServerState *state = abp_server_state_find(states, table->server, table->role);
	const ServerState *pause = abp_server_state_find(states, table->server, InvalidOid);
	const char *reason = state != NULL ? state->reason : NULL;

	table->failures = state != NULL ? state->failures : 0;
	table->not_before = state != NULL ? state->not_before : DT_NOBEGIN;
	table->paused_by_answer = paused_by(state, "answer");

	/* An operator pauses a server for all, or for one owner of tables. */
	if (!paused_by(pause, "operator"))
		pause = abp_server_state_find(states, table->server, table->owner);
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
	states = abp_server_states(by_role);
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
 * The lock, until the transaction ends, by which the shipper and those who change what
 * is recorded of a usage table keep each other away: also when its rows could be read.
 */
static bool
lock_attachment(Oid relid, LOCKMODE mode, bool wait)
{
	LOCKTAG		tag;

	SET_LOCKTAG_OBJECT(tag, MyDatabaseId, RelationRelationId, relid, 0);
	return LockAcquire(&tag, mode, false, !wait) != LOCKACQUIRE_NOT_AVAIL;
}

/*
 * Keep others from changing what is recorded of a table: for the shipper, before it
 * takes the snapshot by which it reads, or settles a request.  Returns false if
 * somebody is just doing so, who is not waited for.  What others have done is known
 * then: having a lock on the table, the shipper would not hear of a partition that
 * has come.
 */
bool
abp_attachment_hold(Oid relid)
{
	if (!lock_attachment(relid, ShareLock, false))
		return false;
	AcceptInvalidationMessages();
	return true;
}

/*
 * Keep the shipper from a table: for DROP TABLE, ATTACH PARTITION and the end of
 * DETACH PARTITION CONCURRENTLY.  Waits for a turn of the shipper's at most.
 */
void
abp_attachment_lock(Oid relid)
{
	(void) lock_attachment(relid, ExclusiveLock, true);
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

	abp_server_state_tell_shipper();
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
	abp_server_state_tell_shipper();
}
