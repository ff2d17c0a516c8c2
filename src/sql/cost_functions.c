/*-------------------------------------------------------------------------
 *
 * cost_functions.c
 *	  SQL-callable functions: unpack the arguments, call, pack the result.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <sys/stat.h>

#include "access/htup_details.h"
#include "catalog/pg_type.h"
#include "commands/trigger.h"
#include "executor/spi.h"
#include "fmgr.h"
#include "foreign/foreign.h"
#include "funcapi.h"
#include "lib/stringinfo.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "storage/fd.h"
#include "utils/builtins.h"
#include "utils/date.h"
#include "utils/guc.h"
#include "utils/inval.h"
#include "utils/jsonb.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/timestamp.h"

#include "base/numeric_math.h"
#include "base/statement.h"
#include "base/text_view.h"
#include "base/usage_row.h"
#include "compat.h"
#include "polar/metadata.h"
#include "polar/server.h"
#include "polar/token.h"
#include "price/cost.h"
#include "price/normalize.h"
#include "price/price.h"
#include "queue/wake.h"
#include "ship/http.h"
#include "usage/fate.h"
#include "usage/row.h"
#include "usage/warn.h"

/* --- cost ---------------------------------------------------------------- */

PG_FUNCTION_INFO_V1(abp_sql_price_changed);
PG_FUNCTION_INFO_V1(abp_sql_cost_nanos);
PG_FUNCTION_INFO_V1(abp_sql_cost_cents);
PG_FUNCTION_INFO_V1(abp_sql_polar_cost);
PG_FUNCTION_INFO_V1(abp_sql_cost);
PG_FUNCTION_INFO_V1(abp_sql_explain_cost);
PG_FUNCTION_INFO_V1(abp_sql_explain_usage_cost);
PG_FUNCTION_INFO_V1(abp_sql_price_hint);
PG_FUNCTION_INFO_V1(abp_sql_priced_model);
PG_FUNCTION_INFO_V1(abp_sql_convert_cost);

/* Arguments of the cost family, in order. */
enum
{
	COST_ARG_PROVIDER,
	COST_ARG_MODEL,
	COST_ARG_INPUT,
	COST_ARG_OUTPUT,
	COST_ARG_CACHE_READ,
	COST_ARG_CACHE_WRITE,
	COST_ARG_CACHE_WRITE_1H,
	COST_ARG_REASONING,
	COST_ARG_REQUEST,
	COST_ARG_WEB_SEARCH,
	COST_ARG_UNITS,
	COST_ARG_SERVICE_TIER,
	COST_ARG_AT
};

/* Columns that aibilling.explain_cost returns. */
#define EXPLAIN_COLUMNS 15

/* An argument of type text, where it lies; .data is NULL if it is NULL. */
static TextView
text_argument(FunctionCallInfo fcinfo, int n)
{
	static const TextView null = {NULL, 0};

	return PG_ARGISNULL(n) ? null : text_view_from_datum(PG_GETARG_DATUM(n));
}

/*
 * The request that the arguments of a function of the cost family describe.
 * It points into *counts and the arguments.
 */
static void
get_cost_arguments(FunctionCallInfo fcinfo, PriceRequest *request,
				   UsageCounts *counts)
{
#define SET_COUNT(count, n) \
	do { \
		counts->given[count] = !PG_ARGISNULL(n); \
		counts->value[count] = PG_ARGISNULL(n) ? 0 : PG_GETARG_INT64(n); \
	} while (0)

	SET_COUNT(COUNT_INPUT, COST_ARG_INPUT);
	SET_COUNT(COUNT_CACHE_READ, COST_ARG_CACHE_READ);
	SET_COUNT(COUNT_CACHE_WRITE, COST_ARG_CACHE_WRITE);
	SET_COUNT(COUNT_CACHE_WRITE_1H, COST_ARG_CACHE_WRITE_1H);
	SET_COUNT(COUNT_OUTPUT, COST_ARG_OUTPUT);
	SET_COUNT(COUNT_REASONING, COST_ARG_REASONING);
	SET_COUNT(COUNT_REQUEST, COST_ARG_REQUEST);
	SET_COUNT(COUNT_WEB_SEARCH, COST_ARG_WEB_SEARCH);
#undef SET_COUNT

	counts->units = PG_ARGISNULL(COST_ARG_UNITS) ? NULL :
		PG_GETARG_JSONB_P(COST_ARG_UNITS);

	request->provider = text_argument(fcinfo, COST_ARG_PROVIDER);
	request->model = text_argument(fcinfo, COST_ARG_MODEL);
	request->service_tier = text_argument(fcinfo, COST_ARG_SERVICE_TIER);
	request->at = PG_ARGISNULL(COST_ARG_AT) ?
		GetCurrentTransactionStartTimestamp() :
		PG_GETARG_TIMESTAMPTZ(COST_ARG_AT);
	request->counts = counts;
	request->provider_cost = NULL;
	request->from_reply = false;
}

