# Copies of a database, by dump and restore, by template, by renaming: one sends, the others say that they are copies.
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

my $polar = PolarServer->new;
my $node = new_node('copies', 'restored, copied');
my $dump = $node->basedir . '/source.dump';

$node->start;
$node->safe_psql('postgres', 'CREATE DATABASE source');
set_up($node, 'source', $polar);
fill($node, 'source', 'source');
is(places($node, 'source'), 'pending 2, rejected 1, unpriced 1', 'the source has something of everything');
my $had = value($node, 'source', $everything);
my $arrived = $polar->wait(events => 3)->{arrived};

my %copies = (
	restored => sub {
		$node->safe_psql('postgres', 'CREATE DATABASE restored TEMPLATE template0');
		$node->command_ok([ 'pg_dump', '-Fc', '-d', $node->connstr('source'), '-f', $dump ],
			'pg_dump');
		$node->command_ok(
			[ 'pg_restore', '--exit-on-error', '-d', $node->connstr('restored'), $dump ],
			'pg_restore');
	},
	copied => sub { $node->safe_psql('postgres', 'CREATE DATABASE copied TEMPLATE source') });
my $expected = 3;
foreach my $name ('restored', 'copied')
{
	$copies{$name}->();
	is(value($node, $name, $everything), $had, "$name: everything is kept");
	wait_for_turn($node, $name);
	like(value($node, $name, 'SELECT status FROM aibilling.status'), $copy_is_paused, "$name: paused, and says so");
	$node->safe_psql($name, insert($name, 1));
	wait_for_turn($node, $name);
	my ($status, undef, $stderr) = $node->psql($name, 'CALL aibilling.sync()');
	isnt($status, 0, "$name: sync() refuses");
	like($stderr, qr/this database is a copy and does not send.*SELECT aibilling\.arm\(\)/s, "$name: and says how to go on");
	is($polar->summary->{arrived}, $arrived, "$name: nothing is sent");

	$node->safe_psql($name, 'SELECT aibilling.arm()');
	wait_delivered($node, $name, "$name: sends once armed");
	is(places($node, $name), 'rejected 1, unpriced 1', "$name: the others wait as they did");
	is(value($node, $name, 'SELECT status FROM aibilling.status') =~ /^idle/ ? 1 : 0, 1, "$name: idle");

	# The second copy finds there what the first one has sent.  It may have been sent before it
	# was copied, so that this is no surprise.
	$expected += $name eq 'restored' ? 3 : 1;
	is($polar->summary->{stored}, $expected, "$name: every row is stored, once");
	is( value($node, $name, 'SELECT sum(duplicates), sum(unexpected_duplicates) FROM aibilling.delivery'),
		$name eq 'restored' ? '0|0' : '2|0', "$name: what the original may have sent is told as duplicates");
	$arrived = $polar->summary->{arrived};

	# A price arrives in the copy too.
	$node->safe_psql($name, "INSERT INTO aibilling.price (provider, model, input) VALUES ('nobody', 'nothing', 1)");
	$expected++ if $name eq 'restored';
	wait_for_turn($node, $name);
	$node->poll_query_until($name, "SELECT NOT EXISTS (SELECT FROM aibilling.outbox WHERE state = 'unpriced')");
	wait_delivered($node, $name, "$name: a price releases what waited for it");
	$arrived = $polar->summary->{arrived};
}
is($polar->summary->{stored}, $expected, 'all copies together have stored each row once');

# A database that is only renamed is the same one.
$node->safe_psql('postgres', 'ALTER DATABASE source RENAME TO renamed');
$node->safe_psql('renamed', insert('renamed', 1));
$node->safe_psql('renamed', 'CALL aibilling.sync()');
is(stored($polar)->{'renamed-1'}, 1, 'a renamed database sends');

# Nor is one paused from which the extension was dropped: it is as good as new.
$node->safe_psql('postgres', 'CREATE DATABASE copy2 TEMPLATE renamed');
$node->safe_psql('copy2', 'SET client_min_messages = error; DROP EXTENSION aibilling_polar CASCADE; DROP TABLE usage');
set_up($node, 'copy2', $polar);
$node->safe_psql('copy2', insert('anew', 1));
$node->safe_psql('copy2', 'CALL aibilling.sync()');
is(stored($polar)->{'anew-1'}, 1, 'an extension installed anew in a copy sends');

$node->safe_psql('postgres', 'DROP DATABASE restored WITH (FORCE)');
is(value($node, 'postgres', "SELECT count(*) FROM pg_database WHERE datname = 'restored'"),
	'0', 'a database with a worker can be dropped by force');
$node->stop;

done_testing();
