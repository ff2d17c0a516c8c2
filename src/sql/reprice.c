/*-------------------------------------------------------------------------
 *
 * reprice.c
 *	  SQL functions that change what stored rows cost: reprice, correct.
 *
 * A row that Polar does not have gets its new cost; of one that Polar has, the
 * difference is told by a further row.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "fmgr.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/memutils.h"
#include "utils/numeric.h"
#include "utils/snapmgr.h"

#include "base/numeric_math.h"
#include "base/progress.h"
#include "price/price.h"
#include "queue/ledger.h"
#include "queue/outbox.h"
#include "queue/place.h"
#include "queue/wake.h"
#include "usage/attach.h"
#include "usage/collect.h"
#include "usage/correct.h"
#include "usage/fate.h"
#include "usage/priced.h"
#include "usage/rows.h"
#include "usage/triggers.h"

PG_FUNCTION_INFO_V1(abp_sql_reprice);
PG_FUNCTION_INFO_V1(abp_sql_correct);

/* How many rows are looked at a time. */
#define REPRICE_CHUNK 1000

/* How many of the rows that cannot be repriced a warning names. */
#define MAX_KEPT_NAMED 10

/* The least difference, in cents, that Polar takes in no event: it keeps 15 digits. */
#define TOO_MANY_CENTS "99999.99999999995"

typedef struct Repricing
{
	const UsageTable *table;
	int64		looked_at;		/* rows so far */
	bool		dry_run;
	bool		corrects;		/* delivered rows, too */
	HTAB	   *corrected;		/* ExternalIdKey of rows with corrections, or
								 * NULL */
	IdSet		differing;		/* of a chunk: the cost would be another */
	IdSet		changed;
	int64		kept;			/* rows that cannot be repriced */
	StringInfoData kept_names;	/* the first of them, with reasons */
	HTAB	   *seen;			/* ExternalIdKey of rows to be corrected */
	CorrectionToMake *corrections;	/* of "context" */
	int			ncorrections;
	int			max_corrections;
	ReturnSetInfo *result;
	MemoryContext context;
} Repricing;

/* What a row deserves. */
typedef struct NewCost
{
	PricedCost	cost;
	bool		possible;		/* false: it cannot be told, see "problem" */
	char	   *problem;
} NewCost;

/* Is the cost of a row by the prices of now another one, or not to be told? */
static bool
cost_differs(const UsageRow *row, NewCost *new)
{
	TextView	ignored;

	new->possible = abp_fate_cost(row, &new->cost, &new->problem);
	if (!new->possible || new->cost.known != row->has_cost_nanos)
		return true;
	if (!new->cost.known)
		return false;
	if (row->cost_cents == NULL || !numeric_equal(new->cost.cost_cents, row->cost_cents))
		return true;
	/* what a correcting row says in nano-dollars makes a sum right */
	return new->cost.cost_nanos != row->cost_nanos && !abp_correct_target(row, &ignored);
}

/* Then what Polar was told differs from what the row says. */
static bool
has_corrections(const Repricing *repricing, const UsageRow *row)
{
	ExternalIdKey key;

	if (repricing->corrected == NULL || row->external_id.len > MAX_EXTERNAL_ID_LEN)
		return false;
	abp_corrections_key(&key, row->external_id.data, row->external_id.len);
	return hash_search(repricing->corrected, &key, HASH_FIND, NULL) != NULL;
}

/* Which rows are worth a lock. */
static bool
note_difference(const UsageRow *row, Jsonb *whole, void *arg)
{
	Repricing  *repricing = arg;
	NewCost		new;

	if (cost_differs(row, &new) || has_corrections(repricing, row))
		abp_idset_add(&repricing->differing, row->id, row->id, repricing->context);
	return true;
}

/*
 * Count a row that cannot be repriced, and name it if it is one of the first.
 */
static void
note_kept(Repricing *repricing, int64 id, const char *problem)
{
	if (repricing->kept++ < MAX_KEPT_NAMED)
		appendStringInfo(&repricing->kept_names, "%sRow " INT64_FORMAT ": %s.",
						 repricing->kept > 1 ? "\n" : "", id, problem);
}

