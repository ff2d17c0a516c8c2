/*-------------------------------------------------------------------------
 *
 * wake.c
 *	  Which worker serves which database, and how a commit wakes it.
 *
 * Shared memory holds a slot for each worker.  A wake-up is only a hint: what
 * there is to do is in tables, and an idle worker polls them.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "miscadmin.h"
#include "port/atomics.h"
#include "storage/ipc.h"
#include "storage/lwlock.h"
#include "storage/proc.h"
#include "utils/resowner.h"

#include "base/shared_memory.h"
#include "base/transaction.h"
#include "compat.h"
#include "queue/wake.h"

/* The longest error that is kept, in bytes. */
#define MAX_WORKER_ERROR 512

typedef struct WorkerSlot
{
	Oid			database;		/* InvalidOid: free */
	int			pid;
	Latch	   *latch;			/* in the worker's PGPROC */
	uint64		looks;			/* turns after which no price was left to look
								 * for */
	pg_atomic_uint32 listens;	/* has not been woken since it last looked */

	/* these outlive the worker, for its next start */
	char		name[NAMEDATALEN];	/* of the database */
	bool		no_database;	/* it has ended since there is none of this
								 * name */
	char		error[MAX_WORKER_ERROR];	/* that ended it; '': none since
											 * it last worked */
} WorkerSlot;

typedef struct WakeState
{
	LWLock	   *lock;
	int			nslots;
	WorkerSlot	slots[FLEXIBLE_ARRAY_MEMBER];
} WakeState;

static int	wanted_slots = 0;
static WakeState *state = NULL;
static WorkerSlot *my_slot = NULL;
static bool wake_pending = false;	/* if the transaction commits */
static bool wake_due = false;	/* it has committed */
static bool has_prepared = false;	/* this process has prepared rows: their
									 * commit is one of its next */

/* Shared memory is there.  With a lock it is new: make its slots. */
static void
use_state(void *memory, LWLock *lock)
{
	state = memory;
	if (lock == NULL)
		return;
	state->lock = lock;
	state->nslots = wanted_slots;
	for (int i = 0; i < state->nslots; i++)
		pg_atomic_init_u32(&state->slots[i].listens, 0);
}

/*
 * Ask for shared memory for this many workers.  Called while the library is
 * preloaded; without it every other function here does nothing.
 */
void
abp_wake_init(int nworkers)
{
	wanted_slots = nworkers;
	abp_shared_memory_request("aibilling_polar",
							  offsetof(WakeState, slots) + sizeof(WorkerSlot) * nworkers, use_state);
}

/*
 * At exit: the slot is free, but keeps the database's name for the next start.
 */
static void
forget_worker(int code, Datum arg)
{
	LWLockAcquire(state->lock, LW_EXCLUSIVE);
	my_slot->database = InvalidOid;
	my_slot->latch = NULL;
	LWLockRelease(state->lock);
}

/*
 * This process is the worker of the slot's number and of a database of this
 * name.
 */
void
abp_wake_use_slot(int number, const char *name)
{
	my_slot = &state->slots[number];
	LWLockAcquire(state->lock, LW_EXCLUSIVE);
	strlcpy(my_slot->name, name, NAMEDATALEN);
	LWLockRelease(state->lock);
}

/*
 * Let sessions know this process as the worker of its database, until it
 * exits.
 */
void
abp_wake_register(void)
{
	LWLockAcquire(state->lock, LW_EXCLUSIVE);
	my_slot->database = MyDatabaseId;
	my_slot->pid = MyProcPid;
	my_slot->latch = MyLatch;
	my_slot->looks = 0;
	LWLockRelease(state->lock);
	before_shmem_exit(forget_worker, 0);
}

/*
 * The worker ends, with this error; no_database: since there is no database of
 * its name.
 */
void
abp_wake_worker_ends(const char *error, bool no_database)
{
	if (my_slot == NULL || error == NULL)
		return;
	LWLockAcquire(state->lock, LW_EXCLUSIVE);
	my_slot->no_database = no_database;
	strlcpy(my_slot->error, error, pg_mbcliplen(error, strlen(error), MAX_WORKER_ERROR - 1) + 1);
	LWLockRelease(state->lock);
}

/*
 * The error that the worker of a database ended with, if it has done nothing
 * without one since: a copy in the current memory context, or NULL.
 */
char	   *
abp_wake_worker_error(const char *database)
{
	char		error[MAX_WORKER_ERROR] = "";

	if (state == NULL)
		return NULL;
	LWLockAcquire(state->lock, LW_SHARED);
	for (int i = 0; i < state->nslots; i++)
	{
		if (strcmp(state->slots[i].name, database) == 0)
			strlcpy(error, state->slots[i].error, sizeof(error));
	}
	LWLockRelease(state->lock);
	return error[0] == '\0' ? NULL : pstrdup(error);
}

