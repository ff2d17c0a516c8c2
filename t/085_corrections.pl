# Corrections add up: whatever is corrected, in whichever order and how often, a row and its corrections
# say what was asked for, to the digit, in the table and at Polar.

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

sub fails
{
	my ($sql, $like, $what) = @_;
	my ($rc, $out, $err) = $node->psql('postgres', $sql);

	isnt($rc, 0, "$what: an error");
	like($err, $like, "$what: in words");
	return $err;
}

sub deliver
{
	sql('CALL aibilling.sync()');
	is(sql('SELECT count(*) FROM aibilling.outbox'), '0', 'all is delivered');
	return;
}

# What a row and all that corrects it say: nano-dollars, cents.
sub total
{
	my ($external_id, $table) = @_;

	$table //= 'usage';
	return sql("SELECT sum(cost_nanos), trim_scale(sum(cost_cents)) FROM $table
		WHERE '$external_id' IN (external_id, tags ->> 'corrects')");
}

sub correct
{
	my ($external_id, $usd, $table) = @_;

	$table //= 'usage';
	return sql("SELECT aibilling.correct('$table', id, $usd) FROM $table WHERE external_id = '$external_id'");
}

# What Polar has been told in all, by the events that it stored.
sub told_is_stored
{
	my $nanos = 0;

	$nanos += $_->{event}{metadata}{cost_nanos} // 0 for $polar->events;
	is($nanos, sql('SELECT sum(cost_nanos) FROM usage'), 'nano-dollars here and there');
	is($polar->summary->{stored}, sql('SELECT count(*) FROM usage'), 'events here and there');
	return;
}

$node->create_server($polar, requests_per_minute => 0);
$node->create_usage_table;
# Half a nano-dollar more or less at each token.
sql("INSERT INTO aibilling.price (provider, model, input) VALUES ('acme', 'm', 0.0375), ('acme', 'n', 1.0005)");
sql("INSERT INTO usage (external_id, occurred_at, provider, sub_provider, model, event_name, external_customer_id, input_tokens, tags)
	SELECT k, '2026-01-02 03:04:05.678901+00', 'acme', 'sub', 'm', 'call', 'cust', 1, '{\"team\": \"red\"}'
	FROM unnest('{a,b,c,d,e,f}'::text[]) k");

subtest 'what waits is not corrected' => sub {
	sql("SELECT aibilling.pause('polar')");
	sql("INSERT INTO usage (external_id, provider, model, external_customer_id, input_tokens) VALUES ('waits', 'acme', 'm', 'c', 1)");
	my $err = fails("SELECT aibilling.correct('usage', id, 1) FROM usage WHERE external_id = 'waits'",
		qr/ERROR:  usage row \d+ of public.usage is not delivered yet/, 'a waiting row');
	like($err, qr/HINT:  Change it with UPDATE/, 'with the way out');
	fails("BEGIN; INSERT INTO usage (external_id, provider, model, external_customer_id, input_tokens) VALUES ('new', 'acme', 'm', 'c', 1);
		SELECT aibilling.correct('usage', id, 1) FROM usage WHERE external_id = 'new'",
		qr/is not delivered yet/, 'a row of the same transaction');
	sql("SET aibilling_polar.enqueue = off; INSERT INTO usage (external_id, provider, model, external_customer_id, input_tokens)
		VALUES ('loaded', 'acme', 'm', 'c', 1)");
	fails("SELECT aibilling.correct('usage', id, 1) FROM usage WHERE external_id = 'loaded'", qr/was never sent/, 'a loaded row');
	sql("DELETE FROM usage WHERE external_id = 'loaded'");
	fails("SELECT aibilling.correct('usage', 999999, 1)", qr/has no usage row 999999/, 'no row');
	sql("SELECT aibilling.resume('polar')");
	deliver();
};

subtest 'to the digit, again and again' => sub {
	is(total('a'), '38|0.00000375', 'what was billed: 37.5 nano-dollars');
	my $id = correct('a', '0.000000075');
	is(total('a'), '75|0.0000075', 'twice as much: not 38 and half of 75, rounded');
	is(correct('a', '0.000000075'), '', 'once more: nothing to do');
	isnt(correct('a', '0.0000000754'), '', 'less than a nano-dollar more');
	is(total('a'), '75|0.00000754', 'is told in cents');
	isnt(correct('a', '0'), '', 'void');
	is(total('a'), '0|0', 'is nothing');
	isnt(correct('a', '1.00000000000001'), '', 'much');
	is(total('a'), '1000000000|100.000000000001', 'is much');
	isnt(correct('a', '-0.5'), '', 'a refund');
	is(total('a'), '-500000000|-50', 'is negative');
	is(correct('a', '-0.50000000000000001'), '', 'beyond 12 decimals of a cent there is nothing');
	deliver();
	told_is_stored();
	isnt(sql("SET aibilling_polar.enqueue = off; SELECT aibilling.correct('usage', id, 0.25) FROM usage WHERE external_id = 'a'"), '',
		'also where rows are loaded without being sent');
	deliver();
	told_is_stored();

	is( sql("SELECT external_id <> 'a', occurred_at AT TIME ZONE 'UTC', provider, sub_provider, model, event_name, external_customer_id,
			input_tokens, parent_id, tags, cost_status FROM usage WHERE id = $id"),
		't|2026-01-02 03:04:05.678901|acme|sub|m|call|cust|||{"team": "red", "corrects": "a"}|reported',
		'a correcting row is like the other one, without counts');
	my ($event) = grep { ($_->{metadata}{tag_corrects} // '') eq 'a' } map { $_->{event} } $polar->events;
	is_deeply([ @{$event}{qw(name timestamp external_customer_id parent_id)}, $event->{metadata}{tag_team} ],
		[ 'call', '2026-01-02T03:04:05.678901Z', 'cust', undef, 'red' ], 'and so is its event');
};

subtest 'what was corrected before counts' => sub {
	correct('b', '0.000003');
	deliver();
	sql("DELETE FROM usage WHERE tags ->> 'corrects' = 'b'");
	is(total('b'), '38|0.00000375', 'the correction is deleted');
	correct('b', '0.000005');
	is(sql("SELECT sum(cost_nanos) FROM usage WHERE tags ->> 'corrects' = 'b'"), '2000', 'and counts, delivered');

	sql("SELECT aibilling.pause('polar')");
	sql("DELETE FROM usage WHERE tags ->> 'corrects' = 'b'");
	is(correct('b', '0.000005'), '', 'and counts now that it was deleted, too');
	correct('b', '0.000007');
	sql("DELETE FROM usage WHERE tags ->> 'corrects' = 'b'");
	correct('b', '0.000007');
	is(sql("SELECT sum(cost_nanos) FROM usage WHERE tags ->> 'corrects' = 'b'"), '2000', 'one that waited does not count when it is deleted');
	sql("UPDATE usage SET provider_cost = 0.000001, external_id = 'changed' WHERE tags ->> 'corrects' = 'b'");
	correct('b', '0.000007');
	is(sql("SELECT sum(cost_nanos) FROM usage WHERE tags ->> 'corrects' = 'b'"), '2000', 'nor what it said before an UPDATE');
	sql("UPDATE usage SET tags = '{}' WHERE external_id = 'changed'");
	correct('b', '0.000007');
	is(sql("SELECT sum(cost_nanos) FROM usage WHERE tags ->> 'corrects' = 'b'"), '2000', 'nor one that corrects nothing any more');
	sql("DELETE FROM usage WHERE external_id = 'changed'");

	sql("INSERT INTO usage (external_id, external_customer_id, provider_cost, tags)
		VALUES ('by hand', 'cust', -0.000001, '{\"corrects\": \"b\"}')");
	is(correct('b', '0.000006'), '', 'one by hand counts');
	sql("SELECT aibilling.resume('polar')");
	deliver();
	my $err = fails("SELECT aibilling.correct('usage', id, 1) FROM usage WHERE external_id = 'by hand'",
		qr/is itself a correction, of the row with external_id "b"/, 'a correction is not corrected');
	sql("BEGIN; SELECT aibilling.correct('usage', id, 7) FROM usage WHERE external_id = 'b'; ROLLBACK");
	is(correct('b', '0.000006'), '', 'one rolled back does not count');
	sql("INSERT INTO usage (external_id, external_customer_id, provider, model, input_tokens, tags)
		VALUES ('no cost', 'cust', 'acme', 'unknown', 5, '{\"corrects\": \"c\"}')");
	fails("SELECT aibilling.correct('usage', id, 1) FROM usage WHERE external_id = 'c'",
		qr/usage row \d+ of public.usage, which corrects row \d+, has no cost yet/, 'one without a cost');
	sql("DELETE FROM usage WHERE external_id = 'no cost'");
};

subtest 'limits' => sub {
	my $err = fails("SELECT aibilling.correct('usage', id, 1000.0000000376) FROM usage WHERE external_id = 'c'",
		qr/the cost of usage row \d+ of public.usage would change by 100000.00000001 cents: 1000 USD or more do not fit one event/, 'too much');
	like($err, qr/HINT:  Split the difference/, 'says to split it');
	isnt(correct('c', '999.9'), '', 'less goes');
	isnt(correct('c', '1999.8'), '', 'in steps');
	is(total('c'), '1999800000000|199980', 'of any number');
	fails("SELECT aibilling.correct('usage', id, 'NaN') FROM usage WHERE external_id = 'c'", qr/must be a finite number/, 'NaN');
	fails("SELECT aibilling.correct('usage', id, 1e12) FROM usage WHERE external_id = 'c'", qr/out of range|do not fit/, 'beyond bigint');
	sql('CREATE ROLE reader LOGIN; GRANT ALL ON usage TO reader');
	fails("SET ROLE reader; SELECT aibilling.correct('usage', 1, 0)", qr/must be owner of table usage/, 'for the owner only');
	is(sql("SELECT count(*) FROM usage WHERE tags ->> 'corrects' IN ('a', 'b', 'c') AND external_id !~ '^[0-9a-f-]{36}\$'"), '1',
		'nothing else was written');
};

subtest 'reprice' => sub {
	my $reprice = "SELECT external_id, r.state, old_cost_nanos, new_cost_nanos, difference_nanos, action
		FROM usage JOIN aibilling.reprice('usage', to_time => '2026-02-01', %s) r ON id = usage_id
		WHERE external_id !~ '^[abc]' ORDER BY external_id";
	# what was corrected by hand so far is not today's concern
	deliver();
	my $others = sql("SELECT count(*) FROM aibilling.reprice('usage', to_time => '2026-02-01')");
	is($others, '3', 'three rows whose corrections say something else than the price');
	sql("DELETE FROM usage WHERE external_id IN ('a', 'b', 'c')");

	sql("SELECT aibilling.pause('polar')");
	sql("INSERT INTO usage (external_id, occurred_at, provider, model, external_customer_id, input_tokens) VALUES ('waiting', '2026-01-03', 'acme', 'm', 'c', 1)");
	sql("UPDATE aibilling.price SET input = 0.05 WHERE model = 'm'");
	is(sql(sprintf($reprice, 'dry_run => true')), join("\n", (map { "$_|delivered|38|50|12|reported" } 'd', 'e', 'f'), 'waiting|pending|38|50|12|would change'),
		'delivered rows are reported');
	is(sql(sprintf($reprice, 'corrections => true')), join("\n", (map { "$_|delivered|38|50|12|would correct" } 'd', 'e', 'f'), 'waiting|pending|38|50|12|would change'),
		'or would be corrected');
	my $err = fails(sprintf($reprice, 'dry_run => false, corrections => true, max_total => 0.0000000374'),
		qr/corrections of 3 usage rows of public.usage would come to 0.00000375 cents, more than max_total, 0.0000000374 USD/, 'more than max_total');
	like($err, qr/Nothing has been changed/, 'changes nothing');
	is(total('d'), '38|0.00000375', 'indeed');
	is(total('waiting'), '38|0.00000375', 'of what waits neither');
	is(sql(sprintf($reprice, 'dry_run => false, corrections => true, max_total => 0.0000000375')),
		join("\n", (map { "$_|delivered|38|50|12|corrected" } 'd', 'e', 'f'), 'waiting|pending|38|50|12|changed'), 'corrected');
	is(total($_), '50|0.000005', "$_ says it") for 'd', 'e', 'f', 'waiting';
	is(sql("SELECT count(*) FROM usage WHERE tags ->> 'corrects' = 'waiting'"), '0', 'what waits was repriced');
	is(sql(sprintf($reprice, 'dry_run => false, corrections => true')), '', 'once more changes nothing');
	sql("SELECT aibilling.resume('polar')");
	deliver();
	is(sql(sprintf($reprice, 'dry_run => false, corrections => true')), '', 'nor when all is delivered');
	is(sql("SELECT count(*) FROM aibilling.reprice('usage', to_time => '2026-02-01', dry_run => false)"), '0', 'corrections are not repriced themselves');

	correct('e', '0.000001');
	sql("UPDATE aibilling.price SET input = 0.0375 WHERE model = 'm'");
	is(sql("SELECT count(*) FROM aibilling.reprice('usage', dry_run => false, corrections => true)"), '4', 'back');
	is(total($_), '38|0.00000375', "$_ is where it was") for 'd', 'e', 'f', 'waiting';
	deliver();
	is(sql(sprintf($reprice, 'corrections => true')), '', 'all is well');

	fails("SELECT aibilling.reprice('usage', max_total => 1)", qr/max_total limits corrections, which are not asked for/, 'max_total alone');
	fails("SELECT aibilling.reprice('usage', corrections => true, max_total => '$_')", qr/max_total must be a number and not negative/, "max_total $_")
	  for '-1', 'NaN';
	is(sql("SELECT count(*) FROM aibilling.reprice(NULL)"), '0', 'of nothing');

	sql("UPDATE aibilling.price SET request = 2000 WHERE model = 'm'");
	fails("SELECT aibilling.reprice('usage', dry_run => false, corrections => true)", qr/1000 USD or more do not fit one event/, 'too dear');
	sql("UPDATE aibilling.price SET request = NULL WHERE model = 'm'");
};

subtest 'delivered without a cost' => sub {
	sql("ALTER SERVER polar OPTIONS (ADD unpriced 'send')");
	sql("INSERT INTO usage (external_id, provider, model, external_customer_id, input_tokens) VALUES ('unpriced', 'acme', 'later', 'c', 3)");
	deliver();
	is(correct('unpriced', '0'), '', 'nothing is nothing');
	sql("INSERT INTO aibilling.price (provider, model, input) VALUES ('acme', 'later', 0.0005)");
	is(sql("SELECT state, old_cost_nanos, new_cost_nanos, action FROM aibilling.reprice('usage', dry_run => false, corrections => true)"),
		'delivered||2|corrected', 'is corrected by the whole of it');
	is(total('unpriced'), '2|0.00000015', 'to the digit');
	is(sql("SELECT count(*) FROM aibilling.reprice('usage', dry_run => false, corrections => true)"), '0', 'once');
	sql("ALTER SERVER polar OPTIONS (DROP unpriced)");
};

subtest 'many' => sub {
	sql("INSERT INTO usage (external_id, provider, model, external_customer_id, input_tokens)
		SELECT 'many' || i, 'acme', 'n', 'c', i FROM generate_series(1, 2500) i");
	deliver();
	sql("UPDATE aibilling.price SET input = 1.0004 WHERE model = 'n'");
	sql("SELECT count(*) FROM aibilling.reprice('usage', dry_run => false, corrections => true)");
	is(sql("SELECT count(*) FROM usage WHERE tags ->> 'corrects' LIKE 'many%'"), '2500', 'each has its correction');
	is(sql("SELECT count(*) FROM usage o JOIN usage c ON c.tags ->> 'corrects' = o.external_id
			WHERE o.external_id LIKE 'many%' AND (o.cost_nanos + c.cost_nanos, o.cost_cents + c.cost_cents)
				<> (aibilling.cost_nanos('acme', 'n', o.input_tokens), aibilling.cost_cents('acme', 'n', o.input_tokens))"),
		'0', 'and all of them add up');
	deliver();
};

subtest 'tables as people have them' => sub {
	sql("CREATE TABLE own (LIKE usage INCLUDING ALL, tenant text NOT NULL, request text NOT NULL DEFAULT 'none', number bigint UNIQUE,
			made_at timestamptz NOT NULL DEFAULT clock_timestamp(), twice bigint GENERATED ALWAYS AS (input_tokens * 2) STORED, gone int,
			UNIQUE (tenant, external_id))");
	sql('ALTER TABLE own DROP COLUMN gone');
	sql("SELECT aibilling.attach('own', 'polar')");
	sql("INSERT INTO own (external_id, provider, model, external_customer_id, input_tokens, tenant, request, number, made_at)
		VALUES ('o', 'acme', 'm', 'c', 1, 'T', 'R', 7, '2020-01-01')");
	deliver();
	correct('o', '1', 'own');
	is(sql("SELECT tenant, request, number, made_at > '2026-01-01', twice FROM own WHERE tags ->> 'corrects' = 'o'"), 'T|R||t|',
		'columns of your own come along, but for those that are unique or made anew');

	sql("CREATE TABLE parted (LIKE usage INCLUDING DEFAULTS INCLUDING IDENTITY, region text) PARTITION BY LIST (region)");
	sql("ALTER TABLE parted ADD UNIQUE (id, region)");
	sql("CREATE TABLE parted_$_ PARTITION OF parted FOR VALUES IN ('$_')") for 'eu', 'us';
	sql("SELECT aibilling.attach('parted', 'polar')");
	sql("INSERT INTO parted (external_id, provider, model, external_customer_id, input_tokens, region)
		VALUES ('p', 'acme', 'm', 'c', 1, 'eu'), ('q', 'acme', 'm', 'c', 1, 'us')");
	deliver();
	correct('p', '1', 'parted');
	is(sql("SELECT tableoid::regclass FROM parted WHERE tags ->> 'corrects' = 'p'"), 'parted_eu', 'the same partition');

	# A correction that waits goes with its partition; one that was delivered counts.
	sql("SELECT aibilling.pause('polar')");
	sql("ALTER TABLE parted DETACH PARTITION parted_us; DROP TABLE parted_us; CREATE TABLE parted_us PARTITION OF parted FOR VALUES IN ('us')");
	correct('p', '2', 'parted');
	sql("UPDATE parted SET region = 'us' WHERE provider_cost = 1 AND tags ->> 'corrects' = 'p'");
	is(correct('p', '2', 'parted'), '', 'a correction that has moved counts');
	sql("ALTER TABLE parted DETACH PARTITION parted_us; DROP TABLE parted_us");
	isnt(correct('p', '2', 'parted'), '', 'one that is gone with its partition does not');
	sql("SELECT aibilling.resume('polar')");
	deliver();
	is(correct('p', '2', 'parted'), '', 'and counts no more when it has vanished');

	sql("TRUNCATE parted");
	is(sql("SELECT count(*) FROM aibilling.correction WHERE usage_table = 'parted'::regclass"), '0', 'TRUNCATE forgets');
	sql("DROP TABLE own");
	is(sql("SELECT count(*) FROM aibilling.correction c WHERE NOT EXISTS (SELECT FROM pg_class p WHERE p.oid = c.usage_table)"), '0', 'so does DROP');

	# Rows that were there before.
	sql("CREATE TABLE old (LIKE usage INCLUDING ALL)");
	sql("INSERT INTO old (external_id, provider, model, external_customer_id, input_tokens, cost_nanos, cost_cents, cost_status)
		VALUES ('first', 'acme', 'm', 'c', 1, 38, 0.00000375, 'priced')");
	sql("INSERT INTO old (external_id, external_customer_id, provider_cost, tags) VALUES ('second', 'c', 0.000001, '{\"corrects\": \"first\"}')");
	sql("SELECT aibilling.attach('old', 'polar', existing => 'send')");
	deliver();
	is(correct('first', '0.0000010375', 'old'), '', 'and are sent, count, too');
};

subtest 'a trigger that changes what is stored' => sub {
	sql("CREATE FUNCTION dearer() RETURNS trigger LANGUAGE plpgsql AS \$\$BEGIN NEW.provider_cost := NEW.provider_cost + 1; RETURN NEW; END\$\$;
		CREATE TRIGGER dearer BEFORE INSERT ON usage FOR EACH ROW EXECUTE FUNCTION dearer()");
	fails("SELECT aibilling.correct('usage', id, 3) FROM usage WHERE external_id = 'd'", qr/is not stored as it was inserted/, 'is an error');
	sql("CREATE OR REPLACE FUNCTION dearer() RETURNS trigger LANGUAGE plpgsql AS \$\$BEGIN RETURN NULL; END\$\$");
	fails("SELECT aibilling.correct('usage', id, 3) FROM usage WHERE external_id = 'd'", qr/1 correcting rows of public.usage were to be inserted, but 0 were/, 'so is none');
	sql('DROP TRIGGER dearer ON usage');
	is(total('d'), '38|0.00000375', 'and nothing is written');
};

$node->stop;
$polar->stop;

done_testing();
