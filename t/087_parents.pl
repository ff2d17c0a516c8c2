# A row that names a parent goes with it in one request, or when Polar has surely come to know the parent;
# a rejected parent rejects it, a cycle is found, and a parent that nobody here knows holds nobody.

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
my $node = AibillingNode->new('main');

sub sql { return $node->safe_psql('postgres', shift) }

$node->create_server($polar, requests_per_minute => 0);
$node->create_usage_table;
sql("INSERT INTO aibilling.price (provider, model, input) VALUES ('acme', 'm', 1)");

# Insert rows by one statement: external_id => parent_id.
sub insert
{
	my @rows = @_;
	my @values;

	while (my ($id, $parent) = splice @rows, 0, 2)
	{
		push @values, "('$id', " . (defined $parent ? "'$parent'" : 'NULL') . ", 'acme', 'm', 'c', 10)";
	}
	sql('INSERT INTO usage (external_id, parent_id, provider, model, external_customer_id, input_tokens) VALUES ' . join ', ', @values);
	return;
}

# What is in the outbox: external_id, state, reason.
sub waiting
{
	return sql("SELECT external_id, state, error FROM aibilling.outbox JOIN usage ON id = usage_id ORDER BY id");
}

sub sync { sql('CALL aibilling.sync()'); return }

