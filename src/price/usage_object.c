/*-------------------------------------------------------------------------
 *
 * usage_object.c
 *	  A provider's usage object: finding and reading its values.
 *
 * Each value that is read is marked in a bitmap over the bytes handed over.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <ctype.h>

#include "common/int.h"
#include "lib/stringinfo.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "utils/memutils.h"
#include "utils/numeric.h"

#include "base/numeric_math.h"
#include "price/usage_formats.h"

/* Longer doubts are cut: one number that nothing reads tells enough. */
#define MAX_DOUBT_BYTES 400

/* ----------------------------------------------------------------
 *		What is wrong with an object
 * ----------------------------------------------------------------
 */

static void append_words(StringInfo buf, const char *fmt, va_list args) pg_attribute_printf(2, 0);

/* Append words as printf() makes them. */
static void
append_words(StringInfo buf, const char *fmt, va_list args)
{
	for (;;)
	{
		va_list		copy;
		int			needed;

		va_copy(copy, args);
		needed = appendStringInfoVA(buf, fmt, copy);
		va_end(copy);
		if (needed == 0)
			return;
		enlargeStringInfo(buf, needed);
	}
}

/*
 * Say why the object is refused whatever is known of its cost; returns false
 * for the caller to pass on.
 */
bool
abp_usage_refuse(Reading *r, const char *fmt,...)
{
	va_list		args;

	va_start(args, fmt);
	append_words(r->reason, fmt, args);
	va_end(args);
	return false;
}

/* Is it known what the call cost, whatever its counts are? */
bool
abp_usage_cost_known(const Reading *r)
{
	return r->cost_given || r->cost != NULL;
}

/*
 * Say what is wrong with the numbers.  Returns false if that refuses the
 * object; true if the cost is known: the caller then leaves out the counts
 * concerned and goes on.
 */
bool
abp_usage_doubt(Reading *r, const char *fmt,...)
{
	bool		known = abp_usage_cost_known(r);
	StringInfo	buf = known ? r->doubt : r->reason;
	va_list		args;

	if (known && buf->len > MAX_DOUBT_BYTES)
		return true;
	if (buf->len > 0)
		appendStringInfoString(buf, "; ");
	va_start(args, fmt);
	append_words(buf, fmt, args);
	va_end(args);
	return known;
}

/* ----------------------------------------------------------------
 *		Finding and reading values
 * ----------------------------------------------------------------
 */

/*
 * A path as a reader writes it, with dots; palloc'd.
 */
char	   *
abp_usage_path_name(const char *path)
{
	char	   *name = pstrdup(path);

	for (char *p = name; *p; p++)
	{
		if (*p == '/')
			*p = '.';
	}
	return name;
}

/*
 * A JSON value's text for a message, cut to a length that fits one.
 */
char	   *
abp_usage_value_text(const JsonbValue *value)
{
	char	   *str;

	switch (value->type)
	{
		case jbvNumeric:
			str = numeric_text(value->val.numeric);
			break;
		case jbvString:
			{
				int			len = pg_mbcliplen(value->val.string.val,
											   value->val.string.len, 40);

				return psprintf("\"%.*s\"", len, value->val.string.val);
			}
		case jbvBool:
			return pstrdup(value->val.boolean ? "true" : "false");
		default:
			return pstrdup("a list or an object");
	}

	if (strlen(str) > 40)
		strcpy(str + 37, "...");
	return str;
}

/*
 * Is the text a plain decimal number that numeric_in() takes for certain?
 * It would also take "NaN" and "infinity", and raises on the rest.
 */
bool
abp_usage_is_decimal(const char *str, int len)
{
	const char *p = str;
	const char *end = str + len;
	int			digits = 0;

	if (len > 100)
		return false;
	if (p < end && (*p == '-' || *p == '+'))
		p++;
	for (; p < end && isdigit((unsigned char) *p); p++)
		digits++;
	if (p < end && *p == '.')
	{
		for (p++; p < end && isdigit((unsigned char) *p); p++)
			digits++;
	}
	if (digits == 0)
		return false;
	if (p < end && (*p == 'e' || *p == 'E'))
	{
		p++;
		if (p < end && (*p == '-' || *p == '+'))
			p++;
		/* two digits are more than any price needs */
		if (end - p < 1 || end - p > 2)
			return false;
		for (; p < end; p++)
		{
			if (!isdigit((unsigned char) *p))
				return false;
		}
	}
	return p == end;
}

/*
 * A decimal number in text, as abp_usage_is_decimal accepts it, as numeric.
 */
