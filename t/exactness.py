#!/usr/bin/env python3
"""Random price cards and usage, with the costs that exact fractions give.

usage: exactness.py SEED CASES

Writes SQL to standard output: it fills aibilling.price and creates the table
exactness_case (arguments and expected results).  The costs are computed here
from fractions.Fraction and the documented rules alone, in another way than in
C: row by row of the price table, nothing merged, nothing scaled.
"""
import json
import random
import sys
from datetime import date
from fractions import Fraction

SEED, CASES = int(sys.argv[1]), int(sys.argv[2])
rnd = random.Random(SEED)

TOKENS = ["input", "cache_read", "cache_write", "cache_write_1h", "output", "reasoning"]
EACH = ["request", "web_search"]
TOKEN_UNITS = ["input_audio_tokens", "input_image_tokens", "cache_read_audio_tokens",
               "output_audio_tokens", "output_image_tokens", "output_video_tokens",
               "citation_tokens"]
OTHER_UNITS = ["image", "second", "pixel", "my_unit"]
PRIORITY = {"user": (0, 0, ""), "a": (1, 20, "a"), "b": (1, 10, "b"), "c": (2, 0, "c")}
BIGINT_MAX = 2**63 - 1
DAY = 86400
EPOCH = date(1970, 1, 1).toordinal()


def decimal(x):
    """A fraction whose denominator divides a power of ten, as decimal text."""
    scale = 0
    while x.denominator != 1:
        x *= 10
        scale += 1
        assert scale < 200
    digits = str(abs(x.numerator)).rjust(scale + 1, "0")
    text = digits if scale == 0 else digits[:-scale] + "." + digits[-scale:]
    return "-" + text if x < 0 else text


def half_up(x):
    return (2 * x.numerator + x.denominator) // (2 * x.denominator)


def price():
    kind = rnd.random()
    if kind < 0.05:
        return None
    if kind < 0.25:
        return Fraction(0)
    if kind < 0.35:
        return Fraction(rnd.randrange(1, 2000), 10**9)
    if kind < 0.40:
        return Fraction(rnd.randrange(10**17, 10**18), 10**9)
    if kind < 0.42:
        return Fraction(10**18 - 1, 10**9)
    if kind < 0.75:
        return Fraction(rnd.randrange(1, 60000), 1000)
    return Fraction(rnd.randrange(1, 10**12), 10**9)


def factor():
    kind = rnd.random()
    if kind < 0.7:
        return None
    if kind < 0.8:
        return Fraction(rnd.randrange(0, 100), 100)
    return Fraction(rnd.randrange(0, 10**9 + 1), 10**9)


def unit_prices():
    if rnd.random() < 0.5:
        return None
    return {k: Fraction(rnd.randrange(0, 10**7), 10**rnd.choice([0, 3, 6, 9, 12]))
            for k in rnd.sample(TOKEN_UNITS + OTHER_UNITS, rnd.randrange(0, 9))}


def make_rows(model):
    rows = []
    for tier in ["standard"] + rnd.sample(["batch", "flex", "priority"], rnd.choice([0, 0, 1])):
        for source in rnd.sample(sorted(PRIORITY), rnd.choice([1, 1, 2, 3])):
            for valid_from in set(rnd.sample([None, None, 1000 * DAY, 2000 * DAY, 3000 * DAY], rnd.choice([1, 1, 2]))):
                windows = [None]
                if rnd.random() < 0.3:
                    windows.append(rnd.sample(range(0, DAY, 1800), 2))
                if rnd.random() < 0.1:
                    windows.pop(0)
                for window in windows:
                    for above in rnd.choice([[0], [0], [0, 1000], [0, 500, 200000], [700]]):
                        rows.append(dict(
                            model=model, tier=tier, source=source, valid_from=valid_from,
                            window=window, above=above, units=unit_prices(),
                            discount=factor(), multiplier=factor(),
                            **{k: price() for k in TOKENS + EACH}))
    return rows


def contains(window, second):
    start, end = window
    if start < end:
        return start <= second < end
    return second >= start or second < end


