-- Compares what aibilling.cost says with what exactness.py expects; prints one
-- line a kind of check: name, rows checked, rows that differ.
CREATE TEMP VIEW fitting AS
SELECT * FROM exactness_case WHERE nanos BETWEEN -9223372036854775808 AND 9223372036854775807
	OR nanos IS NULL;
CREATE TEMP VIEW overflowing AS
SELECT * FROM exactness_case WHERE nanos > 9223372036854775807;

CREATE TEMP TABLE actual AS
SELECT c.*, a.cost_usd, a.cost_nanos, a.cost_cents, a.status AS actual_status
FROM fitting c, LATERAL aibilling.cost('p', model, input, output, cache_read, cache_write,
	cache_write_1h, reasoning, request, web_search, units, tier, at) a;

SELECT 'status', count(*), count(*) FILTER (WHERE actual_status IS DISTINCT FROM status) FROM actual;
SELECT 'usd', count(*), count(*) FILTER (WHERE cost_usd IS DISTINCT FROM usd) FROM actual;
SELECT 'nanos', count(*), count(*) FILTER (WHERE cost_nanos IS DISTINCT FROM nanos) FROM actual;
SELECT 'cents', count(*), count(*) FILTER (WHERE cost_cents IS DISTINCT FROM cents) FROM actual;
SELECT 'no zeros', count(*), count(*) FILTER (WHERE cost_usd::text <> trim_scale(usd)::text
	OR cost_cents::text <> trim_scale(cents)::text) FROM actual;
SELECT 'cost_nanos', count(*), count(*) FILTER (WHERE nanos IS DISTINCT FROM
	aibilling.cost_nanos('p', model, input, output, cache_read, cache_write, cache_write_1h,
		reasoning, request, web_search, units, tier, at)) FROM fitting;
SELECT 'cost_cents', count(*), count(*) FILTER (WHERE cents IS DISTINCT FROM
	aibilling.cost_cents('p', model, input, output, cache_read, cache_write, cache_write_1h,
		reasoning, request, web_search, units, tier, at)) FROM exactness_case;
SELECT 'explained', count(*), count(*) FILTER (WHERE total IS DISTINCT FROM usd)
FROM exactness_case c, LATERAL (
	SELECT CASE WHEN count(*) = count(amount_usd) THEN sum(amount_usd) END AS total
	FROM aibilling.explain_cost('p', model, input, output, cache_read, cache_write, cache_write_1h,
		reasoning, request, web_search, units, tier, at)) e;
SELECT 'sums', count(*), count(*) FILTER (WHERE s.usd IS DISTINCT FROM a.usd)
FROM exactness_sum s FULL JOIN (
	SELECT model, sum(total) AS usd FROM (
		SELECT model, (SELECT sum(amount_usd) FROM aibilling.explain_cost('p', model, input, output,
			cache_read, cache_write, cache_write_1h, reasoning, request, web_search, units, tier, at)) AS total
		FROM exactness_case WHERE usd IS NOT NULL) t
	GROUP BY model) a USING (model);

CREATE FUNCTION pg_temp.overflows(c exactness_case) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
	PERFORM aibilling.cost_nanos('p', c.model, c.input, c.output, c.cache_read, c.cache_write,
		c.cache_write_1h, c.reasoning, c.request, c.web_search, c.units, c.tier, c.at);
	RETURN false;
EXCEPTION WHEN numeric_value_out_of_range THEN
	RETURN true;
END $$;
SELECT 'overflow', count(*), count(*) FILTER (WHERE NOT pg_temp.overflows(c))
FROM overflowing o JOIN exactness_case c USING (n);
