# pg_upgrade: the new cluster has everything, sends nothing before arm(), and each row once after it.
#
# From the installation that AIBILLING_OLD_INSTALL names (a directory with bin in it), by default from the same
# major version: then what differs is the cluster, and its identity.
use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use IPC::Run;
use JSON::PP;
use Lifecycle;
use PolarServer;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

plan skip_all => 'needs python3' unless PolarServer->python;

my $polar = PolarServer->new;
my $strict = PolarServer->new;
my $url = $strict->url;
my $token = $strict->token;
my @init = (extra => [ '--data-checksums', '--encoding=UTF8', '--locale=C' ]);
my $old = new_node('old', '', @init, install_path => $ENV{AIBILLING_OLD_INSTALL});
my $new = new_node('new', 'app, former', @init);
my $had = {};
my $kept = $everything =~ s/(?=ORDER BY 1)/UNION ALL SELECT 'total', t::text FROM aibilling.delivery_total t
UNION ALL SELECT 'setting', concat_ws(' ', setdatabase, setrole::regrole, setconfig) FROM pg_db_role_setting
UNION ALL SELECT 'owner', usage || ' ' || relowner::regrole FROM aibilling.usage_table JOIN pg_class c ON c.oid = usage
UNION ALL SELECT 'role', rolname || oid FROM pg_roles WHERE rolname = 'tenant'
UNION ALL SELECT 'version', extversion FROM pg_extension WHERE extname = 'aibilling_polar'
UNION ALL SELECT 'grant', srvname || srvacl::text FROM pg_foreign_server
/r;

cmp_ok($old->pg_version, '<', $new->pg_version, 'the old installation is older')
  if $ENV{AIBILLING_OLD_INSTALL};

# The old server has no worker, so that what is to wait, waits.
$old->start;
$old->safe_psql('postgres', 'CREATE DATABASE app');
$old->safe_psql('postgres', 'CREATE DATABASE former');
set_up($old, 'app', $polar, "max_in_flight '1'");
fill($old, 'app', 'old');
set_up($old, 'former', $polar, undef, '1.0');
fill_outbox($old, 'former', 'former');

# Servers that are paused: by their owner, by a role for its own tables, by an answer.
$old->safe_psql('app', <<SQL);
CREATE ROLE tenant;
ALTER ROLE tenant IN DATABASE app SET aibilling_polar.enqueue = off;
CREATE SCHEMA tenant AUTHORIZATION tenant;
GRANT USAGE ON FOREIGN SERVER polar TO tenant;
CREATE USER MAPPING FOR tenant SERVER polar OPTIONS (access_token '@{[ $polar->token ]}');
CREATE SERVER held FOREIGN DATA WRAPPER polar OPTIONS (url '$url', event_name 'held', unpriced 'send');
CREATE USER MAPPING FOR PUBLIC SERVER held OPTIONS (access_token '$token');
CREATE SERVER answered FOREIGN DATA WRAPPER polar OPTIONS (url '$url', event_name 'answered');
CREATE USER MAPPING FOR PUBLIC SERVER answered OPTIONS (access_token '$token');
SELECT aibilling.create_usage_table('held', server => 'held');
CREATE TABLE answered (LIKE usage INCLUDING ALL EXCLUDING CONSTRAINTS EXCLUDING INDEXES, PRIMARY KEY (id, occurred_at))
PARTITION BY RANGE (occurred_at);
CREATE TABLE answered_default PARTITION OF answered DEFAULT;
SELECT aibilling.attach('answered', server => 'answered');
SELECT aibilling.pause('held');
SET ROLE tenant;
SELECT aibilling.create_usage_table('tenant.usage', server => 'polar');
SELECT aibilling.pause();
SQL
$old->safe_psql('app', insert('held', 2, 'held') . insert('answered', 3, 'answered') . insert('tenant', 4, 'tenant.usage'));
$strict->fault(kind => '401', times => 'always');
$old->psql('app', "CALL aibilling.sync('answered')");

# The server is stopped while a request is in flight that Polar has stored.
$polar->fault(kind => 'hang', store => JSON::PP::true);
my $caller = IPC::Run::start([ 'psql', '-XAtq', '-d', $old->connstr('app'), '-c', "CALL aibilling.sync('polar')" ],
	'<', \undef, '>&', \my $output);
$polar->wait(hung => 1);
$old->safe_psql('app', insert('late', 2));
$old->stop('fast');
$caller->finish;
$polar->release;

$old->start;
foreach my $database ('app', 'former')
{
	$had->{$database} = value($old, $database, $kept);
}
is(places($old, 'app'), 'pending 11, rejected 1, unpriced 1', 'rows wait, of every state');
is(value($old, 'app', "SELECT sum(events) FROM aibilling.delivery WHERE state = 'sending'"), '2', 'and are in flight');
is(value($old, 'app', "SELECT string_agg(server || ' ' || paused || ' ' || role::regrole, ', ' ORDER BY server) FROM aibilling.server_state"),
	'answered answer -, held operator -, polar operator tenant', 'servers are paused, for every reason');
my $arrived = $polar->summary->{arrived};
my $strictly = $strict->summary->{arrived};
$old->stop;

