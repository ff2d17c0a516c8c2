/*-------------------------------------------------------------------------
 *
 * verdict.c
 *	  An answer of Polar's as a verdict.
 *
 * Pure: no I/O, no SPI, no catalogue access.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <ctype.h>

#include "mb/pg_wchar.h"
#include "utils/datetime.h"
#include "utils/memutils.h"

#include "compat.h"
#include "polar/verdict.h"

/* What is more deeply nested cannot be from Polar. */
#define MAX_ANSWER_DEPTH	64

/* An answer's words, cut to what a reader needs. */
#define MAX_WORD_BYTES		64
#define MAX_MESSAGE_BYTES	200

#define MAX_RETRY_AFTER_MS	(60 * 60 * 1000)

/*
 * Polar reports an event's errors for both kinds of events, by customer and
 * by external customer, or for the event as such.
 */
typedef enum EventVariant
{
	VARIANT_NONE,
	VARIANT_CUSTOMER,
	VARIANT_EXTERNAL
} EventVariant;

#define NUM_VARIANTS (VARIANT_EXTERNAL + 1)

typedef struct EventErrors
{
	bool		named;			/* any error at all */
	bool		other_variant[NUM_VARIANTS];	/* lacks the variant's
												 * identity, so it is not one */
	bool		clock_skew[NUM_VARIANTS];
	char	   *reason[NUM_VARIANTS];	/* the first one, clock skew aside */
} EventErrors;

/* The fields of an answer that we read. */
typedef enum AnswerField
{
	FIELD_OTHER,
	FIELD_INSERTED,
	FIELD_DUPLICATES,
	FIELD_ERROR,
	FIELD_DETAIL,
	FIELD_TYPE,
	FIELD_LOC,
	FIELD_MSG
} AnswerField;

/* State of reading an answer; lives in the context of the reading. */
typedef struct Answer
{
	int			depth;			/* containers open */
	char		container[MAX_ANSWER_DEPTH + 2];	/* '{' or '[', by depth */
	AnswerField field;			/* of the whole */
	AnswerField entry_field;	/* of an entry of "detail" */

	int64		inserted;		/* -1: not a count */
	int64		duplicates;		/* ditto; 0 if missing */
	char	   *error;			/* Polar's error code */

	/* the current entry of "detail" */
	char	   *type;
	char	   *msg;
	int			loc_len;
	bool		loc_is_event;	/* so far, loc leads to an event */
	int			index;
	EventVariant variant;
	StringInfoData path;		/* of the field in the event */

	int			nevents;
	EventErrors *events;		/* NULL: no details wanted */
	int			nnamed;
} Answer;

/*
 * Append an answer's word to text for people: cut, control characters and
 * anything that looks like an access token replaced.
 */
static void
append_clean(StringInfo out, const char *word, int max_bytes)
{
	bool		utf8 = (GetDatabaseEncoding() == PG_UTF8);
	int			len = pg_encoding_mbcliplen(PG_UTF8, word, strlen(word), max_bytes);

	for (int i = 0; i < len; i++)
	{
		unsigned char c = word[i];

		if (strncmp(word + i, "polar_", 6) == 0 &&
			(i == 0 || !(isalnum((unsigned char) word[i - 1]) || word[i - 1] == '_')))
		{
			appendStringInfoString(out, "polar_...");
			while (i + 1 < len && (isalnum((unsigned char) word[i + 1]) || word[i + 1] == '_'))
				i++;
		}
		else if (c < 0x20 || c == 0x7f)
			appendStringInfoChar(out, ' ');
		else if (c >= 0x80 && !utf8)
			appendStringInfoChar(out, '?');
		else
			appendStringInfoChar(out, c);
	}
	if (word[len] != '\0')
		appendStringInfoString(out, "...");
}

/* Is the parser directly within an entry of "detail"? */
static bool
in_entry(const Answer *answer)
{
	return answer->events != NULL && answer->field == FIELD_DETAIL &&
		answer->depth >= 3 && answer->container[1] == '{' &&
		answer->container[2] == '[' && answer->container[3] == '{';
}

/* Inside the list that says where in the request an error is? */
static bool
in_loc(const Answer *answer)
{
	return in_entry(answer) && answer->entry_field == FIELD_LOC &&
		answer->depth == 4 && answer->container[4] == '[';
}

