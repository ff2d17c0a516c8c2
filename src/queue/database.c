/*-------------------------------------------------------------------------
 *
 * database.c
 *	  Whether this database may send: the table aibilling.database_identity.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/table.h"
#include "access/xlog.h"
#include "catalog/pg_subscription_rel.h"
#include "catalog/pg_type.h"
#include "miscadmin.h"
#include "utils/fmgroids.h"
#include "utils/inval.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"

#include "base/extension.h"
#include "base/statement.h"
#include "queue/database.h"
#include "queue/server_state.h"

/* A tuple of aibilling.database_identity. */
typedef struct IdentityForm
{
	int64		system_identifier;
	Oid			database;
	int64		timeline;
} IdentityForm;

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
	abp_server_state_tell_shipper();
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
