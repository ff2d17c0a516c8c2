-- A provider's usage object, turned into the columns of a usage table.
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS aibilling_polar;
RESET client_min_messages;

-- What normalize_usage says, as one value: the columns that are not NULL, or
-- the error's words.
CREATE FUNCTION pg_temp.normalized(format text, raw jsonb) RETURNS jsonb
LANGUAGE plpgsql AS $$
BEGIN
	RETURN (SELECT jsonb_strip_nulls(to_jsonb(n))
			FROM aibilling.normalize_usage(format, raw) AS n);
EXCEPTION WHEN invalid_parameter_value THEN
	RETURN to_jsonb(SQLERRM);
END
$$;

CREATE TEMP TABLE example (
	name text,
	format text,
	raw jsonb NOT NULL,
	expected jsonb NOT NULL,
	PRIMARY KEY (format, name)
);

--
-- OpenAI
--
INSERT INTO example VALUES
('chat completion', 'openai', '{
	"id": "chatcmpl-B1", "object": "chat.completion", "created": 1763800000, "model": "gpt-5.6-2026-05-01",
	"choices": [{"index": 0, "message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop"}],
	"usage": {"prompt_tokens": 2600, "completion_tokens": 300, "total_tokens": 2900,
		"prompt_tokens_details": {"cached_tokens": 2000, "cache_write_tokens": 400, "audio_tokens": 0},
		"completion_tokens_details": {"reasoning_tokens": 192, "audio_tokens": 0,
			"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0}},
	"service_tier": "flex"}',
 '{"input_tokens": 2600, "cache_read_tokens": 2000, "cache_write_tokens": 400, "output_tokens": 300,
   "reasoning_tokens": 192, "service_tier": "flex", "model": "gpt-5.6-2026-05-01", "generation_id": "chatcmpl-B1"}'),
('LangChain, the sum of two kinds of cache writes is left at 0', 'openai', '{
	"input_tokens": 20019, "output_tokens": 100, "total_tokens": 20119,
	"input_token_details": {"cache_read": 0, "cache_creation": 0, "ephemeral_5m_input_tokens": 12, "ephemeral_1h_input_tokens": 20000}}',
 '{"input_tokens": 20019, "cache_read_tokens": 0, "cache_write_tokens": 12, "cache_write_1h_tokens": 20000, "output_tokens": 100}'),
('LangChain, the two kinds of cache writes are left at 0', 'openai', '{
	"input_tokens": 20019, "output_tokens": 100, "total_tokens": 20119,
	"input_token_details": {"cache_creation": 7, "ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0}}',
 '{"input_tokens": 20019, "cache_write_tokens": 7, "cache_write_1h_tokens": 0, "output_tokens": 100}'),
('pydantic-ai, one call', 'openai', '{"input_tokens": 10, "output_tokens": 5, "requests": 1}', '{"input_tokens": 10, "output_tokens": 5}'),
('chat completion, details null', 'openai',
 '{"prompt_tokens": 12, "completion_tokens": 3, "total_tokens": 15,
   "prompt_tokens_details": null, "completion_tokens_details": null}',
 '{"input_tokens": 12, "output_tokens": 3}'),
('chat completion, details empty', 'openai',
 '{"prompt_tokens": 12, "completion_tokens": 3, "prompt_tokens_details": [], "completion_tokens_details": {}}',
 '{"input_tokens": 12, "output_tokens": 3}'),
('chat completion with audio', 'openai',
 '{"prompt_tokens": 420, "completion_tokens": 130, "total_tokens": 550,
   "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 400},
   "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 110}}',
 '{"input_tokens": 420, "cache_read_tokens": 0, "output_tokens": 130, "reasoning_tokens": 0,
   "units": {"input_audio_tokens": 400, "output_audio_tokens": 110}}'),
('last chunk of a stream', 'openai',
 '{"id": "chatcmpl-B2", "object": "chat.completion.chunk", "model": "gpt-5", "choices": [],
   "usage": {"prompt_tokens": 8, "completion_tokens": 5, "total_tokens": 13}}',
 '{"input_tokens": 8, "output_tokens": 5, "model": "gpt-5", "generation_id": "chatcmpl-B2"}'),
('responses, with searches', 'openai', '{
	"id": "resp_1", "object": "response", "model": "gpt-5", "service_tier": "default",
	"output": [
		{"type": "web_search_call", "status": "completed", "action": {"type": "search", "query": "x"}},
		{"type": "web_search_call", "status": "completed", "action": {"type": "open_page", "url": "y"}},
		{"type": "web_search_call", "status": "completed"},
		{"type": "message", "content": []}],
	"usage": {"input_tokens": 7000, "input_tokens_details": {"cached_tokens": 1024},
		"output_tokens": 500, "output_tokens_details": {"reasoning_tokens": 320}, "total_tokens": 7500}}',
 '{"input_tokens": 7000, "cache_read_tokens": 1024, "output_tokens": 500, "reasoning_tokens": 320,
   "web_search_count": 2, "service_tier": "default", "model": "gpt-5", "generation_id": "resp_1"}'),
('responses, last event of a stream', 'openai',
 '{"type": "response.completed", "sequence_number": 40, "response": {"id": "resp_2", "model": "gpt-5",
   "usage": {"input_tokens": 10, "output_tokens": 2, "total_tokens": 12}}}',
 '{"input_tokens": 10, "output_tokens": 2, "model": "gpt-5", "generation_id": "resp_2"}'),
('line of a batch', 'openai',
 '{"id": "batch_req_1", "custom_id": "row-7", "error": null, "response": {"status_code": 200, "request_id": "r",
   "body": {"id": "chatcmpl-B3", "model": "gpt-5", "service_tier": "default",
	 "usage": {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}}}}',
 '{"input_tokens": 9, "output_tokens": 4, "service_tier": "batch", "model": "gpt-5", "generation_id": "chatcmpl-B3"}'),
('realtime', 'openai', '{
	"type": "response.done", "event_id": "event_1", "response": {"object": "realtime.response", "id": "resp_3",
	"usage": {"total_tokens": 1250, "input_tokens": 1000, "output_tokens": 250,
		"input_token_details": {"text_tokens": 250, "audio_tokens": 700, "image_tokens": 50, "cached_tokens": 500,
			"cached_tokens_details": {"text_tokens": 180, "audio_tokens": 300, "image_tokens": 20}},
		"output_token_details": {"text_tokens": 50, "audio_tokens": 200}}}}',
 '{"input_tokens": 1000, "cache_read_tokens": 500, "output_tokens": 250, "generation_id": "resp_3",
   "units": {"input_audio_tokens": 700, "input_image_tokens": 30, "cache_read_audio_tokens": 300,
			 "output_audio_tokens": 200}}'),
('images, output not detailed', 'openai',
 '{"created": 1763800000, "data": [{"b64_json": "aGk="}],
   "usage": {"total_tokens": 1400, "input_tokens": 344, "output_tokens": 1056,
	 "input_tokens_details": {"text_tokens": 20, "image_tokens": 324}}}',
 '{"input_tokens": 344, "output_tokens": 1056,
   "units": {"input_image_tokens": 324, "output_image_tokens": 1056}}'),
('images, output detailed', 'openai',
 '{"usage": {"total_tokens": 1400, "input_tokens": 344, "output_tokens": 1056,
	 "input_tokens_details": {"text_tokens": 20, "image_tokens": 324},
	 "output_tokens_details": {"text_tokens": 56, "image_tokens": 1000}}}',
 '{"input_tokens": 344, "output_tokens": 1056,
   "units": {"input_image_tokens": 324, "output_image_tokens": 1000}}'),
('images by the piece', 'openai',
 '{"created": 1763800000, "data": [{"url": "https://example.com/1"}, {"url": "https://example.com/2"}]}',
 '{"units": {"image": 2}}'),
('embeddings', 'openai',
 '{"object": "list", "model": "text-embedding-3-small", "data": [{"object": "embedding", "embedding": [0.1]}],
   "usage": {"prompt_tokens": 8, "total_tokens": 8}}',
 '{"input_tokens": 8, "model": "text-embedding-3-small"}'),
