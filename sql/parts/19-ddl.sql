-- ---------------------------------------------------------------------------
-- What becomes of the outbox when partitions come back, or the extension goes
-- ---------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION aibilling.on_table_ddl() RETURNS event_trigger
LANGUAGE c AS 'MODULE_PATHNAME', 'abp_sql_on_table_ddl';
COMMENT ON FUNCTION aibilling.on_table_ddl() IS
'Event trigger: rows that come back with a partition, attached again, before they were sent are put into the outbox again';

CREATE EVENT TRIGGER aibilling_on_table_ddl ON ddl_command_end
	WHEN TAG IN ('ALTER TABLE')
	EXECUTE FUNCTION aibilling.on_table_ddl();
COMMENT ON EVENT TRIGGER aibilling_on_table_ddl IS
'Keeps the outbox in step with partitions (extension aibilling_polar)';

CREATE OR REPLACE FUNCTION aibilling.on_drop_extension() RETURNS event_trigger
LANGUAGE c AS 'MODULE_PATHNAME', 'abp_sql_on_drop_extension';
COMMENT ON FUNCTION aibilling.on_drop_extension() IS
'Event trigger: loads the library, which warns (with the number of rows not delivered) when the outbox is dropped with the extension';

CREATE EVENT TRIGGER aibilling_on_drop_extension ON ddl_command_start
	WHEN TAG IN ('DROP EXTENSION', 'DROP OWNED')
	EXECUTE FUNCTION aibilling.on_drop_extension();
COMMENT ON EVENT TRIGGER aibilling_on_drop_extension IS
'Warns of rows that DROP EXTENSION takes from the outbox (extension aibilling_polar)';
