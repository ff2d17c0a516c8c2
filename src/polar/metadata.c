/*-------------------------------------------------------------------------
 *
 * metadata.c
 *	  An event's metadata: of the row, or of the user's own function.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <math.h>

#include "common/int.h"
#include "mb/pg_wchar.h"

#include "base/decimal.h"
#include "base/json_member.h"
#include "base/json_walk.h"
#include "base/json_writer.h"
#include "base/numeric_math.h"
#include "base/text_view.h"
#include "base/usage_row.h"
#include "polar/event_format.h"
#include "polar/identity.h"
#include "polar/limits.h"
#include "polar/metadata.h"

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
				abp_json_append_string(out, v.val.string.val, v.val.string.len);
				appendStringInfoChar(out, ':');
				break;
			default:
				if (v.type == jbvString)
					abp_json_append_string(out, v.val.string.val, v.val.string.len);
				else if (v.type == jbvNumeric)
					appendStringInfoString(out,
										   numeric_text(v.val.numeric));
				else if (v.type == jbvBool)
					appendStringInfoString(out, v.val.boolean ? "true" : "false");
				else
					appendStringInfoString(out, "null");
				comma = true;
				break;
		}
	}
}

/*
 * The amount of Polar's _cost, in cents, of a cost's text: without exponent or
 * trailing zeros.  Polar stores a double, so at most 15 significant digits and
 * 12 decimals are kept, rounded half away from zero.  The cost must be finite.
 */
static TextView
amount_of(const char *cents)
{
	TextView	amount = text_view_of(cents);
	DecimalText decimal;

	if (memchr(amount.data, '.', amount.len) != NULL)
	{
		while (amount.data[amount.len - 1] == '0')
			amount.len--;
		if (amount.data[amount.len - 1] == '.')
			amount.len--;
	}

	/* "0." and 12 decimals: nothing shorter can be too precise */
	if (amount.len <= MAX_AMOUNT_DECIMALS + 2)
		return amount;

	if (!abp_decimal_read(amount.data, amount.len, &decimal))
		elog(ERROR, "unexpected cost: it is not finite");
	abp_decimal_round(&decimal, MAX_AMOUNT_DIGITS, MAX_AMOUNT_DECIMALS);
	return text_view_of(abp_decimal_write(&decimal));
}

/*
 * The same of a number, palloc'd.
 */
char	   *
abp_metadata_amount(Numeric cost_cents)
{
	TextView	amount = amount_of(numeric_text(cost_cents));

	return pnstrdup(amount.data, amount.len);
}

/* How many digits are in front of the point? */
static int
whole_digits(const char *number)
{
	return strspn(number + (*number == '-'), "0123456789");
}

/*
 * Is an amount that amount_of has made of a cost too large?  Then it says so, and
 * returns true.
 */
static bool
amount_too_large(JsonWriter *w, TextView amount, const char *cents)
{
	/* what amount_of leaves out of a text is behind the point */
	if (whole_digits(amount.data) <= MAX_AMOUNT_WHOLE)
		return false;
	if (whole_digits(cents) <= MAX_AMOUNT_WHOLE)
		(void) abp_json_refuse(w, AMOUNT_ROUNDS_UP, "cost_cents");
	else
		(void) abp_json_refuse(w, "cost_cents must be below 100,000 (1,000 USD) in magnitude");
	return true;
}

/*
 * A number as JSON, all its digits kept.  Polar parses numbers as doubles and
 * fails, for the whole request, on one that is not finite.
 */
static bool
put_number(JsonWriter *w, Numeric number, const char *what, TextView key)
{
	char	   *str = numeric_text(number);
	int			len = strlen(str);

	if (numeric_is_nan(number) || numeric_is_inf(number) ||
		(len > 300 && isinf(strtod(str, NULL))))
		return abp_json_refuse(w, "%s \"%.*s\" must be within the range of double precision",
							   what, abp_quoted_len(key.data, key.len), key.data);
	abp_json_put_bytes(w, str, len);
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
		abp_json_put_literal(w, ",\"" key "\":"); \
		abp_json_put_int64(w, value); \
		(w)->nkeys++; \
	} while (0)

/* A string column as metadata; NULL and '' are left out. */
static inline bool
put_text_entry(JsonWriter *w, const char *json_key, int json_key_len,
			   const char *column, TextView str)
{
	if (str.data == NULL || str.len == 0)
		return true;
	if (text_longer_than(str.data, str.len, MAX_VALUE_CHARS))
		return abp_json_refuse(w, "%s must not exceed %d characters", column, MAX_VALUE_CHARS);

	abp_json_put_bytes(w, json_key, json_key_len);
	abp_json_put_string(w, str.data, str.len);
	w->nkeys++;
	return true;
}

