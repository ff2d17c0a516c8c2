/*-------------------------------------------------------------------------
 *
 * event.c
 *	  A usage row as an event of Polar's Events Ingest API.
 *
 * Pure: no I/O, no SPI, no catalogue access (but for the conversion of text
 * in databases whose encoding is not UTF8).
 *
 * The rules for events are those of the schemas of POST /v1/events/ingest
 * (server/polar/event/schemas.py of polarsource/polar) and the limits that
 * its documentation states for metadata.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "mb/pg_wchar.h"
#include "utils/datetime.h"

#include "base/json_writer.h"
#include "base/text_view.h"
#include "base/usage_row.h"
#include "polar/event.h"
#include "polar/event_format.h"
#include "polar/identity.h"
#include "polar/limits.h"
#include "polar/metadata.h"

/* Julian days of 0001-01-01 and 9999-12-31 */
#define FIRST_DAY			1721426
#define LAST_DAY			5373484

#define DEFAULT_EVENT_NAME	"llm_usage"

/* Two decimal digits for each number below 100. */
static const char digit_pairs[] =
"00010203040506070809101112131415161718192021222324"
"25262728293031323334353637383940414243444546474849"
"50515253545556575859606162636465666768697071727374"
"75767778798081828384858687888990919293949596979899";

/* Two decimal digits. */
static inline char *
put_pair(char *p, int value)
{
	memcpy(p, &digit_pairs[value * 2], 2);
	return p + 2;
}

/* A time as "YYYY-MM-DDTHH:MM:SS.ffffffZ", quotes included. */
static bool
put_timestamp(JsonWriter *w, TimestampTz at)
{
	int64		day = at / USECS_PER_DAY;
	int64		time = at % USECS_PER_DAY;
	int			year;
	int			month;
	int			mday;
	int			seconds;
	int			micros;
	char	   *p;

	if (time < 0)
	{
		time += USECS_PER_DAY;
		day--;
	}
	day += POSTGRES_EPOCH_JDATE;

	if (TIMESTAMP_NOT_FINITE(at) || day < FIRST_DAY || day > LAST_DAY)
		return abp_json_refuse(w, "occurred_at must be within the years 1 to 9999");
	if (day == FIRST_DAY && time == 0)
		return abp_json_refuse(w, "occurred_at must be after 0001-01-01 00:00:00 UTC, which Polar stores as -infinity");
	if (w->body == NULL)
		return true;

	j2date((int) day, &year, &month, &mday);
	seconds = (int) (time / USECS_PER_SEC);
	micros = (int) (time % USECS_PER_SEC);

	p = reserve(w->body, 29);
	*p++ = '"';
	p = put_pair(p, year / 100);
	p = put_pair(p, year % 100);
	*p++ = '-';
	p = put_pair(p, month);
	*p++ = '-';
	p = put_pair(p, mday);
	*p++ = 'T';
	p = put_pair(p, seconds / SECS_PER_HOUR);
	*p++ = ':';
	p = put_pair(p, seconds / SECS_PER_MINUTE % MINS_PER_HOUR);
	*p++ = ':';
	p = put_pair(p, seconds % SECS_PER_MINUTE);
	*p++ = '.';
	p = put_pair(p, micros / 10000);
	p = put_pair(p, micros / 100 % 100);
	p = put_pair(p, micros % 100);
	*p++ = 'Z';
	*p++ = '"';
	w->body->len = p - w->body->data;
	return true;
}

/*
 * The event's name: the function's, the row's, or the server's, in which
 * {provider} and {model} are replaced.
 */
static bool
put_name(JsonWriter *w, const UsageRow *row, const EventFormat *format,
		 TextView override)
{
	TextView	name = override;
	char		expanded[MAX_NAME_CHARS * MAX_MULTIBYTE_CHAR_LEN];

	if (name.data == NULL)
		name = row->event_name;
	if (name.data == NULL)
	{
		const char *template = format->event_name;

		if (template == NULL)
			template = DEFAULT_EVENT_NAME;
		name.data = template;
		name.len = strlen(template);

		if (memchr(template, '{', name.len) != NULL)
		{
			int			len = 0;

			while (*template != '\0')
			{
				TextView	piece = {template, 1};

				if (strncmp(template, "{provider}", 10) == 0)
				{
					piece = row->provider;
					template += 10;
				}
				else if (strncmp(template, "{model}", 7) == 0)
				{
					piece = row->model;
					template += 7;
				}
				else
					template++;

				if (piece.data == NULL || piece.len == 0)
				{
					piece.data = "unknown";
					piece.len = strlen(piece.data);
				}
				if (piece.len > (int) sizeof(expanded) - len)
					return abp_json_refuse(w, "event name must not exceed %d characters",
										   MAX_NAME_CHARS);
				memcpy(expanded + len, piece.data, piece.len);
				len += piece.len;
			}
			name.data = expanded;
			name.len = len;
		}
	}

	if (name.len == 0)
		return abp_json_refuse(w, "event name must not be empty");
	if (text_longer_than(name.data, name.len, MAX_NAME_CHARS))
		return abp_json_refuse(w, "event name must not exceed %d characters", MAX_NAME_CHARS);
	abp_json_put_string(w, name.data, name.len);
	return true;
}