/* Price the arguments.  Returns false if the cost is not known. */
static bool
price_arguments(FunctionCallInfo fcinfo, ExactCost *cost, CostStatus *status)
{
	PriceRequest request;
	UsageCounts counts;

	get_cost_arguments(fcinfo, &request, &counts);
	*status = abp_price_cost(&request, cost, NULL);
	return *status != COST_UNPRICED && *status != COST_INCOMPLETE;
}

/*
 * Trigger of the tables that prices are read from: whoever has cached them
 * reads them again, we ourselves from the next command on.
 */
Datum
abp_sql_price_changed(PG_FUNCTION_ARGS)
{
	TriggerData *trigdata = (TriggerData *) fcinfo->context;

	if (!CALLED_AS_TRIGGER(fcinfo))
		ereport(ERROR,
				(errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
				 errmsg("function \"%s\" must be called as a trigger",
						"aibilling.price_changed")));

	CacheInvalidateRelcache(trigdata->tg_relation);
	abp_wake_at_commit();		/* held rows may have a price now */
	return PointerGetDatum(NULL);
}

/* aibilling.cost_nanos: USD x 10^9; NULL if it is not known. */
Datum
abp_sql_cost_nanos(PG_FUNCTION_ARGS)
{
	ExactCost	cost;
	CostStatus	status;

	if (!price_arguments(fcinfo, &cost, &status))
		PG_RETURN_NULL();
	PG_RETURN_INT64(abp_cost_nanos(&cost));
}

/*
 * aibilling.cost_cents: exact cents, to 12 decimals; NULL if they are not known.
 */
Datum
abp_sql_cost_cents(PG_FUNCTION_ARGS)
{
	ExactCost	cost;
	CostStatus	status;

	if (!price_arguments(fcinfo, &cost, &status))
		PG_RETURN_NULL();
	PG_RETURN_NUMERIC(abp_cost_cents(&cost));
}

/*
 * The amount is made from the exact cost where it has more than 15
 * significant digits, so that it is rounded only once.  Below 1000 cents, 12
 * decimals cannot make that many.
 */
Datum
abp_sql_polar_cost(PG_FUNCTION_ARGS)
{
	ExactCost	cost;
	CostStatus	status;
	Numeric		cents;
	char	   *json;

	if (!price_arguments(fcinfo, &cost, &status))
		PG_RETURN_NULL();

	cents = abp_cost_cents(&cost);
	if (numeric_compare(cents, int64_to_numeric(1000)) >= 0)
		cents = abp_cost_cents_exact(&cost);

	json = psprintf("{\"amount\": \"%s\", \"currency\": \"usd\"}",
					abp_metadata_amount(cents));
	PG_RETURN_DATUM(DirectFunctionCall1(jsonb_in, CStringGetDatum(json)));
}

/*
 * aibilling.cost: the exact cost, in all units, and what kind of cost it is.
 */
Datum
abp_sql_cost(PG_FUNCTION_ARGS)
{
	TupleDesc	tupdesc = fcinfo->flinfo->fn_extra;
	ExactCost	cost;
	CostStatus	status;
	Datum		values[4];
	bool		nulls[4] = {true, true, true, false};

	if (tupdesc == NULL)
	{
		MemoryContext oldcontext = MemoryContextSwitchTo(fcinfo->flinfo->fn_mcxt);

		if (get_call_result_type(fcinfo, NULL, &tupdesc) != TYPEFUNC_COMPOSITE)
			elog(ERROR, "return type must be a row type");
		tupdesc = BlessTupleDesc(tupdesc);
		fcinfo->flinfo->fn_extra = tupdesc;
		MemoryContextSwitchTo(oldcontext);
	}

	if (price_arguments(fcinfo, &cost, &status))
	{
		values[0] = NumericGetDatum(abp_cost_usd(&cost));
		values[1] = Int64GetDatum(abp_cost_nanos(&cost));
		values[2] = NumericGetDatum(abp_cost_cents(&cost));
		nulls[0] = nulls[1] = nulls[2] = false;
	}
	values[3] = CStringGetTextDatum(abp_price_status_name(status));

	PG_RETURN_DATUM(HeapTupleGetDatum(heap_form_tuple(tupdesc, values, nulls)));
}

