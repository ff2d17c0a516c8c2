/*-------------------------------------------------------------------------
 *
 * cards.h
 *	  The price cards of models, read from the tables and kept while they hold.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_CARDS_H
#define ABP_CARDS_H

#include "postgres.h"

#include "datatype/timestamp.h"
#include "utils/date.h"

#include "base/text_view.h"
#include "price/cost.h"
#include "price/names.h"

/* The prices of one daily window of a card, or of the whole day. */
typedef struct PriceWindow
{
	bool		all_day;
	TimeADT		from;			/* inclusive, UTC */
	TimeADT		to;				/* exclusive; before from: past midnight */
	int			nrates;
	Rate	   *rates;			/* by context_above, ascending; first is 0 */
	const char **notes;			/* what the price table notes on each rate;
								 * NULL where it has no note */
} PriceWindow;

/* All rows of one (provider, model, service_tier, source, valid_from). */
typedef struct PriceCard
{
	TextView	source;
	TimestampTz valid_from;
	int			nwindows;
	PriceWindow *windows;		/* shortest first, the whole day last */
} PriceCard;

typedef struct PriceTier
{
	TextView	name;
	int			ncards;
	PriceCard  *cards;			/* by source, best first; then newest first */
} PriceTier;

/* A service tier's share of the standard price. */
typedef struct TierRule
{
	TextView	name;
	int			rank;			/* the lower, the nearer to the request */
	bool		has_multiplier;
	ExactDecimal multiplier;
} TierRule;

typedef struct PriceModel
{
	MemoryContext context;		/* holds all of this */
	TextView	provider;		/* as the cards spell them */
	TextView	model;
	int			ntiers;
	PriceTier  *tiers;
	int			nrules;
	TierRule   *rules;			/* the first of a name holds */
	bool		similar_known;
	const char *similar;		/* without tiers: what name was meant, in
								 * words; NULL if none is close */
} PriceModel;

extern const TextView abp_standard_tier;

/*
 * A service tier as the price table spells it; the standard tier by whatever
 * name is always abp_standard_tier itself, so that comparing it is quick.
 */
static inline TextView
abp_cards_canonical_tier(TextView tier)
{
	static const TextView other_names[] = {
		{"", 0}, {"default", 7}, {"auto", 4}, {"on_demand", 9}
	};

	if (tier.data == NULL ||
		(tier.len == 8 && memcmp(tier.data, abp_standard_tier.data, 8) == 0))
		return abp_standard_tier;
	for (int i = 0; i < lengthof(other_names); i++)
	{
		if (text_view_equal(other_names[i], tier))
			return abp_standard_tier;
	}
	return tier;
}

extern bool abp_cards_tier_is_standard(TextView tier);
extern bool abp_cards_same_tier(TextView name, TextView requested, bool fold);
extern void abp_cards_init(void);
extern PriceModel *abp_cards_find(ModelKey key);
extern const char *abp_cards_similar_name(PriceModel *model, ModelKey key);
extern bool abp_cards_have_set_price(void);

#endif							/* ABP_CARDS_H */
