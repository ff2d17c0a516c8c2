/*-------------------------------------------------------------------------
 *
 * correct.c
 *	  Rows that correct delivered ones.
 *
 * A row corrects another whose external_id it names in tags.corrects.  Made here
 * or inserted by hand, it counts from when its transaction commits.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/table.h"
#include "catalog/pg_type.h"
#include "common/int.h"
#include "executor/spi.h"
#include "miscadmin.h"
#include "optimizer/optimizer.h"
#include "rewrite/rewriteHandler.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/jsonb.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/numeric.h"
#include "utils/rel.h"

#include "base/json_member.h"
#include "base/numeric_math.h"
#include "base/rights.h"
#include "queue/place.h"
#include "usage/collect.h"
#include "usage/correct.h"
#include "usage/lookup.h"
#include "usage/row.h"
#include "usage/rows.h"

/* How many rows are looked at, or inserted by a statement, at a time. */
#define CORRECT_CHUNK 1000

/* The correcting rows that abp_correct_insert is inserting, by what they correct. */
typedef struct Expected
{
	ExternalIdKey corrects;		/* hash key */
	CorrectionToMake *correction;
} Expected;

static Oid	correcting_table = InvalidOid;
static HTAB *expected_rows = NULL;	/* NULL: it is not inserting */

/*
 * Does a row correct another one?  Then *external_id is that of the other one,
 * in the row's memory.
 */
bool
abp_correct_target(const UsageRow *row, TextView *external_id)
{
	JsonbValue	value;

	if (row->tags_are_null || !abp_json_member(&row->tags->root, "corrects", &value) ||
		value.type != jbvString ||
		value.val.string.len == 0 || value.val.string.len > MAX_EXTERNAL_ID_LEN)
		return false;
	external_id->data = value.val.string.val;
	external_id->len = value.val.string.len;
	return true;
}

/*
 * A row has been inserted or changed, which is to be sent: if it corrects
 * another, write that down.
 */
void
abp_correct_note(Oid usage_table, const UsageRow *row)
{
	TextView	corrects;

	if (abp_correct_target(row, &corrects))
		abp_corrections_put(usage_table, corrects, row);
}

/*
 * A row that waited, with these columns, has been changed to another, or deleted
 * (NULL): what is written down of it follows.
 */
void
abp_correct_changed(Oid usage_table, const Datum *old_values, const bool *old_nulls,
					const UsageRow *row)
{
	UsageRow	old;
	TextView	corrects;

	abp_row_read(old_values, old_nulls, &old);
	if (abp_correct_target(&old, &corrects))
		abp_corrections_remove(usage_table, old.external_id);
	if (row != NULL)
		abp_correct_note(usage_table, row);
}

static bool
note_existing_row(const UsageRow *row, Jsonb *whole, void *arg)
{
	abp_correct_note(*(Oid *) arg, row);
	return true;
}

/* Existing rows that may correct others. */
typedef struct ExistingRows
{
	IdSet		ids;
	MemoryContext context;
} ExistingRows;

static void
gather_ids(SPITupleTable *part, uint64 nrows, void *arg)
{
	ExistingRows *rows = arg;

	abp_rows_query_ids(part, nrows, &rows->ids, rows->context);
}

/*
 * Rows that were in a table before it was attached are to be sent, as far as
 * they were not: write down which of them correct others.
 */
void
abp_correct_note_existing(const UsageTable *table)
{
	ExistingRows rows = {.context = CurrentMemoryContext};
	Oid			usage_table = table->relid;

	abp_rows_query(table,
				   psprintf("SELECT u.id::pg_catalog.int8 FROM %s u"
							" WHERE pg_catalog.jsonb_typeof(u.tags OPERATOR(pg_catalog.->) 'corrects')"
							" OPERATOR(pg_catalog.=) 'string'", table->name),
				   0, NULL, NULL, CORRECT_CHUNK, gather_ids, &rows);
	(void) abp_rows_read(table, &rows.ids, false, note_existing_row, &usage_table);
}

/* --- what a row and its corrections say ------------------------------------- */

/*
 * Does a correction count, because Polar has it or is to get it?  Not if it was
 * taken away with its partition while it waited.
 */
