-- The price tables: what they refuse, which card is in force, and that a
-- change is seen at once by whoever has cached a price.
SET timezone = 'UTC';

-- What is no price is refused, NaN above all: it is greater than any number.
\set VERBOSITY terse
INSERT INTO aibilling.price (provider, model, input) VALUES ('p', 'm', 'NaN');
INSERT INTO aibilling.price (provider, model, input) VALUES ('p', 'm', 'infinity');
INSERT INTO aibilling.price (provider, model, input) VALUES ('p', 'm', -1);
INSERT INTO aibilling.price (provider, model, output) VALUES ('p', 'm', 'NaN');
INSERT INTO aibilling.price (provider, model, cache_read) VALUES ('p', 'm', 'NaN');
INSERT INTO aibilling.price (provider, model, cache_write) VALUES ('p', 'm', 'NaN');
INSERT INTO aibilling.price (provider, model, cache_write_1h) VALUES ('p', 'm', 'NaN');
INSERT INTO aibilling.price (provider, model, reasoning) VALUES ('p', 'm', 'NaN');
INSERT INTO aibilling.price (provider, model, request) VALUES ('p', 'm', 'NaN');
INSERT INTO aibilling.price (provider, model, web_search) VALUES ('p', 'm', 'NaN');
INSERT INTO aibilling.price (provider, model, discount) VALUES ('p', 'm', 'NaN');
INSERT INTO aibilling.price (provider, model, discount) VALUES ('p', 'm', 1.1);
INSERT INTO aibilling.price (provider, model, multiplier) VALUES ('p', 'm', 'NaN');
INSERT INTO aibilling.price (provider, model, context_above) VALUES ('p', 'm', -1);
INSERT INTO aibilling.price (provider, model, service_tier) VALUES ('p', 'm', 'default');
INSERT INTO aibilling.price (provider, model, daily_from) VALUES ('p', 'm', '10:00');
INSERT INTO aibilling.price (provider, model, daily_from, daily_to) VALUES ('p', 'm', '10:00', '10:00');
INSERT INTO aibilling.price (provider, model, units) VALUES ('p', 'm', '[1]');
INSERT INTO aibilling.price (provider, model, units) VALUES ('p', 'm', '{"image": -1}');
INSERT INTO aibilling.price (provider, model, units) VALUES ('p', 'm', '{"image": "1"}');
INSERT INTO aibilling.price (provider, model, units) VALUES ('p', 'm', '{"image": [1]}');
INSERT INTO aibilling.price (provider, model, units) VALUES ('p', 'm', '{"image": null}');
INSERT INTO aibilling.service_tier_rule (service_tier, multiplier) VALUES ('x', 'NaN');
INSERT INTO aibilling.service_tier_rule (service_tier, multiplier) VALUES ('standard', 1);
INSERT INTO aibilling.model_alias (kind, pattern, to_provider, to_model) VALUES ('regex', 'x', 'p', 'm');
-- A card has one row for each context tier and window.
BEGIN;
INSERT INTO aibilling.price (provider, model, input) VALUES ('p', 'm', 1);
INSERT INTO aibilling.price (provider, model, input) VALUES ('p', 'm', 2);
ROLLBACK;

-- One million input tokens cost the input price, so a cost tells its card.
CREATE FUNCTION pg_temp.cost_of(provider text, model text, tier text = 'standard',
	at timestamptz = '2026-06-15 12:00+00', input bigint = 1000000)
RETURNS text LANGUAGE sql AS $$
	SELECT concat_ws(' ', trim_scale(cost_usd), status)
	FROM aibilling.cost($1, $2, $5, service_tier => $3, at => $4)
$$;

-- Which card is in force: source, then valid_from, then the daily window.
BEGIN;
INSERT INTO aibilling.price_source VALUES ('first', 1), ('second', 2);
INSERT INTO aibilling.price (provider, model, source, valid_from, input) VALUES
	('p', 'm', 'unlisted', '2026-03-01', 1),
	('p', 'm', 'second', '2026-02-01', 2),
	('p', 'm', 'first', '2026-01-01', 3),
	('p', 'm', 'first', '2026-05-01', 4),
	('p', 'm', 'user', '2026-07-01', 5);