/* A text as a column of a result, NULL if there is none. */
static Datum
numeric_value(Numeric value, bool *isnull)
{
	*isnull = value == NULL;
	return *isnull ? (Datum) 0 : NumericGetDatum(value);
}

/*
 * Put the explanation of a request into a function's result set: of a row
 * that is stored at stored_cents, or of one that is not (NULL).  doubt is
 * what is wrong with the row's usage object although its cost is reported,
 * or NULL.
 */
static void
put_explanation(ReturnSetInfo *rsinfo, const PriceRequest *request, Numeric stored_cents,
				const char *doubt)
{
	PriceExplanation explanation;

	abp_price_explain(request, &explanation);
	if (stored_cents != NULL)
		abp_cost_add_difference(&explanation.buckets, &explanation.nbuckets, stored_cents);
	if (doubt != NULL && explanation.nbuckets > 0)
		explanation.buckets[0].note = psprintf("%s; the usage object is in doubt: %s",
											   explanation.buckets[0].note, doubt);
	for (int i = 0; i < explanation.nbuckets; i++)
	{
		const CostBucket *bucket = &explanation.buckets[i];
		Datum		values[EXPLAIN_COLUMNS] = {0};
		bool		nulls[EXPLAIN_COLUMNS];

		CHECK_FOR_INTERRUPTS();

		memset(nulls, true, sizeof(nulls));
		values[0] = text_view_or_null(bucket->name, &nulls[0]);
		values[1] = numeric_value(bucket->quantity, &nulls[1]);
		values[2] = numeric_value(bucket->price, &nulls[2]);
		values[3] = Int64GetDatum(bucket->per);
		nulls[3] = false;
		values[4] = numeric_value(bucket->factor, &nulls[4]);
		values[5] = numeric_value(bucket->amount, &nulls[5]);
		if (explanation.provider.data != NULL)
		{
			values[6] = text_view_or_null(explanation.provider, &nulls[6]);
			values[7] = text_view_or_null(explanation.model, &nulls[7]);
			values[8] = text_view_or_null(explanation.service_tier, &nulls[8]);
			values[9] = Int64GetDatum(explanation.context_above);
			nulls[9] = false;
			values[10] = text_view_or_null(explanation.source, &nulls[10]);
			values[11] = TimestampTzGetDatum(explanation.valid_from);
			nulls[11] = false;
			nulls[12] = nulls[13] = !explanation.has_window;
			if (explanation.has_window)
			{
				values[12] = TimeADTGetDatum(explanation.daily_from);
				values[13] = TimeADTGetDatum(explanation.daily_to);
			}
		}
		if (bucket->note != NULL)
		{
			values[14] = CStringGetTextDatum(bucket->note);
			nulls[14] = false;
		}
		tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, values, nulls);
	}
}

/* aibilling.explain_cost: a row for each thing that costs. */
Datum
abp_sql_explain_cost(PG_FUNCTION_ARGS)
{
	PriceRequest request;
	UsageCounts counts;

	InitMaterializedSRF(fcinfo, 0);
	get_cost_arguments(fcinfo, &request, &counts);
	put_explanation((ReturnSetInfo *) fcinfo->resultinfo, &request, NULL, NULL);
	return (Datum) 0;
}

/* A text column of a row that SPI has read; .data == NULL for NULL. */
static TextView
spi_text(HeapTuple tuple, TupleDesc tupdesc, int column)
{
	TextView	view = {NULL, 0};
	bool		isnull;
	Datum		datum = SPI_getbinval(tuple, tupdesc, column, &isnull);

	if (!isnull)
	{
		text	   *value = DatumGetTextPP(datum);

		view.data = VARDATA_ANY(value);
		view.len = VARSIZE_ANY_EXHDR(value);
	}
	return view;
}

/*
 * Select what prices a stored row, with the caller's rights, into the current
 * SPI result.  The casts make sure of the types behind the Datums, whatever
 * table was named.
 */