/* Forget what the entry before said. */
static void
start_entry(Answer *answer)
{
	answer->type = NULL;
	answer->msg = NULL;
	answer->loc_len = 0;
	answer->loc_is_event = true;
	answer->index = -1;
	answer->variant = VARIANT_NONE;
	answer->entry_field = FIELD_OTHER;
	resetStringInfo(&answer->path);
}

/* An entry of "detail" is complete: keep what it says about an event. */
static void
end_entry(Answer *answer)
{
	EventErrors *event;
	EventVariant variant = answer->variant;
	const char *msg = answer->msg != NULL ? answer->msg : "refused";
	const char *type = answer->type != NULL ? answer->type : "";
	StringInfoData reason;

	if (!answer->loc_is_event || answer->loc_len < 3)
		return;

	event = &answer->events[answer->index];
	if (!event->named)
		answer->nnamed++;
	event->named = true;

	if (strcmp(type, "missing") == 0 &&
		((variant == VARIANT_CUSTOMER && strcmp(answer->path.data, "customer_id") == 0) ||
		 (variant == VARIANT_EXTERNAL && strcmp(answer->path.data, "external_customer_id") == 0)))
		event->other_variant[variant] = true;
	else if (strstr(msg, "Timestamp must be in the past") != NULL)
	{
		event->clock_skew[variant] = true;
		return;
	}
	else if (event->reason[variant] != NULL)
		return;
	else
	{
		if (strncmp(msg, "Value error, ", 13) == 0)
			msg += 13;

		initStringInfo(&reason);
		if (answer->path.len > 0)
			appendStringInfo(&reason, "%s: ", answer->path.data);
		append_clean(&reason, msg, MAX_MESSAGE_BYTES);
		if (*type != '\0')
		{
			appendStringInfoString(&reason, " (");
			append_clean(&reason, type, MAX_WORD_BYTES);
			appendStringInfoChar(&reason, ')');
		}
		event->reason[variant] = reason.data;
	}
}

/*
 * One element of an entry's loc: "body", "events", the event's index, the
 * variant (not in errors of the service), then the path of the field.
 */
static void
read_loc(Answer *answer, const char *token, JsonTokenType tokentype)
{
	int			position = answer->loc_len++;

	switch (position)
	{
		case 0:
			if (tokentype != JSON_TOKEN_STRING || strcmp(token, "body") != 0)
				answer->loc_is_event = false;
			break;
		case 1:
			if (tokentype != JSON_TOKEN_STRING || strcmp(token, "events") != 0)
				answer->loc_is_event = false;
			break;
		case 2:
			/* up to nine digits: nothing that overflows, no sign, no fraction */
			if (tokentype != JSON_TOKEN_NUMBER || strlen(token) > 9 ||
				strspn(token, "0123456789") != strlen(token) ||
				atoi(token) >= answer->nevents)
				answer->loc_is_event = false;
			else
				answer->index = atoi(token);
			break;
		default:
			if (tokentype != JSON_TOKEN_STRING && tokentype != JSON_TOKEN_NUMBER)
				break;
			if (position == 3 && strcmp(token, "EventCreateCustomer") == 0)
				answer->variant = VARIANT_CUSTOMER;
			else if (position == 3 && strcmp(token, "EventCreateExternalCustomer") == 0)
				answer->variant = VARIANT_EXTERNAL;
			else if (position == 6 && strncmp(answer->path.data, "metadata.", 9) == 0 &&
					 (strcmp(token, "constrained-str") == 0 || strcmp(token, "int") == 0 ||
					  strcmp(token, "float") == 0 || strcmp(token, "bool") == 0))
				 /* which type of value was tried: noise */ ;
			else if (answer->path.len < MAX_MESSAGE_BYTES)
			{
				if (answer->path.len > 0)
					appendStringInfoChar(&answer->path, '.');
				append_clean(&answer->path, token, MAX_WORD_BYTES);
			}
			break;
	}
}

