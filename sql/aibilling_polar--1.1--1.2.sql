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
'p: to be sent; w: to be sent, but not before not_before; u: waits for a price; r: rejected, waits for an UPDATE or aibilling.retry(). A capital letter: the ids are no longer in that state. To be counted only: n (not queued), s (skipped), k (change not taken over), v (deleted in flight). a: ids are OIDs of partitions that were attached, to be looked at';
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

CREATE FUNCTION aibilling.close_check(
	usage regclass,
	period_end timestamptz DEFAULT date_trunc('month', now(), 'UTC'),
	OUT state text,
	OUT rows bigint,
	OUT cents numeric,
	OUT oldest timestamptz)
RETURNS SETOF record
LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'abp_sql_close_check';
COMMENT ON FUNCTION aibilling.close_check(regclass, timestamptz) IS
'The rows of before period_end (default: of before this month, UTC) that are not delivered, by state as in aibilling.usage_status(): how many, their known cost in cents, the time of the oldest. For the table''s owner and pg_monitor';

CREATE FUNCTION aibilling.close_warning(usage regclass, at timestamptz DEFAULT clock_timestamp()) RETURNS text
LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'abp_sql_close_warning';
COMMENT ON FUNCTION aibilling.close_warning(regclass, timestamptz) IS
'What aibilling.status says, from six hours before the end of a month (UTC) to a day after it, of rows that would miss its invoice; NULL: nothing. Looks at 10,000 rows of each state at most';

-- The report: a page that shows itself, from no more than the sums above.  What
-- comes from rows goes through escape_html, everything else is written here.

