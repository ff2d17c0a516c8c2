# Rows of tables that are there already become usage rows, and no statement on these tables ever fails of it.

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

my $polar = PolarServer->new;
my $node = AibillingNode->new('main', conf => "aibilling_polar.poll_interval = 1\nmax_prepared_transactions = 5\n");

$node->create_server($polar, requests_per_minute => 0);
sql(q{
INSERT INTO aibilling.price (provider, model, input, output, cache_read, cache_write, cache_write_1h) VALUES
	('p', 'm', 1, 2, 0.5, 1, 2), ('openai', 'gpt-4o', 2.5, 10, 1.25, 2.5, 2.5), ('anthropic', 'claude-x', 3, 15, 0.3, 3.75, 6);
CREATE ROLE app LOGIN;
CREATE ROLE writer LOGIN;
CREATE ROLE other LOGIN;
GRANT USAGE ON FOREIGN SERVER polar TO app, other;
CREATE SCHEMA app AUTHORIZATION app;
GRANT USAGE ON SCHEMA app TO writer, other});
app(q{SELECT aibilling.create_usage_table('app.usage', 'polar')});

# Run as the superuser, or as a role; dies of an error.
sub sql
{
	my ($query) = @_;

	return $node->safe_psql('postgres', $query);
}

sub as
{
	my ($role, $query) = @_;

	return $node->safe_psql('postgres', $query, extra_params => [ '-U', $role ]);
}

sub app
{
	return as('app', @_);
}

