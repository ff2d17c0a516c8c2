/*-------------------------------------------------------------------------
 *
 * extension.h
 *	  The extension in this database: is it there, and which relations has it?
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_EXTENSION_H
#define ABP_EXTENSION_H

#include "postgres.h"

#include "commands/event_trigger.h"
#include "fmgr.h"

extern bool abp_extension_installed(void);
extern Oid	abp_extension_relation(const char *name);
extern void abp_extension_check_version(void);
extern Oid	abp_extension_needed(const char *name);
extern EventTriggerData *abp_extension_event(FunctionCallInfo fcinfo, const char *function);

#endif							/* ABP_EXTENSION_H */
