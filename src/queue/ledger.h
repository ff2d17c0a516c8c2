/*-------------------------------------------------------------------------
 *
 * ledger.h
 *	  The ledger: what was sent, in which request, and what came of it.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_LEDGER_H
#define ABP_LEDGER_H

#include "postgres.h"

#include "datatype/timestamp.h"
#include "lib/stringinfo.h"
#include "nodes/pg_list.h"

#include "base/idset.h"
#include "base/text_view.h"
#include "queue/vanished.h"

/* What the ledger tells of a table. */
typedef struct LedgerTotals
{
	int64		in_flight;		/* events */
	int64		deliveries;
	int64		delivered;		/* events */
	int64		duplicates;
	int64		unexpected_duplicates;
	int64		vanished;
	TimestampTz last_delivery;	/* DT_NOBEGIN: none */
	char	   *last_error;		/* NULL: none */
	TimestampTz last_error_at;	/* DT_NOEND: it is being sent still */
} LedgerTotals;

/* A row of the ledger: one batch of events. */
typedef struct Delivery
{
	int64		id;
	Oid			usage_table;
	char	   *server;
	IdSet		ids;
	int			attempts;		/* requests begun, this one included */
	int			prior_attempts; /* of its ids, in earlier deliveries */
	bool		outcome_unknown;	/* an earlier request may have stored it */
	int64		vanished;
	Vanished	vanished_rows;	/* those that the ledger does not have yet */
	int			nevents;
	int64	   *event_ids;		/* the row of each event */
	IdSet		key_ids;		/* the rows of the first request, and for each */
	uint32	   *keys;			/* the checksum of its external_id, or NULL */
	bytea	   *share;			/* what its rows add up to, NULL: not known */
	bool		knows_counted;	/* is "counted" known? */
	IdSet		counted;		/* rows that another delivery counts already */
	StringInfoData body;
	int64		inserted;
	int64		duplicates;
	int64		unexpected_duplicates;
	int			http_status;
} Delivery;

extern bool abp_ledger_delivery_key(const Delivery *delivery, int64 id, uint32 *key);
extern uint32 abp_ledger_key_of(const TextView *external_id);
extern void abp_ledger_miss(Delivery *delivery, const IdSet *ids, bool other,
							MemoryContext context);
extern void abp_ledger_begin(Delivery *delivery);
extern void abp_ledger_resend(Delivery *delivery);
extern void abp_ledger_note(Delivery *delivery, const char *error,
							TimestampTz not_before);
extern void abp_ledger_finish(Delivery *delivery, const char *state,
							  const char *error);
extern List *abp_ledger_unsettled(void);
extern bool abp_ledger_sending(Oid usage_table);
extern bool abp_ledger_is_sending(Oid usage_table, int64 id);
extern int64 abp_ledger_last_delivered(Oid usage_table, int64 id, int64 after);
extern IdSet abp_ledger_delivered_before(const Delivery *delivery,
										 int64 ledger_from);
extern bool abp_ledger_has(Oid usage_table, int64 id, int64 ledger_from);
extern bool abp_ledger_may_have_missed(Oid usage_table, int64 id, uint32 key, int64 ledger_from);
extern IdSet abp_ledger_sending_ids(Oid usage_table);
extern int32 abp_ledger_age(Oid usage_table);
extern IdSet abp_ledger_ids(Oid usage_table, int64 ledger_from);
extern List *abp_ledger_vanished(Oid usage_table, int64 ledger_from);
extern void abp_ledger_returned(const Delivery *delivery, IdSet *ids);
extern void abp_ledger_totals(Oid usage_table, LedgerTotals *totals);
extern void abp_ledger_sum_up(void);
extern int	abp_ledger_recent_requests(const char *server, int limit);

#endif							/* ABP_LEDGER_H */
