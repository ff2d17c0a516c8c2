/*-------------------------------------------------------------------------
 *
 * correct.h
 *	  Rows that correct delivered ones.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_CORRECT_H
#define ABP_CORRECT_H

#include "postgres.h"

#include "base/usage_row.h"
#include "price/price.h"
#include "queue/attachment.h"
#include "queue/corrections.h"

/* What Polar is told of a row: its own cost and those of its corrections. */
typedef struct CorrectedCost
{
	int64		cost_nanos;
	Numeric		cost_cents;
	int64		ncorrections;
	bool		known;			/* false: a correction has no cost yet */
	int64		unknown_id;		/* which; only if !known */
} CorrectedCost;

/* A correction to be made. */
typedef struct CorrectionToMake
{
	int64		id;				/* of the delivered row */
	TextView	external_id;	/* of the same */
	Numeric		cost_cents;		/* the difference, at most 12 decimals */
	int64		cost_nanos;		/* the difference */
	int64		made;			/* out: id of the correcting row */
} CorrectionToMake;

extern bool abp_correct_target(const UsageRow *row, TextView *external_id);
extern void abp_correct_note(Oid usage_table, const UsageRow *row);
extern void abp_correct_changed(Oid usage_table, const Datum *old_values,
								const bool *old_nulls, const UsageRow *row);
extern void abp_correct_note_existing(const UsageTable *table);
extern void abp_correct_price(Oid usage_table, const UsageRow *row, PricedCost *cost);
extern void abp_correct_told(const UsageTable *table, const UsageRow *row,
							 CorrectedCost *corrected);
extern void abp_correct_insert(const UsageTable *table, CorrectionToMake *corrections,
							   int ncorrections);

#endif							/* ABP_CORRECT_H */
