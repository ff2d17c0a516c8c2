# The clients that applications have: each writes rows in its own way, with NULLs for what was not set, writes
# some again, and reads costs back to the last digit. doc/clients.md says what to know of them.
#
# dev/clients fetches them, and dev/test says by AIBILLING_CLIENTS where they are.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use AibillingNode;
use IPC::Run;
use JSON::PP;
use PolarServer;
use Test::More;

plan skip_all => 'python3 is not on PATH' unless PolarServer->python;

my $dir = $ENV{AIBILLING_CLIENTS} // '';
my $json = JSON::PP->new->allow_bignum;

# Client, its language, and whether its own DDL makes the table.
my @clients = (
	[ pg => 'node', 0 ], [ postgres => 'node', 0 ], [ drizzle => 'node', 0, 'drizzle-orm' ], [ knex => 'node', 0 ],
	[ sequelize => 'node', 1 ], [ typeorm => 'node', 1 ],
	[ psycopg2 => 'python', 0 ], [ psycopg => 'python', 0 ], [ asyncpg => 'python', 0 ],
	[ sqlalchemy => 'python', 1 ], [ django => 'python', 1 ],
	[ jdbc => 'java', 0 ]);
my $driver = "$dir/java/usr/share/java/postgresql.jar";

my $polar = PolarServer->new;
my $node = AibillingNode->new('main', conf => "aibilling_polar.poll_interval = 1\nlisten_addresses = '127.0.0.1'\n");
$node->create_server($polar);
$node->safe_psql('postgres', q{
INSERT INTO aibilling.price (provider, model, input, output) VALUES ('openai', 'gpt-5', 1.25, 10), ('tiny', 'tiny', 0.000000001, 0);});
my $user = $node->safe_psql('postgres', 'SELECT current_user');

# Runs one step of a client. Returns what it printed; undef if it cannot be had.
sub run_client
{
	my ($client, $language, $step) = @_;
	my @command =
	  $language eq 'node' ? ('node', "$FindBin::Bin/clients/clients.js")
	  : $language eq 'java' ? ('java', '-cp', $driver, "$FindBin::Bin/clients/Jdbc.java")
	  : ('/usr/bin/python3', "$FindBin::Bin/clients/clients.py");

	local $ENV{NODE_PATH} = "$dir/node/node_modules";
	local $ENV{PYTHONPATH} = "$dir/python/usr/lib/python3/dist-packages";
	local $ENV{PYTHONDONTWRITEBYTECODE} = 1;
	local $ENV{PGHOST} = $node->host;
	local $ENV{PGPORT} = $node->port;
	local $ENV{PGDATABASE} = 'postgres';
	local $ENV{PGUSER} = $user;
	IPC::Run::run([ @command, $client, $step ], '<', \undef, '>', \my $out, '2>', \my $err);
	return $json->decode($out) if $? == 0 && $out ne '';
	diag("$client, $step: $err");
	return;
}

