/*-------------------------------------------------------------------------
 *
 * server.h
 *	  Options of CREATE SERVER and CREATE USER MAPPING; the access token.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ABP_SERVER_H
#define ABP_SERVER_H

#include "postgres.h"

#include "polar/event_format.h"

typedef enum ServerKind
{
	SERVER_POLAR,
	SERVER_PRICES
} ServerKind;

/* The options of one server, defaults filled in. */
typedef struct ServerOptions
{
	Oid			serverid;
	Oid			owner;
	const char *name;
	ServerKind	kind;
	const char *url;			/* never NULL; kind 'polar': base without
								 * trailing slash; kind 'prices': as given */
	EventFormat format;
	const char *event_name_function;	/* schema-qualified, NULL if not set */
	const char *metadata_function;	/* ditto */
	const char *access_token_file;	/* NULL if not set */
	const char *ca_file;		/* NULL if not set */
	const char *proxy;			/* NULL if not set */
	int			timeout_ms;
	int			batch_size;		/* events a request */
	int			batch_bytes;	/* bytes a request */
	int			max_in_flight;	/* requests at a time */
	int			requests_per_minute;	/* 0: no limit */
	bool		send_unpriced;	/* unpriced 'send' */
	bool		strip_raw_usage;	/* raw_usage 'strip' */
	const char *prices_format;	/* kind 'prices': format of the answer */
} ServerOptions;

extern void abp_server_init(void);
extern void abp_server_check_change(Oid serverid);
extern const ServerOptions *abp_server_options(Oid serverid);

#endif							/* ABP_SERVER_H */
