\echo Use "CREATE EXTENSION aibilling_polar" to load this file. \quit

-- The script runs with search_path = pg_catalog (control file): what is not
-- qualified is PostgreSQL's own.

CREATE SCHEMA aibilling;
COMMENT ON SCHEMA aibilling IS
'AI usage: priced exactly, delivered to Polar, reported in SQL (extension aibilling_polar)';

-- ---------------------------------------------------------------------------
-- Prices
-- ---------------------------------------------------------------------------

-- A numeric can be NaN, which is greater than any number: every CHECK on a
-- price has an upper bound.

CREATE TABLE aibilling.price (
	provider text COLLATE "C" NOT NULL,
	model text COLLATE "C" NOT NULL,
	service_tier text COLLATE "C" NOT NULL DEFAULT 'standard',
	context_above bigint NOT NULL DEFAULT 0,
	valid_from timestamptz NOT NULL DEFAULT '-infinity',
	source text COLLATE "C" NOT NULL DEFAULT 'user',
	daily_from time,
	daily_to time,
	input numeric(18,9),
	output numeric(18,9),
	cache_read numeric(18,9),
	cache_write numeric(18,9),
	cache_write_1h numeric(18,9),
	reasoning numeric(18,9),
	request numeric(18,9),
	web_search numeric(18,9),
	units jsonb,
	discount numeric(18,9),
	multiplier numeric(18,9),
	note text,
	CONSTRAINT price_key UNIQUE NULLS NOT DISTINCT
		(provider, model, service_tier, context_above, valid_from, source, daily_from, daily_to),
	CONSTRAINT price_service_tier_check
		CHECK (service_tier NOT IN ('', 'default', 'auto', 'on_demand')),
	CONSTRAINT price_context_above_check CHECK (context_above >= 0),
	CONSTRAINT price_window CHECK ((daily_from IS NULL) = (daily_to IS NULL) AND daily_from <> daily_to),
	CONSTRAINT price_input_check CHECK (input >= 0 AND input < 'NaN'),
	CONSTRAINT price_output_check CHECK (output >= 0 AND output < 'NaN'),
	CONSTRAINT price_cache_read_check CHECK (cache_read >= 0 AND cache_read < 'NaN'),
	CONSTRAINT price_cache_write_check CHECK (cache_write >= 0 AND cache_write < 'NaN'),
	CONSTRAINT price_cache_write_1h_check CHECK (cache_write_1h >= 0 AND cache_write_1h < 'NaN'),
	CONSTRAINT price_reasoning_check CHECK (reasoning >= 0 AND reasoning < 'NaN'),
	CONSTRAINT price_request_check CHECK (request >= 0 AND request < 'NaN'),
	CONSTRAINT price_web_search_check CHECK (web_search >= 0 AND web_search < 'NaN'),
	CONSTRAINT price_units_check CHECK (jsonb_typeof(units) = 'object' AND
		NOT jsonb_path_exists(units, 'strict $.* ? (@.type() != "number" || @ < 0 || @ >= 1000000000)')),
	CONSTRAINT price_discount_check CHECK (discount BETWEEN 0 AND 1),
	CONSTRAINT price_multiplier_check CHECK (multiplier >= 0 AND multiplier < 'NaN')
);
COMMENT ON TABLE aibilling.price IS
'What models cost, in USD. All rows of one (provider, model, service_tier, source, valid_from) are one card, replaced as a whole by a newer one. NULL is an unknown price, 0 is free';
COMMENT ON COLUMN aibilling.price.provider IS 'Provider, spelt as in usage rows';
COMMENT ON COLUMN aibilling.price.model IS 'Model, spelt as in usage rows; other spellings go into aibilling.model_alias';
COMMENT ON COLUMN aibilling.price.service_tier IS 'Tier that served: standard, batch, flex, priority ...';
COMMENT ON COLUMN aibilling.price.context_above IS
'The row applies to requests with more input_tokens than this; an inclusive threshold N is written N - 1. What it leaves NULL is as in the row with 0';
COMMENT ON COLUMN aibilling.price.valid_from IS 'The card applies to usage from this time on, until a newer card of its source does';
COMMENT ON COLUMN aibilling.price.source IS 'Who says so: user goes first, then imports by aibilling.price_source.priority';
COMMENT ON COLUMN aibilling.price.daily_from IS 'Start of a daily window, UTC, inclusive; NULL: all day. What a window leaves NULL is as all day';
COMMENT ON COLUMN aibilling.price.daily_to IS 'End of the daily window, UTC, exclusive; before daily_from: on the next day';
COMMENT ON COLUMN aibilling.price.input IS 'USD per 1,000,000 prompt tokens that no other price counts';
COMMENT ON COLUMN aibilling.price.output IS 'USD per 1,000,000 completion tokens that no other price counts';
COMMENT ON COLUMN aibilling.price.cache_read IS 'USD per 1,000,000 prompt tokens read from a cache';
COMMENT ON COLUMN aibilling.price.cache_write IS 'USD per 1,000,000 prompt tokens written to a cache (5 minutes, or the default time)';
COMMENT ON COLUMN aibilling.price.cache_write_1h IS 'USD per 1,000,000 prompt tokens written to a cache for 1 hour';
COMMENT ON COLUMN aibilling.price.reasoning IS 'USD per 1,000,000 reasoning tokens; NULL: as output';
COMMENT ON COLUMN aibilling.price.request IS 'USD a request; NULL: no fee';
COMMENT ON COLUMN aibilling.price.web_search IS 'USD a web search';
COMMENT ON COLUMN aibilling.price.units IS
'Prices of further quantities by name, as in {"image": 0.04}: USD each; USD per 1,000,000 for input_audio_tokens, input_image_tokens, cache_read_audio_tokens, output_audio_tokens, output_image_tokens, output_video_tokens and citation_tokens';
COMMENT ON COLUMN aibilling.price.discount IS 'Fraction taken off all prices of the card: 0.1 is 10 %';
COMMENT ON COLUMN aibilling.price.multiplier IS 'Factor on all prices of the card, as for a region or a margin';
COMMENT ON COLUMN aibilling.price.note IS 'Free text';

CREATE TABLE aibilling.price_source (
	source text COLLATE "C" PRIMARY KEY,
	priority integer NOT NULL DEFAULT 100,
	note text
);
COMMENT ON TABLE aibilling.price_source IS
'Which source of prices goes before which. Prices of source user go before all, sources without a row here behind all';
COMMENT ON COLUMN aibilling.price_source.source IS 'As in aibilling.price.source';
COMMENT ON COLUMN aibilling.price_source.priority IS 'Lower goes first';
COMMENT ON COLUMN aibilling.price_source.note IS 'Free text';

-- The shipped rules are not dumped, since CREATE EXTENSION brings them.  What
-- is "shipped" follows from the values, so that a rule someone changed is
-- dumped, and restores beside the shipped one without a collision.
CREATE TABLE aibilling.service_tier_rule (
	provider text COLLATE "C" NOT NULL DEFAULT '*',
	service_tier text COLLATE "C" NOT NULL,
	multiplier numeric(18,9),
	note text,
	shipped boolean NOT NULL GENERATED ALWAYS AS
		(provider = '*' AND service_tier IN ('batch', 'flex') AND coalesce(multiplier = 0.5, false)) STORED,
	PRIMARY KEY (provider, service_tier, shipped),
	CONSTRAINT service_tier_rule_service_tier_check
		CHECK (service_tier NOT IN ('', 'default', 'auto', 'on_demand', 'standard')),
	CONSTRAINT service_tier_rule_multiplier_check CHECK (multiplier >= 0 AND multiplier < 'NaN')
);
COMMENT ON TABLE aibilling.service_tier_rule IS
'What a service tier costs for which no price is in force: the standard price times a multiplier, for tokens only. A rule of the provider goes before one of *, your own before a shipped one';
COMMENT ON COLUMN aibilling.service_tier_rule.provider IS 'Provider, or * for any';
COMMENT ON COLUMN aibilling.service_tier_rule.service_tier IS 'Tier that served';
COMMENT ON COLUMN aibilling.service_tier_rule.multiplier IS
'Factor on the standard price of tokens; NULL: no rule, such usage is unpriced (deleting a shipped rule does not outlast dump and restore)';
COMMENT ON COLUMN aibilling.service_tier_rule.note IS 'Free text';
COMMENT ON COLUMN aibilling.service_tier_rule.shipped IS 'Is this a rule that comes with the extension?';

INSERT INTO aibilling.service_tier_rule (provider, service_tier, multiplier, note) VALUES
	('*', 'batch', 0.5, 'half price, as providers with a batch interface have it'),
	('*', 'flex', 0.5, 'half price, as providers with a flex tier have it');

CREATE TABLE aibilling.model_alias (
	provider text COLLATE "C" NOT NULL DEFAULT '*',
	kind text COLLATE "C" NOT NULL DEFAULT 'exact',
	pattern text COLLATE "C" NOT NULL,
	to_provider text COLLATE "C" NOT NULL,
	to_model text COLLATE "C" NOT NULL,
	priority integer NOT NULL DEFAULT 0,
	source text COLLATE "C" NOT NULL DEFAULT 'user',
	PRIMARY KEY (provider, kind, pattern, source),
	CONSTRAINT model_alias_kind_check CHECK (kind IN ('exact', 'glob'))
);
COMMENT ON TABLE aibilling.model_alias IS
'Other spellings of a model. Tried in this order, until one leads to a price: the model as spelt, exact aliases, the model without a leading "provider/", globs';
COMMENT ON COLUMN aibilling.model_alias.provider IS 'Provider in the usage row, or * for any';
COMMENT ON COLUMN aibilling.model_alias.kind IS 'exact, or glob: * stands for any characters, ? for one';
COMMENT ON COLUMN aibilling.model_alias.pattern IS 'Model in the usage row';
COMMENT ON COLUMN aibilling.model_alias.to_provider IS 'Provider in aibilling.price';
COMMENT ON COLUMN aibilling.model_alias.to_model IS 'Model in aibilling.price';
COMMENT ON COLUMN aibilling.model_alias.priority IS 'Higher goes first; among equals the glob with the longest literal part';
COMMENT ON COLUMN aibilling.model_alias.source IS 'Who says so, as in aibilling.price.source';

SELECT pg_catalog.pg_extension_config_dump('aibilling.price', '');
SELECT pg_catalog.pg_extension_config_dump('aibilling.price_source', '');
SELECT pg_catalog.pg_extension_config_dump('aibilling.service_tier_rule', 'WHERE NOT shipped');
SELECT pg_catalog.pg_extension_config_dump('aibilling.model_alias', '');

-- (price: cost functions go here)

-- Whoever has cached prices is told when they change.  Logical replication
-- fires no statement triggers, so rows that it brings have a trigger too.
CREATE FUNCTION aibilling.price_changed()
RETURNS trigger
AS 'MODULE_PATHNAME', 'abp_sql_price_changed'
LANGUAGE C VOLATILE CALLED ON NULL INPUT PARALLEL UNSAFE;
COMMENT ON FUNCTION aibilling.price_changed() IS
'Trigger: prices that sessions have cached are read again once this transaction commits';

CREATE TRIGGER price_changed
	AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON aibilling.price
	FOR EACH STATEMENT EXECUTE FUNCTION aibilling.price_changed();
ALTER TABLE aibilling.price ENABLE ALWAYS TRIGGER price_changed;
COMMENT ON TRIGGER price_changed ON aibilling.price IS 'Has cached prices read again';
CREATE TRIGGER price_replicated
	AFTER INSERT OR UPDATE OR DELETE ON aibilling.price
	FOR EACH ROW EXECUTE FUNCTION aibilling.price_changed();
