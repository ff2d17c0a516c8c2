# Roles that share a server: what befalls the token of one, and what one of them does, is not the others'.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use AibillingNode;
use JSON::PP;
use PolarServer;
use PostgreSQL::Test::Utils;
use Test::More;

my $polar = PolarServer->new(state => PostgreSQL::Test::Utils::tempdir . '/polar.state');
my $node = AibillingNode->new('shared', conf => "aibilling_polar.poll_interval = 1\n");
my $n = 0;

$node->create_server($polar, requests_per_minute => 0);
$node->safe_psql('postgres', q{
CREATE ROLE keeper LOGIN;
CREATE ROLE ann LOGIN;
CREATE ROLE bob LOGIN;
GRANT CREATE ON SCHEMA public TO ann, bob;
GRANT USAGE ON FOREIGN DATA WRAPPER polar TO keeper;
ALTER SERVER polar OWNER TO keeper;
GRANT USAGE ON FOREIGN SERVER polar TO ann, bob;
SET ROLE ann;
SELECT aibilling.create_usage_table('anns', 'polar');
SET ROLE bob;
SELECT aibilling.create_usage_table('bobs', 'polar');});

sub as
{
	my ($role, $sql) = @_;
	my ($rc, $out, $err) =
	  $node->psql('postgres', $sql, extra_params => [ '-U', $role ], on_error_stop => 0);

	return $err;
}

sub sql
{
	my ($sql) = @_;
	return $node->safe_psql('postgres', $sql);
}

# Inserts a row and waits until it has arrived.
sub delivers
{
	my ($table, $what) = @_;
	my $id = 'row-' . ++$n;

	sql("INSERT INTO $table (external_id, external_customer_id, provider_cost) VALUES ('$id', 'c', 1)");
	return ok(
		$node->poll_query_until('postgres',
			"SELECT (aibilling.usage_status('$table', id)).state = 'delivered' FROM $table WHERE external_id = '$id'"),
		$what) || diag($node->diagnosis);
}

# Inserts a row and waits until the table's status says why it stays.
sub stays
{
	my ($table, $words, $what) = @_;

	sql("INSERT INTO $table (external_customer_id, provider_cost) VALUES ('c', 1)");
	ok($node->wait_status($words, $table), $what);
	is(sql("SELECT pending > 0 AND in_flight = 0 FROM aibilling.status WHERE usage_table = '$table'::regclass"),
		't', "$what: nothing of it is sent");
	return;
}

delivers('anns', 'both are delivered: the one');
delivers('bobs', 'and the other');

# --- a token of one's own ----------------------------------------------------------

# One that Polar refuses, in place of the token that all share: the file is no alternative then.
my $file = sql(q{SELECT option_value FROM pg_options_to_table((SELECT srvoptions FROM pg_foreign_server WHERE srvname = 'polar'))
	WHERE option_name = 'access_token_file'});
my $mine = $polar->token;
my $log = $node->log_offset;

is(as('bob', q{CREATE USER MAPPING FOR bob SERVER polar OPTIONS (access_token 'polar_oat_of_bob')}), '', 'bob maps himself');
stays('bobs', '^paused: access token given twice', 'a token beside the file');
delivers('anns', 'the file serves the others');

sql("ALTER SERVER polar OPTIONS (DROP access_token_file); CREATE USER MAPPING FOR PUBLIC SERVER polar OPTIONS (access_token '$mine')");
stays('bobs', '^paused: .*401', 'a token that is refused');
delivers('anns', 'the token of PUBLIC serves the others');
is(sql(q{SELECT string_agg(role::regrole || ' ' || paused, ', ') FROM aibilling.server_state WHERE paused IS NOT NULL}),
	'bob answer', 'the pause is of one role');
like($node->log_since($log), qr/delivery to server "polar" by the user mapping for bob is paused/, 'so the log says');

$node->restart;
delivers('anns', 'after a restart others are delivered');
stays('bobs', '^paused: .*401', 'and he is not');
my ($rc, $out, $err) = $node->psql('postgres', 'CALL aibilling.sync()');
like($err, qr/^psql:\S+ WARNING:  aibilling\.sync\(\) stopped before everything was delivered: the server does not accept events/,
	'sync() does not wait for him');

# The server's quota and slots are one all the same.
my $arrived = $polar->summary->{arrived};
is(as('bob', q{ALTER USER MAPPING FOR bob SERVER polar OPTIONS (DROP access_token)}), '', 'bob drops his token');
stays('bobs', '^paused: no access token: the user mapping for bob', 'a mapping without a token');
is($polar->summary->{arrived}, $arrived, 'there is no request without a token');
delivers('anns', 'others are delivered');

