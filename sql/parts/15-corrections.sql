-- ---------------------------------------------------------------------------
-- Proof: corrections that add up, and Polar read back to the row
-- ---------------------------------------------------------------------------

-- A correction counts also when its row has been deleted after delivery, so it
-- is written down here.
CREATE TABLE aibilling.correction (
	usage_table regclass NOT NULL,
	external_id text COLLATE "C" NOT NULL,
	corrects text COLLATE "C" NOT NULL,
	id bigint NOT NULL,
	cost_nanos bigint,
	cost_cents numeric,
	PRIMARY KEY (usage_table, external_id)
);
COMMENT ON TABLE aibilling.correction IS
'Private: the rows of usage tables that correct others, those too that were deleted after their delivery. Written by the triggers of the tables';
COMMENT ON COLUMN aibilling.correction.usage_table IS 'The usage table';
COMMENT ON COLUMN aibilling.correction.external_id IS 'external_id of the correcting row';
COMMENT ON COLUMN aibilling.correction.corrects IS 'Its tags.corrects: external_id of the row that it corrects';
COMMENT ON COLUMN aibilling.correction.id IS 'Id of the correcting row; outbox and ledger say of it whether the correction counts';
COMMENT ON COLUMN aibilling.correction.cost_nanos IS 'Cost of the correcting row, in USD x 10^9; NULL: not known yet';
COMMENT ON COLUMN aibilling.correction.cost_cents IS 'The same in cents, exact';
CREATE INDEX correction_corrects ON aibilling.correction (usage_table, corrects);
SELECT pg_extension_config_dump('aibilling.correction', '');

CREATE OR REPLACE FUNCTION aibilling.correct(usage regclass, id bigint, provider_cost numeric) RETURNS bigint
LANGUAGE c VOLATILE STRICT AS 'MODULE_PATHNAME', 'abp_sql_correct';
COMMENT ON FUNCTION aibilling.correct(regclass, bigint, numeric) IS
'Makes what Polar is told of a delivered row this cost in USD (0 voids it), by inserting a row with the difference to what it and its corrections say, with its customer, provider, model, event name, occurred_at, tags and columns of your own, and tags.corrects with its external_id. Returns the id of the new row, NULL if there is no difference. Raises object_not_in_prerequisite_state for a row that is not delivered and for one that is itself a correction, numeric_value_out_of_range for a difference of 1000 USD or more. Needs ownership of the table';

CREATE OR REPLACE FUNCTION aibilling.reprice(usage regclass, from_time timestamptz DEFAULT '-infinity',
	to_time timestamptz DEFAULT 'infinity', dry_run boolean DEFAULT true,
	corrections boolean DEFAULT false, max_total numeric DEFAULT NULL,
	OUT usage_id bigint, OUT state text, OUT old_cost_nanos bigint, OUT new_cost_nanos bigint,
	OUT difference_nanos numeric, OUT action text) RETURNS SETOF record
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'abp_sql_reprice';
COMMENT ON FUNCTION aibilling.reprice(regclass, timestamptz, timestamptz, boolean, boolean, numeric) IS
'Computes the cost of the rows with from_time <= occurred_at < to_time again, by the prices of today. Returns a row per cost that differs, in USD x 10^9: of a delivered row, from what it and its corrections say. Unless dry_run, rows that wait change, and with corrections each delivered one is corrected by a further row, as aibilling.correct() does it; if these differences, added up without their signs, are more than max_total USD, that is an error and nothing changes. Rows in flight are reported. A row whose cost is beyond cost_nanos or whose counts contradict each other is returned with the action kept, named in a warning, and stays as it is. Needs ownership of the table';

-- What Polar has, for the server's owner and superusers: it is a whole
-- organization's.  The functions ask who calls.

CREATE OR REPLACE FUNCTION aibilling.polar_events(server name, external_customer_id text DEFAULT NULL,
	event_name text DEFAULT NULL, external_id text DEFAULT NULL,
	from_time timestamptz DEFAULT NULL, to_time timestamptz DEFAULT NULL, max_rows bigint DEFAULT 1000,
	OUT polar_id uuid, OUT "timestamp" timestamptz, OUT name text, OUT external_id text,
	OUT customer_id uuid, OUT external_customer_id text, OUT cost_cents numeric, OUT cost_nanos bigint,
	OUT metadata jsonb) RETURNS SETOF record
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'abp_sql_polar_events';
COMMENT ON FUNCTION aibilling.polar_events(name, text, text, text, timestamptz, timestamptz, bigint) IS
'Events that Polar has, by time: of a customer, with a name, with an external_id in their metadata, with from_time <= timestamp < to_time; NULL: any. max_rows: no more than these, at most 10,000; a request reads 100. cost_cents is a double at Polar. Events whose parent Polar does not know are not shown. Needs ownership of the server, and a token with the scope events:read or events:write';

CREATE OR REPLACE FUNCTION aibilling.polar_meter(server name, meter_id uuid, from_time timestamptz, to_time timestamptz,
	step text DEFAULT 'day', external_customer_id text DEFAULT NULL,
	OUT "timestamp" timestamptz, OUT quantity numeric) RETURNS SETOF record
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'abp_sql_polar_meter';
COMMENT ON FUNCTION aibilling.polar_meter(name, uuid, timestamptz, timestamptz, text, text) IS
'What a meter of Polar''s has counted, for each step (hour, day, week, month, year of UTC) from the one that holds from_time on, before to_time; external_customer_id: of this customer only. One request. Needs ownership of the server, and a token with the scope meters:read or meters:write';

CREATE OR REPLACE FUNCTION aibilling.reconcile(usage regclass, from_time timestamptz, to_time timestamptz, meter_id uuid DEFAULT NULL,
	OUT day date, OUT rows_here bigint, OUT rows_there bigint, OUT nanos_here numeric, OUT nanos_there numeric,
	OUT finding text) RETURNS SETOF record
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'abp_sql_reconcile';
COMMENT ON FUNCTION aibilling.reconcile(regclass, timestamptz, timestamptz, uuid) IS
'Compares a usage table, with from_time <= occurred_at < to_time, with what Polar has: a row per day (UTC) on which either has something, USD x 10^9, and what is found, NULL if nothing. Here are rows that are delivered, in flight or queued. meter_id: by one request for what a sum meter over cost_nanos has counted, then rows_there is NULL; without it by the events, at most 10,000. Needs ownership of the server and SELECT on the table';

CREATE OR REPLACE FUNCTION aibilling.reconcile_rows(usage regclass, from_time timestamptz, to_time timestamptz, meter_id uuid DEFAULT NULL,
	OUT external_id text, OUT finding text, OUT nanos_here numeric, OUT nanos_there numeric) RETURNS SETOF record
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'abp_sql_reconcile_rows';
COMMENT ON FUNCTION aibilling.reconcile_rows(regclass, timestamptz, timestamptz, uuid) IS
'The rows and events on which a usage table and Polar do not agree, of this time: missing at Polar, unknown here (in no usage table of the server), amount differs, customer differs, not sent yet, parent unknown. Compares event by event, at most 10,000; meter_id: only on days on which this sum meter over cost_nanos disagrees. Needs ownership of the server and SELECT on the table';
