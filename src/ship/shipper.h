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

#include "polar/event_format.h"
#include "polar/server.h"
#include "ship/guard.h"

/* Who ships, and what. */
typedef struct ShipScope
{
	bool		in_procedure;	/* commits through SPI, as CALL allows */
	Oid			owner;			/* only tables that this role owns;
								 * InvalidOid: all */
	const char *server;			/* only this server's tables; NULL: all */
} ShipScope;

extern bool abp_ship_lock(void);
extern void abp_ship_unlock(void);
extern void abp_ship_reset(void);
extern long abp_ship(const ShipScope *scope);
extern bool abp_ship_in_scope(const ShipScope *scope, const UsageTable *table);
extern void abp_ship_begin(const ShipScope *scope);
extern void abp_ship_commit(const ShipScope *scope);
extern GuardOutcome abp_ship_call_functions(const ServerOptions *server, Jsonb *whole,
											EventOverrides *overrides, char **reason);
extern int64 abp_ship_delivered(void);
extern bool abp_ship_gave_up(const UsageTable *table);
extern bool abp_ship_has_looked_for_prices(Oid relid);
extern bool abp_ship_is_locked_out(Oid relid);
extern int	abp_ship_pid(void);

#endif							/* ABP_SHIPPER_H */
