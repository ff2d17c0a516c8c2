/*-------------------------------------------------------------------------
 *
 * shipment.c
 *	  A delivery on its way.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "utils/memutils.h"

#include "base/idset.h"
#include "queue/ledger.h"
#include "queue/shares.h"
#include "ship/http.h"
#include "ship/shipment.h"
#include "ship/turn.h"
#include "usage/share_bytes.h"

List	   *abp_shipments = NIL;

/*
 * A new delivery for a lane and its server, with a memory context of its own.
 */
Shipment   *
abp_shipment_new(Lane *lane, const char *server)
{
	MemoryContext context = AllocSetContextCreate(abp_shipper_memory, "aibilling_polar shipment",
												  ALLOCSET_DEFAULT_SIZES);
	Shipment   *shipment = MemoryContextAllocZero(context, sizeof(Shipment));
	MemoryContext old = MemoryContextSwitchTo(abp_shipper_memory);

	shipment->context = context;
	shipment->share_context = AllocSetContextCreate(context, "aibilling_polar shipment's share",
													ALLOCSET_DEFAULT_SIZES);
	shipment->lane = lane;
	shipment->delivery.server = MemoryContextStrdup(context, server);
	abp_shipments = lappend(abp_shipments, shipment);
	MemoryContextSwitchTo(old);
	return shipment;
}

/*
 * A delivery is settled: forget it.
 */
void
abp_shipment_drop(Turn *turn, Shipment *shipment)
{
	if (shipment->request != NULL)
		abp_http_release(shipment->request);
	turn->settled++;
	abp_shipments = list_delete_ptr(abp_shipments, shipment);
	MemoryContextDelete(shipment->context);
}

/* Free a shipment's request, which is built anew before it is sent again. */
void
abp_shipment_forget_request(Shipment *shipment)
{
	Delivery   *delivery = &shipment->delivery;

	if (shipment->request != NULL)
		abp_http_release(shipment->request);
	shipment->request = NULL;
	if (delivery->body.data != NULL)
		pfree(delivery->body.data);
	delivery->body.data = NULL;
	if (delivery->event_ids != NULL)
		pfree(delivery->event_ids);
	delivery->event_ids = NULL;
}

/* A new request: nothing is known of what its events add up to. */
void
abp_shipment_begin_sums(Shipment *shipment)
{
	MemoryContextReset(shipment->share_context);
	abp_share_rows_init(&shipment->share_rows, shipment->share_context);
}

/* Write what the events of its request add up to, but for those that others count. */
void
abp_shipment_add_up(Shipment *shipment)
{
	Delivery   *delivery = &shipment->delivery;
	bool	   *skip = NULL;
	MemoryContext old;

	if (delivery->counted.nranges > 0)
	{
		skip = palloc(sizeof(bool) * Max(1, delivery->nevents));
		for (int i = 0; i < delivery->nevents; i++)
			skip[i] = abp_idset_contains(&delivery->counted, delivery->event_ids[i]);
	}

	old = MemoryContextSwitchTo(shipment->context);
	if (delivery->share != NULL)
		pfree(delivery->share);
	delivery->share = NULL;
	delivery->share = abp_share_encode(&shipment->share_rows, skip);
	MemoryContextSwitchTo(old);
}

/* Two deliveries know the same rows again; in the current memory context. */
void
abp_shipment_copy_keys(Delivery *to, const Delivery *from)
{
	int64		count = abp_idset_count(unconstify(IdSet *, &from->key_ids));

	to->key_ids = abp_idset_copy(&from->key_ids);
	to->keys = NULL;
	if (from->keys != NULL)
	{
		to->keys = palloc(sizeof(uint32) * Max(1, count));
		memcpy(to->keys, from->keys, sizeof(uint32) * count);
	}
}

/*
 * Ids of a delivery go back to the outbox.  Those whose events Polar may have are
 * no longer counted by an older delivery, if this one was to count them.
 */
void
abp_shipment_disown(const Delivery *delivery, IdSet *ids)
{
	IdSet		own;

	if (!delivery->outcome_unknown || !delivery->knows_counted)
		return;
	own = abp_idset_subtract(ids, unconstify(IdSet *, &delivery->counted));
	abp_shares_disown(delivery->id, delivery->usage_table, &own);
}

/* Note who is whose parent among the rows of a shipment's request. */
void
abp_shipment_set_kin(Shipment *shipment, const Kinship *kin, int nkin)
{
	if (shipment->kin != NULL)
		pfree(shipment->kin);
	shipment->kin = NULL;
	shipment->nkin = nkin;
	if (nkin == 0)
		return;
	shipment->kin = MemoryContextAlloc(shipment->context, sizeof(Kinship) * nkin);
	memcpy(shipment->kin, kin, sizeof(Kinship) * nkin);
}
