
# monitoring/: the queries by the exporter of Debian's package, as a role that has pg_monitor and nothing
# else; the alert rules by promtool; every query of the dashboard by Prometheus itself.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use AibillingNode;
use File::Spec;
use HTTP::Tiny;
use IPC::Run;
use JSON::PP;
use PolarServer;
use PostgreSQL::Test::Utils;
use Test::More;

plan skip_all => 'python3 is not on PATH' unless PolarServer->python;

my $monitoring = "$FindBin::Bin/../monitoring";
my $polar = PolarServer->new;
my $node = AibillingNode->new('main');
$node->create_server($polar);
$node->create_usage_table;
$node->safe_psql('postgres', q{CREATE ROLE monitor LOGIN IN ROLE pg_monitor;});
$node->insert_rows(50);
$node->wait_settled;
$node->safe_psql('postgres', q{
INSERT INTO usage (provider, model, external_customer_id, input_tokens) VALUES ('no', 'price', 'c', 1), ('no', 'price', 'c', 2);
INSERT INTO usage (provider_cost) VALUES (1);
SET aibilling_polar.enqueue = off;
INSERT INTO usage (external_customer_id, provider_cost) VALUES ('c', 1);
RESET aibilling_polar.enqueue;
SELECT aibilling.pause();
INSERT INTO usage (occurred_at, external_customer_id, provider_cost) SELECT now() - interval '1 hour', 'c', 1 FROM generate_series(1, 7);});

sub program
{
	my ($name) = @_;
	my ($path) = grep { -x } map { File::Spec->catfile($_, $name) } File::Spec->path;

	return $path;
}

# ---------------------------------------------------------------------------
# The queries by themselves, as that role
# ---------------------------------------------------------------------------

my %query;
my $yaml = slurp_file("$monitoring/queries.yaml");
$query{$1} = $2 while $yaml =~ /^(\w+):\n  query: \|\n(.*?)^  metrics:/msg;
is(join(' ', sort keys %query), 'aibilling_price_quarantine aibilling_subscription aibilling_table aibilling_work aibilling_worker', 'there are queries');
foreach my $name (sort keys %query)
{
	my ($declared) = $yaml =~ /^\Q$name\E:.*?^  metrics:\n(.*?)(?=^\w|\z)/ms;
	my @columns = $declared =~ /^    - (\w+):/mg;

	is($node->safe_psql('postgres', "SET ROLE monitor; SELECT count(*) >= 0 FROM (SELECT @{[ join ', ', @columns ]} FROM ($query{$name}) q) c"), 't', "$name: its columns are those declared");
}
my $seen = $node->safe_psql('postgres', "SET ROLE monitor; SELECT usage_table, polar_server, pending, unpriced, rejected, in_flight, oldest_seconds BETWEEN 3600 AND 7000, delivered, paused, unauthorized, not_queued FROM ($query{aibilling_table}) q");
is($seen, 'usage|polar|7|2|1|0|t|50|1|0|1', 'aibilling_table: what there is');
is($node->safe_psql('postgres', "SET ROLE monitor; SELECT up, start_seconds > 1e9 FROM ($query{aibilling_worker}) q"), '1|t', 'aibilling_worker');
like(($node->psql('postgres', 'SET ROLE monitor; SELECT * FROM usage'))[2], qr/permission denied/, 'the role cannot read usage');

# Progress: a sync that waits for an answer, as this role and as others see it
$node->safe_psql('postgres', q{CREATE ROLE stranger LOGIN});
$polar->fault(kind => 'hang', times => 1);
$node->safe_psql('postgres', 'SELECT aibilling.resume()');
$polar->wait(hung => 1);
my $sync = $node->background_psql('postgres');
$sync->query_until(qr/started/, "\\echo started\nCALL aibilling.sync();\n");
$node->poll_query_until('postgres', q{SELECT count(*) = 1 FROM aibilling.progress WHERE work = 'sync'});
is($node->safe_psql('postgres', q{SET ROLE monitor; SELECT done, total, unit FROM aibilling.progress WHERE work = 'sync'}), '0|7|rows', 'progress of a sync');
is($node->safe_psql('postgres', q{SET ROLE stranger; SELECT count(*) FROM aibilling.progress}), '0', 'others see none of it');
$polar->release;
$node->wait_settled;
$sync->quit;
$node->poll_query_until('postgres', 'SELECT count(*) = 0 FROM aibilling.progress');
pass('and its end');

