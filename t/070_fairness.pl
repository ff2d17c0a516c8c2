
# Who may stop whom: nobody.  A role does what it can with its own table, its
# own code and its own sessions; the rows of an honest table arrive meanwhile.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use AibillingNode;
use PolarServer;
use PostgreSQL::Test::Utils;
use Test::More;

plan skip_all => 'needs python3' unless PolarServer->python;

my $polar = PolarServer->new;
my $node = AibillingNode->new('main', conf => "max_prepared_transactions = 5\n");
my $honest = 0;

$node->create_server($polar, requests_per_minute => 0);
$node->create_usage_table('honest');
sql(q{CREATE ROLE eve LOGIN; GRANT USAGE ON FOREIGN SERVER polar TO eve; CREATE SCHEMA eve AUTHORIZATION eve});

sub sql
{
	my ($query) = @_;

	return $node->safe_psql('postgres', $query);
}

sub eve
{
	my ($query) = @_;
	my ($rc, $out, $err) =
	  $node->psql('postgres', $query, extra_params => [ '-U', 'eve' ], on_error_stop => 1);

	diag $err if $rc != 0;
	return $out;
}

sub eve_session
{
	return $node->background_psql('postgres', extra_params => [ '-U', 'eve' ], on_error_stop => 0);
}

# A table of eve's, fresh.
sub eves_table
{
	my ($name, @columns) = @_;

	eve("SELECT aibilling.create_usage_table('eve.$name', 'polar')");
	eve("ALTER TABLE eve.$name ADD COLUMN $_") foreach @columns;
	return;
}

# An INSERT of eve's: rows of one model.
sub eves_rows
{
	my ($table, $n, $model) = @_;

	$model //= 'gpt-0';
	return "INSERT INTO eve.$table (external_id, provider, model, external_customer_id, input_tokens) "
	  . "SELECT '$table$model' || i, 'eve', '$model', 'c', i FROM generate_series(1, $n) i;";
}

# The honest table's rows arrive.
sub honest_rows_arrive
{
	my ($what) = @_;

	$node->insert_rows(10, table => 'honest', from => $honest + 1);
	$honest += 10;
	my $arrived = $node->poll_query_until('postgres',
		"SELECT sum(delivered) = $honest FROM aibilling.status WHERE usage_table = 'honest'::regclass");
	return ok($arrived, $what);
}

sub price
{
	my ($model) = @_;

	return sql("INSERT INTO aibilling.price (provider, model, input) VALUES ('eve', '$model', 1)");
}

price('gpt-0');

#
# Errors of other people's code are never taken for our own end.
#

subtest 'an SQLSTATE of an owner\'s choosing' => sub {
	my $worker = $node->worker_waits;
	my @states = qw(query_canceled admin_shutdown crash_shutdown out_of_memory
	  serialization_failure lock_not_available too_many_connections internal_error);

	foreach my $state (@states)
	{
		my $table = $state;

		eves_table($table);
		eve(eves_rows($table, 3, $state));
		eve(qq{
CREATE FUNCTION eve.raise_$state() RETURNS trigger LANGUAGE plpgsql AS
	\$\$BEGIN RAISE EXCEPTION 'eve says no' USING ERRCODE = '$state'; END\$\$;
CREATE TRIGGER raise BEFORE UPDATE ON eve.$table FOR EACH ROW EXECUTE FUNCTION eve.raise_$state();});
		price($state);
	}
	honest_rows_arrive('whatever a trigger raises, others are served');
	foreach my $table (qw(query_canceled admin_shutdown crash_shutdown internal_error))
	{
		ok($node->poll_query_until('postgres',
			"SELECT count(*) = 3 FROM aibilling.outbox WHERE usage_table = 'eve.$table'::regclass "
			  . "AND state = 'rejected' AND error ~ 'eve says no'"),
			"$table: its own rows say why they are rejected") or diag $node->diagnosis;
	}
	is($node->worker_pid, $worker, 'the worker lives on');
	my (undef, undef, $err) = $node->psql('postgres', 'CALL aibilling.sync()');
	unlike($err, qr/ERROR/, 'sync() of a superuser is not ended, either');
	sql("SELECT aibilling.detach('eve.$_', 'discard')") foreach @states;
};

