# An attack on a server's options by its owner, who is no superuser: to have a superuser's token sent elsewhere.
# And what DROP says of the rows that go with it.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use AibillingNode;
use PolarServer;
use PostgreSQL::Test::Utils;
use Test::More;

plan skip_all => 'python3 is not on PATH' unless PolarServer->python;

my $polar = PolarServer->new;
my $elsewhere = PolarServer->new(token => $polar->token);
my $node = AibillingNode->new('main', conf => "aibilling_polar.poll_interval = 1\n");

# What a role's session says, notices and all.
sub as
{
	my ($role, $sql) = @_;
	my ($rc, $out, $err) = $node->psql('postgres', $sql, extra_params => [ '-U', $role ], on_error_stop => 0);

	return $err;
}

# ---------------------------------------------------------------------------
# The attack
# ---------------------------------------------------------------------------

# An honest table beside it, on the same token: it must go on whatever the attacker does.
my $token_file = $node->token_file($polar->token);
my $url = $polar->url;
my ($proxy) = $elsewhere->url =~ m{(127\.0\.0\.1:\d+)};
$node->create_server($polar, name => 'honest', access_token_file => $token_file);
$node->create_usage_table('usage', 'honest');
$node->safe_psql('postgres', qq{
CREATE ROLE mallory LOGIN;
CREATE ROLE friend LOGIN;
GRANT mallory TO friend;
CREATE ROLE reader LOGIN;
GRANT pg_read_server_files TO reader;
GRANT USAGE ON FOREIGN DATA WRAPPER polar TO mallory, reader;
CREATE SCHEMA mallory AUTHORIZATION mallory;
-- Wherever this points without its url or its proxy, the superuser's token goes along.
CREATE SERVER gateway FOREIGN DATA WRAPPER polar
	OPTIONS (url '$url', environment 'production', proxy 'http://$proxy', ca_file '/gateway.pem', access_token_file '$token_file');
CREATE SERVER hosted FOREIGN DATA WRAPPER polar
	OPTIONS (environment 'sandbox', ca_file '/private.pem', access_token_file '$token_file');
CREATE SERVER by_url FOREIGN DATA WRAPPER polar OPTIONS (url '$url', metadata_function 'pg_catalog.no_such_function');
ALTER SERVER gateway OWNER TO mallory;
ALTER SERVER hosted OWNER TO mallory;
ALTER SERVER by_url OWNER TO mallory;});

my $before = $node->safe_psql('postgres', 'SELECT srvname, srvoptions FROM pg_foreign_server ORDER BY 1');
for my $role ('mallory', 'friend')
{
	for my $change (
		'gateway OPTIONS (DROP url)',
		'gateway OPTIONS (DROP proxy)',
		'gateway OPTIONS (DROP ca_file)',
		'gateway OPTIONS (DROP access_token_file)',
		'gateway OPTIONS (DROP url, DROP proxy)',
		'gateway OPTIONS (DROP url, DROP proxy, DROP ca_file)',
		'gateway OPTIONS (DROP url, DROP proxy, DROP ca_file, DROP access_token_file)',
		"gateway OPTIONS (DROP url, SET environment 'sandbox')",
		"gateway OPTIONS (SET url 'http://$proxy')",
		"gateway OPTIONS (SET proxy 'http://$proxy', DROP url)",
		"gateway OPTIONS (DROP proxy, ADD proxy 'http://$proxy', DROP ca_file)",
		"gateway OPTIONS (SET access_token_file '/private.token')",
		"hosted OPTIONS (SET environment 'production')",
		'hosted OPTIONS (DROP ca_file)',
		'hosted OPTIONS (DROP access_token_file)',
		"hosted OPTIONS (ADD url 'http://$proxy')",
		"hosted OPTIONS (ADD proxy 'http://$proxy')",
		"hosted OPTIONS (DROP environment, ADD url '$url')",
		"by_url OPTIONS (DROP url, ADD environment 'production')",
		"by_url OPTIONS (ADD access_token_file '$token_file')")
	{
		like(as($role, "ALTER SERVER $change"), qr/ERROR:  permission denied to (set|change) option /, "$role: $change");
	}
	for my $options (
		"environment 'production', access_token_file '$token_file'",
		"url '$url', access_token_file '$token_file'",
		"environment 'sandbox', access_token_file '$token_file'",
		"url '$url', proxy 'http://$proxy'",
		"url '$url', ca_file '/private.pem', access_token_file '$token_file'",
		"environment 'sandbox', metadata_function 'pg_catalog.no_such_function'")
	{
		like(as($role, "SET ROLE mallory; CREATE SERVER another FOREIGN DATA WRAPPER polar OPTIONS ($options)"),
			qr/ERROR:  permission denied to set option /, "$role: no second server with $options");
	}
}
is($node->safe_psql('postgres', 'SELECT srvname, srvoptions FROM pg_foreign_server ORDER BY 1'),
	$before, 'nothing has changed');

