/*-------------------------------------------------------------------------
 *
 * triggers.c
 *	  The triggers of usage tables.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/xact.h"
#include "commands/trigger.h"
#include "fmgr.h"
#include "utils/builtins.h"
#include "utils/hsearch.h"
#include "utils/jsonb.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"

#include "base/extension.h"
#include "base/idset.h"
#include "base/transaction.h"
#include "base/usage_row.h"
#include "config.h"
#include "polar/server.h"
#include "price/cost.h"
#include "price/normalize.h"
#include "price/price.h"
#include "queue/attachment.h"
#include "queue/corrections.h"
#include "queue/entry.h"
#include "queue/ledger.h"
#include "queue/outbox.h"
#include "queue/place.h"
#include "queue/shares.h"
#include "queue/wake.h"
#include "usage/collect.h"
#include "usage/correct.h"
#include "usage/fate.h"
#include "usage/lookup.h"
#include "usage/priced.h"
#include "usage/relation.h"
#include "usage/replicated.h"
#include "usage/returning.h"
#include "usage/row.h"
#include "usage/rows.h"
#include "usage/triggers.h"
#include "usage/warn.h"

PG_FUNCTION_INFO_V1(abp_sql_price_usage);
PG_FUNCTION_INFO_V1(abp_sql_enqueue_usage);
PG_FUNCTION_INFO_V1(abp_sql_guard_usage);
PG_FUNCTION_INFO_V1(abp_sql_truncate_usage);

/*
 * Anyone may make triggers of these functions, on any table and for any event:
 * so check event, level and timing, or there may be no row to look at.
 */
static void
check_trigger(FunctionCallInfo fcinfo, const char *name,
			  TriggerEvent event, TriggerEvent or_event, const char *definition)
{
	TriggerEvent fired;

	if (!CALLED_AS_TRIGGER(fcinfo))
		ereport(ERROR,
				(errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
				 errmsg("function \"aibilling.%s\" can only be called as a trigger", name)));

	fired = ((TriggerData *) fcinfo->context)->tg_event &
		(TRIGGER_EVENT_OPMASK | TRIGGER_EVENT_ROW | TRIGGER_EVENT_TIMINGMASK);
	if (fired != event && fired != or_event)
		ereport(ERROR,
				(errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
				 errmsg("function \"aibilling.%s\" can only be called %s", name, definition),
				 errhint("Let aibilling.attach() create the triggers.")));
}

/* Raises object_not_in_prerequisite_state: Polar may have the row. */
static void
refuse_change(const RowPlace *place, Relation rel, int64 id, const char *verb)
{
	bool		unknown = place->where == ROW_IN_OUTBOX;

	ereport(ERROR,
			(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
			 errmsg("cannot %s usage row " INT64_FORMAT " of \"%s\": it %s",
					verb, id, RelationGetRelationName(rel),
					unknown ? "may have been delivered" :
					place->where == ROW_SENDING ? "is being sent" : "has been delivered"),
			 unknown ? errdetail("A request with it got no answer that says whether Polar has stored it.") : 0,
			 errhint("%sCall aibilling.correct(), or insert a correcting row: with its own external_id, no counts, the difference in provider_cost, and tags.corrects naming the external_id of this row.",
					 unknown ? "It is sent again by itself, or with aibilling.retry() if it is rejected; Polar stores it once. " : "")));
}

/*
 * Something that is billed has changed in a row: the outbox is to say what the
 * new row deserves.  Raises an error if Polar has the row, or may have it.
 */
static void
requeue_row(UsageRelation *known, Relation rel, const UsageRow *row)
{
	RowPlace	place;
	bool		own;

	if (abp_priced_by_us(known, row->id))
		return;					/* whoever reprices moves the ids themselves */

	own = abp_collect_find(known->usage_table, row->id, &place);
	if (!own)
		abp_place_find(known->usage_table, row->id, known->ledger_from, &place);
	if (place.where == ROW_NOT_SENT)
		return;
	if (place.where != ROW_IN_OUTBOX || place.outcome_unknown)
		refuse_change(&place, rel, row->id, "update");

	/*
	 * Rows of partitions may share an id: the outbox, or what this
	 * transaction knows, may speak of the other one.
	 */
	if (rel->rd_rel->relispartition)
	{
		RowPlace	other = place;

		if (own)
			abp_place_find(known->usage_table, row->id, known->ledger_from, &other);
		if (other.where != ROW_SENDING &&
			abp_ledger_has(known->usage_table, row->id, known->ledger_from))
			other.where = ROW_DELIVERED;
		if (other.where == ROW_SENDING || other.where == ROW_DELIVERED)
			refuse_change(&other, rel, row->id, "update");
	}

	abp_priced_requeue(known, rel, row, own ? NULL : &place);
}

