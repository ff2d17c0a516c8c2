/*-------------------------------------------------------------------------
 *
 * price.h
 *	  The price table, as cards in force at a time.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_PRICE_H
#define ABP_PRICE_H

#include "postgres.h"

#include "price/cost.h"
#include "datatype/timestamp.h"
#include "utils/date.h"

/* What is to be priced. */
typedef struct PriceRequest
{
	TextView	provider;
	TextView	model;
	TextView	service_tier;	/* NULL, '', default, auto, on_demand:
								 * standard */
	TimestampTz at;				/* the price in force then applies */
	const UsageCounts *counts;
	Numeric		provider_cost;	/* USD as the provider reported it, or NULL */
	bool		from_reply;		/* does the row hold a provider's reply? */
} PriceRequest;

typedef struct PricedCost
{
	CostStatus	status;
	bool		known;			/* are the amounts set? */
	int64		cost_nanos;		/* USD x 10^9, rounded once, half away from 0 */
	Numeric		cost_cents;		/* exact cents rounded to 12 decimals; NULL if
								 * !known */
	char	   *missing;		/* COST_INCOMPLETE: what has no price;
								 * COST_UNPRICED: which model; else NULL */
} PricedCost;

/* Why a request costs what it costs; see abp_price_explain(). */
typedef struct PriceExplanation
{
	CostStatus	status;
	char	   *missing;		/* as in PricedCost */
	TextView	provider;		/* of the card; .data == NULL: no card */
	TextView	model;
	TextView	service_tier;
	TextView	source;
	TimestampTz valid_from;
	bool		has_window;
	TimeADT		daily_from;		/* UTC */
	TimeADT		daily_to;
	int64		context_above;
	int			nbuckets;
	CostBucket *buckets;
} PriceExplanation;

extern bool abp_price_compute(const PriceRequest *request, bool noerror,
							  PricedCost *cost);
extern CostStatus abp_price_cost(const PriceRequest *request, ExactCost *cost,
								 char **missing);
extern void abp_price_explain(const PriceRequest *request,
							  PriceExplanation *explanation);
extern char *abp_price_hint(const PriceRequest *request);
extern bool abp_price_find_model(TextView *provider, TextView *model);
extern const char *abp_price_status_name(CostStatus status);

#endif							/* ABP_PRICE_H */
