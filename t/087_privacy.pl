# The server option raw_usage 'strip': of a reply only its usage is kept. Each reply of t/replies.jsonl, with things
# that somebody has said in all of its places, costs what it costs whole, and nothing said is left in the table.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use AibillingNode;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = AibillingNode->new('privacy');
my $db = 'postgres';

sub sql
{
	return $node->safe_psql($db, $_[0]);
}

$node->safe_psql('postgres', <<SQL);
CREATE SERVER keeps FOREIGN DATA WRAPPER polar OPTIONS (url 'http://127.0.0.1:1', event_name 'llm_usage');
CREATE SERVER strips FOREIGN DATA WRAPPER polar OPTIONS (url 'http://127.0.0.1:1', event_name 'llm_usage', raw_usage 'strip');
SELECT aibilling.load_bundled_prices();
SELECT aibilling.create_usage_table('whole', server => 'keeps');
SELECT aibilling.create_usage_table('said', server => 'keeps');
SELECT aibilling.create_usage_table('stripped', server => 'strips');
CREATE TABLE reply (n bigint GENERATED ALWAYS AS IDENTITY, c jsonb);
COPY reply (c) FROM '$FindBin::Bin/replies.jsonl' (FORMAT csv, QUOTE e'\\x01', DELIMITER e'\\x02');

-- What applications and users say, in the places where replies have it and in some where nobody expects it.
CREATE FUNCTION say(raw jsonb) RETURNS jsonb LANGUAGE sql AS \$\$
	SELECT CASE WHEN jsonb_typeof(raw) <> 'object' THEN raw ELSE
		'{"content": "canary said", "messages": [{"role": "user", "content": [{"type": "canary said", "text": "canary"}]}],
		"metadata": {"name": "canary", "phone": "+49 canary"}, "user": "canary", "prompt": "canary",
		"arguments": "{\\"canary\\": true}", "vector": ["canary"], "id_of_patient": "canary",
		"system_fingerprint": "canary"}'::jsonb || raw END
\$\$;
INSERT INTO whole (external_id, external_customer_id, provider, model, usage_format, raw_usage)
SELECT n, 'c', c->>'provider', c->>'model', c->>'format', c->'raw' FROM reply;
INSERT INTO said (external_id, external_customer_id, provider, model, usage_format, raw_usage)
SELECT n, 'c', c->>'provider', c->>'model', c->>'format', say(c->'raw') FROM reply;
INSERT INTO stripped (external_id, external_customer_id, provider, model, usage_format, raw_usage)
SELECT n, 'c', c->>'provider', c->>'model', c->>'format', say(c->'raw') FROM reply;
SQL

my $columns = 'input_tokens, cache_read_tokens, cache_write_tokens, cache_write_1h_tokens, output_tokens, reasoning_tokens,'
  . ' web_search_count, units, provider_cost, service_tier, model, generation_id, cost_nanos, cost_cents, cost_status';
my $state = sub { "(SELECT o.state FROM aibilling.outbox o WHERE usage_table = '$_[0]'::regclass AND usage_id = $_[0].id)" };

is(sql(qq{
SELECT w.external_id, c->>'format', c->>'name', a, b
FROM (SELECT external_id, row_to_json(x)::text AS a FROM (SELECT external_id, $columns, @{[ $state->('said') ]} AS state FROM said) x) w
	JOIN (SELECT external_id, row_to_json(x)::text AS b FROM (SELECT external_id, $columns, @{[ $state->('stripped') ]} AS state FROM stripped) x) s USING (external_id)
	JOIN reply ON n = external_id::bigint
WHERE a <> b}), '', 'each reply costs what it costs whole, or is refused as it is');

is(sql(q{SELECT count(*) FROM stripped WHERE raw_usage::text ~ 'canary|said'}), '0', 'nothing that was said is kept');
is(sql(q{SELECT count(*) FROM said WHERE raw_usage::text ~ 'canary'}), sql(q{SELECT count(*) FROM said WHERE jsonb_typeof(raw_usage) = 'object'}),
	'all of it is without the option');

# The lists of doc/privacy.md are those of the code.
my $page = slurp_file("$FindBin::Bin/../doc/privacy.md");
my $code = slurp_file("$FindBin::Bin/../src/price/usage_strip.c");
foreach my $list ([ 'parts', 'usage_parts' ], [ 'names', 'name_keys' ])
{
	my ($what, $array) = @$list;
	my ($written) = $page =~ /<!-- $what -->\n(.*?)\n\n/s;
	my ($there) = $code =~ /\b$array\[\] = \{(.*?)NULL/s;
	is(join(' ', sort map { s/_//gr } $written =~ /`([a-z_]+)`/g), join(' ', sort $there =~ /"(\w+)"/g), "the page has all $what");
}

# Words that are kept are under these names.
my %names = map { s/_//gr => 1 } ($page =~ /<!-- names -->\n(.*?)\n\n/s)[0] =~ /`([a-z_]+)`/g;
my $kept = sql(q{
WITH RECURSIVE leaf AS (
	SELECT NULL::text AS key, raw_usage AS v FROM stripped
	UNION ALL
	SELECT coalesce(e.key, leaf.key), e.value FROM leaf, LATERAL (
		SELECT * FROM jsonb_each(CASE jsonb_typeof(v) WHEN 'object' THEN v ELSE '{}' END)
		UNION ALL
		SELECT NULL, item FROM jsonb_array_elements(CASE jsonb_typeof(v) WHEN 'array' THEN v ELSE '[]' END) AS item) AS e)
SELECT DISTINCT lower(regexp_replace(key, '[^A-Za-z0-9]', '', 'g'))
FROM leaf WHERE jsonb_typeof(v) = 'string' AND v #>> '{}' !~ '^[0-9.eE+-]+$' AND key NOT LIKE 'gen_ai.%' AND v <> '"refused"'});
is(join(' ', grep { !$names{$_} } split /\n/, $kept), '', 'words are kept under the names of the page only');

note(sql(q{SELECT string_agg(c->>'format' || ': ' || (c->>'name'), E'\n') FROM stripped JOIN reply ON n = external_id::bigint
WHERE raw_usage IS NULL OR jsonb_typeof(raw_usage) = 'string'}));

# A price that comes later, an UPDATE, and the same row again, find in what is kept what they need.
sql(q{
INSERT INTO stripped (external_id, external_customer_id, usage_format, raw_usage, provider)
VALUES ('later', 'c', 'openai', '{"id": "r", "model": "new-model", "choices": [{"message": {"content": "canary"}}], "usage": {"prompt_tokens": 1000, "completion_tokens": 10, "prompt_tokens_details": {"cached_tokens": 600}}}', 'new');
SELECT aibilling.set_price('new', 'new-model', input => 1, output => 10, cache_read => 0.1);
SELECT aibilling.reprice('stripped', dry_run => false);});
is(sql(q{SELECT cost_cents, raw_usage->'usage'->'prompt_tokens_details', raw_usage->'choices' FROM stripped WHERE external_id = 'later'}),
	'0.056|{"cached_tokens": 600}|[{"message": {}}]', 'a row that waits is priced from what is kept');

$node->stop;
done_testing();
