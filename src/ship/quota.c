/*-------------------------------------------------------------------------
 *
 * quota.c
 *	  A server's requests per minute, shared by all that make requests to it.
 *
 * A bucket of tokens for each server.  What it holds and what flows into it in
 * a minute are the limit together, so that no minute has more, wherever Polar
 * lets its minutes begin.
 *
 * Delivery and sessions that read back draw from one bucket.  Who reads has a
 * smaller one besides, a tenth of the limit, and while that one allows it the
 * next token is theirs: a backlog neither keeps readers out nor is held up.
 *
 * The buckets lie in shared memory.  Without preloading there is none, nor is
 * there a worker: then each session knows what it has taken itself, and of
 * others what the ledger says.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "miscadmin.h"
#include "storage/lwlock.h"
#include "utils/timestamp.h"

#include "base/shared_memory.h"
#include "queue/ledger.h"
#include "ship/quota.h"

/* This share of a minute's requests may be made at once. */
#define BURST_SHARE 10

/* This share of them may be made to read. */
#define READ_SHARE 10

/* How long a token is kept for a reader that does not ask again. */
#define READER_WAITS_MS 1000

/* Of more servers than these the one not used for longest is forgotten. */
#define MAX_BUCKETS 64

typedef struct Bucket
{
	Oid			database;		/* InvalidOid: free */
	char		server[NAMEDATALEN];
	int64		tokens;
	TimestampTz tokens_at;		/* when there were as many; 0: unknown */
	int64		read_tokens;
	TimestampTz read_tokens_at; /* likewise */
	TimestampTz reader_waits_until; /* a reader may take the next token */
	TimestampTz used_at;
} Bucket;

typedef struct QuotaState
{
	LWLock	   *lock;			/* NULL: not in shared memory */
	Bucket		buckets[MAX_BUCKETS];
} QuotaState;

static QuotaState own_state;	/* without shared memory */
static QuotaState *quotas = &own_state;

/* Shared memory is there: the buckets are in it from now on. */
static void
use_state(void *memory, LWLock *lock)
{
	quotas = memory;
	if (lock != NULL)
		quotas->lock = lock;
}

/*
 * Ask for shared memory.  Called while the library is preloaded.
 */
void
abp_quota_init(void)
{
	abp_shared_memory_request("aibilling_polar_quota", sizeof(QuotaState), use_state);
}

/* Buckets that are not shared need no lock. */
static void
lock_buckets(void)
{
	if (quotas->lock != NULL)
		LWLockAcquire(quotas->lock, LW_EXCLUSIVE);
}

static void
unlock_buckets(void)
{
	if (quotas->lock != NULL)
		LWLockRelease(quotas->lock);
}

/* The bucket of a server of this database.  With the lock. */
static Bucket *
bucket_of(const char *server)
{
	Bucket	   *oldest = &quotas->buckets[0];

	for (int i = 0; i < MAX_BUCKETS; i++)
	{
		Bucket	   *bucket = &quotas->buckets[i];

		if (bucket->database == MyDatabaseId && strcmp(bucket->server, server) == 0)
			return bucket;
		if (bucket->used_at < oldest->used_at)
			oldest = bucket;
	}
	memset(oldest, 0, sizeof(Bucket));
	oldest->database = MyDatabaseId;
	strlcpy(oldest->server, server, NAMEDATALEN);
	return oldest;
}

/* How fast a bucket fills. */
static int64
us_per_token(int64 limit, int64 burst)
{
	int64		rate = Max(limit - burst, 1);	/* a minute */

	return (USECS_PER_MINUTE + rate - 1) / rate;
}

/*
 * Let what has flowed into a bucket since then be in it, up to what it holds.
 */
static void
fill(int64 *tokens, TimestampTz *tokens_at, int64 limit, int64 burst, TimestampTz now)
{
	if (now < *tokens_at)		/* the clock was set back */
		*tokens_at = now;
	else
	{
		int64		gained = (now - *tokens_at) / us_per_token(limit, burst);

		*tokens += gained;
		*tokens_at += gained * us_per_token(limit, burst);
	}
	if (*tokens >= burst)
	{
		*tokens = burst;
		*tokens_at = now;
	}
}

/*
 * Lock the buckets, and fill a server's with what has flowed into it since; the
 * first time it lacks what was sent lately, by the ledger.
 */
