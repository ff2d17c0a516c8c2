/*-------------------------------------------------------------------------
 *
 * shares.c
 *	  What each delivery's rows add up to: the tables aibilling.share and
 *	  aibilling.rollup.
 *
 * A delivery's share of the sums is written when the delivery enters the
 * ledger, and counts as long as the ledger has it as being sent or delivered.
 * Once it is delivered it is added to the rollup and deleted, in one
 * transaction.  A share without sums stands for the rows themselves: those of
 * a delivery that is being divided, or that an older version has made.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/table.h"
#include "catalog/pg_type.h"
#include "miscadmin.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/uuid.h"

#include "base/extension.h"
#include "base/idset.h"
#include "base/rights.h"
#include "base/statement.h"
#include "compat.h"
#include "queue/shares.h"

/* --- shares ---------------------------------------------------------------- */

/*
 * Write what a delivery's rows add up to (NULL: not known), but for those that
 * other deliveries count ("counted"; NULL: not known).
 */
void
abp_share_write(int64 delivery, Oid usage_table, bytea *sums, const IdSet *counted)
{
	static Statement write = {
		"INSERT INTO aibilling.share AS s (delivery, usage_table, sums, counted) VALUES ($1, $2, $3, $4)"
		" ON CONFLICT (delivery) DO UPDATE SET sums = excluded.sums, counted = excluded.counted",
		4, {INT8OID, REGCLASSOID, BYTEAOID, INT8MULTIRANGEOID}
	};
	IdSet		ids = counted == NULL ? (IdSet) {0} : *counted;
	Datum		values[4] = {
		Int64GetDatum(delivery),
		ObjectIdGetDatum(usage_table),
		PointerGetDatum(sums),
		abp_idset_to_multirange(&ids)
	};
	char		nulls[5] = "    ";

	nulls[2] = sums == NULL ? 'n' : ' ';
	nulls[3] = counted == NULL ? 'n' : ' ';
	(void) abp_statement_run_alone(&write, values, nulls);
}

/*
 * What the rows of a delivered share add up to is known by now.
 */
void
abp_share_set_sums(int64 delivery, bytea *sums)
{
	static Statement set = {
		"UPDATE aibilling.share SET sums = $2 WHERE delivery = $1", 2, {INT8OID, BYTEAOID}
	};
	Datum		values[2] = {Int64GetDatum(delivery), PointerGetDatum(sums)};

	(void) abp_statement_run_alone(&set, values, NULL);
}

/*
 * A delivery's share counts no more, or is in the rollup.
 */
void
abp_share_drop(int64 delivery)
{
	static Statement drop = {
		"DELETE FROM aibilling.share WHERE delivery = $1", 1, {INT8OID}
	};
	Datum		values[1] = {Int64GetDatum(delivery)};

	(void) abp_statement_run_alone(&drop, values, NULL);
}

/*
 * The same of several.
 */
void
abp_shares_drop(const int64 *deliveries, int n)
{
	static Statement drop = {
		"DELETE FROM aibilling.share WHERE delivery = ANY ($1)", 1, {INT8ARRAYOID}
	};
	Datum	   *elements = palloc(sizeof(Datum) * Max(n, 1));
	Datum		values[1];

	for (int i = 0; i < n; i++)
		elements[i] = Int64GetDatum(deliveries[i]);
	values[0] = PointerGetDatum(construct_array(elements, n, INT8OID, sizeof(int64), FLOAT8PASSBYVAL,
												TYPALIGN_DOUBLE));
	(void) abp_statement_run_alone(&drop, values, NULL);
}

/*
 * Which of a delivery's rows do others count, as it was written down?  In the
 * current memory context.  Returns false if that is not known.
 */
bool
abp_share_load_counted(int64 delivery, IdSet *counted)
{
	static Statement load = {
		"SELECT counted FROM aibilling.share WHERE delivery = $1 AND counted IS NOT NULL",
		1, {INT8OID}, true
	};
	MemoryContext caller = CurrentMemoryContext;
	Datum		values[1] = {Int64GetDatum(delivery)};
	bool		known;
	SavedUser	saved;

	known = abp_statement_open(&load, values, NULL, &saved) > 0;
	memset(counted, 0, sizeof(IdSet));
	if (known)
		*counted = abp_result_idset(0, 1, caller);
	abp_statement_close(&saved);
	return known;
}