CREATE FUNCTION aibilling.escape_html(value text) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
	SELECT replace(replace(replace(replace(replace(
		regexp_replace(value, '[\x01-\x08\x0b\x0c\x0e-\x1f\x7f]', '?', 'g'),
		'&', '&amp;'), '<', '&lt;'), '>', '&gt;'), '"', '&quot;'), '''', '&#39;')
$$;
COMMENT ON FUNCTION aibilling.escape_html(text) IS 'Text for HTML, in an element or in an attribute';

CREATE FUNCTION aibilling.usd_text(cents numeric) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
	SELECT CASE WHEN cents < 0 THEN '−' ELSE '' END || '$' || CASE
		WHEN cents = 0 OR abs(cents) >= 1 THEN to_char(abs(cents) / 100, 'FM999,999,999,999,990.00')
		WHEN abs(cents) >= 0.01 THEN to_char(abs(cents) / 100, 'FM0.0000')
		ELSE '0.0001' END
		|| CASE WHEN cents <> 0 AND abs(cents) < 0.01 THEN ' or less' ELSE '' END
$$;
COMMENT ON FUNCTION aibilling.usd_text(numeric) IS 'An amount in cents as dollars, rounded to be read';

CREATE FUNCTION aibilling.short_number(value numeric) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
	SELECT CASE
		WHEN abs(value) >= 1e12 THEN to_char(value / 1e12, 'FM999,999,990.0') || ' T'
		WHEN abs(value) >= 1e9 THEN to_char(value / 1e9, 'FM990.0') || ' B'
		WHEN abs(value) >= 1e6 THEN to_char(value / 1e6, 'FM990.0') || ' M'
		WHEN abs(value) >= 1e4 THEN to_char(value / 1e3, 'FM990.0') || ' k'
		ELSE to_char(value, 'FM999,990') END
$$;
COMMENT ON FUNCTION aibilling.short_number(numeric) IS 'A number rounded to be read';

CREATE FUNCTION aibilling.percent_text(part numeric, whole numeric) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
	SELECT CASE WHEN whole = 0 THEN '–' ELSE to_char(100 * part / whole, 'FM999,990.0') || ' %' END
$$;
COMMENT ON FUNCTION aibilling.percent_text(numeric, numeric) IS 'A share to be read';

CREATE FUNCTION aibilling.axis_top(value numeric) RETURNS numeric
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
	SELECT CASE WHEN value <= 0 THEN 1 ELSE (
		SELECT min(step * p.power) FROM unnest('{1.2,1.6,2,2.4,3.2,4,6,8,10}'::numeric[]) step WHERE step * p.power >= value) END
	FROM (SELECT CASE WHEN value <= 0 THEN 1 ELSE 10::numeric ^ floor(log(value)) END AS power) p
$$;
COMMENT ON FUNCTION aibilling.axis_top(numeric) IS 'Where an axis ends that is to hold a value: a round number';

CREATE FUNCTION aibilling.cache_savings(
	usage regclass,
	from_day date,
	to_day date,
	OUT provider text,
	OUT model text,
	OUT saved_cents numeric,
	OUT cache_read_tokens numeric)
RETURNS SETOF record
LANGUAGE sql STABLE PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
	SELECT m.provider, m.model,
		sum(m.cache_read_tokens * (fresh.cents - cached.cents) - m.cache_write_tokens * (written.cents - fresh.cents)) / 1000,
		sum(m.cache_read_tokens)
	FROM (
		SELECT d.day, d.provider, d.model, d.cache_read_tokens, d.cache_write_tokens
		FROM aibilling.usage_by(usage, 'model', from_day, to_day) d
		WHERE d.cache_read_tokens > 0 OR d.cache_write_tokens > 0
		OFFSET 0
	) AS m,
	LATERAL (SELECT m.day::timestamp AT TIME ZONE 'UTC' + interval '12 hours' AS at) AS t,
	LATERAL (SELECT aibilling.cost_cents(m.provider, m.model, 1000, request_count => 0, at => t.at) AS cents) AS fresh,
	LATERAL (SELECT aibilling.cost_cents(m.provider, m.model, 1000, cache_read_tokens => 1000, request_count => 0, at => t.at) AS cents) AS cached,
	LATERAL (SELECT CASE WHEN m.cache_write_tokens = 0 THEN fresh.cents ELSE
		aibilling.cost_cents(m.provider, m.model, 1000, cache_write_tokens => 1000, request_count => 0, at => t.at) END AS cents) AS written
	WHERE fresh.cents IS NOT NULL AND cached.cents IS NOT NULL AND written.cents IS NOT NULL
	GROUP BY m.provider, m.model
$$;
COMMENT ON FUNCTION aibilling.cache_savings(regclass, date, date) IS
'What prompt caches saved, by model: what the tokens read from them would have cost as fresh ones at the standard prices of the day, less what writing them cost more. Models without such prices are left out';

CREATE FUNCTION aibilling.report_style() RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $style$
	SELECT $css$
:root { color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --ink: #16191d; --soft: #59636e; --line: #e1e5ea;
	--c1: #3451c6; --c2: #0b7285; --c3: #c2410c; --c4: #862e9c; --c5: #2b6a2f; --c6: #6b7280; --good: #1f6f3a }
@media (prefers-color-scheme: dark) { :root { --page: #0f1216; --card: #181c22; --ink: #eceff3; --soft: #a4adb8; --line: #2b313a;
	--c1: #8ea4ff; --c2: #4cc9dc; --c3: #ff9a5c; --c4: #d9a2f0; --c5: #7fd88a; --c6: #a4adb8; --good: #7fd88a } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
	font-variant-numeric: tabular-nums; -webkit-print-color-adjust: exact; print-color-adjust: exact }
main { max-width: 1080px; margin: 0 auto; padding: 40px 28px 56px }
header { margin-bottom: 26px }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -0.02em; margin: 0 0 4px; overflow-wrap: anywhere }
h2 { font-size: 17px; letter-spacing: -0.01em; margin: 0 0 2px }
p { margin: 0 } .soft { color: var(--soft) } .small { font-size: 13px }
.cards { display: grid; grid-template-columns: repeat(4, 1fr); gap: 14px; margin-bottom: 18px }
section, .card { background: var(--card); border: 1px solid var(--line); border-radius: 14px }
section { padding: 22px 24px; margin-bottom: 18px; break-inside: avoid }
.card { padding: 16px 18px } .card b { display: block; font-size: 27px; line-height: 1.25; letter-spacing: -0.02em; font-weight: 650 }
.two { display: grid; grid-template-columns: 1fr 1fr; gap: 18px } .two section { margin-bottom: 0 } .two { margin-bottom: 18px }
.good { color: var(--good) } .ink { color: var(--ink); font-weight: 550 }
svg { display: block; width: 100%; height: auto; overflow: visible } svg text { fill: var(--soft); font-size: 12px }
svg .grid { stroke: var(--line) } .trend { margin-top: 14px }
.f1 { fill: var(--c1); background: var(--c1) } .f2 { fill: var(--c2); background: var(--c2) } .f3 { fill: var(--c3); background: var(--c3) }
.f4 { fill: var(--c4); background: var(--c4) } .f5 { fill: var(--c5); background: var(--c5) } .f6 { fill: var(--c6); background: var(--c6) }
.legend { display: flex; flex-wrap: wrap; gap: 6px 18px; margin: 10px 0 0; padding: 0; list-style: none; font-size: 13px; color: var(--soft) }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 7px }
.legend li { max-width: 100%; overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
table { width: 100%; border-collapse: collapse; margin-top: 12px; table-layout: fixed }
th { font-weight: 500; font-size: 12px; color: var(--soft); text-align: right; padding: 4px 0 6px 10px }
td { padding: 6px 0 6px 10px; border-top: 1px solid var(--line); text-align: right; vertical-align: middle }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
td.name { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; font-weight: 500 }
td.words { text-align: left; overflow-wrap: anywhere } th.words { text-align: left }
td svg { height: 10px; border-radius: 3px } .wide { width: 26% } .narrow { width: 17% }
dl { display: grid; grid-template-columns: 1fr auto; gap: 7px 16px; margin: 14px 0 0 } dt { color: var(--soft) } dd { margin: 0; text-align: right; font-weight: 550 }
details { margin-top: 12px; font-size: 13px } summary { cursor: pointer; color: var(--soft) } details table { font-size: 13px }
footer { color: var(--soft); font-size: 12.5px; margin-top: 26px }
@media (max-width: 760px) { .cards { grid-template-columns: 1fr 1fr } .two { grid-template-columns: 1fr } main { padding: 24px 14px } }
@page { size: A4; margin: 13mm }
@media print { :root { color-scheme: light; --page: #fff; --card: #fff; --ink: #16191d; --soft: #59636e; --line: #d5dae0; --c1: #3451c6; --c2: #0b7285;
	--c3: #c2410c; --c4: #862e9c; --c5: #2b6a2f; --c6: #6b7280; --good: #1f6f3a }
	body { font-size: 11.5px } main { max-width: none; padding: 0 } .cards, .two { gap: 10px } .card b { font-size: 20px } section { padding: 14px 16px; border-radius: 8px }
	details:not([open]) { display: none } h1 { font-size: 22px } }
$css$
$style$;
COMMENT ON FUNCTION aibilling.report_style() IS 'How aibilling.report() looks';

CREATE FUNCTION aibilling.report_trend(sums jsonb, from_day date, to_day date) RETURNS text
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	unit text := CASE WHEN to_day - from_day <= 62 THEN 'day' WHEN to_day - from_day <= 400 THEN 'week' ELSE 'month' END;
	top numeric;
	n integer;
	pitch numeric;
	bars text;
	grid text;
	labels text;
	legend text;
	numbers text;
BEGIN
	-- The five models that cost most have colours of their own.
	WITH cost AS (
		SELECT (s ->> 'day')::date AS day, coalesce(s ->> 'model', '(none)') AS model, (s ->> 'cost_cents')::numeric AS cents
		FROM jsonb_array_elements(sums) s
	), ranked AS (
		SELECT model, least(row_number() OVER (ORDER BY sum(cents) DESC, model), 6) AS colour, sum(cents) AS cents
		FROM cost GROUP BY model
	), spans AS (
		SELECT row_number() OVER (ORDER BY b) - 1 AS x, b::date AS span
		FROM generate_series(date_trunc(unit, from_day::timestamp), to_day::timestamp, ('1 ' || unit)::interval) b
	), cells AS (
		SELECT p.x, p.span, r.colour, CASE WHEN r.colour = 6 THEN 'others' ELSE r.model END AS model, sum(c.cents) AS cents
		FROM spans p
		JOIN cost c ON date_trunc(unit, c.day::timestamp)::date = p.span
		JOIN ranked r USING (model)
		GROUP BY p.x, p.span, r.colour, CASE WHEN r.colour = 6 THEN 'others' ELSE r.model END
	), totals AS (
		SELECT x, sum(cents) AS cents FROM cells GROUP BY x
	), scale AS (
		SELECT aibilling.axis_top((SELECT max(positive) FROM (SELECT sum(cents) AS positive FROM cells WHERE cents > 0 GROUP BY x) t)) AS top,
			(SELECT count(*) FROM spans) AS n
	), stacked AS (
		SELECT c.*, coalesce(sum(greatest(cents, 0)) OVER (PARTITION BY x ORDER BY colour ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0) AS below
		FROM cells c
	)
	SELECT s.top, s.n, 900.0 / s.n,
		(SELECT string_agg(format('<rect class="f%s" x="%s" y="%s" width="%s" height="%s" data-span="%s" data-model="%s" data-cents="%s"><title>%s, %s: %s</title></rect>',
				k.colour, round(60 + k.x * 900.0 / s.n + 900.0 / s.n * 0.14, 2), round(220 - 200 * (k.below + k.cents) / s.top, 2),
				round(900.0 / s.n * 0.72, 2), round(200 * k.cents / s.top, 2), k.span, aibilling.escape_html(k.model), k.cents,
				k.span, aibilling.escape_html(k.model), aibilling.usd_text(k.cents)), E'\n' ORDER BY k.x, k.colour)
			FROM stacked k WHERE k.cents > 0),
		(SELECT string_agg(format('<line class="grid" x1="60" x2="960" y1="%1$s" y2="%1$s"/><text x="52" y="%2$s" text-anchor="end">%3$s</text>',
				220 - 50 * g, 224 - 50 * g, '$' || trim_scale(round(s.top * g / 400, 6))), E'\n') FROM generate_series(0, 4) g),
		(SELECT string_agg(format('<text x="%s" y="240" text-anchor="middle">%s</text>', round(60 + (p.x + 0.5) * 900.0 / s.n, 1),
				to_char(p.span, CASE unit WHEN 'month' THEN 'Mon YYYY' ELSE 'FMDD Mon' END)), E'\n')
			FROM spans p WHERE p.x % greatest(1, ceil(s.n / 12.0)::integer) = 0),
		(SELECT string_agg(format('<li><i class="f%s"></i>%s</li>', r.colour, aibilling.escape_html(r.model)), E'\n' ORDER BY r.colour)
			FROM (SELECT colour, CASE WHEN colour = 6 THEN 'others' ELSE min(model) END AS model FROM ranked GROUP BY colour) r),
		(SELECT string_agg(format('<tr><td>%s</td><td>%s</td></tr>', p.span, aibilling.usd_text(coalesce(t.cents, 0))), E'\n' ORDER BY p.x)
			FROM spans p LEFT JOIN totals t USING (x))
	INTO top, n, pitch, bars, grid, labels, legend, numbers
	FROM scale s;
	RETURN format('<section aria-labelledby="trend"><h2 id="trend">Cost per %1$s</h2><p class="soft small">Stacked by model; the five that cost most, and all others together.</p>
<svg class="trend" viewBox="0 0 960 250" role="img" aria-labelledby="trend-title trend-text"><title id="trend-title">Cost per %1$s, by model</title>
<desc id="trend-text">A bar for each %1$s from %2$s to %3$s. The axis ends at %4$s. All numbers are in the table that follows.</desc>
%5$s
%6$s
%7$s</svg>
<ul class="legend">%8$s</ul>
<details><summary>Numbers</summary><table><thead><tr><th>%9$s</th><th>cost</th></tr></thead><tbody>%10$s</tbody></table></details></section>',
		unit, from_day, to_day, aibilling.usd_text(top), coalesce(grid, ''), coalesce(bars, ''), coalesce(labels, ''), coalesce(legend, ''),
		unit || CASE unit WHEN 'day' THEN '' ELSE ' from' END, numbers);
END
$$;
COMMENT ON FUNCTION aibilling.report_trend(jsonb, date, date) IS 'A part of aibilling.report(): cost over time, from rows of usage_by() by model';

CREATE FUNCTION aibilling.report_bars(title text, about text, head text, names text[], cents numeric[], calls numeric[]) RETURNS text
LANGUAGE sql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
	SELECT format('<section><h2>%s</h2><p class="soft small">%s</p><table><thead><tr><th>%s</th><th class="wide"><span class="soft">share</span></th>'
		'<th class="narrow">cost</th><th class="narrow">calls</th></tr></thead><tbody>%s</tbody></table></section>',
		title, about, head, coalesce(string_agg(format(
			'<tr><td class="name" title="%1$s">%1$s</td><td><svg viewBox="0 0 100 4" preserveAspectRatio="none" role="img" aria-label="%4$s of the cost">'
			'<rect width="100" height="4" fill="currentColor" opacity="0.09"/><rect class="f1" width="%2$s" height="4" data-name="%1$s" data-cents="%5$s"/></svg></td><td>%3$s</td><td>%6$s</td></tr>',
			aibilling.escape_html(u.name), round(100 * greatest(u.cents, 0) / nullif(m.top, 0), 2), aibilling.usd_text(u.cents),
			aibilling.percent_text(u.cents, m.total), u.cents, aibilling.short_number(u.calls)), E'\n' ORDER BY u.n),
			'<tr><td class="soft" colspan="4">Nothing in these days.</td></tr>'))
	FROM unnest(names, cents, calls) WITH ORDINALITY AS u (name, cents, calls, n),
		(SELECT greatest(max(c), 0) AS top, sum(c) AS total FROM unnest(report_bars.cents) c) AS m
$$;
COMMENT ON FUNCTION aibilling.report_bars(text, text, text, text[], numeric[], numeric[]) IS 'A part of aibilling.report(): a table with bars';

CREATE FUNCTION aibilling.report_waiting(usage regclass) RETURNS text
LANGUAGE plpgsql STABLE PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	body text;
BEGIN
	IF NOT aibilling.may_see(usage) THEN
		RETURN '<section><h2>What waits</h2><p class="soft">Shown to the owner of the table and to pg_monitor.</p></section>';
	END IF;
	SELECT string_agg(format('<tr><td class="name">%s</td><td class="words">%s</td><td>%s</td></tr>', w.state,
			coalesce(aibilling.escape_html(w.error), '<span class="soft">its turn</span>'), CASE WHEN w.n >= 20000 THEN 'about ' ELSE '' END || aibilling.short_number(w.n)),
			E'\n' ORDER BY w.state <> 'rejected', w.n DESC)
	INTO body
	FROM (
		SELECT o.state, o.error, count(*) AS n, row_number() OVER (PARTITION BY o.state ORDER BY count(*) DESC) AS place
		FROM (SELECT e.state, e.error FROM aibilling.outbox e WHERE e.usage_table = usage LIMIT 20000) o
		GROUP BY o.state, o.error
	) AS w
	WHERE w.place <= 6;
	RETURN format('<section><h2>What waits, and what was rejected</h2><p class="soft small">Rows that Polar does not have, now, and why.</p>%s</section>',
		CASE WHEN body IS NULL THEN '<p class="good" style="margin-top:12px">Nothing: every row is delivered or on its way.</p>' ELSE
		format('<table><thead><tr><th class="narrow">state</th><th class="words">reason</th><th class="narrow">rows</th></tr></thead><tbody>%s</tbody></table>', body) END);
END
$$;
COMMENT ON FUNCTION aibilling.report_waiting(regclass) IS 'A part of aibilling.report(): what is not delivered, and why';

CREATE FUNCTION aibilling.report_delivery(usage regclass) RETURNS text
LANGUAGE plpgsql STABLE PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	body text;
BEGIN
	IF NOT aibilling.may_see(usage) THEN
		RETURN '<section><h2>Delivery</h2><p class="soft">Shown to the owner of the table and to pg_monitor.</p></section>';
	END IF;
	SELECT format('<dl><dt>now</dt><dd>%s</dd><dt>events delivered, in all</dt><dd>%s</dd><dt>requests answered at the first attempt</dt><dd>%s</dd>'
			'<dt>time to an answer, median and 95 %%</dt><dd>%s</dd><dt>events that Polar had before, unexpected</dt><dd>%s</dd><dt>last delivery</dt><dd>%s</dd></dl>',
			aibilling.escape_html(split_part(split_part(s.status, ';', 1), ':', 1)), aibilling.short_number(s.delivered),
			aibilling.percent_text(l.first_attempt, l.n),
			CASE WHEN l.n = 0 THEN '–' ELSE format('%s ms, %s ms', round((1000 * l.p50)::numeric), round((1000 * l.p95)::numeric)) END,
			s.unexpected_duplicates, coalesce(to_char(s.last_delivery AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI "UTC"'), 'none'))
	INTO body
	FROM aibilling.status s, (
		SELECT count(*) AS n, count(*) FILTER (WHERE d.attempts = 1) AS first_attempt,
			percentile_cont(0.5) WITHIN GROUP (ORDER BY extract(epoch FROM d.finished_at - d.started_at)::double precision) AS p50,
			percentile_cont(0.95) WITHIN GROUP (ORDER BY extract(epoch FROM d.finished_at - d.started_at)::double precision) AS p95
		FROM (
			SELECT e.attempts, e.started_at, e.finished_at FROM aibilling.delivery e
			WHERE e.usage_table = usage AND e.state = 'delivered' ORDER BY e.id DESC LIMIT 2000
		) AS d
	) AS l
	WHERE s.usage_table = usage;
	RETURN format('<section><h2>Delivery</h2><p class="soft small">The way to Polar; times are of the last 2,000 requests.</p>%s</section>',
		coalesce(body, '<p class="soft" style="margin-top:12px">The table is not attached.</p>'));
END
$$;
COMMENT ON FUNCTION aibilling.report_delivery(regclass) IS 'A part of aibilling.report(): how delivery is doing';

CREATE FUNCTION aibilling.report(usage regclass, from_day date DEFAULT NULL, to_day date DEFAULT NULL) RETURNS text
LANGUAGE plpgsql STABLE PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	last_day date := coalesce(report.to_day, (now() AT TIME ZONE 'UTC')::date);
	first_day date := coalesce(report.from_day, date_trunc('month', last_day::timestamp)::date);
	sums jsonb;
	before numeric;
	all_sums record;
	saved numeric;
	models text;
	customers text;
	ncustomers bigint;
	title text;
	compared text;
BEGIN
	IF report.usage IS NULL THEN
		RAISE EXCEPTION 'the usage table must not be NULL' USING ERRCODE = 'null_value_not_allowed';
	ELSIF first_day > last_day THEN
		RAISE EXCEPTION 'from_day (%) must not be after to_day (%)', first_day, last_day USING ERRCODE = 'invalid_parameter_value';
	ELSIF NOT isfinite(first_day) OR NOT isfinite(last_day) OR last_day - first_day > 3700 THEN
		RAISE EXCEPTION 'a report is of ten years at most' USING ERRCODE = 'invalid_parameter_value';
	END IF;
	SELECT coalesce(jsonb_agg(to_jsonb(u)), '[]') INTO sums FROM aibilling.usage_by(usage, 'model', first_day, last_day) u;
	SELECT coalesce(sum(u.cost_cents), 0) INTO before
	FROM aibilling.usage_by(usage, 'model', first_day - (last_day - first_day + 1), first_day - 1) u;
	SELECT coalesce(sum((s ->> 'cost_cents')::numeric), 0) AS cents, coalesce(sum((s ->> 'usage_rows')::numeric), 0) AS calls,
		coalesce(sum((s ->> 'unpriced')::numeric), 0) AS unpriced, coalesce(sum((s ->> 'input_tokens')::numeric), 0) AS input,
		coalesce(sum((s ->> 'cache_read_tokens')::numeric), 0) AS cached, coalesce(sum((s ->> 'output_tokens')::numeric), 0) AS output,
		coalesce(sum((s ->> 'reasoning_tokens')::numeric), 0) AS reasoning
	INTO all_sums FROM jsonb_array_elements(sums) s;
	SELECT coalesce(sum(c.saved_cents), 0) INTO saved FROM aibilling.cache_savings(usage, first_day, last_day) c;

	SELECT aibilling.report_bars('Cost by model', 'The ten that cost most.', 'model', array_agg(m.name ORDER BY m.place),
			array_agg(m.cents ORDER BY m.place), array_agg(m.calls ORDER BY m.place))
	INTO models
	FROM (
		SELECT least(place, 11) AS place, CASE WHEN place > 10 THEN 'all others' ELSE min(name) END AS name, sum(cents) AS cents, sum(calls) AS calls
		FROM (
			SELECT coalesce(s ->> 'model', '(none)') AS name, sum((s ->> 'cost_cents')::numeric) AS cents,
				sum((s ->> 'usage_rows')::numeric) AS calls, row_number() OVER (ORDER BY sum((s ->> 'cost_cents')::numeric) DESC) AS place
			FROM jsonb_array_elements(sums) s GROUP BY s ->> 'model'
		) AS r
		GROUP BY least(place, 11), place > 10
	) AS m;
	SELECT aibilling.report_bars('Cost by customer', format('The ten that cost most, of %s.', aibilling.short_number(max(c.n))), 'customer',
			array_agg(c.name ORDER BY c.place), array_agg(c.cents ORDER BY c.place), array_agg(c.calls ORDER BY c.place)), coalesce(max(c.n), 0)
	INTO customers, ncustomers
	FROM (
		SELECT least(place, 11) AS place, CASE WHEN place > 10 THEN 'all others' ELSE min(name) END AS name, sum(cents) AS cents, sum(calls) AS calls, max(n) AS n
		FROM (
			SELECT coalesce(u.external_customer_id, u.customer_id::text, '(no customer)') AS name, u.cost_cents AS cents, u.usage_rows::numeric AS calls,
				row_number() OVER (ORDER BY u.cost_cents DESC) AS place, count(*) OVER () AS n
			FROM aibilling.usage_by(usage, 'customer', first_day, last_day) u
		) AS r
		GROUP BY least(place, 11), place > 10
	) AS c;

	title := aibilling.escape_html(regexp_replace(usage::text, '^public\.', ''));
	compared := CASE WHEN before = 0 THEN format('none in the %s days before', last_day - first_day + 1)
		ELSE format('<span class="ink">%s %s %%</span> against the %s days before',
			CASE WHEN all_sums.cents >= before THEN '▲' ELSE '▼' END,
			to_char(abs(100 * (all_sums.cents - before) / before), 'FM999,999,990.0'), last_day - first_day + 1) END;
	RETURN format($page$<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>AI usage of %1$s, %2$s to %3$s</title><link rel="icon" href="data:,"><style>%4$s</style></head>
<body><main>
<header><h1>AI usage: %1$s</h1><p class="soft">%2$s to %3$s (UTC), as of %5$s</p></header>
<div class="cards">
<div class="card"><span class="soft small">Cost</span><b id="total" data-cents="%6$s">%7$s</b><span class="small soft">%8$s</span></div>
<div class="card"><span class="soft small">Calls</span><b id="calls" data-calls="%9$s">%10$s</b><span class="small soft">%11$s customers%12$s</span></div>
<div class="card"><span class="soft small">Saved by prompt caches</span><b id="saved" data-cents="%13$s">%14$s</b><span class="small soft">%15$s of the prompt tokens were cached</span></div>
<div class="card"><span class="soft small">Reasoning</span><b id="reasoning">%16$s</b><span class="small soft">of %17$s output tokens</span></div>
</div>
%18$s
<div class="two">%19$s%20$s</div>
<div class="two">%21$s%22$s</div>
<footer>Costs are what the rows cost when they came in, in US dollars, summed exactly and rounded only here. They are of rows that are delivered, in flight or queued.
What caches saved is by the standard prices of each day, less what writing to them cost more. Made by aibilling_polar.</footer>
</main></body></html>
$page$, title, first_day, last_day, aibilling.report_style(), to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI "UTC"'),
		all_sums.cents, aibilling.usd_text(all_sums.cents), compared, all_sums.calls, aibilling.short_number(all_sums.calls),
		aibilling.short_number(ncustomers), CASE WHEN all_sums.unpriced > 0 THEN format('; %s without a price yet', aibilling.short_number(all_sums.unpriced)) ELSE '' END,
		saved, aibilling.usd_text(saved), aibilling.percent_text(all_sums.cached, all_sums.input),
		aibilling.percent_text(all_sums.reasoning, all_sums.output), aibilling.short_number(all_sums.output),
		aibilling.report_trend(sums, first_day, last_day), models, customers, aibilling.report_waiting(usage), aibilling.report_delivery(usage));
END
$$;
COMMENT ON FUNCTION aibilling.report(regclass, date, date) IS
'A page of HTML that needs nothing else: what a usage table''s rows cost from from_day to to_day (UTC, both inclusive; default: this month so far), by time, model and customer, what caches saved, what waits and how delivery is doing. For psql -At -o report.html. Needs SELECT on the table; what waits and how delivery is doing is shown to its owner and to pg_monitor';

CREATE FUNCTION aibilling.chart(
	usage regclass,
	by text DEFAULT 'day',
	days integer DEFAULT 30,
	OUT name text,
	OUT usd numeric,
	OUT calls bigint,
	OUT chart text)
RETURNS SETOF record
LANGUAGE plpgsql STABLE PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
	last_day date := (now() AT TIME ZONE 'UTC')::date;
	first_day date := last_day - (chart.days - 1);
	eighths text[] := CASE getdatabaseencoding() WHEN 'UTF8' THEN '{"",▏,▎,▍,▌,▋,▊,▉}'::text[] END;
BEGIN
	IF chart.by IS NULL OR chart.by NOT IN ('day', 'model', 'provider', 'customer') THEN
		RAISE EXCEPTION 'invalid value for parameter "by": "%"', chart.by
			USING ERRCODE = 'invalid_parameter_value', HINT = 'Use ''day'', ''model'', ''provider'' or ''customer''.';
	ELSIF chart.days IS NULL OR chart.days NOT BETWEEN 1 AND 3700 THEN
		RAISE EXCEPTION 'days must be between 1 and 3700'
			USING ERRCODE = 'invalid_parameter_value';
	END IF;
	RETURN QUERY
	WITH sums AS (
		SELECT d::date::text AS name, 0::numeric AS cents, 0::bigint AS calls
		FROM generate_series(first_day::timestamp, last_day::timestamp, interval '1 day') d WHERE chart.by = 'day'
		UNION ALL
		SELECT CASE chart.by WHEN 'day' THEN u.day::text WHEN 'model' THEN coalesce(u.model, '(none)') ELSE coalesce(u.provider, '(none)') END,
			u.cost_cents, u.usage_rows
		FROM aibilling.usage_by(usage, 'model', first_day, last_day) u WHERE chart.by <> 'customer'
		UNION ALL
		SELECT coalesce(u.external_customer_id, u.customer_id::text, '(no customer)'), u.cost_cents, u.usage_rows
		FROM aibilling.usage_by(usage, 'customer', first_day, last_day) u WHERE chart.by = 'customer'
	), grouped AS (
		SELECT s.name, sum(s.cents) AS cents, sum(s.calls)::bigint AS calls FROM sums s GROUP BY s.name
	), sized AS (
		SELECT g.*, CASE WHEN g.cents > 0 THEN round(320 * g.cents / max(g.cents) OVER ())::integer ELSE 0 END AS len FROM grouped g
	)
	SELECT left(regexp_replace(s.name, '[\x01-\x1f\x7f]', '?', 'g'), 60), round(s.cents / 100, 4), s.calls,
		CASE WHEN eighths IS NULL THEN repeat('#', s.len / 8) ELSE repeat('█', s.len / 8) || eighths[s.len % 8 + 1] END
	FROM sized s
	ORDER BY CASE WHEN chart.by = 'day' THEN s.name END, s.cents DESC, s.name
	LIMIT CASE WHEN chart.by = 'day' THEN NULL ELSE 40 END;
END
$$;
COMMENT ON FUNCTION aibilling.chart(regclass, text, integer) IS
'What rows of the last days (UTC, today included) cost, with bars for psql: by day, or the forty models, providers or customers that cost most. Needs SELECT on the table';

CREATE VIEW aibilling.progress WITH (security_barrier) AS
SELECT CASE WHEN s.unknown THEN 'adding up what an older version has delivered' ELSE 'adding deliveries to the rollup' END AS work,
	s.usage_table, NULL::integer AS pid, NULL::timestamptz AS started_at,
	greatest(coalesce(t.deliveries, 0) - s.n, 0) AS done, greatest(coalesce(t.deliveries, 0), s.n) AS total, 'deliveries' AS unit
FROM (
	SELECT o.usage_table, o.sums IS NULL AS unknown, count(*) AS n
	FROM aibilling.share o
	WHERE NOT EXISTS (SELECT FROM aibilling.ledger l WHERE l.id = o.delivery AND l.state = 'sending')
	GROUP BY o.usage_table, o.sums IS NULL
) AS s
LEFT JOIN aibilling.delivery_total t ON t.usage_table = s.usage_table
WHERE aibilling.may_see(s.usage_table)
UNION ALL
SELECT 'sync', NULL, a.pid, a.query_start, d.events, d.events + w.rows, 'rows'
FROM pg_stat_activity a,
	LATERAL (SELECT coalesce(sum(l.events), 0)::bigint AS events FROM aibilling.ledger l
		WHERE l.state = 'delivered' AND l.finished_at >= a.query_start AND aibilling.may_see(l.usage_table)) AS d,
	LATERAL (SELECT coalesce(sum(r.pending + r.in_flight), 0)::bigint AS rows FROM aibilling.status_rows() r) AS w
WHERE a.datname = current_database() AND a.state = 'active' AND a.query ~* '^\s*call\s+aibilling\.sync\M'
UNION ALL
SELECT substring(a.query FROM 'aibilling\.(import_prices|load_bundled_prices|fetch_prices|reconcile|reconcile_rows|reprice|capture|capture_retry|attach)\M'),
	NULL, a.pid, a.query_start, NULL, NULL, NULL
FROM pg_stat_activity a
WHERE a.datname = current_database() AND a.state = 'active' AND a.pid <> pg_backend_pid()
	AND a.query ~ 'aibilling\.(import_prices|load_bundled_prices|fetch_prices|reconcile|reconcile_rows|reprice|capture|capture_retry|attach)\M';
COMMENT ON VIEW aibilling.progress IS
'Long work that is under way: of the worker, for tables that the caller owns (pg_monitor: all), and of sessions, as far as the caller may see their queries in pg_stat_activity';
COMMENT ON COLUMN aibilling.progress.work IS 'What is being done: by the worker, or the function that a session runs';
COMMENT ON COLUMN aibilling.progress.usage_table IS 'For this usage table; NULL: not told';
COMMENT ON COLUMN aibilling.progress.pid IS 'The session; NULL: the worker';
COMMENT ON COLUMN aibilling.progress.started_at IS 'Since when; NULL: not told';
COMMENT ON COLUMN aibilling.progress.done IS 'How much is done; NULL: not told';
COMMENT ON COLUMN aibilling.progress.total IS 'Of how much, as far as is known by now';
COMMENT ON COLUMN aibilling.progress.unit IS 'Of what: deliveries or rows';
GRANT SELECT ON aibilling.progress TO PUBLIC;

GRANT EXECUTE ON FUNCTION
	aibilling.usage_daily(regclass, date, date),
	aibilling.usage_by(regclass, text, date, date),
	aibilling.spend(regclass, text, timestamptz),
	aibilling.close_check(regclass, timestamptz),
	aibilling.close_warning(regclass, timestamptz),
	aibilling.escape_html(text),
	aibilling.usd_text(numeric),
	aibilling.short_number(numeric),
	aibilling.percent_text(numeric, numeric),
	aibilling.axis_top(numeric),
	aibilling.cache_savings(regclass, date, date),
	aibilling.report_style(),
	aibilling.report_trend(jsonb, date, date),
	aibilling.report_bars(text, text, text, text[], numeric[], numeric[]),
	aibilling.report_waiting(regclass),
	aibilling.report_delivery(regclass),
	aibilling.report(regclass, date, date),
	aibilling.chart(regclass, text, integer)
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

-- ---------------------------------------------------------------------------
-- Other people's servers: usage tables that a subscription feeds
-- ---------------------------------------------------------------------------

ALTER TABLE aibilling.usage_table
	ADD COLUMN replicated boolean NOT NULL DEFAULT false,
	ADD COLUMN skipped bigint NOT NULL DEFAULT 0,
	ADD COLUMN kept bigint NOT NULL DEFAULT 0;
COMMENT ON COLUMN aibilling.usage_table.replicated IS
'Whether a subscription feeds it: then its triggers fire for what comes by replication, and no row is refused';
COMMENT ON COLUMN aibilling.usage_table.skipped IS
'Rows that were not stored, since one of their external_id was there already; shown by aibilling.status';
COMMENT ON COLUMN aibilling.usage_table.kept IS
'Rows whose change at the publisher was not taken over, since they were in flight or delivered; shown by aibilling.status';

-- The new functions take the place of the old ones, and their grants.

CREATE FUNCTION aibilling.create_usage_table(name text, server name, replicated boolean DEFAULT false) RETURNS regclass
LANGUAGE c VOLATILE STRICT AS 'MODULE_PATHNAME', 'abp_sql_create_usage_table';
COMMENT ON FUNCTION aibilling.create_usage_table(text, name, boolean) IS
'Creates a usage table owned by the caller and attaches it to the foreign server. name: as one writes a table''s name, quoted and with a schema if need be; replicated: as in aibilling.attach(). Returns the table. Needs CREATE in the schema and USAGE on the server';

CREATE FUNCTION aibilling.attach(usage regclass, server name, existing text DEFAULT 'ignore', replicated boolean DEFAULT false) RETURNS void
LANGUAGE c VOLATILE STRICT AS 'MODULE_PATHNAME', 'abp_sql_attach';
COMMENT ON FUNCTION aibilling.attach(regclass, name, text, boolean) IS
'Makes a table a usage table whose rows are delivered to the foreign server; again for another server. existing: ignore (rows already there are never sent) or send (those without a delivery are). replicated: a subscription feeds the table: its triggers fire for what comes by it, external_id becomes the replica identity, and no row is refused (what an INSERT elsewhere refuses is stored and rejected, a second row of an external_id is skipped, a change of what was sent is not taken over; all is counted in aibilling.status). Raises undefined_column naming what the table lacks. Needs ownership of the table and USAGE on the server';

REVOKE ALL ON FUNCTION aibilling.create_usage_table(text, name, boolean),
	aibilling.attach(regclass, name, text, boolean) FROM PUBLIC;
DO $$
DECLARE
	g record;
BEGIN
	FOR g IN
		SELECT f.new, CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END AS grantee,
			CASE WHEN a.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END AS option
		FROM (VALUES
			('aibilling.create_usage_table(text, name)'::regprocedure, 'aibilling.create_usage_table(text, name, boolean)'::regprocedure),
			('aibilling.attach(regclass, name, text)', 'aibilling.attach(regclass, name, text, boolean)')
		) AS f (old, new)
		JOIN pg_proc p ON p.oid = f.old
		CROSS JOIN LATERAL aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
		WHERE a.grantee <> p.proowner
	LOOP
		EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO %s%s', g.new, g.grantee, g.option);
	END LOOP;
END
$$;
DROP FUNCTION aibilling.create_usage_table(text, name), aibilling.attach(regclass, name, text);

CREATE FUNCTION aibilling.usage_table_ddl(name text) RETURNS text
LANGUAGE c STABLE STRICT AS 'MODULE_PATHNAME', 'abp_sql_usage_table_ddl';
COMMENT ON FUNCTION aibilling.usage_table_ddl(text) IS
'The statements that create a usage table, and a publication of it, on a server of PostgreSQL 15 or later that does not have this extension. name: the table''s, as in aibilling.create_usage_table(); a subscription looks for a table of the same schema and name. Cost columns are not in it, id is not published, external_id is the replica identity, and INSERT and UPDATE are published: what is deleted there stays here';
REVOKE ALL ON FUNCTION aibilling.usage_table_ddl(text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION aibilling.usage_table_ddl(text) TO PUBLIC;

-- What a subscription's worker has told of itself: for the view below, with the rights of whoever owns it.
CREATE VIEW aibilling.feed AS
SELECT r.srrelid::regclass AS usage_table, s.subname AS subscription, s.subenabled AS enabled,
	r.srsubstate <> 'r' AS copying, w.pid,
	-- A worker that has answered all it got is up to date, while it hears from the publisher, who says
	-- something every half a minute.
	CASE
		WHEN w.pid IS NULL OR r.srsubstate IN ('i', 'd') THEN NULL
		WHEN w.received_lsn <= w.latest_end_lsn AND now() - w.last_msg_receipt_time < interval '70 s' THEN interval '0'
		ELSE greatest(clock_timestamp() - w.last_msg_send_time, interval '0')
	END AS lag
FROM pg_subscription_rel r
JOIN pg_subscription s ON s.oid = r.srsubid
-- of several workers of one subscription the first one hears from the publisher
LEFT JOIN LATERAL (
	SELECT * FROM pg_stat_subscription l WHERE l.subid = s.oid AND l.relid IS NULL AND l.pid IS NOT NULL
	ORDER BY l.received_lsn DESC NULLS LAST LIMIT 1
) AS w ON true;
COMMENT ON VIEW aibilling.feed IS 'Private: the subscriptions that feed tables, and how far behind they are; shown by aibilling.status';
COMMENT ON COLUMN aibilling.feed.usage_table IS 'The table';
COMMENT ON COLUMN aibilling.feed.subscription IS 'The subscription';
COMMENT ON COLUMN aibilling.feed.enabled IS 'Whether it is enabled';
COMMENT ON COLUMN aibilling.feed.copying IS 'Whether it still copies the rows that were there before it';
COMMENT ON COLUMN aibilling.feed.pid IS 'Process id of its worker; NULL: none runs';
COMMENT ON COLUMN aibilling.feed.lag IS 'How old the last news of the publisher was that is stored here; NULL: not known';
REVOKE ALL ON aibilling.feed FROM PUBLIC;

-- ---------------------------------------------------------------------------
-- Other people's tables: rows of a table that exists become usage rows
-- ---------------------------------------------------------------------------

CREATE FUNCTION aibilling.owns(source regclass) RETURNS boolean
LANGUAGE sql STABLE PARALLEL SAFE
RETURN EXISTS (SELECT FROM pg_class c WHERE c.oid = owns.source AND pg_has_role(current_user, c.relowner, 'USAGE'));
COMMENT ON FUNCTION aibilling.owns(regclass) IS 'Whether the caller has the rights of a table''s owner';

-- Private tables, as pg_dump wants them; people see and change their own rows through the views.
CREATE TABLE aibilling.capture_definition (
	source regclass NOT NULL,
	usage regclass NOT NULL,
	prefix text COLLATE "C" NOT NULL,
	columns jsonb NOT NULL,
	preset text,
	only_when text NOT NULL,
	replicated boolean NOT NULL,
	function_name text NOT NULL,
	key_columns text[] NOT NULL,
	key text NOT NULL,
	targets text NOT NULL,
	expressions text NOT NULL,
	changes text NOT NULL,
	on_conflict text NOT NULL,
	captured_at timestamptz NOT NULL DEFAULT now(),
	released_at timestamptz,
	PRIMARY KEY (source, usage)
);
CREATE VIEW aibilling.captures WITH (security_barrier) AS
SELECT * FROM aibilling.capture_definition d WHERE aibilling.owns(d.source)
WITH LOCAL CHECK OPTION;
COMMENT ON TABLE aibilling.capture_definition IS 'Private: which tables'' rows become usage rows, and how; see aibilling.captures';
COMMENT ON VIEW aibilling.captures IS
'A row per pair of tables that aibilling.capture() was called for: source, usage table and mapping. Owners of the source see and change their own';
COMMENT ON COLUMN aibilling.captures.source IS 'The table whose rows are captured';
COMMENT ON COLUMN aibilling.captures.usage IS 'The usage table that they go to';
COMMENT ON COLUMN aibilling.captures.prefix IS
'What every external_id begins with, so that two databases'' rows of one key are two; it stays when the capture is released';
COMMENT ON COLUMN aibilling.captures.columns IS 'The mapping as it was given';
COMMENT ON COLUMN aibilling.captures.preset IS 'The preset, NULL: none';
COMMENT ON COLUMN aibilling.captures.only_when IS 'The condition under which a row is complete, the preset''s included';
COMMENT ON COLUMN aibilling.captures.replicated IS 'Whether a subscription feeds the source';
COMMENT ON COLUMN aibilling.captures.function_name IS 'The trigger function, and the first part of its triggers'' names';
COMMENT ON COLUMN aibilling.captures.key_columns IS 'Columns of the source''s key';
COMMENT ON COLUMN aibilling.captures.key IS 'An expression for the key as text';
COMMENT ON COLUMN aibilling.captures.targets IS 'Columns of the usage table that are filled';
COMMENT ON COLUMN aibilling.captures.expressions IS 'What they are filled with';
COMMENT ON COLUMN aibilling.captures.changes IS 'Whether a mapped row (m) differs from the usage row (u) that it became';
COMMENT ON COLUMN aibilling.captures.on_conflict IS 'The columns that are unique with external_id; '''': none are';
COMMENT ON COLUMN aibilling.captures.captured_at IS 'When it was captured last';
COMMENT ON COLUMN aibilling.captures.released_at IS 'When it was released; NULL: it is captured';

CREATE TABLE aibilling.capture_error (
	source regclass NOT NULL,
	usage regclass NOT NULL,
	key text NOT NULL,
	"row" jsonb,
	error text NOT NULL,
	at timestamptz NOT NULL DEFAULT now(),
	PRIMARY KEY (source, usage, key)
);
CREATE VIEW aibilling.capture_failure WITH (security_barrier) AS
SELECT e.source, e.usage, e.key, e."row", e.error, e.at FROM aibilling.capture_error e WHERE aibilling.owns(e.source)
WITH LOCAL CHECK OPTION;
COMMENT ON TABLE aibilling.capture_error IS 'Private: rows that could not be captured; see aibilling.capture_failure';
COMMENT ON VIEW aibilling.capture_failure IS
'Rows of captured tables that did not become usage rows, or have changed after they did (error: changed after capture). Tried again by aibilling.capture_retry(); deleted by the owner of the source, who sees their own, when they are dealt with';
COMMENT ON COLUMN aibilling.capture_failure.source IS 'The table of the row';
COMMENT ON COLUMN aibilling.capture_failure.usage IS 'The usage table that it was to go to';
COMMENT ON COLUMN aibilling.capture_failure.key IS 'Its key, as text';
COMMENT ON COLUMN aibilling.capture_failure."row" IS 'The row; NULL: it cannot be had as jsonb, and is read from its table when it is tried again';
COMMENT ON COLUMN aibilling.capture_failure.error IS 'What went wrong';
COMMENT ON COLUMN aibilling.capture_failure.at IS 'When';
COMMENT ON COLUMN aibilling.capture_definition.source IS 'As aibilling.captures.source';
COMMENT ON COLUMN aibilling.capture_definition.usage IS 'As aibilling.captures.usage';
COMMENT ON COLUMN aibilling.capture_definition.prefix IS 'As aibilling.captures.prefix';
COMMENT ON COLUMN aibilling.capture_definition.columns IS 'As aibilling.captures.columns';
COMMENT ON COLUMN aibilling.capture_definition.preset IS 'As aibilling.captures.preset';
COMMENT ON COLUMN aibilling.capture_definition.only_when IS 'As aibilling.captures.only_when';
COMMENT ON COLUMN aibilling.capture_definition.replicated IS 'As aibilling.captures.replicated';
COMMENT ON COLUMN aibilling.capture_definition.function_name IS 'As aibilling.captures.function_name';
COMMENT ON COLUMN aibilling.capture_definition.key_columns IS 'As aibilling.captures.key_columns';
COMMENT ON COLUMN aibilling.capture_definition.key IS 'As aibilling.captures.key';
COMMENT ON COLUMN aibilling.capture_definition.targets IS 'As aibilling.captures.targets';
COMMENT ON COLUMN aibilling.capture_definition.expressions IS 'As aibilling.captures.expressions';
COMMENT ON COLUMN aibilling.capture_definition.changes IS 'As aibilling.captures.changes';
COMMENT ON COLUMN aibilling.capture_definition.on_conflict IS 'As aibilling.captures.on_conflict';
COMMENT ON COLUMN aibilling.capture_definition.captured_at IS 'As aibilling.captures.captured_at';
COMMENT ON COLUMN aibilling.capture_definition.released_at IS 'As aibilling.captures.released_at';
COMMENT ON COLUMN aibilling.capture_error.source IS 'As aibilling.capture_failure.source';
COMMENT ON COLUMN aibilling.capture_error.usage IS 'As aibilling.capture_failure.usage';
COMMENT ON COLUMN aibilling.capture_error.key IS 'As aibilling.capture_failure.key';
COMMENT ON COLUMN aibilling.capture_error."row" IS 'As aibilling.capture_failure.row';
COMMENT ON COLUMN aibilling.capture_error.error IS 'As aibilling.capture_failure.error';
COMMENT ON COLUMN aibilling.capture_error.at IS 'As aibilling.capture_failure.at';
SELECT pg_extension_config_dump('aibilling.capture_definition', '');
SELECT pg_extension_config_dump('aibilling.capture_error', '');

CREATE FUNCTION aibilling.check_expression(source regclass, expression text, type regtype) RETURNS void
LANGUAGE c STABLE STRICT AS 'MODULE_PATHNAME', 'abp_sql_check_expression';
COMMENT ON FUNCTION aibilling.check_expression(regclass, text, regtype) IS
'Raises an error unless the text is one SQL expression over a row of the table that can be cast to the type';

CREATE FUNCTION aibilling.closest_word(word text, words text[]) RETURNS text
LANGUAGE c IMMUTABLE STRICT AS 'MODULE_PATHNAME', 'abp_sql_closest_word';
COMMENT ON FUNCTION aibilling.closest_word(text, text[]) IS 'The word among those that was likely meant; NULL: none';

CREATE FUNCTION aibilling.provider_of_model(model text) RETURNS text
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
RETURN CASE
	WHEN model ~* '^(gpt|chatgpt|o[1-9]|text-embedding-|dall-e|whisper|tts-|codex)' THEN 'openai'
	WHEN model ~* '^claude' THEN 'anthropic'
	WHEN model ~* '^(gemini|gemma|imagen|veo)' THEN 'google'
	WHEN model ~* '^(mistral|ministral|codestral|magistral|pixtral|devstral|open-mi[sx]tral)' THEN 'mistral'
	WHEN model ~* '^deepseek' THEN 'deepseek'
	WHEN model ~* '^grok' THEN 'xai'
	WHEN model ~* '^(command|c4ai|rerank|embed-)' THEN 'cohere'
	WHEN model ~* '^sonar' THEN 'perplexity'
	WHEN model ~ '^[^/]+/' THEN split_part(model, '/', 1)
END;
COMMENT ON FUNCTION aibilling.provider_of_model(text) IS
'The provider that a model''s name tells, for tables that have no column of it; NULL: it does not tell';

-- What the presets map; a column that a version of the other software does not have is left out.
CREATE FUNCTION aibilling.capture_preset(preset text, source regclass)
RETURNS TABLE (target text, expression text)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
	has jsonb := (SELECT jsonb_object_agg(a.attname, true) FROM pg_attribute a
		WHERE a.attrelid = source AND a.attnum > 0 AND NOT a.attisdropped);
	needed text[] := CASE preset
		WHEN 'litellm' THEN '{request_id,startTime,model,prompt_tokens,completion_tokens,metadata,spend}'::text[]
		WHEN 'langfuse' THEN '{id,trace_id,type,start_time,end_time,model,prompt_tokens,completion_tokens,unit}'::text[]
		WHEN 'open_webui' THEN '{id,role,done,user_id,model_id,usage,created_at}'::text[]
		END;
	missing text;
	schema name;
	alias text;
	object text;
	traces text;
BEGIN
	IF needed IS NULL THEN
		RAISE EXCEPTION 'unknown preset "%"', preset
			USING ERRCODE = 'invalid_parameter_value',
				HINT = coalesce(format('Perhaps you meant "%s". ', aibilling.closest_word(preset, '{litellm,langfuse,open_webui}')), '')
					|| 'Presets are litellm, langfuse and open_webui.';
	END IF;
	SELECT string_agg(format('"%s"', n), ', ') INTO missing FROM unnest(needed) n WHERE NOT has ? n;
	IF missing IS NOT NULL THEN
		RAISE EXCEPTION 'preset "%" is not for table %', preset, source
			USING ERRCODE = 'undefined_column', DETAIL = format('It lacks %s.', missing),
				HINT = CASE preset WHEN 'litellm' THEN 'It is for LiteLLM''s table "LiteLLM_SpendLogs".'
					WHEN 'langfuse' THEN 'It is for the table "observations" of Langfuse 2.'
					ELSE 'It is for the table "chat_message" of Open WebUI.' END;
	END IF;
	SELECT n.nspname, quote_ident(c.relname) INTO schema, alias
	FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = source;

	CASE preset
	WHEN 'litellm' THEN
		object := $x$coalesce(metadata->'usage_object', metadata->'additional_usage_values')$x$;
		RETURN QUERY
		SELECT v.target, v.expression FROM (VALUES
			('only_when', concat_ws(' AND ', 'true',
				CASE WHEN has ? 'status' THEN 'status IS DISTINCT FROM ''failure''' END,
				CASE WHEN has ? 'cache_hit' THEN 'cache_hit IS DISTINCT FROM ''True''' END)),
			('occurred_at', '"startTime" AT TIME ZONE ''UTC'''),
			('external_customer_id', format('coalesce(%s)', concat_ws(', ',
				CASE WHEN has ? 'end_user' THEN 'nullif(end_user, '''')' END,
				CASE WHEN has ? 'user' THEN 'nullif("user", '''')' END,
				CASE WHEN has ? 'team_id' THEN 'nullif(team_id, '''')' END,
				CASE WHEN has ? 'organization_id' THEN 'nullif(organization_id, '''')' END, 'NULL'))),
			('provider', CASE WHEN has ? 'custom_llm_provider'
				THEN 'coalesce(nullif(custom_llm_provider, ''''), aibilling.provider_of_model(model))'
				ELSE 'aibilling.provider_of_model(model)' END),
			('model', 'nullif(model, '''')'),
			('generation_id', 'request_id'),
			-- with both kinds of cached tokens in it; some versions have left them out
			('input_tokens', format('greatest(prompt_tokens, coalesce((%1$s #>> ''{prompt_tokens_details,cached_tokens}'')::bigint, (%1$s ->> ''cache_read_input_tokens'')::bigint, 0)
		+ coalesce((%1$s #>> ''{prompt_tokens_details,cache_creation_tokens}'')::bigint, (%1$s ->> ''cache_creation_input_tokens'')::bigint, 0))', object)),
			('cache_read_tokens', format('coalesce((%1$s #>> ''{prompt_tokens_details,cached_tokens}'')::bigint, (%1$s ->> ''cache_read_input_tokens'')::bigint)', object)),
			('cache_write_tokens', format('coalesce((%1$s #>> ''{prompt_tokens_details,cache_creation_tokens}'')::bigint, (%1$s ->> ''cache_creation_input_tokens'')::bigint)
		- coalesce((%1$s #>> ''{prompt_tokens_details,cache_creation_token_details,ephemeral_1h_input_tokens}'')::bigint, (%1$s #>> ''{cache_creation_token_details,ephemeral_1h_input_tokens}'')::bigint, 0)', object)),
			('cache_write_1h_tokens', format('coalesce((%1$s #>> ''{prompt_tokens_details,cache_creation_token_details,ephemeral_1h_input_tokens}'')::bigint, (%1$s #>> ''{cache_creation_token_details,ephemeral_1h_input_tokens}'')::bigint)', object)),
			('output_tokens', 'completion_tokens'),
			('reasoning_tokens', format('(%s #>> ''{completion_tokens_details,reasoning_tokens}'')::bigint', object)),
			('web_search_count', format('(%s #>> ''{server_tool_use,web_search_requests}'')::bigint', object)),
			-- 0 is what LiteLLM has where it knows no price
			('provider_cost', 'nullif(spend::numeric, 0)')
		) AS v (target, expression);
	WHEN 'langfuse' THEN
		SELECT format('(SELECT t.user_id FROM %s t WHERE t.id = %s.trace_id)', c.oid::regclass, alias) INTO traces
		FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
		WHERE n.nspname = schema AND c.relname = 'traces';
		RETURN QUERY
		SELECT v.target, v.expression FROM (VALUES
			('only_when', 'type = ''GENERATION'' AND coalesce(unit, ''TOKENS'') = ''TOKENS'' AND end_time IS NOT NULL'),
			('occurred_at', 'start_time AT TIME ZONE ''UTC'''),
			('external_customer_id', traces),
			('provider', 'aibilling.provider_of_model(model)'),
			('model', 'model'),
			('generation_id', 'id'),
			('input_tokens', 'prompt_tokens'),
			('output_tokens', 'completion_tokens'),
			('provider_cost', CASE WHEN has ?& '{total_cost,calculated_total_cost}'::text[]
				THEN 'nullif(coalesce(total_cost, calculated_total_cost), 0)' END),
			('tags', format('jsonb_strip_nulls(jsonb_build_object(%s))', concat_ws(', ', '''trace_id'', trace_id',
				CASE WHEN has ? 'project_id' THEN '''project_id'', project_id' END)))
		) AS v (target, expression)
		WHERE v.expression IS NOT NULL;
	ELSE
		RETURN QUERY
		SELECT v.target, v.expression FROM (VALUES
			('only_when', 'role = ''assistant'' AND done AND json_typeof(usage::json) = ''object'''),
			('occurred_at', 'to_timestamp(created_at / CASE WHEN created_at > 10000000000 THEN 1000.0 ELSE 1 END)'),
			('external_customer_id', 'user_id'),
			('provider', 'CASE WHEN model_id LIKE ''openrouter.%'' THEN ''openrouter'' ELSE aibilling.provider_of_model(model_id) END'),
			('model', 'regexp_replace(model_id, ''^openrouter\.'', '''')'),
			('generation_id', 'id'),
			('input_tokens', 'coalesce(usage ->> ''input_tokens'', usage ->> ''prompt_tokens'', usage ->> ''prompt_eval_count'', usage ->> ''prompt_n'')'),
			('cache_read_tokens', 'usage #>> ''{prompt_tokens_details,cached_tokens}'''),
			('output_tokens', 'coalesce(usage ->> ''output_tokens'', usage ->> ''completion_tokens'', usage ->> ''eval_count'', usage ->> ''predicted_n'')'),
			('reasoning_tokens', 'usage #>> ''{completion_tokens_details,reasoning_tokens}'''),
			('provider_cost', 'nullif((usage ->> ''cost'')::numeric, 0)'),
			('tags', CASE WHEN has ? 'chat_id' THEN 'jsonb_strip_nulls(jsonb_build_object(''chat_id'', chat_id))' END)
		) AS v (target, expression)
		WHERE v.expression IS NOT NULL;
	END CASE;
END
$$;
COMMENT ON FUNCTION aibilling.capture_preset(text, regclass) IS
'What a preset maps to the columns of a usage table, and as only_when the condition under which a row is complete. Raises undefined_column where the table is another one than it is for';

-- By their names: well-known ones first, as people have them.
CREATE FUNCTION aibilling.capture_by_name(source regclass)
RETURNS TABLE (target text, expression text)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
BEGIN
	RETURN QUERY
	SELECT DISTINCT ON (n.target) n.target,
		CASE
			WHEN n.target = 'occurred_at' AND a.atttypid = 'timestamp'::regtype THEN format('%I AT TIME ZONE ''UTC''', a.attname)
			WHEN n.target = 'occurred_at' AND a.atttypid IN ('bigint'::regtype, 'integer'::regtype)
				THEN format('to_timestamp(%1$I / CASE WHEN %1$I > 10000000000 THEN 1000.0 ELSE 1 END)', a.attname)
			ELSE quote_ident(a.attname)
		END
	FROM (VALUES
		('occurred_at', '{occurred_at,created_at,createdAt,timestamp,start_time,startTime,time,ts,inserted_at,date}'::text[]),
		('external_customer_id', '{external_customer_id,externalCustomerId,customer_external_id,customer_id,customerId,user_id,userId,tenant_id,tenantId,account_id,accountId,organization_id,organizationId,org_id,end_user}'),
		('provider', '{provider,model_provider,modelProvider,llm_provider,vendor}'),
		('model', '{model,model_id,modelId,model_name,modelName}'),
		('generation_id', '{generation_id,generationId,response_id,responseId,request_id,requestId,completion_id}'),
		('input_tokens', '{input_tokens,inputTokens,prompt_tokens,promptTokens,tokens_in,input_token_count}'),
		('cache_read_tokens', '{cache_read_tokens,cacheReadTokens,cached_tokens,cachedTokens,cached_input_tokens,cachedInputTokens}'),
		('cache_write_tokens', '{cache_write_tokens,cacheWriteTokens}'),
		('cache_write_1h_tokens', '{cache_write_1h_tokens}'),
		('output_tokens', '{output_tokens,outputTokens,completion_tokens,completionTokens,tokens_out,output_token_count}'),
		('reasoning_tokens', '{reasoning_tokens,reasoningTokens}'),
		('request_count', '{request_count}'), ('web_search_count', '{web_search_count}'),
		('service_tier', '{service_tier,serviceTier}'), ('sub_provider', '{sub_provider}'),
		('external_member_id', '{external_member_id}'),
		('units', '{units}'), ('raw_usage', '{raw_usage}'), ('usage_format', '{usage_format}'), ('tags', '{tags}')
	) AS n (target, names)
	CROSS JOIN LATERAL unnest(n.names) WITH ORDINALITY AS w (name, rank)
	JOIN pg_attribute a ON a.attrelid = source AND a.attname = w.name AND a.attnum > 0 AND NOT a.attisdropped
	WHERE n.target NOT IN ('tags', 'units', 'raw_usage') OR a.atttypid IN ('json'::regtype, 'jsonb'::regtype)
	ORDER BY n.target, w.rank;
END
$$;
COMMENT ON FUNCTION aibilling.capture_by_name(regclass) IS
'What the columns of a table say by their names, for the columns of a usage table; its id and costs never';

CREATE FUNCTION aibilling.capture_plan(source regclass, usage regclass, columns jsonb, preset text, only_when text, replicated boolean)
RETURNS aibilling.captures
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
SET timezone = 'UTC'
AS $$
#variable_conflict use_variable
DECLARE
	plan aibilling.captures;
	relation pg_class;
	known aibilling.captures;
	m record;
	word text;
	hint text;
	given jsonb := coalesce(columns, '{}');
	mapped jsonb := '{}';
	conditions text[] := '{}';
	problem text;
	has_raw boolean;
BEGIN
	SELECT c.* INTO relation FROM pg_class c WHERE c.oid = source;
	IF source IS NULL OR relation.oid IS NULL OR usage IS NULL THEN
		RAISE EXCEPTION 'source and usage table must be given' USING ERRCODE = 'null_value_not_allowed';
	ELSIF relation.relkind NOT IN ('r', 'p') OR relation.relpersistence = 't' THEN
		RAISE EXCEPTION '% is not a table that can be captured', source
			USING ERRCODE = 'wrong_object_type', HINT = 'Views, foreign and temporary tables have no triggers of this kind: capture the tables below.';
	ELSIF relation.relispartition THEN
		RAISE EXCEPTION '% is a partition', source
			USING ERRCODE = 'wrong_object_type', HINT = 'Capture the partitioned table.';
	ELSIF source = usage THEN
		RAISE EXCEPTION '% is the usage table itself', source USING ERRCODE = 'invalid_parameter_value';
	ELSIF NOT aibilling.owns(source) OR NOT aibilling.owns(usage) THEN
		RAISE EXCEPTION 'must be owner of table %', CASE WHEN aibilling.owns(source) THEN usage ELSE source END
			USING ERRCODE = 'insufficient_privilege', DETAIL = 'The trigger that captures rows acts for the owner of both tables.';
	ELSIF NOT EXISTS (SELECT FROM pg_class c WHERE c.oid = usage AND pg_has_role(relation.relowner, c.relowner, 'USAGE')) THEN
		RAISE EXCEPTION 'tables % and % belong to different roles', source, usage
			USING ERRCODE = 'insufficient_privilege', DETAIL = 'The trigger that captures rows acts for the owner of both tables.';
	ELSIF NOT EXISTS (SELECT FROM aibilling.usage_table t WHERE t.usage = capture_plan.usage) THEN
		RAISE EXCEPTION 'table % is not attached', usage
			USING ERRCODE = 'object_not_in_prerequisite_state', HINT = format('Attach it with SELECT aibilling.attach(%L, server => ''...'').', usage);
	ELSIF replicated AND NOT EXISTS (SELECT FROM aibilling.usage_table t WHERE t.usage = capture_plan.usage AND t.replicated) THEN
		RAISE EXCEPTION 'the triggers of usage table % do not fire for what a subscription brings', usage
			USING ERRCODE = 'object_not_in_prerequisite_state',
				HINT = format('Attach it again with SELECT aibilling.attach(%L, server => ''...'', replicated => true).', usage);
	ELSIF jsonb_typeof(given) <> 'object' THEN
		RAISE EXCEPTION 'columns must be a JSON object that maps columns of the usage table to SQL expressions'
			USING ERRCODE = 'invalid_parameter_value';
	END IF;
	SELECT c.* INTO known FROM aibilling.captures c WHERE c.source = capture_plan.source AND c.usage = capture_plan.usage;
	IF known.source IS NOT NULL AND known.released_at IS NULL THEN
		RAISE EXCEPTION 'rows of % are captured for % already', source, usage
			USING ERRCODE = 'duplicate_object', HINT = format('Release them first with SELECT aibilling.release(%L, %L).', source, usage);
	END IF;
	IF EXISTS (
		WITH RECURSIVE fed (source, usage) AS (
			SELECT c.source, c.usage FROM aibilling.captures c WHERE c.source = capture_plan.usage AND c.released_at IS NULL
			UNION SELECT c.source, c.usage FROM aibilling.captures c JOIN fed ON c.source = fed.usage WHERE c.released_at IS NULL)
		SELECT FROM fed WHERE fed.usage = capture_plan.source) THEN
		RAISE EXCEPTION 'rows of % are captured for %: they would go round in a circle', usage, source
			USING ERRCODE = 'invalid_parameter_value';
	END IF;

	-- the key
	SELECT array_agg(a.attname ORDER BY k.ordinality),
		CASE WHEN count(*) = 1 THEN format('%I::text', min(a.attname))
			ELSE format('jsonb_build_array(%s)::text', string_agg(quote_ident(a.attname), ', ' ORDER BY k.ordinality)) END
	INTO plan.key_columns, plan.key
	FROM (
		SELECT i.indexrelid, i.indkey, i.indnkeyatts FROM pg_index i
		WHERE i.indrelid = source AND i.indisunique AND i.indisvalid AND i.indimmediate AND i.indpred IS NULL
			AND i.indexprs IS NULL
			AND NOT EXISTS (SELECT FROM unnest(i.indkey::smallint[]) WITH ORDINALITY AS c (attnum, n)
				JOIN pg_attribute a ON a.attrelid = source AND a.attnum = c.attnum WHERE c.n <= i.indnkeyatts AND NOT a.attnotnull)
		ORDER BY i.indisprimary DESC, i.indnkeyatts, i.indexrelid LIMIT 1
	) AS i
	CROSS JOIN LATERAL unnest(i.indkey::smallint[]) WITH ORDINALITY AS k (attnum, ordinality)
	JOIN pg_attribute a ON a.attrelid = source AND a.attnum = k.attnum
	WHERE k.ordinality <= i.indnkeyatts;
	IF plan.key_columns IS NULL THEN
		RAISE EXCEPTION 'table % has no key', source
			USING ERRCODE = 'object_not_in_prerequisite_state', DETAIL = 'Without one it cannot be told whether a row was captured before.',
				HINT = 'Add a primary key, or a UNIQUE index on columns that are NOT NULL.';
	END IF;

	plan.source := source;
	plan.usage := usage;
	plan.columns := given;
	plan.preset := preset;
	plan.replicated := coalesce(replicated, false);
	plan.captured_at := now();
	plan.prefix := coalesce(known.prefix, left(replace(gen_random_uuid()::text, '-', ''), 12));
	plan.function_name := format('aibilling_capture_%s%s',
		CASE WHEN octet_length(relation.relname) <= 24 THEN relation.relname || '_' END, plan.prefix);

	-- what is given, of the preset, by name
	FOR m IN SELECT e.key, e.value FROM jsonb_each(given) e LOOP
		IF m.key ~ '^(id|cost_(nanos|cents|status))$' THEN
			RAISE EXCEPTION 'column "%" of a usage table is filled by the extension', m.key USING ERRCODE = 'invalid_parameter_value';
		ELSIF NOT EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = usage AND a.attname = m.key AND a.attnum > 0 AND NOT a.attisdropped) THEN
			word := aibilling.closest_word(m.key, ARRAY(SELECT a.attname::text FROM pg_attribute a
				WHERE a.attrelid = usage AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum));
			hint := CASE WHEN word IS NULL THEN 'The keys of columns are names of the usage table''s columns.' ELSE format('Perhaps you meant "%s".', word) END;
			RAISE EXCEPTION 'usage table % has no column "%"', usage, m.key USING ERRCODE = 'undefined_column', HINT = hint;
		ELSIF jsonb_typeof(m.value) NOT IN ('string', 'number', 'null') THEN
			RAISE EXCEPTION 'the mapping of "%" is no SQL expression: %', m.key, m.value
				USING ERRCODE = 'invalid_parameter_value', HINT = 'Give it as a JSON string, or null to leave the column empty.';
		END IF;
	END LOOP;
	IF preset IS NOT NULL THEN
		FOR m IN SELECT p.target, p.expression FROM aibilling.capture_preset(preset, source) p LOOP
			IF m.target = 'only_when' THEN
				conditions := conditions || m.expression;
			ELSE
				mapped := mapped || jsonb_build_object(m.target, m.expression);
			END IF;
		END LOOP;
	ELSE
		FOR m IN SELECT p.target, p.expression FROM aibilling.capture_by_name(source) p WHERE NOT given ? p.target LOOP
			BEGIN
				PERFORM aibilling.check_expression(source, m.expression, (SELECT a.atttypid::regtype FROM pg_attribute a
					WHERE a.attrelid = usage AND a.attname = m.target AND a.attnum > 0 AND NOT a.attisdropped));
				mapped := mapped || jsonb_build_object(m.target, m.expression);
			EXCEPTION WHEN cannot_coerce OR datatype_mismatch OR indeterminate_datatype THEN
				NULL;
			END;
		END LOOP;
		-- Anthropic's own count leaves cached tokens out of input_tokens, LiteLLM's has them in it.
		SELECT string_agg(format('"%s"', a.attname), ' and ' ORDER BY a.attnum) INTO word FROM pg_attribute a
		WHERE a.attrelid = source AND a.attname IN ('cache_read_input_tokens', 'cache_creation_input_tokens', 'cacheReadInputTokens', 'cacheCreationInputTokens')
			AND NOT a.attisdropped;
		IF word IS NOT NULL AND NOT given ?| '{cache_read_tokens,raw_usage}' THEN
			RAISE EXCEPTION 'it cannot be told whether the input tokens of % contain those of %', source, word
				USING ERRCODE = 'ambiguous_column',
					HINT = 'Map input_tokens (all of them, cached ones included), cache_read_tokens and cache_write_tokens by columns.';
		END IF;
		IF mapped ? 'model' AND NOT mapped ? 'provider' AND NOT given ? 'provider' THEN
			mapped := mapped || jsonb_build_object('provider', format('aibilling.provider_of_model((%s)::text)', mapped ->> 'model'));
		ELSIF given ? 'model' AND NOT mapped ? 'provider' AND NOT given ? 'provider' THEN
			mapped := mapped || jsonb_build_object('provider', format('aibilling.provider_of_model((%s)::text)', given ->> 'model'));
		END IF;
	END IF;
	mapped := jsonb_build_object('external_id', format('%L || CASE WHEN octet_length(%2$s) <= 240 THEN %2$s ELSE encode(sha256(convert_to(%2$s, ''UTF8'')), ''hex'') END',
		plan.prefix || ':', plan.key)) || mapped || given;
	IF trim(coalesce(only_when, 'true')) <> 'true' OR conditions = '{}' THEN
		conditions := conditions || coalesce(only_when, 'true');
	END IF;
	plan.only_when := array_to_string(ARRAY(SELECT format(E'(%s\n)', c) FROM unnest(conditions) c), ' AND ');

	-- each of them must be one
	FOR m IN
		SELECT a.attname AS target, a.atttypid::regtype AS type, mapped ->> a.attname AS expression
		FROM pg_attribute a WHERE a.attrelid = usage AND a.attnum > 0 AND NOT a.attisdropped AND mapped ->> a.attname IS NOT NULL
		UNION ALL
		SELECT 'only_when', 'boolean', c FROM unnest(conditions) c
	LOOP
		BEGIN
			PERFORM aibilling.check_expression(source, m.expression, m.type);
		EXCEPTION WHEN OTHERS THEN
			GET STACKED DIAGNOSTICS problem = MESSAGE_TEXT, hint = PG_EXCEPTION_HINT;
			RAISE EXCEPTION 'cannot map % of %: %', m.target, usage, problem
				USING ERRCODE = SQLSTATE, DETAIL = format('Its expression over %s is: %s', source, m.expression),
					HINT = CASE WHEN hint <> '' THEN hint WHEN SQLSTATE = '42883' THEN 'Functions and operators outside of pg_catalog need their schema.' ELSE '' END;
		END;
	END LOOP;
	SELECT string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum),
		string_agg(format(E'\t(%s\n)::%s AS %I', mapped ->> a.attname, format_type(a.atttypid, NULL), a.attname), E',\n' ORDER BY a.attnum)
	INTO plan.targets, plan.expressions
	FROM pg_attribute a
	WHERE a.attrelid = usage AND a.attnum > 0 AND NOT a.attisdropped AND mapped ->> a.attname IS NOT NULL;
	-- What its raw usage object or a default may have filled in is no change.
	has_raw := mapped ->> 'raw_usage' IS NOT NULL;
	SELECT coalesce(string_agg(format(CASE
			WHEN a.attname = 'raw_usage' THEN '(m.%1$I <> u.%1$I)'
			WHEN has_raw OR a.attname IN ('tags', 'service_tier', 'occurred_at', 'request_count') THEN '(m.%1$I IS NOT NULL AND m.%1$I IS DISTINCT FROM u.%1$I)'
			ELSE '(m.%1$I IS DISTINCT FROM u.%1$I)' END, a.attname), ' OR ' ORDER BY a.attnum), 'false')
	INTO plan.changes
	FROM pg_attribute a
	WHERE a.attrelid = usage AND a.attnum > 0 AND NOT a.attisdropped AND mapped ->> a.attname IS NOT NULL
		AND a.attname <> 'external_id' AND a.atttypid <> 'json'::regtype
		AND NOT (has_raw AND a.attname IN ('service_tier', 'units'));
	SELECT coalesce((
		SELECT (SELECT format('(%s)', string_agg(quote_ident(a.attname), ', '))
			FROM pg_attribute a WHERE a.attrelid = usage AND a.attnum = ANY (i.indkey::smallint[]))
		FROM pg_index i
		WHERE i.indrelid = usage AND i.indisunique AND i.indisvalid AND i.indimmediate AND i.indpred IS NULL AND i.indexprs IS NULL
			AND (SELECT a.attnum FROM pg_attribute a WHERE a.attrelid = usage AND a.attname = 'external_id') = ANY (i.indkey::smallint[])
		ORDER BY i.indnkeyatts LIMIT 1), '')
	INTO plan.on_conflict;
	RETURN plan;
END
$$;
COMMENT ON FUNCTION aibilling.capture_plan(regclass, regclass, jsonb, text, text, boolean) IS
'How the rows of a table become usage rows, checked; what aibilling.capture_sql() is made from';

CREATE FUNCTION aibilling.capture_sql(source regclass, usage regclass, columns jsonb DEFAULT '{}', preset text DEFAULT NULL,
	only_when text DEFAULT 'true', existing text DEFAULT 'ignore', replicated boolean DEFAULT false) RETURNS text
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $capture_sql$
#variable_conflict use_variable
DECLARE
	plan aibilling.captures;
	relation pg_class;
	schema name;
	sql text;
	word text;
	by_statement boolean;
	by_row boolean;
	flag text;
	level text;
	rows text;
	branches text := '';
	fallbacks text := '';
	keys text := '';
BEGIN
	IF existing IS NULL OR existing NOT IN ('ignore', 'send', 'load') THEN
		word := aibilling.closest_word(existing, '{ignore,send,load}');
		RAISE EXCEPTION 'invalid value for parameter "existing": "%"', existing
			USING ERRCODE = 'invalid_parameter_value', HINT = coalesce(format('Perhaps you meant ''%s''. ', word), '') || 'Use ''ignore'', ''send'' or ''load''.';
	END IF;
	plan := aibilling.capture_plan(source, usage, columns, preset, only_when, replicated);
	SELECT c.* INTO relation FROM pg_class c WHERE c.oid = source;
	schema := relation.relnamespace::regnamespace::text;
	-- A statement has all its rows at once; a subscription has single rows, and so has what inserts
	-- into a partition, which fires no trigger of the table's statements.
	by_statement := NOT plan.replicated;
	by_row := plan.replicated OR relation.relkind = 'p';
	flag := 'aibilling_capture.p' || plan.prefix;
	FOR level, rows IN
		SELECT * FROM (VALUES ('STATEMENT', 'new_rows'), ('ROW', '(SELECT (NEW).*)')) AS v (level, rows)
		WHERE v.level = 'ROW' OR by_statement
	LOOP
		branches := branches || CASE WHEN level = 'ROW' AND NOT by_row THEN '' ELSE format(E'\tELSIF TG_LEVEL = %L THEN\n%s\t\tINSERT INTO %s (%s)\n\t\tSELECT\n%s\n\t\tFROM %s AS %I\n\t\tWHERE %s;\n',
			level, CASE WHEN by_row AND level = 'STATEMENT' THEN format(E'\t\tPERFORM set_config(%L, '''', true);\n', flag) END,
			usage, plan.targets, plan.expressions, rows, relation.relname, plan.only_when) END;
		keys := keys || format(E'\t\t\t\t\tIF TG_LEVEL = %L THEN\n\t\t\t\t\t\tPERFORM aibilling.capture_keys(%L, ARRAY(SELECT %s FROM %s AS %I), SQLERRM);\n\t\t\t\t\tEND IF;\n',
			level, plan.function_name, plan.key, rows, relation.relname);
		fallbacks := fallbacks || format(E'\t\t\tIF TG_LEVEL = %L THEN\n\t\t\t\tPERFORM aibilling.capture_rows(%L, ARRAY(SELECT to_jsonb(r) FROM %s AS r), SQLSTATE, SQLERRM);\n\t\t\tEND IF;\n',
			level, plan.function_name, rows);
	END LOOP;

	sql := format($sql$-- Rows of %1$s become rows of %2$s.
CREATE FUNCTION %3$s.%4$I() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET timezone = 'UTC'
SET datestyle = 'ISO'
AS $capture$
#variable_conflict use_column
BEGIN
	IF TG_OP = 'UPDATE' THEN
		PERFORM aibilling.capture_changed(%4$L, to_jsonb(OLD), to_jsonb(NEW));
%5$s%6$s	END IF;
	RETURN NULL;
EXCEPTION
	WHEN serialization_failure OR deadlock_detected THEN
		RAISE;
	WHEN OTHERS THEN
		-- one by one; what cannot be captured is in aibilling.capture_failure
		BEGIN
%7$s			RETURN NULL;
		EXCEPTION
			WHEN serialization_failure OR deadlock_detected THEN
				RAISE;
			WHEN OTHERS THEN
				-- not even as jsonb: their keys
				BEGIN
%8$s				EXCEPTION
					WHEN serialization_failure OR deadlock_detected THEN
						RAISE;
					WHEN OTHERS THEN
						RAISE WARNING 'rows of %% are not captured: %%', TG_RELID::regclass, SQLERRM;
				END;
				RETURN NULL;
		END;
END
$capture$;
REVOKE ALL ON FUNCTION %3$s.%4$I() FROM PUBLIC;
$sql$, source, usage, schema, plan.function_name,
		-- the depth tells this statement from others that its triggers run
		CASE WHEN by_statement AND by_row THEN format(E'\tELSIF TG_WHEN = ''BEFORE'' THEN\n\t\tPERFORM set_config(%L, (pg_trigger_depth() - 1)::text, true);\n', flag) END,
		branches, fallbacks, keys);
	IF relation.relowner <> current_user::regrole THEN
		sql := sql || format(E'ALTER FUNCTION %s.%I() OWNER TO %s;\n', schema, plan.function_name, relation.relowner::regrole);
	END IF;
	IF by_statement AND by_row THEN
		sql := sql || format(E'CREATE TRIGGER %I BEFORE INSERT ON %s FOR EACH STATEMENT EXECUTE FUNCTION %s.%I();\n',
			plan.function_name || '_begin', source, schema, plan.function_name);
	END IF;
	IF by_statement THEN
		sql := sql || format(E'CREATE TRIGGER %I AFTER INSERT ON %s REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION %s.%I();\n',
			plan.function_name || '_insert', source, schema, plan.function_name);
	END IF;
	IF by_row THEN
		sql := sql || format(E'CREATE TRIGGER %I AFTER INSERT ON %s FOR EACH ROW %sEXECUTE FUNCTION %s.%I();\n', plan.function_name || '_row', source,
			CASE WHEN by_statement THEN format('WHEN (current_setting(%L, true) IS DISTINCT FROM pg_trigger_depth()::text) ', flag) END,
			schema, plan.function_name);
	END IF;
	sql := sql || format(E'CREATE TRIGGER %I AFTER UPDATE ON %s FOR EACH ROW WHEN (OLD.* OPERATOR(pg_catalog.*<>) NEW.*) EXECUTE FUNCTION %s.%I();\n',
		plan.function_name || '_update', source, schema, plan.function_name);
	IF plan.replicated THEN
		sql := sql || format(E'ALTER TABLE %s ENABLE ALWAYS TRIGGER %I, ENABLE ALWAYS TRIGGER %I;\n', source,
			plan.function_name || '_row', plan.function_name || '_update');
	END IF;
	sql := sql || format(E'INSERT INTO aibilling.captures SELECT (jsonb_populate_record(NULL::aibilling.captures, %L)).*\n\tON CONFLICT (source, usage) DO UPDATE SET (%s) = ROW (%s);\n',
		to_jsonb(plan),
		(SELECT string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum) FROM pg_attribute a WHERE a.attrelid = 'aibilling.captures'::regclass AND a.attnum > 0),
		(SELECT string_agg('excluded.' || quote_ident(a.attname), ', ' ORDER BY a.attnum) FROM pg_attribute a WHERE a.attrelid = 'aibilling.captures'::regclass AND a.attnum > 0));
	IF existing <> 'ignore' THEN
		sql := sql || format(E'SELECT aibilling.capture_history(%L, %L, %L);\n', source::text, usage::text, existing);
	END IF;
	RETURN sql;
END
$capture_sql$;
COMMENT ON FUNCTION aibilling.capture_sql(regclass, regclass, jsonb, text, text, text, boolean) IS
'The statements that aibilling.capture() runs with the same arguments; does nothing. The prefix of external_id is drawn anew each time, until the capture has one';

CREATE FUNCTION aibilling.capture(source regclass, usage regclass, columns jsonb DEFAULT '{}', preset text DEFAULT NULL,
	only_when text DEFAULT 'true', existing text DEFAULT 'ignore', replicated boolean DEFAULT false) RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
	IF coalesce(existing, 'ignore') <> 'ignore' AND current_setting('transaction_isolation') NOT LIKE 'read%' THEN
		RAISE EXCEPTION 'rows that are there cannot be captured in a transaction of isolation level %', current_setting('transaction_isolation')
			USING ERRCODE = 'invalid_transaction_state', DETAIL = 'It would not see those that others have committed meanwhile.';
	END IF;
	EXECUTE aibilling.capture_sql(source, usage, columns, preset, only_when, existing, replicated);
	IF NOT coalesce(replicated, false) AND EXISTS (SELECT FROM pg_subscription_rel r WHERE r.srrelid = source) THEN
		RAISE WARNING 'a subscription feeds %: its rows are not captured', source
			USING HINT = 'Release the capture, and call it with replicated => true.';
	END IF;
END
$$;
COMMENT ON FUNCTION aibilling.capture(regclass, regclass, jsonb, text, text, text, boolean) IS
'Has the rows of a table become rows of a usage table, by triggers that belong to the owner of both. columns: SQL expressions over the source''s row by columns of the usage table, null to leave one empty; preset: litellm, langfuse or open_webui; without one, what columns leaves out is matched by name. external_id is a random prefix and the source''s key. only_when: the condition under which a row is complete; an UPDATE that makes it so captures it. existing: ignore, send or load (priced, not sent) the rows that are there. replicated: a subscription feeds the source. The source''s statements never fail because of it: see aibilling.capture_failure. aibilling.capture_sql() shows what will run';

CREATE FUNCTION aibilling.release(source regclass, usage regclass) RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	d aibilling.captures;
	schema text;
	word text;
BEGIN
	IF NOT aibilling.owns(source) THEN
		RAISE EXCEPTION 'must be owner of table %', source USING ERRCODE = 'insufficient_privilege';
	END IF;
	SELECT c.* INTO d FROM aibilling.captures c WHERE c.source = release.source AND c.usage = release.usage AND c.released_at IS NULL;
	IF NOT FOUND THEN
		RAISE EXCEPTION 'rows of % are not captured for %', source, usage USING ERRCODE = 'undefined_object';
	END IF;
	SELECT c.relnamespace::regnamespace::text INTO schema FROM pg_class c WHERE c.oid = source;
	FOREACH word IN ARRAY '{begin,insert,row,update}'::text[] LOOP
		EXECUTE format('DROP TRIGGER IF EXISTS %I ON %s', d.function_name || '_' || word, source);
	END LOOP;
	EXECUTE format('DROP FUNCTION IF EXISTS %s.%I()', schema, d.function_name);
	UPDATE aibilling.captures c SET released_at = now() WHERE c.source = release.source AND c.usage = release.usage;
END
$$;
COMMENT ON FUNCTION aibilling.release(regclass, regclass) IS
'Ends what aibilling.capture() began: drops its triggers and their function. Usage rows and failures stay, and the prefix of external_id, so that what is captured again is the same. Needs ownership of the source';

-- Rows as their source has them, by the stored definition.
CREATE FUNCTION aibilling.capture_row(d aibilling.captures, source_row jsonb, error text DEFAULT NULL, source_key text DEFAULT NULL) RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET timezone = 'UTC'
SET datestyle = 'ISO'
AS $$
DECLARE
	mapped text;
	changed boolean;
	n bigint;
BEGIN
	IF source_key IS NULL THEN
		EXECUTE format('SELECT %s FROM jsonb_populate_record(NULL::%s, $1) AS r', d.key, d.source) INTO source_key USING source_row;
	END IF;
	mapped := format(E'SELECT\n%s\nFROM %s AS %I WHERE %s AND %s', d.expressions,
		CASE WHEN source_row IS NULL THEN d.source::text ELSE format('jsonb_populate_record(NULL::%s, $1)', d.source) END,
		(SELECT c.relname FROM pg_class c WHERE c.oid = d.source),
		CASE WHEN source_row IS NULL THEN format('(%s = $2)', d.key) ELSE 'true' END, d.only_when);
	IF error IS NULL THEN
		BEGIN
			EXECUTE format('INSERT INTO %1$s (%2$s) SELECT m.* FROM (%3$s) AS m WHERE NOT EXISTS (SELECT FROM %1$s u WHERE u.external_id = m.external_id)%4$s',
				d.usage, d.targets, mapped, CASE WHEN d.on_conflict <> '' THEN format(' ON CONFLICT %s DO NOTHING', d.on_conflict) END)
			USING source_row, source_key;
			GET DIAGNOSTICS n = ROW_COUNT;
			IF n = 0 THEN
				EXECUTE format('SELECT EXISTS (SELECT FROM (%s) AS m JOIN %s u ON u.external_id = m.external_id WHERE %s)', mapped, d.usage, d.changes)
				INTO changed USING source_row, source_key;
				error := CASE WHEN changed THEN 'changed after capture' END;
			END IF;
		EXCEPTION
			WHEN serialization_failure OR deadlock_detected THEN
				RAISE;
			WHEN OTHERS THEN
				error := SQLERRM;
		END;
	END IF;
	IF error IS NULL THEN
		DELETE FROM aibilling.capture_failure f WHERE f.source = d.source AND f.usage = d.usage AND f.key = source_key;
		RETURN true;
	END IF;
	INSERT INTO aibilling.capture_failure AS f (source, usage, key, "row", error, at)
	VALUES (d.source, d.usage, source_key, source_row, error, now())
	ON CONFLICT (source, usage, key) DO UPDATE SET "row" = excluded."row", error = excluded.error, at = excluded.at;
	RETURN false;
END
$$;
COMMENT ON FUNCTION aibilling.capture_row(aibilling.captures, jsonb, text, text) IS
'Captures a row, given as jsonb or as NULL and its key, unless it was before; with an error only notes it. What goes wrong is put into aibilling.capture_failure. Returns whether nothing did';

-- A tenth at a time, until the rows that cannot be captured are found.
CREATE FUNCTION aibilling.capture_together(d aibilling.captures, source_rows jsonb[]) RETURNS bigint
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET timezone = 'UTC'
SET datestyle = 'ISO'
SET enable_hashjoin = off
SET enable_mergejoin = off
SET enable_seqscan = off
AS $$
DECLARE
	n integer := cardinality(source_rows);
	part integer := (n + 9) / 10;
	relname name := (SELECT c.relname FROM pg_class c WHERE c.oid = d.source);
	mapped text;
	captured bigint;
BEGIN
	IF n <= 1 THEN
		RETURN (SELECT count(*) FILTER (WHERE aibilling.capture_row(d, r)) FROM unnest(source_rows) r);
	END IF;
	mapped := format(E'SELECT\n%s, %s AS "source key", "the row" FROM unnest($1) AS "the row", LATERAL jsonb_populate_record(NULL::%s, "the row") AS %I WHERE %s',
		d.expressions, d.key, d.source, relname, d.only_when);
	BEGIN
		EXECUTE format('INSERT INTO aibilling.capture_failure (source, usage, key, "row", error, at)'
			' SELECT $2, $3, m."source key", m."the row", ''changed after capture'', now() FROM (%s) AS m JOIN %s u ON u.external_id = m.external_id WHERE %s'
			' ON CONFLICT (source, usage, key) DO UPDATE SET "row" = excluded."row", error = excluded.error, at = excluded.at',
			mapped, d.usage, d.changes) USING source_rows, d.source, d.usage;
		EXECUTE format('INSERT INTO %1$s (%2$s) SELECT %2$s FROM (%3$s) AS m WHERE NOT EXISTS (SELECT FROM %1$s u WHERE u.external_id = m.external_id)%4$s',
			d.usage, d.targets, mapped, CASE WHEN d.on_conflict <> '' THEN format(' ON CONFLICT %s DO NOTHING', d.on_conflict) END)
		USING source_rows;
		GET DIAGNOSTICS captured = ROW_COUNT;
		RETURN captured;
	EXCEPTION
		WHEN serialization_failure OR deadlock_detected THEN
			RAISE;
		WHEN OTHERS THEN
			captured := 0;
	END;
	FOR i IN 0 .. (n - 1) / part LOOP
		captured := captured + aibilling.capture_together(d, source_rows[i * part + 1 : (i + 1) * part]);
	END LOOP;
	RETURN captured;
END
$$;
COMMENT ON FUNCTION aibilling.capture_together(aibilling.captures, jsonb[]) IS
'Captures rows, given as jsonb, that were not before. What goes wrong is put into aibilling.capture_failure. Returns how many are captured';

CREATE FUNCTION aibilling.capture_rows(capture text, source_rows jsonb[], state text, error text) RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	d aibilling.captures;
BEGIN
	SELECT c.* INTO d FROM aibilling.captures c WHERE c.function_name = capture AND c.released_at IS NULL;
	IF NOT FOUND THEN
		RAISE EXCEPTION 'there is no capture "%"', capture USING ERRCODE = 'undefined_object';
	END IF;
	-- of the statement or the server, not of one of its rows: all would fail alike
	IF left(state, 2) IN ('42', '53', '55', '0A', '3F') THEN
		PERFORM aibilling.capture_row(d, r, error) FROM unnest(source_rows) r;
	ELSE
		PERFORM aibilling.capture_together(d, source_rows);
	END IF;
END
$$;
COMMENT ON FUNCTION aibilling.capture_rows(text, jsonb[], text, text) IS
'Captures rows that could not be captured by their statement''s trigger, because of this error. For the triggers of aibilling.capture()';

CREATE FUNCTION aibilling.capture_keys(capture text, source_keys text[], error text) RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
	PERFORM aibilling.capture_row(c, NULL, error, k)
	FROM aibilling.captures c, unnest(source_keys) k WHERE c.function_name = capture AND c.released_at IS NULL;
END
$$;
COMMENT ON FUNCTION aibilling.capture_keys(text, text[], text) IS
'Notes rows that cannot be had as jsonb in aibilling.capture_failure, by their keys. For the triggers of aibilling.capture()';

CREATE FUNCTION aibilling.capture_changed(capture text, old_row jsonb, new_row jsonb) RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET timezone = 'UTC'
SET datestyle = 'ISO'
AS $$
DECLARE
	d aibilling.captures;
	relname name;
	was record;
	is_now record;
	captured boolean;
	query text;
BEGIN
	SELECT c.* INTO d FROM aibilling.captures c WHERE c.function_name = capture AND c.released_at IS NULL;
	IF NOT FOUND THEN
		RAISE EXCEPTION 'there is no capture "%"', capture USING ERRCODE = 'undefined_object';
	END IF;
	SELECT c.relname INTO relname FROM pg_class c WHERE c.oid = d.source;
	query := format(E'SELECT coalesce(%s, false) AS complete, %s AS key FROM jsonb_populate_record(NULL::%s, $1) AS %I', d.only_when, d.key, d.source, relname);
	EXECUTE query INTO was USING old_row;
	EXECUTE query INTO is_now USING new_row;
	IF NOT was.complete AND NOT is_now.complete THEN
		RETURN;
	END IF;
	-- As far as it was complete: what its columns are mapped to may not be computed before.
	IF was.complete THEN
		EXECUTE format(E'SELECT EXISTS (SELECT FROM %s u WHERE u.external_id = (SELECT m.external_id FROM (SELECT\n%s\nFROM jsonb_populate_record(NULL::%s, $1) AS %I) m))',
			d.usage, d.expressions, d.source, relname) INTO captured USING old_row;
		IF captured AND (was.key <> is_now.key OR NOT is_now.complete) THEN
			PERFORM aibilling.capture_row(d, new_row, 'changed after capture');
			RETURN;
		ELSIF NOT captured AND NOT EXISTS (SELECT FROM aibilling.capture_failure f
			WHERE f.source = d.source AND f.usage = d.usage AND f.key = was.key) THEN
			RETURN;				-- it was there before
		END IF;
	END IF;
	IF is_now.complete THEN
		PERFORM aibilling.capture_row(d, new_row);
	END IF;
END
$$;
COMMENT ON FUNCTION aibilling.capture_changed(text, jsonb, jsonb) IS
'Captures a row that an UPDATE has made complete, and notes a captured one that it has changed. For the triggers of aibilling.capture()';

CREATE FUNCTION aibilling.capture_history(source regclass, usage regclass, existing text) RETURNS bigint
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET timezone = 'UTC'
SET datestyle = 'ISO'
SET enable_hashjoin = off
SET enable_mergejoin = off
SET enable_seqscan = off
AS $$
DECLARE
	d aibilling.captures;
	relname name;
	enqueue text := current_setting('aibilling_polar.enqueue');
	key_list text;
	last_key text;
	next_key text;
	range text;
	n bigint;
	captured bigint := 0;
	seen bigint := 0;
BEGIN
	SELECT c.* INTO d FROM aibilling.captures c
	WHERE c.source = capture_history.source AND c.usage = capture_history.usage AND c.released_at IS NULL;
	IF NOT FOUND THEN
		RAISE EXCEPTION 'rows of % are not captured for %', source, usage USING ERRCODE = 'undefined_object';
	END IF;
	SELECT c.relname INTO relname FROM pg_class c WHERE c.oid = source;
	SELECT string_agg(quote_ident(k), ', ') INTO key_list FROM unnest(d.key_columns) k;
	PERFORM set_config('aibilling_polar.enqueue', CASE existing WHEN 'load' THEN 'off' ELSE 'on' END, true);
	LOOP
		-- the last of the next ten thousand, as (literal, ...)
		EXECUTE format('SELECT %s FROM (SELECT %s FROM %s%s ORDER BY %2$s OFFSET 9999 LIMIT 1) AS k',
			(SELECT format('format(%L, %s)', '(' || string_agg(format('%%L::%s', format_type(a.atttypid, a.atttypmod)), ', ' ORDER BY k.ordinality) || ')',
				string_agg(quote_ident(k.name), ', ' ORDER BY k.ordinality))
			 FROM unnest(d.key_columns) WITH ORDINALITY AS k (name, ordinality)
			 JOIN pg_attribute a ON a.attrelid = source AND a.attname = k.name),
			key_list, source, ' WHERE (' || key_list || ') > ' || last_key)
		INTO next_key;
		range := concat_ws(' AND ', '(' || key_list || ') > ' || last_key, '(' || key_list || ') <= ' || next_key, 'true');
		BEGIN
			EXECUTE format(E'INSERT INTO %s (%s) SELECT m.* FROM (SELECT\n%s\nFROM (SELECT * FROM %s WHERE %s) AS %I WHERE %s) AS m'
				' WHERE NOT EXISTS (SELECT FROM %1$s u WHERE u.external_id = m.external_id)',
				usage, d.targets, d.expressions, source, range, relname, d.only_when);
			GET DIAGNOSTICS n = ROW_COUNT;
		EXCEPTION
			WHEN serialization_failure OR deadlock_detected THEN
				RAISE;
			WHEN OTHERS THEN
				EXECUTE format('SELECT aibilling.capture_together($1, array_agg(to_jsonb(r))) FROM %s AS r WHERE %s', source, range)
				INTO n USING d;
		END;
		captured := captured + n;
		EXIT WHEN next_key IS NULL;
		last_key := next_key;
		seen := seen + 10000;
		IF seen % 100000 = 0 THEN
			RAISE NOTICE '% rows of % are read, % of them captured', seen, source, captured;
		END IF;
	END LOOP;
	PERFORM set_config('aibilling_polar.enqueue', enqueue, true);
	RAISE NOTICE '% rows of % that were there are captured%', captured, source, CASE existing WHEN 'load' THEN ', and not sent' ELSE '' END;
	RETURN captured;
END
$$;
COMMENT ON FUNCTION aibilling.capture_history(regclass, regclass, text) IS
'Captures the rows of a captured table that are there and were not yet. existing: send, or load (priced, not sent). Returns how many; a NOTICE tells every 100,000 rows. For aibilling.capture(), and to be called again where it was not to the end';

CREATE FUNCTION aibilling.capture_retry(source regclass) RETURNS bigint
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	f record;
	n bigint := 0;
BEGIN
	IF NOT aibilling.owns(source) THEN
		RAISE EXCEPTION 'must be owner of table %', source USING ERRCODE = 'insufficient_privilege';
	END IF;
	FOR f IN
		SELECT c AS d, e."row", e.key FROM aibilling.capture_failure e JOIN aibilling.captures c ON (c.source, c.usage) = (e.source, e.usage)
		WHERE e.source = capture_retry.source AND c.released_at IS NULL AND e.error <> 'changed after capture'
		ORDER BY e.at, e.key
	LOOP
		n := n + aibilling.capture_row(f.d, f."row", NULL, f.key)::integer;
	END LOOP;
	RETURN n;
END
$$;
COMMENT ON FUNCTION aibilling.capture_retry(regclass) IS
'Tries the rows in aibilling.capture_failure of a table again, but for those that have changed after they were captured. Returns how many are captured now. Needs ownership of the table';

REVOKE ALL ON aibilling.capture_definition, aibilling.captures, aibilling.capture_error, aibilling.capture_failure FROM PUBLIC;
GRANT SELECT, INSERT, UPDATE ON aibilling.captures TO PUBLIC;
GRANT SELECT, INSERT, UPDATE, DELETE ON aibilling.capture_failure TO PUBLIC;
REVOKE ALL ON FUNCTION aibilling.owns(regclass), aibilling.check_expression(regclass, text, regtype), aibilling.closest_word(text, text[]),
	aibilling.provider_of_model(text), aibilling.capture_preset(text, regclass), aibilling.capture_by_name(regclass),
	aibilling.capture_plan(regclass, regclass, jsonb, text, text, boolean),
	aibilling.capture_sql(regclass, regclass, jsonb, text, text, text, boolean),
	aibilling.capture(regclass, regclass, jsonb, text, text, text, boolean), aibilling.release(regclass, regclass),
	aibilling.capture_row(aibilling.captures, jsonb, text, text), aibilling.capture_together(aibilling.captures, jsonb[]), aibilling.capture_keys(text, text[], text), aibilling.capture_rows(text, jsonb[], text, text),
	aibilling.capture_changed(text, jsonb, jsonb), aibilling.capture_history(regclass, regclass, text),
	aibilling.capture_retry(regclass) FROM PUBLIC;
-- With the rights of whoever calls.
GRANT EXECUTE ON FUNCTION aibilling.owns(regclass), aibilling.check_expression(regclass, text, regtype), aibilling.closest_word(text, text[]),
	aibilling.provider_of_model(text), aibilling.capture_preset(text, regclass), aibilling.capture_by_name(regclass),
	aibilling.capture_plan(regclass, regclass, jsonb, text, text, boolean),
	aibilling.capture_sql(regclass, regclass, jsonb, text, text, text, boolean),
	aibilling.capture(regclass, regclass, jsonb, text, text, text, boolean), aibilling.release(regclass, regclass),
	aibilling.capture_row(aibilling.captures, jsonb, text, text), aibilling.capture_together(aibilling.captures, jsonb[]), aibilling.capture_keys(text, text[], text), aibilling.capture_rows(text, jsonb[], text, text),
	aibilling.capture_changed(text, jsonb, jsonb), aibilling.capture_history(regclass, regclass, text),
	aibilling.capture_retry(regclass) TO PUBLIC;

CREATE OR REPLACE VIEW aibilling.status AS
SELECT r.usage_table, r.server, r.pending, r.pending_estimated, r.unpriced, r.rejected, r.in_flight, r.oldest,
	r.last_delivery, r.last_error, r.deliveries, r.delivered, r.duplicates, r.unexpected_duplicates, r.vanished,
	r.worker_pid,
	-- (names, which are of another collation, are among these words)
	concat_ws('; ', r.status, f.words,
		CASE WHEN c.skipped > 0 THEN format('%s rows came again and were skipped', c.skipped) END,
		CASE WHEN c.kept > 0 THEN format('warning: %s rows were changed at their publisher after they had been sent, which changed nothing', c.kept) END,
		CASE WHEN e.rows > 0 THEN format('warning: %s rows that were to be captured need a look (aibilling.capture_failure)', e.rows) END) COLLATE "default" AS status,
	f.lag, c.skipped, c.kept
FROM aibilling.status_rows() r
LEFT JOIN LATERAL (
	SELECT a.skipped + coalesce(sum(n.rows) FILTER (WHERE n.state = 's'), 0)::bigint AS skipped,
		a.kept + coalesce(sum(n.rows) FILTER (WHERE n.state = 'k'), 0)::bigint AS kept
	FROM aibilling.attachment a
	LEFT JOIN LATERAL (
		SELECT e.state, coalesce((SELECT sum(coalesce(upper(r), 9223372036854775807) - lower(r)) FROM unnest(e.ids) r), 1) AS rows
		FROM aibilling.outbox_entry e
		WHERE e.usage_table = a.usage AND e.state IN ('s', 'k') AND e.not_before = '-infinity'
	) AS n ON true
	WHERE a.usage = r.usage_table
	GROUP BY a.skipped, a.kept
) AS c ON true
LEFT JOIN LATERAL (
	SELECT CASE WHEN count(*) = count(f.lag) THEN max(f.lag) END AS lag,
		string_agg(CASE
			WHEN NOT f.enabled THEN format('warning: subscription "%s" is disabled, and what its publisher writes waits there', f.subscription)
			WHEN f.pid IS NULL THEN format('warning: subscription "%s" does not run, and what its publisher writes waits there; see the server log', f.subscription)
			WHEN f.copying THEN format('subscription "%s" copies the rows that were there before it', f.subscription)
			WHEN f.lag > interval '1 minute' THEN format('subscription "%s" is %s behind', f.subscription, date_trunc('second', f.lag))
			END, '; ' ORDER BY f.subscription) AS words
	FROM aibilling.feed f
	WHERE f.usage_table = r.usage_table
) AS f ON true
LEFT JOIN LATERAL (SELECT count(*) AS rows FROM aibilling.capture_error e WHERE e.usage = r.usage_table) AS e ON true;
COMMENT ON COLUMN aibilling.status.lag IS
'How far the slowest subscription that feeds the table is behind its publisher, by the clocks of both; NULL: none does, or one does not run or copies what was there before it, which status says';
COMMENT ON COLUMN aibilling.status.skipped IS
'Rows that came by a subscription and were not stored, since one of their external_id was there already';
COMMENT ON COLUMN aibilling.status.kept IS
'Rows whose change at their publisher was not taken over, since they had been sent';
COMMENT ON COLUMN aibilling.status.vanished IS
'Rows that were gone when they were to be sent or, where a subscription feeds the table, deleted while they were in flight';
