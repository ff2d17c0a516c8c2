/*-------------------------------------------------------------------------
 *
 * spend.c
 *	  SQL functions that add usage up: usage_daily, usage_by and spend.
 *
 * The sums have three parts: the rollup, shares of deliveries that are not in
 * it yet, and rows that wait.  All are read by one snapshot, the caller's.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/table.h"
#include "fmgr.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/date.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/rls.h"
#include "utils/syscache.h"
#include "utils/timestamp.h"

#include "base/decimal.h"
#include "base/extension.h"
#include "base/numeric_math.h"
#include "compat.h"
#include "queue/outbox.h"
#include "queue/rollup_table.h"
#include "queue/shares.h"
#include "usage/collect.h"
#include "usage/rollup.h"
#include "usage/row.h"
#include "usage/rows.h"
#include "usage/share.h"
#include "usage/share_bytes.h"
#include "usage/share_key.h"

PG_FUNCTION_INFO_V1(abp_sql_usage_daily);
PG_FUNCTION_INFO_V1(abp_sql_usage_by);
PG_FUNCTION_INFO_V1(abp_sql_spend);

/* --- what is not in the rollup ---------------------------------------------- */

/* Is handed sums and what they are kept by, and whether they are delivered. */
typedef void (*SumsReader) (const ShareKey *key, const ShareSums *sums, bool delivered, void *arg);

/* Are sums kept by this wanted?  What is not need not be added up. */
typedef bool (*KeyFilter) (const ShareKey *key, const void *arg);

/* While rows and shares are read. */
typedef struct Pending
{
	KeyFilter	wants;
	SumsReader	reader;
	void	   *arg;
	const EventFormat *format;
	IdSet		delivered_ids;	/* rows of deliveries without known sums */
	bool		delivered;		/* is the share that is read? */
} Pending;

/*
 * Raise an error unless the caller may know what all rows of a table add up to.
 */
static void
check_may_select(Oid relid)
{
	AclResult	result;

	if (!SearchSysCacheExists1(RELOID, ObjectIdGetDatum(relid)))
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_TABLE),
				 errmsg("table with OID %u does not exist", relid)));
	result = pg_class_aclcheck(relid, GetUserId(), ACL_SELECT);
	if (result != ACLCHECK_OK)
		aclcheck_error(result, OBJECT_TABLE, get_rel_name(relid));
	if (check_enable_rls(relid, InvalidOid, true) == RLS_ENABLED)
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("row-level security hides rows of table \"%s\" from you, which its sums would show",
						get_rel_name(relid)),
				 errhint("Call it from a SECURITY DEFINER function of the table's owner that checks whose sums it shows.")));
}

/*
 * The attached table, or one that has been attached before, in the current
 * memory context.  Raises an error for a table that cannot have been.
 */
static UsageTable *
find_usage_table(Oid relid)
{
	bool		armed;
	Relation	rel;
	UsageColumns columns;
	UsageTable *found;
	char	   *problem;

	abp_extension_check_version();
	found = abp_attachment_of(abp_attachments(&armed), relid);
	if (found != NULL)
		return found;

	rel = table_open(relid, AccessShareLock);
	if (rel->rd_rel->relispartition || !abp_row_columns_find(rel, &columns, &problem))
		ereport(ERROR,
				(errcode(ERRCODE_WRONG_OBJECT_TYPE),
				 errmsg("table \"%s\" is not a usage table", RelationGetRelationName(rel)),
				 rel->rd_rel->relispartition ? errhint("Name the partitioned table.") : 0));
	table_close(rel, NoLock);
	return abp_attachment_former(relid);
}

static bool
read_share_row(const char *key, int keylen, const ShareSums *sums, void *arg)
{
	Pending    *pending = arg;
	ShareKey	parts;
	pg_uuid_t	customer_id;

	abp_share_key_read(key, keylen, &parts, &customer_id);
	if (pending->wants(&parts, pending->arg))
		pending->reader(&parts, sums, pending->delivered, pending->arg);
	return true;
}

static bool
read_pending_row(const UsageRow *row, Jsonb *whole, void *arg)
{
	Pending    *pending = arg;
	ShareSums	sums;
	ShareKey	key;
	EventCustomer customer;

	abp_share_key_of_row(&key, row, pending->format, &customer);
	if (!pending->wants(&key, pending->arg))
		return true;
	abp_share_sums_of_row(&sums, row);
	pending->reader(&key, &sums,
					pending->delivered_ids.nranges > 0 &&
					abp_idset_contains(&pending->delivered_ids, row->id), pending->arg);
	return true;
}

