-- ---------------------------------------------------------------------------
-- Price catalogues: one reader for each format
-- ---------------------------------------------------------------------------

-- The planner takes every array for one of ten elements and would compare all of
-- a catalogue with all of it: hence enable_nestloop, here and in the import, and no
-- compilation for the costs that this seems to have.

-- jsonb keeps a number as the decimal text it was, so nothing here ever passes
-- through a float.
CREATE OR REPLACE FUNCTION aibilling.catalogue_number(value jsonb) RETURNS numeric
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
RETURN CASE jsonb_typeof(value)
	WHEN 'number' THEN (value #>> '{}')::numeric
	WHEN 'string' THEN CASE
		WHEN (value #>> '{}') ~ '^-?[0-9]{1,30}(\.[0-9]{1,60})?([eE][-+]?[0-9]{1,2})?$'
			THEN (value #>> '{}')::numeric
		END
	END;
COMMENT ON FUNCTION aibilling.catalogue_number(jsonb) IS
'A JSON number, or a decimal number in a JSON string, exactly; NULL for anything else';

CREATE OR REPLACE FUNCTION aibilling.catalogue_units(catalogue jsonb, entry jsonb) RETURNS jsonb
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
RETURN (
	SELECT coalesce(jsonb_object_agg(k.key, v.value), '{}')
	FROM (VALUES ('currency'), ('unit')) AS k (key)
	CROSS JOIN LATERAL (VALUES (coalesce(entry ->> k.key, catalogue #>> ARRAY['meta', k.key], catalogue ->> k.key))) AS v (value)
	WHERE v.value IS NOT NULL
);
COMMENT ON FUNCTION aibilling.catalogue_units(jsonb, jsonb) IS
'The currency and unit of prices, where a router''s catalogue gives them beside an entry''s prices or for all entries';

-- An image has a hundred tokens and more, and none of them costs more than some
-- ten or twenty tokens of text of its model.
CREATE OR REPLACE FUNCTION aibilling.image_price_is_by_token(image numeric, token numeric) RETURNS boolean
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN CASE
	WHEN token > 0 AND image <= 40 * token THEN true
	WHEN token > 0 AND image >= 80 * token THEN false
	WHEN token > 0 THEN NULL
	WHEN image < 0.00005 THEN true
	WHEN image >= 0.001 THEN false
	END;
COMMENT ON FUNCTION aibilling.image_price_is_by_token(numeric, numeric) IS
'Whether a price of images in USD is by their token, judged by the price of a token of text in USD (NULL or 0: none is known); NULL: that cannot be told';

-- LiteLLM: entries that name one model are reported; a price of an image that
-- is one of its tokens is found by what other tokens of the model cost.
CREATE OR REPLACE FUNCTION aibilling.read_litellm(catalogue jsonb) RETURNS SETOF aibilling.catalogue_price
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
	WITH entry AS (
		-- The key of a model is its name with the provider or without:
		-- litellm_provider says which provider it is.
		SELECT e.key AS name, e.value AS spec,
			CASE
				WHEN e.value ->> 'litellm_provider' LIKE 'vertex\_ai-%' THEN 'vertex_ai'
				WHEN e.value ->> 'litellm_provider' = 'bedrock_converse' THEN 'bedrock'
				ELSE e.value ->> 'litellm_provider'
			END AS provider
		FROM jsonb_each(catalogue) e
		WHERE e.key <> 'sample_spec'
			AND jsonb_typeof(e.value) = 'object'
			AND jsonb_typeof(e.value -> 'litellm_provider') = 'string'
	), named AS MATERIALIZED (
		SELECT *, first_value(name) OVER (PARTITION BY provider, model ORDER BY length(name), name COLLATE "C") AS taken
		FROM (
			SELECT *, CASE WHEN starts_with(name, provider || '/')
				THEN substr(name, length(provider) + 2) ELSE name END AS model
			FROM entry
		) AS e
	), model AS (
		SELECT * FROM named WHERE name = taken
	), item AS (
		SELECT m.provider, m.model, m.spec, k.key, k.value, 0::bigint AS range_from
		FROM model m CROSS JOIN LATERAL jsonb_each(m.spec) k
		WHERE k.key <> 'tiered_pricing'
		UNION ALL
		SELECT m.provider, m.model, m.spec, k.key, k.value,
			trunc(aibilling.catalogue_number(r.value -> 'range' -> 0))::bigint
		FROM model m
		CROSS JOIN LATERAL jsonb_array_elements(
			CASE jsonb_typeof(m.spec -> 'tiered_pricing') WHEN 'array' THEN m.spec -> 'tiered_pricing' END) r
		CROSS JOIN LATERAL jsonb_each(CASE jsonb_typeof(r.value) WHEN 'object' THEN r.value END) k
		WHERE k.key NOT IN ('range', 'max_results_range')
	), parsed AS (
		-- above_1hr is how long a cache entry lives, not a length of the context
		SELECT i.*, part[1] || coalesce(part[2], '') AS base,
			coalesce(part[3]::bigint * 1000 - (i.provider = 'xai')::integer, i.range_from) AS context_above,
			CASE part[4] WHEN 'batches' THEN 'batch' ELSE coalesce(part[4], 'standard') END AS service_tier,
			CASE jsonb_typeof(i.value)
				WHEN 'object' THEN coalesce(
					aibilling.catalogue_number(i.value -> 'search_context_size_medium'),
					aibilling.catalogue_number(i.value -> 'search_context_size_high'),
					aibilling.catalogue_number(i.value -> 'search_context_size_low'))
				ELSE aibilling.catalogue_number(i.value)
			END AS number
		FROM item i
		CROSS JOIN LATERAL regexp_match(i.key,
			'^(.*?)(_above_1hr)?(?:_above_([0-9]{1,9})k_tokens)?(?:_(batches|flex|priority))?$') AS part
		WHERE i.key ~ '(cost|price|pricing|multiplier|provider_specific_entry)'
			AND i.key !~ '_dbu_'
			AND jsonb_typeof(i.value) <> 'null'
	), mapped AS (
		SELECT p.*, d.per,
			CASE d.price_column
				WHEN 'units.second' THEN CASE
					WHEN p.spec ->> 'mode' LIKE 'audio\_%' THEN 'units.audio_second'
					WHEN p.spec ->> 'mode' LIKE 'video\_%' THEN 'units.video_second'
					ELSE 'units.second' END
				ELSE d.price_column
			END AS price_column,
			d.preference,
			CASE
				WHEN d.price_column IS NULL THEN 'not a price that aibilling.price can hold'
				WHEN p.range_from IS NULL THEN 'range without a start'
				WHEN p.number IS NULL THEN 'not a number'
				WHEN p.base = 'output_cost_per_image' AND p.spec ? 'output_cost_per_image_token'
					OR p.base = 'input_cost_per_image' AND p.spec ? 'input_cost_per_image_token'
					THEN 'the image is charged by its tokens'
				WHEN d.price_column = 'units.image' AND p.number > 0 AND (p.number < 0.0001
					-- the text token's price of the same side, input or output
					OR p.number < 80 * aibilling.catalogue_number(p.spec -> (split_part(p.base, '_', 1) || '_cost_per_token')))
					THEN 'too low for an image, as if it were for a token: ' || p.number
			END AS problem
		FROM parsed p
		LEFT JOIN (VALUES
			('input_cost_per_token', 'input', 1000000, 1),
			('output_cost_per_token', 'output', 1000000, 1),
			('output_cost_per_reasoning_token', 'reasoning', 1000000, 1),
			('cache_read_input_token_cost', 'cache_read', 1000000, 1),
			('input_cost_per_token_cache_hit', 'cache_read', 1000000, 2),
			('cache_creation_input_token_cost', 'cache_write', 1000000, 1),
			('cache_creation_input_token_cost_above_1hr', 'cache_write_1h', 1000000, 1),
			('input_cost_per_request', 'request', 1, 1),
			('search_context_cost_per_query', 'web_search', 1, 1),
			('input_cost_per_audio_token', 'units.input_audio_tokens', 1000000, 1),
			('output_cost_per_audio_token', 'units.output_audio_tokens', 1000000, 1),
			('cache_read_input_audio_token_cost', 'units.cache_read_audio_tokens', 1000000, 1),
			('input_cost_per_image_token', 'units.input_image_tokens', 1000000, 1),
			('output_cost_per_image_token', 'units.output_image_tokens', 1000000, 1),
			('output_cost_per_video_token', 'units.output_video_tokens', 1000000, 1),
			('citation_cost_per_token', 'units.citation_tokens', 1000000, 1),
			-- Where both sides carry the price of one thing, it is charged once.
			('output_cost_per_image', 'units.image', 1, 1),
			('input_cost_per_image', 'units.image', 1, 2),
			('input_cost_per_second', 'units.second', 1, 1),
			('output_cost_per_second', 'units.second', 1, 2),
			('input_cost_per_audio_per_second', 'units.audio_second', 1, 3),
			('output_cost_per_video_per_second', 'units.video_second', 1, 3),
			('input_cost_per_video_per_second', 'units.video_second', 1, 4),
			('input_cost_per_character', 'units.character', 1, 1),
			('output_cost_per_character', 'units.character', 1, 2),
			('output_cost_per_pixel', 'units.pixel', 1, 1),
			('input_cost_per_pixel', 'units.pixel', 1, 2),
			('input_cost_per_query', 'units.query', 1, 1),
			('ocr_cost_per_page', 'units.page', 1, 1),
			('code_interpreter_cost_per_session', 'units.session', 1, 1)
		) AS d (base, price_column, per, preference) USING (base)
	)
	SELECT provider, model, service_tier, context_above, NULL::timestamptz, NULL::time, NULL::time,
		price_column, number * per, NULL
	FROM (
		SELECT DISTINCT ON (provider, model, service_tier, context_above, price_column) *
		FROM mapped
		WHERE problem IS NULL
		ORDER BY provider, model, service_tier, context_above, price_column, number = 0, preference
	) AS m
	UNION ALL
	SELECT provider, model, service_tier, context_above, NULL, NULL, NULL, key, NULL, problem
	FROM mapped
	WHERE problem IS NOT NULL
	UNION ALL
	SELECT provider, model, 'standard', 0, NULL, NULL, NULL, name, NULL,
		format('entry "%s" names the same model as "%s", which is taken', name, taken)
	FROM named
	WHERE name <> taken
$$;
COMMENT ON FUNCTION aibilling.read_litellm(jsonb) IS
'The prices in LiteLLM''s model_prices_and_context_window.json (USD per unit, batches, flex, priority, context tiers)';

-- models.dev: modes have context tiers like the model itself; a model without
-- tiers may have context_over_200k.
CREATE OR REPLACE FUNCTION aibilling.read_models_dev(catalogue jsonb) RETURNS SETOF aibilling.catalogue_price
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
	WITH model AS (
		SELECT p.key AS provider, m.key AS model, m.value AS spec
		FROM jsonb_each(catalogue) p
		CROSS JOIN LATERAL jsonb_each(
			CASE jsonb_typeof(p.value -> 'models') WHEN 'object' THEN p.value -> 'models' END) m
		WHERE jsonb_typeof(m.value) = 'object'
	), card AS (
		SELECT provider, model, 'standard' AS service_tier, spec -> 'cost' AS cost
		FROM model
		UNION ALL
		SELECT m.provider, m.model,
			coalesce(e.value #>> '{provider,body,service_tier}', e.key), e.value -> 'cost'
		FROM model m
		CROSS JOIN LATERAL jsonb_each(
			CASE jsonb_typeof(m.spec #> '{experimental,modes}') WHEN 'object' THEN m.spec #> '{experimental,modes}' END) e
		WHERE coalesce(e.value #>> '{provider,body,service_tier}', e.key)
			NOT IN ('', 'standard', 'default', 'auto', 'on_demand')
	), cost AS (
		SELECT provider, model, service_tier, 0::bigint AS context_above, cost
		FROM card
		UNION ALL
		SELECT c.provider, c.model, c.service_tier,
			trunc(aibilling.catalogue_number(t.value -> 'tier' -> 'size'))::bigint, t.value
		FROM card c
		CROSS JOIN LATERAL jsonb_array_elements(
			CASE jsonb_typeof(c.cost -> 'tiers') WHEN 'array' THEN c.cost -> 'tiers' END) t
		UNION ALL
		-- context_over_200k is filled from any tier above 200k: tiers is the
		-- truth, where there is one
		SELECT provider, model, service_tier, 200000, cost -> 'context_over_200k'
		FROM card
		WHERE coalesce(jsonb_array_length(CASE jsonb_typeof(cost -> 'tiers') WHEN 'array' THEN cost -> 'tiers' END), 0) = 0
	)
	SELECT c.provider, c.model, c.service_tier, c.context_above, NULL::timestamptz, NULL::time, NULL::time,
		coalesce(d.price_column, k.key),
		CASE WHEN d.price_column IS NOT NULL AND c.context_above IS NOT NULL
			THEN aibilling.catalogue_number(k.value) END,
		CASE
			WHEN d.price_column IS NULL THEN 'not a price that aibilling.price can hold'
			WHEN c.context_above IS NULL THEN 'tier without a size'
			WHEN aibilling.catalogue_number(k.value) IS NULL THEN 'not a number'
		END
	FROM cost c
	CROSS JOIN LATERAL jsonb_each(CASE jsonb_typeof(c.cost) WHEN 'object' THEN c.cost END) k
	LEFT JOIN (VALUES
		('input', 'input'), ('output', 'output'), ('cache_read', 'cache_read'),
		('cache_write', 'cache_write'), ('reasoning', 'reasoning'),
		('input_audio', 'units.input_audio_tokens'), ('output_audio', 'units.output_audio_tokens')
	) AS d (key, price_column) USING (key)
	WHERE k.key NOT IN ('tier', 'tiers', 'context_over_200k')
$$;
COMMENT ON FUNCTION aibilling.read_models_dev(jsonb) IS
'The prices in the api.json of models.dev (USD per million tokens, context tiers, modes as service tiers)';

-- OpenRouter and Narev name the prices of a model alike, in USD per unit.
CREATE OR REPLACE FUNCTION aibilling.read_router_prices(pricing jsonb, zero_is_unset boolean)
RETURNS TABLE (price_column text, price numeric, problem text)
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
	SELECT CASE WHEN i.by_token = false THEN 'units.image' ELSE coalesce(d.price_column, k.key) END,
		CASE WHEN v.number >= 0 AND f.foreign_unit IS NULL AND i.by_token IS NOT NULL
			THEN v.number * CASE WHEN i.by_token THEN d.per ELSE 1 END END,
		CASE
			WHEN d.price_column IS NULL THEN 'not a price that aibilling.price can hold'
			WHEN v.number IS NULL THEN 'not a number'
			WHEN v.number = -1 THEN 'the catalogue says that the price varies'
			WHEN v.number < 0 THEN 'negative'
			WHEN i.by_token IS NULL THEN format('cannot be told: by the image, or by its token: %s', v.number)
			ELSE f.foreign_unit
		END
	FROM jsonb_each(pricing) k
	CROSS JOIN LATERAL aibilling.catalogue_number(k.value) AS v (number)
	CROSS JOIN LATERAL (VALUES (CASE
		WHEN lower(pricing ->> 'currency') <> 'usd' THEN format('in %s, not in USD', pricing ->> 'currency')
		WHEN lower(pricing ->> 'unit') NOT IN ('token', 'tokens', 'per_token')
			THEN format('by %s, not by the token', pricing ->> 'unit')
		END)) AS f (foreign_unit)
	LEFT JOIN (VALUES
		('prompt', 'input', 1000000), ('completion', 'output', 1000000),
		('internal_reasoning', 'reasoning', 1000000),
		('input_cache_read', 'cache_read', 1000000), ('input_cache_write', 'cache_write', 1000000),
		('input_cache_write_1h', 'cache_write_1h', 1000000),
		('audio', 'units.input_audio_tokens', 1000000), ('audio_output', 'units.output_audio_tokens', 1000000),
		('input_audio_cache', 'units.cache_read_audio_tokens', 1000000),
		('image', 'units.input_image_tokens', 1000000), ('image_output', 'units.output_image_tokens', 1000000),
		('web_search', 'web_search', 1), ('request', 'request', 1), ('discount', 'discount', 1)
	) AS d (key, price_column, per) USING (key)
	-- One key has the price of an image, or that of its tokens.
	CROSS JOIN LATERAL (VALUES (CASE
		WHEN k.key = 'image' AND v.number > 0 THEN aibilling.image_price_is_by_token(v.number,
			aibilling.catalogue_number(coalesce(pricing -> 'prompt', pricing #> '{reference,prompt}')))
		WHEN k.key = 'image_output' AND v.number > 0 THEN aibilling.image_price_is_by_token(v.number,
			aibilling.catalogue_number(coalesce(pricing -> 'completion', pricing #> '{reference,completion}')))
		ELSE true END)) AS i (by_token)
	WHERE k.key NOT IN ('overrides', 'min_prompt_tokens', 'currency', 'unit', 'reference')
		AND jsonb_typeof(k.value) <> 'null'
		AND NOT (v.number = 0 AND k.key = 'discount')
		AND NOT (v.number = 0 AND zero_is_unset AND k.key NOT IN ('prompt', 'completion'))
	-- the first of two prices of an image counts: that of one that is made
	ORDER BY k.key = 'image'
$$;
COMMENT ON FUNCTION aibilling.read_router_prices(jsonb, boolean) IS
'The prices in one pricing object of OpenRouter or Narev; its member reference has the prices that an override changes; zero_is_unset: 0 means that the price is not known, except of prompt and completion';

CREATE OR REPLACE FUNCTION aibilling.read_openrouter(catalogue jsonb) RETURNS SETOF aibilling.catalogue_price
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
	WITH pricing AS (
		SELECT m.value ->> 'id' AS model, 0::bigint AS context_above, m.value -> 'pricing' AS pricing, m.value AS entry
		FROM jsonb_array_elements(catalogue -> 'data') m
		UNION ALL
		-- a step applies from min_prompt_tokens on, ours above context_above
		SELECT m.value ->> 'id', trunc(aibilling.catalogue_number(o.value -> 'min_prompt_tokens'))::bigint - 1,
			CASE jsonb_typeof(o.value) WHEN 'object'
				THEN o.value || jsonb_build_object('reference', m.value -> 'pricing') END,
			m.value || jsonb_strip_nulls(jsonb_build_object('currency', m.value #> '{pricing,currency}', 'unit', m.value #> '{pricing,unit}'))
		FROM jsonb_array_elements(catalogue -> 'data') m
		CROSS JOIN LATERAL jsonb_array_elements(
			CASE jsonb_typeof(m.value #> '{pricing,overrides}') WHEN 'array' THEN m.value #> '{pricing,overrides}' END) o
	)
	SELECT 'openrouter', p.model, 'standard', nullif(p.context_above, -1), NULL::timestamptz, NULL::time, NULL::time,
		r.price_column,
		CASE WHEN p.context_above >= 0 THEN r.price END,
		CASE WHEN p.context_above >= 0 THEN r.problem ELSE 'override without min_prompt_tokens' END
	FROM (SELECT model, pricing, entry, coalesce(context_above, -1) AS context_above FROM pricing) AS p
	CROSS JOIN LATERAL aibilling.read_router_prices(
		CASE jsonb_typeof(p.pricing) WHEN 'object' THEN aibilling.catalogue_units(catalogue, p.entry) || p.pricing END, false) r
$$;
COMMENT ON FUNCTION aibilling.read_openrouter(jsonb) IS
'The prices in the answer of OpenRouter''s /api/v1/models; the provider is openrouter, since a router''s price is not the provider''s';

CREATE OR REPLACE FUNCTION aibilling.read_narev(catalogue jsonb) RETURNS SETOF aibilling.catalogue_price
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
	SELECT m.value ->> 'provider_id', m.value ->> 'model_id', 'standard', 0::bigint,
		NULL::timestamptz, NULL::time, NULL::time, r.price_column, r.price, r.problem
	FROM jsonb_array_elements(catalogue -> 'data') m
	CROSS JOIN LATERAL aibilling.read_router_prices(
		CASE jsonb_typeof(m.value -> 'pricing') WHEN 'object'
			THEN aibilling.catalogue_units(catalogue, m.value) || (m.value -> 'pricing') END, true) r
$$;
COMMENT ON FUNCTION aibilling.read_narev(jsonb) IS
'The prices in the answer of Narev''s /v1/prices; 0 in an optional field means that it is not set';

-- What genai-prices has otherwise than the provider publishes it.
CREATE OR REPLACE FUNCTION aibilling.correct_genai_prices(prices aibilling.catalogue_price[]) RETURNS SETOF aibilling.catalogue_price
LANGUAGE sql STABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET enable_nestloop = off
SET jit = off
AS $$
	WITH fee (model, low, medium, high) AS (VALUES
		-- Perplexity's fee for a request depends on how much of the web is read
		-- for it, and is the lowest unless the request says more.
		('sonar', 0.005, 0.008, 0.012), ('sonar-reasoning', 0.005, 0.008, 0.012),
		('sonar-pro', 0.006, 0.010, 0.014), ('sonar-reasoning-pro', 0.006, 0.010, 0.014)
	), latest (name, model, since) AS (VALUES
		('mistral-large-latest', 'mistral-large', NULL::timestamptz),
		('mistral-large-latest', 'mistral-large-2512', '2025-12-02 00:00+00'),
		('codestral-latest', 'codestral', NULL),
		('codestral-latest', 'codestral-2508', '2025-07-30 00:00+00')
	), published (provider, model, price_column, price) AS (VALUES
		-- two dollars for a thousand searches, 15 and 30 for a million characters
		('cohere', 'rerank-v3.5', 'units.query', 0.002),
		('cohere', 'rerank-english-v3.0', 'units.query', 0.002),
		('cohere', 'rerank-multilingual-v3.0', 'units.query', 0.002),
		('openai', 'tts-1', 'units.character', 0.000015),
		('openai', 'tts-1-hd', 'units.character', 0.00003)
	), price AS MATERIALIZED (
		SELECT * FROM unnest(prices)
	)
	SELECT p.provider, p.model, p.service_tier, p.context_above, p.valid_from, p.daily_from, p.daily_to,
		coalesce(c.price_column, p.price_column), coalesce(c.price, p.price), coalesce(c.remark, p.problem)
	FROM price p
	LEFT JOIN fee f ON p.provider = 'perplexity' AND (f.model, 'request', f.high) = (p.model, p.price_column, p.price)
	LEFT JOIN LATERAL (VALUES
		('request', f.low, 'with a low search context'),
		('units.search_context_medium', f.medium - f.low, 'beside request'),
		('units.search_context_high', f.high - f.low, 'beside request')
	) AS c (price_column, price, remark) ON f.model IS NOT NULL
	UNION ALL
	SELECT p.provider, l.name, p.service_tier, p.context_above, l.since, p.daily_from, p.daily_to,
		p.price_column, p.price, 'of ' || l.model
	FROM latest l JOIN price p ON (p.provider, p.model) = ('mistral', l.model)
	WHERE p.price IS NOT NULL AND p.valid_from IS NULL
		AND NOT EXISTS (SELECT FROM price o WHERE (o.provider, o.model) = ('mistral', l.name))
	UNION ALL
	SELECT b.provider, b.model, 'standard', 0, NULL, NULL, NULL, b.price_column, b.price, 'published by the provider'
	FROM published b
	WHERE b.provider IN (SELECT provider FROM price)
		AND NOT EXISTS (SELECT FROM price o WHERE (o.provider, o.model) = (b.provider, b.model))
$$;
COMMENT ON FUNCTION aibilling.correct_genai_prices(aibilling.catalogue_price[]) IS
'The prices of genai-prices, with what it lacks or has otherwise than the provider publishes it: names of Mistral''s that lead to the newest model, fees of Perplexity''s by the size of the search context, rerank models of Cohere''s, speech of OpenAI''s';

-- genai-prices computes a part that has no price of its own with the price of
-- what it is a part of.  What its prices say is what it computes.
CREATE OR REPLACE FUNCTION aibilling.complete_prices(prices aibilling.catalogue_price[]) RETURNS SETOF aibilling.catalogue_price
LANGUAGE sql STABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET enable_nestloop = off
SET jit = off
AS $$
	WITH source AS MATERIALIZED (
		SELECT p.*, concat_ws('|', p.valid_from, p.daily_from, p.daily_to, p.provider, p.model) AS entry
		FROM unnest(prices) AS p
		WHERE p.price IS NOT NULL
	), has AS MATERIALIZED (
		SELECT DISTINCT entry, price_column FROM source
	), part (part, rank, total, factor, only_where) AS (VALUES
		('cache_read', 1, 'input', 1, ''),
		('cache_write', 1, 'input', 1, ''),
		-- Anthropic: twice the price of the input, wherever Claude is sold
		('cache_write_1h', 1, 'input', 2, 'claude'),
		('cache_write_1h', 2, 'cache_write', 1, ''),
		('cache_write_1h', 3, 'input', 1, ''),
		('units.input_audio_tokens', 1, 'input', 1, ''),
		('units.input_image_tokens', 1, 'input', 1, ''),
		('units.cache_read_audio_tokens', 1, 'cache_read', 1, ''),
		('units.cache_read_audio_tokens', 2, 'units.input_audio_tokens', 1, ''),
		('units.cache_read_audio_tokens', 3, 'input', 1, ''),
		('units.output_audio_tokens', 1, 'output', 1, ''),
		('units.output_image_tokens', 1, 'output', 1, ''),
		('units.output_video_tokens', 1, 'output', 1, '')
	), chosen AS (
		SELECT DISTINCT ON (h.entry, p.part) h.entry, p.*
		FROM has h JOIN part p ON p.total = h.price_column
		WHERE NOT EXISTS (SELECT FROM has o WHERE (o.entry, o.price_column) = (h.entry, p.part))
			AND (p.only_where = '' OR h.entry ILIKE '%claude%'
				AND EXISTS (SELECT FROM has o WHERE (o.entry, o.price_column) = (h.entry, 'cache_write')))
		ORDER BY h.entry, p.part, p.rank
	)
	SELECT * FROM unnest(prices)
	UNION ALL
	SELECT s.provider, s.model, s.service_tier, s.context_above, s.valid_from, s.daily_from, s.daily_to,
		c.part, s.price * c.factor,
		CASE c.factor WHEN 1 THEN 'as ' ELSE 'twice ' END || replace(c.total, 'units.', '')
	FROM chosen c JOIN source s ON (s.entry, s.price_column) = (c.entry, c.total)
	UNION ALL
	-- The tokens that Mistral counts beside the seconds of a recording are not
	-- charged, and the searches of Perplexity's Sonar are in its request fee.
	SELECT s.provider, s.model, s.service_tier, s.context_above, s.valid_from, s.daily_from, s.daily_to,
		f.price_column, 0, 'free beside ' || replace(f.beside, 'units.', '')
	FROM (VALUES
		('mistral', 'units.audio_second', 'input'), ('mistral', 'units.audio_second', 'output'),
		('perplexity', 'request', 'web_search')
	) AS f (provider, beside, price_column)
	JOIN source s ON (s.provider, s.price_column) = (f.provider, f.beside)
	WHERE NOT EXISTS (SELECT FROM has o WHERE (o.entry, o.price_column) = (s.entry, f.price_column))
$$;
COMMENT ON FUNCTION aibilling.complete_prices(aibilling.catalogue_price[]) IS
'The prices of genai-prices with those that it only implies: a part without a price of its own costs what its total costs; the remark in problem says so';

-- A name that a rule leaves open at its end is narrowed to what marks a date or
-- version of the same model, as dev/update-prices does it for the bundle.
CREATE OR REPLACE FUNCTION aibilling.genai_names(catalogue jsonb) RETURNS jsonb
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $names$
	WITH RECURSIVE leaf (provider, model, n, m, rule) AS (
		SELECT p.value ->> 'id', m.value ->> 'id', p.ordinality, m.ordinality, m.value -> 'match'
		FROM jsonb_array_elements(catalogue) WITH ORDINALITY p
		CROSS JOIN LATERAL jsonb_array_elements(
			CASE jsonb_typeof(p.value -> 'models') WHEN 'array' THEN p.value -> 'models' END) WITH ORDINALITY m
		UNION ALL
		SELECT l.provider, l.model, l.n, l.m, e.value
		FROM leaf l CROSS JOIN LATERAL jsonb_array_elements(
			CASE jsonb_typeof(l.rule -> 'or') WHEN 'array' THEN l.rule -> 'or' END) e
	), literal AS (
		SELECT l.*, CASE WHEN k.key = 'and' THEN 'starts_with' ELSE k.key END AS key,
			CASE WHEN k.key = 'and' THEN k.value -> 0 ->> 'starts_with' ELSE k.value #>> '{}' END AS text
		FROM leaf l CROSS JOIN LATERAL jsonb_each(CASE jsonb_typeof(l.rule) WHEN 'object' THEN l.rule END) k
		WHERE k.key <> 'or'
	), name AS (
		SELECT l.*, e.pattern
		FROM literal l
		CROSS JOIN LATERAL (
			SELECT l.text AS pattern WHERE l.key = 'equals'
			UNION ALL
			SELECT CASE l.key WHEN 'contains' THEN '*' ELSE '' END || l.text || unnest(CASE
				WHEN l.text ~ '([-@:]|-20\d\d|-0)$' THEN ARRAY['*']
				WHEN l.provider = 'aws' THEN CASE
					WHEN l.text ~ '-v?\d$' AND l.text !~ 'claude-[a-z]+(-\d)+$' THEN ARRAY['', ':*']
					WHEN l.text ~ '-20\d{6}$' THEN ARRAY['', '-v?', '-v?:*']
					ELSE ARRAY['', '-v?', '-v?:*', '-202*'] END
				WHEN l.provider = 'anthropic' THEN ARRAY['', '-202*', '-latest', '@*']
				WHEN l.provider = 'google' THEN ARRAY['', '-202*', '-latest', '-0*', '@*']
				WHEN l.provider = 'openai' THEN ARRAY['', '-202*', '-latest', '-preview', '-preview-202*', '-0*', ':*']
				WHEN l.provider = 'mistral' THEN ARRAY['', '-latest', '-2???']
				ELSE ARRAY['', '-202*', '-latest', '-0*'] END)
			WHERE l.key IN ('starts_with', 'contains') AND l.text !~ '[*?\\]'
			UNION ALL
			SELECT '*' || l.text WHERE l.key = 'ends_with' AND l.text !~ '[*?\\]'
			UNION ALL
			-- of a regular expression only a literal, with the digits of a date at its end
			SELECT replace((regexp_match(
				regexp_replace(regexp_replace(l.text, '\\d\{4\}-\\d\{2\}-\\d\{2\}\$$', '202?-??-??$'), '\\d\{8\}\$$', '202?????$'),
				'^\^((?:[^\\^$.*+()\[\]{}|]|\\[.\[\]])+)\$$'))[1], '\', '')
			WHERE l.key = 'regex'
		) AS e
		WHERE e.pattern IS NOT NULL
	), named AS (
		SELECT n, m, provider, model,
			coalesce(jsonb_agg(DISTINCT pattern) FILTER (WHERE key = 'equals' OR pattern !~ '[*?]'), '[]') AS exact,
			coalesce(jsonb_agg(DISTINCT pattern) FILTER (WHERE key <> 'equals' AND pattern ~ '[*?]'), '[]') AS glob
		FROM name
		GROUP BY n, m, provider, model
	)
	SELECT jsonb_agg(jsonb_build_object('provider', provider, 'model', model, 'exact', exact, 'glob', glob) ORDER BY n, m)
	FROM named
$names$;
COMMENT ON FUNCTION aibilling.genai_names(jsonb) IS
'The names that the match rules of genai-prices give to models, as patterns of aibilling.model_alias: [{provider, model, exact: [], glob: []}, ...]';

CREATE OR REPLACE FUNCTION aibilling.read_genai_prices(catalogue jsonb) RETURNS SETOF aibilling.catalogue_price
LANGUAGE sql STABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
	WITH entry AS (
		SELECT p.value ->> 'id' AS provider, m.value ->> 'id' AS model, e.ordinality AS n,
			e.value -> 'constraint' AS condition,
			CASE WHEN jsonb_typeof(m.value -> 'prices') = 'array' THEN e.value -> 'prices' ELSE e.value END AS prices
		FROM jsonb_array_elements(catalogue) p
		CROSS JOIN LATERAL jsonb_array_elements(
			CASE jsonb_typeof(p.value -> 'models') WHEN 'array' THEN p.value -> 'models' END) m
		CROSS JOIN LATERAL jsonb_array_elements(
			CASE jsonb_typeof(m.value -> 'prices') WHEN 'array' THEN m.value -> 'prices'
			ELSE jsonb_build_array(m.value -> 'prices') END) WITH ORDINALITY e
	), dated AS (
		-- Of the entries in force the last one wins.  A daily window belongs to
		-- the dated entry it follows: it was announced with it.
		SELECT e.*, max((e.condition ->> 'start_date')::date)
				FILTER (WHERE e.condition ->> 'start_date' ~ '^\d{4}-\d{2}-\d{2}$')
				OVER (PARTITION BY provider, model ORDER BY n) AS start_date
		FROM entry e
	), windowed AS (
		SELECT d.*,
			CASE WHEN d.condition ->> 'start_time' ~ '^\d\d:\d\d(:\d\d)?(Z|\+00:00)$'
				THEN rtrim(split_part(d.condition ->> 'start_time', '+', 1), 'Z')::time END AS daily_from,
			CASE WHEN d.condition ->> 'end_time' ~ '^\d\d:\d\d(:\d\d)?(Z|\+00:00)$'
				THEN rtrim(split_part(d.condition ->> 'end_time', '+', 1), 'Z')::time END AS daily_to,
			coalesce(jsonb_typeof(d.condition), 'null') <> 'null'
				AND coalesce(d.condition ->> 'start_date', '') !~ '^\d{4}-\d{2}-\d{2}$' AS needs_window
		FROM dated d
	), item AS (
		SELECT w.*, k.key, k.value, d.price_column, d.per
		FROM windowed w
		CROSS JOIN LATERAL jsonb_each(CASE jsonb_typeof(w.prices) WHEN 'object' THEN w.prices END) k
		LEFT JOIN (VALUES
			('input_mtok', 'input', 1), ('output_mtok', 'output', 1),
			('cache_read_mtok', 'cache_read', 1),
			('cache_write_mtok', 'cache_write', 1), ('cache_write_5m_mtok', 'cache_write', 1),
			('cache_write_1h_mtok', 'cache_write_1h', 1),
			('output_reasoning_mtok', 'reasoning', 1),
			('requests_kcount', 'request', 1000), ('web_searches_kcount', 'web_search', 1000),
			('input_audio_mtok', 'units.input_audio_tokens', 1),
			('output_audio_mtok', 'units.output_audio_tokens', 1),
			('cache_audio_read_mtok', 'units.cache_read_audio_tokens', 1),
			('input_image_mtok', 'units.input_image_tokens', 1),
			('output_image_mtok', 'units.output_image_tokens', 1),
			('output_video_mtok', 'units.output_video_tokens', 1),
			('output_citation_mtok', 'units.citation_tokens', 1),
			('audio_hours', 'units.audio_second', 3600), ('input_audio_hours', 'units.audio_second', 3600),
			('output_audio_hours', 'units.audio_second', 3600),
			('input_document_kpages', 'units.page', 1000),
			('input_mchars', 'units.character', 1000000),
			('input_gpixels', 'units.pixel', 1000000000),
			('rerank_searches_kcount', 'units.query', 1000),
			('storage_searches_kcount', 'units.file_search', 1000),
			('social_searches_kcount', 'units.x_search', 1000), ('code_executions_kcount', 'units.code_execution', 1000)
		) AS d (key, price_column, per) USING (key)
	), tier AS (
		SELECT i.provider, i.model, i.n, i.key,
			trunc(aibilling.catalogue_number(t.value -> 'start'))::bigint AS start,
			aibilling.catalogue_number(t.value -> 'price') AS number
		FROM item i
		CROSS JOIN LATERAL jsonb_array_elements(
			CASE jsonb_typeof(i.value -> 'tiers') WHEN 'array' THEN i.value -> 'tiers' END) t
	), step AS (
		SELECT i.*, 0::bigint AS context_above,
			aibilling.catalogue_number(CASE jsonb_typeof(i.value) WHEN 'object' THEN i.value -> 'base' ELSE i.value END) AS number
		FROM item i
		UNION ALL
		-- Each price has steps of its own.  A row for one step also carries what
		-- earlier steps have changed, as a NULL there means the base price.
		SELECT i.*, a.start, t.number
		FROM item i
		CROSS JOIN LATERAL (
			SELECT DISTINCT start FROM tier
			WHERE (tier.provider, tier.model, tier.n) = (i.provider, i.model, i.n)
		) AS a
		CROSS JOIN LATERAL (
			SELECT number FROM tier
			WHERE (tier.provider, tier.model, tier.n, tier.key) = (i.provider, i.model, i.n, i.key)
				AND (tier.start <= a.start OR a.start IS NULL)
			ORDER BY start DESC
			LIMIT 1
		) AS t
		WHERE jsonb_typeof(i.value -> 'tiers') = 'array'
	), found AS (
		SELECT provider, model, 'standard' AS service_tier, context_above,
			start_date::timestamp AT TIME ZONE 'UTC' AS valid_from,
			daily_from, daily_to, coalesce(price_column, key) AS price_column,
			CASE WHEN problem IS NULL THEN number / per END AS price, problem
		FROM step
		CROSS JOIN LATERAL (SELECT CASE
			WHEN price_column IS NULL THEN 'not a price that aibilling.price can hold'
			WHEN needs_window AND daily_from <> daily_to IS NOT TRUE THEN 'unknown constraint ' || condition::text
			WHEN context_above IS NULL THEN 'tier without a start'
			WHEN number IS NULL THEN 'not a number'
			END AS problem) AS p
	)
	SELECT * FROM aibilling.complete_prices(ARRAY(
		SELECT c FROM aibilling.correct_genai_prices(ARRAY(
			SELECT ROW(f.*)::aibilling.catalogue_price FROM found f)) c))
$$;
COMMENT ON FUNCTION aibilling.read_genai_prices(jsonb) IS
'The prices in the data.json of pydantic''s genai-prices (USD per million tokens, thousand requests, hour; dates, daily windows, context tiers), completed by complete_prices';
