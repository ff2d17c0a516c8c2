/*-------------------------------------------------------------------------
 *
 * close.c
 *	  What would miss its month's invoice: close_check, and status's words.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_authid.h"
#include "fmgr.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "storage/lmgr.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/datetime.h"
#include "utils/lsyscache.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

#include "compat.h"
#include "base/numeric_math.h"
#include "queue/ledger.h"
#include "queue/outbox.h"
#include "ship/guard.h"
#include "sql/close.h"
#include "usage/attach.h"
#include "usage/rows.h"

PG_FUNCTION_INFO_V1(abp_sql_close_check);
PG_FUNCTION_INFO_V1(abp_sql_close_warning);

/* From so long before the end of a month until so long after, status warns. */
#define WARN_BEFORE (6 * USECS_PER_HOUR)
#define WARN_AFTER USECS_PER_DAY

/* How many rows of each state status looks at. */
#define WARN_MAX_ROWS 10000

/* Where rows are that are not delivered. */
typedef enum CloseState
{
	CLOSE_PENDING,
	CLOSE_UNPRICED,
	CLOSE_REJECTED,
	CLOSE_SENDING
} CloseState;

#define NUM_CLOSE_STATES (CLOSE_SENDING + 1)

static const char *const close_states[NUM_CLOSE_STATES] = {
	"pending", "unpriced", "rejected", "sending"
};

/* Rows of before a time that are not delivered, in one state. */
typedef struct Late
{
	TimestampTz period_end;
	IdSet		ids;			/* the rows to look at */
	bool		more;			/* there are more of them */
	int64		rows;
	Numeric		cents;
	TimestampTz oldest;
} Late;

/* Count a row of before the end of the period. */
static bool
note_late(const UsageRow *row, Jsonb *whole, void *arg)
{
	Late	   *late = arg;

	if (row->occurred_at >= late->period_end)
		return true;
	late->rows++;
	late->oldest = Min(late->oldest, row->occurred_at);
	if (row->cost_cents != NULL)
	{
		MemoryContext old = MemoryContextSwitchTo(GetMemoryChunkContext(late->cents));
		Numeric		sum = numeric_plus(late->cents, row->cost_cents);

		pfree(late->cents);
		late->cents = sum;
		MemoryContextSwitchTo(old);
	}
	return true;
}

/*
 * The ids of a table's rows in one of the states: all that are being sent, of
 * each state of the outbox up to max_ids.
 */
static IdSet
ids_in_state(Oid relid, CloseState state, int64 max_ids)
{
	IdSet		ids = {0};
	IdSet		waiting;

	if (state == CLOSE_SENDING)
	{
		PushActiveSnapshot(GetLatestSnapshot());
		ids = abp_ledger_sending_ids(relid);
		PopActiveSnapshot();
		return ids;
	}
	if (state != CLOSE_PENDING)
		return abp_outbox_peek(relid, state == CLOSE_UNPRICED ? OUTBOX_UNPRICED : OUTBOX_REJECTED, max_ids);
	ids = abp_outbox_peek(relid, OUTBOX_READY, max_ids);
	waiting = abp_outbox_peek(relid, OUTBOX_WAITING, max_ids);
	abp_idset_add_set(&ids, &waiting, CurrentMemoryContext);
	return ids;
}

/* The rows of one state, none of them looked at yet. */
static Late
begin_late(Oid relid, CloseState state, TimestampTz period_end, int64 max_rows)
{
	Late		late = {.period_end = period_end,.oldest = DT_NOEND};

	late.cents = int64_to_numeric(0);
	late.ids = ids_in_state(relid, state, max_rows);
	abp_idset_sort(&late.ids);
	late.more = abp_idset_count(&late.ids) >= max_rows;
	return late;
}

/*
 * aibilling.close_check(usage, period_end): by state, the rows of before
 * period_end that are not delivered.
 */
Datum
abp_sql_close_check(PG_FUNCTION_ARGS)
{
	ReturnSetInfo *result = (ReturnSetInfo *) fcinfo->resultinfo;
	Oid			relid = PG_GETARG_OID(0);
	TimestampTz period_end = PG_GETARG_TIMESTAMPTZ(1);
	UsageTable *table;

	InitMaterializedSRF(fcinfo, 0);
	if (get_rel_name(relid) != NULL && !has_privs_of_role(GetUserId(), ROLE_PG_MONITOR))
		abp_attach_check_owner(relid);
	table = abp_attach_needed(relid);
	for (CloseState state = 0; state < NUM_CLOSE_STATES; state++)
	{
		Late		late = begin_late(relid, state, period_end, PG_INT64_MAX);
		Datum		values[4];
		bool		nulls[4] = {false};

		CHECK_FOR_INTERRUPTS();

		(void) abp_rows_read(table, &late.ids, false, note_late, &late);
		if (late.rows == 0)
			continue;
		values[0] = CStringGetTextDatum(close_states[state]);
		values[1] = Int64GetDatum(late.rows);
		values[2] = NumericGetDatum(late.cents);
		values[3] = TimestampTzGetDatum(late.oldest);
		tuplestore_putvalues(result->setResult, result->setDesc, values, nulls);
	}
	return (Datum) 0;
}

