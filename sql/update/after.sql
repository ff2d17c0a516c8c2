-- ---------------------------------------------------------------------------
-- Rows of 1.1, and what is no longer needed
-- ---------------------------------------------------------------------------

WITH moved AS (DELETE FROM ONLY aibilling.usage_table RETURNING *)
INSERT INTO aibilling.attachment SELECT * FROM moved;
WITH moved AS (DELETE FROM ONLY aibilling.delivery RETURNING *)
INSERT INTO aibilling.ledger SELECT * FROM moved;

-- No longer dumped: the tables above hold nothing.
ALTER EXTENSION aibilling_polar DROP TABLE aibilling.usage_table;
ALTER EXTENSION aibilling_polar ADD TABLE aibilling.usage_table;
ALTER EXTENSION aibilling_polar DROP TABLE aibilling.delivery;
ALTER EXTENSION aibilling_polar ADD TABLE aibilling.delivery;

INSERT INTO aibilling.outbox_entry
SELECT usage_table, state, attempts, maybe_sent, not_before,
	CASE WHEN first = last THEN first ELSE first & -1024 END,
	CASE WHEN first < last THEN coalesce(ids, int8multirange(int8range(first, nullif(last, 9223372036854775807) + 1))) END,
	error
FROM aibilling.outbox_entry_1_1;
ALTER EXTENSION aibilling_polar DROP TABLE aibilling.outbox_entry_1_1;
DROP TABLE aibilling.outbox_entry_1_1;

-- What an earlier version has delivered is added up in the background.
INSERT INTO aibilling.share (delivery, usage_table)
SELECT id, usage_table FROM aibilling.ledger WHERE state IN ('sending', 'delivered');

-- A DELETE is judged when its statement has done all its work: a row that has
-- moved to another partition is still there then.
DO $$
DECLARE
	usage regclass;
BEGIN
	FOR usage IN SELECT a.usage FROM aibilling.attachment a JOIN pg_class c ON c.oid = a.usage LOOP
		EXECUTE format('DROP TRIGGER IF EXISTS zz_aibilling_guard ON %s', usage);
		EXECUTE format('CREATE TRIGGER zz_aibilling_guard AFTER DELETE ON %s FOR EACH ROW EXECUTE FUNCTION aibilling.guard_usage()', usage);
	END LOOP;
END
$$;

-- ---------------------------------------------------------------------------
-- Privileges of what is new
-- ---------------------------------------------------------------------------

REVOKE ALL ON aibilling.attachment, aibilling.capture_definition, aibilling.captures, aibilling.capture_error,
	aibilling.capture_failure, aibilling.correction, aibilling.feed, aibilling.ledger, aibilling.outbox_entry,
	aibilling.progress, aibilling.rollup, aibilling.rollup_by_customer, aibilling.rollup_by_model,
	aibilling.rollup_daily, aibilling.share FROM PUBLIC;
GRANT SELECT, INSERT, UPDATE ON aibilling.captures TO PUBLIC;
GRANT SELECT, INSERT, UPDATE, DELETE ON aibilling.capture_failure TO PUBLIC;
GRANT SELECT ON aibilling.progress TO PUBLIC;

