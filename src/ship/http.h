/*-------------------------------------------------------------------------
 *
 * http.h
 *	  HTTP requests that never keep a backend from its interrupts.
 *
 * Life of a request: abp_http_post or abp_http_get starts it; abp_http_wait
 * drives it; abp_http_next_finished hands it out once it has ended;
 * abp_http_reply shows what came of it; abp_http_release ends it.  A failed
 * request is data (HttpOutcome), never an ERROR.
 *
 * The request's body is not copied.  Whoever may leave this cycle by an ERROR
 * must call abp_http_cancel_all before the bodies are freed, or at the latest
 * before the next abp_http_ call: libcurl reads a body until its request has
 * ended.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_HTTP_H
#define ABP_HTTP_H

#include "postgres.h"

/* Where and how to connect.  Needed only while the request is started. */
typedef struct HttpTarget
{
	const char *url;			/* whole URL of the request */
	const char *ca_file;		/* trust these certificates only; NULL: the
								 * system's */
	const char *proxy;			/* NULL: none, the environment is ignored */
	int			timeout_ms;		/* for the whole request */
} HttpTarget;

/* What came of a request. */
typedef enum HttpOutcome
{
	HTTP_ANSWERED,				/* a whole answer: see status and body */
	HTTP_NOT_SENT,				/* surely never reached the server: no
								 * connection, name, certificate ... */
	HTTP_UNKNOWN				/* timeout, broken connection, truncated
								 * answer: the server may have acted on it */
} HttpOutcome;

typedef struct HttpReply
{
	HttpOutcome outcome;
	long		status;			/* HTTP status, 0 if none; also known of a
								 * truncated answer */
	const char *body;			/* not zero-terminated; lives until
								 * abp_http_release */
	size_t		body_len;
	bool		truncated;		/* body cut at the limit below; the outcome is
								 * then HTTP_UNKNOWN */
	bool		out_of_memory;	/* here; less at a time may pass */
	const char *retry_after;	/* header's text, NULL if none */
	const char *error;			/* words for the reader, NULL if answered;
								 * never the token or a body */
	double		elapsed_ms;
} HttpReply;

typedef struct HttpRequest HttpRequest;

/* How much of an answer is kept, in bytes. */
#define HTTP_MAX_REPLY (1024 * 1024)	/* to a POST */
#define HTTP_MAX_DOCUMENT (64 * 1024 * 1024)	/* to a GET: price catalogues */

extern HttpRequest *abp_http_post(const HttpTarget *target, const char *token,
								  const char *body, size_t body_len);
extern HttpRequest *abp_http_get(const HttpTarget *target, const char *token);
extern bool abp_http_wait(long timeout_ms);
extern HttpRequest *abp_http_next_finished(void);
extern const HttpReply *abp_http_reply(HttpRequest *request);
extern void abp_http_release(HttpRequest *request);
extern void abp_http_cancel_all(void);
extern int	abp_http_in_flight(void);

#endif							/* ABP_HTTP_H */
