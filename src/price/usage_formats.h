/*-------------------------------------------------------------------------
 *
 * usage_formats.h
 *	  What a provider's usage object looks like, and how one is read.
 *
 * Shared by the engine (normalize.c, usage_object.c) and the descriptions of
 * the formats (usage_formats.c, usage_frameworks.c) alone.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_USAGE_FORMATS_H
#define ABP_USAGE_FORMATS_H

#include "postgres.h"

#include "lib/stringinfo.h"

#include "price/cost.h"

/*
 * The quantities a usage object can name.  A path's value is read into one of
 * these; the engine turns them into our columns.
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
	FIELD_REQUESTS,				/* calls that the object sums up */
	FIELD_CITATION,
	FIELD_WEB_SEARCH,
	FIELD_X_SEARCH,
	FIELD_FILE_SEARCH,
	FIELD_MAPS,
	FIELD_CODE_EXECUTION,
	FIELD_SEARCH_MEDIUM,		/* requests with more than the low search
								 * context */
	FIELD_SEARCH_HIGH,
	FIELD_SESSION,
	FIELD_IMAGE,
	FIELD_PAGE,
	FIELD_QUERY,
	FIELD_CHARACTER
} Field;

#define NUM_FIELDS (FIELD_CHARACTER + 1)

/* A count that a format does not report has given = false. */
typedef struct Count
{
	int64		value;
	bool		given;
	const char *name;			/* path it was read from, for messages */
} Count;

/* Path of keys, separated by '/' because OpenTelemetry's keys contain dots. */
typedef struct Rule
{
	Field		field;
	const char *path;
} Rule;

/* Rules for what is in any of some objects, such as prompt_tokens_details. */
typedef struct RuleGroup
{
	const char *const *places;	/* NULL ends them */
	const Rule *rules;
	int			nrules;
} RuleGroup;

