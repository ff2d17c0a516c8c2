# A server without the extension publishes its usage table, another one with it subscribes and delivers. Whatever
# the first one does, the subscription goes on.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use AibillingNode;
use PolarServer;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

plan skip_all => 'python3 is not on PATH' unless PolarServer->python;

my $conf = <<'EOC';
wal_level = logical
max_wal_senders = 10
max_replication_slots = 10
max_worker_processes = 20
max_logical_replication_workers = 10
max_prepared_transactions = 10
aibilling_polar.poll_interval = 60
EOC
my $polar = PolarServer->new;
my $hub = AibillingNode->new('hub', conf => $conf);

$hub->create_server($polar, requests_per_minute => 0);
hub(q{INSERT INTO aibilling.price (provider, model, input, output, units) VALUES ('p', 'm', 1, 2, '{"image": 1000000}')});
hub(q{SELECT aibilling.create_usage_table('usage', 'polar', replicated => true)});

my $publisher = PostgreSQL::Test::Cluster->new('publisher');
$publisher->init(allows_streaming => 'logical', extra => [ '--encoding=UTF8', '--locale=C' ]);
$publisher->append_conf('postgresql.conf', "fsync = off\nmax_prepared_transactions = 10\n");
$publisher->start;
$publisher->safe_psql('postgres', 'CREATE ROLE app LOGIN; GRANT ALL ON SCHEMA public TO app; GRANT CREATE ON DATABASE postgres TO app');

sub hub
{
	my ($sql) = @_;

	return $hub->safe_psql('postgres', $sql);
}

sub there
{
	my ($sql) = @_;

	return $publisher->safe_psql('postgres', $sql);
}

