/*-------------------------------------------------------------------------
 *
 * fate.c
 *	  What a row deserves: to be sent, or to wait for its time, a price, or somebody to fix it.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "fmgr.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/jsonb.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/timestamp.h"

#include "base/text_view.h"
#include "base/usage_row.h"
#include "polar/event.h"
#include "polar/limits.h"
#include "polar/server.h"
#include "price/cards.h"
#include "price/cost.h"
#include "price/normalize.h"
#include "price/price.h"
#include "queue/entry.h"
#include "queue/outbox.h"
#include "usage/fate.h"
#include "usage/row.h"

/* Columns that no row does without. */
static const UsageColumn needed_columns[] = {
	COL_ID, COL_EXTERNAL_ID, COL_OCCURRED_AT
};

/* Why a row is not one of usage: the words of an error. */
typedef struct RowProblem
{
	UsageColumn column;
	int			sqlerrcode;
	char	   *message;
	const char *hint;			/* or NULL */
} RowProblem;

/* Say which column breaks which rule. */
static bool
breaks_rule(UsageColumn column, const char *rule, RowProblem *problem)
{
	problem->column = column;
	problem->sqlerrcode = ERRCODE_CHECK_VIOLATION;
	problem->message = psprintf("column \"%s\" of a usage row %s",
								abp_row_columns[column].name, rule);
	problem->hint = NULL;
	return false;
}

/*
 * Is the row free of the programmer's mistakes that a table without our
 * constraints lets pass?  Counts are checked where they are priced.
 */
static bool
row_is_sound(const UsageRow *row, RowProblem *problem)
{
	if (row->external_id.data == NULL)
		return breaks_rule(COL_EXTERNAL_ID, "must not be null", problem);
	if (row->external_id.len < 1 || row->external_id.len > MAX_ID_BYTES)
		return breaks_rule(COL_EXTERNAL_ID, "must have 1 to 255 bytes", problem);
	if (TIMESTAMP_NOT_FINITE(row->occurred_at) ||
		row->occurred_at < -INT64CONST(63082281600000000))
		return breaks_rule(COL_OCCURRED_AT, "must be a finite time after the year 0", problem);
	if (!JB_ROOT_IS_OBJECT(row->tags))
		return breaks_rule(COL_TAGS, "must be a JSON object", problem);
	if (row->counts.units != NULL && !JB_ROOT_IS_OBJECT(row->counts.units))
		return breaks_rule(COL_UNITS, "must be a JSON object", problem);
	if (row->raw_usage != NULL && row->usage_format.data == NULL)
		return breaks_rule(COL_USAGE_FORMAT, "must name the format of raw_usage", problem);
	if (row->usage_format.data != NULL && !abp_normalize_knows_format(row->usage_format))
	{
		problem->column = COL_USAGE_FORMAT;
		problem->sqlerrcode = ERRCODE_INVALID_PARAMETER_VALUE;
		problem->message = psprintf("unknown usage format \"%.*s\"",
									row->usage_format.len, row->usage_format.data);
		problem->hint = abp_normalize_format_hint(row->usage_format);
		return false;
	}
	return true;
}

/*
 * Raise an error for a row that is not sound, with table and column as
 * PostgreSQL's own have them.
 */
void
abp_fate_check(Relation rel, const UsageRow *row, const bool *nulls)
{
	RowProblem	problem;

	for (int i = 0; i < lengthof(needed_columns); i++)
	{
		const char *name = abp_row_columns[needed_columns[i]].name;

		if (nulls[needed_columns[i]])
			ereport(ERROR,
					(errcode(ERRCODE_NOT_NULL_VIOLATION),
					 errmsg("null value in column \"%s\" of usage table \"%s\"",
							name, RelationGetRelationName(rel)),
					 rel->rd_rel->relispartition ?
					 errhint("Give a value, or leave the column out: a partition does not take a default in place of NULL where it was chosen by that.") :
					 errhint("Give a value, or the column a default."),
					 errtablecolname(rel, name)));
	}
	if (row_is_sound(row, &problem))
		return;
	ereport(ERROR,
			(errcode(problem.sqlerrcode),
			 errmsg_internal("%s", problem.message),
			 problem.hint != NULL ? errhint("%s", problem.hint) : 0,
			 errtablecolname(rel, abp_row_columns[problem.column].name)));
}

/*
 * Can the columns of the row's table hold what its raw usage object is about
 * to fill in?  If not, says so: a provider's surprise costs no INSERT.
 */