SELECT at, pg_temp.cost_of('p', 'm', at => at) FROM unnest(ARRAY[
	'2025-12-31 23:59:59.999999+00', '2026-01-01 00:00+00', '2026-04-30 23:59:59.999999+00',
	'2026-05-01 00:00+00', '2026-06-30 23:59:59.999999+00', '2026-07-01 00:00+00', 'infinity',
	'-infinity', '0044-03-15 BC']::timestamptz[]) at;
UPDATE aibilling.price_source SET priority = 0 WHERE source = 'second';
SELECT pg_temp.cost_of('p', 'm');
DELETE FROM aibilling.price_source;
SELECT pg_temp.cost_of('p', 'm');
ROLLBACK;

-- A card is replaced as a whole: what the newer one leaves out is unknown.
BEGIN;
INSERT INTO aibilling.price (provider, model, valid_from, input, output) VALUES
	('p', 'm', '2026-01-01', 1, 9), ('p', 'm', '2026-02-01', 2, NULL);
SELECT status FROM aibilling.cost('p', 'm', 1, 1, at => '2026-01-15');
SELECT status FROM aibilling.cost('p', 'm', 1, 1, at => '2026-02-15');
-- and before the first one nothing is known
SELECT split_part(note, '. ', 1) AS note FROM aibilling.explain_cost('p', 'm', 1, at => '2025-12-31');
ROLLBACK;

-- That goes for the hours of the day, too: then the next source has its say, and without one nobody.
BEGIN;
INSERT INTO aibilling.price (provider, model, valid_from, daily_from, daily_to, input) VALUES
	('p', 'm', '2026-01-01', NULL, NULL, 1), ('p', 'm', '2026-02-01', '10:00', '14:00', 2);
SELECT at, pg_temp.cost_of('p', 'm', at => at) FROM unnest('{2026-01-15 08:00+00,2026-02-15 08:00+00,2026-02-15 12:00+00}'::timestamptz[]) at;
INSERT INTO aibilling.price (provider, model, source, valid_from, input) VALUES ('p', 'm', 'import', '2026-01-01', 3);
SELECT at, pg_temp.cost_of('p', 'm', at => at) FROM unnest('{2026-01-15 08:00+00,2026-02-15 08:00+00,2026-02-15 12:00+00}'::timestamptz[]) at;
ROLLBACK;

-- Daily windows: UTC, inclusive, exclusive, past midnight.
BEGIN;
INSERT INTO aibilling.price (provider, model, daily_from, daily_to, input, output) VALUES
	('p', 'm', NULL, NULL, 4, 8), ('p', 'm', '16:30', '00:30', 2, NULL),
	('p', 'm', '18:00', '19:00', 1, NULL);
SET LOCAL timezone = 'Asia/Tokyo';
SELECT at AT TIME ZONE 'UTC' AS utc, pg_temp.cost_of('p', 'm', at => at) FROM unnest(ARRAY[
	'2026-01-01 16:29:59.999999+00', '2026-01-01 16:30+00', '2026-01-01 17:59:59.999999+00',
	'2026-01-01 18:00+00', '2026-01-01 19:00+00', '2026-01-02 00:29:59.999999+00',
	'2026-01-02 00:30+00', '1999-12-31 23:59:59.999999+00']::timestamptz[]) at;
-- what a window leaves NULL is as all day
SELECT cost_usd FROM aibilling.cost('p', 'm', 0, 1000000, at => '2026-01-01 18:30+00');
-- a card without a row for the hour leaves it to the next source
DELETE FROM aibilling.price WHERE daily_from IS NULL;
INSERT INTO aibilling.price (provider, model, source, input) VALUES ('p', 'm', 'import', 7);
SELECT pg_temp.cost_of('p', 'm', at => '2026-01-01 12:00+00'),
	pg_temp.cost_of('p', 'm', at => '2026-01-01 17:00+00');
