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
