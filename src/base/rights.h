/*-------------------------------------------------------------------------
 *
 * rights.h
 *	  Whose rights what follows runs with.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_RIGHTS_H
#define ABP_RIGHTS_H

#include "postgres.h"

/* rights */
typedef struct SavedUser
{
	Oid			userid;
	int			sec_context;
	int			guc_level;
} SavedUser;

extern void abp_set_locally(const char *name, const char *value);
extern void abp_become(Oid userid, SavedUser *saved);
extern void abp_become_table_owner(Oid owner, SavedUser *saved);
extern void abp_become_extension_owner(SavedUser *saved);
extern void abp_restore_user(const SavedUser *saved);

#endif							/* ABP_RIGHTS_H */
