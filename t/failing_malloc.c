/*-------------------------------------------------------------------------
 *
 * failing_malloc.c
 *	  Memory that runs out when a test says so.
 *
 * Preloaded into a server (LD_PRELOAD), this takes malloc's place in all of
 * its libraries.  Loaded by CREATE FUNCTION as well, it lets a session say
 * which of its next allocations fail.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "fmgr.h"

PG_MODULE_MAGIC;

PG_FUNCTION_INFO_V1(fail_malloc);
PG_FUNCTION_INFO_V1(fail_large_malloc);
PG_FUNCTION_INFO_V1(failed_mallocs);

extern void *__libc_malloc(size_t size);
extern void *__libc_calloc(size_t count, size_t size);
extern void *__libc_realloc(void *old, size_t size);

static int64 allocations = 0;
static int64 first_to_fail = PG_INT64_MAX;
static int64 last_to_fail = PG_INT64_MAX;
static size_t too_large = SIZE_MAX;
static int64 failed = 0;

static bool
fails(size_t size)
{
	/* memory contexts take blocks whose sizes are powers of two */
	bool		large = size >= too_large && (size & (size - 1)) != 0;

	allocations++;
	if (!large && (allocations < first_to_fail || allocations > last_to_fail))
		return false;
	failed++;
	errno = ENOMEM;
	return true;
}

void *
malloc(size_t size)
{
	return fails(size) ? NULL : __libc_malloc(size);
}

void *
calloc(size_t count, size_t size)
{
	return fails(count * size) ? NULL : __libc_calloc(count, size);
}

void *
realloc(void *old, size_t size)
{
	return fails(0) ? NULL : __libc_realloc(old, size);
}

/* fail_malloc(n, times): let the n-th from here fail, and those after it. */
Datum
fail_malloc(PG_FUNCTION_ARGS)
{
	allocations = 0;
	failed = 0;
	first_to_fail = PG_GETARG_INT32(0);
	last_to_fail = first_to_fail + PG_GETARG_INT32(1) - 1;
	PG_RETURN_VOID();
}

/*
 * fail_large_malloc(n): let all of n bytes and more fail, but those that grow
 * and those of memory contexts.
 */
Datum
fail_large_malloc(PG_FUNCTION_ARGS)
{
	failed = 0;
	too_large = PG_GETARG_INT32(0);
	PG_RETURN_VOID();
}

/* How many have failed; no more will. */
Datum
failed_mallocs(PG_FUNCTION_ARGS)
{
	first_to_fail = last_to_fail = PG_INT64_MAX;
	too_large = SIZE_MAX;
	PG_RETURN_INT64(failed);
}
