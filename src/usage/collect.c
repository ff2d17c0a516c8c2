/*-------------------------------------------------------------------------
 *
 * collect.c
 *	  What a transaction does to the outbox, collected until it commits.
 *
 * The triggers say which rows are new, which have changed and which are gone.
 * That is written to the outbox in bulk just before the transaction commits,
 * or is prepared: a row and its outbox entry commit together or not at all.
 *
 * New rows, nearly all that there is, are sets of ids in one state.  Rows that
 * are changed after that, or were there before, are in a hash table.  Both
 * know at which nesting level of the transaction they came, so that a rolled
 * back subtransaction takes its part along; what a level has collected lies
 * before all that lower levels have, so that its end looks at nothing else.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "miscadmin.h"
#include "utils/hsearch.h"
#include "utils/memutils.h"

#include "base/idset.h"
#include "queue/entry.h"
#include "queue/outbox.h"
#include "queue/place.h"
#include "queue/wake.h"
#include "usage/collect.h"
#include "usage/row.h"

/* How many kinds of collected rows are looked through for each row. */
#define MAX_GROUPS_SEARCHED 16

/* New rows of one state. */
typedef struct Group
{
	struct Group *next;
	Oid			usage_table;
	int			nest_level;
	RowState	state;
	IdSet		ids;
} Group;

/* All new rows of a table. */
typedef struct Inserted
{
	struct Inserted *next;
	Oid			usage_table;
	int			nest_level;
	bool		unsure;			/* some of them have come back, and Polar may
								 * have them */
	IdSet		ids;
} Inserted;

/* A row that was there before, or has been changed since it came. */
typedef struct Change
{
	RowKey		key;			/* hash key */
	int			nest_level;
	uint8		count[NUM_OUTBOX_STATES];	/* how often it is to be taken out
											 * of each state */
	bool		waits;			/* in "state", else it is gone */
	RowState	state;
} Change;

/* What was known of a row at a lower nesting level. */
typedef struct OldChange
{
	bool		known;
	int			nest_level;		/* that has changed it */
	Change		change;
} OldChange;

/* All live until the end of the transaction. */
static MemoryContext collect_context = NULL;	/* NULL: nothing is collected */
static Group *groups = NULL;	/* the deepest level's first */
static Inserted *inserted = NULL;	/* likewise */
static HTAB *changes = NULL;
static OldChange *old_changes = NULL;	/* the deepest level's last */
static int	n_old_changes = 0;
static int	max_old_changes = 0;

static void on_transaction_end(XactEvent event, void *arg);
static void on_subtransaction_end(SubXactEvent event, SubTransactionId mine,
								  SubTransactionId parent, void *arg);

/*
 * The first row of a transaction: what is collected is written when it
 * commits.
 */
static void
begin_collecting(void)
{
	static bool registered = false;

	if (collect_context != NULL)
		return;
	if (!registered)
	{
		RegisterXactCallback(on_transaction_end, NULL);
		RegisterSubXactCallback(on_subtransaction_end, NULL);
		registered = true;
	}
	collect_context = AllocSetContextCreate(TopTransactionContext, "aibilling_polar collected rows",
											ALLOCSET_DEFAULT_SIZES);
}

static void
forget_all(void)
{
	/* The memory goes with the transaction. */
	collect_context = NULL;
	groups = NULL;
	inserted = NULL;
	changes = NULL;
	old_changes = NULL;
	n_old_changes = max_old_changes = 0;
}

/* --- new rows -------------------------------------------------------------- */

/* Can rows of these states share an entry? */
static bool
same_state(const RowState *a, const RowState *b)
{
	return a->state == b->state && a->not_before == b->not_before &&
		a->outcome_unknown == b->outcome_unknown &&
		(a->error == b->error ||
		 (a->error != NULL && b->error != NULL && strcmp(a->error, b->error) == 0));
}

/*
 * The group of these properties, NULL if none of the first few is it: two
 * groups of a kind do no harm, a long search for each row would.
 */
static Group *
find_group(Group *first, Oid usage_table, int nest_level, const RowState *state)
{
	for (int i = 0; first != NULL && i < MAX_GROUPS_SEARCHED; i++, first = first->next)
	{
		if (first->usage_table == usage_table && first->nest_level == nest_level &&
			same_state(&first->state, state))
			return first;
	}
	return NULL;
}

/*
 * The rows of a table that were inserted at this depth of subtransactions, of
 * a list with the deepest first.
 */
