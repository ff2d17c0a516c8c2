# Replies of providers, gateways, SDKs and frameworks, stored as raw_usage and priced by the bundle: the
# columns and the cost that are right, or the reason of the refusal.
#
# replies.jsonl has one case a line: name, format, provider, model, raw; columns (all that are not NULL),
# cost in USD and how it is worked out from the provider's price list; or refused, words of the reason.
# tier, status, doubt (words of explain_cost's note) and answered (the reply's model) where they are the
# point.

use strict;
use warnings;

use FindBin;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = PostgreSQL::Test::Cluster->new('replies');
$node->init;
$node->append_conf('postgresql.conf', "shared_preload_libraries = 'aibilling_polar'");
$node->start;

$node->safe_psql('postgres', <<SQL);
CREATE EXTENSION aibilling_polar;
CREATE SERVER polar FOREIGN DATA WRAPPER polar OPTIONS (url 'http://127.0.0.1:1', event_name 'llm_usage');
SELECT aibilling.load_bundled_prices();
SELECT aibilling.create_usage_table('usage', server => 'polar');
CREATE TABLE reply (n bigint GENERATED ALWAYS AS IDENTITY, c jsonb);
COPY reply (c) FROM '$FindBin::Bin/replies.jsonl' (FORMAT csv, QUOTE e'\\x01', DELIMITER e'\\x02');
INSERT INTO usage (external_id, external_customer_id, provider, model, usage_format, raw_usage)
SELECT n, 'c', c->>'provider', c->>'model', c->>'format', c->'raw' FROM reply;

CREATE VIEW read AS
SELECT n, c, u.id, state = 'rejected' AS rejected, error, cost_cents, cost_status, service_tier, model,
	jsonb_strip_nulls(jsonb_build_object('input_tokens', input_tokens, 'cache_read_tokens', cache_read_tokens,
		'cache_write_tokens', cache_write_tokens, 'cache_write_1h_tokens', cache_write_1h_tokens,
		'output_tokens', output_tokens, 'reasoning_tokens', reasoning_tokens,
		'web_search_count', web_search_count, 'units', units, 'provider_cost', provider_cost)) AS columns,
	(SELECT note FROM aibilling.explain_cost('usage', u.id) LIMIT 1) AS note
FROM reply JOIN usage u ON external_id = n::text
	LEFT JOIN aibilling.outbox o ON o.usage_table = 'usage'::regclass AND o.usage_id = u.id;
SQL

# One row a case: its name; whether columns or reason are right, and what they are; whether the cost is
# ('' if the case says nothing of it), and what it is.
my $rows = $node->safe_psql('postgres', <<'SQL');
\pset fieldsep '\x1f'
SELECT (c->>'format') || ': ' || (c->>'name'),
	CASE WHEN c ? 'refused' THEN coalesce(rejected, false) AND strpos(error, c->>'refused') > 0
		ELSE rejected IS NOT TRUE AND columns = c->'columns'
			AND (NOT c ? 'tier' OR service_tier = c->>'tier')
			AND (NOT c ? 'status' OR cost_status = c->>'status')
			AND (NOT c ? 'answered' OR model = coalesce(c->>'model', c->>'answered'))
			AND (c ? 'doubt') = (coalesce(note, '') LIKE '%in doubt%')
			AND (NOT c ? 'doubt' OR strpos(note, c->>'doubt') > 0)
	END,
	concat_ws(', ', columns, service_tier, cost_status, 'error ' || error, 'note ' || note),
	CASE WHEN c ? 'cost' THEN cost_cents IS NOT DISTINCT FROM round((c->>'cost')::numeric * 100, 12) END,
	concat_ws(', ', cost_cents, cost_status, error, 'expected ' || (c->>'cost') || ' USD: ' || (c->>'how'))
FROM read ORDER BY n
SQL

foreach (split /\n/, $rows)
{
	my ($name, $right, $got, $priced, $cost) = split /\x1f/, $_, -1;

	is($right, 't', $name) or diag($got);
	next if $priced eq '';
	is($priced, 't', "$name, its cost") or diag($cost);
}

# Of each reply that is read, a number that is made larger changes the result or has it refused, unless it
# costs nothing: these are all that do not.
my $free = $node->safe_psql('postgres', <<'SQL');
CREATE FUNCTION numbers(at text[], value jsonb) RETURNS TABLE (path text[], number numeric) LANGUAGE sql AS $$
	WITH RECURSIVE leaf AS (
		SELECT at AS path, value AS v
		UNION ALL
		SELECT leaf.path || e.key, e.value
		FROM leaf, LATERAL (
			SELECT * FROM jsonb_each(CASE jsonb_typeof(v) WHEN 'object' THEN v ELSE '{}' END)
			UNION ALL
			SELECT (i - 1)::text, item
			FROM jsonb_array_elements(CASE jsonb_typeof(v) WHEN 'array' THEN v ELSE '[]' END)
				WITH ORDINALITY AS a (item, i)) AS e)
	SELECT path, v::numeric FROM leaf WHERE jsonb_typeof(v) = 'number'
