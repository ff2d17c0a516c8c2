
# What the worker holds while it works: memory and file descriptors that do not
# grow with the number of requests, whether they succeed or fail, memory that is
# bounded whatever waits, and a full disk that costs time but no row.
#
# AIBILLING_LONG=1 makes it what the extension promises: 100,000 requests and a
# backlog of 10,000,000 rows instead of 2,000 and 30,000.  AIBILLING_REQUESTS and
# AIBILLING_BACKLOG set other numbers.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use AibillingNode;
use File::Basename;
use List::Util qw(min);
use PolarServer;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

plan skip_all => 'python3 is not on PATH' unless PolarServer->python;
plan skip_all => 'needs Linux: /proc' unless -r "/proc/$$/status" && -d "/proc/$$/fd";

my $long = $ENV{AIBILLING_LONG};
my $requests = $ENV{AIBILLING_REQUESTS} // ($long ? 100_000 : 2000);
my $backlog = $ENV{AIBILLING_BACKLOG} // ($long ? 10_000_000 : 30_000);
my $inserted = 0;

# What valgrind and AddressSanitizer need themselves would be measured, too.
my $measurable = !$ENV{AIBILLING_POSTGRES};

my $polar = PolarServer->new(sink => 1);
my $node = AibillingNode->new('main', conf => <<'EOC');
aibilling_polar.poll_interval = 1
autovacuum = off
max_wal_size = 4GB
EOC
$node->create_server($polar, batch_size => 1, max_in_flight => 4,
	requests_per_minute => 0);
$node->create_usage_table;
my $worker = $node->worker_pid;

# One number of a file in /proc/PID, in kB.
sub proc_kb
{
	my ($file, $name) = @_;
	my ($kb) = slurp_file("/proc/$worker/$file") =~ /^$name:\s+(\d+) kB/m;

	return $kb // die "no $name in /proc/$worker/$file";
}

# Memory that is the worker's own, not a file's and not shared buffers.
sub own_kb
{
	return proc_kb('smaps_rollup', 'Pss_Anon');
}

# The most there has been of it since reset_peak.
sub peak_kb
{
	return proc_kb('status', 'VmHWM') - proc_kb('status', 'RssShmem') - proc_kb('status', 'RssFile');
}

sub reset_peak
{
	append_to_file("/proc/$worker/clear_refs", '5');
	return;
}