('transcription by time', 'openai',
 '{"text": "Hello", "usage": {"type": "duration", "seconds": 9.25}}',
 '{"units": {"audio_second": 9.25}}'),
('transcription of nothing', 'openai', '{"usage": {"type": "duration", "seconds": 0}}',
 '{"units": {"audio_second": 0}}'),
('transcription by tokens', 'openai',
 '{"text": "Hello", "usage": {"type": "tokens", "input_tokens": 14, "output_tokens": 45, "total_tokens": 59,
   "input_token_details": {"text_tokens": 0, "audio_tokens": 14}}}',
 '{"input_tokens": 14, "output_tokens": 45, "units": {"input_audio_tokens": 14}}'),
('DeepInfra', 'openai',
 '{"prompt_tokens": 15, "completion_tokens": 16, "total_tokens": 31, "estimated_cost": 0.00000268}',
 '{"input_tokens": 15, "output_tokens": 16, "provider_cost": 0.00000268}'),
('Perplexity', 'openai',
 '{"prompt_tokens": 33, "completion_tokens": 7163, "total_tokens": 7196, "citation_tokens": 20016,
   "num_search_queries": 18, "reasoning_tokens": 73997,
   "cost": {"input_tokens_cost": 0.0001, "total_cost": 0.409}}',
 '{"input_tokens": 33, "output_tokens": 81160, "reasoning_tokens": 73997, "web_search_count": 18,
   "units": {"citation_tokens": 20016}, "provider_cost": 0.409}'),
('reasoning at the top, a subset', 'openai',
 '{"prompt_tokens": 5, "completion_tokens": 20, "total_tokens": 25, "reasoning_tokens": 12}',
 '{"input_tokens": 5, "output_tokens": 20, "reasoning_tokens": 12}'),
('whole numbers with decimals', 'openai',
 '{"prompt_tokens": 5.0, "completion_tokens": 2e1}',
 '{"input_tokens": 5, "output_tokens": 20}'),
('the largest bigint', 'openai',
 '{"prompt_tokens": 9223372036854775807, "completion_tokens": 0}',
 '{"input_tokens": 9223372036854775807, "output_tokens": 0}');

--
-- Anthropic
--
INSERT INTO example VALUES
('message', 'anthropic', '{
	"id": "msg_1", "type": "message", "model": "claude-sonnet-5",
	"usage": {"input_tokens": 50, "cache_read_input_tokens": 100000, "cache_creation_input_tokens": 248,
		"cache_creation": {"ephemeral_5m_input_tokens": 148, "ephemeral_1h_input_tokens": 100},
		"output_tokens": 503, "output_tokens_details": {"thinking_tokens": 300},
		"server_tool_use": {"web_search_requests": 2, "web_fetch_requests": 1}, "service_tier": "standard"}}',
 '{"input_tokens": 100298, "cache_read_tokens": 100000, "cache_write_tokens": 148, "cache_write_1h_tokens": 100,
   "output_tokens": 503, "reasoning_tokens": 300, "web_search_count": 2, "service_tier": "standard",
   "model": "claude-sonnet-5", "generation_id": "msg_1"}'),
('message, everything null', 'anthropic',
 '{"input_tokens": 10, "output_tokens": 4, "cache_read_input_tokens": null, "cache_creation_input_tokens": null,
   "cache_creation": null, "server_tool_use": null, "service_tier": null, "iterations": null}',
 '{"input_tokens": 10, "output_tokens": 4}'),
('writes without a split', 'anthropic',
 '{"input_tokens": 10, "output_tokens": 4, "cache_read_input_tokens": 0, "cache_creation_input_tokens": 90}',
 '{"input_tokens": 100, "cache_read_tokens": 0, "cache_write_tokens": 90, "output_tokens": 4}'),
('message_delta', 'anthropic',
 '{"type": "message_delta", "delta": {"stop_reason": "end_turn"},
   "usage": {"input_tokens": 472, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 28, "output_tokens": 89}}',
 '{"input_tokens": 500, "cache_read_tokens": 28, "cache_write_tokens": 0, "output_tokens": 89}'),
('line of a batch', 'anthropic',
 '{"custom_id": "a", "result": {"type": "succeeded", "message": {"id": "msg_2", "model": "claude-haiku-5",
   "usage": {"input_tokens": 11, "output_tokens": 36, "service_tier": "batch"}}}}',
 '{"input_tokens": 11, "output_tokens": 36, "service_tier": "batch", "model": "claude-haiku-5", "generation_id": "msg_2"}'),
('fast mode', 'anthropic',
 '{"input_tokens": 11, "output_tokens": 36, "service_tier": "standard", "speed": "fast"}',
 '{"input_tokens": 11, "output_tokens": 36, "service_tier": "fast"}'),
('compaction is not in the totals', 'anthropic',
 '{"input_tokens": 23000, "output_tokens": 1000, "iterations": [
	{"type": "compaction", "input_tokens": 180000, "output_tokens": 3500},
	{"type": "message", "input_tokens": 23000, "output_tokens": 1000}]}',
 '{"input_tokens": 203000, "output_tokens": 4500}');

--
-- Gemini
--
INSERT INTO example VALUES
('thinking', 'gemini',
 '{"promptTokenCount": 9, "candidatesTokenCount": 1, "thoughtsTokenCount": 21, "totalTokenCount": 31}',
 '{"input_tokens": 9, "output_tokens": 22, "reasoning_tokens": 21}'),
('last chunk with tools, cache and modalities', 'gemini', '{
	"candidates": [{"content": {"parts": [{"text": "..."}]}, "finishReason": "STOP"}],
	"modelVersion": "gemini-3-pro", "responseId": "abc",
	"usageMetadata": {"promptTokenCount": 4583, "cachedContentTokenCount": 2047, "toolUsePromptTokenCount": 100,
		"candidatesTokenCount": 325, "thoughtsTokenCount": 874, "totalTokenCount": 5882,
		"promptTokensDetails": [{"modality": "TEXT", "tokenCount": 2477}, {"modality": "AUDIO", "tokenCount": 300},
			{"modality": "IMAGE", "tokenCount": 1548}, {"modality": "DOCUMENT", "tokenCount": 258}],
		"cacheTokensDetails": [{"modality": "TEXT", "tokenCount": 1040}, {"modality": "AUDIO", "tokenCount": 200},
			{"modality": "IMAGE", "tokenCount": 807}],
		"candidatesTokensDetails": [{"modality": "TEXT", "tokenCount": 325}],
		"toolUsePromptTokensDetails": [{"modality": "TEXT", "tokenCount": 100}],
		"trafficType": "ON_DEMAND"}}',
 '{"input_tokens": 4683, "cache_read_tokens": 2047, "output_tokens": 1199, "reasoning_tokens": 874,
   "units": {"input_audio_tokens": 300, "input_image_tokens": 999, "cache_read_audio_tokens": 200},
   "service_tier": "on_demand", "model": "gemini-3-pro", "generation_id": "abc"}'),
('cached tokens in the list only', 'gemini',
 '{"promptTokenCount": 100, "candidatesTokenCount": 5, "totalTokenCount": 105, "cachedContentTokenCount": null,
   "cacheTokensDetails": [{"modality": "TEXT", "tokenCount": 40}], "thoughtsTokenCount": null}',
 '{"input_tokens": 100, "cache_read_tokens": 40, "output_tokens": 5}'),
('generated image', 'gemini',
 '{"promptTokenCount": 20, "candidatesTokenCount": 1300, "totalTokenCount": 1320,
   "candidatesTokensDetails": [{"modality": "IMAGE", "tokenCount": 1290}, {"modality": "TEXT", "tokenCount": 10}],
   "trafficType": "ON_DEMAND_FLEX"}',
 '{"input_tokens": 20, "output_tokens": 1300, "units": {"output_image_tokens": 1290}, "service_tier": "flex"}'),
