/*-------------------------------------------------------------------------
 *
 * functions.c
 *	  SQL-callable functions: unpack the arguments, call, pack the result.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <sys/stat.h>

#include "fmgr.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "storage/fd.h"
#include "utils/builtins.h"
#include "utils/jsonb.h"

/* --- cost ---------------------------------------------------------------- */


/* --- usage objects ------------------------------------------------------- */


/* --- catalogues ---------------------------------------------------------- */

/* The bundle has a quarter of a megabyte; more than this is another file. */
#define MAX_BUNDLE_BYTES	(16 * 1024 * 1024)

PG_FUNCTION_INFO_V1(abp_sql_bundled_prices);

/*
 * bundled_prices() returns jsonb: the price catalogue that was installed with
 * the extension, beside its control file.  It is in UTF-8.
 */
Datum
abp_sql_bundled_prices(PG_FUNCTION_ARGS)
{
	char		share_path[MAXPGPATH];
	char		path[MAXPGPATH];
	FILE	   *file;
	struct stat st;
	char	   *text;
	Datum		catalogue;

	get_share_path(my_exec_path, share_path);
	snprintf(path, MAXPGPATH, "%s/extension/aibilling_polar-prices.json",
			 share_path);

	file = AllocateFile(path, PG_BINARY_R);
	if (file == NULL)
		ereport(ERROR,
				(errcode_for_file_access(),
				 errmsg("could not open file \"%s\": %m", path),
				 errhint("Install aibilling_polar again, with all of its files, or use import_prices().")));
	if (fstat(fileno(file), &st) != 0)
		ereport(ERROR,
				(errcode_for_file_access(),
				 errmsg("could not stat file \"%s\": %m", path)));
	if (st.st_size > MAX_BUNDLE_BYTES)
		ereport(ERROR,
				(errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED),
				 errmsg("file \"%s\" is too large for a price catalogue", path),
				 errdetail("The file has %lld bytes, at most %d are read.",
						   (long long) st.st_size, MAX_BUNDLE_BYTES)));

	text = palloc(st.st_size + 1);
	if (fread(text, 1, st.st_size, file) != st.st_size)
	{
		if (ferror(file))
			ereport(ERROR,
					(errcode_for_file_access(),
					 errmsg("could not read file \"%s\": %m", path)));
		ereport(ERROR,
				(errcode(ERRCODE_DATA_CORRUPTED),
				 errmsg("file \"%s\" has become shorter while being read", path)));
	}
	text[st.st_size] = '\0';
	FreeFile(file);

	catalogue = DirectFunctionCall1(jsonb_in,
									CStringGetDatum(pg_any_to_server(text, st.st_size, PG_UTF8)));
	PG_RETURN_DATUM(catalogue);
}

/* --- foreign servers ----------------------------------------------------- */


/* --- operating ----------------------------------------------------------- */
