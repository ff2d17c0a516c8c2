/*-------------------------------------------------------------------------
 *
 * shipper.h
 *	  Delivery: from the outbox to Polar to the ledger.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_SHIPPER_H
#define ABP_SHIPPER_H

#include "postgres.h"

#include "queue/attachment.h"

/* Who ships, and what. */
typedef struct ShipScope
{
	bool		in_procedure;	/* commits through SPI, as CALL allows */
	Oid			owner;			/* only tables that this role owns;
								 * InvalidOid: all */
	const char *server;			/* only this server's tables; NULL: all */
} ShipScope;

extern void abp_ship_unlock(void);
extern bool abp_ship_lock(void);
extern int	abp_ship_pid(void);
extern void abp_ship_begin(const ShipScope *scope);
extern void abp_ship_commit(const ShipScope *scope);
extern void abp_ship_reset(void);
extern bool abp_ship_in_scope(const ShipScope *scope, const UsageTable *table);
extern long abp_ship(const ShipScope *scope);
extern int64 abp_ship_delivered(void);
extern bool abp_ship_gave_up(const UsageTable *table);

#endif							/* ABP_SHIPPER_H */
