"""LiteLLM, library or proxy: bills each call that it has served.

In the proxy's config.yaml:  litellm_settings: {callbacks: litellm_callback.billing}
In a program:                litellm.callbacks = [litellm_callback.billing]
"""

import json

import psycopg
from litellm.integrations.custom_logger import CustomLogger

INSERT = """
    INSERT INTO usage (external_id, external_customer_id, provider, model, usage_format, raw_usage, tags)
    VALUES (%s, %s, %s, %s, 'litellm', %s, %s)
    ON CONFLICT (external_id) DO NOTHING"""


class Billing(CustomLogger):
    """Called once for each call, streams included, when it has ended well."""

    def row(self, kwargs, response):
        log = kwargs["standard_logging_object"]
        reply = {"id": response.id, "model": response.model, "usage": response.usage.model_dump()}
        return (response.id, log["end_user"] or None, kwargs["custom_llm_provider"], response.model,
                json.dumps(reply), json.dumps({"key": log["metadata"].get("user_api_key_alias") or ""}))

    async def async_log_success_event(self, kwargs, response_obj, start_time, end_time):
        # The connection is that of PGHOST, PGDATABASE, PGUSER ... To keep one open, use psycopg_pool.
        async with await psycopg.AsyncConnection.connect() as db:
            await db.execute(INSERT, self.row(kwargs, response_obj))

    def log_success_event(self, kwargs, response_obj, start_time, end_time):
        with psycopg.connect() as db:
            db.execute(INSERT, self.row(kwargs, response_obj))


billing = Billing()
