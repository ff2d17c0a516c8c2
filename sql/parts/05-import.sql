-- ---------------------------------------------------------------------------
-- Importing what a reader has read
-- ---------------------------------------------------------------------------

-- A catalogue written by a program that computes in doubles has noise from the
-- 16th significant digit on; no price needs 12.
CREATE OR REPLACE FUNCTION aibilling.clean_price(price numeric) RETURNS numeric
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
RETURN CASE
	WHEN min_scale(price) <= 9 THEN trim_scale(price)
	ELSE trim_scale(round(price, 11 - floor(log(abs(price)))::integer))
	END;
COMMENT ON FUNCTION aibilling.clean_price(numeric) IS
'A price without float noise: unchanged up to 9 decimals, else rounded to 12 significant digits';

-- Prices as cards: what is charged by the piece costs the same in each service
-- tier; what a tier costs beyond a step of the standard tier is said, or unknown.
CREATE OR REPLACE FUNCTION aibilling.clean_prices(prices aibilling.catalogue_price[]) RETURNS SETOF aibilling.catalogue_price
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET enable_nestloop = off
SET jit = off
AS $$
	WITH cleaned AS MATERIALIZED (
		-- units are jsonb and hold any number of decimals, the columns 9
		SELECT p.provider, p.model, p.service_tier, p.context_above, p.valid_from, p.daily_from, p.daily_to,
			p.price_column, p.price, p.problem, p.n,
			c.clean, CASE WHEN p.price_column LIKE 'units.%' THEN c.clean ELSE round(c.clean, 9) END AS stored
		FROM unnest(prices) WITH ORDINALITY AS p (provider, model, service_tier, context_above, valid_from,
			daily_from, daily_to, price_column, price, problem, n)
		CROSS JOIN LATERAL aibilling.clean_price(p.price) AS c (clean)
	), usable AS MATERIALIZED (
		SELECT c.*, first_value(n) OVER slot AS first_n, first_value(stored) OVER slot AS first_stored
		FROM cleaned c
		WHERE price IS NOT NULL AND provider <> '' AND model <> ''
			AND abs(stored - clean) <= abs(clean) / 1000000
		WINDOW slot AS (PARTITION BY provider, model, service_tier, context_above, valid_from, daily_from, daily_to, price_column
			ORDER BY n)
	), priced AS MATERIALIZED (
		SELECT * FROM usable WHERE n = first_n
	), piece AS (
		-- A service tier changes what tokens cost.  What is charged by the piece
		-- costs the same in each, unless the catalogue says otherwise.
		SELECT t.provider, t.model, t.service_tier, t.valid_from, s.price_column, s.stored
		FROM (SELECT DISTINCT provider, model, service_tier, valid_from FROM priced WHERE service_tier <> 'standard') AS t
		JOIN priced s ON (s.provider, s.model, s.service_tier, s.context_above) = (t.provider, t.model, 'standard', 0)
			AND s.valid_from IS NOT DISTINCT FROM t.valid_from
			AND s.daily_from IS NULL
			AND (s.price_column IN ('request', 'web_search', 'discount')
				OR s.price_column LIKE 'units.%' AND s.price_column NOT LIKE '%\_tokens')
		WHERE NOT EXISTS (
			SELECT FROM priced p
			WHERE (p.provider, p.model, p.service_tier, p.context_above, p.price_column)
					= (t.provider, t.model, t.service_tier, 0, s.price_column)
				AND p.valid_from IS NOT DISTINCT FROM t.valid_from
		)
	), base AS (
		-- what a tier costs without a step
		SELECT provider, model, service_tier, valid_from, price_column, stored
		FROM priced
		WHERE service_tier <> 'standard' AND context_above = 0 AND daily_from IS NULL
		UNION ALL
		SELECT * FROM piece
	), long AS MATERIALIZED (
		-- What it costs beyond each step that the standard tier takes: what the
		-- catalogue says; where the standard tier takes none in this price, the
		-- same; half the standard price if it is half without the step, as
		-- service_tier_rule has it; or nobody knows.
		SELECT b.provider, b.model, b.service_tier, w.context_above, b.valid_from, b.price_column,
			o.n IS NOT NULL AS given,
			CASE
				WHEN o.n IS NOT NULL THEN o.stored
				WHEN s.n IS NULL THEN b.stored
				WHEN b.service_tier IN ('batch', 'flex') AND 2 * b.stored = f.stored THEN s.stored / 2
			END AS price,
			o.n IS NULL AND s.n IS NOT NULL AS follows
		FROM base b
		JOIN (SELECT DISTINCT provider, model, valid_from, context_above FROM priced
			WHERE service_tier = 'standard' AND context_above > 0 AND daily_from IS NULL) AS w
			ON (w.provider, w.model) = (b.provider, b.model) AND w.valid_from IS NOT DISTINCT FROM b.valid_from
		LEFT JOIN priced s ON (s.provider, s.model, s.service_tier, s.context_above, s.price_column)
				= (b.provider, b.model, 'standard', w.context_above, b.price_column)
			AND s.valid_from IS NOT DISTINCT FROM b.valid_from AND s.daily_from IS NULL
		LEFT JOIN priced f ON (f.provider, f.model, f.service_tier, f.context_above, f.price_column)
				= (b.provider, b.model, 'standard', 0, b.price_column)
			AND f.valid_from IS NOT DISTINCT FROM b.valid_from AND f.daily_from IS NULL
		LEFT JOIN priced o ON (o.provider, o.model, o.service_tier, o.context_above, o.price_column)
				= (b.provider, b.model, b.service_tier, w.context_above, b.price_column)
			AND o.valid_from IS NOT DISTINCT FROM b.valid_from AND o.daily_from IS NULL
	), unknown AS (
		SELECT provider, model, service_tier, context_above, valid_from,
			string_agg(replace(price_column, 'units.', ''), ', ' ORDER BY price_column) AS columns
		FROM long
		WHERE price IS NULL
		GROUP BY provider, model, service_tier, context_above, valid_from
	)
	SELECT provider, model, service_tier, context_above, valid_from, daily_from, daily_to, price_column,
		trim_scale(stored),
		nullif(concat_ws('; ', problem, CASE WHEN abs(stored - price) > abs(price) / 1000000000
			THEN 'rounded from ' || trim_scale(price) END), '')
	FROM priced
	UNION ALL
	SELECT provider, model, service_tier, context_above, valid_from, daily_from, daily_to, price_column,
		NULL, coalesce(problem, CASE
			WHEN provider <> '' AND model <> '' THEN 'needs more than 9 decimals: ' || trim_scale(price)
			ELSE 'model without a name' END)
	FROM cleaned
	WHERE price IS NULL OR coalesce(provider, '') = '' OR coalesce(model, '') = ''
		OR abs(stored - clean) > abs(clean) / 1000000
	UNION ALL
	SELECT provider, model, service_tier, context_above, valid_from, daily_from, daily_to, price_column,
		NULL, format('the catalogue gives this price twice: %s is taken, not %s', trim_scale(first_stored), trim_scale(stored))
	FROM usable
	WHERE n <> first_n AND stored <> first_stored
	UNION ALL
	SELECT provider, model, service_tier, 0, valid_from, NULL, NULL, price_column, trim_scale(stored), NULL
	FROM piece
	UNION ALL
	SELECT l.provider, l.model, l.service_tier, l.context_above, l.valid_from, NULL, NULL, l.price_column, trim_scale(l.price),
		CASE WHEN l.follows THEN 'half of standard, as without the step' END
	FROM long l
	LEFT JOIN unknown u ON (u.provider, u.model, u.service_tier, u.context_above)
			= (l.provider, l.model, l.service_tier, l.context_above)
		AND u.valid_from IS NOT DISTINCT FROM l.valid_from
	WHERE l.price IS NOT NULL AND NOT l.given AND (l.follows OR u.provider IS NOT NULL)
	UNION ALL
	SELECT provider, model, service_tier, context_above, valid_from, NULL, NULL, 'inherit', 0,
		format('the catalogue does not say what %s costs beyond this step in this service tier', columns)
	FROM unknown
