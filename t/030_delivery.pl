# What is committed is delivered, whatever way it came in; what is rolled back
# or not ours to send is not.
use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use AibillingNode;
use File::Basename qw(dirname);
use File::Spec;
use PolarServer;
use PostgreSQL::Test::Utils;
use Test::More;

plan skip_all => 'needs python3' unless PolarServer->python;

# A poll this rare never happens here: only wake-ups make the worker look.
my $polar = PolarServer->new;
my $node = AibillingNode->new('main',
	conf => "max_prepared_transactions = 5\naibilling_polar.poll_interval = 86400\n");

$node->create_server($polar, batch_size => 100);
$node->create_usage_table;

# What has been stored under this prefix of external_id, sorted.
my $last_seq = 0;
my @stored;

sub stored
{
	my ($prefix) = @_;

	push @stored, $polar->events(since => $last_seq);
	$last_seq = $stored[-1]{seq} if @stored;
	return join ' ', sort grep { /^\Q$prefix\E/ } map { $_->{external_id} } @stored;
}

# A row delivered after all those of interest: had they been sent, they would
# have been sent with it or before it.
my $markers = 0;

sub delivered_marker
{
	my $marker = 'marker_' . ++$markers;

	$node->insert_rows(1, prefix => $marker . '_');
	$polar->wait_for(sub { stored($marker) }, $marker);
	$node->wait_settled;
	return;
}

# Wake-up at commit, and the sums.

$node->worker_waits;
$node->insert_rows(1000);
$polar->wait(events => 1000);
pass('a commit wakes the worker');
$node->wait_settled;
$node->sums_equal($polar, 'usage table and Polar agree to the last digit');
is( $node->ledger("sum(events) || ' ' || sum(inserted) || ' ' || sum(duplicates) || ' ' || count(*)",
		"state = 'delivered'"),
	'1000 1000 0 10',
	'the ledger, too');
is($node->ledger('count(*)', "state <> 'delivered'"), '0', 'no other delivery');
is( $node->safe_psql(
		'postgres', q{SELECT state, attempts, error IS NULL, sent_at IS NOT NULL, delivery_id IS NOT NULL
			FROM aibilling.usage_status('usage', 1)}),
	'delivered|1|t|t|t',
	'usage_status of a delivered row');
is( $node->safe_psql(
		'postgres',
		'SELECT pending, in_flight, delivered, duplicates, unexpected_duplicates, vanished, oldest IS NULL FROM aibilling.status'
	),
	'0|0|1000|0|0|0|t',
	'status of a table that is delivered');

# A check that cannot fail proves nothing.
{
	$node->safe_psql('postgres', 'CREATE TABLE tampered AS SELECT * FROM usage');
	$node->safe_psql('postgres',
		'UPDATE tampered SET cost_nanos = cost_nanos + 1 WHERE external_id = \'row_500\'');
	my $failed = 0;
	no warnings 'redefine';
	local *AibillingNode::is = sub { $failed = $_[0] ne $_[1]; return 1; };
	$node->sums_equal($polar, 'tampered', 'tampered');
	ok($failed, 'one nano of difference is noticed');
}

# Transactions.

$node->worker_waits;
$node->safe_psql('postgres', 'BEGIN; ' . $node->rows_sql(10, prefix => 'rolled_back_') . '; ROLLBACK');
$node->safe_psql(
	'postgres', 'BEGIN; '
	  . $node->rows_sql(1, prefix => 'savepoint_a_') . '; SAVEPOINT a; '
	  . $node->rows_sql(1, prefix => 'savepoint_b_') . '; SAVEPOINT b; '
	  . $node->rows_sql(1, prefix => 'savepoint_c_') . '; RELEASE b; ROLLBACK TO a; '
	  . $node->rows_sql(1, prefix => 'savepoint_d_') . '; SAVEPOINT e; '
	  . $node->rows_sql(1, prefix => 'savepoint_e_') . '; RELEASE e; COMMIT');
delivered_marker();
is(stored('rolled_back_'), '', 'a rolled-back INSERT is not sent');
is(stored('savepoint_'), 'savepoint_a_1 savepoint_d_1 savepoint_e_1',
	'nor one in a savepoint that is rolled back');

