/*-------------------------------------------------------------------------
 *
 * price.c
 *	  The price table, as cards in force at a time.
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
#include "access/parallel.h"
#include "access/table.h"
#include "access/xact.h"
#include "catalog/namespace.h"
#include "catalog/pg_type.h"
#include "common/hashfn.h"
#include "executor/spi.h"
#include "lib/stringinfo.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/inval.h"
#include "utils/json.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/numeric.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

#include "base/text_view.h"
#include "base/usage_row.h"
#include "compat.h"
#include "price/cost.h"
#include "price/names.h"
#include "price/price.h"

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

/* Intermediate results of numeric arithmetic; reset after each row. */
static MemoryContext work_context = NULL;

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

/* --- service tiers -------------------------------------------------------- */

static const TextView standard_tier = {"standard", 8};

/*
 * A service tier as the price table spells it; the standard tier by whatever
 * name is always standard_tier itself, so that comparing it is quick.
 */
static inline TextView
canonical_tier(TextView tier)
{
	static const TextView other_names[] = {
		{"", 0}, {"default", 7}, {"auto", 4}, {"on_demand", 9}
	};

	if (tier.data == NULL ||
		(tier.len == 8 && memcmp(tier.data, standard_tier.data, 8) == 0))
		return standard_tier;
	for (int i = 0; i < lengthof(other_names); i++)
	{
		if (text_view_equal(other_names[i], tier))
			return standard_tier;
	}
	return tier;
}

/* Is this a name of the standard tier, or none? */
bool
abp_price_tier_is_standard(TextView tier)
{
	return canonical_tier(tier).data == standard_tier.data ||
		canonical_tier(abp_fold_name(tier)).data == standard_tier.data;
}

/*
 * Is this the tier that a request names, or, with "fold", the same but for its
 * case and white space?
 */
static bool
same_tier(TextView name, TextView requested, bool fold)
{
	if (!fold)
		return text_view_equal(name, requested);
	return text_view_equal(canonical_tier(abp_fold_name(name)), requested);
}

/* --- when the cache ends -------------------------------------------------- */

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

static void
price_xact_callback(XactEvent event, void *arg)
{
	switch (event)
	{
		case XACT_EVENT_COMMIT:
		case XACT_EVENT_PARALLEL_COMMIT:
		case XACT_EVENT_ABORT:
		case XACT_EVENT_PARALLEL_ABORT:
		case XACT_EVENT_PREPARE:
			if (cache_until_xact_end)
				cache_stale = true;
			cache_until_xact_end = false;
			loads_running = 0;
			break;
		default:
			break;
	}
}

/*
 * Get ready to price: once per backend, any time before the first call of
 * another function here (which else do it themselves).
 */
void
abp_price_init(void)
{
	static bool done = false;

	if (done)
		return;

	cache_context = AllocSetContextCreate(TopMemoryContext,
										  "aibilling_polar prices",
										  ALLOCSET_DEFAULT_SIZES);
	work_context = AllocSetContextCreate(TopMemoryContext,
										 "aibilling_polar price arithmetic",
										 ALLOCSET_SMALL_SIZES);
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

/* --- reading the tables --------------------------------------------------- */

static TextView
copy_text_view(MemoryContext context, TextView text)
{
	TextView	copy;
	char	   *data = MemoryContextAlloc(context, text.len + 1);

	memcpy(data, text.data, text.len);
	data[text.len] = '\0';
	copy.data = data;
	copy.len = text.len;

	return copy;
}

static TextView
datum_text_view(Datum datum)
{
	TextView	view;
	text	   *value = DatumGetTextPP(datum);

	view.data = VARDATA_ANY(value);
	view.len = VARSIZE_ANY_EXHDR(value);
	return view;
}

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
	Datum		nanos = DirectFunctionCall2(numeric_mul, decimal,
											NumericGetDatum(int64_to_numeric(1000000000)));

	return DatumGetInt64(DirectFunctionCall1(numeric_int8, nanos));
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
				abp_find_unit_price(rate->units, nearer, name) == NULL)
			{
				UnitPrice  *unit = &rate->units[rate->nunits++];
				Size		size = VARSIZE_ANY(v.val.numeric);

				unit->name = copy_text_view(context, name);
				unit->price = MemoryContextAlloc(context, size);
				memcpy(unit->price, v.val.numeric, size);
			}
		}
		qsort(rate->units, rate->nunits, sizeof(UnitPrice), abp_compare_unit_prices);
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
			*note = copy_text_view(context, datum_text_view(row->values[Anum_price_note - 1])).data;
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
		rate->factor = abp_decimal_multiply(rest, times);
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

	card->source = copy_text_view(context, first->source);
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

		row->tier = datum_text_view(row->values[Anum_price_service_tier - 1]);
		row->source = datum_text_view(row->values[Anum_price_source - 1]);
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

	model->provider = copy_text_view(model->context, key.provider);
	model->model = copy_text_view(model->context, key.model);
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
			tier->name = canonical_tier(row->tier);
			if (tier->name.data != standard_tier.data)
				tier->name = copy_text_view(model->context, row->tier);
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
		rank = rule_rank(datum_text_view(value), provider, model->provider);
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
		rule->name = copy_text_view(model->context, datum_text_view(value));
		value = heap_getattr(tuple, Anum_rule_multiplier, desc, &isnull);
		if (isnull)
			continue;
		rule->has_multiplier = true;
		rule->multiplier.digits = decimal_nanos(value);
		rule->multiplier.scale = PRICE_SCALE;
		rule->multiplier = abp_decimal_multiply(rule->multiplier, one);
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

