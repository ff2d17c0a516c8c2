/*-------------------------------------------------------------------------
 *
 * rollup_table.c
 *	  What delivered rows add up to: the table aibilling.rollup.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/table.h"
#include "catalog/pg_type.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"

#include "base/extension.h"
#include "base/rights.h"
#include "base/statement.h"
#include "compat.h"
#include "queue/rollup_table.h"

/*
 * Add sums to the rollup: arrays of as many elements, in the order of
 * RollupColumn.
 */
void
abp_rollup_table_add(Datum *columns)
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
abp_rollup_table_read_customers(const RollupRange *range, DateADT first, DateADT end,
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
abp_rollup_table_read(const RollupRange *range, RollupReader reader, void *arg)
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
