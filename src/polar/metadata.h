/*-------------------------------------------------------------------------
 *
 * metadata.h
 *	  An event's metadata: of the row, or of the user's own function.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_METADATA_H
#define ABP_METADATA_H

#include "postgres.h"

#include "utils/numeric.h"

#include "base/json_writer.h"
#include "base/usage_row.h"
#include "polar/event_format.h"
#include "polar/identity.h"

extern char *abp_metadata_amount(Numeric cost_cents);
extern bool abp_metadata_put_row(JsonWriter *w, const UsageRow *row,
								 const EventFormat *format,
								 const Identity *identity);
extern bool abp_metadata_put_own(JsonWriter *w, Jsonb *metadata);

#endif							/* ABP_METADATA_H */
