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

extern bool abp_triggers_row_left(Oid usage_table, int64 id, int64 ledger_from,
								  bool *outcome_unknown);

#endif							/* ABP_TRIGGERS_H */
