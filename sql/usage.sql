-- The usage table: creating, attaching, what an INSERT, UPDATE and DELETE do to rows and outbox.
SET timezone = 'UTC';
SELECT aibilling.convert_cost(1, 'base', 'nanos'); -- loads the library

CREATE SERVER polar FOREIGN DATA WRAPPER polar OPTIONS (url 'http://127.0.0.1:1', event_name 'llm_usage');
CREATE SERVER other FOREIGN DATA WRAPPER polar OPTIONS (url 'http://127.0.0.1:1', event_name 'other');
CREATE SERVER list FOREIGN DATA WRAPPER polar
	OPTIONS (kind 'prices', url 'https://prices.example/list', format 'litellm');
INSERT INTO aibilling.price (provider, model, input, output, cache_read)
VALUES ('acme', 'm', 1, 10, 0.1), ('acme', 'free', 0, 0, 0);

-- Without a usage table.
SELECT usage_table, server, regexp_replace(status, 'no worker: .*', 'no worker') AS status FROM aibilling.status;

--
-- Creating
--
SELECT aibilling.create_usage_table('u', server => 'polar');
SELECT pg_get_expr(adbin, adrelid) = CASE WHEN current_setting('server_version_num')::int >= 180000
	THEN '(uuidv7())::text' ELSE '(gen_random_uuid())::text' END AS as_expected
FROM pg_attrdef JOIN pg_attribute a ON adrelid = attrelid AND adnum = attnum
WHERE attrelid = 'u'::regclass AND attname = 'external_id';
BEGIN;
ALTER TABLE u ALTER external_id SET DEFAULT gen_random_uuid()::text; -- as it is before 18
\d u
ROLLBACK;
SELECT usage, server, blocked_reason FROM aibilling.usage_table;
SELECT attname, col_description(attrelid, attnum) FROM pg_attribute
WHERE attrelid = 'u'::regclass AND attname LIKE 'cost%' ORDER BY attnum;
CREATE SCHEMA "Some Schema";
SELECT aibilling.create_usage_table('"Some Schema"."Usage ""of"" AI"', server => 'other');
\set VERBOSITY terse
SELECT aibilling.create_usage_table('u', server => 'polar');
\set VERBOSITY default
SELECT aibilling.create_usage_table('nowhere.u', server => 'polar');
SELECT aibilling.create_usage_table('a b', server => 'polar');
SELECT aibilling.create_usage_table('v', server => 'polaar');
SELECT aibilling.create_usage_table('v', server => 'list');
SELECT to_regclass('v') IS NULL AS nothing_left;
INSERT INTO "Some Schema"."Usage ""of"" AI" (provider, model, external_customer_id, input_tokens)
VALUES ('acme', 'm', 'c', 1000) RETURNING cost_nanos, cost_cents, cost_status;
SELECT usage_table, usage_id, state FROM aibilling.outbox;
SELECT usage_id, state, event ->> 'name' AS name FROM aibilling.preview('"Some Schema"."Usage ""of"" AI"');

-- Its outbox goes with it.
DROP TABLE "Some Schema"."Usage ""of"" AI";
SELECT count(*) FROM aibilling.outbox;

--
-- Attaching
--
CREATE TABLE own (LIKE u INCLUDING DEFAULTS);
SELECT aibilling.attach('own', 'polar');
CREATE INDEX own_key ON own (external_id, id);
SELECT aibilling.attach('own', 'polar');
DROP INDEX own_key;
CREATE INDEX own_partial ON own (id) WHERE id > 5;
SELECT aibilling.attach('own', 'polar');
CREATE INDEX own_plain ON own (id);
SELECT aibilling.attach('own', 'polar');
CREATE UNIQUE INDEX own_wide ON own (id, external_id);
SELECT aibilling.attach('own', 'polar');
ALTER TABLE own ADD CONSTRAINT own_deferred UNIQUE (id) DEFERRABLE;
SELECT aibilling.attach('own', 'polar');
DROP INDEX own_plain, own_wide;
ALTER TABLE own DROP CONSTRAINT own_deferred;
CREATE UNIQUE INDEX own_id ON own (id) INCLUDE (external_id);
ALTER TABLE own ALTER id DROP NOT NULL;
INSERT INTO own (id) VALUES (NULL);
SELECT aibilling.attach('own', 'polar', existing => 'send');
DROP INDEX own_id;
DELETE FROM own;
ALTER TABLE own ADD PRIMARY KEY (id);
ALTER TABLE own DROP COLUMN units, DROP COLUMN tags;
SELECT aibilling.attach('own', 'polar');
ALTER TABLE own ADD COLUMN units json, ADD COLUMN tags jsonb DEFAULT '{}' NOT NULL;
SELECT aibilling.attach('own', 'polar');
ALTER TABLE own ALTER COLUMN units TYPE jsonb;
ALTER TABLE own ALTER COLUMN id TYPE numeric;
SELECT aibilling.attach('own', 'polar');
ALTER TABLE own ALTER COLUMN id TYPE bigint;

