/*-------------------------------------------------------------------------
 *
 * parents.c
 *	  Rows that name a parent: may they be sent before it?
 *
 * Polar counts the costs of an event twice if it comes to know the event's
 * parent by another job than the event.  So a child goes into the request that
 * its parent goes into, or waits until the parent is delivered and the parent's
 * job has surely run.  Events whose parents form a cycle are never seen there.
 *
 * A parent that is in no row of the child's table does not hold the child: it
 * may be anybody's.
 *
 * The same holds for rows that an earlier request may have brought to Polar.  If
 * it has, the delay does no harm; if not, they are as new.  But they cannot be
 * changed any more, so that a cycle is opened by whoever closes it.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/table.h"
#include "catalog/pg_type.h"
#include "miscadmin.h"
#include "utils/hsearch.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/timestamp.h"

#include "base/rights.h"
#include "base/statement.h"
#include "queue/corrections.h"
#include "queue/ledger.h"
#include "queue/place.h"
#include "usage/parents.h"
#include "usage/rows.h"

/* How long Polar may take to run the job of a request, and a margin. */
#define PARENT_SETTLES_S 60

/* How far parents of parents are followed in search of a cycle. */
#define MAX_LEVELS 1000
#define MAX_ANCESTORS 10000

#define WAITS_FOR_PARENT "parent_id: waits until its parent is delivered, and then for a minute"
#define PARENT_IS_NEW "parent_id: its parent was delivered less than a minute ago"
#define PARENT_IS_REJECTED "parent_id: its parent is rejected; release this row with aibilling.retry() after its parent"
#define PARENTS_ARE_CYCLE "parent_id: its parents lead back to it; Polar would never show any of them"

typedef enum Fate
{
	FATE_UNKNOWN,
	FATE_ASKED,					/* is being found out: whoever asks again has
								 * come around a cycle */
	FATE_SENT,
	FATE_WAITS,
	FATE_IS_NEW,				/* waits for a parent delivered just now */
	FATE_REJECTED,
	FATE_CYCLE
} Fate;

/* A row that is a child, a parent or both. */
typedef struct Relative
{
	ExternalIdKey external_id;	/* hash key */
	bool		exists;			/* is there such a row? */
	int64		id;
	const char *parent_id;		/* NULL: none */
	bool		on_cycle;
	Fate		fate;			/* of itself if it is to be sent, else of its
								 * children */
	TimestampTz delivered_at;	/* in the last minute, else DT_NOBEGIN */
} Relative;

typedef struct Family
{
	const UsageTable *table;
	const ChildBatch *batch;
	HTAB	   *relatives;		/* Relative by external_id */
	MemoryContext context;
} Family;

/*
 * A row as a child, in the current memory context; NULL if it names no parent.
 */
ChildRow   *
abp_parents_child(const UsageRow *row)
{
	ChildRow   *child;

	if (row->parent_id.data == NULL || row->parent_id.len > MAX_EXTERNAL_ID_LEN ||
		row->external_id.len > MAX_EXTERNAL_ID_LEN)
		return NULL;
	child = palloc0(sizeof(ChildRow));
	child->id = row->id;
	child->external_id = pnstrdup(row->external_id.data, row->external_id.len);
	child->parent_id = pnstrdup(row->parent_id.data, row->parent_id.len);
	child->fate.state = OUTBOX_READY;
	child->fate.not_before = DT_NOBEGIN;
	return child;
}

/* Are rows found by their external_id without a walk through the table? */
static bool
has_index(const UsageTable *table)
{
	Relation	rel = table_open(table->relid, AccessShareLock);
	AttrNumber	external_id = get_attnum(table->relid, "external_id");
	ListCell   *lc;
	bool		found = false;

	foreach(lc, RelationGetIndexList(rel))
	{
		Relation	index = index_open(lfirst_oid(lc), AccessShareLock);

		found |= index->rd_index->indisvalid && index->rd_index->indkey.values[0] == external_id &&
			RelationGetIndexPredicate(index) == NIL;
		index_close(index, AccessShareLock);
	}
	table_close(rel, NoLock);
	return found;
}

