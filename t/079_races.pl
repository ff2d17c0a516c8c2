# What happens to a table while the shipper is at it: partitions come between its looks at the outbox and
# at the rows, or at the rows and their prices.  Code of the table's owner, which the shipper calls, holds
# it there until another session has done its part.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use AibillingNode;
use File::Basename;
use PolarServer;
use PostgreSQL::Test::Utils;
use Test::More;

plan skip_all => 'needs python3' unless PolarServer->python;

my $polar = PolarServer->new;
my $node = AibillingNode->new('main');
$node->create_server($polar, requests_per_minute => 0, metadata_function => 'public.metadata');

sub sql { return $node->safe_psql('postgres', shift) }

sql(<<'SQL');
INSERT INTO aibilling.price (provider, model, input) VALUES ('acme', 'm', 1);
CREATE TABLE gate (name text PRIMARY KEY);

-- Wait until a gate that is shut is opened, which may take no longer than the shipper lets us.
CREATE FUNCTION pass(wanted text) RETURNS void LANGUAGE plpgsql AS $$BEGIN
	WHILE EXISTS (SELECT FROM public.gate WHERE name = wanted) LOOP
		PERFORM pg_catalog.pg_sleep(0.001);
	END LOOP;
END$$;

-- Wait until somebody stands at it, do something, and open it.
CREATE PROCEDURE meanwhile(wanted text, what text) LANGUAGE plpgsql AS $$BEGIN
	WHILE NOT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND backend_type = 'aibilling_polar worker') LOOP
		PERFORM pg_sleep(0.001), pg_stat_clear_snapshot();
	END LOOP;
	EXECUTE what;
	DELETE FROM public.gate WHERE name = wanted;
	COMMIT;
END$$;

-- What comes of a statement.
CREATE FUNCTION try(what text) RETURNS text LANGUAGE plpgsql AS $$BEGIN
	EXECUTE what;
	RETURN 'done';
EXCEPTION WHEN OTHERS THEN
	RETURN SQLERRM;
END$$;

