/*-------------------------------------------------------------------------
 *
 * cost.c
 *	  Counts times prices: the exact cost of one AI call.
 *
 * A price is numeric(18,9) USD per million tokens, so as an integer times
 * 10^-9 it is a whole number of 10^-15 USD per token.  Products and sums of
 * such integers are exact in 128 bits; abp_cost_fast() computes most rows
 * that way.  What does not fit, and every row with units, goes through
 * numeric, in abp_cost_buckets().  Neither divides: a division by a power of
 * ten only moves the scale.  The one rounding, half away from zero, is in
 * abp_cost_nanos() and abp_cost_cents().
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "lib/stringinfo.h"
#include "miscadmin.h"
#include "utils/builtins.h"

#include "base/decimal.h"
#include "base/numeric_math.h"
#include "base/text_view.h"
#include "base/usage_row.h"
#include "compat.h"
#include "price/cost.h"

#ifndef HAVE_INT128
#error "aibilling_polar needs a compiler with 128-bit integers"
#endif

#define TOKENS_PER 1000000
#define TOKENS_PER_SCALE 6
#define NANOS_SCALE 9
#define CENTS_SCALE 2
#define CENTS_ROUNDED_SCALE 12

/* How many prices that are missing are named. */
#define MAX_MISSING_NAMES 10

static const int64 powers_of_ten[] = {
	INT64CONST(1),
	INT64CONST(10),
	INT64CONST(100),
	INT64CONST(1000),
	INT64CONST(10000),
	INT64CONST(100000),
	INT64CONST(1000000),
	INT64CONST(10000000),
	INT64CONST(100000000),
	INT64CONST(1000000000),
	INT64CONST(10000000000),
	INT64CONST(100000000000),
	INT64CONST(1000000000000),
	INT64CONST(10000000000000),
	INT64CONST(100000000000000),
	INT64CONST(1000000000000000),
	INT64CONST(10000000000000000),
	INT64CONST(100000000000000000),
	INT64CONST(1000000000000000000)
};

#define MAX_INT64_POWER 18

/* The columns' names, by UsageCount. */
static const char *const count_names[NUM_USAGE_COUNTS] = {
	"input_tokens",
	"cache_read_tokens",
	"cache_write_tokens",
	"cache_write_1h_tokens",
	"output_tokens",
	"reasoning_tokens",
	"request_count",
	"web_search_count"
};

/* The names of the disjoint buckets, by PriceKind: the price table's columns. */
static const char *const bucket_names[NUM_PRICES] = {
	"input",
	"cache_read",
	"cache_write",
	"cache_write_1h",
	"output",
	"reasoning",
	"request",
	"web_search"
};

/* Keys of units that count tokens; every other key is counted each. */
typedef enum TokenUnit
{
	UNIT_INPUT_AUDIO,
	UNIT_INPUT_IMAGE,
	UNIT_CACHE_READ_AUDIO,
	UNIT_OUTPUT_AUDIO,
	UNIT_OUTPUT_IMAGE,
	UNIT_OUTPUT_VIDEO,
	UNIT_CITATION
} TokenUnit;

#define NUM_TOKEN_UNITS (UNIT_CITATION + 1)

static const char *const token_unit_names[NUM_TOKEN_UNITS] = {
	"input_audio_tokens",
	"input_image_tokens",
	"cache_read_audio_tokens",
	"output_audio_tokens",
	"output_image_tokens",
	"output_video_tokens",
	"citation_tokens"
};

typedef struct UnitQuantity
{
	TextView	name;
	int			token_unit;		/* a TokenUnit, or -1 */
	Numeric		quantity;
} UnitQuantity;

/* The units of a row, read out of their jsonb. */
typedef struct UnitQuantities
{
	int			nunits;
	UnitQuantity *units;
	Numeric		tokens[NUM_TOKEN_UNITS];	/* NULL: not given */
} UnitQuantities;

/* --- decimals ------------------------------------------------------------- */

/* The same value with the fewest digits. */
static ExactDecimal
decimal_reduced(ExactDecimal value)
{
	if (value.digits == 0)
		value.scale = 0;

	if (value.digits > PG_INT64_MAX || value.digits < PG_INT64_MIN)
	{
		while (value.scale > 0 && value.digits % 10 == 0)
		{
			value.digits /= 10;
			value.scale--;
		}
	}
	else
	{
		int64		digits = (int64) value.digits;

		while (value.scale > 0 && digits % 10 == 0)
		{
			digits /= 10;
			value.scale--;
		}
		value.digits = digits;
	}

	return value;
}

