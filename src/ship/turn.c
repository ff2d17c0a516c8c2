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

MemoryContext abp_shipper_memory = NULL;

/*
 * Has this turn taken its time?
 */
bool
abp_turn_is_over(Turn *turn)
{
	return TimestampDifferenceExceeds(turn->started, GetCurrentTimestamp(), TURN_MS);
}

/*
 * Something is to be done then: the next turn is not to come later.
 */
void
abp_turn_due_at(Turn *turn, TimestampTz when)
{
	turn->next_due = Min(turn->next_due, when);
}

/*
 * The time so many milliseconds from now.
 */
TimestampTz
abp_turn_in_ms(int64 ms)
{
	return GetCurrentTimestamp() + ms * INT64CONST(1000);
}
