/*-------------------------------------------------------------------------
 *
 * settle.h
 *	  What becomes of a request.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_SETTLE_H
#define ABP_SETTLE_H

#include "postgres.h"

#include "nodes/pg_list.h"

#include "ship/shipment.h"
#include "ship/turn.h"

extern void abp_settle_by_halves(Shipment *shipment, const char *error);
extern void abp_settle_answered(Turn *turn, List *tables);
extern void abp_settle_orphans(Turn *turn, List *tables);

#endif							/* ABP_SETTLE_H */