/*
 * The product of two decimals, in its fewest digits.  The caller sees to it
 * that the digits' product fits 128 bits.
 */
ExactDecimal
abp_exact_multiply(ExactDecimal a, ExactDecimal b)
{
	ExactDecimal product;

	product.digits = a.digits * b.digits;
	product.scale = a.scale + b.scale;
	return decimal_reduced(product);
}

/* A decimal as numeric, without trailing zeros; palloc'd. */
Numeric
abp_exact_to_numeric(ExactDecimal value)
{
	value = decimal_reduced(value);
	return abp_decimal_numeric(value.digits, value.scale);
}

/*
 * digits / 10^power, rounded half away from zero.  digits >= 0, power < 38.
 */
static int128
divide_rounded(int128 digits, int power)
{
	int128		divisor;
	int128		quotient;
	int128		remainder;

	if (power <= 0)
		return digits;

	if (power <= MAX_INT64_POWER)
	{
		int64		small_divisor = powers_of_ten[power];

		/* Nearly every row: a division that the machine has. */
		if (digits <= PG_INT64_MAX)
		{
			int64		small_quotient = (int64) digits / small_divisor;
			int64		small_remainder = (int64) digits % small_divisor;

			return small_quotient +
				(small_remainder >= small_divisor - small_remainder);
		}
		divisor = small_divisor;
	}
	else
		divisor = (int128) powers_of_ten[MAX_INT64_POWER] *
			powers_of_ten[Min(power - MAX_INT64_POWER, MAX_INT64_POWER)];

	if (power > 2 * MAX_INT64_POWER)
		divisor *= powers_of_ten[power - 2 * MAX_INT64_POWER];

	quotient = digits / divisor;
	remainder = digits % divisor;
	return quotient + (remainder >= divisor - remainder);
}

/* --- counts --------------------------------------------------------------- */

/* A count as it is billed: NULL is 0, but a row is one request. */
static inline int64
count_value(const UsageCounts *counts, UsageCount count)
{
	return counts->value[count] +
		(count == COUNT_REQUEST && !counts->given[count] ? 1 : 0);
}

/*
 * Read units, a jsonb object of non-negative numbers; null is a quantity that
 * is not given.  Returns false, and what is wrong, for anything else.  Names
 * point into the jsonb.
 */
static bool
read_units(const UsageCounts *counts, UnitQuantities *result, CountsProblem *problem)
{
	JsonbIterator *it;
	JsonbIteratorToken token;
	JsonbValue	v;

	memset(result, 0, sizeof(*result));
	if (counts->units == NULL)
		return true;

	if (!JB_ROOT_IS_OBJECT(counts->units))
	{
		problem->message = pstrdup("units must be a JSON object");
		problem->hint = "Write quantities by name, as in {\"image\": 2}.";
		return false;
	}

	result->units = palloc(sizeof(UnitQuantity) *
						   Max(JB_ROOT_COUNT(counts->units), 1));

	it = JsonbIteratorInit(&counts->units->root);
	while ((token = JsonbIteratorNext(&it, &v, true)) != WJB_DONE)
	{
		UnitQuantity *unit;

		if (token != WJB_KEY)
			continue;

		unit = &result->units[result->nunits];
		unit->name.data = v.val.string.val;
		unit->name.len = v.val.string.len;

		(void) JsonbIteratorNext(&it, &v, true);
		if (v.type == jbvNull)
			continue;
		if (v.type != jbvNumeric)
		{
			problem->message = psprintf("unit \"%.*s\" must be a number",
										unit->name.len, unit->name.data);
			return false;
		}
		unit->quantity = v.val.numeric;
		if (numeric_signum(unit->quantity) < 0)
		{
			problem->message = psprintf("unit \"%.*s\" must not be negative, but is %s",
										unit->name.len, unit->name.data,
										numeric_text(unit->quantity));
			return false;
		}

		unit->token_unit = -1;
		for (int i = 0; i < NUM_TOKEN_UNITS; i++)
		{
			if (text_view_is(unit->name, token_unit_names[i]))
			{
				unit->token_unit = i;
				result->tokens[i] = unit->quantity;
			}
		}
		result->nunits++;
	}
	return true;
}