Numeric
abp_usage_decimal(const char *str, int len)
{
	return numeric_of_text(pnstrdup(str, len));
}

/*
 * A value that is read, or an object that has been looked at whole, is known
 * by the place of its first byte in the jsonb.
 */
void
abp_usage_mark_seen(Reading *r, const void *value)
{
	const char *byte = value;

	if (byte >= r->base && byte < r->base + r->size)
		r->seen[(byte - r->base) / BITS_PER_BYTE] |= 1 << (byte - r->base) % BITS_PER_BYTE;
}

/*
 * Was the value that starts at this byte read?
 */
bool
abp_usage_is_seen(const Reading *r, const void *value)
{
	const char *byte = value;

	return byte >= r->base && byte < r->base + r->size &&
		(r->seen[(byte - r->base) / BITS_PER_BYTE] & (1 << (byte - r->base) % BITS_PER_BYTE)) != 0;
}

/*
 * The i-th item of a list if it is an object, else NULL.
 */
JsonbContainer *
abp_usage_list_item(JsonbContainer *list, uint32 i)
{
	JsonbValue *item = getIthJsonbValueFromContainer(list, i);
	JsonbContainer *object = NULL;

	CHECK_FOR_INTERRUPTS();
	if (item->type == jbvBinary && JsonContainerIsObject(item->val.binary.data))
		object = item->val.binary.data;
	pfree(item);
	return object;
}

/*
 * The name and the value of an OpenTelemetry attribute in OTLP's JSON form,
 * {"key": ..., "value": {"intValue": "12"}}.  64-bit integers are strings
 * there, because JSON's readers keep doubles.  *place is where the value
 * stands.
 */
bool
abp_usage_attribute(JsonbContainer *item, JsonbValue *name, JsonbValue *found,
					JsonbContainer **place)
{
	static const char *const kinds[] = {"intValue", "stringValue", "doubleValue"};
	JsonbValue	value;

	if (item == NULL ||
		!getKeyJsonValueFromContainer(item, "key", 3, name) ||
		name->type != jbvString ||
		!getKeyJsonValueFromContainer(item, "value", 5, &value) ||
		value.type != jbvBinary ||
		!JsonContainerIsObject(value.val.binary.data))
		return false;

	*place = value.val.binary.data;
	for (int k = 0; k < lengthof(kinds); k++)
	{
		if (!getKeyJsonValueFromContainer(*place, kinds[k], strlen(kinds[k]), found))
			continue;
		if (k == 0 && found->type == jbvString &&
			abp_usage_is_decimal(found->val.string.val, found->val.string.len))
		{
			found->val.numeric = abp_usage_decimal(found->val.string.val,
												   found->val.string.len);
			found->type = jbvNumeric;
		}
		return true;
	}
	return false;
}

/* The value of an attribute in a list of them. */
static bool
find_attribute(Reading *r, JsonbContainer *list, const char *key, int keylen,
			   JsonbValue *found)
{
	uint32		n = JsonContainerSize(list);

	for (uint32 i = 0; i < n; i++)
	{
		JsonbValue	name;
		JsonbContainer *place;

		if (!abp_usage_attribute(abp_usage_list_item(list, i), &name, found, &place) ||
			name.val.string.len != keylen ||
			memcmp(name.val.string.val, key, keylen) != 0)
			continue;
		abp_usage_mark_seen(r, place);
		return true;
	}
	return false;
}

/*
 * The same key in the other case: promptTokens and prompt_tokens.  SDKs of
 * one provider dump its objects in either.  Returns the length, 0 if there is
 * no other case or not enough room.
 */
static int
change_case(const char *key, int len, char *other, int size)
{
	bool		camel = false;
	int			n = 0;

	for (int i = 0; i < len; i++)
		camel |= isupper((unsigned char) key[i]) != 0;
	for (int i = 0; i < len; i++)
	{
		if (n + 2 > size)
			return 0;
		if (camel && isupper((unsigned char) key[i]))
			other[n++] = '_';
		if (!camel && key[i] == '_' && i + 1 < len)
			other[n++] = pg_ascii_toupper((unsigned char) key[++i]);
		else
			other[n++] = pg_ascii_tolower((unsigned char) key[i]);
	}
	return n == len ? 0 : n;
}

/*
 * The value of one key.  Absent, null, {} and [] are all "not reported":
 * providers and their SDKs use them interchangeably.
 */
