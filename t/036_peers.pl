# What went wrong with others that did this (doc/peers.md), as far as no other test looks at it.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use AibillingNode;
use IO::Socket::INET;
use PolarServer;
use PostgreSQL::Test::Utils;
use Test::More;

my $polar = PolarServer->new;
my $node = AibillingNode->new(
	'peers',
	databases => 'postgres, closed, missing',
	conf => "aibilling_polar.poll_interval = 1\nautovacuum = off\nlog_min_messages = info\n");
my $worker = "pg_stat_activity WHERE backend_type = 'aibilling_polar worker' AND datname = 'postgres'";

sub sql
{
	my ($sql) = @_;
	return $node->safe_psql('postgres', $sql);
}

# Wait until the worker has made some more turns and rests.
sub wait_turns
{
	my ($turns) = @_;
	my $seen = sql("SELECT state_change FROM $worker");

	for (1 .. $turns)
	{
		$node->poll_query_until('postgres', "SELECT state_change > '$seen' AND state = 'idle' FROM $worker")
		  or die 'no turn of the worker';
		$seen = sql("SELECT state_change FROM $worker");
	}
	return;
}

my $began = sql('SELECT pg_postmaster_start_time()');

# --- a database that cannot be connected to, or is not there ------------------------

sql('CREATE DATABASE closed');
sql('ALTER DATABASE closed ALLOW_CONNECTIONS false');
my $log = $node->log_offset;
$node->wait_for_log(qr/FATAL:  database "closed" is not currently accepting connections/, $log);
$node->wait_for_log(qr/FATAL:  database "missing" does not exist/, $log);
pass('workers of databases that do not take them end');

# --- what another has put in our schema's place ----------------------------------------

sql('DROP EXTENSION aibilling_polar; CREATE SCHEMA aibilling; CREATE TABLE aibilling.outbox_entry (a int);'
	  . ' CREATE TABLE aibilling.database_identity (a int); CREATE TABLE aibilling.usage_table (usage text)');
my $pid = $node->worker_pid;
wait_turns(3);
is($node->worker_pid, $pid, 'a schema of our name that is not ours does not concern the worker');
sql('DROP SCHEMA aibilling CASCADE; CREATE EXTENSION aibilling_polar');

# --- idle ------------------------------------------------------------------------------

$node->create_server($polar, requests_per_minute => 0);
$node->create_usage_table;
$node->insert_rows(10);
$node->wait_settled;
wait_turns(2);
my $wal = sql('SELECT pg_current_wal_insert_lsn()');
wait_turns(3);
is(sql('SELECT pg_current_wal_insert_lsn()'), $wal, 'an idle worker writes no WAL when it polls');
is(sql("SELECT application_name || ', ' || state || ', ' || wait_event_type || ', ' || (backend_xmin IS NULL) FROM $worker"),
	'aibilling_polar worker, idle, Extension, true', 'and is seen to be idle');
is(sql("SELECT count(*) FROM pg_locks WHERE pid = (SELECT pid FROM $worker) AND relation IS NOT NULL"), '0', 'it has no table locked');

# --- one request after the other, and more rows than are worth counting ----------------

my $connections = $polar->summary->{connections};
for my $i (1 .. 5)
{
	$node->insert_rows(1, prefix => "next_${i}_");
	$polar->wait(events => 10 + $i);
	$node->wait_settled;
}
is($polar->summary->{connections}, $connections, 'a connection is used again');

sql("SELECT aibilling.pause()");
$node->create_usage_table('large');
$node->insert_rows(100_000, table => 'large', prefix => 'large_');
my $counted = "SELECT pending, pending_estimated FROM aibilling.status WHERE usage_table = 'large'::regclass";
is(sql($counted), '100000|f', 'status counts up to 100,000 rows');
$node->insert_rows(30_000, table => 'large', prefix => 'larger_');
is(sql("SELECT pending BETWEEN 110000 AND 150000, pending_estimated FROM ($counted) s"), 't|t', 'and estimates above');
sql("SELECT aibilling.detach('large', 'discard'); SELECT aibilling.resume()");

