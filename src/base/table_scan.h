/*-------------------------------------------------------------------------
 *
 * table_scan.h
 *	  The extension's tables read without SQL, in the order of an index.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_TABLE_SCAN_H
#define ABP_TABLE_SCAN_H

#include "postgres.h"

#include "access/genam.h"
#include "storage/lockdefs.h"
#include "utils/snapshot.h"

/* A scan of one of the extension's tables, in the order of an index. */
typedef struct OrderedScan
{
	Relation	rel;
	Relation	index;
	SysScanDesc scan;
	MemoryContext context;		/* of the scan, which allocates as it goes */
} OrderedScan;

extern void abp_scan_begin_as_of(OrderedScan *scan, const char *table,
								 const char *index, int nkeys, ScanKey keys,
								 LOCKMODE lockmode, Snapshot snapshot);
extern void abp_scan_begin(OrderedScan *scan, const char *table,
						   const char *index, int nkeys, ScanKey keys,
						   LOCKMODE lockmode);
extern void abp_scan_end(OrderedScan *scan);
extern HeapTuple abp_scan_next(OrderedScan *scan);
extern Datum abp_column_or(HeapTuple tuple, AttrNumber column, TupleDesc desc,
						   Datum if_null);
extern char *abp_column_string(HeapTuple tuple, AttrNumber column,
							   TupleDesc desc);

#endif							/* ABP_TABLE_SCAN_H */
