/*-------------------------------------------------------------------------
 *
 * user_code.h
 *	  The functions that a server's options name, called as their owners.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_USER_CODE_H
#define ABP_USER_CODE_H

#include "postgres.h"

#include "utils/jsonb.h"

#include "polar/event_format.h"
#include "polar/server.h"
#include "ship/guard.h"

extern GuardOutcome abp_user_code_call(const ServerOptions *server,
									   Jsonb *whole, EventOverrides *overrides,
									   char **reason);

#endif							/* ABP_USER_CODE_H */
