-- The outbox: what is in it after any sequence of statements, what would be sent, and operating it.
SET timezone = 'UTC';
SELECT aibilling.convert_cost(1, 'base', 'nanos'); -- loads the library
CREATE SERVER polar FOREIGN DATA WRAPPER polar OPTIONS (url 'http://127.0.0.1:1', event_name 'llm_usage');
INSERT INTO aibilling.price (provider, model, input, output, cache_read) VALUES ('acme', 'm', 1, 10, 0.1);
SELECT aibilling.create_usage_table('u', server => 'polar');
CREATE VIEW waiting AS
	SELECT usage_id, state, not_before, error FROM aibilling.outbox WHERE usage_table = 'u'::regclass;
-- Inserts n rows, each with a customer.
CREATE FUNCTION ins(VARIADIC keys text[]) RETURNS void LANGUAGE sql AS
$$INSERT INTO u (external_id, occurred_at, provider, model, external_customer_id, input_tokens)
	SELECT k, '2026-01-02 03:04:05+00', 'acme', 'm', 'c', 1000 FROM unnest(keys) k$$;
CREATE FUNCTION keys() RETURNS text[] LANGUAGE sql AS
$$SELECT array_agg(coalesce(external_id, 'phantom ' || usage_id) || CASE state WHEN 'pending' THEN '' ELSE ':' || state END
	ORDER BY usage_id) FROM waiting LEFT JOIN u ON id = usage_id$$;
-- Why there is no worker is up to the server that the tests run on.
CREATE FUNCTION words(status text) RETURNS text LANGUAGE sql AS
$$SELECT regexp_replace(status, 'no worker: [^;]*', 'no worker')$$;
-- In place of the shipper: a row goes from the outbox into a delivery, with all of its entry, so that
-- rows to be shipped are inserted one by one.
CREATE PROCEDURE ship(key text, new_state text) LANGUAGE sql AS
$$DELETE FROM aibilling.outbox_entry e USING u WHERE external_id = key AND e.id = u.id;
	INSERT INTO aibilling.delivery (server, usage_table, usage_ids, events, bytes, state, attempts, started_at)
	SELECT 'polar', 'u', int8multirange(int8range(id, id, '[]')), 1, 100, new_state, 1, '2026-02-03 04:05:06+00'
	FROM u WHERE external_id = key$$;

--
-- Transactions
--
SELECT ins('a');
BEGIN;
SELECT ins('rolled back');
ROLLBACK;
SELECT keys();
BEGIN;
SELECT ins('b');
SAVEPOINT s;
SELECT ins('in savepoint');
ROLLBACK TO s;
SELECT ins('c');
SAVEPOINT t;
SELECT ins('d');
SAVEPOINT v;
SELECT ins('e');
RELEASE t;
SELECT keys() AS not_before_commit;
COMMIT;
SELECT keys();
DO $$
BEGIN
	PERFORM ins('f');
	BEGIN
		PERFORM ins('g');
		PERFORM ins('g');
	EXCEPTION WHEN unique_violation THEN
		NULL;
	END;
END $$;
SELECT keys();

-- All in a savepoint; what is changed in one and undone stays as it was.
BEGIN;
SAVEPOINT s;
SELECT ins('only here');
RELEASE s;
COMMIT;
BEGIN;
SAVEPOINT s;
DELETE FROM u WHERE external_id = 'only here';
ROLLBACK TO s;
SAVEPOINT t;
UPDATE u SET external_customer_id = NULL WHERE external_id = 'f';
ROLLBACK TO t;
COMMIT;
SELECT keys();
DELETE FROM u WHERE external_id = 'only here';

-- Changed and deleted within the same transaction.
BEGIN;
SELECT ins('h', 'i', 'j');
DELETE FROM u WHERE external_id = 'h';
UPDATE u SET external_customer_id = NULL WHERE external_id = 'i';
COMMIT;
SELECT keys();
BEGIN;
UPDATE u SET external_customer_id = 'c' WHERE external_id = 'i';
DELETE FROM u WHERE external_id = 'j';
DELETE FROM u WHERE external_id = 'a';
ROLLBACK;
SELECT keys();
-- A deleted id that comes back.
BEGIN;
DELETE FROM u WHERE external_id = 'a';
INSERT INTO u (id, external_id, provider, model, external_customer_id, input_tokens)
VALUES (1, 'a again', 'acme', 'm', 'c', 10);
COMMIT;
BEGIN;
INSERT INTO u (id, external_id, provider, model, external_customer_id, input_tokens)
VALUES (1000, 'x', 'acme', 'm', 'c', 10);
DELETE FROM u WHERE id = 1000;
INSERT INTO u (id, external_id, provider, model, external_customer_id, input_tokens)
VALUES (1000, 'y', 'acme', 'm', 'c', 10);
SAVEPOINT s;
DELETE FROM u WHERE id = 1000;
ROLLBACK TO s;
COMMIT;
SELECT keys();
DELETE FROM u WHERE external_id <> 'b';
SELECT keys();

-- ON CONFLICT.
INSERT INTO u (external_id, provider, model, external_customer_id, input_tokens)
VALUES ('b', 'acme', 'm', 'c', 5), ('k', 'acme', 'm', 'c', 5) ON CONFLICT (external_id) DO NOTHING;
SELECT keys(), count(*) FROM waiting;
INSERT INTO u (external_id, provider, model, external_customer_id, input_tokens)
VALUES ('b', 'acme', 'm', 'c', 7), ('l', 'acme', 'm', 'c', 7)
ON CONFLICT (external_id) DO UPDATE SET input_tokens = excluded.input_tokens
RETURNING external_id, input_tokens, cost_nanos;
SELECT keys(), count(*) FROM waiting;
MERGE INTO u USING (VALUES ('b', 8), ('m', 8)) AS n (key, tokens) ON u.external_id = n.key
WHEN MATCHED THEN UPDATE SET input_tokens = n.tokens
WHEN NOT MATCHED THEN INSERT (external_id, provider, model, external_customer_id, input_tokens)
	VALUES (n.key, 'acme', 'm', 'c', n.tokens);
