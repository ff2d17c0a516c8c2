/*-------------------------------------------------------------------------
 *
 * usage_formats.c
 *	  The usage objects of providers, gateways and SDKs, one description each.
 *
 * A description says which path of the object is which quantity, how the
 * quantities nest, and which numbers cost nothing of their own.  What paths
 * cannot say is a function beside it.  Where not said otherwise, names and
 * meanings are those of the provider's own API reference.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "miscadmin.h"

#include "price/usage_formats.h"

static const Rule gemini_rules[] = {
	{FIELD_INPUT, "promptTokenCount"},
	{FIELD_TOOL_INPUT, "toolUsePromptTokenCount"},
	{FIELD_CACHE_READ, "cachedContentTokenCount"},
	{FIELD_OUTPUT, "candidatesTokenCount"},
	{FIELD_OUTPUT, "responseTokenCount"},	/* Live API */
	{FIELD_REASONING, "thoughtsTokenCount"},
	{FIELD_TOTAL, "totalTokenCount"},
	/* Interactions API */
	{FIELD_INPUT, "total_input_tokens"},
	{FIELD_TOOL_INPUT, "total_tool_use_tokens"},
	{FIELD_CACHE_READ, "total_cached_tokens"},
	{FIELD_OUTPUT, "total_output_tokens"},
	{FIELD_REASONING, "total_thought_tokens"},
	{FIELD_TOTAL, "total_tokens"}
};

static const char *const gemini_harmless[] = {
	/* Vertex AI, deprecated: the prompt in characters and seconds */
	"billablePromptUsage/*", "billableCachedContentUsage/*",
	NULL
};

static const Envelope gemini_envelopes[] = {
	{"", "usageMetadata"},

	/*
	 * a line of a batch's output file: Gemini's has a key, Vertex's the
	 * request
	 */
	{"response", "usageMetadata", "batch", "key"},
	{"response", "usageMetadata", "batch", "request"},
	{"response", "usageMetadata", "batch", "metadata/key"}, /* inlined */
	{"response", "usageMetadata"},	/* Gemini CLI */
	{"", "usage"},				/* Interactions API */
	{"interaction", "usage"},	/* its last event */
	{"response", "usage"}
};

/* A list of token counts by modality, and what they are parts of. */
typedef struct ModalityList
{
	const char *path;
	int			audio;			/* a Field, or -1: has no key of its own */
	int			image;
	int			video;
	bool		cached;
} ModalityList;

static const ModalityList modality_lists[] = {
	{"promptTokensDetails", FIELD_INPUT_AUDIO, FIELD_INPUT_IMAGE, -1},
	{"promptTokenDetails", FIELD_INPUT_AUDIO, FIELD_INPUT_IMAGE, -1},	/* embedContent */
	{"toolUsePromptTokensDetails", FIELD_INPUT_AUDIO, FIELD_INPUT_IMAGE, -1},
	{"cacheTokensDetails", FIELD_CACHE_READ_AUDIO, FIELD_CACHE_READ_IMAGE, -1, true},
	{"candidatesTokensDetails", FIELD_OUTPUT_AUDIO, FIELD_OUTPUT_IMAGE, FIELD_OUTPUT_VIDEO},
	{"responseTokensDetails", FIELD_OUTPUT_AUDIO, FIELD_OUTPUT_IMAGE, FIELD_OUTPUT_VIDEO},
	/* Interactions API */
	{"input_tokens_by_modality", FIELD_INPUT_AUDIO, FIELD_INPUT_IMAGE, -1},
	{"tool_use_tokens_by_modality", FIELD_INPUT_AUDIO, FIELD_INPUT_IMAGE, -1},
	{"cached_tokens_by_modality", FIELD_CACHE_READ_AUDIO, FIELD_CACHE_READ_IMAGE, -1, true},
	{"output_tokens_by_modality", FIELD_OUTPUT_AUDIO, FIELD_OUTPUT_IMAGE, FIELD_OUTPUT_VIDEO}
};

/*
 * Sum a list of {"modality": "AUDIO", "tokenCount": 12} into its fields.  A
 * document is billed as images, video in the prompt as text.
 */
