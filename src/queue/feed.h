/*-------------------------------------------------------------------------
 *
 * feed.h
 *	  Usage tables that a subscription feeds: which they are, and what is
 *	  counted of them.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_FEED_H
#define ABP_FEED_H

#include "postgres.h"

#include "base/idset.h"
#include "queue/ledger.h"

extern bool abp_feed_replicated(Oid usage_table);
extern void abp_feed_sum_up(Oid usage_table);
extern void abp_feed_settled(const Delivery *delivery);

#endif							/* ABP_FEED_H */
