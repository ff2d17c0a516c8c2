\echo Use "ALTER EXTENSION aibilling_polar UPDATE TO '1.1'" to load this file. \quit

-- What a server says to a role's own token is kept apart from what it says to
-- the token that all share; and each pauses the delivery of his own tables.

ALTER TABLE aibilling.server_state
	ADD COLUMN role oid NOT NULL DEFAULT 0,
	DROP CONSTRAINT server_state_pkey,
	ADD CONSTRAINT server_state_pkey PRIMARY KEY (server, role);
COMMENT ON TABLE aibilling.server_state IS
'Private: servers that are paused or wait after failures, for all or for one role, so that a restart does not forget it; shown by aibilling.status';
COMMENT ON COLUMN aibilling.server_state.role IS
'The owner of usage tables, if the state is of the token in its own user mapping, or of its own pause; 0: of all others together';

COMMENT ON FUNCTION aibilling.pause(name) IS
'Sends nothing to the foreign server until aibilling.resume(); requests in flight end. NULL: all servers. By the owner of the server: nothing of anyone''s; by others: nothing from the usage tables that they own';
COMMENT ON FUNCTION aibilling.resume(name) IS
'Ends a pause, whether aibilling.pause() or the server''s answer began it, and every wait after failures, and tries at once. NULL: all servers. A pause of the whole server is ended by its owner only, one of usage tables by their owner';

-- A list in another currency, or by other units, is not taken for one in USD by the token.

CREATE FUNCTION aibilling.catalogue_units(catalogue jsonb, entry jsonb) RETURNS jsonb
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
RETURN (
	SELECT coalesce(jsonb_object_agg(k.key, v.value), '{}')
	FROM (VALUES ('currency'), ('unit')) AS k (key)
	CROSS JOIN LATERAL (VALUES (coalesce(entry ->> k.key, catalogue #>> ARRAY['meta', k.key], catalogue ->> k.key))) AS v (value)
	WHERE v.value IS NOT NULL
);
COMMENT ON FUNCTION aibilling.catalogue_units(jsonb, jsonb) IS
'the currency and unit of prices, where a router''s catalogue gives them beside an entry''s prices or for all entries';
REVOKE ALL ON FUNCTION aibilling.catalogue_units(jsonb, jsonb) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION aibilling.catalogue_units(jsonb, jsonb) TO PUBLIC;

CREATE OR REPLACE FUNCTION aibilling.read_router_prices(pricing jsonb, zero_is_unset boolean)
RETURNS TABLE (price_column text, price numeric, problem text)
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
	SELECT CASE
			-- A price by the image has the same key as one by its tokens, but is a
			-- hundred and more times as high.
			WHEN k.key IN ('image', 'image_output') AND v.number >= 0.0001 THEN 'units.image'
			ELSE coalesce(d.price_column, k.key)
		END,
		CASE WHEN v.number >= 0 AND f.foreign_unit IS NULL THEN v.number * CASE
			WHEN k.key IN ('image', 'image_output') AND v.number >= 0.0001 THEN 1
			ELSE d.per END END,
		CASE
			WHEN d.price_column IS NULL THEN 'not a price that aibilling.price can hold'
			WHEN v.number IS NULL THEN 'not a number'
			WHEN v.number = -1 THEN 'the catalogue says that the price varies'
			WHEN v.number < 0 THEN 'negative'
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
	WHERE k.key NOT IN ('overrides', 'min_prompt_tokens', 'currency', 'unit')
		AND jsonb_typeof(k.value) <> 'null'
		AND NOT (v.number = 0 AND k.key = 'discount')
		AND NOT (v.number = 0 AND zero_is_unset AND k.key NOT IN ('prompt', 'completion'))
$$;

CREATE OR REPLACE FUNCTION aibilling.read_openrouter(catalogue jsonb) RETURNS SETOF aibilling.catalogue_price
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
	WITH pricing AS (
		SELECT m.value ->> 'id' AS model, 0::bigint AS context_above, m.value -> 'pricing' AS pricing, m.value AS entry
		FROM jsonb_array_elements(catalogue -> 'data') m
		UNION ALL
		-- a step applies from min_prompt_tokens on, ours above context_above
		SELECT m.value ->> 'id', trunc(aibilling.catalogue_number(o.value -> 'min_prompt_tokens'))::bigint - 1, o.value,
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

COMMENT ON FUNCTION aibilling.explain_cost(regclass, bigint) IS
'How the cost of a stored usage row comes about by the prices of now, read with the rights of the caller. The amounts add up to the cost that is stored: if prices have been corrected since, bucket difference says by how much';
COMMENT ON COLUMN aibilling.price_quarantine.provider IS 'As aibilling.price.provider';
COMMENT ON COLUMN aibilling.price_quarantine.model IS 'As aibilling.price.model';
COMMENT ON COLUMN aibilling.price_quarantine.service_tier IS 'As aibilling.price.service_tier';
COMMENT ON COLUMN aibilling.price_quarantine.context_above IS 'As aibilling.price.context_above';
COMMENT ON COLUMN aibilling.price_quarantine.valid_from IS 'As aibilling.price.valid_from';
COMMENT ON COLUMN aibilling.price_quarantine.source IS 'As aibilling.price.source';
COMMENT ON COLUMN aibilling.price_quarantine.daily_from IS 'As aibilling.price.daily_from';
COMMENT ON COLUMN aibilling.price_quarantine.daily_to IS 'As aibilling.price.daily_to';
COMMENT ON COLUMN aibilling.price_quarantine.input IS 'As aibilling.price.input';
COMMENT ON COLUMN aibilling.price_quarantine.output IS 'As aibilling.price.output';
COMMENT ON COLUMN aibilling.price_quarantine.cache_read IS 'As aibilling.price.cache_read';
COMMENT ON COLUMN aibilling.price_quarantine.cache_write IS 'As aibilling.price.cache_write';
COMMENT ON COLUMN aibilling.price_quarantine.cache_write_1h IS 'As aibilling.price.cache_write_1h';
COMMENT ON COLUMN aibilling.price_quarantine.reasoning IS 'As aibilling.price.reasoning';
COMMENT ON COLUMN aibilling.price_quarantine.request IS 'As aibilling.price.request';
COMMENT ON COLUMN aibilling.price_quarantine.web_search IS 'As aibilling.price.web_search';
COMMENT ON COLUMN aibilling.price_quarantine.units IS 'As aibilling.price.units';
COMMENT ON COLUMN aibilling.price_quarantine.discount IS 'As aibilling.price.discount';
COMMENT ON COLUMN aibilling.price_quarantine.multiplier IS 'As aibilling.price.multiplier';

-- A row whose new cost cannot be told does not keep the others from theirs.

COMMENT ON FUNCTION aibilling.reprice(regclass, timestamptz, timestamptz, boolean) IS
'Computes the cost of the rows with from_time <= occurred_at < to_time again, by the prices of today. Returns a row per cost that differs, in USD x 10^9; rows delivered or in flight are only reported, the others change unless dry_run. A row whose cost is beyond cost_nanos or whose counts contradict each other is returned with the action kept, named in a warning, and stays as it is. Needs ownership of the table';

COMMENT ON COLUMN aibilling.status.last_error IS
'Error of the last delivery that had one; errors more than a thousand or two of deliveries ago are not shown';
