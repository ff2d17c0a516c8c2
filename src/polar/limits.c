/*-------------------------------------------------------------------------
 *
 * limits.c
 *	  The names that the extension itself gives to metadata.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "base/text_view.h"
#include "polar/limits.h"

const TextView abp_own_keys[NUM_OWN_KEYS] = {
#define OWN_KEY(name) {name, sizeof(name) - 1}
	OWN_KEY("_cost"),
	OWN_KEY("_llm"),
	OWN_KEY("cache_read_tokens"),
	OWN_KEY("cache_write_1h_tokens"),
	OWN_KEY("cache_write_tokens"),
	OWN_KEY("cost_currency"),
	OWN_KEY("cost_nanos"),
	OWN_KEY("external_id"),
	OWN_KEY("generation_id"),
	OWN_KEY("input_tokens"),
	OWN_KEY("model_id"),
	OWN_KEY("output_tokens"),
	OWN_KEY("provider"),
	OWN_KEY("raw_provider_cost"),
	OWN_KEY("reasoning_tokens"),
	OWN_KEY("request_count"),
	OWN_KEY("sub_provider"),
	OWN_KEY("total_tokens"),
	OWN_KEY("web_search_count")
#undef OWN_KEY
};