static void
select_usage_row(Oid relid, Datum id)
{
	Oid			id_type = INT8OID;
	char	   *name = abp_statement_table_name(relid);
	bool		has_raw;

	if (name == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_TABLE),
				 errmsg("relation with OID %u does not exist", relid)));
	has_raw = get_attnum(relid, "raw_usage") != InvalidAttrNumber &&
		get_attnum(relid, "usage_format") != InvalidAttrNumber;

	if (SPI_execute_with_args(psprintf("SELECT provider::pg_catalog.text,"
									   " model::pg_catalog.text,"
									   " service_tier::pg_catalog.text,"
									   " occurred_at::pg_catalog.timestamptz,"
									   " units::pg_catalog.jsonb,"
									   " provider_cost::pg_catalog.numeric,"
									   " input_tokens::pg_catalog.int8,"
									   " cache_read_tokens::pg_catalog.int8,"
									   " cache_write_tokens::pg_catalog.int8,"
									   " cache_write_1h_tokens::pg_catalog.int8,"
									   " output_tokens::pg_catalog.int8,"
									   " reasoning_tokens::pg_catalog.int8,"
									   " request_count::pg_catalog.int8,"
									   " web_search_count::pg_catalog.int8,"
									   " %s::pg_catalog.numeric,"
									   " %s::pg_catalog.jsonb,"
									   " %s::pg_catalog.text"
									   " FROM %s"
									   " WHERE id OPERATOR(pg_catalog.=) $1",
									   get_attnum(relid, "cost_cents") == InvalidAttrNumber ?
									   "NULL" : "cost_cents",
									   has_raw ? "raw_usage" : "NULL",
									   has_raw ? "usage_format" : "NULL",
									   name),
							  1, &id_type, &id, NULL, true, 0) != SPI_OK_SELECT)
		elog(ERROR, "SPI_execute_with_args failed");
}

/*
 * The request of a row that select_usage_row() has found, and what of the row
 * tells a doubt; both point into *counts and the SPI result.  Returns the
 * stored cost in cents, or NULL.
 */
static Numeric
get_usage_request(uint64 row, PriceRequest *request, UsageCounts *counts, UsageRow *stored)
{
	TupleDesc	tupdesc = SPI_tuptable->tupdesc;
	HeapTuple	tuple = SPI_tuptable->vals[row];
	Datum		datum;
	bool		isnull;

	memset(request, 0, sizeof(*request));
	memset(counts, 0, sizeof(*counts));
	memset(stored, 0, sizeof(*stored));
	request->provider = spi_text(tuple, tupdesc, 1);
	request->model = spi_text(tuple, tupdesc, 2);
	request->service_tier = spi_text(tuple, tupdesc, 3);
	datum = SPI_getbinval(tuple, tupdesc, 4, &isnull);
	request->at = isnull ? GetCurrentTransactionStartTimestamp() :
		DatumGetTimestampTz(datum);
	datum = SPI_getbinval(tuple, tupdesc, 5, &isnull);
	counts->units = isnull ? NULL : abp_row_json(datum);
	datum = SPI_getbinval(tuple, tupdesc, 6, &isnull);
	request->provider_cost = isnull ? NULL : DatumGetNumeric(datum);
	for (int i = 0; i < NUM_USAGE_COUNTS; i++)
	{
		datum = SPI_getbinval(tuple, tupdesc, 7 + i, &isnull);
		counts->given[i] = !isnull;
		counts->value[i] = isnull ? 0 : DatumGetInt64(datum);
	}
	request->counts = counts;

	stored->model = request->model;
	stored->counts = *counts;
	stored->provider_cost = request->provider_cost;
	stored->usage_format = spi_text(tuple, tupdesc, 9 + NUM_USAGE_COUNTS);
	datum = SPI_getbinval(tuple, tupdesc, 8 + NUM_USAGE_COUNTS, &isnull);
	stored->raw_usage = isnull ? NULL : DatumGetJsonbP(datum);
	request->from_reply = stored->raw_usage != NULL;

	datum = SPI_getbinval(tuple, tupdesc, 7 + NUM_USAGE_COUNTS, &isnull);
	return isnull ? NULL : DatumGetNumeric(datum);
}

/* Explain the cost of a stored row. */
Datum
abp_sql_explain_usage_cost(PG_FUNCTION_ARGS)
{
	Oid			relid = PG_GETARG_OID(0);

	InitMaterializedSRF(fcinfo, 0);

	if (SPI_connect() != SPI_OK_CONNECT)
		elog(ERROR, "SPI_connect failed");
	select_usage_row(relid, PG_GETARG_DATUM(1));
	if (SPI_processed == 0)
		ereport(ERROR,
				(errcode(ERRCODE_NO_DATA_FOUND),
				 errmsg("there is no row with id " INT64_FORMAT " in table %s",
						PG_GETARG_INT64(1),
						abp_statement_table_name(relid))));

	for (uint64 row = 0; row < SPI_processed; row++)
	{
		PriceRequest request;
		UsageCounts counts;
		UsageRow	stored;
		Numeric		stored_cents = get_usage_request(row, &request, &counts, &stored);

		/* A doubt is read out of the usage object again: it has no column. */
		put_explanation((ReturnSetInfo *) fcinfo->resultinfo, &request, stored_cents,
						abp_fate_doubt(&stored));
	}
	SPI_finish();

	return (Datum) 0;
}

