# What packagers and their tools do: build in the source and beside it, into another root, with blanks in paths;
# test on a server of their own; pack, and install from what was packed.
use strict;
use warnings;

use Cwd qw(getcwd);
use FindBin;
use JSON::PP;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $tree = "$FindBin::Bin/..";
plan skip_all => 'needs the whole source' unless -f "$tree/Makefile" && -d "$tree/src";

# A make above this one is not to reach into those below.
delete @ENV{qw(MAKEFLAGS MAKEOVERRIDES MFLAGS MAKELEVEL VPATH DESTDIR)};
my $pg_config = $ENV{PG_CONFIG} // 'pg_config';
my $place = PostgreSQL::Test::Utils::tempdir;
my ($version) = slurp_file("$tree/aibilling_polar.control") =~ /^default_version = '(.*)'/m;
my @quick = ("PG_CONFIG=$pg_config", 'with_llvm=no', 'COPT=-O0');

# Runs a command in a directory, with its output in $output; false if it fails or is not there.
my $output;

sub runs
{
	my ($directory, @command) = @_;
	my $here = getcwd();

	chdir $directory or die "$directory: $!";
	my $done = eval { IPC::Run::run(\@command, '<', \undef, '>&', \$output) };
	$output = $@ if $@;
	chdir $here;
	return $done;
}

sub ok_runs
{
	my ($what, @command) = @_;

	return ok(runs(@command), $what) || diag($output);
}

# The files below a directory.
sub files
{
	my ($directory) = @_;
	my @found;

	runs($directory, qw(find . -type f)) or die $output;
	return join "\n", sort split /\n/, $output;
}

# A copy of the source, without what a build may have left.
sub copy
{
	my ($to) = @_;

	mkdir $to or die "$to: $!";
	runs($tree, 'sh', '-c', 'tar -cf - --exclude=./.git --exclude=./.cache --exclude="*.o" --exclude="*.so" '
		  . '--exclude="./aibilling_polar--*" . '
		  . '| tar -xf - -C "$1"', 'sh', $to) or die $output;
	return $to;
}

# --- build ----------------------------------------------------------------------------------

my $source = copy("$place/source");
my $blank = copy("$place/a source");
ok_runs('builds where the path has a blank', $blank, 'make', @quick, 'all');
ok_runs('installs into a root whose path has one', $blank, 'make', @quick, "DESTDIR=$place/a root", 'install');
my $installed = files("$place/a root");
like($installed, qr{/aibilling_polar\.so$}m, 'the library is installed');
like($installed, qr{extension/\Q$_\E$}m, "$_ is installed")
  foreach 'aibilling_polar.control', 'aibilling_polar-prices.json',
  map { "aibilling_polar--$_.sql" } '1.0', '1.0--1.1', "1.1--$version", $version;

my $before = files($source);
my @beside = ('make', '-f', "$source/Makefile", "VPATH=$source", @quick);
my $build = "$place/a build";
mkdir $build;
ok_runs('builds beside the source', $build, @beside, 'all');
ok_runs('installs from there', $build, @beside, "DESTDIR=$place/beside", 'install');
is(files("$place/beside"), $installed, 'the same files');
is(files($source), $before, 'and writes nothing into the source');
ok_runs('uninstalls', $build, @beside, "DESTDIR=$place/beside", 'uninstall');
is(files("$place/beside"), '', 'every file');

# --- a server that finds the extension in another directory ---------------------------------

