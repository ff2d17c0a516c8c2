/*-------------------------------------------------------------------------
 *
 * normalize.c
 *	  A provider's own usage object, turned into the counts we price.
 *
 * Providers agree neither on names nor on meaning: some count cached tokens
 * inside the prompt total and some beside it, some count reasoning inside
 * the completion total and some beside it.  So each format is a description
 * (usage_formats.c): which path of the object is which quantity, and how the
 * quantities nest.  What is done here is the same for all formats: read
 * (usage_object.c), nest, compare with the totals the provider itself gives,
 * and look at what is left.
 *
 * Numbers are never bent to fit.  An object that contradicts itself, or has a
 * number above 0 that nothing has read and that may cost something, is
 * refused with names and numbers, because any repair would be a guess about
 * money.  Where the provider or the caller says what the call cost, nothing
 * is left to guess: then the same words are a doubt beside the result, and
 * the counts concerned are left out.
 *
 * Pure: no catalogue access, and bad data is an answer, not an error.
 * Everything is allocated in CurrentMemoryContext.  doc/usage-formats.md
 * states the rules for readers.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "common/int.h"
#include "utils/builtins.h"
#include "utils/varlena.h"

#include "base/numeric_math.h"
#include "base/text_view.h"
#include "base/usage_row.h"
#include "compat.h"
#include "price/normalize.h"
#include "price/usage_formats.h"

/* Quantities that have a key in units instead of a column. */
static const struct
{
	Field		field;
	const char *key;
}			unit_keys[] =

{
	{FIELD_INPUT_AUDIO, "input_audio_tokens"},
	{FIELD_INPUT_IMAGE, "input_image_tokens"},
	{FIELD_CACHE_READ_AUDIO, "cache_read_audio_tokens"},
	{FIELD_OUTPUT_AUDIO, "output_audio_tokens"},
	{FIELD_OUTPUT_IMAGE, "output_image_tokens"},
	{FIELD_OUTPUT_VIDEO, "output_video_tokens"},
	{FIELD_CITATION, "citation_tokens"},
	{FIELD_IMAGE, "image"},
	{FIELD_PAGE, "page"},
	{FIELD_QUERY, "query"},
	{FIELD_CHARACTER, "character"},
	{FIELD_SESSION, "session"},
	{FIELD_X_SEARCH, "x_search"},
	{FIELD_FILE_SEARCH, "file_search"},
	{FIELD_MAPS, "maps_search"},
	{FIELD_CODE_EXECUTION, "code_execution"},
	{FIELD_SEARCH_MEDIUM, "search_context_medium"},
	{FIELD_SEARCH_HIGH, "search_context_high"}
};

/* ----------------------------------------------------------------
 *		From fields to columns
 * ----------------------------------------------------------------
 */

/*
 * Append "name (value)" for a count in a message, after " + " if it is not
 * the first.
 */
static void
append_term(StringInfo buf, const Count *count)
{
	if (count->given && count->name)
		appendStringInfo(buf, "%s%s (%lld)", buf->len > 0 ? " + " : "",
						 abp_usage_path_name(count->name), (long long) count->value);
}

/* A count as messages show it. */
static char *
term(const Count *count)
{
	StringInfoData buf;

	initStringInfo(&buf);
	append_term(&buf, count);
	return buf.data;
}

/* Some fields' counts as a sum in a message. */
static char *
terms(const Count *count, const Field *fields, int n)
{
	StringInfoData buf;

	initStringInfo(&buf);
	for (int i = 0; i < n; i++)
	{
		if (count[fields[i]].value != 0)
			append_term(&buf, &count[fields[i]]);
	}
	return buf.data;
}

/*
 * Sum some fields; false on overflow.  Fields that are not given count as 0.
 */
static bool
sum_fields(const Count *count, const Field *fields, int n, int64 *sum)
{
	*sum = 0;
	for (int i = 0; i < n; i++)
	{
		if (count[fields[i]].given &&
			pg_add_s64_overflow(*sum, count[fields[i]].value, sum))
			return false;
	}
	return true;
}

/* Leave out counts that contradict others. */
static void
drop_fields(Reading *r, const Field *fields, int n)
{
	for (int i = 0; i < n; i++)
		memset(&r->count[fields[i]], 0, sizeof(Count));
}

