/*-------------------------------------------------------------------------
 *
 * usage_openai.c
 *	  The usage objects of OpenAI and Anthropic, and of those who write like them.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "miscadmin.h"
#include "utils/numeric.h"

#include "base/numeric_math.h"
#include "price/usage_formats.h"

/* Where nearly all replies that are like these have their names. */
#define MODEL_AND_TIER \
	.model = {"model"}, \
	.service_tier = {"service_tier"}
#define USUAL_STRINGS \
	MODEL_AND_TIER, \
	.generation_id = {"id"}

/*
 * Chat Completions, Responses, Realtime, images, embeddings, transcription of
 * OpenAI; and the names that others have given the same things: in all of
 * these objects cached tokens are part of the input.
 */
#define OPENAI_RULES \
	{FIELD_INPUT, "prompt_tokens"}, \
	{FIELD_INPUT, "input_tokens"}, \
	{FIELD_OUTPUT, "completion_tokens"}, \
	{FIELD_OUTPUT, "output_tokens"}, \
	{FIELD_TOTAL, "total_tokens"}, \
	/* Moonshot, Together */ \
	{FIELD_CACHE_READ, "cached_tokens"}, \
	/* DeepSeek */ \
	{FIELD_CACHE_READ, "prompt_cache_hit_tokens"}, \
	{FIELD_UNCACHED, "prompt_cache_miss_tokens"}, \
	/* LiteLLM, Databricks */ \
	{FIELD_CACHE_READ, "cache_read_input_tokens"}, \
	{FIELD_CACHE_WRITE, "cache_creation_input_tokens"}, \
	/* Codex */ \
	{FIELD_CACHE_READ, "cached_input_tokens"}, \
	{FIELD_CACHE_WRITE, "cache_write_input_tokens"}, \
	{FIELD_REASONING, "reasoning_output_tokens"}, \
	/* pydantic-ai, now and before */ \
	{FIELD_CACHE_READ, "cache_read_tokens"}, \
	{FIELD_CACHE_WRITE, "cache_write_tokens"}, \
	{FIELD_INPUT_AUDIO, "input_audio_tokens"}, \
	{FIELD_CACHE_READ_AUDIO, "cache_audio_read_tokens"}, \
	{FIELD_OUTPUT_AUDIO, "output_audio_tokens"}, \
	{FIELD_INPUT, "request_tokens"}, \
	{FIELD_OUTPUT, "response_tokens"}, \
	{FIELD_REQUESTS, "requests"}, \
	{FIELD_REQUESTS, "request_count"}, \
	/* Alibaba: images, speech */ \
	{FIELD_IMAGE, "image_count"}, \
	{FIELD_CHARACTER, "characters"}, \
	/* Anthropic's searches behind LiteLLM and OpenRouter */ \
	{FIELD_WEB_SEARCH, "server_tool_use/web_search_requests"}, \
	{FIELD_WEB_SEARCH, "server_tool_use_details/web_search_requests"}

static const Rule openai_rules[] = {
	OPENAI_RULES,
	/* Perplexity */
	{FIELD_CITATION, "citation_tokens"},
	{FIELD_WEB_SEARCH, "num_search_queries"}
};

/* Mistral and LangChain write the singular, Realtime does for its tokens. */
static const char *const input_details[] = {
	"prompt_tokens_details", "input_tokens_details", "input_token_details",
	"prompt_token_details", NULL
};

static const char *const output_details[] = {
	"completion_tokens_details", "output_tokens_details", "output_token_details",
	"completion_token_details", NULL
};

static const char *const pydantic_places[] = {"details", NULL};
static const char *const cache_creation_places[] = {"cache_creation_token_details", NULL};

static const Rule input_detail_rules[] = {
	{FIELD_CACHE_READ, "cached_tokens"},
	{FIELD_CACHE_WRITE, "cache_write_tokens"},
	{FIELD_INPUT_AUDIO, "audio_tokens"},
	{FIELD_INPUT_IMAGE, "image_tokens"},
	{FIELD_CACHE_READ_AUDIO, "cached_tokens_details/audio_tokens"},
	{FIELD_CACHE_READ_IMAGE, "cached_tokens_details/image_tokens"},
	/* LiteLLM */
	{FIELD_CACHE_WRITE, "cache_creation_tokens"},
	{FIELD_CACHE_WRITE_5M, "cache_creation_token_details/ephemeral_5m_input_tokens"},
	{FIELD_CACHE_WRITE_1H, "cache_creation_token_details/ephemeral_1h_input_tokens"},
	{FIELD_WEB_SEARCH, "web_search_requests"},
	/* Alibaba */
	{FIELD_CACHE_WRITE, "cache_creation_input_tokens"},
	{FIELD_CACHE_WRITE_5M, "cache_creation/ephemeral_5m_input_tokens"},
	{FIELD_CACHE_WRITE_1H, "cache_creation/ephemeral_1h_input_tokens"},
	/* LangChain */
	{FIELD_CACHE_READ, "cache_read"},
	{FIELD_CACHE_WRITE, "cache_creation"},
	{FIELD_CACHE_WRITE_5M, "ephemeral_5m_input_tokens"},
	{FIELD_CACHE_WRITE_1H, "ephemeral_1h_input_tokens"},
	{FIELD_INPUT_AUDIO, "audio"},
	{FIELD_INPUT_IMAGE, "image"},
	{FIELD_CACHE_READ, "flex_cache_read"},
	{FIELD_CACHE_READ, "priority_cache_read"}
};

