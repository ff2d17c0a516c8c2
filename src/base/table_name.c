/*-------------------------------------------------------------------------
 *
 * table_name.c
 *	  A table's name in statements and messages.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "utils/builtins.h"
#include "utils/lsyscache.h"

#include "base/table_name.h"

/*
 * The name of a table with its schema, quoted if need be, palloc'd; NULL if there
 * is no such table.
 */
char	   *
abp_table_name(Oid relid)
{
	char	   *name = get_rel_name(relid);

	return name == NULL ? NULL :
		quote_qualified_identifier(get_namespace_name(get_rel_namespace(relid)), name);
}
