-- Price catalogues: what import_prices makes of each format, what it holds
-- back, and the bundled catalogue.

\set SHOW_CONTEXT never
SET timezone = 'America/Los_Angeles';

CREATE VIEW stored AS
	SELECT provider, model, service_tier AS tier, context_above AS above, valid_from = '-infinity' AS always,
		daily_from, input, output, cache_read AS read, cache_write AS write, cache_write_1h AS write_1h, reasoning,
		web_search, units
	FROM aibilling.price
	ORDER BY source, provider, model, service_tier, valid_from, daily_from NULLS FIRST, context_above;

-- A price keeps its decimals and loses float noise.
SELECT aibilling.clean_price(v)
FROM unnest('{0, 15.000020000000002, 0.0000023, 0.08333333333333334, -1.00000000000000001, 12345678.9000000004}'::numeric[]) v;
SELECT v, aibilling.catalogue_number(v)
FROM jsonb_array_elements('[1e-7, "0.00000060000000000000000001", "x", "NaN", "1e5", true, null]') v;

-- LiteLLM -------------------------------------------------------------------
\set litellm '{"sample_spec": {"input_cost_per_token": 1, "litellm_provider": "one of many"},"acme/chat": {"litellm_provider": "acme", "mode": "chat", "max_tokens": 5,"input_cost_per_token": 1.0000020000000002e-06, "output_cost_per_token": 4e-06,"cache_read_input_token_cost": 1e-07, "cache_creation_input_token_cost": 1.25e-06,"cache_creation_input_token_cost_above_1hr": 2e-06, "input_cost_per_token_above_200k_tokens": 2e-06,"cache_creation_input_token_cost_above_1hr_above_200k_tokens": 4e-06,"input_cost_per_token_batches": 5e-07, "input_cost_per_token_priority": 2e-06,"input_cost_per_token_above_200k_tokens_priority": 4e-06,"search_context_cost_per_query": {"search_context_size_low": 0.02, "search_context_size_medium": 0.03},"input_dbu_cost_per_token": 7, "provider_specific_entry": {"us": 1.1}},"xai/long": {"litellm_provider": "xai", "input_cost_per_token": 2e-06, "input_cost_per_token_above_200k_tokens": 4e-06},"ranged": {"litellm_provider": "dash", "tiered_pricing": [{"range": [0, 32000.0], "input_cost_per_token": 5e-08},{"range": [32000.0, 1e6], "input_cost_per_token": "2.5e-07"}]},"us.gpt": {"litellm_provider": "bedrock_converse", "input_cost_per_token": 0.0, "output_cost_per_token": 0},"ears": {"litellm_provider": "acme", "mode": "audio_transcription", "input_cost_per_second": 0.0001, "output_cost_per_second": 0.0001},"eyes": {"litellm_provider": "acme", "mode": "image_generation", "output_cost_per_image": 0.04, "output_cost_per_image_token": 4e-05, "input_cost_per_pixel": 1.9e-08},"mouth": {"litellm_provider": "acme", "mode": "audio_speech", "input_cost_per_character": 1.5e-05, "output_cost_per_character": 0},"rank": {"litellm_provider": "acme", "input_cost_per_query": 0.002, "input_cost_per_token": "free"}}'
SELECT action, provider, model, service_tier AS tier, context_above AS above, price_column, new_price, reason
FROM aibilling.import_prices(:'litellm', 'litellm');
-- a dry run by default
SELECT count(*) FROM aibilling.price;
SELECT action, count(*) FROM aibilling.import_prices(:'litellm', 'litellm', false) GROUP BY action ORDER BY action;
SELECT * FROM stored;
-- again: nothing to do
SELECT action, count(*) FROM aibilling.import_prices(:'litellm', 'litellm', false) GROUP BY action ORDER BY action;
-- A changed price is a new card from now on; the models left out stay.
SELECT action, provider, model, valid_from = now() AS from_now, price_column, old_price, new_price
FROM aibilling.import_prices('{"xai/long": {"litellm_provider": "xai", "input_cost_per_token": 2.5e-06, "output_cost_per_token": 5e-06}}', 'litellm', false);
SELECT valid_from = '-infinity' AS always, context_above, input, output
FROM aibilling.price WHERE provider = 'xai' ORDER BY valid_from, context_above;
SELECT count(DISTINCT model) FROM aibilling.price;
-- The user's prices are nobody else's business.
INSERT INTO aibilling.price (provider, model, input) VALUES ('acme', 'chat', 9);
SELECT count(*) FROM aibilling.import_prices(:'litellm', 'litellm', true) WHERE provider = 'acme' AND action <> 'skipped';

