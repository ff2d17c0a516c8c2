\echo Use "ALTER EXTENSION aibilling_polar UPDATE TO '1.2'" to load this file. \quit

-- ---------------------------------------------------------------------------
-- What a row is, what Polar may have, and who may stop whom
-- ---------------------------------------------------------------------------

-- Attachments and ledger lie in tables of their own, which a role that may read
-- all data can dump.  People see them through the tables above these, whose
-- row-level security shows each owner their own.

ALTER TABLE aibilling.usage_table ADD COLUMN ledger_from bigint NOT NULL DEFAULT 0;
COMMENT ON COLUMN aibilling.usage_table.ledger_from IS
'Deliveries up to this one are of rows before the last TRUNCATE: they say nothing of rows that have come since';
ALTER TABLE aibilling.usage_table ADD COLUMN not_queued bigint NOT NULL DEFAULT 0;
COMMENT ON COLUMN aibilling.usage_table.not_queued IS
'Rows that were priced and not put into the outbox, because aibilling_polar.enqueue was off; shown by aibilling.status';
CREATE TABLE aibilling.attachment (
	PRIMARY KEY (usage)
) INHERITS (aibilling.usage_table);
COMMENT ON TABLE aibilling.attachment IS 'Private: the rows of aibilling.usage_table';

ALTER TABLE aibilling.delivery ADD COLUMN vanished_ids int8multirange;
COMMENT ON COLUMN aibilling.delivery.vanished_ids IS
'Ids of rows that were gone: those that come back with a partition, attached again, are sent then; NULL: none';
CREATE TABLE aibilling.ledger (
	id bigint NOT NULL DEFAULT nextval('aibilling.delivery_id_seq'),
	event_keys bytea,
	PRIMARY KEY (id)
) INHERITS (aibilling.delivery) WITH (autovacuum_vacuum_scale_factor = 0.05, toast_tuple_target = 8160);
ALTER TABLE aibilling.ledger ALTER COLUMN event_keys SET STORAGE MAIN;
COMMENT ON TABLE aibilling.ledger IS 'Private: the rows of aibilling.delivery';
COMMENT ON COLUMN aibilling.ledger.id IS 'Number of the delivery';
COMMENT ON COLUMN aibilling.ledger.event_keys IS
'While it is being sent: a checksum of each row''s external_id, in the order of the ids, by which a request built again leaves out rows that have come to have the ids since';
DROP INDEX aibilling.delivery_sending, aibilling.delivery_usage_ids;
CREATE INDEX ledger_sending ON aibilling.ledger (usage_table) WHERE state = 'sending';
CREATE INDEX ledger_usage_ids ON aibilling.ledger USING gist (usage_ids);
CREATE INDEX ledger_vanished ON aibilling.ledger (usage_table) WHERE vanished_ids IS NOT NULL;

CREATE FUNCTION aibilling.store_below() RETURNS trigger
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
	IF TG_TABLE_NAME = 'delivery' THEN
		INSERT INTO aibilling.ledger SELECT * FROM jsonb_populate_record(NULL::aibilling.ledger, to_jsonb(NEW));
		IF NEW.state IN ('sending', 'delivered') THEN
			INSERT INTO aibilling.share (delivery, usage_table) VALUES (NEW.id, NEW.usage_table);
		END IF;
	ELSE
		INSERT INTO aibilling.attachment SELECT * FROM jsonb_populate_record(NULL::aibilling.attachment, to_jsonb(NEW));
	END IF;
	RETURN NULL;
END
$$;
COMMENT ON FUNCTION aibilling.store_below() IS
'Trigger: what is inserted into aibilling.delivery or aibilling.usage_table, such as by a dump of version 1.1, goes to the table below it';
CREATE TRIGGER store_below BEFORE INSERT ON aibilling.delivery
	FOR EACH ROW EXECUTE FUNCTION aibilling.store_below();
CREATE TRIGGER store_below BEFORE INSERT ON aibilling.usage_table
	FOR EACH ROW EXECUTE FUNCTION aibilling.store_below();
COMMENT ON TRIGGER store_below ON aibilling.delivery IS 'Rows lie in aibilling.ledger';
COMMENT ON TRIGGER store_below ON aibilling.usage_table IS 'Rows lie in aibilling.attachment';

WITH moved AS (DELETE FROM ONLY aibilling.usage_table RETURNING *)
INSERT INTO aibilling.attachment SELECT * FROM moved;
WITH moved AS (DELETE FROM ONLY aibilling.delivery RETURNING *)
INSERT INTO aibilling.ledger SELECT * FROM moved;

-- No longer dumped: the tables above hold nothing.
ALTER EXTENSION aibilling_polar DROP TABLE aibilling.usage_table;
ALTER EXTENSION aibilling_polar ADD TABLE aibilling.usage_table;
ALTER EXTENSION aibilling_polar DROP TABLE aibilling.delivery;
ALTER EXTENSION aibilling_polar ADD TABLE aibilling.delivery;
SELECT pg_extension_config_dump('aibilling.attachment', '');
SELECT pg_extension_config_dump('aibilling.ledger', '');

-- The outbox: an entry of one id has it as its key, one of several the first id
-- of their block, so that the entries of an id are found under two keys.  Whoever
-- takes an id out of an entry writes a removal: its state is the capital letter.

ALTER TABLE aibilling.outbox_entry RENAME TO outbox_entry_1_1;
ALTER INDEX aibilling.outbox_entry_key RENAME TO outbox_entry_1_1_key;
CREATE TABLE aibilling.outbox_entry (
	usage_table regclass NOT NULL,
	state "char" NOT NULL,
	attempts integer NOT NULL,
	outcome_unknown boolean NOT NULL,
	not_before timestamptz NOT NULL,
	id bigint NOT NULL,
	ids int8multirange,
	error text
) WITH (autovacuum_vacuum_scale_factor = 0.02, autovacuum_analyze_scale_factor = 0.1);
CREATE INDEX outbox_entry_key
	ON aibilling.outbox_entry (usage_table, state, not_before, id);
CREATE INDEX outbox_entry_waiting
	ON aibilling.outbox_entry (usage_table, id) WHERE state = 'w';
COMMENT ON TABLE aibilling.outbox_entry IS
'Private: how aibilling.outbox is stored, ids of a block of 1,024 in one state. Its form may change in any version';
COMMENT ON COLUMN aibilling.outbox_entry.usage_table IS 'The attached table';
COMMENT ON COLUMN aibilling.outbox_entry.state IS
'p: to be sent; w: to be sent, but not before not_before; u: waits for a price; r: rejected, waits for an UPDATE or aibilling.retry(). A capital letter: the ids are no longer in that state. n: priced and not queued, to be counted. v: id and ids are OIDs of partitions that were attached, to be looked at';
COMMENT ON COLUMN aibilling.outbox_entry.attempts IS 'How often the rows have been sent in vain';
COMMENT ON COLUMN aibilling.outbox_entry.outcome_unknown IS
'Whether an earlier request may have stored the rows: duplicates of them are expected, and they cannot be changed';
COMMENT ON COLUMN aibilling.outbox_entry.not_before IS 'Of state w: when the rows may be sent; -infinity in all others';
COMMENT ON COLUMN aibilling.outbox_entry.id IS 'The id, or of several ids the first of their block';
COMMENT ON COLUMN aibilling.outbox_entry.ids IS 'The ids; NULL: only id';
COMMENT ON COLUMN aibilling.outbox_entry.error IS 'Why the rows wait; NULL: only for their turn';

INSERT INTO aibilling.outbox_entry
SELECT usage_table, state, attempts, maybe_sent, not_before,
	CASE WHEN first = last THEN first ELSE first & -1024 END,
	CASE WHEN first < last THEN coalesce(ids, int8multirange(int8range(first, nullif(last, 9223372036854775807) + 1))) END,
	error
FROM aibilling.outbox_entry_1_1;

CREATE FUNCTION aibilling.waiting_ids(usage_table regclass, state "char", entry tid, id bigint, ids int8multirange)
RETURNS int8multirange
LANGUAGE c STABLE AS 'MODULE_PATHNAME', 'abp_sql_waiting_ids';
COMMENT ON FUNCTION aibilling.waiting_ids(regclass, "char", tid, bigint, int8multirange) IS
'For aibilling.outbox: which ids of an outbox entry are in its state still. None of a table that the caller may not see';

CREATE OR REPLACE VIEW aibilling.outbox WITH (security_barrier) AS
SELECT e.usage_table,
	i.usage_id,
	CASE e.state WHEN 'u' THEN 'unpriced' WHEN 'r' THEN 'rejected' ELSE 'pending' END AS state,
	e.attempts,
	nullif(e.not_before, '-infinity'::timestamptz) AS not_before,
	e.error,
	e.outcome_unknown
FROM aibilling.outbox_entry e,
	LATERAL unnest(aibilling.waiting_ids(e.usage_table, e.state, e.ctid, e.id, e.ids)) r,
	LATERAL generate_series(lower(r), coalesce(upper(r) - 1, 9223372036854775807)) AS i (usage_id)
WHERE e.state IN ('p', 'w', 'u', 'r') AND aibilling.may_see(e.usage_table);
COMMENT ON COLUMN aibilling.outbox.state IS
'pending: to be sent; unpriced: waits for a price; rejected: cannot be sent until an UPDATE fixes it or aibilling.retry() releases it';
COMMENT ON COLUMN aibilling.outbox.outcome_unknown IS
'Whether Polar may have it, from a request whose answer was lost or not recorded here: it cannot be changed or deleted until an answer says';

