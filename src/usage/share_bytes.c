/*-------------------------------------------------------------------------
 *
 * share_bytes.c
 *	  What the rows of a batch add to the sums, as bytes.
 *
 * What a batch adds to the sums is written while its request is, row by row; who
 * reads it adds the rows up, with those of other batches.  It has a version; the
 * kinds of calls, which are the ends of keys (day, provider, model and event
 * name), each once; and each row: its flags, its kind, its customer and numbers.
 * Numbers have seven bits a byte, the lowest first; those that can be negative
 * have their sign in the lowest bit.  Nothing depends on the machine.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "common/hashfn.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "utils/builtins.h"

#include "base/numeric_math.h"
#include "base/text_view.h"
#include "base/usage_row.h"
#include "compat.h"
#include "polar/event_format.h"
#include "polar/identity.h"
#include "usage/share.h"

#define SHARE_VERSION 1

#define FIRST_KINDS 16
#define MAX_NUMBER_BYTES 19		/* of 128 bits, seven a byte */

/* Flags of a key: which of its parts are not NULL. */
#define HAS_EXTERNAL_CUSTOMER 0x01
#define HAS_CUSTOMER 0x02
#define HAS_PROVIDER 0x04
#define HAS_MODEL 0x08
#define HAS_EVENT_NAME 0x10

/* Flags of a row, besides those of its customer. */
#define CUSTOMER_FLAGS (HAS_EXTERNAL_CUSTOMER | HAS_CUSTOMER)
#define IS_UNPRICED 0x04
#define CENTS_ARE_NANOS 0x08	/* cents x 10^12 are nanos x CENTS_OF_NANO */
#define HAS_MORE_CENTS 0x10

#define CENTS_OF_NANO 100000

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

/* Which parts of a key's customer are not NULL. */
static int
customer_flags(const ShareKey *key)
{
	return (key->external_customer_id.data != NULL ? HAS_EXTERNAL_CUSTOMER : 0) |
		(key->customer_id != NULL ? HAS_CUSTOMER : 0);
}

static void
put_customer(StringInfo to, const ShareKey *key)
{
	put_text(to, key->external_customer_id);
	if (key->customer_id != NULL)
		appendBinaryStringInfoNT(to, (const char *) key->customer_id, UUID_LEN);
}

/* The same of its kind of call. */
static int
kind_flags(const ShareKey *key)
{
	return (key->provider.data != NULL ? HAS_PROVIDER : 0) |
		(key->model.data != NULL ? HAS_MODEL : 0) |
		(key->event_name.data != NULL ? HAS_EVENT_NAME : 0);
}

static void
put_kind(StringInfo to, const ShareKey *key)
{
	put_signed(to, key->day);
	put_text(to, key->provider);
	put_text(to, key->model);
	put_text(to, key->event_name);
}

/*
 * Append a key as bytes: equal keys are equal bytes.
 */
void
abp_share_key_write(StringInfo to, const ShareKey *key)
{
	int			flags = customer_flags(key) | kind_flags(key);

	appendStringInfoCharMacro(to, (char) flags);
	put_customer(to, key);
	put_kind(to, key);
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

	result->external_customer_id = get_text(&reader, flags & HAS_EXTERNAL_CUSTOMER);
	result->customer_id = NULL;
	if (flags & HAS_CUSTOMER)
	{
		memcpy(uuid, get_bytes(&reader, UUID_LEN), UUID_LEN);
		result->customer_id = uuid;
	}
	result->day = (DateADT) get_signed(&reader);
	result->provider = get_text(&reader, flags & HAS_PROVIDER);
	result->model = get_text(&reader, flags & HAS_MODEL);
	result->event_name = get_text(&reader, flags & HAS_EVENT_NAME);
}

/* --- rows of a batch --------------------------------------------------------- */

/* A kind of call, which its rows name by a number. */
typedef struct ShareKind
{
	ShareKey	key;			/* without a customer */
	uint32		hash;
	char		status;			/* simplehash's own */
	int			number;
} ShareKind;

static inline uint32
hash_of_part(TextView part)
{
	return part.data == NULL ? 0 : hash_bytes((const unsigned char *) part.data, part.len);
}

static inline uint32
hash_of_kind(const ShareKey *key)
{
	uint32		hash = hash_combine(murmurhash32((uint32) key->day), hash_of_part(key->model));

	return hash_combine(hash_combine(hash, hash_of_part(key->provider)), hash_of_part(key->event_name));
}

/* Are these parts of keys the same?  NULL is not an empty string. */
static inline bool
same_part(TextView a, TextView b)
{
	return (a.data == NULL) == (b.data == NULL) && text_view_equal(a, b);
}

