-- Usage tables as people have them: columns of other types, NULLs where a default is meant, numbers
-- written differently, and what no trigger can serve.
SET timezone = 'UTC';
CREATE SERVER polar FOREIGN DATA WRAPPER polar OPTIONS (url 'http://127.0.0.1:1', event_name 'llm_usage');
INSERT INTO aibilling.price (provider, model, input, output) VALUES ('openai', 'gpt-5', 1.25, 10);
CREATE DOMAIN name_of AS text;
CREATE DOMAIN short_name AS name_of CHECK (length(VALUE) < 60);
CREATE DOMAIN quantity AS bigint CHECK (VALUE >= 0);

--
-- The types that ORMs make
--
CREATE TABLE orm (
	id serial PRIMARY KEY,
	external_id varchar(255) NOT NULL DEFAULT gen_random_uuid()::varchar,
	occurred_at timestamptz(6) NOT NULL DEFAULT now(),
	event_name char(20),
	provider varchar(20),
	sub_provider varchar,
	model short_name,
	service_tier varchar(20) NOT NULL DEFAULT 'standard',
	generation_id varchar(30),
	customer_id uuid,
	external_customer_id char(12),
	member_id uuid,
	external_member_id name_of,
	parent_id varchar(64),
	input_tokens integer,
	cache_read_tokens smallint,
	cache_write_tokens integer,
	cache_write_1h_tokens integer,
	output_tokens quantity,
	reasoning_tokens integer,
	request_count smallint NOT NULL DEFAULT 1,
	web_search_count smallint,
	units jsonb,
	raw_usage jsonb,
	usage_format varchar(20),
	provider_cost numeric(12,6),
	tags jsonb NOT NULL DEFAULT '{}',
	cost_nanos bigint,
	cost_cents numeric,
	cost_status varchar(10));
SELECT aibilling.attach('orm', 'polar');
INSERT INTO orm (external_id, provider, model, external_customer_id, event_name, input_tokens, cache_read_tokens, output_tokens)
VALUES ('types', 'openai', 'gpt-5', 'c1', 'chat', 1200, 0, 350)
RETURNING id, request_count, cost_nanos, cost_cents, cost_status;
INSERT INTO orm (external_id, provider, external_customer_id, usage_format, raw_usage)
VALUES ('raw', 'openai', 'c1', 'openai', '{"id": "chatcmpl-1", "model": "gpt-5", "service_tier": "default", "usage": {"prompt_tokens": 1000, "completion_tokens": 10, "prompt_tokens_details": {"cached_tokens": 0}}}')
RETURNING model, service_tier, generation_id, input_tokens, output_tokens, cost_nanos;
-- What a provider says and a column cannot hold is no reason to lose the row.
INSERT INTO orm (external_id, provider, model, external_customer_id, usage_format, raw_usage)
VALUES ('too many', 'openai', 'gpt-5', 'c1', 'openai', '{"prompt_tokens": 90000, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 40000}}'),
	('too long', 'openai', 'gpt-5', 'c1', 'openai', '{"id": "a generation id of more than thirty characters", "usage": {"prompt_tokens": 1, "completion_tokens": 1}}'),
	('too fine', 'openrouter', 'x', 'c1', 'openrouter', '{"prompt_tokens": 1, "completion_tokens": 1, "cost": 0.0000001234}'),
	('just fine', 'openrouter', 'x', 'c1', 'openrouter', '{"prompt_tokens": 1, "completion_tokens": 1, "cost": 0.123400}')
RETURNING external_id, cost_status;
SELECT external_id, o.state, o.error FROM orm JOIN aibilling.outbox o ON o.usage_table = 'orm'::regclass AND o.usage_id = orm.id ORDER BY id;
-- A constraint of a domain is the owner's own.
INSERT INTO orm (external_id, provider, external_customer_id, usage_format, raw_usage)
VALUES ('domain', 'openai', 'c1', 'openai', jsonb_build_object('model', repeat('m', 60), 'usage', '{"prompt_tokens": 1, "completion_tokens": 1}'::jsonb));
-- The worker reads the same as the triggers.
SELECT event ->> 'external_id' AS external_id, event ->> 'name' AS name, event ->> 'external_customer_id' AS customer,
	event #> '{metadata,input_tokens}' AS input, event #>> '{metadata,_cost,amount}' AS amount, event #> '{metadata,_llm}' AS llm
