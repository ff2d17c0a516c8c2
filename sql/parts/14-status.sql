-- ---------------------------------------------------------------------------
-- Watching: where things stand, and whether all is set up
-- ---------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION aibilling.usage_status(usage regclass, id bigint,
	OUT state text, OUT delivery_id bigint, OUT sent_at timestamptz, OUT attempts integer,
	OUT error text) RETURNS record
LANGUAGE c STABLE STRICT AS 'MODULE_PATHNAME', 'abp_sql_usage_status';
COMMENT ON FUNCTION aibilling.usage_status(regclass, bigint) IS
'Where a usage row stands: state pending, unpriced, rejected, sending, delivered, not_sent (loaded, or there before the table was attached) or no_row (there is none of this id), the delivery, when it was last sent, how often it was tried, and the last error';

CREATE OR REPLACE FUNCTION aibilling.status_rows(
	OUT usage_table regclass, OUT server name, OUT pending bigint, OUT pending_estimated boolean,
	OUT unpriced bigint, OUT rejected bigint, OUT in_flight bigint, OUT oldest timestamptz,
	OUT last_delivery timestamptz, OUT last_error text, OUT deliveries bigint, OUT delivered bigint,
	OUT duplicates bigint, OUT unexpected_duplicates bigint, OUT vanished bigint,
	OUT worker_pid integer, OUT status text) RETURNS SETOF record
LANGUAGE c STABLE AS 'MODULE_PATHNAME', 'abp_sql_status';
COMMENT ON FUNCTION aibilling.status_rows() IS 'What aibilling.status shows';

CREATE OR REPLACE VIEW aibilling.status AS
SELECT r.usage_table, r.server, r.pending, r.pending_estimated, r.unpriced, r.rejected, r.in_flight, r.oldest,
	r.last_delivery, r.last_error, r.deliveries, r.delivered, r.duplicates, r.unexpected_duplicates, r.vanished,
	r.worker_pid,
	-- (names, which are of another collation, are among these words)
	concat_ws('; ', r.status, f.words,
		CASE WHEN c.skipped > 0 THEN format('%s rows came again and were skipped', c.skipped) END,
		CASE WHEN c.kept > 0 THEN format('warning: %s rows were changed at their publisher after they had been sent, which changed nothing', c.kept) END,
		CASE WHEN e.rows > 0 THEN format('warning: %s rows that were to be captured need a look (aibilling.capture_failure)', e.rows) END) COLLATE "default" AS status,
	f.lag, c.skipped, c.kept
FROM aibilling.status_rows() r
LEFT JOIN LATERAL (
	SELECT a.skipped + coalesce(sum(n.rows) FILTER (WHERE n.state = 's'), 0)::bigint AS skipped,
		a.kept + coalesce(sum(n.rows) FILTER (WHERE n.state = 'k'), 0)::bigint AS kept
	FROM aibilling.attachment a
	LEFT JOIN LATERAL (
		SELECT e.state, coalesce((SELECT sum(coalesce(upper(r), 9223372036854775807) - lower(r)) FROM unnest(e.ids) r), 1) AS rows
		FROM aibilling.outbox_entry e
		WHERE e.usage_table = a.usage AND e.state IN ('s', 'k') AND e.not_before = '-infinity'
	) AS n ON true
	WHERE a.usage = r.usage_table
	GROUP BY a.skipped, a.kept
) AS c ON true
LEFT JOIN LATERAL (
	SELECT CASE WHEN count(*) = count(f.lag) THEN max(f.lag) END AS lag,
		string_agg(CASE
			WHEN NOT f.enabled THEN format('warning: subscription "%s" is disabled, and what its publisher writes waits there', f.subscription)
			WHEN f.pid IS NULL THEN format('warning: subscription "%s" does not run, and what its publisher writes waits there; see the server log', f.subscription)
			WHEN f.copying THEN format('subscription "%s" copies the rows that were there before it', f.subscription)
			WHEN f.lag > interval '1 minute' THEN format('subscription "%s" is %s behind', f.subscription, date_trunc('second', f.lag))
			END, '; ' ORDER BY f.subscription) AS words
	FROM aibilling.feed f
	WHERE f.usage_table = r.usage_table
) AS f ON true
LEFT JOIN LATERAL (SELECT count(*) AS rows FROM aibilling.capture_error e WHERE e.usage = r.usage_table) AS e ON true;
COMMENT ON VIEW aibilling.status IS
'A row per usage table that the caller owns (all for pg_monitor): what waits, what was delivered, and what happens now and why';
COMMENT ON COLUMN aibilling.status.usage_table IS 'The attached table; NULL: none is attached';
COMMENT ON COLUMN aibilling.status.server IS 'The foreign server that its rows are delivered to';
COMMENT ON COLUMN aibilling.status.pending IS 'Rows to be sent: exact up to 100,000';
COMMENT ON COLUMN aibilling.status.pending_estimated IS 'Whether pending is an estimate';
COMMENT ON COLUMN aibilling.status.unpriced IS 'Rows that wait for a price; see aibilling.unpriced';
COMMENT ON COLUMN aibilling.status.rejected IS 'Rows that cannot be sent until they are fixed; see aibilling.outbox';
COMMENT ON COLUMN aibilling.status.in_flight IS 'Events sent and not answered yet';
COMMENT ON COLUMN aibilling.status.oldest IS 'occurred_at of the first row that could be sent';
COMMENT ON COLUMN aibilling.status.last_delivery IS 'When a delivery last succeeded';
COMMENT ON COLUMN aibilling.status.last_error IS
'Error of the last delivery that had one, with its time if a delivery has succeeded since';
COMMENT ON COLUMN aibilling.status.deliveries IS 'Batches delivered';
COMMENT ON COLUMN aibilling.status.delivered IS 'Events delivered';
COMMENT ON COLUMN aibilling.status.duplicates IS 'Events that Polar had before';
COMMENT ON COLUMN aibilling.status.unexpected_duplicates IS
'Those that were another''s: their usage was not counted';
COMMENT ON COLUMN aibilling.status.vanished IS
'Rows that were gone when they were to be sent or, where a subscription feeds the table, deleted while they were in flight';
COMMENT ON COLUMN aibilling.status.worker_pid IS 'Process of this database''s worker; NULL: there is none';
COMMENT ON COLUMN aibilling.status.status IS 'In words, what happens now and why';
COMMENT ON COLUMN aibilling.status.lag IS
'How far the slowest subscription that feeds the table is behind its publisher, by the clocks of both; NULL: none does, or one does not run or copies what was there before it, which status says';
COMMENT ON COLUMN aibilling.status.skipped IS
'Rows that came by a subscription and were not stored, since one of their external_id was there already';
COMMENT ON COLUMN aibilling.status.kept IS
'Rows whose change at their publisher was not taken over, since they had been sent';

CREATE OR REPLACE FUNCTION aibilling.check_setup(
	OUT step integer, OUT item text, OUT ok boolean, OUT wrong text, OUT fix text) RETURNS SETOF record
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'abp_sql_check_setup'
ROWS 20;
COMMENT ON FUNCTION aibilling.check_setup() IS
'What must be right before usage is billed, one row per thing, in the order in which people set it up: whether it is right (NULL: not known yet, or not for the caller to know), what is wrong, and what fixes it, an SQL statement if it ends in a semicolon, else a command for a shell on the database server. Sends each server a request without events, which stores nothing; a token is tried for whoever may set it, and takes up to 10 seconds where Polar is not reached';
