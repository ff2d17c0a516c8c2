# Every fault we can make, at random and all at once, while several sessions insert: at the end every
# committed row has been stored once, no row that was rolled back has, and the ledger agrees with the
# stand-in.
#
# It runs for 20 seconds.  By hand:
#
#   CHAOS_SECONDS=60 CHAOS_SEED=N CHAOS_CLIENTS=N dev/test 040_chaos
#
# takes longer, repeats the choices of an earlier run (the seed is printed; how they interleave is
# not repeated) and inserts from more sessions.
#
# What was committed is known from three sides: the usage table itself, what clients were told of their
# COMMITs, and a table of the rows that were deleted again while they waited.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use JSON::PP;
use PolarServer;
use POSIX ();
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes;

my $seconds = $ENV{CHAOS_SECONDS} || 20;
my $seed = $ENV{CHAOS_SEED} || int(rand(2**31));
my $clients = $ENV{CHAOS_CLIENTS} || 4;
my $database = 'chaos';

diag("CHAOS_SEED=$seed CHAOS_SECONDS=$seconds CHAOS_CLIENTS=$clients");
srand($seed);

my $polar = PolarServer->new(state => PostgreSQL::Test::Utils::tempdir . '/polar.state');

my $node = PostgreSQL::Test::Cluster->new('chaos');
$node->init;
$node->append_conf('postgresql.conf', <<CONF);
shared_preload_libraries = 'aibilling_polar'
aibilling_polar.databases = '$database'
aibilling_polar.poll_interval = 1
max_prepared_transactions = 50
max_connections = 50
restart_after_crash = on
log_statement = none
CONF
$node->start;
$node->safe_psql('postgres', "CREATE DATABASE $database");
$node->safe_psql($database, sprintf(<<'SQL', $polar->url, $polar->token));
CREATE EXTENSION aibilling_polar;
CREATE SERVER polar FOREIGN DATA WRAPPER polar
	OPTIONS (url '%s', event_name 'llm_usage', timeout '2s', batch_size '25', max_in_flight '3');
CREATE USER MAPPING FOR PUBLIC SERVER polar OPTIONS (access_token '%s');
SELECT aibilling.create_usage_table('usage', server => 'polar');
CREATE TABLE deleted (external_id text PRIMARY KEY, state text NOT NULL);

-- Delete a row, and note whether it still waited or had been delivered before.
CREATE FUNCTION delete_usage(which text) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
	gone bigint;
BEGIN
	DELETE FROM usage WHERE external_id = which RETURNING id INTO gone;
	IF FOUND THEN
		INSERT INTO deleted SELECT which, s.state FROM aibilling.usage_status('usage', gone) s;
	END IF;
END
$$;
SQL

# --- what clients do ---------------------------------------------------------

# An amount of money that no other row has, so that a stale event is noticed.
sub amount
{
	return sprintf('0.%09d', 1 + int(rand(999_999_999)));
}

sub insert_rows
{
	return 'INSERT INTO usage (external_id, external_customer_id, provider, model, provider_cost) VALUES '
	  . join(', ', map { "('$_', 'customer', 'openai', 'gpt-5', " . amount() . ')' } @_) . ";\n";
}

