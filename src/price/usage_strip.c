/*-------------------------------------------------------------------------
 *
 * usage_strip.c
 *	  What is left of a provider's reply when only its usage is kept.
 *
 * A reply holds prompts, answers, images and what an application has put
 * beside them.  Nothing of that can be told from usage by what it looks like,
 * so it is the other way round: what usage is called is kept, the rest goes.
 * doc/privacy.md lists the names; whoever changes them here changes them there.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "miscadmin.h"
#include "utils/builtins.h"

#include "price/normalize.h"

/* Longer names and ids than this are none. */
#define MAX_NAME_BYTES 128

/* Keys are compared by their small letters and digits alone: modelId is model_id. */
#define MAX_KEY_BYTES 64

/* Numbers, and objects with all their numbers, under keys with one of these parts. */
static const char *const usage_parts[] = {
	"usage", "token", "cost", "spend", "billed", "seconds", "duration", "searches", "requests", "characters", "pages", NULL
};

/* Short words without a blank under these keys. */
static const char *const name_keys[] = {
	"id", "responseid", "requestid", "generationid", "messageid", "model", "modelid", "modelname", "modelversion",
	"responsemodel", "provider", "type", "object", "servicetier", "traffictype", "modality", "currency",
	"finishreason", "stopreason", "speed", "inferencegeo", NULL
};

/* A key as it is compared: cut, which no name here is, if it is long. */
static void
fold_key(const JsonbValue *key, char *folded)
{
	int			len = 0;

	for (int i = 0; i < key->val.string.len && len < MAX_KEY_BYTES - 1; i++)
	{
		char		c = pg_ascii_tolower((unsigned char) key->val.string.val[i]);

		if ((c >= 'a' && c <= 'z') || (c >= '0' && c <= '9'))
			folded[len++] = c;
	}
	folded[len] = '\0';
}

/* May the value of a key be usage?  By parts of its name. */
static bool
is_usage_key(const char *folded)
{
	for (int i = 0; usage_parts[i] != NULL; i++)
	{
		if (strstr(folded, usage_parts[i]) != NULL)
			return true;
	}
	return false;
}

/* Is the value of a key a name that pricing reads: a model, a tier, an id? */
static bool
is_name_key(const char *folded)
{
	/* "gen_ai.response.model" and its like end in what they are */
	const size_t len = strlen(folded);

	for (int i = 0; name_keys[i] != NULL; i++)
	{
		size_t		name_len = strlen(name_keys[i]);

		if (strcmp(folded, name_keys[i]) == 0 ||
			(strncmp(folded, "genai", 5) == 0 && len > name_len &&
			 strcmp(folded + len - name_len, name_keys[i]) == 0))
			return true;
	}
	return false;
}

/* Is a string a name or a number rather than something that was said? */
static bool
is_name(const JsonbValue *value, const char *folded, bool in_usage)
{
	const char *text = value->val.string.val;
	int			len = value->val.string.len;
	bool		decimal = len > 0;

	if (len > MAX_NAME_BYTES)
		return false;
	for (int i = 0; i < len; i++)
	{
		if ((unsigned char) text[i] <= ' ')
			return false;
		decimal &= strchr("0123456789.+-eE", text[i]) != NULL;
	}
	return is_name_key(folded) || (decimal && (in_usage || is_usage_key(folded)));
}

/* Is a value kept under this key?  A container always is: it is looked into. */
static bool
is_kept(const JsonbValue *value, const char *folded, bool in_usage)
{
	switch (value->type)
	{
		case jbvBinary:
			return true;
		case jbvString:
			return is_name(value, folded, in_usage);
		default:
			return in_usage || is_usage_key(folded);
	}
}

/*
 * Push what is kept of an object or a list.  in_usage: all of its numbers are
 * usage.
 */