/* Shares as a list of Share in the current memory context. */
static List *
read_shares(Statement *statement, Datum *values)
{
	MemoryContext caller = CurrentMemoryContext;
	List	   *list = NIL;
	uint64		n;
	SavedUser	saved;

	n = abp_statement_open(statement, values, NULL, &saved);
	for (uint64 i = 0; i < n; i++)
	{
		MemoryContext spi = MemoryContextSwitchTo(caller);
		Share	   *share = palloc0(sizeof(Share));
		bool		isnull;
		Datum		sums;

		share->delivery = abp_result_int64(i, 1, 0);
		share->usage_table = abp_result_oid(i, 2);
		sums = abp_result_datum(i, 3, &isnull);
		if (!isnull)
			share->sums = DatumGetByteaPCopy(sums);
		share->counted = abp_result_idset(i, 4, caller);
		(void) abp_result_datum(i, 4, &isnull);
		share->knows_counted = !isnull;
		if (share->sums == NULL)
			share->ids = abp_result_idset(i, 5, caller);
		share->delivered = strcmp(TextDatumGetCString(abp_result_datum(i, 6, &isnull)), "delivered") == 0;
		list = lappend(list, share);
		MemoryContextSwitchTo(spi);
	}
	abp_statement_close(&saved);
	return list;
}

/*
 * The shares of a table that are not in the rollup yet, by the active
 * snapshot: a list of Share in the current memory context.
 */
List	   *
abp_shares_of(Oid usage_table)
{
	static Statement of_table = {
		"SELECT s.delivery, s.usage_table, s.sums, s.counted, d.usage_ids, coalesce(d.state, 'delivered')"
		" FROM (SELECT * FROM aibilling.share o WHERE o.usage_table = $1 OFFSET 0) s LEFT JOIN LATERAL"
		" (SELECT l.usage_ids, l.state FROM aibilling.ledger l WHERE l.id = s.delivery OFFSET 0) d ON true"
		" WHERE coalesce(d.state, 'delivered') IN ('delivered', 'sending')",
		1, {REGCLASSOID}, true
	};
	Datum		values[1] = {ObjectIdGetDatum(usage_table)};

	return read_shares(&of_table, values);
}

/*
 * The first shares of deliveries from this one on that are delivered; unknown:
 * those whose sums are not known.  A list of Share in the current memory
 * context.
 */
List	   *
abp_shares_to_fold(int64 from_delivery, int max_shares, bool unknown)
{
	static Statement next = {
		"SELECT s.delivery, s.usage_table, s.sums, s.counted, d.usage_ids, 'delivered'::text"
		" FROM aibilling.share s LEFT JOIN aibilling.ledger d ON d.id = s.delivery"
		" WHERE s.delivery >= $1 AND (s.sums IS NULL) = $3 AND coalesce(d.state, 'delivered') = 'delivered'"
		" ORDER BY s.delivery LIMIT $2",
		3, {INT8OID, INT4OID, BOOLOID}, true
	};
	Datum		values[3] = {
		Int64GetDatum(from_delivery), Int32GetDatum(max_shares), BoolGetDatum(unknown)
	};

	return read_shares(&next, values);
}

/*
 * The first delivery that is being sent, or that is to come.
 */
int64
abp_share_first_open(void)
{
	static Statement first = {
		"SELECT coalesce((SELECT min(d.id) FROM aibilling.ledger d WHERE d.state = 'sending'),"
		" (SELECT max(d.id) + 1 FROM aibilling.ledger d), 0)",
		0, {0}, true
	};
	int64		id;
	SavedUser	saved;

	(void) abp_statement_open(&first, NULL, NULL, &saved);
	id = abp_result_int64(0, 1, 0);
	abp_statement_close(&saved);
	return id;
}

/*
 * Those of a table's ids that are counted, by the active snapshot, in the
 * rollup or in a share of known sums, since its last TRUNCATE.  In the current
 * memory context.
 */
IdSet
abp_share_counted(Oid usage_table, IdSet *ids, int64 ledger_from)
{
	static Statement overlapping = {
		"SELECT d.usage_ids FROM (SELECT * FROM aibilling.ledger l WHERE l.usage_ids && $2 OFFSET 0) d"
		" LEFT JOIN LATERAL (SELECT true AS there, o.sums IS NOT NULL AS known FROM aibilling.share o"
		"  WHERE o.delivery = d.id OFFSET 0) s ON true"
		" WHERE d.usage_table = $1 AND d.id > $3"
		" AND (s.known AND d.state IN ('delivered', 'sending') OR s.there IS NULL AND d.state = 'delivered')",
		3, {REGCLASSOID, INT8MULTIRANGEOID, INT8OID}, true
	};
	Datum		values[3] = {
		ObjectIdGetDatum(usage_table), (Datum) 0, Int64GetDatum(ledger_from)
	};
	IdSet		counted = {0};

	if (ids->nranges == 0)
		return counted;
	values[1] = abp_idset_to_multirange(ids);
	counted = abp_statement_ids(&overlapping, values);
	return abp_idset_intersect(&counted, ids);
}