/*
 * Hand what is not in the rollup to a reader: shares, and then the rows that
 * wait, are in flight or delivered without their sums being known.
 */
static void
read_pending(const UsageTable *table, KeyFilter wants, SumsReader reader, void *arg)
{
	Pending		pending = {.wants = wants,.reader = reader,.arg = arg};
	IdSet		ids = {0};
	IdSet		unsure = {0};
	IdSet		unknown = {0};	/* of shares without known sums */
	IdSet		counted;
	ListCell   *lc;

	abp_outbox_ids(table->relid, &ids, &unsure);
	abp_collect_pending(table->relid, &ids, &unsure);

	foreach(lc, abp_shares_of(table->relid))
	{
		Share	   *share = lfirst(lc);

		pending.delivered = share->delivered;
		if (share->sums != NULL)
			(void) abp_share_decode(share->sums, &share->folded_rows, read_share_row, &pending);
		else if (share->knows_counted)
		{
			IdSet		rest = abp_idset_subtract(&share->ids, &share->counted);

			abp_idset_add_set(&ids, &rest, CurrentMemoryContext);
		}
		else if (!share->delivered || share->delivery > table->ledger_from)
		{
			abp_idset_add_set(&unknown, &share->ids, CurrentMemoryContext);
			if (share->delivered)
				abp_idset_add_set(&pending.delivered_ids, &share->ids, CurrentMemoryContext);
		}
	}

	/* What has come back, or has an id of before, may be counted already. */
	abp_idset_add_set(&unsure, &unknown, CurrentMemoryContext);
	abp_idset_sort(&unsure);
	counted = abp_shares_counted(table->relid, &unsure, table->ledger_from);
	unsure = abp_idset_subtract(&unsure, &counted);
	abp_idset_add_set(&ids, &unsure, CurrentMemoryContext);
	abp_idset_sort(&ids);
	abp_idset_sort(&pending.delivered_ids);
	if (ids.nranges == 0)
		return;

	pending.format = abp_share_key_format(table->serverid);
	abp_rows_read(table, &ids, false, read_pending_row, &pending);
}

/* --- months ------------------------------------------------------------------- */

static bool
note_row(const Datum *values, const bool *nulls, void *arg)
{
	*(bool *) arg = true;
	return false;
}

/* Is nothing of a table in the rollup for the days from one to before another? */
static bool
is_empty(Oid relid, DateADT from_day, DateADT end)
{
	RollupRange range = {.usage_table = relid,.level = ROLLUP_BY_MODEL,.from_day = from_day};
	bool		found = false;

	if (from_day >= end)
		return true;
	range.to_day = end - 1;
	abp_rollup_table_read(&range, note_row, &found);
	return !found;
}

/*
 * The whole months of a range: from the first of one to before the first of
 * another.  A month in whose other days nothing was counted is as good as
 * whole.  Without whole months both are the day behind the range.
 */
static void
whole_months(const RollupRange *range, DateADT *first, DateADT *end)
{
	DateADT		behind = DATE_NOT_FINITE(range->to_day) ? range->to_day : range->to_day + 1;

	*first = abp_share_key_month(range->from_day, 0);
	if (!is_empty(range->usage_table, *first, range->from_day))
		*first = abp_share_key_month(range->from_day, 1);
	*end = abp_share_key_month(behind, 1);
	if (!is_empty(range->usage_table, behind, *end))
		*end = abp_share_key_month(behind, 0);
	if (*first >= *end)
		*first = *end = behind;
}

/* --- usage_daily, usage_by ---------------------------------------------------- */

/* By what the sums of a result are kept. */
typedef enum SumsBy
{
	BY_ALL,
	BY_MODEL,
	BY_CUSTOMER
} SumsBy;

typedef struct Daily
{
	SumsBy		by;
	DateADT		from_day;
	DateADT		to_day;
	ShareGroups groups;			/* what is not in the rollup */
	bool	   *done;			/* of each of these: is it in the result? */
	ReturnSetInfo *result;
} Daily;

