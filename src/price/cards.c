/*-------------------------------------------------------------------------
 *
 * cards.c
 *	  The price cards of models, read from the tables and kept while they hold.
 *
 * Each backend keeps what it has read in a hash table keyed by the bytes of
 * (provider, model): the model that these name, with all of its cards, the
 * fallbacks between their rows already followed.  Pricing a row is one probe,
 * or none if the last row named the same model.
 *
 * Every table read here has triggers that send a relcache invalidation when
 * it changes.  Those messages are transactional: others get them at commit,
 * we get ours at the end of the command and again if it is rolled back.  The
 * callback only sets a flag, as an invalidation can arrive while we read; the
 * next lookup empties the cache.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/table.h"
#include "access/xact.h"
#include "catalog/namespace.h"
#include "common/hashfn.h"
#include "executor/spi.h"
#include "miscadmin.h"
#include "utils/fmgroids.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/numeric.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

#include "base/numeric_math.h"
#include "base/text_view.h"
#include "base/transaction.h"
#include "compat.h"
#include "price/cards.h"
#include "price/cost.h"
#include "price/names.h"

typedef struct ModelEntry
{
	ModelKey	key;			/* in the model's context */
	uint32		hash;
	PriceModel *model;
	char		status;			/* for simplehash */
} ModelEntry;

static inline bool
model_key_equal(ModelKey a, ModelKey b)
{
	return text_view_equal(a.model, b.model) &&
		text_view_equal(a.provider, b.provider);
}

static inline uint32
model_key_hash(ModelKey key)
{
	return hash_combine(hash_bytes((const unsigned char *) key.provider.data,
								   key.provider.len),
						hash_bytes((const unsigned char *) key.model.data,
								   key.model.len));
}

#define SH_PREFIX modelhash
#define SH_ELEMENT_TYPE ModelEntry
#define SH_KEY_TYPE ModelKey
#define SH_KEY key
#define SH_HASH_KEY(tb, key) model_key_hash(key)
#define SH_EQUAL(tb, a, b) model_key_equal(a, b)
#define SH_STORE_HASH
#define SH_GET_HASH(tb, a) (a)->hash
#define SH_SCOPE static inline
#define SH_DECLARE
#define SH_DEFINE
#include "lib/simplehash.h"

/* Names come from applications: do not let wrong ones fill the memory. */
#define MAX_CACHED_MODELS 10000

/* The tables whose change empties the cache. */
enum
{
	TABLE_PRICE,
	TABLE_PRICE_SOURCE,
	TABLE_SERVICE_TIER_RULE,
	TABLE_MODEL_ALIAS
};
static const char *const price_tables[] = {
	[TABLE_PRICE] = "price",
	[TABLE_PRICE_SOURCE] = "price_source",
	[TABLE_SERVICE_TIER_RULE] = "service_tier_rule",
	[TABLE_MODEL_ALIAS] = "model_alias"
};

static MemoryContext cache_context = NULL;
static modelhash_hash * models = NULL;

/* The models found last, each where recent_model() looks for its key. */
#define RECENT_MODELS 256
static ModelEntry recent_models[RECENT_MODELS];

static int	similar_searches = 0;
static bool cache_stale = true;
static bool cache_until_xact_end = false;
static bool has_set_price = false;	/* does this database have it? */
static int	loads_running = 0;
static Oid	price_table_oids[lengthof(price_tables)];

/* columns of aibilling.price */
#define Anum_price_provider 1
#define Anum_price_model 2
#define Anum_price_service_tier 3
#define Anum_price_context_above 4
#define Anum_price_valid_from 5
#define Anum_price_source 6
#define Anum_price_daily_from 7
#define Anum_price_daily_to 8
#define Anum_price_units 17
#define Anum_price_discount 18
#define Anum_price_multiplier 19
#define Anum_price_note 20

/* Those of its prices, by PriceKind. */
static const AttrNumber price_columns[NUM_PRICES] = {
	[PRICE_INPUT] = 9,
	[PRICE_OUTPUT] = 10,
	[PRICE_CACHE_READ] = 11,
	[PRICE_CACHE_WRITE] = 12,
	[PRICE_CACHE_WRITE_1H] = 13,
	[PRICE_REASONING] = 14,
	[PRICE_REQUEST] = 15,
	[PRICE_WEB_SEARCH] = 16
};

