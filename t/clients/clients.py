"""What each client of Python's does to a usage table, in its own words:  clients.py CLIENT STEP

Steps: create (a table by the ORM's own DDL), write, again (the same upsert, once the row is delivered).
Prints a JSON object of what it read back; t/072_clients.pl says what it must be.
"""

import asyncio
import json
import os
import sys
from datetime import datetime, timezone

client, step = sys.argv[1:]
table = f"by_{client}"
host, port = os.environ["PGHOST"], int(os.environ["PGPORT"])
database, user = os.environ["PGDATABASE"], os.environ["PGUSER"]

big = 2**53 + 1
call = {
    "external_id": f"{client}_1", "occurred_at": datetime(2026, 1, 2, 3, 4, 5, 678000, timezone.utc), "provider": "openai",
    "model": "gpt-5", "external_customer_id": "customer", "input_tokens": 1200, "output_tokens": 350, "provider_cost": None,
    "tags": {"team": "a", "n": 1.5},
}
bare = {
    "external_id": None, "occurred_at": None, "service_tier": None, "tags": None, "request_count": None, "event_name": "",
    "provider": "openai", "model": "gpt-5", "external_customer_id": f"{client}_nulls", "input_tokens": 1000,
}
large = {
    "external_id": f"{client}_big", "provider": "tiny", "model": "tiny", "external_customer_id": "customer", "input_tokens": big,
}
columns = ("external_id", "service_tier", "tags", "input_tokens", "cost_nanos", "cost_cents", "cost_status")


def show(row):
    external_id, tier, tags, tokens, nanos, cents, status = (row[c] for c in columns)
    return {"external_id": external_id, "tier": tier, "tags": json.loads(tags) if isinstance(tags, str) else tags,
            "input": str(tokens), "nanos": str(nanos), "cents": str(cents), "status": status}


def insert_sql(row, place, more=""):
    return (f"INSERT INTO {table} ({', '.join(row)}) VALUES ({', '.join(place(i, c) for i, c in enumerate(row, 1))})"
            f" {more} RETURNING {', '.join(columns)}")


def conflict(row):
    return "ON CONFLICT (external_id) DO UPDATE SET " + ", ".join(f"{c} = excluded.{c}" for c in row)


def by_dbapi(db, wrap, warnings):
    def run(sql, row):
        with db.cursor() as cursor:
            cursor.execute(sql, {c: wrap(v) for c, v in row.items()})
            return dict(zip(columns, cursor.fetchone()))

    def place(i, column):
        return f"%({column})s"

    result = {}
    if step == "write":
        result["insert"] = show(run(insert_sql(call, place), call))
        result["nulls"] = show(run(insert_sql(bare, place), bare))
        nobody = dict(bare, external_customer_id=None)
        run(insert_sql(nobody, place), nobody)
        run(insert_sql(large, place), large)
    result["upsert"] = show(run(insert_sql(call, place, conflict(call)), call))
    result["read"] = show(run(f"SELECT {', '.join(columns)} FROM {table} WHERE external_id = %(external_id)s", large))
    db.commit()
    result["warnings"] = warnings()
    db.close()
    return result


def psycopg2():
    import psycopg2
    from psycopg2.extras import Json

    db = psycopg2.connect(host=host, port=port, dbname=database, user=user)
    return by_dbapi(db, lambda v: Json(v) if isinstance(v, dict) else v, lambda: db.notices)


def psycopg():
    import psycopg
    from psycopg.types.json import Jsonb

    notices = []
    db = psycopg.connect(host=host, port=port, dbname=database, user=user)
    db.add_notice_handler(lambda d: notices.append(d.message_primary))
    return by_dbapi(db, lambda v: Jsonb(v) if isinstance(v, dict) else v, lambda: notices)


def asyncpg():
    import asyncpg

    async def main():
        db = await asyncpg.connect(host=host, port=port, database=database, user=user)
        await db.set_type_codec("jsonb", schema="pg_catalog", encoder=json.dumps, decoder=json.loads)

        async def insert(row, more=""):
            return await db.fetchrow(insert_sql(row, lambda i, c: f"${i}", more), *row.values())

        result = {}
        if step == "write":
            result["insert"] = show(await insert(call))
            result["nulls"] = show(await insert(bare))
            await insert(large)
        result["upsert"] = show(await insert(call, conflict(call)))
        result["read"] = show(await db.fetchrow(f"SELECT * FROM {table} WHERE external_id = $1", large["external_id"]))
        await db.close()
        return result

    return asyncio.run(main())


