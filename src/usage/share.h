/*-------------------------------------------------------------------------
 *
 * share.h
 *	  What usage rows add up to, by day, customer, provider, model and event name.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_SHARE_H
#define ABP_SHARE_H

#include "postgres.h"

#include "lib/stringinfo.h"
#include "utils/date.h"
#include "utils/numeric.h"
#include "utils/uuid.h"

#include "polar/identity.h"
#include "usage/row.h"

/* The tokens that are summed up. */
typedef enum ShareTokens
{
	SHARE_INPUT,
	SHARE_CACHE_READ,
	SHARE_CACHE_WRITE,			/* both kinds */
	SHARE_OUTPUT,
	SHARE_REASONING
} ShareTokens;

#define NUM_SHARE_TOKENS (SHARE_REASONING + 1)

/* What the sums are kept by; data == NULL is SQL's NULL. */
typedef struct ShareKey
{
	DateADT		day;			/* UTC */
	TextView	external_customer_id;
	const pg_uuid_t *customer_id;	/* NULL: none */
	TextView	provider;
	TextView	model;
	TextView	event_name;		/* the row's own */
} ShareKey;

/* Decimals of ShareSums.cents. */
#define SHARE_CENTS_SCALE 12

/* The sums; those of nothing are 0. */
typedef struct ShareSums
{
	int64		rows;
	int64		unpriced;		/* of these rows */
	int128		tokens[NUM_SHARE_TOKENS];
	int128		nanos;
	int128		cents;			/* x 10^SHARE_CENTS_SCALE */
	int			cents_scale;	/* decimals that the sum is shown with */
	Numeric		more_cents;		/* what does not fit into "cents", or NULL */
} ShareSums;

typedef struct ShareGroup
{
	uint32		hash;
	int			keylen;
	char	   *key;			/* see abp_share_key_read */
	ShareSums	sums;
} ShareGroup;

/* A table of sums.  All of it is in its memory context. */
typedef struct ShareGroups
{
	MemoryContext context;
	ShareGroup *groups;
	int			ngroups;
	int			max_groups;
	int		   *slots;			/* of a hash table, -1: free */
	int			nslots;			/* a power of 2 */
	StringInfoData key;			/* of the last row */
} ShareGroups;

/* The rows of a batch as bytes.  All of it is in its memory context. */
typedef struct ShareRows
{
	MemoryContext context;
	StringInfoData bytes;
	int		   *ends;			/* of the rows, in "bytes" */
	int			nrows;
	int			max_ends;
	struct share_kinds_hash *kinds; /* the kinds of calls that they name */
} ShareRows;

extern void abp_share_init(ShareGroups *groups, MemoryContext context);
extern ShareKey abp_share_key_by_model(const ShareKey *key);
extern ShareKey abp_share_key_by_customer(const ShareKey *key);
extern ShareGroup *abp_share_group(ShareGroups *groups, const char *key, int keylen);
extern ShareGroup *abp_share_group_of(ShareGroups *groups, const ShareKey *key);
extern ShareGroup *abp_share_find(ShareGroups *groups, const ShareKey *key);
extern void abp_share_key_of_row(ShareKey *key, const UsageRow *row, const EventFormat *format,
								 EventCustomer *customer);
extern void abp_share_sums_of_row(ShareSums *sums, const UsageRow *row);
extern void abp_share_add(ShareGroups *groups, ShareSums *to, const ShareSums *sums);
extern void abp_share_set_cents(ShareSums *sums, Numeric cents);
extern Numeric abp_share_cents(const ShareSums *sums);
extern DateADT abp_share_day(TimestampTz time);
extern DateADT abp_share_month(DateADT day, int months_later);
extern const EventFormat *abp_share_format(Oid serverid);

/* share_bytes.c */
extern void abp_share_key_write(StringInfo to, const ShareKey *key);
extern void abp_share_key_read(const char *key, int keylen, ShareKey *result, pg_uuid_t *uuid);
extern void abp_share_rows_init(ShareRows *rows, MemoryContext context);
extern void abp_share_rows_add(ShareRows *rows, int index, const UsageRow *row,
							   const EventFormat *format);
extern bytea *abp_share_encode(const ShareRows *rows, const bool *skip);

/* What a reader does with a row; the key is in UTF-8. */
typedef void (*ShareReader) (const char *key, int keylen, const ShareSums *sums, void *arg);

extern void abp_share_decode(bytea *share, ShareReader reader, void *arg);

#endif							/* ABP_SHARE_H */
