/*-------------------------------------------------------------------------
 *
 * idset.h
 *	  Sets of row ids, kept as ranges; int8multirange in SQL.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_IDSET_H
#define ABP_IDSET_H

#include "postgres.h"

typedef struct IdRange
{
	int64		first;
	int64		last;			/* inclusive */
} IdRange;

/*
 * Ids are appended in any order; what reads a set sorts and merges it first.
 * All zero is the empty set.
 */
typedef struct IdSet
{
	IdRange    *ranges;
	int			nranges;
	int			capacity;
	bool		unsorted;		/* ranges may be out of order or overlap */
} IdSet;

/* Where a walk over the ids of a set is; all zero at the start. */
typedef struct IdWalk
{
	int			range;
	bool		inside;			/* of it, behind "id" */
	int64		id;
} IdWalk;

/* Go to the next id, walk->id.  Returns false at the end. */
static inline bool
abp_idset_walk(const IdSet *set, IdWalk *walk)
{
	if (walk->range >= set->nranges)
		return false;
	walk->id = walk->inside ? walk->id + 1 : set->ranges[walk->range].first;
	walk->inside = walk->id < set->ranges[walk->range].last;
	if (!walk->inside)
		walk->range++;
	return true;
}

extern void abp_idset_add(IdSet *set, int64 first, int64 last,
						  MemoryContext context);
extern void abp_idset_add_set(IdSet *set, const IdSet *other, MemoryContext context);
extern IdSet abp_idset_copy(const IdSet *set);
extern void abp_idset_clear(IdSet *set);
extern void abp_idset_free(IdSet *set);
extern void abp_idset_sort(IdSet *set);
extern bool abp_idset_contains(IdSet *set, int64 id);
extern int64 abp_idset_count(IdSet *set);
extern int64 abp_idset_rank(const IdSet *set, int64 id);
extern IdSet abp_idset_subtract(IdSet *set, IdSet *other);
extern IdSet abp_idset_intersect(IdSet *set, IdSet *other);
extern IdSet abp_idset_split(IdSet *set, int64 count);
extern Datum abp_idset_to_multirange(IdSet *set);
extern IdSet abp_idset_from_multirange(Datum multirange);

#endif							/* ABP_IDSET_H */
