/*-------------------------------------------------------------------------
 *
 * read_back.c
 *	  SQL functions that show what Polar has: polar_events, polar_meter.
 *
 * Functions, not foreign tables: a careless join over those would page through a
 * year and eat the requests that delivery needs.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "fmgr.h"
#include "foreign/foreign.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/timestamp.h"

#include "base/numeric_math.h"
#include "ship/polar_events.h"

PG_FUNCTION_INFO_V1(abp_sql_polar_events);
PG_FUNCTION_INFO_V1(abp_sql_polar_meter);

/* An argument that may be NULL, as a C string. */
#define TEXT_OR_NULL(n) \
	(PG_ARGISNULL(n) ? NULL : text_to_cstring(PG_GETARG_TEXT_PP(n)))

typedef struct EventsCall
{
	EventQuery	query;
	int64		max_rows;
	int64		nrows;
	ReturnSetInfo *result;
} EventsCall;

static void
set_text(Datum *values, bool *nulls, int column, const char *text)
{
	nulls[column] = text == NULL;

	if (text !=NULL)
		values[column] = CStringGetTextDatum(text);
}

/* An id as a UUID; one of another form is none that we know. */
static void
set_uuid(Datum *values, bool *nulls, int column, const char *text)
{
	nulls[column] = text == NULL || strlen(text) != 36 ||
	strspn(text, "0123456789abcdefABCDEF-") != 36;

	if (!nulls[column])
		values[column] = DirectFunctionCall1(uuid_in, CStringGetDatum(text));
}

/* A number of nano-dollars, if it is one that cost_nanos can hold. */
static bool
nanos_fit(Numeric nanos, int64 *result)
{
	if (!numeric_equal(numeric_rounded(nanos, 0), nanos) ||
		numeric_compare(numeric_magnitude(nanos), int64_to_numeric(PG_INT64_MAX)) > 0)
		return false;
	*result = numeric_as_int64(nanos);
	return true;
}

/* Return an event; false when there are enough. */
static bool
put_event(const PolarEvent *event, void *arg)
{
	EventsCall *call = arg;
	Datum		values[9];
	bool		nulls[9] = {false};
	int64		nanos;

	if (call->nrows == call->max_rows)
		return false;
	call->nrows++;
	set_uuid(values, nulls, 0, event->polar_id);
	values[1] = TimestampTzGetDatum(event->timestamp);
	set_text(values, nulls, 2, event->name);
	set_text(values, nulls, 3, event->external_id);
	set_uuid(values, nulls, 4, event->customer_id);
	set_text(values, nulls, 5, event->external_customer_id);
	nulls[6] = event->cost_cents == NULL;
	if (!nulls[6])
		values[6] = NumericGetDatum(event->cost_cents);
	nulls[7] = event->cost_nanos == NULL || !nanos_fit(event->cost_nanos, &nanos);
	if (!nulls[7])
		values[7] = Int64GetDatum(nanos);
	values[8] = JsonbPGetDatum(event->metadata);
	tuplestore_putvalues(call->result->setResult, call->result->setDesc, values, nulls);
	return true;
}

/* Return the events that are asked for; a NOTICE says if there are more. */
static void
read_events(Reader *reader, void *arg)
{
	EventsCall *call = arg;
	int64		total;

	if (call->max_rows == 0)
		return;
	total = abp_polar_events_read(reader, &call->query, put_event, call);
	if (call->nrows == call->max_rows && total > call->nrows)
		ereport(NOTICE,
				(errmsg("these are " INT64_FORMAT " of about " INT64_FORMAT " events", call->nrows, total),
				 errhint("Ask for a shorter time, or set max_rows.")));
}

/*
 * aibilling.polar_events(server, external_customer_id, event_name, external_id,
 * from_time, to_time, max_rows): events that Polar has, by time.
 */
