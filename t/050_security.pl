# What each role can and cannot do, whose code runs with whose rights, and where tokens and rows go.
# doc/security.md argues what is tested here.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use AibillingNode;
use PolarServer;
use IPC::Run;
use JSON::PP;
use PostgreSQL::Test::Utils;
use Test::More;

my $polar = PolarServer->new(token => 'polar_oat_secret_of_the_owner');
my $token = $polar->token;
my $elsewhere = PolarServer->new(token => $token);

chomp(my $libdir = `pg_config --pkglibdir`);
my $with_statements = -e "$libdir/pg_stat_statements.so";
my $preload = 'aibilling_polar' . ($with_statements ? ', pg_stat_statements' : '');
my $node = AibillingNode->new(
	'security',
	extension => 0,
	conf => "shared_preload_libraries = '$preload'\naibilling_polar.poll_interval = 1\n");

# Runs SQL in a session of the role's own. Returns its output and its errors.
sub as
{
	my ($role, $sql, $database) = @_;
	my ($rc, $out, $err) =
	  $node->psql($database // 'postgres', $sql, extra_params => [ '-U', $role ], on_error_stop => 0);

	return ($out, $err);
}

sub refused
{
	my ($role, $sql, $words, $what) = @_;
	my ($out, $err) = as($role, $sql);

	return like($err, $words, $what // "$role: $sql");
}

sub allowed
{
	my ($role, $sql, $what) = @_;
	my ($out, $err) = as($role, $sql);

	$what //= "$role: " . ($sql =~ /^\s*(.{1,80})/m)[0];
	is($err =~ s/^(psql:\S+ )?(NOTICE|INFO|WARNING):.*\n?(HINT:.*\n?)?//mgr, '', $what);
	return $out;
}

my $super = $node->safe_psql('postgres', 'SELECT current_user');

# ---------------------------------------------------------------------------
# search_path and trojan objects
# ---------------------------------------------------------------------------

# Someone may create objects in public, and in a schema that all have in front of pg_catalog, before
# the extension comes: operators and functions like those of pg_catalog that say who called them.
$node->safe_psql('postgres', q{
CREATE ROLE mallory LOGIN;
CREATE DATABASE trojan;});
$node->safe_psql('trojan', q{
GRANT CREATE ON SCHEMA public TO mallory;
GRANT CREATE ON DATABASE trojan TO mallory;});
as('mallory', q{
CREATE TABLE public.spoils (called text, by_role name);
GRANT INSERT ON public.spoils TO PUBLIC;
DO $do$
DECLARE
	f record;
	body text;
BEGIN
	FOR f IN
		SELECT o.oprname::text AS name, o.oprleft AS l, o.oprright AS r, o.oprresult AS result, true AS is_operator,
			row_number() OVER () AS n
		FROM pg_operator o
		WHERE o.oprname IN ('=', '<>', '<', '>', '<=', '>=', '@>', '||', '~', '->>', '#>>', '->', '-', '+', '*', '/')
			AND o.oprleft = ANY ('{int8,int4,text,name,oid,"\"char\"",timestamptz,jsonb,numeric,regclass,int8multirange}'::regtype[])
			AND o.oprright = ANY ('{int8,int4,text,name,oid,"\"char\"",timestamptz,jsonb,numeric,regclass,int8,interval,text[]}'::regtype[])
		UNION ALL
		SELECT p.proname, p.proargtypes[0], p.proargtypes[1], p.prorettype, false, 0
		FROM pg_proc p
		WHERE p.proname IN ('now', 'clock_timestamp', 'jsonb_typeof', 'gen_random_uuid', 'quote_ident', 'octet_length',
				'isfinite', 'jsonb_each', 'trim_scale', 'concat_ws', 'starts_with', 'pg_event_trigger_dropped_objects')
			AND p.pronargs < 3 AND NOT p.proretset AND p.provariadic = 0
	LOOP
		body := format('BEGIN INSERT INTO public.spoils VALUES (%L, current_user); RETURN NULL; END', f.name);
		EXECUTE format('CREATE FUNCTION public.%I (%s) RETURNS %s LANGUAGE plpgsql AS %L',
			CASE WHEN f.is_operator THEN 'trojan_' || f.n ELSE f.name END,
			array_to_string(ARRAY[nullif(f.l, 0)::regtype, nullif(f.r, 0)::regtype], ','), f.result::regtype, body);
		IF f.is_operator THEN
			EXECUTE format('CREATE OPERATOR public.%s (FUNCTION = public.%I, LEFTARG = %s, RIGHTARG = %s)',
				f.name, 'trojan_' || f.n, f.l::regtype, f.r::regtype);
		END IF;
	END LOOP;
END
$do$;
CREATE DOMAIN public.jsonb AS pg_catalog.text;
CREATE DOMAIN public.uuid AS pg_catalog.text;
CREATE TABLE public.price AS SELECT 1 AS a;
CREATE TABLE public.outbox_entry AS SELECT 1 AS a;
}, 'trojan');
cmp_ok($node->safe_psql('trojan', q{SELECT count(*) FROM pg_operator WHERE oprnamespace = 'public'::regnamespace}),
	'>', 50, 'there are trojan operators');

my $token_file = $node->token_file($token);
my $url = $polar->url;
my ($rc, $out, $err) = $node->psql('trojan', qq{
SET search_path = public, pg_catalog;
CREATE TEMP TABLE outbox_entry (a int);
CREATE TEMP TABLE usage_table (a int);
CREATE EXTENSION aibilling_polar;
SELECT aibilling.load_bundled_prices();
CREATE SERVER polar FOREIGN DATA WRAPPER polar
	OPTIONS (url '$url', event_name 'llm_usage', access_token_file '$token_file');
SELECT aibilling.create_usage_table('public.usage', 'polar');
INSERT INTO public.usage (provider, model, external_customer_id, input_tokens, raw_usage, usage_format, tags)
	VALUES ('openai', 'gpt-5', 'a', 1200, NULL, NULL, '{"a": "b"}'), ('nobody', 'nothing', 'a', 1, NULL, NULL, '{}');
UPDATE public.usage SET model = 'gpt-5';
SELECT * FROM aibilling.preview('public.usage');
SELECT * FROM aibilling.cost('openai', 'gpt-5', 12, 34);
SELECT * FROM aibilling.explain_cost('public.usage', 1);
INSERT INTO aibilling.price (provider, model, input, output) VALUES ('nobody', 'nothing', 1, 2);
CALL aibilling.sync();
SELECT * FROM aibilling.reprice('public.usage', dry_run => false);
SELECT aibilling.retry('public.usage');
SELECT aibilling.usage_status('public.usage', 1);
SELECT aibilling.pause('polar');
SELECT aibilling.resume();
SELECT * FROM aibilling.status;
SELECT * FROM aibilling.outbox;
SELECT * FROM aibilling.unpriced;
SELECT * FROM aibilling.delivery;
DELETE FROM public.usage;
SELECT aibilling.detach('public.usage', 'discard');
DROP TABLE public.usage;
DROP SERVER polar;
}, on_error_stop => 1);
is($rc, 0, 'everything works with trojans in front of pg_catalog') or diag($err);
cmp_ok($polar->summary->{stored}, '>=', 1, 'delivery too');
is($node->safe_psql('trojan', 'SELECT called, by_role FROM public.spoils'), '', 'no trojan was called');
$node->psql('trojan', 'SET search_path = public, pg_catalog; SELECT 1::int8 = 2::int8');
is($node->safe_psql('trojan', 'SELECT count(*) FROM public.spoils'), '1', 'one would have told');

# The extension's schema is its own or there is no extension.
$node->safe_psql('trojan', 'DROP EXTENSION aibilling_polar');
as('mallory', 'CREATE SCHEMA aibilling; CREATE TABLE aibilling.outbox_entry (a int)', 'trojan');
($rc, $out, $err) = $node->psql('trojan', 'CREATE EXTENSION aibilling_polar');
like($err, qr/schema "aibilling" already exists/, 'a squatted schema is not taken over');
$node->safe_psql('postgres', 'DROP DATABASE trojan');
$polar->reset;

# ---------------------------------------------------------------------------
# Grants
# ---------------------------------------------------------------------------

$node->safe_psql('postgres', q{
CREATE EXTENSION aibilling_polar;
CREATE ROLE owner LOGIN;
CREATE ROLE app LOGIN;
CREATE ROLE stranger LOGIN;
CREATE ROLE monitor LOGIN IN ROLE pg_monitor;
CREATE ROLE eve LOGIN;
GRANT CREATE ON SCHEMA public TO owner, eve, stranger, mallory;
GRANT CREATE ON DATABASE postgres TO eve;
GRANT USAGE ON FOREIGN DATA WRAPPER polar TO eve, mallory;});
$node->create_server($polar);
$node->safe_psql('postgres', 'GRANT USAGE ON FOREIGN SERVER polar TO owner');
allowed('owner', "SELECT aibilling.create_usage_table('usage', 'polar')", 'a role with USAGE has a usage table');
allowed('owner', 'GRANT INSERT, SELECT, UPDATE ON usage TO app; GRANT USAGE ON SEQUENCE usage_id_seq TO app');

my $insert = "INSERT INTO usage (external_id, provider, model, external_customer_id, provider_cost) VALUES";
allowed('app', "$insert ('first', 'p', 'm', 'c', 0.01)", 'who may insert needs no more');
$polar->wait(events => 1);
$node->wait_settled;

is($node->safe_psql('postgres', q{
	SELECT string_agg(p.oid::regprocedure::text, ' ' ORDER BY p.proname) FROM pg_proc p
	WHERE p.pronamespace = 'aibilling'::regnamespace AND NOT has_function_privilege('stranger', p.oid, 'EXECUTE')}),
	'aibilling.mark_shipped() aibilling.on_drop_extension() aibilling.on_server_ddl() aibilling.on_sql_drop() aibilling.on_table_ddl() '
	  . 'aibilling.polar_fdw_validator(text[],oid) aibilling.price_changed() aibilling.store_below()',
	'what PUBLIC may not execute');
is($node->safe_psql('postgres', q{
	SELECT string_agg(c.relname || ' ' || p, ', ' ORDER BY c.relname, p)
	FROM pg_class c, unnest('{SELECT,INSERT,UPDATE,DELETE,TRUNCATE,REFERENCES,TRIGGER}'::text[]) p
	WHERE c.relnamespace = 'aibilling'::regnamespace AND c.relkind IN ('r', 'v', 'm', 'S', 'p')
		AND has_table_privilege('stranger', c.oid, p)}),
	'capture_failure DELETE, capture_failure INSERT, capture_failure SELECT, capture_failure UPDATE, captures INSERT, captures SELECT, captures UPDATE, '
	  . 'delivery SELECT, model_alias SELECT, outbox SELECT, price SELECT, price_quarantine SELECT, price_source SELECT, '
	  . 'progress SELECT, service_tier_rule SELECT, status SELECT, unpriced SELECT, usage_table SELECT',
	'what PUBLIC may do with tables and views');
is($node->safe_psql('postgres', q{
	SELECT count(*) FROM pg_proc WHERE pronamespace = 'aibilling'::regnamespace AND prosecdef}),
	'0', 'no function is SECURITY DEFINER');
is($node->safe_psql('postgres', q{
	SELECT string_agg(proname, ' ') FROM pg_proc
	WHERE pronamespace = 'aibilling'::regnamespace
		AND prolang IN (SELECT oid FROM pg_language WHERE lanname IN ('sql', 'plpgsql')) AND prosqlbody IS NULL
		AND NOT 'search_path=pg_catalog, pg_temp' = ANY (coalesce(proconfig, '{}'))}),
	'', 'functions in SQL have their search_path');

for my $role ('app', 'stranger')
{
	refused($role, $_->[0], $_->[1])
	  for (
		[ "SELECT aibilling.attach('usage', 'polar')", qr/must be owner of table usage/ ],
		[ "SELECT aibilling.detach('usage', 'discard')", qr/must be owner of table usage/ ],
		[ "SELECT aibilling.preview('usage')", qr/must be owner of table usage/ ],
		[ "SELECT aibilling.retry('usage')", qr/must be owner of table usage/ ],
		[ "SELECT aibilling.reprice('usage', dry_run => false)", qr/must be owner of table usage/ ],
		[ "SELECT aibilling.usage_status('usage', 1)", qr/must be owner of table usage/ ],
		[ "SELECT aibilling.pause('polar')", qr/must be owner of server "polar" or of a usage table/ ],
		[ 'SELECT aibilling.pause()', qr/must be owner of a server or of a usage table/ ],
		[ "SELECT aibilling.resume('polar')", qr/must be owner of server "polar" or of a usage table/ ],
		[ 'SELECT aibilling.resume()', qr/must be owner of a server or of a usage table/ ],
		[ 'SELECT aibilling.arm()', qr/must be owner of database/ ],
		[ 'CALL aibilling.sync()', qr/must be owner of a usage table/ ],
		[ "CALL aibilling.sync('polar')", qr/must be owner of a usage table/ ],
		[ 'SELECT aibilling.load_bundled_prices()', qr/permission denied/ ],
		[ "SELECT aibilling.create_usage_table('mine', 'polar')", qr/permission denied for/ ],
	  );
	is(allowed($role, 'SELECT count(*) FROM aibilling.status'), '0', "$role sees no status");
	is(allowed($role, 'SELECT count(*) FROM aibilling.delivery'), '0', "$role sees no ledger");
	is(allowed($role, 'SELECT count(*) FROM aibilling.outbox'), '0', "$role sees no outbox");
	is(allowed($role, 'SELECT count(*) FROM aibilling.usage_table'), '0', "$role sees no usage tables");
}
for my $role ('monitor', 'owner')
{
	is(allowed($role, 'SELECT count(*) FROM aibilling.status'), '1', "$role sees the status");
	is(allowed($role, 'SELECT count(*) FROM aibilling.delivery'), '1', "$role sees the ledger");
	is(allowed($role, "SELECT state FROM aibilling.usage_status('usage', 1)"), 'delivered', "$role sees a row's");
}
refused('monitor', "SELECT aibilling.pause('polar')", qr/must be owner/);
refused('monitor', "SELECT aibilling.retry('usage')", qr/must be owner/);
refused('monitor', "SELECT aibilling.preview('usage')", qr/must be owner/);
refused('monitor', 'CALL aibilling.sync()', qr/must be owner/);
allowed('owner', $_)
  for ("SELECT aibilling.pause('polar')", 'SELECT aibilling.resume()', 'CALL aibilling.sync()', "SELECT aibilling.retry('usage')",
	"SELECT aibilling.reprice('usage')", "SELECT aibilling.preview('usage')", "SELECT aibilling.attach('usage', 'polar')");
refused('owner', 'SELECT aibilling.arm()', qr/must be owner of database/);

# ---------------------------------------------------------------------------
# Forged deliveries
# ---------------------------------------------------------------------------

for my $role ('stranger', 'app', 'owner', 'monitor')
{
	refused($role, $_, qr/permission denied for (table|sequence)|cannot/)
	  for (
		"INSERT INTO aibilling.outbox_entry (usage_table) VALUES ('usage')",
		"DELETE FROM aibilling.outbox_entry",
		"UPDATE aibilling.delivery SET state = 'failed'",
		"DELETE FROM aibilling.delivery",
		"INSERT INTO aibilling.usage_table (usage, server, serverid) VALUES ('usage', 'polar', 1)",
		"UPDATE aibilling.usage_table SET server = 'x'",
		"DELETE FROM aibilling.server_state",
		"DELETE FROM aibilling.database_identity",
		"INSERT INTO aibilling.price (provider, model) VALUES ('p', 'm')",
		"CREATE TRIGGER t BEFORE INSERT ON aibilling.price FOR EACH ROW EXECUTE FUNCTION aibilling.price_usage()",
		"BEGIN; LOCK TABLE aibilling.outbox_entry IN ACCESS SHARE MODE",
		"BEGIN; LOCK TABLE aibilling.delivery IN ROW EXCLUSIVE MODE",
	  );
}

# Our trigger functions on a table of one's own, as they are meant ...
my $columns = 'CREATE TABLE forged (LIKE usage INCLUDING DEFAULTS)';
my $row = "INSERT INTO forged (id, external_id, provider, model, external_customer_id, provider_cost)"
  . " VALUES (1, 'forged', 'p', 'm', 'victim', 1000)";
allowed('owner', 'GRANT SELECT ON usage TO stranger');
refused('stranger', "$columns;
	CREATE TRIGGER a BEFORE INSERT OR UPDATE ON forged FOR EACH ROW EXECUTE FUNCTION aibilling.price_usage();
	CREATE TRIGGER b AFTER INSERT ON forged FOR EACH ROW EXECUTE FUNCTION aibilling.enqueue_usage();
	CREATE TRIGGER c AFTER DELETE ON forged FOR EACH ROW EXECUTE FUNCTION aibilling.guard_usage();
	$row; DELETE FROM forged; $row",
	qr/table "forged" is not attached: its rows are priced but not sent/, 'triggers on another table warn');
is($node->safe_psql('postgres', "SELECT cost_nanos FROM forged"), '1000000000000', 'its rows are priced');
is($node->safe_psql('postgres', "SELECT count(*) FROM aibilling.outbox"), '0', 'and not in the outbox');

# ... and as they are not: there is no row where they would look for one.
for my $function ('price_usage', 'enqueue_usage', 'guard_usage', 'truncate_usage')
{
	for my $definition ('BEFORE INSERT ON forged FOR EACH STATEMENT', 'AFTER INSERT ON forged FOR EACH STATEMENT',
		'BEFORE DELETE ON forged FOR EACH ROW', 'BEFORE DELETE ON forged FOR EACH STATEMENT')
	{
		my (undef, $error) = as('stranger', "DROP TABLE forged; $columns; $row;
			CREATE TRIGGER a $definition EXECUTE FUNCTION aibilling.$function();
			DELETE FROM forged; $row; SELECT 1");
		like($error, qr/function "aibilling.$function" can only be called/, "$function: $definition");
	}
}
refused('stranger', 'SELECT aibilling.price_usage()', qr/can only be called as|trigger functions can only be called as triggers/);
unlike(slurp_file($node->logfile), qr/terminated by signal/, 'no backend has crashed');

# Attaching needs the table and the server.
refused('stranger', "SELECT aibilling.attach('forged', 'polar')", qr/permission denied for foreign server polar/,
	'not to a server without USAGE');
$node->safe_psql('postgres', 'GRANT USAGE ON FOREIGN SERVER polar TO stranger');
refused('stranger', "SELECT aibilling.attach('usage', 'polar')", qr/must be owner of table usage/,
	"not another's table with it");
$node->safe_psql('postgres', 'REVOKE USAGE ON FOREIGN SERVER polar FROM stranger');

# A server's name in other hands: the table goes with its server.
my $to_elsewhere = $elsewhere->url;
$node->safe_psql('postgres', qq{
CREATE SERVER theirs FOREIGN DATA WRAPPER polar
	OPTIONS (url '$to_elsewhere', event_name 'llm_usage', access_token_file '$token_file');
ALTER SERVER theirs OWNER TO mallory;
ALTER SERVER polar RENAME TO polar_renamed;});
allowed('mallory', 'ALTER SERVER theirs RENAME TO polar; GRANT USAGE ON FOREIGN SERVER polar TO PUBLIC');
allowed('app', "$insert ('second', 'p', 'm', 'c', 0.01)");
$polar->wait(events => 2);
$node->wait_settled;
is($elsewhere->summary->{stored}, 0, 'nothing went to the server that took the name');
is($node->safe_psql('postgres', "SELECT server FROM aibilling.status"), 'polar_renamed', 'status knows the new name');
allowed('mallory', 'ALTER SERVER polar RENAME TO theirs');
$node->safe_psql('postgres', 'ALTER SERVER polar_renamed RENAME TO polar');

# What was needed to attach is needed to deliver.
$node->safe_psql('postgres', 'REVOKE USAGE ON FOREIGN SERVER polar FROM owner');
allowed('app', "$insert ('third', 'p', 'm', 'c', 0.01)");
ok($node->wait_status('blocked: its owner has no USAGE on server "polar"'), 'without USAGE nothing is sent');
$node->safe_psql('postgres', 'GRANT USAGE ON FOREIGN SERVER polar TO owner');
$polar->wait(events => 3);
$node->wait_settled;

# ---------------------------------------------------------------------------
# aibilling_polar.enqueue
# ---------------------------------------------------------------------------

refused('app', "SET aibilling_polar.enqueue = off; $insert ('evaded', 'p', 'm', 'c', 0.01)",
	qr/aibilling_polar.enqueue is ignored: "usage" belongs to another role/, "enqueue = off is ignored if the table is another's");
allowed('owner', qq{
CREATE FUNCTION log_usage(id text) RETURNS void LANGUAGE sql SECURITY DEFINER
	SET search_path = public, pg_temp
	AS \$\$ $insert (id, 'p', 'm', 'c', 0.01) \$\$});
refused('app', "SET aibilling_polar.enqueue = off; SELECT log_usage('evaded through a function')",
	qr/aibilling_polar.enqueue is ignored/, "also in a SECURITY DEFINER function of the owner's");
allowed('owner', "SET aibilling_polar.enqueue = off; $insert ('history', 'p', 'm', 'c', 0.01)");
$polar->wait(events => 5);
$node->wait_settled;
is($polar->summary->{stored}, 5, "the owner's own is not sent");

# ---------------------------------------------------------------------------
# Whose code runs with whose rights
# ---------------------------------------------------------------------------

# eve owns a table, with a trigger, a policy, an index and a constraint that call a function of hers;
# and a server, with functions. All try to take more than eve has.
$node->safe_psql('postgres', qq{
CREATE SERVER eves FOREIGN DATA WRAPPER polar
	OPTIONS (url '$url', event_name 'llm_usage', access_token_file '$token_file', requests_per_minute '0');
ALTER SERVER eves OWNER TO eve;});
allowed('eve', q{
CREATE SCHEMA eve;
GRANT USAGE ON SCHEMA eve TO PUBLIC;
CREATE TABLE eve.witness (what text, who name);
GRANT INSERT ON eve.witness TO PUBLIC;
CREATE FUNCTION eve.try(what text) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
	attempt text;
BEGIN
	INSERT INTO eve.witness VALUES (what, current_user);
	FOREACH attempt IN ARRAY ARRAY['RESET ROLE', 'RESET SESSION AUTHORIZATION', 'ALTER ROLE eve SUPERUSER',
		'GRANT owner TO eve', 'SELECT pg_read_file(''pg_hba.conf'')', 'SELECT * FROM aibilling.outbox_entry',
		'CREATE TEMP TABLE taken (a int)']
	LOOP
		BEGIN
			EXECUTE attempt;
			INSERT INTO eve.witness VALUES (what || ' succeeded: ' || attempt, current_user);
		EXCEPTION WHEN OTHERS THEN
			NULL;
		END;
	END LOOP;
	PERFORM set_config('search_path', 'eve', false);
	RETURN true;
END $$;
CREATE FUNCTION eve.pure(what text, n bigint) RETURNS boolean LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN RETURN eve.try(what); END $$;
CREATE FUNCTION eve.fired() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN PERFORM eve.try('trigger ' || TG_OP); RETURN NEW; END $$;
SELECT aibilling.create_usage_table('eve.usage', 'eves');
CREATE TRIGGER before BEFORE UPDATE ON eve.usage FOR EACH ROW EXECUTE FUNCTION eve.fired();
CREATE TRIGGER after AFTER UPDATE ON eve.usage FOR EACH ROW EXECUTE FUNCTION eve.fired();
ALTER TABLE eve.usage ADD CHECK (cost_nanos IS NULL OR eve.pure('check', cost_nanos));
CREATE INDEX ON eve.usage (eve.pure('index', cost_nanos)) WHERE cost_nanos > 0;
ALTER TABLE eve.usage ENABLE ROW LEVEL SECURITY;
CREATE POLICY p ON eve.usage USING (eve.pure('policy', id));
CREATE FUNCTION eve.meta(r jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$
BEGIN PERFORM eve.try('metadata'); RETURN '{"a": 1}'; END $$;
CREATE FUNCTION eve.name(r jsonb) RETURNS text LANGUAGE plpgsql AS $$
BEGIN PERFORM eve.try('name'); RETURN 'eve'; END $$;
ALTER SERVER eves OPTIONS (ADD metadata_function 'eve.meta', ADD event_name_function 'eve.name');
INSERT INTO eve.usage (external_id, provider, model, external_customer_id, input_tokens)
	VALUES ('eve1', 'eves', 'model', 'c', 10), ('eve2', 'eves', 'other', 'c', 10);});
is($node->safe_psql('postgres', "SELECT unpriced FROM aibilling.status WHERE server = 'eves'"), '2', 'eve waits for prices');
$node->safe_psql('postgres', "INSERT INTO aibilling.price (provider, model, input) VALUES ('eves', 'model', 1000000)");
$polar->wait(events => 6);
$node->wait_settled;
# A superuser looks at her table in all ways there are.
$node->safe_psql('postgres', q{
SELECT * FROM aibilling.status;
INSERT INTO aibilling.price (provider, model, input) VALUES ('eves', 'other', 1000000);
SELECT * FROM aibilling.preview('eve.usage');
SELECT * FROM aibilling.reprice('eve.usage', dry_run => false);
SELECT aibilling.pause('eves');
SELECT aibilling.attach('eve.usage', 'eves', 'send');
SELECT aibilling.resume('eves');
CALL aibilling.sync();
SELECT * FROM aibilling.status;});
$polar->wait(events => 7);
is($node->safe_psql('postgres', "SELECT string_agg(DISTINCT who, ' ') FROM eve.witness"), 'eve', 'her code runs as eve only');
is($node->safe_psql('postgres', "SELECT string_agg(DISTINCT what, ', ' ORDER BY what) FROM eve.witness WHERE what NOT LIKE 'trigger%'"),
	'check, index, metadata, name', 'of all her code, and takes nothing that is not hers');
like($node->safe_psql('postgres', "SELECT string_agg(DISTINCT what, ', ') FROM eve.witness"), qr/trigger UPDATE/,
	'her triggers fired at the UPDATE that priced her row');

# A column of a type of hers is read with her rights.
allowed('eve', q{
CREATE TYPE eve.moment AS (t timestamptz);
CREATE FUNCTION eve.to_time(m eve.moment) RETURNS timestamptz LANGUAGE plpgsql AS $$
BEGIN RAISE NOTICE 'cast by %', current_user; RETURN m.t; END $$;
CREATE FUNCTION eve.from_time(t timestamptz) RETURNS eve.moment LANGUAGE sql AS 'SELECT ROW(t)::eve.moment';
CREATE CAST (eve.moment AS timestamptz) WITH FUNCTION eve.to_time(eve.moment) AS IMPLICIT;
DROP POLICY p ON eve.usage;
SELECT aibilling.create_usage_table('eve.cast', 'eves');
INSERT INTO eve.cast (provider, model, external_customer_id) VALUES ('p', 'm', 'c');
ALTER TABLE eve.cast ALTER occurred_at DROP DEFAULT;
ALTER TABLE eve.cast ALTER occurred_at TYPE eve.moment USING eve.from_time(occurred_at);});
($rc, $out, $err) = $node->psql('postgres', "SELECT * FROM aibilling.reprice('eve.cast')");
like($err, qr/cast by eve/, 'her cast is called as eve');
unlike($err, qr/cast by $super/, 'and not as the superuser who reprices');
allowed('eve', 'DROP TABLE eve.cast');

# A deferred trigger does not wait for the worker's commit, where it would run as nobody in particular.
allowed('eve', q{
CREATE CONSTRAINT TRIGGER late AFTER UPDATE ON eve.usage DEFERRABLE INITIALLY DEFERRED
	FOR EACH ROW EXECUTE FUNCTION eve.fired();
INSERT INTO eve.usage (external_id, provider, model, external_customer_id, input_tokens) VALUES ('eve3', 'eves', 'late', 'c', 10);});
$node->safe_psql('postgres', "INSERT INTO aibilling.price (provider, model, input) VALUES ('eves', 'late', 1)");
$polar->wait(events => 8);
pass('a deferred trigger holds no row up');
allowed('app', "$insert ('fourth', 'p', 'm', 'c', 0.01)");
$polar->wait(events => 9);
allowed('eve', 'DROP TRIGGER late ON eve.usage');
is($node->safe_psql('postgres', "SELECT string_agg(DISTINCT who, ' ') FROM eve.witness"), 'eve', 'still as eve only');

# A name that comes to mean a function of another role.
$node->safe_psql('postgres', q{
CREATE SCHEMA installed AUTHORIZATION eve;
CREATE FUNCTION installed.meta(jsonb) RETURNS jsonb LANGUAGE sql AS
	$$ SELECT jsonb_build_object('taken', pg_read_file('PG_VERSION')) $$;});
refused('eve', "ALTER SERVER eves OPTIONS (SET metadata_function 'installed.meta')",
	qr/permission denied to set option "metadata_function"/, 'no server may name the function of a superuser');
allowed('eve', q{
CREATE SCHEMA named;
CREATE FUNCTION named.meta(r jsonb) RETURNS jsonb LANGUAGE sql AS 'SELECT eve.meta(r)';
ALTER SERVER eves OPTIONS (DROP event_name_function, SET metadata_function 'named.meta');
ALTER SCHEMA named RENAME TO named_before;
ALTER SCHEMA installed RENAME TO named;
INSERT INTO eve.usage (external_id, provider, model, external_customer_id, input_tokens) VALUES ('eve4', 'eves', 'model', 'c', 10);});
$node->poll_query_until('postgres', "SELECT EXISTS (SELECT FROM aibilling.outbox WHERE state = 'rejected')");
is($node->safe_psql('postgres', "SELECT error FROM aibilling.outbox WHERE state = 'rejected'"),
	qq{the owner of server "eves" is not a member of role $super, which owns function named.meta(jsonb)},
	'nor come to name it by renaming schemas');
allowed('eve', 'ALTER SCHEMA named RENAME TO installed; ALTER SCHEMA named_before RENAME TO named');
allowed('eve', "SELECT aibilling.retry('eve.usage')");
$polar->wait(events => 10);
$node->wait_settled;

# Requests of the worker's own fly when it calls a function.
$node->safe_psql('postgres', qq{
CREATE SERVER prices FOREIGN DATA WRAPPER polar OPTIONS (kind 'prices', format 'narev', url '$url/v1/prices');
GRANT USAGE ON FOREIGN SERVER prices TO eve;});
allowed('eve', q{
CREATE FUNCTION eve.fetches(r jsonb) RETURNS jsonb LANGUAGE sql AS
	$$ SELECT jsonb_build_object('n', count(*)) FROM aibilling.fetch_prices('prices') $$;
ALTER SERVER eves OPTIONS (SET metadata_function 'eve.fetches');
INSERT INTO eve.usage (external_id, provider, model, external_customer_id, input_tokens) VALUES ('eve5', 'eves', 'model', 'c', 10);});
$node->poll_query_until('postgres', "SELECT EXISTS (SELECT FROM aibilling.outbox WHERE state = 'rejected')");
like($node->safe_psql('postgres', "SELECT error FROM aibilling.outbox WHERE state = 'rejected'"),
	qr/cannot fetch prices within security-restricted operation/, 'a function called by the worker makes no requests');

# The code of one holds up the others for seconds only.
allowed('eve', q{
CREATE FUNCTION eve.sleeps(r jsonb) RETURNS jsonb LANGUAGE sql AS $$ SELECT '{}'::jsonb FROM pg_sleep(3600) $$;
ALTER SERVER eves OPTIONS (SET metadata_function 'eve.sleeps');
SELECT aibilling.retry('eve.usage');});
$node->poll_query_until('postgres', "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event = 'PgSleep'
	AND backend_type = 'aibilling_polar worker')");
allowed('app', "$insert ('fifth', 'p', 'm', 'c', 0.01)");
$polar->wait(events => 11, timeout => 60);
ok($node->wait_status('blocked: code that runs when its rows are read took longer than 500 ms', 'eve.usage'),
	'a function that sleeps is cancelled, and its table blocked');
is($polar->summary->{stored}, 11, 'what others have is delivered');
allowed('eve', "ALTER SERVER eves OPTIONS (SET metadata_function 'eve.meta')");
$polar->wait(events => 12);
$node->wait_settled;

# Code that catches its cancellation ends with the worker, and the next one does not call it.
my $pid = $node->worker_pid;
allowed('eve', q{
CREATE FUNCTION eve.resists(r jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$
BEGIN
	LOOP
		BEGIN
			PERFORM pg_sleep(3600);
		EXCEPTION WHEN query_canceled THEN
			RAISE LOG 'cancellation caught';
		END;
	END LOOP;
END $$;
ALTER SERVER eves OPTIONS (SET metadata_function 'eve.resists');
INSERT INTO eve.usage (external_id, provider, model, external_customer_id, input_tokens) VALUES ('eve_resists', 'eves', 'model', 'c', 10);});
allowed('app', "$insert ('meanwhile', 'p', 'm', 'c', 0.01)");
$polar->wait(events => 13);
ok($node->wait_status('blocked: code that runs when its rows are read resisted', 'eve.usage'),
	'a function that resists blocks its table');
like(slurp_file($node->logfile), qr/LOG:  cancellation caught/, 'after it was cancelled in vain');
$node->poll_query_until('postgres',
	"SELECT worker_pid <> $pid FROM aibilling.status WHERE usage_table = 'usage'::regclass");
$pid = $node->worker_pid;
allowed('eve', "ALTER SERVER eves OPTIONS (SET requests_per_minute '999')");
allowed('app', "$insert ('meanwhile too', 'p', 'm', 'c', 0.01)");
$polar->wait(events => 14);
like($node->status('eve.usage'), qr/^blocked: code that runs/, 'it stays blocked, whatever else changes');
is($node->worker_pid, $pid, 'and the next worker lives');
allowed('eve', "ALTER SERVER eves OPTIONS (SET metadata_function 'eve.meta'); SELECT aibilling.resume('eves')");
$polar->wait(events => 15);
$node->wait_settled;
pass('once fixed and resumed, its rows are delivered');

# Row-level security
allowed('eve', q{
CREATE POLICY p ON eve.usage USING (eve.pure('policy', id));
ALTER TABLE eve.usage FORCE ROW LEVEL SECURITY;
ALTER TABLE eve.usage NO FORCE ROW LEVEL SECURITY;
INSERT INTO eve.usage (external_id, provider, model, external_customer_id, input_tokens) VALUES ('eve6', 'eves', 'model', 'c', 10);});
$polar->wait(events => 16);
$node->wait_settled;
allowed('eve', 'ALTER TABLE eve.usage FORCE ROW LEVEL SECURITY');
allowed('eve', q{
ALTER TABLE eve.usage DISABLE TRIGGER after;
INSERT INTO eve.usage (external_id, provider, model, external_customer_id, input_tokens) VALUES ('eve7', 'eves', 'model', 'c', 10);});
ok($node->wait_status('blocked: query would be affected by row-level security policy for table "usage"', 'eve.usage'),
	'forced row-level security blocks the table, with the reason');
allowed('app', "$insert ('sixth', 'p', 'm', 'c', 0.01)");
$polar->wait(events => 17);
pass('and no other table');
allowed('eve', "ALTER TABLE eve.usage NO FORCE ROW LEVEL SECURITY; SELECT aibilling.resume('eves')");
$polar->wait(events => 18);
$node->wait_settled;
is($node->safe_psql('postgres', "SELECT string_agg(DISTINCT who, ' ') FROM eve.witness"), 'eve', 'all the time as eve only');

# ---------------------------------------------------------------------------
# Locks
# ---------------------------------------------------------------------------

{
	my ($in, $output) = ('', '');
	my $holder = IPC::Run::start(
		[ 'psql', '-XAtq', '-U', 'stranger', '-d', $node->connstr('postgres') ],
		'<', \$in, '>', \$output);

	$in .= q{
SELECT count(pg_advisory_lock(i)) FROM generate_series(-3, 300) i;
SELECT count(pg_advisory_lock(i, j)) FROM generate_series(-3, 10) i, generate_series(-3, 10) j;
SELECT pg_advisory_lock(oid::int, 0), pg_advisory_lock(oid::int8), pg_advisory_lock(0, oid::int) FROM pg_database;
SELECT 'held';
};
	$holder->pump until $output =~ /held/;
	my $worker = $node->worker_waits;
	kill 'TERM', $worker;
	$node->worker_waits($worker);
	allowed('app', "$insert ('seventh', 'p', 'm', 'c', 0.01)");
	$polar->wait(events => 19);
	pass('no advisory lock keeps a worker from shipping');
	$in .= "\\q\n";
	$holder->finish;
}

# ---------------------------------------------------------------------------
# Where requests go
# ---------------------------------------------------------------------------

my ($port) = $elsewhere->url =~ /:(\d+)$/;
refused('eve', "ALTER SERVER eves OPTIONS (SET url '$to_elsewhere')", qr/permission denied to set option "url"/);
refused('eve', "ALTER SERVER eves OPTIONS (ADD proxy 'http://127.0.0.1:$port')", qr/permission denied to set option "proxy"/);
refused('eve', "ALTER SERVER eves OPTIONS (ADD ca_file '/etc/passwd')", qr/permission denied to set option "ca_file"/);
refused('eve', "ALTER SERVER eves OPTIONS (SET access_token_file '/etc/passwd')",
	qr/permission denied to set option "access_token_file"/);
refused('eve', "CREATE SERVER more FOREIGN DATA WRAPPER polar OPTIONS (url '$to_elsewhere')",
	qr/permission denied to set option "url"/);
refused('owner', "ALTER SERVER polar OPTIONS (SET environment 'sandbox')", qr/must be owner of foreign server polar/);
refused($super, "ALTER SERVER polar OPTIONS (SET url '$_')", qr/unencrypted connection would show the token/)
  for ('http://10.0.0.1', 'http://localhost.example.com', 'http://169.254.169.254');
refused($super, "ALTER SERVER polar OPTIONS (SET url '$_')", qr/invalid value for option "url"/)
  for ('file:///etc/passwd', 'ftp://127.0.0.1', 'http://127.0.0.1@10.0.0.1', 'http://127.1', 'gopher://127.0.0.1', 'http://2130706433');

$elsewhere->reset;
for my $status (301, 302, 307, 308)
{
	my $offset = $node->log_offset;

	$polar->fault(kind => 'redirect', status => $status, location => "$to_elsewhere/v1/events/ingest");
	allowed('app', "$insert ('redirected by $status', 'p', 'm', 'c', 0.01)");
	ok($node->poll_query_until('postgres', "SELECT EXISTS (SELECT FROM aibilling.delivery WHERE http_status = $status)"),
		"an answer of $status");
	allowed($super, 'SELECT aibilling.resume()');
}
$polar->wait(events => 23);
$node->wait_settled;
is(scalar(@{ [ $elsewhere->requests ] }), 0, 'no redirect is followed, no token goes along');

# An answer without end
$polar->fault(kind => 'garbage', what => 'huge');
allowed('app', "$insert ('huge', 'p', 'm', 'c', 0.01)");
ok($node->poll_query_until('postgres', q{
	SELECT EXISTS (SELECT FROM aibilling.delivery WHERE error ~ 'the answer is longer than 1048576 bytes')}),
	'an answer is read up to 1 MB');
allowed($super, 'SELECT aibilling.resume()');
$polar->wait(events => 24);
$node->wait_settled;

# ---------------------------------------------------------------------------
# TLS
# ---------------------------------------------------------------------------

SKIP:
{
	my $dir = PostgreSQL::Test::Utils::tempdir();
	my $ok = 1;

	for my $ca ('right', 'wrong')
	{
		$ok &&= system("openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=$ca "
			  . "-addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign "
			  . "-out $dir/$ca.pem -keyout $dir/$ca.key 2>/dev/null") == 0;
	}
	for my $host ('IP:127.0.0.1', 'DNS:api.example.com')
	{
		my $name = $host =~ s/\W/_/gr;
		append_to_file("$dir/$name.ext", "subjectAltName=$host\n");
		$ok &&= system("openssl req -newkey rsa:2048 -nodes -subj /CN=$name -out $dir/$name.csr -keyout $dir/$name.key 2>/dev/null"
			  . " && openssl x509 -req -in $dir/$name.csr -CA $dir/right.pem -CAkey $dir/right.key -CAcreateserial"
			  . " -days 2 -extfile $dir/$name.ext -out $dir/$name.pem 2>/dev/null") == 0;
	}
	skip 'openssl is not there, or too old', 8 unless $ok;
	chmod 0755, $dir;

	my %secure = map {
		$_ => PolarServer->new(token => $token, tls_cert => "$dir/$_.pem", tls_key => "$dir/$_.key")
	} ('IP_127_0_0_1', 'DNS_api_example_com');
	my $try = sub {
		my ($name, $host, $ca, $words) = @_;
		my $tls = $secure{$host};

		$node->create_server($tls, name => $name, ($ca ? (ca_file => "$dir/$ca.pem") : ()));
		$node->create_usage_table($name, $name);
		$node->insert_rows(1, table => $name);
		if (defined $words)
		{
			ok($node->wait_status($words, $name), "$name: refused") or diag($node->status($name));
			is(scalar(@{ [ $tls->requests ] }), 0, "$name: no request was made");
			$node->safe_psql('postgres', "SELECT aibilling.pause('$name')");
		}
		else
		{
			$tls->wait(events => 1);
			pass("$name: delivered");
		}
	};

	$try->('no_ca', 'IP_127_0_0_1', undef, 'TLS handshake failed');
	$try->('wrong_ca', 'IP_127_0_0_1', 'wrong', 'TLS handshake failed');
	$try->('wrong_host', 'DNS_api_example_com', 'right', 'TLS handshake failed');
	$try->('right_ca', 'IP_127_0_0_1', 'right');
	is($secure{DNS_api_example_com}->summary->{stored}, 0, 'the wrong host has nothing');
	$node->safe_psql('postgres', "SELECT aibilling.detach('$_', 'discard')") for ('no_ca', 'wrong_ca', 'wrong_host');
}

# ---------------------------------------------------------------------------
# Tokens
# ---------------------------------------------------------------------------

# In a user mapping
my $mapped = 'polar_oat_secret_of_the_mapping';
$polar->tokens(token => $mapped);
$node->safe_psql('postgres', qq{
CREATE SERVER mapped FOREIGN DATA WRAPPER polar OPTIONS (url '$url', event_name 'llm_usage');
ALTER SERVER mapped OWNER TO eve;
GRANT USAGE ON FOREIGN SERVER mapped TO owner, stranger;
SET pg_stat_statements.track_utility = off;
CREATE USER MAPPING FOR owner SERVER mapped OPTIONS (access_token '$mapped');});
for my $role ('stranger', 'app', 'eve', 'monitor', 'mallory')
{
	for my $query ('SELECT string_agg(umoptions::text, $$ $$) FROM pg_user_mappings',
		'SELECT string_agg(option_value, $$ $$) FROM information_schema.user_mapping_options',
		'SELECT string_agg(u::text, $$ $$) FROM pg_user_mapping u')
	{
		my ($seen, $error) = as($role, $query);
		unlike("$seen$error", qr/secret/, "$role: $query");
	}
}
like(allowed('owner', 'SELECT umoptions FROM pg_user_mappings'), qr/$mapped/, 'the mapped user sees it');
refused('eve', "ALTER SERVER mapped OPTIONS (SET url '$to_elsewhere')", qr/permission denied to set option "url"/,
	"the server's owner cannot send it elsewhere");

# In a file: with everything logged that there is to log
my $log = $node->log_offset;
$node->append_conf('postgresql.conf', "log_statement = all\nlog_min_messages = debug5\nlog_min_duration_statement = 0\n"
	  . "log_parameter_max_length_on_error = -1\ndebug_print_plan = on\n");
$node->reload;
$node->safe_psql('postgres', 'CREATE EXTENSION pg_stat_statements') if $with_statements;
allowed('owner', "SELECT aibilling.create_usage_table('by_mapping', 'mapped')");
$node->insert_rows(3, table => 'by_mapping', prefix => 'mapped_');
$node->insert_rows(3, prefix => 'logged_');
$polar->wait(events => 30);
$node->wait_settled;
my $echo = JSON::PP->new->encode({ error => 'Unauthorized', detail => "bad header: Authorization: Bearer $token" });
$polar->fault(kind => 'status', status => 401, body => $echo, headers => { 'Content-Type' => 'application/json' });
$node->insert_rows(1, prefix => 'echoed_');
ok($node->wait_status('paused: .*401'), 'a refusal that quotes the token');
my $words = $node->status;
$polar->clear_faults;
$node->safe_psql('postgres', 'SELECT aibilling.resume(); CALL aibilling.sync()');
$polar->wait(events => 31);
$echo = JSON::PP->new->encode(
	{
		detail => [
			{ type => 'value_error', loc => [ 'body', 'events', 0, 'name' ], msg => "not in $token" } ]
	});
$polar->fault(kind => 'status', status => 422, body => $echo, headers => { 'Content-Type' => 'application/json' });
$node->insert_rows(1, prefix => 'echoed_again_');
ok($node->poll_query_until('postgres', "SELECT EXISTS (SELECT FROM aibilling.outbox WHERE state = 'rejected')"),
	'a reason that quotes the token');
$node->write_token($token_file, $token, 0644);
$node->safe_psql('postgres', q{ALTER SERVER eves OPTIONS (SET requests_per_minute '1000')});
allowed('eve', q{INSERT INTO eve.usage (external_id, provider, model, external_customer_id, input_tokens)
	VALUES ('eve8', 'eves', 'model', 'c', 10)});
ok($node->wait_status('open to group or others', 'eve.usage'), 'a token file that others can read is not read');

my %places = (
	status => $words . $node->safe_psql('postgres', 'SELECT s::text FROM aibilling.status s'),
	activity => $node->safe_psql('postgres', "SELECT a::text FROM pg_stat_activity a WHERE pid <> pg_backend_pid()"),
	'tables of the extension' => join('', map { $node->safe_psql('postgres', "SELECT t::text FROM $_ t") }
		  split /\n/, $node->safe_psql('postgres', q{
			SELECT oid::regclass FROM pg_class WHERE relnamespace = 'aibilling'::regnamespace AND relkind = 'r'})),
	servers => $node->safe_psql('postgres', 'SELECT s::text FROM pg_foreign_server s'),
	settings => $node->safe_psql('postgres', 'SELECT s::text FROM pg_settings s'));
$places{pg_stat_statements} = $node->safe_psql('postgres', 'SELECT query FROM pg_stat_statements')
  if $with_statements;
$places{'the log'} = $node->log_since($log);
for my $place (sort keys %places)
{
	cmp_ok(length($places{$place}), '>', 0, "there is something in $place");
	unlike($places{$place}, qr/$token/, "but not the token of the file");
	unlike($places{$place}, qr/$mapped/, "nor that of the mapping");
}
like($places{'tables of the extension'} . $places{status}, qr/\*{20}/, 'where it was quoted there are asterisks');
like($places{'the log'}, qr/DEBUG:  /, 'the log is at its most talkative');

unlike(slurp_file($node->logfile), qr/terminated by signal|PANIC/, 'nothing has crashed');
$node->stop;
$polar->stop;
$elsewhere->stop;

done_testing();
