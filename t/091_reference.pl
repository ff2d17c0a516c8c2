# doc/reference.md names every function, table, column and setting as they are, and doc/options.md every option.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use AibillingNode;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = AibillingNode->new('reference');
my $root = "$FindBin::Bin/..";

sub objects
{
	return $node->safe_psql('postgres', $_[0]);
}

$node->safe_psql('postgres', q{
CREATE SERVER polar FOREIGN DATA WRAPPER polar OPTIONS (environment 'sandbox');
SELECT aibilling.create_usage_table('usage', server => 'polar');});

# The page is what dev/reference makes of the comments: nothing is missing, nothing is there that is gone.
my ($rc, $out, $err) = $node->psql('postgres', slurp_file("$root/dev/reference.sql"), on_error_stop => 1);
is($rc, 0, 'the page can be written') or diag($err);
my @is = split /\n/, $out;
my @written = split /\n/, slurp_file("$root/doc/reference.md");
my ($line) = grep { ($is[$_] // '') ne ($written[$_] // '') } 0 .. ($#is > $#written ? $#is : $#written);
ok(!defined $line, 'doc/reference.md is up to date')
  or diag("run dev/reference; line " . ($line + 1) . ":\n" . ($written[$line] // '(none)') . "\nis now\n" . ($is[$line] // '(none)'));

# And by another way, in case the page's own query forgets something.
my $page = join "\n", @written;
foreach my $name (split /\n/, objects(q{
SELECT DISTINCT proname FROM pg_proc WHERE pronamespace = 'aibilling'::regnamespace
UNION SELECT relname FROM pg_class WHERE relnamespace = 'aibilling'::regnamespace AND relkind IN ('r', 'v', 'p', 'c')
UNION SELECT attname FROM pg_attribute JOIN pg_class c ON c.oid = attrelid
	WHERE relnamespace = 'aibilling'::regnamespace AND relkind = 'v' AND attnum > 0
UNION SELECT attname FROM pg_attribute WHERE attrelid IN ('public.usage'::regclass, 'aibilling.price'::regclass) AND attnum > 0
UNION SELECT name FROM pg_settings WHERE name LIKE 'aibilling%'}))
{
	like($page, qr/(?:[`.]\Q$name\E[`(]|^### \Q$name\E$)/m, "the reference has $name");
}
unlike($page, qr/^\| `.*\|  ?\|$/m, 'nothing is without words');

# Options, by the server's own list of them.
my $options = slurp_file("$root/doc/options.md");
foreach my $sql (q{ALTER SERVER polar OPTIONS (ADD zzzzzzzzzz 'x')}, q{CREATE USER MAPPING FOR PUBLIC SERVER polar OPTIONS (zzzzzzzzzz 'x')})
{
	my ($list) = ($node->psql('postgres', $sql))[2] =~ /Valid options in this context are: (.*)\./;
	like($options, qr/^\| `\Q$_\E` \|/m, "doc/options.md has $_") for grep { $_ ne 'format' } split /, /, $list;
	unlike($list, qr/^$/, 'there are options');
}
like($options, qr/`format`/, 'and format, of price lists');

$node->stop;
done_testing();
