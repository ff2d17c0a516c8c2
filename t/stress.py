#!/usr/bin/env python3
"""Random statements and operators against a server with faults; then rows and events must agree.

    stress.py --seconds N --seed N --polar PORT    (the server by PGHOST, PGPORT, PGDATABASE, PGUSER)

Several sessions insert, change, move, delete and bring back rows of plain and partitioned tables, whose
ids are shared, reused and moved; operators pause, retry, reprice, correct, detach and kill;
tables are renamed and rewritten, and once in a while all server processes start anew; a role of its own
misbehaves in its own table; the stand-in for Polar loses answers and refuses.  At the end all faults
cease, and then

- each row that is delivered is at Polar exactly once, with its cost and its customer,
- each row that is not is in the outbox, rejected, with a reason,
- Polar has nothing that has not been a row here.

All the while, what aibilling.usage_daily() says is compared with the rows, within one snapshot.

Exit status 1, with the first failures of each kind, if not: of a row what it holds, what Polar has of it,
and what the ledger says.
"""
import argparse
import collections
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.request

TABLES = ("one", "two", "parts", "tenants")
PARTITIONED = {"parts": ("region", ("'a'", "'b'", "'c'")), "tenants": ("tenant", ("0", "1"))}
# partitions that go and come, with their table and their bound
LEAVES = (("parts_a", "parts", "'a'"), ("parts_b", "parts", "'b'"), ("parts_c", "parts", "'c'"), ("tenants_1", "tenants", "1"))
FAILURES_SHOWN = 5      # of each kind
CUSTOMERS = ("c1", "c2", "c3")

SETUP = """
CREATE ROLE eve LOGIN;
CREATE ROLE owner LOGIN;
GRANT USAGE ON FOREIGN SERVER polar, other TO eve, owner;
CREATE SCHEMA eve AUTHORIZATION eve;
INSERT INTO aibilling.price (provider, model, input, output) VALUES ('p', 'm0', 1.25, 10), ('p', 'm1', 0.3, 0.7);
SELECT aibilling.create_usage_table('one', 'polar');
SELECT aibilling.create_usage_table('two', 'other');
CREATE TABLE parts (LIKE one INCLUDING DEFAULTS, region text NOT NULL, PRIMARY KEY (id, region)) PARTITION BY LIST (region);
CREATE SEQUENCE parts_id; ALTER TABLE parts ALTER id SET DEFAULT nextval('parts_id');
CREATE TABLE parts_a PARTITION OF parts FOR VALUES IN ('a');
CREATE TABLE parts_b PARTITION OF parts FOR VALUES IN ('b');
CREATE TABLE parts_c PARTITION OF parts FOR VALUES IN ('c') PARTITION BY RANGE (id);
CREATE TABLE parts_c1 PARTITION OF parts_c FOR VALUES FROM (MINVALUE) TO (300);
CREATE TABLE parts_c2 PARTITION OF parts_c FOR VALUES FROM (300) TO (MAXVALUE);
SELECT aibilling.attach('parts', 'polar');
CREATE TABLE tenants (LIKE one INCLUDING DEFAULTS, tenant int NOT NULL, PRIMARY KEY (id, tenant)) PARTITION BY LIST (tenant);
CREATE SEQUENCE tenants_id; ALTER TABLE tenants ALTER id SET DEFAULT nextval('tenants_id');
CREATE TABLE tenants_0 PARTITION OF tenants FOR VALUES IN (0);
CREATE TABLE tenants_1 PARTITION OF tenants FOR VALUES IN (1);
SELECT aibilling.attach('tenants', 'other');
CREATE SCHEMA away;
CREATE TABLE audit (what text, id bigint);
CREATE FUNCTION audit() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN
	INSERT INTO audit VALUES (TG_OP, coalesce(NEW.id, OLD.id));
	BEGIN PERFORM 1 / 0; EXCEPTION WHEN division_by_zero THEN NULL; END;
	RETURN coalesce(NEW, OLD);
END$$;
CREATE TRIGGER audit BEFORE INSERT OR UPDATE OR DELETE ON tenants FOR EACH ROW EXECUTE FUNCTION audit();
CREATE TRIGGER zzz_audit BEFORE UPDATE OR DELETE ON parts FOR EACH ROW EXECUTE FUNCTION audit();
-- delivered rows that were deleted since, which stay counted
CREATE TABLE gone (LIKE one);
CREATE FUNCTION keep_gone() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN
	IF TG_OP = 'INSERT' THEN
		DELETE FROM gone WHERE id = NEW.id AND external_id = NEW.external_id;
	ELSIF TG_OP = 'DELETE' THEN
		INSERT INTO gone SELECT OLD.* FROM aibilling.usage_status('one', OLD.id) WHERE state = 'delivered';
	ELSIF EXISTS (SELECT FROM aibilling.delivery WHERE usage_table = 'one'::regclass AND state = 'sending') THEN
		RAISE EXCEPTION 'rows are being sent';
	ELSE
		-- those, too, that have come back and wait to be sent again
		INSERT INTO gone SELECT o.* FROM one o WHERE EXISTS (SELECT FROM aibilling.delivery d
			WHERE d.usage_table = 'one'::regclass AND d.state = 'delivered' AND d.usage_ids @> o.id
				AND d.id > (SELECT t.ledger_from FROM aibilling.usage_table t WHERE t.usage = 'one'::regclass));
	END IF;
	RETURN NULL;
END$$;
CREATE TRIGGER zzz_gone AFTER INSERT OR DELETE ON one FOR EACH ROW EXECUTE FUNCTION keep_gone();
CREATE TRIGGER aa_gone BEFORE TRUNCATE ON one EXECUTE FUNCTION keep_gone();
SET ROLE eve;
SELECT aibilling.create_usage_table('eve.usage', 'polar');
CREATE FUNCTION eve.cross() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN
	IF current_setting('application_name') LIKE 'aibilling%' THEN
		IF random() < 0.3 THEN RAISE EXCEPTION USING ERRCODE = 'query_canceled'; END IF;
		IF random() < 0.3 THEN RAISE EXCEPTION USING ERRCODE = 'admin_shutdown'; END IF;
		IF random() < 0.1 THEN PERFORM pg_sleep(2); END IF;
	END IF;
	RETURN NEW;
END$$;
CREATE TRIGGER crossing BEFORE UPDATE ON eve.usage FOR EACH ROW EXECUTE FUNCTION eve.cross();
RESET ROLE;
"""

