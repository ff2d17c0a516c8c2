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
	attached_at timestamptz NOT NULL DEFAULT now(),
	blocked_at timestamptz,
	blocked_reason text
);

-- Entries are blocks of ids in one state; "first" leads to the entry of an
-- id because an entry never crosses a multiple of 1024 (outbox.c).  Not
-- unique: a row's INSERT must not fail because of a stale entry of its id.
CREATE TABLE aibilling.outbox_entry (
	usage_table regclass NOT NULL,
	state "char" NOT NULL,
	attempts integer NOT NULL,
	not_before timestamptz NOT NULL,
	first bigint NOT NULL,
	last bigint NOT NULL,
	ids int8multirange,
	error text
) WITH (autovacuum_vacuum_scale_factor = 0.02, autovacuum_analyze_scale_factor = 0.1);

CREATE INDEX outbox_entry_key
	ON aibilling.outbox_entry (usage_table, state, not_before, first);

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

CREATE TABLE aibilling.server_state (
	server name COLLATE "C" PRIMARY KEY,
	paused text COLLATE "C" CHECK (paused IN ('operator', 'answer')),
	reason text,
	changed_at timestamptz NOT NULL DEFAULT now(),
	failures integer NOT NULL DEFAULT 0,
	not_before timestamptz
);

CREATE TABLE aibilling.database_identity (
	system_identifier bigint NOT NULL,
	database oid NOT NULL
);

SELECT pg_extension_config_dump('aibilling.usage_table', '');
SELECT pg_extension_config_dump('aibilling.outbox_entry', '');
SELECT pg_extension_config_dump('aibilling.delivery', '');
SELECT pg_extension_config_dump('aibilling.delivery_id_seq', '');
SELECT pg_extension_config_dump('aibilling.server_state', '');
SELECT pg_extension_config_dump('aibilling.database_identity', '');

-- Who sees a usage table's outbox, ledger and status: its owner, and monitors.
CREATE FUNCTION aibilling.may_see(usage regclass) RETURNS boolean
LANGUAGE sql STABLE PARALLEL SAFE
RETURN pg_has_role(current_user, 'pg_monitor'::name, 'USAGE')
	OR EXISTS (SELECT FROM pg_class c
			   WHERE c.oid = may_see.usage AND pg_has_role(current_user, c.relowner, 'USAGE'));

ALTER TABLE aibilling.delivery ENABLE ROW LEVEL SECURITY;
CREATE POLICY delivery_of_own_tables ON aibilling.delivery
	FOR SELECT USING (aibilling.may_see(usage_table));
ALTER TABLE aibilling.usage_table ENABLE ROW LEVEL SECURITY;
CREATE POLICY usage_table_of_own ON aibilling.usage_table
	FOR SELECT USING (aibilling.may_see(usage));

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

-- Trigger functions of usage tables

CREATE FUNCTION aibilling.price_usage() RETURNS trigger
LANGUAGE c AS 'MODULE_PATHNAME', 'aibilling_price_usage';

CREATE FUNCTION aibilling.enqueue_usage() RETURNS trigger
LANGUAGE c AS 'MODULE_PATHNAME', 'aibilling_enqueue_usage';

CREATE FUNCTION aibilling.guard_usage() RETURNS trigger
LANGUAGE c AS 'MODULE_PATHNAME', 'aibilling_guard_usage';

CREATE FUNCTION aibilling.truncate_usage() RETURNS trigger
LANGUAGE c AS 'MODULE_PATHNAME', 'aibilling_truncate_usage';

CREATE FUNCTION aibilling.create_usage_table(name text, server name) RETURNS regclass
LANGUAGE c VOLATILE STRICT AS 'MODULE_PATHNAME', 'aibilling_create_usage_table';

CREATE FUNCTION aibilling.attach(usage regclass, server name, existing text DEFAULT 'ignore') RETURNS void
LANGUAGE c VOLATILE STRICT AS 'MODULE_PATHNAME', 'aibilling_attach';

CREATE FUNCTION aibilling.detach(usage regclass, pending text DEFAULT 'refuse') RETURNS void
LANGUAGE c VOLATILE STRICT AS 'MODULE_PATHNAME', 'aibilling_detach';