FROM aibilling.preview('orm', 20) WHERE event IS NOT NULL ORDER BY usage_id;
UPDATE orm SET input_tokens = 1300 WHERE external_id = 'types' RETURNING cost_nanos;
SELECT usage_id, old_cost_nanos, new_cost_nanos FROM aibilling.reprice('orm', dry_run => false);
SELECT count(*) > 0 AS explained FROM aibilling.explain_cost('orm'::regclass, 1);
DELETE FROM orm WHERE external_id = 'types';
SELECT count(*) FROM aibilling.outbox WHERE usage_table = 'orm'::regclass AND usage_id = 1;
SELECT aibilling.detach('orm', 'discard');
SELECT aibilling.attach('orm', 'polar', existing => 'send');
SELECT count(*) FROM aibilling.outbox WHERE usage_table = 'orm'::regclass;

-- And a table of our own, whose types are changed afterwards.
SELECT aibilling.create_usage_table('u', 'polar');
INSERT INTO u (external_id, provider, model, external_customer_id, input_tokens) VALUES ('a', 'openai', 'gpt-5', 'c', 1000);
ALTER TABLE u ALTER external_customer_id TYPE varchar(40), ALTER input_tokens TYPE integer, ALTER id TYPE integer, ALTER provider TYPE char(10);
INSERT INTO u (external_id, provider, model, external_customer_id, input_tokens) VALUES ('b', 'openai', 'gpt-5', 'c', 1000) RETURNING cost_nanos;
SELECT usage_id, event #>> '{metadata,provider}' AS provider FROM aibilling.preview('u') ORDER BY 1;
ALTER TABLE u ALTER input_tokens TYPE double precision;
INSERT INTO u (external_id, provider, model, external_customer_id, input_tokens) VALUES ('c', 'openai', 'gpt-5', 'c', 1000) RETURNING cost_nanos;
SELECT * FROM aibilling.preview('u');
ALTER TABLE u ALTER input_tokens TYPE bigint;

--
-- NULL for what was not set
--
\set VERBOSITY verbose
INSERT INTO u (id, external_id, occurred_at, service_tier, tags, request_count, provider, model, external_customer_id, input_tokens)
VALUES (NULL, NULL, NULL, NULL, NULL, NULL, 'openai', 'gpt-5', 'nulls', 1000), (DEFAULT, NULL, NULL, NULL, NULL, NULL, 'openai', 'gpt-5', 'nulls', 2000)
RETURNING id > 0 AS id, length(external_id), occurred_at = now() AS occurred_at, service_tier, tags, request_count, cost_nanos;
SELECT count(DISTINCT external_id) FROM u WHERE external_customer_id = 'nulls';
INSERT INTO orm (external_id, request_count, provider, model, external_customer_id, input_tokens, output_tokens)
VALUES (NULL, NULL, 'openai', 'gpt-5', 'nulls', 1000, 1) RETURNING length(external_id), request_count, cost_nanos;
-- Where there is no default
CREATE TABLE bare (LIKE u);
ALTER TABLE bare ALTER external_id DROP NOT NULL, ALTER occurred_at DROP NOT NULL, ADD PRIMARY KEY (id);
SELECT aibilling.attach('bare', 'polar');
\set SHOW_CONTEXT never
CREATE FUNCTION columns_of(statement text) RETURNS TABLE (state text, table_name text, column_name text, message text)
LANGUAGE plpgsql AS $$
BEGIN
	EXECUTE statement;
EXCEPTION WHEN OTHERS THEN
	GET STACKED DIAGNOSTICS state = RETURNED_SQLSTATE, table_name = TABLE_NAME, column_name = COLUMN_NAME, message = MESSAGE_TEXT;
	RETURN NEXT;