static Inserted *
find_inserted(Inserted *first, Oid usage_table, int nest_level)
{
	for (; first != NULL && first->nest_level >= nest_level; first = first->next)
	{
		if (first->usage_table == usage_table && first->nest_level == nest_level)
			return first;
	}
	return NULL;
}

/* A copy that lives as long as what is collected. */
static RowState
copy_state(const RowState *state)
{
	RowState	copy = *state;

	if (copy.error != NULL)
		copy.error = MemoryContextStrdup(collect_context, copy.error);
	return copy;
}

/* Rows of one table with the same fate share an entry. */
static void
add_to_group(Oid usage_table, int64 id, int nest_level, const RowState *state)
{
	Group	   *group = find_group(groups, usage_table, nest_level, state);

	if (group == NULL)
	{
		group = MemoryContextAllocZero(collect_context, sizeof(Group));
		group->usage_table = usage_table;
		group->nest_level = nest_level;
		group->state = copy_state(state);
		group->next = groups;
		groups = group;
	}
	abp_idset_add(&group->ids, id, id, collect_context);
}

/*
 * Collect a new row, to be in the outbox in this state when the transaction
 * commits.
 */
void
abp_collect_inserted(Oid usage_table, int64 id, const RowState *state)
{
	int			nest_level = GetCurrentTransactionNestLevel();
	Inserted   *all;

	begin_collecting();

	/* A row that this transaction has deleted comes back. */
	if (changes != NULL)
	{
		RowPlace	place;

		if (abp_collect_find(usage_table, id, &place))
		{
			abp_collect_changed(usage_table, id, NULL, state);
			return;
		}
	}

	add_to_group(usage_table, id, nest_level, state);
	all = find_inserted(inserted, usage_table, nest_level);
	if (all == NULL)
	{
		all = MemoryContextAllocZero(collect_context, sizeof(Inserted));
		all->usage_table = usage_table;
		all->nest_level = nest_level;
		all->next = inserted;
		inserted = all;
	}
	all->unsure |= state->outcome_unknown;
	abp_idset_add(&all->ids, id, id, collect_context);
}

/*
 * Collect a row to be counted when the transaction commits: "note" is one of
 * OUTBOX_NOT_QUEUED, OUTBOX_SKIPPED, OUTBOX_KEPT and OUTBOX_VANISHED.
 */
void
abp_collect_note(Oid usage_table, char note, int64 id)
{
	RowState	state = {note, DT_NOBEGIN};

	begin_collecting();
	add_to_group(usage_table, id, GetCurrentTransactionNestLevel(), &state);
}

/* --- changed rows ----------------------------------------------------------- */

/* Find what is collected of a changed row, or enter or remove it. */
static Change *
find_change(Oid usage_table, int64 id, HASHACTION action, bool *found)
{
	RowKey		key;

	row_key_set(&key, usage_table, id);
	return hash_search(changes, &key, action, found);
}

/*
 * Was the row inserted by this transaction?  Then *outcome_unknown: it has come
 * back, and Polar may have it.
 */
static bool
is_inserted(Oid usage_table, int64 id, bool *outcome_unknown)
{
	Inserted   *all = inserted;

	while (all != NULL && (all->usage_table != usage_table || !abp_idset_contains(&all->ids, id)))
		all = all->next;
	if (all == NULL)
		return false;
	for (Group *group = all->unsure ? groups : NULL; group != NULL; group = group->next)
	{
		if (group->usage_table == usage_table && group->state.outcome_unknown &&
			abp_idset_contains(&group->ids, id))
			*outcome_unknown = true;
	}
	return true;
}

/*
 * Does this transaction know where a row stands, since it has inserted or
 * changed it?  Then *place says so: ROW_IN_OUTBOX, or ROW_NOT_SENT for a row
 * that it has taken out of the outbox.
 */
bool
abp_collect_find(Oid usage_table, int64 id, RowPlace *place)
{
	Change	   *change;

	memset(place, 0, sizeof(*place));
	if (collect_context == NULL)
		return false;
	change = changes == NULL ? NULL : find_change(usage_table, id, HASH_FIND, NULL);
	if (change != NULL)
	{
		place->where = change->waits ? ROW_IN_OUTBOX : ROW_NOT_SENT;
		place->state = change->waits ? change->state.state : 0;
		place->outcome_unknown = change->waits && change->state.outcome_unknown;
		return true;
	}
	if (!is_inserted(usage_table, id, &place->outcome_unknown))
		return false;
	place->where = ROW_IN_OUTBOX;
	place->state = OUTBOX_READY;
	return true;
}

