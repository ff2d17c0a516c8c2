
# aibilling.report() and aibilling.chart(): what is drawn is what SQL says, whatever names rows bring
# along; in a real browser (headless Chromium, where it is installed), without a script, on A4.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use AibillingNode;
use File::Spec;
use IPC::Run;
use PolarServer;
use PostgreSQL::Test::Utils;
use Test::More;

plan skip_all => 'python3 is not on PATH' unless PolarServer->python;

my $polar = PolarServer->new;
my $node = AibillingNode->new('main');
my $script = '<script>document.title = "taken over"</script>';
my $image = q{"><img src=x onerror='document.title = 1'>};

$node->create_server($polar);
$node->create_usage_table;
unlike($node->safe_psql('postgres', "SELECT aibilling.report('usage')"), qr/NaN|Infinity|\bnull\b/, 'a report of nothing');
$node->safe_psql('postgres', qq{
SELECT aibilling.load_bundled_prices();
INSERT INTO usage (occurred_at, provider, model, external_customer_id, input_tokens, cache_read_tokens, output_tokens, reasoning_tokens)
SELECT now() - n * interval '7 hours', 'openai', CASE n % 4 WHEN 0 THEN 'gpt-5' WHEN 1 THEN 'gpt-5-mini' WHEN 2 THEN 'gpt-4o' ELSE 'gpt-4.1' END,
	CASE n % 3 WHEN 0 THEN \$q\$$script\$q\$ WHEN 1 THEN 'Änne & Søn' ELSE 'c' || n % 20 END, 1000000 + n * 1000, 400000, n * 1000, n * 100
FROM generate_series(0, 200) n;
INSERT INTO usage (provider, model, external_customer_id, provider_cost)
SELECT 'x', CASE n WHEN 1 THEN \$q\$$image\$q\$ ELSE 'model ' || n END, \$q\$$image\$q\$, 0.5 + n FROM generate_series(1, 4) n;
INSERT INTO usage (provider, model, external_customer_id, input_tokens) VALUES ('x', \$q\$$script\$q\$, E'bell \\a and tab \\t', 1);
INSERT INTO usage (provider, model, provider_cost) VALUES ('x', 'y', 1);
INSERT INTO usage (provider, model, external_customer_id, provider_cost) VALUES ('x', 'correction', 'c1', -0.25);});
$node->wait_settled;

my $first = $node->safe_psql('postgres', "SELECT (now() AT TIME ZONE 'UTC')::date - 40");
my $last = $node->safe_psql('postgres', "SELECT (now() AT TIME ZONE 'UTC')::date");
my $page = $node->safe_psql('postgres', "SELECT aibilling.report('usage', '$first', '$last')");
my $file = $node->basedir . '/report.html';
$node->write_token($file, $page, 0644);

# ---------------------------------------------------------------------------
# The page itself
# ---------------------------------------------------------------------------

like($page, qr/\A<!DOCTYPE html>\n<html lang="en">/, 'a page of HTML');
my %tags = map { $_ => 1 } qw(html head meta title link style body main header h1 h2 p div span b section svg desc rect line text ul li i
  details summary table thead tbody tr th td dl dt dd footer);
is(join(' ', grep { !$tags{$_} } $page =~ /<\/?([^\s>!\/]+)/g), '', 'nothing from rows is HTML');
unlike($page =~ s/"[^"]*"/""/gr, qr/<[^>]*\s(?:on\w+|src|srcdoc|action)\s*=|url\(|\@import/, 'and nothing is loaded or run');
like($page, qr/&lt;script&gt;document\.title = &quot;taken over&quot;&lt;\/script&gt;/, 'a customer may be called <script>');
like($page, qr/no customer: customer_id or external_customer_id must be set/, 'what was rejected, and why');
like($page, qr/no price for this model/, 'what waits for a price');
unlike($page, qr/[\x00-\x08\x0b\x0c\x0e-\x1f]/, 'no control characters');
is(scalar(() = $page =~ /<svg[^>]*>/g), scalar(() = $page =~ /<svg[^>]*role="img"[^>]*aria-label/g), 'each drawing has a text in its place');

# What is drawn, by the elements of a page: [ day, model, cents, height ], [ name, cents ]
sub drawn
{
	my ($html) = @_;
	my (@cells, @bars);

	push @cells, [ $2, _text($3), $4, $1 ] while $html =~ /<rect class="f\d"[^>]*? height="([\d.]+)" data-span="([^"]*)" data-model="([^"]*)" data-cents="([^"]*)"/g;
	push @bars, [ _text($2), $3, $1 ] while $html =~ /<rect class="f1" width="([\d.]+)" height="4" data-name="([^"]*)" data-cents="([^"]*)"/g;
	return (\@cells, \@bars);
}

sub _text
{
	my ($text) = @_;
	my %named = (amp => '&', lt => '<', gt => '>', quot => '"', '#39' => "'");

	$text =~ s/&(#?\w+);/$named{$1}/ge;
	return $text;
}

sub is_right
{
	my ($html, $what) = @_;
	my ($cells, $bars) = drawn($html);
	my %got = map { ("$_->[0] $_->[1]" => $_->[2]) } @$cells;
	my %expected = map { split /\t/ } split /\n/, $node->safe_psql('postgres', qq{
SELECT format(E'%s %s\\t%s', s.day, s.name, sum(s.cents)) FROM (
	SELECT (occurred_at AT TIME ZONE 'UTC')::date AS day, cost_cents AS cents,
		CASE WHEN model IN (SELECT model FROM usage WHERE occurred_at >= '$first' GROUP BY model ORDER BY sum(cost_cents) DESC NULLS LAST, model LIMIT 5)
		THEN model ELSE 'others' END AS name
	FROM usage WHERE (occurred_at AT TIME ZONE 'UTC')::date >= '$first') s
GROUP BY s.day, s.name HAVING sum(s.cents) > 0});
	is_deeply(\%got, \%expected, "$what: the bars of each day are the cost of its models");

	my ($unit) = map { $_->[3] / $_->[2] } sort { $b->[2] <=> $a->[2] } @$cells;
	is_deeply([ grep { abs($_->[3] - $_->[2] * $unit) > 0.02 } @$cells ], [], "$what: and as high");

	my ($total) = $html =~ /id="total" data-cents="([^"]*)"/;
	is($node->safe_psql('postgres', "SELECT $total = sum(cost_cents) FROM usage WHERE (occurred_at AT TIME ZONE 'UTC')::date >= '$first'"), 't', "$what: the total");
	my %by = map { ($_->[0] => $_->[1]) } @$bars;
	is($node->safe_psql('postgres', qq{SELECT sum(cost_cents) = $by{$script} FROM usage WHERE external_customer_id = \$q\$$script\$q\$
		AND (occurred_at AT TIME ZONE 'UTC')::date >= '$first'}), 't', "$what: the customer called <script>");
	is($node->safe_psql('postgres', "SELECT sum(cost_cents) = $by{'gpt-5'} FROM usage WHERE model = 'gpt-5' AND (occurred_at AT TIME ZONE 'UTC')::date >= '$first'"),
		't', "$what: a model");
	my ($saved) = $html =~ /id="saved" data-cents="([^"]*)"/;
	is( $node->safe_psql('postgres', qq{
SELECT abs($saved - sum(whole.cents - u.cost_cents)) < 0.000001 FROM usage u,
	LATERAL (SELECT aibilling.cost_cents(u.provider, u.model, u.input_tokens, u.output_tokens, at => u.occurred_at) AS cents) whole
WHERE u.cache_read_tokens > 0 AND (u.occurred_at AT TIME ZONE 'UTC')::date >= '$first'}),
		't', "$what: what caches saved is what the same calls would have cost without, less what they did");
	return;
}

