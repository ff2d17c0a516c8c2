/*-------------------------------------------------------------------------
 *
 * normalize.c
 *	  A provider's own usage object, turned into the counts we price.
 *
 * Providers agree neither on names nor on meaning: some count cached tokens
 * inside the prompt total and some beside it, some count reasoning inside
 * the completion total and some beside it.  So each format is a table: which
 * path of the object is which quantity, and how the quantities nest.  What
 * follows the tables is the same for all formats: read, nest, compare with
 * the totals the provider itself gives.
 *
 * Numbers are never bent to fit.  An object that contradicts itself is
 * refused with the names and numbers that disagree, because any repair would
 * be a guess about money.
 *
 * Pure: no catalogue access, and bad data is an answer, not an error.
 * Everything is allocated in CurrentMemoryContext.  doc/usage-formats.md
 * states the rules for readers.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <ctype.h>

#include "common/int.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/varlena.h"

#include "normalize.h"

/*
 * The quantities a usage object can name.  A path's value is read into one of
 * these; nest_counts() turns them into our columns.
 */
typedef enum Field
{
	/* prompt side */
	FIELD_INPUT,				/* the format's input total */
	FIELD_TOOL_INPUT,			/* prompt tokens beside that total */
	FIELD_UNCACHED,				/* what is neither read from nor written to a
								 * cache */
	FIELD_CACHE_READ,
	FIELD_CACHE_WRITE,			/* writes of both kinds */
	FIELD_CACHE_WRITE_5M,
	FIELD_CACHE_WRITE_1H,
	FIELD_INPUT_AUDIO,
	FIELD_INPUT_IMAGE,
	FIELD_CACHE_READ_AUDIO,
	FIELD_CACHE_READ_IMAGE,
	/* completion side */
	FIELD_OUTPUT,				/* the format's output total */
	FIELD_OUTPUT_TEXT,			/* output without reasoning */
	FIELD_REASONING,
	FIELD_OUTPUT_AUDIO,
	FIELD_OUTPUT_IMAGE,
	FIELD_OUTPUT_VIDEO,
	/* the rest */
	FIELD_TOTAL,
	FIELD_CITATION,
	FIELD_WEB_SEARCH,
	FIELD_X_SEARCH,
	FIELD_IMAGE,
	FIELD_PAGE,
	FIELD_QUERY
} Field;

#define NUM_FIELDS (FIELD_QUERY + 1)

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
	{FIELD_X_SEARCH, "x_search"}
};

/* A count that a format does not report has given = false. */
typedef struct Count
{
	int64		value;
	bool		given;
	const char *name;			/* path it was read from, for messages */
} Count;

typedef struct Reading
{
	const struct UsageFormat *format;
	JsonbContainer *root;		/* the whole response */
	JsonbContainer *usage;		/* the usage object in it, or root itself */
	Count		count[NUM_FIELDS];
	Numeric		audio_seconds;	/* or NULL */
	Numeric		cost;			/* USD, or NULL */
	StringInfo	reason;
} Reading;

/* Path of keys, separated by '/' because OpenTelemetry's keys contain dots. */
typedef struct Rule
{
	Field		field;
	const char *path;
} Rule;

/* Where a whole response keeps its usage object. */
typedef struct Envelope
{
	const char *root;			/* "" is the object handed over */
	const char *usage;			/* from root */
} Envelope;

typedef enum ReasoningMode
{
	REASONING_INCLUDED,			/* a subset of the output total */
	REASONING_SEPARATE,			/* beside the output total */
	REASONING_BY_TOTAL_SEPARATE,	/* the grand total tells; without one,
									 * beside it */
	REASONING_BY_TOTAL_INCLUDED /* the grand total tells; without one, a
								 * subset */
} ReasoningMode;

#define MAX_PATHS 6

typedef struct UsageFormat
{
	const char *name;
	const Rule *rules;			/* several for one field: first present wins */
	int			nrules;
	const Envelope *envelopes;
	int			nenvelopes;
	const char *model[MAX_PATHS];	/* from root */
	const char *generation_id[MAX_PATHS];	/* from root */
	const char *service_tier[MAX_PATHS];	/* from usage, then from root */
	bool		cache_excluded; /* the input total leaves out cached tokens */
	bool		output_required;
	bool		snake_case;		/* keys may also be in snake_case */
	ReasoningMode reasoning;
	/* another table that fits the shape found better, or NULL */
	const struct UsageFormat *(*refine) (JsonbContainer *usage);
	/* what paths cannot say: lists, counts of items */
	bool		(*extra) (Reading *r);
	/* the cost in USD as reported */
	bool		(*cost) (Reading *r);
} UsageFormat;

static const UsageFormat *refine_openrouter(JsonbContainer *usage);
static const UsageFormat *refine_xai(JsonbContainer *usage);
static const UsageFormat *refine_ai_sdk(JsonbContainer *usage);
static bool extra_openai(Reading *r);
static bool extra_anthropic(Reading *r);
static bool extra_gemini(Reading *r);
static bool extra_bedrock(Reading *r);
static bool extra_mistral(Reading *r);
static bool extra_xai(Reading *r);
static bool extra_ai_sdk(Reading *r);
static bool cost_openai(Reading *r);
static bool cost_openrouter(Reading *r);
static bool cost_xai(Reading *r);
static bool cost_ai_sdk(Reading *r);
static bool cost_litellm(Reading *r);

/* ----------------------------------------------------------------
 *		The formats
 * ----------------------------------------------------------------
 */

#define RULES(array) (array), lengthof(array)

/*
 * OpenAI: Chat Completions, Responses, Realtime (singular "token_details"),
 * images, embeddings, transcription; and what others serve in this shape.
 */
#define OPENAI_RULES \
	{FIELD_INPUT, "prompt_tokens"}, \
	{FIELD_INPUT, "input_tokens"}, \
	{FIELD_CACHE_READ, "prompt_tokens_details/cached_tokens"}, \
	{FIELD_CACHE_READ, "input_tokens_details/cached_tokens"}, \
	{FIELD_CACHE_READ, "input_token_details/cached_tokens"}, \
	{FIELD_CACHE_WRITE, "prompt_tokens_details/cache_write_tokens"}, \
	{FIELD_CACHE_WRITE, "input_tokens_details/cache_write_tokens"}, \
	{FIELD_CACHE_WRITE, "input_token_details/cache_write_tokens"}, \
	{FIELD_INPUT_AUDIO, "prompt_tokens_details/audio_tokens"}, \
	{FIELD_INPUT_AUDIO, "input_tokens_details/audio_tokens"}, \
	{FIELD_INPUT_AUDIO, "input_token_details/audio_tokens"}, \
	{FIELD_INPUT_IMAGE, "prompt_tokens_details/image_tokens"}, \
	{FIELD_INPUT_IMAGE, "input_tokens_details/image_tokens"}, \
	{FIELD_INPUT_IMAGE, "input_token_details/image_tokens"}, \
	{FIELD_CACHE_READ_AUDIO, "prompt_tokens_details/cached_tokens_details/audio_tokens"}, \
	{FIELD_CACHE_READ_AUDIO, "input_tokens_details/cached_tokens_details/audio_tokens"}, \
	{FIELD_CACHE_READ_AUDIO, "input_token_details/cached_tokens_details/audio_tokens"}, \
	{FIELD_CACHE_READ_IMAGE, "prompt_tokens_details/cached_tokens_details/image_tokens"}, \
	{FIELD_CACHE_READ_IMAGE, "input_tokens_details/cached_tokens_details/image_tokens"}, \
	{FIELD_CACHE_READ_IMAGE, "input_token_details/cached_tokens_details/image_tokens"}, \
	{FIELD_OUTPUT, "completion_tokens"}, \
	{FIELD_OUTPUT, "output_tokens"}, \
	{FIELD_REASONING, "completion_tokens_details/reasoning_tokens"}, \
	{FIELD_REASONING, "output_tokens_details/reasoning_tokens"}, \
	{FIELD_REASONING, "output_token_details/reasoning_tokens"}, \
	{FIELD_OUTPUT_AUDIO, "completion_tokens_details/audio_tokens"}, \
	{FIELD_OUTPUT_AUDIO, "output_tokens_details/audio_tokens"}, \
	{FIELD_OUTPUT_AUDIO, "output_token_details/audio_tokens"}, \
	{FIELD_OUTPUT_IMAGE, "completion_tokens_details/image_tokens"}, \
	{FIELD_OUTPUT_IMAGE, "output_tokens_details/image_tokens"}, \
	{FIELD_OUTPUT_IMAGE, "output_token_details/image_tokens"}, \
	{FIELD_TOTAL, "total_tokens"}

static const Rule openai_rules[] = {
	OPENAI_RULES,
	/* Perplexity */
	{FIELD_CITATION, "citation_tokens"},
	{FIELD_WEB_SEARCH, "num_search_queries"}
};

