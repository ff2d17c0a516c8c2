-- Prepared transactions, where the server has room for some (max_prepared_transactions): a row is in the outbox
-- once its transaction is committed, and not before.
SELECT current_setting('max_prepared_transactions')::int = 0 AS skipped \gset
\if :skipped
\echo skipped: max_prepared_transactions is 0
\quit
\endif
CREATE SERVER prepared FOREIGN DATA WRAPPER polar OPTIONS (url 'http://127.0.0.1:1', event_name 'llm_usage');
SELECT aibilling.create_usage_table('prepared_usage', server => 'prepared');
CREATE FUNCTION ins(key text) RETURNS void LANGUAGE sql AS
$$INSERT INTO prepared_usage (external_id, external_customer_id, provider_cost) VALUES (key, 'c', 0.01)$$;
CREATE VIEW waiting AS
	SELECT external_id, state FROM aibilling.outbox LEFT JOIN prepared_usage ON id = usage_id ORDER BY usage_id;

BEGIN;
SELECT ins('committed');
PREPARE TRANSACTION 'usage_prepared';
SELECT * FROM waiting;
COMMIT PREPARED 'usage_prepared';
SELECT * FROM waiting;
BEGIN;
SELECT ins('rolled back');
PREPARE TRANSACTION 'usage_prepared';
ROLLBACK PREPARED 'usage_prepared';
SELECT * FROM waiting;

DROP VIEW waiting;
DROP FUNCTION ins;
SET client_min_messages = error;
DROP TABLE prepared_usage;
DROP SERVER prepared;
