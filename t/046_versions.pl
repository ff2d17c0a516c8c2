# Databases of older versions of the extension, and their update: object by object it equals a fresh install.
use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use Lifecycle;
use PolarServer;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

plan skip_all => 'needs python3' unless PolarServer->python;

my $versions = new_node('versions', 'from_1_0, from_1_1');
my $polar = PolarServer->new;
my $url = $polar->url;
my $token = $polar->token;
my $dump = $versions->basedir . '/old.dump';

$versions->start;
my ($current, @old) = split /\n/, value($versions, 'postgres', <<'SQL');
SELECT version FROM pg_available_extension_versions v JOIN pg_available_extensions e USING (name)
WHERE name = 'aibilling_polar' ORDER BY version <> default_version, version
SQL
$versions->safe_psql('postgres', 'CREATE EXTENSION aibilling_polar');
my $fresh = value($versions, 'postgres', $anatomy);
is(value($versions, 'postgres', "SELECT count(*) FROM ($anatomy) a WHERE name ~ 'aibilling'") > 300 ? 'much' : 'little',
	'much', 'an extension has an anatomy');
is(value($versions, 'postgres', <<'SQL'), '', 'every object of it that can have a comment has one');
SELECT pg_describe_object(d.classid, d.objid, d.objsubid)
FROM (
SELECT classid, objid, objsubid FROM pg_depend
WHERE refclassid = 'pg_extension'::regclass AND deptype = 'e'
	AND refobjid = (SELECT oid FROM pg_extension WHERE extname = 'aibilling_polar')
	AND classid <> 'pg_type'::regclass
UNION ALL
SELECT 'pg_class'::regclass, attrelid, attnum FROM pg_attribute JOIN pg_class c ON c.oid = attrelid
WHERE relnamespace = 'aibilling'::regnamespace AND relkind IN ('r', 'v') AND attnum > 0 AND NOT attisdropped AND attislocal
) d
WHERE coalesce(CASE WHEN d.objsubid > 0 THEN col_description(d.objid, d.objsubid)
ELSE obj_description(d.objid, d.classid::regclass::name) END, '') = ''
AND NOT EXISTS (SELECT FROM pg_class WHERE oid = d.objid AND relkind IN ('S', 'i') AND d.classid = 'pg_class'::regclass)
SQL
is("@old", '1.0 1.1', 'there are versions to update from');
ok(-f $versions->config_data('--sharedir') . "/extension/aibilling_polar--$current.sql", 'a fresh install has a script of its own');

# So it does where a role has other privileges by default: what is private is said, and what is for all.
$versions->safe_psql('postgres', "CREATE DATABASE $_") foreach 'strict', map { "strict_$_" =~ tr/./_/r } @old;
my %strict;
foreach my $version ($current, @old)
{
	my $database = $version eq $current ? 'strict' : "strict_$version" =~ tr/./_/r;
	$versions->safe_psql($database, <<SQL);
ALTER DEFAULT PRIVILEGES REVOKE EXECUTE ON ROUTINES FROM PUBLIC;
ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO PUBLIC;
ALTER DEFAULT PRIVILEGES GRANT ALL ON SEQUENCES TO PUBLIC;
CREATE EXTENSION aibilling_polar VERSION '$version';
ALTER EXTENSION aibilling_polar UPDATE;
SQL
	$strict{$version} = [ split /\n/, value($versions, $database, $anatomy) ];
}
is_deeply($strict{$_}, $strict{$current}, "an update from $_ equals a fresh install under other default privileges") foreach @old;

