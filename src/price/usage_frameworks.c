/*-------------------------------------------------------------------------
 *
 * usage_frameworks.c
 *	  The usage objects of frameworks that stand between an application and
 *	  its providers: Vercel's AI SDK, and traces of OpenTelemetry.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "price/usage_formats.h"

/* ----------------------------------------------------------------
 *		Vercel AI SDK
 * ----------------------------------------------------------------
 */

/* the provider interface of versions 6 and 7 */
static const Rule ai_sdk_nested_rules[] = {
	{FIELD_INPUT, "inputTokens/total"},
	{FIELD_UNCACHED, "inputTokens/noCache"},
	{FIELD_CACHE_READ, "inputTokens/cacheRead"},
	{FIELD_CACHE_WRITE, "inputTokens/cacheWrite"},
	{FIELD_OUTPUT, "outputTokens/total"},
	{FIELD_OUTPUT_TEXT, "outputTokens/text"},
	{FIELD_REASONING, "outputTokens/reasoning"}
};

/* results of versions 4 to 7, and embeddings ("tokens") */
static const Rule ai_sdk_flat_rules[] = {
	{FIELD_INPUT, "inputTokens"},
	{FIELD_INPUT, "promptTokens"},
	{FIELD_INPUT, "tokens"},
	{FIELD_UNCACHED, "inputTokenDetails/noCacheTokens"},
	{FIELD_CACHE_READ, "inputTokenDetails/cacheReadTokens"},
	{FIELD_CACHE_READ, "cachedInputTokens"},
	{FIELD_CACHE_WRITE, "inputTokenDetails/cacheWriteTokens"},
	{FIELD_OUTPUT, "outputTokens"},
	{FIELD_OUTPUT, "completionTokens"},
	{FIELD_REASONING, "outputTokenDetails/reasoningTokens"},
	{FIELD_REASONING, "reasoningTokens"},
	{FIELD_TOTAL, "totalTokens"}
};

static const char *const ai_sdk_harmless[] = {
	"*/textTokens",
	/* OpenAI's prediction tokens are in the output already */
	"*/acceptedPredictionTokens", "*/rejectedPredictionTokens",

	/*
	 * the gateway's and OpenRouter's costs are read; the rest says how they
	 * come about
	 */
	"providerMetadata/gateway/*", "providerMetadata/openrouter/usage/cost*",
	"providerMetadata/openrouter/usage/totalTokens",
	/* Anthropic: what was cut from the context, and fetched pages */
	"*/contextManagement/*", "*/web_fetch_requests",
	/* positions in the text that sources belong to, and in a recording */
	"*/groundingMetadata/*", "segments/*",
	NULL
};

static const char *const ai_sdk_beside[] = {
	"providerMetadata", "experimental_providerMetadata", NULL
};

static const Envelope ai_sdk_envelopes[] = {
	{"", "usage"},
	{"", "totalUsage"}
};

/* How the object that a provider sent is recognised. */
static const struct
{
	const char *key;
	const char *format;
}			provider_signs[] =

{
	{"promptTokenCount", "gemini"},
	{"candidatesTokenCount", "gemini"},
	{"total_input_tokens", "gemini"},
	{"billed_units", "cohere"},
	{"is_byok", "openrouter"},
	{"cost_details", "openrouter"},
	{"cost_in_usd_ticks", "xai"},
	{"num_sources_used", "xai"},
	{"prompt_audio_seconds", "mistral"},
	{"inputTokens", "bedrock"},
	{"prompt_tokens", "openai"},
	{"cache_read_input_tokens", "anthropic"},
	{"cache_creation_input_tokens", "anthropic"},
	{"server_tool_use", "anthropic"},
	{"input_tokens", "openai"},
	{"total_tokens", "openai"}
};

/* Where the SDK keeps the object that a provider sent, whole. */
static const struct
{
	const char *path;			/* from the root */
	const char *format;
}			provider_objects[] =

{
	{"providerMetadata/anthropic/usage", "anthropic"},
	{"providerMetadata/google/usageMetadata", "gemini"},
	{"providerMetadata/vertex/usageMetadata", "gemini"},
	{"providerMetadata/googleVertex/usageMetadata", "gemini"}
};

/* Counts that versions 4 and 5 keep there, one by one. */
static const struct
{
	Field		field;
	bool		excluded;		/* from the input total */
	const char *path;			/* from providerMetadata */
}			provider_counts[] =

