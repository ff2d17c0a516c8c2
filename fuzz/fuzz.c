/*-------------------------------------------------------------------------
 *
 * fuzz.c
 *	  What strangers' bytes reach, called with any bytes: the judge of answers,
 *	  the normaliser of usage objects, the validator of options.
 *
 * A module for tests only; dev/fuzz links it with the extension's own objects
 * and loads it into a single-user backend, so that everything the code under
 * test calls is PostgreSQL itself.  With ABP_FUZZ_DRIVER it carries libFuzzer,
 * which then runs inside of the backend and sees the coverage of our objects;
 * without, it calls each file of a corpus once.
 *
 * A target aborts the backend where it finds what must not be: an error that
 * is not among those it may raise, or a result that contradicts itself.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <dirent.h>
#include <sys/stat.h>

#include "access/reloptions.h"
#include "catalog/pg_foreign_server.h"
#include "catalog/pg_type.h"
#include "catalog/pg_user_mapping.h"
#include "fmgr.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "storage/fd.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/jsonb.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "compat.h"
#include "price/normalize.h"
#include "polar/verdict.h"
#include "polar/server.h"

/* An answer may be longer than this, but nothing new is found there. */
#define MAX_INPUT_BYTES	65536

#define MUST(condition) \
	((condition) ? (void) 0 : contradiction(#condition, __LINE__))

typedef void (*Target) (const char *data, size_t size);

static Target target;
static MemoryContext input_context;

extern Datum aibilling_polar_fdw_validator(PG_FUNCTION_ARGS);

PG_FUNCTION_INFO_V1(abp_fuzz);

/* Ends the process in the way that libFuzzer keeps the input of. */
static void
contradiction(const char *condition, int line)
{
	fprintf(stderr, "fuzz.c:%d: not so: %s\n", line, condition);
	abort();
}

/* Splits the first line off: its copy, zero-terminated; data and size become the rest. */
static char *
first_line(const char **data, size_t *size)
{
	const char *end = memchr(*data, '\n', *size);
	size_t		len = end ? end - *data : *size;
	char	   *line = pnstrdup(*data, len);

	*data += end ? len + 1 : len;
	*size -= end ? len + 1 : len;
	return line;
}

/* Text that goes into tables and messages. */
static void
must_be_text(const char *text)
{
	MUST(text != NULL && text[0] != '\0');
	MUST(pg_verify_mbstr(PG_UTF8, text, strlen(text), true));
}

/*
 * "STATUS EVENTS TRUNCATED RETRY-AFTER" and the body.  The body is handed over
 * in a block of its own size, without a byte behind it.
 */
static void
fuzz_judge(const char *data, size_t size)
{
	char	   *line = first_line(&data, &size);
	char	   *end;
	long		status = strtol(line, &end, 10);
	long		given = strtol(end, &end, 10);
	int			nevents = Min(Max(given, 0), 10000);
	bool		truncated = strtol(end, &end, 10) != 0;
	char	   *retry_after = *end == ' ' ? end + 1 : NULL;
	char	   *body = size > 0 ? memcpy(malloc(size), data, size) : NULL;
	Verdict    *verdict;

	verdict = abp_verdict_of(status, body, size, truncated, retry_after,
							  nevents, (TimestampTz) 800000000 * USECS_PER_SEC);
	free(body);
	MUST((verdict->kind == VERDICT_DELIVERED) == (verdict->error == NULL));
	if (verdict->kind == VERDICT_DELIVERED)
	{
		MUST(status == 200 && !truncated);
		MUST(verdict->inserted >= 0 && verdict->duplicates >= 0);
		MUST(verdict->inserted <= nevents && verdict->duplicates <= nevents);
		MUST(verdict->inserted + verdict->duplicates == nevents);
	}
	else
		must_be_text(verdict->error);
	MUST((verdict->kind == VERDICT_ROWS_REFUSED) == (verdict->nrefused > 0));
	for (int i = 0; i < verdict->nrefused; i++)
	{
		MUST(verdict->refused[i].index > (i > 0 ? verdict->refused[i - 1].index : -1));
		MUST(verdict->refused[i].index < nevents);
		must_be_text(verdict->refused[i].reason);
	}
	MUST(verdict->retry_after_ms >= -1);
}

/* Has a text one of these parts?  Letters' case does not matter. */
static bool
has_part(const char *text, const char *const *parts)
{
	for (int i = 0; parts[i]; i++)
	{
		for (const char *p = text; *p; p++)
		{
			if (pg_strncasecmp(p, parts[i], strlen(parts[i])) == 0)
				return true;
		}
	}
	return false;
}

/*
 * May a count under this key, in an object under that one, cost something of
 * its own?  Said anew here, and more narrowly than in src/: only what is
 * surely a count of what is sold.
 */
static bool
may_cost(const char *format, const char *parent, const char *key)
{
	static const char *const counts[] = {"tokens", "tokencount", "requests", NULL};
	static const char *const usage[] = {"usage", "token", NULL};
	static const char *const free[] = {
		/* breakdowns, settings, measures */
		"text", "prediction", "max", "min", "per", "limit", "budget", "rate", "time",
		"ratio", "score", "speed", "window", "remaining", "latency", "status", "delay",
		"version", "reset", "id", "at", "ms", "ns", "index", "code", "percent", "seed",
		"bytes", "logprob", "throughput", "elapsed", "ttft", "ttl", "tps", "confidence",
		"created", "probability", "fetch", "tool_search", "toolSearch", NULL
	};
	static const char *const elsewhere[] = {
		"iterations", "context_details", "contextDetails", "data", "metadata",
		"response", "messages", "segments", "words", "x_groq", "xGroq", "cost",
		"tags", "proxy", "hidden", "grounding", "contextManagement", "billable",
		"provider_responses", "providerResponses", "gateway", "openrouter", NULL
	};

	if (!has_part(key, counts) || has_part(key, free) || has_part(parent, elsewhere) ||
		strcmp(parent, "details") == 0 || strstr(key, ".details.") != NULL)
		return false;
	/* a span has attributes of all kinds */
	if (strcmp(format, "otel") == 0 && !has_part(key, usage))
		return false;
	if (strcmp(format, "cohere") == 0)
		return strcmp(parent, "billed_units") == 0;
	/* audio's own tokens are in Mistral's total alone */
	return strcmp(format, "mistral") != 0 || !has_part(key, (const char *const[]) {"total", NULL});
}

/*
 * The object inside of a response of its format, with the n-th of the numbers
 * that may cost something made larger; NULL if there are not so many.
 */
static Jsonb *
with_larger_number(const char *format, Jsonb *raw, int n)
{
	JsonbIterator *it = JsonbIteratorInit(&raw->root);
	JsonbParseState *state = NULL;
	JsonbIteratorToken token;
	JsonbValue	v;
	JsonbValue *result = NULL;
	char	   *keys[64] = {""};
	int			depth = 0;
	int			lists = 0;
	bool		found = n < 0;

	v.type = jbvString;
	v.val.string.val = strcmp(format, "otel") == 0 ? "attributes" : "usage";
	v.val.string.len = strlen(v.val.string.val);
	pushJsonbValue(&state, WJB_BEGIN_OBJECT, NULL);
	pushJsonbValue(&state, WJB_KEY, &v);
	while ((token = JsonbIteratorNext(&it, &v, false)) != WJB_DONE)
	{
		if (token == WJB_BEGIN_OBJECT || token == WJB_BEGIN_ARRAY)
		{
			if (++depth >= lengthof(keys))
				return NULL;
			keys[depth] = "";
		}
		lists += token == WJB_BEGIN_ARRAY;
		if (token == WJB_KEY)
			keys[depth] = pnstrdup(v.val.string.val, v.val.string.len);
		if (token == WJB_VALUE && v.type == jbvNumeric && lists == 0 &&
			may_cost(format, keys[depth - 1], keys[depth]) && n-- == 0)
		{
			v.val.numeric = DatumGetNumeric(DirectFunctionCall2(numeric_add,
																NumericGetDatum(v.val.numeric),
																NumericGetDatum(int64_to_numeric(1000003))));
			found = true;
		}
		result = pushJsonbValue(&state, token, token < WJB_BEGIN_ARRAY ? &v : NULL);
		depth -= token == WJB_END_OBJECT || token == WJB_END_ARRAY;
		lists -= token == WJB_END_ARRAY;
	}
	result = pushJsonbValue(&state, WJB_END_OBJECT, NULL);
	return found ? JsonbValueToJsonb(result) : NULL;
}

/* All of a result that is priced, as text. */
static char *
result_text(const NormalizedUsage *usage)
{
	StringInfoData text;

	initStringInfo(&text);
	for (int i = 0; i < NUM_USAGE_COUNTS; i++)
		appendStringInfo(&text, "%d " INT64_FORMAT " ", usage->counts.given[i],
						 usage->counts.value[i]);
	if (usage->counts.units)
		JsonbToCString(&text, &usage->counts.units->root, VARSIZE(usage->counts.units));
	return text.data;
}

/*
 * Of a usage object that is read, a number that may cost something and is
 * made larger changes the result, or has the object refused.
 */
static void
numbers_matter(const char *name, TextView format, Jsonb *raw)
{
	UsageCall	call = {{NULL, 0}, false};
	NormalizedUsage usage;
	StringInfoData reason;
	Jsonb	   *response;
	char	   *before;

	if (!JB_ROOT_IS_OBJECT(raw) || (response = with_larger_number(name, raw, -1)) == NULL)
		return;
	initStringInfo(&reason);
	if (!abp_normalize_usage(format, response, &call, &usage, &reason) ||
		usage.provider_cost != NULL)
		return;
	before = result_text(&usage);
	for (int n = 0; n < 100; n++)
	{
		Jsonb	   *changed = with_larger_number(name, raw, n);

		if (changed == NULL)
			return;
		resetStringInfo(&reason);
		if (abp_normalize_usage(format, changed, &call, &usage, &reason) &&
			strcmp(result_text(&usage), before) == 0)
		{
			fprintf(stderr, "%s: this says the same with a number made larger: %s\n", name,
					JsonbToCString(NULL, &changed->root, VARSIZE(changed)));
			MUST(!"a number that may cost something does not matter");
		}
	}
}

/* The format's name and the object. */
static void
fuzz_normalize(const char *data, size_t size)
{
	char	   *name = first_line(&data, &size);
	TextView	format = {name, strlen(name)};
	char	   *json = pnstrdup(data, size);
	Jsonb	   *raw = NULL;
	UsageCall	call = {{NULL, 0}, false};
	NormalizedUsage usage;
	StringInfoData reason;
	MemoryContext caller = CurrentMemoryContext;

	/* What is no jsonb never gets as far as our code. */
	if (!pg_verify_mbstr(PG_UTF8, json, strlen(json), true) ||
		!pg_verify_mbstr(PG_UTF8, name, format.len, true))
		return;
	PG_TRY();
	{
		raw = DatumGetJsonbP(DirectFunctionCall1(jsonb_in, CStringGetDatum(json)));
	}
	PG_CATCH();
	{
		MemoryContextSwitchTo(caller);
		FlushErrorState();
	}
	PG_END_TRY();
	if (raw == NULL)
		return;

	if (!abp_normalize_knows_format(format))
	{
		must_be_text(abp_normalize_format_hint(format));
		return;
	}
	numbers_matter(name, format, raw);
	initStringInfo(&reason);
	if (!abp_normalize_usage(format, raw, &call, &usage, &reason))
	{
		must_be_text(reason.data);
		/* with the cost known, what is wrong is a doubt */
		call.cost_known = true;
		MUST(abp_normalize_usage(format, raw, &call, &usage, &reason));
		if (usage.doubt != NULL)
			must_be_text(usage.doubt);
		return;
	}
	for (int i = 0; i < NUM_USAGE_COUNTS; i++)
		MUST(!usage.counts.given[i] || usage.counts.value[i] >= 0);
	MUST(!usage.counts.given[COUNT_INPUT] || !usage.counts.given[COUNT_CACHE_READ] ||
		 usage.counts.value[COUNT_CACHE_READ] <= usage.counts.value[COUNT_INPUT]);
	MUST(!usage.counts.given[COUNT_OUTPUT] || !usage.counts.given[COUNT_REASONING] ||
		 usage.counts.value[COUNT_REASONING] <= usage.counts.value[COUNT_OUTPUT]);
	if (usage.provider_cost != NULL)
		MUST(!numeric_is_nan(usage.provider_cost) && !numeric_is_inf(usage.provider_cost));
	if (usage.counts.units != NULL)
		MUST(JB_ROOT_IS_OBJECT(usage.counts.units));
}

/* "server" or "mapping", then name=value a line. */
static void
fuzz_options(const char *data, size_t size)
{
	char	   *catalog = first_line(&data, &size);
	bool		is_server = strcmp(catalog, "mapping") != 0;
	ArrayBuildState *options = NULL;
	const char *url = NULL;
	bool		accepted = false;
	int			sqlstate = 0;
	MemoryContext caller = CurrentMemoryContext;

	while (size > 0)
	{
		char	   *line = first_line(&data, &size);

		if (!pg_verify_mbstr(PG_UTF8, line, strlen(line), true) ||
			strchr(line, '=') == NULL)
			return;
		if (strncmp(line, "url=", 4) == 0)
			url = line + 4;
		options = accumArrayResult(options, PointerGetDatum(cstring_to_text(line)),
								   false, TEXTOID, CurrentMemoryContext);
	}
	if (options == NULL)
		return;

	PG_TRY();
	{
		DirectFunctionCall2(aibilling_polar_fdw_validator,
							makeArrayResult(options, CurrentMemoryContext),
							ObjectIdGetDatum(is_server ? ForeignServerRelationId :
											 UserMappingRelationId));
		accepted = true;
	}
	PG_CATCH();
	{
		ErrorData  *error;

		MemoryContextSwitchTo(caller);
		error = CopyErrorData();
		FlushErrorState();
		sqlstate = error->sqlerrcode;
		must_be_text(error->message);
		if (error->hint)
			must_be_text(error->hint);
	}
	PG_END_TRY();

	if (!accepted)
	{
		/* class HV, or a value that cannot be, or a function's name that is none */
		MUST(ERRCODE_TO_CATEGORY(sqlstate) == MAKE_SQLSTATE('H', 'V', '0', '0', '0') ||
			 sqlstate == ERRCODE_INVALID_PARAMETER_VALUE ||
			 sqlstate == ERRCODE_SYNTAX_ERROR ||
			 sqlstate == ERRCODE_INVALID_NAME ||
			 sqlstate == ERRCODE_WRONG_OBJECT_TYPE ||
			 sqlstate == ERRCODE_DUPLICATE_OBJECT);
		return;
	}
	if (is_server && url != NULL)
	{
		bool		clear = strncmp(url, "http://", 7) == 0;
		const char *host = url + (clear ? 7 : 8);

		MUST(clear || strncmp(url, "https://", 8) == 0);
		MUST(*host != '\0' && *host != '/' && *host != ':');
		for (const char *p = url; *p; p++)
			MUST((unsigned char) *p > ' ' && *p != 0x7f && *p != '\\' && *p != '#');
		MUST(memchr(host, '@', strcspn(host, "/?")) == NULL);
		if (clear)
			MUST(strncmp(host, "127.", 4) == 0 || strncmp(host, "[::1]", 5) == 0 ||
				 (pg_strncasecmp(host, "localhost", 9) == 0 &&
				  strchr(":/?", host[9]) != NULL));
	}
}

/*
 * Runs the target on one input.  Small blocks make PostgreSQL hand out all but
 * the smallest pieces of memory as blocks of their own, so that a tool which
 * watches malloc sees where they end.
 */
static int
one_input(const uint8_t *data, size_t size)
{
	if (size > MAX_INPUT_BYTES)
		return 0;
	if (input_context == NULL)
		input_context = AllocSetContextCreate(TopMemoryContext, "fuzz input",
											  0, 1024, 1024);
	MemoryContextSwitchTo(input_context);
	PG_TRY();
	{
		target((const char *) data, size);
	}
	PG_CATCH();
	{
		ErrorData  *error;

		MemoryContextSwitchTo(input_context);
		error = CopyErrorData();
		fprintf(stderr, "unexpected error %s: %s\n",
				unpack_sql_state(error->sqlerrcode), error->message);
		abort();
	}
	PG_END_TRY();
	MemoryContextReset(input_context);
	return 0;
}

#ifdef ABP_FUZZ_DRIVER
extern int	LLVMFuzzerRunDriver(int *argc, char ***argv,
								int (*callback) (const uint8_t *data, size_t size));
#else

/* Calls the target with each file of a directory; returns their number. */
static int
replay(const char *path)
{
	DIR		   *dir = AllocateDir(path);
	struct dirent *entry;
	int			count = 0;

	while ((entry = ReadDir(dir, path)) != NULL)
	{
		char	   *name = psprintf("%s/%s", path, entry->d_name);
		struct stat st;
		FILE	   *file;
		uint8_t    *data;

		if (entry->d_name[0] == '.' || stat(name, &st) != 0 || !S_ISREG(st.st_mode))
			continue;
		file = AllocateFile(name, "rb");
		data = palloc(st.st_size + 1);
		if (file == NULL || fread(data, 1, st.st_size, file) != st.st_size)
			elog(ERROR, "could not read \"%s\"", name);
		FreeFile(file);
		fprintf(stderr, "%s\n", name);
		one_input(data, st.st_size);
		count++;
	}
	FreeDir(dir);
	return count;
}
#endif

/*
 * abp_fuzz(target text, arguments text[]): libFuzzer's arguments, or the
 * directories to replay.
 */
Datum
abp_fuzz(PG_FUNCTION_ARGS)
{
	char	   *name = text_to_cstring(PG_GETARG_TEXT_PP(0));
	Datum	   *elems;
	int			nelems;
	MemoryContext caller = CurrentMemoryContext;

	if (strcmp(name, "judge") == 0)
		target = fuzz_judge;
	else if (strcmp(name, "normalize") == 0)
		target = fuzz_normalize;
	else if (strcmp(name, "options") == 0)
		target = fuzz_options;
	else
		elog(ERROR, "could not find target \"%s\"", name);
	deconstruct_array(PG_GETARG_ARRAYTYPE_P(1), TEXTOID, -1, false, TYPALIGN_INT,
					  &elems, NULL, &nelems);
#ifdef ABP_FUZZ_DRIVER
	{
		char	  **argv = palloc0(sizeof(char *) * (nelems + 2));
		int			argc = 0;

		argv[argc++] = "fuzz";
		for (int i = 0; i < nelems; i++)
			argv[argc++] = TextDatumGetCString(elems[i]);
		fprintf(stderr, "status %d\n", LLVMFuzzerRunDriver(&argc, &argv, one_input));
	}
#else
	for (int i = 0; i < nelems; i++)
		fprintf(stderr, "%d inputs replayed\n", replay(TextDatumGetCString(elems[i])));
#endif
	MemoryContextSwitchTo(caller);
	PG_RETURN_VOID();
}