('dump of the SDK for Python', 'gemini',
 '{"model_version": "gemini-2.5-flash", "response_id": "xyz", "usage_metadata": {"prompt_token_count": 7,
   "candidates_token_count": 3, "thoughts_token_count": 2, "total_token_count": 12,
   "prompt_tokens_details": [{"modality": "AUDIO", "token_count": 5}], "cached_content_token_count": null}}',
 '{"input_tokens": 7, "output_tokens": 5, "reasoning_tokens": 2, "units": {"input_audio_tokens": 5},
   "model": "gemini-2.5-flash", "generation_id": "xyz"}'),
('Live API', 'gemini',
 '{"promptTokenCount": 100, "responseTokenCount": 50, "totalTokenCount": 150,
   "responseTokensDetails": [{"modality": "AUDIO", "tokenCount": 50}]}',
 '{"input_tokens": 100, "output_tokens": 50, "units": {"output_audio_tokens": 50}}'),
('nothing but a prompt', 'gemini', '{"usageMetadata": {"promptTokenCount": 100, "totalTokenCount": 100}}',
 '{"input_tokens": 100}');

--
-- Bedrock
--
INSERT INTO example VALUES
('Converse', 'bedrock', '{
	"ResponseMetadata": {"RequestId": "5f-1"}, "stopReason": "end_turn", "metrics": {"latencyMs": 551},
	"serviceTier": {"type": "priority"},
	"usage": {"inputTokens": 30, "outputTokens": 628, "totalTokens": 1758, "cacheReadInputTokens": 800,
		"cacheWriteInputTokens": 300, "cacheDetails": [{"ttl": "1h", "inputTokens": 100}, {"ttl": "5m", "inputTokens": 200}]}}',
 '{"input_tokens": 1130, "cache_read_tokens": 800, "cache_write_tokens": 200, "cache_write_1h_tokens": 100,
   "output_tokens": 628, "service_tier": "priority", "generation_id": "5f-1"}'),
('total without the cache', 'bedrock',
 '{"inputTokens": 10, "outputTokens": 4, "totalTokens": 14, "cacheReadInputTokens": 2, "cacheWriteInputTokens": 1}',
 '{"input_tokens": 13, "cache_read_tokens": 2, "cache_write_tokens": 1, "output_tokens": 4}'),
('last event of a stream', 'bedrock',
 '{"metadata": {"usage": {"inputTokens": 10, "outputTokens": 4, "totalTokens": 14}, "metrics": {"latencyMs": 9}}}',
 '{"input_tokens": 10, "output_tokens": 4}'),
('InvokeModel metrics', 'bedrock',
 '{"type": "message_stop", "amazon-bedrock-invocationMetrics": {"inputTokenCount": 10, "outputTokenCount": 4,
   "cacheReadInputTokenCount": 5, "cacheWriteInputTokenCount": 0, "invocationLatency": 900}}',
 '{"input_tokens": 15, "cache_read_tokens": 5, "cache_write_tokens": 0, "output_tokens": 4}');

--
-- OpenRouter
--
INSERT INTO example VALUES
('cost in credits', 'openrouter', '{
	"id": "gen-1", "provider": "Anthropic", "model": "anthropic/claude-sonnet-5", "usage": {
	"prompt_tokens": 194, "completion_tokens": 2, "total_tokens": 196, "cost": 0.95, "is_byok": false,
	"cost_details": {"upstream_inference_cost": 0.95},
	"prompt_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 100, "audio_tokens": 0},
	"completion_tokens_details": {"reasoning_tokens": 0, "image_tokens": 0},
	"server_tool_use": {"web_search_requests": 1}}}',
 '{"input_tokens": 194, "cache_read_tokens": 0, "cache_write_tokens": 100, "output_tokens": 2,
   "reasoning_tokens": 0, "web_search_count": 1, "provider_cost": 0.95,
   "model": "anthropic/claude-sonnet-5", "generation_id": "gen-1"}'),
('own key: fee and charge', 'openrouter',
 '{"prompt_tokens": 1396, "completion_tokens": 41, "total_tokens": 1437, "cost": 0.000008005, "is_byok": true,
   "cost_details": {"upstream_inference_cost": 0.0001601}}',
 '{"input_tokens": 1396, "output_tokens": 41, "provider_cost": 0.000168105}'),
('own key, charge unknown', 'openrouter',
 '{"prompt_tokens": 10, "completion_tokens": 4, "cost": 0, "is_byok": true, "cost_details": {"upstream_inference_cost": null}}',
 '{"input_tokens": 10, "output_tokens": 4}'),
('not own key: the charge is in it', 'openrouter',
 '{"prompt_tokens": 10, "completion_tokens": 4, "cost": 0.01, "cost_details": {"upstream_inference_cost": 19}}',
 '{"input_tokens": 10, "output_tokens": 4, "provider_cost": 0.01}'),
('free', 'openrouter', '{"prompt_tokens": 10, "completion_tokens": 4, "cost": 0}',
 '{"input_tokens": 10, "output_tokens": 4, "provider_cost": 0}'),
('all digits', 'openrouter',
 '{"prompt_tokens": 10, "completion_tokens": 4, "cost": 0.1234567890123456789012345}',
 '{"input_tokens": 10, "output_tokens": 4, "provider_cost": 0.1234567890123456789012345}'),
('Messages endpoint', 'openrouter',
 '{"id": "gen-2", "usage": {"input_tokens": 10, "cache_read_input_tokens": 90, "cache_creation_input_tokens": 0,
   "output_tokens": 4, "cost": 0.002, "is_byok": false}}',
 '{"input_tokens": 100, "cache_read_tokens": 90, "cache_write_tokens": 0, "output_tokens": 4,
   "provider_cost": 0.002, "generation_id": "gen-2"}');

--
-- Groq, xAI, DeepSeek, Mistral
--
INSERT INTO example VALUES
('chat', 'groq', '{
	"id": "chatcmpl-g", "model": "openai/gpt-oss-120b", "service_tier": "on_demand", "x_groq": {"id": "req_1"},
	"usage": {"queue_time": 0.03, "prompt_tokens": 400, "prompt_time": 0.01, "completion_tokens": 90,
		"completion_time": 0.2, "total_tokens": 490, "total_time": 0.21,
		"prompt_tokens_details": {"cached_tokens": 256}, "completion_tokens_details": {"reasoning_tokens": 60}}}',
 '{"input_tokens": 400, "cache_read_tokens": 256, "output_tokens": 90, "reasoning_tokens": 60,
   "service_tier": "on_demand", "model": "openai/gpt-oss-120b", "generation_id": "chatcmpl-g"}'),
('last chunk', 'groq',
 '{"id": "chatcmpl-h", "model": "llama-4", "choices": [], "usage": null,
   "x_groq": {"id": "req_2", "usage": {"prompt_tokens": 4, "completion_tokens": 9, "total_tokens": 13}}}',
 '{"input_tokens": 4, "output_tokens": 9, "model": "llama-4", "generation_id": "chatcmpl-h"}'),
('chat, reasoning beside the completion', 'xai', '{
	"id": "x-1", "model": "grok-4", "usage": {
	"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 170,
	"prompt_tokens_details": {"text_tokens": 100, "audio_tokens": 0, "image_tokens": 0, "cached_tokens": 64},
	"completion_tokens_details": {"reasoning_tokens": 50, "audio_tokens": 0},
	"num_sources_used": 0, "cost_in_usd_ticks": 37756000}}',
 '{"input_tokens": 100, "cache_read_tokens": 64, "output_tokens": 70, "reasoning_tokens": 50,
   "provider_cost": 0.0037756, "model": "grok-4", "generation_id": "x-1"}'),
('chat, reasoning inside', 'xai',
 '{"prompt_tokens": 100, "completion_tokens": 70, "total_tokens": 170, "completion_tokens_details": {"reasoning_tokens": 50}}',
 '{"input_tokens": 100, "output_tokens": 70, "reasoning_tokens": 50}'),
('chat without a total', 'xai',
 '{"prompt_tokens": 100, "completion_tokens": 20, "completion_tokens_details": {"reasoning_tokens": 50}}',
 '{"input_tokens": 100, "output_tokens": 70, "reasoning_tokens": 50}'),