$$;
COMMENT ON FUNCTION aibilling.clean_prices(aibilling.catalogue_price[]) IS
'The prices of a catalogue without float noise and doubles, as far as aibilling.price can hold them';

CREATE OR REPLACE FUNCTION aibilling.stored_prices(source text) RETURNS SETOF aibilling.catalogue_price
LANGUAGE sql STABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
	SELECT p.provider, p.model, p.service_tier, p.context_above, p.valid_from,
		p.daily_from, p.daily_to, c.price_column, trim_scale(c.price), NULL
	FROM aibilling.price p
	CROSS JOIN LATERAL (
		VALUES ('input', p.input), ('output', p.output), ('cache_read', p.cache_read),
			('cache_write', p.cache_write), ('cache_write_1h', p.cache_write_1h),
			('reasoning', p.reasoning), ('request', p.request), ('web_search', p.web_search),
			('discount', p.discount), ('multiplier', p.multiplier),
			('inherit', CASE WHEN NOT p.inherit THEN 0 END)
		UNION ALL
		SELECT 'units.' || u.key, aibilling.catalogue_number(u.value)
		FROM jsonb_each(p.units) u
	) AS c (price_column, price)
	WHERE p.source = stored_prices.source AND c.price IS NOT NULL
$$;
COMMENT ON FUNCTION aibilling.stored_prices(text) IS
'The prices stored for a source, one per row';

