/*-------------------------------------------------------------------------
 *
 * vanished.h
 *	  Rows that were gone when they were to be sent.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_VANISHED_H
#define ABP_VANISHED_H

#include "postgres.h"

#include "base/idset.h"

/* By what one of them is known again. */
typedef struct VanishedKey
{
	int64		id;
	uint32		key;			/* the checksum of its external_id, */
	bool		other;			/* or, if true, of a row of its id that it is
								 * not */
} VanishedKey;

/*
 * Rows that are gone.  Those without a key are known by their ids alone.
 */
typedef struct Vanished
{
	IdSet		ids;
	VanishedKey *keys;
	int64		nkeys;
	int64		max_keys;
} Vanished;

extern void abp_vanished_add_id(Vanished *rows, int64 id, MemoryContext context);
extern void abp_vanished_add_row(Vanished *rows, int64 id, uint32 key, bool other,
								 MemoryContext context);
extern bytea *abp_vanished_write_keys(const Vanished *rows);
extern void abp_vanished_read_keys(Vanished *rows, bytea *bytes);
extern bool abp_vanished_has_key(const Vanished *rows, int64 id);
extern bool abp_vanished_may_be(const Vanished *rows, int64 id, uint32 key);

#endif							/* ABP_VANISHED_H */