/* Read the units of counts that are consistent. */
static void
read_checked_units(const UsageCounts *counts, UnitQuantities *result)
{
	CountsProblem problem = {NULL};

	if (!read_units(counts, result, &problem))
		elog(ERROR, "unexpected units: %s", problem.message);
}

/*
 * Say that subsets exceed their total, and list those that are there, columns
 * first.  Returns false.
 */
static bool
subsets_exceed(CountsProblem *problem,
			   const UsageCounts *counts, const UnitQuantities *units,
			   UsageCount total, UsageCount first, UsageCount last,
			   TokenUnit first_unit, TokenUnit last_unit)
{
	StringInfoData subsets;

	initStringInfo(&subsets);
	for (int i = first; i <= last; i++)
	{
		if (count_value(counts, i) > 0)
			appendStringInfo(&subsets, "%s%s = " INT64_FORMAT,
							 subsets.len > 0 ? ", " : "",
							 count_names[i], count_value(counts, i));
	}
	for (int i = first_unit; i <= last_unit; i++)
	{
		if (units->tokens[i] != NULL)
			appendStringInfo(&subsets, "%s%s = %s",
							 subsets.len > 0 ? ", " : "",
							 token_unit_names[i],
							 numeric_text(units->tokens[i]));
	}

	problem->message = psprintf("%s must include its parts, but is " INT64_FORMAT " with %s",
								count_names[total], count_value(counts, total),
								subsets.data);
	problem->hint = total == COUNT_INPUT ?
		"input_tokens counts all prompt tokens, cached ones included." :
		"output_tokens counts all completion tokens, reasoning included.";
	return false;
}

/* Does the count or unit that one unit is part of include it? */
static bool
includes_unit(CountsProblem *problem, const UnitQuantities *units, TokenUnit part,
			  const char *whole_name, Numeric whole)
{
	if (units->tokens[part] == NULL ||
		numeric_compare(units->tokens[part], whole) <= 0)
		return true;

	problem->message = psprintf("%s must include %s, but is %s with %s",
								whole_name, token_unit_names[part],
								numeric_text(whole), numeric_text(units->tokens[part]));
	return false;
}

/*
 * The tokens of one direction that no subset claims: total - subsets.  What
 * is both cached and audio is in two subsets and counted once.
 */
static Numeric
remaining_tokens(const UsageCounts *counts, const UnitQuantities *units,
				 UsageCount total, UsageCount first, UsageCount last,
				 TokenUnit first_unit, TokenUnit last_unit)
{
	Numeric		rest = int64_to_numeric(count_value(counts, total));

	for (int i = first; i <= last; i++)
		rest = numeric_minus(rest, int64_to_numeric(count_value(counts, i)));
	for (int i = first_unit; i <= last_unit; i++)
	{
		if (units->tokens[i] != NULL)
			rest = numeric_minus(rest, units->tokens[i]);
	}
	if (total == COUNT_INPUT && units->tokens[UNIT_CACHE_READ_AUDIO] != NULL)
		rest = numeric_plus(rest, units->tokens[UNIT_CACHE_READ_AUDIO]);

	return rest;
}

#define REMAINING_INPUT \
	COUNT_INPUT, COUNT_CACHE_READ, COUNT_CACHE_WRITE_1H, \
	UNIT_INPUT_AUDIO, UNIT_INPUT_IMAGE
#define REMAINING_OUTPUT \
	COUNT_OUTPUT, COUNT_REASONING, COUNT_REASONING, \
	UNIT_OUTPUT_AUDIO, UNIT_OUTPUT_VIDEO

/* What was read from caches and written to them; the sum may exceed int64. */
static inline int128
cached_tokens(const UsageCounts *counts)
{
	return (int128) count_value(counts, COUNT_CACHE_READ) +
		count_value(counts, COUNT_CACHE_WRITE) +
		count_value(counts, COUNT_CACHE_WRITE_1H);
}

/*
 * Can these counts be those of one request: none is negative, and no subset
 * exceeds its total?  If not, *problem says so, naming columns and numbers.
 * Allocates, in the current memory context, only if there are units or a
 * problem.
 */
