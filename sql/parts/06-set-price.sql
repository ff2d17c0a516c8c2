-- ---------------------------------------------------------------------------
-- The way out of "unpriced": a price of one's own
-- ---------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION aibilling.priced_model(provider text, model text, OUT card_provider text, OUT card_model text)
AS 'MODULE_PATHNAME', 'abp_sql_priced_model'
LANGUAGE C STABLE CALLED ON NULL INPUT PARALLEL SAFE;
COMMENT ON FUNCTION aibilling.priced_model(text, text) IS
'The provider and model in aibilling.price whose cards price usage of these names, at whatever time; NULL: none';

CREATE OR REPLACE FUNCTION aibilling.card_in_force(provider text, model text, service_tier text, at timestamptz,
	OUT source text, OUT valid_from timestamptz)
LANGUAGE sql STABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
	SELECT c.source, c.valid_from
	FROM (
		SELECT p.source, max(p.valid_from) AS valid_from
		FROM aibilling.price p
		WHERE (p.provider, p.model, p.service_tier)
				= (card_in_force.provider, card_in_force.model, card_in_force.service_tier)
			AND p.valid_from <= card_in_force.at
		GROUP BY p.source
	) AS c
	LEFT JOIN aibilling.price_source s USING (source)
	ORDER BY source <> 'user', s.priority NULLS LAST, source
	LIMIT 1
$$;
COMMENT ON FUNCTION aibilling.card_in_force(text, text, text, timestamptz) IS
'The card of a service tier that goes first at a time, names as in aibilling.price; NULL: none';

-- A note has remarks such as "as input: cache_read, cache_write", separated by "; ".
CREATE OR REPLACE FUNCTION aibilling.note_without(note text, price_columns text[]) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
	SELECT string_agg(CASE WHEN l.listed IS NULL THEN r.remark ELSE l.listed[1] || ': ' || k.kept END, '; ' ORDER BY r.n)
	FROM string_to_table(note, '; ') WITH ORDINALITY AS r (remark, n)
	CROSS JOIN LATERAL regexp_match(r.remark, '^(.*): ([a-z0-9_]+(?:, [a-z0-9_]+)*)$') AS l (listed)
	CROSS JOIN LATERAL (
		SELECT string_agg(c, ', ' ORDER BY n) FROM string_to_table(l.listed[2], ', ') WITH ORDINALITY AS c (c, n)
		WHERE c <> ALL (price_columns)
	) AS k (kept)
	WHERE l.listed IS NULL OR k.kept IS NOT NULL
$$;
COMMENT ON FUNCTION aibilling.note_without(text, text[]) IS
'The note of a price without what its remarks say of these prices';

CREATE OR REPLACE FUNCTION aibilling.changed_price(price aibilling.price, given jsonb, given_units jsonb) RETURNS aibilling.price
LANGUAGE sql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
	-- What costs what its total costs, by the note, follows the new price of
	-- that, unless it has a new price itself.
	WITH changed (name, value) AS (
		SELECT * FROM jsonb_each(given || given_units)
	), follows AS (
		SELECT part.name, to_jsonb(aibilling.catalogue_number(c.value) * CASE f.remark[1] WHEN 'twice' THEN 2 ELSE 1 END) AS value
		FROM regexp_matches((price).note, '\m(as|twice) ([a-z0-9_]+): ([a-z0-9_, ]+)', 'g') AS f (remark)
		JOIN changed c ON c.name = f.remark[2]
		CROSS JOIN LATERAL string_to_table(f.remark[3], ', ') AS part (name)
		WHERE NOT EXISTS (SELECT FROM changed o WHERE o.name = part.name)
	)
	SELECT jsonb_populate_record(price, given
		|| coalesce((SELECT jsonb_object_agg(name, value) FROM follows WHERE name NOT LIKE '%\_tokens'), '{}')
		|| jsonb_build_object(
			'units', nullif(coalesce((price).units, '{}') || given_units
				|| coalesce((SELECT jsonb_object_agg(name, value) FROM follows WHERE name LIKE '%\_tokens'), '{}'), '{}'),
			'note', aibilling.note_without((price).note, ARRAY(SELECT name FROM changed))))
