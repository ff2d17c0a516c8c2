/*-------------------------------------------------------------------------
 *
 * http.c
 *	  HTTP requests that never keep a backend from its interrupts.
 *
 * Everything of libcurl is here.  Requests run in one multi handle, which
 * tells us its sockets and its next timeout; we wait for these together with
 * our latch and the postmaster's death, so a cancel, a termination, a fast
 * shutdown or the barrier of somebody's DROP DATABASE is served at once while
 * any number of requests hang.
 *
 * Three rules hold throughout:
 *
 * No ereport happens inside libcurl: its callbacks use malloc and fixed
 * buffers and report failure by their return value, so an ERROR leaves
 * libcurl's state whole and the handles reusable.
 *
 * Signals are blocked during every call that may start or end a transfer:
 * libcurl's resolver threads inherit the mask, and a handler of PostgreSQL
 * must not run in a foreign thread.  None of these calls waits for the
 * network.
 *
 * The multi handle and the requests live as long as the process and are used
 * again, which keeps connections and their TLS state alive between requests.
 * At exit the kernel closes the sockets; a clean-up might wait for a resolver
 * thread.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <curl/curl.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

#include "lib/ilist.h"
#include "miscadmin.h"
#include "portability/instr_time.h"
#include "storage/fd.h"

#include "compat.h"
#include "ship/http.h"

#define MAX_CONNECT_MS 10000	/* name look-up, connect and TLS together */
#define MAX_IDLE_CONNECTIONS 32 /* kept alive at most */
#define TRUST_STORE_SECONDS 60	/* certificates read from a file are kept */
#define MIN_BUFFER 8192			/* first buffer for an answer */
#define MIN_MASKED 8			/* bytes of a token worth a search in success */
#define KEPT_BUFFER 65536		/* a larger one is freed at release */
#define MAX_UPLOAD_BUFFER (2 * 1024 * 1024) /* the most that libcurl takes */

struct HttpRequest
{
	dlist_node	node;			/* in one of the lists below */
	CURL	   *easy;
	HttpReply	reply;
	char	   *buffer;			/* malloc'd; the answer's body */
	size_t		capacity;
	size_t		max_reply;		/* bytes of body kept */
	size_t		body_len;		/* bytes to send */
	bool		sent;			/* a byte of the request may have left */
	bool		answering;		/* a status line has arrived */
	bool		unanswered;		/* libcurl wanted to send it once more */
	bool		out_of_memory;	/* for the answer's body */
	bool		proxied;
	int			timeout_ms;
	int			connect_ms;
	struct curl_slist authorization;	/* data malloc'd, holds the token */
	char		retry_after[64];
	char		error[CURL_ERROR_SIZE + 256];
	char		curl_error[CURL_ERROR_SIZE];	/* lives as long as easy */
};

/* A socket that libcurl wants watched. */
typedef struct WatchedSocket
{
	curl_socket_t fd;
	uint32		events;			/* WL_SOCKET_... */
} WatchedSocket;

/* libcurl neither changes nor frees these lists. */
static struct curl_slist accept_header = {"Accept: application/json", NULL};
static struct curl_slist get_headers = {"Expect:", &accept_header};
static struct curl_slist version_header = {"Polar-Version: 2026-04", &get_headers};
static struct curl_slist post_headers = {"Content-Type: application/json", &version_header};

static CURLM *multi = NULL;
static WatchedSocket *sockets = NULL;	/* malloc'd */
static int	nsockets = 0;
static int	sockets_capacity = 0;
static int64 timer_due = -1;	/* monotonic microseconds; -1: no timer */
static uint32 wait_event = 0;

/* Every request is in one of these; all but unused belong to a caller. */
static dlist_head running = DLIST_STATIC_INIT(running);
static dlist_head finished = DLIST_STATIC_INIT(finished);
static dlist_head handed_out = DLIST_STATIC_INIT(handed_out);
static dlist_head unused = DLIST_STATIC_INIT(unused);
static int	in_flight = 0;		/* running and finished ones */

/* The time of timer_due, by a clock that nobody sets. */
static int64
now_us(void)
{
	instr_time	now;

	INSTR_TIME_SET_CURRENT(now);
	return (int64) INSTR_TIME_GET_MICROSEC(now);
}

/* Threads that libcurl starts inherit this: signals are for the main one. */
static void
block_signals(sigset_t *saved)
{
	sigset_t	all;

	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, saved);
}

static void
restore_signals(const sigset_t *saved)
{
	sigprocmask(SIG_SETMASK, saved, NULL);
}

