/*-------------------------------------------------------------------------
 *
 * share_bytes.c
 *	  What the rows of a batch add to the sums, as bytes.
 *
 * What a batch adds to the sums is written while its request is, row by row; who
 * reads it adds the rows up, with those of other batches.  It has
 *
 *		a version;
 *		the external customer of the first row, which the others' often begin as;
 *		the kinds of calls, which are the ends of keys, each once;
 *		each row: its flags, its kind, its customer and what it adds.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "common/hashfn.h"
#include "miscadmin.h"

#include "base/bytes.h"
#include "base/numeric_math.h"
#include "polar/identity.h"
#include "usage/share_bytes.h"
#include "usage/share_key.h"

#define SHARE_VERSION 1

#define FIRST_KINDS 16

/* Flags of a row, besides those of its customer (share_key.h). */
#define IS_UNPRICED 0x04
#define CENTS_ARE_NANOS 0x08	/* cents x 10^12 are nanos x CENTS_OF_NANO */
#define HAS_MORE_CENTS 0x10
#define HAS_CACHE_READ 0x20		/* these tokens are not 0 */
#define HAS_CACHE_WRITE 0x40
#define HAS_REASONING 0x80

#define CENTS_OF_NANO 100000

/* By which flag a row says that it has these tokens; 0: all rows do. */
static const int token_flags[NUM_SHARE_TOKENS] = {
	[SHARE_CACHE_READ] = HAS_CACHE_READ,
	[SHARE_CACHE_WRITE] = HAS_CACHE_WRITE,
	[SHARE_REASONING] = HAS_REASONING
};

/* --- kinds of calls ---------------------------------------------------------- */

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

/* All of them, in the order of their numbers. */
static void
put_kinds(StringInfo to, const ShareRows *rows)
{
	const ShareKey **keys = palloc(sizeof(ShareKey *) * Max(1, rows->kinds->members));
	share_kinds_iterator iterator;
	const ShareKind *kind;
	StringInfoData bytes;

	share_kinds_start_iterate(rows->kinds, &iterator);
	while ((kind = share_kinds_iterate(rows->kinds, &iterator)) != NULL)
		keys[kind->number] = &kind->key;

	initStringInfo(&bytes);
	abp_bytes_put_unsigned(to, rows->kinds->members);
	for (int i = 0; i < rows->kinds->members; i++)
	{
		resetStringInfo(&bytes);
		appendStringInfoCharMacro(&bytes, (char) abp_share_key_kind_flags(keys[i]));
		abp_share_key_put_kind(&bytes, keys[i]);
		abp_bytes_put_string(to, bytes.data, bytes.len);
	}
	pfree(bytes.data);
	pfree(keys);
}

/* What put_kinds has written, palloc'd; the kinds as they lie. */
static TextView *
get_kinds(ByteReader *reader, uint64 *nkinds)
{
	TextView   *kinds;

	*nkinds = (uint64) abp_bytes_get_unsigned(reader);
	if (*nkinds > (uint64) (reader->end - reader->at))
		abp_bytes_corrupted(reader);
	kinds = palloc(sizeof(TextView) * Max(*nkinds, 1));
	for (uint64 i = 0; i < *nkinds; i++)
	{
		kinds[i] = abp_bytes_get_string(reader);
		if (kinds[i].len == 0)
			abp_bytes_corrupted(reader);
	}
	return kinds;
}

/* --- customers ----------------------------------------------------------------- */

/* In how many bytes do strings begin the same? */
static int
common_prefix(TextView a, TextView b)
{
	int			max = Min(a.len, b.len);
	int			len = 0;

	while (len < max && a.data[len] == b.data[len])
		len++;
	return len;
}

/* A row's customer; an external one by what it has behind that of the first row. */
static void
put_customer(StringInfo to, const ShareKey *key, TextView first)
{
	if (key->external_customer_id.data != NULL)
	{
		TextView	customer = abp_share_key_utf8(key->external_customer_id);
		int			prefix = common_prefix(customer, first);

		abp_bytes_put_unsigned(to, prefix);
		abp_bytes_put_string(to, customer.data + prefix, customer.len - prefix);
	}
	if (key->customer_id != NULL)
		appendBinaryStringInfoNT(to, (const char *) key->customer_id, UUID_LEN);
}

