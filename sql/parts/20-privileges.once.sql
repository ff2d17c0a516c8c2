-- ---------------------------------------------------------------------------
-- Privileges
-- ---------------------------------------------------------------------------

-- Tables are private but for those that show each caller their own rows.
REVOKE ALL ON ALL TABLES IN SCHEMA aibilling FROM PUBLIC;
REVOKE ALL ON ALL SEQUENCES IN SCHEMA aibilling FROM PUBLIC;
GRANT SELECT ON aibilling.price, aibilling.price_source, aibilling.service_tier_rule, aibilling.model_alias,
	aibilling.price_quarantine, aibilling.usage_table, aibilling.outbox, aibilling.unpriced, aibilling.delivery,
	aibilling.status, aibilling.progress TO PUBLIC;
GRANT SELECT, INSERT, UPDATE ON aibilling.captures TO PUBLIC;
GRANT SELECT, INSERT, UPDATE, DELETE ON aibilling.capture_failure TO PUBLIC;

-- Functions run with the rights of whoever calls, or ask who it is; but for those
-- that only PostgreSQL calls.
GRANT EXECUTE ON ALL ROUTINES IN SCHEMA aibilling TO PUBLIC;
REVOKE ALL ON FUNCTION aibilling.polar_fdw_validator(text[], oid), aibilling.price_changed(), aibilling.mark_shipped(), aibilling.store_below(),
	aibilling.on_sql_drop(), aibilling.on_server_ddl(), aibilling.on_table_ddl(), aibilling.on_drop_extension()
	FROM PUBLIC;
