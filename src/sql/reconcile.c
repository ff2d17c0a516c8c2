/*-------------------------------------------------------------------------
 *
 * reconcile.c
 *	  SQL functions that compare a usage table with what Polar has: reconcile,
 *	  reconcile_rows.
 *
 * A row is compared as the event that it is sent as, by its external_id.  Days
 * are days of UTC.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "common/int.h"
#include "executor/spi.h"
#include "fmgr.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/date.h"
#include "utils/datetime.h"
#include "utils/fmgrprotos.h"
#include "utils/hsearch.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/numeric.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

#include "base/json_member.h"
#include "base/numeric_math.h"
#include "base/rights.h"
#include "compat.h"
#include "polar/event.h"
#include "queue/corrections.h"
#include "queue/ledger.h"
#include "queue/outbox.h"
#include "queue/place.h"
#include "ship/guard.h"
#include "ship/polar_events.h"
#include "ship/user_code.h"
#include "usage/attach.h"
#include "usage/rows.h"
#include "usage/share_key.h"

PG_FUNCTION_INFO_V1(abp_sql_reconcile);
PG_FUNCTION_INFO_V1(abp_sql_reconcile_rows);

/* Events that are asked for by their external_id at once: a URL has its limits. */
#define IDS_PER_REQUEST 40

/* Rows read at a time. */
#define RECONCILE_CHUNK 1000

/* Polar's meters begin on 2023-01-01. */
#define FIRST_METERED_DAY (date2j(2023, 1, 1) - POSTGRES_EPOCH_JDATE)

typedef enum Finding
{
	NO_FINDING,
	MISSING_AT_POLAR,
	UNKNOWN_HERE,
	AMOUNT_DIFFERS,
	CUSTOMER_DIFFERS,
	NOT_SENT_YET,
	PARENT_UNKNOWN
} Finding;

#define NUM_FINDINGS (PARENT_UNKNOWN + 1)

static const char *const finding_names[NUM_FINDINGS] = {
	NULL, "missing at Polar", "unknown here", "amount differs", "customer differs",
	"not sent yet", "parent unknown"
};

/* A row of the usage table, as the event that it is, and what Polar has of it. */
typedef struct HereRow
{
	ExternalIdKey external_id;	/* hash key */
	int64		id;
	int			day;			/* of occurred_at, as DateADT */
	RowWhere	where;
	const char *parent_id;		/* or NULL */
	Numeric		cost_nanos;		/* what the event says; or NULL */
	Numeric		cost_cents;		/* likewise */
	const char *customer_id;	/* likewise, one of these */
	const char *external_customer_id;
	bool		there;
	bool		same_amount;
	bool		same_customer;
	Numeric		nanos_there;	/* or NULL */
} HereRow;

/* An event that no row in the time asked for explains. */
typedef struct ThereEvent
{
	const char *external_id;	/* or NULL */
	int			day;
	Numeric		nanos;			/* or NULL */
	bool		known;			/* by some row after all */
} ThereEvent;

/* A day of the result. */
typedef struct Day
{
	int			day;			/* hash key, DateADT */
	int64		rows_here;
	int64		rows_there;
	Numeric		nanos_here;
	Numeric		nanos_there;
	int64		findings[NUM_FINDINGS];
	int64		part_here;		/* of nanos_here, not added yet */
	Numeric		nanos_waiting;	/* by the meter: of rows_here, what is not
								 * sent */
	int64		part_waiting;
	Numeric		nanos_flying;	/* and what may have arrived */
	int64		part_flying;
} Day;

typedef struct Reconciling
{
	UsageTable *table;
	const ServerOptions *server;
	TimestampTz from_time;
	TimestampTz to_time;
	pg_uuid_t  *meter;			/* NULL: by the events */
	HTAB	   *here;			/* HereRow */
	HTAB	   *ids;			/* of what is asked for by external_id: those
								 * that came */
	List	   *there;			/* of ThereEvent */
	int64		events;			/* read so far */
	HTAB	   *days;			/* Day */
	bool		by_row;			/* reconcile_rows */
	ReturnSetInfo *result;
	MemoryContext context;
} Reconciling;

/* A copy in the current memory context; NULL stays NULL. */
static Numeric
copy_number(Numeric number)
{
	return number == NULL ? NULL : DatumGetNumericCopy(NumericGetDatum(number));
}