subtest 'a function of a server\'s options that raises query_canceled' => sub {
	my $worker = $node->worker_waits;

	sql(qq{
CREATE SERVER eves FOREIGN DATA WRAPPER polar OPTIONS (url '@{[ $polar->url ]}', requests_per_minute '0',
	access_token_file '@{[ $node->token_file($polar->token) ]}');
ALTER SERVER eves OWNER TO eve});
	eve(q{
CREATE FUNCTION eve.cancels(r jsonb) RETURNS jsonb LANGUAGE plpgsql AS
	$$BEGIN
	IF r->>'external_id' LIKE '%2' THEN
		RAISE EXCEPTION 'not this one' USING ERRCODE = 'query_canceled';
	END IF;
	RETURN '{"ok": true}';
END$$;
ALTER SERVER eves OPTIONS (ADD metadata_function 'eve.cancels', ADD event_name 'e');
SELECT aibilling.create_usage_table('eve.cancelled', 'eves');});
	eve(eves_rows('cancelled', 3));
	ok($node->poll_query_until('postgres',
		"SELECT delivered = 2 AND rejected = 1 FROM aibilling.status WHERE usage_table = 'eve.cancelled'::regclass"),
		'rejects the row, and no other') or diag $node->diagnosis;
	honest_rows_arrive('others are served');
	is($node->worker_pid, $worker, 'the worker lives on');
};

