/*-------------------------------------------------------------------------
 *
 * vanished.c
 *	  Rows that were gone when they were to be sent.
 *
 * They have left with their partition, and are sent when they come back with it.
 * Another row may have the id of one and come back before it, so that an id does
 * not tell which of them it is: the checksum of their external_ids does.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "miscadmin.h"
#include "utils/memutils.h"

#include "base/bytes.h"
#include "queue/vanished.h"

/*
 * Add a row that is known by its id alone.
 */
void
abp_vanished_add_id(Vanished *rows, int64 id, MemoryContext context)
{
	abp_idset_add(&rows->ids, id, id, context);
}

static void
add_key(Vanished *rows, int64 id, uint32 key, bool other, MemoryContext context)
{
	if (rows->nkeys == rows->max_keys)
	{
		rows->max_keys = Max(16, 2 * rows->max_keys);
		rows->keys = rows->keys == NULL ?
			MemoryContextAlloc(context, sizeof(VanishedKey) * rows->max_keys) :
			repalloc_huge(rows->keys, sizeof(VanishedKey) * rows->max_keys);
	}
	rows->keys[rows->nkeys++] = (VanishedKey)
	{
		id, key, other
	};
}

/*
 * Add a row by the checksum of its external_id; other: any row of the id but the
 * one with this checksum.
 */
void
abp_vanished_add_row(Vanished *rows, int64 id, uint32 key, bool other, MemoryContext context)
{
	abp_idset_add(&rows->ids, id, id, context);
	add_key(rows, id, key, other, context);
}

/*
 * The keys as bytes for the ledger, which appends them to those that it has; palloc'd.
 */
bytea	   *
abp_vanished_write_keys(const Vanished *rows)
{
	StringInfoData bytes;

	initStringInfo(&bytes);
	bytes.len = VARHDRSZ;
	for (int64 i = 0; i < rows->nkeys; i++)
	{
		CHECK_FOR_INTERRUPTS();
		abp_bytes_put_signed(&bytes, rows->keys[i].id);
		abp_bytes_put_unsigned(&bytes, (uint64) rows->keys[i].key << 1 | rows->keys[i].other);
	}
	SET_VARSIZE(bytes.data, bytes.len);
	return (bytea *) bytes.data;
}

static int
compare_keys(const void *a, const void *b)
{
	int64		one = ((const VanishedKey *) a)->id;
	int64		other = ((const VanishedKey *) b)->id;

	return (one > other) - (one < other);
}

/*
 * What that has written: the keys of rows whose ids are known already, in the current
 * memory context.  Raises ERRCODE_DATA_CORRUPTED for other bytes.
 */
void
abp_vanished_read_keys(Vanished *rows, bytea *bytes)
{
	ByteReader	reader = {
		VARDATA_ANY(bytes), VARDATA_ANY(bytes) + VARSIZE_ANY_EXHDR(bytes), "column vanished_keys of the ledger"
	};

	while (reader.at < reader.end)
	{
		int64		id = (int64) abp_bytes_get_signed(&reader);
		uint64		key = (uint64) abp_bytes_get_unsigned(&reader);

		CHECK_FOR_INTERRUPTS();
		add_key(rows, id, (uint32) (key >> 1), key & 1, CurrentMemoryContext);
	}
	if (rows->nkeys > 1)
		qsort(rows->keys, rows->nkeys, sizeof(VanishedKey), compare_keys);
}

/* The first key of an id, by its place; nkeys if there is none. */
static int64
first_key(const Vanished *rows, int64 id)
{
	VanishedKey wanted = {.id = id};
	VanishedKey *found = rows->nkeys == 0 ? NULL :
	bsearch(&wanted, rows->keys, rows->nkeys, sizeof(VanishedKey), compare_keys);

	if (found == NULL)
		return rows->nkeys;
	while (found > rows->keys && found[-1].id == id)
		found--;
	return found - rows->keys;
}

/*
 * Is more known of a row than its id, by what abp_vanished_read_keys has read?
 */
bool
abp_vanished_has_key(const Vanished *rows, int64 id)
{
	return first_key(rows, id) < rows->nkeys;
}

/*
 * May the row of this id whose external_id has this checksum be one of those that
 * abp_vanished_read_keys has read?
 */
bool
abp_vanished_may_be(const Vanished *rows, int64 id, uint32 key)
{
	int64		first = first_key(rows, id);
	bool		others = false; /* is there one that is known by what it is
								 * not? */
	bool		named = false;	/* is it the one that that is? */

	if (first == rows->nkeys)
		return true;
	for (int64 i = first; i < rows->nkeys && rows->keys[i].id == id; i++)
	{
		if (!rows->keys[i].other && rows->keys[i].key == key)
			return true;
		others |= rows->keys[i].other;
		named |= rows->keys[i].other && rows->keys[i].key == key;
	}
	return others && !named;
}