CREATE VIEW own_view AS SELECT * FROM own;
CREATE TEMP TABLE own_temp (LIKE u INCLUDING ALL);
CREATE TABLE parts (LIKE u INCLUDING DEFAULTS) PARTITION BY RANGE (occurred_at);
ALTER TABLE parts ADD PRIMARY KEY (id, occurred_at);
CREATE TABLE part_2025 PARTITION OF parts FOR VALUES FROM ('2025-01-01') TO ('2026-01-01');
CREATE TABLE part_2026 PARTITION OF parts FOR VALUES FROM ('2026-01-01') TO ('2027-01-01');
SELECT aibilling.attach('own_view', 'polar');
SELECT aibilling.attach('own_temp', 'polar');
SELECT aibilling.attach('part_2025', 'polar');
SELECT aibilling.attach('missing', 'polar');
SELECT aibilling.attach('own', 'missing');
SELECT aibilling.attach('own', 'list');
SELECT aibilling.attach('own', 'polar', 'all');
SELECT aibilling.attach('own', 'polar', NULL) IS NULL AS strict;
SELECT count(*) FROM pg_trigger WHERE tgrelid = 'own'::regclass;

-- Rights.
CREATE ROLE regress_usage_owner;
CREATE ROLE regress_usage_other;
GRANT CREATE ON SCHEMA public TO regress_usage_owner;
SET ROLE regress_usage_owner;
SELECT aibilling.attach('own', 'polar');
SELECT aibilling.detach('u');
SELECT aibilling.create_usage_table('mine', server => 'polar');
RESET ROLE;
GRANT USAGE ON FOREIGN SERVER polar TO regress_usage_owner;
SET ROLE regress_usage_owner;
SELECT aibilling.create_usage_table('mine', server => 'polar');
SELECT tableowner FROM pg_tables WHERE tablename = 'mine';
GRANT INSERT, SELECT ON mine TO regress_usage_other;
SELECT usage_table, pending FROM aibilling.status;
SELECT usage FROM aibilling.usage_table;
SET ROLE regress_usage_other;
INSERT INTO mine (provider, model, external_customer_id, input_tokens) VALUES ('acme', 'm', 'c', 10)
RETURNING cost_nanos;
SET aibilling_polar.enqueue = off;
INSERT INTO mine (provider, model, external_customer_id, input_tokens) VALUES ('acme', 'm', 'c', 10)
RETURNING cost_nanos;
RESET aibilling_polar.enqueue;
-- Nor does a function of the owner's help.
SET ROLE regress_usage_owner;
CREATE FUNCTION load_mine() RETURNS bigint LANGUAGE sql SECURITY DEFINER SET aibilling_polar.enqueue = off AS
$$INSERT INTO mine (provider, model, external_customer_id, input_tokens) VALUES ('acme', 'm', 'c', 10) RETURNING id$$;
SELECT state FROM aibilling.usage_status('mine', load_mine());
SET ROLE regress_usage_other;
SELECT load_mine() AS loaded \gset
SET ROLE regress_usage_owner;
SELECT state FROM aibilling.usage_status('mine', :loaded);
DROP FUNCTION load_mine;
SET ROLE regress_usage_other;
SELECT * FROM aibilling.outbox;
SELECT usage_table, pending FROM aibilling.status;
SELECT count(*) FROM aibilling.usage_table;
SELECT * FROM aibilling.usage_status('mine', 1);
SELECT * FROM aibilling.preview('mine');
SELECT aibilling.retry('mine');
SELECT * FROM aibilling.reprice('mine');
SELECT aibilling.detach('mine');
SELECT aibilling.pause('polar');
SELECT aibilling.resume('polar');
SELECT aibilling.arm();
SELECT * FROM aibilling.outbox_entry;
SELECT * FROM aibilling.server_state;
-- Another table shares the server: its owner is not paused.
SET ROLE regress_usage_owner;
SELECT aibilling.pause('polar');
SELECT aibilling.pause();
RESET ROLE;
SELECT usage_table, status LIKE 'paused: paused by regress_usage_owner%' AS paused FROM aibilling.status;
SET ROLE regress_usage_owner;
SELECT aibilling.resume('polar');
SELECT usage_table, usage_id, state FROM aibilling.outbox;
SET ROLE regress_usage_other;
RESET ROLE;
GRANT pg_monitor TO regress_usage_other;
SET ROLE regress_usage_other;
SELECT usage_table, usage_id, state FROM aibilling.outbox;
SELECT state FROM aibilling.usage_status('mine', 1);
SELECT * FROM aibilling.preview('mine');
RESET ROLE;