/* columns of aibilling.price_source */
#define Anum_price_source_source 1
#define Anum_price_source_priority 2

/* columns of aibilling.service_tier_rule */
#define Anum_rule_provider 1
#define Anum_rule_service_tier 2
#define Anum_rule_multiplier 3
#define Anum_rule_shipped 5

/* A row of aibilling.price. */
typedef struct PriceRow
{
	TextView	tier;
	TextView	source;
	int64		priority;		/* of the source; lower goes first */
	TimestampTz valid_from;
	bool		all_day;
	TimeADT		daily_from;
	TimeADT		daily_to;
	int64		context_above;
	bool		inherit;		/* is what it leaves NULL as in other rows? */
	Datum	   *values;			/* all columns */
	bool	   *nulls;
} PriceRow;

const TextView abp_standard_tier = {"standard", 8};

/* Is this a name of the standard tier, or none? */
bool
abp_cards_tier_is_standard(TextView tier)
{
	return abp_cards_canonical_tier(tier).data == abp_standard_tier.data ||
		abp_cards_canonical_tier(abp_names_fold(tier)).data == abp_standard_tier.data;
}

/*
 * Is this the tier that a request names, or, with "fold", the same but for its
 * case and white space?
 */
bool
abp_cards_same_tier(TextView name, TextView requested, bool fold)
{
	if (!fold)
		return text_view_equal(name, requested);
	return text_view_equal(abp_cards_canonical_tier(abp_names_fold(name)), requested);
}

/* Prices, rules or aliases have changed, perhaps in another session. */
static void
price_relcache_callback(Datum arg, Oid relid)
{
	for (int i = 0; i < lengthof(price_table_oids); i++)
	{
		if (relid == InvalidOid || price_table_oids[i] == InvalidOid ||
			price_table_oids[i] == relid)
			cache_stale = true;
	}
}

/*
 * What this transaction has read of its own changes is not for the next one.
 */
static void
price_xact_callback(XactEvent event, void *arg)
{
	if (!abp_transaction_ends(event))
		return;
	if (cache_until_xact_end)
		cache_stale = true;
	cache_until_xact_end = false;
	loads_running = 0;
}

/*
 * Get ready to price, once per backend.  Whoever has time may call it early;
 * the other functions here call it if it has not been.
 */
void
abp_cards_init(void)
{
	static bool done = false;

	if (done)
		return;

	cache_context = AllocSetContextCreate(TopMemoryContext,
										  "aibilling_polar prices",
										  ALLOCSET_DEFAULT_SIZES);
	CacheRegisterRelcacheCallback(price_relcache_callback, (Datum) 0);
	RegisterXactCallback(price_xact_callback, NULL);
	done = true;
}

/*
 * Empty the cache.  The tables' OIDs are looked up anew, as the extension may
 * have been dropped and created again; dropping it invalidated the old ones.
 */
static void
reset_cache(void)
{
	Oid			schema;

	memset(recent_models, 0, sizeof(recent_models));
	MemoryContextReset(cache_context);
	models = modelhash_create(cache_context, 64, NULL);
	similar_searches = 0;

	/* Every message counts while we do not know whom to listen to. */
	for (int i = 0; i < lengthof(price_tables); i++)
		price_table_oids[i] = InvalidOid;
	cache_stale = false;

	schema = get_namespace_oid("aibilling", true);
	if (!OidIsValid(schema))
		return;
	for (int i = lengthof(price_tables) - 1; i >= 0; i--)
		price_table_oids[i] = get_relname_relid(price_tables[i], schema);
}

/* Open one of the tables that prices are read from. */
static Relation
open_price_table(int table)
{
	Relation	rel = try_table_open(price_table_oids[table], AccessShareLock);

	if (rel == NULL)
	{
		cache_stale = true;		/* there may be another one */
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_TABLE),
				 errmsg("table \"aibilling.%s\" does not exist", price_tables[table]),
				 errhint("Run CREATE EXTENSION aibilling_polar.")));
	}
	return rel;
}

