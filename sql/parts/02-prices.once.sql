-- ---------------------------------------------------------------------------
-- Prices: the tables
-- ---------------------------------------------------------------------------

-- A numeric can be NaN, which is greater than any number: every CHECK on a
-- price has an upper bound.

CREATE TABLE aibilling.price (
	provider text COLLATE "C" NOT NULL,
	model text COLLATE "C" NOT NULL,
	service_tier text COLLATE "C" NOT NULL DEFAULT 'standard',
	context_above bigint NOT NULL DEFAULT 0,
	valid_from timestamptz NOT NULL DEFAULT '-infinity',
	source text COLLATE "C" NOT NULL DEFAULT 'user',
	daily_from time,
	daily_to time,
	input numeric(18,9),
	output numeric(18,9),
	cache_read numeric(18,9),
	cache_write numeric(18,9),
	cache_write_1h numeric(18,9),
	reasoning numeric(18,9),
	request numeric(18,9),
	web_search numeric(18,9),
	units jsonb,
	discount numeric(18,9),
	multiplier numeric(18,9),
	note text,
	inherit boolean NOT NULL DEFAULT true,
	CONSTRAINT price_key UNIQUE NULLS NOT DISTINCT
		(provider, model, service_tier, context_above, valid_from, source, daily_from, daily_to),
	CONSTRAINT price_service_tier_check
		CHECK (service_tier NOT IN ('', 'default', 'auto', 'on_demand')),
	CONSTRAINT price_context_above_check CHECK (context_above >= 0),
	CONSTRAINT price_window CHECK ((daily_from IS NULL) = (daily_to IS NULL) AND daily_from <> daily_to),
	CONSTRAINT price_input_check CHECK (input >= 0 AND input < 'NaN'),
	CONSTRAINT price_output_check CHECK (output >= 0 AND output < 'NaN'),
	CONSTRAINT price_cache_read_check CHECK (cache_read >= 0 AND cache_read < 'NaN'),
	CONSTRAINT price_cache_write_check CHECK (cache_write >= 0 AND cache_write < 'NaN'),
	CONSTRAINT price_cache_write_1h_check CHECK (cache_write_1h >= 0 AND cache_write_1h < 'NaN'),
	CONSTRAINT price_reasoning_check CHECK (reasoning >= 0 AND reasoning < 'NaN'),
	CONSTRAINT price_request_check CHECK (request >= 0 AND request < 'NaN'),
	CONSTRAINT price_web_search_check CHECK (web_search >= 0 AND web_search < 'NaN'),
	CONSTRAINT price_units_check CHECK (jsonb_typeof(units) = 'object' AND
		NOT jsonb_path_exists(units, 'strict $.* ? (@.type() != "number" || @ < 0 || @ >= 1000000000)')),
	CONSTRAINT price_discount_check CHECK (discount BETWEEN 0 AND 1),
	CONSTRAINT price_multiplier_check CHECK (multiplier >= 0 AND multiplier < 'NaN')
);
COMMENT ON TABLE aibilling.price IS
'What models cost, in USD. All rows of one (provider, model, service_tier, source, valid_from) are one card, replaced as a whole by a newer one. NULL is an unknown price, 0 is free';
COMMENT ON COLUMN aibilling.price.provider IS 'Provider, spelt as in usage rows';
COMMENT ON COLUMN aibilling.price.model IS 'Model, spelt as in usage rows; other spellings go into aibilling.model_alias';
COMMENT ON COLUMN aibilling.price.service_tier IS 'Tier that served: standard, batch, flex, priority ...';
COMMENT ON COLUMN aibilling.price.context_above IS
'The row applies to requests with more input_tokens than this; an inclusive threshold N is written N - 1. What it leaves NULL is as in the row with 0, unless inherit is false';
COMMENT ON COLUMN aibilling.price.valid_from IS 'The card applies to usage from this time on, until a newer card of its source does';
COMMENT ON COLUMN aibilling.price.source IS 'Who says so: user goes first, then imports by aibilling.price_source.priority';
COMMENT ON COLUMN aibilling.price.daily_from IS 'Start of a daily window, UTC, inclusive; NULL: all day. What a window leaves NULL is as all day';
COMMENT ON COLUMN aibilling.price.daily_to IS 'End of the daily window, UTC, exclusive; before daily_from: on the next day';
COMMENT ON COLUMN aibilling.price.input IS 'USD per 1,000,000 prompt tokens that no other price counts';
COMMENT ON COLUMN aibilling.price.output IS 'USD per 1,000,000 completion tokens that no other price counts';
COMMENT ON COLUMN aibilling.price.cache_read IS 'USD per 1,000,000 prompt tokens read from a cache';
COMMENT ON COLUMN aibilling.price.cache_write IS 'USD per 1,000,000 prompt tokens written to a cache (5 minutes, or the default time)';
COMMENT ON COLUMN aibilling.price.cache_write_1h IS 'USD per 1,000,000 prompt tokens written to a cache for 1 hour';
COMMENT ON COLUMN aibilling.price.reasoning IS 'USD per 1,000,000 reasoning tokens; NULL: as output';
COMMENT ON COLUMN aibilling.price.request IS 'USD a request; NULL: no fee';
COMMENT ON COLUMN aibilling.price.web_search IS 'USD a web search';
COMMENT ON COLUMN aibilling.price.units IS
'Prices of further quantities by name, as in {"image": 0.04}: USD each; USD per 1,000,000 for input_audio_tokens, input_image_tokens, cache_read_audio_tokens, output_audio_tokens, output_image_tokens, output_video_tokens and citation_tokens';
COMMENT ON COLUMN aibilling.price.discount IS 'Fraction taken off all prices of the card: 0.1 is 10 %';
COMMENT ON COLUMN aibilling.price.multiplier IS 'Factor on all prices of the card, as for a region or a margin';
COMMENT ON COLUMN aibilling.price.note IS 'Free text';
COMMENT ON COLUMN aibilling.price.inherit IS
'What the row leaves NULL: true, as in the row with context_above 0, or as all day; false, unknown';
-- Its key has columns that may be NULL, which no replica identity may.
ALTER TABLE aibilling.price REPLICA IDENTITY FULL;
SELECT pg_extension_config_dump('aibilling.price', '');

