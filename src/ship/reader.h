/*-------------------------------------------------------------------------
 *
 * reader.h
 *	  Reading back what Polar has: one request after the other.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_READER_H
#define ABP_READER_H

#include "postgres.h"

#include "datatype/timestamp.h"
#include "lib/stringinfo.h"
#include "utils/jsonb.h"

#include "polar/server.h"

/* A session that reads from one server. */
typedef struct Reader
{
	const ServerOptions *server;
	char	   *token;
	const char *who;			/* function that was called, for messages */
	int64		done;			/* pages read so far */
	int64		total;			/* as far as is known, 0: not known */
	TimestampTz report_at;
} Reader;

typedef void (*ReadingWork) (Reader *reader, void *arg);

extern void abp_reader_run(Oid serverid, Oid token_of, const char *who,
						   ReadingWork work, void *arg);
extern Jsonb *abp_reader_get(Reader *reader, const char *path, const char *scope);
extern void abp_reader_parameter(StringInfo path, const char *name, const char *value);
extern void abp_reader_time(StringInfo path, const char *name, TimestampTz time);

#endif							/* ABP_READER_H */
