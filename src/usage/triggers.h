/*-------------------------------------------------------------------------
 *
 * triggers.h
 *	  The triggers of usage tables.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_TRIGGERS_H
#define ABP_TRIGGERS_H

#include "postgres.h"

#include "base/idset.h"
#include "queue/attachment.h"

extern bool abp_usage_row_left(Oid usage_table, int64 id, int64 ledger_from,
							   bool *maybe_sent);
extern IdSet abp_price_rows_again(const UsageTable *table, IdSet *ids);

#endif							/* ABP_TRIGGERS_H */
