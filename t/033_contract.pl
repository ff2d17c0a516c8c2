# What Polar accepts and what it refuses, case by case: the local check, the
# stand-in and the case table must agree.
use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use AibillingNode;
use File::Basename qw(dirname);
use File::Spec;
use JSON::PP;
use PolarServer;
use PostgreSQL::Test::Utils;
use Test::More;

plan skip_all => 'needs python3' unless PolarServer->python;

my $cases = File::Spec->rel2abs(dirname(__FILE__)) . '/contract_cases.jsonl';
my $json = JSON::PP->new->utf8->canonical->allow_nonref->allow_bignum;
my $polar = PolarServer->new;
my $node = AibillingNode->new('main');

# The previews are sent by hand to an organization of their own, so that the
# worker's later deliveries of the same external ids are no duplicates.
$polar->tokens(token => 'by_hand', organization => 'by_hand');

$node->create_server($polar);
$node->create_usage_table;
$node->safe_psql('postgres', 'SELECT aibilling.pause()');

$node->safe_psql(
	'postgres', qq{
CREATE TABLE contract (n int PRIMARY KEY, c jsonb, id bigint, error text);
INSERT INTO contract (n, c)
	SELECT n, line::jsonb
	FROM regexp_split_to_table(pg_read_file('$cases'), '\\n') WITH ORDINALITY l (line, n)
	WHERE line <> '';
DO \$\$
DECLARE
	r record;
	columns text;
	new_id bigint;
	problem text;
	broken text;
BEGIN
	FOR r IN SELECT * FROM contract ORDER BY n LOOP
		BEGIN
			new_id := NULL;
			problem := NULL;
			SELECT string_agg(quote_ident(k), ', ') INTO columns FROM jsonb_object_keys(r.c->'row') k;
			EXECUTE format('INSERT INTO usage (%s) SELECT %s FROM jsonb_populate_record(NULL::usage, \$1) RETURNING id',
						   columns, columns)
				INTO new_id USING r.c->'row';
		EXCEPTION WHEN OTHERS THEN
			GET STACKED DIAGNOSTICS broken = CONSTRAINT_NAME;
			problem := concat_ws(' ', SQLERRM, broken);
		END;
		UPDATE contract SET id = new_id, error = problem WHERE n = r.n;
	END LOOP;
END
\$\$});

my @results = map { $json->decode($_) } split /\n/, $node->safe_psql(
	'postgres', q{
SELECT jsonb_build_object('what', c->'what', 'row', c->'row', 'field', c->'field',
	'accept', c->'accept', 'limit', c->'limit', 'metadata', c->'metadata', 'insert', coalesce(c->'insert', 'true'), 'waits', coalesce(c->'waits', 'false'),
	'id', c.id, 'error', coalesce(c.error, o.error, p.error), 'state', o.state,
	'not_before', o.not_before, 'previewed', p.state, 'event', p.event)
FROM contract c
	LEFT JOIN aibilling.outbox o ON o.usage_id = c.id
	LEFT JOIN aibilling.preview('usage', 10000) p ON p.usage_id = c.id
ORDER BY n});
cmp_ok(scalar @results, '>=', 150, 'enough cases');