bool
abp_cost_consistent(const UsageCounts *counts, CountsProblem *problem)
{
	UnitQuantities units;
	Numeric		zero;
	int64		signs = 0;

	problem->message = NULL;
	problem->hint = NULL;

	for (int i = 0; i < NUM_USAGE_COUNTS; i++)
		signs |= counts->value[i];

	if (signs >= 0 && counts->units == NULL &&
		cached_tokens(counts) <= count_value(counts, COUNT_INPUT) &&
		count_value(counts, COUNT_REASONING) <= count_value(counts, COUNT_OUTPUT))
		return true;

	for (int i = 0; i < NUM_USAGE_COUNTS; i++)
	{
		if (count_value(counts, i) < 0)
		{
			problem->message = psprintf("%s must not be negative, but is " INT64_FORMAT,
										count_names[i], count_value(counts, i));
			return false;
		}
	}

	if (!read_units(counts, &units, problem))
		return false;

	if (cached_tokens(counts) > count_value(counts, COUNT_INPUT))
		return subsets_exceed(problem, counts, &units, REMAINING_INPUT);
	if (count_value(counts, COUNT_REASONING) > count_value(counts, COUNT_OUTPUT))
		return subsets_exceed(problem, counts, &units, REMAINING_OUTPUT);

	if (units.nunits == 0)
		return true;

	zero = int64_to_numeric(0);
	if (!includes_unit(problem, &units, UNIT_CACHE_READ_AUDIO,
					   count_names[COUNT_CACHE_READ],
					   int64_to_numeric(count_value(counts, COUNT_CACHE_READ))) ||
		!includes_unit(problem, &units, UNIT_CACHE_READ_AUDIO,
					   token_unit_names[UNIT_INPUT_AUDIO],
					   units.tokens[UNIT_INPUT_AUDIO] ?
					   units.tokens[UNIT_INPUT_AUDIO] : zero))
		return false;
	if (numeric_signum(remaining_tokens(counts, &units, REMAINING_INPUT)) < 0)
		return subsets_exceed(problem, counts, &units, REMAINING_INPUT);
	if (numeric_signum(remaining_tokens(counts, &units, REMAINING_OUTPUT)) < 0)
		return subsets_exceed(problem, counts, &units, REMAINING_OUTPUT);
	return true;
}

/* As abp_cost_consistent(), but raises an error if they are not. */
void
abp_cost_check(const UsageCounts *counts)
{
	CountsProblem problem;

	if (!abp_cost_consistent(counts, &problem))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg_internal("%s", problem.message),
				 problem.hint != NULL ? errhint("%s", problem.hint) : 0));
}

/*
 * Is there anything to price: a count that is not NULL, or a unit?
 */
bool
abp_cost_counted(const UsageCounts *counts)
{
	for (int i = 0; i < NUM_USAGE_COUNTS; i++)
	{
		if (counts->given[i])
			return true;
	}

	if (counts->units != NULL)
	{
		UnitQuantities units;

		read_checked_units(counts, &units);
		return units.nunits > 0;
	}
	return false;
}

/* --- counts times prices -------------------------------------------------- */

/*
 * Cost of checked counts in 128-bit integers, without allocating.  tier is
 * the factor of a service tier without a card of its own, or NULL.  *free
 * tells whether prices were used and all of them are 0.
 *
 * Returns false if the row needs abp_cost_exact(): it has units, a price is
 * missing, or the numbers are too large.
 */
