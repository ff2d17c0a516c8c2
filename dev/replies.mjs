// Compares costs of replies with those of @pydantic/genai-prices: see dev/replies.
import { readFileSync } from 'node:fs';
import { pathToFileURL } from 'node:url';

const [packagePath, repliesPath] = process.argv.slice(2);
const { calcPrice, extractUsage, findProvider } = await import(pathToFileURL(packagePath));

// Our columns and units, by the package's names.
function counts({ units = {}, ...columns }) {
	const written = (columns.cache_write_tokens ?? 0) + (columns.cache_write_1h_tokens ?? 0);
	return Object.fromEntries(Object.entries({
		input_tokens: columns.input_tokens,
		cache_read_tokens: columns.cache_read_tokens,
		cache_write_tokens: written,
		cache_write_1h_tokens: columns.cache_write_1h_tokens,
		output_tokens: columns.output_tokens,
		input_audio_tokens: units.input_audio_tokens,
		input_image_tokens: units.input_image_tokens,
		cache_audio_read_tokens: units.cache_read_audio_tokens,
		output_audio_tokens: units.output_audio_tokens,
		output_image_tokens: units.output_image_tokens,
		web_searches: columns.web_search_count,
		storage_searches: units.file_search,
		audio_seconds: units.audio_second,
	}).filter(([, count]) => count));
}

// Why the two differ by the same counts.
const reasons = [
	['which knows no service tiers', (reply) => reply.tier === 'batch' || reply.tier === 'flex'],
	["where Perplexity's fee for a request is that of the largest search context", (reply) => reply.provider === 'perplexity'],
];

function price(usage, reply, provider) {
	try {
		return calcPrice(usage, reply.model, { providerId: provider.id })?.total_price;
	} catch {
		return undefined;	// it has no price for one of the counts, or finds that they contradict each other
	}
}

// What the package's readers make of the reply: the price and the counts of the first that can read it.
function read(reply, provider) {
	for (const { api_flavor } of provider.extractors ?? []) {
		try {
			const { usage } = extractUsage(provider, reply.raw, api_flavor);
			return { usd: price(usage, reply, provider), usage };
		} catch {
			// a reply of another kind
		}
	}
	return {};
}

// The counts that the package reads otherwise, in words; reasoning has its output's price.
function differences(theirs, ours) {
	return [...new Set([...Object.keys(theirs), ...Object.keys(ours)])]
		.filter((key) => key !== 'output_reasoning_tokens' && (theirs[key] ?? 0) !== (ours[key] ?? 0))
		.map((key) => `${key} ${theirs[key] ?? 'not read'} for ${ours[key] ?? 0}`).join(', ');
}

const same = (a, b) => Math.abs(a - b) <= 1e-12 + 1e-9 * Math.abs(b);
const count = { readSame: 0, pricedSame: 0, explained: 0, left: 0, unexplained: 0 };
for (const line of readFileSync(repliesPath, 'utf8').trim().split('\n')) {
	const reply = JSON.parse(line);
	const name = `${reply.format}: ${reply.name}`;
	const provider = findProvider({ providerId: reply.provider });

	if (reply.usd === null || reply.status === 'reported' || !provider) {
		count.left++;
		continue;
	}
	const ours = counts(reply.columns);
	const theirs = read(reply, provider);
	if (theirs.usd !== undefined && same(theirs.usd, reply.usd)) {
		count.readSame++;
		continue;
	}
	const otherwise = theirs.usage && differences(theirs.usage, ours);
	if (otherwise)
		console.log(`# ${name}: the package reads ${otherwise}`);
	const usd = price(ours, reply, provider);
	if (usd === undefined)
		count.left++;
	else if (same(usd, reply.usd))
		count.pricedSame++;
	else {
		const [why] = reasons.find(([, fits]) => fits(reply)) ?? [];
		console.log(`# ${name}: ${reply.usd} here, ${usd} there, ${why ?? 'by the same counts'}`);
		count[why ? 'explained' : 'unexplained']++;
	}
}
console.log(`${count.unexplained ? 'not ok' : 'ok'} 2 - @pydantic/genai-prices: ${count.readSame} read and priced the same, ` +
	`${count.pricedSame} priced the same by our counts, ${count.explained} explained, ` +
	`${count.unexplained} unexplained, ${count.left} cannot be compared`);
process.exit(count.unexplained ? 1 : 0);