('responses', 'xai',
 '{"input_tokens": 21365, "input_tokens_details": {"cached_tokens": 10496}, "output_tokens": 3646,
   "output_tokens_details": {"reasoning_tokens": 600}, "total_tokens": 25011, "num_server_side_tools_used": 11,
   "cost_in_usd_ticks": 648004500, "server_side_tool_usage_details": {"web_search_calls": 3, "x_search_calls": 8},
   "context_details": {"input_tokens": 12334, "output_tokens": 3184}}',
 '{"input_tokens": 21365, "cache_read_tokens": 10496, "output_tokens": 3646, "reasoning_tokens": 600,
   "web_search_count": 3, "units": {"x_search": 8}, "provider_cost": 0.06480045}'),
('half a nano-dollar', 'xai', '{"cost_in_usd_ticks": 5}', '{"provider_cost": 0.0000000005}'),
('image', 'xai', '{"data": [{"url": "https://example.com/1"}], "usage": {"cost_in_usd_ticks": 200000000}}',
 '{"units": {"image": 1}, "provider_cost": 0.02}'),
('hits and misses', 'deepseek',
 '{"id": "d-1", "model": "deepseek-v4", "usage": {"prompt_tokens": 116, "prompt_cache_hit_tokens": 64,
   "prompt_cache_miss_tokens": 52, "completion_tokens": 20, "total_tokens": 136,
   "prompt_tokens_details": {"cached_tokens": 64}, "completion_tokens_details": {"reasoning_tokens": 11}}}',
 '{"input_tokens": 116, "cache_read_tokens": 64, "output_tokens": 20, "reasoning_tokens": 11,
   "model": "deepseek-v4", "generation_id": "d-1"}'),
('chat', 'mistral',
 '{"id": "m-1", "model": "mistral-large-latest", "usage": {"prompt_tokens": 40, "completion_tokens": 7, "total_tokens": 47,
   "prompt_audio_seconds": {}, "prompt_tokens_details": {"cached_tokens": 32}}}',
 '{"input_tokens": 40, "cache_read_tokens": 32, "output_tokens": 7, "model": "mistral-large-latest", "generation_id": "m-1"}'),
('transcription: audio is in the total only', 'mistral',
 '{"prompt_audio_seconds": 203, "prompt_tokens": 4, "completion_tokens": 635, "total_tokens": 3945}',
 '{"input_tokens": 4, "output_tokens": 635, "units": {"audio_second": 203}}'),
('OCR', 'mistral',
 '{"pages": [], "model": "mistral-ocr-latest", "usage_info": {"pages_processed": 29, "doc_size_bytes": 3002783}}',
 '{"units": {"page": 29}, "model": "mistral-ocr-latest"}');

--
-- Cohere: what it bills, not the tokens of its templates beside that
--
INSERT INTO example VALUES
('chat', 'cohere', '{
	"id": "c14c80c3", "finish_reason": "COMPLETE", "message": {"role": "assistant"},
	"usage": {"billed_units": {"input_tokens": 5, "output_tokens": 418},
		"tokens": {"input_tokens": 71, "output_tokens": 421}, "cached_tokens": 64}}',
 '{"input_tokens": 5, "output_tokens": 418, "generation_id": "c14c80c3"}'),
('last event of a stream', 'cohere',
 '{"type": "message-end", "delta": {"finish_reason": "COMPLETE", "usage": {
	"billed_units": {"input_tokens": 17, "output_tokens": 12}, "tokens": {"input_tokens": 215, "output_tokens": 12}}}}',
 '{"input_tokens": 17, "output_tokens": 12}'),
('version 1', 'cohere',
 '{"generation_id": "0385c7cf", "meta": {"api_version": {"version": "1"},
	"billed_units": {"input_tokens": 3, "output_tokens": 7}, "tokens": {"input_tokens": 69, "output_tokens": 9}}}',
 '{"input_tokens": 3, "output_tokens": 7, "generation_id": "0385c7cf"}'),
('last event of a stream of version 1', 'cohere',
 '{"event_type": "stream-end", "response": {"generation_id": "9f4b", "meta": {
	"billed_units": {"input_tokens": 4, "output_tokens": 8, "search_units": 1}}}}',
 '{"input_tokens": 4, "output_tokens": 8, "units": {"query": 1}, "generation_id": "9f4b"}'),
('embed', 'cohere',
 '{"id": "5807ee2e", "embeddings": {}, "meta": {"api_version": {"version": "2"}, "billed_units": {"input_tokens": 2, "images": 1}}}',
 '{"input_tokens": 2, "units": {"image": 1}, "generation_id": "5807ee2e"}'),
('rerank', 'cohere',
 '{"id": "07734bd2", "results": [], "meta": {"billed_units": {"search_units": 1}}}',
 '{"units": {"query": 1}, "generation_id": "07734bd2"}');

--
-- AI SDK
--
INSERT INTO example VALUES
('provider interface of version 6', 'ai_sdk',
 '{"inputTokens": {"total": 1000, "noCache": 100, "cacheRead": 800, "cacheWrite": 100},
   "outputTokens": {"total": 500, "text": 100, "reasoning": 400}}',
 '{"input_tokens": 1000, "cache_read_tokens": 800, "cache_write_tokens": 100, "output_tokens": 500, "reasoning_tokens": 400}'),
('version 6 without totals', 'ai_sdk',
 '{"inputTokens": {"total": null, "noCache": 100, "cacheRead": 800, "cacheWrite": null},
   "outputTokens": {"text": 100, "reasoning": 400}}',
 '{"input_tokens": 900, "cache_read_tokens": 800, "output_tokens": 500, "reasoning_tokens": 400}'),
('version 6, 1-hour writes in raw', 'ai_sdk',
 '{"inputTokens": {"total": 398, "noCache": 50, "cacheRead": 100, "cacheWrite": 248}, "outputTokens": {"total": 503},
   "raw": {"input_tokens": 50, "cache_read_input_tokens": 100, "cache_creation_input_tokens": 248,
	 "cache_creation": {"ephemeral_5m_input_tokens": 148, "ephemeral_1h_input_tokens": 100},
	 "output_tokens": 503, "service_tier": "priority", "server_tool_use": {"web_search_requests": 1}}}',
 '{"input_tokens": 398, "cache_read_tokens": 100, "cache_write_tokens": 148, "cache_write_1h_tokens": 100,
   "output_tokens": 503, "web_search_count": 1, "service_tier": "priority"}'),
('version 6, raw of Gemini with audio', 'ai_sdk',
 '{"inputTokens": {"total": 70, "noCache": 70, "cacheRead": 0}, "outputTokens": {"total": 30, "text": 10, "reasoning": 20},
   "raw": {"promptTokenCount": 70, "candidatesTokenCount": 10, "thoughtsTokenCount": 20, "totalTokenCount": 100,
	 "promptTokensDetails": [{"modality": "AUDIO", "tokenCount": 64}], "trafficType": "ON_DEMAND_PRIORITY"}}',
 '{"input_tokens": 70, "cache_read_tokens": 0, "output_tokens": 30, "reasoning_tokens": 20,
   "units": {"input_audio_tokens": 64}, "service_tier": "priority"}'),
('result of version 6 through the gateway', 'ai_sdk', '{
	"usage": {"inputTokens": 3691, "inputTokenDetails": {"noCacheTokens": 1771, "cacheReadTokens": 1920, "cacheWriteTokens": 0},
		"outputTokens": 229, "outputTokenDetails": {"textTokens": 29, "reasoningTokens": 200},
		"totalTokens": 3920, "reasoningTokens": 200, "cachedInputTokens": 1920},
	"totalUsage": {"inputTokens": 3691, "outputTokens": 229, "totalTokens": 3920},
	"response": {"id": "resp_9", "modelId": "openai/gpt-5", "timestamp": "2026-10-01T00:00:00Z"},
	"providerMetadata": {"openai": {"responseId": "resp_9", "serviceTier": "default"},
		"gateway": {"routing": {"finalProvider": "openai"}, "cost": "0.0091175", "marketCost": "0.0091175", "generationId": "gen_1"}}}',
 '{"input_tokens": 3691, "cache_read_tokens": 1920, "cache_write_tokens": 0, "output_tokens": 229, "reasoning_tokens": 200,
   "provider_cost": 0.0091175, "service_tier": "default", "model": "openai/gpt-5", "generation_id": "gen_1"}'),
