/*-------------------------------------------------------------------------
 *
 * shared_memory.h
 *	  Shared memory that rooms ask for while the library is preloaded.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_SHARED_MEMORY_H
#define ABP_SHARED_MEMORY_H

#include "postgres.h"

#include "storage/lwlock.h"

/* Takes memory that is there; "lock" is for it if it is new, and zero, else NULL. */
typedef void (*SharedMemoryCallback) (void *memory, LWLock *lock);

extern void abp_shared_memory_request(const char *name, Size size,
									  SharedMemoryCallback callback);

#endif							/* ABP_SHARED_MEMORY_H */