static bool
find_key(Reading *r, JsonbContainer *container, const char *key, int len,
		 JsonbValue *found)
{
	bool		present;

	if (JsonContainerIsArray(container))
		present = find_attribute(r, container, key, len, found);
	else
	{
		present = getKeyJsonValueFromContainer(container, key, len, found) != NULL;
		if (!present && r->other_case)
		{
			char		other[NAMEDATALEN];
			int			other_len = change_case(key, len, other, sizeof(other));

			present = other_len > 0 &&
				getKeyJsonValueFromContainer(container, other, other_len,
											 found) != NULL;
		}
	}

	return present && found->type != jbvNull &&
		!(found->type == jbvBinary &&
		  JsonContainerSize(found->val.binary.data) == 0);
}

/*
 * Follow a path: is there a value at its end?  A path that leads through
 * something else than objects ends nowhere, and what it leads through is
 * left for abp_usage_check_rest().
 */
static bool
find_path(Reading *r, JsonbContainer *container, const char *path,
		  JsonbValue *found)
{
	const char *step = path;

	for (;;)
	{
		const char *slash = strchr(step, '/');
		int			len = slash ? slash - step : (int) strlen(step);

		if (!find_key(r, container, step, len, found))
			return false;
		if (slash == NULL)
			return true;
		if (found->type != jbvBinary ||
			!JsonContainerIsObject(found->val.binary.data))
			return false;
		container = found->val.binary.data;
		step = slash + 1;
	}
}

/* The object or list at a path ("" is the container itself), or NULL. */
JsonbContainer *
abp_usage_container(Reading *r, JsonbContainer *container, const char *path)
{
	JsonbValue	found;

	if (*path == '\0')
		return container;
	if (!find_path(r, container, path, &found) || found.type != jbvBinary)
		return NULL;
	return found.val.binary.data;
}

/*
 * The object at a path ("" is the container itself), or NULL.
 */
JsonbContainer *
abp_usage_object(Reading *r, JsonbContainer *container, const char *path)
{
	JsonbContainer *object = abp_usage_container(r, container, path);

	return object && JsonContainerIsObject(object) ? object : NULL;
}

/*
 * The list at a path, or NULL.
 */
JsonbContainer *
abp_usage_list(Reading *r, JsonbContainer *container, const char *path)
{
	JsonbContainer *list = abp_usage_container(r, container, path);

	return list && JsonContainerIsArray(list) ? list : NULL;
}

/*
 * The list at a path where nothing else may be, or NULL.  Then *go_on says
 * whether to read on: there is nothing, or a doubt about what is there.
 */
JsonbContainer *
abp_usage_only_list(Reading *r, JsonbContainer *container, const char *path, bool *go_on)
{
	JsonbContainer *list;

	*go_on = true;
	if (!abp_usage_has(r, container, path))
		return NULL;
	list = abp_usage_list(r, container, path);
	if (list == NULL)
		*go_on = abp_usage_doubt(r, "%s is not a list", path);
	return list;
}

/*
 * The string at a path if it is not empty, palloc'd, or NULL.
 */
char	   *
abp_usage_string(Reading *r, JsonbContainer *container, const char *path)
{
	JsonbValue	found;

	if (find_path(r, container, path, &found) &&
		found.type == jbvString && found.val.string.len > 0)
		return pnstrdup(found.val.string.val, found.val.string.len);
	return NULL;
}

/* The first of some paths' strings, keys in either case; or NULL. */
char	   *
abp_usage_first_string(Reading *r, JsonbContainer *container, const char *const *paths)
{
	bool		other_case = r->other_case;
	char	   *found = NULL;

	r->other_case = true;
	for (int i = 0; i < MAX_PATHS && paths[i] && found == NULL; i++)
		found = abp_usage_string(r, container, paths[i]);
	r->other_case = other_case;
	return found;
}

/*
 * Is the string at a path this one?  Letters' case does not matter.
 */
bool
abp_usage_string_is(Reading *r, JsonbContainer *container, const char *path,
					const char *str)
{
	char	   *found = abp_usage_string(r, container, path);

	return found && pg_strcasecmp(found, str) == 0;
}

/*
 * Is there a value at the path?
 */
bool
abp_usage_has(Reading *r, JsonbContainer *container, const char *path)
{
	JsonbValue	found;

	return JsonContainerIsObject(container) && find_path(r, container, path, &found);
}

/*
 * Has the model's name, in the row or in the reply, this part in lower case?
 */
