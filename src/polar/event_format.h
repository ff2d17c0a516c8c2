/*-------------------------------------------------------------------------
 *
 * event_format.h
 *	  How the rows of a server become events.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_EVENT_FORMAT_H
#define ABP_EVENT_FORMAT_H

#include "postgres.h"

#include "utils/jsonb.h"

#include "base/text_view.h"

/* How the rows of a server become events: options of CREATE SERVER. */
typedef struct EventFormat
{
	const char *event_name;		/* literal or template, NULL if not set */
	const char *customer_id_key;	/* NULL: the original's default list */
	const char *external_customer_id_key;	/* ditto */
	const char *tag_prefix;		/* never NULL */
	bool		has_event_name_function;
	bool		has_metadata_function;
} EventFormat;

/* What the user's functions returned for one row; all zero without any. */
typedef struct EventOverrides
{
	TextView	event_name;		/* .data == NULL: not overridden */
	Jsonb	   *metadata;		/* the whole metadata, or NULL */
} EventOverrides;

#endif							/* ABP_EVENT_FORMAT_H */
