/*-------------------------------------------------------------------------
 *
 * share_key.c
 *	  By what sums of usage rows are kept: day, customer, provider, model, event name.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "mb/pg_wchar.h"
#include "utils/datetime.h"
#include "utils/timestamp.h"

#include "polar/event_format.h"
#include "polar/server.h"
#include "usage/share_key.h"

/* --- of rows, and of sums of less detail --------------------------------------- */

/*
 * The day of a time, UTC.
 */
DateADT
abp_share_key_day(TimestampTz time)
{
	if (TIMESTAMP_IS_NOBEGIN(time))
		return DATEVAL_NOBEGIN;
	if (TIMESTAMP_IS_NOEND(time))
		return DATEVAL_NOEND;
	return (DateADT) (time / USECS_PER_DAY - (time % USECS_PER_DAY < 0 ? 1 : 0));
}

/*
 * The first day of a day's month, or of one so many months later.
 */
DateADT
abp_share_key_month(DateADT day, int months_later)
{
	int			year;
	int			month;
	int			mday;

	if (DATE_NOT_FINITE(day))
		return day;
	j2date(day + POSTGRES_EPOCH_JDATE, &year, &month, &mday);
	return date2j(year, month + months_later, 1) - POSTGRES_EPOCH_JDATE;
}

/*
 * How rows of a table with this server become events, which says who a row's
 * customer is; without one (InvalidOid) as if it had no options.
 */
const EventFormat *
abp_share_key_format(Oid serverid)
{
	static const EventFormat plain = {.tag_prefix = ""};

	return OidIsValid(serverid) ? &abp_server_options(serverid)->format : &plain;
}

/*
 * By what a row is summed up: its customer as it is sent, or would be.  The
 * result points into the row and into *customer.
 */
void
abp_share_key_of_row(ShareKey *key, const UsageRow *row, const EventFormat *format,
					 EventCustomer *customer)
{
	abp_identity_customer(row, format, customer);
	key->day = abp_share_key_day(row->occurred_at);
	key->external_customer_id = customer->external_id;
	key->customer_id = customer->has_id ? &customer->id : NULL;
	key->provider = row->provider;
	key->model = row->model;
	key->event_name = row->event_name;
}

/*
 * A key without what the sums by day and model are not kept by.
 */
ShareKey
abp_share_key_by_model(const ShareKey *key)
{
	return (ShareKey)
	{
		.day = key->day,.provider = key->provider,.model = key->model
	};
}

/*
 * Only the customer of a key, of day 0.
 */
ShareKey
abp_share_key_by_customer(const ShareKey *key)
{
	return (ShareKey)
	{
		.external_customer_id = key->external_customer_id,.customer_id = key->customer_id
	};
}

/* --- as bytes ------------------------------------------------------------------ */

/*
 * A string in UTF-8: itself, or palloc'd.
 */
TextView
abp_share_key_utf8(TextView part)
{
	const char *utf8;

	if (part.data == NULL)
		return part;
	utf8 = pg_server_to_any(part.data, part.len, PG_UTF8);
	if (utf8 != part.data)
		part = text_view_of(utf8);
	return part;
}

static void
put_part(StringInfo to, TextView part)
{
	if (part.data == NULL)
		return;
	part = abp_share_key_utf8(part);
	abp_bytes_put_string(to, part.data, part.len);
}

/*
 * Append a key's kind of call.
 */
void
abp_share_key_put_kind(StringInfo to, const ShareKey *key)
{
	abp_bytes_put_signed(to, key->day);
	put_part(to, key->provider);
	put_part(to, key->model);
	put_part(to, key->event_name);
}

/*
 * Append a key as bytes: equal keys are equal bytes.
 */
void
abp_share_key_write(StringInfo to, const ShareKey *key)
{
	int			flags = abp_share_key_customer_flags(key) | abp_share_key_kind_flags(key);

	appendStringInfoCharMacro(to, (char) flags);
	put_part(to, key->external_customer_id);
	if (key->customer_id != NULL)
		appendBinaryStringInfoNT(to, (const char *) key->customer_id, UUID_LEN);
	abp_share_key_put_kind(to, key);
}

/*
 * What put_part has written, in the database's encoding; NULL if not present.
 */
static TextView
get_part(ByteReader *reader, bool present)
{
	TextView	view = {NULL, 0};
	const char *utf8;

	if (!present)
		return view;
	view = abp_bytes_get_string(reader);
	utf8 = view.data;
	view.data = pg_any_to_server(utf8, view.len, PG_UTF8);
	if (view.data != utf8)
		view.len = strlen(view.data);
	return view;
}

/*
 * Read what abp_share_key_write has written.  Strings point into the key or,
 * converted to the database's encoding, into the current memory context; the
 * customer's UUID is copied to *uuid.
 */
void
abp_share_key_read(const char *key, int keylen, ShareKey *result, pg_uuid_t *uuid)
{
	ByteReader	reader = {key, key + keylen, "the key of a sum"};
	int			flags = *abp_bytes_get(&reader, 1);

	result->external_customer_id = get_part(&reader, flags & HAS_EXTERNAL_CUSTOMER);
	result->customer_id = NULL;
	if (flags & HAS_CUSTOMER)
	{
		memcpy(uuid, abp_bytes_get(&reader, UUID_LEN), UUID_LEN);
		result->customer_id = uuid;
	}
	result->day = (DateADT) abp_bytes_get_signed(&reader);
	result->provider = get_part(&reader, flags & HAS_PROVIDER);
	result->model = get_part(&reader, flags & HAS_MODEL);
	result->event_name = get_part(&reader, flags & HAS_EVENT_NAME);
}