static bool
counts(const UsageTable *table, int64 id)
{
	RowPlace	place;
	IdSet		ids = {0};
	IdSet		existing;

	if (abp_collect_find(table->relid, id, &place))
		return place.where != ROW_NOT_SENT;
	abp_place_find(table->relid, id, table->ledger_from, &place);
	if (place.where != ROW_IN_OUTBOX)
		return place.where != ROW_NOT_SENT;
	abp_idset_add(&ids, id, id, CurrentMemoryContext);
	existing = abp_lookup_existing(table->relid, &ids);
	return existing.nranges > 0;
}

/*
 * What Polar is told of a delivered row, all its corrections counted, also
 * those that wait or are in flight and those that were deleted after their
 * delivery.  A row that was sent without a cost has told nothing.
 */
void
abp_correct_told(const UsageTable *table, const UsageRow *row, CorrectedCost *corrected)
{
	ListCell   *lc;

	corrected->known = true;
	corrected->ncorrections = 0;
	corrected->cost_nanos = row->has_cost_nanos ? row->cost_nanos : 0;
	corrected->cost_cents = row->has_cost_nanos && row->cost_cents != NULL ?
		row->cost_cents : int64_to_numeric(0);

	foreach(lc, abp_corrections_of(table->relid, row->external_id))
	{
		Correction *correction = lfirst(lc);

		if (!counts(table, correction->id))
			continue;
		corrected->ncorrections++;
		if (!correction->has_cost)
		{
			corrected->known = false;
			corrected->unknown_id = correction->id;
			return;
		}
		if (pg_add_s64_overflow(corrected->cost_nanos, correction->cost_nanos, &corrected->cost_nanos))
			ereport(ERROR,
					(errcode(ERRCODE_NUMERIC_VALUE_OUT_OF_RANGE),
					 errmsg("the corrections of usage row " INT64_FORMAT " of %s are beyond the range of cost_nanos",
							row->id, table->name)));
		corrected->cost_cents = numeric_plus(corrected->cost_cents, correction->cost_cents);
	}
}

/* --- inserting corrections ---------------------------------------------------- */

/* The expected correcting row of the row with this external_id, or NULL. */
static CorrectionToMake *
find_expected(const char *corrects, int len)
{
	ExternalIdKey key;
	Expected   *expected;

	if (len > MAX_EXTERNAL_ID_LEN)
		return NULL;
	abp_corrections_key(&key, corrects, len);
	expected = hash_search(expected_rows, &key, HASH_FIND, NULL);
	return expected == NULL ? NULL : expected->correction;
}

/*
 * The price of a row that is being inserted: if it is one that
 * abp_correct_insert makes, its cost_nanos is the difference of two rounded
 * costs, not the rounded difference, so that the sum is right to the nano-dollar.
 */
void
abp_correct_price(Oid usage_table, const UsageRow *row, PricedCost *cost)
{
	TextView	corrects;
	CorrectionToMake *correction;

	if (likely(expected_rows == NULL) || usage_table != correcting_table || !cost->known ||
		!abp_correct_target(row, &corrects))
		return;
	correction = find_expected(corrects.data, corrects.len);
	if (correction != NULL &&
		numeric_equal(cost->cost_cents, correction->cost_cents))
		cost->cost_nanos = correction->cost_nanos;
}

/* Is an index one that another row with the same value in this column breaks? */
static bool
forbids_copies(Relation index, AttrNumber attnum, const UsageColumns *columns)
{
	const Form_pg_index form = index->rd_index;
	bool		holds = false;

	if (!form->indisunique && !form->indisexclusion)
		return false;
	for (int i = 0; i < form->indnkeyatts; i++)
	{
		AttrNumber	key = form->indkey.values[i];

		/* what the key holds of these two is the correcting row's own */
		if (key == columns->attnums[COL_ID] || key == columns->attnums[COL_EXTERNAL_ID])
			return false;
		if (key == attnum)
			holds = true;
	}
	return holds;
}

/*
 * Columns of the user's own that a correcting row has from the row that it
 * corrects: a tenant, say, or what a partition is chosen by.  Not those that the
 * server fills in for each row, and not what must be unique.
 */
