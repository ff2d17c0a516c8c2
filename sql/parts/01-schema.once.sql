\echo Use "CREATE EXTENSION aibilling_polar" to load this file. \quit

-- In the order of a row's way: what a call costs by the price tables, the usage
-- table that holds it, the outbox that has it sent, the ledger of what was sent;
-- then what people see and do, and last who may.
--
-- The script runs with search_path = pg_catalog (control file): what is not
-- qualified is PostgreSQL's own.

CREATE SCHEMA aibilling;
COMMENT ON SCHEMA aibilling IS
'AI usage: priced exactly, delivered to Polar, reported in SQL (extension aibilling_polar)';
GRANT USAGE ON SCHEMA aibilling TO PUBLIC;

-- ---------------------------------------------------------------------------
-- Where events go: foreign servers
-- ---------------------------------------------------------------------------

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
