/*-------------------------------------------------------------------------
 *
 * rollup.c
 *	  Shares of deliveries into the rollup.
 *
 * The rollup has each row's part three times: by all that sums are kept by, by
 * day and model, and by month and customer; a question about a year or about
 * one of many customers reads few rows then.  A row of it is found by hashes,
 * because customers and models may have names of any length.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "common/cryptohash.h"
#include "common/sha2.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/syscache.h"
#include "utils/timestamp.h"

#include "compat.h"
#include "base/decimal.h"
#include "base/text_view.h"
#include "queue/rollup_table.h"
#include "queue/shares.h"
#include "usage/rollup.h"
#include "usage/rows.h"
#include "usage/share.h"
#include "usage/share_bytes.h"
#include "usage/share_key.h"

/* How much is folded at most at a time. */
#define FOLD_SHARES 64

/* SHA-256 of some bytes. */
static void
hash_bytes_of(const char *data, int len, uint8 *result)
{
	pg_cryptohash_ctx *context = pg_cryptohash_create(PG_SHA256);

	if (context == NULL || pg_cryptohash_init(context) < 0 ||
		pg_cryptohash_update(context, (const uint8 *) data, len) < 0 ||
		pg_cryptohash_final(context, result, PG_SHA256_DIGEST_LENGTH) < 0)
		ereport(ERROR,
				(errcode(ERRCODE_INTERNAL_ERROR),
				 errmsg("could not compute a SHA-256 hash")));
	pg_cryptohash_free(context);
}

/*
 * By which number a customer is found in the rollup; 0 for none.
 */
int64
abp_rollup_customer(const ShareKey *key)
{
	ShareKey	customer = abp_share_key_by_customer(key);
	StringInfoData bytes;
	uint8		hash[PG_SHA256_DIGEST_LENGTH];
	uint64		number = 0;

	if (key->external_customer_id.data == NULL && key->customer_id == NULL)
		return 0;
	initStringInfo(&bytes);
	abp_share_key_write(&bytes, &customer);
	hash_bytes_of(bytes.data, bytes.len, hash);
	pfree(bytes.data);
	for (int i = 0; i < 8; i++)
		number = number << 8 | hash[i];
	return (int64) number;
}

/*
 * What a row of the rollup says of a group, palloc'd: its day, and the columns
 * behind the key.  Returns the group's key.
 */
ShareKey
abp_rollup_values(const ShareGroup *group, Datum *values, bool *nulls)
{
	const ShareSums *sums = &group->sums;
	pg_uuid_t  *customer_id = palloc(sizeof(pg_uuid_t));
	ShareKey	key;

	memset(nulls, false, sizeof(bool) * NUM_ROLLUP_COLUMNS);
	abp_share_key_read(group->key, group->keylen, &key, customer_id);
	values[ROLLUP_DAY] = DateADTGetDatum(key.day);
	values[ROLLUP_EXTERNAL_CUSTOMER_ID] =
		text_view_or_null(key.external_customer_id, &nulls[ROLLUP_EXTERNAL_CUSTOMER_ID]);
	values[ROLLUP_CUSTOMER_ID] = UUIDPGetDatum(customer_id);
	nulls[ROLLUP_CUSTOMER_ID] = key.customer_id == NULL;
	values[ROLLUP_PROVIDER] = text_view_or_null(key.provider, &nulls[ROLLUP_PROVIDER]);
	values[ROLLUP_MODEL] = text_view_or_null(key.model, &nulls[ROLLUP_MODEL]);
	values[ROLLUP_EVENT_NAME] = text_view_or_null(key.event_name, &nulls[ROLLUP_EVENT_NAME]);
	values[ROLLUP_USAGE_ROWS] = Int64GetDatum(sums->rows);
	for (int i = 0; i < NUM_SHARE_TOKENS; i++)
		values[ROLLUP_INPUT_TOKENS + i] = NumericGetDatum(abp_decimal_numeric(sums->tokens[i], 0));
	values[ROLLUP_COST_NANOS] = NumericGetDatum(abp_decimal_numeric(sums->nanos, 0));
	values[ROLLUP_COST_CENTS] = NumericGetDatum(abp_share_cents(sums));
	values[ROLLUP_UNPRICED] = Int64GetDatum(sums->unpriced);
	return key;
}