bool
abp_cost_fast(const UsageCounts *counts, const Rate *rate,
			  const ExactDecimal *tier, ExactCost *cost, bool *free)
{
	int64		quantity[NUM_PRICES];
	int128		tokens;
	int128		each;
	int128		sum;
	int			scale = PRICE_SCALE + TOKENS_PER_SCALE;
	int64		unpriced = 0;

	if (counts->units != NULL)
		return false;

	quantity[PRICE_CACHE_READ] = count_value(counts, COUNT_CACHE_READ);
	quantity[PRICE_CACHE_WRITE] = count_value(counts, COUNT_CACHE_WRITE);
	quantity[PRICE_CACHE_WRITE_1H] = count_value(counts, COUNT_CACHE_WRITE_1H);
	quantity[PRICE_INPUT] = count_value(counts, COUNT_INPUT) -
		quantity[PRICE_CACHE_READ] - quantity[PRICE_CACHE_WRITE] -
		quantity[PRICE_CACHE_WRITE_1H];
	quantity[PRICE_REASONING] = count_value(counts, COUNT_REASONING);
	quantity[PRICE_OUTPUT] = count_value(counts, COUNT_OUTPUT) -
		quantity[PRICE_REASONING];
	quantity[PRICE_REQUEST] = count_value(counts, COUNT_REQUEST);
	quantity[PRICE_WEB_SEARCH] = count_value(counts, COUNT_WEB_SEARCH);

	/* What has no price; a request need not have one. */
	for (int i = 0; i < NUM_PRICES; i++)
	{
		if (!rate->known[i] && i != PRICE_REQUEST)
			unpriced |= quantity[i];
	}
	if (unpriced != 0)
		return false;

	/*
	 * A price is below 10^18.  Quantities of one direction add up to less
	 * than 2^63, so the two directions' sum stays below 2^124.
	 *
	 * No product is left out because its quantity is 0: which are differs
	 * from row to row, and a branch guessed wrong costs more than all of
	 * them.
	 */
#define PRODUCT(kind) ((int128) quantity[kind] * rate->price[kind])
	tokens = PRODUCT(PRICE_INPUT) + PRODUCT(PRICE_CACHE_READ) +
		PRODUCT(PRICE_CACHE_WRITE) + PRODUCT(PRICE_CACHE_WRITE_1H) +
		PRODUCT(PRICE_OUTPUT) + PRODUCT(PRICE_REASONING);
	each = PRODUCT(PRICE_REQUEST) + PRODUCT(PRICE_WEB_SEARCH);
#undef PRODUCT

	*free = false;
	if (tokens == 0 && each == 0)
	{
		for (int i = 0; i < NUM_PRICES; i++)
			*free |= rate->known[i] && quantity[i] != 0;
	}

	/*
	 * Two factors below 2^63 make a product below 2^126: testing the factors
	 * is all the overflow check there need be.
	 */
	sum = tokens;
	if (tier != NULL)
	{
		if (tokens > PG_INT64_MAX || tier->digits > PG_INT64_MAX)
			return false;
		sum *= tier->digits;
		scale += tier->scale;
	}
	if (each > 0)
	{
		/* tier->scale is at most PRICE_SCALE, so this power is at most 15 */
		if (each > PG_INT64_MAX)
			return false;
		sum += each * powers_of_ten[scale - PRICE_SCALE];
	}
	if (rate->factor.digits != 1 || rate->factor.scale != 0)
	{
		if (sum > PG_INT64_MAX || rate->factor.digits > PG_INT64_MAX)
			return false;
		sum *= rate->factor.digits;
		scale += rate->factor.scale;
	}

	cost->usd.digits = sum;
	cost->usd.scale = scale;
	cost->usd_numeric = NULL;
	return true;
}

/* The order of names in a rate's units: as jsonb has them, the shorter first. */
int
abp_cost_compare_unit_prices(const void *a, const void *b)
{
	TextView	x = ((const UnitPrice *) a)->name;
	TextView	y = ((const UnitPrice *) b)->name;

	if (x.len != y.len)
		return x.len < y.len ? -1 : 1;
	return memcmp(x.data, y.data, x.len);
}

/* The price of a unit among nunits of them, in order; NULL if there is none. */
const UnitPrice *
abp_cost_find_unit_price(const UnitPrice *units, int nunits, TextView name)
{
	UnitPrice	key = {.name = name};

	if (nunits == 0)
		return NULL;
	return bsearch(&key, units, nunits, sizeof(UnitPrice), abp_cost_compare_unit_prices);
}

/* Fill in a bucket's amount from its quantity and price. */
static void
price_bucket(CostBucket *bucket, bool tokens, const Rate *rate,
			 const ExactDecimal *tier)
{
	const ExactDecimal per_token = {1, TOKENS_PER_SCALE};
	Numeric		factor = abp_exact_to_numeric(rate->factor);

	if (tokens && tier != NULL)
		factor = numeric_trimmed(numeric_times(factor,
											   abp_exact_to_numeric(*tier)));

	bucket->per = tokens ? TOKENS_PER : 1;
	bucket->factor = factor;
	bucket->amount = NULL;
	bucket->note = NULL;

	if (bucket->price != NULL)
	{
		Numeric		amount = numeric_times(bucket->quantity, bucket->price);

		/* A product by 10^-6 is exact where a quotient by 10^6 might not be. */
		if (tokens)
			amount = numeric_times(amount, abp_exact_to_numeric(per_token));
		bucket->amount = numeric_trimmed(numeric_times(amount, factor));
	}
}

