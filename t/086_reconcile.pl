# What Polar has, read back and compared: each kind of difference is found and named, and nothing else.

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
my $meter = '11111111-2222-4333-8444-555555555555';

sub sql { return $node->safe_psql('postgres', shift) }
sub sync { sql('CALL aibilling.sync()'); return }

sub fails
{
	my ($sql, $like, $what) = @_;
	my ($rc, $out, $err) = $node->psql('postgres', $sql);

	isnt($rc, 0, "$what: an error");
	like($err, $like, "$what: in words");
	return $err;
}

# Requests for what is stored so far, as "METHOD path".
sub gets { return grep { $_->{method} eq 'GET' } $polar->requests }

sub findings
{
	my ($table, $from, $to, $more) = @_;

	return sql("SELECT * FROM aibilling.reconcile_rows('$table', '$from', '$to'" . ($more // '') . ") ORDER BY external_id, finding");
}

sub days
{
	my ($table, $from, $to, $more) = @_;

	return sql("SELECT * FROM aibilling.reconcile('$table', '$from', '$to'" . ($more // '') . ") ORDER BY day");
}

$node->create_server($polar);
$node->create_usage_table;
$node->create_usage_table('other');
$polar->meter($meter, name => 'llm_usage');
sql("INSERT INTO aibilling.price (provider, model, input) VALUES ('acme', 'm', 0.0375)");
sql('CREATE ROLE owner LOGIN; CREATE ROLE reader LOGIN; GRANT pg_monitor TO reader; GRANT ALL ON usage TO reader');

# Rows k1 ... of a day, at 10:00 and a number of microseconds.
sub insert
{
	my ($table, $prefix, $n, $day, $more) = @_;

	sql("INSERT INTO $table (external_id, occurred_at, provider, model, external_customer_id, input_tokens)
		SELECT '$prefix' || i, '$day 10:00:00+00'::timestamptz + i * interval '1 us', 'acme', 'm', 'cust' || i % 3, i FROM generate_series(1, $n) i");
	return;
}

subtest 'the same' => sub {
	insert('usage', 'k', 250, '2026-01-05');
	insert('other', 'o', 5, '2026-01-05');
	sync();
	is(findings('usage', '2026-01-05', '2026-01-06'), '', 'no row differs');
	is(days('usage', '2026-01-05', '2026-01-06'),
		sql("SELECT '2026-01-05', count(*), count(*), sum(cost_nanos), sum(cost_nanos), NULL FROM usage"), 'nor does the day');
	is(days('usage', '2026-01-06', '2026-01-07'), '', 'a day without anything');
	is(findings('usage', '2026-01-05 10:00:00.0001+00', '2026-01-05 10:00:00.0002+00'), '', 'nor does a part of a millisecond');
	is(sql("SELECT count(*) FROM aibilling.polar_events('polar', from_time => '2026-01-05 10:00:00.0001+00', to_time => '2026-01-05 10:00:00.0002+00')"),
		'100', 'whose events are read back, from the first to before the last');
};

subtest 'polar_events' => sub {
	is( sql("SELECT \"timestamp\" = occurred_at, name, e.external_id, e.customer_id, e.external_customer_id, trim_scale(e.cost_cents), e.cost_nanos,
				e.cost_cents = u.cost_cents, e.metadata ->> 'model_id', polar_id IS NOT NULL
			FROM usage u, aibilling.polar_events('polar', external_id => 'k1') e WHERE u.external_id = 'k1'"),
		't|llm_usage|k1||cust1|0.00000375|38|t|m|t', 'one event, whatever Polar writes its amount like');
	is(sql("SELECT count(*), count(DISTINCT polar_id) FROM aibilling.polar_events('polar')"), '255|255', 'all of them, each once');
	is(sql("SELECT count(*) FROM aibilling.polar_events('polar', external_customer_id => 'cust1', event_name => 'llm_usage')"), '86', 'of a customer');
	is(sql("SELECT count(*) FROM aibilling.polar_events('polar', event_name => 'nothing')"), '0', 'of a name that no event has');
	is(sql("SELECT count(*) FROM aibilling.polar_events('polar', external_customer_id => 'a b&c=d/ü%?#')"), '0', 'parameters are written as a URL wants them');
	my ($rc, $out, $err) = $node->psql('postgres', "SELECT count(*) FROM aibilling.polar_events('polar', max_rows => 120)");
	is($out, '120', 'no more than is asked for');
	like($err, qr/NOTICE:  these are 120 of about 255 events/, 'which it says');
	is(sql("SELECT count(*) FROM aibilling.polar_events('polar', max_rows => 0)"), '0', 'none');
	$err = fails("SELECT aibilling.polar_events('polar', max_rows => 10001)", qr/max_rows must be from 0 to 10000, but is 10001/, 'too many');
	like($err, qr/HINT:  A meter answers for more/, 'and what to do');
};

subtest 'polar_meter' => sub {
	is(sql("SELECT \"timestamp\" AT TIME ZONE 'UTC', quantity FROM aibilling.polar_meter('polar', '$meter', '2026-01-04', '2026-01-07')"),
		"2026-01-04 00:00:00|0\n2026-01-05 00:00:00|" . sql("SELECT sum(cost_nanos) FROM (TABLE usage UNION ALL TABLE other) u") . "\n2026-01-06 00:00:00|0",
		'day by day');
	is(sql("SELECT quantity FROM aibilling.polar_meter('polar', '$meter', '2026-01-05', '2026-01-06', external_customer_id => 'cust1')"),
		sql("SELECT sum(cost_nanos) FROM (TABLE usage UNION ALL TABLE other) u WHERE external_customer_id = 'cust1'"), 'of a customer');
	is(sql("SELECT count(*) FROM aibilling.polar_meter('polar', '$meter', '2026-01-05', '2026-01-06', 'hour')"), '24', 'by the hour');
	fails("SELECT aibilling.polar_meter('polar', '$meter', '2026-01-05', '2026-01-06', 'second')", qr/step "second" is unknown/, 'another step');
	fails("SELECT aibilling.polar_meter('polar', 'aaaaaaaa-2222-4333-8444-555555555555', '2026-01-05', '2026-01-06')",
		qr/server "polar" has not found what was asked for/, 'another meter');
	fails("SELECT aibilling.polar_meter('polar', '$meter', '2022-01-05', '2026-01-06')", qr/HTTP status 422/, 'before there were any');
};

subtest 'each difference' => sub {
	insert('usage', 'd', 150, '2026-02-01');
	sql("INSERT INTO usage (external_id, occurred_at, provider, model, external_customer_id, input_tokens, parent_id)
		VALUES ('child of nobody', '2026-02-01 11:00+00', 'acme', 'm', 'c', 1, 'nobody')");
	sql("INSERT INTO usage (external_id, occurred_at, provider, model, customer_id, input_tokens)
		VALUES ('by uuid', '2026-02-01 11:00+00', 'acme', 'm', '6f9c1f5e-0d5c-4b3f-8d3a-0c9f4f1f2a3b', 1)");
	sync();
	# delivered twice by a lost answer
	$polar->fault(kind => 'drop_after_store', times => 1);
	insert('usage', 'twice', 3, '2026-02-01');
	sync();
	ok($polar->summary->{duplicates} >= 3, 'some were sent twice');
	# history is not awaited there
	sql("SET aibilling_polar.enqueue = off; INSERT INTO usage (external_id, occurred_at, provider, model, external_customer_id, input_tokens)
		VALUES ('history', '2026-02-01 12:00+00', 'acme', 'm', 'c', 1)");

	is(findings('usage', '2026-02-01', '2026-02-02'), 'child of nobody|parent unknown|38|', 'a child whose parent Polar does not know');

	$polar->change(['d7'], remove => \1);
	$polar->change(['d8'], metadata => { cost_nanos => 301 });
	$polar->change(['d9'], metadata => { _cost => { amount => '0.00003376', currency => 'usd' } });
	$polar->change(['d10'], external_customer_id => 'renamed');
	$polar->change(['d11'], customer => { id => 'x', external_id => 'cust2' });
	$polar->change(['d12'], customer => { id => 'x', external_id => 'renamed' });
	$polar->ingest([{ name => 'llm_usage', timestamp => '2026-02-01T10:30:00Z', external_customer_id => 'c', external_id => 'foreign',
				metadata => { external_id => 'foreign', cost_nanos => 5 } },
			{ name => 'page_view', timestamp => '2026-02-01T10:31:00Z', external_customer_id => 'c' }]);
	insert('other', 'p', 4, '2026-02-01');
	sql("CALL aibilling.sync()");
	sql("SELECT aibilling.pause('polar')");
	sql("INSERT INTO usage (external_id, occurred_at, provider, model, external_customer_id, input_tokens)
		VALUES ('queued', '2026-02-01 13:00+00', 'acme', 'm', 'c', 1)");
	$polar->fault(kind => 'hang', times => 1, path => '/v1/events/ingest');
	sql("SELECT aibilling.resume('polar')");
	$polar->wait(hung => 1);

	my $all = join "\n", 'child of nobody|parent unknown|38|', 'd10|customer differs|375|375', 'd12|customer differs|450|450', 'd7|missing at Polar|263|',
	  'd8|amount differs|300|301', 'd9|amount differs|338|338', 'foreign|unknown here||5', 'queued|not sent yet|38|', '|unknown here||';
	is(findings('usage', '2026-02-01', '2026-02-02'), $all, 'all of them, and nothing else');
	is( sql("SELECT day, rows_here, rows_there, finding FROM aibilling.reconcile('usage', '2026-02-01', '2026-02-02')"),
		'2026-02-01|156|155|1 missing at Polar, 2 unknown here, 2 amount differs, 2 customer differs, 1 not sent yet, 1 parent unknown',
		'of the day');
	is(findings('other', '2026-02-01', '2026-02-02'), "foreign|unknown here||5\n|unknown here||", 'the other table knows its own');

	$polar->release;
	$polar->clear_faults;
	sync();
	unlike(findings('usage', '2026-02-01', '2026-02-02'), qr/queued/, 'delivered, it is there');
	is(sql("SELECT finding FROM aibilling.reconcile_rows('usage', '2026-02-01 13:00+00', '2026-02-01 13:00:01+00')"), '', 'alone, too');
	sql("DELETE FROM usage WHERE external_id = 'd20'");
	like(findings('usage', '2026-02-01', '2026-02-02'), qr/^d20\|unknown here\|\|750$/m, 'a row deleted here is unknown');
};

# Events that are at another time there: the list of the day does not bring them.
subtest 'what is asked for by name' => sub {
	sql("INSERT INTO usage (external_id, occurred_at, provider, model, external_customer_id, input_tokens, parent_id)
		SELECT 'moved' || i, timestamptz '2025-12-01 10:00+00', 'acme', 'm', 'c', i, NULL FROM generate_series(1, 3) i
		UNION ALL VALUES ('its child', timestamptz '2025-12-01 11:00+00', 'acme', 'm', 'c', 1, 'moved3')");
	sync();
	$polar->change([qw(moved1 moved2 moved3)], timestamp => '2025-12-20T10:00:00+00:00');
	$polar->change(['moved2'], metadata => { cost_nanos => 7 });
	is(findings('usage', '2025-12-01', '2025-12-02'), 'moved2|amount differs|75|7', 'it is there, and compared');
	is(findings('usage', '2025-12-01 11:00+00', '2025-12-01 12:00+00'), '', 'as a parent, too');
};

subtest 'corrections are rows like any' => sub {
	insert('usage', 'c', 3, '2026-02-10');
	sync();
	sql("SELECT aibilling.correct('usage', id, 0.0000000755) FROM usage WHERE external_id LIKE 'c_'");
	sync();
	is(findings('usage', '2026-02-10', '2026-02-11'), '', 'to the digit');
	is(days('usage', '2026-02-10', '2026-02-11', ", '$meter'"), '2026-02-10|6||228|228|', 'by the meter, too');
};

subtest 'by the meter' => sub {
	insert('usage', 'm', 1000, '2026-03-01');
	insert('usage', 'n', 10, '2026-03-02');
	sync();
	my $before = gets();
	is(days('usage', '2026-03-01', '2026-04-01', ", meter_id => '$meter'"),
		sql("SELECT occurred_at::date, count(*), NULL, sum(cost_nanos), sum(cost_nanos), NULL FROM usage
			WHERE occurred_at BETWEEN '2026-03-01' AND '2026-03-31' GROUP BY 1 ORDER BY 1"), 'a month is right');
	is(scalar(gets()) - $before, 1, 'by one request');
	is(findings('usage', '2026-03-01', '2026-04-01', ", meter_id => '$meter'"), '', 'no row to be looked at');
	is(scalar(gets()) - $before, 2, 'again by one');

	$polar->change(['n3'], remove => \1);
	sql("SELECT aibilling.pause('polar')");
	insert('usage', 'q', 2, '2026-03-01');
	is(sql("SELECT day, rows_here, rows_there, nanos_here - nanos_there, finding FROM aibilling.reconcile('usage', '2026-03-01', '2026-04-01', '$meter')"),
		"2026-03-01|1002||113|2 not sent yet\n2026-03-02|10||113|1 amount differs", 'days that are not');
	is(findings('usage', '2026-03-01', '2026-04-01', ", meter_id => '$meter'"),
		"n3|missing at Polar|113|\nq1|not sent yet|38|\nq2|not sent yet|75|", 'and their rows');
	sql("SELECT aibilling.resume('polar')");
	sync();
	fails("SELECT aibilling.reconcile('usage', '2026-03-01 01:00+00', '2026-03-02', '$meter')", qr/whole days/, 'half a day');
	fails("SELECT aibilling.reconcile('usage', '2022-03-01', '2026-03-02', '$meter')", qr/before 2023-01-01/, 'long ago');
	fails("SELECT aibilling.reconcile('usage', '-infinity', '2026-03-02')", qr/must be finite/, 'for ever');
};

subtest 'many rows' => sub {
	sql("INSERT INTO usage (external_id, occurred_at, provider, model, external_customer_id, input_tokens)
		SELECT 'many' || i, '2026-04-01 00:00+00'::timestamptz + i * interval '800 us', 'acme', 'm', 'c', 1 FROM generate_series(1, 100000) i");
	sync();
	my $before = gets();
	is(days('usage', '2026-04-01', '2026-04-02', ", '$meter'"), '2026-04-01|100000||3800000|3800000|', '100,000 of a day, by the meter');
	cmp_ok(scalar(gets()) - $before, '<=', 2, 'by two requests at most');
	my $err = fails("SELECT aibilling.reconcile('usage', '2026-04-01', '2026-04-02')", qr/has more than 10000 rows in this time/, 'by the events');
	like($err, qr/HINT: .* by a meter/, 'a meter is what to use');
	is(scalar(gets()), $before + 1, 'and nothing was asked');
	is(findings('usage', '2026-04-01 00:01+00', '2026-04-01 00:01:01+00'), '', 'a second of it');
	is(sql("SELECT count(*) FROM aibilling.polar_events('polar', from_time => '2026-04-01', max_rows => 300)"), '300', 'the first of them');
};

subtest 'many of one time' => sub {
	sql("INSERT INTO usage (external_id, occurred_at, provider, model, external_customer_id, input_tokens)
		SELECT 'tie' || i, '2026-05-01 00:00+00', 'acme', 'm', 'c', 1 FROM generate_series(1, 950) i");
	sync();
	$polar->change(['tie77'], remove => \1);
	is(findings('usage', '2026-05-01', '2026-05-02'), 'tie77|missing at Polar|38|', 'whose order changes from page to page');
	is(sql("SELECT rows_here, rows_there, finding FROM aibilling.reconcile('usage', '2026-05-01', '2026-05-02')"), '950|949|1 missing at Polar', 'of the day');
};

subtest 'metadata of the user' => sub {
	sql("CREATE FUNCTION mine(jsonb) RETURNS jsonb LANGUAGE sql AS 'SELECT jsonb_build_object(''external_id'', \$1 ->> ''external_id'', ''x'', 1)'");
	sql("CREATE FUNCTION nameless(jsonb) RETURNS jsonb LANGUAGE sql AS 'SELECT jsonb_build_object(''x'', 1)'");
	$node->create_server($polar, name => 'own', metadata_function => 'public.mine');
	$node->create_usage_table('mapped', 'own');
	insert('mapped', 'map', 3, '2026-06-01');
	sync();
	is(findings('mapped', '2026-06-01', '2026-06-02'), '', 'is compared as it was sent');
	sql("ALTER SERVER own OPTIONS (SET metadata_function 'public.nameless')");
	fails("SELECT aibilling.reconcile('mapped', '2026-06-01', '2026-06-02')", qr/events of server "own" cannot be told apart at Polar/, 'without external_id');
};

subtest 'who may' => sub {
	foreach my $call ("polar_events('polar')", "polar_meter('polar', '$meter', '2026-01-01', '2026-01-02')",
		"reconcile('usage', '2026-01-01', '2026-01-02')", "reconcile_rows('usage', '2026-01-01', '2026-01-02')")
	{
		fails("SET ROLE reader; SELECT aibilling.$call", qr/must be owner of foreign server polar/, "another role: $call");
	}
	sql('GRANT USAGE ON FOREIGN DATA WRAPPER polar TO owner');
	sql('ALTER SERVER polar OWNER TO owner');
	is(sql("SET ROLE owner; SELECT count(*) FROM aibilling.polar_events('polar', external_id => 'k1')"), '1', 'its owner');
	fails("SET ROLE owner; SELECT aibilling.reconcile('usage', '2026-01-01', '2026-01-02')", qr/permission denied for table usage/, 'who may not read the table');
	sql('GRANT SELECT ON usage TO owner');
	is(sql("SET ROLE owner; SELECT count(*) FROM aibilling.reconcile('usage', '2026-01-05', '2026-01-06')"), '1', 'who may');
	sql("CREATE SERVER prices FOREIGN DATA WRAPPER polar OPTIONS (kind 'prices', format 'narev', url 'http://127.0.0.1:1')");
	fails("SELECT aibilling.polar_events('prices')", qr/server "prices" is a price service/, 'not a price service');
	is(sql("SELECT count(*) FROM aibilling.polar_events(NULL)"), '0', 'nothing of nobody');
};

subtest 'answers' => sub {
	my $one = "SELECT count(*) FROM aibilling.polar_events('polar', external_id => 'k1')";

	$polar->tokens(token => $polar->token, scopes => ['events:read']);
	is(sql($one), '1', 'events:read will do');
	fails("SELECT aibilling.polar_meter('polar', '$meter', '2026-01-05', '2026-01-06')", qr/the access token of server "polar" lacks the scope meters:read/, 'not for meters');
	$polar->tokens(token => $polar->token, scopes => ['meters:read']);
	fails($one, qr/the access token of server "polar" lacks the scope events:read \(or events:write\)/, 'nor that for events');
	$polar->tokens(token => $polar->token, status => 'revoked');
	fails($one, qr/server "polar" does not accept its access token/, 'a revoked token');
	$polar->tokens(token => $polar->token, status => 'active', scopes => [ 'events:write', 'meters:read' ]);

	$polar->fault(kind => '429', retry_after => 1);
	my ($rc, $out, $err) = $node->psql('postgres', $one);
	is($out, '1', 'Retry-After is obeyed');
	like($err, qr/INFO:  aibilling.polar_events\(\): server "polar" asks to wait 1 seconds/, 'and told');
	my @asked = gets();
	cmp_ok(sql("SELECT '$asked[-1]{time}'::timestamptz - '$asked[-2]{time}'::timestamptz >= '1 s'"), 'eq', 't', 'for that long');
	$polar->fault(kind => '502');
	is(sql($one), '1', 'an error that passes');
	$polar->fault(kind => 'truncated');
	is(sql($one), '1', 'an answer cut short');
	$polar->fault(kind => 'status', status => 418, body => '');
	fails($one, qr/server "polar" has answered with HTTP status 418/, 'what nobody expects');
	$polar->fault(kind => 'garbage', what => 'html');
	fails($one, qr/invalid input syntax for type json/, 'no JSON');
	$polar->fault(kind => 'status', status => 200, body => '{}');
	fails($one, qr/an answer of Polar's lacks "items"/, 'no events');
	$polar->fault(kind => 'hang', times => 1);
	fails("SET statement_timeout = 1000; $one", qr/canceling statement due to statement timeout/, 'a wait that is cancelled');
	$polar->release;
	is(sql($one), '1', 'then all is well');
};

$node->stop;
$polar->stop;

done_testing();
