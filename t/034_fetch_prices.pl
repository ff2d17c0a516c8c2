# fetch_prices(): what a price service says is in force, once all of it is there; whatever else it
# answers, and whoever asks, the prices in force stay as they are.
use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use AibillingNode;
use PolarServer;
use JSON::PP;
use PostgreSQL::Test::Utils;
use Test::More;

plan skip_all => 'needs python3' unless PolarServer->python;

my $secret = 'narev_secret_token_of_this_test';
my $polar = PolarServer->new(narev_token => $secret);
my $url = $polar->url;
my $json = JSON::PP->new->canonical;
my $node = AibillingNode->new('main', conf => "log_statement = none\n");
my $file = $node->token_file($secret);
my $seen = 0;

# A row of Narev's list.
sub row
{
	my ($model, $prompt, %more) = @_;

	return {
		provider_id => delete $more{provider} // 'acme',
		model_id => $model,
		pricing => { prompt => $prompt, completion => $prompt * 4, request => 0, input_cache_read => 0, discount => 0, %more }
	};
}

# The prices in force and all there is beside them.
sub stored
{
	return $node->safe_psql('postgres', q{
SELECT 'price', p::text FROM aibilling.price p
UNION ALL SELECT 'source', s::text FROM aibilling.price_source s
UNION ALL SELECT 'quarantine', q::text FROM aibilling.price_quarantine q
ORDER BY 1, 2});
}

sub requests_since
{
	my $from = $seen;
	my @requests = $polar->requests(since => $from);

	$seen += @requests;
	return @requests;
}

# Expect an error, and that nothing has changed by it.
sub fails
{
	my ($sql, $words, $what, %options) = @_;
	my $before = stored();
	my $offset = $node->log_offset;
	my ($rc, $out, $err) = $node->psql('postgres', $sql, on_error_stop => 0, %options);

	like($err, $words, $what);
	unlike($err . $out . $node->log_since($offset), qr/\Q$secret\E/, "$what: no token in error or log");
	is(stored(), $before, "$what: the prices in force are unchanged");
	return $err;
}

sub fetched
{
	my ($sql, %options) = @_;

	return $node->safe_psql('postgres', $sql // "SELECT action, count(*) FROM aibilling.fetch_prices('narev') GROUP BY 1 ORDER BY 1",
		%options);
}

$node->safe_psql('postgres', qq{
CREATE SERVER narev FOREIGN DATA WRAPPER polar
	OPTIONS (kind 'prices', format 'narev', url '$url/v1/prices', access_token_file '$file')});
$node->create_server($polar);
$node->create_usage_table;

# ---------------------------------------------------------------------------
# What it brings
# ---------------------------------------------------------------------------

# 230 models: three pages.
my @rows = map { row("m$_", 0.000001) } 1 .. 230;
$polar->prices(\@rows);
is(fetched("SELECT action, count(*) FROM aibilling.fetch_prices('narev', dry_run => true) GROUP BY 1"),
	'added|460', 'a dry run tells what would be new');
is($node->safe_psql('postgres', 'SELECT count(*) FROM aibilling.price'), '0', 'and adds nothing');
requests_since();
is(fetched(), 'added|460', 'two prices of each model are new');
my @requests = requests_since();
is(join(', ', map { "$_->{method} $_->{path} $_->{status} $_->{token}" } @requests),
	'GET /v1/prices 200 valid, GET /v1/prices?page=2 200 valid, GET /v1/prices?page=3 200 valid', 'three pages, each with the token');
is($requests[0]{headers}{Accept}, 'application/json', 'asks for JSON');
is( $node->safe_psql('postgres', q{SELECT count(*), count(DISTINCT model), min(input), max(output), min(valid_from), min(source),
		count(cache_read), count(request) FROM aibilling.price}),
	'230|230|1.000000000|4.000000000|-infinity|narev|0|0', 'every model has its price, for all time; what is not set is unknown');