# Is the package of a client there?
sub can_be_had
{
	my ($client, $language, $package) = @_;

	return -d "$dir/node/node_modules/" . ($package // $client) if $language eq 'node';
	return -f $driver && system('java --list-modules 2>/dev/null | grep -q ^jdk.compiler') == 0 if $language eq 'java';
	local $ENV{PYTHONPATH} = "$dir/python/usr/lib/python3/dist-packages";
	return -x '/usr/bin/python3' && system("/usr/bin/python3 -c 'import $client' 2>/dev/null") == 0;
}

my %nulls = (tier => 'standard', input => '1000', nanos => '1250000', status => 'priced');
my %written = (tier => 'standard', input => '1200', nanos => '5000000', status => 'priced');
my %read = (tier => 'standard', input => '9007199254740993', nanos => '9007199255', status => 'priced');

# Cents as a client's decimal type writes them: with zeros behind, perhaps.
sub is_cents
{
	my ($got, $cents, $what) = @_;

	like($got // '', qr/^\Q$cents\E(?:0*|\.0*)$/, $what);
	return;
}

sub is_row
{
	my ($got, $expected, $cents, $what) = @_;
	my %seen = map { $_ => $got->{$_} } keys %$expected;

	is_deeply(\%seen, $expected, $what) || diag(explain($got));
	is_cents($got->{cents}, $cents, "$what, exactly");
	return;
}

# ---------------------------------------------------------------------------
# What changes nothing of a delivered row, in plain SQL
# ---------------------------------------------------------------------------

$node->create_usage_table('done');
my $columns = 'external_id, occurred_at, external_customer_id, provider_cost, tags, units';
my $row = q{'done_1', '2026-01-01 00:00Z', 'c', 0.10, '{"a": 1.0, "b": [1, 2]}', '{"image": 2.50}'};
my $excluded = join ', ', map { "$_ = excluded.$_" } split(/, /, $columns), qw(cost_nanos cost_cents cost_status);
$node->safe_psql('postgres', "INSERT INTO done ($columns) VALUES ($row)");
$node->wait_settled;

sub change
{
	my ($sql) = @_;
	my ($rc, undef, $err) = $node->psql('postgres', $sql);

	return $err;
}

is(change($_), '', $_)
  for ('UPDATE done SET provider_cost = 0.1',
	q{UPDATE done SET provider_cost = 0.1000, tags = '{"b": [1.0, 2], "a": 1}', units = '{"image": 2.5}', cost_cents = 10.00},
	q{UPDATE done SET occurred_at = '2026-01-01 01:00+01'},
	'UPDATE done SET cost_nanos = NULL, cost_cents = NULL, cost_status = NULL, external_id = NULL, occurred_at = NULL',
	"INSERT INTO done ($columns) VALUES ($row) ON CONFLICT (external_id) DO UPDATE SET $excluded",
	q{INSERT INTO done (external_id, occurred_at, external_customer_id, provider_cost, tags, units)
	VALUES ('done_1', '2026-01-01 00:00Z', 'c', 0.1, '{"a": 1, "b": [1.00, 2]}', '{"image": 2.5}')
	ON CONFLICT (external_id) DO UPDATE SET provider_cost = excluded.provider_cost, tags = excluded.tags, units = excluded.units});
like(change($_), qr/cannot update usage row 1 of "done": it has been delivered/, $_)
  for ('UPDATE done SET provider_cost = 0.11',
	q{UPDATE done SET tags = '{"a": 2, "b": [1, 2]}'},
	q{UPDATE done SET occurred_at = '2026-01-01 00:00:00.000001Z'},
	'UPDATE done SET external_customer_id = NULL');
is($node->safe_psql('postgres', 'SELECT cost_nanos, cost_cents, provider_cost, cost_status FROM done'),
	'100000000|10|0.1|reported', 'the row costs what it did');

# A customer of one's own goes, and leaves what was billed alone.
is(change(q{
CREATE TABLE customer (key text PRIMARY KEY);
INSERT INTO customer VALUES ('c');
ALTER TABLE done ADD COLUMN customer_key text REFERENCES customer ON DELETE SET NULL;
UPDATE done SET customer_key = 'c';
DELETE FROM customer;}), '', 'ON DELETE SET NULL of a column that is not ours');
is($node->safe_psql('postgres', 'SELECT external_customer_id, customer_key IS NULL FROM done'), 'c|t', 'empties that column only');

# ---------------------------------------------------------------------------
# The clients
# ---------------------------------------------------------------------------

# They change what they have written: nothing is sent meanwhile.
$node->safe_psql('postgres', q{SELECT aibilling.pause('polar')});
my @tried;
foreach (@clients)
{
	my ($client, $language, $own_ddl, $package) = @$_;
	my $table = "by_$client";

  SKIP:
	{
		skip "$client: " . ($language eq 'java' ? 'no JDK, or ' : '') . 'dev/clients has not fetched it', 1 unless $dir ne '' && can_be_had($client, $language, $package);
		if ($own_ddl)
		{
			run_client($client, $language, 'create') // fail("$client makes a table");
			my ($rc, undef, $err) = $node->psql('postgres', "SELECT aibilling.attach('$table', 'polar')");
			is("$rc$err", '0', "$client: a table of its own making is a usage table") or next;
		}
		else
		{
			$node->create_usage_table($table);
		}

		my $result = run_client($client, $language, 'write');
		ok($result, "$client writes") or next;
		push @tried, $_;
		is_row($result->{insert}, \%written, '0.5', "$client inserts");
		is($json->encode([ $result->{insert}{tags}{n} ]), '[1.5]', "$client: tags");
		is_row($result->{nulls}, \%nulls, '0.125', "$client: NULLs take their defaults");
		is(length $result->{nulls}{external_id}, 36, "$client: also external_id");
		is_deeply($result->{nulls}{tags}, {}, "$client: and tags");
		is_row($result->{upsert}, \%written, '0.5', "$client writes the same again");
		is_row($result->{read}, \%read, '900.719925474099', "$client reads what no double holds");
		ok(scalar(grep { /cannot be sent: no customer/ } @{ $result->{warnings} }), "$client shows warnings to who asks for them")
		  if $client =~ /^(pg|postgres|psycopg2?|jdbc)$/;
		is_deeply($result->{error}, [ '23514', $table, 'external_id' ], "$client: errors name table and column") if $client eq 'pg';
	}
}

SKIP:
{
	skip 'no client', 1 unless @tried;

	# The rows without a customer stay, all others are delivered.
	$node->safe_psql('postgres', q{SELECT aibilling.resume('polar')});
	$node->wait_settled;
	my @tables = ('done', map { "by_$_->[0]" } @tried);
	my $delivered = join ' UNION ALL ',
	  map { "SELECT external_id, external_customer_id, model, cost_nanos, cost_cents FROM $_ WHERE external_customer_id IS NOT NULL" } @tables;
	$node->safe_psql('postgres', "CREATE VIEW delivered AS $delivered");
	$node->sums_equal($polar, 'all that they wrote is delivered, exactly', 'delivered');

	foreach (@tried)
	{
		my ($client, $language) = @$_;
		my $result = run_client($client, $language, 'again');

		is_row($result->{upsert}, \%written, '0.5', "$client writes a delivered row again, unchanged");
	}
	is($node->safe_psql('postgres', q{SELECT count(*) FROM aibilling.outbox WHERE state <> 'rejected'}), '0', 'nothing is sent twice');
}
$node->stop;

done_testing();
