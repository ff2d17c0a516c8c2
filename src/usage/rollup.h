/*-------------------------------------------------------------------------
 *
 * rollup.h
 *	  Shares of deliveries into the rollup.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_ROLLUP_H
#define ABP_ROLLUP_H

#include "postgres.h"

#include "queue/attachment.h"
#include "usage/share.h"

extern bool abp_rollup_fold(int64 *from_delivery, int max_groups);
extern bytea *abp_rollup_sum_rows(const UsageTable *table, IdSet *ids, const EventFormat *format);
extern int64 abp_rollup_customer(const ShareKey *key);
extern ShareKey abp_rollup_values(const ShareGroup *group, Datum *values, bool *nulls);

#endif							/* ABP_ROLLUP_H */