static bool
add_modalities(Reading *r, const ModalityList *modality, Count *cached)
{
	bool		go_on;
	JsonbContainer *list = abp_usage_only_list(r, r->usage, modality->path, &go_on);

	if (list == NULL)
		return go_on;
	for (uint32 i = 0; i < JsonContainerSize(list); i++)
	{
		JsonbContainer *item = abp_usage_list_item(list, i);
		Count		tokens = {0};
		int			field = -1;

		if (item == NULL)
			return abp_usage_doubt(r, "%s has an item that is not an object", modality->path);
		if (!abp_usage_read_count(r, item, "tokenCount", &tokens) ||
			(!tokens.given && !abp_usage_read_count(r, item, "tokens", &tokens)))
			return false;

		if (abp_usage_string_is(r, item, "modality", "AUDIO"))
			field = modality->audio;
		else if (abp_usage_string_is(r, item, "modality", "IMAGE") ||
				 abp_usage_string_is(r, item, "modality", "DOCUMENT"))
			field = modality->image;
		else if (abp_usage_string_is(r, item, "modality", "VIDEO"))
		{
			field = modality->video;
			/* The Live API has a price of its own for what it sees. */
			if (field < 0 && !modality->cached && tokens.value > 0 &&
				abp_usage_has(r, r->usage, "responseTokenCount") &&
				!abp_usage_doubt(r, "%s has %lld tokens of video, whose price in the Live API is not that of text",
								 modality->path, (long long) tokens.value))
				return false;
		}

		if (field >= 0 &&
			!abp_usage_add_count(r, &r->count[field], tokens.value, modality->path))
			return false;
		if (modality->cached &&
			!abp_usage_add_count(r, cached, tokens.value, modality->path))
			return false;
	}
	return true;
}

/*
 * Has the list this string at one of its first n places?
 */
static bool
list_has_string(JsonbContainer *list, uint32 n, const JsonbValue *string)
{
	for (uint32 i = 0; i < n; i++)
	{
		JsonbValue *other = getIthJsonbValueFromContainer(list, i);

		if (other->type == jbvString && other->val.string.len == string->val.string.len &&
			memcmp(other->val.string.val, string->val.string.val, string->val.string.len) == 0)
			return true;
	}
	return false;
}

/*
 * Searches that Gemini made to ground its answer.  From Gemini 3 on each
 * different query is billed; before, each prompt that was grounded.
 */
bool
abp_usage_count_grounding(Reading *r, JsonbContainer *grounding)
{
	JsonbContainer *queries = abp_usage_list(r, grounding, "webSearchQueries");
	JsonbContainer *chunks = abp_usage_list(r, grounding, "groundingChunks");
	int64		searches = 0;

	for (uint32 i = 0; queries && i < JsonContainerSize(queries); i++)
	{
		JsonbValue *query = getIthJsonbValueFromContainer(queries, i);

		CHECK_FOR_INTERRUPTS();
		if (query->type == jbvString && query->val.string.len > 0 &&
			!list_has_string(queries, Min(i, 100), query))
			searches++;
	}
	if (searches > 0 &&
		(abp_usage_model_has(r, "gemini-2") || abp_usage_model_has(r, "gemini-1")))
		searches = 1;
	if (searches > 0 &&
		!abp_usage_add_count(r, &r->count[FIELD_WEB_SEARCH], searches, "groundingMetadata"))
		return false;

	/* Google Maps has a price of its own, for a prompt. */
	for (uint32 i = 0; chunks && i < JsonContainerSize(chunks); i++)
	{
		JsonbContainer *chunk = abp_usage_list_item(chunks, i);

		if (chunk && abp_usage_object(r, chunk, "maps"))
			return r->count[FIELD_MAPS].given ||
				abp_usage_add_count(r, &r->count[FIELD_MAPS], 1, "groundingMetadata");
	}
	return true;
}

