-- The cost family: counts times prices, rounded once.
SET timezone = 'UTC';
\set ON_ERROR_ROLLBACK on
BEGIN;
INSERT INTO aibilling.price (provider, model, input, output, cache_read, cache_write, cache_write_1h,
	reasoning, request, web_search, units, discount, multiplier) VALUES
	('p', 'text', 2.5, 10, 1.25, 3.125, 5, NULL, NULL, NULL, NULL, NULL, NULL),
	('p', 'all', 2, 8, 0.2, 2.5, 4, 16, 0.005, 0.01,
		'{"image": 0.04, "second": 0.0001, "my_unit": 0.000000000001, "input_audio_tokens": 40,
		  "input_image_tokens": 5, "cache_read_audio_tokens": 4, "output_audio_tokens": 80,
		  "output_image_tokens": 30, "output_video_tokens": 20, "citation_tokens": 1}', NULL, NULL),
	('p', 'free', 0, 0, NULL, NULL, NULL, NULL, NULL, NULL, '{"image": 0}', NULL, NULL),
	('p', 'cut', 2, 8, NULL, NULL, NULL, NULL, 0.01, NULL, '{"image": 0.1}', 0.1, 1.1),
	('p', 'gift', 2, 8, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 1, NULL),
	('p', 'nano', 0.001, 0.0005, NULL, NULL, NULL, 0.000499999, NULL, NULL, '{"second": 0.0000000005}', NULL, NULL),
	('p', 'tiny', 0.000000001, 0.000000001, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL),
	('p', 'dear', 999999999.999999999, 999999999.999999999, NULL, NULL, NULL, NULL, 999999999.999999999,
		999999999.999999999, NULL, NULL, 999999999.999999999);

-- All results agree with each other.
SELECT * FROM aibilling.cost('p', 'text', 1200, 350);
SELECT aibilling.cost_nanos('p', 'text', 1200, 350), aibilling.cost_cents('p', 'text', 1200, 350),
	aibilling.polar_cost('p', 'text', 1200, 350);
SELECT * FROM aibilling.cost('p', 'text', 1000, 100, 600, 200, 100, 50);
SELECT * FROM aibilling.cost('p', 'text');

-- Each bucket is billed once, at its own price.
SELECT bucket, quantity, price, per, factor, amount_usd, note
FROM aibilling.explain_cost('p', 'all', 10000, 5000, 3000, 1000, 500, 700, 2, 3,
	'{"image": 2, "second": 12.5, "my_unit": 1, "input_audio_tokens": 2000, "input_image_tokens": 400,
	  "cache_read_audio_tokens": 1500, "output_audio_tokens": 600, "output_image_tokens": 50,
	  "output_video_tokens": 25, "citation_tokens": 100}');
SELECT c.*, (SELECT sum(amount_usd) FROM aibilling.explain_cost('p', 'all', 10000, 5000, 3000, 1000, 500, 700,
	2, 3, units)) AS explained
FROM (SELECT '{"image": 2, "second": 12.5, "my_unit": 1, "input_audio_tokens": 2000, "input_image_tokens": 400,
	"cache_read_audio_tokens": 1500, "output_audio_tokens": 600, "output_image_tokens": 50,
	"output_video_tokens": 25, "citation_tokens": 100}'::jsonb AS units) u,
	aibilling.cost('p', 'all', 10000, 5000, 3000, 1000, 500, 700, 2, 3, units) c;