CREATE OR REPLACE VIEW aibilling.unpriced WITH (security_barrier) AS
SELECT e.usage_table, e.error AS reason,
	sum((SELECT sum(coalesce(upper(r), 9223372036854775807) - lower(r)) FROM unnest(w) r))::bigint AS rows
FROM aibilling.outbox_entry e,
	LATERAL aibilling.waiting_ids(e.usage_table, e.state, e.ctid, e.id, e.ids) w
WHERE e.state = 'u' AND aibilling.may_see(e.usage_table) AND NOT isempty(w)
GROUP BY e.usage_table, e.error;

ALTER EXTENSION aibilling_polar DROP TABLE aibilling.outbox_entry_1_1;
DROP TABLE aibilling.outbox_entry_1_1;
SELECT pg_extension_config_dump('aibilling.outbox_entry', '');

-- A DELETE is judged when its statement has done all its work: a row that has
-- moved to another partition is still there then.

COMMENT ON FUNCTION aibilling.guard_usage() IS
'Trigger AFTER DELETE of a usage table: takes a waiting row out of the outbox; raises object_not_in_prerequisite_state for a row that Polar may be getting. A row that the same statement has put into another partition is not deleted';
DO $$
DECLARE
	usage regclass;
BEGIN
	FOR usage IN SELECT a.usage FROM aibilling.attachment a JOIN pg_class c ON c.oid = a.usage LOOP
		EXECUTE format('DROP TRIGGER IF EXISTS zz_aibilling_guard ON %s', usage);
		EXECUTE format('CREATE TRIGGER zz_aibilling_guard AFTER DELETE ON %s FOR EACH ROW EXECUTE FUNCTION aibilling.guard_usage()', usage);
	END LOOP;
END
$$;
COMMENT ON FUNCTION aibilling.truncate_usage() IS
'Trigger BEFORE TRUNCATE of a usage table: empties its outbox, with a WARNING that gives the number of rows that were not delivered; raises object_in_use while rows are in flight';

CREATE FUNCTION aibilling.on_table_ddl() RETURNS event_trigger
LANGUAGE c AS 'MODULE_PATHNAME', 'abp_sql_on_table_ddl';
COMMENT ON FUNCTION aibilling.on_table_ddl() IS
'Event trigger: rows that come back with a partition, attached again, before they were sent are put into the outbox again';
CREATE EVENT TRIGGER aibilling_on_table_ddl ON ddl_command_end
	WHEN TAG IN ('ALTER TABLE')
	EXECUTE FUNCTION aibilling.on_table_ddl();
COMMENT ON EVENT TRIGGER aibilling_on_table_ddl IS
'Keeps the outbox in step with partitions (extension aibilling_polar)';

REVOKE ALL ON aibilling.attachment, aibilling.ledger, aibilling.outbox_entry FROM PUBLIC;
REVOKE ALL ON FUNCTION aibilling.store_below(), aibilling.on_table_ddl() FROM PUBLIC;

-- ---------------------------------------------------------------------------
-- Copies, dumps, replication, and clients as people have them
-- ---------------------------------------------------------------------------

-- A publication FOR ALL TABLES refuses UPDATE and DELETE of a table without a
-- replica identity.  An index of its own would cost every entry of the outbox;
-- this costs nothing but where wal_level is logical, and there only DELETE.
ALTER TABLE aibilling.outbox_entry REPLICA IDENTITY FULL;
ALTER TABLE aibilling.database_identity REPLICA IDENTITY FULL;
-- Their keys have columns that may be NULL, which no replica identity may.
ALTER TABLE aibilling.price REPLICA IDENTITY FULL;
ALTER TABLE aibilling.price_quarantine REPLICA IDENTITY FULL;

COMMENT ON TABLE aibilling.database_identity IS
'Private: the database that may send, written when the first table is attached and by aibilling.arm(). A copy finds another identity here than its own, a subscriber to these tables finds its publisher''s beside its own: neither sends';

-- What the outbox holds is named when it goes with the extension.

CREATE FUNCTION aibilling.on_drop_extension() RETURNS event_trigger
LANGUAGE c AS 'MODULE_PATHNAME', 'abp_sql_on_drop_extension';
COMMENT ON FUNCTION aibilling.on_drop_extension() IS
'Event trigger: loads the library, which warns (with the number of rows not delivered) when the outbox is dropped with the extension';
REVOKE ALL ON FUNCTION aibilling.on_drop_extension() FROM PUBLIC;

CREATE EVENT TRIGGER aibilling_on_drop_extension ON ddl_command_start
	WHEN TAG IN ('DROP EXTENSION', 'DROP OWNED')
	EXECUTE FUNCTION aibilling.on_drop_extension();
COMMENT ON EVENT TRIGGER aibilling_on_drop_extension IS
'Warns of rows that DROP EXTENSION takes from the outbox (extension aibilling_polar)';

-- ---------------------------------------------------------------------------
-- Prices, and what replies cost
-- ---------------------------------------------------------------------------

-- What a catalogue says of a price that it does not give, what it knows of long
-- prompts in other service tiers, and what it calls its models.

ALTER TABLE aibilling.price ADD COLUMN inherit boolean NOT NULL DEFAULT true;
COMMENT ON COLUMN aibilling.price.inherit IS
'What the row leaves NULL: true, as in the row with context_above 0, or as all day; false, unknown';
COMMENT ON COLUMN aibilling.price.context_above IS
'The row applies to requests with more input_tokens than this; an inclusive threshold N is written N - 1. What it leaves NULL is as in the row with 0, unless inherit is false';
ALTER TABLE aibilling.price_quarantine
	ADD COLUMN inherit boolean NOT NULL DEFAULT true,
	ADD COLUMN note text;
COMMENT ON COLUMN aibilling.price_quarantine.inherit IS 'As aibilling.price.inherit';
COMMENT ON COLUMN aibilling.price_quarantine.note IS 'As aibilling.price.note';
COMMENT ON COLUMN aibilling.price_quarantine.quarantined_at IS
'Since when a card of this model and service tier is held back, whatever further imports found';
COMMENT ON TYPE aibilling.catalogue_price IS
'one price of a catalogue, in the units of aibilling.price; price_column is a column of that table or units.KEY, or inherit with the price 0: what this row leaves out is unknown; valid_from NULL means that the catalogue gives no date; price NULL means that it cannot be used, for the reason in problem; problem beside a price is a remark';

-- For names whose exact spelling finds nothing.
CREATE INDEX price_folded_model ON aibilling.price (lower(model));
COMMENT ON INDEX aibilling.price_folded_model IS 'Finds a model in any case';
CREATE INDEX model_alias_folded_pattern ON aibilling.model_alias (lower(pattern));
COMMENT ON INDEX aibilling.model_alias_folded_pattern IS 'Finds an exact alias in any case';
CREATE INDEX model_alias_folded_glob ON aibilling.model_alias (translate(lower(provider), '_', '-')) WHERE kind = 'glob';
COMMENT ON INDEX aibilling.model_alias_folded_glob IS 'Finds the globs of a provider in any case';

CREATE OR REPLACE FUNCTION aibilling.stored_prices(source text) RETURNS SETOF aibilling.catalogue_price
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
			('discount', p.discount), ('multiplier', p.multiplier),
			('inherit', CASE WHEN NOT p.inherit THEN 0 END)
		UNION ALL
		SELECT 'units.' || u.key, aibilling.catalogue_number(u.value)
		FROM jsonb_each(p.units) u
	) AS c (price_column, price)
	WHERE p.source = stored_prices.source AND c.price IS NOT NULL
$$;

-- An image has a hundred tokens and more, and none of them costs more than some
-- ten or twenty tokens of text of its model.
CREATE FUNCTION aibilling.image_price_is_by_token(image numeric, token numeric) RETURNS boolean
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN CASE
	WHEN token > 0 AND image <= 40 * token THEN true
	WHEN token > 0 AND image >= 80 * token THEN false
	WHEN token > 0 THEN NULL
	WHEN image < 0.00005 THEN true
	WHEN image >= 0.001 THEN false
	END;
COMMENT ON FUNCTION aibilling.image_price_is_by_token(numeric, numeric) IS
'whether a price of images in USD is by their token, judged by the price of a token of text in USD (NULL or 0: none is known); NULL: that cannot be told';

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
'the prices in one pricing object of OpenRouter or Narev; its member reference has the prices that an override changes; zero_is_unset: 0 means that the price is not known, except of prompt and completion';

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

-- The planner takes every array for one of ten elements and would compare all of
-- a catalogue with all of it: hence enable_nestloop below, and no compilation for
-- the costs that this seems to have.

-- genai-prices computes a part that has no price of its own with the price of
-- what it is a part of.  What its prices say is what it computes.
CREATE FUNCTION aibilling.complete_prices(prices aibilling.catalogue_price[]) RETURNS SETOF aibilling.catalogue_price
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
'the prices of genai-prices with those that it only implies: a part without a price of its own costs what its total costs; the remark in problem says so';

-- What genai-prices has otherwise than the provider publishes it.
CREATE FUNCTION aibilling.correct_genai_prices(prices aibilling.catalogue_price[]) RETURNS SETOF aibilling.catalogue_price
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
'the prices of genai-prices, with what it lacks or has otherwise than the provider publishes it: names of Mistral''s that lead to the newest model, fees of Perplexity''s by the size of the search context, rerank models of Cohere''s, speech of OpenAI''s';

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
'the prices in the data.json of pydantic''s genai-prices (USD per million tokens, thousand requests, hour; dates, daily windows, context tiers), completed by complete_prices';