SELECT keys(), count(*) FROM waiting;
COPY u (external_id, provider, model, external_customer_id, input_tokens) FROM stdin;
n	acme	m	c	9
\.
SELECT keys();
UPDATE u SET id = 5000 WHERE external_id = 'b';

-- Loaded without being sent.
SET aibilling_polar.enqueue = off;
SELECT ins('history');
RESET aibilling_polar.enqueue;
SET session_replication_role = replica;
SELECT ins('replica');
RESET session_replication_role;
SELECT external_id, cost_nanos, s.* FROM u, aibilling.usage_status('u', id) s
WHERE external_id IN ('history', 'replica') ORDER BY id;
UPDATE u SET input_tokens = 2000 WHERE external_id = 'history' RETURNING cost_nanos;
SELECT keys();
TRUNCATE u;

--
-- What has been sent is a fact
--
SELECT ins('flying');
SELECT ins('arrived');
SELECT ins('waits');
CALL ship('flying', 'sending');
CALL ship('arrived', 'delivered');
SELECT external_id, s.* FROM u, aibilling.usage_status('u', id) s ORDER BY id;
SELECT * FROM aibilling.usage_status('u', 424242);
UPDATE u SET input_tokens = 1 WHERE external_id = 'flying';
UPDATE u SET tags = '{"a": 1}' WHERE external_id = 'arrived';
UPDATE u SET cost_nanos = 1 WHERE external_id = 'arrived' RETURNING cost_nanos;
INSERT INTO u (external_id, provider, model, external_customer_id, input_tokens)
VALUES ('arrived', 'acme', 'm', 'c', 7)
ON CONFLICT (external_id) DO UPDATE SET input_tokens = excluded.input_tokens;
DELETE FROM u WHERE external_id = 'flying';
DELETE FROM u WHERE external_id = 'arrived';
DELETE FROM u WHERE external_id = 'waits';
SELECT external_id FROM u;
SELECT pending, in_flight, delivered, words(status) AS status FROM aibilling.status;
SELECT aibilling.detach('u');
-- The correction that the hint asks for.
INSERT INTO u (external_id, occurred_at, external_customer_id, provider_cost, tags)
VALUES ('correction', '2026-01-03', 'c', -0.0004, '{"corrects": "arrived"}') RETURNING cost_nanos, cost_cents, cost_status;
SELECT state, jsonb_pretty(event) FROM aibilling.preview('u');
UPDATE aibilling.delivery SET state = 'delivered' WHERE state = 'sending';
TRUNCATE u;

--
-- Rows that wait
--
INSERT INTO u (external_id, occurred_at, provider, model, external_customer_id, input_tokens)
VALUES ('future', '2999-12-31 23:59:59.5', 'acme', 'm', 'c', 10);
INSERT INTO u (external_id, provider, model, external_customer_id, input_tokens)
VALUES ('unknown 1', 'acme', 'new', 'c', 10), ('unknown 2', 'acme', 'new', 'c', 20), ('other', 'acme', 'newer', 'c', 1);
INSERT INTO u (external_id, occurred_at, provider, model, external_customer_id, input_tokens, web_search_count)
VALUES ('incomplete', '2026-01-01 12:00+00', 'acme', 'm', 'c', 10, 2);
INSERT INTO u (external_id, provider, model, external_customer_id) VALUES ('no counts', 'acme', 'm', 'c');
INSERT INTO u (external_id, external_customer_id, input_tokens) VALUES ('no model', 'c', 5);
-- Once per model and session.
INSERT INTO u (external_id, provider, model, external_customer_id, input_tokens)
VALUES ('unknown 3', 'acme', 'new', 'c', 30);
SELECT external_id, cost_nanos, cost_status, w.state, not_before, error FROM u JOIN waiting w ON usage_id = id ORDER BY id;
SELECT usage_table, reason, rows FROM aibilling.unpriced ORDER BY reason;
SELECT pending, unpriced, rejected, words(status) AS status FROM aibilling.status;
-- A price is not applied in the session that inserts it, but an UPDATE prices again.
INSERT INTO aibilling.price (provider, model, input) VALUES ('acme', 'new', 2);
SELECT external_id, cost_nanos FROM u WHERE model = 'new' ORDER BY id;
UPDATE u SET input_tokens = 11 WHERE external_id = 'unknown 1' RETURNING cost_nanos, cost_status;
SELECT usage_id, state FROM waiting JOIN u ON id = usage_id WHERE model = 'new' ORDER BY id;
UPDATE u SET occurred_at = '2026-01-01' WHERE external_id = 'future';
UPDATE u SET web_search_count = 0 WHERE external_id = 'incomplete';
UPDATE u SET request_count = 0, input_tokens = 0 WHERE external_id = 'no counts';
SELECT external_id, cost_nanos, cost_status, w.state, not_before, error FROM u JOIN waiting w ON usage_id = id ORDER BY id;

-- With unpriced 'send' they go without a cost.
ALTER SERVER polar OPTIONS (ADD unpriced 'send');
INSERT INTO u (external_id, occurred_at, provider, model, external_customer_id, input_tokens)
VALUES ('without cost', '2026-01-01', 'acme', 'newest', 'c', 10);
SELECT w.state, event FROM waiting w JOIN u ON id = usage_id JOIN aibilling.preview('u', 100) p USING (usage_id)
WHERE external_id = 'without cost';
ALTER SERVER polar OPTIONS (DROP unpriced);
TRUNCATE u;