ROLLBACK;

-- Context tiers: strictly above, for the whole request, by all input tokens.
BEGIN;
INSERT INTO aibilling.price (provider, model, context_above, input, cache_read, output, discount, units) VALUES
	('p', 'm', 0, 1, 0.1, 5, 0.5, '{"image": 1, "page": 2}'),
	('p', 'm', 200000, 2, NULL, NULL, NULL, '{"image": 3}'),
	('p', 'm', 400000, NULL, NULL, 7, 0, NULL);
SELECT input, cost_usd FROM unnest(ARRAY[0, 1, 200000, 200001, 400000, 400001]) input,
	aibilling.cost('p', 'm', input);
SELECT input, cached, cost_usd FROM (VALUES (200000, 199999), (200001, 200000)) v (input, cached),
	aibilling.cost('p', 'm', input, 0, cached);
SELECT input, bucket, price, factor, context_above FROM unnest(ARRAY[200000, 200001, 400001]) input,
	aibilling.explain_cost('p', 'm', input, 10, 5, units => '{"image": 1, "page": 1}');
ROLLBACK;
-- without a base row, small requests have no price
BEGIN;
INSERT INTO aibilling.price (provider, model, context_above, input) VALUES ('p', 'm', 1000, 1);
SELECT input, status FROM unnest(ARRAY[1000, 1001]) input, aibilling.cost('p', 'm', input);
ROLLBACK;

-- Service tiers: names of standard, own cards, rules.
BEGIN;
INSERT INTO aibilling.price (provider, model, service_tier, input, web_search, discount) VALUES
	('p', 'm', 'standard', 4, 1, NULL), ('p', 'm', 'priority', 8, NULL, NULL),
	('p', 'd', 'standard', 4, 1, 0.25);
SELECT tier, pg_temp.cost_of('p', 'm', tier) FROM unnest(ARRAY[NULL, '', 'default', 'auto', 'on_demand',
	'standard', 'priority', 'batch', 'flex', 'scale', 'Standard']) tier;
SELECT split_part(note, '. ', 1) AS note FROM aibilling.explain_cost('p', 'm', 1, service_tier => 'scale');
-- a rule is for tokens only; discount and multiplier are for everything
SELECT bucket, price, factor, amount_usd, card_service_tier
FROM aibilling.explain_cost('p', 'd', 1000000, web_search_count => 1, service_tier => 'batch');
-- the tier's own card is not filled up from the standard one
SELECT status FROM aibilling.cost('p', 'm', 1, web_search_count => 1, service_tier => 'priority');
-- a card of the tier that is not yet in force leaves it to the rule
INSERT INTO aibilling.price (provider, model, service_tier, valid_from, input) VALUES ('p', 'm', 'batch', '2026-07-01', 1);
SELECT pg_temp.cost_of('p', 'm', 'batch'), pg_temp.cost_of('p', 'm', 'batch', '2026-07-01');
-- the provider's rule goes before any other's, yours before a shipped one, and NULL is no rule
INSERT INTO aibilling.service_tier_rule VALUES ('*', 'flex', 0.75), ('p', 'scale', 1.5), ('q', 'flex', 3);
SELECT pg_temp.cost_of('p', 'm', 'flex'), pg_temp.cost_of('p', 'm', 'scale');
INSERT INTO aibilling.service_tier_rule VALUES ('p', 'flex', NULL);
SELECT pg_temp.cost_of('p', 'm', 'flex');
SELECT provider, service_tier, multiplier, shipped FROM aibilling.service_tier_rule ORDER BY 1, 2, 4;
-- what was changed is dumped, what was shipped is not
UPDATE aibilling.service_tier_rule SET multiplier = 0.4 WHERE shipped AND service_tier = 'batch';
SELECT provider, service_tier, multiplier, shipped FROM aibilling.service_tier_rule
WHERE service_tier = 'batch';
ROLLBACK;

