/*-------------------------------------------------------------------------
 *
 * database.h
 *	  Whether this database may send: the table aibilling.database_identity.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_DATABASE_H
#define ABP_DATABASE_H

#include "postgres.h"

/* What a database's identity says of whether it may send. */
typedef enum DatabaseStanding
{
	DATABASE_ARMED,				/* it may */
	DATABASE_COPY,				/* the identity is another's: aibilling.arm() */
	DATABASE_SUBSCRIBER			/* its outbox comes from another by
								 * replication */
} DatabaseStanding;

extern DatabaseStanding abp_database_standing(void);
extern void abp_database_arm(bool only_first);
extern void abp_database_check_timeline(void);

#endif							/* ABP_DATABASE_H */
