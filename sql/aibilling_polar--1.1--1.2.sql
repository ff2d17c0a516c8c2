\echo Use "ALTER EXTENSION aibilling_polar UPDATE TO '1.2'" to load this file. \quit

-- Part 1: what a row is, what Polar may have, and who may stop whom.

-- Part 2: prices and what replies cost.

-- Part 3: copies, dumps, replication, and clients as people have them.

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