('gateway: paid with credits', 'ai_sdk',
 '{"usage": {"inputTokens": 282, "outputTokens": 21, "totalTokens": 303},
   "providerMetadata": {"gateway": {"cost": "0", "marketCost": "0.000011844"}}}',
 '{"input_tokens": 282, "output_tokens": 21, "provider_cost": 0.000011844}'),
('gateway: free', 'ai_sdk',
 '{"usage": {"inputTokens": 282, "outputTokens": 21}, "providerMetadata": {"gateway": {"cost": "0", "marketCost": "0"}}}',
 '{"input_tokens": 282, "output_tokens": 21, "provider_cost": 0}'),
('version 5', 'ai_sdk',
 '{"inputTokens": 1000, "outputTokens": 100, "totalTokens": 1100, "reasoningTokens": 30, "cachedInputTokens": 900}',
 '{"input_tokens": 1000, "cache_read_tokens": 900, "output_tokens": 100, "reasoning_tokens": 30}'),
('version 5, reasoning beside the output', 'ai_sdk',
 '{"inputTokens": 9, "outputTokens": 1, "totalTokens": 31, "reasoningTokens": 21}',
 '{"input_tokens": 9, "output_tokens": 22, "reasoning_tokens": 21}'),
('version 5, Anthropic', 'ai_sdk',
 '{"usage": {"inputTokens": 10, "outputTokens": 4, "totalTokens": 14, "cachedInputTokens": 90},
   "response": {"id": "msg_3", "modelId": "claude-sonnet-4"},
   "providerMetadata": {"anthropic": {"usage": {"input_tokens": 10, "cache_read_input_tokens": 90,
	 "cache_creation_input_tokens": 0, "output_tokens": 4, "service_tier": "standard"}}}}',
 '{"input_tokens": 100, "cache_read_tokens": 90, "cache_write_tokens": 0, "output_tokens": 4,
   "service_tier": "standard", "model": "claude-sonnet-4", "generation_id": "msg_3"}'),
('version 4', 'ai_sdk', '{"promptTokens": 10, "completionTokens": 4, "totalTokens": 14}',
 '{"input_tokens": 10, "output_tokens": 4}'),
('embedding', 'ai_sdk', '{"embeddings": [], "usage": {"tokens": 12}}', '{"input_tokens": 12}'),
('OpenRouter''s provider, own key', 'ai_sdk',
 '{"usage": {"inputTokens": 10, "outputTokens": 4}, "providerMetadata": {"openrouter": {"usage": {"cost": 0, "costDetails": {"upstreamInferenceCost": 0.002}}}}}',
 '{"input_tokens": 10, "output_tokens": 4}'),
('OpenRouter''s provider', 'ai_sdk',
 '{"usage": {"inputTokens": 10, "outputTokens": 4}, "providerMetadata": {"openrouter": {"usage": {"promptTokens": 10, "cost": 0.0015}}}}',
 '{"input_tokens": 10, "output_tokens": 4, "provider_cost": 0.0015}');

--
-- LiteLLM, OpenTelemetry
--
INSERT INTO example VALUES
('Anthropic behind the proxy', 'litellm', '{
	"id": "chatcmpl-l", "model": "claude-opus-5", "_hidden_params": {"response_cost": 0.214375},
	"usage": {"total_tokens": 103925, "prompt_tokens": 98805, "completion_tokens": 5120,
		"prompt_tokens_details": {"text_tokens": null, "audio_tokens": null, "image_tokens": null, "cached_tokens": 66360,
			"cache_creation_tokens": 32435,
			"cache_creation_token_details": {"ephemeral_5m_input_tokens": 32000, "ephemeral_1h_input_tokens": 435}},
		"cache_read_input_tokens": 66360, "cache_creation_input_tokens": 32435,
		"completion_tokens_details": {"text_tokens": null, "audio_tokens": null, "reasoning_tokens": 1710},
		"server_tool_use": {"web_search_requests": 4}}}',
 '{"input_tokens": 98805, "cache_read_tokens": 66360, "cache_write_tokens": 32000, "cache_write_1h_tokens": 435,
   "output_tokens": 5120, "reasoning_tokens": 1710, "web_search_count": 4, "provider_cost": 0.214375,
   "model": "claude-opus-5", "generation_id": "chatcmpl-l"}'),
('row of LiteLLM_SpendLogs', 'litellm',
 '{"request_id": "chatcmpl-0001", "spend": 0.00022500000000000002, "model": "gpt-4o", "prompt_tokens": 10, "completion_tokens": 20,
   "total_tokens": 30, "metadata": {"usage_object": {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 30,
   "prompt_tokens_details": {"cached_tokens": 4}}}}',
 '{"input_tokens": 10, "cache_read_tokens": 4, "output_tokens": 20, "provider_cost": 0.00022500000000000002,
   "model": "gpt-4o", "generation_id": "chatcmpl-0001"}'),
('row of LiteLLM_SpendLogs without usage_object', 'litellm',
 '{"request_id": "chatcmpl-0002", "spend": 0, "model": "gpt-4o", "prompt_tokens": 10, "completion_tokens": 20,
   "total_tokens": 30, "metadata": {"additional_usage_values": {"completion_tokens_details": null}}}',
 '{"input_tokens": 10, "output_tokens": 20, "provider_cost": 0, "model": "gpt-4o", "generation_id": "chatcmpl-0002"}'),
('attributes', 'otel',
 '{"gen_ai.request.model": "gpt-5", "gen_ai.response.model": "gpt-5-2025-08-07", "gen_ai.response.id": "resp_4",
   "openai.response.service_tier": "priority",
   "gen_ai.usage.input_tokens": 100, "gen_ai.usage.output_tokens": 40, "gen_ai.usage.cache_read.input_tokens": 50,
   "gen_ai.usage.cache_creation.input_tokens": 25, "gen_ai.usage.reasoning.output_tokens": 30}',
 '{"input_tokens": 100, "cache_read_tokens": 50, "cache_write_tokens": 25, "output_tokens": 40, "reasoning_tokens": 30,
   "service_tier": "priority", "model": "gpt-5-2025-08-07", "generation_id": "resp_4"}'),
('span in OTLP''s JSON', 'otel',
 '{"name": "chat gpt-5", "attributes": [
	{"key": "gen_ai.request.model", "value": {"stringValue": "gpt-5"}},
	{"key": "gen_ai.response.id", "value": {"stringValue": "resp_5"}},
	{"key": "gen_ai.usage.input_tokens", "value": {"intValue": "100"}},
	{"key": "gen_ai.usage.output_tokens", "value": {"intValue": 40}}]}',
 '{"input_tokens": 100, "output_tokens": 40, "model": "gpt-5", "generation_id": "resp_5"}'),
('older names', 'otel',
 '{"attributes": {"gen_ai.usage.prompt_tokens": 100, "gen_ai.usage.completion_tokens": 40, "gen_ai.usage.cache_read_input_tokens": 60}}',
 '{"input_tokens": 100, "cache_read_tokens": 60, "output_tokens": 40}');

--
-- The last chunk or event of a stream, of the others
--
INSERT INTO example VALUES
('last chunk of a stream', 'openrouter',
 '{"id": "gen-2", "object": "chat.completion.chunk", "model": "anthropic/claude-sonnet-4.5", "provider": "Anthropic",
   "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": null}],
   "usage": {"prompt_tokens": 2000, "completion_tokens": 100, "total_tokens": 2100, "cost": 0.0051, "is_byok": false,
	"prompt_tokens_details": {"cached_tokens": 1000, "cache_write_tokens": 500, "audio_tokens": 0},
	"cost_details": {"upstream_inference_cost": null}, "completion_tokens_details": {"reasoning_tokens": 0}}}',
 '{"input_tokens": 2000, "cache_read_tokens": 1000, "cache_write_tokens": 500, "output_tokens": 100, "reasoning_tokens": 0,
   "provider_cost": 0.0051, "model": "anthropic/claude-sonnet-4.5", "generation_id": "gen-2"}'),