/* Keep what is known of a row at lower nesting levels. */
static void
keep_old_change(const Change *change, bool known)
{
	if (n_old_changes == max_old_changes)
	{
		max_old_changes = Max(64, 2 * max_old_changes);
		if (old_changes == NULL)
			old_changes = MemoryContextAllocHuge(collect_context, sizeof(OldChange) * max_old_changes);
		else
			old_changes = repalloc_huge(old_changes, sizeof(OldChange) * (Size) max_old_changes);
	}
	old_changes[n_old_changes++] = (OldChange)
	{
		known, GetCurrentTransactionNestLevel(), *change
	};
}

/*
 * Collect what becomes of a row that was there: its state, or NULL if it is
 * deleted.  "place" is where the row stands by abp_place_find, whatever this
 * transaction has collected, or NULL if it is this transaction that put it there.
 */
void
abp_collect_changed(Oid usage_table, int64 id, const RowPlace *place, const RowState *state)
{
	Change	   *change;
	bool		found;

	begin_collecting();
	if (changes == NULL)
	{
		HASHCTL		ctl = {
			.keysize = sizeof(RowKey),
			.entrysize = sizeof(Change),
			.hcxt = collect_context
		};

		changes = hash_create("aibilling_polar changed rows", 64, &ctl,
							  HASH_ELEM | HASH_BLOBS | HASH_CONTEXT);
	}

	change = find_change(usage_table, id, HASH_ENTER, &found);
	if (GetCurrentTransactionNestLevel() > 1 &&
		(!found || change->nest_level < GetCurrentTransactionNestLevel()))
		keep_old_change(change, found);
	if (!found || place != NULL)
	{
		memset(change->count, 0, sizeof(change->count));
		for (int i = 0; place != NULL && i < NUM_OUTBOX_STATES; i++)
			change->count[i] = Min(place->count[i], PG_UINT8_MAX);
	}
	change->nest_level = GetCurrentTransactionNestLevel();
	change->waits = state != NULL;
	if (state != NULL)
		change->state = copy_state(state);
}

/*
 * A table has been emptied, and its outbox: nothing of its rows is collected.
 */
void
abp_collect_truncated(Oid usage_table)
{
	HASH_SEQ_STATUS scan;
	Change	   *change;

	for (Inserted *all = inserted; all != NULL; all = all->next)
	{
		IdWalk		walk = {0};

		if (all->usage_table != usage_table)
			continue;
		while (abp_idset_walk(&all->ids, &walk))
			abp_collect_changed(usage_table, walk.id, NULL, NULL);
	}
	if (changes == NULL)
		return;
	hash_seq_init(&scan, changes);
	while ((change = hash_seq_search(&scan)) != NULL)
	{
		if (change->key.usage_table != usage_table)
			continue;
		abp_collect_changed(usage_table, change->key.id, NULL, NULL);
		memset(change->count, 0, sizeof(change->count));
	}
}

/*
 * The rows of a table that were there before and that this transaction has
 * changed, in the current memory context.
 */
IdSet
abp_collect_changes(Oid usage_table)
{
	IdSet		ids = {0};
	HASH_SEQ_STATUS scan;
	Change	   *change;

	if (changes == NULL)
		return ids;
	hash_seq_init(&scan, changes);
	while ((change = hash_seq_search(&scan)) != NULL)
	{
		if (change->key.usage_table == usage_table)
			abp_idset_add(&ids, change->key.id, change->key.id, CurrentMemoryContext);
	}
	abp_idset_sort(&ids);
	return ids;
}

/*
 * The ids of a table's rows that are in the outbox are given (in *unsure those
 * that Polar may have), and are changed to what this transaction makes of them
 * when it commits.  In the current memory context.
 */