/* The arrays of abp_rollup_table_add, being filled. */
typedef struct Columns
{
	Oid			usage_table;
	int			n;
	Datum	   *values[NUM_ROLLUP_COLUMNS];
	bool	   *nulls[NUM_ROLLUP_COLUMNS];
} Columns;

/* Add the rollup's row of a group. */
static void
add_row(Columns *columns, char level, const ShareGroup *group)
{
	Datum		values[NUM_ROLLUP_COLUMNS];
	bool		nulls[NUM_ROLLUP_COLUMNS];
	uint8		hash[PG_SHA256_DIGEST_LENGTH];
	pg_uuid_t  *name = palloc(sizeof(pg_uuid_t));
	ShareKey	key = abp_rollup_values(group, values, nulls);

	hash_bytes_of(group->key, group->keylen, hash);
	memcpy(name, hash, UUID_LEN);
	values[ROLLUP_USAGE_TABLE] = ObjectIdGetDatum(columns->usage_table);
	values[ROLLUP_LEVEL] = CharGetDatum(level);
	values[ROLLUP_CUSTOMER] = Int64GetDatum(abp_rollup_customer(&key));
	values[ROLLUP_KEY] = UUIDPGetDatum(name);

	for (int i = 0; i < NUM_ROLLUP_COLUMNS; i++)
	{
		columns->values[i][columns->n] = values[i];
		columns->nulls[i][columns->n] = nulls[i];
	}
	columns->n++;
}

static void
write_columns(Columns *columns)
{
	static const Oid types[NUM_ROLLUP_COLUMNS] = {
		REGCLASSOID, CHAROID, INT8OID, DATEOID, UUIDOID, TEXTOID, UUIDOID, TEXTOID, TEXTOID, TEXTOID, INT8OID,
		NUMERICOID, NUMERICOID, NUMERICOID, NUMERICOID, NUMERICOID, NUMERICOID, NUMERICOID, INT8OID
	};
	Datum		arrays[NUM_ROLLUP_COLUMNS];
	int			lower = 1;

	for (int i = 0; i < NUM_ROLLUP_COLUMNS; i++)
	{
		int16		len;
		bool		by_value;
		char		align;

		get_typlenbyvalalign(types[i], &len, &by_value, &align);
		arrays[i] = PointerGetDatum(construct_md_array(columns->values[i], columns->nulls[i], 1,
													   &columns->n, &lower, types[i], len, by_value,
													   align));
	}
	abp_rollup_table_add(arrays);
}

/* Write the sums of some deliveries of a table into the rollup, at all levels. */
static void
write_groups(Oid usage_table, const ShareGroups *daily)
{
	ShareGroups by_model;
	ShareGroups by_customer;
	Columns		columns = {usage_table};
	int			max;

	abp_share_init(&by_model, CurrentMemoryContext);
	abp_share_init(&by_customer, CurrentMemoryContext);
	for (int i = 0; i < daily->ngroups; i++)
	{
		const ShareGroup *group = &daily->groups[i];
		ShareKey	key;
		ShareKey	of_model;
		ShareKey	of_customer;
		pg_uuid_t	customer_id;

		abp_share_key_read(group->key, group->keylen, &key, &customer_id);
		of_model = abp_share_key_by_model(&key);
		abp_share_add(&by_model, &abp_share_group_of(&by_model, &of_model)->sums, &group->sums);
		of_customer = abp_share_key_by_customer(&key);
		of_customer.day = abp_share_key_month(key.day, 0);
		abp_share_add(&by_customer, &abp_share_group_of(&by_customer, &of_customer)->sums, &group->sums);
	}

	max = daily->ngroups + by_model.ngroups + by_customer.ngroups;
	for (int i = 0; i < NUM_ROLLUP_COLUMNS; i++)
	{
		columns.values[i] = palloc(sizeof(Datum) * Max(max, 1));
		columns.nulls[i] = palloc(sizeof(bool) * Max(max, 1));
	}
	for (int i = 0; i < daily->ngroups; i++)
		add_row(&columns, ROLLUP_DAILY, &daily->groups[i]);
	for (int i = 0; i < by_model.ngroups; i++)
		add_row(&columns, ROLLUP_BY_MODEL, &by_model.groups[i]);
	for (int i = 0; i < by_customer.ngroups; i++)
		add_row(&columns, ROLLUP_BY_CUSTOMER, &by_customer.groups[i]);
	if (columns.n > 0)
		write_columns(&columns);
}

