/*-------------------------------------------------------------------------
 *
 * polar.c
 *	  Polar's Events Ingest API: a usage row as an event, an answer as a verdict.
 *
 * Pure: no I/O, no SPI, no catalogue access (but for the conversion of text
 * in databases whose encoding is not UTF8).
 *
 * The rules for events are those of the schemas of POST /v1/events/ingest
 * (server/polar/event/schemas.py of polarsource/polar) and the limits that
 * its documentation states for metadata.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <ctype.h>
#include <math.h>

#include "common/int.h"
#include "mb/pg_wchar.h"
#include "utils/builtins.h"
#include "utils/datetime.h"
#include "utils/memutils.h"

#include "compat.h"
#include "polar/polar.h"

/* Polar's limits: characters are code points. */
#define MAX_NAME_CHARS		128
#define MAX_VALUE_CHARS		500
#define MAX_KEY_CHARS		40
#define MAX_METADATA_KEYS	50

/*
 * Polar indexes the ids and fails on values that do not fit an index page;
 * ours are kept far below.
 */
#define MAX_ID_BYTES		255

/* An amount in cents: digits before and after the point, significant ones. */
#define MAX_AMOUNT_WHOLE	5
#define MAX_AMOUNT_DECIMALS	12
#define MAX_AMOUNT_DIGITS	15

/* Below the limit as it is, but not as Polar stores it. */
#define AMOUNT_ROUNDS_UP \
	"%s must be below 99,999.99999999995 in magnitude: Polar keeps 15 digits, by which it would be 100,000 (1,000 USD), which Polar refuses"

/* |cost_nanos| up to here is surely below 100,000 cents. */
#define SAFE_COST_NANOS		INT64CONST(999999999998)

/* Julian days of 0001-01-01 and 9999-12-31 */
#define FIRST_DAY			1721426
#define LAST_DAY			5373484

/* How much of the user's own text a reason repeats. */
#define MAX_QUOTED_BYTES	40

#define DEFAULT_EVENT_NAME	"llm_usage"

/* ---------------------------------------------------------------------
 * Rows into events
 * ---------------------------------------------------------------------
 */

/*
 * Where an event goes.  The same code checks rows and encodes them, so that
 * the two can never disagree: a check is an encoding without a body.
 */
typedef struct EventWriter
{
	StringInfo	body;			/* NULL: check only */
	StringInfo	reason;
	int			nkeys;			/* metadata keys so far */
	bool		convert;		/* the database's encoding is not UTF8 */
	bool		invalid_text;	/* a string cannot be written as UTF-8 */
} EventWriter;

typedef enum IdentityKind
{
	IDENTITY_NONE,
	IDENTITY_CUSTOMER,			/* Polar's own customer id */
	IDENTITY_EXTERNAL			/* the application's customer id */
} IdentityKind;

typedef struct Identity
{
	IdentityKind kind;
	pg_uuid_t	customer_id;	/* IDENTITY_CUSTOMER */
	TextView	external;		/* IDENTITY_EXTERNAL */
	char		number[MAX_ID_BYTES + 1];	/* what external points to if the
											 * tag is a number */
} Identity;

/* The original's lists: the first tag that is not null decides. */
static const char *const customer_id_keys[] = {
	"customerId", "polarCustomerId", "customer_id", NULL
};
static const char *const external_customer_id_keys[] = {
	"userId", "externalId", "user_id", NULL
};

/* Metadata keys that are ours: a tag never takes their place. */
static const TextView own_keys[] = {
#define OWN_KEY(name) {name, sizeof(name) - 1}
	OWN_KEY("generation_id"), OWN_KEY("model_id"), OWN_KEY("provider"),
	OWN_KEY("sub_provider"), OWN_KEY("input_tokens"), OWN_KEY("output_tokens"),
	OWN_KEY("total_tokens"), OWN_KEY("reasoning_tokens"),
	OWN_KEY("cache_read_tokens"), OWN_KEY("cache_write_tokens"),
	OWN_KEY("cache_write_1h_tokens"), OWN_KEY("request_count"),
	OWN_KEY("web_search_count"), OWN_KEY("raw_provider_cost"),
	OWN_KEY("cost_nanos"), OWN_KEY("cost_currency"), OWN_KEY("external_id"),
	OWN_KEY("_cost"), OWN_KEY("_llm")
#undef OWN_KEY
};

/* Two decimal digits for each number below 100. */
static const char digit_pairs[] =
"00010203040506070809101112131415161718192021222324"
"25262728293031323334353637383940414243444546474849"
"50515253545556575859606162636465666768697071727374"
"75767778798081828384858687888990919293949596979899";

static bool refuse(EventWriter *w, const char *fmt,...) pg_attribute_printf(2, 3);

/*
 * Append a sentence to the reason.  Always returns false, for the caller to
 * return.
 */
static bool
refuse(EventWriter *w, const char *fmt,...)
{
	for (;;)
	{
		va_list		args;
		int			needed;

		va_start(args, fmt);
		needed = appendStringInfoVA(w->reason, fmt, args);
		va_end(args);

		if (needed == 0)
			return false;
		enlargeStringInfo(w->reason, needed);
	}
}

/* How many bytes of a string of the user's a reason may repeat. */
static int
quoted_len(const char *data, int len)
{
	return pg_mbcliplen(data, len, MAX_QUOTED_BYTES);
}

/*
 * Is a string longer than this many code points?  Counting is left for the
 * strings that have more bytes than that.
 */
static inline bool
longer_than(const char *data, int len, int nchars)
{
	return unlikely(len > nchars) && pg_mbstrlen_with_len(data, len) > nchars;
}

/* --- writing JSON --------------------------------------------------------
 *
 * The writers do not keep the body zero-terminated; abp_polar_encode does so
 * in the end.
 */

static inline char *
reserve(StringInfo body, int len)
{
	if (unlikely(body->len + len >= body->maxlen))
		enlargeStringInfo(body, len);
	return body->data + body->len;
}

static inline void
put_bytes(EventWriter *w, const char *data, int len)
{
	if (w->body == NULL)
		return;
	memcpy(reserve(w->body, len), data, len);
	w->body->len += len;
}

#define put_literal(w, literal) put_bytes((w), "" literal, sizeof(literal) - 1)

static inline void
put_int64(EventWriter *w, int64 value)
{
	if (w->body == NULL)
		return;
	w->body->len += pg_lltoa(value, reserve(w->body, MAXINT8LEN + 1));
}

/*
 * Has one of eight bytes to be escaped in a JSON string?
 */
static inline bool
needs_escape8(const char *data)
{
	const uint64 ones = UINT64CONST(0x0101010101010101);
	uint64		word;
	uint64		control;
	uint64		quote;
	uint64		backslash;

	memcpy(&word, data, sizeof(word));
	control = (word - ones * 0x20) & ~word;
	quote = word ^ (ones * '"');
	quote = (quote - ones) & ~quote;
	backslash = word ^ (ones * '\\');
	backslash = (backslash - ones) & ~backslash;

	return ((control | quote | backslash) & (ones * 0x80)) != 0;
}

static inline bool
needs_escape(unsigned char c)
{
	return c < 0x20 || c == '"' || c == '\\';
}

/*
 * Append a JSON string, quotes included.  Runs of bytes that need no escape
 * are copied as they are.
 */
static void
append_json_string(StringInfo out, const char *data, int len)
{
	static const char hex[] = "0123456789abcdef";
	const char *end = data + len;
	char	   *p = reserve(out, len + 2);

	*p++ = '"';
	while (data < end)
	{
		const char *run = data;
		char		escape[6] = {'\\', 'u', '0', '0'};
		int			escape_len = 2;

		while (end - data >= 8 && !needs_escape8(data))
			data += 8;
		while (data < end && !needs_escape((unsigned char) *data))
			data++;

		memcpy(p, run, data - run);
		p += data - run;
		if (data == end)
			break;

		switch (*data)
		{
			case '"':
			case '\\':
				escape[1] = *data;
				break;
			case '\b':
				escape[1] = 'b';
				break;
			case '\f':
				escape[1] = 'f';
				break;
			case '\n':
				escape[1] = 'n';
				break;
			case '\r':
				escape[1] = 'r';
				break;
			case '\t':
				escape[1] = 't';
				break;
			default:
				escape[4] = hex[((unsigned char) *data) >> 4];
				escape[5] = hex[((unsigned char) *data) & 0x0f];
				escape_len = 6;
				break;
		}
		data++;

		/* room for this escape, the rest and the closing quote */
		out->len = p - out->data;
		p = reserve(out, escape_len + (int) (end - data) + 1);
		memcpy(p, escape, escape_len);
		p += escape_len;
	}
	*p++ = '"';
	out->len = p - out->data;
}

/*
 * Write a string in a database whose encoding is not UTF8.  SQL_ASCII knows
 * no encoding: there, what is not UTF-8 already is refused.
 */
static void
put_converted(EventWriter *w, const char *data, int len)
{
	char	   *converted = NULL;

	if (GetDatabaseEncoding() == PG_SQL_ASCII)
	{
		if (!pg_verify_mbstr(PG_UTF8, data, len, true))
		{
			w->invalid_text = true;
			return;
		}
	}
	else if (w->body != NULL && len > 0)
	{
		converted = pg_server_to_any(data, len, PG_UTF8);
		if (converted != data)
		{
			data = converted;
			len = strlen(converted);
		}
		else
			converted = NULL;
	}

	if (w->body != NULL)
		append_json_string(w->body, data, len);
	if (converted != NULL)
		pfree(converted);
}

static inline void
put_string(EventWriter *w, const char *data, int len)
{
	if (unlikely(w->convert))
		put_converted(w, data, len);
	else if (w->body != NULL)
		append_json_string(w->body, data, len);
}

static inline char *
put_pair(char *p, int value)
{
	memcpy(p, &digit_pairs[value * 2], 2);
	return p + 2;
}

