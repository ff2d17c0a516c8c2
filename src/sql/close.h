/*-------------------------------------------------------------------------
 *
 * close.h
 *	  What would miss its month's invoice.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_CLOSE_H
#define ABP_CLOSE_H

#include "postgres.h"

#include "datatype/timestamp.h"

#include "queue/attachment.h"

extern char *abp_close_words(const UsageTable *table, TimestampTz now);

#endif							/* ABP_CLOSE_H */
