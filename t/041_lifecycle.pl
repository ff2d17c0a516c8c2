# What a database goes through besides work: failover, dump and restore, copies, upgrade, recovery to a
# point in time, and every DDL that touches what the extension relies on.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use IPC::Run;
use JSON::PP;
use PolarServer;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $copy_is_paused =
  qr/^paused: this database is a copy; run SELECT aibilling\.arm\(\) if it is to send/;

# A node with the library preloaded and workers for these databases, not started.  install_path: of another
# PostgreSQL than the one tested.
sub new_node
{
	my ($name, $databases, %init) = @_;
	my $node = PostgreSQL::Test::Cluster->new($name, install_path => delete $init{install_path});

	$node->init(%init);
	$node->append_conf('postgresql.conf', <<CONF);
shared_preload_libraries = 'aibilling_polar'
aibilling_polar.databases = '$databases'
aibilling_polar.poll_interval = 1
max_prepared_transactions = 5
CONF
	return $node;
}

# The extension, a server that leads to $polar, and a usage table.
sub set_up
{
	my ($node, $database, $polar, $options, $version) = @_;
	my $url = $polar->url;
	my $token = $polar->token;

	$options = defined $options ? ", $options" : '';
	$version = defined $version ? " VERSION '$version'" : '';
	$node->safe_psql($database, <<SQL);
CREATE EXTENSION aibilling_polar$version;
CREATE SERVER polar FOREIGN DATA WRAPPER polar OPTIONS (url '$url', event_name 'llm_usage'$options);
CREATE USER MAPPING FOR PUBLIC SERVER polar OPTIONS (access_token '$token');
SELECT aibilling.create_usage_table('usage', server => 'polar');
SQL
	return;
}

# SQL that inserts rows whose external ids are $name-1, ...
sub insert
{
	my ($name, $count, $table) = @_;

	$table //= 'usage';
	return "INSERT INTO $table (external_id, external_customer_id, provider_cost)"
	  . " SELECT '$name-' || i, 'customer', 0.01 FROM generate_series(1, $count) i;\n";
}

sub value
{
	my ($node, $database, $sql) = @_;
	return $node->safe_psql($database, $sql);
}

# Wait until nothing waits and nothing is in flight.
sub wait_delivered
{
	my ($node, $database, $name) = @_;

	ok( $node->poll_query_until(
			$database,
			"SELECT NOT EXISTS (SELECT FROM aibilling.outbox WHERE state = 'pending')"
			  . " AND NOT EXISTS (SELECT FROM aibilling.delivery WHERE state = 'sending')"),
		$name)
	  or diag(value($node, $database, 'SELECT * FROM aibilling.status'));
	return;
}

# Wait until the database's worker has made a turn that began after now.
sub wait_for_turn
{
	my ($node, $database) = @_;
	my $now = value($node, $database, 'SELECT clock_timestamp()');

	$node->poll_query_until($database, <<SQL) or die "no turn of a worker in $database";
SELECT EXISTS (SELECT FROM pg_stat_activity
	WHERE backend_type = 'aibilling_polar worker' AND datname = current_database()
	AND state = 'idle' AND state_change > '$now')
SQL
	return;
}

sub stored
{
	my ($polar) = @_;
	my %stored;

	$stored{ $_->{external_id} }++ foreach $polar->events(compact => 1);
	return \%stored;
}

# Everything that a copy of a database must keep, as text.  Tables are named, not numbered.
my $everything = <<'SQL';
SELECT 'price', p::text FROM aibilling.price p
UNION ALL SELECT 'alias', a::text FROM aibilling.model_alias a
UNION ALL SELECT 'source', s::text FROM aibilling.price_source s
UNION ALL SELECT 'rule', r::text FROM aibilling.service_tier_rule r
UNION ALL SELECT 'quarantine', q::text FROM aibilling.price_quarantine q
UNION ALL SELECT 'outbox', o::text FROM aibilling.outbox o
UNION ALL SELECT 'delivery', d::text FROM aibilling.delivery d
UNION ALL SELECT 'next delivery', last_value::text FROM aibilling.delivery_id_seq
UNION ALL SELECT 'state', s::text FROM aibilling.server_state s
UNION ALL SELECT 'usage', u::text FROM usage u
UNION ALL SELECT 'table', t::text FROM aibilling.usage_table t
UNION ALL SELECT 'trigger', tgname || pg_get_triggerdef(oid) FROM pg_trigger WHERE tgrelid = 'usage'::regclass
UNION ALL SELECT 'server', srvname || (SELECT array_agg(o ORDER BY o)::text FROM unnest(srvoptions) o) FROM pg_foreign_server
UNION ALL SELECT 'mapping', umoptions::text FROM pg_user_mapping
ORDER BY 1, 2
SQL