subtest 'code that catches its cancel' => sub {
	sql('ALTER TABLE honest ADD COLUMN IF NOT EXISTS note text');
	eve(q{
CREATE FUNCTION eve.resists(r jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$
BEGIN
	LOOP
		BEGIN
			PERFORM pg_sleep(3600);
		EXCEPTION WHEN query_canceled THEN NULL;
		END;
	END LOOP;
END$$;
ALTER SERVER eves OPTIONS (SET metadata_function 'eve.resists');
SELECT aibilling.create_usage_table('eve.resists', 'eves');});
	eve(eves_rows('resists', 1));
	honest_rows_arrive('holds nobody up for long');
	ok($node->wait_status('blocked: code that runs when its rows are read resisted', 'eve.resists'),
		'its table is blocked');

	# sync() has the worker's limits, whoever calls it.
	eve(q{SELECT aibilling.resume('eves')});
	my ($rc, undef, $err) = $node->psql('postgres', 'CALL aibilling.sync()',
		extra_params => [ '-U', 'eve' ]);
	like($err, qr/stopped before everything was delivered: a usage table is blocked; see aibilling\.status/, 'sync() says what keeps it');
	honest_rows_arrive('nor does its owner by sync()');
	sql(q{SELECT aibilling.detach('eve.resists', 'discard')});
};

subtest 'a session of an owner\'s does not keep the shipper\'s role' => sub {
	$polar->fault(kind => 'hang', path => 'ingest', times => 1);
	eve(q{ALTER SERVER eves OPTIONS (DROP metadata_function, ADD timeout '10min')});
	my $worker = $node->worker_waits;
	eve(q{SELECT aibilling.create_usage_table('eve.keeps', 'eves')});
	my $session = eve_session();
	my $pid = $session->query_safe('SELECT pg_backend_pid()');

	# The worker is away for a moment, and she is there.
	my $stopped = kill 'STOP', $worker;
	sql("SELECT pg_terminate_backend($worker)");
	eve(eves_rows('keeps', 1));
	$session->query_until(qr/begun/, "\\echo begun\nCALL aibilling.sync();\n");
	kill 'CONT', $worker;
	honest_rows_arrive('others are served while her request hangs');
	like($node->status('honest'), qr/^(idle|delivering)/, 'by the worker');
	$polar->clear_faults;
	$polar->release;
	eval { $session->quit };
	$node->wait_settled;
	pass('and so is she');
};

#
# Locks of others hold up their table only.
#

subtest 'a locked table' => sub {
	my $session = eve_session();

	foreach my $i (1 .. 6)
	{
		eves_table("locked$i");
		eve("SELECT aibilling.pause()");
		eve(eves_rows("locked$i", 1));
	}
	$session->query_safe('BEGIN; LOCK TABLE ' . join(', ', map { "eve.locked$_" } 1 .. 6) . ' IN ACCESS EXCLUSIVE MODE;');
	sql('SELECT aibilling.resume()');
	eve('SELECT aibilling.resume()');
	honest_rows_arrive('six locked tables keep no other from delivery');
	my ($rc, $out) = $node->psql('postgres',
		"SELECT count(*) FROM aibilling.status WHERE status ~ 'locked the table'", timeout => 30);
	is($out, '6', 'status does not wait for them, and says so');
	is($node->safe_psql('postgres', "SELECT count(*) FROM pg_locks WHERE NOT granted"), '0', 'nobody waits for a lock');
	$session->query_safe('ROLLBACK;');
	$session->quit;
	$node->wait_settled;
	is(sql("SELECT sum(delivered) FROM aibilling.status WHERE usage_table::text LIKE 'eve.locked%'"), '6',
		'they are served when the lock is gone');
};

subtest 'an open transaction with rows of our own tables locked' => sub {
	my $session = eve_session();

	$polar->fault(kind => '503', times => 1);
	$node->insert_rows(1, table => 'honest', from => $honest + 1);
	$honest++;
	$polar->wait(arrived => $polar->summary->{arrived});
	$session->query_safe('BEGIN; SELECT aibilling.resume();');
	honest_rows_arrive('resume() without an end keeps nobody from delivery');
	$session->query_safe("ROLLBACK; BEGIN; SELECT aibilling.detach('eve.locked1');");
	honest_rows_arrive('nor does detach()');
	$session->quit;
};

subtest 'a table that goes in an open transaction' => sub {
	my $session = eve_session();
	my $worker = $node->worker_pid;

	eves_table('going');
	$polar->fault(kind => 'hang');
	eve(eves_rows('going', 3));
	$polar->wait(hung => 1);
	$session->query_safe('BEGIN; DROP TABLE eve.going;');
	$polar->fault(kind => 'poison', external_ids => [ map { "goinggpt-0$_" } 1 .. 3 ], status => 422);
	$polar->release;
	honest_rows_arrive("while its rows are in flight ($_)") foreach 1 .. 2;
	is($node->worker_pid, $worker, 'by the same worker');
	$session->query_safe('ROLLBACK;');
	ok($node->poll_query_until('postgres', "SELECT rejected = 3 FROM aibilling.status WHERE usage_table = 'eve.going'::regclass"),
		'the answer is settled when it stays') or diag $node->diagnosis;
	$polar->clear_faults;
	$session->quit;
};

#
# One row does not stop its table.
#

subtest 'a row that cannot be read' => sub {
	eve(q{
CREATE TYPE eve.mood AS ENUM ('good', 'bad');
CREATE FUNCTION eve.to_json(eve.mood) RETURNS json LANGUAGE plpgsql AS
	$$BEGIN IF $1 = 'bad' THEN RAISE 'a bad mood'; END IF; RETURN '"good"'; END$$;
CREATE CAST (eve.mood AS json) WITH FUNCTION eve.to_json(eve.mood);
CREATE FUNCTION eve.meta(jsonb) RETURNS jsonb LANGUAGE sql AS $$SELECT jsonb_build_object('k', $1->'mood')$$;
ALTER SERVER eves OPTIONS (ADD metadata_function 'eve.meta');
SELECT aibilling.create_usage_table('eve.moods', 'eves');
ALTER TABLE eve.moods ADD COLUMN mood eve.mood DEFAULT 'good';});
	eve("SELECT aibilling.pause(); ALTER TABLE eve.moods ALTER mood SET DEFAULT 'bad';" . eves_rows('moods', 2));
	eve("ALTER TABLE eve.moods ALTER mood SET DEFAULT 'good';" . eves_rows('moods', 50, 'gpt-1'));
	price('gpt-1');
	eve('SELECT aibilling.resume()');
	ok($node->poll_query_until('postgres',
		"SELECT delivered = 50 AND rejected = 2 FROM aibilling.status WHERE usage_table = 'eve.moods'::regclass"),
		'is rejected, and the others are delivered') or diag $node->diagnosis;
	like(sql("SELECT min(error) FROM aibilling.outbox WHERE usage_table = 'eve.moods'::regclass"),
		qr/a bad mood/, 'with its reason');
	eve('ALTER TABLE eve.moods DROP COLUMN mood; ALTER TABLE eve.moods RENAME model TO modell;' );
	eve("ALTER TABLE eve.moods DISABLE TRIGGER ALL; ALTER TABLE eve.moods RENAME modell TO model; ALTER TABLE eve.moods ENABLE TRIGGER ALL");
};

subtest 'a deferred trigger' => sub {
	eves_table('deferred');
	eve(q{
CREATE TABLE eve.fired (who name);
CREATE FUNCTION eve.later() RETURNS trigger LANGUAGE plpgsql AS
	$$BEGIN
	INSERT INTO eve.fired VALUES (current_user);
	IF new.external_id LIKE '%2' THEN RAISE 'not this one'; END IF;
	RETURN NULL;
END$$;} . eves_rows('deferred', 3, 'later') . q{
CREATE CONSTRAINT TRIGGER later AFTER UPDATE ON eve.deferred DEFERRABLE INITIALLY DEFERRED
	FOR EACH ROW EXECUTE FUNCTION eve.later();});
	price('later');
	ok($node->poll_query_until('postgres',
		"SELECT delivered = 2 AND rejected = 1 FROM aibilling.status WHERE usage_table = 'eve.deferred'::regclass"),
		'does not keep rows from their price') or diag $node->diagnosis;
	is(sql('SELECT string_agg(DISTINCT who::text, $$ $$) FROM eve.fired'), 'eve', 'and runs as its owner');
};

subtest 'an open UPDATE' => sub {
	my $session = eve_session();

	eves_table('open');
	eve("SELECT aibilling.pause();" . eves_rows('open', 100));
	$session->query_safe('BEGIN; UPDATE eve.open SET input_tokens = 7 WHERE id = 50;');
	eve('SELECT aibilling.resume()');
	honest_rows_arrive('of a row of another table');
	$session->query_safe('ROLLBACK;');
	ok($node->poll_query_until('postgres',
		"SELECT delivered = 100 FROM aibilling.status WHERE usage_table = 'eve.open'::regclass"),
		'once it is rolled back, all of its rows are sent without another wake-up');
	$session->quit;
};

subtest 'a server whose name is being changed' => sub {
	my $theirs = PolarServer->new;
	my $worker = $node->worker_pid;
	my $session = eve_session();

	$node->create_server($theirs, name => 'named', requests_per_minute => 0);
	sql('ALTER SERVER named OWNER TO eve');
	eve("SELECT aibilling.create_usage_table('eve.named', 'named')");
	$theirs->fault(kind => 'hang');
	eve(eves_rows('named', 5));
	$theirs->wait(hung => 1);
	$session->query_safe('BEGIN; ALTER SERVER named RENAME TO renamed;');
	$theirs->release;
	$theirs->wait(events => 5);
	honest_rows_arrive('while the name of another server is being changed');
	eve(eves_rows('named', 5, 'gpt-1'));
	honest_rows_arrive('and rows wait that go there');
	is($node->worker_pid, $worker, 'the worker goes on');
	is(sql("SELECT in_flight, pending FROM aibilling.status WHERE usage_table = 'eve.named'::regclass"), '5|5', 'that server\'s rows wait');
	$session->query_safe('COMMIT;');
	ok($node->poll_query_until('postgres',
			"SELECT delivered = 10 FROM aibilling.status WHERE usage_table = 'eve.named'::regclass AND server = 'renamed'"),
		'until it is done') or diag $node->diagnosis;
	is(sql("SELECT DISTINCT server FROM aibilling.delivery WHERE usage_table = 'eve.named'::regclass"), 'renamed', 'by its new name');
	$session->quit;
	$theirs->stop;
};

subtest 'memory' => sub {
	plan skip_all => 'needs /proc' if !-r "/proc/$$/status" || $ENV{AIBILLING_POSTGRES};
	eve(q{
CREATE OR REPLACE FUNCTION eve.meta(jsonb) RETURNS jsonb LANGUAGE sql AS $$SELECT '{"k": 1}'::jsonb$$;
SELECT aibilling.create_usage_table('eve.bombs', 'eves');
ALTER TABLE eve.bombs ADD COLUMN junk text;
SELECT aibilling.pause();});
	eve(eves_rows('bombs', 25) . q{UPDATE eve.bombs SET junk = repeat('x', 8000000);});
	my $worker = $node->worker_waits;
	my $peak = sub { return (slurp_file("/proc/$worker/status") =~ /^VmHWM:\s+(\d+) kB/m)[0] };
	my $before = $peak->();
	eve('SELECT aibilling.resume()');
	ok($node->poll_query_until('postgres',
		"SELECT delivered = 25 FROM aibilling.status WHERE usage_table = 'eve.bombs'::regclass"),
		'rows that are large as jsonb are delivered') or diag $node->diagnosis;
	cmp_ok($peak->() - $before, '<', 100_000, 'and are not all in memory at once (kB)');
};

$node->stop;
$polar->stop;
done_testing();
