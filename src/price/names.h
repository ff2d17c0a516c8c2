/*-------------------------------------------------------------------------
 *
 * names.h
 *	  Which names in the price table the names in a usage row mean.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_NAMES_H
#define ABP_NAMES_H

#include "postgres.h"

#include "price/cost.h"
#include "utils/builtins.h"
#include "utils/snapshot.h"

/* The bytes that name a model. */
typedef struct ModelKey
{
	TextView	provider;
	TextView	model;
} ModelKey;

/* Tries one meaning of a name.  Returns whether the price table has it. */
typedef bool (*TryName) (ModelKey key, void *arg);

static inline bool
text_view_equal(TextView a, TextView b)
{
	return a.len == b.len &&
		(a.data == b.data || memcmp(a.data, b.data, a.len) == 0);
}

static inline Datum
text_view_datum(TextView view)
{
	return PointerGetDatum(cstring_to_text_with_len(view.data, view.len));
}

extern bool abp_find_name(ModelKey key, Snapshot snapshot, TryName try_name,
						  void *arg);
extern char *abp_similar_name(ModelKey key, Snapshot snapshot);
extern TextView abp_fold_name(TextView name);

#endif							/* ABP_NAMES_H */