# An exception block is a savepoint, too; a failed statement leaves nothing.
$node->safe_psql(
	'postgres', q{DO $$BEGIN
	INSERT INTO usage (external_id, external_customer_id, provider_cost) VALUES ('block_1', 'c', 1);
	BEGIN
		INSERT INTO usage (external_id, external_customer_id, provider_cost) VALUES ('block_2', 'c', 1);
		RAISE division_by_zero;
	EXCEPTION WHEN division_by_zero THEN
		INSERT INTO usage (external_id, external_customer_id, provider_cost) VALUES ('block_3', 'c', 1);
	END;
	INSERT INTO usage (external_id, external_customer_id, provider_cost) VALUES ('block_1', 'c', 1)
		ON CONFLICT (external_id) DO NOTHING;
END$$});
$node->psql('postgres', q{INSERT INTO usage (external_id, external_customer_id, provider_cost)
	VALUES ('fails_1', 'c', 1), ('fails_1', 'c', 1)});
delivered_marker();
is(stored('block_'), 'block_1 block_3', 'exception block, ON CONFLICT DO NOTHING');
is(stored('fails_'), '', 'a failed statement');

# A row inserted and deleted, or updated, in one transaction.
$node->safe_psql(
	'postgres', q{BEGIN;
INSERT INTO usage (external_id, external_customer_id, provider_cost) VALUES ('same_1', 'c', 1), ('same_2', 'c', 1);
DELETE FROM usage WHERE external_id = 'same_1';
UPDATE usage SET external_customer_id = 'changed' WHERE external_id = 'same_2';
COMMIT});
delivered_marker();
is(stored('same_'), 'same_2', 'deleted in its own transaction');
is((grep { $_->{external_id} eq 'same_2' } @stored)[0]{customer},
	'changed', 'updated in its own transaction');

# COPY.

$node->worker_waits;
$node->safe_psql('postgres',
	"COPY usage (external_id, external_customer_id, provider_cost) FROM stdin;\n"
	  . join('', map { sprintf "copy_%03d\tcustomer_%d\t%d\n", $_, $_ % 3, $_ } 1 .. 300)
	  . "\\.\n");
$polar->wait_for(sub { stored('copy_') eq join ' ', map { sprintf 'copy_%03d', $_ } 1 .. 300 },
	'COPY');
pass('COPY');
$node->psql('postgres',
	"COPY usage (external_id, external_customer_id, provider_cost) FROM stdin;\n"
	  . "badcopy_1\tc\t1\nbadcopy_2\tc\tno number\n\\.\n");
delivered_marker();
is(stored('badcopy_'), '', 'a COPY that fails');

# Prepared transactions are delivered when they commit: a commit of somebody
# else wakes the worker here.

$node->safe_psql('postgres',
	"BEGIN; " . $node->rows_sql(3, prefix => 'prepared_') . "; PREPARE TRANSACTION 'good'");
$node->safe_psql('postgres',
	"BEGIN; " . $node->rows_sql(3, prefix => 'discarded_') . "; PREPARE TRANSACTION 'bad'");
delivered_marker();
is(stored('prepared_'), '', 'a prepared transaction is not sent');
$node->restart;
$node->worker_waits;
delivered_marker();
is(stored('prepared_'), '', 'nor after a restart');
$node->safe_psql('postgres', "COMMIT PREPARED 'good'");
$node->safe_psql('postgres', "ROLLBACK PREPARED 'bad'");
delivered_marker();
$polar->wait_for(sub { stored('prepared_') eq 'prepared_1 prepared_2 prepared_3' }, 'prepared');
pass('a prepared transaction is delivered once it commits');
is(stored('discarded_'), '', 'and not when it is rolled back');

# A lower id that commits after a higher one.

my $late = $node->background_psql('postgres');
$late->query_safe('BEGIN; ' . $node->rows_sql(5, prefix => 'late_') . ';');
delivered_marker();
$node->insert_rows(3000, prefix => 'between_');
$polar->wait_for(sub { my @e = split / /, stored('between_'); @e == 3000 }, 'higher ids');
$node->worker_waits;
is(stored('late_'), '', 'lower ids are not committed yet');
$late->query_safe('COMMIT;');
$polar->wait_for(sub { stored('late_') eq 'late_1 late_2 late_3 late_4 late_5' }, 'lower ids');
pass('lower ids that commit late are delivered');
$late->quit;
ok( $node->safe_psql(
		'postgres', q{SELECT (SELECT max(id) FROM usage WHERE external_id LIKE 'late%')
			< (SELECT min(id) FROM usage WHERE external_id LIKE 'between%')}) eq 't',
	'they were lower');

# What is not ours to send.

$node->safe_psql('postgres',
	'SET session_replication_role = replica; ' . $node->rows_sql(5, prefix => 'replica_'));
$node->safe_psql('postgres',
	'SET aibilling_polar.enqueue = off; ' . $node->rows_sql(5, prefix => 'history_'));
