# What ledger and outbox say of requests: how often rows have been sent, whether an earlier request may have
# stored them, what is lost with a table; and what a failure costs of the requests that a server may be asked.

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
my $node = AibillingNode->new('main', conf => "aibilling_polar.poll_interval = 3600\nclient_min_messages = error\n");

sub sql
{
	my ($query) = @_;

	return $node->safe_psql('postgres', $query);
}

sub becomes
{
	my ($query, $expected, $what) = @_;

	return ok($node->poll_query_until('postgres', $query, $expected), $what) || diag $node->diagnosis;
}

# A table of its own for each part; the server as it was at the start.
sub begin
{
	my ($table, $server) = @_;

	$polar->reset(keep => ['events']);
	$node->create_usage_table($table, $server // 'polar');
	return;
}

sub deliveries
{
	my ($table) = @_;

	return sql("SELECT string_agg(concat_ws(' ', events, state, attempts), ', ' ORDER BY id) FROM aibilling.delivery "
		  . "WHERE usage_table = '$table'::regclass");
}

$node->create_server($polar, requests_per_minute => 0, batch_size => 10, max_in_flight => 1);

subtest 'attempts of a batch that is halved, and of rows that go back' => sub {
	begin('halved');
	$polar->fault(kind => '413', times => 1);
	$polar->fault(kind => 'poison', external_ids => [ 'halved_2', 'halved_9' ], status => 422, index => \1);
	$node->insert_rows(10, table => 'halved', prefix => 'halved_');
	becomes("SELECT count(*) = 2 FROM aibilling.outbox WHERE usage_table = 'halved'::regclass AND state = 'rejected'",
		't', 'a row of either half is refused');
	$node->poll_query_until('postgres',
		"SELECT sum(inserted) = 8 FROM aibilling.delivery WHERE usage_table = 'halved'::regclass");

	# The first half goes on with the delivery: refused whole, refused for one row, stored.
	is(deliveries('halved'), '4 delivered 3, 4 delivered 2', 'requests, by delivery');
	is(sql("SELECT string_agg(attempts::text, ' ' ORDER BY usage_id) FROM aibilling.outbox WHERE usage_table = 'halved'::regclass"),
		'2 2', 'requests, by row');
	sql("SELECT aibilling.pause('polar'); SELECT aibilling.retry('halved')");
	is(sql("SELECT string_agg(state || ' ' || attempts, ', ') FROM aibilling.outbox WHERE usage_table = 'halved'::regclass"),
		'pending 0, pending 0', 'retry() begins anew');
	$polar->reset(keep => ['events']);
	sql("SELECT aibilling.resume('polar')");
	becomes("SELECT sum(inserted) FROM aibilling.delivery WHERE usage_table = 'halved'::regclass", '10', 'and sends them');
};

subtest 'attempts of a row that is held' => sub {
	begin('held');
	$polar->fault(kind => 'clock_skew', seconds => 3600);
	$node->insert_rows(1, table => 'held', prefix => 'held_');
	sql("INSERT INTO held (external_id, external_customer_id, provider_cost) VALUES ('held_now', 'c', 1)");
	becomes("SELECT count(*) > 0 AND min(attempts) >= 1 FROM aibilling.outbox WHERE usage_table = 'held'::regclass AND not_before IS NOT NULL",
		't', 'count its requests');
	sql("UPDATE aibilling.outbox_entry SET not_before = now() WHERE usage_table = 'held'::regclass");
	sql("SELECT aibilling.resume('polar')");
	becomes("SELECT min(attempts) >= 2 FROM aibilling.outbox WHERE usage_table = 'held'::regclass", 't', 'the next one too');
	$polar->reset(keep => ['events']);
	sql('DELETE FROM held');
};

subtest 'a batch that may have been stored, and is halved' => sub {
	begin('unknown');
	$polar->fault(kind => '500', store => \1, times => 3);
	$node->insert_rows(10, table => 'unknown', prefix => 'unknown_');
	becomes("SELECT coalesce(sum(duplicates), 0) FROM aibilling.delivery WHERE usage_table = 'unknown'::regclass", '10',
		'comes to duplicates');
	is(sql("SELECT count(*), sum(unexpected_duplicates) FROM aibilling.delivery WHERE usage_table = 'unknown'::regclass"),
		'2|0', 'in both halves they are expected');
};

subtest 'rows that may have been stored beside others that were not' => sub {
	begin('mixed');
	sql("SELECT aibilling.pause('polar')");
	$node->insert_rows(1, table => 'mixed', prefix => 'mixed_', from => $_) foreach 1 .. 3;

	# As a server has left them that this one descends from.
	sql("UPDATE aibilling.outbox_entry SET outcome_unknown = true FROM mixed "
		  . "WHERE usage_table = 'mixed'::regclass AND mixed.id = outbox_entry.id AND external_id = 'mixed_1'");
	is($polar->ingest([ map { {
		name => 'other', timestamp => '2026-01-01T00:00:00Z', external_id => $_, external_customer_id => 'c', metadata => {} } }
			'mixed_1', 'mixed_3' ])->{status}, 200, 'Polar has one of either kind');
	sql("SELECT aibilling.resume('polar')");
	becomes("SELECT coalesce(sum(inserted + duplicates), 0) FROM aibilling.delivery WHERE usage_table = 'mixed'::regclass", '3',
		'they are delivered');
	is(sql("SELECT sum(duplicates), sum(unexpected_duplicates) FROM aibilling.delivery WHERE usage_table = 'mixed'::regclass"),
		'2|1', 'one is a surprise, the other is none');
};

subtest 'a table that is dropped while its rows are in flight' => sub {
	begin('dropped');
	my $oid = sql("SELECT 'dropped'::regclass::oid");
	$polar->fault(kind => 'hang', store => \0);
	$node->insert_rows(4, table => 'dropped', prefix => 'dropped_');
	$polar->wait(hung => 1);
	sql('DROP TABLE dropped');
	$polar->kill;
	becomes("SELECT state || ' ' || vanished FROM aibilling.delivery WHERE usage_table = $oid", 'failed 4',
		'its rows are counted as vanished');
	$polar->start;
	sql('SELECT aibilling.resume()');
};

subtest 'a table that fails costs its server no request' => sub {
	# One request a minute; the other server's is spent before.
	$node->create_server($polar, name => "slow_$_", requests_per_minute => 1, batch_size => 1) foreach 'a', 'b';
	begin('spent', 'slow_b');
	begin($_, 'slow_a') foreach 'fails', 'works';
	$node->insert_rows(2, table => 'spent', prefix => 'spent_');
	becomes("SELECT count(*) FROM aibilling.delivery WHERE usage_table = 'spent'::regclass AND state = 'delivered'", '1',
		'one server has had its request');
	sql("SELECT aibilling.pause('slow_a')");
	$node->insert_rows(1, table => 'fails', prefix => 'fails_');
	sql("ALTER TABLE fails RENAME COLUMN tags TO labels; SELECT aibilling.resume('slow_a')");
	ok($node->wait_status('^blocked', 'fails'), "a table of the other's fails");
	$node->insert_rows(1, table => 'works', prefix => 'works_');
	becomes("SELECT count(*) FROM aibilling.delivery WHERE usage_table = 'works'::regclass AND state = 'delivered'", '1',
		'another of that server is delivered');
	is(sql("SELECT count(*) FROM aibilling.delivery WHERE usage_table = 'spent'::regclass"), '1',
		'before the first server is asked again');
	sql('DROP TABLE spent, fails, works');
};

subtest 'too many requests of one role' => sub {
	sql(q{
CREATE ROLE ann;
CREATE ROLE bob;
GRANT CREATE ON SCHEMA public TO ann, bob});
	$node->create_server($polar, name => 'shared', requests_per_minute => 20);
	$polar->reset(keep => ['events']);
	$polar->tokens(token => 'polar_oat_of_bob');
	sql(q{
GRANT USAGE ON FOREIGN SERVER shared TO ann, bob;
ALTER SERVER shared OPTIONS (DROP access_token_file);
CREATE USER MAPPING FOR bob SERVER shared OPTIONS (access_token 'polar_oat_of_bob');
CREATE USER MAPPING FOR PUBLIC SERVER shared OPTIONS (access_token '} . $polar->token . q{');
SET ROLE ann;
SELECT aibilling.create_usage_table('anns', 'shared');
SET ROLE bob;
SELECT aibilling.create_usage_table('bobs', 'shared')});
	my $before = $polar->summary->{arrived};
	$polar->fault(kind => '429', retry_after => 1000, times => 1);
	$node->insert_rows(1, table => 'bobs', prefix => 'bobs_');
	ok($node->wait_status('^waiting until', 'bobs'), 'his rows wait');
	$node->insert_rows(1, table => 'anns', prefix => 'anns_');
	becomes("SELECT count(*) FROM aibilling.delivery WHERE usage_table = 'anns'::regclass AND state = 'delivered'", '1',
		"another's do not");
	is($node->ledger('count(*)', "usage_table = 'bobs'::regclass AND state = 'delivered'"), '0', 'while his still wait');

	# At 20 requests a minute two may be made at once.  But what Polar counts is theirs together: none is left.
	my @requests = $polar->requests;
	is(scalar(@requests) - $before, 2, 'there were two requests');
	is($node->safe_psql('postgres', "SELECT timestamptz '$requests[-1]{time}' - timestamptz '$requests[-2]{time}' >= interval '2.5 s'"),
		't', 'the second was not made at once');
};

subtest 'sync() and more rows without a price than may be sent at once' => sub {
	# Two requests at once, and one every three seconds.
	sql('CREATE DATABASE plain');
	my $plain = sub { return $node->safe_psql('plain', shift) };
	$plain->('CREATE EXTENSION aibilling_polar');
	$plain->("CREATE SERVER polar FOREIGN DATA WRAPPER polar OPTIONS (url '" . $polar->url
		  . "', event_name 'e', batch_size '1', requests_per_minute '20', access_token_file '" . $node->token_file($polar->token) . "')");
	$plain->("SELECT aibilling.create_usage_table('usage', 'polar')");
	$plain->("SET client_min_messages = error; INSERT INTO usage (provider, model, external_customer_id, input_tokens) VALUES ('p', 'm', 'c', $_)")
	  foreach 1 .. 3;
	$plain->("INSERT INTO aibilling.price (provider, model, input) VALUES ('p', 'm', 1)");
	$plain->('CALL aibilling.sync()');
	is($plain->('SELECT pending, unpriced, in_flight, delivered FROM aibilling.status'), '0|0|0|3', 'delivers all of them, with a pause between');
};

$node->stop;
$polar->stop;
done_testing();