void
abp_collect_pending(Oid usage_table, IdSet *sure, IdSet *unsure)
{
	IdSet		changed;
	HASH_SEQ_STATUS scan;
	Change	   *change;

	if (collect_context == NULL)
		return;
	for (Group *group = groups; group != NULL; group = group->next)
	{
		if (group->usage_table == usage_table && group->state.state != OUTBOX_NOT_QUEUED)
			abp_idset_add_set(group->state.outcome_unknown ? unsure : sure, &group->ids,
							  CurrentMemoryContext);
	}
	abp_idset_sort(sure);
	abp_idset_sort(unsure);

	changed = abp_collect_changes(usage_table);
	if (changed.nranges == 0)
		return;
	*sure = abp_idset_subtract(sure, &changed);
	*unsure = abp_idset_subtract(unsure, &changed);
	hash_seq_init(&scan, changes);
	while ((change = hash_seq_search(&scan)) != NULL)
	{
		if (change->key.usage_table == usage_table && change->waits)
			abp_idset_add(change->state.outcome_unknown ? unsure : sure, change->key.id,
						  change->key.id, CurrentMemoryContext);
	}
	abp_idset_sort(sure);
	abp_idset_sort(unsure);
}

/* --- the end of a (sub)transaction ------------------------------------------- */

/* Entries to be written, and where the next of a kind belongs. */
typedef struct Writing
{
	OutboxEntry *entries;
	int			n;
	int			max;
} Writing;

/* Room for one more entry among those that are written together. */
static OutboxEntry *
add_entry(Writing *writing, Oid usage_table, const RowState *state)
{
	OutboxEntry *entry;

	if (writing->n == writing->max)
	{
		writing->max *= 2;
		writing->entries = repalloc_huge(writing->entries, sizeof(OutboxEntry) * (Size) writing->max);
	}
	entry = &writing->entries[writing->n++];
	memset(entry, 0, sizeof(*entry));
	entry->usage_table = usage_table;
	entry->state = state->state;
	entry->not_before = state->not_before;
	entry->outcome_unknown = state->outcome_unknown;
	entry->error = state->error;
	return entry;
}

/* Add an id to one of the last few entries if they are of its kind, or to a new one. */
static void
write_id(Writing *writing, Oid usage_table, const RowState *state, int64 id)
{
	OutboxEntry *entry = NULL;

	for (int i = writing->n - 1; i >= 0 && i >= writing->n - MAX_GROUPS_SEARCHED; i--)
	{
		OutboxEntry *known = &writing->entries[i];
		RowState	of_known = {known->state, known->not_before, unconstify(char *, known->error),
		known->outcome_unknown};

		if (known->usage_table == usage_table && same_state(&of_known, state))
		{
			entry = known;
			break;
		}
	}
	if (entry == NULL)
		entry = add_entry(writing, usage_table, state);
	abp_idset_add(&entry->ids, id, id, CurrentMemoryContext);
}

/* Take what has changed out of the states in which it was. */
static void
write_removals(Writing *writing)
{
	HASH_SEQ_STATUS scan;
	Change	   *change;

	hash_seq_init(&scan, changes);
	while ((change = hash_seq_search(&scan)) != NULL)
	{
		CHECK_FOR_INTERRUPTS();

		for (int i = 0; i < NUM_OUTBOX_STATES; i++)
		{
			RowState	removal = {OUTBOX_REMOVAL(abp_outbox_states[i]), DT_NOBEGIN};

			if (change->count[i] > 0)
				write_id(writing, change->key.usage_table, &removal, change->key.id);
			/* each of the others is an entry of its own: ids are a set */
			for (int n = 1; n < change->count[i]; n++)
				abp_idset_add(&add_entry(writing, change->key.usage_table, &removal)->ids,
							  change->key.id, change->key.id, CurrentMemoryContext);
		}
	}
}

/* And put it, unless it is gone, into the state in which it is. */
static void
write_changes(Writing *writing)
{
	HASH_SEQ_STATUS scan;
	Change	   *change;

	hash_seq_init(&scan, changes);
	while ((change = hash_seq_search(&scan)) != NULL)
	{
		CHECK_FOR_INTERRUPTS();

		if (change->waits)
			write_id(writing, change->key.usage_table, &change->state, change->key.id);
	}
}

/* The ids of a group without those that have been changed since. */
static IdSet
unchanged(const Group *group)
{
	IdWalk		walk = {0};
	IdSet		ids = {0};

	while (abp_idset_walk(&group->ids, &walk))
	{
		CHECK_FOR_INTERRUPTS();

		if (find_change(group->usage_table, walk.id, HASH_FIND, NULL) == NULL)
			abp_idset_add(&ids, walk.id, walk.id, CurrentMemoryContext);
	}
	return ids;
}

