/*-------------------------------------------------------------------------
 *
 * attach.h
 *	  Usage tables: create, attach, detach.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_ATTACH_H
#define ABP_ATTACH_H

#include "postgres.h"

#include "queue/attachment.h"

extern void abp_attach_check_owner(Oid relid);
extern UsageTable *abp_attach_needed(Oid relid);
extern bool abp_attach_ids_may_repeat(Oid relid);

#endif							/* ABP_ATTACH_H */