# The message of an error, or what is said of none.
sub message
{
	my ($query, $role) = @_;
	my ($rc, $out, $err) = $node->psql('postgres', $query, extra_params => [ '-U', $role // 'app' ], on_error_stop => 1);

	return $err;
}

sub refused
{
	my ($query, $like, $role) = @_;

	like(message($query, $role), $like, $query =~ s/\s+/ /gr);
	return;
}

my $failures = 'SELECT key, error FROM aibilling.capture_failure ORDER BY key';
my $captured = q{SELECT regexp_replace(external_id, '^[0-9a-f]{12}:', ''), input_tokens, output_tokens, external_customer_id, cost_nanos FROM app.usage ORDER BY 1};

# ---------------------------------------------------------------------------
# A hand-made table, by its names alone
# ---------------------------------------------------------------------------

app(q{
CREATE TABLE app.llm_calls (id serial PRIMARY KEY, user_id int, model text, provider text, prompt_tokens int, completion_tokens int, cost_nanos int, created_at timestamp DEFAULT now());
GRANT INSERT, UPDATE, DELETE, SELECT ON app.llm_calls TO writer;
GRANT USAGE ON SEQUENCE app.llm_calls_id_seq TO writer;
INSERT INTO app.llm_calls (user_id, model, provider, prompt_tokens, completion_tokens) VALUES (1, 'm', 'p', 1, 1)});
my $shown = app(q{SELECT aibilling.capture_sql('app.llm_calls', 'app.usage')});
like($shown, qr/CREATE FUNCTION app\.aibilling_capture_llm_calls_[0-9a-f]{12}\(\) RETURNS trigger/, 'capture_sql shows the function');
like($shown, qr/\(prompt_tokens\n\)::bigint AS input_tokens/, 'and the mapping');
unlike($shown, qr/AS (id|cost_nanos)\b/, 'id and costs are not matched');
is(app('SELECT count(*) FROM pg_trigger WHERE tgname ~ \'aibilling_capture\'') . app('SELECT count(*) FROM aibilling.captures'), '00', 'and does nothing');
app(q{SELECT aibilling.capture('app.llm_calls', 'app.usage')});
as('writer', q{INSERT INTO app.llm_calls (user_id, model, provider, prompt_tokens, completion_tokens) SELECT 42, 'm', 'p', i, 1 FROM generate_series(1, 3) i});
is(sql($captured), "2|1|1|42|3000\n3|2|1|42|4000\n4|3|1|42|5000", 'rows of one who may not write the usage table are captured and priced, older ones are not');
$node->wait_settled;
is($polar->summary->{inserted}, 3, 'and delivered');
is(sql(q{SELECT count(*) FROM app.usage u JOIN aibilling.captures c ON u.external_id LIKE c.prefix || ':%'}), '3', 'external_id begins with the prefix');
is(sql(q{SELECT prosecdef, proowner::regrole, array_to_string(proconfig, ' ') ~ 'search_path=pg_catalog, pg_temp', has_function_privilege('writer', oid, 'EXECUTE')
	FROM pg_proc WHERE proname ~ '^aibilling_capture'}), 't|app|t|f', 'the function is the owner\'s, and nobody else\'s to call');
refused(q{SELECT aibilling.capture('app.llm_calls', 'app.usage')}, qr/rows of app.llm_calls are captured for app.usage already/);

# ---------------------------------------------------------------------------
# Whatever breaks, the statement does not
# ---------------------------------------------------------------------------

my $insert = q{INSERT INTO app.llm_calls (user_id, model, provider, prompt_tokens, completion_tokens) VALUES (7, 'm', 'p', 10, 1)};

as('writer', q{INSERT INTO app.llm_calls (user_id, model, provider, prompt_tokens, completion_tokens) VALUES (7, 'm', 'p', -1, 1), (7, 'm', 'p', 5, 1)});
like(app($failures), qr/^5\|.*negative/, 'a bad row is a failure');
is(sql(q{SELECT count(*) FROM app.usage WHERE input_tokens = 5}), '1', 'the good one beside it is captured');
is(as('other', 'SELECT count(*) FROM aibilling.capture_failure') . as('other', 'SELECT count(*) FROM aibilling.captures'), '00', 'others see none of it');
as('writer', q{UPDATE app.llm_calls SET prompt_tokens = 1 WHERE id = 5});
is(app($failures) . sql(q{SELECT count(*) FROM app.usage WHERE external_id LIKE '%:5'}), '1', 'a failure that is fixed by an UPDATE is captured');

my @broken = (
	[ 'the usage table has lost a column', 'ALTER TABLE app.usage RENAME output_tokens TO gone', 'ALTER TABLE app.usage RENAME gone TO output_tokens' ],
	[ 'the usage table has got a constraint', 'ALTER TABLE app.usage ADD CONSTRAINT no CHECK (input_tokens <> 10) NOT VALID', 'ALTER TABLE app.usage DROP CONSTRAINT no' ],
	[ 'the usage table has a trigger that fails', q{CREATE FUNCTION app.no() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RAISE 'no'; END$$;
		CREATE TRIGGER no BEFORE INSERT ON app.usage FOR EACH ROW EXECUTE FUNCTION app.no()}, 'DROP TRIGGER no ON app.usage' ],
	[ 'rights are gone', 'REVOKE ALL ON app.usage FROM app', 'GRANT ALL ON app.usage TO app' ],
	[ 'the usage table belongs to another', 'ALTER TABLE app.usage OWNER TO other', 'ALTER TABLE app.usage OWNER TO app' ],
	[ 'the usage table cannot be found', 'ALTER SCHEMA app RENAME TO moved', 'ALTER SCHEMA moved RENAME TO app' ],
	[ 'prices cannot be read', 'ALTER TABLE aibilling.price RENAME COLUMN input TO gone', 'ALTER TABLE aibilling.price RENAME COLUMN gone TO input' ],
	[ 'the column is read as another type', 'ALTER TABLE app.llm_calls RENAME prompt_tokens TO gone', 'ALTER TABLE app.llm_calls RENAME gone TO prompt_tokens' ],
);
for my $broken (@broken)
{
	my ($what, $break, $fix) = @$broken;
	my $statement = $what =~ /found/ ? $insert =~ s/app\./moved./r : $what =~ /read as/ ? $insert =~ s/prompt_tokens/gone/r : $insert;

	$statement =~ s/10, 1/11, 1/ if $what !~ /constraint/;
	sql($break);
	my $message = message($statement, 'writer');
	unlike($message, qr/ERROR/, "$what: the statement does not fail");
	sql($fix);
	app(q{SELECT aibilling.capture_retry('app.llm_calls')});
	is(app($failures), '', "$what: the row is captured by retry");
	is(sql(q{SELECT count(*) FROM app.llm_calls l WHERE id > 1 AND NOT EXISTS (SELECT FROM app.usage u WHERE u.external_id LIKE '%:' || l.id)}), '0', "$what: all rows are");
}

sql('REVOKE ALL ON aibilling.capture_failure FROM PUBLIC');
app('ALTER TABLE app.usage ADD CONSTRAINT no CHECK (input_tokens <> 12) NOT VALID');
like(message($insert =~ s/10, 1/12, 1/r, 'writer'), qr/WARNING:  rows of app.llm_calls are not captured/, 'what cannot even be noted is warned of');
sql('GRANT SELECT, INSERT, UPDATE, DELETE ON aibilling.capture_failure TO PUBLIC');
app('ALTER TABLE app.usage DROP CONSTRAINT no');

# What is the statement's own
my $session = $node->background_psql('postgres', extra_params => [ '-U', 'app' ], on_error_stop => 0);
$session->query_safe('BEGIN; LOCK TABLE app.usage');
like(message("SET lock_timeout = 10; $insert", 'writer') . app($failures), qr/^\d+\|canceling statement due to lock timeout$/, 'a lock timeout is no error of the statement');
like(message("SET statement_timeout = 200; $insert", 'writer'), qr/ERROR:  canceling statement due to statement timeout/, 'a cancel is');
$session->query_safe('COMMIT');
$session->quit;
is(app(q{SELECT aibilling.capture_retry('app.llm_calls')}), '1', 'retry captures it');
app(q{ALTER TABLE app.usage ADD CONSTRAINT one UNIQUE (generation_id) DEFERRABLE INITIALLY DEFERRED});
app(q{SELECT aibilling.release('app.llm_calls', 'app.usage'); SELECT aibilling.capture('app.llm_calls', 'app.usage', $${"generation_id": "'same'"}$$)});
like(message("$insert; $insert", 'writer'), qr/ERROR:  duplicate key value violates unique constraint "one"/, 'and so is a deferred constraint');
app(q{ALTER TABLE app.usage DROP CONSTRAINT one});

# ---------------------------------------------------------------------------
# Released and captured again
# ---------------------------------------------------------------------------

my $prefix = app(q{SELECT prefix FROM aibilling.captures});
app(q{SELECT aibilling.release('app.llm_calls', 'app.usage')});
is(sql(q{SELECT count(*) FROM pg_proc WHERE proname ~ '^aibilling_capture'}), '0', 'release leaves no function');
as('writer', $insert);
is(sql(q{SELECT count(*) FROM app.llm_calls l WHERE NOT EXISTS (SELECT FROM app.usage u WHERE u.external_id LIKE '%:' || l.id) AND prompt_tokens = 10}) > 0, 1, 'and captures nothing');
my $there = sql('SELECT count(*) FROM app.usage');
refused(q{SELECT aibilling.release('app.llm_calls', 'app.usage')}, qr/are not captured/);
app(q{SELECT aibilling.capture('app.llm_calls', 'app.usage', existing => 'send')});
is(app(q{SELECT prefix FROM aibilling.captures}), $prefix, 'the prefix stays');
is(sql('SELECT count(*) FROM app.usage'), sql('SELECT count(*) FROM app.llm_calls'), 'existing => send takes what is not there yet');
$node->wait_settled;
$node->sums_equal($polar, 'everything has arrived once', 'app.usage');

# ---------------------------------------------------------------------------
# Rows that become complete, and change
# ---------------------------------------------------------------------------

app(q{
CREATE TABLE app.message (chat text, n int, usage json, done boolean, note text, content json, PRIMARY KEY (chat, n));
INSERT INTO app.message VALUES ('old', 1, '{"in": 1, "out": 2}', true), ('old', 2, NULL, false);
SELECT aibilling.capture('app.message', 'app.usage', only_when => 'done AND usage IS NOT NULL',
	columns => '{"input_tokens": "usage->>''in''", "output_tokens": "usage->>''out''", "external_customer_id": "chat", "provider": "''p''", "model": "''m''"}');
INSERT INTO app.message VALUES ('new', 1, NULL, false);
UPDATE app.message SET note = 'x'});
my $messages = q{SELECT (split_part(external_id, ':', 2)::jsonb), input_tokens, output_tokens FROM app.usage WHERE external_customer_id IN ('old', 'new') ORDER BY id};
is(sql($messages), '', 'nothing is complete');
app(q{UPDATE app.message SET usage = '{"in": 5, "out": 6}', done = true WHERE n = 1 AND chat = 'new' OR n = 2});
is(sql($messages), qq{["old", 2]|5|6\n["new", 1]|5|6}, 'rows are captured when they are complete, by a key of two columns');
app(q{UPDATE app.message SET note = 'y'});
is(app($failures), '', 'another column is no change');
app(q{UPDATE app.message SET usage = '{"in": 50, "out": 6}' WHERE chat = 'new'});
app(q{UPDATE app.message SET usage = '{"in": 50, "out": 6}' WHERE chat = 'old' AND n = 1});
is(app($failures), '["new", 1]|changed after capture', 'a change of a captured row shows');
is(app(q{SELECT aibilling.capture_retry('app.message')}) . app($failures), '0["new", 1]|changed after capture', 'retry does not make it go away');
app(q{DELETE FROM aibilling.capture_failure; UPDATE app.message SET done = false WHERE n = 2});
is(app($failures), '["old", 2]|changed after capture', 'a row that is incomplete again has changed');
app(q{UPDATE app.message SET done = true WHERE n = 2});
is(app($failures), '', 'until it is what it was');
app(q{DELETE FROM app.message WHERE chat = 'new'; INSERT INTO app.message VALUES ('new', 1, '{"in": 5, "out": 6}', true), ('new', 3, '{"in": 9}', true)});
is(app($failures), '', 'a row that is inserted again is the same');
app(q{DELETE FROM app.message WHERE chat = 'new'; INSERT INTO app.message VALUES ('new', 1, '{"in": 7, "out": 6}', true)});
like(app($failures), qr/\["new", 1\]\|changed after capture/, 'or another');
is(sql($messages), qq{["old", 2]|5|6\n["new", 1]|5|6\n["new", 3]|9|}, 'nothing is billed twice');
app(q{DELETE FROM app.message WHERE n = 3});
app(q{UPDATE app.message SET n = 9 WHERE chat = 'new'; DELETE FROM aibilling.capture_failure});
is(sql($messages), qq{["old", 2]|5|6\n["new", 1]|5|6\n["new", 3]|9|}, 'not even under another key');
app(q{INSERT INTO app.message VALUES ('new', 2, '{"in": "many"}', true)});
like(app($failures), qr/^\["new", 2\]\|invalid input syntax for type bigint: "many"/, 'a mapping that fails');
app(q{UPDATE app.message SET usage = '{"in": 8}' WHERE chat = 'new' AND n = 2});
is(app($failures), '', 'until it does not');

# What jsonb cannot hold
app(q{INSERT INTO app.message (chat, n, usage, done, content) VALUES ('nul', 1, '{"in": 3}', true, '"\u0000"'), ('nul', 2, '{"in": -3}', true, NULL)});
is(app($failures), qq{["nul", 1]|unsupported Unicode escape sequence\n["nul", 2]|unsupported Unicode escape sequence}, 'rows that are no jsonb are noted by their keys');
is(app(q{SELECT aibilling.capture_retry('app.message')}), '1', 'and tried again from their table');
like(app($failures), qr/^\["nul", 2\]\|.*negative/, 'each for itself');
app(q{DELETE FROM aibilling.capture_failure; UPDATE app.message SET note = 'z' WHERE chat = 'nul' AND n = 1});
like(app($failures), qr/^\["nul", 1\]\|unsupported/, 'an UPDATE of such a row shows');
is(app(q{SELECT aibilling.capture_retry('app.message')}), '1', 'retry finds that nothing has changed');
app(q{DELETE FROM app.message WHERE chat = 'nul'; DELETE FROM aibilling.capture_failure});

# ---------------------------------------------------------------------------
# Partitions
# ---------------------------------------------------------------------------

app(q{
CREATE TABLE app.parted (id int, day date, user_id text, model text, provider text, prompt_tokens int, PRIMARY KEY (id, day)) PARTITION BY RANGE (day);
CREATE TABLE app.parted_1 PARTITION OF app.parted FOR VALUES FROM ('2026-01-01') TO ('2026-02-01');
SELECT aibilling.capture('app.parted', 'app.usage', '{"occurred_at": "day"}');
CREATE TABLE app.parted_2 (prompt_tokens int, day date NOT NULL, id int NOT NULL, provider text, model text, user_id text);
ALTER TABLE app.parted ATTACH PARTITION app.parted_2 FOR VALUES FROM ('2026-02-01') TO ('2026-03-01');
INSERT INTO app.parted VALUES (1, '2026-01-05', 'parted', 'm', 'p', 1), (2, '2026-02-05', 'parted', 'm', 'p', 2);
INSERT INTO app.parted_1 VALUES (3, '2026-01-06', 'parted', 'm', 'p', 3);
INSERT INTO app.parted_2 (id, day, user_id, model, provider, prompt_tokens) VALUES (4, '2026-02-06', 'parted', 'm', 'p', 4)});
is(sql(q{SELECT string_agg(input_tokens || ' ' || occurred_at::date, ', ' ORDER BY input_tokens) FROM app.usage WHERE external_customer_id = 'parted'}),
	'1 2026-01-05, 2 2026-02-05, 3 2026-01-06, 4 2026-02-06', 'rows of a partitioned table, also those inserted into a partition');
app(q{
CREATE FUNCTION app.echo() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN INSERT INTO app.parted_1 VALUES (NEW.id + 100, '2026-01-07', 'parted', 'm', 'p', NEW.id + 100); RETURN NEW; END$$;
CREATE TRIGGER echo BEFORE INSERT ON app.parted_2 FOR EACH ROW EXECUTE FUNCTION app.echo();
INSERT INTO app.parted VALUES (11, '2026-02-05', 'parted', 'm', 'p', 11), (12, '2026-01-05', 'parted', 'm', 'p', -12);
BEGIN;
SAVEPOINT s;
INSERT INTO app.parted VALUES (21, '2026-01-05', 'parted', 'm', 'p', 21);
ROLLBACK TO s;
INSERT INTO app.parted_1 VALUES (22, '2026-01-05', 'parted', 'm', 'p', 22);
COMMIT;
INSERT INTO app.parted VALUES (23, '2026-02-05', 'parted', 'm', 'p', 23), (1, '2026-01-05', 'parted', 'm', 'p', 1) ON CONFLICT DO NOTHING;});
is(sql(q{SELECT string_agg(input_tokens::text, ' ' ORDER BY input_tokens) FROM app.usage WHERE external_customer_id = 'parted' AND input_tokens > 4}),
	'11 22 23 111 123', 'whatever else the statement does to partitions meanwhile');
like(app($failures), qr/^\[12, "2026-01-05"\]\|.*negative, but is -12$/, 'a bad row of a partition is a failure');
app(q{DELETE FROM aibilling.capture_failure});

# ---------------------------------------------------------------------------
# History
# ---------------------------------------------------------------------------

app(q{
CREATE TABLE app.history (k text, s smallint, user_id text DEFAULT 'history', prompt_tokens int, UNIQUE (k, s));
ALTER TABLE app.history ALTER COLUMN k SET NOT NULL, ALTER COLUMN s SET NOT NULL;
INSERT INTO app.history SELECT 'o''k ' || i / 3, i % 3, 'history', CASE i WHEN 15000 THEN -1 ELSE 1 END FROM generate_series(1, 110000) i});
like(message(q{SELECT aibilling.capture('app.history', 'app.usage', $${"provider": "'p'", "model": "'m'"}$$, existing => 'load')}),
	qr/NOTICE:  100000 rows of app.history are read, 99999 of them captured\n.*NOTICE:  109999 rows of app.history that were there are captured, and not sent/s, 'progress is told');
like(app($failures), qr/negative/, 'a bad row of history is a failure');
is(sql(q{SELECT count(*), sum(cost_nanos) FROM app.usage WHERE external_customer_id = 'history'}), '109999|109999000', 'history is priced');
is(sql(q{SELECT count(*) FROM aibilling.outbox WHERE state <> 'rejected'}), '0', 'and not sent');
app(q{SELECT aibilling.capture_history('app.history', 'app.usage', 'load')});
is(sql(q{SELECT count(*) FROM app.usage WHERE external_customer_id = 'history'}), '109999', 'and not captured again');
is(app('SHOW aibilling_polar.enqueue'), 'on', 'later rows are sent');
app(q{SELECT aibilling.release('app.history', 'app.usage'); DELETE FROM aibilling.capture_failure; DELETE FROM app.usage WHERE external_customer_id = 'history'});

# ---------------------------------------------------------------------------
# Presets
# ---------------------------------------------------------------------------

app(q{
CREATE TABLE app."LiteLLM_SpendLogs" (
	"request_id" TEXT NOT NULL PRIMARY KEY, "call_type" TEXT NOT NULL, "api_key" TEXT NOT NULL DEFAULT '', "spend" DOUBLE PRECISION NOT NULL DEFAULT 0.0,
	"total_tokens" INTEGER NOT NULL DEFAULT 0, "prompt_tokens" INTEGER NOT NULL DEFAULT 0, "completion_tokens" INTEGER NOT NULL DEFAULT 0,
	"startTime" TIMESTAMP(3) NOT NULL, "endTime" TIMESTAMP(3) NOT NULL, "model" TEXT NOT NULL DEFAULT '', "custom_llm_provider" TEXT DEFAULT '',
	"user" TEXT DEFAULT '', "metadata" JSONB DEFAULT '{}', "cache_hit" TEXT DEFAULT '', "team_id" TEXT, "end_user" TEXT, "status" TEXT);
SELECT aibilling.capture('app."LiteLLM_SpendLogs"', 'app.usage', preset => 'litellm');
INSERT INTO app."LiteLLM_SpendLogs"(request_id,call_type,cache_hit,"startTime","endTime",model,"user",team_id,metadata,
  spend,total_tokens,prompt_tokens,completion_tokens,end_user,custom_llm_provider,status)
VALUES ('chatcmpl-0001','acompletion','None','2026-03-24 22:02:42.975','2026-03-24 22:02:42.989','gpt-4o','','',
 '{"additional_usage_values":{"completion_tokens_details":null,"prompt_tokens_details":null}}',
 0.00022500000000000002,30,10,20,'customer_1','openai','success'),
 ('failed','acompletion','None','2026-03-24 22:02:43','2026-03-24 22:02:43','gpt-4o','','','{}',0,0,0,0,'customer_1','openai','failure'),
 ('hit','acompletion','True','2026-03-24 22:02:43','2026-03-24 22:02:43','gpt-4o','','','{}',0,30,10,20,'customer_1','openai','success'),
 ('cached','acompletion','None','2026-03-24 22:02:44','2026-03-24 22:02:44','claude-x','u','',
 '{"usage_object": {"total_tokens":103925,"prompt_tokens":98805,"completion_tokens":5120,
 "prompt_tokens_details":{"text_tokens":null,"audio_tokens":null,"image_tokens":null,"cached_tokens":66360,"cache_creation_tokens":32435},
 "cache_read_input_tokens":66360,"cache_creation_input_tokens":32435,
 "completion_tokens_details":{"text_tokens":null,"audio_tokens":null,"reasoning_tokens":1710}}}',
 0,103925,98805,5120,'','anthropic','success')});