#define put_text(w, key, column, str) \
	put_text_entry(w, ",\"" key "\":", sizeof(",\"" key "\":") - 1, column, str)

/* Would this tag, its prefix before it, be one of our own keys? */
static bool
is_own_key(const char *prefix, int prefix_len, TextView key)
{
	for (int i = 0; i < NUM_OWN_KEYS; i++)
	{
		if (abp_own_keys[i].len == prefix_len + key.len &&
			memcmp(abp_own_keys[i].data, prefix, prefix_len) == 0 &&
			memcmp(abp_own_keys[i].data + prefix_len, key.data, key.len) == 0)
			return true;
	}
	return false;
}

/* The key of an entry whose name the user chose, prefix and all. */
static bool
put_key(JsonWriter *w, const char *prefix, int prefix_len, TextView key,
		const char *what)
{
	if (unlikely(prefix_len + key.len > MAX_KEY_CHARS) &&
		pg_mbstrlen_with_len(prefix, prefix_len) +
		pg_mbstrlen_with_len(key.data, key.len) > MAX_KEY_CHARS)
		return abp_json_refuse(w, "%s \"%.*s...\" must not exceed %d characters as a metadata key",
							   what, abp_quoted_len(key.data, key.len), key.data, MAX_KEY_CHARS);

	if (prefix_len == 0)
	{
		abp_json_put_literal(w, ",");
		abp_json_put_string(w, key.data, key.len);
	}
	else if (w->body != NULL || w->convert)
	{
		char		joined[2 * MAX_KEY_CHARS * MAX_MULTIBYTE_CHAR_LEN];

		memcpy(joined, prefix, prefix_len);
		memcpy(joined + prefix_len, key.data, key.len);
		abp_json_put_literal(w, ",");
		abp_json_put_string(w, joined, prefix_len + key.len);
	}
	abp_json_put_literal(w, ":");
	w->nkeys++;
	return true;
}

/*
 * An entry whose key and value are the user's.  null and '' are left out.
 * Objects and arrays become JSON text, or are refused.
 */
static bool
put_entry(JsonWriter *w, const char *prefix, int prefix_len, TextView key,
		  const JsonbValue *value, const char *what, bool nested_as_text)
{
	bool		ok = true;
	StringInfoData nested;

	if (value->type == jbvNull ||
		(value->type == jbvString && value->val.string.len == 0))
		return true;
	if (value->type == jbvBinary && !nested_as_text)
		return abp_json_refuse(w, "%s \"%.*s\" must be a string, a number or a boolean",
							   what, abp_quoted_len(key.data, key.len), key.data);
	if (!put_key(w, prefix, prefix_len, key, what))
		return false;

	switch (value->type)
	{
		case jbvString:
			if (text_longer_than(value->val.string.val, value->val.string.len, MAX_VALUE_CHARS))
				return abp_json_refuse(w, "%s \"%.*s\" must not exceed %d characters",
									   what, abp_quoted_len(key.data, key.len), key.data,
									   MAX_VALUE_CHARS);
			abp_json_put_string(w, value->val.string.val, value->val.string.len);
			break;
		case jbvNumeric:
			ok = put_number(w, value->val.numeric, what, key);
			break;
		case jbvBool:
			if (value->val.boolean)
				abp_json_put_literal(w, "true");
			else
				abp_json_put_literal(w, "false");
			break;
		default:
			initStringInfo(&nested);
			append_compact_json(&nested, value->val.binary.data);
			if (text_longer_than(nested.data, nested.len, MAX_VALUE_CHARS))
				ok = abp_json_refuse(w, "%s \"%.*s\" must not exceed %d characters as JSON text",
									 what, abp_quoted_len(key.data, key.len), key.data,
									 MAX_VALUE_CHARS);
			else
				abp_json_put_string(w, nested.data, nested.len);
			pfree(nested.data);
			break;
	}
	return ok;
}

/* Close the object that started at this offset of the body. */
static void
close_object(JsonWriter *w, int start)
{
	if (w->body == NULL)
		return;
	if (w->body->len == start)
		abp_json_put_literal(w, "{");
	else
		w->body->data[start] = '{';
	abp_json_put_literal(w, "}");
}