/* Write what was collected to the outbox. */
static void
flush(void)
{
	Writing		writing = {.max = 16};
	MemoryContext old;
	bool		wake = changes != NULL; /* there may be something to send */

	if (groups == NULL && changes == NULL)
		return;

	old = MemoryContextSwitchTo(collect_context);
	writing.entries = palloc(sizeof(OutboxEntry) * writing.max);
	for (Group *group = groups; group != NULL; group = group->next)
	{
		bool		is_note = OUTBOX_IS_NOTE(group->state.state);

		CHECK_FOR_INTERRUPTS();

		add_entry(&writing, group->usage_table, &group->state)->ids =
			changes == NULL || is_note ? group->ids : unchanged(group);
		wake |= !is_note;
	}
	if (changes != NULL)
	{
		write_removals(&writing);
		write_changes(&writing);
	}
	if (abp_outbox_put_at_commit(writing.entries, writing.n) && wake)
		abp_wake_at_commit();
	MemoryContextSwitchTo(old);
}

/*
 * Write what is collected just before the commit, so that it comes with the
 * rows or not at all.
 */
static void
on_transaction_end(XactEvent event, void *arg)
{
	switch (event)
	{
		case XACT_EVENT_PRE_COMMIT:
		case XACT_EVENT_PRE_PREPARE:
			flush();
			break;
		case XACT_EVENT_COMMIT:
		case XACT_EVENT_PREPARE:
		case XACT_EVENT_ABORT:
			forget_all();
			break;
		default:
			break;
	}
}

/* What levels from this one on have changed is as it was before. */
static void
undo_changes(int level)
{
	while (n_old_changes > 0 && old_changes[n_old_changes - 1].nest_level >= level)
	{
		OldChange  *old = &old_changes[--n_old_changes];

		if (old->known)
			*find_change(old->change.key.usage_table, old->change.key.id, HASH_FIND, NULL) = old->change;
		else
			(void) find_change(old->change.key.usage_table, old->change.key.id, HASH_REMOVE, NULL);
	}
}

/* What this level has changed is its parent's. */
static void
keep_changes(int level)
{
	for (int i = n_old_changes - 1; i >= 0 && old_changes[i].nest_level >= level; i--)
	{
		Change	   *change = find_change(old_changes[i].change.key.usage_table,
										 old_changes[i].change.key.id, HASH_FIND, NULL);

		old_changes[i].nest_level = level - 1;
		change->nest_level = Min(change->nest_level, level - 1);
	}
}

/* New rows of this level are forgotten. */
static void
forget_inserted(int level)
{
	while (groups != NULL && groups->nest_level >= level)
		groups = groups->next;
	while (inserted != NULL && inserted->nest_level >= level)
		inserted = inserted->next;
}

/* New rows of this level are its parent's. */
static void
keep_inserted(int level)
{
	Group	   *mine = groups;
	Inserted   *all = inserted;

	while (groups != NULL && groups->nest_level >= level)
		groups = groups->next;
	while (mine != NULL && mine->nest_level >= level)
	{
		Group	   *next = mine->next;
		Group	   *of_parent = find_group(groups, mine->usage_table, level - 1, &mine->state);

		if (of_parent != NULL)
			abp_idset_add_set(&of_parent->ids, &mine->ids, collect_context);
		else
		{
			mine->nest_level = level - 1;
			mine->next = groups;
			groups = mine;
		}
		mine = next;
	}

	while (inserted != NULL && inserted->nest_level >= level)
		inserted = inserted->next;
	while (all != NULL && all->nest_level >= level)
	{
		Inserted   *next = all->next;
		Inserted   *of_parent = find_inserted(inserted, all->usage_table, level - 1);

		if (of_parent != NULL)
		{
			of_parent->unsure |= all->unsure;
			abp_idset_add_set(&of_parent->ids, &all->ids, collect_context);
		}
		else
		{
			all->nest_level = level - 1;
			all->next = inserted;
			inserted = all;
		}
		all = next;
	}
}

/* What a subtransaction has collected is its parent's, or undone with it. */
static void
on_subtransaction_end(SubXactEvent event, SubTransactionId mine,
					  SubTransactionId parent, void *arg)
{
	int			level = GetCurrentTransactionNestLevel();

	if (collect_context == NULL)
		return;
	if (event == SUBXACT_EVENT_COMMIT_SUB)
	{
		keep_inserted(level);
		keep_changes(level);
	}
	else if (event == SUBXACT_EVENT_ABORT_SUB)
	{
		forget_inserted(level);
		undo_changes(level);
	}
}
