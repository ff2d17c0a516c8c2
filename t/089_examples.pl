# examples/ as they are, with the real packages and canned answers of the providers: each writes the rows that it should,
# at the cost that is right, and all of them are delivered. roles.sql gives each role what it says and nothing else.
#
# dev/clients fetches the packages, and dev/test says by AIBILLING_CLIENTS where they are.

use strict;
use warnings;

use Cwd;
use FindBin;
use File::Copy qw(copy);
use File::Path qw(make_path);
use lib $FindBin::Bin;
use AibillingNode;
use IPC::Open2;
use IPC::Run;
use PolarServer;
use PostgreSQL::Test::Utils;
use Test::More;

plan skip_all => 'python3 is not on PATH' unless PolarServer->python;

my $clients = $ENV{AIBILLING_CLIENTS} // '';
my $examples = "$FindBin::Bin/../examples";
my $polar = PolarServer->new;
my $node = AibillingNode->new('examples');
my $db = 'postgres';
$node->create_server($polar);
$node->create_usage_table;
$node->safe_psql($db, 'SELECT aibilling.load_bundled_prices()');
my $user = $node->safe_psql($db, 'SELECT current_user');

# The providers.
my $providers = open2(my $port, my $providers_input, PolarServer->python, "$FindBin::Bin/examples/answers.py");
chomp(my $base = 'http://127.0.0.1:' . <$port>);

my %environment = (
	PGHOST => $node->host, PGPORT => $node->port, PGDATABASE => $db, PGUSER => $user,
	OPENAI_API_KEY => 'x', OPENAI_BASE_URL => "$base/v1",
	ANTHROPIC_API_KEY => 'x', ANTHROPIC_BASE_URL => $base,
	GEMINI_API_KEY => 'x', GOOGLE_GEMINI_BASE_URL => $base,
	OPENROUTER_API_KEY => 'x', OPENROUTER_BASE_URL => "$base/openrouter/v1",
	NO_PROXY => '127.0.0.1', no_proxy => '127.0.0.1',
	LANGSMITH_TRACING => 'false', AI_SDK_LOG_WARNINGS => 'false',
	PYTHONPATH => "$clients/python/usr/lib/python3/dist-packages:$FindBin::Bin/examples:$examples",
	PYTHONDONTWRITEBYTECODE => 1);

# Node finds packages beside the file or above it, so the examples are copied to where the packages are linked to.
sub node_directory
{
	my ($packages) = @_;
	my $dir = $node->basedir . "/$packages";

	return $dir if -d $dir;
	make_path("$dir/orm");
	copy($_, "$dir/" . ($_ =~ s{.*examples/}{}r)) or die "$_: $!" for glob "$examples/*.mjs $examples/orm/*.mjs";
	symlink "$clients/$packages/node_modules", "$dir/node_modules" or die "$dir: $!";
	return $dir;
}

my $node22 = (glob "$clients/node22/node_modules/node-linux-*/bin/node")[0];

