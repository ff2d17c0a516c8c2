#!/usr/bin/env python3
"""A stand-in for Polar's Events Ingest API, and for Narev's price API.

It answers POST /v1/events/ingest as Polar's server does: the same checks in
the same order, the same error bodies, all or nothing, and one event for each
external_id of an organization, for ever.  GET /v1/events/ and GET
/v1/meters/{id}/quantities give them back (polar_reading.py).  GET /v1/prices
answers as Narev's price API.  A test drives it through /_test/, which needs no token.

    polar_server.py [--port N] [--state FILE] [--token T] [--narev-token T]
                    [--organization NAME] [--prices FILE] [--sink] [--sandbox]
                    [--tls-cert FILE --tls-key FILE] [--any-token]
                    [--ignore-stdin]

It listens on 127.0.0.1 only.  The first line of its output is the port; with
TLS, a second line is the port where /_test/ is served without TLS.  It then
closes its output, which says that it is ready.  It ends when its input is
closed (unless --ignore-stdin is given) or at SIGTERM.

--state FILE    keep what was stored, so that a stand-in that was killed and
                started again still knows every external_id
--any-token     whatever token is sent is a good one
--sink          only parse, count and dedupe: for volume, without validation

The control API; bodies and answers are JSON:

GET  /_test/events[?since=N][&limit=N][&compact=1]
                events stored, those with seq > N; cost_amount is the decimal
                as it was sent, cost_amount_kept is the double Polar would keep
GET  /_test/requests[?since=N]
                every request to the APIs, without any token: "token" says
                valid, revoked, unknown or none
GET  /_test/summary     counts, sums of costs; requests by status, "none" if unanswered
GET  /_test/wait?[events=N][&requests=N][&arrived=N][&hung=N][&duplicates=N]
                [&status=S&count=N][&version=V][&timeout=SECONDS]
                blocks until all hold: 200, or 408 at the timeout.  "requests"
                are those already answered (or dropped), "arrived" those whose
                headers were read; "version" is of an earlier summary, and
                holds as soon as anything has happened since
GET  /_test/fault       the faults still queued
DELETE /_test/fault     forget them
POST /_test/fault       one fault or a list of faults, see below
POST /_test/release     let go of hung and delayed requests
POST /_test/reset       as just started; {"keep": ["events"]} keeps the events
POST /_test/tokens      {"token", "organization", "scopes", "status": active or
                        revoked, "kind": organization, user, anonymous, narev}
POST /_test/customers   {"missing": [uuid], "missing_members": [uuid],
                        "known": [uuid] or null}; by default all exist
POST /_test/change      {"external_ids": [...]} and "remove": true, or what to
                        set: external_customer_id, customer, parent_id,
                        timestamp (with +00:00), metadata (merged)
POST /_test/meters      {"id": uuid, "property": "cost_nanos", "name": event
                        name or null, "aggregation": sum or count}
POST /_test/rate_limit  {"limit": N or null, "window": seconds}
POST /_test/prices      rows of Narev's price list, replacing all
POST /_test/files       {"path": "/x.json", "body": text, "content_type": type}

A fault is {"kind": ..., "times": 1}.  "times" is a number or "always",
"probability" a chance, "after" a number of requests to answer well first,
"min_events" the smallest batch it concerns, "path" the only path it concerns.
The first fault of the queue that applies is the one that happens.  "store"
says whether the events are stored all the same.  Kinds:

status          "status", "headers", "body"
401 413 500 502 503 504
429             "retry_after": seconds, an HTTP date, or null for no header
422             "index": [numbers] of events to blame, or none at all
slow            "delay" ms between storing and answering
slow_read       "delay" ms to read the body
hang            no answer until released, or the client is gone; "store"
                before hanging (default false: after it)
drop_before_read    close without reading the body
drop_after_store    store, then close without an answer
truncated       store, then close in the middle of the answer
garbage         "what": html, text, empty, wrong_counts, content_type, huge
                ("bytes", default 100 MB, streamed)
redirect        "status" (307), "location"
and these, which last until reset:
poison          "external_ids", "status": 500 or 422, "index": true or false
clock_skew      "seconds" by which this server's clock is behind
"""

import argparse
import collections
import decimal
import email.utils
import http.server
import json
import math
import os
import random
import re
import select
import signal
import socket
import ssl
import sys
import threading
import time
import traceback
import urllib.parse
import zlib
from datetime import datetime, timedelta, timezone
from decimal import Decimal

import polar_reading

INGEST_PATH = "/v1/events/ingest"
PRICES_PATH = "/v1/prices"
VERSIONS = ("2026-04", "2026-10")
MAX_BODY = 10485760

# A request that is refused for its size is still read up to this much, so
# that the client sees the answer instead of a broken pipe.
MAX_DRAIN = 64 * 1024 * 1024

# What a btree page of Polar's database can take of an identifier.
MAX_INDEXED = 2704

# Sums of costs must be exact, whatever their number.
EXACT = decimal.Context(prec=400)


class ServerError(Exception):
    """The request runs into a defect of Polar's own server: 500."""


# ---------------------------------------------------------------------------
# JSON
# ---------------------------------------------------------------------------

def load_json(data):
    """Parse JSON, keeping every fraction as the decimal that was written."""
    return json.loads(data, parse_float=Decimal)


def dump_exact(value):
    """Return JSON text in which a Decimal is a number with all its digits."""
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, dict):
        return "{%s}" % ",".join(
            "%s:%s" % (json.dumps(k), dump_exact(v)) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return "[%s]" % ",".join(map(dump_exact, value))
    return json.dumps(value)


def dump_as_polar(value):
    """Return JSON bytes as Polar's framework renders them.

    There a fraction is a double.  NaN, infinity and lone surrogates cannot be
    rendered, which is how they become a status of 500.
    """
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False,
                          separators=(",", ":"), default=float).encode()
    except ValueError as e:
        raise ServerError(str(e)) from e


def has_surrogate(value):
    """Tell whether a string anywhere in a JSON value cannot be encoded."""
    if isinstance(value, str):
        return any("\ud800" <= c <= "\udfff" for c in value)
    if isinstance(value, dict):
        return any(has_surrogate(k) or has_surrogate(v)
                   for k, v in value.items())
    if isinstance(value, list):
        return any(map(has_surrogate, value))
    return False


def has_nul(value):
    """Tell whether a string or key anywhere in a JSON value has a NUL."""
    if isinstance(value, str):
        return "\0" in value
    if isinstance(value, dict):
        return any("\0" in k or has_nul(v) for k, v in value.items())
    return False


# ---------------------------------------------------------------------------
# The schema.  A check returns None, or (type, message, ctx) of the error.
# Types and messages are part of the contract: clients see them.
# ---------------------------------------------------------------------------

MISSING = ("missing", "Field required", None)
NUL = ("value_error", "Value error, This value contains invalid characters",
       {"error": {}})
FUTURE = ("value_error", "Value error, Timestamp must be in the past.",
          {"error": {}})
DATETIME_TYPE = ("datetime_type", "Input should be a valid datetime", None)
DICT_TYPE = ("dict_type", "Input should be a valid dictionary", None)
STRING_TYPE = ("string_type", "Input should be a valid string", None)
INT_TYPE = ("int_type", "Input should be a valid integer", None)
INT_PARSING = ("int_parsing", "Input should be a valid integer, "
               "unable to parse string as an integer", None)
INT_SIZE = ("int_parsing_size", "Unable to parse input string as an integer, "
            "exceeded maximum size", None)
