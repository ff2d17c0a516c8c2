/*-------------------------------------------------------------------------
 *
 * replicated.c
 *	  Rows of a usage table that a subscription feeds.
 *
 * Whatever comes over a subscription is stored: an error here would keep the rest
 * of its publisher's rows from ever coming.  What an INSERT elsewhere refuses is
 * rejected, what cannot be taken over any more is counted.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/htup_details.h"
#include "catalog/pg_type.h"
#include "fmgr.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "replication/logicalworker.h"
#include "storage/lmgr.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/fmgrprotos.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

#include "base/idset.h"
#include "base/text_view.h"
#include "base/usage_row.h"
#include "compat.h"
#include "polar/server.h"
#include "price/cards.h"
#include "price/normalize.h"
#include "price/price.h"
#include "queue/entry.h"
#include "queue/feed.h"
#include "queue/ledger.h"
#include "queue/place.h"
#include "usage/collect.h"
#include "usage/correct.h"
#include "usage/fate.h"
#include "usage/lookup.h"
#include "usage/priced.h"
#include "usage/relation.h"
#include "usage/replicated.h"
#include "usage/returning.h"
#include "usage/row.h"
#include "usage/warn.h"

/*
 * As much of an external_id is stored as an index can hold, and a checksum of all of
 * it.  More than Polar takes, so that the row stays rejected.
 */
#define MAX_STORED_EXTERNAL_ID 1000

/* Columns that a raw usage object may have filled, beside the counts and the service tier. */
static const UsageColumn filled_columns[] = {
	COL_MODEL, COL_GENERATION_ID, COL_UNITS, COL_PROVIDER_COST
};

/* Is there a row of this external_id?  Waits for whoever is inserting or deleting one. */
static bool
external_id_exists(UsageRelation *known, Relation rel, Datum external_id)
{
	AttrNumber	attnum = known->columns.attnums[COL_EXTERNAL_ID];
	Oid			collation = TupleDescAttr(RelationGetDescr(rel), attnum - 1)->attcollation;
	RegProcedure equal = known->columns.stored[COL_EXTERNAL_ID] == BPCHAROID ? F_BPCHAREQ : F_TEXTEQ;

	if (!OidIsValid(known->external_id_index))
		known->external_id_index = abp_lookup_index(rel, attnum);
	for (;;)
	{
		SnapshotData dirty;
		ScanKeyData key;
		SysScanDesc scan;
		HeapTuple	tuple;
		ItemPointerData tid;
		TransactionId busy = InvalidTransactionId;

		CHECK_FOR_INTERRUPTS();
		InitDirtySnapshot(dirty);
		ScanKeyEntryInitialize(&key, 0, attnum, BTEqualStrategyNumber, InvalidOid, collation, equal, external_id);
		scan = systable_beginscan(rel, known->external_id_index, OidIsValid(known->external_id_index),
								  &dirty, 1, &key);
		tuple = systable_getnext(scan);
		if (tuple != NULL)
		{
			tid = tuple->t_self;
			busy = TransactionIdIsValid(dirty.xmin) ? dirty.xmin : dirty.xmax;
		}
		systable_endscan(scan);
		if (!TransactionIdIsValid(busy))
			return tuple != NULL;
		XactLockTableWait(busy, rel, &tid, XLTW_InsertIndex);
	}
}

/* An external_id that no index may hold as it is: cut, with a checksum of all of it. */
static HeapTuple
tuple_with_short_external_id(const UsageRelation *known, TupleDesc desc, HeapTuple tuple, const UsageRow *row)
{
	int			attnum = known->columns.attnums[COL_EXTERNAL_ID];
	bool		isnull = false;
	text	   *whole = cstring_to_text_with_len(row->external_id.data, row->external_id.len);
	char	   *checksum = TextDatumGetCString(DirectFunctionCall1(md5_text, PointerGetDatum(whole)));
	int			len = pg_mbcliplen(row->external_id.data, row->external_id.len, MAX_STORED_EXTERNAL_ID);
	Datum		value = CStringGetTextDatum(psprintf("%.*s... md5 %s", len, row->external_id.data, checksum));

	return heap_modify_tuple_by_cols(tuple, desc, 1, &attnum, &value, &isnull);
}