/* The relative of this external_id, new if it was not known. */
static Relative *
relative_of(Family *family, const char *external_id, bool *found)
{
	ExternalIdKey key;
	Relative   *relative;

	abp_corrections_key(&key, external_id, strlen(external_id));
	relative = hash_search(family->relatives, &key, HASH_ENTER, found);
	if (!*found)
	{
		relative->exists = false;
		relative->parent_id = NULL;
		relative->on_cycle = false;
		relative->fate = FATE_UNKNOWN;
		relative->delivered_at = DT_NOBEGIN;
	}
	return relative;
}

/*
 * Look up rows of these external_ids, as the table's owner, and make them
 * relatives.  Returns the parents that they name and that were not known, as
 * strings in the family's memory.
 */
static List *
look_up(Family *family, List *external_ids)
{
	List	   *unknown = NIL;
	uint64		nrows;
	SavedUser	saved;

	nrows = abp_rows_named(family->table, "u.id::pg_catalog.int8, u.external_id::pg_catalog.text,"
						   " nullif(u.parent_id, '')::pg_catalog.text", external_ids, true, &saved);
	for (uint64 i = 0; i < nrows; i++)
	{
		char	   *external_id = abp_result_string(i, 2, CurrentMemoryContext);
		char	   *parent_id = abp_result_string(i, 3, family->context);
		bool		known;
		Relative   *relative;

		CHECK_FOR_INTERRUPTS();
		if (external_id == NULL || strlen(external_id) > MAX_EXTERNAL_ID_LEN)
			continue;
		relative = relative_of(family, external_id, &known);
		relative->exists = true;
		relative->id = abp_result_int64(i, 1, 0);
		if (parent_id != NULL && strlen(parent_id) <= MAX_EXTERNAL_ID_LEN)
		{
			MemoryContext spi = MemoryContextSwitchTo(family->context);

			relative->parent_id = parent_id;
			(void) relative_of(family, parent_id, &known);
			if (!known)
				unknown = lappend(unknown, parent_id);
			MemoryContextSwitchTo(spi);
		}
	}
	abp_statement_close(&saved);
	return unknown;
}

/* Children, their parents, and so on, as far as there are rows of them. */
static void
gather_family(Family *family, List *children)
{
	List	   *unknown = NIL;
	ListCell   *lc;

	foreach(lc, children)
	{
		ChildRow   *child = lfirst(lc);
		bool		known;
		Relative   *relative = relative_of(family, child->external_id, &known);

		relative->exists = true;
		relative->id = child->id;
		relative->parent_id = child->parent_id;
	}
	foreach(lc, children)
	{
		ChildRow   *child = lfirst(lc);
		bool		known;

		(void) relative_of(family, child->parent_id, &known);
		if (!known)
			unknown = lappend(unknown, child->parent_id);
	}
	for (int level = 0; level < MAX_LEVELS && unknown != NIL &&
		 hash_get_num_entries(family->relatives) < list_length(children) + MAX_ANCESTORS; level++)
		unknown = look_up(family, unknown);
}

static Relative *
parent_of(Family *family, const Relative *relative)
{
	ExternalIdKey key;
	Relative   *parent;

	if (relative->parent_id == NULL)
		return NULL;
	abp_corrections_key(&key, relative->parent_id, strlen(relative->parent_id));
	parent = hash_search(family->relatives, &key, HASH_FIND, NULL);
	return parent != NULL && parent->exists ? parent : NULL;
}