-- A name that a rule leaves open at its end is narrowed to what marks a date or
-- version of the same model, as dev/update-prices does it for the bundle.
CREATE FUNCTION aibilling.genai_names(catalogue jsonb) RETURNS jsonb
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
'the names that the match rules of genai-prices give to models, as patterns of aibilling.model_alias: [{provider, model, exact: [], glob: []}, ...]';


CREATE FUNCTION aibilling.put_aliases(names jsonb, fallbacks jsonb, source text) RETURNS bigint
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
SET enable_nestloop = off
SET jit = off
AS $$
#variable_conflict use_column
DECLARE
	written bigint;
BEGIN
	-- A provider's names are its models' ids, their exact aliases and globs.
	-- Some providers sell what is another's and price it alike (fallbacks).  All
	-- of it ranks below the priority 0 of a user's alias.
	WITH model AS MATERIALIZED (
		SELECT m.*, n.ordinality AS n
		FROM jsonb_array_elements(names) WITH ORDINALITY AS n
		CROSS JOIN LATERAL jsonb_to_record(n.value) AS m (provider text, model text, exact jsonb, glob jsonb)
	), own AS (
		SELECT provider, 'exact' AS kind, model AS pattern, provider AS to_provider, model AS to_model, -1 AS priority, 0 AS n
		FROM model
		UNION ALL
		SELECT m.provider, 'exact', e.value, m.provider, m.model, -1, m.n
		FROM model m CROSS JOIN LATERAL jsonb_array_elements_text(m.exact) e
		UNION ALL
		SELECT m.provider, 'glob', e.value, m.provider, m.model, -1, m.n
		FROM model m CROSS JOIN LATERAL jsonb_array_elements_text(m.glob) e
	), sold AS (
		SELECT * FROM own
		UNION ALL
		SELECT f.key, o.kind, o.pattern, o.to_provider, o.to_model, o.priority - 1, o.n
		FROM jsonb_each(fallbacks) f
		CROSS JOIN LATERAL jsonb_array_elements_text(f.value) t
		JOIN own o ON o.provider = t.value
	), name AS (
		SELECT DISTINCT ON (provider, kind, pattern) *
		FROM sold
		ORDER BY provider, kind, pattern, priority DESC, n, to_provider, to_model
	)
	INSERT INTO aibilling.model_alias AS a (provider, kind, pattern, to_provider, to_model, priority, source)
		SELECT provider, kind, pattern, to_provider, to_model, priority, put_aliases.source
		FROM name
		-- a name that has a card of its own leads to that
		WHERE NOT (kind = 'exact' AND EXISTS (SELECT FROM aibilling.price p
			WHERE (p.provider, p.model, p.source) = (name.provider, name.pattern, put_aliases.source)))
	ON CONFLICT (provider, kind, pattern, source) DO UPDATE
		SET to_provider = excluded.to_provider, to_model = excluded.to_model, priority = excluded.priority
		WHERE (a.to_provider, a.to_model, a.priority) IS DISTINCT FROM (excluded.to_provider, excluded.to_model, excluded.priority);
	GET DIAGNOSTICS written = ROW_COUNT;
	RETURN written;
END
$$;
COMMENT ON FUNCTION aibilling.put_aliases(jsonb, jsonb, text) IS
'writes the names of models ([{provider, model, exact: [], glob: []}, ...]) and of those that a provider sells as well ({provider: [other, ...]}) into aibilling.model_alias under a source; returns how many changed';

-- Prices as cards: what is charged by the piece costs the same in each service
-- tier; what a tier costs beyond a step of the standard tier is said, or unknown.
CREATE OR REPLACE FUNCTION aibilling.clean_prices(prices aibilling.catalogue_price[]) RETURNS SETOF aibilling.catalogue_price
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET enable_nestloop = off
SET jit = off
AS $$
	WITH cleaned AS MATERIALIZED (
		-- units are jsonb and hold any number of decimals, the columns 9
		SELECT p.provider, p.model, p.service_tier, p.context_above, p.valid_from, p.daily_from, p.daily_to,
			p.price_column, p.price, p.problem, p.n,
			c.clean, CASE WHEN p.price_column LIKE 'units.%' THEN c.clean ELSE round(c.clean, 9) END AS stored
		FROM unnest(prices) WITH ORDINALITY AS p (provider, model, service_tier, context_above, valid_from,
			daily_from, daily_to, price_column, price, problem, n)
		CROSS JOIN LATERAL aibilling.clean_price(p.price) AS c (clean)
	), usable AS MATERIALIZED (
		SELECT c.*, first_value(n) OVER slot AS first_n, first_value(stored) OVER slot AS first_stored
		FROM cleaned c
		WHERE price IS NOT NULL AND provider <> '' AND model <> ''
			AND abs(stored - clean) <= abs(clean) / 1000000
		WINDOW slot AS (PARTITION BY provider, model, service_tier, context_above, valid_from, daily_from, daily_to, price_column
			ORDER BY n)
	), priced AS MATERIALIZED (
		SELECT * FROM usable WHERE n = first_n
	), piece AS (
		-- A service tier changes what tokens cost.  What is charged by the piece
		-- costs the same in each, unless the catalogue says otherwise.
		SELECT t.provider, t.model, t.service_tier, t.valid_from, s.price_column, s.stored
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
	), base AS (
		-- what a tier costs without a step
		SELECT provider, model, service_tier, valid_from, price_column, stored
		FROM priced
		WHERE service_tier <> 'standard' AND context_above = 0 AND daily_from IS NULL
		UNION ALL
		SELECT * FROM piece
	), long AS MATERIALIZED (
		-- What it costs beyond each step that the standard tier takes: what the
		-- catalogue says; where the standard tier takes none in this price, the
		-- same; half the standard price if it is half without the step, as
		-- service_tier_rule has it; or nobody knows.
		SELECT b.provider, b.model, b.service_tier, w.context_above, b.valid_from, b.price_column,
			o.n IS NOT NULL AS given,
			CASE
				WHEN o.n IS NOT NULL THEN o.stored
				WHEN s.n IS NULL THEN b.stored
				WHEN b.service_tier IN ('batch', 'flex') AND 2 * b.stored = f.stored THEN s.stored / 2
			END AS price,
			o.n IS NULL AND s.n IS NOT NULL AS follows
		FROM base b
		JOIN (SELECT DISTINCT provider, model, valid_from, context_above FROM priced
			WHERE service_tier = 'standard' AND context_above > 0 AND daily_from IS NULL) AS w
			ON (w.provider, w.model) = (b.provider, b.model) AND w.valid_from IS NOT DISTINCT FROM b.valid_from
		LEFT JOIN priced s ON (s.provider, s.model, s.service_tier, s.context_above, s.price_column)
				= (b.provider, b.model, 'standard', w.context_above, b.price_column)
			AND s.valid_from IS NOT DISTINCT FROM b.valid_from AND s.daily_from IS NULL
		LEFT JOIN priced f ON (f.provider, f.model, f.service_tier, f.context_above, f.price_column)
				= (b.provider, b.model, 'standard', 0, b.price_column)
			AND f.valid_from IS NOT DISTINCT FROM b.valid_from AND f.daily_from IS NULL
		LEFT JOIN priced o ON (o.provider, o.model, o.service_tier, o.context_above, o.price_column)
				= (b.provider, b.model, b.service_tier, w.context_above, b.price_column)
			AND o.valid_from IS NOT DISTINCT FROM b.valid_from AND o.daily_from IS NULL
	), unknown AS (
		SELECT provider, model, service_tier, context_above, valid_from,
			string_agg(replace(price_column, 'units.', ''), ', ' ORDER BY price_column) AS columns
		FROM long
		WHERE price IS NULL
		GROUP BY provider, model, service_tier, context_above, valid_from
	)
	SELECT provider, model, service_tier, context_above, valid_from, daily_from, daily_to, price_column,
		trim_scale(stored),
		nullif(concat_ws('; ', problem, CASE WHEN abs(stored - price) > abs(price) / 1000000000
			THEN 'rounded from ' || trim_scale(price) END), '')
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
	SELECT provider, model, service_tier, context_above, valid_from, daily_from, daily_to, price_column,
		NULL, format('the catalogue gives this price twice: %s is taken, not %s', trim_scale(first_stored), trim_scale(stored))
	FROM usable
	WHERE n <> first_n AND stored <> first_stored
	UNION ALL
	SELECT provider, model, service_tier, 0, valid_from, NULL, NULL, price_column, trim_scale(stored), NULL
	FROM piece
	UNION ALL
	SELECT l.provider, l.model, l.service_tier, l.context_above, l.valid_from, NULL, NULL, l.price_column, trim_scale(l.price),
		CASE WHEN l.follows THEN 'half of standard, as without the step' END
	FROM long l
	LEFT JOIN unknown u ON (u.provider, u.model, u.service_tier, u.context_above)
			= (l.provider, l.model, l.service_tier, l.context_above)
		AND u.valid_from IS NOT DISTINCT FROM l.valid_from
	WHERE l.price IS NOT NULL AND NOT l.given AND (l.follows OR u.provider IS NOT NULL)
	UNION ALL
	SELECT provider, model, service_tier, context_above, valid_from, NULL, NULL, 'inherit', 0,
		format('the catalogue does not say what %s costs beyond this step in this service tier', columns)
	FROM unknown
$$;