{
	{FIELD_CACHE_READ, true, "bedrock/usage/cacheReadInputTokens"},
	{FIELD_CACHE_WRITE, true, "bedrock/usage/cacheWriteInputTokens"},
	{FIELD_CACHE_READ, true, "anthropic/cacheReadInputTokens"},
	{FIELD_CACHE_WRITE, true, "anthropic/cacheCreationInputTokens"},
	{FIELD_CACHE_READ, false, "openai/cachedPromptTokens"},
	{FIELD_CACHE_READ, false, "deepseek/promptCacheHitTokens"},
	{FIELD_UNCACHED, false, "deepseek/promptCacheMissTokens"},
	{FIELD_REASONING, false, "openai/reasoningTokens"},
	{FIELD_CITATION, false, "perplexity/usage/citationTokens"},
	{FIELD_WEB_SEARCH, false, "perplexity/usage/numSearchQueries"}
};

static const char *const metadata_names[] = {
	"providerMetadata", "experimental_providerMetadata"
};

/* Is a count one that the provider's own object has, nested or as it stands? */
static bool
agrees_with(const Reading *inner, Field field, const Count *count)
{
	return !count->given || count->value == inner->count[field].value ||
		count->value == inner->reported[field].value;
}

/*
 * Does the provider's own object speak of the same call as the SDK's counts?
 * The SDK's totals may leave out what adapters are known to leave out: cached
 * tokens, thoughts, prompts of tools.
 */
static bool
is_same_call(Reading *r, const Reading *inner)
{
	static const Field parts[] = {FIELD_CACHE_READ, FIELD_CACHE_WRITE, FIELD_REASONING};
	const Count *count = r->count;
	int64		uncached = count[FIELD_UNCACHED].value + count[FIELD_CACHE_READ].value +
	count[FIELD_CACHE_WRITE].value;
	int64		total = count[FIELD_INPUT].value + count[FIELD_OUTPUT].value;

	if (!agrees_with(inner, FIELD_INPUT, &count[FIELD_INPUT]) ||
		!agrees_with(inner, FIELD_OUTPUT, &count[FIELD_OUTPUT]) ||
		count[FIELD_OUTPUT_TEXT].value > inner->count[FIELD_OUTPUT].value)
		return false;
	for (int i = 0; i < lengthof(parts); i++)
	{
		if (inner->count[parts[i]].given && count[parts[i]].value > 0 &&
			!agrees_with(inner, parts[i], &count[parts[i]]))
			return false;
	}
	if (count[FIELD_UNCACHED].given && count[FIELD_INPUT].given &&
		uncached != count[FIELD_INPUT].value)
		return false;
	return !count[FIELD_TOTAL].given || count[FIELD_TOTAL].value == total ||
		count[FIELD_TOTAL].value == inner->reported[FIELD_TOTAL].value ||
		count[FIELD_TOTAL].value == inner->count[FIELD_INPUT].value + inner->count[FIELD_OUTPUT].value;
}

/*
 * Take over what the provider's own object says, if it is one of this call.
 */
static bool
take_provider_object(Reading *r, const char *format, JsonbContainer *object,
					 const char *path)
{
	Reading    *inner = palloc(sizeof(Reading));
	Count	   *count = r->count;
	int64		written = count[FIELD_OUTPUT_TEXT].value;

	if (!abp_usage_read_inner(r, abp_usage_format(format), object, inner))
		return false;
	r->repeated[0] = inner->reported;
	r->repeated[1] = inner->count;

	/* Cohere bills less than it counts, and the SDK has what it counts. */
	if (strcmp(format, "cohere") != 0 && !is_same_call(r, inner) &&
		!abp_usage_doubt(r, "%s (%lld in, %lld out) and the SDK's own counts (%lld in, %lld out) disagree, or these do not add up",
						 path, (long long) inner->count[FIELD_INPUT].value,
						 (long long) inner->count[FIELD_OUTPUT].value,
						 (long long) count[FIELD_INPUT].value,
						 (long long) count[FIELD_OUTPUT].value))
		return false;
	for (int f = 0; f < NUM_FIELDS; f++)
	{
		if (inner->count[f].given && (inner->count[f].value > 0 || !count[f].given))
			count[f] = inner->count[f];
	}
	if (!inner->count[FIELD_OUTPUT].given && written > 0)
		count[FIELD_OUTPUT] = count[FIELD_OUTPUT_TEXT];
	if (r->cost == NULL)
		r->cost = inner->cost;
	if (r->audio_seconds == NULL)
		r->audio_seconds = inner->audio_seconds;
	r->nested = true;
	return true;
}