static const Rule output_detail_rules[] = {
	{FIELD_REASONING, "reasoning_tokens"},
	{FIELD_OUTPUT_AUDIO, "audio_tokens"},
	{FIELD_OUTPUT_IMAGE, "image_tokens"},
	{FIELD_OUTPUT_VIDEO, "video_tokens"},
	/* LangChain */
	{FIELD_REASONING, "reasoning"},
	{FIELD_REASONING, "flex_reasoning"},
	{FIELD_REASONING, "priority_reasoning"},
	{FIELD_OUTPUT_AUDIO, "audio"},
	{FIELD_OUTPUT_IMAGE, "image"}
};

/* LiteLLM, beside prompt_tokens_details */
static const Rule cache_creation_rules[] = {
	{FIELD_CACHE_WRITE_5M, "ephemeral_5m_input_tokens"},
	{FIELD_CACHE_WRITE_1H, "ephemeral_1h_input_tokens"}
};

/* pydantic-ai keeps what it has no name for as the provider's own. */
static const Rule pydantic_detail_rules[] = {
	{FIELD_REASONING, "reasoning_tokens"},
	{FIELD_REASONING, "thoughts_tokens"},
	{FIELD_CACHE_READ, "cache_read_input_tokens"},
	{FIELD_CACHE_READ, "cached_content_tokens"},
	{FIELD_CACHE_WRITE, "cache_creation_input_tokens"},
	{FIELD_CACHE_WRITE_1H, "ephemeral_1h_input_tokens"},
	{FIELD_INPUT_AUDIO, "audio_prompt_tokens"},
	{FIELD_OUTPUT_AUDIO, "audio_candidates_tokens"},
	{FIELD_INPUT_IMAGE, "image_prompt_tokens"},
	{FIELD_OUTPUT_IMAGE, "image_candidates_tokens"}
};

static const RuleGroup openai_groups[] = {
	{input_details, input_detail_rules, lengthof(input_detail_rules)},
	{output_details, output_detail_rules, lengthof(output_detail_rules)},
	{cache_creation_places, cache_creation_rules, lengthof(cache_creation_rules)},
	{pydantic_places, pydantic_detail_rules, lengthof(pydantic_detail_rules)}
};

static const char *const openai_harmless[] = {
	/* text is what remains of a total, at the total's own price */
	"text_tokens", "*/text_tokens",
	/* OpenAI: both are in completion_tokens already */
	"*/accepted_prediction_tokens", "*/rejected_prediction_tokens",

	/*
	 * pydantic-ai: Anthropic's own totals, of which its input_tokens is made;
	 * text of Gemini; tools of the application
	 */
	"details/input_tokens", "details/output_tokens", "details/text_*", "tool_calls",
	/* LangChain: what remains of a total, at the tier that the key names */
	"*_token_details/flex", "*_token_details/priority",
	/* Codex: the session so far */
	"total_token_usage/*",
	/* Anthropic: fetching pages costs nothing beside its tokens */
	"*/web_fetch_requests", "*/tool_search_requests",
	/* OpenRouter: all tools; its searches are read */
	"server_tool_use_details/tool_calls_*",
	/* Alibaba: the size of an image, whose price does not depend on it */
	"width", "height",
	/* Anthropic's and OpenRouter's costs in parts */
	"cost_details/*", "cost/*",
	/* what replies have that have no usage object of their own */
	"data/*", "segments/*", "words/*", "x_groq/*",
	NULL
};

static const Envelope openai_envelopes[] = {
	{"", "usage"},
	{"response", "usage", "batch", "custom_id"},	/* Fireworks: a line of a
													 * batch's output */
	{"response", "usage"},		/* response.completed, response.done */
	{"response/body", "usage", "batch"},	/* a line of a batch's output file */
	{"result", "usage"},		/* Cloudflare Workers AI */
	{"", "usage_metadata"},		/* LangChain's AIMessage */
	{"kwargs", "usage_metadata"},	/* the same, serialized */
	{"", "token_usage"},		/* LangChain's llm_output */
	{"payload/info", "last_token_usage"},	/* Codex: token_count */
	{"info", "last_token_usage"}
};

/*
 * Images are billed by the piece only where no tokens are reported for them
 * (dall-e, Grok): then their number is the length of the response's list.
 */
static bool
count_images(Reading *r)
{
	JsonbContainer *list = abp_usage_list(r, r->root, "data");
	int64		images = 0;

	if (list == NULL || r->count[FIELD_IMAGE].given ||
		r->count[FIELD_INPUT].given || r->count[FIELD_OUTPUT].given)
		return true;
	for (uint32 i = 0; i < JsonContainerSize(list); i++)
	{
		JsonbContainer *item = abp_usage_list_item(list, i);

		if (item && (abp_usage_has(r, item, "url") || abp_usage_has(r, item, "b64_json")))
			images++;
	}
	return images == 0 ||
		abp_usage_add_count(r, &r->count[FIELD_IMAGE], images, "data");
}

/* Does the reply have images, or is the model one that makes nothing else? */
static bool
makes_images(Reading *r)
{
	JsonbContainer *list = r->root == r->usage ? NULL :
	abp_usage_list(r, r->root, "data");
	JsonbContainer *item = list && JsonContainerSize(list) > 0 ?
	abp_usage_list_item(list, 0) : NULL;

	return (item && (abp_usage_has(r, item, "b64_json") || abp_usage_has(r, item, "url"))) ||
		abp_usage_string_is(r, r->root, "type", "image_generation.completed") ||
		abp_usage_string_is(r, r->root, "type", "image_edit.completed") ||
		abp_usage_model_has(r, "gpt-image");
}

