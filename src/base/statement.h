/*-------------------------------------------------------------------------
 *
 * statement.h
 *	  SQL statements of our own, prepared once a session.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_STATEMENT_H
#define ABP_STATEMENT_H

#include "postgres.h"

#include "executor/spi.h"

#include "base/idset.h"
#include "base/rights.h"

/* A statement that is prepared once a session. */
typedef struct Statement
{
	const char *sql;
	int			nargs;
	Oid			argtypes[20];
	bool		reads;			/* by the active snapshot, and changes nothing */
	const char *off[2];			/* settings that are off for it */
	SPIPlanPtr	plan;
} Statement;

extern uint64 abp_statement_run(Statement *statement, Datum *values,
								const char *nulls);
extern uint64 abp_statement_open(Statement *statement, Datum *values,
								 const char *nulls, SavedUser *saved);
extern char *abp_statement_table_name(Oid relid);
extern void abp_statement_close(const SavedUser *saved);
extern IdSet abp_statement_ids(Statement *statement, Datum *values);
extern uint64 abp_statement_run_alone(Statement *statement, Datum *values,
									  const char *nulls);
extern Datum abp_result_datum(uint64 row, int column, bool *isnull);
extern char *abp_result_string(uint64 row, int column, MemoryContext context);
extern int64 abp_result_int64(uint64 row, int column, int64 if_null);
extern Oid	abp_result_oid(uint64 row, int column);
extern IdSet abp_result_idset(uint64 row, int column, MemoryContext context);

#endif							/* ABP_STATEMENT_H */
