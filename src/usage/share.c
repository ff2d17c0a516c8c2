/*-------------------------------------------------------------------------
 *
 * share.c
 *	  What usage rows add up to, by day, customer, provider, model and event name.
 *
 * A batch's share of these sums is made while its request is written, and kept
 * as bytes: a version; the kinds of calls, which are the ends of keys (provider,
 * model and event name), each once; and each group's sums behind the rest of its
 * key and its kind.
 * Numbers have seven bits a byte, the lowest first; those that can be
 * negative have their sign in the lowest bit.  Nothing depends on the machine.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "common/hashfn.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/datetime.h"
#include "utils/timestamp.h"

#include "base/decimal.h"
#include "base/numeric_math.h"
#include "base/text_view.h"
#include "base/usage_row.h"
#include "compat.h"
#include "polar/event_format.h"
#include "polar/identity.h"
#include "polar/server.h"
#include "usage/share.h"

#define SHARE_VERSION 1

/* Decimals of ShareSums.cents. */
#define CENTS_SCALE 12

/* What has more digits is added up as numeric. */
#define MAX_CENTS_DIGITS 30

#define FIRST_SLOTS 64			/* a power of 2 */
#define MAX_NUMBER_BYTES 19		/* of 128 bits, seven a byte */

/* Flags of a key: which of its parts are not NULL. */
#define HAS_EXTERNAL_CUSTOMER 0x01
#define HAS_CUSTOMER 0x02
#define HAS_PROVIDER 0x04
#define HAS_MODEL 0x08
#define HAS_EVENT_NAME 0x10

/* --- numbers and texts as bytes -------------------------------------------------- */

/*
 * Seven bits a byte, the lowest first; the highest bit says that more follow.
 */
static void
put_unsigned(StringInfo to, uint128 value)
{
	char	   *at;
	uint64		low;

	if (to->maxlen - to->len <= MAX_NUMBER_BYTES)
		enlargeStringInfo(to, MAX_NUMBER_BYTES);
	at = to->data + to->len;
	for (; value > PG_UINT64_MAX; value >>= 7)
		*at++ = (char) (0x80 | (value & 0x7f));
	for (low = (uint64) value; low >= 0x80; low >>= 7)	/* 128 bits are slow */
		*at++ = (char) (0x80 | (low & 0x7f));
	*at++ = (char) low;
	to->len = at - to->data;
}

/* The sign goes lowest: numbers near 0 are short, negative ones, too. */
static void
put_signed(StringInfo to, int128 value)
{
	put_unsigned(to, value < 0 ? ((~(uint128) value) << 1) | 1 : (uint128) value << 1);
}

/* Bytes, after their length. */
static void
put_bytes(StringInfo to, const char *bytes, int len)
{
	put_unsigned(to, len);
	appendBinaryStringInfoNT(to, bytes, len);
}

/* Bytes that are being read; what ends too early raises an error. */
typedef struct ByteReader
{
	const char *at;
	const char *end;
} ByteReader;

static void
corrupted(void)
{
	ereport(ERROR,
			(errcode(ERRCODE_DATA_CORRUPTED),
			 errmsg("the sums of a batch in table aibilling.share cannot be read")));
}

/* The next bytes, where they lie. */
static const char *
get_bytes(ByteReader *reader, uint64 len)
{
	const char *bytes = reader->at;

	if (len > (uint64) (reader->end - reader->at))
		corrupted();
	reader->at += len;
	return bytes;
}

/* What put_unsigned has written. */
static uint128
get_unsigned(ByteReader *reader)
{
	uint128		value = 0;

	for (int shift = 0;; shift += 7)
	{
		unsigned char byte = *get_bytes(reader, 1);

		if (shift > 126 || (shift == 126 && byte > 3))
			corrupted();		/* more than 128 bits */
		value |= (uint128) (byte & 0x7f) << shift;
		if (byte < 0x80)
			return value;
	}
}

/* What put_signed has written. */
static int128
get_signed(ByteReader *reader)
{
	uint128		value = get_unsigned(reader);

	return (int128) ((value >> 1) ^ -(value & 1));
}

/* Bytes that put_bytes has written. */
static TextView
get_view(ByteReader *reader)
{
	uint64		len = (uint64) get_unsigned(reader);
	TextView	view = {get_bytes(reader, len), (int) len};

	return view;
}

/* --- keys -------------------------------------------------------------------- */

