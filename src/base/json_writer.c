/*-------------------------------------------------------------------------
 *
 * json_writer.c
 *	  JSON, written into a string or only checked.
 *
 * The writers do not keep the body zero-terminated: whoever is done with it does.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "mb/pg_wchar.h"

#include "base/json_writer.h"

/*
 * Append a sentence to the reason.  Always returns false, for the caller to
 * return.
 */
bool
abp_json_refuse(JsonWriter *w, const char *fmt,...)
{
	for (;;)
	{
		va_list		args;
		int			needed;

		va_start(args, fmt);
		needed = appendStringInfoVA(w->reason, fmt, args);
		va_end(args);

		if (needed == 0)
			return false;
		enlargeStringInfo(w->reason, needed);
	}
}

/*
 * Has one of eight bytes to be escaped in a JSON string?
 */
static inline bool
needs_escape8(const char *data)
{
	const uint64 ones = UINT64CONST(0x0101010101010101);
	uint64		word;
	uint64		control;
	uint64		quote;
	uint64		backslash;

	memcpy(&word, data, sizeof(word));
	control = (word - ones * 0x20) & ~word;
	quote = word ^ (ones * '"');
	quote = (quote - ones) & ~quote;
	backslash = word ^ (ones * '\\');
	backslash = (backslash - ones) & ~backslash;

	return ((control | quote | backslash) & (ones * 0x80)) != 0;
}

/* The same of one byte. */
static inline bool
needs_escape(unsigned char c)
{
	return c < 0x20 || c == '"' || c == '\\';
}

/*
 * Append a JSON string, quotes included.  Bytes that need no escape are copied
 * as they are; strings are short, a call to copy one takes longer.
 */
void
abp_json_append_string(StringInfo out, const char *data, int len)
{
	static const char hex[] = "0123456789abcdef";
	const char *end = data + len;
	char	   *p = reserve(out, len + 2);

	*p++ = '"';
	while (data < end)
	{
		char		escape[6] = {'\\', 'u', '0', '0'};
		int			escape_len = 2;

		for (; end - data >= 8 && !needs_escape8(data); data += 8, p += 8)
			memcpy(p, data, 8);
		for (; data < end && !needs_escape((unsigned char) *data); data++)
			*p++ = *data;
		if (data == end)
			break;

		switch (*data)
		{
			case '"':
			case '\\':
				escape[1] = *data;
				break;
			case '\b':
				escape[1] = 'b';
				break;
			case '\f':
				escape[1] = 'f';
				break;
			case '\n':
				escape[1] = 'n';
				break;
			case '\r':
				escape[1] = 'r';
				break;
			case '\t':
				escape[1] = 't';
				break;
			default:
				escape[4] = hex[((unsigned char) *data) >> 4];
				escape[5] = hex[((unsigned char) *data) & 0x0f];
				escape_len = 6;
				break;
		}
		data++;

		/* room for this escape, the rest and the closing quote */
		out->len = p - out->data;
		p = reserve(out, escape_len + (int) (end - data) + 1);
		memcpy(p, escape, escape_len);
		p += escape_len;
	}
	*p++ = '"';
	out->len = p - out->data;
}

/*
 * Write a string in a database whose encoding is not UTF8.  SQL_ASCII knows
 * no encoding: there, what is not UTF-8 already is refused.
 */
void
abp_json_put_converted(JsonWriter *w, const char *data, int len)
{
	char	   *converted = NULL;

	if (GetDatabaseEncoding() == PG_SQL_ASCII)
	{
		if (!pg_verify_mbstr(PG_UTF8, data, len, true))
		{
			w->invalid_text = true;
			return;
		}
	}
	else if (w->body != NULL && len > 0)
	{
		converted = pg_server_to_any(data, len, PG_UTF8);
		if (converted != data)
		{
			data = converted;
			len = strlen(converted);
		}
		else
			converted = NULL;
	}

	if (w->body != NULL)
		abp_json_append_string(w->body, data, len);
	if (converted != NULL)
		pfree(converted);
}

/* A UUID in its canonical form, quotes included. */
void
abp_json_put_uuid(JsonWriter *w, const pg_uuid_t *uuid)
{
	static const char hex[] = "0123456789abcdef";
	char		str[38];
	char	   *p = str;

	*p++ = '"';
	for (int i = 0; i < UUID_LEN; i++)
	{
		if (i == 4 || i == 6 || i == 8 || i == 10)
			*p++ = '-';
		*p++ = hex[uuid->data[i] >> 4];
		*p++ = hex[uuid->data[i] & 0x0f];
	}
	*p++ = '"';
	abp_json_put_bytes(w, str, p - str);
}
