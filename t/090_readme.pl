# Every SQL and shell example of README.md and of the pages below doc/ runs, in its order, returns what is written
# behind "-- =>", and what it inserts arrives. A block that cannot says why ("norun: ..."); those of README's installation
# ("apt", "source") dev/package runs, in systems where nothing is installed.

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
$node->start;
my $user = $node->safe_psql('postgres', 'SELECT current_user');
my $token_file = $node->basedir . '/polar.token';

# What differs here from the reader's machine: where events go, where the token is, and that we are the server's user.
my $adapted = 0;
my $your_server = '';

sub adapt
{
	my ($block) = @_;

	$adapted += $block =~ s{environment '(?:sandbox|production)',}{url '$url', requests_per_minute '0',}g;
	$adapted += $block =~ s{'/etc/postgresql/polar\.token'}{'$token_file'}g;
	$block =~ s{CREATE SERVER narev.*?;}{}s;
	$block =~ s{/etc/postgresql/polar\.token}{$token_file}g;
	$block =~ s{\bsudo (?:-u postgres )?|-o postgres }{}g;
	$block =~ s{\bchown postgres\b}{chown $user};
	$block =~ s{-h sidecar}{-d sidecar};
	$block =~ s{-h your-server}{-d '$your_server'};
	$block =~ s{host=your-server dbname=app user=sidecar password=\S+ sslmode=verify-full}{$your_server};
	return $block;
}

my @psql_options;
my $database = 'app';

sub run_sql
{
	my ($block) = @_;
	my ($first_line) = $block =~ /\A(.*)/;
	my ($status, $stdout, $stderr) = $node->psql($database, $block, on_error_stop => 1, extra_params => \@psql_options);

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
	# which README says to do then
	$node->restart if $block =~ /^ALTER SYSTEM/m;
	return;
}

sub run_shell
{
	my ($block) = @_;
	my ($first_line) = $block =~ /\A(.*)/;
	my ($out, $err);

	local $ENV{PGHOST} = $node->host;
	local $ENV{PGPORT} = $node->port;
	local $ENV{PGUSER} = $user;
	local $ENV{PGDATABASE} = $database;
	local $ENV{PSQLRC} = '/dev/null';
	my $input = $block =~ /\bcat > / ? $polar->token . "\n" : '';
	ok(IPC::Run::run([ 'sh', '-eu', '-c', "cd '" . $node->basedir . "'\n$block" ], '<', \$input, '>', \$out, '2>', \$err), "runs: $first_line");
	unlike($err, qr/ERROR|FATAL|not found/, "without an error: $first_line") or diag($err);
	return;
}

my %pages = map { $_ => 0 } glob "$FindBin::Bin/../{README.md,doc/*.md,examples/README.md}";

sub run_page
{
	my ($page, $at_least) = @_;
	my $file = "$FindBin::Bin/../$page";
	my $text = slurp_file($file);

	while ($text =~ /^```(sql|sh)\n(.*?)^```$/msg)
	{
		my ($language, $block) = ($1, adapt($2));
		$pages{$file}++;
		$language eq 'sql' ? run_sql($block) : run_shell($block);
	}
	cmp_ok($pages{$file}, '>=', $at_least, "$page has examples");
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
run_page('doc/monitoring.md', 2);

# Pages that begin with a server, or a table, of their own.
sub new_database
{
	my ($name) = @_;

	$node->safe_psql('postgres', "CREATE DATABASE $name");
	$database = $name;
	return;
}

new_database('options');
$node->safe_psql($database, 'CREATE EXTENSION aibilling_polar');
run_page('doc/options.md', 2);

new_database('capture');
$node->safe_psql($database, qq{
CREATE EXTENSION aibilling_polar;
CREATE SERVER polar FOREIGN DATA WRAPPER polar OPTIONS (url '$url');
CREATE TABLE llm_calls (id bigint PRIMARY KEY, workspace_id text, model text, prompt_tokens int, completion_tokens int, details jsonb, generation_id text)});
run_page('doc/capture.md', 3);

# The sidecar and "your server", which has no extension.
my $yours = PostgreSQL::Test::Cluster->new('yours');
$yours->init(allows_streaming => 'logical');
$yours->start;
$your_server = $yours->connstr('postgres') =~ s/'//gr;
new_database('sidecar');
run_page('doc/sidecar.md', 3);
$yours->safe_psql('postgres', q{INSERT INTO usage (external_customer_id, provider, model, input_tokens, output_tokens) VALUES ('c', 'openai', 'gpt-5', 1200, 350)});
ok($node->poll_query_until('sidecar', 'SELECT cost_cents = 0.5 FROM usage'), 'a row has gone to the sidecar');
$node->safe_psql('sidecar', 'DROP SUBSCRIPTION usage');
$yours->stop;

$database = 'app';
run_page('doc/operations.md', 15);
is($adapted, 8, 'destination and token file are replaced');

# That page ends by taking the extension away.
is($node->safe_psql('app', 'SELECT count(*) FROM pg_extension WHERE extname = $$aibilling_polar$$'), '0', 'it is uninstalled');
is($node->safe_psql('app', 'SELECT count(*) > 10 FROM usage'), 't', 'and the rows are there');

# No example is forgotten.
foreach my $file (sort keys %pages)
{
	my ($text, $page) = (slurp_file($file), $file =~ s{.*/\.\./}{}r);
	my @marks = grep { !/^(?:sql|sh)$/ } $text =~ /^```((?:sql|sh)\b.*)$/mg;

	is(join("\n", grep { !/ norun: \w/ && !($page eq 'README.md' && /^sh (?:apt|source)$/) } @marks), '', "$page: what does not run says why");
	is(() = $text =~ /^```(?:sql|sh)$/mg, $pages{$file}, "$page: all others are run");
	unlike($text, qr/^    (?:\$|sudo|psql|apt-get|dev\/|make|docker|SELECT|CREATE|ALTER) ?/m, "$page: examples are fenced");
}

$node->stop;
$polar->stop;

done_testing();
