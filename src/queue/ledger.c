/*-------------------------------------------------------------------------
 *
 * ledger.c
 *	  The ledger: what was sent, in which request, and what came of it.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/table.h"
#include "access/tableam.h"
#include "miscadmin.h"
#include "port/pg_crc32c.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/multirangetypes.h"
#include "utils/rangetypes.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"
#include "utils/typcache.h"

#include "base/extension.h"
#include "base/idset.h"
#include "base/rights.h"
#include "base/statement.h"
#include "base/table_scan.h"
#include "base/text_view.h"
#include "compat.h"
#include "queue/ledger.h"
#include "queue/shares.h"

/* In how many deliveries that are summed up the last error is looked for. */
#define LEDGER_ERRORS 1000

/* columns of aibilling.ledger that are read without SQL */
#define Anum_delivery_id 1
#define Anum_delivery_usage_table 3
#define Anum_delivery_usage_ids 4
#define Anum_delivery_events 5
#define Anum_delivery_state 7
#define Anum_delivery_duplicates 11
#define Anum_delivery_unexpected_duplicates 12
#define Anum_delivery_vanished 13
#define Anum_delivery_finished_at 15
#define Anum_delivery_outcome_unknown 17
#define Anum_delivery_error 18
#define Anum_delivery_vanished_ids 19
#define Anum_delivery_vanished_keys 21

/* The columns up to "usage_table" as they lie in a tuple. */
typedef struct DeliveryForm
{
	int64		id;
	NameData	server;
	Oid			usage_table;
} DeliveryForm;

#define DELIVERY_FORM(tuple) ((const DeliveryForm *) GETSTRUCT(tuple))

/* A tuple of aibilling.delivery_total. */
typedef struct DeliveryTotalForm
{
	Oid			usage_table;
	int64		up_to;
	int64		deliveries;
	int64		delivered;
	int64		duplicates;
	int64		unexpected_duplicates;
	int64		vanished;
} DeliveryTotalForm;

/* Rows that were found gone, as two parameters for the ledger, which has them from now on. */
static void
put_vanished(Delivery *delivery, Datum *values)
{
	values[0] = abp_idset_to_multirange(&delivery->vanished_rows.ids);
	values[1] = PointerGetDatum(abp_vanished_write_keys(&delivery->vanished_rows));
	memset(&delivery->vanished_rows, 0, sizeof(Vanished));
}

/* They are added to those that it has: some may have come back meanwhile. */
#define ADD_VANISHED(ids, keys) \
	"vanished_ids = nullif(coalesce(vanished_ids, '{}') + " ids ", '{}')," \
	" vanished_keys = nullif(coalesce(vanished_keys, '') || " keys ", '')"

/*
 * What tells the rows of a request from others that have come to have their
 * ids: a checksum of each one's external_id, in the order of the ids.
 */
static Datum
event_keys(const Delivery *delivery)
{
	IdWalk		walk = {0};
	int64		count = abp_idset_count(unconstify(IdSet *, &delivery->ids));
	bytea	   *keys = palloc(VARHDRSZ + count * sizeof(uint32));
	char	   *at = VARDATA(keys);

	/* Of a delivery of an older version they are not known: none, not zeros. */
	if (delivery->keys == NULL)
	{
		SET_VARSIZE(keys, VARHDRSZ);
		return PointerGetDatum(keys);
	}
	SET_VARSIZE(keys, VARHDRSZ + count * sizeof(uint32));
	if (abp_idset_count(unconstify(IdSet *, &delivery->key_ids)) == count)
	{
		memcpy(at, delivery->keys, count * sizeof(uint32));
		return PointerGetDatum(keys);
	}
	while (abp_idset_walk(&delivery->ids, &walk))
	{
		uint32		key = 0;

		(void) abp_ledger_delivery_key(delivery, walk.id, &key);
		memcpy(at, &key, sizeof(key));
		at += sizeof(key);
	}
	return PointerGetDatum(keys);
}

/*
 * The checksum of the external_id that a row had when it was first sent.
 * Returns false if that is not known.
 */
bool
abp_ledger_delivery_key(const Delivery *delivery, int64 id, uint32 *key)
{
	int64		rank = abp_idset_rank(&delivery->key_ids, id);

	if (delivery->keys == NULL || rank < 0)
		return false;
	*key = delivery->keys[rank];
	return true;
}

