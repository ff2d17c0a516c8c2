/*-------------------------------------------------------------------------
 *
 * worker.h
 *	  The background worker: one for each database named in the settings.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_WORKER_H
#define ABP_WORKER_H

#include "postgres.h"

extern void abp_worker_init(void);
extern PGDLLEXPORT void aibilling_polar_worker_main(Datum arg);

#endif							/* ABP_WORKER_H */
