/*-------------------------------------------------------------------------
 *
 * attachment.h
 *	  Attached usage tables: the table aibilling.attachment.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_ATTACHMENT_H
#define ABP_ATTACHMENT_H

#include "postgres.h"

#include "datatype/timestamp.h"
#include "nodes/pg_list.h"

/* An attached usage table and its server, as the shipper sees them. */
typedef struct UsageTable
{
	Oid			relid;
	Oid			owner;			/* InvalidOid: the table is gone */
	char	   *name;			/* schema-qualified and quoted */
	char	   *server;
	Oid			serverid;		/* InvalidOid: no such server */
	Oid			role;			/* the owner, if it has a user mapping of its
								 * own there, else InvalidOid */
	bool		paused_by_operator;
	bool		paused_by_answer;
	char	   *pause_reason;
	int			failures;
	TimestampTz not_before;		/* DT_NOBEGIN: none */
	TimestampTz blocked_until;	/* DT_NOBEGIN: not blocked */
	char	   *blocked_reason;
	int64		ledger_from;	/* the last delivery before the last TRUNCATE */
	int64		not_queued;		/* rows priced without being queued, summed up */
} UsageTable;

extern const char *abp_attachment_table(void);
extern List *abp_attachments(bool *armed);
extern UsageTable *abp_attachment_former(Oid relid);
extern UsageTable *abp_attachment_of(List *tables, Oid relid);
extern bool abp_attachment_find(Oid relid, Oid *serverid,
								int64 *ledger_from);
extern bool abp_attachment_hold(Oid relid);
extern void abp_attachment_lock(Oid relid);
extern void abp_attachments_follow_servers(void);
extern void abp_attachment_forget(Oid relid);
extern void abp_attachment_truncated(Oid relid);
extern bool abp_attachment_block(Oid relid, const char *reason,
								 TimestampTz until);
extern void abp_attachment_unblock(Oid relid, bool may_wait);

#endif							/* ABP_ATTACHMENT_H */