-- Detaching.
SELECT aibilling.detach('own');
SELECT aibilling.detach('mine', 'no');
SELECT aibilling.detach('mine');
SELECT aibilling.detach('mine', 'discard');
SELECT count(*) FROM pg_trigger WHERE tgrelid = 'mine'::regclass;
INSERT INTO mine (provider, model, external_customer_id, input_tokens) VALUES ('acme', 'm', 'c', 10)
RETURNING cost_nanos;
SELECT count(*) FROM aibilling.outbox;
-- Rows that are there already.
SELECT aibilling.attach('mine', 'polar');
SELECT count(*) FROM aibilling.outbox;
SELECT id, state FROM mine, aibilling.usage_status('mine', id) ORDER BY id;
SELECT aibilling.attach('mine', 'polar', existing => 'send');
SELECT usage_id, state, error FROM aibilling.outbox ORDER BY usage_id;
SELECT aibilling.attach('mine', 'polar', existing => 'send');
SELECT usage_id, state FROM aibilling.outbox ORDER BY usage_id;
-- Again, for another server.
SELECT aibilling.attach('mine', 'other');
SELECT usage, server FROM aibilling.usage_table ORDER BY server;
DROP SERVER other;
DROP TABLE mine;
DROP SERVER other;

-- A trigger of ours on a table that is not attached prices, does not send, and says so once.
CREATE TABLE forged (LIKE u INCLUDING ALL);
CREATE TRIGGER p BEFORE INSERT OR UPDATE ON forged FOR EACH ROW EXECUTE FUNCTION aibilling.price_usage();
CREATE TRIGGER e AFTER INSERT ON forged FOR EACH ROW EXECUTE FUNCTION aibilling.enqueue_usage();
CREATE TRIGGER g AFTER DELETE ON forged FOR EACH ROW EXECUTE FUNCTION aibilling.guard_usage();
INSERT INTO forged (provider, model, external_customer_id, input_tokens) VALUES ('acme', 'm', 'c', 10)
RETURNING cost_nanos;
INSERT INTO forged (provider, model, external_customer_id, input_tokens) VALUES ('acme', 'm', 'c', 20)
RETURNING cost_nanos;
UPDATE forged SET input_tokens = 30 WHERE input_tokens = 20 RETURNING cost_nanos;
DELETE FROM forged WHERE input_tokens = 10;
SELECT count(*) FROM aibilling.outbox;
DROP TABLE forged;
SELECT aibilling.price_usage();
CREATE TABLE not_usage (id bigint);
CREATE TRIGGER p BEFORE INSERT ON not_usage FOR EACH ROW EXECUTE FUNCTION aibilling.price_usage();
\set VERBOSITY terse
INSERT INTO not_usage VALUES (1);
\set VERBOSITY default
DROP TABLE not_usage;

