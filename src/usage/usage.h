/*-------------------------------------------------------------------------
 *
 * usage.h
 *	  The triggers of usage tables.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_USAGE_H
#define ABP_USAGE_H

#include "postgres.h"

#include "base/idset.h"
#include "polar/polar.h"
#include "polar/server.h"
#include "price/price.h"
#include "queue/outbox.h"

extern void abp_usage_judge(const UsageRow *row, const ServerOptions *server,
							RowState *verdict);
extern void abp_usage_judge_price(const UsageRow *row, RowState *verdict);
extern bool abp_usage_price(const UsageRow *row, PricedCost *cost, char **problem);
extern char *abp_usage_doubt_of(const UsageRow *row);
extern void abp_usage_note_doubt(const char *doubt);
extern IdSet abp_usage_price_again(const UsageTable *table, IdSet *ids);
extern IdSet abp_usage_existing(Oid usage_table, const IdSet *ids);
extern bool abp_usage_row_left(Oid usage_table, int64 id, int64 ledger_from, bool *maybe_sent);
extern void abp_usage_forget_relations(void);

#endif							/* ABP_USAGE_H */
