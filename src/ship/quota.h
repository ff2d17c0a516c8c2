/*-------------------------------------------------------------------------
 *
 * quota.h
 *	  A server's requests per minute, shared by all that make requests to it.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_QUOTA_H
#define ABP_QUOTA_H

#include "postgres.h"

#include "datatype/timestamp.h"

#include "polar/server.h"

extern void abp_quota_init(void);
extern bool abp_quota_take(const ServerOptions *server, TimestampTz *next);
extern bool abp_quota_take_to_read(const ServerOptions *server, TimestampTz *next);
extern void abp_quota_give_back(const ServerOptions *server);
extern void abp_quota_used_up(const char *server);
extern void abp_quota_forget(void);

#endif							/* ABP_QUOTA_H */