/* Where a whole response keeps its usage object. */
typedef struct Envelope
{
	const char *root;			/* "" is the object handed over */
	const char *usage;			/* from root; "" is the root itself */
	const char *tier;			/* the tier that this place tells, or NULL */
	const char *beside;			/* a key that must be there, too, or NULL */
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

typedef struct Reading Reading;

/* For descriptions: a table and its length. */
#define RULES(array) .rules = (array), .nrules = lengthof(array)
#define GROUPS(array) .groups = (array), .ngroups = lengthof(array)
#define ENVELOPES(array) .envelopes = (array), .nenvelopes = lengthof(array)

#define MAX_PATHS 6

/* Longer paths are cut in messages. */
#define MAX_PATH_BYTES 200

/*
 * One format.  All lists of texts end with NULL.
 *
 * harmless: paths of numbers that cost nothing of their own, although no rule
 * reads them: repetitions and breakdowns of what is counted, and measures.
 * From the usage object, or from the root for what stands beside it; a '*'
 * stands for any characters.
 */
typedef struct UsageFormat
{
	const char *name;
	const Rule *rules;			/* several for one field: the first above 0 */
	int			nrules;
	const RuleGroup *groups;	/* read after the rules */
	int			ngroups;
	const char *const *harmless;
	const char *const *beside;	/* objects of the root in which charges may
								 * stand among other things */
	const char *const *scope;	/* words that a key of the usage object must
								 * have to count as one; NULL: all keys do */
	const Envelope *envelopes;
	int			nenvelopes;
	const char *model[MAX_PATHS];	/* from root */
	const char *generation_id[MAX_PATHS];	/* from root */
	const char *service_tier[MAX_PATHS];	/* from usage, then from root */
	bool		cache_excluded; /* the input total leaves out cached tokens */
	bool		output_required;
	ReasoningMode reasoning;
	/* another description that fits the shape found better, or NULL */
	const struct UsageFormat *(*refine) (Reading *r);
	/* what paths cannot say: lists, counts of items */
	bool		(*extra) (Reading *r);
	/* the cost in USD as reported */
	bool		(*cost) (Reading *r);
	/* a tier that is told in another way than by a tier's name, or NULL */
	const char *(*tier) (Reading *r);
} UsageFormat;

/*
 * A usage object being read.  Everything that is palloc'd for it lives in the
 * memory context of the call.
 */
struct Reading
{
	const UsageFormat *format;
	TextView	model;			/* the row's, .data == NULL if not known */
	JsonbContainer *top;		/* what was handed over */
	JsonbContainer *root;		/* the whole response */
	JsonbContainer *usage;		/* the usage object in it, or root itself */
	const char *tier;			/* the tier that the place of usage tells */
	bool		other_case;		/* keys are in the case that is not the
								 * format's own */
	bool		cost_given;		/* the caller knows the cost */
	bool		nested;			/* count is in our nesting already */
	Count		count[NUM_FIELDS];
	Count		reported[NUM_FIELDS];	/* count as it was read */
	const Count *repeated[2];	/* counts of other objects that this one may
								 * repeat, or NULL */
	Numeric		audio_seconds;	/* or NULL */
	Numeric		cost;			/* USD, or NULL */
	const char *base;			/* the bytes handed over */
	Size		size;
	uint8	   *seen;			/* a bit for each of them: was the value that
								 * starts there read? */
	StringInfo	reason;			/* why it is refused */
	StringInfo	doubt;			/* what is wrong although the cost is known */
};

/* usage_openai.c, usage_frameworks.c */
extern const UsageFormat abp_usage_openai;
extern const UsageFormat abp_usage_anthropic;
extern const UsageFormat abp_usage_openrouter;
extern const UsageFormat abp_usage_groq;
extern const UsageFormat abp_usage_xai;
extern const UsageFormat abp_usage_deepseek;
extern const UsageFormat abp_usage_mistral;
extern const UsageFormat abp_usage_litellm;
extern const UsageFormat abp_usage_ai_sdk;
extern const UsageFormat abp_usage_otel;

/* usage_formats.c */
extern const UsageFormat *const *abp_usage_formats(int *nformats);
extern const UsageFormat *abp_usage_format(const char *name);
extern bool abp_usage_count_grounding(Reading *r, JsonbContainer *grounding);

/* normalize.c */
extern bool abp_usage_read_inner(Reading *r, const UsageFormat *format,
								 JsonbContainer *object, Reading *inner);

/*
 * usage_object.c: where it is not a question, a function that returns bool
 * returns false if the object is refused.
 */
extern bool abp_usage_refuse(Reading *r, const char *fmt,...) pg_attribute_printf(2, 3);
extern bool abp_usage_doubt(Reading *r, const char *fmt,...) pg_attribute_printf(2, 3);
extern bool abp_usage_cost_known(const Reading *r);
extern char *abp_usage_path_name(const char *path);
extern JsonbContainer *abp_usage_container(Reading *r, JsonbContainer *container,
										   const char *path);
extern JsonbContainer *abp_usage_object(Reading *r, JsonbContainer *container,
										const char *path);
extern JsonbContainer *abp_usage_list(Reading *r, JsonbContainer *container,
									  const char *path);
extern JsonbContainer *abp_usage_only_list(Reading *r, JsonbContainer *container,
										   const char *path, bool *go_on);
extern JsonbContainer *abp_usage_list_item(JsonbContainer *list, uint32 i);
extern char *abp_usage_string(Reading *r, JsonbContainer *container,
							  const char *path);
extern char *abp_usage_first_string(Reading *r, JsonbContainer *container,
									const char *const *paths);
extern bool abp_usage_string_is(Reading *r, JsonbContainer *container,
								const char *path, const char *str);
extern bool abp_usage_has(Reading *r, JsonbContainer *container, const char *path);
extern bool abp_usage_model_has(Reading *r, const char *part);
extern bool abp_usage_read_count(Reading *r, JsonbContainer *container,
								 const char *path, Count *count);
extern bool abp_usage_read_counts(Reading *r, JsonbContainer *usage, Count *count);
extern bool abp_usage_add_count(Reading *r, Count *count, int64 value,
								const char *name);
extern bool abp_usage_read_quantity(Reading *r, JsonbContainer *container,
									const char *path, Numeric *quantity);
extern bool abp_usage_read_amount(Reading *r, JsonbContainer *container,
								  const char *path, Numeric *amount);
extern bool abp_usage_read_flag(Reading *r, JsonbContainer *container,
								const char *path, bool *flag);
extern bool abp_usage_is_zero(Numeric number);
extern void abp_usage_mark_seen(Reading *r, const void *value);
extern char *abp_usage_value_text(const JsonbValue *value);
extern bool abp_usage_is_decimal(const char *str, int len);
extern Numeric abp_usage_decimal(const char *str, int len);
extern const char *abp_usage_whole_number(Numeric number, int64 *value);
extern bool abp_usage_attribute(JsonbContainer *item, JsonbValue *name,
								JsonbValue *found, JsonbContainer **place);
extern bool abp_usage_is_seen(const Reading *r, const void *value);

/* usage_rest.c */
extern bool abp_usage_check_rest(Reading *r);

#endif							/* ABP_USAGE_FORMATS_H */