/* A whole event; false with a reason if Polar would refuse it. */
static bool
put_event(JsonWriter *w, const UsageRow *row, const EventFormat *format,
		  const EventOverrides *overrides)
{
	static const EventOverrides no_overrides = {{NULL, 0}, NULL};
	bool		checking = (w->body == NULL);
	Identity	identity;

	if (overrides == NULL)
		overrides = &no_overrides;

	if (row->tags != NULL && !JB_ROOT_IS_OBJECT(row->tags))
		return abp_json_refuse(w, "tags must be an object");
	if (!abp_identity_find(w, row, format, &identity))
		return false;

	abp_json_put_literal(w, "{\"name\":");
	if (!(checking && format->has_event_name_function) &&
		!put_name(w, row, format, overrides->event_name))
		return false;

	abp_json_put_literal(w, ",\"timestamp\":");
	if (!put_timestamp(w, row->occurred_at))
		return false;

	if (row->external_id.data == NULL || row->external_id.len == 0)
		return abp_json_refuse(w, "external_id must not be empty");
	if (row->external_id.len > MAX_ID_BYTES)
		return abp_json_refuse(w, "external_id must not exceed %d bytes", MAX_ID_BYTES);
	abp_json_put_literal(w, ",\"external_id\":");
	abp_json_put_string(w, row->external_id.data, row->external_id.len);

	/* Polar knows either pair of identity and member, and ignores a mixture. */
	if (identity.kind == IDENTITY_CUSTOMER)
	{
		abp_json_put_literal(w, ",\"customer_id\":");
		abp_json_put_uuid(w, &identity.customer_id);
		if (row->member_id != NULL)
		{
			if (!abp_is_uuid_v4(row->member_id))
				return abp_json_refuse(w, "member_id must be a UUID version 4");
			abp_json_put_literal(w, ",\"member_id\":");
			abp_json_put_uuid(w, row->member_id);
		}
	}
	else
	{
		abp_json_put_literal(w, ",\"external_customer_id\":");
		abp_json_put_string(w, identity.external.data, identity.external.len);
		if (row->external_member_id.data != NULL && row->external_member_id.len > 0)
		{
			if (row->external_member_id.len > MAX_ID_BYTES)
				return abp_json_refuse(w, "external_member_id must not exceed %d bytes", MAX_ID_BYTES);
			abp_json_put_literal(w, ",\"external_member_id\":");
			abp_json_put_string(w, row->external_member_id.data, row->external_member_id.len);
		}
	}

	if (row->parent_id.data != NULL && row->parent_id.len > 0)
	{
		if (row->parent_id.len > MAX_ID_BYTES)
			return abp_json_refuse(w, "parent_id must not exceed %d bytes", MAX_ID_BYTES);
		if (text_view_equal(row->parent_id, row->external_id))
			return abp_json_refuse(w, "parent_id must not be the row's own external_id: Polar would never count the event");
		abp_json_put_literal(w, ",\"parent_id\":");
		abp_json_put_string(w, row->parent_id.data, row->parent_id.len);
	}

	abp_json_put_literal(w, ",\"metadata\":");
	if (overrides->metadata != NULL)
	{
		if (!abp_metadata_put_own(w, overrides->metadata))
			return false;
	}
	else if (!(checking && format->has_metadata_function))
	{
		if (!abp_metadata_put_row(w, row, format, &identity))
			return false;
	}
	abp_json_put_literal(w, "}");

	if (unlikely(w->invalid_text))
		return abp_json_refuse(w, "text must be valid UTF-8");
	return true;
}

/*
 * Would Polar accept the event of this row?  If not, returns false and
 * appends field and rule to reason.  What the user's functions decide is left
 * to abp_event_encode.
 */
bool
abp_event_check(const UsageRow *row, const EventFormat *format, StringInfo reason)
{
	JsonWriter	w = {NULL, reason};

	w.convert = (GetDatabaseEncoding() != PG_UTF8);
	return put_event(&w, row, format, NULL);
}

/*
 * Append the event of this row to body, as one JSON object.  overrides may be
 * NULL.  Returns false, body left as it was, and appends field and rule to
 * reason, if Polar would refuse the event.
 */
bool
abp_event_encode(StringInfo body, const UsageRow *row, const EventFormat *format,
				 const EventOverrides *overrides, StringInfo reason)
{
	JsonWriter	w = {body, reason};
	int			start = body->len;
	bool		ok;

	w.convert = (GetDatabaseEncoding() != PG_UTF8);
	ok = put_event(&w, row, format, overrides);
	if (!ok)
		body->len = start;
	body->data[body->len] = '\0';
	return ok;
}