FINITE = ("finite_number", "Input should be a finite number", None)
OBJECT_TYPE = ("model_attributes_type", "Input should be a valid dictionary "
               "or object to extract fields from", None)


def check_string(value, max_length=None):
    if not isinstance(value, str):
        return STRING_TYPE
    if max_length is not None and len(value) > max_length:
        return ("string_too_long",
                "String should have at most %d characters" % max_length,
                {"max_length": max_length})
    if "\0" in value:
        return NUL
    return None


UUID_GROUPS = (8, 4, 4, 4, 12)
UUID_HYPHENATED = re.compile(
    r"[0-9A-Fa-f]{8}-[0-9A-Fa-f]{4}-4[0-9A-Fa-f]{3}-"
    r"[89abAB][0-9A-Fa-f]{3}-[0-9A-Fa-f]{12}")


def check_uuid4(value):
    if not isinstance(value, str):
        return ("uuid_type",
                "UUID input should be a string, bytes or UUID object", None)
    if UUID_HYPHENATED.fullmatch(value):
        return None

    # The numbers in the messages are those of the library that Polar uses:
    # it counts a URN's prefix, and not a brace.
    body, offset, braces = value, 0, False
    if value.startswith("urn:uuid:"):
        body, offset = value[9:], 9
    elif len(value) > 1 and value[0] == "{" and value[-1] == "}":
        body, braces = value[1:-1], True
    problem = None
    for i, c in enumerate(body):
        if c not in "0123456789abcdefABCDEF-":
            problem = "invalid character: found `%s` at %d" % (
                c, i + offset + 1)
            break
    else:
        groups = body.split("-")
        if len(groups) == 1 and not braces and not offset:
            if len(body) != 32:
                problem = ("invalid length: expected length 32 for simple "
                           "format, found %d" % len(body))
        elif len(groups) != 5:
            problem = ("invalid group count: expected 5, found %d"
                       % len(groups))
        else:
            for i, (group, want) in enumerate(zip(groups, UUID_GROUPS)):
                if len(group) != want:
                    problem = ("invalid group length in group %d: expected "
                               "%d, found %d" % (
                                   i, want, len(group)
                                   + (offset if i == 4 else 0)))
                    break
    if problem:
        return ("uuid_parsing", "Input should be a valid UUID, " + problem,
                {"error": problem})
    digits = body.replace("-", "")
    if digits[12] != "4" or digits[16] not in "89abAB":
        return ("uuid_version", "UUID version 4 expected",
                {"expected_version": 4})
    return None


def canonical_uuid(value):
    """Return the usual form of a UUID that check_uuid4 has accepted."""
    digits = value.removeprefix("urn:uuid:").strip("{}").replace("-", "")
    digits = digits.lower()
    return "-".join((digits[:8], digits[8:12], digits[12:16],
                     digits[16:20], digits[20:]))


DATETIME = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)"
    r"(?:[Tt _](\d\d):(\d\d)(?::(\d\d)(?:[.,](\d+))?)?"
    r"(?:([Zz])|([+\-\u2212])(\d\d):?(\d\d))?)?", re.ASCII)
UNIX_TIME = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)", re.ASCII)
EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
# Above this many "seconds" a Unix time is taken for milliseconds.
UNIX_WATERSHED = 20_000_000_000


def bad_date(text):
    """Say what is wrong with a text that is no datetime, seen as a date."""
    if len(text) < 10:
        return "input is too short"
    for part, name in ((text[0:4], "year"), (text[5:7], "month"),
                       (text[8:10], "day")):
        if name != "year" and text[4 if name == "month" else 7] != "-":
            return "invalid date separator, expected `-`"
        if not (part.isascii() and part.isdigit()):
            return "invalid character in " + name
    if not 1 <= int(text[5:7]) <= 12:
        return "month value is outside expected range of 1-12"
    try:
        datetime(int(text[0:4]) or 4, int(text[5:7]), int(text[8:10]))
    except ValueError:
        return "day value is outside expected range"
    return "unexpected extra characters at the end of the input"


def unix_time(value):
    """Return the datetime that a Unix time means, or an error."""
    try:
        number = float(value)
    except OverflowError:
        return DATETIME_TYPE
    if math.isnan(number):
        problem = "NaN values not permitted"
    else:
        if abs(number) > UNIX_WATERSHED:
            number /= 1000
        try:
            return EPOCH + timedelta(seconds=number)
        except OverflowError:
            problem = ("dates after 9999 are not supported as unix timestamps"
                       if number > 0 else
                       "dates before 0000 are not supported as unix timestamps")
    return ("datetime_parsing", "Input should be a valid datetime, " + problem,
            {"error": problem})


def parse_timestamp(value):
    """Return an aware UTC datetime, or the error as check_... functions do."""
    if isinstance(value, bool) or not isinstance(value, (str, int, Decimal,
                                                         float)):
        return DATETIME_TYPE
    if not isinstance(value, str):
        return unix_time(value)
    if UNIX_TIME.fullmatch(value):
        return unix_time(value)

    m = DATETIME.fullmatch(value)
    moment = None
    if m:
        year, month, day, hour, minute, second = (
            int(g or 0) for g in m.groups()[:6])
        try:
            if year == 0 and m[4]:
                datetime(4, month, day, hour, minute, second)
                return ("datetime_parsing", "Input should be a valid datetime,"
                        " year 0 is out of range",
                        {"error": "year 0 is out of range"})
            moment = datetime(year or 4, month, day, hour, minute, second,
                              int(((m[7] or "") + "000000")[:6]))
            if m[9]:
                if int(m[10]) > 23 or int(m[11]) > 59:
                    raise ValueError
                offset = timedelta(hours=int(m[10]), minutes=int(m[11]))
                moment = moment.replace(tzinfo=timezone(
                    offset if m[9] == "+" else -offset))
            elif m[8]:
                moment = moment.replace(tzinfo=timezone.utc)
        except ValueError:
            moment = None
    if moment is None:
        problem = bad_date(value)
        return ("datetime_from_date_parsing",
                "Input should be a valid datetime or date, " + problem,
                {"error": problem})
    if moment.tzinfo is None:
        return ("timezone_aware", "Input should have timezone info", None)
    try:
        return moment.astimezone(timezone.utc)
    except OverflowError as e:
        raise ServerError(str(e)) from e


def parse_amount(value):
    """Return the Decimal of _cost.amount as Polar takes it, or an error.

    A JSON number has been a double by the time Polar makes it a decimal.
    """
    if isinstance(value, bool) or not isinstance(value, (str, int, Decimal,
                                                         float)):
        return ("decimal_type", "Decimal input should be an integer, float, "
                "string or Decimal object", None)
    try:
        if isinstance(value, (Decimal, float)):
            amount = Decimal(str(float(value)))
        else:
            amount = Decimal(value)
    except decimal.InvalidOperation:
        return ("decimal_parsing", "Input should be a valid decimal", None)
    if not amount.is_finite():
        return FINITE

    # Trailing zeros do not count, and there are at most 17 digits, 12 of them
    # after the point, hence 5 before it.
    _, digits, exponent = amount.normalize().as_tuple()
    if exponent >= 0:
        places, total = 0, len(digits) + exponent
    else:
        places = -exponent
        total = max(len(digits), places)
    if total > 17:
        return ("decimal_max_digits", "Decimal input should have no more than "
                "17 digits in total", {"max_digits": 17})
    if places > 12:
        return ("decimal_max_places", "Decimal input should have no more than "
                "12 decimal places", {"decimal_places": 12})
    if total - places > 5:
        return ("decimal_whole_digits", "Decimal input should have no more "
                "than 5 digits before the decimal point", {"whole_digits": 5})
    return amount


