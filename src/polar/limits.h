/*-------------------------------------------------------------------------
 *
 * limits.h
 *	  Polar's limits and names.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_LIMITS_H
#define ABP_LIMITS_H

#include "postgres.h"

#include "base/text_view.h"

/* Polar's limits: characters are code points. */
#define MAX_NAME_CHARS		128
#define MAX_VALUE_CHARS		500
#define MAX_KEY_CHARS		40
#define MAX_METADATA_KEYS	50

/*
 * Polar indexes the ids and fails on values that do not fit an index page;
 * ours are kept far below.
 */
#define MAX_ID_BYTES		255

/* An amount in cents: digits before and after the point, significant ones. */
#define MAX_AMOUNT_WHOLE	5
#define MAX_AMOUNT_DECIMALS	12
#define MAX_AMOUNT_DIGITS	15

/* Below the limit as it is, but not as Polar stores it. */
#define AMOUNT_ROUNDS_UP \
	"%s must be below 99,999.99999999995 in magnitude: Polar keeps 15 digits, by which it would be 100,000 (1,000 USD), which Polar refuses"

/* |cost_nanos| up to here is surely below 100,000 cents. */
#define SAFE_COST_NANOS		INT64CONST(999999999998)

/*
 * Names that the extension itself gives to metadata.  No tag may end up with
 * one of them, or an application's tag could replace a cost.
 */
#define NUM_OWN_KEYS 19
extern const TextView abp_own_keys[NUM_OWN_KEYS];

/* Polar answers 413 above it. */
#define MAX_BATCH_BYTES		10485760

#define PRODUCTION_URL "https://api.polar.sh"
#define SANDBOX_URL "https://sandbox-api.polar.sh"

/*
 * Polar allows an organization 500 requests a minute in production and 100 in
 * the sandbox, for all calls of all its tokens together: leave some to others.
 */
#define PRODUCTION_REQUESTS_PER_MINUTE 450
#define SANDBOX_REQUESTS_PER_MINUTE 90

#define POLAR_INGEST_PATH "/v1/events/ingest"

#endif							/* ABP_LIMITS_H */
