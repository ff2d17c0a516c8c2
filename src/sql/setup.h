/*-------------------------------------------------------------------------
 *
 * setup.h
 *	  What the checks of aibilling.check_setup() have in common.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_SETUP_H
#define ABP_SETUP_H

#include "postgres.h"

#include "nodes/execnodes.h"
#include "nodes/pg_list.h"

#include "queue/attachment.h"

typedef enum SetupAnswer
{
	SETUP_WRONG,
	SETUP_RIGHT,
	SETUP_UNKNOWN				/* not yet, or not to the caller */
} SetupAnswer;

typedef struct Setup
{
	ReturnSetInfo *result;
	int			step;			/* of the last row */
	bool		armed;
	List	   *tables;			/* of UsageTable: those that the caller may
								 * operate */
	List	   *servers;		/* of ServerOptions: those that the caller may
								 * use */
} Setup;

/* setup.c */
extern void abp_setup_put(Setup *setup, const char *item, SetupAnswer answer,
						  const char *wrong, const char *fix);
extern char *abp_setup_shell_word(const char *word);
extern const char *abp_setup_server_user(void);
extern char *abp_setup_ask(const char *query, int nargs, Oid *types, Datum *args);

/* setup_worker.c, setup_server.c, setup_table.c */
extern void abp_setup_check_worker(Setup *setup);
extern List *abp_setup_servers(void);
extern void abp_setup_check_servers(Setup *setup);
extern void abp_setup_check_table(Setup *setup, const UsageTable *table);

#endif							/* ABP_SETUP_H */
