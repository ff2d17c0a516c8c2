# Rows without a price: held, listed, and priced and delivered by themselves once their price comes,
# whichever way it comes; by the worker, or by sync() where there is none.
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
my $columns = 'external_id, provider, model, external_customer_id, input_tokens';

# The database "postgres" has a worker, "plain" has none.
$node->safe_psql('postgres', 'CREATE DATABASE plain');
my %token = map { $_ => $node->token_file($polar->token) } 'postgres', 'plain';
foreach my $db ('postgres', 'plain')
{
	$node->safe_psql('plain', 'CREATE EXTENSION aibilling_polar') if $db eq 'plain';
	$node->safe_psql($db, "CREATE SERVER polar FOREIGN DATA WRAPPER polar OPTIONS (url '"
		  . $polar->url
		  . "', event_name 'llm_usage', access_token_file '$token{$db}');
		SELECT aibilling.create_usage_table('usage', 'polar')");
}

# Run SQL in one session; returns what it said beside its output.
sub said
{
	my ($db, $sql) = @_;
	my ($rc, $out, $err) = $node->psql($db, $sql);

	is($rc, 0, 'no error') || diag($err);
	return $err;
}

sub place
{
	my ($db, $external_id) = @_;

	return $node->safe_psql($db, "SELECT state FROM usage u, aibilling.usage_status('usage', u.id) WHERE external_id = '$external_id'");
}

sub wait_place
{
	my ($db, $external_id, $state) = @_;

	return $node->poll_query_until($db,
		"SELECT state = '$state' FROM usage u, aibilling.usage_status('usage', u.id) WHERE external_id = '$external_id'");
}

sub listed
{
	my ($db) = @_;

	return $node->safe_psql($db, 'SELECT reason, rows FROM aibilling.unpriced ORDER BY reason COLLATE "C"');
}

sub event
{
	my ($external_id) = @_;

	my ($found) = grep { $_->{event}{external_id} eq $external_id } $polar->events;
	return $found->{event};
}

# ---------------------------------------------------------------------------
# Held, with one warning a model and session, and listed
# ---------------------------------------------------------------------------

my $warnings = said('postgres', "
INSERT INTO usage ($columns) VALUES ('a1', 'acme', 'a', 'c', 1);
INSERT INTO usage ($columns) VALUES ('a2', 'acme', 'a', 'c', 2), ('b1', 'acme', 'b', 'c', 1);
INSERT INTO usage ($columns) SELECT 'many' || i, 'acme', CASE WHEN i % 2 = 0 THEN 'a' ELSE 'b' END, 'c', i FROM generate_series(1, 10) i;");
my $reason = sub { 'no price for this model (provider "acme", model "' . shift() . '", service tier "standard")' };
is(scalar(() = $warnings =~ /WARNING/g), 2, 'two models: two warnings, however many rows');
like($warnings, qr/WARNING:  usage is held until it can be priced: \Q@{[$reason->($_)]}\E/, "a warning names model $_") foreach 'a', 'b';
$warnings = said('postgres', "INSERT INTO usage ($columns) VALUES ('a3', 'acme', 'a', 'c', 3), ('a4', 'acme', 'a', 'c', 4)");
is(scalar(() = $warnings =~ /WARNING/g), 1, 'another session is warned too');
is(listed('postgres'), $reason->('a') . "|9\n" . $reason->('b') . '|6', 'listed by model');
is($node->safe_psql('postgres', 'SELECT pending, unpriced, rejected FROM aibilling.status'), '0|15|0', 'counted in status');
like($node->status, qr/; 15 rows wait for a price \(aibilling\.unpriced\): no price for this model \(provider "acme", model "a".*, no price for this model \(provider "acme", model "b"/,
	'and named there');
is($node->safe_psql('postgres', "SELECT count(*), min(cost_status), count(cost_nanos) FROM usage"), '15|unpriced|0', 'the rows have no cost');
is($polar->summary->{stored}, 0, 'nothing is sent');

# A price that never comes to be releases nothing.  Without a worker, nobody looks until sync().
$node->worker_waits;
$node->safe_psql('postgres', "BEGIN; INSERT INTO aibilling.price (provider, model, input) VALUES ('acme', 'a', 1); ROLLBACK");
$node->safe_psql('postgres', "INSERT INTO aibilling.price (provider, model, input) VALUES ('acme', 'b', 1)");
wait_place('postgres', 'many9', 'delivered');
is(listed('postgres'), $reason->('a') . '|9', 'the price of b releases b');
is($node->safe_psql('postgres', "SELECT count(*), min(cost_nanos), max(cost_nanos), min(cost_status) FROM usage WHERE model = 'b'"),
	'6|1000|9000|priced', 'each row at its cost');
$node->safe_psql('postgres', "INSERT INTO aibilling.price (provider, model, input) VALUES ('acme', 'a', 2)");
$node->poll_query_until('postgres', "SELECT delivered = 15 AND unpriced = 0 FROM aibilling.status");
unlike($node->status, qr/wait for a price/, 'none waits any more');
is(event('a4')->{metadata}{_cost}{amount}, '0.0008', 'the event has the cost');

# ---------------------------------------------------------------------------
# Whichever way the price comes
# ---------------------------------------------------------------------------

my %ways = (
	price => [ 'standard', "INSERT INTO aibilling.price (provider, model, input) VALUES ('way', 'price', 1)" ],
	update => [ 'standard', "UPDATE aibilling.price SET input = 1 WHERE model = 'update'" ],
	alias => [ 'standard', "INSERT INTO aibilling.model_alias (provider, pattern, to_provider, to_model) VALUES ('way', 'alias', 'acme', 'b')" ],
	glob => [ 'standard', "INSERT INTO aibilling.model_alias (provider, kind, pattern, to_provider, to_model) VALUES ('way', 'glob', 'gl*', 'acme', 'b')" ],
	rule => [ 'slow', "INSERT INTO aibilling.service_tier_rule (provider, service_tier, multiplier) VALUES ('way', 'slow', 0.1)" ],
	import => [ 'standard', q{SELECT count(*) FROM aibilling.import_prices('{"way/import": {"litellm_provider": "way", "input_cost_per_token": 1e-6}}', 'litellm', false)} ],
	release => [ 'standard', q{SELECT count(*) FROM aibilling.import_prices('{"way/release": {"litellm_provider": "way", "input_cost_per_token": 1}}', 'litellm', false);
		UPDATE aibilling.price_quarantine SET input = 1 WHERE model = 'release'; SELECT aibilling.release_price('litellm', 'way', 'release')} ],
	'gpt-5' => [ 'standard', 'SELECT models > 1000 FROM aibilling.load_bundled_prices()' ]);

foreach my $way (sort keys %ways)
{
	my ($tier, $sql) = @{ $ways{$way} };
	my $provider = $way eq 'gpt-5' ? 'openai' : 'way';
	my $insert = "INSERT INTO usage ($columns, service_tier) VALUES ('%s', '$provider', '$way', 'c', 1000000, '$tier')";
	my $card = $way eq 'update' ? "INSERT INTO aibilling.price (provider, model, output) VALUES ('way', 'update', 1);"
	  : $way eq 'rule' ? "INSERT INTO aibilling.price (provider, model, input) VALUES ('way', 'rule', 10);" : '';
	$card .= "INSERT INTO aibilling.price (provider, model, input) VALUES ('acme', 'b', 1);" if $way =~ /^(alias|glob)$/;

	# Without a worker: not in the session of the price, nor in another, until sync() is called.
	$node->psql('plain', $card . sprintf($insert, "plain-$way"));
	is(place('plain', "plain-$way"), 'unpriced', "$way: waits");
	is( $node->safe_psql('plain', "$sql; SELECT (aibilling.usage_status('usage', max(id))).state, count(cost_nanos) FROM usage WHERE external_id = 'plain-$way'")
		  =~ s/.*\n//rs,
		'unpriced|0', "$way: not released in the session that brings the price");
	is(place('plain', "plain-$way"), 'unpriced', "$way: nor by itself where there is no worker");
	$node->safe_psql('plain', 'CALL aibilling.sync()');
	is(place('plain', "plain-$way"), 'delivered', "$way: sync() prices and delivers it");
	is($node->safe_psql('plain', "SELECT cost_nanos, cost_status FROM usage WHERE external_id = 'plain-$way'"),
		($way eq 'gpt-5' ? '1250000000' : '1000000000') . '|priced', "$way: at its cost");
	$node->safe_psql('plain', "DELETE FROM aibilling.price WHERE provider = 'acme'");

	# With a worker: by itself.
	$card = '' if $way =~ /^(alias|glob)$/;
	$node->psql('postgres', $card . sprintf($insert, "worker-$way"));
	is(place('postgres', "worker-$way"), 'unpriced', "$way: waits where there is a worker, too");
	$node->worker_waits;
	$node->safe_psql('postgres', $sql);
	ok(wait_place('postgres', "worker-$way", 'delivered'), "$way: the worker prices and delivers it by itself");
}

# sync() where a worker runs returns when that has looked at the prices.
$node->psql('postgres', "INSERT INTO usage ($columns) VALUES ('both', 'acme', 'both', 'c', 1000)");
$node->safe_psql('postgres', "INSERT INTO aibilling.price (provider, model, input) VALUES ('acme', 'both', 1)");
$node->safe_psql('postgres', 'CALL aibilling.sync()');
is(place('postgres', 'both'), 'delivered', 'sync() with a worker delivers what has its price');

# The price of the time when it happened counts, not that of its arrival.
$node->psql('postgres', "INSERT INTO usage ($columns, occurred_at) VALUES ('then', 'acme', 'dated', 'c', 1000, '2026-01-15'), ('before', 'acme', 'dated', 'c', 1000, '2025-01-15')");
$node->safe_psql('postgres', "INSERT INTO aibilling.price (provider, model, input, valid_from) VALUES ('acme', 'dated', 1, '2026-01-01'), ('acme', 'dated', 2, '2026-02-01')");
wait_place('postgres', 'then', 'delivered');
is($node->safe_psql('postgres', "SELECT cost_nanos FROM usage WHERE external_id = 'then'"), '1000000', 'at the price of its time');
is(listed('postgres'), 'no price for this time (provider "acme", model "dated", service tier "standard")|1', 'what is older waits, and says why');
$node->safe_psql('postgres', "DELETE FROM usage WHERE external_id = 'before'");

# ---------------------------------------------------------------------------
# Incomplete rows likewise
# ---------------------------------------------------------------------------

$warnings = said('postgres', "
INSERT INTO usage ($columns, web_search_count, cache_read_tokens, units)
	VALUES ('part', 'acme', 'part', 'c', 1000, 2, 10, '{\"image\": 1}');
INSERT INTO aibilling.price (provider, model, input) VALUES ('acme', 'part', 1);
INSERT INTO usage ($columns, web_search_count, cache_read_tokens, units)
	VALUES ('parts', 'acme', 'part', 'c', 1000, 2, 10, '{\"image\": 1}');");
my $parts = 'no price for %s (provider "acme", model "part", service tier "standard")';
my $missing = sprintf($parts, 'cache_read, web_search, image');
is(scalar(() = $warnings =~ /WARNING/g), 2, 'a model without a price, then with half of one: two warnings');
like($warnings, qr/\Q$missing\E/, 'which name what is missing');
is($node->safe_psql('postgres', "SELECT cost_status FROM usage WHERE external_id LIKE 'part%' ORDER BY id"), "unpriced\nincomplete", 'unpriced, and incomplete');
ok($node->poll_query_until('postgres', "SELECT count(*) = 1 AND min(rows) = 2 FROM aibilling.unpriced WHERE reason = '$missing'"),
	'both are listed by what they lack now');
$node->safe_psql('postgres', "UPDATE aibilling.price SET cache_read = 0.1, web_search = 0.01 WHERE model = 'part'");
$missing = sprintf($parts, 'image');
ok($node->poll_query_until('postgres', "SELECT count(*) = 1 AND min(rows) = 2 FROM aibilling.unpriced WHERE reason = '$missing'"), 'by less when there is more');
$node->safe_psql('postgres', "UPDATE aibilling.price SET units = '{\"image\": 0.04}' WHERE model = 'part'");
wait_place('postgres', $_, 'delivered') foreach 'part', 'parts';
is($node->safe_psql('postgres', "SELECT cost_nanos, cost_status FROM usage WHERE external_id LIKE 'part%'"), "60991000|priced\n60991000|priced", 'and released when all is there');

# A price that makes a cost beyond cost_nanos holds up nobody else.
$node->psql('postgres', "INSERT INTO usage ($columns) VALUES ('absurd', 'acme', 'absurd', 'c', 9000000000000000)");
$node->safe_psql('postgres', "INSERT INTO aibilling.price (provider, model, input) VALUES ('acme', 'absurd', 999999999)");
$node->safe_psql('postgres', "INSERT INTO usage ($columns) VALUES ('after', 'acme', 'both', 'c', 1)");
ok(wait_place('postgres', 'after', 'delivered'), 'others are delivered');
is(listed('postgres'), 'no possible price: the cost is beyond the range of cost_nanos (provider "acme", model "absurd")|1',
	'the row waits for another price, and says why');
unlike($node->status, qr/blocked/, 'the table goes on');
$node->safe_psql('postgres', "UPDATE aibilling.price SET input = 0.000000001 WHERE model = 'absurd'");
ok(wait_place('postgres', 'absurd', 'delivered'), 'and is delivered when the price is corrected');

# ---------------------------------------------------------------------------
# The way out: what the warning says is typed, with a figure, and all is priced
# ---------------------------------------------------------------------------

# The statement of a hint, with figures.
sub statement_of
{
	my ($said) = @_;

	my ($statement) = $said =~ /HINT: .*?(SELECT \* FROM aibilling\.set_price\(.*?\);)/;
	return ($statement // 'SELECT 1/0') =~ s/\?/3/gr;
}

$node->safe_psql('postgres', "INSERT INTO aibilling.price (provider, model, source, input, output) VALUES ('acme', 'known-1', 'bundled', 1, 2)");
$node->safe_psql('postgres', "INSERT INTO aibilling.price (provider, model, source, context_above, input) VALUES ('acme', 'known-1', 'bundled', 5000, 4)");

# A new model: rows of all times wait, and are priced by one statement.
$warnings = said('postgres', "INSERT INTO usage ($columns, output_tokens, occurred_at) VALUES
	('new', 'acme', 'brand-new', 'c', 1000, 100, '2026-03-01'), ('new, older', 'acme', 'brand-new', 'c', 1000, 100, '2026-01-01')");
unlike($warnings, qr/Perhaps/, 'a new model is like no other');
like($warnings, qr/set_price\('acme', 'brand-new', input => \?, output => \?, valid_from => '-infinity'\);/, 'the hint leaves the figures open');
$node->safe_psql('postgres', statement_of($warnings));
ok(wait_place('postgres', $_, 'delivered'), "$_: priced and delivered") foreach 'new', 'new, older';
is($node->safe_psql('postgres', "SELECT cost_nanos FROM usage WHERE model = 'brand-new'"), "3300000\n3300000", 'at the price that was typed');

# A misspelt one: the hint names what was meant.
$warnings = said('postgres', "INSERT INTO usage ($columns) VALUES ('misspelt', 'acme', 'knwon-1', 'c', 1000)");
like($warnings, qr/WARNING: .*perhaps you meant model "known-1"\nHINT:  Perhaps you meant model "known-1": correct the row/, 'what was meant by the model');
is(listed('postgres'), 'no price for this model (provider "acme", model "knwon-1", service tier "standard"); perhaps you meant model "known-1"|1', 'the list says so, too');
$node->safe_psql('postgres', "UPDATE usage SET model = 'known-1' WHERE external_id = 'misspelt'");
ok(wait_place('postgres', 'misspelt', 'delivered'), 'corrected, it is priced');
like(said('postgres', "INSERT INTO usage ($columns) VALUES ('mistaken', 'acmee', 'known-1', 'c', 1000); DELETE FROM usage WHERE external_id = 'mistaken'"),
	qr/HINT:  Perhaps you meant provider "acme"/, 'what was meant by the provider');

# A reply or a row without a name.
$warnings = said('postgres', q{INSERT INTO usage (external_id, provider, external_customer_id, raw_usage, usage_format)
	VALUES ('nameless', 'acme', 'c', '{"prompt_tokens": 1000, "completion_tokens": 10, "total_tokens": 1010}', 'openai')});
like($warnings, qr/the reply names no model: give it in column model/, 'a reply without a model');
unlike($warnings, qr/set_price/, 'is no reason to enter a price');
like(said('postgres', "INSERT INTO usage ($columns) VALUES ('providerless', NULL, 'known-1', 'c', 1000)"),
	qr/the row names no provider: give it in column provider/, 'a row without a provider');
$node->safe_psql('postgres', "UPDATE usage SET provider = 'acme', model = 'known-1' WHERE external_id IN ('nameless', 'providerless')");
ok(wait_place('postgres', $_, 'delivered'), "$_: named, it is priced") foreach 'nameless', 'providerless';

# A price that is missing on a card: it is added, and all else of the card stays.
$warnings = said('postgres', "INSERT INTO usage ($columns, cache_read_tokens, units, occurred_at)
	VALUES ('lacking', 'acme', 'known-1', 'c', 6000, 1000, '{\"image\": 1}', '2026-05-01 10:00:00.25+00')");
like($warnings, qr/set_price\('acme', 'known-1', cache_read => \?, units => '\{"image": \?\}', valid_from => '2026-05-01 10:00:00\.250000\+00'\);/,
	'the hint names what is missing, and since when');
like($node->safe_psql('postgres', "SELECT hint FROM aibilling.unpriced WHERE reason LIKE '%known-1%'"),
	qr/set_price\('acme', 'known-1', cache_read => \?, .*valid_from => '2026-05-01 10:00:00\.250000\+00'\);/, 'aibilling.unpriced has the hint, too');
like($node->safe_psql('postgres', "SELECT string_agg(note, ' ') FROM usage u, aibilling.explain_cost('usage', u.id) WHERE external_id = 'lacking'"),
	qr/no price\. .*set_price\('acme', 'known-1', cache_read => \?/, 'explain_cost says the same');
$node->safe_psql('postgres', statement_of($warnings));
ok(wait_place('postgres', 'lacking', 'delivered'), 'it is priced');
is($node->safe_psql('postgres', "SELECT cost_nanos FROM usage WHERE external_id = 'lacking'"), 5000 * 4000 + 1000 * 3000 + 3000000000, 'by the step of the card, and the prices typed');
$node->safe_psql('postgres', "INSERT INTO usage ($columns, output_tokens, occurred_at) VALUES
	('before it', 'acme', 'known-1', 'c', 1000, 10, '2026-04-01'), ('after it', 'acme', 'known-1', 'c', 1000, 10, '2026-06-01'), ('long after', 'acme', 'known-1', 'c', 6000, 10, now())");
is($node->safe_psql('postgres', "SELECT cost_nanos FROM usage WHERE external_id IN ('before it', 'after it', 'long after') ORDER BY id"),
	"1020000\n1020000\n24020000", 'and every other row of the model is priced as before');

# A price that an import holds back is announced: to whoever imports, in the log, and in status.
my $log = $node->log_offset;
$warnings = said('postgres', q{SELECT count(*) FROM aibilling.import_prices('{"acme/cut": {"litellm_provider": "acme", "input_cost_per_token": 1e-5}}', 'litellm', false);
	SELECT count(*) FROM aibilling.import_prices('{"acme/cut": {"litellm_provider": "acme", "input_cost_per_token": 1e-6}}', 'litellm', false)});
like($warnings, qr/NOTICE:  1 of the prices of litellm are suspicious and are held back: acme\/cut\nHINT: .*price_quarantine/, 'a NOTICE');
like($node->log_since($log), qr/LOG:  aibilling_polar: 1 prices of litellm are held in aibilling\.price_quarantine, imported by "/, 'a line in the log');
like($node->status, qr/; 1 suspicious prices are held since \d.* \(aibilling\.price_quarantine\)/, 'and in status');
$node->safe_psql('postgres', "SELECT aibilling.release_price('litellm', 'acme', 'cut')");
unlike($node->status, qr/held/, 'until somebody has looked');

# ---------------------------------------------------------------------------
# Rows from before their table was attached, which no price can help
# ---------------------------------------------------------------------------

$node->safe_psql('postgres', "UPDATE aibilling.price SET cache_read = 0.1, output = 1 WHERE model = 'b'");
$node->safe_psql('plain', "INSERT INTO aibilling.price (provider, model, input, cache_read, output) VALUES ('acme', 'b', 1, 0.1, 1)");
foreach my $db ('postgres', 'plain')
{
	my $prefix = "$db-old";
	my @rows = (
		[ 'first', 'input_tokens', '10' ],
		[ 'cached', 'input_tokens, cache_read_tokens', '10, 11', 'input_tokens must include its parts, but is 10 with cache_read_tokens = 11' ],
		[ 'reasoned', 'output_tokens, reasoning_tokens', '10, 11', 'output_tokens must include its parts, but is 10 with reasoning_tokens = 11' ],
		[ 'billed', 'input_tokens, cache_read_tokens, cost_nanos, cost_cents', '10, 12, 7, 0.0000007', 'input_tokens must include its parts, but is 10 with cache_read_tokens = 12' ],
		[ 'negative', 'input_tokens', '-1', 'input_tokens must not be negative, but is -1' ],
		[ 'list', 'units', q{'[1]'}, 'column "units" of a usage row must be a JSON object' ],
		[ 'word', 'units', q{'{"image": "one"}'}, 'unit "image" must be a number' ],
		[ 'nan', 'provider_cost', q{'NaN'}, 'provider_cost must be a finite number, but is NaN' ],
		[ 'time', 'occurred_at, input_tokens', q{'infinity', 1}, 'column "occurred_at" of a usage row must be a finite time after the year 0' ],
		[ 'tags', 'tags, input_tokens', q{'[]', 1}, 'column "tags" of a usage row must be a JSON object' ],
		[ 'format', 'raw_usage, usage_format', q{'{}', 'no'}, 'unknown usage format "no"' ],
		[ 'shape', 'raw_usage, usage_format', q{'{"prompt_tokens": -1, "completion_tokens": 1}', 'openai'}, undef ],
		[ 'raw', 'raw_usage, usage_format', q{'{"prompt_tokens": 10, "completion_tokens": 1, "total_tokens": 11}', 'openai'} ],
		[ 'last', 'input_tokens', '10' ]);
	my $id = 0;

	$node->safe_psql($db, 'CREATE TABLE old (LIKE usage INCLUDING DEFAULTS); ALTER TABLE old ADD PRIMARY KEY (id); '
		  . join('; ', map { $id++; "INSERT INTO old (id, external_id, provider, model, external_customer_id, $_->[1])
			VALUES ($id, '$prefix $_->[0]', 'acme', 'b', 'c', $_->[2])" } @rows)
		  . "; SELECT aibilling.attach('old', 'polar', existing => 'send')");
	$node->safe_psql($db, 'CALL aibilling.sync()') if $db eq 'plain';
	$node->poll_query_until($db, 'SELECT delivered = 3 AND pending = 0 AND unpriced = 0 AND in_flight = 0 FROM aibilling.status WHERE usage_table = '
		  . "'old'::regclass");
	is($node->safe_psql($db, "SELECT external_id FROM old WHERE (aibilling.usage_status('old', id)).state = 'delivered' ORDER BY id"),
		"$prefix first\n$prefix raw\n$prefix last", "$db: rows without fault are delivered");
	is($node->safe_psql($db, "SELECT external_id, cost_nanos FROM old WHERE cost_nanos IS NOT NULL ORDER BY id"),
		"$prefix first|10000\n$prefix billed|7\n$prefix raw|11000\n$prefix last|10000", "$db: at their costs");
	foreach my $row (grep { @$_ > 3 } @rows)
	{
		my ($state, $error) = split /\|/, $node->safe_psql($db, "SELECT s.state, s.error FROM old o, aibilling.usage_status('old', o.id) s WHERE external_id = '$prefix $row->[0]'");
		is($state, 'rejected', "$db: $row->[0] is set aside");
		like($error, defined $row->[3] ? qr/^\Q$row->[3]\E$/ : qr/^raw_usage: /, "$db: with its reason");
	}
	unlike($node->safe_psql($db, q{SELECT status FROM aibilling.status WHERE usage_table = 'old'::regclass}), qr/blocked/, "$db: nothing is blocked");
	is($node->safe_psql($db, "SELECT aibilling.retry('old')"), '11', "$db: retry");
	$node->safe_psql($db, 'CALL aibilling.sync()');
	is($node->safe_psql($db, "SELECT state, count(*) FROM aibilling.outbox WHERE usage_table = 'old'::regclass GROUP BY 1"), 'rejected|11', "$db: fixes nothing");
	is($node->safe_psql($db, "SELECT usage_id, r.state, old_cost_nanos, new_cost_nanos, action FROM aibilling.reprice('old') r"), '4|rejected|7||kept', "$db: nor does reprice");
	$node->safe_psql($db, "UPDATE old SET input_tokens = 20 WHERE external_id = '$prefix cached'");
	$node->safe_psql($db, 'CALL aibilling.sync()');
	is($node->safe_psql($db, "SELECT state, cost_nanos FROM old o, aibilling.usage_status('old', o.id) WHERE external_id = '$prefix cached'"),
		'delivered|10100', "$db: an UPDATE does");
}

# sync() watches the worker, and waits for what a price that has just come lets go.
foreach my $n (1 .. 5)
{
	$node->psql('postgres', "INSERT INTO usage ($columns) VALUES ('soon $n', 'acme', 'soon$n', 'c', 10)");
	$polar->fault(kind => 'slow', delay => 300);
	is($node->safe_psql('postgres', "INSERT INTO aibilling.price (provider, model, input) VALUES ('acme', 'soon$n', 1); CALL aibilling.sync();
		SELECT state FROM usage u, aibilling.usage_status('usage', u.id) WHERE external_id = 'soon $n'"), 'delivered', "sync() waits for the price $n");
}

# ---------------------------------------------------------------------------
# unpriced 'send': what waits goes without a cost, and what comes
# ---------------------------------------------------------------------------

$node->psql('postgres', "INSERT INTO usage ($columns) VALUES ('held', 'acme', 'sent', 'c', 10)");
is(place('postgres', 'held'), 'unpriced', 'held as long as nobody says otherwise');
$node->safe_psql('postgres', "ALTER SERVER polar OPTIONS (ADD unpriced 'send')");
ok(wait_place('postgres', 'held', 'delivered'), "unpriced 'send' sends what waits");
$warnings = said('postgres', "INSERT INTO usage ($columns) VALUES ('sent', 'acme', 'sent', 'c', 10);
	INSERT INTO usage ($columns, web_search_count) VALUES ('sent part', 'acme', 'both', 'c', 10, 1);
	INSERT INTO usage ($columns) VALUES ('sent priced', 'acme', 'both', 'c', 1000)");
is($warnings, '', 'without a warning');
wait_place('postgres', 'sent priced', 'delivered');
foreach my $id ('held', 'sent', 'sent part')
{
	my $metadata = event($id)->{metadata};

	ok(!exists $metadata->{_cost} && !exists $metadata->{cost_nanos} && !exists $metadata->{cost_currency}, "$id: an event without a cost");
	is($metadata->{input_tokens}, 10, "$id: with its counts");
	is($metadata->{_llm}{total_tokens}, 10, "$id: with _llm");
}
is(event('sent priced')->{metadata}{_cost}{amount}, '0.1', 'an event whose price is known has its cost');
$node->safe_psql('postgres', "INSERT INTO aibilling.price (provider, model, input) VALUES ('acme', 'sent', 1)");
is($node->safe_psql('postgres', "SELECT count(*), count(cost_nanos) FROM usage WHERE model = 'sent'"), '2|0', 'what was sent is not billed afterwards');
is($node->safe_psql('postgres', "SELECT state, new_cost_nanos, action FROM aibilling.reprice('usage')"), "delivered|10000|reported\ndelivered|10000|reported", 'reprice tells the difference');

$node->stop;
done_testing();
