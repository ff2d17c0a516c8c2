# What the tests of a database's life share: nodes of PostgreSQL::Test::Cluster with a database of any name, and
# more of them than one, which a test starts, copies and upgrades by itself.

package Lifecycle;

use strict;
use warnings;

use Exporter qw(import);
use File::Basename qw(dirname);
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

our @EXPORT = qw(new_node set_up insert value wait_delivered wait_for_turn stored fill fill_outbox places
  $copy_is_paused $everything $anatomy);

our $copy_is_paused =
  qr/^paused: this database is a copy; run SELECT aibilling\.arm\(\) if it is to send/;

# A node with the library preloaded and workers for these databases, not started.  install_path: of another
# PostgreSQL than the one tested.
sub new_node
{
	my ($name, $databases, %init) = @_;
	my $node = PostgreSQL::Test::Cluster->new($name, install_path => delete $init{install_path});

	$node->init(%init);
	$node->append_conf('postgresql.conf', <<CONF);
shared_preload_libraries = 'aibilling_polar'
aibilling_polar.databases = '$databases'
aibilling_polar.poll_interval = 1
max_prepared_transactions = 5
CONF
	return $node;
}

# The extension, a server that leads to $polar, and a usage table.
sub set_up
{
	my ($node, $database, $polar, $options, $version) = @_;
	my $url = $polar->url;
	my $token = $polar->token;

	$options = defined $options ? ", $options" : '';
	$version = defined $version ? " VERSION '$version'" : '';
	$node->safe_psql($database, <<SQL);
CREATE EXTENSION aibilling_polar$version;
CREATE SERVER polar FOREIGN DATA WRAPPER polar OPTIONS (url '$url', event_name 'llm_usage'$options);
CREATE USER MAPPING FOR PUBLIC SERVER polar OPTIONS (access_token '$token');
SELECT aibilling.create_usage_table('usage', server => 'polar');
SQL
	return;
}

# SQL that inserts rows whose external ids are $name-1, ...
sub insert
{
	my ($name, $count, $table) = @_;

	$table //= 'usage';
	return "INSERT INTO $table (external_id, external_customer_id, provider_cost)"
	  . " SELECT '$name-' || i, 'customer', 0.01 FROM generate_series(1, $count) i;\n";
}

sub value
{
	my ($node, $database, $sql) = @_;
	return $node->safe_psql($database, $sql);
}

# Wait until nothing waits and nothing is in flight.
sub wait_delivered
{
	my ($node, $database, $name) = @_;

	ok( $node->poll_query_until(
			$database,
			"SELECT NOT EXISTS (SELECT FROM aibilling.outbox WHERE state = 'pending')"
			  . " AND NOT EXISTS (SELECT FROM aibilling.delivery WHERE state = 'sending')"),
		$name)
	  or diag(value($node, $database, 'SELECT * FROM aibilling.status'));
	return;
}

# Wait until the database's worker has made a turn that began after now.
sub wait_for_turn
{
	my ($node, $database) = @_;
	my $now = value($node, $database, 'SELECT clock_timestamp()');

	$node->poll_query_until($database, <<SQL) or die "no turn of a worker in $database";
SELECT EXISTS (SELECT FROM pg_stat_activity
	WHERE backend_type = 'aibilling_polar worker' AND datname = current_database()
	AND state = 'idle' AND state_change > '$now')
SQL
	return;
}

sub stored
{
	my ($polar) = @_;
	my %stored;

	$stored{ $_->{external_id} }++ foreach $polar->events(compact => 1);
	return \%stored;
}

# Everything that a copy of a database must keep, as text.  Tables are named, not numbered.
our $everything = <<'SQL';
SELECT 'price', p::text FROM aibilling.price p
UNION ALL SELECT 'alias', a::text FROM aibilling.model_alias a
UNION ALL SELECT 'source', s::text FROM aibilling.price_source s
UNION ALL SELECT 'rule', r::text FROM aibilling.service_tier_rule r
UNION ALL SELECT 'quarantine', q::text FROM aibilling.price_quarantine q
UNION ALL SELECT 'outbox', o::text FROM aibilling.outbox o
UNION ALL SELECT 'delivery', d::text FROM aibilling.delivery d
UNION ALL SELECT 'next delivery', last_value::text FROM aibilling.delivery_id_seq
UNION ALL SELECT 'state', s::text FROM aibilling.server_state s
UNION ALL SELECT 'usage', u::text FROM usage u
UNION ALL SELECT 'table', t::text FROM aibilling.usage_table t
UNION ALL SELECT 'trigger', tgname || pg_get_triggerdef(oid) FROM pg_trigger WHERE tgrelid = 'usage'::regclass
UNION ALL SELECT 'server', srvname || (SELECT array_agg(o ORDER BY o)::text FROM unnest(srvoptions) o) FROM pg_foreign_server
UNION ALL SELECT 'mapping', umoptions::text FROM pg_user_mapping
ORDER BY 1, 2
SQL

# What an extension consists of, in words: its members and what belongs to these, with every property
# that has a meaning outside of the catalogues.
our $anatomy = slurp_file(dirname(__FILE__) . '/anatomy.sql');

# A database with something in each of those: 3 rows delivered, 2 pending, 1 rejected, 1 unpriced.
# Prices, and rows that are delivered and that wait.
sub fill
{
	my ($node, $database, $name) = @_;

	$node->safe_psql($database, insert("$name-delivered", 3));
	$node->safe_psql($database, 'CALL aibilling.sync()');
	fill_outbox($node, $database, $name);
	return;
}

# Prices, and rows that wait.
sub fill_outbox
{
	my ($node, $database, $name) = @_;

	$node->psql(
		$database, <<SQL
INSERT INTO aibilling.price (provider, model, input, output) VALUES ('openai', 'gpt-5', 1.25, 10);
INSERT INTO aibilling.price_source VALUES ('mine', 5, 'a note');
INSERT INTO aibilling.model_alias (provider, pattern, to_provider, to_model) VALUES ('azure', 'five', 'openai', 'gpt-5');
INSERT INTO aibilling.service_tier_rule (provider, service_tier, multiplier) VALUES ('openai', 'batch', 0.4);
SET client_min_messages = error;
INSERT INTO usage (external_id, provider_cost) VALUES ('$name-rejected', 1);
INSERT INTO usage (external_id, external_customer_id, provider, model, input_tokens)
	VALUES ('$name-unpriced', 'customer', 'nobody', 'nothing', 7);
SQL
		  . insert("$name-pending", 2), on_error_stop => 1) == 0
	  or die 'could not fill the database';
	return;
}

sub places
{
	my ($node, $database) = @_;

	return value($node, $database,
		"SELECT string_agg(state || ' ' || n, ', ' ORDER BY state) FROM"
		  . ' (SELECT state, count(*) AS n FROM aibilling.outbox GROUP BY state) o');
}

1;
