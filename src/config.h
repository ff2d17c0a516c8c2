/*-------------------------------------------------------------------------
 *
 * config.h
 *	  Settings of the server (GUCs).
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_CONFIG_H
#define ABP_CONFIG_H

#include "postgres.h"

extern bool abp_preloaded;		/* named in shared_preload_libraries? */
extern char *abp_databases;		/* names, comma-separated; NULL if empty */
extern bool abp_enqueue;
extern int	abp_poll_interval;	/* seconds */

extern void abp_config_init(void);

#endif							/* ABP_CONFIG_H */