is($node->safe_psql('postgres', "SELECT priority FROM aibilling.price_source WHERE source = 'narev'"), '60', 'the source has its rank');
my $before = stored();
is(fetched(), '', 'the same again: nothing changes');
is(stored(), $before, 'not a row');

# A price that changes does so from now on.
my $usage = 'INSERT INTO usage (external_id, occurred_at, provider, model, external_customer_id, input_tokens)';
$node->safe_psql('postgres', "$usage VALUES ('old', now(), 'acme', 'm230', 'c', 1000000)");
$rows[229] = row('m230', 0.000002);
splice @rows, 10, 1;
$polar->prices(\@rows);
is(fetched(q{SELECT action, model, price_column, old_price, new_price, valid_from = now() FROM aibilling.fetch_prices('narev')}),
	"changed|m230|input|1|2|t\nchanged|m230|output|4|8|t", 'a price on the last page has changed');
is($node->safe_psql('postgres', "SELECT input, valid_from = '-infinity' FROM aibilling.price WHERE model = 'm230' ORDER BY valid_from"),
	"1.000000000|t\n2.000000000|f", 'there is a new card beside the old one');
$node->safe_psql('postgres', "$usage VALUES ('new', now(), 'acme', 'm230', 'c', 1000000), ('late', now() - interval '1 day', 'acme', 'm230', 'c', 1000000)");
is($node->safe_psql('postgres', 'SELECT external_id, cost_nanos FROM usage ORDER BY id'),
	"old|1000000000\nnew|2000000000\nlate|1000000000", 'usage is priced by the card of its time');
is($node->safe_psql('postgres', "SELECT count(*) FROM aibilling.reprice('usage')"), '0', 'old rows keep their cost for good');
is($node->safe_psql('postgres', "SELECT count(*) FROM aibilling.price WHERE model = 'm11'"), '1', 'a model that has left the list keeps its price');

# What is suspicious waits; the rest goes on.
$polar->prices([ row('m1', 0.000007), row('m2', 0.0000011), row('dear', 5), row('cached', 0.000001, input_cache_read => 0.000002) ]);
is( fetched(q{SELECT action, model, count(*), min(reason) FROM aibilling.fetch_prices('narev') GROUP BY 1, 2 ORDER BY 2}),
	join("\n",
		'quarantined|cached|3|cache_read 2 above input 1',
		'quarantined|dear|2|input 5000000 above 1000; input 5000000 above 1000000; output 20000000 above 1000; output 20000000 above 1000000',
		'quarantined|m1|2|input from 1 to 7, more than 3 times; output from 4 to 28, more than 3 times',
		'changed|m2|2|'),
	'suspicious prices are held back, with the reason');
is($node->safe_psql('postgres', "SELECT model, aibilling.cost_nanos('acme', model, 1000000) FROM unnest(ARRAY['m1', 'm2', 'dear', 'cached']) model"),
	"m1|1000000000\nm2|1100000000\ndear|\ncached|", 'the old price stays in force');
is($node->safe_psql('postgres', "SELECT aibilling.release_price('narev', 'acme', 'm1'); SELECT aibilling.cost_nanos('acme', 'm1', 1000000)"),
	"1\n7000000000", 'until somebody has looked');

# One's own price goes first.
$node->safe_psql('postgres', "INSERT INTO aibilling.price (provider, model, input) VALUES ('acme', 'm3', 9)");
$polar->prices([ row('m3', 0.000002) ]);
is(fetched(), 'changed|2', 'the list changes a price that somebody has set');
is($node->safe_psql('postgres', "SELECT aibilling.cost_nanos('acme', 'm3', 1000000)"), '9000000000', 'which stays in force');

# A fetched price releases what waited for it.
$node->psql('postgres', "$usage VALUES ('waits', now() - interval '1 hour', 'acme', 'coming', 'c', 1000000)");
is($node->safe_psql('postgres', "SELECT unpriced FROM aibilling.status"), '1', 'a row waits for its price');
$polar->prices([ row('coming', 0.000003) ]);
is(fetched(), 'added|2', 'which is fetched');
$node->poll_query_until('postgres', "SELECT (aibilling.usage_status('usage', id)).state = 'delivered' FROM usage WHERE external_id = 'waits'");
is($node->safe_psql('postgres', "SELECT cost_nanos, cost_status FROM usage WHERE external_id = 'waits'"),
	'3000000000|priced', 'the row is priced and delivered by itself');