/* Add to a sum, of which a part is kept apart: a numeric for each row is too much. */
static void
add_nanos(Numeric *sum, int64 *part, int64 nanos)
{
	int64		both;

	if (pg_add_s64_overflow(*part, nanos, &both))
	{
		*sum = numeric_plus(*sum, int64_to_numeric(*part));
		both = nanos;
	}
	*part = both;
}

/* Do both say the same number, or none? */
static bool
same_number(Numeric a, Numeric b)
{
	if (a == NULL || b == NULL)
		return a == b;
	return numeric_equal(a, b);
}

/* The same number but for what a double makes of it? */
static bool
close_number(Numeric a, Numeric b)
{
	if (a == NULL || b == NULL)
		return a == b;
	return numeric_compare(numeric_magnitude(numeric_minus(a, b)),
						   numeric_times(numeric_magnitude(a), numeric_of_text("1e-15"))) <= 0;
}

/* Nano-dollars of an amount in cents. */
static Numeric
nanos_of_cents(Numeric cents)
{
	return numeric_rounded(numeric_times(cents, int64_to_numeric(10000000)), 0);
}

/* Are both there, and the same but for upper and lower case? */
static bool
same_ignoring_case(const char *a, const char *b)
{
	return a != NULL && b != NULL && pg_strcasecmp(a, b) == 0;
}

/* --- rows here ------------------------------------------------------------------------- */

/* The rows of a reconciliation by events, all of them in one part. */
typedef struct RowsHere
{
	Reconciling *work;
	IdSet	   *ids;
} RowsHere;

/* Raises program_limit_exceeded if there are too many rows. */
static void
take_ids(SPITupleTable *part, uint64 nrows, void *arg)
{
	RowsHere   *here = arg;

	if (nrows > MAX_EVENTS_READ)
		ereport(ERROR,
				(errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED),
				 errmsg("%s has more than %d rows in this time", here->work->table->name, MAX_EVENTS_READ),
				 errhint("Events are compared one by one: ask for a shorter time, or compare days by a meter, with aibilling.reconcile(..., meter_id => ...).")));
	abp_rows_query_ids(part, nrows, here->ids, here->work->context);
}

/* Add the ids of the rows that occurred in the time asked for. */
static void
find_rows(Reconciling *work, IdSet *ids)
{
	Oid			argtypes[2] = {TIMESTAMPTZOID, TIMESTAMPTZOID};
	Datum		args[2] = {TimestampTzGetDatum(work->from_time), TimestampTzGetDatum(work->to_time)};
	RowsHere	here = {work, ids};

	abp_rows_query(work->table,
				   psprintf("SELECT id::pg_catalog.int8 FROM %s"
							" WHERE occurred_at >= $1 AND occurred_at < $2", work->table->name),
				   2, argtypes, args, MAX_EVENTS_READ + 1, take_ids, &here);
}

/* What a row's event says, as it is or would be sent. */
static void
read_own_event(Reconciling *work, HereRow *here, const UsageRow *row, Jsonb *whole)
{
	EventOverrides overrides = {{NULL}};
	StringInfoData body;
	StringInfoData reason;
	char	   *problem = NULL;
	Jsonb	   *event;
	JsonbValue	metadata;
	JsonbValue	cost;

	initStringInfo(&body);
	initStringInfo(&reason);
	if (abp_user_code_call(work->server, whole, &overrides, &problem) != GUARD_DONE ||
		!abp_event_encode(&body, row, &work->server->format, &overrides, &reason))
		return;					/* it is rejected, or will be */

	event = DatumGetJsonbP(DirectFunctionCall1(jsonb_in, CStringGetDatum(body.data)));
	here->customer_id = abp_json_member_string(&event->root, "customer_id");
	here->external_customer_id = abp_json_member_string(&event->root, "external_customer_id");
	if (!abp_json_member(&event->root, "metadata", &metadata) || metadata.type != jbvBinary)
		return;
	here->cost_nanos = copy_number(abp_json_member_number(metadata.val.binary.data, "cost_nanos"));
	if (abp_json_member(metadata.val.binary.data, "_cost", &cost) && cost.type == jbvBinary)
		here->cost_cents = copy_number(abp_json_member_number(cost.val.binary.data, "amount"));
	if (abp_json_member_string(metadata.val.binary.data, "external_id") == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("events of server \"%s\" cannot be told apart at Polar", work->server->name),
				 errdetail("Polar gives an event's external_id back only in its metadata, and metadata_function leaves it out."),
				 errhint("Let the function keep the key external_id.")));
}