# One transaction: its SQL, the rows that it leaves if it commits, and those that it never does.
sub transaction
{
	my ($prefix, $earlier) = @_;
	my $n = 0;
	my $new = sub { my ($count) = @_; return map { "$prefix-" . $n++ } 1 .. $count };
	my $dice = rand;
	my $some = @$earlier ? $earlier->[ rand @$earlier ] : undef;
	my @kept;
	my @never;
	my $sql;

	if ($dice < 0.3)
	{
		@kept = $new->(1);
		$sql = insert_rows(@kept);
	}
	elsif ($dice < 0.45)
	{
		@kept = $new->(2 + rand 60);
		$sql = "BEGIN;\n" . insert_rows(@kept) . "COMMIT;\n";
	}
	elsif ($dice < 0.6)
	{
		my @inside = $new->(1 + rand 5);
		my @released = $new->(1 + rand 3);
		my @after = $new->(1);

		@never = $new->(1 + rand 5);
		@kept = (@inside, @released, @after);
		$sql = "BEGIN;\n" . insert_rows(@inside)
		  . "SAVEPOINT a;\n" . insert_rows(@never) . "ROLLBACK TO a;\n"
		  . "SAVEPOINT b;\n" . insert_rows(@released) . "RELEASE b;\n"
		  . insert_rows(@after) . "COMMIT;\n";
	}
	elsif ($dice < 0.7)
	{
		@never = $new->(1 + rand 30);
		$sql = "BEGIN;\n" . insert_rows(@never) . "ROLLBACK;\n";
	}
	elsif ($dice < 0.78)
	{
		# fails at the end
		@never = $new->(3);
		$sql = "BEGIN;\n" . insert_rows(@never) . "SELECT 1 / 0;\nCOMMIT;\n";
	}
	elsif ($dice < 0.84)
	{
		# Whether it commits is decided in a later statement, or at the end of the test: also
		# after a crash.
		my $commit = rand() < 0.5;
		my $gid = ($commit ? 'commit' : 'rollback') . "-$prefix";

		if ($commit)
		{
			@kept = $new->(3);
		}
		else
		{
			@never = $new->(3);
		}
		$sql = "BEGIN;\n" . insert_rows(@kept, @never)
		  . "PREPARE TRANSACTION '$gid';\n"
		  . (rand() < 0.8 ? ($commit ? 'COMMIT' : 'ROLLBACK') . " PREPARED '$gid';\n" : '');
	}
	elsif (!defined $some)
	{
		$sql = "SELECT 1;\n";
	}
	elsif ($dice < 0.92)
	{
		# most are in flight or delivered by now, and refuse
		$sql = 'UPDATE usage SET provider_cost = ' . amount() . " WHERE external_id = '$some';\n";
	}
	else
	{
		$sql = "BEGIN;\nSELECT delete_usage('$some');\nCOMMIT;\n";
	}

	# And some that come and go, or change, within their own transaction.
	if (rand() < 0.1)
	{
		my @own = $new->(3);

		push @kept, $own[0];
		push @never, $own[1];
		push @kept, $own[2];
		$sql = "BEGIN;\n" . insert_rows(@own)
		  . 'UPDATE usage SET provider_cost = ' . amount() . " WHERE external_id = '$own[0]';\n"
		  . "DELETE FROM usage WHERE external_id = '$own[1]';\n" . "COMMIT;\n";
		@kept = @own[ 0, 2 ];
		@never = ($own[1]);
	}
	return ($sql, \@kept, \@never);
}

# Statements of which nothing is expected: the server may be down just now, or go down.  They are no
# standard input, which psql may not live to read.
sub try_sql
{
	my ($stdout, $stderr) = ('', '');
	my $done = IPC::Run::run([ 'psql', '-XAt', '-d', $node->connstr($database), map { ('-c', $_) } @_ ],
		'>', \$stdout, '2>', \$stderr);

	chomp($stdout, $stderr);
	return ($done, $stdout, $stderr);
}

# A session that works until the file $stop exists, and writes what it was told to $log: a line for
# each row, "kept" of a transaction that was acknowledged, "never" of what must not exist.
sub run_client
{
	my ($number, $log, $stop) = @_;
	my @earlier;
	my $round = 0;

	srand($seed + $number);
	open(my $out, '>', $log) or die "could not open $log: $!";
	$out->autoflush(1);
	while (!-e $stop)
	{
		my @transactions;
		my $script = '';

		$round++;
		for my $i (1 .. 8)
		{
			my ($sql, $kept, $never) = transaction("c$number-$round-$i", \@earlier);

			push @transactions, [ $kept, $never ];
			$script .= $sql . "\\echo end $i :ERROR\n";
		}

		my ($stdout, $stderr) = ('', '');
		my $file = "$log.sql";
		unlink $file;
		append_to_file($file, $script);
		IPC::Run::run([ 'psql', '-XAt', '-d', $node->connstr($database), '-f', $file ],
			'>', \$stdout, '2>', \$stderr);

		# The command tag before the end says what became of the transaction.
		my %told;
		while ($stdout =~ /^([^\n]*)\nend (\d+) (\w+)$/mg)
		{
			$told{$2} = $3 eq 'false' && $1 ne 'ROLLBACK';
		}
		for my $i (1 .. @transactions)
		{
			my ($kept, $never) = @{ $transactions[ $i - 1 ] };

			print $out "never $_\n" for @$never;
			next unless $told{$i};
			print $out "kept $_\n" for @$kept;
			push @earlier, @$kept;
		}
		splice(@earlier, 0, -100) if @earlier > 100;

		server_answers() if !%told;
	}
	close($out) or die "could not write $log: $!";
	return;
}

# How much clients have written to these logs.
sub clients_wrote
{
	my $bytes = 0;

	$bytes += (-s $_) // 0 foreach @_;
	return $bytes;
}

# --- what goes wrong ----------------------------------------------------------

my @answers = (
	{ kind => '500' },
	{ kind => '502' },
	{ kind => '503' },
	{ kind => '504' },
	{ kind => '500', store => JSON::PP::true },
	{ kind => '429', retry_after => 1 },
	{ kind => '401' },
	{ kind => '413' },
	{ kind => '422', index => [0] },
	{ kind => '422' },
	{ kind => 'slow', delay => 300 },
	{ kind => 'slow', delay => 3000 },
	{ kind => 'hang', store => JSON::PP::true },
	{ kind => 'hang' },
	{ kind => 'drop_before_read' },
	{ kind => 'drop_after_store' },
	{ kind => 'truncated' },
	{ kind => 'redirect', location => 'http://127.0.0.1:1/' },
	(map { { kind => 'garbage', what => $_ } } qw(html text empty wrong_counts content_type)));