/*
 * The parts must not exceed the whole.
 */
static bool
check_parts(Reading *r, Field whole, const Field *fields, int n)
{
	int64		sum;
	bool		fits = sum_fields(r->count, fields, n, &sum);
	bool		known;

	if (fits && sum <= r->count[whole].value)
		return true;

	if (!r->count[whole].given)
		known = abp_usage_doubt(r, "%s is part of a total that is missing",
								terms(r->count, fields, n));
	else
		known = abp_usage_doubt(r, "%s is more than %s, of which it is a part",
								terms(r->count, fields, n), term(&r->count[whole]));
	drop_fields(r, fields, n);
	return known;
}

/*
 * Split cache writes by time to live.
 */
static bool
split_writes(Reading *r)
{
	static const Field kinds[] = {FIELD_CACHE_WRITE_5M, FIELD_CACHE_WRITE_1H};
	Count	   *write = &r->count[FIELD_CACHE_WRITE];
	Count	   *write_5m = &r->count[FIELD_CACHE_WRITE_5M];
	Count	   *write_1h = &r->count[FIELD_CACHE_WRITE_1H];
	int64		sum;
	bool		known;

	if (!sum_fields(r->count, kinds, lengthof(kinds), &sum))
		known = abp_usage_doubt(r, "%s + %s is beyond the range of bigint",
								term(write_5m), term(write_1h));

	/*
	 * Who tells the two kinds apart may leave their sum at 0 (LangChain), and
	 * who does not may send zeros.
	 */
	else if (write->value == 0)
	{
		if (write_5m->given || write_1h->given)
		{
			write->value = sum;
			if (!write->given)
				write->name = write_5m->given ? write_5m->name : write_1h->name;
			write->given = true;
		}
		return true;
	}
	else if (sum == 0)
		return true;
	else if (write_5m->given && write_1h->given && sum != write->value)
		known = abp_usage_doubt(r, "%s + %s is not %s",
								term(write_5m), term(write_1h), term(write));
	else if (write_5m->given && !write_1h->given && sum != write->value)
		known = abp_usage_doubt(r, "%s is not %s, and no other writes are reported",
								term(write_5m), term(write));
	else
		return check_parts(r, FIELD_CACHE_WRITE, kinds, lengthof(kinds));

	drop_fields(r, kinds, lengthof(kinds));
	return known;
}

/*
 * Make the input total inclusive.
 */
static bool
nest_input(Reading *r, int64 *plain_input)
{
	static const Field cached[] = {FIELD_CACHE_READ, FIELD_CACHE_WRITE};
	static const Field uncached[] = {FIELD_UNCACHED, FIELD_CACHE_READ, FIELD_CACHE_WRITE};
	static const Field all[] = {FIELD_INPUT, FIELD_CACHE_READ, FIELD_CACHE_WRITE,
	FIELD_CACHE_WRITE_5M, FIELD_CACHE_WRITE_1H};
	Count	   *count = r->count;
	Count	   *input = &count[FIELD_INPUT];
	int64		sum;

	if (!split_writes(r))
		return false;
	*plain_input = input->value;

	if (r->format->cache_excluded && input->given)
	{
		if (!sum_fields(count, cached, lengthof(cached), &sum) ||
			pg_add_s64_overflow(input->value, sum, &input->value))
		{
			bool		known = abp_usage_doubt(r, "%s and the cached tokens are beyond the range of bigint",
												abp_usage_path_name(input->name));

			drop_fields(r, all, lengthof(all));
			return known;
		}
	}
	if (count[FIELD_TOOL_INPUT].given &&
		!abp_usage_add_count(r, input, count[FIELD_TOOL_INPUT].value,
							 count[FIELD_TOOL_INPUT].name))
		return false;

	/* Where the uncached remainder is reported, the three make the total. */
	if (!count[FIELD_UNCACHED].given)
		return true;
	if (!sum_fields(count, uncached, lengthof(uncached), &sum))
		return abp_usage_doubt(r, "%s and the cached tokens are beyond the range of bigint",
							   term(&count[FIELD_UNCACHED]));
	if (!input->given)
	{
		*input = count[FIELD_UNCACHED];
		input->value = sum;
		*plain_input = sum;
	}
	else if (sum != input->value)
	{
		StringInfoData parts;

		initStringInfo(&parts);
		for (int i = 0; i < lengthof(uncached); i++)
			append_term(&parts, &count[uncached[i]]);
		return abp_usage_doubt(r, "%s is not %s", parts.data, term(input));
	}
	return true;
}

