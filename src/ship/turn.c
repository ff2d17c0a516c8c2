/*-------------------------------------------------------------------------
 *
 * turn.c
 *	  What the rooms of delivery share of a turn: its time, and what it has found.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "utils/timestamp.h"

#include "ship/turn.h"

Turn		abp_turn = {.room_left = true,.prices_generation = 1,.servers_generation = 1};

/*
 * Has this turn taken its time?
 */
bool
abp_turn_is_over(void)
{
	return TimestampDifferenceExceeds(abp_turn.started, GetCurrentTimestamp(), TURN_MS);
}

/*
 * Something is to be done then: the next turn is not to come later.
 */
void
abp_due_at(TimestampTz when)
{
	abp_turn.next_due = Min(abp_turn.next_due, when);
}

/*
 * The time so many milliseconds from now.
 */
TimestampTz
abp_in_ms(int64 ms)
{
	return GetCurrentTimestamp() + ms * INT64CONST(1000);
}
