/*-------------------------------------------------------------------------
 *
 * usage.c
 *	  The triggers of usage tables: price the row, put it in the outbox.
 *
 * A BEFORE trigger prices; an AFTER trigger collects the ids of the rows that
 * were really inserted.  The collected ids are written to the outbox in bulk
 * just before the transaction commits, or is prepared: a row and its outbox
 * entry commit together or not at all.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/xact.h"
#include "catalog/partition.h"
#include "commands/trigger.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/datum.h"
#include "utils/hsearch.h"
#include "utils/inval.h"
#include "utils/jsonb.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/syscache.h"
#include "utils/timestamp.h"

#include "compat.h"
#include "config.h"
#include "normalize.h"
#include "outbox.h"
#include "polar.h"
#include "price.h"
#include "server.h"
#include "usage.h"
#include "wake.h"

/* How many models a session is warned about before it is left in peace. */
#define MAX_WARNED_MODELS 1000

/* How many kinds of collected rows are looked through for each row. */
#define MAX_GROUPS_SEARCHED 16

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
	int			natts;
	AttrNumber	attnums[NUM_USAGE_COLUMNS];
	Datum	   *values;			/* scratch: one tuple's columns */
	bool	   *nulls;
} UsageRelation;

/* Ids collected by one nesting level of the transaction. */
typedef struct Collected
{
	struct Collected *next;
	Oid			usage_table;
	int			nest_level;
	bool		removed;		/* taken back instead of collected */
	char		state;
	TimestampTz not_before;
	char	   *error;
	IdSet		ids;
} Collected;

static HTAB *relations = NULL;
static Oid	attachments_relid = InvalidOid; /* aibilling.usage_table */
static HTAB *warned_models = NULL;

/* Lives until the end of the transaction; NULL outside one that collects. */
static MemoryContext collect_context = NULL;
static Collected *collected = NULL;

/* A row of a usage table. */
typedef struct RowKey
{
	Oid			usage_table;
	int64		id;
} RowKey;

/*
 * The row that an UPDATE is about to move to another partition, if it is: the
 * move is a DELETE and an INSERT right behind the UPDATE's trigger.
 */
static struct
{
	RowKey		row;
	CommandId	command;
	bool		deleted;		/* the first half of the move has happened */
}			moving = {{InvalidOid}};

/* Rows moved by the current statement, until their AFTER trigger has fired. */
static HTAB *moved = NULL;

/* The command that has warned of a row that cannot be sent. */
static CommandId warned_command = InvalidCommandId;

/*
 * The table whose rows are being priced again, and at which nesting level:
 * its UPDATE may fire triggers of its owner's, which may update other tables
 * and fail in subtransactions of their own.
 */
static Oid	repricing_table = InvalidOid;
static int	repricing_level;

static void on_transaction_end(XactEvent event, void *arg);
static void on_subtransaction_end(SubXactEvent event, SubTransactionId mine,
								  SubTransactionId parent, void *arg);

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
find_usage_table(Relation rel, Oid *serverid)
{
	List	   *candidates = list_make1_oid(RelationGetRelid(rel));
	ListCell   *lc;

	if (rel->rd_rel->relispartition)
		candidates = list_concat(candidates,
								 get_partition_ancestors(RelationGetRelid(rel)));

	foreach(lc, candidates)
	{
		if (abp_usage_table_attached(lfirst_oid(lc), serverid))
			return lfirst_oid(lc);
	}
	return InvalidOid;
}

static UsageRelation *
know_relation(Relation rel)
{
	Oid			relid = RelationGetRelid(rel);
	Oid			serverid = InvalidOid;
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

	if (!abp_usage_columns_find(rel, known->attnums, &problem))
		ereport(ERROR,
				(errcode(ERRCODE_DATATYPE_MISMATCH),
				 errmsg("table \"%s\" lacks columns of a usage table",
						RelationGetRelationName(rel)),
				 errdetail("%s.", problem),
				 errhint("Restore the columns, or take the triggers off with aibilling.detach.")));
	pfree(problem);

	attachments_relid = abp_extension_relation("usage_table");

	/* Looking the server up may let in news of a change: then look again. */
	known->valid = true;
	known->usage_table = find_usage_table(rel, &serverid);
	known->serverid = serverid;
	return known;
}

