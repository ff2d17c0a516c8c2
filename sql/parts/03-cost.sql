-- ---------------------------------------------------------------------------
-- What a call costs
-- ---------------------------------------------------------------------------

-- Names whose exact spelling finds nothing are looked up in any case.
CREATE INDEX price_folded_model ON aibilling.price (lower(model));
COMMENT ON INDEX aibilling.price_folded_model IS 'Finds a model in any case';
CREATE INDEX model_alias_folded_pattern ON aibilling.model_alias (lower(pattern));
COMMENT ON INDEX aibilling.model_alias_folded_pattern IS 'Finds an exact alias in any case';
CREATE INDEX model_alias_folded_glob ON aibilling.model_alias (translate(lower(provider), '_', '-')) WHERE kind = 'glob';
COMMENT ON INDEX aibilling.model_alias_folded_glob IS 'Finds the globs of a provider in any case';

-- NULL is "not reported" and has a meaning, so none of these is STRICT.

CREATE OR REPLACE FUNCTION aibilling.cost_nanos(
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

CREATE OR REPLACE FUNCTION aibilling.cost_cents(
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

CREATE OR REPLACE FUNCTION aibilling.polar_cost(
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

CREATE OR REPLACE FUNCTION aibilling.cost(
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

CREATE OR REPLACE FUNCTION aibilling.explain_cost(
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
'How the cost of an AI call comes about: one row per bucket, quantity x price / per x factor = amount_usd, exact, adding up to the cost; and the card that the prices are from';

CREATE OR REPLACE FUNCTION aibilling.explain_cost(usage regclass, id bigint)
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
'How the cost of a stored usage row comes about by the prices of now, read with the rights of the caller. The amounts add up to the cost that is stored: if prices have been corrected since, bucket difference says by how much';

CREATE OR REPLACE FUNCTION aibilling.convert_cost(amount numeric, from_unit text, to_unit text)
RETURNS numeric
AS 'MODULE_PATHNAME', 'abp_sql_convert_cost'
LANGUAGE C IMMUTABLE STRICT PARALLEL SAFE;
COMMENT ON FUNCTION aibilling.convert_cost(numeric, text, text) IS
'An amount of USD from one unit to another (base, cents, micros, nanos), exact, never rounded';

CREATE OR REPLACE FUNCTION aibilling.normalize_usage(
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
'A provider''s usage object, or a whole response, as the columns of a usage table';
