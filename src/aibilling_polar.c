/*-------------------------------------------------------------------------
 *
 * aibilling_polar.c
 *	  The module: what happens when the library is loaded.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "fmgr.h"

#include "compat.h"
#include "config.h"
#include "object_access.h"
#include "ship/worker.h"

ABP_MODULE_MAGIC;

PGDLLEXPORT void _PG_init(void);

void
_PG_init(void)
{
	abp_config_init();
	abp_object_access_init();
	abp_worker_init();
}
