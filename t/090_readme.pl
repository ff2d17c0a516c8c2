# Every SQL example of README.md and of the pages that go on from it runs, in its order, returns what
# is written behind "-- =>", and what it inserts arrives.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use PolarServer;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $polar = PolarServer->new;
my $url = $polar->url;

my $node = PostgreSQL::Test::Cluster->new('readme');
$node->init;
$node->append_conf('postgresql.conf', <<CONF);
shared_preload_libraries = 'aibilling_polar'
aibilling_polar.databases = 'postgres'
CONF
$node->start;

my $token_file = $node->basedir . '/polar.token';
append_to_file($token_file, $polar->token . "\n");
chmod(0600, $token_file) or die "could not chmod $token_file: $!";

my @blocks;
for my $page (qw(README.md doc/usage-formats.md doc/reporting.md doc/differences.md doc/delivery.md doc/clients.md))
{
	my @of_page = slurp_file("$FindBin::Bin/../$page") =~ /^```sql\n(.*?)^```$/msg;
	cmp_ok(scalar(@of_page), '>', 2, "$page has SQL examples");
	push @blocks, @of_page;
}

# What differs here from the reader's machine: where events go, and where the token is.
my $adapted = 0;
for my $block (@blocks)
{
	$adapted += $block =~ s{environment 'sandbox'}{url '$url', requests_per_minute '0'};
	$adapted += $block =~ s{'/etc/postgresql/polar\.token'}{'$token_file'};
}
is($adapted, 2, 'destination and token file are replaced');

for my $block (@blocks)
{
	my ($first_line) = $block =~ /\A(.*)/;
	my ($status, $stdout, $stderr) = $node->psql('postgres', $block, on_error_stop => 1);
	is($status, 0, "runs: $first_line") or diag($stderr);
	if ($block =~ /^-- => (.*)$/m)
	{
		is($stdout, $1, "returns what is written: $first_line");
	}
	if ($block =~ /RETURNING cost_nanos, cost_cents, cost_status/)
	{
		is($stdout, '5000000|0.5|priced', 'the first row costs what README.md says') or diag($stdout);
	}
}

# All that the examples insert is delivered, the row that waited for its price too.
$node->safe_psql('postgres', 'CALL aibilling.sync()');
my $rows = $node->safe_psql('postgres', 'SELECT count(*) FROM usage');
is($node->safe_psql('postgres', 'SELECT count(*) FROM aibilling.outbox'), '0', 'nothing is left');
my $summary = $polar->wait(events => $rows);
is($summary->{stored}, $rows, 'every row arrived');
is($node->safe_psql('postgres', "SELECT sum(cost_cents) = $summary->{cost_amount} FROM usage"),
	't', 'and so did its cost');

$node->stop;
$polar->stop;

done_testing();
