# What went wrong with others that did this (doc/peers.md), as far as no other test looks at it.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use AibillingNode;
use Fcntl;
use File::Basename;
use IO::Socket::INET;
use POSIX qw(mkfifo);
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
		$node->poll_query_until('postgres', "SELECT state_change > '$seen' AND state = 'idle' FROM $worker");
		$seen = sql("SELECT state_change FROM $worker");
	}
	return;
}

my $began = sql('SELECT pg_postmaster_start_time()');

# --- a database that cannot be connected to, or is not there ------------------------

sql('CREATE DATABASE closed ALLOW_CONNECTIONS false');
my $log = $node->log_offset;
$node->wait_for_log(qr/FATAL:  database "closed" is not currently accepting connections/, $log);
$node->wait_for_log(qr/WARNING:  aibilling_polar worker waits for database "missing"/);
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
			$node->poll_query_until('postgres', "SELECT failures > 0 FROM aibilling.server_state WHERE server = 'nobody'");
			sql("SELECT aibilling.resume('nobody')");
		}
		$node->poll_query_until('postgres', "SELECT failures > 0 FROM aibilling.server_state WHERE server = 'nobody'");

		# Files of the database are kept open by PostgreSQL.
		my $data = $node->data_dir;
		return scalar(grep { !/^\Q$data\E/ } map { readlink($_) // () } glob "/proc/$pid/fd/*");
	};
	$pid = $node->worker_pid;
	my $before = $refused->(5);
	cmp_ok($refused->(40), '<=', $before, 'refused connections leave no descriptor behind');
	is($node->worker_pid, $pid, 'nor do they end the worker');
	$node->poll_query_until('postgres', q{SELECT aibilling.detach('unheard', 'discard')}, '');
}

# --- an old snapshot that another session holds --------------------------------------------

my $other = PolarServer->new;
$node->create_server($other, name => 'other', batch_size => 100, requests_per_minute => 0);
$node->create_usage_table('later', 'other');
my $holder = $node->background_psql('postgres');
my $holds = $holder->query_safe('SELECT pg_backend_pid();');
$holder->query_safe('BEGIN ISOLATION LEVEL REPEATABLE READ;');
is($holder->query_safe('SELECT count(*) FROM later;'), '0', 'a snapshot from before all rows');
sql(join ';', map { $node->rows_sql(1000, table => 'later', prefix => "later_${_}_") } 1 .. 10);
sql($node->rows_sql(1, table => 'later', prefix => "single_${_}_")) for 1 .. 20;
$other->wait(events => 10_020);
$node->wait_settled;
is(sql("SELECT backend_xmin IS NOT NULL AND state = 'idle in transaction' FROM pg_stat_activity WHERE pid = $holds"),
	't', 'is still held when they are delivered');
is($holder->query_safe('SELECT count(*) FROM later;'), '0', 'and sees none of them');
is(sql(q{SELECT count(*) FROM aibilling.outbox WHERE usage_table = 'later'::regclass}), '0', 'a new one sees that they have left the outbox');
my $requests = $other->summary->{arrived};
$pid = $node->worker_pid;
sql("SELECT pg_terminate_backend($pid, 60000)");
$node->worker_waits($pid);
wait_turns(2);
is($other->summary->{arrived}, $requests, 'a new worker finds none of them to send');
sql($node->rows_sql(1, table => 'later', prefix => 'newest_'));
$other->wait(events => 10_021);
$node->wait_settled;
is($other->summary->{duplicates}, 0, 'and none has been sent twice');
$node->sums_equal($other, 'nor less than once', 'later');
$holder->query_safe('COMMIT;');
$holder->quit;

# --- how rows are found --------------------------------------------------------------------

# By their ids, be the table as small as it is: with gaps and without, for functions that take the
# whole row, again after failures, in halves, and to be priced.
sql(q{CREATE FUNCTION whole(r jsonb) RETURNS jsonb LANGUAGE sql AS $$SELECT pg_catalog.jsonb_build_object('id', r->'id')$$});
$node->create_usage_table('small', 'other');

# Scans of the table as a whole, and by an index.
sub scans
{
	# A worker that ends has counted all of its own.
	my $worker = $node->worker_pid;
	sql("SELECT pg_terminate_backend($worker, 60000)");
	$node->worker_pid;
	return split /\|/, sql(q{SELECT seq_scan, idx_scan FROM pg_stat_all_tables WHERE relid = 'small'::regclass});
}

sub wait_delivered
{
	my ($rows) = @_;

	$node->poll_query_until('postgres', "SELECT delivered = $rows FROM aibilling.status WHERE usage_table = 'small'::regclass");
	return;
}

my @before = scans();
$other->fault(kind => '503');
$other->fault(kind => '413', min_events => 20, times => 2);
$node->insert_rows(40, table => 'small', prefix => 'small_');
$other->wait(status => 503, count => 1);
wait_delivered(40);
$other->fault(kind => 'poison', external_ids => ['gaps_1_3'], status => 422, index => \0);
sql(join "; SELECT count(nextval(pg_get_serial_sequence('small', 'id'))) FROM generate_series(1, 100); ",
	map { $node->rows_sql(10, table => 'small', prefix => "gaps_${_}_") } 1 .. 3);
