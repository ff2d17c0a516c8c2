/*-------------------------------------------------------------------------
 *
 * turn.h
 *	  What the rooms of delivery share of a turn: its time, and what it has found.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_TURN_H
#define ABP_TURN_H

#include "postgres.h"

#include "datatype/timestamp.h"
#include "nodes/pg_list.h"

#define PROBE_MS (5 * 60 * 1000)	/* between tries while a server refuses us */
#define TRANSIENT_MS (10 * 1000)	/* after an error that passes by itself */
#define HELD_MS 1000			/* until a row that others change is looked at
								 * again */

/* A row that fails for a reason that may pass is held so long, then doubled. */
#define HOLD_MS (10 * 1000)
#define MAX_HOLDS 5

/*
 * After so long a turn ends, and what it has prepared departs.  Tables that
 * took more than SLOW_MS come last in the next ones.
 */
#define TURN_MS 250

/*
 * After a batch that was not full, the next turn waits this long for each row
 * of it, within these bounds, so that small commits share a request and a
 * single one is sent soon.
 */
#define GATHER_ROW_MS 4
#define GATHER_MIN_MS 10
#define GATHER_MAX_MS 100

/* How many ids taken out of entries are dealt with in one turn, about. */
#define TIDY_PER_TURN 10000

/*
 * What a turn finds out on its way, handed from room to room.  gather_until,
 * delivered and settled last from turn to turn.
 */
typedef struct Turn
{
	MemoryContext context;		/* reset every turn */
	TimestampTz started;
	TimestampTz next_due;		/* DT_NOEND: nothing is known to become due */
	TimestampTz gather_until;	/* no turn before this */
	bool		more_to_build;	/* can another batch be built at once? */
	bool		backlog;		/* does any table have one? */
	bool		room_left;		/* could more requests fly, if there were
								 * more? */
	List	   *busy_servers;	/* OIDs: others are changing what they are
								 * called */
	int64		delivered;		/* events, since this process is the shipper */
	int			settled;		/* deliveries since the ledger was summed up */
} Turn;

/* Lanes, positions, shipments: until this process is the shipper no more. */
extern MemoryContext abp_shipper_memory;

extern bool abp_turn_is_over(Turn *turn);
extern void abp_turn_due_at(Turn *turn, TimestampTz when);
extern TimestampTz abp_turn_in_ms(int64 ms);

#endif							/* ABP_TURN_H */