static const Rule openrouter_rules[] = {
	OPENAI_RULES,
	{FIELD_WEB_SEARCH, "server_tool_use/web_search_requests"}
};

static const Rule groq_rules[] = {
	OPENAI_RULES
};

static const Rule xai_rules[] = {
	OPENAI_RULES,
	/* the SDK's names */
	{FIELD_CACHE_READ, "cached_prompt_text_tokens"},
	{FIELD_INPUT_IMAGE, "prompt_image_tokens"},
	{FIELD_REASONING, "reasoning_tokens"},
	{FIELD_WEB_SEARCH, "server_side_tool_usage_details/web_search_calls"},
	{FIELD_X_SEARCH, "server_side_tool_usage_details/x_search_calls"}
};

static const Rule deepseek_rules[] = {
	{FIELD_CACHE_READ, "prompt_cache_hit_tokens"},
	{FIELD_UNCACHED, "prompt_cache_miss_tokens"},
	OPENAI_RULES
};

static const Rule mistral_rules[] = {
	OPENAI_RULES,
	{FIELD_CACHE_READ, "num_cached_tokens"},
	{FIELD_PAGE, "pages_processed"}
};

/*
 * Cohere: "tokens" beside it also has those of its own templates, which are
 * not billed, and cached_tokens is a part of these.
 */
static const Rule cohere_rules[] = {
	{FIELD_INPUT, "billed_units/input_tokens"},
	{FIELD_OUTPUT, "billed_units/output_tokens"},
	{FIELD_IMAGE, "billed_units/images"},
	{FIELD_QUERY, "billed_units/search_units"}
};

static const Rule litellm_rules[] = {
	OPENAI_RULES,
	{FIELD_CACHE_READ, "cache_read_input_tokens"},
	{FIELD_CACHE_WRITE, "prompt_tokens_details/cache_creation_tokens"},
	{FIELD_CACHE_WRITE, "cache_creation_input_tokens"},
	{FIELD_CACHE_WRITE_5M, "prompt_tokens_details/cache_creation_token_details/ephemeral_5m_input_tokens"},
	{FIELD_CACHE_WRITE_5M, "cache_creation_token_details/ephemeral_5m_input_tokens"},
	{FIELD_CACHE_WRITE_1H, "prompt_tokens_details/cache_creation_token_details/ephemeral_1h_input_tokens"},
	{FIELD_CACHE_WRITE_1H, "cache_creation_token_details/ephemeral_1h_input_tokens"},
	{FIELD_WEB_SEARCH, "server_tool_use/web_search_requests"},
	{FIELD_WEB_SEARCH, "prompt_tokens_details/web_search_requests"}
};

static const Rule anthropic_rules[] = {
	{FIELD_INPUT, "input_tokens"},
	{FIELD_CACHE_READ, "cache_read_input_tokens"},
	{FIELD_CACHE_WRITE, "cache_creation_input_tokens"},
	{FIELD_CACHE_WRITE_5M, "cache_creation/ephemeral_5m_input_tokens"},
	{FIELD_CACHE_WRITE_1H, "cache_creation/ephemeral_1h_input_tokens"},
	{FIELD_OUTPUT, "output_tokens"},
	{FIELD_REASONING, "output_tokens_details/thinking_tokens"},
	{FIELD_WEB_SEARCH, "server_tool_use/web_search_requests"},
	{FIELD_TOTAL, "total_tokens"}
};

static const Rule gemini_rules[] = {
	{FIELD_INPUT, "promptTokenCount"},
	{FIELD_TOOL_INPUT, "toolUsePromptTokenCount"},
	{FIELD_CACHE_READ, "cachedContentTokenCount"},
	{FIELD_OUTPUT, "candidatesTokenCount"},
	{FIELD_OUTPUT, "responseTokenCount"},	/* Live API */
	{FIELD_REASONING, "thoughtsTokenCount"},
	{FIELD_TOTAL, "totalTokenCount"}
};

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
	{FIELD_TOTAL, "totalTokens"}
};

/* AI SDK: the provider interface of version 6 */
static const Rule ai_sdk_nested_rules[] = {
	{FIELD_INPUT, "inputTokens/total"},
	{FIELD_UNCACHED, "inputTokens/noCache"},
	{FIELD_CACHE_READ, "inputTokens/cacheRead"},
	{FIELD_CACHE_WRITE, "inputTokens/cacheWrite"},
	{FIELD_OUTPUT, "outputTokens/total"},
	{FIELD_OUTPUT_TEXT, "outputTokens/text"},
	{FIELD_REASONING, "outputTokens/reasoning"}
};

/* AI SDK: results of versions 4 to 6, and embeddings ("tokens") */
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

static const Rule otel_rules[] = {
	{FIELD_INPUT, "gen_ai.usage.input_tokens"},
	{FIELD_INPUT, "gen_ai.usage.prompt_tokens"},
	{FIELD_CACHE_READ, "gen_ai.usage.cache_read.input_tokens"},
	{FIELD_CACHE_READ, "gen_ai.usage.cache_read_input_tokens"},
	{FIELD_CACHE_READ, "gen_ai.usage.details.cache_read_tokens"},
	{FIELD_CACHE_WRITE, "gen_ai.usage.cache_creation.input_tokens"},
	{FIELD_CACHE_WRITE, "gen_ai.usage.cache_creation_input_tokens"},
	{FIELD_CACHE_WRITE, "gen_ai.usage.cache_write_input_tokens"},
	{FIELD_CACHE_WRITE, "gen_ai.usage.details.cache_write_tokens"},
	{FIELD_OUTPUT, "gen_ai.usage.output_tokens"},
	{FIELD_OUTPUT, "gen_ai.usage.completion_tokens"},
	{FIELD_REASONING, "gen_ai.usage.reasoning.output_tokens"},
	{FIELD_REASONING, "gen_ai.usage.details.reasoning_tokens"},
	{FIELD_TOTAL, "gen_ai.usage.total_tokens"}
};

static const Envelope openai_envelopes[] = {
	{"", "usage"},
	{"response", "usage"},		/* response.completed, response.done */
	{"response/body", "usage"}	/* a line of a batch's output file */
};

static const Envelope groq_envelopes[] = {
	{"", "usage"},
	{"", "x_groq/usage"},		/* the last chunk of a stream */
	{"response/body", "usage"}
};

static const Envelope mistral_envelopes[] = {
	{"", "usage"},
	{"", "usage_info"},			/* OCR */
	{"data", "usage"},			/* server-sent event */
	{"response/body", "usage"}
};

static const Envelope cohere_envelopes[] = {
	{"", "usage"},
	{"", "meta"},				/* version 1; embed and rerank in both */
	{"delta", "usage"},			/* message-end, the last event of a stream */
	{"response", "meta"}		/* stream-end of version 1 */
};

static const Envelope litellm_envelopes[] = {
	{"", "usage"},
	{"", "metadata/usage_object"}	/* a row of LiteLLM_SpendLogs */
};

static const Envelope anthropic_envelopes[] = {
	{"", "usage"},
	{"message", "usage"},
	{"result/message", "usage"} /* a line of a batch's results */
};

static const Envelope gemini_envelopes[] = {
	{"", "usageMetadata"},
	{"response", "usageMetadata"}	/* a line of a batch's output file */
};

static const Envelope bedrock_envelopes[] = {
	{"", "usage"},
	{"metadata", "usage"},		/* ConverseStream's last event */
	{"", "amazon-bedrock-invocationMetrics"}
};

static const Envelope ai_sdk_envelopes[] = {
	{"", "usage"},
	{"", "totalUsage"}
};

static const Envelope otel_envelopes[] = {
	{"", "attributes"}			/* a span */
};