/* What is to be known of a row here when its event comes. */
static bool
keep_row(const UsageRow *row, Jsonb *whole, void *arg)
{
	Reconciling *work = arg;
	MemoryContext old = MemoryContextSwitchTo(work->context);
	ExternalIdKey key;
	HereRow    *here;
	RowPlace	place;
	bool		found;

	if (row->external_id.len <= MAX_EXTERNAL_ID_LEN)
	{
		abp_corrections_key(&key, row->external_id.data, row->external_id.len);
		here = hash_search(work->here, &key, HASH_ENTER, &found);
		memset((char *) here + sizeof(ExternalIdKey), 0, sizeof(HereRow) - sizeof(ExternalIdKey));
		here->id = row->id;
		here->day = abp_share_key_day(row->occurred_at);
		if (row->parent_id.data != NULL)
			here->parent_id = pnstrdup(row->parent_id.data, row->parent_id.len);
		if (row->has_cost_nanos)
			here->cost_nanos = int64_to_numeric(row->cost_nanos);
		read_own_event(work, here, row, whole);
		here->where = ROW_IN_OUTBOX;	/* what is being taken out of it */
		if (abp_place_find_at_once(work->table->relid, row->id, work->table->ledger_from, &place))
			here->where = place.where;
	}
	MemoryContextSwitchTo(old);
	return true;
}

/* --- events there ------------------------------------------------------------------------ */

/* The row of this external_id, or NULL. */
static HereRow *
find_here(const Reconciling *work, const char *external_id)
{
	ExternalIdKey key;

	if (external_id == NULL || strlen(external_id) > MAX_EXTERNAL_ID_LEN)
		return NULL;
	abp_corrections_key(&key, external_id, strlen(external_id));
	return hash_search(work->here, &key, HASH_FIND, NULL);
}

/* An event and the row that it was made of. */
static void
compare_event(HereRow *here, const PolarEvent *event)
{
	bool		same_cents = close_number(here->cost_cents, event->cost_cents);

	here->there = true;
	here->same_amount = same_cents && same_number(here->cost_nanos, event->cost_nanos);
	here->nanos_there = copy_number(event->cost_nanos);
	if (!same_cents && event->cost_cents != NULL && same_number(here->cost_nanos, event->cost_nanos))
		here->nanos_there = nanos_of_cents(event->cost_cents);

	if (here->customer_id != NULL)
		here->same_customer = same_ignoring_case(here->customer_id, event->customer_id);
	else if (here->external_customer_id != NULL)
	{
		const char *stored = event->external_customer_id != NULL ?
		event->external_customer_id : event->linked_customer;

		here->same_customer = stored != NULL && strcmp(stored, here->external_customer_id) == 0 &&
			(event->linked_customer == NULL ||
			 strcmp(event->linked_customer, here->external_customer_id) == 0);
	}
	else
		here->same_customer = true; /* it is rejected here */
}

/* An event that Polar has: of a row here, or of none. */
static bool
take_event(const PolarEvent *event, void *arg)
{
	Reconciling *work = arg;
	MemoryContext old = MemoryContextSwitchTo(work->context);
	HereRow    *here = find_here(work, event->external_id);

	if (++work->events > MAX_EVENTS_READ)
		ereport(ERROR,
				(errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED),
				 errmsg("Polar has more than %d events in this time", MAX_EVENTS_READ),
				 errhint("Events are compared one by one: ask for a shorter time, or compare days by a meter, with aibilling.reconcile(..., meter_id => ...).")));
	if (here != NULL)
		compare_event(here, event);
	else
	{
		ThereEvent *there = palloc0(sizeof(ThereEvent));

		there->external_id = event->external_id == NULL ? NULL : pstrdup(event->external_id);
		there->day = abp_share_key_day(event->timestamp);
		there->nanos = event->cost_nanos != NULL ? copy_number(event->cost_nanos) :
			event->cost_cents != NULL ? nanos_of_cents(event->cost_cents) : NULL;
		work->there = lappend(work->there, there);
	}
	MemoryContextSwitchTo(old);
	return true;
}