# What an extension consists of, in words: its members and what belongs to these, with every property
# that has a meaning outside of the catalogues.
my $anatomy = <<'SQL';
WITH extension AS (
	SELECT * FROM pg_extension WHERE extname = 'aibilling_polar'
), member AS (
	SELECT d.classid, d.objid FROM pg_depend d JOIN extension e ON d.refobjid = e.oid
	WHERE d.refclassid = 'pg_extension'::regclass AND d.deptype = 'e'
), relation AS (
	SELECT objid AS oid FROM member WHERE classid = 'pg_class'::regclass
	UNION SELECT indexrelid FROM pg_index JOIN member ON objid = indrelid AND classid = 'pg_class'::regclass
), acl (classid, objid, acl, standard) AS (
	SELECT 'pg_proc'::regclass::oid, oid, proacl, acldefault('f', proowner) FROM pg_proc
	UNION ALL SELECT 'pg_class'::regclass, oid, relacl, acldefault(CASE relkind WHEN 'S' THEN 's'::"char" ELSE 'r' END, relowner) FROM pg_class
), privilege (classid, objid, objsubid, since, item) AS (
	-- Where all are those by default, this is written down or not: by pg_upgrade not.
	SELECT classid, objid, 0, 'now', item::text FROM acl, unnest(coalesce(acl, standard)) item
	UNION ALL SELECT classid, objid, 0, 'made', item::text
		FROM acl LEFT JOIN pg_init_privs i ON i.classoid = classid AND i.objoid = objid AND i.objsubid = 0,
			unnest(coalesce(initprivs, standard)) item
	UNION ALL SELECT classoid, objoid, objsubid, 'made', item::text FROM pg_init_privs i, unnest(initprivs) item
		WHERE objsubid <> 0 OR NOT EXISTS (SELECT FROM acl WHERE classid = classoid AND objid = objoid)
), object (kind, name, what, classid, objid, objsubid) AS (
	SELECT 'member', pg_describe_object(classid, objid, 0), NULL, classid, objid, 0 FROM member
	UNION ALL SELECT 'extension', extname, concat_ws(' ', extversion, extnamespace::regnamespace, extrelocatable),
		'pg_extension'::regclass, oid, 0 FROM extension
	UNION ALL SELECT 'dumped', c::regclass::text, w, 0, 0, 0 FROM extension, unnest(extconfig, extcondition) t (c, w)
	UNION ALL SELECT 'schema', nspname, nspacl::text, 'pg_namespace'::regclass, oid, 0
		FROM pg_namespace JOIN member ON classid = 'pg_namespace'::regclass AND objid = oid
	UNION ALL SELECT 'function', oid::regprocedure::text, (to_jsonb(p) - '{oid,proacl,proargdefaults,prosqlbody,pronamespace,proowner,prorettype,proargtypes,proallargtypes}'::text[]
			|| jsonb_build_array(pg_get_function_arguments(oid), pg_get_function_result(oid), pg_get_functiondef(oid)))::text,
		'pg_proc'::regclass, oid, 0
		FROM pg_proc p JOIN member ON classid = 'pg_proc'::regclass AND objid = oid
	UNION ALL SELECT 'relation', oid::regclass::text, concat_ws(' ', relkind, relpersistence, reloptions, relrowsecurity,
			relforcerowsecurity, relreplident, relam, relispartition, pg_get_viewdef(oid), pg_get_indexdef(oid)),
		'pg_class'::regclass, oid, 0
		FROM pg_class JOIN relation USING (oid) WHERE relkind <> 'i'
	UNION ALL SELECT 'index', oid::regclass::text, concat_ws(' ', pg_get_indexdef(oid), indisunique, indisprimary, indisvalid, indisclustered,
			indisreplident, indimmediate), 'pg_class'::regclass, oid, 0
		FROM relation JOIN pg_index ON indexrelid = oid
	UNION ALL SELECT 'column', r.oid::regclass || '.' || attname, concat_ws(' ', attnum, format_type(atttypid, atttypmod), attnotnull,
			attidentity, attgenerated, attcollation, attstorage, attcompression, attacl,
			-- but for what some builds of PostgreSQL note there on their own: the WAL position of the change
			(SELECT array_agg(o) FROM unnest(attoptions) o WHERE o !~ '^pg_attver='), pg_get_expr(adbin, adrelid)),
		'pg_class'::regclass, r.oid, attnum
		FROM relation r JOIN pg_attribute ON attrelid = r.oid
			LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
		WHERE attnum > 0
	UNION ALL SELECT 'sequence', seqrelid::regclass::text, (to_jsonb(q) - 'seqrelid')::text, 0, 0, 0
		FROM pg_sequence q JOIN relation ON oid = seqrelid
	UNION ALL SELECT 'constraint', conrelid::regclass || '.' || conname, pg_get_constraintdef(c.oid) || convalidated,
		'pg_constraint'::regclass, c.oid, 0
		FROM pg_constraint c JOIN relation r ON r.oid = conrelid
	UNION ALL SELECT 'trigger', tgrelid::regclass || '.' || tgname, pg_get_triggerdef(t.oid) || tgenabled::text,
		'pg_trigger'::regclass, t.oid, 0
		FROM pg_trigger t JOIN relation r ON r.oid = tgrelid
	UNION ALL SELECT 'policy', polrelid::regclass || '.' || polname,
		concat_ws(' ', polcmd, polpermissive, polroles, pg_get_expr(polqual, polrelid), pg_get_expr(polwithcheck, polrelid)),
		'pg_policy'::regclass, p.oid, 0
		FROM pg_policy p JOIN relation r ON r.oid = polrelid
	UNION ALL SELECT 'rule', ev_class::regclass || '.' || rulename, pg_get_ruledef(w.oid), 'pg_rewrite'::regclass, w.oid, 0
		FROM pg_rewrite w JOIN relation r ON r.oid = ev_class
	UNION ALL SELECT 'type', format_type(oid, NULL), concat_ws(' ', typtype, typacl, typcategory, (SELECT array_agg(
			attname || ' ' || format_type(atttypid, atttypmod) ORDER BY attnum) FROM pg_attribute WHERE attrelid = typrelid AND attnum > 0)),
		'pg_type'::regclass, oid, 0
		FROM pg_type JOIN member ON classid = 'pg_type'::regclass AND objid = oid
	UNION ALL SELECT 'wrapper', fdwname, concat_ws(' ', fdwhandler, fdwvalidator::regproc, fdwacl, fdwoptions),
		'pg_foreign_data_wrapper'::regclass, oid, 0
		FROM pg_foreign_data_wrapper JOIN member ON classid = 'pg_foreign_data_wrapper'::regclass AND objid = oid
	UNION ALL SELECT 'event trigger', evtname, concat_ws(' ', evtevent, evtfoid::regproc, evtenabled, evttags),
		'pg_event_trigger'::regclass, oid, 0
		FROM pg_event_trigger JOIN member ON classid = 'pg_event_trigger'::regclass AND objid = oid
)
SELECT kind, name, what, col_description(nullif(o.objid, 0), nullif(o.objsubid, 0)),
	CASE o.objsubid WHEN 0 THEN obj_description(o.objid, nullif(o.classid, 0)::regclass::name) END,
	(SELECT string_agg(since || ' ' || item, ', ' ORDER BY since, item) FROM privilege p
	 WHERE p.classid = o.classid AND p.objid = o.objid AND p.objsubid = o.objsubid)
FROM object o
UNION ALL
SELECT 'shipped', 'service_tier_rule', r::text, NULL, NULL, NULL FROM aibilling.service_tier_rule r WHERE shipped
ORDER BY 1, 2, 3
SQL

# A database with something in each of those: 3 rows delivered, 2 pending, 1 rejected, 1 unpriced.
# Prices, and rows that are delivered and that wait.
sub fill
{
	my ($node, $database, $name) = @_;

	$node->safe_psql($database, insert("$name-delivered", 3));
	$node->safe_psql($database, 'CALL aibilling.sync()');
	fill_outbox($node, $database, $name);
	return;
}

# Prices, and rows that wait.
sub fill_outbox
{
	my ($node, $database, $name) = @_;

	$node->psql(
		$database, <<SQL
INSERT INTO aibilling.price (provider, model, input, output) VALUES ('openai', 'gpt-5', 1.25, 10);
INSERT INTO aibilling.price_source VALUES ('mine', 5, 'a note');
INSERT INTO aibilling.model_alias (provider, pattern, to_provider, to_model) VALUES ('azure', 'five', 'openai', 'gpt-5');
INSERT INTO aibilling.service_tier_rule (provider, service_tier, multiplier) VALUES ('openai', 'batch', 0.4);
SET client_min_messages = error;
INSERT INTO usage (external_id, provider_cost) VALUES ('$name-rejected', 1);
INSERT INTO usage (external_id, external_customer_id, provider, model, input_tokens)
	VALUES ('$name-unpriced', 'customer', 'nobody', 'nothing', 7);
SQL
		  . insert("$name-pending", 2), on_error_stop => 1) == 0
	  or die 'could not fill the database';
	return;
}

sub places
{
	my ($node, $database) = @_;

	return value($node, $database,
		"SELECT string_agg(state || ' ' || n, ', ' ORDER BY state) FROM"
		  . ' (SELECT state, count(*) AS n FROM aibilling.outbox GROUP BY state) o');
}

# --- streaming replication -------------------------------------------------------

{
	my $polar = PolarServer->new;
	my $primary = new_node('primary', 'app', allows_streaming => 1);

	$primary->start;
	$primary->safe_psql('postgres', 'CREATE DATABASE app');
	set_up($primary, 'app', $polar, "batch_size '5', max_in_flight '1'");
	is(value($primary, 'app', 'SELECT status FROM aibilling.status') =~ /^paused/ ? 'paused' : 'not paused',
		'not paused', 'a fresh install is not paused');
	$primary->safe_psql('app', insert('before', 3));
	$polar->wait(events => 3);

	$primary->backup('base');
	my $standby = PostgreSQL::Test::Cluster->new('standby');
	$standby->init_from_backup($primary, 'base', has_streaming => 1);
	$standby->start;

	# Stored, but the answer never comes; more rows wait behind.
	$polar->fault(kind => 'hang', store => JSON::PP::true, times => 'always');
	$primary->safe_psql('app', insert('hanging', 12));
	my $arrived = $polar->wait(hung => 1)->{arrived};
	$primary->wait_for_catchup($standby);

	is(value($standby, 'app', "SELECT sum(events) FROM aibilling.delivery WHERE state = 'sending'"),
		'5', 'the standby has what is in flight');
	is(value($standby, 'app', 'SELECT count(*) FROM aibilling.outbox'), '7', 'and what waits');
	is( value($standby, 'app', "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'aibilling_polar worker'"),
		'0', 'but no worker');
	like(value($standby, 'app', 'SELECT status FROM aibilling.status'),
		qr/^no worker: this server is a standby/, 'and says why');
	my ($status, undef, $stderr) = $standby->psql('app', 'CALL aibilling.sync()');
	isnt($status, 0, 'sync() fails on a standby');
	like($stderr, qr/ERROR:  cannot execute .* during recovery|STANDBY/, 'for the reason that it is one');
	is($polar->summary->{arrived}, $arrived, 'nothing was sent by it');

	$primary->stop('immediate');
	$polar->clear_faults;
	$polar->release;
	$standby->promote;
	wait_delivered($standby, 'app', 'promotion starts sending');
	is($polar->summary->{stored}, 15, 'every row is stored, once');
	is( value($standby, 'app', 'SELECT sum(duplicates), sum(unexpected_duplicates) FROM aibilling.delivery'),
		'5|0', 'those in flight were found to be there');
	$standby->safe_psql('app', insert('after', 2));
	$polar->wait(events => 17);
	wait_delivered($standby, 'app', 'it goes on as primary');
	$standby->stop;
}