/* The columns of a tuple, in the order of UsageColumn. */
static void
read_columns(const UsageRelation *known, HeapTuple tuple, TupleDesc desc,
			 Datum *values, bool *nulls)
{
	heap_deform_tuple(tuple, desc, known->values, known->nulls);
	for (int i = 0; i < NUM_USAGE_COLUMNS; i++)
	{
		values[i] = known->values[known->attnums[i] - 1];
		nulls[i] = known->nulls[known->attnums[i] - 1];
	}
}

/* --- what a row must be ---------------------------------------------------- */

/* Why a row is not one of usage: the words of an error. */
typedef struct RowProblem
{
	int			sqlerrcode;
	char	   *message;
	const char *hint;			/* or NULL */
} RowProblem;

static bool
breaks_rule(UsageColumn column, const char *rule, RowProblem *problem)
{
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
		problem->sqlerrcode = ERRCODE_INVALID_PARAMETER_VALUE;
		problem->message = psprintf("unknown usage format \"%.*s\"",
									row->usage_format.len, row->usage_format.data);
		problem->hint = abp_usage_format_hint(row->usage_format);
		return false;
	}
	return true;
}

/* Raise an error for a row that is not sound. */
static void
check_row(const UsageRow *row, const bool *nulls)
{
	RowProblem	problem;

	if (nulls[COL_ID])
		(void) breaks_rule(COL_ID, "must not be null", &problem);
	else if (row_is_sound(row, &problem))
		return;
	ereport(ERROR,
			(errcode(problem.sqlerrcode),
			 errmsg_internal("%s", problem.message),
			 problem.hint != NULL ? errhint("%s", problem.hint) : 0));
}

static bool
tier_is_default(TextView tier)
{
	return tier.data == NULL || tier.len == 0 ||
		(tier.len == 8 && memcmp(tier.data, "standard", 8) == 0);
}

static TextView
view_of(const char *string)
{
	TextView	view = {string, strlen(string)};

	return view;
}

/*
 * Fill a row's columns from its raw usage object.  Counts given beside it
 * must agree.  Returns false, with the reason, if the object cannot be used;
 * the row is unchanged then.
 */