/* A decimal of a price or rule, times 10^9, which is exact. */
static int64
decimal_nanos(Datum decimal)
{
	return numeric_as_int64(numeric_times(DatumGetNumeric(decimal), int64_to_numeric(1000000000)));
}

/*
 * Take over prices that the row knows and the rate does not yet, called in
 * the order of fallback.  Units fall back one by one.
 */
static void
merge_row(MemoryContext context, Rate *rate, const PriceRow *row,
		  bool *has_discount, int64 *discount,
		  bool *has_multiplier, int64 *multiplier)
{
#define VALUE(column) row->values[(column) - 1]
#define IS_NULL(column) row->nulls[(column) - 1]

	for (int i = 0; i < NUM_PRICES; i++)
	{
		if (rate->known[i] || IS_NULL(price_columns[i]))
			continue;
		rate->known[i] = true;
		rate->price[i] = decimal_nanos(VALUE(price_columns[i]));
	}

	if (!IS_NULL(Anum_price_discount) && !*has_discount)
	{
		*has_discount = true;
		*discount = decimal_nanos(VALUE(Anum_price_discount));
	}
	if (!IS_NULL(Anum_price_multiplier) && !*has_multiplier)
	{
		*has_multiplier = true;
		*multiplier = decimal_nanos(VALUE(Anum_price_multiplier));
	}

	if (!IS_NULL(Anum_price_units))
	{
		Jsonb	   *units = DatumGetJsonbP(VALUE(Anum_price_units));
		JsonbIterator *it = JsonbIteratorInit(&units->root);
		JsonbIteratorToken token;
		JsonbValue	v;
		int			nearer = rate->nunits;
		int			room = rate->nunits + JB_ROOT_COUNT(units);

		if (room == 0)
			return;
		if (rate->units == NULL)
			rate->units = MemoryContextAlloc(context, room * sizeof(UnitPrice));
		else
			rate->units = repalloc(rate->units, room * sizeof(UnitPrice));

		while ((token = JsonbIteratorNext(&it, &v, true)) != WJB_DONE)
		{
			TextView	name;

			if (token != WJB_KEY)
				continue;
			name.data = v.val.string.val;
			name.len = v.val.string.len;
			(void) JsonbIteratorNext(&it, &v, true);

			/* The table's constraint refuses what is not a number. */
			if (v.type == jbvNumeric &&
				abp_cost_find_unit_price(rate->units, nearer, name) == NULL)
			{
				UnitPrice  *unit = &rate->units[rate->nunits++];
				Size		size = VARSIZE_ANY(v.val.numeric);

				unit->name = abp_text_view_copy(name, context);
				unit->price = MemoryContextAlloc(context, size);
				memcpy(unit->price, v.val.numeric, size);
			}
		}
		qsort(rate->units, rate->nunits, sizeof(UnitPrice), abp_cost_compare_unit_prices);
	}

#undef VALUE
#undef IS_NULL
}

/*
 * Of rows first..last-1, which differ in context_above and ascend, merge the
 * one in force above "threshold", then the base row.  *note becomes the note
 * of the first of them that has one.  Returns false if what is still missing
 * is unknown, whatever other rows say.
 */
static bool
merge_rows(MemoryContext context, Rate *rate, const char **note,
		   const PriceRow *first, const PriceRow *last,
		   int64 threshold, bool *has_discount, int64 *discount,
		   bool *has_multiplier, int64 *multiplier)
{
	const PriceRow *row = last;

	while (row > first && row[-1].context_above > threshold)
		row--;
	if (row == first)
		return true;

	for (row--;; row = first)
	{
		merge_row(context, rate, row, has_discount, discount,
				  has_multiplier, multiplier);
		if (*note == NULL && !row->nulls[Anum_price_note - 1])
			*note = abp_text_view_copy(text_view_from_datum(row->values[Anum_price_note - 1]), context).data;
		if (!row->inherit)
			return false;
		if (row == first || first->context_above != 0)
			return true;
	}
}

/*
 * Build a window's rates from its rows first..last-1 and from the rows
 * day_first..day_last-1 of the whole day (none if it is the whole day).
 */