-- Free, unknown, and not counted are three things.
SELECT * FROM aibilling.cost('p', 'free', 100, 100, units => '{"image": 3}');
SELECT * FROM aibilling.cost('p', 'gift', 100, 100);
SELECT * FROM aibilling.cost('p', 'none', 100, 100);
SELECT * FROM aibilling.cost('p', 'text', 100, 100, web_search_count => 1, units => '{"image": 1, "page": 0}');
SELECT * FROM aibilling.cost('p', 'text', NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL);
SELECT * FROM aibilling.cost('p', 'text', NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, '{}');
SELECT * FROM aibilling.cost('p', 'text', 100, NULL, NULL, NULL, NULL, NULL, NULL, NULL, '{"page": null}');
SELECT bucket, quantity, price, amount_usd, split_part(note, '. ', 1) AS note
FROM aibilling.explain_cost('p', 'text', 100, units => '{"image": 1}');
SELECT bucket, quantity, price, amount_usd, split_part(note, '. ', 1) AS note FROM aibilling.explain_cost('p', 'none', 100, 100);
SELECT bucket, quantity, price, amount_usd, note FROM aibilling.explain_cost('p', 'text');
SELECT bucket, quantity, price, amount_usd, note
FROM aibilling.explain_cost('p', 'text', NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL);
SELECT aibilling.cost_nanos('p', 'none', 1), aibilling.cost_cents('p', 'none', 1), aibilling.polar_cost('p', 'none', 1);

-- A request not counted is one; fees are per request.
SELECT requests, cost_usd FROM unnest(ARRAY[NULL, 0, 1, 3]) requests,
	aibilling.cost('p', 'all', 0, 0, request_count => requests);

-- Discount and multiplier are for everything, exactly.
SELECT * FROM aibilling.cost('p', 'cut', 1001, 333, units => '{"image": 1}');
SELECT * FROM aibilling.cost('p', 'cut', 1001, 333, service_tier => 'batch');

-- Two half nanos make one; a rate is never rounded before it is multiplied.
SELECT input, output, reasoning, cost_usd, cost_nanos FROM (VALUES
	(0, 1, 0), (0, 2, 0), (0, 3, 0), (0, 1, 1), (1, 1, 1)) v (input, output, reasoning),
	aibilling.cost('p', 'nano', input, output, reasoning_tokens => reasoning);
SELECT input, cost_usd, cost_nanos, cost_cents FROM unnest(ARRAY[1, 49, 50, 499999, 500000, 1000000]) input,
	aibilling.cost('p', 'tiny', input);
SELECT cost_usd, cost_nanos, cost_cents FROM aibilling.cost('p', 'nano', units => '{"second": 1}');
SELECT cost_usd, cost_nanos, cost_cents FROM aibilling.cost('p', 'nano', units => '{"second": 0.999999}');

-- To the last nano that fits, and not beyond.
SELECT aibilling.cost_nanos('p', 'nano', 9223372036854775807);
SELECT aibilling.cost_nanos('p', 'nano', 9223372036854775807, 1, reasoning_tokens => 1);
SELECT aibilling.cost_nanos('p', 'nano', 9223372036854775807, 1);
SELECT aibilling.cost_nanos('p', 'nano', 9223372036854775807, units => '{"second": 0.999}');
SELECT aibilling.cost_nanos('p', 'nano', 9223372036854775807, units => '{"second": 1}');
SELECT * FROM aibilling.cost('p', 'dear', 1);
SELECT aibilling.cost_cents('p', 'dear', 9223372036854775807, 9223372036854775807,
	request_count => 9223372036854775807);
SELECT aibilling.cost_nanos('p', 'dear', 9223372036854775807);
SELECT aibilling.polar_cost('p', 'tiny', 1), aibilling.polar_cost('p', 'text', 0);

-- Counts that contradict each other are errors that say how.
SELECT aibilling.cost_nanos('p', 'text', -1);
SELECT aibilling.cost_nanos('p', 'text', web_search_count => -1);
SELECT aibilling.cost_nanos('p', 'none', 100, 0, 60, 30, 11);
SELECT aibilling.cost_nanos('p', 'none', NULL, 0, 1);
SELECT aibilling.cost_nanos('p', 'text', 9223372036854775807, 0, 9223372036854775807, 9223372036854775807,
	9223372036854775807);
