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

#include "utils/snapshot.h"

#include "base/text_view.h"

/* The bytes that name a model. */
typedef struct ModelKey
{
	TextView	provider;
	TextView	model;
} ModelKey;

/* Tries one meaning of a name.  Returns whether the price table has it. */
typedef bool (*TryName) (ModelKey key, void *arg);

extern bool abp_names_find(ModelKey key, Snapshot snapshot, TryName try_name,
						   void *arg);
extern char *abp_names_similar(ModelKey key, Snapshot snapshot);
extern TextView abp_names_fold(TextView name);

#endif							/* ABP_NAMES_H */
