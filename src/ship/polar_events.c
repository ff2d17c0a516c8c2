/*-------------------------------------------------------------------------
 *
 * polar_events.c
 *	  Events and quantities of meters, as Polar gives them back.
 *
 * Both bounds of time are exclusive there and compared in milliseconds; here
 * they are what SQL is used to.  A list is sorted by time and nothing else, so
 * that numbered pages overlap and leave gaps where events have one time.  So the
 * next request begins at the last millisecond that the one before has reached,
 * and only a millisecond of more events than a request brings is read by pages,
 * and again if they have not brought all.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/hsearch.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "base/json_member.h"
#include "base/numeric_math.h"
#include "ship/polar_events.h"

#define EVENTS_PATH "/v1/events/"
#define EVENTS_SCOPE "events:read (or events:write)"
#define METER_SCOPE "meters:read (or meters:write)"

/* Polar gives no more at once. */
#define EVENTS_PER_PAGE 100

#define USECS_PER_MSEC INT64CONST(1000)

/* How often the pages of a crowded millisecond may bring nothing new. */
#define MAX_VAIN_PASSES 3

/* An id of Polar's, as the key of a hash table; zeros behind it. */
typedef struct EventKey
{
	char text[	64];
} EventKey;

/* A list while it is read. */
typedef struct EventList
{
	Reader	   *reader;
	const EventQuery *query;
	PolarEventCallback callback;
	void	   *arg;
	HTAB	   *seen;			/* EventKey of what was handed over */
	bool		ended;			/* by the callback */
} EventList;

/* What a request has brought. */
typedef struct EventPage
{
	int64		total;			/* in the time asked for, as Polar counts:
								 * perhaps too many */
	int64		pages;			/* likewise */
	int			nevents;
	TimestampTz last;			/* of them the latest */
} EventPage;

/* --- JSON ----------------------------------------------------------------------- */

static TimestampTz
json_time(JsonbContainer *object, const char *key)
{
	const char *text = abp_json_member_string(object, key);

	if (text == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("an answer of Polar's lacks \"%s\"", key)));
	return DatumGetTimestampTz(DirectFunctionCall3(timestamptz_in, CStringGetDatum(text),
												   ObjectIdGetDatum(InvalidOid), Int32GetDatum(-1)));
}

/* An array that is a member of an answer. */
static JsonbContainer *
json_array(Jsonb *document, const char *key)
{
	JsonbValue	value;

	if (!abp_json_member(&document->root, key, &value) || value.type != jbvBinary ||
		!JsonContainerIsArray(value.val.binary.data))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("an answer of Polar's lacks \"%s\"", key)));
	return value.val.binary.data;
}

static int64
json_count(JsonbContainer *object, const char *key)
{
	Numeric		number = abp_json_member_number(object, key);

	return number == NULL ? 0 : DatumGetInt64(DirectFunctionCall1(numeric_int8, NumericGetDatum(number)));
}

/* --- events ----------------------------------------------------------------------- */

static void
read_event(JsonbContainer *item, PolarEvent *event)
{
	JsonbValue	value;
	const char *source;

	memset(event, 0, sizeof(*event));
	event->polar_id = abp_json_member_string(item, "id");
	event->timestamp = json_time(item, "timestamp");
	event->name = abp_json_member_string(item, "name");
	event->customer_id = abp_json_member_string(item, "customer_id");
	source = abp_json_member_string(item, "source");
	event->is_systems = source != NULL && strcmp(source, "system") == 0;
	event->external_customer_id = abp_json_member_string(item, "external_customer_id");
	if (abp_json_member(item, "customer", &value) && value.type == jbvBinary)
		event->linked_customer = abp_json_member_string(value.val.binary.data, "external_id");
	if (abp_json_member(item, "metadata", &value) && value.type == jbvBinary)
	{
		JsonbContainer *metadata = value.val.binary.data;
		JsonbValue	cost;

		event->metadata = JsonbValueToJsonb(&value);
		event->external_id = abp_json_member_string(metadata, "external_id");
		event->cost_nanos = abp_json_member_number(metadata, "cost_nanos");
		if (abp_json_member(metadata, "_cost", &cost) && cost.type == jbvBinary)
			event->cost_cents = abp_json_member_number(cost.val.binary.data, "amount");
	}
	else
		event->metadata = DatumGetJsonbP(DirectFunctionCall1(jsonb_in, CStringGetDatum("{}")));
}

