// The usage table for TypeORM. synchronize stays off: the table is made by aibilling.create_usage_table(), and TypeORM's own
// idea of it would drop the columns that are not here.
import 'reflect-metadata';
import { DataSource, EntitySchema } from 'typeorm';

const text = { type: 'text', nullable: true };
const count = { type: 'bigint', nullable: true };
// Set by the extension: written by nobody else, and read again after the INSERT.
const cost = { insert: false, update: false, nullable: true };

export const Usage = new EntitySchema({
	name: 'Usage',
	tableName: 'usage',
	columns: {
		id: { type: 'bigint', primary: true, generated: 'increment' },
		externalId: { name: 'external_id', type: 'text', unique: true, nullable: true },
		occurredAt: { name: 'occurred_at', type: 'timestamptz', nullable: true },
		provider: text,
		model: text,
		externalCustomerId: { name: 'external_customer_id', ...text },
		inputTokens: { name: 'input_tokens', ...count },
		cacheReadTokens: { name: 'cache_read_tokens', ...count },
		outputTokens: { name: 'output_tokens', ...count },
		usageFormat: { name: 'usage_format', ...text },
		rawUsage: { name: 'raw_usage', type: 'jsonb', nullable: true },
		tags: { type: 'jsonb', nullable: true },
		costNanos: { name: 'cost_nanos', type: 'bigint', ...cost },
		costCents: { name: 'cost_cents', type: 'numeric', ...cost },
		costStatus: { name: 'cost_status', type: 'text', ...cost },
	},
});

const { PGHOST: host, PGPORT: port, PGDATABASE: database, PGUSER: username } = process.env;
const db = await new DataSource({
	type: 'postgres', host, port: Number(port), database, username, entities: [Usage], synchronize: false,
}).initialize();
const rows = db.getRepository('Usage');
const saved = await rows.save({
	externalId: 'typeorm-1', provider: 'openai', model: 'gpt-5', externalCustomerId: 'user_123',
	inputTokens: '1200', outputTokens: '350', tags: { feature: 'chat' },
});
const { costCents, costStatus, inputTokens, costNanos, tags } = await rows.findOneBy({ id: saved.id });
console.log('inserted', { costCents, costStatus });
console.log('read', inputTokens, costNanos, tags);
await db.destroy();
