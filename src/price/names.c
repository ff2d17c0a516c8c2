/*-------------------------------------------------------------------------
 *
 * names.c
 *	  Which names in the price table the names in a usage row mean.
 *
 * Providers, gateways and client libraries spell one model in many ways, and
 * catalogues one provider.  The spelling that is given goes first, so that
 * nothing here keeps a price from anyone who has entered it; only where that
 * leads to no card, other spellings are tried, the nearer the earlier.
 *
 * All of this runs once for a name that is not cached, and within a
 * connection to SPI that the caller has made.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <ctype.h>

#include "catalog/pg_type.h"
#include "executor/spi.h"
#include "lib/stringinfo.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "parser/scansup.h"
#include "utils/array.h"
#include "utils/varlena.h"

#include "base/text_view.h"
#include "compat.h"
#include "price/names.h"

/* The most names that one provider has here, with the one that is given. */
#define MAX_PROVIDER_NAMES 20

/* Names longer than this are not compared letter by letter. */
#define MAX_COMPARED 255

/* As many words of them are. */
#define MAX_WORDS 32

/*
 * The names that catalogues (genai-prices first, LiteLLM, models.dev), client
 * libraries and OpenTelemetry give to one provider.  What differs by case, or
 * by "_" for "-", need not be repeated: such names are found at the second
 * attempt.
 */
static const char *const provider_names[][MAX_PROVIDER_NAMES - 1] = {
	{"anthropic", "anthropic.messages"},
	{"aws", "bedrock", "amazon-bedrock", "bedrock_converse", "bedrock-converse", "aws.bedrock", "aws-bedrock"},
	{"azure", "azure-openai", "azure_ai", "azure-ai", "azure_text", "azure-cognitive-services",
	"azure.ai.openai", "azure.ai.inference", "az.ai.openai", "az.ai.inference"},
	{"cloudflare", "cloudflare-workers-ai"},
	{"cohere", "cohere_chat"},
	{"dashscope", "alibaba"},
	{"fireworks", "fireworks_ai", "fireworks-ai"},
	{"github-copilot", "github_copilot"},
	{"google", "gemini", "vertex_ai", "google-vertex", "google-gla", "google_ai_studio", "google-ai-studio",
		"google-vertex-anthropic", "google.generative-ai", "google.vertex", "gcp.gemini", "gcp.vertex_ai",
	"gcp.gen_ai"},
	{"mistral", "mistralai", "mistral_ai"},
	{"moonshotai", "moonshot"},
	{"novita", "novita-ai"},
	{"openai", "openai.responses", "openai.chat", "openai.completion", "openai.embedding", "text-completion-openai"},
	{"together", "togetherai", "together_ai", "together-ai"},
	{"vercel", "vercel_ai_gateway", "vercel-ai-gateway"},
	{"voyageai", "voyage"},
	{"x-ai", "xai", "x_ai"},
	{"zai", "z-ai", "z.ai"}
};

/* A name, and what it may mean. */
typedef struct NameSearch
{
	int			nproviders;
	TextView	providers[MAX_PROVIDER_NAMES];	/* the given one first */
	TextView	model;
	TextView	stripped;		/* model without "provider/"; else model */
	bool		renamed;		/* is it another name than the given one? */
	Snapshot	snapshot;
	TryName		try_name;
	void	   *arg;
} NameSearch;

/*
 * Aliases that may match, best first within a step: exact ones by provider
 * and source, globs by priority first.  (Globs are matched, and their literal
 * length counted, in C.)
 */
#define ALIAS_QUERY \
	"SELECT a.kind OPERATOR(pg_catalog.=) 'glob', a.pattern, a.to_provider," \
	" a.to_model, a.priority" \
	" FROM aibilling.model_alias a LEFT JOIN aibilling.price_source s" \
	" ON s.source OPERATOR(pg_catalog.=) a.source" \
	" WHERE (a.provider OPERATOR(pg_catalog.=) ANY ($1)" \
	" OR a.provider OPERATOR(pg_catalog.=) '*')" \
	" AND (a.kind OPERATOR(pg_catalog.=) 'glob'" \
	" OR a.pattern OPERATOR(pg_catalog.=) $2" \
	" OR a.pattern OPERATOR(pg_catalog.=) $3)" \
	" ORDER BY a.priority DESC, a.provider OPERATOR(pg_catalog.=) '*'," \
	" a.source OPERATOR(pg_catalog.=) 'user' DESC, s.priority NULLS LAST," \
	" a.source, a.pattern"

