/*-------------------------------------------------------------------------
 *
 * verdict.h
 *	  An answer of Polar's as a verdict.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_VERDICT_H
#define ABP_VERDICT_H

#include "postgres.h"

#include "datatype/timestamp.h"

typedef enum VerdictKind
{
	VERDICT_DELIVERED,			/* 200, inserted + duplicates = events */
	VERDICT_ROWS_REFUSED,		/* 422 that names events: see refused[] */
	VERDICT_BATCH_REFUSED,		/* 422 that names none, 400: halve */
	VERDICT_TOO_LARGE,			/* 413: halve */
	VERDICT_RATE_LIMITED,		/* 429: see retry_after_ms */
	VERDICT_PAUSE,				/* 401, 403, 404, redirects ...: nobody's
								 * fault but the configuration's */
	VERDICT_SERVER_ERROR,		/* 5xx */
	VERDICT_UNKNOWN				/* an answer that proves nothing: 200 with the
								 * wrong counts, garbage, truncated */
} VerdictKind;

typedef struct RefusedEvent
{
	int			index;			/* position in the request's events */
	bool		clock_skew;		/* "must be in the past": hold, not poison */
	char	   *reason;			/* field and rule; never the offending value */
} RefusedEvent;

typedef struct Verdict
{
	VerdictKind kind;
	int64		inserted;
	int64		duplicates;
	int			nrefused;
	RefusedEvent *refused;		/* ascending by index, one entry per event */
	int64		retry_after_ms; /* -1: not given */
	char	   *error;			/* for ledger and status; no secret, no
								 * customer data; NULL when delivered */
} Verdict;

extern Verdict *abp_verdict_of(long http_status, const char *body, size_t len,
							   bool truncated, const char *retry_after,
							   int nevents, TimestampTz now);

#endif							/* ABP_VERDICT_H */
