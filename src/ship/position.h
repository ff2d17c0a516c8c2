/*-------------------------------------------------------------------------
 *
 * position.h
 *	  How a table stands: where its scans are, how it has behaved, and work on it that may fail.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_POSITION_H
#define ABP_POSITION_H

#include "postgres.h"

#include "datatype/timestamp.h"
#include "nodes/pg_list.h"

#include "base/idset.h"
#include "polar/server.h"
#include "queue/attachment.h"
#include "queue/outbox.h"
#include "ship/guard.h"
#include "ship/turn.h"

/* When to try again a table that another transaction has locked. */
#define LOCKED_MS 250

/* Where the scans over a table's entries stand, and how it has behaved. */
typedef struct Position
{
	Oid			usage_table;
	int64		cursor;
	TimestampTz restart_at;
	IdSet		held;			/* rows that others were changing, */
	TimestampTz held_until;		/* to be looked at again then */
	TimestampTz held_since;		/* some of them, without a break */
	bool		backlog;		/* did the last look leave rows behind? */
	int			batch_size;		/* adapted to our memory; 0: as configured */
	int			row_too_large;	/* how often in a row one alone was too much */
	int			event_bytes;	/* an event's, on average in the last request */

	/* rows that wait for a price */
	EntryCursor unpriced_cursor;
	TimestampTz unpriced_at;	/* not before this */
	uint64		scanned_for;	/* generation of prices when the scan began */
	uint64		looked_for;		/* that of the last scan that was complete */
	bool		unpriced_left;	/* has this one passed any over? */

	/* when the table has its turn */
	uint64		servers_seen;	/* generation of servers at its last turn */
	TimestampTz served_at;
	TimestampTz try_at;			/* it is locked: not before this */
	TimestampTz locked_since;	/* 0: it is not */
	bool		slow;
	bool		failed;			/* in this turn: no more of it */
	bool		barred;			/* is not served at present */
	int			rests;			/* how often in a row nothing could be sent */
} Position;

/* Work on one table that fails without harm to others. */
typedef void (*TableWork) (Turn *turn, const UsageTable *table,
						   const ServerOptions *server, void *arg);

extern Position *abp_position_of(Oid usage_table);
extern bool abp_position_wants_prices(const Position *position);
extern bool abp_position_servers_are_new(const UsageTable *table);
extern void abp_position_look_again(Turn *turn, Oid usage_table);
extern void abp_position_block(Turn *turn, const UsageTable *table, const char *reason,
							   TimestampTz until);
extern void abp_position_hold_rows(Turn *turn, const UsageTable *table, const IdSet *ids);
extern GuardOutcome abp_position_guarded(Turn *turn, TableWork work,
										 const UsageTable *table,
										 const ServerOptions *server,
										 void *arg);
extern void abp_position_refuse(Turn *turn, const UsageTable *table, const char *reason);
extern void abp_positions_forget_except(List *tables);
extern bool abp_positions_saw_prices(Oid relid);
extern bool abp_position_is_locked_out(Oid relid);
extern void abp_positions_note_changes(bool prices, bool servers);
extern void abp_position_begin_price_scan(Position *position);
extern void abp_position_saw_servers(Position *position);
extern void abp_positions_forget(void);

#endif							/* ABP_POSITION_H */