-- Names: as spelt, exact alias, without "provider/", glob.
BEGIN;
INSERT INTO aibilling.price (provider, model, input) VALUES
	('p', 'm', 1), ('p', 'm-2026-01-01', 2), ('q', 'm', 3), ('p', 'p/odd', 4), ('', '', 5), ('p', 'm!', 6);
INSERT INTO aibilling.model_alias (provider, kind, pattern, to_provider, to_model, priority) VALUES
	('*', 'exact', 'known-as', 'q', 'm', 0), ('p', 'exact', 'known-as', 'p', 'm', 0),
	('*', 'exact', 'm-2026-01-01', 'q', 'm', 0),
	('*', 'exact', 'dead', 'p', 'gone', 0), ('*', 'glob', 'dead*', 'q', 'm', -1),
	('*', 'glob', 'm-20??-*', 'p', 'm', 0), ('*', 'glob', 'm-2025-*', 'q', 'm', 0),
	('*', 'glob', 'm-2024-*', 'p', 'm', 0), ('*', 'glob', 'm-2023*', 'q', 'm', 1),
	('r', 'glob', '*', 'p', 'm', -5), ('r', 'glob', 'a?c*e', 'q', 'm', -5);
SELECT provider, model, pg_temp.cost_of(provider, model) FROM (VALUES
	('p', 'm'), ('p', 'm-2026-01-01'), ('q', 'm-2026-01-01'),	-- as spelt before alias
	('x', 'known-as'), ('p', 'known-as'),	-- the provider's alias before any
	('p', 'p/m'), ('p', 'p/known-as'), ('p', 'q/m'), ('p', 'p/odd'), ('p', 'p/'), ('p', 'p'),
	('p', 'dead'),	-- an alias to nowhere does not count
	('p', 'm-2019-01'), ('p', 'm-2025-01'), ('p', 'm-2024-01'), ('p', 'm-2023-01'), ('p', 'p/m-2025-01'),
	('r', 'abcde'), ('r', 'abcd'), ('r', 'acde'),
	('p', 'us.m'), ('p', 'm-2018'),	-- nothing else is stripped
	('p', 'M'), (' P ', E'm\t'), ('p', 'P/M'), ('p', 'DEAD'), ('x', 'Known-As'), ('p', 'M-2025-01'),	-- any case, after all that
	('p', 'models/m'), ('p', 'publishers/any/models/M'), ('p', 'accounts/any/models/m'), ('p', 'models/'),
	(NULL, NULL), ('', ''), ('p', NULL)) v (provider, model);
ROLLBACK;

-- One provider's names in catalogues and libraries lead to each other's cards; the card of the name given goes first.
BEGIN;
INSERT INTO aibilling.price (provider, model, source, input) VALUES
	('bedrock', 'of-litellm', 'litellm', 1), ('amazon-bedrock', 'of-models.dev', 'models.dev', 2), ('aws', 'of-bundle', 'bundled', 3),
	('aws', 'both', 'bundled', 4), ('bedrock', 'both', 'litellm', 5), ('gemini', 'g', 'litellm', 6), ('x-ai', 'Grok', 'bundled', 7),
	('github_copilot', 'c', 'litellm', 8);
SELECT provider, model, pg_temp.cost_of(provider, model) FROM (VALUES
	('aws', 'of-litellm'), ('amazon-bedrock', 'of-litellm'), ('bedrock', 'of-models.dev'), ('aws.bedrock', 'of-bundle'),
	('AWS', 'bedrock/of-bundle'), ('aws', 'both'), ('bedrock', 'both'), ('amazon-bedrock', 'both'),
	('google', 'g'), ('vertex_ai', 'gemini/g'), ('Google-Vertex', 'G'), ('xai', 'grok'), ('XAI', 'xai/grok'),
	('github-copilot', 'c'), ('google', 'of-bundle')) v (provider, model);
SELECT * FROM aibilling.priced_model('XAI', 'xai/grok');
SELECT * FROM aibilling.priced_model('xai', 'no');
ROLLBACK;

