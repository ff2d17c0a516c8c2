/*-------------------------------------------------------------------------
 *
 * http.h
 *	  HTTP requests that never keep a backend from its interrupts.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_HTTP_H
#define ABP_HTTP_H

#include "postgres.h"

/* Where and how to connect. */
typedef struct HttpTarget
{
	const char *url;			/* whole URL of the request */
	const char *ca_file;		/* NULL: the system's certificates */
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
	long		status;			/* HTTP status, 0 if none */
	const char *body;			/* not zero-terminated; lives until
								 * abp_http_release */
	size_t		body_len;
	bool		truncated;		/* body cut at HTTP_MAX_REPLY */
	const char *retry_after;	/* header's text, NULL if none */
	const char *error;			/* words for the reader, NULL if answered */
	double		elapsed_ms;
} HttpReply;

typedef struct HttpRequest HttpRequest;

/* How much of an answer is kept. */
#define HTTP_MAX_REPLY (1024 * 1024)

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
