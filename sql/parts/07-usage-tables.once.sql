-- ---------------------------------------------------------------------------
-- Usage tables
-- ---------------------------------------------------------------------------

-- Who sees a usage table's outbox, ledger and status: its owner, and monitors.
CREATE FUNCTION aibilling.may_see(usage regclass) RETURNS boolean
LANGUAGE sql STABLE PARALLEL SAFE
RETURN pg_has_role(current_user, 'pg_monitor'::name, 'USAGE')
	OR EXISTS (SELECT FROM pg_class c
			   WHERE c.oid = may_see.usage AND pg_has_role(current_user, c.relowner, 'USAGE'));
COMMENT ON FUNCTION aibilling.may_see(regclass) IS
'Whether the caller sees a usage table''s outbox, ledger and status: with the rights of its owner or of pg_monitor';

CREATE TABLE aibilling.usage_table (
	usage regclass PRIMARY KEY,
	server name COLLATE "C" NOT NULL,
	serverid oid NOT NULL,		-- the server meant, not another of its name
	attached_at timestamptz NOT NULL DEFAULT now(),
	blocked_until timestamptz,
	blocked_reason text,
	ledger_from bigint NOT NULL DEFAULT 0,
	not_queued bigint NOT NULL DEFAULT 0,
	replicated boolean NOT NULL DEFAULT false,
	skipped bigint NOT NULL DEFAULT 0,
	kept bigint NOT NULL DEFAULT 0
);
COMMENT ON TABLE aibilling.usage_table IS 'Attached usage tables and where their rows go';
COMMENT ON COLUMN aibilling.usage_table.usage IS 'The table; of a partitioned one the root';
COMMENT ON COLUMN aibilling.usage_table.server IS 'The foreign server that its rows are delivered to';
COMMENT ON COLUMN aibilling.usage_table.serverid IS 'OID of that server: it may be renamed, and another of its name is another server';
COMMENT ON COLUMN aibilling.usage_table.attached_at IS 'When it was attached first';
COMMENT ON COLUMN aibilling.usage_table.blocked_until IS 'Its rows could not be read: they are tried again at this time; NULL: they can be';
COMMENT ON COLUMN aibilling.usage_table.blocked_reason IS 'The error met when reading its rows';
COMMENT ON COLUMN aibilling.usage_table.ledger_from IS
'Deliveries up to this one are of rows before the last TRUNCATE: they say nothing of rows that have come since';
COMMENT ON COLUMN aibilling.usage_table.not_queued IS
'Rows that were priced and not put into the outbox, because aibilling_polar.enqueue was off; shown by aibilling.status';
COMMENT ON COLUMN aibilling.usage_table.replicated IS
'Whether a subscription feeds it: then its triggers fire for what comes by replication, and no row is refused';
COMMENT ON COLUMN aibilling.usage_table.skipped IS
'Rows that were not stored, since one of their external_id was there already; shown by aibilling.status';
COMMENT ON COLUMN aibilling.usage_table.kept IS
'Rows whose change at the publisher was not taken over, since they were in flight or delivered; shown by aibilling.status';

ALTER TABLE aibilling.usage_table ENABLE ROW LEVEL SECURITY;
CREATE POLICY usage_table_of_own ON aibilling.usage_table
	FOR SELECT USING (aibilling.may_see(usage));
COMMENT ON POLICY usage_table_of_own ON aibilling.usage_table IS
'Owners see their usage tables, pg_monitor all';
