/*-------------------------------------------------------------------------
 *
 * held_names.c
 *	  Names whose look-up takes until a test lets it end.
 *
 * Preloaded into a server (LD_PRELOAD), this takes getaddrinfo's place.  The
 * look-up of a name that ends in ".held" says so in the server's log, waits
 * until a writer of the pipe HELD_NAMES has come and gone, if there is such a
 * pipe, and then finds 127.0.0.1.
 *
 *-------------------------------------------------------------------------
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef int (*Lookup) (const char *, const char *, const struct addrinfo *, struct addrinfo **);

int
getaddrinfo(const char *name, const char *service,
			const struct addrinfo *hints, struct addrinfo **result)
{
	Lookup		next = (Lookup) dlsym(RTLD_NEXT, "getaddrinfo");
	const char *pipe = getenv("HELD_NAMES");
	const char *suffix = name == NULL ? NULL : strrchr(name, '.');
	int			fd;
	char		byte;

	if (suffix == NULL || strcmp(suffix, ".held") != 0)
		return next(name, service, hints, result);

	dprintf(STDERR_FILENO, "[%d] looks up %s\n", (int) getpid(), name);
	fd = pipe == NULL ? -1 : open(pipe, O_RDONLY | O_CLOEXEC);
	if (fd >= 0)
	{
		while (read(fd, &byte, 1) > 0)
			;
		close(fd);
	}
	return next("127.0.0.1", service, hints, result);
}