is_right($page, 'as written');

# Text that can be read: a contrast of 4.5 or more with what it is on, in both modes
my %modes;
($modes{light}, $modes{dark}) = $page =~ /:root \{([^}]*)\}.*?prefers-color-scheme: dark\) \{ :root \{([^}]*)\}/s;
sub luminance
{
	my @rgb = map { hex($_) / 255 } $_[0] =~ /([0-9a-f]{2})/g;

	@rgb = map { $_ <= 0.03928 ? $_ / 12.92 : (($_ + 0.055) / 1.055)**2.4 } @rgb;
	return 0.2126 * $rgb[0] + 0.7152 * $rgb[1] + 0.0722 * $rgb[2];
}
foreach my $mode (sort keys %modes)
{
	my %colour = $modes{$mode} =~ /--(\w+): #([0-9a-f]{6})/g;

	foreach my $pair (map { ([ $_, 'card', 4.5 ], [ $_, 'page', 4.5 ]) } ('ink', 'soft'))
	{
		my ($one, $other) = sort { $b <=> $a } map { luminance($colour{$_}) + 0.05 } @$pair[ 0, 1 ];
		cmp_ok($one / $other, '>=', $pair->[2], "$mode: $pair->[0] on $pair->[1]");
	}
	foreach my $n (1 .. 6)
	{
		my ($one, $other) = sort { $b <=> $a } map { luminance($colour{$_}) + 0.05 } ("c$n", 'card');
		cmp_ok($one / $other, '>=', 3, "$mode: colour $n on a card");
	}
}