/* A time as "YYYY-MM-DDTHH:MM:SS.ffffffZ", quotes included. */
static bool
put_timestamp(EventWriter *w, TimestampTz at)
{
	int64		day = at / USECS_PER_DAY;
	int64		time = at % USECS_PER_DAY;
	int			year;
	int			month;
	int			mday;
	int			seconds;
	int			micros;
	char	   *p;

	if (time < 0)
	{
		time += USECS_PER_DAY;
		day--;
	}
	day += POSTGRES_EPOCH_JDATE;

	if (TIMESTAMP_NOT_FINITE(at) || day < FIRST_DAY || day > LAST_DAY)
		return refuse(w, "occurred_at must be within the years 1 to 9999");
	if (day == FIRST_DAY && time == 0)
		return refuse(w, "occurred_at must be after 0001-01-01 00:00:00 UTC, which Polar stores as -infinity");
	if (w->body == NULL)
		return true;

	j2date((int) day, &year, &month, &mday);
	seconds = (int) (time / USECS_PER_SEC);
	micros = (int) (time % USECS_PER_SEC);

	p = reserve(w->body, 29);
	*p++ = '"';
	p = put_pair(p, year / 100);
	p = put_pair(p, year % 100);
	*p++ = '-';
	p = put_pair(p, month);
	*p++ = '-';
	p = put_pair(p, mday);
	*p++ = 'T';
	p = put_pair(p, seconds / SECS_PER_HOUR);
	*p++ = ':';
	p = put_pair(p, seconds / SECS_PER_MINUTE % MINS_PER_HOUR);
	*p++ = ':';
	p = put_pair(p, seconds % SECS_PER_MINUTE);
	*p++ = '.';
	p = put_pair(p, micros / 10000);
	p = put_pair(p, micros / 100 % 100);
	p = put_pair(p, micros % 100);
	*p++ = 'Z';
	*p++ = '"';
	w->body->len = p - w->body->data;
	return true;
}

/* A UUID in its canonical form, quotes included. */
static void
put_uuid(EventWriter *w, const pg_uuid_t *uuid)
{
	static const char hex[] = "0123456789abcdef";
	char		str[38];
	char	   *p = str;

	*p++ = '"';
	for (int i = 0; i < UUID_LEN; i++)
	{
		if (i == 4 || i == 6 || i == 8 || i == 10)
			*p++ = '-';
		*p++ = hex[uuid->data[i] >> 4];
		*p++ = hex[uuid->data[i] & 0x0f];
	}
	*p++ = '"';
	put_bytes(w, str, p - str);
}

static inline bool
is_uuid_v4(const pg_uuid_t *uuid)
{
	return (uuid->data[6] >> 4) == 4;
}

/*
 * Read a UUID in the forms that Polar reads: 36 characters with hyphens, 32
 * without, either with "urn:uuid:" before it or in braces.
 */
static bool
read_uuid(TextView str, pg_uuid_t *uuid)
{
	const char *p = str.data;
	int			len = str.len;
	bool		hyphens;

	if (len > 9 && memcmp(p, "urn:uuid:", 9) == 0)
	{
		p += 9;
		len -= 9;
	}
	else if (len > 2 && p[0] == '{' && p[len - 1] == '}')
	{
		p++;
		len -= 2;
	}

	if (len != 36 && len != 32)
		return false;
	hyphens = (len == 36);

	for (int i = 0; i < UUID_LEN; i++)
	{
		int			byte = 0;

		if (hyphens && (i == 4 || i == 6 || i == 8 || i == 10) && *p++ != '-')
			return false;
		for (int nibble = 0; nibble < 2; nibble++)
		{
			char		c = *p++;

			byte <<= 4;
			if (c >= '0' && c <= '9')
				byte |= c - '0';
			else if (c >= 'a' && c <= 'f')
				byte |= c - 'a' + 10;
			else if (c >= 'A' && c <= 'F')
				byte |= c - 'A' + 10;
			else
				return false;
		}
		uuid->data[i] = byte;
	}
	return true;
}

/* --- reading jsonb -------------------------------------------------------
 *
 * A walk over an object's pairs that allocates nothing, which
 * JsonbIteratorNext cannot do.
 */
typedef struct ObjectWalk
{
	JsonbContainer *object;
	const char *base;			/* where the strings and values begin */
	int			npairs;
	int			next;
	uint32		key_offset;
	uint32		value_offset;
} ObjectWalk;

static void
start_walk(ObjectWalk *walk, JsonbContainer *object)
{
	walk->object = object;
	walk->npairs = JsonContainerSize(object);
	walk->base = (const char *) &object->children[walk->npairs * 2];
	walk->next = 0;
	walk->key_offset = 0;
	walk->value_offset = getJsonbOffset(object, walk->npairs);
}

/* Fetch the next pair; false at the end.  Nested values are jbvBinary. */
static bool
next_pair(ObjectWalk *walk, TextView *key, JsonbValue *value)
{
	JEntry		key_entry;
	JEntry		value_entry;
	uint32		start;

	if (walk->next >= walk->npairs)
		return false;
	key_entry = walk->object->children[walk->next];
	value_entry = walk->object->children[walk->npairs + walk->next];
	walk->next++;

	start = walk->key_offset;
	JBE_ADVANCE_OFFSET(walk->key_offset, key_entry);
	key->data = walk->base + start;
	key->len = walk->key_offset - start;

	start = walk->value_offset;
	JBE_ADVANCE_OFFSET(walk->value_offset, value_entry);
	if (JBE_ISSTRING(value_entry))
	{
		value->type = jbvString;
		value->val.string.val = unconstify(char *, walk->base) + start;
		value->val.string.len = walk->value_offset - start;
	}
	else if (JBE_ISNUMERIC(value_entry))
	{
		value->type = jbvNumeric;
		value->val.numeric = (Numeric) (unconstify(char *, walk->base) + INTALIGN(start));
	}
	else if (JBE_ISBOOL_TRUE(value_entry) || JBE_ISBOOL_FALSE(value_entry))
	{
		value->type = jbvBool;
		value->val.boolean = JBE_ISBOOL_TRUE(value_entry);
	}
	else if (JBE_ISNULL(value_entry))
		value->type = jbvNull;
	else
	{
		value->type = jbvBinary;
		value->val.binary.data =
			(JsonbContainer *) (unconstify(char *, walk->base) + INTALIGN(start));
		value->val.binary.len = walk->value_offset - INTALIGN(start);
	}
	return true;
}

/*
 * Append a container as JSON text without blanks, as JSON.stringify writes
 * it.  Stops early once the text is surely too long for Polar.
 */
static void
append_compact_json(StringInfo out, JsonbContainer *container)
{
	JsonbIterator *it = JsonbIteratorInit(container);
	JsonbIteratorToken token;
	JsonbValue	v;
	bool		comma = false;

	while ((token = JsonbIteratorNext(&it, &v, false)) != WJB_DONE &&
		   out->len <= MAX_VALUE_CHARS * MAX_MULTIBYTE_CHAR_LEN)
	{
		if (comma && token != WJB_END_ARRAY && token != WJB_END_OBJECT)
			appendStringInfoChar(out, ',');
		comma = false;

		switch (token)
		{
			case WJB_BEGIN_ARRAY:
				appendStringInfoChar(out, '[');
				break;
			case WJB_BEGIN_OBJECT:
				appendStringInfoChar(out, '{');
				break;
			case WJB_END_ARRAY:
				appendStringInfoChar(out, ']');
				comma = true;
				break;
			case WJB_END_OBJECT:
				appendStringInfoChar(out, '}');
				comma = true;
				break;
			case WJB_KEY:
				append_json_string(out, v.val.string.val, v.val.string.len);
				appendStringInfoChar(out, ':');
				break;
			default:
				if (v.type == jbvString)
					append_json_string(out, v.val.string.val, v.val.string.len);
				else if (v.type == jbvNumeric)
					appendStringInfoString(out,
										   DatumGetCString(DirectFunctionCall1(numeric_out,
																			   NumericGetDatum(v.val.numeric))));
				else if (v.type == jbvBool)
					appendStringInfoString(out, v.val.boolean ? "true" : "false");
				else
					appendStringInfoString(out, "null");
				comma = true;
				break;
		}
	}
}

/* --- amounts ------------------------------------------------------------- */

/*
 * A decimal number as digits: 0.d1d2d3... times ten to the power of point.
 * No leading or trailing zeros; zero has no digits.
 */
typedef struct DecimalText
{
	bool		negative;
	char	   *digits;			/* '0' to '9', not zero-terminated */
	int			ndigits;
	int			point;
} DecimalText;

/*
 * Read a decimal number with an optional sign, fraction and exponent; blanks
 * around it are skipped.  Returns false if it is none.  The digits are
 * palloc'd.
 */
static bool
read_decimal(const char *str, int len, DecimalText *decimal)
{
	const char *p = str;
	const char *end = str + len;
	bool		any = false;
	int			start = 0;

	while (p < end && (*p == ' ' || (*p >= '\t' && *p <= '\r')))
		p++;
	while (end > p && (end[-1] == ' ' || (end[-1] >= '\t' && end[-1] <= '\r')))
		end--;

	decimal->negative = (p < end && *p == '-');
	if (p < end && (*p == '-' || *p == '+'))
		p++;

	decimal->digits = palloc(end - p + 1);
	decimal->ndigits = 0;
	decimal->point = 0;
	for (bool fraction = false; p < end; p++)
	{
		if (*p >= '0' && *p <= '9')
		{
			decimal->digits[decimal->ndigits++] = *p;
			if (!fraction)
				decimal->point++;
			any = true;
		}
		else if (*p == '.' && !fraction)
			fraction = true;
		else
			break;
	}
	if (!any)
		return false;

	if (p < end && (*p == 'e' || *p == 'E'))
	{
		int			exponent = 0;
		bool		negative;

		p++;
		negative = (p < end && *p == '-');
		if (p < end && (*p == '-' || *p == '+'))
			p++;
		if (p == end)
			return false;
		for (; p < end && *p >= '0' && *p <= '9'; p++)
			exponent = Min(exponent * 10 + (*p - '0'), 1000000);
		decimal->point += negative ? -exponent : exponent;
	}
	if (p < end)
		return false;

	while (decimal->ndigits > 0 && decimal->digits[decimal->ndigits - 1] == '0')
		decimal->ndigits--;
	while (start < decimal->ndigits && decimal->digits[start] == '0')
		start++;
	memmove(decimal->digits, decimal->digits + start, decimal->ndigits - start);
	decimal->ndigits -= start;
	decimal->point -= start;
	if (decimal->ndigits == 0)
		decimal->point = 0;
	return true;
}