/* Tell, once a session, of triggers on a table that is not attached. */
static void
warn_not_attached(UsageRelation *known, Relation rel)
{
	if (OidIsValid(known->usage_table) || known->warned)
		return;
	known->warned = true;
	ereport(WARNING,
			(errcode(ERRCODE_WARNING),
			 errmsg("table \"%s\" is not attached: its rows are priced but not sent",
					RelationGetRelationName(rel)),
			 errhint("Attach it with SELECT aibilling.attach('%s', server => '...').",
					 RelationGetRelationName(rel))));
}

/* A row in the BEFORE trigger: as it came, and with what we put into it. */
typedef struct NewRow
{
	UsageRelation *known;
	Relation	rel;
	HeapTuple	tuple;
	Datum		values[NUM_USAGE_COLUMNS];
	bool		nulls[NUM_USAGE_COLUMNS];
	Datum		old_values[NUM_USAGE_COLUMNS];	/* of an UPDATE: as it was */
	bool		old_nulls[NUM_USAGE_COLUMNS];
} NewRow;

/* Take the defaults where an explicit NULL says nothing. */
static inline void
fill_in_defaults(NewRow *row)
{
	if (unlikely(abp_relation_lacks_defaults(row->known, row->nulls)))
		row->known = abp_relation_fill_defaults(row->known, row->rel, &row->tuple,
												row->values, row->nulls);
}

/*
 * The new row of an UPDATE.  Returns false if nothing has changed that is
 * priced or billed.
 */
static bool
read_updated(NewRow *row, HeapTuple old)
{
	TupleDesc	desc = RelationGetDescr(row->rel);
	Datum	   *old_values = row->old_values;
	bool	   *old_nulls = row->old_nulls;
	bool		raw_changed;
	bool		changed;

	abp_relation_read(row->known, old, desc, old_values, old_nulls);
	abp_relation_read(row->known, row->tuple, desc, row->values, row->nulls);
	if (unlikely(abp_relation_lacks_kept(row->nulls, old_nulls)))
	{
		row->tuple = abp_relation_keep(row->known, desc, row->tuple, old, row->nulls);
		abp_relation_read(row->known, row->tuple, desc, row->values, row->nulls);
	}
	fill_in_defaults(row);
	changed = abp_row_billed_changed(old_values, old_nulls, row->values, row->nulls,
									 &raw_changed);
	if (!changed && !abp_priced_by_us(row->known, DatumGetInt64(old_values[COL_ID])) &&
		(!raw_changed || row->nulls[COL_RAW_USAGE]))
		return false;
	if (!row->nulls[COL_ID] && !old_nulls[COL_ID] &&
		row->values[COL_ID] != old_values[COL_ID])
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("cannot change the id of usage row " INT64_FORMAT " of \"%s\"",
						DatumGetInt64(old_values[COL_ID]), RelationGetRelationName(row->rel)),
				 errhint("Delete the row and insert another.")));
	return true;
}

/*
 * The row of an INSERT.  Returns false if it is not new and keeps its cost.
 */
static bool
read_inserted(NewRow *row)
{
	TupleDesc	desc = RelationGetDescr(row->rel);

	abp_relation_read(row->known, row->tuple, desc, row->values, row->nulls);
	if (unlikely(row->nulls[COL_ID]))
		fill_in_defaults(row);
	if (OidIsValid(row->known->usage_table) && !row->nulls[COL_ID] &&
		abp_returning_remains(row->known, row->values, row->nulls))
		return false;
	/* the look at other rows has used the relation's scratch */
	if (unlikely(!row->nulls[COL_COST_STATUS]))
		abp_relation_read(row->known, row->tuple, desc, row->values, row->nulls);
	fill_in_defaults(row);
	return true;
}

/*
 * Fill in what a row's raw usage object says.  Returns false if it cannot be
 * read: then the row stays without a cost.
 */
static bool
fill_in_usage(UsageRow *row)
{
	StringInfoData reason;
	char	   *doubt;
	bool		filled;

	initStringInfo(&reason);
	filled = abp_fate_normalize(row, &reason, &doubt);
	pfree(reason.data);
	if (filled && doubt != NULL)
		abp_warn_doubt(doubt);
	return filled;
}

/*
 * BEFORE INSERT OR UPDATE, FOR EACH ROW: normalise and price the row.
 */
