/*-------------------------------------------------------------------------
 *
 * corrections.c
 *	  Which usage rows correct which: aibilling.correction.
 *
 * A row that corrects another names it in tags.corrects.  An index on that would
 * be one on each user's table, and say nothing once delivered rows are deleted;
 * so the triggers write such rows, which are few, down here as well.
 *
 * A row here says that there was a correction, not that it counts: whether Polar
 * has it or is to get it, outbox and ledger tell of its id.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"

#include "base/extension.h"
#include "base/rights.h"
#include "base/statement.h"
#include "base/text_view.h"
#include "base/usage_row.h"
#include "queue/corrections.h"

/* Is there a place for corrections?  Not before the extension is at 1.2. */
static bool
are_kept(void)
{
	return OidIsValid(abp_extension_relation("correction"));
}

/*
 * An external_id as a key.  It must not be longer than MAX_EXTERNAL_ID_LEN.
 */
void
abp_corrections_key(ExternalIdKey *key, const char *external_id, int len)
{
	Assert(len <= MAX_EXTERNAL_ID_LEN);
	memset(key, 0, sizeof(*key));
	memcpy(key->text, external_id, len);
}

/*
 * A row of a usage table corrects the one whose external_id is "corrects", by
 * the cost that it has now.
 */
void
abp_corrections_put(Oid usage_table, TextView corrects, const UsageRow *row)
{
	static Statement put = {
		"INSERT INTO aibilling.correction AS c (usage_table, external_id, corrects, id, cost_nanos, cost_cents)"
		" VALUES ($1, $2, $3, $4, $5, $6)"
		" ON CONFLICT (usage_table, external_id) DO UPDATE SET corrects = excluded.corrects, id = excluded.id,"
		" cost_nanos = excluded.cost_nanos, cost_cents = excluded.cost_cents",
		6, {REGCLASSOID, TEXTOID, TEXTOID, INT8OID, INT8OID, NUMERICOID}
	};
	Datum		values[6];
	char		nulls[] = "      ";

	if (!are_kept())
		return;
	values[0] = ObjectIdGetDatum(usage_table);
	values[1] = text_view_datum(row->external_id);
	values[2] = text_view_datum(corrects);
	values[3] = Int64GetDatum(row->id);
	values[4] = Int64GetDatum(row->cost_nanos);
	values[5] = NumericGetDatum(row->cost_cents);
	if (!row->has_cost_nanos || row->cost_cents == NULL)
		nulls[4] = nulls[5] = 'n';
	(void) abp_statement_run_alone(&put, values, nulls);
}

/*
 * A row that was put here is gone before Polar could get it, or corrects
 * nothing any more.
 */
void
abp_corrections_remove(Oid usage_table, TextView external_id)
{
	static Statement forget = {
		"DELETE FROM aibilling.correction WHERE usage_table = $1 AND external_id = $2",
		2, {REGCLASSOID, TEXTOID}
	};
	Datum		values[2] = {ObjectIdGetDatum(usage_table), text_view_datum(external_id)};

	if (are_kept())
		(void) abp_statement_run_alone(&forget, values, NULL);
}

/*
 * A usage table has been emptied or dropped.
 */
void
abp_corrections_forget(Oid usage_table)
{
	static Statement forget = {
		"DELETE FROM aibilling.correction WHERE usage_table = $1", 1, {REGCLASSOID}
	};
	Datum		values[1] = {ObjectIdGetDatum(usage_table)};

	if (are_kept())
		(void) abp_statement_run_alone(&forget, values, NULL);
}

/*
 * What has been put here of rows that correct the one with this external_id: a
 * list of Correction in the current memory context.  By the latest state of the
 * table, whatever the transaction's snapshot: who holds the lock of the row sees
 * all that others have done to it who held the lock.
 */
List	   *
abp_corrections_of(Oid usage_table, TextView external_id)
{
	static Statement find = {
		"SELECT id, cost_nanos, cost_cents FROM aibilling.correction"
		" WHERE usage_table = $1 AND corrects = $2 ORDER BY id",
		2, {REGCLASSOID, TEXTOID}, true
	};
	Datum		values[2] = {ObjectIdGetDatum(usage_table), text_view_datum(external_id)};
	MemoryContext caller = CurrentMemoryContext;
	List	   *list = NIL;
	uint64		nrows;
	SavedUser	saved;

	if (!are_kept())
		return NIL;
	PushActiveSnapshot(GetLatestSnapshot());
	nrows = abp_statement_open(&find, values, NULL, &saved);
	for (uint64 i = 0; i < nrows; i++)
	{
		MemoryContext spi = MemoryContextSwitchTo(caller);
		Correction *correction = palloc0(sizeof(Correction));
		bool		isnull;
		Datum		value;

		correction->id = abp_result_int64(i, 1, 0);
		correction->cost_nanos = abp_result_int64(i, 2, 0);
		value = abp_result_datum(i, 3, &isnull);
		correction->has_cost = !isnull;
		if (!isnull)
			correction->cost_cents = DatumGetNumericCopy(value);
		list = lappend(list, correction);
		MemoryContextSwitchTo(spi);
	}
	abp_statement_close(&saved);
	PopActiveSnapshot();
	return list;
}

/*
 * The external_ids of a table that rows put here correct, as a hash table of
 * ExternalIdKey in the current memory context; NULL if there are none.
 */
HTAB	   *
abp_corrections_corrected(Oid usage_table)
{
	static Statement find = {
		"SELECT DISTINCT corrects FROM aibilling.correction WHERE usage_table = $1",
		1, {REGCLASSOID}, true
	};
	Datum		values[1] = {ObjectIdGetDatum(usage_table)};
	uint64		nrows;
	HASHCTL		ctl = {
		.keysize = sizeof(ExternalIdKey),
		.entrysize = sizeof(ExternalIdKey),
		.hcxt = CurrentMemoryContext
	};
	HTAB	   *corrected = NULL;
	SavedUser	saved;

	if (!are_kept())
		return NULL;
	nrows = abp_statement_open(&find, values, NULL, &saved);
	for (uint64 i = 0; i < nrows; i++)
	{
		bool		isnull;
		TextView	corrects = text_view_from_datum(abp_result_datum(i, 1, &isnull));
		ExternalIdKey key;

		CHECK_FOR_INTERRUPTS();
		if (corrected == NULL)
			corrected = hash_create("aibilling_polar corrected rows", nrows, &ctl,
									HASH_ELEM | HASH_BLOBS | HASH_CONTEXT);
		abp_corrections_key(&key, corrects.data, corrects.len);
		(void) hash_search(corrected, &key, HASH_ENTER, NULL);
	}
	abp_statement_close(&saved);
	return corrected;
}
