
# Out of memory, and other errors in the middle of the worker's work: they cost
# time, but no row, and none is sent twice.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use AibillingNode;
use File::Basename;
use PolarServer;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

plan skip_all => 'python3 is not on PATH' unless PolarServer->python;

my $polar = PolarServer->new;
my $node = AibillingNode->new('main', conf => <<'EOC');
aibilling_polar.poll_interval = 1
log_line_prefix = '%m [%p] %e '
EOC
$node->create_server($polar, requests_per_minute => 0);
$node->create_usage_table;

sub sql
{
	my ($query) = @_;

	return $node->safe_psql('postgres', $query);
}

#
# What an error undoes in the tables is undone in memory, too.  A delivery is
# built anew with a row less, and cannot be entered in the ledger.
#

sql(q{
CREATE TABLE spoil (id bigint);
CREATE FUNCTION public.event_name(r jsonb) RETURNS text LANGUAGE sql AS
	$$SELECT CASE WHEN (r->>'id')::bigint NOT IN (SELECT id FROM public.spoil) THEN 'llm_usage' END$$;
CREATE FUNCTION refuse_resend() RETURNS trigger LANGUAGE plpgsql AS
	$$BEGIN RAISE 'the ledger is shut'; END$$;
CREATE TRIGGER refuse_resend BEFORE UPDATE ON aibilling.ledger
	FOR EACH ROW WHEN (new.attempts > 1) EXECUTE FUNCTION refuse_resend();
ALTER SERVER polar OPTIONS (ADD event_name_function 'public.event_name')});
$polar->fault(kind => '503');
my $offset = $node->log_offset;
$node->insert_rows(3);
$node->wait_for_log(qr/cannot be delivered: the ledger is shut/, $offset);
sql(q{INSERT INTO spoil VALUES (2)});

# Once more, with a row that is spoilt now, and then for good.
my $until = sql('SELECT blocked_until FROM aibilling.usage_table');
sql(q{ALTER SERVER polar OPTIONS (SET event_name 'llm_usage')});
$node->poll_query_until('postgres',
	"SELECT blocked_until > '$until' FROM aibilling.usage_table");
sql(q{DROP TRIGGER refuse_resend ON aibilling.ledger;
ALTER SERVER polar OPTIONS (SET event_name 'llm_usage')});
$node->wait_settled;
is( sql(q{SELECT string_agg(id || ' ' || (aibilling.usage_status('usage', id)).state, ', ' ORDER BY id)
		FROM usage}),
	'1 delivered, 2 rejected, 3 delivered',
	'a row that was set aside is not forgotten when that is undone');

#
# A user's function runs out of memory: no fault of the row.
#

sql(q{
CREATE OR REPLACE FUNCTION public.event_name(r jsonb) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
	IF EXISTS (SELECT FROM public.spoil) THEN
		RAISE 'no memory left' USING ERRCODE = 'out_of_memory';
	END IF;
	RETURN 'llm_usage';
END$$});
my $refused = 'usage rows of public.usage cannot be delivered';
$offset = $node->log_offset;
sql(q{SELECT aibilling.retry('usage')});
ok($node->wait_for_log(qr/ 53200 WARNING:  $refused: no memory left/, $offset),
	'a function that runs out of memory is reported');
is(sql('SELECT state FROM aibilling.outbox'), 'pending', 'its row is not rejected');
sql(q{DELETE FROM spoil; ALTER SERVER polar OPTIONS (SET event_name 'llm_usage')});
$node->wait_settled;
$node->sums_equal($polar, 'it is delivered when there is memory again');

# A delivery that must be sent again, but not with what there is of memory now.
my $last = $node->ledger('max(id)');
$polar->fault(kind => '503', times => 'always');
$node->insert_rows(4, prefix => 'half_');
$node->poll_query_until('postgres',
	"SELECT EXISTS (SELECT FROM aibilling.delivery WHERE state = 'sending' AND http_status = 503)");
