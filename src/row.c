/*-------------------------------------------------------------------------
 *
 * row.c
 *	  The columns of a usage table, and a row of it in C.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "catalog/pg_type.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/timestamp.h"

#include "compat.h"
#include "row.h"

/*
 * In the order of UsageColumn.  The raw usage object is not billed itself:
 * once its counts are, it may be dropped to save space.
 */
const UsageColumnInfo abp_usage_columns[NUM_USAGE_COLUMNS] = {
	{"id", INT8OID, true},
	{"external_id", TEXTOID, true},
	{"occurred_at", TIMESTAMPTZOID, true},
	{"event_name", TEXTOID, true},
	{"provider", TEXTOID, true},
	{"sub_provider", TEXTOID, true},
	{"model", TEXTOID, true},
	{"service_tier", TEXTOID, true},
	{"generation_id", TEXTOID, true},
	{"customer_id", UUIDOID, true},
	{"external_customer_id", TEXTOID, true},
	{"member_id", UUIDOID, true},
	{"external_member_id", TEXTOID, true},
	{"parent_id", TEXTOID, true},
	{"input_tokens", INT8OID, true},
	{"cache_read_tokens", INT8OID, true},
	{"cache_write_tokens", INT8OID, true},
	{"cache_write_1h_tokens", INT8OID, true},
	{"output_tokens", INT8OID, true},
	{"reasoning_tokens", INT8OID, true},
	{"request_count", INT8OID, true},
	{"web_search_count", INT8OID, true},
	{"units", JSONBOID, true},
	{"raw_usage", JSONBOID, false},
	{"usage_format", TEXTOID, false},
	{"provider_cost", NUMERICOID, true},
	{"tags", JSONBOID, true},
	{"cost_nanos", INT8OID, true},
	{"cost_cents", NUMERICOID, true},
	{"cost_status", TEXTOID, true}
};

/* The jsonb value {}: what tags are when a table allows NULL there. */
static Jsonb *
empty_object(void)
{
	static Jsonb *object = NULL;

	if (object == NULL)
	{
		MemoryContext old = MemoryContextSwitchTo(TopMemoryContext);

		object = DatumGetJsonbP(DirectFunctionCall1(jsonb_in, CStringGetDatum("{}")));
		MemoryContextSwitchTo(old);
	}
	return object;
}

static TextView
view_text(const Datum *values, const bool *nulls, UsageColumn column)
{
	TextView	view = {NULL, 0};

	if (!nulls[column])
	{
		text	   *t = DatumGetTextPP(values[column]);

		view.data = VARDATA_ANY(t);
		view.len = VARSIZE_ANY_EXHDR(t);
	}
	return view;
}

/*
 * Read a row from its columns' values, in the order of UsageColumn.  The
 * values must live as long as the row; what is compressed or stored out of
 * line is fetched into the current memory context.
 */
void
abp_usage_row_read(const Datum *values, const bool *nulls, UsageRow *row)
{
	row->id = nulls[COL_ID] ? 0 : DatumGetInt64(values[COL_ID]);
	row->external_id = view_text(values, nulls, COL_EXTERNAL_ID);
	row->occurred_at = nulls[COL_OCCURRED_AT] ? DT_NOBEGIN :
		DatumGetTimestampTz(values[COL_OCCURRED_AT]);
	row->event_name = view_text(values, nulls, COL_EVENT_NAME);
	row->provider = view_text(values, nulls, COL_PROVIDER);
	row->sub_provider = view_text(values, nulls, COL_SUB_PROVIDER);
	row->model = view_text(values, nulls, COL_MODEL);
	row->service_tier = view_text(values, nulls, COL_SERVICE_TIER);
	row->generation_id = view_text(values, nulls, COL_GENERATION_ID);
	row->customer_id = nulls[COL_CUSTOMER_ID] ? NULL :
		DatumGetUUIDP(values[COL_CUSTOMER_ID]);
	row->external_customer_id = view_text(values, nulls, COL_EXTERNAL_CUSTOMER_ID);
	row->member_id = nulls[COL_MEMBER_ID] ? NULL :
		DatumGetUUIDP(values[COL_MEMBER_ID]);
	row->external_member_id = view_text(values, nulls, COL_EXTERNAL_MEMBER_ID);
	row->parent_id = view_text(values, nulls, COL_PARENT_ID);

	for (int i = 0; i < NUM_USAGE_COUNTS; i++)
	{
		row->counts.given[i] = !nulls[COL_FIRST_COUNT + i];
		row->counts.value[i] = row->counts.given[i] ?
			DatumGetInt64(values[COL_FIRST_COUNT + i]) : 0;
	}
	row->counts.units = nulls[COL_UNITS] ? NULL : DatumGetJsonbP(values[COL_UNITS]);

	row->raw_usage = nulls[COL_RAW_USAGE] ? NULL :
		DatumGetJsonbP(values[COL_RAW_USAGE]);
	row->usage_format = view_text(values, nulls, COL_USAGE_FORMAT);
	row->provider_cost = nulls[COL_PROVIDER_COST] ? NULL :
		DatumGetNumeric(values[COL_PROVIDER_COST]);
	row->tags = nulls[COL_TAGS] ? empty_object() : DatumGetJsonbP(values[COL_TAGS]);
	row->has_cost_nanos = !nulls[COL_COST_NANOS];
	row->cost_nanos = row->has_cost_nanos ? DatumGetInt64(values[COL_COST_NANOS]) : 0;
	row->cost_cents = nulls[COL_COST_CENTS] ? NULL :
		DatumGetNumeric(values[COL_COST_CENTS]);
	row->cost_status = view_text(values, nulls, COL_COST_STATUS);
	row->maybe_changing = false;
}

/*
 * Find the columns of a usage table in a relation, by name and type.
 *
 * Returns true and fills attnums, or false and says in *problem, in the
 * current memory context, everything that is missing or of another type.
 */
bool
abp_usage_columns_find(Relation rel, AttrNumber *attnums, char **problem)
{
	TupleDesc	desc = RelationGetDescr(rel);
	StringInfoData missing;

	initStringInfo(&missing);
	for (int col = 0; col < NUM_USAGE_COLUMNS; col++)
	{
		const UsageColumnInfo *column = &abp_usage_columns[col];

		Form_pg_attribute found = NULL;

		for (int i = 0; i < desc->natts && found == NULL; i++)
		{
			Form_pg_attribute att = TupleDescAttr(desc, i);

			if (!att->attisdropped && strcmp(NameStr(att->attname), column->name) == 0)
				found = att;
		}

		if (found != NULL && found->atttypid == column->type)
			attnums[col] = found->attnum;
		else
		{
			attnums[col] = InvalidAttrNumber;
			if (missing.len > 0)
				appendStringInfoString(&missing, "; ");
			if (found == NULL)
				appendStringInfo(&missing, "column \"%s\" of type %s is missing",
								 column->name, format_type_be(column->type));
			else
				appendStringInfo(&missing, "column \"%s\" is of type %s, not %s",
								 column->name, format_type_be(found->atttypid),
								 format_type_be(column->type));
		}
	}

	*problem = missing.data;
	return missing.len == 0;
}