static void
build_rates(MemoryContext context, PriceWindow *window,
			const PriceRow *first, const PriceRow *last,
			const PriceRow *day_first, const PriceRow *day_last)
{
	int64	   *thresholds;
	int			n = 0;

	thresholds = palloc(sizeof(int64) *
						(1 + (last - first) + (day_last - day_first)));
	thresholds[n++] = 0;

	/* Merge two ascending lists without duplicates. */
	for (const PriceRow *a = first, *b = day_first; a < last || b < day_last;)
	{
		int64		next;

		if (b == day_last ||
			(a < last && a->context_above <= b->context_above))
			next = (a++)->context_above;
		else
			next = (b++)->context_above;
		if (next > thresholds[n - 1])
			thresholds[n++] = next;
	}

	window->nrates = n;
	window->rates = MemoryContextAllocZero(context, sizeof(Rate) * n);
	window->notes = MemoryContextAllocZero(context, sizeof(char *) * n);
	for (int i = 0; i < n; i++)
	{
		Rate	   *rate = &window->rates[i];
		bool		has_discount = false;
		bool		has_multiplier = false;
		int64		discount = 0;
		int64		multiplier = INT64CONST(1000000000);
		ExactDecimal rest;
		ExactDecimal times;

		rate->context_above = thresholds[i];
		if (merge_rows(context, rate, &window->notes[i], first, last, thresholds[i],
					   &has_discount, &discount, &has_multiplier, &multiplier))
			(void) merge_rows(context, rate, &window->notes[i], day_first, day_last, thresholds[i],
							  &has_discount, &discount, &has_multiplier, &multiplier);

		if (!rate->known[PRICE_REASONING] && rate->known[PRICE_OUTPUT])
		{
			rate->known[PRICE_REASONING] = true;
			rate->price[PRICE_REASONING] = rate->price[PRICE_OUTPUT];
		}

		rest.digits = INT64CONST(1000000000) - discount;
		rest.scale = PRICE_SCALE;
		times.digits = multiplier;
		times.scale = PRICE_SCALE;
		rate->factor = abp_exact_multiply(rest, times);
	}
	pfree(thresholds);
}

/* How long a window lasts; the whole day is longest. */
static int64
window_length(const PriceWindow *window)
{
	if (window->all_day)
		return PG_INT64_MAX;
	return window->to > window->from ? window->to - window->from :
		window->to - window->from + USECS_PER_DAY;
}

/*
 * Shorter windows before longer ones, so that the narrowest that fits is found
 * first.
 */
static int
compare_windows(const void *a, const void *b)
{
	const PriceWindow *left = a;
	const PriceWindow *right = b;
	int64		left_length = window_length(left);
	int64		right_length = window_length(right);

	if (left_length != right_length)
		return left_length < right_length ? -1 : 1;
	if (left->from != right->from)
		return left->from < right->from ? -1 : 1;
	return 0;
}

/* Do two rows hold at the same time of day? */
static bool
same_window(const PriceRow *a, const PriceRow *b)
{
	if (a->all_day || b->all_day)
		return a->all_day && b->all_day;
	return a->daily_from == b->daily_from && a->daily_to == b->daily_to;
}

/* Build a card of its rows first..last-1. */
static void
build_card(MemoryContext context, PriceCard *card,
		   const PriceRow *first, const PriceRow *last)
{
	const PriceRow *day_first = first;	/* the whole day comes last */

	card->source = abp_text_view_copy(first->source, context);
	card->valid_from = first->valid_from;
	card->nwindows = 0;
	card->windows = MemoryContextAllocZero(context,
										   sizeof(PriceWindow) * (last - first));

	while (day_first < last && !day_first->all_day)
		day_first++;

	for (const PriceRow *row = first; row < last;)
	{
		PriceWindow *window = &card->windows[card->nwindows++];
		const PriceRow *end = row + 1;

		while (end < last && same_window(row, end))
			end++;

		window->all_day = row->all_day;
		if (window->all_day)
			build_rates(context, window, row, end, last, last);
		else
		{
			window->from = row->daily_from;
			window->to = row->daily_to;
			build_rates(context, window, row, end, day_first, last);
		}
		row = end;
	}

	qsort(card->windows, card->nwindows, sizeof(PriceWindow), compare_windows);
}

