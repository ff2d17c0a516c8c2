/*-------------------------------------------------------------------------
 *
 * reader.c
 *	  Reading back what Polar has: one request after the other.
 *
 * Requests go the way that deliveries go, and draw from the same quota.  What
 * may pass (a limit of requests, an error of the server's, a broken connection)
 * is waited for and tried again; anything else is raised.  All waits end at a
 * cancellation.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "pgtime.h"
#include "storage/latch.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/timestamp.h"

#include "base/progress.h"
#include "compat.h"
#include "polar/token.h"
#include "polar/verdict.h"
#include "ship/http.h"
#include "ship/quota.h"
#include "ship/reader.h"

/* How often one request is tried. */
#define MAX_TRIES 4

/* Before it is tried again; then twice as long. */
#define RETRY_MS 1000

/* After a 429 without Retry-After. */
#define RATE_LIMITED_MS (60 * 1000)

/* A wait is looked at again after so long: others may have the quota meanwhile. */
#define LOOK_AGAIN_MS 500

/* How often to say how far it is. */
#define PROGRESS_MS 5000

/* Tell the client now and then how many pages have been read. */
static void
report_progress(Reader *reader)
{
	TimestampTz now = GetCurrentTimestamp();

	if (now < reader->report_at)
		return;
	if (reader->total > 0)
		ereport(INFO,
				(errmsg("%s: " INT64_FORMAT " of " INT64_FORMAT " pages read so far",
						reader->who, reader->done, reader->total)));
	else
		ereport(INFO,
				(errmsg("%s: " INT64_FORMAT " pages read so far", reader->who, reader->done)));
	reader->report_at = now + PROGRESS_MS * INT64CONST(1000);
}

/* Wait, but tell how far it is, and be interrupted. */
static void
wait_until(Reader *reader, TimestampTz until)
{
	static uint32 wait_event = 0;

	for (;;)
	{
		TimestampTz now = GetCurrentTimestamp();

		CHECK_FOR_INTERRUPTS();
		report_progress(reader);
		if (now >= until)
			return;
		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
						 Min(LOOK_AGAIN_MS, TimestampDifferenceMilliseconds(now, until)),
						 abp_wait_event(&wait_event, "AibillingPolarRead"));
		ResetLatch(MyLatch);
	}
}

/* Returns once a request to read has been taken from the quota. */
static void
wait_for_quota(Reader *reader)
{
	TimestampTz next;

	while (!abp_quota_take_to_read(reader->server, &next))
		wait_until(reader, Min(next, GetCurrentTimestamp() + LOOK_AGAIN_MS * INT64CONST(1000)));
}

/*
 * One request, from the quota of all who ask this server.  Returns when it has
 * ended.
 */
static HttpRequest *
ask(Reader *reader, const char *path)
{
	const ServerOptions *server = reader->server;
	HttpTarget	target = {
		.url = psprintf("%s%s", server->url, path),
		.ca_file = server->ca_file,
		.proxy = server->proxy,
		.timeout_ms = server->timeout_ms
	};
	HttpRequest *request;

	wait_for_quota(reader);
	request = abp_http_get(&target, reader->token);
	while (abp_http_next_finished() != request)
	{
		report_progress(reader);
		(void) abp_http_wait(PROGRESS_MS);
	}
	return request;
}

/* An answer that no other try would change. */
static void
refuse_answer(const Reader *reader, long status, const char *scope)
{
	const char *server = reader->server->name;

	if (status == 401)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_AUTHORIZATION_SPECIFICATION),
				 errmsg("server \"%s\" does not accept its access token", server),
				 errhint("It may be expired or revoked.")));
	if (status == 403)
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("the access token of server \"%s\" lacks the scope %s", server, scope),
				 errhint("Make a token at Polar that has it.")));
	if (status == 404)
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_OBJECT),
				 errmsg("server \"%s\" has not found what was asked for", server),
				 errdetail("HTTP status 404.")));
	ereport(ERROR,
			(errcode(status == 422 ? ERRCODE_INVALID_PARAMETER_VALUE : ERRCODE_CONNECTION_FAILURE),
			 errmsg("server \"%s\" has answered with HTTP status %ld", server, status)));
}

/*
 * The page that has come, which counts as progress.  Raises an error if it is
 * not JSON.
 */
static Jsonb *
read_page(Reader *reader, const HttpReply *reply)
{
	char	   *body = pnstrdup(reply->body, reply->body_len);
	Datum		document;

	document = DirectFunctionCall1(jsonb_in,
								   CStringGetDatum(pg_any_to_server(body, reply->body_len, PG_UTF8)));
	reader->done++;
	abp_progress_report(InvalidOid, "pages", reader->done, reader->total);
	report_progress(reader);
	return DatumGetJsonbP(document);
}

/*
 * GET a path of the reader's server, with its parameters; "scope" names what
 * the token needs for it.  Returns the JSON document of the answer, in the
 * current memory context.
 *
 * Raises connection_failure where several tries were in vain,
 * insufficient_privilege for a token without the scope, undefined_object for
 * 404, invalid_parameter_value for 422.
 */
