-- Roles for a usage table "usage", once it is there: who writes, who reports, who operates. As its owner, or a superuser.

CREATE ROLE usage_writer;
CREATE ROLE usage_reporter;
CREATE ROLE usage_operator;

-- The application: inserts, and sees what it inserted, so that RETURNING and ON CONFLICT work; nothing of others, and no
-- UPDATE or DELETE. A row is its own for the length of the transaction that wrote it.
ALTER TABLE usage ADD COLUMN written_by xid8 DEFAULT pg_current_xact_id();
ALTER TABLE usage ENABLE ROW LEVEL SECURITY;
GRANT SELECT, INSERT ON usage TO usage_writer;
CREATE POLICY write ON usage FOR INSERT TO usage_writer WITH CHECK (true);
CREATE POLICY see_own ON usage FOR SELECT TO usage_writer USING (written_by = pg_current_xact_id_if_assigned());

-- A report: reads usage and costs, not the replies.
CREATE POLICY report ON usage FOR SELECT TO usage_reporter USING (true);
GRANT SELECT (id, external_id, occurred_at, event_name, provider, model, service_tier, external_customer_id, input_tokens,
	cache_read_tokens, cache_write_tokens, output_tokens, reasoning_tokens, tags, cost_nanos, cost_cents, cost_status)
	ON usage TO usage_reporter;

-- An operator: status, outbox and ledger of all tables, prices, and what only the owner of a table may do: pause, resume,
-- retry, sync, fix a row. Whoever may do that may also read the table.
GRANT pg_monitor TO usage_operator;
GRANT SELECT, INSERT, UPDATE, DELETE ON aibilling.price, aibilling.model_alias TO usage_operator;
DO $$
BEGIN
	EXECUTE format('GRANT %s TO usage_operator', (SELECT relowner::regrole FROM pg_class WHERE oid = 'usage'::regclass));
END
$$;

-- Then, for each program or person:  GRANT usage_writer TO my_application;