bool
abp_usage_model_has(Reading *r, const char *part)
{
	int			len = strlen(part);
	char	   *reply = abp_usage_first_string(r, r->root, r->format->model);

	for (int i = 0; i + len <= r->model.len; i++)
	{
		if (pg_strncasecmp(r->model.data + i, part, len) == 0)
			return true;
	}
	for (const char *p = reply; p && *p; p++)
	{
		if (pg_strncasecmp(p, part, len) == 0)
			return true;
	}
	return false;
}

/*
 * Find a value that has to be a number; see find_path.  An object or a list
 * is none, and is left for abp_usage_check_rest() to look into.
 */
static bool
find_number(Reading *r, JsonbContainer *container, const char *path,
			bool *present, JsonbValue *found)
{
	*present = find_path(r, container, path, found) && found->type != jbvBinary;
	if (*present && found->type != jbvNumeric)
	{
		*present = false;
		return abp_usage_doubt(r, "%s is not a number but %s",
							   abp_usage_path_name(path), abp_usage_value_text(found));
	}
	if (*present)
		abp_usage_mark_seen(r, found->val.numeric);
	return true;
}

/*
 * Is the number 0?
 */
bool
abp_usage_is_zero(Numeric number)
{
	return numeric_signum(number) == 0;
}

/*
 * The whole number from 0 to the largest bigint, or what is wrong with it.
 * Each INSERT reads a dozen: the bounds are made once, and JSON's integers
 * are known by their scale.
 */
const char *
abp_usage_whole_number(Numeric number, int64 *value)
{
	static Numeric largest = NULL;
	static Numeric zero;

	if (largest == NULL)
	{
		MemoryContext old = MemoryContextSwitchTo(TopMemoryContext);

		zero = int64_to_numeric(0);
		largest = int64_to_numeric(PG_INT64_MAX);
		MemoryContextSwitchTo(old);
	}

	if (numeric_is_nan(number) || numeric_is_inf(number) ||
		numeric_compare(number, largest) > 0)
		return "beyond the range of bigint";
	if (numeric_compare(number, zero) < 0)
		return "negative";
	*value = numeric_as_int64(number);
	if (DatumGetInt32(DirectFunctionCall1(numeric_scale, NumericGetDatum(number))) != 0 &&
		numeric_compare(number, int64_to_numeric(*value)) != 0)
		return "not a whole number";
	return NULL;
}

/*
 * Read a count: a whole number from 0 to the largest bigint.  *count stays as
 * it is if there is none.
 */
bool
abp_usage_read_count(Reading *r, JsonbContainer *container, const char *path,
					 Count *count)
{
	JsonbValue	found;
	bool		present;
	int64		value;
	const char *wrong;

	if (!find_number(r, container, path, &present, &found))
		return false;
	if (!present)
		return true;

	wrong = abp_usage_whole_number(found.val.numeric, &value);
	if (wrong)
		return abp_usage_doubt(r, "%s is %s: %s", abp_usage_path_name(path),
							   wrong, abp_usage_value_text(&found));
	count->value = value;
	count->given = true;
	count->name = path;
	return true;
}

/*
 * Read the rules of a group in one of its places.
 */
static bool
read_group(Reading *r, JsonbContainer *usage, const RuleGroup *group,
		   const char *place, Count *count)
{
	JsonbValue	found;

	if (!find_path(r, usage, place, &found))
		return true;
	if (found.type != jbvBinary)
		return abp_usage_doubt(r, "%s is not an object", abp_usage_path_name(place));
	if (!JsonContainerIsObject(found.val.binary.data))
		return true;

	for (int i = 0; i < group->nrules; i++)
	{
		const Rule *rule = &group->rules[i];
		Count	   *target = &count[rule->field];
		Count		part = {0};

		if (target->value > 0)
			continue;
		if (!abp_usage_read_count(r, found.val.binary.data, rule->path, &part))
			return false;
		if (part.given)
		{
			*target = part;
			target->name = psprintf("%s/%s", place, rule->path);
		}
	}
	return true;
}

/* The bit of a key in a mask of keys. */
static inline uint64
key_bit(const char *key, int len)
{
	return UINT64CONST(1) << ((len * 7 + key[0] + 3 * key[len - 1]) & 63);
}

/*
 * The bits of all keys of an object: most of a description's paths are in no
 * one object, and need not be searched for.
 */
static uint64
key_mask(JsonbContainer *object)
{
	uint32		n = JsonContainerSize(object);
	const char *base = (const char *) (object->children + 2 * n);
	uint64		mask = 0;

	for (uint32 i = 0; i < n; i++)
	{
		uint32		len = getJsonbLength(object, i);

		if (len > 0)
			mask |= key_bit(base + getJsonbOffset(object, i), len);
	}
	return mask;
}

