// LangChain.js: what a chat model returns, whoever provides it, is in LangChain's own shape.
import { awaitAllCallbacks } from '@langchain/core/callbacks/promises';
import { ChatOpenAI } from '@langchain/openai';
import { bill, close } from './bill.mjs';

const model = new ChatOpenAI({ model: 'gpt-5' });

// For chains and agents: a handler that is called at the end of each call of a model.
const handler = {
	async handleLLMEnd(output) {
		for (const { message } of output.generations.flat()) {
			const { id, usage_metadata, response_metadata } = message;
			console.log('call', await bill({
				customer: 'user_123', provider: 'openai', format: 'openai',
				reply: { id, usage_metadata, response_metadata: { model_name: response_metadata.model_name } },
			}));
		}
	},
};

await model.invoke('What is a rainbow?', { callbacks: [handler] });
for await (const chunk of await model.stream('And a fog bow?', { callbacks: [handler] })) void chunk;

// Handlers run in the background: wait for them before a process or a serverless function ends.
await awaitAllCallbacks();
await close();