-- A price for what had none is no change: it holds from where the card does.  And
-- a price that the catalogue only implies is not a suspicious one.
CREATE OR REPLACE FUNCTION aibilling.changed_cards(prices aibilling.catalogue_price[], source text)
RETURNS SETOF aibilling.price_card
LANGUAGE sql STABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET enable_nestloop = off
SET jit = off
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
				WHEN c.first_date <= now() OR a.only_unknown THEN c.stored_from
				ELSE now()
			END AS valid_from
		FROM compared c
		-- Prices of what had none change no cost that was known; but reasoning
		-- without a price costs what output does, a request nothing.
		CROSS JOIN LATERAL (
			SELECT c.stored_content <@ c.content AND NOT EXISTS (
				SELECT FROM jsonb_object_keys(c.content) AS k (slot)
				CROSS JOIN LATERAL regexp_replace(k.slot, '^.*\|', '') AS n (price_column)
				WHERE NOT c.stored_content ? k.slot
					AND (n.price_column IN ('reasoning', 'request', 'discount', 'multiplier', 'inherit')
						OR EXISTS (SELECT FROM jsonb_object_keys(c.stored_content) AS s (slot)
							WHERE regexp_replace(s.slot, '^.*\|', '') = n.price_column))) AS only_unknown
		) AS a
		WHERE c.stored_content IS DISTINCT FROM c.content
			OR c.valid_from IS NOT NULL AND c.stored_from <> c.valid_from
	), row_price AS (
		SELECT d.provider, d.model, d.service_tier, d.given_from, g.context_above, g.daily_from, g.daily_to,
			max(g.price) FILTER (WHERE g.price_column = 'input') AS input,
			max(g.price) FILTER (WHERE g.price_column = 'output') AS output,
			max(g.price) FILTER (WHERE g.price_column = 'cache_read') AS cache_read,
			max(g.price) FILTER (WHERE g.price_column = 'cache_write_1h'
				AND g.problem NOT LIKE 'as %' IS NOT FALSE) AS cache_write_1h
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
DROP FUNCTION aibilling.price_rows(aibilling.catalogue_price[], aibilling.price_card[]);
CREATE FUNCTION aibilling.price_rows(prices aibilling.catalogue_price[], cards aibilling.price_card[])
RETURNS TABLE (provider text, model text, service_tier text, context_above bigint, valid_from timestamptz,
	daily_from time, daily_to time, input numeric, output numeric, cache_read numeric, cache_write numeric,
	cache_write_1h numeric, reasoning numeric, request numeric, web_search numeric, units jsonb, discount numeric,
	multiplier numeric, inherit boolean, note text, reason text)
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET enable_nestloop = off
SET jit = off
AS $$
	WITH price AS MATERIALIZED (
		SELECT c.provider, c.model, c.service_tier, p.context_above, c.valid_from, p.daily_from, p.daily_to,
			p.price_column, p.price, p.problem, c.reason
		FROM unnest(cards) AS c
		JOIN unnest(prices) AS p ON (p.provider, p.model, p.service_tier) = (c.provider, c.model, c.service_tier)
			AND p.valid_from IS NOT DISTINCT FROM c.given_from
		WHERE p.price IS NOT NULL
	), priced AS (
		SELECT p.provider, p.model, p.service_tier, p.context_above, p.valid_from, p.daily_from, p.daily_to,
			jsonb_object_agg(p.price_column, p.price) AS prices,
			array_agg(p.price_column) FILTER (WHERE p.problem IS NOT NULL) AS columns,
			array_agg(p.problem) FILTER (WHERE p.problem IS NOT NULL) AS remarks,
			p.reason
		FROM price p
		GROUP BY p.provider, p.model, p.service_tier, p.context_above, p.valid_from, p.daily_from, p.daily_to, p.reason
	)
	SELECT p.provider, p.model, p.service_tier, p.context_above, p.valid_from, p.daily_from, p.daily_to,
		c.input, c.output, c.cache_read, c.cache_write, c.cache_write_1h, c.reasoning, c.request, c.web_search,
		(SELECT jsonb_object_agg(substr(u.key, 7), u.value) FROM jsonb_each(p.prices) u WHERE u.key LIKE 'units.%'),
		c.discount, c.multiplier, NOT p.prices ? 'inherit',
		(
			SELECT string_agg(r.remark, '; ' ORDER BY r.remark)
			FROM (
				SELECT CASE WHEN bool_or(l.price_column = 'inherit') THEN l.remark
					ELSE l.remark || ': ' || string_agg(replace(l.price_column, 'units.', ''), ', ' ORDER BY l.price_column) END AS remark
				FROM unnest(p.columns, p.remarks) AS l (price_column, remark)
				GROUP BY l.remark
			) AS r
		), p.reason
	FROM priced p
	CROSS JOIN LATERAL jsonb_to_record(p.prices) AS c (input numeric, output numeric, cache_read numeric, cache_write numeric,
		cache_write_1h numeric, reasoning numeric, request numeric, web_search numeric, discount numeric, multiplier numeric)
$$;
COMMENT ON FUNCTION aibilling.price_rows(aibilling.catalogue_price[], aibilling.price_card[]) IS
'the prices of the cards as rows of aibilling.price; the note has the remarks on them';

CREATE OR REPLACE FUNCTION aibilling.import_prices(catalogue jsonb, format text, dry_run boolean DEFAULT true)
RETURNS SETOF aibilling.price_change
LANGUAGE plpgsql VOLATILE STRICT PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
	prices aibilling.catalogue_price[];
	cards aibilling.price_card[];
	shape text := CASE WHEN format = 'genai-prices' THEN 'array' ELSE 'object' END;
	held bigint;
	held_models text;
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

	SELECT count(*), string_agg(DISTINCT format('%s/%s', c.provider, c.model), ', ') INTO held, held_models
	FROM unnest(cards) AS c
	WHERE c.reason IS NOT NULL;
	IF held > 0 THEN
		RAISE NOTICE '% of the prices of % are suspicious and are held back: %', held, format,
				CASE WHEN length(held_models) > 300 THEN left(held_models, 300) || ' ...' ELSE held_models END
			USING HINT = 'Look at them in aibilling.price_quarantine, with the reason; aibilling.release_price() applies one, DELETE forgets it.';
		IF NOT dry_run THEN
			RAISE LOG 'aibilling_polar: % prices of % are held in aibilling.price_quarantine, imported by "%"', held, format, session_user;
		END IF;
	END IF;

	IF dry_run THEN
		RETURN;
	END IF;

	DELETE FROM aibilling.price p
	USING unnest(cards) AS c
	WHERE p.source = format AND c.reason IS NULL
		AND (p.provider, p.model, p.service_tier, p.valid_from) = (c.provider, c.model, c.service_tier, c.valid_from);
	INSERT INTO aibilling.price (provider, model, service_tier, context_above, valid_from, source, daily_from, daily_to,
			input, output, cache_read, cache_write, cache_write_1h, reasoning, request, web_search, units, discount, multiplier,
			inherit, note)
		SELECT provider, model, service_tier, context_above, valid_from, format, daily_from, daily_to,
			input, output, cache_read, cache_write, cache_write_1h, reasoning, request, web_search, units, discount, multiplier,
			inherit, note
		FROM aibilling.price_rows(prices, cards)
		WHERE reason IS NULL;

	-- A card that is fine now, or suspicious in another way, was judged anew.
	WITH judged AS (
		DELETE FROM aibilling.price_quarantine q
		USING unnest(prices) AS g
		WHERE q.source = format AND (q.provider, q.model, q.service_tier) = (g.provider, g.model, g.service_tier)
		RETURNING q.*
	), since AS (
		SELECT provider, model, service_tier, min(quarantined_at) AS since
		FROM judged
		GROUP BY provider, model, service_tier
	)
	INSERT INTO aibilling.price_quarantine (provider, model, service_tier, context_above, valid_from, source, daily_from, daily_to,
			input, output, cache_read, cache_write, cache_write_1h, reasoning, request, web_search, units, discount, multiplier,
			inherit, note, reason, quarantined_at)
		SELECT provider, model, service_tier, context_above, valid_from, format, daily_from, daily_to,
			input, output, cache_read, cache_write, cache_write_1h, reasoning, request, web_search, units, discount, multiplier,
			inherit, note, reason, coalesce(since, now())
		FROM aibilling.price_rows(prices, cards)
		LEFT JOIN since USING (provider, model, service_tier)
		WHERE reason IS NOT NULL;

	IF format = 'genai-prices' THEN
		PERFORM aibilling.put_aliases(
			(SELECT jsonb_agg(n.value ORDER BY n.ordinality)
			 FROM jsonb_array_elements(aibilling.genai_names(catalogue)) WITH ORDINALITY n
			 WHERE EXISTS (SELECT FROM aibilling.price s
				WHERE (s.provider, s.model, s.source) = (n.value ->> 'provider', n.value ->> 'model', 'genai-prices'))),
			(SELECT coalesce(jsonb_object_agg(p.value ->> 'id', p.value -> 'fallback_model_providers'), '{}')
			 FROM jsonb_array_elements(catalogue) p
			 WHERE jsonb_typeof(p.value -> 'fallback_model_providers') = 'array'),
			'genai-prices');
	END IF;
END
$$;
COMMENT ON FUNCTION aibilling.import_prices(jsonb, text, boolean) IS
'imports a price catalogue (format litellm, models.dev, genai-prices, openrouter or narev) into aibilling.price under the format''s name as source, and the names of models that genai-prices gives into aibilling.model_alias; returns one row a price that is added, changed, removed, quarantined or skipped, or an entry that names a model of another; a NOTICE says what is held back; with dry_run nothing is written';

CREATE OR REPLACE FUNCTION aibilling.release_price(source text, provider text, model text, service_tier text DEFAULT 'standard')
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
			input, output, cache_read, cache_write, cache_write_1h, reasoning, request, web_search, units, discount, multiplier,
			inherit, note)
		SELECT m.provider, m.model, m.service_tier, m.context_above, m.valid_from, m.source, m.daily_from, m.daily_to,
			m.input, m.output, m.cache_read, m.cache_write, m.cache_write_1h, m.reasoning, m.request, m.web_search,
			m.units, m.discount, m.multiplier, m.inherit,
			concat_ws('; ', 'released from quarantine: ' || m.reason, m.note)
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

