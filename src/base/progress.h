/*-------------------------------------------------------------------------
 *
 * progress.h
 *	  How far a session's long work is, for aibilling.progress.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_PROGRESS_H
#define ABP_PROGRESS_H

#include "postgres.h"

extern void abp_progress_report(Oid relid, const char *unit, int64 done, int64 total);
extern int64 abp_progress_rows_about(Oid relid);
extern void abp_progress_end(void);

#endif							/* ABP_PROGRESS_H */