# Runs a command; what it prints, or undef.
sub run_example
{
	my ($what, $dir, @command) = @_;

	local %ENV = (%ENV, %environment);
	my $old = getcwd();
	chdir $dir or die "$dir: $!";
	my $ok = IPC::Run::run(\@command, '<', \undef, '>', \my $printed, '2>', \my $errors, IPC::Run::timeout(120));
	chdir $old;
	ok($ok, "$what runs") or diag($errors);
	is($errors =~ s/^.*ExperimentalWarning.*\n|^\(Use `node.*\n//mgr, '', "$what: no warning");
	return $printed;
}

# What is in the table since the last look: model, cents, status and what it counts, one row a line, sorted.
my $seen = 0;

sub rows
{
	my $rows = $node->safe_psql($db, "SELECT concat_ws(' ', model, trim_scale(cost_cents), cost_status, "
		  . 'input_tokens, cache_read_tokens, cache_write_tokens, output_tokens, reasoning_tokens) '
		  . "FROM usage WHERE id > $seen ORDER BY 1");
	$seen = $node->safe_psql($db, 'SELECT coalesce(max(id), 0) FROM usage');
	return $rows;
}

# 200 x 1.25 + 1000 x 0.125 + 350 x 10; 20 x 2 + 5000 x 0.2 + 1000 x 2.5 + 100 x 10; 1000 x 0.3 + 100 x 2.5, per million
my $gpt = 'gpt-5-2025-08-07 0.3875 priced 1200 1000 350 200';
my $claude = 'claude-sonnet-5 0.454 priced 6020 5000 1000 100';
my $gemini = 'gemini-2.5-flash 0.055 priced 1000 100 60';

my @javascript = (
	[ 'openai.mjs', 'sdk', ($gpt) x 4, 'text-embedding-3-small 0.002 priced 1000' ],
	[ 'anthropic.mjs', 'sdk', ($claude) x 2 ],
	[ 'google.mjs', 'sdk', ($gemini) x 2 ],
	[ 'openrouter.mjs', 'sdk', 'qwen/qwen3-235b-a22b 0.181 reported 2600 500' ],
	[ 'langchain.mjs', 'sdk', ($gpt) x 2 ],
	[ 'ai-sdk.mjs', 'ai5', ($gpt) x 2, $claude ],
	[ 'ai-sdk.mjs', 'ai6', ($gpt) x 2, $claude ],
	[ 'ai-sdk.mjs', 'ai7', ($gpt) x 2, $claude ]);

foreach (@javascript)
{
	my ($file, $packages, @expected) = @$_;
	my $what = $packages eq 'sdk' ? $file : "$file with $packages";

  SKIP:
	{
		skip "$what: dev/clients has not fetched it", 1 unless -d "$clients/$packages/node_modules" && ($packages ne 'ai7' || $node22);
		my $printed = run_example($what, node_directory($packages), $packages eq 'ai7' ? $node22 : 'node', $file);
		is(rows(), join("\n", sort @expected), "$what: its rows, at the right cost");
		my @costs = $printed =~ /cost_cents: '([0-9.]+)'/g;
		is(scalar(@costs), scalar(@expected), "$what: and each cost is shown at once") or diag($printed);
	}
}

my $hand = 'gpt-5 0.5 priced 1200 350';
my @mappings = (
	[ 'orm/drizzle.mjs', 'node', 'sdk' ], [ 'orm/typeorm.mjs', 'node', 'sdk' ],
	[ 'orm/sqlalchemy_usage.py', 'python', 'sqlalchemy' ], [ 'orm/django_usage.py', 'python', 'django' ]);

foreach (@mappings)
{
	my ($file, $language, $package) = @$_;

  SKIP:
	{
		my $there = $language eq 'node' ? -d "$clients/$package/node_modules" : has_python($package);
		skip "$file: dev/clients has not fetched it", 1 unless $there;
		my $printed = $language eq 'node' ? run_example($file, node_directory($package), 'node', $file)
		  : run_example($file, $examples, '/usr/bin/python3', $file);
		is(rows(), $hand, "$file: its row");
		like($printed, qr/^inserted .*0\.5.*priced/m, "$file: what it cost");
		like($printed, qr/^read .*\b1200n? .*\b5000000n?\b.*feature.*chat/m, "$file: reads it back") or diag($printed);
	}
}

sub has_python
{
	my ($package) = @_;
	local $ENV{PYTHONPATH} = $environment{PYTHONPATH};
	return -x '/usr/bin/python3' && system("/usr/bin/python3 -c 'import $package' 2>/dev/null") == 0;
}

SKIP:
{
	skip 'psycopg: dev/clients has not fetched it', 1 unless has_python('psycopg');
	my $printed = run_example('psycopg_usage.py', $examples, '/usr/bin/python3', 'psycopg_usage.py');
	is(rows(), $hand, 'psycopg_usage.py: one row');
	like($printed, qr/^first \(Decimal\('0\.50*'\), 'priced'\)\nagain None$/m, 'psycopg_usage.py: its cost, and none for the second try') or diag($printed);
	run_example('litellm_callback.py', "$FindBin::Bin/examples", '/usr/bin/python3', 'litellm_run.py');
	is(rows(), join("\n", ('gpt-5 0.3875 priced 1200 1000 350 200') x 2), 'litellm_callback.py: each call once');
	is($node->safe_psql($db, q{SELECT DISTINCT external_customer_id, tags->>'key' FROM usage WHERE external_id LIKE 'chatcmpl-litellm%'}),
		'user_123|team a', 'litellm_callback.py: whose, and by which key');
}

# ---------------------------------------------------------------------------
# All of it arrives
# ---------------------------------------------------------------------------

SKIP:
{
	skip 'nothing was fetched', 1 unless $seen;
	$node->wait_settled;
	is($node->safe_psql($db, 'SELECT count(*) FROM aibilling.outbox'), '0', 'no row is set aside');
	$node->sums_equal($polar, 'all is delivered, exactly');
}

# Each is short enough to read.
foreach my $file (glob "$examples/*.mjs $examples/*.py $examples/*.sql $examples/orm/*")
{
	cmp_ok(scalar(split /\n/, slurp_file($file)), '<', 60, $file =~ s{.*/examples/}{}r . ' is under 60 lines');
}

# ---------------------------------------------------------------------------
# Roles
# ---------------------------------------------------------------------------

$node->safe_psql($db, q{CREATE ROLE owner; GRANT CREATE ON SCHEMA public TO owner; ALTER TABLE usage OWNER TO owner;
GRANT USAGE ON FOREIGN SERVER polar TO owner;});
$node->safe_psql($db, slurp_file("$examples/roles.sql"));
$node->safe_psql($db, q{
CREATE ROLE app LOGIN; CREATE ROLE reporter LOGIN; CREATE ROLE operator LOGIN;
GRANT usage_writer TO app; GRANT usage_reporter TO reporter; GRANT usage_operator TO operator;});

sub as
{
	my ($role, $sql) = @_;
	my ($rc, $printed, $errors) = $node->psql($db, $sql, extra_params => [ '-U', $role ]);
	return $errors =~ /ERROR:  (.*)/ ? "ERROR $1" : $printed;
}

my $insert = q{INSERT INTO usage (external_id, provider, model, external_customer_id, input_tokens, output_tokens)
	VALUES ('roles', 'openai', 'gpt-5', 'user_123', 1200, 350)};
is(as('app', "$insert RETURNING cost_cents, cost_status"), '0.5|priced', 'the application inserts, and sees the cost');
is(as('app', "$insert ON CONFLICT (external_id) DO NOTHING RETURNING cost_cents"), '', 'and inserts nothing twice');
is(as('app', "BEGIN; INSERT INTO usage (external_customer_id, provider_cost) VALUES ('x', 1); SELECT count(*) FROM usage; ROLLBACK"), '1', 'it sees what its transaction wrote');
is(as('app', 'SELECT count(*) FROM usage'), '0', 'and nothing else');
like(as('app', $_), qr/^ERROR permission denied/, "not: $_")
  for ('UPDATE usage SET tags = $${}$$', 'DELETE FROM usage', 'TRUNCATE usage', q{INSERT INTO aibilling.price (provider, model, input) VALUES ('a', 'b', 1)});
is(as('reporter', 'SELECT sum(cost_cents) >= 0.5, count(*) > 0 FROM usage'), 't|t', 'the report sees all rows');
like(as('reporter', $_), qr/^ERROR permission denied/, "not: $_")
  for ('SELECT raw_usage FROM usage', $insert, 'DELETE FROM usage');
is(as('operator', $_), '', "the operator: $_")
  for (q{SELECT aibilling.pause('polar')}, q{SELECT aibilling.resume('polar')}, 'CALL aibilling.sync()', q{UPDATE usage SET raw_usage = NULL WHERE external_id = 'roles'});
is(as('operator', q{SELECT count(*) FROM aibilling.set_price('openai', 'gpt-5', output => 11)}), '1', 'the operator enters prices');
is(as('operator', 'SELECT count(*) FROM aibilling.status'), '1', 'and sees status');
like(as('operator', 'DROP SERVER polar'), qr/^ERROR must be owner/, 'but the server is not theirs');
$node->wait_settled;
$node->sums_equal($polar, 'rows are delivered with policies, too');

close $providers_input;
waitpid $providers, 0;
$node->stop;
$polar->stop;
done_testing();
