/*-------------------------------------------------------------------------
 *
 * shared_memory.c
 *	  Shared memory that rooms ask for while the library is preloaded.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "miscadmin.h"
#include "storage/ipc.h"
#include "storage/shmem.h"

#include "base/shared_memory.h"

/* What a room has asked for. */
typedef struct SharedPart
{
	const char *name;
	Size		size;
	SharedMemoryCallback callback;
} SharedPart;

#define MAX_PARTS 4

static SharedPart parts[MAX_PARTS];
static int	nparts = 0;
static shmem_request_hook_type next_request_hook = NULL;
static shmem_startup_hook_type next_startup_hook = NULL;

/* Hook: ask the server for what the rooms have asked for. */
static void
request_all(void)
{
	if (next_request_hook)
		next_request_hook();

	for (int i = 0; i < nparts; i++)
	{
		RequestAddinShmemSpace(parts[i].size);
		RequestNamedLWLockTranche(parts[i].name, 1);
	}
}

/* Hook: the memory is there, so hand each room its own. */
static void
start_all(void)
{
	if (next_startup_hook)
		next_startup_hook();

	LWLockAcquire(AddinShmemInitLock, LW_EXCLUSIVE);
	for (int i = 0; i < nparts; i++)
	{
		bool		found;
		void	   *memory = ShmemInitStruct(parts[i].name, parts[i].size, &found);

		if (!found)
			memset(memory, 0, parts[i].size);
		parts[i].callback(memory, found ? NULL : &GetNamedLWLockTranche(parts[i].name)->lock);
	}
	LWLockRelease(AddinShmemInitLock);
}

/*
 * Ask for so many bytes under this name, which its lock has, too.  The callback
 * is called when they are there.
 */
void
abp_shared_memory_request(const char *name, Size size, SharedMemoryCallback callback)
{
	Assert(nparts < MAX_PARTS);
	if (nparts == 0)
	{
		next_request_hook = shmem_request_hook;
		shmem_request_hook = request_all;
		next_startup_hook = shmem_startup_hook;
		shmem_startup_hook = start_all;
	}
	parts[nparts++] = (SharedPart)
	{
		name, size, callback
	};
}
