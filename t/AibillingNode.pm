
=pod

=head1 NAME

AibillingNode - a PostgreSQL node with aibilling_polar in it

=head1 SYNOPSIS

  use AibillingNode;
  use PolarServer;

  my $polar = PolarServer->new;
  my $node = AibillingNode->new('main');
  $node->create_server($polar, batch_size => 10);
  $node->create_usage_table;
  $node->insert_rows(100);
  $node->wait_settled;
  $node->sums_equal($polar, 'every cent has arrived');

=head1 DESCRIPTION

A PostgreSQL::Test::Cluster whose methods know the extension. Server and usage
table have the names "polar" and "usage" unless others are given; everything
happens in database "postgres".

=cut

package AibillingNode;

use strict;
use warnings;

use Carp;
use HTTP::Tiny;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

our @ISA = ('PostgreSQL::Test::Cluster');

my $db = 'postgres';
my $tokens = 0;

=pod

=head1 METHODS

=over

=item AibillingNode->new($name, %options)

Make a node, start it and create the extension. Options: preload (default 1),
databases (default 'postgres'), conf (lines of postgresql.conf), extension
(default 1), start (default 1; 0 leaves both to the caller).

=cut

sub new
{
	my ($class, $name, %options) = @_;
	my $self = bless PostgreSQL::Test::Cluster->new($name), $class;
	my $databases = $options{databases} // $db;

	# By default newer servers' tests take what fits the locale, SQL_ASCII.
	$self->init(extra => [ '--encoding=UTF8', '--locale=C' ]);
	$self->append_conf('postgresql.conf', "fsync = off\n");
	$self->append_conf('postgresql.conf', <<"EOC") if $options{preload} // 1;
shared_preload_libraries = 'aibilling_polar'
aibilling_polar.databases = '$databases'
EOC
	$self->append_conf('postgresql.conf', $options{conf})
	  if defined $options{conf};
	if ($options{start} // 1)
	{
		$self->start;
		$self->safe_psql($db, 'CREATE EXTENSION aibilling_polar')
		  if $options{extension} // 1;
	}
	return $self;
}

=pod

=item $node->restart

Stop and start it. pg_ctl's restart would start the program that ran, without
the tool that dev/sanitize has put around it.

=cut

sub restart
{
	my ($self) = @_;

	$self->stop;
	return $self->start;
}

=pod

=item $node->token_file($token)

Write a file that only the server's user can read; returns its path.

=cut

sub token_file
{
	my ($self, $token) = @_;
	my $path = $self->basedir . '/token' . ++$tokens;

	$self->write_token($path, $token);
	return $path;
}

=pod

=item $node->write_token($path, $token, $mode)

Replace such a file.

=cut

sub write_token
{
	my ($self, $path, $token, $mode) = @_;

	unlink $path;
	open my $file, '>', $path or croak "$path: $!";
	chmod $mode // 0600, $path;
	print $file $token;
	close $file;
	return;
}

=pod

=item $node->create_server($polar, %options)

Create a foreign server that delivers to the stand-in. Options are those of
CREATE SERVER, and "name".

=cut

sub create_server
{
	my ($self, $polar, %options) = @_;
	my $name = delete $options{name} // 'polar';
	my %all = (
		url => $polar->url,
		event_name => 'llm_usage',
		access_token_file => $options{access_token_file} // $self->token_file($polar->token),
		%options);
	my $list = join ', ', map { "$_ " . _quote($all{$_}) } sort keys %all;

	$self->safe_psql($db, "CREATE SERVER $name FOREIGN DATA WRAPPER polar OPTIONS ($list)");
	return;
}

sub _quote
{
	my ($text) = @_;

	return "'" . ($text =~ s/'/''/gr) . "'";
}

=pod

=item $node->create_usage_table($table, $server)

=cut

sub create_usage_table
{
	my ($self, $table, $server) = @_;

	$table //= 'usage';
	$server //= 'polar';
	$self->safe_psql($db, "SELECT aibilling.create_usage_table('$table', '$server')");
	return;
}

=pod

=item $node->insert_rows($n, %options)

Insert rows of known costs, by one statement. Options: table, prefix (of
external_id, default 'row_': row_1, row_2, ...; or undef), from (the first
number, default 1).

=cut

sub rows_sql
{
	my ($self, $n, %options) = @_;
	my $table = $options{table} // 'usage';
	my $from = $options{from} // 1;
	my $to = $from + $n - 1;
	my $prefix = $options{prefix} // 'row_';

	return "INSERT INTO $table (external_id, provider, model, external_customer_id, "
	  . 'input_tokens, output_tokens, provider_cost) '
	  . "SELECT '$prefix' || i, 'openai', 'gpt-' || i % 3, 'customer_' || i % 7, "
	  . "i, i % 100, i * 0.000001234567 FROM generate_series($from, $to) i";
}

sub insert_rows
{
	my ($self, $n, %options) = @_;

	$self->safe_psql($db, $self->rows_sql($n, %options));
	return;
}

=pod

=item $node->poll_query_until($database, $query, $expected)

As PostgreSQL::Test::Cluster's.  Where nobody looks at what it returns, running
out of time is a failed test of its own, and the end.

=cut

sub poll_query_until
{
	my ($self, $database, $query, $expected) = @_;
	my $done = $self->SUPER::poll_query_until($database, $query, $expected);

	$self->_give_up("query: $query") if !$done && !defined wantarray;
	return $done;
}

# What was waited for has not come: a failed test that says where, and no more of this file.
sub _give_up
{
	my ($self, $what) = @_;
	my $level = 1;

	$level++ while (caller $level)[0] eq __PACKAGE__;
	my (undef, $file, $line) = caller $level;
	fail("wait of $file line $line ends: $what");
	die $self->diagnosis;
}

=pod

=item $node->wait_settled

Block until nothing is pending or in flight (rows that are rejected or wait for
a price do not count).

=cut

sub wait_settled
{
	my ($self) = @_;

	$self->poll_query_until($db,
		"SELECT NOT EXISTS (SELECT FROM aibilling.outbox WHERE state = 'pending') "
		  . "AND NOT EXISTS (SELECT FROM aibilling.delivery WHERE state = 'sending')")
	  or $self->_give_up('rows are delivered');
	return;
}

=pod

=item $node->wait_folded($database)

Block until what was delivered is in the rollup.

=cut

sub wait_folded
{
	my ($self, $database) = @_;

	$self->poll_query_until($database // $db, 'SELECT NOT EXISTS (SELECT FROM aibilling.share)')
	  or $self->_give_up('what was delivered is in the rollup');
	return;
}

=pod

=item $node->wait_status($regex, $table)

Block until the status of a usage table, in words, matches.  Returns whether it
does; where nobody looks at that, running out of time is a failed test.

=cut

sub wait_status
{
	my ($self, $regex, $table) = @_;
	my $query = _quote($regex);

	$table = _quote($table // 'usage');
	my $matches = $self->poll_query_until($db,
		"SELECT status ~ $query FROM aibilling.status WHERE usage_table = $table\::regclass");
	return $matches if $matches;
	$self->_give_up("status of $table matches $regex") if !defined wantarray;
	diag($self->diagnosis);
	return 0;
}

sub status
{
	my ($self, $table) = @_;

	$table = _quote($table // 'usage');
	return $self->safe_psql($db,
		"SELECT status FROM aibilling.status WHERE usage_table = $table\::regclass");
}

=pod

=item $node->diagnosis

What a failed wait should show.

=cut

sub diagnosis
{
	my ($self) = @_;
	my ($rc, $out, $err) = $self->psql(
		$db, q{
SELECT usage_table, pending, unpriced, rejected, in_flight, worker_pid, status FROM aibilling.status;
SELECT 'outbox', state, count(*), min(usage_id), max(usage_id), min(not_before), min(error) FROM aibilling.outbox GROUP BY state;
SELECT 'delivery', id, state, attempts, http_status, events, inserted, duplicates, not_before, error
FROM aibilling.delivery ORDER BY id DESC LIMIT 10;});

	return "$out\n$err";
}

=pod

=item $node->worker_pid

The worker's process id; waits until there is one.

=item $node->worker_waits($other_than)

Block until the worker (another one than of this process id, if given) sleeps,
which is when only a wake-up or a poll makes it look. Returns its process id.

=cut

my $worker = "FROM pg_stat_activity WHERE backend_type = 'aibilling_polar worker' "
  . "AND datname = '$db'";

sub worker_pid
{
	my ($self) = @_;

	$self->poll_query_until($db, "SELECT count(*) = 1 $worker")
	  or $self->_give_up('a worker has started');
	return $self->safe_psql($db, "SELECT pid $worker");
}

sub worker_waits
{
	my ($self, $other_than) = @_;

	$other_than //= 0;
	$self->poll_query_until($db,
		"SELECT count(*) = 1 $worker AND pid <> $other_than AND state = 'idle' "
		  . "AND wait_event_type = 'Extension'")
	  or $self->_give_up('the worker comes to rest');
	return $self->safe_psql($db, "SELECT pid $worker");
}

=pod

=item $node->sums_equal($polar, $what, @tables)

Test that the stand-in holds exactly what the usage tables hold: each
external_id once, and the same costs to the last digit by customer and by
model.

=cut

sub sums_equal
{
	my ($self, $polar, $what, @tables) = @_;
	my $rows = join ' UNION ALL ',
	  map { "SELECT external_id, external_customer_id, coalesce(model, '') AS model, "
	  . "cost_nanos, cost_cents FROM $_" }
	  @tables ? @tables : ('usage');
	my $file = $self->basedir . '/events.json';

	# Not through Perl's JSON, which is slow and would see doubles.
	my $answer = HTTP::Tiny->new(proxy => undef, http_proxy => undef)
	  ->get("http://127.0.0.1:$polar->{control_port}/_test/events");
	croak "events: $answer->{status}" if !$answer->{success};
	$self->write_token($file, $answer->{content});
	my $result = $self->safe_psql(
		$db, qq{
CREATE TEMP TABLE event AS
	SELECT e->>'external_id' AS external_id, e->>'customer' AS customer,
		coalesce(e->>'model', '') AS model, (e->'event'->'metadata'->>'cost_nanos')::bigint AS nanos,
		(e->>'cost_amount')::numeric AS cents
	FROM jsonb_array_elements(pg_read_file('$file')::jsonb) e;
CREATE TEMP TABLE row AS $rows;
SELECT 'missing ' || count(*) FROM row WHERE external_id NOT IN (SELECT external_id FROM event)
	HAVING count(*) > 0;
SELECT 'unknown ' || count(*) FROM event WHERE external_id NOT IN (SELECT external_id FROM row)
	HAVING count(*) > 0;
SELECT 'twice ' || external_id FROM event GROUP BY external_id HAVING count(*) > 1;
SELECT 'customer ' || coalesce(a.customer, b.customer), a.nanos, b.nanos, a.cents, b.cents
FROM (SELECT external_customer_id AS customer, sum(cost_nanos) AS nanos, sum(cost_cents) AS cents
	  FROM row GROUP BY 1) a
	FULL JOIN (SELECT customer, sum(nanos) AS nanos, sum(cents) AS cents FROM event GROUP BY 1) b
	ON a.customer = b.customer
WHERE (a.nanos, a.cents) IS DISTINCT FROM (b.nanos, b.cents);
SELECT 'model ' || coalesce(a.model, b.model), a.nanos, b.nanos, a.cents, b.cents
FROM (SELECT model, sum(cost_nanos) AS nanos, sum(cost_cents) AS cents FROM row GROUP BY 1) a
	FULL JOIN (SELECT model, sum(nanos) AS nanos, sum(cents) AS cents FROM event GROUP BY 1) b
	ON a.model = b.model
WHERE (a.nanos, a.cents) IS DISTINCT FROM (b.nanos, b.cents);});

	return is($result, '', $what);
}

=pod

=item $node->ledger($expression, $where)

A value computed from the ledger.

=cut

sub ledger
{
	my ($self, $expression, $where) = @_;

	return $self->safe_psql($db,
		"SELECT $expression FROM aibilling.delivery" . (defined $where ? " WHERE $where" : ''));
}

=pod

=item $node->log_offset, $node->log_since($offset)

Where the server's log ends now, and what has been written after such a point.

=cut

sub log_offset
{
	my ($self) = @_;

	return -s $self->logfile;
}

sub log_since
{
	my ($self, $offset) = @_;

	return substr slurp_file($self->logfile), $offset;
}

=pod

=back

=cut

1;
