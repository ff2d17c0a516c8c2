/*-------------------------------------------------------------------------
 *
 * priced.c
 *	  What pricing makes of a row: the tuple that is stored, and its place in
 *	  the outbox.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/xact.h"
#include "utils/builtins.h"
#include "utils/jsonb.h"

#include "base/text_view.h"
#include "base/transaction.h"
#include "queue/wake.h"
#include "usage/collect.h"
#include "usage/fate.h"
#include "usage/priced.h"
#include "usage/rows.h"
#include "usage/warn.h"

/*
 * The table whose rows are being priced again, and at which nesting level:
 * its UPDATE may fire triggers of its owner's, which may update other tables
 * and fail in subtransactions of their own.
 */
static Oid	repricing_table = InvalidOid;
static IdSet *repricing_ids;
static int	repricing_level;

static void
on_transaction_end(XactEvent event, void *arg)
{
	if (abp_transaction_ends(event))
		repricing_table = InvalidOid;
}

static void
on_subtransaction_end(SubXactEvent event, SubTransactionId mine,
					  SubTransactionId parent, void *arg)
{
	if (event == SUBXACT_EVENT_ABORT_SUB && GetCurrentTransactionNestLevel() <= repricing_level)
		repricing_table = InvalidOid;
}

/*
 * The new row with its columns filled in and its cost.
 */
HeapTuple
abp_priced_tuple(UsageRelation *known, TupleDesc desc, const UsageRow *row,
				 bool normalized, bool stripped, const PricedCost *cost)
{
	Datum	   *values = known->values;
	bool	   *nulls = known->nulls;

#define SET_COLUMN(column, isnull, datum) \
	do { \
		AttrNumber	att_ = known->columns.attnums[column] - 1; \
		nulls[att_] = (isnull); \
		if (!nulls[att_]) \
			values[att_] = (datum); \
		if (unlikely(!known->columns.plain[column])) \
			values[att_] = abp_row_value_write(&known->columns, column, \
												 values[att_], nulls[att_]); \
	} while (0)

	if (normalized)
	{
		for (int i = 0; i < NUM_USAGE_COUNTS; i++)
			SET_COLUMN(COL_FIRST_COUNT + i, !row->counts.given[i],
					   Int64GetDatum(row->counts.value[i]));
		SET_COLUMN(COL_UNITS, row->counts.units == NULL, JsonbPGetDatum(row->counts.units));
		SET_COLUMN(COL_PROVIDER_COST, row->provider_cost == NULL,
				   NumericGetDatum(row->provider_cost));
		SET_COLUMN(COL_SERVICE_TIER, row->service_tier.data == NULL,
				   text_view_datum(row->service_tier));
		SET_COLUMN(COL_MODEL, row->model.data == NULL,
				   text_view_datum(row->model));
		SET_COLUMN(COL_GENERATION_ID, row->generation_id.data == NULL,
				   text_view_datum(row->generation_id));
	}
	if (stripped)
		SET_COLUMN(COL_RAW_USAGE, row->raw_usage == NULL, JsonbPGetDatum(row->raw_usage));
	if (row->tags_are_null && !nulls[known->columns.attnums[COL_TAGS] - 1])
		SET_COLUMN(COL_TAGS, false, JsonbPGetDatum(row->tags));
	SET_COLUMN(COL_COST_NANOS, !cost->known, Int64GetDatum(cost->cost_nanos));
	SET_COLUMN(COL_COST_CENTS, !cost->known, NumericGetDatum(cost->cost_cents));
	SET_COLUMN(COL_COST_STATUS, false,
			   CStringGetTextDatum(abp_price_status_name(cost->status)));
#undef SET_COLUMN

	return heap_form_tuple(desc, values, nulls);
}

/*
 * Is this UPDATE, of a row of this table, ours?
 */
bool
abp_priced_by_us(const UsageRelation *known, int64 id)
{
	return OidIsValid(repricing_table) && known->usage_table == repricing_table &&
		abp_idset_contains(repricing_ids, id);
}

/*
 * What a table's row deserves; without a server it is ready, and whoever comes to
 * send it looks at it.  A cost beyond cost_nanos, which an INSERT refuses, rejects the row of a subscription.
 */
void
abp_priced_state(const UsageRelation *known, const UsageRow *row, RowState *state)
{
	const ServerOptions *server = abp_relation_server(known);
	PricedCost	cost;
	char	   *problem;

	if (server == NULL)
	{
		*state = (RowState)
		{
			.state = OUTBOX_READY,.not_before = DT_NOBEGIN
		};
		return;
	}
	abp_fate_of(row, server, state);
	if (known->replicated && state->state == OUTBOX_UNPRICED && !abp_fate_cost(row, &cost, &problem))
		state->state = OUTBOX_REJECTED;
}

/*
 * Something that is billed has changed in a row that waits at this place, or
 * that this transaction has put into the outbox (NULL).
 */
void
abp_priced_requeue(UsageRelation *known, Relation rel, const UsageRow *row, const RowPlace *place)
{
	RowState	state;

	abp_priced_state(known, row, &state);
	if (state.state == OUTBOX_REJECTED)
		abp_warn_rejected(rel, row->id, state.error);

	/*
	 * A ready row stays where it is: the shipper reads it as updated, and may
	 * have passed it over while it was locked.
	 */
	if (place != NULL && place->state == OUTBOX_READY && state.state == OUTBOX_READY)
		abp_wake_at_commit();
	else
		abp_collect_changed(known->usage_table, row->id, place, &state);
}

/*
 * Price rows again, as their table's owner; held: only those without a cost.
 * Returns the ids of the rows that there still are.
 */
IdSet
abp_priced_reprice(const UsageTable *table, IdSet *ids, bool held)
{
	static bool registered = false;
	IdSet		updated;

	if (!registered)
	{
		RegisterXactCallback(on_transaction_end, NULL);
		RegisterSubXactCallback(on_subtransaction_end, NULL);
		registered = true;
	}
	repricing_table = table->relid;
	repricing_ids = ids;
	repricing_level = GetCurrentTransactionNestLevel();
	updated = abp_rows_update_prices(table, ids, held);
	repricing_table = InvalidOid;
	return updated;
}