/*
 * The images API first reported its output without details: all of it is
 * image tokens.  Speech says nothing of modalities either.
 */
static void
tell_modality(Reading *r)
{
	Count	   *count = r->count;

	if (!count[FIELD_OUTPUT].given || count[FIELD_OUTPUT].value == 0 ||
		count[FIELD_OUTPUT_IMAGE].given || count[FIELD_OUTPUT_AUDIO].given ||
		abp_usage_list(r, r->root, "output") != NULL)
		return;
	for (int i = 0; output_details[i]; i++)
	{
		if (abp_usage_has(r, r->usage, output_details[i]))
			return;
	}
	if ((count[FIELD_INPUT_IMAGE].given && abp_usage_has(r, r->usage, "input_tokens_details")) ||
		makes_images(r))
		count[FIELD_OUTPUT_IMAGE] = count[FIELD_OUTPUT];
	else if (abp_usage_string_is(r, r->root, "type", "speech.audio.done"))
		count[FIELD_OUTPUT_AUDIO] = count[FIELD_OUTPUT];
}

/*
 * Items of a reply's output that are calls of tools which the provider ran.
 * OpenAI bills searches of the web and of files by the call, and the
 * interpreter by its container; the others cost their tokens alone.
 */
static const struct
{
	const char *type;
	int			field;			/* a Field; -1: nothing beside its tokens */
}			tool_calls[] =

{
	{"web_search_call", FIELD_WEB_SEARCH},
	{"x_search_call", FIELD_X_SEARCH},
	{"file_search_call", FIELD_FILE_SEARCH},
	{"code_interpreter_call", FIELD_SESSION},
	{"shell_call", FIELD_SESSION},
	{"function_call", -1},
	{"custom_tool_call", -1},
	{"computer_call", -1},
	{"mcp_call", -1},
	{"local_shell_call", -1},
	{"apply_patch_call", -1},
	{"tool_search_call", -1}
};

/* The container that a tool ran in, or NULL if it ran with the caller. */
static char *
tool_container(Reading *r, JsonbContainer *item)
{
	char	   *container = abp_usage_string(r, item, "container_id");

	return container ? container : abp_usage_string(r, item, "environment/container_id");
}

/* Was the container one of an earlier item of the list? */
static bool
container_is_counted(Reading *r, JsonbContainer *list, uint32 n, const char *container)
{
	for (uint32 i = 0; i < n; i++)
	{
		JsonbContainer *item = abp_usage_list_item(list, i);
		char	   *other = item ? tool_container(r, item) : NULL;

		if (other && strcmp(other, container) == 0)
			return true;
	}
	return false;
}

/*
 * Count the calls of tools in the output of the Responses API, where the
 * usage object does not.  Opening a page and finding text in it are items of
 * a search, too, but are not billed.
 */
static bool
count_tool_calls(Reading *r)
{
	JsonbContainer *list = abp_usage_list(r, r->root, "output");
	Count		calls[NUM_FIELDS] = {0};

	if (list == NULL)
		return true;
	for (uint32 i = 0; i < JsonContainerSize(list); i++)
	{
		JsonbContainer *item = abp_usage_list_item(list, i);
		char	   *type = item ? abp_usage_string(r, item, "type") : NULL;
		int			len = type ? strlen(type) : 0;
		int			t = 0;
		int			field;

		if (len < 5 || strcmp(type + len - 5, "_call") != 0)
			continue;
		while (t < lengthof(tool_calls) && strcmp(tool_calls[t].type, type) != 0)
			t++;
		if (strcmp(type, "image_generation_call") == 0)
		{
			if (!abp_usage_doubt(r, "output has an image_generation_call, whose tokens are another model's and not in the usage object; insert them as a row of their own"))
				return false;
			continue;
		}
		if (t == lengthof(tool_calls))
		{
			if (!abp_usage_doubt(r, "output has a %s, and what it costs beside its tokens is not known here", type))
				return false;
			continue;
		}
		field = tool_calls[t].field;
		if (field == FIELD_SESSION)
		{
			char	   *container = tool_container(r, item);

			if ((container == NULL && strcmp(type, "shell_call") == 0) ||
				(container && container_is_counted(r, list, i, container)))
				continue;
		}
		else if (field == FIELD_WEB_SEARCH && abp_usage_object(r, item, "action") &&
				 !abp_usage_string_is(r, item, "action/type", "search"))
			continue;
		if (field >= 0)
			calls[field].value++;
	}

	calls[FIELD_WEB_SEARCH].given = true;
	for (int f = 0; f < NUM_FIELDS; f++)
	{
		if ((calls[f].given || calls[f].value > 0) && !r->count[f].given &&
			!abp_usage_add_count(r, &r->count[f], calls[f].value, "output"))
			return false;
	}
	return true;
}

/*
 * tool_usage stands beside usage in the Responses API: OpenAI's own count of
 * searches, and the tokens of the model that made images.
 */
