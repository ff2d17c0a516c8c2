-- ---------------------------------------------------------------------------
-- The ledger: what was sent, and what Polar said
-- ---------------------------------------------------------------------------

CREATE TABLE aibilling.delivery (
	id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
	server name COLLATE "C" NOT NULL,
	usage_table regclass NOT NULL,
	usage_ids int8multirange NOT NULL,
	events integer NOT NULL,
	bytes bigint NOT NULL,
	state text COLLATE "C" NOT NULL
		CHECK (state IN ('sending', 'delivered', 'rejected', 'failed')),
	attempts integer NOT NULL,
	http_status integer,
	inserted bigint,
	duplicates bigint,
	unexpected_duplicates bigint NOT NULL DEFAULT 0,
	vanished bigint NOT NULL DEFAULT 0,
	started_at timestamptz NOT NULL,
	finished_at timestamptz,
	not_before timestamptz,
	outcome_unknown boolean NOT NULL DEFAULT false,
	error text,
	vanished_ids int8multirange
) WITH (autovacuum_vacuum_scale_factor = 0.05);
COMMENT ON TABLE aibilling.delivery IS
'Ledger: a row per batch of events that was sent, or is being sent, to Polar. Owners see the batches of their usage tables, pg_monitor all';
COMMENT ON COLUMN aibilling.delivery.id IS 'Number of the delivery';
COMMENT ON COLUMN aibilling.delivery.server IS 'The foreign server it went to';
COMMENT ON COLUMN aibilling.delivery.usage_table IS 'The table its rows are from; a bare number once that table is dropped';
COMMENT ON COLUMN aibilling.delivery.usage_ids IS 'Ids of its rows';
COMMENT ON COLUMN aibilling.delivery.events IS 'How many events were sent';
COMMENT ON COLUMN aibilling.delivery.bytes IS 'Size of the request''s body';
COMMENT ON COLUMN aibilling.delivery.state IS
'sending: not answered yet; delivered: Polar has the events; rejected: Polar refused them, and the rows went back to the outbox; failed: not stored, and the rows went back to be sent in another delivery';
COMMENT ON COLUMN aibilling.delivery.attempts IS 'Requests begun';
COMMENT ON COLUMN aibilling.delivery.http_status IS 'Status of the last answer; NULL: there was none';
COMMENT ON COLUMN aibilling.delivery.inserted IS 'Events that Polar says it stored';
COMMENT ON COLUMN aibilling.delivery.duplicates IS 'Events that Polar says it had before';
COMMENT ON COLUMN aibilling.delivery.unexpected_duplicates IS
'Those of duplicates that no earlier attempt of ours explains: another event owned the external_id, and this usage was not counted';
COMMENT ON COLUMN aibilling.delivery.vanished IS 'Rows that were gone from the usage table when they were to be sent, or to be sent again';
COMMENT ON COLUMN aibilling.delivery.started_at IS 'When the delivery was recorded, before its first request';
COMMENT ON COLUMN aibilling.delivery.finished_at IS 'When its answer was settled; NULL while it is being sent';
COMMENT ON COLUMN aibilling.delivery.not_before IS 'While it is being sent: no other attempt before this time; NULL: at once';
COMMENT ON COLUMN aibilling.delivery.outcome_unknown IS
'An attempt got no answer that says whether the events were stored: duplicates are expected then';
COMMENT ON COLUMN aibilling.delivery.error IS 'What went wrong last; NULL: nothing';
COMMENT ON COLUMN aibilling.delivery.vanished_ids IS
'Ids of rows that were gone: those that come back with a partition, attached again, are sent then; NULL: none';
SELECT pg_extension_config_dump('aibilling.delivery_id_seq', '');

ALTER TABLE aibilling.delivery ENABLE ROW LEVEL SECURITY;
CREATE POLICY delivery_of_own_tables ON aibilling.delivery
	FOR SELECT USING (aibilling.may_see(usage_table));