ALTER TABLE aibilling.price ENABLE REPLICA TRIGGER price_replicated;
COMMENT ON TRIGGER price_replicated ON aibilling.price IS
'Has cached prices read again when logical replication brings a change';

CREATE TRIGGER price_changed
	AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON aibilling.price_source
	FOR EACH STATEMENT EXECUTE FUNCTION aibilling.price_changed();
ALTER TABLE aibilling.price_source ENABLE ALWAYS TRIGGER price_changed;
COMMENT ON TRIGGER price_changed ON aibilling.price_source IS 'Has cached prices read again';
CREATE TRIGGER price_replicated
	AFTER INSERT OR UPDATE OR DELETE ON aibilling.price_source
	FOR EACH ROW EXECUTE FUNCTION aibilling.price_changed();
ALTER TABLE aibilling.price_source ENABLE REPLICA TRIGGER price_replicated;
COMMENT ON TRIGGER price_replicated ON aibilling.price_source IS
'Has cached prices read again when logical replication brings a change';

CREATE TRIGGER price_changed
	AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON aibilling.service_tier_rule
	FOR EACH STATEMENT EXECUTE FUNCTION aibilling.price_changed();
ALTER TABLE aibilling.service_tier_rule ENABLE ALWAYS TRIGGER price_changed;
COMMENT ON TRIGGER price_changed ON aibilling.service_tier_rule IS 'Has cached prices read again';
CREATE TRIGGER price_replicated
	AFTER INSERT OR UPDATE OR DELETE ON aibilling.service_tier_rule
	FOR EACH ROW EXECUTE FUNCTION aibilling.price_changed();
ALTER TABLE aibilling.service_tier_rule ENABLE REPLICA TRIGGER price_replicated;
COMMENT ON TRIGGER price_replicated ON aibilling.service_tier_rule IS
'Has cached prices read again when logical replication brings a change';

CREATE TRIGGER price_changed
	AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON aibilling.model_alias
	FOR EACH STATEMENT EXECUTE FUNCTION aibilling.price_changed();
ALTER TABLE aibilling.model_alias ENABLE ALWAYS TRIGGER price_changed;
COMMENT ON TRIGGER price_changed ON aibilling.model_alias IS 'Has cached prices read again';
CREATE TRIGGER price_replicated
	AFTER INSERT OR UPDATE OR DELETE ON aibilling.model_alias
	FOR EACH ROW EXECUTE FUNCTION aibilling.price_changed();
ALTER TABLE aibilling.model_alias ENABLE REPLICA TRIGGER price_replicated;
COMMENT ON TRIGGER price_replicated ON aibilling.model_alias IS
'Has cached prices read again when logical replication brings a change';

-- The cost family.  NULL is "not reported" and has a meaning, so none is
-- STRICT.

CREATE FUNCTION aibilling.cost_nanos(
	provider text,
	model text,
	input_tokens bigint DEFAULT 0,
	output_tokens bigint DEFAULT 0,
	cache_read_tokens bigint DEFAULT 0,
	cache_write_tokens bigint DEFAULT 0,
	cache_write_1h_tokens bigint DEFAULT 0,
	reasoning_tokens bigint DEFAULT 0,
	request_count bigint DEFAULT 1,
	web_search_count bigint DEFAULT 0,
	units jsonb DEFAULT NULL,
	service_tier text DEFAULT 'standard',
	at timestamptz DEFAULT now())
RETURNS bigint
AS 'MODULE_PATHNAME', 'abp_sql_cost_nanos'
LANGUAGE C STABLE CALLED ON NULL INPUT PARALLEL SAFE;
COMMENT ON FUNCTION aibilling.cost_nanos(text, text, bigint, bigint, bigint, bigint, bigint, bigint, bigint, bigint, jsonb, text, timestamptz) IS
'Cost of an AI call by the price table in USD x 10^9, rounded once, half away from zero; NULL if unknown';

CREATE FUNCTION aibilling.cost_cents(
	provider text,
	model text,
	input_tokens bigint DEFAULT 0,
	output_tokens bigint DEFAULT 0,
	cache_read_tokens bigint DEFAULT 0,
	cache_write_tokens bigint DEFAULT 0,
	cache_write_1h_tokens bigint DEFAULT 0,
	reasoning_tokens bigint DEFAULT 0,
	request_count bigint DEFAULT 1,
	web_search_count bigint DEFAULT 0,
	units jsonb DEFAULT NULL,
	service_tier text DEFAULT 'standard',
	at timestamptz DEFAULT now())
RETURNS numeric
AS 'MODULE_PATHNAME', 'abp_sql_cost_cents'
LANGUAGE C STABLE CALLED ON NULL INPUT PARALLEL SAFE;
COMMENT ON FUNCTION aibilling.cost_cents(text, text, bigint, bigint, bigint, bigint, bigint, bigint, bigint, bigint, jsonb, text, timestamptz) IS
'Exact cost of an AI call by the price table in cents, rounded once to 12 decimals; NULL if unknown';

CREATE FUNCTION aibilling.polar_cost(
	provider text,
	model text,
	input_tokens bigint DEFAULT 0,
	output_tokens bigint DEFAULT 0,
	cache_read_tokens bigint DEFAULT 0,
	cache_write_tokens bigint DEFAULT 0,
	cache_write_1h_tokens bigint DEFAULT 0,
	reasoning_tokens bigint DEFAULT 0,
	request_count bigint DEFAULT 1,
	web_search_count bigint DEFAULT 0,
	units jsonb DEFAULT NULL,
	service_tier text DEFAULT 'standard',
	at timestamptz DEFAULT now())
RETURNS jsonb
AS 'MODULE_PATHNAME', 'abp_sql_polar_cost'
LANGUAGE C STABLE CALLED ON NULL INPUT PARALLEL SAFE;
COMMENT ON FUNCTION aibilling.polar_cost(text, text, bigint, bigint, bigint, bigint, bigint, bigint, bigint, bigint, jsonb, text, timestamptz) IS
'Cost of an AI call by the price table as the _cost of Polar''s events; NULL if unknown';

CREATE FUNCTION aibilling.cost(
	provider text,
	model text,
	input_tokens bigint DEFAULT 0,
	output_tokens bigint DEFAULT 0,
	cache_read_tokens bigint DEFAULT 0,
	cache_write_tokens bigint DEFAULT 0,
	cache_write_1h_tokens bigint DEFAULT 0,
	reasoning_tokens bigint DEFAULT 0,
	request_count bigint DEFAULT 1,
	web_search_count bigint DEFAULT 0,
	units jsonb DEFAULT NULL,
	service_tier text DEFAULT 'standard',
	at timestamptz DEFAULT now(),
	OUT cost_usd numeric,
	OUT cost_nanos bigint,
	OUT cost_cents numeric,
	OUT status text)
RETURNS record
AS 'MODULE_PATHNAME', 'abp_sql_cost'
LANGUAGE C STABLE CALLED ON NULL INPUT PARALLEL SAFE;
COMMENT ON FUNCTION aibilling.cost(text, text, bigint, bigint, bigint, bigint, bigint, bigint, bigint, bigint, jsonb, text, timestamptz) IS
'Cost of an AI call by the price table: exact in USD, in nanos, in cents, and its status (priced, free, unpriced, incomplete). What a provider reported is no argument: subtract cost_usd from provider_cost to compare';

CREATE FUNCTION aibilling.explain_cost(
	provider text,
	model text,
	input_tokens bigint DEFAULT 0,
	output_tokens bigint DEFAULT 0,
	cache_read_tokens bigint DEFAULT 0,
	cache_write_tokens bigint DEFAULT 0,
	cache_write_1h_tokens bigint DEFAULT 0,
	reasoning_tokens bigint DEFAULT 0,
	request_count bigint DEFAULT 1,
	web_search_count bigint DEFAULT 0,
	units jsonb DEFAULT NULL,
	service_tier text DEFAULT 'standard',
	at timestamptz DEFAULT now())
RETURNS TABLE (
	bucket text,
	quantity numeric,
	price numeric,
	per bigint,
	factor numeric,
	amount_usd numeric,
	card_provider text,
	card_model text,
	card_service_tier text,
	context_above bigint,
	source text,
	valid_from timestamptz,
	daily_from time,
	daily_to time,
	note text)
AS 'MODULE_PATHNAME', 'abp_sql_explain_cost'
LANGUAGE C STABLE CALLED ON NULL INPUT PARALLEL SAFE;
COMMENT ON FUNCTION aibilling.explain_cost(text, text, bigint, bigint, bigint, bigint, bigint, bigint, bigint, bigint, jsonb, text, timestamptz) IS
'How the cost of an AI call comes about: one row a bucket, quantity x price / per x factor = amount_usd, exact, adding up to the cost; and the card that the prices are from';

CREATE FUNCTION aibilling.explain_cost(usage regclass, id bigint)
RETURNS TABLE (
	bucket text,
	quantity numeric,
	price numeric,
	per bigint,
	factor numeric,
	amount_usd numeric,
	card_provider text,
	card_model text,
	card_service_tier text,
	context_above bigint,
	source text,
	valid_from timestamptz,
	daily_from time,
	daily_to time,
	note text)
AS 'MODULE_PATHNAME', 'abp_sql_explain_usage_cost'
LANGUAGE C STABLE STRICT PARALLEL RESTRICTED;
COMMENT ON FUNCTION aibilling.explain_cost(regclass, bigint) IS
'How the cost of a stored usage row comes about by the prices of now, read with the rights of the caller';

CREATE FUNCTION aibilling.convert_cost(amount numeric, from_unit text, to_unit text)
RETURNS numeric
AS 'MODULE_PATHNAME', 'abp_sql_convert_cost'
LANGUAGE C IMMUTABLE STRICT PARALLEL SAFE;
COMMENT ON FUNCTION aibilling.convert_cost(numeric, text, text) IS
'An amount of USD from one unit to another (base, cents, micros, nanos), exact, never rounded';

-- (price: end)

-- ---------------------------------------------------------------------------
-- Usage objects of providers
-- ---------------------------------------------------------------------------

-- (normalize: functions go here)

CREATE FUNCTION aibilling.normalize_usage(
	format text,
	raw jsonb,
	OUT input_tokens bigint,
	OUT cache_read_tokens bigint,
	OUT cache_write_tokens bigint,
	OUT cache_write_1h_tokens bigint,
	OUT output_tokens bigint,
	OUT reasoning_tokens bigint,
	OUT request_count bigint,
	OUT web_search_count bigint,
	OUT units jsonb,
	OUT provider_cost numeric,
	OUT service_tier text,
	OUT model text,
	OUT generation_id text)
RETURNS record
AS 'MODULE_PATHNAME', 'abp_sql_normalize_usage'
LANGUAGE C IMMUTABLE STRICT PARALLEL SAFE;
COMMENT ON FUNCTION aibilling.normalize_usage(text, jsonb) IS
'a provider''s usage object, or a whole response, as the columns of a usage table';

-- (normalize: end)

-- ---------------------------------------------------------------------------
-- Price catalogues
-- ---------------------------------------------------------------------------

-- (catalogue: tables and functions)

CREATE TYPE aibilling.catalogue_price AS (
	provider text,
	model text,
	service_tier text,
	context_above bigint,
	valid_from timestamptz,
	daily_from time,
	daily_to time,
	price_column text,
	price numeric,
	problem text
);
COMMENT ON TYPE aibilling.catalogue_price IS
'one price of a catalogue, in the units of aibilling.price; price_column is a column of that table or units.KEY; valid_from NULL means that the catalogue gives no date; price NULL means that it cannot be used, for the reason in problem; problem beside a price is a remark';