SUMS = """
BEGIN ISOLATION LEVEL REPEATABLE READ;
-- a snapshot older than a TRUNCATE would find the table empty
LOCK TABLE one IN ACCESS SHARE MODE;
WITH known AS (
	SELECT coalesce(range_agg(r), '{}') AS ids FROM aibilling.delivery d, unnest(d.usage_ids) r
	WHERE d.usage_table = 'one'::regclass AND (d.state = 'sending' OR d.state = 'delivered' AND d.id >
		(SELECT t.ledger_from FROM aibilling.usage_table t WHERE t.usage = 'one'::regclass))
), counted AS (
	SELECT o.* FROM one o, known
	WHERE known.ids @> o.id OR o.id IN (SELECT usage_id FROM aibilling.outbox WHERE usage_table = 'one'::regclass)
	UNION ALL
	SELECT * FROM gone
), by_rows AS (
	SELECT (occurred_at AT TIME ZONE 'UTC')::date AS day, external_customer_id, customer_id, provider, model, event_name, count(*),
		coalesce(sum(input_tokens), 0), coalesce(sum(cache_read_tokens), 0),
		coalesce(sum(cache_write_tokens), 0) + coalesce(sum(cache_write_1h_tokens), 0), coalesce(sum(output_tokens), 0),
		coalesce(sum(reasoning_tokens), 0), coalesce(sum(cost_nanos), 0), coalesce(sum(cost_cents), 0),
		count(*) FILTER (WHERE cost_nanos IS NULL)
	FROM counted
	GROUP BY 1, 2, 3, 4, 5, 6
), by_rollup AS (
	SELECT * FROM aibilling.usage_daily('one')
)
SELECT 'rows: ' || r::text FROM (TABLE by_rows EXCEPT ALL TABLE by_rollup) r
UNION ALL SELECT 'usage_daily: ' || d::text FROM (TABLE by_rollup EXCEPT ALL TABLE by_rows) d
UNION ALL SELECT 'compared ' || count(*) FROM counted;
COMMIT;
"""


