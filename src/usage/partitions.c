/*-------------------------------------------------------------------------
 *
 * partitions.c
 *	  Partitions of usage tables that go and come with ALTER TABLE.
 *
 * Outbox and ledger know a row by its table and id, and while a partition is
 * away another row may come to have the id of one of its rows.  So what waits
 * of its rows goes with it, noted in the ledger as vanished, and is put into
 * the outbox again when it is back.
 *
 * DETACH CONCURRENTLY takes two transactions.  After the first one nobody sees
 * the partition's rows any more, though their entries are there: the shipper
 * notes what it takes of those (abp_partitions_leaving).  The second one does the
 * rest, while the shipper is kept away (abp_attachment_lock).
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/table.h"
#include "catalog/namespace.h"
#include "catalog/partition.h"
#include "catalog/pg_class.h"
#include "catalog/pg_inherits.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "nodes/parsenodes.h"
#include "partitioning/partdesc.h"
#include "storage/lmgr.h"
#include "storage/lock.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"

#include "base/extension.h"
#include "base/idset.h"
#include "base/statement.h"
#include "queue/attachment.h"
#include "queue/entry.h"
#include "queue/ledger.h"
#include "queue/outbox.h"
#include "queue/place.h"
#include "queue/wake.h"
#include "usage/lookup.h"
#include "usage/partitions.h"
#include "usage/rows.h"
#include "usage/triggers.h"

PG_FUNCTION_INFO_V1(abp_sql_on_table_ddl);

/* The table whose partition it is at last, or itself: one that is being detached has no parent. */
static Oid
root_of(Oid relid)
{
	List	   *ancestors = get_rel_relispartition(relid) ? get_partition_ancestors(relid) : NIL;

	return ancestors == NIL ? relid : llast_oid(ancestors);
}

/* --- a partition goes ------------------------------------------------------- */

/* Note in the ledger that rows were gone before they were sent. */
static void
note_vanished(const UsageTable *table, Oid partition, IdSet *ids, bool outcome_unknown)
{
	Delivery	delivery = {
		.usage_table = table->relid,
		.server = table->server,
		.outcome_unknown = outcome_unknown,
		.vanished = abp_idset_count(ids)
	};

	if (delivery.vanished == 0)
		return;
	abp_lookup_leaving(partition, ids, &delivery.vanished_rows, CurrentMemoryContext);
	abp_ledger_begin(&delivery);
	abp_ledger_finish(&delivery, "failed", "the rows left with their partition before they were sent");
}

/*
 * Those of the ids of which a table has other rows that we have locked.  Nobody is
 * waited for: they may wait for the partition.
 */
static IdSet
lock_others(const UsageTable *table, const IdSet *ids)
{
	IdSet		others = abp_lookup_existing(table->relid, ids);
	IdSet		none = {0};

	if (others.nranges == 0 || !abp_place_lock_shared_ids(table->relid, false))
		return none;
	return abp_rows_lock(table, &others, false);
}

/*
 * A partition was detached: its rows that were not sent have vanished, until
 * it comes back.  "concurrently": others are changing the table's rows.  Who
 * changes one that has the id of a row that has gone says where that id stands.
 */
