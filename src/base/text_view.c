/*-------------------------------------------------------------------------
 *
 * text_view.c
 *	  Strings where they lie, and how reasons are cut.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "mb/pg_wchar.h"
#include "utils/builtins.h"

#include "base/text_view.h"

text	   *
abp_reason_text(const char *error)
{
	int			len = strlen(error);

	return cstring_to_text_with_len(error, len <= MAX_REASON_LEN ? len :
									pg_mbcliplen(error, len, MAX_REASON_LEN));
}