/*
 * The disjoint buckets of checked counts that are not empty, each with its
 * quantity, price, factor and exact amount in USD.  At least one bucket is
 * returned.  rate may be NULL: nothing has a price then.  Allocates in the
 * current memory context.
 */
CostBucket *
abp_cost_buckets(const UsageCounts *counts, const Rate *rate,
				 const ExactDecimal *tier, int *nbuckets)
{
	static const Rate no_rate = {.factor = {1, 0}};
	UnitQuantities units;
	Numeric		quantity[NUM_PRICES];
	CostBucket *buckets;
	int			n = 0;

	if (rate == NULL)
		rate = &no_rate;

	read_checked_units(counts, &units);
	buckets = palloc(sizeof(CostBucket) * (NUM_PRICES + units.nunits));

	quantity[PRICE_INPUT] = remaining_tokens(counts, &units, REMAINING_INPUT);
	quantity[PRICE_CACHE_READ] =
		int64_to_numeric(count_value(counts, COUNT_CACHE_READ));
	if (units.tokens[UNIT_CACHE_READ_AUDIO] != NULL)
		quantity[PRICE_CACHE_READ] =
			numeric_minus(quantity[PRICE_CACHE_READ],
						  units.tokens[UNIT_CACHE_READ_AUDIO]);
	quantity[PRICE_CACHE_WRITE] =
		int64_to_numeric(count_value(counts, COUNT_CACHE_WRITE));
	quantity[PRICE_CACHE_WRITE_1H] =
		int64_to_numeric(count_value(counts, COUNT_CACHE_WRITE_1H));
	quantity[PRICE_OUTPUT] = remaining_tokens(counts, &units, REMAINING_OUTPUT);
	quantity[PRICE_REASONING] =
		int64_to_numeric(count_value(counts, COUNT_REASONING));
	quantity[PRICE_REQUEST] =
		int64_to_numeric(count_value(counts, COUNT_REQUEST));
	quantity[PRICE_WEB_SEARCH] =
		int64_to_numeric(count_value(counts, COUNT_WEB_SEARCH));

	for (int i = 0; i < NUM_PRICES; i++)
	{
		CostBucket *bucket = &buckets[n];

		if (numeric_signum(quantity[i]) == 0)
			continue;
		if (i == PRICE_REQUEST && !rate->known[i])
			continue;

		bucket->name.data = bucket_names[i];
		bucket->name.len = strlen(bucket_names[i]);
		bucket->quantity = quantity[i];
		bucket->price = NULL;
		if (rate->known[i])
		{
			ExactDecimal price = {rate->price[i], PRICE_SCALE};

			bucket->price = abp_exact_to_numeric(price);
		}
		price_bucket(bucket, i < NUM_TOKEN_PRICES, rate, tier);
		n++;
	}

	for (int i = 0; i < units.nunits; i++)
	{
		const UnitQuantity *unit = &units.units[i];
		const UnitPrice *unit_price = abp_cost_find_unit_price(rate->units, rate->nunits, unit->name);
		CostBucket *bucket = &buckets[n];

		CHECK_FOR_INTERRUPTS();
		bucket->name = unit->name;
		bucket->quantity = unit->quantity;
		/* The cached part of audio is a bucket of its own. */
		if (unit->token_unit == UNIT_INPUT_AUDIO &&
			units.tokens[UNIT_CACHE_READ_AUDIO] != NULL)
			bucket->quantity = numeric_minus(bucket->quantity,
											 units.tokens[UNIT_CACHE_READ_AUDIO]);
		if (numeric_signum(bucket->quantity) == 0)
			continue;
		bucket->price = unit_price ? unit_price->price : NULL;
		price_bucket(bucket, unit->token_unit >= 0, rate, tier);
		n++;
	}

	/* An explanation adds up to the cost, so there must be something to add. */
	if (n == 0)
	{
		CostBucket *bucket = &buckets[n++];

		bucket->name.data = bucket_names[PRICE_REQUEST];
		bucket->name.len = strlen(bucket_names[PRICE_REQUEST]);
		bucket->quantity = quantity[PRICE_REQUEST];
		bucket->price = NULL;
		price_bucket(bucket, false, rate, tier);
		bucket->amount = int64_to_numeric(0);
		bucket->note = "no fee per request";
	}

	*nbuckets = n;
	return buckets;
}