$polar->tokens(token => 'polar_oat_of_bob_2');
is(as('bob', q{ALTER USER MAPPING FOR bob SERVER polar OPTIONS (ADD access_token 'polar_oat_of_bob_2')}), '', 'bob has a good token');
$node->wait_settled;
delivers('bobs', 'with which he is delivered by itself');

# The other way round: the shared token is refused.
sql("ALTER USER MAPPING FOR PUBLIC SERVER polar OPTIONS (SET access_token 'polar_oat_nobody')");
stays('anns', '^paused: .*401', 'the token of PUBLIC is refused');
delivers('bobs', 'who has a token of his own is delivered');

# A mapping dropped: its rows go by the token that all share.
sql("DROP USER MAPPING FOR bob SERVER polar; INSERT INTO bobs (external_customer_id, provider_cost) VALUES ('c', 1)");
ok($node->wait_status('^paused: .*401', 'bobs'), 'without a mapping of his own he waits with the others');
sql("ALTER USER MAPPING FOR PUBLIC SERVER polar OPTIONS (SET access_token '$mine')");
$node->wait_settled;
pass('and goes on with them');

# Rows in flight by a token that is gone meanwhile.
$polar->fault(kind => 'hang', store => JSON::PP::true);
sql("INSERT INTO bobs (external_id, external_customer_id, provider_cost) VALUES ('hung', 'c', 1)");
$polar->wait(hung => 1);
is(as('bob', q{CREATE USER MAPPING FOR bob SERVER polar OPTIONS (access_token 'polar_oat_of_bob_2')}), '', 'bob maps himself in mid-flight');
$polar->restart;
$polar->tokens(token => 'polar_oat_of_bob_2');
$node->wait_settled;
is(sql(q{SELECT duplicates, unexpected_duplicates FROM aibilling.delivery ORDER BY id DESC LIMIT 1}), '1|0', 'and his request is made again by the new one')
  or diag($node->diagnosis);
sql('DROP USER MAPPING FOR bob SERVER polar');

# --- pause and resume --------------------------------------------------------------

is(as('bob', q{SELECT aibilling.pause('polar')}), '', 'bob pauses the server');
stays('bobs', '^paused: paused by bob', 'which is for his table');
delivers('anns', "ann's is delivered");
is(as('ann', q{SELECT aibilling.resume()}), '', 'ann resumes');
is($node->status('bobs'), 'paused: paused by bob', 'which is not for his');
is(sql('SELECT state FROM aibilling.outbox'), 'pending', 'his row waits');
$node->restart;
is($node->status('bobs'), 'paused: paused by bob', 'a restart changes nothing');
as('bob', q{SELECT aibilling.create_usage_table('bobs_too', 'polar')});
stays('bobs_too', '^paused: paused by bob', 'his new table is paused too');
is(as('bob', q{SELECT aibilling.resume('polar')}), '', 'bob resumes');
$node->wait_settled;
delivers('bobs', 'and is delivered');

is(as('keeper', q{SELECT aibilling.pause('polar')}), '', "the server's owner pauses it");
stays('bobs', '^paused: paused by keeper', 'for the one');
stays('anns', '^paused: paused by keeper', 'and the other');
like(as('bob', q{SELECT aibilling.resume('polar')}), qr/WARNING:  server "polar" stays paused: paused by keeper/, 'no user of the server can end that');
is($node->status('bobs'), 'paused: paused by keeper', 'nor does');
is(as('bob', q{SELECT aibilling.pause()}), '', 'he can pause his own besides');
is(as('keeper', q{SELECT aibilling.resume('polar')}), '', "the server's owner resumes it");
delivers('anns', 'for the one');
ok($node->wait_status('^paused: paused by bob', 'bobs'), 'not for whom has paused by himself');
sql('SELECT aibilling.resume()');
$node->wait_settled;
pass('a superuser resumes all');

# Who attaches a table to a server takes no right from others.
is(as('ann', q{SELECT aibilling.pause(); SELECT aibilling.resume()}), '', 'ann pauses and resumes as before');
like(as('ann', q{SET ROLE NONE; SELECT aibilling.pause('nowhere')}), qr/server "nowhere" does not exist/, 'what there is');
sql('CREATE ROLE stranger LOGIN');
like(as('stranger', "SELECT aibilling.$_('polar')"), qr/must be owner of server "polar" or of a usage table attached to it/, "a stranger: $_('polar')"),
  like(as('stranger', "SELECT aibilling.$_()"), qr/must be owner of a server or of a usage table attached to one/, "a stranger: $_()")
  for ('pause', 'resume');

is(sql('SELECT count(*) FROM aibilling.outbox'), '0', 'everything is delivered');
$node->sums_equal($polar, 'every cent has arrived', 'anns', 'bobs', 'bobs_too');
$node->stop;
$polar->stop;

done_testing();