--
-- What an INSERT refuses
--
INSERT INTO u (input_tokens) VALUES (-1);
INSERT INTO u (cache_read_tokens) VALUES (-1);
INSERT INTO u (cache_write_tokens) VALUES (-1);
INSERT INTO u (cache_write_1h_tokens) VALUES (-1);
INSERT INTO u (output_tokens) VALUES (-1);
INSERT INTO u (reasoning_tokens) VALUES (-1);
INSERT INTO u (request_count) VALUES (-1);
INSERT INTO u (web_search_count) VALUES (-1);
INSERT INTO u (input_tokens, cache_read_tokens) VALUES (10, 11);
INSERT INTO u (input_tokens, cache_read_tokens, cache_write_tokens, cache_write_1h_tokens) VALUES (10, 4, 4, 4);
INSERT INTO u (cache_read_tokens) VALUES (1);
INSERT INTO u (output_tokens, reasoning_tokens) VALUES (10, 11);
INSERT INTO u (units) VALUES ('[1]');
INSERT INTO u (units) VALUES ('{"image": -1}');
INSERT INTO u (units) VALUES ('{"image": "two"}');
INSERT INTO u (tags) VALUES ('"a"');
\set VERBOSITY terse
INSERT INTO u (tags) VALUES ('1');
\set VERBOSITY default
INSERT INTO u (external_id) VALUES ('');
INSERT INTO u (external_id) VALUES (repeat('ä', 128));
INSERT INTO u (external_id) VALUES (repeat('x', 256));
INSERT INTO u (occurred_at) VALUES ('infinity');
INSERT INTO u (occurred_at) VALUES ('0044-03-15 BC');
INSERT INTO u (customer_id) VALUES ('not-a-uuid');
INSERT INTO u (provider_cost) VALUES ('NaN');
INSERT INTO u (provider_cost) VALUES ('Infinity');
INSERT INTO u (provider_cost) VALUES (9223372036.854775808);
INSERT INTO u (provider, model, input_tokens, output_tokens) VALUES ('acme', 'm', 0, 9223372036854775807);
INSERT INTO u (raw_usage, usage_format) VALUES ('{}', 'opanai');
INSERT INTO u (raw_usage) VALUES ('{}');
SELECT count(*) FROM u;

