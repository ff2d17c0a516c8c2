"""psycopg 3: the provider's reply as it came, once however often it is tried, and what it cost."""

import json
import sys

import psycopg

INSERT = """
    INSERT INTO usage (external_id, external_customer_id, provider, usage_format, raw_usage, tags)
    VALUES (%(key)s, %(customer)s, %(provider)s, %(format)s, %(reply)s, %(tags)s)
    ON CONFLICT (external_id) DO NOTHING
    RETURNING cost_cents, cost_status"""


def bill(db, customer, provider, usage_format, reply, key=None, tags=None):
    """Returns cost in cents (a Decimal, or None) and status; None if the key was billed before."""
    return db.execute(INSERT, {
        "key": key, "customer": customer, "provider": provider, "format": usage_format,
        "reply": json.dumps(reply), "tags": json.dumps(tags or {})}).fetchone()


if __name__ == "__main__":
    # reply.model_dump() of the packages openai and anthropic
    reply = {"id": "chatcmpl-python", "model": "gpt-5", "choices": [],
             "usage": {"prompt_tokens": 1200, "completion_tokens": 350, "total_tokens": 1550}}
    with psycopg.connect(autocommit=True) as db:
        db.add_notice_handler(lambda notice: print(notice.message_primary, file=sys.stderr))
        print("first", bill(db, "user_123", "openai", "openai", reply, key=reply["id"]))
        print("again", bill(db, "user_123", "openai", "openai", reply, key=reply["id"]))