/* A second row of an external_id: its subscription was made again, or its publisher has two. */
static void
skip_row(UsageRelation *known, Relation rel, const UsageRow *row)
{
	abp_collect_note(known->usage_table, OUTBOX_SKIPPED, row->id);
	if (known->warned_skipped)
		return;
	known->warned_skipped = true;
	ereport(WARNING,
			(errcode(ERRCODE_UNIQUE_VIOLATION),
			 errmsg("usage row with external_id \"%.*s\" is in \"%s\" already: the second one is skipped",
					row->external_id.len, row->external_id.data, RelationGetRelationName(rel)),
			 errdetail("So are others like it, without another warning of this session; aibilling.status counts them."),
			 errhint("That is to be expected where a subscription copies again what it has brought before.")));
}

/* The row as it is stored, with its cost as far as it has one. */
static HeapTuple
price_row(UsageRelation *known, TupleDesc desc, UsageRow *row, PricedCost *cost)
{
	const ServerOptions *server = abp_relation_server(known);
	bool		strips = server != NULL && server->strip_raw_usage && row->raw_usage != NULL;
	Jsonb	   *kept = NULL;
	bool		normalized;

	row->columns = &known->columns;
	/* before what is read fills in the model */
	if (strips)
	{
		UsageCall	call = {row->model, row->provider_cost != NULL};

		kept = abp_usage_strip(row->usage_format, row->raw_usage, &call);
	}
	normalized = abp_fate_price_if_sound(row, cost);
	if (strips)
		row->raw_usage = kept;
	abp_correct_price(known->usage_table, row, cost);
	return abp_priced_tuple(known, desc, row, normalized, strips, cost);
}

/*
 * BEFORE INSERT of a row: what is stored, NULL if nothing is.
 */
HeapTuple
abp_replicated_insert(UsageRelation *known, Relation rel, HeapTuple tuple)
{
	TupleDesc	desc = RelationGetDescr(rel);
	Datum		values[NUM_USAGE_COLUMNS];
	bool		nulls[NUM_USAGE_COLUMNS];
	UsageRow	row;
	PricedCost	cost;

	abp_relation_read(known, tuple, desc, values, nulls);

	/*
	 * A cost that its publisher has given is none of ours; its owner's may
	 * be.
	 */
	if (!nulls[COL_COST_STATUS] && !nulls[COL_ID] && !IsLogicalWorker())
	{
		if (abp_returning_remains(known, values, nulls))
			return tuple;
		abp_relation_read(known, tuple, desc, values, nulls);
	}
	if (abp_relation_lacks_defaults(known, nulls))
		known = abp_relation_fill_defaults(known, rel, &tuple, values, nulls);
	abp_row_read(values, nulls, &row);
	if (row.external_id.len > MAX_STORED_EXTERNAL_ID)
	{
		tuple = tuple_with_short_external_id(known, desc, tuple, &row);
		abp_relation_read(known, tuple, desc, values, nulls);
		abp_row_read(values, nulls, &row);
	}
	if (!nulls[COL_EXTERNAL_ID] && external_id_exists(known, rel, values[COL_EXTERNAL_ID]))
	{
		skip_row(known, rel, &row);
		return NULL;
	}
	if (OidIsValid(known->default_from[COL_ID]) && abp_lookup_exists(known->usage_table, row.id))
	{
		int64		given;

		do
		{
			CHECK_FOR_INTERRUPTS();
			given = row.id;
			tuple = abp_relation_renumber(known, rel, tuple, &row.id);
		} while (row.id != given && abp_lookup_exists(known->usage_table, row.id));
		abp_relation_read(known, tuple, desc, values, nulls);
		abp_row_read(values, nulls, &row);
	}

	return price_row(known, desc, &row, &cost);
}

/*
 * What an UPDATE over a subscription says nothing about: costs and the id, which
 * are not the publisher's; and, unless it brings another raw usage object, what
 * this one has filled in here and is empty there.
 */
