/*-------------------------------------------------------------------------
 *
 * json_member.c
 *	  Members of jsonb objects, by their keys.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "base/json_member.h"
#include "base/numeric_math.h"

/*
 * A member of an object that is there and not null.
 */
bool
abp_json_member(JsonbContainer *object, const char *key, JsonbValue *value)
{
	return JsonContainerIsObject(object) &&
		getKeyJsonValueFromContainer(object, key, strlen(key), value) != NULL &&
		value->type != jbvNull;
}

/*
 * A member of an object that is a string, palloc'd, else NULL.
 */
const char *
abp_json_member_string(JsonbContainer *object, const char *key)
{
	JsonbValue	value;

	return abp_json_member(object, key, &value) && value.type == jbvString ?
		pnstrdup(value.val.string.val, value.val.string.len) : NULL;
}

/*
 * A member of an object that is a number, or a string that reads as one ("1E-12"),
 * else NULL.
 */
Numeric
abp_json_member_number(JsonbContainer *object, const char *key)
{
	JsonbValue	value;

	if (!abp_json_member(object, key, &value))
		return NULL;
	if (value.type == jbvNumeric)
		return value.val.numeric;
	if (value.type == jbvString && value.val.string.len > 0 &&
		value.val.string.len < 100 &&
		strspn(pnstrdup(value.val.string.val, value.val.string.len), "0123456789+-.eE") ==
		(size_t) value.val.string.len)
		return numeric_of_text(pnstrdup(value.val.string.val, value.val.string.len));
	return NULL;
}