-- The cards among prices that differ from what is stored for the source, with
-- the date each is to be stored under and what is suspicious about it.
--
-- A card with a date of its own replaces the card stored under that date.  A
-- card without one is compared with the card in force: where it differs it is
-- a new card from now on, so that old usage keeps its price, unless the
-- catalogue itself dates what came after it: then it corrects history.
--
-- A price for what had none is no change: it holds from where the card does.  And
-- a price that the catalogue only implies is not a suspicious one.
CREATE OR REPLACE FUNCTION aibilling.changed_cards(prices aibilling.catalogue_price[], source text)
RETURNS SETOF aibilling.price_card
LANGUAGE sql STABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET enable_nestloop = off
SET jit = off
AS $$
	WITH given AS MATERIALIZED (
		SELECT p.*, concat_ws('|', p.context_above, p.daily_from, p.daily_to, p.price_column) AS slot
		FROM unnest(prices) AS p
		WHERE p.price IS NOT NULL
	), stored AS MATERIALIZED (
		SELECT p.*, concat_ws('|', p.context_above, p.daily_from, p.daily_to, p.price_column) AS slot
		FROM aibilling.stored_prices(source) AS p
	), stored_card AS MATERIALIZED (
		SELECT provider, model, service_tier, valid_from, jsonb_object_agg(slot, price) AS content
		FROM stored
		GROUP BY provider, model, service_tier, valid_from
	), given_card AS (
		SELECT provider, model, service_tier, valid_from,
			min(valid_from) OVER (PARTITION BY provider, model, service_tier) AS first_date,
			jsonb_object_agg(slot, price) AS content
		FROM given
		GROUP BY provider, model, service_tier, valid_from
	), compared AS (
		SELECT DISTINCT ON (g.provider, g.model, g.service_tier, g.valid_from)
			g.*, s.valid_from AS stored_from, s.content AS stored_content
		FROM given_card g
		LEFT JOIN stored_card s ON (s.provider, s.model, s.service_tier) = (g.provider, g.model, g.service_tier)
			AND CASE
				WHEN g.valid_from IS NOT NULL THEN s.valid_from <= g.valid_from
				ELSE s.valid_from <= now() AND (g.first_date IS NULL OR s.valid_from < g.first_date)
			END
		ORDER BY g.provider, g.model, g.service_tier, g.valid_from, s.valid_from DESC NULLS LAST
	), differing AS MATERIALIZED (
		SELECT c.provider, c.model, c.service_tier, c.valid_from AS given_from, c.stored_from,
			CASE
				WHEN c.valid_from IS NOT NULL THEN c.valid_from
				WHEN c.stored_from IS NULL THEN '-infinity'
				WHEN c.first_date <= now() OR a.only_unknown THEN c.stored_from
				ELSE now()
			END AS valid_from
		FROM compared c
		-- Prices of what had none change no cost that was known; but reasoning
		-- without a price costs what output does, a request nothing.
		CROSS JOIN LATERAL (
			SELECT c.stored_content <@ c.content AND NOT EXISTS (
				SELECT FROM jsonb_object_keys(c.content) AS k (slot)
				CROSS JOIN LATERAL regexp_replace(k.slot, '^.*\|', '') AS n (price_column)
				WHERE NOT c.stored_content ? k.slot
					AND (n.price_column IN ('reasoning', 'request', 'discount', 'multiplier', 'inherit')
						OR EXISTS (SELECT FROM jsonb_object_keys(c.stored_content) AS s (slot)
							WHERE regexp_replace(s.slot, '^.*\|', '') = n.price_column))) AS only_unknown
		) AS a
		WHERE c.stored_content IS DISTINCT FROM c.content
			OR c.valid_from IS NOT NULL AND c.stored_from <> c.valid_from
	), row_price AS (
		SELECT d.provider, d.model, d.service_tier, d.given_from, g.context_above, g.daily_from, g.daily_to,
			max(g.price) FILTER (WHERE g.price_column = 'input') AS input,
			max(g.price) FILTER (WHERE g.price_column = 'output') AS output,
			max(g.price) FILTER (WHERE g.price_column = 'cache_read') AS cache_read,
			max(g.price) FILTER (WHERE g.price_column = 'cache_write_1h'
				AND g.problem NOT LIKE 'as %' IS NOT FALSE) AS cache_write_1h
		FROM differing d
		JOIN given g ON (g.provider, g.model, g.service_tier) = (d.provider, d.model, d.service_tier)
			AND g.valid_from IS NOT DISTINCT FROM d.given_from
		GROUP BY 1, 2, 3, 4, 5, 6, 7
	), standard AS (
		SELECT provider, model, valid_from, context_above, daily_from, daily_to, price_column, price
		FROM given
		WHERE service_tier = 'standard' AND price_column IN ('input', 'output')
	), finding AS (
		SELECT r.provider, r.model, r.service_tier, r.given_from, f.finding
		FROM row_price r
		CROSS JOIN LATERAL (VALUES
			(CASE WHEN r.cache_read > r.input
				THEN format('cache_read %s above input %s', r.cache_read, r.input) END),
			(CASE WHEN r.cache_write_1h NOT BETWEEN 1.5 * r.input AND 2.5 * r.input
				THEN format('cache_write_1h %s not 1.5 to 2.5 times input %s', r.cache_write_1h, r.input) END)
		) AS f (finding)
		UNION ALL
		SELECT g.provider, g.model, g.service_tier, g.valid_from, f.finding
		FROM given g
		LEFT JOIN standard s ON (s.provider, s.model, s.context_above, s.price_column)
				= (g.provider, g.model, g.context_above, g.price_column)
			AND g.service_tier <> 'standard'
			AND s.valid_from IS NOT DISTINCT FROM g.valid_from
			AND s.daily_from IS NOT DISTINCT FROM g.daily_from
		CROSS JOIN LATERAL (VALUES
			(CASE WHEN g.price < 0 THEN format('%s %s is negative', g.price_column, g.price) END),
			(CASE WHEN g.price > 1000 AND g.price_column IN ('input', 'output')
				THEN format('%s %s above 1000', g.price_column, g.price) END),
			(CASE WHEN g.price > 1000000 THEN format('%s %s above 1000000', g.price_column, g.price) END),
			(CASE WHEN g.price_column = 'discount' AND g.price > 1
				THEN format('discount %s above 1', g.price) END),
			(CASE WHEN g.service_tier = 'priority' AND g.price > 5 * s.price
				THEN format('%s %s above 5 times standard %s', g.price_column, g.price, s.price) END),
			(CASE WHEN g.service_tier IN ('batch', 'flex') AND g.price > s.price
				THEN format('%s %s above standard %s', g.price_column, g.price, s.price) END)
		) AS f (finding)
		UNION ALL
		SELECT d.provider, d.model, d.service_tier, d.given_from,
			format('%s from %s to %s, more than 3 times', g.price_column, s.price, g.price)
		FROM differing d
		JOIN given g ON (g.provider, g.model, g.service_tier) = (d.provider, d.model, d.service_tier)
			AND g.valid_from IS NOT DISTINCT FROM d.given_from
		JOIN stored s ON (s.provider, s.model, s.service_tier, s.valid_from, s.slot)
			= (d.provider, d.model, d.service_tier, d.stored_from, g.slot)
		WHERE g.price > 3 * s.price OR 3 * g.price < s.price
	)
	SELECT d.provider, d.model, d.service_tier, d.given_from, d.stored_from, d.valid_from,
		string_agg(DISTINCT f.finding, '; ')
	FROM differing d
	LEFT JOIN finding f ON (f.provider, f.model, f.service_tier) = (d.provider, d.model, d.service_tier)
		AND f.given_from IS NOT DISTINCT FROM d.given_from
	GROUP BY 1, 2, 3, 4, 5, 6