static const UsageFormat formats[] = {
	{
		.name = "openai",
		RULES(openai_rules),
		RULES(openai_envelopes),
		.model = {"model"},
		.generation_id = {"id"},
		.service_tier = {"service_tier"},
		.extra = extra_openai,
		.cost = cost_openai
	},
	{
		.name = "anthropic",
		RULES(anthropic_rules),
		RULES(anthropic_envelopes),
		.model = {"model"},
		.generation_id = {"id"},
		.service_tier = {"service_tier"},
		.cache_excluded = true,
		.output_required = true,
		.extra = extra_anthropic
	},
	{
		.name = "gemini",
		RULES(gemini_rules),
		RULES(gemini_envelopes),
		.model = {"modelVersion"},
		.generation_id = {"responseId"},
		.service_tier = {"serviceTier", "trafficType"},
		.snake_case = true,
		.reasoning = REASONING_SEPARATE,
		.extra = extra_gemini
	},
	{
		.name = "bedrock",
		RULES(bedrock_rules),
		RULES(bedrock_envelopes),
		.generation_id = {"ResponseMetadata/RequestId", "$metadata/requestId"},
		.service_tier = {"serviceTier/type"},
		.cache_excluded = true,
		.extra = extra_bedrock
	},
	{
		.name = "openrouter",
		RULES(openrouter_rules),
		RULES(openai_envelopes),
		.model = {"model"},
		.generation_id = {"id"},
		.service_tier = {"service_tier"},
		.refine = refine_openrouter,
		.cost = cost_openrouter
	},
	{
		.name = "groq",
		RULES(groq_rules),
		RULES(groq_envelopes),
		.model = {"model"},
		.generation_id = {"id", "x_groq/id"},
		.service_tier = {"service_tier"}
	},
	{
		.name = "xai",
		RULES(xai_rules),
		RULES(openai_envelopes),
		.model = {"model"},
		.generation_id = {"id"},
		.service_tier = {"service_tier"},
		.reasoning = REASONING_BY_TOTAL_SEPARATE,
		.refine = refine_xai,
		.extra = extra_xai,
		.cost = cost_xai
	},
	{
		.name = "deepseek",
		RULES(deepseek_rules),
		RULES(openai_envelopes),
		.model = {"model"},
		.generation_id = {"id"},
		.service_tier = {"service_tier"}
	},
	{
		.name = "mistral",
		RULES(mistral_rules),
		RULES(mistral_envelopes),
		.model = {"model"},
		.generation_id = {"id"},
		.service_tier = {"service_tier"},
		.extra = extra_mistral
	},
	{
		.name = "cohere",
		RULES(cohere_rules),
		RULES(cohere_envelopes),
		.model = {"model"},
		.generation_id = {"generation_id", "id"}
	},
	{
		.name = "ai_sdk",
		RULES(ai_sdk_flat_rules),
		RULES(ai_sdk_envelopes),
		.model = {"response/modelId", "modelId"},
		.generation_id = {"providerMetadata/gateway/generationId",
		"response/id", "id"},
		.service_tier = {"providerMetadata/openai/serviceTier",
		"raw/service_tier", "raw/serviceTier", "raw/trafficType"},
		.reasoning = REASONING_BY_TOTAL_INCLUDED,
		.refine = refine_ai_sdk,
		.extra = extra_ai_sdk,
		.cost = cost_ai_sdk
	},
	{
		.name = "litellm",
		RULES(litellm_rules),
		RULES(litellm_envelopes),
		.model = {"model"},
		.generation_id = {"id", "request_id"},
		.service_tier = {"service_tier"},
		.cost = cost_litellm
	},
	{
		.name = "otel",
		RULES(otel_rules),
		RULES(otel_envelopes),
		.model = {"gen_ai.response.model", "gen_ai.request.model"},
		.generation_id = {"gen_ai.response.id"},
		.service_tier = {"openai.response.service_tier",
		"gen_ai.openai.response.service_tier"}
	}
};

/*
 * Shapes that a format's name covers besides its usual one.  They differ in
 * how quantities nest; where the usage object lies has been decided already.
 */
static const UsageFormat openrouter_messages = {
	.name = "openrouter",
	RULES(anthropic_rules),
	.model = {"model"},
	.generation_id = {"id"},
	.service_tier = {"service_tier"},
	.cache_excluded = true,
	.output_required = true,
	.extra = extra_anthropic,
	.cost = cost_openrouter
};

static const UsageFormat xai_responses = {
	.name = "xai",
	RULES(xai_rules),
	.model = {"model"},
	.generation_id = {"id"},
	.service_tier = {"service_tier"},
	.extra = extra_xai,
	.cost = cost_xai
};

static const UsageFormat ai_sdk_nested = {
	.name = "ai_sdk",
	RULES(ai_sdk_nested_rules),
	.model = {"response/modelId", "modelId"},
	.generation_id = {"providerMetadata/gateway/generationId",
	"response/id", "id"},
	.service_tier = {"providerMetadata/openai/serviceTier",
	"raw/service_tier", "raw/serviceTier", "raw/trafficType"},
	.extra = extra_ai_sdk,
	.cost = cost_ai_sdk
};

/* ----------------------------------------------------------------
 *		Finding and reading values
 * ----------------------------------------------------------------
 */

/*
 * Append to a reason; returns false for the caller to pass on.
 */
static bool
			refuse(StringInfo reason, const char *fmt,...) pg_attribute_printf(2, 3);

static bool
refuse(StringInfo reason, const char *fmt,...)
{
	for (;;)
	{
		va_list		args;
		int			needed;

		va_start(args, fmt);
		needed = appendStringInfoVA(reason, fmt, args);
		va_end(args);
		if (needed == 0)
			return false;
		enlargeStringInfo(reason, needed);
	}
}

/*
 * A path as a reader writes it: with dots.
 */