/*
 * Read every field of the format's description that the object has.  Of
 * several rules for one field the first with a number above 0 counts: some
 * gateways leave the names that they do not use at 0.
 */
bool
abp_usage_read_counts(Reading *r, JsonbContainer *usage, Count *count)
{
	bool		masked = !r->other_case && JsonContainerIsObject(usage);
	uint64		mask = masked ? key_mask(usage) : 0;

	for (int i = 0; i < r->format->nrules; i++)
	{
		const Rule *rule = &r->format->rules[i];

		if (count[rule->field].value == 0 &&
			!(masked && (mask & key_bit(rule->path, strcspn(rule->path, "/"))) == 0) &&
			!abp_usage_read_count(r, usage, rule->path, &count[rule->field]))
			return false;
	}
	for (int g = 0; g < r->format->ngroups; g++)
	{
		const RuleGroup *group = &r->format->groups[g];

		for (int i = 0; group->places[i]; i++)
		{
			if (masked && (mask & key_bit(group->places[i], strlen(group->places[i]))) == 0)
				continue;
			if (!read_group(r, usage, group, group->places[i], count))
				return false;
		}
	}
	return true;
}

/*
 * Add to a count, which may not have been reported so far.
 */
bool
abp_usage_add_count(Reading *r, Count *count, int64 value, const char *name)
{
	int64		sum;

	if (pg_add_s64_overflow(count->value, value, &sum))
		return abp_usage_doubt(r, "%s makes a sum beyond the range of bigint",
							   abp_usage_path_name(name));
	count->value = sum;
	if (!count->given)
		count->name = name;
	count->given = true;
	return true;
}

/*
 * Read a quantity that may be fractional, such as seconds.  It is not
 * negative; *quantity stays as it is if there is none.
 */
bool
abp_usage_read_quantity(Reading *r, JsonbContainer *container, const char *path,
						Numeric *quantity)
{
	JsonbValue	found;
	bool		present;

	if (!find_number(r, container, path, &present, &found))
		return false;
	if (!present)
		return true;
	if (numeric_compare(found.val.numeric, int64_to_numeric(0)) < 0)
		return abp_usage_doubt(r, "%s is negative: %s",
							   abp_usage_path_name(path), abp_usage_value_text(&found));
	*quantity = found.val.numeric;
	return true;
}

/*
 * Read an amount of money: a JSON number or, as gateways do it to keep the
 * digits, a string with one.  Taken over exactly; *amount stays as it is if
 * there is none.
 */
bool
abp_usage_read_amount(Reading *r, JsonbContainer *container, const char *path,
					  Numeric *amount)
{
	JsonbValue	found;
	Numeric		number;

	if (!find_path(r, container, path, &found))
		return true;

	if (found.type == jbvNumeric)
	{
		number = found.val.numeric;
		abp_usage_mark_seen(r, number);
	}
	else if (found.type == jbvString &&
			 abp_usage_is_decimal(found.val.string.val, found.val.string.len))
	{
		number = abp_usage_decimal(found.val.string.val, found.val.string.len);
		abp_usage_mark_seen(r, found.val.string.val);
	}
	else
		return abp_usage_doubt(r, "%s is not a decimal number but %s",
							   abp_usage_path_name(path), abp_usage_value_text(&found));

	/* The bound keeps later arithmetic far from numeric's own limits. */
	if (numeric_is_nan(number) || numeric_is_inf(number) ||
		numeric_compare(number, int64_to_numeric(PG_INT64_MAX)) > 0)
		return abp_usage_doubt(r, "%s is no possible cost: %s",
							   abp_usage_path_name(path), abp_usage_value_text(&found));
	if (numeric_compare(number, int64_to_numeric(0)) < 0)
		return abp_usage_doubt(r, "%s is negative: %s",
							   abp_usage_path_name(path), abp_usage_value_text(&found));

	*amount = numeric_trimmed(number);
	return true;
}

/*
 * Read true or false; *flag stays as it is if there is neither.
 */
bool
abp_usage_read_flag(Reading *r, JsonbContainer *container, const char *path,
					bool *flag)
{
	JsonbValue	found;

	if (!find_path(r, container, path, &found))
		return true;
	if (found.type != jbvBool)
		return abp_usage_doubt(r, "%s is neither true nor false but %s",
							   abp_usage_path_name(path), abp_usage_value_text(&found));
	*flag = found.val.boolean;
	return true;
}
