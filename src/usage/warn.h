/*-------------------------------------------------------------------------
 *
 * warn.h
 *	  Warnings of rows that are stored and not sent as they are.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_WARN_H
#define ABP_WARN_H

#include "postgres.h"

#include "utils/relcache.h"

#include "base/usage_row.h"
#include "price/price.h"

/* To a subscription's worker every change is a statement: it warns as often in this time. */
#define ABP_WORKER_WARNINGS_MS 60000

extern void abp_warn_rejected(Relation rel, int64 id, const char *reason);
extern void abp_warn_doubt(const char *doubt);
extern void abp_warn_unpriced(const UsageRow *row, const char *reason);
extern void abp_warn_no_output(const UsageRow *row, const PriceRequest *request,
							   const PricedCost *cost);

#endif							/* ABP_WARN_H */