-- What is suspicious waits.
SELECT action, model, service_tier AS tier, price_column, old_price, new_price, reason
FROM aibilling.import_prices('{
	"high":  {"litellm_provider": "bad", "input_cost_per_token": 0.0135, "output_cost_per_token": 0.054},
	"read":  {"litellm_provider": "bad", "input_cost_per_token": 1e-6, "cache_read_input_token_cost": 2e-6},
	"hour":  {"litellm_provider": "bad", "input_cost_per_token": 2.5e-7, "cache_creation_input_token_cost_above_1hr": 6e-6},
	"prio":  {"litellm_provider": "bad", "input_cost_per_token": 5e-8, "input_cost_per_token_priority": 2.5e-6},
	"batch": {"litellm_provider": "bad", "input_cost_per_token": 1e-6, "input_cost_per_token_batches": 2e-6},
	"minus": {"litellm_provider": "bad", "input_cost_per_token": -1e-6},
	"long":  {"litellm_provider": "xai", "input_cost_per_token": 8e-6, "output_cost_per_token": 5e-6}}', 'litellm', false);
SELECT provider, model, service_tier AS tier, input, output, reason FROM aibilling.price_quarantine ORDER BY 1, 2, 3;
SELECT model, service_tier FROM aibilling.price WHERE provider = 'bad' ORDER BY 1;
SELECT max(input) FROM aibilling.price WHERE provider = 'xai';
SELECT aibilling.release_price('litellm', 'bad', 'hour');
SELECT input, cache_write_1h, source, note FROM aibilling.price WHERE model = 'hour';
SELECT aibilling.release_price('litellm', 'bad', 'hour');
SELECT aibilling.release_price('litellm', 'bad', 'minus');
-- released once, it is not held back again; corrected, it leaves the quarantine
SELECT action, model, price_column, new_price
FROM aibilling.import_prices('{
	"hour": {"litellm_provider": "bad", "input_cost_per_token": 2.5e-7, "cache_creation_input_token_cost_above_1hr": 6e-6},
	"high": {"litellm_provider": "bad", "input_cost_per_token": 1.35e-7, "output_cost_per_token": 5.4e-7}}', 'litellm', false);
SELECT model FROM aibilling.price_quarantine ORDER BY 1;
TRUNCATE aibilling.price, aibilling.price_quarantine;

-- What a tier costs beyond a step of the standard tier: as the catalogue says,
-- half where it is half below, else unknown, which is not the price below.
\set steps '{ "long": {"litellm_provider": "step", "input_cost_per_token": 1e-6, "output_cost_per_token": 4e-6, "cache_read_input_token_cost": 1e-7, "search_context_cost_per_query": {"search_context_size_low": 0.01}, "input_cost_per_token_above_200k_tokens": 2e-6, "output_cost_per_token_above_200k_tokens": 6e-6, "input_cost_per_token_flex": 5e-7, "output_cost_per_token_flex": 2e-6, "cache_read_input_token_cost_flex": 5e-8, "input_cost_per_token_batches": 5e-7, "output_cost_per_token_batches": 3e-6, "input_cost_per_token_priority": 2e-6, "output_cost_per_token_priority": 8e-6, "cache_read_input_token_cost_priority": 2e-7, "output_cost_per_token_above_200k_tokens_priority": 12e-6}}'
SELECT action, model, service_tier AS tier, context_above AS above, price_column, new_price, reason
FROM aibilling.import_prices(:'steps', 'litellm', false)
WHERE service_tier <> 'standard';
SELECT tier, input, cost_usd, status FROM unnest(ARRAY['standard', 'flex', 'batch', 'priority']) tier,
	unnest(ARRAY[200000, 200001]) input, aibilling.cost('step', 'long', input, 1000000, service_tier => tier, web_search_count => 1);