#define FOLDED_PROVIDER(column) \
	"pg_catalog.translate(pg_catalog.lower(" column "), '_', '-')"

/*
 * The same in any case, and for each name of the provider.  Globs without a
 * capital have been tried by then, unless the name itself was another ($4).
 */
#define FOLDED_ALIAS_QUERY \
	"SELECT a.kind OPERATOR(pg_catalog.=) 'glob', pg_catalog.lower(a.pattern)," \
	" a.to_provider, a.to_model, a.priority" \
	" FROM (SELECT * FROM aibilling.model_alias" \
	" WHERE pg_catalog.lower(pattern) OPERATOR(pg_catalog.=) ANY (ARRAY[$2, $3])" \
	" AND kind OPERATOR(pg_catalog.=) 'exact'" \
	" UNION ALL SELECT * FROM aibilling.model_alias" \
	" WHERE " FOLDED_PROVIDER("provider") " OPERATOR(pg_catalog.=)" \
	" ANY (pg_catalog.array_append($1, '*'))" \
	" AND kind OPERATOR(pg_catalog.=) 'glob'" \
	" AND ($4 OR pattern OPERATOR(pg_catalog.<>) pg_catalog.lower(pattern))) AS a" \
	" LEFT JOIN aibilling.price_source s" \
	" ON s.source OPERATOR(pg_catalog.=) a.source" \
	" WHERE " FOLDED_PROVIDER("a.provider") " OPERATOR(pg_catalog.=)" \
	" ANY (pg_catalog.array_append($1, '*'))" \
	" ORDER BY a.priority DESC," \
	" pg_catalog.array_position($1, " FOLDED_PROVIDER("a.provider") ")," \
	" a.source OPERATOR(pg_catalog.=) 'user' DESC, s.priority NULLS LAST," \
	" a.source, a.pattern"

/* Cards whose names are these in another case. */
#define FOLDED_CARD_QUERY \
	"SELECT p.provider, p.model FROM aibilling.price p" \
	" WHERE " FOLDED_PROVIDER("p.provider") " OPERATOR(pg_catalog.=) ANY ($1)" \
	" AND pg_catalog.lower(p.model) OPERATOR(pg_catalog.=) ANY (ARRAY[$2, $3])" \
	" GROUP BY p.provider, p.model" \
	" ORDER BY pg_catalog.lower(p.model) OPERATOR(pg_catalog.=) $2 DESC," \
	" pg_catalog.array_position($1, " FOLDED_PROVIDER("p.provider") ")," \
	" p.provider, p.model"

/* The models of the providers in $1, and the providers. */
#define MODELS_QUERY \
	"SELECT p.model FROM aibilling.price p" \
	" WHERE p.provider OPERATOR(pg_catalog.=) ANY ($1)" \
	" UNION SELECT a.pattern FROM aibilling.model_alias a" \
	" WHERE a.provider OPERATOR(pg_catalog.=) ANY ($1)" \
	" AND a.kind OPERATOR(pg_catalog.=) 'exact'" \
	" ORDER BY 1"
#define PROVIDERS_QUERY \
	"SELECT DISTINCT p.provider FROM aibilling.price p" \
	" WHERE $1 IS NOT NULL ORDER BY 1"

/* Run a query with the names as its parameters, all of it. */
static void
run_names_query(SPIPlanPtr *plan, const char *query, Datum *values, int nargs,
				Snapshot snapshot)
{
	Oid			types[4] = {TEXTARRAYOID, TEXTOID, TEXTOID, BOOLOID};
	int			result;

	if (*plan == NULL)
	{
		SPIPlanPtr	prepared = SPI_prepare(query, nargs, types);

		if (prepared == NULL)
			elog(ERROR, "SPI_prepare failed: %s", SPI_result_code_string(SPI_result));
		SPI_keepplan(prepared);
		*plan = prepared;
	}

	result = SPI_execute_snapshot(*plan, values, NULL, snapshot,
								  InvalidSnapshot, true, false, 0);
	if (result != SPI_OK_SELECT)
		elog(ERROR, "SPI_execute_snapshot failed: %s",
			 SPI_result_code_string(result));
}

