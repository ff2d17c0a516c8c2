/*-------------------------------------------------------------------------
 *
 * price.c
 *	  What a call costs by the price tables, and why.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "lib/stringinfo.h"
#include "utils/builtins.h"
#include "utils/json.h"
#include "utils/memutils.h"
#include "utils/numeric.h"
#include "utils/timestamp.h"

#include "base/text_view.h"
#include "base/usage_row.h"
#include "compat.h"
#include "price/cards.h"
#include "price/cost.h"
#include "price/names.h"
#include "price/price.h"

/* Intermediate results of numeric arithmetic; reset after each row. */
static MemoryContext work_context = NULL;

/* Get ready to price, once per backend. */
static void
init_price(void)
{
	if (work_context != NULL)
		return;
	abp_cards_init();
	work_context = AllocSetContextCreate(TopMemoryContext,
										 "aibilling_polar price arithmetic",
										 ALLOCSET_SMALL_SIZES);
}

/* --- the card in force ---------------------------------------------------- */

/* Does a daily window hold a time? */
static bool
window_contains(const PriceWindow *window, TimestampTz at)
{
	TimeADT		time;

	if (window->all_day)
		return true;
	if (TIMESTAMP_NOT_FINITE(at))
		return false;

	/* Timestamps count from a midnight in UTC, either way. */
	time = at % USECS_PER_DAY;
	if (time < 0)
		time += USECS_PER_DAY;

	if (window->from < window->to)
		return time >= window->from && time < window->to;
	return time >= window->from || time < window->to;
}

/* What is in force for a request; rate is NULL if nothing is. */
typedef struct RateInForce
{
	PriceModel *model;
	const PriceTier *tier;
	const PriceCard *card;
	const PriceWindow *window;
	const Rate *rate;
	const ExactDecimal *tier_factor;	/* NULL: the tier has a card of its
										 * own */
} RateInForce;

/* Find a tier's rate in force.  Returns false if it has none. */
static bool
find_rate(const PriceModel *model, TextView tier_name, bool fold, TimestampTz at,
		  int64 input_tokens, RateInForce *result)
{
	const PriceTier *tier = NULL;
	const PriceCard *newest = NULL;

	for (int i = 0; i < model->ntiers && tier == NULL; i++)
	{
		if (abp_cards_same_tier(model->tiers[i].name, tier_name, fold))
			tier = &model->tiers[i];
	}
	if (tier == NULL)
		return false;

	for (int i = 0; i < tier->ncards; i++)
	{
		const PriceCard *card = &tier->cards[i];

		if (card->valid_from > at)
			continue;

		/*
		 * A source's newest card replaces its older ones as a whole.  If it
		 * has no row for this hour, the next source has its say.
		 */
		if (newest != NULL && text_view_equal(newest->source, card->source))
			continue;
		newest = card;

		for (int j = 0; j < card->nwindows; j++)
		{
			const PriceWindow *window = &card->windows[j];
			int			k = window->nrates - 1;

			if (!window_contains(window, at))
				continue;
			while (k > 0 && window->rates[k].context_above >= input_tokens)
				k--;

			result->tier = tier;
			result->card = card;
			result->window = window;
			result->rate = &window->rates[k];
			return true;
		}
	}
	return false;
}

/* The rule for a service tier, NULL if there is none. */
static const TierRule *
find_rule(const PriceModel *model, TextView tier, bool fold)
{
	for (int i = 0; i < model->nrules; i++)
	{
		const TierRule *rule = &model->rules[i];

		if (abp_cards_same_tier(rule->name, tier, fold))
			return rule->has_multiplier ? rule : NULL;
	}
	return NULL;
}

/* The model that a request is for. */
static PriceModel *
requested_model(const PriceRequest *request)
{
	static const TextView empty = {"", 0};
	ModelKey	key;

	key.provider = request->provider.data ? request->provider : empty;
	key.model = request->model.data ? request->model : empty;
	return abp_cards_find(key);
}

/*
 * Find what is in force for a request.  Returns NULL, or what is missing in
 * words that go behind "no price for ".
 */
