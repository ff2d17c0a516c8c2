# Every DDL that touches what the extension relies on, while a request is in flight.
use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use JSON::PP;
use Lifecycle;
use PolarServer;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

plan skip_all => 'needs python3' unless PolarServer->python;

my $polar = PolarServer->new;
my $node = new_node('ddl', 'app');
$node->start;
$node->safe_psql('postgres', 'CREATE DATABASE app');
set_up($node, 'app', $polar, "batch_size '2', max_in_flight '1'");
$node->poll_query_until('app', 'SELECT worker_pid IS NOT NULL FROM aibilling.status') or die 'no worker';

# Run SQL while two rows of the table hang in a request and three wait, and check its WARNING.
sub while_hanging
{
	my ($table, $name, $sql, $warning) = @_;

	$polar->fault(kind => 'hang', store => JSON::PP::true, times => 'always');
	$node->safe_psql('app', insert($name, 5, $table));
	$polar->wait(hung => 1);
	my ($status, undef, $stderr) = $node->psql('app', $sql, on_error_stop => 1);
	is($status, 0, "$name: done while a request hangs") or diag($stderr);
	like($stderr, $warning, "$name: warns") if defined $warning;
	unlike($stderr, qr/WARNING/, "$name: no warning") if !defined $warning;
	$polar->clear_faults;
	$polar->release;
	return;
}

sub ledger_of
{
	my ($condition) = @_;
	return value($node, 'app',
		"SELECT state, sum(events), sum(coalesce(inserted, 0)), sum(vanished) FROM aibilling.delivery WHERE $condition GROUP BY state ORDER BY state");
}

my $pid = value($node, 'app', 'SELECT worker_pid FROM aibilling.status');

# What is renamed is still the same table.
while_hanging('usage', 'renamed', <<SQL);
ALTER TABLE usage RENAME TO calls;
CREATE SCHEMA billing;
ALTER TABLE calls SET SCHEMA billing;
ALTER SCHEMA billing RENAME TO invoices;
SQL
wait_delivered($node, 'app', 'a renamed table in a renamed schema is delivered');
is(ledger_of("usage_table = 'invoices.calls'::regclass"), 'delivered|5|5|0', 'as one table');
$node->safe_psql('app', 'ALTER TABLE invoices.calls SET SCHEMA public; ALTER TABLE calls RENAME TO usage');

# A server is not dropped under its tables.
foreach my $how ('', ' CASCADE')
{
	my ($status, undef, $stderr) = $node->psql('app', "DROP SERVER polar$how");

	isnt($status, 0, "DROP SERVER$how is refused");
	like($stderr, $how eq ''
		? qr/cannot drop server polar because other objects depend on it|usage table public\.usage is attached to it/
		: qr/cannot drop server "polar": usage table public\.usage is attached to it/, 'and says why');
}
$node->safe_psql('app', insert('served', 1));
wait_delivered($node, 'app', 'the server is still there');

# Detach
while_hanging('usage', 'detach', 'SELECT 1');
wait_delivered($node, 'app', 'everything is delivered before it is detached');
$polar->fault(kind => 'hang', store => JSON::PP::true, times => 'always');
$node->safe_psql('app', insert('flying', 3));
$polar->wait(hung => 1);
foreach my $pending ('refuse', 'discard')
{
	my ($status, undef, $stderr) = $node->psql('app', "SELECT aibilling.detach('usage', '$pending')");
	like($stderr, qr/cannot detach table public\.usage: rows of it are being sent/, "detach '$pending' refuses while rows are in flight");
}
$polar->clear_faults;
$polar->release;
wait_delivered($node, 'app', 'they arrive');
$node->safe_psql('app', 'SELECT aibilling.pause()');
$node->safe_psql('app', insert('waiting', 3));
my ($ret, undef, $stderr) = $node->psql('app', "SELECT aibilling.detach('usage')");
like($stderr, qr/cannot detach table public\.usage: 3 rows of it are not delivered/, "detach 'refuse' refuses while rows wait");
is(value($node, 'app', 'SELECT count(*) FROM aibilling.outbox'), '3', 'and leaves them');
($ret, undef, $stderr) = $node->psql('app', "SELECT aibilling.detach('usage', 'anything')");
like($stderr, qr/invalid value for parameter "pending"/, 'there is no third way');
$node->safe_psql('app', "SELECT aibilling.detach('usage', 'discard')");
is(value($node, 'app', 'SELECT count(*) FROM aibilling.outbox'), '0', "detach 'discard' drops them");
is(value($node, 'app', "SELECT count(*) FROM pg_trigger WHERE tgrelid = 'usage'::regclass"), '0', 'and the triggers');
$node->safe_psql('app', insert('ordinary', 1));
is(value($node, 'app', "SELECT cost_nanos IS NULL FROM usage WHERE external_id = 'ordinary-1'"), 't', 'the table is an ordinary one');

