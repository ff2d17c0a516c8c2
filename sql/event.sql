-- The event that is made of a row, as preview() shows it.
SET timezone = 'UTC';
SET client_min_messages = error;
CREATE SERVER templates FOREIGN DATA WRAPPER polar OPTIONS (url 'http://127.0.0.1:1', event_name 'ai.{provider}.{model}');
SELECT aibilling.create_usage_table('e', server => 'templates');
INSERT INTO aibilling.price (provider, model, input, cache_write, cache_write_1h) VALUES ('pen', 'm', 1, 1, 1);

-- An amount has at most 15 digits and 12 decimals, and is rounded once.
INSERT INTO e (external_customer_id, provider_cost) VALUES
	('c', 0.000000000000015), ('c', 0.0000000000000149), ('c', 0.0000000000049999999), ('c', 0.00000000000499999),
	('c', 1.2345678901234449), ('c', 1.2345678901234451), ('c', 345.678901234564999), ('c', 345.678901234565),
	('c', 0.00999999999999996), ('c', 999.99), ('c', 0.1), ('c', 0), ('c', 7),
	('c', 12.34567890123456), ('c', 8), ('c', 100), ('c', 5), ('c', 5.25), ('c', 0.5);
ALTER TABLE e DISABLE TRIGGER USER; -- a cost that we have not rounded, and some with zeros at the end
UPDATE e SET cost_cents = 0.0000000000015 WHERE provider_cost = 8;
UPDATE e SET cost_cents = provider_cost * 100.000 WHERE provider_cost IN (5, 5.25, 0.5);
ALTER TABLE e ENABLE TRIGGER USER;
SELECT e.provider_cost, event #> '{metadata,_cost}' AS cost FROM aibilling.preview('e', 100) JOIN e ON e.id = usage_id ORDER BY e.id;
DELETE FROM e;

-- Tokens written into a cache are one sum; those that stay for an hour are told beside it, if there are any.
INSERT INTO e (provider, model, external_customer_id, input_tokens, cache_write_tokens, cache_write_1h_tokens) VALUES
	('pen', 'm', 'c', 20, 3, NULL), ('pen', 'm', 'c', 20, NULL, 4), ('pen', 'm', 'c', 20, 3, 4), ('pen', 'm', 'c', 20, 3, 0),
	('pen', 'm', 'c', 20, NULL, 0), ('pen', 'm', 'c', 20, 0, NULL), ('pen', 'm', 'c', 20, NULL, NULL);
SELECT cache_write_tokens, cache_write_1h_tokens, event #> '{metadata,cache_write_tokens}' AS written,
	event #> '{metadata,cache_write_1h_tokens}' AS for_an_hour
FROM aibilling.preview('e', 100) JOIN e ON e.id = usage_id ORDER BY e.id;
DELETE FROM e;

-- A name's parts that are not there, also in rows that were there before the triggers.
INSERT INTO e (provider, model, external_customer_id, input_tokens, provider_cost) VALUES ('pen', 'm', 'c', 1, 1),
	('pen', NULL, 'c', 1, 1), (NULL, NULL, 'c', 1, 1), ('pen', '', 'c', 1, 1);
ALTER TABLE e DISABLE TRIGGER USER;
UPDATE e SET provider = '' WHERE provider IS NULL;
ALTER TABLE e ENABLE TRIGGER USER;
SELECT provider, model, event ->> 'name' AS name FROM aibilling.preview('e', 100) JOIN e ON e.id = usage_id ORDER BY e.id;
DELETE FROM e;

-- Whom an event is of: a column before a tag, and Polar's own id before another's.
INSERT INTO e (provider_cost, customer_id, external_customer_id, tags) VALUES
	(1, NULL, NULL, '{"polarCustomerId": "6f9c1f5e-0d5c-4b3f-8d3a-0c9f4f1f2a3b", "userId": "e"}'),
	(1, NULL, NULL, '{"userId": "e"}'),
	(1, NULL, 'column', '{"polarCustomerId": "6f9c1f5e-0d5c-4b3f-8d3a-0c9f4f1f2a3b", "userId": "e"}'),
	(1, '6f9c1f5e-0d5c-4b3f-8d3a-0c9f4f1f2a3c', 'column', '{"userId": "e"}');
SELECT event ->> 'customer_id' AS customer_id, event ->> 'external_customer_id' AS external_customer_id
FROM aibilling.preview('e', 100) ORDER BY usage_id;
DELETE FROM e;

-- Metadata of one's own: what Polar would refuse or read as another amount is refused here.
CREATE FUNCTION own_metadata(usage_row jsonb) RETURNS jsonb LANGUAGE sql IMMUTABLE AS $$SELECT usage_row -> 'own'$$;
ALTER TABLE e ADD own jsonb;
ALTER SERVER templates OPTIONS (SET event_name 'e', ADD metadata_function 'public.own_metadata');
INSERT INTO e (external_customer_id, provider_cost, own) SELECT 'c', 1, own::jsonb FROM unnest(ARRAY[
	'{"feature": "chat", "seats": 3, "_cost": {"amount": 12.50, "currency": "usd"}}',
	'{"_cost": {"amount": "0.0000000000015", "currency": "usd"}}',
	'{"_cost": {"amount": "0.000000000001", "currency": "USD"}}',
	'{"_cost": {"amount": 1.5e2, "currency": "usd"}}', '{"_cost": {"amount": "1E-3", "currency": "usd"}}', '{"_cost": {"amount": -7, "currency": "usd"}}', '{"_cost": {"amount": "+7"}}',
	'{"_cost": {"amount": 99999.999999999999}}', '{"_cost": {"amount": 100000}}', '{"_cost": {"amount": "NaN"}}',
	'{"_cost": {"amount": "12 cents"}}', '{"_cost": {"amount": true}}', '{"_cost": {"currency": "usd"}}',
	'{"_cost": {"amount": 1, "currency": "eur"}}', '{"_cost": 5}', '{"_cost": null, "_llm": "", "kept": "x"}',
	'{"_llm": {"vendor": "openai", "model": "gpt-5", "input_tokens": 10, "output_tokens": "5", "total_tokens": 15.0, "cached_input_tokens": null, "prompt": "p", "response": "r", "more": 1}}',
	'{"_llm": {"vendor": "openai", "input_tokens": 10, "output_tokens": 5, "total_tokens": 15}}',
	'{"_llm": {"vendor": 7, "model": "m", "input_tokens": 10, "output_tokens": 5, "total_tokens": 15}}',
	'{"_llm": {"vendor": "v", "model": "m", "input_tokens": 10.5, "output_tokens": 5, "total_tokens": 15}}',
	'{"_llm": {"vendor": "v", "model": "m", "input_tokens": "1e3", "output_tokens": 5, "total_tokens": 15}}',
	'{"_llm": {"vendor": "v", "model": "m", "input_tokens": 1000000000000000000, "output_tokens": 5, "total_tokens": 15}}',
	'["no object"]', '7', '{"nested": {"a": 1}}', '{}']) own;
SELECT own, CASE WHEN state = 'rejected' THEN error ELSE (event -> 'metadata')::text END AS sent
FROM aibilling.preview('e', 100) p JOIN e ON e.id = usage_id ORDER BY e.id;

DROP TABLE e;
DROP FUNCTION own_metadata;
DROP SERVER templates;
DELETE FROM aibilling.price WHERE provider = 'pen';
