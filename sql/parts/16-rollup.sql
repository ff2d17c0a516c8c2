-- ---------------------------------------------------------------------------
-- Sight: what each customer costs
-- ---------------------------------------------------------------------------

CREATE TABLE aibilling.share (
	delivery bigint PRIMARY KEY,
	usage_table regclass NOT NULL,
	sums bytea,
	counted int8multirange,
	folded_rows integer NOT NULL DEFAULT 0
) WITH (autovacuum_vacuum_scale_factor = 0.05);
COMMENT ON TABLE aibilling.share IS
'Private: what the rows of each delivery add up to, until it is in aibilling.rollup';
COMMENT ON COLUMN aibilling.share.delivery IS 'aibilling.delivery.id';
COMMENT ON COLUMN aibilling.share.usage_table IS 'The usage table';
COMMENT ON COLUMN aibilling.share.sums IS
'What each row adds to the sums, as bytes; NULL: not known, the rows tell (a delivery that is being divided, or of an older version)';
COMMENT ON COLUMN aibilling.share.counted IS
'Ids of rows that another delivery counts: they have come back; NULL: not known';
COMMENT ON COLUMN aibilling.share.folded_rows IS
'How many of the first rows in sums are in the rollup already';
ALTER TABLE aibilling.share ALTER COLUMN sums SET STORAGE EXTERNAL;
CREATE INDEX share_usage_table ON aibilling.share (usage_table);
COMMENT ON INDEX aibilling.share_usage_table IS 'Finds what a table''s functions have to add to the rollup';
SELECT pg_extension_config_dump('aibilling.share', '');

CREATE TABLE aibilling.rollup (
	usage_table regclass NOT NULL,
	level "char" NOT NULL,
	customer bigint NOT NULL,
	day date NOT NULL,
	key uuid NOT NULL,
	external_customer_id text,
	customer_id uuid,
	provider text,
	model text,
	event_name text,
	usage_rows bigint NOT NULL,
	input_tokens numeric NOT NULL,
	cache_read_tokens numeric NOT NULL,
	cache_write_tokens numeric NOT NULL,
	output_tokens numeric NOT NULL,
	reasoning_tokens numeric NOT NULL,
	cost_nanos numeric NOT NULL,
	cost_cents numeric NOT NULL,
	unpriced bigint NOT NULL,
	PRIMARY KEY (usage_table, level, customer, day, key)
) PARTITION BY LIST (level);
CREATE TABLE aibilling.rollup_daily PARTITION OF aibilling.rollup FOR VALUES IN ('d')
	WITH (fillfactor = 85, autovacuum_vacuum_scale_factor = 0.05);
CREATE TABLE aibilling.rollup_by_model PARTITION OF aibilling.rollup FOR VALUES IN ('m')
	WITH (fillfactor = 85, autovacuum_vacuum_scale_factor = 0.05);
CREATE TABLE aibilling.rollup_by_customer PARTITION OF aibilling.rollup FOR VALUES IN ('c')
	WITH (fillfactor = 85, autovacuum_vacuum_scale_factor = 0.05);
COMMENT ON TABLE aibilling.rollup IS
'Private: what delivered rows add up to, for aibilling.usage_daily() and aibilling.spend(); what was delivered last is in aibilling.share';
COMMENT ON COLUMN aibilling.rollup.usage_table IS 'The usage table';
COMMENT ON COLUMN aibilling.rollup.level IS
'd: by all columns; m: by day, provider and model; c: by month (its first day) and customer. Each row''s part is in all three';
COMMENT ON COLUMN aibilling.rollup.customer IS 'A hash of the customer; 0: none';
COMMENT ON COLUMN aibilling.rollup.day IS 'UTC';
COMMENT ON COLUMN aibilling.rollup.key IS 'A hash of what the sums are kept by';
COMMENT ON COLUMN aibilling.rollup.external_customer_id IS 'The customer as sent';
COMMENT ON COLUMN aibilling.rollup.customer_id IS 'The customer as sent';
COMMENT ON COLUMN aibilling.rollup.provider IS 'As in the usage table';
COMMENT ON COLUMN aibilling.rollup.model IS 'As in the usage table';
COMMENT ON COLUMN aibilling.rollup.event_name IS 'As in the usage table';
COMMENT ON COLUMN aibilling.rollup.usage_rows IS 'How many rows';
COMMENT ON COLUMN aibilling.rollup.input_tokens IS 'Their sum';
COMMENT ON COLUMN aibilling.rollup.cache_read_tokens IS 'Their sum';
COMMENT ON COLUMN aibilling.rollup.cache_write_tokens IS 'Their sum, of both kinds';
COMMENT ON COLUMN aibilling.rollup.output_tokens IS 'Their sum';
COMMENT ON COLUMN aibilling.rollup.reasoning_tokens IS 'Their sum';
COMMENT ON COLUMN aibilling.rollup.cost_nanos IS 'Their sum; a cost that is not known adds nothing';
COMMENT ON COLUMN aibilling.rollup.cost_cents IS 'Their sum; a cost that is not known adds nothing';
COMMENT ON COLUMN aibilling.rollup.unpriced IS 'Rows without a cost';
COMMENT ON TABLE aibilling.rollup_daily IS 'Private: the level d of aibilling.rollup';
COMMENT ON TABLE aibilling.rollup_by_model IS 'Private: the level m of aibilling.rollup';
COMMENT ON TABLE aibilling.rollup_by_customer IS 'Private: the level c of aibilling.rollup';
CREATE INDEX rollup_daily_day ON aibilling.rollup_daily (usage_table, day);
COMMENT ON INDEX aibilling.rollup_daily_day IS 'Finds the days of a table';
SELECT pg_extension_config_dump('aibilling.rollup_daily', '');
SELECT pg_extension_config_dump('aibilling.rollup_by_model', '');
SELECT pg_extension_config_dump('aibilling.rollup_by_customer', '');

