#!/usr/bin/env python3
"""Answers as OpenAI, Anthropic, Google and OpenRouter give them, for the SDKs that examples/ use.

Prints its port and serves until its input is closed.  Every answer has an id of its own.
"""

import http.server
import itertools
import json
import os
import sys
import threading

numbers = itertools.count(1)

CHAT = {"prompt_tokens": 1200, "completion_tokens": 350, "total_tokens": 1550,
        "prompt_tokens_details": {"cached_tokens": 1000, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 200, "audio_tokens": 0,
                                      "accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0}}
RESPONSE = {"input_tokens": 1200, "input_tokens_details": {"cached_tokens": 1000},
            "output_tokens": 350, "output_tokens_details": {"reasoning_tokens": 200}, "total_tokens": 1550}
MESSAGE = {"input_tokens": 20, "cache_creation_input_tokens": 1000, "cache_read_input_tokens": 5000,
           "cache_creation": {"ephemeral_5m_input_tokens": 1000, "ephemeral_1h_input_tokens": 0},
           "output_tokens": 100, "service_tier": "standard"}
GEMINI = {"promptTokenCount": 1000, "candidatesTokenCount": 40, "thoughtsTokenCount": 60, "totalTokenCount": 1100,
          "promptTokensDetails": [{"modality": "TEXT", "tokenCount": 1000}]}


def chat(request, number):
    reply = {"id": f"chatcmpl-{number}", "object": "chat.completion", "created": 1767170804, "model": "gpt-5-2025-08-07",
             "choices": [{"index": 0, "message": {"role": "assistant", "content": "Light.", "refusal": None},
                          "logprobs": None, "finish_reason": "stop"}],
             "usage": CHAT, "service_tier": "default", "system_fingerprint": None}
    if not request.get("stream"):
        return reply
    chunk = {**reply, "object": "chat.completion.chunk", "usage": None}
    text = {**chunk, "choices": [{"index": 0, "delta": {"role": "assistant", "content": "Light."}, "finish_reason": None}]}
    end = {**chunk, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    usage = {**chunk, "choices": [], "usage": CHAT}
    return [text, end] + ([usage] if (request.get("stream_options") or {}).get("include_usage") else []) + ["[DONE]"]


def openrouter(request, number):
    return {**chat({}, number), "id": f"gen-{number}", "model": request["model"], "provider": "DeepInfra", "service_tier": None,
            "usage": {"prompt_tokens": 2600, "completion_tokens": 500, "total_tokens": 3100, "cost": 0.00181,
                      "cost_details": {"upstream_inference_cost": None}}}


def response(request, number):
    item = {"type": "message", "id": f"msg_{number}", "status": "completed", "role": "assistant",
            "content": [{"type": "output_text", "text": "Light.", "annotations": []}]}
    whole = {"id": f"resp_{number}", "object": "response", "created_at": 1767170804, "status": "completed", "error": None,
             "incomplete_details": None, "instructions": None, "max_output_tokens": None, "model": "gpt-5-2025-08-07",
             "output": [item], "parallel_tool_calls": True, "previous_response_id": None, "temperature": 1.0, "top_p": 1.0,
             "tool_choice": "auto", "tools": [], "service_tier": "default", "store": True, "truncation": "disabled",
             "reasoning": {"effort": "medium", "summary": None}, "text": {"format": {"type": "text"}}, "metadata": {},
             "usage": RESPONSE}
    if not request.get("stream"):
        return whole
    begun = {**whole, "status": "in_progress", "output": [], "usage": None}
    part = {"item_id": item["id"], "output_index": 0, "content_index": 0}
    events = [
        {"type": "response.created", "response": begun},
        {"type": "response.output_item.added", "output_index": 0, "item": {**item, "content": [], "status": "in_progress"}},
        {"type": "response.content_part.added", **part, "part": {"type": "output_text", "text": "", "annotations": []}},
        {"type": "response.output_text.delta", **part, "delta": "Light.", "logprobs": []},
        {"type": "response.output_text.done", **part, "text": "Light.", "logprobs": []},
        {"type": "response.content_part.done", **part, "part": item["content"][0]},
        {"type": "response.output_item.done", "output_index": 0, "item": item},
        {"type": "response.completed", "response": whole}]
    return [{**event, "sequence_number": n} for n, event in enumerate(events)]


def embedding(request, number):
    return {"object": "list", "model": "text-embedding-3-small", "data": [{"object": "embedding", "index": 0, "embedding": "AACAPw=="}],
            "usage": {"prompt_tokens": 1000, "total_tokens": 1000}}


def message(request, number):
    whole = {"id": f"msg_{number}", "type": "message", "role": "assistant", "model": "claude-sonnet-5",
             "content": [{"type": "text", "text": "Light."}], "stop_reason": "end_turn", "stop_sequence": None, "usage": MESSAGE}
    if not request.get("stream"):
        return whole
    return [
        {"type": "message_start", "message": {**whole, "content": [], "stop_reason": None, "usage": {**MESSAGE, "output_tokens": 1}}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Light."}},
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None}, "usage": {"output_tokens": 100}},
        {"type": "message_stop"}]


def gemini(request, number, stream):
    whole = {"candidates": [{"content": {"parts": [{"text": "Light."}], "role": "model"}, "finishReason": "STOP", "index": 0}],
             "usageMetadata": GEMINI, "modelVersion": "gemini-2.5-flash", "responseId": f"gemini-{number}"}
    first = {**whole, "usageMetadata": {"promptTokenCount": 1000, "totalTokenCount": 1000}}
    return [first, whole] if stream else whole


def answer(path, request):
    number = next(numbers)
    if path.startswith("/openrouter/"):
        return openrouter(request, number)
    if ":generateContent" in path or ":streamGenerateContent" in path:
        return gemini(request, number, ":stream" in path)
    for end, function in (("/chat/completions", chat), ("/responses", response), ("/embeddings", embedding), ("/messages", message)):
        if path.split("?")[0].endswith(end):
            return function(request, number)
    return None


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        reply = answer(self.path, request)
        if isinstance(reply, list):
            body = "".join(
                (f"event: {e['type']}\n" if isinstance(e, dict) and "type" in e else "")
                + f"data: {e if isinstance(e, str) else json.dumps(e)}\n\n" for e in reply)
            kind = "text/event-stream"
        else:
            body, kind = json.dumps(reply), "application/json"
        data = body.encode()
        self.send_response(200 if reply is not None else 404)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
os.close(1)
threading.Thread(target=server.serve_forever, daemon=True).start()
sys.stdin.read()