static inline bool
same_kind(const ShareKey *a, const ShareKey *b)
{
	return a->day == b->day && same_part(a->model, b->model) &&
		same_part(a->provider, b->provider) && same_part(a->event_name, b->event_name);
}

#define SH_PREFIX share_kinds
#define SH_ELEMENT_TYPE ShareKind
#define SH_KEY_TYPE ShareKey
#define SH_KEY key
#define SH_HASH_KEY(tb, key) hash_of_kind(&(key))
#define SH_EQUAL(tb, a, b) same_kind(&(a), &(b))
#define SH_STORE_HASH
#define SH_GET_HASH(tb, kind) ((kind)->hash)
#define SH_SCOPE static inline
#define SH_DECLARE
#define SH_DEFINE
#include "lib/simplehash.h"

/*
 * Begin with no rows, all of them in "context".
 */
void
abp_share_rows_init(ShareRows *rows, MemoryContext context)
{
	MemoryContext old = MemoryContextSwitchTo(context);

	memset(rows, 0, sizeof(*rows));
	rows->context = context;
	rows->kinds = share_kinds_create(context, FIRST_KINDS, NULL);
	initStringInfo(&rows->bytes);
	MemoryContextSwitchTo(old);
}

static TextView
copy_part(TextView part, MemoryContext context)
{
	return part.data == NULL ? part : abp_text_view_copy(part, context);
}

/* The number of a key's kind of call. */
static int
kind_of(ShareRows *rows, const ShareKey *key)
{
	bool		found;
	ShareKind  *kind = share_kinds_insert(rows->kinds, *key, &found);

	if (!found)
	{
		kind->number = rows->kinds->members - 1;
		kind->key = (ShareKey)
		{
			.day = key->day,
				.provider = copy_part(key->provider, rows->context),
				.model = copy_part(key->model, rows->context),
				.event_name = copy_part(key->event_name, rows->context)
		};
	}
	return kind->number;
}

/* What a row adds to the sums, to be read by get_sums, which is given the flags. */
static void
put_sums(StringInfo to, const ShareSums *sums, int flags)
{
	for (int t = 0; t < NUM_SHARE_TOKENS; t++)
		put_signed(to, sums->tokens[t]);
	put_signed(to, sums->nanos);
	put_unsigned(to, sums->cents_scale);
	if ((flags & CENTS_ARE_NANOS) == 0)
		put_signed(to, sums->cents);
	if (flags & HAS_MORE_CENTS)
	{
		const char *more = numeric_text(sums->more_cents);

		put_bytes(to, more, strlen(more));
	}
}

/*
 * Add the row of an index: the next one, or one that takes the place of that and
 * of all behind it.
 */
void
abp_share_rows_add(ShareRows *rows, int index, const UsageRow *row, const EventFormat *format)
{
	StringInfo	to = &rows->bytes;
	ShareKey	key;
	EventCustomer customer;
	ShareSums	sums;
	int			flags;

	if (index == rows->max_ends)
	{
		rows->max_ends = Max(64, rows->max_ends * 2);
		rows->ends = rows->ends == NULL ?
			MemoryContextAlloc(rows->context, sizeof(int) * rows->max_ends) :
			repalloc(rows->ends, sizeof(int) * rows->max_ends);
	}
	rows->nrows = index + 1;
	to->len = index == 0 ? 0 : rows->ends[index - 1];

	abp_share_key_of_row(&key, row, format, &customer);
	abp_share_sums_of_row(&sums, row);
	flags = customer_flags(&key) | (sums.unpriced > 0 ? IS_UNPRICED : 0) |
		(sums.cents == sums.nanos * CENTS_OF_NANO ? CENTS_ARE_NANOS : 0) |
		(sums.more_cents != NULL ? HAS_MORE_CENTS : 0);
	appendStringInfoCharMacro(to, (char) flags);
	put_unsigned(to, kind_of(rows, &key));
	put_customer(to, &key);
	put_sums(to, &sums, flags);
	rows->ends[index] = to->len;
}

/*
 * A batch's rows as bytes, palloc'd, but for those to skip; NULL: none.
 */
