/*-------------------------------------------------------------------------
 *
 * statement.c
 *	  SQL statements of our own, prepared once a session.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "executor/spi.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/snapmgr.h"

#include "base/idset.h"
#include "base/rights.h"
#include "base/statement.h"

/*
 * A table's name in statements and messages, with its schema; in the current memory
 * context.  NULL if there is no such table.
 */
char	   *
abp_statement_table_name(Oid relid)
{
	char	   *name = get_rel_name(relid);

	return name == NULL ? NULL :
		quote_qualified_identifier(get_namespace_name(get_rel_namespace(relid)), name);
}

/*
 * Run a statement, prepared the first time, between SPI_connect and SPI_finish and
 * with the rights of the caller.  Returns the number of rows; nulls may be NULL.
 *
 * What does not read by the active snapshot goes by the latest state, whatever the
 * transaction's snapshot: by an older one, TRUNCATE would not know what has been
 * delivered since.
 */
uint64
abp_statement_run(Statement *statement, Datum *values, const char *nulls)
{
	int			result;

	if (statement->plan == NULL)
	{
		SPIPlanPtr	plan = SPI_prepare(statement->sql, statement->nargs,
									   statement->argtypes);

		if (plan == NULL)
			elog(ERROR, "unexpected failure to prepare: %s",
				 SPI_result_code_string(SPI_result));
		SPI_keepplan(plan);
		statement->plan = plan;
	}

	result = statement->reads ?
		SPI_execute_plan(statement->plan, values, nulls, true, 0) :
		SPI_execute_snapshot(statement->plan, values, nulls, GetLatestSnapshot(), InvalidSnapshot,
							 false, true, 0);
	if (result < 0)
		elog(ERROR, "unexpected failure to execute: %s", SPI_result_code_string(result));
	return SPI_processed;
}

/*
 * Connect to SPI and run a statement with the rights of the extension's owner.
 * Returns the number of rows; abp_statement_close ends the use of the result.
 */
uint64
abp_statement_open(Statement *statement, Datum *values, const char *nulls, SavedUser *saved)
{
	abp_become_extension_owner(saved);
	for (int i = 0; i < lengthof(statement->off) && statement->off[i] != NULL; i++)
		abp_set_locally(statement->off[i], "off");
	SPI_connect();
	return abp_statement_run(statement, values, nulls);
}

/*
 * End what abp_statement_open has begun.
 */
void
abp_statement_close(const SavedUser *saved)
{
	SPI_finish();
	abp_restore_user(saved);
}

/*
 * Run a statement without a result, with the rights of the extension's owner.
 * Returns the number of rows.
 */
uint64
abp_statement_run_alone(Statement *statement, Datum *values, const char *nulls)
{
	SavedUser	saved;
	uint64		nrows;

	nrows = abp_statement_open(statement, values, nulls, &saved);
	abp_statement_close(&saved);
	return nrows;
}

/*
 * A column of the last result, counted from 1.
 */
Datum
abp_result_datum(uint64 row, int column, bool *isnull)
{
	return SPI_getbinval(SPI_tuptable->vals[row], SPI_tuptable->tupdesc, column, isnull);
}

/* A text column of the last result, copied to "context"; NULL stays NULL. */
char	   *
abp_result_string(uint64 row, int column, MemoryContext context)
{
	char	   *value = SPI_getvalue(SPI_tuptable->vals[row], SPI_tuptable->tupdesc, column);

	return value == NULL ? NULL : MemoryContextStrdup(context, value);
}

/*
 * A bigint column of the last result, or if_null.
 */
int64
abp_result_int64(uint64 row, int column, int64 if_null)
{
	bool		isnull;
	Datum		value = abp_result_datum(row, column, &isnull);

	return isnull ? if_null : DatumGetInt64(value);
}

/*
 * An oid column of the last result; NULL is InvalidOid.
 */
Oid
abp_result_oid(uint64 row, int column)
{
	bool		isnull;
	Datum		value = abp_result_datum(row, column, &isnull);

	return isnull ? InvalidOid : DatumGetObjectId(value);
}

/*
 * An int8multirange column of the last result, copied to "context"; NULL is the
 * empty set.
 */
IdSet
abp_result_idset(uint64 row, int column, MemoryContext context)
{
	IdSet		ids = {0};
	bool		isnull;
	Datum		value = abp_result_datum(row, column, &isnull);

	if (!isnull)
	{
		MemoryContext old = MemoryContextSwitchTo(context);

		ids = abp_idset_from_multirange(value);
		MemoryContextSwitchTo(old);
	}
	return ids;
}

/*
 * The ids of all sets in the first column of a statement's result, in the
 * current memory context.  Run with the rights of the extension's owner.
 */
IdSet
abp_statement_ids(Statement *statement, Datum *values)
{
	MemoryContext caller = CurrentMemoryContext;
	IdSet		all = {0};
	uint64		nrows;
	SavedUser	saved;

	nrows = abp_statement_open(statement, values, NULL, &saved);
	for (uint64 i = 0; i < nrows; i++)
	{
		IdSet		ids = abp_result_idset(i, 1, CurrentMemoryContext);

		abp_idset_add_set(&all, &ids, caller);
		abp_idset_free(&ids);
	}
	abp_statement_close(&saved);
	abp_idset_sort(&all);
	return all;
}
