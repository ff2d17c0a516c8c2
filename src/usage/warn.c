/*-------------------------------------------------------------------------
 *
 * warn.c
 *	  Warnings of rows that are stored and not sent as they are.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "replication/logicalworker.h"
#include "utils/hsearch.h"
#include "utils/rel.h"
#include "utils/timestamp.h"

#include "base/numeric_math.h"
#include "base/text_view.h"
#include "base/transaction.h"
#include "base/usage_row.h"
#include "price/price.h"
#include "usage/fate.h"
#include "usage/warn.h"

/* How many models a session is warned about before it is left in peace. */
#define MAX_WARNED_MODELS 1000

/* How many warnings a statement of a client writes, whatever its functions do. */
#define MAX_STATEMENT_WARNINGS 5

static HTAB *warned_models = NULL;

/* The command that has warned of a row that cannot be sent. */
static CommandId warned_command = InvalidCommandId;

/* The start of the client's statement that has warned last, and how often it has. */
static TimestampTz warned_statement = 0;
static int	statement_warnings = 0;

/* The start of the statement that has told of a usage object in doubt. */
static TimestampTz noted_statement = 0;

/* May this statement warn once more?  It is to be a few kB in the log, not more. */
static bool
may_warn(void)
{
	if (IsLogicalWorker())
	{
		if (TimestampDifferenceExceeds(warned_statement, GetCurrentTimestamp(), ABP_WORKER_WARNINGS_MS))
		{
			warned_statement = GetCurrentTimestamp();
			statement_warnings = 0;
		}
	}
	else if (warned_statement != GetCurrentStatementStartTimestamp())
	{
		warned_statement = GetCurrentStatementStartTimestamp();
		statement_warnings = 0;
	}
	return statement_warnings < MAX_STATEMENT_WARNINGS;
}

/* The next transaction numbers its commands anew. */
static void
on_transaction_end(XactEvent event, void *arg)
{
	if (abp_transaction_ends(event))
		warned_command = InvalidCommandId;
}

/*
 * Warn, once a command, of a row that was stored and cannot be sent as it is.
 */
void
abp_warn_rejected(Relation rel, int64 id, const char *reason)
{
	static bool registered = false;
	CommandId	command = GetCurrentCommandId(false);

	if (warned_command == command || !may_warn())
		return;
	if (!registered)
		RegisterXactCallback(on_transaction_end, NULL);
	registered = true;
	warned_command = command;
	statement_warnings++;

	ereport(WARNING,
			(errcode(ERRCODE_WARNING),
			 errmsg("usage row " INT64_FORMAT " of \"%s\" was stored but cannot be sent: %s",
					id, RelationGetRelationName(rel), reason),
			 errhint("Fix the row with UPDATE. All such rows are in aibilling.outbox as rejected.")));
}

/*
 * Tell, once a statement, of a usage object whose numbers are in doubt although
 * the cost is known.
 */
void
abp_warn_doubt(const char *doubt)
{
	if (noted_statement == GetCurrentStatementStartTimestamp())
		return;
	noted_statement = GetCurrentStatementStartTimestamp();
	ereport(NOTICE,
			(errmsg("the reported cost is used, but the usage object is in doubt: %.*s",
					abp_short_length(doubt), doubt),
			 errdetail("Counts that make no sense are left out. aibilling.explain_cost() tells the same of each row.")));
}

/*
 * Is this the first time in this session that there is something of this name to
 * warn of?  No if the statement, or the session, has warned enough.
 */
static bool
is_first_warning_of(const char *what)
{
	char		key[128];
	bool		found;

	if (warned_models == NULL)
	{
		HASHCTL		ctl = {.keysize = sizeof(key),.entrysize = sizeof(key)};

		warned_models = hash_create("aibilling_polar models warned of", 16, &ctl,
									HASH_ELEM | HASH_STRINGS);
	}
	if (hash_get_num_entries(warned_models) >= MAX_WARNED_MODELS || !may_warn())
		return false;

	strlcpy(key, what, sizeof(key));
	hash_search(warned_models, key, HASH_ENTER, &found);
	return !found;
}

/*
 * Warn, once a session for each model, of rows that wait for a price.
 */
void
abp_warn_unpriced(const UsageRow *row, const char *reason)
{
	if (is_first_warning_of(reason))
	{
		PriceRequest request = abp_fate_price_request(row);
		char	   *hint = abp_price_hint(&request);

		abp_shorten(hint);
		statement_warnings++;
		ereport(WARNING,
				(errcode(ERRCODE_WARNING),
				 errmsg("usage is held until it can be priced: %s", reason),
				 errhint("%s", hint ? hint :
						 abp_cost_counted(&row->counts) ? "What is held is listed in aibilling.unpriced." :
						 "UPDATE the row: set its counts, such as input_tokens and output_tokens, its units or its provider_cost. What is held is listed in aibilling.unpriced.")));
	}
}

/*
 * Warn, once a session for each model, of a priced row whose output_tokens are
 * NULL.  They count as 0, which is right for embeddings; where a model's output
 * has a price, an application may have lost them on the way.
 */
void
abp_warn_no_output(const UsageRow *row, const PriceRequest *request, const PricedCost *cost)
{
	UsageCounts counts = row->counts;
	PriceRequest with_output = *request;
	PricedCost	other;
	char		name[128];

	if (row->counts.given[COUNT_OUTPUT] || row->counts.value[COUNT_INPUT] == 0 ||
		row->raw_usage != NULL || row->provider_cost != NULL || row->counts.units != NULL ||
		!cost->known)
		return;
	snprintf(name, sizeof(name), "output of %.*s %.*s", row->provider.len, row->provider.data,
			 row->model.len, row->model.data);
	if (!is_first_warning_of(name))
		return;

	/* as many as show in the cents, whatever one costs */
	counts.given[COUNT_OUTPUT] = true;
	counts.value[COUNT_OUTPUT] = 1000;
	with_output.counts = &counts;
	if (!abp_price_compute(&with_output, true, &other) || !other.known ||
		numeric_equal(other.cost_cents, cost->cost_cents))
		return;
	statement_warnings++;
	ereport(WARNING,
			(errcode(ERRCODE_WARNING),
			 errmsg("output_tokens is NULL and counts as 0, but the output of this model has a price (provider \"%.*s\", model \"%.*s\")",
					row->provider.len, row->provider.data, row->model.len, row->model.data),
			 errhint("Set output_tokens to what the provider reports, or to 0 if the call wrote nothing.")));
}