static void
find_unsaid(const Datum *old_values, const bool *old_nulls, const Datum *values, const bool *nulls,
			bool *take)
{
	bool		had_raw = !old_nulls[COL_RAW_USAGE] || !old_nulls[COL_USAGE_FORMAT];
	bool		new_raw = !nulls[COL_RAW_USAGE] && !old_nulls[COL_RAW_USAGE] &&
	!abp_row_value_equal(COL_RAW_USAGE, values[COL_RAW_USAGE], old_values[COL_RAW_USAGE]);

	memset(take, 0, sizeof(bool) * NUM_USAGE_COLUMNS);
	take[COL_EXTERNAL_ID] = nulls[COL_EXTERNAL_ID];
	take[COL_OCCURRED_AT] = nulls[COL_OCCURRED_AT];
	take[COL_ID] = take[COL_COST_NANOS] = take[COL_COST_CENTS] = take[COL_COST_STATUS] = true;
	if (!had_raw || new_raw)
		return;

	for (int i = COL_FIRST_COUNT; i <= COL_LAST_COUNT; i++)
		take[i] = nulls[i];
	for (int i = 0; i < lengthof(filled_columns); i++)
		take[filled_columns[i]] = nulls[filled_columns[i]];
	if (!nulls[COL_UNITS] && !old_nulls[COL_UNITS])
		take[COL_UNITS] = DatumGetBool(DirectFunctionCall2(jsonb_contains, old_values[COL_UNITS],
														   values[COL_UNITS]));
	if (!nulls[COL_SERVICE_TIER])
	{
		text	   *tier = DatumGetTextPP(values[COL_SERVICE_TIER]);
		TextView	view = {VARDATA_ANY(tier), VARSIZE_ANY_EXHDR(tier)};

		take[COL_SERVICE_TIER] = abp_cards_tier_is_standard(view);
	}
}

/* Warn of a change that is not taken over. */
static void
keep_billed(const UsageRelation *known, Relation rel, int64 id, const char *reason)
{
	static TimestampTz warned = 0;

	abp_collect_note(known->usage_table, OUTBOX_KEPT, id);
	if (!TimestampDifferenceExceeds(warned, GetCurrentTimestamp(), ABP_WORKER_WARNINGS_MS))
		return;
	warned = GetCurrentTimestamp();
	ereport(WARNING,
			(errcode(ERRCODE_WARNING),
			 errmsg("usage row " INT64_FORMAT " of \"%s\" keeps what was billed: %s",
					id, RelationGetRelationName(rel), reason),
			 errdetail("It has been changed at its publisher. So may others have been: this is told once a minute, and aibilling.status counts them."),
			 errhint("Insert a correcting row there: with its own external_id, no counts, the difference in provider_cost, and tags.corrects naming the external_id of this row.")));
}

/* Does a row that is not in the outbox, or may be at Polar, take no change any more? */
static bool
is_closed(const RowPlace *place)
{
	return place->where == ROW_SENDING || place->where == ROW_DELIVERED ||
		(place->where == ROW_IN_OUTBOX && place->outcome_unknown);
}

/* All columns that are billed, and what they came from unless that is emptied. */
static void
find_billed(const bool *nulls, bool *take)
{
	for (int i = 0; i < NUM_USAGE_COLUMNS; i++)
		take[i] = abp_row_columns[i].billed;
	take[COL_RAW_USAGE] = take[COL_USAGE_FORMAT] = !nulls[COL_RAW_USAGE];
}

/*
 * BEFORE UPDATE of a row: what is stored.
 */
