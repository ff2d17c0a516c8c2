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

#include "cost.h"

typedef struct NormalizedUsage
{
	UsageCounts counts;
	Numeric		provider_cost;	/* USD, or NULL when the object reports none */
	char	   *service_tier;	/* the tier that served, or NULL */
	char	   *model;			/* when a whole response was handed over */
	char	   *generation_id;	/* ditto */
} NormalizedUsage;

extern bool abp_usage_format_known(TextView format);
extern char *abp_usage_format_hint(TextView format);
extern bool abp_normalize_usage(TextView format, Jsonb *raw,
								NormalizedUsage *usage, StringInfo reason);

#endif							/* ABP_NORMALIZE_H */