my $server = PostgreSQL::Test::Cluster->new('elsewhere');
$server->init(extra => [ '--encoding=UTF8', '--locale=C' ]);
$server->start;
SKIP:
{
	my %has = map { $_ => 1 } split /\n/, $server->safe_psql('postgres',
		"SELECT name FROM pg_settings WHERE name IN ('extension_control_path', 'extension_destdir')");
	skip 'this server finds extensions in its own directory only', 6 if !%has;

	# One that this server cannot mistake for its own: with other prices, and read-only.
	my $root = "$place/elsewhere";
	my $library = $server->config_data('--pkglibdir');
	my $share = $server->config_data('--sharedir');
	ok_runs('installs for a server that lies elsewhere',
		$blank, 'make', @quick, "DESTDIR=$root", "pkglibdir=$library", "datadir=$share", 'install');
	ok_runs('with other prices', "$root$share/extension", 'sh', '-c',
		'sed "s/^\"package_version\": .*/\"package_version\": \"elsewhere\",/" aibilling_polar-prices.json >p'
		  . ' && mv p aibilling_polar-prices.json && chmod -R a-w .');
	my $prices = "SELECT aibilling.bundled_prices()->>'package_version'";
	$server->safe_psql('postgres', 'CREATE EXTENSION aibilling_polar');
	my $own = $server->safe_psql('postgres', $prices);
	isnt($own, 'elsewhere', "the server's own prices");
	$server->append_conf('postgresql.conf',
		$has{extension_control_path}
		? "extension_control_path = '/nowhere:$root$share:\$system'\ndynamic_library_path = '$root$library:\$libdir'\n"
		: "extension_destdir = '$root'\n");
	$server->stop;
	$server->start;
	is($server->safe_psql('postgres', $prices), 'elsewhere', 'those beside the control file that the server finds');
	$server->safe_psql('postgres',
		$has{extension_control_path} ? "ALTER SYSTEM SET extension_control_path = '\$system:$root$share'"
		: "ALTER SYSTEM SET extension_destdir = '/nowhere'");
	$server->reload;
	is($server->safe_psql('postgres', $prices), $own, 'and its own where that comes first');
	ok_runs('is done', $root, qw(chmod -R u+w .));
}
$server->stop;

# --- tests on a server of the packager's ----------------------------------------------------

foreach my $case (
	[ 'stock', '' ],
	[ 'preloaded', "shared_preload_libraries = 'aibilling_polar'\nmax_prepared_transactions = 3\n" ])
{
	my ($name, $conf) = @$case;
	my $node = PostgreSQL::Test::Cluster->new($name);

	$node->init(extra => [ '--encoding=UTF8', '--locale=C' ]);
	$node->append_conf('postgresql.conf', "fsync = off\n$conf");
	$node->start;
	$node->safe_psql('postgres', 'CREATE ROLE "the packager" SUPERUSER LOGIN');
	local @ENV{qw(PGHOST PGPORT PGUSER)} = ($node->host, $node->port, 'the packager');
	ok_runs("installcheck on a server: $name", $build, @beside, 'installcheck');
	like($output, qr/^(ok \d+ +- |test )delivery/m, "$name: the isolation tests, too");
	unlike($output, qr/\bprove\b|Files=/, "$name: no TAP tests");
	my $result = slurp_file("$build/results/prepared.out");
	($conf ? \&unlike : \&like)->($result, qr/^skipped: max_prepared_transactions is 0/m,
		"$name: what cannot run there says so, and only that");
	$node->stop;
}

foreach my $target ('prove_installcheck', 'installcheck REGRESS= ISOLATION=')
{
	ok_runs("TAP tests by $target", $build, @beside, split(/ /, $target), 'PROVE_TESTS=t/001_stand_in.pl');
	like($output, qr{001_stand_in.*Files=1,.*Result: PASS}s, 'that which is named');
}

# --- archives -----------------------------------------------------------------------------------