/* ----------------------------------------------------------------
 *		libcurl's callbacks: none may throw
 * ----------------------------------------------------------------
 */

/* Keep a reply's body, up to a limit at which the transfer ends. */
static size_t
keep_body(char *data, size_t size, size_t count, void *arg)
{
	HttpRequest *request = arg;
	size_t		len = size * count;
	size_t		room = request->max_reply - request->reply.body_len;
	size_t		taken = Min(len, room);
	size_t		needed = request->reply.body_len + taken;

	if (needed > request->capacity)
	{
		size_t		capacity = Max(request->capacity, MIN_BUFFER);
		char	   *buffer;

		while (capacity < needed)
			capacity *= 2;
		capacity = Min(capacity, request->max_reply);
		buffer = realloc(request->buffer, capacity);
		if (buffer == NULL)
		{
			request->out_of_memory = true;
			return 0;
		}
		request->buffer = buffer;
		request->capacity = capacity;
	}
	memcpy(request->buffer + request->reply.body_len, data, taken);
	request->reply.body_len = needed;
	if (taken < len)
	{
		request->reply.truncated = true;
		return 0;				/* a short count ends the transfer */
	}
	return len;
}

/* Of the headers, Retry-After is kept, and that a reply has begun. */
static size_t
keep_header(char *data, size_t size, size_t count, void *arg)
{
	static const char name[] = "retry-after:";
	HttpRequest *request = arg;
	size_t		len = size * count;
	const char *value = data + sizeof(name) - 1;
	const char *end = data + len;

	if (len >= 5 && memcmp(data, "HTTP/", 5) == 0)
	{
		/* a final answer may follow an interim one: forget that */
		request->answering = true;
		request->reply.retry_after = NULL;
	}
	else if (len >= sizeof(name) - 1 &&
			 pg_strncasecmp(data, name, sizeof(name) - 1) == 0)
	{
		while (value < end && (*value == ' ' || *value == '\t'))
			value++;
		while (end > value && (unsigned char) end[-1] <= ' ')
			end--;
		if (end > value && end - value < sizeof(request->retry_after))
		{
			memcpy(request->retry_after, value, end - value);
			request->retry_after[end - value] = '\0';
			request->reply.retry_after = request->retry_after;
		}
	}
	return len;
}

#if CURL_AT_LEAST_VERSION(7, 80, 0)
/*
 * libcurl is connected, certificates checked, and about to send.  The only
 * sure sign: error codes do not tell, since libcurl silently sends a request
 * again that failed on a kept connection.  The first may have been acted on,
 * so that a second is for the caller to count and to decide.
 */
static int
note_sending(void *arg, char *remote_ip, char *local_ip, int remote_port,
			 int local_port)
{
	HttpRequest *request = arg;

	if (request->sent)
	{
		request->unanswered = true;
		return CURL_PREREQFUNC_ABORT;
	}
	request->sent = true;
	return CURL_PREREQFUNC_OK;
}
#endif

/* Sockets are counted among the descriptors that fd.c knows of. */
static curl_socket_t
open_socket(void *arg, curlsocktype purpose, struct curl_sockaddr *address)
{
	curl_socket_t fd;

	if (!AcquireExternalFD())
		return CURL_SOCKET_BAD;
	fd = socket(address->family, address->socktype, address->protocol);
	if (fd == CURL_SOCKET_BAD)
		ReleaseExternalFD();
	else
		(void) fcntl(fd, F_SETFD, FD_CLOEXEC);
	return fd;
}

/* Do not wait for a socket any more. */
static void
forget_socket(curl_socket_t fd)
{
	for (int i = 0; i < nsockets; i++)
	{
		if (sockets[i].fd == fd)
		{
			sockets[i] = sockets[--nsockets];
			break;
		}
	}
}

/* libcurl closes a socket, which counts among this process's files. */
static int
close_socket(void *arg, curl_socket_t fd)
{
	int			result = close(fd);

	forget_socket(fd);
	ReleaseExternalFD();
	return result;
}

/*
 * libcurl says what it waits for on a socket: that is what WaitEventSet waits
 * for.
 */
static int
watch_socket(CURL *easy, curl_socket_t fd, int what, void *arg, void *socket_arg)
{
	uint32		events = 0;

	if (what == CURL_POLL_IN || what == CURL_POLL_INOUT)
		events |= WL_SOCKET_READABLE;
	if (what == CURL_POLL_OUT || what == CURL_POLL_INOUT)
		events |= WL_SOCKET_WRITEABLE;

	forget_socket(fd);
	if (events == 0)
		return 0;
	if (nsockets == sockets_capacity)
	{
		int			capacity = sockets_capacity + 16;
		WatchedSocket *larger = realloc(sockets, capacity * sizeof(WatchedSocket));

		if (larger == NULL)
			return -1;
		sockets = larger;
		sockets_capacity = capacity;
	}
	sockets[nsockets].fd = fd;
	sockets[nsockets].events = events;
	nsockets++;
	return 0;
}

