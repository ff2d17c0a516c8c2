/*-------------------------------------------------------------------------
 *
 * collect.h
 *	  What a transaction does to the outbox, collected until it commits.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_COLLECT_H
#define ABP_COLLECT_H

#include "postgres.h"

#include "queue/outbox.h"
#include "queue/place.h"

extern void abp_collect_inserted(Oid usage_table, int64 id, const RowState *state);
extern void abp_collect_note(Oid usage_table, char note, int64 id);
extern void abp_collect_truncated(Oid usage_table);
extern void abp_collect_changed(Oid usage_table, int64 id, const RowPlace *place,
								const RowState *state);
extern IdSet abp_collect_changes(Oid usage_table);
extern void abp_collect_pending(Oid usage_table, IdSet *sure, IdSet *unsure);
extern bool abp_collect_find(Oid usage_table, int64 id, RowPlace *place);

#endif							/* ABP_COLLECT_H */