$$;
COMMENT ON FUNCTION aibilling.changed_cards(aibilling.catalogue_price[], text) IS
'Which cards among the prices differ from those stored for the source, the date each is to be stored under, and why it is suspicious';

CREATE OR REPLACE FUNCTION aibilling.price_rows(prices aibilling.catalogue_price[], cards aibilling.price_card[])
RETURNS TABLE (provider text, model text, service_tier text, context_above bigint, valid_from timestamptz,
	daily_from time, daily_to time, input numeric, output numeric, cache_read numeric, cache_write numeric,
	cache_write_1h numeric, reasoning numeric, request numeric, web_search numeric, units jsonb, discount numeric,
	multiplier numeric, inherit boolean, note text, reason text)
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
SET enable_nestloop = off
SET jit = off
AS $$
	WITH price AS MATERIALIZED (
		SELECT c.provider, c.model, c.service_tier, p.context_above, c.valid_from, p.daily_from, p.daily_to,
			p.price_column, p.price, p.problem, c.reason
		FROM unnest(cards) AS c
		JOIN unnest(prices) AS p ON (p.provider, p.model, p.service_tier) = (c.provider, c.model, c.service_tier)
			AND p.valid_from IS NOT DISTINCT FROM c.given_from
		WHERE p.price IS NOT NULL
	), priced AS (
		SELECT p.provider, p.model, p.service_tier, p.context_above, p.valid_from, p.daily_from, p.daily_to,
			jsonb_object_agg(p.price_column, p.price) AS prices,
			array_agg(p.price_column) FILTER (WHERE p.problem IS NOT NULL) AS columns,
			array_agg(p.problem) FILTER (WHERE p.problem IS NOT NULL) AS remarks,
			p.reason
		FROM price p
		GROUP BY p.provider, p.model, p.service_tier, p.context_above, p.valid_from, p.daily_from, p.daily_to, p.reason
	)
	SELECT p.provider, p.model, p.service_tier, p.context_above, p.valid_from, p.daily_from, p.daily_to,
		c.input, c.output, c.cache_read, c.cache_write, c.cache_write_1h, c.reasoning, c.request, c.web_search,
		(SELECT jsonb_object_agg(substr(u.key, 7), u.value) FROM jsonb_each(p.prices) u WHERE u.key LIKE 'units.%'),
		c.discount, c.multiplier, NOT p.prices ? 'inherit',
		(
			SELECT string_agg(r.remark, '; ' ORDER BY r.remark)
			FROM (
				SELECT CASE WHEN bool_or(l.price_column = 'inherit') THEN l.remark
					ELSE l.remark || ': ' || string_agg(replace(l.price_column, 'units.', ''), ', ' ORDER BY l.price_column) END AS remark
				FROM unnest(p.columns, p.remarks) AS l (price_column, remark)
				GROUP BY l.remark
			) AS r
		), p.reason
	FROM priced p
	CROSS JOIN LATERAL jsonb_to_record(p.prices) AS c (input numeric, output numeric, cache_read numeric, cache_write numeric,
		cache_write_1h numeric, reasoning numeric, request numeric, web_search numeric, discount numeric, multiplier numeric)
