/*-------------------------------------------------------------------------
 *
 * sink.c
 *	  An HTTP server that takes events as fast as it can, for measurements.
 *
 * It answers POST /v1/events/ingest as Polar does, after reading the whole
 * body as JSON and counting the elements of "events".  What it is not: a judge
 * of events (t/polar_server.py is) or a store of them.
 *
 * GET /count answers with the numbers of requests and events, the bytes of the
 * bodies and the CPU time this process has used.
 *
 *	  sink PORT [DELAY_MS [ARRIVALS]]
 *
 * DELAY_MS is waited before each answer, without holding up other requests.
 * ARRIVALS is a file that gets a line for each event: the microsecond of the
 * Unix epoch at which its request had arrived.
 *
 *-------------------------------------------------------------------------
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MAX_CONNECTIONS 1024
#define MAX_REQUEST (64 * 1024 * 1024)
#define MAX_DEPTH 64

typedef struct Connection
{
	int			fd;
	char	   *in;
	size_t		in_len;
	size_t		in_size;
	char		out[512];		/* an answer fits the socket's buffer */
	int			out_len;
	int64_t		answer_at;		/* microseconds; 0: no request is waiting */
	bool		close_after;
	struct Connection *next;	/* of those whose answer waits */
} Connection;

static int	epoll_fd;
static int64_t delay_us = 0;
static FILE *arrivals = NULL;
static int64_t requests = 0;
static int64_t events = 0;
static int64_t bytes = 0;

/* The delay is the same for all, so answers fall due in order. */
static Connection *waiting_first = NULL;
static Connection *waiting_last = NULL;

static void
fail(const char *what)
{
	perror(what);
	exit(1);
}