COMMENT ON POLICY delivery_of_own_tables ON aibilling.delivery IS
'Owners see the deliveries of their usage tables, pg_monitor all';

-- What the ledger sums up to, up to a delivery: status need not read it all.
CREATE TABLE aibilling.delivery_total (
	usage_table regclass PRIMARY KEY,
	up_to bigint NOT NULL,
	deliveries bigint NOT NULL,
	delivered bigint NOT NULL,
	duplicates bigint NOT NULL,
	unexpected_duplicates bigint NOT NULL,
	vanished bigint NOT NULL
);
COMMENT ON TABLE aibilling.delivery_total IS
'what the settled deliveries of a usage table add up to, up to one of them; the ledger''s rows up to it may be deleted without changing aibilling.status';
COMMENT ON COLUMN aibilling.delivery_total.usage_table IS 'the usage table';
COMMENT ON COLUMN aibilling.delivery_total.up_to IS 'id of the last delivery that is in the totals';
COMMENT ON COLUMN aibilling.delivery_total.deliveries IS 'number of deliveries that Polar accepted';
COMMENT ON COLUMN aibilling.delivery_total.delivered IS 'events in them';
COMMENT ON COLUMN aibilling.delivery_total.duplicates IS 'events that Polar had already';
COMMENT ON COLUMN aibilling.delivery_total.unexpected_duplicates IS 'of these, events that another producer had sent under the same external_id: this usage was not counted';
COMMENT ON COLUMN aibilling.delivery_total.vanished IS 'rows that were gone before they were sent';
SELECT pg_extension_config_dump('aibilling.delivery_total', '');

CREATE TABLE aibilling.server_state (
	server name COLLATE "C" NOT NULL,
	paused text COLLATE "C" CHECK (paused IN ('operator', 'answer')),
	reason text,
	changed_at timestamptz NOT NULL DEFAULT now(),
	failures integer NOT NULL DEFAULT 0,
	not_before timestamptz,
	role oid NOT NULL DEFAULT 0,
	PRIMARY KEY (server, role)
);
COMMENT ON TABLE aibilling.server_state IS
'Private: servers that are paused or wait after failures, for all or for one role, so that a restart does not forget it; shown by aibilling.status';
COMMENT ON COLUMN aibilling.server_state.server IS 'Name of the foreign server';
COMMENT ON COLUMN aibilling.server_state.paused IS
'operator: by aibilling.pause(); answer: by what the server answered; NULL: not paused';
COMMENT ON COLUMN aibilling.server_state.reason IS 'Why';
COMMENT ON COLUMN aibilling.server_state.changed_at IS 'Since when';
COMMENT ON COLUMN aibilling.server_state.failures IS 'Failed requests in succession';
COMMENT ON COLUMN aibilling.server_state.not_before IS 'No request before this time; NULL: at once';
COMMENT ON COLUMN aibilling.server_state.role IS
'The owner of usage tables, if the state is of the token in its own user mapping, or of its own pause; 0: of all others together';
SELECT pg_extension_config_dump('aibilling.server_state', '');

CREATE TABLE aibilling.database_identity (
	system_identifier bigint NOT NULL,
	database oid NOT NULL,
	timeline bigint NOT NULL
);
COMMENT ON TABLE aibilling.database_identity IS
'Private: the database that may send, written when the first table is attached and by aibilling.arm(). A copy finds another identity here than its own, a subscriber to these tables finds its publisher''s beside its own: neither sends';
COMMENT ON COLUMN aibilling.database_identity.system_identifier IS 'System identifier of its cluster';
COMMENT ON COLUMN aibilling.database_identity.database IS 'OID of the database';
COMMENT ON COLUMN aibilling.database_identity.timeline IS 'timeline of the server when it last delivered; another one means a failover or a recovery to a point in time';
ALTER TABLE aibilling.database_identity REPLICA IDENTITY FULL;
SELECT pg_extension_config_dump('aibilling.database_identity', '');
