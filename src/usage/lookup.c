/*-------------------------------------------------------------------------
 *
 * lookup.c
 *	  Usage rows found by their id without SQL: no code of anybody's runs.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/relation.h"
#include "access/table.h"
#include "catalog/partition.h"
#include "catalog/pg_am_d.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "partitioning/partdesc.h"
#include "utils/fmgroids.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"

#include "base/idset.h"
#include "base/text_view.h"
#include "queue/ledger.h"
#include "queue/vanished.h"
#include "usage/lookup.h"
#include "usage/relation.h"
#include "usage/row.h"

/* The partition in which a row was found last: the next is likely there, too. */
static Oid	last_partition = InvalidOid;
static Oid	last_root = InvalidOid;

/*
 * An index that finds rows by this column, InvalidOid if there is none.
 */
Oid
abp_lookup_index(Relation rel, AttrNumber column)
{
	List	   *indexes = RelationGetIndexList(rel);
	Oid			found = InvalidOid;
	ListCell   *lc;

	foreach(lc, indexes)
	{
		Relation	index = index_open(lfirst_oid(lc), AccessShareLock);

		if (index->rd_index->indisvalid && index->rd_rel->relam == BTREE_AM_OID &&
			index->rd_index->indkey.values[0] == column &&
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
	UsageRelation *known = abp_relation_know(rel);
	ScanKeyData key;
	SysScanDesc scan;
	Oid			index;
	HeapTuple	tuple;
	bool		found = false;

	if (!OidIsValid(known->id_index))
		known->id_index = abp_lookup_index(rel, known->columns.attnums[COL_ID]);
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

/*
 * In a table or, one by one, its partitions, "leaving": those, too, whose DETACH
 * CONCURRENTLY is under way; where the row was is remembered for the next.
 */
static bool
look_in_relation(Oid root, Relation rel, int64 id, bool leaving, Snapshot snapshot, RowLook look, void *arg)
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

	partitions = RelationGetPartitionDesc(rel, !leaving);
	for (int i = 0; i < partitions->nparts && !found; i++)
	{
		Relation	partition = table_open(partitions->oids[i], AccessShareLock);

		found = look_in_relation(root, partition, id, leaving, snapshot, look, arg);
		table_close(partition, NoLock);
	}
	return found;
}

/* The same, first where a row was found last. */
static bool
look_in_table(Oid usage_table, int64 id, bool leaving, Snapshot snapshot, RowLook look, void *arg)
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
		found = look_in_relation(usage_table, rel, id, leaving, snapshot, look, arg);
	table_close(rel, NoLock);
	return found;
}

/*
 * Look at the rows of an id in a usage table, until "look" returns true.
 * Returns whether it has.  Without SQL: no code of anybody's runs.
 */
bool
abp_lookup_rows(Oid usage_table, int64 id, Snapshot snapshot, RowLook look, void *arg)
{
	return look_in_table(usage_table, id, false, snapshot, look, arg);
}

/* Is this the same row, by its external_id? */
bool
abp_lookup_same_row(UsageRelation *known, Relation rel, HeapTuple tuple, void *arg)
{
	RowColumns *row = arg;
	Datum		values[NUM_USAGE_COLUMNS];
	bool		nulls[NUM_USAGE_COLUMNS];
	bool		ignored;

	abp_relation_read(known, tuple, RelationGetDescr(rel), values, nulls);
	if (nulls[COL_EXTERNAL_ID] || row->nulls[COL_EXTERNAL_ID] ||
		!abp_row_value_equal(COL_EXTERNAL_ID, values[COL_EXTERNAL_ID], row->values[COL_EXTERNAL_ID]))
		return false;
	row->unchanged = !abp_row_billed_changed(values, nulls, row->values, row->nulls, &ignored);
	return true;
}

static bool
is_any_row(UsageRelation *known, Relation rel, HeapTuple tuple, void *arg)
{
	return true;
}

/*
 * Is there a row of this id now?  Also one that leaves with its partition: what
 * waits may be of it.
 */
bool
abp_lookup_exists(Oid usage_table, int64 id)
{
	return look_in_table(usage_table, id, true, SnapshotSelf, is_any_row, NULL);
}

/*
 * Ids of which there is a row, of those given, in a usage table or a partition;
 * in the current memory context.
 */
IdSet
abp_lookup_existing(Oid usage_table, const IdSet *ids)
{
	IdWalk		walk = {0};
	IdSet		existing = {0};

	while (abp_idset_walk(ids, &walk))
	{
		CHECK_FOR_INTERRUPTS();

		if (abp_lookup_exists(usage_table, walk.id))
			abp_idset_add(&existing, walk.id, walk.id, CurrentMemoryContext);
	}
	return existing;
}

/* The checksum by which a row is known again; false if it has no external_id. */
static bool
key_of_row(UsageRelation *known, Relation rel, HeapTuple tuple, uint32 *key)
{
	Datum		values[NUM_USAGE_COLUMNS];
	bool		nulls[NUM_USAGE_COLUMNS];
	TextView	external_id;

	abp_relation_read(known, tuple, RelationGetDescr(rel), values, nulls);
	if (nulls[COL_EXTERNAL_ID])
		return false;
	external_id = text_view_from_datum(values[COL_EXTERNAL_ID]);
	*key = abp_ledger_key_of(&external_id);
	return true;
}

/* A row that leaves, and where to note it. */
typedef struct Leaving
{
	int64		id;
	Vanished   *rows;
	MemoryContext context;
} Leaving;

static bool
note_leaving(UsageRelation *known, Relation rel, HeapTuple tuple, void *arg)
{
	Leaving    *leaving = arg;
	uint32		key;

	if (key_of_row(known, rel, tuple, &key))
		abp_vanished_add_row(leaving->rows, leaving->id, key, false, leaving->context);
	return false;
}

/*
 * Add the rows of these ids in a partition to those that are gone.
 */
void
abp_lookup_leaving(Oid partition, const IdSet *ids, Vanished *rows, MemoryContext context)
{
	IdWalk		walk = {0};

	while (abp_idset_walk(ids, &walk))
	{
		Leaving		leaving = {walk.id, rows, context};

		CHECK_FOR_INTERRUPTS();

		(void) look_in_table(partition, walk.id, true, SnapshotSelf, note_leaving, &leaving);
	}
}

/* A row that may have come back. */
typedef struct Returned
{
	int64		id;
	const Vanished *rows;
} Returned;

static bool
has_returned(UsageRelation *known, Relation rel, HeapTuple tuple, void *arg)
{
	Returned   *returned = arg;
	uint32		key;

	return key_of_row(known, rel, tuple, &key) &&
		abp_vanished_may_be(returned->rows, returned->id, key);
}

/*
 * The ids of the rows that were gone and are in this usage table, or partition, now; in
 * the current memory context.
 */
IdSet
abp_lookup_returned(Oid partition, const Vanished *rows)
{
	IdWalk		walk = {0};
	IdSet		ids = {0};

	while (abp_idset_walk(&rows->ids, &walk))
	{
		Returned	returned = {walk.id, rows};

		CHECK_FOR_INTERRUPTS();

		if (look_in_table(partition, walk.id, true, SnapshotSelf, has_returned, &returned))
			abp_idset_add(&ids, walk.id, walk.id, CurrentMemoryContext);
	}
	return ids;
}