/* libcurl says when it wants to be called, whatever the sockets do. */
static int
set_timer(CURLM *handle, long timeout_ms, void *arg)
{
	timer_due = timeout_ms < 0 ? -1 : now_us() + (int64) timeout_ms * 1000;
	return 0;
}

/* ----------------------------------------------------------------
 *		the end of a request
 * ----------------------------------------------------------------
 */

/* Is this what libcurl calls a failure of TLS? */
static bool
is_tls_failure(CURLcode code)
{
	return code == CURLE_PEER_FAILED_VERIFICATION ||
		code == CURLE_SSL_CONNECT_ERROR || code == CURLE_SSL_CACERT_BADFILE ||
		code == CURLE_SSL_CERTPROBLEM || code == CURLE_SSL_CIPHER ||
		code == CURLE_SSL_ISSUER_ERROR || code == CURLE_SSL_INVALIDCERTSTATUS ||
		code == CURLE_SSL_PINNEDPUBKEYNOTMATCH;
}

/* What a request that failed was doing. */
static const char *
describe_stage(HttpRequest *request, CURLcode code)
{
	CURL	   *easy = request->easy;
	curl_off_t	looked_up = 0;
	curl_off_t	connected = 0;
	curl_off_t	uploaded = 0;
	long		local_port = 0;
	long		proxy_status = 0;

	if (request->answering)
		return "reading the answer";
	if (request->sent)
	{
		curl_easy_getinfo(easy, CURLINFO_SIZE_UPLOAD_T, &uploaded);
		return (size_t) uploaded < request->body_len ?
			"sending the request" : "waiting for the answer";
	}

	if (code == CURLE_URL_MALFORMAT || code == CURLE_UNSUPPORTED_PROTOCOL)
		return "request";
	curl_easy_getinfo(easy, CURLINFO_NAMELOOKUP_TIME_T, &looked_up);
	if (looked_up == 0 || code == CURLE_COULDNT_RESOLVE_HOST ||
		code == CURLE_COULDNT_RESOLVE_PROXY)
		return "name look-up";

	/*
	 * Up to 7.88 the time of the connect is only set after the TLS handshake,
	 * in later versions the port.
	 */
	curl_easy_getinfo(easy, CURLINFO_LOCAL_PORT, &local_port);
	curl_easy_getinfo(easy, CURLINFO_CONNECT_TIME_T, &connected);
	if ((local_port <= 0 && connected == 0 && !is_tls_failure(code)) ||
		code == CURLE_COULDNT_CONNECT)
		return "connecting";
	curl_easy_getinfo(easy, CURLINFO_HTTP_CONNECTCODE, &proxy_status);
	if (request->proxied && proxy_status / 100 != 2)
		return "connecting through the proxy";
	return "TLS handshake";
}

/* Write the words for a request that failed into its error. */
static void
describe_failure(HttpRequest *request, CURLcode code)
{
	const char *stage = describe_stage(request, code);
	char	   *error = request->error;
	size_t		size = sizeof(request->error);

	if (request->reply.truncated)
		snprintf(error, size, "the answer is longer than %zu bytes",
				 request->max_reply);
	else if (request->out_of_memory)
		snprintf(error, size, "out of memory for the answer");
	else if (request->unanswered)
		snprintf(error, size, "%s failed: the connection was closed", stage);
	else if (code != CURLE_OPERATION_TIMEDOUT)
		snprintf(error, size, "%s failed: %s", stage,
				 request->curl_error[0] != '\0' ? request->curl_error :
				 curl_easy_strerror(code));
	else if (!request->sent)
		snprintf(error, size, "%s timed out: no connection within %g s",
				 stage, request->connect_ms / 1000.0);
	else
	{
		curl_off_t	looked_up = 0;
		curl_off_t	connected = 0;
		curl_off_t	ready = 0;
		curl_off_t	total = 0;

		/* each counts from the start; on a kept connection all are tiny */
		curl_easy_getinfo(request->easy, CURLINFO_NAMELOOKUP_TIME_T, &looked_up);
		curl_easy_getinfo(request->easy, CURLINFO_CONNECT_TIME_T, &connected);
		curl_easy_getinfo(request->easy, CURLINFO_APPCONNECT_TIME_T, &ready);
		curl_easy_getinfo(request->easy, CURLINFO_TOTAL_TIME_T, &total);
		connected = Max(connected, looked_up);
		ready = Max(ready, connected);
		snprintf(error, size,
				 "%s timed out: the request did not end within %g s "
				 "(name look-up %.1f s, connecting %.1f s, TLS %.1f s, then %.1f s)",
				 stage, request->timeout_ms / 1000.0, looked_up / 1e6,
				 (connected - looked_up) / 1e6, (ready - connected) / 1e6,
				 (total - ready) / 1e6);
	}
}