Datum
abp_sql_price_usage(PG_FUNCTION_ARGS)
{
	TriggerData *trigdata = (TriggerData *) fcinfo->context;
	NewRow		new;
	UsageRelation *known;
	const ServerOptions *server;
	UsageRow	row;
	PricedCost	cost = {COST_INCOMPLETE};
	bool		update;
	bool		normalized;
	bool		strips = false;
	Jsonb	   *kept = NULL;

	check_trigger(fcinfo, "price_usage",
				  TRIGGER_EVENT_BEFORE | TRIGGER_EVENT_ROW | TRIGGER_EVENT_INSERT,
				  TRIGGER_EVENT_BEFORE | TRIGGER_EVENT_ROW | TRIGGER_EVENT_UPDATE,
				  "BEFORE INSERT OR UPDATE FOR EACH ROW");
	update = TRIGGER_FIRED_BY_UPDATE(trigdata->tg_event);
	new.rel = trigdata->tg_relation;
	new.known = abp_relation_know(new.rel);
	new.tuple = update ? trigdata->tg_newtuple : trigdata->tg_trigtuple;
	warn_not_attached(new.known, new.rel);
	if (new.known->replicated)
		return PointerGetDatum(update ? abp_replicated_update(new.known, new.rel, trigdata->tg_trigtuple, new.tuple) :
							   abp_replicated_insert(new.known, new.rel, new.tuple));
	if (update ? !read_updated(&new, trigdata->tg_trigtuple) : !read_inserted(&new))
		return PointerGetDatum(new.tuple);

	known = new.known;
	abp_row_read(new.values, new.nulls, &row);
	row.columns = &known->columns;
	abp_fate_check(new.rel, &row, new.nulls);
	server = abp_relation_server(known);

	/* before what is read fills in the model */
	if (row.raw_usage != NULL && server != NULL && server->strip_raw_usage)
	{
		UsageCall	call = {row.model, row.provider_cost != NULL};

		strips = true;
		kept = abp_usage_strip(row.usage_format, row.raw_usage, &call);
	}
	normalized = row.raw_usage != NULL && fill_in_usage(&row);
	if (row.raw_usage == NULL || normalized)
	{
		PriceRequest request = abp_fate_price_request(&row);

		(void) abp_price_compute(&request, false, &cost);
		if (!update)
			abp_correct_price(known->usage_table, &row, &cost);
		if (unlikely(!row.counts.given[COUNT_OUTPUT]) && !update)
			abp_warn_no_output(&row, &request, &cost);
	}
	if (unlikely(strips))
		row.raw_usage = kept;
	new.tuple = abp_priced_tuple(known, RelationGetDescr(new.rel), &row, normalized, strips, &cost);

	if (update && OidIsValid(known->usage_table))
	{
		row.has_cost_nanos = cost.known;
		row.cost_nanos = cost.cost_nanos;
		row.cost_cents = cost.cost_cents;
		requeue_row(known, new.rel, &row);
		abp_correct_changed(known->usage_table, new.old_values, new.old_nulls, &row);
	}
	return PointerGetDatum(new.tuple);
}

/*
 * May this session load rows without sending them?
 */
static bool
enqueue_is_off(Oid usage_table)
{
	static bool warned = false;

	if (abp_enqueue)
		return false;
	if (abp_relation_is_callers(usage_table))
		return true;

	if (!warned)
		ereport(WARNING,
				(errcode(ERRCODE_WARNING),
				 errmsg("aibilling_polar.enqueue is ignored: \"%s\" belongs to another role",
						get_rel_name(usage_table)),
				 errhint("Only the owner of a usage table, and superusers, load rows without sending them.")));
	warned = true;
	return false;
}

/*
 * AFTER INSERT, FOR EACH ROW: collect the row for the outbox.
 */