CREATE TABLE aibilling.price_source (
	source text COLLATE "C" PRIMARY KEY,
	priority integer NOT NULL DEFAULT 100,
	note text
);
COMMENT ON TABLE aibilling.price_source IS
'Which source of prices goes before which. Prices of source user go before all, sources without a row here behind all';
COMMENT ON COLUMN aibilling.price_source.source IS 'As in aibilling.price.source';
COMMENT ON COLUMN aibilling.price_source.priority IS 'Lower goes first';
COMMENT ON COLUMN aibilling.price_source.note IS 'Free text';
SELECT pg_extension_config_dump('aibilling.price_source', '');

-- The shipped rules are not dumped, since CREATE EXTENSION brings them.  What
-- is "shipped" follows from the values, so that a rule someone changed is
-- dumped, and restores beside the shipped one without a collision.  By a trigger:
-- a table that is published cannot have a generated column in its key.
CREATE TABLE aibilling.service_tier_rule (
	provider text COLLATE "C" NOT NULL DEFAULT '*',
	service_tier text COLLATE "C" NOT NULL,
	multiplier numeric(18,9),
	note text,
	shipped boolean NOT NULL DEFAULT false,
	PRIMARY KEY (provider, service_tier, shipped),
	CONSTRAINT service_tier_rule_service_tier_check
		CHECK (service_tier NOT IN ('', 'default', 'auto', 'on_demand', 'standard')),
	CONSTRAINT service_tier_rule_multiplier_check CHECK (multiplier >= 0 AND multiplier < 'NaN')
);
COMMENT ON TABLE aibilling.service_tier_rule IS
'What a service tier costs for which no price is in force: the standard price times a multiplier, for tokens only. A rule of the provider goes before one of *, your own before a shipped one';
COMMENT ON COLUMN aibilling.service_tier_rule.provider IS 'Provider, or * for any';
COMMENT ON COLUMN aibilling.service_tier_rule.service_tier IS 'Tier that served';
COMMENT ON COLUMN aibilling.service_tier_rule.multiplier IS
'Factor on the standard price of tokens; NULL: no rule, such usage is unpriced (deleting a shipped rule does not outlast dump and restore)';
COMMENT ON COLUMN aibilling.service_tier_rule.note IS 'Free text';
COMMENT ON COLUMN aibilling.service_tier_rule.shipped IS 'Is this a rule that comes with the extension?';
SELECT pg_extension_config_dump('aibilling.service_tier_rule', 'WHERE NOT shipped');
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