/* An event that was asked for by its external_id. */
static bool
take_asked(const PolarEvent *event, void *arg)
{
	Reconciling *work = arg;
	MemoryContext old = MemoryContextSwitchTo(work->context);
	HereRow    *here = find_here(work, event->external_id);
	ExternalIdKey key;

	if (here != NULL)
		compare_event(here, event);
	if (event->external_id != NULL && strlen(event->external_id) <= MAX_EXTERNAL_ID_LEN)
	{
		abp_corrections_key(&key, event->external_id, strlen(event->external_id));
		(void) hash_search(work->ids, &key, HASH_ENTER, NULL);
	}
	MemoryContextSwitchTo(old);
	return true;
}

/* Ask for events by their external_ids, a list of char *. */
static void
ask_for(Reconciling *work, Reader *reader, List *external_ids)
{
	EventQuery	query = {.from_time = DT_NOBEGIN,.to_time = DT_NOEND,.only_sent = true};
	ListCell   *lc;

	foreach(lc, external_ids)
	{
		query.external_ids = lappend(query.external_ids, lfirst(lc));
		if (list_length(query.external_ids) == IDS_PER_REQUEST || lnext(external_ids, lc) == NULL)
		{
			(void) abp_polar_events_read(reader, &query, take_asked, work);
			list_free(query.external_ids);
			query.external_ids = NIL;
		}
	}
}

/* Rows that should be there, and whose event has not come: is it there after all? */
static void
ask_for_missing(Reconciling *work, Reader *reader)
{
	HASH_SEQ_STATUS scan;
	HereRow    *here;
	List	   *missing = NIL;
	List	   *parents = NIL;

	hash_seq_init(&scan, work->here);
	while ((here = hash_seq_search(&scan)) != NULL)
	{
		if (here->where == ROW_DELIVERED && !here->there)
			missing = lappend(missing, here->external_id.text);
	}
	ask_for(work, reader, missing);

	hash_seq_init(&scan, work->here);
	while ((here = hash_seq_search(&scan)) != NULL)
	{
		if (here->where == ROW_DELIVERED && !here->there && here->parent_id != NULL &&
			strlen(here->parent_id) <= MAX_EXTERNAL_ID_LEN)
			parents = lappend(parents, unconstify(char *, here->parent_id));
	}
	ask_for(work, reader, parents);
}

/* Which of the events that no row explained are of a usage table of the server's? */
static void
find_known(Reconciling *work)
{
	bool		armed;
	ListCell   *lc;
	List	   *external_ids = NIL;
	HTAB	   *known;
	HASHCTL		ctl = {
		.keysize = sizeof(ExternalIdKey),
		.entrysize = sizeof(ExternalIdKey),
		.hcxt = work->context
	};

	foreach(lc, work->there)
	{
		ThereEvent *there = lfirst(lc);

		if (there->external_id != NULL && strlen(there->external_id) <= MAX_EXTERNAL_ID_LEN)
			external_ids = lappend(external_ids, unconstify(char *, there->external_id));
	}
	if (external_ids == NIL)
		return;
	known = hash_create("aibilling_polar known events", 1024, &ctl, HASH_ELEM | HASH_BLOBS | HASH_CONTEXT);

	/* rows that have come since this call began are known, too */
	PushActiveSnapshot(GetLatestSnapshot());
	foreach(lc, abp_attachments(&armed))
	{
		UsageTable *table = lfirst(lc);
		uint64		nrows;
		SavedUser	saved;

		if (!OidIsValid(table->owner) || strcmp(table->server, work->table->server) != 0)
			continue;
		nrows = abp_rows_named(table, "u.external_id::pg_catalog.text", external_ids, false, &saved);
		for (uint64 i = 0; i < nrows; i++)
		{
			char	   *external_id = abp_result_string(i, 1, CurrentMemoryContext);
			ExternalIdKey key;

			abp_corrections_key(&key, external_id, strlen(external_id));
			(void) hash_search(known, &key, HASH_ENTER, NULL);
		}
		abp_statement_close(&saved);
	}
	PopActiveSnapshot();

	foreach(lc, work->there)
	{
		ThereEvent *there = lfirst(lc);
		ExternalIdKey key;

		if (there->external_id == NULL || strlen(there->external_id) > MAX_EXTERNAL_ID_LEN)
			continue;
		abp_corrections_key(&key, there->external_id, strlen(there->external_id));
		there->known = hash_search(known, &key, HASH_FIND, NULL) != NULL;
	}
	hash_destroy(known);
}