--
-- Reprice
--
SELECT ins('r1');
SELECT ins('r2');
SELECT ins('r3');
INSERT INTO u (external_id, occurred_at, provider, model, external_customer_id, input_tokens)
VALUES ('r4', '2026-01-02', 'acme', 'newest', 'c', 10);
CALL ship('r2', 'delivered');
SELECT * FROM aibilling.reprice('u');
UPDATE aibilling.price SET input = 3 WHERE provider = 'acme' AND model = 'm';
INSERT INTO aibilling.price (provider, model, input) VALUES ('acme', 'newest', 4);
SELECT external_id, r.state, old_cost_nanos, new_cost_nanos, difference_nanos, action
FROM aibilling.reprice('u') r JOIN u ON id = usage_id ORDER BY id;
SELECT external_id, cost_nanos FROM u ORDER BY id;
SELECT count(*) FROM aibilling.reprice('u', from_time => '2026-01-03');
SELECT external_id, r.state, old_cost_nanos, new_cost_nanos, difference_nanos, action
FROM aibilling.reprice('u', dry_run => false) r JOIN u ON id = usage_id ORDER BY id;
SELECT external_id, cost_nanos, cost_cents, cost_status, s.state FROM u, aibilling.usage_status('u', id) s ORDER BY id;
SELECT external_id, action FROM aibilling.reprice('u') JOIN u ON id = usage_id;
TRUNCATE u RESTART IDENTITY;
-- A price by which one row's cost is beyond cost_nanos: that row keeps what it has, the others change.
INSERT INTO aibilling.price (provider, model, input) VALUES ('acme', 'huge', 0.000000001);
INSERT INTO u (external_id, provider, model, external_customer_id, input_tokens)
VALUES ('huge', 'acme', 'huge', 'c', 9000000000000000), ('waits', 'acme', 'none', 'c', 9000000000000000);
SELECT ins('other');
UPDATE aibilling.price SET input = 999999999 WHERE provider = 'acme' AND model = 'huge';
INSERT INTO aibilling.price (provider, model, input) VALUES ('acme', 'none', 999999999);
UPDATE aibilling.price SET input = 5 WHERE provider = 'acme' AND model = 'm';
SELECT external_id, r.state, old_cost_nanos, new_cost_nanos, difference_nanos, action
FROM aibilling.reprice('u', dry_run => false) r JOIN u ON id = usage_id ORDER BY id;
SELECT external_id, cost_nanos, cost_status, s.state, error FROM u, aibilling.usage_status('u', id) s ORDER BY id;
INSERT INTO u (external_id, provider, model, external_customer_id, input_tokens)
SELECT 'more' || i, 'acme', 'nothing', 'c', 9000000000000000 FROM generate_series(1, 10) i;
INSERT INTO aibilling.price (provider, model, input) VALUES ('acme', 'nothing', 999999999);
SELECT action, count(*) FROM aibilling.reprice('u') GROUP BY action;
DELETE FROM aibilling.price WHERE model IN ('huge', 'none', 'nothing');
UPDATE aibilling.price SET input = 3 WHERE provider = 'acme' AND model = 'm';
TRUNCATE u;

--
-- Pause, resume, arm
--
SELECT aibilling.pause('nobody');
CREATE SERVER idle FOREIGN DATA WRAPPER polar OPTIONS (url 'http://127.0.0.1:1', event_name 'e');
SELECT aibilling.pause('idle');
SELECT aibilling.pause('polar');
SELECT status = 'paused: paused by ' || current_user AS paused FROM aibilling.status;
SELECT ins('paused');
SELECT keys();
SELECT aibilling.resume('polar');
SELECT words(status) AS status FROM aibilling.status;
SELECT aibilling.pause();
SELECT status LIKE 'paused%' AS paused FROM aibilling.status;
SELECT aibilling.resume();
-- A copy: the identity is another's.
UPDATE aibilling.database_identity SET database = database::bigint + 1;
SELECT words(status) AS status FROM aibilling.status;
CALL aibilling.sync();
SELECT aibilling.arm();
SELECT words(status) AS status FROM aibilling.status;
BEGIN;
CALL aibilling.sync();
ROLLBACK;
CALL aibilling.sync('nobody');
TRUNCATE u;
CALL aibilling.sync();

--
-- Partitions
--
CREATE TABLE p (LIKE u INCLUDING DEFAULTS, region text NOT NULL) PARTITION BY LIST (region);
ALTER TABLE p ADD PRIMARY KEY (id, region), ALTER id ADD GENERATED BY DEFAULT AS IDENTITY;
CREATE TABLE p_eu PARTITION OF p FOR VALUES IN ('eu');
SELECT aibilling.attach('p', 'polar');
CREATE TABLE p_us PARTITION OF p FOR VALUES IN ('us');
INSERT INTO p (external_id, region, provider, model, external_customer_id, input_tokens)
VALUES ('1', 'eu', 'acme', 'm', 'c', 1), ('2', 'us', 'acme', 'm', 'c', 2), ('3', 'eu', 'acme', 'm', 'c', 3);
INSERT INTO p_us (id, external_id, region, provider, model, external_customer_id, input_tokens)
VALUES (4, '4', 'us', 'acme', 'm', 'c', 4), (5, '5', 'us', 'acme', 'm', NULL, 5);
SELECT usage_table, usage_id, state FROM aibilling.outbox ORDER BY usage_id;
-- A row that moves is the same row.
UPDATE p SET region = 'us' WHERE id = 1;
UPDATE p SET region = 'us', input_tokens = 30 WHERE id = 3;
UPDATE p SET region = 'eu' WHERE id = 5;
SELECT tableoid::regclass, id, cost_nanos FROM p ORDER BY id;
SELECT usage_table, usage_id, state FROM aibilling.outbox ORDER BY usage_id;
DELETE FROM p WHERE id = 3;
DELETE FROM p_us WHERE id = 4;
UPDATE p SET region = 'us', external_customer_id = 'c' WHERE id = 5;
SELECT usage_table, usage_id, state FROM aibilling.outbox ORDER BY usage_id;
SELECT usage_id, state, event -> 'metadata' ->> 'input_tokens' AS input FROM aibilling.preview('p') ORDER BY usage_id;
-- One that has been delivered may move, but not change, and is not sent again.
INSERT INTO aibilling.delivery (server, usage_table, usage_ids, events, bytes, state, attempts, started_at)
SELECT 'polar', 'p', '{[1,6)}', 3, 100, 'delivered', 1, now();
DELETE FROM aibilling.outbox_entry WHERE usage_table = 'p'::regclass;
UPDATE p SET region = 'eu' WHERE id = 1;
UPDATE p SET region = 'eu', input_tokens = 7 WHERE id = 2;
SELECT tableoid::regclass, id, cost_nanos FROM p ORDER BY id;
SELECT usage_table, usage_id, state FROM aibilling.outbox;
-- A partition that is taken off delivers no more.
ALTER TABLE p DETACH PARTITION p_eu;
INSERT INTO p_eu (id, external_id, region, provider, model, external_customer_id, input_tokens)
VALUES (6, '6', 'eu', 'acme', 'm', 'c', 6);
SELECT usage_table, usage_id, state FROM aibilling.outbox;
DROP TABLE p_eu;
DROP TABLE p;
DELETE FROM aibilling.delivery;

