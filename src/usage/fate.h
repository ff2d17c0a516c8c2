/*-------------------------------------------------------------------------
 *
 * fate.h
 *	  What a row deserves: to be sent, or to wait for its time, a price, or somebody to fix it.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_FATE_H
#define ABP_FATE_H

#include "postgres.h"

#include "utils/relcache.h"

#include "base/usage_row.h"
#include "polar/server.h"
#include "price/price.h"
#include "queue/outbox.h"

extern void abp_fate_check(Relation rel, const UsageRow *row,
						   const bool *nulls);
extern bool abp_fate_normalize(UsageRow *row, StringInfo reason, char **doubt);
extern PriceRequest abp_fate_price_request(const UsageRow *row);
extern bool abp_fate_price_if_sound(UsageRow *row, PricedCost *cost);
extern char *abp_fate_doubt(const UsageRow *row);
extern void abp_fate_by_price(const UsageRow *row, RowState *fate);
extern bool abp_fate_cost(const UsageRow *row, PricedCost *cost,
						  char **problem);
extern void abp_fate_of(const UsageRow *row, const ServerOptions *server,
						RowState *fate);
extern void abp_fate_before_encoding(const UsageRow *row,
									 const ServerOptions *server,
									 RowState *fate);

#endif							/* ABP_FATE_H */