/* The counts of versions 4 and 5 that are in the metadata one by one. */
static bool
add_provider_counts(Reading *r)
{
	/* then they are in the SDK's own counts, or in the provider's object */
	bool		has_details = r->nested ||
	abp_usage_object(r, r->usage, "inputTokenDetails") != NULL ||
	abp_usage_object(r, r->usage, "inputTokens") != NULL;
	int64		excluded = 0;

	for (int m = 0; m < lengthof(metadata_names); m++)
	{
		JsonbContainer *metadata = abp_usage_object(r, r->root, metadata_names[m]);

		for (int i = 0; metadata && i < lengthof(provider_counts); i++)
		{
			Count	   *count = &r->count[provider_counts[i].field];
			Count		found = {0};

			if (!abp_usage_has(r, metadata, provider_counts[i].path))
				continue;
			if (has_details && count->given)
				continue;		/* said again, or check_rest() finds it */
			if (!abp_usage_read_count(r, metadata, provider_counts[i].path, &found))
				return false;
			if (count->value > 0 && found.value > 0 && count->value != found.value)
				return abp_usage_doubt(r, "%s.%s is %lld, %s",
									   metadata_names[m],
									   abp_usage_path_name(provider_counts[i].path),
									   (long long) found.value,
									   psprintf("%s %lld", abp_usage_path_name(count->name),
												(long long) count->value));
			if (found.value > 0)
				*count = found;
			if (found.given && provider_counts[i].excluded && !has_details)
				excluded = 1;
		}
	}
	if (excluded && r->count[FIELD_INPUT].given)
	{
		int64		input = r->count[FIELD_INPUT].value;

		if (!abp_usage_add_count(r, &r->count[FIELD_INPUT],
								 r->count[FIELD_CACHE_READ].value, "cachedInputTokens") ||
			!abp_usage_add_count(r, &r->count[FIELD_INPUT],
								 r->count[FIELD_CACHE_WRITE].value, "cacheWriteInputTokens"))
			return false;
		/* The SDK's total may leave them out, too. */
		if (r->count[FIELD_TOTAL].given &&
			r->count[FIELD_TOTAL].value == input + r->count[FIELD_OUTPUT].value)
			r->count[FIELD_TOTAL].given = false;
	}
	return true;
}

/*
 * Of a call in several steps, usage is the last step's, and so is the
 * gateway's cost.  One row for all steps would also be priced as one large
 * prompt.
 */
static bool
check_single_step(Reading *r)
{
	JsonbContainer *whole = abp_usage_object(r, r->root, "totalUsage");
	Count		all[NUM_FIELDS] = {0};
	bool		same = true;

	if (whole == NULL || whole == r->usage)
		return true;
	if (!abp_usage_read_counts(r, whole, all))
		return false;
	for (int f = 0; f < NUM_FIELDS; f++)
		same &= !all[f].given || !r->reported[f].given ||
			all[f].value == r->reported[f].value;
	if (same)
		return true;
	if (!r->cost_given)
		r->cost = NULL;
	return abp_usage_doubt(r, "usage (%lld in, %lld out) is the last step's only, totalUsage (%lld in, %lld out) is all steps'; insert one row for each step",
						   (long long) r->reported[FIELD_INPUT].value,
						   (long long) r->reported[FIELD_OUTPUT].value,
						   (long long) all[FIELD_INPUT].value,
						   (long long) all[FIELD_OUTPUT].value);
}

/*
 * Tools that the provider ran, where its own object does not count them: the
 * SDK has their calls among the parts of the result.
 */
