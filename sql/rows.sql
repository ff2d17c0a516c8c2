-- Rows of every kind in a usage table: what they cost, that explain_cost adds up to that to the
-- last digit, and that sums over any grouping are the sums of the rows.
SET timezone = 'UTC';
CREATE SERVER polar FOREIGN DATA WRAPPER polar OPTIONS (url 'http://127.0.0.1:1', event_name 'llm_usage');
SELECT aibilling.create_usage_table('rows', server => 'polar');
INSERT INTO aibilling.price (provider, model, service_tier, context_above, valid_from, daily_from, daily_to,
	input, output, cache_read, cache_write, cache_write_1h, reasoning, request, web_search, units, discount, multiplier) VALUES
	('p', 'plain', 'standard', 0, '-infinity', NULL, NULL, 3, 15, 0.3, 3.75, 6, NULL, NULL, 0.01, NULL, NULL, NULL),
	('p', 'nano', 'standard', 0, '-infinity', NULL, NULL, 0.0005, 0.0005, 0.0025, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL),
	('p', 'less', 'standard', 0, '-infinity', NULL, NULL, 2.5, 10, NULL, NULL, NULL, NULL, 0.003, 0.01, '{"image": 0.1}', 0.1, NULL),
	('p', 'region', 'standard', 0, '-infinity', NULL, NULL, 2.5, 15, 0.25, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 1.1),
	('p', 'both', 'standard', 0, '-infinity', NULL, NULL, 2.5, 15, NULL, NULL, NULL, NULL, 0.003, 0.01, NULL, 0.333333333, 1.1),
	('p', 'night', 'standard', 0, '-infinity', NULL, NULL, 0.55, 2.19, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL),
	('p', 'night', 'standard', 0, '-infinity', '16:30', '00:30', 0.135, 0.55, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL),
	('p', 'long', 'standard', 0, '-infinity', NULL, NULL, 3, 15, 0.3, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL),
	('p', 'long', 'standard', 200000, '-infinity', NULL, NULL, 6, 22.5, 0.6, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL),
	('p', 'from', 'standard', 0, '-infinity', NULL, NULL, 1, 1, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL),
	('p', 'from', 'standard', 127999, '-infinity', NULL, NULL, 2, 2, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL),
	('p', 'dated', 'standard', 0, '-infinity', NULL, NULL, 10, 40, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL),
	('p', 'dated', 'standard', 0, '2025-06-10', NULL, NULL, 2, 8, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL),
	('p', 'dated', 'priority', 0, '2025-06-10', NULL, NULL, 3.5, 14, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL),
	('p', 'thinks', 'standard', 0, '-infinity', NULL, NULL, 2, 8, NULL, NULL, NULL, 3, NULL, 0.005, '{"citation_tokens": 2}', NULL, NULL),
	('p', 'media', 'standard', 0, '-infinity', NULL, NULL, 2.5, 10, 1.25, NULL, NULL, NULL, NULL, NULL,
		'{"input_audio_tokens": 40, "cache_read_audio_tokens": 2.5, "input_image_tokens": 5, "output_audio_tokens": 80,
		  "output_image_tokens": 30, "output_video_tokens": 17.5, "image": 0.04, "second": 0.0001, "audio_second": 0.00001111,
		  "video_second": 0.1, "character": 0.00003, "page": 0.0015, "query": 0.002, "pixel": 0.0000000019, "session": 0.03,
		  "gpu_minute": 0.07}', NULL, NULL),
	('p', 'free', 'standard', 0, '-infinity', NULL, NULL, 0, 0, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL),
	('eu.p', 'plain', 'standard', 0, '-infinity', NULL, NULL, 3.3, 16.5, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL);
INSERT INTO aibilling.price (provider, model, input) VALUES ('bedrock', 'eu.acme.m-20250929-v1:0', 3.3), ('bedrock', 'acme.m-20250929-v1:0', 3);

