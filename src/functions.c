/*-------------------------------------------------------------------------
 *
 * functions.c
 *	  SQL-callable functions: unpack the arguments, call, pack the result.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "fmgr.h"
#include "funcapi.h"
#include "lib/stringinfo.h"
#include "utils/builtins.h"
#include "utils/jsonb.h"

#include "compat.h"
#include "normalize.h"

/* --- cost ---------------------------------------------------------------- */


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
	NormalizedUsage usage;
	StringInfoData reason;
	TupleDesc	tupdesc;
	Datum		values[NUM_USAGE_COUNTS + 5];
	bool		nulls[NUM_USAGE_COUNTS + 5] = {0};
	int			n;

	if (get_call_result_type(fcinfo, NULL, &tupdesc) != TYPEFUNC_COMPOSITE)
		elog(ERROR, "return type must be a row type");

	if (!abp_usage_format_known(format))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("unknown usage format \"%.*s\"", format.len, format.data),
				 errhint("%s", abp_usage_format_hint(format))));

	initStringInfo(&reason);
	if (!abp_normalize_usage(format, raw, &usage, &reason))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg_internal("%s", reason.data)));

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


/* --- foreign servers ----------------------------------------------------- */


/* --- operating ----------------------------------------------------------- */