static bool
count_provider_tools(Reading *r)
{
	static const struct
	{
		const char *name;
		int			field;		/* a Field, or -1: another model's tokens */
	}			tools[] =
	{
		{"web_search", FIELD_WEB_SEARCH},
		{"web_search_preview", FIELD_WEB_SEARCH},
		{"x_search", FIELD_X_SEARCH},
		{"file_search", FIELD_FILE_SEARCH},
		{"code_interpreter", FIELD_SESSION},
		{"code_execution", FIELD_CODE_EXECUTION},
		{"image_generation", -1}
	};
	JsonbContainer *list = abp_usage_list(r, r->root, "content");
	Count		calls[NUM_FIELDS] = {0};

	if (list == NULL)
		list = abp_usage_list(r, r->root, "toolCalls");
	for (uint32 i = 0; list && i < JsonContainerSize(list); i++)
	{
		JsonbContainer *item = abp_usage_list_item(list, i);
		bool		provider_ran = false;

		if (item == NULL || !abp_usage_string_is(r, item, "type", "tool-call"))
			continue;
		if (!abp_usage_read_flag(r, item, "providerExecuted", &provider_ran))
			return false;
		for (int t = 0; provider_ran && t < lengthof(tools); t++)
		{
			if (!abp_usage_string_is(r, item, "toolName", tools[t].name))
				continue;
			if (tools[t].field >= 0)
				calls[tools[t].field].value++;
			else if (!abp_usage_doubt(r, "content has a call of %s, whose tokens are another model's and not in the usage object; insert them as a row of their own",
									  tools[t].name))
				return false;
		}
	}
	for (int f = 0; f < NUM_FIELDS; f++)
	{
		if (calls[f].value > 0 && !r->count[f].given &&
			!abp_usage_add_count(r, &r->count[f], calls[f].value, "content"))
			return false;
	}
	return true;
}

/* The provider's own object, where it is there, knows more than the SDK's. */
static bool
extra_ai_sdk(Reading *r)
{
	static const char *const grounding[] = {
		"providerMetadata/google/groundingMetadata",
		"providerMetadata/vertex/groundingMetadata"
	};
	JsonbContainer *raw = abp_usage_object(r, r->usage, "raw");

	if (!check_single_step(r))
		return false;
	for (int i = 0; raw && !r->nested && i < lengthof(provider_signs); i++)
	{
		if (abp_usage_has(r, raw, provider_signs[i].key) &&
			!take_provider_object(r, provider_signs[i].format, raw, "raw"))
			return false;
	}
	for (int i = 0; !r->nested && i < lengthof(provider_objects); i++)
	{
		JsonbContainer *object = abp_usage_object(r, r->root, provider_objects[i].path);

		if (object && !take_provider_object(r, provider_objects[i].format, object,
											abp_usage_path_name(provider_objects[i].path)))
			return false;
	}
	if (!add_provider_counts(r) || !count_provider_tools(r))
		return false;
	for (int i = 0; i < lengthof(grounding); i++)
	{
		JsonbContainer *metadata = abp_usage_object(r, r->root, grounding[i]);

		if (metadata && !r->count[FIELD_WEB_SEARCH].given && !abp_usage_count_grounding(r, metadata))
			return false;
	}

	/* Transcription: the SDK's result has the length beside the text. */
	if (!r->count[FIELD_INPUT].given && !r->count[FIELD_OUTPUT].given &&
		!abp_usage_read_quantity(r, r->root, "durationInSeconds", &r->audio_seconds))
		return false;
	/* generateImage tells no modalities. */
	if (r->count[FIELD_OUTPUT].value > 0 && !r->count[FIELD_OUTPUT_IMAGE].given &&
		!abp_usage_has(r, r->usage, "outputTokenDetails/textTokens") &&
		abp_usage_model_has(r, "gpt-image"))
		r->count[FIELD_OUTPUT_IMAGE] = r->count[FIELD_OUTPUT];
	return true;
}

/*
 * Vercel's gateway: cost is what it debits; 0 when credits or the caller's
 * own key paid, and marketCost then says what the call is worth.
 * OpenRouter's provider for the SDK reports its cost as well.
 */
static bool
cost_ai_sdk(Reading *r)
{
	Numeric		cost = NULL;
	Numeric		other = NULL;

	if (!abp_usage_read_amount(r, r->root, "providerMetadata/gateway/cost", &cost) ||
		!abp_usage_read_amount(r, r->root, "providerMetadata/gateway/marketCost", &other))
		return false;
	if (cost || other)
	{
		r->cost = other && (cost == NULL || abp_usage_is_zero(cost)) ? other : cost;
		return true;
	}

	if (!abp_usage_read_amount(r, r->root, "providerMetadata/openrouter/usage/cost", &cost) ||
		!abp_usage_read_amount(r, r->root, "providerMetadata/openrouter/usage/costDetails/upstreamInferenceCost",
							   &other))
		return false;
	/* 0 beside a charge of the provider: the caller's own key, fee unknown */
	if (cost && !(abp_usage_is_zero(cost) && other && !abp_usage_is_zero(other)))
		r->cost = cost;
	return true;
}

/* Anthropic's fast mode is in its own object. */
static const char *
tier_ai_sdk(Reading *r)
{
	return abp_usage_string_is(r, r->usage, "raw/speed", "fast") ||
		abp_usage_string_is(r, r->root, "providerMetadata/anthropic/usage/speed", "fast") ?
		"fast" : NULL;
}

