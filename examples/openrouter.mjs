// OpenRouter, by the package "openai". It says what the call cost, and that is the cost, whatever the price table says.
import OpenAI from 'openai';
import { bill, close } from './bill.mjs';

const openrouter = new OpenAI({
	baseURL: process.env.OPENROUTER_BASE_URL ?? 'https://openrouter.ai/api/v1', apiKey: process.env.OPENROUTER_API_KEY,
});
const reply = await openrouter.chat.completions.create({
	model: 'qwen/qwen3-235b-a22b', messages: [{ role: 'user', content: 'What is a rainbow?' }], usage: { include: true },
});
console.log('reply', await bill({
	customer: 'user_123', provider: 'openrouter', format: 'openrouter', reply, key: reply.id, tags: { feature: 'weather' },
}));

await close();