/*
 * The checksum by which a row is known again.
 */
uint32
abp_ledger_key_of(const TextView *external_id)
{
	pg_crc32c	crc;

	INIT_CRC32C(crc);
	COMP_CRC32C(crc, external_id->data, external_id->len);
	FIN_CRC32C(crc);
	return crc;
}

/*
 * Rows of a delivery are gone, or, if "other", others that have their ids may be:
 * known by what was sent first of these ids.
 */
void
abp_ledger_miss(Delivery *delivery, const IdSet *ids, bool other, MemoryContext context)
{
	IdWalk		walk = {0};

	while (abp_idset_walk(ids, &walk))
	{
		uint32		key;

		CHECK_FOR_INTERRUPTS();
		if (abp_ledger_delivery_key(delivery, walk.id, &key))
			abp_vanished_add_row(&delivery->vanished_rows, walk.id, key, other, context);
		else
			abp_vanished_add_id(&delivery->vanished_rows, walk.id, context);
	}
}

/* What a request sends, as the first parameters of a statement. */
#define REQUEST_COLUMNS 8
#define REQUEST_TYPES INT8MULTIRANGEOID, INT4OID, INT8OID, INT8OID, BOOLOID, BYTEAOID, INT8MULTIRANGEOID, BYTEAOID

/* Set these parameters. */
static void
put_request(Delivery *delivery, Datum *values)
{
	values[0] = abp_idset_to_multirange(&delivery->ids);
	values[1] = Int32GetDatum(delivery->nevents);
	values[2] = Int64GetDatum(delivery->body.len);
	values[3] = Int64GetDatum(delivery->vanished);
	values[4] = BoolGetDatum(delivery->outcome_unknown);
	values[5] = event_keys(delivery);
	put_vanished(delivery, &values[6]);
}

/*
 * Enter a delivery in the ledger, as sending its first request, or as one that
 * waits for it if attempts is 0.  Sets its id.
 */
void
abp_ledger_begin(Delivery *delivery)
{
	static Statement begin = {
		"INSERT INTO aibilling.ledger (usage_ids, events, bytes, vanished, outcome_unknown, event_keys,"
		" vanished_ids, vanished_keys, server, usage_table, attempts, state, started_at)"
		" VALUES ($1, $2, $3, $4, $5, $6, nullif($7, '{}'), nullif($8, ''), $9, $10, $11, 'sending',"
		" pg_catalog.clock_timestamp())"
		" RETURNING id",
		REQUEST_COLUMNS + 3, {REQUEST_TYPES, NAMEOID, REGCLASSOID, INT4OID}
	};
	Datum		values[REQUEST_COLUMNS + 3];
	SavedUser	saved;

	put_request(delivery, values);
	values[REQUEST_COLUMNS] = DirectFunctionCall1(namein, CStringGetDatum(delivery->server));
	values[REQUEST_COLUMNS + 1] = ObjectIdGetDatum(delivery->usage_table);
	values[REQUEST_COLUMNS + 2] = Int32GetDatum(delivery->attempts);
	abp_statement_open(&begin, values, NULL, &saved);
	delivery->id = abp_result_int64(0, 1, 0);
	abp_statement_close(&saved);
}

/*
 * Enter another request for a delivery, perhaps with fewer ids than before.
 */
void
abp_ledger_resend(Delivery *delivery)
{
	static Statement resend = {
		"UPDATE aibilling.ledger SET usage_ids = $1, events = $2, bytes = $3,"
		" vanished = $4, outcome_unknown = $5, event_keys = $6, " ADD_VANISHED("$7", "$8") ","
		" attempts = attempts + 1, not_before = NULL"
		" WHERE id = $9 RETURNING attempts::pg_catalog.int8",
		REQUEST_COLUMNS + 1, {REQUEST_TYPES, INT8OID}
	};
	Datum		values[REQUEST_COLUMNS + 1];
	SavedUser	saved;

	put_request(delivery, values);
	values[REQUEST_COLUMNS] = Int64GetDatum(delivery->id);
	if (abp_statement_open(&resend, values, NULL, &saved) == 1)
		delivery->attempts = abp_result_int64(0, 1, 1);
	abp_statement_close(&saved);
}

