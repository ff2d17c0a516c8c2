/*-------------------------------------------------------------------------
 *
 * usage_row.h
 *	  A usage row in C: what all that is done with a row starts from.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_USAGE_ROW_H
#define ABP_USAGE_ROW_H

#include "postgres.h"

#include "datatype/timestamp.h"
#include "utils/jsonb.h"
#include "utils/numeric.h"
#include "utils/uuid.h"

#include "base/text_view.h"

/*
 * The counted quantities of a usage row that have a column of their own, in
 * the order of the table's columns.
 */
typedef enum UsageCount
{
	COUNT_INPUT,				/* all prompt tokens, cached ones included */
	COUNT_CACHE_READ,			/* subset of COUNT_INPUT */
	COUNT_CACHE_WRITE,			/* subset of COUNT_INPUT: 5-minute writes */
	COUNT_CACHE_WRITE_1H,		/* subset of COUNT_INPUT: 1-hour writes */
	COUNT_OUTPUT,				/* all completion tokens, reasoning included */
	COUNT_REASONING,			/* subset of COUNT_OUTPUT */
	COUNT_REQUEST,
	COUNT_WEB_SEARCH
} UsageCount;

#define NUM_USAGE_COUNTS (COUNT_WEB_SEARCH + 1)

typedef struct UsageCounts
{
	int64		value[NUM_USAGE_COUNTS];	/* 0 where not given */
	bool		given[NUM_USAGE_COUNTS];	/* false: the column is NULL */
	Jsonb	   *units;			/* further quantities by name, or NULL */
} UsageCounts;

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
	bool		tags_are_null;	/* SQL's or JSON's */
	bool		has_cost_nanos;
	int64		cost_nanos;
	Numeric		cost_cents;		/* NULL if not known */
	const char *cents_text;		/* the same as text, in rows that
								 * abp_rows_read has read; else NULL */
	TextView	cost_status;
	bool		maybe_changing; /* another transaction may be changing it;
								 * only in rows that abp_rows_read has read */
	const struct UsageColumns *columns; /* of its table; NULL: all plain */
} UsageRow;

#endif							/* ABP_USAGE_ROW_H */
