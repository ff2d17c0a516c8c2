# Three servers without the extension feed one table of a hub, which delivers, while publishers, hub, workers and
# connections are killed and the hub's standby takes over. Nothing is lost, nothing is billed twice.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use AibillingNode;
use PolarServer;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

plan skip_all => 'python3 is not on PATH' unless PolarServer->python;

my $conf = <<'EOC';
wal_level = logical
max_wal_senders = 10
max_replication_slots = 10
max_worker_processes = 30
max_logical_replication_workers = 15
max_prepared_transactions = 10
wal_retrieve_retry_interval = 100ms
restart_after_crash = on
aibilling_polar.poll_interval = 1
EOC
my $polar = PolarServer->new;
my $hub = AibillingNode->new('hub', conf => $conf, start => 0);

$hub->append_conf('pg_hba.conf', "local replication all trust\n");
$hub->start;
$hub->safe_psql('postgres', 'CREATE EXTENSION aibilling_polar');
$hub->create_server($polar, requests_per_minute => 0, batch_size => 100);
$hub->safe_psql('postgres', q{
INSERT INTO aibilling.price (provider, model, input, output) VALUES ('p', 'm', 1.25, 2.5);
SELECT aibilling.create_usage_table('usage', 'polar', replicated => true)});
$hub->backup('base');
my $standby = bless PostgreSQL::Test::Cluster->new('standby'), 'AibillingNode';
$standby->init_from_backup($hub, 'base', has_streaming => 1);
$standby->start;
$hub->append_conf('postgresql.conf', "synchronous_standby_names = 'standby'\n");
$hub->reload;

# Of each the options of its subscription, as far as the server knows them.
my $streaming = $hub->pg_version >= 16 ? 'streaming = parallel' : 'streaming = on';
my %options = (a => $streaming, b => 'two_phase = on', c => "$streaming, two_phase = on");
my %publisher;
my %rows = (a => 0, b => 0, c => 0);

for my $name (sort keys %options)
{
	my $node = $publisher{$name} = PostgreSQL::Test::Cluster->new("publisher_$name");

	$node->init(allows_streaming => 'logical', extra => [ '--encoding=UTF8', '--locale=C' ]);
	$node->append_conf('postgresql.conf',
		"fsync = off\nmax_prepared_transactions = 10\nlogical_decoding_work_mem = 64kB\n");
	$node->start;
	$node->safe_psql('postgres', $hub->safe_psql('postgres', q{SELECT aibilling.usage_table_ddl('usage')}));
	there($name, insert($name, 50));
	subscribe($name);
}

sub there
{
	my ($name, @sql) = @_;

	return $publisher{$name}->safe_psql('postgres', join ";\n", @sql);
}

# Rows that come and are counted. Their ids are the same at every publisher.
sub insert
{
	my ($name, $n) = @_;
	my $from = $rows{$name} + 1;

	$rows{$name} += $n;
	return 'INSERT INTO usage (external_id, provider, model, external_customer_id, input_tokens, output_tokens, tags) '
	  . "SELECT '${name}_' || i, 'p', 'm', 'customer_${name}_' || i % 5, i * 37, i % 11, jsonb_build_object('publisher', '$name') "
	  . "FROM generate_series($from, $rows{$name}) i";
}

# Rows that do not.
sub void
{
	my ($name, $n) = @_;

	return 'INSERT INTO usage (external_id, provider, model, external_customer_id, input_tokens) '
	  . "SELECT 'void_${name}_' || i, 'p', 'm', 'void', 1 FROM generate_series(1, $n) i";
}

sub subscribe
{
	my ($name) = @_;
	my $info = $publisher{$name}->connstr('postgres') =~ s/'/''/gr;

	$hub->safe_psql('postgres', "CREATE SUBSCRIPTION $name CONNECTION '$info' PUBLICATION aibilling_usage "
		  . "WITH ($options{$name}, synchronous_commit = on)");
	$hub->wait_for_subscription_sync($publisher{$name}, $name);
	return;
}

# All of it has come, and is what each publisher has.
sub settled
{
	my ($what) = @_;
	my $sums = q{SELECT count(*), sum(input_tokens), sum(output_tokens), count(DISTINCT external_id) FROM usage WHERE tags->>'publisher' = '%s'};

	for my $name (sort keys %publisher)
	{
		my $query = sprintf $sums, $name;
		my $there = there($name, $query);

		$hub->poll_query_until('postgres', $query, $there) or diag($hub->diagnosis);
		like($there, qr/^$rows{$name}\|/, "$what: publisher $name has its rows");
		is($hub->safe_psql('postgres', $query), $there, "$what: the hub has them all");
	}
	$hub->wait_settled;
	$hub->sums_equal($polar, "$what: sums equal by customer and model");
	return;
}

