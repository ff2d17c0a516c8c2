/*-------------------------------------------------------------------------
 *
 * rows.h
 *	  Usage rows, read and locked by their ids, as their table's owner.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_ROWS_H
#define ABP_ROWS_H

#include "postgres.h"

#include "nodes/pg_list.h"
#include "utils/jsonb.h"

#include "base/idset.h"
#include "base/statement.h"
#include "base/usage_row.h"
#include "queue/attachment.h"

/* Returns whether to go on. */
typedef bool (*UsageRowCallback) (const UsageRow *row, Jsonb *whole, void *arg);

/* Rows of a query's result, of which there are "nrows". */
typedef void (*QueryPartCallback) (SPITupleTable *part, uint64 nrows, void *arg);

extern void abp_rows_query(const UsageTable *table, const char *query,
						   int nargs, Oid *argtypes, Datum *args,
						   int at_a_time, QueryPartCallback callback, void *arg);
extern void abp_rows_query_ids(SPITupleTable *part, uint64 nrows, IdSet *ids,
							   MemoryContext context);
extern void abp_rows_forget_plans_except(List *tables);
extern uint64 abp_rows_read(const UsageTable *table, IdSet *ids, bool whole,
							UsageRowCallback callback, void *arg);
extern uint64 abp_rows_named(const UsageTable *table, const char *columns, List *external_ids,
							 bool by_index, SavedUser *saved);
extern IdSet abp_rows_settled(const UsageTable *table, IdSet *ids);
extern IdSet abp_rows_lock(const UsageTable *table, IdSet *ids, bool wait);
extern IdSet abp_rows_visible(const UsageTable *table, IdSet *ids);
extern IdSet abp_rows_shared(const UsageTable *table, IdSet *ids);
extern IdSet abp_rows_update_prices(const UsageTable *table, IdSet *ids, bool held);

#endif							/* ABP_ROWS_H */