/* Take a running request out of libcurl; signals are blocked. */
static void
detach_request(HttpRequest *request)
{
	curl_multi_remove_handle(multi, request->easy);
	dlist_delete(&request->node);
}

/*
 * Whatever answers may quote the request, and quotes end in the ledger and in
 * logs: wipe the token out of what was received.  It may be cut off at the
 * end of an answer that was.
 */
static void
mask_token(HttpRequest *request)
{
	const char *token;
	size_t		len;

	if (request->authorization.data == NULL)
		return;
	token = strrchr(request->authorization.data, ' ') + 1;
	len = strlen(token);
	if (len < MIN_MASKED && request->reply.status == 200)
		return;					/* it may be a number of the answer's */
	for (size_t i = 0; i < request->reply.body_len; i++)
	{
		size_t		n = Min(len, request->reply.body_len - i);

		if (request->buffer[i] == token[0] && memcmp(request->buffer + i, token, n) == 0 &&
			(n == len || request->reply.truncated))
			memset(request->buffer + i, '*', n);
	}
	if (request->reply.retry_after != NULL && strstr(request->retry_after, token) != NULL)
		request->reply.retry_after = NULL;
}

/* A running request has ended with code; signals are blocked. */
static void
finish_request(HttpRequest *request, CURLcode code)
{
	HttpReply  *reply = &request->reply;
	curl_off_t	elapsed_us = 0;

	curl_easy_getinfo(request->easy, CURLINFO_RESPONSE_CODE, &reply->status);
	curl_easy_getinfo(request->easy, CURLINFO_TOTAL_TIME_T, &elapsed_us);
	reply->elapsed_ms = elapsed_us / 1000.0;
	reply->body = request->buffer;
	mask_token(request);

#if !CURL_AT_LEAST_VERSION(7, 80, 0)
	{
		long		request_size = 0;

		curl_easy_getinfo(request->easy, CURLINFO_REQUEST_SIZE, &request_size);
		request->sent = request_size > 0;
	}
#endif
	if (code == CURLE_OK)
		reply->outcome = HTTP_ANSWERED;
	else
	{
		reply->outcome = request->sent ? HTTP_UNKNOWN : HTTP_NOT_SENT;
		reply->out_of_memory = request->out_of_memory || code == CURLE_OUT_OF_MEMORY;
		describe_failure(request, code);
		reply->error = request->error;
	}

	detach_request(request);
	dlist_push_tail(&finished, &request->node);
}

/*
 * libcurl itself failed (out of memory): give up all that runs, and start
 * with a new multi handle next time.  Signals are blocked.
 */
static void
give_up(CURLMcode code)
{
	dlist_mutable_iter iter;

	dlist_foreach_modify(iter, &running)
	{
		HttpRequest *request = dlist_container(HttpRequest, node, iter.cur);

		strlcpy(request->curl_error, curl_multi_strerror(code),
				sizeof(request->curl_error));
		finish_request(request, CURLE_ABORTED_BY_CALLBACK);
		request->reply.out_of_memory = code == CURLM_OUT_OF_MEMORY;
	}
	curl_multi_cleanup(multi);
	multi = NULL;
	nsockets = 0;
	timer_due = -1;
}

/* ----------------------------------------------------------------
 *		driving libcurl
 * ----------------------------------------------------------------
 */

/*
 * Let libcurl act on a socket, or on its timer (CURL_SOCKET_TIMEOUT), and
 * move what has ended to the finished requests.
 */
static void
drive_multi(curl_socket_t fd, int events)
{
	CURLMcode	code;
	CURLMsg    *message;
	int			count;
	sigset_t	saved;

	if (multi == NULL)
		return;

	block_signals(&saved);
	code = curl_multi_socket_action(multi, fd, events, &count);
	while ((message = curl_multi_info_read(multi, &count)) != NULL)
	{
		/* later versions may send other kinds of message */
		if (message->msg == CURLMSG_DONE)
		{
			CURLcode	result = message->data.result;
			char	   *request = NULL;

			curl_easy_getinfo(message->easy_handle, CURLINFO_PRIVATE, &request);
			finish_request((HttpRequest *) request, result);
		}
	}
	/* a socket that libcurl has closed meanwhile is not an error */
	if (code != CURLM_OK && code != CURLM_BAD_SOCKET)
		give_up(code);
	restore_signals(&saved);
}