static void
append_own_columns(StringInfo list, const char *alias, Relation rel, const UsageColumns *columns)
{
	TupleDesc	desc = RelationGetDescr(rel);
	List	   *indexes = RelationGetIndexList(rel);

	for (int i = 0; i < desc->natts; i++)
	{
		Form_pg_attribute column = TupleDescAttr(desc, i);
		bool		ours = false;
		bool		unique = false;
		ListCell   *lc;

		for (int c = 0; c < NUM_USAGE_COLUMNS; c++)
			ours |= columns->attnums[c] == column->attnum;
		if (ours || column->attisdropped || column->attgenerated != '\0' ||
			column->attidentity != '\0' ||
			(column->atthasdef &&
			 contain_mutable_functions(build_column_default(rel, column->attnum))))
			continue;
		foreach(lc, indexes)
		{
			Relation	index = index_open(lfirst_oid(lc), AccessShareLock);

			unique |= forbids_copies(index, column->attnum, columns);
			index_close(index, AccessShareLock);
		}
		if (!unique)
			appendStringInfo(list, ", %s%s", alias, quote_identifier(NameStr(column->attname)));
	}
}

/* The statement that inserts corrections of rows $1 by USD $2. */
static char *
correcting_statement(const UsageTable *table)
{
	static const char *const copied =
	"%1$soccurred_at, %1$sevent_name, %1$sprovider, %1$ssub_provider, %1$smodel,"
	" %1$sservice_tier, %1$scustomer_id, %1$sexternal_customer_id, %1$smember_id,"
	" %1$sexternal_member_id";
	Relation	rel = table_open(table->relid, AccessShareLock);
	UsageColumns columns;
	char	   *problem;
	StringInfoData sql;

	if (!abp_row_columns_find(rel, &columns, &problem))
		ereport(ERROR,
				(errcode(ERRCODE_DATATYPE_MISMATCH),
				 errmsg("usage table %s: %s", table->name, problem)));
	initStringInfo(&sql);
	appendStringInfo(&sql, "INSERT INTO %s AS t (", table->name);
	appendStringInfo(&sql, copied, "");
	append_own_columns(&sql, "", rel, &columns);
	appendStringInfoString(&sql, ", external_id, provider_cost, tags) SELECT ");
	appendStringInfo(&sql, copied, "u.");
	append_own_columns(&sql, "u.", rel, &columns);
	appendStringInfo(&sql, ", pg_catalog.gen_random_uuid(), c.cost,"
					 " CASE pg_catalog.jsonb_typeof(u.tags) WHEN 'object' THEN u.tags ELSE '{}' END"
					 " OPERATOR(pg_catalog.||) pg_catalog.jsonb_build_object('corrects', u.external_id)"
					 " FROM ROWS FROM (pg_catalog.unnest($1), pg_catalog.unnest($2)) AS c (id, cost)"
					 " JOIN %s u ON u.id OPERATOR(pg_catalog.=) c.id"
					 " RETURNING t.id::pg_catalog.int8, t.cost_nanos::pg_catalog.int8,"
					 " t.cost_cents::pg_catalog.numeric, t.tags OPERATOR(pg_catalog.->>) 'corrects'",
					 table->name);
	table_close(rel, NoLock);
	return sql.data;
}

/* What the statement has returned: each correction once, and to the digit. */
static void
check_made(const UsageTable *table, int nwanted)
{
	for (uint64 i = 0; i < SPI_processed; i++)
	{
		HeapTuple	tuple = SPI_tuptable->vals[i];
		TupleDesc	desc = SPI_tuptable->tupdesc;
		bool		isnull[4];
		Datum		values[4];
		CorrectionToMake *correction = NULL;

		for (int c = 0; c < 4; c++)
			values[c] = SPI_getbinval(tuple, desc, c + 1, &isnull[c]);
		if (!isnull[3])
			correction = find_expected(VARDATA_ANY(DatumGetTextPP(values[3])),
									   VARSIZE_ANY_EXHDR(DatumGetTextPP(values[3])));
		if (correction == NULL || isnull[0] || isnull[1] || isnull[2] ||
			DatumGetInt64(values[1]) != correction->cost_nanos ||
			!numeric_equal(DatumGetNumeric(values[2]), correction->cost_cents))
			ereport(ERROR,
					(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
					 errmsg("a correcting row of %s is not stored as it was inserted", table->name),
					 errhint("Look at the triggers of the table, and at the types of its columns provider_cost and tags.")));
		correction->made = DatumGetInt64(values[0]);
	}
	if (SPI_processed != nwanted)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("%d correcting rows of %s were to be inserted, but " UINT64_FORMAT " were",
						nwanted, table->name, SPI_processed),
				 errhint("Look at the triggers and rules of the table.")));
}

