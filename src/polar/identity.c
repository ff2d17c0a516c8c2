/*-------------------------------------------------------------------------
 *
 * identity.c
 *	  Whom an event is about.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "base/json_member.h"
#include "base/json_writer.h"
#include "base/text_view.h"
#include "base/usage_row.h"
#include "polar/event_format.h"
#include "polar/identity.h"
#include "polar/limits.h"

/* The original's lists: the first tag that is not null decides. */
static const char *const customer_id_keys[] = {
	"customerId", "polarCustomerId", "customer_id", NULL
};
static const char *const external_customer_id_keys[] = {
	"userId", "externalId", "user_id", NULL
};

/*
 * Read a UUID in the forms that Polar reads: 36 characters with hyphens, 32
 * without, either with "urn:uuid:" before it or in braces.
 */
static bool
read_uuid(TextView str, pg_uuid_t *uuid)
{
	const char *p = str.data;
	int			len = str.len;
	bool		hyphens;

	if (len > 9 && memcmp(p, "urn:uuid:", 9) == 0)
	{
		p += 9;
		len -= 9;
	}
	else if (len > 2 && p[0] == '{' && p[len - 1] == '}')
	{
		p++;
		len -= 2;
	}

	if (len != 36 && len != 32)
		return false;
	hyphens = (len == 36);

	for (int i = 0; i < UUID_LEN; i++)
	{
		int			byte = 0;

		if (hyphens && (i == 4 || i == 6 || i == 8 || i == 10) && *p++ != '-')
			return false;
		for (int nibble = 0; nibble < 2; nibble++)
		{
			char		c = *p++;

			byte <<= 4;
			if (c >= '0' && c <= '9')
				byte |= c - '0';
			else if (c >= 'a' && c <= 'f')
				byte |= c - 'a' + 10;
			else if (c >= 'A' && c <= 'F')
				byte |= c - 'A' + 10;
			else
				return false;
		}
		uuid->data[i] = byte;
	}
	return true;
}

/*
 * Look for an identity among the tags, as the original does: the first key
 * that is there and not null decides, and if it is '', 0 or false there is
 * none.  Returns false if what is there can be no identity.
 */
static bool
find_identity_tag(JsonWriter *w, JsonbContainer *tags, const char *key,
				  const char *const *default_keys, Identity *identity)
{
	const char *const single[] = {key, NULL};
	const char *const *keys = key != NULL ? single : default_keys;
	JsonbValue	value;
	char	   *str;

	for (;; keys++)
	{
		if (*keys == NULL)
			return true;
		if (abp_json_member(tags, *keys, &value))
			break;
	}
	key = *keys;

	switch (value.type)
	{
		case jbvString:
			identity->external.data = value.val.string.val;
			identity->external.len = value.val.string.len;
			break;
		case jbvBool:
			if (value.val.boolean)
				return abp_json_refuse(w, "tag \"%.*s\" must be a string or a number to identify the customer, not true",
									   abp_quoted_len(key, strlen(key)), key);
			identity->external.len = 0;
			break;
		case jbvNumeric:
			str = numeric_normalize(value.val.numeric);
			if (strlen(str) > MAX_ID_BYTES)
				return abp_json_refuse(w, "tag \"%s\" must not exceed %d bytes", key, MAX_ID_BYTES);
			strcpy(identity->number, str);
			identity->external.data = identity->number;
			identity->external.len = strcmp(str, "0") == 0 ? 0 : strlen(str);
			pfree(str);
			break;
		default:
			return abp_json_refuse(w, "tag \"%.*s\" must be a string or a number to identify the customer",
								   abp_quoted_len(key, strlen(key)), key);
	}

	if (identity->external.len == 0)
		return true;
	if (default_keys == customer_id_keys)
	{
		if (!read_uuid(identity->external, &identity->customer_id) ||
			!abp_is_uuid_v4(&identity->customer_id))
			return abp_json_refuse(w, "tag \"%.*s\" must be a UUID version 4 to be Polar's customer id",
								   abp_quoted_len(key, strlen(key)), key);
		identity->kind = IDENTITY_CUSTOMER;
	}
	else
	{
		if (identity->external.len > MAX_ID_BYTES)
			return abp_json_refuse(w, "tag \"%.*s\" must not exceed %d bytes to identify the customer",
								   abp_quoted_len(key, strlen(key)), key, MAX_ID_BYTES);
		identity->kind = IDENTITY_EXTERNAL;
	}
	return true;
}

/* Whom the event is about: the columns, then the tags. */
bool
abp_identity_find(JsonWriter *w, const UsageRow *row, const EventFormat *format,
				  Identity *identity)
{
	identity->kind = IDENTITY_NONE;

	if (row->customer_id != NULL)
	{
		if (!abp_is_uuid_v4(row->customer_id))
			return abp_json_refuse(w, "customer_id must be a UUID version 4");
		identity->kind = IDENTITY_CUSTOMER;
		identity->customer_id = *row->customer_id;
	}
	else if (row->external_customer_id.data != NULL)
	{
		if (row->external_customer_id.len == 0)
			return abp_json_refuse(w, "external_customer_id must not be empty");
		if (row->external_customer_id.len > MAX_ID_BYTES)
			return abp_json_refuse(w, "external_customer_id must not exceed %d bytes", MAX_ID_BYTES);
		identity->kind = IDENTITY_EXTERNAL;
		identity->external = row->external_customer_id;
	}
	else if (row->tags != NULL)
	{
		if (!find_identity_tag(w, &row->tags->root, format->customer_id_key,
							   customer_id_keys, identity))
			return false;
		if (identity->kind == IDENTITY_NONE &&
			!find_identity_tag(w, &row->tags->root, format->external_customer_id_key,
							   external_customer_id_keys, identity))
			return false;
	}

	if (identity->kind == IDENTITY_NONE)
		return abp_json_refuse(w, "no customer: customer_id or external_customer_id must be set, or a tag that identifies the customer");
	return true;
}

/*
 * Whom a row is about: its columns, whatever Polar thinks of them, or else the
 * tag by which it is sent.  The result points into the row and into itself.
 */
void
abp_identity_customer(const UsageRow *row, const EventFormat *format, EventCustomer *customer)
{
	StringInfoData reason;
	JsonWriter	w = {NULL, &reason};
	Identity	identity;

	customer->has_id = row->customer_id != NULL;
	customer->external_id.data = NULL;
	customer->external_id.len = 0;
	if (row->customer_id != NULL)
		customer->id = *row->customer_id;
	else if (row->external_customer_id.data != NULL)
		customer->external_id = row->external_customer_id;
	if (row->customer_id != NULL || row->external_customer_id.data != NULL ||
		row->tags == NULL || JsonContainerSize(&row->tags->root) == 0)
		return;

	initStringInfo(&reason);
	if (!abp_identity_find(&w, row, format, &identity))
		return;
	customer->has_id = identity.kind == IDENTITY_CUSTOMER;
	if (customer->has_id)
		customer->id = identity.customer_id;
	else
	{
		customer->external_id = identity.external;
		if (identity.external.data == identity.number)
		{
			strcpy(customer->number, identity.number);
			customer->external_id.data = customer->number;
		}
	}
}