/*
 * aibilling.price_hint(usage regclass, id bigint): what to do about a stored
 * row without a price.
 */
Datum
abp_sql_price_hint(PG_FUNCTION_ARGS)
{
	MemoryContext caller = CurrentMemoryContext;
	char	   *hint = NULL;

	if (SPI_connect() != SPI_OK_CONNECT)
		elog(ERROR, "SPI_connect failed");
	select_usage_row(PG_GETARG_OID(0), PG_GETARG_DATUM(1));
	if (SPI_processed > 0)
	{
		PriceRequest request;
		UsageCounts counts;
		UsageRow	stored;
		CountsProblem problem;
		ExactCost	cost;
		CostStatus	status = COST_REPORTED;

		(void) get_usage_request(0, &request, &counts, &stored);
		if (request.provider_cost == NULL && abp_cost_consistent(&counts, &problem))
			status = abp_price_cost(&request, &cost, NULL);
		if (status == COST_UNPRICED || status == COST_INCOMPLETE)
			hint = abp_price_hint(&request);
		if (hint != NULL)
			hint = MemoryContextStrdup(caller, hint);
	}
	SPI_finish();

	if (hint == NULL)
		PG_RETURN_NULL();
	PG_RETURN_TEXT_P(cstring_to_text(hint));
}

/*
 * aibilling.priced_model(provider text, model text, OUT provider, OUT model)
 */
Datum
abp_sql_priced_model(PG_FUNCTION_ARGS)
{
	TextView	provider = text_argument(fcinfo, 0);
	TextView	model = text_argument(fcinfo, 1);
	TupleDesc	tupdesc;
	Datum		values[2] = {0};
	bool		nulls[2] = {true, true};

	if (get_call_result_type(fcinfo, NULL, &tupdesc) != TYPEFUNC_COMPOSITE)
		elog(ERROR, "return type must be a row type");
	if (abp_price_find_model(&provider, &model))
	{
		values[0] = text_view_or_null(provider, &nulls[0]);
		values[1] = text_view_or_null(model, &nulls[1]);
	}
	PG_RETURN_DATUM(HeapTupleGetDatum(heap_form_tuple(BlessTupleDesc(tupdesc), values, nulls)));
}

/* aibilling.convert_cost: an amount in another unit, exact. */
Datum
abp_sql_convert_cost(PG_FUNCTION_ARGS)
{
	PG_RETURN_NUMERIC(abp_cost_convert(PG_GETARG_NUMERIC(0),
									   text_argument(fcinfo, 1),
									   text_argument(fcinfo, 2)));
}


/* --- usage objects ------------------------------------------------------- */

PG_FUNCTION_INFO_V1(abp_sql_normalize_usage);

/*
 * aibilling.normalize_usage(format text, raw jsonb)
 */
Datum
abp_sql_normalize_usage(PG_FUNCTION_ARGS)
{
	text	   *name = PG_GETARG_TEXT_PP(0);
	Jsonb	   *raw = PG_GETARG_JSONB_P(1);
	TextView	format = {VARDATA_ANY(name), VARSIZE_ANY_EXHDR(name)};
	UsageCall	call = {{NULL, 0}, false};
	NormalizedUsage usage;
	StringInfoData reason;
	TupleDesc	tupdesc;
	Datum		values[NUM_USAGE_COUNTS + 5];
	bool		nulls[NUM_USAGE_COUNTS + 5] = {0};
	int			n;

	if (get_call_result_type(fcinfo, NULL, &tupdesc) != TYPEFUNC_COMPOSITE)
		elog(ERROR, "return type must be a row type");

	if (!abp_normalize_knows_format(format))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("unknown usage format \"%.*s\"", format.len, format.data),
				 errhint("%s", abp_normalize_format_hint(format))));

	initStringInfo(&reason);
	if (!abp_normalize_usage(format, raw, &call, &usage, &reason))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg_internal("%s", reason.data)));
	if (usage.doubt != NULL)
		abp_warn_doubt(usage.doubt);

	/* The counts' order is that of the columns. */
	for (n = 0; n < NUM_USAGE_COUNTS; n++)
	{
		values[n] = Int64GetDatum(usage.counts.value[n]);
		nulls[n] = !usage.counts.given[n];
	}
	values[n] = PointerGetDatum(usage.counts.units);
	nulls[n++] = usage.counts.units == NULL;
	values[n] = PointerGetDatum(usage.provider_cost);
	nulls[n++] = usage.provider_cost == NULL;
	nulls[n] = usage.service_tier == NULL;
	values[n++] = usage.service_tier ? CStringGetTextDatum(usage.service_tier) : (Datum) 0;
	nulls[n] = usage.model == NULL;
	values[n++] = usage.model ? CStringGetTextDatum(usage.model) : (Datum) 0;
	nulls[n] = usage.generation_id == NULL;
	values[n++] = usage.generation_id ? CStringGetTextDatum(usage.generation_id) : (Datum) 0;

	PG_RETURN_DATUM(HeapTupleGetDatum(heap_form_tuple(tupdesc, values, nulls)));
}


