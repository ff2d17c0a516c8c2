# Delivery and who reads share the requests of a minute: together they never make more than the server
# allows, readers no more than a tenth of them, and a backlog does not keep them out.

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
my $node = AibillingNode->new('main');

sub sql { return $node->safe_psql('postgres', shift) }

# Each row's delivery is a request: a burst of 60, then 540 a minute.
$node->create_server($polar, batch_size => 1, requests_per_minute => 600);
$node->create_usage_table;

$node->insert_rows(200);
$polar->wait(requests => 65);
for my $i (1 .. 10)
{
	is(sql("SELECT count(*) FROM aibilling.polar_events('polar', external_id => 'row_1')"), '1', "read $i");
}
$node->wait_settled;

my @requests = $polar->requests;
my @reads = grep { $requests[$_]{method} eq 'GET' } 0 .. $#requests;
my @sent = grep { $requests[$_]{method} eq 'POST' } 0 .. $#requests;
is(scalar(@sent), 200, 'all is delivered, row by row');
is(scalar(@reads), 10, 'and read');
cmp_ok($reads[0], '<', $sent[-1], 'a backlog does not keep readers out');

# In no stretch of time more than a burst and what flows in meanwhile; one that was on its way may arrive beside it.
sub never_more
{
	my ($what, $burst, $per_second, @of) = @_;
	my @at = map { $requests[$_]{time} } @of;
	my $values = join ', ', map { "($_, '$at[$_]'::timestamptz)" } 0 .. $#at;

	is( sql("WITH r (n, at) AS (VALUES $values)
			SELECT count(*) FROM r a JOIN r b ON b.n >= a.n
			WHERE b.n - a.n + 1 > $burst + 1 + $per_second * extract(epoch FROM b.at - a.at)"), '0', $what);
	return;
}
never_more('together no more than the server allows', 60, 9, 0 .. $#requests);
never_more('readers no more than a tenth', 6, 0.9, @reads);

sql("ALTER SERVER polar OPTIONS (SET requests_per_minute '0')");
is(sql("SELECT count(*) FROM aibilling.polar_events('polar', max_rows => 200)"), '200', 'without a limit nobody waits');

$node->stop;
$polar->stop;

done_testing();
