/*-------------------------------------------------------------------------
 *
 * normalize.h
 *	  A provider's own usage object, turned into the counts we price.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_NORMALIZE_H
#define ABP_NORMALIZE_H

#include "postgres.h"

#include "lib/stringinfo.h"

#include "price/cost.h"

/* What the caller knows of a call beside its usage object. */
typedef struct UsageCall
{
	TextView	model;			/* .data == NULL: not known */
	bool		cost_known;
} UsageCall;

typedef struct NormalizedUsage
{
	UsageCounts counts;
	Numeric		provider_cost;	/* USD, or NULL when the object reports none */
	char	   *service_tier;	/* the tier that served, or NULL */
	char	   *model;			/* when a whole response was handed over */
	char	   *generation_id;	/* ditto */
	char	   *doubt;			/* what is wrong with the numbers although the
								 * cost is known, or NULL */
} NormalizedUsage;

extern bool abp_normalize_knows_format(TextView format);
extern char *abp_normalize_format_hint(TextView format);
extern bool abp_normalize_usage(TextView format, Jsonb *raw, const UsageCall *call,
								NormalizedUsage *usage, StringInfo reason);
extern Jsonb *abp_usage_strip(TextView format, Jsonb *raw, const UsageCall *call);

#endif							/* ABP_NORMALIZE_H */
