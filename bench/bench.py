#!/usr/bin/env python3
"""Measures aibilling_polar beside what one would use in its place.

Called by dev/bench, as the user that servers run under:

    bench.py BINDIR WORK RESULTS [options] [SECTION...]

BINDIR holds PostgreSQL's programs, WORK is an empty directory, in RESULTS the
numbers are kept (results.json) and the report is written (RESULTS.md).  Each
section takes --runs rounds; within a round everything that is compared runs one
after the other, so that what else the machine does hits all alike.  Numbers are
medians over the rounds.
"""

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent
DATABASE = "bench"
TICKS = os.sysconf("SC_CLK_TCK")
MODELS = [("openai", "gpt-5"), ("openai", "gpt-5-mini"), ("openai", "gpt-4o"), ("openai", "gpt-4o-mini"),
          ("openai", "o3"), ("anthropic", "claude-sonnet-4-5"), ("anthropic", "claude-opus-4-5"),
          ("anthropic", "claude-haiku-4-5"), ("google", "gemini-2.5-pro"), ("google", "gemini-2.5-flash")]
GIVEN = ("provider, model, external_customer_id, generation_id, input_tokens, cache_read_tokens,"
         " output_tokens, reasoning_tokens, tags")
FILLED = GIVEN + ", cost_nanos, cost_cents, cost_status"
SETTINGS = {
    "listen_addresses": "''",
    "shared_buffers": "'2GB'",
    "max_wal_size": "'16GB'",
    "checkpoint_timeout": "'1h'",
    "fsync": "on",
    "synchronous_commit": "on",
    "shared_preload_libraries": "'aibilling_polar'",
    "aibilling_polar.databases": f"'{DATABASE}'",
    "max_worker_processes": "16",
    "max_logical_replication_workers": "8",
}
# A server without the extension that publishes its usage table.
PUBLISHER_SETTINGS = {name: value for name, value in SETTINGS.items() if not name.startswith(("aibilling", "shared"))} \
    | {"wal_level": "logical", "shared_buffers": "'256MB'"}
PUBLISHERS = 3


def say(text):
    print(text, flush=True)


def median(values):
    return statistics.median(values)


def against(ours, theirs):
    """The ratio of each number that both measured."""
    return {key: ours[key] / theirs[key] for key in ours if theirs.get(key)}


def wait_until(condition, what, seconds=600):
    """Until the condition gives something true, which is returned."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        result = condition()
        if result:
            return result
        time.sleep(0.005)
    sys.exit(f"gave up waiting for {what}")


# --- processes ---------------------------------------------------------------

def stat(pid):
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()


def cpu_of(pid):
    """CPU seconds of a process."""
    fields = stat(pid)
    return (int(fields[11]) + int(fields[12])) / TICKS


def cpu_of_tree(pid):
    """CPU seconds of a process and all its children, ended ones included."""
    fields = stat(pid)
    total = sum(int(field) for field in fields[11:15]) / TICKS
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        try:
            total += cpu_of(child)
        except (FileNotFoundError, ProcessLookupError):
            pass
    return total


def status_of(pid, field):
    return int(re.search(rf"^{field}:\s*(\d+)", Path(f"/proc/{pid}/status").read_text(), re.M).group(1))


class Sink:
    """bench/sink.c, with a delay for each answer."""

    program = None
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def __init__(self, port, delay_ms=0, arrivals=None):
        self.url = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen([self.program, str(port), str(delay_ms)] + ([arrivals] if arrivals else []))
        wait_until(self.try_count, "the sink")

    def try_count(self):
        try:
            return self.count()
        except OSError:
            return None

    def count(self):
        return json.load(self.opener.open(self.url + "/count"))

    def stop(self):
        self.process.terminate()
        self.process.wait()


class Server:
    def __init__(self, bindir, work, settings=None):
        self.bindir = bindir
        self.data = work / "data"
        self.environment = {**os.environ, "PGHOST": str(work), "PGUSER": "postgres", "PGPORT": "5432",
                            "PGDATABASE": DATABASE, "PGOPTIONS": "-c client_min_messages=error"}
        self.run("initdb", "-D", self.data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8")
        with open(self.data / "postgresql.conf", "a", encoding="utf-8") as conf:
            conf.write(f"unix_socket_directories = '{work}'\n")
            conf.writelines(f"{name} = {value}\n" for name, value in (settings or SETTINGS).items())
        self.run("pg_ctl", "-D", self.data, "-l", work / "log", "-w", "start")
        self.postmaster = int((self.data / "postmaster.pid").read_text().split()[0])

    def run(self, program, *arguments, **options):
        done = subprocess.run([self.bindir / program, *arguments], env=self.environment, text=True,
                              capture_output=program != "pg_ctl", check=False, **options)
        if done.returncode != 0:
            sys.exit(f"{program} failed:\n{done.stdout}\n{done.stderr}")
        return done.stdout

    def stop(self):
        self.run("pg_ctl", "-D", self.data, "-m", "immediate", "stop", stdout=subprocess.DEVNULL)

    def sql(self, *statements, database=DATABASE):
        """Runs each in a transaction of its own; returns the output."""
        arguments = [word for statement in statements for word in ("-c", statement)]
        return self.run("psql", "-qXAt", "-v", "ON_ERROR_STOP=1", "-d", database, *arguments).strip()

    def timed(self, statement, *before):
        """Seconds, bytes of WAL and the backend's CPU seconds of a statement."""
        usage = "rtrim(pg_read_file('/proc/self/stat'), E'\\n')"
        output = self.run("psql", "-qXAt", "-v", "ON_ERROR_STOP=1", input="\n".join([
            *(f"{line};" for line in before),
            f"SELECT pg_current_wal_insert_lsn() AS lsn, {usage} AS cpu, clock_timestamp() AS started \\gset",
            f"{statement};",
            "SELECT extract(epoch FROM clock_timestamp() - :'started'),"
            f" pg_wal_lsn_diff(pg_current_wal_insert_lsn(), :'lsn'), :'cpu', {usage};"]))
        seconds, wal, *cpu = output.splitlines()[-1].split("|")
        first, last = (sum(int(field) for field in words.rsplit(")", 1)[1].split()[11:13]) for words in cpu)
        return {"seconds": float(seconds), "wal": float(wal), "cpu": (last - first) / TICKS}

    def worker(self):
        """The worker's process id; it starts within seconds of its database."""
        return wait_until(lambda: self.sql("SELECT pid FROM pg_stat_activity"
                                           " WHERE backend_type = 'aibilling_polar worker'"), "the worker")


