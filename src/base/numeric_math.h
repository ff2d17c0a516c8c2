/*-------------------------------------------------------------------------
 *
 * numeric_math.h
 *	  Arithmetic of numeric, in readable form.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_NUMERIC_MATH_H
#define ABP_NUMERIC_MATH_H

#include "postgres.h"

#include "utils/fmgrprotos.h"
#include "utils/numeric.h"

static inline Numeric
numeric_plus(Numeric a, Numeric b)
{
	return DatumGetNumeric(DirectFunctionCall2(numeric_add,
											   NumericGetDatum(a),
											   NumericGetDatum(b)));
}

static inline Numeric
numeric_minus(Numeric a, Numeric b)
{
	return DatumGetNumeric(DirectFunctionCall2(numeric_sub,
											   NumericGetDatum(a),
											   NumericGetDatum(b)));
}

static inline Numeric
numeric_times(Numeric a, Numeric b)
{
	return DatumGetNumeric(DirectFunctionCall2(numeric_mul,
											   NumericGetDatum(a),
											   NumericGetDatum(b)));
}

/* Below, at or above 0, as a is to b. */
static inline int
numeric_compare(Numeric a, Numeric b)
{
	return DatumGetInt32(DirectFunctionCall2(numeric_cmp,
											 NumericGetDatum(a),
											 NumericGetDatum(b)));
}

static inline bool
numeric_equal(Numeric a, Numeric b)
{
	return numeric_compare(a, b) == 0;
}

static inline int
numeric_signum(Numeric a)
{
	return numeric_compare(a, int64_to_numeric(0));
}

static inline Numeric
numeric_magnitude(Numeric a)
{
	return DatumGetNumeric(DirectFunctionCall1(numeric_abs, NumericGetDatum(a)));
}

/* What a text says that is known to be a number. */
static inline Numeric
numeric_of_text(const char *text)
{
	return DatumGetNumeric(DirectFunctionCall3(numeric_in,
											   CStringGetDatum(text),
											   ObjectIdGetDatum(InvalidOid),
											   Int32GetDatum(-1)));
}

/* With the zeros of its display scale, palloc'd. */
static inline char *
numeric_text(Numeric a)
{
	return DatumGetCString(DirectFunctionCall1(numeric_out, NumericGetDatum(a)));
}

/* One that bigint can hold, rounded. */
static inline int64
numeric_as_int64(Numeric a)
{
	return DatumGetInt64(DirectFunctionCall1(numeric_int8, NumericGetDatum(a)));
}

/* Without the trailing zeros of its display scale. */
static inline Numeric
numeric_trimmed(Numeric a)
{
	return DatumGetNumeric(DirectFunctionCall1(numeric_trim_scale,
											   NumericGetDatum(a)));
}

/* Rounded half away from zero. */
static inline Numeric
numeric_rounded(Numeric a, int scale)
{
	return DatumGetNumeric(DirectFunctionCall2(numeric_round,
											   NumericGetDatum(a),
											   Int32GetDatum(scale)));
}

#endif							/* ABP_NUMERIC_MATH_H */