static const char *
rate_in_force(const PriceRequest *request, RateInForce *result)
{
	const UsageCounts *counts = request->counts;
	TextView	tier = abp_cards_canonical_tier(request->service_tier);
	int64		input_tokens = counts->given[COUNT_INPUT] ?
	counts->value[COUNT_INPUT] : 0;
	const TierRule *rule;

	memset(result, 0, sizeof(*result));
	result->model = requested_model(request);
	if (result->model->ntiers == 0)
		return "this model";

	/* as spelt; if that is no tier, in any case */
	for (int fold = 0;; fold++)
	{
		if (fold)
			tier = abp_cards_canonical_tier(abp_names_fold(tier));
		if (find_rate(result->model, tier, fold, request->at, input_tokens, result))
			return NULL;
		if (text_view_equal(tier, abp_standard_tier))
			return "this time";

		rule = find_rule(result->model, tier, fold);
		if (rule != NULL)
		{
			if (!find_rate(result->model, abp_standard_tier, false, request->at, input_tokens,
						   result))
				return "this time";
			result->tier_factor = &rule->multiplier;
			return NULL;
		}
		if (fold)
			return "this service tier, nor a rule";
	}
}

/* Why a request has no price, in words, palloc'd. */
static char *
unpriced_reason(const PriceRequest *request, PriceModel *model, const char *what)
{
	TextView	tier = abp_cards_canonical_tier(request->service_tier);
	const char *names = psprintf("(provider \"%.*s\", model \"%.*s\", service tier \"%.*s\")",
								 request->provider.len,
								 request->provider.data ? request->provider.data : "",
								 request->model.len,
								 request->model.data ? request->model.data : "",
								 tier.len, tier.data);
	ModelKey	key = {request->provider, request->model};
	const char *similar;

	if (model->ntiers > 0)
		return psprintf("no price for %s %s", what, names);
	if (request->model.len == 0)
		return psprintf("no price: the %s names no model: give it in column model %s",
						request->from_reply ? "reply" : "row", names);
	if (request->provider.len == 0)
		return psprintf("no price: the row names no provider: give it in column provider %s",
						names);

	similar = abp_cards_similar_name(model, key);
	if (similar == NULL)
		return psprintf("no price for %s %s", what, names);
	return psprintf("no price for %s %s; perhaps you meant %s", what, names, similar);
}

/* --- what to do about a missing price ------------------------------------- */

/*
 * Append the missing prices of the buckets as arguments of set_price: those of
 * columns, then units.  Of a card that is still to be made, input and output
 * are asked for together: one without the other would leave the next request
 * without a cost.
 */
static void
append_missing_arguments(StringInfo statement, const CostBucket *buckets, int nbuckets,
						 bool new_card)
{
	static const char *const columns[] = {
		"input", "output", "cache_read", "cache_write", "cache_write_1h", "reasoning", "request", "web_search"
	};
	StringInfoData units;
	bool		tokens = false;

	initStringInfo(&units);
	for (int i = 0; i < nbuckets; i++)
		tokens |= buckets[i].per != 1;

	for (int i = 0; i < lengthof(columns); i++)
	{
		bool		wanted = new_card && tokens && i < 2;

		/* reasoning costs what output does, unless it has its own price */
		if (new_card && strcmp(columns[i], "reasoning") == 0)
			continue;
		for (int j = 0; j < nbuckets && !wanted; j++)
			wanted = buckets[j].amount == NULL && text_view_is(buckets[j].name, columns[i]);
		if (wanted)
			appendStringInfo(statement, ", %s => ?", columns[i]);
	}

	for (int j = 0; j < nbuckets; j++)
	{
		const CostBucket *bucket = &buckets[j];
		bool		is_column = bucket->amount != NULL;

		for (int i = 0; i < lengthof(columns) && !is_column; i++)
			is_column = text_view_is(bucket->name, columns[i]);
		if (is_column)
			continue;
		appendStringInfoString(&units, units.len == 0 ? "{" : ", ");
		escape_json(&units, pnstrdup(bucket->name.data, bucket->name.len));
		appendStringInfoString(&units, ": ?");
	}
	if (units.len > 0)
		appendStringInfo(statement, ", units => %s",
						 quote_literal_cstr(psprintf("%s}", units.data)));
}

/* The time as a literal that means the same whatever DateStyle and time zone. */
static char *
time_literal(TimestampTz at)
{
	struct pg_tm tm;
	fsec_t		fsec;

	if (TIMESTAMP_IS_NOBEGIN(at))
		return pstrdup("-infinity");
	if (TIMESTAMP_IS_NOEND(at) || timestamp2tm(at, NULL, &tm, &fsec, NULL, NULL) != 0 ||
		tm.tm_year <= 0)
		return NULL;
	return psprintf("%04d-%02d-%02d %02d:%02d:%02d.%06d+00", tm.tm_year, tm.tm_mon, tm.tm_mday,
					tm.tm_hour, tm.tm_min, tm.tm_sec, (int) fsec);
}

