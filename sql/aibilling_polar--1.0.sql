\echo Use "CREATE EXTENSION aibilling_polar" to load this file. \quit

-- The script runs with search_path = pg_catalog (control file): what is not
-- qualified is PostgreSQL's own.

CREATE SCHEMA aibilling;
COMMENT ON SCHEMA aibilling IS
'AI usage: priced exactly, delivered to Polar, reported in SQL (extension aibilling_polar)';

-- ---------------------------------------------------------------------------
-- Prices
-- ---------------------------------------------------------------------------

CREATE TABLE aibilling.price (
	provider text COLLATE "C" NOT NULL,
	model text COLLATE "C" NOT NULL,
	service_tier text COLLATE "C" NOT NULL DEFAULT 'standard',
	context_above bigint NOT NULL DEFAULT 0 CHECK (context_above >= 0),
	valid_from timestamptz NOT NULL DEFAULT '-infinity',
	source text COLLATE "C" NOT NULL DEFAULT 'user',
	daily_from time,
	daily_to time,
	input numeric(18,9) CHECK (input >= 0),
	output numeric(18,9) CHECK (output >= 0),
	cache_read numeric(18,9) CHECK (cache_read >= 0),
	cache_write numeric(18,9) CHECK (cache_write >= 0),
	cache_write_1h numeric(18,9) CHECK (cache_write_1h >= 0),
	reasoning numeric(18,9) CHECK (reasoning >= 0),
	request numeric(18,9) CHECK (request >= 0),
	web_search numeric(18,9) CHECK (web_search >= 0),
	units jsonb CHECK (jsonb_typeof(units) = 'object'),
	discount numeric(18,9) CHECK (discount BETWEEN 0 AND 1),
	multiplier numeric(18,9) CHECK (multiplier >= 0),
	note text,
	CONSTRAINT price_key UNIQUE NULLS NOT DISTINCT
		(provider, model, service_tier, context_above, valid_from, source, daily_from, daily_to),
	CONSTRAINT price_window CHECK ((daily_from IS NULL) = (daily_to IS NULL))
);

CREATE TABLE aibilling.price_source (
	source text COLLATE "C" PRIMARY KEY,
	priority integer NOT NULL DEFAULT 100,
	note text
);

CREATE TABLE aibilling.service_tier_rule (
	provider text COLLATE "C" NOT NULL DEFAULT '*',
	service_tier text COLLATE "C" NOT NULL,
	multiplier numeric(18,9) NOT NULL CHECK (multiplier >= 0),
	note text,
	PRIMARY KEY (provider, service_tier)
);

CREATE TABLE aibilling.model_alias (
	provider text COLLATE "C" NOT NULL DEFAULT '*',
	kind text COLLATE "C" NOT NULL DEFAULT 'exact' CHECK (kind IN ('exact', 'glob')),
	pattern text COLLATE "C" NOT NULL,
	to_provider text COLLATE "C" NOT NULL,
	to_model text COLLATE "C" NOT NULL,
	priority integer NOT NULL DEFAULT 0,
	source text COLLATE "C" NOT NULL DEFAULT 'user',
	PRIMARY KEY (provider, kind, pattern, source)
);

-- (price: cost functions go here)

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

-- (catalogue: tables and functions go here)

-- (catalogue: end)

-- ---------------------------------------------------------------------------
-- Where events go: foreign servers
-- ---------------------------------------------------------------------------

-- (server: functions go here)

-- (server: end)

-- ---------------------------------------------------------------------------
-- Usage tables, outbox, ledger
-- ---------------------------------------------------------------------------

-- (outbox: goes here)

-- (outbox: end)

-- ---------------------------------------------------------------------------
-- Privileges
-- ---------------------------------------------------------------------------

REVOKE ALL ON ALL TABLES IN SCHEMA aibilling FROM PUBLIC;
REVOKE ALL ON ALL SEQUENCES IN SCHEMA aibilling FROM PUBLIC;
REVOKE ALL ON ALL ROUTINES IN SCHEMA aibilling FROM PUBLIC;
GRANT USAGE ON SCHEMA aibilling TO PUBLIC;

-- (price: grants)

-- (normalize: grants)
GRANT EXECUTE ON FUNCTION aibilling.normalize_usage(text, jsonb) TO PUBLIC;

-- (catalogue: grants)

-- (server: grants)

-- (outbox: grants)