static void
partition_has_gone(const UsageTable *table, Oid partition, bool concurrently)
{
	Oid			usage_table = table->relid;
	IdWalk		walk = {0};
	IdSet		waiting;
	IdSet		ids;
	IdSet		locked = {0};
	IdSet		unsent = {0};
	IdSet		unknown = {0};
	int64		count;

	if (concurrently)
		abp_attachment_lock(usage_table);
	PushActiveSnapshot(GetLatestSnapshot());
	waiting = abp_outbox_all_ids(usage_table);
	ids = abp_lookup_existing(partition, &waiting);
	if (concurrently)
		locked = lock_others(table, &ids);
	PopActiveSnapshot();
	while (abp_idset_walk(&ids, &walk))
	{
		bool		outcome_unknown = true;
		bool		is_changing;	/* the other row of the id */

		CHECK_FOR_INTERRUPTS();

		is_changing = concurrently && !abp_idset_contains(&locked, walk.id) &&
			abp_lookup_exists(usage_table, walk.id);
		if (is_changing || abp_triggers_row_left(usage_table, walk.id, table->ledger_from, &outcome_unknown))
			abp_idset_add(outcome_unknown ? &unknown : &unsent, walk.id, walk.id, CurrentMemoryContext);
	}
	note_vanished(table, partition, &unsent, false);
	note_vanished(table, partition, &unknown, true);

	count = abp_idset_count(&unsent) + abp_idset_count(&unknown);
	if (count > 0)
		ereport(WARNING,
				(errcode(ERRCODE_WARNING),
				 errmsg(INT64_FORMAT " usage rows of %s were gone before they were sent",
						count, abp_statement_table_name(usage_table)),
				 errhint("They left with partition \"%s\", and are sent when it is attached again.",
						 get_rel_name(partition))));
}

/* --- a partition comes ------------------------------------------------------ */

/* Those of a delivery's ids of whose missed rows it knows more, or no more, than the id. */
static IdSet
ids_known(const Delivery *delivery, bool more)
{
	IdSet		ids = {0};
	IdWalk		walk = {0};

	while (abp_idset_walk(&delivery->ids, &walk))
	{
		if (abp_vanished_has_key(&delivery->vanished_rows, walk.id) == more)
			abp_idset_add(&ids, walk.id, walk.id, CurrentMemoryContext);
	}
	return ids;
}

/*
 * Put rows of these ids, which a delivery missed, back into the outbox: "come" has those that
 * are there already.
 */
static void
put_returned(const Delivery *delivery, IdSet ids, int64 ledger_from, IdSet *come)
{
	OutboxEntry entry = {
		.usage_table = delivery->usage_table,
		.state = OUTBOX_READY,
		.outcome_unknown = delivery->outcome_unknown,
		.ids = abp_idset_subtract(&ids, come)
	};

	if (ids.nranges > 0)
		abp_ledger_returned(delivery, &ids);
	if (entry.ids.nranges == 0)
		return;

	/* Polar may have got a row of these ids while the partition was away. */
	if (!entry.outcome_unknown)
	{
		Delivery	away = {.usage_table = delivery->usage_table,.ids = entry.ids};
		IdSet		known = abp_ledger_delivered_before(&away, ledger_from);

		entry.outcome_unknown = known.nranges > 0;
	}
	abp_outbox_put(&entry, 1);
	abp_wake_at_commit();
	abp_idset_add_set(come, &entry.ids, CurrentMemoryContext);
	abp_idset_sort(come);
}

/*
 * Rows of a partition, or of all of a table's, that went before they were sent are to
 * be sent now.  The shipper is kept away from the table until the transaction ends: it
 * has noted what it has missed, and sees the partition when it reads rows again.
 *
 * Of deliveries that miss a row of an id and know no more of it, one gets the row that
 * has come, unless there is one that knows it; the others wait for the next.
 */
void
abp_partitions_come(Oid usage_table, Oid partition, int64 ledger_from)
{
	List	   *deliveries;
	IdSet		come = {0};		/* each id is put into the outbox once */
	ListCell   *lc;

	abp_attachment_lock(usage_table);
	deliveries = abp_ledger_vanished(usage_table, ledger_from);
	foreach(lc, deliveries)
	{
		Delivery   *delivery = lfirst(lc);

		delivery->ids = abp_lookup_returned(partition, &delivery->vanished_rows);
		put_returned(delivery, ids_known(delivery, true), ledger_from, &come);
	}
	foreach(lc, deliveries)
	{
		Delivery   *delivery = lfirst(lc);
		IdSet		ids = ids_known(delivery, false);

		put_returned(delivery, abp_idset_subtract(&ids, &come), ledger_from, &come);
	}
}

/*
 * A partition of a table, or of a partition of it, whose DETACH CONCURRENTLY is under
 * way or was broken off; InvalidOid if there is none.
 */
