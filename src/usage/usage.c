/*-------------------------------------------------------------------------
 *
 * usage.c
 *	  The triggers of usage tables: price the row, put it in the outbox.
 *
 * A BEFORE trigger prices; AFTER triggers tell collect.c of the rows that were
 * really inserted or deleted, which writes that to the outbox when the
 * transaction commits.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/relation.h"
#include "access/table.h"
#include "access/xact.h"
#include "catalog/partition.h"
#include "catalog/pg_am_d.h"
#include "catalog/pg_index.h"
#include "catalog/pg_type.h"
#include "commands/trigger.h"
#include "executor/executor.h"
#include "fmgr.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "optimizer/optimizer.h"
#include "partitioning/partdesc.h"
#include "rewrite/rewriteHandler.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/datum.h"
#include "utils/fmgroids.h"
#include "utils/fmgrprotos.h"
#include "utils/hsearch.h"
#include "utils/inval.h"
#include "utils/jsonb.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"
#include "utils/timestamp.h"

#include "compat.h"
#include "config.h"
#include "polar/polar.h"
#include "polar/server.h"
#include "price/normalize.h"
#include "price/price.h"
#include "queue/outbox.h"
#include "queue/wake.h"
#include "usage/collect.h"
#include "usage/correct.h"
#include "usage/usage.h"

/* How many models a session is warned about before it is left in peace. */
#define MAX_WARNED_MODELS 1000

/* How many warnings a statement of a client writes, whatever its functions do. */
#define MAX_STATEMENT_WARNINGS 5

PG_FUNCTION_INFO_V1(abp_sql_price_usage);
PG_FUNCTION_INFO_V1(abp_sql_enqueue_usage);
PG_FUNCTION_INFO_V1(abp_sql_guard_usage);
PG_FUNCTION_INFO_V1(abp_sql_truncate_usage);

/*
 * What a session knows of a table with our triggers: a usage table or one of
 * its partitions.  Forgotten at any change of the table.
 */
typedef struct UsageRelation
{
	Oid			relid;			/* hash key */
	bool		valid;
	bool		warned;			/* of triggers on a table not attached */
	Oid			usage_table;	/* the attached table, InvalidOid if none */
	Oid			serverid;
	int64		ledger_from;	/* its last delivery before a TRUNCATE */
	Oid			id_index;		/* InvalidOid: not looked for, or none */
	bool		counts_not_queued;	/* since the extension's 1.2 */
	int			natts;
	UsageColumns columns;
	Datum	   *values;			/* scratch: one tuple's columns */
	bool	   *nulls;
	bool		has_default[NUM_USAGE_COLUMNS]; /* of defaulted_columns only */
	ExprState **defaults;		/* of NUM_USAGE_COLUMNS, see default_of */
	uint64		defaults_of;	/* the defaults_transaction that made them */
	Oid			defaults_for;	/* and the role */
} UsageRelation;

static HTAB *relations = NULL;
static Oid	attachments_relid = InvalidOid; /* aibilling.attachment */
static HTAB *warned_models = NULL;

/*
 * Expressions of columns' defaults, until the end of the transaction; NULL if
 * none was needed.  Transactions are counted to tell whose they are.
 */
static MemoryContext defaults_context = NULL;
static uint64 defaults_transaction = 0;

/* A row of a usage table. */
typedef struct RowKey
{
	Oid			usage_table;
	int64		id;
} RowKey;

/* Rows between their INSERT triggers that were there before, or NULL. */
static HTAB *returning = NULL;
static int	returning_level = 0;	/* the deepest nesting level among them */

/* The command that has warned of a row that cannot be sent. */
static CommandId warned_command = InvalidCommandId;

/* The start of the client's statement that has warned last, and how often it has. */
static TimestampTz warned_statement = 0;
static int	statement_warnings = 0;

/* The start of the statement that has told of a usage object in doubt. */
static TimestampTz noted_statement = 0;

/*
 * The table whose rows are being priced again, and at which nesting level:
 * its UPDATE may fire triggers of its owner's, which may update other tables
 * and fail in subtransactions of their own.
 */
static Oid	repricing_table = InvalidOid;
static IdSet *repricing_ids;
static int	repricing_level;

static bool same_value(UsageColumn column, Datum a, Datum b);
static bool billed_columns_changed(const Datum *old_values, const bool *old_nulls,
								   const Datum *new_values, const bool *new_nulls,
								   bool *raw_changed);
static void forget_returning(int level);
static void on_transaction_end(XactEvent event, void *arg);
static void on_subtransaction_end(SubXactEvent event, SubTransactionId mine,
								  SubTransactionId parent, void *arg);

/* --- defaults for explicit NULLs ------------------------------------------- */

/* Columns that no row does without. */
static const UsageColumn needed_columns[] = {
	COL_ID, COL_EXTERNAL_ID, COL_OCCURRED_AT
};

/*
 * Columns where an explicit NULL, as ORMs send it for what was not set, takes
 * the default: the needed ones, and those that say nothing when NULL.
 */
static const UsageColumn defaulted_columns[] = {
	COL_ID, COL_EXTERNAL_ID, COL_OCCURRED_AT, COL_SERVICE_TIER, COL_TAGS, COL_FIRST_COUNT + COUNT_REQUEST
};

/* Which of them have a default: for know_relation. */
static void
find_defaults(UsageRelation *known, Relation rel)
{
	for (int i = 0; i < lengthof(defaulted_columns); i++)
	{
		AttrNumber	attnum = known->columns.attnums[defaulted_columns[i]];
		Form_pg_attribute att = TupleDescAttr(RelationGetDescr(rel), attnum - 1);

		known->has_default[defaulted_columns[i]] = att->attgenerated == '\0' &&
			(att->atthasdef || att->attidentity != '\0' ||
			 get_typdefault(att->atttypid) != NULL);
	}
}

/*
 * Columns that an UPDATE cannot empty: an ORM that saves a row which it has not
 * read back writes NULL to all that it did not set, costs included.
 */
static const UsageColumn kept_columns[] = {
	COL_ID, COL_EXTERNAL_ID, COL_OCCURRED_AT, COL_COST_NANOS, COL_COST_CENTS, COL_COST_STATUS
};

static inline bool
lacks_kept(const bool *nulls, const bool *old_nulls)
{
	for (int i = 0; i < lengthof(kept_columns); i++)
	{
		if (nulls[kept_columns[i]] && !old_nulls[kept_columns[i]])
			return true;
	}
	return false;
}

/* The new tuple of an UPDATE, with the old values where it empties them. */
static HeapTuple
tuple_with_kept(const UsageRelation *known, TupleDesc desc, HeapTuple tuple, HeapTuple old,
				const bool *nulls)
{
	int			replace[lengthof(kept_columns)];
	Datum		values[lengthof(kept_columns)];
	bool		isnull[lengthof(kept_columns)];
	int			n = 0;

	for (int i = 0; i < lengthof(kept_columns); i++)
	{
		AttrNumber	attnum = known->columns.attnums[kept_columns[i]];

		if (!nulls[kept_columns[i]])
			continue;
		replace[n] = attnum;
		values[n] = heap_getattr(old, attnum, desc, &isnull[n]);
		n++;
	}
	return heap_modify_tuple_by_cols(tuple, desc, n, replace, values, isnull);
}

static inline bool
lacks_defaults(const UsageRelation *known, const bool *nulls)
{
	for (int i = 0; i < lengthof(defaulted_columns); i++)
	{
		if (nulls[defaulted_columns[i]] && known->has_default[defaulted_columns[i]])
			return true;
	}
	return false;
}

/*
 * A column's default, ready to be computed.  Kept for the transaction and the
 * role: what the expression calls may change, and so may the rights to call it.
 */
