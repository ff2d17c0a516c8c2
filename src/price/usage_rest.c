/*-------------------------------------------------------------------------
 *
 * usage_rest.c
 *	  What nothing has read of a usage object.
 *
 * Each value that was read is marked in a bitmap.  What is left is looked at
 * by one rule for all formats: a number above 0 that may cost something does
 * not pass.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <ctype.h>

#include "lib/stringinfo.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "utils/numeric.h"

#include "base/numeric_math.h"
#include "price/usage_formats.h"

/* Objects in a usage object are not nested deeper than this. */
#define MAX_DEPTH 32

/* Where a number stands, from the object that is looked at. */
typedef struct Place
{
	const char *key[MAX_DEPTH];
	int			len[MAX_DEPTH];
	int			depth;			/* keys */
	int			level;			/* objects and lists */
} Place;

typedef enum Look
{
	LOOK_ALL,					/* any number may cost something */
	LOOK_SCOPE,					/* if its key has a word of the format's scope */
	LOOK_BESIDE,				/* any that no count of the usage object
								 * repeats */
	LOOK_LIKELY					/* of these, if its key says so */
} Look;

/*
 * Numbers under such keys are measures: times, rates, limits, settings.
 * Nobody sells these.
 */
static const char *const measure_words[] = {
	"budget", "delay", "elapsed", "latency", "limit", "max", "min", "ms", "ns",
	"per", "percent", "percentage", "probability", "rate", "ratio", "remaining",
	"reset", "speed", "throughput", "time", "tps", "ttft", "ttl", "window", NULL
};

/* Nor, unless they are of tokens, the numbers that things go by. */
static const char *const name_words[] = {
	"at", "bytes", "code", "confidence", "created", "id", "index", "logprob",
	"logprobs", "score", "seed", "status", "temperature", "timestamp", "version",
	NULL
};

static const char *const token_words[] = {"token", "tokens", NULL};

/* What is sold; a measure of it may be what it is sold by. */
static const char *const sold_words[] = {
	"audio", "image", "images", "speech", "video", "videos", NULL
};

/* Words of keys that count something, where all kinds of numbers stand. */
static const char *const count_words[] = {
	"audio", "billed", "cache", "cached", "calls", "characters", "charge",
	"citation", "completion", "cost", "count", "credits", "image", "images",
	"input", "output", "pages", "prediction", "prompt", "queries", "read",
	"reasoning", "request", "requests", "search", "searches", "seconds",
	"thinking", "thought", "thoughts", "token", "tokens", "tool", "tools",
	"units", "usage", "video", "write", "written", NULL
};

/*
 * Does a key have one of some words?  Words end at '_', '.' and the like, and
 * where a capital follows a small letter.
 */
static bool
has_word(const char *key, int len, const char *const *words)
{
	int			start = 0;

	for (int i = 0; i <= len; i++)
	{
		bool		ends = i == len || !isalnum((unsigned char) key[i]);
		bool		hump = !ends && i > start && isupper((unsigned char) key[i]) &&
		!isupper((unsigned char) key[i - 1]);

		if (!ends && !hump)
			continue;
		for (int w = 0; words[w]; w++)
		{
			if (strlen(words[w]) == i - start &&
				pg_strncasecmp(key + start, words[w], i - start) == 0)
				return true;
		}
		start = ends ? i + 1 : i;
	}
	return false;
}

/* Does a key have one of some texts in it?  Letters' case does not matter. */
static bool
has_text(const char *key, int len, const char *const *texts)
{
	for (int t = 0; texts[t]; t++)
	{
		int			text_len = strlen(texts[t]);

		for (int i = 0; i + text_len <= len; i++)
		{
			if (pg_strncasecmp(key + i, texts[t], text_len) == 0)
				return true;
		}
	}
	return false;
}

/*
 * Does a path fit a pattern?  '*' stands for any characters; with other_case,
 * letters' case and '_' do not matter.
 */
static bool
path_fits(const char *path, const char *pattern, bool other_case)
{
	for (;; path++, pattern++)
	{
		while (other_case && *path == '_')
			path++;
		while (other_case && *pattern == '_')
			pattern++;
		if (*pattern == '*')
		{
			for (pattern++;; path++)
			{
				if (path_fits(path, pattern, other_case))
					return true;
				if (*path == '\0')
					return false;
			}
		}
		if (*path != *pattern &&
			!(other_case && pg_ascii_tolower((unsigned char) *path) ==
			  pg_ascii_tolower((unsigned char) *pattern)))
			return false;
		if (*path == '\0')
			return true;
	}
}

