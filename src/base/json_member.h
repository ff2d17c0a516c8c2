/*-------------------------------------------------------------------------
 *
 * json_member.h
 *	  Members of jsonb objects, by their keys.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_JSON_MEMBER_H
#define ABP_JSON_MEMBER_H

#include "postgres.h"

#include "utils/jsonb.h"
#include "utils/numeric.h"

extern bool abp_json_member(JsonbContainer *object, const char *key, JsonbValue *value);
extern const char *abp_json_member_string(JsonbContainer *object, const char *key);
extern Numeric abp_json_member_number(JsonbContainer *object, const char *key);

#endif							/* ABP_JSON_MEMBER_H */