/* Which of the keys that are read is this? */
static AnswerField
answer_field(const char *name)
{
	static const struct
	{
		const char *name;
		AnswerField field;
	}			fields[] = {
		{"inserted", FIELD_INSERTED},
		{"duplicates", FIELD_DUPLICATES},
		{"error", FIELD_ERROR},
		{"detail", FIELD_DETAIL},
		{"type", FIELD_TYPE},
		{"loc", FIELD_LOC},
		{"msg", FIELD_MSG}
	};

	for (int i = 0; i < lengthof(fields); i++)
	{
		if (strcmp(fields[i].name, name) == 0)
			return fields[i].field;
	}
	return FIELD_OTHER;
}

/*
 * An object or a list begins: where a number was expected, the answer is
 * malformed.
 */
static void
start_container(Answer *answer, char kind)
{
	if (in_loc(answer))
		answer->loc_is_event = false;
	if (answer->depth == 1 && answer->field == FIELD_INSERTED)
		answer->inserted = -1;
	if (answer->depth == 1 && answer->field == FIELD_DUPLICATES)
		answer->duplicates = -1;

	/* The depth was checked before; see read_answer. */
	answer->container[++answer->depth] = kind;
	if (answer->depth == 3 && in_entry(answer))
		start_entry(answer);
}

static ABP_JSON_ACTION
answer_object_start(void *state)
{
	start_container(state, '{');
	return ABP_JSON_GO_ON;
}

static ABP_JSON_ACTION
answer_array_start(void *state)
{
	start_container(state, '[');
	return ABP_JSON_GO_ON;
}

/* The object may be an entry of "detail", which is complete then. */
static ABP_JSON_ACTION
answer_object_end(void *state)
{
	Answer	   *answer = state;

	if (answer->depth == 3 && in_entry(answer))
		end_entry(answer);
	answer->depth--;
	return ABP_JSON_GO_ON;
}

static ABP_JSON_ACTION
answer_array_end(void *state)
{
	((Answer *) state)->depth--;
	return ABP_JSON_GO_ON;
}

/* Note to which key the next value belongs. */
static ABP_JSON_ACTION
answer_field_start(void *state, char *name, bool isnull)
{
	Answer	   *answer = state;

	if (answer->depth == 1)
		answer->field = answer_field(name);
	else if (answer->depth == 3 && in_entry(answer))
	{
		answer->entry_field = answer_field(name);
		/* of a key given twice, the last counts */
		if (answer->entry_field == FIELD_LOC)
		{
			answer->loc_len = 0;
			answer->loc_is_event = true;
			answer->variant = VARIANT_NONE;
			resetStringInfo(&answer->path);
		}
	}
	return ABP_JSON_GO_ON;
}

/* A count of an answer, or -1 if it is none. */
static int64
read_count(const char *token, JsonTokenType tokentype)
{
	if (tokentype != JSON_TOKEN_NUMBER || strlen(token) > 18 ||
		strspn(token, "0123456789") != strlen(token))
		return -1;
	return strtoll(token, NULL, 10);
}

/* A string, number or word: kept if it is one of those that are read. */
static ABP_JSON_ACTION
answer_scalar(void *state, char *token, JsonTokenType tokentype)
{
	Answer	   *answer = state;

	if (answer->depth == 1 && answer->container[1] == '{')
	{
		if (answer->field == FIELD_INSERTED)
			answer->inserted = read_count(token, tokentype);
		else if (answer->field == FIELD_DUPLICATES)
			answer->duplicates = read_count(token, tokentype);
		else if (answer->field == FIELD_ERROR && tokentype == JSON_TOKEN_STRING)
			answer->error = token;
	}
	else if (in_loc(answer))
		read_loc(answer, token, tokentype);
	else if (answer->depth == 3 && in_entry(answer) && tokentype == JSON_TOKEN_STRING)
	{
		if (answer->entry_field == FIELD_TYPE)
			answer->type = token;
		else if (answer->entry_field == FIELD_MSG)
			answer->msg = token;
	}
	return ABP_JSON_GO_ON;
}

/*
 * Make an answer safe to parse: returns a copy of as much of it as is valid
 * UTF-8, in which escapes that the parser might raise an error on (zero,
 * surrogates, what the database's encoding lacks) are replaced by a question
 * mark's.  Returns NULL if it is nested too deeply, since the parser raises an
 * error when it runs out of stack.
 */
