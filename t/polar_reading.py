"""What Polar gives back: GET /v1/events/ and GET /v1/meters/{id}/quantities, for polar_server.py.

The functions here answer as Polar does, with what surprises a reader: both bounds of time are
exclusive and compared in milliseconds, a page has at most 100 events, events of one time come in
any order, an event has no external_id but in its metadata and is missing while its parent is
unknown, an amount is a string such as "1E-12", and the count of a list counts those events twice
whose parent came by another request.
"""

import json
import random
import re
import uuid
from datetime import datetime, timedelta, timezone
from decimal import Decimal

EVENTS_PATH = "/v1/events/"
METER_PATH = re.compile(r"/v1/meters/([0-9A-Fa-f-]{36})/quantities")
MAX_LIMIT = 100
FIRST_METERED = datetime(2023, 1, 1, tzinfo=timezone.utc)
INTERVALS = ("hour", "day", "week", "month", "year")

# How long Polar may take to learn of a parent; an event that comes sooner counts twice.
SETTLES = timedelta(seconds=60)


class Refused(Exception):
    """A parameter that Polar answers with 422: (name, type, message)."""


def polar_id(entry):
    if "polar_id" not in entry:
        entry["polar_id"] = str(uuid.uuid5(uuid.NAMESPACE_URL, "%s/%d" % (entry["organization"], entry["seq"])))
    return entry["polar_id"]


def moment(entry):
    return datetime.fromisoformat(entry["timestamp"])


