/*-------------------------------------------------------------------------
 *
 * share.c
 *	  What usage rows add up to, by day, customer, provider, model and event name.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "common/hashfn.h"
#include "utils/builtins.h"

#include "base/decimal.h"
#include "base/numeric_math.h"
#include "usage/share.h"

/* What has more digits is added up as numeric. */
#define MAX_CENTS_DIGITS 30

#define FIRST_SLOTS 64			/* a power of 2 */

/* --- groups -------------------------------------------------------------------- */

/*
 * Begin with no sums.
 */
void
abp_share_init(ShareGroups *groups, MemoryContext context)
{
	MemoryContext old = MemoryContextSwitchTo(context);

	memset(groups, 0, sizeof(*groups));
	groups->context = context;
	groups->max_groups = FIRST_SLOTS / 2;
	groups->groups = palloc(groups->max_groups * sizeof(ShareGroup));
	groups->nslots = FIRST_SLOTS;
	groups->slots = palloc(groups->nslots * sizeof(int));
	memset(groups->slots, -1, groups->nslots * sizeof(int));
	initStringInfo(&groups->key);
	MemoryContextSwitchTo(old);
}

/* Where a key is in the hash table, or where it belongs. */
static int *
find_slot(const ShareGroups *groups, const char *key, int keylen, uint32 hash)
{
	for (uint32 at = hash;; at++)
	{
		int		   *slot = &groups->slots[at & (groups->nslots - 1)];
		const ShareGroup *group;

		if (*slot < 0)
			return slot;
		group = &groups->groups[*slot];
		if (group->hash == hash && group->keylen == keylen &&
			memcmp(group->key, key, keylen) == 0)
			return slot;
	}
}

/* Room for more groups. */
static void
grow(ShareGroups *groups)
{
	groups->max_groups *= 2;
	groups->groups = repalloc_huge(groups->groups, sizeof(ShareGroup) * (Size) groups->max_groups);
	groups->nslots *= 2;
	pfree(groups->slots);
	groups->slots = MemoryContextAllocHuge(groups->context, sizeof(int) * (Size) groups->nslots);
	memset(groups->slots, -1, sizeof(int) * (Size) groups->nslots);
	for (int i = 0; i < groups->ngroups; i++)
	{
		const ShareGroup *group = &groups->groups[i];

		*find_slot(groups, group->key, group->keylen, group->hash) = i;
	}
}

/*
 * The group of a key, new with sums of nothing if there was none.  Until the
 * next one is added.
 */
ShareGroup *
abp_share_group(ShareGroups *groups, const char *key, int keylen)
{
	uint32		hash = hash_bytes((const unsigned char *) key, keylen);
	int		   *slot = find_slot(groups, key, keylen, hash);
	ShareGroup *group;

	if (*slot >= 0)
		return &groups->groups[*slot];
	if (groups->ngroups == groups->max_groups)
	{
		grow(groups);
		slot = find_slot(groups, key, keylen, hash);
	}
	*slot = groups->ngroups;
	group = &groups->groups[groups->ngroups++];
	memset(group, 0, sizeof(*group));
	group->hash = hash;
	group->keylen = keylen;
	group->key = MemoryContextAlloc(groups->context, keylen);
	memcpy(group->key, key, keylen);
	return group;
}

/* A key as bytes, in groups->key. */
static void
set_key(ShareGroups *groups, const ShareKey *key)
{
	resetStringInfo(&groups->key);
	abp_share_key_write(&groups->key, key);
}

/*
 * The same by a key that is not bytes.
 */
ShareGroup *
abp_share_group_of(ShareGroups *groups, const ShareKey *key)
{
	set_key(groups, key);
	return abp_share_group(groups, groups->key.data, groups->key.len);
}

/*
 * The same, but NULL if there is none.
 */
ShareGroup *
abp_share_find(ShareGroups *groups, const ShareKey *key)
{
	int			slot;

	set_key(groups, key);
	slot = *find_slot(groups, groups->key.data, groups->key.len,
					  hash_bytes((const unsigned char *) groups->key.data, groups->key.len));
	return slot < 0 ? NULL : &groups->groups[slot];
}

/*
 * Add sums to those of a group.
 */
