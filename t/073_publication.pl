# A publication FOR ALL TABLES, which is what change data capture makes by itself: nothing of the extension
# breaks, on this server and on the one that takes over; and a subscriber that has the extension, too,
# sends nothing of the publisher's.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use AibillingNode;
use PolarServer;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

plan skip_all => 'python3 is not on PATH' unless PolarServer->python;

my $conf = <<'EOC';
wal_level = logical
max_wal_senders = 8
max_replication_slots = 8
max_worker_processes = 20
aibilling_polar.poll_interval = 1
EOC
my $polar = PolarServer->new;
my $node = AibillingNode->new('publisher', extension => 0, conf => $conf);

# A statement that must not fail. Returns its output.
sub works
{
	my ($sql, $what) = @_;
	my ($rc, $out, $err) = $node->psql('postgres', $sql);

	is($err =~ s/^psql:\S+ (WARNING|NOTICE):.*\n?(DETAIL:.*\n?)?(HINT:.*\n?)?//mgr, '', $what // $sql);
	return $out;
}

my $without = q{
SELECT string_agg(c.oid::regclass::text, ', ' ORDER BY c.relname)
FROM pg_depend d JOIN pg_class c ON d.classid = 'pg_class'::regclass AND d.objid = c.oid AND c.relkind = 'r'
WHERE d.refclassid = 'pg_extension'::regclass AND d.deptype = 'e'
	AND d.refobjid = (SELECT oid FROM pg_extension WHERE extname = 'aibilling_polar')
	AND NOT (c.relreplident = 'f'
		OR c.relreplident = 'd' AND EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisprimary)
		OR c.relreplident = 'i' AND EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisreplident))};

# ---------------------------------------------------------------------------
# The publication is there first, as in the README's first two statements
# ---------------------------------------------------------------------------

works('CREATE PUBLICATION dbz_publication FOR ALL TABLES');
works('CREATE EXTENSION aibilling_polar');
is(works($without), '', 'every table of the extension has a replica identity');
works('SELECT count(*) > 100 FROM (SELECT aibilling.load_bundled_prices()) AS loaded');
works('SELECT aibilling.load_bundled_prices()');
works(q{
INSERT INTO aibilling.price (provider, model, input, output) VALUES ('p', 'm', 1, 2), ('p', 'gone', 1, 2);
UPDATE aibilling.price SET output = 3 WHERE model = 'm';
DELETE FROM aibilling.price WHERE model = 'gone'}, 'prices are changed and deleted');
works(q{
INSERT INTO aibilling.price_source (source, priority) VALUES ('list', 50);
SELECT aibilling.import_prices('{"p/q": {"litellm_provider": "p", "mode": "chat", "input_cost_per_token": 1e-6, "output_cost_per_token": 2e-6}}', 'litellm', false);
SELECT aibilling.import_prices('{"p/q": {"litellm_provider": "p", "mode": "chat", "input_cost_per_token": 1e-2, "output_cost_per_token": 2e-2}}', 'litellm', false)},
	'a catalogue is imported, and a suspicious price is quarantined');

$node->create_server($polar);
works(q{SELECT aibilling.create_usage_table('usage', 'polar')});

# ---------------------------------------------------------------------------
# Whatever moves, changes and drops entries of the outbox
# ---------------------------------------------------------------------------

works('SELECT aibilling.pause()');
$node->insert_rows(20);
works(q{INSERT INTO usage (external_id, provider, model, input_tokens) VALUES ('nobody', 'p', 'm', 7)});
works(q{INSERT INTO usage (external_id, provider, model, external_customer_id, input_tokens) VALUES ('priceless', 'p', 'n', 'c', 7)});
is(works('SELECT state, count(*) FROM aibilling.outbox GROUP BY 1 ORDER BY 1'),
	"pending|20\nrejected|1\nunpriced|1", 'rows wait in every state');