$$;
CREATE FUNCTION result(format text, raw jsonb) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
	RETURN (SELECT n::text FROM aibilling.normalize_usage(format, raw) AS n);
EXCEPTION WHEN invalid_parameter_value THEN
	RETURN 'refused';
END $$;
SET client_min_messages = warning;
SELECT DISTINCT regexp_replace(array_to_string(path, '.'), '\.\d+(?=\.|$)', '', 'g')
FROM (SELECT c->>'format' AS format, c->'raw' AS raw, result(c->>'format', c->'raw') AS before FROM reply
		WHERE c ? 'columns' AND NOT c->'columns' ? 'provider_cost') AS r,
	numbers('{}', raw)
WHERE before <> 'refused' AND result(format, jsonb_set(raw, path, to_jsonb(number + 1))) = before
ORDER BY 1
SQL
is_deeply(
	[ split /\n/, $free ],
	[qw(
	ai.response.avgCompletionTokensPerSecond ai.settings.maxOutputTokens choice_index
	contextWindow costUSD created created_at data.embedding details.text_candidates_tokens
	details.text_prompt_tokens duration embedding embeddings.values embeddingsByType.float
	experimental_providerMetadata.openai.acceptedPredictionTokens
	experimental_providerMetadata.openai.rejectedPredictionTokens gen_ai.request.max_tokens
	gen_ai.request.temperature gen_ai.usage.cost gen_ai.usage.text.input_tokens
	gen_ai.usage.text.output_tokens http.response.status_code input_token_details.flex lc
	maxOutputTokens max_output_tokens metadata.metrics.latencyMs modelInput.max_tokens
	modelUsage.claude-sonnet-4-5.contextWindow modelUsage.claude-sonnet-4-5.costUSD num_turns
	output_token_details.flex payload.info.model_context_window
	payload.info.total_token_usage.cached_input_tokens payload.info.total_token_usage.input_tokens
	payload.info.total_token_usage.output_tokens
	payload.info.total_token_usage.reasoning_output_tokens
	payload.info.total_token_usage.total_tokens perf_metrics.prompt_tokens
	prompt_filter_results.prompt_index prompt_text_tokens
	providerMetadata.google.groundingMetadata.groundingSupports.groundingChunkIndices
	providerMetadata.google.groundingMetadata.groundingSupports.segment.endIndex
	providerMetadata.google.groundingMetadata.groundingSupports.segment.startIndex request_id
	response.status_code response.usage.input_token_details.cached_tokens_details.text_tokens
	response.usage.input_token_details.text_tokens response.usage.output_token_details.text_tokens
	results.index results.relevance_score segments.avg_logprob segments.end segments.endSecond
	segments.id segments.start segments.startSecond segments.tokens server.port
	server_tool_use.web_fetch_requests status_code time_info.queue_time time_info.total_time
	total_cost_usd usage.acceptance_rate usage.completion_tokens_after_first_per_sec
	usage.completion_tokens_details.accepted_prediction_tokens
	usage.completion_tokens_details.rejected_prediction_tokens usage.context_window
	usage.details.input_tokens usage.details.output_tokens usage.height
	usage.input_token_details.text_tokens usage.input_tokens_by_modality.tokens
	usage.input_tokens_details.cached_tokens_per_turn
	usage.input_tokens_details.input_tokens_per_turn usage.input_tokens_details.text_tokens
	usage.iterations.input_tokens usage.max_tokens usage.outputTokenDetails.textTokens
	usage.output_tokens_by_modality.tokens usage.output_tokens_details.output_tokens_per_turn
	usage.output_tokens_details.text_tokens usage.prompt_tokens_details.text_tokens
	usage.queue_time usage.raw.input_token_details.text_tokens
	usage.raw.output_token_details.text_tokens usage.start_time usage.time_to_first_token
	usage.tokens.inputTokens usage.tokens.outputTokens usage.tokens_per_second usage.total_latency
	usage.total_tokens usage.width usageMetadata.billablePromptUsage.textCount
	usageMetadata.promptTokensDetails.tokenCount
	usageMetadata.toolUsePromptTokensDetails.tokenCount words.end words.start
	x_groq.usage.completion_time x_groq.usage.prompt_time x_groq.usage.queue_time
	x_groq.usage.total_time
	)],
	'numbers that may be larger without a change cost nothing');

$node->stop;
done_testing();
