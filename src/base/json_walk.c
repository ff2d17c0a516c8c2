/*-------------------------------------------------------------------------
 *
 * json_walk.c
 *	  A walk over a jsonb object's pairs that allocates nothing.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "base/json_walk.h"
#include "base/text_view.h"

/*
 * Begin a walk over the pairs of an object.
 */
void
abp_walk_start(ObjectWalk *walk, JsonbContainer *object)
{
	walk->object = object;
	walk->npairs = JsonContainerSize(object);
	walk->base = (const char *) &object->children[walk->npairs * 2];
	walk->next = 0;
	walk->key_offset = 0;
	walk->value_offset = getJsonbOffset(object, walk->npairs);
}

/* Fetch the next pair; false at the end.  Nested values are jbvBinary. */
bool
abp_walk_next(ObjectWalk *walk, TextView *key, JsonbValue *value)
{
	JEntry		key_entry;
	JEntry		value_entry;
	uint32		start;

	if (walk->next >= walk->npairs)
		return false;
	key_entry = walk->object->children[walk->next];
	value_entry = walk->object->children[walk->npairs + walk->next];
	walk->next++;

	start = walk->key_offset;
	JBE_ADVANCE_OFFSET(walk->key_offset, key_entry);
	key->data = walk->base + start;
	key->len = walk->key_offset - start;

	start = walk->value_offset;
	JBE_ADVANCE_OFFSET(walk->value_offset, value_entry);
	if (JBE_ISSTRING(value_entry))
	{
		value->type = jbvString;
		value->val.string.val = unconstify(char *, walk->base) + start;
		value->val.string.len = walk->value_offset - start;
	}
	else if (JBE_ISNUMERIC(value_entry))
	{
		value->type = jbvNumeric;
		value->val.numeric = (Numeric) (unconstify(char *, walk->base) + INTALIGN(start));
	}
	else if (JBE_ISBOOL_TRUE(value_entry) || JBE_ISBOOL_FALSE(value_entry))
	{
		value->type = jbvBool;
		value->val.boolean = JBE_ISBOOL_TRUE(value_entry);
	}
	else if (JBE_ISNULL(value_entry))
		value->type = jbvNull;
	else
	{
		value->type = jbvBinary;
		value->val.binary.data =
			(JsonbContainer *) (unconstify(char *, walk->base) + INTALIGN(start));
		value->val.binary.len = walk->value_offset - INTALIGN(start);
	}
	return true;
}
