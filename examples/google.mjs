// The package "@google/genai": Gemini, whole and as a stream.
import { GoogleGenAI } from '@google/genai';
import { bill, close } from './bill.mjs';

const ai = new GoogleGenAI({ apiKey: process.env.GEMINI_API_KEY });
const call = { customer: 'user_123', provider: 'google', format: 'gemini' };
const request = { model: 'gemini-2.5-flash', contents: 'What is a rainbow?' };

// Not the SDK's own field, which has the headers of HTTP.
const usage = ({ sdkHttpResponse, ...reply }) => reply;

const reply = await ai.models.generateContent(request);
console.log('reply', await bill({ ...call, reply: usage(reply), key: reply.responseId }));

// Of a stream, the last chunk has the usage of all.
let last;
for await (const chunk of await ai.models.generateContentStream(request)) last = chunk;
console.log('stream', await bill({ ...call, reply: usage(last), key: last.responseId }));

await close();
