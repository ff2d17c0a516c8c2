/*-------------------------------------------------------------------------
 *
 * transaction.h
 *	  When a transaction ends.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_TRANSACTION_H
#define ABP_TRANSACTION_H

#include "postgres.h"

#include "access/xact.h"

/* Does this event end the transaction, one way or the other? */
static inline bool
abp_transaction_ends(XactEvent event)
{
	switch (event)
	{
		case XACT_EVENT_COMMIT:
		case XACT_EVENT_PARALLEL_COMMIT:
		case XACT_EVENT_ABORT:
		case XACT_EVENT_PARALLEL_ABORT:
		case XACT_EVENT_PREPARE:
			return true;
		default:
			return false;
	}
}

#endif							/* ABP_TRANSACTION_H */
