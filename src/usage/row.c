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
#include "mb/pg_wchar.h"
#include "utils/builtins.h"
#include "utils/datum.h"
#include "utils/fmgrprotos.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/syscache.h"
#include "utils/timestamp.h"
#include "utils/typcache.h"

#include "base/numeric_math.h"
#include "base/statement.h"
#include "base/text_view.h"
#include "base/usage_row.h"
#include "compat.h"
#include "usage/row.h"

/* What cost_cents and cost_status must hold. */
#define COST_CENTS_WHOLE 12
#define COST_CENTS_DECIMALS 12
#define COST_STATUS_CHARS 10	/* "incomplete" */

/*
 * In the order of UsageColumn.  The raw usage object is not billed itself:
 * once its counts are, it may be dropped to save space.
 */
const UsageColumnInfo abp_row_columns[NUM_USAGE_COLUMNS] = {
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

/*
 * A jsonb value, not NULL, or NULL if it is the JSON null: what some ORMs write
 * where nothing was set.
 */
Jsonb	   *
abp_row_json(Datum value)
{
	Jsonb	   *json = DatumGetJsonbP(value);

	return JB_ROOT_IS_SCALAR(json) && JBE_ISNULL(json->root.children[0]) ? NULL : json;
}

/* A jsonb column, or NULL if it is NULL or the JSON null. */
static Jsonb *
read_json(const Datum *values, const bool *nulls, UsageColumn column)
{
	return nulls[column] ? NULL : abp_row_json(values[column]);
}

/* A text column, where it lies; .data is NULL if it is NULL. */
static TextView
view_text(const Datum *values, const bool *nulls, UsageColumn column)
{
	static const TextView null = {NULL, 0};

	return nulls[column] ? null : text_view_from_datum(values[column]);
}

/* The same where an empty text says nothing, as NULL does. */
static TextView
view_text_or_null(const Datum *values, const bool *nulls, UsageColumn column)
{
	TextView	view = view_text(values, nulls, column);

	if (view.len == 0)
		view.data = NULL;
	return view;
}

/*
 * Read a row from its columns' values, in the order of UsageColumn.  The
 * values must live as long as the row; what is compressed or stored out of
 * line is fetched into the current memory context.
 */
void
abp_row_read(const Datum *values, const bool *nulls, UsageRow *row)
{
	row->id = nulls[COL_ID] ? 0 : DatumGetInt64(values[COL_ID]);
	row->external_id = view_text(values, nulls, COL_EXTERNAL_ID);
	row->occurred_at = nulls[COL_OCCURRED_AT] ? DT_NOBEGIN :
		DatumGetTimestampTz(values[COL_OCCURRED_AT]);
	row->event_name = view_text_or_null(values, nulls, COL_EVENT_NAME);
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
	row->external_member_id = view_text_or_null(values, nulls, COL_EXTERNAL_MEMBER_ID);
	row->parent_id = view_text_or_null(values, nulls, COL_PARENT_ID);

	for (int i = 0; i < NUM_USAGE_COUNTS; i++)
	{
		row->counts.given[i] = !nulls[COL_FIRST_COUNT + i];
		row->counts.value[i] = row->counts.given[i] ?
			DatumGetInt64(values[COL_FIRST_COUNT + i]) : 0;
	}
	row->counts.units = read_json(values, nulls, COL_UNITS);

	row->raw_usage = read_json(values, nulls, COL_RAW_USAGE);
	row->usage_format = view_text_or_null(values, nulls, COL_USAGE_FORMAT);
	row->provider_cost = nulls[COL_PROVIDER_COST] ? NULL :
		DatumGetNumeric(values[COL_PROVIDER_COST]);
	row->tags = read_json(values, nulls, COL_TAGS);
	row->tags_are_null = row->tags == NULL;
	if (row->tags_are_null)
		row->tags = empty_object();
	row->has_cost_nanos = !nulls[COL_COST_NANOS];
	row->cost_nanos = row->has_cost_nanos ? DatumGetInt64(values[COL_COST_NANOS]) : 0;
	row->cents_text = NULL;
	row->cost_cents = nulls[COL_COST_CENTS] ? NULL :
		DatumGetNumeric(values[COL_COST_CENTS]);
	row->cost_status = view_text(values, nulls, COL_COST_STATUS);
	row->maybe_changing = false;
	row->columns = NULL;
}

/* Can values of the stored type stand for those of a column's own? */
static bool
type_serves(UsageColumn column, Oid stored)
{
	switch (abp_row_columns[column].type)
	{
		case TEXTOID:
			return stored == TEXTOID || stored == VARCHAROID || stored == BPCHAROID;
		case INT8OID:
			return stored == INT8OID ||
				(column != COL_COST_NANOS && (stored == INT4OID || stored == INT2OID));
		default:
			return stored == abp_row_columns[column].type;
	}
}

/*
 * Find the columns of a usage table in a relation, by name and type.
 *
 * Returns true and fills *columns, or false and says in *problem, in the
 * current memory context, everything that is missing or of another type.
 */
bool
abp_row_columns_find(Relation rel, UsageColumns *columns, char **problem)
{
	TupleDesc	desc = RelationGetDescr(rel);
	StringInfoData missing;

	initStringInfo(&missing);
	columns->all_plain = true;
	for (int col = 0; col < NUM_USAGE_COLUMNS; col++)
	{
		const UsageColumnInfo *column = &abp_row_columns[col];
		Form_pg_attribute found = NULL;

		for (int i = 0; i < desc->natts && found == NULL; i++)
		{
			Form_pg_attribute att = TupleDescAttr(desc, i);

			if (!att->attisdropped && strcmp(NameStr(att->attname), column->name) == 0)
				found = att;
		}

		columns->attnums[col] = InvalidAttrNumber;
		if (found != NULL)
		{
			columns->declared[col] = found->atttypid;
			columns->typmods[col] = found->atttypmod;
			columns->stored[col] = found->atttypid == column->type ? found->atttypid :
				getBaseTypeAndTypmod(found->atttypid, &columns->typmods[col]);
			/* no cost is cut to what a type modifier allows */
			columns->plain[col] = found->atttypid == column->type &&
				(found->atttypmod < 0 || col == COL_COST_CENTS);
			columns->all_plain &= columns->plain[col];
			if (type_serves(col, columns->stored[col]))
			{
				columns->attnums[col] = found->attnum;
				continue;
			}
		}

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

	*problem = missing.data;
	return missing.len == 0;
}

/*
 * What keeps a column from being served; NULL if nothing does.  *fix becomes what
 * ALTER TABLE ... ALTER column does about it, NULL if it can do nothing.
 */
static const char *
column_fault(UsageColumn column, Form_pg_attribute att, const char **fix)
{
	bool		is_cost = column == COL_COST_NANOS || column == COL_COST_CENTS;
	int32		typmod = att->atttypmod;
	Oid			stored = getBaseTypeAndTypmod(att->atttypid, &typmod);

	*fix = att->attgenerated == ATTRIBUTE_GENERATED_STORED ? "DROP EXPRESSION" : NULL;
	if (att->attgenerated != '\0')
		return "is generated, so that its triggers would see nothing there";
	/* which counts had to be NOT NULL for */
	*fix = psprintf("DROP IDENTITY, ALTER %s DROP NOT NULL", abp_row_columns[column].name);
	if (att->attidentity != '\0' && column != COL_ID)
		return "is an identity column, which would fill it with numbers";
	*fix = "DROP NOT NULL";
	if (is_cost && att->attnotnull)
		return "is NOT NULL, but a row that waits for its price has no cost";
	*fix = psprintf("TYPE %s", format_type_be(abp_row_columns[column].type));
	if ((is_cost || column == COL_COST_STATUS) && att->atttypid != stored &&
		DomainHasConstraints(att->atttypid))
		return "is of a domain with constraints, which a row that waits for its price may break";
	if (column == COL_COST_CENTS && stored == NUMERICOID && typmod >= (int32) VARHDRSZ)
	{
		int			precision = ((typmod - VARHDRSZ) >> 16) & 0xffff;
		int			scale = (((typmod - VARHDRSZ) & 0x7ff) ^ 1024) - 1024;

		if (scale < COST_CENTS_DECIMALS || precision - scale < COST_CENTS_WHOLE)
			return "must hold 12 digits before the point and 12 behind it: make it numeric";
	}
	if (column == COL_COST_STATUS && (stored == VARCHAROID || stored == BPCHAROID) &&
		typmod >= (int32) VARHDRSZ && typmod - (int32) VARHDRSZ < COST_STATUS_CHARS)
		return "must hold 10 characters";
	*fix = "TYPE text COLLATE pg_catalog.\"default\"";
	if (OidIsValid(att->attcollation) && !get_collation_isdeterministic(att->attcollation))
		return "has a nondeterministic collation, but to Polar texts are the same if their bytes are";
	return NULL;
}

/*
 * What of a table's columns, names and types being right, the triggers cannot
 * serve: in words, in the current memory context, "" if nothing.  By the
 * catalogue caches, without a lock of the table.
 */
char	   *
abp_row_columns_faults(Oid relid)
{
	StringInfoData faults;

	initStringInfo(&faults);
	for (int col = 0; col < NUM_USAGE_COLUMNS; col++)
	{
		const char *name = abp_row_columns[col].name;
		HeapTuple	tuple = SearchSysCacheAttName(relid, name);
		const char *fault;
		const char *fix;

		if (!HeapTupleIsValid(tuple))
			continue;
		fault = column_fault(col, (Form_pg_attribute) GETSTRUCT(tuple), &fix);
		if (fault != NULL)
			appendStringInfo(&faults, "%scolumn \"%s\" %s", faults.len > 0 ? "; " : "", name, fault);
		ReleaseSysCache(tuple);
	}
	return faults.data;
}

/* Is this the name of a usage table's column? */
static bool
is_usage_column(const char *name)
{
	for (int col = 0; col < NUM_USAGE_COLUMNS; col++)
	{
		if (strcmp(abp_row_columns[col].name, name) == 0)
			return true;
	}
	return false;
}

/*
 * The column that a missing one may have been renamed to: the nearest behind
 * column number "after", or else the first, of those that could serve and are
 * neither of a usage table's own nor taken.  NULL if there is none, or if a
 * column that was dropped is nearer.
 */
static Form_pg_attribute
find_renamed(TupleDesc desc, UsageColumn column, AttrNumber after, const Bitmapset *taken)
{
	Form_pg_attribute found = NULL;

	for (int i = 0; i < desc->natts; i++)
	{
		Form_pg_attribute att = TupleDescAttr(desc, i);

		if (att->attisdropped && att->attnum > after && (found == NULL || found->attnum < after))
			return NULL;
		if (att->attisdropped || bms_is_member(att->attnum, taken) ||
			is_usage_column(NameStr(att->attname)) || !type_serves(column, getBaseType(att->atttypid)))
			continue;
		if (found == NULL || (found->attnum < after && att->attnum > after))
			found = att;
	}
	return found;
}

/*
 * The statements, one per line, that give an attached table the columns that
 * abp_row_columns_find misses and end what abp_row_columns_faults says, in the
 * current memory context; "" if there are none.  A missing column is taken for
 * renamed where one that is there may be it.
 */
char	   *
abp_row_columns_fix(Relation rel)
{
	TupleDesc	desc = RelationGetDescr(rel);
	const char *table = abp_statement_table_name(RelationGetRelid(rel));
	AttrNumber	last = 0;
	Bitmapset  *taken = NULL;
	StringInfoData statements;

	initStringInfo(&statements);
	for (int col = 0; col < NUM_USAGE_COLUMNS; col++)
	{
		const char *name = abp_row_columns[col].name;
		const char *type = format_type_be(abp_row_columns[col].type);
		AttrNumber	attnum = get_attnum(RelationGetRelid(rel), name);
		Form_pg_attribute att = attnum == InvalidAttrNumber ? NULL : TupleDescAttr(desc, attnum - 1);
		const char *fix = NULL;

		if (att == NULL)
		{
			att = find_renamed(desc, col, last, taken);
			if (att != NULL)
			{
				taken = bms_add_member(taken, att->attnum);
				fix = psprintf("RENAME %s TO %s", quote_identifier(NameStr(att->attname)), name);
			}
			else
				fix = psprintf("ADD %s %s", name, type);
		}
		else if (!type_serves(col, getBaseType(att->atttypid)))
			fix = psprintf("ALTER %s TYPE %s USING %s%s", name, type, name,
						   att->atttypid == TIMESTAMPOID ? " AT TIME ZONE 'UTC'" : psprintf("::%s", type));
		else if (column_fault(col, att, &fix) != NULL)
			fix = fix == NULL ? NULL : psprintf("ALTER %s %s", name, fix);
		else
			fix = NULL;
		if (att != NULL)
			last = att->attnum;
		if (fix != NULL)
			appendStringInfo(&statements, "%sALTER TABLE %s %s;", statements.len > 0 ? "\n" : "", table, fix);
	}
	return statements.data;
}

/*
 * A value, not NULL, as a column holds it: as one of the column's own type.
 */
Datum
abp_row_value_read(const UsageColumns *columns, UsageColumn column, Datum value)
{
	switch (columns->stored[column])
	{
		case INT2OID:
			return Int64GetDatum(DatumGetInt16(value));
		case INT4OID:
			return Int64GetDatum(DatumGetInt32(value));
		case BPCHAROID:
			return DirectFunctionCall1(rtrim1, value);
		default:
			return value;
	}
}

/*
 * The opposite, for what the triggers write.  The value must fit.  Raises what
 * a constraint of the column's domain raises, as a table's own would.
 */
Datum
abp_row_value_write(const UsageColumns *columns, UsageColumn column, Datum value, bool isnull)
{
	int32		typmod = columns->typmods[column];

	if (!isnull)
	{
		switch (columns->stored[column])
		{
			case INT2OID:
				value = Int16GetDatum((int16) DatumGetInt64(value));
				break;
			case INT4OID:
				value = Int32GetDatum((int32) DatumGetInt64(value));
				break;
			case VARCHAROID:
				value = DirectFunctionCall3(varchar, value, Int32GetDatum(typmod),
											BoolGetDatum(false));
				break;
			case BPCHAROID:
				value = DirectFunctionCall3(bpchar, value, Int32GetDatum(typmod),
											BoolGetDatum(false));
				break;
			case NUMERICOID:
				if (column != COL_COST_CENTS)
					value = DirectFunctionCall2(numeric, value, Int32GetDatum(typmod));
				break;
			default:
				break;
		}
	}
	if (columns->declared[column] != columns->stored[column])
		domain_check(value, isnull, columns->declared[column], NULL, NULL);
	return value;
}

/* Does a number lose nothing, and overflow nothing, as numeric(p, s)? */
static bool
numeric_fits(Numeric number, int32 typmod)
{
	int			precision = ((typmod - VARHDRSZ) >> 16) & 0xffff;
	int			scale = (((typmod - VARHDRSZ) & 0x7ff) ^ 1024) - 1024;
	char	   *digits;
	char	   *point;
	int			whole;
	int			decimals;

	if (numeric_is_nan(number) || numeric_is_inf(number))
		return false;
	digits = numeric_normalize(number);
	if (*digits == '-')
		digits++;
	point = strchr(digits, '.');
	decimals = point == NULL ? 0 : strlen(point + 1);
	whole = strspn(digits, "0123456789");
	if (*digits == '0')
		whole--;
	return decimals <= Max(scale, 0) && whole <= precision - scale && scale >= 0;
}

/*
 * Can a column hold a value of its own type, not NULL, as it is?
 */
bool
abp_row_value_fits(const UsageColumns *columns, UsageColumn column, Datum value)
{
	int32		typmod = columns->typmods[column];

	switch (columns->stored[column])
	{
		case INT2OID:
			return DatumGetInt64(value) >= PG_INT16_MIN && DatumGetInt64(value) <= PG_INT16_MAX;
		case INT4OID:
			return DatumGetInt64(value) >= PG_INT32_MIN && DatumGetInt64(value) <= PG_INT32_MAX;
		case VARCHAROID:
		case BPCHAROID:
			return typmod < (int32) VARHDRSZ ||
				pg_mbstrlen_with_len(VARDATA_ANY(DatumGetPointer(value)),
									 VARSIZE_ANY_EXHDR(DatumGetPointer(value))) <=
				typmod - (int32) VARHDRSZ;
		case NUMERICOID:
			return typmod < (int32) VARHDRSZ || numeric_fits(DatumGetNumeric(value), typmod);
		default:
			return true;
	}
}

/*
 * Are two values of a column, not NULL, the same?  Numbers are if they are
 * equal, whatever zeros they end in, and JSON with such numbers, too.
 */
bool
abp_row_value_equal(UsageColumn column, Datum a, Datum b)
{
	switch (abp_row_columns[column].type)
	{
		case INT8OID:
		case TIMESTAMPTZOID:
			return DatumGetInt64(a) == DatumGetInt64(b);
		case UUIDOID:
			return datum_image_eq(a, b, false, UUID_LEN);
		case NUMERICOID:
			return datum_image_eq(a, b, false, -1) ||
				numeric_equal(DatumGetNumeric(a), DatumGetNumeric(b));
		case JSONBOID:
			return datum_image_eq(a, b, false, -1) ||
				DatumGetBool(DirectFunctionCall2(jsonb_eq, a, b));
		default:
			return datum_image_eq(a, b, false, -1);
	}
}

/*
 * Has anything that is billed changed?
 */
bool
abp_row_billed_changed(const Datum *old_values, const bool *old_nulls,
					   const Datum *new_values, const bool *new_nulls,
					   bool *raw_changed)
{
	bool		changed = false;

	*raw_changed = false;
	for (int i = 0; i < NUM_USAGE_COLUMNS; i++)
	{
		if (old_nulls[i] == new_nulls[i] &&
			(old_nulls[i] || abp_row_value_equal(i, old_values[i], new_values[i])))
			continue;
		if (abp_row_columns[i].billed)
			changed = true;
		else
			*raw_changed = true;
	}
	return changed;
}