static ExprState *
default_of(UsageRelation *known, Relation rel, UsageColumn column)
{
	MemoryContext old;

	if (defaults_context == NULL)
		defaults_context = AllocSetContextCreate(TopTransactionContext,
												 "aibilling column defaults",
												 ALLOCSET_SMALL_SIZES);
	old = MemoryContextSwitchTo(defaults_context);
	if (known->defaults == NULL || known->defaults_of != defaults_transaction ||
		known->defaults_for != GetUserId())
	{
		known->defaults = palloc0(sizeof(ExprState *) * NUM_USAGE_COLUMNS);
		known->defaults_of = defaults_transaction;
		known->defaults_for = GetUserId();
	}
	if (known->defaults[column] == NULL)
	{
		Node	   *expr = build_column_default(rel, known->columns.attnums[column]);

		if (expr == NULL)
			elog(ERROR, "unexpected lack of a default");
		known->defaults[column] = ExecInitExpr(expression_planner((Expr *) expr), NULL);
	}
	MemoryContextSwitchTo(old);
	return known->defaults[column];
}

/*
 * The tuple with defaults where it has NULL.  Defaults may run code of a user's, which may change what is known of
 * the relation: look it up again.
 */
static HeapTuple
tuple_with_defaults(UsageRelation *known, Relation rel, HeapTuple tuple, const bool *nulls)
{
	ExprState  *defaults[lengthof(defaulted_columns)];
	int			replace[lengthof(defaulted_columns)];
	Datum		values[lengthof(defaulted_columns)];
	bool		isnull[lengthof(defaulted_columns)];
	ExprContext *econtext;
	int			n = 0;

	for (int i = 0; i < lengthof(defaulted_columns); i++)
	{
		UsageColumn column = defaulted_columns[i];

		if (!nulls[column] || !known->has_default[column])
			continue;
		defaults[n] = default_of(known, rel, column);
		replace[n++] = known->columns.attnums[column];
	}

	econtext = CreateStandaloneExprContext();
	for (int i = 0; i < n; i++)
		values[i] = ExecEvalExpr(defaults[i], econtext, &isnull[i]);
	FreeExprContext(econtext, true);
	return heap_modify_tuple_by_cols(tuple, RelationGetDescr(rel), n, replace, values, isnull);
}

/* --- what is known of a table --------------------------------------------- */

static void
forget_relation(Datum arg, Oid relid)
{
	if (relid == InvalidOid || relid == attachments_relid)
		abp_usage_forget_relations();
	else
	{
		UsageRelation *known = hash_search(relations, &relid, HASH_FIND, NULL);

		if (known != NULL)
			known->valid = false;
	}
}

static void
forget_servers(Datum arg, int cacheid, uint32 hashvalue)
{
	abp_usage_forget_relations();
}

/*
 * Forget what is known of all tables with our triggers.
 */
void
abp_usage_forget_relations(void)
{
	HASH_SEQ_STATUS scan;
	UsageRelation *known;

	if (relations == NULL)
		return;
	hash_seq_init(&scan, relations);
	while ((known = hash_seq_search(&scan)) != NULL)
		known->valid = false;
}

static void
create_relations(void)
{
	HASHCTL		ctl = {.keysize = sizeof(Oid),.entrysize = sizeof(UsageRelation)};

	relations = hash_create("aibilling usage tables", 16, &ctl, HASH_ELEM | HASH_BLOBS);
	abp_server_init();
	RegisterXactCallback(on_transaction_end, NULL);
	RegisterSubXactCallback(on_subtransaction_end, NULL);
	CacheRegisterRelcacheCallback(forget_relation, (Datum) 0);
	CacheRegisterSyscacheCallback(FOREIGNSERVEROID, forget_servers, (Datum) 0);
}

/* Which attached table do rows of "rel" belong to: itself, or the root above it? */
static Oid
find_usage_table(Relation rel, Oid *serverid, int64 *ledger_from)
{
	List	   *candidates = list_make1_oid(RelationGetRelid(rel));
	ListCell   *lc;

	if (rel->rd_rel->relispartition)
		candidates = list_concat(candidates,
								 get_partition_ancestors(RelationGetRelid(rel)));

	foreach(lc, candidates)
	{
		if (abp_usage_table_attached(lfirst_oid(lc), serverid, ledger_from))
			return lfirst_oid(lc);
	}
	return InvalidOid;
}

static UsageRelation *
know_relation(Relation rel)
{
	Oid			relid = RelationGetRelid(rel);
	Oid			serverid = InvalidOid;
	int64		ledger_from = 0;
	UsageRelation *known;
	char	   *problem;
	bool		found;

	if (relations == NULL)
		create_relations();

	known = hash_search(relations, &relid, HASH_ENTER, &found);
	if (found && known->valid)
		return known;

	if (!found)
	{
		known->values = NULL;
		known->nulls = NULL;
		known->natts = 0;
	}
	known->valid = false;
	known->warned = false;

	if (known->natts < RelationGetDescr(rel)->natts)
	{
		int			natts = RelationGetDescr(rel)->natts;

		if (known->values != NULL)
		{
			pfree(known->values);
			pfree(known->nulls);
		}
		known->natts = 0;
		known->values = MemoryContextAlloc(TopMemoryContext, sizeof(Datum) * natts);
		known->nulls = MemoryContextAlloc(TopMemoryContext, sizeof(bool) * natts);
		known->natts = natts;
	}

	known->defaults = NULL;
	if (!abp_usage_columns_find(rel, &known->columns, &problem))
		ereport(ERROR,
				(errcode(ERRCODE_DATATYPE_MISMATCH),
				 errmsg("table \"%s\" lacks columns of a usage table",
						RelationGetRelationName(rel)),
				 errdetail("%s.", problem),
				 errhint("Restore the columns, or take the triggers off with aibilling.detach.")));
	pfree(problem);

	find_defaults(known, rel);
	attachments_relid = abp_extension_relation(abp_attachment_table());

	/* Looking the server up may let in news of a change: then look again. */
	known->valid = true;
	known->id_index = InvalidOid;
	known->counts_not_queued = OidIsValid(abp_extension_relation("ledger"));
	known->usage_table = find_usage_table(rel, &serverid, &ledger_from);
	known->serverid = serverid;
	known->ledger_from = ledger_from;
	return known;
}

/* The columns of a tuple, in the order of UsageColumn. */
static void
read_columns(const UsageRelation *known, HeapTuple tuple, TupleDesc desc,
			 Datum *values, bool *nulls)
{
	const AttrNumber *attnums = known->columns.attnums;

	heap_deform_tuple(tuple, desc, known->values, known->nulls);
	for (int i = 0; i < NUM_USAGE_COLUMNS; i++)
	{
		values[i] = known->values[attnums[i] - 1];
		nulls[i] = known->nulls[attnums[i] - 1];
	}
	if (likely(known->columns.all_plain))
		return;
	for (int i = 0; i < NUM_USAGE_COLUMNS; i++)
	{
		if (!known->columns.plain[i] && !nulls[i])
			values[i] = abp_usage_value_read(&known->columns, i, values[i]);
	}
}

/*
 * Put defaults into a new tuple where it has NULL.  Returns what is known of the
 * relation then, and its columns.
 */
static UsageRelation *
fill_defaults(UsageRelation *known, Relation rel, HeapTuple *tuple, Datum *values, bool *nulls)
{
	*tuple = tuple_with_defaults(known, rel, *tuple, nulls);
	known = know_relation(rel);
	read_columns(known, *tuple, RelationGetDescr(rel), values, nulls);
	return known;
}

/* --- what a row must be ---------------------------------------------------- */

/* Why a row is not one of usage: the words of an error. */
typedef struct RowProblem
{
	UsageColumn column;
	int			sqlerrcode;
	char	   *message;
	const char *hint;			/* or NULL */
} RowProblem;

static bool
breaks_rule(UsageColumn column, const char *rule, RowProblem *problem)
{
	problem->column = column;
	problem->sqlerrcode = ERRCODE_CHECK_VIOLATION;
	problem->message = psprintf("column \"%s\" of a usage row %s",
								abp_usage_columns[column].name, rule);
	problem->hint = NULL;
	return false;
}

/*
 * Is the row free of the programmer's mistakes that a table without our
 * constraints lets pass?  Counts are checked where they are priced.
 */