sql(q{INSERT INTO spoil VALUES (0)});
$polar->clear_faults;
$offset = $node->log_offset;
sql(q{ALTER SERVER polar OPTIONS (SET event_name 'llm_usage')});
$node->wait_for_log(qr/ 53200 WARNING:  $refused: no memory left/, $offset);
sql(q{DELETE FROM spoil; ALTER SERVER polar OPTIONS (SET event_name 'llm_usage')});
$node->wait_settled;
$node->sums_equal($polar, 'so is a delivery that had to be sent again');
is($node->ledger('sum(unexpected_duplicates)', "id > $last"), '0', 'and no duplicate is a surprise');

#
# The worker itself is out of memory, for longer.
#

SKIP:
{
	skip 'the memory of a process cannot be limited', 4
	  if $ENV{AIBILLING_POSTGRES}
	  || !-r "/proc/$$/status"
	  || system('prlimit --version >/dev/null 2>&1') != 0;

	# Eight megabytes of events, and four for the worker to grow.
	sql(q{SELECT aibilling.pause()});
	sql(q{ALTER SERVER polar OPTIONS (ADD batch_size '1000', ADD batch_bytes '10MB')});
	$node->insert_rows(1500, prefix => 'large_');
	sql(q{
UPDATE usage SET tags =
	(SELECT jsonb_object_agg('tag' || i, repeat('x', 490)) FROM generate_series(1, 10) i)
WHERE external_id LIKE 'large%'});
	my $worker = $node->worker_waits;
	my ($size) = slurp_file("/proc/$worker/status") =~ /^VmSize:\s+(\d+) kB/m;
	my $limit = $size * 1024 + 4 * 1024 * 1024;
	system_or_bail('prlimit', "--pid=$worker", "--as=$limit:");

	$offset = $node->log_offset;
	sql(q{SELECT aibilling.resume()});
	ok($node->wait_for_log(qr/\[$worker\] 53200 WARNING:  $refused: out of memory/, $offset),
		'the worker reports that it is out of memory');
	ok($node->wait_status('out of memory'), 'and so does the status');

	# It tries again by itself, after ten seconds; this makes it hurry.
	while ((my $blocked = sql('SELECT blocked_until FROM aibilling.usage_table')) ne '')
	{
		sql(q{ALTER SERVER polar OPTIONS (SET event_name 'llm_usage')});
		$node->poll_query_until('postgres',
			"SELECT blocked_until IS DISTINCT FROM '$blocked' FROM aibilling.usage_table");
	}
	$node->wait_settled;
	is($node->worker_pid, $worker, 'it lives on');
	$node->sums_equal($polar, 'and delivers each row once, in batches that fit');
	note $node->ledger("string_agg(events || ' ' || attempts, ', ' ORDER BY id)");
}
$node->stop;

#
# Each allocation of a delivery fails in turn, in a session that delivers as
# the worker does: those of PostgreSQL, of libcurl and our own.
#