/*
 * Ids of a delivery, which counts them, go back to the outbox while Polar may
 * have their events.  They are of new rows, whatever was delivered under these
 * ids before: let no other delivery seem to count them.
 */
void
abp_shares_disown(int64 delivery, Oid usage_table, IdSet *ids)
{
	static Statement disown = {
		"UPDATE aibilling.ledger SET usage_ids = usage_ids - $2"
		" WHERE usage_table = $1 AND usage_ids && $2 AND state = 'delivered' AND id <> $3",
		3, {REGCLASSOID, INT8MULTIRANGEOID, INT8OID}
	};
	Datum		values[3] = {ObjectIdGetDatum(usage_table), (Datum) 0, Int64GetDatum(delivery)};

	if (ids->nranges == 0)
		return;
	values[1] = abp_idset_to_multirange(ids);
	(void) abp_statement_run_alone(&disown, values, NULL);
}

/*
 * A table has been emptied: of deliveries whose sums are not known, nothing is
 * left that could tell them.
 */
void
abp_shares_truncated(Oid usage_table)
{
	static Statement forget = {
		"DELETE FROM aibilling.share WHERE usage_table = $1 AND sums IS NULL", 1, {REGCLASSOID}
	};
	Datum		values[1] = {ObjectIdGetDatum(usage_table)};

	(void) abp_statement_run_alone(&forget, values, NULL);
}

/* --- the rollup ------------------------------------------------------------- */

/*
 * A table is gone: so is what its rows added up to.
 */
void
abp_rollup_forget(Oid usage_table)
{
	static Statement forget[2] = {
		{
			"DELETE FROM aibilling.share WHERE usage_table = $1", 1, {REGCLASSOID}
		},
		{
			"DELETE FROM aibilling.rollup WHERE usage_table = $1", 1, {REGCLASSOID}
		}
	};
	Datum		values[1] = {ObjectIdGetDatum(usage_table)};

	for (int i = 0; i < lengthof(forget); i++)
		(void) abp_statement_run_alone(&forget[i], values, NULL);
}

/*
 * Add sums to the rollup: arrays of as many elements, in the order of
 * RollupColumn.
 */
void
abp_rollup_add(Datum *columns)
{
	static Statement add = {
		"INSERT INTO aibilling.rollup AS r SELECT * FROM unnest($1, $2, $3, $4, $5, $6, $7, $8, $9, $10,"
		" $11, $12, $13, $14, $15, $16, $17, $18, $19)"
		" ON CONFLICT (usage_table, level, customer, day, key) DO UPDATE SET"
		" usage_rows = r.usage_rows + excluded.usage_rows,"
		" input_tokens = r.input_tokens + excluded.input_tokens,"
		" cache_read_tokens = r.cache_read_tokens + excluded.cache_read_tokens,"
		" cache_write_tokens = r.cache_write_tokens + excluded.cache_write_tokens,"
		" output_tokens = r.output_tokens + excluded.output_tokens,"
		" reasoning_tokens = r.reasoning_tokens + excluded.reasoning_tokens,"
		" cost_nanos = r.cost_nanos + excluded.cost_nanos,"
		" cost_cents = r.cost_cents + excluded.cost_cents,"
		" unpriced = r.unpriced + excluded.unpriced",
		NUM_ROLLUP_COLUMNS,
		{REGCLASSARRAYOID, CHARARRAYOID, INT8ARRAYOID, DATEARRAYOID, UUIDARRAYOID, TEXTARRAYOID, UUIDARRAYOID,
			TEXTARRAYOID, TEXTARRAYOID, TEXTARRAYOID, INT8ARRAYOID, NUMERICARRAYOID, NUMERICARRAYOID,
			NUMERICARRAYOID, NUMERICARRAYOID, NUMERICARRAYOID, NUMERICARRAYOID, NUMERICARRAYOID,
		INT8ARRAYOID}
	};

	(void) abp_statement_run_alone(&add, columns, NULL);
}

/*
 * Read what all customers of a table add up to, by the active snapshot: whole
 * months, from the first of one to before the first of another, and the other
 * days of the range.  Readers get the customer, usage_rows, cost_cents and
 * unpriced; the rest is NULL.
 */
