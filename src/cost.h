/*-------------------------------------------------------------------------
 *
 * cost.h
 *	  Counts times prices: the exact cost of one AI call.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_COST_H
#define ABP_COST_H

#include "postgres.h"

#include "utils/jsonb.h"
#include "utils/numeric.h"

/*
 * A string that need not end in a zero byte, pointing into a tuple or a
 * constant.  data == NULL is SQL's NULL.
 */
typedef struct TextView
{
	const char *data;
	int			len;
} TextView;

/*
 * The counted quantities of a usage row that have a column of their own, in
 * the order of the table's columns.
 */
typedef enum UsageCount
{
	COUNT_INPUT,				/* all prompt tokens, cached ones included */
	COUNT_CACHE_READ,			/* subset of COUNT_INPUT */
	COUNT_CACHE_WRITE,			/* subset of COUNT_INPUT: 5-minute writes */
	COUNT_CACHE_WRITE_1H,		/* subset of COUNT_INPUT: 1-hour writes */
	COUNT_OUTPUT,				/* all completion tokens, reasoning included */
	COUNT_REASONING,			/* subset of COUNT_OUTPUT */
	COUNT_REQUEST,
	COUNT_WEB_SEARCH
} UsageCount;

#define NUM_USAGE_COUNTS (COUNT_WEB_SEARCH + 1)

typedef struct UsageCounts
{
	int64		value[NUM_USAGE_COUNTS];
	bool		given[NUM_USAGE_COUNTS];	/* false: the column is NULL */
	Jsonb	   *units;			/* further quantities by name, or NULL */
} UsageCounts;

typedef enum CostStatus
{
	COST_PRICED,
	COST_FREE,
	COST_REPORTED,
	COST_UNPRICED,
	COST_INCOMPLETE
} CostStatus;

#endif							/* ABP_COST_H */