/* In UTF-8, whatever the database's encoding. */
static void
put_text(StringInfo to, TextView view)
{
	const char *utf8;
	int			len;

	if (view.data == NULL)
		return;
	utf8 = pg_server_to_any(view.data, view.len, PG_UTF8);
	len = utf8 == view.data ? view.len : strlen(utf8);
	put_bytes(to, utf8, len);
}

/*
 * Append a key as bytes: equal keys are equal bytes.
 */
void
abp_share_key_write(StringInfo to, const ShareKey *key)
{
	int			flags = 0;

	flags |= key->external_customer_id.data != NULL ? HAS_EXTERNAL_CUSTOMER : 0;
	flags |= key->customer_id != NULL ? HAS_CUSTOMER : 0;
	flags |= key->provider.data != NULL ? HAS_PROVIDER : 0;
	flags |= key->model.data != NULL ? HAS_MODEL : 0;
	flags |= key->event_name.data != NULL ? HAS_EVENT_NAME : 0;

	appendStringInfoCharMacro(to, (char) flags);
	put_signed(to, key->day);
	put_text(to, key->external_customer_id);
	if (key->customer_id != NULL)
		appendBinaryStringInfo(to, (const char *) key->customer_id, UUID_LEN);
	put_text(to, key->provider);
	put_text(to, key->model);
	put_text(to, key->event_name);
}

/*
 * What put_text has written, in the database's encoding; NULL if not present.
 */
static TextView
get_text(ByteReader *reader, bool present)
{
	TextView	view = {NULL, 0};
	const char *utf8;

	if (!present)
		return view;
	view = get_view(reader);
	utf8 = view.data;
	view.data = pg_any_to_server(utf8, view.len, PG_UTF8);
	if (view.data != utf8)
		view.len = strlen(view.data);
	return view;
}

/*
 * Read what abp_share_key_write has written.  Strings point into the key or,
 * converted to the database's encoding, into the current memory context; the
 * customer's UUID is copied to *uuid.
 */
void
abp_share_key_read(const char *key, int keylen, ShareKey *result, pg_uuid_t *uuid)
{
	ByteReader	reader = {key, key + keylen};
	int			flags = *get_bytes(&reader, 1);

	result->day = (DateADT) get_signed(&reader);
	result->external_customer_id = get_text(&reader, flags & HAS_EXTERNAL_CUSTOMER);
	result->customer_id = NULL;
	if (flags & HAS_CUSTOMER)
	{
		memcpy(uuid, get_bytes(&reader, UUID_LEN), UUID_LEN);
		result->customer_id = uuid;
	}
	result->provider = get_text(&reader, flags & HAS_PROVIDER);
	result->model = get_text(&reader, flags & HAS_MODEL);
	result->event_name = get_text(&reader, flags & HAS_EVENT_NAME);
}

/*
 * A key without what the sums by day and model are not kept by.
 */
ShareKey
abp_share_key_by_model(const ShareKey *key)
{
	return (ShareKey)
	{
		.day = key->day,.provider = key->provider,.model = key->model
	};
}

/*
 * Only the customer of a key, of day 0.
 */
ShareKey
abp_share_key_by_customer(const ShareKey *key)
{
	return (ShareKey)
	{
		.external_customer_id = key->external_customer_id,.customer_id = key->customer_id
	};
}

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
	static const int64 powers_of_ten[CENTS_SCALE + 1] = {
		1, 10, 100, 1000, 10000, 100000, 1000000, 10000000, 100000000, 1000000000,
		INT64CONST(10000000000), INT64CONST(100000000000), INT64CONST(1000000000000)
	};

	return powers_of_ten[CENTS_SCALE - scale];
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
read_cents(Numeric cents, int128 * value, int *scale)
{
	char	   *text = numeric_text(cents);
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
	fits = *p == '\0' && *scale <= CENTS_SCALE && ndigits - *scale <= MAX_CENTS_DIGITS - CENTS_SCALE;
	pfree(text);
	if (!fits)
		return false;
	*value *= unit_of_scale(*scale);
	if (negative)
		*value = -*value;
	return true;
}

/*
 * Set the costs of sums, which had none, in the current memory context.
 */
void
abp_share_set_cents(ShareSums *sums, Numeric cents)
{
	if (read_cents(cents, &sums->cents, &sums->cents_scale))
		return;
	sums->cents = 0;
	sums->cents_scale = 0;
	sums->more_cents = numeric_plus(cents, int64_to_numeric(0));
}

/*
 * The day of a time, UTC.
 */