/* An array of type text, palloc'd. */
static Datum
text_array(const TextView *views, int n)
{
	Datum	   *texts = palloc(sizeof(Datum) * n);

	for (int i = 0; i < n; i++)
		texts[i] = text_view_datum(views[i]);
	return PointerGetDatum(construct_array(texts, n, TEXTOID, -1, false, TYPALIGN_INT));
}

/*
 * A text of the current SPI result, which lives as long as the connection: no
 * need to copy.
 */
static TextView
result_text(uint64 row, int column)
{
	bool		isnull;
	Datum		datum = SPI_getbinval(SPI_tuptable->vals[row], SPI_tuptable->tupdesc,
									  column, &isnull);
	TextView	view;
	text	   *value;

	if (isnull)
		elog(ERROR, "unexpected null in column %d of a price query", column);
	value = DatumGetTextPP(datum);
	view.data = VARDATA_ANY(value);
	view.len = VARSIZE_ANY_EXHDR(value);
	return view;
}

/* --- globs ---------------------------------------------------------------- */

/*
 * Does a glob match the whole text?  "*" stands for any characters, "?" for
 * one; everything else for itself.
 */
static bool
glob_matches(TextView glob, TextView text)
{
	int			g = 0;
	int			t = 0;
	int			star = -1;		/* behind the last "*" ... */
	int			star_t = 0;		/* ... and what it has not yet taken */

	while (t < text.len)
	{
		if (g < glob.len && glob.data[g] == '*')
		{
			star = ++g;
			star_t = t;
		}
		else if (g < glob.len && glob.data[g] == '?')
		{
			g++;
			t += pg_mblen(text.data + t);
		}
		else if (g < glob.len && glob.data[g] == text.data[t])
		{
			g++;
			t++;
		}
		else if (star >= 0)
		{
			g = star;
			star_t += pg_mblen(text.data + star_t);
			t = star_t;
		}
		else
			return false;
	}
	while (g < glob.len && glob.data[g] == '*')
		g++;
	return g == glob.len;
}

/* How many bytes of a glob are no wildcards. */
static int
glob_literal_length(TextView glob)
{
	int			length = 0;

	for (int i = 0; i < glob.len; i++)
		length += glob.data[i] != '*' && glob.data[i] != '?';
	return length;
}

/* A spelling that an alias leads to. */
typedef struct AliasTarget
{
	bool		glob;
	TextView	pattern;
	ModelKey	target;
	int32		priority;
	int			literal_length;
	int			position;		/* in the query's order */
} AliasTarget;

/* In the order in which they are tried. */
static int
compare_globs(const void *a, const void *b)
{
	const AliasTarget *left = a;
	const AliasTarget *right = b;

	if (left->priority != right->priority)
		return left->priority > right->priority ? -1 : 1;
	if (left->literal_length != right->literal_length)
		return left->literal_length > right->literal_length ? -1 : 1;
	return left->position - right->position;
}

/* --- one spelling --------------------------------------------------------- */

/* Try the aliases of the current SPI result that are exact and of this name. */
static bool
try_exact_aliases(const NameSearch *search, const AliasTarget *aliases, int naliases,
				  TextView name)
{
	for (int i = 0; i < naliases; i++)
	{
		if (!aliases[i].glob && text_view_equal(aliases[i].pattern, name) &&
			search->try_name(aliases[i].target, search->arg))
			return true;
	}
	return false;
}

/*
 * Try what a name that is no card's means to those of its provider's names
 * that are given, in this order: by an exact alias; without a leading
 * "provider/", as spelt (by try_cards) and by an exact alias; by a glob, the
 * higher priority first, then the longer literal part.  An alias that leads
 * to no card does not count.
 */
