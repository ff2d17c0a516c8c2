/*-------------------------------------------------------------------------
 *
 * outbox.h
 *	  The outbox, the ledger and the usage rows: all their SQL.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_OUTBOX_H
#define ABP_OUTBOX_H

#include "postgres.h"

#include "lib/stringinfo.h"
#include "nodes/pg_list.h"
#include "storage/itemptr.h"

#include "base/idset.h"
#include "usage/row.h"

/* States of an outbox entry, as stored. */
#define OUTBOX_READY 'p'		/* to be sent */
#define OUTBOX_WAITING 'w'		/* to be sent, but not before not_before */
#define OUTBOX_UNPRICED 'u'		/* waits for a price */
#define OUTBOX_REJECTED 'r'		/* waits for an UPDATE or retry() */
#define NUM_OUTBOX_STATES 4

/* An entry of rows that were priced and not queued, to be counted. */
#define OUTBOX_NOT_QUEUED 'n'

/* An entry that takes its ids out of a state again has the capital letter. */
#define OUTBOX_REMOVAL(state) ((char) ((state) - 'a' + 'A'))
#define OUTBOX_IS_REMOVAL(state) ((state) < 'a')

extern const char abp_outbox_states[NUM_OUTBOX_STATES];

/* The words of why a row is not sent, and of an error, are cut to this, in bytes. */
#define MAX_REASON_LEN 1000

/* What the outbox makes of a row. */
typedef struct RowState
{
	char		state;
	TimestampTz not_before;		/* OUTBOX_WAITING only, else DT_NOBEGIN */
	char	   *error;			/* why it waits, or NULL */
	bool		outcome_unknown;	/* may Polar have it? */
} RowState;

/* Ids of one usage table in one state.  All but "ids" may be shared. */
typedef struct OutboxEntry
{
	Oid			usage_table;
	char		state;
	int			attempts;
	bool		outcome_unknown;	/* an earlier request may have stored them */
	TimestampTz not_before;		/* OUTBOX_WAITING only, else DT_NOBEGIN */
	IdSet		ids;
	const char *error;			/* why it waits, or NULL */
	ItemPointerData tid;		/* of abp_outbox_next_unpriced only */
} OutboxEntry;

/* Where a scan over entries stands; all zero but for "id" at the start. */
typedef struct EntryCursor
{
	int64		id;
	ItemPointerData tid;
} EntryCursor;

#define ENTRY_CURSOR_START ((EntryCursor) {PG_INT64_MIN})

/* What abp_outbox_take tells of the entries that it took, together. */
typedef struct TakenEntries
{
	char		state;
	int			attempts;		/* the most */
	bool		outcome_unknown;	/* of all of them, or of none */
} TakenEntries;

/* Where a row stands. */
typedef enum RowWhere
{
	ROW_NOT_SENT,				/* neither in the outbox nor in the ledger */
	ROW_IN_OUTBOX,
	ROW_SENDING,
	ROW_DELIVERED
} RowWhere;

typedef struct RowPlace
{
	RowWhere	where;
	char		state;			/* in the outbox, 0: not there */
	bool		outcome_unknown;	/* may Polar have it, though it is there? */
	int			count[NUM_OUTBOX_STATES];	/* how often it is there, in the
											 * order of abp_outbox_states */
} RowPlace;

/* What a database's identity says of whether it may send. */
typedef enum DatabaseStanding
{
	DATABASE_ARMED,				/* it may */
	DATABASE_COPY,				/* the identity is another's: aibilling.arm() */
	DATABASE_SUBSCRIBER			/* its outbox comes from another by
								 * replication */
} DatabaseStanding;

/* An attached usage table and its server, as the shipper sees them. */
typedef struct UsageTable
{
	Oid			relid;
	Oid			owner;			/* InvalidOid: the table is gone */
	char	   *name;			/* schema-qualified and quoted */
	char	   *server;
	Oid			serverid;		/* InvalidOid: no such server */
	Oid			role;			/* the owner, if it has a user mapping of its
								 * own there, else InvalidOid */
	bool		paused_by_operator;
	bool		paused_by_answer;
	char	   *pause_reason;
	int			failures;
	TimestampTz not_before;		/* DT_NOBEGIN: none */
	TimestampTz blocked_until;	/* DT_NOBEGIN: not blocked */
	char	   *blocked_reason;
	int64		ledger_from;	/* the last delivery before the last TRUNCATE */
	int64		not_queued;		/* rows priced without being queued, summed up */
} UsageTable;

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
	IdSet		vanished_ids;
	int			nevents;
	int64	   *event_ids;		/* the row of each event */
	IdSet		key_ids;		/* the rows of the first request, and for each */
	uint32	   *keys;			/* the checksum of its external_id, or NULL */
	StringInfoData body;
	int64		inserted;
	int64		duplicates;
	int64		unexpected_duplicates;
	int			http_status;
} Delivery;