CREATE OR REPLACE FUNCTION aibilling.usage_daily(
	usage regclass,
	from_day date DEFAULT NULL,
	to_day date DEFAULT NULL,
	OUT day date,
	OUT external_customer_id text,
	OUT customer_id uuid,
	OUT provider text,
	OUT model text,
	OUT event_name text,
	OUT usage_rows bigint,
	OUT input_tokens numeric,
	OUT cache_read_tokens numeric,
	OUT cache_write_tokens numeric,
	OUT output_tokens numeric,
	OUT reasoning_tokens numeric,
	OUT cost_nanos numeric,
	OUT cost_cents numeric,
	OUT unpriced bigint)
RETURNS SETOF record
LANGUAGE c STABLE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'abp_sql_usage_daily';
COMMENT ON FUNCTION aibilling.usage_daily(regclass, date, date) IS
'What the rows of a usage table add up to that are delivered, in flight or queued, by day (UTC; from_day and to_day belong to it, NULL: all), customer as sent, provider, model and the row''s own event name. At every moment the same as GROUP BY over these rows; rows that were deleted after their delivery stay counted. cache_write_tokens are of both kinds, unpriced is the number of rows without a cost. Needs SELECT on the table';

CREATE OR REPLACE FUNCTION aibilling.usage_by(
	usage regclass,
	by text,
	from_day date,
	to_day date,
	OUT day date,
	OUT external_customer_id text,
	OUT customer_id uuid,
	OUT provider text,
	OUT model text,
	OUT event_name text,
	OUT usage_rows bigint,
	OUT input_tokens numeric,
	OUT cache_read_tokens numeric,
	OUT cache_write_tokens numeric,
	OUT output_tokens numeric,
	OUT reasoning_tokens numeric,
	OUT cost_nanos numeric,
	OUT cost_cents numeric,
	OUT unpriced bigint)
RETURNS SETOF record
LANGUAGE c STABLE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'abp_sql_usage_by';
COMMENT ON FUNCTION aibilling.usage_by(regclass, text, date, date) IS
'The same sums, by fewer columns (the others are NULL): by model, by day, provider and model; by customer, by customer over all the days, without tokens. Reads few rows whatever the number of customers or days';

CREATE OR REPLACE FUNCTION aibilling.spend(
	usage regclass,
	external_customer_id text,
	since timestamptz DEFAULT date_trunc('month', now(), 'UTC'),
	OUT cost_cents numeric,
	OUT usage_rows bigint,
	OUT pending_cents numeric,
	OUT unpriced bigint)
LANGUAGE c STABLE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'abp_sql_spend';
COMMENT ON FUNCTION aibilling.spend(regclass, text, timestamptz) IS
'What a customer (as sent) has cost since a day, that of "since" in UTC: cost_cents of all rows that are delivered, in flight or queued, pending_cents of those that are not delivered yet, unpriced the number of rows without a cost. What the calling transaction has inserted counts. Needs SELECT on the table';

CREATE OR REPLACE FUNCTION aibilling.close_check(
	usage regclass,
	period_end timestamptz DEFAULT date_trunc('month', now(), 'UTC'),
	OUT state text,
	OUT rows bigint,
	OUT cents numeric,
	OUT oldest timestamptz)
RETURNS SETOF record
LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'abp_sql_close_check';
COMMENT ON FUNCTION aibilling.close_check(regclass, timestamptz) IS
'The rows of before period_end (default: of before this month, UTC) that are not delivered, by state as in aibilling.usage_status(): how many, their known cost in cents, the time of the oldest. For the table''s owner and pg_monitor';

