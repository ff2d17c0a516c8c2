# The worker and sync(): what they hold while a request is in flight, how they
# end, and what the next one makes of what they leave.
use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use AibillingNode;
use PolarServer;
use PostgreSQL::Test::Utils;
use Test::More;

plan skip_all => 'needs python3' unless PolarServer->python;

my $polar = PolarServer->new;
my $node = AibillingNode->new('main',
	extension => 0,
	conf => "restart_after_crash = on\naibilling_polar.poll_interval = 1\nlog_statement = none\n");
my $lock = "FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 3";
my $ships = "SELECT array_agg(pid) $lock AND granted";
my $activity = q{SELECT coalesce(xact_start::text, 'none') || ' ' || coalesce(backend_xmin::text, 'none')
	|| ' ' || coalesce(backend_xid::text, 'none')
	|| ' ' || (SELECT count(*) FROM pg_locks l WHERE l.pid = a.pid AND locktype IN ('relation', 'tuple'))
	FROM pg_stat_activity a WHERE };

# A statement in a session of its own, begun but perhaps not ended.
sub start_statement
{
	my ($node, $sql, $db) = @_;
	my $session = $node->background_psql($db // 'postgres', on_error_stop => 0);
	my $pid = $session->query_safe('SELECT pg_backend_pid();');

	$session->query_until(qr/begun/, "\\echo begun\n$sql;\n\\echo ended\n");
	$session->{abp_pid} = $pid;
	return $session;
}

# Returns what it has said.
sub wait_ended
{
	my ($session) = @_;

	# This runs after the statement before it.  What was said meanwhile would
	# be taken for errors of what comes next.
	$session->query('SELECT 1;');
	my $said = $session->{stderr};
	$session->{stderr} = '';
	return $said;
}

# --- without the extension ------------------------------------------------------

my $pid = $node->worker_waits;
my $offset = $node->log_offset;
$node->safe_psql('postgres', 'CREATE TABLE unrelated (a int)');
$node->reload;
is($node->worker_waits, $pid, 'a worker without the extension sleeps');
unlike($node->log_since($offset), qr/WARNING|ERROR|FATAL/, 'and is quiet');
$node->safe_psql('postgres', 'CREATE EXTENSION aibilling_polar');
like(
	$node->safe_psql('postgres', 'SELECT status FROM aibilling.status WHERE usage_table IS NULL'),
	qr/no usage table is attached/,
	'status without a usage table');

$node->create_server($polar, batch_size => 50, timeout => '10min');
$node->create_usage_table;

# --- while a request hangs ------------------------------------------------------

$polar->fault(kind => 'hang', times => 'always');
$node->safe_psql('postgres', 'CREATE DATABASE victim');
$node->insert_rows(10, prefix => 'hang_');
$polar->wait(hung => 1);
is($node->safe_psql('postgres', "$activity pid = $pid"),
	'none none none 0', 'in flight: no transaction, no snapshot, no relation lock');
is($node->safe_psql('postgres', $ships), "{$pid}", 'the worker is the shipper');
is( $node->safe_psql(
		'postgres', q{SELECT (aibilling.usage_status('usage', 1)).state, in_flight, pending FROM aibilling.status}),
	'sending|10|0',
	'the rows are known as being sent');

# No request has come to an end: by an answer, or by its timeout.
sub all_unanswered
{
	my ($what) = @_;
	my $statuses = $polar->summary->{status};

	is(join(' ', grep { $_ ne 'none' } keys %$statuses), '', "$what: the request is not answered yet");
	unlike($node->log_since($offset), qr/timed out/, "$what: nor given up");
	return;
}

$node->safe_psql('postgres', 'DROP DATABASE victim');
is(join(' ', @{ $polar->summary }{ 'arrived', 'hung' }), '1 1', 'DROP DATABASE of another database: the request still hangs');
all_unanswered('DROP DATABASE');

my $limit = $PostgreSQL::Test::Utils::timeout_default * 1000;
is($node->safe_psql('postgres', "SELECT pg_terminate_backend($pid, $limit)"), 't', 'pg_terminate_backend ends the worker');
all_unanswered('pg_terminate_backend');
is($node->safe_psql('postgres', "SELECT count(*) $lock"), '0', 'its lock is gone');
my $second_pid = $node->worker_pid;
isnt($second_pid, $pid, 'another worker starts');
$polar->wait(arrived => 2, hung => 1);

$node->stop('fast');
all_unanswered('a fast shutdown');

$node->start;
$polar->wait(arrived => 3, hung => 1);
$polar->clear_faults;
$polar->release;
$node->wait_settled;
is($polar->summary->{inserted}, 10, 'every row is delivered');
is($node->ledger("state || ' ' || attempts || ' ' || events || ' ' || unexpected_duplicates"),
	'delivered 3 10 0', 'by the third attempt of one delivery');
is( $node->ledger('duplicates + inserted'),
	'10', 'inserted and duplicates account for all');

# --- the worker is killed between answer and settling ------------------------------

# Polar has stored the events; the answer has not come yet.
$polar->fault(kind => 'hang', store => \1);
$pid = $node->worker_waits;
$node->insert_rows(20, prefix => 'stored_');
$polar->wait(hung => 1);
is($polar->summary->{inserted}, 30, 'stored, not answered');
kill 'KILL', $pid;
$node->poll_query_until('postgres',
	"SELECT state = 'delivered' FROM aibilling.delivery ORDER BY id DESC LIMIT 1");
is($polar->summary->{inserted}, 30, 'killed before the answer: none is stored twice');
is( $node->ledger(
		"state || ' ' || inserted || ' ' || duplicates || ' ' || unexpected_duplicates || ' ' || attempts",
		'id = (SELECT max(id) FROM aibilling.delivery)'),
	'delivered 0 20 0 2',
	'the duplicates account for the lost answer');

# The answer is there, but the settling transaction cannot proceed.
$polar->release;
$polar->fault(kind => 'hang');
$pid = $node->worker_waits;
$node->insert_rows(30, prefix => 'settling_');
$polar->wait(hung => 1);
my $locker = $node->background_psql('postgres', on_error_stop => 0);
$locker->query_safe('BEGIN; LOCK TABLE aibilling.delivery IN SHARE ROW EXCLUSIVE MODE;');
$polar->release;
$node->poll_query_until('postgres',
	"SELECT count(*) > 0 FROM pg_locks WHERE pid = $pid AND NOT granted");
is($polar->summary->{inserted}, 60, 'stored and answered');
kill 'KILL', $pid;
eval { $locker->quit };
$node->poll_query_until('postgres',
	"SELECT state = 'delivered' FROM aibilling.delivery ORDER BY id DESC LIMIT 1");
is($polar->summary->{inserted}, 60, 'killed before it settled: none is stored twice');
is( $node->ledger(
		"state || ' ' || inserted || ' ' || duplicates || ' ' || unexpected_duplicates",
		'id = (SELECT max(id) FROM aibilling.delivery)'),
	'delivered 0 30 0',
	'the duplicates account for the answer that was lost');

# The same by a network that loses answers.
$polar->fault(kind => 'drop_after_store');
$node->insert_rows(40, prefix => 'dropped_');
$polar->wait(events => 100, duplicates => 50 + 40);
$node->wait_settled;
$node->sums_equal($polar, 'after all this, usage table and Polar agree to the last digit');
is( $node->ledger('sum(duplicates) || \' \' || sum(unexpected_duplicates)'),
	$polar->summary->{duplicates} . ' 0',
	'ledger and Polar agree on duplicates, all of them expected');

# --- worker and sync() at once -----------------------------------------------------

my $duplicates = $polar->summary->{duplicates};
my $events = $polar->summary->{inserted};
$pid = $node->worker_waits;
$polar->fault(kind => 'hang');
$node->insert_rows(10, prefix => 'both_');
$polar->wait(hung => 1);
my $sync = start_statement($node, 'CALL aibilling.sync()');
$node->poll_query_until('postgres',
	"SELECT wait_event_type = 'Extension' FROM pg_stat_activity WHERE pid = $sync->{abp_pid}");
is($node->safe_psql('postgres', $ships), "{$pid}", 'the worker still is the shipper');
$node->insert_rows(10, prefix => 'both_', from => 11);
$polar->release;
wait_ended($sync);
$sync->quit;
is($node->safe_psql('postgres', q{SELECT count(*) FROM usage u
	WHERE external_id LIKE 'both%' AND id <= (SELECT max(id) - 10 FROM usage)
	AND (aibilling.usage_status('usage', id)).state <> 'delivered'}),
	'0', 'sync() returns when what was pending is delivered');
my @sessions = map { $node->background_psql('postgres') } 1 .. 3;
foreach my $round (1 .. 10)
{
	$node->insert_rows(7, prefix => "round_${round}_");
	$_->query_until(qr/begun/, "\\echo begun\nCALL aibilling.sync();\n") foreach @sessions;
	wait_ended($_) foreach @sessions;
}
$_->quit foreach @sessions;
$node->wait_settled;
is($polar->summary->{inserted}, $events + 20 + 70, 'everything is delivered');
is($polar->summary->{duplicates}, $duplicates, 'and nothing sent twice');
is($node->safe_psql('postgres', $ships), "{$pid}", 'by the worker alone');

# What was in flight when it was called comes back, and is not delivered.
$polar->fault(kind => 'hang');
$node->insert_rows(3, prefix => 'back_');
$polar->wait(hung => 1);
$sync = start_statement($node, 'CALL aibilling.sync()');
$node->poll_query_until('postgres',
	"SELECT wait_event_type = 'Extension' FROM pg_stat_activity WHERE pid = $sync->{abp_pid}");
$polar->tokens(token => $polar->token, status => 'revoked');
$polar->release;
like(wait_ended($sync), qr/WARNING:  aibilling\.sync\(\) stopped before everything was delivered: the server does not accept events/,
	'sync() tells of it');
$sync->quit;
$polar->tokens(token => $polar->token, status => 'active');
$node->safe_psql('postgres', 'SELECT aibilling.resume()');
$node->wait_settled;

# --- nobody can take the shipper's lock ---------------------------------------------

my $db_oid = $node->safe_psql('postgres', "SELECT oid FROM pg_database WHERE datname = 'postgres'");
$node->safe_psql('postgres', 'CREATE ROLE evil LOGIN');
my $evil = $node->background_psql('postgres', extra_params => [ '-U', 'evil' ]);
is($evil->query_safe('SELECT current_user;'), 'evil', 'a role without rights');
foreach my $key ('0', '0::bigint', "$db_oid", '3', '-1')
{
	$evil->query_safe("SELECT pg_advisory_lock($key);");
	$evil->query_safe("SELECT pg_advisory_lock_shared($key);");
	foreach my $other (0, 3, $db_oid)
	{
		$evil->query_safe("SELECT pg_advisory_lock(($key)::int, $other);");
		$evil->query_safe("SELECT pg_advisory_lock($other, ($key)::int);");
	}
}
$evil->query_safe('BEGIN; SELECT pg_advisory_xact_lock(0), pg_advisory_xact_lock(0, 0);');
$node->safe_psql('postgres', "SELECT pg_terminate_backend($pid, 60000)");
$pid = $node->worker_waits($pid);
$node->insert_rows(5, prefix => 'evil_');
$node->wait_settled;
is($node->safe_psql('postgres', $ships), "{$pid}",
	'a new worker becomes the shipper while a role holds every advisory lock of SQL');
$evil->quit;

# A user's function runs inside the shipper; it cannot give the lock away.
$node->safe_psql(
	'postgres', q{
CREATE FUNCTION unlock(r jsonb) RETURNS jsonb LANGUAGE plpgsql AS
$$BEGIN PERFORM pg_advisory_unlock_all(), pg_advisory_unlock(0), pg_advisory_unlock(0, 0); RETURN '{"unlocked": true}'; END$$;
ALTER SERVER polar OPTIONS (ADD metadata_function 'public.unlock')});
$polar->fault(kind => 'hang');
$node->insert_rows(5, prefix => 'unlock_');
$polar->wait(hung => 1);
is($node->safe_psql('postgres', $ships), "{$pid}", 'pg_advisory_unlock_all() does not reach the lock');
$polar->release;
$node->wait_settled;
is((grep { $_->{external_id} eq 'unlock_1' } $polar->events)[0]{event}{metadata}{unlocked},
	1, 'the function was called');
$node->safe_psql('postgres', 'ALTER SERVER polar OPTIONS (DROP metadata_function)');

# --- DROP and CREATE EXTENSION --------------------------------------------------------

sub create_again
{
	$node->safe_psql('postgres', 'CREATE EXTENSION aibilling_polar');
	$node->create_server($polar);
	$node->safe_psql('postgres', "SELECT aibilling.attach('usage', 'polar')");
	return;
}

$pid = $node->worker_waits;
$offset = $node->log_offset;
$node->safe_psql('postgres', 'DROP EXTENSION aibilling_polar CASCADE');
$node->insert_rows(1, prefix => 'meanwhile_');
create_again();
$node->insert_rows(5, prefix => 'again_');
$node->wait_settled;

$polar->fault(kind => 'hang', store => \1);
$node->insert_rows(5, prefix => 'midflight_');
$polar->wait(hung => 1);
$node->safe_psql('postgres', 'DROP EXTENSION aibilling_polar CASCADE');
$polar->release;
create_again();
$node->insert_rows(5, prefix => 'after_');
$node->wait_settled;

# In one transaction, and while the worker works.
foreach my $round (1 .. 15)
{
	$node->insert_rows(100, prefix => "burst_${round}_");
	$node->safe_psql('postgres', 'BEGIN; DROP EXTENSION aibilling_polar CASCADE; CREATE EXTENSION aibilling_polar; COMMIT');
	$node->create_server($polar);
	$node->safe_psql('postgres', "SELECT aibilling.attach('usage', 'polar')");
}
$node->insert_rows(5, prefix => 'last_');
$node->wait_settled;
is($node->worker_waits, $pid, 'the worker survives DROP and CREATE EXTENSION');
unlike($node->log_since($offset), qr/(ERROR|FATAL|PANIC):/, 'without an error');
my %stored = map { $_->{external_id} => 1 } $polar->events;
is(scalar(grep { /^(again|after|midflight|last)_/ } keys %stored), 20,
	'and delivers what is attached');
ok(!$stored{meanwhile_1}, 'and not what came in without it');

# --- a database that is not listed ----------------------------------------------------

$node->safe_psql('postgres', 'CREATE DATABASE unlisted');
$node->safe_psql(
	'unlisted', q{CREATE EXTENSION aibilling_polar;
CREATE SERVER polar FOREIGN DATA WRAPPER polar OPTIONS (url '} . $polar->url . q{', event_name 'e', access_token_file '}
	  . $node->token_file($polar->token) . q{');
SELECT aibilling.create_usage_table('usage', 'polar')});
is($node->safe_psql('unlisted', 'SELECT status FROM aibilling.status'),
	'no worker: aibilling_polar.databases does not name "unlisted"; deliver with CALL aibilling.sync()',
	'status of a database that is not listed');
$node->safe_psql('unlisted', $node->rows_sql(3, prefix => 'unlisted_') . '; CALL aibilling.sync()');
is(scalar(grep { $_->{external_id} =~ /^unlisted_/ } $polar->events), 3, 'sync() delivers there');
$node->stop;

# --- not preloaded ----------------------------------------------------------------------

$polar->reset;
my $bare = AibillingNode->new('bare', preload => 0);
$bare->create_server($polar, batch_size => 10, timeout => '10min');
$bare->create_usage_table;
$bare->insert_rows(25);
like($bare->status, qr/^no worker: the library is not preloaded.*aibilling\.sync/,
	'status without preloading');
is($bare->safe_psql('postgres', 'SELECT worker_pid IS NULL, pending FROM aibilling.status'),
	't|25', 'no worker, all pending');
my ($rc, $out, $err) = $bare->psql('postgres', 'CALL aibilling.sync()');
is($rc, 0, 'sync() delivers');
like($err, qr/delivered 25 events/, 'and says so');
$bare->sums_equal($polar, 'all and to the last digit');
like($bare->status, qr/not preloaded/, 'status still says that there is no worker');

foreach my $sql ('BEGIN; CALL aibilling.sync(); COMMIT',
	'CREATE PROCEDURE inner_call() LANGUAGE plpgsql SET work_mem = 1024 AS $$BEGIN CALL aibilling.sync(); END$$; CALL inner_call()')
{
	($rc, $out, $err) = $bare->psql('postgres', "\\set VERBOSITY verbose\n$sql");
	isnt($rc, 0, 'sync() in a transaction that is not its own fails');
	like($err, qr/ERROR:  2D000:.*\n(.*\n)*?HINT:  /, 'with 2D000 and a hint');
}

# In flight, in a session.
$polar->fault(kind => 'hang', times => 'always');
$bare->insert_rows(5, prefix => 'session_');
$sync = start_statement($bare, 'CALL aibilling.sync()');
$polar->wait(hung => 1);
is( $bare->safe_psql(
		'postgres', qq{SELECT coalesce(backend_xmin::text, 'none'), coalesce(backend_xid::text, 'none'),
	(SELECT count(*) FROM pg_locks l WHERE l.pid = a.pid AND locktype IN ('relation', 'tuple'))
	FROM pg_stat_activity a WHERE pid = $sync->{abp_pid}}),
	'none|none|0',
	'sync() in flight has no xmin, no xid and no relation lock');
is($bare->safe_psql('postgres', $ships), "{$sync->{abp_pid}}", 'its session is the shipper');

# Another one waits for it, and gives up at its timeout, having sent nothing.
my $arrived = $polar->summary->{arrived};
($rc, $out, $err) = $bare->psql('postgres', "CALL aibilling.sync(timeout => '100 ms')");
is($rc, 0, 'sync() with a timeout');
like($err, qr/WARNING:.*the timeout was reached/, 'says that it was reached');
is($polar->summary->{arrived}, $arrived, 'and sends nothing while another session is the shipper');

# However it ends, no lock is left, and the next one settles.
my %ends = (
	cancel => sub { $bare->safe_psql('postgres', "SELECT pg_cancel_backend($_[0])") },
	terminate => sub { $bare->safe_psql('postgres', "SELECT pg_terminate_backend($_[0])") });
foreach my $how (sort keys %ends)
{
	$ends{$how}->($sync->{abp_pid});
	$bare->poll_query_until('postgres', "SELECT count(*) = 0 $lock");
	is($bare->safe_psql('postgres', "SELECT count(*) $lock"), '0', "$how: no lock is left");
	if ($how eq 'cancel')
	{
		wait_ended($sync);
		is($sync->query_safe("SELECT count(*) $lock;"), '0', "$how: nor does the session know of one");
		like($bare->safe_psql('postgres', "SELECT state FROM aibilling.delivery WHERE state <> 'delivered'"),
			qr/^sending$/, "$how: the rows are still known as being sent");
	}
	eval { $sync->quit };
	$polar->clear_faults;
	$polar->release;
	$bare->safe_psql('postgres', 'CALL aibilling.sync()');
	is($bare->ledger('count(*)', "state <> 'delivered'"), '0', "$how: the next sync() settles");
	$polar->fault(kind => 'hang', times => 'always');
	$bare->insert_rows(5, prefix => "after_${how}_");
	$sync = start_statement($bare, 'CALL aibilling.sync()');
	$polar->wait(hung => 1);
}
$bare->safe_psql('postgres', "SELECT pg_cancel_backend($sync->{abp_pid})");
wait_ended($sync);
$sync->quit;

($rc, $out, $err) = $bare->psql('postgres', "SET statement_timeout = '500ms'; CALL aibilling.sync()");
isnt($rc, 0, 'statement_timeout ends sync()');
like($err, qr/statement timeout/, 'with its own error');
is($bare->safe_psql('postgres', "SELECT count(*) $lock"), '0', 'and leaves no lock');

# The ledger refuses: the table is blocked, and the session ships later.
$polar->clear_faults;
$polar->release;
my $session = $bare->background_psql('postgres', on_error_stop => 0);
$bare->safe_psql('postgres', q{CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
	$$BEGIN RAISE 'the ledger refuses'; END$$;
CREATE TRIGGER refuse BEFORE UPDATE ON aibilling.ledger FOR EACH ROW EXECUTE FUNCTION refuse()});
$session->query('CALL aibilling.sync();');
wait_ended($session);
is($bare->safe_psql('postgres', "SELECT count(*) $lock"), '0', 'a refusing ledger leaves no lock');
like($bare->status, qr/^blocked: the ledger refuses/, 'status says what blocks the table');
is($session->query('SELECT 1;'), '1', 'the session lives');
$bare->safe_psql('postgres', 'DROP TRIGGER refuse ON aibilling.ledger');
$session->query('CALL aibilling.sync();');
is($bare->ledger('count(*)', "state <> 'delivered'"), '0', 'and its next sync() settles');
$session->quit;

# Two at once, without a worker.
$duplicates = $polar->summary->{duplicates};
@sessions = map { $bare->background_psql('postgres') } 1 .. 3;
foreach my $round (1 .. 5)
{
	$bare->insert_rows(45, prefix => "race_${round}_");
	$_->query_until(qr/begun/, "\\echo begun\nCALL aibilling.sync();\n") foreach @sessions;
	wait_ended($_) foreach @sessions;
}
$_->quit foreach @sessions;
is($polar->summary->{duplicates}, $duplicates, 'several sync() at once send nothing twice');
is($bare->safe_psql('postgres', 'SELECT pending, in_flight FROM aibilling.status'),
	'0|0', 'and all of it');
$bare->sums_equal($polar, 'to the last digit');

# A timeout while code of a user's runs leaves the session as it was.
$bare->safe_psql('postgres', q{CREATE FUNCTION naps(r jsonb) RETURNS jsonb LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.3); RETURN ''{}''; END';
ALTER SERVER polar OPTIONS (ADD metadata_function 'public.naps')});
$bare->insert_rows(1, prefix => 'nap_');
($rc, $out, $err) = $bare->psql('postgres', "SET statement_timeout = '100ms';\nCALL aibilling.sync();\nSELECT 'usable';", on_error_stop => 0);
like($err, qr/statement timeout/, 'a timeout in code of a user\'s ends sync()');
is($out, 'usable', 'and no transaction is left open');
$bare->safe_psql('postgres', 'ALTER SERVER polar OPTIONS (DROP metadata_function); CALL aibilling.sync()');


$bare->stop;
$polar->stop;
done_testing();
