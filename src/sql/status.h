/*-------------------------------------------------------------------------
 *
 * status.h
 *	  What the SQL functions that watch delivery find out for others.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_STATUS_H
#define ABP_STATUS_H

#include "postgres.h"

extern bool abp_status_lists_database(bool in_other_case);

#endif							/* ABP_STATUS_H */
