// What each client of node's does to a usage table, in its own words:  node clients.js CLIENT STEP
//
// Steps: create (a table by the ORM's own DDL), write, again (the same upsert, once the row is delivered).
// Prints a JSON object of what it read back; t/072_clients.pl says what it must be.
'use strict';

const [client, step] = process.argv.slice(2);
const table = `by_${client}`;
const host = process.env.PGHOST, port = Number(process.env.PGPORT);
const database = process.env.PGDATABASE, user = process.env.PGUSER;

// 2^53 + 1: no JavaScript number holds it.
const big = '9007199254740993';
const at = new Date('2026-01-02T03:04:05.678Z');
const call = {
	external_id: `${client}_1`, occurred_at: at, provider: 'openai', model: 'gpt-5', external_customer_id: 'customer',
	input_tokens: 1200, output_tokens: 350, provider_cost: null, tags: { team: 'a', n: 1.5 },
};
const bare = {
	external_id: null, occurred_at: null, service_tier: null, tags: null, request_count: null, event_name: '',
	provider: 'openai', model: 'gpt-5', external_customer_id: `${client}_nulls`, input_tokens: 1000,
};
const large = {
	external_id: `${client}_big`, provider: 'tiny', model: 'tiny', external_customer_id: 'customer', input_tokens: big,
};

const show = (row) => ({
	external_id: row.external_id, tier: row.service_tier, tags: row.tags, input: String(row.input_tokens),
	nanos: String(row.cost_nanos), cents: String(row.cost_cents), status: row.cost_status,
});

const names = (row) => Object.keys(row).join(', ');
const places = (row) => Object.keys(row).map((_, i) => `$${i + 1}`).join(', ');
const updates = (row) => Object.keys(row).map((k) => `${k} = excluded.${k}`).join(', ');