CREATE OR REPLACE FUNCTION aibilling.load_bundled_prices(
	OUT package text, OUT package_version text, OUT generated date,
	OUT models bigint, OUT prices bigint, OUT aliases bigint)
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
	bundle jsonb := aibilling.bundled_prices();
	given aibilling.catalogue_price[];
BEGIN
	package := bundle ->> 'package';
	package_version := bundle ->> 'package_version';
	generated := bundle ->> 'generated';
	models := jsonb_array_length(bundle -> 'models');

	LOCK TABLE aibilling.price IN SHARE ROW EXCLUSIVE MODE;
	PERFORM aibilling.register_price_source('bundled');
	DELETE FROM aibilling.price WHERE source = 'bundled';
	DELETE FROM aibilling.model_alias WHERE source = 'bundled';

	given := ARRAY(
		SELECT ROW(m.provider, m.model, 'standard', coalesce((c.value ->> 'context_above')::bigint, 0),
			(c.value ->> 'valid_from')::timestamptz, (c.value ->> 'daily_from')::time, (c.value ->> 'daily_to')::time,
			k.price_column, aibilling.catalogue_number(k.price), NULL)::aibilling.catalogue_price
		FROM jsonb_to_recordset(bundle -> 'models') AS m (provider text, model text, cards jsonb)
		CROSS JOIN LATERAL jsonb_array_elements(m.cards) c
		CROSS JOIN LATERAL (
			SELECT key, value FROM jsonb_each(c.value)
			WHERE key NOT IN ('context_above', 'valid_from', 'daily_from', 'daily_to', 'units')
			UNION ALL
			SELECT 'units.' || key, value FROM jsonb_each(c.value -> 'units')
		) AS k (price_column, price));
	given := ARRAY(SELECT p FROM aibilling.correct_genai_prices(given) p);
	given := ARRAY(SELECT p FROM aibilling.complete_prices(given) p);
	INSERT INTO aibilling.price (provider, model, service_tier, context_above, valid_from, source, daily_from, daily_to,
			input, output, cache_read, cache_write, cache_write_1h, reasoning, request, web_search, units, inherit, note)
		SELECT provider, model, service_tier, context_above, valid_from, 'bundled', daily_from, daily_to,
			input, output, cache_read, cache_write, cache_write_1h, reasoning, request, web_search, units, inherit, note
		FROM aibilling.price_rows(given, ARRAY(
			SELECT DISTINCT ROW(provider, model, service_tier, valid_from, NULL, coalesce(valid_from, '-infinity'), NULL)::aibilling.price_card
			FROM unnest(given)));
	GET DIAGNOSTICS prices = ROW_COUNT;

	aliases := aibilling.put_aliases(bundle -> 'models', bundle -> 'fallbacks', 'bundled');
END
$$;

-- The way out of "unpriced".

CREATE FUNCTION aibilling.priced_model(provider text, model text, OUT card_provider text, OUT card_model text)
AS 'MODULE_PATHNAME', 'abp_sql_priced_model'
LANGUAGE C STABLE CALLED ON NULL INPUT PARALLEL SAFE;
COMMENT ON FUNCTION aibilling.priced_model(text, text) IS
'The provider and model in aibilling.price whose cards price usage of these names, at whatever time; NULL: none';

CREATE FUNCTION aibilling.card_in_force(provider text, model text, service_tier text, at timestamptz,
	OUT source text, OUT valid_from timestamptz)
LANGUAGE sql STABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
	SELECT c.source, c.valid_from
	FROM (
		SELECT p.source, max(p.valid_from) AS valid_from
		FROM aibilling.price p
		WHERE (p.provider, p.model, p.service_tier)
				= (card_in_force.provider, card_in_force.model, card_in_force.service_tier)
			AND p.valid_from <= card_in_force.at
		GROUP BY p.source
	) AS c
	LEFT JOIN aibilling.price_source s USING (source)
	ORDER BY source <> 'user', s.priority NULLS LAST, source
	LIMIT 1
$$;
COMMENT ON FUNCTION aibilling.card_in_force(text, text, text, timestamptz) IS
'The card of a service tier that goes first at a time, names as in aibilling.price; NULL: none';

-- A note has remarks such as "as input: cache_read, cache_write", separated by "; ".
CREATE FUNCTION aibilling.note_without(note text, price_columns text[]) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
	SELECT string_agg(CASE WHEN l.listed IS NULL THEN r.remark ELSE l.listed[1] || ': ' || k.kept END, '; ' ORDER BY r.n)
	FROM string_to_table(note, '; ') WITH ORDINALITY AS r (remark, n)
	CROSS JOIN LATERAL regexp_match(r.remark, '^(.*): ([a-z0-9_]+(?:, [a-z0-9_]+)*)$') AS l (listed)
	CROSS JOIN LATERAL (
		SELECT string_agg(c, ', ' ORDER BY n) FROM string_to_table(l.listed[2], ', ') WITH ORDINALITY AS c (c, n)
		WHERE c <> ALL (price_columns)
	) AS k (kept)
	WHERE l.listed IS NULL OR k.kept IS NOT NULL
$$;
COMMENT ON FUNCTION aibilling.note_without(text, text[]) IS
'the note of a price without what its remarks say of these prices';

CREATE FUNCTION aibilling.changed_price(price aibilling.price, given jsonb, given_units jsonb) RETURNS aibilling.price
LANGUAGE sql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
	-- What costs what its total costs, by the note, follows the new price of
	-- that, unless it has a new price itself.
	WITH changed (name, value) AS (
		SELECT * FROM jsonb_each(given || given_units)
	), follows AS (
		SELECT part.name, to_jsonb(aibilling.catalogue_number(c.value) * CASE f.remark[1] WHEN 'twice' THEN 2 ELSE 1 END) AS value
		FROM regexp_matches((price).note, '\m(as|twice) ([a-z0-9_]+): ([a-z0-9_, ]+)', 'g') AS f (remark)
		JOIN changed c ON c.name = f.remark[2]
		CROSS JOIN LATERAL string_to_table(f.remark[3], ', ') AS part (name)
		WHERE NOT EXISTS (SELECT FROM changed o WHERE o.name = part.name)
	)
	SELECT jsonb_populate_record(price, given
		|| coalesce((SELECT jsonb_object_agg(name, value) FROM follows WHERE name NOT LIKE '%\_tokens'), '{}')
		|| jsonb_build_object(
			'units', nullif(coalesce((price).units, '{}') || given_units
				|| coalesce((SELECT jsonb_object_agg(name, value) FROM follows WHERE name LIKE '%\_tokens'), '{}'), '{}'),
			'note', aibilling.note_without((price).note, ARRAY(SELECT name FROM changed))))
$$;
COMMENT ON FUNCTION aibilling.changed_price(aibilling.price, jsonb, jsonb) IS
'a row of aibilling.price with these prices: of columns, and of units; what costs the same by its note changes with them';

CREATE FUNCTION aibilling.price_in_tier(price aibilling.price, service_tier text, factor numeric) RETURNS aibilling.price
LANGUAGE sql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
	SELECT jsonb_populate_record(price, jsonb_build_object('service_tier', price_in_tier.service_tier,
		'input', (price).input * factor, 'output', (price).output * factor, 'reasoning', (price).reasoning * factor,
		'cache_read', (price).cache_read * factor, 'cache_write', (price).cache_write * factor,
		'cache_write_1h', (price).cache_write_1h * factor,
		'units', (
			SELECT jsonb_object_agg(u.key, to_jsonb(CASE WHEN u.key LIKE '%\_tokens'
				THEN aibilling.catalogue_number(u.value) * factor ELSE aibilling.catalogue_number(u.value) END))
			FROM jsonb_each((price).units) u
			WHERE u.key NOT LIKE '%\_tokens' OR factor IS NOT NULL
		)))
$$;
COMMENT ON FUNCTION aibilling.price_in_tier(aibilling.price, text, numeric) IS
'a row of the standard tier as one of another service tier: tokens cost factor times as much (NULL: nobody knows), anything else the same';

CREATE FUNCTION aibilling.set_price(
	provider text,
	model text,
	input numeric DEFAULT NULL,
	output numeric DEFAULT NULL,
	cache_read numeric DEFAULT NULL,
	cache_write numeric DEFAULT NULL,
	cache_write_1h numeric DEFAULT NULL,
	reasoning numeric DEFAULT NULL,
	request numeric DEFAULT NULL,
	web_search numeric DEFAULT NULL,
	units jsonb DEFAULT NULL,
	service_tier text DEFAULT 'standard',
	valid_from timestamptz DEFAULT NULL)