SKIP:
{
	skip 'another malloc is preloaded', 9 if $ENV{AIBILLING_POSTGRES};
	my $library = "$PostgreSQL::Test::Utils::tmp_check/failing_malloc.so";
	my ($include) = run_command([ 'pg_config', '--includedir-server' ]);
	my $source = dirname(__FILE__) . '/failing_malloc.c';
	skip 'no C compiler', 9
	  if system("cc -shared -fPIC -O1 -I'$include' -o '$library' '$source' >/dev/null 2>&1") != 0;

	$polar->reset;
	my $session = AibillingNode->new('session', preload => 0, start => 0);
	{
		local $ENV{LD_PRELOAD} = $library;
		$session->start;
	}
	$session->safe_psql('postgres', "CREATE EXTENSION aibilling_polar;
CREATE FUNCTION fail_malloc(int, int) RETURNS void AS '$library' LANGUAGE C;
CREATE FUNCTION fail_large_malloc(int) RETURNS void AS '$library' LANGUAGE C;
CREATE FUNCTION failed_mallocs() RETURNS bigint AS '$library' LANGUAGE C;");
	$session->create_server($polar, requests_per_minute => 0);
	$session->create_usage_table;
	my $rows = 0;
	my %states;

	# Try these numbers in one session.  Returns whether all of them failed.
	my $try = sub
	{
		my $script = '';
		foreach my $number (@_)
		{
			my $times = 1 + $number % 3;

			# What still fails then, after the CALL, is not ours.
			$rows++;
			$script .= $session->rows_sql(1, from => $rows) . ";\n"
			  . "SELECT fail_malloc($number, $times);\n"
			  . "CALL aibilling.sync(timeout => '100 ms');\n"
			  . "\\set state :SQLSTATE\n"
			  . "SELECT failed_mallocs() \\g /dev/null\n" x 3
			  . "SELECT 'result', $number, failed_mallocs(), :'state';\n"
			  . "SELECT aibilling.resume();\n"
			  . "CALL aibilling.sync();\n";
		}
		my ($rc, $out, $err) = $session->psql('postgres', $script, on_error_stop => 0);
		my @results = map { [ split /\|/ ] } grep { /^result/ } split /\n/, $out;
		$states{ $_->[3] }++ foreach @results;
		fail("each number has a result: $out $err") if @results < @_;
		return !grep { $_->[2] == 0 } @results;
	};

	# The first delivery of a session also makes plans and caches and starts
	# libcurl; later ones do not.
	my $step = $ENV{AIBILLING_LONG} ? 1 : 5;
	my $first = 1;
	while ($try->(map { $first + $step * $_ } 0 .. 49))
	{
		$first += 50 * $step;
	}
	note "$rows rows: ", join ', ', map { "$_ $states{$_}" } sort keys %states;
	$step = $ENV{AIBILLING_LONG} ? 7 : 100;
	$first = 1;
	$first += $step while $try->($first);
	note "$rows rows: ", join ', ', map { "$_ $states{$_}" } sort keys %states;

	ok($states{53200}, 'out of memory was met');
	is(join(' ', sort keys %states), '00000 53200', 'and nothing else reported');
	$session->safe_psql('postgres', 'SELECT aibilling.resume(); CALL aibilling.sync()');
	$session->sums_equal($polar, 'each row was sent once');
	is($session->ledger('sum(unexpected_duplicates)'), '0', 'in effect');
	is($session->ledger("count(*)", "state = 'sending'"), '0', 'and all is settled');

	# libcurl wants a buffer of the size of a request, a megabyte here, and
	# never gets more than a third of one.
	my $until = $session->ledger('max(id)');
	$session->safe_psql('postgres', 'SELECT aibilling.pause()');
	$session->insert_rows(200, prefix => 'large_');
	$session->safe_psql('postgres', q{
UPDATE usage SET tags =
	(SELECT jsonb_object_agg('tag' || i, repeat('x', 490)) FROM generate_series(1, 10) i)
WHERE external_id LIKE 'large%'});
	my (undef, $out) = $session->psql('postgres',
		"SELECT fail_large_malloc(333333);\n"
		  . "SELECT aibilling.resume(); CALL aibilling.sync(timeout => '100 ms');\n" x 8
		  . "SELECT 'result', failed_mallocs()", on_error_stop => 0);
	my ($failed) = $out =~ /^result\|(\d+)/m;
	cmp_ok($failed, '>', 0, 'memory for large requests was refused');
	$session->sums_equal($polar, 'each row was sent once again');
	is($session->ledger('bool_and(events < 100) AND bool_or(events > 10)', "id > $until"), 't', 'in requests of a size that fits');
	is($session->ledger('sum(unexpected_duplicates)'), '0', 'and none is a duplicate');
	$session->stop;
}

done_testing();
