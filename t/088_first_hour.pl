# The first hour: aibilling.check_setup() on a server on which nothing is right yet.  Every line of it is made to
# fail, and what it prints as the fix is run as it is printed, until it says that all is right.  Then the mistakes of
# that hour: what is said of each, and that it is said where the reader is.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use AibillingNode;
use IPC::Run;
use PolarServer;
use PostgreSQL::Test::Utils;
use Test::More;

my $polar = PolarServer->new;
my $db = 'postgres';
my $node = AibillingNode->new('first_hour', preload => 0, conf => "shared_preload_libraries = 'auto_explain'\n");
my $token_file = $node->basedir . "/polar's token";

sub sql
{
	my ($sql) = @_;
	return $node->safe_psql($db, $sql);
}

# The one row of check_setup() whose item matches: ok (t, f or empty), wrong, fix.
sub row
{
	my ($item) = @_;
	my $found = sql("SELECT coalesce(ok::text, ''), coalesce(wrong, ''), coalesce(fix, '') "
		  . "FROM aibilling.check_setup() WHERE item ~ '$item'");
	my ($ok, $wrong, $fix) = $found =~ /\A(true|false|)\|([^|]*)\|(.*)\z/s
	  or die "check_setup() has no single row for $item: $found";
	return { ok => $ok, wrong => $wrong, fix => $fix };
}