$$;
COMMENT ON FUNCTION aibilling.price_rows(aibilling.catalogue_price[], aibilling.price_card[]) IS
'The prices of the cards as rows of aibilling.price; the note has the remarks on them';

CREATE OR REPLACE FUNCTION aibilling.put_aliases(names jsonb, fallbacks jsonb, source text) RETURNS bigint
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
SET enable_nestloop = off
SET jit = off
AS $$
#variable_conflict use_column
DECLARE
	written bigint;
BEGIN
	-- A provider's names are its models' ids, their exact aliases and globs.
	-- Some providers sell what is another's and price it alike (fallbacks).  All
	-- of it ranks below the priority 0 of a user's alias.
	WITH model AS MATERIALIZED (
		SELECT m.*, n.ordinality AS n
		FROM jsonb_array_elements(names) WITH ORDINALITY AS n
		CROSS JOIN LATERAL jsonb_to_record(n.value) AS m (provider text, model text, exact jsonb, glob jsonb)
	), own AS (
		SELECT provider, 'exact' AS kind, model AS pattern, provider AS to_provider, model AS to_model, -1 AS priority, 0 AS n
		FROM model
		UNION ALL
		SELECT m.provider, 'exact', e.value, m.provider, m.model, -1, m.n
		FROM model m CROSS JOIN LATERAL jsonb_array_elements_text(m.exact) e
		UNION ALL
		SELECT m.provider, 'glob', e.value, m.provider, m.model, -1, m.n
		FROM model m CROSS JOIN LATERAL jsonb_array_elements_text(m.glob) e
	), sold AS (
		SELECT * FROM own
		UNION ALL
		SELECT f.key, o.kind, o.pattern, o.to_provider, o.to_model, o.priority - 1, o.n
		FROM jsonb_each(fallbacks) f
		CROSS JOIN LATERAL jsonb_array_elements_text(f.value) t
		JOIN own o ON o.provider = t.value
	), name AS (
		SELECT DISTINCT ON (provider, kind, pattern) *
		FROM sold
		ORDER BY provider, kind, pattern, priority DESC, n, to_provider, to_model
	)
	INSERT INTO aibilling.model_alias AS a (provider, kind, pattern, to_provider, to_model, priority, source)
		SELECT provider, kind, pattern, to_provider, to_model, priority, put_aliases.source
		FROM name
		-- a name that has a card of its own leads to that
		WHERE NOT (kind = 'exact' AND EXISTS (SELECT FROM aibilling.price p
			WHERE (p.provider, p.model, p.source) = (name.provider, name.pattern, put_aliases.source)))
	ON CONFLICT (provider, kind, pattern, source) DO UPDATE
		SET to_provider = excluded.to_provider, to_model = excluded.to_model, priority = excluded.priority
		WHERE (a.to_provider, a.to_model, a.priority) IS DISTINCT FROM (excluded.to_provider, excluded.to_model, excluded.priority);
	GET DIAGNOSTICS written = ROW_COUNT;
	RETURN written;
END
$$;
COMMENT ON FUNCTION aibilling.put_aliases(jsonb, jsonb, text) IS
'Writes the names of models ([{provider, model, exact: [], glob: []}, ...]) and of those that a provider sells as well ({provider: [other, ...]}) into aibilling.model_alias under a source; returns how many changed';

-- The rows are added at the first import and not by this script, since
-- pg_dump dumps the table as a whole.
CREATE OR REPLACE FUNCTION aibilling.register_price_source(source text) RETURNS void
LANGUAGE plpgsql VOLATILE STRICT PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
	IF EXISTS (SELECT FROM aibilling.price_source s WHERE s.source = register_price_source.source) THEN
		RETURN;
	END IF;
	-- What somebody imported is newer than what came with the software.
	INSERT INTO aibilling.price_source (source, priority, note)
		SELECT * FROM (VALUES
			('genai-prices', 50, 'import_prices: genai-prices of Pydantic'),
			('narev', 60, 'import_prices: Narev'),
			('litellm', 70, 'import_prices: LiteLLM'),
			('models.dev', 80, 'import_prices: models.dev'),
			('openrouter', 90, 'import_prices: OpenRouter, for provider openrouter'),
			('bundled', 200, 'load_bundled_prices: what came with aibilling_polar')
		) AS v (source, priority, note)
		WHERE v.source = register_price_source.source
	ON CONFLICT DO NOTHING;