END
$$;
SELECT * FROM columns_of($$INSERT INTO bare (id, external_id) VALUES (1, NULL)$$)
UNION ALL SELECT * FROM columns_of($$INSERT INTO bare (id, external_id, service_tier, tags) VALUES (1, 'x', 'standard', '{}')$$)
UNION ALL SELECT * FROM columns_of($$INSERT INTO bare (external_id, occurred_at) VALUES ('x', now())$$)
UNION ALL SELECT * FROM columns_of($$INSERT INTO bare (id, external_id, occurred_at, tags) VALUES (1, 'x', now(), '{}')$$)
UNION ALL SELECT * FROM columns_of($$INSERT INTO u (external_id) VALUES ('')$$)
UNION ALL SELECT * FROM columns_of($$INSERT INTO u (usage_format) VALUES ('openal')$$);
-- A default that is the owner's function, changed and taken away
CREATE FUNCTION next_key() RETURNS text LANGUAGE sql AS $$ SELECT 'first' $$;
ALTER TABLE u ALTER external_id SET DEFAULT next_key();
INSERT INTO u (external_id, external_customer_id, provider_cost) VALUES (NULL, 'c', 1) RETURNING external_id;
CREATE OR REPLACE FUNCTION next_key() RETURNS text LANGUAGE sql AS $$ SELECT 'second' $$;
INSERT INTO u (external_id, external_customer_id, provider_cost) VALUES (NULL, 'c', 1) RETURNING external_id;
ALTER TABLE u ALTER external_id SET DEFAULT 'third';
BEGIN;
INSERT INTO u (external_id, external_customer_id, provider_cost) VALUES (NULL, 'c', 1) RETURNING external_id;
ALTER TABLE u ALTER external_id SET DEFAULT 'fourth';
SAVEPOINT s;
INSERT INTO u (external_id, external_customer_id, provider_cost) VALUES (NULL, 'c', 1) RETURNING external_id;
ROLLBACK TO s;
INSERT INTO u (external_id, external_customer_id, provider_cost) VALUES (NULL, 'c', 1) RETURNING external_id;
COMMIT;
ALTER TABLE u ALTER external_id SET DEFAULT gen_random_uuid()::text;

-- A partition has its own
CREATE TABLE parts (LIKE u INCLUDING DEFAULTS, PRIMARY KEY (id, occurred_at)) PARTITION BY RANGE (occurred_at);
CREATE TABLE parts_all PARTITION OF parts DEFAULT;
ALTER TABLE parts ALTER id SET DEFAULT 7;
SELECT aibilling.attach('parts', 'polar');
INSERT INTO parts (external_id, tags, external_customer_id, provider_cost) VALUES (NULL, NULL, 'c', 1)
RETURNING length(external_id), tags, cost_nanos;
-- or else that of the table above it, of any change
CREATE TABLE parts_low (LIKE u);
CREATE TABLE parts_lower (LIKE u) PARTITION BY RANGE (occurred_at);
CREATE TABLE parts_lowest (LIKE u);
ALTER TABLE parts_lower ATTACH PARTITION parts_lowest DEFAULT;
ALTER TABLE parts ATTACH PARTITION parts_low FOR VALUES FROM ('2020-01-01Z') TO ('2020-02-01Z');
ALTER TABLE parts ATTACH PARTITION parts_lower FOR VALUES FROM ('2020-02-01Z') TO ('2020-03-01Z');
SELECT attrelid::regclass, bool_or(atthasdef) FROM pg_attribute WHERE attrelid IN ('parts_low'::regclass, 'parts_lowest'::regclass) GROUP BY 1 ORDER BY 1;
PREPARE nulls(timestamptz) AS INSERT INTO parts (id, external_id, occurred_at, service_tier, tags, request_count, external_customer_id, provider_cost)
VALUES (NULL, NULL, $1, NULL, NULL, NULL, 'c', 1) RETURNING tableoid::regclass, id, length(external_id), service_tier, tags, request_count;
EXECUTE nulls('2020-01-02Z');
EXECUTE nulls('2020-02-02Z');
ALTER TABLE ONLY parts ALTER id SET DEFAULT 8, ALTER request_count SET DEFAULT 1;
EXECUTE nulls('2020-01-03Z');
EXECUTE nulls('2020-02-03Z');
ALTER TABLE ONLY parts_lower ALTER id SET DEFAULT 9;
EXECUTE nulls('2020-02-04Z');
ALTER TABLE ONLY parts ALTER request_count DROP DEFAULT;
INSERT INTO parts_low (id, external_id, occurred_at, tags, service_tier, external_customer_id, provider_cost) VALUES (NULL, NULL, '2020-01-04Z', NULL, NULL, 'c', 1) RETURNING id, tags;
ALTER TABLE parts ALTER id DROP DEFAULT, ALTER id ADD GENERATED BY DEFAULT AS IDENTITY;
EXECUTE nulls('2020-02-05Z');
-- but for the key that has chosen the partition
SET client_min_messages = error;
CREATE TABLE parts_null (LIKE u);
DELETE FROM parts_all;
ALTER TABLE parts DETACH PARTITION parts_all;
RESET client_min_messages;
ALTER TABLE parts ATTACH PARTITION parts_null DEFAULT;
\set VERBOSITY default
EXECUTE nulls(NULL);
SELECT * FROM columns_of($$INSERT INTO parts (occurred_at, external_id) VALUES (NULL, 'x')$$);

