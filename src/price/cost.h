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

#include "utils/numeric.h"

#include "base/text_view.h"
#include "base/usage_row.h"

/* What is wrong with counts that contradict each other: words of an error. */
typedef struct CountsProblem
{
	char	   *message;
	const char *hint;			/* or NULL */
} CountsProblem;

typedef enum CostStatus
{
	COST_PRICED,
	COST_FREE,
	COST_REPORTED,
	COST_UNPRICED,
	COST_INCOMPLETE
} CostStatus;

/*
 * The prices that have a column of their own.  Those up to PRICE_REASONING
 * are quoted per million tokens, the others each.
 */
typedef enum PriceKind
{
	PRICE_INPUT,
	PRICE_CACHE_READ,
	PRICE_CACHE_WRITE,
	PRICE_CACHE_WRITE_1H,
	PRICE_OUTPUT,
	PRICE_REASONING,
	PRICE_REQUEST,
	PRICE_WEB_SEARCH
} PriceKind;

#define NUM_TOKEN_PRICES (PRICE_REASONING + 1)
#define NUM_PRICES (PRICE_WEB_SEARCH + 1)

/* Decimals of a price: numeric(18,9) times 10^9 is an int64. */
#define PRICE_SCALE 9

/* An exact decimal: digits / 10^scale. */
typedef struct ExactDecimal
{
	int128		digits;
	int			scale;
} ExactDecimal;

/* The price of a key of units: per million if it counts tokens, else each. */
typedef struct UnitPrice
{
	TextView	name;
	Numeric		price;			/* USD */
} UnitPrice;

/*
 * All prices that apply to one request, fallbacks already followed.  The
 * factor is (1 - discount) x multiplier.
 */
typedef struct Rate
{
	int64		context_above;	/* of the context tier in force */
	int64		price[NUM_PRICES];	/* USD x 10^9 */
	bool		known[NUM_PRICES];	/* false: no price, which is not 0;
									 * price[] is 0 then */
	ExactDecimal factor;
	int			nunits;
	UnitPrice  *units;			/* in the order of
								 * abp_cost_compare_unit_prices() */
} Rate;

/* An exact amount in USD: usd_numeric if that is set, else usd. */
typedef struct ExactCost
{
	ExactDecimal usd;
	Numeric		usd_numeric;
} ExactCost;

/* One line of an explanation: quantity x price / per x factor = amount. */
typedef struct CostBucket
{
	TextView	name;
	Numeric		quantity;
	Numeric		price;			/* USD per "per"; NULL: there is none */
	int64		per;			/* 1000000 for tokens, else 1 */
	Numeric		factor;
	Numeric		amount;			/* exact USD; NULL if there is no price */
	const char *note;			/* or NULL */
} CostBucket;

extern int	abp_cost_compare_unit_prices(const void *a, const void *b);
extern const UnitPrice *abp_cost_find_unit_price(const UnitPrice *units, int nunits,
												 TextView name);
extern bool abp_cost_consistent(const UsageCounts *counts, CountsProblem *problem);
extern void abp_cost_check(const UsageCounts *counts);
extern bool abp_cost_finite(Numeric provider_cost, char **problem);
extern bool abp_cost_counted(const UsageCounts *counts);
extern bool abp_cost_fast(const UsageCounts *counts, const Rate *rate,
						  const ExactDecimal *tier, ExactCost *cost, bool *free);
extern bool abp_cost_exact(const UsageCounts *counts, const Rate *rate,
						   const ExactDecimal *tier, ExactCost *cost, bool *free,
						   char **missing);
extern CostBucket *abp_cost_buckets(const UsageCounts *counts,
									const Rate *rate, const ExactDecimal *tier,
									int *nbuckets);
extern void abp_cost_add_difference(CostBucket **buckets, int *nbuckets,
									Numeric stored_cents);
extern void abp_cost_reported(Numeric provider_cost, ExactCost *cost);
extern ExactDecimal abp_exact_multiply(ExactDecimal a, ExactDecimal b);
extern Numeric abp_exact_to_numeric(ExactDecimal value);
extern bool abp_cost_fits_nanos(const ExactCost *cost, int64 *result);
extern int64 abp_cost_nanos(const ExactCost *cost);
extern Numeric abp_cost_usd(const ExactCost *cost);
extern Numeric abp_cost_cents(const ExactCost *cost);
extern Numeric abp_cost_cents_exact(const ExactCost *cost);
extern Numeric abp_cost_convert(Numeric amount, TextView from, TextView to);

#endif							/* ABP_COST_H */
