/*-------------------------------------------------------------------------
 *
 * held_commit.c
 *	  A commit that takes until a test lets it end.
 *
 * In a session that has loaded this, a transaction that commits is seen by all
 * others to have done so, and then waits as long as the file HELD_COMMIT is
 * there: before it tells them what they know that is not true any more, and
 * with all its locks.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <unistd.h>

#include "access/xact.h"
#include "fmgr.h"

PG_MODULE_MAGIC;

void		_PG_init(void);

static void
hold(XactEvent event, void *arg)
{
	while (event == XACT_EVENT_COMMIT && access(HELD_COMMIT, F_OK) == 0)
		pg_usleep(1000);
}

void
_PG_init(void)
{
	RegisterXactCallback(hold, NULL);
}