/* The difference must fit one event. */
static void
check_difference(const UsageTable *table, int64 id, Numeric cents)
{
	if (numeric_compare(numeric_magnitude(cents), numeric_of_text(TOO_MANY_CENTS)) >= 0)
		ereport(ERROR,
				(errcode(ERRCODE_NUMERIC_VALUE_OUT_OF_RANGE),
				 errmsg("the cost of usage row " INT64_FORMAT " of %s would change by %s cents: 1000 USD or more do not fit one event",
						id, table->name, numeric_normalize(cents)),
				 errhint("Split the difference: call aibilling.correct() several times, each time with a total that is less than 1000 USD away from the last.")));
}

/*
 * A delivered row is to be corrected.  Not if another one with its external_id
 * is: Polar has one of them.
 */
static bool
add_correction(Repricing *repricing, const UsageRow *row, const CorrectedCost *told,
			   const PricedCost *cost)
{
	MemoryContext old = MemoryContextSwitchTo(repricing->context);
	ExternalIdKey key;
	bool		seen;
	CorrectionToMake *correction;

	if (repricing->seen == NULL)
	{
		HASHCTL		ctl = {
			.keysize = sizeof(ExternalIdKey),
			.entrysize = sizeof(ExternalIdKey),
			.hcxt = repricing->context
		};

		repricing->seen = hash_create("aibilling_polar rows to correct", 1024, &ctl,
									  HASH_ELEM | HASH_BLOBS | HASH_CONTEXT);
	}
	abp_corrections_key(&key, row->external_id.data, row->external_id.len);
	(void) hash_search(repricing->seen, &key, HASH_ENTER, &seen);
	if (!seen)
	{
		if (repricing->ncorrections == repricing->max_corrections)
		{
			repricing->max_corrections = Max(64, 2 * repricing->max_corrections);
			repricing->corrections = repricing->corrections == NULL ?
				palloc(sizeof(CorrectionToMake) * repricing->max_corrections) :
				repalloc_huge(repricing->corrections,
							  sizeof(CorrectionToMake) * repricing->max_corrections);
		}
		correction = &repricing->corrections[repricing->ncorrections++];
		correction->id = row->id;
		correction->external_id.data = pnstrdup(row->external_id.data, row->external_id.len);
		correction->external_id.len = row->external_id.len;
		correction->cost_cents = numeric_minus(cost->cost_cents, told->cost_cents);
		correction->cost_nanos = cost->cost_nanos - told->cost_nanos;
	}
	MemoryContextSwitchTo(old);
	return !seen;
}

/* One row of the result. */
static void
put_result(Repricing *repricing, int64 id, const char *place, const int64 *old_nanos,
		   const int64 *new_nanos, const char *action)
{
	Datum		values[6];
	bool		nulls[6] = {false};

	values[0] = Int64GetDatum(id);
	values[1] = CStringGetTextDatum(place);
	nulls[2] = old_nanos == NULL;
	if (!nulls[2])
		values[2] = Int64GetDatum(*old_nanos);
	nulls[3] = new_nanos == NULL;
	if (!nulls[3])
		values[3] = Int64GetDatum(*new_nanos);
	nulls[4] = nulls[2] || nulls[3];
	if (!nulls[4])
		values[4] = NumericGetDatum(numeric_minus(int64_to_numeric(*new_nanos),
												  int64_to_numeric(*old_nanos)));
	values[5] = CStringGetTextDatum(action);
	tuplestore_putvalues(repricing->result->setResult, repricing->result->setDesc, values, nulls);
}

/* What becomes of a delivered row: it and its corrections are to say its cost. */
static void
reprice_delivered(Repricing *repricing, const UsageRow *row, NewCost *new)
{
	CorrectedCost told;
	TextView	ignored;
	const char *action = "reported";
	bool		is_correction = abp_correct_target(row, &ignored);

	abp_correct_told(repricing->table, row, &told);
	if (new->possible && !told.known)
	{
		new->possible = false;
		new->problem = psprintf("row " INT64_FORMAT ", which corrects it, has no cost yet",
								told.unknown_id);
	}
	if (!new->possible)
	{
		note_kept(repricing, row->id, new->problem);
		action = "kept";
	}
	else if (told.ncorrections > 0 || row->has_cost_nanos ? new->cost.known &&
			 numeric_equal(new->cost.cost_cents, told.cost_cents) : !new->cost.known)
		return;
	else if (new->cost.known && repricing->corrects && !is_correction &&
			 add_correction(repricing, row, &told, &new->cost))
		action = repricing->dry_run ? "would correct" : "corrected";

	put_result(repricing, row->id, "delivered",
			   told.known && (told.ncorrections > 0 || row->has_cost_nanos) ? &told.cost_nanos : NULL,
			   new->possible && new->cost.known ? &new->cost.cost_nanos : NULL, action);
}

