/*-------------------------------------------------------------------------
 *
 * row.h
 *	  The columns of a usage table, and how rows of it are read.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_ROW_H
#define ABP_ROW_H

#include "postgres.h"

#include "access/attnum.h"
#include "utils/jsonb.h"
#include "utils/relcache.h"

#include "base/usage_row.h"

typedef enum UsageColumn
{
	COL_ID,
	COL_EXTERNAL_ID,
	COL_OCCURRED_AT,
	COL_EVENT_NAME,
	COL_PROVIDER,
	COL_SUB_PROVIDER,
	COL_MODEL,
	COL_SERVICE_TIER,
	COL_GENERATION_ID,
	COL_CUSTOMER_ID,
	COL_EXTERNAL_CUSTOMER_ID,
	COL_MEMBER_ID,
	COL_EXTERNAL_MEMBER_ID,
	COL_PARENT_ID,
	COL_FIRST_COUNT,			/* the counts are in the order of UsageCount */
	COL_LAST_COUNT = COL_FIRST_COUNT + NUM_USAGE_COUNTS - 1,
	COL_UNITS,
	COL_RAW_USAGE,
	COL_USAGE_FORMAT,
	COL_PROVIDER_COST,
	COL_TAGS,
	COL_COST_NANOS,
	COL_COST_CENTS,
	COL_COST_STATUS
} UsageColumn;

#define NUM_USAGE_COLUMNS (COL_COST_STATUS + 1)

typedef struct UsageColumnInfo
{
	const char *name;
	Oid			type;
	bool		billed;			/* part of what is priced or sent */
} UsageColumnInfo;

extern const UsageColumnInfo abp_row_columns[NUM_USAGE_COLUMNS];

/*
 * Where a relation keeps the columns of a usage table, and how: as what they
 * are (plain), or as another type that ORMs like to use for it.
 */
typedef struct UsageColumns
{
	AttrNumber	attnums[NUM_USAGE_COLUMNS];
	Oid			declared[NUM_USAGE_COLUMNS];	/* may be a domain */
	Oid			stored[NUM_USAGE_COLUMNS];	/* the type below it */
	int32		typmods[NUM_USAGE_COLUMNS];
	bool		plain[NUM_USAGE_COLUMNS];
	bool		all_plain;
} UsageColumns;

/* A row of a usage table as the key of a hash table, by row_key_set(). */
typedef struct RowKey
{
	Oid			usage_table;
	int64		id;
} RowKey;

/* Also the bytes between: they are hashed, too. */
static inline void
row_key_set(RowKey *key, Oid usage_table, int64 id)
{
	memset(key, 0, sizeof(RowKey));
	key->usage_table = usage_table;
	key->id = id;
}

extern void abp_row_read(const Datum *values, const bool *nulls,
						 UsageRow *row);
extern Jsonb *abp_row_json(Datum value);
extern bool abp_row_columns_find(Relation rel, UsageColumns *columns,
								 char **problem);
extern char *abp_row_columns_faults(Oid relid);
extern char *abp_row_columns_fix(Relation rel);
extern Datum abp_row_value_read(const UsageColumns *columns, UsageColumn column,
								Datum value);
extern Datum abp_row_value_write(const UsageColumns *columns, UsageColumn column,
								 Datum value, bool isnull);
extern bool abp_row_value_fits(const UsageColumns *columns, UsageColumn column,
							   Datum value);
extern bool abp_row_value_equal(UsageColumn column, Datum a, Datum b);
extern bool abp_row_billed_changed(const Datum *old_values,
								   const bool *old_nulls,
								   const Datum *new_values,
								   const bool *new_nulls,
								   bool *raw_changed);

#endif							/* ABP_ROW_H */
