// One call of a model, as a row of the usage table. The connection is that of PGHOST, PGDATABASE, PGUSER ...
import pg from 'pg';

const pool = new pg.Pool();

// A row that waits for somebody (no customer, no price) is stored all the same, and a WARNING says so.
pool.on('connect', (client) => client.on('notice', ({ severity, message }) => console.warn(`${severity}: ${message}`)));

/**
 * customer: your id of the customer. provider, format: see doc/usage-formats.md. reply: what the SDK returned.
 * key: what makes this call this call, so that it is billed once however often you retry; null: each call is new.
 * Returns cost_cents (text: never make it a Number) and cost_status, or undefined if the key was billed before.
 */
export async function bill({ customer, provider, format, reply, key = null, tags = {} }) {
	const { rows } = await pool.query(
		`INSERT INTO usage (external_id, external_customer_id, provider, usage_format, raw_usage, tags)
		 VALUES ($1, $2, $3, $4, $5, $6)
		 ON CONFLICT (external_id) DO NOTHING
		 RETURNING cost_cents, cost_status`,
		[key, customer, provider, format, JSON.stringify(reply), tags]);
	return rows[0];
}

export const close = () => pool.end();