/* What both forms of it have in common. */
#define AI_SDK \
	.name = "ai_sdk", \
	.harmless = ai_sdk_harmless, \
	.beside = ai_sdk_beside, \
	.model = {"response/modelId", "modelId"}, \
	.generation_id = {"providerMetadata/gateway/generationId", \
	"response/id", "id"}, \
	.service_tier = {"providerMetadata/openai/serviceTier", \
		"providerMetadata/anthropic/usage/service_tier", \
	"raw/service_tier", "raw/serviceTier", "raw/trafficType"}, \
	.extra = extra_ai_sdk, \
	.cost = cost_ai_sdk, \
	.tier = tier_ai_sdk

static const UsageFormat ai_sdk_nested = {
	AI_SDK,
	RULES(ai_sdk_nested_rules)
};

/* Are the counts nested, as in newer versions? */
static const UsageFormat *
refine_ai_sdk(Reading *r)
{
	if (abp_usage_object(r, r->usage, "inputTokens") ||
		abp_usage_object(r, r->usage, "outputTokens"))
		return &ai_sdk_nested;
	return NULL;
}

/* ----------------------------------------------------------------
 *		OpenTelemetry
 * ----------------------------------------------------------------
 */

static const Rule otel_rules[] = {
	/* the semantic conventions for generative AI, now and before */
	{FIELD_INPUT, "gen_ai.usage.input_tokens"},
	{FIELD_INPUT, "gen_ai.usage.prompt_tokens"},
	{FIELD_CACHE_READ, "gen_ai.usage.cache_read.input_tokens"},
	{FIELD_CACHE_READ, "gen_ai.usage.cache_read_input_tokens"},
	{FIELD_CACHE_WRITE, "gen_ai.usage.cache_write.input_tokens"},
	{FIELD_CACHE_WRITE, "gen_ai.usage.cache_creation.input_tokens"},
	{FIELD_CACHE_WRITE, "gen_ai.usage.cache_creation_input_tokens"},
	{FIELD_CACHE_WRITE, "gen_ai.usage.cache_write_input_tokens"},
	{FIELD_INPUT_AUDIO, "gen_ai.usage.audio.input_tokens"},
	{FIELD_INPUT_IMAGE, "gen_ai.usage.image.input_tokens"},
	{FIELD_CACHE_READ_AUDIO, "gen_ai.usage.audio.cache_read.input_tokens"},
	{FIELD_CACHE_READ_IMAGE, "gen_ai.usage.image.cache_read.input_tokens"},
	{FIELD_OUTPUT, "gen_ai.usage.output_tokens"},
	{FIELD_OUTPUT, "gen_ai.usage.completion_tokens"},
	{FIELD_REASONING, "gen_ai.usage.reasoning.output_tokens"},
	{FIELD_OUTPUT_AUDIO, "gen_ai.usage.audio.output_tokens"},
	{FIELD_OUTPUT_IMAGE, "gen_ai.usage.image.output_tokens"},
	{FIELD_OUTPUT_VIDEO, "gen_ai.usage.video.output_tokens"},
	{FIELD_TOTAL, "gen_ai.usage.total_tokens"},
	/* instrumentations with names of their own: Langfuse's, Sentry's */
	{FIELD_CACHE_READ, "gen_ai.usage.input_cached_tokens"},
	{FIELD_CACHE_READ, "gen_ai.usage.cached_input_tokens"},
	{FIELD_CACHE_READ, "gen_ai.usage.cached_tokens"},
	{FIELD_CACHE_READ, "gen_ai.usage.cache_read_tokens"},
	{FIELD_CACHE_READ, "gen_ai.usage.input_tokens.cached"},
	{FIELD_CACHE_WRITE, "gen_ai.usage.input_tokens.cache_write"},
	{FIELD_CACHE_WRITE, "gen_ai.usage.cache_write_tokens"},
	{FIELD_REASONING, "gen_ai.usage.output_tokens.reasoning"},
	{FIELD_REASONING, "gen_ai.usage.reasoning_tokens"},
	/* pydantic-ai */
	{FIELD_CACHE_READ, "gen_ai.usage.details.cache_read_tokens"},
	{FIELD_CACHE_READ, "gen_ai.usage.details.cache_read_input_tokens"},
	{FIELD_CACHE_READ, "gen_ai.usage.details.cached_content_tokens"},
	{FIELD_CACHE_WRITE, "gen_ai.usage.details.cache_write_tokens"},
	{FIELD_CACHE_WRITE, "gen_ai.usage.details.cache_creation_input_tokens"},
	{FIELD_REASONING, "gen_ai.usage.details.reasoning_tokens"},
	{FIELD_REASONING, "gen_ai.usage.details.thoughts_tokens"},
	{FIELD_INPUT_AUDIO, "gen_ai.usage.details.input_audio_tokens"},
	{FIELD_INPUT_AUDIO, "gen_ai.usage.details.audio_prompt_tokens"},
	{FIELD_CACHE_READ_AUDIO, "gen_ai.usage.details.cache_audio_read_tokens"},
	{FIELD_OUTPUT_AUDIO, "gen_ai.usage.details.output_audio_tokens"},
	/* OpenLLMetry, before the conventions */
	{FIELD_TOTAL, "llm.usage.total_tokens"},
	{FIELD_REASONING, "llm.usage.reasoning_tokens"},
	{FIELD_CACHE_READ, "llm.usage.cache_read_input_tokens"},
	{FIELD_CACHE_WRITE, "llm.usage.cache_creation_input_tokens"},
	/* Vercel AI SDK */
	{FIELD_INPUT, "ai.usage.inputTokens"},
	{FIELD_INPUT, "ai.usage.promptTokens"},
	{FIELD_INPUT, "ai.usage.tokens"},
	{FIELD_UNCACHED, "ai.usage.inputTokenDetails.noCacheTokens"},
	{FIELD_CACHE_READ, "ai.usage.inputTokenDetails.cacheReadTokens"},
	{FIELD_CACHE_READ, "ai.usage.cachedInputTokens"},
	{FIELD_CACHE_WRITE, "ai.usage.inputTokenDetails.cacheWriteTokens"},
	{FIELD_OUTPUT, "ai.usage.outputTokens"},
	{FIELD_OUTPUT, "ai.usage.completionTokens"},
	{FIELD_REASONING, "ai.usage.outputTokenDetails.reasoningTokens"},
	{FIELD_REASONING, "ai.usage.reasoningTokens"},
	{FIELD_TOTAL, "ai.usage.totalTokens"},
	/* OpenInference */
	{FIELD_INPUT, "llm.token_count.prompt"},
	{FIELD_CACHE_READ, "llm.token_count.prompt_details.cache_read"},
	{FIELD_CACHE_WRITE, "llm.token_count.prompt_details.cache_write"},
	{FIELD_INPUT_AUDIO, "llm.token_count.prompt_details.audio"},
	{FIELD_OUTPUT, "llm.token_count.completion"},
	{FIELD_REASONING, "llm.token_count.completion_details.reasoning"},
	{FIELD_OUTPUT_AUDIO, "llm.token_count.completion_details.audio"},
	{FIELD_TOTAL, "llm.token_count.total"}
};

