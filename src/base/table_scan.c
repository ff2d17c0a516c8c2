/*-------------------------------------------------------------------------
 *
 * table_scan.c
 *	  The extension's tables read without SQL, in the order of an index.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/table.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/snapmgr.h"

#include "base/extension.h"
#include "base/table_scan.h"

/*
 * Begin a scan of one of the extension's tables by one of its indexes, locked until
 * the transaction ends.  Raises an error if one of them is not there.
 */
void
abp_scan_begin_as_of(OrderedScan *scan, const char *table, const char *index,
					 int nkeys, ScanKey keys, LOCKMODE lockmode, Snapshot snapshot)
{
	scan->rel = table_open(abp_extension_needed(table), lockmode);
	scan->index = index_open(abp_extension_needed(index), lockmode);
	scan->scan = systable_beginscan_ordered(scan->rel, scan->index, snapshot, nkeys, keys);
	scan->context = CurrentMemoryContext;
}

/*
 * The same by the active snapshot.
 */
void
abp_scan_begin(OrderedScan *scan, const char *table, const char *index,
			   int nkeys, ScanKey keys, LOCKMODE lockmode)
{
	abp_scan_begin_as_of(scan, table, index, nkeys, keys, lockmode, GetActiveSnapshot());
}

/*
 * End a scan.
 */
void
abp_scan_end(OrderedScan *scan)
{
	systable_endscan_ordered(scan->scan);
	index_close(scan->index, NoLock);
	table_close(scan->rel, NoLock);
}

/*
 * The next tuple, NULL at the end; it lives until the one after it is asked for.
 */
HeapTuple
abp_scan_next(OrderedScan *scan)
{
	MemoryContext old = MemoryContextSwitchTo(scan->context);
	HeapTuple	tuple = systable_getnext_ordered(scan->scan, ForwardScanDirection);

	MemoryContextSwitchTo(old);
	CHECK_FOR_INTERRUPTS();
	return tuple;
}

/* A column of a tuple, or "if_null". */
Datum
abp_column_or(HeapTuple tuple, AttrNumber column, TupleDesc desc, Datum if_null)
{
	bool		isnull;
	Datum		value = heap_getattr(tuple, column, desc, &isnull);

	return isnull ? if_null : value;
}

/* A text column of a tuple, copied to the current memory context, or NULL. */
char	   *
abp_column_string(HeapTuple tuple, AttrNumber column, TupleDesc desc)
{
	Datum		value = abp_column_or(tuple, column, desc, (Datum) 0);

	return value == (Datum) 0 ? NULL : TextDatumGetCString(value);
}