is(sql(q{SELECT generation_id, provider, external_customer_id, occurred_at AT TIME ZONE 'UTC', input_tokens, cache_read_tokens, cache_write_tokens, output_tokens, reasoning_tokens, cost_status, cost_cents
	FROM app.usage WHERE generation_id IN ('chatcmpl-0001', 'failed', 'hit', 'cached') ORDER BY id}),
	"chatcmpl-0001|openai|customer_1|2026-03-24 22:02:42.975|10|||20||reported|0.0225\n"
	  . 'cached|anthropic|u|2026-03-24 22:02:44|98805|66360|32435|5120|1710|priced|21.836925', 'litellm');

app(q{
CREATE TYPE app."ObservationType" AS ENUM ('SPAN', 'EVENT', 'GENERATION');
CREATE TABLE app.traces (id text PRIMARY KEY, user_id text, session_id text);
CREATE TABLE app.observations (id text PRIMARY KEY, trace_id text, project_id text NOT NULL, type app."ObservationType" NOT NULL, start_time timestamp(3) NOT NULL DEFAULT now(),
	end_time timestamp(3), name text, model text, prompt_tokens int NOT NULL DEFAULT 0, completion_tokens int NOT NULL DEFAULT 0, total_tokens int NOT NULL DEFAULT 0, unit text,
	total_cost numeric(65,30), calculated_total_cost numeric(65,30), UNIQUE (id, project_id));
SELECT aibilling.capture('app.observations', 'app.usage', preset => 'langfuse');
INSERT INTO app.traces VALUES ('t1', 'u1');
INSERT INTO app.observations (id, trace_id, project_id, type, start_time, model, prompt_tokens, completion_tokens) VALUES
	('g1', 't1', 'p', 'GENERATION', '2026-03-24 22:00', 'gpt-4o', 0, 0), ('s1', 't1', 'p', 'SPAN', '2026-03-24 22:00', NULL, 0, 0);
UPDATE app.observations SET end_time = now(), prompt_tokens = 100, completion_tokens = 10});
is(sql(q{SELECT generation_id, provider, model, external_customer_id, input_tokens, output_tokens, cost_nanos, tags FROM app.usage WHERE generation_id IN ('g1', 's1')}),
	'g1|openai|gpt-4o|u1|100|10|350000|{"trace_id": "t1", "project_id": "p"}', 'langfuse');