-- What was meant by a name without a price.
BEGIN;
INSERT INTO aibilling.price (provider, model, input) VALUES ('acme', 'sonnet-4-5', 1), ('acme', 'gpt-5-mini', 2);
SELECT provider, left(model, 20) AS model, split_part(note, '. ', 1) AS note, note ~ 'Perhaps you meant' AS hinted FROM (VALUES ('acme', 'sonet-4-5'), ('acme', 'GPT-5-mnii'), ('acme', 'opus-4-5'),
	('acmee', 'sonnet-4-5'), ('else', 'sonnet-4-5'), ('acme', NULL), (NULL, 'sonnet-4-5'), ('acme', repeat('x', 300))) v (provider, model),
	aibilling.explain_cost(provider, model, 1);
ROLLBACK;

-- What a row leaves NULL may be unknown, whatever other rows of the card say.
BEGIN;
INSERT INTO aibilling.price (provider, model, context_above, daily_from, daily_to, inherit, input, output, web_search, note) VALUES
	('p', 'm', 0, NULL, NULL, true, 1, 2, 3, 'a note'), ('p', 'm', 1000, NULL, NULL, false, 5, NULL, NULL, 'long: unknown'),
	('p', 'm', 2000, NULL, NULL, true, 6, NULL, NULL, NULL), ('p', 'm', 0, '10:00', '11:00', false, 7, NULL, NULL, NULL);
SELECT input, at, cost_usd, status FROM unnest(ARRAY[1000, 1001, 2001]) input, unnest(ARRAY['2026-01-01 09:00+00', '2026-01-01 10:00+00']::timestamptz[]) at,
	aibilling.cost('p', 'm', input, 1, at => at) ORDER BY at, input;
SELECT input, bucket, price, note FROM unnest(ARRAY[1000, 2001]) input, aibilling.explain_cost('p', 'm', input, 1, at => '2026-01-01 09:00+00');
ROLLBACK;

-- set_price: the card in force, with what is given changed, and nothing else.
\set columns 'model, service_tier AS tier, context_above AS above, valid_from AT TIME ZONE \'UTC\' AS valid_from, daily_from, input, output, cache_read AS read, units, inherit, note'
BEGIN;
INSERT INTO aibilling.price_source VALUES ('bundled', 200);
INSERT INTO aibilling.price (provider, model, source, valid_from, context_above, daily_from, daily_to, input, output, cache_read, units, note) VALUES
	('p', 'm', 'bundled', '-infinity', 0, NULL, NULL, 1, 4, NULL, '{"image": 0.1, "input_image_tokens": 1}', 'as input: input_image_tokens; mine: yes'),
	('p', 'm', 'bundled', '-infinity', 1000, NULL, NULL, 2, NULL, NULL, '{"input_image_tokens": 2}', 'as input: input_image_tokens'),
	('p', 'm', 'bundled', '-infinity', 0, '10:00', '11:00', 0.5, NULL, NULL, NULL, NULL),
	('p', 'm', 'bundled', '2026-06-01', 0, NULL, NULL, 3, 6, 0.3, NULL, NULL),
	('p', 'm', 'bundled', '2999-01-01', 0, NULL, NULL, 5, 8, NULL, NULL, NULL),
	('p', 'm', 'bundled', '2026-06-01', 0, NULL, NULL, 3, 6, NULL, NULL, NULL) ON CONFLICT DO NOTHING;
INSERT INTO aibilling.price (provider, model, service_tier, source, input) VALUES ('p', 'm', 'priority', 'bundled', 9);
INSERT INTO aibilling.model_alias (provider, pattern, to_provider, to_model) VALUES ('p', 'm-2026', 'p', 'm');
-- a price that is missing, of a time that is past: later cards are kept, and filled where they lack it, too
SAVEPOINT s;
SELECT :columns FROM aibilling.set_price('p', 'm', cache_read => 0.1, valid_from => '2026-05-01 00:00+00');
SELECT at, cost_usd, status FROM unnest('{2026-04-30, 2026-05-02, 2026-06-02, 2999-01-02}'::timestamptz[]) at,
	aibilling.cost('p', 'm', 1000000, 1000000, 1000000, at => at);
