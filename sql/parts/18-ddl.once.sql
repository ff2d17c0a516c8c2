-- ---------------------------------------------------------------------------
-- What becomes of the outbox when tables or servers go
-- ---------------------------------------------------------------------------

CREATE FUNCTION aibilling.on_sql_drop() RETURNS event_trigger
LANGUAGE c AS 'MODULE_PATHNAME', 'abp_sql_on_sql_drop';
COMMENT ON FUNCTION aibilling.on_sql_drop() IS
'Event trigger: a dropped usage table takes its outbox along (WARNING with the number of rows not delivered); a server with usage tables cannot be dropped';

-- At every DROP: a typed table goes with its type, any table with an extension.
CREATE EVENT TRIGGER aibilling_on_sql_drop ON sql_drop
	EXECUTE FUNCTION aibilling.on_sql_drop();
COMMENT ON EVENT TRIGGER aibilling_on_sql_drop IS
'Keeps outbox and usage tables in step with DROP (extension aibilling_polar)';

CREATE FUNCTION aibilling.on_server_ddl() RETURNS event_trigger
LANGUAGE c AS 'MODULE_PATHNAME', 'abp_sql_on_server_ddl';
COMMENT ON FUNCTION aibilling.on_server_ddl() IS
'Event trigger: the worker looks at once at a changed server or user mapping';

CREATE EVENT TRIGGER aibilling_on_server_ddl ON ddl_command_end
	WHEN TAG IN ('CREATE SERVER', 'ALTER SERVER', 'CREATE USER MAPPING', 'ALTER USER MAPPING', 'DROP USER MAPPING')
	EXECUTE FUNCTION aibilling.on_server_ddl();
COMMENT ON EVENT TRIGGER aibilling_on_server_ddl IS
'Tells the worker of changed servers (extension aibilling_polar)';