# --- dump, restore, template, rename ------------------------------------------------

{
	my $polar = PolarServer->new;
	my $node = new_node('copies', 'restored, copied');
	my $dump = $node->basedir . '/source.dump';

	$node->start;
	$node->safe_psql('postgres', 'CREATE DATABASE source');
	set_up($node, 'source', $polar);
	fill($node, 'source', 'source');
	is(places($node, 'source'), 'pending 2, rejected 1, unpriced 1', 'the source has something of everything');
	my $had = value($node, 'source', $everything);
	my $arrived = $polar->wait(events => 3)->{arrived};

	my %copies = (
		restored => sub {
			$node->safe_psql('postgres', 'CREATE DATABASE restored TEMPLATE template0');
			$node->command_ok([ 'pg_dump', '-Fc', '-d', $node->connstr('source'), '-f', $dump ],
				'pg_dump');
			$node->command_ok(
				[ 'pg_restore', '--exit-on-error', '-d', $node->connstr('restored'), $dump ],
				'pg_restore');
		},
		copied => sub { $node->safe_psql('postgres', 'CREATE DATABASE copied TEMPLATE source') });
	my $expected = 3;
	foreach my $name ('restored', 'copied')
	{
		$copies{$name}->();
		is(value($node, $name, $everything), $had, "$name: everything is kept");
		wait_for_turn($node, $name);
		like(value($node, $name, 'SELECT status FROM aibilling.status'), $copy_is_paused, "$name: paused, and says so");
		$node->safe_psql($name, insert($name, 1));
		wait_for_turn($node, $name);
		my ($status, undef, $stderr) = $node->psql($name, 'CALL aibilling.sync()');
		isnt($status, 0, "$name: sync() refuses");
		like($stderr, qr/this database is a copy and does not send.*SELECT aibilling\.arm\(\)/s, "$name: and says how to go on");
		is($polar->summary->{arrived}, $arrived, "$name: nothing is sent");

		$node->safe_psql($name, 'SELECT aibilling.arm()');
		wait_delivered($node, $name, "$name: sends once armed");
		is(places($node, $name), 'rejected 1, unpriced 1', "$name: the others wait as they did");
		is(value($node, $name, 'SELECT status FROM aibilling.status') =~ /^idle/ ? 1 : 0, 1, "$name: idle");

		# The second copy finds there what the first one has sent.  It may have been sent before it
		# was copied, so that this is no surprise.
		$expected += $name eq 'restored' ? 3 : 1;
		is($polar->summary->{stored}, $expected, "$name: every row is stored, once");
		is( value($node, $name, 'SELECT sum(duplicates), sum(unexpected_duplicates) FROM aibilling.delivery'),
			$name eq 'restored' ? '0|0' : '2|0', "$name: what the original may have sent is told as duplicates");
		$arrived = $polar->summary->{arrived};

		# A price arrives in the copy too.
		$node->safe_psql($name, "INSERT INTO aibilling.price (provider, model, input) VALUES ('nobody', 'nothing', 1)");
		$expected++ if $name eq 'restored';
		wait_for_turn($node, $name);
		$node->poll_query_until($name, "SELECT NOT EXISTS (SELECT FROM aibilling.outbox WHERE state = 'unpriced')");
		wait_delivered($node, $name, "$name: a price releases what waited for it");
		$arrived = $polar->summary->{arrived};
	}
	is($polar->summary->{stored}, $expected, 'all copies together have stored each row once');

	# A database that is only renamed is the same one.
	$node->safe_psql('postgres', 'ALTER DATABASE source RENAME TO renamed');
	$node->safe_psql('renamed', insert('renamed', 1));
	$node->safe_psql('renamed', 'CALL aibilling.sync()');
	is(stored($polar)->{'renamed-1'}, 1, 'a renamed database sends');

	# Nor is one paused from which the extension was dropped: it is as good as new.
	$node->safe_psql('postgres', 'CREATE DATABASE copy2 TEMPLATE renamed');
	$node->safe_psql('copy2', 'SET client_min_messages = error; DROP EXTENSION aibilling_polar CASCADE; DROP TABLE usage');
	set_up($node, 'copy2', $polar);
	$node->safe_psql('copy2', insert('anew', 1));
	$node->safe_psql('copy2', 'CALL aibilling.sync()');
	is(stored($polar)->{'anew-1'}, 1, 'an extension installed anew in a copy sends');

	$node->safe_psql('postgres', 'DROP DATABASE restored WITH (FORCE)');
	is(value($node, 'postgres', "SELECT count(*) FROM pg_database WHERE datname = 'restored'"),
		'0', 'a database with a worker can be dropped by force');
	$node->stop;
}

# --- pg_upgrade -----------------------------------------------------------------------

