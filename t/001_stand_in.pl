
# Tests of the stand-in for Polar itself: what the other tests prove is worth
# as much as the stand-in is strict.  The statements tested are those of Polar's
# contract; no cluster is needed.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use File::Temp;
use IO::Socket::INET;
use JSON::PP;
use POSIX qw(strftime);
use PolarServer;
use Test::More;
use Time::HiRes;

plan skip_all => 'python3 is not on PATH' unless PolarServer->python;

my $tempdir = File::Temp->newdir;
my $state = "$tempdir/polar.state";
my $polar = PolarServer->new(state => $state);
my $json = JSON::PP->new->utf8->canonical->allow_nonref;
my $uuid = '3b241101-e2bb-4255-8caf-4136c566a962';
my $bearer = 'Bearer ' . $polar->token;

# An event that Polar accepts, with some fields replaced; undef removes one.
sub event
{
	my %event = (
		name => 'llm_usage',
		external_customer_id => 'user_1',
		@_);
	delete @event{ grep { !defined $event{$_} } keys %event };
	return \%event;
}

# The server's answer to one event, as "status type@loc ..." of the errors that
# concern the external variant, or of those without a variant.
sub verdict
{
	my $answer = $polar->ingest(ref $_[0] eq 'HASH' ? [ $_[0] ] : $_[0]);
	my $detail = ref $answer->{json} eq 'HASH' && $answer->{json}{detail};

	return join(
		' ',
		$answer->{status},
		map { "$_->{type}\@" . join('.', @{ $_->{loc} }[ 4 .. $#{ $_->{loc} } ]) }
		  grep { ($_->{loc}[3] // '') eq 'EventCreateExternalCustomer' }
		  ref $detail eq 'ARRAY' ? @$detail : ());
}

sub accepted
{
	my ($event, $what) = @_;
	is(verdict($event), '200', "accepted: $what");
	return;
}

sub refused
{
	my ($event, $errors, $what) = @_;
	is(verdict($event), "422 $errors", "refused: $what");
	return;
}

sub metadata
{
	return event(metadata => {@_});
}

sub cost
{
	return metadata(_cost => { amount => $_[0], currency => 'usd' });
}

sub raw_event
{
	return qq({"events":[{"name":"n","external_customer_id":"c",$_[0]}]});
}

sub stored
{
	return $polar->summary->{stored};
}

#
# The answer to a good batch, and dedupe.
#

my $answer = $polar->ingest([ map { event(external_id => "a$_") } 1 .. 3 ]);
is($answer->{status}, 200, 'a good batch is accepted');
is($answer->{content}, '{"inserted":3,"duplicates":0}', 'and counted');
is($answer->{headers}{'polar-version'}, '2026-04', 'the version is told');
is($answer->{headers}{'cache-control'},
	'private, no-store', 'and nobody may cache the answer');
is($answer->{headers}{'content-type'}, 'application/json', 'it is JSON');

$answer = $polar->ingest([ map { event(external_id => "a$_") } 1 .. 3 ]);
is($answer->{content}, '{"inserted":0,"duplicates":3}',
	'a batch sent again inserts nothing');
$answer = $polar->ingest(
	[
		event(external_id => 'a3', name => 'other'),
		event(external_id => 'b1'),
		event(external_id => 'b1', name => 'second'),
		event(external_id => 'B1'),
		event(external_id => ''),
		event(external_id => ''),
		event(),
		event()
	]);
is($answer->{content}, '{"inserted":5,"duplicates":3}',
	'dedupe goes by the exact external_id, within a batch too; none never collides'
);
my ($b1) = grep { ($_->{external_id} // '') eq 'b1' } $polar->events;
is($b1->{event}{name}, 'llm_usage', 'the first of two duplicates is kept');
is($polar->ingest([])->{content},
	'{"inserted":0,"duplicates":0}', 'an empty batch is fine');

$polar->tokens(token => 'polar_oat_other', organization => 'other');
$answer =
  $polar->ingest([ event(external_id => 'a1') ],
	Authorization => 'Bearer polar_oat_other');
is($answer->{json}{inserted}, 1, 'external_id is unique in an organization');

#
# All or nothing.
#

my $before = stored();
$answer = $polar->ingest(
	[
		event(external_id => 'c1'),
		event(external_id => 'c2', name => undef),
		event(external_id => 'c3'),
		event(external_id => 'c4', timestamp => '2999-01-01T00:00:00Z')
	]);
is($answer->{status}, 422, 'one bad event refuses the batch');
my %blamed = map { $_->{loc}[2] => 1 } @{ $answer->{json}{detail} };
is_deeply([ sort keys %blamed ], [ 1, 3 ], 'all bad events are named');
is(stored(), $before, 'and nothing is stored');

#
# The exact shape of 422.
#

$answer = $polar->ingest([ cost(100000) ]);
my ($of_customer, $of_external) = map {
	{
		type => 'decimal_whole_digits',
		loc => [ 'body', 'events', 0, $_, 'metadata', '_cost', 'amount' ],
		msg =>
		  'Decimal input should have no more than 5 digits before the decimal point',
		input => 100000,
		ctx => { whole_digits => 5 }
	}
} 'EventCreateCustomer', 'EventCreateExternalCustomer';
is_deeply(
	$answer->{json},
	{
		error => 'RequestValidationError',
		detail => [
			$of_customer,
			{
				type => 'missing',
				loc => [
					'body', 'events', 0, 'EventCreateCustomer', 'customer_id'
				],
				msg => 'Field required',
				input => cost(100000)
			},
			$of_external
		]
	},
	'an error comes for both variants, with the noise of the other one');

$answer = $polar->ingest([ metadata(k => '') ]);
is_deeply(
	[
		map { [ $_->{type}, $_->{loc}[-1], $_->{msg} ] }
		  grep { $_->{loc}[3] eq 'EventCreateExternalCustomer' }
		  @{ $answer->{json}{detail} }
	],
	[
		[
			'string_too_short', 'constrained-str',
			'String should have at least 1 character'
		],
		[
			'int_parsing',
			'int',
			'Input should be a valid integer, unable to parse string as an integer'
		],
		[
			'float_parsing',
			'float',
			'Input should be a valid number, unable to parse string as a number'
		],
		[
			'bool_parsing', 'bool',
			'Input should be a valid boolean, unable to interpret input'
		]
	],
	'a bad metadata value is refused as each of four types');

$answer = $polar->ingest([ event(timestamp => '2999-01-01T00:00:00Z') ]);
is_deeply(
	$answer->{json}{detail}[0],
	{
		type => 'value_error',
		loc => [ 'body', 'events', 0, 'EventCreateCustomer', 'timestamp' ],
		msg => 'Value error, Timestamp must be in the past.',
		input => '2999-01-01T00:00:00Z',
		ctx => { error => {} }
	},
	'the shape of an event in the future');

$answer = $polar->ingest('{"events":x}');
is_deeply(
	[ $answer->{status}, $answer->{json} ],
	[
		422,
		{
			error => 'RequestValidationError',
			detail => [
				{
					type => 'json_invalid',
					loc => [ 'body', 10 ],
					msg => 'JSON decode error',
					input => {},
					ctx => { error => 'Expecting value' }
				}
			]
		}
	],
	'the shape of bad JSON: an offset, not an index');

foreach my $case (
	[ '[]', 'body', 'model_attributes_type' ],
	[ '"x"', 'body', 'model_attributes_type' ],
	[ '{}', 'body.events', 'missing' ],
	[ '{"events":null}', 'body.events', 'list_type' ],
	[ '{"events":[null]}', 'body.events.0.EventCreateCustomer',
		'model_attributes_type' ],
	[ '', 'body', 'missing' ])
{
	my ($body, $loc, $type) = @$case;
	my $detail = $polar->ingest($body)->{json}{detail}[0];
	is("$detail->{type} " . join('.', @{ $detail->{loc} }),
		"$type $loc", "the body '$body'");
}

#
# Fields of an event.
#

accepted(event(name => ''), 'an empty name');
accepted(event(name => "\x{1F600}" x 128), 'a name of 128 code points');
refused(event(name => 'x' x 129), 'string_too_long@name', 'a longer name');
refused(event(name => undef), 'missing@name', 'no name');
refused(event(name => 1), 'string_type@name', 'a name that is a number');
refused(event(name => "a\0b"), 'value_error@name', 'NUL in a name');
refused(
	event(external_customer_id => undef),
	'missing@external_customer_id',
	'no identity');
refused(
	event(external_customer_id => 7),
	'string_type@external_customer_id',
	'a customer that is a number');
refused(event(external_id => 7), 'string_type@external_id',
	'an external_id that is a number');
accepted(event(parent_id => 'unknown'), 'a parent that is not there yet');
accepted(event(extra => {}), 'a field that Polar does not know');
accepted(raw_event('"organization_id":null,"external_id":null'),
	'explicit nulls where they are allowed');
refused(raw_event('"timestamp":null'), 'datetime_type@timestamp',
	'a null timestamp');
refused(raw_event('"metadata":null'), 'dict_type@metadata', 'null metadata');

#
# Timestamps.
#

foreach my $timestamp (
	'2024-01-01T00:00:00Z', '2024-01-01T00:00:00.123456789012Z',
	'2024-01-01 00:00:00+00:00', '2024-01-01T00:00:00-0500',
	'2024-01-01T00:00Z', '0001-01-01T00:00:00Z',
	1700000000, '1700000000000')
{
	accepted(event(timestamp => $timestamp), "timestamp $timestamp");
}
foreach my $case (
	[ '2024-01-01 00:00:00+00', 'datetime_from_date_parsing' ],
	[ '2024-01-01T00:00:00', 'timezone_aware' ],
	[ '2024-01-01', 'timezone_aware' ],
	[ '2024-01-01T24:00:00Z', 'datetime_from_date_parsing' ],
	[ '2024-12-31T23:59:60Z', 'datetime_from_date_parsing' ],
	[ 'infinity', 'datetime_from_date_parsing' ],
	[ '10000-01-01T00:00:00Z', 'datetime_from_date_parsing' ],
	[ '0044-03-15 00:00:00+00 BC', 'datetime_from_date_parsing' ])
{
	my ($timestamp, $type) = @$case;
	refused(event(timestamp => $timestamp),
		"$type\@timestamp", "timestamp $timestamp");
}
is(verdict(event(timestamp => '0001-01-01T00:00:00+05:00')),
	'500', 'a timestamp that leaves the calendar breaks the server');

my $soon = strftime('%Y-%m-%dT%H:%M:%SZ', gmtime(time + 20));
refused(event(timestamp => $soon),
	'value_error@timestamp', 'an event a few seconds ahead');
my $now = strftime('%Y-%m-%dT%H:%M:%SZ', gmtime(time - 5));
accepted(event(timestamp => $now), 'an event of a moment ago');
$polar->fault(kind => 'clock_skew', seconds => 60);
refused(event(timestamp => $now), 'value_error@timestamp',
	'the same event when the server is behind');
$polar->clear_faults;

#
# Metadata, _cost and _llm.
#

accepted(metadata(map { ("key_$_" => 'x') } 1 .. 60), '60 metadata keys');
accepted(metadata('k' x 60 => 'x'), 'a key of 60 characters');
is($polar->summary->{documented_limit_violations},
	2, 'but such events are counted');
accepted(metadata(k => "\x{e9}" x 500), 'a text of 500 code points');
refused(
	metadata(k => 'x' x 501),
	join(' ',
		map { "$_->[0]\@metadata.k.$_->[1]" }[ 'string_too_long',
			'constrained-str' ],
		[ 'int_parsing', 'int' ],
		[ 'float_parsing', 'float' ],
		[ 'bool_parsing', 'bool' ]),
	'a text of 501');
foreach my $value (undef, [], {})
{
	refused(
		metadata(k => $value),
		join(' ',
			map { "$_->[0]_type\@metadata.k.$_->[1]" }[ 'string',
				'constrained-str' ],
			[ 'int', 'int' ],
			[ 'float', 'float' ],
			[ 'bool', 'bool' ]),
		'metadata value ' . $json->encode($value));
}
refused(metadata(k => "a\0b"), 'value_error@metadata', 'NUL in metadata');
refused(metadata("a\0b" => 1), 'value_error@metadata', 'NUL in a key');

foreach my $amount ('0', '-5', '0.000000000001', '1e-12', '99999.99999',
	'1.50000000000000000000', ' 1 ', 12345, 0.5)
{
	accepted(cost($amount), "amount '$amount'");
}
foreach my $case (
	[ '100000', 'decimal_whole_digits' ],
	[ '0.0000000000001', 'decimal_max_places' ],
	[ '12345.1234567890123', 'decimal_max_digits' ],
	[ '', 'decimal_parsing' ],
	[ 'NaN', 'finite_number' ],
	[ JSON::PP::true, 'decimal_type' ],
	[ undef, 'decimal_type' ])
{
	my ($amount, $type) = @$case;
	refused(cost($amount), "$type\@metadata._cost.amount",
		'amount ' . $json->encode($amount));
}
refused(
	raw_event(
		'"metadata":{"_cost":{"amount":0.30000000000000004,"currency":"usd"}}'
	),
	'decimal_max_places@metadata._cost.amount',
	'a JSON number with more than 12 decimals');
refused(
	metadata(_cost => { amount => '1', currency => 'USD' }),
	'string_pattern_mismatch@metadata._cost.currency',
	'USD in capitals');
refused(
	metadata(_cost => {}),
	'missing@metadata._cost.amount missing@metadata._cost.currency',
	'an empty _cost');
refused(metadata(_cost => 1), 'dict_type@metadata._cost', 'a plain _cost');

my %llm = (
	vendor => 'openai',
	model => 'gpt-5',
	input_tokens => 1,
	output_tokens => 2,
	total_tokens => 3);
accepted(metadata(_llm => \%llm), 'a complete _llm');
accepted(metadata(_llm => { %llm, input_tokens => '7.0' }),
	'a count that reads as an integer');
accepted(metadata(_llm => { %llm, prompt => undef, response => 'x' x 9999 }),
	'a long response');
refused(
	metadata(_llm => { %llm, input_tokens => 1.5 }),
	'int_from_float@metadata._llm.input_tokens',
	'half a token');
refused(
	metadata(_llm => { %llm, cached_input_tokens => undef }),
	'int_type@metadata._llm.cached_input_tokens',
	'a null count');
refused(
	metadata(
		_llm => {
			vendor => 'v',
			model => 'm',
			inputTokens => 1,
			outputTokens => 1,
			totalTokens => 1
		}),
	join(' ',
		map { "missing\@metadata._llm.$_" }
		  qw(input_tokens output_tokens total_tokens)),
	'camel case');

foreach my $token ('NaN', '-Infinity', '1e999')
{
	is(verdict(raw_event(qq("metadata":{"k":$token}))),
		'500', "$token breaks the server");
}
is(verdict(raw_event('"metadata":{"k":"\ud800"}')),
	'500', 'so does a lone surrogate');
my $huge = join('', map { chr(33 + rand 90) } 1 .. 6000);
is(verdict(event(external_id => $huge)),
	'500', 'and an external_id that no index can hold');
accepted(event(external_id => 'x' x 2000), 'an external_id of 2000 bytes');

#
# Customers.
#

sub by_id
{
	return event(external_customer_id => undef, customer_id => @_);
}

foreach my $form (
	$uuid, uc $uuid, $uuid =~ tr/-//dr, "{$uuid}",
	"urn:uuid:$uuid")
{
	accepted(by_id($form), "customer_id $form");
}
foreach my $case (
	[ '11111111-1111-1111-8111-111111111111', 'uuid_version' ],
	[ '00000000-0000-0000-0000-000000000000', 'uuid_version' ],
	[ '01890a5d-ac96-774b-bcce-b302099a8057', 'uuid_version' ],
	[ 'user_1', 'uuid_parsing' ],
	[ 7, 'uuid_type' ])
{
	my ($id, $type) = @$case;
	my $detail = $polar->ingest([ by_id($id) ])->{json}{detail}[0];
	is($detail->{type}, $type, "refused: customer_id $id");
}

$polar->customers(missing => [$uuid], missing_members => [$uuid]);
my $other = '7c9e6679-7425-40de-944b-e07fc1f90ae7';
$answer = $polar->ingest([ event(), by_id(uc $uuid),
	by_id($other, member_id => $uuid) ]);
is_deeply(
	$answer->{json},
	{
		error => 'PolarRequestValidationError',
		detail => [
			{
				type => 'customer_id',
				loc => [ 'body', 'events', 1, 'customer_id' ],
				msg => 'Customer not found.',
				input => uc $uuid
			},
			{
				type => 'member_id',
				loc => [ 'body', 'events', 2, 'member_id' ],
				msg => 'Member not found.',
				input => $uuid
			}
		]
	},
	'unknown customers and members: no variant in loc');
accepted(event(customer_id => $uuid),
	'both identities: the external one wins, the other is not looked at');
is(($polar->events)[-1]{customer}, 'user_1', 'and is the customer');
$answer =
  $polar->ingest([ event(organization_id => $uuid), event(name => undef) ]);
is($answer->{json}{error}, 'RequestValidationError',
	'the database is not asked before the schema is right');
is($polar->ingest([ event(organization_id => $uuid) ])->{json}{detail}[0]{type},
	'organization_token', 'an organization token sets the organization');

#
# The request.
#

is($polar->request('POST', '/v1/events/ingest/', '{}',
		{ Authorization => $bearer })->{status},
	307, 'a trailing slash is redirected');
is($polar->request('GET', '/v1/events/ingest')->{status}, 405, 'GET is not');
is($polar->request('POST', '/v1/events', '{}')->{status},
	404, 'another path is not there');
$answer = $polar->ingest([ event() ], Authorization => undef);
is($answer->{status}, 401, 'no token');
is($answer->{content}, '{"error":"Unauthorized","detail":"Unauthorized"}',
	'no token: the body');
is($answer->{headers}{'www-authenticate'},
	'Bearer realm="polar"', 'no token: the challenge');
$answer = $polar->ingest([ event() ], Authorization => 'Bearer wrong');
is($answer->{status}, 401, 'an unknown token');
is($answer->{json}{error}, 'invalid_token', 'an unknown token: the body');
$polar->tokens(token => $polar->token, status => 'revoked');
is($polar->ingest([ event() ])->{json}{error},
	'invalid_token', 'a revoked token');
is($polar->ingest('{')->{status},
	401, 'a bad token is found before bad JSON');
$polar->tokens(token => $polar->token, status => 'active');
is($polar->ingest('{', Authorization => undef)->{status},
	422, 'no token is found after it');
$polar->tokens(token => 'polar_oat_read', scopes => ['events:read']);
$answer = $polar->ingest([ event() ], Authorization => 'Bearer polar_oat_read');
is($answer->{status}, 403, 'a token without the scope');
is($answer->{json}{error}, 'insufficient_scope', 'and its body');

my $sent = 0;
$answer = $polar->_http->request(
	'POST',
	$polar->url . '/v1/events/ingest',
	{
		headers => {
			'Authorization' => $bearer,
			'Content-Type' => 'application/json'
		},
		content => sub { $sent++ ? undef : '{"events":[]}' }
	});
is($answer->{status}, 411, 'a chunked body');
is($json->decode($answer->{content})->{error},
	'LengthRequired', 'a chunked body: the error');
$answer = $polar->ingest('{"events":[]}' . ' ' x (10485760 - 13));
is($answer->{status}, 200, 'a body of 10 MiB');
$answer = $polar->ingest('{"events":[]}' . ' ' x (10485761 - 13));
is($answer->{status}, 413, 'a body of one byte more');
is( $answer->{json}{detail},
	'Request body exceeded the maximum allowed size of 10485760 bytes.',
	'too large: the body');
is($polar->ingest('{"events":[]}', 'Content-Encoding' => 'gzip')->{status},
	400, 'a compressed body');
is($polar->ingest("{\"events\":[\"\xff\"]}")->{status},
	400, 'a body that is not UTF-8');
foreach my $type ('text/plain', undef)
{
	my $detail =
	  $polar->ingest('{"events":[]}', 'Content-Type' => $type // '')
	  ->{json}{detail}[0];
	is("$detail->{type} @{$detail->{loc}}",
		'model_attributes_type body',
		'content type ' . ($type // 'missing'));
}
is( $polar->ingest(
		'{"events":[]}', 'Content-Type' => 'application/json; charset=utf-8')
	  ->{status},
	200,
	'a charset is fine');
is($polar->ingest([], 'Polar-Version' => '2026-10')->{status},
	200, 'the next version of the API');
is($polar->ingest([], 'Polar-Version' => '2020-01')->{content},
	'{"detail":"Not Found"}', 'a version that never was');

my $client = HTTP::Tiny->new(proxy => undef, http_proxy => undef);
foreach (1 .. 2)
{
	$client->post(
		$polar->url . '/v1/events/ingest',
		{
			headers => {
				'Authorization' => $bearer,
				'Content-Type' => 'application/json'
			},
			content => '{"events":[]}'
		});
}
my @requests = $polar->requests;
is($requests[-1]{connection}, $requests[-2]{connection},
	'a connection is kept');
is("@{$requests[-1]}{qw(method path events bytes status token outcome)}",
	'POST /v1/events/ingest 0 13 200 valid answered', 'a request is recorded');
unlike($json->encode(\@requests), qr/polar_oat_/, 'but no token ever');

my $socket = IO::Socket::INET->new(
	PeerAddr => '127.0.0.1',
	PeerPort => $polar->port);
$socket->print("POST /v1/events/ingest HTTP/1.1\r\nHost: x\r\n"
	  . "Content-Length: 13\r\nExpect: 100-continue\r\n\r\n");
like(scalar <$socket>, qr/^HTTP\/1\.1 100 /, 'Expect: 100-continue');
close $socket;

#
# Exact sums, and what Polar would keep.
#

$polar->reset;
is(stored(), 0, 'reset forgets');
$polar->ingest(
	[
		cost('0.000000000001'), cost('99999.99999'),
		cost('12345.123456789012'), metadata(k => 1)
	]);
is($polar->summary->{cost_amount},
	'112345.123446789013', 'costs are summed to the last digit');
is_deeply(
	$polar->summary->{by_customer}{user_1},
	{ events => 4, cost_amount => '112345.123446789013' },
	'and by customer');
$polar->ingest([ cost('99999.999999999999') ]);
is(($polar->events)[-1]{cost_amount_kept},
	100000, 'Polar keeps a double, which the stand-in tells');
is(($polar->events)[-1]{cost_amount},
	'99999.999999999999', 'beside what was sent');
$polar->ingest(raw_event(
		'"metadata":{"x":0.10,"_cost":{"amount":0.10,"currency":"usd"}}'));
is(($polar->events)[-1]{cost_amount}, '0.10', 'a number keeps its digits too');
is(scalar($polar->events(since => 4)), 2, 'events can be read piecemeal');

#
# Faults.
#

$polar->reset;

my $serial = 0;

# The answer to a fresh event, and how many events that stored.
sub after_fault
{
	my $stored = stored();
	my $answer = $polar->ingest([ event(external_id => 'f' . ++$serial) ]);
	return ($answer, stored() - $stored);
}

sub fault_is
{
	my ($fault, $status, $stored, $what) = @_;
	$polar->fault(%$fault);
	my ($answer, $n) = after_fault();
	is("$answer->{status} $n", "$status $stored", $what);
	return $answer;
}

foreach my $status (401, 413, 422, 429, 500, 502, 503, 504)
{
	fault_is({ kind => $status }, $status, 0, "fault $status");
}
is((after_fault())[0]{status}, 200, 'a fault is over after its times');
$answer = fault_is(
	{
		kind => 'status',
		status => 418,
		body => { teapot => 1 },
		headers => { 'X-Tea' => 'green' }
	},
	418, 0, 'any status');
is("$answer->{content} $answer->{headers}{'x-tea'}",
	'{"teapot":1} green', 'with body and headers');
$answer = fault_is({ kind => 429, retry_after => 7 }, 429, 0, 'too many');
is($answer->{content}, '', 'too many: an empty body');
is($answer->{headers}{'retry-after'}, 7, 'and when to try again');
$answer = fault_is(
	{ kind => 429, retry_after => 'Wed, 21 Oct 2026 07:28:00 GMT' },
	429, 0, 'with a date');
is( $answer->{headers}{'retry-after'},
	'Wed, 21 Oct 2026 07:28:00 GMT',
	'the date is passed on');
$answer = fault_is({ kind => 429, retry_after => undef }, 429, 0, 'with none');
ok(!exists $answer->{headers}{'retry-after'}, 'and no header');
$answer = fault_is({ kind => 422, index => [ 0, 5 ] }, 422, 0, 'blame');
is_deeply([ map { $_->{loc}[2] } @{ $answer->{json}{detail} } ],
	[ 0, 5 ], 'the events chosen');
$answer = fault_is({ kind => 422 }, 422, 0, 'blame without an index');
is_deeply($answer->{json}{detail}[0]{loc}, ['body'], 'has none');

fault_is({ kind => 'drop_before_read' }, 599, 0, 'dropped before reading');
fault_is({ kind => 'drop_after_store' }, 599, 1, 'dropped after storing');
is(($polar->requests)[-1]{outcome}, 'dropped', 'which is recorded');
$answer =
  $polar->ingest([ event(external_id => "f$serial"), event() ]);
is($answer->{content}, '{"inserted":1,"duplicates":1}',
	'the event whose answer was lost is a duplicate');
fault_is({ kind => 'truncated' }, 599, 1, 'a truncated answer');
$answer = fault_is({ kind => 'redirect', location => 'http://127.0.0.1:1/' },
	307, 0, 'a redirect');
is($answer->{headers}{location}, 'http://127.0.0.1:1/', 'to where it says');
foreach my $case (
	[ 'html', qr/^<!DOCTYPE/, 0 ],
	[ 'text', qr/^ok$/, 0 ],
	[ 'empty', qr/^$/, 0 ],
	[ 'wrong_counts', qr/^\{"inserted":2,"duplicates":0\}$/, 1 ],
	[ 'content_type', qr/^\{"inserted":1,"duplicates":0\}$/, 1 ])
{
	my ($what, $pattern, $stored) = @$case;
	$answer = fault_is({ kind => 'garbage', what => $what },
		200, $stored, "garbage: $what");
	like($answer->{content}, $pattern, "$what: the body");
}
$answer = fault_is({ kind => 'garbage', what => 'huge', bytes => 3_000_000 },
	200, 0, 'garbage: huge');
is(length $answer->{content}, 3_000_000, 'as large as it says');
is($polar->request('POST', '/_test/fault', '{"kind":"nonsense"}')->{status},
	400, 'an unknown fault is refused');

foreach my $kind ('slow', 'slow_read')
{
	my $start = Time::HiRes::time();
	fault_is({ kind => $kind, delay => 200 }, 200, 1, $kind);
	cmp_ok(Time::HiRes::time() - $start, '>=', 0.2, "$kind takes its time");
}

# A hanging request, watched from here while it hangs.
sub raw_request
{
	my ($id) = @_;
	my $body = $json->encode({ events => [ event(external_id => $id) ] });
	my $socket = IO::Socket::INET->new(
		PeerAddr => '127.0.0.1',
		PeerPort => $polar->port);

	$socket->print("POST /v1/events/ingest HTTP/1.1\r\nHost: x\r\n"
		  . "Authorization: $bearer\r\nContent-Type: application/json\r\n"
		  . 'Content-Length: '
		  . length($body)
		  . "\r\n\r\n$body");
	return $socket;
}

$polar->fault(kind => 'hang');
$before = stored();
$socket = raw_request('hang1');
is($polar->wait(hung => 1)->{stored}, $before, 'a hanging request');
$polar->release;
like(scalar <$socket>, qr/ 200 /, 'is answered when released');
is(stored(), $before + 1, 'and then stored');
close $socket;

$polar->fault(kind => 'hang', store => JSON::PP::true);
$socket = raw_request('hang2');
is($polar->wait(hung => 1)->{stored}, $before + 2, 'stored before it hangs');
my $count = $polar->summary->{requests};
close $socket;
$polar->wait(requests => $count + 1);
is(($polar->requests)[-1]{outcome},
	'client_closed', 'a client that gives up is noticed');
is($polar->summary->{hung}, 0, 'and no longer hangs');

$polar->fault(kind => 500, after => 1, times => 2);
is(join(' ', map { (after_fault())[0]{status} } 1 .. 4),
	'200 500 500 200', 'a fault can wait, and last');
$polar->fault(kind => 500, times => 'always');
$polar->fault(kind => 503);
is(join(' ', map { (after_fault())[0]{status} } 1 .. 3),
	'500 500 500', 'or stay for ever');
$polar->clear_faults;
$polar->fault(kind => 500, probability => 0);
is((after_fault())[0]{status}, 200, 'or be improbable');
$polar->clear_faults;
$polar->fault(kind => 413, min_events => 2, times => 'always');
is((after_fault())[0]{status}, 200, 'a fault of large batches spares small ones');
is($polar->ingest([ event(), event() ])->{status}, 413, 'and hits large ones');
$polar->clear_faults;

$polar->fault(kind => 'poison', external_ids => ['p1']);
$before = stored();
is( $polar->ingest([ event(external_id => 'p0'), event(external_id => 'p1') ])
	  ->{status},
	500,
	'poison refuses its batch, without saying why');
is(stored(), $before, 'all of it');
is($polar->ingest([ event(external_id => 'p0') ])->{status},
	200, 'and no other');
$polar->clear_faults;
$polar->fault(kind => 'poison', external_ids => ['p1'], status => 422);
is( $polar->ingest([ event(), event(external_id => 'p1') ])
	  ->{json}{detail}[0]{loc}[2],
	1,
	'poison with an index');
$polar->clear_faults;

#
# The rate limit.
#

$polar->rate_limit(2, 60);
$polar->tokens(token => 'polar_oat_second');
is(join(' ', map { $polar->ingest([])->{status} } 1 .. 2),
	'200 200', 'up to the limit');
$answer = $polar->ingest([], Authorization => 'Bearer polar_oat_second');
is("$answer->{status} '$answer->{content}' $answer->{headers}{'retry-after'}",
	"429 '' 60", 'one more, with another token of the organization');
is($polar->ingest([], Authorization => 'Bearer unknown')->{status},
	401, 'others have limits of their own');
$polar->rate_limit(undef);

#
# Memory across a crash.
#

$polar->reset;
$polar->ingest([ map { event(external_id => "s$_", cost('0.10')->%{metadata}) }
	  1 .. 3 ]);
$polar->kill;
open(my $file, '>>', $state) or die "could not open $state: $!";
print $file '{"organization": "test", "ti';
close $file;
$polar->start;
is(stored(), 3, 'what was stored survives a crash');
is($polar->summary->{cost_amount}, '0.30', 'to the digit');
$answer = $polar->ingest([ map { event(external_id => "s$_") } 3 .. 5 ]);
is($answer->{content}, '{"inserted":2,"duplicates":1}', 'and so does dedupe');
$polar->restart;
is(stored(), 5, 'a line cut short does no harm');

#
# Waiting.
#

my $calls = 0;
ok($polar->wait_for(sub { ++$calls > 2 }, 'the third call'), 'wait_for');
{
	local $ENV{PG_TEST_TIMEOUT_DEFAULT} = 0.2;
	local $PolarServer::is_test = 0;
	ok(!eval { $polar->wait_for(sub { 0 }, 'nothing'); 1 },
		'wait_for ends at the timeout');
	ok(!eval { $polar->wait(events => 1_000_000); 1 }, 'and so does wait');
}

#
# Narev.
#

$polar->prices(
	[
		map {
			{
				provider_id => 'openai',
				model_id => "m$_",
				pricing => { prompt => '0.000001' }
			}
		} 1 .. 250
	]);
my %narev = (Authorization => 'Bearer ' . $polar->narev_token);
is($polar->request('GET', '/v1/prices')->{status},
	401, 'prices need a token');
$answer = $polar->request('GET', '/v1/prices', undef, {%narev});
is_deeply(
	$answer->{json}{meta},
	{ page => 1, page_size => 100, total => 250, total_pages => 3 },
	'prices come in pages');
$answer = $polar->request('GET', '/v1/prices?page=3&page_size=100',
	undef, {%narev});
is(scalar @{ $answer->{json}{data} }, 50, 'the last page');
$answer =
  $polar->request('GET', '/v1/prices?provider_id=openai&model_id=m7',
	undef, {%narev});
is(join(' ', map { $_->{model_id} } @{ $answer->{json}{data} }),
	'm7', 'one model');
$polar->request('POST', '/_test/prices',
	'[{"model_id":"x","pricing":{"prompt":1.10e-06}}]');
like($polar->request('GET', '/v1/prices', undef, {%narev})->{content},
	qr/"prompt":0\.00000110\b/, 'prices keep their digits');
$polar->fault(kind => 503, path => '/v1/prices');
is($polar->ingest([])->{status}, 200, 'a fault can concern one path');
is($polar->request('GET', '/v1/prices', undef, {%narev})->{status},
	503, 'and no other');
$polar->file('/prices.json', '{"a":1}');
is($polar->request('GET', '/prices.json')->{content},
	'{"a":1}', 'any other file can be served');

#
# The end.
#

my $port = $polar->port;
$polar->stop;
ok( !IO::Socket::INET->new(PeerAddr => '127.0.0.1', PeerPort => $port),
	'it ends when its input is closed');

SKIP:
{
	my @pem = map { "$tempdir/$_.pem" } qw(cert key);

	skip 'openssl is not there', 3
	  if system(
		"openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost"
		  . " -addext subjectAltName=IP:127.0.0.1"
		  . " -out $pem[0] -keyout $pem[1] 2>/dev/null") != 0;
	$polar = PolarServer->new(tls_cert => $pem[0], tls_key => $pem[1]);
	like($polar->url, qr/^https:/, 'with a certificate, it speaks TLS');
	my $port = $polar->port;
	my $client = "openssl s_client -connect 127.0.0.1:$port -CAfile $pem[0]";
	my $greeting = qx{$client </dev/null 2>&1};
	like($greeting, qr/Verify return code: 0/, 'under that certificate');
	is(stored(), 0, 'and is driven without TLS');
	$polar->stop;
}

$polar = PolarServer->new(sink => 1);
$polar->ingest('{"events":[{"external_id":"1"},{"external_id":"1"},{}]}');
is(stored(), 2, 'a sink only counts');
is($polar->summary->{duplicates}, 1, 'and dedupes');

done_testing();