static bool
usage_fits(const UsageRow *row, const NormalizedUsage *usage, StringInfo reason)
{
	const UsageColumns *columns = row->columns;
	UsageColumn filled[NUM_USAGE_COUNTS + 4];
	Datum		values[NUM_USAGE_COUNTS + 4];
	int			n = 0;

	for (int i = 0; i < NUM_USAGE_COUNTS; i++)
	{
		if (row->counts.given[i] || !usage->counts.given[i])
			continue;
		filled[n] = COL_FIRST_COUNT + i;
		values[n++] = Int64GetDatum(usage->counts.value[i]);
	}
	if (row->provider_cost == NULL && usage->provider_cost != NULL)
	{
		filled[n] = COL_PROVIDER_COST;
		values[n++] = NumericGetDatum(usage->provider_cost);
	}
	if (abp_cards_tier_is_standard(row->service_tier) && usage->service_tier != NULL)
	{
		filled[n] = COL_SERVICE_TIER;
		values[n++] = CStringGetTextDatum(usage->service_tier);
	}
	if (row->model.data == NULL && usage->model != NULL)
	{
		filled[n] = COL_MODEL;
		values[n++] = CStringGetTextDatum(usage->model);
	}
	if (row->generation_id.data == NULL && usage->generation_id != NULL)
	{
		filled[n] = COL_GENERATION_ID;
		values[n++] = CStringGetTextDatum(usage->generation_id);
	}

	for (int i = 0; i < n; i++)
	{
		if (columns->plain[filled[i]] || abp_row_value_fits(columns, filled[i], values[i]))
			continue;
		appendStringInfo(reason, "its %s does not fit the column's type %s",
						 abp_row_columns[filled[i]].name,
						 format_type_with_typemod(columns->stored[filled[i]],
												  columns->typmods[filled[i]]));
		return false;
	}
	return true;
}

/*
 * Fill a row's columns from its raw usage object.  Counts given beside it
 * must agree.  Returns false, with the reason, if the object cannot be used;
 * the row is unchanged then.  Where the cost is reported, nothing of that
 * keeps the object from being used: counts that make no sense are left out,
 * and *doubt, palloc'd, says why; otherwise it is NULL.
 */
bool
abp_fate_normalize(UsageRow *row, StringInfo reason, char **doubt)
{
	UsageCall	call = {row->model, row->provider_cost != NULL};
	NormalizedUsage usage = {{{0}}};
	UsageCounts given = row->counts;
	CountsProblem problem;

	*doubt = NULL;
	if (!abp_normalize_usage(row->usage_format, row->raw_usage, &call, &usage, reason))
		return false;
	*doubt = usage.doubt;
	if (row->columns != NULL && !row->columns->all_plain && !usage_fits(row, &usage, reason))
		return false;

	for (int i = 0; i < NUM_USAGE_COUNTS; i++)
	{
		char	   *words;

		if (!row->counts.given[i] || !usage.counts.given[i] ||
			row->counts.value[i] == usage.counts.value[i])
			continue;
		words = psprintf("%s is " INT64_FORMAT " but raw_usage says " INT64_FORMAT,
						 abp_row_columns[COL_FIRST_COUNT + i].name,
						 row->counts.value[i], usage.counts.value[i]);
		if (row->provider_cost == NULL && usage.provider_cost == NULL)
		{
			appendStringInfoString(reason, words);
			return false;
		}
		*doubt = *doubt ? psprintf("%s; %s", *doubt, words) : words;
	}

	for (int i = 0; i < NUM_USAGE_COUNTS; i++)
	{
		if (!row->counts.given[i] && usage.counts.given[i])
		{
			row->counts.given[i] = true;
			row->counts.value[i] = usage.counts.value[i];
		}
	}
	if (row->counts.units == NULL)
		row->counts.units = usage.counts.units;
	else if (usage.counts.units != NULL)
		row->counts.units = DatumGetJsonbP(DirectFunctionCall2(jsonb_concat,
															   JsonbPGetDatum(usage.counts.units),
															   JsonbPGetDatum(row->counts.units)));
	if (row->provider_cost == NULL)
		row->provider_cost = usage.provider_cost;
	/* What was given beside the object holds where the two make no sense. */
	if (*doubt != NULL && !abp_cost_consistent(&row->counts, &problem))
		row->counts = given;
	if (abp_cards_tier_is_standard(row->service_tier) && usage.service_tier != NULL)
		row->service_tier = text_view_of(usage.service_tier);
	if (row->model.data == NULL && usage.model != NULL)
		row->model = text_view_of(usage.model);
	if (row->generation_id.data == NULL && usage.generation_id != NULL)
		row->generation_id = text_view_of(usage.generation_id);
	return true;
}