/*
 * Wait at most timeout_ms (-1: without limit) for the latch or for libcurl's
 * sockets.  Returns how many events occurred.
 *
 * The set of events is made anew each time, because it knows no removal and
 * libcurl's sockets change with every step; that costs a few microseconds.
 */
static int
wait_for_events(WaitEvent *occurred, int max_events, long timeout_ms)
{
	WaitEventSet *set = abp_create_wait_event_set(nsockets + 2);
	volatile int noccurred = 0;

	PG_TRY();
	{
		AddWaitEventToSet(set, WL_LATCH_SET, PGINVALID_SOCKET, MyLatch, NULL);
		AddWaitEventToSet(set, WL_EXIT_ON_PM_DEATH, PGINVALID_SOCKET, NULL, NULL);
		for (int i = 0; i < nsockets; i++)
			AddWaitEventToSet(set, sockets[i].events, sockets[i].fd, NULL, NULL);
		noccurred = WaitEventSetWait(set, timeout_ms, occurred, max_events,
									 abp_wait_event(&wait_event, "AibillingPolarHttp"));
	}
	PG_FINALLY();
	{
		FreeWaitEventSet(set);
	}
	PG_END_TRY();

	return noccurred;
}

/*
 * Wait once, see above, and let libcurl act on what came.  Returns whether the
 * latch was set; does not reset it.
 */
static bool
wait_and_drive(long timeout_ms)
{
	WaitEvent	occurred[16];
	int			noccurred;
	bool		latched = false;

	if (nsockets == 0)
		return (WaitLatch(MyLatch,
						  WL_LATCH_SET | WL_EXIT_ON_PM_DEATH |
						  (timeout_ms >= 0 ? WL_TIMEOUT : 0),
						  timeout_ms, abp_wait_event(&wait_event, "AibillingPolarHttp")) & WL_LATCH_SET) != 0;

	noccurred = wait_for_events(occurred, lengthof(occurred), timeout_ms);
	for (int i = 0; i < noccurred; i++)
	{
		int			ready = 0;

		if (occurred[i].events & WL_LATCH_SET)
		{
			latched = true;
			continue;
		}
		if (occurred[i].events & WL_SOCKET_READABLE)
			ready |= CURL_CSELECT_IN;
		if (occurred[i].events & WL_SOCKET_WRITEABLE)
			ready |= CURL_CSELECT_OUT;
		drive_multi(occurred[i].fd, ready);
	}

	/*
	 * A latch that is set hides the sockets from the wait.  Look at them all
	 * (0: libcurl tests for itself), so that frequent wake-ups cannot starve
	 * the transfers.
	 */
	if (latched)
	{
		for (int i = 0; i < nsockets; i++)
			drive_multi(sockets[i].fd, 0);
	}
	return latched;
}

/*
 * Drive the requests in flight; if there are none, just wait.  Returns true as soon
 * as a request has finished (see abp_http_next_finished), false when
 * timeout_ms (milliseconds, -1: no limit) have passed or the latch was set.
 * Raises whatever CHECK_FOR_INTERRUPTS raises, in any state of the requests:
 * see abp_http_cancel_all.
 *
 * The latch: it is reset here, once seen, and the wait then ends, also with
 * false.  A caller that sleeps on something else as well tests for that after
 * every return and before the next call, and loses no wake-up.
 */
bool
abp_http_wait(long timeout_ms)
{
	int64		deadline = timeout_ms < 0 ? -1 : now_us() + (int64) timeout_ms * 1000;
	bool		polled = false;

	for (;;)
	{
		int64		now = now_us();
		int64		until = deadline;
		long		wait_ms = -1;

		if (timer_due >= 0 && timer_due <= now)
		{
			timer_due = -1;
			drive_multi(CURL_SOCKET_TIMEOUT, 0);
		}
		CHECK_FOR_INTERRUPTS();
		if (!dlist_is_empty(&finished))
			return true;
		if (deadline >= 0 && deadline <= now && polled)
			return false;

		if (timer_due >= 0 && (until < 0 || timer_due < until))
			until = timer_due;
		if (until >= 0)
			wait_ms = until <= now ? 0 : (long) Min((until - now + 999) / 1000, INT_MAX);

		polled = true;
		if (wait_and_drive(wait_ms))
		{
			ResetLatch(MyLatch);
			CHECK_FOR_INTERRUPTS();
			return !dlist_is_empty(&finished);
		}
	}
}