/*
 * What to do about a request whose cost is unknown for lack of a price, in
 * whole sentences, palloc'd; NULL if nothing can be said.  The statement in it
 * leaves the figures open: nobody is to make a price up.
 *
 * It changes the card that is in force, from the request's time on.  A model
 * that has no card at all gets one for all time.
 */
char	   *
abp_price_hint(const PriceRequest *request)
{
	ModelKey	key = {request->provider, request->model};
	RateInForce in_force;
	TextView	tier = abp_cards_canonical_tier(request->service_tier);
	bool		of_tier = !text_view_equal(tier, abp_standard_tier);
	const char *what;
	PriceModel *model;
	CostBucket *buckets;
	int			nbuckets;
	StringInfoData hint;
	char	   *from;

	init_price();
	if (!abp_cost_counted(request->counts))
		return NULL;

	what = rate_in_force(request, &in_force);
	model = in_force.model;
	if (model->ntiers == 0 && request->model.len == 0)
		return pstrdup("UPDATE the row's column model. What is held is listed in aibilling.unpriced.");
	if (model->ntiers == 0 && request->provider.len == 0)
		return pstrdup("UPDATE the row's column provider. What is held is listed in aibilling.unpriced.");

	initStringInfo(&hint);
	if (model->ntiers == 0 && abp_cards_similar_name(model, key) != NULL)
		appendStringInfo(&hint, "Perhaps you meant %s: correct the row, or give the name in aibilling.model_alias. For what is new, once you know its price: ",
						 model->similar);
	else if (abp_cards_have_set_price())
		appendStringInfoString(&hint, "Once you know the price: ");
	if (!abp_cards_have_set_price())
	{
		appendStringInfoString(&hint, "ALTER EXTENSION aibilling_polar UPDATE brings aibilling.set_price(), which adds a price.");
		return hint.data;
	}

	/* A tier that a rule prices has the standard tier's prices. */
	if (of_tier && (in_force.tier_factor != NULL ||
					(what != NULL && find_rule(model, abp_cards_canonical_tier(abp_names_fold(tier)), true) != NULL)))
		of_tier = false;

	appendStringInfo(&hint, "SELECT * FROM aibilling.set_price(%s, %s",
					 quote_literal_cstr(model->ntiers > 0 ? pnstrdup(model->provider.data, model->provider.len) :
										pnstrdup(request->provider.data, request->provider.len)),
					 quote_literal_cstr(model->ntiers > 0 ? pnstrdup(model->model.data, model->model.len) :
										pnstrdup(request->model.data, request->model.len)));
	buckets = abp_cost_buckets(request->counts, in_force.rate, in_force.tier_factor, &nbuckets);
	append_missing_arguments(&hint, buckets, nbuckets, what != NULL);
	if (of_tier)
		appendStringInfo(&hint, ", service_tier => %s",
						 quote_literal_cstr(pnstrdup(tier.data, tier.len)));
	from = time_literal(model->ntiers > 0 ? request->at : DT_NOBEGIN);
	if (from != NULL)
		appendStringInfo(&hint, ", valid_from => '%s'", from);
	appendStringInfoString(&hint, "); with the figures in place of each \"?\". What is held is listed in aibilling.unpriced.");
	return hint.data;
}

/* --- entry points --------------------------------------------------------- */

/* The status as cost_status says it. */
const char *
abp_price_status_name(CostStatus status)
{
	switch (status)
	{
		case COST_PRICED:
			return "priced";
		case COST_FREE:
			return "free";
		case COST_REPORTED:
			return "reported";
		case COST_UNPRICED:
			return "unpriced";
		case COST_INCOMPLETE:
			return "incomplete";
	}
	elog(ERROR, "unrecognized cost status: %d", (int) status);
}

/*
 * Price a request.  *cost is set if the status is priced, free or reported;
 * otherwise, if missing is not NULL, *missing says why not.  Both are
 * palloc'd in the current memory context where they need memory, and nothing
 * else is.  Raises an error for counts that contradict each other and for a
 * provider_cost that is not finite.
 */