/*
 * A row keeps the cost that it was stored with, in cents rounded to 12
 * decimals.  If the buckets, by prices that have been corrected since, make
 * another one, add a bucket with the difference: their amounts always add up
 * to what was billed.  Allocates in the current memory context.
 */
void
abp_cost_add_difference(CostBucket **buckets, int *nbuckets, Numeric stored_cents)
{
	const ExactDecimal cent = {1, CENTS_SCALE};
	Numeric		hundred = int64_to_numeric(100);
	Numeric		sum = int64_to_numeric(0);
	bool		complete = true;
	CostBucket *bucket;

	for (int i = 0; i < *nbuckets; i++)
	{
		if ((*buckets)[i].amount == NULL)
			complete = false;
		else
			sum = numeric_plus(sum, (*buckets)[i].amount);
	}
	if (complete &&
		numeric_compare(numeric_rounded(numeric_times(sum, hundred), CENTS_ROUNDED_SCALE),
						stored_cents) == 0)
		return;

	*buckets = repalloc(*buckets, (*nbuckets + 1) * sizeof(CostBucket));
	bucket = &(*buckets)[(*nbuckets)++];
	bucket->name.data = "difference";
	bucket->name.len = strlen(bucket->name.data);
	bucket->quantity = int64_to_numeric(1);
	bucket->price = numeric_trimmed(numeric_minus(numeric_times(stored_cents,
																abp_exact_to_numeric(cent)),
												  sum));
	bucket->per = 1;
	bucket->factor = int64_to_numeric(1);
	bucket->amount = bucket->price;
	bucket->note = "the row was priced by other prices than those of now";
}

/*
 * Cost of checked counts in numeric.  Returns false if a price is missing;
 * then *missing names the first buckets without one.  Allocates in the current
 * memory context, intermediate results too.
 */
bool
abp_cost_exact(const UsageCounts *counts, const Rate *rate,
			   const ExactDecimal *tier, ExactCost *cost, bool *free,
			   char **missing)
{
	int			nbuckets;
	CostBucket *buckets = abp_cost_buckets(counts, rate, tier, &nbuckets);
	Numeric		usd = int64_to_numeric(0);
	StringInfoData names;
	int			nmissing = 0;
	bool		used = false;
	bool		charged = false;

	initStringInfo(&names);
	for (int i = 0; i < nbuckets; i++)
	{
		const CostBucket *bucket = &buckets[i];

		if (bucket->amount == NULL)
		{
			if (nmissing++ < MAX_MISSING_NAMES)
			{
				if (names.len > 0)
					appendStringInfoString(&names, ", ");
				appendBinaryStringInfo(&names, bucket->name.data, bucket->name.len);
			}
			continue;
		}
		usd = numeric_plus(usd, bucket->amount);
		if (bucket->price != NULL)
		{
			used = true;
			charged |= numeric_signum(bucket->price) > 0;
		}
	}

	if (nmissing > 0)
	{
		if (nmissing > MAX_MISSING_NAMES)
			appendStringInfo(&names, " and %d more", nmissing - MAX_MISSING_NAMES);
		*missing = names.data;
		return false;
	}

	cost->usd_numeric = numeric_trimmed(usd);
	*free = used && !charged;
	return true;
}

/* Is this an amount?  If not, *problem says so, palloc'd. */
bool
abp_cost_finite(Numeric provider_cost, char **problem)
{
	if (!numeric_is_nan(provider_cost) && !numeric_is_inf(provider_cost))
		return true;
	*problem = psprintf("provider_cost must be a finite number, but is %s",
						numeric_text(provider_cost));
	return false;
}

/*
 * The cost that the provider reported, in USD; it may be negative.  NaN and
 * infinity are errors.
 */
void
abp_cost_reported(Numeric provider_cost, ExactCost *cost)
{
	char	   *problem;

	if (!abp_cost_finite(provider_cost, &problem))
		ereport(ERROR,
				(errcode(ERRCODE_NUMERIC_VALUE_OUT_OF_RANGE),
				 errmsg_internal("%s", problem)));

	cost->usd_numeric = provider_cost;
}

/* --- the one rounding ----------------------------------------------------- */

/*
 * USD x 10^9, rounded once, half away from zero.  Returns false if that does
 * not fit bigint.
 */