static bool
try_aliases(const NameSearch *search, SPIPlanPtr *plan, const char *query, Datum providers,
			bool (*try_cards) (const NameSearch *search, TextView model, Datum providers))
{
	Datum		values[4] = {
		providers, text_view_datum(search->model), text_view_datum(search->stripped),
		BoolGetDatum(search->renamed)
	};
	AliasTarget *aliases;
	AliasTarget *globs;
	int			naliases;
	int			nglobs = 0;

	run_names_query(plan, query, values, 4, search->snapshot);
	naliases = SPI_processed;
	aliases = palloc(sizeof(AliasTarget) * (naliases + 1));
	globs = palloc(sizeof(AliasTarget) * (naliases + 1));
	for (int i = 0; i < naliases; i++)
	{
		AliasTarget *alias = &aliases[i];
		bool		isnull;

		alias->glob = DatumGetBool(SPI_getbinval(SPI_tuptable->vals[i], SPI_tuptable->tupdesc,
												 1, &isnull));
		alias->pattern = result_text(i, 2);
		alias->target.provider = result_text(i, 3);
		alias->target.model = result_text(i, 4);
		alias->priority = DatumGetInt32(SPI_getbinval(SPI_tuptable->vals[i], SPI_tuptable->tupdesc,
													  5, &isnull));
		alias->literal_length = glob_literal_length(alias->pattern);
		alias->position = i;

		if (alias->glob &&
			(glob_matches(alias->pattern, search->model) ||
			 glob_matches(alias->pattern, search->stripped)))
			globs[nglobs++] = *alias;
	}

	if (try_exact_aliases(search, aliases, naliases, search->model))
		return true;
	if (search->stripped.len != search->model.len &&
		(try_cards(search, search->stripped, providers) ||
		 try_exact_aliases(search, aliases, naliases, search->stripped)))
		return true;

	qsort(globs, nglobs, sizeof(AliasTarget), compare_globs);
	for (int i = 0; i < nglobs; i++)
	{
		if (search->try_name(globs[i].target, search->arg))
			return true;
	}
	return false;
}

/* The cards of exactly this name, of the first of the providers that has any. */
static bool
try_exact_cards(const NameSearch *search, TextView model, Datum providers)
{
	for (int i = 0; i < search->nproviders; i++)
	{
		ModelKey	key = {search->providers[i], model};

		if (search->try_name(key, search->arg))
			return true;
	}
	return false;
}

/* Those of this name in any case, of all of the provider's names. */
static bool
try_folded_cards(const NameSearch *search, TextView model, Datum providers)
{
	static SPIPlanPtr plan = NULL;
	Datum		values[3] = {providers, text_view_datum(model), text_view_datum(model)};

	run_names_query(&plan, FOLDED_CARD_QUERY, values, 3, search->snapshot);
	for (uint64 i = 0; i < SPI_processed; i++)
	{
		ModelKey	key = {result_text(i, 1), result_text(i, 2)};

		/* The first is the best, and there are rows of it. */
		if (search->try_name(key, search->arg))
			return true;
	}
	return false;
}

/* --- other spellings ------------------------------------------------------ */

/* Does a text begin with another, and go on after it? */
static bool
has_prefix(TextView text, TextView prefix)
{
	return text.len > prefix.len && memcmp(text.data, prefix.data, prefix.len) == 0;
}

/* The model without a leading "provider/", if one of these names it. */
static TextView
without_provider(TextView model, const TextView *providers, int nproviders)
{
	for (int i = 0; i < nproviders; i++)
	{
		TextView	provider = providers[i];

		if (provider.len > 0 && has_prefix(model, provider) &&
			model.data[provider.len] == '/')
		{
			model.data += provider.len + 1;
			model.len -= provider.len + 1;
			break;
		}
	}
	return model;
}

/*
 * A name as it is compared where its exact spelling has found nothing: in
 * lower case (of ASCII's letters, as the tables' collation has it), without
 * white space around it.  palloc'd.
 */
TextView
abp_names_fold(TextView name)
{
	TextView	folded;
	char	   *data;

	while (name.len > 0 && scanner_isspace(name.data[0]))
	{
		name.data++;
		name.len--;
	}
	while (name.len > 0 && scanner_isspace(name.data[name.len - 1]))
		name.len--;

	data = palloc(name.len + 1);
	for (int i = 0; i < name.len; i++)
		data[i] = pg_ascii_tolower((unsigned char) name.data[i]);
	data[name.len] = '\0';
	folded.data = data;
	folded.len = name.len;
	return folded;
}

