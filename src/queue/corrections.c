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
#include "executor/spi.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"

#include "queue/corrections.h"
#include "queue/outbox.h"

/* A statement that is prepared once a session. */
typedef struct CorrectionStatement
{
	const char *sql;
	int			nargs;
	Oid			argtypes[6];
	SPIPlanPtr	plan;
} CorrectionStatement;

/* Between abp_become_extension_owner and abp_restore_user, in SPI. */
static uint64
execute(CorrectionStatement *statement, Datum *values, const char *nulls, bool read_only)
{
	int			result;

	if (statement->plan == NULL)
	{
		SPIPlanPtr	plan = SPI_prepare(statement->sql, statement->nargs, statement->argtypes);

		if (plan == NULL)
			elog(ERROR, "unexpected failure to prepare: %s", SPI_result_code_string(SPI_result));
		SPI_keepplan(plan);
		statement->plan = plan;
	}
	result = SPI_execute_plan(statement->plan, values, nulls, read_only, 0);
	if (result < 0)
		elog(ERROR, "unexpected failure to execute: %s", SPI_result_code_string(result));
	return SPI_processed;
}

static void
change(CorrectionStatement *statement, Datum *values, const char *nulls)
{
	SavedUser	saved;

	abp_become_extension_owner(&saved);
	SPI_connect();
	(void) execute(statement, values, nulls, false);
	SPI_finish();
	abp_restore_user(&saved);
}

/* Is there a place for corrections?  Not before the extension is at 1.2. */
static bool
are_kept(void)
{
	return OidIsValid(abp_extension_relation("correction"));
}

static Datum
text_of(TextView view)
{
	return PointerGetDatum(cstring_to_text_with_len(view.data, view.len));
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
	static CorrectionStatement put = {
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
	values[1] = text_of(row->external_id);
	values[2] = text_of(corrects);
	values[3] = Int64GetDatum(row->id);
	values[4] = Int64GetDatum(row->cost_nanos);
	values[5] = NumericGetDatum(row->cost_cents);
	if (!row->has_cost_nanos || row->cost_cents == NULL)
		nulls[4] = nulls[5] = 'n';
	change(&put, values, nulls);
}

/*
 * A row that was put here is gone before Polar could get it, or corrects
 * nothing any more.
 */
void
abp_corrections_remove(Oid usage_table, TextView external_id)
{
	static CorrectionStatement forget = {
		"DELETE FROM aibilling.correction WHERE usage_table = $1 AND external_id = $2",
		2, {REGCLASSOID, TEXTOID}
	};
	Datum		values[2] = {ObjectIdGetDatum(usage_table), text_of(external_id)};

	if (are_kept())
		change(&forget, values, NULL);
}

/*
 * A usage table has been emptied or dropped.
 */
void
abp_corrections_forget(Oid usage_table)
{
	static CorrectionStatement forget = {
		"DELETE FROM aibilling.correction WHERE usage_table = $1", 1, {REGCLASSOID}
	};
	Datum		values[1] = {ObjectIdGetDatum(usage_table)};

	if (are_kept())
		change(&forget, values, NULL);
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
	static CorrectionStatement find = {
		"SELECT id, cost_nanos, cost_cents FROM aibilling.correction"
		" WHERE usage_table = $1 AND corrects = $2 ORDER BY id",
		2, {REGCLASSOID, TEXTOID}
	};
	Datum		values[2] = {ObjectIdGetDatum(usage_table), text_of(external_id)};
	MemoryContext caller = CurrentMemoryContext;
	List	   *list = NIL;
	SavedUser	saved;

	if (!are_kept())
		return NIL;
	abp_become_extension_owner(&saved);
	PushActiveSnapshot(GetLatestSnapshot());
	SPI_connect();
	(void) execute(&find, values, NULL, true);
	for (uint64 i = 0; i < SPI_processed; i++)
	{
		HeapTuple	tuple = SPI_tuptable->vals[i];
		TupleDesc	desc = SPI_tuptable->tupdesc;
		MemoryContext spi = MemoryContextSwitchTo(caller);
		Correction *correction = palloc0(sizeof(Correction));
		bool		isnull;
		Datum		value;

		correction->id = DatumGetInt64(SPI_getbinval(tuple, desc, 1, &isnull));
		correction->cost_nanos = DatumGetInt64(SPI_getbinval(tuple, desc, 2, &isnull));
		value = SPI_getbinval(tuple, desc, 3, &isnull);
		correction->has_cost = !isnull;
		if (!isnull)
			correction->cost_cents = DatumGetNumericCopy(value);
		list = lappend(list, correction);
		MemoryContextSwitchTo(spi);
	}
	SPI_finish();
	PopActiveSnapshot();
	abp_restore_user(&saved);
	return list;
}

/*
 * The external_ids of a table that rows put here correct, as a hash table of
 * ExternalIdKey in the current memory context; NULL if there are none.
 */
HTAB	   *
abp_corrections_corrected(Oid usage_table)
{
	static CorrectionStatement find = {
		"SELECT DISTINCT corrects FROM aibilling.correction WHERE usage_table = $1",
		1, {REGCLASSOID}
	};
	Datum		values[1] = {ObjectIdGetDatum(usage_table)};
	HASHCTL		ctl = {
		.keysize = sizeof(ExternalIdKey),
		.entrysize = sizeof(ExternalIdKey),
		.hcxt = CurrentMemoryContext
	};
	HTAB	   *corrected = NULL;
	SavedUser	saved;

	if (!are_kept())
		return NULL;
	abp_become_extension_owner(&saved);
	SPI_connect();
	(void) execute(&find, values, NULL, true);
	for (uint64 i = 0; i < SPI_processed; i++)
	{
		bool		isnull;
		text	   *corrects = DatumGetTextPP(SPI_getbinval(SPI_tuptable->vals[i],
															SPI_tuptable->tupdesc, 1, &isnull));
		ExternalIdKey key;

		CHECK_FOR_INTERRUPTS();
		if (corrected == NULL)
			corrected = hash_create("aibilling corrected rows", SPI_processed, &ctl,
									HASH_ELEM | HASH_BLOBS | HASH_CONTEXT);
		abp_corrections_key(&key, VARDATA_ANY(corrects), VARSIZE_ANY_EXHDR(corrects));
		(void) hash_search(corrected, &key, HASH_ENTER, NULL);
	}
	SPI_finish();
	abp_restore_user(&saved);
	return corrected;
}
