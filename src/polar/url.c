/*-------------------------------------------------------------------------
 *
 * url.c
 *	  URLs in options: what was checked is what is connected to.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <ctype.h>

#include "commands/defrem.h"

#include "polar/option.h"
#include "polar/url.h"

static void check_host(const char *option, const char *host, int len,
					   bool *loopback);
static bool parse_dotted_quad(const char *host, int len, int *first);
static void check_port(const char *option, const char *port, int len);

/*
 * Checks the option's value as an absolute URL of one of the schemes (the
 * first is the one that a hint names) and fills url.
 *
 * This is deliberately narrower than RFC 3986: libraries differ in how they
 * parse unusual URLs, and what was checked here must be what is connected to.
 */
void
abp_url_read(DefElem *def, const char *const *schemes, bool allow_query, Url *url)
{
	const char *value = defGetString(def);
	const char *option = def->defname;
	const char *authority = NULL;
	const char *colon;
	size_t		len;

	for (const char *p = value; *p != '\0'; p++)
	{
		if (*p <= ' ' || *p >= 0x7f || strchr("\\\"<>^`{|}", *p) != NULL)
			abp_option_refuse(option, NULL,
							  "A URL must not contain blanks, control characters, backslashes or characters outside ASCII.",
							  "Write such a character of a path as % and two hexadecimal digits.");
		if (*p == '@')
			abp_option_refuse(option, NULL,
							  "A URL must not contain \"@\": server options can be read by every user of the database, so no user name or password may stand there.",
							  NULL);
		if (*p == '#' || (*p == '?' && !allow_query))
			abp_option_refuse(option, NULL,
							  psprintf("The URL must not contain \"%c\".", *p),
							  "Give scheme, host, and if need be port and path.");
		if (*p == '%' && !(isxdigit((unsigned char) p[1]) &&
						   isxdigit((unsigned char) p[2])))
			abp_option_refuse(option, NULL,
							  "In a URL two hexadecimal digits must follow \"%\".",
							  NULL);
	}

	for (int i = 0; schemes[i] != NULL && authority == NULL; i++)
	{
		size_t		scheme_len = strlen(schemes[i]);

		if (strncmp(value, schemes[i], scheme_len) == 0 &&
			strncmp(value + scheme_len, "://", 3) == 0)
		{
			url->scheme = schemes[i];
			authority = value + scheme_len + 3;
		}
	}
	if (authority == NULL)
		abp_option_refuse(option, NULL, "It is not an absolute URL.",
						  psprintf("It must start with \"%s://\".", schemes[0]));

	len = strcspn(authority, "/?");
	url->rest = authority + len;

	if (len > 0 && authority[0] == '[')
	{
		/*
		 * An IPv6 address has too many spellings to be compared safely; only
		 * the loopback address is worth an exception.
		 */
		if (len < 5 || strncmp(authority, "[::1]", 5) != 0 ||
			(len > 5 && authority[5] != ':'))
			abp_option_refuse(option, NULL,
							  "Of IPv6 addresses only [::1] is allowed.",
							  "Give the host's name.");
		url->loopback = true;
		colon = len > 5 ? authority + 5 : NULL;
	}
	else
	{
		colon = memchr(authority, ':', len);
		check_host(option, authority,
				   colon != NULL ? (int) (colon - authority) : (int) len,
				   &url->loopback);
	}

	url->has_port = colon != NULL;
	if (colon != NULL)
		check_port(option, colon + 1, (int) (authority + len - colon) - 1);
}

/* Checks a host's name or IPv4 address and says whether it is loopback. */
static void
check_host(const char *option, const char *host, int len, bool *loopback)
{
	int			label = 0;		/* where the current label starts */
	int			first;

	for (int i = 0; i <= len; i++)
	{
		if (i == len || host[i] == '.')
		{
			if (i == label || i - label > 63 || len > 253 ||
				host[label] == '-' || host[i - 1] == '-')
				abp_option_refuse(option, NULL, "The host's name is not valid.",
								  "Give a name such as \"api.example.com\".");
			if (i < len)
				label = i + 1;
		}
		else if (!isalnum((unsigned char) host[i]) &&
				 host[i] != '-' && host[i] != '_')
			abp_option_refuse(option, NULL, "The host's name is not valid.",
							  "A host's name consists of letters, digits, \"-\", \"_\" and dots.");
	}

	*loopback = false;
	if (parse_dotted_quad(host, len, &first))
		*loopback = (first == 127);
	else if (isdigit((unsigned char) host[label]) &&
			 (strspn(host + label, "0123456789") >= len - label ||
			  pg_strncasecmp(host + label, "0x", 2) == 0))
	{
		/*
		 * inet_aton() would read 127.1, 2130706433, 0x7f.1 and 0177.0.0.1 as
		 * addresses.
		 */
		abp_option_refuse(option, NULL, "The IPv4 address is not valid.",
						  "Write it as four decimal numbers without leading zeros.");
	}
	else
		*loopback = (len == strlen("localhost") &&
					 pg_strncasecmp(host, "localhost", len) == 0);
}

/*
 * Is the text an IPv4 address of four decimal numbers without leading zeros?
 * Sets *first to the first of them.
 */
static bool
parse_dotted_quad(const char *host, int len, int *first)
{
	const char *p = host;
	const char *end = host + len;

	for (int part = 0; part < 4; part++)
	{
		const char *start;
		int			number = 0;

		if (part > 0 && (p == end || *p++ != '.'))
			return false;
		start = p;
		while (p < end && isdigit((unsigned char) *p) && p - start < 3)
			number = number * 10 + (*p++ - '0');
		if (p == start || number > 255 || (p - start > 1 && *start == '0'))
			return false;
		if (part == 0)
			*first = number;
	}
	return p == end;
}

/* Checks a port: 1 to 65535, without leading zeros. */
static void
check_port(const char *option, const char *port, int len)
{
	int			number = 0;

	for (int i = 0; i < len && i < 6; i++)
		number = isdigit((unsigned char) port[i]) && number >= 0 ?
			number * 10 + (port[i] - '0') : -1;
	if (len < 1 || len > 5 || port[0] == '0' || number < 1 || number > 65535)
		abp_option_refuse(option, NULL, "The port is not valid.",
						  "It must be a number from 1 to 65535.");
}