('last chunk of a stream, own key', 'openrouter',
 '{"id": "gen-3", "choices": [], "usage": {"prompt_tokens": 10, "completion_tokens": 4, "total_tokens": 14,
	"cost": 0.00005, "is_byok": true, "cost_details": {"upstream_inference_cost": 0.001}}}',
 '{"input_tokens": 10, "output_tokens": 4, "provider_cost": 0.00105, "generation_id": "gen-3"}'),
('last chunk of a stream', 'xai',
 '{"id": "x-1", "object": "chat.completion.chunk", "model": "grok-4", "choices": [],
   "usage": {"prompt_tokens": 32, "completion_tokens": 9, "total_tokens": 135, "num_sources_used": 0,
	"prompt_tokens_details": {"text_tokens": 32, "audio_tokens": 0, "image_tokens": 0, "cached_tokens": 6},
	"completion_tokens_details": {"reasoning_tokens": 94, "audio_tokens": 0, "accepted_prediction_tokens": 0},
	"cost_in_usd_ticks": 16520000}}',
 '{"input_tokens": 32, "cache_read_tokens": 6, "output_tokens": 103, "reasoning_tokens": 94, "provider_cost": 0.001652,
   "model": "grok-4", "generation_id": "x-1"}'),
('last event of a stream of responses', 'xai',
 '{"type": "response.completed", "response": {"id": "resp_x", "model": "grok-4", "service_tier": "default",
   "usage": {"input_tokens": 32, "input_tokens_details": {"cached_tokens": 6}, "output_tokens": 103,
	"output_tokens_details": {"reasoning_tokens": 94}, "total_tokens": 135}}}',
 '{"input_tokens": 32, "cache_read_tokens": 6, "output_tokens": 103, "reasoning_tokens": 94,
   "service_tier": "default", "model": "grok-4", "generation_id": "resp_x"}'),
('last chunk of a stream, with reasoning', 'deepseek',
 '{"id": "d-1", "object": "chat.completion.chunk", "model": "deepseek-reasoner",
   "choices": [{"index": 0, "delta": {"content": "", "reasoning_content": null}, "finish_reason": "stop"}],
   "usage": {"prompt_tokens": 1300, "completion_tokens": 250, "total_tokens": 1550,
	"prompt_tokens_details": {"cached_tokens": 1280}, "completion_tokens_details": {"reasoning_tokens": 200},
	"prompt_cache_hit_tokens": 1280, "prompt_cache_miss_tokens": 20}}',
 '{"input_tokens": 1300, "cache_read_tokens": 1280, "output_tokens": 250, "reasoning_tokens": 200,
   "model": "deepseek-reasoner", "generation_id": "d-1"}'),
('last chunk of a stream', 'mistral',
 '{"data": {"id": "m-1", "object": "chat.completion.chunk", "model": "mistral-small-latest",
   "choices": [{"index": 0, "delta": {"content": ""}, "finish_reason": "stop"}],
   "usage": {"prompt_tokens": 16, "total_tokens": 50, "completion_tokens": 34}}}',
 '{"input_tokens": 16, "output_tokens": 34, "model": "mistral-small-latest", "generation_id": "m-1"}'),
('cached prompt, reasoning', 'mistral',
 '{"id": "m-2", "model": "magistral-medium-latest", "usage": {"prompt_tokens": 1000, "total_tokens": 1300, "completion_tokens": 300,
   "prompt_tokens_details": {"cached_tokens": 896}, "completion_tokens_details": {"reasoning_tokens": 120}}}',
 '{"input_tokens": 1000, "cache_read_tokens": 896, "output_tokens": 300, "reasoning_tokens": 120,
   "model": "magistral-medium-latest", "generation_id": "m-2"}'),
('message_delta with the cache and 1-hour writes', 'anthropic',
 '{"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": null}, "usage": {"input_tokens": 12,
   "cache_creation_input_tokens": 300, "cache_read_input_tokens": 5000,
   "cache_creation": {"ephemeral_5m_input_tokens": 100, "ephemeral_1h_input_tokens": 200}, "output_tokens": 89,
   "server_tool_use": {"web_search_requests": 1}}}',
 '{"input_tokens": 5312, "cache_read_tokens": 5000, "cache_write_tokens": 100, "cache_write_1h_tokens": 200,
   "output_tokens": 89, "web_search_count": 1}'),
('last event of a stream with the cache', 'bedrock',
 '{"metadata": {"usage": {"inputTokens": 12, "outputTokens": 89, "totalTokens": 5401, "cacheReadInputTokens": 5000,
   "cacheWriteInputTokens": 300, "cacheDetails": [{"inputTokens": 200, "ttl": "1h"}, {"inputTokens": 100, "ttl": "5m"}]},
   "metrics": {"latencyMs": 900}}}',
 '{"input_tokens": 5312, "cache_read_tokens": 5000, "cache_write_tokens": 100, "cache_write_1h_tokens": 200, "output_tokens": 89}'),
('last part of a stream', 'ai_sdk',
 '{"type": "finish", "finishReason": "stop", "totalUsage": {"inputTokens": 1000, "outputTokens": 100, "totalTokens": 1100,
   "reasoningTokens": 30, "cachedInputTokens": 900}}',
 '{"input_tokens": 1000, "cache_read_tokens": 900, "output_tokens": 100, "reasoning_tokens": 30}'),
('last chunk of a stream', 'litellm',
 '{"id": "chatcmpl-s", "object": "chat.completion.chunk", "model": "claude-haiku-4-5", "choices": [],
   "usage": {"prompt_tokens": 5312, "completion_tokens": 89, "total_tokens": 5401, "cache_creation_input_tokens": 300,
	"cache_read_input_tokens": 5000, "prompt_tokens_details": {"cached_tokens": 5000, "cache_creation_tokens": 300}}}',
 '{"input_tokens": 5312, "cache_read_tokens": 5000, "cache_write_tokens": 300, "output_tokens": 89,
   "model": "claude-haiku-4-5", "generation_id": "chatcmpl-s"}'),
('DeepInfra, last chunk of a stream', 'openai',
 '{"id": "chatcmpl-d", "model": "Qwen/Qwen3-235B", "service_tier": "priority", "choices": [],
   "usage": {"prompt_tokens": 11, "completion_tokens": 5, "total_tokens": 16, "estimated_cost": 0.000008775}}',
 '{"input_tokens": 11, "output_tokens": 5, "provider_cost": 0.000008775, "service_tier": "priority",
   "model": "Qwen/Qwen3-235B", "generation_id": "chatcmpl-d"}');

-- Every example comes out as expected: no rows.
SELECT format, name, got, expected
FROM example, pg_temp.normalized(format, raw) AS got
WHERE got IS DISTINCT FROM expected
ORDER BY format, name;

-- Each format is covered.
SELECT format, count(*) FROM example GROUP BY format ORDER BY format COLLATE "C";

-- Subsets fit in their totals, whatever the dialect.
SELECT format, name
FROM example, aibilling.normalize_usage(format, raw) AS n
WHERE coalesce(cache_read_tokens, 0) + coalesce(cache_write_tokens, 0) + coalesce(cache_write_1h_tokens, 0)
	> coalesce(input_tokens, 0)
   OR coalesce(reasoning_tokens, 0) > coalesce(output_tokens, 0)
   OR coalesce((units->>'cache_read_audio_tokens')::bigint, 0) > coalesce((units->>'input_audio_tokens')::bigint, 0);