static bool
read_tool_usage(Reading *r)
{
	static const char *const image_counts[] = {
		"tool_usage/image_gen/output_tokens", "tool_usage/image_gen/input_tokens",
		"tool_usage/image_gen/total_tokens"
	};

	if (!abp_usage_object(r, r->root, "tool_usage"))
		return true;
	for (int i = 0; i < lengthof(image_counts); i++)
	{
		Count		tokens = {0};

		if (!abp_usage_read_count(r, r->root, image_counts[i], &tokens))
			return false;
		if (tokens.value > 0)
			return abp_usage_doubt(r, "%s is %lld: tokens of another model, with prices of its own; insert them as a row of their own",
								   abp_usage_path_name(image_counts[i]),
								   (long long) tokens.value);
	}
	return abp_usage_read_count(r, r->root, "tool_usage/web_search/num_requests",
								&r->count[FIELD_WEB_SEARCH]) &&
		abp_usage_read_count(r, r->root, "tool_usage/file_search/num_requests",
							 &r->count[FIELD_FILE_SEARCH]);
}

/*
 * Embedding and ranking have no output, and Voyage and Jina give the total
 * alone.  What writes gives more than a total, and says what it wrote.
 */
static void
total_is_input(Reading *r)
{
	static const char *const written[] = {
		"choices", "output", "content", "message", "candidates", "text", "response"
	};
	static const char *const models[] = {"embed", "rerank", "voyage", "jina"};
	Count	   *count = r->count;
	bool		writes = r->root == r->usage;

	if (!count[FIELD_TOTAL].given || count[FIELD_INPUT].given ||
		count[FIELD_OUTPUT].given || count[FIELD_UNCACHED].given)
		return;
	for (int i = 0; i < lengthof(models); i++)
	{
		if (abp_usage_model_has(r, models[i]))
		{
			count[FIELD_INPUT] = count[FIELD_TOTAL];
			return;
		}
	}
	for (int i = 0; i < lengthof(written) && !writes; i++)
		writes = abp_usage_has(r, r->root, written[i]);
	if (!writes)
		count[FIELD_INPUT] = count[FIELD_TOTAL];
}

/*
 * Gemini behind its OpenAI endpoint has its thoughts in the total only.
 */
static bool
thoughts_by_total(Reading *r)
{
	Count	   *count = r->count;
	int64		thoughts = count[FIELD_TOTAL].value - count[FIELD_INPUT].value;

	if (!count[FIELD_TOTAL].given || !count[FIELD_INPUT].given ||
		!count[FIELD_OUTPUT].given || thoughts <= count[FIELD_OUTPUT].value ||
		!abp_usage_model_has(r, "gemini"))
		return true;
	thoughts -= count[FIELD_OUTPUT].value;
	if (count[FIELD_REASONING].value != 0 && count[FIELD_REASONING].value != thoughts)
		return true;
	count[FIELD_REASONING].value = thoughts;
	count[FIELD_REASONING].given = true;
	count[FIELD_REASONING].name = "total_tokens";
	return abp_usage_add_count(r, &count[FIELD_OUTPUT], thoughts, "total_tokens");
}

/* Perplexity, and who else writes reasoning_tokens at the top. */
static bool
read_reasoning(Reading *r)
{
	Count	   *count = r->count;
	int64		reasoning;

	if (count[FIELD_REASONING].value > 0)
		return true;
	if (!abp_usage_read_count(r, r->usage, "reasoning_tokens", &count[FIELD_REASONING]))
		return false;

	/*
	 * Perplexity's reasoning tokens stand beside completion_tokens, and
	 * outside its total; its searches and citations give it away.  Others
	 * that write the key at this level (SGLang) mean a subset.
	 */
	reasoning = count[FIELD_REASONING].value;
	if (reasoning == 0 || !count[FIELD_OUTPUT].given ||
		!(count[FIELD_CITATION].given || count[FIELD_WEB_SEARCH].given))
		return true;
	return abp_usage_add_count(r, &count[FIELD_OUTPUT], reasoning, "reasoning_tokens") &&
		(!count[FIELD_TOTAL].given ||
		 abp_usage_add_count(r, &count[FIELD_TOTAL], reasoning, "reasoning_tokens"));
}

/*
 * Transcription billed by time: {"type": "duration", "seconds": 9}, or, from
 * whisper and from Groq, no usage object and the length beside the text.
 */
static bool
read_audio_seconds(Reading *r)
{
	if (!abp_usage_read_quantity(r, r->usage, "seconds", &r->audio_seconds))
		return false;
	if (r->audio_seconds || r->count[FIELD_INPUT].given || r->count[FIELD_OUTPUT].given ||
		r->count[FIELD_TOTAL].given || !abp_usage_has(r, r->root, "text"))
		return true;
	return abp_usage_read_quantity(r, r->root, "duration", &r->audio_seconds);
}

/* What paths cannot say of the shapes that all of this kind may have. */
static bool
extra_openai_like(Reading *r)
{
	JsonbContainer *searched = abp_usage_list(r, r->root, "web_search");

	/* Zhipu: the results of a search that it has made */
	if (searched && !r->count[FIELD_WEB_SEARCH].given &&
		!abp_usage_add_count(r, &r->count[FIELD_WEB_SEARCH], 1, "web_search"))
		return false;
	if (!read_reasoning(r) || !read_audio_seconds(r) || !count_images(r) ||
		!thoughts_by_total(r) || !read_tool_usage(r) || !count_tool_calls(r))
		return false;
	total_is_input(r);
	tell_modality(r);
	return true;
}