-- Operating

CREATE PROCEDURE aibilling.sync(server name DEFAULT NULL, timeout interval DEFAULT NULL)
LANGUAGE c AS 'MODULE_PATHNAME', 'aibilling_sync';

CREATE FUNCTION aibilling.preview(usage regclass, max_rows integer DEFAULT 10,
	OUT usage_id bigint, OUT state text, OUT event jsonb, OUT error text) RETURNS SETOF record
LANGUAGE c VOLATILE STRICT AS 'MODULE_PATHNAME', 'aibilling_preview';

CREATE FUNCTION aibilling.pause(server name DEFAULT NULL) RETURNS void
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'aibilling_pause';

CREATE FUNCTION aibilling.resume(server name DEFAULT NULL) RETURNS void
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'aibilling_resume';

CREATE FUNCTION aibilling.retry(usage regclass, ids bigint[] DEFAULT NULL) RETURNS bigint
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'aibilling_retry';

CREATE FUNCTION aibilling.arm() RETURNS void
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'aibilling_arm';

CREATE FUNCTION aibilling.reprice(usage regclass, from_time timestamptz DEFAULT '-infinity',
	to_time timestamptz DEFAULT 'infinity', dry_run boolean DEFAULT true,
	OUT usage_id bigint, OUT state text, OUT old_cost_nanos bigint, OUT new_cost_nanos bigint,
	OUT difference_nanos numeric, OUT action text) RETURNS SETOF record
LANGUAGE c VOLATILE STRICT AS 'MODULE_PATHNAME', 'aibilling_reprice';

CREATE FUNCTION aibilling.usage_status(usage regclass, id bigint,
	OUT state text, OUT delivery_id bigint, OUT sent_at timestamptz, OUT attempts integer,
	OUT error text) RETURNS record
LANGUAGE c STABLE STRICT AS 'MODULE_PATHNAME', 'aibilling_usage_status';

CREATE FUNCTION aibilling.status_rows(
	OUT usage_table regclass, OUT server name, OUT pending bigint, OUT pending_estimated boolean,
	OUT unpriced bigint, OUT rejected bigint, OUT in_flight bigint, OUT oldest timestamptz,
	OUT last_delivery timestamptz, OUT last_error text, OUT deliveries bigint, OUT delivered bigint,
	OUT duplicates bigint, OUT unexpected_duplicates bigint, OUT vanished bigint,
	OUT worker_pid integer, OUT status text) RETURNS SETOF record
LANGUAGE c STABLE AS 'MODULE_PATHNAME', 'aibilling_status';

CREATE VIEW aibilling.status AS SELECT * FROM aibilling.status_rows();

CREATE VIEW aibilling.unpriced WITH (security_barrier) AS
SELECT e.usage_table, e.error AS reason,
	sum(coalesce((SELECT sum(upper(r) - lower(r)) FROM unnest(e.ids) r),
				 e.last - e.first + 1))::bigint AS rows
FROM aibilling.outbox_entry e
WHERE e.state = 'u' AND aibilling.may_see(e.usage_table)
GROUP BY e.usage_table, e.error;

-- Event triggers: what becomes of the outbox when tables and servers go

CREATE FUNCTION aibilling.on_sql_drop() RETURNS event_trigger
LANGUAGE c AS 'MODULE_PATHNAME', 'aibilling_on_sql_drop';

CREATE FUNCTION aibilling.on_server_ddl() RETURNS event_trigger
LANGUAGE c AS 'MODULE_PATHNAME', 'aibilling_on_server_ddl';

CREATE EVENT TRIGGER aibilling_on_sql_drop ON sql_drop
	WHEN TAG IN ('DROP TABLE', 'DROP SCHEMA', 'DROP OWNED', 'DROP SERVER')
	EXECUTE FUNCTION aibilling.on_sql_drop();

CREATE EVENT TRIGGER aibilling_on_server_ddl ON ddl_command_end
	WHEN TAG IN ('CREATE SERVER', 'ALTER SERVER', 'CREATE USER MAPPING', 'ALTER USER MAPPING', 'DROP USER MAPPING')
	EXECUTE FUNCTION aibilling.on_server_ddl();

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

-- (catalogue: grants)

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