SET client_min_messages = error;
\set cols 'external_id, occurred_at, provider, model, external_customer_id'
\set c ',''c'''
INSERT INTO rows (:cols, input_tokens, output_tokens, cache_read_tokens, cache_write_tokens, cache_write_1h_tokens, reasoning_tokens, web_search_count)
VALUES ('plain', '2026-01-01 12:00', 'p', 'plain' :c, 1001, 333, 0, 0, 0, 0, 0),
	('every cache', '2026-01-01 12:00', 'p', 'plain' :c, 100298, 503, 100000, 148, 100, 100, 2),
	('two halves', '2026-01-01 12:00', 'p', 'nano' :c, 1, 1, 0, 0, 0, 0, 0),
	('a half', '2026-01-01 12:00', 'p', 'nano' :c, 1, 0, 0, 0, 0, 0, 0),
	('no rate rounded', '2026-01-01 12:00', 'p', 'nano' :c, 1000000, 0, 1000000, 0, 0, 0, 0),
	('discount', '2026-01-01 12:00', 'p', 'less' :c, 1001, 333, 0, 0, 0, 0, 1),
	('multiplier', '2026-01-01 12:00', 'p', 'region' :c, 10, 1, 3, 0, 0, 0, 0),
	('discount times multiplier', '2026-01-01 12:00', 'p', 'both' :c, 1001, 333, 0, 0, 0, 77, 1),
	('last peak', '2026-01-01 16:29:59.999999', 'p', 'night' :c, 1000, 2000, 0, 0, 0, 0, 0),
	('first off-peak', '2026-01-01 16:30', 'p', 'night' :c, 1000, 2000, 0, 0, 0, 0, 0),
	('past midnight', '2026-01-02 00:29:59.999999', 'p', 'night' :c, 1000, 2000, 0, 0, 0, 0, 0),
	('peak again', '2026-01-02 00:30', 'p', 'night' :c, 1000, 2000, 0, 0, 0, 0, 0),
	('at the threshold', '2026-01-01 12:00', 'p', 'long' :c, 200000, 1000, 150000, 0, 0, 0, 0),
	('above it, all of it', '2026-01-01 12:00', 'p', 'long' :c, 200001, 1000, 150000, 0, 0, 0, 0),
	('below an inclusive one', '2026-01-01 12:00', 'p', 'from' :c, 127999, 1, 0, 0, 0, 0, 0),
	('at an inclusive one', '2026-01-01 12:00', 'p', 'from' :c, 128000, 1, 0, 0, 0, 0, 0),
	('day before', '2025-06-09 23:59:59.999999', 'p', 'dated' :c, 1000, 100, 0, 0, 0, 0, 0),
	('first day', '2025-06-10', 'p', 'dated' :c, 1000, 100, 0, 0, 0, 0, 0),
	('cheap reasoning', '2026-01-01 12:00', 'p', 'thinks' :c, 33, 81160, 0, 0, 0, 73997, 18),
	('free', '2026-01-01 12:00', 'p', 'free' :c, 123456, 654321, 0, 0, 0, 0, 0),
	('nothing', '2026-01-01 12:00', 'p', 'plain' :c, 0, 0, 0, 0, 0, 0, 0),
	('region', '2026-01-01 12:00', 'bedrock', 'eu.acme.m-20250929-v1:0' :c, 1000000, NULL, NULL, NULL, NULL, NULL, NULL),
	('no region', '2026-01-01 12:00', 'bedrock', 'acme.m-20250929-v1:0' :c, 1000000, NULL, NULL, NULL, NULL, NULL, NULL),
	('unknown region', '2026-01-01 12:00', 'bedrock', 'us.acme.m-20250929-v1:0' :c, 1000000, NULL, NULL, NULL, NULL, NULL, NULL),
	('no date', '2026-01-01 12:00', 'bedrock', 'acme.m' :c, 1000000, NULL, NULL, NULL, NULL, NULL, NULL),
	('vendor prefix', '2026-01-01 12:00', 'p', 'p/plain' :c, 1000000, NULL, NULL, NULL, NULL, NULL, NULL),
	('another vendor', '2026-01-01 12:00', 'p', 'q/plain' :c, 1000000, NULL, NULL, NULL, NULL, NULL, NULL),
	('incomplete', '2026-01-01 12:00', 'p', 'night' :c, 1000, 100, 10, 0, 0, 0, 3);
INSERT INTO rows (:cols, service_tier, input_tokens, output_tokens, web_search_count)
SELECT 'tier ' || tier, '2026-01-01 12:00', 'p', model :c, tier, 1001, 333, CASE model WHEN 'both' THEN 1 END
FROM (VALUES ('batch', 'both'), ('flex', 'plain'), ('priority', 'dated'), ('scale', 'plain'),
	('', 'plain'), ('default', 'plain'), ('auto', 'plain'), ('on_demand', 'plain')) t (tier, model);
INSERT INTO rows (:cols, input_tokens, output_tokens, cache_read_tokens, units) VALUES
	('media', '2026-01-01 12:00', 'p', 'media' :c, 5000, 900, 2000, '{"input_audio_tokens": 1500, "cache_read_audio_tokens": 500,
		"input_image_tokens": 300, "output_audio_tokens": 600, "output_image_tokens": 50, "output_video_tokens": 7}'),
	('pieces', '2026-01-01 12:00', 'p', 'media' :c, 0, 0, 0, '{"image": 3, "second": 12.345678, "audio_second": 3600, "video_second": 0.04,
		"character": 2999, "page": 29, "query": 1, "pixel": 1048576, "session": 1, "gpu_minute": 0.333333}'),
	('unknown piece', '2026-01-01 12:00', 'p', 'media' :c, 10, 0, 0, '{"tool_call": 1}');
INSERT INTO rows (:cols, input_tokens, provider_cost) VALUES
	('reported', '2026-01-01 12:00', 'p', 'plain' :c, 1000, 0.00123456789012345),
	('correction', '2026-01-01 12:00', 'p', 'plain' :c, NULL, -0.0017),
	('half a nano back', '2026-01-01 12:00', NULL, NULL :c, NULL, -0.0000000005),
	('reported nothing', '2026-01-01 12:00', 'p', 'plain' :c, 1000, 0);
