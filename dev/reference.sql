-- doc/reference.md, from the comments of a database in which the extension is; dev/reference runs it.
\set QUIET
\pset tuples_only on
\pset format unaligned
SET search_path = pg_catalog, pg_temp;

-- Which functions stand under which heading, in this order; all others are the extension's own.
CREATE TEMP TABLE heading (place int GENERATED ALWAYS AS IDENTITY, title text, names text[]);
INSERT INTO heading (title, names) VALUES
('Setting up', '{check_setup,create_usage_table,usage_table_ddl,attach,detach,arm,capture,capture_sql,release,capture_retry}'),
('Costs', '{cost,cost_nanos,cost_cents,polar_cost,explain_cost,price_hint,convert_cost,normalize_usage,reprice,correct}'),
('Prices', '{set_price,load_bundled_prices,import_prices,fetch_prices,release_price,priced_model,bundled_prices}'),
('Delivery', '{sync,pause,resume,retry,preview,usage_status}'),
('Proof', '{close_check,reconcile,reconcile_rows,polar_events,polar_meter}'),
('Reports', '{usage_daily,spend,report,chart}');

CREATE TEMP TABLE private (name text);
INSERT INTO private SELECT relname FROM pg_class
WHERE relnamespace = 'aibilling'::regnamespace AND relkind IN ('r', 'p') AND obj_description(oid, 'pg_class') LIKE 'Private%';

CREATE FUNCTION pg_temp.short(words text) RETURNS text LANGUAGE sql AS $$
	SELECT replace(replace(replace(regexp_replace(words, '::[a-z ]+(\[\])?', '', 'g'), 'timestamp with time zone', 'timestamptz'),
		'time without time zone', 'time'), 'character varying', 'varchar')
$$;
CREATE FUNCTION pg_temp.cell(words text) RETURNS text LANGUAGE sql AS $$
	SELECT coalesce(replace(replace(words, '|', '\|'), E'\n', ' '), '')
$$;
CREATE FUNCTION pg_temp.sentence(words text) RETURNS text LANGUAGE sql AS $$
	SELECT upper(left(words, 1)) || substr(words, 2) || CASE WHEN words LIKE '%.' THEN '' ELSE '.' END
$$;

\echo '# Reference'
\echo
\echo 'Every function, table, column and setting. `dev/reference` writes this page from the comments in the database, which'
\echo 'psql shows as well (`\\df+ aibilling.set_price`, `\\d+ aibilling.price`). The options of servers and user mappings are in'
\echo '[options.md](options.md), the formats of `raw_usage` in [usage-formats.md](usage-formats.md).'
\echo
\echo '## The usage table'
\echo
\echo 'Made by `aibilling.create_usage_table`, or by yourself and attached; [clients.md](clients.md#the-columns) says which other'
\echo 'types a column may have.'
\echo
\echo '| column | type | default | |'
\echo '|---|---|---|---|'
SELECT format('| `%s` | %s%s | %s | %s |', attname, pg_temp.short(format_type(atttypid, atttypmod)), CASE WHEN attnotnull THEN ' not null' ELSE '' END,
	CASE WHEN attidentity <> '' THEN 'a sequence of its own' WHEN attname = 'external_id' THEN 'a random UUID'
		ELSE coalesce('`' || pg_temp.short(pg_get_expr(adbin, adrelid)) || '`', '') END,
	pg_temp.cell(col_description(attrelid, attnum)))
FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
WHERE attrelid = 'public.usage'::regclass AND attnum > 0 ORDER BY attnum;
\echo
\echo '## Settings of the server'
\echo
\echo '| setting | default | |'
\echo '|---|---|---|'
SELECT format('| `%s` | %s | %s |', name, CASE WHEN boot_val = '' THEN 'empty' ELSE '`' || boot_val || coalesce(unit, '') || '`' END,
	pg_temp.cell(concat_ws(' ', short_desc, extra_desc, CASE context WHEN 'postmaster' THEN 'Takes a restart.' WHEN 'sighup' THEN 'Takes a reload.' END)))
FROM pg_settings WHERE name LIKE 'aibilling\_polar.%' ORDER BY name;