static bool
row_is_sound(const UsageRow *row, RowProblem *problem)
{
	if (row->external_id.data == NULL)
		return breaks_rule(COL_EXTERNAL_ID, "must not be null", problem);
	if (row->external_id.len < 1 || row->external_id.len > 255)
		return breaks_rule(COL_EXTERNAL_ID, "must have 1 to 255 bytes", problem);
	if (TIMESTAMP_NOT_FINITE(row->occurred_at) ||
		row->occurred_at < -INT64CONST(63082281600000000))
		return breaks_rule(COL_OCCURRED_AT, "must be a finite time after the year 0", problem);
	if (!JB_ROOT_IS_OBJECT(row->tags))
		return breaks_rule(COL_TAGS, "must be a JSON object", problem);
	if (row->counts.units != NULL && !JB_ROOT_IS_OBJECT(row->counts.units))
		return breaks_rule(COL_UNITS, "must be a JSON object", problem);
	if (row->raw_usage != NULL && row->usage_format.data == NULL)
		return breaks_rule(COL_USAGE_FORMAT, "must name the format of raw_usage", problem);
	if (row->usage_format.data != NULL && !abp_usage_format_known(row->usage_format))
	{
		problem->column = COL_USAGE_FORMAT;
		problem->sqlerrcode = ERRCODE_INVALID_PARAMETER_VALUE;
		problem->message = psprintf("unknown usage format \"%.*s\"",
									row->usage_format.len, row->usage_format.data);
		problem->hint = abp_usage_format_hint(row->usage_format);
		return false;
	}
	return true;
}

/*
 * Raise an error for a row that is not sound, with table and column as
 * PostgreSQL's own have them.
 */
static void
check_row(Relation rel, const UsageRow *row, const bool *nulls)
{
	RowProblem	problem;

	for (int i = 0; i < lengthof(needed_columns); i++)
	{
		const char *name = abp_usage_columns[needed_columns[i]].name;

		if (nulls[needed_columns[i]])
			ereport(ERROR,
					(errcode(ERRCODE_NOT_NULL_VIOLATION),
					 errmsg("null value in column \"%s\" of usage table \"%s\"",
							name, RelationGetRelationName(rel)),
					 errhint("Give a value, or the column a default."),
					 errtablecolname(rel, name)));
	}
	if (row_is_sound(row, &problem))
		return;
	ereport(ERROR,
			(errcode(problem.sqlerrcode),
			 errmsg_internal("%s", problem.message),
			 problem.hint != NULL ? errhint("%s", problem.hint) : 0,
			 errtablecolname(rel, abp_usage_columns[problem.column].name)));
}

static TextView
view_of(const char *string)
{
	TextView	view = {string, strlen(string)};

	return view;
}

/*
 * Can the columns of the row's table hold what its raw usage object is about
 * to fill in?  If not, says so: a provider's surprise costs no INSERT.
 */
static bool
usage_fits(const UsageRow *row, const NormalizedUsage *usage, StringInfo reason)
{
	const UsageColumns *columns = row->columns;
	UsageColumn filled[NUM_USAGE_COUNTS + 4];
	Datum		values[NUM_USAGE_COUNTS + 4];
	int			n = 0;

	for (int i = 0; i < NUM_USAGE_COUNTS; i++)
	{
		if (row->counts.given[i] || !usage->counts.given[i])
			continue;
		filled[n] = COL_FIRST_COUNT + i;
		values[n++] = Int64GetDatum(usage->counts.value[i]);
	}
	if (row->provider_cost == NULL && usage->provider_cost != NULL)
	{
		filled[n] = COL_PROVIDER_COST;
		values[n++] = NumericGetDatum(usage->provider_cost);
	}
	if (abp_price_tier_is_standard(row->service_tier) && usage->service_tier != NULL)
	{
		filled[n] = COL_SERVICE_TIER;
		values[n++] = CStringGetTextDatum(usage->service_tier);
	}
	if (row->model.data == NULL && usage->model != NULL)
	{
		filled[n] = COL_MODEL;
		values[n++] = CStringGetTextDatum(usage->model);
	}
	if (row->generation_id.data == NULL && usage->generation_id != NULL)
	{
		filled[n] = COL_GENERATION_ID;
		values[n++] = CStringGetTextDatum(usage->generation_id);
	}

	for (int i = 0; i < n; i++)
	{
		if (columns->plain[filled[i]] || abp_usage_value_fits(columns, filled[i], values[i]))
			continue;
		appendStringInfo(reason, "its %s does not fit the column's type %s",
						 abp_usage_columns[filled[i]].name,
						 format_type_with_typemod(columns->stored[filled[i]],
												  columns->typmods[filled[i]]));
		return false;
	}
	return true;
}

/*
 * Fill a row's columns from its raw usage object.  Counts given beside it
 * must agree.  Returns false, with the reason, if the object cannot be used;
 * the row is unchanged then.  Where the cost is reported, nothing of that
 * keeps the object from being used: counts that make no sense are left out,
 * and *doubt, palloc'd, says why; otherwise it is NULL.
 */
static bool
normalize_row(UsageRow *row, StringInfo reason, char **doubt)
{
	UsageCall	call = {row->model, row->provider_cost != NULL};
	NormalizedUsage usage = {{{0}}};
	UsageCounts given = row->counts;
	CountsProblem problem;

	*doubt = NULL;
	if (!abp_normalize_usage(row->usage_format, row->raw_usage, &call, &usage, reason))
		return false;
	*doubt = usage.doubt;
	if (row->columns != NULL && !row->columns->all_plain && !usage_fits(row, &usage, reason))
		return false;

	for (int i = 0; i < NUM_USAGE_COUNTS; i++)
	{
		char	   *words;

		if (!row->counts.given[i] || !usage.counts.given[i] ||
			row->counts.value[i] == usage.counts.value[i])
			continue;
		words = psprintf("%s is " INT64_FORMAT " but raw_usage says " INT64_FORMAT,
						 abp_usage_columns[COL_FIRST_COUNT + i].name,
						 row->counts.value[i], usage.counts.value[i]);
		if (row->provider_cost == NULL && usage.provider_cost == NULL)
		{
			appendStringInfoString(reason, words);
			return false;
		}
		*doubt = *doubt ? psprintf("%s; %s", *doubt, words) : words;
	}

	for (int i = 0; i < NUM_USAGE_COUNTS; i++)
	{
		if (!row->counts.given[i] && usage.counts.given[i])
		{
			row->counts.given[i] = true;
			row->counts.value[i] = usage.counts.value[i];
		}
	}
	if (row->counts.units == NULL)
		row->counts.units = usage.counts.units;
	else if (usage.counts.units != NULL)
		row->counts.units = DatumGetJsonbP(DirectFunctionCall2(jsonb_concat,
															   JsonbPGetDatum(usage.counts.units),
															   JsonbPGetDatum(row->counts.units)));
	if (row->provider_cost == NULL)
		row->provider_cost = usage.provider_cost;
	/* What was given beside the object holds where the two make no sense. */
	if (*doubt != NULL && !abp_cost_consistent(&row->counts, &problem))
		row->counts = given;
	if (abp_price_tier_is_standard(row->service_tier) && usage.service_tier != NULL)
		row->service_tier = view_of(usage.service_tier);
	if (row->model.data == NULL && usage.model != NULL)
		row->model = view_of(usage.model);
	if (row->generation_id.data == NULL && usage.generation_id != NULL)
		row->generation_id = view_of(usage.generation_id);
	return true;
}

/* What a row whose raw usage object, if any, has been read asks of prices. */
static PriceRequest
price_request(const UsageRow *row)
{
	PriceRequest request = {
		.provider = row->provider,
		.model = row->model,
		.service_tier = row->service_tier,
		.at = row->occurred_at,
		.counts = &row->counts,
		.provider_cost = row->provider_cost,
		.from_reply = row->raw_usage != NULL
	};

	return request;
}

/*
 * What keeps a stored row from being billed whatever the prices are, in the
 * words of its outbox entry, palloc'd; NULL if nothing does.  With read_raw,
 * *filled is the row with the columns of its raw usage object filled in;
 * otherwise it is the row as it is.
 *
 * An INSERT refuses nearly all of this.  It is found in rows that were there
 * before their table was attached.
 */