# From the installation that AIBILLING_OLD_INSTALL names (a directory with bin in it), by default from the same
# major version: then what differs is the cluster, and its identity.
{
	my $polar = PolarServer->new;
	my $strict = PolarServer->new;
	my $url = $strict->url;
	my $token = $strict->token;
	my @init = (extra => [ '--data-checksums', '--encoding=UTF8', '--locale=C' ]);
	my $old = new_node('old', '', @init, install_path => $ENV{AIBILLING_OLD_INSTALL});
	my $new = new_node('new', 'app, former', @init);
	my $had = {};
	my $kept = $everything =~ s/(?=ORDER BY 1)/UNION ALL SELECT 'total', t::text FROM aibilling.delivery_total t
UNION ALL SELECT 'setting', concat_ws(' ', setdatabase, setrole::regrole, setconfig) FROM pg_db_role_setting
UNION ALL SELECT 'owner', usage || ' ' || relowner::regrole FROM aibilling.usage_table JOIN pg_class c ON c.oid = usage
UNION ALL SELECT 'role', rolname || oid FROM pg_roles WHERE rolname = 'tenant'
UNION ALL SELECT 'version', extversion FROM pg_extension WHERE extname = 'aibilling_polar'
UNION ALL SELECT 'grant', srvname || srvacl::text FROM pg_foreign_server
/r;

	cmp_ok($old->pg_version, '<', $new->pg_version, 'the old installation is older')
	  if $ENV{AIBILLING_OLD_INSTALL};

	# The old server has no worker, so that what is to wait, waits.
	$old->start;
	$old->safe_psql('postgres', 'CREATE DATABASE app');
	$old->safe_psql('postgres', 'CREATE DATABASE former');
	set_up($old, 'app', $polar, "max_in_flight '1'");
	fill($old, 'app', 'old');
	set_up($old, 'former', $polar, undef, '1.0');
	fill_outbox($old, 'former', 'former');

	# Servers that are paused: by their owner, by a role for its own tables, by an answer.
	$old->safe_psql('app', <<SQL);
CREATE ROLE tenant;
ALTER ROLE tenant IN DATABASE app SET aibilling_polar.enqueue = off;
CREATE SCHEMA tenant AUTHORIZATION tenant;
GRANT USAGE ON FOREIGN SERVER polar TO tenant;
CREATE USER MAPPING FOR tenant SERVER polar OPTIONS (access_token '@{[ $polar->token ]}');
CREATE SERVER held FOREIGN DATA WRAPPER polar OPTIONS (url '$url', event_name 'held', unpriced 'send');
CREATE USER MAPPING FOR PUBLIC SERVER held OPTIONS (access_token '$token');
CREATE SERVER answered FOREIGN DATA WRAPPER polar OPTIONS (url '$url', event_name 'answered');
CREATE USER MAPPING FOR PUBLIC SERVER answered OPTIONS (access_token '$token');
SELECT aibilling.create_usage_table('held', server => 'held');
CREATE TABLE answered (LIKE usage INCLUDING ALL EXCLUDING CONSTRAINTS EXCLUDING INDEXES, PRIMARY KEY (id, occurred_at))
	PARTITION BY RANGE (occurred_at);
CREATE TABLE answered_default PARTITION OF answered DEFAULT;
SELECT aibilling.attach('answered', server => 'answered');
SELECT aibilling.pause('held');
SET ROLE tenant;
SELECT aibilling.create_usage_table('tenant.usage', server => 'polar');
SELECT aibilling.pause();
SQL
	$old->safe_psql('app', insert('held', 2, 'held') . insert('answered', 3, 'answered') . insert('tenant', 4, 'tenant.usage'));
	$strict->fault(kind => '401', times => 'always');
	$old->psql('app', "CALL aibilling.sync('answered')");

	# The server is stopped while a request is in flight that Polar has stored.
	$polar->fault(kind => 'hang', store => JSON::PP::true);
	my $caller = IPC::Run::start([ 'psql', '-XAtq', '-d', $old->connstr('app'), '-c', "CALL aibilling.sync('polar')" ],
		'<', \undef, '>&', \my $output);
	$polar->wait(hung => 1);
	$old->safe_psql('app', insert('late', 2));
	$old->stop('fast');
	$caller->finish;
	$polar->release;

	$old->start;
	foreach my $database ('app', 'former')
	{
		$had->{$database} = value($old, $database, $kept);
	}
	is(places($old, 'app'), 'pending 11, rejected 1, unpriced 1', 'rows wait, of every state');
	is(value($old, 'app', "SELECT sum(events) FROM aibilling.delivery WHERE state = 'sending'"), '2', 'and are in flight');
	is(value($old, 'app', "SELECT string_agg(server || ' ' || paused || ' ' || role::regrole, ', ' ORDER BY server) FROM aibilling.server_state"),
		'answered answer -, held operator -, polar operator tenant', 'servers are paused, for every reason');
	my $arrived = $polar->summary->{arrived};
	my $strictly = $strict->summary->{arrived};
	$old->stop;

	chdir $new->basedir or die "could not enter a directory: $!";
	command_ok(
		[
			'pg_upgrade', '--no-sync',
			'--old-datadir', $old->data_dir, '--new-datadir', $new->data_dir,
			'--old-bindir', $old->config_data('--bindir'), '--new-bindir', $new->config_data('--bindir'),
			'--socketdir', $new->host, '--old-port', $old->port, '--new-port', $new->port
		],
		'pg_upgrade from ' . $old->pg_version . ' to ' . $new->pg_version);
	$new->start;
	foreach my $database ('app', 'former')
	{
		is(value($new, $database, $kept), $had->{$database}, "$database: pg_upgrade keeps everything");
		$new->safe_psql($database, 'ALTER EXTENSION aibilling_polar UPDATE');
		wait_for_turn($new, $database);
		like(value($new, $database, 'SELECT DISTINCT status FROM aibilling.status'), $copy_is_paused, "$database: it starts paused");
	}

	# In the new cluster the servers have other OIDs, which may be those that others of them had.  What is done
	# before arm() is for the servers of these names.
	$new->safe_psql('app', insert('unarmed', 1));
	$new->safe_psql('app', "UPDATE usage SET external_customer_id = 'customer' WHERE external_id = 'old-rejected'");
	is(places($new, 'app'), 'pending 13, unpriced 1', 'a row can be fixed');
	is(value($new, 'app', "SELECT DISTINCT state FROM aibilling.preview('held')"), 'pending', 'preview shows what will be sent');
	my $pairs = "SELECT string_agg(usage || ' to ' || server, ', ' ORDER BY usage::text) FROM aibilling.usage_table";
	my $attached = 'answered to answered, held to held, tenant.usage to polar, usage to polar';
	is(value($new, 'app', $pairs), $attached, 'tables are attached to the servers of old');
	$new->safe_psql('app', <<'SQL');
UPDATE aibilling.usage_table SET serverid = (SELECT oid FROM pg_foreign_server
	WHERE srvname = CASE server WHEN 'polar' THEN 'held' WHEN 'held' THEN 'answered' ELSE 'polar' END);
ALTER SERVER polar OPTIONS (ADD timeout '7s');
SQL
	is(value($new, 'app', $pairs), $attached, 'a change of a server moves no table to another one');
	my ($status, undef, $stderr) = $new->psql('app', 'DROP SERVER held CASCADE');
	like($stderr, qr/cannot drop server "held": usage table public.held is attached to it/, 'nor can one be dropped');
	is($polar->summary->{arrived}, $arrived, 'nothing is sent, by pg_upgrade neither');
	is($strict->summary->{arrived}, $strictly, 'by no server');

	$new->safe_psql('app', 'SELECT aibilling.arm()');
	$polar->wait(events => 9);
	my $waiting = "SELECT string_agg(usage_table || ' ' || pending + in_flight, ', ' ORDER BY usage_table::text) FROM aibilling.status";
	ok( $new->poll_query_until('app', $waiting, 'answered 3, held 2, tenant.usage 4, usage 0'),
		'it sends once armed, but not what is paused')
	  or diag(value($new, 'app', $waiting));
	is(value($new, 'app', 'SELECT sum(rejected), sum(unpriced) FROM aibilling.status'), '0|1', 'nor what cannot be sent');
	like(
		value($new, 'app', "SELECT string_agg(usage_table || ': ' || status, '; ' ORDER BY usage_table::text)"
			  . " FROM aibilling.status WHERE usage_table <> 'usage'::regclass"),
		qr/^answered: paused: .*401.*; held: paused: paused by \w+; tenant.usage: paused: paused by tenant$/,
		'and says so');
	is(value($new, 'app', 'SELECT sum(duplicates), sum(unexpected_duplicates) FROM aibilling.delivery'),
		'2|0', 'what was in flight was found to be there, the rest is sent once');
	is($polar->summary->{duplicates}, 2, 'as Polar sees it too');

	$new->safe_psql('app', "INSERT INTO aibilling.price (provider, model, input) VALUES ('nobody', 'nothing', 1)");
	$strict->clear_faults;
	$new->safe_psql('app', 'SELECT aibilling.resume()');
	$new->safe_psql('app', 'SET ROLE tenant; SELECT aibilling.resume()');
	wait_delivered($new, 'app', 'the rest is delivered once nothing is in its way');
	is(places($new, 'app'), '', 'every row');
	is_deeply([ sort { $a <=> $b } values %{ stored($polar) } ], [ (1) x 14 ], 'once');
	is_deeply([ sort { $a <=> $b } values %{ stored($strict) } ], [ (1) x 5 ], 'where it belongs');

	# As if installed here: nothing of the extension is tied to the version that made it.
	$new->safe_psql('postgres', 'CREATE EXTENSION aibilling_polar');
	my $fresh = [ split /\n/, value($new, 'postgres', $anatomy) ];
	is_deeply([ split /\n/, value($new, 'app', $anatomy) ], $fresh, 'the extension equals a fresh install, object by object');
	$new->safe_psql('former', 'SELECT aibilling.arm()');
	is_deeply([ split /\n/, value($new, 'former', $anatomy) ], $fresh, 'so does an older version of it, after an update');
	wait_delivered($new, 'former', 'which delivers too');
	is(stored($polar)->{'former-pending-2'}, 1, 'once');
	$new->stop;
}

# --- recovery to a point in time ------------------------------------------------------

