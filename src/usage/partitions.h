/*-------------------------------------------------------------------------
 *
 * partitions.h
 *	  Partitions of usage tables that go and come with ALTER TABLE.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_PARTITIONS_H
#define ABP_PARTITIONS_H

#include "postgres.h"

#include "base/idset.h"
#include "queue/vanished.h"

extern bool abp_partitions_leaving(Oid usage_table, const IdSet *ids, Vanished *rows,
								   MemoryContext context);
extern bool abp_partitions_look(Oid usage_table, int64 ledger_from);

#endif							/* ABP_PARTITIONS_H */