HeapTuple
abp_replicated_update(UsageRelation *known, Relation rel, HeapTuple old, HeapTuple tuple)
{
	TupleDesc	desc = RelationGetDescr(rel);
	Datum		old_values[NUM_USAGE_COLUMNS];
	bool		old_nulls[NUM_USAGE_COLUMNS];
	Datum		values[NUM_USAGE_COLUMNS];
	bool		nulls[NUM_USAGE_COLUMNS];
	bool		take[NUM_USAGE_COLUMNS];
	HeapTuple	priced;
	UsageRow	row;
	RowPlace	place;
	PricedCost	cost;
	bool		raw_changed;
	bool		own;
	bool		repriced;

	abp_relation_read(known, old, desc, old_values, old_nulls);
	abp_relation_read(known, tuple, desc, values, nulls);
	repriced = abp_priced_by_us(known, DatumGetInt64(old_values[COL_ID]));
	find_unsaid(old_values, old_nulls, values, nulls, take);
	tuple = abp_relation_take_old(known, desc, tuple, old, take);
	abp_relation_read(known, tuple, desc, values, nulls);
	if (abp_relation_lacks_defaults(known, nulls))
		known = abp_relation_fill_defaults(known, rel, &tuple, values, nulls);
	if (!abp_row_billed_changed(old_values, old_nulls, values, nulls, &raw_changed) && !repriced &&
		(!raw_changed || nulls[COL_RAW_USAGE]))
		return tuple;
	abp_row_read(values, nulls, &row);
	if (!abp_row_value_equal(COL_EXTERNAL_ID, old_values[COL_EXTERNAL_ID], values[COL_EXTERNAL_ID]) &&
		(row.external_id.len > MAX_STORED_EXTERNAL_ID ||
		 external_id_exists(known, rel, values[COL_EXTERNAL_ID])))
	{
		memset(take, 0, sizeof(take));
		take[COL_EXTERNAL_ID] = true;
		keep_billed(known, rel, row.id, "its new external_id is too long, or another row's");
		tuple = abp_relation_take_old(known, desc, tuple, old, take);
		abp_relation_read(known, tuple, desc, values, nulls);
		abp_row_read(values, nulls, &row);
	}

	priced = price_row(known, desc, &row, &cost);
	if (repriced)
		return priced;

	own = abp_collect_find(known->usage_table, row.id, &place);
	if (!own)
		abp_place_find(known->usage_table, row.id, known->ledger_from, &place);
	if (is_closed(&place))
	{
		Datum		new_values[NUM_USAGE_COLUMNS];
		bool		new_nulls[NUM_USAGE_COLUMNS];

		/* its cost by the prices of now is no change of the row */
		find_billed(nulls, take);
		memset(new_nulls, false, sizeof(new_nulls));
		abp_relation_read(known, priced, desc, new_values, new_nulls);
		for (int i = COL_COST_NANOS; i <= COL_COST_STATUS; i++)
		{
			new_values[i] = old_values[i];
			new_nulls[i] = old_nulls[i];
		}
		if (abp_row_billed_changed(old_values, old_nulls, new_values, new_nulls, &raw_changed))
			keep_billed(known, rel, row.id, place.where == ROW_SENDING ? "it is being sent" :
						place.where == ROW_DELIVERED ? "it has been delivered" : "it may have been delivered");
		return abp_relation_take_old(known, desc, tuple, old, take);
	}

	if (place.where == ROW_IN_OUTBOX)
	{
		row.has_cost_nanos = cost.known;
		row.cost_nanos = cost.cost_nanos;
		row.cost_cents = cost.cost_cents;
		abp_correct_changed(known->usage_table, old_values, old_nulls, &row);
		abp_priced_requeue(known, rel, &row, own ? NULL : &place);
	}
	return priced;
}

/*
 * AFTER DELETE of a row that waits or is in flight: a waiting one leaves the
 * outbox, one in flight is counted as vanished when its answer comes.
 */
void
abp_replicated_delete(const UsageRelation *known, int64 id, const RowPlace *place)
{
	if (place != NULL && place->where == ROW_SENDING)
		abp_collect_note(known->usage_table, OUTBOX_VANISHED, id);
	else
		abp_collect_changed(known->usage_table, id, place, NULL);
}

/*
 * BEFORE TRUNCATE: the same of all rows.  What is counted so far is kept from
 * the outbox, which is about to be emptied.
 */
void
abp_replicated_truncate(Oid usage_table)
{
	IdWalk		walk = {0};
	IdSet		sending = abp_ledger_sending_ids(usage_table);

	abp_feed_sum_up(usage_table);
	while (abp_idset_walk(&sending, &walk))
	{
		CHECK_FOR_INTERRUPTS();
		abp_collect_note(usage_table, OUTBOX_VANISHED, walk.id);
	}
}