/* The same, where an object may be Anthropic's or have Perplexity's fee. */
static bool
extra_openai(Reading *r)
{
	/*
	 * Anthropic's objects share two keys with the Responses API.  Read as
	 * such, they would lose their cached tokens.
	 */
	if (abp_usage_has(r, r->usage, "input_tokens") &&
		(abp_usage_has(r, r->usage, "cache_read_input_tokens") ||
		 abp_usage_has(r, r->usage, "cache_creation_input_tokens")) &&
		!abp_usage_doubt(r, "the usage object has cache_read_input_tokens or cache_creation_input_tokens beside input_tokens; its format is \"anthropic\", not \"%s\"",
						 r->format->name))
		return false;

	/* Perplexity's fee for a request depends on it; its cost has it included. */
	if (r->cost == NULL && !r->cost_given)
	{
		if (abp_usage_string_is(r, r->usage, "search_context_size", "medium") &&
			!abp_usage_add_count(r, &r->count[FIELD_SEARCH_MEDIUM], 1, "search_context_size"))
			return false;
		if (abp_usage_string_is(r, r->usage, "search_context_size", "high") &&
			!abp_usage_add_count(r, &r->count[FIELD_SEARCH_HIGH], 1, "search_context_size"))
			return false;
	}
	return extra_openai_like(r);
}

/*
 * OpenRouter: the fee is what it charges.  With the caller's own key the
 * provider's charge comes on top; otherwise that is in it already.
 */
static bool
cost_with_own_key(Reading *r, const char *fee_path, const char *charge_path)
{
	Numeric		fee = NULL;
	Numeric		charge = NULL;
	bool		own_key = false;

	if (!abp_usage_read_amount(r, r->usage, fee_path, &fee) ||
		!abp_usage_read_flag(r, r->usage, "is_byok", &own_key))
		return false;
	if (!own_key)
	{
		r->cost = fee;
		return true;
	}
	if (!abp_usage_read_amount(r, r->usage, charge_path, &charge))
		return false;
	/* without the larger part, the cost is not known */
	if (fee && charge)
		r->cost = numeric_plus(fee, charge);
	return true;
}

static bool
cost_openrouter(Reading *r)
{
	return cost_with_own_key(r, "cost", "cost_details/upstream_inference_cost");
}

/*
 * DeepInfra and Perplexity report what they charge; gateways do it as
 * OpenRouter does.
 */
static bool
cost_openai(Reading *r)
{
	if (abp_usage_object(r, r->usage, "cost"))
		return abp_usage_read_amount(r, r->usage, "cost/total_cost", &r->cost);
	if (!abp_usage_read_amount(r, r->usage, "estimated_cost", &r->cost))
		return false;
	return r->cost != NULL || cost_openrouter(r);
}

/* LangChain names the tier in the keys of its details. */
static const char *
tier_openai(Reading *r)
{
	if (abp_usage_has(r, r->usage, "input_token_details/flex") ||
		abp_usage_has(r, r->usage, "output_token_details/flex"))
		return "flex";
	if (abp_usage_has(r, r->usage, "input_token_details/priority") ||
		abp_usage_has(r, r->usage, "output_token_details/priority"))
		return "priority";
	return NULL;
}

/* ----------------------------------------------------------------
 *		Anthropic
 * ----------------------------------------------------------------
 */

static const Rule anthropic_rules[] = {
	{FIELD_INPUT, "input_tokens"},
	{FIELD_CACHE_READ, "cache_read_input_tokens"},
	{FIELD_CACHE_WRITE, "cache_creation_input_tokens"},
	{FIELD_CACHE_WRITE_5M, "cache_creation/ephemeral_5m_input_tokens"},
	{FIELD_CACHE_WRITE_1H, "cache_creation/ephemeral_1h_input_tokens"},
	{FIELD_OUTPUT, "output_tokens"},
	{FIELD_REASONING, "output_tokens_details/thinking_tokens"},
	{FIELD_REASONING, "output_tokens_details/reasoning_tokens"},
	{FIELD_WEB_SEARCH, "server_tool_use/web_search_requests"},
	{FIELD_CODE_EXECUTION, "server_tool_use/code_execution_requests"},
	/* the Agent SDK's modelUsage, in the other case */
	{FIELD_WEB_SEARCH, "web_search_requests"},
	{FIELD_TOTAL, "total_tokens"}
};

static const char *const anthropic_harmless[] = {
	/* fetching pages and finding tools cost nothing beside their tokens */
	"server_tool_use/web_fetch_requests", "server_tool_use/tool_search_requests",
	/* the Agent SDK's own estimate */
	"costUSD", "*/costUSD", "total_cost_usd",
	"cost_details/*",
	NULL
};

static const Envelope anthropic_envelopes[] = {
	{"", "usage"},
	{"message", "usage"},
	{"result/message", "usage"},	/* a line of a batch's results */
	{"modelOutput", "usage", "batch"},	/* the same from Bedrock, from Vertex */
	{"response", "usage", "batch", "custom_id"}
};

/* Do two names mean one model: are they the same but for a date behind one? */
static bool
same_model(const char *a, const char *b)
{
	const char *rest;

	if (strlen(a) > strlen(b))
	{
		const char *longer = a;

		a = b;
		b = longer;
	}
	rest = b + strlen(a);
	return strncmp(a, b, strlen(a)) == 0 &&
		(*rest == '\0' || strncmp(rest, "-20", 3) == 0 || strncmp(rest, "@20", 3) == 0);
}

