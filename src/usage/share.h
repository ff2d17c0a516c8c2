/*-------------------------------------------------------------------------
 *
 * share.h
 *	  What usage rows add up to, by day, customer, provider, model and event name.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_SHARE_H
#define ABP_SHARE_H

#include "postgres.h"

#include "lib/stringinfo.h"
#include "utils/numeric.h"

#include "base/usage_row.h"
#include "usage/share_key.h"

/* The tokens that are summed up. */
typedef enum ShareTokens
{
	SHARE_INPUT,
	SHARE_CACHE_READ,
	SHARE_CACHE_WRITE,			/* both kinds */
	SHARE_OUTPUT,
	SHARE_REASONING
} ShareTokens;

#define NUM_SHARE_TOKENS (SHARE_REASONING + 1)

/* Decimals of ShareSums.cents. */
#define SHARE_CENTS_SCALE 12

/* The sums; those of nothing are 0. */
typedef struct ShareSums
{
	int64		rows;
	int64		unpriced;		/* of these rows */
	int128		tokens[NUM_SHARE_TOKENS];
	int128		nanos;
	int128		cents;			/* x 10^SHARE_CENTS_SCALE */
	int			cents_scale;	/* decimals that the sum is shown with */
	Numeric		more_cents;		/* what does not fit into "cents", or NULL */
} ShareSums;

typedef struct ShareGroup
{
	uint32		hash;
	int			keylen;
	char	   *key;			/* see abp_share_key_read */
	ShareSums	sums;
} ShareGroup;

/* A table of sums.  All of it is in its memory context. */
typedef struct ShareGroups
{
	MemoryContext context;
	ShareGroup *groups;
	int			ngroups;
	int			max_groups;
	int		   *slots;			/* of a hash table, -1: free */
	int			nslots;			/* a power of 2 */
	StringInfoData key;			/* of the last row */
} ShareGroups;

extern void abp_share_init(ShareGroups *groups, MemoryContext context);
extern ShareGroup *abp_share_group(ShareGroups *groups, const char *key, int keylen);
extern ShareGroup *abp_share_group_of(ShareGroups *groups, const ShareKey *key);
extern ShareGroup *abp_share_find(ShareGroups *groups, const ShareKey *key);
extern void abp_share_sums_of_row(ShareSums *sums, const UsageRow *row);
extern void abp_share_add(ShareGroups *groups, ShareSums *to, const ShareSums *sums);
extern void abp_share_set_cents(ShareSums *sums, Numeric cents, const char *shown);
extern Numeric abp_share_cents(const ShareSums *sums);

#endif							/* ABP_SHARE_H */