/* What put_customer has written, as a key has it. */
static void
get_customer(ByteReader *reader, int flags, TextView first, StringInfo key)
{
	if (flags & HAS_EXTERNAL_CUSTOMER)
	{
		uint64		prefix = (uint64) abp_bytes_get_unsigned(reader);
		TextView	rest = abp_bytes_get_string(reader);

		if (prefix > (uint64) first.len)
			abp_bytes_corrupted(reader);
		abp_bytes_put_unsigned(key, prefix + rest.len);
		appendBinaryStringInfoNT(key, first.data, (int) prefix);
		appendBinaryStringInfoNT(key, rest.data, rest.len);
	}
	if (flags & HAS_CUSTOMER)
		appendBinaryStringInfoNT(key, abp_bytes_get(reader, UUID_LEN), UUID_LEN);
}

/* --- sums -------------------------------------------------------------------- */

/* Which of its sums a row has. */
static int
sum_flags(const ShareSums *sums)
{
	int			flags = (sums->unpriced > 0 ? IS_UNPRICED : 0) |
	(sums->cents == sums->nanos * CENTS_OF_NANO ? CENTS_ARE_NANOS : 0) |
	(sums->more_cents != NULL ? HAS_MORE_CENTS : 0);

	for (int t = 0; t < NUM_SHARE_TOKENS; t++)
	{
		if (sums->tokens[t] != 0)
			flags |= token_flags[t];
	}
	return flags;
}

/* What a row adds to the sums, to be read by get_sums, which is given the flags. */
static void
put_sums(StringInfo to, const ShareSums *sums, int flags)
{
	for (int t = 0; t < NUM_SHARE_TOKENS; t++)
	{
		if (token_flags[t] == 0 || (flags & token_flags[t]))
			abp_bytes_put_signed(to, sums->tokens[t]);
	}
	abp_bytes_put_signed(to, sums->nanos);
	abp_bytes_put_unsigned(to, sums->cents_scale);
	if ((flags & CENTS_ARE_NANOS) == 0)
		abp_bytes_put_signed(to, sums->cents);
	if (flags & HAS_MORE_CENTS)
	{
		const char *more = numeric_text(sums->more_cents);

		abp_bytes_put_string(to, more, strlen(more));
	}
}

/* What put_sums has written; more_cents is palloc'd. */
static void
get_sums(ByteReader *reader, ShareSums *sums, int flags)
{
	memset(sums, 0, sizeof(*sums));
	sums->rows = 1;
	sums->unpriced = flags & IS_UNPRICED ? 1 : 0;
	for (int t = 0; t < NUM_SHARE_TOKENS; t++)
	{
		if (token_flags[t] == 0 || (flags & token_flags[t]))
			sums->tokens[t] = abp_bytes_get_signed(reader);
	}
	sums->nanos = abp_bytes_get_signed(reader);
	sums->cents_scale = (int) abp_bytes_get_unsigned(reader);
	if (sums->cents_scale < 0 || sums->cents_scale > SHARE_CENTS_SCALE)
		abp_bytes_corrupted(reader);
	sums->cents = flags & CENTS_ARE_NANOS ? sums->nanos * CENTS_OF_NANO : abp_bytes_get_signed(reader);
	if (flags & HAS_MORE_CENTS)
	{
		TextView	more = abp_bytes_get_string(reader);

		sums->more_cents = numeric_of_text(pnstrdup(more.data, more.len));
	}
}

/* --- rows of a batch --------------------------------------------------------- */

/*
 * Begin with no rows, all of them in "context".
 */