SELECT bucket, note FROM aibilling.explain_cost('step', 'long', 300000, 10, 5, service_tier => 'flex');
-- a tier's step without a price for the rest
SELECT bucket, price, note ~ 'does not say what input' AS said FROM aibilling.explain_cost('step', 'long', 300000, 10, 5, service_tier => 'priority');
-- the same again: nothing to do
SELECT count(*) FROM aibilling.import_prices(:'steps', 'litellm', false);
-- Two entries of one model; a price of a token in the place of an image's.
SELECT action, provider, model, price_column, new_price, reason
FROM aibilling.import_prices('{
	"twin/exp": {"litellm_provider": "twin", "input_cost_per_token": 2e-6},
	"exp": {"litellm_provider": "twin", "input_cost_per_token": 1e-6},
	"paint": {"litellm_provider": "twin", "output_cost_per_token": 12e-6, "output_cost_per_image": 0.00012},
	"draw": {"litellm_provider": "twin", "output_cost_per_token": 12e-6, "output_cost_per_image": 0.04}}', 'litellm', false);
TRUNCATE aibilling.price;

-- A price for what had none holds from where the card does; a price that changes from now on.
SELECT count(*) FROM aibilling.import_prices('{"m": {"litellm_provider": "more", "input_cost_per_token": 1e-6}}', 'litellm', false);
SELECT action, valid_from = '-infinity' AS always, price_column, new_price
FROM aibilling.import_prices('{"m": {"litellm_provider": "more", "input_cost_per_token": 1e-6, "cache_read_input_token_cost": 1e-7}}', 'litellm', false);
SELECT action, valid_from = '-infinity' AS always, price_column, new_price
FROM aibilling.import_prices('{"m": {"litellm_provider": "more", "input_cost_per_token": 1e-6, "cache_read_input_token_cost": 1e-7,
	"output_cost_per_reasoning_token": 1e-6}}', 'litellm', false);
-- Since when something is held back is since when there has been something to look at.
SELECT count(*) FROM aibilling.import_prices('{"m": {"litellm_provider": "more", "input_cost_per_token": 9e-6}}', 'litellm', false);
UPDATE aibilling.price_quarantine SET quarantined_at = '2026-11-01';
SELECT count(*) FROM aibilling.import_prices('{"m": {"litellm_provider": "more", "input_cost_per_token": 8e-6}}', 'litellm', false);
SELECT input, quarantined_at = '2026-11-01' AS since FROM aibilling.price_quarantine;
SELECT regexp_replace(status, '^.*; (\d)', '\1') AS status FROM aibilling.status;
TRUNCATE aibilling.price, aibilling.price_quarantine;

-- models.dev ----------------------------------------------------------------
SELECT action, provider, model, service_tier AS tier, context_above AS above, price_column, new_price, reason
FROM aibilling.import_prices('{"acme": {"id": "acme", "models": {
	"long": {"id": "long", "cost": {"input": 2.5, "output": 15, "cache_read": 0.25, "input_audio": 32, "image": 2,
			"tiers": [{"tier": {"type": "context", "size": 272000}, "input": 5, "output": 22.5}],
			"context_over_200k": {"input": 5, "output": 22.5}},
		"experimental": {"modes": {
			"fast": {"cost": {"input": 5, "output": 30}, "provider": {"body": {"service_tier": "priority"}}},
			"turbo": {"cost": {"input": 7, "output": 30}, "provider": {"body": {"speed": "turbo"}}}}}},
	"uncosted": {"id": "uncosted"}}}}', 'models.dev', false);
SELECT * FROM stored;
-- modes with steps of their own; a step that only context_over_200k has
SELECT action, model, service_tier AS tier, context_above AS above, price_column, new_price, reason
FROM aibilling.import_prices('{"acme": {"id": "acme", "models": {
	"own": {"id": "own", "cost": {"input": 1, "tiers": [{"tier": {"size": 272000}, "input": 2}]},
		"experimental": {"modes": {"fast": {"cost": {"input": 5, "tiers": [{"tier": {"size": 272000}, "input": 10}]}}}}},
	"old": {"id": "old", "cost": {"input": 1, "output": 4, "context_over_200k": {"input": 2, "output": 6}},
		"experimental": {"modes": {"fast": {"cost": {"input": 5, "context_over_200k": {"input": 10}}}}}}}}}', 'models.dev', true);
TRUNCATE aibilling.price;