app(q{
CREATE TABLE app.chat_message (id text PRIMARY KEY, chat_id text NOT NULL, user_id text, role text NOT NULL, parent_id text, content json, model_id text, done boolean DEFAULT true,
	usage json, created_at bigint, updated_at bigint);
SELECT aibilling.capture('app.chat_message', 'app.usage', preset => 'open_webui');
INSERT INTO app.chat_message VALUES ('c1-m8', 'c1', 'u7', 'user', NULL, '"Hi"', NULL, true, NULL, 1763800000, 1763800000),
	('c1-m9', 'c1', 'u7', 'assistant', 'm8', '"H"', 'gpt-4o', false, NULL, 1763800000, 1763800000);
INSERT INTO app.chat_message VALUES ('c1-m9', 'c1', 'u7', 'assistant', 'm8', '"Hi"', 'gpt-4o', true,
	'{"prompt_tokens":120,"completion_tokens":30,"total_tokens":150,"prompt_tokens_details":{"cached_tokens":20},"input_tokens":120,"output_tokens":30}', 1763800000, 1763800003)
	ON CONFLICT (id) DO UPDATE SET content = excluded.content, done = excluded.done, usage = excluded.usage, updated_at = excluded.updated_at});
is(sql(q{SELECT generation_id, provider, external_customer_id, input_tokens, cache_read_tokens, output_tokens, occurred_at AT TIME ZONE 'UTC', cost_nanos FROM app.usage WHERE generation_id ~ '^c1'}),
	'c1-m9|openai|u7|120|20|30|2025-11-22 08:26:40|575000', 'open_webui');
