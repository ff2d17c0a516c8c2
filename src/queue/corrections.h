/*-------------------------------------------------------------------------
 *
 * corrections.h
 *	  Which usage rows correct which: aibilling.correction.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_CORRECTIONS_H
#define ABP_CORRECTIONS_H

#include "postgres.h"

#include "nodes/pg_list.h"
#include "utils/hsearch.h"

#include "base/usage_row.h"

/* The longest external_id, in bytes, and so the longest name of a row corrected. */
#define MAX_EXTERNAL_ID_LEN 255

/* A row that corrects another. */
typedef struct Correction
{
	int64		id;
	bool		has_cost;
	int64		cost_nanos;
	Numeric		cost_cents;		/* NULL if !has_cost */
} Correction;

/* An external_id as the key of a hash table; zeros behind it. */
typedef struct ExternalIdKey
{
	char text[	MAX_EXTERNAL_ID_LEN + 1];
} ExternalIdKey;

extern void abp_corrections_key(ExternalIdKey *key, const char *external_id, int len);
extern void abp_corrections_put(Oid usage_table, TextView corrects, const UsageRow *row);
extern void abp_corrections_remove(Oid usage_table, TextView external_id);
extern void abp_corrections_forget(Oid usage_table);
extern List *abp_corrections_of(Oid usage_table, TextView external_id);
extern HTAB *abp_corrections_corrected(Oid usage_table);

#endif							/* ABP_CORRECTIONS_H */
