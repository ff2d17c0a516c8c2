"""Calls examples/litellm_callback.py as LiteLLM does: async and not, and the same call twice."""

import asyncio
import datetime

import litellm
from litellm_callback import billing

now = datetime.datetime.now()
kwargs, response = litellm.call(1, "user_123")
asyncio.run(billing.async_log_success_event(kwargs, response, now, now))
billing.log_success_event(kwargs, response, now, now)
billing.log_success_event(*litellm.call(2, "user_123"), now, now)