static char *
path_name(const char *path)
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
static char *
value_text(const JsonbValue *value)
{
	char	   *str;

	switch (value->type)
	{
		case jbvNumeric:
			str = DatumGetCString(DirectFunctionCall1(numeric_out,
													  NumericGetDatum(value->val.numeric)));
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
static bool
is_decimal(const char *str, int len)
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

static Numeric
decimal_to_numeric(const char *str, int len)
{
	return DatumGetNumeric(DirectFunctionCall3(numeric_in,
											   CStringGetDatum(pnstrdup(str, len)),
											   ObjectIdGetDatum(InvalidOid),
											   Int32GetDatum(-1)));
}

/*
 * The i-th item of a list if it is an object, else NULL.
 */
static JsonbContainer *
list_object(JsonbContainer *list, uint32 i)
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
 * The value of an OpenTelemetry attribute in OTLP's JSON form, a list of
 * {"key": ..., "value": {"intValue": "12"}}.  64-bit integers are strings
 * there, because JSON's readers keep doubles.
 */
static bool
find_attribute(JsonbContainer *list, const char *key, int keylen,
			   JsonbValue *found)
{
	static const char *const kinds[] = {"intValue", "stringValue", "doubleValue"};
	uint32		n = JsonContainerSize(list);

	for (uint32 i = 0; i < n; i++)
	{
		JsonbContainer *item = list_object(list, i);
		JsonbValue	name;
		JsonbValue	value;

		if (item == NULL ||
			!getKeyJsonValueFromContainer(item, "key", 3, &name) ||
			name.type != jbvString ||
			name.val.string.len != keylen ||
			memcmp(name.val.string.val, key, keylen) != 0 ||
			!getKeyJsonValueFromContainer(item, "value", 5, &value) ||
			value.type != jbvBinary ||
			!JsonContainerIsObject(value.val.binary.data))
			continue;

		for (int k = 0; k < lengthof(kinds); k++)
		{
			if (!getKeyJsonValueFromContainer(value.val.binary.data, kinds[k],
											  strlen(kinds[k]), found))
				continue;
			if (k == 0 && found->type == jbvString &&
				is_decimal(found->val.string.val, found->val.string.len))
			{
				found->val.numeric = decimal_to_numeric(found->val.string.val,
														found->val.string.len);
				found->type = jbvNumeric;
			}
			return true;
		}
	}
	return false;
}

/*
 * promptTokenCount -> prompt_token_count: Google's SDK for Python dumps its
 * objects that way.
 */
static char *
to_snake_case(const char *key, int len)
{
	StringInfoData buf;

	initStringInfo(&buf);
	for (int i = 0; i < len; i++)
	{
		if (isupper((unsigned char) key[i]))
			appendStringInfoChar(&buf, '_');
		appendStringInfoChar(&buf, pg_ascii_tolower((unsigned char) key[i]));
	}
	return buf.data;
}

/*
 * The value of one key.  Absent, null, {} and [] are all "not reported":
 * providers and their SDKs use them interchangeably.
 */
static bool
find_key(JsonbContainer *container, const char *key, int len, bool snake_case,
		 JsonbValue *found)
{
	bool		present;

	if (JsonContainerIsArray(container))
		present = find_attribute(container, key, len, found);
	else
		present = getKeyJsonValueFromContainer(container, key, len, found) != NULL;

	if (!present && snake_case)
	{
		char	   *snake = to_snake_case(key, len);

		present = getKeyJsonValueFromContainer(container, snake, strlen(snake),
											   found) != NULL;
	}

	return present && found->type != jbvNull &&
		!(found->type == jbvBinary &&
		  JsonContainerSize(found->val.binary.data) == 0);
}

/*
 * Follow a path.  Returns false only when the path leads through something
 * that is not an object, and then gives *blocked, the length of the path up
 * to there.  *present says whether there is a value at its end.
 */
static bool
find_path(JsonbContainer *container, const char *path, bool snake_case,
		  bool *present, JsonbValue *found, int *blocked)
{
	const char *step = path;

	*present = false;
	for (;;)
	{
		const char *slash = strchr(step, '/');
		int			len = slash ? slash - step : (int) strlen(step);

		if (!find_key(container, step, len, snake_case, found))
			return true;
		if (slash == NULL)
		{
			*present = true;
			return true;
		}
		if (found->type != jbvBinary ||
			!JsonContainerIsObject(found->val.binary.data))
		{
			*blocked = slash - path;
			return false;
		}
		container = found->val.binary.data;
		step = slash + 1;
	}
}

/*
 * The object at a path ("" is the container itself), or NULL.  list_ok: a
 * list will do, too.
 */
static JsonbContainer *
find_object(JsonbContainer *container, const char *path, bool snake_case,
			bool list_ok)
{
	JsonbValue	found;
	bool		present;
	int			blocked;

	if (*path == '\0')
		return container;
	if (!find_path(container, path, snake_case, &present, &found, &blocked) ||
		!present || found.type != jbvBinary)
		return NULL;
	if (!JsonContainerIsObject(found.val.binary.data) && !list_ok)
		return NULL;
	return found.val.binary.data;
}

/*
 * The list at a path, or NULL.
 */
static JsonbContainer *
find_list(JsonbContainer *container, const char *path, bool snake_case)
{
	JsonbContainer *list = find_object(container, path, snake_case, true);

	return list && JsonContainerIsArray(list) ? list : NULL;
}

/*
 * The non-empty string at the first of the paths that has one, or NULL.
 */
static char *
find_string(JsonbContainer *container, const char *const *paths, bool snake_case)
{
	for (int i = 0; i < MAX_PATHS && paths[i]; i++)
	{
		JsonbValue	found;
		bool		present;
		int			blocked;

		if (find_path(container, paths[i], snake_case, &present, &found, &blocked) &&
			present && found.type == jbvString && found.val.string.len > 0)
			return pnstrdup(found.val.string.val, found.val.string.len);
	}
	return NULL;
}

static bool
string_is(JsonbContainer *container, const char *path, bool snake_case,
		  const char *str)
{
	const char *paths[MAX_PATHS] = {path};
	char	   *found = find_string(container, paths, snake_case);

	return found && strcmp(found, str) == 0;
}

/*
 * Find a value that has to be a number; see find_path.
 */
static bool
find_number(Reading *r, JsonbContainer *container, const char *path,
			bool *present, JsonbValue *found)
{
	int			blocked;

	if (!find_path(container, path, r->format->snake_case, present, found,
				   &blocked))
		return refuse(r->reason, "%s is not an object",
					  path_name(pnstrdup(path, blocked)));
	if (*present && found->type != jbvNumeric)
		return refuse(r->reason, "%s is not a number but %s",
					  path_name(path), value_text(found));
	return true;
}

static int
compare_numeric(Numeric a, Numeric b)
{
	return DatumGetInt32(DirectFunctionCall2(numeric_cmp,
											 NumericGetDatum(a),
											 NumericGetDatum(b)));
}

/*
 * A count: a whole number from 0 to the largest bigint.
 */
static bool
read_count(Reading *r, JsonbContainer *container, const char *path, Count *count)
{
	JsonbValue	found;
	bool		present;
	Numeric		number;

	if (!find_number(r, container, path, &present, &found))
		return false;
	if (!present)
		return true;

	number = found.val.numeric;
	if (numeric_is_nan(number) || numeric_is_inf(number) ||
		compare_numeric(number, int64_to_numeric(PG_INT64_MAX)) > 0)
		return refuse(r->reason, "%s is %s, beyond the range of bigint",
					  path_name(path), value_text(&found));
	if (compare_numeric(number, int64_to_numeric(0)) < 0)
		return refuse(r->reason, "%s is negative: %s",
					  path_name(path), value_text(&found));
	count->value = DatumGetInt64(DirectFunctionCall1(numeric_int8,
													 NumericGetDatum(number)));
	if (compare_numeric(number, int64_to_numeric(count->value)) != 0)
		return refuse(r->reason, "%s is not a whole number: %s",
					  path_name(path), value_text(&found));
	count->given = true;
	count->name = path;
	return true;
}

/*
 * A list in the usage object; *list is NULL if there is none.
 */
static bool
read_list(Reading *r, const char *key, JsonbContainer **list)
{
	JsonbValue	found;

	*list = NULL;
	if (!find_key(r->usage, key, strlen(key), r->format->snake_case, &found))
		return true;
	if (found.type != jbvBinary || !JsonContainerIsArray(found.val.binary.data))
		return refuse(r->reason, "%s is not a list", key);
	*list = found.val.binary.data;
	return true;
}

/*
 * Read every field of the format's table that the object has.
 */
static bool
read_counts(Reading *r, JsonbContainer *usage, Count *count)
{
	for (int i = 0; i < r->format->nrules; i++)
	{
		const Rule *rule = &r->format->rules[i];

		if (!count[rule->field].given &&
			!read_count(r, usage, rule->path, &count[rule->field]))
			return false;
	}
	return true;
}

/*
 * Add to a count, which may not have been reported so far.
 */
static bool
add_count(Reading *r, Count *count, int64 value, const char *name)
{
	if (pg_add_s64_overflow(count->value, value, &count->value))
		return refuse(r->reason, "%s makes a sum beyond the range of bigint",
					  path_name(name));
	if (!count->given)
		count->name = name;
	count->given = true;
	return true;
}

/*
 * A fractional quantity that is not negative, such as seconds.
 */
static bool
read_quantity(Reading *r, JsonbContainer *container, const char *path,
			  Numeric *quantity)
{
	JsonbValue	found;
	bool		present;

	if (!find_number(r, container, path, &present, &found))
		return false;
	if (!present)
		return true;
	if (compare_numeric(found.val.numeric, int64_to_numeric(0)) < 0)
		return refuse(r->reason, "%s is negative: %s",
					  path_name(path), value_text(&found));
	*quantity = found.val.numeric;
	return true;
}

/*
 * An amount of money: a JSON number or, as gateways do it to keep the digits,
 * a string with one.  Taken over exactly; *amount stays NULL if there is none.
 */
static bool
read_amount(Reading *r, JsonbContainer *container, const char *path,
			Numeric *amount)
{
	JsonbValue	found;
	bool		present;
	int			blocked;
	Numeric		number;

	if (!find_path(container, path, r->format->snake_case, &present, &found,
				   &blocked))
		return refuse(r->reason, "%s is not an object",
					  path_name(pnstrdup(path, blocked)));
	if (!present)
		return true;

	if (found.type == jbvNumeric)
		number = found.val.numeric;
	else if (found.type == jbvString &&
			 is_decimal(found.val.string.val, found.val.string.len))
		number = decimal_to_numeric(found.val.string.val, found.val.string.len);
	else
		return refuse(r->reason, "%s is not a decimal number but %s",
					  path_name(path), value_text(&found));

	/* The bound keeps later arithmetic far from numeric's own limits. */
	if (numeric_is_nan(number) || numeric_is_inf(number) ||
		compare_numeric(number, int64_to_numeric(PG_INT64_MAX)) > 0)
		return refuse(r->reason, "%s is no possible cost: %s",
					  path_name(path), value_text(&found));
	if (compare_numeric(number, int64_to_numeric(0)) < 0)
		return refuse(r->reason, "%s is negative: %s",
					  path_name(path), value_text(&found));

	*amount = DatumGetNumeric(DirectFunctionCall1(numeric_trim_scale,
												  NumericGetDatum(number)));
	return true;
}

static bool
is_zero(Numeric number)
{
	return compare_numeric(number, int64_to_numeric(0)) == 0;
}

/* ----------------------------------------------------------------
 *		What the tables cannot say
 * ----------------------------------------------------------------
 */

static bool
has_key(JsonbContainer *container, const char *key)
{
	JsonbValue	found;

	return JsonContainerIsObject(container) &&
		find_key(container, key, strlen(key), false, &found);
}

/*
 * OpenRouter's Messages endpoint answers in Anthropic's shape, in which the
 * input total leaves cached tokens out.
 */
static const UsageFormat *
refine_openrouter(JsonbContainer *usage)
{
	if (has_key(usage, "input_tokens") &&
		(has_key(usage, "cache_read_input_tokens") ||
		 has_key(usage, "cache_creation_input_tokens")))
		return &openrouter_messages;
	return NULL;
}

/*
 * xAI counts reasoning beside the completion in Chat Completions only.
 */
static const UsageFormat *
refine_xai(JsonbContainer *usage)
{
	if (has_key(usage, "input_tokens") && !has_key(usage, "prompt_tokens"))
		return &xai_responses;
	return NULL;
}

static const UsageFormat *
refine_ai_sdk(JsonbContainer *usage)
{
	if (find_object(usage, "inputTokens", false, false) ||
		find_object(usage, "outputTokens", false, false))
		return &ai_sdk_nested;
	return NULL;
}

/*
 * Images are billed by the piece only where no tokens are reported for them
 * (dall-e, Grok): then their number is the length of the response's list.
 */
static bool
count_images(Reading *r)
{
	JsonbContainer *list = find_list(r->root, "data", false);
	int64		images = 0;

	if (list == NULL ||
		r->count[FIELD_INPUT].given || r->count[FIELD_OUTPUT].given)
		return true;
	for (uint32 i = 0; i < JsonContainerSize(list); i++)
	{
		JsonbContainer *item = list_object(list, i);

		if (item && (has_key(item, "url") || has_key(item, "b64_json")))
			images++;
	}
	return images == 0 || add_count(r, &r->count[FIELD_IMAGE], images, "data");
}

static bool
extra_openai(Reading *r)
{
	Count	   *count = r->count;
	JsonbContainer *list;

	/*
	 * Anthropic's objects share two keys with the Responses API.  Read as
	 * such, they would lose their cached tokens.
	 */
	if (has_key(r->usage, "input_tokens") &&
		(has_key(r->usage, "cache_read_input_tokens") ||
		 has_key(r->usage, "cache_creation_input_tokens")))
		return refuse(r->reason, "the usage object has cache_read_input_tokens or cache_creation_input_tokens beside input_tokens; its format is \"anthropic\", not \"%s\"",
					  r->format->name);

	/* Transcription billed by time: {"type": "duration", "seconds": 9} */
	if (!read_quantity(r, r->usage, "seconds", &r->audio_seconds) ||
		!count_images(r))
		return false;

	/*
	 * Perplexity's reasoning tokens stand beside completion_tokens, and
	 * outside its total; its searches and citations give it away.  Others
	 * that write the key at this level (SGLang) mean a subset.
	 */
	if (!count[FIELD_REASONING].given)
	{
		if (!read_count(r, r->usage, "reasoning_tokens", &count[FIELD_REASONING]))
			return false;
		if (count[FIELD_REASONING].given && count[FIELD_OUTPUT].given &&
			(count[FIELD_CITATION].given || count[FIELD_WEB_SEARCH].given))
		{
			int64		reasoning = count[FIELD_REASONING].value;

			if (!add_count(r, &count[FIELD_OUTPUT], reasoning, "reasoning_tokens"))
				return false;
			if (count[FIELD_TOTAL].given &&
				!add_count(r, &count[FIELD_TOTAL], reasoning, "reasoning_tokens"))
				return false;
		}
	}

	/*
	 * The images API first reported its output without details: all of it is
	 * image tokens.
	 */
	if (count[FIELD_OUTPUT].given && !count[FIELD_OUTPUT_IMAGE].given &&
		!has_key(r->usage, "output_tokens_details") &&
		count[FIELD_INPUT_IMAGE].given &&
		has_key(r->usage, "input_tokens_details") &&
		find_list(r->root, "output", false) == NULL)
		count[FIELD_OUTPUT_IMAGE] = count[FIELD_OUTPUT];

	/*
	 * Searches of the Responses API are items of the output.  Opening a page
	 * and finding text in it are such items too, but are not billed.
	 */
	list = find_list(r->root, "output", false);
	if (list && !count[FIELD_WEB_SEARCH].given)
	{
		int64		searches = 0;

		for (uint32 i = 0; i < JsonContainerSize(list); i++)
		{
			JsonbContainer *item = list_object(list, i);

			if (item && string_is(item, "type", false, "web_search_call") &&
				(!find_object(item, "action", false, false) ||
				 string_is(item, "action/type", false, "search")))
				searches++;
		}
		return add_count(r, &count[FIELD_WEB_SEARCH], searches, "output");
	}
	return true;
}

/*
 * Anthropic: the top-level counts leave out what compaction of the context
 * took (usage.iterations), and what an advisor of another model took.
 */
static bool
extra_anthropic(Reading *r)
{
	JsonbContainer *list;

	if (!read_list(r, "iterations", &list))
		return false;
	if (list == NULL)
		return true;

	for (uint32 i = 0; i < JsonContainerSize(list); i++)
	{
		JsonbContainer *item = list_object(list, i);
		Count		part[NUM_FIELDS] = {0};

		if (item == NULL)
			return refuse(r->reason, "iterations has an item that is not an object");
		if (string_is(item, "type", false, "advisor_message"))
			return refuse(r->reason, "iterations has counts of an advisor, which is another model with prices of its own; insert them as a row of their own");
		if (!string_is(item, "type", false, "compaction"))
			continue;
		if (!read_counts(r, item, part))
			return false;
		for (int f = 0; f < NUM_FIELDS; f++)
		{
			if (part[f].given &&
				!add_count(r, &r->count[f], part[f].value, part[f].name))
				return false;
		}
	}
	return true;
}

/*
 * Gemini: sum a list of {"modality": "AUDIO", "tokenCount": 12} into the
 * fields given for each modality.  A document is billed as images.
 */
static bool
add_modalities(Reading *r, const char *path, Count *audio, Count *image,
			   Count *video, Count *all)
{
	JsonbContainer *list;

	if (!read_list(r, path, &list))
		return false;
	if (list == NULL)
		return true;

	for (uint32 i = 0; i < JsonContainerSize(list); i++)
	{
		JsonbContainer *item = list_object(list, i);
		Count		tokens = {0};
		Count	   *count = NULL;

		if (item == NULL)
			return refuse(r->reason, "%s has an item that is not an object", path);
		if (!read_count(r, item, "tokenCount", &tokens))
			return false;

		if (string_is(item, "modality", true, "AUDIO"))
			count = audio;
		else if (string_is(item, "modality", true, "IMAGE") ||
				 string_is(item, "modality", true, "DOCUMENT"))
			count = image;
		else if (string_is(item, "modality", true, "VIDEO"))
			count = video;

		if (count && !add_count(r, count, tokens.value, path))
			return false;
		if (all && !add_count(r, all, tokens.value, path))
			return false;
	}
	return true;
}

static bool
extra_gemini(Reading *r)
{
	Count	   *count = r->count;
	Count		cached = {0};

	if (!add_modalities(r, "promptTokensDetails", &count[FIELD_INPUT_AUDIO],
						&count[FIELD_INPUT_IMAGE], NULL, NULL) ||
		!add_modalities(r, "toolUsePromptTokensDetails", &count[FIELD_INPUT_AUDIO],
						&count[FIELD_INPUT_IMAGE], NULL, NULL) ||
		!add_modalities(r, "cacheTokensDetails", &count[FIELD_CACHE_READ_AUDIO],
						&count[FIELD_CACHE_READ_IMAGE], NULL, &cached) ||
		!add_modalities(r, "candidatesTokensDetails", &count[FIELD_OUTPUT_AUDIO],
						&count[FIELD_OUTPUT_IMAGE], &count[FIELD_OUTPUT_VIDEO], NULL) ||
		!add_modalities(r, "responseTokensDetails", &count[FIELD_OUTPUT_AUDIO],
						&count[FIELD_OUTPUT_IMAGE], &count[FIELD_OUTPUT_VIDEO], NULL))
		return false;

	/* Vertex AI has sent the list without the sum (python-genai issue 795). */
	if (cached.given && !count[FIELD_CACHE_READ].given)
		count[FIELD_CACHE_READ] = cached;
	return true;
}

/*
 * Bedrock: cache writes by their time to live, a list.
 */
static bool
extra_bedrock(Reading *r)
{
	JsonbContainer *list;

	if (!read_list(r, "cacheDetails", &list))
		return false;
	if (list == NULL)
		return true;

	for (uint32 i = 0; i < JsonContainerSize(list); i++)
	{
		JsonbContainer *item = list_object(list, i);
		Count		tokens = {0};
		Field		field;

		if (item == NULL)
			return refuse(r->reason, "cacheDetails has an item that is not an object");
		if (string_is(item, "ttl", false, "1h"))
			field = FIELD_CACHE_WRITE_1H;
		else if (string_is(item, "ttl", false, "5m"))
			field = FIELD_CACHE_WRITE_5M;
		else
			return refuse(r->reason, "cacheDetails has a ttl that is neither 5m nor 1h");
		if (!read_count(r, item, "inputTokens", &tokens) ||
			!add_count(r, &r->count[field], tokens.value,
					   field == FIELD_CACHE_WRITE_1H ?
					   "cacheDetails[1h]" : "cacheDetails[5m]"))
			return false;
	}
	return true;
}

/*
 * Mistral bills audio by the second.  Its tokens are in total_tokens only,
 * so that the total says nothing about the counts that we have.
 */
static bool
extra_mistral(Reading *r)
{
	if (!read_quantity(r, r->usage, "prompt_audio_seconds", &r->audio_seconds))
		return false;
	if (r->audio_seconds && !is_zero(r->audio_seconds))
		r->count[FIELD_TOTAL].given = false;
	return true;
}

static bool
extra_xai(Reading *r)
{
	return count_images(r);
}

/*
 * AI SDK: the object that the provider sent is kept in "raw".  The SDK's own
 * counts do not tell 1-hour cache writes and audio apart; raw may.  It is
 * believed for that if it agrees with the SDK on both totals.
 */
static bool
add_raw_details(Reading *r)
{
	static const struct
	{
		const char *key;
		const char *format;
	}			signs[] =
	{
		{"promptTokenCount", "gemini"},
		{"cacheReadInputTokens", "bedrock"},
		{"cacheWriteInputTokens", "bedrock"},
		{"cache_read_input_tokens", "anthropic"},
		{"cache_creation_input_tokens", "anthropic"},
		{"prompt_tokens", "openai"},
		{"input_tokens", "openai"}
	};
	JsonbContainer *raw = find_object(r->usage, "raw", false, false);
	StringInfoData ignored;
	Reading		inner = {0};
	int64		input;
	int64		output;
	Count	   *count = inner.count;

	if (raw == NULL)
		return true;
	for (int i = 0; i < lengthof(signs) && inner.format == NULL; i++)
	{
		if (!has_key(raw, signs[i].key))
			continue;
		for (int f = 0; f < lengthof(formats); f++)
		{
			if (strcmp(formats[f].name, signs[i].format) == 0)
				inner.format = &formats[f];
		}
	}
	if (inner.format == NULL)
		return true;

	initStringInfo(&ignored);
	inner.root = inner.usage = raw;
	inner.reason = &ignored;
	if (!read_counts(&inner, raw, count) ||
		(inner.format->extra && !inner.format->extra(&inner)))
		return true;

	input = count[FIELD_INPUT].value;
	output = count[FIELD_OUTPUT].value;
	if (pg_add_s64_overflow(input, count[FIELD_TOOL_INPUT].value, &input) ||
		(inner.format->cache_excluded &&
		 (pg_add_s64_overflow(input, count[FIELD_CACHE_READ].value, &input) ||
		  pg_add_s64_overflow(input, count[FIELD_CACHE_WRITE].value, &input))) ||
		(inner.format->reasoning == REASONING_SEPARATE &&
		 pg_add_s64_overflow(output, count[FIELD_REASONING].value, &output)) ||
		input != r->count[FIELD_INPUT].value ||
		output != r->count[FIELD_OUTPUT].value)
		return true;

	if (count[FIELD_CACHE_WRITE].value == r->count[FIELD_CACHE_WRITE].value)
	{
		r->count[FIELD_CACHE_WRITE_5M] = count[FIELD_CACHE_WRITE_5M];
		r->count[FIELD_CACHE_WRITE_1H] = count[FIELD_CACHE_WRITE_1H];
	}
	if (count[FIELD_CACHE_READ].value == r->count[FIELD_CACHE_READ].value)
	{
		r->count[FIELD_INPUT_AUDIO] = count[FIELD_INPUT_AUDIO];
		r->count[FIELD_INPUT_IMAGE] = count[FIELD_INPUT_IMAGE];
		r->count[FIELD_CACHE_READ_AUDIO] = count[FIELD_CACHE_READ_AUDIO];
		r->count[FIELD_CACHE_READ_IMAGE] = count[FIELD_CACHE_READ_IMAGE];
	}
	r->count[FIELD_OUTPUT_AUDIO] = count[FIELD_OUTPUT_AUDIO];
	r->count[FIELD_OUTPUT_IMAGE] = count[FIELD_OUTPUT_IMAGE];
	r->count[FIELD_OUTPUT_VIDEO] = count[FIELD_OUTPUT_VIDEO];
	r->count[FIELD_WEB_SEARCH] = count[FIELD_WEB_SEARCH];
	return true;
}

/*
 * Of a call in several steps, usage is the last step's, and so is the
 * gateway's cost.  One row for all steps would also be priced as one large
 * prompt.  count is what usage says.
 */
static bool
check_single_step(Reading *r, const Count *count)
{
	JsonbContainer *whole = find_object(r->root, "totalUsage", false, false);
	Count		all[NUM_FIELDS] = {0};

	if (whole == NULL || whole == r->usage)
		return true;
	if (!read_counts(r, whole, all))
		return false;
	if (all[FIELD_INPUT].value == count[FIELD_INPUT].value &&
		all[FIELD_OUTPUT].value == count[FIELD_OUTPUT].value)
		return true;
	return refuse(r->reason, "usage (%lld in, %lld out) is the last step's only, totalUsage (%lld in, %lld out) is all steps'; insert one row for each step",
				  (long long) count[FIELD_INPUT].value,
				  (long long) count[FIELD_OUTPUT].value,
				  (long long) all[FIELD_INPUT].value,
				  (long long) all[FIELD_OUTPUT].value);
}

static bool
extra_ai_sdk(Reading *r)
{
	return check_single_step(r, r->count) && add_raw_details(r);
}

/*
 * DeepInfra and Perplexity report what they charge.
 */
static bool
cost_openai(Reading *r)
{
	if (!read_amount(r, r->usage, "estimated_cost", &r->cost))
		return false;
	if (r->cost == NULL && find_object(r->usage, "cost", false, false))
		return read_amount(r, r->usage, "cost/total_cost", &r->cost);
	return true;
}

/*
 * OpenRouter: cost is what it charges.  With the caller's own key that is
 * only its fee, and the provider's charge comes on top; otherwise the
 * provider's charge is in it already.
 */
static bool
cost_openrouter(Reading *r)
{
	Numeric		fee = NULL;
	Numeric		upstream = NULL;
	JsonbValue	byok;

	if (!read_amount(r, r->usage, "cost", &fee))
		return false;

	if (find_key(r->usage, "is_byok", strlen("is_byok"), false, &byok))
	{
		if (byok.type != jbvBool)
			return refuse(r->reason, "is_byok is neither true nor false but %s",
						  value_text(&byok));
		if (byok.val.boolean)
		{
			if (!read_amount(r, r->usage, "cost_details/upstream_inference_cost",
							 &upstream))
				return false;
			/* without the larger part, the cost is not known */
			if (fee && upstream)
				r->cost = DatumGetNumeric(DirectFunctionCall2(numeric_add,
															  NumericGetDatum(fee),
															  NumericGetDatum(upstream)));
			return true;
		}
	}
	r->cost = fee;
	return true;
}

/*
 * xAI: 1 USD = 10^10 ticks.
 */
static bool
cost_xai(Reading *r)
{
	Numeric		ticks = NULL;
	Datum		cost;

	if (!read_amount(r, r->usage, "cost_in_usd_ticks", &ticks))
		return false;
	if (ticks)
	{
		cost = DirectFunctionCall2(numeric_mul, NumericGetDatum(ticks),
								   NumericGetDatum(decimal_to_numeric("0.0000000001", 12)));
		r->cost = DatumGetNumeric(DirectFunctionCall1(numeric_trim_scale, cost));
	}
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

	if (!read_amount(r, r->root, "providerMetadata/gateway/cost", &cost) ||
		!read_amount(r, r->root, "providerMetadata/gateway/marketCost", &other))
		return false;
	if (cost || other)
	{
		r->cost = other && (cost == NULL || is_zero(cost)) ? other : cost;
		return true;
	}

	if (!read_amount(r, r->root, "providerMetadata/openrouter/usage/cost", &cost) ||
		!read_amount(r, r->root, "providerMetadata/openrouter/usage/costDetails/upstreamInferenceCost",
					 &other))
		return false;
	/* 0 beside a charge of the provider: the caller's own key, fee unknown */
	if (cost && !(is_zero(cost) && other && !is_zero(other)))
		r->cost = cost;
	return true;
}

static bool
cost_litellm(Reading *r)
{
	static const char *const paths[] = {
		"response_cost", "_hidden_params/response_cost", "spend"
	};

	for (int i = 0; i < lengthof(paths) && r->cost == NULL; i++)
	{
		if (!read_amount(r, r->root, paths[i], &r->cost))
			return false;
	}
	if (r->cost == NULL)
		return read_amount(r, r->usage, "cost", &r->cost);
	return true;
}

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
						 path_name(count->name), (long long) count->value);
}

