/*-------------------------------------------------------------------------
 *
 * compat.h
 *	  Differences between PostgreSQL 15 and later major versions.
 *
 * The only file that looks at PG_VERSION_NUM.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_COMPAT_H
#define ABP_COMPAT_H

#include "postgres.h"

#if PG_VERSION_NUM < 150000
#error "aibilling_polar needs PostgreSQL 15 or later"
#endif

#include "common/jsonapi.h"
#include "mb/pg_wchar.h"
#include "storage/latch.h"
#include "utils/wait_event.h"

#if PG_VERSION_NUM >= 160000
#include "varatt.h"
#endif

#if PG_VERSION_NUM >= 180000
#include "storage/waiteventset.h"
#endif

/* The owner of a WaitEventSet is a resource owner from 17 on. */
#if PG_VERSION_NUM >= 170000
#define abp_create_wait_event_set(nevents) \
	CreateWaitEventSet(CurrentResourceOwner, (nevents))
#else
#define abp_create_wait_event_set(nevents) \
	CreateWaitEventSet(CurrentMemoryContext, (nevents))
#endif

/* Wait events of extensions have names of their own from 17 on. */
#if PG_VERSION_NUM >= 170000
#define abp_wait_event_new(name) WaitEventExtensionNew(name)
#else
#define abp_wait_event_new(name) PG_WAIT_EXTENSION
#endif

/* What other backends say of themselves, numbered from 1. */
#if PG_VERSION_NUM >= 160000
#define abp_backend_status(number) (&pgstat_get_local_beentry_by_index(number)->backendStatus)
#else
#define abp_backend_status(number) (&pgstat_fetch_stat_local_beentry(number)->backendStatus)
#endif

/* The wait event of this name, made at its first use; *event is 0 before. */
static inline uint32
abp_wait_event(uint32 *event, const char *name)
{
	if (*event == 0)
		*event = abp_wait_event_new(name);
	return *event;
}

/* 17 takes the lexer's storage as its first argument. */
#if PG_VERSION_NUM >= 170000
#define abp_make_json_lexer(json, len) \
	makeJsonLexContextCstringLen(NULL, (json), (len), PG_UTF8, true)
#else
#define abp_make_json_lexer(json, len) \
	makeJsonLexContextCstringLen((json), (len), PG_UTF8, true)
#endif

/* 16 added a soft-error argument. */
#if PG_VERSION_NUM >= 160000
#define abp_make_range(type, lower, upper) \
	make_range((type), (lower), (upper), false, NULL)
#else
#define abp_make_range(type, lower, upper) \
	make_range((type), (lower), (upper), false)
#endif

/* 17 can ask for stronger locks too. */
#if PG_VERSION_NUM >= 170000
#define abp_lock_held(tag, mode) LockHeldByMe((tag), (mode), false)
#else
#define abp_lock_held(tag, mode) LockHeldByMe((tag), (mode))
#endif

/* 16 added a soft-error argument here too. */
#if PG_VERSION_NUM >= 160000
#define ABP_NO_SOFT_ERROR , NULL
#else
#define ABP_NO_SOFT_ERROR
#endif

/* 16 has one function for all kinds of objects. */
#if PG_VERSION_NUM >= 160000
#include "catalog/pg_class.h"
#include "catalog/pg_database.h"
#include "catalog/pg_foreign_server.h"
#include "catalog/pg_proc.h"
#include "utils/acl.h"
#define abp_owns_table(relid, roleid) \
	object_ownercheck(RelationRelationId, (relid), (roleid))
#define abp_owns_server(serverid, roleid) \
	object_ownercheck(ForeignServerRelationId, (serverid), (roleid))
#define abp_owns_database(dbid, roleid) \
	object_ownercheck(DatabaseRelationId, (dbid), (roleid))
#define abp_may_execute(funcid, roleid) \
	(object_aclcheck(ProcedureRelationId, (funcid), (roleid), ACL_EXECUTE) == ACLCHECK_OK)
#define abp_server_aclcheck(serverid, roleid) \
	object_aclcheck(ForeignServerRelationId, (serverid), (roleid), ACL_USAGE)
#else
#include "utils/acl.h"
#define abp_owns_table(relid, roleid) pg_class_ownercheck((relid), (roleid))
#define abp_owns_server(serverid, roleid) pg_foreign_server_ownercheck((serverid), (roleid))
#define abp_owns_database(dbid, roleid) pg_database_ownercheck((dbid), (roleid))
#define abp_server_aclcheck(serverid, roleid) \
	pg_foreign_server_aclcheck((serverid), (roleid), ACL_USAGE)
#define abp_may_execute(funcid, roleid) \
	(pg_proc_aclcheck((funcid), (roleid), ACL_EXECUTE) == ACLCHECK_OK)
#endif

/* 17 can limit a transaction's time; what has ended the process by it is told so. */
#if PG_VERSION_NUM >= 170000
#define abp_transaction_timed_out() (TransactionTimeoutPending != 0)
#else
#define abp_transaction_timed_out() false
#endif

/* 18 can count an index scan's searches. */
#if PG_VERSION_NUM >= 180000
#define abp_index_beginscan(rel, index, snapshot, nkeys) \
	index_beginscan((rel), (index), (snapshot), NULL, (nkeys), 0)
#else
#define abp_index_beginscan(rel, index, snapshot, nkeys) \
	index_beginscan((rel), (index), (snapshot), (nkeys), 0)
#endif

/* A JSON parser's actions may end the parse from 16 on; before, they are void. */
#if PG_VERSION_NUM >= 160000
#define ABP_JSON_ACTION JsonParseErrorType
#define ABP_JSON_GO_ON JSON_SUCCESS
#else
#define ABP_JSON_ACTION void
#define ABP_JSON_GO_ON
#endif

/* What never returns says so before its type from 18 on. */
#if PG_VERSION_NUM >= 180000
#define ABP_NORETURN pg_noreturn
#else
#define ABP_NORETURN pg_attribute_noreturn()
#endif

/* 19 lets the postmaster end a worker that blocks CREATE/DROP DATABASE. */
#ifndef BGWORKER_INTERRUPTIBLE
#define BGWORKER_INTERRUPTIBLE 0
#endif

/*
 * 18 makes UUIDs that ascend in time: their index grows at one end, and large
 * tables take in rows faster.
 */
#if PG_VERSION_NUM >= 180000
#define ABP_NEW_UUID "uuidv7()"
#else
#define ABP_NEW_UUID "gen_random_uuid()"
#endif

/* 18 puts name and version of a module into its magic block. */
#ifdef PG_MODULE_MAGIC_EXT
#define ABP_MODULE_MAGIC \
	PG_MODULE_MAGIC_EXT(.name = "aibilling_polar", .version = ABP_VERSION)
#else
#define ABP_MODULE_MAGIC PG_MODULE_MAGIC
#endif

#endif							/* ABP_COMPAT_H */