-- genai-prices --------------------------------------------------------------
\set genai '[{"id": "acme", "models": [{"id": "dated", "prices": [{"prices": {"input_mtok": 2, "output_mtok": 10, "web_searches_kcount": 10}},{"constraint": {"start_date": "2024-09-01"}, "prices": {"input_mtok": 3, "output_mtok": 15}},{"constraint": {"start_time": "00:30:00Z", "end_time": "16:30:00Z"}, "prices": {"input_mtok": 6, "output_mtok": 30}},{"constraint": {"weekday": "monday"}, "prices": {"input_mtok": 1}}]},{"id": "steps", "prices": {"input_mtok": {"base": 1, "tiers": [{"start": 32000, "price": 2}]},"output_mtok": {"base": 4, "tiers": [{"start": 256000, "price": 8}]}, "cache_read_mtok": 0.1}},{"id": "hears", "prices": {"audio_hours": 0.36, "requests_kcount": 5, "storage_searches_kcount": 2.5}}]}]'
SELECT action, model, context_above AS above, valid_from AT TIME ZONE 'UTC' AS valid_from, daily_from, price_column, new_price, reason
FROM aibilling.import_prices(:'genai', 'genai-prices', false);
SELECT * FROM stored;
-- What is older than a date that has come is history: corrected in its place.
SELECT action, model, valid_from AT TIME ZONE 'UTC' AS valid_from, price_column, old_price, new_price
FROM aibilling.import_prices(jsonb_set(:'genai', '{0,models,0,prices,0,prices,input_mtok}', '2.5'), 'genai-prices', false)
WHERE action <> 'skipped';
-- A price without dates is new from now on.
SELECT action, model, valid_from = now() AS from_now, price_column, old_price, new_price
FROM aibilling.import_prices(jsonb_set(:'genai', '{0,models,2,prices,audio_hours}', '0.72'), 'genai-prices', false)
WHERE model = 'hears' AND action <> 'skipped';
TRUNCATE aibilling.price;

-- What has no price of its own costs what it is a part of, and the note says so; names come with the prices.
SELECT DISTINCT action FROM aibilling.import_prices('[
	{"id": "aws", "models": [{"id": "anthropic.claude-x", "match": {"contains": "claude-x"},
		"prices": {"input_mtok": {"base": 3, "tiers": [{"start": 200000, "price": 6}]}, "cache_write_mtok": {"base": 3.75, "tiers": [{"start": 200000, "price": 7.5}]}, "output_mtok": 15}}]},
	{"id": "openai", "models": [{"id": "gpt-y", "match": {"or": [{"equals": "gpt-y"}, {"starts_with": "gpt-y-turbo"}, {"regex": "^gpt-y-\\d{8}$"}]},
		"prices": {"input_mtok": 1, "cache_read_mtok": 0.1, "input_audio_mtok": 8, "output_mtok": 4, "output_image_mtok": 30}}]},
	{"id": "azure", "fallback_model_providers": ["openai"], "models": []},
	{"id": "mistral", "models": [{"id": "voxtral", "match": {"equals": "voxtral"}, "prices": {"audio_hours": 0.18}},
		{"id": "mistral-large", "match": {"or": [{"equals": "mistral-large"}, {"equals": "mistral-large-latest"}]}, "prices": {"input_mtok": 2, "output_mtok": 6}},
		{"id": "mistral-large-2512", "match": {"equals": "mistral-large-2512"}, "prices": {"input_mtok": 0.5, "cache_read_mtok": 0.05, "output_mtok": 1.5}}]},
	{"id": "perplexity", "models": [{"id": "sonar", "match": {"equals": "sonar"}, "prices": {"input_mtok": 1, "output_mtok": 1, "requests_kcount": 12}}]}
	]', 'genai-prices', false);