static bool
normalize_row(UsageRow *row, StringInfo reason)
{
	NormalizedUsage usage = {{{0}}};

	if (!abp_normalize_usage(row->usage_format, row->raw_usage, &usage, reason))
		return false;

	for (int i = 0; i < NUM_USAGE_COUNTS; i++)
	{
		if (row->counts.given[i] && usage.counts.given[i] &&
			row->counts.value[i] != usage.counts.value[i])
		{
			appendStringInfo(reason, "%s is " INT64_FORMAT " but raw_usage says " INT64_FORMAT,
							 abp_usage_columns[COL_FIRST_COUNT + i].name,
							 row->counts.value[i], usage.counts.value[i]);
			return false;
		}
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
	if (tier_is_default(row->service_tier) && usage.service_tier != NULL)
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

		initStringInfo(&reason);
		if (!normalize_row(filled, &reason))
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

/*
 * What keeps a row without a cost from having one: a fault of its own, for
 * somebody to mend, or the lack of a price.  OUTBOX_READY if nothing does.
 */
void
abp_usage_judge_price(const UsageRow *row, RowState *verdict)
{
	UsageRow	filled;

	verdict->state = OUTBOX_READY;
	verdict->not_before = DT_NOBEGIN;
	verdict->error = NULL;
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
 * for somebody to mend it.
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
}

/* --- collecting ids until the transaction commits -------------------------- */

static bool
same_group(const Collected *a, const Collected *b)
{
	if (a->usage_table != b->usage_table || a->nest_level != b->nest_level ||
		a->removed != b->removed)
		return false;
	if (a->removed)
		return true;
	return a->state == b->state && a->not_before == b->not_before &&
		(a->error == b->error ||
		 (a->error != NULL && b->error != NULL && strcmp(a->error, b->error) == 0));
}

/*
 * The group with these properties, NULL if none of the first few is it: two
 * groups of a kind do no harm, a long search for each row would.
 */
static Collected *
find_group(const Collected *properties)
{
	Collected  *group = collected;

	for (int i = 0; group != NULL && i < MAX_GROUPS_SEARCHED; i++)
	{
		if (group != properties && same_group(group, properties))
			return group;
		group = group->next;
	}
	return NULL;
}

/* Collect an id, or take back a collected one, at the current nesting level. */
static void
collect(Oid usage_table, int64 id, bool removed, const RowState *verdict)
{
	Collected	properties = {
		.usage_table = usage_table,
		.nest_level = GetCurrentTransactionNestLevel(),
		.removed = removed
	};
	Collected  *group;

	if (!removed)
	{
		properties.state = verdict->state;
		properties.not_before = verdict->not_before;
		properties.error = verdict->error;
	}

	if (collect_context == NULL)
		collect_context = AllocSetContextCreate(TopTransactionContext,
												"aibilling collected rows",
												ALLOCSET_DEFAULT_SIZES);

	group = find_group(&properties);
	if (group == NULL)
	{
		group = MemoryContextAlloc(collect_context, sizeof(Collected));
		*group = properties;
		if (group->error != NULL)
			group->error = MemoryContextStrdup(collect_context, group->error);
		group->next = collected;
		collected = group;
	}
	abp_idset_add(&group->ids, id, id, collect_context);
}

/* Has this transaction taken the id back? */
static bool
was_removed(Oid usage_table, int64 id)
{
	for (Collected *group = collected; group != NULL; group = group->next)
	{
		if (group->removed && group->usage_table == usage_table &&
			abp_idset_contains(&group->ids, id))
			return true;
	}
	return false;
}

/* Has this transaction collected the id, and not taken it back? */
static bool
is_collected(Oid usage_table, int64 id)
{
	for (Collected *group = collected; group != NULL; group = group->next)
	{
		if (!group->removed && group->usage_table == usage_table &&
			abp_idset_contains(&group->ids, id))
			return !was_removed(usage_table, id);
	}
	return false;
}

/* Write what was collected to the outbox. */
static void
flush_collected(void)
{
	int			nentries = 0;
	OutboxEntry *entries;
	MemoryContext old;

	if (collected == NULL)
		return;

	old = MemoryContextSwitchTo(collect_context);
	for (Collected *group = collected; group != NULL; group = group->next)
		nentries++;
	entries = palloc0(sizeof(OutboxEntry) * nentries);

	nentries = 0;
	for (Collected *group = collected; group != NULL; group = group->next)
	{
		OutboxEntry *entry = &entries[nentries];

		if (group->removed)
			continue;
		entry->usage_table = group->usage_table;
		entry->state = group->state;
		entry->not_before = group->not_before;
		entry->error = group->error;
		entry->ids = group->ids;
		for (Collected *other = collected; other != NULL; other = other->next)
		{
			if (other->removed && other->usage_table == group->usage_table)
				entry->ids = abp_idset_subtract(&entry->ids, &other->ids);
		}
		nentries++;
	}
	if (abp_outbox_put_at_commit(entries, nentries))
		abp_wake_at_commit();
	MemoryContextSwitchTo(old);
}

static void
on_transaction_end(XactEvent event, void *arg)
{
	switch (event)
	{
		case XACT_EVENT_PRE_COMMIT:
		case XACT_EVENT_PRE_PREPARE:
			flush_collected();
			break;
		case XACT_EVENT_COMMIT:
		case XACT_EVENT_PREPARE:
		case XACT_EVENT_ABORT:
			/* The contexts go with the transaction. */
			collect_context = NULL;
			collected = NULL;
			moved = NULL;
			moving.row.usage_table = InvalidOid;
			warned_command = InvalidCommandId;
			repricing_table = InvalidOid;
			break;
		default:
			break;
	}
}

/*
 * What a subtransaction has collected goes to its parent, or is forgotten.
 */
static void
on_subtransaction_end(SubXactEvent event, SubTransactionId mine,
					  SubTransactionId parent, void *arg)
{
	int			level = GetCurrentTransactionNestLevel();
	Collected **link = &collected;

	if (event == SUBXACT_EVENT_ABORT_SUB)
	{
		moved = NULL;
		if (level <= repricing_level)
			repricing_table = InvalidOid;
	}
	else if (event != SUBXACT_EVENT_COMMIT_SUB)
		return;

	while (*link != NULL)
	{
		Collected  *group = *link;
		Collected  *of_parent = NULL;

		if (group->nest_level < level)
		{
			link = &group->next;
			continue;
		}

		if (event == SUBXACT_EVENT_COMMIT_SUB)
		{
			group->nest_level = level - 1;
			of_parent = find_group(group);
			if (of_parent == NULL)
			{
				link = &group->next;
				continue;
			}
			for (int i = 0; i < group->ids.nranges; i++)
				abp_idset_add(&of_parent->ids, group->ids.ranges[i].first,
							  group->ids.ranges[i].last, collect_context);
		}
		*link = group->next;
	}
}

/*
 * Put one row into the outbox at once.  For a row that this transaction has
 * taken out before: what is collected is written too late to tell the order.
 */
static void
put_now(Oid usage_table, int64 id, const RowState *verdict)
{
	OutboxEntry entry = {
		.usage_table = usage_table,
		.state = verdict->state,
		.not_before = verdict->not_before,
		.error = verdict->error
	};

	abp_idset_add(&entry.ids, id, id, CurrentMemoryContext);
	abp_outbox_put(&entry, 1);
	CommandCounterIncrement();
	abp_wake_at_commit();
}

/* --- rows that move between partitions ------------------------------------ */

static bool
is_moving(Oid usage_table, int64 id)
{
	return moving.row.usage_table == usage_table && moving.row.id == id &&
		moving.command == GetCurrentCommandId(false);
}

static void
remember_moved(void)
{
	if (moved == NULL)
	{
		HASHCTL		ctl = {
			.keysize = sizeof(RowKey),
			.entrysize = sizeof(RowKey),
			.hcxt = TopTransactionContext
		};

		moved = hash_create("aibilling moved rows", 64, &ctl,
							HASH_ELEM | HASH_BLOBS | HASH_CONTEXT);
	}
	hash_search(moved, &moving.row, HASH_ENTER, NULL);
	moving.row.usage_table = InvalidOid;
	moving.deleted = false;
}

static bool
was_moved(Oid usage_table, int64 id)
{
	RowKey		key;
	bool		found;

	memset(&key, 0, sizeof(key));
	key.usage_table = usage_table;
	key.id = id;
	hash_search(moved, &key, HASH_REMOVE, &found);
	return found;
}

/* --- warnings --------------------------------------------------------------- */

static void
warn_rejected(Relation rel, int64 id, const char *reason)
{
	CommandId	command = GetCurrentCommandId(false);

	if (warned_command == command)
		return;
	warned_command = command;

	ereport(WARNING,
			(errcode(ERRCODE_WARNING),
			 errmsg("usage row " INT64_FORMAT " of \"%s\" was stored but cannot be sent: %s",
					id, RelationGetRelationName(rel), reason),
			 errhint("Mend the row with UPDATE. All such rows stand in aibilling.outbox as rejected.")));
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
	if (hash_get_num_entries(warned_models) >= MAX_WARNED_MODELS)
		return;

	strlcpy(key, reason, sizeof(key));
	hash_search(warned_models, key, HASH_ENTER, &found);
	if (!found)
	{
		PriceRequest request = price_request(row);
		char	   *hint = abp_price_hint(&request);

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
		AttrNumber	att_ = known->attnums[column] - 1; \
		nulls[att_] = (isnull); \
		if (!nulls[att_]) \
			values[att_] = (datum); \
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
	SET_COLUMN(COL_COST_NANOS, !cost->known, Int64GetDatum(cost->cost_nanos));
	SET_COLUMN(COL_COST_CENTS, !cost->known, NumericGetDatum(cost->cost_cents));
	SET_COLUMN(COL_COST_STATUS, false,
			   CStringGetTextDatum(abp_cost_status_name(cost->status)));
#undef SET_COLUMN

	return heap_form_tuple(desc, values, nulls);
}

/* Has anything that is billed changed? */
static bool
billed_columns_changed(const UsageRelation *known, TupleDesc desc,
					   const Datum *old_values, const bool *old_nulls,
					   const Datum *new_values, const bool *new_nulls,
					   bool *raw_changed)
{
	bool		changed = false;

	*raw_changed = false;
	for (int i = 0; i < NUM_USAGE_COLUMNS; i++)
	{
		Form_pg_attribute att = TupleDescAttr(desc, known->attnums[i] - 1);

		if (old_nulls[i] == new_nulls[i] &&
			(old_nulls[i] ||
			 datum_image_eq(old_values[i], new_values[i], att->attbyval, att->attlen)))
			continue;
		if (abp_usage_columns[i].billed)
			changed = true;
		else
			*raw_changed = true;
	}
	return changed;
}

static void
refuse_change(RowPlace place, Relation rel, int64 id, const char *verb)
{
	ereport(ERROR,
			(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
			 errmsg("cannot %s usage row " INT64_FORMAT " of \"%s\": it %s",
					verb, id, RelationGetRelationName(rel),
					place == ROW_SENDING ? "is being sent" : "has been delivered"),
			 errhint("Insert a correcting row: with its own external_id, no counts, the difference in provider_cost, and parent_id naming the external_id of this row.")));
}

/* Is this UPDATE, of a row of this table, ours? */
static bool
is_repriced(const UsageRelation *known)
{
	return OidIsValid(repricing_table) && known->usage_table == repricing_table;
}

/*
 * An UPDATE of what is billed: allowed while the row waits in the outbox.
 * Returns after the outbox says what the new row deserves.
 */
static void
requeue_row(UsageRelation *known, Relation rel, const UsageRow *row,
			const ServerOptions *server)
{
	RowState	verdict;

	if (is_repriced(known))
		return;					/* whoever reprices moves the ids himself */

	abp_usage_judge(row, server, &verdict);

	if (is_collected(known->usage_table, row->id))
	{
		collect(known->usage_table, row->id, true, NULL);
		put_now(known->usage_table, row->id, &verdict);
	}
	else
	{
		char		state;
		RowPlace	place = abp_outbox_find(known->usage_table, row->id, false, &state);

		switch (place)
		{
			case ROW_NOT_SENT:
				return;
			case ROW_SENDING:
			case ROW_DELIVERED:
				refuse_change(place, rel, row->id, "update");
				return;
			case ROW_IN_OUTBOX:
				break;
		}

		/* A ready row stays where it is: the shipper reads it as updated. */
		if (state == OUTBOX_READY && verdict.state == OUTBOX_READY)
		{
			abp_wake_at_commit();	/* it may have passed the locked row over */
			return;
		}
		place = abp_outbox_find(known->usage_table, row->id, true, &state);
		if (place != ROW_IN_OUTBOX)
			refuse_change(ROW_SENDING, rel, row->id, "update");
		abp_outbox_remove(known->usage_table, row->id);
		put_now(known->usage_table, row->id, &verdict);
	}

	if (verdict.state == OUTBOX_REJECTED)
		warn_rejected(rel, row->id, verdict.error);
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
	UsageRow	row;
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
		Datum		old_values[NUM_USAGE_COLUMNS];
		bool		old_nulls[NUM_USAGE_COLUMNS];
		bool		raw_changed;
		bool		changed;

		read_columns(known, trigdata->tg_trigtuple, desc, old_values, old_nulls);
		read_columns(known, tuple, desc, values, nulls);
		if (rel->rd_rel->relispartition && !nulls[COL_ID])
		{
			moving.row.usage_table = known->usage_table;
			moving.row.id = DatumGetInt64(values[COL_ID]);
			moving.command = GetCurrentCommandId(false);
			moving.deleted = false;
		}
		changed = billed_columns_changed(known, desc, old_values, old_nulls,
										 values, nulls, &raw_changed);
		if (!changed && !is_repriced(known) && (!raw_changed || nulls[COL_RAW_USAGE]))
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

		/* The second half of a move between partitions: nothing is new. */
		if (moving.deleted && !nulls[COL_ID] &&
			is_moving(known->usage_table, DatumGetInt64(values[COL_ID])))
		{
			remember_moved();
			return PointerGetDatum(tuple);
		}
	}

	abp_usage_row_read(values, nulls, &row);
	check_row(&row, nulls);
	if (OidIsValid(known->serverid))
		server = abp_server_options(known->serverid);

	if (row.raw_usage != NULL)
	{
		StringInfoData reason;

		initStringInfo(&reason);
		normalized = normalize_row(&row, &reason);
		pfree(reason.data);
	}

	/* A raw usage object that cannot be read leaves the row without a cost. */
	if (row.raw_usage == NULL || normalized)
	{
		PriceRequest request = price_request(&row);

		(void) abp_price_usage(&request, false, &cost);
	}
	tuple = priced_tuple(known, desc, &row, normalized, &cost);

	if (update && OidIsValid(known->usage_table) && server != NULL)
	{
		row.has_cost_nanos = cost.known;
		row.cost_nanos = cost.cost_nanos;
		row.cost_cents = cost.cost_cents;
		requeue_row(known, rel, &row, server);
	}
	return PointerGetDatum(tuple);
}

/*
 * May this session load rows without sending them?  Not by way of a SECURITY
 * DEFINER function of the owner's: what the owner may leave out of the bill,
 * whoever calls his function may not.
 */
static bool
enqueue_is_off(Oid usage_table)
{
	static bool warned = false;

	if (abp_enqueue)
		return false;
	if (abp_owns_table(usage_table, GetUserId()) &&
		abp_owns_table(usage_table, GetOuterUserId()))
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
	const ServerOptions *server;
	Datum		values[NUM_USAGE_COLUMNS];
	bool		nulls[NUM_USAGE_COLUMNS];
	UsageRow	row;
	RowState	verdict = {OUTBOX_READY, DT_NOBEGIN, NULL};

	check_trigger(fcinfo, "enqueue_usage",
				  TRIGGER_EVENT_AFTER | TRIGGER_EVENT_ROW | TRIGGER_EVENT_INSERT,
				  TRIGGER_EVENT_AFTER | TRIGGER_EVENT_ROW | TRIGGER_EVENT_INSERT,
				  "AFTER INSERT FOR EACH ROW");
	rel = trigdata->tg_relation;
	known = know_relation(rel);
	if (!OidIsValid(known->usage_table) || enqueue_is_off(known->usage_table))
		return PointerGetDatum(NULL);

	read_columns(known, trigdata->tg_trigtuple, RelationGetDescr(rel), values, nulls);
	abp_usage_row_read(values, nulls, &row);

	if (moved != NULL && was_moved(known->usage_table, row.id))
		return PointerGetDatum(NULL);

	if (OidIsValid(known->serverid))
	{
		server = abp_server_options(known->serverid);
		abp_usage_judge(&row, server, &verdict);
		if (verdict.state == OUTBOX_REJECTED)
			warn_rejected(rel, row.id, verdict.error);
		else if (verdict.state == OUTBOX_UNPRICED)
			warn_unpriced(&row, verdict.error);
	}

	if (was_removed(known->usage_table, row.id))
		put_now(known->usage_table, row.id, &verdict);
	else
		collect(known->usage_table, row.id, false, &verdict);
	return PointerGetDatum(NULL);
}

/*
 * BEFORE DELETE, FOR EACH ROW: a row in flight stays; a waiting one leaves
 * the outbox with it.
 */
Datum
abp_sql_guard_usage(PG_FUNCTION_ARGS)
{
	TriggerData *trigdata = (TriggerData *) fcinfo->context;
	Relation	rel;
	UsageRelation *known;
	bool		isnull;
	int64		id;
	char		state;

	check_trigger(fcinfo, "guard_usage",
				  TRIGGER_EVENT_BEFORE | TRIGGER_EVENT_ROW | TRIGGER_EVENT_DELETE,
				  TRIGGER_EVENT_BEFORE | TRIGGER_EVENT_ROW | TRIGGER_EVENT_DELETE,
				  "BEFORE DELETE FOR EACH ROW");
	rel = trigdata->tg_relation;
	known = know_relation(rel);
	id = DatumGetInt64(heap_getattr(trigdata->tg_trigtuple, known->attnums[COL_ID],
									RelationGetDescr(rel), &isnull));
	if (!OidIsValid(known->usage_table) || isnull)
		return PointerGetDatum(trigdata->tg_trigtuple);

	if (is_moving(known->usage_table, id))
	{
		moving.deleted = true;
		return PointerGetDatum(trigdata->tg_trigtuple);
	}

	if (is_collected(known->usage_table, id))
		collect(known->usage_table, id, true, NULL);
	else
	{
		RowPlace	place = abp_outbox_find(known->usage_table, id, true, &state);

		if (place == ROW_SENDING)
			refuse_change(place, rel, id, "delete");
		if (place == ROW_IN_OUTBOX)
			abp_outbox_remove(known->usage_table, id);
	}
	return PointerGetDatum(trigdata->tg_trigtuple);
}

/*
 * BEFORE TRUNCATE, FOR EACH STATEMENT: the outbox forgets the table's rows.
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

	count = abp_outbox_discard(known->usage_table);
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
	repricing_level = GetCurrentTransactionNestLevel();
	updated = abp_usage_reprice(table, ids);
	repricing_table = InvalidOid;
	return updated;
}