-- One call, told in every dialect: 700 plain + 200 read + 100 written, 300 out
-- of which 120 are reasoning.  The columns are the same.
SELECT pg_temp.normalized(format, raw) - 'provider_cost' AS columns, array_agg(format ORDER BY format COLLATE "C") AS formats
FROM (VALUES
	('openai', '{"prompt_tokens": 1000, "completion_tokens": 300, "total_tokens": 1300, "prompt_tokens_details": {"cached_tokens": 200, "cache_write_tokens": 100}, "completion_tokens_details": {"reasoning_tokens": 120}}'::jsonb),
	('openrouter', '{"prompt_tokens": 1000, "completion_tokens": 300, "cost": 0.01, "prompt_tokens_details": {"cached_tokens": 200, "cache_write_tokens": 100}, "completion_tokens_details": {"reasoning_tokens": 120}}'),
	('xai', '{"prompt_tokens": 1000, "completion_tokens": 180, "total_tokens": 1300, "prompt_tokens_details": {"cached_tokens": 200, "cache_write_tokens": 100}, "completion_tokens_details": {"reasoning_tokens": 120}}'),
	('anthropic', '{"input_tokens": 700, "cache_read_input_tokens": 200, "cache_creation_input_tokens": 100, "output_tokens": 300, "output_tokens_details": {"thinking_tokens": 120}}'),
	('ai_sdk', '{"inputTokens": {"total": 1000, "noCache": 700, "cacheRead": 200, "cacheWrite": 100}, "outputTokens": {"total": 300, "text": 180, "reasoning": 120}}'),
	('litellm', '{"prompt_tokens": 1000, "completion_tokens": 300, "total_tokens": 1300, "cache_read_input_tokens": 200, "cache_creation_input_tokens": 100, "completion_tokens_details": {"reasoning_tokens": 120}}'),
	('otel', '{"gen_ai.usage.input_tokens": 1000, "gen_ai.usage.output_tokens": 300, "gen_ai.usage.cache_read.input_tokens": 200, "gen_ai.usage.cache_creation.input_tokens": 100, "gen_ai.usage.reasoning.output_tokens": 120}')
) AS v(format, raw)
GROUP BY 1;

-- The arithmetic of dialects, over a grid of counts.
WITH grid AS (
	SELECT * FROM unnest(ARRAY[0, 1, 7, 1000000007]::bigint[]) AS plain,
		unnest(ARRAY[0, 3, 5000000000]::bigint[]) AS read,
		unnest(ARRAY[0, 11]::bigint[]) AS write,
		unnest(ARRAY[0, 13, 4000000000]::bigint[]) AS text,
		unnest(ARRAY[0, 17]::bigint[]) AS thought
), said AS (
	SELECT grid.*, n.*
	FROM grid, LATERAL (VALUES
		('anthropic', jsonb_build_object('input_tokens', plain, 'cache_read_input_tokens', read,
			'cache_creation_input_tokens', write, 'output_tokens', text + thought,
			'output_tokens_details', jsonb_build_object('thinking_tokens', thought))),
		('openai', jsonb_build_object('prompt_tokens', plain + read + write, 'completion_tokens', text + thought,
			'total_tokens', plain + read + write + text + thought,
			'prompt_tokens_details', jsonb_build_object('cached_tokens', read, 'cache_write_tokens', write),
			'completion_tokens_details', jsonb_build_object('reasoning_tokens', thought))),
		('xai', jsonb_build_object('prompt_tokens', plain + read + write, 'completion_tokens', text,
			'total_tokens', plain + read + write + text + thought,
			'prompt_tokens_details', jsonb_build_object('cached_tokens', read, 'cache_write_tokens', write),
			'completion_tokens_details', jsonb_build_object('reasoning_tokens', thought)))
		) AS v(format, raw), aibilling.normalize_usage(format, raw) AS n
)
SELECT count(*),
	bool_and(input_tokens = plain + read + write) AS input,
	bool_and(cache_read_tokens = read AND cache_write_tokens = write) AS cache,
	bool_and(output_tokens = text + thought) AS output,
	bool_and(reasoning_tokens = thought) AS reasoning
FROM said;

--
-- What contradicts itself is refused, with the numbers and fields
--
SELECT format, pg_temp.normalized(format, raw) #>> '{}' AS reason
FROM (VALUES
	('openai', '{"prompt_tokens": 10, "completion_tokens": 19, "total_tokens": 30}'::jsonb),
	('openai', '{"prompt_tokens": 10, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 20}}'),
	('openai', '{"prompt_tokens": 10, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 8, "cache_write_tokens": 3}}'),
	('openai', '{"prompt_tokens": 10, "completion_tokens": 5, "completion_tokens_details": {"reasoning_tokens": 6}}'),
	('openai', '{"prompt_tokens": 10, "completion_tokens": 5, "completion_tokens_details": {"reasoning_tokens": 4, "audio_tokens": 2}}'),
	('openai', '{"prompt_tokens": 10, "completion_tokens": 5, "prompt_tokens_details": {"audio_tokens": 11}}'),
	('openai', '{"prompt_tokens": 10, "completion_tokens": 5, "prompt_tokens_details": {"audio_tokens": 8, "cached_tokens": 6}}'),
	('openai', '{"prompt_tokens": -1, "completion_tokens": 5}'),
	('openai', '{"prompt_tokens": 1.5, "completion_tokens": 5}'),
	('openai', '{"prompt_tokens": "10", "completion_tokens": 5}'),
	('openai', '{"prompt_tokens": true, "completion_tokens": 5}'),
	('openai', '{"prompt_tokens": {"a": 1}, "completion_tokens": 5}'),
	('openai', '{"prompt_tokens": 9223372036854775808, "completion_tokens": 5}'),
	('openai', '{"prompt_tokens": 1e400, "completion_tokens": 5}'),
	('openai', '{"prompt_tokens": 9223372036854775807, "completion_tokens": 1}'),
	('openai', '{"prompt_tokens": 10, "completion_tokens": 5, "prompt_tokens_details": 3}'),
	('openai', '{"completion_tokens": 5}'),
	('openai', '{"total_tokens": 5}'),
	('openai', '{"usage": {"input_tokens": 10, "cache_read_input_tokens": 90, "output_tokens": 4}}'),
	('openai', '{"usage": {"type": "duration", "seconds": -3}}'),
	('openai', '{"input_tokens": 10, "output_tokens": 5, "requests": 2}'),
	('openai', '{"input_tokens": 10, "output_tokens": 5, "total_tokens": 15, "input_token_details": {"cache_creation": 4, "ephemeral_5m_input_tokens": 3, "ephemeral_1h_input_tokens": 2}}'),
	('openai', '{"prompt_tokens": 1, "completion_tokens": 1, "estimated_cost": "a lot"}'),
	('anthropic', '{"input_tokens": 1, "output_tokens": 1, "cache_creation_input_tokens": 10, "cache_creation": {"ephemeral_5m_input_tokens": 4, "ephemeral_1h_input_tokens": 5}}'),
	('anthropic', '{"input_tokens": 1, "output_tokens": 1, "cache_creation_input_tokens": 10, "cache_creation": {"ephemeral_1h_input_tokens": 11}}'),
	('anthropic', '{"input_tokens": 1, "output_tokens": 1, "cache_creation_input_tokens": 10, "cache_creation": {"ephemeral_5m_input_tokens": 9}}'),
	('anthropic', '{"type": "message_delta", "usage": {"output_tokens": 15}}'),
	('anthropic', '{"input_tokens": 15}'),
	('anthropic', '{"type": "message_start", "message": {"id": "msg_1", "usage": {"input_tokens": 25, "output_tokens": 1}}}'),
	('anthropic', '{"input_tokens": 9223372036854775807, "cache_read_input_tokens": 1, "output_tokens": 1}'),
	('anthropic', '{"input_tokens": 1, "output_tokens": 1, "iterations": [{"type": "advisor_message", "model": "x", "input_tokens": 5, "output_tokens": 5}]}'),
	('gemini', '{"promptTokenCount": 9, "candidatesTokenCount": 1, "thoughtsTokenCount": 21, "totalTokenCount": 32}'),
	('gemini', '{"promptTokenCount": 9, "toolUsePromptTokenCount": 2, "candidatesTokenCount": 1, "totalTokenCount": 10}'),
	('gemini', '{"promptTokenCount": 9, "candidatesTokenCount": 1, "promptTokensDetails": [{"modality": "AUDIO", "tokenCount": 10}]}'),
	('gemini', '{"promptTokenCount": 9, "candidatesTokenCount": 1, "promptTokensDetails": [7]}'),
	('gemini', '{"promptTokenCount": 9, "candidatesTokenCount": 1, "promptTokensDetails": {"modality": "AUDIO", "tokenCount": 9}}'),
	('gemini', '{"promptTokenCount": 100, "cachedContentTokenCount": 60, "candidatesTokenCount": 1, "promptTokensDetails": [{"modality": "IMAGE", "tokenCount": 70}]}'),
	('gemini', '{"promptTokenCount": 100, "candidatesTokenCount": 1, "promptTokensDetails": [{"modality": "IMAGE", "tokenCount": 10}], "cacheTokensDetails": [{"modality": "IMAGE", "tokenCount": 11}]}'),
	('ai_sdk', '{"usage": {"inputTokens": 10, "outputTokens": 4}, "totalUsage": {"inputTokens": 10, "outputTokens": 9}}'),
	('anthropic', '{"input_tokens": 1, "output_tokens": 1, "iterations": 2}'),
	('bedrock', '{"inputTokens": 10, "outputTokens": 4, "totalTokens": 15, "cacheReadInputTokens": 2}'),
	('bedrock', '{"inputTokens": 10, "outputTokens": 4, "cacheWriteInputTokens": 5, "cacheDetails": [{"ttl": "2h", "inputTokens": 5}]}'),
	('openrouter', '{"prompt_tokens": 10, "completion_tokens": 4, "cost": -0.1}'),
	('openrouter', '{"prompt_tokens": 10, "completion_tokens": 4, "cost": "NaN"}'),
	('openrouter', '{"prompt_tokens": 10, "completion_tokens": 4, "cost": 1e300}'),
	('openrouter', '{"prompt_tokens": 10, "completion_tokens": 4, "cost": 1, "is_byok": "yes"}'),
	('xai', '{"prompt_tokens": 10, "completion_tokens": 4, "total_tokens": 15, "completion_tokens_details": {"reasoning_tokens": 3}}'),
	('cohere', '{"usage": {"tokens": {"input_tokens": 71, "output_tokens": 421}}}'),
	('cohere', '{"usage": {"billed_units": {"output_tokens": 421}}}'),
	('deepseek', '{"prompt_tokens": 116, "prompt_cache_hit_tokens": 64, "prompt_cache_miss_tokens": 53, "completion_tokens": 20}'),
	('ai_sdk', '{"inputTokens": {"total": 1000, "noCache": 1000, "cacheRead": 800}, "outputTokens": {"total": 5}}'),
	('ai_sdk', '{"inputTokens": 10, "outputTokens": 4, "totalTokens": 14, "cachedInputTokens": 90}'),
	('ai_sdk', '{"inputTokens": {"total": 70}, "outputTokens": {"total": 30}, "raw": {"prompt_tokens": 71, "completion_tokens": 30}}'),
	('ai_sdk', '{"usage": {"inputTokens": 10, "outputTokens": 4}, "totalUsage": {"inputTokens": 30, "outputTokens": 9}}'),
	('ai_sdk', '{"usage": {"inputTokens": 10, "outputTokens": 4}, "providerMetadata": {"gateway": {"cost": "1e999999999"}}}'),
	('otel', '{"attributes": [{"key": "gen_ai.usage.input_tokens", "value": {"stringValue": "many"}}]}')
) AS v(format, raw);

