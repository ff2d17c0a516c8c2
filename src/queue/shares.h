/*-------------------------------------------------------------------------
 *
 * shares.h
 *	  What each delivery's rows add up to: the tables aibilling.share and
 *	  aibilling.rollup.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_SHARES_H
#define ABP_SHARES_H

#include "postgres.h"

#include "nodes/pg_list.h"
#include "utils/date.h"

#include "base/idset.h"

/* One delivery's share, not yet in the rollup. */
typedef struct Share
{
	int64		delivery;
	Oid			usage_table;
	bytea	   *sums;			/* NULL: not known, the rows tell */
	bool		knows_counted;	/* is "counted" known? */
	IdSet		counted;		/* rows that another delivery counts */
	IdSet		ids;			/* the delivery's rows; empty: see its sums */
	bool		delivered;		/* else it is being sent */
} Share;

extern void abp_share_write(int64 delivery, Oid usage_table, bytea *sums, const IdSet *counted);
extern void abp_share_set_sums(int64 delivery, bytea *sums);
extern void abp_share_drop(int64 delivery);
extern void abp_shares_drop(const int64 *deliveries, int n);
extern bool abp_share_load_counted(int64 delivery, IdSet *counted);
extern List *abp_shares_of(Oid usage_table);
extern List *abp_shares_to_fold(int64 from_delivery, int max_shares, bool unknown);
extern int64 abp_share_first_open(void);
extern IdSet abp_share_counted(Oid usage_table, IdSet *ids, int64 ledger_from);
extern void abp_shares_disown(int64 delivery, Oid usage_table, IdSet *ids);
extern void abp_shares_truncated(Oid usage_table);
extern void abp_rollup_forget(Oid usage_table);
extern void abp_rollup_add(Datum *columns);

/* Columns of aibilling.rollup, in the order of abp_rollup_add. */
typedef enum RollupColumn
{
	ROLLUP_USAGE_TABLE,
	ROLLUP_LEVEL,
	ROLLUP_CUSTOMER,
	ROLLUP_DAY,
	ROLLUP_KEY,
	ROLLUP_EXTERNAL_CUSTOMER_ID,
	ROLLUP_CUSTOMER_ID,
	ROLLUP_PROVIDER,
	ROLLUP_MODEL,
	ROLLUP_EVENT_NAME,
	ROLLUP_USAGE_ROWS,
	ROLLUP_INPUT_TOKENS,
	ROLLUP_CACHE_READ_TOKENS,
	ROLLUP_CACHE_WRITE_TOKENS,
	ROLLUP_OUTPUT_TOKENS,
	ROLLUP_REASONING_TOKENS,
	ROLLUP_COST_NANOS,
	ROLLUP_COST_CENTS,
	ROLLUP_UNPRICED
} RollupColumn;

#define NUM_ROLLUP_COLUMNS (ROLLUP_UNPRICED + 1)

/* Levels of the rollup. */
#define ROLLUP_DAILY 'd'		/* by all columns */
#define ROLLUP_BY_MODEL 'm'		/* by day, provider and model */
#define ROLLUP_BY_CUSTOMER 'c'	/* by month and customer */

/* Which rows of the rollup to read. */
typedef struct RollupRange
{
	Oid			usage_table;
	char		level;
	bool		by_customer;	/* only rows of "customer" */
	int64		customer;
	DateADT		from_day;		/* both inclusive */
	DateADT		to_day;
} RollupRange;

/* Returns whether to go on. */
typedef bool (*RollupReader) (const Datum *values, const bool *nulls, void *arg);

extern void abp_rollup_read_customers(const RollupRange *range, DateADT first, DateADT end,
									  RollupReader reader, void *arg);
extern void abp_rollup_read(const RollupRange *range, RollupReader reader, void *arg);

#endif							/* ABP_SHARES_H */