/* What is to be said of a row, once all events have been read. */
static Finding
finding_of(const Reconciling *work, const HereRow *here)
{
	ExternalIdKey key;

	if (here->there)
		return !here->same_amount ? AMOUNT_DIFFERS :
			!here->same_customer ? CUSTOMER_DIFFERS : NO_FINDING;
	if (here->where == ROW_NOT_SENT)
		return NO_FINDING;
	if (here->where != ROW_DELIVERED)
		return NOT_SENT_YET;
	if (here->parent_id == NULL || strlen(here->parent_id) > MAX_EXTERNAL_ID_LEN)
		return here->parent_id == NULL ? MISSING_AT_POLAR : PARENT_UNKNOWN;
	abp_corrections_key(&key, here->parent_id, strlen(here->parent_id));
	return hash_search(work->ids, &key, HASH_FIND, NULL) != NULL ? MISSING_AT_POLAR : PARENT_UNKNOWN;
}

/* --- the result ------------------------------------------------------------------------------ */

/* A day of the result, made if it is not there yet. */
static Day *
get_day(Reconciling *work, int number)
{
	bool		found;
	Day		   *day = hash_search(work->days, &number, HASH_ENTER, &found);

	if (!found)
	{
		memset((char *) day + sizeof(int), 0, sizeof(Day) - sizeof(int));
		day->nanos_here = day->nanos_there = int64_to_numeric(0);
		day->nanos_waiting = day->nanos_flying = int64_to_numeric(0);
	}
	return day;
}

/* Return what is found of a row or event; NULL for what is not there. */
static void
put_row(Reconciling *work, const char *external_id, Finding finding, Numeric here, Numeric there)
{
	Datum		values[4];
	bool		nulls[4] = {external_id == NULL, false, here == NULL, there == NULL};

	if (external_id != NULL)
		values[0] = CStringGetTextDatum(external_id);
	values[1] = CStringGetTextDatum(finding_names[finding]);
	if (here != NULL)
		values[2] = NumericGetDatum(here);
	if (there != NULL)
		values[3] = NumericGetDatum(there);
	tuplestore_putvalues(work->result->setResult, work->result->setDesc, values, nulls);
}

/* Count a row and its event on its day, or put it out if there is a finding. */
static void
conclude_row(Reconciling *work, HereRow *here)
{
	Finding		finding = finding_of(work, here);
	Day		   *day;

	if (work->by_row)
	{
		if (finding != NO_FINDING)
			put_row(work, here->external_id.text, finding, here->cost_nanos,
					here->there ? here->nanos_there : NULL);
		return;
	}
	if (here->where == ROW_NOT_SENT && !here->there)
		return;
	day = get_day(work, here->day);
	day->rows_here++;
	if (here->cost_nanos != NULL)
		day->nanos_here = numeric_plus(day->nanos_here, here->cost_nanos);
	if (here->there)
	{
		day->rows_there++;
		if (here->nanos_there != NULL)
			day->nanos_there = numeric_plus(day->nanos_there, here->nanos_there);
	}
	day->findings[finding]++;
}

/* An event of no row here is another's, or its row was deleted. */
static void
conclude_event(Reconciling *work, const ThereEvent *there)
{
	Day		   *day;

	if (there->known)
		return;
	if (work->by_row)
	{
		put_row(work, there->external_id, UNKNOWN_HERE, NULL, there->nanos);
		return;
	}
	day = get_day(work, there->day);
	day->rows_there++;
	if (there->nanos != NULL)
		day->nanos_there = numeric_plus(day->nanos_there, there->nanos);
	day->findings[UNKNOWN_HERE]++;
}