# Every format comes over the same way, and from a list without a token.
my %lists = (
	'litellm' => '{"anew/a": {"litellm_provider": "anew", "input_cost_per_token": 1e-6}}',
	'models.dev' => '{"anew": {"models": {"b": {"cost": {"input": 1}}}}}',
	'genai-prices' => '[{"id": "anew", "models": [{"id": "c", "prices": {"input_mtok": 1}}]}]',
	'openrouter' => '{"data": [{"id": "anew/d", "pricing": {"prompt": "0.000001"}}]}');
foreach my $format (sort keys %lists)
{
	my $name = $format =~ tr/.-/__/r;

	$polar->file("/$format.json", $lists{$format});
	$node->safe_psql('postgres', "CREATE SERVER $name FOREIGN DATA WRAPPER polar OPTIONS (kind 'prices', format '$format', url '$url/$format.json')");
	requests_since();
	is(fetched("SELECT action, price_column, new_price FROM aibilling.fetch_prices('$name') WHERE reason IS NULL"), 'added|input|1', "format $format");
	is((requests_since())[0]{token}, 'none', "format $format: without a token");
}

# The query of the server's URL stays.
$node->safe_psql('postgres', "ALTER SERVER narev OPTIONS (SET url '$url/v1/prices?page_size=2')");
$polar->prices([ map { row("q$_", 0.000001) } 1 .. 3 ]);
requests_since();
is(fetched(), 'added|6', 'pages of a size of ours');
is(join(' ', map { $_->{path} } requests_since()), '/v1/prices?page_size=2 /v1/prices?page_size=2&page=2', 'asked for with both');
$node->safe_psql('postgres', "ALTER SERVER narev OPTIONS (SET url '$url/v1/prices')");

# ---------------------------------------------------------------------------
# Whatever goes wrong, the old prices stay in force
# ---------------------------------------------------------------------------

my $fetch = "SELECT * FROM aibilling.fetch_prices('narev')";
my $answered = qr/could not fetch prices from server "narev": it answered HTTP status/;
my $not_json = qr/invalid input syntax for type json.*CONTEXT:.*page 1 of the prices of server "narev"/s;
$polar->prices([ map { row("m$_", 0.000002) } 1 .. 230 ]);