bytea	   *
abp_share_encode(const ShareRows *rows, const bool *skip)
{
	const ShareKey **kinds;
	share_kinds_iterator iterator;
	const ShareKind *kind;
	StringInfoData bytes;
	StringInfoData to;
	int			nrows = 0;
	int			begin = 0;

	for (int i = 0; i < rows->nrows; i++)
		nrows += skip == NULL || !skip[i];

	initStringInfo(&bytes);
	initStringInfo(&to);
	enlargeStringInfo(&to, rows->bytes.len);
	appendStringInfoSpaces(&to, VARHDRSZ);
	put_unsigned(&to, SHARE_VERSION);
	put_unsigned(&to, rows->kinds->members);
	kinds = palloc(sizeof(ShareKey *) * Max(1, rows->kinds->members));
	share_kinds_start_iterate(rows->kinds, &iterator);
	while ((kind = share_kinds_iterate(rows->kinds, &iterator)) != NULL)
		kinds[kind->number] = &kind->key;
	for (int i = 0; i < rows->kinds->members; i++)
	{
		resetStringInfo(&bytes);
		appendStringInfoCharMacro(&bytes, (char) kind_flags(kinds[i]));
		put_kind(&bytes, kinds[i]);
		put_bytes(&to, bytes.data, bytes.len);
	}
	put_unsigned(&to, nrows);
	for (int i = 0; i < rows->nrows && skip != NULL; i++)
	{
		if (!skip[i])
			appendBinaryStringInfoNT(&to, rows->bytes.data + begin, rows->ends[i] - begin);
		begin = rows->ends[i];
	}
	if (skip == NULL && nrows > 0)
		appendBinaryStringInfoNT(&to, rows->bytes.data, rows->ends[nrows - 1]);
	pfree(bytes.data);
	pfree(kinds);
	SET_VARSIZE(to.data, to.len);
	return (bytea *) to.data;
}

/* What put_sums has written; more_cents is palloc'd. */
static void
get_sums(ByteReader *reader, ShareSums *sums, int flags)
{
	memset(sums, 0, sizeof(*sums));
	sums->rows = 1;
	sums->unpriced = flags & IS_UNPRICED ? 1 : 0;
	for (int t = 0; t < NUM_SHARE_TOKENS; t++)
		sums->tokens[t] = get_signed(reader);
	sums->nanos = get_signed(reader);
	sums->cents_scale = (int) get_unsigned(reader);
	if (sums->cents_scale < 0 || sums->cents_scale > SHARE_CENTS_SCALE)
		corrupted();
	sums->cents = flags & CENTS_ARE_NANOS ? sums->nanos * CENTS_OF_NANO : get_signed(reader);
	if (flags & HAS_MORE_CENTS)
	{
		TextView	more = get_view(reader);

		sums->more_cents = numeric_of_text(pnstrdup(more.data, more.len));
	}
}

/*
 * Hand each row of a batch to a reader, with a key that lives as long as the call.
 */
void
abp_share_decode(bytea *share, ShareReader reader, void *arg)
{
	ByteReader	bytes = {VARDATA_ANY(share), VARDATA_ANY(share) + VARSIZE_ANY_EXHDR(share)};
	uint64		nkinds;
	TextView   *kinds;
	uint64		nrows;
	StringInfoData key;

	if (get_unsigned(&bytes) != SHARE_VERSION)
		corrupted();
	nkinds = (uint64) get_unsigned(&bytes);
	if (nkinds > (uint64) (bytes.end - bytes.at))
		corrupted();
	kinds = palloc(sizeof(TextView) * Max(nkinds, 1));
	for (uint64 i = 0; i < nkinds; i++)
	{
		kinds[i] = get_view(&bytes);
		if (kinds[i].len == 0)
			corrupted();
	}

	initStringInfo(&key);
	nrows = (uint64) get_unsigned(&bytes);
	for (uint64 i = 0; i < nrows; i++)
	{
		int			flags = *get_bytes(&bytes, 1);
		uint64		kind = (uint64) get_unsigned(&bytes);
		const char *customer = bytes.at;
		ShareSums	sums;

		CHECK_FOR_INTERRUPTS();

		if (kind >= nkinds)
			corrupted();
		if (flags & HAS_EXTERNAL_CUSTOMER)
			(void) get_view(&bytes);
		if (flags & HAS_CUSTOMER)
			(void) get_bytes(&bytes, UUID_LEN);
		resetStringInfo(&key);
		appendStringInfoCharMacro(&key, (char) ((flags & CUSTOMER_FLAGS) | kinds[kind].data[0]));
		appendBinaryStringInfoNT(&key, customer, bytes.at - customer);
		appendBinaryStringInfoNT(&key, kinds[kind].data + 1, kinds[kind].len - 1);
		get_sums(&bytes, &sums, flags);
		reader(key.data, key.len, &sums, arg);
	}
	pfree(key.data);
	pfree(kinds);
}