sub subscribe
{
	my ($name, $with, $node, $publication) = @_;
	my $info = ($node // $publisher)->connstr('postgres') =~ s/'/''/gr;

	$with = defined $with ? "WITH ($with)" : '';
	$publication //= 'aibilling_usage';
	return hub("CREATE SUBSCRIPTION $name CONNECTION '$info' PUBLICATION $publication $with");
}

# Block until what the publisher has committed is stored at the hub.
sub arrived
{
	my ($sub) = @_;

	$publisher->wait_for_catchup($sub // 'sidecar');
	return;
}

# The outbox's word on a row, and its reason.
sub fate
{
	my ($external_id) = @_;

	return hub(
		"SELECT s.state || coalesce(': ' || s.error, '') FROM usage u, aibilling.usage_status('usage', u.id) s "
		  . "WHERE u.external_id = '$external_id'");
}

sub status_is
{
	my ($column, $value, $what) = @_;

	is(hub("SELECT $column FROM aibilling.status WHERE usage_table = 'usage'::regclass"), $value, $what);
	return;
}

# ---------------------------------------------------------------------------
# What the publisher gets: nothing of ours, and no superuser is needed
# ---------------------------------------------------------------------------

my $ddl = hub(q{SELECT aibilling.usage_table_ddl('usage')});
unlike($ddl, qr/aibilling\.|cost_/, 'no function of ours, no cost columns');
$publisher->safe_psql('postgres', $ddl, extra_params => [ '-U', 'app' ]);
is(there(q{SELECT pubinsert, pubupdate, pubdelete, pubtruncate FROM pg_publication}), 't|t|f|f', 'inserts and updates are published');
is(there(q{SELECT 'id' = ANY (attnames), 'external_id' = ANY (attnames), 'provider_cost' = ANY (attnames) FROM pg_publication_tables}),
	'f|t|t', 'id is not');
is(there(q{SELECT relreplident FROM pg_class WHERE relname = 'usage'}) . hub(q{SELECT relreplident FROM pg_class WHERE relname = 'usage' AND relnamespace = 'public'::regnamespace}),
	'ii', 'external_id is the replica identity on both sides');
like(hub(q{SELECT aibilling.usage_table_ddl('"My App"."LLM calls"')}), qr/CREATE TABLE "My App"\."LLM calls" \(/, 'names are quoted as they need');
my ($rc, $out, $err) = $hub->psql('postgres', q{SELECT aibilling.usage_table_ddl('a.b.c')});
like($err, qr/improper name of a table/, 'a name of three parts is refused');

my $insert = q{INSERT INTO usage (external_id, provider, model, external_customer_id, input_tokens)};

there("$insert SELECT 'before_' || i, 'p', 'm', 'c', 7 FROM generate_series(1, 3) i");
subscribe('sidecar', 'two_phase = on');
$hub->wait_for_subscription_sync($publisher, 'sidecar');
there("$insert VALUES ('plain', 'p', 'm', 'c', 7)");
arrived();
$hub->wait_settled;
$hub->sums_equal($polar, 'rows that were there before and rows that come are priced and delivered');
is(hub(q{SELECT cost_nanos FROM usage WHERE external_id = 'plain'}), '7000', 'at the prices of the hub');
ok($hub->poll_query_until('postgres', q{SELECT lag = interval '0' FROM aibilling.status WHERE usage_table = 'usage'::regclass}),
	'lag is shown where a subscription feeds the table');

# What was said is not kept, if the server's option says so.
hub(q{ALTER SERVER polar OPTIONS (ADD raw_usage 'strip'); SELECT aibilling.pause('polar')});
my $reply = q{{"choices": [{"message": {"content": "canary"}}], "usage": {"prompt_tokens": %d, "completion_tokens": 0}}};
my $stripped = q{SELECT cost_nanos, raw_usage::text ~ 'canary', raw_usage #>> '{usage,prompt_tokens}' FROM usage WHERE external_id = 'said'};
there(sprintf "INSERT INTO usage (external_id, provider, model, external_customer_id, usage_format, raw_usage) VALUES ('said', 'p', 'm', 'c', 'openai', '$reply')", 7);
arrived();
is(hub($stripped), '7000|f|7', 'of a reply that comes its usage is kept');
there(sprintf "UPDATE usage SET raw_usage = '$reply' WHERE external_id = 'said'", 8);
arrived();
is(hub($stripped), '8000|f|8', 'of one that changes, too');
there(sprintf "INSERT INTO usage (external_id, provider, model, external_customer_id, usage_format, raw_usage) VALUES ('strange', 'p', 'm', 'c', 'strange', '%s')", sprintf($reply, 9) =~ s/^\{/{"effort": 4, /r);
arrived();
is(hub($stripped =~ s/'said'/'strange'/r), '|f|9', 'and of one whose format is unknown');
is(hub(q{SELECT raw_usage ->> 'effort' FROM usage WHERE external_id = 'strange'}), '4', 'all numbers');
there(q{UPDATE usage SET usage_format = 'openai' WHERE external_id = 'strange'});
arrived();
is(hub($stripped =~ s/'said'/'strange'/r), '9000|f|9', 'until it is named');
hub(q{ALTER SERVER polar OPTIONS (DROP raw_usage); SELECT aibilling.resume('polar')});
$hub->wait_settled;

# ---------------------------------------------------------------------------
# Each thing that an INSERT refuses elsewhere is stored and rejected
# ---------------------------------------------------------------------------

my @bad = (
	[ 'negative', 'input_tokens', '-7', qr/negative|must not/ ],
	[ 'subset', 'cache_read_tokens', '8', qr/cache_read_tokens|input_tokens/ ],
	[ 'reasoning', 'reasoning_tokens', '8', qr/reasoning_tokens/ ],
	[ 'tags', 'tags', q{'[1]'}, qr/tags/ ],
	[ 'tagsnull', 'tags', q{'"x"'}, qr/tags/ ],
	[ 'units', 'units', q{'[1]'}, qr/units/ ],
	[ 'unit', 'units', q{'{"image": -1}'}, qr/image/ ],
	[ 'unitword', 'units', q{'{"image": "two"}'}, qr/image/ ],
	[ 'infinite', 'occurred_at', q{'infinity'}, qr/occurred_at/ ],
	[ 'minusinfinite', 'occurred_at', q{'-infinity'}, qr/occurred_at/ ],
	[ 'bc', 'occurred_at', q{'0044-03-15 00:00:00+00 BC'}, qr/occurred_at/ ],
	[ 'nan', 'provider_cost', q{'NaN'}, qr/NaN|provider_cost|finite/i ],
	[ 'inf', 'provider_cost', q{'Infinity'}, qr/infinit|provider_cost|finite/i ],
	[ 'huge', 'provider_cost', q{'1e30'}, qr/beyond|100,?000/ ],
	[ 'vast', 'provider_cost', q{('1e131000')::numeric}, qr/provider_cost/ ],
	[ 'many', 'input_tokens', q{9223372036854775807}, qr/exceed bigint/ ],
	[ 'costly', 'units', q{'{"image": 1e9}'}, qr/beyond the range/ ],
	[ 'vastunit', 'units', q{jsonb_build_object('image', '1e131000'::numeric)}, qr/./ ],
	[ 'noformat', 'raw_usage', q{'{}'}, qr/usage_format/ ],
	[ 'format', 'usage_format', q{'nobodys'}, qr/unknown usage format/ ],
	[ 'uuid', 'customer_id', q{'00000000-0000-1000-8000-000000000000'}, qr/customer/ ],
	[ 'identity', 'external_customer_id', q{NULL}, qr/customer|identity/ ],
	[ 'event', 'event_name', q{repeat('e', 129)}, qr/event/ ],
	[ 'x' x 256, 'model', q{'m'}, qr/external_id/ ],
	[ '', 'model', q{'m'}, qr/external_id/ ],
);
for my $bad (@bad)
{
	my ($external_id, $column, $value) = @$bad;
	my %row = (
		external_id => "'$external_id'", provider => q{'p'}, model => q{'m'}, external_customer_id => q{'c'},
		input_tokens => 7, output_tokens => 7, $column => $value);
	my @columns = sort keys %row;

	there('INSERT INTO usage (' . join(', ', @columns) . ') VALUES (' . join(', ', @row{@columns}) . ')');
}
there(q{INSERT INTO usage (external_id, provider, model, external_customer_id, raw_usage, usage_format)
	VALUES ('raw', 'p', 'm', 'c', '{"prompt_tokens": -4}', 'openai')});
there("$insert VALUES ('after', 'p', 'm', 'c', 7)");
arrived();
like(fate($_->[0]), qr/^rejected: .*$_->[3]/s, "rejected: $_->[1] = $_->[2]") for @bad;
like(fate('raw'), qr/^rejected: raw_usage/, 'a usage object that cannot be read');
$hub->wait_settled;
like(fate('after'), qr/^delivered/, 'the row after them is delivered');
is(hub(q{SELECT count(*) FROM usage WHERE cost_nanos IS NOT NULL AND external_id IN ('negative', 'many', 'nan', 'infinite')}), '0',
	'none of them has a cost');
is(hub(q{SELECT apply_error_count + sync_error_count FROM pg_stat_subscription_stats}), '0', 'the subscription has met no error');
there(q{UPDATE usage SET input_tokens = 7 WHERE external_id = 'negative'});
arrived();
$hub->wait_settled;
like(fate('negative'), qr/^delivered/, 'a row that is fixed there is released');

# A replica identity as a table of one's own may have it, of which no index can hold the key.
there(q{
CREATE TABLE own (LIKE usage INCLUDING DEFAULTS INCLUDING IDENTITY);
ALTER TABLE own REPLICA IDENTITY FULL;
CREATE PUBLICATION own FOR TABLE own;
INSERT INTO own (id, external_id, provider, model, external_customer_id, input_tokens)
	SELECT 1, 'own_' || i, 'p', 'm', 'c', 7 FROM generate_series(1, 3) i;
INSERT INTO own (id, external_id, provider, model, external_customer_id, input_tokens)
	SELECT 4, string_agg(md5(i::text), ''), 'p', 'm', 'c', 7 FROM generate_series(1, 200) i;
INSERT INTO own (id, external_id, tags, service_tier, occurred_at, provider, model, external_customer_id, input_tokens)
	SELECT 5, 'empty', '{}', 'standard', now(), 'p', 'm', 'c', 7});
hub(q{SELECT aibilling.create_usage_table('own', 'polar', replicated => true)});
subscribe('own', undef, undef, 'own');
$hub->wait_for_subscription_sync($publisher, 'own');
is(hub(q{SELECT count(*), count(DISTINCT id), max(length(external_id)) BETWEEN 256 AND 1100 FROM own}), '5|5|t',
	'ids that are published, all alike, and a key that no index can hold');
is(hub(q{SELECT count(*) FROM aibilling.outbox WHERE usage_table = 'own'::regclass AND state = 'rejected'}), '1',
	'the key is too long and rejected');
there(q{ALTER TABLE own ALTER COLUMN tags DROP NOT NULL, ALTER COLUMN occurred_at DROP NOT NULL, ALTER COLUMN external_id DROP NOT NULL, ALTER COLUMN service_tier DROP NOT NULL;
INSERT INTO own (id, external_id, tags, service_tier, occurred_at, provider, model, external_customer_id, input_tokens)
	VALUES (6, NULL, NULL, NULL, NULL, 'p', 'm', 'c', 7)});
$publisher->wait_for_catchup('own');
is(hub(q{SELECT count(*) FROM own WHERE tags = '{}' AND occurred_at IS NOT NULL AND service_tier = 'standard'}), '6', 'NULLs take the defaults');
there(q{UPDATE own SET id = id + 100, tags = '{"a": 1}' WHERE external_id = 'own_1'; UPDATE own SET external_id = 'own_2' WHERE external_id = 'own_3'});
$publisher->wait_for_catchup('own');
is(hub(q{SELECT count(*) FROM own WHERE id > 100}), '0', 'ids there are not ids here');
is(hub(q{SELECT count(*) FROM own WHERE external_id = 'own_3'}), '1', 'an external_id that another row has is not taken');

# ---------------------------------------------------------------------------
# UPDATE, DELETE, TRUNCATE
# ---------------------------------------------------------------------------

there('ALTER TABLE usage ADD COLUMN note text');
my $counted = q{INSERT INTO usage (external_id, provider, model, external_customer_id, raw_usage, usage_format)};
there("$counted VALUES ('counted', 'p', 'm', 'c', '{\"prompt_tokens\": 100, \"completion_tokens\": 10}', 'openai')");
arrived();
$hub->wait_settled;
is(hub(q{SELECT input_tokens, output_tokens, cost_nanos FROM usage WHERE external_id = 'counted'}), '100|10|120000',
	'a column added there is no obstacle; counts are filled in here');
my $offset = $hub->log_offset;
there(q{UPDATE usage SET note = 'seen' WHERE external_id = 'counted'});
there(q{UPDATE usage SET raw_usage = NULL WHERE external_id = 'counted'});
arrived();
is(hub(q{SELECT input_tokens, output_tokens, cost_nanos FROM usage WHERE external_id = 'counted'}), '100|10|120000',
	'an UPDATE that brings no other usage object changes nothing billed');
status_is('kept', '0', 'and is no change of what was billed');
there(q{UPDATE usage SET output_tokens = 99, tags = '{"late": true}' WHERE external_id IN ('plain', 'after')});
arrived();
is(hub(q{SELECT output_tokens, tags, cost_nanos FROM usage WHERE external_id = 'plain'}), '|{}|7000', 'a delivered row keeps what was billed');
status_is('kept', '2', 'which is counted');
like($hub->log_since($offset), qr/WARNING:  usage row \d+ of "usage" keeps what was billed: it has been delivered/, 'and warned of');
like($hub->status, qr/warning: 2 rows were changed at their publisher/, 'and shown');

hub('SELECT aibilling.pause()');
there("$insert SELECT 'waits_' || i, 'p', 'm', 'c', 7 FROM generate_series(1, 4) i");
there("$counted VALUES ('again', 'p', 'm', 'c', '{\"prompt_tokens\": 100}', 'openai')");
there(q{UPDATE usage SET output_tokens = 1 WHERE external_id = 'waits_1'});
there(q{UPDATE usage SET input_tokens = -1 WHERE external_id = 'waits_2'});
there(q{UPDATE usage SET external_id = 'other' WHERE external_id = 'waits_3'});
there(q{UPDATE usage SET raw_usage = '{"prompt_tokens": 200}' WHERE external_id = 'again'});
arrived();
is(hub(q{SELECT cost_nanos FROM usage WHERE external_id = 'waits_1'}), '9000', 'a waiting row is priced again');
like(fate('waits_2'), qr/^rejected/, 'or rejected');
is(hub(q{SELECT input_tokens, cost_nanos FROM usage WHERE external_id = 'again'}), '200|200000', 'another usage object is read');
is(hub(q{SELECT count(*) FROM usage WHERE external_id = 'other'}), '1', 'another external_id is taken');
there(q{ALTER PUBLICATION aibilling_usage SET (publish = 'insert, update, delete, truncate')});
there(q{DELETE FROM usage WHERE external_id = 'waits_4'});
arrived();
is(hub(q{SELECT count(*) FROM aibilling.outbox o WHERE o.usage_table = 'usage'::regclass AND NOT EXISTS (SELECT FROM usage u WHERE u.id = o.usage_id)}), '0',
	'a row that is deleted there leaves the outbox');
hub('SELECT aibilling.resume()');
$hub->wait_settled;
like(fate($_), qr/^delivered/, "$_ is delivered") for ('waits_1', 'other', 'again');

# What the rollup counts less the rows of the table, but those that are loaded only, and those that were delivered or in
# flight when they were deleted: rows, tokens and nanos.
hub('CREATE TABLE gone (LIKE usage)');

sub counted_beside
{
	return hub(q{
SELECT d.n - r.n || ' ' || d.tokens - r.tokens || ' ' || d.nanos - r.nanos
FROM (SELECT sum(usage_rows) AS n, sum(input_tokens) AS tokens, sum(cost_nanos) AS nanos FROM aibilling.usage_daily('usage')) d,
	(SELECT count(*) AS n, coalesce(sum(input_tokens), 0) AS tokens, coalesce(sum(cost_nanos), 0) AS nanos
	 FROM (SELECT u.* FROM usage u, aibilling.usage_status('usage', u.id) s WHERE s.state <> 'not_sent' UNION ALL TABLE gone) t) r});
}

# Rows in flight: the request is answered after they are gone.
my $beside = counted_beside();
my $vanished = hub(q{SELECT vanished FROM aibilling.status WHERE usage_table = 'usage'::regclass});
for my $gone (q{DELETE FROM usage WHERE external_id LIKE 'flying_%'}, 'TRUNCATE usage', 'TRUNCATE usage RESTART IDENTITY')
{
	$polar->fault(kind => 'hang', store => \1);
	there("$insert SELECT 'flying_' || i || now(), 'p', 'm', 'c', 7 FROM generate_series(1, 3) i");
	$polar->wait(hung => 1);
	hub(q{INSERT INTO gone SELECT u.* FROM usage u, aibilling.usage_status('usage', u.id) s WHERE s.state IN ('delivered', 'sending')}
		. ($gone =~ /DELETE/ ? q{ AND u.external_id LIKE 'flying_%'} : ''));
	there($gone);
	there("$insert VALUES ('next' || now(), 'p', 'm', 'c', 7)");
	arrived();
	is(counted_beside(), $beside, "the rollup counts them: $gone");
	$polar->clear_faults;
	$polar->release;
	$hub->wait_settled;
	is(counted_beside(), $beside, "... also when they are delivered");
	$vanished += 3;
	status_is('vanished', $vanished, "rows in flight are counted as vanished by $gone");
}
is(hub(q{SELECT count(*) FROM usage}), '1', 'the table is as it is there');
is(hub(q{SELECT apply_error_count + sync_error_count FROM pg_stat_subscription_stats WHERE subname = 'sidecar'}), '0',
	'the subscription has met no error');
there(q{ALTER PUBLICATION aibilling_usage SET (publish = 'insert, update')});

# ---------------------------------------------------------------------------
# Made again, and history
# ---------------------------------------------------------------------------

there("$insert SELECT 'twice_' || i, 'p', 'm', 'c', 7 FROM generate_series(1, 20) i");
arrived();
$hub->wait_settled;
my $events = $polar->summary->{inserted};
$offset = $hub->log_offset;
hub('DROP SUBSCRIPTION sidecar');
subscribe('sidecar', 'two_phase = on');
$hub->wait_for_subscription_sync($publisher, 'sidecar');
there("$insert VALUES ('fresh', 'p', 'm', 'c', 7)");
arrived();
$hub->wait_settled;
status_is('skipped', hub('SELECT count(*) - 1 FROM usage'), 'rows that come a second time are skipped and counted');
is(() = $hub->log_since($offset) =~ /the second one is skipped/g, 1, 'and warned of once');
is($polar->summary->{inserted}, $events + 1, 'nothing is sent twice');
is(hub(q{SELECT sum(duplicates) FROM aibilling.delivery}), '0', 'Polar was not asked to tell them apart');

# Prepared there, committed later: the worker hears of it at once, its poll comes after a minute.
there(q{BEGIN; } . "$insert VALUES ('prepared', 'p', 'm', 'c', 7)" . q{; PREPARE TRANSACTION 'x'});
arrived();
is(hub(q{SELECT count(*) FROM usage WHERE external_id = 'prepared'}), '0', 'a prepared row is not there yet');
there(q{COMMIT PREPARED 'x'});
$polar->wait(events => $events + 2);
pass('it is delivered when it is committed');

# ---------------------------------------------------------------------------
# A subscription that does not run
# ---------------------------------------------------------------------------

hub('ALTER SUBSCRIPTION sidecar DISABLE');
ok($hub->poll_query_until('postgres', q{SELECT lag IS NULL AND status ~ 'subscription "sidecar" is disabled' FROM aibilling.status WHERE usage_table = 'usage'::regclass}),
	'a subscription that is disabled shows');
hub('ALTER SUBSCRIPTION sidecar ENABLE');
$publisher->stop('immediate');
ok($hub->poll_query_until('postgres', q{SELECT lag IS NULL AND status ~ 'subscription "sidecar" does not run' FROM aibilling.status WHERE usage_table = 'usage'::regclass}),
	'and one that cannot connect');
$publisher->start;
there("$insert VALUES ('recovered', 'p', 'm', 'c', 7)");
arrived();
$hub->wait_settled;
$hub->stop('immediate');
there("$insert VALUES ('meanwhile', 'p', 'm', 'c', 7)");
$hub->start;
arrived();
$hub->wait_settled;
like(fate('meanwhile'), qr/^delivered/, 'what was written while the hub was down is delivered');

# ---------------------------------------------------------------------------
# The application's own table, captured where it arrives
# ---------------------------------------------------------------------------

my $calls = q{CREATE TABLE calls (id int PRIMARY KEY, user_id text, model text, done boolean DEFAULT true, tokens text)};
there("$calls; CREATE PUBLICATION calls FOR TABLE calls WITH (publish = 'insert, update'); INSERT INTO calls VALUES (0, 'captured', 'm', true, '100')");
hub($calls);
hub(q{SELECT aibilling.capture('calls', 'usage', $${"provider": "'p'", "input_tokens": "tokens"}$$, only_when => 'done', replicated => true)});
subscribe('calls', undef, undef, 'calls');
$hub->wait_for_subscription_sync($publisher, 'calls');
there(q{INSERT INTO calls VALUES (1, 'captured', 'm', true, '7'), (2, 'captured', 'm', false, NULL), (3, 'captured', 'm', true, 'many'), (4, 'captured', 'm', true, '-1')});
there(q{UPDATE calls SET done = true, tokens = '8' WHERE id = 2; UPDATE calls SET tokens = '9' WHERE id = 1});
$publisher->wait_for_catchup('calls');
$hub->wait_settled;
is(hub(q{SELECT split_part(external_id, ':', 2), input_tokens, cost_nanos FROM usage WHERE external_customer_id = 'captured' ORDER BY 1}),
	"0|100|100000\n1|7|7000\n2|8|8000\n4|-1|", 'rows of an application\'s own table are captured as they arrive');
is(hub('SELECT key, error FROM aibilling.capture_failure ORDER BY key'), qq{1|changed after capture\n3|invalid input syntax for type bigint: "many"},
	'what cannot be captured is told, and stops nothing');
like($hub->status, qr/warning: 2 rows that were to be captured need a look \(aibilling\.capture_failure\)/, 'also by status');
is(hub(q{SELECT apply_error_count + sync_error_count FROM pg_stat_subscription_stats WHERE subname = 'calls'}), '0', 'the subscription has met no error');
hub('DELETE FROM aibilling.capture_failure; DROP SUBSCRIPTION calls');

# ---------------------------------------------------------------------------
# Several databases without a hub share one limit
# ---------------------------------------------------------------------------

hub('ALTER SERVER polar OPTIONS (SET requests_per_minute \'300\')');
$polar->fault(kind => '429', retry_after => 3);
there("$insert VALUES ('limited', 'p', 'm', 'c', 7)");
ok($hub->wait_status('although only \d+ of the 300 requests were made .* other databases send to the same organization.*lower requests_per_minute'),
	'a limit that is reached by others is told apart from our own');
$hub->wait_settled;
hub('ALTER SERVER polar OPTIONS (SET requests_per_minute \'0\')');

# ---------------------------------------------------------------------------
# Attaching a table of one's own
# ---------------------------------------------------------------------------

sub refused
{
	my ($sql, $like) = @_;
	my ($status, $stdout, $stderr) = $hub->psql('postgres', $sql);

	like($stderr, $like, $sql);
	return;
}

hub('CREATE TABLE mine (LIKE own INCLUDING DEFAULTS)');
hub('ALTER TABLE mine ADD PRIMARY KEY (id)');
refused(q{SELECT aibilling.attach('mine', 'polar', replicated => true)}, qr/no unique index on column "external_id"/);
hub('ALTER TABLE mine ADD UNIQUE (external_id)');
refused(q{SELECT aibilling.attach('mine', 'polar', replicated => true)}, qr/column "id" of table "mine" has no default/);
hub('ALTER TABLE mine ALTER COLUMN id ADD GENERATED BY DEFAULT AS IDENTITY');
hub(q{SELECT aibilling.attach('mine', 'polar', replicated => true)});
is(hub(q{SELECT relreplident FROM pg_class WHERE relname = 'mine'}), 'i', 'external_id is made its replica identity');
refused(q{CREATE TABLE parted (LIKE own INCLUDING DEFAULTS, PRIMARY KEY (id, occurred_at)) PARTITION BY RANGE (occurred_at);
	SELECT aibilling.attach('parted', 'polar', replicated => true)}, qr/partitioned table "parted" cannot be fed by a subscription\nDETAIL:  No unique index on external_id alone.*\nHINT:  Use a table without partitions/);
refused(q{SELECT aibilling.attach('own', 'polar')}, qr/WARNING:  a subscription feeds table "own"/);

# What an update replaces keeps who may call it.
hub('CREATE DATABASE older; CREATE ROLE biller');
$hub->safe_psql('older', q{
CREATE EXTENSION aibilling_polar VERSION '1.1';
REVOKE EXECUTE ON FUNCTION aibilling.attach(regclass, name, text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION aibilling.attach(regclass, name, text) TO biller WITH GRANT OPTION;
ALTER EXTENSION aibilling_polar UPDATE});
is($hub->safe_psql('older', q{
SELECT p.proname, CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END, a.is_grantable
FROM pg_proc p, aclexplode(p.proacl) a
WHERE p.pronamespace = 'aibilling'::regnamespace AND p.proname IN ('attach', 'create_usage_table') AND a.grantee <> p.proowner ORDER BY 1}),
	"attach|biller|t\ncreate_usage_table|PUBLIC|f", 'the functions with a new argument have the grants of the old ones');

# The rule is the table's, whoever inserts.
hub(q{INSERT INTO mine (external_id, input_tokens) VALUES ('a', -1), ('a', 2)});
is(hub(q{SELECT count(*), min(input_tokens) FROM mine}), '1|-1', 'an INSERT here is not refused either');

done_testing();
