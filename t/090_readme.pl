# Every SQL and shell example of README.md and of the pages that go on from it runs, in its order, returns what is
# written behind "-- =>", and what it inserts arrives. Blocks that say "norun" are not whole statements, or are typed
# before there is a server; dev/package follows README's installation in systems where nothing is installed.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use IPC::Run;
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
aibilling_polar.databases = 'app'
CONF
$node->start;
$node->safe_psql('postgres', 'CREATE DATABASE app');

my $token_file = $node->basedir . '/polar.token';
append_to_file($token_file, $polar->token . "\n");
chmod(0600, $token_file) or die "could not chmod $token_file: $!";

# What differs here from the reader's machine: where events go, where the token is, and that we are the server's user.
my $adapted = 0;

sub adapt
{
	my ($block) = @_;

	$adapted += $block =~ s{environment 'sandbox',}{url '$url', requests_per_minute '0',}g;
	$adapted += $block =~ s{'/etc/postgresql/polar\.token'}{'$token_file'}g;
	$block =~ s{CREATE SERVER narev.*?;}{}s;
	$block =~ s{/etc/postgresql/polar\.token}{$token_file}g;
	$block =~ s{\bsudo (?:-u postgres )?|-o postgres }{}g;
	return $block;
}

my @psql_options;

sub run_sql
{
	my ($block) = @_;
	my ($first_line) = $block =~ /\A(.*)/;
	my ($status, $stdout, $stderr) = $node->psql('app', $block, on_error_stop => 1, extra_params => \@psql_options);

	is($status, 0, "runs: $first_line") or diag($stderr);
	my @expected = $block =~ /^-- => (.*)$/mg;
	if (@expected)
	{
		is($stdout, join("\n", @expected), "returns what is written: $first_line");
	}
	if ($block =~ /RETURNING cost_nanos, cost_cents, cost_status/)
	{
		is($stdout, '5000000|0.5|priced', 'the first row costs what README.md says') or diag($stdout);
	}
	return;
}

sub run_shell
{
	my ($block) = @_;
	my ($first_line) = $block =~ /\A(.*)/;
	my ($out, $err);

	local $ENV{PGHOST} = $node->host;
	local $ENV{PGPORT} = $node->port;
	local $ENV{PGUSER} = $node->safe_psql('postgres', 'SELECT current_user');
	local $ENV{PSQLRC} = '/dev/null';
	my $input = $polar->token . "\n";
	ok(IPC::Run::run([ 'sh', '-eu', '-c', $block ], '<', \$input, '>', \$out, '2>', \$err), "runs: $first_line");
	unlike($err, qr/ERROR|FATAL|not found/, "without an error: $first_line") or diag($err);
	return;
}

sub run_page
{
	my ($page, $at_least) = @_;
	my $text = slurp_file("$FindBin::Bin/../$page");
	my $blocks = 0;

	while ($text =~ /^```(sql|sh)\n(.*?)^```$/msg)
	{
		my ($language, $block) = ($1, adapt($2));
		$blocks++;
		$language eq 'sql' ? run_sql($block) : run_shell($block);
	}
	cmp_ok($blocks, '>=', $at_least, "$page has examples");
	return;
}

run_page($_, 3)
  for (qw(README.md doc/usage-formats.md doc/reporting.md doc/differences.md doc/delivery.md doc/clients.md));

# All that the examples insert is delivered, the row that waited for its price too.
$node->safe_psql('app', 'CALL aibilling.sync()');
my $rows = $node->safe_psql('app', 'SELECT count(*) FROM usage');
is($node->safe_psql('app', 'SELECT count(*) FROM aibilling.outbox'), '0', 'nothing is left');
my $summary = $polar->wait(events => $rows);
is($summary->{stored}, $rows, 'every row arrived');
is($node->safe_psql('app', "SELECT sum(cost_cents) = $summary->{cost_amount} FROM usage"),
	't', 'and so did its cost');

# The meter that doc/reconcile.md speaks of.
$polar->meter('7f0c9ab8-6f0e-4c1a-9f53-0c6f2f1f4a10', name => 'api_call');
run_page('doc/reconcile.md', 9);

run_page('doc/prices.md', 10);

# A catalogue, a price service, a role that loads prices, and a price that is held back.
@psql_options = ('-v', 'file={"gpt-5-nano": {"litellm_provider": "openai", "mode": "chat", "input_cost_per_token": 5e-8}}');
my $narev_token = $node->basedir . '/narev.token';
append_to_file($narev_token, $polar->narev_token . "\n");
chmod(0600, $narev_token) or die "could not chmod $narev_token: $!";
$node->safe_psql('app', qq{
CREATE ROLE pricing;
CREATE SERVER narev FOREIGN DATA WRAPPER polar
	OPTIONS (kind 'prices', format 'narev', url '$url/v1/prices', access_token_file '$narev_token');
INSERT INTO aibilling.price_quarantine (source, provider, model, service_tier, context_above, valid_from, input, reason)
VALUES ('litellm', 'openai', 'gpt-5-nano', 'priority', 0, '-infinity', 500, 'ten times as much');});
run_page('doc/catalogues.md', 3);

run_page('doc/privacy.md', 3);
run_page('doc/operations.md', 15);
is($adapted, 4, 'destination and token file are replaced');

# That page ends by taking the extension away.
is($node->safe_psql('app', 'SELECT count(*) FROM pg_extension WHERE extname = $$aibilling_polar$$'), '0', 'it is uninstalled');
is($node->safe_psql('app', 'SELECT count(*) > 10 FROM usage'), 't', 'and the rows are there');

$node->stop;
$polar->stop;

done_testing();