static char *
find_fault(const UsageRow *row, bool read_raw, UsageRow *filled)
{
	RowProblem	problem;
	CountsProblem counts_problem;
	char	   *amount_problem;

	*filled = *row;
	if (!row_is_sound(row, &problem))
		return problem.message;
	if (read_raw && row->raw_usage != NULL)
	{
		StringInfoData reason;
		char	   *doubt;

		initStringInfo(&reason);
		if (!normalize_row(filled, &reason, &doubt))
			return psprintf("raw_usage: %s", reason.data);
		pfree(reason.data);
	}
	if (!abp_cost_consistent(&filled->counts, &counts_problem))
		return counts_problem.message;
	if (filled->provider_cost != NULL &&
		!abp_cost_finite(filled->provider_cost, &amount_problem))
		return amount_problem;
	return NULL;
}

/*
 * What is wrong with the raw usage object of a row whose cost is reported, in
 * words, palloc'd; NULL if nothing is.
 */
char	   *
abp_usage_doubt_of(const UsageRow *row)
{
	UsageRow	filled = *row;
	StringInfoData reason;
	char	   *doubt = NULL;

	if (row->raw_usage == NULL || row->provider_cost == NULL ||
		!abp_usage_format_known(row->usage_format))
		return NULL;
	initStringInfo(&reason);
	return normalize_row(&filled, &reason, &doubt) ? doubt : NULL;
}

static char *
cost_beyond_range(const UsageRow *row)
{
	return psprintf("no possible price: the cost is beyond the range of cost_nanos (provider \"%.*s\", model \"%.*s\")",
					row->provider.len, row->provider.data ? row->provider.data : "",
					row->model.len, row->model.data ? row->model.data : "");
}

/*
 * What keeps a row without fault from being priced, in the words of its
 * outbox entry, palloc'd; NULL if nothing does.
 *
 * A cost beyond cost_nanos is an error when the row is inserted.  When it
 * comes of a price that has come since, that price is a mistake: the row
 * waits for another one, and keeps nobody else from being sent.
 */
static char *
missing_price(const UsageRow *row)
{
	PriceRequest request = price_request(row);
	ExactCost	cost;
	CostStatus	status;
	char	   *missing = NULL;
	int64		nanos;

	status = abp_price_cost(&request, &cost, &missing);
	if (status == COST_UNPRICED || status == COST_INCOMPLETE)
		return missing;
	if (!abp_cost_fits_nanos(&cost, &nanos))
		return cost_beyond_range(row);
	return NULL;
}

/* How much of a reason is stored and logged, in bytes. */
static int
short_length(const char *reason)
{
	int			len = strlen(reason);

	return len <= MAX_REASON_LEN ? len : pg_mbcliplen(reason, len, MAX_REASON_LEN);
}

static void
shorten(char *reason)
{
	if (reason != NULL)
		reason[short_length(reason)] = '\0';
}

/*
 * What keeps a row without a cost from having one: a fault of its own, for
 * somebody to fix, or the lack of a price.  OUTBOX_READY if nothing does.
 */
void
abp_usage_judge_price(const UsageRow *row, RowState *verdict)
{
	UsageRow	filled;

	verdict->state = OUTBOX_READY;
	verdict->not_before = DT_NOBEGIN;
	verdict->error = NULL;
	verdict->outcome_unknown = false;
	if (row->has_cost_nanos)
		return;

	verdict->error = find_fault(row, true, &filled);
	if (verdict->error != NULL)
		verdict->state = OUTBOX_REJECTED;
	else
	{
		verdict->error = missing_price(&filled);
		if (verdict->error != NULL)
			verdict->state = OUTBOX_UNPRICED;
	}
	shorten(verdict->error);
}

/*
 * The cost of a stored row by the prices of now.  Returns false, with the
 * reason, palloc'd, if the row has a fault or the cost is beyond cost_nanos.
 */
bool
abp_usage_price(const UsageRow *row, PricedCost *cost, char **problem)
{
	UsageRow	filled;
	PriceRequest request;

	*problem = find_fault(row, true, &filled);
	if (*problem != NULL)
		return false;
	request = price_request(&filled);
	if (!abp_price_usage(&request, true, cost))
	{
		*problem = cost_beyond_range(&filled);
		return false;
	}
	return true;
}

/*
 * What is to become of a row: ready, or waiting for its time, for a price,
 * for somebody to fix it.
 */
void
abp_usage_judge(const UsageRow *row, const ServerOptions *server, RowState *verdict)
{
	static StringInfoData reason = {NULL};
	UsageRow	filled;

	if (reason.data == NULL)
	{
		MemoryContext old = MemoryContextSwitchTo(TopMemoryContext);

		initStringInfo(&reason);
		MemoryContextSwitchTo(old);
	}
	resetStringInfo(&reason);

	verdict->state = OUTBOX_READY;
	verdict->not_before = DT_NOBEGIN;
	verdict->outcome_unknown = false;
	verdict->error = find_fault(row, !row->has_cost_nanos, &filled);
	if (verdict->error != NULL)
		verdict->state = OUTBOX_REJECTED;
	else if (!abp_polar_check(row, &server->format, &reason))
	{
		verdict->state = OUTBOX_REJECTED;
		verdict->error = pstrdup(reason.data);
	}
	else if (!row->has_cost_nanos && !server->send_unpriced)
	{
		char	   *missing = missing_price(&filled);

		verdict->state = OUTBOX_UNPRICED;
		verdict->error = missing != NULL ? missing :
			pstrdup("a price has arrived; the row waits for its cost");
	}
	else if (row->occurred_at > GetCurrentTransactionStartTimestamp() &&
			 row->occurred_at > GetCurrentTimestamp())
	{
		/* in whole seconds, so that rows share an entry */
		verdict->state = OUTBOX_WAITING;
		verdict->not_before = row->occurred_at - row->occurred_at % USECS_PER_SEC + USECS_PER_SEC;
	}
	shorten(verdict->error);
}

/* --- the end of a transaction ------------------------------------------------ */

static void
on_transaction_end(XactEvent event, void *arg)
{
	if (event != XACT_EVENT_COMMIT && event != XACT_EVENT_PREPARE && event != XACT_EVENT_ABORT)
		return;
	defaults_context = NULL;
	defaults_transaction++;
	returning = NULL;			/* its memory goes with the transaction */
	returning_level = 0;
	warned_command = InvalidCommandId;
	repricing_table = InvalidOid;
}

static void
on_subtransaction_end(SubXactEvent event, SubTransactionId mine,
					  SubTransactionId parent, void *arg)
{
	int			level = GetCurrentTransactionNestLevel();

	if (event == SUBXACT_EVENT_COMMIT_SUB)
		returning_level = Min(returning_level, level - 1);
	if (event != SUBXACT_EVENT_ABORT_SUB)
		return;
	if (level <= repricing_level)
		repricing_table = InvalidOid;
	if (level <= returning_level)
		forget_returning(level);
}

/* --- rows that are not new -------------------------------------------------- */

/*
 * A row that is inserted with its cost filled in may be none that has just
 * come about: its statement moves it from one partition to another, or its
 * owner brings it back.  What tells is the row itself, never how it came.
 */
typedef enum ReturnKind
{
	RETURN_MOVED,				/* nothing of it has changed */
	RETURN_CHANGED,				/* something that is billed has */
	RETURN_DELIVERED			/* Polar has it: it keeps its cost */
} ReturnKind;

/* A row between its BEFORE and its AFTER INSERT trigger. */
typedef struct Returning
{
	RowKey		key;			/* hash key */
	int			nest_level;
	ReturnKind	kind;
} Returning;

static Returning *
find_returning(Oid usage_table, int64 id, HASHACTION action)
{
	RowKey		key;

	memset(&key, 0, sizeof(key));
	key.usage_table = usage_table;
	key.id = id;
	return hash_search(returning, &key, action, NULL);
}

static void
remember_returning(Oid usage_table, int64 id, ReturnKind kind)
{
	Returning  *row;

	if (returning == NULL)
	{
		HASHCTL		ctl = {
			.keysize = sizeof(RowKey),
			.entrysize = sizeof(Returning),
			.hcxt = TopTransactionContext
		};

		returning = hash_create("aibilling returning rows", 64, &ctl,
								HASH_ELEM | HASH_BLOBS | HASH_CONTEXT);
	}
	row = find_returning(usage_table, id, HASH_ENTER);
	row->nest_level = GetCurrentTransactionNestLevel();
	row->kind = kind;
	returning_level = Max(returning_level, row->nest_level);
}