DateADT
abp_share_day(TimestampTz time)
{
	if (TIMESTAMP_IS_NOBEGIN(time))
		return DATEVAL_NOBEGIN;
	if (TIMESTAMP_IS_NOEND(time))
		return DATEVAL_NOEND;
	return (DateADT) (time / USECS_PER_DAY - (time % USECS_PER_DAY < 0 ? 1 : 0));
}

/*
 * The first day of a day's month, or of one so many months later.
 */
DateADT
abp_share_month(DateADT day, int months_later)
{
	int			year;
	int			month;
	int			mday;

	if (DATE_NOT_FINITE(day))
		return day;
	j2date(day + POSTGRES_EPOCH_JDATE, &year, &month, &mday);
	return date2j(year, month + months_later, 1) - POSTGRES_EPOCH_JDATE;
}

/*
 * How rows of a table with this server become events, which says who a row's
 * customer is; without one (InvalidOid) as if it had no options.
 */
const EventFormat *
abp_share_format(Oid serverid)
{
	static const EventFormat plain = {.tag_prefix = ""};

	return OidIsValid(serverid) ? &abp_server_options(serverid)->format : &plain;
}

/*
 * By what a row is summed up: its customer as it is sent, or would be.  The
 * result points into the row and into *customer.
 */
void
abp_share_key_of_row(ShareKey *key, const UsageRow *row, const EventFormat *format,
					 EventCustomer *customer)
{
	abp_identity_customer(row, format, customer);
	key->day = abp_share_day(row->occurred_at);
	key->external_customer_id = customer->external_id;
	key->customer_id = customer->has_id ? &customer->id : NULL;
	key->provider = row->provider;
	key->model = row->model;
	key->event_name = row->event_name;
}

/*
 * What a row adds to the sums of its group.
 */
void
abp_share_sums_of_row(ShareGroups *groups, ShareSums *sums, const UsageRow *row)
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
	{
		MemoryContext old = MemoryContextSwitchTo(groups->context);

		abp_share_set_cents(sums, row->cost_cents);
		MemoryContextSwitchTo(old);
	}
}

/*
 * Note what a row adds to which group.
 */
void
abp_share_note(ShareGroups *groups, ShareNote *note, const UsageRow *row, const EventFormat *format)
{
	ShareKey	key;
	EventCustomer customer;
	ShareSums	sums;
	bool		fits = true;

	abp_share_key_of_row(&key, row, format, &customer);
	note->group = abp_share_group_of(groups, &key) - groups->groups;
	abp_share_sums_of_row(groups, &sums, row);

	note->unpriced = sums.unpriced != 0;
	note->cents_scale = sums.cents_scale;
	for (int i = 0; i < NUM_SHARE_TOKENS; i++)
	{
		note->tokens[i] = (int64) sums.tokens[i];
		fits &= note->tokens[i] == sums.tokens[i];
	}
	note->nanos = (int64) sums.nanos;
	note->cents = (int64) sums.cents;
	fits &= note->cents == sums.cents && sums.more_cents == NULL;
	note->sums = NULL;
	if (!fits)
		note->sums = memcpy(MemoryContextAlloc(groups->context, sizeof(sums)), &sums, sizeof(sums));
}

/*
 * Add what a row adds to its group.
 */
void
abp_share_add_note(ShareGroups *groups, const ShareNote *note)
{
	ShareSums  *to = &groups->groups[note->group].sums;

	if (note->sums != NULL)
	{
		abp_share_add(groups, to, note->sums);
		return;
	}
	to->rows++;
	to->unpriced += note->unpriced;
	for (int i = 0; i < NUM_SHARE_TOKENS; i++)
		to->tokens[i] += note->tokens[i];
	to->nanos += note->nanos;
	to->cents += note->cents;
	to->cents_scale = Max(to->cents_scale, note->cents_scale);
}

/* --- shares as bytes -------------------------------------------------------------- */

/* How long is a key without its end? */
static int
length_before_kind(const char *key, int keylen)
{
	ByteReader	reader = {key, key + keylen};
	int			flags = *get_bytes(&reader, 1);

	(void) get_signed(&reader);
	if (flags & HAS_EXTERNAL_CUSTOMER)
		(void) get_bytes(&reader, (uint64) get_unsigned(&reader));
	if (flags & HAS_CUSTOMER)
		(void) get_bytes(&reader, UUID_LEN);
	return reader.at - key;
}