/*
 * Note why a delivery is still unsettled, when it is tried again, and which
 * ids are left to it.
 */
void
abp_ledger_note(Delivery *delivery, const char *error, TimestampTz not_before)
{
	static Statement note = {
		"UPDATE aibilling.ledger SET error = $2, not_before = $3, outcome_unknown = $4,"
		" http_status = nullif($5, 0), usage_ids = $6, events = $7, event_keys = $8,"
		" vanished = $9, " ADD_VANISHED("$10", "$11")
		" WHERE id = $1",
		11, {INT8OID, TEXTOID, TIMESTAMPTZOID, BOOLOID, INT4OID, INT8MULTIRANGEOID, INT4OID, BYTEAOID,
		INT8OID, INT8MULTIRANGEOID, BYTEAOID}
	};
	Datum		values[11] = {
		Int64GetDatum(delivery->id),
		PointerGetDatum(abp_reason_text(error)),
		TimestampTzGetDatum(not_before),
		BoolGetDatum(delivery->outcome_unknown),
		Int32GetDatum(delivery->http_status),
		abp_idset_to_multirange(&delivery->ids),
		Int32GetDatum(delivery->nevents),
		event_keys(delivery),
		Int64GetDatum(delivery->vanished)
	};

	put_vanished(delivery, &values[9]);
	abp_statement_run_alone(&note, values, NULL);
}

/*
 * Settle a delivery: "delivered", "rejected" or "failed".
 */
void
abp_ledger_finish(Delivery *delivery, const char *state, const char *error)
{
	static Statement finish = {
		"UPDATE aibilling.ledger SET state = $2, http_status = nullif($3, 0),"
		" inserted = $4, duplicates = $5, unexpected_duplicates = $6, vanished = $7,"
		" error = $8, outcome_unknown = $9, " ADD_VANISHED("$10", "$11") ", event_keys = NULL,"
		" not_before = NULL, finished_at = pg_catalog.clock_timestamp()"
		" WHERE id = $1",
		11, {INT8OID, TEXTOID, INT4OID, INT8OID, INT8OID, INT8OID, INT8OID, TEXTOID, BOOLOID,
		INT8MULTIRANGEOID, BYTEAOID}
	};
	Datum		values[11] = {
		Int64GetDatum(delivery->id),
		CStringGetTextDatum(state),
		Int32GetDatum(delivery->http_status),
		Int64GetDatum(delivery->inserted),
		Int64GetDatum(delivery->duplicates),
		Int64GetDatum(delivery->unexpected_duplicates),
		Int64GetDatum(delivery->vanished),
		(Datum) 0,
		BoolGetDatum(delivery->outcome_unknown)
	};
	char		nulls[] = "           ";

	put_vanished(delivery, &values[9]);

	if (strcmp(state, "delivered") != 0)
		nulls[3] = nulls[4] = 'n';
	if (error == NULL)
		nulls[7] = 'n';
	else
		values[7] = PointerGetDatum(abp_reason_text(error));

	abp_statement_run_alone(&finish, values, nulls);
	if (strcmp(state, "delivered") != 0)
		abp_shares_drop(&delivery->id, 1);
}

/* What event_keys has written, in the current memory context; NULL if nothing. */
static uint32 *
result_keys(uint64 row, int column, int64 count)
{
	bool		isnull;
	Datum		value = abp_result_datum(row, column, &isnull);
	bytea	   *keys;
	uint32	   *copy;

	if (isnull)
		return NULL;
	keys = DatumGetByteaPP(value);
	if (VARSIZE_ANY_EXHDR(keys) != count * sizeof(uint32))
		return NULL;
	copy = palloc(Max(1, count) * sizeof(uint32));
	memcpy(copy, VARDATA_ANY(keys), count * sizeof(uint32));
	return copy;
}

/*
 * The deliveries whose fate an earlier shipper left open, as a list of
 * Delivery in the current memory context.
 */