def source_ddl(rows):
    """What creates the rows that are inserted, in a table of that name."""
    models = ", ".join(f"({i}, '{p}', '{m}')" for i, (p, m) in enumerate(MODELS))
    return f"""CREATE UNLOGGED TABLE source AS
    SELECT m.provider, m.model, 'customer_' || n * 7919 % 5000 AS external_customer_id,
        'chatcmpl-' || md5(n::text) AS generation_id, 200 + n * 31 % 20000 AS input_tokens,
        CASE WHEN n % 3 = 0 THEN n * 31 % 20000 / 2 END AS cache_read_tokens,
        n * 17 % 3000 AS output_tokens, CASE WHEN n % 4 = 0 THEN n * 17 % 3000 / 2 END AS reasoning_tokens,
        jsonb_build_object('org_name', 'Acme ' || n % 97, 'feature', 'chat') AS tags
    FROM generate_series(1::bigint, {rows}) n
    JOIN (VALUES {models}) m (i, provider, model) ON m.i = n % {len(MODELS)} ORDER BY n"""


# --- the sections --------------------------------------------------------------

class Bench:
    def __init__(self, server, options, work):
        self.server = server
        self.options = options
        self.work = work
        self.sql = server.sql
        self.sink = Sink(options.port)
        self.results = {}

    def prepare(self):
        """The extension, the tables and the rows that all sections use."""
        say("== preparing")
        self.sql(f"CREATE DATABASE {DATABASE}", database="postgres")
        self.sql(
            "CREATE EXTENSION aibilling_polar",
            "SELECT aibilling.load_bundled_prices()",
            f"""CREATE SERVER polar FOREIGN DATA WRAPPER polar OPTIONS (url '{self.sink.url}',
                event_name 'llm_usage', requests_per_minute '0', batch_size '1000', max_in_flight '4')""",
            "CREATE USER MAPPING FOR PUBLIC SERVER polar OPTIONS (access_token 'polar_oat_bench')",
            "SELECT aibilling.create_usage_table('usage', server => 'polar')",
            "CREATE TABLE plain (LIKE usage INCLUDING ALL)",
            "CREATE TABLE peer (LIKE usage INCLUDING ALL)",
            "ALTER TABLE peer ADD delivered_at timestamptz",
            "CREATE INDEX ON peer (id) WHERE delivered_at IS NULL",
            # The source, in the order of the usage table's columns; then with what the triggers fill in.
            source_ddl(self.options.rows),
            "SET aibilling_polar.enqueue = off; "
            f"INSERT INTO usage ({GIVEN}) SELECT {GIVEN} FROM source",
            f"CREATE UNLOGGED TABLE filled AS SELECT {FILLED} FROM usage ORDER BY id",
            "VACUUM ANALYZE source", "VACUUM ANALYZE filled",
            f"COPY (SELECT {GIVEN} FROM source) TO '{self.work}/usage.copy'",
            f"COPY filled TO '{self.work}/plain.copy'",
            "TRUNCATE usage")
        if self.sql("SELECT count(*) FROM filled WHERE cost_status <> 'priced'") != "0":
            sys.exit("rows without a price among those to be measured")
        self.worker = self.server.worker()

    def use(self, sink, batch_size, max_in_flight=4):
        self.sql(f"ALTER SERVER polar OPTIONS (SET url '{sink.url}', SET batch_size '{batch_size}',"
                 f" SET max_in_flight '{max_in_flight}')")

    def pause(self, server="polar"):
        self.sql(f"SELECT aibilling.pause('{server}')")
        wait_until(lambda: self.sql("SELECT NOT EXISTS (SELECT FROM aibilling.delivery WHERE state = 'sending')") == "t",
                   "the requests in flight")

    def empty(self, *tables):
        """Paused, nothing pending, and no disk work of the last measurement left."""
        self.pause()
        for table in tables:
            self.sql(f"TRUNCATE {table}")
        self.sql("VACUUM aibilling.outbox_entry", "CHECKPOINT")

    def fill(self, table, rows=None, enqueue="on"):
        columns = GIVEN if table.startswith("usage") else FILLED
        source = "source" if columns == GIVEN else "filled"
        limit = f" LIMIT {rows}" if rows else ""
        self.sql(f"SET aibilling_polar.enqueue = {enqueue}; "
                 f"INSERT INTO {table} ({columns}) SELECT {columns} FROM {source}{limit}")

    def insert(self, table, how):
        columns = GIVEN if table.startswith("usage") else FILLED
        if how == "copy":
            kind = "usage" if columns == GIVEN else "plain"
            return self.server.timed(f"COPY {table} ({columns}) FROM '{self.work}/{kind}.copy'")
        source = "source" if columns == GIVEN else "filled"
        return self.server.timed(f"INSERT INTO {table} ({columns}) SELECT {columns} FROM {source}")

    def deliver(self, sink, rows, server="polar"):
        """Resume, wait until so many events have arrived, and pause again.  CPU is that of all events, which may be more."""
        before = sink.count()["events"]
        worker, tree = cpu_of(self.worker), cpu_of_tree(self.server.postmaster)
        started = time.monotonic()
        self.sql(f"SELECT aibilling.resume('{server}')")
        wait_until(lambda: sink.count()["events"] - before >= rows, "the events")
        seconds = time.monotonic() - started
        arrived = sink.count()["events"] - before
        self.pause(server)
        return {"seconds": seconds, "rate": arrived / seconds, "events": sink.count()["events"] - before,
                "worker_cpu": cpu_of(self.worker) - worker, "cpu": cpu_of_tree(self.server.postmaster) - tree}

    def rounds(self, measure):
        """Medians of what measure() returns, a dict of dicts of numbers."""
        taken = []
        for number in range(self.options.runs):
            taken.append(measure())
            say(f"   round {number + 1}: " + "; ".join(
                f"{name} " + ", ".join(f"{key} {value:.4g}" for key, value in numbers.items())
                for name, numbers in taken[-1].items()))
        return {name: {key: median([one[name][key] for one in taken]) for key in numbers}
                for name, numbers in taken[0].items()}

    # 1
    def costing(self):
        # Once what costs and no more, once whole usage rows, which take longer to read than to cost.
        for table, columns in (("calls", "provider, model, input_tokens, cache_read_tokens, output_tokens, reasoning_tokens"),
                               ("whole_calls", "s.*")):
            self.sql(f"""CREATE UNLOGGED TABLE {table} AS SELECT {columns} FROM source s,
                generate_series(1, ceil({self.options.costings}::numeric / {self.options.rows})::int)
                ORDER BY generation_id""", f"VACUUM ANALYZE {table}")
        ours = """SELECT sum(aibilling.cost_nanos(provider, model, input_tokens, output_tokens, cache_read_tokens,
            reasoning_tokens => reasoning_tokens)) FROM calls"""
        theirs = """SELECT sum(round(((c.input_tokens - coalesce(c.cache_read_tokens, 0)) * p.input
                + coalesce(c.cache_read_tokens, 0) * coalesce(p.cache_read, p.input)
                + (c.output_tokens - coalesce(c.reasoning_tokens, 0)) * p.output
                + coalesce(c.reasoning_tokens, 0) * coalesce(p.reasoning, p.output)) * 1000))
            FROM calls c JOIN (SELECT DISTINCT ON (provider, model) * FROM aibilling.price
                WHERE context_above = 0 AND service_tier = 'standard' AND valid_from <= now() AND daily_from IS NULL
                ORDER BY provider, model, valid_from DESC) p USING (provider, model)"""
        answers = {self.sql(query) for query in (ours, theirs)}
        if len(answers) != 1:
            sys.exit(f"the two ways of costing differ: {answers}")
        if "Gather" not in self.sql("SET max_parallel_workers_per_gather = 2; EXPLAIN " + ours):
            say("   costing is NOT parallel")

        def measure():
            taken = {}
            for case, parallel, table, asked in (("", 0, "calls", 0), (", again", 0, "calls", 1),
                                                 (", parallel", 2, "calls", 0), (", whole rows", 0, "whole_calls", 0)):
                for name, query in (("cost_nanos", ours), ("numeric", theirs)):
                    query = query.replace("FROM calls", f"FROM {table}")
                    taken[name + case] = self.server.timed(
                        query, f"SET max_parallel_workers_per_gather = {parallel}", *[query] * asked)
            return taken
        result = self.rounds(measure)
        self.sql("DROP TABLE calls, whole_calls")
        return result

    # 2 and 3
    def bulk(self):
        self.use(self.sink, 1000)

        def measure():
            taken = {}
            for how in ("insert", "copy"):
                for table in ("plain", "usage"):
                    self.empty("plain", "usage")
                    taken[f"{how} {table}"] = self.insert(table, how)
                taken[f"{how} usage, of plain"] = against(taken[f"{how} usage"], taken[f"{how} plain"])
                taken[f"deliver after {how}"] = self.deliver(self.sink, self.options.rows)
            return taken
        return self.rounds(measure)

    def raw(self):
        """The same calls, as columns and as the provider's own response."""
        self.sql("""CREATE UNLOGGED TABLE responses AS SELECT provider, model, external_customer_id, tags, jsonb_build_object(
                'id', generation_id, 'object', 'chat.completion', 'model', model, 'service_tier', 'default',
                'choices', jsonb_build_array(jsonb_build_object('index', 0, 'finish_reason', 'stop',
                    'message', jsonb_build_object('role', 'assistant', 'content', 'As you asked: ' || md5(generation_id)))),
                'usage', jsonb_build_object('prompt_tokens', input_tokens, 'completion_tokens', output_tokens,
                    'total_tokens', input_tokens + output_tokens,
                    'prompt_tokens_details', jsonb_build_object('cached_tokens', cache_read_tokens, 'audio_tokens', 0),
                    'completion_tokens_details', jsonb_build_object('reasoning_tokens', reasoning_tokens, 'audio_tokens', 0,
                        'accepted_prediction_tokens', 0, 'rejected_prediction_tokens', 0))) AS response FROM source""",
                 "VACUUM ANALYZE responses")

        def measure():
            taken = {}
            self.empty("usage")
            taken["columns"] = self.insert("usage", "insert")
            self.empty("usage")
            taken["raw_usage"] = self.server.timed(
                "INSERT INTO usage (provider, model, external_customer_id, tags, raw_usage, usage_format)"
                " SELECT *, 'openai' FROM responses")
            taken["raw_usage, of columns"] = against(taken["raw_usage"], taken["columns"])
            return taken
        result = self.rounds(measure)
        self.empty("usage")
        self.sql("DROP TABLE responses")
        return result

    def capture(self):
        """Rows of a log of one's own, captured, and the two INSERTs that do the same by hand."""
        columns = "provider, model, {}, input_tokens, cache_read_tokens, output_tokens"
        log, billed = columns.format("user_id"), columns.format("external_customer_id")
        self.sql("""CREATE TABLE calls (id bigint GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY, created_at timestamptz DEFAULT now(),
                provider text, model text, user_id text, input_tokens bigint, cache_read_tokens bigint, output_tokens bigint)""",
                 "CREATE TABLE captured (LIKE calls INCLUDING ALL)", "SELECT aibilling.capture('captured', 'usage')")

        def write(table):
            return self.server.timed(f"INSERT INTO {table} ({log}) SELECT {billed} FROM source")

        def measure():
            taken = {}
            self.empty("usage", "calls", "captured")
            first = write("calls")
            second = self.server.timed(f"INSERT INTO usage (external_id, occurred_at, {billed})"
                                       f" SELECT 'calls:' || id, created_at, {log} FROM calls")
            taken["by hand"] = {key: first[key] + second[key] for key in first}
            self.empty("usage", "calls", "captured")
            taken["captured"] = write("captured")
            if self.sql("SELECT (SELECT count(*) FROM usage) - (SELECT count(*) FROM captured)") != "0":
                sys.exit("not all rows are captured")
            taken["captured, of by hand"] = against(taken["captured"], taken["by hand"])
            return taken
        result = self.rounds(measure)
        self.empty("usage")
        self.sql("SELECT aibilling.release('captured', 'usage')", "DROP TABLE calls, captured")
        return result

    def partitioned(self):
        self.use(self.sink, 1000)
        for name in ("usage_parts", "plain_parts"):
            self.sql(f"""CREATE TABLE {name} (LIKE usage INCLUDING ALL EXCLUDING INDEXES,
                    PRIMARY KEY (id, occurred_at), UNIQUE (external_id, occurred_at)) PARTITION BY RANGE (occurred_at)""",
                     *(f"""CREATE TABLE {name}_{i + 1} PARTITION OF {name}
                       FOR VALUES FROM (date_trunc('month', now()) + interval '{i} month')
                       TO (date_trunc('month', now()) + interval '{i + 1} month')""" for i in (-1, 0, 1)))
        self.sql("SELECT aibilling.attach('usage_parts', server => 'polar')")

        def measure():
            taken = {}
            for table in ("plain", "usage", "plain_parts", "usage_parts"):
                self.empty("plain", "usage", "plain_parts", "usage_parts")
                taken[f"insert {table}"] = self.insert(table, "insert")
                if table.startswith("usage"):
                    taken[f"deliver {table}"] = self.deliver(self.sink, self.options.rows)
            taken["insert, of the plain table's ratio"] = against(
                against(taken["insert usage_parts"], taken["insert plain_parts"]),
                against(taken["insert usage"], taken["insert plain"]))
            taken["deliver, of the plain table's"] = against(taken["deliver usage_parts"], taken["deliver usage"])
            return taken
        result = self.rounds(measure)
        self.empty("plain_parts", "usage_parts")
        self.sql("DROP TABLE plain_parts, usage_parts")
        return result

    def single(self):
        self.use(self.sink, 1000)
        self.sql("CREATE TABLE queue (id bigint PRIMARY KEY)")
        cases = ("plain", "queue", "priced", "usage")
        for case in cases:
            ours = case in ("priced", "usage")
            table = "usage" if ours else "plain"
            columns = GIVEN if ours else FILLED
            costs = "" if ours else ", 3750000, 0.375, 'priced'"
            insert = (f"INSERT INTO {table} ({columns}) VALUES ('openai', 'gpt-5', 'customer_42',"
                      " 'chatcmpl-c4ca4238a0b923820dcc509a6f75849b', 1200, 400, 250, NULL,"
                      f""" '{{"org_name": "Acme 1", "feature": "chat"}}'{costs})""")
            if case == "queue":
                insert = f"WITH row AS ({insert} RETURNING id) INSERT INTO queue SELECT id FROM row"
            (self.work / f"{case}.pgbench").write_text(insert + ";\n", encoding="utf-8")
        self.empty("plain", "usage")
        self.sql("SELECT aibilling.resume('polar')")

        def tps(case):
            self.sql(f"ALTER DATABASE {DATABASE} SET aibilling_polar.enqueue = {case != 'priced'}")
            output = self.server.run("pgbench", "-n", "-c", "8", "-j", "2", "-M", "prepared",
                                     "-T", str(self.options.slice), "-f", self.work / f"{case}.pgbench")
            return float(re.search(r"tps = ([\d.]+)", output).group(1))

        def first(case):
            """Milliseconds of a new session's first INSERT."""
            insert = (self.work / f"{case}.pgbench").read_text(encoding="utf-8").rstrip(";\n")
            return median([self.server.timed(insert)["seconds"] * 1000 for _ in range(11)])

        def measure():
            """In short turns, there and back: a disk changes its pace within seconds."""
            self.sql("CHECKPOINT")
            taken = {case: [] for case in cases}
            for turn in range(self.options.turns):
                for case in cases if turn % 2 == 0 else reversed(cases):
                    taken[case].append(tps(case))
            mean = {case: statistics.mean(taken[case]) for case in cases}
            return {**{f"pgbench {case}": {"tps": mean[case], "of plain": mean[case] / mean["plain"]} for case in cases},
                    **{f"first INSERT {case}": {"ms": first(case)} for case in ("plain", "usage")}}
        result = self.rounds(measure)
        self.sql("DROP TABLE queue", f"ALTER DATABASE {DATABASE} RESET aibilling_polar.enqueue")
        return result

    # 3
    def slow_sink(self):
        slow = Sink(self.options.port + 1, 50)
        self.use(slow, 500)
        rows = min(self.options.rows, 300000)

        def measure():
            self.empty("usage")
            self.fill("usage", rows)
            return {"50 ms": self.deliver(slow, rows)}
        result = self.rounds(measure)
        self.pause()
        slow.stop()
        return result

    def peers(self):
        if shutil.which("node") is None or self.options.modules is None:
            say("   left out: needs node and npm")
            return None
        shutil.copytree(self.options.modules, self.work / "node_modules")
        shutil.copy(HERE / "peer.mjs", self.work)
        self.use(self.sink, 1000)
        rows = {"fetch": min(self.options.rows, 200000), "sdk": min(self.options.rows, 20000)}

        def measure():
            taken = {}
            self.empty("usage", "peer")
            self.fill("usage", rows["fetch"])
            ours = self.deliver(self.sink, rows["fetch"])
            taken["extension"] = {"rate": ours["rate"], "cpu": ours["cpu"] * 1e6 / rows["fetch"], "script": 0.0}
            for how, count in rows.items():
                self.empty("usage", "peer")
                self.fill("peer", count)
                self.sql("VACUUM ANALYZE peer", "CHECKPOINT")
                tree = cpu_of_tree(self.server.postmaster)
                done = subprocess.run(["node", self.work / "peer.mjs", how, self.sink.url, str(count)], text=True,
                                      env=self.server.environment, stdout=subprocess.PIPE, check=True)
                took = json.loads(done.stdout)
                server = cpu_of_tree(self.server.postmaster) - tree
                taken[how] = {"rate": count / took["seconds"], "script": took["cpu"] * 1e6 / count,
                              "cpu": (took["cpu"] + server) * 1e6 / count}
            return taken
        return self.rounds(measure)

    # 4
    def latency(self):
        self.use(self.sink, 1000)
        self.empty("usage")
        self.sql("SELECT aibilling.resume('polar')")
        self.write_one()
        return self.rounds(lambda: {"commit to arrival": self.single_rows(self.server, 1000)})

    def write_one(self, table="usage"):
        (self.work / "one.pgbench").write_text(
            f"INSERT INTO {table} (provider, model, external_customer_id, input_tokens, output_tokens)"
            " VALUES ('openai', 'gpt-5', 'customer_42', 1200, 250);\n", encoding="utf-8")

    def single_rows(self, writer, batch_size):
        """Milliseconds from a row's commit at a server to its arrival."""
        arrivals = self.work / "arrivals"
        sink = Sink(self.options.port + 2, 0, str(arrivals))
        self.use(sink, batch_size)
        log = self.work / "latency"
        writer.run("pgbench", "-n", "-c", "1", "-R", "20", "-T", str(self.options.seconds), "-M", "prepared",
                   "-l", f"--log-prefix={log}", "-f", self.work / "one.pgbench")
        (path,) = self.work.glob("latency.*")
        commits = [int(f[4]) * 1000000 + int(f[5]) for f in (line.split() for line in path.read_text().splitlines())]
        wait_until(lambda: sink.count()["events"] >= len(commits), "the events")
        arrived = [int(line) for line in arrivals.read_text().split()]
        path.unlink()
        sink.stop()
        waits = sorted((there - here) / 1000 for here, there in zip(commits, arrived))
        return {"p50": waits[len(waits) // 2], "p99": waits[int(len(waits) * 0.99)]}

    def fan_in(self):
        """Servers without the extension feed one table."""
        self.use(self.sink, 1000)
        self.write_one("usage_in")
        self.sql("SELECT aibilling.create_usage_table('usage_in', server => 'polar', replicated => true)")
        each = self.options.rows // PUBLISHERS
        publishers = []
        for number in range(PUBLISHERS):
            work = self.work / f"publisher{number}"
            work.mkdir()
            publisher = Server(self.server.bindir, work, PUBLISHER_SETTINGS)
            publishers.append(publisher)
            publisher.sql(f"CREATE DATABASE {DATABASE}", database="postgres")
            publisher.sql(source_ddl(each))
            for statement in self.sql("SELECT aibilling.usage_table_ddl('usage_in')").split(";\n"):
                publisher.sql(statement)
            self.sql(f"""CREATE SUBSCRIPTION publisher{number} CONNECTION 'host={work} dbname={DATABASE} user=postgres'
                PUBLICATION aibilling_usage_in""")

        def measure():
            for number, publisher in enumerate(publishers):
                self.sql(f"ALTER SUBSCRIPTION publisher{number} DISABLE")
                publisher.sql(f"INSERT INTO usage_in ({GIVEN}) SELECT {GIVEN} FROM source")
            self.sql("SELECT aibilling.resume('polar')")
            before, started = self.sink.count()["events"], time.monotonic()
            for number in range(PUBLISHERS):
                self.sql(f"ALTER SUBSCRIPTION publisher{number} ENABLE")
            wait_until(lambda: self.sink.count()["events"] - before >= each * PUBLISHERS, "the events")
            seconds = time.monotonic() - started
            # without what the bulk leaves to be done: the rollup, and the disks' work
            wait_until(lambda: self.sql("SELECT NOT EXISTS (SELECT FROM aibilling.share)") == "t", "the rollup", 3600)
            for server in (self.server, *publishers):
                server.sql("CHECKPOINT")
            single = self.single_rows(publishers[0], 1000)
            self.use(self.sink, 1000)
            return {"backlog": {"seconds": seconds, "rate": each * PUBLISHERS / seconds},
                    "commit there to arrival": single}
        wait_until(lambda: self.sql("SELECT bool_and(srsubstate = 'r') FROM pg_subscription_rel") == "t", "the subscriptions")
        result = self.rounds(measure)
        for number, publisher in enumerate(publishers):
            self.sql(f"DROP SUBSCRIPTION publisher{number}")
            publisher.stop()
        self.empty("usage_in")
        self.sql("DROP TABLE usage_in")
        return result

    # 5
    def growth(self):
        self.use(self.sink, 1000)
        few = 10000
        part = max(self.options.backlog // 50, few)
        if self.options.backlog < 4 * self.options.runs * part:
            sys.exit("the backlog would not last for so many rounds")

        # Another server's, so that the large backlog can wait meanwhile.
        self.sql(f"""CREATE SERVER few FOREIGN DATA WRAPPER polar OPTIONS (url '{self.sink.url}',
                event_name 'llm_usage', requests_per_minute '0', batch_size '1000', max_in_flight '4')""",
                 "CREATE USER MAPPING FOR PUBLIC SERVER few OPTIONS (access_token 'polar_oat_bench')",
                 "SELECT aibilling.create_usage_table('usage_few', server => 'few')")
        self.pause("few")

        def small():
            """As many events in backlogs of ten thousand."""
            taken = []
            for _ in range(part // few):
                self.fill("usage_few", few)
                taken.append(self.deliver(self.sink, few, "few"))
            return {"cpu": sum(one["worker_cpu"] for one in taken) * 1e6 / sum(one["events"] for one in taken),
                    "us": sum(one["seconds"] for one in taken) * 1e6 / part}

        def large():
            one = self.deliver(self.sink, part)
            return {"cpu": one["worker_cpu"] * 1e6 / one["events"], "us": 1e6 / one["rate"]}

        def status():
            query = "SELECT * FROM aibilling.status"
            return {"first ms": self.server.timed(query)["seconds"] * 1000,
                    "ms": self.server.timed(query, query)["seconds"] * 1000}

        self.empty("usage")
        for _ in range(-(-self.options.backlog // self.options.rows)):
            self.fill("usage")
        self.sql("VACUUM ANALYZE usage", "CHECKPOINT")
        memory = []

        def measure():
            taken = {"backlog": large(), "status": status(), "10,000": small()}
            taken["backlog, of 10,000"] = against(taken["backlog"], taken["10,000"])
            memory.append(status_of(self.worker, "RssAnon") / 1024)
            return taken
        result = self.rounds(measure)
        result["memory"] = {"first MB": memory[0], "last MB": memory[-1]}

        holder = subprocess.Popen([self.server.bindir / "psql", "-qXAt"], env=self.server.environment, text=True,
                                  stdin=subprocess.PIPE)
        holder.stdin.write("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT pg_current_xact_id() \\g /dev/null\n")
        holder.stdin.flush()
        wait_until(lambda: self.sql("SELECT 1 FROM pg_stat_activity WHERE state = 'idle in transaction'"),
                   "the open transaction")
        result["transaction held open"] = self.rounds(lambda: {"held": large()})["held"]
        holder.communicate("COMMIT;\n")

        self.empty("usage")
        self.sql("SET client_min_messages = error; DROP TABLE usage_few", "DROP SERVER few CASCADE")
        return result

    # 6
    def backlog(self):
        """What a row costs beside few and many that wait, each for a time of its own, in a table of one size."""
        sizes = (100, 10_000, self.options.rows)
        columns = "(provider, model, external_customer_id, input_tokens, occurred_at)"
        taken = {}

        def rows(count, model="'gpt-5'", customer="'c'", at="now()"):
            return (f"INSERT INTO backlog {columns} SELECT 'openai', {model}, {customer}, 100, {at}"
                    f" FROM generate_series(1, {count}) i")

        def fresh(where, count):
            """Rows of this round, found without a walk through those that wait."""
            return f"SELECT id FROM backlog WHERE id > {waiting} AND {where} LIMIT {count}"

        def each(verb, where, count):
            return (f"DO $$ DECLARE row record; BEGIN FOR row IN {fresh(where, count)}"
                    f" LOOP {verb} WHERE id = row.id; END LOOP; END $$")

        def measure(case, count, statement, *before):
            """Microseconds a row of a statement, its commit included, in a new session."""
            started = self.server.timed("SELECT", *before)["seconds"]
            seconds = self.server.timed(f"BEGIN; {statement}; COMMIT", *before)["seconds"]
            taken.setdefault(case, {}).setdefault(size, []).append((seconds - started) * 1e6 / count)

        self.pause()
        for size in sizes:
            self.sql("SELECT aibilling.create_usage_table('backlog', server => 'polar')",
                     "SET aibilling_polar.enqueue = off; " + rows(sizes[-1] - size),
                     rows(size, at="now() + interval '1 day' + i * interval '1 minute'"), "VACUUM ANALYZE backlog", "VACUUM ANALYZE aibilling.outbox_entry")
            waiting = self.sql("SELECT max(id) FROM backlog")
            for _ in range(self.options.runs):
                self.sql(rows(51_000, customer="NULL"), rows(1000), rows(1000, model="'gpt-5-mini'"),
                         """INSERT INTO aibilling.delivery (server, usage_table, usage_ids, events, bytes, state, attempts, started_at)
                            SELECT 'polar', 'backlog', range_agg(int8range(id, id, '[]')), 1000, 1, 'delivered', 1, now()
                            FROM backlog WHERE model = 'gpt-5-mini'""",
                         """WITH sent AS (SELECT range_agg(int8range(id, id, '[]')) AS ids FROM backlog WHERE model = 'gpt-5-mini')
                            DELETE FROM aibilling.outbox_entry e USING sent WHERE e.state = 'p' AND e.usage_table = 'backlog'::regclass
                            AND e.ids && sent.ids AND e.ids <@ sent.ids""")
                fix = "UPDATE backlog SET external_customer_id = 'c'"
                measure("UPDATE of a rejected row", 500, each(fix, "external_customer_id IS NULL", 500))
                measure("DELETE of a pending row", 500, each("DELETE FROM backlog", "model = 'gpt-5' AND external_customer_id = 'c'", 500))
                measure("DELETE of a delivered row", 500, each("DELETE FROM backlog", "model = 'gpt-5-mini'", 500))
                for count in (1_000, 49_000):
                    measure(f"UPDATE that releases {count:,} rows", count,
                            f"{fix} WHERE id IN ({fresh('external_customer_id IS NULL', count)})")
                for count in (1_000, 50_000):
                    measure(f"INSERT of {count:,} rows with reasons of their own", count, rows(count, model="'new-' || i"))
                    measure(f"INSERT of {count:,} rows with times of their own", count,
                            rows(count, at="now() + i * interval '1 minute'"))
                self.sql(f"DELETE FROM backlog WHERE id > {waiting}")
            self.sql("DROP TABLE backlog")
        result = {case: {f"{size:,} wait": median(by_size[size]) for size in sizes} for case, by_size in taken.items()}
        for case, numbers in result.items():
            say(f"   {case}: " + ", ".join(f"{key} {value:.4g} us a row" for key, value in numbers.items()))
            numbers["largest of smallest"] = numbers[f"{sizes[-1]:,} wait"] / numbers[f"{sizes[0]:,} wait"]
        return result

    def idle(self):
        """Of the worker: autovacuum, which still has the other sections' rows to see to, is off."""
        self.empty("usage")
        self.sql("ALTER SYSTEM SET autovacuum = off",
                 f"ALTER SYSTEM SET aibilling_polar.poll_interval = {self.options.poll}", "SELECT pg_reload_conf()",
                 "SELECT aibilling.resume('polar')", "CHECKPOINT")
        time.sleep(2 * self.options.poll)

        def state():
            xacts, lsn = self.sql("SELECT xact_commit + xact_rollback, pg_current_wal_insert_lsn() - '0/0'"
                                  f" FROM pg_stat_database WHERE datname = '{DATABASE}'",
                                  database="postgres").split("|")
            return {"transactions": int(xacts), "wal": int(lsn),
                    "wake-ups": status_of(self.worker, "voluntary_ctxt_switches"), "cpu": cpu_of(self.worker)}
        before = state()
        time.sleep(self.options.idle)
        after = state()
        self.sql("ALTER SYSTEM RESET autovacuum", "ALTER SYSTEM RESET aibilling_polar.poll_interval",
                 "SELECT pg_reload_conf()")
        return {"idle": {**{key: after[key] - before[key] for key in after},
                         "seconds": self.options.idle, "poll": self.options.poll}}


    def spend(self):
        """What customers cost: a year of rows of 100,000 customers, delivered and in the rollup, and 1,000 rows that wait."""
        rows = self.options.backlog
        self.pause()
        self.sql("SELECT aibilling.create_usage_table('spender', server => 'polar')",
                 f"""INSERT INTO spender (occurred_at, provider, model, external_customer_id, input_tokens, output_tokens)
                     SELECT date_trunc('month', now()) - n % 365 * interval '1 day', m.provider, m.model,
                         'customer_' || n * 7919 % 100000, n * 31 % 20000, n * 17 % 3000
                     FROM generate_series(1::bigint, {rows}) n
                     JOIN (VALUES {", ".join(f"({i}, '{p}', '{m}')" for i, (p, m) in enumerate(MODELS))}) m (i, provider, model)
                     ON m.i = n % 10""")
        delivered = self.deliver(self.sink, rows)
        started = time.monotonic()
        self.sql("SELECT aibilling.resume('polar')")
        wait_until(lambda: self.sql("SELECT NOT EXISTS (SELECT FROM aibilling.share)") == "t", "the rollup", 3600)
        folded = time.monotonic() - started
        self.pause()
        self.sql("INSERT INTO spender (provider, model, external_customer_id, input_tokens)"
                 " SELECT 'openai', 'gpt-5', 'customer_' || n * 7919 % 100000, 100 FROM generate_series(1, 1000) n",
                 "VACUUM ANALYZE aibilling.rollup", "CHECKPOINT")
        # each call by itself, of customers in no order
        calls = """CREATE TEMP TABLE taken (ms float8); DO $$ DECLARE began timestamptz; s record; BEGIN FOR n IN 1 .. 5000 LOOP
            began := clock_timestamp(); SELECT * INTO s FROM aibilling.spend('spender', 'customer_' || n * 104729 % 100000, SINCE);
            INSERT INTO taken VALUES (extract(epoch FROM clock_timestamp() - began) * 1000); END LOOP; END $$;
            SELECT percentile_cont('{0.5,0.99}'::float8[]) WITHIN GROUP (ORDER BY ms) FROM taken"""

        def measure():
            taken = {}
            for case, since in (("spend of a month", "date_trunc('month', now(), 'UTC')"), ("spend of a year", "now() - interval '1 year'")):
                p50, p99 = self.sql(calls.replace("SINCE", since)).strip("{}").split(",")
                taken[case] = {"p50": float(p50), "p99": float(p99)}
            for case, query in (("a year by model", "SELECT provider, model, sum(cost_cents) FROM aibilling.usage_by('spender', 'model',"
                                 " current_date - 365, current_date) GROUP BY 1, 2"),
                                ("a year by customer", "SELECT * FROM aibilling.usage_by('spender', 'customer', current_date - 365,"
                                 " current_date) ORDER BY cost_cents DESC LIMIT 10"),
                                ("a month, usage_daily", "SELECT count(*) FROM aibilling.usage_daily('spender', current_date - 30, current_date)"),
                                ("report of a year", "SELECT length(aibilling.report('spender', current_date - 365, current_date))")):
                taken[case] = {"ms": self.server.timed(query, query)["seconds"] * 1000}
            return taken
        result = self.rounds(measure)
        result["filling"] = {"delivery rate": delivered["rate"], "fold seconds": folded, "rows": rows}
        self.sql("DROP TABLE spender", "SELECT aibilling.resume('polar')")
        return result


SECTIONS = ["costing", "bulk", "raw", "capture", "single", "slow_sink", "peers", "latency", "fan_in", "growth", "backlog", "idle",
            "partitioned", "spend"]


# --- the report ----------------------------------------------------------------

def lines_of(results):
    """The table: what, measured, target, met."""
    def line(what, value, target="", bound=None, at_most=True, unit=" ×"):
        if bound is None:
            return f"| {what} | {value:,.2f}{unit} | | |"
        met = value <= bound if at_most else value >= bound
        return f"| {what} | {value:,.2f}{unit} | {target} | {'yes' if met else '**no**'} |"

    def number(what, value, target, met):
        return f"| {what} | {value} | {target} | {'yes' if met else '**no**'} |"

    r = {name: section["numbers"] for name, section in results.items()}
    if "costing" in r:
        c = r["costing"]
        def against_numeric(case):
            return c["numeric" + case]["seconds"] / c["cost_nanos" + case]["seconds"]
        yield line("1 cost_nanos against SQL numeric joined to the prices", against_numeric(""), "≥ 5 ×", 5, False)
        yield line("1 the same, asked again in the same session", against_numeric(", again"))
        yield line("1 the same, both parallel", against_numeric(", parallel"), "≥ 5 ×", 5, False)
        yield line("1 the same, over whole usage rows", against_numeric(", whole rows"))
        yield line("1 cost_nanos, one process against parallel ones",
                   c["cost_nanos"]["seconds"] / c["cost_nanos, parallel"]["seconds"], "> 1 ×", 1, False)
    if "bulk" in r:
        b = r["bulk"]
        for how, name in (("insert", "INSERT … SELECT"), ("copy", "COPY")):
            for key, words, bound in (("seconds", "time", 1.8), ("cpu", "CPU", 1.8), ("wal", "WAL", 1.35)):
                yield line(f"2 {name}: {words} against no triggers", b[f"{how} usage, of plain"][key],
                           f"≤ {bound} ×", bound)
    if "raw" in r:
        for key, words in (("seconds", "time"), ("cpu", "CPU")):
            yield line(f"2 INSERT … SELECT with raw_usage: {words} against the same rows with columns given",
                       r["raw"]["raw_usage, of columns"][key], "≤ 2 ×", 2)
    if "capture" in r:
        for key, words in (("seconds", "time"), ("cpu", "CPU"), ("wal", "WAL")):
            yield line(f"2 capture of a table's rows in bulk: {words} against the two INSERTs by hand",
                       r["capture"]["captured, of by hand"][key], "≤ 1.3 ×", 1.3)
    if "single" in r:
        s = r["single"]
        yield line("2 single-row commits, 8 clients: tps against no triggers",
                   s["pgbench usage"]["of plain"], "≥ 0.95 ×", 0.95, False)
        yield line("2 the same, priced but neither queued nor delivered (aibilling_polar.enqueue off)",
                   s["pgbench priced"]["of plain"])
        yield line("2 the same of a statement without triggers that writes a queue row as well, not delivered",
                   s["pgbench queue"]["of plain"])
        yield line("2 the first INSERT of a new session, time against no triggers",
                   s["first INSERT usage"]["ms"] / s["first INSERT plain"]["ms"])
    if "bulk" in r:
        rate = b["deliver after insert"]["rate"]
        yield number("3 events/s of a backlog", f"{rate:,.0f}", "≥ 150,000", rate >= 150000)
    if "slow_sink" in r:
        rate = r["slow_sink"]["50 ms"]["rate"]
        yield number("3 events/s with 50 ms latency, 4 × 500", f"{rate:,.0f}", "≥ 36,000", rate >= 36000)
    if r.get("peers"):
        p = r["peers"]
        yield line("3 throughput against script with pg and @polar-sh/sdk",
                   p["extension"]["rate"] / p["sdk"]["rate"], "≥ 50 ×", 50, False)
        yield line("3 throughput against script with fetch", p["extension"]["rate"] / p["fetch"]["rate"], "≥ 3 ×", 3, False)
        yield line("3 CPU seconds (script and server) against script with fetch",
                   p["extension"]["cpu"] / p["fetch"]["cpu"], "≤ 0.25 ×", 0.25)
        yield line("3 CPU seconds (script and server) against script with @polar-sh/sdk",
                   p["extension"]["cpu"] / p["sdk"]["cpu"])
    if "latency" in r:
        waits = r["latency"]["commit to arrival"]
        yield line("4 commit to arrival, p50", waits["p50"], "≤ 5 ms", 5, unit=" ms")
        yield line("4 commit to arrival, p99", waits["p99"], "≤ 25 ms", 25, unit=" ms")
    if "fan_in" in r:
        f = r["fan_in"]
        yield line(f"4 rows/s of {PUBLISHERS} publishers' backlogs, by subscriptions to one hub, to arrival", f["backlog"]["rate"], unit="")
        yield line("4 commit at a publisher to arrival, p50", f["commit there to arrival"]["p50"], unit=" ms")
        yield line("4 commit at a publisher to arrival, p99", f["commit there to arrival"]["p99"], unit=" ms")
    if "growth" in r:
        g = r["growth"]
        yield line("5 worker's CPU per event: large backlog against 10,000", g["backlog, of 10,000"]["cpu"],
                   "≤ 1.1 ×", 1.1)
        yield line("5 worker's CPU per event, transaction held open, against 10,000",
                   g["transaction held open"]["cpu"] / g["10,000"]["cpu"], "≤ 1.3 ×", 1.3)
        yield line("5 time per event, transaction held open, against the large backlog without",
                   g["transaction held open"]["us"] / g["backlog"]["us"], "≤ 1.3 ×", 1.3)
        yield line("5 status, asked by a session for the first time", g["status"]["first ms"], "≤ 10 ms", 10, unit=" ms")
        yield line("5 status, asked again", g["status"]["ms"], "≤ 10 ms", 10, unit=" ms")
        yield line("5 worker's own memory, last round against first",
                   g["memory"]["last MB"] / g["memory"]["first MB"], "flat", 1.05)
    for case, numbers in r.get("backlog", {}).items():
        yield line(f"5 {case}: a row beside the largest backlog against 100 waiting", numbers["largest of smallest"],
                   "≤ 1.3 ×", 1.3)
    if "idle" in r:
        i = r["idle"]["idle"]
        polls = i["seconds"] / i["poll"]
        yield line("6 idle: transactions a poll", i["transactions"] / polls, "≤ 1", 1.1, unit="")
        yield line("6 idle: wake-ups a poll", i["wake-ups"] / polls, "≤ 1", 1.1, unit="")
        yield number("6 idle: bytes of WAL", f"{i['wal']:,.0f}", "0", i["wal"] == 0)
    if "partitioned" in r:
        p = r["partitioned"]
        insert = p["insert, of the plain table's ratio"]
        yield line("7 partitioned: INSERT's time ratio against the plain table's", insert["seconds"], "≤ 1.1 ×", 1.1)
        yield line("7 partitioned: INSERT's WAL ratio against the plain table's", insert["wal"], "≤ 1.1 ×", 1.1)
        yield line("7 partitioned: delivery's time against the plain table's",
                   p["deliver, of the plain table's"]["seconds"], "≤ 1.1 ×", 1.1)
    if "spend" in r:
        s = r["spend"]
        yield line("8 spend() of a customer's month, p99", s["spend of a month"]["p99"], "≤ 1 ms", 1, unit=" ms")
        yield line("8 a year by model", s["a year by model"]["ms"], "≤ 100 ms", 100, unit=" ms")
        yield line("8 report() of a year", s["report of a year"]["ms"], "≤ 2,000 ms", 2000, unit=" ms")


def report(results):
    text = ["# Measurements", "",
            "Written by `dev/bench`, which runs all of it again. The numbers are medians; within a round all that is",
            "compared runs one after the other on the same machine. Where the machine may change its pace within a",
            "section (INSERT, COPY, single-row commits, growth, partitions), the ratios are medians of the rounds' own; single-row",
            "commits take turns of seconds within a round. No test asserts any of them.", "",
            "| what | measured | target | met |", "|---|---|---|---|", *lines_of(results), ""]
    text += ["## The numbers behind", ""]
    for name, section in results.items():
        text += [f"**{name}** — {section['when']}; {section['settings']}; {section['machine']}; load average at the start"
                 f" {section['load']}", ""]
        if section["numbers"] is None:
            text += ["not measured: needs node and npm", ""]
            continue
        text += ["| case | numbers |", "|---|---|"]
        for case, numbers in section["numbers"].items():
            text.append(f"| {case} | " + ", ".join(f"{key} {value:,.4g}" for key, value in numbers.items()) + " |")
        text.append("")
    text += ["Units: seconds and CPU seconds; `wal` in bytes; `rate` in events a second; in *peers* `cpu` is CPU seconds a",
             "million events in script and server together, `script` in the script alone; in *growth* `cpu` and `us` are",
             "microseconds an event.", "",
             "## Settings", "",
             "PostgreSQL: " + ", ".join(f"`{name} = {value}`" for name, value in SETTINGS.items()) + "; else the defaults.",
             "Delivery: `requests_per_minute '0'`, `batch_size '1000'`, `max_in_flight '4'` but where a line says otherwise, to",
             "`bench/sink.c` on the same machine, which reads each body as JSON. The peers' table is the same with a column",
             "`delivered_at` and a partial index; `bench/peer.mjs` is the script. It sends 200,000 rows with fetch and 20,000",
             "with the SDK. pg_net is not measured: it is not packaged and is not built here.",
             "Costing reads 5,000,000 rows of the columns that cost, in a new session, but where a line says otherwise. A new",
             "process maps the shared buffers as it reads them; without huge pages that can take longer than costing.", ""]
    return "\n".join(text)


def machine(postmaster):
    """With the huge pages that the server found, by its setting of them (try)."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()).group(1)
    memory = int(re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text()).group(1)) / 1048576
    huge = status_of(postmaster, "HugetlbPages") > 0
    return (f"{os.cpu_count()} × {cpu}, {memory:.0f} GB, Linux {platform.release().split('-')[0]},"
            f" {'with' if huge else 'without'} huge pages")


def main():
    parser = argparse.ArgumentParser(prog="dev/bench", description=__doc__.splitlines()[0])
    parser.add_argument("bindir", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("sections", nargs="*", help=f"which of {', '.join(SECTIONS)}; default: all")
    parser.add_argument("--runs", type=int, default=5, help="rounds of each section (%(default)s)")
    parser.add_argument("--rows", type=int, default=1000000, help="rows of a bulk INSERT (%(default)s)")
    parser.add_argument("--backlog", type=int, default=10000000, help="rows of the large backlog (%(default)s)")
    parser.add_argument("--costings", type=int, default=5000000, help="rows of the cost query (%(default)s)")
    parser.add_argument("--seconds", type=int, default=15, help="of a pgbench run that waits for arrivals (%(default)s)")
    parser.add_argument("--slice", type=int, default=5, help="seconds of a pgbench run of single-row commits (%(default)s)")
    parser.add_argument("--turns", type=int, default=6, help="such runs of each kind in a round (%(default)s)")
    parser.add_argument("--idle", type=int, default=600, help="seconds of watching an idle worker (%(default)s)")
    parser.add_argument("--poll", type=int, default=60, help="its poll_interval in seconds (%(default)s)")
    parser.add_argument("--port", type=int, default=5790, help="the sink's; the two above are used too (%(default)s)")
    parser.add_argument("--modules", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args()
    for name in options.sections:
        if name not in SECTIONS:
            parser.error(f"no section {name}: there are {', '.join(SECTIONS)}")

    Sink.program = options.work / "sink"
    subprocess.run(["cc", "-O2", "-o", Sink.program, HERE / "sink.c"], check=True)
    kept = options.results / "results.json"
    results = json.loads(kept.read_text()) if kept.exists() else {}
    server = Server(options.bindir, options.work)
    bench = Bench(server, options, options.work)
    try:
        bench.prepare()
        version = server.sql("SHOW server_version").split()[0]
        node = subprocess.run(["node", "--version"], text=True, capture_output=True, check=False).stdout.strip() \
            if shutil.which("node") else "none"
        for name in options.sections or SECTIONS:
            say(f"== {name}")
            load = f"{os.getloadavg()[0]:.1f}"
            numbers = getattr(bench, name)()
            results[name] = {
                "when": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
                "settings": f"PostgreSQL {version}, Node.js {node}, {options.runs} rounds, {options.rows:,} rows"
                            + (f", backlog {options.backlog:,}" if name in ("growth", "spend") else ""),
                "machine": machine(server.postmaster), "load": load, "numbers": numbers}
            results = {key: results[key] for key in SECTIONS if key in results}
            kept.write_text(json.dumps(results, indent=1))
            (options.results / "RESULTS.md").write_text(report(results))
    finally:
        bench.sink.stop()
        server.stop()
    say("")
    say("\n".join(lines_of(results)))


if __name__ == "__main__":
    main()