/* --- catalogues ---------------------------------------------------------- */

/* The bundle has a quarter of a megabyte; more than this is another file. */
#define MAX_BUNDLE_BYTES	(16 * 1024 * 1024)

/* Whether the extension's control file is in this directory. */
static bool
has_control_file(const char *dir)
{
	struct stat st;
	char	   *path = psprintf("%s/aibilling_polar.control", dir);
	bool		found = stat(path, &st) == 0;

	pfree(path);
	return found;
}

/*
 * The directory where the server finds the extension's control file: below
 * extension_destdir, with which Debian tests packages that are not installed
 * yet, in extension_control_path, which PostgreSQL has from 18 on, or the
 * server's own.  Only a superuser sets these two.
 */
static char *
control_directory(void)
{
	char		share_path[MAXPGPATH];
	const char *setting;
	char	   *dir;

	get_share_path(my_exec_path, share_path);

	setting = GetConfigOption("extension_destdir", true, false);
	if (setting != NULL && setting[0] != '\0')
	{
		dir = psprintf("%s%s/extension", setting, share_path);
		if (has_control_file(dir))
			return dir;
	}

	setting = GetConfigOption("extension_control_path", true, false);
	while (setting != NULL && setting[0] != '\0')
	{
		char	   *end = first_path_var_separator(setting);
		char	   *item = end ? pnstrdup(setting, end - setting) : pstrdup(setting);

		dir = psprintf("%s/extension",
					   strcmp(item, "$system") == 0 ? share_path : item);
		if (has_control_file(dir))
			return dir;
		setting = end ? end + 1 : NULL;
	}

	return psprintf("%s/extension", share_path);
}

PG_FUNCTION_INFO_V1(abp_sql_bundled_prices);

/*
 * bundled_prices() returns jsonb: the price catalogue that was installed with
 * the extension, beside its control file.  It is in UTF-8.
 */
Datum
abp_sql_bundled_prices(PG_FUNCTION_ARGS)
{
	char	   *path;
	FILE	   *file;
	struct stat st;
	char	   *text;
	Datum		catalogue;

	path = psprintf("%s/aibilling_polar-prices.json", control_directory());
	file = AllocateFile(path, PG_BINARY_R);
	if (file == NULL)
		ereport(ERROR,
				(errcode_for_file_access(),
				 errmsg("could not open file \"%s\": %m", path),
				 errhint("Install aibilling_polar again, with all of its files, or use import_prices().")));
	if (fstat(fileno(file), &st) != 0)
		ereport(ERROR,
				(errcode_for_file_access(),
				 errmsg("could not stat file \"%s\": %m", path)));
	if (st.st_size > MAX_BUNDLE_BYTES)
		ereport(ERROR,
				(errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED),
				 errmsg("file \"%s\" is too large for a price catalogue", path),
				 errdetail("The file has %lld bytes, at most %d are read.",
						   (long long) st.st_size, MAX_BUNDLE_BYTES)));

	text = palloc(st.st_size + 1);

	if (fread(text, 1, st.st_size, file) != st.st_size)
	{
		if (ferror(file))
			ereport(ERROR,
					(errcode_for_file_access(),
					 errmsg("could not read file \"%s\": %m", path)));
		ereport(ERROR,
				(errcode(ERRCODE_DATA_CORRUPTED),
				 errmsg("file \"%s\" has become shorter while being read", path)));
	}
	text[		st.st_size] = '\0';

	FreeFile(file);

	catalogue = DirectFunctionCall1(jsonb_in,
									CStringGetDatum(pg_any_to_server(text, st.st_size, PG_UTF8)));
	PG_RETURN_DATUM(catalogue);
}

/* Services hand their prices out by pages; more than these are a mistake. */
#define MAX_PRICE_PAGES 1000

PG_FUNCTION_INFO_V1(abp_sql_fetch_prices);

