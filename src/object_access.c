/*-------------------------------------------------------------------------
 *
 * object_access.c
 *	  PostgreSQL's object access hook: what commands do to our objects.
 *
 * Two things are told nowhere else: how a server's options were before a
 * command changed them, and that the outbox goes with the extension, whose
 * own event triggers go first.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/objectaccess.h"
#include "catalog/pg_class.h"
#include "catalog/pg_foreign_server.h"

#include "base/extension.h"
#include "object_access.h"
#include "polar/server.h"
#include "queue/outbox.h"

static object_access_hook_type next_hook = NULL;

/*
 * Called for every object: checks a server's options, and warns of an outbox
 * that is dropped.
 */
static void
on_object_access(ObjectAccessType access, Oid class_id, Oid object_id, int sub_id, void *arg)
{
	if (next_hook != NULL)
		next_hook(access, class_id, object_id, sub_id, arg);

	if (class_id == ForeignServerRelationId &&
		(access == OAT_POST_CREATE || access == OAT_POST_ALTER))
		abp_server_check_change(object_id);
	else if (class_id == RelationRelationId && access == OAT_DROP && sub_id == 0 &&
			 object_id == abp_extension_relation("outbox_entry"))
	{
		int64		count = abp_outbox_count_all();

		if (count > 0)
			ereport(WARNING,
					(errcode(ERRCODE_WARNING),
					 errmsg("dropping extension aibilling_polar drops " INT64_FORMAT " usage rows that were not delivered from the outbox",
							count),
					 errhint("The rows stay in their usage tables. ROLLBACK keeps them in the outbox, too.")));
	}
}

/*
 * Install the hook.  Once a process, when the library is loaded: by the
 * postmaster, or by the first of our functions that a session calls.
 */
void
abp_object_access_init(void)
{
	next_hook = object_access_hook;
	object_access_hook = on_object_access;
}
