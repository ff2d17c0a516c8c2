
# What a row is, and what Polar may have: ids that are shared, reused and moved, rows that come back,
# requests whose answers are lost.  At the end of each part every row that is to be at Polar is there
# once, with the cost that stands here.

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
my $node = AibillingNode->new('main', conf => "autovacuum = off\n");
$node->create_server($polar, requests_per_minute => 0);

sub sql
{
	my ($query) = @_;
	return $node->safe_psql('postgres', $query);
}

# The error of a statement, '' if it has none.
sub error_of
{
	my ($query) = @_;
	my ($status, undef, $stderr) = $node->psql('postgres', $query, on_error_stop => 1);
	return $status == 0 ? '' : $stderr;
}

# The warnings of a statement that succeeds.
sub warnings_of
{
	my ($query) = @_;
	my ($status, undef, $stderr) = $node->psql('postgres', $query, on_error_stop => 1);
	die $stderr if $status != 0;
	return $stderr;
}

sub pause { return sql("SELECT aibilling.pause('polar')") }
sub resume { return sql("SELECT aibilling.resume('polar')") }

# How the outbox sees a table's rows.
sub outbox
{
	my ($table) = @_;
	return sql("SELECT string_agg(usage_id || ' ' || state, ', ' ORDER BY usage_id) FROM aibilling.outbox WHERE usage_table = '$table'::regclass");
}

sub states
{
	my ($table) = @_;
	return sql("SELECT string_agg(external_id || ' ' || (aibilling.usage_status('$table', id)).state, ', ' ORDER BY external_id) FROM $table");
}

# What Polar has of external_ids that begin so: how often, and at which cost.
sub at_polar
{
	my ($prefix) = @_;
	my %stored;
	foreach my $event ($polar->events)
	{
		next unless $event->{external_id} =~ /^$prefix/;
		$stored{ $event->{external_id} }++;
	}
	return join(', ', map { "$_ x$stored{$_}" } sort keys %stored);
}

sub cost_at_polar
{
	my ($external_id) = @_;
	my ($event) = grep { $_->{external_id} eq $external_id } $polar->events;
	return $event->{event}{metadata}{cost_nanos};
}

# Nothing waits or flies.
sub settled
{
	my ($table) = @_;
	return $node->poll_query_until('postgres',
		"SELECT NOT EXISTS (SELECT FROM aibilling.outbox WHERE usage_table = '$table'::regclass AND state = 'pending')"
		  . " AND NOT EXISTS (SELECT FROM aibilling.delivery WHERE usage_table = '$table'::regclass AND state = 'sending')");
}

sub unexpected
{
	my ($table) = @_;
	return sql("SELECT coalesce(sum(unexpected_duplicates), 0) FROM aibilling.delivery WHERE usage_table = '$table'::regclass");
}

sql(<<'SQL');
INSERT INTO aibilling.price (provider, model, input) VALUES ('acme', 'm', 1);
SELECT aibilling.create_usage_table('model_table', 'polar');
CREATE ROLE app;
SQL

# A table of rows in two partitions, whose key is (id, region).
sub partitioned
{
	my ($name) = @_;
	sql(<<SQL);
CREATE TABLE $name (LIKE model_table INCLUDING DEFAULTS, region text NOT NULL DEFAULT 'a', PRIMARY KEY (id, region)) PARTITION BY LIST (region);
CREATE SEQUENCE ${name}_id;
ALTER TABLE $name ALTER id SET DEFAULT nextval('${name}_id');
CREATE TABLE ${name}_a PARTITION OF $name FOR VALUES IN ('a');
CREATE TABLE ${name}_b PARTITION OF $name FOR VALUES IN ('b');
SELECT aibilling.attach('$name', 'polar');
GRANT SELECT, INSERT, UPDATE, DELETE ON $name TO app;
GRANT USAGE ON SEQUENCE ${name}_id TO app;
SQL
	return;
}

# An INSERT of rows with these external_ids.
sub ins
{
	my ($table, $keys, $extra, $values) = @_;
	$extra = defined $extra ? ", $extra" : '';
	$values = defined $values ? ", $values" : '';
	return "INSERT INTO $table (external_id, provider, model, external_customer_id, input_tokens$extra)"
	  . " SELECT k, 'acme', 'm', 'c', 1000$values FROM unnest('{$keys}'::text[]) k; ";
}