LAX_INT = re.compile(r"[+-]?\d+(?:_\d+)*(?:\.0+)?", re.ASCII)
LAX_FLOAT = re.compile(r"[+-]?(?:nan|inf|infinity|(?:\d+\.?\d*|\.\d+)"
                       r"(?:e[+-]?\d+)?)", re.ASCII | re.IGNORECASE)


def check_int(value):
    if isinstance(value, int):
        return None
    if isinstance(value, str):
        text = value.strip()
        if not LAX_INT.fullmatch(text):
            return INT_PARSING
        return INT_SIZE if len(text) > 4300 else None
    if isinstance(value, (Decimal, float)):
        number = float(value)
        if not math.isfinite(number):
            return FINITE
        if not number.is_integer():
            return ("int_from_float", "Input should be a valid integer, got a "
                    "number with a fractional part", None)
        return INT_SIZE if abs(number) >= 2 ** 63 else None
    return INT_TYPE


def check_object(value, loc, required, optional, nullable, errors):
    """Check _cost or _llm; fields map to their checks."""
    if not isinstance(value, dict):
        errors.append((loc, DICT_TYPE, value))
        return
    for field, check in required:
        if field not in value:
            if field not in optional:
                errors.append((loc + (field,), MISSING, value))
            continue
        item = value[field]
        if item is None and field in nullable:
            continue
        error = check(item)
        if error:
            errors.append((loc + (field,), error, item))


def check_amount(value):
    result = parse_amount(value)
    return result if isinstance(result, tuple) else None


def check_currency(value):
    if not isinstance(value, str):
        return STRING_TYPE
    if "usd" not in value:
        return ("string_pattern_mismatch", "String should match pattern 'usd'",
                {"pattern": "usd"})
    return None


def check_text(value):
    return None if isinstance(value, str) else STRING_TYPE


COST_FIELDS = (("amount", check_amount), ("currency", check_currency))
LLM_FIELDS = (("vendor", check_text), ("model", check_text),
              ("prompt", check_text), ("response", check_text),
              ("input_tokens", check_int), ("cached_input_tokens", check_int),
              ("output_tokens", check_int), ("total_tokens", check_int))
LLM_OPTIONAL = ("prompt", "response", "cached_input_tokens")
LLM_NULLABLE = ("prompt", "response")


def check_plain(loc, value, errors):
    """Check a metadata value of the user's: four types are tried in turn."""
    if isinstance(value, str):
        if 1 <= len(value) <= 500:
            return
        # A text that is too long still passes if it reads as a number.
        if value and (check_int(value) is None
                      or LAX_FLOAT.fullmatch(value.strip())):
            return
        if value:
            text = ("string_too_long",
                    "String should have at most 500 characters",
                    {"max_length": 500})
        else:
            text = ("string_too_short",
                    "String should have at least 1 character",
                    {"min_length": 1})
        suffix = ("parsing", ", unable to parse string as an integer",
                  ", unable to parse string as a number",
                  ", unable to interpret input")
    elif value is None or isinstance(value, (list, dict)):
        text = STRING_TYPE
        suffix = ("type", "", "", "")
    else:
        return
    for name, error in (
            ("constrained-str", text),
            ("int", ("int_" + suffix[0],
                     "Input should be a valid integer" + suffix[1], None)),
            ("float", ("float_" + suffix[0],
                       "Input should be a valid number" + suffix[2], None)),
            ("bool", ("bool_" + suffix[0],
                      "Input should be a valid boolean" + suffix[3], None))):
        errors.append((loc + (name,), error, value))


def check_metadata(metadata, errors):
    loc = ("metadata",)
    if not isinstance(metadata, dict):
        errors.append((loc, DICT_TYPE, metadata))
        return
    before = len(errors)
    if "_cost" in metadata:
        check_object(metadata["_cost"], loc + ("_cost",), COST_FIELDS, (), (),
                     errors)
    if "_llm" in metadata:
        check_object(metadata["_llm"], loc + ("_llm",), LLM_FIELDS,
                     LLM_OPTIONAL, LLM_NULLABLE, errors)
    for key, value in metadata.items():
        if key != "_cost" and key != "_llm":
            check_plain(loc + (key,), value, errors)
    if len(errors) == before and any(
            "\0" in key or has_nul(value)
            for key, value in kept_metadata(metadata).items()):
        errors.append((loc, NUL, metadata))


def kept_metadata(metadata):
    """Return metadata without the members that Polar drops."""
    kept = {}
    for key, value in metadata.items():
        if key == "_cost":
            value = {k: value[k] for k, _ in COST_FIELDS}
        elif key == "_llm":
            value = {k: value[k] for k, _ in LLM_FIELDS if k in value}
        kept[key] = value
    return kept


def external_is_exact(event):
    """Tell whether Polar needs no conversion to read the external variant.

    With both identities given, this decides between the variants.
    """
    if "timestamp" in event or event.get("organization_id") is not None:
        return False
    metadata = event.get("metadata", {})
    if "_cost" in metadata:
        return False
    llm = metadata.get("_llm", {})
    for field, check in LLM_FIELDS:
        if check is check_int and field in llm and type(llm[field]) is not int:
            return False
    return all(not isinstance(v, str) or len(v) <= 500
               for v in metadata.values())


def validate_event(event, now):
    """Check one event.

    Returns (variant, moment, []) if it is good, else (None, None, errors):
    (location below the event, error, input), in Polar's order, which lists
    both variants of an event whichever of them was meant.
    """
    variants = ("EventCreateCustomer", "EventCreateExternalCustomer")
    if not isinstance(event, dict):
        return None, None, [((v,), OBJECT_TYPE, event) for v in variants]

    common = []
    moment = None
    if "timestamp" in event:
        moment = parse_timestamp(event["timestamp"])
        if isinstance(moment, tuple):
            common.append((("timestamp",), moment, event["timestamp"]))
        elif moment > now:
            common.append((("timestamp",), FUTURE, event["timestamp"]))
    if "name" not in event:
        common.append((("name",), MISSING, event))
    else:
        error = check_string(event["name"], 128)
        if error:
            common.append((("name",), error, event["name"]))
    for field, check in (("organization_id", check_uuid4),
                         ("external_id", check_string),
                         ("parent_id", check_string)):
        value = event.get(field)
        if value is not None:
            error = check(value)
            if error:
                common.append(((field,), error, value))
    if "metadata" in event:
        check_metadata(event["metadata"], common)

    own = ([], [])
    for errors, identity, member, check_identity, check_member in (
            (own[0], "customer_id", "member_id", check_uuid4, check_uuid4),
            (own[1], "external_customer_id", "external_member_id",
             check_string, check_string)):
        if identity not in event:
            errors.append(((identity,), MISSING, event))
        else:
            error = check_identity(event[identity])
            if error:
                errors.append(((identity,), error, event[identity]))
        value = event.get(member)
        if value is not None:
            error = check_member(value)
            if error:
                errors.append(((member,), error, value))

    if common or (own[0] and own[1]):
        return None, None, [
            ((variant,) + loc, error, value)
            for variant, errors in zip(variants, own)
            for loc, error, value in common + errors]
    if own[0] or own[1]:
        return variants[1 if own[0] else 0], moment, []

    # Both variants fit: the one with more fields of the event, else the one
    # that took them as they are, else the first.
    customer = "member_id" in event
    external = "external_member_id" in event
    if external > customer or (external == customer
                               and external_is_exact(event)):
        return variants[1], moment, []
    return variants[0], moment, []