INSERT INTO aibilling.service_tier_rule (provider, service_tier, multiplier, note) VALUES
	('*', 'batch', 0.5, 'half price, as providers with a batch interface have it'),
	('*', 'flex', 0.5, 'half price, as providers with a flex tier have it');

CREATE TABLE aibilling.model_alias (
	provider text COLLATE "C" NOT NULL DEFAULT '*',
	kind text COLLATE "C" NOT NULL DEFAULT 'exact',
	pattern text COLLATE "C" NOT NULL,
	to_provider text COLLATE "C" NOT NULL,
	to_model text COLLATE "C" NOT NULL,
	priority integer NOT NULL DEFAULT 0,
	source text COLLATE "C" NOT NULL DEFAULT 'user',
	PRIMARY KEY (provider, kind, pattern, source),
	CONSTRAINT model_alias_kind_check CHECK (kind IN ('exact', 'glob'))
);
COMMENT ON TABLE aibilling.model_alias IS
'Other spellings of a model. Tried in this order, until one leads to a price: the model as spelt, exact aliases, the model without a leading "provider/", globs';
COMMENT ON COLUMN aibilling.model_alias.provider IS 'Provider in the usage row, or * for any';
COMMENT ON COLUMN aibilling.model_alias.kind IS 'exact, or glob: * stands for any characters, ? for one';
COMMENT ON COLUMN aibilling.model_alias.pattern IS 'Model in the usage row';
COMMENT ON COLUMN aibilling.model_alias.to_provider IS 'Provider in aibilling.price';
COMMENT ON COLUMN aibilling.model_alias.to_model IS 'Model in aibilling.price';
COMMENT ON COLUMN aibilling.model_alias.priority IS 'Higher goes first; among equals the glob with the longest literal part';
COMMENT ON COLUMN aibilling.model_alias.source IS 'Who says so, as in aibilling.price.source';
SELECT pg_extension_config_dump('aibilling.model_alias', '');

