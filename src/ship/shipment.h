/*-------------------------------------------------------------------------
 *
 * shipment.h
 *	  A delivery on its way.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_SHIPMENT_H
#define ABP_SHIPMENT_H

#include "postgres.h"

#include "datatype/timestamp.h"
#include "nodes/pg_list.h"

#include "queue/ledger.h"
#include "ship/families.h"
#include "ship/http.h"
#include "ship/turn.h"
#include "usage/share_bytes.h"

typedef struct Lane Lane;

typedef enum ShipmentStage
{
	SHIPMENT_PREPARED,			/* in the ledger, to be sent after commit */
	SHIPMENT_IN_FLIGHT,
	SHIPMENT_ANSWERED,			/* to be settled */
	SHIPMENT_WAITING			/* to be sent again at retry_at */
} ShipmentStage;

/* A delivery on its way. */
typedef struct Shipment
{
	MemoryContext context;		/* holds the shipment */
	Delivery	delivery;
	Lane	   *lane;
	ShipmentStage stage;
	HttpRequest *request;
	TimestampTz retry_at;
	Kinship    *kin;			/* who is whose parent, in its last request */
	int			nkin;
	MemoryContext share_context;	/* share_rows is in it */
	ShareRows	share_rows;		/* what each event of its last request adds up
								 * to */
	int			server_errors;	/* in a row */
	TimestampTz first_error_at;
	int			timeouts;
} Shipment;

/* Those that are not settled. */
extern List *abp_shipments;

extern Shipment *abp_shipment_new(Lane *lane, const char *server);
extern void abp_shipment_drop(Turn *turn, Shipment *shipment);
extern void abp_shipment_forget_request(Shipment *shipment);
extern void abp_shipment_begin_sums(Shipment *shipment);
extern void abp_shipment_add_up(Shipment *shipment);
extern void abp_shipment_copy_keys(Delivery *to, const Delivery *from);
extern void abp_shipment_disown(const Delivery *delivery, IdSet *ids);
extern void abp_shipment_set_kin(Shipment *shipment, const Kinship *kin, int nkin);

#endif							/* ABP_SHIPMENT_H */