const clients = {
	async pg(warnings) {
		const { Client } = require('pg');
		const db = new Client({ host, port, database, user });
		await db.connect();
		db.on('notice', (notice) => warnings.push(notice.message));
		const insert = (row, more = '') => db.query(
			{ name: `insert_${Object.keys(row).length}_${more.length}`, text: `INSERT INTO ${table} (${names(row)}) VALUES (${places(row)}) ${more} RETURNING *` },
			Object.values(row));
		const upsert = async () => (await insert(call, `ON CONFLICT (external_id) DO UPDATE SET ${updates(call)}`)).rows[0];
		const result = {};
		if (step === 'write') {
			result.insert = show((await insert(call)).rows[0]);
			result.nulls = show((await insert(bare)).rows[0]);
			await insert({ ...bare, external_customer_id: null });
			await insert(large);
			try {
				await insert({ ...large, external_id: '' });
			} catch (error) {
				result.error = [error.code, error.table, error.column];
			}
		}
		result.upsert = show(await upsert());
		result.read = show((await db.query(`SELECT * FROM ${table} WHERE external_id = $1`, [large.external_id])).rows[0]);
		await db.end();
		return result;
	},

	async postgres(warnings) {
		const sql = require('postgres')({
			path: `${host}/.s.PGSQL.${port}`, database, user, onnotice: (notice) => warnings.push(notice.message),
		});
		const t = sql(table);
		const insert = (row) => sql`INSERT INTO ${t} ${sql(row)} RETURNING *`;
		const result = {};
		if (step === 'write') {
			result.insert = show((await insert(call))[0]);
			result.nulls = show((await insert(bare))[0]);
			await insert({ ...bare, external_customer_id: null });
			await insert(large);
		}
		result.upsert = show((await sql`INSERT INTO ${t} ${sql(call)}
			ON CONFLICT (external_id) DO UPDATE SET ${sql(call)} RETURNING *`)[0]);
		result.read = show((await sql`SELECT * FROM ${t} WHERE external_id = ${large.external_id}`)[0]);
		await sql.end();
		return result;
	},

	async drizzle() {
		const { Pool } = require('pg');
		const { drizzle } = require('drizzle-orm/node-postgres');
		const { eq } = require('drizzle-orm');
		const c = require('drizzle-orm/pg-core');
		const usage = c.pgTable(table, {
			id: c.bigint('id', { mode: 'bigint' }).generatedByDefaultAsIdentity().primaryKey(),
			external_id: c.text('external_id'),
			occurred_at: c.timestamp('occurred_at', { withTimezone: true }),
			event_name: c.text('event_name'), provider: c.text('provider'), model: c.text('model'),
			service_tier: c.text('service_tier'), external_customer_id: c.text('external_customer_id'),
			input_tokens: c.bigint('input_tokens', { mode: 'bigint' }), output_tokens: c.integer('output_tokens'),
			request_count: c.integer('request_count'), provider_cost: c.numeric('provider_cost'), tags: c.jsonb('tags'),
			cost_nanos: c.bigint('cost_nanos', { mode: 'bigint' }), cost_cents: c.numeric('cost_cents'), cost_status: c.text('cost_status'),
		});
		const pool = new Pool({ host, port, database, user });
		const db = drizzle(pool);
		const counted = (row) => ({ ...row, input_tokens: BigInt(row.input_tokens) });
		const result = {};
		if (step === 'write') {
			result.insert = show((await db.insert(usage).values(counted(call)).returning())[0]);
			result.nulls = show((await db.insert(usage).values(counted(bare)).returning())[0]);
			await db.insert(usage).values(counted(large));
		}
		result.upsert = show((await db.insert(usage).values(counted(call))
			.onConflictDoUpdate({ target: usage.external_id, set: counted(call) }).returning())[0]);
		result.read = show((await db.select().from(usage).where(eq(usage.external_id, large.external_id)))[0]);
		await pool.end();
		return result;
	},

	async knex(warnings) {
		const knex = require('knex')({ client: 'pg', connection: { host, port, database, user } });
		const insert = (row) => knex(table).insert(row).returning('*');
		const result = {};
		if (step === 'write') {
			result.insert = show((await insert(call))[0]);
			result.nulls = show((await insert(bare))[0]);
			await insert(large);
		}
		result.upsert = show((await insert(call).onConflict('external_id').merge())[0]);
		result.read = show(await knex(table).where({ external_id: large.external_id }).first());
		await knex.destroy();
		return result;
	},

	async sequelize() {
		const { Sequelize, DataTypes: T, literal } = require('sequelize');
		const db = new Sequelize(database, user, '', { host, port, dialect: 'postgres', logging: false });
		const usage = db.define(table, {
			id: { type: T.INTEGER, autoIncrement: true, primaryKey: true },
			external_id: { type: T.STRING, defaultValue: literal('gen_random_uuid()'), unique: true },
			occurred_at: { type: T.DATE, defaultValue: literal('now()') },
			event_name: T.STRING, provider: T.STRING(40), sub_provider: T.STRING, model: T.STRING,
			service_tier: { type: T.STRING(20), defaultValue: 'standard' },
			generation_id: T.STRING, customer_id: T.UUID, external_customer_id: T.STRING, member_id: T.UUID,
			external_member_id: T.STRING, parent_id: T.STRING,
			input_tokens: T.BIGINT, cache_read_tokens: T.INTEGER, cache_write_tokens: T.INTEGER, cache_write_1h_tokens: T.INTEGER,
			output_tokens: T.INTEGER, reasoning_tokens: T.INTEGER, request_count: { type: T.SMALLINT, defaultValue: 1 },
			web_search_count: T.SMALLINT, units: T.JSONB, raw_usage: T.JSONB, usage_format: T.STRING, provider_cost: T.DECIMAL(18, 12),
			tags: { type: T.JSONB, defaultValue: {} },
			cost_nanos: T.BIGINT, cost_cents: T.DECIMAL, cost_status: T.STRING(20),
		}, { tableName: table, timestamps: false });
		const result = {};
		if (step === 'create') {
			await db.query(`DROP TABLE IF EXISTS ${table}`);
			await usage.sync();
		} else {
			if (step === 'write') {
				result.insert = show(await usage.create(call));
				result.nulls = show(await usage.create(bare));
				await usage.create(large);
			}
			await usage.upsert(call, { conflictFields: ['external_id'] });
			result.upsert = show(await usage.findOne({ where: { external_id: call.external_id } }));
			result.read = show(await usage.findOne({ where: { external_id: large.external_id } }));
		}
		await db.close();
		return result;
	},

	async typeorm() {
		require('reflect-metadata');
		const { DataSource, EntitySchema } = require('typeorm');
		const text = { type: 'varchar', nullable: true };
		const count = { type: 'int', nullable: true };
		const json = { type: 'jsonb', nullable: true };
		const uuid = { type: 'uuid', nullable: true };
		const usage = new EntitySchema({
			name: table,
			tableName: table,
			columns: {
				id: { type: 'bigint', primary: true, generated: 'increment' },
				external_id: { type: 'varchar', length: 255, unique: true, default: () => 'gen_random_uuid()' },
				occurred_at: { type: 'timestamptz', default: () => 'now()' },
				event_name: text, provider: text, sub_provider: text, model: text,
				service_tier: { type: 'varchar', length: 20, default: 'standard' },
				generation_id: text, customer_id: uuid, external_customer_id: text, member_id: uuid, external_member_id: text,
				parent_id: text, input_tokens: { type: 'bigint', nullable: true }, cache_read_tokens: count, cache_write_tokens: count,
				cache_write_1h_tokens: count, output_tokens: count, reasoning_tokens: count,
				request_count: { type: 'smallint', default: 1 }, web_search_count: count, units: json, raw_usage: json,
				usage_format: text, provider_cost: { type: 'numeric', nullable: true }, tags: { type: 'jsonb', default: {} },
				cost_nanos: { type: 'bigint', nullable: true }, cost_cents: { type: 'numeric', nullable: true }, cost_status: text,
			},
		});
		const db = await new DataSource({ type: 'postgres', host, port, database, username: user, entities: [usage] }).initialize();
		const rows = db.getRepository(table);
		const result = {};
		if (step === 'create') {
			await db.synchronize();
		} else {
			if (step === 'write') {
				const saved = await rows.save({ ...call });
				result.insert = show(await rows.findOneBy({ id: saved.id }));
				await rows.insert({ ...bare });
				result.nulls = show(await rows.findOneBy({ external_customer_id: bare.external_customer_id }));
				await rows.insert({ ...large });
			}
			await rows.upsert({ ...call }, ['external_id']);
			result.upsert = show(await rows.findOneBy({ external_id: call.external_id }));
			result.read = show(await rows.findOneBy({ external_id: large.external_id }));
		}
		await db.destroy();
		return result;
	},
};

const warnings = [];
clients[client](warnings).then(
	(result) => console.log(JSON.stringify({ ...result, warnings })),
	(error) => {
		console.error(error);
		process.exit(1);
	});