/*
 * Make the output total inclusive of reasoning, and compare the grand total.
 * plain_input is the input total as it was in the object.
 */
static bool
nest_output(Reading *r, int64 plain_input)
{
	static const Field totals[] = {FIELD_OUTPUT, FIELD_REASONING};
	Count	   *count = r->count;
	Count	   *output = &count[FIELD_OUTPUT];
	Count	   *reasoning = &count[FIELD_REASONING];
	Count	   *total = &count[FIELD_TOTAL];
	Count		reported = *output;
	ReasoningMode mode = r->format->reasoning;
	bool		separate = mode == REASONING_SEPARATE ||
	mode == REASONING_BY_TOTAL_SEPARATE;
	int64		sum;
	StringInfoData parts;
	Count		input = count[FIELD_INPUT];

	if (!output->given && count[FIELD_OUTPUT_TEXT].given)
	{
		*output = count[FIELD_OUTPUT_TEXT];
		separate = true;
	}
	else if ((mode == REASONING_BY_TOTAL_SEPARATE ||
			  mode == REASONING_BY_TOTAL_INCLUDED) && total->given)
	{
		/*
		 * If neither fits, the message below is about the sum without
		 * reasoning.
		 */
		separate = !pg_add_s64_overflow(count[FIELD_INPUT].value, output->value, &sum) &&
			!pg_add_s64_overflow(sum, reasoning->value, &sum) &&
			sum == total->value;
	}

	if (separate && reasoning->given &&
		!abp_usage_add_count(r, output, reasoning->value, reasoning->name))
		return false;

	if (pg_add_s64_overflow(count[FIELD_INPUT].value, output->value, &sum))
	{
		bool		known = abp_usage_doubt(r, "%s and %s together are beyond the range of bigint",
											term(&count[FIELD_INPUT]), term(output));

		drop_fields(r, totals, lengthof(totals));
		return known;
	}
	if (!total->given || !count[FIELD_INPUT].given || sum == total->value)
		return true;

	/*
	 * Of formats that leave cached tokens out of the input, some write a
	 * total that leaves them out, too (AWS defines it that way and often
	 * sends the other).
	 */
	if (r->format->cache_excluded && plain_input + output->value == total->value)
		return true;

	initStringInfo(&parts);
	input.value = plain_input;
	append_term(&parts, &input);
	if (r->format->cache_excluded)
	{
		append_term(&parts, &count[FIELD_CACHE_READ]);
		append_term(&parts, &count[FIELD_CACHE_WRITE]);
	}
	append_term(&parts, &count[FIELD_TOOL_INPUT]);
	append_term(&parts, &reported);
	if (separate)
		append_term(&parts, reasoning);
	return abp_usage_doubt(r, "%s is not %s, which is %lld",
						   term(total), parts.data, (long long) sum);
}

/*
 * The subsets must fit in their totals.
 */