/* What is found of a day, in words, or NULL. */
static char *
words_of(const Day *day)
{
	StringInfoData words;

	initStringInfo(&words);
	for (int i = NO_FINDING + 1; i < NUM_FINDINGS; i++)
	{
		if (day->findings[i] > 0)
			appendStringInfo(&words, "%s" INT64_FORMAT " %s", words.len > 0 ? ", " : "",
							 day->findings[i], finding_names[i]);
	}
	return words.len == 0 ? NULL : words.data;
}

static int
compare_days(const void *a, const void *b)
{
	int			one = (*(Day *const *) a)->day;
	int			other = (*(Day *const *) b)->day;

	return (one > other) - (one < other);
}

/* Return the days in order.  A meter does not count events. */
static void
put_days(Reconciling *work)
{
	long		ndays = hash_get_num_entries(work->days);
	Day		  **days = palloc(sizeof(Day *) * Max(1, ndays));
	HASH_SEQ_STATUS scan;
	Day		   *day;
	int			n = 0;

	hash_seq_init(&scan, work->days);
	while ((day = hash_seq_search(&scan)) != NULL)
		days[n++] = day;
	qsort(days, n, sizeof(Day *), compare_days);
	for (int i = 0; i < n; i++)
	{
		Datum		values[6];
		bool		nulls[6] = {false};
		char	   *words = words_of(days[i]);

		values[0] = DateADTGetDatum(days[i]->day);
		values[1] = Int64GetDatum(days[i]->rows_here);
		nulls[2] = work->meter != NULL;
		values[2] = Int64GetDatum(days[i]->rows_there);
		values[3] = NumericGetDatum(days[i]->nanos_here);
		values[4] = NumericGetDatum(days[i]->nanos_there);
		nulls[5] = words == NULL;
		if (words != NULL)
			values[5] = CStringGetTextDatum(words);
		tuplestore_putvalues(work->result->setResult, work->result->setDesc, values, nulls);
	}
}

/* --- by the events ------------------------------------------------------------------------- */

/* Event by event: all rows here, then all events there. */
static void
compare_events(Reader *reader, void *arg)
{
	Reconciling *work = arg;
	EventQuery	query = {.from_time = work->from_time,.to_time = work->to_time,.only_sent = true};
	IdSet		ids = {0};
	HASH_SEQ_STATUS scan;
	HereRow    *here;
	ListCell   *lc;

	work->server = reader->server;
	find_rows(work, &ids);
	(void) abp_rows_read(work->table, &ids, reader->server->event_name_function != NULL ||
						 reader->server->metadata_function != NULL, keep_row, work);
	(void) abp_polar_events_read(reader, &query, take_event, work);
	ask_for_missing(work, reader);
	find_known(work);

	hash_seq_init(&scan, work->here);
	while ((here = hash_seq_search(&scan)) != NULL)
		conclude_row(work, here);
	foreach(lc, work->there)
		conclude_event(work, lfirst(lc));
}

/* --- by a meter ------------------------------------------------------------------------------ */

/* Where the rows of a table are, at one moment: they come and go between these. */
typedef struct Whereabouts
{
	Reconciling *work;
	IdSet		waiting;
	IdSet		flying;
	IdSet		known;
} Whereabouts;

/* Rows that were never queued, and Polar does not have, are passed over. */
static void
add_up_part(SPITupleTable *part, uint64 nrows, void *arg)
{
	Whereabouts *where = arg;
	MemoryContext old = MemoryContextSwitchTo(where->work->context);

	for (uint64 i = 0; i < nrows; i++)
	{
		bool		isnull;
		int64		id = DatumGetInt64(SPI_getbinval(part->vals[i], part->tupdesc, 1, &isnull));
		TimestampTz occurred_at = DatumGetTimestampTz(SPI_getbinval(part->vals[i], part->tupdesc, 2, &isnull));
		Datum		nanos = SPI_getbinval(part->vals[i], part->tupdesc, 3, &isnull);
		bool		flies = abp_idset_contains(&where->flying, id);
		bool		waits = !flies && abp_idset_contains(&where->waiting, id);
		Day		   *day;

		if (!waits && !flies && !abp_idset_contains(&where->known, id))
			continue;
		day = get_day(where->work, abp_share_key_day(occurred_at));
		day->rows_here++;
		if (waits || flies)
			day->findings[NOT_SENT_YET]++;
		if (isnull)
			continue;
		add_nanos(&day->nanos_here, &day->part_here, DatumGetInt64(nanos));
		if (waits)
			add_nanos(&day->nanos_waiting, &day->part_waiting, DatumGetInt64(nanos));
		if (flies)
			add_nanos(&day->nanos_flying, &day->part_flying, DatumGetInt64(nanos));
	}
	MemoryContextSwitchTo(old);
}