static int64_t
clock_us(clockid_t clock)
{
	struct timespec now;

	clock_gettime(clock, &now);
	return (int64_t) now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

/* --- JSON ------------------------------------------------------------------ */

static const char *
skip_blanks(const char *p, const char *end)
{
	while (p < end && (*p == ' ' || *p == '\n' || *p == '\t' || *p == '\r'))
		p++;
	return p;
}

/* p is behind the opening quote; returns what is behind the closing one, or NULL. */
static const char *
skip_string(const char *p, const char *end)
{
	for (; p < end; p++)
	{
		if (*p == '"')
			return p + 1;
		if ((unsigned char) *p < ' ')
			return NULL;
		if (*p == '\\' && (++p == end || strchr("\"\\/bfnrtu", *p) == NULL))
			return NULL;
	}
	return NULL;
}

static const char *
skip_number_or_word(const char *p, const char *end)
{
	const char *start = p;

	while (p < end && (isalnum((unsigned char) *p) || *p == '-' || *p == '+' || *p == '.'))
		p++;
	if (isdigit((unsigned char) *start) || *start == '-')
		return p;
	if ((p - start == 4 && (memcmp(start, "true", 4) == 0 || memcmp(start, "null", 4) == 0)) ||
		(p - start == 5 && memcmp(start, "false", 5) == 0))
		return p;
	return NULL;
}

/*
 * Read a JSON document; returns the number of elements of the array "events"
 * of the outermost object, or -1 if this is no JSON or there is no such array.
 */
static int64_t
count_events(const char *p, const char *end)
{
	char		open[MAX_DEPTH];
	int			depth = 0;
	int64_t		count = -1;
	bool		counting = false;
	bool		events_next = false;

	for (;;)
	{
		/* a value */
		p = skip_blanks(p, end);
		if (p == end)
			return -1;
		if (counting && depth == 2)
			count++;
		if (*p == '{' || *p == '[')
		{
			if (depth == MAX_DEPTH)
				return -1;
			open[depth++] = *p++;
			if (depth == 2 && events_next && p[-1] == '[')
			{
				counting = true;
				count = 0;
			}
			events_next = false;
			p = skip_blanks(p, end);
			if (p == end)
				return -1;
			if (*p != (open[depth - 1] == '{' ? '}' : ']'))
			{
				if (open[depth - 1] == '[')
					continue;
				goto key;
			}
		}
		else
		{
			p = *p == '"' ? skip_string(p + 1, end) : skip_number_or_word(p, end);
			if (p == NULL)
				return -1;
			if (depth == 0)
				return -1;
		}

		/* what follows a value */
		for (;;)
		{
			p = skip_blanks(p, end);
			if (p == end)
				return -1;
			if (*p == ',')
				break;
			if (*p++ != (open[depth - 1] == '{' ? '}' : ']'))
				return -1;
			if (depth-- == 2)
				counting = false;
			if (depth == 0)
				return skip_blanks(p, end) == end ? count : -1;
		}
		p = skip_blanks(p + 1, end);
		if (open[depth - 1] == '[')
			continue;

key:
		if (p == end || *p != '"')
			return -1;
		events_next = depth == 1 && end - p > 8 && memcmp(p, "\"events\"", 8) == 0;
		p = skip_string(p + 1, end);
		if (p == NULL)
			return -1;
		p = skip_blanks(p, end);
		if (p == end || *p++ != ':')
			return -1;
	}
}

/* --- HTTP ------------------------------------------------------------------ */

static void
close_connection(Connection *c)
{
	close(c->fd);
	free(c->in);
	free(c);
}

/* Forget a connection whose answer may be waiting. */
static void
drop_connection(Connection *c)
{
	Connection **link = &waiting_first;

	if (c->answer_at != 0)
	{
		while (*link != c)
			link = &(*link)->next;
		*link = c->next;
		waiting_last = NULL;
		for (Connection *w = waiting_first; w != NULL; w = w->next)
			waiting_last = w;
	}
	close_connection(c);
}

__attribute__((format(printf, 3, 4)))
static void
set_answer(Connection *c, const char *status, const char *format,...)
{
	char		body[256];
	va_list		args;

	va_start(args, format);
	vsnprintf(body, sizeof(body), format, args);
	va_end(args);
	c->out_len = snprintf(c->out, sizeof(c->out),
						  "HTTP/1.1 %s\r\nContent-Type: application/json\r\n"
						  "Content-Length: %zu\r\n%s\r\n%s",
						  status, strlen(body), c->close_after ? "Connection: close\r\n" : "", body);
}

/* The value of a header, or NULL; the head ends in a zero byte. */
static const char *
header(const char *head, const char *name)
{
	const char *found = strcasestr(head, name);

	return found == NULL ? NULL : found + strlen(name);
}

/*
 * Look for a whole request at the start of the input.  Returns its length, 0
 * if there is more to come, -1 if it is not worth waiting for.
 */
static ssize_t
take_request(Connection *c)
{
	char	   *head_end;
	const char *value;
	char	   *body;
	size_t		head_len;
	size_t		body_len = 0;
	int64_t		count;

	c->in[c->in_len] = '\0';
	head_end = memmem(c->in, c->in_len, "\r\n\r\n", 4);
	if (head_end == NULL)
		return c->in_len > 65536 ? -1 : 0;
	head_len = head_end + 4 - c->in;
	body = c->in + head_len;

	*head_end = '\0';
	value = header(c->in, "\r\ncontent-length:");
	if (value != NULL)
		body_len = strtoull(value, NULL, 10);
	if (body_len > MAX_REQUEST || header(c->in, "\r\ntransfer-encoding:") != NULL)
		return -1;
	if (c->in_len < head_len + body_len)
	{
		/* whoever asks is told at once, so that nobody waits a second */
		if (c->in_len == head_len && header(c->in, "\r\nexpect:") != NULL &&
			write(c->fd, "HTTP/1.1 100 Continue\r\n\r\n", 25) < 0)
			return -1;
		*head_end = '\r';
		return 0;
	}
	c->close_after = header(c->in, "\r\nconnection: close") != NULL;

	if (strncmp(c->in, "GET ", 4) == 0)
	{
		struct rusage usage;

		getrusage(RUSAGE_SELF, &usage);
		set_answer(c, "200 OK", "{\"requests\": %lld, \"events\": %lld, \"bytes\": %lld, \"cpu_ms\": %lld}",
				   (long long) requests, (long long) events, (long long) bytes,
				   (long long) (usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) * 1000 +
				   (usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1000);
		c->answer_at = 1;
		return head_len + body_len;
	}

	if (arrivals != NULL)
		c->answer_at = clock_us(CLOCK_REALTIME);
	count = count_events(body, body + body_len);
	if (count < 0)
		set_answer(c, "422 Unprocessable Entity", "{\"detail\": []}");
	else
	{
		if (arrivals != NULL)
		{
			for (int64_t i = 0; i < count; i++)
				fprintf(arrivals, "%lld\n", (long long) c->answer_at);
			fflush(arrivals);
		}
		requests++;
		events += count;
		bytes += body_len;
		set_answer(c, "200 OK", "{\"inserted\": %lld, \"duplicates\": 0}", (long long) count);
	}
	c->answer_at = delay_us == 0 ? 1 : clock_us(CLOCK_MONOTONIC) + delay_us;
	return head_len + body_len;
}

/* Send the answer; false if the connection is gone. */
static bool
send_answer(Connection *c)
{
	bool		sent = send(c->fd, c->out, c->out_len, MSG_NOSIGNAL) == c->out_len;

	c->answer_at = 0;
	return sent && !c->close_after;
}

/* Answer what has arrived whole; false if the connection is gone. */
static bool
serve(Connection *c)
{
	while (c->answer_at == 0 && c->in_len > 0)
	{
		ssize_t		length = take_request(c);

		if (length < 0)
			return false;
		if (length == 0)
			return true;
		c->in_len -= length;
		memmove(c->in, c->in + length, c->in_len);

		if (c->answer_at > 1)
		{
			c->next = NULL;
			if (waiting_last != NULL)
				waiting_last->next = c;
			else
				waiting_first = c;
			waiting_last = c;
		}
		else if (!send_answer(c))
			return false;
	}
	return true;
}

/* Read what there is; false if the connection is gone. */
static bool
receive(Connection *c)
{
	for (;;)
	{
		ssize_t		got;

		if (c->in_size - c->in_len < 65536)
		{
			c->in_size = c->in_size * 2 + 131072;
			c->in = realloc(c->in, c->in_size);
			if (c->in == NULL)
				fail("realloc");
		}
		got = recv(c->fd, c->in + c->in_len, c->in_size - c->in_len - 1, MSG_DONTWAIT);
		if (got < 0)
			return errno == EAGAIN || errno == EINTR;
		if (got == 0)
			return false;
		c->in_len += got;
		if (c->in_len > MAX_REQUEST)
			return false;
	}
}

/* Send the answers that are due; returns for how long to wait, in microseconds. */
static int
send_due_answers(void)
{
	while (waiting_first != NULL)
	{
		Connection *c = waiting_first;
		int64_t		left = c->answer_at - clock_us(CLOCK_MONOTONIC);

		if (left > 0)
			return (int) left;
		waiting_first = c->next;
		if (waiting_first == NULL)
			waiting_last = NULL;
		if (!send_answer(c) || !serve(c))
			close_connection(c);
	}
	return -1;
}

int
main(int argc, char **argv)
{
	struct sockaddr_in address = {.sin_family = AF_INET};
	struct epoll_event ready[64];
	int			listener;
	int			on = 1;

	if (argc < 2 || argc > 4)
	{
		fprintf(stderr, "usage: sink PORT [DELAY_MS [ARRIVALS]]\n");
		return 2;
	}
	if (argc > 2)
		delay_us = (int64_t) (atof(argv[2]) * 1000);
	if (argc > 3 && (arrivals = fopen(argv[3], "w")) == NULL)
		fail(argv[3]);
	signal(SIGPIPE, SIG_IGN);

	address.sin_port = htons(atoi(argv[1]));
	address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	listener = socket(AF_INET, SOCK_STREAM, 0);
	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
	if (bind(listener, (struct sockaddr *) &address, sizeof(address)) < 0 || listen(listener, 128) < 0)
		fail("listen");

	epoll_fd = epoll_create1(0);
	epoll_ctl(epoll_fd, EPOLL_CTL_ADD, listener,
			  &(struct epoll_event) {.events = EPOLLIN,.data.ptr = NULL});
	for (;;)
	{
		int			wait_us = send_due_answers();
		struct timespec wait = {wait_us / 1000000, wait_us % 1000000 * 1000};
		int			n = epoll_pwait2(epoll_fd, ready, 64, wait_us < 0 ? NULL : &wait, NULL);

		for (int i = 0; i < n; i++)
		{
			Connection *c = ready[i].data.ptr;

			if (c == NULL)
			{
				c = calloc(1, sizeof(Connection));
				if (c == NULL)
					fail("calloc");
				c->fd = accept(listener, NULL, NULL);
				if (c->fd < 0)
				{
					free(c);
					continue;
				}
				setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
				epoll_ctl(epoll_fd, EPOLL_CTL_ADD, c->fd,
						  &(struct epoll_event) {.events = EPOLLIN,.data.ptr = c});
			}
			else if (!receive(c) || !serve(c))
				drop_connection(c);
		}
	}
}