/* The path as messages show it. */
static char *
place_path(const Place *place)
{
	StringInfoData path;

	initStringInfo(&path);
	for (int i = 0; i < place->depth; i++)
	{
		if (i > 0)
			appendStringInfoChar(&path, '/');
		appendBinaryStringInfo(&path, place->key[i], place->len[i]);
	}
	return path.data;
}

/* Does the number say again what a count has said? */
static bool
is_repeated(const Count *counts, int64 value)
{
	for (int f = 0; counts && f < NUM_FIELDS; f++)
	{
		if (counts[f].given && counts[f].value == value)
			return true;
	}
	return false;
}

/*
 * Does a number say again what has been read: under another name of the same
 * field, or, outside of the usage object, any of the counts?
 */
static bool
says_it_again(const Reading *r, const char *path, Look look, Numeric number)
{
	int64		value;

	if (abp_usage_whole_number(number, &value) != NULL)
		return false;
	if (is_repeated(r->repeated[0], value) || is_repeated(r->repeated[1], value))
		return true;
	if (look == LOOK_BESIDE || look == LOOK_LIKELY)
		return is_repeated(r->reported, value) || is_repeated(r->count, value);

	for (int i = 0; i < r->format->nrules; i++)
	{
		const Rule *rule = &r->format->rules[i];

		if (r->reported[rule->field].value == value && path_fits(path, rule->path, r->other_case))
			return true;
	}
	for (int g = 0; g < r->format->ngroups; g++)
	{
		const RuleGroup *group = &r->format->groups[g];

		for (int p = 0; group->places[p]; p++)
		{
			int			len = strlen(group->places[p]);

			if (strlen(path) <= len || path[len] != '/' ||
				strncmp(path, group->places[p], len) != 0)
				continue;
			for (int i = 0; i < group->nrules; i++)
			{
				const Rule *rule = &group->rules[i];

				if (r->reported[rule->field].value == value &&
					path_fits(path + len + 1, rule->path, r->other_case))
					return true;
			}
		}
	}
	return false;
}

/*
 * Judge a number that nothing has read.
 */
static bool
check_unread(Reading *r, const Place *place, Look look, JsonbValue *value)
{
	const char *key = place->depth > 0 ? place->key[place->depth - 1] : "";
	int			len = place->depth > 0 ? place->len[place->depth - 1] : 0;
	bool		is_text = value->type == jbvString;
	char	   *path;

	if (is_text)
	{
		if (!abp_usage_is_decimal(value->val.string.val, value->val.string.len) ||
			!has_word(key, len, count_words))
			return true;
		value->val.numeric = abp_usage_decimal(value->val.string.val,
											   value->val.string.len);
		value->type = jbvNumeric;
	}
	if (numeric_is_nan(value->val.numeric) ||
		numeric_compare(value->val.numeric, int64_to_numeric(0)) <= 0)
		return true;

	if (look == LOOK_SCOPE && !has_text(key, len, r->format->scope))
		return true;
	if (look == LOOK_LIKELY && !has_word(key, len, count_words))
		return true;
	if (!has_word(key, len, sold_words) &&
		(has_word(key, len, measure_words) ||
		 (has_word(key, len, name_words) && !has_word(key, len, token_words))))
		return true;

	path = place_path(place);
	for (int i = 0; r->format->harmless && r->format->harmless[i]; i++)
	{
		if (path_fits(path, r->format->harmless[i], r->other_case))
			return true;
	}
	if (says_it_again(r, path, look, value->val.numeric))
		return true;
	return abp_usage_doubt(r, "%.*s is %s, which format \"%s\" does not read, and it may cost something",
						   pg_mbcliplen(path, strlen(path), MAX_PATH_BYTES),
						   abp_usage_path_name(path), abp_usage_value_text(value),
						   r->format->name);
}

/*
 * Judge an item of a list if it is an OpenTelemetry attribute; *is_attribute
 * says whether it is.
 */
static bool
check_attribute(Reading *r, JsonbContainer *item, bool *is_attribute)
{
	JsonbValue	name;
	JsonbValue	value;
	JsonbContainer *where;
	Place		place = {.depth = 1};

	*is_attribute = JsonContainerIsObject(item) &&
		abp_usage_attribute(item, &name, &value, &where);
	if (!*is_attribute || abp_usage_is_seen(r, where) ||
		(value.type != jbvNumeric && value.type != jbvString))
		return true;
	place.key[0] = name.val.string.val;
	place.len[0] = name.val.string.len;
	return check_unread(r, &place, LOOK_SCOPE, &value);
}