def rows_in_force(rows, tier, at, tokens):
    """The rows to look a price up in, in order; None without a card."""
    rows = [r for r in rows if r["tier"] == tier and (r["valid_from"] is None or r["valid_from"] <= at)]
    for source in sorted({r["source"] for r in rows}, key=PRIORITY.get):
        mine = [r for r in rows if r["source"] == source]
        newest = max((r["valid_from"] is not None, r["valid_from"] or 0) for r in mine)
        card = [r for r in mine if (r["valid_from"] is not None, r["valid_from"] or 0) == newest]
        window = [r for r in card if r["window"] and contains(r["window"], at % DAY)]
        day = [r for r in card if not r["window"]]
        chain = []
        for group in (window, day):
            reached = [r for r in group if r["above"] < tokens and r["above"] > 0]
            if reached:
                chain.append(max(reached, key=lambda r: r["above"]))
            chain += [r for r in group if r["above"] == 0]
        if window or day:
            return chain
    return None


def look_up(chain, column, key=None):
    for row in chain:
        value = row[column]
        if key is not None and value is not None:
            value = value.get(key)
        if value is not None:
            return value
    return None


def cost(rows, rules, case):
    """(status, exact USD)"""
    counts = case["counts"]
    units = case["units"] or {}
    if all(v is None for v in counts.values()) and not units:
        return "incomplete", None
    n = {k: v or 0 for k, v in counts.items()}
    if counts["request"] is None:
        n["request"] = 1
    tier = case["tier"]
    tier = "standard" if tier in (None, "", "default", "auto", "on_demand") else tier
    chain, share = rows_in_force(rows, tier, case["at"], n["input"]), Fraction(1)
    if chain is None and tier in rules:
        chain, share = rows_in_force(rows, "standard", case["at"], n["input"]), rules[tier]
    if chain is None:
        return "unpriced", None

    u = {k: units.get(k, Fraction(0)) for k in TOKEN_UNITS}
    quantity = dict(n)
    quantity["input"] -= (n["cache_read"] + n["cache_write"] + n["cache_write_1h"] +
                          u["input_audio_tokens"] - u["cache_read_audio_tokens"] + u["input_image_tokens"])
    quantity["cache_read"] -= u["cache_read_audio_tokens"]
    quantity["output"] -= n["reasoning"] + sum(u["output_%s_tokens" % k] for k in ("audio", "image", "video"))
    units = dict(units)
    if "input_audio_tokens" in units:
        units["input_audio_tokens"] -= u["cache_read_audio_tokens"]

    total, used = Fraction(0), []
    for name, amount in list(quantity.items()) + list(units.items()):
        if amount == 0:
            continue
        each = look_up(chain, name) if name in quantity else look_up(chain, "units", name)
        if name == "reasoning" and each is None:
            each = look_up(chain, "output")
        if each is None:
            if name == "request":
                continue
            return "incomplete", None
        used.append(each)
        if name in TOKENS or name in TOKEN_UNITS:
            total += amount * each / 1000000 * share
        else:
            total += amount * each
    discount, multiplier = look_up(chain, "discount"), look_up(chain, "multiplier")
    total *= 1 - (discount or 0)
    total *= 1 if multiplier is None else multiplier
    return ("free" if used and not any(used) else "priced"), total


def count():
    kind = rnd.random()
    if kind < 0.1:
        return None
    if kind < 0.2:
        return 0
    if kind < 0.22:
        return BIGINT_MAX
    if kind < 0.3:
        return rnd.randrange(2**63)
    if kind < 0.4:
        return rnd.choice([1, 499, 500, 501, 700, 701, 999, 1000, 1001, 199999, 200000, 200001])
    return rnd.randrange(10**rnd.randrange(1, 8))