--
-- What would be sent
--
\pset null -
CREATE FUNCTION show_event(OUT key text, OUT state text, OUT event text, OUT error text) RETURNS SETOF record LANGUAGE sql AS
$$SELECT external_id, p.state, jsonb_pretty(p.event), p.error FROM aibilling.preview('u', 100) p JOIN u ON id = usage_id
	ORDER BY id$$;
INSERT INTO u (external_id, occurred_at, provider, sub_provider, model, service_tier, generation_id, external_customer_id,
	member_id, parent_id, input_tokens, cache_read_tokens, output_tokens, reasoning_tokens, web_search_count, tags)
VALUES ('all', '2026-01-02 03:04:05.678901+02', 'acme', 'sub', 'm', 'default', 'gen-1', 'customer "1"',
	'11111111-1111-4111-8111-111111111111', 'parent', 1200, 1024, 350, 0, NULL,
	'{"org_name": "Acme Corp", "n": 1.50, "b": true, "list": [1, "a"], "empty": "", "null": null, "o": {"k": 1}}');
INSERT INTO u (external_id, occurred_at, external_customer_id, provider_cost)
VALUES ('digits', '2026-01-02', 'c', 12.3456789012345678);
SELECT * FROM show_event();
TRUNCATE u;

-- Identity, first hit wins.
CREATE FUNCTION ident(key text, tags jsonb, customer uuid DEFAULT NULL, external text DEFAULT NULL) RETURNS void LANGUAGE sql AS
$$INSERT INTO u (external_id, occurred_at, provider, model, input_tokens, tags, customer_id, external_customer_id)
	VALUES (key, '2026-01-02', 'acme', 'm', 1, tags, customer, external)$$;
SET client_min_messages = error;
\set uuid '''aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa'''
SELECT ident('both columns', '{"userId": "tag"}', :uuid, 'column');
SELECT ident('column over tags', '{"customerId": "bbbbbbbb-bbbb-4bbb-8bbb-bbbbbbbbbbbb", "userId": "tag"}', NULL, 'column');
SELECT ident('tag customerId', '{"customerId": "bbbbbbbb-bbbb-4bbb-8bbb-bbbbbbbbbbbb", "userId": "tag"}');
SELECT ident('tag polarCustomerId', '{"polarCustomerId": "bbbbbbbb-bbbb-4bbb-8bbb-bbbbbbbbbbbb"}');
SELECT ident('tag customer_id', '{"customer_id": "bbbbbbbb-bbbb-4bbb-8bbb-bbbbbbbbbbbb", "externalId": "e"}');
SELECT ident('tag userId', '{"userId": "u", "externalId": "e", "user_id": "i"}');
SELECT ident('tag externalId', '{"externalId": "e", "user_id": "i"}');
SELECT ident('tag user_id', '{"user_id": 42}');
SELECT ident('null is skipped', '{"customerId": null, "userId": null, "externalId": "e"}');
SELECT ident('empty stops', '{"customerId": "", "polarCustomerId": "bbbbbbbb-bbbb-4bbb-8bbb-bbbbbbbbbbbb", "userId": "u"}');
SELECT ident('zero stops', '{"userId": 0, "externalId": "e"}');
SELECT ident('false stops', '{"userId": false, "externalId": "e"}');
SELECT ident('no uuid', '{"customerId": "cus_123", "userId": "u"}');
SELECT ident('nobody', '{"org": "acme"}');
RESET client_min_messages;
SELECT key, state, event::jsonb ->> 'customer_id' AS customer_id, event::jsonb ->> 'external_customer_id' AS external,
	jsonb_path_query_array(event::jsonb -> 'metadata', '$.keyvalue() ? (@.key starts with "tag_")."key"') AS tags, error
FROM show_event();
TRUNCATE u;
ALTER SERVER polar OPTIONS (ADD customer_id_key 'polar', ADD external_customer_id_key 'tenant', ADD tag_prefix 't.');
SELECT ident('own key', '{"tenant": "t", "userId": "u"}'), ident('own id', '{"polar": "bbbbbbbb-bbbb-4bbb-8bbb-bbbbbbbbbbbb"}');
SELECT key, state, event::jsonb ->> 'customer_id' AS customer_id, event::jsonb ->> 'external_customer_id' AS external,
	event::jsonb -> 'metadata' ->> 't.tenant' AS tag FROM show_event();