/* Returns whether to go on. */
typedef bool (*UsageRowCallback) (const UsageRow *row, Jsonb *whole, void *arg);

/* the outbox */
extern bool abp_extension_installed(void);
extern void abp_extension_check_version(void);
extern const char *abp_attachment_table(void);
extern Oid	abp_extension_relation(const char *name);
extern void abp_outbox_put(OutboxEntry *entries, int nentries);
extern bool abp_outbox_put_at_commit(OutboxEntry *entries, int nentries);
extern void abp_outbox_find(Oid usage_table, int64 id, int64 ledger_from,
							RowPlace *place);
extern bool abp_outbox_find_at_once(Oid usage_table, int64 id, int64 ledger_from,
									RowPlace *place);
extern IdSet abp_outbox_left(Oid usage_table, char state, ItemPointer tid,
							 int64 key, IdSet *ids);
extern IdSet abp_outbox_entry_left(const OutboxEntry *entry);
extern bool abp_outbox_tidy(Oid usage_table, int max_removals);
extern IdSet abp_outbox_take(Oid usage_table, char state, TimestampTz until,
							 IdSet *except, int64 *cursor, int64 max_ids,
							 TakenEntries *entries);
extern bool abp_outbox_take_entry(const OutboxEntry *entry);
extern int64 abp_outbox_count(Oid usage_table, char state, int64 exact_limit,
							  bool *estimated, int64 *first_id);
extern int64 abp_outbox_count_all(void);
extern int64 abp_outbox_discard(Oid usage_table);
extern IdSet abp_outbox_peek(Oid usage_table, char state, int64 max_ids);
extern int64 abp_outbox_make_ready(Oid usage_table, char state, IdSet *only);
extern bool abp_outbox_bounds(Oid usage_table, char state, int64 *first,
							  int64 *last);
extern TimestampTz abp_outbox_next_due(Oid usage_table);
extern OutboxEntry *abp_outbox_next_unpriced(Oid usage_table, EntryCursor *cursor);

/* the ledger */
extern void abp_ledger_begin(Delivery *delivery);
extern void abp_ledger_resend(Delivery *delivery);
extern void abp_ledger_note(Delivery *delivery, const char *error,
							TimestampTz not_before);
extern void abp_ledger_finish(Delivery *delivery, const char *state,
							  const char *error);
extern List *abp_ledger_unsettled(void);
extern bool abp_ledger_sending(Oid usage_table);
extern bool abp_ledger_has(Oid usage_table, int64 id, int64 ledger_from);
extern IdSet abp_ledger_delivered_before(const Delivery *delivery, int64 ledger_from);
extern IdSet abp_ledger_ids(Oid usage_table, int64 ledger_from);
extern List *abp_ledger_vanished(Oid usage_table, int64 ledger_from);
extern void abp_ledger_returned(const Delivery *delivery, IdSet *ids);
extern bool abp_delivery_key(const Delivery *delivery, int64 id, uint32 *key);
extern void abp_ledger_totals(Oid usage_table, LedgerTotals *totals);
extern void abp_ledger_sum_up(void);
extern int	abp_ledger_recent_requests(const char *server, int limit);

/* usage tables and servers */
extern List *abp_usage_tables(bool *armed);
extern bool abp_usage_table_attached(Oid relid, Oid *serverid, int64 *ledger_from);
extern void abp_usage_table_truncated(Oid relid);
extern void abp_usage_tables_follow_servers(void);
extern void abp_usage_table_forget(Oid relid);
extern bool abp_usage_table_block(Oid relid, const char *reason,
								  TimestampTz until);
extern void abp_usage_table_unblock(Oid relid, bool may_wait);
extern bool abp_server_state_by_role(void);
extern void abp_server_state_save(const char *server, Oid role, const char *paused,
								  const char *reason, int failures,
								  TimestampTz not_before);
extern void abp_server_resume(const char *server, Oid role, bool by_operator);
extern DatabaseStanding abp_database_standing(void);
extern void abp_database_arm(bool only_first);
extern void abp_database_check_timeline(void);

/* usage rows */
extern uint64 abp_usage_read(const UsageTable *table, IdSet *ids, bool whole,
							 UsageRowCallback callback, void *arg);
extern IdSet abp_usage_settled(const UsageTable *table, IdSet *ids);
extern IdSet abp_usage_lock(const UsageTable *table, IdSet *ids, bool wait);
extern IdSet abp_usage_visible(const UsageTable *table, IdSet *ids);
extern IdSet abp_usage_reprice(const UsageTable *table, IdSet *ids);

/* rights */
typedef struct SavedUser
{
	Oid			userid;
	int			sec_context;
	int			guc_level;
} SavedUser;

extern void abp_become(Oid userid, SavedUser *saved);
extern void abp_become_extension_owner(SavedUser *saved);
extern void abp_become_table_owner(const UsageTable *table, SavedUser *saved);
extern void abp_restore_user(const SavedUser *saved);

#endif							/* ABP_OUTBOX_H */