/* What a row whose raw usage object, if any, has been read asks of prices. */
PriceRequest
abp_fate_price_request(const UsageRow *row)
{
	PriceRequest request = {
		.provider = row->provider,
		.model = row->model,
		.service_tier = row->service_tier,
		.at = row->occurred_at,
		.counts = &row->counts,
		.provider_cost = row->provider_cost,
		.from_reply = row->raw_usage != NULL
	};

	return request;
}

/*
 * Fill in what can be of a row, in its columns and its cost.  Returns whether its
 * raw usage object was read; what is wrong with the row is for the outbox to say.
 */
bool
abp_fate_price_if_sound(UsageRow *row, PricedCost *cost)
{
	RowProblem	problem;
	CountsProblem counts_problem;
	char	   *amount_problem;
	bool		normalized = false;

	*cost = (PricedCost)
	{
		COST_INCOMPLETE
	};
	if (!row_is_sound(row, &problem))
		return false;
	if (row->raw_usage != NULL)
	{
		StringInfoData reason;
		char	   *doubt;

		initStringInfo(&reason);
		if (!abp_fate_normalize(row, &reason, &doubt))
			return false;
		normalized = true;
	}
	if (abp_cost_consistent(&row->counts, &counts_problem) &&
		(row->provider_cost == NULL || abp_cost_finite(row->provider_cost, &amount_problem)))
	{
		PriceRequest request = abp_fate_price_request(row);

		if (!abp_price_compute(&request, true, cost))
			*cost = (PricedCost)
		{
			COST_INCOMPLETE
		};
	}
	return normalized;
}

/*
 * What keeps a stored row from being billed whatever the prices are, in the
 * words of its outbox entry, palloc'd; NULL if nothing does.  With read_raw,
 * *filled is the row with the columns of its raw usage object filled in;
 * otherwise it is the row as it is.
 *
 * An INSERT refuses nearly all of this.  It is found in rows that were there
 * before their table was attached.
 */
static char *
find_fault(const UsageRow *row, bool read_raw, UsageRow *filled)
{
	RowProblem	problem;
	CountsProblem counts_problem;
	char	   *amount_problem;

	*filled = *row;
	if (!row_is_sound(row, &problem))
		return problem.message;
	if (read_raw && row->raw_usage != NULL)
	{
		StringInfoData reason;
		char	   *doubt;

		initStringInfo(&reason);
		if (!abp_fate_normalize(filled, &reason, &doubt))
			return psprintf("raw_usage: %s", reason.data);
		pfree(reason.data);
	}
	if (!abp_cost_consistent(&filled->counts, &counts_problem))
		return counts_problem.message;
	if (filled->provider_cost != NULL &&
		!abp_cost_finite(filled->provider_cost, &amount_problem))
		return amount_problem;
	return NULL;
}

/*
 * What is wrong with the raw usage object of a row whose cost is reported, in
 * words, palloc'd; NULL if nothing is.
 */
char	   *
abp_fate_doubt(const UsageRow *row)
{
	UsageRow	filled = *row;
	StringInfoData reason;
	char	   *doubt = NULL;

	if (row->raw_usage == NULL || row->provider_cost == NULL ||
		!abp_normalize_knows_format(row->usage_format))
		return NULL;
	initStringInfo(&reason);
	return abp_fate_normalize(&filled, &reason, &doubt) ? doubt : NULL;
}

/* Why a row waits that costs more than can be stored, palloc'd. */
static char *
cost_beyond_range(const UsageRow *row)
{
	return psprintf("no possible price: the cost is beyond the range of cost_nanos (provider \"%.*s\", model \"%.*s\")",
					row->provider.len, row->provider.data ? row->provider.data : "",
					row->model.len, row->model.data ? row->model.data : "");
}

/*
 * What keeps a row without fault from being priced, in the words of its
 * outbox entry, palloc'd; NULL if nothing does.
 *
 * A cost beyond cost_nanos is an error when the row is inserted.  When it
 * comes of a price that has come since, that price is a mistake: the row
 * waits for another one, and keeps nobody else from being sent.
 */
