/*-------------------------------------------------------------------------
 *
 * unpriced.h
 *	  Rows that wait for a price: priced when it has come.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_UNPRICED_H
#define ABP_UNPRICED_H

#include "postgres.h"

#include "polar/server.h"
#include "queue/attachment.h"
#include "ship/turn.h"

extern void abp_unpriced_scan(Turn *turn, const UsageTable *table,
							  const ServerOptions *server);

#endif							/* ABP_UNPRICED_H */