SELECT aibilling.cost_nanos('p', 'text', 0, 10, reasoning_tokens => 11);
SELECT aibilling.cost_nanos('p', 'text', 100, units => '{"input_audio_tokens": 60, "input_image_tokens": 41}');
SELECT aibilling.cost_nanos('p', 'text', 100, 0, 50, units => '{"input_audio_tokens": 51}');
SELECT aibilling.cost_nanos('p', 'text', 100, 0, 50, units => '{"input_audio_tokens": 60, "cache_read_audio_tokens": 51}');
SELECT aibilling.cost_nanos('p', 'text', 100, 0, 50, units => '{"cache_read_audio_tokens": 1}');
SELECT aibilling.cost_nanos('p', 'text', 0, 10, reasoning_tokens => 5, units => '{"output_video_tokens": 6}');
SELECT aibilling.cost_nanos('p', 'text', units => '[]');
SELECT aibilling.cost_nanos('p', 'text', units => '{"image": -0.5}');
SELECT aibilling.cost_nanos('p', 'text', units => '{"image": "two"}');
SELECT aibilling.cost_nanos('p', 'text', units => '{"image": {"a": 1}}');

-- A stored row, with the caller's rights.
SAVEPOINT s;
CREATE TABLE regress_usage (id bigint, occurred_at timestamptz, provider text, model text, service_tier text,
	input_tokens bigint, cache_read_tokens bigint, cache_write_tokens bigint, cache_write_1h_tokens bigint,
	output_tokens bigint, reasoning_tokens bigint, request_count bigint, web_search_count bigint, units jsonb,
	provider_cost numeric);
INSERT INTO regress_usage (id, occurred_at, provider, model, service_tier, input_tokens, output_tokens, provider_cost) VALUES
	(1, '2026-06-15', 'p', 'text', 'batch', 1000, 100, NULL), (2, '2026-06-15', 'p', 'text', NULL, 1000, 100, 0.0040),
	(3, '2026-06-15', 'p', 'text', 'standard', 1000, 100, -0.0000000005), (4, '2026-06-15', 'p', 'text', '', 1, 1, 'NaN'), (7, '2026-06-15', 'p', 'text', '', 1, 1, '-Infinity'),
	(5, NULL, NULL, NULL, NULL, NULL, NULL, NULL);
\x
SELECT * FROM aibilling.explain_cost('regress_usage', 1);
\x
SELECT id, bucket, quantity, price, amount_usd, note
FROM regress_usage u, LATERAL aibilling.explain_cost('regress_usage'::regclass, u.id) WHERE id IN (2, 3, 5);
SELECT * FROM aibilling.explain_cost('regress_usage', 4);
SELECT * FROM aibilling.explain_cost('regress_usage', 7);
SELECT * FROM aibilling.explain_cost('regress_usage', 6);
SELECT * FROM aibilling.explain_cost(0, 1);
CREATE ROLE regress_cost_reader;
SET ROLE regress_cost_reader;
SELECT * FROM aibilling.explain_cost('regress_usage', 1);
ROLLBACK TO s;

-- What the provider reported against what the table says.
CREATE TABLE regress_usage (id bigint, provider text, model text, input_tokens bigint, output_tokens bigint,
	provider_cost numeric);
INSERT INTO regress_usage VALUES (1, 'p', 'text', 1000, 100, 0.0040), (2, 'p', 'text', 10, 1, 0.000035), (3, 'p', 'none', 1, 1, 0.1);
SELECT id, provider_cost, cost_usd, provider_cost - cost_usd AS difference
FROM regress_usage u, LATERAL aibilling.cost(u.provider, u.model, u.input_tokens, u.output_tokens) ORDER BY id;
ROLLBACK TO s;

