"""A stand-in for the Python package litellm, which cannot be had from Debian: it calls a callback as LiteLLM documents it."""

import types

callbacks = []


class Dumps(types.SimpleNamespace):
    def model_dump(self):
        return {k: v.model_dump() if isinstance(v, Dumps) else v for k, v in vars(self).items()}


def call(number, end_user):
    """What a callback gets for one call: kwargs, and the reply."""
    usage = Dumps(prompt_tokens=1200, completion_tokens=350, total_tokens=1550,
                  prompt_tokens_details=Dumps(cached_tokens=1000, text_tokens=None, audio_tokens=None, image_tokens=None),
                  completion_tokens_details=Dumps(reasoning_tokens=200, text_tokens=None, audio_tokens=None))
    response = Dumps(id=f"chatcmpl-litellm-{number}", model="gpt-5", object="chat.completion", created=1767170804, usage=usage)
    kwargs = {"model": "gpt-5", "custom_llm_provider": "openai", "response_cost": 0.003875,
              "standard_logging_object": {"id": response.id, "end_user": end_user, "response_cost": 0.003875,
                                          "metadata": {"user_api_key_alias": "team a"}}}
    return kwargs, response