/* A price list while it is fetched. */
typedef struct PriceList
{
	const ServerOptions *server;
	const char *token;			/* NULL: none */
	int			page;			/* the one at hand, from 1 */
	size_t		bytes;			/* of all pages so far */
} PriceList;

/* An error while prices are fetched says at which page. */
static void
price_list_context(void *arg)
{
	PriceList  *list = arg;

	errcontext("page %d of the prices of server \"%s\"", list->page, list->server->name);
}

/*
 * GET the page at hand of a price service.  Raises an error unless it answers
 * with JSON.
 */
static Jsonb *
fetch_page(PriceList *list)
{
	const ServerOptions *server = list->server;
	HttpTarget	target = {
		.url = server->url,
		.ca_file = server->ca_file,
		.proxy = server->proxy,
		.timeout_ms = server->timeout_ms
	};
	HttpRequest *request;
	const HttpReply *reply;
	size_t		len;
	char	   *body;
	Jsonb	   *document;

	if (list->page > 1)
		target.url = psprintf("%s%cpage=%d", server->url,
							  strchr(server->url, '?') != NULL ? '&' : '?', list->page);

	request = abp_http_get(&target, list->token);
	while (abp_http_next_finished() != request)
		(void) abp_http_wait(-1);

	reply = abp_http_reply(request);
	if (reply->outcome != HTTP_ANSWERED)
		ereport(ERROR,
				(errcode(ERRCODE_CONNECTION_FAILURE),
				 errmsg("could not fetch prices from server \"%s\": %s",
						server->name, reply->error),
				 errdetail("The prices in force are unchanged.")));
	if (reply->status != 200)
		ereport(ERROR,
				(errcode(ERRCODE_CONNECTION_FAILURE),
				 errmsg("could not fetch prices from server \"%s\": it answered HTTP status %ld",
						server->name, reply->status),
				 errdetail("The prices in force are unchanged."),
				 reply->status == 401 || reply->status == 403 ?
				 errhint("Check the server's access token.") : 0));
	list->bytes += reply->body_len;
	if (list->bytes > HTTP_MAX_DOCUMENT)
		ereport(ERROR,
				(errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED),
				 errmsg("the prices of server \"%s\" are longer than %d bytes",
						server->name, HTTP_MAX_DOCUMENT),
				 errdetail("The prices in force are unchanged.")));

	len = reply->body_len;
	body = palloc(len + 1);
	memcpy(body, reply->body, len);
	body[len] = '\0';
	abp_http_release(request);
	document = DatumGetJsonbP(DirectFunctionCall1(jsonb_in,
												  CStringGetDatum(pg_any_to_server(body, len, PG_UTF8))));
	pfree(body);
	return document;
}

/* What stands under a key of an object, NULL if nothing does. */
static Jsonb *
member(Jsonb *object, const char *key)
{
	JsonbValue	value;

	if (!JB_ROOT_IS_OBJECT(object) ||
		getKeyJsonValueFromContainer(&object->root, key, strlen(key), &value) == NULL)
		return NULL;
	return JsonbValueToJsonb(&value);
}

/* How many pages does the service say there are? */
static int
page_count(const PriceList *list, Jsonb *document)
{
	Jsonb	   *meta = member(document, "meta");
	Jsonb	   *value = meta == NULL ? NULL : member(meta, "total_pages");
	int			pages = value == NULL ? 1 :
	DatumGetInt32(DirectFunctionCall1(jsonb_int4, JsonbPGetDatum(value)));

	if (pages > MAX_PRICE_PAGES)
		ereport(ERROR,
				(errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED),
				 errmsg("server \"%s\" offers %d pages of prices, more than %d",
						list->server->name, pages, MAX_PRICE_PAGES),
				 errdetail("The prices in force are unchanged.")));
	return pages;
}

/* Add the list of prices in a page to those of the pages before it. */
static void
add_prices(JsonbParseState **state, const PriceList *list, Jsonb *page)
{
	Jsonb	   *data = member(page, "data");
	JsonbIterator *it;
	JsonbIteratorToken token;
	JsonbValue	value;

	if (data == NULL || !JB_ROOT_IS_ARRAY(data) || JB_ROOT_IS_SCALAR(data))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("page %d of server \"%s\" has no list of prices",
						list->page, list->server->name),
				 errdetail("The prices in force are unchanged.")));

	it = JsonbIteratorInit(&data->root);
	while ((token = JsonbIteratorNext(&it, &value, true)) != WJB_DONE)
	{
		CHECK_FOR_INTERRUPTS();
		if (token == WJB_ELEM)
			(void) pushJsonbValue(state, WJB_ELEM, &value);
	}
}