List	   *
abp_ledger_unsettled(void)
{
	static Statement unsettled = {
		"SELECT d.id, d.server, d.usage_table, d.usage_ids, d.attempts, d.vanished,"
		" d.event_keys"
		" FROM aibilling.ledger d WHERE d.state = 'sending' ORDER BY d.id",
		0, {0}
	};
	MemoryContext caller = CurrentMemoryContext;
	List	   *deliveries = NIL;
	uint64		n;
	SavedUser	saved;

	n = abp_statement_open(&unsettled, NULL, NULL, &saved);
	for (uint64 i = 0; i < n; i++)
	{
		Delivery   *delivery = MemoryContextAllocZero(caller, sizeof(Delivery));
		MemoryContext spi = MemoryContextSwitchTo(caller);
		bool		isnull;

		delivery->id = abp_result_int64(i, 1, 0);
		delivery->server = abp_result_string(i, 2, caller);
		delivery->usage_table = abp_result_oid(i, 3);
		delivery->ids = abp_result_idset(i, 4, caller);
		delivery->attempts = DatumGetInt32(abp_result_datum(i, 5, &isnull));
		delivery->vanished = abp_result_int64(i, 6, 0);
		delivery->key_ids = abp_idset_copy(&delivery->ids);
		delivery->keys = result_keys(i, 7, abp_idset_count(&delivery->ids));
		delivery->outcome_unknown = true;
		deliveries = lappend(deliveries, delivery);
		MemoryContextSwitchTo(spi);
	}
	abp_statement_close(&saved);
	return deliveries;
}

/* Begin a scan over the unsettled deliveries of a table, by the active snapshot. */
static void
begin_sending_scan(OrderedScan *scan, Oid usage_table)
{
	ScanKeyData key;

	ScanKeyInit(&key, Anum_delivery_usage_table, BTEqualStrategyNumber, F_OIDEQ,
				ObjectIdGetDatum(usage_table));
	abp_scan_begin(scan, "ledger", "ledger_sending", 1, &key, AccessShareLock);
}

/*
 * Is a delivery of this table unsettled?  By the latest state of the ledger,
 * whatever the transaction's snapshot.
 */
bool
abp_ledger_sending(Oid usage_table)
{
	OrderedScan scan;
	bool		found;

	PushActiveSnapshot(GetLatestSnapshot());
	begin_sending_scan(&scan, usage_table);
	found = abp_scan_next(&scan) != NULL;
	abp_scan_end(&scan);
	PopActiveSnapshot();
	return found;
}

/* Does one of a delivery's sets of ids hold an id? */
static bool
delivery_holds(HeapTuple tuple, AttrNumber column, TupleDesc desc, int64 id)
{
	TypeCacheEntry *type = lookup_type_cache(INT8MULTIRANGEOID, TYPECACHE_MULTIRANGE_INFO);
	bool		isnull;
	Datum		ids = heap_getattr(tuple, column, desc, &isnull);

	return !isnull &&
		multirange_contains_elem_internal(type->rngtype, DatumGetMultirangeTypeP(ids),
										  Int64GetDatum(id));
}

/* Is an id in flight, by the active snapshot? */
bool
abp_ledger_is_sending(Oid usage_table, int64 id)
{
	OrderedScan scan;
	HeapTuple	tuple;
	bool		found = false;

	begin_sending_scan(&scan, usage_table);
	while (!found && (tuple = abp_scan_next(&scan)) != NULL)
		found = delivery_holds(tuple, Anum_delivery_usage_ids, RelationGetDescr(scan.rel), id);
	abp_scan_end(&scan);
	return found;
}

/*
 * The last delivery above "after" by which Polar has got an id, by the active
 * snapshot; 0 if there is none.
 */
