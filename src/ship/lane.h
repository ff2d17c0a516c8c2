/*-------------------------------------------------------------------------
 *
 * lane.h
 *	  Lanes: a server's pace and pauses.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_LANE_H
#define ABP_LANE_H

#include "postgres.h"

#include "datatype/timestamp.h"

#include "polar/server.h"
#include "queue/attachment.h"
#include "ship/shipment.h"
#include "ship/turn.h"

/*
 * The way to one server, until this process is the shipper no more.  A role with
 * a user mapping of its own has a lane of its own; all others share one.
 */
struct Lane
{
	char		server[NAMEDATALEN];
	Oid			role;			/* with a user mapping of its own; InvalidOid:
								 * the others together */
	int			failures;		/* in a row */
	TimestampTz not_before;
	bool		paused_by_answer;
	uint32		last_token;		/* hash of the token last looked at, 0: none */
	bool		lacks_token;	/* is paused for want of one */
	TimestampTz last_success;
	int			batch_size;		/* adapted to slow answers; 0: as configured */

	/* what aibilling.server_state is to say */
	char	   *reason;			/* or NULL */
	bool		unwritten;
	TimestampTz write_at;		/* not before this */
};

extern Lane *abp_lane_of(const char *server, Oid role);
extern Lane *abp_lane_of_table(const UsageTable *table);
extern const ServerOptions *abp_lane_options(const UsageTable *table);
extern void abp_lanes_write_down(Turn *turn);
extern int64 abp_lane_backoff_ms(int failures);
extern void abp_lane_back_off(Turn *turn, Lane *lane, int64 ms, const char *reason);
extern void abp_lane_failed(Turn *turn, Lane *lane, const char *reason);
extern void abp_lane_pause(Turn *turn, Lane *lane, const char *reason);
extern void abp_lane_try_now(Lane *lane);
extern void abp_lane_succeeded(Turn *turn, Lane *lane);
extern bool abp_lane_take_quota(Turn *turn, const ServerOptions *server);
extern bool abp_lane_is_closed(Turn *turn, Lane *lane, const UsageTable *table,
							   const ServerOptions *server, const char *token,
							   const char *token_problem);
extern int	abp_lane_capacity(const Lane *lane, const ServerOptions *server);
extern bool abp_lane_has_room(const Lane *lane, const ServerOptions *server);
extern int	abp_lane_shipments(const Lane *lane);
extern void abp_lanes_forget(void);

#endif							/* ABP_LANE_H */