Datum
abp_sql_enqueue_usage(PG_FUNCTION_ARGS)
{
	TriggerData *trigdata = (TriggerData *) fcinfo->context;
	Relation	rel;
	UsageRelation *known;
	Datum		values[NUM_USAGE_COLUMNS];
	bool		nulls[NUM_USAGE_COLUMNS];
	UsageRow	row;
	RowState	state;
	Returning  *was_there;

	check_trigger(fcinfo, "enqueue_usage",
				  TRIGGER_EVENT_AFTER | TRIGGER_EVENT_ROW | TRIGGER_EVENT_INSERT,
				  TRIGGER_EVENT_AFTER | TRIGGER_EVENT_ROW | TRIGGER_EVENT_INSERT,
				  "AFTER INSERT FOR EACH ROW");
	rel = trigdata->tg_relation;
	known = abp_relation_know(rel);
	if (!OidIsValid(known->usage_table))
		return PointerGetDatum(NULL);

	abp_relation_read(known, trigdata->tg_trigtuple, RelationGetDescr(rel), values, nulls);
	abp_row_read(values, nulls, &row);
	row.columns = &known->columns;

	was_there = abp_returning_find(known->usage_table, row.id, HASH_FIND);
	if (was_there != NULL)
	{
		ReturnKind	kind = was_there->kind;

		(void) abp_returning_find(known->usage_table, row.id, HASH_REMOVE);
		if (kind == RETURN_CHANGED)
			requeue_row(known, rel, &row);
		if (kind != RETURN_DELIVERED)
			return PointerGetDatum(NULL);
	}
	if (enqueue_is_off(known->usage_table))
	{
		if (known->counts_not_queued)
			abp_collect_note(known->usage_table, OUTBOX_NOT_QUEUED, row.id);
		return PointerGetDatum(NULL);
	}

	abp_priced_state(known, &row, &state);
	state.outcome_unknown = was_there != NULL;
	if (state.state == OUTBOX_REJECTED)
		abp_warn_rejected(rel, row.id, state.error);
	else if (state.state == OUTBOX_UNPRICED)
		abp_warn_unpriced(&row, state.error);
	abp_collect_inserted(known->usage_table, row.id, &state);
	abp_correct_note(known->usage_table, &row);
	return PointerGetDatum(NULL);
}

/*
 * A row is gone that shared its id with another, and what waits under that id
 * may be of either, or of both: the shipper looks at the other one, once, which
 * Polar may have.  "before" is where the id stood before this transaction, and
 * "place" where it stands by what that knows, if own, or the same.
 */
static void
leave_to_other(Oid usage_table, int64 id, int64 ledger_from, const RowPlace *place,
			   const RowPlace *before, bool own)
{
	RowState	ready = {OUTBOX_READY, DT_NOBEGIN};
	int			count = 0;

	for (int i = 0; i < NUM_OUTBOX_STATES; i++)
		count += before->count[i];
	ready.outcome_unknown = place->outcome_unknown || before->outcome_unknown ||
		before->where == ROW_SENDING || abp_ledger_has(usage_table, id, ledger_from);
	if (own || place->state != OUTBOX_READY || count > 1 || ready.outcome_unknown)
		abp_collect_changed(usage_table, id, before, &ready);
}

/*
 * A row has left its table with its partition: take what waits of it out of the
 * outbox, unless there is another row of its id.  Returns whether anything
 * waits, and whether Polar may have it.
 */
bool
abp_triggers_row_left(Oid usage_table, int64 id, int64 ledger_from, bool *outcome_unknown)
{
	RowPlace	place;
	RowPlace	before;
	bool		own = abp_collect_find(usage_table, id, &place);

	abp_place_find(usage_table, id, ledger_from, &before);
	if (!own)
		place = before;
	if (place.state == 0)
		return false;

	*outcome_unknown = place.outcome_unknown || place.where == ROW_SENDING ||
		abp_ledger_has(usage_table, id, ledger_from);
	if (place.where == ROW_SENDING)
		return true;
	if (abp_lookup_exists(usage_table, id))
		leave_to_other(usage_table, id, ledger_from, &place, &before, own);
	else
		abp_collect_changed(usage_table, id, &before, NULL);
	return true;
}

/*
 * AFTER DELETE, FOR EACH ROW: a row that Polar may be getting stays; a waiting
 * one leaves the outbox.  After, because the statement may have put the row into
 * another partition: then it is not gone.
 */