{
	my $polar = PolarServer->new;
	my $node = new_node('archived', '', has_archiving => 1, allows_streaming => 1);

	$node->start;
	$node->safe_psql('postgres', 'CREATE DATABASE app');
	set_up($node, 'app', $polar);
	$node->safe_psql('app', insert('delivered', 4));
	$node->safe_psql('app', 'CALL aibilling.sync()');
	$node->backup('base');
	$node->safe_psql('app', insert('pending', 3));
	$node->safe_psql('app', "SELECT pg_create_restore_point('back')");

	# All this is undone, but not at Polar.
	$node->safe_psql('app', insert('undone', 40));
	$node->safe_psql('app', 'CALL aibilling.sync()');
	is($polar->summary->{stored}, 47, 'all rows are stored before the disaster');
	my $last = value($node, 'app', "SELECT max(id) FROM usage WHERE external_id LIKE 'undone%'");
	$node->safe_psql('app', 'SELECT pg_switch_wal()');
	$node->stop;

	my $back = PostgreSQL::Test::Cluster->new('back');
	$back->init_from_backup($node, 'base', has_restoring => 1, standby => 0);
	$back->append_conf('postgresql.conf', <<CONF);
recovery_target_name = 'back'
recovery_target_action = promote
aibilling_polar.databases = 'app'
CONF
	$back->start;
	$back->poll_query_until('app', 'SELECT NOT pg_is_in_recovery()') or die 'recovery does not end';
	is(value($back, 'app', "SELECT count(*) FROM usage WHERE external_id LIKE 'undone%'"), '0', 'time is turned back');

	# The same server goes on: it is not a copy.  Ids are given out again, external ids are not.
	$back->safe_psql('app', "INSERT INTO usage (external_customer_id, provider_cost) SELECT 'customer', 1 FROM generate_series(1, 8)");
	wait_delivered($back, 'app', 'delivery goes on by itself');
	is(value($back, 'app', "SELECT count(*) FROM usage WHERE provider_cost = 1 AND id <= $last") > 0 ? 1 : 0,
		1, 'ids are given out again');
	my $stored = stored($polar);
	is(scalar(grep { $_ > 1 } values %$stored), 0, 'nothing is billed twice');
	is($polar->summary->{stored}, 55, 'all that is new is billed');
	is( value($back, 'app', <<'SQL'),
SELECT sum(inserted), sum(duplicates) FROM aibilling.delivery d
WHERE EXISTS (SELECT FROM usage u WHERE d.usage_ids @> u.id AND u.provider_cost = 1 AND d.state = 'delivered')
	AND NOT EXISTS (SELECT FROM usage u WHERE d.usage_ids @> u.id AND u.external_id LIKE 'pending%')
SQL
		value($back, 'app', <<'SQL'),
SELECT count(*), 0 FROM usage u WHERE u.provider_cost = 1 AND NOT EXISTS (
	SELECT FROM aibilling.delivery d, usage v
	WHERE d.usage_ids @> u.id AND d.usage_ids @> v.id AND v.external_id LIKE 'pending%')
SQL
		'nothing new is swallowed as a duplicate');
	is(value($back, 'app', 'SELECT sum(inserted), sum(duplicates) FROM aibilling.delivery'),
		'12|3', 'what the lost time had delivered is found to be there');
	is(value($back, 'app', 'SELECT sum(unexpected_duplicates) FROM aibilling.delivery'),
		'0', 'which is no surprise');

	# What comes after the recovery is not excused: an application that repeats what was undone,
	# under its own external ids, is told that it had been billed.
	$back->safe_psql('app', insert('undone', 2));
	wait_delivered($back, 'app', 'the application repeats what was undone');
	is($polar->summary->{stored}, 55, 'that is not billed twice either');
	is(value($back, 'app', 'SELECT sum(duplicates), sum(unexpected_duplicates) FROM aibilling.delivery'),
		'5|2', 'and is told from what was expected');
	like(value($back, 'app', 'SELECT status FROM aibilling.status'),
		qr/2 events were not counted/, 'status warns');
	$back->stop;
}

# --- DDL during delivery ----------------------------------------------------------------

my $polar = PolarServer->new;
my $node = new_node('ddl', 'app');
$node->start;
$node->safe_psql('postgres', 'CREATE DATABASE app');
set_up($node, 'app', $polar, "batch_size '2', max_in_flight '1'");
$node->poll_query_until('app', 'SELECT worker_pid IS NOT NULL FROM aibilling.status') or die 'no worker';

# Run SQL while two rows of the table hang in a request and three wait, and check its WARNING.
sub while_hanging
{
	my ($table, $name, $sql, $warning) = @_;

	$polar->fault(kind => 'hang', store => JSON::PP::true, times => 'always');
	$node->safe_psql('app', insert($name, 5, $table));
	$polar->wait(hung => 1);
	my ($status, undef, $stderr) = $node->psql('app', $sql, on_error_stop => 1);
	is($status, 0, "$name: done while a request hangs") or diag($stderr);
	like($stderr, $warning, "$name: warns") if defined $warning;
	unlike($stderr, qr/WARNING/, "$name: no warning") if !defined $warning;
	$polar->clear_faults;
	$polar->release;
	return;
}

sub ledger_of
{
	my ($condition) = @_;
	return value($node, 'app',
		"SELECT state, sum(events), sum(coalesce(inserted, 0)), sum(vanished) FROM aibilling.delivery WHERE $condition GROUP BY state ORDER BY state");
}

my $pid = value($node, 'app', 'SELECT worker_pid FROM aibilling.status');

# What is renamed is still the same table.
while_hanging('usage', 'renamed', <<SQL);
ALTER TABLE usage RENAME TO calls;
CREATE SCHEMA billing;
ALTER TABLE calls SET SCHEMA billing;
ALTER SCHEMA billing RENAME TO invoices;
SQL
wait_delivered($node, 'app', 'a renamed table in a renamed schema is delivered');
is(ledger_of("usage_table = 'invoices.calls'::regclass"), 'delivered|5|5|0', 'as one table');
$node->safe_psql('app', 'ALTER TABLE invoices.calls SET SCHEMA public; ALTER TABLE calls RENAME TO usage');

# A server is not dropped under its tables.
foreach my $how ('', ' CASCADE')
{
	my ($status, undef, $stderr) = $node->psql('app', "DROP SERVER polar$how");

	isnt($status, 0, "DROP SERVER$how is refused");
	like($stderr, $how eq ''
		? qr/cannot drop server polar because other objects depend on it|usage table public\.usage is attached to it/
		: qr/cannot drop server "polar": usage table public\.usage is attached to it/, 'and says why');
}
$node->safe_psql('app', insert('served', 1));
wait_delivered($node, 'app', 'the server is still there');

# Detach
while_hanging('usage', 'detach', 'SELECT 1');
wait_delivered($node, 'app', 'everything is delivered before it is detached');
$polar->fault(kind => 'hang', store => JSON::PP::true, times => 'always');
$node->safe_psql('app', insert('flying', 3));
$polar->wait(hung => 1);
foreach my $pending ('refuse', 'discard')
{
	my ($status, undef, $stderr) = $node->psql('app', "SELECT aibilling.detach('usage', '$pending')");
	like($stderr, qr/cannot detach table public\.usage: rows of it are being sent/, "detach '$pending' refuses while rows are in flight");
}
$polar->clear_faults;
$polar->release;
wait_delivered($node, 'app', 'they arrive');
$node->safe_psql('app', 'SELECT aibilling.pause()');
$node->safe_psql('app', insert('waiting', 3));
my ($ret, undef, $stderr) = $node->psql('app', "SELECT aibilling.detach('usage')");
like($stderr, qr/cannot detach table public\.usage: 3 rows of it are not delivered/, "detach 'refuse' refuses while rows wait");
is(value($node, 'app', 'SELECT count(*) FROM aibilling.outbox'), '3', 'and leaves them');
($ret, undef, $stderr) = $node->psql('app', "SELECT aibilling.detach('usage', 'anything')");
like($stderr, qr/invalid value for parameter "pending"/, 'there is no third way');
$node->safe_psql('app', "SELECT aibilling.detach('usage', 'discard')");
is(value($node, 'app', 'SELECT count(*) FROM aibilling.outbox'), '0', "detach 'discard' drops them");
is(value($node, 'app', "SELECT count(*) FROM pg_trigger WHERE tgrelid = 'usage'::regclass"), '0', 'and the triggers');
$node->safe_psql('app', insert('ordinary', 1));
is(value($node, 'app', "SELECT cost_nanos IS NULL FROM usage WHERE external_id = 'ordinary-1'"), 't', 'the table is an ordinary one');

