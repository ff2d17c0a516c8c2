/*-------------------------------------------------------------------------
 *
 * relation.c
 *	  What a session knows of a table with our triggers.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/sysattr.h"
#include "access/table.h"
#include "access/xact.h"
#include "catalog/partition.h"
#include "executor/executor.h"
#include "miscadmin.h"
#include "optimizer/optimizer.h"
#include "rewrite/rewriteHandler.h"
#include "utils/hsearch.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/syscache.h"

#include "base/extension.h"
#include "base/transaction.h"
#include "base/usage_row.h"
#include "compat.h"
#include "polar/server.h"
#include "queue/attachment.h"
#include "queue/feed.h"
#include "usage/relation.h"
#include "usage/row.h"

static HTAB *relations = NULL;
static Oid	attachments_relid = InvalidOid; /* aibilling.attachment */
static List *ancestors = NIL;	/* OIDs of tables that known ones are
								 * partitions of */

/*
 * Expressions of columns' defaults, until the end of the transaction; NULL if
 * none was needed.  Transactions are counted to tell whose they are.
 */
static MemoryContext defaults_context = NULL;
static uint64 defaults_transaction = 0;

/*
 * Columns where an explicit NULL, as ORMs send it for what was not set, takes
 * the default: the needed ones, and those that say nothing when NULL.
 */
static const UsageColumn defaulted_columns[] = {
	COL_ID, COL_EXTERNAL_ID, COL_OCCURRED_AT, COL_SERVICE_TIER, COL_TAGS, COL_FIRST_COUNT + COUNT_REQUEST
};

/*
 * The table itself, and those that it is a partition of, from below.  Also while its
 * DETACH CONCURRENTLY is under way: older transactions still see its rows there.
 */
static List *
with_ancestors(Relation rel)
{
	Oid			relid = RelationGetRelid(rel);
	List	   *tables = list_make1_oid(relid);

	while (get_rel_relispartition(relid))
	{
		relid = get_partition_parent(relid, true);
		tables = lappend_oid(tables, relid);
	}
	return tables;
}

/*
 * Does the column, its identity or its type have a value for a row that gives
 * none?
 */
static bool
column_has_default(Oid relid, const char *name)
{
	HeapTuple	tuple = SearchSysCacheAttName(relid, name);
	Form_pg_attribute att;
	bool		has_default;

	if (!HeapTupleIsValid(tuple))
		return false;
	att = (Form_pg_attribute) GETSTRUCT(tuple);
	has_default = att->attgenerated == '\0' &&
		(att->atthasdef || att->attidentity != '\0' || get_typdefault(att->atttypid) != NULL);
	ReleaseSysCache(tuple);
	return has_default;
}

/* Does a column decide into which partition of the table a row goes? */
static bool
is_partition_key(Oid relid, const char *name)
{
	Relation	rel = table_open(relid, AccessShareLock);
	Bitmapset  *attnums = bms_make_singleton(get_attnum(relid, name) - FirstLowInvalidHeapAttributeNumber);
	bool		is_key = has_partition_attrs(rel, attnums, NULL);

	bms_free(attnums);
	table_close(rel, AccessShareLock);
	return is_key;
}

/*
 * Which of them have a default, and where: for abp_relation_know.  A partition
 * without one takes that of the table it is a partition of, as an INSERT there
 * that leaves the column out does; but for a partition's key, for which the
 * partition was chosen by the NULL.
 */
static void
find_defaults(UsageRelation *known, Relation rel)
{
	Oid			relid = RelationGetRelid(rel);
	List	   *tables = with_ancestors(rel);
	ListCell   *lc;

	for (int i = 0; i < lengthof(defaulted_columns); i++)
	{
		UsageColumn column = defaulted_columns[i];
		const char *name = abp_row_columns[column].name;
		Oid			from = InvalidOid;

		foreach(lc, tables)
		{
			if (lfirst_oid(lc) != relid && is_partition_key(lfirst_oid(lc), name))
				break;
			if (column_has_default(lfirst_oid(lc), name))
			{
				from = lfirst_oid(lc);
				break;
			}
		}
		known->default_from[column] = from;
	}

	/* a change of theirs is one of ours */
	foreach(lc, tables)
	{
		MemoryContext old = MemoryContextSwitchTo(TopMemoryContext);

		if (lfirst_oid(lc) != relid)
			ancestors = list_append_unique_oid(ancestors, lfirst_oid(lc));
		MemoryContextSwitchTo(old);
	}
	list_free(tables);
}