delivered_marker();
is(stored('replica_') . stored('history_'), '', 'a subscriber\'s copy and history are not sent');
is( $node->safe_psql(
		'postgres', q{SELECT DISTINCT (aibilling.usage_status('usage', id)).state, cost_nanos > 0 FROM usage
			WHERE external_id LIKE 'history_%'}),
	'not_sent|t',
	'history is priced and known as not sent');
$node->safe_psql('postgres',
	q{UPDATE usage SET tags = '{"note": "late"}' WHERE external_id LIKE 'replica\_%' OR external_id LIKE 'history\_%'});
delivered_marker();
is(stored('replica_') . stored('history_'), '', 'nor after an UPDATE');

$node->safe_psql(
	'postgres', q{CREATE ROLE app LOGIN; GRANT INSERT, SELECT ON usage TO app;
GRANT USAGE ON SEQUENCE usage_id_seq TO app});
$node->safe_psql('postgres',
	'SET SESSION AUTHORIZATION app; SET aibilling_polar.enqueue = off; SET client_min_messages = error; '
	  . $node->rows_sql(2, prefix => 'evasion_'));
delivered_marker();
is(stored('evasion_'), 'evasion_1 evasion_2', 'a role that does not own the table cannot keep rows from being sent');

# Partitions.

$node->safe_psql(
	'postgres', q{
CREATE TABLE parts (LIKE usage INCLUDING DEFAULTS, PRIMARY KEY (id, occurred_at), UNIQUE (external_id, occurred_at))
	PARTITION BY RANGE (occurred_at);
CREATE SEQUENCE parts_id_seq OWNED BY parts.id;
ALTER TABLE parts ALTER id SET DEFAULT nextval('parts_id_seq');
CREATE TABLE part_a PARTITION OF parts FOR VALUES FROM ('2026-01-01') TO ('2026-02-01');
CREATE TABLE part_b PARTITION OF parts FOR VALUES FROM ('2026-02-01') TO ('2026-03-01') PARTITION BY RANGE (occurred_at);
CREATE TABLE part_b1 PARTITION OF part_b FOR VALUES FROM ('2026-02-01') TO ('2026-02-10');
CREATE TABLE part_b2 PARTITION OF part_b DEFAULT;
SELECT aibilling.attach('parts', 'polar');
CREATE TABLE part_c PARTITION OF parts FOR VALUES FROM ('2026-03-01') TO ('2026-04-01');
CREATE TABLE part_d (LIKE parts INCLUDING ALL);
ALTER TABLE parts ATTACH PARTITION part_d FOR VALUES FROM ('2026-04-01') TO ('2026-05-01');
});
$node->worker_waits;
my $columns = '(external_id, occurred_at, provider, model, external_customer_id, provider_cost)';
$node->safe_psql(
	'postgres', qq{
BEGIN;
INSERT INTO parts $columns VALUES ('part_root', '2026-01-05', 'x', 'y', 'c', 0.01);
INSERT INTO part_a $columns VALUES ('part_leaf', '2026-01-06', 'x', 'y', 'c', 0.02);
INSERT INTO part_b $columns VALUES ('part_sub', '2026-02-05', 'openai', 'y', 'c', 0.03);
INSERT INTO part_b2 $columns VALUES ('part_subleaf', '2026-02-16', 'other', 'y', 'c', 0.04);
INSERT INTO part_c $columns VALUES ('part_later', '2026-03-06', 'other', 'y', 'c', 0.05);
INSERT INTO part_d $columns VALUES ('part_joined', '2026-04-06', 'other', 'y', 'c', 0.06);
SAVEPOINT s;
INSERT INTO part_a $columns VALUES ('part_rolled_back', '2026-01-06', 'x', 'y', 'c', 0.02);
ROLLBACK TO s;
COMMIT;
COPY part_a $columns FROM stdin;
part_copied\t2026-01-09\tx\ty\tc\t0.07
\\.
});
my $parts = 'part_copied part_joined part_later part_leaf part_root part_sub part_subleaf';
$polar->wait_for(sub { stored('part_') eq $parts }, 'partitions');
pass('rows inserted into partitions are delivered');
$node->wait_settled;
like(($node->psql('postgres', "UPDATE parts SET occurred_at = '2026-03-20' WHERE external_id = 'part_leaf'"))[2],
	qr/ERROR:  cannot update usage row \d+ of "part_a": it has been delivered/, 'a delivered row cannot be moved: its time was billed');

# A pending row that moves is sent once, with its new time.
$node->safe_psql('postgres', 'SELECT aibilling.pause()');
$node->safe_psql('postgres',
	"INSERT INTO parts $columns VALUES ('moving', '2026-01-15', 'x', 'y', 'c', 0.01)");
$node->safe_psql('postgres',
	"UPDATE parts SET occurred_at = '2026-03-15' WHERE external_id = 'moving'");