works(q{UPDATE usage SET external_customer_id = 'c' WHERE external_id = 'nobody'});
works(q{UPDATE usage SET provider_cost = 0.5 WHERE external_id = 'row_1'});
works(q{UPDATE usage SET occurred_at = now() + interval '1 day' WHERE external_id = 'row_2'});
works(q{DELETE FROM usage WHERE external_id IN ('row_2', 'row_3')});
works(q{SELECT * FROM aibilling.reprice('usage', dry_run => false)});
works(q{SELECT aibilling.retry('usage')});
works(q{
CREATE TABLE other (LIKE usage INCLUDING ALL);
SELECT aibilling.attach('other', 'polar');
INSERT INTO other (provider, model, external_customer_id, input_tokens) VALUES ('p', 'm', 'c', 7);
TRUNCATE other;
INSERT INTO other (provider, model, external_customer_id, input_tokens) VALUES ('p', 'm', 'c', 7);
SELECT aibilling.detach('other', 'discard');
SELECT aibilling.attach('other', 'polar', 'send');
DROP TABLE other}, 'TRUNCATE, detach, attach and DROP TABLE');
works('SELECT aibilling.arm()');
works('ALTER SERVER polar RENAME TO renamed; ALTER SERVER renamed RENAME TO polar', 'a server is renamed');
works(q{INSERT INTO aibilling.price (provider, model, input, output) VALUES ('p', 'n', 1, 2)});
works('SELECT aibilling.resume()');
$node->wait_settled;
ok($node->poll_query_until('postgres', 'SELECT NOT EXISTS (SELECT FROM aibilling.outbox)'),
	'the worker releases the row that got its price') || diag($node->diagnosis);
works(q{UPDATE usage SET tags = tags, raw_usage = NULL});
$node->sums_equal($polar, 'everything is delivered, once and exactly');

# Statements that a command runs only now and then
for my $table (split /\n/, $node->safe_psql('postgres', q{
SELECT d.objid::regclass || ' ' || (SELECT quote_ident(attname) FROM pg_attribute
	WHERE attrelid = d.objid AND attnum > 0 AND attidentity = '' AND attgenerated = '' AND NOT attisdropped ORDER BY attnum LIMIT 1)
FROM pg_depend d JOIN pg_class c ON d.classid = 'pg_class'::regclass AND d.objid = c.oid AND c.relkind = 'r'
WHERE d.refobjid = (SELECT oid FROM pg_extension WHERE extname = 'aibilling_polar') AND d.deptype = 'e'}))
{
	my ($name, $column) = split / /, $table;
	works("UPDATE $name SET $column = $column WHERE false; DELETE FROM $name WHERE false", "$name can be written");
}

# ---------------------------------------------------------------------------
# An installation of 1.1 gets the same
# ---------------------------------------------------------------------------

$node->safe_psql('postgres', 'CREATE DATABASE older');
$node->safe_psql('older', q{
CREATE EXTENSION aibilling_polar VERSION '1.1';
CREATE PUBLICATION everything FOR ALL TABLES;});
isnt($node->safe_psql('older', $without), '', '1.1 has tables without a replica identity');
$node->safe_psql('older', 'ALTER EXTENSION aibilling_polar UPDATE');
is($node->safe_psql('older', $without), '', 'the update gives it to them');
$node->safe_psql('older', 'SELECT aibilling.load_bundled_prices()');
pass('and prices can be loaded');

# ---------------------------------------------------------------------------
# A subscriber that has the extension, a server and a usage table of its own
# ---------------------------------------------------------------------------

my $its_polar = PolarServer->new;
my $subscriber = AibillingNode->new('subscriber', conf => $conf);
$subscriber->create_server($its_polar);
$subscriber->create_usage_table;
$subscriber->insert_rows(2, prefix => 'its_own_', from => 900);
$its_polar->wait(events => 2);
$subscriber->wait_settled;