void
abp_share_rows_init(ShareRows *rows, MemoryContext context)
{
	MemoryContext old = MemoryContextSwitchTo(context);

	memset(rows, 0, sizeof(*rows));
	rows->context = context;
	rows->first_customer = text_view_of("");
	rows->kinds = share_kinds_create(context, FIRST_KINDS, NULL);
	initStringInfo(&rows->bytes);
	MemoryContextSwitchTo(old);
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

	abp_share_key_of_row(&key, row, format, &customer);
	abp_share_sums_of_row(&sums, row);

	if (index == 0 && key.external_customer_id.data != NULL)
		rows->first_customer = abp_text_view_copy(abp_share_key_utf8(key.external_customer_id),
												  rows->context);
	if (index == rows->max_ends)
	{
		rows->max_ends = Max(64, rows->max_ends * 2);
		rows->ends = rows->ends == NULL ?
			MemoryContextAlloc(rows->context, sizeof(int) * rows->max_ends) :
			repalloc(rows->ends, sizeof(int) * rows->max_ends);
	}
	rows->nrows = index + 1;
	to->len = index == 0 ? 0 : rows->ends[index - 1];

	flags = abp_share_key_customer_flags(&key) | sum_flags(&sums);
	appendStringInfoCharMacro(to, (char) flags);
	abp_bytes_put_unsigned(to, kind_of(rows, &key));
	put_customer(to, &key, rows->first_customer);
	put_sums(to, &sums, flags);
	rows->ends[index] = to->len;
}

/*
 * A batch's rows as bytes, palloc'd, but for those to skip; NULL: none.
 */
bytea	   *
abp_share_encode(const ShareRows *rows, const bool *skip)
{
	StringInfoData to;
	int			nrows = 0;
	int			begin = 0;

	for (int i = 0; i < rows->nrows; i++)
		nrows += skip == NULL || !skip[i];

	initStringInfo(&to);
	enlargeStringInfo(&to, rows->bytes.len);
	appendStringInfoSpaces(&to, VARHDRSZ);
	abp_bytes_put_unsigned(&to, SHARE_VERSION);
	abp_bytes_put_string(&to, rows->first_customer.data, rows->first_customer.len);
	put_kinds(&to, rows);
	abp_bytes_put_unsigned(&to, nrows);
	for (int i = 0; i < rows->nrows && skip != NULL; i++)
	{
		if (!skip[i])
			appendBinaryStringInfoNT(&to, rows->bytes.data + begin, rows->ends[i] - begin);
		begin = rows->ends[i];
	}
	if (skip == NULL && nrows > 0)
		appendBinaryStringInfoNT(&to, rows->bytes.data, rows->ends[nrows - 1]);
	SET_VARSIZE(to.data, to.len);
	return (bytea *) to.data;
}

/*
 * Hand the rows of a batch, as it is stored, to a reader, with a key that lives as
 * long as the call: those behind the first *nread, until it wants no more.  *nread
 * becomes how many have been read by now.  Returns whether that is all of them.
 */
bool
abp_share_decode(bytea *share, int *nread, ShareReader reader, void *arg)
{
	bytea	   *plain = DatumGetByteaPP(PointerGetDatum(share));
	ByteReader	bytes = {
		VARDATA_ANY(plain), VARDATA_ANY(plain) + VARSIZE_ANY_EXHDR(plain),
		"the sums of a batch in table aibilling.share"
	};
	bool		wants_more = true;
	TextView	first_customer;
	uint64		nkinds;
	TextView   *kinds;
	uint64		nrows;
	uint64		row = 0;
	StringInfoData key;

	if (abp_bytes_get_unsigned(&bytes) != SHARE_VERSION)
		abp_bytes_corrupted(&bytes);
	first_customer = abp_bytes_get_string(&bytes);
	kinds = get_kinds(&bytes, &nkinds);
	nrows = (uint64) abp_bytes_get_unsigned(&bytes);

	initStringInfo(&key);
	for (; row < nrows && wants_more; row++)
	{
		unsigned char flags = *abp_bytes_get(&bytes, 1);
		uint64		kind = (uint64) abp_bytes_get_unsigned(&bytes);
		ShareSums	sums;

		CHECK_FOR_INTERRUPTS();

		if (kind >= nkinds)
			abp_bytes_corrupted(&bytes);
		resetStringInfo(&key);
		appendStringInfoCharMacro(&key, (char) ((flags & CUSTOMER_FLAGS) | kinds[kind].data[0]));
		get_customer(&bytes, flags, first_customer, &key);
		appendBinaryStringInfoNT(&key, kinds[kind].data + 1, kinds[kind].len - 1);
		get_sums(&bytes, &sums, flags);
		if (row >= (uint64) *nread)
			wants_more = reader(key.data, key.len, &sums, arg);
	}
	pfree(key.data);
	pfree(kinds);
	if (plain != share)
		pfree(plain);
	*nread = (int) row;
	return row == nrows;
}