/* ----------------------------------------------------------------
 *		starting and releasing requests
 * ----------------------------------------------------------------
 */

/*
 * Make the multi handle.  Never in the postmaster: its children would share
 * the state of libcurl and of the TLS library, and it must stay without
 * threads.
 */
static void
ensure_multi(void)
{
	static bool initialized = false;
	sigset_t	saved;

	if (multi != NULL)
		return;
	Assert(IsUnderPostmaster || !IsPostmasterEnvironment);

	if (!initialized)
	{
		CURLcode	code;

		block_signals(&saved);
		code = curl_global_init(CURL_GLOBAL_ALL);
		restore_signals(&saved);
		if (code != CURLE_OK)
			ereport(ERROR,
					(errcode(ERRCODE_SYSTEM_ERROR),
					 errmsg("could not initialize libcurl: %s",
							curl_easy_strerror(code))));
		initialized = true;
	}

	multi = curl_multi_init();
	if (multi == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_OUT_OF_MEMORY),
				 errmsg("out of memory")));
	curl_multi_setopt(multi, CURLMOPT_SOCKETFUNCTION, watch_socket);
	curl_multi_setopt(multi, CURLMOPT_TIMERFUNCTION, set_timer);
	curl_multi_setopt(multi, CURLMOPT_MAXCONNECTS, (long) MAX_IDLE_CONNECTIONS);
#if CURL_AT_LEAST_VERSION(8, 20, 0)
	curl_multi_setopt(multi, CURLMOPT_QUICK_EXIT, 1L);
#endif
}

/* A request out of the unused ones, or a new one; in no list. */
static HttpRequest *
take_unused(void)
{
	HttpRequest *request;

	if (!dlist_is_empty(&unused))
		return dlist_container(HttpRequest, node, dlist_pop_head_node(&unused));

	request = calloc(1, sizeof(HttpRequest));
	if (request != NULL)
	{
		request->easy = curl_easy_init();
		if (request->easy != NULL)
			return request;
		free(request);
	}
	ereport(ERROR,
			(errcode(ERRCODE_OUT_OF_MEMORY),
			 errmsg("out of memory")));
	return NULL;				/* keep compiler quiet */
}

/*
 * Make a request that is in no list ready for its next use.  Resetting the
 * handle drops its pointers to our memory and keeps its connections.
 *
 * The copy of the token is wiped; copies that libcurl has made while sending
 * are out of reach.
 */
static void
recycle(HttpRequest *request)
{
	sigset_t	saved;

	block_signals(&saved);
	curl_easy_reset(request->easy);
	restore_signals(&saved);

	if (request->authorization.data != NULL)
	{
		explicit_bzero(request->authorization.data,
					   strlen(request->authorization.data));
		free(request->authorization.data);
		request->authorization.data = NULL;
	}
	if (request->capacity > KEPT_BUFFER)
	{
		free(request->buffer);
		request->buffer = NULL;
		request->capacity = 0;
	}
	dlist_push_head(&unused, &request->node);
}

/* Options being set on a handle: the first failure and its name are kept. */
typedef struct OptionSetter
{
	CURL	   *easy;
	CURLcode	failure;
	const char *failed_option;
} OptionSetter;

#define SET(setter, option, value) \
	do { \
		CURLcode	code_ = curl_easy_setopt((setter)->easy, (option), (value)); \
		if (code_ != CURLE_OK && (setter)->failure == CURLE_OK) \
		{ \
			(setter)->failure = code_; \
			(setter)->failed_option = #option; \
		} \
	} while (0)

/* What is sent, and how much time it may take. */
static void
set_request(OptionSetter *setter, const HttpRequest *request, const char *url,
			struct curl_slist *headers, const char *body)
{
	SET(setter, CURLOPT_URL, url);
	SET(setter, CURLOPT_HTTPHEADER, headers);
	SET(setter, CURLOPT_USERAGENT, "aibilling_polar/" ABP_VERSION);
	if (body != NULL)
	{
		/* memory that libcurl can read again when it has to start over */
		SET(setter, CURLOPT_POST, 1L);
		SET(setter, CURLOPT_POSTFIELDSIZE_LARGE, (curl_off_t) request->body_len);
		SET(setter, CURLOPT_POSTFIELDS, body);

		/* How much is handed to the socket at a time; the default is 64 kB. */
		SET(setter, CURLOPT_UPLOAD_BUFFERSIZE,
			(long) Min(Max(request->body_len, 64 * 1024), MAX_UPLOAD_BUFFER));
	}
	SET(setter, CURLOPT_TIMEOUT_MS, (long) request->timeout_ms);
	SET(setter, CURLOPT_CONNECTTIMEOUT_MS, (long) request->connect_ms);
}