$$;
COMMENT ON FUNCTION aibilling.changed_price(aibilling.price, jsonb, jsonb) IS
'A row of aibilling.price with these prices: of columns, and of units; what costs the same by its note changes with them';

CREATE OR REPLACE FUNCTION aibilling.price_in_tier(price aibilling.price, service_tier text, factor numeric) RETURNS aibilling.price
LANGUAGE sql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
	SELECT jsonb_populate_record(price, jsonb_build_object('service_tier', price_in_tier.service_tier,
		'input', (price).input * factor, 'output', (price).output * factor, 'reasoning', (price).reasoning * factor,
		'cache_read', (price).cache_read * factor, 'cache_write', (price).cache_write * factor,
		'cache_write_1h', (price).cache_write_1h * factor,
		'units', (
			SELECT jsonb_object_agg(u.key, to_jsonb(CASE WHEN u.key LIKE '%\_tokens'
				THEN aibilling.catalogue_number(u.value) * factor ELSE aibilling.catalogue_number(u.value) END))
			FROM jsonb_each((price).units) u
			WHERE u.key NOT LIKE '%\_tokens' OR factor IS NOT NULL
		)))
$$;
COMMENT ON FUNCTION aibilling.price_in_tier(aibilling.price, text, numeric) IS
'A row of the standard tier as one of another service tier: tokens cost factor times as much (NULL: nobody knows), anything else the same';

CREATE OR REPLACE FUNCTION aibilling.set_price(
	provider text,
	model text,
	input numeric DEFAULT NULL,
	output numeric DEFAULT NULL,
	cache_read numeric DEFAULT NULL,
	cache_write numeric DEFAULT NULL,
	cache_write_1h numeric DEFAULT NULL,
	reasoning numeric DEFAULT NULL,
	request numeric DEFAULT NULL,
	web_search numeric DEFAULT NULL,
	units jsonb DEFAULT NULL,
	service_tier text DEFAULT 'standard',
	valid_from timestamptz DEFAULT NULL)
RETURNS SETOF aibilling.price
LANGUAGE plpgsql VOLATILE CALLED ON NULL INPUT PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
	given jsonb := jsonb_strip_nulls(jsonb_build_object('input', set_price.input, 'output', set_price.output,
		'cache_read', set_price.cache_read, 'cache_write', set_price.cache_write,
		'cache_write_1h', set_price.cache_write_1h, 'reasoning', set_price.reasoning,
		'request', set_price.request, 'web_search', set_price.web_search));
	given_units jsonb := coalesce(set_price.units, '{}');
	of_provider text;
	of_model text;
	tier text := lower(btrim(set_price.service_tier, E' \t\r\n'));
	factor numeric;			-- of the rule for the tier
	began timestamptz := coalesce(set_price.valid_from, now());
	entry record;
	old_rows aibilling.price[];
	known jsonb;			-- names that had a price when the change begins
	known_here jsonb;
	given_here jsonb := given;
	units_here jsonb := given_units;
	last_origin text;
	target timestamptz;
	prefix text;
	price_row aibilling.price;
	others text;