foreach my $old (@old)
{
	my $database = "from_$old" =~ tr/./_/r;
	my $status = "SELECT pending, unpriced, rejected, in_flight, delivered, status FROM aibilling.status";

	# The library of today prices and queues for the SQL of then, and asks for the update.
	$versions->safe_psql('postgres', "CREATE DATABASE $database");
	$versions->safe_psql($database, <<SQL);
CREATE EXTENSION aibilling_polar VERSION '$old';
CREATE SERVER polar FOREIGN DATA WRAPPER polar OPTIONS (url '$url', event_name 'llm_usage');
CREATE USER MAPPING FOR PUBLIC SERVER polar OPTIONS (access_token '$token');
SELECT aibilling.create_usage_table('usage', server => 'polar');
SELECT aibilling.load_bundled_prices();
SQL
	my $before = value($versions, $database, $anatomy);
	isnt($before, $fresh, "$old is another version");
	fill_outbox($versions, $database, $old);
	is(value($versions, $database, "SELECT aibilling.cost_nanos('openai', 'gpt-5', 1000000)"),
		'1250000000', "$old: prices");
	foreach my $statement ('DELETE FROM usage', 'TRUNCATE usage', 'CALL aibilling.sync()', 'SELECT * FROM aibilling.status')
	{
		my (undef, undef, $err) = $versions->psql($database, $statement);
		like($err, qr/older than its library.*ALTER EXTENSION aibilling_polar UPDATE/s, "$old: $statement asks for the update");
	}

	# What has been sent, and what is on its way, as a worker of then has left it.
	$versions->safe_psql($database, <<SQL);
INSERT INTO usage (external_id, occurred_at, provider, model, external_customer_id, input_tokens)
SELECT '$old-sent-' || n, '2026-01-02', 'openai', 'gpt-5', 'c', 100 FROM generate_series(1, 4) n;
WITH sent AS (SELECT range_agg(int8range(id, id, '[]')) AS ids FROM usage WHERE external_id ~ 'sent'),
gone AS (DELETE FROM aibilling.outbox_entry e USING sent WHERE e.first <\@ sent.ids)
INSERT INTO aibilling.delivery (server, usage_table, usage_ids, events, bytes, state, attempts, inserted, duplicates, started_at, finished_at)
SELECT 'polar', 'usage', CASE state WHEN 'sending' THEN ids * int8multirange(int8range((SELECT max(id) FROM usage), NULL)) ELSE
ids - int8multirange(int8range((SELECT max(id) FROM usage), NULL)) END, CASE state WHEN 'sending' THEN 1 ELSE 3 END, 100, state, 1,
CASE state WHEN 'sending' THEN NULL ELSE 3 END, CASE state WHEN 'sending' THEN NULL ELSE 0 END, now(),
CASE state WHEN 'sending' THEN NULL ELSE now() END
FROM sent, unnest('{delivered,sending}'::text[]) state;
SQL
	$versions->command_ok([ 'pg_dump', '-Fc', '-d', $versions->connstr($database), '-f', $dump ], "$old: pg_dump");
	my $rows = value($versions, $database, 'SELECT * FROM usage ORDER BY id');
	$versions->safe_psql($database, 'ALTER EXTENSION aibilling_polar UPDATE');
	is_deeply(
		[ split /\n/, value($versions, $database, $anatomy) ], [ split /\n/, $fresh ],
		"an update from $old equals a fresh install, object by object");
	is(value($versions, $database, 'SELECT * FROM usage ORDER BY id'), $rows, "$old: rows stay as they are");
	wait_delivered($versions, $database, "$old: what waited is delivered");
	is( join(' ', grep { /^\Q$old\E-/ } sort keys %{ stored($polar) }),
		value($versions, $database,
			"SELECT string_agg(external_id, ' ' ORDER BY external_id COLLATE \"C\") FROM usage, aibilling.usage_status('usage', id) WHERE state = 'delivered'"
			  . " AND id NOT IN (SELECT unnest(ARRAY(SELECT generate_series(lower(r), upper(r) - 1) FROM aibilling.delivery, unnest(usage_ids) r WHERE inserted = 3 AND bytes = 100)))"),
		"$old: every row once, and none that was delivered");
	like(value($versions, $database, 'SELECT pending, unpriced, rejected, in_flight, status FROM aibilling.status'),
		qr/^0\|1\|1\|0\|idle: everything that can be sent is delivered; 1 rows wait for a price.*; 1 rows are rejected/, "$old: status");
	like(
		($versions->psql($database, "UPDATE usage SET input_tokens = 1 WHERE external_id = '$old-sent-1'"))[2],
		qr/has been delivered/, "$old: what was delivered then is a fact");
	is(value($versions, $database, 'SELECT sum(unexpected_duplicates) FROM aibilling.delivery'), '0', "$old: no surprise");
	$versions->safe_psql($database, insert("$old-after", 2));
	wait_delivered($versions, $database, "$old: delivery goes on");

	# A dump of then is restored where the extension is of then, and updated.
	$versions->safe_psql('postgres', 'CREATE DATABASE restored');
	$versions->safe_psql('restored', "CREATE EXTENSION aibilling_polar VERSION '$old'");
	$versions->command_ok([ 'pg_restore', '--exit-on-error', '-d', $versions->connstr('restored'), $dump ],
		"$old: pg_restore");
	$versions->safe_psql('restored', 'ALTER EXTENSION aibilling_polar UPDATE');
	is(value($versions, 'restored', $anatomy), $fresh, "$old: makes $current");
	is(value($versions, 'restored', 'SELECT * FROM usage ORDER BY id'), $rows, "$old: with its rows");
	like(value($versions, 'restored', 'SELECT pending, unpriced, rejected, in_flight, status FROM aibilling.status'),
		qr/^2\|1\|1\|1\|paused: this database is a copy/, "$old: and what waited");
	$versions->safe_psql('postgres', 'DROP DATABASE restored');
}
$versions->stop;

done_testing();
