-- ---------------------------------------------------------------------------
-- The outbox: what is to be sent
-- ---------------------------------------------------------------------------

-- An entry of one id has it as its key, one of several the first id of their
-- block, so that the entries of an id are found under two keys.  Whoever takes an
-- id out of an entry writes a removal: its state is the capital letter.  No key is
-- unique: a row's INSERT must not fail because of a stale entry of its id.
--
-- A publication FOR ALL TABLES refuses UPDATE and DELETE of a table without a
-- replica identity.  An index of its own would cost every entry; FULL costs
-- nothing but where wal_level is logical, and there only DELETE.

CREATE TABLE aibilling.outbox_entry (
	usage_table regclass NOT NULL,
	state "char" NOT NULL,
	attempts integer NOT NULL,
	outcome_unknown boolean NOT NULL,
	not_before timestamptz NOT NULL,
	id bigint NOT NULL,
	ids int8multirange,
	error text
) WITH (autovacuum_vacuum_scale_factor = 0.02, autovacuum_analyze_scale_factor = 0.1);
COMMENT ON TABLE aibilling.outbox_entry IS
'Private: how aibilling.outbox is stored, ids of a block of 1,024 in one state. Its form may change in any version';
COMMENT ON COLUMN aibilling.outbox_entry.usage_table IS 'The attached table';
COMMENT ON COLUMN aibilling.outbox_entry.state IS
'p: to be sent; w: to be sent, but not before not_before; u: waits for a price; r: rejected, waits for an UPDATE or aibilling.retry(). A capital letter: the ids are no longer in that state. To be counted only: n (not queued), s (skipped), k (change not taken over), v (deleted in flight)';
COMMENT ON COLUMN aibilling.outbox_entry.attempts IS 'How often the rows have been sent in vain';
COMMENT ON COLUMN aibilling.outbox_entry.outcome_unknown IS
'Whether an earlier request may have stored the rows: duplicates of them are expected, and they cannot be changed';
COMMENT ON COLUMN aibilling.outbox_entry.not_before IS 'Of state w: when the rows may be sent; -infinity in all others';
COMMENT ON COLUMN aibilling.outbox_entry.id IS 'The id, or of several ids the first of their block';
COMMENT ON COLUMN aibilling.outbox_entry.ids IS 'The ids; NULL: only id';
COMMENT ON COLUMN aibilling.outbox_entry.error IS 'Why the rows wait; NULL: only for their turn';
CREATE INDEX outbox_entry_key
	ON aibilling.outbox_entry (usage_table, state, not_before, id);
CREATE INDEX outbox_entry_waiting
	ON aibilling.outbox_entry (usage_table, id) WHERE state = 'w';
ALTER TABLE aibilling.outbox_entry REPLICA IDENTITY FULL;
SELECT pg_extension_config_dump('aibilling.outbox_entry', '');

CREATE OR REPLACE FUNCTION aibilling.waiting_ids(usage_table regclass, state "char", entry tid, id bigint, ids int8multirange)
RETURNS int8multirange
LANGUAGE c STABLE AS 'MODULE_PATHNAME', 'abp_sql_waiting_ids';
COMMENT ON FUNCTION aibilling.waiting_ids(regclass, "char", tid, bigint, int8multirange) IS
'For aibilling.outbox: which ids of an outbox entry are in its state still. None of a table that the caller may not see';

CREATE OR REPLACE VIEW aibilling.outbox WITH (security_barrier) AS
SELECT e.usage_table,
	i.usage_id,
	CASE e.state WHEN 'u' THEN 'unpriced' WHEN 'r' THEN 'rejected' ELSE 'pending' END AS state,
	e.attempts,
	nullif(e.not_before, '-infinity'::timestamptz) AS not_before,
	e.error,
	e.outcome_unknown
FROM aibilling.outbox_entry e,
	LATERAL unnest(aibilling.waiting_ids(e.usage_table, e.state, e.ctid, e.id, e.ids)) r,
	LATERAL generate_series(lower(r), coalesce(upper(r) - 1, 9223372036854775807)) AS i (usage_id)
WHERE e.state IN ('p', 'w', 'u', 'r') AND aibilling.may_see(e.usage_table);
COMMENT ON VIEW aibilling.outbox IS
'A row per usage row that is neither delivered nor in flight. Owners see their usage tables'' rows, pg_monitor all';
COMMENT ON COLUMN aibilling.outbox.usage_table IS 'The attached table';
COMMENT ON COLUMN aibilling.outbox.usage_id IS 'Id of the row';
COMMENT ON COLUMN aibilling.outbox.state IS
'pending: to be sent; unpriced: waits for a price; rejected: cannot be sent until an UPDATE fixes it or aibilling.retry() releases it';
COMMENT ON COLUMN aibilling.outbox.attempts IS 'How often it has been sent in vain';
COMMENT ON COLUMN aibilling.outbox.not_before IS 'It is not sent before this time; NULL: as soon as possible';
COMMENT ON COLUMN aibilling.outbox.error IS 'Why it waits; NULL: only for its turn';
COMMENT ON COLUMN aibilling.outbox.outcome_unknown IS
'Whether Polar may have it, from a request whose answer was lost or not recorded here: it cannot be changed or deleted until an answer says';

-- Only for whoever has the owner's rights: others would run the policies of the
-- table, which are its owner's code.
CREATE OR REPLACE VIEW aibilling.unpriced WITH (security_barrier) AS
SELECT u.usage_table, u.reason, u.rows,
	CASE WHEN aibilling.owns(u.usage_table) THEN aibilling.price_hint(u.usage_table, u.first) END AS hint
FROM (
	SELECT e.usage_table, e.error AS reason,
		sum((SELECT sum(coalesce(upper(r), 9223372036854775807) - lower(r)) FROM unnest(w) r))::bigint AS rows,
		min(lower(w)) AS first
	FROM aibilling.outbox_entry e,
		LATERAL aibilling.waiting_ids(e.usage_table, e.state, e.ctid, e.id, e.ids) w
	WHERE e.state = 'u' AND aibilling.may_see(e.usage_table) AND NOT isempty(w)
	GROUP BY e.usage_table, e.error
) AS u;
COMMENT ON VIEW aibilling.unpriced IS
'What keeps rows from being priced, a row per reason: model or quantity without a price. They are priced and sent by themselves when the price arrives';
COMMENT ON COLUMN aibilling.unpriced.usage_table IS 'The attached table';
COMMENT ON COLUMN aibilling.unpriced.reason IS 'What has no price';
COMMENT ON COLUMN aibilling.unpriced.rows IS 'How many rows wait for it';
COMMENT ON COLUMN aibilling.unpriced.hint IS
'What to do about the first of these rows, as aibilling.price_hint() says it; NULL for others than who has the rights of the table''s owner';
