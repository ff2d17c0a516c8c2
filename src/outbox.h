/*-------------------------------------------------------------------------
 *
 * outbox.h
 *	  The outbox, the ledger and the usage rows: all their SQL.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_OUTBOX_H
#define ABP_OUTBOX_H

#include "postgres.h"

#include "idset.h"
#include "row.h"

#endif							/* ABP_OUTBOX_H */