int64
abp_ledger_last_delivered(Oid usage_table, int64 id, int64 after)
{
	Relation	rel = table_open(abp_extension_needed("ledger"), AccessShareLock);
	Relation	index = index_open(abp_extension_needed("ledger_usage_ids"), AccessShareLock);
	TupleTableSlot *slot = table_slot_create(rel, NULL);
	IndexScanDesc scan;
	ScanKeyData key;
	int64		found = 0;

	ScanKeyEntryInitialize(&key, 0, 1, RANGESTRAT_CONTAINS_ELEM, ANYELEMENTOID, InvalidOid,
						   F_MULTIRANGE_CONTAINS_ELEM, Int64GetDatum(id));
	scan = abp_index_beginscan(rel, index, GetActiveSnapshot(), 1);
	index_rescan(scan, &key, 1, NULL, 0);
	while (index_getnext_slot(scan, ForwardScanDirection, slot))
	{
		bool		should_free;
		HeapTuple	tuple = ExecFetchSlotHeapTuple(slot, false, &should_free);
		const DeliveryForm *form = DELIVERY_FORM(tuple);
		bool		isnull;

		CHECK_FOR_INTERRUPTS();

		if (form->usage_table == usage_table && form->id > Max(after, found) &&
			strcmp(TextDatumGetCString(heap_getattr(tuple, Anum_delivery_state,
													RelationGetDescr(rel), &isnull)),
				   "delivered") == 0 &&
			delivery_holds(tuple, Anum_delivery_usage_ids, RelationGetDescr(rel), id))
			found = form->id;
		if (should_free)
			heap_freetuple(tuple);
	}
	index_endscan(scan);
	ExecDropSingleTupleTableSlot(slot);
	index_close(index, NoLock);
	table_close(rel, NoLock);
	return found;
}

/*
 * Those of an unsettled delivery's ids that another one has brought to Polar
 * since the last TRUNCATE, in the current memory context.
 */
IdSet
abp_ledger_delivered_before(const Delivery *delivery, int64 ledger_from)
{
	IdWalk		walk = {0};
	IdSet		before = {0};

	PushActiveSnapshot(GetLatestSnapshot());
	while (abp_idset_walk(&delivery->ids, &walk))
	{
		if (abp_ledger_last_delivered(delivery->usage_table, walk.id, ledger_from) != 0)
			abp_idset_add(&before, walk.id, walk.id, CurrentMemoryContext);
	}
	PopActiveSnapshot();
	return before;
}

/*
 * Has Polar got a row, as far as the ledger knows?
 */
bool
abp_ledger_has(Oid usage_table, int64 id, int64 ledger_from)
{
	bool		found;

	PushActiveSnapshot(GetLatestSnapshot());
	found = abp_ledger_last_delivered(usage_table, id, ledger_from) != 0;
	PopActiveSnapshot();
	return found;
}

/* May a delivery without an answer have brought a row that it misses now? */
static bool
may_have_brought(HeapTuple tuple, TupleDesc desc, int64 id, uint32 key)
{
	Vanished	missed = {{0}};
	bool		isnull;
	Datum		keys;

	if (!DatumGetBool(heap_getattr(tuple, Anum_delivery_outcome_unknown, desc, &isnull)) ||
		!delivery_holds(tuple, Anum_delivery_vanished_ids, desc, id))
		return false;
	keys = heap_getattr(tuple, Anum_delivery_vanished_keys, desc, &isnull);
	if (!isnull)
		abp_vanished_read_keys(&missed, DatumGetByteaPP(keys));
	return abp_vanished_may_be(&missed, id, key);
}

/*
 * May Polar have a row that was gone when it was to be sent again?  "key" is the
 * checksum of its external_id.
 */
bool
abp_ledger_may_have_missed(Oid usage_table, int64 id, uint32 key, int64 ledger_from)
{
	ScanKeyData scan_key;
	OrderedScan scan;
	HeapTuple	tuple;
	bool		found = false;

	ScanKeyInit(&scan_key, Anum_delivery_usage_table, BTEqualStrategyNumber, F_OIDEQ,
				ObjectIdGetDatum(usage_table));
	PushActiveSnapshot(GetLatestSnapshot());
	abp_scan_begin(&scan, "ledger", "ledger_vanished", 1, &scan_key, AccessShareLock);
	while (!found && (tuple = abp_scan_next(&scan)) != NULL)
		found = DELIVERY_FORM(tuple)->id > ledger_from &&
			may_have_brought(tuple, RelationGetDescr(scan.rel), id, key);
	abp_scan_end(&scan);
	PopActiveSnapshot();
	return found;
}

/*
 * How many transactions ago a delivery of this table changed last, 0 if it has
 * none: what is younger has come after all of them.
 */