/* By which way, and whom we trust on it. */
static void
set_connection(OptionSetter *setter, const HttpTarget *target)
{
	/* neither the proxy nor its exceptions may come from the environment */
	SET(setter, CURLOPT_PROXY, target->proxy != NULL ? target->proxy : "");
	SET(setter, CURLOPT_NOPROXY, "");
	SET(setter, CURLOPT_SUPPRESS_CONNECT_HEADERS, 1L);

	/* the default store would be trusted besides the file */
	if (target->ca_file != NULL)
	{
		SET(setter, CURLOPT_CAINFO, target->ca_file);
		SET(setter, CURLOPT_CAPATH, NULL);
	}
	SET(setter, CURLOPT_SSLVERSION, (long) CURL_SSLVERSION_TLSv1_2);
#if CURL_AT_LEAST_VERSION(7, 87, 0)
	/* the default is a day, in which a replaced ca_file goes unseen */
	SET(setter, CURLOPT_CA_CACHE_TIMEOUT, (long) TRUST_STORE_SECONDS);
	/* otherwise ending a transfer waits for a name look-up that hangs */
	SET(setter, CURLOPT_QUICK_EXIT, 1L);
#endif

	/* a redirect would carry the token elsewhere */
	SET(setter, CURLOPT_FOLLOWLOCATION, 0L);
#if CURL_AT_LEAST_VERSION(7, 85, 0)
	SET(setter, CURLOPT_PROTOCOLS_STR, "http,https");
#else
	SET(setter, CURLOPT_PROTOCOLS, (long) (CURLPROTO_HTTP | CURLPROTO_HTTPS));
#endif

	/*
	 * One request a connection: none waits behind another's body, and a
	 * broken connection leaves one outcome unknown.
	 */
	SET(setter, CURLOPT_HTTP_VERSION, (long) CURL_HTTP_VERSION_1_1);
	SET(setter, CURLOPT_TCP_KEEPALIVE, 1L);
}

/* What libcurl calls of ours. */
static void
set_callbacks(OptionSetter *setter, HttpRequest *request)
{
	/* without this, libcurl may use SIGALRM and siglongjmp */
	SET(setter, CURLOPT_NOSIGNAL, 1L);
	SET(setter, CURLOPT_ERRORBUFFER, request->curl_error);
	SET(setter, CURLOPT_PRIVATE, request);
	SET(setter, CURLOPT_WRITEFUNCTION, keep_body);
	SET(setter, CURLOPT_WRITEDATA, request);
	SET(setter, CURLOPT_HEADERFUNCTION, keep_header);
	SET(setter, CURLOPT_HEADERDATA, request);
#if CURL_AT_LEAST_VERSION(7, 80, 0)
	SET(setter, CURLOPT_PREREQFUNCTION, note_sending);
	SET(setter, CURLOPT_PREREQDATA, request);
#endif
	SET(setter, CURLOPT_OPENSOCKETFUNCTION, open_socket);
	SET(setter, CURLOPT_CLOSESOCKETFUNCTION, close_socket);
}

/* Put the token before the headers.  Returns false if out of memory. */
static bool
add_token(HttpRequest *request, const char *token, struct curl_slist **headers)
{
	static const char prefix[] = "Authorization: Bearer ";
	size_t		size = sizeof(prefix) + strlen(token);

	request->authorization.data = malloc(size);
	if (request->authorization.data == NULL)
		return false;
	snprintf(request->authorization.data, size, "%s%s", prefix, token);
	request->authorization.next = *headers;
	*headers = &request->authorization;
	return true;
}

