/*-------------------------------------------------------------------------
 *
 * fill.h
 *	  A request's body, filled from usage rows.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_FILL_H
#define ABP_FILL_H

#include "postgres.h"

#include "polar/server.h"
#include "queue/attachment.h"
#include "ship/shipment.h"
#include "ship/turn.h"

/* Why rows are rejected of which the outbox cannot tell one from the other. */
#define SHARED_ID "id: several rows have it; delete all but one, and insert them with ids of their own"

/* While a batch is filled from usage rows. */
typedef struct Filling
{
	Turn	   *turn;
	Shipment   *shipment;
	const UsageTable *table;
	const ServerOptions *server;
	char		taken_from;		/* the rows' state, 0: they have been sent
								 * before */
	bool		rows_are_settled;	/* nobody is changing those that come now */
	int64		max_rows;
	int64		nrows;
	int64	   *row_ids;		/* of each row, as they came */
	uint32	   *event_keys;		/* of each event */
	StringInfoData reason;		/* why there is no event of the last row */
	IdSet		seen;
	IdSet		changing;		/* another transaction may be changing them */
	IdSet		sent;
	bool		full;			/* there were more than fit, or time for */
	IdSet		left;			/* to be sent later */
	List	   *exceptions;		/* of OutboxEntry */
	List	   *children;		/* of ChildRow: of "sent", those with a parent */
	int			put_off;		/* of them, for a while */
	bool		no_memory;		/* for one of these */
	bool		warned;			/* of one of them */
	MemoryContext context;
} Filling;

extern void abp_fill_read_no_row(const UsageTable *table, bool whole);
extern bool abp_fill_shipment(Turn *turn, Shipment *shipment, const UsageTable *table,
							  const ServerOptions *server, IdSet *ids,
							  char taken_from);

#endif							/* ABP_FILL_H */
