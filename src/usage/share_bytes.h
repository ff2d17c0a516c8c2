/*-------------------------------------------------------------------------
 *
 * share_bytes.h
 *	  What the rows of a batch add to the sums, as bytes.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_SHARE_BYTES_H
#define ABP_SHARE_BYTES_H

#include "postgres.h"

#include "lib/stringinfo.h"

#include "base/usage_row.h"
#include "polar/event_format.h"
#include "usage/share.h"

/* The rows of a batch as bytes.  All of it is in its memory context. */
typedef struct ShareRows
{
	MemoryContext context;
	StringInfoData bytes;
	int		   *ends;			/* of the rows, in "bytes" */
	int			nrows;
	int			max_ends;
	TextView	first_customer; /* of the first row, in UTF-8 */
	struct share_kinds_hash *kinds; /* the kinds of calls that they name */
} ShareRows;

extern void abp_share_rows_init(ShareRows *rows, MemoryContext context);
extern void abp_share_rows_add(ShareRows *rows, int index, const UsageRow *row,
							   const EventFormat *format);
extern bytea *abp_share_encode(const ShareRows *rows, const bool *skip);

/* What a reader does with a row, and whether it wants more; the key is in UTF-8. */
typedef bool (*ShareReader) (const char *key, int keylen, const ShareSums *sums, void *arg);

extern bool abp_share_decode(bytea *share, int *nread, ShareReader reader, void *arg);

#endif							/* ABP_SHARE_BYTES_H */