SELECT provider, model, context_above AS above, valid_from AT TIME ZONE 'UTC' AS valid_from, cache_read AS read, cache_write AS write, cache_write_1h AS write_1h, web_search, request, units
FROM aibilling.price ORDER BY provider, model, valid_from, context_above;
SELECT model, context_above AS above, note FROM aibilling.price ORDER BY provider, model, valid_from, context_above;
SELECT provider, kind, pattern, to_provider, to_model, priority, source FROM aibilling.model_alias ORDER BY 1, 2, 3;
SELECT bucket, price, note FROM aibilling.explain_cost('openai', 'gpt-y', 100, 50, 10, 5, units => '{"input_image_tokens": 3, "output_audio_tokens": 7, "input_audio_tokens": 2}');
SELECT bucket, price, note FROM aibilling.explain_cost('amazon-bedrock', 'us.anthropic.claude-x-v1:0', 250000, cache_write_1h_tokens => 100);
SELECT model, cost_usd, status FROM (VALUES ('sonar', 100, 50, 1, NULL), ('sonar', 100, 50, 1, '{"search_context_high": 1}'::jsonb)) AS v (model, i, o, s, u),
	aibilling.cost('perplexity', model, i, o, web_search_count => s, units => u);
SELECT aibilling.cost_nanos('mistral', 'voxtral', 4, 250, units => '{"audio_second": 36}');
SELECT at, aibilling.cost_nanos('mistral', 'mistral-large-latest', 1000000, at => at) FROM unnest('{2025-12-01 12:00+00, 2025-12-03 12:00+00}'::timestamptz[]) at;
TRUNCATE aibilling.price, aibilling.model_alias;

-- OpenRouter ----------------------------------------------------------------
SELECT action, provider, model, context_above AS above, price_column, new_price, reason
FROM aibilling.import_prices('{"data": [
	{"id": "acme/m", "pricing": {"prompt": "0.0000006000000000000000001", "completion": "0.00000000000000000001",
		"input_cache_write": "0.00000008333333333333334", "image": "0.0000003", "image_output": "0.04",
		"web_search": "0.005", "discount": 0.1, "mystery": "1",
		"overrides": [{"min_prompt_tokens": 32000, "prompt": "0.000001"}, {"prompt": "7"}]}},
	{"id": "acme/m:free", "pricing": {"prompt": "0", "completion": "0", "input_cache_read": "0"}},
	{"id": "acme/auto", "pricing": {"prompt": "-1", "completion": "-1"}}]}', 'openrouter', false);
SELECT provider, model, context_above, input, output, units, discount FROM aibilling.price ORDER BY 2, 3;
TRUNCATE aibilling.price;
-- One key has the price of an image or that of its tokens: what other tokens cost tells, also in an override.
SELECT action, model, context_above AS above, price_column, new_price, reason
FROM aibilling.import_prices('{"data": [
	{"id": "token", "pricing": {"prompt": "0.000002", "completion": "0.000012", "image": "0.000002", "image_output": "0.00012"}},
	{"id": "image", "pricing": {"prompt": "0.0000001", "completion": "0.0000004", "image": "0.0000258", "image_output": "0.039"}},
	{"id": "step", "pricing": {"prompt": "0.000002", "completion": "0.000012",
		"overrides": [{"min_prompt_tokens": 200001, "image_output": "0.00024"}]}},
	{"id": "neither", "pricing": {"prompt": "0.00001", "completion": "0.00001", "image": "0.0006"}},
	{"id": "alone", "pricing": {"prompt": "0", "completion": "0", "image_output": "0.04", "image": "0.0001"}}]}', 'openrouter', true)
WHERE price_column LIKE '%image%';
-- What a list says twice, and differently, is said.
SELECT action, model, price_column, new_price, reason
FROM aibilling.import_prices('{"data": [{"id": "twice", "pricing": {"prompt": "0.000001"}}, {"id": "twice", "pricing": {"prompt": "0.000002"}},
	{"id": "same", "pricing": {"prompt": "0.000001"}}, {"id": "same", "pricing": {"prompt": "0.000001"}}]}', 'openrouter', true);

-- Narev: 0 is a price of prompt and completion, elsewhere it is unset. --------
SELECT action, provider, model, price_column, new_price, reason
FROM aibilling.import_prices('{"data": [
	{"provider_id": "acme", "model_id": "m", "pricing": {"prompt": 5e-06, "completion": 0, "input_cache_read": 0, "request": 0, "discount": 0.25}},
	{"provider_id": "acme", "model_id": "none", "pricing": null, "message": "pricing not available"}], "meta": {"page": 1}}', 'narev', false);