/* A key without what the sums of this result are not kept by. */
static ShareKey
reduced(const Daily *daily, const ShareKey *key)
{
	switch (daily->by)
	{
		case BY_MODEL:
			return abp_share_key_by_model(key);
		case BY_CUSTOMER:
			return abp_share_key_by_customer(key);
		case BY_ALL:
			break;
	}
	return *key;
}

static bool
is_in_days(const ShareKey *key, const void *arg)
{
	const Daily *daily = arg;

	return key->day >= daily->from_day && key->day <= daily->to_day;
}

static void
add_pending(const ShareKey *key, const ShareSums *sums, bool delivered, void *arg)
{
	Daily	   *daily = arg;
	ShareKey	kept = reduced(daily, key);

	abp_share_add(&daily->groups, &abp_share_group_of(&daily->groups, &kept)->sums, sums);
}

/* A text of the rollup; one that is compressed, or lies elsewhere, is fetched. */
static TextView
view_of(const Datum *values, const bool *nulls, RollupColumn column)
{
	TextView	none = {NULL, 0};

	return nulls[column] ? none : text_view_from_datum(values[column]);
}

/* The key of a row of the rollup, which must live on. */
static ShareKey
key_of_rollup(const Datum *values, const bool *nulls)
{
	return (ShareKey)
	{
		.day = DatumGetDateADT(values[ROLLUP_DAY]),
			.external_customer_id = view_of(values, nulls, ROLLUP_EXTERNAL_CUSTOMER_ID),
			.customer_id = nulls[ROLLUP_CUSTOMER_ID] ? NULL : DatumGetUUIDP(values[ROLLUP_CUSTOMER_ID]),
			.provider = view_of(values, nulls, ROLLUP_PROVIDER),
			.model = view_of(values, nulls, ROLLUP_MODEL),
			.event_name = view_of(values, nulls, ROLLUP_EVENT_NAME)
	};
}

static Datum
add_datums(Datum a, Numeric b)
{
	return DirectFunctionCall2(numeric_add, a, NumericGetDatum(b));
}

/*
 * Put a row into the result, which has the day and then the columns that follow
 * the key in the rollup.
 */
static void
put_row(Daily *daily, Datum *values, bool *nulls)
{
	values[ROLLUP_KEY] = values[ROLLUP_DAY];
	nulls[ROLLUP_KEY] = nulls[ROLLUP_DAY];
	tuplestore_putvalues(daily->result->setResult, daily->result->setDesc, &values[ROLLUP_KEY],
						 &nulls[ROLLUP_KEY]);
}

/* A row of the rollup, and what is to be added to it. */
static bool
return_rollup_row(const Datum *rollup_values, const bool *rollup_nulls, void *arg)
{
	Daily	   *daily = arg;
	Datum		values[NUM_ROLLUP_COLUMNS];
	bool		nulls[NUM_ROLLUP_COLUMNS];

	memcpy(values, rollup_values, sizeof(values));
	memcpy(nulls, rollup_nulls, sizeof(nulls));
	if (daily->groups.ngroups > 0)
	{
		ShareKey	key = key_of_rollup(values, nulls);
		ShareGroup *group = abp_share_find(&daily->groups, &key);

		if (group != NULL)
		{
			const ShareSums *sums = &group->sums;

			daily->done[group - daily->groups.groups] = true;
			values[ROLLUP_USAGE_ROWS] =
				Int64GetDatum(DatumGetInt64(values[ROLLUP_USAGE_ROWS]) + sums->rows);
			for (int i = 0; i < NUM_SHARE_TOKENS; i++)
				values[ROLLUP_INPUT_TOKENS + i] =
					add_datums(values[ROLLUP_INPUT_TOKENS + i], abp_decimal_numeric(sums->tokens[i], 0));
			values[ROLLUP_COST_NANOS] =
				add_datums(values[ROLLUP_COST_NANOS], abp_decimal_numeric(sums->nanos, 0));
			values[ROLLUP_COST_CENTS] =
				add_datums(values[ROLLUP_COST_CENTS], abp_share_cents(sums));
			values[ROLLUP_UNPRICED] =
				Int64GetDatum(DatumGetInt64(values[ROLLUP_UNPRICED]) + sums->unpriced);
		}
	}
	put_row(daily, values, nulls);
	return true;
}