void
abp_rollup_read_customers(const RollupRange *range, DateADT first, DateADT end,
						  RollupReader reader, void *arg)
{
	static Statement sums = {
		"SELECT c.external_customer_id, c.customer_id, sum(c.usage_rows)::int8, sum(c.cost_cents), sum(c.unpriced)::int8 FROM"
		" (SELECT m.external_customer_id, m.customer_id, m.usage_rows, m.cost_cents, m.unpriced"
		"  FROM aibilling.rollup_by_customer m WHERE m.usage_table = $1 AND m.day >= $4 AND m.day < $5"
		" UNION ALL SELECT d.external_customer_id, d.customer_id, d.usage_rows, d.cost_cents, d.unpriced"
		"  FROM aibilling.rollup_daily d WHERE d.usage_table = $1"
		"  AND (d.day >= $2 AND d.day < $4 OR d.day >= $5 AND d.day <= $3)) c"
		" GROUP BY 1, 2",
		5, {REGCLASSOID, DATEOID, DATEOID, DATEOID, DATEOID}, true,
		.off = {"enable_sort", "jit"}	/* many rows are few customers */
	};
	static const RollupColumn columns[] = {
		ROLLUP_EXTERNAL_CUSTOMER_ID, ROLLUP_CUSTOMER_ID, ROLLUP_USAGE_ROWS, ROLLUP_COST_CENTS, ROLLUP_UNPRICED
	};
	Datum		arguments[5] = {
		ObjectIdGetDatum(range->usage_table), DateADTGetDatum(range->from_day),
		DateADTGetDatum(range->to_day), DateADTGetDatum(first), DateADTGetDatum(end)
	};
	MemoryContext caller = CurrentMemoryContext;
	uint64		n;
	SavedUser	saved;

	n = abp_statement_open(&sums, arguments, NULL, &saved);
	for (uint64 i = 0; i < n; i++)
	{
		Datum		values[NUM_ROLLUP_COLUMNS] = {0};
		bool		nulls[NUM_ROLLUP_COLUMNS];
		MemoryContext spi;

		CHECK_FOR_INTERRUPTS();

		memset(nulls, true, sizeof(nulls));
		for (int c = 0; c < lengthof(columns); c++)
			values[columns[c]] = abp_result_datum(i, c + 1, &nulls[columns[c]]);
		spi = MemoryContextSwitchTo(caller);
		(void) reader(values, nulls, arg);
		MemoryContextSwitchTo(spi);
	}
	abp_statement_close(&saved);
}

/*
 * Read rows of the rollup, by the active snapshot, without SQL: one customer's
 * sums are asked for before each of their calls.
 */
void
abp_rollup_read(const RollupRange *range, RollupReader reader, void *arg)
{
	bool		by_day = range->level == ROLLUP_DAILY && !range->by_customer;
	const char *name = range->level == ROLLUP_DAILY ? "rollup_daily" :
	range->level == ROLLUP_BY_MODEL ? "rollup_by_model" : "rollup_by_customer";
	Relation	rel = table_open(abp_extension_needed(name), AccessShareLock);
	Relation	index = index_open(abp_extension_needed(by_day ? "rollup_daily_day" :
														psprintf("%s_pkey", name)), AccessShareLock);
	ScanKeyData keys[5];
	int			nkeys = 0;
	SysScanDesc scan;
	HeapTuple	tuple;
	bool		more = true;

	ScanKeyInit(&keys[nkeys++], ROLLUP_USAGE_TABLE + 1, BTEqualStrategyNumber, F_OIDEQ,
				ObjectIdGetDatum(range->usage_table));
	if (!by_day)
		ScanKeyInit(&keys[nkeys++], ROLLUP_LEVEL + 1, BTEqualStrategyNumber, F_CHAREQ,
					CharGetDatum(range->level));
	if (range->by_customer || range->level == ROLLUP_BY_MODEL)
		ScanKeyInit(&keys[nkeys++], ROLLUP_CUSTOMER + 1, BTEqualStrategyNumber, F_INT8EQ,
					Int64GetDatum(range->customer));
	ScanKeyInit(&keys[nkeys++], ROLLUP_DAY + 1, BTGreaterEqualStrategyNumber, F_DATE_GE,
				Int32GetDatum(range->from_day));
	ScanKeyInit(&keys[nkeys++], ROLLUP_DAY + 1, BTLessEqualStrategyNumber, F_DATE_LE,
				Int32GetDatum(range->to_day));

	scan = systable_beginscan_ordered(rel, index, GetActiveSnapshot(), nkeys, keys);
	while (more && (tuple = systable_getnext_ordered(scan, ForwardScanDirection)) != NULL)
	{
		Datum		values[NUM_ROLLUP_COLUMNS];
		bool		nulls[NUM_ROLLUP_COLUMNS];

		CHECK_FOR_INTERRUPTS();

		heap_deform_tuple(tuple, RelationGetDescr(rel), values, nulls);
		more = reader(values, nulls, arg);
	}
	systable_endscan_ordered(scan);
	index_close(index, NoLock);
	table_close(rel, NoLock);
}