/* What rows say that Polar has or is to get, day by day. */
static void
add_up_rows(Reconciling *work)
{
	Oid			argtypes[2] = {TIMESTAMPTZOID, TIMESTAMPTZOID};
	Datum		args[2] = {TimestampTzGetDatum(work->from_time), TimestampTzGetDatum(work->to_time)};
	Whereabouts where = {.work = work};

	PushActiveSnapshot(GetLatestSnapshot());
	where.waiting = abp_outbox_all_ids(work->table->relid);
	where.flying = abp_ledger_sending_ids(work->table->relid);
	where.known = abp_ledger_ids(work->table->relid, work->table->ledger_from);
	PopActiveSnapshot();

	abp_rows_query(work->table,
				   psprintf("SELECT id::pg_catalog.int8, occurred_at, cost_nanos::pg_catalog.int8"
							" FROM %s WHERE occurred_at >= $1 AND occurred_at < $2",
							work->table->name),
				   2, argtypes, args, RECONCILE_CHUNK, add_up_part, &where);
}

/* Note what the meter has counted on a day; days of 0 need no entry. */
static void
take_quantity(TimestampTz timestamp, Numeric quantity, void *arg)
{
	Reconciling *work = arg;
	MemoryContext old = MemoryContextSwitchTo(work->context);
	Day		   *day;

	if (!same_number(quantity, int64_to_numeric(0)))
	{
		day = get_day(work, abp_share_key_day(timestamp));
		day->nanos_there = numeric_trimmed(quantity);
	}
	MemoryContextSwitchTo(old);
}

/* A day by the meter: right, short of what is on its way, or wrong. */
static void
conclude_day(Day *day)
{
	Numeric		most;
	Numeric		least;

	day->nanos_here = numeric_plus(day->nanos_here, int64_to_numeric(day->part_here));
	day->nanos_waiting = numeric_plus(day->nanos_waiting, int64_to_numeric(day->part_waiting));
	day->nanos_flying = numeric_plus(day->nanos_flying, int64_to_numeric(day->part_flying));
	most = numeric_minus(day->nanos_here, day->nanos_waiting);
	least = numeric_minus(most, day->nanos_flying);

	if (close_number(day->nanos_here, day->nanos_there))
		day->findings[NOT_SENT_YET] = 0;
	else if (close_number(most, day->nanos_there) || close_number(least, day->nanos_there))
		return;
	else if (numeric_compare(least, day->nanos_there) >= 0 || numeric_compare(day->nanos_there, most) >= 0)
		day->findings[AMOUNT_DIFFERS] = 1;
}

/* Day by day, by what a meter has counted: one request. */
static void
compare_with_meter(Reader *reader, void *arg)
{
	Reconciling *work = arg;
	HASH_SEQ_STATUS scan;
	Day		   *day;

	add_up_rows(work);
	abp_polar_events_read_meter(reader, work->meter, work->from_time, work->to_time, "day", NULL,
								take_quantity, work);
	hash_seq_init(&scan, work->days);
	while ((day = hash_seq_search(&scan)) != NULL)
		conclude_day(day);
}

/* --- the functions --------------------------------------------------------------------------- */

/* Raises invalid_parameter_value unless these times can be compared. */
static void
check_times(const Reconciling *work)
{
	if (TIMESTAMP_NOT_FINITE(work->from_time) || TIMESTAMP_NOT_FINITE(work->to_time))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("from_time and to_time must be finite")));
	if (work->meter == NULL)
		return;
	if (work->from_time % USECS_PER_DAY != 0 || work->to_time % USECS_PER_DAY != 0)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("a meter counts whole days: from_time and to_time must be midnight, UTC"),
				 errhint("As in '2026-01-31 00:00+00'.")));
	if (abp_share_key_day(work->from_time) < FIRST_METERED_DAY)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("Polar's meters know nothing of before 2023-01-01")));
}