# A role with the right to some of it has no right to the rest.
$node->safe_psql('postgres', 'ALTER SERVER gateway OWNER TO reader; ALTER SERVER hosted OWNER TO reader');
like(as('reader', "ALTER SERVER gateway OPTIONS (SET access_token_file '/another.token')"),
	qr/permission denied to change option "access_token_file".*Option "url" was set by a role with more rights/s,
	'who may read files may not change the token of what has a url');
like(as('reader', 'ALTER SERVER gateway OPTIONS (DROP ca_file)'), qr/permission denied to change/, 'nor whom it trusts');
is(as('reader', "ALTER SERVER hosted OPTIONS (SET environment 'production', SET access_token_file '/another.token', DROP ca_file)"),
	'', 'but all of what they may set themselves');
$node->safe_psql('postgres', 'ALTER SERVER gateway OWNER TO mallory');

# What is harmless goes on, also beside options that are not.
is( as('mallory', q{
ALTER SERVER gateway OPTIONS (ADD batch_size '10', ADD event_name 'e');
ALTER SERVER gateway OPTIONS (SET batch_size '20', DROP event_name);
ALTER SERVER gateway OPTIONS (SET environment 'sandbox');
ALTER SERVER by_url OPTIONS (ADD unpriced 'send');
ALTER SERVER by_url OPTIONS (DROP metadata_function);
ALTER SERVER gateway RENAME TO renamed;
ALTER SERVER renamed RENAME TO gateway;
CREATE SERVER own FOREIGN DATA WRAPPER polar OPTIONS (environment 'sandbox');
ALTER SERVER own OPTIONS (SET environment 'production');}),
	'', 'harmless options, an environment beside a url, names, and a server of their own');
is(as('mallory', "CREATE SERVER twin FOREIGN DATA WRAPPER polar OPTIONS (url '$url')"),
	'', 'a second server with the same decision');
$node->safe_psql('postgres', 'ALTER SERVER own OWNER TO reader');
like(as('mallory', 'ALTER SERVER own OPTIONS (DROP environment)'), qr/must be owner/, 'nobody alters the server of another');

# A mapping of mallory's own token does not replace the file's.
is(as('mallory', q{
CREATE USER MAPPING FOR mallory SERVER gateway OPTIONS (access_token 'polar_oat_mallory');
ALTER SERVER gateway OPTIONS (SET batch_size '30');
SELECT aibilling.create_usage_table('mallory.usage', 'gateway');
INSERT INTO mallory.usage (provider, model, external_customer_id, provider_cost) VALUES ('p', 'm', 'c', 1);}) =~ s/^.*NOTICE.*\n//mgr,
	'', 'mallory bills through the gateway');

# A superuser changes all of it.
is(as($node->safe_psql('postgres', 'SELECT current_user'),
	'ALTER SERVER gateway OPTIONS (DROP ca_file, DROP proxy, DROP access_token_file)'), '', 'a superuser may');