END
$$;
COMMENT ON FUNCTION aibilling.register_price_source(text) IS
'Gives a source that imports know its row in aibilling.price_source, unless it has one';

CREATE OR REPLACE FUNCTION aibilling.import_prices(catalogue jsonb, format text, dry_run boolean DEFAULT true)
RETURNS SETOF aibilling.price_change
LANGUAGE plpgsql VOLATILE STRICT PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
	prices aibilling.catalogue_price[];
	cards aibilling.price_card[];
	shape text := CASE WHEN format = 'genai-prices' THEN 'array' ELSE 'object' END;
	held bigint;
	held_models text;
BEGIN
	IF format NOT IN ('litellm', 'models.dev', 'genai-prices', 'openrouter', 'narev') THEN
		RAISE EXCEPTION 'price catalogue format "%" is unknown', format
			USING ERRCODE = 'invalid_parameter_value',
				HINT = 'Known formats are litellm, models.dev, genai-prices, openrouter and narev.';
	END IF;
	IF jsonb_typeof(catalogue) <> shape
		OR format IN ('openrouter', 'narev') AND jsonb_typeof(catalogue -> 'data') IS DISTINCT FROM 'array' THEN
		RAISE EXCEPTION 'catalogue is not in the format %', format
			USING ERRCODE = 'invalid_parameter_value',
				DETAIL = CASE WHEN format IN ('openrouter', 'narev')
					THEN 'A JSON object with an array "data" was expected.'
					ELSE format('A JSON %s was expected.', shape) END;
	END IF;

	IF NOT dry_run THEN
		-- Two imports at a time would each add a card from now on.
		LOCK TABLE aibilling.price IN SHARE ROW EXCLUSIVE MODE;
		PERFORM aibilling.register_price_source(format);
	END IF;

	prices := CASE format
		WHEN 'litellm' THEN ARRAY(SELECT p FROM aibilling.read_litellm(catalogue) p)
		WHEN 'models.dev' THEN ARRAY(SELECT p FROM aibilling.read_models_dev(catalogue) p)
		WHEN 'genai-prices' THEN ARRAY(SELECT p FROM aibilling.read_genai_prices(catalogue) p)
		WHEN 'openrouter' THEN ARRAY(SELECT p FROM aibilling.read_openrouter(catalogue) p)
		ELSE ARRAY(SELECT p FROM aibilling.read_narev(catalogue) p)
	END;
	prices := ARRAY(SELECT p FROM aibilling.clean_prices(prices) p);
	PERFORM aibilling.note_progress(NULL, 0, cardinality(prices), 'prices');
	cards := ARRAY(SELECT c FROM aibilling.changed_cards(prices, format) c);

	-- before anything is written: this compares with what is stored now
	RETURN QUERY
		WITH side AS (
			SELECT c.*, g.context_above, g.daily_from, g.daily_to, g.price_column, false AS old, g.price, g.problem
			FROM unnest(cards) AS c
			JOIN unnest(prices) AS g ON (g.provider, g.model, g.service_tier) = (c.provider, c.model, c.service_tier)
				AND g.valid_from IS NOT DISTINCT FROM c.given_from
			WHERE g.price IS NOT NULL
			UNION ALL
			SELECT c.*, s.context_above, s.daily_from, s.daily_to, s.price_column, true, s.price, NULL
			FROM unnest(cards) AS c
			JOIN aibilling.stored_prices(format) AS s
				ON (s.provider, s.model, s.service_tier) = (c.provider, c.model, c.service_tier)
				AND s.valid_from = c.stored_from
		), change AS (
			SELECT provider, model, service_tier, context_above, valid_from, daily_from, daily_to, price_column,
				max(price) FILTER (WHERE old) AS old_price, max(price) FILTER (WHERE NOT old) AS new_price,
				reason, max(problem) AS remark
			FROM side
			GROUP BY provider, model, service_tier, context_above, valid_from, daily_from, daily_to, price_column, reason
		)
		SELECT CASE
				WHEN reason IS NOT NULL THEN 'quarantined'
				WHEN old_price IS NULL THEN 'added'
				WHEN new_price IS NULL THEN 'removed'
				ELSE 'changed'
			END AS action,
			provider, model, service_tier, context_above, valid_from, daily_from, daily_to, price_column,
			old_price, new_price, nullif(concat_ws('; ', reason, remark), '')
		FROM change
		WHERE old_price IS DISTINCT FROM new_price
		UNION ALL
		SELECT 'skipped', provider, model, service_tier, context_above, valid_from, daily_from, daily_to, price_column,
			NULL, NULL, problem
		FROM unnest(prices) AS p
		WHERE price IS NULL
		ORDER BY 2, 3, 4, 6, 5, 7, 9, 1;

	SELECT count(*), string_agg(DISTINCT format('%s/%s', c.provider, c.model), ', ') INTO held, held_models
	FROM unnest(cards) AS c
	WHERE c.reason IS NOT NULL;
	IF held > 0 THEN
		RAISE NOTICE '% of the prices of % are suspicious and are held back: %', held, format,
				CASE WHEN length(held_models) > 300 THEN left(held_models, 300) || ' ...' ELSE held_models END
			USING HINT = 'Look at them in aibilling.price_quarantine, with the reason; aibilling.release_price() applies one, DELETE forgets it.';
		IF NOT dry_run THEN
			RAISE LOG 'aibilling_polar: % prices of % are held in aibilling.price_quarantine, imported by "%"', held, format, session_user;
		END IF;
	END IF;

	IF dry_run THEN
		RETURN;
	END IF;

	DELETE FROM aibilling.price p
	USING unnest(cards) AS c
	WHERE p.source = format AND c.reason IS NULL
		AND (p.provider, p.model, p.service_tier, p.valid_from) = (c.provider, c.model, c.service_tier, c.valid_from);
	INSERT INTO aibilling.price (provider, model, service_tier, context_above, valid_from, source, daily_from, daily_to,
			input, output, cache_read, cache_write, cache_write_1h, reasoning, request, web_search, units, discount, multiplier,
			inherit, note)
		SELECT provider, model, service_tier, context_above, valid_from, format, daily_from, daily_to,
			input, output, cache_read, cache_write, cache_write_1h, reasoning, request, web_search, units, discount, multiplier,
			inherit, note
		FROM aibilling.price_rows(prices, cards)
		WHERE reason IS NULL;

	-- A card that is fine now, or suspicious in another way, was judged anew.
	WITH judged AS (
		DELETE FROM aibilling.price_quarantine q
		USING unnest(prices) AS g
		WHERE q.source = format AND (q.provider, q.model, q.service_tier) = (g.provider, g.model, g.service_tier)
		RETURNING q.*
	), since AS (
		SELECT provider, model, service_tier, min(quarantined_at) AS since
		FROM judged
		GROUP BY provider, model, service_tier
	)
	INSERT INTO aibilling.price_quarantine (provider, model, service_tier, context_above, valid_from, source, daily_from, daily_to,
			input, output, cache_read, cache_write, cache_write_1h, reasoning, request, web_search, units, discount, multiplier,
			inherit, note, reason, quarantined_at)
		SELECT provider, model, service_tier, context_above, valid_from, format, daily_from, daily_to,
			input, output, cache_read, cache_write, cache_write_1h, reasoning, request, web_search, units, discount, multiplier,
			inherit, note, reason, coalesce(since, now())
		FROM aibilling.price_rows(prices, cards)
		LEFT JOIN since USING (provider, model, service_tier)
		WHERE reason IS NOT NULL;

	IF format = 'genai-prices' THEN
		PERFORM aibilling.put_aliases(
			(SELECT jsonb_agg(n.value ORDER BY n.ordinality)
			 FROM jsonb_array_elements(aibilling.genai_names(catalogue)) WITH ORDINALITY n
			 WHERE EXISTS (SELECT FROM aibilling.price s
				WHERE (s.provider, s.model, s.source) = (n.value ->> 'provider', n.value ->> 'model', 'genai-prices'))),
			(SELECT coalesce(jsonb_object_agg(p.value ->> 'id', p.value -> 'fallback_model_providers'), '{}')
			 FROM jsonb_array_elements(catalogue) p
			 WHERE jsonb_typeof(p.value -> 'fallback_model_providers') = 'array'),
			'genai-prices');
	END IF;
	PERFORM aibilling.note_progress(NULL, NULL, NULL, 'prices');