def error_detail(loc, error, value):
    """Return one entry of the detail of a 422."""
    detail = {"type": error[0], "loc": list(loc), "msg": error[1],
              "input": value}
    if error[2] is not None:
        detail["ctx"] = error[2]
    return detail


def would_not_index(value):
    """Tell whether an identifier is too large for an index of Polar's."""
    if not isinstance(value, str) or len(value) * 4 <= MAX_INDEXED:
        return False
    raw = value.encode()
    return len(raw) > MAX_INDEXED and len(zlib.compress(raw)) > MAX_INDEXED


# ---------------------------------------------------------------------------
# State
# ---------------------------------------------------------------------------

class State:
    """All that the stand-in knows.  The condition's lock guards all of it;
    every change bumps the version and wakes those who wait."""

    def __init__(self, options):
        self.options = options
        self.changed = threading.Condition()
        self.version = 0
        self.released = 0
        self.state_fd = None
        self.connections = 0
        self.clear(())
        if options.state:
            self.recover(options.state)

    def clear(self, keep):
        """Return to the start; "events" in keep spares what was stored."""
        if "events" not in keep:
            self.events = []
            self.external_ids = {}
            self.inserted = 0
            self.duplicates = 0
            self.cost_sum = Decimal(0)
            self.by_customer = {}
            self.by_model = {}
            self.documented_limit_violations = 0
            self.batches = 0
            self.readers = {}
            if self.state_fd is not None:
                os.ftruncate(self.state_fd, 0)
        self.requests = []
        self.statuses = collections.Counter()
        self.finished = 0
        self.hung = 0
        self.faults = []
        self.poison = []
        self.clock_skew = 0
        self.rate_limit = None
        self.rate_window = 60
        self.windows = {}
        self.missing_customers = set()
        self.missing_members = set()
        self.known_customers = None
        self.files = {}
        self.meters = {}
        self.prices = []
        if self.options.prices:
            with open(self.options.prices, encoding="utf-8") as f:
                self.set_prices(load_json(f.read()))
        self.tokens = {}
        self.set_token({"token": self.options.token})
        self.set_token({"token": self.options.narev_token, "kind": "narev"})

    def touch(self):
        """Tell those who wait that something happened; the lock is held."""
        self.version += 1
        self.changed.notify_all()

    def set_token(self, given):
        token = self.tokens.setdefault(given["token"], {
            "kind": "organization", "status": "active",
            "organization": self.options.organization,
            "scopes": ["events:write", "meters:read"]})
        for key in token:
            token[key] = given.get(key, token[key])

    def set_prices(self, rows):
        self.prices = rows["data"] if isinstance(rows, dict) else rows

    def now(self):
        return datetime.now(timezone.utc) - timedelta(seconds=self.clock_skew)

    # Events -----------------------------------------------------------------

    def recover(self, path):
        """Read the state file.  A line is a batch; one cut short by a kill
        was never answered, so it is dropped."""
        self.state_fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND,
                                0o600)
        good = 0
        with open(path, "rb") as f:
            for line in f:
                if not line.endswith(b"\n"):
                    break
                batch = json.loads(line)
                self.batches += 1
                events = load_json(batch["body"])["events"]
                for i, variant, moment in batch["events"]:
                    self.store(batch["organization"], events[i], variant,
                               moment, batch["time"])
                good += len(line)
        os.ftruncate(self.state_fd, good)

    def store(self, organization, event, variant, moment, ingested_at):
        """Add one event that is known to be new; the lock is held."""
        metadata = event.get("metadata", {})
        cost = metadata.get("_cost")
        amount = None
        if cost is not None:
            sent = cost["amount"]
            amount = Decimal(sent.strip() if isinstance(sent, str) else sent)
        customer = (event["external_customer_id"]
                    if variant == "EventCreateExternalCustomer"
                    else canonical_uuid(event["customer_id"]))
        model = metadata.get("_llm", {}).get("model", metadata.get("model_id"))
        external_id = event.get("external_id")
        if external_id is not None:
            self.external_ids[organization, external_id] = True
        self.inserted += 1
        self.count(customer, model, amount)
        if len(metadata) > 50 or any(len(key) > 40 for key in metadata):
            self.documented_limit_violations += 1
        self.events.append({
            "seq": len(self.events) + 1,
            "organization": organization,
            "batch": self.batches,
            "ingested_at": ingested_at,
            "variant": variant,
            "external_id": external_id,
            "customer": customer,
            "model": model,
            "timestamp": moment or ingested_at,
            "cost_amount": None if amount is None else format(amount, "f"),
            "cost_amount_kept": None if amount is None else float(amount),
            "event": event})

    def count(self, customer, model, amount):
        for table, key in ((self.by_customer, customer),
                           (self.by_model, model)):
            entry = table.get(key)
            if entry is None:
                entry = table[key] = [0, Decimal(0)]
            entry[0] += 1
            if amount is not None:
                entry[1] = EXACT.add(entry[1], amount)
        if amount is not None:
            self.cost_sum = EXACT.add(self.cost_sum, amount)

    def ingest(self, organization, body, good):
        """Store a batch: all of it that is new.  Returns (inserted,
        duplicates).  good is a list of (event, variant, moment)."""
        with self.changed:
            ingested_at = self.now().isoformat()
            self.batches += 1
            fresh = []
            batch = set()
            for i, (event, variant, moment) in enumerate(good):
                key = organization, event.get("external_id")
                if key[1] is not None:
                    if key in self.external_ids or key in batch:
                        continue
                    batch.add(key)
                fresh.append((i, variant,
                              moment.isoformat() if moment else None))
            if self.state_fd is not None and fresh:
                line = json.dumps({
                    "organization": organization, "time": ingested_at,
                    "body": body.decode(json.detect_encoding(body)),
                    "events": fresh}).encode() + b"\n"
                while line:
                    line = line[os.write(self.state_fd, line):]
            for i, variant, moment in fresh:
                self.store(organization, good[i][0], variant, moment,
                           ingested_at)
            self.duplicates += len(good) - len(fresh)
            self.touch()
        return len(fresh), len(good) - len(fresh)

    def sink(self, organization, events):
        """Count a batch without keeping or checking it."""
        with self.changed:
            inserted = 0
            for event in events:
                key = organization, event.get("external_id")
                if key[1] is not None:
                    if key in self.external_ids:
                        continue
                    self.external_ids[key] = True
                inserted += 1
                metadata = event.get("metadata", {})
                cost = metadata.get("_cost")
                self.count(event.get("external_customer_id")
                           or event.get("customer_id"),
                           metadata.get("model_id"),
                           Decimal(cost["amount"]) if cost else None)
            self.inserted += inserted
            self.duplicates += len(events) - inserted
            self.touch()
        return inserted, len(events) - inserted

    # Faults and limits ------------------------------------------------------

    def add_fault(self, given):
        """Queue a fault; raises ValueError if there is no such kind."""
        fault = dict(given)
        kind = fault["kind"] = str(fault.get("kind"))
        if kind == "poison":
            self.poison.append(fault)
            return
        if kind == "clock_skew":
            self.clock_skew = float(fault.get("seconds", 0))
            return
        if kind not in FAULT_KINDS:
            raise ValueError("unknown kind of fault: " + kind)
        if kind == "garbage" and fault.get("what", "html") not in GARBAGE:
            raise ValueError("unknown garbage: %s" % fault["what"])
        times = fault.get("times", "always" if "probability" in fault else 1)
        fault["times"] = math.inf if times == "always" else int(times)
        self.faults.append(fault)

    def faults_need_body(self):
        with self.changed:
            return any("min_events" in fault for fault in self.faults)

    def take_fault(self, path, count):
        """Return the fault that happens to this request, or None."""
        with self.changed:
            for fault in self.faults:
                if "path" in fault and fault["path"] != path:
                    continue
                if "min_events" in fault and (
                        count is None or count < fault["min_events"]):
                    continue
                if fault.get("after", 0) > 0:
                    fault["after"] -= 1
                    continue
                if random.random() >= float(fault.get("probability", 1)):
                    continue
                fault["times"] -= 1
                if fault["times"] <= 0:
                    self.faults.remove(fault)
                return fault
        return None

    def over_limit(self, identity):
        """Count a request of an identity in its fixed window; a request that
        is refused does not make the window longer."""
        with self.changed:
            if self.rate_limit is None:
                return False
            start, count = self.windows.get(identity, (0, 0))
            now = time.monotonic()
            if count == 0 or now - start >= self.rate_window:
                start, count = now, 0
            if count >= self.rate_limit:
                return True
            self.windows[identity] = (start, count + 1)
            return False

    # What tests ask ---------------------------------------------------------

    def summary(self):
        def table(entries):
            return {str(key): {"events": n, "cost_amount": format(s, "f")}
                    for key, (n, s) in entries.items()}
        return {
            "version": self.version,
            "stored": self.inserted,
            "inserted": self.inserted,
            "duplicates": self.duplicates,
            "arrived": len(self.requests),
            "requests": self.finished,
            "hung": self.hung,
            "connections": len({r["connection"] for r in self.requests}),
            "status": {str(k): v for k, v in self.statuses.items()},
            "cost_amount": format(self.cost_sum, "f"),
            "by_customer": table(self.by_customer),
            "by_model": table(self.by_model),
            "documented_limit_violations": self.documented_limit_violations,
        }

    def holds(self, query):
        """Tell whether what /_test/wait asked for is so; the lock is held."""
        for key, have in (("events", self.inserted),
                          ("requests", self.finished),
                          ("arrived", len(self.requests)),
                          ("hung", self.hung),
                          ("duplicates", self.duplicates)):
            if key in query and have < int(query[key]):
                return False
        if "status" in query and (self.statuses[query["status"]]
                                  < int(query.get("count", 1))):
            return False
        return "version" not in query or self.version > int(query["version"])