static char *
term(const Count *count)
{
	StringInfoData buf;

	initStringInfo(&buf);
	append_term(&buf, count);
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

/*
 * The parts must not exceed the whole.
 */
static bool
check_parts(Reading *r, Field whole, const Field *fields, int n)
{
	int64		sum;
	StringInfoData parts;
	bool		fits = sum_fields(r->count, fields, n, &sum);

	if (fits && sum <= r->count[whole].value)
		return true;

	initStringInfo(&parts);
	for (int i = 0; i < n; i++)
	{
		if (r->count[fields[i]].value != 0)
			append_term(&parts, &r->count[fields[i]]);
	}
	if (!r->count[whole].given)
		return refuse(r->reason, "%s is part of a total that is missing", parts.data);
	return refuse(r->reason, "%s is more than %s, of which it is a part",
				  parts.data, term(&r->count[whole]));
}

/*
 * Split cache writes by time to live, and make the input total inclusive.
 */
static bool
nest_input(Reading *r, int64 *plain_input)
{
	static const Field kinds[] = {FIELD_CACHE_WRITE_5M, FIELD_CACHE_WRITE_1H};
	static const Field cached[] = {FIELD_CACHE_READ, FIELD_CACHE_WRITE};
	static const Field uncached[] = {FIELD_UNCACHED, FIELD_CACHE_READ, FIELD_CACHE_WRITE};
	Count	   *count = r->count;
	Count	   *input = &count[FIELD_INPUT];
	int64		sum;

	/* 5-minute and 1-hour writes partition the writes. */
	if (!sum_fields(count, kinds, lengthof(kinds), &sum))
		return refuse(r->reason, "%s + %s is beyond the range of bigint",
					  term(&count[FIELD_CACHE_WRITE_5M]),
					  term(&count[FIELD_CACHE_WRITE_1H]));
	if (!count[FIELD_CACHE_WRITE].given)
	{
		if (count[FIELD_CACHE_WRITE_5M].given || count[FIELD_CACHE_WRITE_1H].given)
		{
			count[FIELD_CACHE_WRITE].value = sum;
			count[FIELD_CACHE_WRITE].given = true;
			count[FIELD_CACHE_WRITE].name =
				count[FIELD_CACHE_WRITE_5M].given ?
				count[FIELD_CACHE_WRITE_5M].name : count[FIELD_CACHE_WRITE_1H].name;
		}
	}
	else if (count[FIELD_CACHE_WRITE_5M].given && count[FIELD_CACHE_WRITE_1H].given &&
			 sum != count[FIELD_CACHE_WRITE].value)
	{
		/* A provider that does not split its writes sends zeros. */
		if (sum != 0)
			return refuse(r->reason, "%s + %s is not %s",
						  term(&count[FIELD_CACHE_WRITE_5M]),
						  term(&count[FIELD_CACHE_WRITE_1H]),
						  term(&count[FIELD_CACHE_WRITE]));
	}
	else if (count[FIELD_CACHE_WRITE_5M].given && !count[FIELD_CACHE_WRITE_1H].given &&
			 sum != 0 && sum != count[FIELD_CACHE_WRITE].value)
		return refuse(r->reason, "%s is not %s, and no other writes are reported",
					  term(&count[FIELD_CACHE_WRITE_5M]),
					  term(&count[FIELD_CACHE_WRITE]));
	else if (!check_parts(r, FIELD_CACHE_WRITE, kinds, lengthof(kinds)))
		return false;

	*plain_input = input->value;

	if (r->format->cache_excluded && input->given)
	{
		if (!sum_fields(count, cached, lengthof(cached), &sum) ||
			pg_add_s64_overflow(input->value, sum, &input->value))
			return refuse(r->reason, "%s and the cached tokens are beyond the range of bigint",
						  path_name(input->name));
	}
	if (count[FIELD_TOOL_INPUT].given &&
		!add_count(r, input, count[FIELD_TOOL_INPUT].value,
				   count[FIELD_TOOL_INPUT].name))
		return false;

	/* Where the uncached remainder is reported, the three make the total. */
	if (count[FIELD_UNCACHED].given)
	{
		if (!sum_fields(count, uncached, lengthof(uncached), &sum))
			return refuse(r->reason, "%s and the cached tokens are beyond the range of bigint",
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
			return refuse(r->reason, "%s is not %s", parts.data, term(input));
		}
	}
	return true;
}

/*
 * Make the output total inclusive of reasoning, and compare the grand total.
 * plain_input is the input total as it stood in the object.
 */
static bool
nest_output(Reading *r, int64 plain_input)
{
	Count	   *count = r->count;
	Count	   *output = &count[FIELD_OUTPUT];
	Count	   *reasoning = &count[FIELD_REASONING];
	Count	   *total = &count[FIELD_TOTAL];
	Count		reported = *output;
	ReasoningMode mode = r->format->reasoning;
	bool		separate = mode == REASONING_SEPARATE ||
	mode == REASONING_BY_TOTAL_SEPARATE;
	int64		sum;
	bool		fits;

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
		!add_count(r, output, reasoning->value, reasoning->name))
		return false;

	fits = !pg_add_s64_overflow(count[FIELD_INPUT].value, output->value, &sum);
	if (!fits)
		return refuse(r->reason, "%s and %s together are beyond the range of bigint",
					  term(&count[FIELD_INPUT]), term(output));
	if (!total->given || !count[FIELD_INPUT].given || sum == total->value)
		return true;

	/*
	 * Of formats that leave cached tokens out of the input, some write a
	 * total that leaves them out, too (AWS defines it that way and often
	 * sends the other).
	 */
	if (r->format->cache_excluded && plain_input + output->value == total->value)
		return true;

	{
		StringInfoData parts;
		Count		input = count[FIELD_INPUT];

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
		return refuse(r->reason, "%s is not %s, which is %lld",
					  term(total), parts.data, (long long) sum);
	}
}