/*
 * Round a decimal, half away from zero, to 15 significant digits and 12
 * decimals, whichever is coarser: one rounding, of the exact value.
 */
static void
round_decimal(DecimalText *decimal)
{
	int			keep = Min(MAX_AMOUNT_DIGITS, decimal->point + MAX_AMOUNT_DECIMALS);
	bool		up;

	if (decimal->ndigits <= keep)
		return;

	up = (keep >= 0 && decimal->digits[keep] >= '5');
	decimal->ndigits = Max(keep, 0);
	if (up)
	{
		int			i = decimal->ndigits - 1;

		while (i >= 0 && decimal->digits[i] == '9')
			i--;
		if (i >= 0)
			decimal->digits[i]++;
		else
		{
			/* all nines, or no digit left: the carry is a digit of its own */
			decimal->digits[0] = '1';
			decimal->point++;
			i = 0;
		}
		decimal->ndigits = i + 1;
	}
	while (decimal->ndigits > 0 && decimal->digits[decimal->ndigits - 1] == '0')
		decimal->ndigits--;
	if (decimal->ndigits == 0)
		decimal->point = 0;
}

/* A decimal as plain text: no exponent, no superfluous zero.  palloc'd. */
static char *
decimal_text(const DecimalText *decimal)
{
	StringInfoData str;

	initStringInfo(&str);
	if (decimal->negative && decimal->ndigits > 0)
		appendStringInfoChar(&str, '-');
	if (decimal->point <= 0)
		appendStringInfoString(&str, decimal->ndigits > 0 ? "0." : "0");
	for (int i = decimal->point; i < 0; i++)
		appendStringInfoChar(&str, '0');
	for (int i = 0; i < Max(decimal->ndigits, decimal->point); i++)
	{
		if (i > 0 && i == decimal->point)
			appendStringInfoChar(&str, '.');
		appendStringInfoChar(&str, i < decimal->ndigits ? decimal->digits[i] : '0');
	}
	return str.data;
}

/*
 * The amount of Polar's _cost, in cents: plain decimal text without exponent
 * or trailing zeros.  Polar stores a double, so at most 15 significant digits
 * and 12 decimals are kept, rounded half away from zero.  The result is
 * palloc'd.  cost_cents must be finite.
 */
char	   *
abp_polar_amount(Numeric cost_cents)
{
	char	   *str = numeric_normalize(cost_cents);
	int			len = strlen(str);
	DecimalText decimal;

	/* "0." and 12 decimals: nothing shorter can be too precise */
	if (len <= MAX_AMOUNT_DECIMALS + 2)
		return str;

	if (!read_decimal(str, len, &decimal))
		elog(ERROR, "unexpected cost: it is not finite");
	round_decimal(&decimal);
	pfree(str);
	str = decimal_text(&decimal);
	pfree(decimal.digits);
	return str;
}

/*
 * Is an amount, as abp_polar_amount has made it of this cost, too large?  Then
 * it says so, and returns true.
 */
static bool
amount_too_large(EventWriter *w, const char *amount, Numeric cost_cents)
{
	char	   *exact;

	if (*amount == '-')
		amount++;
	if (strspn(amount, "0123456789") <= MAX_AMOUNT_WHOLE)
		return false;

	exact = numeric_normalize(cost_cents);
	if (strspn(exact + (*exact == '-'), "0123456789") <= MAX_AMOUNT_WHOLE)
		(void) refuse(w, AMOUNT_ROUNDS_UP, "cost_cents");
	else
		(void) refuse(w, "cost_cents must be below 100,000 (1,000 USD) in magnitude");
	pfree(exact);
	return true;
}

/*
 * A number as JSON, all its digits kept.  Polar parses numbers as doubles and
 * fails, for the whole request, on what is no finite one.
 */
static bool
put_number(EventWriter *w, Numeric number, const char *what, TextView key)
{
	char	   *str = DatumGetCString(DirectFunctionCall1(numeric_out,
														  NumericGetDatum(number)));
	int			len = strlen(str);

	if (numeric_is_nan(number) || numeric_is_inf(number) ||
		(len > 300 && isinf(strtod(str, NULL))))
		return refuse(w, "%s \"%.*s\" must be within the range of double precision",
					  what, quoted_len(key.data, key.len), key.data);
	put_bytes(w, str, len);
	pfree(str);
	return true;
}

/* --- metadata ------------------------------------------------------------
 *
 * Every entry starts with a comma; the first one's is overwritten with the
 * opening brace when the object is closed.
 */

/* A count under a key given as the literal of its JSON. */
#define put_count(w, key, value) \
	do { \
		put_literal(w, ",\"" key "\":"); \
		put_int64(w, value); \
		(w)->nkeys++; \
	} while (0)

/* A string column as metadata; NULL and '' are left out. */
static inline bool
put_text_entry(EventWriter *w, const char *json_key, int json_key_len,
			   const char *column, TextView str)
{
	if (str.data == NULL || str.len == 0)
		return true;
	if (longer_than(str.data, str.len, MAX_VALUE_CHARS))
		return refuse(w, "%s must not exceed %d characters", column, MAX_VALUE_CHARS);

	put_bytes(w, json_key, json_key_len);
	put_string(w, str.data, str.len);
	w->nkeys++;
	return true;
}

#define put_text(w, key, column, str) \
	put_text_entry(w, ",\"" key "\":", sizeof(",\"" key "\":") - 1, column, str)

/* Would this tag, its prefix before it, be one of our own keys? */
static bool
is_own_key(const char *prefix, int prefix_len, TextView key)
{
	for (int i = 0; i < lengthof(own_keys); i++)
	{
		if (own_keys[i].len == prefix_len + key.len &&
			memcmp(own_keys[i].data, prefix, prefix_len) == 0 &&
			memcmp(own_keys[i].data + prefix_len, key.data, key.len) == 0)
			return true;
	}
	return false;
}

static bool
same_text(TextView str, const char *other)
{
	return str.len == strlen(other) && memcmp(str.data, other, str.len) == 0;
}

/* The key of an entry whose name the user chose, prefix and all. */
static bool
put_key(EventWriter *w, const char *prefix, int prefix_len, TextView key,
		const char *what)
{
	if (unlikely(prefix_len + key.len > MAX_KEY_CHARS) &&
		pg_mbstrlen_with_len(prefix, prefix_len) +
		pg_mbstrlen_with_len(key.data, key.len) > MAX_KEY_CHARS)
		return refuse(w, "%s \"%.*s...\" must not exceed %d characters as a metadata key",
					  what, quoted_len(key.data, key.len), key.data, MAX_KEY_CHARS);

	if (prefix_len == 0)
	{
		put_literal(w, ",");
		put_string(w, key.data, key.len);
	}
	else if (w->body != NULL || w->convert)
	{
		char		joined[2 * MAX_KEY_CHARS * MAX_MULTIBYTE_CHAR_LEN];

		memcpy(joined, prefix, prefix_len);
		memcpy(joined + prefix_len, key.data, key.len);
		put_literal(w, ",");
		put_string(w, joined, prefix_len + key.len);
	}
	put_literal(w, ":");
	w->nkeys++;
	return true;
}

/*
 * An entry whose key and value are the user's.  null and '' are left out.
 * Objects and arrays become JSON text, or are refused.
 */
static bool
put_entry(EventWriter *w, const char *prefix, int prefix_len, TextView key,
		  const JsonbValue *value, const char *what, bool nested_as_text)
{
	bool		ok = true;
	StringInfoData nested;

	if (value->type == jbvNull ||
		(value->type == jbvString && value->val.string.len == 0))
		return true;
	if (value->type == jbvBinary && !nested_as_text)
		return refuse(w, "%s \"%.*s\" must be a string, a number or a boolean",
					  what, quoted_len(key.data, key.len), key.data);
	if (!put_key(w, prefix, prefix_len, key, what))
		return false;

	switch (value->type)
	{
		case jbvString:
			if (longer_than(value->val.string.val, value->val.string.len, MAX_VALUE_CHARS))
				return refuse(w, "%s \"%.*s\" must not exceed %d characters",
							  what, quoted_len(key.data, key.len), key.data,
							  MAX_VALUE_CHARS);
			put_string(w, value->val.string.val, value->val.string.len);
			break;
		case jbvNumeric:
			ok = put_number(w, value->val.numeric, what, key);
			break;
		case jbvBool:
			if (value->val.boolean)
				put_literal(w, "true");
			else
				put_literal(w, "false");
			break;
		default:
			initStringInfo(&nested);
			append_compact_json(&nested, value->val.binary.data);
			if (longer_than(nested.data, nested.len, MAX_VALUE_CHARS))
				ok = refuse(w, "%s \"%.*s\" must not exceed %d characters as JSON text",
							what, quoted_len(key.data, key.len), key.data,
							MAX_VALUE_CHARS);
			else
				put_string(w, nested.data, nested.len);
			pfree(nested.data);
			break;
	}
	return ok;
}

