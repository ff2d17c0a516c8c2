
# No row is left behind: what can be sent is sent, whenever that comes to be
# so, and what cannot says why.  The worker's poll never helps here.

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
my $node = AibillingNode->new('main',
	databases => 'postgres, "postgres",postgres',
	conf => "aibilling_polar.poll_interval = 3600\nclient_min_messages = error\n");

$node->create_server($polar, requests_per_minute => 0);

sub sql
{
	my ($query) = @_;

	return $node->safe_psql('postgres', $query);
}

# Rows, each in a transaction and so in an entry of its own.
sub insert_one_by_one
{
	my ($table, $n, $model) = @_;

	sql(join '', map {
		"INSERT INTO $table (external_id, provider, model, external_customer_id, input_tokens) "
		  . "VALUES ('$table$model$_', 'p', '$model', 'c', $_);\n" } 1 .. $n);
	return;
}

sub price
{
	my ($model) = @_;

	return sql("INSERT INTO aibilling.price (provider, model, input) VALUES ('p', '$model', 1)");
}

sub counts_become
{
	my ($table, $expected, $what) = @_;

	return ok(
		$node->poll_query_until('postgres',
			"SELECT delivered || ' ' || pending || ' ' || unpriced || ' ' || rejected "
			  . "FROM aibilling.status WHERE usage_table = '$table'::regclass", $expected),
		$what) || diag $node->diagnosis;
}

subtest 'a database that is named twice' => sub {
	$node->worker_waits;
	is(sql("SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'aibilling_polar worker'"),
		'1', 'has one worker');
};

subtest 'many rows that wait, and the price of one' => sub {
	$node->create_usage_table('many');
	insert_one_by_one('many', 100, 'never');
	insert_one_by_one('many', 1, 'late');
	$node->worker_waits;
	price('late');
	counts_become('many', '1 0 100 0', 'it is sent, after all others were looked at');
	price('never');
	counts_become('many', '101 0 0 0', 'and these when their price comes');
};

subtest 'a price that comes during the scan' => sub {
	$node->create_usage_table('scanned');
	insert_one_by_one('scanned', 40, 'passed');
	insert_one_by_one('scanned', 1, 'brings');
	insert_one_by_one('scanned', 60, 'behind');
	sql(q{
CREATE FUNCTION brings_price() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	INSERT INTO aibilling.price (provider, model, input) VALUES ('p', 'passed', 1);
	RETURN NULL;
END$$;
CREATE TRIGGER brings AFTER UPDATE ON scanned FOR EACH ROW WHEN (new.model = 'brings')
	EXECUTE FUNCTION brings_price()});
	price('brings');
	counts_become('scanned', '41 0 60 0', 'is not missed by rows that the scan has passed');
	sql(q{ALTER SERVER polar OPTIONS (ADD unpriced 'send')});
	counts_become('scanned', '101 0 0 0', q{nor is unpriced 'send'});
	sql(q{ALTER SERVER polar OPTIONS (DROP unpriced)});
};

subtest 'triggers that keep rows as they are' => sub {
	$node->create_usage_table('kept');
	insert_one_by_one('kept', 2, 'null');
	insert_one_by_one('kept', 2, 'undone');
	insert_one_by_one('kept', 2, 'refused');
	insert_one_by_one('kept', 2, 'fine');
	sql(q{
CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF new.model = 'null' THEN RETURN NULL; END IF;
	IF new.model = 'refused' THEN RAISE 'not this one'; END IF;
	IF new.model = 'undone' THEN new.cost_nanos := NULL; new.cost_cents := NULL; END IF;
	RETURN new;
END$$;
CREATE TRIGGER zzz_keep BEFORE UPDATE ON kept FOR EACH ROW EXECUTE FUNCTION keep();
BEGIN;} . join('', map { "INSERT INTO aibilling.price (provider, model, input) VALUES ('p', '$_', 1);" }
		  qw(null undone refused fine)) . 'COMMIT');
	counts_become('kept', '2 0 0 6', 'only these are rejected');
	is(sql("SELECT string_agg(DISTINCT error, '; ' ORDER BY error) FROM aibilling.outbox WHERE usage_table = 'kept'::regclass"),
		'it has a price, but a trigger or rule of its table keeps the cost from being stored; '
		  . 'its price cannot be stored: not this one', 'with their reasons');
	$node->worker_waits;
	pass('and the worker comes to rest');
	sql("DROP TRIGGER zzz_keep ON kept; SELECT aibilling.retry('kept')");
	counts_become('kept', '8 0 0 0', 'without the trigger they are delivered');
};

subtest 'rows that wait for a price hold up nothing' => sub {
	my $session = $node->background_psql('postgres');

	$node->create_usage_table('held');
	insert_one_by_one('held', 3, 'slowly');
	$session->query_safe("BEGIN; UPDATE held SET tags = '{\"a\": 1}' WHERE external_id = 'heldslowly2';");
	price('slowly');
	insert_one_by_one('held', 5, 'fine');
	ok($node->poll_query_until('postgres',
		"SELECT delivered = 7 FROM aibilling.status WHERE usage_table = 'held'::regclass"),
		'an open UPDATE of one of them keeps only itself') || diag $node->diagnosis;
	$session->query_safe('COMMIT;');
	$session->quit;
	counts_become('held', '8 0 0 0', 'and is followed by the row');
};

