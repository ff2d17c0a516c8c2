/*-------------------------------------------------------------------------
 *
 * token.h
 *	  The access token: from a file or a user mapping.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_TOKEN_H
#define ABP_TOKEN_H

#include "postgres.h"

#include "lib/stringinfo.h"

#include "polar/server.h"

extern char *abp_token_read(const ServerOptions *server, Oid usage_owner,
							StringInfo reason);
extern void abp_token_forget(char *token);
extern bool abp_token_is_mapped(Oid serverid, Oid role);

#endif							/* ABP_TOKEN_H */
