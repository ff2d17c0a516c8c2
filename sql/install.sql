-- What the install script leaves behind: each query lists what breaks a rule.
CREATE TEMP VIEW member AS
	SELECT d.classid, d.objid, pg_describe_object(d.classid, d.objid, 0) AS object
	FROM pg_depend d
	JOIN pg_extension e ON d.refclassid = 'pg_extension'::regclass AND d.refobjid = e.oid
	WHERE d.deptype = 'e' AND e.extname = 'aibilling_polar';

-- Members that no COMMENT describes, but for what a table brings along.
SELECT object
FROM member m
WHERE NOT EXISTS (SELECT FROM pg_description d
		WHERE d.classoid = m.classid AND d.objoid = m.objid AND d.objsubid = 0)
	AND NOT EXISTS (SELECT FROM pg_depend d
		WHERE d.classid = m.classid AND d.objid = m.objid AND d.deptype IN ('i', 'a')
			AND d.refclassid IN ('pg_class'::regclass, 'pg_type'::regclass))
ORDER BY object COLLATE "C";

-- Functions that anyone may call, but for those that compute, fire as triggers, check the
-- caller's rights themselves, or do with the caller's rights on prices what the caller could do.
SELECT DISTINCT p.proname COLLATE "C" AS executable_by_public
FROM member m
JOIN pg_proc p ON m.classid = 'pg_proc'::regclass AND m.objid = p.oid
CROSS JOIN aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
WHERE a.grantee = 0 AND a.privilege_type = 'EXECUTE'
	AND p.prorettype <> 'trigger'::regtype
	AND p.proname NOT IN ('cost', 'cost_nanos', 'cost_cents', 'polar_cost', 'explain_cost', 'convert_cost',
		'normalize_usage',
		'create_usage_table', 'usage_table_ddl', 'attach', 'detach', 'usage_status', 'preview', 'sync', 'pause', 'resume',
		'retry', 'reprice', 'correct', 'arm', 'may_see', 'status_rows', 'waiting_ids',
		'polar_events', 'polar_meter', 'reconcile', 'reconcile_rows',
		'import_prices', 'load_bundled_prices', 'fetch_prices', 'release_price', 'register_price_source',
		'bundled_prices', 'stored_prices', 'changed_cards', 'price_rows', 'catalogue_number', 'clean_price',
		'clean_prices', 'read_litellm', 'read_models_dev', 'read_genai_prices', 'read_router_prices',
		'read_openrouter', 'read_narev', 'catalogue_units', 'image_price_is_by_token', 'complete_prices',
		'correct_genai_prices', 'genai_names', 'put_aliases', 'priced_model', 'card_in_force', 'note_without',
		'changed_price', 'price_in_tier', 'set_price', 'price_hint', 'check_setup', 'usage_daily',
		'usage_by', 'spend', 'close_check', 'close_warning', 'work_done', 'note_progress', 'escape_html', 'usd_text',
		'short_number', 'percent_text', 'axis_top', 'cache_savings', 'report_style', 'report_trend', 'report_bars', 'report_waiting',
		'report_delivery', 'report', 'chart',
		'owns', 'check_expression', 'closest_word', 'provider_of_model', 'capture_preset', 'capture_by_name', 'capture_plan',
		'capture_sql', 'capture', 'release', 'capture_row', 'capture_together', 'capture_keys', 'capture_rows', 'capture_changed',
		'capture_history', 'capture_retry')
ORDER BY 1;

-- Tables and views that anyone may write, or may read without being meant to; what one sees and
-- changes by two of these views is one's own (WITH CHECK OPTION).
SELECT c.relname COLLATE "C" AS open_to_public, a.privilege_type
FROM member m
JOIN pg_class c ON m.classid = 'pg_class'::regclass AND m.objid = c.oid
CROSS JOIN aclexplode(c.relacl) a
WHERE a.grantee = 0
	AND NOT (a.privilege_type = 'SELECT'
		AND c.relname IN ('price', 'price_source', 'service_tier_rule', 'model_alias',
			'price_quarantine', 'usage_table', 'status', 'outbox', 'unpriced', 'delivery', 'progress'))
	AND NOT (c.relname IN ('captures', 'capture_failure') AND c.relkind = 'v'
		AND c.reloptions @> '{security_barrier=true,check_option=local}')