/*
 * The priority of a source of prices: the user's go before all, those of a
 * source that is not listed behind all.
 */
static int64
source_priority(TextView source, Snapshot snapshot)
{
	static const TextView user = {"user", 4};
	Relation	rel;
	ScanKeyData key;
	Oid			index;
	SysScanDesc scan;
	HeapTuple	tuple;
	int64		priority = PG_INT64_MAX;
	bool		isnull;

	if (text_view_equal(source, user))
		return PG_INT64_MIN;

	rel = open_price_table(TABLE_PRICE_SOURCE);
	index = get_relname_relid("price_source_pkey", RelationGetNamespace(rel));
	ScanKeyInit(&key, Anum_price_source_source, BTEqualStrategyNumber, F_TEXTEQ,
				text_view_datum(source));
	scan = systable_beginscan(rel, index, OidIsValid(index), snapshot, 1, &key);
	tuple = systable_getnext(scan);
	if (tuple != NULL)
		priority = DatumGetInt32(heap_getattr(tuple, Anum_price_source_priority,
											  RelationGetDescr(rel), &isnull));
	systable_endscan(scan);
	table_close(rel, NoLock);
	return priority;
}

/* By their bytes, in every database alike. */
static int
compare_text_views(TextView a, TextView b)
{
	int			result = memcmp(a.data, b.data, Min(a.len, b.len));

	return result != 0 ? result : a.len - b.len;
}

/*
 * Of a model's rows, those of a tier lie together; of these those of a card,
 * the best card first; of these those of a window, the whole day last; and of
 * these the lowest threshold first.
 */
static int
compare_price_rows(const void *a, const void *b)
{
	const PriceRow *left = a;
	const PriceRow *right = b;
	int			result = compare_text_views(left->tier, right->tier);

	if (result != 0)
		return result;
	if (left->priority != right->priority)
		return left->priority < right->priority ? -1 : 1;
	result = compare_text_views(left->source, right->source);
	if (result != 0)
		return result;
	if (left->valid_from != right->valid_from)
		return left->valid_from > right->valid_from ? -1 : 1;
	if (left->all_day != right->all_day)
		return left->all_day ? 1 : -1;
	if (left->daily_from != right->daily_from)
		return left->daily_from < right->daily_from ? -1 : 1;
	if (left->daily_to != right->daily_to)
		return left->daily_to < right->daily_to ? -1 : 1;
	if (left->context_above != right->context_above)
		return left->context_above < right->context_above ? -1 : 1;
	return 0;
}

/*
 * The number of a column that a database has not that is still at an older
 * version of the extension, and that may have any number: 0 if there is none.
 */
static int
column_number(TupleDesc desc, const char *name)
{
	for (int i = 0; i < desc->natts; i++)
	{
		Form_pg_attribute attribute = TupleDescAttr(desc, i);

		if (!attribute->attisdropped && strcmp(NameStr(attribute->attname), name) == 0)
			return i + 1;
	}
	return 0;
}

/*
 * The rows of (provider, model) in the order of compare_price_rows.  Without
 * SQL: a new session would plan it for longer than all else that it does for
 * its first usage row.
 */