/* Start a request; a GET if body is NULL. */
static HttpRequest *
start_request(const HttpTarget *target, const char *token, const char *body,
			  size_t body_len, size_t max_reply)
{
	HttpRequest *request;
	OptionSetter setter = {.failure = CURLE_OK};
	CURLMcode	code;
	struct curl_slist *headers = body != NULL ? &post_headers : &get_headers;
	sigset_t	saved;

	Assert(target->timeout_ms > 0);
	Assert(token == NULL || strpbrk(token, "\r\n") == NULL);

	ensure_multi();
	request = take_unused();

	memset(&request->reply, 0, sizeof(request->reply));
	request->max_reply = max_reply;
	request->body_len = body_len;
	request->sent = false;
	request->answering = false;
	request->unanswered = false;
	request->out_of_memory = false;
	request->proxied = target->proxy != NULL;
	request->timeout_ms = target->timeout_ms;
	request->connect_ms = Min(target->timeout_ms, MAX_CONNECT_MS);
	request->curl_error[0] = '\0';

	if (token != NULL && !add_token(request, token, &headers))
	{
		recycle(request);
		ereport(ERROR,
				(errcode(ERRCODE_OUT_OF_MEMORY),
				 errmsg("out of memory")));
	}

	setter.easy = request->easy;
	set_request(&setter, request, target->url, headers, body);
	set_connection(&setter, target);
	set_callbacks(&setter, request);
	if (setter.failure != CURLE_OK)
	{
		recycle(request);
		ereport(ERROR,
				(errcode(setter.failure == CURLE_OUT_OF_MEMORY ?
						 ERRCODE_OUT_OF_MEMORY : ERRCODE_SYSTEM_ERROR),
				 errmsg("could not set libcurl's option %s: %s",
						setter.failed_option, curl_easy_strerror(setter.failure))));
	}

	block_signals(&saved);
	code = curl_multi_add_handle(multi, request->easy);
	restore_signals(&saved);
	if (code != CURLM_OK)
	{
		recycle(request);
		ereport(ERROR,
				(errcode(code == CURLM_OUT_OF_MEMORY ?
						 ERRCODE_OUT_OF_MEMORY : ERRCODE_SYSTEM_ERROR),
				 errmsg("could not start an HTTP request: %s",
						curl_multi_strerror(code))));
	}
	dlist_push_tail(&running, &request->node);
	in_flight++;

	/* Let libcurl begin to send at once. */
	timer_due = -1;
	drive_multi(CURL_SOCKET_TIMEOUT, 0);
	return request;
}

/*
 * Start a POST of body (JSON, body_len bytes) with the token (NULL: none).
 * The body is not copied: it must stay as it is until abp_http_release or
 * abp_http_cancel_all.  All else may be freed at once.  Raises an ERROR only
 * if out of memory or if libcurl lacks something; whatever the network does
 * is in the reply.
 */
HttpRequest *
abp_http_post(const HttpTarget *target, const char *token,
			  const char *body, size_t body_len)
{
	Assert(body != NULL);
	return start_request(target, token, body, body_len, HTTP_MAX_REPLY);
}

/* Start a GET of a JSON document; otherwise like abp_http_post. */
HttpRequest *
abp_http_get(const HttpTarget *target, const char *token)
{
	return start_request(target, token, NULL, 0, HTTP_MAX_DOCUMENT);
}

/*
 * The next request that has ended, NULL if none has.  The caller releases it.
 */
HttpRequest *
abp_http_next_finished(void)
{
	dlist_node *node;

	if (dlist_is_empty(&finished))
		return NULL;
	node = dlist_pop_head_node(&finished);
	dlist_push_tail(&handed_out, node);
	in_flight--;
	return dlist_container(HttpRequest, node, node);
}

/* What came of a request that abp_http_next_finished has handed out. */
const HttpReply *
abp_http_reply(HttpRequest *request)
{
	return &request->reply;
}

/*
 * End the use of a request that abp_http_next_finished has handed out, and of
 * its reply.
 */
void
abp_http_release(HttpRequest *request)
{
	dlist_delete(&request->node);
	recycle(request);
}

/*
 * Abort what is in flight and release every request, handed out or not: no
 * pointer to one is valid afterwards.  Cheap when there is none; raises
 * nothing and waits for nothing, so it suits PG_CATCH and exit callbacks.
 * Aborted connections are closed, idle ones stay open.
 */
void
abp_http_cancel_all(void)
{
	sigset_t	saved;

	block_signals(&saved);
	while (!dlist_is_empty(&running))
	{
		HttpRequest *request = dlist_head_element(HttpRequest, node, &running);

		detach_request(request);
		recycle(request);
	}
	restore_signals(&saved);
	while (!dlist_is_empty(&finished))
		recycle(dlist_container(HttpRequest, node,
								dlist_pop_head_node(&finished)));
	while (!dlist_is_empty(&handed_out))
		recycle(dlist_container(HttpRequest, node,
								dlist_pop_head_node(&handed_out)));
	in_flight = 0;
}

/* Requests started and not yet handed out by abp_http_next_finished. */
int
abp_http_in_flight(void)
{
	return in_flight;
}
