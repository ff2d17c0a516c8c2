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
#include "executor/spi.h"
#include "utils/fmgroids.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"

#include "queue/feed.h"

/* A statement about one usage table, or one delivery, that is prepared once a session. */
typedef struct FeedStatement
{
	const char *sql;
	Oid			argtype;
	SPIPlanPtr	plan;
} FeedStatement;

/* The ids of an outbox entry, whether it has one or several. */
#define IDS_OF(entry) \
	"coalesce(" entry ".ids, int8multirange(int8range(" entry ".id, nullif(" entry ".id, 9223372036854775807) + 1)))"

/* Run a statement inside SPI_connect.  Returns the number of rows. */
static uint64
run(FeedStatement *statement, Datum value)
{
	int			result;

	if (statement->plan == NULL)
	{
		SPIPlanPtr	plan = SPI_prepare(statement->sql, 1, &statement->argtype);

		if (plan == NULL)
			elog(ERROR, "unexpected failure to prepare: %s", SPI_result_code_string(SPI_result));
		SPI_keepplan(plan);
		statement->plan = plan;
	}
	result = SPI_execute_plan(statement->plan, &value, NULL, false, 0);
	if (result < 0)
		elog(ERROR, "unexpected failure to execute: %s", SPI_result_code_string(result));
	return SPI_processed;
}

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
 * Ids of a table that are in flight, in the current memory context.
 */
IdSet
abp_feed_sending(Oid usage_table)
{
	static FeedStatement sending = {
		"SELECT range_agg(d.usage_ids) FROM aibilling.ledger d WHERE d.usage_table = $1 AND d.state = 'sending'",
		REGCLASSOID
	};
	MemoryContext caller = CurrentMemoryContext;
	IdSet		ids = {0};
	SavedUser	saved;
	bool		isnull;
	Datum		value;

	abp_become_extension_owner(&saved);
	SPI_connect();
	(void) run(&sending, ObjectIdGetDatum(usage_table));
	value = SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1, &isnull);
	if (!isnull)
	{
		MemoryContext old = MemoryContextSwitchTo(caller);

		ids = abp_idset_from_multirange(value);
		MemoryContextSwitchTo(old);
	}
	SPI_finish();
	abp_restore_user(&saved);
	return ids;
}

/*
 * Add what is noted of a table to what is known of it; for the shipper, and
 * before the outbox is emptied.  Rows that were deleted in flight are counted
 * by abp_feed_settled: here their notes go once nothing of them is in flight.
 */
void
abp_feed_sum_up(Oid usage_table)
{
	static FeedStatement noted = {
		"SELECT FROM aibilling.outbox_entry e WHERE e.usage_table = $1"
		" AND e.state = ANY ('{s,k,v}'::pg_catalog.\"char\"[]) AND e.not_before = '-infinity' LIMIT 1",
		REGCLASSOID
	};
	static FeedStatement sum_up = {
		"WITH gone AS (DELETE FROM aibilling.outbox_entry e WHERE e.usage_table = $1"
		"  AND e.state = ANY ('{s,k}'::pg_catalog.\"char\"[]) AND e.not_before = '-infinity'"
		"  RETURNING e.state, (SELECT sum(coalesce(upper(r), 9223372036854775807) - lower(r))"
		"   FROM unnest(" IDS_OF("e") ") r) AS n)"
		" UPDATE aibilling.attachment SET"
		"  skipped = skipped + (SELECT coalesce(sum(g.n), 0) FROM gone g WHERE g.state = 's'),"
		"  kept = kept + (SELECT coalesce(sum(g.n), 0) FROM gone g WHERE g.state = 'k')"
		" WHERE usage = $1",
		REGCLASSOID
	};
	static FeedStatement forget = {
		"DELETE FROM aibilling.outbox_entry e WHERE e.usage_table = $1 AND e.state = 'v'"
		" AND e.not_before = '-infinity' AND NOT EXISTS (SELECT FROM aibilling.ledger d"
		"  WHERE d.usage_table = $1 AND d.state = 'sending' AND d.usage_ids && " IDS_OF("e") ")",
		REGCLASSOID
	};
	SavedUser	saved;

	if (!abp_feed_replicated(usage_table))
		return;
	abp_become_extension_owner(&saved);
	SPI_connect();
	if (run(&noted, ObjectIdGetDatum(usage_table)) > 0)
	{
		(void) run(&sum_up, ObjectIdGetDatum(usage_table));
		(void) run(&forget, ObjectIdGetDatum(usage_table));
	}
	SPI_finish();
	abp_restore_user(&saved);
}

/*
 * A delivery has been recorded as delivered: rows of it that were deleted
 * meanwhile are counted as vanished.
 */
void
abp_feed_settled(const Delivery *delivery)
{
	static FeedStatement count = {
		"UPDATE aibilling.ledger d SET vanished = d.vanished + v.n"
		" FROM (SELECT sum(upper(r) - lower(r)) AS n"
		"  FROM aibilling.ledger l, aibilling.outbox_entry e, unnest(l.usage_ids * " IDS_OF("e") ") r"
		"  WHERE l.id = $1 AND e.usage_table = l.usage_table AND e.state = 'v' AND e.not_before = '-infinity') v"
		" WHERE d.id = $1 AND v.n > 0",
		INT8OID
	};
	SavedUser	saved;

	if (!abp_feed_replicated(delivery->usage_table))
		return;
	abp_become_extension_owner(&saved);
	SPI_connect();
	(void) run(&count, Int64GetDatum(delivery->id));
	SPI_finish();
	abp_restore_user(&saved);
}
