-- ---------------------------------------------------------------------------
-- The report: a page that shows itself, from no more than these sums
-- ---------------------------------------------------------------------------

-- What comes from rows goes through escape_html, everything else is written here.

CREATE OR REPLACE FUNCTION aibilling.escape_html(value text) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
	SELECT replace(replace(replace(replace(replace(
		regexp_replace(value, '[\x01-\x08\x0b\x0c\x0e-\x1f\x7f]', '?', 'g'),
		'&', '&amp;'), '<', '&lt;'), '>', '&gt;'), '"', '&quot;'), '''', '&#39;')
$$;
COMMENT ON FUNCTION aibilling.escape_html(text) IS 'Text for HTML, in an element or in an attribute';

CREATE OR REPLACE FUNCTION aibilling.usd_text(cents numeric) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
	SELECT CASE WHEN cents < 0 THEN '−' ELSE '' END || '$' || CASE
		WHEN cents = 0 OR abs(cents) >= 1 THEN to_char(abs(cents) / 100, 'FM999,999,999,999,990.00')
		WHEN abs(cents) >= 0.01 THEN to_char(abs(cents) / 100, 'FM0.0000')
		ELSE '0.0001' END
		|| CASE WHEN cents <> 0 AND abs(cents) < 0.01 THEN ' or less' ELSE '' END
$$;
COMMENT ON FUNCTION aibilling.usd_text(numeric) IS 'An amount in cents as dollars, rounded to be read';

CREATE OR REPLACE FUNCTION aibilling.short_number(value numeric) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
	SELECT CASE
		WHEN abs(value) >= 1e12 THEN to_char(value / 1e12, 'FM999,999,990.0') || ' T'
		WHEN abs(value) >= 1e9 THEN to_char(value / 1e9, 'FM990.0') || ' B'
		WHEN abs(value) >= 1e6 THEN to_char(value / 1e6, 'FM990.0') || ' M'
		WHEN abs(value) >= 1e4 THEN to_char(value / 1e3, 'FM990.0') || ' k'
		ELSE to_char(value, 'FM999,990') END
$$;
COMMENT ON FUNCTION aibilling.short_number(numeric) IS 'A number rounded to be read';

CREATE OR REPLACE FUNCTION aibilling.percent_text(part numeric, whole numeric) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
	SELECT CASE WHEN whole = 0 THEN '–' ELSE to_char(100 * part / whole, 'FM999,990.0') || ' %' END
$$;
COMMENT ON FUNCTION aibilling.percent_text(numeric, numeric) IS 'A share to be read';

CREATE OR REPLACE FUNCTION aibilling.axis_top(value numeric) RETURNS numeric
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
	SELECT CASE WHEN value <= 0 THEN 1 ELSE (
		SELECT min(step * p.power) FROM unnest('{1.2,1.6,2,2.4,3.2,4,6,8,10}'::numeric[]) step WHERE step * p.power >= value) END
	FROM (SELECT CASE WHEN value <= 0 THEN 1 ELSE 10::numeric ^ floor(log(value)) END AS power) p
$$;
COMMENT ON FUNCTION aibilling.axis_top(numeric) IS 'Where an axis ends that is to hold a value: a round number';

CREATE OR REPLACE FUNCTION aibilling.cache_savings(
	usage regclass,
	from_day date,
	to_day date,
	OUT provider text,
	OUT model text,
	OUT saved_cents numeric,
	OUT cache_read_tokens numeric)
RETURNS SETOF record
LANGUAGE sql STABLE PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
	SELECT m.provider, m.model,
		sum(m.cache_read_tokens * (fresh.cents - cached.cents) - m.cache_write_tokens * (written.cents - fresh.cents)) / 1000,
		sum(m.cache_read_tokens)
	FROM (
		SELECT d.day, d.provider, d.model, d.cache_read_tokens, d.cache_write_tokens
		FROM aibilling.usage_by(usage, 'model', from_day, to_day) d
		WHERE d.cache_read_tokens > 0 OR d.cache_write_tokens > 0
		OFFSET 0
	) AS m,
	LATERAL (SELECT m.day::timestamp AT TIME ZONE 'UTC' + interval '12 hours' AS at) AS t,
	LATERAL (SELECT aibilling.cost_cents(m.provider, m.model, 1000, request_count => 0, at => t.at) AS cents) AS fresh,
	LATERAL (SELECT aibilling.cost_cents(m.provider, m.model, 1000, cache_read_tokens => 1000, request_count => 0, at => t.at) AS cents) AS cached,
	LATERAL (SELECT CASE WHEN m.cache_write_tokens = 0 THEN fresh.cents ELSE
		aibilling.cost_cents(m.provider, m.model, 1000, cache_write_tokens => 1000, request_count => 0, at => t.at) END AS cents) AS written
	WHERE fresh.cents IS NOT NULL AND cached.cents IS NOT NULL AND written.cents IS NOT NULL
	GROUP BY m.provider, m.model
$$;
COMMENT ON FUNCTION aibilling.cache_savings(regclass, date, date) IS
'What prompt caches saved, by model: what the tokens read from them would have cost as fresh ones at the standard prices of the day, less what writing them cost more. Models without such prices are left out';

CREATE OR REPLACE FUNCTION aibilling.report_style() RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $style$
	SELECT $css$
:root { color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --ink: #16191d; --soft: #59636e; --line: #e1e5ea;
	--c1: #3451c6; --c2: #0b7285; --c3: #c2410c; --c4: #862e9c; --c5: #2b6a2f; --c6: #6b7280; --good: #1f6f3a }
@media (prefers-color-scheme: dark) { :root { --page: #0f1216; --card: #181c22; --ink: #eceff3; --soft: #a4adb8; --line: #2b313a;
	--c1: #8ea4ff; --c2: #4cc9dc; --c3: #ff9a5c; --c4: #d9a2f0; --c5: #7fd88a; --c6: #a4adb8; --good: #7fd88a } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
	font-variant-numeric: tabular-nums; -webkit-print-color-adjust: exact; print-color-adjust: exact }
main { max-width: 1080px; margin: 0 auto; padding: 40px 28px 56px }
header { margin-bottom: 26px }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -0.02em; margin: 0 0 4px; overflow-wrap: anywhere }
h2 { font-size: 17px; letter-spacing: -0.01em; margin: 0 0 2px }
p { margin: 0 } .soft { color: var(--soft) } .small { font-size: 13px }
.cards { display: grid; grid-template-columns: repeat(4, 1fr); gap: 14px; margin-bottom: 18px }
section, .card { background: var(--card); border: 1px solid var(--line); border-radius: 14px }
section { padding: 22px 24px; margin-bottom: 18px; break-inside: avoid }
.card { padding: 16px 18px } .card b { display: block; font-size: 27px; line-height: 1.25; letter-spacing: -0.02em; font-weight: 650 }
.two { display: grid; grid-template-columns: 1fr 1fr; gap: 18px } .two section { margin-bottom: 0 } .two { margin-bottom: 18px }
.good { color: var(--good) } .ink { color: var(--ink); font-weight: 550 }
svg { display: block; width: 100%; height: auto; overflow: visible } svg text { fill: var(--soft); font-size: 12px }
svg .grid { stroke: var(--line) } .trend { margin-top: 14px }
.f1 { fill: var(--c1); background: var(--c1) } .f2 { fill: var(--c2); background: var(--c2) } .f3 { fill: var(--c3); background: var(--c3) }
.f4 { fill: var(--c4); background: var(--c4) } .f5 { fill: var(--c5); background: var(--c5) } .f6 { fill: var(--c6); background: var(--c6) }
.legend { display: flex; flex-wrap: wrap; gap: 6px 18px; margin: 10px 0 0; padding: 0; list-style: none; font-size: 13px; color: var(--soft) }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 7px }
.legend li { max-width: 100%; overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
table { width: 100%; border-collapse: collapse; margin-top: 12px; table-layout: fixed }
th { font-weight: 500; font-size: 12px; color: var(--soft); text-align: right; padding: 4px 0 6px 10px }
td { padding: 6px 0 6px 10px; border-top: 1px solid var(--line); text-align: right; vertical-align: middle }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
td.name { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; font-weight: 500 }
td.words { text-align: left; overflow-wrap: anywhere } th.words { text-align: left }
td svg { height: 10px; border-radius: 3px } .wide { width: 26% } .narrow { width: 17% }
dl { display: grid; grid-template-columns: 1fr auto; gap: 7px 16px; margin: 14px 0 0 } dt { color: var(--soft) } dd { margin: 0; text-align: right; font-weight: 550 }
details { margin-top: 12px; font-size: 13px } summary { cursor: pointer; color: var(--soft) } details table { font-size: 13px }
footer { color: var(--soft); font-size: 12.5px; margin-top: 26px }
@media (max-width: 760px) { .cards { grid-template-columns: 1fr 1fr } .two { grid-template-columns: 1fr } main { padding: 24px 14px } }
@page { size: A4; margin: 13mm }
@media print { :root { color-scheme: light; --page: #fff; --card: #fff; --ink: #16191d; --soft: #59636e; --line: #d5dae0; --c1: #3451c6; --c2: #0b7285;
	--c3: #c2410c; --c4: #862e9c; --c5: #2b6a2f; --c6: #6b7280; --good: #1f6f3a }
	body { font-size: 11.5px } main { max-width: none; padding: 0 } .cards, .two { gap: 10px } .card b { font-size: 20px } section { padding: 14px 16px; border-radius: 8px }
	details:not([open]) { display: none } h1 { font-size: 22px } }
$css$
$style$;
COMMENT ON FUNCTION aibilling.report_style() IS 'How aibilling.report() looks';

CREATE OR REPLACE FUNCTION aibilling.report_trend(sums jsonb, from_day date, to_day date) RETURNS text
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	unit text := CASE WHEN to_day - from_day <= 62 THEN 'day' WHEN to_day - from_day <= 400 THEN 'week' ELSE 'month' END;
	top numeric;
	n integer;
	pitch numeric;
	bars text;
	grid text;
	labels text;
	legend text;
	numbers text;
BEGIN
	-- The five models that cost most have colours of their own.
	WITH cost AS (
		SELECT s.day, coalesce(s.model, '(none)') AS model, s.cost_cents AS cents
		FROM jsonb_to_recordset(sums) AS s (day date, model text, cost_cents numeric)
	), ranked AS (
		SELECT model, least(row_number() OVER (ORDER BY sum(cents) DESC, model), 6) AS colour, sum(cents) AS cents
		FROM cost GROUP BY model
	), spans AS (
		SELECT row_number() OVER (ORDER BY b) - 1 AS x, b::date AS span
		FROM generate_series(date_trunc(unit, from_day::timestamp), to_day::timestamp, ('1 ' || unit)::interval) b
	), cells AS (
		SELECT p.x, p.span, r.colour, CASE WHEN r.colour = 6 THEN 'others' ELSE r.model END AS model, sum(c.cents) AS cents
		FROM spans p
		JOIN cost c ON date_trunc(unit, c.day::timestamp)::date = p.span
		JOIN ranked r USING (model)
		GROUP BY p.x, p.span, r.colour, CASE WHEN r.colour = 6 THEN 'others' ELSE r.model END
	), totals AS (
		SELECT x, sum(cents) AS cents FROM cells GROUP BY x
	), scale AS (
		SELECT aibilling.axis_top((SELECT max(positive) FROM (SELECT sum(cents) AS positive FROM cells WHERE cents > 0 GROUP BY x) t)) AS top,
			(SELECT count(*) FROM spans) AS n
	), stacked AS (
		SELECT c.*, coalesce(sum(greatest(cents, 0)) OVER (PARTITION BY x ORDER BY colour ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0) AS below
		FROM cells c
	)
	SELECT s.top, s.n, 900.0 / s.n,
		(SELECT string_agg(format('<rect class="f%s" x="%s" y="%s" width="%s" height="%s" data-span="%s" data-model="%s" data-cents="%s"><title>%s, %s: %s</title></rect>',
				k.colour, round(60 + k.x * 900.0 / s.n + 900.0 / s.n * 0.14, 2), round(220 - 200 * (k.below + k.cents) / s.top, 2),
				round(900.0 / s.n * 0.72, 2), round(200 * k.cents / s.top, 2), k.span, aibilling.escape_html(k.model), k.cents,
				k.span, aibilling.escape_html(k.model), aibilling.usd_text(k.cents)), E'\n' ORDER BY k.x, k.colour)
			FROM stacked k WHERE k.cents > 0),
		(SELECT string_agg(format('<line class="grid" x1="60" x2="960" y1="%1$s" y2="%1$s"/><text x="52" y="%2$s" text-anchor="end">%3$s</text>',
				220 - 50 * g, 224 - 50 * g, '$' || trim_scale(round(s.top * g / 400, 6))), E'\n') FROM generate_series(0, 4) g),
		(SELECT string_agg(format('<text x="%s" y="240" text-anchor="middle">%s</text>', round(60 + (p.x + 0.5) * 900.0 / s.n, 1),
				to_char(p.span, CASE unit WHEN 'month' THEN 'Mon YYYY' ELSE 'FMDD Mon' END)), E'\n')
			FROM spans p WHERE p.x % greatest(1, ceil(s.n / 12.0)::integer) = 0),
		(SELECT string_agg(format('<li><i class="f%s"></i>%s</li>', r.colour, aibilling.escape_html(r.model)), E'\n' ORDER BY r.colour)
			FROM (SELECT colour, CASE WHEN colour = 6 THEN 'others' ELSE min(model) END AS model FROM ranked GROUP BY colour) r),
		(SELECT string_agg(format('<tr><td>%s</td><td>%s</td></tr>', p.span, aibilling.usd_text(coalesce(t.cents, 0))), E'\n' ORDER BY p.x)
			FROM spans p LEFT JOIN totals t USING (x))
	INTO top, n, pitch, bars, grid, labels, legend, numbers
	FROM scale s;
	RETURN format('<section aria-labelledby="trend"><h2 id="trend">Cost per %1$s</h2><p class="soft small">Stacked by model; the five that cost most, and all others together.</p>
<svg class="trend" viewBox="0 0 960 250" role="img" aria-labelledby="trend-title trend-text"><title id="trend-title">Cost per %1$s, by model</title>
<desc id="trend-text">A bar for each %1$s from %2$s to %3$s. The axis ends at %4$s. All numbers are in the table that follows.</desc>
%5$s
%6$s
%7$s</svg>
<ul class="legend">%8$s</ul>
<details><summary>Numbers</summary><table><thead><tr><th>%9$s</th><th>cost</th></tr></thead><tbody>%10$s</tbody></table></details></section>',
		unit, from_day, to_day, aibilling.usd_text(top), coalesce(grid, ''), coalesce(bars, ''), coalesce(labels, ''), coalesce(legend, ''),
		unit || CASE unit WHEN 'day' THEN '' ELSE ' from' END, numbers);
END
$$;
COMMENT ON FUNCTION aibilling.report_trend(jsonb, date, date) IS 'A part of aibilling.report(): cost over time, from rows of usage_by() by model';

CREATE OR REPLACE FUNCTION aibilling.report_bars(title text, about text, head text, names text[], cents numeric[], calls numeric[]) RETURNS text
LANGUAGE sql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
	SELECT format('<section><h2>%s</h2><p class="soft small">%s</p><table><thead><tr><th>%s</th><th class="wide"><span class="soft">share</span></th>'
		'<th class="narrow">cost</th><th class="narrow">calls</th></tr></thead><tbody>%s</tbody></table></section>',
		title, about, head, coalesce(string_agg(format(
			'<tr><td class="name" title="%1$s">%1$s</td><td><svg viewBox="0 0 100 4" preserveAspectRatio="none" role="img" aria-label="%4$s of the cost">'
			'<rect width="100" height="4" fill="currentColor" opacity="0.09"/><rect class="f1" width="%2$s" height="4" data-name="%1$s" data-cents="%5$s"/></svg></td><td>%3$s</td><td>%6$s</td></tr>',
			aibilling.escape_html(u.name), round(100 * greatest(u.cents, 0) / nullif(u.top, 0), 2), aibilling.usd_text(u.cents),
			aibilling.percent_text(u.cents, u.total), u.cents, aibilling.short_number(u.calls)), E'\n' ORDER BY u.n),
			'<tr><td class="soft" colspan="4">Nothing in these days.</td></tr>'))
	FROM (
		SELECT g.*, greatest(max(g.cents) OVER (), 0) AS top, sum(g.cents) OVER () AS total
		FROM (
			SELECT least(r.n, 11) AS n, CASE WHEN r.n > 10 THEN 'all others' ELSE min(r.name) END AS name,
				sum(r.cents) AS cents, sum(r.calls) AS calls
			FROM (
				SELECT a.*, row_number() OVER (ORDER BY a.cents DESC) AS n
				FROM unnest(names, cents, calls) AS a (name, cents, calls)
			) AS r
			GROUP BY least(r.n, 11), r.n > 10
		) AS g
	) AS u
$$;
COMMENT ON FUNCTION aibilling.report_bars(text, text, text, text[], numeric[], numeric[]) IS 'A part of aibilling.report(): a table with bars, the ten that cost most and all others together';

CREATE OR REPLACE FUNCTION aibilling.report_waiting(usage regclass) RETURNS text
LANGUAGE plpgsql STABLE PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	body text;
BEGIN
	IF NOT aibilling.may_see(usage) THEN
		RETURN '<section><h2>What waits</h2><p class="soft">Shown to the owner of the table and to pg_monitor.</p></section>';
	END IF;
	SELECT string_agg(format('<tr><td class="name">%s</td><td class="words">%s</td><td>%s</td></tr>', w.state,
			coalesce(aibilling.escape_html(w.error), '<span class="soft">its turn</span>'), CASE WHEN w.n >= 20000 THEN 'about ' ELSE '' END || aibilling.short_number(w.n)),
			E'\n' ORDER BY w.state <> 'rejected', w.n DESC)
	INTO body
	FROM (
		SELECT o.state, o.error, count(*) AS n, row_number() OVER (PARTITION BY o.state ORDER BY count(*) DESC) AS place
		FROM (SELECT e.state, e.error FROM aibilling.outbox e WHERE e.usage_table = usage LIMIT 20000) o
		GROUP BY o.state, o.error
	) AS w
	WHERE w.place <= 6;
	RETURN format('<section><h2>What waits, and what was rejected</h2><p class="soft small">Rows that Polar does not have, now, and why.</p>%s</section>',
		CASE WHEN body IS NULL THEN '<p class="good" style="margin-top:12px">Nothing: every row is delivered or on its way.</p>' ELSE
		format('<table><thead><tr><th class="narrow">state</th><th class="words">reason</th><th class="narrow">rows</th></tr></thead><tbody>%s</tbody></table>', body) END);
END
$$;
COMMENT ON FUNCTION aibilling.report_waiting(regclass) IS 'A part of aibilling.report(): what is not delivered, and why';

CREATE OR REPLACE FUNCTION aibilling.report_delivery(usage regclass) RETURNS text
LANGUAGE plpgsql STABLE PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	body text;
BEGIN
	IF NOT aibilling.may_see(usage) THEN
		RETURN '<section><h2>Delivery</h2><p class="soft">Shown to the owner of the table and to pg_monitor.</p></section>';
	END IF;
	SELECT format('<dl><dt>now</dt><dd>%s</dd><dt>events delivered, in all</dt><dd>%s</dd><dt>requests answered at the first attempt</dt><dd>%s</dd>'
			'<dt>time to an answer, median and 95 %%</dt><dd>%s</dd><dt>events that Polar had before, unexpected</dt><dd>%s</dd><dt>last delivery</dt><dd>%s</dd></dl>',
			aibilling.escape_html(split_part(split_part(s.status, ';', 1), ':', 1)), aibilling.short_number(s.delivered),
			aibilling.percent_text(l.first_attempt, l.n),
			CASE WHEN l.n = 0 THEN '–' ELSE format('%s ms, %s ms', round((1000 * l.p50)::numeric), round((1000 * l.p95)::numeric)) END,
			s.unexpected_duplicates, coalesce(to_char(s.last_delivery AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI "UTC"'), 'none'))
	INTO body
	FROM aibilling.status s, (
		SELECT count(*) AS n, count(*) FILTER (WHERE d.attempts = 1) AS first_attempt,
			percentile_cont(0.5) WITHIN GROUP (ORDER BY extract(epoch FROM d.finished_at - d.started_at)::double precision) AS p50,
			percentile_cont(0.95) WITHIN GROUP (ORDER BY extract(epoch FROM d.finished_at - d.started_at)::double precision) AS p95
		FROM (
			SELECT e.attempts, e.started_at, e.finished_at FROM aibilling.delivery e
			WHERE e.usage_table = usage AND e.state = 'delivered' ORDER BY e.id DESC LIMIT 2000
		) AS d
	) AS l
	WHERE s.usage_table = usage;
	RETURN format('<section><h2>Delivery</h2><p class="soft small">The way to Polar; times are of the last 2,000 requests.</p>%s</section>',
		coalesce(body, '<p class="soft" style="margin-top:12px">The table is not attached.</p>'));
END
$$;
COMMENT ON FUNCTION aibilling.report_delivery(regclass) IS 'A part of aibilling.report(): how delivery is doing';

CREATE OR REPLACE FUNCTION aibilling.report(usage regclass, from_day date DEFAULT NULL, to_day date DEFAULT NULL) RETURNS text
LANGUAGE plpgsql STABLE PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	last_day date := coalesce(report.to_day, (now() AT TIME ZONE 'UTC')::date);
	first_day date := coalesce(report.from_day, date_trunc('month', last_day::timestamp)::date);
	sums jsonb;
	before numeric;
	all_sums record;
	saved numeric;
	models text;
	customers text;
	ncustomers bigint;
	title text;
	compared text;
BEGIN
	IF report.usage IS NULL THEN
		RAISE EXCEPTION 'the usage table must not be NULL' USING ERRCODE = 'null_value_not_allowed';
	ELSIF first_day > last_day THEN
		RAISE EXCEPTION 'from_day (%) must not be after to_day (%)', first_day, last_day USING ERRCODE = 'invalid_parameter_value';
	ELSIF NOT isfinite(first_day) OR NOT isfinite(last_day) OR last_day - first_day > 3700 THEN
		RAISE EXCEPTION 'a report is of ten years at most' USING ERRCODE = 'invalid_parameter_value';
	END IF;
	SELECT coalesce(jsonb_agg(to_jsonb(u)), '[]') INTO sums FROM aibilling.usage_by(usage, 'model', first_day, last_day) u;
	SELECT coalesce(sum(u.cost_cents), 0) INTO before
	FROM aibilling.usage_by(usage, 'model', first_day - (last_day - first_day + 1), first_day - 1) u;
	SELECT coalesce(sum(s.cost_cents), 0) AS cents, coalesce(sum(s.usage_rows), 0) AS calls, coalesce(sum(s.unpriced), 0) AS unpriced,
		coalesce(sum(s.input_tokens), 0) AS input, coalesce(sum(s.cache_read_tokens), 0) AS cached,
		coalesce(sum(s.output_tokens), 0) AS output, coalesce(sum(s.reasoning_tokens), 0) AS reasoning
	INTO all_sums
	FROM jsonb_to_recordset(sums) AS s (cost_cents numeric, usage_rows numeric, unpriced numeric,
		input_tokens numeric, cache_read_tokens numeric, output_tokens numeric, reasoning_tokens numeric);
	SELECT coalesce(sum(c.saved_cents), 0) INTO saved FROM aibilling.cache_savings(usage, first_day, last_day) c;

	SELECT aibilling.report_bars('Cost by model', 'The ten that cost most.', 'model', array_agg(m.name), array_agg(m.cents), array_agg(m.calls))
	INTO models
	FROM (
		SELECT coalesce(s.model, '(none)') AS name, sum(s.cost_cents) AS cents, sum(s.usage_rows) AS calls
		FROM jsonb_to_recordset(sums) AS s (model text, cost_cents numeric, usage_rows numeric)
		GROUP BY s.model
	) AS m;
	SELECT aibilling.report_bars('Cost by customer', format('The ten that cost most, of %s.', aibilling.short_number(count(*))), 'customer',
			array_agg(coalesce(u.external_customer_id, u.customer_id::text, '(no customer)')), array_agg(u.cost_cents),
			array_agg(u.usage_rows::numeric)), count(*)
	INTO customers, ncustomers
	FROM aibilling.usage_by(usage, 'customer', first_day, last_day) u;

	title := aibilling.escape_html(regexp_replace(usage::text, '^public\.', ''));
	compared := CASE WHEN before = 0 THEN format('none in the %s days before', last_day - first_day + 1)
		ELSE format('<span class="ink">%s %s %%</span> against the %s days before',
			CASE WHEN all_sums.cents >= before THEN '▲' ELSE '▼' END,
			to_char(abs(100 * (all_sums.cents - before) / before), 'FM999,999,990.0'), last_day - first_day + 1) END;
	RETURN format($page$<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>AI usage of %1$s, %2$s to %3$s</title><link rel="icon" href="data:,"><style>%4$s</style></head>
<body><main>
<header><h1>AI usage: %1$s</h1><p class="soft">%2$s to %3$s (UTC), as of %5$s</p></header>
<div class="cards">
<div class="card"><span class="soft small">Cost</span><b id="total" data-cents="%6$s">%7$s</b><span class="small soft">%8$s</span></div>
<div class="card"><span class="soft small">Calls</span><b id="calls" data-calls="%9$s">%10$s</b><span class="small soft">%11$s customers%12$s</span></div>
<div class="card"><span class="soft small">Saved by prompt caches</span><b id="saved" data-cents="%13$s">%14$s</b><span class="small soft">%15$s of the prompt tokens were cached</span></div>
<div class="card"><span class="soft small">Reasoning</span><b id="reasoning">%16$s</b><span class="small soft">of %17$s output tokens</span></div>
</div>
%18$s
<div class="two">%19$s%20$s</div>
<div class="two">%21$s%22$s</div>
<footer>Costs are what the rows cost when they came in, in US dollars, summed exactly and rounded only here. They are of rows that are delivered, in flight or queued.
What caches saved is by the standard prices of each day, less what writing to them cost more. Made by aibilling_polar.</footer>
</main></body></html>
$page$, title, first_day, last_day, aibilling.report_style(), to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI "UTC"'),
		all_sums.cents, aibilling.usd_text(all_sums.cents), compared, all_sums.calls, aibilling.short_number(all_sums.calls),
		aibilling.short_number(ncustomers), CASE WHEN all_sums.unpriced > 0 THEN format('; %s without a price yet', aibilling.short_number(all_sums.unpriced)) ELSE '' END,
		saved, aibilling.usd_text(saved), aibilling.percent_text(all_sums.cached, all_sums.input),
		aibilling.percent_text(all_sums.reasoning, all_sums.output), aibilling.short_number(all_sums.output),
		aibilling.report_trend(sums, first_day, last_day), models, customers, aibilling.report_waiting(usage), aibilling.report_delivery(usage));
END
$$;
COMMENT ON FUNCTION aibilling.report(regclass, date, date) IS
'A page of HTML that needs nothing else: what a usage table''s rows cost from from_day to to_day (UTC, both inclusive; default: this month so far), by time, model and customer, what caches saved, what waits and how delivery is doing. For psql -At -o report.html. Needs SELECT on the table; what waits and how delivery is doing is shown to its owner and to pg_monitor';

CREATE OR REPLACE FUNCTION aibilling.chart(
	usage regclass,
	by text DEFAULT 'day',
	days integer DEFAULT 30,
	OUT name text,
	OUT usd numeric,
	OUT calls bigint,
	OUT chart text)
RETURNS SETOF record
LANGUAGE plpgsql STABLE PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
	last_day date := (now() AT TIME ZONE 'UTC')::date;
	first_day date := last_day - (chart.days - 1);
	eighths text[] := CASE getdatabaseencoding() WHEN 'UTF8' THEN '{"",▏,▎,▍,▌,▋,▊,▉}'::text[] END;
BEGIN
	IF chart.by IS NULL OR chart.by NOT IN ('day', 'model', 'provider', 'customer') THEN
		RAISE EXCEPTION 'invalid value for parameter "by": "%"', chart.by
			USING ERRCODE = 'invalid_parameter_value', HINT = 'Use ''day'', ''model'', ''provider'' or ''customer''.';
	ELSIF chart.days IS NULL OR chart.days NOT BETWEEN 1 AND 3700 THEN
		RAISE EXCEPTION 'days must be between 1 and 3700'
			USING ERRCODE = 'invalid_parameter_value';
	END IF;
	RETURN QUERY
	WITH sums AS (
		SELECT d::date::text AS name, 0::numeric AS cents, 0::bigint AS calls
		FROM generate_series(first_day::timestamp, last_day::timestamp, interval '1 day') d WHERE chart.by = 'day'
		UNION ALL
		SELECT CASE chart.by WHEN 'day' THEN u.day::text WHEN 'model' THEN coalesce(u.model, '(none)') ELSE coalesce(u.provider, '(none)') END,
			u.cost_cents, u.usage_rows
		FROM aibilling.usage_by(usage, 'model', first_day, last_day) u WHERE chart.by <> 'customer'
		UNION ALL
		SELECT coalesce(u.external_customer_id, u.customer_id::text, '(no customer)'), u.cost_cents, u.usage_rows
		FROM aibilling.usage_by(usage, 'customer', first_day, last_day) u WHERE chart.by = 'customer'
	), grouped AS (
		SELECT s.name, sum(s.cents) AS cents, sum(s.calls)::bigint AS calls FROM sums s GROUP BY s.name
	), sized AS (
		SELECT g.*, CASE WHEN g.cents > 0 THEN round(320 * g.cents / max(g.cents) OVER ())::integer ELSE 0 END AS len FROM grouped g
	)
	SELECT left(regexp_replace(s.name, '[\x01-\x1f\x7f]', '?', 'g'), 60), round(s.cents / 100, 4), s.calls,
		CASE WHEN eighths IS NULL THEN repeat('#', s.len / 8) ELSE repeat('█', s.len / 8) || eighths[s.len % 8 + 1] END
	FROM sized s
	ORDER BY CASE WHEN chart.by = 'day' THEN s.name END, s.cents DESC, s.name
	LIMIT CASE WHEN chart.by = 'day' THEN NULL ELSE 40 END;
END
$$;
COMMENT ON FUNCTION aibilling.chart(regclass, text, integer) IS
'What rows of the last days (UTC, today included) cost, with bars for psql: by day, or the forty models, providers or customers that cost most. Needs SELECT on the table';
