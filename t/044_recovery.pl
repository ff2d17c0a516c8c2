# Recovery to a point in time: what was delivered after it is sent again, and known as a duplicate.
use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use Lifecycle;
use PolarServer;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

plan skip_all => 'needs python3' unless PolarServer->python;

my $polar = PolarServer->new;
my $node = new_node('archived', '', has_archiving => 1, allows_streaming => 1);

$node->start;
$node->safe_psql('postgres', 'CREATE DATABASE app');
set_up($node, 'app', $polar);
$node->safe_psql('app', insert('delivered', 4));
$node->safe_psql('app', 'CALL aibilling.sync()');
$node->backup('base');
$node->safe_psql('app', insert('pending', 3));
$node->safe_psql('app', "SELECT pg_create_restore_point('back')");

# All this is undone, but not at Polar.
$node->safe_psql('app', insert('undone', 40));
$node->safe_psql('app', 'CALL aibilling.sync()');
is($polar->summary->{stored}, 47, 'all rows are stored before the disaster');
my $last = value($node, 'app', "SELECT max(id) FROM usage WHERE external_id LIKE 'undone%'");
$node->safe_psql('app', 'SELECT pg_switch_wal()');
$node->stop;

my $back = PostgreSQL::Test::Cluster->new('back');
$back->init_from_backup($node, 'base', has_restoring => 1, standby => 0);
$back->append_conf('postgresql.conf', <<CONF);
recovery_target_name = 'back'
recovery_target_action = promote
aibilling_polar.databases = 'app'
CONF
$back->start;
$back->poll_query_until('app', 'SELECT NOT pg_is_in_recovery()') or die 'recovery does not end';
is(value($back, 'app', "SELECT count(*) FROM usage WHERE external_id LIKE 'undone%'"), '0', 'time is turned back');

# The same server goes on: it is not a copy.  Ids are given out again, external ids are not.
$back->safe_psql('app', "INSERT INTO usage (external_customer_id, provider_cost) SELECT 'customer', 1 FROM generate_series(1, 8)");
wait_delivered($back, 'app', 'delivery goes on by itself');
is(value($back, 'app', "SELECT count(*) FROM usage WHERE provider_cost = 1 AND id <= $last") > 0 ? 1 : 0,
	1, 'ids are given out again');
my $stored = stored($polar);
is(scalar(grep { $_ > 1 } values %$stored), 0, 'nothing is billed twice');
is($polar->summary->{stored}, 55, 'all that is new is billed');
is( value($back, 'app', <<'SQL'),
SELECT sum(inserted), sum(duplicates) FROM aibilling.delivery d
WHERE EXISTS (SELECT FROM usage u WHERE d.usage_ids @> u.id AND u.provider_cost = 1 AND d.state = 'delivered')
AND NOT EXISTS (SELECT FROM usage u WHERE d.usage_ids @> u.id AND u.external_id LIKE 'pending%')
SQL
	value($back, 'app', <<'SQL'),
SELECT count(*), 0 FROM usage u WHERE u.provider_cost = 1 AND NOT EXISTS (
SELECT FROM aibilling.delivery d, usage v
WHERE d.usage_ids @> u.id AND d.usage_ids @> v.id AND v.external_id LIKE 'pending%')
SQL
	'nothing new is swallowed as a duplicate');
is(value($back, 'app', 'SELECT sum(inserted), sum(duplicates) FROM aibilling.delivery'),
	'12|3', 'what the lost time had delivered is found to be there');
is(value($back, 'app', 'SELECT sum(unexpected_duplicates) FROM aibilling.delivery'),
	'0', 'which is no surprise');

# What comes after the recovery is not excused: an application that repeats what was undone,
# under its own external ids, is told that it had been billed.
$back->safe_psql('app', insert('undone', 2));
wait_delivered($back, 'app', 'the application repeats what was undone');
is($polar->summary->{stored}, 55, 'that is not billed twice either');
is(value($back, 'app', 'SELECT sum(duplicates), sum(unexpected_duplicates) FROM aibilling.delivery'),
	'5|2', 'and is told from what was expected');
like(value($back, 'app', 'SELECT status FROM aibilling.status'),
	qr/2 events were not counted/, 'status warns');
$back->stop;

done_testing();