/*
 * All pages of a price service as one document.  Nothing is locked and
 * nothing is read but the network, which may take long.
 */
static Jsonb *
fetch_catalogue(const ServerOptions *server, const char *token)
{
	PriceList	list = {.server = server,.token = token,.page = 1};
	ErrorContextCallback callback = {
		.callback = price_list_context,
		.arg = &list,
		.previous = error_context_stack
	};
	Jsonb	   *catalogue;
	int			pages;

	error_context_stack = &callback;
	catalogue = fetch_page(&list);
	pages = page_count(&list, catalogue);
	if (pages > 1)
	{
		JsonbParseState *state = NULL;
		JsonbValue	key = {.type = jbvString};

		key.val.string.val = "data";
		key.val.string.len = strlen("data");
		(void) pushJsonbValue(&state, WJB_BEGIN_OBJECT, NULL);
		(void) pushJsonbValue(&state, WJB_KEY, &key);
		(void) pushJsonbValue(&state, WJB_BEGIN_ARRAY, NULL);
		add_prices(&state, &list, catalogue);
		while (++list.page <= pages)
			add_prices(&state, &list, fetch_page(&list));
		(void) pushJsonbValue(&state, WJB_END_ARRAY, NULL);
		catalogue = JsonbValueToJsonb(pushJsonbValue(&state, WJB_END_OBJECT, NULL));
	}
	error_context_stack = callback.previous;
	return catalogue;
}

/*
 * fetch_prices(server name, dry_run boolean) returns setof price_change:
 * import what a price service offers, all of it or nothing.
 */
Datum
abp_sql_fetch_prices(PG_FUNCTION_ARGS)
{
	ForeignServer *foreign = GetForeignServerByName(NameStr(*PG_GETARG_NAME(0)), false);
	ReturnSetInfo *result = (ReturnSetInfo *) fcinfo->resultinfo;
	AclResult	may_use = abp_server_aclcheck(foreign->serverid, GetUserId());
	const ServerOptions *server;
	StringInfoData problem;
	char	   *token;
	Jsonb	   *volatile catalogue = NULL;
	Oid			argtypes[3] = {JSONBOID, TEXTOID, BOOLOID};
	Datum		args[3];
	Datum	   *values;
	bool	   *nulls;

	if (may_use != ACLCHECK_OK)
		aclcheck_error(may_use, OBJECT_FOREIGN_SERVER, foreign->servername);

	/* The shipper calls users' functions while requests of its own fly. */
	if (InSecurityRestrictedOperation())
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("cannot fetch prices within security-restricted operation")));
	server = abp_server_options(foreign->serverid);
	if (server->kind != SERVER_PRICES)
		ereport(ERROR,
				(errcode(ERRCODE_WRONG_OBJECT_TYPE),
				 errmsg("server \"%s\" is not a price service", server->name),
				 errhint("Create one with the options kind 'prices', format and url.")));
	if (!PG_GETARG_BOOL(1))
	{
		PreventCommandIfReadOnly("fetch_prices()");
		PreventCommandDuringRecovery("fetch_prices()");
	}
	InitMaterializedSRF(fcinfo, 0);

	initStringInfo(&problem);
	token = abp_token_read(server, GetUserId(), &problem);
	if (token == NULL && problem.len > 0)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_AUTHORIZATION_SPECIFICATION),
				 errmsg("no access token for server \"%s\": %s", server->name, problem.data)));

	PG_TRY();
	{
		catalogue = fetch_catalogue(server, token);
	}
	PG_FINALLY();
	{
		abp_http_cancel_all();
		abp_token_forget(token);
	}
	PG_END_TRY();

	args[0] = JsonbPGetDatum(catalogue);
	args[1] = CStringGetTextDatum(server->prices_format);
	args[2] = PG_GETARG_DATUM(1);
	values = palloc(sizeof(Datum) * result->setDesc->natts);
	nulls = palloc(sizeof(bool) * result->setDesc->natts);
	SPI_connect();
	SPI_execute_with_args("SELECT * FROM aibilling.import_prices($1, $2, $3)",
						  3, argtypes, args, NULL, false, 0);
	for (uint64 i = 0; i < SPI_processed; i++)
	{
		heap_deform_tuple(SPI_tuptable->vals[i], SPI_tuptable->tupdesc, values, nulls);
		tuplestore_putvalues(result->setResult, result->setDesc, values, nulls);
	}
	SPI_finish();
	return (Datum) 0;
}
