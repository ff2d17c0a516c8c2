/*-------------------------------------------------------------------------
 *
 * feed.c
 *	  Usage tables that a subscription feeds: which they are, and what is
 *	  counted of them.
 *
 * What their triggers count is noted in the outbox, with the rest that a
 * transaction does there, and summed up by the shipper: the subscription waits
 * for nobody, and nobody for it.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/table.h"
#include "catalog/pg_type.h"
#include "utils/fmgroids.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"

#include "base/extension.h"
#include "base/statement.h"
#include "queue/feed.h"
#include "queue/ledger.h"

/* The ids of an outbox entry, whether it has one or several. */
#define IDS_OF(entry) \
	"coalesce(" entry ".ids, int8multirange(int8range(" entry ".id, nullif(" entry ".id, 9223372036854775807) + 1)))"

/*
 * Is this attached table fed by a subscription?  Without SQL: a session asks it
 * once for each table that it writes.  False where the extension is older.
 */
bool
abp_feed_replicated(Oid usage_table)
{
	Oid			relid = abp_extension_relation("attachment");
	AttrNumber	usage;
	AttrNumber	replicated;
	Relation	rel;
	ScanKeyData key;
	SysScanDesc scan;
	HeapTuple	tuple;
	bool		isnull;
	bool		result = false;

	if (!OidIsValid(relid))
		return false;
	usage = get_attnum(relid, "usage");
	replicated = get_attnum(relid, "replicated");
	if (replicated == InvalidAttrNumber)
		return false;

	rel = table_open(relid, AccessShareLock);
	PushActiveSnapshot(GetLatestSnapshot());
	ScanKeyInit(&key, usage, BTEqualStrategyNumber, F_OIDEQ, ObjectIdGetDatum(usage_table));
	scan = systable_beginscan(rel, InvalidOid, false, GetActiveSnapshot(), 1, &key);
	tuple = systable_getnext(scan);
	if (tuple != NULL)
		result = DatumGetBool(heap_getattr(tuple, replicated, RelationGetDescr(rel), &isnull)) && !isnull;
	systable_endscan(scan);
	PopActiveSnapshot();
	table_close(rel, AccessShareLock);
	return result;
}

/*
 * Add what is noted of a table to what is known of it; for the shipper, and
 * before the outbox is emptied.  Rows that were deleted in flight are counted
 * by abp_feed_settled: here their notes go once nothing of them is in flight.
 */
void
abp_feed_sum_up(Oid usage_table)
{
	static Statement noted = {
		"SELECT FROM aibilling.outbox_entry e WHERE e.usage_table = $1"
		" AND e.state = ANY ('{s,k,v}'::pg_catalog.\"char\"[]) AND e.not_before = '-infinity' LIMIT 1",
		1, {REGCLASSOID}
	};
	static Statement sum_up = {
		"WITH gone AS (DELETE FROM aibilling.outbox_entry e WHERE e.usage_table = $1"
		"  AND e.state = ANY ('{s,k}'::pg_catalog.\"char\"[]) AND e.not_before = '-infinity'"
		"  RETURNING e.state, (SELECT sum(coalesce(upper(r), 9223372036854775807) - lower(r))"
		"   FROM unnest(" IDS_OF("e") ") r) AS n)"
		" UPDATE aibilling.attachment SET"
		"  skipped = skipped + (SELECT coalesce(sum(g.n), 0) FROM gone g WHERE g.state = 's'),"
		"  kept = kept + (SELECT coalesce(sum(g.n), 0) FROM gone g WHERE g.state = 'k')"
		" WHERE usage = $1",
		1, {REGCLASSOID}
	};
	static Statement forget = {
		"DELETE FROM aibilling.outbox_entry e WHERE e.usage_table = $1 AND e.state = 'v'"
		" AND e.not_before = '-infinity' AND NOT EXISTS (SELECT FROM aibilling.ledger d"
		"  WHERE d.usage_table = $1 AND d.state = 'sending' AND d.usage_ids && " IDS_OF("e") ")",
		1, {REGCLASSOID}
	};
	Datum		values[1] = {ObjectIdGetDatum(usage_table)};

	if (!abp_feed_replicated(usage_table) || abp_statement_run_alone(&noted, values, NULL) == 0)
		return;
	(void) abp_statement_run_alone(&sum_up, values, NULL);
	(void) abp_statement_run_alone(&forget, values, NULL);
}

/*
 * A delivery has been recorded as delivered: rows of it that were deleted
 * meanwhile are counted as vanished.
 */
void
abp_feed_settled(const Delivery *delivery)
{
	static Statement count = {
		"UPDATE aibilling.ledger d SET vanished = d.vanished + v.n"
		" FROM (SELECT sum(upper(r) - lower(r)) AS n"
		"  FROM aibilling.ledger l, aibilling.outbox_entry e, unnest(l.usage_ids * " IDS_OF("e") ") r"
		"  WHERE l.id = $1 AND e.usage_table = l.usage_table AND e.state = 'v' AND e.not_before = '-infinity') v"
		" WHERE d.id = $1 AND v.n > 0",
		1, {INT8OID}
	};
	Datum		values[1] = {Int64GetDatum(delivery->id)};

	if (abp_feed_replicated(delivery->usage_table))
		(void) abp_statement_run_alone(&count, values, NULL);
}