CostStatus
abp_price_cost(const PriceRequest *request, ExactCost *cost, char **missing)
{
	MemoryContext caller_context = CurrentMemoryContext;
	RateInForce in_force;
	const char *what;
	char	   *dimensions = NULL;
	bool		free = false;
	bool		known = true;
	bool		needs_memory = request->counts->units != NULL ||
	request->provider_cost != NULL;

	init_price();

	if (needs_memory)
	{
		/* An error may have left something behind. */
		MemoryContextReset(work_context);
		MemoryContextSwitchTo(work_context);
	}
	abp_cost_check(request->counts);
	if (request->provider_cost != NULL)
	{
		abp_cost_reported(request->provider_cost, cost);
		MemoryContextSwitchTo(caller_context);
		return COST_REPORTED;
	}
	if (!abp_cost_counted(request->counts))
	{
		MemoryContextSwitchTo(caller_context);
		if (missing != NULL)
			*missing = pstrdup("no count, unit or provider_cost is given");
		return COST_INCOMPLETE;
	}
	MemoryContextSwitchTo(caller_context);

	what = rate_in_force(request, &in_force);
	if (what != NULL)
	{
		if (missing != NULL)
			*missing = unpriced_reason(request, in_force.model, what);
		return COST_UNPRICED;
	}

	if (!abp_cost_fast(request->counts, in_force.rate, in_force.tier_factor,
					   cost, &free))
	{
		MemoryContextReset(work_context);
		MemoryContextSwitchTo(work_context);
		known = abp_cost_exact(request->counts, in_force.rate,
							   in_force.tier_factor, cost, &free, &dimensions);
		MemoryContextSwitchTo(caller_context);
		if (known)
		{
			Numeric		usd = palloc(VARSIZE(cost->usd_numeric));

			memcpy(usd, cost->usd_numeric, VARSIZE(cost->usd_numeric));
			cost->usd_numeric = usd;
		}
		else if (missing != NULL)
			*missing = unpriced_reason(request, in_force.model, dimensions);
	}

	if (!known)
		return COST_INCOMPLETE;
	return free ? COST_FREE : COST_PRICED;
}

/* As abp_cost_nanos(); with noerror, returns false if it does not fit. */
static bool
round_to_nanos(const ExactCost *cost, bool noerror, int64 *nanos)
{
	if (noerror)
		return abp_cost_fits_nanos(cost, nanos);
	*nanos = abp_cost_nanos(cost);
	return true;
}

/*
 * The provider and model whose cards price usage of these names, at whatever
 * time.  They point into the cache: use them before pricing anything else.
 * Returns false and changes nothing if there are no cards.
 */
bool
abp_price_find_model(TextView *provider, TextView *model)
{
	const PriceRequest request = {.provider = *provider,.model = *model};
	const PriceModel *found;

	init_price();
	found = requested_model(&request);
	if (found->ntiers == 0)
		return false;
	*provider = found->provider;
	*model = found->model;
	return true;
}

/*
 * Price a usage row: the three cost columns.  As abp_price_cost(); for an
 * amount beyond cost_nanos raises an error, or returns false with noerror.
 * cost_cents and missing are palloc'd in the current memory context.
 */
bool
abp_price_compute(const PriceRequest *request, bool noerror, PricedCost *cost)
{
	MemoryContext caller_context = CurrentMemoryContext;
	ExactCost	exact;

	cost->missing = NULL;
	cost->cost_nanos = 0;
	cost->cost_cents = NULL;
	cost->status = abp_price_cost(request, &exact, &cost->missing);
	cost->known = cost->status != COST_UNPRICED &&
		cost->status != COST_INCOMPLETE;
	if (!cost->known)
		return true;

	if (exact.usd_numeric == NULL)
	{
		cost->known = round_to_nanos(&exact, noerror, &cost->cost_nanos);
		if (cost->known)
			cost->cost_cents = abp_cost_cents(&exact);
	}
	else
	{
		Numeric		cents = NULL;
		Numeric		usd = exact.usd_numeric;

		MemoryContextReset(work_context);
		MemoryContextSwitchTo(work_context);
		cost->known = round_to_nanos(&exact, noerror, &cost->cost_nanos);
		if (cost->known)
			cents = abp_cost_cents(&exact);
		MemoryContextSwitchTo(caller_context);
		if (cost->known)
		{
			cost->cost_cents = palloc(VARSIZE(cents));
			memcpy(cost->cost_cents, cents, VARSIZE(cents));
		}
		if (usd != request->provider_cost)
			pfree(usd);
	}
	return cost->known;
}

/*
 * Does a list such as "input, output" have this name?
 */
