# dev/stand-in: one command, and rows are delivered without an account; when it ends, the server is what it was.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use AibillingNode;
use IO::Socket::INET;
use IPC::Run;
use PolarServer;
use Test::More;

plan skip_all => 'python3 is not on PATH' unless PolarServer->python;

my $node = AibillingNode->new('stand_in');
my $db = 'postgres';
my ($out, $err, $run, $port);

# Starts it for a server; returns when it shows what arrives.
sub start_for
{
	my ($server) = @_;

	# A port that is free now.
	my $socket = IO::Socket::INET->new(LocalAddr => '127.0.0.1', LocalPort => 0, Listen => 1);
	$port = $socket->sockport;
	close $socket;
	local %ENV = (%ENV, PGHOST => $node->host, PGPORT => $node->port, PGUSER => $node->safe_psql($db, 'SELECT current_user'));
	($out, $err) = ('', '');
	$run = IPC::Run::start([ "$FindBin::Bin/../dev/stand-in", $db, $server, $port ], '<', \undef, '>', \$out, '2>', \$err,
		IPC::Run::timeout(180));
	$run->pump until $out =~ /cents\n/ || !$run->pumpable;
	like($out, qr/listens on http:\/\/127\.0\.0\.1:$port, and server $server of/, "$server: it says where") or diag($err);
	return;
}

sub end
{
	$run->signal('TERM');
	$run->finish;
	is($err, '', 'it ends without an error');
	return;
}

sub options
{
	my ($server) = @_;
	return $node->safe_psql($db, qq{SELECT array_to_string(srvoptions, ' '), (SELECT count(*) FROM pg_user_mappings u WHERE u.srvname = s.srvname)
		FROM pg_foreign_server s WHERE srvname = '$server'});
}

# A server that is not there is made, with all that it needs.
start_for('polar');
$node->create_usage_table;
$node->safe_psql($db, q{INSERT INTO usage (external_customer_id, provider, model, input_tokens, output_tokens, provider_cost)
	VALUES ('user_123', 'openai', 'gpt-5', 1200, 350, 0.005)});
$run->pump until $out =~ /user_123/ || !$run->pumpable;
like($out, qr/^user_123 +gpt-5 +1550 +0\.5$/m, 'an event that arrives is shown');
is($node->safe_psql($db, 'SELECT string_agg(item, $$, $$) FROM aibilling.check_setup() WHERE NOT ok'), 'there are prices',
	'all is right but what it has nothing to do with');
end();
like($out, qr/ALTER SERVER polar OPTIONS \(DROP url, ADD environment 'sandbox'/, 'it says how to go on with Polar');
is(options('polar'), "url=http://127.0.0.1:$port event_name=llm_usage|1", 'the server stays');

# One that is there, without a token yet, is what it was afterwards.
$node->safe_psql($db, q{CREATE SERVER "My Polar" FOREIGN DATA WRAPPER polar
	OPTIONS (environment 'sandbox', event_name 'mine', access_token_file '/nonexistent/token');
SELECT aibilling.create_usage_table('mine', server => 'My Polar');});
start_for('My Polar');
$node->safe_psql($db, q{INSERT INTO mine (external_customer_id, provider_cost) VALUES ('user_456', 0.01)});
$run->pump until $out =~ /user_456/ || !$run->pumpable;
like($out, qr/^user_456 +mine +1$/m, 'it delivers, too');
end();
is(options('My Polar'), 'environment=sandbox event_name=mine access_token_file=/nonexistent/token|0', 'and is what it was');

# What it does not touch.
$node->safe_psql($db, q{CREATE SERVER own FOREIGN DATA WRAPPER polar OPTIONS (url 'https://polar.example.com')});
{
	local %ENV = (%ENV, PGHOST => $node->host, PGPORT => $node->port, PGUSER => $node->safe_psql($db, 'SELECT current_user'));
	IPC::Run::run([ "$FindBin::Bin/../dev/stand-in", $db, 'own' ], '>', \$out, '2>', \$err);
	like($err, qr/server own has a url of its own/, 'a server with a url of its own');
	IPC::Run::run([ "$FindBin::Bin/../dev/stand-in", 'template1' ], '>', \$out, '2>', \$err);
	like($err, qr/does not have the extension: psql -d template1 -c 'CREATE EXTENSION aibilling_polar'/, 'a database without the extension');
}

$node->stop;
done_testing();
