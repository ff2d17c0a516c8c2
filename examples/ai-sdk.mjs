// Vercel's AI SDK, versions 5 to 7: generateText, and streamText with onFinish. Each step of a run with tools is a call of its own.
import { generateText, streamText } from 'ai';
import { openai } from '@ai-sdk/openai';
import { anthropic } from '@ai-sdk/anthropic';
import { bill, close } from './bill.mjs';

// The usage alone is not enough: what Anthropic's cache cost is in providerMetadata. Neither has the prompt.
async function billStep(provider, { usage, providerMetadata, response }) {
	const reply = { usage, providerMetadata, response: { id: response.id, modelId: response.modelId } };
	return bill({ customer: 'user_123', provider, format: 'ai_sdk', reply, tags: { feature: 'chat' } });
}

const prompt = 'What is a rainbow?';

const result = await generateText({ model: openai('gpt-5'), prompt });
for (const step of result.steps) console.log('openai', await billStep('openai', step));

const message = await generateText({ model: anthropic('claude-sonnet-5'), prompt });
for (const step of message.steps) console.log('anthropic', await billStep('anthropic', step));

const stream = streamText({
	model: openai('gpt-5'),
	prompt,
	async onFinish({ steps }) {
		for (const step of steps) console.log('stream', await billStep('openai', step));
	},
});
await stream.consumeStream(); // as the response to the browser does: without a reader, nothing is billed

await close();