/* USD of a correction: cents with two more decimals. */
static Datum
usd_of(Numeric cents)
{
	return NumericGetDatum(numeric_times(cents, numeric_of_text("0.01")));
}

/*
 * Insert some corrections, each to be found by what it corrects while its
 * triggers run.
 */
static void
insert_chunk(const UsageTable *table, SPIPlanPtr plan, CorrectionToMake *corrections, int n)
{
	Datum	   *ids = palloc(sizeof(Datum) * n);
	Datum	   *costs = palloc(sizeof(Datum) * n);
	Datum		args[2];
	HASHCTL		ctl = {
		.keysize = sizeof(ExternalIdKey),
		.entrysize = sizeof(Expected),
		.hcxt = CurrentMemoryContext
	};

	expected_rows = hash_create("aibilling_polar correcting rows", n, &ctl,
								HASH_ELEM | HASH_BLOBS | HASH_CONTEXT);
	for (int i = 0; i < n; i++)
	{
		ExternalIdKey key;
		Expected   *expected;

		abp_corrections_key(&key, corrections[i].external_id.data, corrections[i].external_id.len);
		expected = hash_search(expected_rows, &key, HASH_ENTER, NULL);
		expected->correction = &corrections[i];
		ids[i] = Int64GetDatum(corrections[i].id);
		costs[i] = usd_of(corrections[i].cost_cents);
	}
	args[0] = PointerGetDatum(construct_array(ids, n, INT8OID, sizeof(int64), FLOAT8PASSBYVAL,
											  TYPALIGN_DOUBLE));
	args[1] = PointerGetDatum(construct_array(costs, n, NUMERICOID, -1, false, TYPALIGN_INT));
	if (SPI_execute_plan(plan, args, NULL, false, 0) < 0)
		elog(ERROR, "unexpected result of inserting correcting rows");
	check_made(table, n);
	hash_destroy(expected_rows);
}

/*
 * Insert correcting rows, as the table's owner, who is who calls: with customer,
 * provider, model, event name, occurred_at and tags of the row corrected, and
 * columns of the user's own.  Who calls holds the locks of the rows corrected.
 * No two of the corrections are of rows with one external_id.
 *
 * Raises what the table's triggers raise, and an error if they store another cost.
 */
void
abp_correct_insert(const UsageTable *table, CorrectionToMake *corrections, int ncorrections)
{
	Oid			argtypes[2] = {INT8ARRAYOID, NUMERICARRAYOID};
	SavedUser	saved;

	abp_become_table_owner(table->owner, &saved);
	abp_set_locally("aibilling_polar.enqueue", "on");	/* it corrects what
														 * Polar has */
	SPI_connect();
	PG_TRY();
	{
		SPIPlanPtr	plan;

		correcting_table = table->relid;
		plan = SPI_prepare(correcting_statement(table), 2, argtypes);
		if (plan == NULL)
			elog(ERROR, "unexpected failure to prepare: %s", SPI_result_code_string(SPI_result));
		for (int done = 0; done < ncorrections; done += CORRECT_CHUNK)
		{
			CHECK_FOR_INTERRUPTS();
			insert_chunk(table, plan, corrections + done, Min(CORRECT_CHUNK, ncorrections - done));
		}
	}
	PG_FINALLY();
	{
		expected_rows = NULL;
		correcting_table = InvalidOid;
	}
	PG_END_TRY();
	SPI_finish();
	abp_restore_user(&saved);
}