RETURNS SETOF aibilling.price
LANGUAGE plpgsql VOLATILE CALLED ON NULL INPUT PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
	given jsonb := jsonb_strip_nulls(jsonb_build_object('input', set_price.input, 'output', set_price.output,
		'cache_read', set_price.cache_read, 'cache_write', set_price.cache_write,
		'cache_write_1h', set_price.cache_write_1h, 'reasoning', set_price.reasoning,
		'request', set_price.request, 'web_search', set_price.web_search));
	given_units jsonb := coalesce(set_price.units, '{}');
	of_provider text;
	of_model text;
	tier text := lower(btrim(set_price.service_tier, E' \t\r\n'));
	factor numeric;			-- of the rule for the tier
	began timestamptz := coalesce(set_price.valid_from, now());
	entry record;
	old_rows aibilling.price[];
	known jsonb;			-- names that had a price when the change begins
	known_here jsonb;
	given_here jsonb := given;
	units_here jsonb := given_units;
	last_origin text;
	target timestamptz;
	prefix text;
	price_row aibilling.price;
	others text;
BEGIN
	IF set_price.provider IS NULL OR set_price.model IS NULL THEN
		RAISE EXCEPTION 'a price needs a provider and a model'
			USING ERRCODE = 'null_value_not_allowed';
	END IF;
	IF jsonb_typeof(given_units) <> 'object' THEN
		RAISE EXCEPTION 'units must be a JSON object'
			USING ERRCODE = 'invalid_parameter_value', HINT = 'As in {"image": 0.04}.';
	END IF;
	IF given = '{}' AND given_units = '{}' THEN
		RAISE EXCEPTION 'no price is given'
			USING ERRCODE = 'invalid_parameter_value',
				HINT = 'Give one or more of input, output, cache_read, cache_write, cache_write_1h, reasoning, request, web_search and units.';
	END IF;
	FOR entry IN SELECT * FROM jsonb_each(given || given_units) LOOP
		IF jsonb_typeof(entry.value) <> 'number' OR aibilling.catalogue_number(entry.value) < 0 THEN
			RAISE EXCEPTION 'price "%" must be a number and not negative, but is %', entry.key, entry.value #>> '{}'
				USING ERRCODE = 'invalid_parameter_value';
		END IF;
	END LOOP;
	IF began = 'infinity' THEN
		RAISE EXCEPTION 'a price cannot begin at infinity'
			USING ERRCODE = 'invalid_parameter_value';
	END IF;

	-- The names of the card: a card of another spelling would hide it.
	SELECT card_provider, card_model INTO of_provider, of_model
	FROM aibilling.priced_model(set_price.provider, set_price.model);
	IF of_model IS NULL THEN
		of_provider := btrim(set_price.provider, E' \t\r\n');
		of_model := btrim(set_price.model, E' \t\r\n');
	ELSIF (of_provider, of_model) <> (set_price.provider, set_price.model) THEN
		RAISE NOTICE 'provider "%", model "%" is priced as provider "%", model "%", whose price changes for all of its spellings',
			set_price.provider, set_price.model, of_provider, of_model;
	END IF;

	tier := CASE WHEN coalesce(tier, '') IN ('', 'default', 'auto', 'on_demand') THEN 'standard' ELSE tier END;
	SELECT coalesce(min(p.service_tier), tier) INTO tier
	FROM aibilling.price p
	WHERE (p.provider, p.model) = (of_provider, of_model) AND lower(p.service_tier) = tier;
	SELECT r.multiplier INTO factor
	FROM aibilling.service_tier_rule r
	WHERE r.provider IN (set_price.provider, of_provider, '*') AND r.service_tier = tier
	ORDER BY r.provider = '*', r.provider <> set_price.provider, r.shipped
	LIMIT 1;

	-- The card in force when the change begins, and those that would come after
	-- it: the one of source user hides them all.  The query sees what was there
	-- before anything is written.
	FOR entry IN
		SELECT m.moment, f.source, f.valid_from, f.by_rule
		FROM (
			SELECT began AS moment
			UNION
			SELECT p.valid_from FROM aibilling.price p
			WHERE (p.provider, p.model) = (of_provider, of_model) AND p.valid_from > began
				AND p.service_tier IN (tier, CASE WHEN factor IS NOT NULL THEN 'standard' END)
		) AS m
		LEFT JOIN LATERAL (
			SELECT c.source, c.valid_from, false AS by_rule
			FROM aibilling.card_in_force(of_provider, of_model, tier, m.moment) c WHERE c.source IS NOT NULL
			UNION ALL
			SELECT c.source, c.valid_from, true
			FROM aibilling.card_in_force(of_provider, of_model, 'standard', m.moment) c
			WHERE c.source IS NOT NULL AND tier <> 'standard'
			ORDER BY by_rule
			LIMIT 1
		) AS f ON true
		ORDER BY m.moment
	LOOP
		old_rows := ARRAY(
			SELECT CASE WHEN entry.by_rule THEN aibilling.price_in_tier(p, tier, factor) ELSE p END
			FROM aibilling.price p
			WHERE (p.provider, p.model, p.source, p.valid_from) = (of_provider, of_model, entry.source, entry.valid_from)
				AND p.service_tier = CASE WHEN entry.by_rule THEN 'standard' ELSE tier END
				AND (NOT entry.by_rule OR factor IS NOT NULL OR p.context_above = 0 AND p.daily_from IS NULL)
			ORDER BY p.daily_from NULLS FIRST, p.daily_to, p.context_above);
		SELECT coalesce(jsonb_object_agg(k.key, true), '{}') INTO known_here
		FROM unnest(old_rows) AS c
		CROSS JOIN LATERAL jsonb_each(jsonb_strip_nulls(to_jsonb(c) || coalesce(c.units, '{}'))) k;

		IF known IS NULL THEN
			known := known_here;
			target := CASE WHEN set_price.valid_from IS NULL AND (entry.source IS NULL OR entry.by_rule AND factor IS NULL)
				THEN '-infinity' ELSE began END;
			prefix := 'copied from ' || entry.source;
			IF cardinality(old_rows) = 0 THEN
				old_rows := ARRAY[jsonb_populate_record(NULL::aibilling.price, jsonb_build_object('provider', of_provider,
					'model', of_model, 'service_tier', tier, 'context_above', 0, 'inherit', true))];
			END IF;
		ELSE
			target := entry.moment;
			prefix := 'follows ' || entry.source;
			IF entry.source = 'user' AND NOT entry.by_rule THEN
				-- one that goes on, one that was written here, or the user's own
				CONTINUE WHEN entry.valid_from < entry.moment;
				IF coalesce(old_rows[1].note, '') NOT LIKE 'follows %' THEN
					RAISE NOTICE 'from % on, the price that you have entered for that time applies', entry.moment;
					EXIT;
				END IF;
			END IF;
			CONTINUE WHEN last_origin = format('%s %s %s', entry.by_rule, entry.source, entry.valid_from);
			-- What had a price is changed from now on; what had none gets one where
			-- there is still none.
			SELECT coalesce(jsonb_object_agg(key, value), '{}') INTO given_here
			FROM jsonb_each(given) WHERE known ? key OR NOT known_here ? key;
			SELECT coalesce(jsonb_object_agg(key, value), '{}') INTO units_here
			FROM jsonb_each(given_units) WHERE known ? key OR NOT known_here ? key;
		END IF;
		last_origin := format('%s %s %s', entry.by_rule, entry.source, entry.valid_from);

		IF EXISTS (SELECT FROM aibilling.price p WHERE (p.provider, p.model, p.service_tier, p.source, p.valid_from)
				= (of_provider, of_model, tier, 'user', target)) THEN
			DELETE FROM aibilling.price p WHERE (p.provider, p.model, p.service_tier, p.source, p.valid_from)
				= (of_provider, of_model, tier, 'user', target);
		END IF;
		FOREACH price_row IN ARRAY old_rows LOOP
			price_row := aibilling.changed_price(price_row, given_here, units_here);
			price_row.note := CASE
				WHEN entry.source <> 'user' OR entry.by_rule THEN concat_ws('; ', prefix,
					nullif(regexp_replace(price_row.note, '^(copied from|follows) [^;]*(; )?', ''), ''))
				WHEN target = began THEN regexp_replace(price_row.note, '^follows ', 'copied from ')
				ELSE price_row.note END;
			price_row.source := 'user';
			price_row.valid_from := target;
			INSERT INTO aibilling.price SELECT (price_row).*;
			RETURN NEXT price_row;
		END LOOP;
	END LOOP;

	SELECT string_agg(DISTINCT p.service_tier, ', ' ORDER BY p.service_tier) INTO others
	FROM aibilling.price p
	WHERE (p.provider, p.model) = (of_provider, of_model) AND p.service_tier <> tier;
	IF others IS NOT NULL THEN
		RAISE NOTICE 'the prices of service tier % have changed; these have prices of their own, which have not: %', tier, others;
	END IF;
END
$$;
COMMENT ON FUNCTION aibilling.set_price(text, text, numeric, numeric, numeric, numeric, numeric, numeric, numeric, numeric, jsonb, text, timestamptz) IS
'Enters prices of a model and changes nothing else: copies the card in force at valid_from (NULL: now), with its context steps and daily windows, to source user and sets what is given in each of its rows (units: key by key). Where nothing is in force it makes a card, for all time unless valid_from is given. Cards that come after valid_from are copied too: there a price that had been unknown stays as they have it. Returns the rows written. Needs INSERT on aibilling.price, and DELETE to replace a card of the same valid_from';

CREATE FUNCTION aibilling.price_hint(usage regclass, id bigint) RETURNS text
LANGUAGE c STABLE STRICT AS 'MODULE_PATHNAME', 'abp_sql_price_hint';
COMMENT ON FUNCTION aibilling.price_hint(regclass, bigint) IS
'What to do about a row that lacks a price, read with the rights of the caller: the closest name, and the statement to type, as the warning of its INSERT said; NULL if it lacks none or is not there';

