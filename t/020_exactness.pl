# Costs of random usage by random price cards, against exact fractions that
# exactness.py computes from the documented rules.  ABP_SEED and ABP_CASES
# choose others than the usual.
use strict;
use warnings;

use File::Basename qw(dirname);
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $dir = dirname(__FILE__);
my $seed = $ENV{ABP_SEED} // 1;
my $cases = $ENV{ABP_CASES} // 100000;
my $python = $ENV{PYTHON} // 'python3';

plan skip_all => "needs $python"
  if system("$python -c 'import fractions' >/dev/null 2>&1") != 0;

my $node = PostgreSQL::Test::Cluster->new('main');
$node->init;
$node->start;
$node->safe_psql('postgres', 'CREATE EXTENSION aibilling_polar');

my $script = PostgreSQL::Test::Utils::tempdir() . '/cases.sql';
system("$python $dir/exactness.py $seed $cases > $script") == 0
  or BAIL_OUT("exactness.py failed");
$node->command_ok(
	[
		'psql', '-XqAt', '-v', 'ON_ERROR_STOP=1',
		'-d', $node->connstr('postgres'),
		'-f', $script
	],
	"prices and $cases cases of seed $seed");

my $result = $node->safe_psql('postgres', slurp_file("$dir/exactness.sql"));
foreach my $line (split /\n/, $result)
{
	my ($check, $checked, $differ) = split /\|/, $line;
	ok($checked > 0 && $differ == 0,
		"$check: $differ of $checked differ (seed $seed)");
}

# A check that cannot fail proves nothing.
$node->safe_psql('postgres', 'UPDATE aibilling.price SET input = 0.000000001 WHERE input > 1');
my %differ = map { (split /\|/)[ 0, 2 ] } split /\n/,
  $node->safe_psql('postgres', slurp_file("$dir/exactness.sql"));
ok($differ{$_} > 0, "$_: a changed price is noticed")
  foreach qw(usd nanos cents explained sums);

$node->stop;
done_testing();