CREATE TABLE aibilling.price_quarantine (
	provider text COLLATE "C" NOT NULL,
	model text COLLATE "C" NOT NULL,
	service_tier text COLLATE "C" NOT NULL,
	context_above bigint NOT NULL,
	valid_from timestamptz NOT NULL,
	source text COLLATE "C" NOT NULL,
	daily_from time,
	daily_to time,
	input numeric,
	output numeric,
	cache_read numeric,
	cache_write numeric,
	cache_write_1h numeric,
	reasoning numeric,
	request numeric,
	web_search numeric,
	units jsonb,
	discount numeric,
	multiplier numeric,
	reason text NOT NULL,
	quarantined_at timestamptz NOT NULL DEFAULT now(),
	inherit boolean NOT NULL DEFAULT true,
	note text,
	CONSTRAINT price_quarantine_key UNIQUE NULLS NOT DISTINCT
		(provider, model, service_tier, context_above, valid_from, source, daily_from, daily_to)
);
COMMENT ON TABLE aibilling.price_quarantine IS
'cards that import_prices found suspicious and did not apply; release_price applies one, DELETE forgets it';
COMMENT ON COLUMN aibilling.price_quarantine.provider IS 'As aibilling.price.provider';
COMMENT ON COLUMN aibilling.price_quarantine.model IS 'As aibilling.price.model';
COMMENT ON COLUMN aibilling.price_quarantine.service_tier IS 'As aibilling.price.service_tier';
COMMENT ON COLUMN aibilling.price_quarantine.context_above IS 'As aibilling.price.context_above';
COMMENT ON COLUMN aibilling.price_quarantine.valid_from IS 'As aibilling.price.valid_from';
COMMENT ON COLUMN aibilling.price_quarantine.source IS 'As aibilling.price.source';
COMMENT ON COLUMN aibilling.price_quarantine.daily_from IS 'As aibilling.price.daily_from';
COMMENT ON COLUMN aibilling.price_quarantine.daily_to IS 'As aibilling.price.daily_to';
COMMENT ON COLUMN aibilling.price_quarantine.input IS 'As aibilling.price.input';
COMMENT ON COLUMN aibilling.price_quarantine.output IS 'As aibilling.price.output';
COMMENT ON COLUMN aibilling.price_quarantine.cache_read IS 'As aibilling.price.cache_read';
COMMENT ON COLUMN aibilling.price_quarantine.cache_write IS 'As aibilling.price.cache_write';
COMMENT ON COLUMN aibilling.price_quarantine.cache_write_1h IS 'As aibilling.price.cache_write_1h';
COMMENT ON COLUMN aibilling.price_quarantine.reasoning IS 'As aibilling.price.reasoning';
COMMENT ON COLUMN aibilling.price_quarantine.request IS 'As aibilling.price.request';
COMMENT ON COLUMN aibilling.price_quarantine.web_search IS 'As aibilling.price.web_search';
COMMENT ON COLUMN aibilling.price_quarantine.units IS 'As aibilling.price.units';
COMMENT ON COLUMN aibilling.price_quarantine.discount IS 'As aibilling.price.discount';
COMMENT ON COLUMN aibilling.price_quarantine.multiplier IS 'As aibilling.price.multiplier';
COMMENT ON COLUMN aibilling.price_quarantine.reason IS 'which of the checks the card failed, with the figures';
COMMENT ON COLUMN aibilling.price_quarantine.quarantined_at IS
'Since when a card of this model and service tier is held back, whatever further imports found';
COMMENT ON COLUMN aibilling.price_quarantine.inherit IS 'As aibilling.price.inherit';
COMMENT ON COLUMN aibilling.price_quarantine.note IS 'As aibilling.price.note';
ALTER TABLE aibilling.price_quarantine REPLICA IDENTITY FULL;
SELECT pg_extension_config_dump('aibilling.price_quarantine', '');

-- Whoever has cached prices is told when they change.  Logical replication
-- fires no statement triggers, so rows that it brings have a trigger too.
CREATE FUNCTION aibilling.price_changed()
RETURNS trigger
AS 'MODULE_PATHNAME', 'abp_sql_price_changed'
LANGUAGE C VOLATILE CALLED ON NULL INPUT PARALLEL UNSAFE;
COMMENT ON FUNCTION aibilling.price_changed() IS
'Trigger: prices that sessions have cached are read again once this transaction commits';

CREATE TRIGGER price_changed
	AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON aibilling.price
	FOR EACH STATEMENT EXECUTE FUNCTION aibilling.price_changed();
ALTER TABLE aibilling.price ENABLE ALWAYS TRIGGER price_changed;
COMMENT ON TRIGGER price_changed ON aibilling.price IS 'Has cached prices read again';
CREATE TRIGGER price_replicated
	AFTER INSERT OR UPDATE OR DELETE ON aibilling.price
	FOR EACH ROW EXECUTE FUNCTION aibilling.price_changed();
ALTER TABLE aibilling.price ENABLE REPLICA TRIGGER price_replicated;
COMMENT ON TRIGGER price_replicated ON aibilling.price IS
'Has cached prices read again when logical replication brings a change';