END
$$;
COMMENT ON FUNCTION aibilling.import_prices(jsonb, text, boolean) IS
'Imports a price catalogue (format litellm, models.dev, genai-prices, openrouter or narev) into aibilling.price under the format''s name as source, and the names of models that genai-prices gives into aibilling.model_alias; returns one row per price that is added, changed, removed, quarantined or skipped, or an entry that names a model of another; a NOTICE says what is held back; with dry_run nothing is written';

CREATE OR REPLACE FUNCTION aibilling.fetch_prices(server name, dry_run boolean DEFAULT false)
RETURNS SETOF aibilling.price_change
LANGUAGE c VOLATILE STRICT AS 'MODULE_PATHNAME', 'abp_sql_fetch_prices';
COMMENT ON FUNCTION aibilling.fetch_prices(name, boolean) IS
'Fetches the prices of a server of kind prices over HTTP and imports them as import_prices does: all or, on any error, nothing; needs USAGE on the server and the rights to write prices; returns a row a changed price';

CREATE OR REPLACE FUNCTION aibilling.release_price(source text, provider text, model text, service_tier text DEFAULT 'standard')
RETURNS bigint
LANGUAGE plpgsql VOLATILE STRICT PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	released bigint;
BEGIN
	DELETE FROM aibilling.price p
	USING aibilling.price_quarantine q
	WHERE (q.source, q.provider, q.model, q.service_tier)
			= (release_price.source, release_price.provider, release_price.model, release_price.service_tier)
		AND (p.source, p.provider, p.model, p.service_tier, p.valid_from)
			= (q.source, q.provider, q.model, q.service_tier, q.valid_from);
	WITH moved AS (
		DELETE FROM aibilling.price_quarantine q
		WHERE (q.source, q.provider, q.model, q.service_tier)
			= (release_price.source, release_price.provider, release_price.model, release_price.service_tier)
		RETURNING q.*
	)
	INSERT INTO aibilling.price (provider, model, service_tier, context_above, valid_from, source, daily_from, daily_to,
			input, output, cache_read, cache_write, cache_write_1h, reasoning, request, web_search, units, discount, multiplier,
			inherit, note)
		SELECT m.provider, m.model, m.service_tier, m.context_above, m.valid_from, m.source, m.daily_from, m.daily_to,
			m.input, m.output, m.cache_read, m.cache_write, m.cache_write_1h, m.reasoning, m.request, m.web_search,
			m.units, m.discount, m.multiplier, m.inherit,
			concat_ws('; ', 'released from quarantine: ' || m.reason, m.note)
		FROM moved m;
	GET DIAGNOSTICS released = ROW_COUNT;
	IF released = 0 THEN
		RAISE EXCEPTION 'no quarantined price of source "%" for provider "%", model "%", service tier "%"',
				source, provider, model, service_tier
			USING ERRCODE = 'no_data_found',
				HINT = 'Table aibilling.price_quarantine lists the cards that can be released.';
	END IF;
	RETURN released;