# Answers break at random all the time.
sub break_answers
{
	for my $fault (@answers)
	{
		$polar->fault(%$fault, times => 'always', probability => 0.015);
	}
	return;
}

sub server_answers
{
	$polar->wait_for(sub { (try_sql('SELECT true'))[0] }, 'the server to come back');
	return;
}

sub signal_worker
{
	my ($signal) = @_;
	my (undef, $pid) =
	  try_sql("SELECT pid FROM pg_stat_activity WHERE backend_type = 'aibilling_polar worker'");

	return 0 if $pid !~ /^\d+$/;
	kill($signal, $pid);
	return 1;
}

my %actions = (
	'worker TERM' => sub { return signal_worker('TERM') },
	'worker KILL' => sub {
		my $done = signal_worker('KILL');
		server_answers();
		return $done;
	},
	'restart fast' => sub { $node->stop('fast'); $node->start; return 1 },
	'restart immediate' => sub { $node->stop('immediate'); $node->start; return 1 },
	'answers' => sub {
		my $fault = $answers[ rand @answers ];

		$polar->clear_faults;
		$polar->fault(%$fault, times => 1 + int(rand(3)));
		break_answers();
		return 1;
	},
	'stand-in killed' => sub { $polar->restart; break_answers(); return 1 },
	'sync' => sub {
		my $timeout = 50 + int(rand(1000));

		# With the worker away, sync() itself sends.
		signal_worker('TERM') if rand() < 0.7;
		my (undef, undef, $stderr) =
		  try_sql("SET statement_timeout = $timeout", 'CALL aibilling.sync()');
		return $stderr =~ /canceling statement/ ? 2 : 1;
	},
	'pause and resume' => sub {
		try_sql("SELECT aibilling.pause('polar')");
		try_sql("SELECT aibilling.resume('polar')");
		return 1;
	},
	'pause' => sub { try_sql('SELECT aibilling.pause()'); return 1 },
	'resume' => sub { try_sql('SELECT aibilling.resume()'); return 1 },
	'retry' => sub { try_sql("SELECT aibilling.retry('usage')"); return 1 },
	'release' => sub { $polar->release; return 1 });

# A restart is rare, and a pause never long.
my @weighted = map { my ($name, $weight) = @$_; ($name) x $weight } (
	[ 'worker TERM', 4 ], [ 'worker KILL', 2 ], [ 'restart fast', 1 ], [ 'restart immediate', 2 ],
	[ 'answers', 8 ], [ 'stand-in killed', 3 ], [ 'sync', 5 ], [ 'pause and resume', 2 ],
	[ 'pause', 1 ], [ 'resume', 8 ], [ 'retry', 2 ], [ 'release', 4 ]);

# --- the run --------------------------------------------------------------------

my $stop = PostgreSQL::Test::Utils::tempdir . '/stop';
my @logs = map { PostgreSQL::Test::Utils::tempdir . "/client$_.log" } 1 .. $clients;
my @pids;
for my $number (1 .. $clients)
{
	my $pid = fork;

	die "could not fork: $!" unless defined $pid;
	if ($pid == 0)
	{
		eval { run_client($number, $logs[ $number - 1 ], $stop); 1 } or warn $@;
		POSIX::_exit($@ ? 1 : 0);
	}
	push @pids, $pid;
}

# At most so many bytes of logs, a line for each row, between one fault and the next.
my $work_between = 2000;
my %happened;
my $end = Time::HiRes::time() + $seconds;
break_answers();
while (Time::HiRes::time() < $end)
{
	my $name = $weighted[ rand @weighted ];
	my $done = $actions{$name}->();

	$happened{$name}++ if $done;
	$happened{'sync cancelled'}++ if $name eq 'sync' && $done == 2;

	# What it breaks needs some work to break.
	my $enough = clients_wrote(@logs) + rand($work_between);
	$polar->wait_for(sub { clients_wrote(@logs) >= $enough || Time::HiRes::time() >= $end }, 'the clients to work');
}

append_to_file($stop, '');
my @failures;
for my $pid (@pids)
{
	waitpid($pid, 0);
	push @failures, "wait status $?" if $? != 0;
}
is_deeply(\@failures, [], 'no client failed by itself');

# --- peace ----------------------------------------------------------------------

$polar->clear_faults;
$polar->release;
server_answers();

