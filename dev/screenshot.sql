-- Made-up usage for dev/screenshot: a month of a small company whose product grows.
SELECT setseed(0.42);
CREATE EXTENSION aibilling_polar;
SELECT aibilling.load_bundled_prices() \g /dev/null
CREATE SERVER polar FOREIGN DATA WRAPPER polar OPTIONS (url :'url', event_name 'llm_usage', requests_per_minute '0', batch_size '400');
CREATE USER MAPPING FOR PUBLIC SERVER polar OPTIONS (access_token 'polar_oat_test');
SELECT aibilling.create_usage_table('usage', server => 'polar') \g /dev/null
SET client_min_messages = error;
WITH day AS (
	SELECT d, (now() AT TIME ZONE 'UTC')::date - d AS day, CASE WHEN extract(isodow FROM (now() AT TIME ZONE 'UTC')::date - d) > 5 THEN 0.45 ELSE 1 END
		* (1 + (60 - d) * 0.022) AS busy
	FROM generate_series(0, 60) d
), model (provider, model, weight, input, output, cached, reasoning) AS (
	VALUES ('anthropic', 'claude-sonnet-4-5', 30, 9000, 900, 0.55, 0.0), ('openai', 'gpt-5', 26, 6000, 1400, 0.4, 0.6),
		('google', 'gemini-2.5-pro', 14, 11000, 1100, 0.3, 0.5), ('openai', 'gpt-5-mini', 60, 4000, 500, 0.45, 0.4),
		('anthropic', 'claude-opus-4-5', 5, 8000, 1600, 0.5, 0.2), ('google', 'gemini-2.5-flash', 50, 5000, 400, 0.2, 0.2),
		('anthropic', 'claude-haiku-4-5', 35, 3500, 350, 0.35, 0.0), ('openai', 'gpt-4o-mini', 20, 2000, 300, 0.1, 0.0)
), customer (name, weight) AS (
	VALUES ('northwind', 22), ('globex', 15), ('initech', 11), ('umbrella-labs', 9), ('hooli', 8), ('stark-industries', 7), ('acme', 6),
		('wonka', 5), ('soylent', 4), ('tyrell', 4), ('vandelay', 3), ('cyberdyne', 2), ('aperture', 2), ('massive-dynamic', 1)
)
INSERT INTO usage (occurred_at, provider, model, external_customer_id, input_tokens, cache_read_tokens, output_tokens, reasoning_tokens)
SELECT least(day.day::timestamp AT TIME ZONE 'UTC' + random() * interval '24 hours', now() - interval '1 minute'), m.provider, m.model, c.name, t.input,
	(t.input * m.cached * (0.7 + random() * 0.5))::bigint, t.output, (t.output * m.reasoning * (0.6 + random() * 0.5))::bigint
FROM day, model m, customer c, generate_series(1, greatest(1, (day.busy * m.weight * c.weight / 110)::integer)) n,
	LATERAL (SELECT (m.input * (0.5 + random() + n * 0))::bigint * 4 AS input, (m.output * (0.5 + random() + n * 0))::bigint * 4 AS output) t;
INSERT INTO usage (provider, model, external_customer_id, input_tokens, output_tokens)
SELECT 'mistral', 'mistral-next-preview', 'hooli', 2000, 300 FROM generate_series(1, 14);
INSERT INTO usage (provider, model, input_tokens) SELECT 'openai', 'gpt-5', 900 FROM generate_series(1, 3);
