-- ---------------------------------------------------------------------------
-- The ledger: its rows
-- ---------------------------------------------------------------------------

CREATE TABLE aibilling.ledger (
	id bigint NOT NULL DEFAULT nextval('aibilling.delivery_id_seq'),
	event_keys bytea,
	vanished_keys bytea,
	PRIMARY KEY (id)
) INHERITS (aibilling.delivery) WITH (autovacuum_vacuum_scale_factor = 0.05, toast_tuple_target = 8160);
COMMENT ON TABLE aibilling.ledger IS 'Private: the rows of aibilling.delivery';
COMMENT ON COLUMN aibilling.ledger.id IS 'Number of the delivery';
COMMENT ON COLUMN aibilling.ledger.event_keys IS
'While it is being sent: a checksum of each row''s external_id, in the order of the ids, by which a request built again leaves out rows that have come to have the ids since';
COMMENT ON COLUMN aibilling.ledger.vanished_keys IS
'A checksum of the external_ids of rows in vanished_ids, by which those that come back are told from others of their ids; NULL: none is known';
ALTER TABLE aibilling.ledger ALTER COLUMN event_keys SET STORAGE MAIN;
CREATE INDEX ledger_sending ON aibilling.ledger (usage_table) WHERE state = 'sending';
CREATE INDEX ledger_usage_ids ON aibilling.ledger USING gist (usage_ids);
CREATE INDEX ledger_vanished ON aibilling.ledger (usage_table) WHERE vanished_ids IS NOT NULL;
SELECT pg_extension_config_dump('aibilling.ledger', '');

CREATE OR REPLACE FUNCTION aibilling.store_below() RETURNS trigger
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