/* Close the object that started at this offset of the body. */
static void
close_object(EventWriter *w, int start)
{
	if (w->body == NULL)
		return;
	if (w->body->len == start)
		put_literal(w, "{");
	else
		w->body->data[start] = '{';
	put_literal(w, "}");
}

static bool
check_key_count(EventWriter *w)
{
	if (unlikely(w->nkeys > MAX_METADATA_KEYS))
		return refuse(w, "metadata must not have more than %d keys, with the tags it has %d",
					  MAX_METADATA_KEYS, w->nkeys);
	return true;
}

/* The sum of two counts, unknown ones being 0; false if it overflows. */
static inline bool
sum_counts(const UsageCounts *counts, UsageCount a, UsageCount b, int64 *sum)
{
	return !pg_add_s64_overflow(counts->given[a] ? counts->value[a] : 0,
								counts->given[b] ? counts->value[b] : 0,
								sum);
}

/* The metadata that a row makes by itself. */
static bool
put_row_metadata(EventWriter *w, const UsageRow *row, const EventFormat *format,
				 const Identity *identity)
{
	const UsageCounts *counts = &row->counts;
	const bool *given = counts->given;
	const int64 *value = counts->value;
	int			start = w->body != NULL ? w->body->len : 0;
	int			prefix_len = strlen(format->tag_prefix);
	bool		customer = (identity->kind == IDENTITY_CUSTOMER);
	bool		external_id_column;
	bool		member_id_column;
	bool		external_member_id_column;
	int64		total;
	int64		cache_write;
	ObjectWalk	walk;
	TextView	key;
	JsonbValue	tag;

	if (!sum_counts(counts, COUNT_INPUT, COUNT_OUTPUT, &total))
		return refuse(w, "input_tokens and output_tokens must not exceed bigint together");
	if (!sum_counts(counts, COUNT_CACHE_WRITE, COUNT_CACHE_WRITE_1H, &cache_write))
		return refuse(w, "cache_write_tokens and cache_write_1h_tokens must not exceed bigint together");

	if (!put_text(w, "generation_id", "generation_id", row->generation_id) ||
		!put_text(w, "model_id", "model", row->model) ||
		!put_text(w, "provider", "provider", row->provider) ||
		!put_text(w, "sub_provider", "sub_provider", row->sub_provider))
		return false;

	if (given[COUNT_INPUT])
		put_count(w, "input_tokens", value[COUNT_INPUT]);
	if (given[COUNT_OUTPUT])
		put_count(w, "output_tokens", value[COUNT_OUTPUT]);
	if (given[COUNT_INPUT] || given[COUNT_OUTPUT])
		put_count(w, "total_tokens", total);
	if (given[COUNT_REASONING])
		put_count(w, "reasoning_tokens", value[COUNT_REASONING]);
	if (given[COUNT_CACHE_READ])
		put_count(w, "cache_read_tokens", value[COUNT_CACHE_READ]);
	if (given[COUNT_CACHE_WRITE] || given[COUNT_CACHE_WRITE_1H])
		put_count(w, "cache_write_tokens", cache_write);
	if (given[COUNT_CACHE_WRITE_1H] && value[COUNT_CACHE_WRITE_1H] > 0)
		put_count(w, "cache_write_1h_tokens", value[COUNT_CACHE_WRITE_1H]);
	if (given[COUNT_REQUEST])
		put_count(w, "request_count", value[COUNT_REQUEST]);
	if (given[COUNT_WEB_SEARCH])
		put_count(w, "web_search_count", value[COUNT_WEB_SEARCH]);

	if (row->provider_cost != NULL)
	{
		put_literal(w, ",\"raw_provider_cost\":");
		key.data = "provider_cost";
		key.len = strlen(key.data);
		if (!put_number(w, row->provider_cost, "column", key))
			return false;
		w->nkeys++;
	}

	/*
	 * Columns that the event itself has no place for, because Polar ignores
	 * them beside the identity that is sent, are kept as tags; a tag of the
	 * same name yields to them.
	 */
	external_id_column = customer && row->external_customer_id.data != NULL &&
		row->external_customer_id.len > 0;
	external_member_id_column = customer && row->external_member_id.data != NULL &&
		row->external_member_id.len > 0;
	member_id_column = !customer && row->member_id != NULL;

	if (external_id_column)
	{
		key.data = "external_customer_id";
		key.len = strlen(key.data);
		tag.type = jbvString;
		tag.val.string.val = unconstify(char *, row->external_customer_id.data);
		tag.val.string.len = row->external_customer_id.len;
		if (!put_entry(w, format->tag_prefix, prefix_len, key, &tag, "column", false))
			return false;
	}
	if (external_member_id_column)
	{
		key.data = "external_member_id";
		key.len = strlen(key.data);
		tag.type = jbvString;
		tag.val.string.val = unconstify(char *, row->external_member_id.data);
		tag.val.string.len = row->external_member_id.len;
		if (!put_entry(w, format->tag_prefix, prefix_len, key, &tag, "column", false))
			return false;
	}
	if (member_id_column)
	{
		key.data = "member_id";
		key.len = strlen(key.data);
		if (!put_key(w, format->tag_prefix, prefix_len, key, "column"))
			return false;
		put_uuid(w, row->member_id);
	}

	if (row->tags != NULL)
		start_walk(&walk, &row->tags->root);
	while (row->tags != NULL && next_pair(&walk, &key, &tag))
	{
		if (is_own_key(format->tag_prefix, prefix_len, key) ||
			(external_id_column && same_text(key, "external_customer_id")) ||
			(external_member_id_column && same_text(key, "external_member_id")) ||
			(member_id_column && same_text(key, "member_id")))
			continue;
		if (!put_entry(w, format->tag_prefix, prefix_len, key, &tag, "tag", true))
			return false;
	}

	if (row->has_cost_nanos)
		put_count(w, "cost_nanos", row->cost_nanos);
	if (row->has_cost_nanos || row->cost_cents != NULL)
	{
		put_literal(w, ",\"cost_currency\":\"usd\"");
		w->nkeys++;
	}
	if (!put_text(w, "external_id", "external_id", row->external_id))
		return false;

	if (row->cost_cents != NULL)
	{
		w->nkeys++;

		/* When only checking, most rows need no look at the digits. */
		if (w->body != NULL || !row->has_cost_nanos ||
			row->cost_nanos > SAFE_COST_NANOS || row->cost_nanos < -SAFE_COST_NANOS)
		{
			char	   *amount;

			if (numeric_is_nan(row->cost_cents) || numeric_is_inf(row->cost_cents))
				return refuse(w, "cost_cents must be finite");
			amount = abp_polar_amount(row->cost_cents);
			if (amount_too_large(w, amount, row->cost_cents))
				return false;
			put_literal(w, ",\"_cost\":{\"amount\":\"");
			put_bytes(w, amount, strlen(amount));
			put_literal(w, "\",\"currency\":\"usd\"}");
			pfree(amount);
		}
	}

	if (row->provider.data != NULL && row->provider.len > 0 &&
		row->model.data != NULL && row->model.len > 0)
	{
		put_literal(w, ",\"_llm\":{\"vendor\":");
		put_string(w, row->provider.data, row->provider.len);
		put_literal(w, ",\"model\":");
		put_string(w, row->model.data, row->model.len);
		put_literal(w, ",\"input_tokens\":");
		put_int64(w, given[COUNT_INPUT] ? value[COUNT_INPUT] : 0);
		put_literal(w, ",\"cached_input_tokens\":");
		put_int64(w, given[COUNT_CACHE_READ] ? value[COUNT_CACHE_READ] : 0);
		put_literal(w, ",\"output_tokens\":");
		put_int64(w, given[COUNT_OUTPUT] ? value[COUNT_OUTPUT] : 0);
		put_literal(w, ",\"total_tokens\":");
		put_int64(w, total);
		put_literal(w, "}");
		w->nkeys++;
	}

	close_object(w, start);
	return check_key_count(w);
}

/* --- metadata of the user's own function --------------------------------- */

/* The amount in the user's _cost: a number or a string, in cents. */
static bool
put_own_amount(EventWriter *w, const JsonbValue *value)
{
	DecimalText decimal;
	char	   *str;
	int			len;
	bool		valid;
	bool		rounded;

	if (value->type == jbvNumeric)
	{
		str = DatumGetCString(DirectFunctionCall1(numeric_out,
												  NumericGetDatum(value->val.numeric)));
		len = strlen(str);
	}
	else if (value->type == jbvString)
	{
		str = value->val.string.val;
		len = value->val.string.len;
	}
	else
		return refuse(w, "metadata \"_cost\" must have an amount, a number or a string");

	valid = read_decimal(str, len, &decimal);
	if (valid && decimal.ndigits - decimal.point > MAX_AMOUNT_DECIMALS)
		return refuse(w, "metadata \"_cost\" must have an amount of at most %d decimals",
					  MAX_AMOUNT_DECIMALS);
	rounded = valid && decimal.point <= MAX_AMOUNT_WHOLE;
	if (rounded)
		round_decimal(&decimal);
	if (!valid)
		return refuse(w, "metadata \"_cost\" must have an amount that is a decimal number");
	if (decimal.point > MAX_AMOUNT_WHOLE && rounded)
		return refuse(w, AMOUNT_ROUNDS_UP, "the amount of metadata \"_cost\"");
	if (decimal.point > MAX_AMOUNT_WHOLE)
		return refuse(w, "metadata \"_cost\" must have an amount below 100,000 cents in magnitude");

	str = decimal_text(&decimal);
	put_literal(w, "\"");
	put_bytes(w, str, strlen(str));
	put_literal(w, "\"");
	pfree(str);
	pfree(decimal.digits);
	return true;
}

