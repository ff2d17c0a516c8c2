/*-------------------------------------------------------------------------
 *
 * batch.h
 *	  A batch: from ids to a request that is in the ledger.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_BATCH_H
#define ABP_BATCH_H

#include "postgres.h"

#include "base/idset.h"
#include "polar/server.h"
#include "queue/attachment.h"
#include "ship/shipment.h"
#include "ship/turn.h"

/* Take the next rows of a table and enter them in the ledger. */
typedef struct NextBatch
{
	bool		found;
	int			gather_ms;		/* if less was waiting than may be sent */
	Shipment   *shipment;
} NextBatch;

/* Which rows of a delivery are there still, of those with these ids. */
typedef struct SentRows
{
	const Shipment *shipment;
	IdSet	   *ids;
	MemoryContext context;		/* holds "there" */
	IdSet		there;
} SentRows;

extern void abp_batch_next(Turn *turn, const UsageTable *table,
						   const ServerOptions *server, void *arg);
extern void abp_batch_again(Turn *turn, const UsageTable *table,
							const ServerOptions *server, void *arg);
extern void abp_batch_find_sent(Turn *turn, const UsageTable *table,
								const ServerOptions *server, void *arg);
extern void abp_batch_report_vanished(const Delivery *delivery, const UsageTable *table,
									  int64 before);

#endif							/* ABP_BATCH_H */
