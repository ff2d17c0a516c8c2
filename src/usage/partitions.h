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

extern void abp_partitions_come(Oid usage_table, Oid partition, int64 ledger_from);
extern Oid	abp_partitions_pending(Oid relid);
extern bool abp_partitions_leaving(Oid usage_table, const IdSet *ids, Vanished *rows,
								   MemoryContext context);

#endif							/* ABP_PARTITIONS_H */
