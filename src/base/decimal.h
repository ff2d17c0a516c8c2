/*-------------------------------------------------------------------------
 *
 * decimal.h
 *	  Decimal numbers as digits: read, rounded, written.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_DECIMAL_H
#define ABP_DECIMAL_H

#include "postgres.h"

#include "utils/numeric.h"

/*
 * A decimal number as digits: 0.d1d2d3... times ten to the power of point.
 * No leading or trailing zeros; zero has no digits.
 */
typedef struct DecimalText
{
	bool		negative;
	char	   *digits;			/* '0' to '9', not zero-terminated */
	int			ndigits;
	int			point;
} DecimalText;

extern bool abp_decimal_read(const char *str, int len, DecimalText *decimal);
extern void abp_decimal_round(DecimalText *decimal, int max_digits, int max_decimals);
extern char *abp_decimal_write(const DecimalText *decimal);
extern Numeric abp_decimal_numeric(int128 value, int scale);

#endif							/* ABP_DECIMAL_H */