sub is_right
{
	my ($item, $what) = @_;

	# The worker, and what it delivers, takes its time.
	$node->poll_query_until($db, "SELECT ok FROM aibilling.check_setup() WHERE item ~ '$item'");
	return is(row($item)->{ok}, 'true', $what // "right: $item") || diag(explain(row($item)));
}

sub is_wrong
{
	my ($item, $wrong, $fix) = @_;
	my $row = row($item);

	is($row->{ok}, 'false', "wrong: $item");
	like($row->{wrong}, $wrong, '... for this reason');
	like($row->{fix}, $fix, '... and this fixes it');
	return $row->{fix};
}

sub is_unknown
{
	my ($item, $wrong) = @_;
	my $row = row($item);

	is($row->{ok}, '', "unknown: $item");
	return like($row->{wrong}, $wrong, '... and why');
}

# Run a fix as printed.  We are the server's user already, so "sudo" is left out; the input is what a reader types.
sub apply
{
	my ($fix, $input) = @_;

	if ($fix =~ /;\z/)
	{
		my ($rc, $out, $err) = $node->psql($db, $fix, on_error_stop => 1);
		return is($rc, 0, "runs: $fix") || diag($err);
	}
	if ($fix =~ /restart/)
	{
		like($fix, qr{^sudo -u \S+ \S+/pg_ctl restart -D \S+$}, 'the command that restarts the server');
		return $node->restart if $ENV{AIBILLING_POSTGRES};
	}
	my $command = $fix =~ s/\bsudo (?:-u \S+ )?//gr;
	my $log = $node->logfile;
	ok(IPC::Run::run([ 'sh', '-c', "$command >>'$log' 2>&1" ], '<', \($input // '')), "runs: $fix");
	$node->_update_pid(1) if $fix =~ /restart/;
	return;
}

my $library = 'the library is preloaded';
my $place = 'place';
my $worker = 'the worker runs';

# ---------------------------------------------------------------------------
# Nothing is right
# ---------------------------------------------------------------------------

is(sql(q{SELECT string_agg(coalesce(ok::text, '-'), ' ' ORDER BY step) FROM aibilling.check_setup()}),
	'false false - false false true false', 'of a new database, only that it may send is right');
is_unknown($worker, qr/comes with the two things above.*CALL aibilling\.sync\(\)/);

apply(is_wrong($library, qr/does not name aibilling_polar/, qr/^ALTER SYSTEM SET shared_preload_libraries = 'auto_explain', 'aibilling_polar';$/));
is_unknown($library, qr/restart the server once the next thing is right/);
apply(is_wrong($place, qr/does not name "postgres"/, qr/ALTER SYSTEM SET aibilling_polar\.databases = 'postgres';$/));
is_unknown($place, qr/has not been restarted since/);
apply(is_wrong($library, qr/has not been restarted since/, qr/restart/));
is_right($library);
is_right($place);
is_right($worker);
is(sql('SHOW shared_preload_libraries'), 'auto_explain, aibilling_polar', 'what was preloaded still is');

apply(is_wrong('there are prices', qr/aibilling\.price is empty/, qr/^SELECT aibilling\.load_bundled_prices\(\);$/));
is_right('there are prices');

# ---------------------------------------------------------------------------
# The server and its token
# ---------------------------------------------------------------------------

my $readable = 'server polar.*can be read';
my $accepted = 'server polar.*accepts the token';

apply(is_wrong('there is a server', qr/no server says where events go/, qr/^CREATE SERVER polar FOREIGN DATA WRAPPER polar/));
is_right('there is a server');

# What differs here from the reader's machine: where events go, and where the token is.
sql("ALTER SERVER polar OPTIONS (DROP environment, ADD url '" . $polar->url . "', SET access_token_file '" . ($token_file =~ s/'/''/gr) . "')");
apply(is_wrong($readable, qr/could not open access token file.*No such file.*paste.*scope events:write/, qr/^sudo sh -c /), $polar->token . "\n");
is_right($readable);
is_right($accepted);
is((stat $token_file)[2] & 07777, 0600, 'the token file is nobody else\'s to read');
is($polar->summary->{stored}, 0, 'asking stores nothing');

chmod 0644, $token_file or die;
apply(is_wrong($readable, qr/open to group or others; use chmod 0600/, qr/^sudo chmod 0600 /));
is_unknown($accepted, qr/once the token can be read/) if row($readable)->{ok} ne 'true';
is_right($readable);

foreach my $content (
	[ '"' . $polar->token . '"', qr/is in quotes/ ],
	[ "'" . $polar->token . "'", qr/is in quotes/ ],
	[ 'POLAR_ACCESS_TOKEN=' . $polar->token, qr/begins with a name and "="/ ],
	[ 'Bearer ' . $polar->token, qr/begins with "Bearer"/ ],
	[ '', qr/is empty/ ],
	[ $polar->token . "\n" . $polar->token, qr/contains a blank/ ])
{
	$node->write_token($token_file, $content->[0]);
	my $fix = is_wrong($readable, $content->[1], qr/cat > /);
	is_unknown($accepted, qr/once the token can be read/);
	apply($fix, $polar->token . "\n");
	is_right($readable);
}
foreach my $token ('abc=', 'abc==', 'a.b-c~d+e/f')
{
	$node->write_token($token_file, $token);
	is_right($readable, "a token may be $token");
}

unlink $token_file;
mkdir $token_file or die;
apply(is_wrong($readable, qr/is not a regular file/, qr/^sudo mv /));
apply(is_wrong($readable, qr/No such file/, qr/cat > /), 'polar_oat_of_another_organization');

apply(is_wrong($accepted, qr/HTTP 401.*paste/, qr/cat > /), $polar->token . "\n");
is_right($accepted);
$polar->tokens(token => 'polar_oat_reader', scopes => ['events:read']);
$node->write_token($token_file, 'polar_oat_reader');
apply(is_wrong($accepted, qr/HTTP 403.*scope events:write/, qr/cat > /), $polar->token . "\n");
is_right($accepted);

$polar->fault(kind => '429', retry_after => 60);
is_unknown($accepted, qr/look again in a minute.*429/);
$polar->fault(kind => '503');
is_wrong($accepted, qr/HTTP 503: the server failed/, qr{^curl -v http://127\.0\.0\.1:\d+/v1/events/ingest$});
is_right($accepted);
$polar->stop;
is_wrong($accepted, qr{http://127\.0\.0\.1:\d+ was not reached: .*proxy}, qr{^curl -v http://127\.0\.0\.1:\d+/v1/events/ingest$});
$polar->start;
is_right($accepted);
sql(q{CREATE SERVER nowhere FOREIGN DATA WRAPPER polar OPTIONS (url 'https://nowhere.invalid/base');
	CREATE USER MAPPING FOR PUBLIC SERVER nowhere OPTIONS (access_token 'x')});
is_wrong('server nowhere.*accepts', qr/name look-up failed/, qr/^getent hosts nowhere\.invalid$/);
sql('DROP SERVER nowhere CASCADE');

sql('ALTER SERVER polar OPTIONS (DROP access_token_file)');
apply(is_wrong($readable, qr/no access token: server "polar" has no option "access_token_file"/,
	qr/^ALTER SERVER polar OPTIONS \(ADD access_token_file '.*'\);$/));
is_wrong($readable, qr{/etc/postgresql/polar\.token}, qr/cat > /);
sql("ALTER SERVER polar OPTIONS (DROP access_token_file); CREATE USER MAPPING FOR PUBLIC SERVER polar");
my $mapping = is_wrong($readable, qr/the user mapping for PUBLIC/, qr/^ALTER USER MAPPING FOR PUBLIC SERVER polar OPTIONS \(ADD access_token 'polar_oat_\.\.\.'\);$/);
apply($mapping);
apply(is_wrong($accepted, qr/HTTP 401/, qr/^ALTER USER MAPPING FOR PUBLIC SERVER polar OPTIONS \(SET access_token 'polar_oat_\.\.\.'\);$/)
	  =~ s/polar_oat_\.\.\./$PolarServer::TOKEN/r);
is_right($accepted);
sql("ALTER SERVER polar OPTIONS (ADD access_token_file '" . ($token_file =~ s/'/''/gr) . "')");
apply(is_wrong($readable, qr/given twice/, qr/^DROP USER MAPPING FOR PUBLIC SERVER polar;$/));
is_right($accepted);

# A secret as Docker and Kubernetes mount it, where the test can make one: dev/test as root does.
SKIP:
{
	skip 'no file of root', 3 if !$ENV{AIBILLING_ROOT_TOKEN};
	sql("ALTER SERVER polar OPTIONS (SET access_token_file '$ENV{AIBILLING_ROOT_TOKEN}/group')");
	is_right($readable, 'a file of root that the server\'s group may read');
	sql("ALTER SERVER polar OPTIONS (SET access_token_file '$ENV{AIBILLING_ROOT_TOKEN}/others')");
	like(row($readable)->{wrong}, qr/is open to others.*chmod 0640/, 'but not everybody');
	sql("ALTER SERVER polar OPTIONS (SET access_token_file '$ENV{AIBILLING_ROOT_TOKEN}/root')");
	like(row($readable)->{wrong}, qr/Permission denied.*readable by the operating system user/, 'a file of root alone');
	sql("ALTER SERVER polar OPTIONS (SET access_token_file '" . ($token_file =~ s/'/''/gr) . "')");
}

# ---------------------------------------------------------------------------
# The usage table and its first row
# ---------------------------------------------------------------------------

my $attached = 'a usage table is attached';
my $stopped = 'usage table public.usage: nothing stops';
my $delivered = 'usage table public.usage: a row of it is delivered';

apply(is_wrong($attached, qr/none is that you own$/, qr/^SELECT aibilling\.create_usage_table\('usage', server => 'polar'\);$/));
is_right($attached);
sql("SELECT aibilling.detach('usage')");
apply(is_wrong($attached, qr/there is a table "usage"/, qr/^SELECT aibilling\.attach\('usage', server => 'polar'\);$/));
is_right($attached);
is_right($stopped);

sql("SELECT aibilling.pause('polar')");
my $insert = is_wrong($delivered, qr/no row has been inserted/, qr/^INSERT INTO public\.usage/);
apply($insert);
is_wrong($delivered, qr/wait for what is wrong above/, qr/^CALL aibilling\.sync\(\);$/);
apply(is_wrong($stopped, qr/^paused/, qr/^SELECT aibilling\.resume\('polar'\);$/));
is_right($stopped);
is_right($delivered);
is(sql('SELECT bool_and(ok) FROM aibilling.check_setup()'), 't', 'all is right');
is(($polar->events)[0]{event}{name}, 'check_setup', 'the first event has a name that no meter counts');

sql('ALTER TABLE usage DROP CONSTRAINT usage_pkey');
apply(is_wrong($stopped, qr/the same id/, qr/^ALTER TABLE public\.usage ADD UNIQUE \(id\);$/));
is_right($stopped);

foreach my $row ([ 'rejected', 'provider_cost', '1', qr/^rejected.*row 1: / ], [ 'unpriced', 'external_customer_id, model, input_tokens', "'c', 'gtp-5', 1", qr/^there is no price.*row 1: .*gtp-5/ ])
{
	my ($state, $columns, $values, $wrong) = @$row;
	sql("CREATE TABLE t (LIKE usage INCLUDING ALL); SELECT aibilling.attach('t', 'polar'); INSERT INTO t (id, $columns) VALUES (1, $values)");
	my $fix = is_wrong('usage table public.t: a row', $wrong, qr/^SELECT \* FROM aibilling\.(outbox|unpriced) WHERE/);
	apply($fix);
	sql("DROP TABLE t");
}

# ---------------------------------------------------------------------------
# What stops a table that was right before
# ---------------------------------------------------------------------------

my $t_stopped = 'usage table public.t: nothing stops';
my $t_delivered = 'usage table public.t: a row of it is delivered';

# A table whose first column of text that is not ours is to be mistaken for none of ours.
sub new_table
{
	sql("SELECT aibilling.create_usage_table('t', 'polar'); ALTER TABLE t ADD team text");
	return;
}

# What is done to it; what is said of that; the fix.  Then a row is delivered again, which needs the column's values.
foreach my $case (
	[ 'ALTER TABLE t RENAME model TO llm', qr/^column "model" of type text is missing; .*renamed/, qr/^ALTER TABLE public\.t RENAME llm TO model;$/ ],
	[ 'ALTER TABLE t RENAME model TO "LLM"; ALTER TABLE t RENAME provider TO vendor', qr/"provider".*"model"/,
		qr/^ALTER TABLE public\.t RENAME vendor TO provider;\nALTER TABLE public\.t RENAME "LLM" TO model;$/ ],
	[ 'ALTER TABLE t RENAME cost_cents TO cents', qr/"cost_cents" of type numeric/, qr/RENAME cents TO cost_cents;$/ ],
	[ 'ALTER TABLE t DROP units', qr/^column "units" of type jsonb is missing; .*dropped/, qr/^ALTER TABLE public\.t ADD units jsonb;$/ ],
	[ 'ALTER TABLE t DROP generation_id, DROP parent_id', qr/"generation_id".*"parent_id"/, qr/ADD generation_id text;\n.* ADD parent_id text;$/ ],
	[ 'ALTER TABLE t ALTER input_tokens TYPE text', qr/^column "input_tokens" is of type text, not bigint/,
		qr/ALTER input_tokens TYPE bigint USING input_tokens::bigint;$/ ],
	[ 'ALTER TABLE t ALTER occurred_at TYPE timestamp', qr/^column "occurred_at" is of type timestamp without/,
		qr/ALTER occurred_at TYPE timestamp with time zone USING occurred_at AT TIME ZONE 'UTC';$/ ],
	[ 'ALTER TABLE t ALTER tags TYPE json', qr/^column "tags" is of type json,/, qr/ALTER tags TYPE jsonb USING tags::jsonb;$/ ],
	[ 'ALTER TABLE t ALTER cost_cents TYPE numeric(10,2)', qr/^column "cost_cents" must hold/, qr/ALTER cost_cents TYPE numeric;$/ ],
	[ 'ALTER TABLE t ALTER cost_status TYPE varchar(5) USING NULL', qr/^column "cost_status" must hold 10/, qr/ALTER cost_status TYPE text;$/ ],
	[ 'UPDATE t SET tags = tags; DELETE FROM t; ALTER TABLE t ALTER cost_nanos SET NOT NULL', qr/^column "cost_nanos" is NOT NULL/, qr/ALTER cost_nanos DROP NOT NULL;$/ ],
	[ "CREATE DOMAIN done AS text CHECK (VALUE <> 'free'); ALTER TABLE t ALTER cost_status TYPE done", qr/^column "cost_status" is of a domain/, qr/ALTER cost_status TYPE text;$/ ],
	[ "CREATE COLLATION near (provider = icu, locale = 'und', deterministic = false); ALTER TABLE t ALTER external_id TYPE text COLLATE near", qr/^column "external_id" has a nondeterministic/,
		qr/ALTER external_id TYPE text COLLATE pg_catalog\."default";$/ ],
	[ 'ALTER TABLE t ALTER request_count SET NOT NULL, ALTER request_count ADD GENERATED BY DEFAULT AS IDENTITY', qr/^column "request_count" is an identity/, qr/ALTER request_count DROP IDENTITY, ALTER request_count DROP NOT NULL;$/ ],
	[ 'ALTER TABLE t DROP model, ADD model text GENERATED ALWAYS AS (provider) STORED', qr/^column "model" is generated/, qr/ALTER model DROP EXPRESSION;$/ ])
{
	my ($change, $wrong, $fix) = @$case;

	new_table();
	sql(q{INSERT INTO t (external_customer_id, provider, model, input_tokens, output_tokens) VALUES ('c', 'openai', 'gpt-5', 1, 1)}) if $change !~ /NOT NULL/;
	$node->wait_settled;
	my ($rc, undef, $err) = $node->psql($db, $change, on_error_stop => 1);
	if ($rc != 0 && $err =~ /ICU is not supported/) { sql('DROP TABLE t'); next; }
	is($rc, 0, $change) or diag($err);
	apply(is_wrong($t_stopped, $wrong, $fix));
	apply(row($t_stopped)->{fix}) if row($t_stopped)->{wrong} =~ /^blocked/;
	is_right($t_stopped);
	sql(q{INSERT INTO t (external_customer_id, provider, model, input_tokens, output_tokens) VALUES ('c', 'openai', 'gpt-5', 2, 2)});
	$node->wait_settled;
	is(sql(q{SELECT count(*) FROM aibilling.outbox WHERE usage_table = 't'::regclass}), '0', '... and rows are delivered again');
	sql('DROP TABLE t');
}

# Rows wait, and are delivered by the fix.
new_table();
sql(q{SELECT aibilling.pause('polar'); INSERT INTO t (external_customer_id, provider, model, input_tokens, output_tokens) VALUES ('c', 'openai', 'gpt-5', 1, 1);
	ALTER TABLE t RENAME model TO llm; SELECT aibilling.resume('polar')});
$node->poll_query_until($db, "SELECT status ~ '^blocked: column' FROM aibilling.status WHERE usage_table = 't'::regclass");
apply(is_wrong($t_stopped, qr/"model" of type text is missing/, qr/RENAME llm TO model/));
apply(row($t_stopped)->{fix}) if row($t_stopped)->{ok} ne 'true';
is_right($t_delivered, 'what waited is delivered');

# Rows that the table's owner may not read, and a server that they may not use.
sql(q{CREATE ROLE t_owner; GRANT CREATE ON SCHEMA public TO t_owner; ALTER TABLE t OWNER TO t_owner; GRANT USAGE ON FOREIGN SERVER polar TO t_owner;
	ALTER TABLE t ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
	INSERT INTO t (external_customer_id, provider_cost) VALUES ('c', 0.01)});
$node->poll_query_until($db, "SELECT NOT ok FROM aibilling.check_setup() WHERE item ~ '$t_stopped'");
apply(is_wrong($t_stopped, qr/^blocked: .*row-level security.*owner/, qr/^ALTER TABLE public\.t NO FORCE ROW LEVEL SECURITY;$/));
apply(row($t_stopped)->{fix}) if row($t_stopped)->{ok} ne 'true';
is_right($t_stopped);
$node->wait_settled;
sql(q{REVOKE USAGE ON FOREIGN SERVER polar FROM t_owner; INSERT INTO t (external_customer_id, provider_cost) VALUES ('c', 0.01)});
apply(is_wrong($t_stopped, qr/^its owner may not use its server/, qr/^GRANT USAGE ON FOREIGN SERVER polar TO t_owner;$/));
apply(row($t_stopped)->{fix}) if row($t_stopped)->{ok} ne 'true';
is_right($t_stopped);
$node->wait_settled;
sql('DROP TABLE t');

# Locked by another.
new_table();
my $locker = $node->background_psql($db);
$locker->query_safe('BEGIN; LOCK TABLE t');
my $who = is_wrong($t_stopped, qr/has locked the table.*pg_terminate_backend/, qr/^SELECT a\.pid/);
like(sql($who), qr/^\d+\|.*LOCK TABLE t/, 'who has');
$locker->query_safe('ROLLBACK');
$locker->quit;
is_right($t_stopped);

# A server that is gone, and the table still there.
foreach my $replicated ('', ', replicated => true')
{
	sql("SELECT aibilling.attach('t', 'polar'$replicated); DROP SERVER IF EXISTS lost CASCADE; CREATE SERVER aaa FOREIGN DATA WRAPPER polar OPTIONS (url '" . $polar->url . "');"
		  . " CREATE USER MAPPING FOR PUBLIC SERVER aaa OPTIONS (access_token '$PolarServer::TOKEN')");
	sql("CREATE SERVER lost FOREIGN DATA WRAPPER polar OPTIONS (url '" . $polar->url . "'); SELECT aibilling.attach('t', 'lost'$replicated)");
	# refused, but for who turns event triggers off, as a restore may
	sql('SET session_replication_role = replica; DROP SERVER lost CASCADE');
	my $again = is_wrong($t_stopped, qr/^its server "lost" does not exist/, qr/^SELECT aibilling\.attach\('public\.t', server => 'aaa'\Q$replicated\E\);$/);
	sql("CREATE SERVER lost FOREIGN DATA WRAPPER polar OPTIONS (url '" . $polar->url . "'); CREATE USER MAPPING FOR PUBLIC SERVER lost OPTIONS (access_token '$PolarServer::TOKEN')");
	apply(is_wrong($t_stopped, qr/^its server "lost" does not exist/, qr/server => 'lost'\Q$replicated\E\);$/));
	is_right($t_stopped, 'a server of the same name is preferred');
	sql(q{INSERT INTO t (external_id, external_customer_id, provider_cost) VALUES (gen_random_uuid(), 'c', 0.01)});
	is_right($t_delivered);
	$node->wait_settled;
	sql('DROP SERVER aaa CASCADE');
}

# The token of the table's owner, which is gone.
sql("ALTER TABLE t OWNER TO t_owner; ALTER SERVER polar OPTIONS (DROP access_token_file); CREATE USER MAPPING FOR t_owner SERVER polar OPTIONS (access_token '$PolarServer::TOKEN');"
	  . " SELECT aibilling.attach('t', 'polar')");
is_right('token of role t_owner: Polar accepts');
sql('DROP USER MAPPING FOR t_owner SERVER polar');
is_wrong($readable, qr/no access token/, qr/^ALTER SERVER polar OPTIONS \(ADD access_token_file '/);
sql("ALTER SERVER polar OPTIONS (ADD access_token_file '" . ($token_file =~ s/'/''/gr) . "')");
is_right($accepted);
sql('DROP TABLE t; DROP SERVER lost CASCADE');

# A worker that ends again and again.
sql(q{
CREATE FUNCTION end_worker() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RAISE 'not to be touched'; END$$;
CREATE TRIGGER end_worker BEFORE INSERT OR UPDATE ON aibilling.server_state FOR EACH ROW EXECUTE FUNCTION end_worker();
INSERT INTO usage (external_customer_id, provider_cost) VALUES ('c', 0.01)});
$polar->fault(kind => '401', times => 'always');
sql(q{INSERT INTO usage (external_customer_id, provider_cost) VALUES ('c', 0.01)});
$node->poll_query_until($db, "SELECT NOT ok FROM aibilling.check_setup() WHERE item ~ '$worker'");
my $sync = is_wrong($worker, qr/^it has ended with an error,.*: not to be touched/, qr/^CALL aibilling\.sync\(\);$/);
my (undef, undef, $sync_says) = $node->psql($db, $sync);
like($sync_says, qr/ERROR:  not to be touched/, 'which runs into the same');
sql('DROP FUNCTION end_worker CASCADE');
$polar->clear_faults;
apply($sync);
is_right($worker);
$node->wait_settled;

# ---------------------------------------------------------------------------
# The worker's places, names with capital letters, copies
# ---------------------------------------------------------------------------

$node->append_conf('postgresql.conf', 'max_worker_processes = 1');
$node->restart;
$node->poll_query_until($db, "SELECT NOT ok FROM aibilling.check_setup() WHERE item ~ '$worker'");
apply(is_wrong($worker, qr/^max_worker_processes is 1/, qr/^ALTER SYSTEM SET max_worker_processes = 2;$/));
apply(is_wrong($worker, qr/has not been restarted since/, qr/restart/));
is_right($worker);

sql('CREATE DATABASE "MyApp"');
sql("ALTER SYSTEM SET aibilling_polar.databases = 'postgres, postgres, MyApp, later'");
sql('ALTER SYSTEM SET max_worker_processes = 8');
my $log = $node->log_offset;
$node->restart;
$node->wait_for_log(qr/waits for database "myapp", which does not exist\n.*HINT:  There is a database "MyApp".*double quotes/, $log);
$node->wait_for_log(qr/waits for database "later", which does not exist\n.*HINT:  Create it, or take it out/, $log);
like($node->log_since($log), qr/database "postgres" is named twice/, 'a database that is named twice is told of');
is(sql("SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'aibilling_polar worker' AND datname = 'postgres'"), '1', '... and has one worker');
sql('CREATE DATABASE later');
$node->wait_for_log(qr/database "later" waits for the extension\n.*HINT:  Run CREATE EXTENSION aibilling_polar in/, $log);
is(sql("SELECT count(*) FROM pg_stat_activity WHERE datname = 'later' AND query = 'waiting for extension aibilling_polar'"),
	'1', 'and so pg_stat_activity says');
my @said = $node->log_since($log) =~ /database "(?:myapp|later)".* does not exist/g;
is(scalar(@said), 4, 'each is said by PostgreSQL and by the worker, once') or diag(join "\n", @said);

$db = 'MyApp';
sql('CREATE EXTENSION aibilling_polar');
like(sql('SELECT status FROM aibilling.status'), qr/does not name "MyApp" \(a name with capital letters is written in double quotes there\)/, 'status knows it, too');
apply(is_wrong($place, qr/in double quotes/, qr/^ALTER SYSTEM SET aibilling_polar\.databases = 'postgres, postgres, later, "MyApp"';$/));
apply(is_wrong($place, qr/has not been restarted since/, qr/restart/));
is_right($place);
is_right($worker);

$db = 'later';
sql("CREATE EXTENSION aibilling_polar; CREATE SERVER polar FOREIGN DATA WRAPPER polar OPTIONS (url '" . $polar->url . "');"
	  . " SELECT aibilling.create_usage_table('usage', server => 'polar')");
$node->safe_psql('postgres', "ALTER SYSTEM SET aibilling_polar.databases = 'postgres'");
$node->restart;
$node->safe_psql('postgres', 'CREATE DATABASE copy TEMPLATE later');
$db = 'copy';
apply(is_wrong('the database may send', qr/is a copy/, qr/^SELECT aibilling\.arm\(\);$/));
is_right('the database may send');

# ---------------------------------------------------------------------------
# Who may ask
# ---------------------------------------------------------------------------

$db = 'postgres';
sql('CREATE ROLE app LOGIN; CREATE ROLE owner LOGIN; GRANT CREATE ON SCHEMA public TO owner; GRANT USAGE ON FOREIGN SERVER polar TO owner;');
my $arrived = $polar->summary->{arrived};
my ($rc, $out, $err) = $node->psql('postgres', "SELECT item, ok, wrong FROM aibilling.check_setup()", extra_params => [ '-U', 'app' ]);
is($rc, 0, 'anyone may ask');
unlike($out, qr/server polar/, 'and is told nothing of a server that is not theirs to use');
($rc, $out, $err) = $node->psql('postgres', "SELECT item, ok, wrong FROM aibilling.check_setup()", extra_params => [ '-U', 'owner' ]);
like($out, qr/server polar: the token can be read\|\|only the server's owner and superusers/, 'whoever may not set a token does not try it');
is($polar->summary->{arrived}, $arrived, 'and sends nothing');
($rc, $out, $err) = $node->psql('postgres', 'SELECT status FROM aibilling.status', extra_params => [ '-U', 'app' ]);
is($out, '', 'whoever owns no usage table sees none');
like($err, qr/NOTICE:  no usage table is role "app"'s to see\nHINT:  .*pg_monitor/, 'and is told why');

# ---------------------------------------------------------------------------
# Other mistakes of the first hour
# ---------------------------------------------------------------------------

sub says
{
	my ($sql, $words, $what) = @_;
	my ($status, $stdout, $stderr) = $node->psql($db, $sql);
	return like($stderr, $words, $what // $sql);
}

says(q{SELECT aibilling.create_usage_table('AiUsage', 'polar')}, qr/NOTICE:  the table's name is "aiusage": .*create_usage_table\('"AiUsage"', \.\.\.\)/);
says(q{SELECT aibilling.create_usage_table('Usage Events', 'polar')}, qr/HINT:  .*in double quotes, as in create_usage_table\('"Usage Events"'/);
says(q{SELECT aibilling.create_usage_table('usage', 'polar')}, qr/\A.*ERROR:  relation "usage" already exists\nHINT:  .*SELECT aibilling\.attach\('public\.usage', server => 'polar'\)\.\s*\z/,
	'a table that exists, in two lines');
is(sql(q{SELECT state FROM aibilling.usage_status('usage', 4711)}), 'no_row', 'usage_status of a row that does not exist');
is(sql(q{CREATE TABLE elsewhere (a int); SELECT state FROM aibilling.usage_status('elsewhere', 1)}), 'not_sent', 'nor of a table that is not attached');
is(sql(q{SELECT state FROM aibilling.usage_status(4711, 1)}), 'not_sent', 'nor of one that is gone');
sql("CREATE SCHEMA billing; SELECT aibilling.create_usage_table('billing.usage', 'polar')");
says(q{SELECT * FROM aibilling.explain_cost('billing.usage', 1)}, qr/there is no row with id 1 in table billing\.usage/);

says(q{INSERT INTO usage (provider, model, external_customer_id, input_tokens) VALUES ('openai', 'gpt-5', 'c', 10)},
	qr/WARNING:  output_tokens is NULL and counts as 0, but .*"gpt-5".*\nHINT:  Set output_tokens/);
says(q{INSERT INTO usage (provider, model, external_customer_id, input_tokens, output_tokens) VALUES ('openai', 'gpt-5', 'c', 10, 0)}, qr/\A\z/, 'an output of 0 is as good as any');
says(q{INSERT INTO usage (provider, model, external_customer_id, input_tokens) VALUES ('openai', 'text-embedding-3-small', 'c', 10)}, qr/\A\z/, 'embeddings have no output');
says(q{INSERT INTO usage (provider, model, external_customer_id, input_tokens) SELECT 'openai', 'gpt-5', 'c', 10 FROM generate_series(1, 100)},
	qr/\A(?:(?!WARNING).)*WARNING(?:(?!WARNING).)*\z/s, 'it is said once');

# Models that are named in another way than the provider names them, and a row that says nothing.
says(q{INSERT INTO usage (provider, model, external_customer_id, input_tokens, output_tokens) VALUES ('anthropic', 'claude-4.5-sonnet', 'c', 1, 1)},
	qr/perhaps you meant model "claude-sonnet-4-5"/, 'the same words in another order');
says(q{INSERT INTO usage (provider, model, external_customer_id) VALUES ('openai', 'gpt-5', 'c')},
	qr/no count, unit or provider_cost is given\nHINT:  UPDATE the row: set its counts/, 'a row without counts');
sql(q{DELETE FROM usage WHERE cost_nanos IS NULL});

# A server that cannot be reached is not one that refuses.
$node->wait_settled;
$polar->stop;
sql(q{INSERT INTO usage (external_customer_id, provider_cost) VALUES ('c', 1)});
says('CALL aibilling.sync()', qr/WARNING:  .*not reached or has failed, \d+ times so far, and is tried again later: .*onnect/);
apply(is_wrong($stopped, qr/^waits until .* failures: /, qr/^SELECT aibilling\.resume\('polar'\);$/));
# The first request may have been lost on a connection that was still open; a further one certainly fails.
sql(q{INSERT INTO usage (external_customer_id, provider_cost) VALUES ('c', 1)});
$node->poll_query_until('postgres', q{SELECT aibilling.resume('polar') IS NOT NULL AND EXISTS (SELECT FROM aibilling.delivery
	WHERE usage_table = 'usage'::regclass AND state = 'failed' AND error IS NOT NULL)});
$polar->start;
sql(q{SELECT aibilling.resume('polar')});
$node->wait_settled;
like(sql(q{SELECT last_error FROM aibilling.status WHERE usage_table = 'usage'::regclass}), qr/ \(of 20.*, before the last delivery\)$/,
	'an error of long ago says so');

# DROP EXTENSION, with and without what waits.
sql(q{SELECT aibilling.pause('polar'); INSERT INTO usage (external_customer_id, provider_cost) VALUES ('c', 1), ('c', 2)});
says('DROP EXTENSION aibilling_polar', qr/ERROR:  cannot drop extension aibilling_polar: 3 usage tables are attached\nDETAIL:  2 rows of them are not delivered\. The tables stay.*\nHINT:  .*CALL aibilling\.sync\(\).* SELECT aibilling\.detach\('public\.usage'\);.*CASCADE/);
sql(q{SELECT aibilling.resume('polar')});
$node->wait_settled;
my ($hint) = ($node->psql($db, 'DROP EXTENSION aibilling_polar'))[2] =~ /Then: (.*CASCADE;)/;
apply($hint);
is(sql('SELECT count(*) > 100 FROM usage'), 't', 'the table and its rows stay');

# The name of a setting is known before the library is preloaded.
my $bare = AibillingNode->new('bare', preload => 0, conf => "aibilling_polar.databases = 'postgres'\n");
($rc, $out, $err) = $bare->psql('postgres', "LOAD 'aibilling_polar'; SHOW aibilling_polar.databases;");
is($err, '', 'the databases may be named before the library is preloaded');
is($out, 'postgres', 'and that is what they are');
$bare->stop;

$node->stop;
$polar->stop;
done_testing();