int32
abp_ledger_age(Oid usage_table)
{
	static Statement youngest = {
		"SELECT coalesce(min(pg_catalog.age(d.xmin)), 0) FROM aibilling.ledger d WHERE d.usage_table = $1",
		1, {REGCLASSOID}
	};
	Datum		values[1] = {ObjectIdGetDatum(usage_table)};
	bool		isnull;
	int32		age;
	SavedUser	saved;

	(void) abp_statement_open(&youngest, values, NULL, &saved);
	age = DatumGetInt32(abp_result_datum(0, 1, &isnull));
	abp_statement_close(&saved);
	return age;
}

/*
 * All ids of a table that are in flight or delivered since its last TRUNCATE,
 * by the active snapshot, in the current memory context.
 */
IdSet
abp_ledger_ids(Oid usage_table, int64 ledger_from)
{
	static Statement known = {
		"SELECT d.usage_ids FROM aibilling.ledger d WHERE d.usage_table = $1"
		" AND (d.state = 'sending' OR d.state = 'delivered' AND d.id > $2)",
		2, {REGCLASSOID, INT8OID}, true
	};
	Datum		values[2] = {ObjectIdGetDatum(usage_table), Int64GetDatum(ledger_from)};

	return abp_statement_ids(&known, values);
}

/*
 * All ids of a table that are in flight, by the active snapshot, in the current
 * memory context.
 */
IdSet
abp_ledger_sending_ids(Oid usage_table)
{
	static Statement sending = {
		"SELECT d.usage_ids FROM aibilling.ledger d WHERE d.usage_table = $1 AND d.state = 'sending'",
		1, {REGCLASSOID}, true
	};
	Datum		values[1] = {ObjectIdGetDatum(usage_table)};

	return abp_statement_ids(&sending, values);
}

/*
 * The deliveries of a table, since its last TRUNCATE, that found rows gone, first
 * those whose outcome is unknown: a list of Delivery with id, vanished_rows and
 * outcome_unknown, in the current memory context.
 */
List	   *
abp_ledger_vanished(Oid usage_table, int64 ledger_from)
{
	static Statement vanished = {
		"SELECT d.id, d.vanished_ids, d.outcome_unknown, d.vanished_keys FROM aibilling.ledger d"
		" WHERE d.usage_table = $1 AND d.vanished_ids IS NOT NULL AND d.id > $2"
		" ORDER BY d.outcome_unknown DESC, d.id",
		2, {REGCLASSOID, INT8OID}
	};
	Datum		values[2] = {ObjectIdGetDatum(usage_table), Int64GetDatum(ledger_from)};
	List	   *list = NIL;
	MemoryContext caller = CurrentMemoryContext;
	uint64		n;
	SavedUser	saved;

	n = abp_statement_open(&vanished, values, NULL, &saved);
	for (uint64 i = 0; i < n; i++)
	{
		Delivery   *delivery = MemoryContextAllocZero(caller, sizeof(Delivery));
		MemoryContext spi = MemoryContextSwitchTo(caller);
		Datum		keys;
		bool		isnull;

		delivery->id = abp_result_int64(i, 1, 0);
		delivery->usage_table = usage_table;
		delivery->vanished_rows.ids = abp_result_idset(i, 2, caller);
		delivery->outcome_unknown = DatumGetBool(abp_result_datum(i, 3, &isnull));
		keys = abp_result_datum(i, 4, &isnull);
		if (!isnull)
			abp_vanished_read_keys(&delivery->vanished_rows, DatumGetByteaPP(keys));
		list = lappend(list, delivery);
		MemoryContextSwitchTo(spi);
	}
	abp_statement_close(&saved);
	return list;
}

/*
 * Rows that a delivery found gone are there again.
 */
void
abp_ledger_returned(const Delivery *delivery, IdSet *ids)
{
	static Statement returned = {
		"UPDATE aibilling.ledger SET vanished_ids = nullif(vanished_ids - $2, '{}'),"
		" vanished_keys = CASE WHEN NOT vanished_ids <@ $2 THEN vanished_keys END"
		" WHERE id = $1",
		2, {INT8OID, INT8MULTIRANGEOID}
	};
	Datum		values[2] = {Int64GetDatum(delivery->id), abp_idset_to_multirange(ids)};

	abp_statement_run_alone(&returned, values, NULL);
}

/*
 * What is summed up of a table's deliveries is added to "totals".  *up_to is
 * the last of them, *all_up_to the last that is summed up of any table: later
 * ones are not summed up, and of this table there are none between the two.
 */