# ---------------------------------------------------------------------------
# In a browser
# ---------------------------------------------------------------------------

my ($chromium) = grep { -x } map { File::Spec->catfile($_, 'chromium') } File::Spec->path;
SKIP:
{
	skip 'chromium is not on PATH', 1 unless defined $chromium;
	my ($dom, $log) = ('', '');
	my @browser = ($chromium, '--headless', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--no-first-run',
		'--user-data-dir=' . $node->basedir . '/chromium', '--timeout=30000');
	local $ENV{HOME} = $node->basedir;

	ok(IPC::Run::run([ @browser, '--dump-dom', "file://$file" ], '>', \$dom, '2>', \$log, IPC::Run::timeout(180)), 'a browser opens it')
	  or diag($log);
	is_right($dom, 'in the browser');
	like($dom, qr/<title>AI usage of usage, $first to $last<\/title>/, 'no script of a row has run');
	unlike($dom, qr/<script|<img/, 'and there is none');
	ok(IPC::Run::run([ @browser, '--no-pdf-header-footer', '--print-to-pdf=' . $node->basedir . '/report.pdf', "file://$file" ], '>', \$dom, '2>', \$log, IPC::Run::timeout(180)), 'it prints')
	  or diag($log);
	my ($width, $height) = slurp_file($node->basedir . '/report.pdf') =~ /MediaBox\s*\[\s*0 0 ([\d.]+) ([\d.]+)/;
	is(join(' ', map { sprintf '%.0f', $_ // 0 } $width, $height), '595 842', 'on A4');
}

# ---------------------------------------------------------------------------
# Other days, other callers, chart()
# ---------------------------------------------------------------------------

foreach my $range ([ '2020-01-01', '2020-01-01' ], [ "$last'::date - 300 + '0", $last ], [ '2019-01-01', $last ])
{
	my $days = $range->[0] =~ /date/ ? "('$last'::date - 300)" : "'$range->[0]'";

	like($node->safe_psql('postgres', "SELECT aibilling.report('usage', $days, '$range->[1]')"), qr/Cost per (day|week|month)/, "from $days");
}
like(($node->psql('postgres', "SELECT aibilling.report('usage', '2026-02-01', '2026-01-01')"))[2], qr/must not be after to_day/, 'days that end before they begin');
like(($node->psql('postgres', "SELECT aibilling.report('usage', '-infinity', '2026-01-01')"))[2], qr/ten years at most/, 'endless ones');
$node->safe_psql('postgres', 'CREATE ROLE reader LOGIN; GRANT SELECT ON usage TO reader; CREATE ROLE stranger LOGIN');
my $seen = $node->safe_psql('postgres', "SET ROLE reader; SELECT aibilling.report('usage', '$first', '$last')");
like($seen, qr/Shown to the owner of the table and to pg_monitor/, 'who may only SELECT sees what it costs');
unlike($seen, qr/no price for this model/, 'and not what waits');
like(($node->psql('postgres', "SET ROLE stranger; SELECT aibilling.report('usage')"))[2], qr/permission denied for table usage/, 'others see nothing');
is( $node->safe_psql('postgres', q{
SELECT count(*), sum(usd) = (SELECT round(sum(cost_cents) / 100, 4) FROM usage WHERE (occurred_at AT TIME ZONE 'UTC')::date > (now() AT TIME ZONE 'UTC')::date - 30),
	max(length(chart)) FROM aibilling.chart('usage')}) =~ s/\|[tf]\|/|t|/r,
	'30|t|40', 'chart(): thirty days');
foreach my $by ('model', 'provider', 'customer')
{
	is($node->safe_psql('postgres', "SELECT bool_and(usd = round(usd, 4)), max(length(chart)) FROM aibilling.chart('usage', '$by', 60)"), 't|40', "chart() by $by");
}
like(($node->psql('postgres', "SELECT * FROM aibilling.chart('usage', 'colour')"))[2], qr/Use 'day', 'model', 'provider' or 'customer'/, 'and by nothing else');
like(($node->psql('postgres', "SELECT * FROM aibilling.chart('usage', 'day', 0)"))[2], qr/days must be between 1 and 3700/, 'nor of no days');

# ---------------------------------------------------------------------------
# The end of a month
# ---------------------------------------------------------------------------

my $close = q{SELECT state, rows, trim_scale(cents) FROM aibilling.close_check('usage', '2027-01-01')};
is($node->safe_psql('postgres', $close), "unpriced|1|0\nrejected|1|100", 'close_check(): what is not delivered');
is($node->safe_psql('postgres', "SELECT * FROM aibilling.close_check('usage', '2020-01-01')"), '', 'of another month nothing');
$node->safe_psql('postgres', q{
SELECT aibilling.pause();
INSERT INTO usage (occurred_at, provider, model, external_customer_id, provider_cost) VALUES ('2026-01-31 23:59:59.999999+00', 'p', 'm', 'c', 0.25), ('2026-02-01 00:00+00', 'p', 'm', 'c', 1);});
is($node->safe_psql('postgres', "SELECT state, rows, trim_scale(cents), oldest = '2026-01-31 23:59:59.999999+00' FROM aibilling.close_check('usage', '2026-02-01 00:00+00')"),
	'pending|1|25|t', 'to the microsecond');
foreach my $case ([ '2026-01-31 17:59:59+00', '' ], [ '2026-01-31 18:00+00', '1 rows of Jan 2026 (0.25 USD) are not delivered and would miss its invoice: 1 pending (aibilling.close_check)' ],
	[ '2026-02-01 12:00+00', '1 rows of Jan 2026 (0.25 USD) are not delivered and may have missed its invoice: 1 pending (aibilling.close_check)' ],
	[ '2026-02-02 00:00+00', '' ], [ '2025-12-31 20:00+00', '' ])
{
	is($node->safe_psql('postgres', "SET timezone = 'America/Lima'; SELECT aibilling.close_warning('usage', '$case->[0]')"), $case->[1], "status at $case->[0]");
}
like(($node->psql('postgres', "SET ROLE reader; SELECT * FROM aibilling.close_check('usage')"))[2], qr/must be owner of table usage/, 'for the owner and pg_monitor');
is($node->safe_psql('postgres', "CREATE ROLE monitor; GRANT pg_monitor TO monitor; SET ROLE monitor; $close") =~ /unpriced/ ? 'yes' : 'no', 'yes', 'pg_monitor sees it');

$node->stop;
done_testing();