/* Add the counts of a part that are given. */
static bool
add_counts(Reading *r, Count *to, const Count *part)
{
	for (int f = 0; f < NUM_FIELDS; f++)
	{
		if (part[f].given &&
			!abp_usage_add_count(r, &to[f], part[f].value, part[f].name))
			return false;
	}
	return true;
}

/*
 * The top-level counts are those of the message, its tool loops included.
 * They leave out what compaction of the context took, what an advisor of
 * another model took, and attempts of a model that another one then took
 * over from: an attempt that wrote something is billed at its own model's
 * prices, one that was declined before is free.
 */
static bool
read_iterations(Reading *r)
{
	static const Field summed[] = {FIELD_INPUT, FIELD_CACHE_READ, FIELD_CACHE_WRITE, FIELD_OUTPUT};
	char	   *model = abp_usage_string(r, r->root, "model");
	bool		go_on;
	JsonbContainer *list = abp_usage_only_list(r, r->usage, "iterations", &go_on);
	Count		sum[NUM_FIELDS] = {0};
	bool		repeats = false;

	if (list == NULL)
		return go_on;
	for (uint32 i = 0; i < JsonContainerSize(list); i++)
	{
		JsonbContainer *item = abp_usage_list_item(list, i);
		Count		part[NUM_FIELDS] = {0};
		char	   *by;

		if (item == NULL)
			return abp_usage_doubt(r, "iterations has an item that is not an object");
		if (!abp_usage_read_counts(r, item, part))
			return false;
		if (abp_usage_string_is(r, item, "type", "compaction"))
		{
			if (!add_counts(r, r->count, part))
				return false;
			continue;
		}
		if (abp_usage_string_is(r, item, "type", "advisor_message"))
			return abp_usage_doubt(r, "iterations has counts of an advisor, which is another model with prices of its own; insert them as a row of their own");
		if (part[FIELD_OUTPUT].value == 0)
			continue;
		by = abp_usage_string(r, item, "model");
		if (by && model == NULL)
			model = abp_usage_string(r, abp_usage_list_item(list, JsonContainerSize(list) - 1), "model");
		if (by && model && !same_model(by, model))
			return abp_usage_doubt(r, "iterations has an attempt of %s that wrote %lld tokens, which are billed at that model's prices; insert them as a row of their own",
								   by, (long long) part[FIELD_OUTPUT].value);
		repeats = true;
		if (!add_counts(r, sum, part))
			return false;
	}
	for (int i = 0; repeats && i < lengthof(summed); i++)
	{
		Field		f = summed[i];

		if (sum[f].given && sum[f].value != r->reported[f].value)
			return abp_usage_doubt(r, "the messages in iterations have %lld %s, the usage object %lld",
								   (long long) sum[f].value, sum[f].name,
								   (long long) r->reported[f].value);
	}
	return true;
}

static bool
extra_anthropic(Reading *r)
{
	if (abp_usage_string_is(r, r->top, "type", "message_start") &&
		!abp_usage_doubt(r, "message_start comes before the counts are final; hand over the usage of the last message_delta, merged over it"))
		return false;
	return read_iterations(r);
}

/* Anthropic's fast mode is a price of its own, beside the tier. */
static const char *
tier_anthropic(Reading *r)
{
	return abp_usage_string_is(r, r->usage, "speed", "fast") ? "fast" : NULL;
}

/* ----------------------------------------------------------------
 *		OpenRouter, Groq, xAI, Mistral, Cohere, LiteLLM
 * ----------------------------------------------------------------
 */

static const Rule openrouter_rules[] = {
	OPENAI_RULES,
	/* its generation endpoint */
	{FIELD_INPUT, "native_tokens_prompt"},
	{FIELD_OUTPUT, "native_tokens_completion"},
	{FIELD_REASONING, "native_tokens_reasoning"},
	{FIELD_CACHE_READ, "native_tokens_cached"},
	{FIELD_OUTPUT_IMAGE, "native_tokens_completion_images"}
};

static const char *const openrouter_harmless[] = {
	"text_tokens", "*/text_tokens", "*/accepted_prediction_tokens", "*/rejected_prediction_tokens",
	"*/web_fetch_requests", "*/tool_search_requests",
	"server_tool_use_details/tool_calls_*", "cost_details/*",

	/*
	 * its generation endpoint: counts by one tokenizer for all models, what
	 * the cost is made of, attempts of other providers
	 */
	"tokens_prompt", "tokens_completion", "usage", "usage_cache", "usage_data",
	"usage_web", "usage_file", "upstream_inference_cost", "num_search_results",
	"num_media_prompt", "num_media_completion", "num_input_audio_prompt",
	"provider_responses/*",
	NULL
};

static const Envelope openrouter_envelopes[] = {
	{"", "usage"},
	{"response", "usage"},
	{"response/body", "usage", "batch"},
	{"data", "", NULL, "data/native_tokens_prompt"}
};

/* Its generation endpoint names the two otherwise. */
static bool
cost_openrouter_any(Reading *r)
{
	if (abp_usage_has(r, r->usage, "total_cost"))
		return cost_with_own_key(r, "total_cost", "upstream_inference_cost");
	return cost_openrouter(r);
}

/*
 * OpenRouter's Messages endpoint answers in Anthropic's shape, in which the
 * input total leaves cached tokens out.
 */
