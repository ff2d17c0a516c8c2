/*-------------------------------------------------------------------------
 *
 * json_walk.h
 *	  A walk over a jsonb object's pairs that allocates nothing.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_JSON_WALK_H
#define ABP_JSON_WALK_H

#include "postgres.h"

#include "utils/jsonb.h"

#include "base/text_view.h"

/* --- reading jsonb -------------------------------------------------------
 *
 * A walk over an object's pairs that allocates nothing, which
 * JsonbIteratorNext cannot do.
 */
typedef struct ObjectWalk
{
	JsonbContainer *object;
	const char *base;			/* where the strings and values begin */
	int			npairs;
	int			next;
	uint32		key_offset;
	uint32		value_offset;
} ObjectWalk;

extern void abp_walk_start(ObjectWalk *walk, JsonbContainer *object);
extern bool abp_walk_next(ObjectWalk *walk, TextView *key, JsonbValue *value);

#endif							/* ABP_JSON_WALK_H */