/* Mark the rows whose parents lead back to them. */
static void
find_cycles(Family *family, List *children)
{
	ListCell   *lc;

	foreach(lc, children)
	{
		ChildRow   *child = lfirst(lc);
		bool		known;
		Relative   *start = relative_of(family, child->external_id, &known);
		Relative   *relative = start;

		/* as far as nobody has been */
		while (relative != NULL && relative->fate == FATE_UNKNOWN)
		{
			relative->fate = FATE_ASKED;
			relative = parent_of(family, relative);
		}
		/* back where this walk has been: once around */
		if (relative != NULL && relative->fate == FATE_ASKED)
		{
			while (!relative->on_cycle)
			{
				relative->on_cycle = true;
				relative = parent_of(family, relative);
			}
		}
		for (relative = start; relative != NULL && relative->fate == FATE_ASKED;
			 relative = parent_of(family, relative))
			relative->fate = FATE_SENT; /* only to say: been there */
	}
}

/* When parents that are not in the request were delivered, if just now. */
static void
find_new_deliveries(Family *family)
{
	static Statement recent = {
		"SELECT usage_ids, finished_at FROM aibilling.ledger WHERE usage_table = $1 AND usage_ids && $2"
		" AND state = 'delivered' AND finished_at > $3",
		3, {REGCLASSOID, INT8MULTIRANGEOID, TIMESTAMPTZOID}, true
	};
	Datum		args[3];
	uint64		nrows;
	IdSet		parents = {0};
	HASH_SEQ_STATUS scan;
	Relative   *relative;
	SavedUser	saved;

	hash_seq_init(&scan, family->relatives);
	while ((relative = hash_seq_search(&scan)) != NULL)
	{
		if (relative->exists && !abp_idset_contains(family->batch->ids, relative->id))
			abp_idset_add(&parents, relative->id, relative->id, family->context);
	}
	if (parents.nranges == 0)
		return;
	abp_idset_sort(&parents);
	args[0] = ObjectIdGetDatum(family->table->relid);
	args[1] = abp_idset_to_multirange(&parents);
	args[2] = TimestampTzGetDatum(GetCurrentTimestamp() - PARENT_SETTLES_S * USECS_PER_SEC);

	nrows = abp_statement_open(&recent, args, NULL, &saved);
	for (uint64 i = 0; i < nrows; i++)
	{
		bool		isnull;
		IdSet		ids = abp_result_idset(i, 1, CurrentMemoryContext);
		TimestampTz finished_at = DatumGetTimestampTz(abp_result_datum(i, 2, &isnull));

		hash_seq_init(&scan, family->relatives);
		while ((relative = hash_seq_search(&scan)) != NULL)
		{
			if (relative->exists && abp_idset_contains(&ids, relative->id))
				relative->delivered_at = Max(relative->delivered_at, finished_at);
		}
	}
	abp_statement_close(&saved);
}

/* What of this batch is set aside, and what has become of it; or waits. */
static Fate
fate_in_batch(const ChildBatch *batch, int64 id)
{
	ListCell   *lc;

	foreach(lc, batch->set_aside)
	{
		OutboxEntry *entry = lfirst(lc);

		if (abp_idset_contains(&entry->ids, id))
			return entry->state == OUTBOX_REJECTED ? FATE_REJECTED : FATE_WAITS;
	}
	return FATE_WAITS;
}

/* What becomes of the children of a row that is not to be sent now. */
static Fate
fate_beside(const Family *family, const Relative *parent)
{
	RowPlace	place;

	if (!abp_place_find_at_once(family->table->relid, parent->id, family->table->ledger_from, &place))
		return FATE_WAITS;
	switch (place.where)
	{
		case ROW_IN_OUTBOX:
			return place.state == OUTBOX_REJECTED ? FATE_REJECTED : FATE_WAITS;
		case ROW_SENDING:
			return FATE_WAITS;
		case ROW_DELIVERED:
			return parent->delivered_at > DT_NOBEGIN ? FATE_IS_NEW : FATE_SENT;
		case ROW_NOT_SENT:
			break;
	}
	return FATE_SENT;
}