/* Groups of rows, and how many there may be. */
typedef struct Piece
{
	ShareGroups groups;
	int			max_groups;
} Piece;

static bool
add_to_group(const char *key, int keylen, const ShareSums *sums, void *arg)
{
	Piece	   *piece = arg;

	abp_share_add(&piece->groups, &abp_share_group(&piece->groups, key, keylen)->sums, sums);
	return piece->groups.ngroups < piece->max_groups;
}

/*
 * Add the sums of some delivered batches to the rollup, of deliveries from
 * *from_delivery on, which is moved: of as many rows as make so many groups, each of
 * which is written once.  For the shipper, in a transaction of its own.  Returns
 * whether there may be more.
 */
bool
abp_rollup_fold(int64 *from_delivery, int max_groups)
{
	List	   *shares = abp_shares_to_fold(*from_delivery, FOLD_SHARES, false);
	int64	   *folded = palloc(sizeof(int64) * Max(1, list_length(shares)));
	int			nfolded = 0;
	Oid			usage_table;
	Piece		piece = {.max_groups = max_groups};
	ListCell   *lc;

	*from_delivery = abp_shares_first_open();
	if (shares == NIL)
		return false;
	*from_delivery = Min(*from_delivery, ((Share *) linitial(shares))->delivery);
	usage_table = ((Share *) linitial(shares))->usage_table;
	if (!SearchSysCacheExists1(RELOID, ObjectIdGetDatum(usage_table)))
	{
		abp_shares_forget(usage_table);
		return true;
	}

	abp_share_init(&piece.groups, CurrentMemoryContext);
	foreach(lc, shares)
	{
		Share	   *share = lfirst(lc);

		if (share->usage_table != usage_table)
			continue;
		if (!abp_share_decode(share->sums, &share->folded_rows, add_to_group, &piece))
		{
			abp_shares_set_folded(share->delivery, share->folded_rows);
			break;
		}
		folded[nfolded++] = share->delivery;
		if (piece.groups.ngroups >= max_groups)
			break;
	}
	write_groups(usage_table, &piece.groups);
	abp_shares_drop(folded, nfolded);
	return true;
}

/* Rows that are summed up. */
typedef struct RowSum
{
	ShareRows	rows;
	const EventFormat *format;
} RowSum;

static bool
sum_row(const UsageRow *row, Jsonb *whole, void *arg)
{
	RowSum	   *sum = arg;

	abp_share_rows_add(&sum->rows, sum->rows.nrows, row, sum->format);
	return true;
}

/*
 * What the rows of these ids add up to, by the active snapshot, as the bytes of
 * a share.  Raises what reading raises.
 */
bytea	   *
abp_rollup_sum_rows(const UsageTable *table, IdSet *ids, const EventFormat *format)
{
	RowSum		sum = {.format = format};

	abp_share_rows_init(&sum.rows, CurrentMemoryContext);
	abp_rows_read(table, ids, false, sum_row, &sum);
	return abp_share_encode(&sum.rows, NULL);
}
