/*-------------------------------------------------------------------------
 *
 * share_key.h
 *	  By what sums of usage rows are kept: day, customer, provider, model, event name.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_SHARE_KEY_H
#define ABP_SHARE_KEY_H

#include "postgres.h"

#include "lib/stringinfo.h"
#include "utils/date.h"
#include "utils/uuid.h"

#include "base/bytes.h"
#include "base/usage_row.h"
#include "polar/identity.h"

/* data == NULL is SQL's NULL. */
typedef struct ShareKey
{
	DateADT		day;			/* UTC */
	TextView	external_customer_id;
	const pg_uuid_t *customer_id;	/* NULL: none */
	TextView	provider;
	TextView	model;
	TextView	event_name;		/* the row's own */
} ShareKey;

/*
 * A key as bytes has a byte of flags, which of its parts are not NULL; the
 * customer; and the kind of call, which is the rest.  Strings are in UTF-8,
 * whatever the database's encoding.
 */
#define HAS_EXTERNAL_CUSTOMER 0x01
#define HAS_CUSTOMER 0x02
#define HAS_PROVIDER 0x04
#define HAS_MODEL 0x08
#define HAS_EVENT_NAME 0x10

#define CUSTOMER_FLAGS (HAS_EXTERNAL_CUSTOMER | HAS_CUSTOMER)

/* Which parts of a key's customer are not NULL. */
static inline int
abp_share_key_customer_flags(const ShareKey *key)
{
	return (key->external_customer_id.data != NULL ? HAS_EXTERNAL_CUSTOMER : 0) |
		(key->customer_id != NULL ? HAS_CUSTOMER : 0);
}

/* The same of its kind of call. */
static inline int
abp_share_key_kind_flags(const ShareKey *key)
{
	return (key->provider.data != NULL ? HAS_PROVIDER : 0) |
		(key->model.data != NULL ? HAS_MODEL : 0) |
		(key->event_name.data != NULL ? HAS_EVENT_NAME : 0);
}

extern void abp_share_key_of_row(ShareKey *key, const UsageRow *row, const EventFormat *format,
								 EventCustomer *customer);
extern const EventFormat *abp_share_key_format(Oid serverid);
extern DateADT abp_share_key_day(TimestampTz time);
extern DateADT abp_share_key_month(DateADT day, int months_later);
extern ShareKey abp_share_key_by_model(const ShareKey *key);
extern ShareKey abp_share_key_by_customer(const ShareKey *key);
extern TextView abp_share_key_utf8(TextView part);
extern void abp_share_key_put_kind(StringInfo to, const ShareKey *key);
extern void abp_share_key_write(StringInfo to, const ShareKey *key);
extern void abp_share_key_read(const char *key, int keylen, ShareKey *result, pg_uuid_t *uuid);

#endif							/* ABP_SHARE_KEY_H */