-- repeated, it replaces; a price that was known changes in all of them
SELECT :columns FROM aibilling.set_price('P', 'm-2026', input => 7, units => '{"page": 0.5}', valid_from => '2026-05-01 00:00+00');
-- one's own later price stays
UPDATE aibilling.price SET note = 'mine' WHERE source = 'user' AND valid_from = '2999-01-01';
SELECT :columns FROM aibilling.set_price('p', 'm', input => 8, valid_from => '2026-05-02 00:00+00');
SELECT count(*), count(DISTINCT valid_from) FROM aibilling.price WHERE source = 'user';
ROLLBACK TO s;
-- by default from now on
SELECT valid_from = now() AS now, input, output FROM aibilling.set_price('p', 'm', output => 10);
SELECT cost_usd FROM aibilling.cost('p', 'm-2026', 1000000, 1000000);
SELECT cost_usd FROM aibilling.cost('p', 'm-2026', 1000000, 1000000, at => '2026-06-02');
ROLLBACK TO s;
-- a tier that a rule prices, one that nothing prices, and one by another spelling
SELECT :columns FROM aibilling.set_price('p', 'm', input => 1, service_tier => 'batch', valid_from => '2026-06-01 00:00+00');
SELECT :columns FROM aibilling.set_price('p', 'm', input => 1, output => 2, service_tier => 'slow');
SELECT service_tier, input FROM aibilling.set_price('p', 'm', input => 10, service_tier => ' Priority ');
SELECT service_tier FROM aibilling.set_price('p', 'm', input => 10, service_tier => 'on_demand');
ROLLBACK TO s;
-- a model that has no card, and one that has none yet
SELECT :columns FROM aibilling.set_price('p', 'new', input => 1, output => 2);
SELECT :columns FROM aibilling.set_price('p', 'dated', input => 1, valid_from => '2026-03-01 00:00+00');
SELECT :columns FROM aibilling.set_price('p', 'dated', input => 2, valid_from => '2026-01-01 00:00+00');
SELECT at, cost_usd FROM unnest('{2026-01-02, 2026-03-02}'::timestamptz[]) at, aibilling.cost('p', 'dated', 1000000, at => at);
ROLLBACK;
SELECT aibilling.set_price(NULL, 'm', 1);
SELECT aibilling.set_price('p', NULL, 1);
SELECT aibilling.set_price('p', 'm');
SELECT aibilling.set_price('p', 'm', units => '{}');
SELECT aibilling.set_price('p', 'm', -1);
SELECT aibilling.set_price('p', 'm', 'NaN');
SELECT aibilling.set_price('p', 'm', units => '[1]');
SELECT aibilling.set_price('p', 'm', units => '{"image": "1"}');
SELECT aibilling.set_price('p', 'm', 1, valid_from => 'infinity');
-- by whoever may write prices
CREATE ROLE regress_price_writer;
BEGIN;
SET LOCAL ROLE regress_price_writer;
SELECT aibilling.set_price('p', 'm', 1);
ROLLBACK;
GRANT INSERT ON aibilling.price TO regress_price_writer;
BEGIN;
SET LOCAL ROLE regress_price_writer;
SELECT input FROM aibilling.set_price('p', 'm', 1);
SELECT input FROM aibilling.set_price('p', 'm', 2, valid_from => '-infinity');
ROLLBACK;
REVOKE INSERT ON aibilling.price FROM regress_price_writer;
DROP ROLE regress_price_writer;

-- The statement that a hint gives prices the request, once its figures are filled in.
BEGIN;
INSERT INTO aibilling.price (provider, model, input, output, source) VALUES ('p', 'half', 1, 2, 'bundled');
CREATE FUNCTION pg_temp.follow_hint(provider text, model text, tier text, units jsonb, at timestamptz) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
	statement text;
