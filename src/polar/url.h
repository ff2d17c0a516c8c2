/*-------------------------------------------------------------------------
 *
 * url.h
 *	  URLs in options: what was checked is what is connected to.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_URL_H
#define ABP_URL_H

#include "postgres.h"

#include "commands/defrem.h"

/* What the checks of a URL find out about it. */
typedef struct Url
{
	const char *scheme;			/* one of the list of schemes given */
	bool		loopback;		/* the host is this machine by its very name */
	bool		has_port;
	const char *rest;			/* path and query, "" if none */
} Url;

extern void abp_url_read(DefElem *def, const char *const *schemes,
						 bool allow_query, Url *url);

#endif							/* ABP_URL_H */
