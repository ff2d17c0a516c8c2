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

/* How much of the user's own text a reason repeats. */
#define MAX_QUOTED_BYTES	40

/*
 * A copy in "context", with a zero byte behind it.
 */
TextView
abp_text_view_copy(TextView view, MemoryContext context)
{
	char	   *data = MemoryContextAlloc(context, view.len + 1);
	TextView	copy = {data, view.len};

	memcpy(data, view.data, view.len);
	data[view.len] = '\0';
	return copy;
}

/*
 * A reason as text, cut to MAX_REASON_LEN; palloc'd.
 */
text	   *
abp_reason_text(const char *reason)
{
	return cstring_to_text_with_len(reason, abp_short_length(reason));
}

/* How many bytes of a string of the user's a reason may repeat. */
int
abp_quoted_len(const char *data, int len)
{
	return pg_mbcliplen(data, len, MAX_QUOTED_BYTES);
}

/* How much of a reason is stored and logged, in bytes. */
int
abp_short_length(const char *reason)
{
	int			len = strlen(reason);

	return len <= MAX_REASON_LEN ? len : pg_mbcliplen(reason, len, MAX_REASON_LEN);
}

/* Cut a reason, which may be NULL, to that. */
void
abp_shorten(char *reason)
{
	if (reason != NULL)
		reason[abp_short_length(reason)] = '\0';
}