static const char *const otel_harmless[] = {
	/* text is what remains of a total */
	"gen_ai.usage.text.*", "ai.usage.outputTokenDetails.textTokens",
	/* what an instrumentation thinks that it cost, by prices of its own */
	"*.cost", "*.cost.*", "*_cost", "*.cost_*",
	/* pydantic-ai: the provider's own totals, and text of Gemini */
	"gen_ai.usage.details.input_tokens", "gen_ai.usage.details.output_tokens",
	"gen_ai.usage.details.text_*", "*.accepted_prediction_tokens",
	"*.rejected_prediction_tokens",
	NULL
};

static const char *const otel_scope[] = {"usage", "token", NULL};

static const Envelope otel_envelopes[] = {
	{"attributes", ""}			/* a span */
};

const UsageFormat abp_usage_ai_sdk = {
	AI_SDK,
	RULES(ai_sdk_flat_rules),
	ENVELOPES(ai_sdk_envelopes),
	.reasoning = REASONING_BY_TOTAL_INCLUDED,
	.refine = refine_ai_sdk
};

const UsageFormat abp_usage_otel = {
	.name = "otel",
	RULES(otel_rules),
	.harmless = otel_harmless,
	.scope = otel_scope,
	ENVELOPES(otel_envelopes),
	.model = {"gen_ai.response.model", "gen_ai.request.model",
	"ai.response.model", "ai.model.id", "llm.model_name"},
	.generation_id = {"gen_ai.response.id", "ai.response.id"},
	.service_tier = {"openai.response.service_tier",
	"gen_ai.openai.response.service_tier"}
};
