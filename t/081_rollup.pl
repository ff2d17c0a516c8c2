
# usage_daily() and spend(): at every moment what GROUP BY says of the rows that are delivered, in
# flight or queued, to the digit.  (t/080_stress.pl compares them under random load.)

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use AibillingNode;
use IPC::Run;
use PolarServer;
use PostgreSQL::Test::Utils;
use Test::More;

plan skip_all => 'python3 is not on PATH' unless PolarServer->python;

my $polar = PolarServer->new;
my $node = AibillingNode->new('main', databases => 'postgres, restored, older, latin');
my $columns = 'input_tokens, cache_read_tokens, cache_write_tokens, output_tokens, reasoning_tokens, cost_nanos, cost_cents';

# What differs between usage_daily() and the rows, with those of "gone" (delivered, and deleted since).
# "where" says which rows of the table count, if not all; "node" where, if not on the first one.
sub difference
{
	my ($table, %options) = @_;
	my $db = $options{db} // 'postgres';
	my $on = $options{node} // $node;
	my $gone = $options{gone} ? "UNION ALL SELECT * FROM $options{gone}" : '';
	my $where = $options{where} // 'true';
	my $before = $options{before} // '';

	return $on->safe_psql($db, qq{
$before
WITH counted AS (
	SELECT * FROM (SELECT * FROM $table WHERE $where) t $gone
), named AS (
	SELECT c.*,
		coalesce(external_customer_id, tags ->> 'userId', tags ->> 'account', tags ->> 'externalId') AS tag_external,
		coalesce(customer_id, CASE WHEN external_customer_id IS NULL THEN (tags ->> 'customerId')::uuid END) AS internal
	FROM counted c
), by_rows AS (
	SELECT (occurred_at AT TIME ZONE 'UTC')::date, CASE WHEN internal IS NULL THEN tag_external END, internal,
		provider, model, event_name, count(*),
		coalesce(sum(input_tokens), 0), coalesce(sum(cache_read_tokens), 0),
		coalesce(sum(cache_write_tokens), 0) + coalesce(sum(cache_write_1h_tokens), 0),
		coalesce(sum(output_tokens), 0), coalesce(sum(reasoning_tokens), 0),
		coalesce(sum(cost_nanos), 0), coalesce(sum(cost_cents), 0), count(*) FILTER (WHERE cost_nanos IS NULL)
	FROM named GROUP BY 1, 2, 3, 4, 5, 6
), by_rollup AS (
	SELECT * FROM aibilling.usage_daily('$table')
), texts AS (
	-- to the digit: as text, too
	SELECT 'rows' AS side, r::text AS line FROM by_rows r
	UNION ALL SELECT 'rollup', r::text FROM by_rollup r
)
SELECT min(side), line FROM texts GROUP BY line HAVING count(*) <> 2 OR min(side) = max(side)
UNION ALL
SELECT 'nothing is counted', '' WHERE NOT EXISTS (SELECT FROM by_rollup)
ORDER BY 2;});
}