/* Interactions API: [{"type": "google_search", "count": 2}] */
static bool
count_grounding_tools(Reading *r)
{
	JsonbContainer *list = abp_usage_list(r, r->usage, "grounding_tool_count");

	for (uint32 i = 0; list && i < JsonContainerSize(list); i++)
	{
		JsonbContainer *item = abp_usage_list_item(list, i);
		Count		count = {0};

		if (item == NULL || !abp_usage_string_is(r, item, "type", "google_search"))
			continue;
		if (!abp_usage_read_count(r, item, "count", &count) ||
			(count.given &&
			 !abp_usage_add_count(r, &r->count[FIELD_WEB_SEARCH], count.value,
								  "grounding_tool_count")))
			return false;
	}
	return true;
}

/* What its lists by modality say, and what grounding adds. */
static bool
extra_gemini(Reading *r)
{
	Count	   *count = r->count;
	Count		cached = {0};
	bool		other_case = r->other_case;
	JsonbContainer *candidates;

	for (int i = 0; i < lengthof(modality_lists); i++)
	{
		if (!add_modalities(r, &modality_lists[i], &cached))
			return false;
	}

	/* Vertex AI has sent the list without the sum (python-genai issue 795). */
	if (cached.given && !count[FIELD_CACHE_READ].given)
		count[FIELD_CACHE_READ] = cached;

	r->other_case = true;
	candidates = abp_usage_list(r, r->root, "candidates");
	for (uint32 i = 0; candidates && i < JsonContainerSize(candidates); i++)
	{
		JsonbContainer *item = abp_usage_list_item(candidates, i);
		JsonbContainer *grounding = item ? abp_usage_object(r, item, "groundingMetadata") : NULL;

		if (grounding && !abp_usage_count_grounding(r, grounding))
			return false;
	}
	r->other_case = other_case;
	return count_grounding_tools(r);
}

/* ----------------------------------------------------------------
 *		Bedrock
 * ----------------------------------------------------------------
 */

static const Rule bedrock_rules[] = {
	{FIELD_INPUT, "inputTokens"},
	{FIELD_INPUT, "inputTokenCount"},
	{FIELD_INPUT, "inputTextTokenCount"},
	{FIELD_CACHE_READ, "cacheReadInputTokens"},
	{FIELD_CACHE_READ, "cacheReadInputTokenCount"},
	{FIELD_CACHE_WRITE, "cacheWriteInputTokens"},
	{FIELD_CACHE_WRITE, "cacheWriteInputTokenCount"},
	{FIELD_OUTPUT, "outputTokens"},
	{FIELD_OUTPUT, "outputTokenCount"},
	{FIELD_OUTPUT, "totalOutputTextTokenCount"},	/* Titan's last chunk */
	{FIELD_TOTAL, "totalTokens"},
	/* InvokeModel of Llama */
	{FIELD_INPUT, "prompt_token_count"},
	{FIELD_OUTPUT, "generation_token_count"}
};

static const char *const bedrock_harmless[] = {
	/* vectors of Titan's embeddings, which have no usage object */
	"embedding", "embeddingsByType/*",
	NULL
};

static const Envelope bedrock_envelopes[] = {
	{"", "usage"},
	{"metadata", "usage"},		/* ConverseStream's last event */
	{"", "amazon-bedrock-invocationMetrics"},
	{"modelOutput", "usage", "batch"},	/* a line of a batch's output */
	{"modelOutput", "", "batch"}
};

/* Cache writes by their time to live, a list. */
static bool
read_cache_details(Reading *r)
{
	bool		go_on;
	JsonbContainer *list = abp_usage_only_list(r, r->usage, "cacheDetails", &go_on);

	if (list == NULL)
		return go_on;
	for (uint32 i = 0; i < JsonContainerSize(list); i++)
	{
		JsonbContainer *item = abp_usage_list_item(list, i);
		Count		tokens = {0};
		Field		field;

		if (item == NULL)
			return abp_usage_doubt(r, "cacheDetails has an item that is not an object");
		if (abp_usage_string_is(r, item, "ttl", "1h"))
			field = FIELD_CACHE_WRITE_1H;
		else if (abp_usage_string_is(r, item, "ttl", "5m"))
			field = FIELD_CACHE_WRITE_5M;
		else
			return abp_usage_doubt(r, "cacheDetails has a ttl that is neither 5m nor 1h");
		if (!abp_usage_read_count(r, item, "inputTokens", &tokens) ||
			!abp_usage_add_count(r, &r->count[field], tokens.value,
								 field == FIELD_CACHE_WRITE_1H ?
								 "cacheDetails[1h]" : "cacheDetails[5m]"))
			return false;
	}
	return true;
}