/* A hash table; its keys are compared as bytes, padding included. */
static HTAB *
create_hash(const char *name, Size key, Size entry, MemoryContext context)
{
	HASHCTL		ctl = {.keysize = key,.entrysize = entry,.hcxt = context};

	return hash_create(name, 1024, &ctl, HASH_ELEM | HASH_BLOBS | HASH_CONTEXT);
}

/* Fill in what is asked for; false if nothing is. */
static bool
begin(FunctionCallInfo fcinfo, Reconciling *work)
{
	AclResult	may_read;

	InitMaterializedSRF(fcinfo, 0);
	if (PG_ARGISNULL(0) || PG_ARGISNULL(1) || PG_ARGISNULL(2))
		return false;
	work->table = abp_attach_needed(PG_GETARG_OID(0));
	may_read = pg_class_aclcheck(work->table->relid, GetUserId(), ACL_SELECT);
	if (may_read != ACLCHECK_OK)
		aclcheck_error(may_read, OBJECT_TABLE, get_rel_name(work->table->relid));
	if (!OidIsValid(work->table->serverid))
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_OBJECT),
				 errmsg("server \"%s\" does not exist", work->table->server)));
	work->from_time = PG_GETARG_TIMESTAMPTZ(1);
	work->to_time = PG_GETARG_TIMESTAMPTZ(2);
	work->meter = PG_ARGISNULL(3) ? NULL : PG_GETARG_UUID_P(3);
	work->result = (ReturnSetInfo *) fcinfo->resultinfo;
	work->context = CurrentMemoryContext;
	check_times(work);
	work->here = create_hash("aibilling_polar rows here", sizeof(ExternalIdKey), sizeof(HereRow), work->context);
	work->ids = create_hash("aibilling_polar ids there", sizeof(ExternalIdKey), sizeof(ExternalIdKey), work->context);
	work->days = create_hash("aibilling_polar days", sizeof(int), sizeof(Day), work->context);
	return work->from_time < work->to_time;
}

/*
 * aibilling.reconcile(usage, from_time, to_time, meter_id): days of a usage
 * table beside what Polar has of them, by a meter or by the events.
 */
Datum
abp_sql_reconcile(PG_FUNCTION_ARGS)
{
	Reconciling work = {NULL};

	if (begin(fcinfo, &work))
	{
		abp_reader_run(work.table->serverid, work.table->owner, "aibilling.reconcile()",
					   work.meter != NULL ? compare_with_meter : compare_events, &work);
		put_days(&work);
	}
	return (Datum) 0;
}

/* Days on which the meter says something else, then the events of these. */
static void
compare_days_and_events(Reader *reader, void *arg)
{
	Reconciling *work = arg;
	HASH_SEQ_STATUS scan;
	Day		   *day;
	Day		  **wrong;
	int			nwrong = 0;

	compare_with_meter(reader, work);
	wrong = palloc(sizeof(Day *) * Max(1, hash_get_num_entries(work->days)));
	hash_seq_init(&scan, work->days);
	while ((day = hash_seq_search(&scan)) != NULL)
	{
		if (words_of(day) != NULL)
			wrong[nwrong++] = day;
	}
	qsort(wrong, nwrong, sizeof(Day *), compare_days);
	for (int i = 0; i < nwrong; i++)
	{
		Reconciling one = *work;

		one.from_time = (TimestampTz) wrong[i]->day * USECS_PER_DAY;
		one.to_time = one.from_time + USECS_PER_DAY;
		one.here = create_hash("aibilling_polar rows here", sizeof(ExternalIdKey), sizeof(HereRow),
							   work->context);
		compare_events(reader, &one);
		work->events = one.events;
		hash_destroy(one.here);
	}
}

/*
 * aibilling.reconcile_rows(usage, from_time, to_time, meter_id): rows and events
 * that do not agree; with a meter, of the days only on which it disagrees.
 */
Datum
abp_sql_reconcile_rows(PG_FUNCTION_ARGS)
{
	Reconciling work = {NULL};

	if (begin(fcinfo, &work))
	{
		work.by_row = true;
		abp_reader_run(work.table->serverid, work.table->owner, "aibilling.reconcile_rows()",
					   work.meter != NULL ? compare_days_and_events : compare_events, &work);
	}
	return (Datum) 0;
}
