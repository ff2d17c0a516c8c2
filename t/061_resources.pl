
# What the worker holds while it works: memory and file descriptors that do not
# grow with the number of requests, memory that is bounded whatever waits, and
# a full disk that costs time but no row.
#
# AIBILLING_REQUESTS (default 2000) and AIBILLING_BACKLOG (default 30000) make
# it longer by hand: 100000 and 10000000 are what the extension promises.

use strict;
use warnings;

use AibillingNode;
use PolarServer;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

plan skip_all => 'python3 is not on PATH' unless PolarServer->python;
plan skip_all => 'needs Linux: /proc' unless -r "/proc/$$/status" && -d "/proc/$$/fd";

my $requests = $ENV{AIBILLING_REQUESTS} // 2000;
my $backlog = $ENV{AIBILLING_BACKLOG} // 30000;
my $inserted = 0;

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

# One number of /proc/PID/status, in kB.
sub status_kb
{
	my ($name) = @_;
	my ($kb) = slurp_file("/proc/$worker/status") =~ /^$name:\s+(\d+) kB/m;

	return $kb // die "no $name in /proc/$worker/status";
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

sub deliver
{
	my ($n) = @_;

	$node->insert_rows($n, from => $inserted + 1);
	$inserted += $n;
	$node->wait_settled;
	$node->worker_waits;
	return;
}

sub measure
{
	return { contexts => contexts(), anon => status_kb('RssAnon'), %{ descriptors() } };
}

#
# Many requests.
#

# The caches fill and glibc's heap reaches its size.  Some statements run, and
# keep their plans, only once there have been many requests.
my $warm_up = 1500;
deliver($warm_up);
my $before = measure();
deliver($requests);
my $after = measure();
foreach my $name (qw(anon files sockets))
{
	note "$name: $before->{$name}, then $after->{$name}";
}
my $growth = 0;
my %names = (%{ $before->{contexts} }, %{ $after->{contexts} });
foreach my $name (sort keys %names)
{
	my $more = ($after->{contexts}{$name} // 0) - ($before->{contexts}{$name} // 0);
	$growth += $more;
	note "$name: $more bytes more" if $more;
}

is($node->ledger('count(*)', "state = 'delivered'"),
	$warm_up + $requests, 'each row was a request');
is($node->worker_pid, $worker, 'of one and the same worker');

# A leak of 32 bytes a request, the least that malloc hands out, exceeds this.
cmp_ok($growth, '<', 16 * $requests, 'memory contexts do not grow with requests');
cmp_ok(($after->{anon} - $before->{anon}) * 1024,
	'<', 256 * $requests, 'nor does the process');
cmp_ok($after->{files}, '<=', $before->{files}, 'open files do not grow');
cmp_ok($after->{sockets}, '<=', $before->{sockets} + 4, 'nor do sockets');

#
# Much that waits.
#

$node->safe_psql('postgres', 'SELECT aibilling.pause()');
$node->safe_psql('postgres',
	"ALTER SERVER polar OPTIONS (SET batch_size '1000', ADD batch_bytes '262144')");
$node->insert_rows($backlog, from => $inserted + 1);
$inserted += $backlog;
$node->worker_waits;

# From here on the peak counts.
append_to_file("/proc/$worker/clear_refs", '5');
my $resident = status_kb('VmHWM');
$node->safe_psql('postgres', 'SELECT aibilling.resume()');
$node->wait_settled;
my $peak = status_kb('VmHWM');
note "resident $resident kB, at its peak $peak kB";
is($node->worker_pid, $worker, 'the same worker delivered the backlog');
is($node->ledger('sum(inserted)::bigint + sum(duplicates)::bigint'),
	$inserted, 'all of it');
# Shared buffers count as resident once they are touched: 128 MB at most here.
cmp_ok($peak - status_kb('RssShmem') - status_kb('RssFile'),
	'<', 32 * 1024, 'memory is bounded by what is in flight, not by what waits');

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

	my $real = PolarServer->new;
	$node->safe_psql('postgres', 'SELECT aibilling.pause()');
	$node->safe_psql('postgres',
		"ALTER SERVER polar OPTIONS (SET url '" . $real->url . "', SET batch_size '1',"
		  . " SET access_token_file '" . $node->token_file($real->token) . "')");
	$node->safe_psql('postgres', "TRUNCATE usage");
	mkdir "$disk/space";
	$node->safe_psql('postgres', "CREATE TABLESPACE small LOCATION '$disk/space'");
	$node->safe_psql('postgres', 'DELETE FROM aibilling.delivery');
	$node->safe_psql('postgres', "ALTER TABLE $_ SET TABLESPACE small")
	  foreach 'aibilling.delivery', 'usage';
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