/* The output of Titan and the kinds of cache writes are in lists. */
static bool
extra_bedrock(Reading *r)
{
	JsonbContainer *results = abp_usage_list(r, r->usage, "results");

	/* InvokeModel of Titan: the output is counted in its results. */
	for (uint32 i = 0; results && i < JsonContainerSize(results); i++)
	{
		JsonbContainer *item = abp_usage_list_item(results, i);
		Count		tokens = {0};

		if (item == NULL || !abp_usage_read_count(r, item, "tokenCount", &tokens) ||
			(tokens.given &&
			 !abp_usage_add_count(r, &r->count[FIELD_OUTPUT], tokens.value, "results/tokenCount")))
			return false;
	}
	return read_cache_details(r);
}

/*
 * Cohere: "tokens" beside billed_units also has those of its own templates,
 * which are not billed, and cached_tokens is a part of these.
 */
static const Rule cohere_rules[] = {
	{FIELD_INPUT, "billed_units/input_tokens"},
	{FIELD_OUTPUT, "billed_units/output_tokens"},
	{FIELD_IMAGE, "billed_units/images"},
	{FIELD_QUERY, "billed_units/search_units"}
};

static const char *const cohere_harmless[] = {
	"tokens/*", "cached_tokens", "api_version/*", NULL
};

static const Envelope cohere_envelopes[] = {
	{"", "usage"},
	{"", "meta"},				/* version 1; embed and rerank in both */
	{"delta", "usage"},			/* message-end, the last event of a stream */
	{"response", "meta"}		/* stream-end of version 1 */
};

static const UsageFormat gemini = {
	.name = "gemini",
	RULES(gemini_rules),
	.harmless = gemini_harmless,
	ENVELOPES(gemini_envelopes),
	.model = {"modelVersion", "model"},
	.generation_id = {"responseId", "id"},
	.service_tier = {"serviceTier", "trafficType"},
	.reasoning = REASONING_SEPARATE,
	.extra = extra_gemini
};

/* Bedrock's latency-optimized inference has prices of its own. */
static const char *
tier_bedrock(Reading *r)
{
	return abp_usage_string_is(r, r->root, "performanceConfig/latency", "optimized") ?
		"optimized" : NULL;
}

static const UsageFormat bedrock = {
	.name = "bedrock",
	RULES(bedrock_rules),
	.harmless = bedrock_harmless,
	ENVELOPES(bedrock_envelopes),
	.generation_id = {"ResponseMetadata/RequestId", "$metadata/requestId"},
	.service_tier = {"serviceTier/type"},
	.cache_excluded = true,
	.extra = extra_bedrock,
	.tier = tier_bedrock
};

static const UsageFormat cohere = {
	.name = "cohere",
	RULES(cohere_rules),
	.harmless = cohere_harmless,
	ENVELOPES(cohere_envelopes),
	.model = {"model"},
	.generation_id = {"generation_id", "id"}
};

static const UsageFormat *const formats[] = {
	&abp_usage_openai, &abp_usage_anthropic, &gemini, &bedrock, &abp_usage_openrouter, &abp_usage_groq, &abp_usage_xai, &abp_usage_deepseek, &abp_usage_mistral, &cohere, &abp_usage_ai_sdk, &abp_usage_litellm, &abp_usage_otel
};

/*
 * All formats, in the order in which messages name them.
 */
const UsageFormat *const *
abp_usage_formats(int *nformats)
{
	*nformats = lengthof(formats);
	return formats;
}

/*
 * The format of that name, which there must be.
 */
const UsageFormat *
abp_usage_format(const char *name)
{
	for (int i = 0; i < lengthof(formats); i++)
	{
		if (strcmp(formats[i]->name, name) == 0)
			return formats[i];
	}
	elog(ERROR, "unrecognized usage format: %s", name);
}