/* Those of levels from this one on are rolled back. */
static void
forget_returning(int level)
{
	HASH_SEQ_STATUS scan;
	Returning  *row;

	hash_seq_init(&scan, returning);
	while ((row = hash_seq_search(&scan)) != NULL)
	{
		if (row->nest_level >= level)
			hash_search(returning, &row->key, HASH_REMOVE, NULL);
	}
	returning_level = level - 1;
}

/* --- rows by their id --------------------------------------------------------- */

/* Looks at a row; returns whether to stop. */
typedef bool (*RowLook) (UsageRelation *known, Relation rel, HeapTuple tuple, void *arg);

/* The partition in which a row was found last: the next is likely there, too. */
static Oid	last_partition = InvalidOid;
static Oid	last_root = InvalidOid;

/* An index that finds rows by their id. */
static Oid
id_index(Relation rel, AttrNumber id)
{
	List	   *indexes = RelationGetIndexList(rel);
	Oid			found = InvalidOid;
	ListCell   *lc;

	foreach(lc, indexes)
	{
		Relation	index = index_open(lfirst_oid(lc), AccessShareLock);

		if (index->rd_index->indisvalid && index->rd_rel->relam == BTREE_AM_OID &&
			index->rd_index->indkey.values[0] == id &&
			heap_attisnull(index->rd_indextuple, Anum_pg_index_indpred, NULL))
			found = lfirst_oid(lc);
		index_close(index, NoLock);
		if (OidIsValid(found))
			break;
	}
	list_free(indexes);
	return found;
}

/* A scan key for an id, whatever integer it is stored as. */
static void
init_id_key(ScanKey key, const UsageRelation *known, int64 id)
{
	Oid			stored = known->columns.stored[COL_ID];

	ScanKeyEntryInitialize(key, 0, known->columns.attnums[COL_ID], BTEqualStrategyNumber,
						   INT8OID, InvalidOid,
						   stored == INT8OID ? F_INT8EQ : stored == INT4OID ? F_INT48EQ : F_INT28EQ,
						   Int64GetDatum(id));
}

/* Look at the rows of an id in a table that has rows itself. */
static bool
look_in_leaf(Relation rel, int64 id, Snapshot snapshot, RowLook look, void *arg)
{
	UsageRelation *known = know_relation(rel);
	ScanKeyData key;
	SysScanDesc scan;
	Oid			index;
	HeapTuple	tuple;
	bool		found = false;

	if (!OidIsValid(known->id_index))
		known->id_index = id_index(rel, known->columns.attnums[COL_ID]);
	index = known->id_index;
	init_id_key(&key, known, id);
	scan = systable_beginscan(rel, index, OidIsValid(index), snapshot, 1, &key);
	while (!found && (tuple = systable_getnext(scan)) != NULL)
	{
		CHECK_FOR_INTERRUPTS();
		found = look(known, rel, tuple, arg);
	}
	systable_endscan(scan);
	return found;
}

static bool
look_in_relation(Oid root, Relation rel, int64 id, Snapshot snapshot, RowLook look, void *arg)
{
	PartitionDesc partitions;
	bool		found = false;

	if (rel->rd_rel->relkind == RELKIND_RELATION)
	{
		found = look_in_leaf(rel, id, snapshot, look, arg);
		if (found)
		{
			last_root = root;
			last_partition = RelationGetRelid(rel);
		}
		return found;
	}
	if (rel->rd_rel->relkind != RELKIND_PARTITIONED_TABLE)
		return false;

	partitions = RelationGetPartitionDesc(rel, true);
	for (int i = 0; i < partitions->nparts && !found; i++)
	{
		Relation	partition = table_open(partitions->oids[i], AccessShareLock);

		found = look_in_relation(root, partition, id, snapshot, look, arg);
		table_close(partition, NoLock);
	}
	return found;
}

/*
 * Look at the rows of an id in a usage table, until "look" returns true.
 * Returns whether it has.  Without SQL: no code of anybody's runs.
 */
static bool
look_for_rows(Oid usage_table, int64 id, Snapshot snapshot, RowLook look, void *arg)
{
	Relation	rel = table_open(usage_table, AccessShareLock);
	bool		found = false;

	if (last_root == usage_table && rel->rd_rel->relkind == RELKIND_PARTITIONED_TABLE)
	{
		Relation	partition = try_relation_open(last_partition, AccessShareLock);

		if (partition != NULL)
		{
			if (partition->rd_rel->relispartition &&
				list_member_oid(get_partition_ancestors(last_partition), usage_table))
				found = look_in_leaf(partition, id, snapshot, look, arg);
			relation_close(partition, NoLock);
		}
	}
	if (!found)
		found = look_in_relation(usage_table, rel, id, snapshot, look, arg);
	table_close(rel, NoLock);
	return found;
}

/* A row's columns, to be compared with another's of its id. */
typedef struct RowColumns
{
	const Datum *values;
	const bool *nulls;
	bool		unchanged;		/* nothing that is billed differs */
} RowColumns;

/* Is this the same row, by its external_id? */
static bool
is_same_row(UsageRelation *known, Relation rel, HeapTuple tuple, void *arg)
{
	RowColumns *row = arg;
	Datum		values[NUM_USAGE_COLUMNS];
	bool		nulls[NUM_USAGE_COLUMNS];
	bool		ignored;

	read_columns(known, tuple, RelationGetDescr(rel), values, nulls);
	if (nulls[COL_EXTERNAL_ID] || row->nulls[COL_EXTERNAL_ID] ||
		!same_value(COL_EXTERNAL_ID, values[COL_EXTERNAL_ID], row->values[COL_EXTERNAL_ID]))
		return false;
	row->unchanged = !billed_columns_changed(values, nulls, row->values, row->nulls, &ignored);
	return true;
}

static bool
is_any_row(UsageRelation *known, Relation rel, HeapTuple tuple, void *arg)
{
	return true;
}

/* Is there a row of this id now? */
static bool
row_exists(Oid usage_table, int64 id)
{
	return look_for_rows(usage_table, id, SnapshotSelf, is_any_row, NULL);
}

/*
 * Ids of which there is a row, of those given; in the current memory context.
 */
IdSet
abp_usage_existing(Oid usage_table, const IdSet *ids)
{
	IdSet		existing = {0};

	for (int i = 0; i < ids->nranges; i++)
	{
		for (int64 id = ids->ranges[i].first;; id++)
		{
			if (row_exists(usage_table, id))
				abp_idset_add(&existing, id, id, CurrentMemoryContext);
			if (id == ids->ranges[i].last)
				break;
		}
	}
	return existing;
}

/*
 * Does the caller own a usage table?  Not by way of a SECURITY DEFINER function
 * of the owner's: what the owner may leave out of the bill, whoever calls their
 * function may not.
 */
static bool
is_owned_by_caller(Oid usage_table)
{
	return abp_owns_table(usage_table, GetUserId()) &&
		abp_owns_table(usage_table, GetOuterUserId());
}

/*
 * Is a row that is inserted with its cost filled in one that was there?  When
 * its statement began it was visible, or Polar has it and it is its owner who
 * brings it back.
 */
static bool
is_returning(UsageRelation *known, RowColumns *row, int64 id, ReturnKind *kind)
{
	if (ActiveSnapshotSet() &&
		look_for_rows(known->usage_table, id, GetActiveSnapshot(), is_same_row, row))
	{
		*kind = row->unchanged ? RETURN_MOVED : RETURN_CHANGED;
		return true;
	}
	if (is_owned_by_caller(known->usage_table) &&
		abp_ledger_has(known->usage_table, id, known->ledger_from))
	{
		*kind = RETURN_DELIVERED;
		return true;
	}
	return false;
}

/* --- warnings --------------------------------------------------------------- */

/* May this statement warn once more?  It is to be a few kB in the log, not more. */
static bool
may_warn(void)
{
	if (warned_statement != GetCurrentStatementStartTimestamp())
	{
		warned_statement = GetCurrentStatementStartTimestamp();
		statement_warnings = 0;
	}
	return statement_warnings < MAX_STATEMENT_WARNINGS;
}

