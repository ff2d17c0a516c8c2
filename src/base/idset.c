/*-------------------------------------------------------------------------
 *
 * idset.c
 *	  Sets of row ids, kept as ranges; int8multirange in SQL.
 *
 * Ids come from a sequence, mostly one after the other: a million rows of one
 * COPY are a single range.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "utils/multirangetypes.h"
#include "utils/rangetypes.h"
#include "utils/typcache.h"

#include "base/idset.h"
#include "compat.h"

static int
compare_ranges(const void *a, const void *b)
{
	const IdRange *ra = a;
	const IdRange *rb = b;

	return (ra->first > rb->first) - (ra->first < rb->first);
}

/*
 * Add the ids first..last to a set that lives in "context".
 */
void
abp_idset_add(IdSet *set, int64 first, int64 last, MemoryContext context)
{
	if (set->nranges > 0)
	{
		IdRange    *tail = &set->ranges[set->nranges - 1];

		if (tail->last != PG_INT64_MAX && first == tail->last + 1)
		{
			tail->last = last;
			return;
		}
		if (first <= tail->last)
			set->unsorted = true;
	}

	if (set->nranges == set->capacity)
	{
		int			capacity = Max(8, set->capacity * 2);

		if (set->ranges == NULL)
			set->ranges = MemoryContextAlloc(context, sizeof(IdRange) * capacity);
		else
			set->ranges = repalloc_huge(set->ranges, sizeof(IdRange) * (Size) capacity);
		set->capacity = capacity;
	}
	set->ranges[set->nranges++] = (IdRange)
	{
		first, last
	};
}

/*
 * Add the ids of another set to one that lives in "context".
 */
void
abp_idset_add_set(IdSet *set, const IdSet *other, MemoryContext context)
{
	for (int i = 0; i < other->nranges; i++)
		abp_idset_add(set, other->ranges[i].first, other->ranges[i].last, context);
}

/*
 * A copy of a set, in the current memory context.
 */
IdSet
abp_idset_copy(const IdSet *set)
{
	IdSet		copy = {0};

	abp_idset_add_set(&copy, set, CurrentMemoryContext);
	return copy;
}

/*
 * Take all ids out of a set; its memory is kept for others.
 */
void
abp_idset_clear(IdSet *set)
{
	set->nranges = 0;
	set->unsorted = false;
}

/*
 * Make a set the empty one and free its memory.
 */
void
abp_idset_free(IdSet *set)
{
	if (set->ranges != NULL)
		pfree(set->ranges);
	memset(set, 0, sizeof(*set));
}

/*
 * Bring a set's ranges in order and merge those that touch.
 */
void
abp_idset_sort(IdSet *set)
{
	int			kept = 0;

	if (!set->unsorted)
		return;

	qsort(set->ranges, set->nranges, sizeof(IdRange), compare_ranges);
	for (int i = 1; i < set->nranges; i++)
	{
		IdRange    *tail = &set->ranges[kept];
		IdRange    *next = &set->ranges[i];

		if (tail->last == PG_INT64_MAX || next->first <= tail->last + 1)
			tail->last = Max(tail->last, next->last);
		else
			set->ranges[++kept] = *next;
	}
	set->nranges = kept + 1;
	set->unsorted = false;
}

/* The first range of a set, in order, that does not end below an id. */
static int
first_range_from(const IdSet *set, int64 id)
{
	int			low = 0;
	int			high = set->nranges;

	while (low < high)
	{
		int			mid = low + (high - low) / 2;

		if (set->ranges[mid].last < id)
			low = mid + 1;
		else
			high = mid;
	}
	return low;
}

/*
 * Is an id in the set?
 */
bool
abp_idset_contains(IdSet *set, int64 id)
{
	int			range;

	abp_idset_sort(set);
	range = first_range_from(set, id);
	return range < set->nranges && set->ranges[range].first <= id;
}

/*
 * How many ids of a set, in order, are below one of its ids?  -1 if that is
 * not in it.
 */
int64
abp_idset_rank(const IdSet *set, int64 id)
{
	int64		rank = 0;

	for (int i = 0; i < set->nranges && set->ranges[i].first <= id; i++)
	{
		if (id <= set->ranges[i].last)
			return rank + (id - set->ranges[i].first);
		rank += set->ranges[i].last - set->ranges[i].first + 1;
	}
	return -1;
}

/*
 * The number of ids in a set.
 */