static const UsageFormat openrouter_messages = {
	.name = "openrouter",
	RULES(anthropic_rules),
	.harmless = anthropic_harmless,
	USUAL_STRINGS,
	.cache_excluded = true,
	.output_required = true,
	.extra = extra_anthropic,
	.cost = cost_openrouter,
	.tier = tier_anthropic
};

/* An answer of its interface for Anthropic's Messages? */
static const UsageFormat *
refine_openrouter(Reading *r)
{
	if (abp_usage_has(r, r->usage, "input_tokens") &&
		(abp_usage_has(r, r->usage, "cache_read_input_tokens") ||
		 abp_usage_has(r, r->usage, "cache_creation_input_tokens")))
		return &openrouter_messages;
	return NULL;
}

static const Envelope groq_envelopes[] = {
	{"", "usage"},
	{"", "x_groq/usage"},		/* the last chunk of a stream */
	{"response/body", "usage", "batch"}
};

/*
 * Groq runs tools for its compound models, and bills them beside the tokens;
 * how is in no reply.
 */
static bool
extra_groq(Reading *r)
{
	JsonbContainer *choices = abp_usage_list(r, r->root, "choices");

	for (uint32 i = 0; choices && i < JsonContainerSize(choices); i++)
	{
		JsonbContainer *item = abp_usage_list_item(choices, i);

		if (item && abp_usage_list(r, item, "message/executed_tools") &&
			!abp_usage_doubt(r, "choices.message.executed_tools has tools that Groq ran and bills beside the tokens, and the reply does not say how"))
			return false;
	}
	return extra_openai_like(r);
}

static const Rule xai_rules[] = {
	OPENAI_RULES,
	/* the SDK's names */
	{FIELD_CACHE_READ, "cached_prompt_text_tokens"},
	{FIELD_INPUT_IMAGE, "prompt_image_tokens"},
	{FIELD_REASONING, "reasoning_tokens"},
	{FIELD_WEB_SEARCH, "server_side_tool_usage_details/web_search_calls"},
	{FIELD_X_SEARCH, "server_side_tool_usage_details/x_search_calls"},
	{FIELD_FILE_SEARCH, "server_side_tool_usage_details/file_search_calls"},
	{FIELD_CODE_EXECUTION, "server_side_tool_usage_details/code_interpreter_calls"}
};

static const char *const xai_harmless[] = {
	"text_tokens", "*/text_tokens", "*/accepted_prediction_tokens", "*/rejected_prediction_tokens",
	/* the SDK's name of text_tokens */
	"prompt_text_tokens",
	/* the sum of server_side_tool_usage_details; the size of the context */
	"num_server_side_tools_used", "context_details/*",
	/* tools of others cost their tokens alone */
	"server_side_tool_usage_details/mcp_calls",
	NULL
};

/* The SDK lists the tools that xAI ran, one name for each call. */
static bool
count_xai_tools(Reading *r)
{
	static const struct
	{
		const char *name;
		Field		field;
	}			tools[] =
	{
		{"SERVER_SIDE_TOOL_WEB_SEARCH", FIELD_WEB_SEARCH},
		{"SERVER_SIDE_TOOL_X_SEARCH", FIELD_X_SEARCH},
		{"SERVER_SIDE_TOOL_CODE_EXECUTION", FIELD_CODE_EXECUTION},
		{"SERVER_SIDE_TOOL_COLLECTIONS_SEARCH", FIELD_FILE_SEARCH}
	};
	JsonbContainer *list = abp_usage_list(r, r->usage, "server_side_tools_used");

	for (uint32 i = 0; list && i < JsonContainerSize(list); i++)
	{
		JsonbValue *item = getIthJsonbValueFromContainer(list, i);
		int			t = 0;

		CHECK_FOR_INTERRUPTS();
		if (item->type != jbvString)
			continue;
		while (t < lengthof(tools) &&
			   !(strlen(tools[t].name) == item->val.string.len &&
				 memcmp(tools[t].name, item->val.string.val, item->val.string.len) == 0))
			t++;
		if (t == lengthof(tools))
		{
			if (!abp_usage_doubt(r, "server_side_tools_used has %.*s, and what it costs is not known here",
								 Min(item->val.string.len, 60), item->val.string.val))
				return false;
		}
		else if (!abp_usage_add_count(r, &r->count[tools[t].field], 1, "server_side_tools_used"))
			return false;
	}
	return true;
}

static bool
extra_xai(Reading *r)
{
	return count_images(r) && count_xai_tools(r) && count_tool_calls(r);
}

/*
 * xAI: 1 USD = 10^10 ticks.
 */
static bool
cost_xai(Reading *r)
{
	Numeric		ticks = NULL;

	if (!abp_usage_read_amount(r, r->usage, "cost_in_usd_ticks", &ticks))
		return false;
	if (ticks)
		r->cost = numeric_trimmed(numeric_times(ticks, numeric_of_text("0.0000000001")));
	return true;
}

/* xAI counts reasoning beside the completion in Chat Completions only. */
static const UsageFormat xai_responses = {
	.name = "xai",
	RULES(xai_rules),
	GROUPS(openai_groups),
	.harmless = xai_harmless,
	USUAL_STRINGS,
	.extra = extra_xai,
	.cost = cost_xai
};

/* An answer of the Responses API? */
static const UsageFormat *
refine_xai(Reading *r)
{
	if (abp_usage_has(r, r->usage, "input_tokens") &&
		!abp_usage_has(r, r->usage, "prompt_tokens"))
		return &xai_responses;
	return NULL;
}