static bool
check_subsets(Reading *r)
{
	static const Field cached[] = {FIELD_CACHE_READ, FIELD_CACHE_WRITE};
	static const Field kept[] = {FIELD_CACHE_WRITE_5M, FIELD_CACHE_WRITE_1H,
	FIELD_CACHE_READ_AUDIO, FIELD_CACHE_READ_IMAGE};
	static const Field input_kinds[] = {FIELD_INPUT_AUDIO, FIELD_INPUT_IMAGE};
	static const Field cached_kinds[] = {FIELD_CACHE_READ_AUDIO, FIELD_CACHE_READ_IMAGE};
	static const Field cached_audio[] = {FIELD_CACHE_READ_AUDIO};
	static const Field cached_image[] = {FIELD_CACHE_READ_IMAGE};
	static const Field output_kinds[] = {FIELD_REASONING, FIELD_OUTPUT_AUDIO,
	FIELD_OUTPUT_IMAGE, FIELD_OUTPUT_VIDEO};
	Count	   *count = r->count;
	bool		had_cached = count[FIELD_CACHE_READ].given || count[FIELD_CACHE_WRITE].given;

	if (!check_parts(r, FIELD_INPUT, cached, lengthof(cached)))
		return false;
	/* Parts of what was left out are left out with it. */
	if (had_cached && !count[FIELD_CACHE_READ].given && !count[FIELD_CACHE_WRITE].given)
		drop_fields(r, kept, lengthof(kept));
	if (!check_parts(r, FIELD_INPUT, input_kinds, lengthof(input_kinds)) ||
		!check_parts(r, FIELD_CACHE_READ, cached_kinds, lengthof(cached_kinds)) ||
		!check_parts(r, FIELD_INPUT_AUDIO, cached_audio, 1) ||
		!check_parts(r, FIELD_INPUT_IMAGE, cached_image, 1) ||
		!check_parts(r, FIELD_OUTPUT, output_kinds, lengthof(output_kinds)))
		return false;

	/*
	 * units has no key for cached image tokens: they are billed as cached
	 * tokens, and input_image_tokens keeps the uncached ones.
	 */
	count[FIELD_INPUT_IMAGE].value -= count[FIELD_CACHE_READ_IMAGE].value;
	count[FIELD_CACHE_READ_IMAGE].value = 0;

	/*
	 * If what is cached and what is audio or image exceed the prompt
	 * together, some tokens are both; unless it says how many, the object
	 * does not determine a cost.  No overflow: each is at most the input.
	 */
	if (count[FIELD_CACHE_READ].value + count[FIELD_CACHE_WRITE].value >
		count[FIELD_INPUT].value - count[FIELD_INPUT_AUDIO].value +
		count[FIELD_CACHE_READ_AUDIO].value - count[FIELD_INPUT_IMAGE].value)
	{
		bool		known = abp_usage_doubt(r, "the cached tokens (%lld) and the audio and image tokens (%lld) overlap in %s, and it is not reported by how many",
											(long long) (count[FIELD_CACHE_READ].value +
														 count[FIELD_CACHE_WRITE].value),
											(long long) (count[FIELD_INPUT_AUDIO].value -
														 count[FIELD_CACHE_READ_AUDIO].value +
														 count[FIELD_INPUT_IMAGE].value),
											term(&count[FIELD_INPUT]));

		drop_fields(r, input_kinds, lengthof(input_kinds));
		drop_fields(r, cached_kinds, lengthof(cached_kinds));
		return known;
	}
	return true;
}

/*
 * A total that is missing is unknown, not 0.  It is not needed where the cost
 * is known or something else than tokens is counted.
 */
static bool
check_missing(Reading *r)
{
	const Count *count = r->count;
	bool		tokens = count[FIELD_OUTPUT].given || count[FIELD_TOTAL].given ||
	count[FIELD_OUTPUT_TEXT].given;

	if (abp_usage_cost_known(r))
		return true;
	for (int i = 0; i < r->format->nrules; i++)
	{
		const Rule *rule = &r->format->rules[i];

		if ((rule->field == FIELD_INPUT && tokens && !count[FIELD_INPUT].given &&
			 !count[FIELD_UNCACHED].given) ||
			(rule->field == FIELD_OUTPUT && r->format->output_required &&
			 !count[FIELD_OUTPUT].given))
			return abp_usage_refuse(r, "%s is missing, so that the cost cannot be known",
									abp_usage_path_name(rule->path));
	}
	return true;
}

/*
 * Are the keys in the case that is not the format's own?  Its totals tell.
 */
static bool
is_other_case(Reading *r)
{
	for (int other = 0; other < 2; other++)
	{
		r->other_case = other == 1;
		for (int i = 0; i < r->format->nrules; i++)
		{
			const Rule *rule = &r->format->rules[i];

			if ((rule->field == FIELD_INPUT || rule->field == FIELD_OUTPUT ||
				 rule->field == FIELD_TOTAL) &&
				abp_usage_has(r, r->usage, rule->path))
				return r->other_case;
		}
	}
	return false;
}

