/*-------------------------------------------------------------------------
 *
 * wake.h
 *	  Which worker serves which database, and how a commit wakes it.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_WAKE_H
#define ABP_WAKE_H

#include "postgres.h"

extern void abp_wake_init(int nworkers);
extern void abp_wake_use_slot(int number, const char *name);
extern void abp_wake_register(void);
extern void abp_wake_at_commit(void);
extern void abp_wake_worker(void);
extern int	abp_wake_worker_pid(void);
extern void abp_wake_listen(void);
extern void abp_wake_worker_ends(const char *error, bool no_database);
extern bool abp_wake_had_no_database(void);
extern void abp_wake_has_database(void);
extern char *abp_wake_worker_error(const char *database);
extern void abp_wake_has_looked(void);
extern uint64 abp_wake_look_count(void);

#endif							/* ABP_WAKE_H */
