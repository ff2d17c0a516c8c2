/*-------------------------------------------------------------------------
 *
 * polar_events.h
 *	  Events and quantities of meters, as Polar gives them back.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_POLAR_EVENTS_H
#define ABP_POLAR_EVENTS_H

#include "postgres.h"

#include "datatype/timestamp.h"
#include "nodes/pg_list.h"
#include "utils/jsonb.h"
#include "utils/numeric.h"
#include "utils/uuid.h"

#include "ship/reader.h"

/* The most events that a call reads one by one. */
#define MAX_EVENTS_READ 10000

/* An event at Polar; NULL where it has nothing. */
typedef struct PolarEvent
{
	const char *polar_id;
	TimestampTz timestamp;
	const char *name;
	const char *external_id;	/* of its metadata */
	const char *customer_id;
	const char *external_customer_id;
	const char *linked_customer;	/* external id of the customer that it is
									 * shown with */
	bool		is_systems;		/* Polar has made it itself */
	Numeric		cost_cents;		/* a double at Polar */
	Numeric		cost_nanos;
	Jsonb	   *metadata;		/* never NULL */
} PolarEvent;

/* Which events. */
typedef struct EventQuery
{
	TimestampTz from_time;		/* inclusive; DT_NOBEGIN: any */
	TimestampTz to_time;		/* exclusive; DT_NOEND: any */
	const char *external_customer_id;	/* or NULL */
	const char *event_name;		/* or NULL */
	List	   *external_ids;	/* of char *: any of these; NIL: any */
	bool		only_sent;		/* not those that Polar makes itself */
} EventQuery;

typedef bool (*PolarEventCallback) (const PolarEvent *event, void *arg);
typedef void (*QuantityCallback) (TimestampTz timestamp, Numeric quantity, void *arg);

extern int64 abp_polar_events_read(Reader *reader, const EventQuery *query,
								   PolarEventCallback callback, void *arg);
extern void abp_polar_events_read_meter(Reader *reader, const pg_uuid_t *meter,
										TimestampTz from_time, TimestampTz to_time,
										const char *step, const char *external_customer_id,
										QuantityCallback callback, void *arg);

#endif							/* ABP_POLAR_EVENTS_H */