CREATE FUNCTION metadata(row_ jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$BEGIN
	PERFORM public.pass(row_->>'external_id');
	RETURN jsonb_build_object('external_id', row_->>'external_id');
END$$;
SQL

# A table of rows in partitions a and b.
sub partitioned
{
	my ($name) = @_;

	sql(<<SQL);
SELECT aibilling.create_usage_table('model_of_$name', 'polar');
CREATE TABLE $name (LIKE model_of_$name INCLUDING DEFAULTS, region text NOT NULL DEFAULT 'a', PRIMARY KEY (id, region)) PARTITION BY LIST (region);
CREATE TABLE ${name}_a PARTITION OF $name FOR VALUES IN ('a');
CREATE TABLE ${name}_b PARTITION OF $name FOR VALUES IN ('b');
SELECT aibilling.attach('$name', 'polar');
SQL
	return;
}

sub insert
{
	my ($table, $id, $external_id, $region, $model) = @_;

	return sql("INSERT INTO $table (id, external_id, region, provider, model, external_customer_id, input_tokens)
		VALUES ($id, '$external_id', '$region', 'acme', '$model', 'c', 1000)");
}

# Another session does this while the shipper stands at the gate.
sub meanwhile
{
	my ($gate, $what) = @_;
	my $session = $node->background_psql('postgres', on_error_die => 1);

	sql("INSERT INTO gate VALUES ('$gate')");
	$session->{stdin} .= "CALL meanwhile('$gate', \$what\$$what\$what\$);\n";
	$session->{run}->pump_nb;
	return $session;
}

# It has done so.
sub done
{
	my ($session) = @_;

	is($session->query('SELECT 1'), '1', 'another session has done its part meanwhile');
	$session->quit;
	return;
}

sub pause { return sql("SELECT aibilling.pause('polar')") }
sub resume { return sql("SELECT aibilling.resume('polar')") }

sub stored
{
	my ($id) = @_;

	return scalar grep { $_->{external_id} eq $id } $polar->events;
}

# What has left with its partition, or is missed, comes back with it.
subtest 'a partition comes after the shipper has read the rows of its request' => sub {
	partitioned('missed');
	pause();
	insert('missed', 1, 'm1', 'a', 'm');
	insert('missed', 2, 'm2', 'b', 'm');
	sql('ALTER TABLE missed DETACH PARTITION missed_b CONCURRENTLY');
	is(sql("SELECT count(*) FROM aibilling.outbox WHERE usage_table = 'missed'::regclass"), '1', 'what waits leaves with the partition');
	my $session = meanwhile('m1', q{ALTER TABLE missed ATTACH PARTITION missed_b FOR VALUES IN ('b')});
	resume();
	done($session);
	$polar->wait(events => 2);
	is(stored('m2'), 1, 'its row is sent');
};

# A session whose commits, once seen by all, take as long as the file is there; undef without a compiler.
my $held = "$PostgreSQL::Test::Utils::tmp_check/held";
sub session_of_held_commits
{
	my $dir = $PostgreSQL::Test::Utils::tmp_check;
	my $source = dirname(__FILE__) . '/held_commit.c';
	my $headers = $node->config_data('--includedir-server');

	return if !-e "$dir/held_commit.so"
	  && system("cc -shared -fPIC -O1 -I '$headers' -DHELD_COMMIT='\"$held\"' -o '$dir/held_commit.so' '$source' >/dev/null 2>&1") != 0;
	my $session = $node->background_psql('postgres', on_error_die => 1);
	$session->query("LOAD '$dir/held_commit.so'");
	return $session;
}

# The rows of a partition are in the outbox as soon as its ATTACH has committed; that it is a partition, others
# hear a moment later.
subtest 'a partition comes whose rows the shipper sees in the outbox only' => sub {
	my $session = session_of_held_commits() or plan skip_all => 'needs a compiler';

	partitioned('stale');
	pause();
	insert('stale', 11, 's1', 'b', 'm');
	sql('ALTER TABLE stale DETACH PARTITION stale_b');
	is(sql("SELECT count(*) FROM aibilling.outbox WHERE usage_table = 'stale'::regclass"), '0', 'DETACH takes what waits along');
	resume();
	insert('stale', 11, 's2', 'a', 'm');
	$node->poll_query_until('postgres', "SELECT count(*) = 1 FROM aibilling.delivery WHERE usage_table = 'stale'::regclass AND state = 'delivered'");

	append_to_file($held, '');
	$session->{stdin} .= "ALTER TABLE stale ATTACH PARTITION stale_b FOR VALUES IN ('b');\n";
	$session->{run}->pump_nb;
	$node->poll_query_until('postgres', "SELECT count(*) = 1 FROM pg_inherits WHERE inhrelid = 'stale_b'::regclass");
	sql("INSERT INTO model_of_stale (external_id, provider, model, external_customer_id, input_tokens) VALUES ('wakes', 'acme', 'm', 'c', 1)");
	$polar->wait_for(sub { stored('wakes') }, 'rows of another table to be sent');
	is(sql("SELECT usage_id, state FROM aibilling.outbox WHERE usage_table = 'stale'::regclass"), '11|pending', 'it is not taken for the row that is in sight');
	unlink $held;
	$node->poll_query_until('postgres', "SELECT bool_and(state = 'rejected') FROM aibilling.outbox WHERE usage_table = 'stale'::regclass");
	pass('it is found to share its id');
	sql("DELETE FROM stale WHERE external_id = 's2'");
	$polar->wait_for(sub { stored('s1') }, 'the row to be sent');
	is(stored('s1') + stored('s2'), 2, 'each is sent once');
	$session->quit;
};

# A partition whose detachment has begun, as long as $reader reads the table; the session that detaches it.
sub begin_detach
{
	my ($table, $reader, $session) = @_;

	$reader->query("BEGIN; LOCK TABLE $table IN ACCESS SHARE MODE");
	$session->{stdin} .= "ALTER TABLE $table DETACH PARTITION ${table}_b CONCURRENTLY;\n";
	$session->{run}->pump_nb;
	$node->poll_query_until('postgres', "SELECT inhdetachpending FROM pg_inherits WHERE inhrelid = '${table}_b'::regclass");
	return;
}

subtest 'a partition comes and is being detached when the shipper looks at it' => sub {
	partitioned('leaving');
	pause();
	sql('ALTER TABLE leaving DETACH PARTITION leaving_b');
	sql(q{ALTER TABLE leaving ATTACH PARTITION leaving_b FOR VALUES IN ('b')});
	my ($reader, $session) = map { $node->background_psql('postgres', on_error_die => 1) } 1, 2;
	begin_detach('leaving', $reader, $session);
	my (undef, undef, $error) = $node->psql('postgres', "SELECT aibilling.attach('leaving', 'polar')");
	like($error, qr/cannot attach table public.leaving: partition "leaving_b" is being detached/, 'attach() would take its triggers');
	my $pid = $node->worker_pid;
	resume();
	insert('leaving', 31, 'l1', 'a', 'm');
	$polar->wait_for(sub { stored('l1') }, 'rows of others to be sent');
	is($node->worker_pid, $pid, 'by the same worker');
	$reader->query('COMMIT');
	$_->quit foreach $reader, $session;
};

subtest 'a row is deleted while the partition of another of its id is being detached' => sub {
	partitioned('parting');
	pause();
	insert('parting', 41, 'd1', 'a', 'm');
	insert('parting', 41, 'd2', 'b', 'm');
	my ($reader, $session) = map { $node->background_psql('postgres', on_error_die => 1) } 1, 2;
	begin_detach('parting', $reader, $session);
	resume();
	$polar->wait_for(sub { stored('d1') }, 'the row that is in sight to be sent');
	$node->poll_query_until('postgres', "SELECT count(*) = 2 AND bool_and(state = 'delivered') FROM aibilling.delivery WHERE usage_table = 'parting'::regclass");
	pause();
	sql("DELETE FROM parting WHERE external_id = 'd1'");
	is(sql("SELECT sum(usage_rows) FROM aibilling.usage_daily('parting')"), '1', 'and counted once, though each of the two was taken from the outbox');
	$reader->query('COMMIT');
	is($session->query('SELECT 1'), '1', 'the partition goes');
	sql(q{ALTER TABLE parting ATTACH PARTITION parting_b FOR VALUES IN ('b')});
	resume();
	$polar->wait_for(sub { stored('d2') }, 'the other row to be sent');
	is(stored('d1') + stored('d2'), 2, 'each is sent once');
	$_->quit foreach $reader, $session;
};

subtest 'of two rows of an id one leaves with its partition, and an answer to the other is lost' => sub {
	partitioned('lost');
	pause();
	insert('lost', 51, 'x1', 'a', 'm');
	insert('lost', 51, 'x2', 'b', 'm');
	my ($reader, $session) = map { $node->background_psql('postgres', on_error_die => 1) } 1, 2;
	begin_detach('lost', $reader, $session);
	$polar->fault(kind => 'hang', store => 1);
	$polar->fault(kind => 'drop_after_store');
	my $before = () = $polar->requests;
	resume();
	$polar->wait_for(sub { scalar(() = $polar->requests) == $before + 2 }, 'each of the two to be taken from the outbox');
	$polar->release;
	$node->poll_query_until('postgres', "SELECT aibilling.resume() IS NOT NULL AND count(*) = 2 AND bool_and(d.state = 'delivered')
		FROM aibilling.delivery d WHERE usage_table = 'lost'::regclass");
	pause();
	sql("DELETE FROM lost WHERE external_id = 'x1'");
	$reader->query('COMMIT');
	is($session->query('SELECT 1'), '1', 'the partition goes');
	sql(q{ALTER TABLE lost ATTACH PARTITION lost_b FOR VALUES IN ('b')});
	resume();
	$polar->wait_for(sub { stored('x2') }, 'the other row to be sent');
	is(stored('x1') + stored('x2'), 2, 'each is stored once');
	$_->quit foreach $reader, $session;
};

subtest 'a transaction from before still sees a partition that leaves' => sub {
	partitioned('older');
	insert('older', 81, 'o1', 'b', 'm');
	$polar->wait_for(sub { stored('o1') }, 'a row to be delivered');
	$node->poll_query_until('postgres', "SELECT state = 'delivered' FROM aibilling.usage_status('older', 81)");
	pause();
	my ($reader, $session, $older) = map { $node->background_psql('postgres', on_error_die => 1) } 1 .. 3;
	$older->query('BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1');
	begin_detach('older', $reader, $session);
	like($older->query(q{SELECT try($$UPDATE older SET input_tokens = 5 WHERE external_id = 'o1'$$)}), qr/has been delivered/,
		'what was delivered does not change');
	is($older->query(q{SELECT try($$INSERT INTO older (id, external_id, region, provider, model, external_customer_id, input_tokens)
		VALUES (82, 'o2', 'b', 'acme', 'm', 'c', 1000)$$)}), 'done', 'a row comes');
	$older->query('COMMIT');
	is(sql("SELECT usage_id, state FROM aibilling.outbox WHERE usage_table = 'older'::regclass"), '82|pending', 'and waits');
	$reader->query('COMMIT');
	is($session->query('SELECT 1'), '1', 'the partition goes');
	sql(q{ALTER TABLE older ATTACH PARTITION older_b FOR VALUES IN ('b')});
	resume();
	$polar->wait_for(sub { stored('o2') }, 'the row to be sent');
	is(stored('o1') + stored('o2'), 2, 'each is sent once');
	$_->quit foreach $reader, $session, $older;
};

subtest 'both requests with a row are answered at once' => sub {
	partitioned('twice');
	pause();
	insert('twice', 71, 't1', 'a', 'm');
	insert('twice', 71, 't2', 'b', 'm');
	my ($reader, $session) = map { $node->background_psql('postgres', on_error_die => 1) } 1, 2;
	begin_detach('twice', $reader, $session);
	$polar->fault(kind => 'hang', store => 1, times => 2);
	resume();
	$polar->wait(hung => 2);

	# The shipper is away for a moment, and finds both.
	my $worker = $node->worker_pid;
	my $answered = $polar->summary->{requests};
	is(kill('STOP', $worker), 1, 'the shipper is stopped');
	$polar->release;
	$polar->wait(requests => $answered + 2);
	kill 'CONT', $worker;
	$node->poll_query_until('postgres', "SELECT count(*) = 2 AND bool_and(state = 'delivered') FROM aibilling.delivery WHERE usage_table = 'twice'::regclass");
	is(sql("SELECT sum(inserted), sum(duplicates), sum(unexpected_duplicates) FROM aibilling.delivery WHERE usage_table = 'twice'::regclass"), '1|1|0',
		'one of them brings a duplicate, which is expected');
	is(sql("SELECT sum(usage_rows) FROM aibilling.usage_daily('twice')"), '1', 'and it is counted once');
	$reader->query('COMMIT');
	$_->quit foreach $reader, $session;
};

# A row that is in flight when its partition leaves, and another one that gets its id: what Polar says to the
# request is said of the first.
sub refused_in_flight
{
	my ($name, $refuse, $allow) = @_;

	partitioned($name);
	$polar->fault(kind => 'hang');
	insert($name, 91, "${name}1", 'b', 'm');
	$polar->wait(hung => 1);
	$refuse->("${name}1");
	my $session = $node->background_psql('postgres', on_error_die => 1);
	$session->query("BEGIN; ALTER TABLE $name DETACH PARTITION ${name}_b");
	$polar->release;
	$node->poll_query_until('postgres', "SELECT error IS NOT NULL FROM aibilling.delivery WHERE usage_table = '$name'::regclass");
	is(sql("SELECT state FROM aibilling.delivery WHERE usage_table = '$name'::regclass"), 'sending', 'while the table is locked it is not known whose answer it is');
	$session->query("INSERT INTO $name (id, external_id, provider, model, external_customer_id, input_tokens)
		VALUES (91, '${name}2', 'acme', 'm', 'c', 1000); COMMIT");
	$session->quit;
	$allow->();
	resume();
	$polar->wait_for(sub { stored("${name}2") }, 'the other row of its id to be sent');
	$node->poll_query_until('postgres', "SELECT NOT EXISTS (SELECT FROM aibilling.outbox WHERE usage_table = '$name'::regclass)
		AND NOT EXISTS (SELECT FROM aibilling.delivery WHERE usage_table = '$name'::regclass AND state = 'sending')");
	is(sql("SELECT vanished FROM aibilling.status WHERE usage_table = '$name'::regclass"), '1', 'the one that left is told of');
	sql("DELETE FROM $name");
	sql("ALTER TABLE $name ATTACH PARTITION ${name}_b FOR VALUES IN ('b')");
	$polar->wait_for(sub { stored("${name}1") }, 'it to be sent when it is back');
	return;
}

subtest 'a row is refused after its partition has left' => sub {
	refused_in_flight('refused', sub { $polar->fault(kind => 'poison', external_ids => [shift], status => 422) }, sub { $polar->clear_faults });
};

subtest 'a request is refused after the partition of its row has left' => sub {
	refused_in_flight('paused', sub { $polar->tokens(token => $polar->token, status => 'revoked') }, sub { $polar->tokens(token => $polar->token, status => 'active') });
};

# The same, answered when the partition has gone and the other row is there.
subtest 'a row is refused when another one has its id' => sub {
	foreach my $refused (
		[ 'taken', sub { $polar->fault(kind => 'poison', external_ids => [shift], status => 422) }, sub { $polar->clear_faults } ],
		[ 'given', sub { $polar->tokens(token => $polar->token, status => 'revoked') }, sub { $polar->tokens(token => $polar->token, status => 'active') } ])
	{
		my ($name, $refuse, $allow) = @$refused;

		partitioned($name);
		$polar->fault(kind => 'hang');
		insert($name, 95, "${name}1", 'b', 'm');
		$polar->wait(hung => 1);
		$refuse->("${name}1");
		pause();
		sql("ALTER TABLE $name DETACH PARTITION ${name}_b");
		insert($name, 95, "${name}2", 'a', 'm');
		$polar->release;
		$node->poll_query_until('postgres', "SELECT bool_and(state <> 'sending') FROM aibilling.delivery WHERE usage_table = '$name'::regclass");
		is(sql("SELECT usage_id, state, attempts FROM aibilling.outbox WHERE usage_table = '$name'::regclass"), '95|pending|0', "$name: its answer is not the other one's");
		$allow->();
		resume();
		$polar->wait_for(sub { stored("${name}2") }, 'the other one to be sent');
		$node->poll_query_until('postgres', "SELECT NOT EXISTS (SELECT FROM aibilling.outbox WHERE usage_table = '$name'::regclass)
			AND NOT EXISTS (SELECT FROM aibilling.delivery WHERE usage_table = '$name'::regclass AND state = 'sending')");
		sql("DELETE FROM $name");
		sql("ALTER TABLE $name ATTACH PARTITION ${name}_b FOR VALUES IN ('b')");
		$polar->wait_for(sub { stored("${name}1") }, 'it to be sent when it is back');
	}
};

subtest 'the shipper ends when it has sent a row, and its partition leaves before another one looks' => sub {
	partitioned('ended');
	$polar->fault(kind => 'hang', store => 1);
	insert('ended', 98, 'ended1', 'b', 'm');
	$polar->wait(hung => 1);
	sql('ALTER TABLE ended DETACH PARTITION ended_b');
	my $worker = $node->worker_pid;
	sql("SELECT pg_terminate_backend($worker)");
	$node->poll_query_until('postgres', "SELECT state = 'failed' FROM aibilling.delivery WHERE usage_table = 'ended'::regclass");
	pause();
	sql(q{ALTER TABLE ended ATTACH PARTITION ended_b FOR VALUES IN ('b')});
	like(sql(q{SELECT try($$UPDATE ended SET input_tokens = 5$$)}), qr/may have been delivered/, 'Polar may have it, so it does not change');
	resume();
	$polar->release;
	$node->poll_query_until('postgres', "SELECT state = 'delivered' FROM aibilling.usage_status('ended', 98)");
	is(sql("SELECT sum(inserted), sum(duplicates), sum(unexpected_duplicates) FROM aibilling.delivery WHERE usage_table = 'ended'::regclass"), '0|1|0', 'and that it is a duplicate is expected');
};

subtest 'a partition comes in a transaction that goes on' => sub {
	partitioned('open');
	pause();
	insert('open', 96, 'open1', 'a', 'm');
	insert('open', 97, 'open2', 'b', 'm');
	my ($reader, $session) = map { $node->background_psql('postgres', on_error_die => 1) } 1, 2;
	begin_detach('open', $reader, $session);
	my $worker = $node->worker_pid;
	$polar->fault(kind => 'hang');
	resume();
	$polar->wait(hung => 1);
	$reader->query('COMMIT');
	is($session->query('SELECT 1'), '1', 'the partition goes while the other row is in flight');
	$session->query(q{BEGIN; ALTER TABLE open ATTACH PARTITION open_b FOR VALUES IN ('b')});
	$polar->release;
	$polar->wait_for(sub { stored('open1') }, 'the other row to be answered');
	sql("INSERT INTO model_of_open (external_id, provider, model, external_customer_id, input_tokens) VALUES ('beside', 'acme', 'm', 'c', 1)");
	$polar->wait_for(sub { stored('beside') }, 'rows of other tables to be sent meanwhile');
	is($node->worker_pid, $worker, 'by the same worker');
	$session->query('COMMIT');
	$polar->wait_for(sub { stored('open1') && stored('open2') }, 'both rows to be stored');
	is(sql("SELECT vanished_ids IS NULL FROM aibilling.delivery WHERE usage_table = 'open'::regclass AND vanished > 0"), 't', 'none is missed any more');
	$_->quit foreach $reader, $session;
};

subtest 'the shipper keeps away while a partition leaves' => sub {
	my $session = session_of_held_commits() or plan skip_all => 'needs a compiler';
	my $reader = $node->background_psql('postgres', on_error_die => 1);

	partitioned('kept');
	pause();
	insert('kept', 61, 'k1', 'a', 'm');
	insert('kept', 61, 'k2', 'b', 'm');
	begin_detach('kept', $reader, $session);
	append_to_file($held, '');
	$reader->query('COMMIT');
	$node->poll_query_until('postgres', "SELECT NOT EXISTS (SELECT FROM pg_inherits WHERE inhrelid = 'kept_b'::regclass)");
	resume();
	sql("INSERT INTO model_of_kept (external_id, provider, model, external_customer_id, input_tokens)
		SELECT 'others' || n, 'acme', 'm', 'c', 1 FROM generate_series(1, 3) n");
	$polar->wait_for(sub { stored('others3') }, 'rows of other tables to be sent');
	is(stored('k1'), 0, 'nothing of this one');
	unlink $held;
	$polar->wait_for(sub { stored('k1') }, 'its row to be sent then');
	sql("DELETE FROM kept WHERE external_id = 'k1'");
	is($session->query('SELECT 1'), '1', 'the partition has gone');
	sql(q{ALTER TABLE kept ATTACH PARTITION kept_b FOR VALUES IN ('b')});
	$polar->wait_for(sub { stored('k2') }, 'the other row to be sent');
	is(stored('k1') + stored('k2'), 2, 'each is stored once');
	$_->quit foreach $reader, $session;
};

# Others see at once that a server has another name, and hear a moment later that there is such a name.
subtest 'a delivered row is changed while its server is renamed' => sub {
	my $session = session_of_held_commits() or plan skip_all => 'needs a compiler';
	my $application = $node->background_psql('postgres', on_error_stop => 0);

	sql("SELECT aibilling.create_usage_table('renaming', 'polar')");
	sql("INSERT INTO renaming (external_id, provider, model, external_customer_id, input_tokens) VALUES ('r1', 'acme', 'm', 'c', 1000)");
	$polar->wait_for(sub { stored('r1') }, 'a row to be delivered');
	$node->poll_query_until('postgres', "SELECT state = 'delivered' FROM aibilling.usage_status('renaming', 1)");

	$application->query("DO \$\$BEGIN PERFORM has_server_privilege('renamed', 'USAGE'); EXCEPTION WHEN undefined_object THEN NULL; END\$\$");
	append_to_file($held, '');
	$session->{stdin} .= "ALTER SERVER polar RENAME TO renamed;\n";
	$session->{run}->pump_nb;
	$node->poll_query_until('postgres', "SELECT EXISTS (SELECT FROM pg_foreign_server WHERE srvname = 'renamed')");
	$application->query("UPDATE renaming SET input_tokens = 5");
	like($application->{stderr}, qr/cannot update usage row 1 of "renaming": it has been delivered/, 'that is refused');
	unlink $held;
	$session->query('ALTER SERVER renamed RENAME TO polar');
	is(sql('SELECT input_tokens FROM renaming'), '1000', 'what Polar has stays');
	$_->quit foreach $application, $session;
};

subtest 'a delivered row comes while another of its id is priced' => sub {
	partitioned('priced');
	insert('priced', 21, 'p1', 'b', 'm');
	$polar->wait_for(sub { stored('p1') }, 'a row to be delivered');
	$node->poll_query_until('postgres', "SELECT state = 'delivered' FROM aibilling.usage_status('priced', 21)");
	sql('ALTER TABLE priced DETACH PARTITION priced_b');
	pause();
	sql(<<'SQL');
-- The planner asks a constraint what it says of constants: first of all when rows are read, then when they are locked.
CREATE FUNCTION trap(wanted text) RETURNS boolean IMMUTABLE LANGUAGE plpgsql AS $$BEGIN
	IF EXISTS (SELECT FROM pg_locks WHERE pid = pg_backend_pid() AND relation = 'public.priced'::regclass AND mode = 'RowShareLock') THEN
		PERFORM public.pass(wanted);
	END IF;
	RETURN true;
END$$;
ALTER TABLE priced_a ADD CHECK (trap('p2'));
SQL
	sql("INSERT INTO priced (id, external_id, provider, model, external_customer_id, input_tokens)
		VALUES (20, 'p2', 'acme', 'later', 'c', 1000), (21, 'p3', 'acme', 'later', 'c', 1000)");
	my $session = meanwhile('p2', q{ALTER TABLE priced ATTACH PARTITION priced_b FOR VALUES IN ('b')});
	sql("UPDATE aibilling.price SET input = 5; INSERT INTO aibilling.price (provider, model, input) VALUES ('acme', 'later', 7)");
	resume();
	done($session);
	$polar->wait_for(sub { stored('p2') }, 'the rows to be priced');
	is(sql("SELECT string_agg(external_id || ' ' || cost_nanos, ', ' ORDER BY external_id) FROM priced WHERE external_id <> 'p3'"),
		'p1 1000000, p2 7000000', 'the delivered one keeps its cost');
};

$node->stop;
$polar->stop;

done_testing();