static void
add_summed_up(Oid usage_table, LedgerTotals *totals, int64 *up_to, int64 *all_up_to)
{
	Relation	rel = table_open(abp_extension_needed("delivery_total"), AccessShareLock);
	SysScanDesc scan = systable_beginscan(rel, InvalidOid, false, GetActiveSnapshot(), 0, NULL);
	HeapTuple	tuple;

	*up_to = *all_up_to = 0;
	while ((tuple = systable_getnext(scan)) != NULL)
	{
		const DeliveryTotalForm *form = (const DeliveryTotalForm *) GETSTRUCT(tuple);

		*all_up_to = Max(*all_up_to, form->up_to);
		if (form->usage_table != usage_table)
			continue;
		*up_to = form->up_to;
		totals->deliveries += form->deliveries;
		totals->delivered += form->delivered;
		totals->duplicates += form->duplicates;
		totals->unexpected_duplicates += form->unexpected_duplicates;
		totals->vanished += form->vanished;
	}
	systable_endscan(scan);
	table_close(rel, NoLock);
}

/* Add one delivery to "totals": its numbers, unless they are summed up. */
static void
add_delivery(LedgerTotals *totals, HeapTuple tuple, TupleDesc desc, bool summed_up)
{
	Datum		values[MaxHeapAttributeNumber];
	bool		nulls[MaxHeapAttributeNumber];
	char	   *state;

#define VALUE(column) values[Anum_delivery_##column - 1]
#define IS_NULL(column) nulls[Anum_delivery_##column - 1]

	heap_deform_tuple(tuple, desc, values, nulls);
	state = TextDatumGetCString(VALUE(state));
	if (strcmp(state, "sending") == 0)
		totals->in_flight += DatumGetInt32(VALUE(events));
	else if (strcmp(state, "delivered") == 0)
	{
		if (!summed_up)
		{
			totals->deliveries++;
			totals->delivered += DatumGetInt32(VALUE(events));
		}
		if (TIMESTAMP_NOT_FINITE(totals->last_delivery))
			totals->last_delivery = DatumGetTimestampTz(VALUE(finished_at));
	}
	pfree(state);

	if (!summed_up)
	{
		if (!IS_NULL(duplicates))
			totals->duplicates += DatumGetInt64(VALUE(duplicates));
		totals->unexpected_duplicates += DatumGetInt64(VALUE(unexpected_duplicates));
		totals->vanished += DatumGetInt64(VALUE(vanished));
	}
	if (totals->last_error == NULL && !IS_NULL(error))
	{
		totals->last_error = TextDatumGetCString(VALUE(error));
		totals->last_error_at = IS_NULL(finished_at) ? DT_NOEND :
			DatumGetTimestampTz(VALUE(finished_at));
	}

#undef VALUE
#undef IS_NULL
}

/* Begin a scan over the deliveries of ids above or up to one. */
static void
begin_delivery_scan(OrderedScan *scan, StrategyNumber strategy, RegProcedure compare, int64 id)
{
	ScanKeyData key;

	ScanKeyInit(&key, Anum_delivery_id, strategy, compare, Int64GetDatum(id));
	abp_scan_begin(scan, "ledger", "ledger_pkey", 1, &key, AccessShareLock);
}

/*
 * What the ledger tells of a table, in the current memory context.  Without
 * SQL: three statements take a new session longer to plan than to run.
 */
