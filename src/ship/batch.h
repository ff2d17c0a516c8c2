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

extern void abp_batch_next(Turn *turn, const UsageTable *table,
						   const ServerOptions *server, void *arg);
extern void abp_batch_again(Turn *turn, const UsageTable *table,
							const ServerOptions *server, void *arg);

#endif							/* ABP_BATCH_H */