# How far the others are: each is held up by what it needs.
my $worker = $node->background_psql('postgres', on_error_stop => 0);

sub progress_of
{
	my ($statement, $expected, $hold, $release) = @_;
	my ($work) = $statement =~ /aibilling\.(\w+)/;

	$hold->();
	$worker->query_until(qr/started/, "\\echo started\n$statement;\n");
	my $query = "SELECT usage_table, done, total, unit FROM aibilling.progress WHERE work = '$work'";
	$node->poll_query_until('postgres', $query, $expected);
	is($node->safe_psql('postgres', "SET ROLE monitor; $query"), $expected, "progress of $work");
	is($node->safe_psql('postgres', 'SET ROLE stranger; SELECT count(*) FROM aibilling.work_done()'), '0', 'others see none of it');
	$release->();
	$node->poll_query_until('postgres', 'SELECT count(*) = 0 FROM aibilling.work_done()');
	return;
}

my $locker = $node->background_psql('postgres');
my @held_by = (sub { $locker->query_safe('BEGIN; SELECT pg_advisory_lock(1)') }, sub { $locker->query_safe('SELECT pg_advisory_unlock(1); COMMIT') });
$node->safe_psql('postgres', q{
CREATE FUNCTION waits() RETURNS text LANGUAGE plpgsql AS $$BEGIN PERFORM pg_advisory_xact_lock_shared(1); RETURN 'c'; END$$;
SELECT aibilling.create_usage_table('captured', 'polar');
CREATE TABLE calls (id int PRIMARY KEY, prompt_tokens int);
INSERT INTO calls SELECT n, n FROM generate_series(1, 12000) n;
ANALYZE calls;
CREATE FUNCTION holds() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN PERFORM pg_advisory_xact_lock_shared(1); RETURN NEW; END$$;
CREATE TRIGGER holds BEFORE INSERT ON aibilling.price FOR EACH ROW EXECUTE FUNCTION holds();
});
progress_of(q{SELECT aibilling.capture('calls', 'captured', columns => '{"external_customer_id": "CASE WHEN id = 11000 THEN public.waits() ELSE ''c'' END"}', existing => 'load')},
	'captured|10000|12000|rows', @held_by);
# It waits for the lock of a row of its third part.
$node->safe_psql('postgres', q{
SELECT aibilling.create_usage_table('there', 'polar');
INSERT INTO aibilling.price (provider, model, input) VALUES ('there', 'm', 1);
SET aibilling_polar.enqueue = off;
INSERT INTO there (provider, model, external_customer_id, input_tokens) SELECT 'there', 'm', 'c', 1 FROM generate_series(1, 2500);
UPDATE aibilling.price SET input = 2 WHERE provider = 'there'});
progress_of(q{SELECT count(*) FROM aibilling.reprice('there', dry_run => false)}, 'there|2000||rows',
	sub { $locker->query_safe('BEGIN; SELECT FROM there WHERE id = 2400 FOR UPDATE') }, sub { $locker->query_safe('COMMIT') });
$node->safe_psql('postgres', q{DROP TABLE there; DELETE FROM aibilling.price WHERE provider = 'there'});
progress_of(q{SELECT count(*) FROM aibilling.import_prices('{"m": {"litellm_provider": "p", "mode": "chat", "input_cost_per_token": 1e-6, "output_cost_per_token": 2e-6}}', 'litellm', false)},
	'|0|2|prices', @held_by);
$node->safe_psql('postgres', 'DROP TRIGGER holds ON aibilling.price');
$node->safe_psql('postgres', q{
DROP TABLE calls, captured;
SELECT aibilling.create_usage_table('many', 'polar');
INSERT INTO many (external_customer_id, provider_cost) SELECT 'c', 0.01 FROM generate_series(1, 250)});
$node->wait_settled;
progress_of(q{SELECT count(*) FROM aibilling.reconcile('many', now() - interval '1 day', now() + interval '1 day')},
	'|2|4|pages', sub { $polar->fault(kind => 'hang', times => 1, path => '/v1/events/', after => 2) }, sub { $polar->release });
$node->safe_psql('postgres', 'DROP TABLE many');
$worker->quit;
$locker->quit;

# ---------------------------------------------------------------------------
# The alert rules
# ---------------------------------------------------------------------------