static PriceRow *
read_price_rows(ModelKey key, Snapshot snapshot, int *nrows)
{
	Relation	rel = open_price_table(TABLE_PRICE);
	TupleDesc	desc = RelationGetDescr(rel);
	Oid			index = get_relname_relid("price_key", RelationGetNamespace(rel));
	int			inherit = column_number(desc, "inherit");
	ScanKeyData keys[2];
	SysScanDesc scan;
	HeapTuple	tuple;
	int			size = 16;
	PriceRow   *rows = palloc(sizeof(PriceRow) * size);

	/* both came with version 1.2 of the extension */
	has_set_price = inherit != 0;

	ScanKeyInit(&keys[0], Anum_price_provider, BTEqualStrategyNumber, F_TEXTEQ,
				text_view_datum(key.provider));
	ScanKeyInit(&keys[1], Anum_price_model, BTEqualStrategyNumber, F_TEXTEQ,
				text_view_datum(key.model));
	*nrows = 0;
	scan = systable_beginscan(rel, index, OidIsValid(index), snapshot, 2, keys);
	while ((tuple = systable_getnext(scan)) != NULL)
	{
		PriceRow   *row;

		CHECK_FOR_INTERRUPTS();

		if (*nrows == size)
		{
			size *= 2;
			rows = repalloc(rows, sizeof(PriceRow) * size);
		}
		row = &rows[(*nrows)++];
		memset(row, 0, sizeof(*row));
		row->values = palloc(sizeof(Datum) * desc->natts);
		row->nulls = palloc(sizeof(bool) * desc->natts);
		heap_deform_tuple(heap_copytuple(tuple), desc, row->values, row->nulls);

		row->tier = text_view_from_datum(row->values[Anum_price_service_tier - 1]);
		row->source = text_view_from_datum(row->values[Anum_price_source - 1]);
		row->priority = source_priority(row->source, snapshot);
		row->valid_from = DatumGetTimestampTz(row->values[Anum_price_valid_from - 1]);
		row->context_above = DatumGetInt64(row->values[Anum_price_context_above - 1]);
		row->inherit = inherit == 0 || DatumGetBool(row->values[inherit - 1]);
		row->all_day = row->nulls[Anum_price_daily_from - 1];
		if (!row->all_day)
		{
			row->daily_from = DatumGetTimeADT(row->values[Anum_price_daily_from - 1]);
			row->daily_to = DatumGetTimeADT(row->values[Anum_price_daily_to - 1]);
		}
	}
	systable_endscan(scan);
	table_close(rel, NoLock);

	qsort(rows, *nrows, sizeof(PriceRow), compare_price_rows);
	return rows;
}

/*
 * Read all cards of (provider, model) into the model.  Returns false if there
 * are none.
 */
static bool
load_cards(PriceModel *model, ModelKey key, Snapshot snapshot)
{
	int			nrows;
	PriceRow   *rows = read_price_rows(key, snapshot, &nrows);
	const PriceRow *last = rows + nrows;
	PriceTier  *tier = NULL;

	if (nrows == 0)
		return false;

	model->provider = abp_text_view_copy(key.provider, model->context);
	model->model = abp_text_view_copy(key.model, model->context);
	model->tiers = MemoryContextAllocZero(model->context,
										  sizeof(PriceTier) * nrows);

	for (const PriceRow *row = rows; row < last;)
	{
		const PriceRow *end = row + 1;

		CHECK_FOR_INTERRUPTS();

		while (end < last && text_view_equal(end->tier, row->tier) &&
			   text_view_equal(end->source, row->source) &&
			   end->valid_from == row->valid_from)
			end++;

		if (tier == NULL || !text_view_equal(tier->name, row->tier))
		{
			tier = &model->tiers[model->ntiers++];
			tier->name = abp_cards_canonical_tier(row->tier);
			if (tier->name.data != abp_standard_tier.data)
				tier->name = abp_text_view_copy(row->tier, model->context);
			tier->cards = MemoryContextAllocZero(model->context,
												 sizeof(PriceCard) * (last - row));
		}
		build_card(model->context, &tier->cards[tier->ncards++], row, end);
		row = end;
	}
	return true;
}

/* Is the rule for the request's provider, for the cards', for all, or for neither? */
static int
rule_rank(TextView provider, TextView requested, TextView of_cards)
{
	static const TextView all = {"*", 1};

	if (text_view_equal(provider, requested))
		return 0;
	if (text_view_equal(provider, of_cards))
		return 1;
	return text_view_equal(provider, all) ? 2 : -1;
}

/* The nearest rule first; see rule_rank. */
static int
compare_rules(const void *a, const void *b)
{
	return ((const TierRule *) a)->rank - ((const TierRule *) b)->rank;
}