/*
 * Does the caller own a usage table?  Not by way of a SECURITY DEFINER function
 * of the owner's: what the owner may leave out of the bill, whoever calls their
 * function may not.
 */
bool
abp_relation_is_callers(Oid usage_table)
{
	return abp_owns_table(usage_table, GetUserId()) &&
		abp_owns_table(usage_table, GetOuterUserId());
}

/*
 * Columns that an UPDATE cannot empty: an ORM that saves a row which it has not
 * read back writes NULL to all that it did not set, costs included.
 */
static const UsageColumn kept_columns[] = {
	COL_ID, COL_EXTERNAL_ID, COL_OCCURRED_AT, COL_COST_NANOS, COL_COST_CENTS, COL_COST_STATUS
};

/*
 * Does an UPDATE empty a column that it cannot empty?
 */
bool
abp_relation_lacks_kept(const bool *nulls, const bool *old_nulls)
{
	for (int i = 0; i < lengthof(kept_columns); i++)
	{
		if (nulls[kept_columns[i]] && !old_nulls[kept_columns[i]])
			return true;
	}
	return false;
}

/*
 * The new tuple of an UPDATE, with the old values of these columns.
 */
HeapTuple
abp_relation_take_old(const UsageRelation *known, TupleDesc desc, HeapTuple tuple, HeapTuple old,
					  const bool *take)
{
	int			replace[NUM_USAGE_COLUMNS];
	Datum		values[NUM_USAGE_COLUMNS];
	bool		isnull[NUM_USAGE_COLUMNS];
	int			n = 0;

	for (int i = 0; i < NUM_USAGE_COLUMNS; i++)
	{
		AttrNumber	attnum = known->columns.attnums[i];

		if (!take[i])
			continue;
		replace[n] = attnum;
		values[n] = heap_getattr(old, attnum, desc, &isnull[n]);
		n++;
	}
	return n == 0 ? tuple : heap_modify_tuple_by_cols(tuple, desc, n, replace, values, isnull);
}

/*
 * The same where it empties columns that it cannot.
 */
HeapTuple
abp_relation_keep(const UsageRelation *known, TupleDesc desc, HeapTuple tuple, HeapTuple old,
				  const bool *nulls)
{
	bool		take[NUM_USAGE_COLUMNS] = {false};

	for (int i = 0; i < lengthof(kept_columns); i++)
		take[kept_columns[i]] = nulls[kept_columns[i]];
	return abp_relation_take_old(known, desc, tuple, old, take);
}

/*
 * Is a column NULL that takes its default then?
 */
bool
abp_relation_lacks_defaults(const UsageRelation *known, const bool *nulls)
{
	for (int i = 0; i < lengthof(defaulted_columns); i++)
	{
		if (nulls[defaulted_columns[i]] && OidIsValid(known->default_from[defaulted_columns[i]]))
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
												 "aibilling_polar column defaults",
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
		Oid			from = known->default_from[column];
		Relation	has_it = from == RelationGetRelid(rel) ? rel : table_open(from, AccessShareLock);
		Node	   *expr = build_column_default(has_it, get_attnum(from, abp_row_columns[column].name));

		if (has_it != rel)
			table_close(has_it, AccessShareLock);

		if (expr == NULL)
			elog(ERROR, "unexpected lack of a default");
		known->defaults[column] = ExecInitExpr(expression_planner((Expr *) expr), NULL);
	}
	MemoryContextSwitchTo(old);
	return known->defaults[column];
}

/*
 * The tuple with another id, the next of the table's own, and this id; without a
 * default of the column it is as it was.
 */