static void
strip_container(JsonbParseState **state, JsonbContainer *container, bool in_usage,
				JsonbValue **result)
{
	JsonbIterator *it = JsonbIteratorInit(container);
	JsonbIteratorToken token;
	JsonbValue	value;
	JsonbValue	key;
	char		folded[MAX_KEY_BYTES] = "";

	check_stack_depth();
	CHECK_FOR_INTERRUPTS();

	while ((token = JsonbIteratorNext(&it, &value, true)) != WJB_DONE)
	{
		switch (token)
		{
			case WJB_KEY:
				key = value;
				fold_key(&key, folded);
				continue;
			case WJB_VALUE:
				if (!is_kept(&value, folded, in_usage))
					continue;
				(void) pushJsonbValue(state, WJB_KEY, &key);
				break;
			case WJB_ELEM:
				/* what a list has no names for is a vector, or text */
				if (value.type != jbvBinary)
					continue;
				break;
			default:
				*result = pushJsonbValue(state, token, NULL);
				continue;
		}
		if (value.type == jbvBinary)
			strip_container(state, value.val.binary.data,
							in_usage || (token == WJB_VALUE && is_usage_key(folded)), result);
		else
			(void) pushJsonbValue(state, token, &value);
	}
}

static bool
same_string(const char *a, const char *b)
{
	return (a == NULL || b == NULL) ? a == b : strcmp(a, b) == 0;
}

/* Are two values equal by their type's function, or both NULL? */
static bool
same_datum(Datum a, Datum b, bool a_is_null, bool b_is_null, PGFunction equal)
{
	return (a_is_null || b_is_null) ? a_is_null == b_is_null :
		DatumGetBool(DirectFunctionCall2(equal, a, b));
}

/* Do two readings say the same? */
static bool
same_usage(const NormalizedUsage *a, const NormalizedUsage *b)
{
	for (int i = 0; i < NUM_USAGE_COUNTS; i++)
	{
		if (a->counts.given[i] != b->counts.given[i] || a->counts.value[i] != b->counts.value[i])
			return false;
	}
	return same_datum(JsonbPGetDatum(a->counts.units), JsonbPGetDatum(b->counts.units),
					  a->counts.units == NULL, b->counts.units == NULL, jsonb_eq) &&
		same_datum(NumericGetDatum(a->provider_cost), NumericGetDatum(b->provider_cost),
				   a->provider_cost == NULL, b->provider_cost == NULL, numeric_eq) &&
		same_string(a->service_tier, b->service_tier) && same_string(a->model, b->model) &&
		same_string(a->generation_id, b->generation_id) && same_string(a->doubt, b->doubt);
}

/* What is kept of a reply; all_numbers: also what is not known to be usage. */
static Jsonb *
strip(Jsonb *raw, bool all_numbers)
{
	JsonbParseState *state = NULL;
	JsonbValue *result = NULL;

	strip_container(&state, &raw->root, all_numbers, &result);
	return JsonbValueToJsonb(result);
}

/*
 * abp_usage_strip
 *		What is kept of a reply, palloc'd, or NULL: nothing.
 *
 * What is kept is read as the whole was.  Where that is not so, nothing is kept:
 * the row has its counts already, and is never billed by less than they say.
 *
 * What is kept of a reply that cannot be read cannot be read either, or the
 * number that nothing reads would be lost with it: then all numbers stay, and
 * if that does not help, no more than that it was refused.  All numbers stay of one
 * in an unknown format, too: it can be read when somebody has named it.
 */
Jsonb	   *
abp_usage_strip(TextView format, Jsonb *raw, const UsageCall *call)
{
	JsonbValue	refused = {.type = jbvString};
	NormalizedUsage whole;
	NormalizedUsage kept;
	StringInfoData reason;
	Jsonb	   *stripped;

	if (JB_ROOT_IS_SCALAR(raw))
		return NULL;
	if (!abp_normalize_knows_format(format))
		return strip(raw, true);
	initStringInfo(&reason);
	stripped = strip(raw, false);
	if (abp_normalize_usage(format, raw, call, &whole, &reason))
		return abp_normalize_usage(format, stripped, call, &kept, &reason) &&
			same_usage(&whole, &kept) ? stripped : NULL;

	for (int i = 0; i < 2; i++)
	{
		if (!abp_normalize_usage(format, stripped, call, &kept, &reason))
			return stripped;
		stripped = strip(raw, true);
	}
	refused.val.string.val = "refused";
	refused.val.string.len = strlen("refused");
	return JsonbValueToJsonb(&refused);
}
