/*-------------------------------------------------------------------------
 *
 * identity.h
 *	  Whom an event is about.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_IDENTITY_H
#define ABP_IDENTITY_H

#include "postgres.h"

#include "utils/uuid.h"

#include "base/json_writer.h"
#include "base/usage_row.h"
#include "polar/event_format.h"
#include "polar/limits.h"

typedef enum IdentityKind
{
	IDENTITY_NONE,
	IDENTITY_CUSTOMER,			/* Polar's own customer id */
	IDENTITY_EXTERNAL			/* the application's customer id */
} IdentityKind;

typedef struct Identity
{
	IdentityKind kind;
	pg_uuid_t	customer_id;	/* IDENTITY_CUSTOMER */
	TextView	external;		/* IDENTITY_EXTERNAL */
	char		number[MAX_ID_BYTES + 1];	/* what external points to if the
											 * tag is a number */
} Identity;

/* Ids of customers and members at Polar are of this version. */
static inline bool
abp_is_uuid_v4(const pg_uuid_t *uuid)
{
	return (uuid->data[6] >> 4) == 4;
}

/* Whom a row is about; neither, where that cannot be said. */
typedef struct EventCustomer
{
	bool		has_id;
	pg_uuid_t	id;				/* Polar's own, if has_id */
	TextView	external_id;	/* the application's, .data == NULL: none */
	char		number[MAX_ID_BYTES + 1];	/* what external_id points to if a
											 * tag is a number */
} EventCustomer;

extern void abp_identity_customer(const UsageRow *row, const EventFormat *format,
								  EventCustomer *customer);
extern bool abp_identity_find(JsonWriter *w, const UsageRow *row,
							  const EventFormat *format, Identity *identity);

#endif							/* ABP_IDENTITY_H */