subtest '1: ids that rows share crash nothing, and are rejected visibly' => sub {
	partitioned('shared');
	pause();
	sql("CREATE TABLE hashed (LIKE model_table INCLUDING DEFAULTS, part int NOT NULL, PRIMARY KEY (id, part)) PARTITION BY HASH (part);"
		  . "CREATE TABLE hashed_0 PARTITION OF hashed FOR VALUES WITH (modulus 1, remainder 0); SELECT aibilling.attach('hashed', 'polar');"
		  . "GRANT INSERT ON hashed TO app");
	sql("SET ROLE app; INSERT INTO hashed (id, part, external_id, provider, model, external_customer_id, input_tokens)"
		  . " SELECT 1, i, 'x' || i, 'acme', 'm', 'c', 1 FROM generate_series(1, 5000) i");
	sql(ins('shared', 'sh1', 'id, region', "101, 'a'"));
	sql(ins('shared', 'sh2', 'id, region', "101, 'b'"));
	sql(ins('shared', 'sh3', 'id', '102'));
	my $pid = $node->worker_pid;
	resume();
	ok(settled('hashed') && settled('shared'), 'nothing waits');
	is($node->worker_pid, $pid, 'by the same worker');
	is(outbox('hashed'), '1 rejected', 'five thousand rows of one id');
	is(outbox('shared'), '101 rejected, 101 rejected', 'two rows of one id');
	like(sql("SELECT DISTINCT error FROM aibilling.outbox WHERE state = 'rejected'"), qr/^id: several rows have it/, 'with the reason');
	is(at_polar('sh'), 'sh3 x1', 'the row beside them is sent, of theirs none');
	sql("DELETE FROM shared WHERE external_id = 'sh2'");
	ok(settled('shared'), 'one is deleted');
	is(at_polar('sh'), 'sh1 x1, sh3 x1', 'and the other is sent');

	# A row that comes to share the id of a delivered one is not taken for it.
	pause();
	sql(ins('shared', 'sh4', 'id, region', "101, 'b'"));
	like(error_of("UPDATE shared SET input_tokens = 1 WHERE external_id = 'sh1'"), qr/has been delivered/, 'the delivered one stays what it is');
	sql("SELECT count(*) FROM aibilling.reprice('shared', dry_run => false)");
	resume();
	ok(settled('shared'), 'the other is looked at');
	is(outbox('shared'), '101 rejected', 'and rejected');
	sql("DELETE FROM shared WHERE external_id = 'sh4'; " . ins('shared', 'sh4', 'id', '104'));
	ok(settled('shared'), 'with an id of its own');
	is(at_polar('sh'), 'sh1 x1, sh3 x1, sh4 x1', 'it is sent');
	is(unexpected('shared'), 0, 'and nothing is called not counted');

	# In one transaction, and of an unpriced row beside a delivered one.
	sql('BEGIN; ' . ins('shared', 'sh5', 'id, region', "105, 'a'") . ins('shared', 'sh6', 'id, region', "105, 'b'")
		  . "DELETE FROM shared WHERE external_id = 'sh6'; COMMIT");
	ok(settled('shared'), 'two of an id in one transaction, one of which goes');
	is(at_polar('sh[56]'), 'sh5 x1', 'leave the other');
	$node->psql('postgres', "INSERT INTO shared (id, region, external_id, provider, model, external_customer_id, input_tokens) VALUES (105, 'b', 'sh7', 'acme', 'later', 'c', 1)");
	my $cost = sql("SELECT cost_nanos FROM shared WHERE external_id = 'sh5'");
	sql("INSERT INTO aibilling.price (provider, model, input) VALUES ('acme', 'later', 7)");
	$polar->wait_for(sub { outbox('shared') eq '105 rejected' }, 'the unpriced one to be looked at');
	is(sql("SELECT cost_nanos FROM shared WHERE external_id = 'sh5'"), $cost, 'the delivered one keeps its cost');
	sql('DELETE FROM hashed');

	# A request that is full before the second row of an id is read.
	sql("ALTER SERVER polar OPTIONS (ADD batch_bytes '10kB')");
	pause();
	sql(ins('shared', 'sh8', 'id', '201') . ins('shared', join(',', map { "full$_" } 1 .. 60), 'id, tags', q{300 + substr(k, 5)::int, jsonb_build_object('note', repeat('x', 400))}));
	sql(ins('shared', 'sh9', 'id, region', "201, 'b'"));
	resume();
	ok(settled('shared'), 'a batch larger than a request');
	is(at_polar('sh[89]'), '', 'neither of the two is sent');
	is(at_polar("full") =~ tr/x//, 60, 'all others are');
	sql("ALTER SERVER polar OPTIONS (DROP batch_bytes)");
};

subtest '1: who shared an id with a row that is gone is sent once' => sub {
	partitioned('remain');
	sql("ALTER SERVER polar OPTIONS (ADD batch_size '1')");
	pause();
	sql(ins('remain', 'le1', 'id', '1'));
	sql(ins('remain', 'le2', 'id, region', "1, 'b'"));
	sql("DELETE FROM remain_b");
	resume();
	ok(settled('remain'), 'a row whose twin was deleted while both waited');
	is(sql("SELECT count(*), sum(duplicates) FROM aibilling.delivery WHERE usage_table = 'remain'::regclass"), '1|0', 'by one request');
	is(sql("SELECT sum(usage_rows) FROM aibilling.usage_daily('remain')"), '1', 'and counted once');

	# Which of the two a transaction has inserted, and which it deletes: one is left, and waits once.
	foreach my $gone (qw(a b))
	{
		foreach my $between ('', "UPDATE remain SET input_tokens = 7 WHERE id = 2; ",
			"SAVEPOINT s; DELETE FROM remain WHERE id = 2; ROLLBACK TO s; ")
		{
			pause();
			sql("DELETE FROM remain WHERE id = 2; " . ins('remain', 'tw1', 'id', '2'));
			sql('BEGIN; ' . ins('remain', 'tw2', 'id, region', "2, 'b'") . $between . "DELETE FROM remain_$gone WHERE id = 2; COMMIT");
			is(outbox('remain'), '2 pending', "one that waits, and one that is new: that in $gone goes, after \"$between\"");
		}
	}
	sql('BEGIN; ' . ins('remain', 'tw2', 'id, region', "2, 'b'") . "DELETE FROM remain WHERE id = 2; COMMIT");
	is(outbox('remain'), '', 'both go');
	sql('BEGIN; ' . ins('remain', 'tw3', 'id', '2') . ins('remain', 'tw4', 'id, region, occurred_at', "2, 'b', now() + interval '1 hour'")
		  . "DELETE FROM remain_b WHERE id = 2; COMMIT");
	is(outbox('remain'), '2 pending', 'both are new, and wait for different times');
	resume();
	ok(settled('remain'), 'it is sent');
	is(at_polar('tw'), 'tw3 x1', 'once');
	like(error_of('BEGIN; ' . ins('remain', 'tw5', 'id, region', "2, 'b'") . "UPDATE remain SET input_tokens = 8 WHERE external_id = 'tw3'; COMMIT"),
		qr/has been delivered/, 'a new row of its id opens no delivered one');

	# The shipper comes upon both while one is being deleted.
	pause();
	sql(ins('remain', 'le3', 'id', '3'));
	sql(ins('remain', 'le4', 'id, region', "3, 'b'"));
	my $session = $node->background_psql('postgres', on_error_die => 1);
	$session->query("BEGIN; DELETE FROM remain_b");
	sql(ins('remain', 'le5', 'id', '5'));
	resume();
	$polar->wait_for(sub { at_polar('le5') eq 'le5 x1' }, 'the shipper to look at them');
	is(outbox('remain'), '3 pending, 3 pending', 'nothing is decided');
	$session->query('COMMIT');
	$session->quit;
	ok(settled('remain'), 'until it is gone');
	is(at_polar('le[34]'), 'le3 x1', 'the other is sent then');
	is(outbox('remain'), '', 'and not rejected');
	is(sql("SELECT sum(usage_rows) FROM aibilling.usage_daily('remain')"), '4', 'all are counted once');

	# A row that is in the outbox twice, as no statement leaves it.
	pause();
	sql(ins('remain', 'le6', 'id', '6'));
	sql("INSERT INTO aibilling.outbox_entry SELECT * FROM aibilling.outbox_entry WHERE usage_table = 'remain'::regclass AND id = 6");
	$polar->fault(kind => 'hang', store => \1);
	resume();
	$polar->wait(hung => 1);
	$polar->wait_for(sub { sql("SELECT sum(duplicates) FROM aibilling.delivery WHERE usage_table = 'remain'::regclass") == 1 }, 'the second request');
	$polar->release;
	ok(settled('remain'), 'the first');
	is(unexpected('remain'), '0', 'it is no surprise that Polar has it');
	ok($node->poll_query_until('postgres', "SELECT sum(usage_rows) = 5 FROM aibilling.usage_daily('remain')"), 'and it is counted once');
	# The second one may have been meant for another row, which has gone with its partition.
	pause();
	sql("ALTER TABLE remain DETACH PARTITION remain_a; ALTER TABLE remain ATTACH PARTITION remain_a FOR VALUES IN ('a')");
	is(outbox('remain'), '', 'when it comes back it is not taken for that one');
	sql("ALTER TABLE remain DETACH PARTITION remain_b");
	sql(ins('remain_b', 'le7', 'id, region', "6, 'b'"));
	sql("DELETE FROM remain WHERE external_id = 'le6'; ALTER TABLE remain ATTACH PARTITION remain_b FOR VALUES IN ('b')");
	is(outbox('remain'), '6 pending', 'another one is');
	resume();
	ok(settled('remain'), 'and sent');
	is(at_polar('le[67]'), 'le6 x1, le7 x1', 'both are there');
	sql("ALTER SERVER polar OPTIONS (DROP batch_size)");
};

subtest '1: a table whose ids may repeat is not attached, and named if it is' => sub {
	sql("CREATE TABLE loose (LIKE model_table INCLUDING ALL)");
	sql("SELECT aibilling.attach('loose', 'polar')");
	sql("ALTER TABLE loose DROP CONSTRAINT loose_pkey; CREATE INDEX ON loose (id)");
	like(sql("SELECT status FROM aibilling.status WHERE usage_table = 'loose'::regclass"),
		qr/nothing keeps two rows from having the same id; add a UNIQUE index/, 'status names it');
	sql('BEGIN; ' . ins('loose', 'lo1', 'id', '1') . ins('loose', 'lo2', 'id', '2') . ins('loose', 'lo3', 'id', '2') . 'COMMIT');
	ok(settled('loose'), 'delivery goes on');
	is(at_polar('lo'), 'lo1 x1', 'of what is sound');
	is(outbox('loose'), '2 rejected', 'the rest is visible');
	sql("DELETE FROM loose WHERE external_id = 'lo3'");
	ok(settled('loose') && at_polar('lo') eq 'lo1 x1, lo2 x1', 'until it is sound, too');
	like(error_of("SELECT aibilling.attach('loose', 'polar')"), qr/no unique index on column "id"/, 'it is not attached again');
};

subtest '2: a move between partitions is told by the row' => sub {
	partitioned('moved');
	sql(<<'SQL');
CREATE TABLE audit (what text, id bigint);
GRANT INSERT ON audit TO app;
CREATE FUNCTION audit() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN
	INSERT INTO audit VALUES (TG_OP, coalesce(NEW.id, OLD.id));
	BEGIN INSERT INTO audit VALUES ('x', 1 / 0); EXCEPTION WHEN division_by_zero THEN NULL; END;
	RETURN coalesce(NEW, OLD); END$$;
CREATE TRIGGER audit BEFORE INSERT OR UPDATE OR DELETE ON moved FOR EACH ROW EXECUTE FUNCTION audit();
CREATE TRIGGER zzz_audit BEFORE INSERT OR UPDATE OR DELETE ON moved FOR EACH ROW EXECUTE FUNCTION audit();
CREATE TRIGGER aaa_after AFTER INSERT OR UPDATE OR DELETE ON moved FOR EACH ROW EXECUTE FUNCTION audit();
SQL
	sql(ins('moved', 'mv1,mv2,mv3'));
	ok(settled('moved'), 'rows are delivered');
	my $deliveries = sql("SELECT count(*) FROM aibilling.delivery WHERE usage_table = 'moved'::regclass");
	sql("UPDATE aibilling.price SET input = 100 WHERE model = 'm'");
	sql("SET ROLE app; UPDATE moved SET region = 'b'");
	is(sql("SELECT DISTINCT tableoid::regclass, cost_nanos FROM moved"), 'moved_b|1000000', 'they move, and keep their cost');
	is(states('moved'), 'mv1 delivered, mv2 delivered, mv3 delivered', 'and stay delivered');
	like(error_of("UPDATE moved SET region = 'a', input_tokens = 5"), qr/has been delivered/, 'a move that changes what was billed is refused');
	like(error_of("WITH d AS (DELETE FROM moved WHERE external_id = 'mv1' RETURNING *)"
			  . " INSERT INTO moved (id, external_id, provider, model, external_customer_id, input_tokens, region, cost_nanos, cost_cents, cost_status)"
			  . " SELECT id, external_id, provider, model, external_customer_id, input_tokens, 'a', 7, 7, 'priced' FROM d"),
		qr/has been delivered/, 'and so is one statement that deletes and inserts with a cost of its own');

	# Waiting, and in flight.
	pause();
	sql(ins('moved', 'mv4,mv5'));
	sql("UPDATE moved SET region = 'b' WHERE external_id = 'mv4'");
	sql("UPDATE moved SET region = 'b', input_tokens = 2000 WHERE external_id = 'mv5'");
	sql("BEGIN; UPDATE moved SET region = 'a' WHERE external_id = 'mv4'; ROLLBACK");
	is(sql("SELECT count(*), count(DISTINCT usage_id) FROM aibilling.outbox WHERE usage_table = 'moved'::regclass"), '2|2', 'what waits, waits on, once');
	$polar->fault(kind => 'hang', store => JSON::PP::true);
	resume();
	$polar->wait(hung => 1);
	sql("UPDATE moved SET region = 'a' WHERE external_id IN ('mv4', 'mv5')");
	like(error_of("DELETE FROM moved WHERE external_id = 'mv4'"), qr/is being sent/, 'a row in flight may move, not go');
	my $twin = sql("SELECT id FROM moved WHERE external_id = 'mv4'");
	foreach my $change ("UPDATE moved SET input_tokens = 3", "DELETE FROM moved")
	{
		like(error_of('BEGIN; ' . ins('moved', 'twin', 'id, region', "$twin, 'b'") . "$change WHERE external_id = 'mv4'; COMMIT"),
			qr/is being sent/, "nor behind a new row of its id: $change");
	}
	$polar->release;
	ok(settled('moved'), 'it arrives');
	is(at_polar('mv'), 'mv1 x1, mv2 x1, mv3 x1, mv4 x1, mv5 x1', 'every row once');
	is(cost_at_polar('mv5'), sql("SELECT cost_nanos FROM moved WHERE external_id = 'mv5'"), 'with the cost that stands here');
	is(sql("SELECT count(*) FROM aibilling.delivery WHERE usage_table = 'moved'::regclass"), $deliveries + 1, 'no move has sent anything');

	# A move whose INSERT a trigger swallows is a DELETE: what comes later under its id is another row.
	pause();
	sql(<<'SQL');
CREATE FUNCTION swallow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
CREATE TRIGGER zzzz_swallow BEFORE INSERT ON moved_b FOR EACH ROW EXECUTE FUNCTION swallow();
SQL
	sql(ins('moved', 'mv6', 'id', '600'));
	sql("BEGIN; UPDATE moved SET region = 'b' WHERE id = 600; DROP TRIGGER zzzz_swallow ON moved_b; " . ins('moved', 'mv7', 'id', '600') . 'COMMIT');
	is(outbox('moved'), '600 pending', 'it waits');
	resume();
	ok(settled('moved'), 'and is delivered');
	is(at_polar('mv[67]'), 'mv7 x1', 'the swallowed one is not');

	# UPDATE and DELETE in one transaction; INSERT, savepoints and moves.
	pause();
	sql(ins('moved', 'mv8', 'id', '800'));
	sql("BEGIN; UPDATE moved SET region = 'b' WHERE id = 800; DELETE FROM moved WHERE id = 800; COMMIT");
	is(outbox('moved'), '', 'moved and deleted: it leaves the outbox');
	$node->psql('postgres',
		ins('moved', 'mv9', 'id', '900') . "BEGIN; SAVEPOINT s; UPDATE moved SET region = 'x' WHERE id = 900; ROLLBACK TO s; DELETE FROM moved WHERE id = 900; "
		  . ins('moved', 'mv10', 'id', '900') . 'COMMIT', on_error_stop => 0);
	resume();
	ok(settled('moved'), 'after a move that failed');
	is(at_polar('mv(9|10)'), 'mv10 x1', 'the row that took its id is sent');
	is(unexpected('moved'), 0, 'nothing is called not counted');
	sql("UPDATE aibilling.price SET input = 1 WHERE model = 'm'");
};

subtest '3: a row that comes back keeps its cost' => sub {
	sql("SELECT aibilling.create_usage_table('back', 'polar'); GRANT INSERT, SELECT, DELETE ON back TO app");
	sql(ins('back', 'ba1,ba2,ba3'));
	ok(settled('back'), 'rows are delivered');
	sql("UPDATE aibilling.price SET input = 99 WHERE model = 'm'");
	sql('BEGIN; CREATE TEMP TABLE t ON COMMIT DROP AS SELECT * FROM back; DELETE FROM back; INSERT INTO back SELECT * FROM t; COMMIT');
	is(sql('SELECT DISTINCT cost_nanos FROM back'), '1000000', 'DELETE and INSERT by the owner');
	ok(settled('back'), 'are sent again');
	is(at_polar('ba'), 'ba1 x1, ba2 x1, ba3 x1', 'and not counted again');
	is(unexpected('back'), 0, 'as is expected');
	like(sql("SELECT status FROM aibilling.status WHERE usage_table = 'back'::regclass"), qr/^idle: everything that can be sent is delivered$/, 'status has nothing to say');
	sql('CREATE TABLE archive AS SELECT * FROM back; DELETE FROM back; INSERT INTO back SELECT * FROM archive');
	is(sql('SELECT DISTINCT cost_nanos FROM back'), '1000000', 'archived and back');
	ok(settled('back') && unexpected('back') == 0, 'the same');
	like(error_of("DELETE FROM back WHERE external_id = 'ba1'; SELECT aibilling.pause('polar'); INSERT INTO back SELECT * FROM archive WHERE external_id = 'ba1';"
			  . "UPDATE back SET input_tokens = 5 WHERE external_id = 'ba1'"), qr/may have been delivered/, 'what came back is a fact');
	resume();
	foreach my $level ('', 'SAVEPOINT s; ')
	{
		like(error_of("BEGIN; DELETE FROM back WHERE external_id = 'ba2'; ${level}INSERT INTO back SELECT * FROM archive WHERE external_id = 'ba2'; "
				  . ($level ? 'RELEASE s; ' : '') . "UPDATE back SET input_tokens = 5 WHERE external_id = 'ba2'; COMMIT"),
			qr/may have been delivered/, 'for the transaction that brings it, too');
	}
	ok(settled('back'), 'until an answer tells');

	# Not by a role that does not own the table, nor with a cost of its own.
	sql("DELETE FROM back; GRANT SELECT ON archive TO app; SET ROLE app; INSERT INTO back SELECT * FROM archive WHERE external_id = 'ba1'");
	is(sql("SELECT cost_nanos FROM back WHERE external_id = 'ba1'"), '99000000', 'of another role it is a new row');
	sql("INSERT INTO back (external_id, provider, model, external_customer_id, input_tokens, cost_nanos, cost_cents, cost_status) VALUES ('ba9', 'acme', 'm', 'c', 1000, 7, 7, 'priced')");
	is(sql("SELECT cost_nanos FROM back WHERE external_id = 'ba9'"), '99000000', 'a row that was never delivered is one, too');
	ok(settled('back') && unexpected('back') == 0, 'both arrive');
	sql("UPDATE aibilling.price SET input = 1 WHERE model = 'm'");
};

subtest '4: TRUNCATE' => sub {
	sql("SELECT aibilling.create_usage_table('cut', 'polar')");
	$polar->fault(kind => 'hang', store => JSON::PP::true);
	sql(ins('cut', 'cu1,cu2'));
	$polar->wait(hung => 1);
	like(error_of('TRUNCATE cut RESTART IDENTITY'), qr/cannot truncate "cut": rows of it are being sent/, 'not while rows are in flight');
	like(error_of('BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM cut; TRUNCATE cut; COMMIT'), qr/are being sent/, 'whatever the snapshot');
	$polar->release;
	ok(settled('cut'), 'they arrive');
	sql('BEGIN; TRUNCATE cut RESTART IDENTITY; ROLLBACK');
	is(states('cut'), 'cu1 delivered, cu2 delivered', 'rolled back, it has said nothing');
	sql('TRUNCATE cut RESTART IDENTITY');
	pause();
	sql(ins('cut', 'cu3,cu4') . "SET aibilling_polar.enqueue = off; " . ins('cut', 'cu5'));
	is(states('cut'), 'cu3 pending, cu4 pending, cu5 not_sent', 'rows that come after it are new');
	is(error_of("UPDATE cut SET input_tokens = 7"), '', 'and may be changed');
	sql("SELECT aibilling.attach('cut', 'polar', 'send')");
	sql('BEGIN; ' . ins('cut', 'cu6') . 'TRUNCATE cut; ' . ins('cut', 'cu7') . 'COMMIT');
	is(states('cut'), 'cu7 pending', 'inserted and truncated in one transaction');
	resume();
	ok(settled('cut'), 'what there is');
	is(at_polar('cu'), 'cu1 x1, cu2 x1, cu7 x1', 'is delivered');
	is(sql("SELECT vanished FROM aibilling.status WHERE usage_table = 'cut'::regclass"), '0', 'nothing is missed');

	# An answer is lost, and other rows have the ids when the request is built again.
	partitioned('swapped');
	$polar->fault(kind => 'drop_after_store');
	$polar->fault(kind => '503', times => 'always');
	sql(ins('swapped', 'sw1,sw2', 'id', 'length(k)::bigint') =~ s/length\(k\)::bigint/right(k, 1)::bigint/r);
	$polar->wait_for(sub { sql("SELECT attempts FROM aibilling.delivery WHERE usage_table = 'swapped'::regclass") > 1 }, 'the second attempt');
	pause();
	sql("TRUNCATE swapped_a; " . ins('swapped', 'sw3', 'id', '1') . "SET aibilling_polar.enqueue = off; " . ins('swapped', 'sw4', 'id', '2'));
	$polar->clear_faults;
	resume();
	ok(settled('swapped'), 'it is settled');
	is(at_polar('sw'), 'sw1 x1, sw2 x1, sw3 x1', 'what was queued under one of the ids is sent, what was not is not');
	is(sql("SELECT sum(vanished), sum(unexpected_duplicates) FROM aibilling.delivery WHERE usage_table = 'swapped'::regclass"), '2|0', 'the rows of then are gone');
};

subtest '5: partitions that go and come' => sub {
	partitioned('parts');
	pause();
	sql(ins('parts', 'pa1,pa2,pa3'));
	sql('ALTER TABLE parts DETACH PARTITION parts_a');
	resume();
	ok(settled('parts'), 'rows of a detached partition do not wait');
	is(sql("SELECT sum(vanished) FROM aibilling.delivery WHERE usage_table = 'parts'::regclass"), '3', 'and are counted');
	sql("DELETE FROM parts_a WHERE external_id = 'pa3'");
	sql("ALTER TABLE parts ATTACH PARTITION parts_a FOR VALUES IN ('a')");
	$polar->wait_for(sub { at_polar('pa') eq 'pa1 x1, pa2 x1' }, 'those that are there again');
	ok(settled('parts'), 'they are sent');
	is(states('parts'), 'pa1 delivered, pa2 delivered', 'as they are');
	sql('ALTER TABLE parts DETACH PARTITION parts_a');
	sql("ALTER TABLE parts ATTACH PARTITION parts_a FOR VALUES IN ('a')");
	is(outbox('parts'), '', 'what was delivered is not sent again');

	# While a partition is away another row gets the id of one of its rows, and goes.
	pause();
	sql(ins('parts', 'away1'));
	my $id = sql("SELECT id FROM parts WHERE external_id = 'away1'");
	sql('ALTER TABLE parts DETACH PARTITION parts_a');
	is(outbox('parts'), '', 'what waits goes with its partition');
	sql(ins('parts', 'here1', 'id, region', "$id, 'b'"));
	resume();
	ok(settled('parts'), 'another row of that id is delivered');
	sql("DELETE FROM parts WHERE external_id = 'here1'");
	sql("ALTER TABLE parts ATTACH PARTITION parts_a FOR VALUES IN ('a')");
	$polar->wait_for(sub { at_polar('away') eq 'away1 x1' }, 'the row that comes back is sent although its id is delivered');
	ok(settled('parts'), 'and settled');

	# Two rows share an id when the partition of one goes.
	foreach my $how ('', 'CONCURRENTLY')
	{
		my $twin = "twin$how";
		pause();
		sql(ins('parts', "${twin}1"));
		$id = sql("SELECT id FROM parts WHERE external_id = '${twin}1'");
		sql(ins('parts', "${twin}2", 'id, region', "$id, 'b'"));
		resume();
		$node->poll_query_until('postgres', "SELECT count(*) = 2 FROM parts p, aibilling.usage_status('parts', p.id) s WHERE p.id = $id AND s.state = 'rejected'");
		sql("ALTER TABLE parts DETACH PARTITION parts_a $how");
		$polar->wait_for(sub { at_polar("${twin}[12]") eq "${twin}2 x1" }, 'the one that stays is sent by itself');
		sql("DELETE FROM parts WHERE external_id = '${twin}2'");
		sql("ALTER TABLE parts ATTACH PARTITION parts_a FOR VALUES IN ('a')");
		$polar->wait_for(sub { at_polar("${twin}[12]") eq "${twin}1 x1, ${twin}2 x1" }, 'and the other when it is back');
		ok(settled('parts'), "both are settled $how");
	}
	is(sql("SELECT sum(unexpected_duplicates) FROM aibilling.delivery WHERE usage_table = 'parts'::regclass"), '0', 'without a surprise');

	# DETACH CONCURRENTLY keeps the shipper away when it ends: what waits goes along.
	pause();
	sql(ins('parts', 'con1,con2') . ins('parts', 'con3', 'region', "'b'"));
	my $vanished = sql("SELECT vanished FROM aibilling.status WHERE usage_table = 'parts'::regclass");
	sql('ALTER TABLE parts DETACH PARTITION parts_a CONCURRENTLY');
	is(outbox('parts') =~ tr/,//, 0, 'DETACH CONCURRENTLY takes what waits along');
	resume();
	ok(settled('parts'), 'the shipper goes on');
	is(at_polar('con'), 'con3 x1', 'and sends the others');
	is(sql("SELECT vanished - $vanished FROM aibilling.status WHERE usage_table = 'parts'::regclass"), '2', 'it is counted');
	sql("ALTER TABLE parts ATTACH PARTITION parts_a FOR VALUES IN ('a')");
	$polar->wait_for(sub { at_polar('con') eq 'con1 x1, con2 x1, con3 x1' }, 'it is sent when it is back');
	ok(settled('parts'), 'and settled');

	# Also what was in flight, without an answer.
	$polar->fault(kind => 'hang');
	sql(ins('parts', 'con4'));
	$polar->wait(hung => 1);
	$polar->fault(kind => '503');
	sql('ALTER TABLE parts DETACH PARTITION parts_a CONCURRENTLY');
	$node->safe_psql('postgres', "SELECT pg_terminate_backend($_)") foreach $node->worker_pid;
	ok(settled('parts'), 'a request without an answer, whose row has left');
	sql("ALTER TABLE parts ATTACH PARTITION parts_a FOR VALUES IN ('a')");
	$polar->wait_for(sub { at_polar('con4') eq 'con4 x1' }, 'is sent again');
	ok(settled('parts'), 'and settled');
	$polar->clear_faults;
	is(unexpected('parts'), '0', 'without a surprise');

	# A usage table becomes a partition, as doc/delivery.md says.
	sql("SELECT aibilling.create_usage_table('old', 'polar'); ALTER TABLE old ADD region text NOT NULL DEFAULT 'c'");
	sql(ins('old', 'ol1,ol2'));
	ok(settled('old'), 'it is delivered');
	sql("SELECT aibilling.detach('old'); UPDATE old SET id = nextval('parts_id'); ALTER TABLE old ALTER id DROP IDENTITY, DROP CONSTRAINT old_pkey, DROP CONSTRAINT old_external_id_key");
	sql("ALTER TABLE parts ATTACH PARTITION old FOR VALUES IN ('c')");
	sql(ins('parts', 'ol3', 'region', "'c'"));
	ok(settled('parts'), 'and goes on');
	is(at_polar('ol'), 'ol1 x1, ol2 x1, ol3 x1', 'nothing lost, nothing twice');
};

subtest '5: the partitions of a partition are read while another one leaves' => sub {
	my $reader = $node->background_psql('postgres');
	my $leaving = $node->background_psql('postgres');

	partitioned('nested');
	sql("CREATE TABLE nested_c PARTITION OF nested FOR VALUES IN ('c') PARTITION BY RANGE (id);"
		  . 'CREATE TABLE nested_c1 PARTITION OF nested_c FOR VALUES FROM (MINVALUE) TO (3);'
		  . 'CREATE TABLE nested_c2 PARTITION OF nested_c FOR VALUES FROM (3) TO (MAXVALUE)');
	$reader->query_safe('BEGIN; SELECT FROM nested');
	$leaving->query_until(qr/now/, "\\echo now\nALTER TABLE nested DETACH PARTITION nested_a CONCURRENTLY;\n");
	$node->poll_query_until('postgres', "SELECT inhdetachpending FROM pg_inherits WHERE inhrelid = 'nested_a'::regclass");
	sql(ins('nested', 'ne1,ne2,ne3,ne4', 'region', "'c'"));
	ok(settled('nested'), 'none of them waits');
	is(at_polar('ne'), 'ne1 x1, ne2 x1, ne3 x1, ne4 x1', 'all rows of them are sent');
	$reader->query_safe('COMMIT');
	$_->quit foreach $reader, $leaving;
	is(sql("SELECT count(*) FROM pg_inherits WHERE inhrelid = 'nested_a'::regclass"), '0', 'it has left');
};

subtest '5: two rows of an id are away, and come back one after the other' => sub {
	my $away = sub { sql("ALTER TABLE apart DETACH PARTITION apart_$_[0]") };
	my $back = sub { sql("ALTER TABLE apart ATTACH PARTITION apart_$_[0] FOR VALUES IN ('$_[0]')") };

	partitioned('apart');
	foreach my $order ([ 1, 'a', 'b' ], [ 2, 'b', 'a' ])
	{
		my ($id, $first, $last) = @$order;

		pause();
		sql(ins('apart', "ap${id}a", 'id, region', "$id, 'a'") . ins('apart', "ap${id}b", 'id, region', "$id, 'b'"));
		$away->('a');
		$away->('b');
		is(outbox('apart'), '', "$id: nothing waits");
		$back->($first);
		is(outbox('apart'), "$id pending", "$id: one comes back");
		resume();
		ok(settled('apart'), "$id: and is sent");
		is(at_polar("ap$id"), "ap$id$first x1", "$id: it is the one that has come");
		sql("DELETE FROM apart WHERE external_id = 'ap$id$first'");
		$back->($last);
		ok(settled('apart'), "$id: and the other");
		is(at_polar("ap$id"), "ap${id}a x1, ap${id}b x1", "$id: each is sent once");
	}

	# One of them has been delivered before.
	sql(ins('apart', 'ap3a', 'id', '3'));
	ok(settled('apart'), 'one is delivered');
	$away->('a');
	pause();
	sql(ins('apart', 'ap3b', 'id, region', "3, 'b'"));
	$away->('b');
	$back->('a');
	is(outbox('apart'), '', 'it comes back while the other, which waited, is away: it is not taken for that one');
	sql("DELETE FROM apart WHERE external_id = 'ap3a'");
	$back->('b');
	resume();
	ok(settled('apart'), 'which is sent when it comes');
	is(at_polar('ap3'), 'ap3a x1, ap3b x1', 'both are there');

	# The same with one that was on its way.
	sql(ins('apart', 'ap4a', 'id', '4'));
	ok(settled('apart'), 'one is delivered');
	$away->('a');
	$polar->fault(kind => '503', times => 10);
	sql(ins('apart', 'ap4b', 'id, region', "4, 'b'"));
	$polar->wait_for(sub { sql("SELECT count(*) FROM aibilling.delivery WHERE usage_table = 'apart'::regclass AND state = 'sending' AND error IS NOT NULL") }, 'the server to fail');
	$away->('b');
	$polar->clear_faults;
	resume();
	ok(settled('apart'), 'the other cannot be sent again');
	$back->('a');
	is(outbox('apart'), '', 'the delivered one is not taken for it');
	sql("DELETE FROM apart WHERE external_id = 'ap4a'");
	$back->('b');
	ok(settled('apart'), 'which is sent when it comes');
	is(at_polar('ap4'), 'ap4a x1, ap4b x1', 'both are there');

	# Nobody has told us that their partitions have gone: their ids are all that is known.
	pause();
	sql(ins('apart', 'ap5a', 'id', '5') . ins('apart', 'ap5b', 'id, region', "5, 'b'"));
	sql("SET session_replication_role = replica; ALTER TABLE apart DETACH PARTITION apart_a; ALTER TABLE apart DETACH PARTITION apart_b");
	resume();
	ok(settled('apart'), 'both are missed');
	$back->('b');
	ok(settled('apart'), 'one comes, and is sent');
	is(at_polar('ap5'), 'ap5b x1', 'as one');
	sql("DELETE FROM apart WHERE external_id = 'ap5b'");
	$back->('a');
	ok(settled('apart'), 'and so is the other');
	is(at_polar('ap5'), 'ap5a x1, ap5b x1', 'both are there');
	is(unexpected('apart'), 0, 'and nothing is a surprise');
	is(sql("SELECT count(*) FROM aibilling.ledger WHERE usage_table = 'apart'::regclass AND (vanished_ids IS NOT NULL OR vanished_keys IS NOT NULL)"), '0', 'nor is anything missed');
};

subtest '5: what may have been stored comes back as that, whoever hears of it first' => sub {
	# Rows of partition b whose request gets no answer, and is sent again, with one of a, after they have left.
	my $leave = sub {
		my ($prefix, $here, $leaving) = @_;

		pause();
		sql(ins('limbo', $here) . ins('limbo', $leaving, 'region', "'b'"));
		$polar->fault(kind => 'drop_after_store', times => 'always');
		resume();
		$polar->wait_for(sub { at_polar($prefix) eq join(', ', map { "$_ x1" } split /,/, "$here,$leaving") }, 'a request that is stored, and gets no answer');
		sql('ALTER TABLE limbo DETACH PARTITION limbo_b');
		ok($node->poll_query_until('postgres', "SELECT attempts > 1 AND events = 1 AND error IS NOT NULL FROM aibilling.delivery WHERE usage_table = 'limbo'::regclass AND state = 'sending'"),
			'it is sent again without the rows that have left');
		pause();
		$polar->clear_faults;
	};

	partitioned('limbo');
	$leave->('li', 'li1', 'li2,li3,li4');
	sql("ALTER TABLE limbo ATTACH PARTITION limbo_b FOR VALUES IN ('b')");
	is(outbox('limbo'), '2 pending, 3 pending, 4 pending', 'they wait as soon as they are back');
	like(error_of("UPDATE limbo SET input_tokens = 9000 WHERE external_id = 'li2'"), qr/may have been delivered/, 'UPDATE is refused');
	like(error_of("DELETE FROM limbo WHERE external_id = 'li2'"), qr/may have been delivered/, 'and DELETE');
	is(error_of("UPDATE limbo SET region = 'a' WHERE external_id = 'li3'"), '', 'one moves');
	like(error_of("UPDATE limbo SET input_tokens = 9000 WHERE external_id = 'li3'"), qr/may have been delivered/, 'and stays what it is');
	sql("SELECT aibilling.attach('limbo', 'polar', 'send')");
	resume();
	ok(settled('limbo'), 'they are sent again');
	is(at_polar('li'), 'li1 x1, li2 x1, li3 x1, li4 x1', 'each is there once');
	is(sql("SELECT string_agg(DISTINCT cost_nanos::text, ' ') FROM limbo"), cost_at_polar('li2'), 'as it is here');
	is(unexpected('limbo'), 0, 'without a surprise');

	# Whatever the transaction's snapshot in which it comes.
	my $old = $node->background_psql('postgres');
	$old->query('BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM model_table');
	pause();
	sql(ins('limbo', 'lr1', 'region', "'b'"));
	sql('ALTER TABLE limbo DETACH PARTITION limbo_b');
	$old->query("ALTER TABLE limbo ATTACH PARTITION limbo_b FOR VALUES IN ('b'); COMMIT");
	$old->quit;
	is(outbox('limbo'), sql("SELECT id || ' pending' FROM limbo WHERE external_id = 'lr1'"), 'in a transaction from before');
	resume();
	ok(settled('limbo'), 'it is sent');

	# Nobody has told us of the partition that comes.
	$leave->('lu', 'lu1', 'lu2');
	sql("SET session_replication_role = replica; ALTER TABLE limbo ATTACH PARTITION limbo_b FOR VALUES IN ('b')");
	sql("SELECT aibilling.attach('limbo', 'polar', 'send')");
	is(outbox('limbo'), sql("SELECT id || ' pending' FROM limbo WHERE external_id = 'lu2'"), 'attach() finds it');
	like(error_of("UPDATE limbo SET input_tokens = 9000 WHERE external_id = 'lu2'"), qr/may have been delivered/, 'and what the ledger says of it');
	resume();
	ok(settled('limbo'), 'it is sent again');
	is(at_polar('lu'), 'lu1 x1, lu2 x1', 'each is there once');
	is(unexpected('limbo'), 0, 'without a surprise');

	# It comes back by hand.
	$leave->('lw', 'lw1', 'lw2');
	sql("UPDATE aibilling.price SET input = 5 WHERE model = 'm'");
	sql("UPDATE limbo_b SET region = 'a'; INSERT INTO limbo SELECT * FROM limbo_b WHERE external_id = 'lw2'");
	is(sql("SELECT o.outcome_unknown, l.cost_nanos FROM limbo l JOIN aibilling.outbox o ON o.usage_id = l.id AND o.usage_table = 'limbo'::regclass WHERE l.external_id = 'lw2'"),
		't|1000000', 'it is a row that Polar may have, and keeps its cost');
	sql("UPDATE aibilling.price SET input = 1 WHERE model = 'm'");
	resume();
	ok(settled('limbo'), 'it is sent again');
	is(at_polar('lw'), 'lw1 x1, lw2 x1', 'each is there once');
	is(unexpected('limbo'), 0, 'without a surprise');
};

subtest '6: rows that come while their table is detached' => sub {
	sql("SELECT aibilling.create_usage_table('off', 'polar')");
	sql(ins('off', 'of1,of2'));
	ok(settled('off'), 'two rows are delivered');
	sql("SELECT aibilling.detach('off'); TRUNCATE off RESTART IDENTITY");
	sql(ins('off', 'of3'));
	sql(ins('off', 'of2', 'id', 2));
	sql("SELECT aibilling.attach('off', 'polar', existing => 'send')");
	ok(settled('off'), 'others come under their ids while it is detached');
	is(at_polar('of'), 'of1 x1, of2 x1, of3 x1', 'those that Polar does not have are sent');
	is(unexpected('off'), '0', 'and the other is no surprise');
	my $deliveries = sql("SELECT count(*) FROM aibilling.delivery WHERE usage_table = 'off'::regclass");
	sql("SELECT aibilling.detach('off'); SELECT aibilling.attach('off', 'polar', existing => 'send')");
	ok(settled('off'), 'attached again as it was');
	is(sql("SELECT count(*) FROM aibilling.delivery WHERE usage_table = 'off'::regclass"), $deliveries, 'nothing is sent again');
};

subtest '6: rows that come while somebody waits to attach their table' => sub {
	my ($writer, $attaching) = map { $node->background_psql('postgres', on_error_stop => 0) } 1, 2;
	foreach my $level ('READ COMMITTED', 'REPEATABLE READ')
	{
		my $table = $level =~ /READ$/ ? 'repeatable' : 'committed';

		sql("CREATE TABLE ${table}_rows (LIKE model_table INCLUDING ALL)");
		$writer->query('BEGIN; ' . ins("${table}_rows", "wa_$table"));
		$attaching->{stdin} .= "BEGIN ISOLATION LEVEL $level; SELECT count(*) FROM model_table; SELECT aibilling.attach('${table}_rows', 'polar', 'send'); COMMIT;\n";
		$attaching->{run}->pump_nb;
		$node->poll_query_until('postgres', "SELECT count(*) > 0 FROM pg_locks WHERE relation = '${table}_rows'::regclass AND NOT granted");
		$writer->query('COMMIT');
		$attaching->query('SELECT 1');
		ok(settled("${table}_rows"), $level);
		is(at_polar("wa_$table"), "wa_$table x1", "what others have committed meanwhile is sent, $level");
	}
	$_->quit foreach $writer, $attaching;
};

subtest '6: the last id' => sub {
	pause();
	sql(ins('cut', 'last', 'id', '9223372036854775807'));
	like(outbox('cut'), qr/9223372036854775807 pending/, 'waits');
	is(error_of("UPDATE cut SET external_customer_id = '' WHERE external_id = 'last'"), '', 'can be updated');
	like(outbox('cut'), qr/9223372036854775807 rejected/, 'is rejected for it');
	is(sql("SELECT rejected FROM aibilling.status WHERE usage_table = 'cut'::regclass"), '1', 'is counted');
	is(error_of("DELETE FROM cut WHERE external_id = 'last'"), '', 'and deleted');
	is(outbox('cut'), '', 'for good');
	sql(ins('cut', 'last', 'id', '9223372036854775807'));
	resume();
	ok(settled('cut') && at_polar('last') eq 'last x1', 'it is delivered');
	is(sql("SELECT (aibilling.usage_status('cut', 9223372036854775807)).state"), 'delivered', 'and known');
	like(error_of("UPDATE cut SET input_tokens = 1 WHERE external_id = 'last'"), qr/has been delivered/, 'as a fact');
};

subtest '7: what may have been stored stays what it is' => sub {
	sql("SELECT aibilling.create_usage_table('unknown', 'polar')");
	my $n = 0;
	foreach my $refusal ({ kind => '422', index => [0] }, { kind => '413' })
	{
		my $key = 'un' . ++$n;
		my @faults = ({ kind => 'drop_after_store' }, $refusal);
		$polar->fault(%$_) foreach @faults;
		sql(ins('unknown', $key));
		$polar->wait_for(sub { outbox('unknown') =~ /rejected/ }, 'the refusal');
		is(sql("SELECT state, outcome_unknown FROM aibilling.outbox WHERE usage_table = 'unknown'::regclass"), 'rejected|t', "$key: rejected, and may be there");
		like(error_of("UPDATE unknown SET input_tokens = 9000 WHERE external_id = '$key'"), qr/may have been delivered/, "$key: UPDATE is refused");
		like(error_of("DELETE FROM unknown WHERE external_id = '$key'"), qr/may have been delivered/, "$key: and DELETE");
		sql("UPDATE aibilling.price SET input = 5 WHERE model = 'm'");
		sql("SELECT count(*) FROM aibilling.reprice('unknown', dry_run => false)");
		is(sql("SELECT cost_nanos FROM unknown WHERE external_id = '$key'"), '1000000', "$key: and reprice");
		sql("UPDATE aibilling.price SET input = 1 WHERE model = 'm'");
		pause();
		sql("SELECT aibilling.retry('unknown')");
		is(sql("SELECT state, outcome_unknown FROM aibilling.outbox WHERE usage_table = 'unknown'::regclass"), 'pending|t', "$key: retry() remembers");
		like(error_of("UPDATE unknown SET input_tokens = 9000 WHERE external_id = '$key'"), qr/may have been delivered/, "$key: it is refused still");
		resume();
		ok(settled('unknown'), "$key: then it is delivered");
		is(cost_at_polar($key), sql("SELECT cost_nanos FROM unknown WHERE external_id = '$key'"), "$key: here as there");
	}
	is(unexpected('unknown'), 0, 'as expected');

	# Ten rows, three server errors after they were stored: each half of the batch knows.
	$polar->fault(kind => '500', store => JSON::PP::true, times => 3);
	sql(ins('unknown', join(',', map { "half$_" } 1 .. 10)));
	ok(settled('unknown'), 'halved');
	is(sql("SELECT sum(duplicates), sum(unexpected_duplicates) FROM aibilling.delivery WHERE usage_table = 'unknown'::regclass AND events > 1"), '10|0', 'duplicates of halves are expected');

	# A stranger's event of the same external_id is not, in the same batch or not.
	pause();
	sql(ins('unknown', 'theirs'));
	$polar->ingest([ { name => 'e', external_customer_id => 'x', external_id => 'theirs' } ]);
	resume();
	ok(settled('unknown'), 'a stranger was first');
	is(unexpected('unknown'), 1, 'and that is told');
};

subtest '7: what is decided in a transaction of an older snapshot' => sub {
	sql("SELECT aibilling.create_usage_table('older', 'polar')");
	my $old = $node->background_psql('postgres', on_error_stop => 0);
	$old->query('BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM model_table');
	sql(ins('older', 'od1,od2'));
	ok(settled('older'), 'what is delivered after the snapshot');
	$old->query('TRUNCATE older RESTART IDENTITY; COMMIT');
	sql('SET aibilling_polar.enqueue = off; ' . ins('older', 'od3'));
	is(states('older'), 'od3 not_sent', 'is known to have been before TRUNCATE');

	$node->create_server($polar, name => 'before', requests_per_minute => 0);
	sql("SELECT aibilling.create_usage_table('elsewhere', 'before')");
	$old->query('BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM model_table');
	$polar->fault(kind => 'hang', store => JSON::PP::true);
	sql(ins('elsewhere', 'ew1'));
	$polar->wait(hung => 1);
	$old->query('ALTER SERVER before RENAME TO after; COMMIT');
	is(sql("SELECT server FROM aibilling.delivery WHERE usage_table = 'elsewhere'::regclass"), 'after', 'and what is sent after it goes with its server');
	$polar->release;
	ok(settled('elsewhere'), 'it is delivered');

	$old->query('BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM model_table');
	sql("SELECT aibilling.pause('after')");
	$old->query("SELECT aibilling.resume('after'); COMMIT");
	sql(ins('elsewhere', 'ew2'));
	ok(settled('elsewhere'), 'who has not seen a pause can end it');
	sql("SELECT aibilling.detach('elsewhere')");

	$old->query('BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM model_table');
	sql("SELECT aibilling.attach('elsewhere', 'after')");
	$old->query('DROP TABLE elsewhere; COMMIT');
	$old->quit;
	is(sql("SELECT count(*) FROM aibilling.status WHERE server = 'after'"), '0', 'a table that was attached after it is forgotten when it goes');
};

subtest '7: what Polar has stays what it is, whatever has become of its server' => sub {
	$node->create_server($polar, name => 'former', requests_per_minute => 0);
	sql("SELECT aibilling.create_usage_table('orphan', 'former')");
	sql(ins('orphan', 'or1'));
	ok(settled('orphan'), 'a row is delivered');
	sql('SET session_replication_role = replica; ALTER SERVER former RENAME TO former_server');
	like(error_of('UPDATE orphan SET input_tokens = 9000'), qr/has been delivered/, 'UPDATE is refused when its server has another name that we were not told');
	sql(ins('orphan', 'or2'));
	ok(settled('orphan'), 'and more are delivered there');
	sql('SELECT aibilling.pause()');
	sql(ins('orphan', 'or3') . ins('orphan', 'or4'));
	sql('SET session_replication_role = replica; DROP SERVER former_server CASCADE');
	like(error_of('UPDATE orphan SET input_tokens = 9000'), qr/has been delivered/, 'and when it has none any more');
	sql("UPDATE orphan SET input_tokens = 9000 WHERE external_id = 'or3'; DELETE FROM orphan WHERE external_id = 'or4'");
	is(outbox('orphan'), '3 pending', 'what was not sent can be changed');
	sql("SELECT aibilling.attach('orphan', 'polar'); SELECT aibilling.resume()");
	ok(settled('orphan'), 'until it has another server');
	is(at_polar('or'), 'or1 x1, or2 x1, or3 x1', 'each is sent once');
	is(cost_at_polar('or3'), sql("SELECT cost_nanos FROM orphan WHERE external_id = 'or3'"), 'as it is');
};

subtest '8: detach asks when nobody can send any more' => sub {
	sql("SELECT aibilling.create_usage_table('race', 'polar')");
	pause();
	sql(ins('race', join(',', map { "ra$_" } 1 .. 10)));
	my $lock = $node->background_psql('postgres');
	$lock->query_safe('BEGIN; LOCK TABLE aibilling.ledger IN SHARE MODE');
	resume();
	ok($node->poll_query_until('postgres', "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND relation = 'aibilling.ledger'::regclass)")
		  || 1, 'the worker is between outbox and ledger');
	my $detach = IPC::Run::start([ 'psql', '-XAtq', '-d', $node->connstr('postgres'), '-c', "SELECT aibilling.detach('race')" ], '<', \undef, '>&', \my $output);
	$lock->query_safe('COMMIT');
	$lock->quit;
	$detach->finish;
	ok(settled('race'), 'it is settled');
	my $attached = sql("SELECT count(*) FROM aibilling.usage_table WHERE usage = 'race'::regclass");
	is(at_polar('ra'), join(', ', sort map { "ra$_ x1" } 1 .. 10), 'every row is there, whether it could be detached or not');
	like($output, qr/cannot detach table/, 'it is refused') if $attached;
	$polar->fault(kind => 'hang');
	sql("SELECT aibilling.attach('race', 'polar')") unless $attached;
	sql(ins('race', 'rb1'));
	$polar->wait(hung => 1);
	like(error_of("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM pg_class; SELECT aibilling.detach('race', 'discard'); COMMIT"),
		qr/rows of it are being sent/, 'also by an old snapshot');
	$polar->release;
	ok(settled('race'), 'the end');
};

subtest '15, 16: rows that others change' => sub {
	sql("SELECT aibilling.create_usage_table('busy', 'polar')");
	pause();
	sql(ins('busy', join(',', map { "bu$_" } 1 .. 100)));
	my $session = $node->background_psql('postgres');
	$session->query_safe('SET client_min_messages = error');
	$session->query_safe("BEGIN; UPDATE busy SET input_tokens = 5000 WHERE external_id = 'bu50'");
	resume();
	$polar->wait_for(sub { at_polar('bu') =~ tr/x// == 99 }, 'all but the row that is being changed');
	unlike(at_polar('bu'), qr/bu50 /, 'which is not sent');
	$session->query_safe('ROLLBACK');
	$polar->wait_for(sub { at_polar('bu') =~ tr/x// == 100 }, 'it after the rollback');
	is(cost_at_polar('bu50'), '1000000', 'unchanged');

	# What is committed is what is sent; a row that is deleted meanwhile is not missed.
	pause();
	sql(ins('busy', 'bv1,bv2,bv3'));
	$session->query_safe("BEGIN; UPDATE busy SET input_tokens = 5000 WHERE external_id = 'bv1'; DELETE FROM busy WHERE external_id = 'bv2';"
		  . "UPDATE busy SET external_customer_id = '' WHERE external_id = 'bv3'");
	resume();
	$polar->wait_for(sub { sql("SELECT count(*) FROM aibilling.status WHERE usage_table = 'busy'::regclass AND pending = 3") }, 'the worker to pass them over');
	$session->query_safe('COMMIT');
	ok(settled('busy'), 'committed');
	is(at_polar('bv'), 'bv1 x1', 'one is sent');
	is(cost_at_polar('bv1'), '5000000', 'as changed');
	is(sql("SELECT vanished, rejected FROM aibilling.status WHERE usage_table = 'busy'::regclass"), '0|1', 'one is gone, one rejected');
	sql("UPDATE busy SET external_customer_id = 'c' WHERE external_id = 'bv3'");
	ok(settled('busy') && at_polar('bv') eq 'bv1 x1, bv3 x1', 'until it is fixed');

	# Two sessions, different rows of one entry, in two orders: nobody waits.
	pause();
	sql("SET client_min_messages = error; INSERT INTO busy (external_id, provider, model, input_tokens) SELECT 'bw' || i, 'acme', 'm', 1 FROM generate_series(1, 8) i");
	my $other = $node->background_psql('postgres');
	$session->query_safe("BEGIN; UPDATE busy SET external_customer_id = 'c' WHERE external_id = 'bw1'");
	$other->query_safe("BEGIN; UPDATE busy SET external_customer_id = 'c' WHERE external_id = 'bw2'");
	$session->query_safe("UPDATE busy SET external_customer_id = 'c' WHERE external_id = 'bw3'; DELETE FROM busy WHERE external_id = 'bw5'");
	$other->query_safe("DELETE FROM busy WHERE external_id = 'bw4'; UPDATE busy SET external_customer_id = 'c' WHERE external_id = 'bw6'");
	$session->query_safe('COMMIT');
	$other->query_safe('COMMIT');
	is(sql("SELECT string_agg(external_id || ' ' || state, ', ' ORDER BY external_id) FROM busy JOIN aibilling.outbox ON id = usage_id AND usage_table = 'busy'::regclass"),
		'bw1 pending, bw2 pending, bw3 pending, bw6 pending, bw7 rejected, bw8 rejected', 'each is what it was made');
	sql("SELECT aibilling.retry('busy')");
	is(sql("SELECT string_agg(DISTINCT state, ', ') FROM aibilling.outbox WHERE usage_table = 'busy'::regclass"), 'pending', 'retry() takes the rest');
	$session->quit;
	$other->quit;
	resume();
	ok(settled('busy'), 'and they are looked at');
	is(at_polar('bw'), 'bw1 x1, bw2 x1, bw3 x1, bw6 x1', 'those that can be sent are');
	is(outbox('busy') =~ tr/,//, 1, 'the others are rejected again');
};

subtest '15: who prices rows anew keeps them from being sent meanwhile' => sub {
	sql(<<'SQL');
SELECT aibilling.create_usage_table('anew', 'polar');
CREATE FUNCTION stop_here() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_advisory_xact_lock(1); RETURN NEW; END';
CREATE TRIGGER a_first BEFORE UPDATE ON anew FOR EACH ROW WHEN (OLD.external_id = 'an1') EXECUTE FUNCTION stop_here();
SQL
	pause();
	sql(ins('anew', 'an1,an2'));
	sql("UPDATE aibilling.price SET input = 3 WHERE provider = 'acme' AND model = 'm'");
	my $holder = $node->background_psql('postgres');
	$holder->query_safe('SELECT pg_advisory_lock(1)');
	my $reprice = IPC::Run::start([ 'psql', '-XAtq', '-d', $node->connstr('postgres'), '-c', "SELECT count(*) FROM aibilling.reprice('anew', dry_run => false)" ], '<', \undef, '>&', \my $output);
	$node->poll_query_until('postgres', "SELECT count(*) = 1 FROM pg_stat_activity WHERE wait_event = 'advisory' AND query LIKE '%reprice%' AND pid <> pg_backend_pid()");
	sql(ins('anew', 'an3'));
	resume();
	$polar->wait_for(sub { at_polar('an') ne '' }, 'the worker to send what it can');
	is(at_polar('an'), 'an3 x1', 'it does not send what is being priced');
	$holder->quit;
	$reprice->finish;
	is($output, "2\n", 'both are priced');
	ok(settled('anew'), 'and sent then');
	is(join(' ', map { cost_at_polar("an$_") } 1 .. 3), sql("SELECT string_agg(cost_nanos::text, ' ' ORDER BY external_id) FROM anew"), 'with the cost that they have here');
	sql("UPDATE aibilling.price SET input = 1 WHERE provider = 'acme' AND model = 'm'");
};

subtest '18: many reasons and times, and subtransactions' => sub {
	pause();
	sql("SELECT aibilling.create_usage_table('many', 'polar')");
	my $quiet = 'SET client_min_messages = error; ';
	sql($quiet . "INSERT INTO many (external_id, provider, model, external_customer_id, input_tokens) SELECT 'm' || i, 'acme', 'ft:' || i, 'c', 1 FROM generate_series(1, 20000) i");
	is(sql("SELECT count(DISTINCT error) FROM aibilling.outbox WHERE usage_table = 'many'::regclass"), '20000', 'a reason each');
	sql($quiet . "INSERT INTO many (external_id, provider, model, external_customer_id, input_tokens, occurred_at)"
		  . " SELECT 'f' || i, 'acme', 'm', 'c', 1, now() + i * interval '1 min' FROM generate_series(10000, 30000) i");
	is(sql("SELECT count(DISTINCT not_before) FROM aibilling.outbox WHERE usage_table = 'many'::regclass"), '20001', 'a time each');
	sql($quiet . "DO \$\$ BEGIN FOR i IN 1 .. 3000 LOOP BEGIN INSERT INTO many (external_id, provider, model, external_customer_id, input_tokens)"
		  . " VALUES ('s' || i, 'acme', 'st:' || i, 'c', 1); IF i % 3 = 0 THEN RAISE unique_violation; END IF;"
		  . " UPDATE many SET input_tokens = 2 WHERE external_id = 's' || i; EXCEPTION WHEN unique_violation THEN NULL; END; END LOOP; END \$\$");
	is(sql("SELECT count(*), count(DISTINCT usage_id) FROM aibilling.outbox JOIN many ON id = usage_id WHERE usage_table = 'many'::regclass AND external_id ~ '^s'"), '2000|2000', 'what is not rolled back');
	sql($quiet . "UPDATE many SET model = 'm' WHERE external_id ~ '^m'; DELETE FROM many WHERE external_id ~ '^[fs]'");
	is(sql("SELECT state, count(*) FROM aibilling.outbox WHERE usage_table = 'many'::regclass GROUP BY 1"), 'pending|20000', 'released and deleted');
	resume();
	ok(settled('many'), 'they are delivered');
	is(sql("SELECT vanished FROM aibilling.status WHERE usage_table = 'many'::regclass"), '0', 'none is missed');
	is(sql("SELECT count(*) FROM aibilling.outbox_entry WHERE usage_table = 'many'::regclass"), '0', 'the outbox is empty');
};

subtest '5: unpriced rows that are gone' => sub {
	$node->psql('postgres', ins('parts', 'pu1,pu2') =~ s/'m'/'nowhere'/r);
	like(outbox('parts'), qr/unpriced, .*unpriced/, 'they wait for a price');
	sql('TRUNCATE parts_a; INSERT INTO aibilling.price (provider, model, input) VALUES (\'acme\', \'elsewhere\', 1)');
	$polar->wait_for(sub { outbox('parts') eq '' }, 'the next look at prices');
	is(sql("SELECT sum(vanished) FROM aibilling.delivery WHERE usage_table = 'parts'::regclass") >= 2, 1, 'finds them gone, and counts them');
};

subtest '24, 25: what is not queued, and tables that are gone' => sub {
	sql("SELECT aibilling.create_usage_table('unsent', 'polar')");
	sql('SET aibilling_polar.enqueue = off; ' . ins('unsent', 'us1,us2,us3'));
	sql(ins('unsent', 'us4'));
	ok(settled('unsent'), 'one is delivered');
	like(sql("SELECT status FROM aibilling.status WHERE usage_table = 'unsent'::regclass"), qr/3 rows were priced and not queued/, 'status counts the others');
	is(at_polar('us'), 'us4 x1', 'which are not sent');
	is(error_of("UPDATE unsent SET input_tokens = 3 WHERE external_id = 'us1'"), '', 'and may change');
	ok(settled('unsent') && at_polar('us') eq 'us4 x1', 'without being sent');

	pause();
	my $log = $node->log_offset;
	sql(ins('unsent', 'us5,us6') . 'SET session_replication_role = replica; DROP TABLE unsent');
	resume();
	$polar->wait_for(sub { sql('SELECT count(*) FROM aibilling.outbox_entry e WHERE NOT EXISTS (SELECT FROM pg_class WHERE oid = e.usage_table)') == 0 },
		'the outbox of a table that went unseen');
	like($node->log_since($log), qr/is gone, and with it 2 rows that were not delivered/, 'the log says what went');
};

subtest 'what is said of a row is short, whatever it holds' => sub {
	sql(q{SELECT aibilling.create_usage_table('wide', 'polar')});
	my $many = q{(SELECT jsonb_object_agg('unit ' || i, 1) FROM generate_series(1, 20000) i)};
	my $long = q{repeat('é', 100000)};
	my %rows = (
		'many units without a price' => [ 'units', $many ],
		'a unit with a long name' => [ 'units', "jsonb_build_object($long, 1)" ],
		'a model with a long name' => [ 'model', $long ],
	);
	foreach my $name (sort keys %rows)
	{
		my ($column, $value) = @{ $rows{$name} };
		my %values = (model => q{'none of these'}, units => 'NULL', $column => $value);
		my $said = warnings_of(qq{INSERT INTO wide (external_customer_id, provider, model, units)
			VALUES ('c', 'acme', $values{model}, $values{units})});
		like($said, qr/held until it can be priced|cannot be sent/, "$name: there is a warning");
		cmp_ok(length($said), '<', 3000, '... which is short');
		cmp_ok(sql(q{SELECT max(octet_length(error)) FROM aibilling.outbox WHERE usage_table = 'wide'::regclass}),
			'<=', 1000, '... as is what the outbox keeps');
	}
	sql(q{SELECT aibilling.set_price('acme', 'counted', units => } . $many . q{, valid_from => '-infinity')});
	is(sql(q{INSERT INTO wide (external_customer_id, provider, model, units)
			VALUES ('c', 'acme', 'counted', } . $many . q{ || '{"unit 7": 3}') RETURNING cost_nanos}),
		'20002000000000', 'each of many units finds its price');
	my @statements = (
		q{INSERT INTO wide (external_customer_id, provider, model, input_tokens)
			SELECT 'c', 'acme', 'unheard of ' || i, 1 FROM generate_series(1, 100) i},
		q{DO $$BEGIN FOR i IN 1 .. 100 LOOP INSERT INTO wide (provider, model, input_tokens) VALUES ('acme', 'm', 1); END LOOP; END$$});
	foreach (@statements)
	{
		my $warnings = () = warnings_of($_) =~ /WARNING/g;
		is($warnings, 5, "a statement warns of a few only: $_");
	}
	sql(q{DROP TABLE wide});
};

$node->stop;
done_testing();