static char *
missing_price(const UsageRow *row)
{
	PriceRequest request = abp_fate_price_request(row);
	ExactCost	cost;
	CostStatus	status;
	char	   *missing = NULL;
	int64		nanos;

	status = abp_price_cost(&request, &cost, &missing);
	if (status == COST_UNPRICED || status == COST_INCOMPLETE)
		return missing;
	if (!abp_cost_fits_nanos(&cost, &nanos))
		return cost_beyond_range(row);
	return NULL;
}

/*
 * What keeps a row without a cost from having one: a fault of its own, for
 * somebody to fix, or the lack of a price.  OUTBOX_READY if nothing does.
 */
void
abp_fate_by_price(const UsageRow *row, RowState *fate)
{
	UsageRow	filled;

	fate->state = OUTBOX_READY;
	fate->not_before = DT_NOBEGIN;
	fate->error = NULL;
	fate->outcome_unknown = false;
	if (row->has_cost_nanos)
		return;

	fate->error = find_fault(row, true, &filled);
	if (fate->error != NULL)
		fate->state = OUTBOX_REJECTED;
	else
	{
		fate->error = missing_price(&filled);
		if (fate->error != NULL)
			fate->state = OUTBOX_UNPRICED;
	}
	abp_shorten(fate->error);
}

/*
 * The cost of a stored row by the prices of now.  Returns false, with the
 * reason, palloc'd, if the row has a fault or the cost is beyond cost_nanos.
 */
bool
abp_fate_cost(const UsageRow *row, PricedCost *cost, char **problem)
{
	UsageRow	filled;
	PriceRequest request;

	*problem = find_fault(row, true, &filled);
	if (*problem != NULL)
		return false;
	request = abp_fate_price_request(&filled);
	if (!abp_price_compute(&request, true, cost))
	{
		*problem = cost_beyond_range(&filled);
		return false;
	}
	return true;
}

/* Would Polar refuse the row's event?  Then says why, palloc'd; else NULL. */
static char *
refusal(const UsageRow *row, const ServerOptions *server)
{
	static StringInfoData reason = {NULL};

	if (reason.data == NULL)
	{
		MemoryContext old = MemoryContextSwitchTo(TopMemoryContext);

		initStringInfo(&reason);
		MemoryContextSwitchTo(old);
	}
	resetStringInfo(&reason);
	return abp_event_check(row, &server->format, &reason) ? NULL : pstrdup(reason.data);
}

/* Which fate has a row without fault, of which Polar takes the event? */
static void
decide(const UsageRow *row, const UsageRow *filled, const ServerOptions *server, RowState *fate)
{
	if (!row->has_cost_nanos && !server->send_unpriced)
	{
		char	   *missing = missing_price(filled);

		fate->state = OUTBOX_UNPRICED;
		fate->error = missing != NULL ? missing :
			pstrdup("a price has arrived; the row waits for its cost");
	}
	else if (row->occurred_at > GetCurrentTransactionStartTimestamp() &&
			 row->occurred_at > GetCurrentTimestamp())
	{
		/* in whole seconds, so that rows share an entry */
		fate->state = OUTBOX_WAITING;
		fate->not_before = row->occurred_at - row->occurred_at % USECS_PER_SEC + USECS_PER_SEC;
	}
}

/* The fate of a row; "event": whether Polar would refuse it, too. */
static void
find_fate(const UsageRow *row, const ServerOptions *server, bool event, RowState *fate)
{
	UsageRow	filled;

	*fate = (RowState)
	{
		.state = OUTBOX_READY,.not_before = DT_NOBEGIN
	};
	fate->error = find_fault(row, !row->has_cost_nanos, &filled);
	if (fate->error == NULL && event)
		fate->error = refusal(row, server);
	if (fate->error != NULL)
		fate->state = OUTBOX_REJECTED;
	else
		decide(row, &filled, server, fate);
	abp_shorten(fate->error);
}

/*
 * What is to become of a row: ready, or waiting for its time, for a price,
 * for somebody to fix it.  Its error is palloc'd.
 */
void
abp_fate_of(const UsageRow *row, const ServerOptions *server, RowState *fate)
{
	find_fate(row, server, true, fate);
}

/*
 * The same of a row whose event is encoded next if it is ready: whether Polar
 * would refuse it is left to that.
 */
void
abp_fate_before_encoding(const UsageRow *row, const ServerOptions *server, RowState *fate)
{
	find_fate(row, server, false, fate);
	if (fate->state != OUTBOX_READY && fate->state != OUTBOX_REJECTED)
		find_fate(row, server, true, fate);
}