REVOKE ALL ON FUNCTION aibilling.mark_shipped(), aibilling.store_below(), aibilling.on_table_ddl(), aibilling.on_drop_extension() FROM PUBLIC;
GRANT EXECUTE ON FUNCTION
	aibilling.image_price_is_by_token(numeric, numeric),
	aibilling.complete_prices(aibilling.catalogue_price[]),
	aibilling.correct_genai_prices(aibilling.catalogue_price[]),
	aibilling.genai_names(jsonb),
	aibilling.put_aliases(jsonb, jsonb, text),
	aibilling.price_rows(aibilling.catalogue_price[], aibilling.price_card[]),
	aibilling.priced_model(text, text),
	aibilling.price_hint(regclass, bigint),
	aibilling.card_in_force(text, text, text, timestamptz),
	aibilling.note_without(text, text[]),
	aibilling.changed_price(aibilling.price, jsonb, jsonb),
	aibilling.price_in_tier(aibilling.price, text, numeric),
	aibilling.set_price(text, text, numeric, numeric, numeric, numeric, numeric, numeric, numeric, numeric, jsonb, text, timestamptz),
	aibilling.check_setup(),
	aibilling.usage_daily(regclass, date, date),
	aibilling.usage_by(regclass, text, date, date),
	aibilling.spend(regclass, text, timestamptz),
	aibilling.close_check(regclass, timestamptz),
	aibilling.close_warning(regclass, timestamptz),
	aibilling.work_done(),
	aibilling.note_progress(regclass, bigint, bigint, text),
	aibilling.escape_html(text),
	aibilling.usd_text(numeric),
	aibilling.short_number(numeric),
	aibilling.percent_text(numeric, numeric),
	aibilling.axis_top(numeric),
	aibilling.cache_savings(regclass, date, date),
	aibilling.report_style(),
	aibilling.report_trend(jsonb, date, date),
	aibilling.report_bars(text, text, text, text[], numeric[], numeric[]),
	aibilling.report_waiting(regclass),
	aibilling.report_delivery(regclass),
	aibilling.report(regclass, date, date),
	aibilling.chart(regclass, text, integer),
	aibilling.correct(regclass, bigint, numeric),
	aibilling.reprice(regclass, timestamptz, timestamptz, boolean, boolean, numeric),
	aibilling.polar_events(name, text, text, text, timestamptz, timestamptz, bigint),
	aibilling.polar_meter(name, uuid, timestamptz, timestamptz, text, text),
	aibilling.reconcile(regclass, timestamptz, timestamptz, uuid),
	aibilling.reconcile_rows(regclass, timestamptz, timestamptz, uuid),
	aibilling.usage_table_ddl(text),
	aibilling.waiting_ids(regclass, "char", tid, bigint, int8multirange),
	aibilling.owns(regclass),
	aibilling.check_expression(regclass, text, regtype),
	aibilling.closest_word(text, text[]),
	aibilling.provider_of_model(text),
	aibilling.capture_preset(text, regclass),
	aibilling.capture_by_name(regclass),
	aibilling.capture_plan(regclass, regclass, jsonb, text, text, boolean),
	aibilling.capture_sql(regclass, regclass, jsonb, text, text, text, boolean),
	aibilling.capture(regclass, regclass, jsonb, text, text, text, boolean),
	aibilling.release(regclass, regclass),
	aibilling.capture_row(aibilling.captures, jsonb, text, text),
	aibilling.capture_together(aibilling.captures, jsonb[]),
	aibilling.capture_keys(text, text[], text),
	aibilling.capture_rows(text, jsonb[], text, text),
	aibilling.capture_changed(text, jsonb, jsonb),
	aibilling.capture_history(regclass, regclass, text),
	aibilling.capture_retry(regclass)
TO PUBLIC;

-- Functions that take one more argument have the grants of those that they replace.
REVOKE ALL ON FUNCTION aibilling.create_usage_table(text, name, boolean),
	aibilling.attach(regclass, name, text, boolean) FROM PUBLIC;
DO $$
DECLARE
	g record;
BEGIN
	FOR g IN
		SELECT f.new, CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END AS grantee,
			CASE WHEN a.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END AS option
		FROM (VALUES
			('aibilling.create_usage_table(text, name)'::regprocedure, 'aibilling.create_usage_table(text, name, boolean)'::regprocedure),
			('aibilling.attach(regclass, name, text)', 'aibilling.attach(regclass, name, text, boolean)')
		) AS f (old, new)
		JOIN pg_proc p ON p.oid = f.old
		CROSS JOIN LATERAL aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
		WHERE a.grantee <> p.proowner
	LOOP
		EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO %s%s', g.new, g.grantee, g.option);
	END LOOP;
END
$$;
DROP FUNCTION aibilling.create_usage_table(text, name), aibilling.attach(regclass, name, text);