SELECT CASE WHEN row_number() OVER (PARTITION BY place ORDER BY array_position(names, p.proname::text), p.oid) = 1
		THEN E'\n## Functions: ' || lower(title) || E'\n' ELSE '' END
	|| format(E'\n**%s**', p.proname)
	|| format(E'\n`%saibilling.%s(%s)`%s', CASE p.prokind WHEN 'p' THEN 'CALL ' ELSE '' END, p.proname,
		(SELECT string_agg(regexp_replace(arg, '^IN ', ''), ', ') FROM unnest(regexp_split_to_array(pg_temp.short(pg_get_function_arguments(p.oid)), ', (?=(?:IN |OUT )?[a-z_0-9]+ )')) arg
			WHERE arg NOT LIKE 'OUT %'),
		CASE WHEN p.prokind = 'p' THEN '' WHEN 'o' = ANY (p.proargmodes) OR 't' = ANY (p.proargmodes) THEN
			CASE WHEN p.proretset THEN ' → rows of ' ELSE ' → ' END || (SELECT string_agg('`' || n || '` ' || pg_temp.short(format_type(t, NULL)), ', ' ORDER BY i)
				FROM unnest(p.proargnames, p.proallargtypes, p.proargmodes) WITH ORDINALITY AS a (n, t, m, i) WHERE m IN ('o', 't'))
			ELSE ' → ' || pg_temp.short(pg_get_function_result(p.oid)) END)
	|| E'\n\n' || pg_temp.sentence(obj_description(p.oid, 'pg_proc'))
FROM heading JOIN pg_proc p ON p.proname = ANY (names) AND p.pronamespace = 'aibilling'::regnamespace
ORDER BY place, array_position(names, p.proname::text), p.oid;

\echo
\echo '## Tables and views'
\echo
\echo 'All in schema `aibilling`. Owners of usage tables see what is of their tables, `pg_monitor` all; anyone reads prices.'

SELECT E'\n### ' || relname || E'\n\n' || pg_temp.sentence(obj_description(c.oid, 'pg_class')) || E'\n\n| column | type | |\n|---|---|---|\n'
	|| (SELECT string_agg(format('| `%s` | %s%s | %s%s |', attname, pg_temp.short(format_type(atttypid, atttypmod)), CASE WHEN attnotnull THEN ' not null' ELSE '' END,
			pg_temp.cell(col_description(attrelid, attnum)),
			CASE WHEN adbin IS NOT NULL AND length(pg_get_expr(adbin, adrelid)) < 30 THEN ' (default `' || pg_temp.short(pg_get_expr(adbin, adrelid)) || '`)' ELSE '' END), E'\n' ORDER BY attnum)
		FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
		WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped)
FROM pg_class c
WHERE relnamespace = 'aibilling'::regnamespace AND relkind IN ('r', 'v', 'p') AND relname NOT IN (SELECT name FROM private)
ORDER BY relname;

\echo
\echo '## Types'
\echo
\echo 'Of the rows that functions return.'
SELECT E'\n- `' || typname || '`: ' || coalesce(obj_description(t.oid, 'pg_type'), '') || E'\n  Columns: '
	|| (SELECT string_agg('`' || attname || '` ' || pg_temp.short(format_type(atttypid, atttypmod)), ', ' ORDER BY attnum)
		FROM pg_attribute WHERE attrelid = typrelid AND attnum > 0 AND NOT attisdropped) || '.'
FROM pg_type t JOIN pg_class c ON c.oid = typrelid AND relkind = 'c' WHERE typnamespace = 'aibilling'::regnamespace ORDER BY typname;

\echo
\echo '## The inside'
\echo
\echo 'Not to be called or written: triggers, and what the functions above are made of. It may change in any version.'
\echo
SELECT '- `' || name || '`' || coalesce(': ' || regexp_replace(words, '^Private: ', ''), '')
FROM (SELECT 0 AS kind, relname || '' AS name, obj_description(oid, 'pg_class') AS words FROM pg_class
		WHERE relnamespace = 'aibilling'::regnamespace AND relname IN (SELECT name FROM private)
	UNION ALL
	SELECT 1, proname || '()', string_agg(DISTINCT obj_description(p.oid, 'pg_proc'), '; ') FROM pg_proc p
	WHERE pronamespace = 'aibilling'::regnamespace AND NOT EXISTS (SELECT FROM heading WHERE p.proname = ANY (names))
	GROUP BY proname) AS inside
ORDER BY kind, name;
