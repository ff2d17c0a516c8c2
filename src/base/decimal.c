/*-------------------------------------------------------------------------
 *
 * decimal.c
 *	  Decimal numbers as digits: read, rounded, written.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "lib/stringinfo.h"

#include "base/decimal.h"
#include "base/numeric_math.h"

/*
 * Read a decimal number with an optional sign, fraction and exponent; blanks
 * around it are skipped.  Returns false if it is none.  The digits are
 * palloc'd.
 */
bool
abp_decimal_read(const char *str, int len, DecimalText *decimal)
{
	const char *p = str;
	const char *end = str + len;
	bool		any = false;
	int			start = 0;

	while (p < end && (*p == ' ' || (*p >= '\t' && *p <= '\r')))
		p++;
	while (end > p && (end[-1] == ' ' || (end[-1] >= '\t' && end[-1] <= '\r')))
		end--;

	decimal->negative = (p < end && *p == '-');
	if (p < end && (*p == '-' || *p == '+'))
		p++;

	decimal->digits = palloc(end - p + 1);
	decimal->ndigits = 0;
	decimal->point = 0;
	for (bool fraction = false; p < end; p++)
	{
		if (*p >= '0' && *p <= '9')
		{
			decimal->digits[decimal->ndigits++] = *p;
			if (!fraction)
				decimal->point++;
			any = true;
		}
		else if (*p == '.' && !fraction)
			fraction = true;
		else
			break;
	}
	if (!any)
		return false;

	if (p < end && (*p == 'e' || *p == 'E'))
	{
		int			exponent = 0;
		bool		negative;

		p++;
		negative = (p < end && *p == '-');
		if (p < end && (*p == '-' || *p == '+'))
			p++;
		if (p == end)
			return false;
		for (; p < end && *p >= '0' && *p <= '9'; p++)
			exponent = Min(exponent * 10 + (*p - '0'), 1000000);
		decimal->point += negative ? -exponent : exponent;
	}
	if (p < end)
		return false;

	while (decimal->ndigits > 0 && decimal->digits[decimal->ndigits - 1] == '0')
		decimal->ndigits--;
	while (start < decimal->ndigits && decimal->digits[start] == '0')
		start++;
	memmove(decimal->digits, decimal->digits + start, decimal->ndigits - start);
	decimal->ndigits -= start;
	decimal->point -= start;
	if (decimal->ndigits == 0)
		decimal->point = 0;
	return true;
}

/*
 * Round a decimal, half away from zero, to so many significant digits and
 * decimals, whichever is coarser: one rounding, of the exact value.
 */
void
abp_decimal_round(DecimalText *decimal, int max_digits, int max_decimals)
{
	int			keep = Min(max_digits, decimal->point + max_decimals);
	bool		up;

	if (decimal->ndigits <= keep)
		return;

	up = (keep >= 0 && decimal->digits[keep] >= '5');
	decimal->ndigits = Max(keep, 0);
	if (up)
	{
		int			i = decimal->ndigits - 1;

		while (i >= 0 && decimal->digits[i] == '9')
			i--;
		if (i >= 0)
			decimal->digits[i]++;
		else
		{
			/* all nines, or no digit left: the carry is a digit of its own */
			decimal->digits[0] = '1';
			decimal->point++;
			i = 0;
		}
		decimal->ndigits = i + 1;
	}
	while (decimal->ndigits > 0 && decimal->digits[decimal->ndigits - 1] == '0')
		decimal->ndigits--;
	if (decimal->ndigits == 0)
		decimal->point = 0;
}

/* A decimal as plain text: no exponent, no superfluous zero.  palloc'd. */
char	   *
abp_decimal_write(const DecimalText *decimal)
{
	StringInfoData str;

	initStringInfo(&str);
	if (decimal->negative && decimal->ndigits > 0)
		appendStringInfoChar(&str, '-');
	if (decimal->point <= 0)
		appendStringInfoString(&str, decimal->ndigits > 0 ? "0." : "0");
	for (int i = decimal->point; i < 0; i++)
		appendStringInfoChar(&str, '0');
	for (int i = 0; i < Max(decimal->ndigits, decimal->point); i++)
	{
		if (i > 0 && i == decimal->point)
			appendStringInfoChar(&str, '.');
		appendStringInfoChar(&str, i < decimal->ndigits ? decimal->digits[i] : '0');
	}
	return str.data;
}

/*
 * value / 10^scale as numeric, shown with all its decimals; palloc'd.
 */
Numeric
abp_decimal_numeric(int128 value, int scale)
{
	char		buf[128];		/* a sign, 39 digits or zeros in front of
								 * them, the point */
	char	   *p = buf + sizeof(buf);
	uint128		rest = value < 0 ? -(uint128) value : (uint128) value;
	int			ndigits = 0;

	if (value <= PG_INT64_MAX && value >= PG_INT64_MIN)
		return int64_div_fast_to_numeric((int64) value, scale);

	Assert(scale < 64);
	*--p = '\0';
	while (rest > 0 || ndigits <= scale)
	{
		*--p = '0' + (int) (rest % 10);
		rest /= 10;
		if (++ndigits == scale)
			*--p = '.';
	}
	if (value < 0)
		*--p = '-';
	return numeric_of_text(p);
}