BEGIN
	SELECT substring(note FROM 'SELECT \* FROM aibilling\.set_price\([^;]*\);') INTO statement
	FROM aibilling.explain_cost(provider, model, 1000, 500, 100, reasoning_tokens => 50, web_search_count => 1, units => units, service_tier => tier, at => at)
	WHERE note LIKE '%set_price%';
	RAISE NOTICE '%', statement;
	EXECUTE replace(statement, '?', '3');
	RETURN (SELECT status FROM aibilling.cost(provider, model, 1000, 500, 100, reasoning_tokens => 50, web_search_count => 1, units => units, service_tier => tier, at => at));
END $$;
SELECT pg_temp.follow_hint('p', 'half', 'standard', '{"image": 1, "it''s": 2}', '2026-05-01 12:00:00.5+00');
SELECT pg_temp.follow_hint('p', 'half', 'batch', '{"page": 1}', '2026-05-01 12:00+00');
SELECT pg_temp.follow_hint('p', 'half', 'rare', NULL, '2026-05-01 12:00+00');
SELECT pg_temp.follow_hint('p', 'none''s', 'flex', NULL, '2026-05-01 12:00+00');
SELECT pg_temp.follow_hint('p', 'none', 'rare', '{"image": 1}', '-infinity');
SELECT status FROM aibilling.cost('p', 'half', 1, 1, at => '2026-04-01');
ROLLBACK;

-- A change is seen by the next command, and its rollback too.
INSERT INTO aibilling.price (provider, model, input) VALUES ('p', 'm', 1);
SELECT pg_temp.cost_of('p', 'm'), pg_temp.cost_of('p', 'alias'), pg_temp.cost_of('p', 'm', 'scale');
BEGIN;
UPDATE aibilling.price SET input = 2 WHERE provider = 'p';
SELECT pg_temp.cost_of('p', 'm');
SAVEPOINT s;
DELETE FROM aibilling.price WHERE provider = 'p';
SELECT pg_temp.cost_of('p', 'm');
ROLLBACK TO s;
SELECT pg_temp.cost_of('p', 'm');
INSERT INTO aibilling.model_alias (pattern, to_provider, to_model) VALUES ('alias', 'p', 'm');
INSERT INTO aibilling.service_tier_rule VALUES ('p', 'scale', 3);
SELECT pg_temp.cost_of('p', 'alias'), pg_temp.cost_of('p', 'm', 'scale');
SAVEPOINT s;
TRUNCATE aibilling.price;
SELECT pg_temp.cost_of('p', 'm');
ROLLBACK TO s;
SELECT pg_temp.cost_of('p', 'm');
ROLLBACK;
SELECT pg_temp.cost_of('p', 'm'), pg_temp.cost_of('p', 'alias'), pg_temp.cost_of('p', 'm', 'scale');

-- A column that a superuser adds does no harm, nor does an index that they drop.
BEGIN;
ALTER TABLE aibilling.price ADD mine text DEFAULT 'mine', DROP CONSTRAINT price_key;
ALTER TABLE aibilling.price_source DROP CONSTRAINT price_source_pkey;
SELECT pg_temp.cost_of('p', 'm'), pg_temp.cost_of('p', 'alias'), pg_temp.cost_of('p', 'm', 'scale');
ROLLBACK;

-- The table is looked into once for each name, whatever the number of rows and whether it has a price.
BEGIN;
INSERT INTO aibilling.price (provider, model, input) VALUES ('once', 'm0', 1), ('once', 'm1', 2);
SELECT pg_stat_get_xact_numscans('aibilling.price'::regclass)
	+ pg_stat_get_xact_numscans('aibilling.price_key'::regclass) AS before \gset
SELECT 'm' || i % 3 AS model, count(*), sum(aibilling.cost_nanos('once', 'm' || i % 3, i)) FROM generate_series(1, 3000) i GROUP BY 1 ORDER BY 1;
SELECT 'm' || i % 3 AS model, count(aibilling.cost_nanos('once', 'm' || i % 3, i)) FROM generate_series(1, 3000) i GROUP BY 1 ORDER BY 1;
SELECT pg_stat_get_xact_numscans('aibilling.price'::regclass)
	+ pg_stat_get_xact_numscans('aibilling.price_key'::regclass) - :before AS looks;