/* Is the last key of a place that of an object of usage? */
static bool
is_usage_key(const Place *place)
{
	static const char *const usage[] = {"usage", NULL};

	return place->depth > 0 &&
		has_text(place->key[place->depth - 1], place->len[place->depth - 1], usage);
}

/*
 * Look at all that an object or a list has, at any depth.
 */
static bool
check_container(Reading *r, JsonbContainer *container, Place *place, Look look)
{
	JsonbIterator *it = JsonbIteratorInit(container);
	bool		is_list = JsonContainerIsArray(container);
	JsonbIteratorToken token;
	JsonbValue	v;

	if (place->level >= MAX_DEPTH)
		return abp_usage_doubt(r, "%s is nested too deep to be looked into",
							   abp_usage_path_name(place_path(place)));

	while ((token = JsonbIteratorNext(&it, &v, true)) != WJB_DONE)
	{
		CHECK_FOR_INTERRUPTS();
		if (token == WJB_KEY)
		{
			place->key[place->depth] = v.val.string.val;
			place->len[place->depth] = v.val.string.len;
		}
		if (token != WJB_VALUE && token != WJB_ELEM)
			continue;

		/* an item of a list goes by the list's own key */
		place->depth += !is_list;
		place->level++;
		if (v.type == jbvNumeric || v.type == jbvString)
		{
			if (!abp_usage_is_seen(r, v.type == jbvNumeric ? (void *) v.val.numeric : v.val.string.val) &&
				!check_unread(r, place, look, &v))
				return false;
		}
		else if (v.type == jbvBinary && !abp_usage_is_seen(r, v.val.binary.data))
		{
			bool		is_attribute = false;

			if (look == LOOK_SCOPE && is_list &&
				!check_attribute(r, v.val.binary.data, &is_attribute))
				return false;
			if (!is_attribute &&
				!check_container(r, v.val.binary.data, place,
								 look == LOOK_LIKELY && is_usage_key(place) ? LOOK_BESIDE : look))
				return false;
		}
		place->depth -= !is_list;
		place->level--;
	}
	return true;
}

/*
 * Look at what stands beside the usage object: other objects of usage, and
 * counts.
 */
static bool
check_root(Reading *r)
{
	Place		place = {.depth = 1};
	JsonbIterator *it = JsonbIteratorInit(r->root);
	JsonbIteratorToken token;
	JsonbValue	v;

	while ((token = JsonbIteratorNext(&it, &v, true)) != WJB_DONE)
	{
		if (token == WJB_KEY)
		{
			place.key[0] = v.val.string.val;
			place.len[0] = v.val.string.len;
		}
		if (token != WJB_VALUE)
			continue;
		/* texts are names there, of keys, of users, of requests */
		if (v.type == jbvNumeric)
		{
			if (!abp_usage_is_seen(r, v.val.numeric) && !check_unread(r, &place, LOOK_LIKELY, &v))
				return false;
		}
		else if (v.type == jbvBinary && !abp_usage_is_seen(r, v.val.binary.data) && is_usage_key(&place))
		{
			if (!check_container(r, v.val.binary.data, &place, LOOK_BESIDE))
				return false;
			abp_usage_mark_seen(r, v.val.binary.data);
		}
	}
	return true;
}

/*
 * A number that nothing has read does not pass: look at what is left of the
 * usage object, at what stands beside it, and where else the format's
 * provider puts charges.
 */
bool
abp_usage_check_rest(Reading *r)
{
	Place		place = {.depth = 0};

	if (!check_container(r, r->usage, &place, r->format->scope ? LOOK_SCOPE : LOOK_ALL))
		return false;
	if (r->root == r->usage || !JsonContainerIsObject(r->root))
		return true;

	abp_usage_mark_seen(r, r->usage);
	if (!check_root(r))
		return false;
	for (int i = 0; r->format->beside && r->format->beside[i]; i++)
	{
		JsonbContainer *object = abp_usage_container(r, r->root, r->format->beside[i]);

		if (object == NULL)
			continue;
		place.key[0] = r->format->beside[i];
		place.len[0] = strlen(place.key[0]);
		place.depth = 1;
		if (!check_container(r, object, &place, LOOK_LIKELY))
			return false;
	}
	return true;
}