/* abp_find_name() asks for the cards of a name. */
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
	(void) abp_find_name(key, search.snapshot, find_cards, &search);
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

		key.provider = copy_text_view(model->context, key.provider);
		key.model = copy_text_view(model->context, key.model);
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
static inline PriceModel *
find_model(ModelKey key)
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

/* --- the card in force ---------------------------------------------------- */


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
		if (same_tier(model->tiers[i].name, tier_name, fold))
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

		if (same_tier(rule->name, tier, fold))
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
	return find_model(key);
}

/*
 * Find what is in force for a request.  Returns NULL, or what is missing in
 * words that go behind "no price for ".
 */
static const char *
rate_in_force(const PriceRequest *request, RateInForce *result)
{
	const UsageCounts *counts = request->counts;
	TextView	tier = canonical_tier(request->service_tier);
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
			tier = canonical_tier(abp_fold_name(tier));
		if (find_rate(result->model, tier, fold, request->at, input_tokens, result))
			return NULL;
		if (text_view_equal(tier, standard_tier))
			return "this time";

		rule = find_rule(result->model, tier, fold);
		if (rule != NULL)
		{
			if (!find_rate(result->model, standard_tier, false, request->at, input_tokens,
						   result))
				return "this time";
			result->tier_factor = &rule->multiplier;
			return NULL;
		}
		if (fold)
			return "this service tier, nor a rule";
	}
}

/* How many names are compared with all others before the cache is emptied. */
#define MAX_SIMILAR_SEARCHES 100

/*
 * The name that was meant by one that has no price, in words; NULL if none is
 * near.  Found once for each name while it is cached.
 */
static const char *
similar_name(PriceModel *model, const PriceRequest *request)
{
	ModelKey	key = {request->provider, request->model};
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
		similar = abp_similar_name(key, snapshot);
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

static char *
unpriced_reason(const PriceRequest *request, PriceModel *model, const char *what)
{
	TextView	tier = canonical_tier(request->service_tier);
	const char *names = psprintf("(provider \"%.*s\", model \"%.*s\", service tier \"%.*s\")",
								 request->provider.len,
								 request->provider.data ? request->provider.data : "",
								 request->model.len,
								 request->model.data ? request->model.data : "",
								 tier.len, tier.data);
	const char *similar;

	if (model->ntiers > 0)
		return psprintf("no price for %s %s", what, names);
	if (request->model.len == 0)
		return psprintf("no price: the %s names no model: give it in column model %s",
						request->from_reply ? "reply" : "row", names);
	if (request->provider.len == 0)
		return psprintf("no price: the row names no provider: give it in column provider %s",
						names);

	similar = similar_name(model, request);
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
			wanted = buckets[j].amount == NULL && buckets[j].name.len == strlen(columns[i]) &&
				memcmp(buckets[j].name.data, columns[i], buckets[j].name.len) == 0;
		if (wanted)
			appendStringInfo(statement, ", %s => ?", columns[i]);
	}

	for (int j = 0; j < nbuckets; j++)
	{
		const CostBucket *bucket = &buckets[j];
		bool		is_column = bucket->amount != NULL;

		for (int i = 0; i < lengthof(columns) && !is_column; i++)
			is_column = bucket->name.len == strlen(columns[i]) &&
				memcmp(bucket->name.data, columns[i], bucket->name.len) == 0;
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
	RateInForce in_force;
	TextView	tier = canonical_tier(request->service_tier);
	bool		of_tier = !text_view_equal(tier, standard_tier);
	const char *what;
	PriceModel *model;
	CostBucket *buckets;
	int			nbuckets;
	StringInfoData hint;
	char	   *from;

	abp_price_init();
	if (!abp_cost_counted(request->counts))
		return NULL;

	what = rate_in_force(request, &in_force);
	model = in_force.model;
	if (model->ntiers == 0 && request->model.len == 0)
		return pstrdup("UPDATE the row's column model. What is held is listed in aibilling.unpriced.");
	if (model->ntiers == 0 && request->provider.len == 0)
		return pstrdup("UPDATE the row's column provider. What is held is listed in aibilling.unpriced.");

	initStringInfo(&hint);
	if (model->ntiers == 0 && similar_name(model, request) != NULL)
		appendStringInfo(&hint, "Perhaps you meant %s: correct the row, or give the name in aibilling.model_alias. For what is new, once you know its price: ",
						 model->similar);
	else if (has_set_price)
		appendStringInfoString(&hint, "Once you know the price: ");
	if (!has_set_price)
	{
		appendStringInfoString(&hint, "ALTER EXTENSION aibilling_polar UPDATE brings aibilling.set_price(), which adds a price.");
		return hint.data;
	}

	/* A tier that a rule prices has the standard tier's prices. */
	if (of_tier && (in_force.tier_factor != NULL ||
					(what != NULL && find_rule(model, canonical_tier(abp_fold_name(tier)), true) != NULL)))
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
abp_cost_status_name(CostStatus status)
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

	abp_price_init();

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

	abp_price_init();
	found = requested_model(&request);
	if (found->ntiers == 0)
		return false;
	*provider = found->provider;
	*model = found->model;
	return true;
}

/*
 * Price a usage row: the three cost columns.  As abp_price_cost(); an amount
 * beyond cost_nanos is an error, too, or with noerror, no amount: then returns
 * false.  cost_cents and missing are palloc'd in the current memory context.
 */
bool
abp_price_usage(const PriceRequest *request, bool noerror, PricedCost *cost)
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