/*
 * Say why nothing was recognised.
 */
static bool
refuse_unknown_shape(Reading *r)
{
	StringInfoData keys;
	JsonbValue	found;
	int			nkeys = 0;

	/* All chunks of a stream but the last have "usage": null. */
	for (int i = 0; i < r->format->nenvelopes; i++)
	{
		const Envelope *envelope = &r->format->envelopes[i];
		JsonbContainer *root = abp_usage_container(r, r->top, envelope->root);

		if (root && JsonContainerIsObject(root) &&
			getKeyJsonValueFromContainer(root, envelope->usage,
										 strlen(envelope->usage), &found))
		{
			if (found.type == jbvNull)
				return abp_usage_doubt(r, "%s is null; in a stream, the last chunk has it",
									   envelope->usage);
			if (found.type != jbvBinary)
				return abp_usage_doubt(r, "%s is not an object", envelope->usage);
		}
	}

	initStringInfo(&keys);
	for (int i = 0; i < r->format->nrules && nkeys < 2; i++)
	{
		const Rule *rule = &r->format->rules[i];

		if (rule->field == FIELD_INPUT)
			appendStringInfo(&keys, "%s%s", nkeys++ > 0 ? " or " : "",
							 abp_usage_path_name(rule->path));
	}
	return abp_usage_doubt(r, "no usage of format \"%s\" recognised: there is no %s",
						   r->format->name, keys.data);
}

/*
 * Read the usage object that has been found: to counts in our nesting.
 */
static bool
read_usage(Reading *r)
{
	const UsageFormat *named = r->format;
	int64		plain_input = 0;
	bool		counted = false;

	if (r->format->refine)
	{
		const UsageFormat *refined = r->format->refine(r);

		if (refined)
			r->format = refined;
	}
	r->other_case = is_other_case(r);

	/* The cost first: where it is known, the rest is only information. */
	if (r->format->cost && !r->format->cost(r))
		return false;
	if (!abp_usage_read_counts(r, r->usage, r->count))
		return false;
	memcpy(r->reported, r->count, sizeof(r->count));
	if (r->format->extra && !r->format->extra(r))
		return false;

	for (int i = 0; i < NUM_FIELDS; i++)
		counted |= r->count[i].given;
	if (!counted && r->audio_seconds == NULL && r->cost == NULL)
	{
		r->format = named;		/* it has the envelopes */
		return refuse_unknown_shape(r);
	}

	if (!r->nested && (!check_missing(r) || !nest_input(r, &plain_input) ||
					   !nest_output(r, plain_input)))
		return false;
	if (r->count[FIELD_REQUESTS].value > 1 &&
		!abp_usage_doubt(r, "%s: several calls are one object here, of which each may have a price of its own; insert one row for each",
						 term(&r->count[FIELD_REQUESTS])))
		return false;
	return check_subsets(r) && abp_usage_check_rest(r);
}

/*
 * Read a provider's own object inside of another's, by its own description,
 * to counts in our nesting.
 */
bool
abp_usage_read_inner(Reading *r, const UsageFormat *format, JsonbContainer *object,
					 Reading *inner)
{
	memset(inner, 0, sizeof(Reading));
	inner->format = format;
	inner->model = r->model;
	inner->top = inner->root = inner->usage = object;
	inner->cost_given = abp_usage_cost_known(r);
	inner->repeated[0] = r->count;
	inner->base = r->base;
	inner->size = r->size;
	inner->seen = r->seen;
	inner->reason = r->reason;
	inner->doubt = r->doubt;
	if (!read_usage(inner))
		return false;
	abp_usage_mark_seen(r, object);
	return true;
}

/*
 * The units object, or NULL when there is nothing to put in it.
 */
