/*-------------------------------------------------------------------------
 *
 * json_writer.h
 *	  JSON, written into a string or only checked.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_JSON_WRITER_H
#define ABP_JSON_WRITER_H

#include "postgres.h"

#include "datatype/timestamp.h"
#include "lib/stringinfo.h"
#include "utils/builtins.h"
#include "utils/uuid.h"

#include "base/text_view.h"

/*
 * Where an event goes.  The same code checks rows and encodes them, so that
 * the two can never disagree: a check is an encoding without a body.
 */
typedef struct JsonWriter
{
	StringInfo	body;			/* NULL: check only */
	StringInfo	reason;
	int			nkeys;			/* metadata keys so far */
	bool		convert;		/* the database's encoding is not UTF8 */
	bool		invalid_text;	/* a string cannot be written as UTF-8 */
} JsonWriter;

extern bool abp_json_refuse(JsonWriter *w, const char *fmt,...) pg_attribute_printf(2, 3);
extern void abp_json_append_string(StringInfo out, const char *data, int len);
extern void abp_json_put_converted(JsonWriter *w, const char *data, int len);
extern void abp_json_put_uuid(JsonWriter *w, const pg_uuid_t *uuid);

/*
 * Room for len more bytes, and where it is.  The caller sets the new length.
 */
static inline char *
reserve(StringInfo body, int len)
{
	if (unlikely(body->len + len >= body->maxlen))
		enlargeStringInfo(body, len);
	return body->data + body->len;
}

/* Append what is JSON already. */
static inline void
abp_json_put_bytes(JsonWriter *w, const char *data, int len)
{
	if (w->body == NULL)
		return;
	memcpy(reserve(w->body, len), data, len);
	w->body->len += len;
}

#define abp_json_put_literal(w, literal) abp_json_put_bytes((w), "" literal, sizeof(literal) - 1)

static inline void
abp_json_put_int64(JsonWriter *w, int64 value)
{
	if (w->body == NULL)
		return;
	w->body->len += pg_lltoa(value, reserve(w->body, MAXINT8LEN + 1));
}

/* Append a string, quotes included, or set invalid_text if it is not UTF-8. */
static inline void
abp_json_put_string(JsonWriter *w, const char *data, int len)
{
	if (unlikely(w->convert))
		abp_json_put_converted(w, data, len);
	else if (w->body != NULL)
		abp_json_append_string(w->body, data, len);
}

#endif							/* ABP_JSON_WRITER_H */
