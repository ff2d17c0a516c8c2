# What becomes of the rows of a request, for every answer and for none.
use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use AibillingNode;
use JSON::PP qw(encode_json);
use POSIX qw(strftime);
use PolarServer;
use PostgreSQL::Test::Utils;
use Test::More;

plan skip_all => 'needs python3' unless PolarServer->python;

my $polar = PolarServer->new;
my $node = AibillingNode->new('main', conf => "aibilling_polar.poll_interval = 1\nlog_statement = none\n");
my $token_file = $node->token_file($polar->token);
$node->create_server($polar,
	batch_size => 100, max_in_flight => 1, timeout => '10min', access_token_file => $token_file);
$node->create_usage_table;

# Searches that take a while run on a server of their own meanwhile.
my $poisoned = PolarServer->new;
$node->create_server($poisoned, name => 'poisoned', batch_size => 4, max_in_flight => 2);
$node->create_usage_table('bad', 'poisoned');
$poisoned->fault(kind => 'poison', external_ids => ['bad_3'], status => 500);
$node->insert_rows(4, table => 'bad', prefix => 'bad_');

# --- helpers ---------------------------------------------------------------------

my $rounds = 0;

# The newest delivery of a table.
sub newest
{
	my ($columns, $table) = @_;
	$table //= 'usage';
	return $node->ledger($columns,
		"id = (SELECT max(id) FROM aibilling.delivery WHERE usage_table = '$table'::regclass)");
}

# Wait until the newest delivery has come to something.
sub wait_newest
{
	my ($condition, $table) = @_;
	$table //= 'usage';
	return $node->poll_query_until('postgres',
		"SELECT coalesce((SELECT $condition FROM aibilling.delivery WHERE usage_table = '$table'::regclass "
		  . "ORDER BY id DESC LIMIT 1), false)");
}

# What the outbox holds of a table.
sub outbox
{
	my ($columns, $table) = @_;
	$table //= 'usage';
	return $node->safe_psql('postgres',
		"SELECT $columns FROM aibilling.outbox WHERE usage_table = '$table'::regclass");
}

# Deliver what is left, without waiting for a backoff to end.
sub resume_and_settle
{
	$polar->clear_faults;
	$polar->release;
	$node->safe_psql('postgres', "SELECT aibilling.resume('polar')");
	$node->poll_query_until(
		'postgres', q{SELECT NOT EXISTS (SELECT FROM aibilling.outbox
	WHERE usage_table = 'usage'::regclass AND state = 'pending')
AND NOT EXISTS (SELECT FROM aibilling.delivery WHERE usage_table = 'usage'::regclass AND state = 'sending')});
	return;
}