$node->insert_rows(10);
$polar->wait(events => 10);
$node->poll_query_until('postgres', q{SELECT NOT EXISTS (SELECT FROM aibilling.outbox WHERE usage_table = 'usage'::regclass)});
is(scalar(grep { ($_->{external_id} // '') =~ /^row_/ } $polar->events), 10, 'the honest table is delivered');
is($elsewhere->summary->{stored}, 0, 'and no token has gone elsewhere');

# ---------------------------------------------------------------------------
# DROP says what goes with it
# ---------------------------------------------------------------------------

$node->safe_psql('postgres', 'SELECT aibilling.pause()');
$node->insert_rows(3, from => 100);
my $waiting = $node->safe_psql('postgres', 'SELECT count(*) FROM aibilling.outbox');
my $super = $node->safe_psql('postgres', 'SELECT current_user');
my $words = qr/WARNING:  dropping extension aibilling_polar drops $waiting usage rows that were not delivered/;
like(as($super, 'BEGIN; DROP EXTENSION aibilling_polar CASCADE; ROLLBACK'), $words, 'DROP EXTENSION CASCADE');
$node->safe_psql('postgres', 'DROP SERVER IF EXISTS twin; CREATE ROLE installer SUPERUSER');
like(as($super, 'BEGIN; DROP FOREIGN DATA WRAPPER polar CASCADE; ROLLBACK'),
	qr/cannot drop foreign-data wrapper polar because extension aibilling_polar requires it/, 'its members stay');
like(as($super, 'BEGIN; DROP TABLE usage; ROLLBACK'), qr/WARNING:  dropping a usage table drops 3 rows/, 'as DROP TABLE says');
is($node->safe_psql('postgres', 'SELECT count(*) FROM aibilling.outbox'), $waiting, 'ROLLBACK keeps them');

# So is it said of a database that was not updated yet.
$node->safe_psql('postgres', q{
CREATE DATABASE older;
\c older
CREATE EXTENSION aibilling_polar VERSION '1.1';
CREATE SERVER polar FOREIGN DATA WRAPPER polar OPTIONS (environment 'sandbox');
SELECT aibilling.create_usage_table('usage', 'polar');
INSERT INTO usage (provider, model, external_customer_id, provider_cost)
	SELECT 'p', 'm', 'c', 1 FROM generate_series(1, 3);
INSERT INTO usage (provider_cost) VALUES (1);});
my ($rc, $out, $err) = $node->psql('older', 'DROP EXTENSION aibilling_polar CASCADE');
like($err, qr/WARNING:  dropping extension aibilling_polar drops 4 usage rows/, 'the same of the extension at 1.1');

# A server that does not preload the library says so in a session that has not used it.
$node->append_conf('postgresql.conf', "shared_preload_libraries = ''");
$node->restart;
like(as($super, 'BEGIN; DROP EXTENSION aibilling_polar CASCADE; ROLLBACK'), $words, 'the same without preloading');
$node->safe_psql('postgres', q{
CREATE DATABASE another;
\c another
SET ROLE installer;
CREATE EXTENSION aibilling_polar;
CREATE SERVER polar FOREIGN DATA WRAPPER polar OPTIONS (environment 'sandbox');
SELECT aibilling.create_usage_table('usage', 'polar');
INSERT INTO usage (provider, model, external_customer_id, provider_cost) VALUES ('p', 'm', 'c', 1);
RESET ROLE;
ALTER TABLE usage OWNER TO CURRENT_USER;});
($rc, $out, $err) = $node->psql('another', 'BEGIN; DROP OWNED BY installer CASCADE; ROLLBACK');
like($err, qr/WARNING:  dropping extension aibilling_polar drops 1 usage rows/, 'DROP OWNED of who installed it');
$node->safe_psql('another', 'DELETE FROM usage');
($rc, $out, $err) = $node->psql('another', 'DROP EXTENSION aibilling_polar CASCADE');
unlike($err, qr/rows that were not delivered/, 'nothing is said where nothing is lost');
$node->stop;

done_testing();
