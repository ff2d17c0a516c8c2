/*-------------------------------------------------------------------------
 *
 * guard.h
 *	  Other people's code: its time is limited, its errors are its own.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_GUARD_H
#define ABP_GUARD_H

#include "postgres.h"

#include "compat.h"
#include "queue/attachment.h"

/* What became of guarded work. */
typedef enum GuardOutcome
{
	GUARD_DONE,
	GUARD_FAILED,				/* it raised an error */
	GUARD_PASSES,				/* one that passes by itself: a lock, a
								 * deadlock, a full disk */
	GUARD_NO_MEMORY,
	GUARD_TOO_LONG				/* its time was up */
} GuardOutcome;

/* The error of guarded work, in the memory context of abp_guard's caller. */
typedef struct GuardError
{
	int			sqlerrcode;
	char	   *message;
} GuardError;

typedef void (*GuardedWork) (void *arg);

extern GuardOutcome abp_guard(const UsageTable *table, GuardedWork work, void *arg,
							  GuardError *error);
ABP_NORETURN extern void abp_guard_rethrow(const GuardError *error);
extern void abp_guard_start_clock(void);
extern int64 abp_guard_elapsed_ms(void);

#endif							/* ABP_GUARD_H */