void
abp_ledger_totals(Oid usage_table, LedgerTotals *totals)
{
	OrderedScan scan;
	HeapTuple	tuple;
	int64		up_to;
	int64		all_up_to;

	memset(totals, 0, sizeof(*totals));
	totals->last_delivery = DT_NOBEGIN;
	totals->last_error_at = DT_NOEND;
	PushActiveSnapshot(GetLatestSnapshot());
	add_summed_up(usage_table, totals, &up_to, &all_up_to);

	begin_delivery_scan(&scan, BTGreaterStrategyNumber, F_INT8GT, all_up_to);
	while ((tuple = systable_getnext_ordered(scan.scan, BackwardScanDirection)) != NULL)
	{
		CHECK_FOR_INTERRUPTS();

		if (DELIVERY_FORM(tuple)->usage_table == usage_table)
			add_delivery(totals, tuple, RelationGetDescr(scan.rel), false);
	}
	abp_scan_end(&scan);

	/* The last delivery and the last error may be summed up already. */
	begin_delivery_scan(&scan, BTLessEqualStrategyNumber, F_INT8LE, up_to);
	for (int seen = 0;; seen++)
	{
		bool		wants_delivery = totals->deliveries > 0 &&
		TIMESTAMP_NOT_FINITE(totals->last_delivery);
		bool		wants_error = totals->last_error == NULL && seen < LEDGER_ERRORS;

		CHECK_FOR_INTERRUPTS();

		if (!wants_delivery && !wants_error)
			break;
		tuple = systable_getnext_ordered(scan.scan, BackwardScanDirection);
		if (tuple == NULL)
			break;
		if (DELIVERY_FORM(tuple)->usage_table == usage_table)
			add_delivery(totals, tuple, RelationGetDescr(scan.rel), true);
	}
	abp_scan_end(&scan);
	PopActiveSnapshot();
}

/*
 * Add what is settled to the totals.  For the shipper only: below the oldest
 * unsettled delivery nothing changes any more.
 */
void
abp_ledger_sum_up(void)
{
	static Statement sum_up = {
		"INSERT INTO aibilling.delivery_total AS t"
		" SELECT n.usage_table, n.up_to, r.* FROM"
		" (SELECT d.usage_table, max(d.id) AS up_to FROM aibilling.ledger d"
		"  WHERE d.id > (SELECT coalesce(max(o.up_to), 0) FROM aibilling.delivery_total o)"
		"  AND d.id < coalesce((SELECT min(u.id) FROM aibilling.ledger u"
		"   WHERE u.state = 'sending'), 9223372036854775807)"
		"  GROUP BY d.usage_table) n"
		" LEFT JOIN aibilling.delivery_total o ON o.usage_table = n.usage_table,"
		" LATERAL (SELECT count(*) FILTER (WHERE d.state = 'delivered') AS deliveries,"
		"  coalesce(sum(d.events) FILTER (WHERE d.state = 'delivered'), 0)::pg_catalog.int8 AS delivered,"
		"  coalesce(sum(d.duplicates), 0)::pg_catalog.int8 AS duplicates,"
		"  coalesce(sum(d.unexpected_duplicates), 0)::pg_catalog.int8 AS unexpected_duplicates,"
		"  coalesce(sum(d.vanished), 0)::pg_catalog.int8 AS vanished"
		"  FROM aibilling.ledger d WHERE d.usage_table = n.usage_table"
		"  AND d.id > coalesce(o.up_to, 0) AND d.id <= n.up_to) r"
		" ON CONFLICT (usage_table) DO UPDATE SET up_to = excluded.up_to,"
		" deliveries = t.deliveries + excluded.deliveries,"
		" delivered = t.delivered + excluded.delivered,"
		" duplicates = t.duplicates + excluded.duplicates,"
		" unexpected_duplicates = t.unexpected_duplicates + excluded.unexpected_duplicates,"
		" vanished = t.vanished + excluded.vanished",
		0, {0}
	};

	abp_statement_run_alone(&sum_up, NULL, NULL);
}

/*
 * How many requests went to a server in the last minute, counting up to
 * "limit": what is left of its quota after a restart.
 */
int
abp_ledger_recent_requests(const char *server, int limit)
{
	static Statement recent = {
		"SELECT coalesce(sum(r.attempts), 0)::pg_catalog.int8 FROM"
		" (SELECT d.attempts, d.started_at FROM aibilling.ledger d"
		"  WHERE d.server = $1 ORDER BY d.id DESC LIMIT $2) r"
		" WHERE r.started_at > pg_catalog.clock_timestamp() - interval '1 minute'",
		2, {NAMEOID, INT4OID}
	};
	Datum		values[2] = {
		DirectFunctionCall1(namein, CStringGetDatum(server)), Int32GetDatum(limit)
	};
	int			count;
	SavedUser	saved;

	abp_statement_open(&recent, values, NULL, &saved);
	count = Min(abp_result_int64(0, 1, 0), limit);
	abp_statement_close(&saved);
	return count;
}