def make_case():
    counts = {k: count() for k in ("input", "output")}

    def part(total):
        return None if rnd.random() < 0.4 else rnd.randrange(total + 1) if rnd.random() < 0.9 else total

    rest = counts["input"] or 0
    for k in ("cache_read", "cache_write", "cache_write_1h"):
        counts[k] = part(rest)
        rest -= counts[k] or 0
    counts["reasoning"] = part(counts["output"] or 0)
    counts["request"] = rnd.choice([None, 1, 1, 1, 0, 7])
    counts["web_search"] = rnd.choice([None, 0, 0, 3, rnd.randrange(10**6)])
    units = None
    if rnd.random() < 0.3:
        units = {}
        for k in rnd.sample(OTHER_UNITS + ["citation_tokens"], rnd.randrange(0, 3)):
            units[k] = Fraction(rnd.randrange(10**6), 10**rnd.randrange(4))
        if rnd.random() < 0.5 and rest > 0:
            units["input_audio_tokens"] = Fraction(rnd.randrange(rest + 1))
            cached = min(counts["cache_read"] or 0, int(units["input_audio_tokens"]))
            if rnd.random() < 0.5:
                units["cache_read_audio_tokens"] = Fraction(rnd.randrange(cached + 1))
        spare = (counts["output"] or 0) - (counts["reasoning"] or 0)
        if rnd.random() < 0.3 and spare > 0:
            units[rnd.choice(TOKEN_UNITS[3:6])] = Fraction(rnd.randrange(spare + 1))
    if rnd.random() < 0.005:
        counts, units = {k: None for k in counts}, rnd.choice([None, {}])
    return dict(counts=counts, units=units, at=rnd.randrange(900 * DAY, 4000 * DAY),
                tier=rnd.choice([None, "", "default", "standard", "standard", "auto",
                                 "batch", "flex", "priority"]))


def literal(value):
    return "NULL" if value is None else "'%s'" % value


def json_numbers(units):
    if units is None:
        return None
    return "{" + ", ".join("%s: %s" % (json.dumps(k), decimal(v)) for k, v in units.items()) + "}"


def clock(seconds):
    return "%02d:%02d" % (seconds // 3600, seconds // 60 % 60)


def epoch(seconds):
    return "timestamptz 'epoch' + interval '%d s'" % seconds


print("BEGIN;")
rules = {"batch": Fraction(1, 2), "flex": Fraction(333333333, 10**9)}
print("INSERT INTO aibilling.service_tier_rule VALUES ('p', 'flex', 0.333333333);")
print("INSERT INTO aibilling.price_source VALUES ('a', 20), ('b', 10);")
cards = {}
for m in range(400):
    model = "m%d" % m
    cards[model] = make_rows(model)
    for r in cards[model]:
        print("INSERT INTO aibilling.price (provider, model, service_tier, source, valid_from, context_above,"
              " daily_from, daily_to, units, discount, multiplier, %s) VALUES ('p', '%s', '%s', '%s', %s, %d,"
              " %s, %s, %s, %s, %s, %s);"
              % (", ".join(TOKENS + EACH), model, r["tier"], r["source"],
                 "'-infinity'" if r["valid_from"] is None else epoch(r["valid_from"]), r["above"],
                 literal(r["window"] and clock(r["window"][0])), literal(r["window"] and clock(r["window"][1])),
                 literal(json_numbers(r["units"])),
                 *[literal(None if r[k] is None else decimal(r[k]))
                   for k in ("discount", "multiplier")],
                 ", ".join(literal(None if r[k] is None else decimal(r[k])) for k in TOKENS + EACH)))
print("""CREATE TABLE exactness_case (
    n bigint, model text, input bigint, output bigint, cache_read bigint, cache_write bigint,
    cache_write_1h bigint, reasoning bigint, request bigint, web_search bigint, units jsonb,
    tier text, at timestamptz, status text, usd numeric, nanos numeric, cents numeric);
CREATE TABLE exactness_sum (model text, usd numeric);
COPY exactness_case FROM STDIN;""")
sums = {}
for i in range(CASES):
    case = make_case()
    model = rnd.choice(sorted(cards)) if rnd.random() < 0.99 else "none"
    status, usd = cost(cards.get(model, []), rules, case)
    if usd is not None:
        sums[model] = sums.get(model, 0) + usd
    c = case["counts"]
    fields = [i, model] + [c[k] for k in ("input", "output", "cache_read", "cache_write", "cache_write_1h",
                                          "reasoning", "request", "web_search")]
    day, second = divmod(case["at"], DAY)
    at = "%s %02d:%02d:%02d+00" % (date.fromordinal(EPOCH + day).isoformat(),
                                   second // 3600, second // 60 % 60, second % 60)
    fields += [json_numbers(case["units"]), case["tier"], at, status]
    if usd is None:
        fields += [None] * 3
    else:
        fields += [decimal(usd), half_up(usd * 10**9), decimal(Fraction(half_up(usd * 10**14), 10**12))]
    print("\t".join("\\N" if f is None else str(f) for f in fields))
print("\\.")
print("COPY exactness_sum FROM STDIN;")
for model, usd in sums.items():
    print("%s\t%s" % (model, decimal(usd)))
print("\\.")
print("COMMIT;")
