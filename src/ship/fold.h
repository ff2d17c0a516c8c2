/*-------------------------------------------------------------------------
 *
 * fold.h
 *	  Into the rollup, when there is time for it.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_FOLD_H
#define ABP_FOLD_H

#include "postgres.h"

#include "nodes/pg_list.h"

#include "ship/turn.h"

extern void abp_fold_reset(void);
extern void abp_fold_delivered(void);
extern void abp_fold_now(void);
extern bool abp_fold_is_behind(void);
extern bool abp_fold(Turn *turn, List *tables, bool idle);

#endif							/* ABP_FOLD_H */