# What is packed: with git what is committed, and without it what an archive's MANIFEST names.
unlink "$source/MANIFEST";
SKIP:
{
	skip 'git is not installed', 3 unless runs($source, qw(git --version));
	my @git = ('git', '-c', 'user.name=t', '-c', 'user.email=t@localhost', '-c', 'safe.directory=*');
	runs($source, @git, @$_) || die $output
	  foreach [qw(init -q)], [qw(add -A)], [qw(commit -q -m all)];
	runs($source, @git, 'ls-files') or die $output;
	my $tracked = join '', map { "$_\n" } sort split /\n/, $output;
	ok_runs('packs a checkout', $source, 'make', @quick, 'dist');
	my ($tar) = glob "$source/aibilling_polar-*.tar.gz";
	ok_runs('unpacks', $place, 'tar', '-xf', $tar);
	(my $unpacked = $tar) =~ s{.*/(.*)\.tar\.gz$}{$place/$1};
	is(slurp_file("$unpacked/MANIFEST"), $tracked, 'what git knows is in it');
	runs($place, 'rm', '-rf', $unpacked);
	runs($source, 'sh', '-c', 'rm -rf .git aibilling_polar-*') or die $output;
}
ok(!runs($source, 'make', @quick, 'dist'), 'neither a checkout nor an archive is not packed');
like($output, qr/neither a checkout nor an unpacked archive/, 'and says why');
append_to_file("$source/MANIFEST", $before =~ s{^\./}{}gmr =~ s{^MANIFEST\n}{}mr . "\n");
ok_runs('packs', $source, 'make', @quick, 'dist');
my ($tar) = glob "$source/aibilling_polar-*.tar.gz";
my ($zip) = glob "$source/aibilling_polar-*.zip";
ok_runs('unpacks', $place, 'tar', '-xf', $tar);
(my $unpacked = $tar) =~ s{.*/(.*)\.tar\.gz$}{$place/$1};
ok_runs('an unpacked archive packs itself', $unpacked, 'make', @quick, 'dist');
foreach my $archive ($tar, $zip)
{
	my ($name) = $archive =~ m{([^/]*)$};
	is(slurp_file("$unpacked/$name") eq slurp_file($archive) ? 'equal' : 'differs', 'equal', "$name: to the last byte");
}
ok(!-e "$unpacked/.git", 'no git there');
ok_runs('builds from it', $unpacked, 'make', @quick, '-j2', 'all');

# --- PGXN ---------------------------------------------------------------------------------------

my $meta = decode_json(slurp_file("$unpacked/META.json"));
my $three = $version . '.0' x (2 - ($version =~ tr/././));
is($meta->{version}, $three, 'META.json has the version of the control file');
like($zip, qr{/aibilling_polar-\Q$three\E\.zip$}, 'and so has the archive for PGXN');
is_deeply([ grep { !length($meta->{$_} // '') } qw(name abstract version maintainer license provides meta-spec) ],
	[], 'META.json has what PGXN requires');
like($meta->{license}, qr/^(postgresql|mit|bsd|apache_2_0)$/, 'a licence that PGXN knows');
is($meta->{'meta-spec'}{version}, '1.0.0', 'of this version of its specification');
foreach my $name (sort keys %{ $meta->{provides} })
{
	my $provided = $meta->{provides}{$name};
	is($provided->{version}, $three, "$name: version");
	ok(-f "$unpacked/$provided->{$_}", "$name: $_ exists") foreach qw(file docfile);
	like($provided->{abstract}, qr/\w/, "$name: abstract");
}
SKIP:
{
	skip 'pgxnclient is not installed', 2 unless runs($place, qw(pgxn --version));
	# It asks for the right to write where libraries are.
	append_to_file("$place/pg_config", <<"SH");
#!/bin/sh
case \${1:-} in --libdir) echo "$place" ;; *) exec "$pg_config" "\$@" ;; esac
SH
	chmod 0755, "$place/pg_config";
	local @ENV{qw(HOME DESTDIR MAKEFLAGS)} = ($place, "$place/pgxn", ' -- with_llvm=no COPT=-O0');
	ok_runs('pgxn installs the archive', $place, 'pgxn', 'install', '--nosudo', '--pg_config', "$place/pg_config", $zip);
	is(files("$place/pgxn"), $installed, 'the same files');
}

done_testing();
