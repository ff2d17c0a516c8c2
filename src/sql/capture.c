/*-------------------------------------------------------------------------
 *
 * capture.c
 *	  What aibilling.capture() asks of a mapping, which SQL cannot answer.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "fmgr.h"
#include "nodes/parsenodes.h"
#include "parser/analyze.h"
#include "parser/parser.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/varlena.h"

#include "base/statement.h"
#include "compat.h"

/* How far from a name another one may be to be meant, in letters. */
#define MAX_TYPOS 4

PG_FUNCTION_INFO_V1(abp_sql_check_expression);
PG_FUNCTION_INFO_V1(abp_sql_closest_word);

/* Is a statement of the form SELECT (expression) FROM table, and no more? */
static bool
selects_one_expression(List *parsed)
{
	SelectStmt *select;

	if (list_length(parsed) != 1 || !IsA(linitial_node(RawStmt, parsed)->stmt, SelectStmt))
		return false;
	select = (SelectStmt *) linitial_node(RawStmt, parsed)->stmt;
	return select->op == SETOP_NONE && list_length(select->targetList) == 1 &&
		list_length(select->fromClause) == 1 && IsA(linitial(select->fromClause), RangeVar) &&
		select->intoClause == NULL && select->whereClause == NULL && select->groupClause == NIL &&
		select->havingClause == NULL && select->windowClause == NIL && select->sortClause == NIL &&
		select->limitCount == NULL && select->limitOffset == NULL && select->lockingClause == NIL &&
		select->withClause == NULL;
}

/*
 * aibilling.check_expression(source, expression, type): raise an error unless the
 * text is one expression over a row of the table that can be cast to the type.
 */
Datum
abp_sql_check_expression(PG_FUNCTION_ARGS)
{
	Oid			source = PG_GETARG_OID(0);
	char	   *expression = text_to_cstring(PG_GETARG_TEXT_PP(1));
	char	   *sql = psprintf("SELECT (%s\n)::%s FROM %s", expression,
							   format_type_be_qualified(PG_GETARG_OID(2)),
							   abp_statement_table_name(source));
	List	   *parsed = raw_parser(sql, RAW_PARSE_DEFAULT);
	Query	   *query;

	if (!selects_one_expression(parsed))
		ereport(ERROR,
				(errcode(ERRCODE_SYNTAX_ERROR),
				 errmsg("it is not one expression")));
	query = parse_analyze_fixedparams(linitial_node(RawStmt, parsed), sql, NULL, 0, NULL);
	if (query->hasAggs || query->hasWindowFuncs || query->hasTargetSRFs)
		ereport(ERROR,
				(errcode(ERRCODE_GROUPING_ERROR),
				 errmsg("it is not an expression over one row")));
	PG_RETURN_VOID();
}

/*
 * aibilling.closest_word(word, words): the one of the words that was likely meant,
 * or NULL.
 */
Datum
abp_sql_closest_word(PG_FUNCTION_ARGS)
{
	text	   *word = PG_GETARG_TEXT_PP(0);
	Datum	   *words;
	bool	   *nulls;
	int			n;
	Datum		closest = (Datum) 0;
	int			limit = Min(MAX_TYPOS, VARSIZE_ANY_EXHDR(word) / 2);

	if (VARSIZE_ANY_EXHDR(word) >= NAMEDATALEN)
		PG_RETURN_NULL();
	deconstruct_array(PG_GETARG_ARRAYTYPE_P(1), TEXTOID, -1, false, TYPALIGN_INT, &words, &nulls, &n);
	for (int i = 0; i < n; i++)
	{
		text	   *other;
		int			distance;

		if (nulls[i])
			continue;
		other = DatumGetTextPP(words[i]);
		if (VARSIZE_ANY_EXHDR(other) >= NAMEDATALEN)
			continue;
		distance = varstr_levenshtein_less_equal(VARDATA_ANY(word), VARSIZE_ANY_EXHDR(word),
												 VARDATA_ANY(other), VARSIZE_ANY_EXHDR(other),
												 1, 1, 1, limit, true);
		if (distance > limit)
			continue;
		closest = words[i];
		limit = distance - 1;
	}
	if (closest == (Datum) 0)
		PG_RETURN_NULL();
	PG_RETURN_DATUM(closest);
}