# ---------------------------------------------------------------------------
# Answers: (status, headers, body)
# ---------------------------------------------------------------------------

JSON_TYPE = {"Content-Type": "application/json"}
INVALID_TOKEN = "The access token provided is expired, revoked, malformed, " \
    "or invalid for other reasons."
NO_SCOPE = "The request requires higher privileges than provided by the " \
    "access token."


def answer(status, content, **headers):
    return status, JSON_TYPE | {k.replace("_", "-"): v
                                for k, v in headers.items()}, \
        dump_as_polar(content)


def not_found():
    return answer(404, {"detail": "Not Found"})


def unauthorized():
    return answer(401, {"error": "Unauthorized", "detail": "Unauthorized"},
                  WWW_Authenticate='Bearer realm="polar"')


def invalid_token():
    return answer(
        401, {"error": "invalid_token", "error_description": INVALID_TOKEN},
        WWW_Authenticate='Bearer realm="polar", error="invalid_token", '
        'error_description="%s"' % INVALID_TOKEN)


def insufficient_scope(scopes="events:write"):
    return answer(
        403, {"error": "insufficient_scope", "error_description": NO_SCOPE},
        WWW_Authenticate='Bearer realm="polar", scope="%s", '
        'error="insufficient_scope", error_description="%s"' % (scopes, NO_SCOPE))


def too_large():
    return answer(413, {
        "error": "RequestBodyTooLarge",
        "detail": "Request body exceeded the maximum allowed size of "
                  "%d bytes." % MAX_BODY})


def too_many(retry_after):
    return 429, ({} if retry_after is None
                 else {"Retry-After": str(retry_after)}), b""


def server_error():
    return 500, {"Content-Type": "text/plain; charset=utf-8"}, \
        b"Internal Server Error"


def schema_errors(details):
    return answer(422, {"error": "RequestValidationError", "detail": details})


def service_errors(details):
    return answer(422, {"error": "PolarRequestValidationError",
                        "detail": details})


def parse_error():
    return answer(400, {"detail": "There was an error parsing the body"})


def fault_answer(fault):
    """Return the answer of a fault that consists of an answer, or None."""
    kind = fault["kind"]
    if kind == "status":
        body = fault.get("body", "")
        if not isinstance(body, str):
            body = dump_exact(body)
        return int(fault["status"]), dict(fault.get("headers", {})), \
            body.encode()
    if kind == "401":
        return invalid_token()
    if kind == "413":
        return too_large()
    if kind == "422":
        if "index" not in fault:
            return schema_errors([error_detail(
                ("body",), ("value_error", "Value error", {"error": {}}), {})])
        indices = fault["index"]
        if not isinstance(indices, list):
            indices = [indices]
        return service_errors([error_detail(
            ("body", "events", i, "customer_id"),
            ("customer_id", "Customer not found.", None), None)
            for i in indices])
    if kind == "429":
        return too_many(fault.get("retry_after", 60))
    if kind == "500":
        return server_error()
    if kind in ("502", "503", "504"):
        return int(kind), {"Content-Type": "text/html"}, \
            b"<html><body><h1>%s</h1></body></html>" % kind.encode()
    if kind == "redirect":
        return int(fault.get("status", 307)), \
            {"Location": fault.get("location", "/elsewhere")}, b""
    return None


FAULT_KINDS = frozenset((
    "status", "401", "413", "422", "429", "500", "502", "503", "504",
    "slow", "slow_read", "hang", "drop_before_read", "drop_after_store",
    "truncated", "garbage", "redirect"))
GARBAGE = ("html", "text", "empty", "wrong_counts", "content_type", "huge")
# Faults that happen to a batch which is stored, unless "store" says no.
STORES = frozenset(("slow", "slow_read", "drop_after_store", "truncated"))


# ---------------------------------------------------------------------------
# The server
# ---------------------------------------------------------------------------