def sqlalchemy():
    import sqlalchemy as sa
    from sqlalchemy.dialects.postgresql import JSONB, UUID, insert
    from sqlalchemy.orm import Session, declarative_base

    Base = declarative_base()

    class Usage(Base):
        __tablename__ = table
        id = sa.Column(sa.Integer, primary_key=True)
        external_id = sa.Column(sa.String(255), unique=True, server_default=sa.text("gen_random_uuid()"))
        occurred_at = sa.Column(sa.DateTime(timezone=True), server_default=sa.func.now())
        event_name = sa.Column(sa.String(128))
        provider = sa.Column(sa.String(40))
        sub_provider = sa.Column(sa.String)
        model = sa.Column(sa.String)
        service_tier = sa.Column(sa.String(20), nullable=False, server_default="standard")
        generation_id = sa.Column(sa.String)
        customer_id = sa.Column(UUID)
        external_customer_id = sa.Column(sa.String(255))
        member_id = sa.Column(UUID)
        external_member_id = sa.Column(sa.String)
        parent_id = sa.Column(sa.String)
        input_tokens = sa.Column(sa.BigInteger)
        cache_read_tokens = sa.Column(sa.Integer)
        cache_write_tokens = sa.Column(sa.Integer)
        cache_write_1h_tokens = sa.Column(sa.Integer)
        output_tokens = sa.Column(sa.Integer)
        reasoning_tokens = sa.Column(sa.Integer)
        request_count = sa.Column(sa.SmallInteger, nullable=False, server_default="1")
        web_search_count = sa.Column(sa.SmallInteger)
        units = sa.Column(JSONB)
        raw_usage = sa.Column(JSONB)
        usage_format = sa.Column(sa.String(20))
        provider_cost = sa.Column(sa.Numeric(18, 12))
        tags = sa.Column(JSONB, nullable=False, server_default="{}")
        cost_nanos = sa.Column(sa.BigInteger)
        cost_cents = sa.Column(sa.Numeric)
        cost_status = sa.Column(sa.String(20))

    engine = sa.create_engine(f"postgresql+psycopg2://{user}@/{database}?host={host}&port={port}")
    result = {}
    if step == "create":
        Base.metadata.create_all(engine)
        return result
    with Session(engine) as session:
        def read(external_id):
            row = session.execute(sa.select(Usage).where(Usage.external_id == external_id)).scalar_one()
            return show({c: getattr(row, c) for c in columns})

        if step == "write":
            # units and raw_usage given as None are the JSON null, as tags are
            row = Usage(**call, units=None, raw_usage=None)
            session.add(row)
            session.commit()
            result["insert"] = show({c: getattr(row, c) for c in columns})
            row = Usage(**bare)
            session.add(row)
            session.commit()
            result["nulls"] = show({c: getattr(row, c) for c in columns})
            session.execute(sa.insert(Usage).values(**dict(bare, external_customer_id="explicit")))
            session.add(Usage(**large))
            session.commit()
        session.execute(insert(Usage).values(**call).on_conflict_do_update(index_elements=["external_id"], set_=call))
        session.commit()
        result["upsert"] = read(call["external_id"])
        result["read"] = read(large["external_id"])
    return result


def django():
    import django
    from django.conf import settings

    settings.configure(
        USE_TZ=True, INSTALLED_APPS=[], DEFAULT_AUTO_FIELD="django.db.models.AutoField",
        DATABASES={"default": {"ENGINE": "django.db.backends.postgresql", "NAME": database, "USER": user, "HOST": host, "PORT": port}})
    django.setup()
    from django.db import connection, models

    class Usage(models.Model):
        external_id = models.CharField(max_length=255, unique=True, null=True)
        occurred_at = models.DateTimeField(null=True)
        event_name = models.CharField(max_length=128, blank=True)
        provider = models.CharField(max_length=40, blank=True)
        sub_provider = models.CharField(max_length=40, blank=True)
        model = models.CharField(max_length=255, blank=True)
        service_tier = models.CharField(max_length=20, blank=True, null=True)
        generation_id = models.CharField(max_length=255, blank=True)
        customer_id = models.UUIDField(null=True)
        external_customer_id = models.CharField(max_length=255, null=True)
        member_id = models.UUIDField(null=True)
        external_member_id = models.CharField(max_length=255, blank=True)
        parent_id = models.CharField(max_length=255, blank=True)
        input_tokens = models.BigIntegerField(null=True)
        cache_read_tokens = models.PositiveIntegerField(null=True)
        cache_write_tokens = models.PositiveIntegerField(null=True)
        cache_write_1h_tokens = models.PositiveIntegerField(null=True)
        output_tokens = models.PositiveIntegerField(null=True)
        reasoning_tokens = models.PositiveIntegerField(null=True)
        request_count = models.PositiveSmallIntegerField(null=True)
        web_search_count = models.PositiveSmallIntegerField(null=True)
        units = models.JSONField(null=True)
        raw_usage = models.JSONField(null=True)
        usage_format = models.CharField(max_length=20, blank=True)
        provider_cost = models.DecimalField(max_digits=18, decimal_places=12, null=True)
        tags = models.JSONField(null=True)
        cost_nanos = models.BigIntegerField(null=True, editable=False)
        cost_cents = models.DecimalField(max_digits=26, decimal_places=12, null=True, editable=False)
        cost_status = models.CharField(max_length=20, null=True, editable=False)

        class Meta:
            app_label = "billing"
            db_table = table

    def shown(row):
        row.refresh_from_db()
        return show({c: getattr(row, c) for c in columns})

    result = {}
    if step == "create":
        with connection.schema_editor() as editor:
            editor.create_model(Usage)
        # Django keeps defaults to itself: give the database those that it is to know.
        with connection.cursor() as cursor:
            cursor.execute(f"ALTER TABLE {table} ALTER external_id SET DEFAULT gen_random_uuid(), ALTER occurred_at SET DEFAULT now(),"
                           " ALTER service_tier SET DEFAULT 'standard', ALTER tags SET DEFAULT '{}'")
        return result
    if step == "write":
        row = Usage.objects.create(**call)
        result["insert"] = shown(row)
        # A form, or the admin, saves all columns again.
        row.save()
        # What was not read again has no cost here, and says so to the database.
        row = Usage(**bare)
        row.save()
        row.web_search_count = 0
        row.save()
        result["nulls"] = shown(row)
        Usage.objects.bulk_create([Usage(**large), Usage(**dict(bare, external_customer_id="bulk"))])
    row, created = Usage.objects.update_or_create(external_id=call["external_id"], defaults=call)
    assert not created
    result["upsert"] = shown(row)
    result["read"] = shown(Usage.objects.get(external_id=large["external_id"]))
    return result


print(json.dumps(globals()[client]()))