Oid
abp_partitions_pending(Oid relid)
{
	Relation	rel = table_open(relid, AccessShareLock);
	PartitionDesc partitions;
	Oid			pending = InvalidOid;

	if (rel->rd_rel->relkind == RELKIND_PARTITIONED_TABLE)
	{
		partitions = RelationGetPartitionDesc(rel, false);
		for (int i = 0; i < partitions->nparts && !OidIsValid(pending); i++)
		{
			CHECK_FOR_INTERRUPTS();
			if (partitions->detached_exist && PartitionHasPendingDetach(partitions->oids[i]))
				pending = partitions->oids[i];
			else if (!partitions->is_leaf[i])
				pending = abp_partitions_pending(partitions->oids[i]);
		}
	}
	table_close(rel, NoLock);
	return pending;
}

/*
 * Note the rows of these ids in partitions that are leaving.  Returns whether all
 * of these could be looked at.
 */
static bool
note_leaving(Relation rel, const IdSet *ids, Vanished *rows, MemoryContext context)
{
	bool		all = true;
	PartitionDesc partitions = RelationGetPartitionDesc(rel, false);

	for (int i = 0; i < partitions->nparts; i++)
	{
		Oid			partition = partitions->oids[i];

		if (partitions->detached_exist && PartitionHasPendingDetach(partition))
		{
			/* its DETACH waits for our transaction, or for others' */
			if (ConditionalLockRelationOid(partition, AccessShareLock))
				abp_lookup_leaving(partition, ids, rows, context);
			else
				all = false;
		}
		else if (!partitions->is_leaf[i])
		{
			Relation	branch = table_open(partition, AccessShareLock);

			all &= note_leaving(branch, ids, rows, context);
			table_close(branch, NoLock);
		}
	}
	return all;
}

/*
 * Note as gone the rows of these ids that leave with a partition whose DETACH CONCURRENTLY
 * is under way: nobody sees them any more, but what was taken from the outbox may have
 * been theirs.  Returns false if there may be more of them: a partition is locked.
 */
bool
abp_partitions_leaving(Oid usage_table, const IdSet *ids, Vanished *rows, MemoryContext context)
{
	Relation	rel = table_open(usage_table, AccessShareLock);
	bool		all = rel->rd_rel->relkind != RELKIND_PARTITIONED_TABLE ||
	note_leaving(rel, ids, rows, context);

	table_close(rel, NoLock);
	return all;
}

/* --- ALTER TABLE ------------------------------------------------------------ */

/*
 * ddl_command_end of ALTER TABLE: a partition may have gone or come.
 */
Datum
abp_sql_on_table_ddl(PG_FUNCTION_ARGS)
{
	const Node *command = abp_extension_event(fcinfo, "on_table_ddl")->parsetree;
	ListCell   *lc;

	if (!abp_extension_installed() || !IsA(command, AlterTableStmt))
		PG_RETURN_NULL();

	foreach(lc, ((const AlterTableStmt *) command)->cmds)
	{
		const AlterTableCmd *cmd = lfirst_node(AlterTableCmd, lc);
		const PartitionCmd *named = (const PartitionCmd *) cmd->def;
		const UsageTable *table;
		Oid			root;
		Oid			partition;
		bool		armed;

		if (cmd->subtype != AT_AttachPartition && cmd->subtype != AT_DetachPartition &&
			cmd->subtype != AT_DetachPartitionFinalize)
			continue;
		root = root_of(RangeVarGetRelid(((const AlterTableStmt *) command)->relation, NoLock, true));
		partition = RangeVarGetRelid(named->name, NoLock, true);
		table = abp_attachment_of(abp_attachments(&armed), root);
		if (!OidIsValid(partition) || table == NULL)
			continue;

		if (cmd->subtype == AT_AttachPartition)
			abp_partitions_come(root, partition, table->ledger_from);
		else
			partition_has_gone(table, partition,
							   named->concurrent || cmd->subtype == AT_DetachPartitionFinalize);
	}
	PG_RETURN_NULL();
}