# Attach again: what was delivered is known, what was discarded can be sent.
$node->safe_psql('app', "SELECT aibilling.attach('usage', 'polar', existing => 'send'); SELECT aibilling.resume()");
wait_delivered($node, 'app', "attach 'send' delivers");
is(scalar(grep { stored($polar)->{$_} } map { "waiting-$_" } 1 .. 3), 3, 'what was discarded');
is(value($node, 'app', 'SELECT sum(duplicates) FROM aibilling.delivery'), '0', 'and only what was not sent before');
is( value($node, 'app', "SELECT cost_nanos, cost_status, (aibilling.usage_status('usage', id)).state FROM usage WHERE external_id = 'ordinary-1'"),
	'10000000|reported|delivered', 'priced, where it was not');

# A row that was refused for another reason before its price came.
$node->psql('app', "INSERT INTO usage (external_id, tags, provider, model, input_tokens)"
	  . " VALUES ('late', '{\"account\": \"customer\"}', 'nobody', 'nothing', 1)");
is(places($node, 'app'), 'rejected 1', 'a row without customer and price is rejected');
$node->safe_psql('app', "INSERT INTO aibilling.price (provider, model, input) VALUES ('nobody', 'nothing', 1)");
wait_for_turn($node, 'app');
$node->safe_psql('app', "ALTER SERVER polar OPTIONS (ADD external_customer_id_key 'account')");
is(value($node, 'app', "SELECT aibilling.retry('usage')"), '1', 'and tried again');
ok($node->poll_query_until('app', "SELECT (aibilling.usage_status('usage', max(id))).state = 'delivered' FROM usage"),
	'it is priced and delivered then');

# Rewriting and reindexing
$polar->fault(kind => 'slow', delay => 20, times => 'always');
$node->safe_psql('app', insert('rewritten', 60));
foreach my $sql (
	'VACUUM FULL usage', 'VACUUM FULL aibilling.outbox_entry', 'REINDEX TABLE aibilling.outbox_entry',
	'VACUUM FULL aibilling.delivery', 'REINDEX TABLE usage', 'REINDEX TABLE CONCURRENTLY usage',
	'REINDEX TABLE CONCURRENTLY aibilling.delivery', 'CLUSTER usage USING usage_pkey',
	'VACUUM FULL aibilling.outbox_entry', 'REINDEX INDEX CONCURRENTLY aibilling.outbox_entry_key',
	'VACUUM (FREEZE) aibilling.outbox_entry', 'ALTER TABLE usage ADD COLUMN mine text',
	'ALTER TABLE usage DROP COLUMN mine', 'ANALYZE')
{
	my ($status, undef, $err) = $node->psql('app', $sql);
	is($status, 0, "$sql during delivery") or diag($err);
}
cmp_ok(value($node, 'app', "SELECT count(*) FROM aibilling.delivery WHERE state = 'delivered' AND finished_at > clock_timestamp() - interval '1 minute'"),
	'>', 0, 'delivery went on meanwhile');