-- A number that nothing reads is refused, with its path.
SELECT format, pg_temp.normalized(format, raw) #>> '{}' AS reason
FROM (VALUES
	('openai', '{"prompt_tokens": 10, "completion_tokens": 5, "future_tokens": 1}'::jsonb),
	('openai', '{"prompt_tokens": 10, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 0, "levels": [{"cached_far": 3}]}}'),
	('openai', '{"usage": {"prompt_tokens": 10, "completion_tokens": 5}, "other_usage": {"tokens": 7}}'),
	('openai', '{"prompt_tokens": 10, "input_tokens": 11, "completion_tokens": 5}'),
	('anthropic', '{"input_tokens": 10, "output_tokens": 5, "cache_creation": {"ephemeral_1d_input_tokens": 7}}'),
	('gemini', '{"promptTokenCount": 9, "candidatesTokenCount": 1, "cacheStorageTokenCount": 4}'),
	('bedrock', '{"inputTokens": 10, "outputTokens": 4, "guardrailUnits": 2}'),
	('cohere', '{"usage": {"billed_units": {"input_tokens": 5, "output_tokens": 1, "classifications": 2}}}'),
	('ai_sdk', '{"inputTokens": 10, "outputTokens": 4, "imageTokens": 3}'),
	('otel', '{"gen_ai.usage.input_tokens": 10, "gen_ai.usage.output_tokens": 5, "gen_ai.usage.tool_searches": 2}')
) AS v(format, raw);

-- Where the cost is reported, it is a doubt: told by a NOTICE once a statement.
SELECT input_tokens, cache_read_tokens, output_tokens, reasoning_tokens, provider_cost
FROM (VALUES
	('{"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 99, "cost": 0.5}'::jsonb),
	('{"prompt_tokens": 10, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 11}, "cost": 0.5}')
) AS v(raw), aibilling.normalize_usage('openrouter', raw);
SELECT input_tokens, output_tokens, reasoning_tokens, provider_cost
FROM aibilling.normalize_usage('openrouter', '{"prompt_tokens": -10, "completion_tokens": 5, "cost": 0.5,
	"completion_tokens_details": {"reasoning_tokens": 6}, "future_tokens": 3}');
-- A cost that is none is no cost.
SELECT pg_temp.normalized('openrouter', '{"prompt_tokens": 10, "completion_tokens": 5, "cost": -0.5}') #>> '{}' AS reason;

-- What is not recognised is refused, too.
SELECT format, pg_temp.normalized(format, raw) #>> '{}' AS reason
FROM (VALUES
	('openai', '{}'::jsonb),
	('openai', 'null'),
	('openai', '[]'),
	('openai', '42'),
	('openai', '"prompt_tokens"'),
	('openai', '{"usage": null, "choices": []}'),
	('openai', '{"usage": 5}'),
	('openai', '{"usage": {}}'),
	('openai', '{"usage": {"promptTokenCount": 5}}'),
	('gemini', '{"prompt_tokens": 5, "completion_tokens": 5}'),
	('otel', '{"attributes": []}')
) AS v(format, raw);

-- Depth and size do no harm.
SELECT pg_temp.normalized('openai', (repeat('{"usage":', 5000) || '1' || repeat('}', 5000))::jsonb) #>> '{}' AS deep;
SELECT pg_temp.normalized('openai', jsonb_build_object('model', 'm', 'usage',
	jsonb_build_object('prompt_tokens', 1, 'completion_tokens', 2),
	'output', (SELECT jsonb_agg(jsonb_build_object('type', 'web_search_call')) FROM generate_series(1, 20000)))) AS long;
SELECT pg_temp.normalized('openai', jsonb_build_object('prompt_tokens', repeat('9', 5000)::numeric)) #>> '{}' AS wide;

-- Unknown formats are errors with a hint; NULL in, NULL out.
SELECT aibilling.normalize_usage('opnai', '{}');
SELECT aibilling.normalize_usage('Anthropic', '{}');
SELECT aibilling.normalize_usage('', '{}');
SELECT aibilling.normalize_usage('something else entirely', '{}');
SELECT aibilling.normalize_usage('openai', '{"prompt_tokens": -1}');
SELECT aibilling.normalize_usage('openai', NULL) IS NULL AS null_raw,
	aibilling.normalize_usage(NULL, '{}') IS NULL AS null_format;

-- Everyone may call it.
CREATE ROLE regress_normalize;
SET ROLE regress_normalize;
SELECT input_tokens FROM aibilling.normalize_usage('openai', '{"prompt_tokens": 1}');
RESET ROLE;
DROP ROLE regress_normalize;
