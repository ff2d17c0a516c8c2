// The usage table for drizzle, as far as the application uses it: a table may have columns that its ORM does not know.
import { bigint, jsonb, numeric, pgTable, text, timestamp } from 'drizzle-orm/pg-core';
import { drizzle } from 'drizzle-orm/node-postgres';
import { eq, sql } from 'drizzle-orm';
import pg from 'pg';

// The sequence and the defaults are the database's. A bigint or numeric is no Number: it would lose digits.
export const usage = pgTable('usage', {
	id: bigint('id', { mode: 'bigint' }).primaryKey().generatedByDefaultAsIdentity(),
	externalId: text('external_id').notNull().unique().default(sql`gen_random_uuid()`),
	occurredAt: timestamp('occurred_at', { withTimezone: true }).notNull().defaultNow(),
	provider: text('provider'),
	model: text('model'),
	externalCustomerId: text('external_customer_id'),
	inputTokens: bigint('input_tokens', { mode: 'bigint' }),
	cacheReadTokens: bigint('cache_read_tokens', { mode: 'bigint' }),
	outputTokens: bigint('output_tokens', { mode: 'bigint' }),
	usageFormat: text('usage_format'),
	rawUsage: jsonb('raw_usage'),
	providerCost: numeric('provider_cost'),
	tags: jsonb('tags').notNull().default({}),
	costNanos: bigint('cost_nanos', { mode: 'bigint' }),
	costCents: numeric('cost_cents'),
	costStatus: text('cost_status'),
});

const pool = new pg.Pool();
const db = drizzle(pool);
const [row] = await db.insert(usage).values({
	externalId: 'drizzle-1', provider: 'openai', model: 'gpt-5', externalCustomerId: 'user_123',
	inputTokens: 1200n, outputTokens: 350n, tags: { feature: 'chat' },
}).returning({ costCents: usage.costCents, costStatus: usage.costStatus });
console.log('inserted', row);
const [read] = await db.select().from(usage).where(eq(usage.externalId, 'drizzle-1'));
console.log('read', read.inputTokens, read.costNanos, read.tags);
await pool.end();