/* A provider's name likewise, where "_" is also written "-". */
static TextView
fold_provider(TextView name)
{
	TextView	folded = abp_names_fold(name);

	for (int i = 0; i < folded.len; i++)
	{
		if (folded.data[i] == '_')
			unconstify(char *, folded.data)[i] = '-';
	}
	return folded;
}

/*
 * A model's name likewise, without the path that Google's interfaces put
 * before it: "models/", "publishers/PUBLISHER/models/", the latter in a
 * project's location or not.  (Other paths name what is somebody's own.)
 */
static TextView
fold_model(TextView name)
{
	static const TextView models = {"models/", 7};
	static const TextView inner = {"/models/", 8};
	static const TextView publishers = {"publishers/", 11};
	TextView	folded = abp_names_fold(name);
	const char *publisher = folded.data;
	const char *rest;

	if (has_prefix(folded, models))
		rest = folded.data + models.len;
	else
	{
		if (strncmp(folded.data, "projects/", 9) == 0)
			publisher = strstr(folded.data, "/publishers/");
		if (publisher != NULL && *publisher == '/')
			publisher++;
		if (publisher == NULL || strncmp(publisher, publishers.data, publishers.len) != 0)
			return folded;
		rest = strstr(publisher + publishers.len, inner.data);
		if (rest == NULL || memchr(publisher + publishers.len, '/', rest - publisher - publishers.len) != NULL)
			return folded;
		rest += inner.len;
	}
	if (*rest != '\0')
	{
		folded.len -= rest - folded.data;
		folded.data = rest;
	}
	return folded;
}

/*
 * The names of a provider: the given one first, then what else it is called.
 * Returns how many.
 */
static int
provider_synonyms(TextView given, TextView *names)
{
	TextView	folded = fold_provider(given);
	int			n = 0;

	names[n++] = given;
	for (int i = 0; i < lengthof(provider_names); i++)
	{
		const char *const *group = provider_names[i];
		bool		member = false;

		for (int j = 0; j < MAX_PROVIDER_NAMES - 1 && group[j] != NULL && !member; j++)
		{
			TextView	name = text_view_of(group[j]);

			member = text_view_equal(fold_provider(name), folded);
		}
		if (!member)
			continue;

		for (int j = 0; j < MAX_PROVIDER_NAMES - 1 && group[j] != NULL; j++)
		{
			TextView	name = text_view_of(group[j]);

			if (!text_view_equal(name, given))
				names[n++] = name;
		}
		break;
	}
	return n;
}

/* The same, as they are compared where the exact spelling finds nothing. */
static int
folded_synonyms(TextView given, TextView *names)
{
	int			n = provider_synonyms(given, names);

	for (int i = 0; i < n; i++)
		names[i] = fold_provider(names[i]);
	return n;
}

/*
 * Try what (provider, model) may mean until try_name returns true: as spelt
 * (see try_aliases); as spelt, by another name of the provider; in any case,
 * trimmed and without a path.  Nothing else is stripped: regions and dates
 * are part of a model's price.  Returns whether something was found.
 */
bool
abp_names_find(ModelKey key, Snapshot snapshot, TryName try_name, void *arg)
{
	static SPIPlanPtr alias_plan = NULL;
	static SPIPlanPtr folded_plan = NULL;
	NameSearch	search = {
		.nproviders = 1,
		.providers = {key.provider},
		.model = key.model,
		.snapshot = snapshot,
		.try_name = try_name,
		.arg = arg
	};
	TextView	names[MAX_PROVIDER_NAMES];
	int			nnames;
	Datum		providers;

	/* Most names are those of a card: look no further then. */
	if (try_name(key, arg))
		return true;

	search.stripped = without_provider(key.model, &key.provider, 1);
	if (try_aliases(&search, &alias_plan, ALIAS_QUERY, text_array(&key.provider, 1),
					try_exact_cards))
		return true;

	nnames = provider_synonyms(key.provider, names);
	if (nnames > 1)
	{
		search.nproviders = nnames - 1;
		memcpy(search.providers, names + 1, sizeof(TextView) * (nnames - 1));
		search.stripped = without_provider(key.model, names, nnames);
		providers = text_array(search.providers, search.nproviders);
		if (try_exact_cards(&search, search.model, providers) ||
			try_aliases(&search, &alias_plan, ALIAS_QUERY, providers, try_exact_cards))
			return true;
	}

	search.nproviders = folded_synonyms(key.provider, search.providers);
	search.model = fold_model(key.model);
	search.renamed = !text_view_equal(search.model, key.model) ||
		!text_view_equal(search.providers[0], key.provider);
	search.stripped = without_provider(search.model, search.providers, search.nproviders);
	providers = text_array(search.providers, search.nproviders);
	return try_folded_cards(&search, search.model, providers) ||
		try_aliases(&search, &folded_plan, FOLDED_ALIAS_QUERY, providers, try_folded_cards);
}

