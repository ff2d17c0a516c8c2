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
#include "normalize.h"
#include "polar.h"
#include "server.h"

/* An answer may be longer than this, but nothing new is found there. */
#define MAX_INPUT	65536

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

	verdict = abp_polar_judge(status, body, size, truncated, retry_after,
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

	if (!abp_usage_format_known(format))
	{
		must_be_text(abp_usage_format_hint(format));
		return;
	}
	initStringInfo(&reason);
	if (!abp_normalize_usage(format, raw, &call, &usage, &reason))
	{
		must_be_text(reason.data);
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
	if (size > MAX_INPUT)
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