foreach my $case (
	[ 401, qr/$answered 401.*unchanged.*HINT:  Check the server's access token/s, kind => '401' ],
	[ 403, qr/$answered 403.*HINT:  Check the server's access token/s, kind => 'status', status => 403, body => '{"error": "Forbidden"}' ],
	[ 404, qr/$answered 404/, kind => 'status', status => 404, body => '{"error": "Not found"}' ],
	[ 429, qr/$answered 429/, kind => '429', retry_after => 3600 ],
	[ 500, qr/$answered 500/, kind => '500' ],
	[ 503, qr/$answered 503/, kind => '503' ],
	[ 'no content', qr/$answered 204/, kind => 'status', status => 204 ],
	[ 'a redirect', qr/$answered 307/, kind => 'redirect', location => "$url/litellm.json" ],
	[ 'a redirect for good', qr/$answered 301/, kind => 'redirect', status => 301, location => '/v1/prices' ],
	[ 'HTML', $not_json, kind => 'garbage', what => 'html' ],
	[ 'text', $not_json, kind => 'garbage', what => 'text' ],
	[ 'nothing', $not_json, kind => 'garbage', what => 'empty' ],
	[ 'half an answer', qr/could not fetch prices from server "narev": reading the answer failed/, kind => 'truncated' ],
	[ 'a broken connection', qr/could not fetch prices from server "narev": waiting for the answer failed/, kind => 'drop_before_read' ],
	[ 'a longer list than can be', qr/could not fetch prices from server "narev": the answer is longer than 67108864 bytes/,
		kind => 'garbage', what => 'huge', bytes => 68 * 1024 * 1024 ],
	[ 'a quote of the token', $not_json, kind => 'status', status => 200, body => "Bearer $secret is not welcome" ])
{
	my ($what, $words, %fault) = @$case;

	$polar->fault(%fault);
	requests_since();
	fails($fetch, $words, $what);
	is(scalar(requests_since()), 1, "$what: one request");
}

# Later pages count as much as the first.
foreach my $case ([ 'an error', qr/$answered 500/, kind => '500' ],
	[ 'garbage', qr/invalid input syntax for type json.*page 3 of the prices of server "narev"/s, kind => 'garbage', what => 'text' ],
	[ 'no list', qr/page 3 of server "narev" has no list of prices/, kind => 'status', status => 200, body => '{"meta": {"total_pages": 3}}' ],
	[ 'a list that is none', qr/page 3 of server "narev" has no list of prices/, kind => 'status', status => 200, body => '{"data": {"a": 1}}' ],
	[ 'a lost answer', qr/reading the answer failed/, kind => 'truncated' ])
{
	my ($what, $words, %fault) = @$case;

	$polar->fault(%fault, after => 2);
	requests_since();
	fails($fetch, $words, "$what on the last page");
	is(scalar(requests_since()), 3, "$what on the last page: after two good ones");
}

# What is JSON and no price list.
my %documents = (
	'no list' => [ '{"meta": {"total": 0}}', qr/catalogue is not in the format narev/ ],
	'a list as such' => [ '[{"provider_id": "acme"}]', qr/catalogue is not in the format narev/ ],
	'null' => [ 'null', qr/catalogue is not in the format narev/ ],
	'a number' => [ '12', qr/catalogue is not in the format narev/ ],
	'an error' => [ '{"error": "out of credit"}', qr/catalogue is not in the format narev/ ],
	'endless pages' => [ '{"data": [], "meta": {"total_pages": 1001}}', qr/server "narev" offers 1001 pages of prices, more than 1000/ ],
	'odd pages' => [ '{"data": [], "meta": {"total_pages": "two"}}', qr/cannot cast jsonb string to type integer.*server "narev"/s ],
	'two documents' => [ '{"data": []} {"data": []}', $not_json ],
	'a zero byte' => [ "{\"data\": []}\0", qr/invalid byte sequence for encoding "UTF8": 0x00.*server "narev"/s ]);
foreach my $what (sort keys %documents)
{
	my ($body, $words) = @{ $documents{$what} };

	$polar->fault(kind => 'status', status => 200, body => $body);
	fails($fetch, $words, $what);
}
$polar->fault(kind => 'status', status => 200, body => '{"data": []}');
is(fetched(), '', 'an empty list changes nothing');

# Prices that cannot be ours: listed, and nothing else happens.
$polar->prices([
		row('text', 0.000001, prompt => 'cheap', completion => JSON::PP::null),
		row('', 0.000001),
		{ model_id => 'no provider', pricing => { prompt => 0.000001 } },
		{ provider_id => 'acme', model_id => 'unpriced', pricing => JSON::PP::null, message => 'no pricing' },
		row('minus', 0.000001, prompt => -0.000001, completion => 0),
		row('more', 0.000001, surprise => 7)
	]);
is( fetched("SELECT action, model, price_column, new_price, reason FROM aibilling.fetch_prices('narev') WHERE action <> 'added'"),
	join("\n",
		'skipped||input||model without a name',
		'skipped||output||model without a name',
		'skipped|minus|input||negative',
		'skipped|more|surprise||not a price that aibilling.price can hold',
		'skipped|text|input||not a number',
		'skipped|no provider|input||model without a name'),
	'what cannot be used is listed');

# Another currency or unit is no price of ours.
$polar->prices([ row('m4', 0.000003, currency => 'EUR'), row('m5', 3, unit => '1M tokens'), row('m6', 3) ]);
is( fetched("SELECT action, model, count(*), min(reason) FROM aibilling.fetch_prices('narev') GROUP BY 1, 2 ORDER BY 2"),
	join("\n", 'skipped|m4|2|in EUR, not in USD', 'skipped|m5|2|by 1M tokens, not by the token',
		'quarantined|m6|2|input 3000000 above 1000; input 3000000 above 1000000; input from 1 to 3000000, more than 3 times; '
		  . 'output 12000000 above 1000; output 12000000 above 1000000; output from 4 to 12000000, more than 3 times'),
	'prices in another currency, by another unit, or that look like it');
is($node->safe_psql('postgres', "SELECT model, input FROM aibilling.price WHERE model IN ('m4', 'm5', 'm6') ORDER BY 1"),
	"m4|1.000000000\nm5|1.000000000\nm6|1.000000000", 'leave the old ones in force');

# The network
$polar->fault(kind => 'hang', times => 'always');
$node->safe_psql('postgres', "ALTER SERVER narev OPTIONS (ADD timeout '200ms')");
fails($fetch, qr/could not fetch prices from server "narev": .* timed out/, 'a timeout');
$polar->clear_faults;
my $closed = PolarServer->new;
my $dead = $closed->url;
$closed->stop;
$node->safe_psql('postgres', "ALTER SERVER narev OPTIONS (SET url '$dead/v1/prices', DROP timeout)");
fails($fetch, qr/could not fetch prices from server "narev": connecting failed/, 'a refused connection');
$node->safe_psql('postgres', "ALTER SERVER narev OPTIONS (SET url '$url/v1/prices')");
$node->write_token($file, "$secret-wrong");
fails($fetch, qr/$answered 401/, 'a wrong token');
unlink $file;
fails($fetch, qr/no access token for server "narev": could not open access token file/, 'no token file');
$node->write_token($file, $secret, 0644);
fails($fetch, qr/no access token for server "narev"/, 'a token file that others can read');
$node->write_token($file, $secret);

# ---------------------------------------------------------------------------
# The caller's transaction
# ---------------------------------------------------------------------------

$polar->prices([ row('tx', 0.000001), row('m4', 0.0000015) ]);
$before = stored();
$node->safe_psql('postgres', "BEGIN; $fetch; ROLLBACK");
is(stored(), $before, 'rolled back: nothing is left');
$node->safe_psql('postgres', "BEGIN; SAVEPOINT s; $fetch; ROLLBACK TO s; COMMIT");
is(stored(), $before, 'rolled back to a savepoint: nothing is left');
is($node->safe_psql('postgres', qq{
BEGIN;
SELECT count(*) FROM aibilling.fetch_prices('narev');
SELECT aibilling.cost_nanos('acme', 'tx', 1000000);
ROLLBACK;
SELECT aibilling.cost_nanos('acme', 'tx', 1000000) IS NULL;}), "4\n1000000000\nt", 'its own transaction prices by it, until it is rolled back');
requests_since();
fails("BEGIN READ ONLY; $fetch", qr/cannot execute fetch_prices\(\) in a read-only transaction/, 'in a read-only transaction');
is(scalar(requests_since()), 0, 'in a read-only transaction: not even asked');
is($node->safe_psql('postgres', "BEGIN READ ONLY; SELECT count(*) FROM aibilling.fetch_prices('narev', dry_run => true)"), '4', 'a dry run may be read-only');
fails('SELECT * FROM aibilling.fetch_prices(NULL)', qr/^$/, 'no server: no prices');

# While the network is waited for, nothing is locked and no transaction id is taken.
sub start_fetch
{
	my ($sql) = @_;
	my $session = $node->background_psql('postgres', on_error_stop => 0);
	my $pid = $session->query_safe('SELECT pg_backend_pid();');

	$session->query_until(qr/begun/, "\\echo begun\n" . ($sql // $fetch) . ";\n\\echo ended\n");
	$polar->wait(hung => 1);
	return ($session, $pid);
}

sub end_fetch
{
	my ($session) = @_;

	$session->query('SELECT 1;');
	my $err = $session->{stderr};
	$session->{stderr} = '';
	return $err;
}

$polar->fault(kind => 'hang', times => 'always');
my ($session, $pid) = start_fetch();
is( $node->safe_psql('postgres', "SELECT backend_xid IS NULL, wait_event_type, (SELECT count(*) FROM pg_locks l
		WHERE l.pid = a.pid AND locktype <> 'virtualxid') FROM pg_stat_activity a WHERE pid = $pid"),
	't|Extension|0', 'while it waits: no lock, no transaction id');
is($node->safe_psql('postgres', "BEGIN; LOCK TABLE aibilling.price IN ACCESS EXCLUSIVE MODE NOWAIT; SELECT 'free'"),
	'free', 'others can write prices meanwhile');
$node->safe_psql('postgres', "INSERT INTO aibilling.price (provider, model, input, output, source) VALUES ('acme', 'tx', 0.5, 4, 'narev')");
$polar->clear_faults;
$polar->release;
is(end_fetch($session), '', 'it ends when the answer comes');
is($node->safe_psql('postgres', "SELECT input, valid_from > now() - interval '1 hour' FROM aibilling.price WHERE model = 'tx' ORDER BY valid_from"),
	"0.500000000|f\n1.000000000|t", 'and compares with the prices of then, not with those of its start');
$session->quit;

# It returns at once when it is told to.
my $unchanged = stored();
foreach my $how ('cancel', 'terminate', 'statement_timeout', 'DROP DATABASE')
{
	$polar->fault(kind => 'hang', times => 'always');
	my $set = $how eq 'statement_timeout' ? 'SET statement_timeout = 2000; ' : '';
	my ($hanging, $hanging_pid) = start_fetch("$set$fetch");
	if ($how eq 'cancel')
	{
		$node->safe_psql('postgres', "SELECT pg_cancel_backend($hanging_pid)");
	}
	elsif ($how eq 'terminate')
	{
		is($node->safe_psql('postgres', "SELECT pg_terminate_backend($hanging_pid, 10000)"), 't', 'terminated while it hangs, it ends');
	}
	elsif ($how eq 'DROP DATABASE')
	{
		# Its barrier asks every backend.
		$node->safe_psql('postgres', 'CREATE DATABASE victim');
		$node->safe_psql('postgres', 'SET statement_timeout = 60000; DROP DATABASE victim');
		pass('DROP DATABASE elsewhere does not wait for it');
		$node->safe_psql('postgres', "SELECT pg_cancel_backend($hanging_pid)");
	}
	if ($how eq 'terminate')
	{
		eval { $hanging->quit };
	}
	else
	{
		like(end_fetch($hanging),
			$how eq 'statement_timeout' ? qr/canceling statement due to statement timeout/ : qr/canceling statement due to user request/,
			"$how: it ends");
		$polar->clear_faults;
		$polar->release;
		is($hanging->query_safe("SELECT count(*) FROM aibilling.fetch_prices('narev', dry_run => true);"), '0', "$how: the session can fetch again")
		  if $how eq 'cancel';
		$hanging->quit;
	}
	$polar->clear_faults;
	$polar->release;
}
is(stored(), $unchanged, 'nothing has changed by those');

# Two at a time: the second waits for the first, and sees what it has stored.
my @both;
my $holder = $node->background_psql('postgres');
$holder->query_safe('BEGIN; LOCK TABLE aibilling.price IN SHARE MODE;');
$polar->prices([ row('tx', 0.0000011) ]);
foreach my $waiting (1, 2)
{
	push @both, $node->background_psql('postgres', on_error_stop => 0);
	$both[-1]->query_until(qr/begun/, "\\echo begun\n$fetch;\n\\echo ended\n");
	$node->poll_query_until('postgres',
		"SELECT count(*) = $waiting FROM pg_locks WHERE relation = 'aibilling.price'::regclass AND NOT granted");
}
$holder->query_safe('COMMIT;');
is(join('', map { end_fetch($_) } @both), '', 'two at a time both succeed');
$_->quit foreach @both, $holder;
is($node->safe_psql('postgres', "SELECT count(*) FROM aibilling.price WHERE model = 'tx' AND input = 1.1"), '1', 'and make one card');

# ---------------------------------------------------------------------------
# Who may
# ---------------------------------------------------------------------------

$node->safe_psql('postgres', qq{
CREATE ROLE stranger LOGIN; CREATE ROLE reader LOGIN; CREATE ROLE importer LOGIN;
CREATE SERVER mapped FOREIGN DATA WRAPPER polar OPTIONS (kind 'prices', format 'narev', url '$url/v1/prices');
GRANT USAGE ON FOREIGN SERVER mapped, narev TO reader, importer;
GRANT INSERT, UPDATE, DELETE ON aibilling.price, aibilling.price_source, aibilling.price_quarantine TO importer;});
$polar->prices([ row('role', 0.000001) ]);
my $mapped = "SELECT action, price_column FROM aibilling.fetch_prices('mapped')";
requests_since();
fails($mapped, qr/permission denied for foreign server mapped/, 'a stranger', extra_params => [ '-U', 'stranger' ]);
fails("SELECT * FROM aibilling.fetch_prices('polar')", qr/server "polar" is not a price service.*kind 'prices'/s, "a server of kind 'polar'");
fails("SELECT * FROM aibilling.fetch_prices('nothing')", qr/server "nothing" does not exist/, 'a server that does not exist');
is(scalar(requests_since()), 0, 'none of these asks anything');

# A token is used for the role that it was given to.
fails($mapped, qr/it answered HTTP status 401/, 'without a mapping there is no token', extra_params => [ '-U', 'reader' ]);
is((requests_since())[0]{token}, 'none', 'and none is sent');
$node->safe_psql('postgres', "CREATE USER MAPPING FOR importer SERVER mapped OPTIONS (access_token '$secret')");
fails($mapped, qr/it answered HTTP status 401/, "another role's mapping", extra_params => [ '-U', 'reader' ]);
is((requests_since())[0]{token}, 'none', "another role's mapping is not used");
is($node->safe_psql('postgres', 'SELECT count(*) FROM pg_user_mappings WHERE umoptions IS NOT NULL', extra_params => [ '-U', 'reader' ]), '0', 'nor seen');
fails("SELECT * FROM aibilling.fetch_prices('narev')", qr/permission denied for table price/, 'a role that may not write prices',
	extra_params => [ '-U', 'reader' ]);
is(fetched("SELECT count(*) FROM aibilling.fetch_prices('narev', true)", extra_params => [ '-U', 'reader' ]), '2', 'it may look');
is(fetched($mapped, extra_params => [ '-U', 'importer' ]), "added|input\nadded|output", 'a role that may, with its own token');
$node->safe_psql('postgres', "CREATE USER MAPPING FOR PUBLIC SERVER mapped OPTIONS (access_token '$secret')");
is(fetched("SELECT count(*) FROM aibilling.fetch_prices('mapped', true)", extra_params => [ '-U', 'reader' ]), '0', "PUBLIC's mapping is for all");

# The price list is no way for functions of others to send requests.
$node->safe_psql('postgres', q{
CREATE TABLE public.indexed (a int);
CREATE FUNCTION public.curious(a int) RETURNS int LANGUAGE plpgsql IMMUTABLE AS
	$$ BEGIN PERFORM aibilling.fetch_prices('mapped'); RETURN a; END $$;
GRANT CREATE ON SCHEMA public TO importer; ALTER TABLE indexed OWNER TO importer; ALTER FUNCTION public.curious(int) OWNER TO importer;
INSERT INTO indexed VALUES (1);});
requests_since();
fails('CREATE INDEX ON indexed (public.curious(a))', qr/cannot fetch prices within security-restricted operation/, 'in an index expression');
is(scalar(requests_since()), 0, 'in an index expression: nothing is asked');

$node->stop;
unlike(slurp_file($node->logfile), qr/\Q$secret\E/, 'the token never was in the log');
done_testing();
