/*-------------------------------------------------------------------------
 *
 * setup.c
 *	  What the checks of aibilling.check_setup() have in common: their rows, words
 *	  of a shell, and questions to the catalogues.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "common/username.h"
#include "executor/spi.h"
#include "funcapi.h"
#include "lib/stringinfo.h"
#include "utils/builtins.h"
#include "utils/memutils.h"

#include "base/rights.h"
#include "sql/setup.h"

/*
 * Put the next row.  wrong and fix are NULL where there is nothing to say; what
 * is unknown has in "wrong" why.
 */
void
abp_setup_put(Setup *setup, const char *item, SetupAnswer answer, const char *wrong, const char *fix)
{
	Datum		values[5] = {
		Int32GetDatum(++setup->step), CStringGetTextDatum(item), BoolGetDatum(answer == SETUP_RIGHT)
	};
	bool		nulls[5] = {false, false, answer == SETUP_UNKNOWN, wrong == NULL, fix == NULL};

	if (wrong != NULL)
		values[3] = CStringGetTextDatum(wrong);
	if (fix != NULL)
		values[4] = CStringGetTextDatum(fix);
	tuplestore_putvalues(setup->result->setResult, setup->result->setDesc, values, nulls);
}

/*
 * A word of a shell's command, palloc'd and quoted where it must be.
 */
char	   *
abp_setup_shell_word(const char *word)
{
	StringInfoData quoted;

	if (*word != '\0' &&
		strspn(word, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_/.:-") == strlen(word))
		return pstrdup(word);
	initStringInfo(&quoted);
	appendStringInfoChar(&quoted, '\'');
	for (const char *p = word; *p != '\0'; p++)
	{
		if (*p == '\'')
			appendStringInfoString(&quoted, "'\\''");
		else
			appendStringInfoChar(&quoted, *p);
	}
	appendStringInfoChar(&quoted, '\'');
	return quoted.data;
}

/*
 * The operating system user of the server, by name.
 */
const char *
abp_setup_server_user(void)
{
	char	   *error;
	const char *name = get_user_name(&error);

	return name != NULL ? name : "postgres";
}

/*
 * The first column of the first row of a query, run as the extension's owner, in
 * the current memory context; NULL if there is none.
 */
char	   *
abp_setup_ask(const char *query, int nargs, Oid *types, Datum *args)
{
	MemoryContext caller = CurrentMemoryContext;
	SavedUser	saved;
	char	   *value = NULL;

	abp_become_extension_owner(&saved);
	SPI_connect();
	if (SPI_execute_with_args(query, nargs, types, args, NULL, true, 1) == SPI_OK_SELECT &&
		SPI_processed > 0)
		value = SPI_getvalue(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1);
	if (value != NULL)
		value = MemoryContextStrdup(caller, value);
	SPI_finish();
	abp_restore_user(&saved);
	return value;
}