Datum
abp_sql_polar_events(PG_FUNCTION_ARGS)
{
	EventsCall	call = {.query = {.from_time = DT_NOBEGIN,.to_time = DT_NOEND}};
	ForeignServer *server;

	InitMaterializedSRF(fcinfo, 0);
	if (PG_ARGISNULL(0) || PG_ARGISNULL(6))
		return (Datum) 0;
	server = GetForeignServerByName(NameStr(*PG_GETARG_NAME(0)), false);
	call.result = (ReturnSetInfo *) fcinfo->resultinfo;
	call.query.external_customer_id = TEXT_OR_NULL(1);
	call.query.event_name = TEXT_OR_NULL(2);
	if (!PG_ARGISNULL(3))
		call.query.external_ids = list_make1(text_to_cstring(PG_GETARG_TEXT_PP(3)));
	if (!PG_ARGISNULL(4))
		call.query.from_time = PG_GETARG_TIMESTAMPTZ(4);
	if (!PG_ARGISNULL(5))
		call.query.to_time = PG_GETARG_TIMESTAMPTZ(5);
	call.max_rows = PG_GETARG_INT64(6);
	if (call.max_rows < 0 || call.max_rows > MAX_EVENTS_READ)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("max_rows must be from 0 to %d, but is " INT64_FORMAT, MAX_EVENTS_READ, call.max_rows),
				 errhint("A meter answers for more: aibilling.polar_meter().")));
	abp_reader_run(server->serverid, GetUserId(), "aibilling.polar_events()", read_events, &call);
	return (Datum) 0;
}

typedef struct MeterCall
{
	pg_uuid_t  *meter;
	TimestampTz from_time;
	TimestampTz to_time;
	const char *step;
	const char *external_customer_id;
	ReturnSetInfo *result;
} MeterCall;

/* Return the quantity of one step. */
static void
put_quantity(TimestampTz timestamp, Numeric quantity, void *arg)
{
	MeterCall  *call = arg;
	Datum		values[2];
	bool		nulls[2] = {false};

	values[0] = TimestampTzGetDatum(timestamp);
	values[1] = NumericGetDatum(numeric_trimmed(quantity));
	tuplestore_putvalues(call->result->setResult, call->result->setDesc, values, nulls);
}

static void
read_meter(Reader *reader, void *arg)
{
	MeterCall  *call = arg;

	abp_polar_events_read_meter(reader, call->meter, call->from_time, call->to_time, call->step,
								call->external_customer_id, put_quantity, call);
}

/*
 * aibilling.polar_meter(server, meter_id, from_time, to_time, step,
 * external_customer_id): what a meter has counted, step by step.
 */
Datum
abp_sql_polar_meter(PG_FUNCTION_ARGS)
{
	static const char *const steps[] = {"hour", "day", "week", "month", "year"};
	MeterCall	call = {NULL};
	ForeignServer *server;
	bool		known = false;

	InitMaterializedSRF(fcinfo, 0);
	for (int i = 0; i < 5; i++)
	{
		if (PG_ARGISNULL(i))
			return (Datum) 0;
	}
	server = GetForeignServerByName(NameStr(*PG_GETARG_NAME(0)), false);
	call.result = (ReturnSetInfo *) fcinfo->resultinfo;
	call.meter = PG_GETARG_UUID_P(1);
	call.from_time = PG_GETARG_TIMESTAMPTZ(2);
	call.to_time = PG_GETARG_TIMESTAMPTZ(3);
	call.step = text_to_cstring(PG_GETARG_TEXT_PP(4));
	call.external_customer_id = TEXT_OR_NULL(5);
	for (int i = 0; i < lengthof(steps); i++)
		known |= strcmp(call.step, steps[i]) == 0;
	if (!known)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("step \"%s\" is unknown", call.step),
				 errhint("Steps are hour, day, week, month and year.")));
	if (call.from_time >= call.to_time)
		return (Datum) 0;
	abp_reader_run(server->serverid, GetUserId(), "aibilling.polar_meter()", read_meter, &call);
	return (Datum) 0;
}