static bool
put_own_cost(EventWriter *w, JsonbContainer *cost)
{
	JsonbValue	value;

	put_literal(w, ",\"_cost\":{\"amount\":");
	if (getKeyJsonValueFromContainer(cost, "amount", 6, &value) == NULL)
		value.type = jbvNull;
	if (!put_own_amount(w, &value))
		return false;

	if (getKeyJsonValueFromContainer(cost, "currency", 8, &value) == NULL ||
		value.type != jbvString || value.val.string.len != 3 ||
		memcmp(value.val.string.val, "usd", 3) != 0)
		return refuse(w, "metadata \"_cost\" must have the currency \"usd\"");
	put_literal(w, ",\"currency\":\"usd\"}");
	return true;
}

/* An integer, also one with zeros after the point or in a string. */
static bool
put_own_count(EventWriter *w, const char *key, const JsonbValue *value)
{
	DecimalText decimal;
	char	   *str = NULL;
	int			len = 0;
	bool		valid;

	if (value->type == jbvNumeric)
	{
		str = DatumGetCString(DirectFunctionCall1(numeric_out,
												  NumericGetDatum(value->val.numeric)));
		len = strlen(str);
	}
	else if (value->type == jbvString)
	{
		str = value->val.string.val;
		len = value->val.string.len;
	}

	/* Below 10^18 is safely within Polar's 64-bit column. */
	valid = str != NULL && memchr(str, 'e', len) == NULL &&
		memchr(str, 'E', len) == NULL && read_decimal(str, len, &decimal) &&
		decimal.ndigits <= decimal.point && decimal.point <= 18;
	if (!valid)
		return refuse(w, "metadata \"_llm\" must have %s, an integer", key);

	str = decimal_text(&decimal);
	put_literal(w, ",\"");
	put_bytes(w, key, strlen(key));
	put_literal(w, "\":");
	put_bytes(w, str, strlen(str));
	pfree(str);
	pfree(decimal.digits);
	return true;
}

static bool
put_own_llm(EventWriter *w, JsonbContainer *llm)
{
	static const struct
	{
		const char *key;
		bool		is_count;
		bool		required;
	}			fields[] = {
		{"vendor", false, true},
		{"model", false, true},
		{"input_tokens", true, true},
		{"cached_input_tokens", true, false},
		{"output_tokens", true, true},
		{"total_tokens", true, true},
		{"prompt", false, false},
		{"response", false, false}
	};
	int			start;

	put_literal(w, ",\"_llm\":");
	start = w->body != NULL ? w->body->len : 0;
	for (int i = 0; i < lengthof(fields); i++)
	{
		const char *key = fields[i].key;
		JsonbValue	value;

		if (getKeyJsonValueFromContainer(llm, key, strlen(key), &value) == NULL ||
			value.type == jbvNull)
		{
			if (fields[i].required)
				return refuse(w, "metadata \"_llm\" must have %s", key);
			continue;
		}
		if (fields[i].is_count)
		{
			if (!put_own_count(w, key, &value))
				return false;
		}
		else
		{
			if (value.type != jbvString)
				return refuse(w, "metadata \"_llm\" must have %s, a string", key);
			put_literal(w, ",\"");
			put_bytes(w, key, strlen(key));
			put_literal(w, "\":");
			put_string(w, value.val.string.val, value.val.string.len);
		}
	}
	close_object(w, start);
	return true;
}

/* The whole metadata as the user's function returned it. */
static bool
put_own_metadata(EventWriter *w, Jsonb *metadata)
{
	int			start = w->body != NULL ? w->body->len : 0;
	ObjectWalk	walk;
	TextView	key;
	JsonbValue	value;

	if (!JB_ROOT_IS_OBJECT(metadata))
		return refuse(w, "metadata must be an object");

	start_walk(&walk, &metadata->root);
	while (next_pair(&walk, &key, &value))
	{
		bool		is_cost = same_text(key, "_cost");
		bool		ok;

		if (!is_cost && !same_text(key, "_llm"))
			ok = put_entry(w, "", 0, key, &value, "metadata", false);
		else if (value.type == jbvNull ||
				 (value.type == jbvString && value.val.string.len == 0))
			continue;
		else if (value.type != jbvBinary ||
				 !JsonContainerIsObject(value.val.binary.data))
			ok = refuse(w, "metadata \"%.*s\" must be an object", key.len, key.data);
		else
		{
			w->nkeys++;
			ok = is_cost ? put_own_cost(w, value.val.binary.data) :
				put_own_llm(w, value.val.binary.data);
		}
		if (!ok)
			return false;
	}

	close_object(w, start);
	return check_key_count(w);
}

/* --- identity ------------------------------------------------------------ */

/*
 * Look for an identity among the tags, as the original does: the first key
 * that is there and not null decides, and if it is '', 0 or false there is
 * none.  Returns false if what is there can be no identity.
 */
static bool
find_identity_tag(EventWriter *w, JsonbContainer *tags, const char *key,
				  const char *const *default_keys, Identity *identity)
{
	const char *const single[] = {key, NULL};
	const char *const *keys = key != NULL ? single : default_keys;
	JsonbValue	value;
	char	   *str;

	for (;; keys++)
	{
		if (*keys == NULL)
			return true;
		if (getKeyJsonValueFromContainer(tags, *keys, strlen(*keys), &value) != NULL &&
			value.type != jbvNull)
			break;
	}
	key = *keys;

	switch (value.type)
	{
		case jbvString:
			identity->external.data = value.val.string.val;
			identity->external.len = value.val.string.len;
			break;
		case jbvBool:
			if (value.val.boolean)
				return refuse(w, "tag \"%.*s\" must be a string or a number to identify the customer, not true",
							  quoted_len(key, strlen(key)), key);
			identity->external.len = 0;
			break;
		case jbvNumeric:
			str = numeric_normalize(value.val.numeric);
			if (strlen(str) > MAX_ID_BYTES)
				return refuse(w, "tag \"%s\" must not exceed %d bytes", key, MAX_ID_BYTES);
			strcpy(identity->number, str);
			identity->external.data = identity->number;
			identity->external.len = strcmp(str, "0") == 0 ? 0 : strlen(str);
			pfree(str);
			break;
		default:
			return refuse(w, "tag \"%.*s\" must be a string or a number to identify the customer",
						  quoted_len(key, strlen(key)), key);
	}

	if (identity->external.len == 0)
		return true;
	if (default_keys == customer_id_keys)
	{
		if (!read_uuid(identity->external, &identity->customer_id) ||
			!is_uuid_v4(&identity->customer_id))
			return refuse(w, "tag \"%.*s\" must be a UUID version 4 to be Polar's customer id",
						  quoted_len(key, strlen(key)), key);
		identity->kind = IDENTITY_CUSTOMER;
	}
	else
	{
		if (identity->external.len > MAX_ID_BYTES)
			return refuse(w, "tag \"%.*s\" must not exceed %d bytes to identify the customer",
						  quoted_len(key, strlen(key)), key, MAX_ID_BYTES);
		identity->kind = IDENTITY_EXTERNAL;
	}
	return true;
}

/* Whom the event is about: the columns, then the tags. */
static bool
find_identity(EventWriter *w, const UsageRow *row, const EventFormat *format,
			  Identity *identity)
{
	identity->kind = IDENTITY_NONE;

	if (row->customer_id != NULL)
	{
		if (!is_uuid_v4(row->customer_id))
			return refuse(w, "customer_id must be a UUID version 4");
		identity->kind = IDENTITY_CUSTOMER;
		identity->customer_id = *row->customer_id;
	}
	else if (row->external_customer_id.data != NULL)
	{
		if (row->external_customer_id.len == 0)
			return refuse(w, "external_customer_id must not be empty");
		if (row->external_customer_id.len > MAX_ID_BYTES)
			return refuse(w, "external_customer_id must not exceed %d bytes", MAX_ID_BYTES);
		identity->kind = IDENTITY_EXTERNAL;
		identity->external = row->external_customer_id;
	}
	else if (row->tags != NULL)
	{
		if (!find_identity_tag(w, &row->tags->root, format->customer_id_key,
							   customer_id_keys, identity))
			return false;
		if (identity->kind == IDENTITY_NONE &&
			!find_identity_tag(w, &row->tags->root, format->external_customer_id_key,
							   external_customer_id_keys, identity))
			return false;
	}

	if (identity->kind == IDENTITY_NONE)
		return refuse(w, "no customer: customer_id or external_customer_id must be set, or a tag that identifies the customer");
	return true;
}

/*
 * Whom a row is about: its columns, whatever Polar thinks of them, or else the
 * tag by which it is sent.  The result points into the row and into itself.
 */
void
abp_polar_customer(const UsageRow *row, const EventFormat *format, EventCustomer *customer)
{
	StringInfoData reason;
	EventWriter w = {NULL, &reason};
	Identity	identity;

	customer->has_id = row->customer_id != NULL;
	customer->external_id.data = NULL;
	customer->external_id.len = 0;
	if (row->customer_id != NULL)
		customer->id = *row->customer_id;
	else if (row->external_customer_id.data != NULL)
		customer->external_id = row->external_customer_id;
	if (row->customer_id != NULL || row->external_customer_id.data != NULL ||
		row->tags == NULL || JsonContainerSize(&row->tags->root) == 0)
		return;

	initStringInfo(&reason);
	if (!find_identity(&w, row, format, &identity))
		return;
	customer->has_id = identity.kind == IDENTITY_CUSTOMER;
	if (customer->has_id)
		customer->id = identity.customer_id;
	else
	{
		customer->external_id = identity.external;
		if (identity.external.data == identity.number)
		{
			strcpy(customer->number, identity.number);
			customer->external_id.data = customer->number;
		}
	}
}

/* --- the event ----------------------------------------------------------- */

/*
 * The event's name: the function's, the row's, or the server's, in which
 * {provider} and {model} are replaced.
 */