my $promtool = program('promtool');
SKIP:
{
	skip 'promtool is not on PATH', 1 unless defined $promtool;
	my $output = '';

	ok(IPC::Run::run([ $promtool, 'check', 'rules', "$monitoring/alerts.yaml" ], '>&', \$output), 'promtool takes the rules') or diag($output);
	ok(IPC::Run::run([ $promtool, 'test', 'rules', "$monitoring/alerts_test.yaml" ], '>&', \$output), 'each alert fires when it should') or diag($output);
	my @alerts = slurp_file("$monitoring/alerts.yaml") =~ /- alert: (\w+)/g;
	my $tests = slurp_file("$monitoring/alerts_test.yaml");
	is(join(' ', grep { $tests !~ /eval_time: \w+\n\s+alertname: $_\n/ } @alerts), '', 'and is tested');
}

# ---------------------------------------------------------------------------
# The exporter, Prometheus, the dashboard
# ---------------------------------------------------------------------------

my $exporter = program('prometheus-postgres-exporter');
my $prometheus = program('prometheus');
SKIP:
{
	skip 'prometheus-postgres-exporter and prometheus are not on PATH', 1 unless defined $exporter && defined $prometheus;
	my $dir = $node->basedir;
	my ($port, $web) = (PostgreSQL::Test::Cluster::get_free_port(), PostgreSQL::Test::Cluster::get_free_port());
	my $http = HTTP::Tiny->new(proxy => undef, http_proxy => undef, timeout => 10);
	my ($metrics, $log, $plog) = ('', '', '');
	local $ENV{DATA_SOURCE_NAME} = sprintf 'host=%s port=%d user=monitor dbname=postgres sslmode=disable', $node->host, $node->port;
	my $running = IPC::Run::start([ $exporter, "--extend.query-path=$monitoring/queries.yaml", "--web.listen-address=127.0.0.1:$port" ], '>&', \$log);
	$node->write_token("$dir/prometheus.yml", "global: {scrape_interval: 1s}\nscrape_configs:\n  - {job_name: pg, static_configs: [{targets: ['127.0.0.1:$port']}]}\n", 0644);
	my $server = IPC::Run::start([ $prometheus, "--config.file=$dir/prometheus.yml", "--storage.tsdb.path=$dir/tsdb", "--web.listen-address=127.0.0.1:$web" ], '>&', \$plog);

	foreach (1 .. 300)
	{
		my $answer = $http->get("http://127.0.0.1:$port/metrics");

		$metrics = $answer->{content} if $answer->{success};
		last if $metrics =~ /^aibilling_table_delivered/m;
		eval { $running->pump_nb };
		select undef, undef, undef, 0.1;
	}
	like($metrics, qr/^aibilling_table_delivered\{[^}]*usage_table="usage"[^}]*\} 57$/m, 'the exporter scrapes what was delivered') or diag($log);
	like($metrics, qr/^aibilling_table_$_->[0]\{[^}]*\} $_->[1]$/m, "and $_->[0]") foreach [ 'unpriced', 2 ], [ 'rejected', 1 ], [ 'not_queued', 1 ], [ 'paused', 0 ];
	like($metrics, qr/^aibilling_worker_up\{[^}]*\} 1$/m, 'and the worker');
	like($metrics, qr/^pg_exporter_last_scrape_error\S* 0$/m, 'without an error');
	unlike($metrics, qr/^pg_exporter_user_queries_load_error\S* 1$/m, 'of the file either');

	my $dashboard = decode_json(slurp_file("$monitoring/grafana-dashboard.json"));
	my @exprs = map { map { $_->{expr} } @{ $_->{targets} } } @{ $dashboard->{panels} };
	cmp_ok(scalar @exprs, '>', 15, 'the dashboard has queries');
	my %left = map { ($_ => 1) } @exprs;
	foreach (1 .. 300)
	{
		foreach my $expr (sort keys %left)
		{
			my $asked = ($expr =~ s/\$instance/.*/gr) =~ s/([^A-Za-z0-9_.-])/sprintf '%%%02X', ord $1/ger;
			my $answer = $http->get("http://127.0.0.1:$web/api/v1/query?query=$asked");

			next unless $answer->{success};
			my $result = decode_json($answer->{content});
			delete $left{$expr} if $result->{status} eq 'success' && @{ $result->{data}{result} };
		}
		last unless %left;
		eval { $server->pump_nb };
		select undef, undef, undef, 0.2;
	}
	is(join("\n", sort keys %left), '', 'each of them has an answer of Prometheus') or diag($plog);
	$_->kill_kill foreach $running, $server;
}

$node->stop;
done_testing();
