// The package "openai": chat, streams, Responses, embeddings.
import OpenAI from 'openai';
import { bill, close } from './bill.mjs';

const openai = new OpenAI(); // OPENAI_API_KEY
const call = { customer: 'user_123', provider: 'openai', format: 'openai' };
const messages = [{ role: 'user', content: 'What is a rainbow?' }];

const reply = await openai.chat.completions.create({ model: 'gpt-5', messages });
console.log('chat', await bill({ ...call, reply, key: reply.id }));

// Of a stream, the last chunk has the usage, if it is asked for.
const stream = await openai.chat.completions.create({
	model: 'gpt-5', messages, stream: true, stream_options: { include_usage: true },
});
let last;
for await (const chunk of stream) {
	if (chunk.usage) last = chunk;
}
console.log('chat stream', await bill({ ...call, reply: last, key: last.id }));

const response = await openai.responses.create({ model: 'gpt-5', input: 'What is a rainbow?' });
console.log('responses', await bill({ ...call, reply: response, key: response.id }));

for await (const event of await openai.responses.create({ model: 'gpt-5', input: 'And a fog bow?', stream: true })) {
	if (event.type === 'response.completed') {
		console.log('responses stream', await bill({ ...call, reply: event.response, key: event.response.id }));
	}
}

// Embeddings have no id, and their vectors are no usage.
const { model, usage } = await openai.embeddings.create({ model: 'text-embedding-3-small', input: 'rainbow' });
console.log('embeddings', await bill({ ...call, reply: { model, usage } }));

await close();