class Session:
    """A psql that runs one script after the other, and starts anew when its server process has gone."""

    def __init__(self, user=None):
        self.user = user
        self.process = None

    def start(self):
        command = ["psql", "-XqAt", "-v", "ON_ERROR_STOP=0"] + (["-U", self.user] if self.user else [])
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                        text=True, bufsize=1)
        threading.Thread(target=self.drain, args=(self.process,), daemon=True).start()

    @staticmethod
    def drain(process):
        for _ in process.stderr:
            pass

    def run(self, sql):
        """The lines that a script prints, None if the connection was lost."""
        if self.process is None or self.process.poll() is not None:
            self.start()
        try:
            self.process.stdin.write(sql + "\n;\nROLLBACK;\n\\echo ~~done\n")
            self.process.stdin.flush()
            lines = []
            for line in self.process.stdout:
                if line == "~~done\n":
                    return lines
                lines.append(line.rstrip("\n"))
        except OSError:
            pass
        self.process.kill()
        self.process.wait()
        self.process = None
        time.sleep(0.2)                 # perhaps the server starts anew
        return None


class Gate:
    """What statements of many sessions pass side by side, but none while one session keeps it shut."""

    def __init__(self):
        self.changed = threading.Condition()
        self.inside = 0
        self.shut = False

    def enter(self):
        with self.changed:
            self.changed.wait_for(lambda: not self.shut)
            self.inside += 1

    def leave(self):
        with self.changed:
            self.inside -= 1
            self.changed.notify_all()

    def close(self):
        with self.changed:
            self.changed.wait_for(lambda: not self.shut)
            self.shut = True
            self.changed.wait_for(lambda: self.inside == 0)

    def open(self):
        with self.changed:
            self.shut = False
            self.changed.notify_all()


