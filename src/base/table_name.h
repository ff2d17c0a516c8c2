/*-------------------------------------------------------------------------
 *
 * table_name.h
 *	  A table's name in statements and messages.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_TABLE_NAME_H
#define ABP_TABLE_NAME_H

#include "postgres.h"

extern char *abp_table_name(Oid relid);

#endif							/* ABP_TABLE_NAME_H */
