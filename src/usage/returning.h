/*-------------------------------------------------------------------------
 *
 * returning.h
 *	  Rows that are inserted and are not new: moved, or brought back.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_RETURNING_H
#define ABP_RETURNING_H

#include "postgres.h"

#include "utils/hsearch.h"

#include "usage/lookup.h"
#include "usage/row.h"

/*
 * A row that is inserted with its cost filled in may be none that has just
 * come about: its statement moves it from one partition to another, or its
 * owner brings it back.  What tells is the row itself, never how it came.
 */
typedef enum ReturnKind
{
	RETURN_MOVED,				/* nothing of it has changed */
	RETURN_CHANGED,				/* something that is billed has */
	RETURN_DELIVERED			/* Polar has it: it keeps its cost */
} ReturnKind;

/* A row between its BEFORE and its AFTER INSERT trigger. */
typedef struct Returning
{
	RowKey		key;			/* hash key */
	int			nest_level;
	ReturnKind	kind;
} Returning;

extern Returning *abp_returning_find(Oid usage_table, int64 id,
									 HASHACTION action);
extern void abp_returning_remember(Oid usage_table, int64 id, ReturnKind kind);
extern bool abp_returning_remains(UsageRelation *known, const Datum *values,
								  const bool *nulls);

#endif							/* ABP_RETURNING_H */