# One fault, ten rows: what the ledger says, and that all is well in the end.
# The next attempt hangs until all of that has been looked at; the status, in
# words, is of those that make it wait for longer.
sub round_of
{
	my ($what, $fault, %expect) = @_;
	my $before = $polar->summary;

	$rounds++;
	$polar->fault(%$fault);
	$polar->fault(kind => 'hang');
	$node->insert_rows(10, prefix => "round_${rounds}_");
	wait_newest("error ~ '$expect{error}' AND state <> 'delivered' "
		  . "AND usage_ids \@> (SELECT max(id) FROM usage)");
	is(newest("state || ' ' || coalesce(http_status, 0)"),
		$expect{ledger}, "$what: in the ledger");
	like($node->status, $expect{status}, "$what: in the status") if $expect{status};
	like($node->safe_psql('postgres', "SELECT failures || ' ' || reason FROM aibilling.server_state WHERE server = 'polar'"),
		$expect{failure}, "$what: one failure of the server") if $expect{failure};
	is(outbox("count(*) || ' ' || coalesce(max(attempts), 0)"),
		$expect{outbox} // '0 0', "$what: in the outbox");
	$expect{meanwhile}->() if $expect{meanwhile};
	resume_and_settle();

	my $after = $polar->summary;
	is( join(' ', map { $after->{$_} - $before->{$_} } qw(inserted duplicates)),
		$expect{stored} ? '10 10' : '10 0',
		"$what: every row is stored once in the end");
	is( newest("state || ' ' || duplicates || ' ' || unexpected_duplicates"),
		$expect{stored} ? 'delivered 10 0' : 'delivered 0 0',
		"$what: duplicates are accounted for, and expected");
	return;
}

# Is the server asked again so many seconds after the answer?
sub held_for
{
	my ($seconds, $since) = @_;
	$since //= 'changed_at';
	return $node->safe_psql('postgres',
		"SELECT abs(extract(epoch FROM not_before - $since) - $seconds) < 30 FROM aibilling.server_state WHERE server = 'polar'");
}

# --- tokens ----------------------------------------------------------------------

chmod 0644, $token_file;
$node->safe_psql('postgres', 'ALTER SERVER polar OPTIONS (ADD tag_prefix \'t_\')');
$node->insert_rows(1, prefix => 'token_');
ok($node->wait_status('^paused: .*(group|others|mode|permission|0600)'), 'token file that others can read');
unlink $token_file;
$node->safe_psql('postgres', q{SELECT aibilling.resume('polar')});
ok($node->wait_status('^paused: .*(No such file|does not exist)'), 'token file that is missing');
$node->write_token($token_file, "\n");
$node->safe_psql('postgres', q{SELECT aibilling.resume('polar')});
ok($node->wait_status('^paused: .*empty'), 'token file that is empty');
$node->safe_psql('postgres',
	"CREATE USER MAPPING FOR PUBLIC SERVER polar OPTIONS (access_token 'mapped_token')");
$node->write_token($token_file, $polar->token);
ok($node->wait_status('^paused: .*given twice'), 'token given twice');
$node->write_token($token_file, $polar->token);
is($polar->summary->{arrived}, 0, 'no request was made with any of them');
$node->safe_psql('postgres', 'DROP USER MAPPING FOR PUBLIC SERVER polar');
$polar->wait(events => 1);
pass('once fixed, delivery resumes by itself');
$node->wait_status('^idle');
is(newest('attempts'), '1', 'and no attempt was burnt');

$node->safe_psql('postgres',
	"CREATE USER MAPPING FOR PUBLIC SERVER polar OPTIONS (access_token 'mapped_token')");
ok($node->wait_status('^paused: .*given twice'), 'a token given twice is told with nothing to send, too');
$node->safe_psql('postgres', 'DROP USER MAPPING FOR PUBLIC SERVER polar');
ok($node->wait_status('^idle'), 'and that it is fixed');

# --- answers that prove nothing, or that the server is ill ---------------------------

round_of($_, { kind => $_ },
	error => $_, ledger => "sending $_", failure => qr/^1 .*$_/)
  foreach qw(500 502 503 504);
round_of('503 with Retry-After',
	{ kind => 'status', status => 503, headers => { 'Retry-After' => '1077' }, body => 'later' },
	error => '503: the server failed', ledger => 'sending 503', status => qr/^waiting until .* after 1 failures/,
	meanwhile => sub { is(held_for(1077), 't', '503: Retry-After is obeyed') });
round_of('a connection closed before the request was read', { kind => 'drop_before_read' },
	error => 'the connection was closed', ledger => 'sending 0', failure => qr/^1 ./);
round_of('a connection closed after storing', { kind => 'drop_after_store' },
	error => 'the connection was closed', ledger => 'sending 0', failure => qr/^1 ./, stored => 1);
round_of('an answer cut short', { kind => 'truncated' },
	error => 'reading the answer failed', ledger => 'sending 200', failure => qr/^1 ./, stored => 1);
round_of("garbage: $_", { kind => 'garbage', what => $_, store => \1 },
	error => 'not Polar', ledger => 'sending 200', failure => qr/^1 .*not Polar/, stored => 1)
  foreach qw(html text empty);
round_of('wrong counts', { kind => 'garbage', what => 'wrong_counts', store => \1 },
	error => 'of 10 events Polar counts', ledger => 'sending 200', failure => qr/^1 ./, stored => 1);
round_of('an answer of 100 MB', { kind => 'garbage', what => 'huge', store => \1 },
	error => 'longer than', ledger => 'sending 200', failure => qr/^1 ./, stored => 1);
round_of("status $_", { kind => 'status', status => $_ + 0, body => '{}' },
	error => "HTTP $_: the (server|answer is not Polar)", ledger => "sending $_", failure => qr/^1 ./)
  foreach qw(201 204 408 599);

# The counts decide, not the type that a proxy gives the answer.
$rounds++;
$polar->fault(kind => 'garbage', what => 'content_type', store => \1);
$node->insert_rows(10, prefix => "round_${rounds}_");
resume_and_settle();
is(newest("state || ' ' || inserted + duplicates || ' ' || unexpected_duplicates"),
	'delivered 10 0', 'an answer of another content type');

# --- too many requests ----------------------------------------------------------------

my @later = gmtime(time + 3000);
my $date = strftime('%a, %d %b %Y %H:%M:%S GMT', @later);
round_of('429 with seconds', { kind => '429', retry_after => 1033 },
	error => 'too many', ledger => 'failed 429', outbox => '10 0', status => qr/^waiting until .*too many/,
	meanwhile => sub { is(held_for(1033), 't', '429: Retry-After in seconds is obeyed') });
round_of('429 with a date', { kind => '429', retry_after => $date },
	error => 'too many', ledger => 'failed 429', outbox => '10 0', status => qr/^waiting until/,
	meanwhile => sub { is(held_for(0, "'$date'"), 't', '429: Retry-After as a date is obeyed') });

# The two other forms that HTTP has for a date, both from before 1999
foreach my $form ('%A, %d-%b-%y %H:%M:%S GMT', '%a %b %e %H:%M:%S %Y')
{
	my $old_date = strftime($form, @later);

	round_of("429 with a date as $old_date", { kind => '429', retry_after => $old_date },
		error => 'too many', ledger => 'failed 429', outbox => '10 0', status => qr/^waiting until .*too many/,
		meanwhile => sub { is(held_for(0, "'$date'"), 't', "429: Retry-After as $old_date is obeyed") });
}
round_of('429 without Retry-After', { kind => '429', retry_after => undef },
	error => 'too many', ledger => 'failed 429', outbox => '10 0', status => qr/^waiting until/,
	meanwhile => sub { is(held_for(60), 't', '429 without Retry-After: a minute') });

# --- refused by the server as such ------------------------------------------------------

my %pauses = (401 => 'access token', 403 => 'scope', 404 => 'no Events Ingest API', 405 => 'did not arrive as it was sent', 407 => 'the proxy');
round_of($_, { kind => 'status', status => $_ + 0, body => '{"detail": "no"}' },
	error => "HTTP $_: .*$pauses{$_}", ledger => "failed $_", outbox => '10 0', status => qr/^paused: .*$pauses{$_}/)
  foreach sort keys %pauses;
round_of('a redirect', { kind => 'redirect', location => $poisoned->url },
	error => 'HTTP 307: the address redirects', ledger => 'failed 307', outbox => '10 0', status => qr/^paused: .*redirects/);

# Nothing is sent while it is paused; what ends the pause.
sub pause_by_401
{
	my ($what, $fix) = @_;

	$rounds++;
	$polar->fault(kind => '401');
	$node->insert_rows(3, prefix => "round_${rounds}_");
	ok($node->wait_status('^paused: '), "paused, $what");
	my $arrived = $polar->summary->{arrived};
	$node->insert_rows(3, prefix => "round_${rounds}_more_");
	$node->worker_waits;
	is($polar->summary->{arrived}, $arrived, "no request while paused, $what");
	$fix->();
	$polar->wait(arrived => $arrived + 1);
	$node->wait_status('^idle');
	is(outbox('count(*)'), '0', "resumed by $what");
	return;
}

pause_by_401('resume()', sub { $node->safe_psql('postgres', q{SELECT aibilling.resume('polar')}) });
pause_by_401('ALTER SERVER',
	sub { $node->safe_psql('postgres', q{ALTER SERVER polar OPTIONS (SET event_name 'renamed')}) });
$polar->tokens(token => 'renewed');
pause_by_401('a changed token file', sub { $node->write_token($token_file, "renewed\n"); });
$polar->tokens(token => 'renewed', status => 'revoked');
$node->insert_rows(3, prefix => 'revoked_');
ok($node->wait_status('^paused: .*401'), 'a token that is revoked');
$node->write_token($token_file, $polar->token);
$node->wait_status('^idle');
pass('and renewed');

# --- rows that Polar refuses --------------------------------------------------------------

# Requests made for the last batch, and the events each one had.
sub batches
{
	my ($since) = @_;
	my @requests = $polar->requests;
	return map { $_->{events} // '?' } @requests[ $since .. $#requests ];
}

my $arrived = $polar->summary->{arrived};
$polar->fault(kind => 'poison', external_ids => [ 'indexed_7', 'indexed_50' ], status => 422, index => \1);
$node->insert_rows(100, prefix => 'indexed_');
wait_newest("state = 'delivered' AND usage_ids \@> (SELECT max(id) FROM usage)");
is($polar->summary->{arrived} - $arrived, 2, 'poison with an index costs one request more');
is( outbox("count(*) || ' ' || min(state) || ' ' || bool_and(error <> '')"),
	'2 rejected true', 'the named rows are rejected with a reason');
is( $node->safe_psql(
		'postgres', q{SELECT string_agg(external_id, ' ' ORDER BY u.id) FROM usage u JOIN aibilling.outbox o
			ON o.usage_table = 'usage'::regclass AND o.usage_id = u.id}),
	'indexed_7 indexed_50',
	'and no others');
is((grep { $_->{external_id} =~ /^indexed_/ } $polar->events) + 0, 98, 'the rest is delivered');

# Polar lists what either variant of an event lacks: what counts is said of the row's own.
my $reasons = encode_json({ detail => [ map { { type => $_->[2], loc => [ 'body', 'events', $_->[0], @{ $_->[1] } ], msg => $_->[3], input => undef } }
	  [ 0, [ 'EventCreateCustomer', 'customer_id' ], 'missing', 'Field required' ],
	  [ 0, [ 'EventCreateCustomer', 'member_id' ], 'uuid_type', 'of the variant that it is not' ],
	  [ 0, [ 'EventCreateExternalCustomer', 'external_customer_id' ], 'string_type', 'of its own' ],
	  [ 1, [ 'EventCreateCustomer', 'customer_id' ], 'uuid_type', 'of its own' ],
	  [ 1, [ 'EventCreateExternalCustomer', 'external_customer_id' ], 'missing', 'Field required' ],
	  [ 1, [ 'EventCreateExternalCustomer', 'timestamp' ], 'value_error', 'Value error, Timestamp must be in the past.' ] ] });
$polar->fault(kind => 'status', status => 422, body => $reasons);
$node->safe_psql('postgres', q{INSERT INTO usage (external_id, external_customer_id, customer_id, provider_cost)
VALUES ('variant_1', 'c', NULL, 1), ('variant_2', NULL, '7b1f4b2e-5a3c-4b6d-8e9f-0a1b2c3d4e5f', 1), ('variant_3', 'c', NULL, 1)});
$polar->wait_for(sub { grep { $_->{external_id} eq 'variant_3' } $polar->events }, 'the third row');
is( $node->safe_psql('postgres', q{SELECT string_agg(external_id || ' ' || state || ' ' || error, '; ' ORDER BY u.id)
	FROM usage u JOIN aibilling.outbox o ON usage_table = 'usage'::regclass AND usage_id = u.id WHERE external_id ~ 'variant'}),
	'variant_1 rejected external_customer_id: of its own (string_type); variant_2 rejected customer_id: of its own (uuid_type)',
	'a row is refused for what is said of its own variant');
$node->safe_psql('postgres', q{DELETE FROM usage WHERE external_id IN ('variant_1', 'variant_2')});

# What is quoted of an answer has no token in it, one line and an end.
$polar->fault(kind => 'status', status => 422, body => '{"detail": [{"type": "value_error", "loc": ["body", "events", 0, "name"], "msg": "'
	  . 'polar_oat_secretSecret_1 is not welcome, nor polar_at_o_more;\\n caf\\u00e9 \\u0000 no_polar_ice ' . 'x' x 2000 . '"}]}');
$node->insert_rows(1, prefix => 'quoted_');
$node->poll_query_until('postgres', q{SELECT count(*) = 1 FROM aibilling.outbox WHERE state = 'rejected' AND error ~ 'welcome'});
my $quoted = outbox(q{string_agg(error, '') FILTER (WHERE error ~ 'welcome')});
like($quoted, qr/^name: polar_\.\.\. is not welcome, nor polar_\.\.\.;  caf\S+ \? no_polar_ice x+\.\.\. \(value_error\)$/, 'what an answer says');
cmp_ok(length $quoted, '<', 1000, 'is shortened');
$node->safe_psql('postgres', q{DELETE FROM usage WHERE external_id ~ '^quoted_'});

# A request of which every row is refused says so.
$polar->fault(kind => 'poison', external_ids => ['refused_1'], status => 422, index => \1);
$node->insert_rows(1, prefix => 'refused_');
$node->poll_query_until('postgres', q{SELECT state <> 'sending' FROM aibilling.delivery WHERE usage_table = 'usage'::regclass ORDER BY id DESC LIMIT 1});
is($node->safe_psql('postgres', q{SELECT state FROM aibilling.delivery WHERE usage_table = 'usage'::regclass ORDER BY id DESC LIMIT 1}), 'rejected', 'a delivery of which every row is refused is rejected');
$node->safe_psql('postgres', q{DELETE FROM usage WHERE external_id = 'refused_1'});

# Fixed and released.
$polar->reset(keep => ['events']);
is($node->safe_psql('postgres', q{SELECT aibilling.retry('usage')}), '2', 'retry() releases them');
$node->wait_status('^idle');
is((grep { $_->{external_id} =~ /^indexed_/ } $polar->events) + 0, 100, 'and they are delivered');

$polar->fault(kind => 'poison', external_ids => ['blind_37'], status => 422, index => \0);
$arrived = $polar->summary->{arrived};
$node->insert_rows(64, prefix => 'blind_');
$node->poll_query_until('postgres',
	"SELECT count(*) = 1 FROM aibilling.outbox WHERE usage_table = 'usage'::regclass AND state = 'rejected'");
$node->wait_status('^idle');
is((grep { $_->{external_id} =~ /^blind_/ } $polar->events) + 0, 63,
	'poison without an index: the others are delivered');
is( $node->safe_psql(
		'postgres', q{SELECT external_id FROM usage WHERE id = (SELECT usage_id FROM aibilling.outbox
			WHERE usage_table = 'usage'::regclass AND state = 'rejected')}),
	'blind_37',
	'the row is found');
cmp_ok($polar->summary->{arrived} - $arrived, '<=', 1 + 2 * 6, 'by halving');
is($polar->summary->{duplicates},
	$node->ledger("sum(duplicates)", "usage_table = 'usage'::regclass"), 'nothing is sent twice for that');
$node->safe_psql('postgres', q{DELETE FROM usage WHERE external_id = 'blind_37'});
is(outbox('count(*)'), '0', 'a rejected row can be deleted');
$polar->reset(keep => ['events']);

$polar->fault(kind => '413', min_events => 30, times => 'always');
$arrived = $polar->summary->{arrived};
$node->insert_rows(100, prefix => 'large_');
$polar->wait_for(sub { (grep { $_->{external_id} =~ /^large_/ } $polar->events) == 100 }, '413');
$node->wait_status('^idle');
is($polar->summary->{arrived} - $arrived, 3 + 4, '413: 100, then 50 and 50, then four times 25');
is($node->ledger("count(*)", "state <> 'delivered' AND error IS NULL AND usage_table = 'usage'::regclass"),
	'0', 'the ledger accounts for each');
$polar->clear_faults;

# What Polar cannot read is not sent twice in the same way.
$polar->fault(kind => 'status', status => 400, body => '{"detail": "There was an error parsing the body"}');
$arrived = $polar->summary->{arrived};
$node->insert_rows(10, prefix => 'unread_');
$polar->wait_for(sub { (grep { $_->{external_id} =~ /^unread_/ } $polar->events) == 10 }, '400');
$node->wait_status('^idle');
is_deeply([ batches($arrived) ], [ 10, 5, 5 ], '400: the batch is halved');

$polar->fault(kind => '413', times => 'always');
$node->insert_rows(1, prefix => 'single_');
$node->poll_query_until('postgres',
	q{SELECT count(*) = 1 FROM aibilling.outbox WHERE usage_table = 'usage'::regclass AND state = 'rejected' AND error ~ 'too large'});
is(outbox('state'), 'rejected', '413 of a single row rejects it');
$polar->clear_faults;
$node->safe_psql('postgres', q{SELECT aibilling.retry('usage')});
$node->wait_status('^idle');

# --- clocks ---------------------------------------------------------------------------------

$polar->fault(kind => 'clock_skew', seconds => 3600);
$node->safe_psql(
	'postgres', q{INSERT INTO usage (external_id, occurred_at, external_customer_id, provider_cost)
VALUES ('skewed', now(), 'c', 1), ('old', now() - interval '1 day', 'c', 1)});
ok($node->poll_query_until('postgres',
		q{SELECT count(*) = 1 FROM aibilling.outbox WHERE usage_table = 'usage'::regclass AND error ~ 'in the past'
			AND state = 'pending' AND not_before > now() - interval '1 minute'}),
	'a row that is in the future for Polar is held, not rejected') or diag($node->diagnosis);
$polar->wait_for(sub { grep { $_->{external_id} eq 'old' } $polar->events }, 'old row');
ok(!grep({ $_->{external_id} eq 'skewed' } $polar->events), 'the other of its batch is delivered');
$polar->fault(kind => 'clock_skew', seconds => 0);
$polar->wait_for(sub { grep { $_->{external_id} eq 'skewed' } $polar->events }, 'held row');
pass('and the held one once the clocks agree');
$node->wait_status('^idle');

# --- duplicates -------------------------------------------------------------------------------

is($node->ledger('sum(unexpected_duplicates)'), '0', 'all duplicates so far were expected');
is( $polar->ingest(
		[ map { {
			name => 'other', timestamp => '2026-01-01T00:00:00Z', external_id => "foreign_$_",
			external_customer_id => 'other', metadata => {} } } 1 .. 2 ])->{status},
	200, 'another producer uses our external ids');
$node->insert_rows(5, prefix => 'foreign_');
ok($node->wait_status('warning: 2 events were not counted'), 'status warns of them');
is(newest("state || ' ' || inserted || ' ' || duplicates || ' ' || unexpected_duplicates"),
	'delivered 3 2 2', 'the ledger tells them from expected ones');

# --- slow answers ---------------------------------------------------------------------------------

$node->safe_psql('postgres', q{ALTER SERVER polar OPTIONS (SET timeout '3s')});
$polar->fault(kind => 'hang', store => \1);
$polar->fault(kind => 'hang', times => 'always');
$node->insert_rows(100, prefix => 'slow_');
wait_newest("error ~ 'timed out' AND usage_ids \@> (SELECT max(id) FROM usage)");
is(newest("state || ' ' || outcome_unknown"), 'sending true', 'a timeout: the outcome is not known');
$node->safe_psql('postgres', q{ALTER SERVER polar OPTIONS (SET timeout '10min')});
resume_and_settle();
is(newest("state || ' ' || duplicates || ' ' || unexpected_duplicates"),
	'delivered 100 0', 'and it turns out that all was stored');
$node->safe_psql('postgres', q{ALTER SERVER polar OPTIONS (SET timeout '8s')});
$polar->fault(kind => 'slow', delay => 4000, times => 2);
$arrived = $polar->summary->{arrived};
$node->insert_rows(300, prefix => 'smaller_');
$node->wait_status('^idle');
my @sizes = batches($arrived);
is($sizes[0], 100, 'a batch of full size is answered slowly');
cmp_ok($sizes[1], '<=', 50, 'the next is smaller');

# --- requests per minute ----------------------------------------------------------------------------

my $limited = PolarServer->new;
$node->create_server($limited, name => 'limited', batch_size => 1, requests_per_minute => 1);
$node->create_usage_table('few', 'limited');
$node->insert_rows(3, table => 'few', prefix => 'few_');
$limited->wait(requests => 1);
wait_newest("state = 'delivered'", 'few');
$node->restart;
$node->worker_waits;
$node->insert_rows(1, prefix => 'afterwards_');
$polar->wait_for(sub { grep { $_->{external_id} eq 'afterwards_1' } $polar->events }, 'the other server');
$node->worker_waits;
is( $node->safe_psql(
		'postgres', q{SELECT count(*) FROM (SELECT started_at - lag(started_at) OVER (ORDER BY started_at) AS since
	FROM aibilling.delivery WHERE usage_table = 'few'::regclass) d WHERE since < interval '50 seconds'}),
	'0', 'the limit of requests per minute survives a restart');
is( $node->safe_psql(
		'postgres', q{SELECT (SELECT count(*) FROM aibilling.delivery WHERE usage_table = 'few'::regclass)
	+ (SELECT count(*) FROM aibilling.outbox WHERE usage_table = 'few'::regclass)}),
	'3', 'the others wait');
$node->safe_psql('postgres', q{ALTER SERVER limited OPTIONS (SET requests_per_minute '0')});
$limited->wait(events => 3);
pass('a lifted limit is noticed');

# A peer that refuses what is above its limit, in windows that begin with a request, as Polar's do: a tenth
# of a minute's requests at once and the rest spread over it stay below, also when the worker is another.
my $limiter = PolarServer->new;
$limiter->rate_limit(120, 5);
$node->create_server($limiter, name => 'limiter', batch_size => 1, requests_per_minute => 600);
$node->create_usage_table('many', 'limiter');
$node->insert_rows(150, table => 'many', prefix => 'many_');
$limiter->wait(requests => 70);
$node->restart;
$limiter->wait(events => 150);
is($limiter->summary->{status}{429} // 0, 0, 'the limit is kept at any time: no answer is 429');

# --- poison that makes the server fail ------------------------------------------------------------------

$node->insert_rows(20, table => 'bad', prefix => 'good_');
$node->poll_query_until('postgres',
	q{SELECT count(*) = 1 FROM aibilling.outbox WHERE usage_table = 'bad'::regclass AND state = 'rejected'});
is( $node->safe_psql(
		'postgres', q{SELECT external_id FROM bad WHERE id = (SELECT usage_id FROM aibilling.outbox WHERE usage_table = 'bad'::regclass)}),
	'bad_3',
	'a row that makes Polar fail is found by halving');
$poisoned->wait(events => 23);
pass('and the others are delivered');
is($poisoned->summary->{duplicates}, $node->ledger('sum(duplicates)', "usage_table = 'bad'::regclass"),
	'the ledger accounts for duplicates');

$node->stop;
$_->stop foreach $polar, $poisoned, $limited, $limiter;
done_testing();