static bool
put_name(EventWriter *w, const UsageRow *row, const EventFormat *format,
		 TextView override)
{
	TextView	name = override;
	char		expanded[MAX_NAME_CHARS * MAX_MULTIBYTE_CHAR_LEN];

	if (name.data == NULL)
		name = row->event_name;
	if (name.data == NULL)
	{
		const char *template = format->event_name;

		if (template == NULL)
			template = DEFAULT_EVENT_NAME;
		name.data = template;
		name.len = strlen(template);

		if (memchr(template, '{', name.len) != NULL)
		{
			int			len = 0;

			while (*template != '\0')
			{
				TextView	piece = {template, 1};

				if (strncmp(template, "{provider}", 10) == 0)
				{
					piece = row->provider;
					template += 10;
				}
				else if (strncmp(template, "{model}", 7) == 0)
				{
					piece = row->model;
					template += 7;
				}
				else
					template++;

				if (piece.data == NULL || piece.len == 0)
				{
					piece.data = "unknown";
					piece.len = strlen(piece.data);
				}
				if (piece.len > (int) sizeof(expanded) - len)
					return refuse(w, "event name must not exceed %d characters",
								  MAX_NAME_CHARS);
				memcpy(expanded + len, piece.data, piece.len);
				len += piece.len;
			}
			name.data = expanded;
			name.len = len;
		}
	}

	if (name.len == 0)
		return refuse(w, "event name must not be empty");
	if (longer_than(name.data, name.len, MAX_NAME_CHARS))
		return refuse(w, "event name must not exceed %d characters", MAX_NAME_CHARS);
	put_string(w, name.data, name.len);
	return true;
}

/* A whole event; false with a reason if Polar would refuse it. */
static bool
put_event(EventWriter *w, const UsageRow *row, const EventFormat *format,
		  const EventOverrides *overrides)
{
	static const EventOverrides no_overrides = {{NULL, 0}, NULL};
	bool		checking = (w->body == NULL);
	Identity	identity;

	if (overrides == NULL)
		overrides = &no_overrides;

	if (row->tags != NULL && !JB_ROOT_IS_OBJECT(row->tags))
		return refuse(w, "tags must be an object");
	if (!find_identity(w, row, format, &identity))
		return false;

	put_literal(w, "{\"name\":");
	if (!(checking && format->has_event_name_function) &&
		!put_name(w, row, format, overrides->event_name))
		return false;

	put_literal(w, ",\"timestamp\":");
	if (!put_timestamp(w, row->occurred_at))
		return false;

	if (row->external_id.data == NULL || row->external_id.len == 0)
		return refuse(w, "external_id must not be empty");
	if (row->external_id.len > MAX_ID_BYTES)
		return refuse(w, "external_id must not exceed %d bytes", MAX_ID_BYTES);
	put_literal(w, ",\"external_id\":");
	put_string(w, row->external_id.data, row->external_id.len);

	/* Polar knows either pair of identity and member, and ignores a mixture. */
	if (identity.kind == IDENTITY_CUSTOMER)
	{
		put_literal(w, ",\"customer_id\":");
		put_uuid(w, &identity.customer_id);
		if (row->member_id != NULL)
		{
			if (!is_uuid_v4(row->member_id))
				return refuse(w, "member_id must be a UUID version 4");
			put_literal(w, ",\"member_id\":");
			put_uuid(w, row->member_id);
		}
	}
	else
	{
		put_literal(w, ",\"external_customer_id\":");
		put_string(w, identity.external.data, identity.external.len);
		if (row->external_member_id.data != NULL && row->external_member_id.len > 0)
		{
			if (row->external_member_id.len > MAX_ID_BYTES)
				return refuse(w, "external_member_id must not exceed %d bytes", MAX_ID_BYTES);
			put_literal(w, ",\"external_member_id\":");
			put_string(w, row->external_member_id.data, row->external_member_id.len);
		}
	}

	if (row->parent_id.data != NULL && row->parent_id.len > 0)
	{
		if (row->parent_id.len > MAX_ID_BYTES)
			return refuse(w, "parent_id must not exceed %d bytes", MAX_ID_BYTES);
		if (row->parent_id.len == row->external_id.len &&
			memcmp(row->parent_id.data, row->external_id.data, row->parent_id.len) == 0)
			return refuse(w, "parent_id must not be the row's own external_id: Polar would never count the event");
		put_literal(w, ",\"parent_id\":");
		put_string(w, row->parent_id.data, row->parent_id.len);
	}

	put_literal(w, ",\"metadata\":");
	if (overrides->metadata != NULL)
	{
		if (!put_own_metadata(w, overrides->metadata))
			return false;
	}
	else if (!(checking && format->has_metadata_function))
	{
		if (!put_row_metadata(w, row, format, &identity))
			return false;
	}
	put_literal(w, "}");

	if (unlikely(w->invalid_text))
		return refuse(w, "text must be valid UTF-8");
	return true;
}

/*
 * Would Polar accept the event of this row?  If not, returns false and
 * appends field and rule to reason.  What the user's functions decide is left
 * to abp_polar_encode.
 */
bool
abp_polar_check(const UsageRow *row, const EventFormat *format, StringInfo reason)
{
	EventWriter w = {NULL, reason};

	w.convert = (GetDatabaseEncoding() != PG_UTF8);
	return put_event(&w, row, format, NULL);
}

/*
 * Append the event of this row to body, as one JSON object.  overrides may be
 * NULL.  Returns false, body left as it was, and appends field and rule to
 * reason, if Polar would refuse the event.
 */
bool
abp_polar_encode(StringInfo body, const UsageRow *row, const EventFormat *format,
				 const EventOverrides *overrides, StringInfo reason)
{
	EventWriter w = {body, reason};
	int			start = body->len;
	bool		ok;

	w.convert = (GetDatabaseEncoding() != PG_UTF8);
	ok = put_event(&w, row, format, overrides);
	if (!ok)
		body->len = start;
	body->data[body->len] = '\0';
	return ok;
}

/* ---------------------------------------------------------------------
 * Answers into verdicts
 * ---------------------------------------------------------------------
 */

/* What is more deeply nested is no answer of Polar's. */
#define MAX_ANSWER_DEPTH	64

/* An answer's words, cut to what a reader needs. */
#define MAX_WORD_BYTES		64
#define MAX_MESSAGE_BYTES	200

#define MAX_RETRY_AFTER_MS	(60 * 60 * 1000)

/*
 * Polar reports an event's errors for both kinds of events, by customer and
 * by external customer, or for the event as such.
 */
typedef enum EventVariant
{
	VARIANT_NONE,
	VARIANT_CUSTOMER,
	VARIANT_EXTERNAL
} EventVariant;

#define NUM_VARIANTS (VARIANT_EXTERNAL + 1)

typedef struct EventErrors
{
	bool		named;			/* any error at all */
	bool		other_variant[NUM_VARIANTS];	/* lacks the variant's
												 * identity, so it is not one */
	bool		clock_skew[NUM_VARIANTS];
	char	   *reason[NUM_VARIANTS];	/* the first one, clock skew aside */
} EventErrors;

/* The fields of an answer that we read. */
typedef enum AnswerField
{
	FIELD_OTHER,
	FIELD_INSERTED,
	FIELD_DUPLICATES,
	FIELD_ERROR,
	FIELD_DETAIL,
	FIELD_TYPE,
	FIELD_LOC,
	FIELD_MSG
} AnswerField;

/* State of reading an answer; lives in the context of the reading. */
typedef struct Answer
{
	int			depth;			/* containers open */
	char		container[MAX_ANSWER_DEPTH + 2];	/* '{' or '[', by depth */
	AnswerField field;			/* of the whole */
	AnswerField entry_field;	/* of an entry of "detail" */

	int64		inserted;		/* -1: not a count */
	int64		duplicates;		/* ditto; 0 if missing */
	char	   *error;			/* Polar's error code */

	/* the current entry of "detail" */
	char	   *type;
	char	   *msg;
	int			loc_len;
	bool		loc_is_event;	/* so far, loc leads to an event */
	int			index;
	EventVariant variant;
	StringInfoData path;		/* of the field in the event */

	int			nevents;
	EventErrors *events;		/* NULL: no details wanted */
	int			nnamed;
} Answer;

/*
 * Append an answer's word to text for people: cut, control characters and
 * anything that looks like an access token replaced.
 */
static void
append_clean(StringInfo out, const char *word, int max_bytes)
{
	bool		utf8 = (GetDatabaseEncoding() == PG_UTF8);
	int			len = pg_encoding_mbcliplen(PG_UTF8, word, strlen(word), max_bytes);

	for (int i = 0; i < len; i++)
	{
		unsigned char c = word[i];

		if (strncmp(word + i, "polar_", 6) == 0 &&
			(i == 0 || !(isalnum((unsigned char) word[i - 1]) || word[i - 1] == '_')))
		{
			appendStringInfoString(out, "polar_...");
			while (i + 1 < len && (isalnum((unsigned char) word[i + 1]) || word[i + 1] == '_'))
				i++;
		}
		else if (c < 0x20 || c == 0x7f)
			appendStringInfoChar(out, ' ');
		else if (c >= 0x80 && !utf8)
			appendStringInfoChar(out, '?');
		else
			appendStringInfoChar(out, c);
	}
	if (word[len] != '\0')
		appendStringInfoString(out, "...");
}

/* Is the parser directly within an entry of "detail"? */
static bool
in_entry(const Answer *answer)
{
	return answer->events != NULL && answer->field == FIELD_DETAIL &&
		answer->depth >= 3 && answer->container[1] == '{' &&
		answer->container[2] == '[' && answer->container[3] == '{';
}

static bool
in_loc(const Answer *answer)
{
	return in_entry(answer) && answer->entry_field == FIELD_LOC &&
		answer->depth == 4 && answer->container[4] == '[';
}

static void
start_entry(Answer *answer)
{
	answer->type = NULL;
	answer->msg = NULL;
	answer->loc_len = 0;
	answer->loc_is_event = true;
	answer->index = -1;
	answer->variant = VARIANT_NONE;
	answer->entry_field = FIELD_OTHER;
	resetStringInfo(&answer->path);
}