HeapTuple
abp_relation_renumber(UsageRelation *known, Relation rel, HeapTuple tuple, int64 *id)
{
	int			attnum = known->columns.attnums[COL_ID];
	ExprContext *econtext;
	Datum		value;
	bool		isnull;

	if (!OidIsValid(known->default_from[COL_ID]))
		return tuple;
	econtext = CreateStandaloneExprContext();
	value = ExecEvalExpr(default_of(known, rel, COL_ID), econtext, &isnull);
	tuple = heap_modify_tuple_by_cols(tuple, RelationGetDescr(rel), 1, &attnum, &value, &isnull);
	FreeExprContext(econtext, true);
	if (!isnull)
		*id = DatumGetInt64(abp_row_value_read(&known->columns, COL_ID, value));
	return tuple;
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

		if (!nulls[column] || !OidIsValid(known->default_from[column]))
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

/*
 * A table has changed: what is known of it is read again, or of all if others
 * depend on it.
 */
static void
forget_relation(Datum arg, Oid relid)
{
	if (relid == InvalidOid || relid == attachments_relid || list_member_oid(ancestors, relid))
		abp_relations_forget();
	else
	{
		UsageRelation *known = hash_search(relations, &relid, HASH_FIND, NULL);

		if (known != NULL)
			known->valid = false;
	}
}

/* A server has changed: any table may deliver to it. */
static void
forget_servers(Datum arg, int cacheid, uint32 hashvalue)
{
	abp_relations_forget();
}

/*
 * Forget what is known of all tables with our triggers.
 */
void
abp_relations_forget(void)
{
	HASH_SEQ_STATUS scan;
	UsageRelation *known;

	if (relations == NULL)
		return;
	hash_seq_init(&scan, relations);
	while ((known = hash_seq_search(&scan)) != NULL)
		known->valid = false;
}

/* The transaction ends, and with it the memory of what computes defaults. */
static void
forget_defaults(XactEvent event, void *arg)
{
	if (!abp_transaction_ends(event))
		return;
	defaults_context = NULL;
	defaults_transaction++;
}

/* Get ready to know tables, once per process. */
static void
create_relations(void)
{
	HASHCTL		ctl = {.keysize = sizeof(Oid),.entrysize = sizeof(UsageRelation)};

	relations = hash_create("aibilling_polar usage tables", 16, &ctl, HASH_ELEM | HASH_BLOBS);
	abp_server_init();
	RegisterXactCallback(forget_defaults, NULL);
	CacheRegisterRelcacheCallback(forget_relation, (Datum) 0);
	CacheRegisterSyscacheCallback(FOREIGNSERVEROID, forget_servers, (Datum) 0);
}

/* Which attached table do rows of "rel" belong to: itself, or the root above it? */
static Oid
find_usage_table(Relation rel, Oid *serverid, int64 *ledger_from)
{
	ListCell   *lc;

	foreach(lc, with_ancestors(rel))
	{
		if (abp_attachment_find(lfirst_oid(lc), serverid, ledger_from))
			return lfirst_oid(lc);
	}
	return InvalidOid;
}

/*
 * What is known of a table with our triggers, looked up if need be; valid until
 * anything is called that may change the table.  Raises an error if it has not the
 * columns of a usage table.
 */
UsageRelation *
abp_relation_know(Relation rel)
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
		known->warned_skipped = false;
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
	if (!abp_row_columns_find(rel, &known->columns, &problem))
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
	known->external_id_index = InvalidOid;
	known->counts_not_queued = OidIsValid(abp_extension_relation("ledger"));
	known->usage_table = find_usage_table(rel, &serverid, &ledger_from);
	known->replicated = OidIsValid(known->usage_table) && abp_feed_replicated(known->usage_table);
	known->serverid = serverid;
	known->ledger_from = ledger_from;
	return known;
}

/*
 * The options of the server that a table's rows go to; NULL if it has none.
 */
const ServerOptions *
abp_relation_server(const UsageRelation *known)
{
	return OidIsValid(known->serverid) ? abp_server_options(known->serverid) : NULL;
}

/* The columns of a tuple, in the order of UsageColumn. */
void
abp_relation_read(const UsageRelation *known, HeapTuple tuple, TupleDesc desc,
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
			values[i] = abp_row_value_read(&known->columns, i, values[i]);
	}
}

/*
 * Put defaults into a new tuple where it has NULL.  Returns what is known of the
 * relation then, and its columns.
 */
UsageRelation *
abp_relation_fill_defaults(UsageRelation *known, Relation rel, HeapTuple *tuple, Datum *values, bool *nulls)
{
	*tuple = tuple_with_defaults(known, rel, *tuple, nulls);
	known = abp_relation_know(rel);
	abp_relation_read(known, *tuple, RelationGetDescr(rel), values, nulls);
	return known;
}