-- Prices in another currency or by another unit are none.
SELECT action, model, price_column, new_price, reason
FROM aibilling.import_prices('{"data": [
	{"provider_id": "acme", "model_id": "euro", "pricing": {"currency": "EUR", "prompt": 5e-06, "completion": 1e-05}},
	{"provider_id": "acme", "model_id": "yen", "currency": "JPY", "pricing": {"prompt": 5e-06}},
	{"provider_id": "acme", "model_id": "million", "pricing": {"unit": "1M tokens", "prompt": 5}},
	{"provider_id": "acme", "model_id": "dollar", "currency": "usd", "pricing": {"unit": "token", "prompt": 5e-06}}]}', 'narev', true);
SELECT action, model, price_column, new_price, reason
FROM aibilling.import_prices('{"meta": {"currency": "EUR"}, "data": [
	{"provider_id": "acme", "model_id": "euro", "pricing": {"prompt": 5e-06}},
	{"provider_id": "acme", "model_id": "dollar", "currency": "USD", "pricing": {"prompt": 5e-06}}]}', 'narev', true);
SELECT action, model, context_above, price_column, new_price, reason
FROM aibilling.import_prices('{"data": [{"id": "acme/m", "pricing": {"currency": "EUR", "prompt": "0.000005",
	"overrides": [{"min_prompt_tokens": 32000, "prompt": "0.00001"}]}}]}', 'openrouter', true);
SELECT source, priority FROM aibilling.price_source ORDER BY priority;
TRUNCATE aibilling.price;

-- Mistakes ------------------------------------------------------------------
SELECT * FROM aibilling.import_prices('{}', 'csv');
SELECT * FROM aibilling.import_prices('{}', 'genai-prices');
SELECT * FROM aibilling.import_prices('{"data": 1}', 'openrouter');
-- Prices are written with the rights of the caller.
CREATE ROLE regress_reader;
CREATE ROLE regress_importer;
GRANT INSERT, UPDATE, DELETE ON aibilling.price, aibilling.price_source, aibilling.price_quarantine, aibilling.model_alias TO regress_importer;
SET ROLE regress_reader;
SELECT count(*) FROM aibilling.import_prices(:'litellm', 'litellm');
SELECT count(*) FROM aibilling.import_prices(:'litellm', 'litellm', false);
SELECT aibilling.load_bundled_prices();
SET ROLE regress_importer;
SELECT count(*) FROM aibilling.import_prices(:'litellm', 'litellm', false);
RESET ROLE;
TRUNCATE aibilling.price;

-- The bundled catalogue -----------------------------------------------------
INSERT INTO aibilling.price (provider, model, input) VALUES ('openai', 'gpt-5', 7);
INSERT INTO aibilling.model_alias (provider, pattern, to_provider, to_model) VALUES ('acme', 'five', 'openai', 'gpt-5');
SET ROLE regress_importer;
SELECT package, models >= 1400 AS enough, prices >= models AS priced, aliases > 0 AS aliased FROM aibilling.load_bundled_prices();
CREATE TEMP TABLE before AS
	SELECT to_jsonb(p) AS entry FROM aibilling.price p UNION ALL SELECT to_jsonb(a) FROM aibilling.model_alias a;
SELECT models >= 1400 AS enough FROM aibilling.load_bundled_prices();
RESET ROLE;
-- the same again, and the user's are still there
SELECT count(*) AS differing FROM (
	(SELECT to_jsonb(p) AS entry FROM aibilling.price p UNION ALL SELECT to_jsonb(a) FROM aibilling.model_alias a)
	EXCEPT ALL SELECT entry FROM before) AS d;
