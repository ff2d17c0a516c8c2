/*-------------------------------------------------------------------------
 *
 * relation.h
 *	  What a session knows of a table with our triggers.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_RELATION_H
#define ABP_RELATION_H

#include "postgres.h"

#include "access/htup.h"
#include "nodes/execnodes.h"
#include "utils/relcache.h"

#include "polar/server.h"
#include "usage/row.h"

/*
 * What a session knows of a table with our triggers: a usage table or one of
 * its partitions.  Forgotten at any change of the table.
 */
typedef struct UsageRelation
{
	Oid			relid;			/* hash key */
	bool		valid;
	bool		warned;			/* of triggers on a table not attached */
	Oid			usage_table;	/* the attached table, InvalidOid if none */
	Oid			serverid;
	int64		ledger_from;	/* its last delivery before a TRUNCATE */
	Oid			id_index;		/* InvalidOid: not looked for, or none */
	Oid			external_id_index;	/* likewise */
	bool		counts_not_queued;	/* since the extension's 1.2 */
	bool		replicated;		/* fed by a subscription */
	bool		warned_skipped; /* of a second row of an external_id */
	int			natts;
	UsageColumns columns;
	Datum	   *values;			/* scratch: one tuple's columns */
	bool	   *nulls;
	Oid			default_from[NUM_USAGE_COLUMNS];	/* of defaulted_columns
													 * only: the table that
													 * has the default, itself
													 * or one above it */
	ExprState **defaults;		/* of NUM_USAGE_COLUMNS, see default_of */
	uint64		defaults_of;	/* the defaults_transaction that made them */
	Oid			defaults_for;	/* and the role */
} UsageRelation;

extern bool abp_relation_is_callers(Oid usage_table);
extern bool abp_relation_lacks_kept(const bool *nulls, const bool *old_nulls);
extern HeapTuple abp_relation_keep(const UsageRelation *known, TupleDesc desc,
								   HeapTuple tuple, HeapTuple old,
								   const bool *nulls);
extern HeapTuple abp_relation_take_old(const UsageRelation *known,
									   TupleDesc desc, HeapTuple tuple,
									   HeapTuple old, const bool *take);
extern HeapTuple abp_relation_renumber(UsageRelation *known, Relation rel,
									   HeapTuple tuple, int64 *id);
extern bool abp_relation_lacks_defaults(const UsageRelation *known,
										const bool *nulls);
extern void abp_relations_forget(void);
extern UsageRelation *abp_relation_know(Relation rel);
extern const ServerOptions *abp_relation_server(const UsageRelation *known);
extern void abp_relation_read(const UsageRelation *known, HeapTuple tuple,
							  TupleDesc desc, Datum *values, bool *nulls);
extern UsageRelation *abp_relation_fill_defaults(UsageRelation *known,
												 Relation rel,
												 HeapTuple *tuple,
												 Datum *values, bool *nulls);

#endif							/* ABP_RELATION_H */