/* Read what tiers without cards cost. */
static void
load_rules(PriceModel *model, TextView provider, Snapshot snapshot)
{
	Relation	rel = open_price_table(TABLE_SERVICE_TIER_RULE);
	TupleDesc	desc = RelationGetDescr(rel);
	SysScanDesc scan = systable_beginscan(rel, InvalidOid, false, snapshot, 0, NULL);
	HeapTuple	tuple;
	int			size = 8;

	model->rules = MemoryContextAlloc(model->context, sizeof(TierRule) * size);
	while ((tuple = systable_getnext(scan)) != NULL)
	{
		const ExactDecimal one = {1, 0};
		TierRule   *rule;
		Datum		value;
		bool		isnull;
		int			rank;

		CHECK_FOR_INTERRUPTS();

		value = heap_getattr(tuple, Anum_rule_provider, desc, &isnull);
		rank = rule_rank(text_view_from_datum(value), provider, model->provider);
		if (rank < 0)
			continue;

		if (model->nrules == size)
		{
			size *= 2;
			model->rules = repalloc(model->rules, sizeof(TierRule) * size);
		}
		rule = &model->rules[model->nrules++];
		memset(rule, 0, sizeof(*rule));
		value = heap_getattr(tuple, Anum_rule_shipped, desc, &isnull);
		rule->rank = 2 * rank + DatumGetBool(value);
		value = heap_getattr(tuple, Anum_rule_service_tier, desc, &isnull);
		rule->name = abp_text_view_copy(text_view_from_datum(value), model->context);
		value = heap_getattr(tuple, Anum_rule_multiplier, desc, &isnull);
		if (isnull)
			continue;
		rule->has_multiplier = true;
		rule->multiplier.digits = decimal_nanos(value);
		rule->multiplier.scale = PRICE_SCALE;
		rule->multiplier = abp_exact_multiply(rule->multiplier, one);
	}
	systable_endscan(scan);
	table_close(rel, NoLock);

	qsort(model->rules, model->nrules, sizeof(TierRule), compare_rules);
}

/* What find_cards() reads and into what. */
typedef struct CardSearch
{
	PriceModel *model;
	Snapshot	snapshot;
} CardSearch;

/* abp_names_find() asks for the cards of a name. */
static bool
find_cards(ModelKey key, void *arg)
{
	CardSearch *search = arg;

	return load_cards(search->model, key, search->snapshot);
}

/*
 * The snapshot to read prices with.  A cache outlives the statement, so it
 * must not be filled from a snapshot that is older than the invalidations
 * already heard.  Where the transaction's own snapshot must hold, it does,
 * and the cache ends with the transaction.
 */
static Snapshot
price_snapshot(void)
{
	if (!IsolationUsesXactSnapshot() && !IsInParallelMode())
		return GetLatestSnapshot();

	cache_until_xact_end = true;
	return ActiveSnapshotSet() ? GetActiveSnapshot() : GetTransactionSnapshot();
}

/* The state before prices are read. */
typedef struct SavedReader
{
	Oid			userid;
	int			sec_context;
} SavedReader;

/*
 * Connect to SPI with the rights of the price table's owner.  Reading is the
 * extension's business: it has these rights, so that an INSERT into a usage
 * table works even where prices are confidential.
 */
static Snapshot
begin_reading(SavedReader *saved)
{
	Relation	price = open_price_table(TABLE_PRICE);

	GetUserIdAndSecContext(&saved->userid, &saved->sec_context);
	SetUserIdAndSecContext(price->rd_rel->relowner,
						   saved->sec_context | SECURITY_LOCAL_USERID_CHANGE |
						   SECURITY_NOFORCE_RLS);
	table_close(price, NoLock);

	if (SPI_connect() != SPI_OK_CONNECT)
		elog(ERROR, "SPI_connect failed");
	return RegisterSnapshot(price_snapshot());
}

/* End what begin_reading has begun. */
static void
end_reading(const SavedReader *saved, Snapshot snapshot)
{
	UnregisterSnapshot(snapshot);
	SPI_finish();
	SetUserIdAndSecContext(saved->userid, saved->sec_context);
}

/*
 * Read a model from the tables into a context of its own below the current
 * one.
 */