$node->safe_psql('postgres', 'SELECT aibilling.resume()');
$polar->wait_for(sub { stored('moving') }, 'moved row');
$node->wait_settled;
is(join(' ', map { $_->{event}{timestamp} } grep { $_->{external_id} eq 'moving' } @stored),
	'2026-03-15T00:00:00.000000Z', 'a pending row that moves to another partition is sent once');
is($node->ledger('sum(duplicates)'), '0', 'and never twice');

# Several tables and servers.

my $second = PolarServer->new(token => 'second_token');
$node->create_server($second, name => 'second', event_name => '{provider}_{model}');
$node->create_usage_table('usage2', 'polar');
$node->safe_psql('postgres', 'CREATE SCHEMA "Odd.Schema"');
$node->create_usage_table('"Odd.Schema"."odd ""table"""', 'second');
$node->worker_waits;
$node->safe_psql(
	'postgres', 'BEGIN; '
	  . $node->rows_sql(250, prefix => 'two_', table => 'usage2') . '; '
	  . $node->rows_sql(250, prefix => 'odd_', table => '"Odd.Schema"."odd ""table"""') . '; '
	  . $node->rows_sql(250, prefix => 'one_') . '; COMMIT');
$second->wait(events => 250);
$node->wait_settled;
$node->sums_equal($second, 'a second server has what is its own', '"Odd.Schema"."odd ""table"""');
$node->sums_equal(
	$polar,
	'the first has the rest',
	"(SELECT * FROM usage WHERE external_id !~ '^(replica|history)') u",
	'usage2', 'parts');
is((sort map { $_->{event}{name} } $second->events)[0], 'openai_gpt-0', 'event_name as a template');
is($second->summary->{duplicates}, 0, 'nothing was sent twice');
is($polar->summary->{duplicates}, 0, 'to either server');

# A server that is down does not keep the others waiting.
$second->stop;
$node->safe_psql(
	'postgres', 'BEGIN; '
	  . $node->rows_sql(5, prefix => 'down_', table => '"Odd.Schema"."odd ""table"""') . '; '
	  . $node->rows_sql(5, prefix => 'up_') . '; COMMIT');
$polar->wait_for(sub { stored('up_') eq 'up_1 up_2 up_3 up_4 up_5' }, 'the other server');
pass('a server that is down does not hold up another');
ok($node->wait_status('^waiting until .* failures', '"Odd.Schema"."odd ""table"""'),
	'its status says why it waits');

$second->start;
$node->safe_psql('postgres', 'SELECT aibilling.resume()');
$node->wait_settled;
is($second->summary->{stored}, 5, 'when it is back, it gets what is its own');
$node->safe_psql('postgres', "SELECT aibilling.detach('\"Odd.Schema\".\"odd \"\"table\"\"\"')");

# sync() delivers as the worker does, and says so.
$node->safe_psql('postgres', $node->rows_sql(20, prefix => 'sync_') . '; CALL aibilling.sync()');
is(scalar(() = stored('sync_') =~ /\S+/g), 20, 'sync() returns when all is delivered');

# The demo's data: a month of all kinds of usage.
my $demo = PolarServer->new;
my $csv = slurp_file(File::Spec->rel2abs(dirname(__FILE__)) . '/../dev/demo-usage.csv');
my ($header) = $csv =~ /^seconds_ago,(.*)\n/;
$node->create_server($demo, name => 'demo');
$node->create_usage_table('demo', 'demo');
$node->safe_psql(
	'postgres', qq{SELECT aibilling.load_bundled_prices();
CREATE TABLE sample AS SELECT 0::bigint AS seconds_ago, $header FROM demo;
COPY sample FROM stdin (FORMAT csv, HEADER);
$csv\\.
INSERT INTO demo (occurred_at, $header)
	SELECT now() - seconds_ago * interval '1 second', $header FROM sample;});
$node->safe_psql('postgres', q{CALL aibilling.sync('demo')});
my $undelivered = q{SELECT usage_id FROM aibilling.outbox WHERE usage_table = 'demo'::regclass};
$node->sums_equal($demo, "the demo's data: Polar agrees to the last digit",
	"(SELECT * FROM demo WHERE id NOT IN ($undelivered)) d");
cmp_ok($demo->summary->{inserted}, '>', 1000, 'of more than a thousand rows');
is( $node->safe_psql(
		'postgres', q{SELECT count(*) FROM aibilling.outbox
			WHERE usage_table = 'demo'::regclass AND state NOT IN ('unpriced', 'rejected')}),
	'0',
	'all but those without price or identity');

$node->stop;
$polar->stop;
$demo->stop;
done_testing();