int64
abp_idset_count(IdSet *set)
{
	int64		count = 0;

	abp_idset_sort(set);
	for (int i = 0; i < set->nranges; i++)
		count += set->ranges[i].last - set->ranges[i].first + 1;
	return count;
}

/*
 * The ids of "set" that are not in "other", in the current memory context.
 */
IdSet
abp_idset_subtract(IdSet *set, IdSet *other)
{
	IdSet		result = {0};
	int			o;

	abp_idset_sort(set);
	abp_idset_sort(other);

	/* Only what is near: "other" may be much larger. */
	o = set->nranges > 0 ? first_range_from(other, set->ranges[0].first) : 0;
	for (int i = 0; i < set->nranges; i++)
	{
		int64		first = set->ranges[i].first;
		int64		last = set->ranges[i].last;
		bool		left = true;

		while (o < other->nranges && other->ranges[o].last < first)
			o++;
		for (int j = o; left && j < other->nranges && other->ranges[j].first <= last; j++)
		{
			if (other->ranges[j].first > first)
				abp_idset_add(&result, first, other->ranges[j].first - 1,
							  CurrentMemoryContext);
			if (other->ranges[j].last >= last)
				left = false;
			else
				first = other->ranges[j].last + 1;
		}
		if (left)
			abp_idset_add(&result, first, last, CurrentMemoryContext);
	}
	return result;
}

/*
 * The ids of "set" that are in "other", too, in the current memory context.
 */
IdSet
abp_idset_intersect(IdSet *set, IdSet *other)
{
	IdSet		without = abp_idset_subtract(set, other);
	IdSet		result = abp_idset_subtract(set, &without);

	abp_idset_free(&without);
	return result;
}

/*
 * Keep the lowest "count" ids in the set and return the others, in the
 * current memory context.
 */
IdSet
abp_idset_split(IdSet *set, int64 count)
{
	IdSet		rest = {0};
	int			kept = 0;

	abp_idset_sort(set);
	for (int i = 0; i < set->nranges; i++)
	{
		IdRange    *range = &set->ranges[i];
		int64		size = range->last - range->first + 1;

		if (count >= size)
		{
			count -= size;
			kept = i + 1;
			continue;
		}
		abp_idset_add(&rest, range->first + count, range->last, CurrentMemoryContext);
		if (count > 0)
		{
			range->last = range->first + count - 1;
			kept = i + 1;
			count = 0;
		}
	}
	set->nranges = kept;
	return rest;
}

/*
 * A set as an int8multirange, in the current memory context.
 */
Datum
abp_idset_to_multirange(IdSet *set)
{
	TypeCacheEntry *type = lookup_type_cache(INT8MULTIRANGEOID,
											 TYPECACHE_MULTIRANGE_INFO);
	RangeType **ranges;

	abp_idset_sort(set);
	ranges = palloc(sizeof(RangeType *) * Max(1, set->nranges));
	for (int i = 0; i < set->nranges; i++)
	{
		RangeBound	lower = {.val = Int64GetDatum(set->ranges[i].first),.inclusive = true,.lower = true};
		RangeBound	upper = {.infinite = set->ranges[i].last == PG_INT64_MAX};

		if (!upper.infinite)
			upper.val = Int64GetDatum(set->ranges[i].last + 1);
		ranges[i] = abp_make_range(type->rngtype, &lower, &upper);
	}
	return MultirangeTypePGetDatum(make_multirange(INT8MULTIRANGEOID, type->rngtype,
												   set->nranges, ranges));
}

/*
 * An int8multirange as a set, in the current memory context.  Bounds that
 * are infinite become the limits of bigint.
 */
IdSet
abp_idset_from_multirange(Datum multirange)
{
	TypeCacheEntry *type = lookup_type_cache(INT8MULTIRANGEOID,
											 TYPECACHE_MULTIRANGE_INFO);
	IdSet		set = {0};
	RangeType **ranges;
	int32		nranges;

	multirange_deserialize(type->rngtype, DatumGetMultirangeTypeP(multirange),
						   &nranges, &ranges);
	for (int i = 0; i < nranges; i++)
	{
		RangeBound	lower;
		RangeBound	upper;
		bool		empty;

		range_deserialize(type->rngtype, ranges[i], &lower, &upper, &empty);
		if (empty)
			continue;
		abp_idset_add(&set,
					  lower.infinite ? PG_INT64_MIN : DatumGetInt64(lower.val),
					  upper.infinite ? PG_INT64_MAX : DatumGetInt64(upper.val) - 1,
					  CurrentMemoryContext);
	}
	return set;
}