/* Report a row whose cost differs, and note whether it can be changed. */
static bool
reprice_row(const UsageRow *row, Jsonb *whole, void *arg)
{
	Repricing  *repricing = arg;
	NewCost		new;
	RowPlace	place;
	const char *place_name;
	bool		may_change;
	bool		differs = cost_differs(row, &new);

	if (!differs && !has_corrections(repricing, row))
		return true;

	if (!abp_collect_find(repricing->table->relid, row->id, &place))
		abp_place_find(repricing->table->relid, row->id, repricing->table->ledger_from, &place);
	if (place.where == ROW_DELIVERED)
	{
		reprice_delivered(repricing, row, &new);
		return true;
	}
	if (!differs)
		return true;
	if (!new.possible)
	{
		/* The outbox tells of a row that has never had a cost. */
		if (!row->has_cost_nanos && place.where == ROW_IN_OUTBOX && place.state == OUTBOX_REJECTED)
			return true;
		note_kept(repricing, row->id, new.problem);
	}
	may_change = new.possible &&
		(place.where == ROW_NOT_SENT ||
		 (place.where == ROW_IN_OUTBOX && !place.outcome_unknown &&
		  !abp_ledger_has(repricing->table->relid, row->id, repricing->table->ledger_from)));
	place_name = place.where == ROW_SENDING ? "sending" :
		place.where == ROW_NOT_SENT ? "not_sent" :
		place.state == OUTBOX_UNPRICED ? "unpriced" :
		place.state == OUTBOX_REJECTED ? "rejected" : "pending";

	put_result(repricing, row->id, place_name, row->has_cost_nanos ? &row->cost_nanos : NULL,
			   new.possible && new.cost.known ? &new.cost.cost_nanos : NULL,
			   !new.possible ? "kept" :
			   !may_change ? "reported" :
			   repricing->dry_run ? "would change" : "changed");

	if (may_change && !repricing->dry_run)
		abp_idset_add(&repricing->changed, row->id, row->id, repricing->context);
	return true;
}

/* Look at rows of these ids. */
static void
look_at_part(SPITupleTable *part, uint64 nrows, void *arg)
{
	Repricing  *repricing = arg;
	const UsageTable *table = repricing->table;
	IdSet		ids = {0};

	abp_progress_report(table->relid, "rows", repricing->looked_at, 0);
	repricing->looked_at += nrows;
	abp_rows_query_ids(part, nrows, &ids, CurrentMemoryContext);
	if (!repricing->dry_run)
	{
		/* Who has a row's lock can rely on where it is: it is not sent. */
		abp_rows_read(table, &ids, false, note_difference, repricing);
		if (repricing->differing.nranges == 0)
			return;
		ids = abp_rows_lock(table, &repricing->differing, true);
		abp_idset_free(&repricing->differing);
	}
	abp_rows_read(table, &ids, false, reprice_row, repricing);
}

/* Look at all rows from one time to another. */
static void
look_at_rows(Repricing *repricing, Datum from_time, Datum to_time)
{
	Oid			argtypes[2] = {TIMESTAMPTZOID, TIMESTAMPTZOID};
	Datum		args[2] = {from_time, to_time};

	abp_rows_query(repricing->table,
				   psprintf("SELECT id::pg_catalog.int8 FROM %s"
							" WHERE occurred_at >= $1 AND occurred_at < $2", repricing->table->name),
				   2, argtypes, args, REPRICE_CHUNK, look_at_part, repricing);
}