# Attach again: what was delivered is known, what was discarded can be sent.
$node->safe_psql('app', "SELECT aibilling.attach('usage', 'polar', existing => 'send'); SELECT aibilling.resume()");
wait_delivered($node, 'app', "attach 'send' delivers");
is(scalar(grep { stored($polar)->{$_} } map { "waiting-$_" } 1 .. 3), 3, 'what was discarded');
is(value($node, 'app', 'SELECT sum(duplicates) FROM aibilling.delivery'), '0', 'and only what was not sent before');
is( value($node, 'app', "SELECT cost_nanos, cost_status, (aibilling.usage_status('usage', id)).state FROM usage WHERE external_id = 'ordinary-1'"),
	'10000000|reported|delivered', 'priced, where it was not');

# A row that was refused for another reason before its price came.
$node->psql('app', "INSERT INTO usage (external_id, tags, provider, model, input_tokens)"
	  . " VALUES ('late', '{\"account\": \"customer\"}', 'nobody', 'nothing', 1)");
is(places($node, 'app'), 'rejected 1', 'a row without customer and price is rejected');
$node->safe_psql('app', "INSERT INTO aibilling.price (provider, model, input) VALUES ('nobody', 'nothing', 1)");
wait_for_turn($node, 'app');
$node->safe_psql('app', "ALTER SERVER polar OPTIONS (ADD external_customer_id_key 'account')");
is(value($node, 'app', "SELECT aibilling.retry('usage')"), '1', 'and tried again');
ok($node->poll_query_until('app', "SELECT (aibilling.usage_status('usage', max(id))).state = 'delivered' FROM usage"),
	'it is priced and delivered then');

# Rewriting and reindexing
$polar->fault(kind => 'slow', delay => 20, times => 'always');
$node->safe_psql('app', insert('rewritten', 60));
foreach my $sql (
	'VACUUM FULL usage', 'VACUUM FULL aibilling.outbox_entry', 'REINDEX TABLE aibilling.outbox_entry',
	'VACUUM FULL aibilling.delivery', 'REINDEX TABLE usage', 'REINDEX TABLE CONCURRENTLY usage',
	'REINDEX TABLE CONCURRENTLY aibilling.delivery', 'CLUSTER usage USING usage_pkey',
	'VACUUM FULL aibilling.outbox_entry', 'REINDEX INDEX CONCURRENTLY aibilling.outbox_entry_key',
	'VACUUM (FREEZE) aibilling.outbox_entry', 'ALTER TABLE usage ADD COLUMN mine text',
	'ALTER TABLE usage DROP COLUMN mine', 'ANALYZE')
{
	my ($status, undef, $err) = $node->psql('app', $sql);
	is($status, 0, "$sql during delivery") or diag($err);
}
cmp_ok(value($node, 'app', "SELECT count(*) FROM aibilling.delivery WHERE state = 'delivered' AND finished_at > clock_timestamp() - interval '1 minute'"),
	'>', 0, 'delivery went on meanwhile');
