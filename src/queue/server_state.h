/*-------------------------------------------------------------------------
 *
 * server_state.h
 *	  Servers that are paused, or wait after failures: the table aibilling.server_state.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_SERVER_STATE_H
#define ABP_SERVER_STATE_H

#include "postgres.h"

#include "datatype/timestamp.h"
#include "nodes/pg_list.h"

/* What is kept of a server, or of one role's use of it. */
typedef struct ServerState
{
	char	   *server;
	Oid			role;			/* InvalidOid: of all who have no state of
								 * their own */
	char	   *paused;			/* NULL: not paused */
	char	   *reason;
	int			failures;
	TimestampTz not_before;
} ServerState;

extern bool abp_server_state_by_role(void);
extern List *abp_server_states(bool by_role);
extern const ServerState *abp_server_state_find(List *states, const char *server, Oid role);
extern void abp_server_state_tell_shipper(void);
extern void abp_server_state_save(const char *server, Oid role,
								  const char *paused, const char *reason,
								  int failures, TimestampTz not_before);
extern void abp_server_state_resume(const char *server, Oid role, bool by_operator);

#endif							/* ABP_SERVER_STATE_H */