static const Rule mistral_rules[] = {
	OPENAI_RULES,
	{FIELD_CACHE_READ, "num_cached_tokens"},
	{FIELD_PAGE, "pages_processed"},
	/* Conversations: what its tools put into the prompt, and their calls */
	{FIELD_TOOL_INPUT, "connector_tokens"},
	{FIELD_WEB_SEARCH, "connectors/web_search"}
};

static const Envelope mistral_envelopes[] = {
	{"", "usage"},
	{"", "usage_info"},			/* OCR */
	{"data", "usage"},			/* server-sent event */
	{"response/body", "usage", "batch"}
};

/*
 * Mistral bills audio by the second, and the tokens beside it not at all.
 * Audio's own tokens are in total_tokens only.
 */
static bool
extra_mistral(Reading *r)
{
	if (!abp_usage_read_quantity(r, r->usage, "prompt_audio_seconds", &r->audio_seconds))
		return false;
	if (r->audio_seconds && !abp_usage_is_zero(r->audio_seconds))
		r->count[FIELD_TOTAL].given = false;
	return true;
}

static const char *const litellm_harmless[] = {
	"text_tokens", "*/text_tokens", "*/accepted_prediction_tokens", "*/rejected_prediction_tokens",
	"*/web_fetch_requests", "*/tool_search_requests", "cost_details/*",
	"segments/*", "words/*", "data/*", "x_groq/*",
	/* what else a row of LiteLLM_SpendLogs has where it has no usage object */
	"metadata/*", "proxy_server_request/*", "response/*", "messages/*",
	"request_tags/*", "_hidden_params/*",
	NULL
};

static const Envelope litellm_envelopes[] = {
	{"", "usage"},
	{"response", "usage"},
	{"", "metadata/usage_object"}	/* a row of LiteLLM_SpendLogs */
};

/* LiteLLM's own estimate first, then what the provider has reported. */
static bool
cost_litellm(Reading *r)
{
	static const char *const paths[] = {
		"response_cost", "_hidden_params/response_cost", "spend"
	};

	for (int i = 0; i < lengthof(paths) && r->cost == NULL; i++)
	{
		if (!abp_usage_read_amount(r, r->root, paths[i], &r->cost))
			return false;
	}
	if (r->cost == NULL && !abp_usage_object(r, r->usage, "cost"))
		return abp_usage_read_amount(r, r->usage, "cost", &r->cost);
	return true;
}

/* ----------------------------------------------------------------
 *		All formats
 * ----------------------------------------------------------------
 */

const UsageFormat abp_usage_openai = {
	.name = "openai",
	RULES(openai_rules),
	GROUPS(openai_groups),
	.harmless = openai_harmless,
	ENVELOPES(openai_envelopes),
	.model = {"model", "model_name", "response_metadata/model_name"},
	.generation_id = {"id", "provider_response_id"},
	.service_tier = {"service_tier"},
	.extra = extra_openai,
	.cost = cost_openai,
	.tier = tier_openai
};

const UsageFormat abp_usage_anthropic = {
	.name = "anthropic",
	RULES(anthropic_rules),
	.harmless = anthropic_harmless,
	ENVELOPES(anthropic_envelopes),
	USUAL_STRINGS,
	.cache_excluded = true,
	.output_required = true,
	.extra = extra_anthropic,
	.tier = tier_anthropic
};

const UsageFormat abp_usage_openrouter = {
	.name = "openrouter",
	RULES(openrouter_rules),
	GROUPS(openai_groups),
	.harmless = openrouter_harmless,
	ENVELOPES(openrouter_envelopes),
	USUAL_STRINGS,
	.refine = refine_openrouter,
	.extra = extra_openai_like,
	.cost = cost_openrouter_any
};

const UsageFormat abp_usage_groq = {
	.name = "groq",
	RULES(openai_rules),
	GROUPS(openai_groups),
	.harmless = openai_harmless,
	ENVELOPES(groq_envelopes),
	MODEL_AND_TIER,
	.generation_id = {"id", "x_groq/id"},
	.extra = extra_groq
};

const UsageFormat abp_usage_xai = {
	.name = "xai",
	RULES(xai_rules),
	GROUPS(openai_groups),
	.harmless = xai_harmless,
	ENVELOPES(openai_envelopes),
	USUAL_STRINGS,
	.reasoning = REASONING_BY_TOTAL_SEPARATE,
	.refine = refine_xai,
	.extra = extra_xai,
	.cost = cost_xai
};

const UsageFormat abp_usage_deepseek = {
	.name = "deepseek",
	RULES(openai_rules),
	GROUPS(openai_groups),
	.harmless = openai_harmless,
	ENVELOPES(openai_envelopes),
	USUAL_STRINGS
};

const UsageFormat abp_usage_mistral = {
	.name = "mistral",
	RULES(mistral_rules),
	GROUPS(openai_groups),
	.harmless = openai_harmless,
	ENVELOPES(mistral_envelopes),
	MODEL_AND_TIER,
	.generation_id = {"id", "conversation_id"},
	.extra = extra_mistral
};

const UsageFormat abp_usage_litellm = {
	.name = "litellm",
	RULES(openai_rules),
	GROUPS(openai_groups),
	.harmless = litellm_harmless,
	ENVELOPES(litellm_envelopes),
	MODEL_AND_TIER,
	.generation_id = {"id", "request_id"},
	.extra = extra_openai_like,
	.cost = cost_litellm
};