static void
warn_rejected(Relation rel, int64 id, const char *reason)
{
	CommandId	command = GetCurrentCommandId(false);

	if (warned_command == command || !may_warn())
		return;
	warned_command = command;
	statement_warnings++;

	ereport(WARNING,
			(errcode(ERRCODE_WARNING),
			 errmsg("usage row " INT64_FORMAT " of \"%s\" was stored but cannot be sent: %s",
					id, RelationGetRelationName(rel), reason),
			 errhint("Fix the row with UPDATE. All such rows are in aibilling.outbox as rejected.")));
}

/*
 * Tell, once a statement, of a usage object whose numbers are in doubt although
 * the cost is known.
 */
void
abp_usage_note_doubt(const char *doubt)
{
	if (noted_statement == GetCurrentStatementStartTimestamp())
		return;
	noted_statement = GetCurrentStatementStartTimestamp();
	ereport(NOTICE,
			(errmsg("the reported cost is used, but the usage object is in doubt: %.*s",
					short_length(doubt), doubt),
			 errdetail("Counts that make no sense are left out. aibilling.explain_cost() tells the same of each row.")));
}

static void
warn_unpriced(const UsageRow *row, const char *reason)
{
	char		key[128];
	bool		found;

	if (warned_models == NULL)
	{
		HASHCTL		ctl = {.keysize = sizeof(key),.entrysize = sizeof(key)};

		warned_models = hash_create("aibilling models warned of", 16, &ctl,
									HASH_ELEM | HASH_STRINGS);
	}
	if (hash_get_num_entries(warned_models) >= MAX_WARNED_MODELS || !may_warn())
		return;

	strlcpy(key, reason, sizeof(key));
	hash_search(warned_models, key, HASH_ENTER, &found);
	if (!found)
	{
		PriceRequest request = price_request(row);
		char	   *hint = abp_price_hint(&request);

		shorten(hint);
		statement_warnings++;
		ereport(WARNING,
				(errcode(ERRCODE_WARNING),
				 errmsg("usage is held until it can be priced: %s", reason),
				 errhint("%s", hint ? hint : "What is held is listed in aibilling.unpriced.")));
	}
}

/* --- triggers ---------------------------------------------------------------- */

/*
 * Anyone may make triggers of these functions, on tables and for events of
 * his own choice: each must be called for what it is written for, or there is
 * no row where it looks for one.
 */
static void
check_trigger(FunctionCallInfo fcinfo, const char *name,
			  TriggerEvent event, TriggerEvent or_event, const char *definition)
{
	TriggerEvent fired;

	if (!CALLED_AS_TRIGGER(fcinfo))
		ereport(ERROR,
				(errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
				 errmsg("function \"aibilling.%s\" can only be called as a trigger", name)));

	fired = ((TriggerData *) fcinfo->context)->tg_event &
		(TRIGGER_EVENT_OPMASK | TRIGGER_EVENT_ROW | TRIGGER_EVENT_TIMINGMASK);
	if (fired != event && fired != or_event)
		ereport(ERROR,
				(errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
				 errmsg("function \"aibilling.%s\" can only be called %s", name, definition),
				 errhint("Let aibilling.attach() create the triggers.")));
}

/* The new row with its columns filled in and its cost. */
static HeapTuple
priced_tuple(UsageRelation *known, TupleDesc desc, const UsageRow *row,
			 bool normalized, const PricedCost *cost)
{
	Datum	   *values = known->values;
	bool	   *nulls = known->nulls;

#define SET_COLUMN(column, isnull, datum) \
	do { \
		AttrNumber	att_ = known->columns.attnums[column] - 1; \
		nulls[att_] = (isnull); \
		if (!nulls[att_]) \
			values[att_] = (datum); \
		if (unlikely(!known->columns.plain[column])) \
			values[att_] = abp_usage_value_write(&known->columns, column, \
												 values[att_], nulls[att_]); \
	} while (0)

	if (normalized)
	{
		for (int i = 0; i < NUM_USAGE_COUNTS; i++)
			SET_COLUMN(COL_FIRST_COUNT + i, !row->counts.given[i],
					   Int64GetDatum(row->counts.value[i]));
		SET_COLUMN(COL_UNITS, row->counts.units == NULL, JsonbPGetDatum(row->counts.units));
		SET_COLUMN(COL_PROVIDER_COST, row->provider_cost == NULL,
				   NumericGetDatum(row->provider_cost));
		SET_COLUMN(COL_SERVICE_TIER, row->service_tier.data == NULL,
				   PointerGetDatum(cstring_to_text_with_len(row->service_tier.data,
															row->service_tier.len)));
		SET_COLUMN(COL_MODEL, row->model.data == NULL,
				   PointerGetDatum(cstring_to_text_with_len(row->model.data, row->model.len)));
		SET_COLUMN(COL_GENERATION_ID, row->generation_id.data == NULL,
				   PointerGetDatum(cstring_to_text_with_len(row->generation_id.data,
															row->generation_id.len)));
	}
	if (row->tags_are_null && !nulls[known->columns.attnums[COL_TAGS] - 1])
		SET_COLUMN(COL_TAGS, false, JsonbPGetDatum(row->tags));
	SET_COLUMN(COL_COST_NANOS, !cost->known, Int64GetDatum(cost->cost_nanos));
	SET_COLUMN(COL_COST_CENTS, !cost->known, NumericGetDatum(cost->cost_cents));
	SET_COLUMN(COL_COST_STATUS, false,
			   CStringGetTextDatum(abp_cost_status_name(cost->status)));
#undef SET_COLUMN

	return heap_form_tuple(desc, values, nulls);
}

/*
 * Are two values of a column, not NULL, the same?  Numbers are if they are
 * equal, whatever zeros they end in, and JSON with such numbers, too.
 */
static bool
same_value(UsageColumn column, Datum a, Datum b)
{
	switch (abp_usage_columns[column].type)
	{
		case INT8OID:
		case TIMESTAMPTZOID:
			return DatumGetInt64(a) == DatumGetInt64(b);
		case UUIDOID:
			return datum_image_eq(a, b, false, UUID_LEN);
		case NUMERICOID:
			return datum_image_eq(a, b, false, -1) ||
				DatumGetBool(DirectFunctionCall2(numeric_eq, a, b));
		case JSONBOID:
			return datum_image_eq(a, b, false, -1) ||
				DatumGetBool(DirectFunctionCall2(jsonb_eq, a, b));
		default:
			return datum_image_eq(a, b, false, -1);
	}
}

/* Has anything that is billed changed? */
static bool
billed_columns_changed(const Datum *old_values, const bool *old_nulls,
					   const Datum *new_values, const bool *new_nulls,
					   bool *raw_changed)
{
	bool		changed = false;

	*raw_changed = false;
	for (int i = 0; i < NUM_USAGE_COLUMNS; i++)
	{
		if (old_nulls[i] == new_nulls[i] &&
			(old_nulls[i] || same_value(i, old_values[i], new_values[i])))
			continue;
		if (abp_usage_columns[i].billed)
			changed = true;
		else
			*raw_changed = true;
	}
	return changed;
}

static void
refuse_change(const RowPlace *place, Relation rel, int64 id, const char *verb)
{
	bool		unknown = place->where == ROW_IN_OUTBOX;

	ereport(ERROR,
			(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
			 errmsg("cannot %s usage row " INT64_FORMAT " of \"%s\": it %s",
					verb, id, RelationGetRelationName(rel),
					unknown ? "may have been delivered" :
					place->where == ROW_SENDING ? "is being sent" : "has been delivered"),
			 unknown ? errdetail("A request with it got no answer that says whether Polar has stored it.") : 0,
			 errhint("%sCall aibilling.correct(), or insert a correcting row: with its own external_id, no counts, the difference in provider_cost, and tags.corrects naming the external_id of this row.",
					 unknown ? "It is sent again by itself, or with aibilling.retry() if it is rejected; Polar stores it once. " : "")));
}

/* Is this UPDATE, of a row of this table, ours? */
static bool
is_repriced(const UsageRelation *known, int64 id)
{
	return OidIsValid(repricing_table) && known->usage_table == repricing_table &&
		abp_idset_contains(repricing_ids, id);
}