/* --- in status --------------------------------------------------------------- */

/* The first moment of the month that is "months" after that of "time", UTC. */
static TimestampTz
month_start(TimestampTz time, int months)
{
	Timestamp	local = time;	/* both count from 2000, UTC is without offset */
	struct pg_tm tm;
	fsec_t		fsec;
	int			month;

	if (timestamp2tm(local, NULL, &tm, &fsec, NULL, NULL) != 0)
		ereport(ERROR,
				(errcode(ERRCODE_DATETIME_VALUE_OUT_OF_RANGE),
				 errmsg("timestamp out of range")));
	month = tm.tm_year * 12 + tm.tm_mon - 1 + months;
	return (TimestampTz) (date2j(month / 12, month % 12 + 1, 1) - POSTGRES_EPOCH_JDATE) * USECS_PER_DAY;
}

/* Rows to be looked at under guard. */
typedef struct GuardedLate
{
	const UsageTable *table;
	Late	   *late;
} GuardedLate;

/* Under guard: count the rows. */
static void
read_late(void *arg)
{
	GuardedLate *guarded = arg;

	abp_guard_start_clock();
	(void) abp_rows_read(guarded->table, &guarded->late->ids, false, note_late, guarded->late);
}

/*
 * Around the end of a month (UTC), what of it is not delivered, in words; NULL
 * if there is nothing to say, or the rows cannot be read at once.
 */
char	   *
abp_close_words(const UsageTable *table, TimestampTz now)
{
	TimestampTz end = month_start(now, 0);
	bool		to_come = now >= end + WARN_AFTER;
	StringInfoData parts;
	int64		rows = 0;
	Numeric		cents = int64_to_numeric(0);
	bool		more = false;
	struct pg_tm tm;
	fsec_t		fsec;

	if (to_come)
		end = month_start(now, 1);
	if (to_come && now < end - WARN_BEFORE)
		return NULL;
	if (!ConditionalLockRelationOid(table->relid, AccessShareLock))
		return NULL;

	initStringInfo(&parts);
	for (CloseState state = 0; state < NUM_CLOSE_STATES; state++)
	{
		Late		late = begin_late(table->relid, state, end, WARN_MAX_ROWS);
		GuardedLate guarded = {table, &late};
		GuardError	error;

		CHECK_FOR_INTERRUPTS();

		if (late.ids.nranges == 0 ||
			abp_guard(table, read_late, &guarded, &error) != GUARD_DONE || late.rows == 0)
			continue;
		appendStringInfo(&parts, "%s" INT64_FORMAT " %s", parts.len > 0 ? ", " : "", late.rows,
						 close_states[state]);
		rows += late.rows;
		more |= late.more;
		cents = numeric_plus(cents, late.cents);
	}
	UnlockRelationOid(table->relid, AccessShareLock);
	if (rows == 0 || timestamp2tm(end - 1, NULL, &tm, &fsec, NULL, NULL) != 0)
		return NULL;

	cents = DatumGetNumeric(DirectFunctionCall2(numeric_div, NumericGetDatum(cents),
												NumericGetDatum(int64_to_numeric(100))));
	cents = numeric_rounded(cents, 2);
	return psprintf("%s" INT64_FORMAT " rows of %s %d (%s USD) are not delivered and %s its invoice: %s (aibilling.close_check)",
					more ? "at least " : "", rows, months[tm.tm_mon - 1], tm.tm_year,
					numeric_text(cents),
					to_come ? "would miss" : "may have missed", parts.data);
}

/*
 * aibilling.close_warning(usage, at): what aibilling.status says at that time.
 */
Datum
abp_sql_close_warning(PG_FUNCTION_ARGS)
{
	Oid			relid = PG_GETARG_OID(0);
	char	   *words;

	if (get_rel_name(relid) != NULL && !has_privs_of_role(GetUserId(), ROLE_PG_MONITOR))
		abp_attach_check_owner(relid);
	words = abp_close_words(abp_attach_needed(relid), PG_GETARG_TIMESTAMPTZ(1));
	if (words == NULL)
		PG_RETURN_NULL();
	PG_RETURN_TEXT_P(cstring_to_text(words));
}