static PriceModel *
read_model(ModelKey key)
{
	MemoryContext context = AllocSetContextCreate(CurrentMemoryContext,
												  "aibilling_polar model",
												  ALLOCSET_SMALL_SIZES);
	PriceModel *model = MemoryContextAllocZero(context, sizeof(PriceModel));
	SavedReader saved;
	CardSearch	search = {.model = model};

	model->context = context;
	model->provider.data = model->model.data = "";

	search.snapshot = begin_reading(&saved);
	(void) abp_names_find(key, search.snapshot, find_cards, &search);
	load_rules(model, key.provider, search.snapshot);
	end_reading(&saved, search.snapshot);
	return model;
}

/*
 * The place of a key among the recent models.  A few of its bytes choose it:
 * most rows name one of a few models, and hashing their names would take
 * longer than pricing them.
 */
static inline ModelEntry *
recent_model(ModelKey key)
{
	const unsigned char *name = (const unsigned char *) key.model.data;
	uint32		place = key.model.len + key.provider.len;

	if (key.model.len > 0)
		place = ((place * 31 + name[0]) * 31 + name[key.model.len / 2]) * 31 +
			name[key.model.len - 1];
	return &recent_models[place % RECENT_MODELS];
}

/* Find a model that is not among the recent ones. */
static PriceModel *
find_or_read_model(ModelKey key)
{
	ModelEntry *entry = modelhash_lookup(models, key);

	if (entry == NULL)
	{
		PriceModel *model;
		bool		found;

		if (models->members >= MAX_CACHED_MODELS && loads_running == 0)
			reset_cache();

		loads_running++;
		PG_TRY();
		{
			model = read_model(key);
		}
		PG_FINALLY();
		{
			loads_running--;
		}
		PG_END_TRY();

		key.provider = abp_text_view_copy(key.provider, model->context);
		key.model = abp_text_view_copy(key.model, model->context);
		MemoryContextSetParent(model->context, cache_context);
		entry = modelhash_insert(models, key, &found);
		entry->model = model;
	}

	*recent_model(key) = *entry;
	return entry->model;
}

/*
 * The model that (provider, model) names, with its cards: never NULL, but
 * without tiers if there are none.  It stays valid until the next call.
 */
PriceModel *
abp_cards_find(ModelKey key)
{
	static TimestampTz last_statement = 0;
	const ModelEntry *recent;

	/*
	 * A statement may see prices as old as its start.  Without this it might
	 * see older ones, as a statement that locks nothing new hears of nothing.
	 */
	if (last_statement != GetCurrentStatementStartTimestamp())
	{
		last_statement = GetCurrentStatementStartTimestamp();
		AcceptInvalidationMessages();
	}

	/* While we read, the tables may call for prices: keep what is in use. */
	if (unlikely(cache_stale) && loads_running == 0)
		reset_cache();

	recent = recent_model(key);
	if (recent->model != NULL && model_key_equal(recent->key, key))
		return recent->model;
	return find_or_read_model(key);
}

/* How many names are compared with all others before the cache is emptied. */
#define MAX_SIMILAR_SEARCHES 100

/*
 * The name that was meant by one that has no price, in words; NULL if none is
 * near.  Found once for each name while it is cached.
 */
const char *
abp_cards_similar_name(PriceModel *model, ModelKey key)
{
	SavedReader saved;
	Snapshot	snapshot;
	char	   *similar;

	if (model->similar_known || key.provider.len == 0 || key.model.len == 0 ||
		similar_searches >= MAX_SIMILAR_SEARCHES)
		return model->similar;

	/* While we read, the tables may call for prices: keep what is in use. */
	similar_searches++;
	loads_running++;
	PG_TRY();
	{
		snapshot = begin_reading(&saved);
		similar = abp_names_similar(key, snapshot);
		if (similar != NULL)
			model->similar = MemoryContextStrdup(model->context, similar);
		end_reading(&saved, snapshot);
	}
	PG_FINALLY();
	{
		loads_running--;
	}
	PG_END_TRY();
	model->similar_known = true;
	return model->similar;
}

/*
 * Does this database have aibilling.set_price, as the tables read last say?
 */
bool
abp_cards_have_set_price(void)
{
	return has_set_price;
}