# --- connections that are refused ------------------------------------------------------

SKIP:
{
	skip 'needs Linux: /proc', 1 unless -d "/proc/$$/fd";

	# A port that was free a moment ago.
	my $socket = IO::Socket::INET->new(Listen => 1, LocalAddr => '127.0.0.1') or die "no socket: $!";
	my $port = $socket->sockport;
	$socket->close;
	sql("CREATE SERVER nobody FOREIGN DATA WRAPPER polar OPTIONS (url 'http://127.0.0.1:$port', event_name 'e');"
		  . " CREATE USER MAPPING FOR PUBLIC SERVER nobody OPTIONS (access_token 't')");
	$node->create_usage_table('unheard', 'nobody');
	$node->insert_rows(1, table => 'unheard', prefix => 'unheard_');

	my $refused = sub {
		for (1 .. $_[0])
		{
			$node->poll_query_until('postgres', "SELECT failures > 0 FROM aibilling.server_state WHERE server = 'nobody'")
			  or die 'no connection was refused';
			sql("SELECT aibilling.resume('nobody')");
		}
		$node->poll_query_until('postgres', "SELECT failures > 0 FROM aibilling.server_state WHERE server = 'nobody'");

		# Files of the database are kept open by PostgreSQL.
		my $data = $node->data_dir;
		return scalar(grep { !/^\Q$data\E/ } map { readlink($_) // () } glob "/proc/$pid/fd/*");
	};
	$pid = $node->worker_pid;
	my $before = $refused->(5);
	is($refused->(40), $before, 'refused connections leave no descriptor behind');
	is($node->worker_pid, $pid, 'nor do they end the worker');
	sql(q{SELECT aibilling.detach('unheard', 'discard')});
}

# --- a peer that takes the connection and says nothing -----------------------------------

my $mute = IO::Socket::INET->new(Listen => 5, LocalAddr => '127.0.0.1') or die "no socket: $!";
sql(sprintf("CREATE SERVER mute FOREIGN DATA WRAPPER polar OPTIONS (url 'https://127.0.0.1:%d', event_name 'e', timeout '10min');"
		  . " CREATE USER MAPPING FOR PUBLIC SERVER mute OPTIONS (access_token 't')", $mute->sockport));
$node->create_usage_table('told', 'mute');
$node->insert_rows(1, table => 'told', prefix => 'told_');
my $connection = $mute->accept or die "nobody came: $!";
$node->insert_rows(1, prefix => 'meanwhile_');
$polar->wait(events => 16);
pass('a TLS handshake that hangs does not hold up another server');
$pid = $node->worker_pid;
sql('CREATE DATABASE victim');
sql('DROP DATABASE victim');
pass('nor CREATE or DROP DATABASE');
is(sql("SELECT pg_terminate_backend($pid, 60000)"), 't', 'nor the end of the worker');
$connection = $mute->accept or die "nobody came again: $!";
is(sql("SELECT attempts FROM aibilling.delivery WHERE usage_table = 'told'::regclass"), '2', 'the next one tries again');

# --- the end of a worker that has just begun ----------------------------------------------

for my $round (1 .. 3)
{
	$node->restart;
	$node->poll_query_until('postgres', "SELECT pg_terminate_backend(pid) FROM $worker") or die 'no worker';
}
sql("SELECT aibilling.pause('mute')");
my $restarted = sql('SELECT pg_postmaster_start_time()');
$node->insert_rows(1, prefix => 'afterwards_');
$polar->wait(events => 17);
pass('a worker that is ended while it starts is replaced');
is(sql('SELECT pg_postmaster_start_time()'), $restarted, 'the server has gone on');
unlike(slurp_file($node->logfile), qr/terminated by signal|all server processes terminated|PANIC/, 'nothing has crashed');
cmp_ok($began, 'lt', $restarted, 'but for the restarts');

$node->stop;
$polar->stop;

done_testing();
