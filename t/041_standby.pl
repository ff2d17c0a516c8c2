# A standby has what is in flight and sends nothing, until it is promoted.
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
my $primary = new_node('primary', 'app', allows_streaming => 1);

$primary->start;
$primary->safe_psql('postgres', 'CREATE DATABASE app');
set_up($primary, 'app', $polar, "batch_size '5', max_in_flight '1'");
is(value($primary, 'app', 'SELECT status FROM aibilling.status') =~ /^paused/ ? 'paused' : 'not paused',
	'not paused', 'a fresh install is not paused');
$primary->safe_psql('app', insert('before', 3));
$polar->wait(events => 3);

$primary->backup('base');
my $standby = PostgreSQL::Test::Cluster->new('standby');
$standby->init_from_backup($primary, 'base', has_streaming => 1);
$standby->start;

# Stored, but the answer never comes; more rows wait behind.
$polar->fault(kind => 'hang', store => JSON::PP::true, times => 'always');
$primary->safe_psql('app', insert('hanging', 12));
my $arrived = $polar->wait(hung => 1)->{arrived};
$primary->wait_for_catchup($standby);

is(value($standby, 'app', "SELECT sum(events) FROM aibilling.delivery WHERE state = 'sending'"),
	'5', 'the standby has what is in flight');
is(value($standby, 'app', 'SELECT count(*) FROM aibilling.outbox'), '7', 'and what waits');
is( value($standby, 'app', "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'aibilling_polar worker'"),
	'0', 'but no worker');
like(value($standby, 'app', 'SELECT status FROM aibilling.status'),
	qr/^no worker: this server is a standby/, 'and says why');
my ($status, undef, $stderr) = $standby->psql('app', 'CALL aibilling.sync()');
isnt($status, 0, 'sync() fails on a standby');
like($stderr, qr/ERROR:  cannot execute UPDATE in a read-only transaction/, 'for the reason that it is one');
is($polar->summary->{arrived}, $arrived, 'nothing was sent by it');

$primary->stop('immediate');
$polar->clear_faults;
$polar->release;
$standby->promote;
wait_delivered($standby, 'app', 'promotion starts sending');
is($polar->summary->{stored}, 15, 'every row is stored, once');
is( value($standby, 'app', 'SELECT sum(duplicates), sum(unexpected_duplicates) FROM aibilling.delivery'),
	'5|0', 'those in flight were found to be there');
$standby->safe_psql('app', insert('after', 2));
$polar->wait(events => 17);
wait_delivered($standby, 'app', 'it goes on as primary');
$standby->stop;

done_testing();
