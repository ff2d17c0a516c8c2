-- ---------------------------------------------------------------------------
-- Other people's tables: rows of a table that exists become usage rows
-- ---------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION aibilling.owns(source regclass) RETURNS boolean
LANGUAGE sql STABLE PARALLEL SAFE
RETURN EXISTS (SELECT FROM pg_class c WHERE c.oid = owns.source AND pg_has_role(current_user, c.relowner, 'USAGE'));
COMMENT ON FUNCTION aibilling.owns(regclass) IS 'Whether the caller has the rights of a table''s owner';

-- Private tables, as pg_dump wants them; people see and change their own rows through the views.
CREATE TABLE aibilling.capture_definition (
	source regclass NOT NULL,
	usage regclass NOT NULL,
	prefix text COLLATE "C" NOT NULL,
	columns jsonb NOT NULL,
	preset text,
	only_when text NOT NULL,
	replicated boolean NOT NULL,
	function_name text NOT NULL,
	key_columns text[] NOT NULL,
	key text NOT NULL,
	targets text NOT NULL,
	expressions text NOT NULL,
	changes text NOT NULL,
	on_conflict text NOT NULL,
	captured_at timestamptz NOT NULL DEFAULT now(),
	released_at timestamptz,
	PRIMARY KEY (source, usage)
);
COMMENT ON TABLE aibilling.capture_definition IS 'Private: which tables'' rows become usage rows, and how; see aibilling.captures';
COMMENT ON COLUMN aibilling.capture_definition.source IS 'As aibilling.captures.source';
COMMENT ON COLUMN aibilling.capture_definition.usage IS 'As aibilling.captures.usage';
COMMENT ON COLUMN aibilling.capture_definition.prefix IS 'As aibilling.captures.prefix';
COMMENT ON COLUMN aibilling.capture_definition.columns IS 'As aibilling.captures.columns';
COMMENT ON COLUMN aibilling.capture_definition.preset IS 'As aibilling.captures.preset';
COMMENT ON COLUMN aibilling.capture_definition.only_when IS 'As aibilling.captures.only_when';
COMMENT ON COLUMN aibilling.capture_definition.replicated IS 'As aibilling.captures.replicated';
COMMENT ON COLUMN aibilling.capture_definition.function_name IS 'As aibilling.captures.function_name';
COMMENT ON COLUMN aibilling.capture_definition.key_columns IS 'As aibilling.captures.key_columns';
COMMENT ON COLUMN aibilling.capture_definition.key IS 'As aibilling.captures.key';
COMMENT ON COLUMN aibilling.capture_definition.targets IS 'As aibilling.captures.targets';
COMMENT ON COLUMN aibilling.capture_definition.expressions IS 'As aibilling.captures.expressions';
COMMENT ON COLUMN aibilling.capture_definition.changes IS 'As aibilling.captures.changes';
COMMENT ON COLUMN aibilling.capture_definition.on_conflict IS 'As aibilling.captures.on_conflict';
COMMENT ON COLUMN aibilling.capture_definition.captured_at IS 'As aibilling.captures.captured_at';
COMMENT ON COLUMN aibilling.capture_definition.released_at IS 'As aibilling.captures.released_at';

