/*
 * What a user would write instead: a Node.js script that sends the rows of a
 * table to Polar and marks them as sent.  Several workers share the table by
 * FOR UPDATE SKIP LOCKED; a batch is marked in the transaction that claimed it.
 *
 *   peer.mjs sdk|fetch URL ROWS      (connection: PGHOST and its like)
 *
 * sdk: with the official client; fetch: the request by hand.  Prints, as JSON,
 * the seconds it took and the CPU seconds of this process.
 */
import pg from 'pg';

const BATCH = 1000;
const WORKERS = 4;
const TOKEN = 'polar_oat_bench';
const [how, url, rows] = process.argv.slice(2);

pg.types.setTypeParser(20, Number);

function event(row) {
	const metadata = {
		generation_id: row.generation_id,
		model_id: row.model,
		provider: row.provider,
		input_tokens: row.input_tokens,
		output_tokens: row.output_tokens,
		total_tokens: row.input_tokens + row.output_tokens,
		cost_nanos: row.cost_nanos,
		cost_currency: 'usd',
		external_id: row.external_id,
	};
	if (row.cache_read_tokens !== null)
		metadata.cache_read_tokens = row.cache_read_tokens;
	if (row.reasoning_tokens !== null)
		metadata.reasoning_tokens = row.reasoning_tokens;
	for (const [key, value] of Object.entries(row.tags))
		metadata['tag_' + key] = value;
	return metadata;
}

function forFetch(row) {
	return {
		name: 'llm_usage',
		timestamp: row.occurred_at.toISOString(),
		external_id: row.external_id,
		external_customer_id: row.external_customer_id,
		metadata: {
			...event(row),
			_cost: { amount: row.cost_cents, currency: 'usd' },
			_llm: {
				vendor: row.provider,
				model: row.model,
				input_tokens: row.input_tokens,
				cached_input_tokens: row.cache_read_tokens ?? 0,
				output_tokens: row.output_tokens,
				total_tokens: row.input_tokens + row.output_tokens,
			},
		},
	};
}

function forSdk(row) {
	return {
		name: 'llm_usage',
		timestamp: row.occurred_at,
		externalId: row.external_id,
		externalCustomerId: row.external_customer_id,
		metadata: {
			...event(row),
			cost: { amount: row.cost_cents, currency: 'usd' },
			llm: {
				vendor: row.provider,
				model: row.model,
				inputTokens: row.input_tokens,
				cachedInputTokens: row.cache_read_tokens ?? 0,
				outputTokens: row.output_tokens,
				totalTokens: row.input_tokens + row.output_tokens,
			},
		},
	};
}

async function sender() {
	if (how === 'sdk') {
		const { Polar } = await import('@polar-sh/sdk');
		const polar = new Polar({ accessToken: TOKEN, serverURL: url });
		return (batch) => polar.events.ingest({ events: batch.map(forSdk) });
	}
	return async (batch) => {
		const response = await fetch(url + '/v1/events/ingest', {
			method: 'POST',
			headers: { 'content-type': 'application/json', authorization: `Bearer ${TOKEN}` },
			body: JSON.stringify({ events: batch.map(forFetch) }),
		});
		if (!response.ok)
			throw new Error(`HTTP ${response.status}`);
		return response.json();
	};
}

const send = await sender();
const pool = new pg.Pool({ max: WORKERS });
let sent = 0;

async function worker() {
	const client = await pool.connect();
	for (;;) {
		await client.query('BEGIN');
		const { rows: batch } = await client.query(
			`SELECT * FROM peer WHERE delivered_at IS NULL ORDER BY id LIMIT ${BATCH} FOR UPDATE SKIP LOCKED`);
		if (batch.length === 0)
			break;
		const answer = await send(batch);
		if (answer.inserted !== batch.length)
			throw new Error('not all events were taken');
		await client.query('UPDATE peer SET delivered_at = now() WHERE id = ANY ($1)',
			[batch.map((row) => row.id)]);
		await client.query('COMMIT');
		sent += batch.length;
	}
	await client.query('COMMIT');
	client.release();
}

const started = performance.now();
const cpu = process.cpuUsage();
await Promise.all(Array.from({ length: WORKERS }, worker));
const used = process.cpuUsage(cpu);
await pool.end();
if (sent !== Number(rows))
	throw new Error(`sent ${sent} of ${rows} rows`);
console.log(JSON.stringify({
	seconds: (performance.now() - started) / 1000,
	cpu: (used.user + used.system) / 1e6,
}));