-- In parallel workers, with the transaction's snapshot.
CREATE TABLE regress_many AS SELECT 'p'::text AS provider, 'text'::text AS model, i::bigint AS n
FROM generate_series(1, 10000) i;
ALTER TABLE regress_many SET (parallel_workers = 2);
SET LOCAL parallel_setup_cost = 0;
SET LOCAL parallel_tuple_cost = 0;
SET LOCAL min_parallel_table_scan_size = 0;
EXPLAIN (COSTS off) SELECT sum(aibilling.cost_nanos(provider, model, n)) FROM regress_many;
SELECT sum(aibilling.cost_nanos(provider, model, n)) FROM regress_many;
SET LOCAL parallel_leader_participation = off;
SELECT sum(aibilling.cost_nanos(provider, model, n)) FROM regress_many;
UPDATE aibilling.price SET input = 5 WHERE model = 'text';
SELECT sum(aibilling.cost_nanos(provider, model, n)) FROM regress_many;
ROLLBACK;

-- Factors of many digits: exact, whichever way they are multiplied.
BEGIN;
INSERT INTO aibilling.price (provider, model, input, output, discount, multiplier)
VALUES ('p', 'factors', 1000, 0, 0.123456789, 999999999.999999999), ('p', 'half', 1000, 0, 0.5, 999999999.999999999);
SELECT model, input, cost_usd, cost_usd = input * 0.001 * 999999999.999999999 * (1 - CASE model WHEN 'half' THEN 0.5 ELSE 0.123456789 END) AS exact
FROM unnest('{factors,half}'::text[]) model, unnest('{1,1000,9999}'::bigint[]) input, aibilling.cost('p', model, input);
INSERT INTO aibilling.price (provider, model, input) VALUES ('p', 'dear', 999999999);
INSERT INTO aibilling.service_tier_rule (provider, service_tier, multiplier) VALUES ('p', 'third', 0.333333333);
SELECT * FROM aibilling.cost('p', 'dear', 9000000000000000000, service_tier => 'third');
ROLLBACK;

-- With units, as without them: a tier's rule is for tokens alone, the nearest step's price of a unit holds, and what
-- counts nothing is not free of charge, but costs 0.
BEGIN;
INSERT INTO aibilling.price (provider, model, context_above, input, request, web_search, units) VALUES
	('p', 'steps', 0, 1, 0.5, 0.25, '{"image": 1, "page": 3}'), ('p', 'steps', 1000, 2, NULL, NULL, '{"image": 2, "second": 5}');
SELECT input, tier, bucket, quantity, price, factor, amount_usd FROM unnest('{1000,1001}'::bigint[]) input, unnest('{standard,batch}'::text[]) tier,
	aibilling.explain_cost('p', 'steps', input, web_search_count => 1, units => '{"image": 1, "page": 1, "second": 0}', service_tier => tier)
ORDER BY input, tier, bucket COLLATE "C";
SELECT input, tier, cost_usd FROM unnest('{1000,1001}'::bigint[]) input, unnest('{standard,batch}'::text[]) tier,
	aibilling.cost('p', 'steps', input, web_search_count => 1, units => '{"image": 1, "page": 1}', service_tier => tier) ORDER BY 1, 2;
SELECT units, cost_usd, status FROM unnest(ARRAY['{"image": 0}', '{"page": 0, "query": 0}']::jsonb[]) units, aibilling.cost('p', 'steps', 0, request_count => 0, units => units);
ROLLBACK;

-- Between units of money, exact.
SELECT from_unit, to_unit, aibilling.convert_cost(1.230, from_unit, to_unit)
FROM unnest(ARRAY['base', 'cents', 'micros', 'nanos']) WITH ORDINALITY f (from_unit, a),
	unnest(ARRAY['base', 'cents', 'micros', 'nanos']) WITH ORDINALITY t (to_unit, b) ORDER BY a, b;
SELECT aibilling.convert_cost(0.123456789012345678901234567890, 'nanos', 'base');
SELECT aibilling.convert_cost(-9223372036854775807, 'base', 'nanos');
SELECT aibilling.convert_cost(NULL, 'base', 'cents');
SELECT aibilling.convert_cost('NaN', 'base', 'cents');
SELECT aibilling.convert_cost(1, 'base', 'cent');
