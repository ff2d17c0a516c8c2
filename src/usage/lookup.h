/*-------------------------------------------------------------------------
 *
 * lookup.h
 *	  Usage rows found by their id without SQL: no code of anybody's runs.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_LOOKUP_H
#define ABP_LOOKUP_H

#include "postgres.h"

#include "access/htup.h"
#include "utils/relcache.h"
#include "utils/snapshot.h"

#include "base/idset.h"
#include "queue/vanished.h"
#include "usage/relation.h"

/* Looks at a row; returns whether to stop. */
typedef bool (*RowLook) (UsageRelation *known, Relation rel, HeapTuple tuple, void *arg);

/* A row's columns, to be compared with another's of its id. */
typedef struct RowColumns
{
	const Datum *values;
	const bool *nulls;
	bool		unchanged;		/* nothing that is billed differs */
} RowColumns;

extern Oid	abp_lookup_index(Relation rel, AttrNumber column);
extern bool abp_lookup_rows(Oid usage_table, int64 id, Snapshot snapshot,
							RowLook look, void *arg);
extern bool abp_lookup_same_row(UsageRelation *known, Relation rel,
								HeapTuple tuple, void *arg);
extern bool abp_lookup_exists(Oid usage_table, int64 id);
extern IdSet abp_lookup_existing(Oid usage_table, const IdSet *ids);
extern void abp_lookup_leaving(Oid partition, const IdSet *ids, Vanished *rows,
							   MemoryContext context);
extern IdSet abp_lookup_returned(Oid partition, const Vanished *rows);

#endif							/* ABP_LOOKUP_H */
