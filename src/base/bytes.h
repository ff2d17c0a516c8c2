/*-------------------------------------------------------------------------
 *
 * bytes.h
 *	  Numbers and strings as bytes, that do not depend on the machine.
 *
 * Numbers have seven bits a byte, the lowest first; the highest bit of a byte
 * says that more follow.  Those that can be negative have their sign in the
 * lowest bit: numbers near 0 are short, negative ones, too.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_BYTES_H
#define ABP_BYTES_H

#include "postgres.h"

#include "lib/stringinfo.h"

#include "base/text_view.h"

#define MAX_NUMBER_BYTES 19		/* of 128 bits, seven a byte */

/* Append a number. */
static inline void
abp_bytes_put_unsigned(StringInfo to, uint128 value)
{
	char	   *at;
	uint64		low;

	if (unlikely(to->maxlen - to->len <= MAX_NUMBER_BYTES))
		enlargeStringInfo(to, MAX_NUMBER_BYTES);
	at = to->data + to->len;
	for (; unlikely(value > PG_UINT64_MAX); value >>= 7)
		*at++ = (char) (0x80 | (value & 0x7f));
	for (low = (uint64) value; low >= 0x80; low >>= 7)	/* 128 bits are slow */
		*at++ = (char) (0x80 | (low & 0x7f));
	*at++ = (char) low;
	to->len = at - to->data;
}

/* Append one that can be negative. */
static inline void
abp_bytes_put_signed(StringInfo to, int128 value)
{
	abp_bytes_put_unsigned(to, value < 0 ? ((~(uint128) value) << 1) | 1 : (uint128) value << 1);
}

/* Append a string, after its length. */
static inline void
abp_bytes_put_string(StringInfo to, const char *data, int len)
{
	abp_bytes_put_unsigned(to, len);
	appendBinaryStringInfoNT(to, data, len);
}

/* Bytes that are being read; what ends too early raises an error. */
typedef struct ByteReader
{
	const char *at;
	const char *end;
	const char *what;			/* what cannot be read then, for the message */
} ByteReader;

extern void abp_bytes_corrupted(const ByteReader *reader);
extern uint128 abp_bytes_get_unsigned(ByteReader *reader);
extern int128 abp_bytes_get_signed(ByteReader *reader);

/* The next bytes, where they lie. */
static inline const char *
abp_bytes_get(ByteReader *reader, uint64 len)
{
	const char *bytes = reader->at;

	if (unlikely(len > (uint64) (reader->end - reader->at)))
		abp_bytes_corrupted(reader);
	reader->at += len;
	return bytes;
}

/* A string, where it lies. */
static inline TextView
abp_bytes_get_string(ByteReader *reader)
{
	uint64		len = (uint64) abp_bytes_get_unsigned(reader);
	TextView	view = {abp_bytes_get(reader, len), (int) len};

	return view;
}

#endif							/* ABP_BYTES_H */
