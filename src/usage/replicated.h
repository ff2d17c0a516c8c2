/*-------------------------------------------------------------------------
 *
 * replicated.h
 *	  Rows of a usage table that a subscription feeds.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_REPLICATED_H
#define ABP_REPLICATED_H

#include "postgres.h"

#include "access/htup.h"
#include "utils/relcache.h"

#include "queue/place.h"
#include "usage/relation.h"

extern HeapTuple abp_replicated_insert(UsageRelation *known, Relation rel,
									   HeapTuple tuple);
extern HeapTuple abp_replicated_update(UsageRelation *known, Relation rel,
									   HeapTuple old, HeapTuple tuple);
extern void abp_replicated_delete(const UsageRelation *known, int64 id,
								  const RowPlace *place);
extern void abp_replicated_truncate(Oid usage_table);

#endif							/* ABP_REPLICATED_H */
