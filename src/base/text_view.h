/*-------------------------------------------------------------------------
 *
 * text_view.h
 *	  Strings where they lie, in a tuple or a constant.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_TEXT_VIEW_H
#define ABP_TEXT_VIEW_H

#include "postgres.h"

#include "mb/pg_wchar.h"
#include "utils/builtins.h"

#include "compat.h"

/*
 * A string that need not end in a zero byte, pointing into a tuple or a
 * constant.  data == NULL is SQL's NULL.
 */
typedef struct TextView
{
	const char *data;
	int			len;
} TextView;

/* The words of why a row is not sent, and of an error, are cut to this, in bytes. */
#define MAX_REASON_LEN 1000

static inline TextView
text_view_of(const char *string)
{
	TextView	view = {string, strlen(string)};

	return view;
}

/*
 * A value of type text, which is not NULL, as it lies there; what is compressed
 * or stored out of line is fetched into the current memory context.
 */
static inline TextView
text_view_from_datum(Datum value)
{
	struct varlena *text = (struct varlena *) DatumGetPointer(value);
	TextView	view;

	/* the test that DatumGetTextPP calls a function for */
	if (VARATT_IS_COMPRESSED(text) || VARATT_IS_EXTERNAL(text))
		text = pg_detoast_datum_packed(text);

	view.data = VARDATA_ANY(text);
	view.len = VARSIZE_ANY_EXHDR(text);
	return view;
}

/* Are these the same bytes?  NULL counts as an empty string. */
static inline bool
text_view_equal(TextView a, TextView b)
{
	return a.len == b.len &&
		(a.data == b.data || memcmp(a.data, b.data, a.len) == 0);
}

/* The same text as a value of type text, palloc'd. */
static inline Datum
text_view_datum(TextView view)
{
	return PointerGetDatum(cstring_to_text_with_len(view.data, view.len));
}

/* The same of one that may be NULL. */
static inline Datum
text_view_or_null(TextView view, bool *isnull)
{
	*isnull = view.data == NULL;
	return *isnull ? (Datum) 0 : text_view_datum(view);
}

/* Is a string what a constant says? */
static inline bool
text_view_is(TextView view, const char *other)
{
	return view.len == strlen(other) && memcmp(view.data, other, view.len) == 0;
}

/*
 * Is a string longer than this many code points?  Counting is left for the
 * strings that have more bytes than that.
 */
static inline bool
text_longer_than(const char *data, int len, int nchars)
{
	return unlikely(len > nchars) && pg_mbstrlen_with_len(data, len) > nchars;
}

extern TextView abp_text_view_copy(TextView view, MemoryContext context);
extern text *abp_reason_text(const char *reason);
extern int	abp_quoted_len(const char *data, int len);
extern int	abp_short_length(const char *reason);
extern void abp_shorten(char *reason);

#endif							/* ABP_TEXT_VIEW_H */