Datum
abp_sql_guard_usage(PG_FUNCTION_ARGS)
{
	TriggerData *trigdata = (TriggerData *) fcinfo->context;
	Relation	rel;
	TupleDesc	desc;
	UsageRelation *known;
	Datum		values[NUM_USAGE_COLUMNS];
	bool		nulls[NUM_USAGE_COLUMNS];
	RowColumns	row;
	int64		id;
	RowPlace	place;
	RowPlace	stored;
	const RowPlace *before = &place;	/* NULL: it was nowhere */
	bool		own;
	bool		is_there;		/* the statement has put it elsewhere */
	bool		shared;			/* another row has its id */

	abp_extension_check_version();
	check_trigger(fcinfo, "guard_usage",
				  TRIGGER_EVENT_AFTER | TRIGGER_EVENT_ROW | TRIGGER_EVENT_DELETE,
				  TRIGGER_EVENT_AFTER | TRIGGER_EVENT_ROW | TRIGGER_EVENT_DELETE,
				  "AFTER DELETE FOR EACH ROW");
	rel = trigdata->tg_relation;
	desc = RelationGetDescr(rel);
	known = abp_relation_know(rel);
	if (!OidIsValid(known->usage_table))
		return PointerGetDatum(NULL);
	abp_relation_read(known, trigdata->tg_trigtuple, desc, values, nulls);
	if (nulls[COL_ID])
		return PointerGetDatum(NULL);
	id = DatumGetInt64(values[COL_ID]);

	own = abp_collect_find(known->usage_table, id, &place);
	if (!own)
		abp_place_find(known->usage_table, id, known->ledger_from, &place);
	if (place.where == ROW_NOT_SENT || place.where == ROW_DELIVERED)
		return PointerGetDatum(NULL);
	if (known->replicated)
	{
		abp_replicated_delete(known, id, own ? NULL : &place);
		if (place.where != ROW_SENDING)
			abp_correct_changed(known->usage_table, values, nulls, NULL);
		return PointerGetDatum(NULL);
	}

	row = (RowColumns)
	{
		values, nulls
	};
	is_there = abp_lookup_rows(known->usage_table, id, SnapshotSelf, abp_lookup_same_row, &row);
	if (place.where == ROW_SENDING)
	{
		if (!is_there || !row.unchanged)
			refuse_change(&place, rel, id, "delete");
		return PointerGetDatum(NULL);
	}

	/*
	 * What its INSERT trigger does not know as a row that was there, is
	 * queued by it.
	 */
	if (is_there &&
		abp_returning_find(known->usage_table, id, HASH_FIND) != NULL)
		return PointerGetDatum(NULL);

	/* What this transaction has inserted may share its id with another. */
	shared = !is_there && abp_lookup_exists(known->usage_table, id);
	if (own)
	{
		before = shared || rel->rd_rel->relispartition ? &stored : NULL;
		if (before != NULL)
			abp_place_find(known->usage_table, id, known->ledger_from, &stored);
		if (before != NULL && stored.where == ROW_SENDING && !is_there &&
			!TransactionIdIsCurrentTransactionId(HeapTupleHeaderGetXmin(trigdata->tg_trigtuple->t_data)))
			refuse_change(&stored, rel, id, "delete");
	}

	if (shared)
		leave_to_other(known->usage_table, id, known->ledger_from, &place, before, own);
	else if (!place.outcome_unknown)
	{
		abp_collect_changed(known->usage_table, id, before, NULL);
		if (!is_there)
			abp_correct_changed(known->usage_table, values, nulls, NULL);
	}
	else if (!is_there || !row.unchanged)
		refuse_change(&place, rel, id, "delete");
	return PointerGetDatum(NULL);
}

/*
 * BEFORE TRUNCATE, FOR EACH STATEMENT: the outbox forgets the table's rows.
 * The lock that TRUNCATE has keeps the shipper and all others from the table.
 */
Datum
abp_sql_truncate_usage(PG_FUNCTION_ARGS)
{
	TriggerData *trigdata = (TriggerData *) fcinfo->context;
	Relation	rel;
	UsageRelation *known;
	int64		count;

	check_trigger(fcinfo, "truncate_usage",
				  TRIGGER_EVENT_BEFORE | TRIGGER_EVENT_TRUNCATE,
				  TRIGGER_EVENT_BEFORE | TRIGGER_EVENT_TRUNCATE,
				  "BEFORE TRUNCATE FOR EACH STATEMENT");
	rel = trigdata->tg_relation;
	known = abp_relation_know(rel);
	if (!OidIsValid(known->usage_table))
		return PointerGetDatum(NULL);

	if (known->replicated)
		abp_replicated_truncate(known->usage_table);
	else if (abp_ledger_sending(known->usage_table))
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_IN_USE),
				 errmsg("cannot truncate \"%s\": rows of it are being sent",
						RelationGetRelationName(rel)),
				 errhint("Pause its server with aibilling.pause(), wait until aibilling.status shows none in flight, and truncate then.")));
	count = abp_outbox_discard(known->usage_table);
	abp_collect_truncated(known->usage_table);
	abp_attachment_truncated(known->usage_table);
	abp_corrections_forget(known->usage_table);
	abp_shares_truncated(known->usage_table);
	if (count > 0)
		ereport(WARNING,
				(errcode(ERRCODE_WARNING),
				 errmsg("truncating \"%s\" drops " INT64_FORMAT " usage rows that were not delivered",
						RelationGetRelationName(rel), count)));
	return PointerGetDatum(NULL);
}