app(q{UPDATE app.chat_message SET usage = '{"input_tokens":220,"output_tokens":60}' WHERE id = 'c1-m9'});
is(app(q{SELECT key, error FROM aibilling.capture_failure WHERE source = 'app.chat_message'::regclass}), 'c1-m9|changed after capture', 'usage that is merged later shows');

# ---------------------------------------------------------------------------
# What cannot be captured, and mappings that are none
# ---------------------------------------------------------------------------

app(q{
CREATE VIEW app.view AS SELECT * FROM app.llm_calls;
CREATE TABLE app.keyless (user_id text, prompt_tokens int);
CREATE TABLE app.nullable (k int UNIQUE, prompt_tokens int);
CREATE TABLE app.unattached (LIKE app.usage INCLUDING ALL);
CREATE TABLE app.source (id int PRIMARY KEY, tenant text, prompt_tokens int, model text);
CREATE TABLE app.anthropic (id int PRIMARY KEY, input_tokens int, cache_read_input_tokens int);
CREATE FUNCTION app.fails() RETURNS int LANGUAGE plpgsql AS $$BEGIN INSERT INTO app.keyless VALUES ('trace', 1); RAISE 'side effect'; END$$});
sql(q{CREATE SCHEMA other AUTHORIZATION other; CREATE TABLE other.source (LIKE app.source INCLUDING ALL); ALTER TABLE other.source OWNER TO other; GRANT USAGE ON SCHEMA other TO app});
my $into = q{'app.usage'};
refused("SELECT aibilling.capture('app.view', $into)", qr/app.view is not a table that can be captured/);
refused("SELECT aibilling.capture('app.keyless', $into)", qr/table app.keyless has no key/);
refused("SELECT aibilling.capture('app.nullable', $into)", qr/table app.nullable has no key/);
refused("SELECT aibilling.capture('app.parted_1', $into)", qr/app.parted_1 is a partition/);
refused("SELECT aibilling.capture('app.usage', $into)", qr/app.usage is the usage table itself/);
refused("SELECT aibilling.capture('app.source', 'app.unattached')", qr/table app.unattached is not attached/);
refused("SELECT aibilling.capture('other.source', $into)", qr/must be owner of table other.source/);
refused("SELECT aibilling.capture('other.source', $into)", qr/must be owner of table app.usage/, 'other');
refused("SELECT aibilling.capture('other.source', $into)", qr/belong to different roles/, $node->safe_psql('postgres', 'SELECT current_user'));
refused("SELECT aibilling.capture('app.source', $into, NULL, 'litelm')", qr/unknown preset "litelm".*\n.*Perhaps you meant "litellm"/);
refused("SELECT aibilling.capture('app.source', $into, preset => 'litellm')", qr/preset "litellm" is not for table app.source.*\n.*lacks "request_id"/);
refused("SELECT aibilling.capture('app.source', $into, existing => 'sent')", qr/invalid value for parameter "existing": "sent".*\n.*'send'/);
refused("SELECT aibilling.capture('app.source', $into, replicated => true)", qr/do not fire for what a subscription brings/);
refused("SELECT aibilling.capture('app.anthropic', $into)", qr/cannot be told whether the input tokens/);
refused("SELECT aibilling.capture('app.source', $into, '[]')", qr/columns must be a JSON object/);
refused("SELECT aibilling.capture('app.source', $into, '{\"$_\": \"1\"}')", qr/is filled by the extension/) for ('id', 'cost_nanos', 'cost_cents', 'cost_status');
refused("SELECT aibilling.capture('app.source', $into, '{\"input_token\": \"1\"}')", qr/has no column "input_token".*\n.*Perhaps you meant "input_tokens"/);
refused("SELECT aibilling.capture('app.source', $into, '{\"input_tokens\": \"$_->[0]\"}')", $_->[1]) for (
	[ 'nonsense', qr/cannot map input_tokens of app.usage: column "nonsense" does not exist/ ],
	[ 'promt_tokens', qr/column "promt_tokens" does not exist\n.*\n.*Perhaps you meant/ ],
	[ '', qr/cannot map input_tokens/ ],
	[ 'prompt_tokens +', qr/syntax error/ ],
	[ '1, 2', qr/cannot map input_tokens/ ],
	[ '1) FROM app.source; DROP TABLE app.source; --', qr/cannot map input_tokens/ ],
	[ '1)::int8, (2', qr/not one expression/ ],
	[ 'count(*)', qr/not an expression over one row/ ],
	[ 'generate_series(1, 2)', qr/not an expression over one row/ ],
	[ 'row_number() OVER ()', qr/not an expression over one row/ ],
	[ 'tenant IS NULL', qr/cannot cast type boolean to bigint/ ],
	[ 'no_function(1)', qr/function no_function\(integer\) does not exist/ ]);