UPDATE aibilling.price SET input = 3 WHERE provider = 'once' AND model = 'm0';
SELECT pg_stat_get_xact_numscans('aibilling.price'::regclass)
	+ pg_stat_get_xact_numscans('aibilling.price_key'::regclass) AS before \gset
SELECT aibilling.cost_nanos('once', 'm0', i) FROM generate_series(1, 2) i;
SELECT pg_stat_get_xact_numscans('aibilling.price'::regclass)
	+ pg_stat_get_xact_numscans('aibilling.price_key'::regclass) - :before AS looks;
ROLLBACK;

-- Also in one statement's function, in a serializable transaction, and while
-- replication writes.
DO $$
BEGIN
	FOR i IN 1..3 LOOP
		UPDATE aibilling.price SET input = i WHERE provider = 'p';
		RAISE NOTICE '%', pg_temp.cost_of('p', 'm');
	END LOOP;
END $$;
BEGIN ISOLATION LEVEL SERIALIZABLE;
SELECT pg_temp.cost_of('p', 'm');
UPDATE aibilling.price SET input = 9 WHERE provider = 'p';
SELECT pg_temp.cost_of('p', 'm');
ROLLBACK;
SELECT pg_temp.cost_of('p', 'm');
SET session_replication_role = replica;
UPDATE aibilling.price SET input = 10 WHERE provider = 'p';
SELECT pg_temp.cost_of('p', 'm');
RESET session_replication_role;

-- Nobody needs the right to read prices for a cost, and everybody has it.
CREATE ROLE regress_price_reader;
SET ROLE regress_price_reader;
SELECT aibilling.cost_nanos('p', 'm', 1000000);
SELECT count(*) > 0 AS readable FROM aibilling.price;
UPDATE aibilling.price SET input = 0;
RESET ROLE;
BEGIN;
REVOKE SELECT ON aibilling.price FROM PUBLIC;
UPDATE aibilling.price SET input = 11 WHERE provider = 'p';
SET LOCAL ROLE regress_price_reader;
SELECT aibilling.cost_nanos('p', 'm', 1000000);
SELECT count(*) > 0 AS readable FROM aibilling.price;
ROLLBACK;
DROP ROLE regress_price_reader;

-- Objects in the caller's search_path change nothing.
CREATE SCHEMA regress_evil;
CREATE FUNCTION regress_evil.evil(text, text) RETURNS boolean LANGUAGE sql AS 'SELECT true';
CREATE OPERATOR regress_evil.= (LEFTARG = text, RIGHTARG = text, FUNCTION = regress_evil.evil);
BEGIN;
SET LOCAL search_path = regress_evil, pg_catalog;
SELECT cost_nanos FROM aibilling.cost('p', 'nothing', 1);
ROLLBACK;
DROP SCHEMA regress_evil CASCADE;

-- Dropped and created again, in one session that has it all cached.
BEGIN;
SET LOCAL client_min_messages = error;
DROP EXTENSION aibilling_polar CASCADE;
CREATE EXTENSION aibilling_polar;
SELECT (aibilling.cost('p', 'm', 1000000)).status;
INSERT INTO aibilling.price (provider, model, input) VALUES ('p', 'm', 12);
SELECT (aibilling.cost('p', 'm', 1000000)).cost_usd;
ROLLBACK;
SELECT (aibilling.cost('p', 'm', 1000000)).cost_usd;

-- Everything has a comment.
SELECT c.relname, a.attname FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
WHERE c.oid IN ('aibilling.price'::regclass, 'aibilling.price_source'::regclass,
		'aibilling.service_tier_rule'::regclass, 'aibilling.model_alias'::regclass)
	AND a.attnum > 0 AND NOT a.attisdropped AND col_description(c.oid, a.attnum) IS NULL;
SELECT p.oid::regprocedure FROM pg_proc p
WHERE p.pronamespace = 'aibilling'::regnamespace AND p.proname ~ 'cost|^price_'
	AND obj_description(p.oid, 'pg_proc') IS NULL;

DELETE FROM aibilling.price WHERE provider = 'p';