# A round of everything that writes.
sub write_rows
{
	for my $name (sort keys %publisher)
	{
		there($name, insert($name, 1));
		there($name, 'BEGIN', insert($name, 3), 'SAVEPOINT s', void($name, 5), 'ROLLBACK TO s', insert($name, 2), 'COMMIT');
		# more than is decoded in memory: streamed, where that is on
		there($name, 'BEGIN', insert($name, 500), 'SAVEPOINT s', void($name, 500), 'ROLLBACK TO s', insert($name, 20), 'COMMIT');
		there($name, 'BEGIN', void($name, 500), 'ROLLBACK');
		there($name, 'BEGIN', insert($name, 7), q{PREPARE TRANSACTION 'stays'});
		there($name, 'BEGIN', void($name, 7), q{PREPARE TRANSACTION 'goes'});
		there($name, q{COMMIT PREPARED 'stays'});
		there($name, q{ROLLBACK PREPARED 'goes'});
	}
	return;
}

settled('the copy');
is($hub->safe_psql('postgres', 'SELECT count(DISTINCT id) = count(*) FROM usage'), 't', 'ids that collide there do no harm');
write_rows();
settled('streams, prepared and rolled back');

# The same external_id at two of them: one of the rows is billed.
there('a', q{INSERT INTO usage (external_id, provider, model, external_customer_id, input_tokens) VALUES ('shared', 'p', 'm', 'c', 1)});
$publisher{a}->wait_for_catchup('a');
there('b', q{INSERT INTO usage (external_id, provider, model, external_customer_id, input_tokens) VALUES ('shared', 'p', 'm', 'c', 2)});
$publisher{b}->wait_for_catchup('b');
is($hub->safe_psql('postgres', q{SELECT input_tokens FROM usage WHERE external_id = 'shared'}), '1', 'of two rows of one external_id the first is billed');
is($hub->safe_psql('postgres', 'SELECT skipped FROM aibilling.status'), '1', 'the second is counted');

# ---------------------------------------------------------------------------
# Killed
# ---------------------------------------------------------------------------

# While an open transaction holds up what comes: it is half applied when it happens.
sub apply_is_held_up
{
	my ($happens, $what) = @_;
	my $session = $hub->background_psql('postgres');

	$session->query_safe(q{BEGIN; LOCK TABLE usage IN SHARE MODE});
	write_rows();
	$hub->poll_query_until('postgres', q{SELECT count(*) > 0 FROM pg_locks WHERE relation = 'usage'::regclass AND NOT granted});
	$happens->();
	$session->query_safe('COMMIT');
	$session->quit;
	settled($what);
	return;
}

my $workers = q{FROM pg_stat_subscription WHERE pid IS NOT NULL};
apply_is_held_up(
	sub {
		my @pids = split /\n/, $hub->safe_psql('postgres', "SELECT pid $workers");

		cmp_ok(scalar @pids, '>=', 3, 'the subscriptions run');
		$hub->safe_psql('postgres', "SELECT pg_terminate_backend($_)") for @pids;
	},
	'apply workers are ended');
apply_is_held_up(
	sub {
		there($_, q{SELECT pg_terminate_backend(pid) FROM pg_stat_replication}) for sort keys %publisher;
	},
	'connections are cut');
write_rows();
$_->stop('immediate') for values %publisher;
$_->start for values %publisher;
settled('publishers are killed');
write_rows();
$hub->stop('immediate');
write_rows();
$hub->start;
settled('the hub is killed');
my ($pid) = split /\n/, $hub->safe_psql('postgres', "SELECT pid $workers");
my $before = $hub->log_offset;
kill 'KILL', $pid;
$hub->wait_for_log(qr/database system is ready to accept connections/, $before);
write_rows();
settled('an apply worker is killed, and with it every session of the hub');

# ---------------------------------------------------------------------------
# Made again; taken over
# ---------------------------------------------------------------------------

my $inserted = $polar->summary->{inserted};
my $skipped = $hub->safe_psql('postgres', 'SELECT skipped FROM aibilling.status');
$hub->safe_psql('postgres', 'DROP SUBSCRIPTION b');
subscribe('b');
settled('a subscription is made again');
is($polar->summary->{inserted}, $inserted, 'nothing of it is sent again');
is($hub->safe_psql('postgres', 'SELECT skipped FROM aibilling.status'), $skipped + $rows{b} + 1, 'all of it is skipped');

write_rows();
$hub->stop('immediate');
$standby->promote;
$standby->append_conf('postgresql.conf', "synchronous_standby_names = ''\n");
$standby->reload;
$hub = $standby;
write_rows();
settled('the standby takes over');
is($hub->safe_psql('postgres', q{SELECT sum(unexpected_duplicates) FROM aibilling.delivery}), '0', 'Polar was not asked to tell anything apart');
is($hub->safe_psql('postgres', q{SELECT count(*) FROM usage WHERE external_id LIKE 'void%'}), '0', 'what was rolled back has not come');

done_testing();
