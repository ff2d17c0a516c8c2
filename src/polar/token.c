/*-------------------------------------------------------------------------
 *
 * token.c
 *	  The access token: from a file or a user mapping.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <fcntl.h>
#include <pwd.h>
#include <sys/stat.h>
#include <unistd.h>

#include "access/reloptions.h"
#include "catalog/pg_user_mapping.h"
#include "commands/defrem.h"
#include "miscadmin.h"
#include "storage/fd.h"
#include "utils/builtins.h"
#include "utils/syscache.h"

#include "polar/option.h"
#include "polar/server.h"
#include "polar/token.h"

static char *mapped_token(Oid serverid, Oid usage_owner, bool *mapped,
						  bool *is_public);
static char *token_from_file(const char *path, StringInfo reason);

/*
 * abp_token_read
 *		Returns the access token for a server, palloc'd, or NULL.
 *
 * It is in the server's access_token_file, or else in the user mapping of
 * usage_owner or, if they have none, of PUBLIC; InvalidOid asks for PUBLIC's only.
 * The file is read at each call, so a new token is used at once.
 *
 * NULL comes with words for status in *reason: what is wrong and how to fix
 * it, never the token.  A price list may be public, so a server of kind
 * 'prices' without any token yields NULL and nothing in *reason.
 *
 * Must be called in a transaction, and for no longer than needed: release the
 * token with abp_token_forget.
 */
char	   *
abp_token_read(const ServerOptions *server, Oid usage_owner,
			   StringInfo reason)
{
	bool		mapped;
	bool		is_public;
	const char *whose = NULL;
	char	   *token;

	token = mapped_token(server->serverid, usage_owner, &mapped, &is_public);
	if (mapped && !is_public)
		whose = GetUserNameFromId(usage_owner, true);
	whose = whose != NULL ? quote_identifier(whose) : "PUBLIC";

	if (server->access_token_file != NULL)
	{
		if (token == NULL)
			return token_from_file(server->access_token_file, reason);
		abp_token_forget(token);
		appendStringInfo(reason,
						 "access token given twice, by option \"access_token_file\" of server \"%s\" and by the user mapping for %s; drop one of them",
						 server->name, whose);
		return NULL;
	}

	if (token != NULL)
		return token;

	if (mapped)
		appendStringInfo(reason,
						 "no access token: the user mapping for %s on server \"%s\" has no option \"access_token\"; add it with ALTER USER MAPPING",
						 whose, server->name);
	else if (server->kind == SERVER_POLAR)
		appendStringInfo(reason,
						 "no access token: server \"%s\" has no option \"access_token_file\", and neither the usage table's owner nor PUBLIC has a user mapping; add one of them",
						 server->name);
	return NULL;
}

/*
 * abp_token_forget
 *		Wipes and frees a token; NULL is allowed.
 */
void
abp_token_forget(char *token)
{
	if (token == NULL)
		return;
	explicit_bzero(token, strlen(token));
	pfree(token);
}

/*
 * Has a role a user mapping of its own on a server?
 */
bool
abp_token_is_mapped(Oid serverid, Oid role)
{
	return SearchSysCacheExists2(USERMAPPINGUSERSERVER,
								 ObjectIdGetDatum(role),
								 ObjectIdGetDatum(serverid));
}

/*
 * Returns the token of the user mapping that holds for usage_owner, NULL if
 * there is none.  GetUserMapping() would raise where there is no mapping.
 */