/*
 * Something that is billed has changed in a row: the outbox is to say what the
 * new row deserves.  Raises an error if Polar has the row, or may have it.
 */
static void
requeue_row(UsageRelation *known, Relation rel, const UsageRow *row,
			const ServerOptions *server)
{
	RowPlace	place;
	RowState	state;
	bool		own;

	if (is_repriced(known, row->id))
		return;					/* whoever reprices moves the ids themselves */

	own = abp_collect_find(known->usage_table, row->id, &place);
	if (!own)
		abp_outbox_find(known->usage_table, row->id, known->ledger_from, &place);
	if (place.where == ROW_NOT_SENT)
		return;
	if (place.where != ROW_IN_OUTBOX || place.outcome_unknown)
		refuse_change(&place, rel, row->id, "update");

	/*
	 * Rows of partitions may share an id: the outbox may speak of the other
	 * one.
	 */
	if (!own && rel->rd_rel->relispartition &&
		abp_ledger_has(known->usage_table, row->id, known->ledger_from))
	{
		place.where = ROW_DELIVERED;
		refuse_change(&place, rel, row->id, "update");
	}

	abp_usage_judge(row, server, &state);
	if (state.state == OUTBOX_REJECTED)
		warn_rejected(rel, row->id, state.error);

	/*
	 * A ready row stays where it is: the shipper reads it as updated, and may
	 * have passed it over while it was locked.
	 */
	if (!own && place.state == OUTBOX_READY && state.state == OUTBOX_READY)
		abp_wake_at_commit();
	else
		abp_collect_changed(known->usage_table, row->id, own ? NULL : &place, &state);
}

/*
 * Is a row that is inserted none that is new, and keeps its cost?  The AFTER
 * trigger is told what it is; an ordinary row has no cost and costs no look.
 */
static bool
remains_as_it_is(UsageRelation *known, const Datum *values, const bool *nulls)
{
	int64		id = DatumGetInt64(values[COL_ID]);
	RowColumns	row = {values, nulls};
	ReturnKind	kind;

	if (!nulls[COL_COST_STATUS] && is_returning(known, &row, id, &kind))
	{
		remember_returning(known->usage_table, id, kind);
		return kind != RETURN_CHANGED;
	}
	if (returning != NULL)
		(void) find_returning(known->usage_table, id, HASH_REMOVE);
	return false;
}

/*
 * BEFORE INSERT OR UPDATE, FOR EACH ROW: normalise and price the row.
 */
Datum
abp_sql_price_usage(PG_FUNCTION_ARGS)
{
	TriggerData *trigdata = (TriggerData *) fcinfo->context;
	Relation	rel;
	TupleDesc	desc;
	UsageRelation *known;
	const ServerOptions *server = NULL;
	Datum		values[NUM_USAGE_COLUMNS];
	bool		nulls[NUM_USAGE_COLUMNS];
	Datum		old_values[NUM_USAGE_COLUMNS];
	bool		old_nulls[NUM_USAGE_COLUMNS];
	UsageRow	row;
	UsageRow	old_row;
	PricedCost	cost = {COST_INCOMPLETE};
	bool		update;
	bool		normalized = false;
	HeapTuple	tuple;

	check_trigger(fcinfo, "price_usage",
				  TRIGGER_EVENT_BEFORE | TRIGGER_EVENT_ROW | TRIGGER_EVENT_INSERT,
				  TRIGGER_EVENT_BEFORE | TRIGGER_EVENT_ROW | TRIGGER_EVENT_UPDATE,
				  "BEFORE INSERT OR UPDATE FOR EACH ROW");
	rel = trigdata->tg_relation;
	desc = RelationGetDescr(rel);
	known = know_relation(rel);
	update = TRIGGER_FIRED_BY_UPDATE(trigdata->tg_event);
	tuple = update ? trigdata->tg_newtuple : trigdata->tg_trigtuple;

	if (!OidIsValid(known->usage_table) && !known->warned)
	{
		known->warned = true;
		ereport(WARNING,
				(errcode(ERRCODE_WARNING),
				 errmsg("table \"%s\" is not attached: its rows are priced but not sent",
						RelationGetRelationName(rel)),
				 errhint("Attach it with SELECT aibilling.attach('%s', server => '...').",
						 RelationGetRelationName(rel))));
	}

	if (update)
	{
		bool		raw_changed;
		bool		changed;

		read_columns(known, trigdata->tg_trigtuple, desc, old_values, old_nulls);
		read_columns(known, tuple, desc, values, nulls);
		if (unlikely(lacks_kept(nulls, old_nulls)))
		{
			tuple = tuple_with_kept(known, desc, tuple, trigdata->tg_trigtuple, nulls);
			read_columns(known, tuple, desc, values, nulls);
		}
		if (unlikely(lacks_defaults(known, nulls)))
			known = fill_defaults(known, rel, &tuple, values, nulls);
		changed = billed_columns_changed(old_values, old_nulls, values, nulls, &raw_changed);
		if (!changed && !is_repriced(known, DatumGetInt64(old_values[COL_ID])) &&
			(!raw_changed || nulls[COL_RAW_USAGE]))
			return PointerGetDatum(tuple);
		if (!nulls[COL_ID] && !old_nulls[COL_ID] &&
			values[COL_ID] != old_values[COL_ID])
			ereport(ERROR,
					(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
					 errmsg("cannot change the id of usage row " INT64_FORMAT " of \"%s\"",
							DatumGetInt64(old_values[COL_ID]), RelationGetRelationName(rel)),
					 errhint("Delete the row and insert another.")));
	}
	else
	{
		read_columns(known, tuple, desc, values, nulls);

		if (unlikely(nulls[COL_ID] && lacks_defaults(known, nulls)))
			known = fill_defaults(known, rel, &tuple, values, nulls);
		if (OidIsValid(known->usage_table) && !nulls[COL_ID] &&
			remains_as_it_is(known, values, nulls))
			return PointerGetDatum(tuple);
		/* the look at other rows has used the relation's scratch */
		if (unlikely(!nulls[COL_COST_STATUS]))
			read_columns(known, tuple, desc, values, nulls);
		if (unlikely(lacks_defaults(known, nulls)))
			known = fill_defaults(known, rel, &tuple, values, nulls);
	}

	abp_usage_row_read(values, nulls, &row);
	row.columns = &known->columns;
	check_row(rel, &row, nulls);
	if (OidIsValid(known->serverid))
		server = abp_server_options(known->serverid);

	if (row.raw_usage != NULL)
	{
		StringInfoData reason;
		char	   *doubt;

		initStringInfo(&reason);
		normalized = normalize_row(&row, &reason, &doubt);
		pfree(reason.data);
		if (normalized && doubt != NULL)
			abp_usage_note_doubt(doubt);
	}

	/* A raw usage object that cannot be read leaves the row without a cost. */
	if (row.raw_usage == NULL || normalized)
	{
		PriceRequest request = price_request(&row);

		(void) abp_price_usage(&request, false, &cost);
		if (!update)
			abp_correct_price(known->usage_table, &row, &cost);
	}
	tuple = priced_tuple(known, desc, &row, normalized, &cost);

	if (update && OidIsValid(known->usage_table) && server != NULL)
	{
		row.has_cost_nanos = cost.known;
		row.cost_nanos = cost.cost_nanos;
		row.cost_cents = cost.cost_cents;
		requeue_row(known, rel, &row, server);
		abp_usage_row_read(old_values, old_nulls, &old_row);
		abp_correct_forget(known->usage_table, &old_row);
		abp_correct_note(known->usage_table, &row);
	}
	return PointerGetDatum(tuple);
}

/*
 * May this session load rows without sending them?
 */
static bool
enqueue_is_off(Oid usage_table)
{
	static bool warned = false;

	if (abp_enqueue)
		return false;
	if (is_owned_by_caller(usage_table))
		return true;

	if (!warned)
		ereport(WARNING,
				(errcode(ERRCODE_WARNING),
				 errmsg("aibilling_polar.enqueue is ignored: \"%s\" belongs to another role",
						get_rel_name(usage_table)),
				 errhint("Only the owner of a usage table, and superusers, load rows without sending them.")));
	warned = true;
	return false;
}

/*
 * AFTER INSERT, FOR EACH ROW: collect the row for the outbox.
 */
