"""A small OpenAI-compatible server for tests: words and marks are tokens, answers are known, faults are chosen."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


@dataclass
class FakeServer:
    """`dialect` is that of /tokenize: prompt, content or none. `fail_every` breaks each n-th completion."""

    dialect: str = "prompt"
    takes_ignore_eos: bool = True
    reports_usage: bool = True
    lists_models: bool = True
    api_key: str | None = None
    fault: str = ""  # status | in_band | cut
    fail_every: int = 1
    delay_s: float = 0.0
    base_url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)  # of completions, beside their bodies
    num_running: int = 0
    most_running: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)  # no chat is being answered
    _words: dict[str, int] = field(default_factory=dict)

    def tokens(self, text: str) -> list[int]:
        return [self._words.setdefault(word, len(self._words)) for word in re.findall(r"\w+|\W", text)]

    async def tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        return web.json_response({"tokens": self.tokens(body.get(self.dialect, ""))})

    async def detokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        words = list(self._words)
        return web.json_response({self.dialect: "".join(words[token_id] for token_id in body["tokens"])})

    async def models(self, _request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "fake-model"}]})

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        """Says the last message back, word by word, and how many messages there were."""
        body = await request.json()
        self.bodies.append(body)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        words = [f"{len(body['messages'])}:", *body["messages"][-1]["content"].split()]
        self.idle.clear()
        try:
            await _send(response, {"choices": [{"delta": {"role": "assistant", "content": ""}}]})
            for number, word in enumerate(words):
                if number == 3 and self.fault == "cut":
                    return response
                if number == 3 and self.fault == "in_band":
                    await _send(response, {"error": {"message": "engine died"}})
                    return response
                await _send(response, {"choices": [{"delta": {"content": f"{word} "}}]})
                await asyncio.sleep(self.delay_s)
        finally:
            self.idle.set()
        await _send(response, {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": len(words)}})
        await response.write(b"data: [DONE]\n\n")
        return response

    async def completions(self, request: web.Request) -> web.StreamResponse:
        if self.api_key and request.headers.get("Authorization") != f"Bearer {self.api_key}":
            return web.json_response({"error": {"message": "wrong key"}}, status=401)
        body = await request.json()
        if "ignore_eos" in body and not self.takes_ignore_eos:
            return web.json_response({"error": {"message": "unknown field ignore_eos"}}, status=400)
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        is_faulty = self.fault and body["max_tokens"] > 8 and len(self.bodies) % self.fail_every == 0
        if is_faulty and self.fault == "status":
            return web.json_response({"error": {"message": "queue is full"}}, status=503)
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        try:
            return await self._stream(request, body, self.fault if is_faulty else "")
        finally:
            self.num_running -= 1

    async def _stream(self, request: web.Request, body: dict[str, Any], fault: str) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for number in range(body["max_tokens"]):
            await asyncio.sleep(self.delay_s)
            if number == 3 and fault == "cut":
                return response
            if number == 3 and fault == "in_band":
                await _send(response, {"error": {"message": "engine died"}})
                return response
            reason = "length" if number + 1 == body["max_tokens"] else None
            await _send(response, {"choices": [{"index": 0, "text": f" t{number}", "finish_reason": reason}]})
        if self.reports_usage and "stream_options" in body:
            usage = {
                "prompt_tokens": len(self.tokens(body["prompt"])),
                "completion_tokens": body["max_tokens"],
                "prompt_tokens_details": {"cached_tokens": 3},
            }
            await _send(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        return response


async def _send(response: web.StreamResponse, chunk: dict[str, Any]) -> None:
    await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")


@asynccontextmanager
async def running(server: FakeServer) -> AsyncIterator[FakeServer]:
    app = web.Application()
    app.router.add_post("/v1/completions", server.completions)
    app.router.add_post("/v1/chat/completions", server.chat_completions)
    if server.lists_models:
        app.router.add_get("/v1/models", server.models)
    if server.dialect != "none":
        app.router.add_post("/tokenize", server.tokenize)
        app.router.add_post("/detokenize", server.detokenize)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.base_url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield server
    finally:
        await runner.cleanup()