static Jsonb *
make_units(Reading *r)
{
	StringInfoData json;

	/*
	 * Zeros beside tokens say nothing.  Alone they say that nothing was used,
	 * which is not the same as nothing being known.
	 */
	bool		zeros = !r->count[FIELD_INPUT].given && !r->count[FIELD_OUTPUT].given;

	initStringInfo(&json);
	for (int i = 0; i < lengthof(unit_keys); i++)
	{
		Count	   *count = &r->count[unit_keys[i].field];

		if (count->given && (zeros || count->value > 0))
			appendStringInfo(&json, "%s\"%s\": %lld", json.len ? ", " : "{",
							 unit_keys[i].key, (long long) count->value);
	}
	if (r->audio_seconds && (zeros || !abp_usage_is_zero(r->audio_seconds)))
		appendStringInfo(&json, "%s\"audio_second\": %s", json.len ? ", " : "{",
						 numeric_text(r->audio_seconds));
	if (json.len == 0)
		return NULL;
	appendStringInfoChar(&json, '}');
	return DatumGetJsonbP(DirectFunctionCall1(jsonb_in, CStringGetDatum(json.data)));
}

/* Set a column of the result: 0, and not given, if the object lacks it. */
static void
set_count(UsageCounts *counts, UsageCount column, const Count *count)
{
	counts->value[column] = count->given ? count->value : 0;
	counts->given[column] = count->given;
}

/* ----------------------------------------------------------------
 *		Entry points
 * ----------------------------------------------------------------
 */

/* The format of this name, or NULL if there is none or the name is NULL. */
static const UsageFormat *
find_format(TextView name)
{
	int			nformats;
	const UsageFormat *const *formats = abp_usage_formats(&nformats);

	for (int i = 0; name.data && i < nformats; i++)
	{
		if (text_view_is(name, formats[i]->name))
			return formats[i];
	}
	return NULL;
}

/*
 * Is this the name of a usage format?  Names are matched exactly.
 */
bool
abp_normalize_knows_format(TextView format)
{
	return find_format(format) != NULL;
}

/*
 * A hint for an unknown format, palloc'd: the name that was probably meant,
 * if one is near, and all names.
 */
char	   *
abp_normalize_format_hint(TextView format)
{
	int			nformats;
	const UsageFormat *const *formats = abp_usage_formats(&nformats);
	StringInfoData hint;
	const char *closest = NULL;
	int			distance = 4;

	initStringInfo(&hint);
	/* The comparison is quadratic and needs a bound. */
	if (format.data && format.len > 0 && format.len <= NAMEDATALEN)
	{
		for (int i = 0; i < nformats; i++)
		{
			const char *name = formats[i]->name;
			int			d = varstr_levenshtein_less_equal(format.data, format.len,
														  name, strlen(name),
														  1, 1, 1, distance, true);

			/* half the word may differ, as in core's closest match */
			if (d < distance && d <= format.len / 2)
			{
				closest = name;
				distance = d;
			}
		}
	}
	if (closest)
		appendStringInfo(&hint, "Perhaps you meant \"%s\". ", closest);
	appendStringInfoString(&hint, "Usage formats are ");
	for (int i = 0; i < nformats; i++)
		appendStringInfo(&hint, "%s%s", i > 0 ? ", " : "", formats[i]->name);
	appendStringInfoChar(&hint, '.');
	return hint.data;
}

/*
 * Find the usage object: where whole responses of the format keep it, else
 * the object is taken to be it.
 */
static void
locate_usage(Reading *r)
{
	const UsageFormat *format = r->format;

	r->root = r->usage = r->top;
	if (!JsonContainerIsObject(r->top))
		return;
	r->other_case = true;
	for (int i = 0; i < format->nenvelopes; i++)
	{
		const Envelope *envelope = &format->envelopes[i];
		JsonbContainer *root = abp_usage_container(r, r->top, envelope->root);
		JsonbContainer *usage = NULL;

		if (root && JsonContainerIsObject(root) &&
			(envelope->beside == NULL || abp_usage_has(r, r->top, envelope->beside)))
			usage = abp_usage_container(r, root, envelope->usage);
		else if (root && *envelope->usage == '\0')
			usage = root;
		if (usage && (format->scope || JsonContainerIsObject(usage)))
		{
			r->root = root;
			r->usage = usage;
			r->tier = envelope->tier;
			break;
		}
	}
	r->other_case = false;
}

/*
 * The tier that served the call, in lower case, palloc'd; or NULL.
 */