/* Are there no more keys than Polar takes? */
static bool
check_key_count(JsonWriter *w)
{
	if (unlikely(w->nkeys > MAX_METADATA_KEYS))
		return abp_json_refuse(w, "metadata must not have more than %d keys, with the tags it has %d",
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

/* Counts of the row that were given, and sums of them. */
static void
put_counts(JsonWriter *w, const UsageCounts *counts, int64 total, int64 cache_write)
{
	const bool *given = counts->given;
	const int64 *value = counts->value;

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
}

/*
 * Columns that the event itself has no place for, because Polar ignores them
 * beside the identity that is sent, are kept as tags.  A tag of the same name
 * yields to them.
 */
typedef struct TagColumns
{
	bool		external_customer_id;
	bool		external_member_id;
	bool		member_id;
} TagColumns;

/* A column of text as a tag. */
static bool
put_column_as_tag(JsonWriter *w, const char *prefix, const char *column, TextView text)
{
	TextView	key = text_view_of(column);
	JsonbValue	tag;

	tag.type = jbvString;
	tag.val.string.val = unconstify(char *, text.data);
	tag.val.string.len = text.len;

	return put_entry(w, prefix, strlen(prefix), key, &tag, "column", false);
}

/* Put the columns that become tags, and note which. */
static bool
put_columns_as_tags(JsonWriter *w, const UsageRow *row, const char *prefix,
					const Identity *identity, TagColumns *columns)
{
	static const TextView member_id = {"member_id", 9};
	bool		customer = (identity->kind == IDENTITY_CUSTOMER);

	columns->external_customer_id = customer && row->external_customer_id.data != NULL &&
		row->external_customer_id.len > 0;
	columns->external_member_id = customer && row->external_member_id.data != NULL &&
		row->external_member_id.len > 0;
	columns->member_id = !customer && row->member_id != NULL;

	if (columns->external_customer_id &&
		!put_column_as_tag(w, prefix, "external_customer_id", row->external_customer_id))
		return false;
	if (columns->external_member_id &&
		!put_column_as_tag(w, prefix, "external_member_id", row->external_member_id))
		return false;
	if (columns->member_id)
	{
		if (!put_key(w, prefix, strlen(prefix), member_id, "column"))
			return false;
		abp_json_put_uuid(w, row->member_id);
	}
	return true;
}

/* Put the tags that no column or key of ours has taken the place of. */
static bool
put_tags(JsonWriter *w, Jsonb *tags, const char *prefix, const TagColumns *columns)
{
	int			prefix_len = strlen(prefix);
	ObjectWalk	walk;
	TextView	key;
	JsonbValue	tag;

	abp_walk_start(&walk, &tags->root);
	while (abp_walk_next(&walk, &key, &tag))
	{
		if (is_own_key(prefix, prefix_len, key) ||
			(columns->external_customer_id && text_view_is(key, "external_customer_id")) ||
			(columns->external_member_id && text_view_is(key, "external_member_id")) ||
			(columns->member_id && text_view_is(key, "member_id")))
			continue;
		if (!put_entry(w, prefix, prefix_len, key, &tag, "tag", true))
			return false;
	}
	return true;
}

/* Polar's _cost. */
static bool
put_cost(JsonWriter *w, const UsageRow *row)
{
	const char *cents;
	TextView	amount;

	w->nkeys++;

	/* When only checking, most rows need no look at the digits. */
	if (w->body == NULL && row->has_cost_nanos &&
		row->cost_nanos <= SAFE_COST_NANOS && row->cost_nanos >= -SAFE_COST_NANOS)
		return true;

	if (numeric_is_nan(row->cost_cents) || numeric_is_inf(row->cost_cents))
		return abp_json_refuse(w, "cost_cents must be finite");
	cents = row->cents_text != NULL ? row->cents_text : numeric_text(row->cost_cents);
	amount = amount_of(cents);
	if (amount_too_large(w, amount, cents))
		return false;
	abp_json_put_literal(w, ",\"_cost\":{\"amount\":\"");
	abp_json_put_bytes(w, amount.data, amount.len);
	abp_json_put_literal(w, "\",\"currency\":\"usd\"}");
	return true;
}

/* Polar's _llm. */
static void
put_llm(JsonWriter *w, const UsageRow *row, int64 total)
{
	const bool *given = row->counts.given;
	const int64 *value = row->counts.value;

	abp_json_put_literal(w, ",\"_llm\":{\"vendor\":");
	abp_json_put_string(w, row->provider.data, row->provider.len);
	abp_json_put_literal(w, ",\"model\":");
	abp_json_put_string(w, row->model.data, row->model.len);
	abp_json_put_literal(w, ",\"input_tokens\":");
	abp_json_put_int64(w, given[COUNT_INPUT] ? value[COUNT_INPUT] : 0);
	abp_json_put_literal(w, ",\"cached_input_tokens\":");
	abp_json_put_int64(w, given[COUNT_CACHE_READ] ? value[COUNT_CACHE_READ] : 0);
	abp_json_put_literal(w, ",\"output_tokens\":");
	abp_json_put_int64(w, given[COUNT_OUTPUT] ? value[COUNT_OUTPUT] : 0);
	abp_json_put_literal(w, ",\"total_tokens\":");
	abp_json_put_int64(w, total);
	abp_json_put_literal(w, "}");
	w->nkeys++;
}

/*
 * The metadata that a row makes by itself; false with a reason if Polar would
 * refuse it.
 */
bool
abp_metadata_put_row(JsonWriter *w, const UsageRow *row, const EventFormat *format,
					 const Identity *identity)
{
	int			start = w->body != NULL ? w->body->len : 0;
	int64		total;
	int64		cache_write;
	TagColumns	columns;

	if (!sum_counts(&row->counts, COUNT_INPUT, COUNT_OUTPUT, &total))
		return abp_json_refuse(w, "input_tokens and output_tokens must not exceed bigint together");
	if (!sum_counts(&row->counts, COUNT_CACHE_WRITE, COUNT_CACHE_WRITE_1H, &cache_write))
		return abp_json_refuse(w, "cache_write_tokens and cache_write_1h_tokens must not exceed bigint together");
	if (!put_text(w, "generation_id", "generation_id", row->generation_id) ||
		!put_text(w, "model_id", "model", row->model) ||
		!put_text(w, "provider", "provider", row->provider) ||
		!put_text(w, "sub_provider", "sub_provider", row->sub_provider))
		return false;
	put_counts(w, &row->counts, total, cache_write);

	if (row->provider_cost != NULL)
	{
		static const TextView provider_cost = {"provider_cost", 13};

		abp_json_put_literal(w, ",\"raw_provider_cost\":");
		if (!put_number(w, row->provider_cost, "column", provider_cost))
			return false;
		w->nkeys++;
	}
	if (!put_columns_as_tags(w, row, format->tag_prefix, identity, &columns) ||
		(row->tags != NULL && !put_tags(w, row->tags, format->tag_prefix, &columns)))
		return false;

	if (row->has_cost_nanos)
		put_count(w, "cost_nanos", row->cost_nanos);
	if (row->has_cost_nanos || row->cost_cents != NULL)
	{
		abp_json_put_literal(w, ",\"cost_currency\":\"usd\"");
		w->nkeys++;
	}
	if (!put_text(w, "external_id", "external_id", row->external_id))
		return false;
	if (row->cost_cents != NULL && !put_cost(w, row))
		return false;
	if (row->provider.data != NULL && row->provider.len > 0 &&
		row->model.data != NULL && row->model.len > 0)
		put_llm(w, row, total);

	close_object(w, start);
	return check_key_count(w);
}

/* --- metadata of the user's own function --------------------------------- */

/* The text of a number or a string; .data == NULL: it is neither. */
static TextView
number_or_string(const JsonbValue *value)
{
	TextView	view = {NULL, 0};

	if (value->type == jbvNumeric)
		view = text_view_of(numeric_text(value->val.numeric));
	else if (value->type == jbvString)
	{
		view.data = value->val.string.val;
		view.len = value->val.string.len;
	}
	return view;
}

/* The amount in the user's _cost: a number or a string, in cents. */
static bool
put_own_amount(JsonWriter *w, const JsonbValue *value)
{
	TextView text = number_or_string(value);
	DecimalText decimal;
	char	   *str;
	bool		valid;
	bool		rounded;

	if (text.data == NULL)
		return abp_json_refuse(w, "metadata \"_cost\" must have an amount, a number or a string");

	valid = abp_decimal_read(text.data, text.len, &decimal);
	if (valid && decimal.ndigits - decimal.point > MAX_AMOUNT_DECIMALS)
		return abp_json_refuse(w, "metadata \"_cost\" must have an amount of at most %d decimals",
							   MAX_AMOUNT_DECIMALS);
	rounded = valid && decimal.point <= MAX_AMOUNT_WHOLE;
	if (rounded)
		abp_decimal_round(&decimal, MAX_AMOUNT_DIGITS, MAX_AMOUNT_DECIMALS);
	if (!valid)
		return abp_json_refuse(w, "metadata \"_cost\" must have an amount that is a decimal number");
	if (decimal.point > MAX_AMOUNT_WHOLE && rounded)
		return abp_json_refuse(w, AMOUNT_ROUNDS_UP, "the amount of metadata \"_cost\"");
	if (decimal.point > MAX_AMOUNT_WHOLE)
		return abp_json_refuse(w, "metadata \"_cost\" must have an amount below 100,000 cents in magnitude");

	str = abp_decimal_write(&decimal);
	abp_json_put_literal(w, "\"");
	abp_json_put_bytes(w, str, strlen(str));
	abp_json_put_literal(w, "\"");
	pfree(str);
	pfree(decimal.digits);
	return true;
}

/* The user's own _cost. */
static bool
put_own_cost(JsonWriter *w, JsonbContainer *cost)
{
	JsonbValue	value;

	abp_json_put_literal(w, ",\"_cost\":{\"amount\":");
	if (getKeyJsonValueFromContainer(cost, "amount", 6, &value) == NULL)
		value.type = jbvNull;
	if (!put_own_amount(w, &value))
		return false;

	if (getKeyJsonValueFromContainer(cost, "currency", 8, &value) == NULL ||
		value.type != jbvString || value.val.string.len != 3 ||
		memcmp(value.val.string.val, "usd", 3) != 0)
		return abp_json_refuse(w, "metadata \"_cost\" must have the currency \"usd\"");
	abp_json_put_literal(w, ",\"currency\":\"usd\"}");
	return true;
}

/* An integer, also one with zeros after the point or in a string. */
static bool
put_own_count(JsonWriter *w, const char *key, const JsonbValue *value)
{
	TextView text = number_or_string(value);
	DecimalText decimal;
	char	   *str;
	bool		valid;

	/* Below 10^18 is safely within Polar's 64-bit column. */
	valid = text.data != NULL && memchr(text.data, 'e', text.len) == NULL &&
	memchr(text.data, 'E', text.len) == NULL &&
	abp_decimal_read(text.data, text.len, &decimal) &&
	decimal.ndigits <= decimal.point && decimal.point <= 18;

	if (!valid)
		return abp_json_refuse(w, "metadata \"_llm\" must have %s, an integer", key);

	str = abp_decimal_write(&decimal);
	abp_json_put_literal(w, ",\"");
	abp_json_put_bytes(w, key, strlen(key));
	abp_json_put_literal(w, "\":");
	abp_json_put_bytes(w, str, strlen(str));
	pfree(str);
	pfree(decimal.digits);
	return true;
}

/* The user's own _llm. */
static bool
put_own_llm(JsonWriter *w, JsonbContainer *llm)
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

	abp_json_put_literal(w, ",\"_llm\":");
	start = w->body != NULL ? w->body->len : 0;
	for (int i = 0; i < lengthof(fields); i++)
	{
		const char *key = fields[i].key;
		JsonbValue	value;

		if (!abp_json_member(llm, key, &value))
		{
			if (fields[i].required)
				return abp_json_refuse(w, "metadata \"_llm\" must have %s", key);
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
				return abp_json_refuse(w, "metadata \"_llm\" must have %s, a string", key);
			abp_json_put_literal(w, ",\"");
			abp_json_put_bytes(w, key, strlen(key));
			abp_json_put_literal(w, "\":");
			abp_json_put_string(w, value.val.string.val, value.val.string.len);
		}
	}
	close_object(w, start);
	return true;
}

/* The whole metadata as the user's function returned it. */
bool
abp_metadata_put_own(JsonWriter *w, Jsonb *metadata)
{
	int			start = w->body != NULL ? w->body->len : 0;
	ObjectWalk	walk;
	TextView	key;
	JsonbValue	value;

	if (!JB_ROOT_IS_OBJECT(metadata))
		return abp_json_refuse(w, "metadata must be an object");

	abp_walk_start(&walk, &metadata->root);
	while (abp_walk_next(&walk, &key, &value))
	{
		bool		is_cost = text_view_is(key, "_cost");
		bool		ok;

		if (!is_cost && !text_view_is(key, "_llm"))
			ok = put_entry(w, "", 0, key, &value, "metadata", false);
		else if (value.type == jbvNull ||
				 (value.type == jbvString && value.val.string.len == 0))
			continue;
		else if (value.type != jbvBinary ||
				 !JsonContainerIsObject(value.val.binary.data))
			ok = abp_json_refuse(w, "metadata \"%.*s\" must be an object", key.len, key.data);
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