--
-- What is stored and rejected
--
\set row 'external_id, occurred_at, provider, model, input_tokens'
\set val '''2026-01-02 03:04:05+00'', ''acme'', ''m'', 1000'
INSERT INTO u (:row) VALUES ('no customer', :val);
INSERT INTO u (:row, customer_id) VALUES ('uuid version', :val, '00000000-0000-1000-8000-000000000000');
INSERT INTO u (:row, external_customer_id, event_name) VALUES ('empty name', :val, 'c', '');
INSERT INTO u (:row, external_customer_id, event_name) VALUES ('long name', :val, 'c', repeat('é', 129));
INSERT INTO u (:row, external_customer_id, provider_cost) VALUES ('dear', :val, 'c', 1000);
INSERT INTO u (:row, external_customer_id, provider_cost) VALUES ('dear correction', :val, 'c', -1000);
INSERT INTO u (:row, external_customer_id, tags)
VALUES ('long tag', :val, 'c', jsonb_build_object('t', repeat('x', 501)));
INSERT INTO u (:row, external_customer_id, tags)
SELECT 'many tags', :val, 'c', jsonb_object_agg('t' || i, i) FROM generate_series(1, 50) i;
INSERT INTO u (:row, external_customer_id, tags)
VALUES ('long key', :val, 'c', jsonb_build_object(repeat('k', 37), 1));
INSERT INTO u (external_id, occurred_at, provider, model, external_customer_id, raw_usage, usage_format)
VALUES ('raw shape', '2026-01-02 03:04:05+00', 'acme', 'm', 'c', '{"tokens": 5}', 'openai');
INSERT INTO u (external_id, occurred_at, provider, model, external_customer_id, raw_usage, usage_format)
VALUES ('raw totals', '2026-01-02 03:04:05+00', 'acme', 'm', 'c',
	'{"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 16}', 'openai');
INSERT INTO u (external_id, occurred_at, provider, model, external_customer_id, input_tokens, raw_usage, usage_format)
VALUES ('raw beside', '2026-01-02 03:04:05+00', 'acme', 'm', 'c', 11,
	'{"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}', 'openai');
-- At most one WARNING a statement.
INSERT INTO u (:row) VALUES ('two', :val), ('at once', :val);
SELECT external_id, cost_nanos, cost_status, state, error
FROM u JOIN aibilling.outbox ON usage_table = 'u'::regclass AND usage_id = id ORDER BY id;
-- normalize_usage raises the same words.
SELECT * FROM aibilling.normalize_usage('openai', '{"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 16}');

-- What just fits is not rejected.
INSERT INTO u (:row, external_customer_id, provider_cost, tags, event_name)
SELECT 'fits', :val, 'c', 999.999, jsonb_build_object('t', repeat('ü', 500), repeat('k', 36), 1), repeat('é', 128);
SELECT state, error FROM u, aibilling.usage_status('u', id) WHERE external_id = 'fits';
DELETE FROM u WHERE external_id = 'fits';

-- Fixed by UPDATE, which checks again.
UPDATE u SET external_customer_id = '' WHERE external_id = 'no customer';
UPDATE u SET external_customer_id = 'c' WHERE external_id = 'no customer';
UPDATE u SET customer_id = NULL, external_customer_id = 'c' WHERE external_id = 'uuid version';
UPDATE u SET event_name = NULL WHERE external_id IN ('empty name', 'long name');
UPDATE u SET provider_cost = provider_cost / 2 WHERE external_id LIKE 'dear%';
UPDATE u SET tags = '{}' WHERE external_id IN ('long tag', 'many tags', 'long key');
UPDATE u SET raw_usage = NULL, usage_format = NULL, input_tokens = 10 WHERE external_id IN ('raw shape', 'raw totals');
UPDATE u SET input_tokens = 10 WHERE external_id = 'raw beside';
SELECT external_id, input_tokens, output_tokens, cost_nanos, cost_status, state, error
FROM u JOIN aibilling.outbox ON usage_table = 'u'::regclass AND usage_id = id ORDER BY id;
-- A note of the owner's own is none of the extension's business.
ALTER TABLE u ADD COLUMN note text;
UPDATE u SET note = 'seen';
SELECT state, count(*) FROM aibilling.outbox GROUP BY 1 ORDER BY 1;
-- Released by retry.
SELECT aibilling.retry('u', ARRAY[1, NULL, 999999]);
SELECT aibilling.retry('u', ARRAY(SELECT id FROM u WHERE external_id = 'two'));
SELECT aibilling.retry('u');
SELECT aibilling.retry('u');
SELECT state, count(*) FROM aibilling.outbox GROUP BY 1;
TRUNCATE u;
SELECT count(*) FROM aibilling.outbox;

--
-- cost_* and raw_usage
--
INSERT INTO u (provider, model, external_customer_id, input_tokens, output_tokens, cost_nanos, cost_cents, cost_status)
VALUES ('acme', 'm', 'c', 1000, 100, 7, 7, 'free'), ('acme', 'free', 'c', 1000, 100, 7, 7, 'priced')
RETURNING cost_nanos, cost_cents, cost_status;
UPDATE u SET input_tokens = 2000, cost_nanos = 7 WHERE model = 'm' RETURNING cost_nanos, cost_cents, cost_status;
UPDATE u SET cost_nanos = 7, cost_cents = 7, cost_status = 'free' WHERE model = 'm'
RETURNING cost_nanos, cost_cents, cost_status;
TRUNCATE u;
INSERT INTO u (external_id, provider, model, external_customer_id, usage_format, raw_usage) VALUES
('openai', 'acme', 'm', 'c', 'openai', '{"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150,
	"prompt_tokens_details": {"cached_tokens": 40}, "completion_tokens_details": {"reasoning_tokens": 20}}'),
('anthropic', 'acme', 'm', 'c', 'anthropic', '{"input_tokens": 60, "cache_read_input_tokens": 40, "output_tokens": 50}'),
('gemini', 'acme', 'm', 'c', 'gemini', '{"promptTokenCount": 100, "cachedContentTokenCount": 40,
	"candidatesTokenCount": 30, "thoughtsTokenCount": 20, "totalTokenCount": 150}'),
('bedrock', 'acme', 'm', 'c', 'bedrock', '{"inputTokens": 60, "cacheReadInputTokens": 40, "outputTokens": 50, "totalTokens": 150}'),
('openrouter', 'acme', 'm', 'c', 'openrouter', '{"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150,
	"prompt_tokens_details": {"cached_tokens": 40}, "cost": 0.00123}'),
('groq', 'acme', 'm', 'c', 'groq', '{"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150,
	"prompt_tokens_details": {"cached_tokens": 40}}'),
('xai', 'acme', 'm', 'c', 'xai', '{"prompt_tokens": 100, "completion_tokens": 30, "total_tokens": 150,
	"prompt_tokens_details": {"cached_tokens": 40}, "completion_tokens_details": {"reasoning_tokens": 20}}'),
('deepseek', 'acme', 'm', 'c', 'deepseek', '{"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150,
	"prompt_cache_hit_tokens": 40, "prompt_cache_miss_tokens": 60}'),
('mistral', 'acme', 'm', 'c', 'mistral', '{"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150}'),
('ai_sdk', 'acme', 'm', 'c', 'ai_sdk', '{"inputTokens": 100, "outputTokens": 50, "totalTokens": 150,
	"cachedInputTokens": 40, "reasoningTokens": 20}'),
('litellm', 'acme', 'm', 'c', 'litellm', '{"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150}'),
('otel', 'acme', 'm', 'c', 'otel', '{"gen_ai.usage.input_tokens": 100, "gen_ai.usage.output_tokens": 50}');
SELECT external_id, input_tokens AS input, cache_read_tokens AS cached, output_tokens AS output,
	reasoning_tokens AS reasoning, provider_cost, cost_nanos, cost_status, state, error
FROM u LEFT JOIN aibilling.outbox ON usage_id = id ORDER BY id;

-- What the row says of itself holds; what it leaves open is taken from the object.
INSERT INTO u (external_id, provider, model, generation_id, external_customer_id, usage_format, raw_usage) VALUES
('says', 'acme', 'm', 'mine', 'c', 'openai', '{"id": "theirs", "model": "another", "usage": {"prompt_tokens": 100, "completion_tokens": 50}}'),
('is silent', 'acme', NULL, NULL, 'c', 'openai', '{"id": "theirs", "model": "m", "usage": {"prompt_tokens": 100, "completion_tokens": 50}}')
RETURNING external_id, model, generation_id, cost_nanos;
DELETE FROM u WHERE external_id IN ('says', 'is silent');

-- A cost that is known is used, whatever the counts are: given in the row or reported in the object.
TRUNCATE u;
INSERT INTO u (external_id, provider, model, external_customer_id, provider_cost, input_tokens, usage_format, raw_usage) VALUES
('totals', 'acme', 'm', 'c', 0.5, NULL, 'openai', '{"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 99}'),
('beside', 'acme', 'm', 'c', 0.5, 7, 'openai', '{"prompt_tokens": 10, "completion_tokens": 5}'),
('beside, parts', 'acme', 'm', 'c', 0.5, 7, 'openai', '{"prompt_tokens": 10, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 8}}'),
('shape', 'acme', 'm', 'c', 0.5, NULL, 'openai', '{"tokens": 5}'),
('no object', 'acme', 'm', 'c', 0.5, NULL, 'openai', '[5]'),
('unread', 'acme', 'm', 'c', 0.5, NULL, 'openai', '{"prompt_tokens": 10, "completion_tokens": 5, "image_requests": 1}'),
('parts', 'acme', 'm', 'c', NULL, NULL, 'openrouter', '{"prompt_tokens": 10, "completion_tokens": 5, "cost": 0.5,
	"prompt_tokens_details": {"cached_tokens": 8, "cache_write_tokens": 8}, "completion_tokens_details": {"reasoning_tokens": 6}}'),
('no doubt', 'acme', 'm', 'c', 0.5, NULL, 'openai', '{"prompt_tokens": 10, "completion_tokens": 5}');
SELECT external_id, input_tokens AS input, cache_read_tokens AS cached, cache_write_tokens AS written, output_tokens AS output,
	reasoning_tokens AS reasoning, cost_cents, cost_status, state
FROM u LEFT JOIN aibilling.outbox ON usage_id = id ORDER BY id;
SELECT external_id, bucket, amount_usd, e.note FROM u, aibilling.explain_cost('u', u.id) e ORDER BY id;
-- Each statement tells again.
UPDATE u SET input_tokens = 8 WHERE external_id = 'beside';
-- Without the cost, the same is rejected.
UPDATE u SET provider_cost = NULL WHERE external_id = 'unread';
SELECT error FROM aibilling.outbox JOIN u ON id = usage_id WHERE external_id = 'unread';

-- A tier's name that says nothing gives way to the one in the object.
INSERT INTO u (external_id, occurred_at, provider, model, external_customer_id, service_tier, usage_format, raw_usage)
SELECT 'tier ' || tier, '2026-11-01 12:00+00', 'acme', 'm', 'c', tier, 'openai', '{"service_tier": "flex", "usage": {"prompt_tokens": 1000, "completion_tokens": 0}}'
FROM unnest(ARRAY['standard', 'default', 'auto', 'on_demand', '', 'priority']) AS tier
RETURNING external_id, service_tier, cost_cents;

DROP TABLE u, parts;
DROP TABLE own CASCADE;
DROP SCHEMA "Some Schema";
DROP SERVER polar, list;
DELETE FROM aibilling.price WHERE source = 'user';
REVOKE CREATE ON SCHEMA public FROM regress_usage_owner;
DROP ROLE regress_usage_owner, regress_usage_other;
