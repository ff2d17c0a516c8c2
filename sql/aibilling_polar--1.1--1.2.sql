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
	sums jsonb,
	PRIMARY KEY (id)
) INHERITS (aibilling.delivery) WITH (autovacuum_vacuum_scale_factor = 0.05);
ALTER TABLE aibilling.ledger ALTER COLUMN event_keys SET STORAGE MAIN;
COMMENT ON TABLE aibilling.ledger IS 'Private: the rows of aibilling.delivery';
COMMENT ON COLUMN aibilling.ledger.id IS 'Number of the delivery';
COMMENT ON COLUMN aibilling.ledger.event_keys IS
'While it is being sent: a checksum of each row''s external_id, in the order of the ids, by which a request built again leaves out rows that have come to have the ids since';
COMMENT ON COLUMN aibilling.ledger.sums IS
'Room for what the batch adds up to per day (UTC), customer, provider, model and event name';
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
'p: to be sent; w: to be sent, but not before not_before; u: waits for a price; r: rejected, waits for an UPDATE or aibilling.retry(). A capital letter: the ids are no longer in that state. n: priced and not queued, to be counted';
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
