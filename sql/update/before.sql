\echo Use "ALTER EXTENSION aibilling_polar UPDATE TO '1.2'" to load this file. \quit

-- ---------------------------------------------------------------------------
-- Tables and functions of 1.1 that are others now
-- ---------------------------------------------------------------------------

ALTER TABLE aibilling.price
	ADD COLUMN inherit boolean NOT NULL DEFAULT true,
	REPLICA IDENTITY FULL;
COMMENT ON COLUMN aibilling.price.inherit IS
'What the row leaves NULL: true, as in the row with context_above 0, or as all day; false, unknown';
COMMENT ON COLUMN aibilling.price.context_above IS
'The row applies to requests with more input_tokens than this; an inclusive threshold N is written N - 1. What it leaves NULL is as in the row with 0, unless inherit is false';

ALTER TABLE aibilling.service_tier_rule
	ALTER COLUMN shipped DROP EXPRESSION,
	ALTER COLUMN shipped SET DEFAULT false;
CREATE FUNCTION aibilling.mark_shipped() RETURNS trigger
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
	NEW.shipped := NEW.provider = '*' AND NEW.service_tier IN ('batch', 'flex') AND coalesce(NEW.multiplier = 0.5, false);
	RETURN NEW;
END
$$;
COMMENT ON FUNCTION aibilling.mark_shipped() IS
'Trigger: is this rule one that comes with the extension?';
CREATE TRIGGER mark_shipped
	BEFORE INSERT OR UPDATE ON aibilling.service_tier_rule
	FOR EACH ROW EXECUTE FUNCTION aibilling.mark_shipped();
ALTER TABLE aibilling.service_tier_rule ENABLE ALWAYS TRIGGER mark_shipped;
COMMENT ON TRIGGER mark_shipped ON aibilling.service_tier_rule IS 'Tells rules that come with the extension from others';

ALTER TABLE aibilling.price_quarantine
	ADD COLUMN inherit boolean NOT NULL DEFAULT true,
	ADD COLUMN note text,
	REPLICA IDENTITY FULL;
COMMENT ON COLUMN aibilling.price_quarantine.inherit IS 'As aibilling.price.inherit';
COMMENT ON COLUMN aibilling.price_quarantine.note IS 'As aibilling.price.note';
COMMENT ON COLUMN aibilling.price_quarantine.quarantined_at IS
'Since when a card of this model and service tier is held back, whatever further imports found';

COMMENT ON TYPE aibilling.catalogue_price IS
'one price of a catalogue, in the units of aibilling.price; price_column is a column of that table or units.KEY, or inherit with the price 0: what this row leaves out is unknown; valid_from NULL means that the catalogue gives no date; price NULL means that it cannot be used, for the reason in problem; problem beside a price is a remark';

DROP FUNCTION aibilling.price_rows(aibilling.catalogue_price[], aibilling.price_card[]);

ALTER TABLE aibilling.usage_table
	ADD COLUMN ledger_from bigint NOT NULL DEFAULT 0,
	ADD COLUMN not_queued bigint NOT NULL DEFAULT 0,
	ADD COLUMN replicated boolean NOT NULL DEFAULT false,
	ADD COLUMN skipped bigint NOT NULL DEFAULT 0,
	ADD COLUMN kept bigint NOT NULL DEFAULT 0;
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

-- Its rows go to a new table of this name, whose NOT NULLs have names from PostgreSQL 18 on: they are to be free.
ALTER TABLE aibilling.outbox_entry RENAME TO outbox_entry_1_1;
ALTER INDEX aibilling.outbox_entry_key RENAME TO outbox_entry_1_1_key;
ALTER TABLE aibilling.outbox_entry_1_1
	ALTER COLUMN usage_table DROP NOT NULL,
	ALTER COLUMN state DROP NOT NULL,
	ALTER COLUMN attempts DROP NOT NULL,
	ALTER COLUMN not_before DROP NOT NULL;

ALTER TABLE aibilling.delivery ADD COLUMN vanished_ids int8multirange;
COMMENT ON COLUMN aibilling.delivery.vanished IS 'Rows that were gone from the usage table when they were to be sent, or to be sent again';
COMMENT ON COLUMN aibilling.delivery.vanished_ids IS
'Ids of rows that were gone: those that come back with a partition, attached again, are sent then; NULL: none';
DROP INDEX aibilling.delivery_sending, aibilling.delivery_usage_ids;

ALTER TABLE aibilling.database_identity REPLICA IDENTITY FULL;
COMMENT ON TABLE aibilling.database_identity IS
'Private: the database that may send, written when the first table is attached and by aibilling.arm(). A copy finds another identity here than its own, a subscriber to these tables finds its publisher''s beside its own: neither sends';

DROP FUNCTION aibilling.reprice(regclass, timestamptz, timestamptz, boolean);