/* An entry of "detail" is complete: keep what it says about an event. */
static void
end_entry(Answer *answer)
{
	EventErrors *event;
	EventVariant variant = answer->variant;
	const char *msg = answer->msg != NULL ? answer->msg : "refused";
	const char *type = answer->type != NULL ? answer->type : "";
	StringInfoData reason;

	if (!answer->loc_is_event || answer->loc_len < 3)
		return;

	event = &answer->events[answer->index];
	if (!event->named)
		answer->nnamed++;
	event->named = true;

	if (strcmp(type, "missing") == 0 &&
		((variant == VARIANT_CUSTOMER && strcmp(answer->path.data, "customer_id") == 0) ||
		 (variant == VARIANT_EXTERNAL && strcmp(answer->path.data, "external_customer_id") == 0)))
		event->other_variant[variant] = true;
	else if (strstr(msg, "Timestamp must be in the past") != NULL)
	{
		event->clock_skew[variant] = true;
		return;
	}
	else if (event->reason[variant] != NULL)
		return;
	else
	{
		if (strncmp(msg, "Value error, ", 13) == 0)
			msg += 13;

		initStringInfo(&reason);
		if (answer->path.len > 0)
			appendStringInfo(&reason, "%s: ", answer->path.data);
		append_clean(&reason, msg, MAX_MESSAGE_BYTES);
		if (*type != '\0')
		{
			appendStringInfoString(&reason, " (");
			append_clean(&reason, type, MAX_WORD_BYTES);
			appendStringInfoChar(&reason, ')');
		}
		event->reason[variant] = reason.data;
	}
}

/*
 * One element of an entry's loc: "body", "events", the event's index, the
 * variant (not in errors of the service), then the path of the field.
 */
static void
read_loc(Answer *answer, const char *token, JsonTokenType tokentype)
{
	int			position = answer->loc_len++;

	switch (position)
	{
		case 0:
			if (tokentype != JSON_TOKEN_STRING || strcmp(token, "body") != 0)
				answer->loc_is_event = false;
			break;
		case 1:
			if (tokentype != JSON_TOKEN_STRING || strcmp(token, "events") != 0)
				answer->loc_is_event = false;
			break;
		case 2:
			/* up to nine digits: nothing that overflows, no sign, no fraction */
			if (tokentype != JSON_TOKEN_NUMBER || strlen(token) > 9 ||
				strspn(token, "0123456789") != strlen(token) ||
				atoi(token) >= answer->nevents)
				answer->loc_is_event = false;
			else
				answer->index = atoi(token);
			break;
		default:
			if (tokentype != JSON_TOKEN_STRING && tokentype != JSON_TOKEN_NUMBER)
				break;
			if (position == 3 && strcmp(token, "EventCreateCustomer") == 0)
				answer->variant = VARIANT_CUSTOMER;
			else if (position == 3 && strcmp(token, "EventCreateExternalCustomer") == 0)
				answer->variant = VARIANT_EXTERNAL;
			else if (position == 6 && strncmp(answer->path.data, "metadata.", 9) == 0 &&
					 (strcmp(token, "constrained-str") == 0 || strcmp(token, "int") == 0 ||
					  strcmp(token, "float") == 0 || strcmp(token, "bool") == 0))
				 /* which type of value was tried: noise */ ;
			else if (answer->path.len < MAX_MESSAGE_BYTES)
			{
				if (answer->path.len > 0)
					appendStringInfoChar(&answer->path, '.');
				append_clean(&answer->path, token, MAX_WORD_BYTES);
			}
			break;
	}
}

static AnswerField
answer_field(const char *name)
{
	static const struct
	{
		const char *name;
		AnswerField field;
	}			fields[] = {
		{"inserted", FIELD_INSERTED},
		{"duplicates", FIELD_DUPLICATES},
		{"error", FIELD_ERROR},
		{"detail", FIELD_DETAIL},
		{"type", FIELD_TYPE},
		{"loc", FIELD_LOC},
		{"msg", FIELD_MSG}
	};

	for (int i = 0; i < lengthof(fields); i++)
	{
		if (strcmp(fields[i].name, name) == 0)
			return fields[i].field;
	}
	return FIELD_OTHER;
}

static void
start_container(Answer *answer, char kind)
{
	if (in_loc(answer))
		answer->loc_is_event = false;
	if (answer->depth == 1 && answer->field == FIELD_INSERTED)
		answer->inserted = -1;
	if (answer->depth == 1 && answer->field == FIELD_DUPLICATES)
		answer->duplicates = -1;

	/* The depth was checked before; see read_answer. */
	answer->container[++answer->depth] = kind;
	if (answer->depth == 3 && in_entry(answer))
		start_entry(answer);
}

static ABP_JSON_ACTION
answer_object_start(void *state)
{
	start_container(state, '{');
	return ABP_JSON_GO_ON;
}

static ABP_JSON_ACTION
answer_array_start(void *state)
{
	start_container(state, '[');
	return ABP_JSON_GO_ON;
}

static ABP_JSON_ACTION
answer_object_end(void *state)
{
	Answer	   *answer = state;

	if (answer->depth == 3 && in_entry(answer))
		end_entry(answer);
	answer->depth--;
	return ABP_JSON_GO_ON;
}

static ABP_JSON_ACTION
answer_array_end(void *state)
{
	((Answer *) state)->depth--;
	return ABP_JSON_GO_ON;
}

static ABP_JSON_ACTION
answer_field_start(void *state, char *name, bool isnull)
{
	Answer	   *answer = state;

	if (answer->depth == 1)
		answer->field = answer_field(name);
	else if (answer->depth == 3 && in_entry(answer))
	{
		answer->entry_field = answer_field(name);
		/* of a key given twice, the last counts */
		if (answer->entry_field == FIELD_LOC)
		{
			answer->loc_len = 0;
			answer->loc_is_event = true;
			answer->variant = VARIANT_NONE;
			resetStringInfo(&answer->path);
		}
	}
	return ABP_JSON_GO_ON;
}

/* A count of an answer, or -1 if it is none. */
static int64
read_count(const char *token, JsonTokenType tokentype)
{
	if (tokentype != JSON_TOKEN_NUMBER || strlen(token) > 18 ||
		strspn(token, "0123456789") != strlen(token))
		return -1;
	return strtoll(token, NULL, 10);
}

static ABP_JSON_ACTION
answer_scalar(void *state, char *token, JsonTokenType tokentype)
{
	Answer	   *answer = state;

	if (answer->depth == 1 && answer->container[1] == '{')
	{
		if (answer->field == FIELD_INSERTED)
			answer->inserted = read_count(token, tokentype);
		else if (answer->field == FIELD_DUPLICATES)
			answer->duplicates = read_count(token, tokentype);
		else if (answer->field == FIELD_ERROR && tokentype == JSON_TOKEN_STRING)
			answer->error = token;
	}
	else if (in_loc(answer))
		read_loc(answer, token, tokentype);
	else if (answer->depth == 3 && in_entry(answer) && tokentype == JSON_TOKEN_STRING)
	{
		if (answer->entry_field == FIELD_TYPE)
			answer->type = token;
		else if (answer->entry_field == FIELD_MSG)
			answer->msg = token;
	}
	return ABP_JSON_GO_ON;
}

/*
 * Make an answer safe to parse: returns a copy of as much of it as is valid
 * UTF-8, in which escapes that the parser might raise an error on (zero,
 * surrogates, what the database's encoding lacks) are replaced by a question
 * mark's.  Returns NULL if it is nested too deeply, since the parser raises an
 * error when it runs out of stack.
 */
static char *
defuse_json(const char *body, size_t len, int *valid_len)
{
	int			valid = pg_encoding_verifymbstr(PG_UTF8, body, (int) Min(len, MaxAllocSize / 2));
	char	   *copy = palloc(valid + 1);
	int			depth = 0;
	bool		in_string = false;

	memcpy(copy, body, valid);
	copy[valid] = '\0';
	*valid_len = valid;

	for (int i = 0; i < valid; i++)
	{
		char		c = copy[i];

		if (!in_string)
		{
			if (c == '"')
				in_string = true;
			else if (c == '{' || c == '[')
			{
				if (++depth > MAX_ANSWER_DEPTH)
					return NULL;
			}
			else if (c == '}' || c == ']')
				depth--;
		}
		else if (c == '"')
			in_string = false;
		else if (c == '\\')
		{
			i++;
			if (copy[i] == 'u' && valid - i > 4 &&
				(strncmp(copy + i + 1, "00", 2) != 0 ||
				 strncmp(copy + i + 1, "0000", 4) == 0 ||
				 strchr("01234567", copy[i + 3]) == NULL) &&
				strspn(copy + i + 1, "0123456789abcdefABCDEF") >= 4)
				memcpy(copy + i + 1, "003f", 4);
		}
	}
	return copy;
}

/*
 * Read an answer's body.  Returns false if it is not JSON as a whole; what
 * came before the flaw has been read all the same.  Allocates in the current
 * context and raises no error on any bytes.
 */
static bool
read_answer(Answer *answer, const char *body, size_t len)
{
	JsonSemAction actions = {0};
	char	   *json;
	int			json_len;

	answer->inserted = -1;
	initStringInfo(&answer->path);

	if (body == NULL || len == 0)
		return false;
	json = defuse_json(body, len, &json_len);
	if (json == NULL)
		return false;

	actions.semstate = answer;
	actions.object_start = answer_object_start;
	actions.object_end = answer_object_end;
	actions.array_start = answer_array_start;
	actions.array_end = answer_array_end;
	actions.object_field_start = answer_field_start;
	actions.scalar = answer_scalar;

	return pg_parse_json(abp_make_json_lexer(json, json_len), &actions) == JSON_SUCCESS &&
		json_len == len;
}