/* Each correction fits an event, and all of them fit what the caller expects. */
static void
check_corrections(const Repricing *repricing, Numeric max_total)
{
	Numeric		total = int64_to_numeric(0);

	for (int i = 0; i < repricing->ncorrections; i++)
	{
		const CorrectionToMake *correction = &repricing->corrections[i];

		CHECK_FOR_INTERRUPTS();
		check_difference(repricing->table, correction->id, correction->cost_cents);
		total = numeric_plus(total, numeric_magnitude(correction->cost_cents));
	}
	if (max_total != NULL)
	{
		Numeric		limit = numeric_times(max_total, int64_to_numeric(100));

		if (numeric_compare(limit, total) < 0)
			ereport(ERROR,
					(errcode(ERRCODE_DATA_EXCEPTION),
					 errmsg("corrections of %d usage rows of %s would come to %s cents, more than max_total, %s USD",
							repricing->ncorrections, repricing->table->name,
							numeric_normalize(total), numeric_normalize(max_total)),
					 errdetail("Differences are added up without their signs.  Nothing has been changed."),
					 errhint("Look at what dry_run returns, and allow more or a shorter time.")));
	}
}

/* What is given for max_total: NULL, or an amount that can be compared with. */
static Numeric
check_max_total(FunctionCallInfo fcinfo, bool corrects)
{
	Numeric		max_total;

	if (PG_NARGS() <= 5 || PG_ARGISNULL(5))
		return NULL;
	max_total = PG_GETARG_NUMERIC(5);
	if (!corrects)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("max_total limits corrections, which are not asked for"),
				 errhint("Set corrections to true.")));
	if (numeric_is_nan(max_total) || numeric_signum(max_total) < 0)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("max_total must be a number and not negative, but is %s",
						numeric_normalize(max_total))));
	return max_total;
}

/*
 * aibilling.reprice(usage, from_time, to_time, dry_run, corrections, max_total):
 * recompute costs.  One row per cost that differs; rows in flight are reported only,
 * delivered ones, too, unless "corrections" has each corrected by a further row.
 * A row whose cost cannot be told keeps what it has, and keeps no other from
 * being repriced.
 */
Datum
abp_sql_reprice(PG_FUNCTION_ARGS)
{
	Repricing	repricing = {NULL};
	IdSet		own;
	UsageTable *table;
	Numeric		max_total;

	InitMaterializedSRF(fcinfo, 0);
	for (int i = 0; i < Min(PG_NARGS(), 5); i++)
	{
		if (PG_ARGISNULL(i))
			return (Datum) 0;
	}
	abp_attach_check_owner(PG_GETARG_OID(0));
	table = abp_attach_needed(PG_GETARG_OID(0));
	repricing.table = table;
	repricing.dry_run = PG_GETARG_BOOL(3);
	repricing.corrects = PG_NARGS() > 4 && PG_GETARG_BOOL(4);
	repricing.result = (ReturnSetInfo *) fcinfo->resultinfo;
	repricing.context = CurrentMemoryContext;
	initStringInfo(&repricing.kept_names);
	max_total = check_max_total(fcinfo, repricing.corrects);

	repricing.corrected = abp_corrections_corrected(table->relid);
	look_at_rows(&repricing, PG_GETARG_DATUM(1), PG_GETARG_DATUM(2));
	abp_progress_end();

	if (!repricing.dry_run)
		check_corrections(&repricing, max_total);
	if (repricing.changed.nranges > 0)
	{
		abp_priced_reprice(table, &repricing.changed, false);
		own = abp_collect_changes(table->relid);
		repricing.changed = abp_idset_subtract(&repricing.changed, &own);
		(void) abp_outbox_make_ready(table->relid, OUTBOX_UNPRICED, &repricing.changed);
		abp_wake_at_commit();
	}
	if (!repricing.dry_run && repricing.ncorrections > 0)
		abp_correct_insert(table, repricing.corrections, repricing.ncorrections);
	if (repricing.kept > 0)
		ereport(WARNING,
				(errcode(ERRCODE_WARNING),
				 errmsg_plural(INT64_FORMAT " usage row of %s cannot be repriced and stays as it is",
							   INT64_FORMAT " usage rows of %s cannot be repriced and stay as they are",
							   repricing.kept, repricing.kept, table->name),
				 errdetail_internal("%s%s", repricing.kept_names.data,
									repricing.kept > MAX_KEPT_NAMED ? "\nAnd others." : ""),
				 errhint("Correct the prices or the rows, and call aibilling.reprice() again; such rows have the action \"kept\".")));
	return (Datum) 0;
}

/* --- correct --------------------------------------------------------------------- */