sub same
{
	my ($what, $table, %options) = @_;

	return is(difference($table // 'usage', %options), '', $what);
}

$node->create_server($polar, batch_size => 7);
$node->create_usage_table;
$node->safe_psql('postgres', q{
INSERT INTO aibilling.price (provider, model, input, output, cache_read, cache_write, cache_write_1h)
VALUES ('p', 'm0', 1.25, 10, 0.1, 0.2, 0.3), ('p', 'm1', 0.000000001, 0.7, NULL, NULL, NULL);});

# Rows of all kinds: customers by column, by tag, by UUID, none; costs of all sizes, and none.
my $insert = q{
INSERT INTO usage (occurred_at, provider, model, event_name, external_customer_id, customer_id, tags,
	input_tokens, output_tokens, cache_read_tokens, cache_write_tokens, cache_write_1h_tokens, provider_cost)
SELECT now() - n * interval '5 hours', 'p', CASE n % 5 WHEN 4 THEN NULL WHEN 3 THEN 'no price' ELSE 'm' || n % 2 END,
	CASE n % 7 WHEN 0 THEN 'other' END,
	CASE WHEN n % 4 < 2 THEN 'customer ' || n % 3 END,
	CASE WHEN n % 4 IN (1, 2) THEN '11111111-1111-4111-8111-111111111111'::uuid END,
	CASE n % 12 WHEN 3 THEN '{"userId": "by tag"}' WHEN 7 THEN '{"customerId": "22222222-2222-4222-8222-222222222222"}'
		WHEN 11 THEN '{"x": 1, "externalId": "other tag"}' ELSE '{}' END::jsonb,
	n * 10, n, CASE WHEN n % 2 = 0 AND n % 5 <> 3 THEN n END, CASE WHEN n % 10 = 0 THEN n END, CASE WHEN n % 10 = 0 THEN 1 END,
	CASE n % 6 WHEN 1 THEN 0.000000000123456 * n WHEN 5 THEN -1.5 WHEN 3 THEN CASE n % 9 WHEN 0 THEN 0.0000000000000000000123 * n END END
FROM generate_series(1, 120) n;};

is($node->safe_psql('postgres', "SELECT * FROM aibilling.usage_daily('usage')"), '', 'an empty table has no sums');
is($node->safe_psql('postgres', "SELECT * FROM aibilling.spend('usage', 'nobody')"), '0|0|0|0', 'nobody has spent anything');

# ---------------------------------------------------------------------------
# On the way of a row
# ---------------------------------------------------------------------------

$node->safe_psql('postgres', 'SELECT aibilling.pause()');
is( $node->safe_psql('postgres', qq{
BEGIN;
$insert
SELECT sum(usage_rows) FROM aibilling.usage_daily('usage');
COMMIT;}),
	'120', 'what the transaction itself has inserted counts');
same('queued rows, priced and not');
is( $node->safe_psql('postgres', q{
BEGIN;
DELETE FROM usage WHERE id <= 20;
UPDATE usage SET input_tokens = 5000 WHERE id BETWEEN 21 AND 24;
SAVEPOINT s;
INSERT INTO usage (provider, model, external_customer_id, input_tokens) VALUES ('p', 'm0', 'c', 1);
ROLLBACK TO s;
SELECT sum(usage_rows), sum(input_tokens) = (SELECT sum(input_tokens) FROM usage) FROM aibilling.usage_daily('usage');
ROLLBACK;}),
	'100|t', 'what it has deleted or changed, as it is now');
is( $node->safe_psql('postgres', q{
SET aibilling_polar.enqueue = off;
INSERT INTO usage (provider, model, external_customer_id, input_tokens) VALUES ('p', 'm0', 'loaded', 1);
SELECT count(*) FROM aibilling.usage_daily('usage') WHERE external_customer_id = 'loaded';
DELETE FROM usage WHERE external_customer_id = 'loaded';}),
	'0', 'rows that are loaded without being sent do not count');

is( $node->safe_psql('postgres', q{
SELECT s.* FROM (SELECT DISTINCT external_customer_id AS c FROM usage WHERE customer_id IS NULL AND external_customer_id IS NOT NULL) u,
	LATERAL (SELECT sum(cost_cents) AS cents, count(*), count(*) FILTER (WHERE cost_nanos IS NULL) AS unpriced
		FROM usage r WHERE r.external_customer_id = u.c AND customer_id IS NULL AND r.occurred_at >= date_trunc('day', now(), 'UTC') - interval '9 days') r,
	aibilling.spend('usage', u.c, now() - interval '9 days') s
WHERE (s.cost_cents, s.usage_rows, s.pending_cents, s.unpriced) IS DISTINCT FROM (r.cents, r.count, r.cents, r.unpriced)}),
	'', 'spend() of queued rows: all of it is pending');

$polar->fault(kind => 'hang', store => JSON::PP::true, times => 1);
$node->safe_psql('postgres', 'SELECT aibilling.resume()');
$polar->wait(hung => 1);
is($node->safe_psql('postgres', "SELECT count(*) > 0 FROM aibilling.delivery WHERE state = 'sending'"), 't', 'rows are in flight');
same('rows in flight');
is( $node->safe_psql('postgres', q{
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT bool_and(s.pending_cents = r.cents), sum(r.n) > 0 FROM (VALUES ('customer 0'), ('customer 1'), ('customer 2'), ('by tag')) c (customer),
	aibilling.spend('usage', c.customer, '-infinity') s,
	LATERAL (SELECT coalesce(sum(u.cost_cents), 0) AS cents, count(*) AS n FROM usage u, aibilling.usage_status('usage', u.id) t
	 WHERE coalesce(u.external_customer_id, u.tags ->> 'userId') = c.customer AND u.customer_id IS NULL AND t.state <> 'delivered') r;
COMMIT;}),
	't|t', 'spend() of rows in flight: pending');
$polar->release;
$node->wait_settled;
$node->wait_folded();
same('delivered rows, in the rollup; others wait for a price or are rejected');
is($node->safe_psql('postgres', "SELECT count(*) > 20 FROM aibilling.rollup"), 't', 'the rollup has them');
is($node->safe_psql('postgres', 'SELECT count(*) > 0 FROM aibilling.outbox'), 't', 'something waits');
is( $node->safe_psql('postgres', q{
SELECT s.cost_cents = r.cents, s.usage_rows = r.count, s.pending_cents
FROM (SELECT sum(cost_cents) AS cents, count(*) FROM usage WHERE external_customer_id = 'customer 0' AND customer_id IS NULL) r,
	aibilling.spend('usage', 'customer 0', '-infinity') s}),
	't|t|0', 'spend() of delivered rows');
is( $node->safe_psql('postgres', q{
SELECT count(*) FROM aibilling.usage_daily('usage', current_date - 7, current_date - 3) WHERE day < current_date - 7 OR day > current_date - 3}),
	'0', 'both days belong to the range');
is( $node->safe_psql('postgres', q{
SET timezone = 'Asia/Tokyo';
SELECT (SELECT sum(cost_nanos) FROM aibilling.usage_daily('usage', '2000-01-01', (now() AT TIME ZONE 'UTC')::date - 2)) =
	(SELECT sum(cost_nanos) FROM usage WHERE (occurred_at AT TIME ZONE 'UTC')::date <= (now() AT TIME ZONE 'UTC')::date - 2)}),
	't', 'days are those of UTC in every session');

# By model and by customer, from their own levels of the rollup
my $by = q{
SELECT 'model', count(*) FROM (
	(SELECT day, provider, model, usage_rows, input_tokens, cost_cents, unpriced FROM aibilling.usage_by('usage', 'model', %1$s, %2$s)
	 EXCEPT ALL
	 SELECT day, provider, model, sum(usage_rows), sum(input_tokens), sum(cost_cents), sum(unpriced) FROM aibilling.usage_daily('usage', %1$s, %2$s) GROUP BY 1, 2, 3)) d
UNION ALL
SELECT 'customer', count(*) FROM (
	(SELECT external_customer_id, customer_id, usage_rows, cost_cents, unpriced FROM aibilling.usage_by('usage', 'customer', %1$s, %2$s)
	 EXCEPT ALL
	 SELECT external_customer_id, customer_id, sum(usage_rows), sum(cost_cents), sum(unpriced) FROM aibilling.usage_daily('usage', %1$s, %2$s) GROUP BY 1, 2)) d
UNION ALL
SELECT 'customers', count(DISTINCT (external_customer_id, customer_id)) - (SELECT count(*) FROM aibilling.usage_by('usage', 'customer', %1$s, %2$s))
	FROM aibilling.usage_daily('usage', %1$s, %2$s)};
$node->safe_psql('postgres', q{
INSERT INTO usage (occurred_at, provider, model, external_customer_id, input_tokens)
SELECT now() - n * interval '1 day', 'p', 'm' || n % 2, 'c' || n % 4, n FROM generate_series(1, 150) n;});
$node->wait_settled;
$node->wait_folded();
foreach my $range ([ 'NULL', 'NULL' ], [ 'current_date - 100', 'current_date - 3' ], [ 'current_date - 9', 'current_date' ],
	[ q{date_trunc('month', now() - interval '2 months')::date}, q{date_trunc('month', now())::date - 1} ],
	[ q{date_trunc('month', now() - interval '2 months')::date - 1}, q{date_trunc('month', now())::date} ],
	[ 'current_date - 40', 'NULL' ], [ 'NULL', 'current_date - 40' ], [ 'current_date', 'current_date - 1' ])
{
	is($node->safe_psql('postgres', sprintf($by, @$range)), "model|0\ncustomer|0\ncustomers|0", "usage_by(), days @$range");
	next if $range->[1] ne 'NULL' && $range->[1] !~ /^current_date$/;
	is($node->safe_psql('postgres', sprintf(q{
SELECT count(*), count(*) FILTER (WHERE (s.cost_cents, s.usage_rows) IS DISTINCT FROM (d.cost_cents, d.usage_rows)) FROM
	(SELECT external_customer_id, sum(cost_cents) AS cost_cents, sum(usage_rows) AS usage_rows
	 FROM aibilling.usage_daily('usage', %1$s) WHERE external_customer_id ~ '^c\d$' GROUP BY 1) d,
	LATERAL aibilling.spend('usage', d.external_customer_id, (%1$s)::date::timestamp AT TIME ZONE 'UTC') s}, $range->[0])),
		'4|0', "spend() since $range->[0]");
}

# A price comes; rows that are rejected are fixed.
$node->safe_psql('postgres', q{
UPDATE usage SET external_customer_id = 'fixed', model = 'm0' WHERE id IN (SELECT usage_id FROM aibilling.outbox WHERE state = 'rejected' OR error LIKE '%names no model%');
INSERT INTO aibilling.price (provider, model, input, output, cache_write, cache_write_1h, cache_read) VALUES ('p', 'no price', 3, 4, 1, 1, 1);});
$node->poll_query_until('postgres', "SELECT count(*) = 0 FROM aibilling.outbox WHERE state <> 'rejected'") or diag($node->diagnosis);
same('a price has come, rows are fixed and delivered');
$node->wait_folded();
same('and are in the rollup');

# Numbers of any size, and a row that has all its decimals
$node->safe_psql('postgres', q{
INSERT INTO usage (provider, model, external_customer_id, input_tokens, output_tokens, provider_cost)
SELECT repeat('p', 3000), repeat('m', 9000), 'big', 9223372036854775807, 9223372036854775807, 0.00000000000001 FROM generate_series(1, 3);
INSERT INTO usage (provider, model, external_customer_id, provider_cost) VALUES ('p', 'x', repeat('long', 60), 999.999999999999999);
INSERT INTO usage (provider, model, external_customer_id, provider_cost) VALUES ('p', 'x', repeat('too long', 60), 1), ('', '', '', 1);
INSERT INTO usage (occurred_at, provider, model, external_customer_id, provider_cost) VALUES ('1999-12-31 12:00+00', 'p', 'x', 'early', 1);});
$node->wait_settled;
same('numbers and names of any size, and a day before 2000');
$node->wait_folded();
same('and in the rollup');

# What other halves of a batch are refused, or lost
$polar->fault(kind => $_->[0], times => $_->[1]) foreach [ 'drop_after_store', 2 ], [ '413', 2 ], [ '503', 1 ], [ 'truncated', 1 ];
$polar->fault(kind => '422', index => [ 0, 2 ]);
$node->safe_psql('postgres', $insert);
foreach (1 .. 10)
{
	my $lines = difference('usage');

	is($lines, '', 'while batches are halved and rows are refused') if $lines ne '' || $_ == 10;
}
$node->wait_settled;
same('after that');
$node->safe_psql('postgres', "SELECT aibilling.retry('usage')");
$node->wait_settled;
$node->wait_folded();
same('and when they were tried again');

# A row that cannot be read ends a batch: the others are read again, one by one.
$node->create_server($polar, name => 'own', metadata_function => 'public.own_metadata', unpriced => 'send');
$node->create_usage_table('moody', 'own');
$node->safe_psql('postgres', q{
CREATE FUNCTION own_metadata(jsonb) RETURNS jsonb LANGUAGE sql AS $$SELECT '{"own": 1}'::jsonb$$;
CREATE TYPE mood AS ENUM ('glad', 'sad');
CREATE FUNCTION mood_json(mood) RETURNS json LANGUAGE plpgsql AS $$BEGIN
	IF $1 = 'sad' THEN RAISE 'sad'; END IF;
	RETURN to_json($1::text);
END$$;
CREATE CAST (mood AS json) WITH FUNCTION mood_json(mood);
ALTER TABLE moody ADD mood mood;
INSERT INTO moody (provider, model, external_customer_id, input_tokens, mood)
SELECT 'p', CASE n WHEN 4 THEN 'nobody knows' ELSE 'm0' END, 'customer ' || n, n, CASE n WHEN 3 THEN 'sad' ELSE 'glad' END::mood FROM generate_series(1, 5) n;});
$node->poll_query_until('postgres', "SELECT count(*) = 1 AND bool_and(state = 'rejected') FROM aibilling.outbox WHERE usage_table = 'moody'::regclass");
$node->poll_query_until('postgres', "SELECT sum(events) = 4 FROM aibilling.delivery WHERE usage_table = 'moody'::regclass AND state = 'delivered'");
same('what is sent beside a row that cannot be read, with a price and without one', 'moody');
$node->safe_psql('postgres', 'DROP TABLE moody');

# Options of the server say which tag is the customer.
$node->safe_psql('postgres', q{
DELETE FROM usage WHERE id IN (SELECT usage_id FROM aibilling.outbox);
ALTER SERVER polar OPTIONS (ADD external_customer_id_key 'account');
INSERT INTO usage (provider, model, tags, input_tokens) VALUES ('p', 'm0', '{"account": "by its key"}', 1), ('p', 'm0', '{"account": 17}', 2);});
same('the customer as it would be sent');
$node->wait_settled;
$node->wait_folded();
is($node->safe_psql('postgres', "SELECT usage_rows FROM aibilling.spend('usage', 'by its key') UNION ALL SELECT usage_rows FROM aibilling.spend('usage', '17')"),
	"1\n1", 'and was');
$node->safe_psql('postgres', 'ALTER SERVER polar OPTIONS (DROP external_customer_id_key)');

# ---------------------------------------------------------------------------
# INSERT pays nothing
# ---------------------------------------------------------------------------

is( $node->safe_psql('postgres', q{
SELECT aibilling.pause();
BEGIN;
INSERT INTO usage (provider, model, external_customer_id, input_tokens) SELECT 'p', 'm0', 'c', n FROM generate_series(1, 50) n;
SET CONSTRAINTS ALL IMMEDIATE;
COMMIT;
SELECT pg_stat_force_next_flush();
SELECT string_agg(relname, ' ' ORDER BY relname) FROM pg_stat_xact_all_tables WHERE relid::regclass::text ~ 'aibilling\.(share|rollup)' AND n_tup_ins + seq_scan > 0;
SELECT aibilling.resume();}) =~ s/^\s+|\s+$//gr,
	'', 'an INSERT touches neither shares nor rollup');

# ---------------------------------------------------------------------------
# Rows go, and come back
# ---------------------------------------------------------------------------

$node->wait_settled;
$node->safe_psql('postgres', q{
CREATE TABLE gone AS SELECT u.* FROM usage u, aibilling.usage_status('usage', u.id) s WHERE s.state = 'delivered' AND u.id % 3 = 0;
DELETE FROM usage WHERE id IN (SELECT id FROM gone);});
same('delivered rows that were deleted stay counted', 'usage', gone => 'gone');
$node->safe_psql('postgres', q{
SELECT aibilling.pause();
INSERT INTO usage SELECT * FROM gone WHERE id % 2 = 0;
DELETE FROM gone WHERE id % 2 = 0;});
is($node->safe_psql('postgres', "SELECT bool_and(outcome_unknown) FROM aibilling.outbox WHERE state = 'pending'"), 't', 'rows have come back');
same('they count once', 'usage', gone => 'gone');
is($node->safe_psql('postgres', q{BEGIN; INSERT INTO usage SELECT * FROM gone LIMIT 1; SELECT (SELECT sum(usage_rows) FROM aibilling.usage_daily('usage')) -
	(SELECT count(*) FROM usage) - (SELECT count(*) - 1 FROM gone); ROLLBACK}), '0', 'also within the transaction that brings them back');
$polar->fault(kind => 'hang', times => 1);
$node->safe_psql('postgres', 'SELECT aibilling.resume()');
$polar->wait(hung => 1);
same('in flight', 'usage', gone => 'gone');

# The worker is killed while they are.
my $pid = $node->worker_pid;
$node->safe_psql('postgres', "SELECT pg_terminate_backend($pid)");
$polar->release;
$node->wait_settled;
$node->wait_folded();
same('delivered again, after the worker was killed', 'usage', gone => 'gone');

# New rows under ids of before: the answer is lost, and then they are refused and go back to the outbox.
$polar->fault(kind => 'drop_before_read');
$polar->fault(kind => '422');
my $reused = $node->safe_psql('postgres', q{
INSERT INTO usage (id, provider, model, external_customer_id, input_tokens)
SELECT id, 'p', 'm1', 'reuses', 1000 FROM gone g WHERE NOT EXISTS (SELECT FROM usage u WHERE u.id = g.id) ORDER BY id LIMIT 1 RETURNING id;});
same('a new row with an id of before', 'usage', gone => 'gone');
$node->poll_query_until('postgres', "SELECT state = 'rejected' AND outcome_unknown FROM aibilling.outbox WHERE usage_id = $reused AND usage_table = 'usage'::regclass");
same('... whose answer was lost, and which was refused then', 'usage', gone => 'gone');
# It is sent together with rows that another delivery counts.
$node->safe_psql('postgres', q{
SELECT aibilling.pause();
CREATE TABLE back AS SELECT u.* FROM usage u, aibilling.usage_status('usage', u.id) s WHERE s.state = 'delivered'
	AND u.id IN ((SELECT min(id) FROM usage), (SELECT max(id) FROM usage WHERE cost_status = 'priced'));
BEGIN; DELETE FROM usage WHERE id IN (SELECT id FROM back); INSERT INTO usage SELECT * FROM back; COMMIT;
DROP TABLE back;
SELECT aibilling.retry('usage');
SELECT aibilling.resume();});
$node->wait_settled;
is($node->safe_psql('postgres', "SELECT events, inserted, duplicates FROM aibilling.delivery WHERE usage_table = 'usage'::regclass ORDER BY id DESC LIMIT 1"), '3|1|2', '... and delivered with rows that have come back');
$node->wait_folded();
same('... is counted, and they once', 'usage', gone => 'gone');

$node->safe_psql('postgres', q{
INSERT INTO gone SELECT u.* FROM usage u, aibilling.usage_status('usage', u.id) s WHERE s.state = 'delivered';
TRUNCATE usage RESTART IDENTITY;});
same('TRUNCATE: what was delivered stays counted', 'usage', gone => 'gone');
$node->safe_psql('postgres', q{INSERT INTO usage (provider, model, external_customer_id, input_tokens) SELECT 'p', 'm1', 'again', n FROM generate_series(1, 30) n});
same('ids of before are of other rows now', 'usage', gone => 'gone');
$node->wait_settled;
$node->wait_folded();
same('also when they are delivered', 'usage', gone => 'gone');

# Killed again and again, with no time between two steps that is safe
$node->safe_psql('postgres', 'ALTER SERVER polar OPTIONS (SET batch_size \'3\')');
foreach (1 .. 12)
{
	$node->safe_psql('postgres', q{
INSERT INTO usage (provider, model, external_customer_id, input_tokens) SELECT 'p', 'm' || n % 2, 'c' || n % 5, n FROM generate_series(1, 20) n;
SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'aibilling_polar worker' AND datname = 'postgres';});
	my $lines = difference('usage', gone => 'gone');
	is($lines, '', 'while the worker is killed') if $lines ne '' || $_ == 12;
}
$node->wait_settled;
$node->wait_folded();
same('at last', 'usage', gone => 'gone');
$node->safe_psql('postgres', 'ALTER SERVER polar OPTIONS (SET batch_size \'100\')');

# ---------------------------------------------------------------------------
# Partitions, other tables
# ---------------------------------------------------------------------------

$node->safe_psql('postgres', q{
CREATE TABLE parts (LIKE usage INCLUDING DEFAULTS, PRIMARY KEY (id, occurred_at)) PARTITION BY RANGE (occurred_at);
CREATE SEQUENCE parts_id; ALTER TABLE parts ALTER id SET DEFAULT nextval('parts_id');
CREATE TABLE parts_old PARTITION OF parts FOR VALUES FROM (MINVALUE) TO ('2020-01-01');
CREATE TABLE parts_new PARTITION OF parts FOR VALUES FROM ('2020-01-01') TO (MAXVALUE);
SELECT aibilling.attach('parts', 'polar');
INSERT INTO parts (occurred_at, provider, model, external_customer_id, input_tokens)
SELECT timestamptz '2019-12-30 12:00+00' + n * interval '6 hours', 'p', 'm0', 'c' || n % 2, n FROM generate_series(1, 20) n;});
same('a partitioned table', 'parts');
same('another table beside it', 'usage', gone => 'gone');
$node->wait_settled;
$node->safe_psql('postgres', 'CREATE TABLE parts_gone AS SELECT * FROM parts_old; DROP TABLE parts_old');
same('a partition dropped after its delivery stays counted', 'parts', gone => 'parts_gone');
$node->wait_folded();
same('and in the rollup', 'parts', gone => 'parts_gone');
$node->safe_psql('postgres', "SELECT aibilling.detach('parts')");
same('after detach()', 'parts', gone => 'parts_gone');
is($node->safe_psql('postgres', "DROP TABLE parts; SELECT count(*) FROM aibilling.rollup r LEFT JOIN pg_class c ON c.oid = r.usage_table WHERE c.oid IS NULL"),
	'0', 'DROP TABLE takes the sums along');

# ---------------------------------------------------------------------------
# Rights
# ---------------------------------------------------------------------------

$node->safe_psql('postgres', q{
CREATE ROLE reader LOGIN; CREATE ROLE stranger LOGIN; CREATE ROLE part LOGIN;
GRANT SELECT ON usage TO reader;
GRANT SELECT (id) ON usage TO part;});
my $user = $node->safe_psql('postgres', 'SELECT current_user');
foreach my $call ("aibilling.usage_daily('usage')", "aibilling.spend('usage', 'c1')", "aibilling.usage_by('usage', 'model', NULL, NULL)")
{
	is($node->safe_psql('postgres', "SET ROLE reader; SELECT count(*) > 0 FROM $call"), 't', "$call: who may SELECT the table");
	foreach my $role ('stranger', 'part')
	{
		like(($node->psql('postgres', "SET ROLE $role; SELECT count(*) FROM $call"))[2], qr/permission denied for table usage/, "$call: $role may not");
	}
	like(($node->psql('postgres', "ALTER TABLE usage ENABLE ROW LEVEL SECURITY; CREATE POLICY mine ON usage USING (external_customer_id = 'c1'); SET ROLE reader; SELECT count(*) FROM $call"))[2],
		qr/row-level security hides rows of table "usage" from you/, "$call: nor from whom policies hide rows");
	is($node->safe_psql('postgres', "SELECT count(*) > 0 FROM $call; DROP POLICY mine ON usage; ALTER TABLE usage DISABLE ROW LEVEL SECURITY"), 't', 'the superuser may');
	like(($node->psql('postgres', 'SELECT count(*) FROM ' . $call =~ s/'usage'/'pg_class'/r))[2], qr/table "pg_class" is not a usage table/, "$call: of what is none");
}
is(($node->psql('postgres', 'SET ROLE reader; SELECT * FROM aibilling.rollup'))[0], 3, 'the rollup itself is private');

# ---------------------------------------------------------------------------
# Dump and restore
# ---------------------------------------------------------------------------

$polar->fault(kind => 'hang', times => 1);
$node->safe_psql('postgres', q{INSERT INTO usage (provider, model, external_customer_id, input_tokens) SELECT 'p', 'm1', 'dumped', n FROM generate_series(1, 5) n});
$polar->wait(hung => 1);
my $dump = $node->basedir . '/dump';
my $sums = "SELECT * FROM aibilling.usage_daily('usage') ORDER BY 1, 2, 3, 4, 5, 6";
my $then = $node->safe_psql('postgres', $sums);
command_ok([ 'pg_dump', '-Fc', '-d', $node->connstr('postgres'), '-f', $dump ], 'pg_dump');
$polar->release;
$node->safe_psql('postgres', 'CREATE DATABASE restored');
command_ok([ 'pg_restore', '--exit-on-error', '-d', $node->connstr('restored'), $dump ], 'pg_restore');
is($node->safe_psql('restored', $sums), $then, 'the sums are those of the dump');
$node->safe_psql('restored', "SELECT aibilling.arm(); SELECT aibilling.resume()");
$node->poll_query_until('restored', "SELECT NOT EXISTS (SELECT FROM aibilling.outbox WHERE state = 'pending') AND NOT EXISTS (SELECT FROM aibilling.delivery WHERE state = 'sending')");
$node->wait_folded('restored');
is($node->safe_psql('restored', $sums), $then, 'and stay so');
$node->wait_settled;

# ---------------------------------------------------------------------------
# An update from 1.1, and a dump of it
# ---------------------------------------------------------------------------

$node->safe_psql('postgres', 'CREATE DATABASE older');
$node->safe_psql('older', q{
CREATE EXTENSION aibilling_polar VERSION '1.1';
CREATE SERVER polar FOREIGN DATA WRAPPER polar OPTIONS (url '} . $polar->url . q{', event_name 'llm_usage');
CREATE USER MAPPING FOR PUBLIC SERVER polar OPTIONS (access_token '} . $polar->token . q{');
INSERT INTO aibilling.price (provider, model, input, output) VALUES ('p', 'm0', 1.25, 10);
SELECT aibilling.create_usage_table('usage', server => 'polar');
INSERT INTO usage (occurred_at, provider, model, external_customer_id, input_tokens)
SELECT now() - n * interval '1 day', 'p', 'm0', 'c' || n % 3, n FROM generate_series(1, 400) n;
-- 300 were delivered, in batches of 3; 10 of them twice; 4 are in flight; the rest waits
INSERT INTO aibilling.delivery (server, usage_table, usage_ids, events, bytes, state, attempts, inserted, duplicates, started_at, finished_at)
SELECT 'polar', 'usage', int8multirange(int8range(n, n + 3)), 3, 100, 'delivered', 1, 3, 0, now(), now() FROM generate_series(1, 298, 3) n
UNION ALL SELECT 'polar', 'usage', int8multirange(int8range(291, 301)), 10, 100, 'delivered', 1, 10, 0, now(), now()
UNION ALL SELECT 'polar', 'usage', int8multirange(int8range(301, 305)), 4, 100, 'sending', 1, NULL, NULL, now(), NULL;
DELETE FROM aibilling.outbox_entry;
INSERT INTO aibilling.outbox_entry (usage_table, state, attempts, maybe_sent, not_before, first, last, ids)
SELECT 'usage', 'r', 0, false, '-infinity', n, n, NULL FROM generate_series(305, 400) n;});
command_ok([ 'pg_dump', '-Fc', '-d', $node->connstr('older'), '-f', "$dump.1.1" ], 'pg_dump of 1.1');
$polar->fault(kind => '503', times => 3);
$node->safe_psql('older', "BEGIN; ALTER EXTENSION aibilling_polar UPDATE; COMMIT");
same('right after an update from 1.1, from the rows', 'usage', db => 'older');
foreach (1 .. 5)
{
	my $lines = difference('usage', db => 'older');

	$node->safe_psql('older', "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'aibilling_polar worker' AND datname = 'older'");
	is($lines, '', 'while the rollup is being filled') if $lines ne '' || $_ == 5;
}
$node->safe_psql('older', 'SELECT aibilling.resume()');
$node->wait_folded('older');
same('when it is filled', 'usage', db => 'older');
$node->safe_psql('older', 'CREATE TABLE gone AS SELECT * FROM usage WHERE id < 100; DELETE FROM usage WHERE id < 100');
same('what is deleted from now on stays counted', 'usage', db => 'older', gone => 'gone');

$node->safe_psql('postgres', 'CREATE DATABASE old_dump');
$node->safe_psql('old_dump', 'CREATE EXTENSION aibilling_polar');
IPC::Run::run([ 'pg_restore', '-d', $node->connstr('old_dump'), "$dump.1.1" ], '2>', \my $err);
same('deliveries of a dump of 1.1, restored where 1.2 is, count', 'usage', db => 'old_dump', where => 'id < 305');

# ---------------------------------------------------------------------------
# In another encoding
# ---------------------------------------------------------------------------

$node->safe_psql('postgres', "CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0");
$node->safe_psql('latin', q{
CREATE EXTENSION aibilling_polar;
CREATE SERVER polar FOREIGN DATA WRAPPER polar OPTIONS (url '} . $polar->url . q{', event_name 'llm_usage', batch_size '7');
CREATE USER MAPPING FOR PUBLIC SERVER polar OPTIONS (access_token '} . $polar->token . q{');
SELECT aibilling.create_usage_table('usage', server => 'polar');
SELECT aibilling.pause('polar');
INSERT INTO usage (provider, model, event_name, external_customer_id, provider_cost)
SELECT U&'caf\00e9', U&'m\00fcller', CASE WHEN n % 5 = 0 THEN U&'\00e0 la carte' END,
	CASE n % 4 WHEN 0 THEN U&'caf\00e9' WHEN 1 THEN U&'caf\00e8 ' || n % 3 WHEN 2 THEN 'caf' ELSE U&'n\00f8body' END, n
FROM generate_series(1, 40) n;});
same('customers, models and names that are not ASCII, queued', 'usage', db => 'latin');
$node->safe_psql('latin', "SELECT aibilling.resume('polar')");
$node->wait_folded('latin');
same('... and in the rollup', 'usage', db => 'latin');
is($node->safe_psql('latin', q{SELECT sum(usage_rows) FROM aibilling.usage_daily('usage') WHERE external_customer_id = U&'caf\00e9' AND model = U&'m\00fcller'}),
	'10', 'they are found by their names');
is($node->safe_psql('latin', q{SELECT usage_rows, cost_cents FROM aibilling.spend('usage', U&'caf\00e9')}), '10|22000', 'spend() of one of them');

# ---------------------------------------------------------------------------
# Without a worker
# ---------------------------------------------------------------------------

my $alone = AibillingNode->new('alone', preload => 0);
$alone->create_server($polar, batch_size => 5, requests_per_minute => 0);
$alone->create_usage_table;
$alone->insert_rows(700, prefix => 'alone_');
$alone->safe_psql('postgres', 'CALL aibilling.sync()');
is($alone->safe_psql('postgres', "SELECT count(*), (SELECT sum(usage_rows) FROM aibilling.usage_daily('usage')) FROM aibilling.share"), '0|700',
	'sync() adds up what it has delivered');

# A batch of many customers goes into the rollup in pieces; here the second one fails.
$alone->safe_psql('postgres', q{
CREATE FUNCTION one_piece() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN
	IF EXISTS (SELECT FROM aibilling.rollup_daily WHERE external_customer_id LIKE 'own %') THEN
		RAISE EXCEPTION 'that is enough';
	END IF;
	RETURN NULL;
END$$;
CREATE TRIGGER one_piece BEFORE INSERT ON aibilling.rollup EXECUTE FUNCTION one_piece();
ALTER SERVER polar OPTIONS (SET batch_size '1000');
INSERT INTO usage (provider, model, external_customer_id, provider_cost) SELECT 'p', 'm', 'own ' || n, n * 0.001 FROM generate_series(1, 1000) n;
CALL aibilling.sync();});
is($alone->safe_psql('postgres', "SELECT count(*), min(folded_rows) BETWEEN 1 AND 999 FROM aibilling.share"), '1|t',
	'a part of a large batch is in the rollup');
same('... and none of it is counted twice, nor left out', 'usage', node => $alone);
$alone->safe_psql('postgres', 'DROP TRIGGER one_piece ON aibilling.rollup; CALL aibilling.sync()');
is($alone->safe_psql('postgres', "SELECT count(*) FROM aibilling.share"), '0', '... then all of it');
same('... which changes no sum', 'usage', node => $alone);
$alone->stop;

$node->stop;
done_testing();