/*
 * Whether an error is all about the clock, and in which words to say it.  An
 * event is of one variant; errors about the other are noise.
 */
static const char *
choose_reason(const EventErrors *event, bool *clock_skew)
{
	static const EventVariant order[] = {
		VARIANT_NONE, VARIANT_CUSTOMER, VARIANT_EXTERNAL
	};
	bool		skewed = false;

	*clock_skew = false;
	for (int i = 0; i < lengthof(order); i++)
	{
		if (event->other_variant[order[i]])
			continue;
		if (event->reason[order[i]] != NULL)
			return event->reason[order[i]];
		skewed |= event->clock_skew[order[i]];
	}
	if (skewed)
	{
		*clock_skew = true;
		return "timestamp: must be in the past by Polar's clock";
	}

	if (event->other_variant[VARIANT_CUSTOMER] && event->other_variant[VARIANT_EXTERNAL])
		return "customer_id or external_customer_id: Field required (missing)";
	return "refused for no reason that was given";
}

/* Fill in which events were refused. */
static void
collect_refused(Verdict *verdict, const Answer *answer)
{
	verdict->refused = palloc(sizeof(RefusedEvent) * answer->nnamed);
	for (int i = 0; i < answer->nevents; i++)
	{
		RefusedEvent *refused;

		if (!answer->events[i].named)
			continue;
		refused = &verdict->refused[verdict->nrefused++];
		refused->index = i;
		refused->reason = pstrdup(choose_reason(&answer->events[i],
												&refused->clock_skew));
	}
}

/*
 * A Retry-After header in milliseconds, 0 to an hour: seconds, or a date in
 * one of the three forms of RFC 9110, section 5.6.7.  -1 if it is neither.
 */
static int64
read_retry_after(const char *header, TimestampTz now)
{
	static const char *const names[] = {
		"Jan", "Feb", "Mar", "Apr", "May", "Jun",
		"Jul", "Aug", "Sep", "Oct", "Nov", "Dec"
	};
	char		name[4];
	int			year;
	int			month = 0;
	int			day;
	int			hour;
	int			minute;
	int			second;
	int			end = 0;
	const char *p = header;
	TimestampTz at;

	if (header == NULL)
		return -1;
	while (*p == ' ' || *p == '\t')
		p++;

	if (*p >= '0' && *p <= '9')
	{
		int64		seconds = 0;

		for (; *p >= '0' && *p <= '9'; p++)
			seconds = Min(seconds * 10 + (*p - '0'), MAX_RETRY_AFTER_MS);
		while (*p == ' ' || *p == '\t')
			p++;
		return *p == '\0' ? Min(seconds * 1000, MAX_RETRY_AFTER_MS) : -1;
	}
	if (*p == '-' && p[1] >= '0' && p[1] <= '9')
		return 0;

	if (sscanf(p, "%*3[A-Za-z], %2d %3[A-Za-z] %4d %2d:%2d:%2d GMT%n",
			   &day, name, &year, &hour, &minute, &second, &end) == 6 && end > 0)
		 /* IMF-fixdate */ ;
	else if (sscanf(p, "%*9[A-Za-z], %2d-%3[A-Za-z]-%2d %2d:%2d:%2d GMT%n",
					&day, name, &year, &hour, &minute, &second, &end) == 6 && end > 0)
	{
		/* RFC 850: two digits of the year, at most 50 years ahead */
		int			this_year;
		int			unused;

		j2date((int) (now / USECS_PER_DAY) + POSTGRES_EPOCH_JDATE,
			   &this_year, &unused, &unused);
		year += this_year - this_year % 100;
		if (year > this_year + 50)
			year -= 100;
	}
	else if (sscanf(p, "%*3[A-Za-z] %3[A-Za-z] %2d %2d:%2d:%2d %4d",
					name, &day, &hour, &minute, &second, &year) != 6)
		return -1;				/* not asctime() either */

	while (month < lengthof(names) && pg_strcasecmp(names[month], name) != 0)
		month++;
	if (month == lengthof(names) || year < 1 || day < 1 || day > 31 ||
		hour < 0 || hour > 23 || minute < 0 || minute > 59 || second < 0 || second > 60)
		return -1;

	at = ((int64) date2j(year, month + 1, day) - POSTGRES_EPOCH_JDATE) * USECS_PER_DAY +
		(hour * SECS_PER_HOUR + minute * SECS_PER_MINUTE + second) * USECS_PER_SEC;
	if (at <= now)
		return 0;
	if (at - now >= INT64CONST(1000) * MAX_RETRY_AFTER_MS)
		return MAX_RETRY_AFTER_MS;
	return (at - now + 999) / 1000;
}

/*
 * Begin the error text of a verdict: the status, and Polar's error code if it
 * looks like one (letters and underscores: no token, no customer's data).
 */
static void
start_error(StringInfo error, long http_status, const char *code)
{
	appendStringInfo(error, "HTTP %ld", http_status);
	if (code != NULL && *code != '\0' && strlen(code) <= MAX_WORD_BYTES &&
		strspn(code, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_") == strlen(code) &&
		strncmp(code, "polar_", 6) != 0)
		appendStringInfo(error, " (%s)", code);
	appendStringInfoString(error, ": ");
}

/* What the reader can do about an answer that the configuration is to blame for. */
static const char *
pause_advice(long http_status)
{
	switch (http_status)
	{
		case 401:
			return "the access token is missing, expired or revoked; give the server a valid one for this environment";
		case 403:
			return "the access token must have the scope events:write; give the server one that has";
		case 404:
			return "there is no Events Ingest API at this address; check the server's options url and environment";
		case 405:
		case 411:
			return "the request did not arrive as it was sent; check the server's options url and proxy";
		case 407:
			return "the proxy asks for credentials; check the server's option proxy";
		default:
			if (http_status >= 300 && http_status < 400)
				return "the address redirects elsewhere; set the server's option url to where the API is";
			return "unexpected; check the server's options and its access token";
	}
}

/*
 * Judge the answer to a request with this many events.  body need not be
 * zero-terminated, may be NULL if empty, and may hold any bytes: nothing in it
 * raises an error.  retry_after is that header's text or NULL.  The verdict is
 * palloc'd.
 */
Verdict    *
abp_polar_judge(long http_status, const char *body, size_t len, bool truncated,
				const char *retry_after, int nevents, TimestampTz now)
{
	Verdict    *verdict = palloc0(sizeof(Verdict));
	MemoryContext caller = CurrentMemoryContext;
	MemoryContext reading;
	Answer		answer = {0};
	StringInfoData error;
	bool		whole;

	initStringInfo(&error);
	reading = AllocSetContextCreate(caller, "aibilling_polar answer",
									ALLOCSET_DEFAULT_SIZES);
	MemoryContextSwitchTo(reading);
	answer.nevents = Max(nevents, 0);
	if (http_status == 422)
		answer.events = palloc0(sizeof(EventErrors) * (answer.nevents + 1));
	whole = read_answer(&answer, body, len) && !truncated;
	MemoryContextSwitchTo(caller);

	verdict->retry_after_ms = read_retry_after(retry_after, now);

	start_error(&error, http_status, answer.error);
	if (http_status == 200)
	{
		if (whole && answer.inserted >= 0 && answer.duplicates >= 0 &&
			answer.inserted + answer.duplicates == answer.nevents)
		{
			verdict->kind = VERDICT_DELIVERED;
			verdict->inserted = answer.inserted;
			verdict->duplicates = answer.duplicates;
		}
		else
		{
			verdict->kind = VERDICT_UNKNOWN;
			if (whole && answer.inserted >= 0 && answer.duplicates >= 0)
				appendStringInfo(&error, "of %d events Polar counts " INT64_FORMAT " inserted and " INT64_FORMAT " duplicates",
								 nevents, answer.inserted, answer.duplicates);
			else
				appendStringInfoString(&error, "the answer is not Polar's");
		}
	}
	else if (http_status == 422)
	{
		/*
		 * An answer that was cut still names the events it names; one that is
		 * not JSON for another reason is not trusted with that.
		 */
		if (answer.nnamed > 0 && (whole || truncated))
		{
			verdict->kind = VERDICT_ROWS_REFUSED;
			collect_refused(verdict, &answer);
			appendStringInfo(&error, "Polar refuses %d of %d events: %s",
							 verdict->nrefused, nevents, verdict->refused[0].reason);
		}
		else
		{
			verdict->kind = VERDICT_BATCH_REFUSED;
			appendStringInfoString(&error, "Polar refuses the request and names no event");
		}
	}
	else if (http_status == 400)
	{
		verdict->kind = VERDICT_BATCH_REFUSED;
		appendStringInfoString(&error, "Polar cannot read the request");
	}
	else if (http_status == 413)
	{
		verdict->kind = VERDICT_TOO_LARGE;
		appendStringInfoString(&error, "the request is too large");
	}
	else if (http_status == 429)
	{
		verdict->kind = VERDICT_RATE_LIMITED;
		appendStringInfoString(&error, "too many requests");
	}
	else if (http_status == 408)
	{
		verdict->kind = VERDICT_SERVER_ERROR;
		appendStringInfoString(&error, "the server waited too long for the request");
	}
	else if (http_status >= 500 && http_status <= 599)
	{
		verdict->kind = VERDICT_SERVER_ERROR;
		appendStringInfoString(&error, "the server failed");
	}
	else if (http_status >= 300 && http_status <= 499)
	{
		verdict->kind = VERDICT_PAUSE;
		appendStringInfoString(&error, pause_advice(http_status));
	}
	else
	{
		verdict->kind = VERDICT_UNKNOWN;
		appendStringInfoString(&error, "the answer is not Polar's");
	}

	if (verdict->kind != VERDICT_DELIVERED)
		verdict->error = error.data;
	else
		pfree(error.data);
	MemoryContextDelete(reading);
	return verdict;
}
