/*-------------------------------------------------------------------------
 *
 * polar.h
 *	  Polar's Events Ingest API: a usage row as an event, an answer as a verdict.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_POLAR_H
#define ABP_POLAR_H

#include "postgres.h"

#include "lib/stringinfo.h"
#include "utils/jsonb.h"

#include "queue/outbox.h"

/* How the rows of a server become events: options of CREATE SERVER. */
typedef struct EventFormat
{
	const char *event_name;		/* literal or template, NULL if not set */
	const char *customer_id_key;	/* NULL: the original's default list */
	const char *external_customer_id_key;	/* ditto */
	const char *tag_prefix;		/* never NULL */
	bool		has_event_name_function;
	bool		has_metadata_function;
} EventFormat;

/* What the user's functions returned for one row; all zero without any. */
typedef struct EventOverrides
{
	TextView	event_name;		/* .data == NULL: not overridden */
	Jsonb	   *metadata;		/* the whole metadata, or NULL */
} EventOverrides;

/* Whom an event is about, as it is sent; neither, where that cannot be said. */
typedef struct EventCustomer
{
	bool		has_id;
	pg_uuid_t	id;				/* Polar's own, if has_id */
	TextView	external_id;	/* the application's, .data == NULL if not sent */
	char		number[256];	/* what external_id points to if a tag is a
								 * number */
} EventCustomer;

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
	RefusedEvent *refused;		/* ascending by index, one entry an event */
	int64		retry_after_ms; /* -1: not given */
	char	   *error;			/* for ledger and status; no secret, no
								 * customer data; NULL when delivered */
} Verdict;

#define POLAR_INGEST_PATH "/v1/events/ingest"

extern bool abp_polar_check(const UsageRow *row, const EventFormat *format,
							StringInfo reason);
extern void abp_polar_customer(const UsageRow *row, const EventFormat *format,
							   EventCustomer *customer);
extern bool abp_polar_encode(StringInfo body, const UsageRow *row,
							 const EventFormat *format,
							 const EventOverrides *overrides,
							 StringInfo reason);
extern char *abp_polar_amount(Numeric cost_cents);
extern Verdict *abp_polar_judge(long http_status, const char *body, size_t len,
								bool truncated, const char *retry_after,
								int nevents, TimestampTz now);

#endif							/* ABP_POLAR_H */
