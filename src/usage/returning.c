/*-------------------------------------------------------------------------
 *
 * returning.c
 *	  Rows that are inserted and are not new: moved, or brought back.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "miscadmin.h"
#include "utils/hsearch.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"

#include "base/text_view.h"
#include "base/transaction.h"
#include "queue/ledger.h"
#include "usage/lookup.h"
#include "usage/relation.h"
#include "usage/returning.h"
#include "usage/row.h"

/* Rows between their INSERT triggers that were there before, or NULL. */
static HTAB *returning = NULL;
static int	returning_level = 0;	/* the deepest nesting level among them */

/*
 * Find what is remembered of a row, or enter or remove it; NULL if nothing is.
 */
Returning  *
abp_returning_find(Oid usage_table, int64 id, HASHACTION action)
{
	RowKey		key;

	if (returning == NULL && action != HASH_ENTER)
		return NULL;
	row_key_set(&key, usage_table, id);
	return hash_search(returning, &key, action, NULL);
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

static void
on_transaction_end(XactEvent event, void *arg)
{
	if (!abp_transaction_ends(event))
		return;
	returning = NULL;			/* its memory goes with the transaction */
	returning_level = 0;
}

/*
 * What a subtransaction has remembered is its parent's, or forgotten with it.
 */
static void
on_subtransaction_end(SubXactEvent event, SubTransactionId mine,
					  SubTransactionId parent, void *arg)
{
	int			level = GetCurrentTransactionNestLevel();

	if (event == SUBXACT_EVENT_COMMIT_SUB)
		returning_level = Min(returning_level, level - 1);
	if (event == SUBXACT_EVENT_ABORT_SUB && level <= returning_level)
		forget_returning(level);
}

/*
 * Remember, until its AFTER trigger, that a row is not new.
 */
void
abp_returning_remember(Oid usage_table, int64 id, ReturnKind kind)
{
	static bool registered = false;
	Returning  *row;

	if (!registered)
	{
		RegisterXactCallback(on_transaction_end, NULL);
		RegisterSubXactCallback(on_subtransaction_end, NULL);
		registered = true;
	}
	if (returning == NULL)
	{
		HASHCTL		ctl = {
			.keysize = sizeof(RowKey),
			.entrysize = sizeof(Returning),
			.hcxt = TopTransactionContext
		};

		returning = hash_create("aibilling_polar returning rows", 64, &ctl,
								HASH_ELEM | HASH_BLOBS | HASH_CONTEXT);
	}
	row = abp_returning_find(usage_table, id, HASH_ENTER);
	row->nest_level = GetCurrentTransactionNestLevel();
	row->kind = kind;
	returning_level = Max(returning_level, row->nest_level);
}

/*
 * Has Polar a row of this id, or may it have this one, which left with its partition
 * before its request was sent again?
 */
static bool
may_be_delivered(UsageRelation *known, const RowColumns *row, int64 id)
{
	TextView	external_id;

	if (abp_ledger_has(known->usage_table, id, known->ledger_from))
		return true;
	if (row->nulls[COL_EXTERNAL_ID])
		return false;
	external_id = text_view_from_datum(row->values[COL_EXTERNAL_ID]);
	return abp_ledger_may_have_missed(known->usage_table, id, abp_ledger_key_of(&external_id),
									  known->ledger_from);
}

/*
 * Is a row that is inserted with its cost filled in one that was there?  When
 * its statement began it was visible, or Polar has it and it is its owner who
 * brings it back.
 */
static bool
returning_kind(UsageRelation *known, RowColumns *row, int64 id, ReturnKind *kind)
{
	if (ActiveSnapshotSet() &&
		abp_lookup_rows(known->usage_table, id, GetActiveSnapshot(), abp_lookup_same_row, row))
	{
		*kind = row->unchanged ? RETURN_MOVED : RETURN_CHANGED;
		return true;
	}
	if (abp_relation_is_callers(known->usage_table) && may_be_delivered(known, row, id))
	{
		*kind = RETURN_DELIVERED;
		return true;
	}
	return false;
}

/*
 * Is a row that is inserted none that is new, and keeps its cost?  The AFTER
 * trigger is told what it is; an ordinary row has no cost and costs no look.
 */
bool
abp_returning_remains(UsageRelation *known, const Datum *values, const bool *nulls)
{
	int64		id = DatumGetInt64(values[COL_ID]);
	RowColumns	row = {values, nulls};
	ReturnKind	kind;

	if (!nulls[COL_COST_STATUS] && returning_kind(known, &row, id, &kind))
	{
		abp_returning_remember(known->usage_table, id, kind);
		return kind != RETURN_CHANGED;
	}
	(void) abp_returning_find(known->usage_table, id, HASH_REMOVE);
	return false;
}
