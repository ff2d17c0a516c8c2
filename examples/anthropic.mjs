// The package "@anthropic-ai/sdk": a message, and a stream.
import Anthropic from '@anthropic-ai/sdk';
import { bill, close } from './bill.mjs';

const anthropic = new Anthropic(); // ANTHROPIC_API_KEY
const call = { customer: 'user_123', provider: 'anthropic', format: 'anthropic' };
const request = {
	model: 'claude-sonnet-5', max_tokens: 1000, messages: [{ role: 'user', content: 'What is a rainbow?' }],
};

const message = await anthropic.messages.create(request);
console.log('message', await bill({ ...call, reply: message, key: message.id }));

// The SDK puts the usage of a stream's events together: message_start has the prompt, message_delta the answer.
const final = await anthropic.messages.stream(request).finalMessage();
console.log('stream', await bill({ ...call, reply: final, key: final.id }));

await close();