# Ends the prepared transactions.
my @prepared = split /\n/, $node->safe_psql($database, 'SELECT gid FROM pg_prepared_xacts');
for my $gid (@prepared)
{
	$node->safe_psql($database,
		($gid =~ /^commit/ ? 'COMMIT' : 'ROLLBACK') . " PREPARED '$gid'");
}

$node->safe_psql($database, "SELECT aibilling.resume(); SELECT aibilling.retry('usage')");
ok( $node->poll_query_until(
		$database,
		"SELECT NOT EXISTS (SELECT FROM aibilling.outbox) AND NOT EXISTS (SELECT FROM aibilling.delivery WHERE state = 'sending')"
	),
	'everything is delivered in the end')
  or diag($node->safe_psql($database, 'SELECT * FROM aibilling.status')
	  . "\n" . $node->safe_psql($database, "SELECT id, state, attempts, not_before, error FROM aibilling.delivery WHERE state = 'sending'"));

# --- who has what ----------------------------------------------------------------

my %usage = map { split /\|/ } split /\n/,
  $node->safe_psql($database, 'SELECT external_id, trim_scale(cost_cents) FROM usage');
my %deleted = map { split /\|/ } split /\n/,
  $node->safe_psql($database, 'SELECT external_id, state FROM deleted');
my (%kept, %never);
for my $log (@logs)
{
	for my $line (split /\n/, slurp_file($log))
	{
		my ($what, $row) = split / /, $line;

		$kept{$row} = 1 if $what eq 'kept';
		$never{$row} = 1 if $what eq 'never';
	}
}

my @events = $polar->events(compact => 1);
my (%stored, %cost);
for my $event (@events)
{
	$stored{ $event->{external_id} }++;
	$cost{ $event->{external_id} } = $event->{cost_amount};
}

# What is wrong, a few of it.
sub none
{
	my ($name, @wrong) = @_;

	is(scalar(@wrong), 0, $name)
	  or diag(join(' ', sort((@wrong > 10 ? @wrong[ 0 .. 9 ] : @wrong))));
	return;
}

none('what clients were told is committed, is', grep { !exists $usage{$_} && !exists $deleted{$_} } keys %kept);
none('what was rolled back is not in the table', grep { exists $usage{$_} } keys %never);
none('every committed row is stored', grep { !$stored{$_} } keys %usage);
none('none is stored twice', grep { $stored{$_} > 1 } keys %stored);
none('none that was rolled back is stored', grep { $stored{$_} } keys %never);
none('none that is not committed is stored', grep { !exists $usage{$_} && !exists $deleted{$_} } keys %stored);
none('none that was deleted while it waited is stored',
	grep { $deleted{$_} ne 'delivered' && $stored{$_} } keys %deleted);
none('those deleted after their delivery are stored',
	grep { $deleted{$_} eq 'delivered' && !$stored{$_} } keys %deleted);
none('every event carries the cost of its row',
	grep { $stored{$_} && ($cost{$_} // '') ne $usage{$_} } keys %usage);

my $delivered = keys(%usage) + grep { $_ eq 'delivered' } values %deleted;
is( $node->safe_psql($database, "SELECT sum(inserted + duplicates), sum(events) FROM aibilling.delivery WHERE state = 'delivered'"),
	"$delivered|$delivered",
	'the ledger counts every row once, inserted or found to be there');
is( $node->safe_psql($database, <<'SQL'),
SELECT count(*), count(DISTINCT id)
FROM (SELECT generate_series(lower(r), upper(r) - 1) AS id
	  FROM aibilling.delivery, unnest(usage_ids) r WHERE state = 'delivered') d
SQL
	"$delivered|$delivered",
	'no row is in two deliveries');
is(scalar(@events), $delivered, 'the stand-in has as many');
is( $node->safe_psql($database, 'SELECT sum(unexpected_duplicates), sum(vanished) FROM aibilling.delivery'),
	'0|0',
	'no duplicate was unexpected, and no row vanished');
is($node->safe_psql($database, 'SELECT status FROM aibilling.status'),
	'idle: everything that can be sent is delivered', 'and status is content');

# Did it do what it is for?
my ($duplicates, $attempts) = split /\|/, $node->safe_psql($database,
	"SELECT sum(duplicates), sum(attempts) - count(*) FROM aibilling.delivery");
note("$delivered rows delivered, $duplicates of them by a request whose answer was lost; $attempts requests repeated; "
	  . keys(%never) . ' rows rolled back, ' . keys(%deleted) . ' deleted, ' . @prepared . ' prepared transactions');
note(join(', ', map { "$_: $happened{$_}" } sort keys %happened));
cmp_ok($delivered, '>', 100, 'there was something to deliver');
cmp_ok($duplicates, '>', 0, 'answers were lost');

$node->stop;
$polar->stop;

done_testing();