/* Only a row that Polar has is corrected by another. */
static void
check_delivered(const UsageTable *table, int64 id)
{
	RowPlace	place;

	if (!abp_collect_find(table->relid, id, &place))
		abp_place_find(table->relid, id, table->ledger_from, &place);
	if (place.where == ROW_DELIVERED)
		return;
	if (place.where == ROW_NOT_SENT)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("usage row " INT64_FORMAT " of %s was never sent", id, table->name),
				 errhint("Change it with UPDATE.")));
	if (place.where == ROW_IN_OUTBOX && !place.outcome_unknown)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("usage row " INT64_FORMAT " of %s is not delivered yet", id, table->name),
				 errhint("Change it with UPDATE, or delete it.")));
	ereport(ERROR,
			(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
			 errmsg("usage row " INT64_FORMAT " of %s may be delivered or not", id, table->name),
			 errdetail("It is on its way, or a request with it got no answer that says whether Polar has stored it."),
			 errhint("Correct it when it is delivered; CALL aibilling.sync() waits for that.")));
}

typedef struct Correcting
{
	const UsageTable *table;
	const PricedCost *wanted;
	bool		found;
	bool		needed;			/* the row and its corrections say another
								 * cost */
	CorrectionToMake correction;
	MemoryContext context;
} Correcting;

/* By how much a row and its corrections miss the cost that is wanted. */
static bool
compare_with_wanted(const UsageRow *row, Jsonb *whole, void *arg)
{
	Correcting *correcting = arg;
	CorrectedCost told;
	TextView	corrects;
	MemoryContext old;

	correcting->found = true;
	if (abp_correct_target(row, &corrects))
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("usage row " INT64_FORMAT " of %s is itself a correction, of the row with external_id \"%.*s\"",
						row->id, correcting->table->name, corrects.len, corrects.data),
				 errhint("Correct that row again: what was corrected before counts.")));

	abp_correct_told(correcting->table, row, &told);
	if (!told.known)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("usage row " INT64_FORMAT " of %s, which corrects row " INT64_FORMAT ", has no cost yet",
						told.unknown_id, correcting->table->name, row->id),
				 errhint("Enter its price with aibilling.set_price(), or delete it if it still waits.")));

	old = MemoryContextSwitchTo(correcting->context);
	correcting->correction.id = row->id;
	correcting->correction.external_id.data = pnstrdup(row->external_id.data, row->external_id.len);
	correcting->correction.external_id.len = row->external_id.len;
	correcting->correction.cost_cents = numeric_minus(correcting->wanted->cost_cents, told.cost_cents);
	correcting->correction.cost_nanos = correcting->wanted->cost_nanos - told.cost_nanos;
	correcting->needed = !numeric_equal(correcting->wanted->cost_cents, told.cost_cents);
	MemoryContextSwitchTo(old);
	return true;
}

/*
 * aibilling.correct(usage, id, provider_cost): insert the row that makes what
 * Polar is told of a delivered row this amount of USD.  Returns its id, NULL if
 * that is what Polar is told already.
 */
Datum
abp_sql_correct(PG_FUNCTION_ARGS)
{
	Oid			relid = PG_GETARG_OID(0);
	int64		id = PG_GETARG_INT64(1);
	UsageCounts nothing = {{0}};
	PriceRequest request = {.counts = &nothing,.provider_cost = PG_GETARG_NUMERIC(2)};
	PricedCost	wanted;
	Correcting	correcting = {.wanted = &wanted,.context = CurrentMemoryContext};
	IdSet		ids = {0};
	UsageTable *table;

	abp_attach_check_owner(relid);
	table = abp_attach_needed(relid);
	correcting.table = table;
	(void) abp_price_compute(&request, false, &wanted);

	abp_idset_add(&ids, id, id, CurrentMemoryContext);
	ids = abp_rows_lock(table, &ids, true);
	if (ids.nranges > 0)
	{
		check_delivered(table, id);
		PushActiveSnapshot(GetLatestSnapshot());
		(void) abp_rows_read(table, &ids, false, compare_with_wanted, &correcting);
		PopActiveSnapshot();
	}
	if (!correcting.found)
		ereport(ERROR,
				(errcode(ERRCODE_NO_DATA_FOUND),
				 errmsg("%s has no usage row " INT64_FORMAT, table->name, id)));
	if (!correcting.needed)
		PG_RETURN_NULL();
	check_difference(table, id, correcting.correction.cost_cents);
	abp_correct_insert(table, &correcting.correction, 1);
	PG_RETURN_INT64(correcting.correction.made);
}