ORDER BY 1, 2;

-- Functions whose names another's search_path could capture.
SELECT p.oid::regprocedure AS search_path_open
FROM member m
JOIN pg_proc p ON m.classid = 'pg_proc'::regclass AND m.objid = p.oid
JOIN pg_language l ON l.oid = p.prolang
WHERE ((l.lanname IN ('sql', 'plpgsql') AND p.prosqlbody IS NULL) OR p.prosecdef)
	AND NOT coalesce(p.proconfig, '{}') @> '{"search_path=pg_catalog, pg_temp"}'
ORDER BY p.oid::regprocedure::text COLLATE "C";

-- Functions with other rights than the caller's: none is meant to have them.
SELECT p.oid::regprocedure AS security_definer
FROM member m
JOIN pg_proc p ON m.classid = 'pg_proc'::regclass AND m.objid = p.oid
WHERE p.prosecdef
ORDER BY p.oid::regprocedure::text COLLATE "C";

-- Columns of tables and views that no COMMENT describes; price_quarantine holds what price does.
SELECT a.attrelid::regclass AS relation, a.attname COLLATE "C" AS undescribed
FROM member m
JOIN pg_class c ON m.classid = 'pg_class'::regclass AND m.objid = c.oid AND c.relkind IN ('r', 'v')
JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped AND a.attislocal
WHERE col_description(a.attrelid, a.attnum) IS NULL
	AND NOT (c.relname = 'price_quarantine'
		AND a.attname IN (SELECT attname FROM pg_attribute WHERE attrelid = 'aibilling.price'::regclass))
ORDER BY a.attrelid::regclass::text COLLATE "C", a.attnum;

-- Policies and event triggers that no COMMENT describes.
SELECT pg_describe_object(tableoid, oid, 0) AS undescribed FROM pg_policy
WHERE obj_description(oid, 'pg_policy') IS NULL
UNION ALL
SELECT pg_describe_object(tableoid, oid, 0) FROM pg_event_trigger
WHERE obj_description(oid, 'pg_event_trigger') IS NULL;

-- Tables whose rows pg_dump would forget; those that others inherit have none.
SELECT c.oid::regclass AS not_dumped
FROM member m
JOIN pg_class c ON m.classid = 'pg_class'::regclass AND m.objid = c.oid
WHERE c.relkind = 'r' AND NOT c.relhassubclass
	AND NOT c.oid = ANY (SELECT unnest(extconfig) FROM pg_extension WHERE extname = 'aibilling_polar')
ORDER BY c.oid::regclass::text COLLATE "C";

-- Nothing outside of its schema.
SELECT object
FROM member m
WHERE (m.classid, m.objid) IN (
	SELECT 'pg_class'::regclass, oid FROM pg_class WHERE relnamespace <> 'aibilling'::regnamespace
	UNION ALL
	SELECT 'pg_proc'::regclass, oid FROM pg_proc WHERE pronamespace <> 'aibilling'::regnamespace
	UNION ALL
	SELECT 'pg_type'::regclass, oid FROM pg_type WHERE typnamespace <> 'aibilling'::regnamespace)
ORDER BY object COLLATE "C";

-- It goes and comes back without a trace.
DROP VIEW member;
DROP EXTENSION aibilling_polar;
SELECT count(*) AS left_behind FROM pg_namespace WHERE nspname = 'aibilling';
CREATE EXTENSION aibilling_polar;
SELECT extversion, extrelocatable FROM pg_extension WHERE extname = 'aibilling_polar';