void
abp_share_add(ShareGroups *groups, ShareSums *to, const ShareSums *sums)
{
	to->rows += sums->rows;
	to->unpriced += sums->unpriced;
	for (int i = 0; i < NUM_SHARE_TOKENS; i++)
		to->tokens[i] += sums->tokens[i];
	to->nanos += sums->nanos;
	to->cents += sums->cents;
	to->cents_scale = Max(to->cents_scale, sums->cents_scale);
	if (sums->more_cents != NULL)
	{
		MemoryContext old = MemoryContextSwitchTo(groups->context);

		to->more_cents = numeric_plus(sums->more_cents, to->more_cents == NULL ?
									  int64_to_numeric(0) : to->more_cents);
		MemoryContextSwitchTo(old);
	}
}

/* --- cents ----------------------------------------------------------------------- */

/* What ShareSums.cents has for 1 in the last of so many decimals. */
static int64
unit_of_scale(int scale)
{
	static const int64 powers_of_ten[SHARE_CENTS_SCALE + 1] = {
		1, 10, 100, 1000, 10000, 100000, 1000000, 10000000, 100000000, 1000000000,
		INT64CONST(10000000000), INT64CONST(100000000000), INT64CONST(1000000000000)
	};

	return powers_of_ten[SHARE_CENTS_SCALE - scale];
}

/* Cents x 10^cents_scale. */
static int128
scaled_cents(const ShareSums *sums)
{
	int64		unit = unit_of_scale(sums->cents_scale);

	if (sums->cents <= PG_INT64_MAX && sums->cents >= PG_INT64_MIN)
		return (int64) sums->cents / unit;	/* 128 bits are slow */
	return sums->cents / unit;
}

/* --- rows ------------------------------------------------------------------------ */

/*
 * The digits of a cost in cents, x 10^12.  Returns false for what has too many
 * of them, or is no number.
 */
static bool
read_cents(const char *text, int128 * value, int *scale)
{
	const char *p = text;
	bool		negative = *p == '-';
	bool		fits;
	int			ndigits = 0;
	bool		behind_point = false;

	*value = 0;
	*scale = 0;
	if (negative)
		p++;
	for (; *p != '\0' && ndigits < MAX_CENTS_DIGITS; p++)
	{
		if (*p == '.' && !behind_point)
		{
			behind_point = true;
			continue;
		}
		if (*p < '0' || *p > '9')
			break;
		*value = *value * 10 + (*p - '0');
		ndigits++;
		*scale += behind_point;
	}
	fits = *p == '\0' && *scale <= SHARE_CENTS_SCALE && ndigits - *scale <= MAX_CENTS_DIGITS - SHARE_CENTS_SCALE;
	if (!fits)
		return false;
	*value *= unit_of_scale(*scale);
	if (negative)
		*value = -*value;
	return true;
}

/*
 * Set the costs of sums, which had none, in the current memory context; "shown"
 * is "cents" as text.
 */
void
abp_share_set_cents(ShareSums *sums, Numeric cents, const char *shown)
{
	if (read_cents(shown, &sums->cents, &sums->cents_scale))
		return;
	sums->cents = 0;
	sums->cents_scale = 0;
	sums->more_cents = numeric_plus(cents, int64_to_numeric(0));
}

/*
 * What a row adds to the sums of its group; more_cents is in the current memory context.
 */
void
abp_share_sums_of_row(ShareSums *sums, const UsageRow *row)
{
	const int64 *count = row->counts.value;

	memset(sums, 0, sizeof(*sums));
	sums->rows = 1;
	sums->unpriced = row->has_cost_nanos ? 0 : 1;
	sums->tokens[SHARE_INPUT] = count[COUNT_INPUT];
	sums->tokens[SHARE_CACHE_READ] = count[COUNT_CACHE_READ];
	sums->tokens[SHARE_CACHE_WRITE] = (int128) count[COUNT_CACHE_WRITE] + count[COUNT_CACHE_WRITE_1H];
	sums->tokens[SHARE_OUTPUT] = count[COUNT_OUTPUT];
	sums->tokens[SHARE_REASONING] = count[COUNT_REASONING];
	if (row->has_cost_nanos)
		sums->nanos = row->cost_nanos;
	if (row->cost_cents != NULL)
		abp_share_set_cents(sums, row->cost_cents, row->cents_text);
}

/*
 * The sum of costs in cents, shown with as many decimals as the longest of
 * them; palloc'd.
 */
Numeric
abp_share_cents(const ShareSums *sums)
{
	Numeric		cents = abp_decimal_numeric(scaled_cents(sums), sums->cents_scale);

	return sums->more_cents == NULL ? cents : numeric_plus(cents, sums->more_cents);
}