SELECT (SELECT count(*) FROM before) - (SELECT count(*) FROM aibilling.price) - (SELECT count(*) FROM aibilling.model_alias) AS missing;
SELECT count(*) FROM aibilling.price WHERE source = 'user';
SELECT count(*) FROM aibilling.model_alias WHERE source = 'user';
-- dates and steps
SELECT valid_from AT TIME ZONE 'UTC' AS valid_from, context_above, input, output, cache_read FROM aibilling.price
WHERE (provider, model, source) = ('openai', 'o3', 'bundled') ORDER BY valid_from, context_above;
-- Every alias leads to a card, and none hides a card of its own name.
SELECT a.provider, a.pattern FROM aibilling.model_alias a
WHERE NOT EXISTS (SELECT FROM aibilling.price p WHERE (p.provider, p.model) = (a.to_provider, a.to_model));
SELECT a.provider, a.pattern FROM aibilling.model_alias a
JOIN aibilling.price p ON (p.provider, p.model) = (a.provider, a.pattern)
WHERE a.kind = 'exact' AND (a.to_provider, a.to_model) <> (p.provider, p.model);
-- A glob that a longer one does not overrule never takes a name of another model.
WITH name AS (
	SELECT provider, model AS name, provider AS to_provider, model AS to_model FROM aibilling.price WHERE source = 'bundled'
	UNION
	SELECT provider, pattern, to_provider, to_model FROM aibilling.model_alias WHERE kind = 'exact' AND source = 'bundled'
), glob AS (
	SELECT *, length(translate(pattern, '*?', '')) AS literal,
		'^' || replace(replace(regexp_replace(pattern, '([^\w*?])', '\\\1', 'g'), '*', '.*'), '?', '.') || '$' AS regexp
	FROM aibilling.model_alias
	WHERE kind = 'glob' AND source = 'bundled' AND provider = to_provider
), hit AS (
	SELECT DISTINCT ON (n.provider, n.name) n.*, g.pattern, g.to_model AS glob_model
	FROM name n JOIN glob g ON g.provider = n.provider AND n.name ~ g.regexp
	WHERE n.provider = n.to_provider
	ORDER BY n.provider, n.name, g.literal DESC
)
SELECT provider, name, to_model, pattern, glob_model FROM hit WHERE glob_model <> to_model;
-- No part is without a price whose total has one.
SELECT count(*) > 1400 AS enough,
	count(*) FILTER (WHERE input IS NOT NULL AND (cache_read IS NULL OR cache_write IS NULL OR cache_write_1h IS NULL
		OR NOT units ?& '{input_audio_tokens, input_image_tokens, cache_read_audio_tokens}')) AS of_input,
	count(*) FILTER (WHERE output IS NOT NULL
		AND NOT units ?& '{output_audio_tokens, output_image_tokens, output_video_tokens}') AS of_output,
	count(*) FILTER (WHERE model ILIKE '%claude%' AND cache_write_1h <> 2 * input AND cache_write > input) AS of_an_hour
FROM aibilling.price WHERE source = 'bundled' AND context_above = 0 AND NOT (provider = 'mistral' AND units ? 'audio_second');
-- The pricing engine finds them, and no further model that only begins alike.
SELECT n.provider, n.model, aibilling.cost_nanos(n.provider, n.model, 100) > 0 AS priced
FROM (VALUES ('openai', 'gpt-5'), ('openai', 'openai/gpt-5'), ('openai', 'gpt-5-2025-08-07'), ('anthropic', 'claude-haiku-4-5-20251001'),
	('anthropic', 'claude-haiku-4-5-mini'), ('google', 'gemini-2.5-flash'), ('xai', 'grok-4.5'), ('xai', 'grok-4.5-20260708'),
	('groq', 'llama-3.1-8b-instant'), ('deepseek', 'deepseek-chat'), ('mistral', 'mistral-small-latest'),
	('openrouter', 'openai/gpt-5'), ('bedrock', 'eu.anthropic.claude-sonnet-4-5-20250929-v1:0'), ('azure', 'gpt-5'),
	('openai.chat', 'gpt-5'), ('google-vertex', 'gemini-2.5-flash'), ('vertex_ai', 'claude-sonnet-4-5'),
	('bedrock', 'global.anthropic.claude-sonnet-4-5-20250929-v1:0'), ('minimax', 'MiniMax-M3'), ('minimax', 'minimax-m2'),
	('OpenAI', 'GPT-5'), ('openai', 'gpt-5 '), ('google', 'models/gemini-2.5-pro'),
	('google', 'publishers/google/models/gemini-2.5-flash'),
	('google', 'projects/p/locations/us/publishers/google/models/gemini-2.5-flash'),
	('google', 'projects/p/locations/us/models/gemini-2.5-flash'), ('google', 'tunedModels/gemini-2.5-flash')) AS n (provider, model);

DROP VIEW stored;
DELETE FROM aibilling.price;
DELETE FROM aibilling.price_source;
DELETE FROM aibilling.model_alias;
DROP OWNED BY regress_importer, regress_reader;
DROP ROLE regress_importer, regress_reader;
