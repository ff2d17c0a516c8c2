/*-------------------------------------------------------------------------
 *
 * families.h
 *	  Half of a request's rows, children beside their parents.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_FAMILIES_H
#define ABP_FAMILIES_H

#include "postgres.h"

#include "base/idset.h"

/* Two rows of a request, by id, of which one is the other's parent. */
typedef struct Kinship
{
	int64		child;
	int64		parent;
} Kinship;

extern IdSet abp_families_half(IdSet *ids, const Kinship *kin, int nkin);

#endif							/* ABP_FAMILIES_H */