/*
 * Did this worker's last run end since there is no database of its name?
 */
bool
abp_wake_had_no_database(void)
{
	bool		had_none;

	LWLockAcquire(state->lock, LW_SHARED);
	had_none = my_slot->no_database;
	LWLockRelease(state->lock);
	return had_none;
}

/*
 * There is a database of this worker's name now: its next run may connect.
 */
void
abp_wake_has_database(void)
{
	LWLockAcquire(state->lock, LW_EXCLUSIVE);
	my_slot->no_database = false;
	my_slot->error[0] = '\0';
	LWLockRelease(state->lock);
}

/*
 * The worker of this database: its pid, 0 if there is none; wakes it if asked
 * to.
 */
static int
signal_worker(bool wake)
{
	int			pid = 0;

	if (state == NULL)
		return 0;

	LWLockAcquire(state->lock, LW_SHARED);
	for (int i = 0; i < state->nslots && pid == 0; i++)
	{
		if (state->slots[i].database == MyDatabaseId)
		{
			pid = state->slots[i].pid;
			if (wake)
			{
				pg_atomic_write_u32(&state->slots[i].listens, 0);
				SetLatch(state->slots[i].latch);
			}
		}
	}
	LWLockRelease(state->lock);
	return pid;
}

/*
 * Does this database's worker listen?  Asked by every commit, so without the
 * lock: a worker that registers this moment has not looked yet.
 */
static bool
worker_listens(void)
{
	if (state == NULL)
		return false;

	/* Our commit comes before this look; see abp_wake_listen. */
	pg_memory_barrier();
	for (int i = 0; i < state->nslots; i++)
	{
		if (state->slots[i].database == MyDatabaseId &&
			pg_atomic_read_u32(&state->slots[i].listens) != 0)
			return true;
	}
	return false;
}

/*
 * A commit makes the wake-up due; that of a prepared transaction is one of the
 * next.
 */
static void
note_outcome(XactEvent event, void *arg)
{
	if (event == XACT_EVENT_COMMIT)
		wake_due = wake_pending || has_prepared;
	if (event == XACT_EVENT_PREPARE && wake_pending)
		has_prepared = true;
	if (abp_transaction_ends(event))
		wake_pending = false;
}

/*
 * Only now have the commit's cache invalidations been sent.  A worker that is
 * woken before them may look without noticing what has changed, and sleep on.
 */
static void
wake_after_commit(ResourceReleasePhase phase, bool commit, bool top_level, void *arg)
{
	if (!wake_due || !top_level || phase != RESOURCE_RELEASE_AFTER_LOCKS)
		return;

	wake_due = false;
	if (worker_listens())
		signal_worker(true);
}

/*
 * Wake the worker of this database when, and if, the current transaction
 * commits.  What this process prepares it is likely to commit, too, as a
 * subscription's worker does: each of its next commits wakes then.  What another
 * process commits is found by the worker's poll.
 */
void
abp_wake_at_commit(void)
{
	static bool registered = false;

	if (!registered)
	{
		RegisterXactCallback(note_outcome, NULL);
		RegisterResourceReleaseCallback(wake_after_commit, NULL);
		registered = true;
	}
	wake_pending = true;
}

/*
 * Wake the worker of this database now.
 */
void
abp_wake_worker(void)
{
	signal_worker(true);
}

/*
 * The process id of this database's worker, 0 if none runs.
 */
int
abp_wake_worker_pid(void)
{
	return signal_worker(false);
}

/*
 * The worker is about to look at what there is to do: the next commit is news.
 * One wake-up is enough until it looks again, so the other commits up to then
 * spare themselves and the worker theirs.
 */
void
abp_wake_listen(void)
{
	if (my_slot == NULL)
		return;
	pg_atomic_write_u32(&my_slot->listens, 1);
	pg_memory_barrier();
}

/*
 * The worker has had a turn without an error, and no price is left to look for.
 */
void
abp_wake_has_looked(void)
{
	if (my_slot == NULL)
		return;
	LWLockAcquire(state->lock, LW_EXCLUSIVE);
	my_slot->looks++;
	my_slot->error[0] = '\0';
	LWLockRelease(state->lock);
}

/*
 * How many such turns has this database's worker had?  0 without one.
 */
uint64
abp_wake_look_count(void)
{
	uint64		looks = 0;

	if (state == NULL)
		return 0;

	LWLockAcquire(state->lock, LW_SHARED);
	for (int i = 0; i < state->nslots; i++)
	{
		if (state->slots[i].database == MyDatabaseId)
			looks = state->slots[i].looks;
	}
	LWLockRelease(state->lock);
	return looks;
}