-- Only for whoever has the owner's rights: others would run the policies of the
-- table, which are its owner's code.
CREATE OR REPLACE VIEW aibilling.unpriced WITH (security_barrier) AS
SELECT u.usage_table, u.reason, u.rows,
	CASE WHEN EXISTS (SELECT FROM pg_class c WHERE c.oid = u.usage_table AND pg_has_role(current_user, c.relowner, 'USAGE'))
		THEN aibilling.price_hint(u.usage_table, u.first) END AS hint
FROM (
	SELECT e.usage_table, e.error AS reason,
		sum((SELECT sum(coalesce(upper(r), 9223372036854775807) - lower(r)) FROM unnest(w) r))::bigint AS rows,
		min(lower(w)) AS first
	FROM aibilling.outbox_entry e,
		LATERAL aibilling.waiting_ids(e.usage_table, e.state, e.ctid, e.id, e.ids) w
	WHERE e.state = 'u' AND aibilling.may_see(e.usage_table) AND NOT isempty(w)
	GROUP BY e.usage_table, e.error
) AS u;
COMMENT ON COLUMN aibilling.unpriced.hint IS
'What to do about the first of these rows, as aibilling.price_hint() says it; NULL for others than who has the rights of the table''s owner';

GRANT EXECUTE ON FUNCTION
	aibilling.image_price_is_by_token(numeric, numeric),
	aibilling.complete_prices(aibilling.catalogue_price[]),
	aibilling.correct_genai_prices(aibilling.catalogue_price[]),
	aibilling.genai_names(jsonb),
	aibilling.put_aliases(jsonb, jsonb, text),
	aibilling.price_rows(aibilling.catalogue_price[], aibilling.price_card[]),
	aibilling.priced_model(text, text),
	aibilling.price_hint(regclass, bigint),
	aibilling.card_in_force(text, text, text, timestamptz),
	aibilling.note_without(text, text[]),
	aibilling.changed_price(aibilling.price, jsonb, jsonb),
	aibilling.price_in_tier(aibilling.price, text, numeric),
	aibilling.set_price(text, text, numeric, numeric, numeric, numeric, numeric, numeric, numeric, numeric, jsonb, text, timestamptz)
TO PUBLIC;

-- ---------------------------------------------------------------------------
-- The first hour
-- ---------------------------------------------------------------------------

CREATE FUNCTION aibilling.check_setup(
	OUT step integer, OUT item text, OUT ok boolean, OUT wrong text, OUT fix text) RETURNS SETOF record
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'abp_sql_check_setup'
ROWS 20;
COMMENT ON FUNCTION aibilling.check_setup() IS
'What must be right before usage is billed, one row a thing, in the order in which people set it up: whether it is right (NULL: not known yet, or not for the caller to know), what is wrong, and what fixes it, an SQL statement if it ends in a semicolon, else a command for a shell on the database server. Sends each server a request without events, which stores nothing; a token is tried for whoever may set it, and takes up to 10 seconds where Polar is not reached';
GRANT EXECUTE ON FUNCTION aibilling.check_setup() TO PUBLIC;
COMMENT ON FUNCTION aibilling.usage_status(regclass, bigint) IS
'Where a usage row stands: state pending, unpriced, rejected, sending, delivered, not_sent (loaded, or there before the table was attached) or no_row (there is none of this id), the delivery, when it was last sent, how often it was tried, and the last error';
COMMENT ON COLUMN aibilling.status.last_error IS
'Error of the last delivery that had one, with its time if a delivery has succeeded since';
COMMENT ON COLUMN aibilling.status.rejected IS 'Rows that cannot be sent until they are fixed; see aibilling.outbox';

-- ---------------------------------------------------------------------------
-- Sight: what each customer costs
-- ---------------------------------------------------------------------------

CREATE TABLE aibilling.share (
	delivery bigint PRIMARY KEY,
	usage_table regclass NOT NULL,
	sums bytea,
	counted int8multirange
) WITH (autovacuum_vacuum_scale_factor = 0.05);
ALTER TABLE aibilling.share ALTER COLUMN sums SET STORAGE EXTERNAL;
COMMENT ON TABLE aibilling.share IS
'Private: what the rows of each delivery add up to, until it is in aibilling.rollup';
COMMENT ON COLUMN aibilling.share.delivery IS 'aibilling.delivery.id';
COMMENT ON COLUMN aibilling.share.usage_table IS 'The usage table';
COMMENT ON COLUMN aibilling.share.sums IS
'The sums, as bytes; NULL: not known, the rows tell (a delivery that is being divided, or of an older version)';
COMMENT ON COLUMN aibilling.share.counted IS
'Ids of rows that another delivery counts: they have come back; NULL: not known';
CREATE INDEX share_usage_table ON aibilling.share (usage_table);
COMMENT ON INDEX aibilling.share_usage_table IS 'Finds what a table''s functions have to add to the rollup';

CREATE TABLE aibilling.rollup (
	usage_table regclass NOT NULL,
	level "char" NOT NULL,
	customer bigint NOT NULL,
	day date NOT NULL,
	key uuid NOT NULL,
	external_customer_id text,
	customer_id uuid,
	provider text,
	model text,
	event_name text,
	usage_rows bigint NOT NULL,
	input_tokens numeric NOT NULL,
	cache_read_tokens numeric NOT NULL,
	cache_write_tokens numeric NOT NULL,
	output_tokens numeric NOT NULL,
	reasoning_tokens numeric NOT NULL,
	cost_nanos numeric NOT NULL,
	cost_cents numeric NOT NULL,
	unpriced bigint NOT NULL,
	PRIMARY KEY (usage_table, level, customer, day, key)
) WITH (fillfactor = 85, autovacuum_vacuum_scale_factor = 0.05);
CREATE INDEX rollup_day ON aibilling.rollup (usage_table, day) WHERE level = 'd';
COMMENT ON INDEX aibilling.rollup_day IS 'Finds the days of a table';
COMMENT ON TABLE aibilling.rollup IS
'Private: what delivered rows add up to, for aibilling.usage_daily() and aibilling.spend(); what was delivered last is in aibilling.share';
COMMENT ON COLUMN aibilling.rollup.usage_table IS 'The usage table';
COMMENT ON COLUMN aibilling.rollup.level IS
'd: by all columns; m: by day, provider and model; c: by month (its first day) and customer. Each row''s part is in all three';
COMMENT ON COLUMN aibilling.rollup.customer IS 'A hash of the customer; 0: none';
COMMENT ON COLUMN aibilling.rollup.day IS 'UTC';
COMMENT ON COLUMN aibilling.rollup.key IS 'A hash of what the sums are kept by';
COMMENT ON COLUMN aibilling.rollup.external_customer_id IS 'The customer as sent';
COMMENT ON COLUMN aibilling.rollup.customer_id IS 'The customer as sent';
COMMENT ON COLUMN aibilling.rollup.provider IS 'As in the usage table';
COMMENT ON COLUMN aibilling.rollup.model IS 'As in the usage table';
COMMENT ON COLUMN aibilling.rollup.event_name IS 'As in the usage table';
COMMENT ON COLUMN aibilling.rollup.usage_rows IS 'How many rows';
COMMENT ON COLUMN aibilling.rollup.input_tokens IS 'Their sum';
COMMENT ON COLUMN aibilling.rollup.cache_read_tokens IS 'Their sum';
COMMENT ON COLUMN aibilling.rollup.cache_write_tokens IS 'Their sum, of both kinds';
COMMENT ON COLUMN aibilling.rollup.output_tokens IS 'Their sum';
COMMENT ON COLUMN aibilling.rollup.reasoning_tokens IS 'Their sum';
COMMENT ON COLUMN aibilling.rollup.cost_nanos IS 'Their sum; a cost that is not known adds nothing';
COMMENT ON COLUMN aibilling.rollup.cost_cents IS 'Their sum; a cost that is not known adds nothing';
COMMENT ON COLUMN aibilling.rollup.unpriced IS 'Rows without a cost';

-- What an earlier version has delivered is added up in the background.
INSERT INTO aibilling.share (delivery, usage_table)
SELECT id, usage_table FROM aibilling.ledger WHERE state IN ('sending', 'delivered');

SELECT pg_extension_config_dump('aibilling.share', '');
SELECT pg_extension_config_dump('aibilling.rollup', '');
REVOKE ALL ON aibilling.share, aibilling.rollup FROM PUBLIC;

CREATE FUNCTION aibilling.usage_daily(
	usage regclass,
	from_day date DEFAULT NULL,
	to_day date DEFAULT NULL,
	OUT day date,
	OUT external_customer_id text,
	OUT customer_id uuid,
	OUT provider text,
	OUT model text,
	OUT event_name text,
	OUT usage_rows bigint,
	OUT input_tokens numeric,
	OUT cache_read_tokens numeric,
	OUT cache_write_tokens numeric,
	OUT output_tokens numeric,
	OUT reasoning_tokens numeric,
	OUT cost_nanos numeric,
	OUT cost_cents numeric,
	OUT unpriced bigint)
RETURNS SETOF record
LANGUAGE c STABLE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'abp_sql_usage_daily';
COMMENT ON FUNCTION aibilling.usage_daily(regclass, date, date) IS
'What the rows of a usage table add up to that are delivered, in flight or queued, by day (UTC; from_day and to_day belong to it, NULL: all), customer as sent, provider, model and the row''s own event name. At every moment the same as GROUP BY over these rows; rows that were deleted after their delivery stay counted. cache_write_tokens are of both kinds, unpriced is the number of rows without a cost. Needs SELECT on the table';