# What the worker has open.  Files of the database are kept open by PostgreSQL
# up to max_files_per_process.  Connections to Polar are kept for reuse, at most
# as many as requests are in flight.
sub descriptors
{
	my $data = $node->data_dir;
	my @links = grep { !/^\Q$data\E/ }
	  map { readlink($_) // () } glob "/proc/$worker/fd/*";

	return {
		files => scalar(grep { !/^socket:/ } @links),
		sockets => scalar(grep { /^socket:/ } @links)
	};
}

# What the worker's memory contexts hold in use, in bytes by name.
sub contexts
{
	my $offset = $node->log_offset;
	my %used;

	$node->safe_psql('postgres', "SELECT pg_log_backend_memory_contexts($worker)");
	$node->wait_for_log(qr/Grand total: .* used/, $offset);

	my $log = $node->log_since($offset);
	$used{$1} += $2
	  while $log =~ /level: \d+; (.*?): \d+ total.* (\d+) used/g;
	return \%used;
}

# How much more is in use, in bytes.
sub growth
{
	my ($from, $to) = @_;
	my %names = (%$from, %$to);
	my $growth = 0;

	foreach my $name (sort keys %names)
	{
		my $more = ($to->{$name} // 0) - ($from->{$name} // 0);
		$growth += $more;
		note "$name: $more bytes more" if $more;
	}
	return $growth;
}

sub deliver
{
	my ($n) = @_;

	$node->insert_rows($n, from => $inserted + 1);
	$inserted += $n;
	$node->wait_settled;
	$node->worker_waits;
	return;
}

# When nothing is left to do: a turn has memory of its own while it lasts.
sub measure
{
	$node->wait_folded;
	$node->worker_waits;
	return { contexts => contexts(), own => own_kb(), %{ descriptors() } };
}

#
# Usage tables that come and go.
#

sub come_and_go
{
	my ($times) = @_;

	foreach my $i (1 .. $times)
	{
		$node->create_usage_table('passing');
		$node->insert_rows(1, table => 'passing', prefix => 'passing_' . $node->ledger('count(*)') . '_');
		$node->wait_settled;
		$node->safe_psql('postgres', 'DROP TABLE passing');
	}
	$node->worker_waits;
	return contexts();
}

my $used = come_and_go(10);
my $used_later = come_and_go(30);

# PostgreSQL's caches keep 5 kB of each; plans would be 75.
cmp_ok(growth($used, $used_later),
	'<', 30 * 10240, 'little is kept of usage tables that are gone');

#
# Entries that have left the outbox, and cannot be vacuumed while somebody may
# still see them.  The scan over the outbox goes on where it ended.
#

my $entries = 20_000;
my $at_once = 50;
my $reader = $node->background_psql('postgres');

# How many pages of the outbox's index have been looked at.
sub pages
{
	$node->worker_waits;
	return $node->safe_psql('postgres',
		"SELECT idx_blks_hit + idx_blks_read FROM pg_statio_all_indexes WHERE indexrelname = 'outbox_entry_key'");
}

$node->safe_psql('postgres', "SELECT aibilling.pause(); ALTER SERVER polar OPTIONS (SET batch_size '$at_once')");
$reader->query_safe('BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1');
$node->safe_psql('postgres', "DO \$\$ BEGIN FOR n IN 1 .. $entries LOOP "
	  . "INSERT INTO usage (external_id, provider, model, external_customer_id, input_tokens, provider_cost) "
	  . "VALUES ('row_entry_' || n, 'openai', 'gpt', 'customer', 1, 0.001); COMMIT; END LOOP; END \$\$");
my $pages = pages();
$node->safe_psql('postgres', 'SELECT aibilling.resume()');
$node->wait_settled;

# From the start it would be as many as the index has, half of that on average.
$pages = (pages() - $pages) / ($entries / $at_once);
note "index pages read for each delivery: $pages";
cmp_ok($pages, '<', 40, 'deliveries do not look at those before them');
$reader->quit;
$node->safe_psql('postgres', "ALTER SERVER polar OPTIONS (SET batch_size '1')");

#
# Many requests.
#

# The caches fill and glibc's heap reaches its size.  Some statements run, and
# keep their plans, only once there have been many requests.
my $warm_up = 1500;
my $others = $node->ledger('count(*)');
deliver($warm_up);
my $before = measure();
my $after;
my @halves;
my $done = 0;
foreach my $share (0.01, 0.1, 0.5, 1)
{
	deliver($requests * $share - $done);
	$done = $requests * $share;
	$after = measure();
	note "after $done requests more: ", join ', ', map { "$_ $after->{$_}" } qw(own files sockets);
	push @halves, $after->{own} if $share >= 0.5;
}
is($node->ledger('count(*)', "state = 'delivered'"),
	$others + $warm_up + $requests, 'each row was a request');
is($node->worker_pid, $worker, 'of one and the same worker');

my $of_table = "usage_table = 'usage'::regclass";
my $summed_up = $node->safe_psql('postgres', "SELECT deliveries FROM aibilling.delivery_total WHERE $of_table");
cmp_ok($summed_up, '>=', $requests / 2, 'at least half of them are summed up');
is( $node->safe_psql('postgres',
		"SELECT deliveries, delivered, duplicates, vanished FROM aibilling.status WHERE $of_table"),
	$node->ledger('count(*), sum(events), sum(duplicates)::bigint, sum(vanished)::bigint', "state = 'delivered' AND $of_table"),
	'and status tells what the ledger does');

# A leak of 32 bytes a request, the least that malloc hands out, exceeds this.
cmp_ok(growth($before->{contexts}, $after->{contexts}), '<', 16 * $requests, 'memory contexts do not grow with requests');
SKIP:
{
	skip 'the process is not all its own', 1 unless $measurable;

	# A leak grows in both halves; what one statement took once, and glibc did not give back, in one.
	cmp_ok(min($halves[0] - $before->{own}, $halves[1] - $halves[0]) * 1024,
		'<', 256 * $requests / 2, 'nor does the process');
}
cmp_ok($after->{files}, '<=', $before->{files}, 'open files do not grow');
cmp_ok($after->{sockets}, '<=', $before->{sockets} + 4, 'nor do sockets');

#
# Requests that fail, and what else comes and goes.
#

my $real = PolarServer->new;
my $token = $node->token_file($real->token);

sub use_server
{
	my ($server) = @_;

	$node->safe_psql('postgres',
		"ALTER SERVER polar OPTIONS (SET url '" . $server->url . "', SET access_token_file '$token')");
	return;
}

# Let rows wait while something happens, again and again; then they must
# arrive, and nothing may be left open but the connections to the server.
sub stays
{
	my ($what, $times, $happens) = @_;

	$node->insert_rows(1, prefix => "stays_${what}_", from => $_) foreach 1 .. 3;
	foreach my $i (1 .. $times)
	{
		$happens->();
	}
	$real->clear_faults;
	use_server($real);
	$node->wait_settled;
	$node->worker_waits;

	my $now = descriptors();
	is($now->{files}, $after->{files}, "$what: files are closed");
	cmp_ok($now->{sockets}, '<=', $after->{sockets} + 4, "$what: and so are sockets");
	return;
}

# One more request that fails.
sub fail_once
{
	my $attempts = $node->ledger('sum(attempts)');

	$node->safe_psql('postgres', "SELECT aibilling.resume()");
	$node->poll_query_until('postgres',
		"SELECT sum(attempts) > $attempts AND bool_and(state <> 'sending' OR error IS NOT NULL)"
		  . " FROM aibilling.delivery");
	return;
}

use_server($real);
stays('nothing', 1, sub { });
$after = descriptors();

my $port = PolarServer->new;
$port->stop;
use_server($port);
stays('refused connections', 10, \&fail_once);

$real->fault(kind => 'drop_before_read', times => 'always');
stays('broken connections', 10, \&fail_once);

SKIP:
{
	my $pem = "$PostgreSQL::Test::Utils::tmp_check/tls";
	skip 'openssl is not there', 2
	  if system('openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost'
		  . " -out $pem.pem -keyout $pem.key 2>/dev/null") != 0;
	my $tls = PolarServer->new(tls_cert => "$pem.pem", tls_key => "$pem.key");

	use_server($tls);
	stays('TLS that is not trusted', 10, \&fail_once);
}

stays(
	'reload', 10,
	sub {
		$node->reload;
		$node->insert_rows(1, prefix => 'reload_' . ++$inserted);
		$node->wait_settled;
	});
stays(
	'pause and resume',
	10,
	sub {
		$node->safe_psql('postgres', 'SELECT aibilling.pause()');
		$node->insert_rows(1, prefix => 'pause_' . ++$inserted);
		$node->safe_psql('postgres', 'SELECT aibilling.resume()');
		$node->wait_settled;
	});
is($node->worker_pid, $worker, 'all that by one worker');
$node->sums_equal($real, 'every row arrived once', "(SELECT * FROM usage WHERE external_id !~ '^row_') usage");

#
# Much that waits.
#

my $batch_bytes = 262144;
my $batch_size = 1000;
my $in_flight = 4;

# The stand-in would take an hour for ten million rows.
my $url = $polar->url;
my $sink;
if ($long)
{
	my $program = "$PostgreSQL::Test::Utils::tmp_check/sink";
	my $free = PostgreSQL::Test::Cluster::get_free_port();

	system_or_bail('cc', '-O2', '-o', $program, dirname(__FILE__) . '/../bench/sink.c');
	$sink = IPC::Run::start([ $program, $free, 0 ]);
	$url = "http://127.0.0.1:$free";
}
$node->safe_psql('postgres', 'SELECT aibilling.pause()');
$node->safe_psql('postgres',
	"ALTER SERVER polar OPTIONS (SET url '$url', SET batch_size '$batch_size', ADD batch_bytes '$batch_bytes')");
my $delivered = $node->ledger('sum(inserted)::bigint + sum(duplicates)::bigint');
for (my $left = $backlog; $left > 0; $left -= 1_000_000)
{
	my $n = $left < 1_000_000 ? $left : 1_000_000;

	$node->insert_rows($n, prefix => 'backlog_', from => $left - $n + 1);
}
$node->worker_waits;

reset_peak();
my $rest = own_kb();
my $most = $rest;
$node->safe_psql('postgres', 'SELECT aibilling.resume()');
my $settled = "SELECT NOT EXISTS (SELECT FROM aibilling.outbox WHERE state = 'pending') "
  . "AND NOT EXISTS (SELECT FROM aibilling.delivery WHERE state = 'sending')";
my $samples = 0;
while ($node->safe_psql('postgres', $settled) eq 'f')
{
	my $own = own_kb();

	$most = $own if $own > $most;
	note 'delivered ', $node->ledger('coalesce(sum(inserted), 0)'), " rows in all: $own kB"
	  if $long && $samples++ % 500 == 0;
}
my $peak = peak_kb();
note "own memory: $rest kB, sampled up to $most kB, at its peak $peak kB";
is($node->worker_pid, $worker, 'the same worker delivered the backlog');
is($node->ledger('sum(inserted)::bigint + sum(duplicates)::bigint') - $delivered, $backlog, 'all of it');
SKIP:
{
	skip 'the process is not all its own', 1 unless $measurable;

	# A body may grow by doubling; libcurl copies it to a buffer of the same size
	# at most; one more may be built, and as it grows the smaller one is there, too.
	# Beside it lies each row's part of the sums, of which there are as many as a batch may have rows.
	cmp_ok(($peak - $rest) * 1024, '<', (3 * $batch_bytes + 200 * $batch_size) * ($in_flight + 1) + $batch_bytes + 1024 * 1024,
		'memory is bounded by what is in flight, not by what waits');
}

# Rows that are far wider than their events, all of it handed to a function.
my $width = 100_000;
$node->safe_psql('postgres', q{
SELECT aibilling.pause();
CREATE FUNCTION public.metadata(r jsonb) RETURNS jsonb LANGUAGE sql AS
	$$SELECT jsonb_build_object('length', length(r->>'prompt'))$$;
ALTER TABLE usage ADD prompt text;
ALTER SERVER polar OPTIONS (ADD metadata_function 'public.metadata')});
$node->insert_rows(300, prefix => 'wide_');
$node->safe_psql('postgres',
	"UPDATE usage SET prompt = repeat('x', $width) WHERE external_id LIKE 'wide%'");
$node->worker_waits;
my $before = $node->ledger('max(id)');
$rest = own_kb();
reset_peak();
$node->safe_psql('postgres', 'SELECT aibilling.resume()');
$node->wait_settled;
$peak = peak_kb();
note "own memory: $rest kB, with wide rows at its peak $peak kB";
SKIP:
{
	my $most = $node->ledger('max(events)', "id > $before");

	skip 'the process is not all its own', 1 unless $measurable;
	# users' functions have so long for a batch
	skip "only $most of 300 rows came to be in a batch in time", 1 if $most < 200;
	cmp_ok(($peak - $rest) * 1024, '<', 150 * $width, 'of which few rows are in memory at a time');
}
$node->safe_psql('postgres', 'ALTER SERVER polar OPTIONS (DROP metadata_function)');
$sink->kill_kill if $sink;

#
# A full disk.
#

SKIP:
{
	my $disk = $ENV{AIBILLING_SMALL_DISK};
	skip 'no small disk to fill: dev/test makes one when run as root', 6
	  unless defined $disk && -w $disk;
	my $rows = 3000;
	my $filler = "$disk/filler";

	$real->reset;
	$node->safe_psql('postgres', 'SELECT aibilling.pause()');
	$node->safe_psql('postgres',
		"ALTER SERVER polar OPTIONS (SET url '" . $real->url . "', SET batch_size '1')");
	$node->safe_psql('postgres', "TRUNCATE usage");
	mkdir "$disk/space";
	$node->safe_psql('postgres', "CREATE TABLESPACE small LOCATION '$disk/space'");
	$node->safe_psql('postgres', 'DELETE FROM aibilling.delivery');
	$node->safe_psql('postgres', 'VACUUM FULL aibilling.ledger');
	$node->safe_psql('postgres', "ALTER TABLE $_ SET TABLESPACE small")
	  foreach 'aibilling.ledger', 'usage';
	$node->insert_rows($rows, prefix => 'full_');

	open my $file, '>', $filler or die "$filler: $!";
	binmode $file;
	my $block = "\0" x 8192;
	1 while syswrite $file, $block;
	ok($!{ENOSPC}, 'the disk is full');
	close $file;

	my ($rc, $out, $err) = $node->psql('postgres',
		$node->rows_sql(5000, prefix => 'never_', from => 100000));
	like($err, qr/could not extend file .*No space left on device/, 'INSERT fails');

	my $offset = $node->log_offset;
	$node->safe_psql('postgres', 'SELECT aibilling.resume()');
	$node->wait_for_log(qr/could not extend file .*No space left on device/, $offset);
	cmp_ok($real->summary->{stored}, '<', $rows, 'the worker cannot go on');
	is($node->safe_psql('postgres', 'SELECT 1'), '1', 'the server can');

	unlink $filler;
	$node->wait_settled;
	$node->sums_equal($real, 'with space again, every row arrives once');
	is($node->ledger('coalesce(sum(unexpected_duplicates), 0)'),
		'0', 'and no duplicate is a surprise');
}

$node->stop;
done_testing();