-- Nothing, written as something
\set VERBOSITY default
INSERT INTO u (external_id, external_customer_id, input_tokens, provider, model, event_name, parent_id, external_member_id, usage_format, tags, units, raw_usage)
VALUES ('empty', 'c', 1000, 'openai', 'gpt-5', '', '', '', '', 'null', 'null', 'null') RETURNING cost_nanos, tags;
SELECT event - 'timestamp' AS event FROM aibilling.preview('u', 100) WHERE event ->> 'external_id' = 'empty';
SELECT bucket, amount_usd FROM aibilling.explain_cost('u'::regclass, (SELECT id FROM u WHERE external_id = 'empty')) WHERE amount_usd > 0;

-- What an ORM saves again without having read it
INSERT INTO u (external_id, external_customer_id, provider_cost) VALUES ('saved', 'c', 1);
UPDATE u SET id = NULL, external_id = NULL, occurred_at = NULL, service_tier = NULL, tags = NULL, cost_nanos = NULL, cost_cents = NULL,
	cost_status = NULL, provider = '' WHERE external_id = 'saved'
RETURNING id > 0 AS id, external_id, occurred_at <= now() AS occurred_at, service_tier, tags, cost_nanos, cost_cents, cost_status;
UPDATE u SET provider_cost = 2, cost_nanos = NULL WHERE external_id = 'saved' RETURNING cost_nanos;
UPDATE u SET tags = 'null' WHERE external_id = 'saved' RETURNING tags;

--
-- What no trigger can serve
--
CREATE COLLATION ignores_case (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
CREATE DOMAIN known_cost AS numeric NOT NULL;
CREATE TABLE wrong (LIKE u INCLUDING DEFAULTS INCLUDING INDEXES);
ALTER TABLE wrong ALTER cost_cents TYPE numeric(20,2), ALTER cost_nanos SET NOT NULL, ALTER cost_status TYPE varchar(9),
	ALTER external_customer_id TYPE text COLLATE ignores_case, DROP external_id, DROP provider, DROP web_search_count,
	ADD external_id text GENERATED ALWAYS AS ('inv-' || generation_id) STORED NOT NULL,
	ADD provider text GENERATED ALWAYS AS (split_part(model, '/', 1)) STORED,
	ADD web_search_count bigint GENERATED ALWAYS AS IDENTITY;
SELECT aibilling.attach('wrong', 'polar');
ALTER TABLE wrong ALTER cost_cents TYPE known_cost;
SELECT aibilling.attach('wrong', 'polar');
ALTER TABLE wrong ALTER cost_cents TYPE numeric(24,12), ALTER cost_nanos TYPE integer;
SELECT aibilling.attach('wrong', 'polar');
CREATE TABLE right_id (LIKE u INCLUDING DEFAULTS INCLUDING INDEXES);
ALTER TABLE right_id ALTER id ADD GENERATED ALWAYS AS IDENTITY;
SELECT aibilling.attach('right_id', 'polar');
INSERT INTO right_id (external_customer_id, provider_cost) VALUES ('c', 1) RETURNING id, cost_nanos;
-- Attached already: status names it, and it goes on.
SELECT aibilling.create_usage_table('done', 'polar');
ALTER TABLE done ALTER cost_cents TYPE numeric(20,2);
INSERT INTO done (external_id, external_customer_id, provider_cost) VALUES ('cut', 'c', 0.123456789) RETURNING cost_cents;
SELECT regexp_replace(status, 'no worker: [^;]*', 'no worker') AS status FROM aibilling.status WHERE usage_table = 'done'::regclass;

SET client_min_messages = error;
DROP TABLE orm, u, bare, parts, done, wrong, right_id;
DROP DOMAIN known_cost, quantity, short_name, name_of;
DROP COLLATION ignores_case;
DROP FUNCTION next_key, columns_of;
DROP SERVER polar;
DELETE FROM aibilling.price;
