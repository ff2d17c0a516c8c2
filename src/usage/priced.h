/*-------------------------------------------------------------------------
 *
 * priced.h
 *	  What pricing makes of a row: the tuple that is stored, and its place in
 *	  the outbox.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_PRICED_H
#define ABP_PRICED_H

#include "postgres.h"

#include "access/htup.h"
#include "utils/relcache.h"

#include "base/idset.h"
#include "base/usage_row.h"
#include "price/price.h"
#include "queue/attachment.h"
#include "queue/outbox.h"
#include "queue/place.h"
#include "usage/relation.h"

extern HeapTuple abp_priced_tuple(UsageRelation *known, TupleDesc desc,
								  const UsageRow *row, bool normalized, bool stripped,
								  const PricedCost *cost);
extern bool abp_priced_by_us(const UsageRelation *known, int64 id);
extern void abp_priced_state(const UsageRelation *known, const UsageRow *row, RowState *state);
extern void abp_priced_requeue(UsageRelation *known, Relation rel, const UsageRow *row,
							   const RowPlace *place);
extern IdSet abp_priced_reprice(const UsageTable *table, IdSet *ids, bool held);

#endif							/* ABP_PRICED_H */