wait_delivered($node, 'app', 'everything is delivered all the same');
$polar->clear_faults;
is(scalar(grep { (stored($polar)->{"rewritten-$_"} // 0) != 1 } 1 .. 60), 0, 'each row once');
is(value($node, 'app', 'SELECT sum(duplicates), sum(vanished) FROM aibilling.delivery'), '0|0', 'none was sent again, none missed');

# TRUNCATE: not while rows are in flight, whose answer would then be of other rows.
$polar->fault(kind => 'hang', store => JSON::PP::true, times => 'always');
$node->safe_psql('app', insert('truncated', 5));
$polar->wait(hung => 1);
like(($node->psql('app', 'TRUNCATE usage'))[2], qr/ERROR:  cannot truncate "usage": rows of it are being sent/, 'TRUNCATE waits for its turn');
$polar->clear_faults;
$polar->release;
wait_delivered($node, 'app', 'after the refused TRUNCATE');
$node->safe_psql('app', "SELECT aibilling.pause();\n" . insert('given_up', 3));
like(($node->psql('app', 'TRUNCATE usage'))[2], qr/WARNING:  truncating "usage" drops 3 usage rows that were not delivered/, 'TRUNCATE warns');
$node->safe_psql('app', 'SELECT aibilling.resume()');
wait_delivered($node, 'app', 'after TRUNCATE nothing is left');
is(stored($polar)->{'truncated-5'}, 1, 'what was in flight arrives');
is(stored($polar)->{'given_up-1'}, undef, 'what waited does not');

# The answer is lost, and the rows are gone when they are to be sent again.
$polar->fault(kind => 'hang', store => JSON::PP::true);
$node->safe_psql('app', insert('lost', 2));
$polar->wait(hung => 1);
$node->safe_psql('app', 'SET session_replication_role = replica; TRUNCATE usage');
$polar->restart;
$polar->wait_for(sub { value($node, 'app', "SELECT count(*) FROM aibilling.delivery WHERE state = 'sending'") eq '0' }, 'the delivery to be settled');
is( value($node, 'app', 'SELECT state, vanished, error IS NOT NULL FROM aibilling.delivery ORDER BY id DESC LIMIT 1'),
	'failed|2|t', 'rows that are gone with their answer are counted as vanished');
is(value($node, 'app', 'SELECT vanished FROM aibilling.status'), '2', 'status counts them');

# DROP TABLE
while_hanging('usage', 'dropped', 'DROP TABLE usage', qr/WARNING:  dropping a usage table drops 3 rows that were not delivered/);
$polar->wait_for(sub { value($node, 'app', "SELECT count(*) FROM aibilling.delivery WHERE state = 'sending'") eq '0' }, 'the last request to be settled');
is(value($node, 'app', 'SELECT count(*) FROM aibilling.outbox_entry'), '0', 'the outbox forgets a dropped table');
is(value($node, 'app', 'SELECT count(*) FROM aibilling.usage_table'), '0', 'it is no longer attached');
is( value($node, 'app', 'SELECT state, events, inserted FROM aibilling.delivery ORDER BY id DESC LIMIT 1'),
	'delivered|2|2', 'the ledger tells what became of those in flight');
cmp_ok(value($node, 'app', 'SELECT count(*) FROM aibilling.delivery'), '>', 10, 'the ledger stays');

# Partitions
$node->safe_psql('app', <<'SQL');
SELECT aibilling.create_usage_table('model_table', server => 'polar');
CREATE SEQUENCE parts_id;
CREATE TABLE parts (LIKE model_table INCLUDING DEFAULTS INCLUDING CONSTRAINTS, region text NOT NULL DEFAULT 'a')
	PARTITION BY LIST (region);
ALTER TABLE parts ALTER id SET DEFAULT nextval('parts_id'), ADD PRIMARY KEY (id, region);
CREATE TABLE part_a PARTITION OF parts FOR VALUES IN ('a');
CREATE TABLE part_b PARTITION OF parts FOR VALUES IN ('b');
CREATE TABLE part_c PARTITION OF parts FOR VALUES IN ('c');
SELECT aibilling.attach('parts', 'polar');
SQL
$node->safe_psql('app', insert('part', 3, 'parts'));
wait_delivered($node, 'app', 'rows of a partitioned table are delivered');
my $stored = $polar->summary->{stored};
$node->safe_psql('app', "UPDATE parts SET region = 'b' WHERE external_id IN ('part-1', 'part-2')");
is(value($node, 'app', 'SELECT count(*) FROM part_b'), '2', 'rows move between partitions after their delivery');
is(value($node, 'app', 'SELECT count(*) FROM aibilling.outbox'), '0', 'and are not enqueued again');
$node->safe_psql('app', 'SELECT aibilling.pause()');
$node->safe_psql('app', insert('moved', 2, 'parts'));
$node->safe_psql('app', "UPDATE parts SET region = 'b', provider_cost = 2 WHERE external_id = 'moved-1'");
$node->safe_psql('app', "BEGIN; " . insert('both', 1, 'parts') . "UPDATE parts SET region = 'b' WHERE external_id = 'both-1'; COMMIT");
is(places($node, 'app'), 'pending 3', 'nor while they wait');
$node->safe_psql('app', "DELETE FROM parts WHERE external_id = 'moved-2'; SELECT aibilling.resume()");
wait_delivered($node, 'app', 'they are delivered where they are');
is($polar->summary->{stored}, $stored + 2, 'once');
is((grep { $_->{external_id} eq 'moved-1' } $polar->events(compact => 1))[0]{cost_amount}, '200', 'as they were changed on the way');

$node->safe_psql('app', 'SELECT aibilling.pause()');
$node->safe_psql('app', "INSERT INTO part_b (external_id, external_customer_id, provider_cost, region)"
	  . " SELECT 'straight-' || i, 'customer', 1, 'b' FROM generate_series(1, 2) i;"
	  . " INSERT INTO parts (external_id, external_customer_id, provider_cost, region)"
	  . " SELECT 'gone-' || i, 'customer', 1, 'c' FROM generate_series(1, 3) i");
is(places($node, 'app'), 'pending 5', 'rows inserted straight into a partition are enqueued');
my $log = -s $node->logfile;
$node->safe_psql('app', 'ALTER TABLE parts DETACH PARTITION part_b; DROP TABLE part_c; SELECT aibilling.resume()');
wait_delivered($node, 'app', 'the rows of a detached and of a dropped partition do not hold delivery up');
is(value($node, 'app', "SELECT vanished FROM aibilling.status WHERE usage_table = 'parts'::regclass"), '5', 'they are counted as vanished');
my $reported = 0;
my $written = slurp_file($node->logfile, $log);
$reported += $1 while $written =~ /WARNING:  (\d+) usage rows of public\.parts were gone before they were sent/g;
is($reported, 5, 'and reported once');
is(value($node, 'app', "SELECT count(*) FROM pg_trigger WHERE tgrelid = 'part_b'::regclass"), '0', 'a detached partition has no triggers');

# The same while rows of the partition are in flight, and no answer comes: those are gone when they are
# to be sent again; what waits of other partitions is not concerned.
$polar->fault(kind => 'hang', store => JSON::PP::true);
$node->safe_psql('app', "INSERT INTO parts (external_id, external_customer_id, provider_cost, region)"
	  . " VALUES ('away-1', 'customer', 1, 'a'), ('away-2', 'customer', 1, 'a')");
$polar->wait(hung => 1);
$node->safe_psql('app', 'ALTER TABLE parts ATTACH PARTITION part_b FOR VALUES IN (\'b\')');
$node->safe_psql('app', 'ALTER TABLE parts DETACH PARTITION part_a CONCURRENTLY');
$node->safe_psql('app', "INSERT INTO parts (external_id, external_customer_id, provider_cost, region)"
	  . " VALUES ('there', 'customer', 1, 'b')");
is(stored($polar)->{'away-1'}, 1, 'a partition is detached while its rows are in flight');
$polar->restart;
wait_delivered($node, 'app', 'nothing waits for them');
is(value($node, 'app', "SELECT vanished FROM aibilling.status WHERE usage_table = 'parts'::regclass"), '7', 'they are counted as vanished too');
is(stored($polar)->{'there'}, 1, 'the rows of others are delivered');
$node->safe_psql('app', 'ALTER TABLE parts ATTACH PARTITION part_a FOR VALUES IN (\'a\')');
$node->safe_psql('app', "INSERT INTO part_b (external_id, external_customer_id, provider_cost, region) VALUES ('again', 'customer', 1, 'b')");
wait_delivered($node, 'app', 'once attached again');
is(stored($polar)->{'again'}, 1, 'its rows are sent');

# DROP OWNED
$node->safe_psql('app', <<'SQL');
CREATE ROLE tenant;
GRANT USAGE ON FOREIGN SERVER polar TO tenant;
CREATE SCHEMA tenant AUTHORIZATION tenant;
GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA aibilling TO tenant;
SET ROLE tenant;
SELECT aibilling.create_usage_table('tenant.usage', server => 'polar');
RESET ROLE;
SQL
while_hanging('tenant.usage', 'owned', 'DROP OWNED BY tenant', qr/WARNING:  dropping a usage table drops 3 rows that were not delivered/);
$polar->wait_for(sub { value($node, 'app', "SELECT count(*) FROM aibilling.delivery WHERE state = 'sending'") eq '0' }, 'the last request to be settled');
is(value($node, 'app', 'SELECT count(*) FROM aibilling.outbox_entry'), '0', 'the outbox forgets what DROP OWNED drops');
is(stored($polar)->{'owned-1'}, 1, 'what was in flight arrives');
$node->safe_psql('app', 'CREATE SCHEMA doomed');
$node->safe_psql('app', "SELECT aibilling.create_usage_table('doomed.usage', server => 'polar')");
while_hanging('doomed.usage', 'schema', 'DROP SCHEMA doomed CASCADE', qr/WARNING:  dropping a usage table drops 3 rows that were not delivered/);
wait_delivered($node, 'app', 'after DROP SCHEMA nothing is left');

# DROP and CREATE EXTENSION
$node->safe_psql('app', "SELECT aibilling.create_usage_table('usage', server => 'polar')");
while_hanging('usage', 'without', 'SET client_min_messages = warning; DROP EXTENSION aibilling_polar CASCADE',
	qr/WARNING:  dropping extension aibilling_polar drops 3 usage rows that were not delivered/);
is(value($node, 'app', 'SELECT count(*) FROM usage'), '5', 'DROP EXTENSION leaves the usage table');
is(value($node, 'app', "SELECT count(*) FROM pg_trigger WHERE tgrelid = 'usage'::regclass"), '0', 'without triggers');
$node->safe_psql('app', insert('meanwhile', 1));
$polar->wait(hung => 0);
wait_for_turn($node, 'app');
my $url = $polar->url;
my $token = $polar->token;
$node->safe_psql('app', <<SQL);
CREATE EXTENSION aibilling_polar;
CREATE SERVER polar FOREIGN DATA WRAPPER polar OPTIONS (url '$url', event_name 'llm_usage');
CREATE USER MAPPING FOR PUBLIC SERVER polar OPTIONS (access_token '$token');
SELECT aibilling.attach('usage', server => 'polar');
SQL
$node->safe_psql('app', insert('anew', 2));
wait_delivered($node, 'app', 'after CREATE EXTENSION the worker delivers again');
is(stored($polar)->{'anew-2'}, 1, 'what is new');
is(stored($polar)->{'meanwhile-1'}, undef, 'and nothing else');
is(value($node, 'app', 'SELECT worker_pid FROM aibilling.status'), $pid, 'all this was one worker, which never failed');
$node->safe_psql('app', 'DROP TABLE usage; DROP SERVER polar CASCADE');
is(value($node, 'app', 'SELECT count(*) FROM pg_foreign_server'), '0', 'a server without tables can be dropped');
$node->stop;

# --- no worker to be had ----------------------------------------------------------------

$node->append_conf('postgresql.conf', "max_worker_processes = 1\naibilling_polar.databases = 'postgres, app, template1'");
$node->start;
set_up($node, 'postgres', $polar);
is( value($node, 'app', 'SELECT worker_pid IS NULL FROM aibilling.status'),
	't', 'without max_worker_processes there is no worker');
like(value($node, 'app', 'SELECT status FROM aibilling.status'), qr/no worker: .*max_worker_processes is exhausted/, 'and status says so');
$node->stop;

# --- versions ------------------------------------------------------------------------------

{
	my $versions = new_node('versions', 'from_1_0, from_1_1');
	my $polar = PolarServer->new;
	my $url = $polar->url;
	my $token = $polar->token;
	my $dump = $versions->basedir . '/old.dump';

	$versions->start;
	my ($current, @old) = split /\n/, value($versions, 'postgres', <<'SQL');
SELECT version FROM pg_available_extension_versions v JOIN pg_available_extensions e USING (name)
WHERE name = 'aibilling_polar' ORDER BY version <> default_version, version
SQL
	$versions->safe_psql('postgres', 'CREATE EXTENSION aibilling_polar');
	my $fresh = value($versions, 'postgres', $anatomy);
	is(value($versions, 'postgres', "SELECT count(*) FROM ($anatomy) a WHERE name ~ 'aibilling'") > 300 ? 'much' : 'little',
		'much', 'an extension has an anatomy');
	is(value($versions, 'postgres', <<'SQL'), '', 'every object of it that can have a comment has one');
SELECT pg_describe_object(d.classid, d.objid, d.objsubid)
FROM (
	SELECT classid, objid, objsubid FROM pg_depend
	WHERE refclassid = 'pg_extension'::regclass AND deptype = 'e'
		AND refobjid = (SELECT oid FROM pg_extension WHERE extname = 'aibilling_polar')
		AND classid <> 'pg_type'::regclass
	UNION ALL
	SELECT 'pg_class'::regclass, attrelid, attnum FROM pg_attribute JOIN pg_class c ON c.oid = attrelid
	WHERE relnamespace = 'aibilling'::regnamespace AND relkind IN ('r', 'v') AND attnum > 0 AND NOT attisdropped AND attislocal
) d
WHERE coalesce(CASE WHEN d.objsubid > 0 THEN col_description(d.objid, d.objsubid)
	ELSE obj_description(d.objid, d.classid::regclass::name) END, '') = ''
	AND NOT EXISTS (SELECT FROM pg_class WHERE oid = d.objid AND relkind IN ('S', 'i') AND d.classid = 'pg_class'::regclass)
SQL
	is("@old", '1.0 1.1', 'there are versions to update from');

	foreach my $old (@old)
	{
		my $database = "from_$old" =~ tr/./_/r;
		my $status = "SELECT pending, unpriced, rejected, in_flight, delivered, status FROM aibilling.status";

		# The library of today prices and queues for the SQL of then, and asks for the update.
		$versions->safe_psql('postgres', "CREATE DATABASE $database");
		$versions->safe_psql($database, <<SQL);
CREATE EXTENSION aibilling_polar VERSION '$old';
CREATE SERVER polar FOREIGN DATA WRAPPER polar OPTIONS (url '$url', event_name 'llm_usage');
CREATE USER MAPPING FOR PUBLIC SERVER polar OPTIONS (access_token '$token');
SELECT aibilling.create_usage_table('usage', server => 'polar');
SELECT aibilling.load_bundled_prices();
SQL
		my $before = value($versions, $database, $anatomy);
		isnt($before, $fresh, "$old is another version");
		fill_outbox($versions, $database, $old);
		is(value($versions, $database, "SELECT aibilling.cost_nanos('openai', 'gpt-5', 1000000)"),
			'1250000000', "$old: prices");
		foreach my $statement ('DELETE FROM usage', 'TRUNCATE usage', 'CALL aibilling.sync()', 'SELECT * FROM aibilling.status')
		{
			my (undef, undef, $err) = $versions->psql($database, $statement);
			like($err, qr/older than its library.*ALTER EXTENSION aibilling_polar UPDATE/s, "$old: $statement asks for the update");
		}

		# What has been sent, and what is on its way, as a worker of then has left it.
		$versions->safe_psql($database, <<SQL);
INSERT INTO usage (external_id, occurred_at, provider, model, external_customer_id, input_tokens)
SELECT '$old-sent-' || n, '2026-01-02', 'openai', 'gpt-5', 'c', 100 FROM generate_series(1, 4) n;
WITH sent AS (SELECT range_agg(int8range(id, id, '[]')) AS ids FROM usage WHERE external_id ~ 'sent'),
	gone AS (DELETE FROM aibilling.outbox_entry e USING sent WHERE e.first <\@ sent.ids)
INSERT INTO aibilling.delivery (server, usage_table, usage_ids, events, bytes, state, attempts, inserted, duplicates, started_at, finished_at)
SELECT 'polar', 'usage', CASE state WHEN 'sending' THEN ids * int8multirange(int8range((SELECT max(id) FROM usage), NULL)) ELSE
	ids - int8multirange(int8range((SELECT max(id) FROM usage), NULL)) END, CASE state WHEN 'sending' THEN 1 ELSE 3 END, 100, state, 1,
	CASE state WHEN 'sending' THEN NULL ELSE 3 END, CASE state WHEN 'sending' THEN NULL ELSE 0 END, now(),
	CASE state WHEN 'sending' THEN NULL ELSE now() END
FROM sent, unnest('{delivered,sending}'::text[]) state;
SQL
		$versions->command_ok([ 'pg_dump', '-Fc', '-d', $versions->connstr($database), '-f', $dump ], "$old: pg_dump");
		my $rows = value($versions, $database, 'SELECT * FROM usage ORDER BY id');
		$versions->safe_psql($database, 'ALTER EXTENSION aibilling_polar UPDATE');
		is_deeply(
			[ split /\n/, value($versions, $database, $anatomy) ], [ split /\n/, $fresh ],
			"an update from $old equals a fresh install, object by object");
		is(value($versions, $database, 'SELECT * FROM usage ORDER BY id'), $rows, "$old: rows stay as they are");
		wait_delivered($versions, $database, "$old: what waited is delivered");
		is( join(' ', grep { /^\Q$old\E-/ } sort keys %{ stored($polar) }),
			value($versions, $database,
				"SELECT string_agg(external_id, ' ' ORDER BY external_id COLLATE \"C\") FROM usage, aibilling.usage_status('usage', id) WHERE state = 'delivered'"
				  . " AND id NOT IN (SELECT unnest(ARRAY(SELECT generate_series(lower(r), upper(r) - 1) FROM aibilling.delivery, unnest(usage_ids) r WHERE inserted = 3 AND bytes = 100)))"),
			"$old: every row once, and none that was delivered");
		like(value($versions, $database, 'SELECT pending, unpriced, rejected, in_flight, status FROM aibilling.status'),
			qr/^0\|1\|1\|0\|idle: everything that can be sent is delivered; 1 rows wait for a price.*; 1 rows are rejected/, "$old: status");
		like(
			($versions->psql($database, "UPDATE usage SET input_tokens = 1 WHERE external_id = '$old-sent-1'"))[2],
			qr/has been delivered/, "$old: what was delivered then is a fact");
		is(value($versions, $database, 'SELECT sum(unexpected_duplicates) FROM aibilling.delivery'), '0', "$old: no surprise");
		$versions->safe_psql($database, insert("$old-after", 2));
		wait_delivered($versions, $database, "$old: delivery goes on");

		# A dump of then is restored where the extension is of then, and updated.
		$versions->safe_psql('postgres', 'CREATE DATABASE restored');
		$versions->safe_psql('restored', "CREATE EXTENSION aibilling_polar VERSION '$old'");
		$versions->command_ok([ 'pg_restore', '--exit-on-error', '-d', $versions->connstr('restored'), $dump ],
			"$old: pg_restore");
		$versions->safe_psql('restored', 'ALTER EXTENSION aibilling_polar UPDATE');
		is(value($versions, 'restored', $anatomy), $fresh, "$old: makes $current");
		is(value($versions, 'restored', 'SELECT * FROM usage ORDER BY id'), $rows, "$old: with its rows");
		like(value($versions, 'restored', 'SELECT pending, unpriced, rejected, in_flight, status FROM aibilling.status'),
			qr/^2\|1\|1\|1\|paused: this database is a copy/, "$old: and what waited");
		$versions->safe_psql('postgres', 'DROP DATABASE restored');
	}
	$versions->stop;
}

done_testing();
