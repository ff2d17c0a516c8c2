/*-------------------------------------------------------------------------
 *
 * shares.c
 *	  What each delivery's rows add up to: the table aibilling.share.
 *
 * A delivery's share of the sums is written when the delivery enters the
 * ledger, and counts as long as the ledger has it as being sent or delivered.
 * Once it is delivered its rows are added to the rollup, and it is deleted with
 * the last of them.  A share without sums stands for the rows themselves: those of
 * a delivery that is being divided, or that an older version has made.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/datum.h"
#include "utils/memutils.h"

#include "base/idset.h"
#include "base/rights.h"
#include "base/statement.h"
#include "queue/shares.h"

/*
 * Write what a delivery's rows add up to (NULL: not known), but for those that
 * other deliveries count ("counted"; NULL: not known).
 */
void
abp_shares_write(int64 delivery, Oid usage_table, bytea *sums, const IdSet *counted)
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
abp_shares_set_sums(int64 delivery, bytea *sums)
{
	static Statement set = {
		"UPDATE aibilling.share SET sums = $2 WHERE delivery = $1", 2, {INT8OID, BYTEAOID}
	};
	Datum		values[2] = {Int64GetDatum(delivery), PointerGetDatum(sums)};

	(void) abp_statement_run_alone(&set, values, NULL);
}

/*
 * So many rows of a share are in the rollup now.
 */
void
abp_shares_set_folded(int64 delivery, int rows)
{
	static Statement set = {
		"UPDATE aibilling.share SET folded_rows = $2 WHERE delivery = $1", 2, {INT8OID, INT4OID}
	};
	Datum		values[2] = {Int64GetDatum(delivery), Int32GetDatum(rows)};

	(void) abp_statement_run_alone(&set, values, NULL);
}

/*
 * Shares of deliveries count no more, or are in the rollup.
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
abp_shares_load_counted(int64 delivery, IdSet *counted)
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
			share->sums = (bytea *) DatumGetPointer(datumCopy(sums, false, -1));
		share->counted = abp_result_idset(i, 4, caller);
		(void) abp_result_datum(i, 4, &isnull);
		share->knows_counted = !isnull;
		if (share->sums == NULL)
			share->ids = abp_result_idset(i, 5, caller);
		share->delivered = strcmp(TextDatumGetCString(abp_result_datum(i, 6, &isnull)), "delivered") == 0;
		share->folded_rows = (int) abp_result_int64(i, 7, 0);
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
		"SELECT s.delivery, s.usage_table, s.sums, s.counted, d.usage_ids, coalesce(d.state, 'delivered'), s.folded_rows::int8"
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
		"SELECT s.delivery, s.usage_table, s.sums, s.counted, d.usage_ids, 'delivered'::text, s.folded_rows::int8"
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
abp_shares_first_open(void)
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
abp_shares_counted(Oid usage_table, IdSet *ids, int64 ledger_from)
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

/*
 * A table is gone: so is what its rows added up to.
 */
void
abp_shares_forget(Oid usage_table)
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