my $publisher = $node->connstr('postgres');
foreach my $table ('ledger', 'attachment', 'outbox_entry')
{
	works("CREATE PUBLICATION one FOR TABLE aibilling.$table");
	$subscriber->safe_psql('postgres', qq{
CREATE SUBSCRIPTION one CONNECTION \$\$$publisher\$\$ PUBLICATION one WITH (copy_data = false)});
	like($subscriber->status, qr/^paused: a subscription brings/, "a subscription to aibilling.$table alone is enough");
	$subscriber->safe_psql('postgres', 'DROP SUBSCRIPTION one');
	works('DROP PUBLICATION one');
}
unlike($subscriber->status, qr/^paused/, 'without it there is nothing to pause for');
$subscriber->safe_psql('postgres', qq{
CREATE SUBSCRIPTION s CONNECTION \$\$$publisher\$\$ PUBLICATION dbz_publication WITH (copy_data = false)});
like($subscriber->status, qr/^paused: a subscription brings another database's outbox here/,
	'the subscription alone says that it is not to send');

works('SELECT aibilling.pause()');
$node->insert_rows(10, from => 100);
$node->wait_for_catchup('s', 'replay', $node->lsn('flush'));
is($subscriber->safe_psql('postgres', q{SELECT count(*) FROM usage WHERE external_id LIKE 'row_%'}), '10',
	"the publisher's rows are there");
is( $subscriber->safe_psql('postgres',
		'SELECT sum(coalesce((SELECT sum(upper(r) - lower(r)) FROM unnest(ids) r), 1)) FROM aibilling.outbox_entry'),
	'10',
	'and its outbox');

# The worst that can happen: two databases made alike, whose usage tables have the same OID.
$subscriber->safe_psql('postgres', q{UPDATE aibilling.outbox_entry SET usage_table = 'usage'::regclass});
$subscriber->insert_rows(1, prefix => 'its_own_', from => 902);
my ($rc, $out, $err) = $subscriber->psql('postgres', 'CALL aibilling.sync()');
like($err, qr/this database is a copy and does not send/, 'sync() sends nothing either');

# With the identity copied, too, it stays so when the subscription has gone.
works('SELECT aibilling.arm()');
$node->wait_for_catchup('s', 'replay', $node->lsn('flush'));
is($subscriber->safe_psql('postgres', 'SELECT count(*) FROM aibilling.database_identity'), '2', 'two identities');
$subscriber->safe_psql('postgres', 'DROP SUBSCRIPTION s');
like($subscriber->status, qr/^paused: a subscription brings/, 'two identities are a copy');
($rc, $out, $err) = $subscriber->psql('postgres', 'CALL aibilling.sync()');
like($err, qr/this database is a copy and does not send/, 'sync() sends nothing');
$subscriber->worker_waits;
is($its_polar->summary->{stored}, 2, "not one row of the publisher's was sent");
$subscriber->safe_psql('postgres', 'SELECT aibilling.arm(), aibilling.resume()');
$its_polar->wait(events => 13);
$subscriber->wait_settled;
pass('aibilling.arm() makes it send, as of any copy');
$subscriber->stop;
works('SELECT aibilling.resume()');
$node->wait_settled;

# ---------------------------------------------------------------------------
# Failover: the new primary notes its timeline, and delivers
# ---------------------------------------------------------------------------

$node->backup('base');
my $standby = bless PostgreSQL::Test::Cluster->new('standby'), 'AibillingNode';
$standby->init_from_backup($node, 'base', has_streaming => 1);
$standby->start;
works('SELECT aibilling.pause()');
$node->insert_rows(5, from => 200);
$node->wait_for_catchup($standby);
$node->stop('immediate');
$standby->promote;
$standby->safe_psql('postgres', 'SELECT aibilling.resume()');
$standby->insert_rows(5, from => 300);
$standby->wait_settled;
is($standby->safe_psql('postgres', 'SELECT timeline FROM aibilling.database_identity'), '2', 'the timeline is noted');
unlike(slurp_file($standby->logfile), qr/replica identity/, 'the worker fails at nothing');
$standby->sums_equal($polar, 'everything is delivered after a failover');
$standby->stop;

done_testing();