INSERT INTO rows (:cols, usage_format, raw_usage) VALUES
	('raw', '2026-01-01 12:00', 'p', 'plain' :c, 'anthropic', '{"input_tokens": 50, "cache_read_input_tokens": 100000,
		"cache_creation_input_tokens": 248, "cache_creation": {"ephemeral_5m_input_tokens": 148, "ephemeral_1h_input_tokens": 100},
		"output_tokens": 503, "server_tool_use": {"web_search_requests": 2}}'),
	('raw ticks', '2026-01-01 12:00', 'p', 'plain' :c, 'xai', '{"cost_in_usd_ticks": 5}');
RESET client_min_messages;
SELECT external_id, service_tier AS tier, cost_nanos, cost_cents, cost_status FROM rows ORDER BY id;

-- What explain_cost says of each adds up to its cost, exactly.
CREATE VIEW explained AS
SELECT r.*, e.buckets, e.amount_usd, e.complete
FROM rows r CROSS JOIN LATERAL (
	SELECT count(*) AS buckets, sum(x.amount_usd) AS amount_usd, count(*) = count(x.amount_usd) AS complete
	FROM aibilling.explain_cost('rows'::regclass, r.id) x) e;
SELECT count(*), count(*) FILTER (WHERE cost_nanos IS NOT NULL) AS with_cost, min(buckets) FROM explained;
SELECT external_id, cost_cents, amount_usd FROM explained
WHERE cost_cents IS DISTINCT FROM round(CASE WHEN complete THEN amount_usd END * 100, 12)
	OR cost_nanos IS DISTINCT FROM round(CASE WHEN complete THEN amount_usd END * 1000000000);
-- Each amount is what stands beside it.
SELECT r.external_id, x.bucket FROM rows r, LATERAL aibilling.explain_cost('rows'::regclass, r.id) x
WHERE x.amount_usd <> x.quantity * x.price / x.per * x.factor;
-- Some of them in full: bucket, tier, window, card.
SELECT r.external_id, x.bucket, x.quantity, x.price, x.per, x.factor, x.amount_usd, x.card_service_tier AS tier, x.context_above AS above,
	x.daily_from, x.source, x.valid_from, split_part(x.note, '. ', 1) AS note
FROM rows r, LATERAL aibilling.explain_cost('rows'::regclass, r.id) x
WHERE r.external_id IN ('every cache', 'tier batch', 'past midnight', 'above it, all of it', 'first day', 'media', 'correction', 'incomplete', 'unknown region')
ORDER BY r.id, x.bucket COLLATE "C";

-- Sums over any grouping are the sums of the rows.
SELECT g.grouping, count(*) AS groups, sum(g.nanos) = t.nanos AS nanos, sum(g.cents) = t.cents AS cents
FROM (
	SELECT 'model' AS grouping, sum(cost_nanos) AS nanos, sum(cost_cents) AS cents FROM rows GROUP BY model
	UNION ALL SELECT 'tier and status', sum(cost_nanos), sum(cost_cents) FROM rows GROUP BY service_tier, cost_status
	UNION ALL SELECT 'day', sum(cost_nanos), sum(cost_cents) FROM rows GROUP BY date_trunc('day', occurred_at)
	UNION ALL SELECT 'row', sum(cost_nanos), sum(cost_cents) FROM rows GROUP BY id) g,
	(SELECT sum(cost_nanos) AS nanos, sum(cost_cents) AS cents FROM rows) t
GROUP BY g.grouping, t.nanos, t.cents ORDER BY 1;

-- What was reported, against the prices.
SELECT r.external_id, r.provider_cost, c.cost_usd, r.provider_cost - c.cost_usd AS difference
FROM rows r, LATERAL aibilling.cost(r.provider, r.model, r.input_tokens, r.output_tokens, at => r.occurred_at) c
WHERE r.cost_status = 'reported' ORDER BY r.id;

-- A later price changes no old row, and one corrected in its place is told apart from what was billed.
INSERT INTO aibilling.price (provider, model, valid_from, input, output) VALUES ('p', 'plain', '2026-02-01', 30, 150);
SELECT bucket, amount_usd, valid_from FROM aibilling.explain_cost('rows'::regclass, (SELECT id FROM rows WHERE external_id = 'plain'));
UPDATE aibilling.price SET input = 4 WHERE model = 'plain' AND valid_from = '-infinity';
UPDATE aibilling.price SET input = NULL WHERE model = 'from';
DELETE FROM aibilling.price WHERE model = 'free';
SELECT r.external_id, r.cost_cents, x.bucket, x.price, x.amount_usd, split_part(x.note, '. ', 1) AS note
FROM rows r, LATERAL aibilling.explain_cost('rows'::regclass, r.id) x
WHERE r.external_id IN ('plain', 'at an inclusive one', 'free', 'nothing') ORDER BY r.id, x.bucket COLLATE "C";
SELECT count(*) FROM explained WHERE cost_nanos IS NOT NULL
	AND (cost_cents <> round(amount_usd * 100, 12) OR cost_nanos <> round(amount_usd * 1000000000));

DROP VIEW explained;
DROP TABLE rows;
DROP SERVER polar;
DELETE FROM aibilling.price;