static char *
defuse_json(const char *body, size_t len, int *valid_len)
{
	int			valid = pg_encoding_verifymbstr(PG_UTF8, body, (int) Min(len, MaxAllocSize / 2));
	char	   *copy = palloc(valid + 1);
	int			depth = 0;
	bool		in_string = false;

	memcpy(copy, body, valid);
	copy[valid] = '\0';
	*valid_len = valid;

	for (int i = 0; i < valid; i++)
	{
		char		c = copy[i];

		if (!in_string)
		{
			if (c == '"')
				in_string = true;
			else if (c == '{' || c == '[')
			{
				if (++depth > MAX_ANSWER_DEPTH)
					return NULL;
			}
			else if (c == '}' || c == ']')
				depth--;
		}
		else if (c == '"')
			in_string = false;
		else if (c == '\\')
		{
			i++;
			if (copy[i] == 'u' && valid - i > 4 &&
				(strncmp(copy + i + 1, "00", 2) != 0 ||
				 strncmp(copy + i + 1, "0000", 4) == 0 ||
				 strchr("01234567", copy[i + 3]) == NULL) &&
				strspn(copy + i + 1, "0123456789abcdefABCDEF") >= 4)
				memcpy(copy + i + 1, "003f", 4);
		}
	}
	return copy;
}

/*
 * Read an answer's body.  Returns false if it is not JSON as a whole; what
 * came before the flaw has been read all the same.  Allocates in the current
 * context and raises no error on any bytes.
 */
static bool
read_answer(Answer *answer, const char *body, size_t len)
{
	JsonSemAction actions = {0};
	char	   *json;
	int			json_len;

	answer->inserted = -1;
	initStringInfo(&answer->path);

	if (body == NULL || len == 0)
		return false;
	json = defuse_json(body, len, &json_len);
	if (json == NULL)
		return false;

	actions.semstate = answer;
	actions.object_start = answer_object_start;
	actions.object_end = answer_object_end;
	actions.array_start = answer_array_start;
	actions.array_end = answer_array_end;
	actions.object_field_start = answer_field_start;
	actions.scalar = answer_scalar;

	return pg_parse_json(abp_make_json_lexer(json, json_len), &actions) == JSON_SUCCESS &&
		json_len == len;
}

/*
 * Whether an error is all about the clock, and in which words to say it.  An
 * event is of one variant; errors about the other are noise.
 */
static const char *
choose_reason(const EventErrors *event, bool *clock_skew)
{
	static const EventVariant order[] = {
		VARIANT_NONE, VARIANT_CUSTOMER, VARIANT_EXTERNAL
	};
	bool		skewed = false;

	*clock_skew = false;
	for (int i = 0; i < lengthof(order); i++)
	{
		if (event->other_variant[order[i]])
			continue;
		if (event->reason[order[i]] != NULL)
			return event->reason[order[i]];
		skewed |= event->clock_skew[order[i]];
	}
	if (skewed)
	{
		*clock_skew = true;
		return "timestamp: must be in the past by Polar's clock";
	}

	if (event->other_variant[VARIANT_CUSTOMER] && event->other_variant[VARIANT_EXTERNAL])
		return "customer_id or external_customer_id: Field required (missing)";
	return "refused for no reason that was given";
}

/* Fill in which events were refused. */
static void
collect_refused(Verdict *verdict, const Answer *answer)
{
	verdict->refused = palloc(sizeof(RefusedEvent) * answer->nnamed);
	for (int i = 0; i < answer->nevents; i++)
	{
		RefusedEvent *refused;

		if (!answer->events[i].named)
			continue;
		refused = &verdict->refused[verdict->nrefused++];
		refused->index = i;
		refused->reason = pstrdup(choose_reason(&answer->events[i],
												&refused->clock_skew));
	}
}

/*
 * A Retry-After header in milliseconds, 0 to an hour: seconds, or a date in
 * one of the three forms of RFC 9110, section 5.6.7.  -1 if it is neither.
 */