chdir $new->basedir or die "could not enter a directory: $!";
command_ok(
	[
		'pg_upgrade', '--no-sync',
		'--old-datadir', $old->data_dir, '--new-datadir', $new->data_dir,
		'--old-bindir', $old->config_data('--bindir'), '--new-bindir', $new->config_data('--bindir'),
		'--socketdir', $new->host, '--old-port', $old->port, '--new-port', $new->port
	],
	'pg_upgrade from ' . $old->pg_version . ' to ' . $new->pg_version);
$new->start;
foreach my $database ('app', 'former')
{
	is(value($new, $database, $kept), $had->{$database}, "$database: pg_upgrade keeps everything");
	$new->safe_psql($database, 'ALTER EXTENSION aibilling_polar UPDATE');
	wait_for_turn($new, $database);
	like(value($new, $database, 'SELECT DISTINCT status FROM aibilling.status'), $copy_is_paused, "$database: it starts paused");
}

# In the new cluster the servers have other OIDs, which may be those that others of them had.  What is done
# before arm() is for the servers of these names.
$new->safe_psql('app', insert('unarmed', 1));
$new->safe_psql('app', "UPDATE usage SET external_customer_id = 'customer' WHERE external_id = 'old-rejected'");
is(places($new, 'app'), 'pending 13, unpriced 1', 'a row can be fixed');
is(value($new, 'app', "SELECT DISTINCT state FROM aibilling.preview('held')"), 'pending', 'preview shows what will be sent');
my $pairs = "SELECT string_agg(usage || ' to ' || server, ', ' ORDER BY usage::text) FROM aibilling.usage_table";
my $attached = 'answered to answered, held to held, tenant.usage to polar, usage to polar';
is(value($new, 'app', $pairs), $attached, 'tables are attached to the servers of old');
$new->safe_psql('app', <<'SQL');
UPDATE aibilling.usage_table SET serverid = (SELECT oid FROM pg_foreign_server
WHERE srvname = CASE server WHEN 'polar' THEN 'held' WHEN 'held' THEN 'answered' ELSE 'polar' END);
ALTER SERVER polar OPTIONS (ADD timeout '7s');
SQL
is(value($new, 'app', $pairs), $attached, 'a change of a server moves no table to another one');
my ($status, undef, $stderr) = $new->psql('app', 'DROP SERVER held CASCADE');
like($stderr, qr/cannot drop server "held": usage table public.held is attached to it/, 'nor can one be dropped');
is($polar->summary->{arrived}, $arrived, 'nothing is sent, by pg_upgrade neither');
is($strict->summary->{arrived}, $strictly, 'by no server');

$new->safe_psql('app', 'SELECT aibilling.arm()');
$polar->wait(events => 9);
my $waiting = "SELECT string_agg(usage_table || ' ' || pending + in_flight, ', ' ORDER BY usage_table::text) FROM aibilling.status";
ok( $new->poll_query_until('app', $waiting, 'answered 3, held 2, tenant.usage 4, usage 0'),
	'it sends once armed, but not what is paused')
  or diag(value($new, 'app', $waiting));
is(value($new, 'app', 'SELECT sum(rejected), sum(unpriced) FROM aibilling.status'), '0|1', 'nor what cannot be sent');
like(
	value($new, 'app', "SELECT string_agg(usage_table || ': ' || status, '; ' ORDER BY usage_table::text)"
		  . " FROM aibilling.status WHERE usage_table <> 'usage'::regclass"),
	qr/^answered: paused: .*401.*; held: paused: paused by \w+; tenant.usage: paused: paused by tenant$/,
	'and says so');
is(value($new, 'app', 'SELECT sum(duplicates), sum(unexpected_duplicates) FROM aibilling.delivery'),
	'2|0', 'what was in flight was found to be there, the rest is sent once');
is($polar->summary->{duplicates}, 2, 'as Polar sees it too');

$new->safe_psql('app', "INSERT INTO aibilling.price (provider, model, input) VALUES ('nobody', 'nothing', 1)");
$strict->clear_faults;
$new->safe_psql('app', 'SELECT aibilling.resume()');
$new->safe_psql('app', 'SET ROLE tenant; SELECT aibilling.resume()');
wait_delivered($new, 'app', 'the rest is delivered once nothing is in its way');
is(places($new, 'app'), '', 'every row');
is_deeply([ sort { $a <=> $b } values %{ stored($polar) } ], [ (1) x 14 ], 'once');
is_deeply([ sort { $a <=> $b } values %{ stored($strict) } ], [ (1) x 5 ], 'where it belongs');

# As if installed here: nothing of the extension is tied to the version that made it.  But for the names of
# NOT NULL constraints, which PostgreSQL has from 18 on and pg_upgrade gives anew.
sub anatomy_of
{
	my ($database) = @_;
	return [ sort map { s/^(constraint\|.*)\.\w+(\|NOT NULL )/$1$2/r } split /\n/, value($new, $database, $anatomy) ];
}

$new->safe_psql('postgres', 'CREATE EXTENSION aibilling_polar');
my $fresh = anatomy_of('postgres');
is_deeply(anatomy_of('app'), $fresh, 'the extension equals a fresh install, object by object');
$new->safe_psql('former', 'SELECT aibilling.arm()');
is_deeply(anatomy_of('former'), $fresh, 'so does an older version of it, after an update');
wait_delivered($new, 'former', 'which delivers too');
is(stored($polar)->{'former-pending-2'}, 1, 'once');
$new->stop;

done_testing();