/*
 * The request for a page.  Polar keeps times to the millisecond: a little more
 * is asked for than wanted.
 */
static char *
list_path(const EventQuery *query, TimestampTz from_time, TimestampTz to_time, int64 page)
{
	StringInfoData path;
	ListCell   *lc;

	initStringInfo(&path);
	appendStringInfoString(&path, EVENTS_PATH);
	abp_reader_parameter(&path, "limit", psprintf("%d", EVENTS_PER_PAGE));
	abp_reader_parameter(&path, "page", psprintf(INT64_FORMAT, page));
	abp_reader_parameter(&path, "sorting", "timestamp");
	if (query->only_sent)
		abp_reader_parameter(&path, "source", "user");
	if (from_time != DT_NOBEGIN)
		abp_reader_time(&path, "start_timestamp", from_time - USECS_PER_MSEC);
	if (to_time != DT_NOEND)
		abp_reader_time(&path, "end_timestamp", to_time + USECS_PER_MSEC - 1);
	if (query->external_customer_id != NULL)
		abp_reader_parameter(&path, "external_customer_id", query->external_customer_id);
	if (query->event_name != NULL)
		abp_reader_parameter(&path, "name", query->event_name);
	foreach(lc, query->external_ids)
		abp_reader_parameter(&path, "metadata[external_id]", lfirst(lc));
	return path.data;
}

/* Put an event into a table of what has come.  Returns whether it is new. */
static bool
is_new(HTAB *seen, const PolarEvent *event)
{
	EventKey	key = {{0}};
	bool		found;

	if (event->polar_id == NULL)
		return true;
	strlcpy(key.text, event->polar_id, sizeof(key.text));
	(void) hash_search(seen, &key, HASH_ENTER, &found);
	return !found;
}

/* Events by their id. */
static HTAB *
create_seen(void)
{
	HASHCTL		ctl = {
		.keysize = sizeof(EventKey),
		.entrysize = sizeof(EventKey),
		.hcxt = CurrentMemoryContext
	};

	return hash_create("aibilling_polar events read", 1024, &ctl, HASH_ELEM | HASH_BLOBS | HASH_CONTEXT);
}

/*
 * Read a page and hand its events over, those that have not come before.  With
 * "here", a table of what has come of this time, also note them there.
 */
static EventPage
read_page(EventList *list, TimestampTz from_time, TimestampTz to_time, int64 number, HTAB *here)
{
	MemoryContext context = AllocSetContextCreate(CurrentMemoryContext, "aibilling_polar page of events",
												  ALLOCSET_DEFAULT_SIZES);
	MemoryContext old = MemoryContextSwitchTo(context);
	Jsonb	   *document = abp_reader_get(list->reader,
										  list_path(list->query, from_time, to_time, number),
										  EVENTS_SCOPE);
	JsonbContainer *items = json_array(document, "items");
	JsonbValue	pagination;
	EventPage	page = {.last = DT_NOBEGIN};

	if (abp_json_member(&document->root, "pagination", &pagination) &&
		pagination.type == jbvBinary)
	{
		page.total = json_count(pagination.val.binary.data, "total_count");
		page.pages = json_count(pagination.val.binary.data, "max_page");
	}
	for (uint32 i = 0; i < JsonContainerSize(items) && !list->ended; i++)
	{
		JsonbValue *item = getIthJsonbValueFromContainer(items, i);
		PolarEvent	event;

		CHECK_FOR_INTERRUPTS();
		if (item == NULL || item->type != jbvBinary)
			continue;
		read_event(item->val.binary.data, &event);
		page.nevents++;
		page.last = Max(page.last, event.timestamp);
		if (list->query->only_sent && event.is_systems)
			continue;
		if (here != NULL)
			(void) is_new(here, &event);
		if (event.timestamp >= list->query->from_time && event.timestamp < list->query->to_time &&
			is_new(list->seen, &event))
			list->ended = !list->callback(&event, list->arg);
	}
	list->reader->total = list->reader->done + Max(page.pages - number, 0);
	MemoryContextSwitchTo(old);
	MemoryContextDelete(context);
	return page;
}