sub stored
{
	my ($id) = @_;

	return scalar grep { ($_->{external_id} // '') eq $id } $polar->events;
}

# As if a minute had passed.
sub later
{
	sql("UPDATE aibilling.ledger SET finished_at = finished_at - interval '61 s'");
	sql("UPDATE aibilling.outbox_entry SET not_before = now() - interval '1 s' WHERE state = 'w'");
	sync();
	return;
}

my $waits = 'pending|parent_id: waits until its parent is delivered, and then for a minute';
my $new = 'pending|parent_id: its parent was delivered less than a minute ago';
my $rejected = 'rejected|parent_id: its parent is rejected; release this row with aibilling.retry() after its parent';
my $cycle = 'rejected|parent_id: its parents lead back to it; Polar would never show any of them';

subtest 'together' => sub {
	insert(child => 'parent', parent => undef, grandchild => 'child');
	sync();
	is(waiting(), '', 'a family is sent at once');
	is(scalar(grep { ($_->{events} // 0) == 3 } $polar->requests), 1, 'by one request');
	is(sql("SELECT string_agg(external_id || ' of ' || parent_id, ', ' ORDER BY id) FROM usage WHERE parent_id IS NOT NULL"),
		'child of parent, grandchild of child', 'rows say whose they are');
};

subtest 'after a minute' => sub {
	insert(second => 'parent', nephew => 'second', stranger => 'nobody', loner => undef);
	sync();
	is(waiting(), "second|$new\nnephew|$new", 'a child of what was just delivered waits, and who comes with it');
	is(sql("SELECT bool_and(not_before BETWEEN finished_at + interval '60 s' AND finished_at + interval '62 s') FROM aibilling.outbox,
		(SELECT finished_at FROM aibilling.delivery WHERE usage_ids @> 1::bigint) AS d"), 't', 'a minute, from the delivery of its parent');
	ok(stored('stranger') && stored('loner'), 'others do not');
	sql("UPDATE aibilling.outbox_entry SET not_before = now() - interval '1 s' WHERE state = 'w'");
	sync();
	is(waiting(), "second|$new\nnephew|$new", 'looked at too early, it waits again');
	later();
	is(waiting(), '', 'then it is sent');
	insert(third => 'parent');
	sync();
	is(waiting(), '', 'and one that comes later, at once');
};

subtest 'a parent that waits' => sub {
	sql("INSERT INTO usage (external_id, provider, model, external_customer_id, input_tokens) VALUES ('unpriced', 'acme', 'new', 'c', 1)");
	sync();
	insert(patient => 'unpriced');
	sync();
	like(waiting(), qr/^patient\|\Q$waits\E$/m, 'for its price');
	later();
	like(waiting(), qr/^patient\|\Q$waits\E$/m, 'still');
	sql("INSERT INTO aibilling.price (provider, model, input) VALUES ('acme', 'new', 1)");
	sync();
	ok(stored('unpriced') && !stored('patient'), 'is delivered before the child');
	sql("UPDATE aibilling.outbox_entry SET not_before = now() - interval '1 s' WHERE state = 'w'");
	sync();
	is(waiting(), "patient|$new", 'which waits on');
	later();
	is(waiting(), '', 'until it has its turn');

	sql("INSERT INTO usage (external_id, occurred_at, provider, model, external_customer_id, input_tokens)
		VALUES ('future', now() + interval '1 day', 'acme', 'm', 'c', 1)");
	insert(early => 'future');
	sync();
	like(waiting(), qr/^early\|\Q$waits\E$/m, 'for its time');
	sql("UPDATE usage SET parent_id = NULL WHERE external_id = 'early'");
	sync();
	is(waiting(), 'future|pending|', 'an UPDATE lets the child go');
	sql("DELETE FROM usage WHERE external_id = 'future'");
};

subtest 'a parent in flight' => sub {
	$polar->fault(kind => 'hang', times => 1);
	insert('in flight' => undef);
	$polar->wait(hung => 1);
	insert('of flying' => 'in flight');
	ok($node->poll_query_until('postgres', "SELECT count(*) = 1 FROM aibilling.outbox WHERE error LIKE 'parent_id: waits%'"), 'holds its child');
	$polar->release;
	sync();
	is(waiting(), "of flying|$waits", 'for a minute');
	later();
	is(waiting(), '', 'and no longer');
};

subtest 'a rejected parent' => sub {
	sql("INSERT INTO usage (external_id, provider, model, input_tokens) VALUES ('nameless', 'acme', 'm', 1)");
	insert(orphan => 'nameless', 'orphan of orphan' => 'orphan');
	sync();
	like(waiting(), qr/^orphan\|\Q$rejected\E\norphan of orphan\|\Q$rejected\E$/m, 'rejects its children and theirs');
	sql("UPDATE usage SET external_customer_id = 'c' WHERE external_id = 'nameless'");
	is(sql("SELECT aibilling.retry('usage')"), '2', 'released');
	sync();
	later();
	is(waiting(), '', 'they go with it or after it');

	# Polar says no to a parent that goes with its child.
	$polar->fault(kind => 'poison', external_ids => ['poison'], status => 422);
	insert(poison => undef, poisoned => 'poison');
	sync();
	like(waiting(), qr/^poison\|rejected\|[^\n]*poison[^\n]*\npoisoned\|\Q$rejected\E$/, 'so does one that Polar refuses');
	sql("DELETE FROM usage WHERE external_id LIKE 'poison%'");
	$polar->clear_faults;
};

subtest 'a parent that is not sent from here' => sub {
	sql("SET aibilling_polar.enqueue = off; INSERT INTO usage (external_id, provider, model, external_customer_id, input_tokens)
		VALUES ('history', 'acme', 'm', 'c', 1)");
	insert('of history' => 'history', 'of old uuid' => '6f9c1f5e-0d5c-4b3f-8d3a-0c9f4f1f2a3b');
	sync();
	is(waiting(), '', 'holds nobody');
};

subtest 'cycles' => sub {
	insert(a2 => 'b2', b2 => 'a2', tail => 'a2', innocent => 'nobody');
	sync();
	like(waiting(), qr/^a2\|\Q$cycle\E\nb2\|\Q$cycle\E\ntail\|\Q$rejected\E/, 'of two, and who hangs on to them');
	ok(stored('innocent'), 'nobody else');

	sql("SELECT aibilling.pause('polar')");
	insert(map { ("long$_", 'long' . ($_ % 700 + 1)) } 1 .. 700);
	insert(one => 'three', two => 'one', three => 'two');
	sql("SELECT aibilling.resume('polar')");
	sync();
	is(sql("SELECT count(*) FROM aibilling.outbox JOIN usage ON id = usage_id WHERE external_id LIKE 'long%' AND 'rejected|' || error = '$cycle'"),
		'700', 'of more rows than a request holds');
	is(sql("SELECT count(*) FROM aibilling.outbox JOIN usage ON id = usage_id WHERE external_id IN ('one', 'two', 'three') AND 'rejected|' || error = '$cycle'"),
		'3', 'of three');
	sql("UPDATE usage SET parent_id = NULL WHERE external_id = 'three'");
	sql("SELECT aibilling.retry('usage', array_agg(id)) FROM usage WHERE external_id IN ('one', 'two')");
	sync();
	later();
	ok(stored('one') && stored('two') && stored('three'), 'broken up, its rows are sent');
	sql("DELETE FROM usage WHERE external_id LIKE 'long%' OR external_id ~ '^[ab]2\$' OR external_id = 'tail'");

	# Closed by a row that comes when another of it is delivered.
	insert(sent => 'closing');
	sync();
	later();
	insert(closing => 'sent');
	sync();
	like(waiting(), qr/^closing\|\Q$cycle\E$/m, 'closed later');
	sql("UPDATE usage SET parent_id = NULL WHERE external_id = 'closing'");
	sync();
	ok(stored('closing'), 'and opened');
};

# Which request brought an event to Polar; undef if none has.
sub request_of
{
	my ($id) = @_;
	my ($event) = grep { ($_->{external_id} // '') eq $id } $polar->events;

	return $event ? $event->{batch} : undef;
}

# The answer to a request of these rows is lost, and then it is too large.
sub insert_failing
{
	my ($lost, @rows) = @_;

	$polar->fault(kind => $lost, times => 1);
	$polar->fault(kind => '413', times => 1);
	insert(@rows);
	sync();
	return;
}

subtest 'halves of a request that Polar may have' => sub {
	insert_failing('drop_before_read', leaf => 'stem', alone => undef, branch => 'stem', 'alone too' => undef, twig => 'branch', stem => undef,
		map { ("alone $_" => undef) } 1 .. 4);
	is(waiting(), '', 'a family that has room in one goes as one');
	is(scalar(grep { request_of($_) == request_of('stem') } qw(leaf branch twig)), 3, 'in the same request');
	isnt(request_of('alone 4'), request_of('stem'), 'and others in the other');

	insert_failing('drop_before_read', d1 => 'root', d2 => 'd1', d3 => 'root', root => undef);
	is(waiting(), "d1|$waits\nd2|$waits", 'of a family that fails as one the children wait that are without their parent');
	is(request_of('d3'), request_of('root'), 'not those that are with it');
	is(sql("SELECT bool_and(outcome_unknown) FROM aibilling.outbox"), 't', 'it is not forgotten that Polar may have them');
	later();
	is(waiting(), '', 'a minute after it they are sent');
	is(request_of('d1'), request_of('d2'), 'together');

	insert_failing('drop_after_store', s1 => 's2', s2 => 's3', s3 => 's4', s4 => undef);
	like(waiting(), qr/\A(s\d\|\Q$waits\E\n?)+\z/, 'so do children that Polar has already');
	later() foreach 1 .. 3;
	is(waiting(), '', 'and are sent again');
	is(sql("SELECT sum(unexpected_duplicates) FROM aibilling.delivery"), '0', 'which is expected');

	$polar->fault(kind => '500', times => 3);
	insert(w1 => 'w', single => undef, w2 => 'w', w => undef);
	sync();
	is(waiting(), '', 'after server errors, too');
	isnt(request_of('single'), request_of('w'), 'families are what is halved');
};

subtest 'halves of a request that Polar refuses' => sub {
	$polar->fault(kind => '413', min_events => 3, times => 'always');
	insert(e1 => 'eldest', stranger1 => undef, stranger2 => undef, eldest => undef);
	sync();
	is(waiting(), '', 'too large: a family that has room in a half goes as one');
	is(request_of('e1'), request_of('eldest'), 'in the same request');
	insert(g1 => 'great', g2 => 'great', g3 => 'great', g4 => 'great', great => undef);
	sync();
	like(waiting(), qr/\A(g\d\|\Q$waits\E\n?)+\z/, 'children of one that has not wait');
	later() foreach 1 .. 3;
	is(waiting(), '', 'and come after it');
	is(scalar(grep { request_of($_) < request_of('great') } qw(g1 g2 g3 g4)), 0, 'none before');
	$polar->clear_faults;

	$polar->fault(kind => '413', times => 2);
	insert('of huge' => 'huge', huge => undef);
	sync();
	like(waiting(), qr/^of huge\|\Q$waits\E\nhuge\|rejected\|/, 'a parent that is too large alone');
	later();
	like(waiting(), qr/^of huge\|\Q$rejected\E\nhuge\|rejected\|/, 'rejects its children when they have waited');
	sql("SELECT aibilling.retry('usage')");
	sync();
	is(waiting(), '', 'released, they are sent');
};

subtest 'rows that leave a request that Polar may have' => sub {
	# Polar refuses the parent when it is asked again.
	$polar->fault(kind => 'poison', external_ids => ['refused'], status => 422);
	$polar->fault(kind => 'drop_before_read', times => 1);
	insert('of refused' => 'refused', refused => undef);
	sync();
	like(waiting(), qr/^of refused\|\Q$rejected\E\nrefused\|rejected\|/, 'a parent that is refused rejects its child');
	$polar->reset(keep => ['events']);
	sql("SELECT aibilling.retry('usage')");
	sync();
	is(waiting(), '', 'released, they are sent');
	is(request_of('of refused'), request_of('refused'), 'together');

	# There is less room in the second request than there was in the first.
	$polar->fault(kind => 'hang', times => 1);
	sql("INSERT INTO usage (external_id, parent_id, provider, model, external_customer_id, input_tokens, tags)
		SELECT e, p, 'acme', 'm', 'c', 10, (SELECT jsonb_object_agg('k' || i, repeat('x', 500)) FROM generate_series(1, 15) i)
		FROM (VALUES ('of large', 'large'), ('large', NULL), ('grandchild of large', 'of large')) AS v (e, p)");
	$polar->wait(hung => 1);
	sql("ALTER SERVER polar OPTIONS (ADD batch_bytes '10kB')");
	$node->safe_psql('postgres', "SELECT pg_terminate_backend($_)") foreach $node->worker_pid;
	sync();
	is(waiting(), "of large|$waits\ngrandchild of large|$waits", 'a parent that is left to the next one holds its child');
	sql("ALTER SERVER polar OPTIONS (DROP batch_bytes)");
	later() foreach 1 .. 2;
	is(waiting(), '', 'for a minute');
	cmp_ok(request_of('of large'), '>', request_of('large'), 'they come after it');
	is(request_of('of large'), request_of('grandchild of large'), 'together');

	# A row that comes meanwhile closes a cycle.
	$polar->fault(kind => 'hang', times => 1);
	insert('in the air' => 'closes');
	$polar->wait(hung => 1);
	sql("SELECT aibilling.pause('polar')");
	insert(closes => 'in the air');
	$node->safe_psql('postgres', "SELECT pg_terminate_backend($_)") foreach $node->worker_pid;
	sql("SELECT aibilling.resume('polar')");
	sync();
	is(waiting(), "closes|$cycle", 'who closes a cycle can be changed: they are rejected, and nobody else');
	sql("DELETE FROM usage WHERE external_id = 'closes'");
};

subtest 'many' => sub {
	sql("SELECT aibilling.pause('polar')");
	sql("INSERT INTO usage (external_id, parent_id, provider, model, external_customer_id, input_tokens)
		SELECT 'span' || i, CASE WHEN i % 10 > 0 THEN 'span' || i / 10 * 10 END, 'acme', 'm', 'c', 1 FROM generate_series(1000, 3999) i");
	sql("SELECT aibilling.resume('polar')");
	sync();
	later();
	is(waiting(), '', 'all are delivered');
	is(sql("SELECT count(*) FROM usage"), $polar->summary->{stored} + 1, 'each once (history was not sent)');
};

subtest 'a table in which rows are not found by external_id' => sub {
	sql("CREATE TABLE parted (LIKE usage INCLUDING DEFAULTS INCLUDING IDENTITY, PRIMARY KEY (id, occurred_at)) PARTITION BY RANGE (occurred_at)");
	sql("CREATE TABLE parted_all PARTITION OF parted DEFAULT");
	sql("SELECT aibilling.attach('parted', 'polar')");
	sql("INSERT INTO parted (external_id, provider, model, external_customer_id, input_tokens) VALUES ('p', 'acme', 'm', 'c', 1)");
	sync();
	sql("INSERT INTO parted (external_id, parent_id, provider, model, external_customer_id, input_tokens) VALUES ('q', 'p', 'acme', 'm', 'c', 1)");
	sync();
	is(sql("SELECT count(*) FROM aibilling.outbox"), '0', 'holds nobody');
	sql("CREATE INDEX ON parted (external_id)");
	sql("INSERT INTO parted (external_id, parent_id, provider, model, external_customer_id, input_tokens) VALUES ('r', 'p', 'acme', 'm', 'c', 1)");
	sync();
	is(sql("SELECT 'pending|' || error FROM aibilling.outbox"), $new, 'with an index it does');
	later();
	is(sql("SELECT count(*) FROM aibilling.outbox"), '0', 'for a minute');
};

$node->stop;
$polar->stop;

done_testing();
