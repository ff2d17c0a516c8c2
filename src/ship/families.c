/*-------------------------------------------------------------------------
 *
 * families.c
 *	  Half of a request's rows, children beside their parents.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "base/idset.h"
#include "ship/families.h"

/* The first row of a row's family, both by their places among the rows. */
static int
first_of(int *forebear, int place)
{
	while (forebear[place] != place)
		place = forebear[place] = forebear[forebear[place]];
	return place;
}

/*
 * Join the families of which a row of one is the parent of a row of another.
 * Who is not among the rows does not matter.
 */
static void
join_families(int *forebear, const IdSet *ids, const Kinship *kin, int nkin)
{
	for (int i = 0; i < nkin; i++)
	{
		int			child = abp_idset_rank(ids, kin[i].child);
		int			parent = abp_idset_rank(ids, kin[i].parent);

		if (child < 0 || parent < 0)
			continue;
		child = first_of(forebear, child);
		parent = first_of(forebear, parent);
		forebear[Max(child, parent)] = Min(child, parent);
	}
}

/*
 * Take whole families, in the order of their first rows, until half of the rows
 * are taken: as near to the half as the last of them lets.  Returns how many
 * rows that are, all only if they are one family.
 */
static int
take_families(bool *taken, int *forebear, int count)
{
	int		   *size = palloc0(sizeof(int) * count);
	int			ntaken = 0;

	for (int i = 0; i < count; i++)
		size[first_of(forebear, i)]++;
	for (int i = 0; i < count && ntaken < count / 2; i++)
	{
		if (forebear[i] != i)
			continue;
		if (ntaken > 0 && ntaken + size[i] - count / 2 > count / 2 - ntaken)
			break;
		taken[i] = true;
		ntaken += size[i];
	}
	pfree(size);
	return ntaken;
}

/*
 * Some half of the rows of a request, at least one and not all of two or more,
 * in the current memory context.  A family is in it as a whole or not at all,
 * unless there is no other; who is apart from their parent then is left to the
 * one who fills the request (usage/parents).
 */
IdSet
abp_families_half(IdSet *ids, const Kinship *kin, int nkin)
{
	int			count = abp_idset_count(ids);
	int		   *forebear = palloc(sizeof(int) * count);
	bool	   *taken = palloc0(sizeof(bool) * count);
	IdSet		half = {0};
	IdWalk		walk = {0};
	int			ntaken;

	for (int i = 0; i < count; i++)
		forebear[i] = i;
	join_families(forebear, ids, kin, nkin);
	ntaken = take_families(taken, forebear, count);
	for (int i = 0; abp_idset_walk(ids, &walk); i++)
	{
		if (ntaken == count ? i < count / 2 : taken[first_of(forebear, i)])
			abp_idset_add(&half, walk.id, walk.id, CurrentMemoryContext);
	}
	pfree(forebear);
	pfree(taken);
	return half;
}
