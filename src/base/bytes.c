/*-------------------------------------------------------------------------
 *
 * bytes.c
 *	  Numbers and strings as bytes, that do not depend on the machine.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "base/bytes.h"

/*
 * The bytes are not those that were written: raises ERRCODE_DATA_CORRUPTED.
 */
void
abp_bytes_corrupted(const ByteReader *reader)
{
	ereport(ERROR,
			(errcode(ERRCODE_DATA_CORRUPTED),
			 errmsg("%s cannot be read", reader->what)));
}

/*
 * What abp_bytes_put_unsigned has written.  Raises ERRCODE_DATA_CORRUPTED for
 * what is no number of 128 bits.
 */
uint128
abp_bytes_get_unsigned(ByteReader *reader)
{
	uint128		value = 0;

	for (int shift = 0;; shift += 7)
	{
		unsigned char byte = *abp_bytes_get(reader, 1);

		if (shift > 126 || (shift == 126 && byte > 3))
			abp_bytes_corrupted(reader);
		value |= (uint128) (byte & 0x7f) << shift;
		if (byte < 0x80)
			return value;
	}
}

/*
 * What abp_bytes_put_signed has written; the same errors.
 */
int128
abp_bytes_get_signed(ByteReader *reader)
{
	uint128		value = abp_bytes_get_unsigned(reader);

	return (int128) ((value >> 1) ^ -(value & 1));
}