CREATE FUNCTION aibilling.usage_by(
	usage regclass,
	by text,
	from_day date,
	to_day date,
	OUT day date,
	OUT external_customer_id text,
	OUT customer_id uuid,
	OUT provider text,
	OUT model text,
	OUT event_name text,
	OUT usage_rows bigint,
	OUT input_tokens numeric,
	OUT cache_read_tokens numeric,
	OUT cache_write_tokens numeric,
	OUT output_tokens numeric,
	OUT reasoning_tokens numeric,
	OUT cost_nanos numeric,
	OUT cost_cents numeric,
	OUT unpriced bigint)
RETURNS SETOF record
LANGUAGE c STABLE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'abp_sql_usage_by';
COMMENT ON FUNCTION aibilling.usage_by(regclass, text, date, date) IS
'The same sums, by fewer columns (the others are NULL): by model, by day, provider and model; by customer, by customer over all the days, without tokens. Reads few rows whatever the number of customers or days';

CREATE FUNCTION aibilling.spend(
	usage regclass,
	external_customer_id text,
	since timestamptz DEFAULT date_trunc('month', now(), 'UTC'),
	OUT cost_cents numeric,
	OUT usage_rows bigint,
	OUT pending_cents numeric,
	OUT unpriced bigint)
LANGUAGE c STABLE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'abp_sql_spend';
COMMENT ON FUNCTION aibilling.spend(regclass, text, timestamptz) IS
'What a customer (as sent) has cost since a day, that of "since" in UTC: cost_cents of all rows that are delivered, in flight or queued, pending_cents of those that are not delivered yet, unpriced the number of rows without a cost. What the calling transaction has inserted counts. Needs SELECT on the table';

GRANT EXECUTE ON FUNCTION
	aibilling.usage_daily(regclass, date, date),
	aibilling.usage_by(regclass, text, date, date),
	aibilling.spend(regclass, text, timestamptz)
TO PUBLIC;

-- ---------------------------------------------------------------------------
-- Proof: corrections that add up, and Polar read back to the row
-- ---------------------------------------------------------------------------

-- A correction counts also when its row has been deleted after delivery, so it
-- is written down here.

CREATE TABLE aibilling.correction (
	usage_table regclass NOT NULL,
	external_id text COLLATE "C" NOT NULL,
	corrects text COLLATE "C" NOT NULL,
	id bigint NOT NULL,
	cost_nanos bigint,
	cost_cents numeric,
	PRIMARY KEY (usage_table, external_id)
);
CREATE INDEX correction_corrects ON aibilling.correction (usage_table, corrects);
COMMENT ON TABLE aibilling.correction IS
'Private: the rows of usage tables that correct others, those too that were deleted after their delivery. Written by the triggers of the tables';
COMMENT ON COLUMN aibilling.correction.usage_table IS 'The usage table';
COMMENT ON COLUMN aibilling.correction.external_id IS 'external_id of the correcting row';
COMMENT ON COLUMN aibilling.correction.corrects IS 'Its tags.corrects: external_id of the row that it corrects';
COMMENT ON COLUMN aibilling.correction.id IS 'Id of the correcting row; outbox and ledger say of it whether the correction counts';
COMMENT ON COLUMN aibilling.correction.cost_nanos IS 'Cost of the correcting row, in USD x 10^9; NULL: not known yet';
COMMENT ON COLUMN aibilling.correction.cost_cents IS 'The same in cents, exact';
SELECT pg_extension_config_dump('aibilling.correction', '');
REVOKE ALL ON aibilling.correction FROM PUBLIC;

CREATE FUNCTION aibilling.correct(usage regclass, id bigint, provider_cost numeric) RETURNS bigint
LANGUAGE c VOLATILE STRICT AS 'MODULE_PATHNAME', 'abp_sql_correct';
COMMENT ON FUNCTION aibilling.correct(regclass, bigint, numeric) IS
'Makes what Polar is told of a delivered row this cost in USD (0 voids it), by inserting a row with the difference to what it and its corrections say, with its customer, provider, model, event name, occurred_at, tags and columns of your own, and tags.corrects with its external_id. Returns the id of the new row, NULL if there is no difference. Raises object_not_in_prerequisite_state for a row that is not delivered and for one that is itself a correction, numeric_value_out_of_range for a difference of 1000 USD or more. Needs ownership of the table';

DROP FUNCTION aibilling.reprice(regclass, timestamptz, timestamptz, boolean);
CREATE FUNCTION aibilling.reprice(usage regclass, from_time timestamptz DEFAULT '-infinity',
	to_time timestamptz DEFAULT 'infinity', dry_run boolean DEFAULT true,
	corrections boolean DEFAULT false, max_total numeric DEFAULT NULL,
	OUT usage_id bigint, OUT state text, OUT old_cost_nanos bigint, OUT new_cost_nanos bigint,
	OUT difference_nanos numeric, OUT action text) RETURNS SETOF record
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'abp_sql_reprice';
COMMENT ON FUNCTION aibilling.reprice(regclass, timestamptz, timestamptz, boolean, boolean, numeric) IS
'Computes the cost of the rows with from_time <= occurred_at < to_time again, by the prices of today. Returns a row per cost that differs, in USD x 10^9: of a delivered row, from what it and its corrections say. Unless dry_run, rows that wait change, and with corrections each delivered one is corrected by a further row, as aibilling.correct() does it; if these differences, added up without their signs, are more than max_total USD, that is an error and nothing changes. Rows in flight are reported. A row whose cost is beyond cost_nanos or whose counts contradict each other is returned with the action kept, named in a warning, and stays as it is. Needs ownership of the table';

-- What Polar has, for the server's owner and superusers: it is a whole
-- organization's.  The functions ask who calls.

CREATE FUNCTION aibilling.polar_events(server name, external_customer_id text DEFAULT NULL,
	event_name text DEFAULT NULL, external_id text DEFAULT NULL,
	from_time timestamptz DEFAULT NULL, to_time timestamptz DEFAULT NULL, max_rows bigint DEFAULT 1000,
	OUT polar_id uuid, OUT "timestamp" timestamptz, OUT name text, OUT external_id text,
	OUT customer_id uuid, OUT external_customer_id text, OUT cost_cents numeric, OUT cost_nanos bigint,
	OUT metadata jsonb) RETURNS SETOF record
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'abp_sql_polar_events';
COMMENT ON FUNCTION aibilling.polar_events(name, text, text, text, timestamptz, timestamptz, bigint) IS
'Events that Polar has, by time: of a customer, with a name, with an external_id in their metadata, with from_time <= timestamp < to_time; NULL: any. max_rows: no more than these, at most 10,000; a request reads 100. cost_cents is a double at Polar. Events whose parent Polar does not know are not shown. Needs ownership of the server, and a token with the scope events:read or events:write';

CREATE FUNCTION aibilling.polar_meter(server name, meter_id uuid, from_time timestamptz, to_time timestamptz,
	step text DEFAULT 'day', external_customer_id text DEFAULT NULL,
	OUT "timestamp" timestamptz, OUT quantity numeric) RETURNS SETOF record
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'abp_sql_polar_meter';
COMMENT ON FUNCTION aibilling.polar_meter(name, uuid, timestamptz, timestamptz, text, text) IS
'What a meter of Polar''s has counted, for each step (hour, day, week, month, year of UTC) from the one that holds from_time on, before to_time; external_customer_id: of this customer only. One request. Needs ownership of the server, and a token with the scope meters:read or meters:write';

CREATE FUNCTION aibilling.reconcile(usage regclass, from_time timestamptz, to_time timestamptz, meter_id uuid DEFAULT NULL,
	OUT day date, OUT rows_here bigint, OUT rows_there bigint, OUT nanos_here numeric, OUT nanos_there numeric,
	OUT finding text) RETURNS SETOF record
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'abp_sql_reconcile';
COMMENT ON FUNCTION aibilling.reconcile(regclass, timestamptz, timestamptz, uuid) IS
'Compares a usage table, with from_time <= occurred_at < to_time, with what Polar has: a row per day (UTC) on which either has something, USD x 10^9, and what is found, NULL if nothing. Here are rows that are delivered, in flight or queued. meter_id: by one request for what a sum meter over cost_nanos has counted, then rows_there is NULL; without it by the events, at most 10,000. Needs ownership of the server and SELECT on the table';

CREATE FUNCTION aibilling.reconcile_rows(usage regclass, from_time timestamptz, to_time timestamptz, meter_id uuid DEFAULT NULL,
	OUT external_id text, OUT finding text, OUT nanos_here numeric, OUT nanos_there numeric) RETURNS SETOF record
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'abp_sql_reconcile_rows';
COMMENT ON FUNCTION aibilling.reconcile_rows(regclass, timestamptz, timestamptz, uuid) IS
'The rows and events on which a usage table and Polar do not agree, of this time: missing at Polar, unknown here (in no usage table of the server), amount differs, customer differs, not sent yet, parent unknown. Compares event by event, at most 10,000; meter_id: only on days on which this sum meter over cost_nanos disagrees. Needs ownership of the server and SELECT on the table';

GRANT EXECUTE ON FUNCTION
	aibilling.correct(regclass, bigint, numeric),
	aibilling.reprice(regclass, timestamptz, timestamptz, boolean, boolean, numeric),
	aibilling.polar_events(name, text, text, text, timestamptz, timestamptz, bigint),
	aibilling.polar_meter(name, uuid, timestamptz, timestamptz, text, text),
	aibilling.reconcile(regclass, timestamptz, timestamptz, uuid),
	aibilling.reconcile_rows(regclass, timestamptz, timestamptz, uuid)
TO PUBLIC;