static int64
read_retry_after(const char *header, TimestampTz now)
{
	static const char *const names[] = {
		"Jan", "Feb", "Mar", "Apr", "May", "Jun",
		"Jul", "Aug", "Sep", "Oct", "Nov", "Dec"
	};
	char		name[4];
	int			year;
	int			month = 0;
	int			day;
	int			hour;
	int			minute;
	int			second;
	int			end = 0;
	const char *p = header;
	TimestampTz at;

	if (header == NULL)
		return -1;
	while (*p == ' ' || *p == '\t')
		p++;

	if (*p >= '0' && *p <= '9')
	{
		int64		seconds = 0;

		for (; *p >= '0' && *p <= '9'; p++)
			seconds = Min(seconds * 10 + (*p - '0'), MAX_RETRY_AFTER_MS);
		while (*p == ' ' || *p == '\t')
			p++;
		return *p == '\0' ? Min(seconds * 1000, MAX_RETRY_AFTER_MS) : -1;
	}
	if (*p == '-' && p[1] >= '0' && p[1] <= '9')
		return 0;

	if (sscanf(p, "%*3[A-Za-z], %2d %3[A-Za-z] %4d %2d:%2d:%2d GMT%n",
			   &day, name, &year, &hour, &minute, &second, &end) == 6 && end > 0)
		 /* IMF-fixdate */ ;
	else if (sscanf(p, "%*9[A-Za-z], %2d-%3[A-Za-z]-%2d %2d:%2d:%2d GMT%n",
					&day, name, &year, &hour, &minute, &second, &end) == 6 && end > 0)
	{
		/* RFC 850: two digits of the year, at most 50 years ahead */
		int			this_year;
		int			unused;

		j2date((int) (now / USECS_PER_DAY) + POSTGRES_EPOCH_JDATE,
			   &this_year, &unused, &unused);
		year += this_year - this_year % 100;
		if (year > this_year + 50)
			year -= 100;
	}
	else if (sscanf(p, "%*3[A-Za-z] %3[A-Za-z] %2d %2d:%2d:%2d %4d",
					name, &day, &hour, &minute, &second, &year) != 6)
		return -1;				/* not asctime() either */

	while (month < lengthof(names) && pg_strcasecmp(names[month], name) != 0)
		month++;
	if (month == lengthof(names) || year < 1 || day < 1 || day > 31 ||
		hour < 0 || hour > 23 || minute < 0 || minute > 59 || second < 0 || second > 60)
		return -1;

	at = ((int64) date2j(year, month + 1, day) - POSTGRES_EPOCH_JDATE) * USECS_PER_DAY +
		(hour * SECS_PER_HOUR + minute * SECS_PER_MINUTE + second) * USECS_PER_SEC;
	if (at <= now)
		return 0;
	if (at - now >= INT64CONST(1000) * MAX_RETRY_AFTER_MS)
		return MAX_RETRY_AFTER_MS;
	return (at - now + 999) / 1000;
}

/*
 * Begin the error text of a verdict: the status, and Polar's error code if it
 * looks like one (letters and underscores: no token, no customer's data).
 */