static Bucket *
lock_filled(const ServerOptions *server, TimestampTz now)
{
	int64		limit = server->requests_per_minute;
	int64		burst = Max(limit / BURST_SHARE, 1);
	Bucket	   *bucket;

	lock_buckets();
	bucket = bucket_of(server->name);
	if (bucket->tokens_at == 0)
	{
		int			recent;

		unlock_buckets();
		recent = abp_ledger_recent_requests(server->name, burst);
		lock_buckets();
		bucket = bucket_of(server->name);
		if (bucket->tokens_at == 0)
		{
			bucket->tokens = burst - recent;
			bucket->tokens_at = now;
		}
	}
	fill(&bucket->tokens, &bucket->tokens_at, limit, burst, now);
	bucket->used_at = now;
	return bucket;
}

/* When a bucket will hold so many tokens. */
static TimestampTz
holds_at(int64 tokens, TimestampTz tokens_at, int64 wanted, int64 limit, int64 burst)
{
	return tokens_at + Max(wanted - tokens, 0) * us_per_token(limit, burst);
}

/*
 * May a request be made now to deliver, by the server's limit of requests per
 * minute?  If not, *next is when to ask again.
 */
bool
abp_quota_take(const ServerOptions *server, TimestampTz *next)
{
	int64		limit = server->requests_per_minute;
	int64		burst = Max(limit / BURST_SHARE, 1);
	TimestampTz now = GetCurrentTimestamp();
	Bucket	   *bucket;
	int64		kept;
	bool		taken;

	if (limit == 0)
		return true;
	bucket = lock_filled(server, now);
	kept = bucket->reader_waits_until > now ? 1 : 0;
	taken = bucket->tokens >= 1 + kept;
	if (taken)
		bucket->tokens--;
	else if (bucket->tokens >= 1)
		*next = bucket->reader_waits_until;
	else
		*next = holds_at(bucket->tokens, bucket->tokens_at, 1, limit, burst);
	unlock_buckets();
	return taken;
}

/*
 * The same for a request that reads.  While it may not be made, the reader asks
 * again at *next or within a second.
 */
bool
abp_quota_take_to_read(const ServerOptions *server, TimestampTz *next)
{
	int64		limit = server->requests_per_minute;
	int64		burst = Max(limit / BURST_SHARE, 1);
	int64		read_limit = Max(limit / READ_SHARE, 1);
	int64		read_burst = Max(read_limit / BURST_SHARE, 1);
	TimestampTz now = GetCurrentTimestamp();
	Bucket	   *bucket;
	bool		taken = false;

	if (limit == 0)
		return true;
	bucket = lock_filled(server, now);
	if (bucket->read_tokens_at == 0)
	{
		bucket->read_tokens = read_burst;
		bucket->read_tokens_at = now;
	}
	fill(&bucket->read_tokens, &bucket->read_tokens_at, read_limit, read_burst, now);
	if (bucket->read_tokens < 1)
		*next = holds_at(bucket->read_tokens, bucket->read_tokens_at, 1, read_limit, read_burst);
	else if (bucket->tokens < 1)
	{
		*next = holds_at(bucket->tokens, bucket->tokens_at, 1, limit, burst);
		bucket->reader_waits_until = now + READER_WAITS_MS * INT64CONST(1000);
	}
	else
	{
		bucket->tokens--;
		bucket->read_tokens--;
		bucket->reader_waits_until = 0;
		taken = true;
	}
	unlock_buckets();
	return taken;
}

/*
 * A request that was about to be delivered was not made.
 */
void
abp_quota_give_back(const ServerOptions *server)
{
	if (server->requests_per_minute == 0)
		return;
	lock_buckets();
	bucket_of(server->name)->tokens++;
	unlock_buckets();
}

/*
 * A server says that its limit is reached: others have used it up.
 */
void
abp_quota_used_up(const char *server)
{
	Bucket	   *bucket;

	lock_buckets();
	bucket = bucket_of(server);
	bucket->tokens = 0;
	bucket->tokens_at = GetCurrentTimestamp();
	unlock_buckets();
}

/*
 * Another process may have delivered meanwhile: what cannot be seen of that is
 * asked of the ledger again.
 */
void
abp_quota_forget(void)
{
	if (quotas->lock == NULL)
		memset(quotas->buckets, 0, sizeof(quotas->buckets));
}