def milliseconds(when):
    return when.replace(microsecond=when.microsecond // 1000 * 1000)


def read_time(query, name, required=False):
    for key, value in query:
        if key == name:
            try:
                when = datetime.fromisoformat(value.replace("Z", "+00:00"))
            except ValueError:
                raise Refused(name, "datetime_from_date_parsing",
                              "Input should be a valid datetime or date") from None
            if when.tzinfo is None:
                raise Refused(name, "timezone_aware", "Input should have timezone info")
            return when
    if required:
        raise Refused(name, "missing", "Field required")
    return None


def read_int(query, name, default):
    for key, value in query:
        if key == name:
            if not value.isascii() or not value.isdigit() or int(value) < 1:
                raise Refused(name, "greater_than", "Input should be greater than 0")
            return int(value)
    return default


def values(query, name):
    return [v for k, v in query if k in (name, name + "[]")]


class Reader:
    """The events of one organization; "update" tells of new ones."""

    def __init__(self, organization):
        self.organization = organization
        self.seen = 0
        self.all = []           # (time in milliseconds, entry)
        self.known = {}
        self.children = []

    def update(self, entries):
        for entry in entries[self.seen:]:
            if entry["organization"] == self.organization:
                self.all.append((milliseconds(moment(entry)), entry))
                self.known[polar_id(entry)] = entry
                if entry["external_id"] is not None:
                    self.known[entry["external_id"]] = entry
                if entry["event"].get("parent_id") is not None:
                    self.children.append(entry)
        self.seen = len(entries)

    def parent(self, entry):
        parent = self.known.get(entry["event"].get("parent_id"))
        return None if parent is None or parent.get("removed") else parent

    def resolved(self, entry):
        """Does the line of parents end with an event that has none?"""
        seen = set()
        while entry["event"].get("parent_id") is not None:
            if entry["seq"] in seen:
                return False
            seen.add(entry["seq"])
            entry = self.parent(entry)
            if entry is None:
                return False
        return True

    def counts_twice(self, entry):
        parent = self.parent(entry)
        return parent is not None and parent["batch"] != entry["batch"] and \
            datetime.fromisoformat(entry["ingested_at"]) < datetime.fromisoformat(parent["ingested_at"]) + SETTLES

    def item(self, entry):
        event = entry["event"]
        metadata = {}
        for key, value in event.get("metadata", {}).items():
            if key == "_cost":
                value = {"amount": str(Decimal(repr(float(value["amount"])))), "currency": value["currency"]}
            metadata[key] = value
        parent = self.parent(entry)
        return {
            "id": polar_id(entry), "timestamp": entry["timestamp"].replace("+00:00", "Z"),
            "organization_id": str(uuid.uuid5(uuid.NAMESPACE_URL, entry["organization"])),
            "customer_id": entry["customer"] if entry["variant"] == "EventCreateCustomer" else None,
            "customer": entry.get("customer_object"),
            "external_customer_id": event.get("external_customer_id"),
            "member_id": event.get("member_id"), "external_member_id": event.get("external_member_id"),
            "child_count": sum(self.parent(child) is entry for child in self.children),
            "parent_id": None if parent is None else polar_id(parent),
            "label": event["name"], "name": event["name"], "source": "user", "metadata": metadata}

    def wanted(self, entry, query):
        event = entry["event"]
        if values(query, "name") and event["name"] not in values(query, "name"):
            return False
        if values(query, "external_customer_id") and \
                event.get("external_customer_id") not in values(query, "external_customer_id"):
            return False
        if values(query, "customer_id") and entry["customer"] not in values(query, "customer_id"):
            return False
        if values(query, "source") and "user" not in values(query, "source"):
            return False
        by_key = {}
        for key, value in query:
            m = re.fullmatch(r"metadata\[(.*)\]", key)
            if m:
                by_key.setdefault(m[1], set()).add(value)
        metadata = event.get("metadata", {})
        return all(key in metadata and as_text(metadata[key]) in wanted for key, wanted in by_key.items())

    def list(self, query):
        """The answer to GET /v1/events/."""
        start = read_time(query, "start_timestamp")
        end = read_time(query, "end_timestamp")
        page = read_int(query, "page", 1)
        limit = min(read_int(query, "limit", 10), MAX_LIMIT)
        sorting = (values(query, "sorting") or ["-timestamp"])[0]
        if sorting not in ("timestamp", "-timestamp"):
            raise Refused("sorting", "enum", "Input should be 'timestamp' or '-timestamp'")
        first = None if start is None else milliseconds(start)
        last = None if end is None else milliseconds(end)
        found = [(when, e) for when, e in self.all
                 if (first is None or when > first) and (last is None or when < last)
                 and not e.get("removed") and self.wanted(e, query) and self.resolved(e)]
        found.sort(key=lambda item: item[0], reverse=sorting[0] == "-")
        unsettle(found)
        found = [e for _, e in found]
        total = len(found) + sum(map(self.counts_twice, found))
        return {"items": [self.item(e) for e in found[(page - 1) * limit:page * limit]],
                "pagination": {"total_count": total, "max_page": -(-total // limit)}}

    def quantities(self, meter, query):
        """The answer to GET /v1/meters/{id}/quantities."""
        start = read_time(query, "start_timestamp", True)
        end = read_time(query, "end_timestamp", True)
        interval = (values(query, "interval") or [None])[0]
        if interval not in INTERVALS:
            raise Refused("interval", "enum", "Input should be 'year', 'month', 'week', 'day' or 'hour'")
        if start < FIRST_METERED:
            raise Refused("start_timestamp", "greater_than_equal", "Input should be greater than or equal to 2023-01-01")
        if end < start:
            raise Refused("end_timestamp", "value_error", "end_timestamp must be after start_timestamp")
        sums = {}
        bucket = truncate(start, interval)
        while bucket < end:
            sums[bucket] = 0
            bucket = following(bucket, interval)
        for when, entry in self.all:
            when = truncate(when, interval)
            if when not in sums or entry.get("removed") or not self.wanted(entry, query) or \
                    meter.get("name") not in (None, entry["event"]["name"]):
                continue
            value = entry["event"].get("metadata", {}).get(meter.get("property"))
            if meter.get("aggregation", "sum") == "count":
                sums[when] += 1
            elif isinstance(value, (int, Decimal)) and not isinstance(value, bool):
                sums[when] += value
        return {"quantities": [{"timestamp": when.isoformat().replace("+00:00", "Z"), "quantity": float(sums[when])}
                               for when in sorted(sums)],
                "total": float(sum(sums.values()))}


def unsettle(found):
    """Let some events of one time change places, as where nothing else sorts them."""
    for _ in range(len(found) // 20):
        i = random.randrange(len(found))
        j = min(len(found) - 1, i + random.randrange(200))
        if found[i][0] == found[j][0]:
            found[i], found[j] = found[j], found[i]


def as_text(value):
    return value if isinstance(value, str) else json.dumps(value, default=str)


def truncate(when, interval):
    when = when.astimezone(timezone.utc).replace(minute=0, second=0, microsecond=0)
    if interval != "hour":
        when = when.replace(hour=0)
    if interval == "week":
        when -= timedelta(days=when.weekday())
    if interval in ("month", "year"):
        when = when.replace(day=1)
    return when.replace(month=1) if interval == "year" else when


def following(bucket, interval):
    if interval in ("month", "year"):
        return truncate(bucket + timedelta(days=32 if interval == "month" else 367), interval)
    return bucket + timedelta(hours={"hour": 1, "day": 24, "week": 168}[interval])


def change(entries, given):
    """Change or remove events that are stored: {"external_ids": [...]} and "remove", or what to set."""
    changed = 0
    for entry in entries:
        if entry["external_id"] not in given["external_ids"]:
            continue
        changed += 1
        entry["removed"] = given.get("remove", entry.get("removed", False))
        for key in ("external_customer_id", "parent_id"):
            if key in given:
                entry["event"][key] = given[key]
        entry["event"].setdefault("metadata", {}).update(given.get("metadata", {}))
        if "timestamp" in given:
            entry["timestamp"] = given["timestamp"]
        if "customer" in given:
            entry["customer_object"] = given["customer"]
    return {"changed": changed}