class Stress:
    def __init__(self, seconds, seed, port):
        self.seed = seed
        self.stop_at = time.monotonic() + seconds
        self.base = "http://127.0.0.1:%d" % port
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self.lock = threading.Lock()
        self.used = 0
        self.crashes = 0
        self.compared = 0
        self.failures = collections.defaultdict(list)   # by kind, the lines of each
        # Of partitions that leave concurrently, by what says that a row goes there: PostgreSQL stores a row that has
        # chosen its partition before the end of that without our triggers.
        self.gates = {bound: Gate() for _, table, bound in LEAVES if table == "parts"}

    def fail(self, kind, *lines):
        with self.lock:
            self.failures[kind].append(lines)

    def ask(self, path, data=None, method=None):
        request = urllib.request.Request(self.base + path, None if data is None else json.dumps(data).encode(),
                                         {"Content-Type": "application/json"}, method=method)
        return json.loads(self.opener.open(request, timeout=60).read())

    def key(self):
        with self.lock:
            self.used += 1
            return "e%d" % self.used

    def going_on(self):
        return time.monotonic() < self.stop_at

    # --- what applications do ---

    def rows(self, rng, table, count, ids=None):
        """An INSERT of new rows; with ids, of rows with these."""
        values = []
        for i in range(count):
            model = rng.choice(("m0", "m0", "m1", "later%d" % rng.randrange(4)))
            customer = "NULL" if rng.random() < 0.1 else "'%s'" % rng.choice(CUSTOMERS)
            more = ", %s" % rng.choice(PARTITIONED[table][1]) if table in PARTITIONED else ""
            number = "%s, " % ids[i] if ids else ""
            values.append("(%s'%s', 'p', '%s', %s, %d, %d%s)" % (
                number, self.key(), model, customer, rng.randrange(10000), rng.randrange(1000), more))
        column = ", " + PARTITIONED[table][0] if table in PARTITIONED else ""
        return "INSERT INTO %s (%sexternal_id, provider, model, external_customer_id, input_tokens, output_tokens%s) VALUES %s" % (
            table, "id, " if ids else "", column, ", ".join(values))

    @staticmethod
    def begin(rng, seconds):
        """The begin of a transaction, whose snapshot may be older than what it sees next."""
        return "BEGIN ISOLATION LEVEL %s; SELECT count(*) FROM audit; SELECT pg_sleep(%f)" % (
            rng.choice(("READ COMMITTED", "REPEATABLE READ")), rng.random() * seconds)

    def change(self, rng):
        """A script of an application's."""
        table = rng.choice(TABLES)
        some = "SELECT id FROM %s ORDER BY random() LIMIT %d" % (table, rng.choice((1, 1, 3, 10)))
        waiting = ("SELECT usage_id FROM aibilling.outbox WHERE usage_table = '%s'::regclass ORDER BY random() LIMIT %d"
                   % (table, rng.choice((1, 5))))
        insert = self.rows(rng, table, rng.choice((1, 1, 2, 20)))
        choices = [
            (30, insert),
            (8, "BEGIN; %s; SAVEPOINT a; %s; ROLLBACK TO a; %s; SAVEPOINT b; %s; RELEASE b; COMMIT" % (
                insert, self.rows(rng, table, 2), self.rows(rng, table, 2), self.rows(rng, table, 1))),
            (3, "BEGIN; %s; ROLLBACK" % insert),
            (5, "BEGIN; %s; PREPARE TRANSACTION '%s'; SELECT pg_sleep(%f); %s PREPARED '%s'" % (
                insert, "g%s" % self.used, rng.random(), rng.choice(("COMMIT", "ROLLBACK")), "g%s" % self.used)),
            (12, "UPDATE %s SET input_tokens = input_tokens + 1 WHERE id IN (%s)" % (table, waiting)),
            (5, "BEGIN; UPDATE %s SET input_tokens = input_tokens + 1 WHERE id IN (%s); SELECT pg_sleep(%f); %s" % (
                table, waiting, rng.random(), rng.choice(("COMMIT", "ROLLBACK")))),
            (5, "UPDATE %s SET external_customer_id = 'c9' WHERE external_customer_id IS NULL AND id %% 5 = %d" % (
                table, rng.randrange(5))),
            (6, "DELETE FROM %s WHERE id IN (%s)" % (table, some)),
            (5, "BEGIN; %s; UPDATE %s SET output_tokens = 5 WHERE id > (SELECT max(id) - 3 FROM %s); COMMIT" % (insert, table, table)),
            (5, "BEGIN ISOLATION LEVEL %s; %s; SAVEPOINT s; UPDATE %s SET input_tokens = input_tokens + 2 WHERE id IN (%s); %s; COMMIT" % (
                rng.choice(("REPEATABLE READ", "SERIALIZABLE")), insert, table, some, rng.choice(("ROLLBACK TO s", "RELEASE s")))),
            # what is deleted and inserted again, by its owner
            (5, "BEGIN; CREATE TEMP TABLE t (LIKE %s) ON COMMIT DROP;"
                " WITH gone AS (DELETE FROM %s WHERE id IN (%s) RETURNING *) INSERT INTO t SELECT * FROM gone;"
                " INSERT INTO %s SELECT * FROM t; COMMIT" % (table, table, some, table)),
            (5, "WITH gone AS (DELETE FROM %s WHERE id IN (%s) RETURNING *) INSERT INTO %s SELECT * FROM gone" % (table, some, table)),
            (5, "MERGE INTO %s u USING (%s) s ON u.id = s.id WHEN MATCHED AND u.id %% 2 = 0 THEN DELETE"
                " WHEN MATCHED THEN UPDATE SET output_tokens = 4" % (table, some)),
            (2, "UPDATE %s SET event_name = 'other' WHERE id IN (%s)" % (table, waiting)),
            (3, "UPDATE %s SET external_id = '%s' WHERE external_id = (SELECT min(external_id) FROM %s WHERE id IN (%s))" % (
                table, self.key(), table, waiting)),
            (2, "BEGIN; DELETE FROM %s WHERE id IN (%s); SAVEPOINT s; %s; ROLLBACK TO s; PREPARE TRANSACTION '%s'; SELECT pg_sleep(%f); %s PREPARED '%s'" % (
                table, waiting, insert, "g%s" % self.used, rng.random(), rng.choice(("COMMIT", "ROLLBACK")), "g%s" % self.used)),
            (3, "SELECT aibilling.correct('%s', id, %f) FROM %s WHERE id IN (%s)" % (table, rng.random() / 100, table, some)),
            (1, "ALTER TABLE %s ADD COLUMN extra int DEFAULT 7; ALTER TABLE %s DROP COLUMN extra" % (table, table)),
            (1, "ALTER TABLE %s RENAME TO renamed_%s; SELECT pg_sleep(%f); ALTER TABLE renamed_%s RENAME TO %s" % (
                table, table, rng.random() / 20, table, table)),
            (1, "ALTER TABLE %s SET SCHEMA away; SELECT pg_sleep(%f); ALTER TABLE away.%s SET SCHEMA public" % (table, rng.random() / 20, table)),
            (1, "VACUUM FULL %s" % table),
        ]
        if table in PARTITIONED:
            column, values = PARTITIONED[table]
            value = rng.choice(values)
            leaf, _, bound = rng.choice([leaf for leaf in LEAVES if leaf[1] == table])
            choices += [
                (12, "UPDATE %s SET %s = %s WHERE id IN (%s)" % (table, column, value, some)),
                (4, "UPDATE %s SET %s = %s, input_tokens = input_tokens + 3 WHERE id IN (%s)" % (table, column, value, waiting)),
                (4, "BEGIN; UPDATE %s SET %s = %s WHERE id IN (%s); SAVEPOINT s; UPDATE %s SET %s = %s WHERE id IN (%s); ROLLBACK TO s; COMMIT" % (
                    table, column, value, some, table, column, rng.choice(values), some)),
                # ids that others have
                (12, self.rows(rng, table, 1, ["(SELECT coalesce(max(id), 1) FROM %s)" % table])),
                (12, "DELETE FROM %s WHERE id IN (SELECT id FROM %s GROUP BY id HAVING count(*) > 1) AND %s = %s" % (table, table, column, value)),
                (6, "%s; ALTER TABLE %s DETACH PARTITION %s; COMMIT; %s; ALTER TABLE %s ATTACH PARTITION %s FOR VALUES IN (%s); COMMIT" % (
                    self.begin(rng, 0.1), table, leaf, self.begin(rng, 0.5), table, leaf, bound)),
            ]
        else:
            choices += [
                (4, "INSERT INTO %s (external_id, provider, model, external_customer_id, input_tokens, output_tokens)"
                    " SELECT external_id, 'p', 'm0', 'c5', 77, 7 FROM %s ORDER BY random() LIMIT 3"
                    " ON CONFLICT (external_id) DO UPDATE SET output_tokens = excluded.output_tokens + 1" % (table, table)),
                # what "gone" is to hold is looked up by the snapshot
                (1, "%s; TRUNCATE %s RESTART IDENTITY; %s; %s" % (
                    "BEGIN" if table == "one" else self.begin(rng, 0.5), table, insert, rng.choice(("COMMIT", "ROLLBACK")))),
            ]
        return rng.choices([text for _, text in choices], [weight for weight, _ in choices])[0]

    def run_gated(self, session, script):
        """Run a script, which waits for partitions that it may store rows in and that are leaving."""
        anywhere = any(words in script for words in ("INSERT INTO parts SELECT", "correct('parts'", "reprice('parts'"))
        gates = [gate for bound, gate in self.gates.items() if anywhere or bound in script]
        for gate in gates:
            gate.enter()
        session.run(script)
        for gate in gates:
            gate.leave()

    def application(self, number):
        rng = random.Random(self.seed * 100 + number)
        session = Session()
        while self.going_on():
            self.run_gated(session, self.change(rng))

    # --- what operators do ---

    def leave_concurrently(self, session, rng):
        """A partition leaves, to the end or cancelled and finalized, and comes back."""
        leaf, table, bound = rng.choice([leaf for leaf in LEAVES if leaf[2] in self.gates])
        self.gates[bound].close()
        session.run("SET statement_timeout = %d; ALTER TABLE %s DETACH PARTITION %s CONCURRENTLY; RESET statement_timeout; SELECT pg_sleep(%f);"
                    " ALTER TABLE %s DETACH PARTITION %s FINALIZE; ALTER TABLE %s ATTACH PARTITION %s FOR VALUES IN (%s)" % (
                        rng.choice((0, 2, 10, 50)), table, leaf, rng.random() / 3, table, leaf, table, leaf, bound))
        self.gates[bound].open()

    def operation(self, rng):
        table = rng.choice(TABLES)
        return rng.choice((
            "CALL aibilling.sync(timeout => '1s')",
            "CALL aibilling.sync('other', timeout => '1s')",
            "SELECT aibilling.pause('polar'); SELECT pg_sleep(0.2); SELECT aibilling.resume('polar')",
            "SELECT aibilling.pause(); SELECT aibilling.resume()",
            "ALTER SERVER polar OPTIONS (SET batch_size '%d')" % rng.choice((1, 3, 7, 50)),
            "%s; ALTER SERVER polar RENAME TO renamed; COMMIT; SELECT pg_sleep(0.1); ALTER SERVER renamed RENAME TO polar" % self.begin(rng, 0.2),
            "SELECT aibilling.detach('two'); SELECT pg_sleep(0.1); SELECT aibilling.attach('two', 'other', 'send')",
            "SELECT aibilling.attach('%s', '%s', 'send')" % (table, "other" if table in ("two", "tenants") else "polar"),
            "SELECT aibilling.retry('%s')" % table,
            "SELECT count(*) FROM aibilling.reprice('%s', dry_run => false)" % table,
            "SELECT count(*) FROM aibilling.reprice('%s', dry_run => false, corrections => true)" % table,
            "INSERT INTO aibilling.price (provider, model, input, output) VALUES ('p', 'later%d', 1, 2) ON CONFLICT DO NOTHING" % rng.randrange(4),
            "DELETE FROM aibilling.price WHERE model = 'later%d'" % rng.randrange(4),
            "UPDATE aibilling.price SET input = %d WHERE model = 'm1'" % rng.randrange(1, 9),
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type LIKE 'aibilling%'" if rng.random() < 0.3 else "SELECT 1",
            "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE query LIKE 'CALL aibilling.sync%' AND pid <> pg_backend_pid()",
            "VACUUM aibilling.outbox_entry",
            "SELECT count(*) FROM aibilling.status; SELECT count(*) FROM aibilling.outbox; SELECT count(*) FROM aibilling.preview('one', 5)",
        ))

    def crash(self, session, rng):
        """A server process is killed: the worker, or one in the middle of a statement."""
        pids = session.run("SELECT pid FROM pg_stat_activity WHERE %s ORDER BY random() LIMIT 1" % rng.choice(
            ("backend_type LIKE 'aibilling%'", "state = 'active' AND query ~ '^(INSERT|UPDATE|DELETE)'", "pid = pg_backend_pid()")))
        for pid in pids or []:
            try:
                os.kill(int(pid), signal.SIGKILL)
                with self.lock:
                    self.crashes += 1
            except ProcessLookupError:
                pass

    def operator(self, number):
        rng = random.Random(self.seed * 100 + 50 + number)
        session = Session()
        while self.going_on():
            chance = rng.random()
            if chance < 0.01:
                self.crash(session, rng)
            elif chance < 0.07:
                self.leave_concurrently(session, rng)
            else:
                self.run_gated(session, self.operation(rng))
            time.sleep(rng.random() * 0.3)

    def forget_prepared(self):
        """End what was prepared by a session that is gone, since it holds its locks."""
        session = Session()
        while self.going_on():
            for gid in session.run("SELECT gid FROM pg_prepared_xacts WHERE prepared < now() - interval '2 s'") or []:
                session.run("ROLLBACK PREPARED '%s'" % gid)
            time.sleep(0.5)

    def eve(self):
        rng = random.Random(self.seed * 100 + 90)
        session = Session("eve")
        while self.going_on():
            session.run(rng.choice((
                "INSERT INTO eve.usage (provider, model, external_customer_id, input_tokens) SELECT 'p', 'later9', 'e', i FROM generate_series(1, 5) i",
                "INSERT INTO eve.usage (provider, model, external_customer_id, input_tokens) VALUES ('p', 'm0', 'e', 1)",
                "BEGIN; LOCK TABLE eve.usage; SELECT pg_sleep(1); ROLLBACK",
                "BEGIN; UPDATE eve.usage SET input_tokens = 9; SELECT pg_sleep(1); ROLLBACK",
                "CALL aibilling.sync(timeout => '1s')",
                "SELECT aibilling.retry('eve.usage'); SELECT aibilling.pause(); SELECT aibilling.resume()",
            )))
            time.sleep(rng.random() * 0.2)

    def faults(self):
        rng = random.Random(self.seed * 100 + 95)
        while self.going_on():
            fault = dict(rng.choice((
                {"kind": "503"}, {"kind": "500", "store": True}, {"kind": "429", "retry_after": rng.choice((0, 1))},
                {"kind": "drop_after_store"}, {"kind": "drop_before_read"}, {"kind": "truncated"},
                {"kind": "garbage", "what": rng.choice(("html", "empty", "wrong_counts"))},
                {"kind": "slow", "delay": rng.choice((100, 1800))}, {"kind": "hang", "store": True}, {"kind": "401"},
                {"kind": "422", "index": [0]}, {"kind": "413"})), times=rng.choice((1, 1, 2, 3)))
            try:
                # a refusal behind an answer that was lost
                self.ask("/_test/fault", [{"kind": "drop_after_store"}, fault] if rng.random() < 0.3 else fault)
                if rng.random() < 0.3:
                    self.ask("/_test/release", {})
            except OSError as error:
                self.fail("the stand-in has gone", str(error))
                return
            time.sleep(rng.random() * 1.5)

    def sums(self, session=None):
        """Compare the rollup with the rows, now and then."""
        rng = random.Random(self.seed * 100 + 97)
        session = session or Session()
        while self.going_on():
            self.compare_sums(session)
            time.sleep(rng.random() * 0.2)

    def compare_sums(self, session):
        lines = session.run(SUMS)
        if not lines:
            return
        if not lines[-1].startswith("compared "):
            self.fail("the sums cannot be compared", *lines)
            return
        if len(lines) > 1:
            self.fail("the sums differ", time.strftime("at %T UTC", time.gmtime()), *sorted(lines, key=lambda line: line.split("(")[-1])[:8])
        with self.lock:
            self.compared += int(lines[-1].split()[-1]) > 0

    # --- the end ---

    def settle(self, session):
        """All faults cease; what can be delivered is."""
        self.ask("/_test/fault", method="DELETE")
        self.ask("/_test/release", {})
        for gid in session.run("SELECT gid FROM pg_prepared_xacts") or []:
            session.run("ROLLBACK PREPARED '%s'" % gid)
        session.run("ALTER SERVER renamed RENAME TO polar")
        for table in TABLES:
            session.run("ALTER TABLE renamed_%s RENAME TO %s" % (table, table))
            session.run("ALTER TABLE away.%s SET SCHEMA public" % table)
        for leaf, table, bound in LEAVES:
            session.run("ALTER TABLE %s DETACH PARTITION %s FINALIZE" % (table, leaf))
            session.run("ALTER TABLE %s ATTACH PARTITION %s FOR VALUES IN (%s)" % (table, leaf, bound))
        session.run("INSERT INTO aibilling.price (provider, model, input, output)"
                    " SELECT 'p', 'later' || n, 1, 2 FROM generate_series(0, 3) n ON CONFLICT DO NOTHING")
        session.run("SELECT aibilling.attach('two', 'other', 'send')")
        session.run("SELECT aibilling.resume()")
        for table in TABLES:
            session.run("UPDATE %s SET external_customer_id = 'c9' WHERE external_customer_id IS NULL" % table)
            session.run("SELECT aibilling.retry('%s')" % table)
        waits = ("SELECT (SELECT count(*) FROM aibilling.outbox WHERE state <> 'rejected' AND usage_table <> 'eve.usage'::regclass)"
                 " + (SELECT count(*) FROM aibilling.delivery WHERE state = 'sending' AND usage_table <> 'eve.usage'::regclass)")
        until = time.monotonic() + 180
        left = None
        while time.monotonic() < until:
            left = session.run(waits)
            if left == ["0"]:
                return
            session.run("SELECT aibilling.resume()")
            time.sleep(1)
        status = session.run("SELECT usage_table, pending, unpriced, rejected, in_flight, status FROM aibilling.status") or []
        rows = session.run("SELECT usage_table, usage_id, state, not_before, error FROM aibilling.outbox WHERE state <> 'rejected'"
                           " AND usage_table <> 'eve.usage'::regclass LIMIT 10") or []
        self.fail("left after three minutes", str(left), *status, *rows)

    @staticmethod
    def faults_of(row, found):
        """What is wrong with a row of which Polar has these events."""
        faults = []
        if row["state"] == "rejected":
            if not row["error"]:
                faults.append("rejected without a reason")
        elif row["state"] != "delivered":
            faults.append("not delivered")
        elif not found and not row["shared"]:
            faults.append("delivered, and not at Polar")
        if len(found) > 1:
            faults.append("more than once at Polar")
        if found and Stress.differs(row, found[0]):
            faults.append("not as it is at Polar")
        return faults

    @staticmethod
    def differs(row, event):
        """Is a row other than its event?"""
        here = row["row"]
        return (event.get("external_customer_id") != here.get("external_customer_id") or
                any(event["metadata"].get(name) != here.get(name) for name in ("cost_nanos", "input_tokens", "output_tokens")))

    @staticmethod
    def all_of_row(session, table, row, found):
        """A row, its events and what the ledger has of its id, as lines."""
        lines = ["%s id %s, external_id %s: %s %s" % (table, row["id"], row["key"], row["state"], row["error"] or ""),
                 "  row: %s" % json.dumps(row["row"])]
        lines += ["  at Polar: %s" % json.dumps(event) for event in found]
        ledger = session.run(
            "SELECT id, state, events, attempts, inserted, duplicates, outcome_unknown, vanished_ids, started_at, finished_at, error"
            " FROM aibilling.ledger WHERE usage_table = '%s'::regclass"
            " AND (usage_ids @> %s::bigint OR vanished_ids @> %s::bigint) ORDER BY id" % (table, row["id"], row["id"])) or []
        return lines + ["  ledger: %s" % line for line in ledger]

    def compare(self, session):
        events = collections.defaultdict(list)
        for event in self.ask("/_test/events"):
            events[event["external_id"]].append(event["event"])
        states = collections.Counter()
        for table in TABLES:
            lines = session.run(
                "SELECT json_build_object('key', t.external_id, 'id', t.id, 'row', jsonb_strip_nulls(to_jsonb(t)), 'state', s.state,"
                " 'error', s.error, 'shared', count(*) OVER (PARTITION BY t.id) > 1) FROM %s t, aibilling.usage_status('%s', t.id) s" % (table, table)) or []
            for row in map(json.loads, lines):
                found = events.pop(row["key"], [])
                states[row["state"]] += 1
                for fault in self.faults_of(row, found):
                    self.fail(fault, *self.all_of_row(session, table, row, found))
        for line in session.run("SELECT json_build_object('key', g.external_id, 'id', g.id, 'row', jsonb_strip_nulls(to_jsonb(g)),"
                                " 'state', 'deleted', 'error', '') FROM gone g") or []:
            row = json.loads(line)
            found = events.get(row["key"], [])
            if found and self.differs(row, found[0]):
                self.fail("deleted after its delivery, and not as it is at Polar", *self.all_of_row(session, "one", row, found))
        for key, found in events.items():
            number = int(key[1:]) if key[1:].isdigit() and key[0] == "e" else None
            if number is None and (found[0].get("external_customer_id") == "e" or "tag_corrects" in found[0]["metadata"]):
                continue                # eve's, or a correction
            if number is None or number > self.used:
                self.fail("at Polar, and was never here", "%s: %s" % (key, json.dumps(found[0])))
        unexpected = session.run("SELECT coalesce(sum(unexpected_duplicates), 0) FROM aibilling.delivery WHERE usage_table <> 'eve.usage'::regclass")
        print("%d external ids, rows: %s, unexpected duplicates: %s, crashes: %d" % (self.used, dict(states), unexpected, self.crashes))
        if not states["delivered"]:
            self.fail("no row was delivered")

    def report(self):
        """Print the first failures of each kind."""
        for kind, failures in self.failures.items():
            print("%s (%d times)" % (kind, len(failures)))
            for lines in failures[:FAILURES_SHOWN]:
                for line in lines:
                    print("    " + line)

    def run(self):
        subprocess.run(["psql", "-Xq", "-v", "ON_ERROR_STOP=1"], input=SETUP, text=True, check=True)
        threads = [threading.Thread(target=self.application, args=(i,)) for i in range(3)]
        threads += [threading.Thread(target=self.operator, args=(i,)) for i in range(2)]
        threads += [threading.Thread(target=work) for work in (self.eve, self.faults, self.sums, self.forget_prepared)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        session = Session()
        self.settle(session)
        self.compare_sums(session)
        self.compare(session)
        print("the sums were compared %d times" % self.compared)
        if not self.compared:
            self.fail("no sums were compared")
        self.report()
        return 1 if self.failures else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--polar", type=int, required=True)
    arguments = parser.parse_args()
    sys.exit(Stress(arguments.seconds, arguments.seed, arguments.polar).run())


main()