static bool
list_has_name(const char *list, int len, TextView name)
{
	const char *end = list + len;

	while (list < end)
	{
		const char *comma = memchr(list, ',', end - list);
		int			item = (comma != NULL ? comma : end) - list;

		if (item == name.len && memcmp(list, name.data, item) == 0)
			return true;
		list += item;
		while (list < end && (*list == ',' || *list == ' '))
			list++;
	}
	return false;
}

/*
 * What the note of a card says of one bucket.  Remarks of imports that name
 * the prices they are about ("as input: cache_read, cache_write") are shown
 * for these only, the rest of the note for all.  palloc'd; NULL if it says
 * nothing.
 */
static const char *
note_of_bucket(const char *note, TextView bucket)
{
	static const char *const of_some[] = {"as ", "twice ", "free beside ", "half of standard"};
	StringInfoData shown;

	if (note == NULL)
		return NULL;

	initStringInfo(&shown);
	for (const char *remark = note, *next; remark != NULL; remark = next)
	{
		const char *separator = strstr(remark, "; ");
		int			len = separator != NULL ? separator - remark : strlen(remark);
		const char *colon = NULL;

		next = separator != NULL ? separator + 2 : NULL;
		for (int i = 0; i < lengthof(of_some) && colon == NULL; i++)
		{
			if (strncmp(remark, of_some[i], strlen(of_some[i])) == 0)
				colon = memchr(remark, ':', len);
		}
		if (colon != NULL)
		{
			if (!list_has_name(colon + 2, remark + len - colon - 2, bucket))
				continue;
			len = colon - remark;
		}
		appendStringInfo(&shown, "%s%.*s", shown.len > 0 ? "; " : "", len, remark);
	}
	return shown.len > 0 ? shown.data : NULL;
}

/*
 * Price a request and say how.  The buckets' amounts add up to the exact
 * cost; a bucket without a price has none.  Texts point into the cache, so
 * use them before pricing anything else; the rest is palloc'd in the current
 * memory context.
 */
void
abp_price_explain(const PriceRequest *request, PriceExplanation *explanation)
{
	RateInForce in_force;
	const char *what;
	ExactCost	cost;
	char	   *hint = NULL;
	bool		unknown;

	memset(explanation, 0, sizeof(*explanation));
	explanation->status = abp_price_cost(request, &cost, &explanation->missing);

	if (explanation->status == COST_REPORTED)
	{
		CostBucket *bucket = palloc0(sizeof(CostBucket));

		bucket->name.data = "provider_cost";
		bucket->name.len = strlen(bucket->name.data);
		bucket->quantity = int64_to_numeric(1);
		bucket->price = abp_cost_usd(&cost);
		bucket->per = 1;
		bucket->factor = int64_to_numeric(1);
		bucket->amount = bucket->price;
		bucket->note = "as the provider reported it";
		explanation->buckets = bucket;
		explanation->nbuckets = 1;
		return;
	}

	if (explanation->missing != NULL)
		hint = abp_price_hint(request);
	what = rate_in_force(request, &in_force);
	explanation->buckets = abp_cost_buckets(request->counts, in_force.rate,
											in_force.tier_factor,
											&explanation->nbuckets);

	/* Nothing counted adds up to an unknown cost, not to none. */
	unknown = what != NULL || !abp_cost_counted(request->counts);
	for (int i = 0; i < explanation->nbuckets; i++)
	{
		CostBucket *bucket = &explanation->buckets[i];

		if (unknown)
		{
			bucket->amount = NULL;
			bucket->note = explanation->missing;
		}
		else
		{
			const char *own = bucket->amount == NULL ? "no price" : bucket->note;
			const char *of_card = note_of_bucket(in_force.window->notes[in_force.rate - in_force.window->rates],
												 bucket->name);

			bucket->note = own == NULL ? of_card : of_card == NULL ? own : psprintf("%s; %s", own, of_card);
		}

		/* What to do is said once. */
		if (bucket->amount == NULL && hint != NULL)
		{
			bucket->note = psprintf("%s. %s", bucket->note, hint);
			hint = NULL;
		}
	}
	if (what != NULL)
		return;

	explanation->provider = in_force.model->provider;
	explanation->model = in_force.model->model;
	explanation->service_tier = in_force.tier->name;
	explanation->source = in_force.card->source;
	explanation->valid_from = in_force.card->valid_from;
	explanation->has_window = !in_force.window->all_day;
	explanation->daily_from = in_force.window->from;
	explanation->daily_to = in_force.window->to;
	explanation->context_above = in_force.rate->context_above;
}