/* A group of which the rollup has nothing. */
static void
return_group(Daily *daily, const ShareGroup *group)
{
	Datum		values[NUM_ROLLUP_COLUMNS];
	bool		nulls[NUM_ROLLUP_COLUMNS];

	(void) abp_rollup_values(group, values, nulls);
	if (daily->by == BY_CUSTOMER)
	{
		nulls[ROLLUP_DAY] = nulls[ROLLUP_COST_NANOS] = true;
		for (int i = 0; i < NUM_SHARE_TOKENS; i++)
			nulls[ROLLUP_INPUT_TOKENS + i] = true;
	}
	put_row(daily, values, nulls);
}

/* Add a row of the rollup to its customer. */
static bool
add_to_customer(const Datum *values, const bool *nulls, void *arg)
{
	Daily	   *daily = arg;
	ShareSums	sums = {0};
	ShareKey	key = key_of_rollup(values, nulls);
	Numeric		cents = DatumGetNumeric(values[ROLLUP_COST_CENTS]);
	char	   *shown = numeric_text(cents);

	sums.rows = DatumGetInt64(values[ROLLUP_USAGE_ROWS]);
	sums.unpriced = DatumGetInt64(values[ROLLUP_UNPRICED]);
	abp_share_set_cents(&sums, cents, shown);
	pfree(shown);
	add_pending(&key, &sums, true, daily);
	return true;
}

static void
read_days(Daily *daily, Oid relid, char level, RollupReader reader)
{
	RollupRange range = {
		.usage_table = relid,.level = level,.from_day = daily->from_day,.to_day = daily->to_day
	};

	if (daily->from_day <= daily->to_day)
		abp_rollup_table_read(&range, reader, daily);
}

/* Add the rollup to customers. */
static void
read_customers(Daily *daily, Oid relid)
{
	RollupRange range = {.usage_table = relid,.from_day = daily->from_day,.to_day = daily->to_day};
	DateADT		first;
	DateADT		end;

	whole_months(&range, &first, &end);
	abp_rollup_table_read_customers(&range, first, end, add_to_customer, daily);
}

static void
return_sums(FunctionCallInfo fcinfo, Oid relid, SumsBy by, DateADT from_day, DateADT to_day)
{
	Daily		daily = {.by = by,.from_day = from_day,.to_day = to_day};
	UsageTable *table;

	InitMaterializedSRF(fcinfo, 0);
	check_may_select(relid);
	table = find_usage_table(relid);
	daily.result = (ReturnSetInfo *) fcinfo->resultinfo;
	abp_share_init(&daily.groups, CurrentMemoryContext);

	read_pending(table, is_in_days, add_pending, &daily);
	if (by == BY_CUSTOMER)
		read_customers(&daily, relid);
	daily.done = palloc0(sizeof(bool) * Max(1, daily.groups.ngroups));
	if (by != BY_CUSTOMER)
		read_days(&daily, relid, by == BY_MODEL ? ROLLUP_BY_MODEL : ROLLUP_DAILY,
				  return_rollup_row);
	for (int i = 0; i < daily.groups.ngroups; i++)
	{
		if (!daily.done[i])
			return_group(&daily, &daily.groups.groups[i]);
	}
}

/* A day that is an argument, NULL: without limit. */
static DateADT
day_argument(FunctionCallInfo fcinfo, int n, DateADT if_null)
{
	return PG_ARGISNULL(n) ? if_null : PG_GETARG_DATEADT(n);
}

/*
 * aibilling.usage_daily(usage, from_day, to_day)
 */
Datum
abp_sql_usage_daily(PG_FUNCTION_ARGS)
{
	if (PG_ARGISNULL(0))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("the usage table must not be NULL")));
	return_sums(fcinfo, PG_GETARG_OID(0), BY_ALL, day_argument(fcinfo, 1, DATEVAL_NOBEGIN),
				day_argument(fcinfo, 2, DATEVAL_NOEND));
	return (Datum) 0;
}

/*
 * aibilling.usage_by(usage, by, from_day, to_day)
 */
Datum
abp_sql_usage_by(PG_FUNCTION_ARGS)
{
	char	   *by;

	if (PG_ARGISNULL(0) || PG_ARGISNULL(1))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("usage table and \"by\" must not be NULL")));
	by = text_to_cstring(PG_GETARG_TEXT_PP(1));
	if (strcmp(by, "model") != 0 && strcmp(by, "customer") != 0)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("invalid value for parameter \"by\": \"%s\"", by),
				 errhint("Use 'model' or 'customer'.")));
	return_sums(fcinfo, PG_GETARG_OID(0), strcmp(by, "model") == 0 ? BY_MODEL : BY_CUSTOMER,
				day_argument(fcinfo, 2, DATEVAL_NOBEGIN), day_argument(fcinfo, 3, DATEVAL_NOEND));
	return (Datum) 0;
}