subtest 'a delivery that is locked out while it is to be sent again' => sub {
	my $session = $node->background_psql('postgres');

	$node->create_usage_table('again');
	$polar->fault(kind => '503', times => 'always');
	insert_one_by_one('again', 3, 'fine');
	$node->poll_query_until('postgres',
		"SELECT EXISTS (SELECT FROM aibilling.delivery WHERE state = 'sending' AND http_status = 503)");
	$session->query_safe('BEGIN; LOCK TABLE again IN ACCESS EXCLUSIVE MODE;');
	$polar->clear_faults;
	sql('SELECT aibilling.resume()');
	$node->create_usage_table('other');
	insert_one_by_one('other', 3, 'fine');
	counts_become('other', '3 0 0 0', 'others of its server are sent meanwhile');
	$session->query_safe('ROLLBACK;');
	$session->quit;
	counts_become('again', '3 0 0 0', 'it is sent soon after');
};

subtest 'an error that ends the worker' => sub {
	sql(q{
CREATE FUNCTION end_worker() RETURNS trigger LANGUAGE plpgsql AS
	$$BEGIN RAISE 'the ledger is not to be touched'; END$$;
CREATE TRIGGER end_worker BEFORE UPDATE ON aibilling.delivery_total FOR EACH ROW EXECUTE FUNCTION end_worker();
CREATE TRIGGER end_worker_at_once BEFORE INSERT ON aibilling.delivery_total FOR EACH ROW EXECUTE FUNCTION end_worker();
CREATE TRIGGER end_worker BEFORE INSERT OR UPDATE ON aibilling.server_state FOR EACH ROW EXECUTE FUNCTION end_worker()});
	$polar->fault(kind => '503', times => 'always');
	insert_one_by_one('other', 1, 'last');
	price('last');
	ok($node->wait_status('ended with an error.*the ledger is not to be touched', 'other'),
		'is in status');
	sql(q{DROP FUNCTION end_worker CASCADE});
	$polar->clear_faults;
	counts_become('other', '4 0 0 0', 'the next one works');
	ok($node->wait_status('^idle: everything that can be sent is delivered$', 'other'), 'and says no more of it');
};
$node->stop;

#
# sync() ends, and says what it could not do.
#

my $bare = AibillingNode->new('bare', preload => 0, conf => "client_min_messages = warning\n");
$bare->create_server($polar, requests_per_minute => 0);
$bare->safe_psql('postgres', q{
SELECT aibilling.create_usage_table(t, 'polar') FROM unnest('{good,refuses,gone}'::text[]) t;
INSERT INTO refuses (external_id, provider, model, external_customer_id, input_tokens) VALUES ('refuses', 'p', 'm', 'c', 1);
INSERT INTO gone (external_id, provider, model, external_customer_id, input_tokens) VALUES ('gone', 'p', 'none', 'c', 1);
CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RAISE 'never'; END$$;
CREATE TRIGGER no BEFORE UPDATE ON refuses FOR EACH STATEMENT EXECUTE FUNCTION no();
INSERT INTO aibilling.price (provider, model, input) VALUES ('p', 'm', 1)});

subtest 'sync() with a table that cannot be repriced' => sub {
	my $timed_out = 0;

	$bare->insert_rows(3, table => 'good');
	my ($rc, $out, $err) = $bare->psql('postgres', 'CALL aibilling.sync()', timeout => 60, timed_out => \$timed_out);
	ok(!$timed_out, 'ends');
	is($bare->safe_psql('postgres', "SELECT delivered FROM aibilling.status WHERE usage_table = 'good'::regclass"), '3',
		'others are delivered');
	like($bare->safe_psql('postgres', "SELECT error FROM aibilling.outbox WHERE usage_table = 'refuses'::regclass"),
		qr/no price of this table can be stored: never/, 'its rows say why they wait');
};

subtest 'sync() and tables that go meanwhile' => sub {
	my $timed_out = 0;

	$polar->fault(kind => 'hang', times => 1);
	$bare->insert_rows(3, table => 'good', from => 4);
	my $session = $bare->background_psql('postgres', on_error_stop => 0);
	$session->query_until(qr/begun/, "\\echo begun\nCALL aibilling.sync();\n\\echo ended\n");
	$polar->wait(hung => 1);
	$bare->safe_psql('postgres', 'DROP TABLE gone');
	$polar->release;
	$session->query_until(qr/ended/, '');
	like($session->{stderr}, qr/a usage table has been dropped or detached/, 'ends, and says so');
	is($bare->safe_psql('postgres', "SELECT delivered FROM aibilling.status WHERE usage_table = 'good'::regclass"), '6',
		'others are delivered');
	eval { $session->quit };
};
$bare->stop;
$polar->stop;
done_testing();