CREATE OR REPLACE VIEW aibilling.captures WITH (security_barrier) AS
SELECT * FROM aibilling.capture_definition d WHERE aibilling.owns(d.source)
WITH LOCAL CHECK OPTION;
COMMENT ON VIEW aibilling.captures IS
'A row per pair of tables that aibilling.capture() was called for: source, usage table and mapping. Owners of the source see and change their own';
COMMENT ON COLUMN aibilling.captures.source IS 'The table whose rows are captured';
COMMENT ON COLUMN aibilling.captures.usage IS 'The usage table that they go to';
COMMENT ON COLUMN aibilling.captures.prefix IS
'What every external_id begins with, so that two databases'' rows of one key are two; it stays when the capture is released';
COMMENT ON COLUMN aibilling.captures.columns IS 'The mapping as it was given';
COMMENT ON COLUMN aibilling.captures.preset IS 'The preset, NULL: none';
COMMENT ON COLUMN aibilling.captures.only_when IS 'The condition under which a row is complete, the preset''s included';
COMMENT ON COLUMN aibilling.captures.replicated IS 'Whether a subscription feeds the source';
COMMENT ON COLUMN aibilling.captures.function_name IS 'The trigger function, and the first part of its triggers'' names';
COMMENT ON COLUMN aibilling.captures.key_columns IS 'Columns of the source''s key';
COMMENT ON COLUMN aibilling.captures.key IS 'An expression for the key as text';
COMMENT ON COLUMN aibilling.captures.targets IS 'Columns of the usage table that are filled';
COMMENT ON COLUMN aibilling.captures.expressions IS 'What they are filled with';
COMMENT ON COLUMN aibilling.captures.changes IS 'Whether a mapped row (m) differs from the usage row (u) that it became';
COMMENT ON COLUMN aibilling.captures.on_conflict IS 'The columns that are unique with external_id; '''': none are';
COMMENT ON COLUMN aibilling.captures.captured_at IS 'When it was captured last';
COMMENT ON COLUMN aibilling.captures.released_at IS 'When it was released; NULL: it is captured';
SELECT pg_extension_config_dump('aibilling.capture_definition', '');

CREATE TABLE aibilling.capture_error (
	source regclass NOT NULL,
	usage regclass NOT NULL,
	key text NOT NULL,
	"row" jsonb,
	error text NOT NULL,
	at timestamptz NOT NULL DEFAULT now(),
	PRIMARY KEY (source, usage, key)
);
COMMENT ON TABLE aibilling.capture_error IS 'Private: rows that could not be captured; see aibilling.capture_failure';
COMMENT ON COLUMN aibilling.capture_error.source IS 'As aibilling.capture_failure.source';
COMMENT ON COLUMN aibilling.capture_error.usage IS 'As aibilling.capture_failure.usage';
COMMENT ON COLUMN aibilling.capture_error.key IS 'As aibilling.capture_failure.key';
COMMENT ON COLUMN aibilling.capture_error."row" IS 'As aibilling.capture_failure.row';
COMMENT ON COLUMN aibilling.capture_error.error IS 'As aibilling.capture_failure.error';
COMMENT ON COLUMN aibilling.capture_error.at IS 'As aibilling.capture_failure.at';

CREATE OR REPLACE VIEW aibilling.capture_failure WITH (security_barrier) AS
SELECT e.source, e.usage, e.key, e."row", e.error, e.at FROM aibilling.capture_error e WHERE aibilling.owns(e.source)
WITH LOCAL CHECK OPTION;
COMMENT ON VIEW aibilling.capture_failure IS
'Rows of captured tables that did not become usage rows, or have changed after they did (error: changed after capture). Tried again by aibilling.capture_retry(); deleted by the owner of the source, who sees their own, when they are dealt with';
COMMENT ON COLUMN aibilling.capture_failure.source IS 'The table of the row';
COMMENT ON COLUMN aibilling.capture_failure.usage IS 'The usage table that it was to go to';
COMMENT ON COLUMN aibilling.capture_failure.key IS 'Its key, as text';
COMMENT ON COLUMN aibilling.capture_failure."row" IS 'The row; NULL: it cannot be had as jsonb, and is read from its table when it is tried again';
COMMENT ON COLUMN aibilling.capture_failure.error IS 'What went wrong';
COMMENT ON COLUMN aibilling.capture_failure.at IS 'When';
SELECT pg_extension_config_dump('aibilling.capture_error', '');

CREATE OR REPLACE FUNCTION aibilling.check_expression(source regclass, expression text, type regtype) RETURNS void
LANGUAGE c STABLE STRICT AS 'MODULE_PATHNAME', 'abp_sql_check_expression';
COMMENT ON FUNCTION aibilling.check_expression(regclass, text, regtype) IS
'Raises an error unless the text is one SQL expression over a row of the table that can be cast to the type';

CREATE OR REPLACE FUNCTION aibilling.closest_word(word text, words text[]) RETURNS text
LANGUAGE c IMMUTABLE STRICT AS 'MODULE_PATHNAME', 'abp_sql_closest_word';
COMMENT ON FUNCTION aibilling.closest_word(text, text[]) IS 'The word among those that was likely meant; NULL: none';

CREATE OR REPLACE FUNCTION aibilling.provider_of_model(model text) RETURNS text
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
RETURN CASE
	WHEN model ~* '^(gpt|chatgpt|o[1-9]|text-embedding-|dall-e|whisper|tts-|codex)' THEN 'openai'
	WHEN model ~* '^claude' THEN 'anthropic'
	WHEN model ~* '^(gemini|gemma|imagen|veo)' THEN 'google'
	WHEN model ~* '^(mistral|ministral|codestral|magistral|pixtral|devstral|open-mi[sx]tral)' THEN 'mistral'
	WHEN model ~* '^deepseek' THEN 'deepseek'
	WHEN model ~* '^grok' THEN 'xai'
	WHEN model ~* '^(command|c4ai|rerank|embed-)' THEN 'cohere'
	WHEN model ~* '^sonar' THEN 'perplexity'
	WHEN model ~ '^[^/]+/' THEN split_part(model, '/', 1)
END;
COMMENT ON FUNCTION aibilling.provider_of_model(text) IS
'The provider that a model''s name tells, for tables that have no column of it; NULL: it does not tell';

-- What the presets map; a column that a version of the other software does not have is left out.
CREATE OR REPLACE FUNCTION aibilling.capture_preset(preset text, source regclass)
RETURNS TABLE (target text, expression text)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
	has jsonb := (SELECT jsonb_object_agg(a.attname, true) FROM pg_attribute a
		WHERE a.attrelid = source AND a.attnum > 0 AND NOT a.attisdropped);
	needed text[] := CASE preset
		WHEN 'litellm' THEN '{request_id,startTime,model,prompt_tokens,completion_tokens,metadata,spend}'::text[]
		WHEN 'langfuse' THEN '{id,trace_id,type,start_time,end_time,model,prompt_tokens,completion_tokens,unit}'::text[]
		WHEN 'open_webui' THEN '{id,role,done,user_id,model_id,usage,created_at}'::text[]
		END;
	missing text;
	schema name;
	alias text;
	object text;
	traces text;
BEGIN
	IF needed IS NULL THEN
		RAISE EXCEPTION 'unknown preset "%"', preset
			USING ERRCODE = 'invalid_parameter_value',
				HINT = coalesce(format('Perhaps you meant "%s". ', aibilling.closest_word(preset, '{litellm,langfuse,open_webui}')), '')
					|| 'Presets are litellm, langfuse and open_webui.';
	END IF;
	SELECT string_agg(format('"%s"', n), ', ') INTO missing FROM unnest(needed) n WHERE NOT has ? n;
	IF missing IS NOT NULL THEN
		RAISE EXCEPTION 'preset "%" is not for table %', preset, source
			USING ERRCODE = 'undefined_column', DETAIL = format('It lacks %s.', missing),
				HINT = CASE preset WHEN 'litellm' THEN 'It is for LiteLLM''s table "LiteLLM_SpendLogs".'
					WHEN 'langfuse' THEN 'It is for the table "observations" of Langfuse 2.'
					ELSE 'It is for the table "chat_message" of Open WebUI.' END;
	END IF;
	SELECT n.nspname, quote_ident(c.relname) INTO schema, alias
	FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = source;

	CASE preset
	WHEN 'litellm' THEN
		object := $x$coalesce(metadata->'usage_object', metadata->'additional_usage_values')$x$;
		RETURN QUERY
		SELECT v.target, v.expression FROM (VALUES
			('only_when', concat_ws(' AND ', 'true',
				CASE WHEN has ? 'status' THEN 'status IS DISTINCT FROM ''failure''' END,
				CASE WHEN has ? 'cache_hit' THEN 'cache_hit IS DISTINCT FROM ''True''' END)),
			('occurred_at', '"startTime" AT TIME ZONE ''UTC'''),
			('external_customer_id', format('coalesce(%s)', concat_ws(', ',
				CASE WHEN has ? 'end_user' THEN 'nullif(end_user, '''')' END,
				CASE WHEN has ? 'user' THEN 'nullif("user", '''')' END,
				CASE WHEN has ? 'team_id' THEN 'nullif(team_id, '''')' END,
				CASE WHEN has ? 'organization_id' THEN 'nullif(organization_id, '''')' END, 'NULL'))),
			('provider', CASE WHEN has ? 'custom_llm_provider'
				THEN 'coalesce(nullif(custom_llm_provider, ''''), aibilling.provider_of_model(model))'
				ELSE 'aibilling.provider_of_model(model)' END),
			('model', 'nullif(model, '''')'),
			('generation_id', 'request_id'),
			-- with both kinds of cached tokens in it; some versions have left them out
			('input_tokens', format('greatest(prompt_tokens, coalesce((%1$s #>> ''{prompt_tokens_details,cached_tokens}'')::bigint, (%1$s ->> ''cache_read_input_tokens'')::bigint, 0)
		+ coalesce((%1$s #>> ''{prompt_tokens_details,cache_creation_tokens}'')::bigint, (%1$s ->> ''cache_creation_input_tokens'')::bigint, 0))', object)),
			('cache_read_tokens', format('coalesce((%1$s #>> ''{prompt_tokens_details,cached_tokens}'')::bigint, (%1$s ->> ''cache_read_input_tokens'')::bigint)', object)),
			('cache_write_tokens', format('coalesce((%1$s #>> ''{prompt_tokens_details,cache_creation_tokens}'')::bigint, (%1$s ->> ''cache_creation_input_tokens'')::bigint)
		- coalesce((%1$s #>> ''{prompt_tokens_details,cache_creation_token_details,ephemeral_1h_input_tokens}'')::bigint, (%1$s #>> ''{cache_creation_token_details,ephemeral_1h_input_tokens}'')::bigint, 0)', object)),
			('cache_write_1h_tokens', format('coalesce((%1$s #>> ''{prompt_tokens_details,cache_creation_token_details,ephemeral_1h_input_tokens}'')::bigint, (%1$s #>> ''{cache_creation_token_details,ephemeral_1h_input_tokens}'')::bigint)', object)),
			('output_tokens', 'completion_tokens'),
			('reasoning_tokens', format('(%s #>> ''{completion_tokens_details,reasoning_tokens}'')::bigint', object)),
			('web_search_count', format('(%s #>> ''{server_tool_use,web_search_requests}'')::bigint', object)),
			-- 0 is what LiteLLM has where it knows no price
			('provider_cost', 'nullif(spend::numeric, 0)')
		) AS v (target, expression);
	WHEN 'langfuse' THEN
		SELECT format('(SELECT t.user_id FROM %s t WHERE t.id = %s.trace_id)', c.oid::regclass, alias) INTO traces
		FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
		WHERE n.nspname = schema AND c.relname = 'traces';
		RETURN QUERY
		SELECT v.target, v.expression FROM (VALUES
			('only_when', 'type = ''GENERATION'' AND coalesce(unit, ''TOKENS'') = ''TOKENS'' AND end_time IS NOT NULL'),
			('occurred_at', 'start_time AT TIME ZONE ''UTC'''),
			('external_customer_id', traces),
			('provider', 'aibilling.provider_of_model(model)'),
			('model', 'model'),
			('generation_id', 'id'),
			('input_tokens', 'prompt_tokens'),
			('output_tokens', 'completion_tokens'),
			('provider_cost', CASE WHEN has ?& '{total_cost,calculated_total_cost}'::text[]
				THEN 'nullif(coalesce(total_cost, calculated_total_cost), 0)' END),
			('tags', format('jsonb_strip_nulls(jsonb_build_object(%s))', concat_ws(', ', '''trace_id'', trace_id',
				CASE WHEN has ? 'project_id' THEN '''project_id'', project_id' END)))
		) AS v (target, expression)
		WHERE v.expression IS NOT NULL;
	ELSE
		RETURN QUERY
		SELECT v.target, v.expression FROM (VALUES
			('only_when', 'role = ''assistant'' AND done AND json_typeof(usage::json) = ''object'''),
			('occurred_at', 'to_timestamp(created_at / CASE WHEN created_at > 10000000000 THEN 1000.0 ELSE 1 END)'),
			('external_customer_id', 'user_id'),
			('provider', 'CASE WHEN model_id LIKE ''openrouter.%'' THEN ''openrouter'' ELSE aibilling.provider_of_model(model_id) END'),
			('model', 'regexp_replace(model_id, ''^openrouter\.'', '''')'),
			('generation_id', 'id'),
			('input_tokens', 'coalesce(usage ->> ''input_tokens'', usage ->> ''prompt_tokens'', usage ->> ''prompt_eval_count'', usage ->> ''prompt_n'')'),
			('cache_read_tokens', 'usage #>> ''{prompt_tokens_details,cached_tokens}'''),
			('output_tokens', 'coalesce(usage ->> ''output_tokens'', usage ->> ''completion_tokens'', usage ->> ''eval_count'', usage ->> ''predicted_n'')'),
			('reasoning_tokens', 'usage #>> ''{completion_tokens_details,reasoning_tokens}'''),
			('provider_cost', 'nullif((usage ->> ''cost'')::numeric, 0)'),
			('tags', CASE WHEN has ? 'chat_id' THEN 'jsonb_strip_nulls(jsonb_build_object(''chat_id'', chat_id))' END)
		) AS v (target, expression)
		WHERE v.expression IS NOT NULL;
	END CASE;
END
$$;
COMMENT ON FUNCTION aibilling.capture_preset(text, regclass) IS
'What a preset maps to the columns of a usage table, and as only_when the condition under which a row is complete. Raises undefined_column where the table is another one than it is for';

-- By their names: well-known ones first, as people have them.
CREATE OR REPLACE FUNCTION aibilling.capture_by_name(source regclass)
RETURNS TABLE (target text, expression text)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
BEGIN
	RETURN QUERY
	SELECT DISTINCT ON (n.target) n.target,
		CASE
			WHEN n.target = 'occurred_at' AND a.atttypid = 'timestamp'::regtype THEN format('%I AT TIME ZONE ''UTC''', a.attname)
			WHEN n.target = 'occurred_at' AND a.atttypid IN ('bigint'::regtype, 'integer'::regtype)
				THEN format('to_timestamp(%1$I / CASE WHEN %1$I > 10000000000 THEN 1000.0 ELSE 1 END)', a.attname)
			ELSE quote_ident(a.attname)
		END
	FROM (VALUES
		('occurred_at', '{occurred_at,created_at,createdAt,timestamp,start_time,startTime,time,ts,inserted_at,date}'::text[]),
		('external_customer_id', '{external_customer_id,externalCustomerId,customer_external_id,customer_id,customerId,user_id,userId,tenant_id,tenantId,account_id,accountId,organization_id,organizationId,org_id,end_user}'),
		('provider', '{provider,model_provider,modelProvider,llm_provider,vendor}'),
		('model', '{model,model_id,modelId,model_name,modelName}'),
		('generation_id', '{generation_id,generationId,response_id,responseId,request_id,requestId,completion_id}'),
		('input_tokens', '{input_tokens,inputTokens,prompt_tokens,promptTokens,tokens_in,input_token_count}'),
		('cache_read_tokens', '{cache_read_tokens,cacheReadTokens,cached_tokens,cachedTokens,cached_input_tokens,cachedInputTokens}'),
		('cache_write_tokens', '{cache_write_tokens,cacheWriteTokens}'),
		('cache_write_1h_tokens', '{cache_write_1h_tokens}'),
		('output_tokens', '{output_tokens,outputTokens,completion_tokens,completionTokens,tokens_out,output_token_count}'),
		('reasoning_tokens', '{reasoning_tokens,reasoningTokens}'),
		('request_count', '{request_count}'), ('web_search_count', '{web_search_count}'),
		('service_tier', '{service_tier,serviceTier}'), ('sub_provider', '{sub_provider}'),
		('external_member_id', '{external_member_id}'),
		('units', '{units}'), ('raw_usage', '{raw_usage}'), ('usage_format', '{usage_format}'), ('tags', '{tags}')
	) AS n (target, names)
	CROSS JOIN LATERAL unnest(n.names) WITH ORDINALITY AS w (name, rank)
	JOIN pg_attribute a ON a.attrelid = source AND a.attname = w.name AND a.attnum > 0 AND NOT a.attisdropped
	WHERE n.target NOT IN ('tags', 'units', 'raw_usage') OR a.atttypid IN ('json'::regtype, 'jsonb'::regtype)
	ORDER BY n.target, w.rank;
END
$$;
COMMENT ON FUNCTION aibilling.capture_by_name(regclass) IS
'What the columns of a table say by their names, for the columns of a usage table; its id and costs never';

CREATE OR REPLACE FUNCTION aibilling.capture_plan(source regclass, usage regclass, columns jsonb, preset text, only_when text, replicated boolean)
RETURNS aibilling.captures
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
SET timezone = 'UTC'
AS $$
#variable_conflict use_variable
DECLARE
	plan aibilling.captures;
	relation pg_class;
	known aibilling.captures;
	m record;
	word text;
	hint text;
	given jsonb := coalesce(columns, '{}');
	mapped jsonb := '{}';
	conditions text[] := '{}';
	problem text;
	has_raw boolean;
BEGIN
	SELECT c.* INTO relation FROM pg_class c WHERE c.oid = source;
	IF source IS NULL OR relation.oid IS NULL OR usage IS NULL THEN
		RAISE EXCEPTION 'source and usage table must be given' USING ERRCODE = 'null_value_not_allowed';
	ELSIF relation.relkind NOT IN ('r', 'p') OR relation.relpersistence = 't' THEN
		RAISE EXCEPTION '% is not a table that can be captured', source
			USING ERRCODE = 'wrong_object_type', HINT = 'Views, foreign and temporary tables have no triggers of this kind: capture the tables below.';
	ELSIF relation.relispartition THEN
		RAISE EXCEPTION '% is a partition', source
			USING ERRCODE = 'wrong_object_type', HINT = 'Capture the partitioned table.';
	ELSIF source = usage THEN
		RAISE EXCEPTION '% is the usage table itself', source USING ERRCODE = 'invalid_parameter_value';
	ELSIF NOT aibilling.owns(source) OR NOT aibilling.owns(usage) THEN
		RAISE EXCEPTION 'must be owner of table %', CASE WHEN aibilling.owns(source) THEN usage ELSE source END
			USING ERRCODE = 'insufficient_privilege', DETAIL = 'The trigger that captures rows acts for the owner of both tables.';
	ELSIF NOT EXISTS (SELECT FROM pg_class c WHERE c.oid = usage AND pg_has_role(relation.relowner, c.relowner, 'USAGE')) THEN
		RAISE EXCEPTION 'tables % and % belong to different roles', source, usage
			USING ERRCODE = 'insufficient_privilege', DETAIL = 'The trigger that captures rows acts for the owner of both tables.';
	ELSIF NOT EXISTS (SELECT FROM aibilling.usage_table t WHERE t.usage = capture_plan.usage) THEN
		RAISE EXCEPTION 'table % is not attached', usage
			USING ERRCODE = 'object_not_in_prerequisite_state', HINT = format('Attach it with SELECT aibilling.attach(%L, server => ''...'').', usage);
	ELSIF replicated AND NOT EXISTS (SELECT FROM aibilling.usage_table t WHERE t.usage = capture_plan.usage AND t.replicated) THEN
		RAISE EXCEPTION 'the triggers of usage table % do not fire for what a subscription brings', usage
			USING ERRCODE = 'object_not_in_prerequisite_state',
				HINT = format('Attach it again with SELECT aibilling.attach(%L, server => ''...'', replicated => true).', usage);
	ELSIF jsonb_typeof(given) <> 'object' THEN
		RAISE EXCEPTION 'columns must be a JSON object that maps columns of the usage table to SQL expressions'
			USING ERRCODE = 'invalid_parameter_value';
	END IF;
	SELECT c.* INTO known FROM aibilling.captures c WHERE c.source = capture_plan.source AND c.usage = capture_plan.usage;
	IF known.source IS NOT NULL AND known.released_at IS NULL THEN
		RAISE EXCEPTION 'rows of % are captured for % already', source, usage
			USING ERRCODE = 'duplicate_object', HINT = format('Release them first with SELECT aibilling.release(%L, %L).', source, usage);
	END IF;
	IF EXISTS (
		WITH RECURSIVE fed (source, usage) AS (
			SELECT c.source, c.usage FROM aibilling.captures c WHERE c.source = capture_plan.usage AND c.released_at IS NULL
			UNION SELECT c.source, c.usage FROM aibilling.captures c JOIN fed ON c.source = fed.usage WHERE c.released_at IS NULL)
		SELECT FROM fed WHERE fed.usage = capture_plan.source) THEN
		RAISE EXCEPTION 'rows of % are captured for %: they would go round in a circle', usage, source
			USING ERRCODE = 'invalid_parameter_value';
	END IF;

	-- the key
	SELECT array_agg(a.attname ORDER BY k.ordinality),
		CASE WHEN count(*) = 1 THEN format('%I::text', min(a.attname))
			ELSE format('jsonb_build_array(%s)::text', string_agg(quote_ident(a.attname), ', ' ORDER BY k.ordinality)) END
	INTO plan.key_columns, plan.key
	FROM (
		SELECT i.indexrelid, i.indkey, i.indnkeyatts FROM pg_index i
		WHERE i.indrelid = source AND i.indisunique AND i.indisvalid AND i.indimmediate AND i.indpred IS NULL
			AND i.indexprs IS NULL
			AND NOT EXISTS (SELECT FROM unnest(i.indkey::smallint[]) WITH ORDINALITY AS c (attnum, n)
				JOIN pg_attribute a ON a.attrelid = source AND a.attnum = c.attnum WHERE c.n <= i.indnkeyatts AND NOT a.attnotnull)
		ORDER BY i.indisprimary DESC, i.indnkeyatts, i.indexrelid LIMIT 1
	) AS i
	CROSS JOIN LATERAL unnest(i.indkey::smallint[]) WITH ORDINALITY AS k (attnum, ordinality)
	JOIN pg_attribute a ON a.attrelid = source AND a.attnum = k.attnum
	WHERE k.ordinality <= i.indnkeyatts;
	IF plan.key_columns IS NULL THEN
		RAISE EXCEPTION 'table % has no key', source
			USING ERRCODE = 'object_not_in_prerequisite_state', DETAIL = 'Without one it cannot be told whether a row was captured before.',
				HINT = 'Add a primary key, or a UNIQUE index on columns that are NOT NULL.';
	END IF;

	plan.source := source;
	plan.usage := usage;
	plan.columns := given;
	plan.preset := preset;
	plan.replicated := coalesce(replicated, false);
	plan.captured_at := now();
	plan.prefix := coalesce(known.prefix, left(replace(gen_random_uuid()::text, '-', ''), 12));
	plan.function_name := format('aibilling_capture_%s%s',
		CASE WHEN octet_length(relation.relname) <= 24 THEN relation.relname || '_' END, plan.prefix);

	-- what is given, of the preset, by name
	FOR m IN SELECT e.key, e.value FROM jsonb_each(given) e LOOP
		IF m.key ~ '^(id|cost_(nanos|cents|status))$' THEN
			RAISE EXCEPTION 'column "%" of a usage table is filled by the extension', m.key USING ERRCODE = 'invalid_parameter_value';
		ELSIF NOT EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = usage AND a.attname = m.key AND a.attnum > 0 AND NOT a.attisdropped) THEN
			word := aibilling.closest_word(m.key, ARRAY(SELECT a.attname::text FROM pg_attribute a
				WHERE a.attrelid = usage AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum));
			hint := CASE WHEN word IS NULL THEN 'The keys of columns are names of the usage table''s columns.' ELSE format('Perhaps you meant "%s".', word) END;
			RAISE EXCEPTION 'usage table % has no column "%"', usage, m.key USING ERRCODE = 'undefined_column', HINT = hint;
		ELSIF jsonb_typeof(m.value) NOT IN ('string', 'number', 'null') THEN
			RAISE EXCEPTION 'the mapping of "%" is no SQL expression: %', m.key, m.value
				USING ERRCODE = 'invalid_parameter_value', HINT = 'Give it as a JSON string, or null to leave the column empty.';
		END IF;
	END LOOP;
	IF preset IS NOT NULL THEN
		FOR m IN SELECT p.target, p.expression FROM aibilling.capture_preset(preset, source) p LOOP
			IF m.target = 'only_when' THEN
				conditions := conditions || m.expression;
			ELSE
				mapped := mapped || jsonb_build_object(m.target, m.expression);
			END IF;
		END LOOP;
	ELSE
		FOR m IN SELECT p.target, p.expression FROM aibilling.capture_by_name(source) p WHERE NOT given ? p.target LOOP
			BEGIN
				PERFORM aibilling.check_expression(source, m.expression, (SELECT a.atttypid::regtype FROM pg_attribute a
					WHERE a.attrelid = usage AND a.attname = m.target AND a.attnum > 0 AND NOT a.attisdropped));
				mapped := mapped || jsonb_build_object(m.target, m.expression);
			EXCEPTION WHEN cannot_coerce OR datatype_mismatch OR indeterminate_datatype THEN
				NULL;
			END;
		END LOOP;
		-- Anthropic's own count leaves cached tokens out of input_tokens, LiteLLM's has them in it.
		SELECT string_agg(format('"%s"', a.attname), ' and ' ORDER BY a.attnum) INTO word FROM pg_attribute a
		WHERE a.attrelid = source AND a.attname IN ('cache_read_input_tokens', 'cache_creation_input_tokens', 'cacheReadInputTokens', 'cacheCreationInputTokens')
			AND NOT a.attisdropped;
		IF word IS NOT NULL AND NOT given ?| '{cache_read_tokens,raw_usage}' THEN
			RAISE EXCEPTION 'it cannot be told whether the input tokens of % contain those of %', source, word
				USING ERRCODE = 'ambiguous_column',
					HINT = 'Map input_tokens (all of them, cached ones included), cache_read_tokens and cache_write_tokens by columns.';
		END IF;
		IF mapped ? 'model' AND NOT mapped ? 'provider' AND NOT given ? 'provider' THEN
			mapped := mapped || jsonb_build_object('provider', format('aibilling.provider_of_model((%s)::text)', mapped ->> 'model'));
		ELSIF given ? 'model' AND NOT mapped ? 'provider' AND NOT given ? 'provider' THEN
			mapped := mapped || jsonb_build_object('provider', format('aibilling.provider_of_model((%s)::text)', given ->> 'model'));
		END IF;
	END IF;
	mapped := jsonb_build_object('external_id', format('%L || CASE WHEN octet_length(%2$s) <= 240 THEN %2$s ELSE encode(sha256(convert_to(%2$s, ''UTF8'')), ''hex'') END',
		plan.prefix || ':', plan.key)) || mapped || given;
	IF trim(coalesce(only_when, 'true')) <> 'true' OR conditions = '{}' THEN
		conditions := conditions || coalesce(only_when, 'true');
	END IF;
	plan.only_when := array_to_string(ARRAY(SELECT format(E'(%s\n)', c) FROM unnest(conditions) c), ' AND ');

	-- each of them must be one
	FOR m IN
		SELECT a.attname AS target, a.atttypid::regtype AS type, mapped ->> a.attname AS expression
		FROM pg_attribute a WHERE a.attrelid = usage AND a.attnum > 0 AND NOT a.attisdropped AND mapped ->> a.attname IS NOT NULL
		UNION ALL
		SELECT 'only_when', 'boolean', c FROM unnest(conditions) c
	LOOP
		BEGIN
			PERFORM aibilling.check_expression(source, m.expression, m.type);
		EXCEPTION WHEN OTHERS THEN
			GET STACKED DIAGNOSTICS problem = MESSAGE_TEXT, hint = PG_EXCEPTION_HINT;
			RAISE EXCEPTION 'cannot map % of %: %', m.target, usage, problem
				USING ERRCODE = SQLSTATE, DETAIL = format('Its expression over %s is: %s', source, m.expression),
					HINT = CASE WHEN hint <> '' THEN hint WHEN SQLSTATE = '42883' THEN 'Functions and operators outside of pg_catalog need their schema.' ELSE '' END;
		END;
	END LOOP;
	SELECT string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum),
		string_agg(format(E'\t(%s\n)::%s AS %I', mapped ->> a.attname, format_type(a.atttypid, NULL), a.attname), E',\n' ORDER BY a.attnum)
	INTO plan.targets, plan.expressions
	FROM pg_attribute a
	WHERE a.attrelid = usage AND a.attnum > 0 AND NOT a.attisdropped AND mapped ->> a.attname IS NOT NULL;
	-- What its raw usage object or a default may have filled in is no change.
	has_raw := mapped ->> 'raw_usage' IS NOT NULL;
	SELECT coalesce(string_agg(format(CASE
			WHEN a.attname = 'raw_usage' THEN '(m.%1$I <> u.%1$I)'
			WHEN has_raw OR a.attname IN ('tags', 'service_tier', 'occurred_at', 'request_count') THEN '(m.%1$I IS NOT NULL AND m.%1$I IS DISTINCT FROM u.%1$I)'
			ELSE '(m.%1$I IS DISTINCT FROM u.%1$I)' END, a.attname), ' OR ' ORDER BY a.attnum), 'false')
	INTO plan.changes
	FROM pg_attribute a
	WHERE a.attrelid = usage AND a.attnum > 0 AND NOT a.attisdropped AND mapped ->> a.attname IS NOT NULL
		AND a.attname <> 'external_id' AND a.atttypid <> 'json'::regtype
		AND NOT (has_raw AND a.attname IN ('service_tier', 'units'));
	SELECT coalesce((
		SELECT (SELECT format('(%s)', string_agg(quote_ident(a.attname), ', '))
			FROM pg_attribute a WHERE a.attrelid = usage AND a.attnum = ANY (i.indkey::smallint[]))
		FROM pg_index i
		WHERE i.indrelid = usage AND i.indisunique AND i.indisvalid AND i.indimmediate AND i.indpred IS NULL AND i.indexprs IS NULL
			AND (SELECT a.attnum FROM pg_attribute a WHERE a.attrelid = usage AND a.attname = 'external_id') = ANY (i.indkey::smallint[])
		ORDER BY i.indnkeyatts LIMIT 1), '')
	INTO plan.on_conflict;
	RETURN plan;
END
$$;
COMMENT ON FUNCTION aibilling.capture_plan(regclass, regclass, jsonb, text, text, boolean) IS
'How the rows of a table become usage rows, checked; what aibilling.capture_sql() is made from';

CREATE OR REPLACE FUNCTION aibilling.capture_sql(source regclass, usage regclass, columns jsonb DEFAULT '{}', preset text DEFAULT NULL,
	only_when text DEFAULT 'true', existing text DEFAULT 'ignore', replicated boolean DEFAULT false) RETURNS text
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $capture_sql$
#variable_conflict use_variable
DECLARE
	plan aibilling.captures;
	relation pg_class;
	schema name;
	sql text;
	word text;
	by_statement boolean;
	by_row boolean;
	flag text;
	level text;
	rows text;
	branches text := '';
	fallbacks text := '';
	keys text := '';
BEGIN
	IF existing IS NULL OR existing NOT IN ('ignore', 'send', 'load') THEN
		word := aibilling.closest_word(existing, '{ignore,send,load}');
		RAISE EXCEPTION 'invalid value for parameter "existing": "%"', existing
			USING ERRCODE = 'invalid_parameter_value', HINT = coalesce(format('Perhaps you meant ''%s''. ', word), '') || 'Use ''ignore'', ''send'' or ''load''.';
	END IF;
	plan := aibilling.capture_plan(source, usage, columns, preset, only_when, replicated);
	SELECT c.* INTO relation FROM pg_class c WHERE c.oid = source;
	schema := relation.relnamespace::regnamespace::text;
	-- A statement has all its rows at once; a subscription has single rows, and so has what inserts
	-- into a partition, which fires no trigger of the table's statements.
	by_statement := NOT plan.replicated;
	by_row := plan.replicated OR relation.relkind = 'p';
	flag := 'aibilling_capture.p' || plan.prefix;
	FOR level, rows IN
		SELECT * FROM (VALUES ('STATEMENT', 'new_rows'), ('ROW', '(SELECT (NEW).*)')) AS v (level, rows)
		WHERE v.level = 'ROW' OR by_statement
	LOOP
		branches := branches || CASE WHEN level = 'ROW' AND NOT by_row THEN '' ELSE format(E'\tELSIF TG_LEVEL = %L THEN\n%s\t\tINSERT INTO %s (%s)\n\t\tSELECT\n%s\n\t\tFROM %s AS %I\n\t\tWHERE %s;\n',
			level, CASE WHEN by_row AND level = 'STATEMENT' THEN format(E'\t\tPERFORM set_config(%L, '''', true);\n', flag) END,
			usage, plan.targets, plan.expressions, rows, relation.relname, plan.only_when) END;
		keys := keys || format(E'\t\t\t\t\tIF TG_LEVEL = %L THEN\n\t\t\t\t\t\tPERFORM aibilling.capture_keys(%L, ARRAY(SELECT %s FROM %s AS %I), SQLERRM);\n\t\t\t\t\tEND IF;\n',
			level, plan.function_name, plan.key, rows, relation.relname);
		fallbacks := fallbacks || format(E'\t\t\tIF TG_LEVEL = %L THEN\n\t\t\t\tPERFORM aibilling.capture_rows(%L, ARRAY(SELECT to_jsonb(r) FROM %s AS r), SQLSTATE, SQLERRM);\n\t\t\tEND IF;\n',
			level, plan.function_name, rows);
	END LOOP;

	sql := format($sql$-- Rows of %1$s become rows of %2$s.
CREATE FUNCTION %3$s.%4$I() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET timezone = 'UTC'
SET datestyle = 'ISO'
AS $capture$
#variable_conflict use_column
BEGIN
	IF TG_OP = 'UPDATE' THEN
		PERFORM aibilling.capture_changed(%4$L, to_jsonb(OLD), to_jsonb(NEW));
%5$s%6$s	END IF;
	RETURN NULL;
EXCEPTION
	WHEN serialization_failure OR deadlock_detected THEN
		RAISE;
	WHEN OTHERS THEN
		-- one by one; what cannot be captured is in aibilling.capture_failure
		BEGIN
%7$s			RETURN NULL;
		EXCEPTION
			WHEN serialization_failure OR deadlock_detected THEN
				RAISE;
			WHEN OTHERS THEN
				-- not even as jsonb: their keys
				BEGIN
%8$s				EXCEPTION
					WHEN serialization_failure OR deadlock_detected THEN
						RAISE;
					WHEN OTHERS THEN
						RAISE WARNING 'rows of %% are not captured: %%', TG_RELID::regclass, SQLERRM;
				END;
				RETURN NULL;
		END;
END
$capture$;
REVOKE ALL ON FUNCTION %3$s.%4$I() FROM PUBLIC;
$sql$, source, usage, schema, plan.function_name,
		-- the depth tells this statement from others that its triggers run
		CASE WHEN by_statement AND by_row THEN format(E'\tELSIF TG_WHEN = ''BEFORE'' THEN\n\t\tPERFORM set_config(%L, (pg_trigger_depth() - 1)::text, true);\n', flag) END,
		branches, fallbacks, keys);
	IF relation.relowner <> current_user::regrole THEN
		sql := sql || format(E'ALTER FUNCTION %s.%I() OWNER TO %s;\n', schema, plan.function_name, relation.relowner::regrole);
	END IF;
	IF by_statement AND by_row THEN
		sql := sql || format(E'CREATE TRIGGER %I BEFORE INSERT ON %s FOR EACH STATEMENT EXECUTE FUNCTION %s.%I();\n',
			plan.function_name || '_begin', source, schema, plan.function_name);
	END IF;
	IF by_statement THEN
		sql := sql || format(E'CREATE TRIGGER %I AFTER INSERT ON %s REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION %s.%I();\n',
			plan.function_name || '_insert', source, schema, plan.function_name);
	END IF;
	IF by_row THEN
		sql := sql || format(E'CREATE TRIGGER %I AFTER INSERT ON %s FOR EACH ROW %sEXECUTE FUNCTION %s.%I();\n', plan.function_name || '_row', source,
			CASE WHEN by_statement THEN format('WHEN (current_setting(%L, true) IS DISTINCT FROM pg_trigger_depth()::text) ', flag) END,
			schema, plan.function_name);
	END IF;
	sql := sql || format(E'CREATE TRIGGER %I AFTER UPDATE ON %s FOR EACH ROW WHEN (OLD.* OPERATOR(pg_catalog.*<>) NEW.*) EXECUTE FUNCTION %s.%I();\n',
		plan.function_name || '_update', source, schema, plan.function_name);
	IF plan.replicated THEN
		sql := sql || format(E'ALTER TABLE %s ENABLE ALWAYS TRIGGER %I, ENABLE ALWAYS TRIGGER %I;\n', source,
			plan.function_name || '_row', plan.function_name || '_update');
	END IF;
	sql := sql || format(E'INSERT INTO aibilling.captures SELECT (jsonb_populate_record(NULL::aibilling.captures, %L)).*\n\tON CONFLICT (source, usage) DO UPDATE SET (%s) = ROW (%s);\n',
		to_jsonb(plan),
		(SELECT string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum) FROM pg_attribute a WHERE a.attrelid = 'aibilling.captures'::regclass AND a.attnum > 0),
		(SELECT string_agg('excluded.' || quote_ident(a.attname), ', ' ORDER BY a.attnum) FROM pg_attribute a WHERE a.attrelid = 'aibilling.captures'::regclass AND a.attnum > 0));
	IF existing <> 'ignore' THEN
		sql := sql || format(E'SELECT aibilling.capture_history(%L, %L, %L);\n', source::text, usage::text, existing);
	END IF;
	RETURN sql;
END
$capture_sql$;
COMMENT ON FUNCTION aibilling.capture_sql(regclass, regclass, jsonb, text, text, text, boolean) IS
'The statements that aibilling.capture() runs with the same arguments; does nothing. The prefix of external_id is drawn anew each time, until the capture has one';

CREATE OR REPLACE FUNCTION aibilling.capture(source regclass, usage regclass, columns jsonb DEFAULT '{}', preset text DEFAULT NULL,
	only_when text DEFAULT 'true', existing text DEFAULT 'ignore', replicated boolean DEFAULT false) RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
	IF coalesce(existing, 'ignore') <> 'ignore' AND current_setting('transaction_isolation') NOT LIKE 'read%' THEN
		RAISE EXCEPTION 'rows that are there cannot be captured in a transaction of isolation level %', current_setting('transaction_isolation')
			USING ERRCODE = 'invalid_transaction_state', DETAIL = 'It would not see those that others have committed meanwhile.';
	END IF;
	EXECUTE aibilling.capture_sql(source, usage, columns, preset, only_when, existing, replicated);
	IF NOT coalesce(replicated, false) AND EXISTS (SELECT FROM pg_subscription_rel r WHERE r.srrelid = source) THEN
		RAISE WARNING 'a subscription feeds %: its rows are not captured', source
			USING HINT = 'Release the capture, and call it with replicated => true.';
	END IF;
END
$$;
COMMENT ON FUNCTION aibilling.capture(regclass, regclass, jsonb, text, text, text, boolean) IS
'Has the rows of a table become rows of a usage table, by triggers that belong to the owner of both. columns: SQL expressions over the source''s row by columns of the usage table, null to leave one empty; preset: litellm, langfuse or open_webui; without one, what columns leaves out is matched by name. external_id is a random prefix and the source''s key. only_when: the condition under which a row is complete; an UPDATE that makes it so captures it. existing: ignore, send or load (priced, not sent) the rows that are there. replicated: a subscription feeds the source. The source''s statements never fail because of it: see aibilling.capture_failure. aibilling.capture_sql() shows what will run';

CREATE OR REPLACE FUNCTION aibilling.release(source regclass, usage regclass) RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	d aibilling.captures;
	schema text;
	word text;
BEGIN
	IF NOT aibilling.owns(source) THEN
		RAISE EXCEPTION 'must be owner of table %', source USING ERRCODE = 'insufficient_privilege';
	END IF;
	SELECT c.* INTO d FROM aibilling.captures c WHERE c.source = release.source AND c.usage = release.usage AND c.released_at IS NULL;
	IF NOT FOUND THEN
		RAISE EXCEPTION 'rows of % are not captured for %', source, usage USING ERRCODE = 'undefined_object';
	END IF;
	SELECT c.relnamespace::regnamespace::text INTO schema FROM pg_class c WHERE c.oid = source;
	FOREACH word IN ARRAY '{begin,insert,row,update}'::text[] LOOP
		EXECUTE format('DROP TRIGGER IF EXISTS %I ON %s', d.function_name || '_' || word, source);
	END LOOP;
	EXECUTE format('DROP FUNCTION IF EXISTS %s.%I()', schema, d.function_name);
	UPDATE aibilling.captures c SET released_at = now() WHERE c.source = release.source AND c.usage = release.usage;
END
$$;
COMMENT ON FUNCTION aibilling.release(regclass, regclass) IS
'Ends what aibilling.capture() began: drops its triggers and their function. Usage rows and failures stay, and the prefix of external_id, so that what is captured again is the same. Needs ownership of the source';

-- Rows as their source has them, by the stored definition.
CREATE OR REPLACE FUNCTION aibilling.capture_row(d aibilling.captures, source_row jsonb, error text DEFAULT NULL, source_key text DEFAULT NULL) RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET timezone = 'UTC'
SET datestyle = 'ISO'
AS $$
DECLARE
	mapped text;
	changed boolean;
	n bigint;
BEGIN
	IF source_key IS NULL THEN
		EXECUTE format('SELECT %s FROM jsonb_populate_record(NULL::%s, $1) AS r', d.key, d.source) INTO source_key USING source_row;
	END IF;
	mapped := format(E'SELECT\n%s\nFROM %s AS %I WHERE %s AND %s', d.expressions,
		CASE WHEN source_row IS NULL THEN d.source::text ELSE format('jsonb_populate_record(NULL::%s, $1)', d.source) END,
		(SELECT c.relname FROM pg_class c WHERE c.oid = d.source),
		CASE WHEN source_row IS NULL THEN format('(%s = $2)', d.key) ELSE 'true' END, d.only_when);
	IF error IS NULL THEN
		BEGIN
			EXECUTE format('INSERT INTO %1$s (%2$s) SELECT m.* FROM (%3$s) AS m WHERE NOT EXISTS (SELECT FROM %1$s u WHERE u.external_id = m.external_id)%4$s',
				d.usage, d.targets, mapped, CASE WHEN d.on_conflict <> '' THEN format(' ON CONFLICT %s DO NOTHING', d.on_conflict) END)
			USING source_row, source_key;
			GET DIAGNOSTICS n = ROW_COUNT;
			IF n = 0 THEN
				EXECUTE format('SELECT EXISTS (SELECT FROM (%s) AS m JOIN %s u ON u.external_id = m.external_id WHERE %s)', mapped, d.usage, d.changes)
				INTO changed USING source_row, source_key;
				error := CASE WHEN changed THEN 'changed after capture' END;
			END IF;
		EXCEPTION
			WHEN serialization_failure OR deadlock_detected THEN
				RAISE;
			WHEN OTHERS THEN
				error := SQLERRM;
		END;
	END IF;
	IF error IS NULL THEN
		DELETE FROM aibilling.capture_failure f WHERE f.source = d.source AND f.usage = d.usage AND f.key = source_key;
		RETURN true;
	END IF;
	INSERT INTO aibilling.capture_failure AS f (source, usage, key, "row", error, at)
	VALUES (d.source, d.usage, source_key, source_row, error, now())
	ON CONFLICT (source, usage, key) DO UPDATE SET "row" = excluded."row", error = excluded.error, at = excluded.at;
	RETURN false;
END
$$;
COMMENT ON FUNCTION aibilling.capture_row(aibilling.captures, jsonb, text, text) IS
'Captures a row, given as jsonb or as NULL and its key, unless it was before; with an error only notes it. What goes wrong is put into aibilling.capture_failure. Returns whether nothing did';

-- A tenth at a time, until the rows that cannot be captured are found.
CREATE OR REPLACE FUNCTION aibilling.capture_together(d aibilling.captures, source_rows jsonb[]) RETURNS bigint
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET timezone = 'UTC'
SET datestyle = 'ISO'
SET enable_hashjoin = off
SET enable_mergejoin = off
SET enable_seqscan = off
AS $$
DECLARE
	n integer := cardinality(source_rows);
	part integer := (n + 9) / 10;
	relname name := (SELECT c.relname FROM pg_class c WHERE c.oid = d.source);
	mapped text;
	captured bigint;
BEGIN
	IF n <= 1 THEN
		RETURN (SELECT count(*) FILTER (WHERE aibilling.capture_row(d, r)) FROM unnest(source_rows) r);
	END IF;
	mapped := format(E'SELECT\n%s, %s AS "source key", "the row" FROM unnest($1) AS "the row", LATERAL jsonb_populate_record(NULL::%s, "the row") AS %I WHERE %s',
		d.expressions, d.key, d.source, relname, d.only_when);
	BEGIN
		EXECUTE format('INSERT INTO aibilling.capture_failure (source, usage, key, "row", error, at)'
			' SELECT $2, $3, m."source key", m."the row", ''changed after capture'', now() FROM (%s) AS m JOIN %s u ON u.external_id = m.external_id WHERE %s'
			' ON CONFLICT (source, usage, key) DO UPDATE SET "row" = excluded."row", error = excluded.error, at = excluded.at',
			mapped, d.usage, d.changes) USING source_rows, d.source, d.usage;
		EXECUTE format('INSERT INTO %1$s (%2$s) SELECT %2$s FROM (%3$s) AS m WHERE NOT EXISTS (SELECT FROM %1$s u WHERE u.external_id = m.external_id)%4$s',
			d.usage, d.targets, mapped, CASE WHEN d.on_conflict <> '' THEN format(' ON CONFLICT %s DO NOTHING', d.on_conflict) END)
		USING source_rows;
		GET DIAGNOSTICS captured = ROW_COUNT;
		RETURN captured;
	EXCEPTION
		WHEN serialization_failure OR deadlock_detected THEN
			RAISE;
		WHEN OTHERS THEN
			captured := 0;
	END;
	FOR i IN 0 .. (n - 1) / part LOOP
		captured := captured + aibilling.capture_together(d, source_rows[i * part + 1 : (i + 1) * part]);
	END LOOP;
	RETURN captured;
END
$$;
COMMENT ON FUNCTION aibilling.capture_together(aibilling.captures, jsonb[]) IS
'Captures rows, given as jsonb, that were not before. What goes wrong is put into aibilling.capture_failure. Returns how many are captured';

CREATE OR REPLACE FUNCTION aibilling.capture_rows(capture text, source_rows jsonb[], state text, error text) RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	d aibilling.captures;
BEGIN
	SELECT c.* INTO d FROM aibilling.captures c WHERE c.function_name = capture AND c.released_at IS NULL;
	IF NOT FOUND THEN
		RAISE EXCEPTION 'there is no capture "%"', capture USING ERRCODE = 'undefined_object';
	END IF;
	-- of the statement or the server, not of one of its rows: all would fail alike
	IF left(state, 2) IN ('42', '53', '55', '0A', '3F') THEN
		PERFORM aibilling.capture_row(d, r, error) FROM unnest(source_rows) r;
	ELSE
		PERFORM aibilling.capture_together(d, source_rows);
	END IF;
END
$$;
COMMENT ON FUNCTION aibilling.capture_rows(text, jsonb[], text, text) IS
'Captures rows that could not be captured by their statement''s trigger, because of this error. For the triggers of aibilling.capture()';

CREATE OR REPLACE FUNCTION aibilling.capture_keys(capture text, source_keys text[], error text) RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
	PERFORM aibilling.capture_row(c, NULL, error, k)
	FROM aibilling.captures c, unnest(source_keys) k WHERE c.function_name = capture AND c.released_at IS NULL;
END
$$;
COMMENT ON FUNCTION aibilling.capture_keys(text, text[], text) IS
'Notes rows that cannot be had as jsonb in aibilling.capture_failure, by their keys. For the triggers of aibilling.capture()';

CREATE OR REPLACE FUNCTION aibilling.capture_changed(capture text, old_row jsonb, new_row jsonb) RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET timezone = 'UTC'
SET datestyle = 'ISO'
AS $$
DECLARE
	d aibilling.captures;
	relname name;
	was record;
	is_now record;
	captured boolean;
	query text;
BEGIN
	SELECT c.* INTO d FROM aibilling.captures c WHERE c.function_name = capture AND c.released_at IS NULL;
	IF NOT FOUND THEN
		RAISE EXCEPTION 'there is no capture "%"', capture USING ERRCODE = 'undefined_object';
	END IF;
	SELECT c.relname INTO relname FROM pg_class c WHERE c.oid = d.source;
	query := format(E'SELECT coalesce(%s, false) AS complete, %s AS key FROM jsonb_populate_record(NULL::%s, $1) AS %I', d.only_when, d.key, d.source, relname);
	EXECUTE query INTO was USING old_row;
	EXECUTE query INTO is_now USING new_row;
	IF NOT was.complete AND NOT is_now.complete THEN
		RETURN;
	END IF;
	-- As far as it was complete: what its columns are mapped to may not be computed before.
	IF was.complete THEN
		EXECUTE format(E'SELECT EXISTS (SELECT FROM %s u WHERE u.external_id = (SELECT m.external_id FROM (SELECT\n%s\nFROM jsonb_populate_record(NULL::%s, $1) AS %I) m))',
			d.usage, d.expressions, d.source, relname) INTO captured USING old_row;
		IF captured AND (was.key <> is_now.key OR NOT is_now.complete) THEN
			PERFORM aibilling.capture_row(d, new_row, 'changed after capture');
			RETURN;
		ELSIF NOT captured AND NOT EXISTS (SELECT FROM aibilling.capture_failure f
			WHERE f.source = d.source AND f.usage = d.usage AND f.key = was.key) THEN
			RETURN;				-- it was there before
		END IF;
	END IF;
	IF is_now.complete THEN
		PERFORM aibilling.capture_row(d, new_row);
	END IF;
END
$$;
COMMENT ON FUNCTION aibilling.capture_changed(text, jsonb, jsonb) IS
'Captures a row that an UPDATE has made complete, and notes a captured one that it has changed. For the triggers of aibilling.capture()';

CREATE OR REPLACE FUNCTION aibilling.capture_history(source regclass, usage regclass, existing text) RETURNS bigint
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET timezone = 'UTC'
SET datestyle = 'ISO'
SET enable_hashjoin = off
SET enable_mergejoin = off
SET enable_seqscan = off
AS $$
DECLARE
	d aibilling.captures;
	relname name;
	enqueue text := current_setting('aibilling_polar.enqueue');
	key_list text;
	last_key text;
	next_key text;
	range text;
	n bigint;
	captured bigint := 0;
	seen bigint := 0;
	rows_about bigint;
BEGIN
	SELECT c.* INTO d FROM aibilling.captures c
	WHERE c.source = capture_history.source AND c.usage = capture_history.usage AND c.released_at IS NULL;
	IF NOT FOUND THEN
		RAISE EXCEPTION 'rows of % are not captured for %', source, usage USING ERRCODE = 'undefined_object';
	END IF;
	SELECT c.relname, c.reltuples INTO relname, rows_about FROM pg_class c WHERE c.oid = source;
	PERFORM aibilling.note_progress(usage, 0, rows_about, 'rows');
	SELECT string_agg(quote_ident(k), ', ') INTO key_list FROM unnest(d.key_columns) k;
	PERFORM set_config('aibilling_polar.enqueue', CASE existing WHEN 'load' THEN 'off' ELSE 'on' END, true);
	LOOP
		-- the last of the next ten thousand, as (literal, ...)
		EXECUTE format('SELECT %s FROM (SELECT %s FROM %s%s ORDER BY %2$s OFFSET 9999 LIMIT 1) AS k',
			(SELECT format('format(%L, %s)', '(' || string_agg(format('%%L::%s', format_type(a.atttypid, a.atttypmod)), ', ' ORDER BY k.ordinality) || ')',
				string_agg(quote_ident(k.name), ', ' ORDER BY k.ordinality))
			 FROM unnest(d.key_columns) WITH ORDINALITY AS k (name, ordinality)
			 JOIN pg_attribute a ON a.attrelid = source AND a.attname = k.name),
			key_list, source, ' WHERE (' || key_list || ') > ' || last_key)
		INTO next_key;
		range := concat_ws(' AND ', '(' || key_list || ') > ' || last_key, '(' || key_list || ') <= ' || next_key, 'true');
		BEGIN
			EXECUTE format(E'INSERT INTO %s (%s) SELECT m.* FROM (SELECT\n%s\nFROM (SELECT * FROM %s WHERE %s) AS %I WHERE %s) AS m'
				' WHERE NOT EXISTS (SELECT FROM %1$s u WHERE u.external_id = m.external_id)',
				usage, d.targets, d.expressions, source, range, relname, d.only_when);
			GET DIAGNOSTICS n = ROW_COUNT;
		EXCEPTION
			WHEN serialization_failure OR deadlock_detected THEN
				RAISE;
			WHEN OTHERS THEN
				EXECUTE format('SELECT aibilling.capture_together($1, array_agg(to_jsonb(r))) FROM %s AS r WHERE %s', source, range)
				INTO n USING d;
		END;
		captured := captured + n;
		EXIT WHEN next_key IS NULL;
		last_key := next_key;
		seen := seen + 10000;
		PERFORM aibilling.note_progress(usage, seen, greatest(seen, rows_about), 'rows');
		IF seen % 100000 = 0 THEN
			RAISE NOTICE '% rows of % are read, % of them captured', seen, source, captured;
		END IF;
	END LOOP;
	PERFORM set_config('aibilling_polar.enqueue', enqueue, true);
	RAISE NOTICE '% rows of % that were there are captured%', captured, source, CASE existing WHEN 'load' THEN ', and not sent' ELSE '' END;
	PERFORM aibilling.note_progress(NULL, NULL, NULL, 'rows');
	RETURN captured;
END
$$;
COMMENT ON FUNCTION aibilling.capture_history(regclass, regclass, text) IS
'Captures the rows of a captured table that are there and were not yet. existing: send, or load (priced, not sent). Returns how many; a NOTICE tells every 100,000 rows. For aibilling.capture(), and to be called again where it was not to the end';

CREATE OR REPLACE FUNCTION aibilling.capture_retry(source regclass) RETURNS bigint
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	f record;
	n bigint := 0;
BEGIN
	IF NOT aibilling.owns(source) THEN
		RAISE EXCEPTION 'must be owner of table %', source USING ERRCODE = 'insufficient_privilege';
	END IF;
	FOR f IN
		SELECT c AS d, e."row", e.key FROM aibilling.capture_failure e JOIN aibilling.captures c ON (c.source, c.usage) = (e.source, e.usage)
		WHERE e.source = capture_retry.source AND c.released_at IS NULL AND e.error <> 'changed after capture'
		ORDER BY e.at, e.key
	LOOP
		n := n + aibilling.capture_row(f.d, f."row", NULL, f.key)::integer;
	END LOOP;
	RETURN n;
END
$$;
COMMENT ON FUNCTION aibilling.capture_retry(regclass) IS
'Tries the rows in aibilling.capture_failure of a table again, but for those that have changed after they were captured. Returns how many are captured now. Needs ownership of the table';