/* --- spend ----------------------------------------------------------------------- */

typedef struct Spend
{
	TextView	customer;
	DateADT		from_day;
	ShareGroups groups;			/* for memory */
	ShareSums	all;
	ShareSums	pending;
	Numeric		cents;			/* of the rollup */
	int64		rows;
	int64		unpriced;
} Spend;

static bool
is_customer(const Spend *spend, TextView external_customer_id)
{
	return external_customer_id.data != NULL && text_view_equal(external_customer_id, spend->customer);
}

static bool
is_spent(const ShareKey *key, const void *arg)
{
	const Spend *spend = arg;

	return key->day >= spend->from_day && is_customer(spend, key->external_customer_id);
}

static void
add_spent(const ShareKey *key, const ShareSums *sums, bool delivered, void *arg)
{
	Spend	   *spend = arg;

	abp_share_add(&spend->groups, &spend->all, sums);
	if (!delivered)
		abp_share_add(&spend->groups, &spend->pending, sums);
}

static bool
add_spent_before(const Datum *values, const bool *nulls, void *arg)
{
	Spend	   *spend = arg;

	if (!is_customer(spend, view_of(values, nulls, ROLLUP_EXTERNAL_CUSTOMER_ID)))
		return true;
	spend->cents = DatumGetNumeric(add_datums(values[ROLLUP_COST_CENTS], spend->cents));
	spend->rows += DatumGetInt64(values[ROLLUP_USAGE_ROWS]);
	spend->unpriced += DatumGetInt64(values[ROLLUP_UNPRICED]);
	return true;
}

/*
 * aibilling.spend(usage, external_customer_id, since)
 */
Datum
abp_sql_spend(PG_FUNCTION_ARGS)
{
	Oid			relid;
	Spend		spend = {{NULL}};
	RollupRange range = {.by_customer = true};
	DateADT		first;			/* of whole months */
	ShareKey	key = {0};
	TupleDesc	desc;
	Datum		values[4];
	bool		nulls[4] = {false};
	UsageTable *table;

	if (PG_ARGISNULL(0) || PG_ARGISNULL(1))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("usage table and external_customer_id must not be NULL")));
	if (get_call_result_type(fcinfo, NULL, &desc) != TYPEFUNC_COMPOSITE)
		elog(ERROR, "return type must be a row type");
	relid = PG_GETARG_OID(0);
	check_may_select(relid);
	table = find_usage_table(relid);

	spend.customer = text_view_from_datum(PG_GETARG_DATUM(1));
	spend.from_day = PG_ARGISNULL(2) ? DATEVAL_NOBEGIN : abp_share_key_day(PG_GETARG_TIMESTAMPTZ(2));
	spend.cents = int64_to_numeric(0);
	abp_share_init(&spend.groups, CurrentMemoryContext);
	read_pending(table, is_spent, add_spent, &spend);

	range.usage_table = relid;
	key.external_customer_id = spend.customer;
	range.customer = abp_rollup_customer(&key);
	first = abp_share_key_month(spend.from_day, 0);
	if (first < spend.from_day)
	{
		first = abp_share_key_month(spend.from_day, 1);
		range.level = ROLLUP_DAILY;
		range.from_day = spend.from_day;
		range.to_day = first - 1;
		abp_rollup_table_read(&range, add_spent_before, &spend);
	}
	range.level = ROLLUP_BY_CUSTOMER;
	range.from_day = first;
	range.to_day = DATEVAL_NOEND;
	abp_rollup_table_read(&range, add_spent_before, &spend);

	values[0] = add_datums(NumericGetDatum(spend.cents), abp_share_cents(&spend.all));
	values[1] = Int64GetDatum(spend.rows + spend.all.rows);
	values[2] = NumericGetDatum(abp_share_cents(&spend.pending));
	values[3] = Int64GetDatum(spend.unpriced + spend.all.unpriced);
	PG_RETURN_DATUM(HeapTupleGetDatum(heap_form_tuple(BlessTupleDesc(desc), values, nulls)));
}