Jsonb	   *
abp_reader_get(Reader *reader, const char *path, const char *scope)
{
	for (int try = 1;; try++)
	{
		HttpRequest *request = ask(reader, path);
		const HttpReply *reply = abp_http_reply(request);
		int64		wait_ms = (int64) RETRY_MS << (try - 1);
		char	   *problem;

		if (reply->outcome == HTTP_ANSWERED && reply->status == 200)
		{
			Jsonb	   *document = read_page(reader, reply);

			abp_http_release(request);
			return document;
		}

		if (reply->outcome != HTTP_ANSWERED)
			problem = pstrdup(reply->error);
		else if (reply->status == 429)
		{
			Verdict    *verdict = abp_verdict_of(reply->status, reply->body, reply->body_len,
												 reply->truncated, reply->retry_after, 0,
												 GetCurrentTimestamp());

			wait_ms = verdict->retry_after_ms >= 0 ? verdict->retry_after_ms : RATE_LIMITED_MS;
			problem = "its limit of requests is reached";
			abp_quota_used_up(reader->server->name);
			ereport(INFO,
					(errmsg("%s: server \"%s\" asks to wait " INT64_FORMAT " seconds",
							reader->who, reader->server->name, (wait_ms + 999) / 1000)));
		}
		else if (reply->status >= 500 || reply->status == 408)
			problem = psprintf("it answered HTTP status %ld", reply->status);
		else
		{
			refuse_answer(reader, reply->status, scope);
			pg_unreachable();
		}
		abp_http_release(request);
		if (try == MAX_TRIES)
			ereport(ERROR,
					(errcode(ERRCODE_CONNECTION_FAILURE),
					 errmsg("could not read from server \"%s\": %s", reader->server->name, problem)));
		wait_until(reader, GetCurrentTimestamp() + wait_ms * INT64CONST(1000));
	}
}

/* Append a parameter to a path, as a URL has it. */
void
abp_reader_parameter(StringInfo path, const char *name, const char *value)
{
	const char *parts[2];

	parts[0] = name;
	parts[1] = pg_server_to_any(value, strlen(value), PG_UTF8);
	appendStringInfoChar(path, strchr(path->data, '?') == NULL ? '?' : '&');
	for (int i = 0; i < 2; i++)
	{
		if (i == 1)
			appendStringInfoChar(path, '=');
		for (const unsigned char *c = (const unsigned char *) parts[i]; *c != '\0'; c++)
		{
			if ((*c >= 'a' && *c <= 'z') || (*c >= 'A' && *c <= 'Z') || (*c >= '0' && *c <= '9') ||
				strchr("-._~", *c) != NULL)
				appendStringInfoChar(path, *c);
			else
				appendStringInfo(path, "%%%02X", *c);
		}
	}
}

/* The same for a time, in whole milliseconds: what is less is cut off. */
void
abp_reader_time(StringInfo path, const char *name, TimestampTz time)
{
	struct pg_tm tm;
	fsec_t		fsec;

	if (TIMESTAMP_NOT_FINITE(time) || timestamp2tm(time, NULL, &tm, &fsec, NULL, NULL) != 0 ||
		tm.tm_year < 1 || tm.tm_year > 9999)
		ereport(ERROR,
				(errcode(ERRCODE_DATETIME_VALUE_OUT_OF_RANGE),
				 errmsg("Polar knows no time before the year 1 and none after 9999")));
	abp_reader_parameter(path, name,
						 psprintf("%04d-%02d-%02dT%02d:%02d:%02d.%03dZ", tm.tm_year, tm.tm_mon,
								  tm.tm_mday, tm.tm_hour, tm.tm_min, tm.tm_sec, fsec / 1000));
}

/*
 * Read from a server, with the token that a role's deliveries have.  Whatever
 * happens, no request and no token is left behind.  "who" is the function that
 * was called.
 *
 * What Polar gives back is of a whole organization: only the server's owner and
 * superusers may read it.
 */
void
abp_reader_run(Oid serverid, Oid token_of, const char *who, ReadingWork work, void *arg)
{
	Reader		reader = {.who = who};
	StringInfoData problem;

	reader.server = abp_server_options(serverid);
	if (!abp_owns_server(serverid, GetUserId()))
		aclcheck_error(ACLCHECK_NOT_OWNER, OBJECT_FOREIGN_SERVER, reader.server->name);
	/* The shipper calls users' functions while requests of its own fly. */
	if (InSecurityRestrictedOperation())
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("cannot read from a server within security-restricted operation")));
	if (reader.server->kind != SERVER_POLAR)
		ereport(ERROR,
				(errcode(ERRCODE_WRONG_OBJECT_TYPE),
				 errmsg("server \"%s\" is a price service", reader.server->name),
				 errhint("Name a server of kind 'polar'.")));

	initStringInfo(&problem);
	reader.token = abp_token_read(reader.server, token_of, &problem);
	if (reader.token == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_AUTHORIZATION_SPECIFICATION),
				 errmsg("cannot read from server \"%s\": %s", reader.server->name, problem.data)));
	reader.report_at = GetCurrentTimestamp() + PROGRESS_MS * INT64CONST(1000);

	PG_TRY();
	{
		work(&reader, arg);
	}
	PG_FINALLY();
	{
		abp_http_cancel_all();
		abp_token_forget(reader.token);
		abp_progress_end();
	}
	PG_END_TRY();
}