refused("SELECT aibilling.capture('app.source', $into, '{\"input_tokens\": true}')", qr/no SQL expression: true/);
refused("SELECT aibilling.capture('app.source', $into, only_when => 'tenent')", qr/cannot map only_when.*column "tenent" does not exist/);
refused("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT aibilling.capture('app.source', $into, existing => 'send')", qr/isolation level repeatable read/);
app(qq{SELECT aibilling.capture('app.source', $into, '{"input_tokens": "app.fails()", "external_customer_id": "tenant"}')});
app(q{INSERT INTO app.source VALUES (1, 'a', 1, 'm')});
like(app(q{SELECT error FROM aibilling.capture_failure WHERE source = 'app.source'::regclass}) . app('SELECT count(*) FROM app.keyless'), qr/^side effect0$/, 'side effects of a mapping that fails are undone');

# Serialization failures are the statement's own.
$session = $node->background_psql('postgres', extra_params => [ '-U', 'app' ], on_error_stop => 0);
app(q{CREATE TABLE app.counter (n int); INSERT INTO app.counter VALUES (0);
CREATE FUNCTION app.counts() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN UPDATE app.counter SET n = n + 1; RETURN NEW; END$$;
CREATE TRIGGER counts BEFORE INSERT ON app.usage FOR EACH ROW EXECUTE FUNCTION app.counts()});
$session->query_safe('BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1');
app('UPDATE app.counter SET n = n + 1');
$session->query($insert);
like($session->{stderr}, qr/could not serialize access/, 'a serialization failure is the statement\'s own');
$session->query('ROLLBACK');
$session->quit;
app('DROP TRIGGER counts ON app.usage');

$node->wait_settled;
$node->sums_equal($polar, 'all that was captured has arrived, once', q{app.usage u WHERE u.id IN (SELECT i FROM aibilling.delivery d, unnest(d.usage_ids) r, generate_series(lower(r), upper(r) - 1) i)});
sql('DROP EXTENSION aibilling_polar CASCADE');
unlike(message($insert, 'writer'), qr/ERROR/, 'not even the extension\'s end breaks a statement');

done_testing();
