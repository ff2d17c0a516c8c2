-- ---------------------------------------------------------------------------
-- Operating: what its owner does to delivery
-- ---------------------------------------------------------------------------

CREATE OR REPLACE PROCEDURE aibilling.sync(server name DEFAULT NULL, timeout interval DEFAULT NULL)
LANGUAGE c AS 'MODULE_PATHNAME', 'abp_sql_sync';
COMMENT ON PROCEDURE aibilling.sync(name, interval) IS
'Delivers what is pending now and returns when that is done, set aside or refused (WARNING). server: only this one; timeout: give up after it; NULL: all, never. Delivers the tables that the caller owns, all for a superuser. Commits as it goes: inside a transaction block it raises invalid_transaction_termination';

CREATE OR REPLACE FUNCTION aibilling.preview(usage regclass, max_rows integer DEFAULT 10,
	OUT usage_id bigint, OUT state text, OUT event jsonb, OUT error text) RETURNS SETOF record
LANGUAGE c VOLATILE STRICT AS 'MODULE_PATHNAME', 'abp_sql_preview';
COMMENT ON FUNCTION aibilling.preview(regclass, integer) IS
'The events of up to max_rows rows of the outbox, exactly as they would be sent: pending ones first, then rejected and unpriced ones, with the reason in error. Sends nothing. Needs ownership of the table';

CREATE OR REPLACE FUNCTION aibilling.pause(server name DEFAULT NULL) RETURNS void
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'abp_sql_pause';
COMMENT ON FUNCTION aibilling.pause(name) IS
'Sends nothing to the foreign server until aibilling.resume(); requests in flight end. NULL: all servers. By the owner of the server: nothing of anyone''s; by others: nothing from the usage tables that they own';

CREATE OR REPLACE FUNCTION aibilling.resume(server name DEFAULT NULL) RETURNS void
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'abp_sql_resume';
COMMENT ON FUNCTION aibilling.resume(name) IS
'Ends a pause, whether aibilling.pause() or the server''s answer began it, and every wait after failures, and tries at once. NULL: all servers. A pause of the whole server is ended by its owner only, one of usage tables by their owner';

CREATE OR REPLACE FUNCTION aibilling.retry(usage regclass, ids bigint[] DEFAULT NULL) RETURNS bigint
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'abp_sql_retry';
COMMENT ON FUNCTION aibilling.retry(regclass, bigint[]) IS
'Makes rejected rows pending again. ids: only these; NULL: all. Returns how many. Needs ownership of the table';

CREATE OR REPLACE FUNCTION aibilling.arm() RETURNS void
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'abp_sql_arm';
COMMENT ON FUNCTION aibilling.arm() IS
'Lets this database send although it is a copy (restored, cloned or upgraded). Needs ownership of the database';