/* Read all events of one millisecond, of which there are many. */
static void
read_crowd(EventList *list, TimestampTz time)
{
	HTAB	   *here = create_seen();
	int			vain = 0;
	EventPage	page;

	do
	{
		long		before = hash_get_num_entries(here);
		int64		number = 0;

		do
		{
			CHECK_FOR_INTERRUPTS();
			page = read_page(list, time, time + USECS_PER_MSEC, ++number, here);
		} while (number < page.pages && !list->ended);
		if (hash_get_num_entries(here) == before)
			vain++;
	} while (hash_get_num_entries(here) < page.total && vain < MAX_VAIN_PASSES && !list->ended);
	hash_destroy(here);
}

/*
 * Hand events to the callback, each once, by time, until it returns false.
 * They live until it returns.  Returns how many there are, more or less, of
 * which some may not have been read then.
 */
int64
abp_polar_events_read(Reader *reader, const EventQuery *query, PolarEventCallback callback,
					  void *arg)
{
	EventList	list = {reader, query, callback, arg, create_seen()};
	TimestampTz from_time = query->from_time;
	int64		total = 0;

	for (;;)
	{
		EventPage	page = read_page(&list, from_time, query->to_time, 1, NULL);
		TimestampTz reached;

		CHECK_FOR_INTERRUPTS();
		total = Max(total, page.total);
		if (list.ended || page.pages <= 1 || page.nevents == 0)
			break;
		/* in whole milliseconds, also before the epoch */
		reached = page.last - ((page.last % USECS_PER_MSEC) + USECS_PER_MSEC) % USECS_PER_MSEC;
		if (from_time == DT_NOBEGIN || reached > from_time)
			from_time = reached;
		else
		{
			read_crowd(&list, reached);
			from_time = reached + USECS_PER_MSEC;
		}
		if (list.ended || from_time >= query->to_time)
			break;
	}
	hash_destroy(list.seen);
	return total;
}

/* --- meters ------------------------------------------------------------------------- */

/*
 * Hand what a meter has counted to the callback, for each step (hour, day,
 * week, month, year of UTC): from the one that holds from_time on, those that
 * begin before to_time.
 */
void
abp_polar_events_read_meter(Reader *reader, const pg_uuid_t *meter, TimestampTz from_time,
							TimestampTz to_time, const char *step, const char *external_customer_id,
							QuantityCallback callback, void *arg)
{
	StringInfoData path;
	JsonbContainer *quantities;
	char	   *id = DatumGetCString(DirectFunctionCall1(uuid_out, UUIDPGetDatum(meter)));

	initStringInfo(&path);
	appendStringInfo(&path, "/v1/meters/%s/quantities", id);
	abp_reader_time(&path, "start_timestamp", from_time);
	/* what Polar rounds up to the step */
	abp_reader_time(&path, "end_timestamp", to_time - USECS_PER_MSEC);
	abp_reader_parameter(&path, "interval", step);
	abp_reader_parameter(&path, "timezone", "UTC");
	if (external_customer_id != NULL)
		abp_reader_parameter(&path, "external_customer_id", external_customer_id);

	quantities = json_array(abp_reader_get(reader, path.data, METER_SCOPE), "quantities");
	for (uint32 i = 0; i < JsonContainerSize(quantities); i++)
	{
		JsonbValue *item = getIthJsonbValueFromContainer(quantities, i);
		TimestampTz timestamp;
		Numeric		quantity;

		CHECK_FOR_INTERRUPTS();
		if (item == NULL || item->type != jbvBinary)
			continue;
		timestamp = json_time(item->val.binary.data, "timestamp");
		quantity = abp_json_member_number(item->val.binary.data, "quantity");
		if (timestamp < to_time && quantity != NULL)
			callback(timestamp, quantity, arg);
	}
}