static void
start_error(StringInfo error, long http_status, const char *code)
{
	appendStringInfo(error, "HTTP %ld", http_status);
	if (code != NULL && *code != '\0' && strlen(code) <= MAX_WORD_BYTES &&
		strspn(code, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_") == strlen(code) &&
		strncmp(code, "polar_", 6) != 0)
		appendStringInfo(error, " (%s)", code);
	appendStringInfoString(error, ": ");
}

/* What the reader can do about an answer that the configuration is to blame for. */
static const char *
pause_advice(long http_status)
{
	switch (http_status)
	{
		case 401:
			return "the access token is missing, expired or revoked; give the server a valid one for this environment";
		case 403:
			return "the access token must have the scope events:write; give the server one that has";
		case 404:
			return "there is no Events Ingest API at this address; check the server's options url and environment";
		case 405:
		case 411:
			return "the request did not arrive as it was sent; check the server's options url and proxy";
		case 407:
			return "the proxy asks for credentials; check the server's option proxy";
		default:
			if (http_status >= 300 && http_status < 400)
				return "the address redirects elsewhere; set the server's option url to where the API is";
			return "unexpected; check the server's options and its access token";
	}
}

/* The answer to a request that Polar has taken, or so it says. */
static VerdictKind
judge_success(const Answer *answer, bool whole, Verdict *verdict, StringInfo error)
{
	bool		counted = whole && answer->inserted >= 0 && answer->duplicates >= 0;

	if (counted && answer->inserted + answer->duplicates == answer->nevents)
	{
		verdict->inserted = answer->inserted;
		verdict->duplicates = answer->duplicates;
		return VERDICT_DELIVERED;
	}
	if (counted)
		appendStringInfo(error, "of %d events Polar counts " INT64_FORMAT " inserted and " INT64_FORMAT " duplicates",
						 answer->nevents, answer->inserted, answer->duplicates);
	else
		appendStringInfoString(error, "the answer is not Polar's");
	return VERDICT_UNKNOWN;
}

/*
 * The answer to a request that Polar does not validate.  One that was cut still
 * names the events it names; one that is not JSON for another reason is not
 * trusted with that.
 */
static VerdictKind
judge_refusal(Answer *answer, bool trusted, Verdict *verdict, StringInfo error)
{
	if (answer->nnamed == 0 || !trusted)
	{
		appendStringInfoString(error, "Polar refuses the request and names no event");
		return VERDICT_BATCH_REFUSED;
	}
	collect_refused(verdict, answer);
	appendStringInfo(error, "Polar refuses %d of %d events: %s",
					 verdict->nrefused, answer->nevents, verdict->refused[0].reason);
	return VERDICT_ROWS_REFUSED;
}

/* An answer that says all by its status. */
static VerdictKind
judge_status(long http_status, StringInfo error)
{
	static const struct
	{
		long		status;
		VerdictKind kind;
		const char *words;
	}			known[] = {
		{400, VERDICT_BATCH_REFUSED, "Polar cannot read the request"},
		{408, VERDICT_SERVER_ERROR, "the server waited too long for the request"},
		{413, VERDICT_TOO_LARGE, "the request is too large"},
		{429, VERDICT_RATE_LIMITED, "too many requests"}
	};

	for (int i = 0; i < lengthof(known); i++)
	{
		if (known[i].status != http_status)
			continue;
		appendStringInfoString(error, known[i].words);
		return known[i].kind;
	}
	if (http_status >= 500 && http_status <= 599)
	{
		appendStringInfoString(error, "the server failed");
		return VERDICT_SERVER_ERROR;
	}
	if (http_status >= 300 && http_status <= 499)
	{
		appendStringInfoString(error, pause_advice(http_status));
		return VERDICT_PAUSE;
	}
	appendStringInfoString(error, "the answer is not Polar's");
	return VERDICT_UNKNOWN;
}

/*
 * Judge the answer to a request with this many events.  body need not be
 * zero-terminated, may be NULL if empty, and may hold any bytes: nothing in it
 * raises an error.  retry_after is that header's text or NULL.  The verdict is
 * palloc'd.
 */
Verdict    *
abp_verdict_of(long http_status, const char *body, size_t len, bool truncated,
			   const char *retry_after, int nevents, TimestampTz now)
{
	Verdict    *verdict = palloc0(sizeof(Verdict));
	MemoryContext caller = CurrentMemoryContext;
	MemoryContext reading;
	Answer		answer = {0};
	StringInfoData error;
	bool		whole;

	initStringInfo(&error);
	reading = AllocSetContextCreate(caller, "aibilling_polar answer",
									ALLOCSET_DEFAULT_SIZES);
	MemoryContextSwitchTo(reading);
	answer.nevents = Max(nevents, 0);
	if (http_status == 422)
		answer.events = palloc0(sizeof(EventErrors) * (answer.nevents + 1));
	whole = read_answer(&answer, body, len) && !truncated;
	MemoryContextSwitchTo(caller);

	verdict->retry_after_ms = read_retry_after(retry_after, now);
	start_error(&error, http_status, answer.error);
	verdict->kind = http_status == 200 ? judge_success(&answer, whole, verdict, &error) :
		http_status == 422 ? judge_refusal(&answer, whole || truncated, verdict, &error) :
		judge_status(http_status, &error);

	if (verdict->kind != VERDICT_DELIVERED)
		verdict->error = error.data;
	else
		pfree(error.data);
	MemoryContextDelete(reading);
	return verdict;
}