CREATE TRIGGER price_changed
	AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON aibilling.price_source
	FOR EACH STATEMENT EXECUTE FUNCTION aibilling.price_changed();
ALTER TABLE aibilling.price_source ENABLE ALWAYS TRIGGER price_changed;
COMMENT ON TRIGGER price_changed ON aibilling.price_source IS 'Has cached prices read again';
CREATE TRIGGER price_replicated
	AFTER INSERT OR UPDATE OR DELETE ON aibilling.price_source
	FOR EACH ROW EXECUTE FUNCTION aibilling.price_changed();
ALTER TABLE aibilling.price_source ENABLE REPLICA TRIGGER price_replicated;
COMMENT ON TRIGGER price_replicated ON aibilling.price_source IS
'Has cached prices read again when logical replication brings a change';

CREATE TRIGGER price_changed
	AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON aibilling.service_tier_rule
	FOR EACH STATEMENT EXECUTE FUNCTION aibilling.price_changed();
ALTER TABLE aibilling.service_tier_rule ENABLE ALWAYS TRIGGER price_changed;
COMMENT ON TRIGGER price_changed ON aibilling.service_tier_rule IS 'Has cached prices read again';
CREATE TRIGGER price_replicated
	AFTER INSERT OR UPDATE OR DELETE ON aibilling.service_tier_rule
	FOR EACH ROW EXECUTE FUNCTION aibilling.price_changed();
ALTER TABLE aibilling.service_tier_rule ENABLE REPLICA TRIGGER price_replicated;
COMMENT ON TRIGGER price_replicated ON aibilling.service_tier_rule IS
'Has cached prices read again when logical replication brings a change';

CREATE TRIGGER price_changed
	AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON aibilling.model_alias
	FOR EACH STATEMENT EXECUTE FUNCTION aibilling.price_changed();
ALTER TABLE aibilling.model_alias ENABLE ALWAYS TRIGGER price_changed;
COMMENT ON TRIGGER price_changed ON aibilling.model_alias IS 'Has cached prices read again';
CREATE TRIGGER price_replicated
	AFTER INSERT OR UPDATE OR DELETE ON aibilling.model_alias
	FOR EACH ROW EXECUTE FUNCTION aibilling.price_changed();
ALTER TABLE aibilling.model_alias ENABLE REPLICA TRIGGER price_replicated;
COMMENT ON TRIGGER price_replicated ON aibilling.model_alias IS
'Has cached prices read again when logical replication brings a change';

-- What importers pass to each other.

CREATE TYPE aibilling.catalogue_price AS (
	provider text,
	model text,
	service_tier text,
	context_above bigint,
	valid_from timestamptz,
	daily_from time,
	daily_to time,
	price_column text,
	price numeric,
	problem text
);
COMMENT ON TYPE aibilling.catalogue_price IS
'one price of a catalogue, in the units of aibilling.price; price_column is a column of that table or units.KEY, or inherit with the price 0: what this row leaves out is unknown; valid_from NULL means that the catalogue gives no date; price NULL means that it cannot be used, for the reason in problem; problem beside a price is a remark';

CREATE TYPE aibilling.price_card AS (
	provider text,
	model text,
	service_tier text,
	given_from timestamptz,
	stored_from timestamptz,
	valid_from timestamptz,
	reason text
);
COMMENT ON TYPE aibilling.price_card IS
'a card of a catalogue that differs from what is stored: the catalogue''s own date (NULL: none), the stored card it is compared with (NULL: none), the date it is stored under, and why it is quarantined (NULL: it is not)';

CREATE TYPE aibilling.price_change AS (
	action text,
	provider text,
	model text,
	service_tier text,
	context_above bigint,
	valid_from timestamptz,
	daily_from time,
	daily_to time,
	price_column text,
	old_price numeric,
	new_price numeric,
	reason text
);
COMMENT ON TYPE aibilling.price_change IS
'what import_prices does with one price: added, changed, removed (the new card has no such price any more), quarantined (reason says why the whole card was held back) or skipped (reason says why the price cannot be used)';