Datum
abp_sql_enqueue_usage(PG_FUNCTION_ARGS)
{
	TriggerData *trigdata = (TriggerData *) fcinfo->context;
	Relation	rel;
	UsageRelation *known;
	const ServerOptions *server = NULL;
	Datum		values[NUM_USAGE_COLUMNS];
	bool		nulls[NUM_USAGE_COLUMNS];
	UsageRow	row;
	RowState	state = {OUTBOX_READY, DT_NOBEGIN};
	Returning  *was_there;

	check_trigger(fcinfo, "enqueue_usage",
				  TRIGGER_EVENT_AFTER | TRIGGER_EVENT_ROW | TRIGGER_EVENT_INSERT,
				  TRIGGER_EVENT_AFTER | TRIGGER_EVENT_ROW | TRIGGER_EVENT_INSERT,
				  "AFTER INSERT FOR EACH ROW");
	rel = trigdata->tg_relation;
	known = know_relation(rel);
	if (!OidIsValid(known->usage_table))
		return PointerGetDatum(NULL);

	read_columns(known, trigdata->tg_trigtuple, RelationGetDescr(rel), values, nulls);
	abp_usage_row_read(values, nulls, &row);
	row.columns = &known->columns;
	if (OidIsValid(known->serverid))
		server = abp_server_options(known->serverid);

	was_there = returning == NULL ? NULL : find_returning(known->usage_table, row.id, HASH_FIND);
	if (was_there != NULL)
	{
		ReturnKind	kind = was_there->kind;

		(void) find_returning(known->usage_table, row.id, HASH_REMOVE);
		if (kind == RETURN_CHANGED && server != NULL)
			requeue_row(known, rel, &row, server);
		if (kind != RETURN_DELIVERED)
			return PointerGetDatum(NULL);
		state.outcome_unknown = true;
	}
	if (enqueue_is_off(known->usage_table))
	{
		if (known->counts_not_queued)
			abp_collect_not_queued(known->usage_table, row.id);
		return PointerGetDatum(NULL);
	}

	if (server != NULL)
	{
		abp_usage_judge(&row, server, &state);
		state.outcome_unknown = was_there != NULL;
		if (state.state == OUTBOX_REJECTED)
			warn_rejected(rel, row.id, state.error);
		else if (state.state == OUTBOX_UNPRICED)
			warn_unpriced(&row, state.error);
	}
	abp_collect_inserted(known->usage_table, row.id, &state);
	abp_correct_note(known->usage_table, &row);
	return PointerGetDatum(NULL);
}

/*
 * A row is gone that shared its id with another, and what waits under that id
 * may be of either: the shipper looks at the other one, which Polar may have.
 */
static void
leave_to_other(const UsageRelation *known, int64 id, const RowPlace *place, bool own)
{
	RowState	ready = {OUTBOX_READY, DT_NOBEGIN};

	ready.outcome_unknown = place->outcome_unknown ||
		abp_ledger_has(known->usage_table, id, known->ledger_from);
	if (place->state == OUTBOX_REJECTED || ready.outcome_unknown)
		abp_collect_changed(known->usage_table, id, own ? NULL : place, &ready);
}

/*
 * AFTER DELETE, FOR EACH ROW: a row that Polar may be getting stays; a waiting
 * one leaves the outbox.  After, because the statement may have put the row into
 * another partition: then it is not gone.
 */
Datum
abp_sql_guard_usage(PG_FUNCTION_ARGS)
{
	TriggerData *trigdata = (TriggerData *) fcinfo->context;
	Relation	rel;
	TupleDesc	desc;
	UsageRelation *known;
	Datum		values[NUM_USAGE_COLUMNS];
	bool		nulls[NUM_USAGE_COLUMNS];
	RowColumns	row;
	int64		id;
	RowPlace	place;
	bool		own;
	bool		is_there;		/* the statement has put it elsewhere */

	abp_extension_check_version();
	check_trigger(fcinfo, "guard_usage",
				  TRIGGER_EVENT_AFTER | TRIGGER_EVENT_ROW | TRIGGER_EVENT_DELETE,
				  TRIGGER_EVENT_AFTER | TRIGGER_EVENT_ROW | TRIGGER_EVENT_DELETE,
				  "AFTER DELETE FOR EACH ROW");
	rel = trigdata->tg_relation;
	desc = RelationGetDescr(rel);
	known = know_relation(rel);
	if (!OidIsValid(known->usage_table))
		return PointerGetDatum(NULL);
	read_columns(known, trigdata->tg_trigtuple, desc, values, nulls);
	if (nulls[COL_ID])
		return PointerGetDatum(NULL);
	id = DatumGetInt64(values[COL_ID]);

	own = abp_collect_find(known->usage_table, id, &place);
	if (!own)
		abp_outbox_find(known->usage_table, id, known->ledger_from, &place);
	if (place.where == ROW_NOT_SENT || place.where == ROW_DELIVERED)
		return PointerGetDatum(NULL);

	row = (RowColumns)
	{
		values, nulls
	};
	is_there = look_for_rows(known->usage_table, id, SnapshotSelf, is_same_row, &row);
	if (place.where == ROW_SENDING)
	{
		if (!is_there || !row.unchanged)
			refuse_change(&place, rel, id, "delete");
		return PointerGetDatum(NULL);
	}

	/*
	 * What its INSERT trigger does not know as a row that was there, is
	 * queued by it.
	 */
	if (is_there && returning != NULL &&
		find_returning(known->usage_table, id, HASH_FIND) != NULL)
		return PointerGetDatum(NULL);

	if (!is_there && row_exists(known->usage_table, id))
		leave_to_other(known, id, &place, own);
	else if (!place.outcome_unknown)
	{
		UsageRow	gone;

		abp_collect_changed(known->usage_table, id, own ? NULL : &place, NULL);
		abp_usage_row_read(values, nulls, &gone);
		if (!is_there)
			abp_correct_forget(known->usage_table, &gone);
	}
	else if (!is_there || !row.unchanged)
		refuse_change(&place, rel, id, "delete");
	return PointerGetDatum(NULL);
}

/*
 * BEFORE TRUNCATE, FOR EACH STATEMENT: the outbox forgets the table's rows.
 * The lock that TRUNCATE has keeps the shipper and all others from the table.
 */
Datum
abp_sql_truncate_usage(PG_FUNCTION_ARGS)
{
	TriggerData *trigdata = (TriggerData *) fcinfo->context;
	Relation	rel;
	UsageRelation *known;
	int64		count;

	check_trigger(fcinfo, "truncate_usage",
				  TRIGGER_EVENT_BEFORE | TRIGGER_EVENT_TRUNCATE,
				  TRIGGER_EVENT_BEFORE | TRIGGER_EVENT_TRUNCATE,
				  "BEFORE TRUNCATE FOR EACH STATEMENT");
	rel = trigdata->tg_relation;
	known = know_relation(rel);
	if (!OidIsValid(known->usage_table))
		return PointerGetDatum(NULL);

	if (abp_ledger_sending(known->usage_table))
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_IN_USE),
				 errmsg("cannot truncate \"%s\": rows of it are being sent",
						RelationGetRelationName(rel)),
				 errhint("Pause its server with aibilling.pause(), wait until aibilling.status shows none in flight, and truncate then.")));
	count = abp_outbox_discard(known->usage_table);
	abp_collect_truncated(known->usage_table);
	abp_usage_table_truncated(known->usage_table);
	abp_corrections_forget(known->usage_table);
	if (count > 0)
		ereport(WARNING,
				(errcode(ERRCODE_WARNING),
				 errmsg("truncating \"%s\" drops " INT64_FORMAT " usage rows that were not delivered",
						RelationGetRelationName(rel), count)));
	return PointerGetDatum(NULL);
}

/*
 * Price held rows again, as their table's owner.  Returns the ids of the rows
 * that there still are.
 */
IdSet
abp_usage_price_again(const UsageTable *table, IdSet *ids)
{
	IdSet		updated;

	repricing_table = table->relid;
	repricing_ids = ids;
	repricing_level = GetCurrentTransactionNestLevel();
	updated = abp_usage_reprice(table, ids);
	repricing_table = InvalidOid;
	return updated;
}
