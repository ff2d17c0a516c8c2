/*-------------------------------------------------------------------------
 *
 * outbox.h
 *	  The outbox, the ledger and the usage rows: all their SQL.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_OUTBOX_H
#define ABP_OUTBOX_H

#include "postgres.h"

#include "datatype/timestamp.h"
#include "utils/uuid.h"

#include "cost.h"

/* A usage row in C.  Strings point into the tuple that it was read from. */
typedef struct UsageRow
{
	int64		id;
	TextView	external_id;
	TimestampTz occurred_at;
	TextView	event_name;
	TextView	provider;
	TextView	sub_provider;
	TextView	model;
	TextView	service_tier;
	TextView	generation_id;
	const pg_uuid_t *customer_id;	/* NULL if not set */
	TextView	external_customer_id;
	const pg_uuid_t *member_id; /* NULL if not set */
	TextView	external_member_id;
	TextView	parent_id;
	UsageCounts counts;
	Jsonb	   *raw_usage;		/* NULL if not set */
	TextView	usage_format;
	Numeric		provider_cost;	/* NULL if not set */
	Jsonb	   *tags;			/* never NULL */
	bool		has_cost_nanos;
	int64		cost_nanos;
	Numeric		cost_cents;		/* NULL if not known */
	TextView	cost_status;
} UsageRow;

#endif							/* ABP_OUTBOX_H */
