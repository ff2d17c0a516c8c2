/*-------------------------------------------------------------------------
 *
 * rollup_table.h
 *	  What delivered rows add up to: the table aibilling.rollup.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_ROLLUP_TABLE_H
#define ABP_ROLLUP_TABLE_H

#include "postgres.h"

#include "utils/date.h"

/* Columns of aibilling.rollup, in the order of abp_rollup_table_add. */
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

extern void abp_rollup_table_add(Datum *columns);
extern void abp_rollup_table_read_customers(const RollupRange *range, DateADT first, DateADT end,
											RollupReader reader, void *arg);
extern void abp_rollup_table_read(const RollupRange *range, RollupReader reader, void *arg);

#endif							/* ABP_ROLLUP_TABLE_H */