CREATE TYPE aibilling.price_change AS (
	action text,
	provider text,
	model text,
	service_tier text,
	context_above bigint,
	valid_from timestamptz,
	daily_from time,
	daily_to time,
	price_column text,
	old_price numeric,
	new_price numeric,
	reason text
);
COMMENT ON TYPE aibilling.price_change IS
'what import_prices does with one price: added, changed, removed (the new card has no such price any more), quarantined (reason says why the whole card was held back) or skipped (reason says why the price cannot be used)';

CREATE TYPE aibilling.price_card AS (
	provider text,
	model text,
	service_tier text,
	given_from timestamptz,
	stored_from timestamptz,
	valid_from timestamptz,
	reason text
);
COMMENT ON TYPE aibilling.price_card IS
'a card of a catalogue that differs from what is stored: the catalogue''s own date (NULL: none), the stored card it is compared with (NULL: none), the date it is stored under, and why it is quarantined (NULL: it is not)';

CREATE TABLE aibilling.price_quarantine (
	provider text COLLATE "C" NOT NULL,
	model text COLLATE "C" NOT NULL,
	service_tier text COLLATE "C" NOT NULL,
	context_above bigint NOT NULL,
	valid_from timestamptz NOT NULL,
	source text COLLATE "C" NOT NULL,
	daily_from time,
	daily_to time,
	input numeric,
	output numeric,
	cache_read numeric,
	cache_write numeric,
	cache_write_1h numeric,
	reasoning numeric,
	request numeric,
	web_search numeric,
	units jsonb,
	discount numeric,
	multiplier numeric,
	reason text NOT NULL,
	quarantined_at timestamptz NOT NULL DEFAULT now(),
	CONSTRAINT price_quarantine_key UNIQUE NULLS NOT DISTINCT
		(provider, model, service_tier, context_above, valid_from, source, daily_from, daily_to)
);
COMMENT ON TABLE aibilling.price_quarantine IS
'cards that import_prices found suspicious and did not apply; release_price applies one, DELETE forgets it';
SELECT pg_extension_config_dump('aibilling.price_quarantine', '');
COMMENT ON COLUMN aibilling.price_quarantine.reason IS 'which of the checks the card failed, with the figures';
COMMENT ON COLUMN aibilling.price_quarantine.quarantined_at IS 'when it was found';