wait_delivered($node, 'app', 'everything is delivered all the same');
$polar->clear_faults;
is(scalar(grep { (stored($polar)->{"rewritten-$_"} // 0) != 1 } 1 .. 60), 0, 'each row once');
is(value($node, 'app', 'SELECT sum(duplicates), sum(vanished) FROM aibilling.delivery'), '0|0', 'none was sent again, none missed');

# TRUNCATE: not while rows are in flight, whose answer would then be of other rows.
$polar->fault(kind => 'hang', store => JSON::PP::true, times => 'always');
$node->safe_psql('app', insert('truncated', 5));
$polar->wait(hung => 1);
like(($node->psql('app', 'TRUNCATE usage'))[2], qr/ERROR:  cannot truncate "usage": rows of it are being sent/, 'TRUNCATE waits for its turn');
$polar->clear_faults;
$polar->release;
wait_delivered($node, 'app', 'after the refused TRUNCATE');
$node->safe_psql('app', "SELECT aibilling.pause();\n" . insert('given_up', 3));
like(($node->psql('app', 'TRUNCATE usage'))[2], qr/WARNING:  truncating "usage" drops 3 usage rows that were not delivered/, 'TRUNCATE warns');
$node->safe_psql('app', 'SELECT aibilling.resume()');
wait_delivered($node, 'app', 'after TRUNCATE nothing is left');
is(stored($polar)->{'truncated-5'}, 1, 'what was in flight arrives');
is(stored($polar)->{'given_up-1'}, undef, 'what waited does not');

# The answer is lost, and the rows are gone when they are to be sent again.
$polar->fault(kind => 'hang', store => JSON::PP::true);
$node->safe_psql('app', insert('lost', 2));
$polar->wait(hung => 1);
$node->safe_psql('app', 'SET session_replication_role = replica; TRUNCATE usage');
$polar->restart;
$polar->wait_for(sub { value($node, 'app', "SELECT count(*) FROM aibilling.delivery WHERE state = 'sending'") eq '0' }, 'the delivery to be settled');
is( value($node, 'app', 'SELECT state, vanished, error IS NOT NULL FROM aibilling.delivery ORDER BY id DESC LIMIT 1'),
	'failed|2|t', 'rows that are gone with their answer are counted as vanished');
is(value($node, 'app', 'SELECT vanished FROM aibilling.status'), '2', 'status counts them');

# DROP TABLE
while_hanging('usage', 'dropped', 'DROP TABLE usage', qr/WARNING:  dropping a usage table drops 3 rows that were not delivered/);
$polar->wait_for(sub { value($node, 'app', "SELECT count(*) FROM aibilling.delivery WHERE state = 'sending'") eq '0' }, 'the last request to be settled');
is(value($node, 'app', 'SELECT count(*) FROM aibilling.outbox_entry'), '0', 'the outbox forgets a dropped table');
is(value($node, 'app', 'SELECT count(*) FROM aibilling.usage_table'), '0', 'it is no longer attached');
is( value($node, 'app', 'SELECT state, events, inserted FROM aibilling.delivery ORDER BY id DESC LIMIT 1'),
	'delivered|2|2', 'the ledger tells what became of those in flight');
cmp_ok(value($node, 'app', 'SELECT count(*) FROM aibilling.delivery'), '>', 10, 'the ledger stays');

# Partitions
$node->safe_psql('app', <<'SQL');
SELECT aibilling.create_usage_table('model_table', server => 'polar');
CREATE SEQUENCE parts_id;
CREATE TABLE parts (LIKE model_table INCLUDING DEFAULTS INCLUDING CONSTRAINTS, region text NOT NULL DEFAULT 'a')
	PARTITION BY LIST (region);
ALTER TABLE parts ALTER id SET DEFAULT nextval('parts_id'), ADD PRIMARY KEY (id, region);
CREATE TABLE part_a PARTITION OF parts FOR VALUES IN ('a');
CREATE TABLE part_b PARTITION OF parts FOR VALUES IN ('b');
CREATE TABLE part_c PARTITION OF parts FOR VALUES IN ('c');
SELECT aibilling.attach('parts', 'polar');
SQL
$node->safe_psql('app', insert('part', 3, 'parts'));
wait_delivered($node, 'app', 'rows of a partitioned table are delivered');
my $stored = $polar->summary->{stored};
$node->safe_psql('app', "UPDATE parts SET region = 'b' WHERE external_id IN ('part-1', 'part-2')");
is(value($node, 'app', 'SELECT count(*) FROM part_b'), '2', 'rows move between partitions after their delivery');
is(value($node, 'app', 'SELECT count(*) FROM aibilling.outbox'), '0', 'and are not enqueued again');
$node->safe_psql('app', 'SELECT aibilling.pause()');
$node->safe_psql('app', insert('moved', 2, 'parts'));
$node->safe_psql('app', "UPDATE parts SET region = 'b', provider_cost = 2 WHERE external_id = 'moved-1'");
$node->safe_psql('app', "BEGIN; " . insert('both', 1, 'parts') . "UPDATE parts SET region = 'b' WHERE external_id = 'both-1'; COMMIT");
is(places($node, 'app'), 'pending 3', 'nor while they wait');
$node->safe_psql('app', "DELETE FROM parts WHERE external_id = 'moved-2'; SELECT aibilling.resume()");
wait_delivered($node, 'app', 'they are delivered where they are');
is($polar->summary->{stored}, $stored + 2, 'once');
is((grep { $_->{external_id} eq 'moved-1' } $polar->events(compact => 1))[0]{cost_amount}, '200', 'as they were changed on the way');

$node->safe_psql('app', 'SELECT aibilling.pause()');
$node->safe_psql('app', "INSERT INTO part_b (external_id, external_customer_id, provider_cost, region)"
	  . " SELECT 'straight-' || i, 'customer', 1, 'b' FROM generate_series(1, 2) i;"
	  . " INSERT INTO parts (external_id, external_customer_id, provider_cost, region)"
	  . " SELECT 'gone-' || i, 'customer', 1, 'c' FROM generate_series(1, 3) i");
is(places($node, 'app'), 'pending 5', 'rows inserted straight into a partition are enqueued');
my $log = -s $node->logfile;
$node->safe_psql('app', 'ALTER TABLE parts DETACH PARTITION part_b; DROP TABLE part_c; SELECT aibilling.resume()');
wait_delivered($node, 'app', 'the rows of a detached and of a dropped partition do not hold delivery up');
is(value($node, 'app', "SELECT vanished FROM aibilling.status WHERE usage_table = 'parts'::regclass"), '5', 'they are counted as vanished');
my $reported = 0;
my $written = slurp_file($node->logfile, $log);
$reported += $1 while $written =~ /WARNING:  (\d+) usage rows of public\.parts were gone before they were sent/g;
is($reported, 5, 'and reported once');
is(value($node, 'app', "SELECT count(*) FROM pg_trigger WHERE tgrelid = 'part_b'::regclass"), '0', 'a detached partition has no triggers');

# The same while rows of the partition are in flight, and no answer comes: those are gone when they are
# to be sent again; what waits of other partitions is not concerned.
$polar->fault(kind => 'hang', store => JSON::PP::true);
$node->safe_psql('app', "INSERT INTO parts (external_id, external_customer_id, provider_cost, region)"
	  . " VALUES ('away-1', 'customer', 1, 'a'), ('away-2', 'customer', 1, 'a')");
$polar->wait(hung => 1);
$node->safe_psql('app', 'ALTER TABLE parts ATTACH PARTITION part_b FOR VALUES IN (\'b\')');
$node->safe_psql('app', 'ALTER TABLE parts DETACH PARTITION part_a CONCURRENTLY');
$node->safe_psql('app', "INSERT INTO parts (external_id, external_customer_id, provider_cost, region)"
	  . " VALUES ('there', 'customer', 1, 'b')");
is(stored($polar)->{'away-1'}, 1, 'a partition is detached while its rows are in flight');
$polar->restart;
wait_delivered($node, 'app', 'nothing waits for them');
is(value($node, 'app', "SELECT vanished FROM aibilling.status WHERE usage_table = 'parts'::regclass"), '7', 'they are counted as vanished too');
is(stored($polar)->{'there'}, 1, 'the rows of others are delivered');
$node->safe_psql('app', 'ALTER TABLE parts ATTACH PARTITION part_a FOR VALUES IN (\'a\')');
$node->safe_psql('app', "INSERT INTO part_b (external_id, external_customer_id, provider_cost, region) VALUES ('again', 'customer', 1, 'b')");
wait_delivered($node, 'app', 'once attached again');
is(stored($polar)->{'again'}, 1, 'its rows are sent');

# DROP OWNED
$node->safe_psql('app', <<'SQL');
CREATE ROLE tenant;
GRANT USAGE ON FOREIGN SERVER polar TO tenant;
CREATE SCHEMA tenant AUTHORIZATION tenant;
GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA aibilling TO tenant;
SET ROLE tenant;
SELECT aibilling.create_usage_table('tenant.usage', server => 'polar');
RESET ROLE;
SQL
while_hanging('tenant.usage', 'owned', 'DROP OWNED BY tenant', qr/WARNING:  dropping a usage table drops 3 rows that were not delivered/);
$polar->wait_for(sub { value($node, 'app', "SELECT count(*) FROM aibilling.delivery WHERE state = 'sending'") eq '0' }, 'the last request to be settled');
is(value($node, 'app', 'SELECT count(*) FROM aibilling.outbox_entry'), '0', 'the outbox forgets what DROP OWNED drops');
is(stored($polar)->{'owned-1'}, 1, 'what was in flight arrives');
$node->safe_psql('app', 'CREATE SCHEMA doomed');
$node->safe_psql('app', "SELECT aibilling.create_usage_table('doomed.usage', server => 'polar')");
while_hanging('doomed.usage', 'schema', 'DROP SCHEMA doomed CASCADE', qr/WARNING:  dropping a usage table drops 3 rows that were not delivered/);
wait_delivered($node, 'app', 'after DROP SCHEMA nothing is left');

# DROP and CREATE EXTENSION
$node->safe_psql('app', "SELECT aibilling.create_usage_table('usage', server => 'polar')");
while_hanging('usage', 'without', 'SET client_min_messages = warning; DROP EXTENSION aibilling_polar CASCADE',
	qr/WARNING:  dropping extension aibilling_polar drops 3 usage rows that were not delivered/);
is(value($node, 'app', 'SELECT count(*) FROM usage'), '5', 'DROP EXTENSION leaves the usage table');
is(value($node, 'app', "SELECT count(*) FROM pg_trigger WHERE tgrelid = 'usage'::regclass"), '0', 'without triggers');
$node->safe_psql('app', insert('meanwhile', 1));
$polar->wait(hung => 0);
wait_for_turn($node, 'app');
my $url = $polar->url;
my $token = $polar->token;
$node->safe_psql('app', <<SQL);
CREATE EXTENSION aibilling_polar;
CREATE SERVER polar FOREIGN DATA WRAPPER polar OPTIONS (url '$url', event_name 'llm_usage');
CREATE USER MAPPING FOR PUBLIC SERVER polar OPTIONS (access_token '$token');
SELECT aibilling.attach('usage', server => 'polar');
SQL
$node->safe_psql('app', insert('anew', 2));
wait_delivered($node, 'app', 'after CREATE EXTENSION the worker delivers again');
is(stored($polar)->{'anew-2'}, 1, 'what is new');
is(stored($polar)->{'meanwhile-1'}, undef, 'and nothing else');
is(value($node, 'app', 'SELECT worker_pid FROM aibilling.status'), $pid, 'all this was one worker, which never failed');
$node->safe_psql('app', 'DROP TABLE usage; DROP SERVER polar CASCADE');
is(value($node, 'app', 'SELECT count(*) FROM pg_foreign_server'), '0', 'a server without tables can be dropped');
$node->stop;

# --- no worker to be had ----------------------------------------------------------------

$node->append_conf('postgresql.conf', "max_worker_processes = 1\naibilling_polar.databases = 'postgres, app, template1'");
$node->start;
set_up($node, 'postgres', $polar);
is( value($node, 'app', 'SELECT worker_pid IS NULL FROM aibilling.status'),
	't', 'without max_worker_processes there is no worker');
like(value($node, 'app', 'SELECT status FROM aibilling.status'), qr/no worker: .*max_worker_processes is exhausted/, 'and status says so');
$node->stop;

done_testing();