bool
abp_cost_fits_nanos(const ExactCost *cost, int64 *result)
{
	if (cost->usd_numeric == NULL)
	{
		int128		nanos = divide_rounded(cost->usd.digits,
										   cost->usd.scale - NANOS_SCALE);

		*result = (int64) nanos;
		return nanos <= PG_INT64_MAX;
	}
	else
	{
		Numeric		nanos;

		nanos = numeric_times(cost->usd_numeric,
							  int64_to_numeric(powers_of_ten[NANOS_SCALE]));
		nanos = numeric_rounded(nanos, 0);
		if (numeric_compare(nanos, int64_to_numeric(PG_INT64_MAX)) > 0 ||
			numeric_compare(nanos, int64_to_numeric(PG_INT64_MIN)) < 0)
			return false;
		*result = numeric_as_int64(nanos);
		return true;
	}
}

/* As abp_cost_fits_nanos(), but raises an error if it does not fit. */
int64
abp_cost_nanos(const ExactCost *cost)
{
	int64		nanos;

	if (!abp_cost_fits_nanos(cost, &nanos))
		ereport(ERROR,
				(errcode(ERRCODE_NUMERIC_VALUE_OUT_OF_RANGE),
				 errmsg("cost_nanos out of range for type bigint"),
				 errdetail("The cost is %s USD.", numeric_text(abp_cost_usd(cost)))));
	return nanos;
}

/* The exact cost in USD, without trailing zeros; palloc'd. */
Numeric
abp_cost_usd(const ExactCost *cost)
{
	return cost->usd_numeric != NULL ?
		numeric_trimmed(cost->usd_numeric) : abp_exact_to_numeric(cost->usd);
}

/*
 * The exact cost in cents, rounded once to 12 decimals, half away from zero,
 * without trailing zeros; palloc'd.
 */
Numeric
abp_cost_cents(const ExactCost *cost)
{
	if (cost->usd_numeric == NULL)
	{
		ExactDecimal cents = {cost->usd.digits, cost->usd.scale - CENTS_SCALE};

		cents.digits = divide_rounded(cents.digits,
									  cents.scale - CENTS_ROUNDED_SCALE);
		cents.scale = Min(cents.scale, CENTS_ROUNDED_SCALE);
		return abp_exact_to_numeric(cents);
	}
	return numeric_trimmed(numeric_rounded(abp_cost_cents_exact(cost),
										   CENTS_ROUNDED_SCALE));
}

/* The exact cost in cents, not rounded, without trailing zeros; palloc'd. */
Numeric
abp_cost_cents_exact(const ExactCost *cost)
{
	return numeric_trimmed(numeric_times(abp_cost_usd(cost),
										 int64_to_numeric(powers_of_ten[CENTS_SCALE])));
}

/* How many of a unit's decimals make one USD: 10^result, or an error. */
static int
unit_scale(TextView unit)
{
	static const struct
	{
		const char *name;
		int			scale;
	}			scales[] = {
		{"base", 0},
		{"cents", CENTS_SCALE},
		{"micros", 6},
		{"nanos", NANOS_SCALE}
	};

	for (int i = 0; i < lengthof(scales); i++)
	{
		if (text_view_is(unit, scales[i].name))
			return scales[i].scale;
	}

	ereport(ERROR,
			(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
			 errmsg("unknown unit of cost \"%.*s\"", unit.len, unit.data),
			 errhint("Units are base, cents, micros and nanos.")));
	return 0;					/* keep compiler quiet */
}

/*
 * An amount of money from one unit to another, exact: never rounded, however
 * many decimals that takes.  NaN and infinity are errors.
 */
Numeric
abp_cost_convert(Numeric amount, TextView from, TextView to)
{
	int			shift = unit_scale(to) - unit_scale(from);
	ExactDecimal factor = {1, 0};

	if (numeric_is_nan(amount) || numeric_is_inf(amount))
		ereport(ERROR,
				(errcode(ERRCODE_NUMERIC_VALUE_OUT_OF_RANGE),
				 errmsg("amount must be a finite number, but is %s",
						numeric_text(amount))));

	if (shift >= 0)
		factor.digits = powers_of_ten[shift];
	else
		factor.scale = -shift;

	return numeric_trimmed(numeric_times(amount,
										 abp_exact_to_numeric(factor)));
}
