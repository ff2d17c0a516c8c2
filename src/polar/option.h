/*-------------------------------------------------------------------------
 *
 * option.h
 *	  The value of one option of a server: read and checked.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_OPTION_H
#define ABP_OPTION_H

#include "postgres.h"

#include "commands/defrem.h"
#include "nodes/pg_list.h"

#define DEFAULT_TAG_PREFIX "tag_"

#define MAX_TOKEN_BYTES 4096

extern void abp_option_refuse(const char *option, const char *value,
							  const char *detail, const char *hint);
extern char *abp_option_choices(const char *const *choices);
extern int	abp_option_choice(DefElem *def, const char *const *choices);
extern int	abp_option_int(DefElem *def, int flags, int min, int max,
						   const char *range);
extern const char *abp_option_text(DefElem *def);
extern const char *abp_option_path(DefElem *def);
extern const char *abp_option_event_name(DefElem *def);
extern const char *abp_option_tag_prefix(DefElem *def);
extern List *abp_option_function_name(DefElem *def);
extern const char *abp_option_token_fault(const char *token, size_t len);

#endif							/* ABP_OPTION_H */