ALTER SERVER polar OPTIONS (DROP customer_id_key, DROP external_customer_id_key, DROP tag_prefix);
TRUNCATE u;

-- The event's name.
ALTER SERVER polar OPTIONS (SET event_name 'usage_{provider}_{model}');
SELECT ins('template');
INSERT INTO u (external_id, provider, model, external_customer_id, event_name, input_tokens)
VALUES ('column', 'acme', 'm', 'c', 'mine', 1);
SELECT key, event::jsonb ->> 'name' AS name FROM show_event();
CREATE FUNCTION public.event_name(r jsonb) RETURNS text LANGUAGE sql IMMUTABLE AS $$SELECT 'fn ' || (r ->> 'external_id')$$;
ALTER SERVER polar OPTIONS (ADD event_name_function 'public.event_name');
SELECT key, state, event::jsonb ->> 'name' AS name, error FROM show_event();
CREATE OR REPLACE FUNCTION public.event_name(r jsonb) RETURNS text LANGUAGE sql IMMUTABLE AS $$SELECT repeat('x', 129)$$;
SELECT key, state, event::jsonb ->> 'name' AS name, error FROM show_event();
ALTER SERVER polar OPTIONS (DROP event_name_function);

-- metadata_function: its object is the whole metadata.
CREATE FUNCTION public.meta(r jsonb) RETURNS jsonb LANGUAGE plpgsql AS
$$BEGIN RETURN jsonb_build_object('who', r -> 'external_customer_id', 'cents', r -> 'cost_cents', 'none', null, 'empty', ''); END$$;
ALTER SERVER polar OPTIONS (ADD metadata_function 'public.meta');
SELECT key, state, event::jsonb -> 'metadata' AS metadata, error FROM show_event();
CREATE OR REPLACE FUNCTION public.meta(r jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$BEGIN RETURN 1 / 0; END$$;
SELECT key, state, event, error FROM show_event();
CREATE OR REPLACE FUNCTION public.meta(r jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$BEGIN RETURN '[1]'; END$$;
SELECT key, state, event, error FROM show_event();
CREATE OR REPLACE FUNCTION public.meta(r jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$BEGIN RETURN '{"a": [1]}'; END$$;
SELECT key, state, event, error FROM show_event();
CREATE OR REPLACE FUNCTION public.meta(r jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$BEGIN RETURN NULL; END$$;
SELECT key, state, event::jsonb -> 'metadata' AS metadata, error FROM show_event();
DROP FUNCTION public.meta;
SELECT key, state, event, error FROM show_event();
SELECT count(*) FROM aibilling.preview('u', 1);
SELECT count(*) FROM aibilling.preview('u', 0);
SELECT count(*) FROM aibilling.preview('u', -1);

-- Indexes that a superuser adds to the outbox are kept up.
CREATE INDEX mine ON aibilling.outbox_entry (id);
CREATE INDEX expression ON aibilling.outbox_entry ((id + 1));
CREATE INDEX partial ON aibilling.outbox_entry (attempts) WHERE state = 'r';
SELECT ins('indexed');
BEGIN;
SET LOCAL enable_seqscan = off;
SELECT count(*) FROM aibilling.outbox_entry WHERE id = (SELECT id FROM u WHERE external_id = 'indexed');
SELECT count(*) FROM aibilling.outbox_entry WHERE id + 1 = (SELECT id + 1 FROM u WHERE external_id = 'indexed');
COMMIT;
DROP INDEX aibilling.mine, aibilling.expression, aibilling.partial;

-- Columns that they add do no harm.
ALTER TABLE aibilling.outbox_entry ADD mine text;
ALTER TABLE aibilling.delivery ADD mine text DEFAULT 'mine';
SELECT ins('widened');
SELECT mine FROM aibilling.outbox_entry JOIN u USING (id) WHERE external_id = 'widened';
CALL ship('widened', 'delivered');
SELECT external_id, (aibilling.usage_status('u', id)).state FROM u WHERE external_id IN ('indexed', 'widened') ORDER BY 1;
SELECT deliveries > 0 AS some, last_error FROM aibilling.status WHERE usage_table = 'u'::regclass;
ALTER TABLE aibilling.outbox_entry DROP mine;
ALTER TABLE aibilling.delivery DROP mine;

-- What status tells of the ledger, most of which is summed up, against all of it: u is busy, v has long been idle, no
-- delivery of w was accepted, x has none.
BEGIN;
DELETE FROM aibilling.delivery;
SELECT aibilling.create_usage_table(name, server => 'polar') FROM unnest('{v,w,x}'::text[]) name;
INSERT INTO aibilling.delivery (id, server, usage_table, usage_ids, events, bytes, state, attempts, inserted, duplicates,
	unexpected_duplicates, vanished, started_at, finished_at, error) OVERRIDING SYSTEM VALUE
SELECT n, 'polar', name::regclass, int8multirange(int8range(n, n + 1)), n % 7 + 1, 1, s, 1,
	CASE WHEN s = 'delivered' THEN n % 7 END, CASE WHEN s = 'delivered' THEN n % 3 END, n % 5 / 4, n % 11 / 10, t,
	CASE WHEN s <> 'sending' THEN t END, CASE WHEN n IN (1000, 1001, 1302) OR name = 'w' THEN 'error ' || n END
FROM generate_series(1, 2700) n,
	LATERAL (VALUES (CASE WHEN n <= 300 AND n % 2 = 0 THEN 'v' WHEN n <= 20 OR n = 2600 THEN 'w' ELSE 'u' END)) AS w (name),
	LATERAL (VALUES ('2026-01-01'::timestamptz + make_interval(mins => n),
		CASE WHEN n > 2690 THEN 'sending' WHEN n % 10 = 8 THEN 'rejected' WHEN n % 10 = 9 OR name = 'w' THEN 'failed'
			ELSE 'delivered' END)) AS d (t, s);
INSERT INTO aibilling.delivery_total
SELECT usage_table, max(id), count(*) FILTER (WHERE state = 'delivered'),
	coalesce(sum(events) FILTER (WHERE state = 'delivered'), 0), coalesce(sum(duplicates), 0), sum(unexpected_duplicates),
	sum(vanished)
FROM aibilling.delivery WHERE id <= 2000 GROUP BY usage_table;
CREATE TEMP TABLE told AS
SELECT a.usage AS usage_table, coalesce(sum(events) FILTER (WHERE state = 'sending'), 0) AS in_flight,
	max(finished_at) FILTER (WHERE state = 'delivered') AS last_delivery,
	count(*) FILTER (WHERE state = 'delivered') AS deliveries,
	coalesce(sum(events) FILTER (WHERE state = 'delivered'), 0) AS delivered, coalesce(sum(duplicates), 0) AS duplicates,
	coalesce(sum(unexpected_duplicates), 0) AS unexpected_duplicates, coalesce(sum(vanished), 0) AS vanished
FROM aibilling.usage_table a LEFT JOIN aibilling.delivery d ON d.usage_table = a.usage GROUP BY a.usage;
TABLE told ORDER BY usage_table::text;
CREATE TEMP VIEW wrong AS
SELECT usage_table, in_flight, last_delivery, deliveries, delivered, duplicates, unexpected_duplicates, vanished
FROM aibilling.status EXCEPT TABLE told;
TABLE wrong;
-- The last error, if it is not older than the last 1,000 that are summed up.
SELECT usage_table, last_error FROM aibilling.status ORDER BY usage_table::text;
UPDATE aibilling.delivery SET error = NULL WHERE id > 1001 AND usage_table = 'u'::regclass;
SELECT last_error FROM aibilling.status WHERE usage_table = 'u'::regclass;
UPDATE aibilling.delivery SET error = NULL WHERE id = 1001;
SELECT last_error FROM aibilling.status WHERE usage_table = 'u'::regclass;
UPDATE aibilling.delivery SET error = 'new' WHERE id = 2500;
SELECT last_error FROM aibilling.status WHERE usage_table = 'u'::regclass;
-- What is summed up may be deleted: only when the last delivery of v was is forgotten.
DELETE FROM aibilling.delivery WHERE id <= 2000;
SELECT usage_table, in_flight, deliveries FROM wrong;
ROLLBACK;

--
-- More than 100,000 rows are estimated, and status says so
--
TRUNCATE u;
CREATE FUNCTION backlog(state "char", blocks int, OUT pending bigint, OUT estimated boolean, OUT unpriced bigint,
	OUT rejected bigint, OUT status text) LANGUAGE plpgsql AS $$
BEGIN
	INSERT INTO aibilling.outbox_entry (usage_table, state, attempts, outcome_unknown, not_before, id, ids)
	SELECT 'u', backlog.state, 0, false,
		CASE backlog.state WHEN 'w' THEN '2999-01-01'::timestamptz - make_interval(days => i) ELSE '-infinity' END,
		i * 1024, int8multirange(int8range(i * 1024, i * 1024 + 1024)) FROM generate_series(1001, 1000 + blocks) i;
	SELECT s.pending, s.pending_estimated, s.unpriced, s.rejected, substring(s.status FROM '(?:about )?[0-9]+ rows .*')
	INTO backlog.pending, backlog.estimated, backlog.unpriced, backlog.rejected, backlog.status
	FROM aibilling.status s WHERE s.usage_table = 'u'::regclass;
	DELETE FROM aibilling.outbox_entry WHERE usage_table = 'u'::regclass;
END $$;
SELECT blocks * 1024 AS rows, b.* FROM unnest('{97,98,99,200}'::int[]) blocks, backlog('p', blocks) b;
-- Those that wait for a time are counted in its order, here against that of their ids.
SELECT blocks * 1024 AS rows, b.* FROM unnest('{98,99,200}'::int[]) blocks, backlog('w', blocks) b;
SELECT blocks * 1024 AS rows, b.* FROM unnest('{98,200}'::int[]) blocks, backlog('u', blocks) b;
SELECT blocks * 1024 AS rows, b.* FROM unnest('{98,200}'::int[]) blocks, backlog('r', blocks) b;
DROP FUNCTION backlog;

--
-- What an UPDATE or DELETE reads does not depend on what else waits or has been delivered, whatever the plans
--
CREATE FUNCTION tuples_read(name regclass) RETURNS bigint LANGUAGE sql AS
$$SELECT sum(pg_stat_get_xact_tuples_returned(r) + pg_stat_get_xact_tuples_fetched(r))
	FROM (SELECT name::oid AS r UNION ALL SELECT indexrelid FROM pg_index WHERE indrelid = name) t$$;
CREATE FUNCTION reads(statement text, OUT entries bigint, OUT deliveries bigint) LANGUAGE plpgsql AS $$
BEGIN
	entries := -tuples_read('aibilling.outbox_entry');
	deliveries := -tuples_read('aibilling.ledger');
	EXECUTE statement;
	entries := entries + tuples_read('aibilling.outbox_entry');
	deliveries := deliveries + tuples_read('aibilling.ledger');
END $$;
SELECT ins('sent');
SELECT ins('pending', 'deleted');
SELECT ins('rejected', 'unnamed');
CALL ship('sent', 'delivered');
SET client_min_messages = error;
UPDATE u SET external_customer_id = '' WHERE external_id IN ('rejected', 'unnamed');
INSERT INTO aibilling.outbox_entry (usage_table, state, attempts, outcome_unknown, not_before, id, ids)
SELECT 'u', state, 0, false, '-infinity', i * 1024, int8multirange(int8range(i * 1024, i * 1024 + 1024))
FROM generate_series(1001, 2000) i, unnest('{p,r,u}'::"char"[]) state;
INSERT INTO aibilling.delivery (server, usage_table, usage_ids, events, bytes, state, attempts, started_at, finished_at)
SELECT 'polar', 'u', int8multirange(int8range(i * 1024, i * 1024 + 1024)), 1024, 100, 'delivered', 1, now(), now()
FROM generate_series(3001, 4000) i;
BEGIN;
SELECT set_config('plan_cache_mode', mode, true), statement, entries <= 20 AS few_entries, deliveries <= 20 AS few_deliveries
FROM unnest('{force_custom_plan,force_generic_plan}'::text[]) mode,
	unnest(ARRAY[$$UPDATE u SET input_tokens = input_tokens + 1 WHERE external_id = 'pending'$$,
		$$UPDATE u SET external_customer_id = 'c' || input_tokens WHERE external_id = 'rejected'$$]) statement, reads(statement);
SELECT statement, entries <= 20 AS few_entries, deliveries <= 20 AS few_deliveries
FROM unnest(ARRAY[$$DELETE FROM u WHERE external_id = 'sent'$$, $$DELETE FROM u WHERE external_id = 'deleted'$$,
	$$DELETE FROM u WHERE external_id = 'unnamed'$$, $$SELECT ins('another')$$]) statement, reads(statement);
ROLLBACK;
RESET client_min_messages;
DELETE FROM aibilling.outbox_entry WHERE usage_table = 'u'::regclass;
DELETE FROM aibilling.delivery WHERE usage_table = 'u'::regclass;
DROP FUNCTION reads, tuples_read;
TRUNCATE u;

--
-- One rejected row is released, the others stay; all that waits can be looked at
--
SET client_min_messages = error;
INSERT INTO u (external_id, occurred_at, provider, model, external_customer_id, input_tokens) VALUES
	('ready', '2026-01-02', 'acme', 'm', 'c', 1), ('no price', '2026-01-02', 'acme', 'nowhere', 'c', 1),
	('no customer', '2026-01-02', 'acme', 'm', NULL, 1), ('nor here', '2026-01-02', 'acme', 'm', NULL, 1);
SELECT external_id FROM aibilling.preview('u') JOIN u ON id = usage_id ORDER BY id;
SELECT aibilling.retry('u', ARRAY(SELECT id FROM u WHERE external_id = 'nor here'));
SELECT external_id, w.state FROM u JOIN waiting w ON usage_id = id ORDER BY id;
UPDATE u SET external_customer_id = NULL WHERE external_id = 'ready';
SELECT external_id, w.state FROM u JOIN waiting w ON usage_id = id ORDER BY id;
-- The cost of a row whose price is gone would be unknown.
BEGIN;
DELETE FROM aibilling.price WHERE provider = 'acme' AND model = 'm';
SELECT external_id, old_cost_nanos, new_cost_nanos, action FROM aibilling.reprice('u') JOIN u ON id = usage_id ORDER BY id;
ROLLBACK;
TRUNCATE u;
-- A row that comes back keeps its cost, and is queued as one that Polar may have.
SELECT ins('returns');
CALL ship('returns', 'delivered');
CREATE TEMP TABLE archive AS SELECT * FROM u;
DELETE FROM u;
UPDATE aibilling.price SET input = 4 WHERE provider = 'acme' AND model = 'm';
-- But if somebody else brings it.
BEGIN;
CREATE ROLE regress_outbox_app;
GRANT SELECT, INSERT ON u, archive TO regress_outbox_app;
SET LOCAL ROLE regress_outbox_app;
INSERT INTO u SELECT * FROM archive RETURNING external_id, cost_nanos;
ROLLBACK;
INSERT INTO u SELECT * FROM archive;
SELECT external_id, cost_nanos, state, outcome_unknown FROM u JOIN aibilling.outbox_entry e ON e.usage_table = 'u'::regclass AND e.id = u.id;
UPDATE aibilling.price SET input = 3 WHERE provider = 'acme' AND model = 'm';
DROP TABLE archive;
TRUNCATE u;
-- Ids in any order, with gaps; times that differ; a delivered row beside new ones of the same transaction.
INSERT INTO u (id, external_id, occurred_at, provider, model, external_customer_id, input_tokens)
SELECT 100000 + n, 'row ' || n, CASE WHEN n > 90 THEN '2998-01-01'::timestamptz + make_interval(days => n) ELSE '2026-01-02' END, 'acme', 'm', 'c', 1
FROM unnest('{9,3,7,5,1,11,12,91,93,92}'::int[]) n;
SELECT external_id, state, not_before, usage_id FROM waiting LEFT JOIN u ON id = usage_id ORDER BY usage_id;
TRUNCATE u;
SELECT ins('delivered');
CALL ship('delivered', 'delivered');
BEGIN;
SELECT ins('new');
UPDATE u SET input_tokens = 1 WHERE external_id = 'delivered';
ROLLBACK;
TRUNCATE u;
-- One statement that deletes a row and inserts it with other counts does not choose its cost.
SELECT ins('chosen');
WITH gone AS (DELETE FROM u WHERE external_id = 'chosen' RETURNING *)
INSERT INTO u (id, external_id, occurred_at, provider, model, external_customer_id, input_tokens, cost_nanos, cost_cents, cost_status)
SELECT id, external_id, occurred_at, provider, model, external_customer_id, 2000, 7, 7, 'priced' FROM gone
RETURNING external_id, input_tokens, cost_nanos;
TRUNCATE u;
-- What its owner has loaded without sending is counted.
SET aibilling_polar.enqueue = off;
SELECT ins('history', 'more history');
RESET aibilling_polar.enqueue;
SELECT substring(status FROM '[0-9]+ rows were priced and not queued[^;]*') FROM aibilling.status WHERE usage_table = 'u'::regclass;
TRUNCATE u;
RESET client_min_messages;

--
-- Rows in flight stay what they are
--
SELECT ins('flying');
SELECT ins('waits');
SELECT ins('unknown');
CALL ship('flying', 'sending');
-- As a request without an answer leaves it, once its row is rejected.
UPDATE aibilling.outbox_entry e SET outcome_unknown = true FROM u WHERE external_id = 'unknown' AND e.id = u.id;
UPDATE u SET input_tokens = 1 WHERE external_id = 'unknown';
DELETE FROM u WHERE external_id = 'unknown';
UPDATE aibilling.price SET input = 6 WHERE provider = 'acme' AND model = 'm';
SELECT external_id, state, action FROM aibilling.reprice('u', dry_run => false) JOIN u ON id = usage_id ORDER BY id;
SELECT external_id, cost_nanos FROM u ORDER BY id;
-- Nor are they changed because a trigger has just failed the repricing of others.
CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RAISE 'not now'; END$$;
CREATE TRIGGER fail AFTER UPDATE ON u FOR EACH STATEMENT EXECUTE FUNCTION fail();
UPDATE aibilling.price SET input = 7 WHERE provider = 'acme' AND model = 'm';
BEGIN;
SAVEPOINT s;
SELECT count(*) FROM aibilling.reprice('u', dry_run => false);
ROLLBACK TO s;
DROP TRIGGER fail ON u;
CALL ship('waits', 'delivered');
UPDATE u SET input_tokens = 1 WHERE external_id = 'waits';
ROLLBACK;
UPDATE aibilling.delivery SET state = 'delivered' WHERE state = 'sending';
DROP TRIGGER fail ON u;
DROP FUNCTION fail;
TRUNCATE u;
UPDATE aibilling.price SET input = 3 WHERE provider = 'acme' AND model = 'm';

--
-- Rows of partitions, moved and deleted in one transaction
--
SET client_min_messages = error;
CREATE TABLE parted (LIKE u INCLUDING DEFAULTS, region text NOT NULL DEFAULT 'a', PRIMARY KEY (id, region)) PARTITION BY LIST (region);
CREATE TABLE parted_a PARTITION OF parted FOR VALUES IN ('a');
CREATE TABLE parted_b PARTITION OF parted FOR VALUES IN ('b');
CREATE UNIQUE INDEX ON parted_b (external_id);
SELECT aibilling.attach('parted', 'polar');
CREATE FUNCTION put(key bigint, place text, name text) RETURNS void LANGUAGE sql AS
$$INSERT INTO parted (id, region, external_id, provider, model, external_customer_id, input_tokens)
	VALUES (key, place, name, 'acme', 'm', 'c', 1000)$$;
CREATE VIEW parted_outbox AS
	SELECT usage_id, state, external_id FROM aibilling.outbox LEFT JOIN parted ON id = usage_id
	WHERE usage_table = 'parted'::regclass ORDER BY usage_id;
SELECT put(n, 'a', 'row ' || n) FROM generate_series(1, 3) n;
-- A move that changes what is billed is priced anew, another keeps its cost.
BEGIN;
UPDATE aibilling.price SET input = 4 WHERE provider = 'acme' AND model = 'm';
UPDATE parted SET region = 'b' WHERE id = 1;
UPDATE parted SET region = 'b', input_tokens = 2000 WHERE id = 2;
SELECT id, tableoid::regclass, input_tokens, cost_nanos FROM parted ORDER BY id;
ROLLBACK;
BEGIN;
UPDATE parted SET tags = '{"a": 1}' WHERE id = 1;
DELETE FROM parted WHERE id = 1;
COMMIT;
BEGIN;
UPDATE parted SET region = 'b' WHERE id = 2;
DELETE FROM parted WHERE id = 2;
COMMIT;
SELECT * FROM parted_outbox;
-- A move that fails leaves no mark on another row of the same id.
SELECT put(4, 'b', 'row 3');
BEGIN;
SAVEPOINT s;
UPDATE parted SET region = 'b' WHERE id = 3;
ROLLBACK TO s;
DELETE FROM parted WHERE id = 3;
SELECT put(3, 'a', 'row 3 again');
COMMIT;
SELECT * FROM parted_outbox;
DROP VIEW parted_outbox;
DROP FUNCTION put;
DROP TABLE parted;
RESET client_min_messages;

-- The first id of a block of ids waits, and no other one of its block.
SELECT aibilling.create_usage_table('blocks', server => 'polar');
SET client_min_messages = error;
INSERT INTO blocks (id, external_id, provider, model, external_customer_id, input_tokens) VALUES (2048, 'waits', 'acme', 'nobody knows', 'c', 1);
SET aibilling_polar.enqueue = off;
INSERT INTO blocks (id, external_id, provider, model, external_customer_id, input_tokens) VALUES (2050, 'loaded', 'acme', 'nobody knows', 'c', 1);
RESET aibilling_polar.enqueue;
UPDATE blocks SET model = 'm' WHERE id = 2050;
SELECT usage_id, state FROM aibilling.outbox WHERE usage_table = 'blocks'::regclass;
DROP TABLE blocks;
RESET client_min_messages;

-- The extension goes, by the transaction that has inserted a row.
BEGIN;
SELECT ins('kept');
SET LOCAL client_min_messages = error;
DROP EXTENSION aibilling_polar CASCADE;
COMMIT;
SELECT external_id, cost_nanos FROM u WHERE external_id = 'kept';
DROP TABLE u;
DROP FUNCTION event_name, show_event, ident, ins, keys;
DROP PROCEDURE ship;
CREATE EXTENSION aibilling_polar;
