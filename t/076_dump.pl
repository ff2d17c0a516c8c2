# Dumps by those who take them: all of it or an error, never less without a word.

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
my $node = AibillingNode->new('main', databases => 'postgres, restored', conf => "aibilling_polar.poll_interval = 1\n");
$node->create_server($polar);
$node->create_usage_table;
$node->safe_psql('postgres', q{
CREATE ROLE owner LOGIN;
CREATE ROLE backup LOGIN;
GRANT pg_read_all_data TO backup;
CREATE ROLE monitor LOGIN;
GRANT pg_monitor TO monitor;
ALTER DATABASE postgres OWNER TO owner;
ALTER TABLE usage OWNER TO owner;
GRANT USAGE ON FOREIGN SERVER polar TO owner;
SET ROLE owner;
INSERT INTO usage (external_id, provider, model, external_customer_id, input_tokens) VALUES ('waits', 'no', 'price', 'c', 1);
INSERT INTO usage (external_id, provider_cost) VALUES ('rejected', 1);});
$node->insert_rows(5);
$node->wait_settled;
$node->safe_psql('postgres', q{
SELECT aibilling.pause();
INSERT INTO aibilling.price (provider, model, input, output) VALUES ('p', 'm', 1, 2);});
$node->insert_rows(3, from => 10);

# What must be in a dump, as a superuser sees it.
my $content = q{
SELECT 'rows', count(*), sum(cost_nanos) FROM usage;
SELECT 'outbox', state, count(*) FROM aibilling.outbox GROUP BY 2 ORDER BY 2;
SELECT 'delivery', state, events, usage_ids, inserted FROM aibilling.delivery ORDER BY id;
SELECT 'attached', usage, server FROM aibilling.usage_table;
SELECT 'paused', server, paused FROM aibilling.server_state;
SELECT 'identity', count(*) FROM aibilling.database_identity;
SELECT 'prices', count(*) FROM aibilling.price;};
my $whole = $node->safe_psql('postgres', $content);
like($whole, qr/^rows\|10.*outbox\|pending\|3.*outbox\|rejected\|1.*outbox\|unpriced\|1.*delivery\|delivered\|5.*attached\|usage\|polar.*paused\|polar\|operator/s,
	'there is something of everything');

my $user = $node->safe_psql('postgres', 'SELECT current_user');
my $n = 0;

# Returns the dump's file, and what pg_dump says.
sub dump_as
{
	my ($role, @options) = @_;
	my $file = $node->basedir . '/dump' . ++$n;
	my ($out, $err) = ('', '');

	IPC::Run::run([ 'pg_dump', '-Fc', '-U', $role, '-d', $node->connstr('postgres'), '-f', $file, @options ],
		'>', \$out, '2>', \$err);
	return ($? == 0, $file, $err);
}

# A dump restored by a superuser holds all of it, and sends what it is to send after arm().
sub is_whole
{
	my ($file, $what) = @_;

	$node->safe_psql('postgres', 'DROP DATABASE IF EXISTS restored WITH (FORCE)');
	$node->safe_psql('postgres', 'CREATE DATABASE restored');
	command_ok([ 'pg_restore', '--exit-on-error', '-U', $user, '-d', $node->connstr('restored'), $file ], "$what is restored");
	is($node->safe_psql('restored', $content), $whole, "$what holds all of it");
	like($node->safe_psql('restored', 'SELECT status FROM aibilling.status'), qr/^paused: this database is a copy/,
		"$what sends nothing by itself");
	return;
}

foreach my $role ($user, 'backup')
{
	foreach my $options ([], ['--enable-row-security'])
	{
		my $what = "pg_dump by $role @$options";
		my ($ok, $file, $err) = dump_as($role, @$options);

		ok($ok, $what) || diag($err);
		is_whole($file, $what) if $ok;
	}
}

# Who may not read all of it gets an error, whatever the options; doc/delivery.md says what to grant.
foreach my $role ('owner', 'monitor')
{
	foreach my $options ([], ['--enable-row-security'])
	{
		my ($ok, $file, $err) = dump_as($role, @$options);

		ok(!$ok, "pg_dump by $role @$options fails");
		like($err, qr/permission denied for (table|sequence) \w+|failed to get data for sequence "\w+"; user may lack SELECT privilege/, 'and names what it cannot read');
	}
}
$node->safe_psql('postgres', 'GRANT pg_read_all_data TO owner');
my ($ok, $file, $err) = dump_as('owner');
ok($ok, "with pg_read_all_data the database's owner dumps it, too") || diag($err);
is_whole($file, "the owner's dump");

# After arm() what waits is sent, and what was delivered is known.
my $before = $polar->summary->{stored};
$node->safe_psql('restored', 'SELECT aibilling.arm(), aibilling.resume()');
$polar->wait(events => $before + 3);
$node->poll_query_until('restored', q{SELECT NOT EXISTS (SELECT FROM aibilling.outbox WHERE state = 'pending')});
is($node->safe_psql('restored', q{SELECT (aibilling.usage_status('usage', id)).state FROM usage WHERE external_id = 'row_1'}),
	'delivered', 'what was delivered is known to be');
is($polar->summary->{stored}, 8, 'nothing twice');
$node->stop;

done_testing();
