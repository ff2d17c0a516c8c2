# A subscription's initial copy, with the triggers on: once priced and sent, once priced and kept. Both sides are compared
# to the last digit, by customer and model.
#
# AIBILLING_LONG=1 copies a million rows each time and prints how long it took.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use AibillingNode;
use PolarServer;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time);

plan skip_all => 'python3 is not on PATH' unless PolarServer->python;

my $rows = $ENV{AIBILLING_LONG} ? 1_000_000 : 20_000;
my $polar = PolarServer->new;
my $hub = AibillingNode->new('hub');
my $publisher = PostgreSQL::Test::Cluster->new('publisher');
my $info = '';

$hub->create_server($polar, requests_per_minute => 0, batch_size => 1000);

# The second price is none that a nano divides.
hub(q{INSERT INTO aibilling.price (provider, model, input, output) VALUES ('p', 'm0', 1.25, 10), ('p', 'm1', 0.123456789, 0.1)});

$publisher->init(allows_streaming => 'logical', extra => [ '--encoding=UTF8', '--locale=C' ]);
$publisher->append_conf('postgresql.conf', "fsync = off\nmax_wal_size = 8GB\n");
$publisher->start;
$info = $publisher->connstr('postgres') =~ s/'/''/gr;

sub hub { return $hub->safe_psql('postgres', shift) }
sub there { return $publisher->safe_psql('postgres', shift) }

# What is billed of the publisher's rows, by arithmetic of its own: nanos and cents of each row are rounded once.
my $billed = q{
SELECT external_customer_id, model, count(*), sum(input_tokens), sum(round(usd * 1000000000)), trim_scale(sum(round(usd * 100, 12)))
FROM (SELECT *, (input_tokens * CASE model WHEN 'm0' THEN 1.25 ELSE 0.123456789 END
	+ output_tokens * CASE model WHEN 'm0' THEN 10 ELSE 0.1 END) / 1000000.0 AS usd FROM TABLE) t
GROUP BY 1, 2 ORDER BY 1, 2};

# Make a table of so many rows there, have it copied here, and compare.
sub copy
{
	my ($table, $what) = @_;
	my $ddl = hub("SELECT aibilling.create_usage_table('$table', 'polar', replicated => true); SELECT aibilling.usage_table_ddl('$table')");

	there($ddl =~ s/\A$table\n//r);
	there(qq{INSERT INTO $table (external_id, provider, model, external_customer_id, input_tokens, output_tokens)
		SELECT '${table}_' || i, 'p', 'm' || i % 2, 'c' || i % 100, i % 5000, i % 700 FROM generate_series(1, $rows) i});
	my $started = time;
	hub("CREATE SUBSCRIPTION $table CONNECTION '$info' PUBLICATION aibilling_$table");
	$hub->wait_for_subscription_sync($publisher, $table);
	note(sprintf('%s: %d rows copied and priced in %.0f s', $what, $rows, time - $started));
	is(hub("SELECT external_customer_id, model, count(*), sum(input_tokens), sum(cost_nanos), trim_scale(sum(cost_cents)) FROM $table GROUP BY 1, 2 ORDER BY 1, 2"),
		there($billed =~ s/\bTABLE\b/$table/r), "$what: rows, tokens, nanos and cents are equal by customer and model");
	is(hub("SELECT apply_error_count + sync_error_count FROM pg_stat_subscription_stats WHERE subname = '$table'"), '0', "$what: no error");
	return $started;
}

# ---------------------------------------------------------------------------
# Sent
# ---------------------------------------------------------------------------

my $started = copy('usage', 'sent');
$hub->wait_settled;
note(sprintf('sent: %d rows delivered after %.0f s', $rows, time - $started));
my $summary = $polar->wait(events => $rows);
is($summary->{stored}, $rows, 'each row has arrived, once');
is(hub("SELECT sum(cost_cents) = $summary->{cost_amount} FROM usage"), 't', 'and what it costs');
is(hub('SELECT count(*) FROM aibilling.outbox'), '0', 'nothing is left');
is(hub(q{SELECT sum(usage_rows) || ' ' || sum(cost_nanos) FROM aibilling.usage_daily('usage')}), hub(q{SELECT count(*) || ' ' || sum(cost_nanos) FROM usage}), 'the rollup counts them');

# ---------------------------------------------------------------------------
# Kept: as doc/sidecar.md says
# ---------------------------------------------------------------------------

hub('ALTER DATABASE postgres SET aibilling_polar.enqueue = off');
copy('history', 'kept');
hub('ALTER DATABASE postgres RESET aibilling_polar.enqueue; ALTER SUBSCRIPTION history DISABLE');
$hub->poll_query_until('postgres', q{SELECT count(*) = 0 FROM pg_stat_subscription WHERE subname = 'history' AND pid IS NOT NULL});
hub('ALTER SUBSCRIPTION history ENABLE');
is(hub(q{SELECT count(*) FROM aibilling.outbox}), '0', 'no row of it waits');
there(q{INSERT INTO history (external_id, provider, model, external_customer_id, input_tokens) VALUES ('new', 'p', 'm0', 'c', 7)});
$publisher->wait_for_catchup('history');
$hub->wait_settled;
is(hub(q{SELECT delivered FROM aibilling.status WHERE usage_table = 'history'::regclass}), '1', 'only what comes after it is sent');
is($polar->wait(events => $rows + 1)->{stored}, $rows + 1, 'and has arrived');
is(hub(q{SELECT sum(usage_rows) FROM aibilling.usage_daily('history')}), '1', 'the rollup counts what is sent');

$hub->stop;
$publisher->stop;
done_testing();