-- jsonb keeps a number as the decimal text it was, so nothing here ever passes
-- through a float.
CREATE FUNCTION aibilling.catalogue_number(value jsonb) RETURNS numeric
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
RETURN CASE jsonb_typeof(value)
	WHEN 'number' THEN (value #>> '{}')::numeric
	WHEN 'string' THEN CASE
		WHEN (value #>> '{}') ~ '^-?[0-9]{1,30}(\.[0-9]{1,60})?([eE][-+]?[0-9]{1,2})?$'
			THEN (value #>> '{}')::numeric
		END
	END;
COMMENT ON FUNCTION aibilling.catalogue_number(jsonb) IS
'a JSON number, or a decimal number in a JSON string, exactly; NULL for anything else';

-- A catalogue written by a program that computes in doubles has noise from the
-- 16th significant digit on; no price needs 12.
CREATE FUNCTION aibilling.clean_price(price numeric) RETURNS numeric
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
RETURN CASE
	WHEN min_scale(price) <= 9 THEN trim_scale(price)
	ELSE trim_scale(round(price, 11 - floor(log(abs(price)))::integer))
	END;
COMMENT ON FUNCTION aibilling.clean_price(numeric) IS
'a price without float noise: unchanged up to 9 decimals, else rounded to 12 significant digits';

CREATE FUNCTION aibilling.stored_prices(source text) RETURNS SETOF aibilling.catalogue_price
LANGUAGE sql STABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
	SELECT p.provider, p.model, p.service_tier, p.context_above, p.valid_from,
		p.daily_from, p.daily_to, c.price_column, trim_scale(c.price), NULL
	FROM aibilling.price p
	CROSS JOIN LATERAL (
		VALUES ('input', p.input), ('output', p.output), ('cache_read', p.cache_read),
			('cache_write', p.cache_write), ('cache_write_1h', p.cache_write_1h),
			('reasoning', p.reasoning), ('request', p.request), ('web_search', p.web_search),
			('discount', p.discount), ('multiplier', p.multiplier)
		UNION ALL
		SELECT 'units.' || u.key, aibilling.catalogue_number(u.value)
		FROM jsonb_each(p.units) u
	) AS c (price_column, price)
	WHERE p.source = stored_prices.source AND c.price IS NOT NULL
$$;
COMMENT ON FUNCTION aibilling.stored_prices(text) IS
'the prices stored for a source, one a row';

CREATE FUNCTION aibilling.read_litellm(catalogue jsonb) RETURNS SETOF aibilling.catalogue_price
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
	), model AS (
		SELECT DISTINCT ON (provider, model) *
		FROM (
			SELECT *, CASE WHEN starts_with(name, provider || '/')
				THEN substr(name, length(provider) + 2) ELSE name END AS model
			FROM entry
		) AS e
		ORDER BY provider, model, length(name)
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
				WHEN d.price_column = 'units.image' AND p.number > 0 AND p.number < 0.0001
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
$$;
COMMENT ON FUNCTION aibilling.read_litellm(jsonb) IS
'the prices in LiteLLM''s model_prices_and_context_window.json (USD per unit, batches, flex, priority, context tiers)';

CREATE FUNCTION aibilling.read_models_dev(catalogue jsonb) RETURNS SETOF aibilling.catalogue_price
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
	WITH model AS (
		SELECT p.key AS provider, m.key AS model, m.value AS spec
		FROM jsonb_each(catalogue) p
		CROSS JOIN LATERAL jsonb_each(
			CASE jsonb_typeof(p.value -> 'models') WHEN 'object' THEN p.value -> 'models' END) m
		WHERE jsonb_typeof(m.value) = 'object'
	), cost AS (
		SELECT provider, model, 'standard' AS service_tier, 0::bigint AS context_above, spec -> 'cost' AS cost
		FROM model
		UNION ALL
		-- context_over_200k is filled from any tier above 200k: tiers is the truth
		SELECT m.provider, m.model, 'standard',
			trunc(aibilling.catalogue_number(t.value -> 'tier' -> 'size'))::bigint, t.value
		FROM model m
		CROSS JOIN LATERAL jsonb_array_elements(
			CASE jsonb_typeof(m.spec #> '{cost,tiers}') WHEN 'array' THEN m.spec #> '{cost,tiers}' END) t
		UNION ALL
		SELECT m.provider, m.model,
			coalesce(e.value #>> '{provider,body,service_tier}', e.key), 0, e.value -> 'cost'
		FROM model m
		CROSS JOIN LATERAL jsonb_each(
			CASE jsonb_typeof(m.spec #> '{experimental,modes}') WHEN 'object' THEN m.spec #> '{experimental,modes}' END) e
		WHERE coalesce(e.value #>> '{provider,body,service_tier}', e.key)
			NOT IN ('', 'standard', 'default', 'auto', 'on_demand')
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
'the prices in the api.json of models.dev (USD per million tokens, context tiers, modes as service tiers)';

CREATE FUNCTION aibilling.read_genai_prices(catalogue jsonb) RETURNS SETOF aibilling.catalogue_price
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
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
			('rerank_searches_kcount', 'units.query', 1000)
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
	)
	SELECT provider, model, 'standard', context_above, start_date::timestamp AT TIME ZONE 'UTC',
		daily_from, daily_to, coalesce(price_column, key),
		CASE WHEN problem IS NULL THEN number / per END, problem
	FROM step
	CROSS JOIN LATERAL (SELECT CASE
		WHEN price_column IS NULL THEN 'not a price that aibilling.price can hold'
		WHEN needs_window AND daily_from <> daily_to IS NOT TRUE THEN 'unknown constraint ' || condition::text
		WHEN context_above IS NULL THEN 'tier without a start'
		WHEN number IS NULL THEN 'not a number'
		END AS problem) AS p
$$;
COMMENT ON FUNCTION aibilling.read_genai_prices(jsonb) IS
'the prices in the data.json of pydantic''s genai-prices (USD per million tokens, thousand requests, hour; dates, daily windows, context tiers)';

-- OpenRouter and Narev name the prices of a model alike, in USD per unit.
CREATE FUNCTION aibilling.read_router_prices(pricing jsonb, zero_is_unset boolean)
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
		CASE WHEN v.number >= 0 THEN v.number * CASE
			WHEN k.key IN ('image', 'image_output') AND v.number >= 0.0001 THEN 1
			ELSE d.per END END,
		CASE
			WHEN d.price_column IS NULL THEN 'not a price that aibilling.price can hold'
			WHEN v.number IS NULL THEN 'not a number'
			WHEN v.number = -1 THEN 'the catalogue says that the price varies'
			WHEN v.number < 0 THEN 'negative'
		END
	FROM jsonb_each(pricing) k
	CROSS JOIN LATERAL aibilling.catalogue_number(k.value) AS v (number)
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
	WHERE k.key NOT IN ('overrides', 'min_prompt_tokens')
		AND jsonb_typeof(k.value) <> 'null'
		AND NOT (v.number = 0 AND k.key = 'discount')
		AND NOT (v.number = 0 AND zero_is_unset AND k.key NOT IN ('prompt', 'completion'))
$$;
COMMENT ON FUNCTION aibilling.read_router_prices(jsonb, boolean) IS
'the prices in one pricing object of OpenRouter or Narev; zero_is_unset: 0 means that the price is not known, except of prompt and completion';

CREATE FUNCTION aibilling.read_openrouter(catalogue jsonb) RETURNS SETOF aibilling.catalogue_price
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
	WITH pricing AS (
		SELECT m.value ->> 'id' AS model, 0::bigint AS context_above, m.value -> 'pricing' AS pricing
		FROM jsonb_array_elements(catalogue -> 'data') m
		UNION ALL
		-- a step applies from min_prompt_tokens on, ours above context_above
		SELECT m.value ->> 'id', trunc(aibilling.catalogue_number(o.value -> 'min_prompt_tokens'))::bigint - 1, o.value
		FROM jsonb_array_elements(catalogue -> 'data') m
		CROSS JOIN LATERAL jsonb_array_elements(
			CASE jsonb_typeof(m.value #> '{pricing,overrides}') WHEN 'array' THEN m.value #> '{pricing,overrides}' END) o
	)
	SELECT 'openrouter', p.model, 'standard', nullif(p.context_above, -1), NULL::timestamptz, NULL::time, NULL::time,
		r.price_column,
		CASE WHEN p.context_above >= 0 THEN r.price END,
		CASE WHEN p.context_above >= 0 THEN r.problem ELSE 'override without min_prompt_tokens' END
	FROM (SELECT model, pricing, coalesce(context_above, -1) AS context_above FROM pricing) AS p
	CROSS JOIN LATERAL aibilling.read_router_prices(
		CASE jsonb_typeof(p.pricing) WHEN 'object' THEN p.pricing END, false) r
$$;
COMMENT ON FUNCTION aibilling.read_openrouter(jsonb) IS
'the prices in the answer of OpenRouter''s /api/v1/models; the provider is openrouter, since a router''s price is not the provider''s';

CREATE FUNCTION aibilling.read_narev(catalogue jsonb) RETURNS SETOF aibilling.catalogue_price
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
	SELECT m.value ->> 'provider_id', m.value ->> 'model_id', 'standard', 0::bigint,
		NULL::timestamptz, NULL::time, NULL::time, r.price_column, r.price, r.problem
	FROM jsonb_array_elements(catalogue -> 'data') m
	CROSS JOIN LATERAL aibilling.read_router_prices(
		CASE jsonb_typeof(m.value -> 'pricing') WHEN 'object' THEN m.value -> 'pricing' END, true) r
$$;
COMMENT ON FUNCTION aibilling.read_narev(jsonb) IS
'the prices in the answer of Narev''s /v1/prices; 0 in an optional field means that it is not set';

CREATE FUNCTION aibilling.clean_prices(prices aibilling.catalogue_price[]) RETURNS SETOF aibilling.catalogue_price
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
	WITH cleaned AS (
		-- units are jsonb and hold any number of decimals, the columns 9
		SELECT p.*, c.clean, CASE WHEN p.price_column LIKE 'units.%' THEN c.clean ELSE round(c.clean, 9) END AS stored
		FROM unnest(prices) AS p
		CROSS JOIN LATERAL aibilling.clean_price(p.price) AS c (clean)
	), priced AS MATERIALIZED (
		SELECT DISTINCT ON (provider, model, service_tier, context_above, valid_from, daily_from, daily_to, price_column) *
		FROM cleaned
		WHERE price IS NOT NULL AND provider <> '' AND model <> ''
			AND abs(stored - clean) <= abs(clean) / 1000000
		ORDER BY provider, model, service_tier, context_above, valid_from, daily_from, daily_to, price_column
	)
	SELECT provider, model, service_tier, context_above, valid_from, daily_from, daily_to, price_column,
		trim_scale(stored),
		CASE WHEN abs(stored - price) > abs(price) / 1000000000 THEN 'rounded from ' || trim_scale(price) END
	FROM priced
	UNION ALL
	SELECT provider, model, service_tier, context_above, valid_from, daily_from, daily_to, price_column,
		NULL, coalesce(problem, CASE
			WHEN provider <> '' AND model <> '' THEN 'needs more than 9 decimals: ' || trim_scale(price)
			ELSE 'model without a name' END)
	FROM cleaned
	WHERE price IS NULL OR coalesce(provider, '') = '' OR coalesce(model, '') = ''
		OR abs(stored - clean) > abs(clean) / 1000000
	UNION ALL
	-- A service tier changes what tokens cost.  What is charged by the piece
	-- costs the same in each, unless the catalogue says otherwise.
	SELECT t.provider, t.model, t.service_tier, 0, t.valid_from, NULL, NULL, s.price_column, trim_scale(s.stored), NULL
	FROM (SELECT DISTINCT provider, model, service_tier, valid_from FROM priced WHERE service_tier <> 'standard') AS t
	JOIN priced s ON (s.provider, s.model, s.service_tier, s.context_above) = (t.provider, t.model, 'standard', 0)
		AND s.valid_from IS NOT DISTINCT FROM t.valid_from
		AND s.daily_from IS NULL
		AND (s.price_column IN ('request', 'web_search', 'discount')
			OR s.price_column LIKE 'units.%' AND s.price_column NOT LIKE '%\_tokens')
	WHERE NOT EXISTS (
		SELECT FROM priced p
		WHERE (p.provider, p.model, p.service_tier, p.context_above, p.price_column)
				= (t.provider, t.model, t.service_tier, 0, s.price_column)
			AND p.valid_from IS NOT DISTINCT FROM t.valid_from
	)
$$;
COMMENT ON FUNCTION aibilling.clean_prices(aibilling.catalogue_price[]) IS
'the prices of a catalogue without float noise and doubles, as far as aibilling.price can hold them';

-- The cards among prices that differ from what is stored for the source, with
-- the date each is to be stored under and what is suspicious about it.
--
-- A card with a date of its own replaces the card stored under that date.  A
-- card without one is compared with the card in force: where it differs it is
-- a new card from now on, so that old usage keeps its price, unless the
-- catalogue itself dates what came after it: then it corrects history.
CREATE FUNCTION aibilling.changed_cards(prices aibilling.catalogue_price[], source text)
RETURNS SETOF aibilling.price_card
LANGUAGE sql STABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
	WITH given AS MATERIALIZED (
		SELECT p.*, concat_ws('|', p.context_above, p.daily_from, p.daily_to, p.price_column) AS slot
		FROM unnest(prices) AS p
		WHERE p.price IS NOT NULL
	), stored AS MATERIALIZED (
		SELECT p.*, concat_ws('|', p.context_above, p.daily_from, p.daily_to, p.price_column) AS slot
		FROM aibilling.stored_prices(source) AS p
	), stored_card AS MATERIALIZED (
		SELECT provider, model, service_tier, valid_from, jsonb_object_agg(slot, price) AS content
		FROM stored
		GROUP BY provider, model, service_tier, valid_from
	), given_card AS (
		SELECT provider, model, service_tier, valid_from,
			min(valid_from) OVER (PARTITION BY provider, model, service_tier) AS first_date,
			jsonb_object_agg(slot, price) AS content
		FROM given
		GROUP BY provider, model, service_tier, valid_from
	), compared AS (
		SELECT DISTINCT ON (g.provider, g.model, g.service_tier, g.valid_from)
			g.*, s.valid_from AS stored_from, s.content AS stored_content
		FROM given_card g
		LEFT JOIN stored_card s ON (s.provider, s.model, s.service_tier) = (g.provider, g.model, g.service_tier)
			AND CASE
				WHEN g.valid_from IS NOT NULL THEN s.valid_from <= g.valid_from
				ELSE s.valid_from <= now() AND (g.first_date IS NULL OR s.valid_from < g.first_date)
			END
		ORDER BY g.provider, g.model, g.service_tier, g.valid_from, s.valid_from DESC NULLS LAST
	), differing AS MATERIALIZED (
		SELECT c.provider, c.model, c.service_tier, c.valid_from AS given_from, c.stored_from,
			CASE
				WHEN c.valid_from IS NOT NULL THEN c.valid_from
				WHEN c.stored_from IS NULL THEN '-infinity'
				WHEN c.first_date <= now() THEN c.stored_from
				ELSE now()
			END AS valid_from
		FROM compared c
		WHERE c.stored_content IS DISTINCT FROM c.content
			OR c.valid_from IS NOT NULL AND c.stored_from <> c.valid_from
	), row_price AS (
		SELECT d.provider, d.model, d.service_tier, d.given_from, g.context_above, g.daily_from, g.daily_to,
			max(g.price) FILTER (WHERE g.price_column = 'input') AS input,
			max(g.price) FILTER (WHERE g.price_column = 'output') AS output,
			max(g.price) FILTER (WHERE g.price_column = 'cache_read') AS cache_read,
			max(g.price) FILTER (WHERE g.price_column = 'cache_write_1h') AS cache_write_1h
		FROM differing d
		JOIN given g ON (g.provider, g.model, g.service_tier) = (d.provider, d.model, d.service_tier)
			AND g.valid_from IS NOT DISTINCT FROM d.given_from
		GROUP BY 1, 2, 3, 4, 5, 6, 7
	), standard AS (
		SELECT provider, model, valid_from, context_above, daily_from, daily_to, price_column, price
		FROM given
		WHERE service_tier = 'standard' AND price_column IN ('input', 'output')
	), finding AS (
		SELECT r.provider, r.model, r.service_tier, r.given_from, f.finding
		FROM row_price r
		CROSS JOIN LATERAL (VALUES
			(CASE WHEN r.cache_read > r.input
				THEN format('cache_read %s above input %s', r.cache_read, r.input) END),
			(CASE WHEN r.cache_write_1h NOT BETWEEN 1.5 * r.input AND 2.5 * r.input
				THEN format('cache_write_1h %s not 1.5 to 2.5 times input %s', r.cache_write_1h, r.input) END)
		) AS f (finding)
		UNION ALL
		SELECT g.provider, g.model, g.service_tier, g.valid_from, f.finding
		FROM given g
		LEFT JOIN standard s ON (s.provider, s.model, s.context_above, s.price_column)
				= (g.provider, g.model, g.context_above, g.price_column)
			AND g.service_tier <> 'standard'
			AND s.valid_from IS NOT DISTINCT FROM g.valid_from
			AND s.daily_from IS NOT DISTINCT FROM g.daily_from
		CROSS JOIN LATERAL (VALUES
			(CASE WHEN g.price < 0 THEN format('%s %s is negative', g.price_column, g.price) END),
			(CASE WHEN g.price > 1000 AND g.price_column IN ('input', 'output')
				THEN format('%s %s above 1000', g.price_column, g.price) END),
			(CASE WHEN g.price > 1000000 THEN format('%s %s above 1000000', g.price_column, g.price) END),
			(CASE WHEN g.price_column = 'discount' AND g.price > 1
				THEN format('discount %s above 1', g.price) END),
			(CASE WHEN g.service_tier = 'priority' AND g.price > 5 * s.price
				THEN format('%s %s above 5 times standard %s', g.price_column, g.price, s.price) END),
			(CASE WHEN g.service_tier IN ('batch', 'flex') AND g.price > s.price
				THEN format('%s %s above standard %s', g.price_column, g.price, s.price) END)
		) AS f (finding)
		UNION ALL
		SELECT d.provider, d.model, d.service_tier, d.given_from,
			format('%s from %s to %s, more than 3 times', g.price_column, s.price, g.price)
		FROM differing d
		JOIN given g ON (g.provider, g.model, g.service_tier) = (d.provider, d.model, d.service_tier)
			AND g.valid_from IS NOT DISTINCT FROM d.given_from
		JOIN stored s ON (s.provider, s.model, s.service_tier, s.valid_from, s.slot)
			= (d.provider, d.model, d.service_tier, d.stored_from, g.slot)
		WHERE g.price > 3 * s.price OR 3 * g.price < s.price
	)
	SELECT d.provider, d.model, d.service_tier, d.given_from, d.stored_from, d.valid_from,
		string_agg(DISTINCT f.finding, '; ')
	FROM differing d
	LEFT JOIN finding f ON (f.provider, f.model, f.service_tier) = (d.provider, d.model, d.service_tier)
		AND f.given_from IS NOT DISTINCT FROM d.given_from
	GROUP BY 1, 2, 3, 4, 5, 6
$$;
COMMENT ON FUNCTION aibilling.changed_cards(aibilling.catalogue_price[], text) IS
'which cards among the prices differ from those stored for the source, the date each is to be stored under, and why it is suspicious';

CREATE FUNCTION aibilling.price_rows(prices aibilling.catalogue_price[], cards aibilling.price_card[])
RETURNS TABLE (provider text, model text, service_tier text, context_above bigint, valid_from timestamptz,
	daily_from time, daily_to time, input numeric, output numeric, cache_read numeric, cache_write numeric,
	cache_write_1h numeric, reasoning numeric, request numeric, web_search numeric, units jsonb, discount numeric,
	multiplier numeric, reason text)
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
	SELECT c.provider, c.model, c.service_tier, p.context_above, c.valid_from, p.daily_from, p.daily_to,
		max(p.price) FILTER (WHERE p.price_column = 'input'),
		max(p.price) FILTER (WHERE p.price_column = 'output'),
		max(p.price) FILTER (WHERE p.price_column = 'cache_read'),
		max(p.price) FILTER (WHERE p.price_column = 'cache_write'),
		max(p.price) FILTER (WHERE p.price_column = 'cache_write_1h'),
		max(p.price) FILTER (WHERE p.price_column = 'reasoning'),
		max(p.price) FILTER (WHERE p.price_column = 'request'),
		max(p.price) FILTER (WHERE p.price_column = 'web_search'),
		jsonb_object_agg(substr(p.price_column, 7), p.price) FILTER (WHERE p.price_column LIKE 'units.%'),
		max(p.price) FILTER (WHERE p.price_column = 'discount'),
		max(p.price) FILTER (WHERE p.price_column = 'multiplier'),
		c.reason
	FROM unnest(cards) AS c
	JOIN unnest(prices) AS p ON (p.provider, p.model, p.service_tier) = (c.provider, c.model, c.service_tier)
		AND p.valid_from IS NOT DISTINCT FROM c.given_from
	WHERE p.price IS NOT NULL
	GROUP BY c.provider, c.model, c.service_tier, p.context_above, c.valid_from, p.daily_from, p.daily_to, c.reason
$$;
COMMENT ON FUNCTION aibilling.price_rows(aibilling.catalogue_price[], aibilling.price_card[]) IS
'the prices of the cards as rows of aibilling.price';

-- The rows are added at the first import and not by this script, since
-- pg_dump dumps the table as a whole.
CREATE FUNCTION aibilling.register_price_source(source text) RETURNS void
LANGUAGE plpgsql VOLATILE STRICT PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
	IF EXISTS (SELECT FROM aibilling.price_source s WHERE s.source = register_price_source.source) THEN
		RETURN;
	END IF;
	-- What somebody imported is newer than what came with the software.
	INSERT INTO aibilling.price_source (source, priority, note)
		SELECT * FROM (VALUES
			('genai-prices', 50, 'import_prices: genai-prices of Pydantic'),
			('narev', 60, 'import_prices: Narev'),
			('litellm', 70, 'import_prices: LiteLLM'),
			('models.dev', 80, 'import_prices: models.dev'),
			('openrouter', 90, 'import_prices: OpenRouter, for provider openrouter'),
			('bundled', 200, 'load_bundled_prices: what came with aibilling_polar')
		) AS v (source, priority, note)
		WHERE v.source = register_price_source.source
	ON CONFLICT DO NOTHING;
END
$$;
COMMENT ON FUNCTION aibilling.register_price_source(text) IS
'gives a source that imports know its row in aibilling.price_source, unless it has one';

CREATE FUNCTION aibilling.import_prices(catalogue jsonb, format text, dry_run boolean DEFAULT true)
RETURNS SETOF aibilling.price_change
LANGUAGE plpgsql VOLATILE STRICT PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
	prices aibilling.catalogue_price[];
	cards aibilling.price_card[];
	shape text := CASE WHEN format = 'genai-prices' THEN 'array' ELSE 'object' END;
BEGIN
	IF format NOT IN ('litellm', 'models.dev', 'genai-prices', 'openrouter', 'narev') THEN
		RAISE EXCEPTION 'price catalogue format "%" is unknown', format
			USING ERRCODE = 'invalid_parameter_value',
				HINT = 'Known formats are litellm, models.dev, genai-prices, openrouter and narev.';
	END IF;
	IF jsonb_typeof(catalogue) <> shape
		OR format IN ('openrouter', 'narev') AND jsonb_typeof(catalogue -> 'data') IS DISTINCT FROM 'array' THEN
		RAISE EXCEPTION 'catalogue is not in the format %', format
			USING ERRCODE = 'invalid_parameter_value',
				DETAIL = CASE WHEN format IN ('openrouter', 'narev')
					THEN 'A JSON object with an array "data" was expected.'
					ELSE format('A JSON %s was expected.', shape) END;
	END IF;

	IF NOT dry_run THEN
		-- Two imports at a time would each add a card from now on.
		LOCK TABLE aibilling.price IN SHARE ROW EXCLUSIVE MODE;
		PERFORM aibilling.register_price_source(format);
	END IF;

	prices := CASE format
		WHEN 'litellm' THEN ARRAY(SELECT p FROM aibilling.read_litellm(catalogue) p)
		WHEN 'models.dev' THEN ARRAY(SELECT p FROM aibilling.read_models_dev(catalogue) p)
		WHEN 'genai-prices' THEN ARRAY(SELECT p FROM aibilling.read_genai_prices(catalogue) p)
		WHEN 'openrouter' THEN ARRAY(SELECT p FROM aibilling.read_openrouter(catalogue) p)
		ELSE ARRAY(SELECT p FROM aibilling.read_narev(catalogue) p)
	END;
	prices := ARRAY(SELECT p FROM aibilling.clean_prices(prices) p);
	cards := ARRAY(SELECT c FROM aibilling.changed_cards(prices, format) c);

	-- before anything is written: this compares with what is stored now
	RETURN QUERY
		WITH side AS (
			SELECT c.*, g.context_above, g.daily_from, g.daily_to, g.price_column, false AS old, g.price, g.problem
			FROM unnest(cards) AS c
			JOIN unnest(prices) AS g ON (g.provider, g.model, g.service_tier) = (c.provider, c.model, c.service_tier)
				AND g.valid_from IS NOT DISTINCT FROM c.given_from
			WHERE g.price IS NOT NULL
			UNION ALL
			SELECT c.*, s.context_above, s.daily_from, s.daily_to, s.price_column, true, s.price, NULL
			FROM unnest(cards) AS c
			JOIN aibilling.stored_prices(format) AS s
				ON (s.provider, s.model, s.service_tier) = (c.provider, c.model, c.service_tier)
				AND s.valid_from = c.stored_from
		), change AS (
			SELECT provider, model, service_tier, context_above, valid_from, daily_from, daily_to, price_column,
				max(price) FILTER (WHERE old) AS old_price, max(price) FILTER (WHERE NOT old) AS new_price,
				reason, max(problem) AS remark
			FROM side
			GROUP BY provider, model, service_tier, context_above, valid_from, daily_from, daily_to, price_column, reason
		)
		SELECT CASE
				WHEN reason IS NOT NULL THEN 'quarantined'
				WHEN old_price IS NULL THEN 'added'
				WHEN new_price IS NULL THEN 'removed'
				ELSE 'changed'
			END AS action,
			provider, model, service_tier, context_above, valid_from, daily_from, daily_to, price_column,
			old_price, new_price, nullif(concat_ws('; ', reason, remark), '')
		FROM change
		WHERE old_price IS DISTINCT FROM new_price
		UNION ALL
		SELECT 'skipped', provider, model, service_tier, context_above, valid_from, daily_from, daily_to, price_column,
			NULL, NULL, problem
		FROM unnest(prices) AS p
		WHERE price IS NULL
		ORDER BY 2, 3, 4, 6, 5, 7, 9, 1;

	IF dry_run THEN
		RETURN;
	END IF;

	DELETE FROM aibilling.price p
	USING unnest(cards) AS c
	WHERE p.source = format AND c.reason IS NULL
		AND (p.provider, p.model, p.service_tier, p.valid_from) = (c.provider, c.model, c.service_tier, c.valid_from);
	INSERT INTO aibilling.price (provider, model, service_tier, context_above, valid_from, source, daily_from, daily_to,
			input, output, cache_read, cache_write, cache_write_1h, reasoning, request, web_search, units, discount, multiplier)
		SELECT provider, model, service_tier, context_above, valid_from, format, daily_from, daily_to,
			input, output, cache_read, cache_write, cache_write_1h, reasoning, request, web_search, units, discount, multiplier
		FROM aibilling.price_rows(prices, cards)
		WHERE reason IS NULL;

	-- A card that is fine now, or suspicious in another way, was judged anew.
	DELETE FROM aibilling.price_quarantine q
	USING unnest(prices) AS g
	WHERE q.source = format AND (q.provider, q.model, q.service_tier) = (g.provider, g.model, g.service_tier);
	INSERT INTO aibilling.price_quarantine (provider, model, service_tier, context_above, valid_from, source, daily_from, daily_to,
			input, output, cache_read, cache_write, cache_write_1h, reasoning, request, web_search, units, discount, multiplier, reason)
		SELECT provider, model, service_tier, context_above, valid_from, format, daily_from, daily_to,
			input, output, cache_read, cache_write, cache_write_1h, reasoning, request, web_search, units, discount, multiplier, reason
		FROM aibilling.price_rows(prices, cards)
		WHERE reason IS NOT NULL;
END
$$;
CREATE FUNCTION aibilling.fetch_prices(server name, dry_run boolean DEFAULT false)
RETURNS SETOF aibilling.price_change
LANGUAGE c VOLATILE STRICT AS 'MODULE_PATHNAME', 'abp_sql_fetch_prices';

COMMENT ON FUNCTION aibilling.fetch_prices(name, boolean) IS
'fetches the prices of a server of kind prices over HTTP and imports them as import_prices does: all or, on any error, nothing; needs USAGE on the server and the rights to write prices; returns a row a changed price';

COMMENT ON FUNCTION aibilling.import_prices(jsonb, text, boolean) IS
'imports a price catalogue (format litellm, models.dev, genai-prices, openrouter or narev) into aibilling.price under the format''s name as source; returns one row a price that is added, changed, removed, quarantined or skipped; with dry_run nothing is written';

CREATE FUNCTION aibilling.release_price(source text, provider text, model text, service_tier text DEFAULT 'standard')
RETURNS bigint
LANGUAGE plpgsql VOLATILE STRICT PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	released bigint;
BEGIN
	DELETE FROM aibilling.price p
	USING aibilling.price_quarantine q
	WHERE (q.source, q.provider, q.model, q.service_tier)
			= (release_price.source, release_price.provider, release_price.model, release_price.service_tier)
		AND (p.source, p.provider, p.model, p.service_tier, p.valid_from)
			= (q.source, q.provider, q.model, q.service_tier, q.valid_from);
	WITH moved AS (
		DELETE FROM aibilling.price_quarantine q
		WHERE (q.source, q.provider, q.model, q.service_tier)
			= (release_price.source, release_price.provider, release_price.model, release_price.service_tier)
		RETURNING q.*
	)
	INSERT INTO aibilling.price (provider, model, service_tier, context_above, valid_from, source, daily_from, daily_to,
			input, output, cache_read, cache_write, cache_write_1h, reasoning, request, web_search, units, discount, multiplier, note)
		SELECT m.provider, m.model, m.service_tier, m.context_above, m.valid_from, m.source, m.daily_from, m.daily_to,
			m.input, m.output, m.cache_read, m.cache_write, m.cache_write_1h, m.reasoning, m.request, m.web_search,
			m.units, m.discount, m.multiplier, 'released from quarantine: ' || m.reason
		FROM moved m;
	GET DIAGNOSTICS released = ROW_COUNT;
	IF released = 0 THEN
		RAISE EXCEPTION 'no quarantined price of source "%" for provider "%", model "%", service tier "%"',
				source, provider, model, service_tier
			USING ERRCODE = 'no_data_found',
				HINT = 'Table aibilling.price_quarantine lists the cards that can be released.';
	END IF;
	RETURN released;
END
$$;
COMMENT ON FUNCTION aibilling.release_price(text, text, text, text) IS
'applies a model''s quarantined cards as they are; returns the number of rows moved to aibilling.price';

-- ---------------------------------------------------------------------------
-- The bundled catalogue
-- ---------------------------------------------------------------------------

CREATE FUNCTION aibilling.bundled_prices() RETURNS jsonb
LANGUAGE c STABLE STRICT PARALLEL SAFE
AS 'MODULE_PATHNAME', 'abp_sql_bundled_prices';
COMMENT ON FUNCTION aibilling.bundled_prices() IS
'the price catalogue installed with aibilling_polar, as it is (doc/catalogues.md describes it)';

CREATE FUNCTION aibilling.load_bundled_prices(
	OUT package text, OUT package_version text, OUT generated date,
	OUT models bigint, OUT prices bigint, OUT aliases bigint)
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
	bundle jsonb := aibilling.bundled_prices();
BEGIN
	package := bundle ->> 'package';
	package_version := bundle ->> 'package_version';
	generated := bundle ->> 'generated';
	models := jsonb_array_length(bundle -> 'models');

	LOCK TABLE aibilling.price IN SHARE ROW EXCLUSIVE MODE;
	PERFORM aibilling.register_price_source('bundled');
	DELETE FROM aibilling.price WHERE source = 'bundled';
	DELETE FROM aibilling.model_alias WHERE source = 'bundled';

	INSERT INTO aibilling.price (provider, model, service_tier, context_above, valid_from, source, daily_from, daily_to,
			input, output, cache_read, cache_write, cache_write_1h, reasoning, request, web_search, units)
		SELECT m.provider, m.model, 'standard', coalesce(c.context_above, 0), coalesce(c.valid_from, '-infinity'), 'bundled',
			c.daily_from, c.daily_to, c.input, c.output, c.cache_read, c.cache_write, c.cache_write_1h, c.reasoning,
			c.request, c.web_search,
			(SELECT jsonb_object_agg(u.key, aibilling.catalogue_number(u.value)) FROM jsonb_each(c.units) u)
		FROM jsonb_to_recordset(bundle -> 'models') AS m (provider text, model text, cards jsonb)
		CROSS JOIN LATERAL jsonb_to_recordset(m.cards) AS c (context_above bigint, valid_from timestamptz,
			daily_from time, daily_to time, input numeric, output numeric, cache_read numeric, cache_write numeric,
			cache_write_1h numeric, reasoning numeric, request numeric, web_search numeric, units jsonb);
	GET DIAGNOSTICS prices = ROW_COUNT;

	-- A provider's names are its models' ids, their exact aliases and globs.
	-- Some providers sell what is another's and price it alike (fallbacks), and
	-- a provider has other spellings: both get the names of the provider meant.
	-- All of it ranks below the priority 0 of a user's alias.
	WITH model AS MATERIALIZED (
		SELECT m.*
		FROM jsonb_to_recordset(bundle -> 'models') AS m (provider text, model text, exact jsonb, glob jsonb)
	), own AS (
		SELECT provider, 'exact' AS kind, model AS pattern, provider AS to_provider, model AS to_model, -1 AS priority
		FROM model
		UNION ALL
		SELECT m.provider, 'exact', e.value, m.provider, m.model, -1
		FROM model m CROSS JOIN LATERAL jsonb_array_elements_text(m.exact) e
		UNION ALL
		SELECT m.provider, 'glob', e.value, m.provider, m.model, -1
		FROM model m CROSS JOIN LATERAL jsonb_array_elements_text(m.glob) e
	), sold AS (
		SELECT * FROM own
		UNION ALL
		SELECT f.key, o.kind, o.pattern, o.to_provider, o.to_model, o.priority - 1
		FROM jsonb_each(bundle -> 'fallbacks') f
		CROSS JOIN LATERAL jsonb_array_elements_text(f.value) t
		JOIN own o ON o.provider = t.value
	), spelled AS (
		SELECT * FROM sold
		UNION ALL
		SELECT s.key, o.kind, o.pattern, o.to_provider, o.to_model, o.priority
		FROM jsonb_each_text(bundle -> 'spellings') s
		JOIN sold o ON o.provider = s.value
	), name AS (
		SELECT DISTINCT ON (provider, kind, pattern) *
		FROM spelled
		ORDER BY provider, kind, pattern, priority DESC, to_provider, to_model
	)
	INSERT INTO aibilling.model_alias (provider, kind, pattern, to_provider, to_model, priority, source)
		SELECT provider, kind, pattern, to_provider, to_model, priority, 'bundled'
		FROM name
		WHERE NOT (kind = 'exact' AND provider = to_provider AND pattern = to_model);
	GET DIAGNOSTICS aliases = ROW_COUNT;
END
$$;
COMMENT ON FUNCTION aibilling.load_bundled_prices() IS
'loads the price catalogue installed with aibilling_polar, in the place of what an earlier call loaded; touches only rows of source bundled; needs INSERT and DELETE on aibilling.price and aibilling.model_alias';

-- (catalogue: end)

-- ---------------------------------------------------------------------------
-- Where events go: foreign servers
-- ---------------------------------------------------------------------------

-- (server: functions go here)

CREATE FUNCTION aibilling.polar_fdw_validator(options text[], catalog oid)
	RETURNS void
	AS 'MODULE_PATHNAME', 'aibilling_polar_fdw_validator'
	LANGUAGE C VOLATILE STRICT PARALLEL RESTRICTED;
COMMENT ON FUNCTION aibilling.polar_fdw_validator(text[], oid) IS
'checks the options of servers and user mappings of foreign data wrapper polar';

-- No handler: a server says where events go, there are no foreign tables.
CREATE FOREIGN DATA WRAPPER polar VALIDATOR aibilling.polar_fdw_validator;
COMMENT ON FOREIGN DATA WRAPPER polar IS
'where usage events go and price lists come from (extension aibilling_polar)';

-- (server: end)

-- ---------------------------------------------------------------------------
-- Usage tables, outbox, ledger
-- ---------------------------------------------------------------------------

CREATE TABLE aibilling.usage_table (
	usage regclass PRIMARY KEY,
	server name COLLATE "C" NOT NULL,
	serverid oid NOT NULL,		-- the server meant, not another of its name
	attached_at timestamptz NOT NULL DEFAULT now(),
	blocked_until timestamptz,
	blocked_reason text
);
COMMENT ON TABLE aibilling.usage_table IS 'Attached usage tables and where their rows go';
COMMENT ON COLUMN aibilling.usage_table.usage IS 'The table; of a partitioned one the root';
COMMENT ON COLUMN aibilling.usage_table.server IS 'The foreign server that its rows are delivered to';
COMMENT ON COLUMN aibilling.usage_table.serverid IS 'OID of that server: it may be renamed, and another of its name is another server';
COMMENT ON COLUMN aibilling.usage_table.attached_at IS 'When it was attached first';
COMMENT ON COLUMN aibilling.usage_table.blocked_until IS 'Its rows could not be read: they are tried again at this time; NULL: they can be';
COMMENT ON COLUMN aibilling.usage_table.blocked_reason IS 'The error met when reading its rows';

-- Entries are blocks of ids in one state; "first" leads to the entry of an
-- id because an entry never crosses a multiple of 1024 (outbox.c).  Not
-- unique: a row's INSERT must not fail because of a stale entry of its id.
CREATE TABLE aibilling.outbox_entry (
	usage_table regclass NOT NULL,
	state "char" NOT NULL,
	attempts integer NOT NULL,
	maybe_sent boolean NOT NULL,
	not_before timestamptz NOT NULL,
	first bigint NOT NULL,
	last bigint NOT NULL,
	ids int8multirange,
	error text
) WITH (autovacuum_vacuum_scale_factor = 0.02, autovacuum_analyze_scale_factor = 0.1);

CREATE INDEX outbox_entry_key
	ON aibilling.outbox_entry (usage_table, state, not_before, first);
COMMENT ON TABLE aibilling.outbox_entry IS
'Private: how aibilling.outbox is stored, a row per run of ids in one state. Its form may change in any version';
COMMENT ON COLUMN aibilling.outbox_entry.usage_table IS 'The attached table';
COMMENT ON COLUMN aibilling.outbox_entry.state IS
'p: to be sent; w: to be sent, not before not_before; u: waits for a price; r: rejected, waits to be mended';
COMMENT ON COLUMN aibilling.outbox_entry.attempts IS 'How often the rows have been sent in vain';
COMMENT ON COLUMN aibilling.outbox_entry.maybe_sent IS
'whether a server that this one descends from (failover, recovery, copy) may have sent the rows: duplicates of them are no surprise then';
COMMENT ON COLUMN aibilling.outbox_entry.not_before IS 'Of state w: when the rows may be sent; -infinity in all others';
COMMENT ON COLUMN aibilling.outbox_entry.first IS 'Lowest id';
COMMENT ON COLUMN aibilling.outbox_entry.last IS 'Highest id';
COMMENT ON COLUMN aibilling.outbox_entry.ids IS 'The ids; NULL: all from first to last';
COMMENT ON COLUMN aibilling.outbox_entry.error IS 'Why the rows wait; NULL: only for their turn';

CREATE TABLE aibilling.delivery (
	id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
	server name COLLATE "C" NOT NULL,
	usage_table regclass NOT NULL,
	usage_ids int8multirange NOT NULL,
	events integer NOT NULL,
	bytes bigint NOT NULL,
	state text COLLATE "C" NOT NULL
		CHECK (state IN ('sending', 'delivered', 'rejected', 'failed')),
	attempts integer NOT NULL,
	http_status integer,
	inserted bigint,
	duplicates bigint,
	unexpected_duplicates bigint NOT NULL DEFAULT 0,
	vanished bigint NOT NULL DEFAULT 0,
	started_at timestamptz NOT NULL,
	finished_at timestamptz,
	not_before timestamptz,
	outcome_unknown boolean NOT NULL DEFAULT false,
	error text
) WITH (autovacuum_vacuum_scale_factor = 0.05);

CREATE INDEX delivery_sending ON aibilling.delivery (usage_table) WHERE state = 'sending';
CREATE INDEX delivery_usage_ids ON aibilling.delivery USING gist (usage_ids);
COMMENT ON TABLE aibilling.delivery IS
'Ledger: a row per batch of events that was sent, or is being sent, to Polar. Owners see the batches of their usage tables, pg_monitor all';
COMMENT ON COLUMN aibilling.delivery.id IS 'Number of the delivery';
COMMENT ON COLUMN aibilling.delivery.server IS 'The foreign server it went to';
COMMENT ON COLUMN aibilling.delivery.usage_table IS 'The table its rows are from; a bare number once that table is dropped';
COMMENT ON COLUMN aibilling.delivery.usage_ids IS 'Ids of its rows';
COMMENT ON COLUMN aibilling.delivery.events IS 'How many events were sent';
COMMENT ON COLUMN aibilling.delivery.bytes IS 'Size of the request''s body';
COMMENT ON COLUMN aibilling.delivery.state IS
'sending: not answered yet; delivered: Polar has the events; rejected: Polar refused them, and the rows went back to the outbox; failed: not stored, and the rows went back to be sent in another delivery';
COMMENT ON COLUMN aibilling.delivery.attempts IS 'Requests begun';
COMMENT ON COLUMN aibilling.delivery.http_status IS 'Status of the last answer; NULL: there was none';
COMMENT ON COLUMN aibilling.delivery.inserted IS 'Events that Polar says it stored';
COMMENT ON COLUMN aibilling.delivery.duplicates IS 'Events that Polar says it had before';
COMMENT ON COLUMN aibilling.delivery.unexpected_duplicates IS
'Those of duplicates that no earlier attempt of ours explains: another event owned the external_id, and this usage was not counted';
COMMENT ON COLUMN aibilling.delivery.vanished IS 'Rows that were gone from the usage table when the events were built';
COMMENT ON COLUMN aibilling.delivery.started_at IS 'When the delivery was recorded, before its first request';
COMMENT ON COLUMN aibilling.delivery.finished_at IS 'When its answer was settled; NULL while it is being sent';
COMMENT ON COLUMN aibilling.delivery.not_before IS 'While it is being sent: no other attempt before this time; NULL: at once';
COMMENT ON COLUMN aibilling.delivery.outcome_unknown IS
'An attempt got no answer that says whether the events were stored: duplicates are expected then';
COMMENT ON COLUMN aibilling.delivery.error IS 'What went wrong last; NULL: nothing';

-- What the ledger sums up to, up to a delivery: status need not read it all.
CREATE TABLE aibilling.delivery_total (
	usage_table regclass PRIMARY KEY,
	up_to bigint NOT NULL,
	deliveries bigint NOT NULL,
	delivered bigint NOT NULL,
	duplicates bigint NOT NULL,
	unexpected_duplicates bigint NOT NULL,
	vanished bigint NOT NULL
);

COMMENT ON TABLE aibilling.delivery_total IS
'what the settled deliveries of a usage table add up to, up to one of them; the ledger''s rows up to it may be deleted without changing aibilling.status';
COMMENT ON COLUMN aibilling.delivery_total.usage_table IS 'the usage table';
COMMENT ON COLUMN aibilling.delivery_total.up_to IS 'id of the last delivery that is in the totals';
COMMENT ON COLUMN aibilling.delivery_total.deliveries IS 'number of deliveries that Polar accepted';
COMMENT ON COLUMN aibilling.delivery_total.delivered IS 'events in them';
COMMENT ON COLUMN aibilling.delivery_total.duplicates IS 'events that Polar had already';
COMMENT ON COLUMN aibilling.delivery_total.unexpected_duplicates IS 'of these, events that another producer had sent under the same external_id: this usage was not counted';
COMMENT ON COLUMN aibilling.delivery_total.vanished IS 'rows that were gone before they were sent';

CREATE TABLE aibilling.server_state (
	server name COLLATE "C" PRIMARY KEY,
	paused text COLLATE "C" CHECK (paused IN ('operator', 'answer')),
	reason text,
	changed_at timestamptz NOT NULL DEFAULT now(),
	failures integer NOT NULL DEFAULT 0,
	not_before timestamptz
);
COMMENT ON TABLE aibilling.server_state IS
'Private: servers that are paused or wait after failures, so that a restart does not forget it; shown by aibilling.status';
COMMENT ON COLUMN aibilling.server_state.server IS 'Name of the foreign server';
COMMENT ON COLUMN aibilling.server_state.paused IS
'operator: by aibilling.pause(); answer: by what the server answered; NULL: not paused';
COMMENT ON COLUMN aibilling.server_state.reason IS 'Why';
COMMENT ON COLUMN aibilling.server_state.changed_at IS 'Since when';
COMMENT ON COLUMN aibilling.server_state.failures IS 'Failed requests in succession';
COMMENT ON COLUMN aibilling.server_state.not_before IS 'No request before this time; NULL: at once';

CREATE TABLE aibilling.database_identity (
	system_identifier bigint NOT NULL,
	database oid NOT NULL,
	timeline bigint NOT NULL
);
COMMENT ON TABLE aibilling.database_identity IS
'Private: the database that may send, written when the first table is attached and by aibilling.arm(). A copy finds another identity here than its own, and does not send';
COMMENT ON COLUMN aibilling.database_identity.system_identifier IS 'System identifier of its cluster';
COMMENT ON COLUMN aibilling.database_identity.timeline IS 'timeline of the server when it last delivered; another one means a failover or a recovery to a point in time';
COMMENT ON COLUMN aibilling.database_identity.database IS 'OID of the database';

SELECT pg_extension_config_dump('aibilling.usage_table', '');
SELECT pg_extension_config_dump('aibilling.outbox_entry', '');
SELECT pg_extension_config_dump('aibilling.delivery', '');
SELECT pg_extension_config_dump('aibilling.delivery_id_seq', '');
SELECT pg_extension_config_dump('aibilling.delivery_total', '');
SELECT pg_extension_config_dump('aibilling.server_state', '');
SELECT pg_extension_config_dump('aibilling.database_identity', '');

-- Who sees a usage table's outbox, ledger and status: its owner, and monitors.
CREATE FUNCTION aibilling.may_see(usage regclass) RETURNS boolean
LANGUAGE sql STABLE PARALLEL SAFE
RETURN pg_has_role(current_user, 'pg_monitor'::name, 'USAGE')
	OR EXISTS (SELECT FROM pg_class c
			   WHERE c.oid = may_see.usage AND pg_has_role(current_user, c.relowner, 'USAGE'));
COMMENT ON FUNCTION aibilling.may_see(regclass) IS
'Whether the caller sees a usage table''s outbox, ledger and status: with the rights of its owner or of pg_monitor';

ALTER TABLE aibilling.delivery ENABLE ROW LEVEL SECURITY;
CREATE POLICY delivery_of_own_tables ON aibilling.delivery
	FOR SELECT USING (aibilling.may_see(usage_table));
COMMENT ON POLICY delivery_of_own_tables ON aibilling.delivery IS
'Owners see the deliveries of their usage tables, pg_monitor all';
ALTER TABLE aibilling.usage_table ENABLE ROW LEVEL SECURITY;
CREATE POLICY usage_table_of_own ON aibilling.usage_table
	FOR SELECT USING (aibilling.may_see(usage));
COMMENT ON POLICY usage_table_of_own ON aibilling.usage_table IS
'Owners see their usage tables, pg_monitor all';

CREATE VIEW aibilling.outbox WITH (security_barrier) AS
SELECT e.usage_table,
	i.usage_id,
	CASE e.state WHEN 'u' THEN 'unpriced' WHEN 'r' THEN 'rejected' ELSE 'pending' END AS state,
	e.attempts,
	nullif(e.not_before, '-infinity'::timestamptz) AS not_before,
	e.error
FROM aibilling.outbox_entry e,
	LATERAL (SELECT generate_series(e.first, e.last) AS usage_id WHERE e.ids IS NULL
			 UNION ALL
			 SELECT generate_series(lower(r), upper(r) - 1) FROM unnest(e.ids) r) i
WHERE aibilling.may_see(e.usage_table);
COMMENT ON VIEW aibilling.outbox IS
'A row per usage row that is neither delivered nor in flight. Owners see their usage tables'' rows, pg_monitor all';
COMMENT ON COLUMN aibilling.outbox.usage_table IS 'The attached table';
COMMENT ON COLUMN aibilling.outbox.usage_id IS 'Id of the row';
COMMENT ON COLUMN aibilling.outbox.state IS
'pending: to be sent; unpriced: waits for a price; rejected: cannot be sent until it is mended by UPDATE or released by aibilling.retry()';
COMMENT ON COLUMN aibilling.outbox.attempts IS 'How often it has been sent in vain';
COMMENT ON COLUMN aibilling.outbox.not_before IS 'It is not sent before this time; NULL: as soon as possible';
COMMENT ON COLUMN aibilling.outbox.error IS 'Why it waits; NULL: only for its turn';

-- Trigger functions of usage tables

CREATE FUNCTION aibilling.price_usage() RETURNS trigger
LANGUAGE c AS 'MODULE_PATHNAME', 'abp_sql_price_usage';
COMMENT ON FUNCTION aibilling.price_usage() IS
'Trigger BEFORE INSERT OR UPDATE of a usage table: fills the columns from raw_usage, computes cost_nanos, cost_cents and cost_status. Raises check_violation for counts and values that cannot be, and refuses an UPDATE of what was billed once the row is in flight or delivered. Put there by aibilling.attach()';

CREATE FUNCTION aibilling.enqueue_usage() RETURNS trigger
LANGUAGE c AS 'MODULE_PATHNAME', 'abp_sql_enqueue_usage';
COMMENT ON FUNCTION aibilling.enqueue_usage() IS
'Trigger AFTER INSERT of a usage table: puts the row into the outbox, in the same transaction. On a table that is not attached it does nothing';

CREATE FUNCTION aibilling.guard_usage() RETURNS trigger
LANGUAGE c AS 'MODULE_PATHNAME', 'abp_sql_guard_usage';
COMMENT ON FUNCTION aibilling.guard_usage() IS
'Trigger BEFORE DELETE of a usage table: takes a waiting row out of the outbox; raises object_not_in_prerequisite_state for a row in flight';

CREATE FUNCTION aibilling.truncate_usage() RETURNS trigger
LANGUAGE c AS 'MODULE_PATHNAME', 'abp_sql_truncate_usage';
COMMENT ON FUNCTION aibilling.truncate_usage() IS
'Trigger BEFORE TRUNCATE of a usage table: empties its outbox, with a WARNING that gives the number of rows that were not delivered';

CREATE FUNCTION aibilling.create_usage_table(name text, server name) RETURNS regclass
LANGUAGE c VOLATILE STRICT AS 'MODULE_PATHNAME', 'abp_sql_create_usage_table';
COMMENT ON FUNCTION aibilling.create_usage_table(text, name) IS
'Creates a usage table owned by the caller and attaches it to the foreign server. name: as one writes a table''s name, quoted and with a schema if need be. Returns the table. Needs CREATE in the schema and USAGE on the server';

CREATE FUNCTION aibilling.attach(usage regclass, server name, existing text DEFAULT 'ignore') RETURNS void
LANGUAGE c VOLATILE STRICT AS 'MODULE_PATHNAME', 'abp_sql_attach';
COMMENT ON FUNCTION aibilling.attach(regclass, name, text) IS
'Makes a table a usage table whose rows are delivered to the foreign server; again for another server. existing: ignore (rows already there are never sent) or send (those without a delivery are). Raises undefined_column naming what the table lacks. Needs ownership of the table and USAGE on the server';

CREATE FUNCTION aibilling.detach(usage regclass, pending text DEFAULT 'refuse') RETURNS void
LANGUAGE c VOLATILE STRICT AS 'MODULE_PATHNAME', 'abp_sql_detach';
COMMENT ON FUNCTION aibilling.detach(regclass, text) IS
'Makes a usage table an ordinary table; the ledger stays. pending: refuse (raises an error while rows are not delivered) or discard (gives them up). Raises object_in_use while rows are in flight. Needs ownership of the table';

-- Operating

CREATE PROCEDURE aibilling.sync(server name DEFAULT NULL, timeout interval DEFAULT NULL)
LANGUAGE c AS 'MODULE_PATHNAME', 'abp_sql_sync';
COMMENT ON PROCEDURE aibilling.sync(name, interval) IS
'Delivers what is pending now and returns when that is done, set aside or refused (WARNING). server: only this one; timeout: give up after it; NULL: all, never. Delivers the tables that the caller owns, all for a superuser. Commits as it goes: inside a transaction block it raises invalid_transaction_termination';

CREATE FUNCTION aibilling.preview(usage regclass, max_rows integer DEFAULT 10,
	OUT usage_id bigint, OUT state text, OUT event jsonb, OUT error text) RETURNS SETOF record
LANGUAGE c VOLATILE STRICT AS 'MODULE_PATHNAME', 'abp_sql_preview';
COMMENT ON FUNCTION aibilling.preview(regclass, integer) IS
'The events of up to max_rows rows of the outbox, exactly as they would be sent: pending ones first, then rejected and unpriced ones, with the reason in error. Sends nothing. Needs ownership of the table';

CREATE FUNCTION aibilling.pause(server name DEFAULT NULL) RETURNS void
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'abp_sql_pause';
COMMENT ON FUNCTION aibilling.pause(name) IS
'Sends nothing to the foreign server until aibilling.resume(); requests in flight end. NULL: all servers of the caller''s usage tables. Needs ownership of every usage table attached to the server';

CREATE FUNCTION aibilling.resume(server name DEFAULT NULL) RETURNS void
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'abp_sql_resume';
COMMENT ON FUNCTION aibilling.resume(name) IS
'Ends a pause, whether aibilling.pause() or the server''s answer began it, and every wait after failures, and tries at once. NULL: all servers of the caller''s usage tables. Needs ownership of every usage table attached to the server';

CREATE FUNCTION aibilling.retry(usage regclass, ids bigint[] DEFAULT NULL) RETURNS bigint
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'abp_sql_retry';
COMMENT ON FUNCTION aibilling.retry(regclass, bigint[]) IS
'Makes rejected rows pending again. ids: only these; NULL: all. Returns how many. Needs ownership of the table';

CREATE FUNCTION aibilling.arm() RETURNS void
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'abp_sql_arm';
COMMENT ON FUNCTION aibilling.arm() IS
'Lets this database send although it is a copy (restored, cloned or upgraded). Needs ownership of the database';

CREATE FUNCTION aibilling.reprice(usage regclass, from_time timestamptz DEFAULT '-infinity',
	to_time timestamptz DEFAULT 'infinity', dry_run boolean DEFAULT true,
	OUT usage_id bigint, OUT state text, OUT old_cost_nanos bigint, OUT new_cost_nanos bigint,
	OUT difference_nanos numeric, OUT action text) RETURNS SETOF record
LANGUAGE c VOLATILE STRICT AS 'MODULE_PATHNAME', 'abp_sql_reprice';
COMMENT ON FUNCTION aibilling.reprice(regclass, timestamptz, timestamptz, boolean) IS
'Computes the cost of the rows with from_time <= occurred_at < to_time again, by the prices of today. Returns a row per cost that differs, in USD x 10^9; rows delivered or in flight are only reported, the others change unless dry_run. Needs ownership of the table';

CREATE FUNCTION aibilling.usage_status(usage regclass, id bigint,
	OUT state text, OUT delivery_id bigint, OUT sent_at timestamptz, OUT attempts integer,
	OUT error text) RETURNS record
LANGUAGE c STABLE STRICT AS 'MODULE_PATHNAME', 'abp_sql_usage_status';
COMMENT ON FUNCTION aibilling.usage_status(regclass, bigint) IS
'Where a row stands: state (pending, unpriced, rejected, sending, delivered, not_sent), its delivery, when that began, attempts, error. Needs ownership of the table or pg_monitor';

CREATE FUNCTION aibilling.status_rows(
	OUT usage_table regclass, OUT server name, OUT pending bigint, OUT pending_estimated boolean,
	OUT unpriced bigint, OUT rejected bigint, OUT in_flight bigint, OUT oldest timestamptz,
	OUT last_delivery timestamptz, OUT last_error text, OUT deliveries bigint, OUT delivered bigint,
	OUT duplicates bigint, OUT unexpected_duplicates bigint, OUT vanished bigint,
	OUT worker_pid integer, OUT status text) RETURNS SETOF record
LANGUAGE c STABLE AS 'MODULE_PATHNAME', 'abp_sql_status';
COMMENT ON FUNCTION aibilling.status_rows() IS 'What aibilling.status shows';

CREATE VIEW aibilling.status AS SELECT * FROM aibilling.status_rows();
COMMENT ON VIEW aibilling.status IS
'A row per usage table that the caller owns (all for pg_monitor): what waits, what was delivered, and what happens now and why';
COMMENT ON COLUMN aibilling.status.usage_table IS 'The attached table; NULL: none is attached';
COMMENT ON COLUMN aibilling.status.server IS 'The foreign server that its rows are delivered to';
COMMENT ON COLUMN aibilling.status.pending IS 'Rows to be sent: exact up to 100,000';
COMMENT ON COLUMN aibilling.status.pending_estimated IS 'Whether pending is an estimate';
COMMENT ON COLUMN aibilling.status.unpriced IS 'Rows that wait for a price; see aibilling.unpriced';
COMMENT ON COLUMN aibilling.status.rejected IS 'Rows that cannot be sent until they are mended; see aibilling.outbox';
COMMENT ON COLUMN aibilling.status.in_flight IS 'Events sent and not answered yet';
COMMENT ON COLUMN aibilling.status.oldest IS 'occurred_at of the first row that could be sent';
COMMENT ON COLUMN aibilling.status.last_delivery IS 'When a delivery last succeeded';
COMMENT ON COLUMN aibilling.status.last_error IS 'Error of the last delivery that had one';
COMMENT ON COLUMN aibilling.status.deliveries IS 'Batches delivered';
COMMENT ON COLUMN aibilling.status.delivered IS 'Events delivered';
COMMENT ON COLUMN aibilling.status.duplicates IS 'Events that Polar had before';
COMMENT ON COLUMN aibilling.status.unexpected_duplicates IS
'Those that were another''s: their usage was not counted';
COMMENT ON COLUMN aibilling.status.vanished IS 'Rows that were gone when they were to be sent';
COMMENT ON COLUMN aibilling.status.worker_pid IS 'Process of this database''s worker; NULL: there is none';
COMMENT ON COLUMN aibilling.status.status IS 'In words, what happens now and why';

CREATE VIEW aibilling.unpriced WITH (security_barrier) AS
SELECT e.usage_table, e.error AS reason,
	sum(coalesce((SELECT sum(upper(r) - lower(r)) FROM unnest(e.ids) r),
				 e.last - e.first + 1))::bigint AS rows
FROM aibilling.outbox_entry e
WHERE e.state = 'u' AND aibilling.may_see(e.usage_table)
GROUP BY e.usage_table, e.error;
COMMENT ON VIEW aibilling.unpriced IS
'What keeps rows from being priced, a row per reason: model or quantity without a price. They are priced and sent by themselves when the price arrives';
COMMENT ON COLUMN aibilling.unpriced.usage_table IS 'The attached table';
COMMENT ON COLUMN aibilling.unpriced.reason IS 'What has no price';
COMMENT ON COLUMN aibilling.unpriced.rows IS 'How many rows wait for it';

-- Event triggers: what becomes of the outbox when tables and servers go

CREATE FUNCTION aibilling.on_sql_drop() RETURNS event_trigger
LANGUAGE c AS 'MODULE_PATHNAME', 'abp_sql_on_sql_drop';
COMMENT ON FUNCTION aibilling.on_sql_drop() IS
'Event trigger: a dropped usage table takes its outbox along (WARNING with the number of rows not delivered); a server with usage tables cannot be dropped';

CREATE FUNCTION aibilling.on_server_ddl() RETURNS event_trigger
LANGUAGE c AS 'MODULE_PATHNAME', 'abp_sql_on_server_ddl';
COMMENT ON FUNCTION aibilling.on_server_ddl() IS
'Event trigger: the worker looks at once at a changed server or user mapping';

-- At every DROP: a typed table goes with its type, any table with an extension.
CREATE EVENT TRIGGER aibilling_on_sql_drop ON sql_drop
	EXECUTE FUNCTION aibilling.on_sql_drop();
COMMENT ON EVENT TRIGGER aibilling_on_sql_drop IS
'Keeps outbox and usage tables in step with DROP (extension aibilling_polar)';

CREATE EVENT TRIGGER aibilling_on_server_ddl ON ddl_command_end
	WHEN TAG IN ('CREATE SERVER', 'ALTER SERVER', 'CREATE USER MAPPING', 'ALTER USER MAPPING', 'DROP USER MAPPING')
	EXECUTE FUNCTION aibilling.on_server_ddl();
COMMENT ON EVENT TRIGGER aibilling_on_server_ddl IS
'Tells the worker of changed servers (extension aibilling_polar)';

-- (outbox: end)

-- ---------------------------------------------------------------------------
-- Privileges
-- ---------------------------------------------------------------------------

REVOKE ALL ON ALL TABLES IN SCHEMA aibilling FROM PUBLIC;
REVOKE ALL ON ALL SEQUENCES IN SCHEMA aibilling FROM PUBLIC;
REVOKE ALL ON ALL ROUTINES IN SCHEMA aibilling FROM PUBLIC;
GRANT USAGE ON SCHEMA aibilling TO PUBLIC;

-- (price: grants)
GRANT SELECT ON aibilling.price, aibilling.price_source, aibilling.service_tier_rule, aibilling.model_alias TO PUBLIC;
GRANT EXECUTE ON FUNCTION
	aibilling.cost_nanos(text, text, bigint, bigint, bigint, bigint, bigint, bigint, bigint, bigint, jsonb, text, timestamptz),
	aibilling.cost_cents(text, text, bigint, bigint, bigint, bigint, bigint, bigint, bigint, bigint, jsonb, text, timestamptz),
	aibilling.polar_cost(text, text, bigint, bigint, bigint, bigint, bigint, bigint, bigint, bigint, jsonb, text, timestamptz),
	aibilling.cost(text, text, bigint, bigint, bigint, bigint, bigint, bigint, bigint, bigint, jsonb, text, timestamptz),
	aibilling.explain_cost(text, text, bigint, bigint, bigint, bigint, bigint, bigint, bigint, bigint, jsonb, text, timestamptz),
	aibilling.explain_cost(regclass, bigint),
	aibilling.convert_cost(numeric, text, text)
TO PUBLIC;

-- (normalize: grants)
GRANT EXECUTE ON FUNCTION aibilling.normalize_usage(text, jsonb) TO PUBLIC;

-- (catalogue: grants)
GRANT SELECT ON aibilling.price_quarantine TO PUBLIC;
-- With the rights of whoever calls: writing needs them on the tables.
GRANT EXECUTE ON FUNCTION
	aibilling.catalogue_number(jsonb),
	aibilling.clean_price(numeric),
	aibilling.stored_prices(text),
	aibilling.read_litellm(jsonb),
	aibilling.read_models_dev(jsonb),
	aibilling.read_genai_prices(jsonb),
	aibilling.read_router_prices(jsonb, boolean),
	aibilling.read_openrouter(jsonb),
	aibilling.read_narev(jsonb),
	aibilling.clean_prices(aibilling.catalogue_price[]),
	aibilling.changed_cards(aibilling.catalogue_price[], text),
	aibilling.price_rows(aibilling.catalogue_price[], aibilling.price_card[]),
	aibilling.import_prices(jsonb, text, boolean),
	aibilling.fetch_prices(name, boolean),
	aibilling.register_price_source(text),
	aibilling.release_price(text, text, text, text),
	aibilling.bundled_prices(),
	aibilling.load_bundled_prices()
	TO PUBLIC;

-- (server: grants)

-- (outbox: grants)
GRANT SELECT ON aibilling.outbox, aibilling.status, aibilling.unpriced,
	aibilling.delivery, aibilling.usage_table TO PUBLIC;
GRANT EXECUTE ON FUNCTION
	aibilling.may_see(regclass),
	aibilling.price_usage(), aibilling.enqueue_usage(), aibilling.guard_usage(), aibilling.truncate_usage(),
	aibilling.create_usage_table(text, name), aibilling.attach(regclass, name, text), aibilling.detach(regclass, text),
	aibilling.preview(regclass, integer), aibilling.pause(name), aibilling.resume(name),
	aibilling.retry(regclass, bigint[]), aibilling.arm(), aibilling.reprice(regclass, timestamptz, timestamptz, boolean),
	aibilling.usage_status(regclass, bigint), aibilling.status_rows()
TO PUBLIC;
GRANT EXECUTE ON PROCEDURE aibilling.sync(name, interval) TO PUBLIC;
-- (outbox: end of grants)