BEGIN
	IF set_price.provider IS NULL OR set_price.model IS NULL THEN
		RAISE EXCEPTION 'a price needs a provider and a model'
			USING ERRCODE = 'null_value_not_allowed';
	END IF;
	IF jsonb_typeof(given_units) <> 'object' THEN
		RAISE EXCEPTION 'units must be a JSON object'
			USING ERRCODE = 'invalid_parameter_value', HINT = 'As in {"image": 0.04}.';
	END IF;
	IF given = '{}' AND given_units = '{}' THEN
		RAISE EXCEPTION 'no price is given'
			USING ERRCODE = 'invalid_parameter_value',
				HINT = 'Give one or more of input, output, cache_read, cache_write, cache_write_1h, reasoning, request, web_search and units.';
	END IF;
	FOR entry IN SELECT * FROM jsonb_each(given || given_units) LOOP
		IF jsonb_typeof(entry.value) <> 'number' OR aibilling.catalogue_number(entry.value) < 0 THEN
			RAISE EXCEPTION 'price "%" must be a number and not negative, but is %', entry.key, entry.value #>> '{}'
				USING ERRCODE = 'invalid_parameter_value';
		END IF;
	END LOOP;
	IF began = 'infinity' THEN
		RAISE EXCEPTION 'a price cannot begin at infinity'
			USING ERRCODE = 'invalid_parameter_value';
	END IF;

	-- The names of the card: a card of another spelling would hide it.
	SELECT card_provider, card_model INTO of_provider, of_model
	FROM aibilling.priced_model(set_price.provider, set_price.model);
	IF of_model IS NULL THEN
		of_provider := btrim(set_price.provider, E' \t\r\n');
		of_model := btrim(set_price.model, E' \t\r\n');
	ELSIF (of_provider, of_model) <> (set_price.provider, set_price.model) THEN
		RAISE NOTICE 'provider "%", model "%" is priced as provider "%", model "%", whose price changes for all of its spellings',
			set_price.provider, set_price.model, of_provider, of_model;
	END IF;

	tier := CASE WHEN coalesce(tier, '') IN ('', 'default', 'auto', 'on_demand') THEN 'standard' ELSE tier END;
	SELECT coalesce(min(p.service_tier), tier) INTO tier
	FROM aibilling.price p
	WHERE (p.provider, p.model) = (of_provider, of_model) AND lower(p.service_tier) = tier;
	SELECT r.multiplier INTO factor
	FROM aibilling.service_tier_rule r
	WHERE r.provider IN (set_price.provider, of_provider, '*') AND r.service_tier = tier
	ORDER BY r.provider = '*', r.provider <> set_price.provider, r.shipped
	LIMIT 1;

	-- The card in force when the change begins, and those that would come after
	-- it: the one of source user hides them all.  The query sees what was there
	-- before anything is written.
	FOR entry IN
		SELECT m.moment, f.source, f.valid_from, f.by_rule
		FROM (
			SELECT began AS moment
			UNION
			SELECT p.valid_from FROM aibilling.price p
			WHERE (p.provider, p.model) = (of_provider, of_model) AND p.valid_from > began
				AND p.service_tier IN (tier, CASE WHEN factor IS NOT NULL THEN 'standard' END)
		) AS m
		LEFT JOIN LATERAL (
			SELECT c.source, c.valid_from, false AS by_rule
			FROM aibilling.card_in_force(of_provider, of_model, tier, m.moment) c WHERE c.source IS NOT NULL
			UNION ALL
			SELECT c.source, c.valid_from, true
			FROM aibilling.card_in_force(of_provider, of_model, 'standard', m.moment) c
			WHERE c.source IS NOT NULL AND tier <> 'standard'
			ORDER BY by_rule
			LIMIT 1
		) AS f ON true
		ORDER BY m.moment
	LOOP
		old_rows := ARRAY(
			SELECT CASE WHEN entry.by_rule THEN aibilling.price_in_tier(p, tier, factor) ELSE p END
			FROM aibilling.price p
			WHERE (p.provider, p.model, p.source, p.valid_from) = (of_provider, of_model, entry.source, entry.valid_from)
				AND p.service_tier = CASE WHEN entry.by_rule THEN 'standard' ELSE tier END
				AND (NOT entry.by_rule OR factor IS NOT NULL OR p.context_above = 0 AND p.daily_from IS NULL)
			ORDER BY p.daily_from NULLS FIRST, p.daily_to, p.context_above);
		SELECT coalesce(jsonb_object_agg(k.key, true), '{}') INTO known_here
		FROM unnest(old_rows) AS c
		CROSS JOIN LATERAL jsonb_each(jsonb_strip_nulls(to_jsonb(c) || coalesce(c.units, '{}'))) k;

		IF known IS NULL THEN
			known := known_here;
			target := CASE WHEN set_price.valid_from IS NULL AND (entry.source IS NULL OR entry.by_rule AND factor IS NULL)
				THEN '-infinity' ELSE began END;
			prefix := 'copied from ' || entry.source;
			IF cardinality(old_rows) = 0 THEN
				old_rows := ARRAY[jsonb_populate_record(NULL::aibilling.price, jsonb_build_object('provider', of_provider,
					'model', of_model, 'service_tier', tier, 'context_above', 0, 'inherit', true))];
			END IF;
		ELSE
			target := entry.moment;
			prefix := 'follows ' || entry.source;
			IF entry.source = 'user' AND NOT entry.by_rule THEN
				-- one that goes on, one that was written here, or the user's own
				CONTINUE WHEN entry.valid_from < entry.moment;
				IF coalesce(old_rows[1].note, '') NOT LIKE 'follows %' THEN
					RAISE NOTICE 'from % on, the price that you have entered for that time applies', entry.moment;
					EXIT;
				END IF;
			END IF;
			CONTINUE WHEN last_origin = format('%s %s %s', entry.by_rule, entry.source, entry.valid_from);
			-- What had a price is changed from now on; what had none gets one where
			-- there is still none.
			SELECT coalesce(jsonb_object_agg(key, value), '{}') INTO given_here
			FROM jsonb_each(given) WHERE known ? key OR NOT known_here ? key;
			SELECT coalesce(jsonb_object_agg(key, value), '{}') INTO units_here
			FROM jsonb_each(given_units) WHERE known ? key OR NOT known_here ? key;
		END IF;
		last_origin := format('%s %s %s', entry.by_rule, entry.source, entry.valid_from);

		IF EXISTS (SELECT FROM aibilling.price p WHERE (p.provider, p.model, p.service_tier, p.source, p.valid_from)
				= (of_provider, of_model, tier, 'user', target)) THEN
			DELETE FROM aibilling.price p WHERE (p.provider, p.model, p.service_tier, p.source, p.valid_from)
				= (of_provider, of_model, tier, 'user', target);
		END IF;
		FOREACH price_row IN ARRAY old_rows LOOP
			price_row := aibilling.changed_price(price_row, given_here, units_here);
			price_row.note := CASE
				WHEN entry.source <> 'user' OR entry.by_rule THEN concat_ws('; ', prefix,
					nullif(regexp_replace(price_row.note, '^(copied from|follows) [^;]*(; )?', ''), ''))
				WHEN target = began THEN regexp_replace(price_row.note, '^follows ', 'copied from ')
				ELSE price_row.note END;
			price_row.source := 'user';
			price_row.valid_from := target;
			INSERT INTO aibilling.price SELECT (price_row).*;
			RETURN NEXT price_row;
		END LOOP;
	END LOOP;

	SELECT string_agg(DISTINCT p.service_tier, ', ' ORDER BY p.service_tier) INTO others
	FROM aibilling.price p
	WHERE (p.provider, p.model) = (of_provider, of_model) AND p.service_tier <> tier;
	IF others IS NOT NULL THEN
		RAISE NOTICE 'the prices of service tier % have changed; these have prices of their own, which have not: %', tier, others;
	END IF;
END
$$;
COMMENT ON FUNCTION aibilling.set_price(text, text, numeric, numeric, numeric, numeric, numeric, numeric, numeric, numeric, jsonb, text, timestamptz) IS
'Enters prices of a model and changes nothing else: copies the card in force at valid_from (NULL: now), with its context steps and daily windows, to source user and sets what is given in each of its rows (units: key by key). Where nothing is in force it makes a card, for all time unless valid_from is given. Cards that come after valid_from are copied too: there a price that had been unknown stays as they have it. Returns the rows written. Needs INSERT on aibilling.price, and DELETE to replace a card of the same valid_from';

CREATE OR REPLACE FUNCTION aibilling.price_hint(usage regclass, id bigint) RETURNS text
LANGUAGE c STABLE STRICT AS 'MODULE_PATHNAME', 'abp_sql_price_hint';
COMMENT ON FUNCTION aibilling.price_hint(regclass, bigint) IS
'What to do about a row that lacks a price, read with the rights of the caller: the closest name, and the statement to type, as the warning of its INSERT said; NULL if it lacks none or is not there';