/* The sums of a group, to be read by get_sums. */
static void
put_sums(StringInfo to, const ShareSums *sums)
{
	const char *more = sums->more_cents == NULL ? "" : numeric_text(sums->more_cents);

	put_unsigned(to, sums->rows);
	put_unsigned(to, sums->unpriced);
	for (int t = 0; t < NUM_SHARE_TOKENS; t++)
		put_signed(to, sums->tokens[t]);
	put_signed(to, sums->nanos);
	put_signed(to, scaled_cents(sums));
	put_unsigned(to, sums->cents_scale);
	put_bytes(to, more, strlen(more));
}

/*
 * The sums as bytes, palloc'd.  Groups of no rows are left out.
 */
bytea	   *
abp_share_encode(const ShareGroups *groups)
{
	ShareGroups kinds;
	StringInfoData sums;
	StringInfoData to;
	int			used = 0;

	abp_share_init(&kinds, CurrentMemoryContext);
	initStringInfo(&sums);
	for (int i = 0; i < groups->ngroups; i++)
	{
		const ShareGroup *group = &groups->groups[i];
		int			before;
		ShareGroup *kind;

		if (group->sums.rows == 0)
			continue;
		before = length_before_kind(group->key, group->keylen);
		kind = abp_share_group(&kinds, group->key + before, group->keylen - before);
		put_bytes(&sums, group->key, before);
		put_unsigned(&sums, kind - kinds.groups);
		put_sums(&sums, &group->sums);
		used++;
	}

	initStringInfo(&to);
	appendStringInfoSpaces(&to, VARHDRSZ);
	put_unsigned(&to, SHARE_VERSION);
	put_unsigned(&to, kinds.ngroups);
	for (int i = 0; i < kinds.ngroups; i++)
		put_bytes(&to, kinds.groups[i].key, kinds.groups[i].keylen);
	put_unsigned(&to, used);
	appendBinaryStringInfoNT(&to, sums.data, sums.len);
	SET_VARSIZE(to.data, to.len);
	return (bytea *) to.data;
}

/* What put_sums has written; more_cents is palloc'd. */
static void
get_sums(ByteReader *reader, ShareSums *sums)
{
	TextView	more;

	memset(sums, 0, sizeof(*sums));
	sums->rows = (int64) get_unsigned(reader);
	sums->unpriced = (int64) get_unsigned(reader);
	for (int t = 0; t < NUM_SHARE_TOKENS; t++)
		sums->tokens[t] = get_signed(reader);
	sums->nanos = get_signed(reader);
	sums->cents = get_signed(reader);
	sums->cents_scale = (int) get_unsigned(reader);
	if (sums->cents_scale < 0 || sums->cents_scale > CENTS_SCALE)
		corrupted();
	sums->cents *= unit_of_scale(sums->cents_scale);
	more = get_view(reader);
	if (more.len > 0)
		sums->more_cents = numeric_of_text(pnstrdup(more.data, more.len));
}

/*
 * Hand each group of a share to a reader, with a key that lives as long as the call.
 */
void
abp_share_decode(bytea *share, ShareReader reader, void *arg)
{
	ByteReader	bytes = {VARDATA_ANY(share), VARDATA_ANY(share) + VARSIZE_ANY_EXHDR(share)};
	uint64		nkinds;
	TextView   *kinds;
	uint64		ngroups;
	StringInfoData key;

	if (get_unsigned(&bytes) != SHARE_VERSION)
		corrupted();
	nkinds = (uint64) get_unsigned(&bytes);
	if (nkinds > (uint64) (bytes.end - bytes.at))
		corrupted();
	kinds = palloc(sizeof(TextView) * Max(nkinds, 1));
	for (uint64 i = 0; i < nkinds; i++)
		kinds[i] = get_view(&bytes);

	initStringInfo(&key);
	ngroups = (uint64) get_unsigned(&bytes);
	for (uint64 i = 0; i < ngroups; i++)
	{
		TextView	before = get_view(&bytes);
		uint64		kind = (uint64) get_unsigned(&bytes);
		ShareSums	sums;

		CHECK_FOR_INTERRUPTS();

		if (kind >= nkinds)
			corrupted();
		resetStringInfo(&key);
		appendBinaryStringInfo(&key, before.data, before.len);
		appendBinaryStringInfo(&key, kinds[kind].data, kinds[kind].len);
		get_sums(&bytes, &sums);
		reader(key.data, key.len, &sums, arg);
	}
	pfree(key.data);
	pfree(kinds);
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