CREATE OR REPLACE FUNCTION aibilling.close_warning(usage regclass, at timestamptz DEFAULT clock_timestamp()) RETURNS text
LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'abp_sql_close_warning';
COMMENT ON FUNCTION aibilling.close_warning(regclass, timestamptz) IS
'What aibilling.status says, from six hours before the end of a month (UTC) to a day after it, of rows that would miss its invoice; NULL: nothing. Looks at 10,000 rows of each state at most';

CREATE OR REPLACE FUNCTION aibilling.work_done(OUT pid integer, OUT usage_table regclass, OUT done bigint, OUT total bigint, OUT unit text)
RETURNS SETOF record
LANGUAGE c VOLATILE STRICT PARALLEL RESTRICTED AS 'MODULE_PATHNAME', 'abp_sql_work_done';
COMMENT ON FUNCTION aibilling.work_done() IS
'How far the long work of sessions is that tell it, as far as the caller may see them in pg_stat_activity: for aibilling.progress';

CREATE OR REPLACE FUNCTION aibilling.note_progress(usage regclass, done bigint, total bigint, unit text) RETURNS void
LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'abp_sql_note_progress';
COMMENT ON FUNCTION aibilling.note_progress(regclass, bigint, bigint, text) IS
'Notes how far the caller''s long work is: for aibilling.progress. done NULL: it has ended';

CREATE OR REPLACE VIEW aibilling.progress WITH (security_barrier) AS
SELECT CASE WHEN s.unknown THEN 'adding up what an older version has delivered' ELSE 'adding deliveries to the rollup' END AS work,
	s.usage_table, NULL::integer AS pid, NULL::timestamptz AS started_at,
	greatest(coalesce(t.deliveries, 0) - s.n, 0) AS done, greatest(coalesce(t.deliveries, 0), s.n) AS total, 'deliveries' AS unit
FROM (
	SELECT o.usage_table, o.sums IS NULL AS unknown, count(*) AS n
	FROM aibilling.share o
	WHERE NOT EXISTS (SELECT FROM aibilling.ledger l WHERE l.id = o.delivery AND l.state = 'sending')
	GROUP BY o.usage_table, o.sums IS NULL
) AS s
LEFT JOIN aibilling.delivery_total t ON t.usage_table = s.usage_table
WHERE aibilling.may_see(s.usage_table)
UNION ALL
SELECT 'sync', NULL, a.pid, a.query_start, d.events, d.events + w.rows, 'rows'
FROM pg_stat_activity a,
	LATERAL (SELECT coalesce(sum(l.events), 0)::bigint AS events FROM aibilling.ledger l
		WHERE l.state = 'delivered' AND l.finished_at >= a.query_start AND aibilling.may_see(l.usage_table)) AS d,
	LATERAL (SELECT coalesce(sum(r.pending + r.in_flight), 0)::bigint AS rows FROM aibilling.status_rows() r) AS w
WHERE a.datname = current_database() AND a.state = 'active' AND a.query ~* '^\s*call\s+aibilling\.sync\M'
UNION ALL
SELECT substring(a.query FROM 'aibilling\.(import_prices|load_bundled_prices|fetch_prices|reconcile|reconcile_rows|reprice|capture|capture_history|capture_retry|attach)\M'),
	d.usage_table, a.pid, a.query_start, d.done, d.total, d.unit
FROM pg_stat_activity a LEFT JOIN aibilling.work_done() d ON d.pid = a.pid
WHERE a.datname = current_database() AND a.state = 'active' AND a.pid <> pg_backend_pid()
	AND a.query ~ 'aibilling\.(import_prices|load_bundled_prices|fetch_prices|reconcile|reconcile_rows|reprice|capture|capture_history|capture_retry|attach)\M';
COMMENT ON VIEW aibilling.progress IS
'Long work that is under way: of the worker, for tables that the caller owns (pg_monitor: all), and of sessions, as far as the caller may see their queries in pg_stat_activity';
COMMENT ON COLUMN aibilling.progress.work IS 'What is being done: by the worker, or the function that a session runs';
COMMENT ON COLUMN aibilling.progress.usage_table IS 'For this usage table; NULL: not told';
COMMENT ON COLUMN aibilling.progress.pid IS 'The session; NULL: the worker';
COMMENT ON COLUMN aibilling.progress.started_at IS 'Since when; NULL: not told';
COMMENT ON COLUMN aibilling.progress.done IS 'How much is done; NULL: not told';
COMMENT ON COLUMN aibilling.progress.total IS 'Of how much, as far as is known by now';
COMMENT ON COLUMN aibilling.progress.unit IS 'Of what: deliveries, rows, prices, or pages of Polar''s answers';