class ClientGone(Exception):
    """The client has closed the connection."""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    state = None
    secure = False

    def setup(self):
        if self.secure:
            self.request.do_handshake()
        super().setup()
        with self.state.changed:
            self.state.connections += 1
            self.connection_id = self.state.connections

    def log_message(self, format, *args):
        pass

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except (ConnectionError, ssl.SSLError, ClientGone):
            self.close_connection = True

    def serve(self):
        path, _, query = self.path.partition("?")
        query = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
        if path.startswith("/_test/"):
            self.control(path[7:], query)
        elif self.server.control_only:
            self.reply(not_found())
        else:
            self.api(path, query)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = serve
    do_OPTIONS = serve

    def reply(self, response, length=None):
        """Send an answer, in one piece."""
        status, headers, body = response
        lines = ["HTTP/1.1 %d %s" % (status, self.responses.get(
            status, ("Unknown",))[0])]
        lines += ["%s: %s" % item for item in headers.items()]
        lines.append("Date: " + email.utils.formatdate(usegmt=True))
        lines.append("Server: polar-stand-in")
        lines.append("Content-Length: %d" % (len(body) if length is None
                                             else length))
        if self.close_connection:
            lines.append("Connection: close")
        if self.command == "HEAD":
            body = b""
        self.wfile.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)

    def content_length(self):
        text = self.headers.get("Content-Length", "").strip()
        return int(text) if text.isascii() and text.isdigit() else None

    def read_exactly(self, size):
        data = self.rfile.read(size)
        if len(data) < size:
            raise ClientGone
        return data

    def wait_released(self, seconds=None):
        """Wait until /_test/release, or so many seconds.  Raises ClientGone
        as soon as the client hangs up."""
        state = self.state
        released = state.released
        deadline = None if seconds is None else time.monotonic() + seconds
        while state.released == released:
            left = 0.05
            if deadline is not None:
                left = min(left, deadline - time.monotonic())
                if left <= 0:
                    return
            if select.select([self.connection], [], [], left)[0]:
                # With TLS the end of the connection comes as a record, and
                # nothing else is due from a client that waits.
                if self.secure or not self.connection.recv(1, socket.MSG_PEEK):
                    raise ClientGone
                time.sleep(left)

    # Polar and Narev --------------------------------------------------------

    def api(self, path, query):
        state = self.state
        record = {
            "time": datetime.now(timezone.utc).isoformat(),
            "connection": self.connection_id,
            "method": self.command, "path": self.path,
            "events": None, "bytes": None, "status": None, "outcome": None,
            "fault": None, "inserted": None, "duplicates": None,
            "token": self.token_status(),
            "headers": {k: v for k, v in self.headers.items()
                        if k.lower() not in ("authorization", "cookie")},
        }
        with state.changed:
            state.requests.append(record)
            record["seq"] = len(state.requests)
            state.touch()
        self.record = record
        try:
            self.serve_api(path, query, record)
        except (ConnectionError, ssl.SSLError, ClientGone):
            record["outcome"] = "client_closed"
            self.close_connection = True
        finally:
            self.settle()

    def settle(self, outcome="answered", status=None):
        """Record how a request ends, if that is not done yet.  It is done
        before the answer is sent, so that whoever has the answer finds it."""
        record, self.record = self.record, None
        if record is None:
            return
        with self.state.changed:
            record["status"] = status
            record["outcome"] = record["outcome"] or outcome
            self.state.finished += 1
            self.state.statuses["none" if status is None
                                else str(status)] += 1
            self.state.touch()

    def drain_chunks(self):
        """Read a chunked body up to its end, if it is not too long and well formed."""
        drained = 0
        while drained <= MAX_DRAIN:
            try:
                size = int(self.rfile.readline(100).split(b";")[0], 16)
            except ValueError:
                return
            self.rfile.read(size + 2)
            drained += size
            if size == 0:
                return

    def serve_api(self, path, query, record):
        state = self.state
        length = self.content_length()
        chunked = "Transfer-Encoding" in self.headers
        body = None
        if length is not None and length > MAX_DRAIN:
            self.close_connection = True
            length = 0
            body = b""
        if chunked:
            # Refused unread; but what is not read may cost the client the answer.
            self.close_connection = True
            self.drain_chunks()
            body = b""
        if body is None and state.faults_need_body():
            body = self.read_exactly(length or 0)
        fault = state.take_fault(path, body and self.count_events(body))
        kind = fault and fault["kind"]
        record["fault"] = kind

        if kind == "drop_before_read":
            self.settle("dropped")
            self.close_connection = True
            # Let the client see a broken connection, not an orderly end.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                       b"\1\0\0\0\0\0\0\0")
            return
        if body is None:
            if kind == "slow_read" and length:
                body = b""
                for i in range(10):
                    size = length * (i + 1) // 10 - length * i // 10
                    body += self.read_exactly(size)
                    self.pause(fault)
            else:
                body = self.read_exactly(length or 0)
        record["bytes"] = len(body)
        record["events"] = self.count_events(body)

        if kind == "hang" and not fault.get("store"):
            self.hang()

        what = fault.get("what", "html") if kind == "garbage" else None
        store = True
        if fault:
            store = fault.get("store", kind in STORES or kind == "hang"
                              or what in ("wrong_counts", "content_type"))
            if kind == "hang":
                store = True
        response = None
        if store:
            response = self.process(path, query, body, record)

        if kind == "hang" and fault.get("store"):
            self.hang()
        elif kind == "slow":
            self.wait_released(float(fault.get("delay", 1000)) / 1000)
        elif kind == "drop_after_store":
            self.settle("dropped")
            self.close_connection = True
            return
        elif kind == "truncated":
            response = response or answer(200, {})
            self.settle("truncated", response[0])
            self.close_connection = True
            self.reply((response[0], response[1], response[2][:-2]),
                       length=len(response[2]))
            return
        elif kind == "garbage":
            self.garbage(what, fault, record)
            return
        elif fault:
            response = fault_answer(fault) or response

        response = (response[0], self.app_headers() | response[1],
                    response[2])
        self.settle(status=response[0])
        self.reply(response)

    def app_headers(self):
        headers = {"Polar-Version": self.headers.get("Polar-Version",
                                                     VERSIONS[0]),
                   "Cache-Control": "private, no-store"}
        if headers["Polar-Version"] not in VERSIONS:
            headers["Polar-Version"] = VERSIONS[0]
        if self.state.options.sandbox:
            headers["X-Polar-Sandbox"] = "1"
        return headers

    def pause(self, fault):
        """Wait for a tenth of a fault's delay: the body is read in tenths."""
        state = self.state
        released = state.released
        with state.changed:
            state.changed.wait_for(lambda: state.released != released,
                                   float(fault.get("delay", 1000)) / 10000)

    def hang(self):
        state = self.state
        with state.changed:
            state.hung += 1
            state.touch()
        try:
            self.wait_released()
        finally:
            with state.changed:
                state.hung -= 1
                state.touch()

    def garbage(self, what, fault, record):
        count = record["events"] or 0
        headers = self.app_headers() | JSON_TYPE
        self.settle(status=200)
        if what == "wrong_counts":
            self.reply((200, headers, dump_as_polar(
                {"inserted": count + 1, "duplicates": 0})))
        elif what == "content_type":
            self.reply((200, headers | {"Content-Type": "text/plain"},
                        dump_as_polar({"inserted": count, "duplicates": 0})))
        elif what == "empty":
            self.reply((200, headers, b""))
        elif what == "text":
            self.reply((200, headers, b"ok"))
        elif what == "html":
            self.reply((200, headers | {"Content-Type": "text/html"},
                        b"<!DOCTYPE html><html><body>Hello</body></html>"))
        else:
            self.close_connection = True
            left = int(fault.get("bytes", 100 * 1024 * 1024))
            block = b" " * 65536
            record["sent"] = 0
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: "
                             b"application/json\r\nConnection: close\r\n\r\n")
            while left > 0:
                self.wfile.write(block[:left])
                left -= len(block)
                record["sent"] += len(block)

    def count_events(self, body):
        """Return the number of events in a body, or None if it has none.
        The parsed body is kept: most requests need it again."""
        self.parsed = self.parse_problem = None
        try:
            self.parsed = load_json(body)
        except (ValueError, RecursionError, ArithmeticError) as e:
            self.parse_problem = e
            return None
        if isinstance(self.parsed, dict) and isinstance(
                self.parsed.get("events"), list):
            return len(self.parsed["events"])
        return None

    def token(self):
        """Return (the bearer token sent or None, what is known of it)."""
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        token = token.strip()
        if scheme.lower() != "bearer" or not token:
            return None, None
        if self.state.options.any_token and token not in self.state.tokens:
            self.state.set_token({"token": token})
        return token, self.state.tokens.get(token)

    def token_status(self):
        token, known = self.token()
        if token is None:
            return "none"
        if known is None:
            return "unknown"
        return "valid" if known["status"] == "active" else known["status"]

    def process(self, path, query, body, record):
        """Answer a request to Polar or Narev, as they would."""
        if path in self.state.files and self.command in ("GET", "HEAD"):
            content = self.state.files[path]
            return 200, {"Content-Type": content.get(
                "content_type", "application/json")}, content["body"].encode()
        if path == PRICES_PATH:
            return self.prices(query)
        try:
            return self.polar(path, body, record)
        except ServerError:
            return server_error()
        except Exception:
            traceback.print_exc()
            return server_error()

    def polar(self, path, body, record):
        # The order of the checks is Polar's.
        state = self.state
        if self.headers.get("Polar-Version", VERSIONS[0]) not in VERSIONS:
            return not_found()
        if self.command in ("POST", "PUT", "PATCH"):
            length = self.content_length()
            if length is None or "Transfer-Encoding" in self.headers:
                return answer(411, {
                    "error": "LengthRequired",
                    "detail": "A Content-Length header is required."})
            if length > MAX_BODY:
                return too_large()
        token, known = self.token()
        if state.over_limit(known["organization"] if known else token):
            return too_many(max(1, math.ceil(state.rate_window)))
        if token is not None and (known is None
                                  or known["status"] != "active"
                                  or known["kind"] == "narev"):
            return invalid_token()
        if path == INGEST_PATH + "/":
            return 307, {"Location": "%s://%s%s" % (
                "https" if self.secure else "http",
                self.headers.get("Host", "127.0.0.1"), INGEST_PATH)}, b""
        if path + "/" == polar_reading.EVENTS_PATH and self.command == "GET":
            return 307, {"Location": polar_reading.EVENTS_PATH}, b""
        meter = polar_reading.METER_PATH.fullmatch(path)
        if path == polar_reading.EVENTS_PATH or meter:
            return self.read_back(meter, known)
        if path != INGEST_PATH:
            return not_found()
        if self.command != "POST":
            return answer(405, {"detail": "Method Not Allowed"}, Allow="POST")
        return self.ingest(body, known, record)

    def read_back(self, meter, known):
        """Answer a request for events, or for what a meter has counted."""
        if self.command not in ("GET", "HEAD"):
            return answer(405, {"detail": "Method Not Allowed"}, Allow="GET")
        if known is None or known["kind"] == "anonymous":
            return unauthorized()
        scopes = ("meters:read", "meters:write") if meter else \
            ("events:read", "events:write")
        if not set(scopes) & set(known["scopes"]):
            return insufficient_scope(" ".join(scopes))
        query = urllib.parse.parse_qsl(self.path.partition("?")[2],
                                       keep_blank_values=True)
        with self.state.changed:
            reader = self.state.readers.setdefault(
                known["organization"],
                polar_reading.Reader(known["organization"]))
            reader.update(self.state.events)
            try:
                if not meter:
                    return answer(200, reader.list(query))
                if meter[1] not in self.state.meters:
                    return answer(404, {"error": "ResourceNotFound",
                                        "detail": "Not found"})
                return answer(200, reader.quantities(
                    self.state.meters[meter[1]], query))
            except polar_reading.Refused as e:
                name, kind, message = e.args
                return schema_errors([error_detail(
                    ("query", name), (kind, message, None), None)])

    def ingest(self, body, known, record):
        state = self.state
        encoding = self.headers.get("Content-Encoding", "identity")
        content_type = self.headers.get_content_type() \
            if "Content-Type" in self.headers else ""
        is_json = re.fullmatch(r"application/(?:[^/]+\+)?json", content_type)
        if encoding.strip().lower() not in ("", "identity"):
            return parse_error()
        if is_json and body:
            problem = self.parse_problem
            if isinstance(problem, json.JSONDecodeError):
                return schema_errors([{
                    "type": "json_invalid", "loc": ["body", problem.pos],
                    "msg": "JSON decode error", "input": {},
                    "ctx": {"error": problem.msg}}])
            if isinstance(problem, ArithmeticError):
                raise ServerError("a number beyond all bounds")
            if problem is not None:
                return parse_error()

        if known is None or known["kind"] == "anonymous":
            return unauthorized()
        if "events:write" not in known["scopes"]:
            return insufficient_scope()

        if not body:
            return schema_errors([error_detail(("body",), MISSING, None)])
        if not is_json:
            return schema_errors([error_detail(
                ("body",), OBJECT_TYPE, body.decode("utf-8", "replace"))])
        parsed = self.parsed
        if not isinstance(parsed, dict):
            return schema_errors([error_detail(("body",), OBJECT_TYPE,
                                               parsed)])
        if "events" not in parsed:
            return schema_errors([error_detail(("body", "events"), MISSING,
                                               parsed)])
        events = parsed["events"]
        if not isinstance(events, list):
            return schema_errors([error_detail(
                ("body", "events"),
                ("list_type", "Input should be a valid list", None), events)])

        organization = known["organization"]
        if state.options.sink:
            inserted, duplicates = state.sink(organization, events)
        else:
            if b"\\ud" in body.lower() and has_surrogate(events):
                raise ServerError("lone surrogate")
            now = state.now()
            good, details = [], []
            for i, event in enumerate(events):
                variant, moment, errors = validate_event(event, now)
                good.append((event, variant, moment))
                details += [error_detail(("body", "events", i) + loc, *rest)
                            for loc, *rest in errors]
            if details:
                return schema_errors(details)
            details = [d for d in (self.service_error(i, known, *item[:2])
                                   for i, item in enumerate(good)) if d]
            if details:
                return service_errors(details)
            for event, _, _ in good:
                self.check_storable(event)
            if state.poison:
                refused = self.poisoned(good)
                if refused:
                    return refused
            inserted, duplicates = state.ingest(organization, body, good)
        record["inserted"], record["duplicates"] = inserted, duplicates
        return answer(200, {"inserted": inserted, "duplicates": duplicates})

    def service_error(self, i, known, event, variant):
        """Return the first error that the database knows of, or None."""
        state = self.state

        def error(field, kind, message, value):
            return error_detail(("body", "events", i, field),
                                (kind, message, None), value)

        organization = event.get("organization_id")
        if known["kind"] == "user":
            if organization is None:
                return error("organization_id", "missing",
                             "organization_id is required.", None)
            if organization != known["organization"]:
                return error("organization_id", "organization_id",
                             "Organization not found.", organization)
        elif organization is not None:
            return error("organization_id", "organization_token",
                         "Setting organization_id is disallowed when using "
                         "an organization token.", organization)
        if variant != "EventCreateCustomer":
            return None
        customer = canonical_uuid(event["customer_id"])
        if customer in state.missing_customers or (
                state.known_customers is not None
                and customer not in state.known_customers):
            return error("customer_id", "customer_id", "Customer not found.",
                         event["customer_id"])
        member = event.get("member_id")
        if member is not None and (canonical_uuid(member)
                                   in state.missing_members):
            return error("member_id", "member_id", "Member not found.", member)
        return None

    def check_storable(self, event):
        """Raise ServerError for what only Polar's database refuses."""
        for field in ("external_id", "external_customer_id", "parent_id"):
            if would_not_index(event.get(field)):
                raise ServerError(field + " is too large")
        for value in event.get("metadata", {}).values():
            if isinstance(value, (Decimal, float)) and not math.isfinite(
                    float(value)):
                raise ServerError("not a number of JSON")

    def poisoned(self, good):
        """Return the answer to a batch with an event that a test has called
        poison, or None."""
        details = []
        with self.state.changed:
            poison = list(self.state.poison)
        for i, (event, variant, _) in enumerate(good):
            for fault in poison:
                if event.get("external_id") not in fault["external_ids"]:
                    continue
                if int(fault.get("status", 500)) != 422:
                    return server_error()
                loc = ("body", "events", i, variant, "metadata") \
                    if fault.get("index", True) else ("body",)
                details.append(error_detail(
                    loc, ("value_error", "Value error, poison",
                          {"error": {}}), None))
        return schema_errors(details) if details else None

    def prices(self, query):
        state = self.state
        token, known = self.token()
        if state.over_limit(token):
            return too_many(max(1, math.ceil(state.rate_window)))
        if known is None or known["status"] != "active" \
                or known["kind"] != "narev":
            return answer(401, {"error": "Unauthorized"})
        if self.command not in ("GET", "HEAD"):
            return answer(405, {"error": "Method not allowed"}, Allow="GET")
        try:
            page = int(query.get("page", 1))
            size = int(query.get("page_size", 100))
        except ValueError:
            page = size = 0
        if page < 1 or not 1 <= size <= 100:
            return answer(400, {"error": "Invalid page or page_size"})
        rows = [row for row in state.prices
                if all(key not in query or row.get(key) == query[key]
                       for key in ("provider_id", "model_id"))]
        return 200, JSON_TYPE, dump_exact({
            "data": rows[(page - 1) * size:page * size],
            "meta": {"page": page, "page_size": size, "total": len(rows),
                     "total_pages": -(-len(rows) // size)}}).encode()

    # The control API --------------------------------------------------------

    def control(self, name, query):
        method = getattr(self, "%s_%s" % (self.command.lower(), name), None)
        body = self.read_exactly(self.content_length() or 0)
        if method is None:
            self.reply(not_found())
            return
        try:
            given = load_json(body) if body else None
            status, content = method(query, given)
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            status, content = 400, {"error": "%s: %s" % (type(e).__name__, e)}
        self.reply((status, JSON_TYPE, dump_exact(content).encode()))

    def get_events(self, query, _):
        since = int(query.get("since", 0))
        limit = int(query.get("limit", sys.maxsize))
        with self.state.changed:
            events = self.state.events[since:since + limit]
        if query.get("compact"):
            events = [{k: v for k, v in event.items() if k != "event"}
                      for event in events]
        return 200, events

    def get_requests(self, query, _):
        with self.state.changed:
            return 200, [dict(r) for r in
                         self.state.requests[int(query.get("since", 0)):]]

    def get_summary(self, query, _):
        with self.state.changed:
            return 200, self.state.summary()

    def get_wait(self, query, _):
        state = self.state
        with state.changed:
            met = state.changed.wait_for(lambda: state.holds(query),
                                         float(query.get("timeout", 30)))
            return 200 if met else 408, state.summary()

    def get_fault(self, query, _):
        with self.state.changed:
            return 200, [f | {"times": "always"} if f["times"] == math.inf
                         else f for f in self.state.faults]

    def post_fault(self, query, given):
        with self.state.changed:
            for fault in given if isinstance(given, list) else [given]:
                self.state.add_fault(fault)
        return 200, {}

    def delete_fault(self, query, _):
        with self.state.changed:
            self.state.faults.clear()
            self.state.poison.clear()
            self.state.clock_skew = 0
        return 200, {}

    def post_release(self, query, _):
        with self.state.changed:
            self.state.released += 1
            self.state.touch()
        return 200, {}

    def post_reset(self, query, given):
        with self.state.changed:
            self.state.released += 1
            hung = self.state.hung
            self.state.clear((given or {}).get("keep", ()))
            self.state.hung = hung
            self.state.touch()
        return 200, {}

    def post_tokens(self, query, given):
        with self.state.changed:
            for token in given if isinstance(given, list) else [given]:
                self.state.set_token(token)
        return 200, {}

    def post_customers(self, query, given):
        with self.state.changed:
            self.state.missing_customers.update(given.get("missing", ()))
            self.state.missing_members.update(
                given.get("missing_members", ()))
            if "known" in given:
                self.state.known_customers = (
                    None if given["known"] is None else set(given["known"]))
        return 200, {}

    def post_change(self, query, given):
        with self.state.changed:
            return 200, polar_reading.change(self.state.events, given)

    def post_meters(self, query, given):
        with self.state.changed:
            self.state.meters[given["id"]] = given
        return 200, {}

    def post_rate_limit(self, query, given):
        with self.state.changed:
            self.state.rate_limit = given["limit"]
            self.state.rate_window = float(given.get("window", 60))
            self.state.windows.clear()
        return 200, {}

    def post_prices(self, query, given):
        with self.state.changed:
            self.state.set_prices(given)
        return 200, {}

    def post_files(self, query, given):
        with self.state.changed:
            self.state.files[given["path"]] = given
        return 200, {}


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    control_only = False
    tls = None

    def get_request(self):
        connection, address = super().get_request()
        if self.tls:
            # The handshake is left to the connection's own thread: here it
            # would let one client keep all others waiting.
            connection = self.tls.wrap_socket(
                connection, server_side=True, do_handshake_on_connect=False)
        return connection, address

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], (OSError, ClientGone)):
            super().handle_error(request, client_address)

    def shutdown_request(self, request):
        # Clients whose connection was reset have nothing left to shut down.
        try:
            super().shutdown_request(request)
        except OSError:
            pass


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--state")
    parser.add_argument("--token", default="polar_oat_test")
    parser.add_argument("--narev-token", default="narev_test")
    parser.add_argument("--organization", default="test")
    parser.add_argument("--prices")
    parser.add_argument("--sink", action="store_true")
    parser.add_argument("--sandbox", action="store_true")
    parser.add_argument("--tls-cert")
    parser.add_argument("--tls-key")
    parser.add_argument("--any-token", action="store_true")
    parser.add_argument("--ignore-stdin", action="store_true")
    options = parser.parse_args()

    Handler.state = State(options)
    server = Server(("127.0.0.1", options.port), Handler)
    print(server.server_port)
    if options.tls_cert:
        server.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.tls.load_cert_chain(options.tls_cert, options.tls_key)
        server.RequestHandlerClass = type("SecureHandler", (Handler,),
                                          {"secure": True})
        control = Server(("127.0.0.1", 0), Handler)
        control.control_only = True
        threading.Thread(target=control.serve_forever, daemon=True).start()
        print(control.server_port)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))

    def watch_stdin():
        while os.read(0, 4096):
            pass
        os._exit(0)

    if not options.ignore_stdin:
        threading.Thread(target=watch_stdin, daemon=True).start()

    # The pipe has to close, but descriptor 1 must not be given to a socket.
    sys.stdout.flush()
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
    server.serve_forever()


if __name__ == "__main__":
    main()