wait_delivered(69);
is(sql(q{SELECT count(*) FROM aibilling.outbox WHERE usage_table = 'small'::regclass AND state = 'rejected'}), '1', 'one row is refused');
sql(q{ALTER SERVER other OPTIONS (ADD metadata_function 'public.whole')});
$node->insert_rows(10, table => 'small', prefix => 'whole_');
wait_delivered(79);
$node->psql('postgres', q{INSERT INTO small (provider, model, external_customer_id, input_tokens) SELECT 'acme', 'held', 'c', 1 FROM generate_series(1, 10)});
sql(q{INSERT INTO aibilling.price (provider, model, input) VALUES ('acme', 'held', 1)});
wait_delivered(89);
my @after = scans();
is($after[0], $before[0], 'delivery never scans a usage table as a whole');
cmp_ok($after[1], '>', $before[1], 'but by an index');

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
	$node->poll_query_until('postgres', "SELECT pg_terminate_backend(pid) FROM $worker");
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
$_->stop foreach $polar, $other;

# --- a name whose look-up does not end ---------------------------------------------------------

SKIP:
{
	skip 'another library is preloaded', 12 if $ENV{AIBILLING_POSTGRES};
	my $dir = $PostgreSQL::Test::Utils::tmp_check;
	my $pipe = "$dir/held_names";
	my $source = dirname(__FILE__) . '/held_names.c';
	skip 'no C compiler, or no openssl', 12
	  if system("cc -shared -fPIC -O1 -o '$dir/held_names.so' '$source' -ldl >/dev/null 2>&1") != 0
	  || system('openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=polar.held'
		  . " -addext subjectAltName=DNS:polar.held -out '$dir/held.pem' -keyout '$dir/held.key' 2>/dev/null") != 0;
	mkfifo($pipe, 0600) or die "$pipe: $!";
	local $ENV{LD_PRELOAD} = "$dir/held_names.so";
	local $ENV{HELD_NAMES} = $pipe;

	my $held = PolarServer->new(tls_cert => "$dir/held.pem", tls_key => "$dir/held.key");
	my $near = PolarServer->new;
	$node = AibillingNode->new('names', conf => "aibilling_polar.poll_interval = 1\n");
	$node->create_server($held, name => 'held', url => 'https://polar.held:' . $held->port, ca_file => "$dir/held.pem");
	$node->create_server($near);
	$node->create_usage_table('far', 'held');
	$node->create_usage_table;
	sql('CREATE DATABASE victim');

	# By the worker.
	my $seen = $node->log_offset;
	$pid = $node->worker_pid;
	$node->insert_rows(3, table => 'far', prefix => 'far_');
	ok($node->wait_for_log(qr/\[$pid\] looks up polar\.held/, $seen), 'the worker looks up a name');
	$node->insert_rows(1, prefix => 'near_');
	$near->wait(events => 1);
	pass('another server is not held up');
	sql('DROP DATABASE victim');
	pass('nor is DROP DATABASE');
	is(sql("SELECT pg_terminate_backend($pid, 60000)"), 't', 'nor the end of the worker');
	ok($node->wait_for_log(qr/\[(?!$pid\b)\d+\] looks up polar\.held/, $seen), 'the next one looks it up');
	$node->stop('fast');
	pass('nor is a shutdown');

	# By a session.
	$node->append_conf('postgresql.conf', "aibilling_polar.databases = ''");
	$node->start;
	my $session = $node->background_psql('postgres', on_error_stop => 0);
	my $backend = $session->query_safe('SELECT pg_backend_pid();');
	my $sync = sub {
		$seen = $node->log_offset;
		sql('SELECT aibilling.resume()');
		$session->query_until(qr/begun/, "\\echo begun\nCALL aibilling.sync();\n");
		ok($node->wait_for_log(qr/\[$backend\] looks up polar\.held/, $seen), 'sync() looks it up');
	};
	$sync->();
	sql("SELECT pg_cancel_backend($backend)");
	is($session->query('SELECT pg_backend_pid();'), $backend, 'a cancel ends it, and not its session');
	like($session->{stderr}, qr/canceling statement due to user request/, 'by an error');
	$session->{stderr} = '';
	$sync->();
	is(sql("SELECT pg_terminate_backend($backend, 60000)"), 't', 'the end of its session ends it');
	eval { $session->quit };

	# Until now nobody has been told where it is.
	is($held->summary->{arrived}, 0, 'no look-up has ended');
	sysopen(my $end, $pipe, O_RDWR) or die "$pipe: $!";
	unlink $pipe;
	close $end;
	sql('SELECT aibilling.resume(); CALL aibilling.sync()');
	$node->sums_equal($held, 'once it has, all is delivered', 'far');
	$node->stop;
	$_->stop foreach $held, $near;
}

done_testing();