static char *
mapped_token(Oid serverid, Oid usage_owner, bool *mapped, bool *is_public)
{
	HeapTuple	tup = NULL;
	Datum		datum;
	bool		isnull;
	char	   *token = NULL;

	if (OidIsValid(usage_owner))
		tup = SearchSysCache2(USERMAPPINGUSERSERVER,
							  ObjectIdGetDatum(usage_owner),
							  ObjectIdGetDatum(serverid));
	*is_public = !HeapTupleIsValid(tup);
	if (*is_public)
		tup = SearchSysCache2(USERMAPPINGUSERSERVER,
							  ObjectIdGetDatum(InvalidOid),
							  ObjectIdGetDatum(serverid));
	*mapped = HeapTupleIsValid(tup);
	if (!*mapped)
		return NULL;

	datum = SysCacheGetAttr(USERMAPPINGUSERSERVER, tup,
							Anum_pg_user_mapping_umoptions, &isnull);
	if (!isnull)
	{
		ListCell   *lc;

		foreach(lc, untransformRelOptions(datum))
		{
			DefElem    *def = lfirst_node(DefElem, lc);
			char	   *value = defGetString(def);

			if (strcmp(def->defname, "access_token") != 0)
				continue;
			token = pstrdup(value);
			explicit_bzero(value, strlen(value));
		}
	}
	ReleaseSysCache(tup);
	return token;
}

/* Returns the operating system user of the server, by name or number. */
static const char *
server_user(void)
{
	struct passwd *user = getpwuid(geteuid());

	return user != NULL ? pstrdup(user->pw_name) : psprintf("%u", (unsigned) geteuid());
}

/*
 * Returns the token in a file, or NULL and the reason.
 *
 * Who may read the file is PostgreSQL's rule for ssl_key_file: the server's
 * user alone, or root and a group of the server's, as secrets that Docker and
 * Kubernetes mount have it.
 */
static char *
token_from_file(const char *path, StringInfo reason)
{
	char		buf[MAX_TOKEN_BYTES + 3];	/* the longest, a line end, and
											 * one byte that is too much */
	size_t		len = 0;
	int			fd;
	struct stat st;
	const char *fault;
	char	   *token = NULL;

	/* O_NONBLOCK: opening a FIFO must not wait for its writer */
	fd = OpenTransientFile(path, O_RDONLY | O_NONBLOCK | PG_BINARY);
	if (fd < 0)
	{
		int			open_errno = errno;
		const char *user = server_user();

		errno = open_errno;
		appendStringInfo(reason,
						 "could not open access token file \"%s\": %m; it must be there and readable by the operating system user of the database server, \"%s\"",
						 path, user);
		return NULL;
	}

	if (fstat(fd, &st) < 0)
		appendStringInfo(reason,
						 "could not stat access token file \"%s\": %m", path);
	else if (!S_ISREG(st.st_mode))
		appendStringInfo(reason,
						 "access token file \"%s\" is not a regular file",
						 path);
	else if (st.st_uid != geteuid() && st.st_uid != 0)
		appendStringInfo(reason,
						 "access token file \"%s\" must be owned by the operating system user of the database server or by root; use chown %s",
						 path, server_user());
	else if (st.st_uid == 0 ? st.st_mode & (S_IWGRP | S_IXGRP | S_IRWXO) : st.st_mode & (S_IRWXG | S_IRWXO))
		appendStringInfo(reason,
						 "access token file \"%s\" is open to %s; use chmod %s", path,
						 st.st_uid == 0 ? "others, or its group may write it" : "group or others",
						 st.st_uid == 0 ? "0640" : "0600");
	else
	{
		ssize_t		n;

		do
		{
			n = read(fd, buf + len, sizeof(buf) - len);
			if (n > 0)
				len += n;
		} while ((n > 0 && len < sizeof(buf)) || (n < 0 && errno == EINTR));

		if (n < 0)
			appendStringInfo(reason,
							 "could not read access token file \"%s\": %m",
							 path);
		else
		{
			/* a full buffer shows only a part of the file */
			while (len > 0 && len < sizeof(buf) &&
				   (buf[len - 1] == '\n' || buf[len - 1] == '\r'))
				len--;
			fault = abp_option_token_fault(buf, len);
			if (fault == NULL)
				token = pnstrdup(buf, len);
			else
				appendStringInfo(reason,
								 "access token file \"%s\" %s; write the token into it, on one line and nothing else",
								 path, fault);
		}
		explicit_bzero(buf, sizeof(buf));
	}

	CloseTransientFile(fd);
	return token;
}
