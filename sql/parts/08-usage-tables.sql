-- ---------------------------------------------------------------------------
-- Usage tables: attaching them, their triggers, and subscriptions that feed them
-- ---------------------------------------------------------------------------

-- Attachments and ledger lie in tables of their own, which a role that may read
-- all data can dump.  People see them through the tables above these, whose
-- row-level security shows each owner their own.

CREATE TABLE aibilling.attachment (
	PRIMARY KEY (usage)
) INHERITS (aibilling.usage_table);
COMMENT ON TABLE aibilling.attachment IS 'Private: the rows of aibilling.usage_table';
SELECT pg_extension_config_dump('aibilling.attachment', '');

CREATE OR REPLACE FUNCTION aibilling.price_usage() RETURNS trigger
LANGUAGE c AS 'MODULE_PATHNAME', 'abp_sql_price_usage';
COMMENT ON FUNCTION aibilling.price_usage() IS
'Trigger BEFORE INSERT OR UPDATE of a usage table: fills the columns from raw_usage, computes cost_nanos, cost_cents and cost_status. Raises check_violation for counts and values that cannot be, and refuses an UPDATE of what was billed once the row is in flight or delivered. Put there by aibilling.attach()';

CREATE OR REPLACE FUNCTION aibilling.enqueue_usage() RETURNS trigger
LANGUAGE c AS 'MODULE_PATHNAME', 'abp_sql_enqueue_usage';
COMMENT ON FUNCTION aibilling.enqueue_usage() IS
'Trigger AFTER INSERT of a usage table: puts the row into the outbox, in the same transaction. On a table that is not attached it does nothing';

CREATE OR REPLACE FUNCTION aibilling.guard_usage() RETURNS trigger
LANGUAGE c AS 'MODULE_PATHNAME', 'abp_sql_guard_usage';
COMMENT ON FUNCTION aibilling.guard_usage() IS
'Trigger AFTER DELETE of a usage table: takes a waiting row out of the outbox; raises object_not_in_prerequisite_state for a row that Polar may be getting. A row that the same statement has put into another partition is not deleted';

CREATE OR REPLACE FUNCTION aibilling.truncate_usage() RETURNS trigger
LANGUAGE c AS 'MODULE_PATHNAME', 'abp_sql_truncate_usage';
COMMENT ON FUNCTION aibilling.truncate_usage() IS
'Trigger BEFORE TRUNCATE of a usage table: empties its outbox, with a WARNING that gives the number of rows that were not delivered; raises object_in_use while rows are in flight';

CREATE OR REPLACE FUNCTION aibilling.create_usage_table(name text, server name, replicated boolean DEFAULT false) RETURNS regclass
LANGUAGE c VOLATILE STRICT AS 'MODULE_PATHNAME', 'abp_sql_create_usage_table';
COMMENT ON FUNCTION aibilling.create_usage_table(text, name, boolean) IS
'Creates a usage table owned by the caller and attaches it to the foreign server. name: as one writes a table''s name, quoted and with a schema if need be; replicated: as in aibilling.attach(). Returns the table. Needs CREATE in the schema and USAGE on the server';

CREATE OR REPLACE FUNCTION aibilling.attach(usage regclass, server name, existing text DEFAULT 'ignore', replicated boolean DEFAULT false) RETURNS void
LANGUAGE c VOLATILE STRICT AS 'MODULE_PATHNAME', 'abp_sql_attach';
COMMENT ON FUNCTION aibilling.attach(regclass, name, text, boolean) IS
'Makes a table a usage table whose rows are delivered to the foreign server; again for another server. existing: ignore (rows already there are never sent) or send (those without a delivery are). replicated: a subscription feeds the table: its triggers fire for what comes by it, external_id becomes the replica identity, and no row is refused (what an INSERT elsewhere refuses is stored and rejected, a second row of an external_id is skipped, a change of what was sent is not taken over; all is counted in aibilling.status). Raises undefined_column naming what the table lacks. Needs ownership of the table and USAGE on the server';

CREATE OR REPLACE FUNCTION aibilling.detach(usage regclass, pending text DEFAULT 'refuse') RETURNS void
LANGUAGE c VOLATILE STRICT AS 'MODULE_PATHNAME', 'abp_sql_detach';
COMMENT ON FUNCTION aibilling.detach(regclass, text) IS
'Makes a usage table an ordinary table; the ledger stays. pending: refuse (raises an error while rows are not delivered) or discard (gives them up). Raises object_in_use while rows are in flight. Needs ownership of the table';

CREATE OR REPLACE FUNCTION aibilling.usage_table_ddl(name text) RETURNS text
LANGUAGE c STABLE STRICT AS 'MODULE_PATHNAME', 'abp_sql_usage_table_ddl';
COMMENT ON FUNCTION aibilling.usage_table_ddl(text) IS
'The statements that create a usage table, and a publication of it, on a server of PostgreSQL 15 or later that does not have this extension. name: the table''s, as in aibilling.create_usage_table(); a subscription looks for a table of the same schema and name. Cost columns are not in it, id is not published, external_id is the replica identity, and INSERT and UPDATE are published: what is deleted there stays here';

-- What a subscription's worker has told of itself: aibilling.status shows it, with the rights of whoever
-- owns both views.
CREATE OR REPLACE VIEW aibilling.feed AS
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
	SELECT l.pid, l.received_lsn, l.latest_end_lsn, l.last_msg_receipt_time, l.last_msg_send_time
	FROM pg_stat_subscription l WHERE l.subid = s.oid AND l.relid IS NULL AND l.pid IS NOT NULL
	ORDER BY l.received_lsn DESC NULLS LAST LIMIT 1
) AS w ON true;
COMMENT ON VIEW aibilling.feed IS 'Private: the subscriptions that feed tables, and how far behind they are; shown by aibilling.status';
COMMENT ON COLUMN aibilling.feed.usage_table IS 'The table';
COMMENT ON COLUMN aibilling.feed.subscription IS 'The subscription';
COMMENT ON COLUMN aibilling.feed.enabled IS 'Whether it is enabled';
COMMENT ON COLUMN aibilling.feed.copying IS 'Whether it still copies the rows that were there before it';
COMMENT ON COLUMN aibilling.feed.pid IS 'Process id of its worker; NULL: none runs';
COMMENT ON COLUMN aibilling.feed.lag IS 'How old the last news of the publisher was that is stored here; NULL: not known';
