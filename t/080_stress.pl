
# Random statements, operators, faults, crashes and a role that misbehaves, for a minute; then rows and events
# must agree (t/stress.py).  AIBILLING_STRESS_SECONDS says for how long, AIBILLING_STRESS_SEED with
# which seed; the seed of a run is printed.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use AibillingNode;
use PolarServer;
use PostgreSQL::Test::Utils;
use Test::More;

plan skip_all => 'needs python3' unless PolarServer->python;

my $seconds = $ENV{AIBILLING_STRESS_SECONDS} // 60;
my $seed = $ENV{AIBILLING_STRESS_SEED} // int rand 1_000_000;
my $polar = PolarServer->new;
my $node = AibillingNode->new('main', conf => "max_prepared_transactions = 10\nlog_statement = none\nrestart_after_crash = on\n");

$node->create_server($polar, requests_per_minute => 0, batch_size => 7, timeout => '1500ms', max_in_flight => 3);
$node->create_server($polar, name => 'other', requests_per_minute => 0, batch_size => 5, timeout => '1500ms');

note "seed $seed, $seconds seconds";
my $pid = $node->worker_pid;
local $ENV{PGHOST} = $node->host;
local $ENV{PGPORT} = $node->port;
local $ENV{PGDATABASE} = 'postgres';

my $ok = IPC::Run::run([ PolarServer->python, 't/stress.py', '--seconds', $seconds, '--seed', $seed, '--polar', $polar->port ],
	'<', \undef, '>&', \my $output);
ok($ok, "rows and events agree (seed $seed)") or diag($output);
note $output;
my @crashes = grep { /TRAP|PANIC|terminated by signal (?!9|15)/ } split /\n/, slurp_file($node->logfile);
is("@crashes", '', 'nothing crashed');

$node->stop;
done_testing();