/*
 * The subsets must fit in their totals.
 */
static bool
check_subsets(Reading *r)
{
	static const Field cached[] = {FIELD_CACHE_READ, FIELD_CACHE_WRITE};
	static const Field input_kinds[] = {FIELD_INPUT_AUDIO, FIELD_INPUT_IMAGE};
	static const Field cached_kinds[] = {FIELD_CACHE_READ_AUDIO, FIELD_CACHE_READ_IMAGE};
	static const Field cached_audio[] = {FIELD_CACHE_READ_AUDIO};
	static const Field cached_image[] = {FIELD_CACHE_READ_IMAGE};
	static const Field output_kinds[] = {FIELD_REASONING, FIELD_OUTPUT_AUDIO,
	FIELD_OUTPUT_IMAGE, FIELD_OUTPUT_VIDEO};
	Count	   *count = r->count;

	if (!check_parts(r, FIELD_INPUT, cached, lengthof(cached)) ||
		!check_parts(r, FIELD_INPUT, input_kinds, lengthof(input_kinds)) ||
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

	/*
	 * If what is cached and what is audio or image exceed the prompt
	 * together, some tokens are both; unless it says how many, the object
	 * does not determine a cost.  No overflow: each is at most the input.
	 */
	if (count[FIELD_CACHE_READ].value + count[FIELD_CACHE_WRITE].value >
		count[FIELD_INPUT].value - count[FIELD_INPUT_AUDIO].value +
		count[FIELD_CACHE_READ_AUDIO].value - count[FIELD_INPUT_IMAGE].value)
		return refuse(r->reason, "the cached tokens (%lld) and the audio and image tokens (%lld) overlap in %s, and it is not reported by how many",
					  (long long) (count[FIELD_CACHE_READ].value +
								   count[FIELD_CACHE_WRITE].value),
					  (long long) (count[FIELD_INPUT_AUDIO].value -
								   count[FIELD_CACHE_READ_AUDIO].value +
								   count[FIELD_INPUT_IMAGE].value),
					  term(&count[FIELD_INPUT]));
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
	if (r->audio_seconds && (zeros || !is_zero(r->audio_seconds)))
		appendStringInfo(&json, "%s\"audio_second\": %s", json.len ? ", " : "{",
						 DatumGetCString(DirectFunctionCall1(numeric_out,
															 NumericGetDatum(r->audio_seconds))));
	if (json.len == 0)
		return NULL;
	appendStringInfoChar(&json, '}');
	return DatumGetJsonbP(DirectFunctionCall1(jsonb_in, CStringGetDatum(json.data)));
}

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

static const UsageFormat *
find_format(TextView name)
{
	for (int i = 0; name.data && i < lengthof(formats); i++)
	{
		if (strlen(formats[i].name) == name.len &&
			memcmp(formats[i].name, name.data, name.len) == 0)
			return &formats[i];
	}
	return NULL;
}

/*
 * Is this the name of a usage format?  Names are matched exactly.
 */
bool
abp_usage_format_known(TextView format)
{
	return find_format(format) != NULL;
}

/*
 * A hint for an unknown format, palloc'd: the name that was probably meant,
 * if one is near, and all names.
 */
char	   *
abp_usage_format_hint(TextView format)
{
	StringInfoData hint;
	const char *closest = NULL;
	int			distance = 4;

	initStringInfo(&hint);
	/* The comparison is quadratic and needs a bound. */
	if (format.data && format.len > 0 && format.len <= NAMEDATALEN)
	{
		for (int i = 0; i < lengthof(formats); i++)
		{
			const char *name = formats[i].name;
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
	for (int i = 0; i < lengthof(formats); i++)
		appendStringInfo(&hint, "%s%s", i > 0 ? ", " : "", formats[i].name);
	appendStringInfoChar(&hint, '.');
	return hint.data;
}

/*
 * Find the usage object: where whole responses of the format keep it, else
 * the object is taken to be it.
 */
static void
locate_usage(Reading *r, JsonbContainer *top)
{
	const UsageFormat *format = r->format;

	r->root = r->usage = top;
	for (int i = 0; i < format->nenvelopes; i++)
	{
		const Envelope *envelope = &format->envelopes[i];
		JsonbContainer *root = find_object(top, envelope->root, format->snake_case, false);
		JsonbContainer *usage = NULL;

		if (root)
			usage = find_object(root, envelope->usage, format->snake_case,
								format->envelopes == otel_envelopes);
		if (usage)
		{
			r->root = root;
			r->usage = usage;
			return;
		}
	}
}

/*
 * Say why nothing was recognised.
 */
static bool
refuse_unknown_shape(Reading *r, JsonbContainer *top)
{
	StringInfoData keys;
	JsonbValue	found;

	/* All chunks of a stream but the last have "usage": null. */
	for (int i = 0; i < r->format->nenvelopes; i++)
	{
		const Envelope *envelope = &r->format->envelopes[i];
		JsonbContainer *root = find_object(top, envelope->root,
										   r->format->snake_case, false);

		if (root && getKeyJsonValueFromContainer(root, envelope->usage,
												 strlen(envelope->usage), &found))
		{
			if (found.type == jbvNull)
				return refuse(r->reason, "%s is null; in a stream, the last chunk has it",
							  envelope->usage);
			if (found.type != jbvBinary)
				return refuse(r->reason, "%s is not an object", envelope->usage);
		}
	}

	initStringInfo(&keys);
	for (int i = 0; i < r->format->nrules; i++)
	{
		const Rule *rule = &r->format->rules[i];

		if (rule->field == FIELD_INPUT)
			appendStringInfo(&keys, "%s%s", keys.len > 0 ? " or " : "",
							 path_name(rule->path));
	}
	return refuse(r->reason, "no usage of format \"%s\" recognised: there is no %s",
				  r->format->name, keys.data);
}

/*
 * The tier that served the call, in lower case.
 */
static char *
find_service_tier(Reading *r, JsonbContainer *top)
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
	char	   *tier;

	/* A batch's lines repeat the tier that the request named. */
	if (r->root != top &&
		find_object(top, "response/body", false, false) == r->root)
		return pstrdup("batch");

	/* Anthropic's fast mode is a price of its own, beside the tier. */
	if (r->format->rules == anthropic_rules &&
		string_is(r->usage, "speed", false, "fast"))
		return pstrdup("fast");

	tier = find_string(r->usage, r->format->service_tier, r->format->snake_case);
	if (tier == NULL)
		tier = find_string(r->root, r->format->service_tier, r->format->snake_case);
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
 * format is one of the names in doc/usage-formats.md.  On success returns
 * true and fills *usage: counts of tokens in our nesting (cost.h), the cost
 * in USD if the provider reports it, and what a whole response says about
 * tier, model and id.  Otherwise returns false and appends to *reason what
 * is wrong, naming fields and numbers; *usage is then undefined.  Raises
 * nothing because of the data.
 */
bool
abp_normalize_usage(TextView format, Jsonb *raw, NormalizedUsage *usage,
					StringInfo reason)
{
	Reading		r = {0};
	Count	   *count = r.count;
	Count		write_5m;
	JsonbContainer *anthropic;
	int64		plain_input = 0;
	bool		counted = false;

	memset(usage, 0, sizeof(NormalizedUsage));
	r.reason = reason;
	r.format = find_format(format);
	if (r.format == NULL)
		return refuse(reason, "unknown usage format \"%.*s\"",
					  format.data ? format.len : 0, format.data ? format.data : "");
	if (!JB_ROOT_IS_OBJECT(raw))
		return refuse(reason, "the usage is not a JSON object");

	locate_usage(&r, &raw->root);

	if (r.format->rules == anthropic_rules &&
		string_is(&raw->root, "type", false, "message_start"))
		return refuse(reason, "message_start comes before the counts are final; hand over the usage of the last message_delta, merged over it");

	/*
	 * Version 5 of the AI SDK left cached tokens out for Anthropic; the
	 * provider's own object, kept in the metadata, is complete.
	 */
	anthropic = NULL;
	if (r.format->refine == refine_ai_sdk &&
		!find_object(r.usage, "inputTokenDetails", false, false) &&
		!refine_ai_sdk(r.usage))
		anthropic = find_object(r.root, "providerMetadata/anthropic/usage", false, false);

	if (anthropic)
	{
		TextView	anthropic_name = {"anthropic", strlen("anthropic")};
		UsageFormat *mixed = palloc(sizeof(UsageFormat));
		Count		flat[NUM_FIELDS] = {0};

		if (!read_counts(&r, r.usage, flat) || !check_single_step(&r, flat))
			return false;

		*mixed = *find_format(anthropic_name);
		memcpy(mixed->model, r.format->model, sizeof(mixed->model));
		memcpy(mixed->generation_id, r.format->generation_id,
			   sizeof(mixed->generation_id));
		mixed->cost = r.format->cost;
		r.format = mixed;
		r.usage = anthropic;
	}
	else if (r.format->refine)
	{
		const UsageFormat *refined = r.format->refine(r.usage);

		if (refined)
			r.format = refined;
	}

	if (!read_counts(&r, r.usage, count) ||
		(r.format->extra && !r.format->extra(&r)) ||
		(r.format->cost && !r.format->cost(&r)))
		return false;

	for (int i = 0; i < NUM_FIELDS; i++)
		counted |= count[i].given;
	if (!counted && r.audio_seconds == NULL && r.cost == NULL)
	{
		/* the table that has the envelopes */
		r.format = find_format(format);
		return refuse_unknown_shape(&r, &raw->root);
	}

	if (!nest_input(&r, &plain_input))
		return false;

	/*
	 * A total that is missing is unknown, not 0.  It is not needed where the
	 * cost is reported or something else than tokens is counted.
	 */
	if (r.cost == NULL)
	{
		bool		tokens = count[FIELD_OUTPUT].given || count[FIELD_TOTAL].given ||
		count[FIELD_OUTPUT_TEXT].given;
		const char *missing = NULL;

		for (int i = 0; i < r.format->nrules && missing == NULL; i++)
		{
			const Rule *rule = &r.format->rules[i];

			if ((rule->field == FIELD_INPUT && tokens && !count[FIELD_INPUT].given) ||
				(rule->field == FIELD_OUTPUT && r.format->output_required &&
				 !count[FIELD_OUTPUT].given))
				missing = rule->path;
		}
		if (missing)
			return refuse(reason, "%s is missing, so that the cost cannot be known",
						  path_name(missing));
	}

	if (!nest_output(&r, plain_input) || !check_subsets(&r))
		return false;

	/* Writes that are not said to last an hour last 5 minutes. */
	write_5m = count[FIELD_CACHE_WRITE];
	write_5m.value -= count[FIELD_CACHE_WRITE_1H].value;

	set_count(&usage->counts, COUNT_INPUT, &count[FIELD_INPUT]);
	set_count(&usage->counts, COUNT_CACHE_READ, &count[FIELD_CACHE_READ]);
	set_count(&usage->counts, COUNT_CACHE_WRITE, &write_5m);
	set_count(&usage->counts, COUNT_CACHE_WRITE_1H, &count[FIELD_CACHE_WRITE_1H]);
	set_count(&usage->counts, COUNT_OUTPUT, &count[FIELD_OUTPUT]);
	set_count(&usage->counts, COUNT_REASONING, &count[FIELD_REASONING]);
	set_count(&usage->counts, COUNT_WEB_SEARCH, &count[FIELD_WEB_SEARCH]);
	usage->counts.units = make_units(&r);
	usage->provider_cost = r.cost;
	usage->service_tier = find_service_tier(&r, &raw->root);
	usage->model = find_string(r.root, r.format->model, r.format->snake_case);
	usage->generation_id = find_string(r.root, r.format->generation_id,
									   r.format->snake_case);
	/* A bare list of attributes has its strings where its counts are. */
	if (r.root != r.usage && r.format->envelopes == otel_envelopes)
	{
		usage->model = find_string(r.usage, r.format->model, false);
		usage->generation_id = find_string(r.usage, r.format->generation_id, false);
	}
	return true;
}