/* --- names that are near -------------------------------------------------- */

static int
compare_words(const void *a, const void *b)
{
	return strcmp(*(char *const *) a, *(char *const *) b);
}

/* The words and numbers of a name in the order of the alphabet, palloc'd. */
static char *
sorted_words(TextView name)
{
	char	   *words[MAX_WORDS];
	int			nwords = 0;
	char	   *copy = pnstrdup(name.data, name.len);
	bool		in_word = false;
	StringInfoData sorted;

	for (char *p = copy; *p != '\0'; p++)
	{
		if (!isalnum((unsigned char) *p) && !IS_HIGHBIT_SET(*p))
		{
			*p = '\0';
			in_word = false;
		}
		else if (!in_word && nwords < MAX_WORDS)
		{
			words[nwords++] = p;
			in_word = true;
		}
	}
	qsort(words, nwords, sizeof(char *), compare_words);

	initStringInfo(&sorted);
	for (int i = 0; i < nwords; i++)
		appendStringInfo(&sorted, "%s-", words[i]);
	pfree(copy);
	return sorted.data;
}

/*
 * The nearest name of those in the current SPI result, or data == NULL.  One
 * of the same words in another order is: claude-4.5-sonnet.  Else a third of
 * its letters may differ, two that are swapped in a short one, and four at
 * most.
 */
static TextView
closest_name(TextView name)
{
	TextView	closest = {NULL, 0};
	TextView	folded = abp_names_fold(name);
	char	   *words = sorted_words(folded);
	int			limit = Min(4, (folded.len + 1) / 3);

	if (folded.len > MAX_COMPARED)
		return closest;
	for (uint64 i = 0; i < SPI_processed && limit > 0; i++)
	{
		TextView	candidate = result_text(i, 1);
		TextView	other;
		int			distance;

		CHECK_FOR_INTERRUPTS();

		if (candidate.len > MAX_COMPARED || abs(candidate.len - folded.len) > 4 * limit)
			continue;
		other = abp_names_fold(candidate);
		if (other.len == folded.len && strcmp(sorted_words(other), words) == 0)
			return candidate;
		distance = varstr_levenshtein_less_equal(folded.data, folded.len, other.data, other.len,
												 1, 1, 1, limit, true);
		if (distance > limit)
			continue;
		if (closest.data == NULL || distance < limit)
			closest = candidate;
		limit = distance;
	}
	return closest;
}

/*
 * What a (provider, model) without a price may have been meant to be, in words
 * such as 'model "gpt-5"', palloc'd; NULL if no name is near.  Reads the names
 * of all prices of the provider, so call it rarely.
 */
char	   *
abp_names_similar(ModelKey key, Snapshot snapshot)
{
	static SPIPlanPtr models_plan = NULL;
	static SPIPlanPtr providers_plan = NULL;
	TextView	providers[MAX_PROVIDER_NAMES];
	int			nproviders = provider_synonyms(key.provider, providers);
	Datum		value = text_array(providers, nproviders);
	TextView	closest;
	const char *what;

	if (key.provider.len == 0 || key.model.len == 0)
		return NULL;

	run_names_query(&models_plan, MODELS_QUERY, &value, 1, snapshot);
	if (SPI_processed > 0)
	{
		TextView	model = fold_model(key.model);

		what = "model";
		closest = closest_name(without_provider(model, providers, nproviders));
	}
	else
	{
		what = "provider";
		run_names_query(&providers_plan, PROVIDERS_QUERY, &value, 1, snapshot);
		closest = closest_name(key.provider);
	}
	return closest.data == NULL ? NULL :
		psprintf("%s \"%.*s\"", what, closest.len, closest.data);
}
