/*-------------------------------------------------------------------------
 *
 * event.h
 *	  A usage row as an event of Polar's Events Ingest API.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_EVENT_H
#define ABP_EVENT_H

#include "postgres.h"

#include "lib/stringinfo.h"

#include "base/usage_row.h"
#include "polar/event_format.h"

extern bool abp_event_check(const UsageRow *row, const EventFormat *format,
							StringInfo reason);
extern bool abp_event_encode(StringInfo body, const UsageRow *row,
							 const EventFormat *format,
							 const EventOverrides *overrides,
							 StringInfo reason);

#endif							/* ABP_EVENT_H */