static char *
find_service_tier(Reading *r)
{
	static const struct
	{
		const char *traffic_type;
		const char *tier;
	}			vertex_tiers[] =
	{
		/* Vertex AI's trafficType says it in other words. */
		{"on_demand_flex", "flex"},
		{"on_demand_priority", "priority"},
		{"traffic_type_unspecified", "standard"}
	};
	const char *told = r->tier;
	char	   *tier;

	if (told == NULL && r->format->tier)
		told = r->format->tier(r);
	if (told)
		return pstrdup(told);

	tier = abp_usage_first_string(r, r->usage, r->format->service_tier);
	if (tier == NULL)
		tier = abp_usage_first_string(r, r->root, r->format->service_tier);
	if (tier == NULL)
		return NULL;

	for (char *p = tier; *p; p++)
		*p = pg_ascii_tolower((unsigned char) *p);
	for (int i = 0; i < lengthof(vertex_tiers); i++)
	{
		if (strcmp(tier, vertex_tiers[i].traffic_type) == 0)
			return pstrdup(vertex_tiers[i].tier);
	}
	return tier;
}

/*
 * Turn a provider's usage object, or a whole response with one in it, into
 * counts.
 *
 * format is one of the names in doc/usage-formats.md.  call is what the
 * caller knows of it: with the cost known, numbers that contradict each other
 * or that nothing reads are a doubt beside the result.  On success returns
 * true and fills *usage: counts of tokens in our nesting (cost.h), the cost
 * in USD if the provider reports it, the doubt, and what a whole response
 * says about tier, model and id.  Otherwise returns false and appends to
 * *reason what is wrong, naming fields and numbers; *usage is then undefined.
 * Raises nothing because of the data.
 */
bool
abp_normalize_usage(TextView format, Jsonb *raw, const UsageCall *call,
					NormalizedUsage *usage, StringInfo reason)
{
	Reading		r = {0};
	StringInfoData doubt;
	Count		write_5m;

	memset(usage, 0, sizeof(NormalizedUsage));
	initStringInfo(&doubt);
	r.reason = reason;
	r.doubt = &doubt;
	r.model = call->model;
	r.cost_given = call->cost_known;
	r.format = find_format(format);
	if (r.format == NULL)
		return abp_usage_refuse(&r, "unknown usage format \"%.*s\"",
								format.data ? format.len : 0,
								format.data ? format.data : "");
	if (!JB_ROOT_IS_OBJECT(raw) &&
		!(r.format->scope && JB_ROOT_IS_ARRAY(raw) && !JB_ROOT_IS_SCALAR(raw)))
	{
		if (!abp_usage_doubt(&r, "the usage is not a JSON object"))
			return false;
		usage->doubt = doubt.data;
		return true;
	}

	r.base = (const char *) raw;
	r.size = VARSIZE(raw);
	r.seen = palloc0(r.size / BITS_PER_BYTE + 1);
	r.top = &raw->root;
	locate_usage(&r);
	if (!read_usage(&r))
		return false;

	/* Writes that are not said to last an hour last 5 minutes. */
	write_5m = r.count[FIELD_CACHE_WRITE];
	write_5m.value -= r.count[FIELD_CACHE_WRITE_1H].value;

	set_count(&usage->counts, COUNT_INPUT, &r.count[FIELD_INPUT]);
	set_count(&usage->counts, COUNT_CACHE_READ, &r.count[FIELD_CACHE_READ]);
	set_count(&usage->counts, COUNT_CACHE_WRITE, &write_5m);
	set_count(&usage->counts, COUNT_CACHE_WRITE_1H, &r.count[FIELD_CACHE_WRITE_1H]);
	set_count(&usage->counts, COUNT_OUTPUT, &r.count[FIELD_OUTPUT]);
	set_count(&usage->counts, COUNT_REASONING, &r.count[FIELD_REASONING]);
	set_count(&usage->counts, COUNT_WEB_SEARCH, &r.count[FIELD_WEB_SEARCH]);
	usage->counts.units = make_units(&r);
	usage->provider_cost = r.cost;
	usage->service_tier = find_service_tier(&r);
	usage->model = abp_usage_first_string(&r, r.root, r.format->model);
	usage->generation_id = abp_usage_first_string(&r, r.root, r.format->generation_id);
	usage->doubt = doubt.len > 0 ? doubt.data : NULL;
	return true;
}