END
$$;
COMMENT ON FUNCTION aibilling.release_price(text, text, text, text) IS
'Applies a model''s quarantined cards as they are; returns the number of rows moved to aibilling.price';

CREATE OR REPLACE FUNCTION aibilling.bundled_prices() RETURNS jsonb
LANGUAGE c STABLE STRICT PARALLEL SAFE
AS 'MODULE_PATHNAME', 'abp_sql_bundled_prices';
COMMENT ON FUNCTION aibilling.bundled_prices() IS
'The price catalogue installed with aibilling_polar, as it is (doc/catalogues.md describes it)';

CREATE OR REPLACE FUNCTION aibilling.load_bundled_prices(
	OUT package text, OUT package_version text, OUT generated date,
	OUT models bigint, OUT prices bigint, OUT aliases bigint)
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
	bundle jsonb := aibilling.bundled_prices();
	given aibilling.catalogue_price[];
BEGIN
	package := bundle ->> 'package';
	package_version := bundle ->> 'package_version';
	generated := bundle ->> 'generated';
	models := jsonb_array_length(bundle -> 'models');

	LOCK TABLE aibilling.price IN SHARE ROW EXCLUSIVE MODE;
	PERFORM aibilling.register_price_source('bundled');
	DELETE FROM aibilling.price WHERE source = 'bundled';
	DELETE FROM aibilling.model_alias WHERE source = 'bundled';

	given := ARRAY(
		SELECT ROW(m.provider, m.model, 'standard', coalesce((c.value ->> 'context_above')::bigint, 0),
			(c.value ->> 'valid_from')::timestamptz, (c.value ->> 'daily_from')::time, (c.value ->> 'daily_to')::time,
			k.price_column, aibilling.catalogue_number(k.price), NULL)::aibilling.catalogue_price
		FROM jsonb_to_recordset(bundle -> 'models') AS m (provider text, model text, cards jsonb)
		CROSS JOIN LATERAL jsonb_array_elements(m.cards) c
		CROSS JOIN LATERAL (
			SELECT key, value FROM jsonb_each(c.value)
			WHERE key NOT IN ('context_above', 'valid_from', 'daily_from', 'daily_to', 'units')
			UNION ALL
			SELECT 'units.' || key, value FROM jsonb_each(c.value -> 'units')
		) AS k (price_column, price));
	given := ARRAY(SELECT p FROM aibilling.correct_genai_prices(given) p);
	given := ARRAY(SELECT p FROM aibilling.complete_prices(given) p);
	INSERT INTO aibilling.price (provider, model, service_tier, context_above, valid_from, source, daily_from, daily_to,
			input, output, cache_read, cache_write, cache_write_1h, reasoning, request, web_search, units, inherit, note)
		SELECT provider, model, service_tier, context_above, valid_from, 'bundled', daily_from, daily_to,
			input, output, cache_read, cache_write, cache_write_1h, reasoning, request, web_search, units, inherit, note
		FROM aibilling.price_rows(given, ARRAY(
			SELECT DISTINCT ROW(provider, model, service_tier, valid_from, NULL, coalesce(valid_from, '-infinity'), NULL)::aibilling.price_card
			FROM unnest(given)));
	GET DIAGNOSTICS prices = ROW_COUNT;

	aliases := aibilling.put_aliases(bundle -> 'models', bundle -> 'fallbacks', 'bundled');
END
$$;
COMMENT ON FUNCTION aibilling.load_bundled_prices() IS
'Loads the price catalogue installed with aibilling_polar, in the place of what an earlier call loaded; touches only rows of source bundled; needs INSERT and DELETE on aibilling.price and aibilling.model_alias';
