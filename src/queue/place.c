/*-------------------------------------------------------------------------
 *
 * place.c
 *	  Where a row stands: in the outbox, in flight, delivered.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/transam.h"
#include "access/xact.h"
#include "catalog/pg_class_d.h"
#include "miscadmin.h"
#include "storage/lmgr.h"
#include "storage/lock.h"
#include "utils/fmgroids.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"

#include "base/table_scan.h"
#include "queue/entry.h"
#include "queue/ledger.h"
#include "queue/outbox.h"
#include "queue/place.h"

/* The second lock of a table as an object; the first is that of attachment.c. */
#define LOCK_OF_SHARED_IDS 1

/*
 * Count the entries of one table and state, or the removals from it, that hold
 * an id.  *busy is a transaction that is about to change that, if there is
 * one, or has since the active snapshot was taken.
 */
static int
count_holders(Oid usage_table, char state, int64 id, bool *outcome_unknown, TransactionId *busy)
{
	int64		keys[2] = {id, BLOCK_OF(id)};
	int			count = 0;

	for (int i = 0; i < (keys[0] == keys[1] ? 1 : 2); i++)
	{
		SnapshotData dirty;
		OrderedScan scan;
		HeapTuple	tuple;

		InitDirtySnapshot(dirty);
		abp_entry_scan_begin_at(&scan, usage_table, state, BTEqualStrategyNumber, F_INT8EQ, keys[i],
								OUTBOX_IS_REMOVAL(state) ? &dirty : GetActiveSnapshot());
		while ((tuple = abp_scan_next(&scan)) != NULL)
		{
			TransactionId other;

			if (!abp_entry_holds(tuple, RelationGetDescr(scan.rel), id))
				continue;
			other = OUTBOX_IS_REMOVAL(state) ? HeapTupleHeaderGetXmin(tuple->t_data) : InvalidTransactionId;
			if (!TransactionIdIsValid(other) || TransactionIdIsCurrentTransactionId(other) ||
				!XidInMVCCSnapshot(other, GetActiveSnapshot()))
				other = abp_entry_deleter(tuple);
			if (TransactionIdIsValid(other))
				*busy = other;
			*outcome_unknown |= ENTRY_FORM(tuple)->outcome_unknown;
			count++;
		}
		abp_scan_end(&scan);
	}
	return count;
}

/* How often is an id in the outbox, in each state? */
static void
look_into_outbox(Oid usage_table, int64 id, RowPlace *place, TransactionId *busy)
{
	bool		removals = abp_entries_have_removals(usage_table);
	bool		ignored;

	place->state = 0;
	place->outcome_unknown = false;
	for (int i = 0; i < NUM_OUTBOX_STATES; i++)
	{
		bool		outcome_unknown = false;
		int			count = 0;

		/*
		 * Removals first: should the shipper bring both together meanwhile,
		 * the entries tell.
		 */
		if (removals)
			count -= count_holders(usage_table, OUTBOX_REMOVAL(abp_outbox_states[i]), id, &ignored, busy);
		count += count_holders(usage_table, abp_outbox_states[i], id, &outcome_unknown, busy);
		place->count[i] = Max(count, 0);
		if (count > 0)
		{
			place->state = abp_outbox_states[i];
			place->outcome_unknown |= outcome_unknown;
		}
	}
}

/* What the ledger, by the active snapshot, says of where a row stands. */
static void
look_into_ledger(Oid usage_table, int64 id, int64 ledger_from, RowPlace *place)
{
	if (abp_ledger_is_sending(usage_table, id))
		place->where = ROW_SENDING;
	else if (place->state != 0)
		place->where = ROW_IN_OUTBOX;
	else if (abp_ledger_last_delivered(usage_table, id, ledger_from) != 0)
		place->where = ROW_DELIVERED;
	else
		place->where = ROW_NOT_SENT;
}

/* The same as abp_place_find, once; returns a transaction that is about to change it. */
static TransactionId
look(Oid usage_table, int64 id, int64 ledger_from, RowPlace *place)
{
	TransactionId busy = InvalidTransactionId;

	memset(place, 0, sizeof(*place));
	PushActiveSnapshot(GetLatestSnapshot());
	look_into_outbox(usage_table, id, place, &busy);
	if (!TransactionIdIsValid(busy))
		look_into_ledger(usage_table, id, ledger_from, place);
	PopActiveSnapshot();
	return busy;
}

/* In all states together. */
static int
times_in_outbox(const RowPlace *place)
{
	int			times = 0;

	for (int i = 0; i < NUM_OUTBOX_STATES; i++)
		times += place->count[i];
	return times;
}

/*
 * An id that is in the outbox more than once is of several rows, and who changes one
 * of these takes all of that out: one transaction at a time in a table.  Returns
 * false if there is another one, which is not to be waited for.
 */
bool
abp_place_lock_shared_ids(Oid usage_table, bool wait)
{
	LOCKTAG		tag;

	SET_LOCKTAG_OBJECT(tag, MyDatabaseId, RelationRelationId, usage_table, LOCK_OF_SHARED_IDS);
	return LockAcquire(&tag, ExclusiveLock, false, !wait) != LOCKACQUIRE_NOT_AVAIL;
}

/*
 * Where does a row stand?  By the latest state of the tables, whatever the
 * transaction's snapshot.  What the ledger has up to "ledger_from" speaks of
 * rows before the last TRUNCATE.
 *
 * Who holds the row's lock may rely on the answer until the transaction ends:
 * the shipper passes a row over that another transaction has locked, and if it
 * is taking the row at this moment, this function waits until it has.
 */
void
abp_place_find(Oid usage_table, int64 id, int64 ledger_from, RowPlace *place)
{
	bool		locked = false;

	for (;;)
	{
		TransactionId busy;

		CHECK_FOR_INTERRUPTS();
		busy = look(usage_table, id, ledger_from, place);
		if (TransactionIdIsValid(busy))
			XactLockTableWait(busy, NULL, NULL, XLTW_None);
		else if (locked || times_in_outbox(place) < 2)
			break;
		else
			locked = abp_place_lock_shared_ids(usage_table, true);
	}
}

/*
 * The same without waiting: false if another transaction is about to change it.
 */
bool
abp_place_find_at_once(Oid usage_table, int64 id, int64 ledger_from, RowPlace *place)
{
	return !TransactionIdIsValid(look(usage_table, id, ledger_from, place));
}