/*
 * What becomes of a row that is to be sent, or of the children of another;
 * *since is when the parent was delivered that it waits for, if it is
 * FATE_IS_NEW.
 */
static Fate
fate_of(Family *family, Relative *relative, TimestampTz *since)
{
	List	   *path = NIL;
	Fate		fate = FATE_UNKNOWN;
	ListCell   *lc;

	while (fate == FATE_UNKNOWN)
	{
		Relative   *parent = parent_of(family, relative);

		if (relative->fate != FATE_UNKNOWN)
		{
			fate = relative->fate;
			break;
		}
		path = lappend(path, relative);
		if (!abp_idset_contains(family->batch->ids, relative->id))
			fate = fate_beside(family, relative);
		else if (!abp_idset_contains(family->batch->sent, relative->id))
			fate = fate_in_batch(family->batch, relative->id);
		else if (relative->on_cycle)
			fate = family->batch->outcome_unknown ? FATE_SENT : FATE_CYCLE;
		else if (parent == NULL)
			fate = FATE_SENT;
		else
			relative = parent;
	}
	*since = relative->delivered_at;
	foreach(lc, path)
	{
		Relative   *on_path = lfirst(lc);

		on_path->fate = fate;
		if (fate == FATE_IS_NEW)
			on_path->delivered_at = *since;
	}
	list_free(path);
	return fate;
}

/* Sent now, later, or never: by what has become of its parent. */
static void
decide_child(Family *family, ChildRow *child)
{
	bool		known;
	Relative   *relative = relative_of(family, child->external_id, &known);
	Relative   *parent = parent_of(family, relative);
	TimestampTz since;
	Fate		fate = fate_of(family, relative, &since);
	RowState   *decided = &child->fate;

	if (fate == FATE_WAITS || fate == FATE_IS_NEW)
	{
		/* in whole seconds, so that rows share an entry */
		TimestampTz until = fate == FATE_IS_NEW ? since : GetCurrentTimestamp();

		decided->state = OUTBOX_WAITING;
		decided->not_before = until - until % USECS_PER_SEC + (PARENT_SETTLES_S + 1) * USECS_PER_SEC;
		decided->error = fate == FATE_IS_NEW ? PARENT_IS_NEW : WAITS_FOR_PARENT;
	}
	else if (fate == FATE_REJECTED || fate == FATE_CYCLE)
	{
		decided->state = OUTBOX_REJECTED;
		decided->error = relative->on_cycle ? PARENTS_ARE_CYCLE : PARENT_IS_REJECTED;
	}
	else if (parent != NULL && abp_idset_contains(family->batch->sent, parent->id))
	{
		child->with_parent = true;
		child->parent = parent->id;
	}
}

/*
 * Say of each child of a batch whether it may be sent now, by the active
 * snapshot: with its parent, or because that is not awaited.
 */
void
abp_parents_decide(const UsageTable *table, List *children, const ChildBatch *batch)
{
	Family		family = {table, batch,.context = CurrentMemoryContext};
	HASHCTL		ctl = {
		.keysize = sizeof(ExternalIdKey),
		.entrysize = sizeof(Relative),
		.hcxt = CurrentMemoryContext
	};
	HASH_SEQ_STATUS scan;
	Relative   *relative;
	ListCell   *lc;

	if (!has_index(table))
		return;
	family.relatives = hash_create("aibilling_polar parents", 2 * list_length(children), &ctl,
								   HASH_ELEM | HASH_BLOBS | HASH_CONTEXT);
	gather_family(&family, children);
	find_cycles(&family, children);
	hash_seq_init(&scan, family.relatives);
	while ((relative = hash_seq_search(&scan)) != NULL)
		relative->fate = FATE_UNKNOWN;
	find_new_deliveries(&family);
	foreach(lc, children)
		decide_child(&family, lfirst(lc));
	hash_destroy(family.relatives);
}