my ($accepted, $refused) = (0, 0);
foreach my $case (@results)
{
	my $what = $case->{what};
	my $error = $case->{error} // '';

	if (!$case->{insert})
	{
		ok(!defined $case->{id} && $error =~ /\Q$case->{field}\E/,
			"$what: INSERT fails and names $case->{field}")
		  || diag("error: $error");
	}
	elsif ($case->{waits})
	{
		ok( $case->{state} eq 'unpriced'
			  || $case->{state} eq 'pending' && defined $case->{not_before},
			"$what: waits");
	}
	elsif ($case->{accept})
	{
		is("$case->{state} $case->{previewed} $error",
			'pending pending ', "$what: accepted here");
		my $answer = by_hand($case->{event});
		is($answer->{status}, 200, "$what: accepted by Polar")
		  || diag($answer->{content});
		is($case->{event}{metadata}{$_}, $case->{metadata}{$_}, "$what: metadata $_")
		  foreach keys %{ $case->{metadata} // {} };
		$accepted++;
	}
	else
	{
		my $field = $case->{field} =~ s/[^ -~]/?/gr;
		ok( defined $case->{id}
			  && ($case->{state} eq 'rejected' || $case->{previewed} eq 'rejected')
			  && $error =~ /\Q$case->{field}\E/,
			"$what: refused here, naming $field")
		  || diag("state: $case->{state}, preview: $case->{previewed}, error: $error");
		is($case->{event}, undef, "$what: has no event");
		$refused++;
	}
}

# The cases that are refused, as an event that was not checked.
sub unchecked_event
{
	my ($row) = @_;
	my %event = (
		name => $row->{event_name} // 'llm_usage',
		timestamp => $row->{occurred_at} // '2026-01-01T00:00:00Z',
		external_id => $row->{external_id} // 'unchecked',
		metadata => {});
	my %tags = %{ $row->{tags} // {} };

	foreach my $column (
		qw(customer_id external_customer_id member_id external_member_id parent_id))
	{
		$event{$column} = $row->{$column} if defined $row->{$column};
	}
	foreach my $column (qw(provider sub_provider generation_id))
	{
		$event{metadata}{$column} = $row->{$column} if defined $row->{$column};
	}
	$event{metadata}{model_id} = $row->{model} if defined $row->{model};
	$event{metadata}{_llm} = {
		vendor => $row->{provider}, model => $row->{model}, input_tokens => 0,
		output_tokens => 0, total_tokens => 0 }
	  if defined $row->{provider} && defined $row->{model};
	if (!defined $row->{customer_id} && !defined $row->{external_customer_id})
	{
		foreach my $key (qw(customerId polarCustomerId customer_id))
		{
			next unless defined $tags{$key};
			$event{customer_id} = $tags{$key};
			last;
		}
		foreach my $key (qw(userId externalId user_id))
		{
			next if defined $event{customer_id} || !defined $tags{$key};
			$event{external_customer_id} = $tags{$key} if $tags{$key};
			last;
		}
	}
	elsif (defined $row->{customer_id} && defined $row->{external_customer_id})
	{
		$event{metadata}{tag_external_customer_id} = delete $event{external_customer_id};
	}
	foreach my $key (keys %tags)
	{
		my $value = $tags{$key};

		next if !defined $value || !ref $value && $value eq '';
		$event{metadata}{"tag_$key"} = ref $value eq 'HASH' || ref $value eq 'ARRAY'
		  ? $json->encode($value) : $value;
	}
	$event{metadata}{_cost} = { amount => '' . $row->{provider_cost} * 100, currency => 'usd' }
	  if defined $row->{provider_cost};
	return \%event;
}

sub by_hand
{
	my ($event) = @_;

	return $polar->ingest($json->encode({ events => [$event] }),
		'Authorization' => 'Bearer by_hand');
}

foreach my $case (grep { !$_->{accept} && $_->{insert} } @results)
{
	my $answer = by_hand(unchecked_event($case->{row}));

	# Some limits are our own, or are in Polar's documentation only.
	if (defined $case->{limit})
	{
		is($answer->{status}, 200, "$case->{what}: only refused here ($case->{limit})");
	}
	else
	{
		cmp_ok($answer->{status}, '>=', 400, "$case->{what}: refused by Polar, too");
	}
}

# In the end the worker delivers what was accepted, and nothing else.
$node->safe_psql('postgres', 'SELECT aibilling.resume()');
ok($node->poll_query_until('postgres', "SELECT sum(inserted) = $accepted FROM aibilling.delivery"),
	'what is accepted is delivered')
  or diag($node->diagnosis);
is($node->ledger("count(*) FILTER (WHERE http_status <> 200)"), '0',
	'the worker was never refused');
is( $node->safe_psql(
		'postgres', "SELECT count(*) FROM aibilling.outbox WHERE state = 'rejected'"),
	$refused,
	'what is refused stays');

$node->stop;
$polar->stop;
done_testing();
