"""One server under test: what it understands, and one streamed completion with its times."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

import aiohttp
import msgspec

from pelton.bench.errors import BenchError
from pelton.bench.record import RequestRecord

# Tried in this order: not every server takes `ignore_eos`, or reports usage while streaming.
_OPTION_SETS: tuple[dict[str, Any], ...] = (
    {"ignore_eos": True, "stream_options": {"include_usage": True}},
    {"stream_options": {"include_usage": True}},
    {"ignore_eos": True},
    {},
)
_REFUSED = (400, 404, 405, 415, 422, 501)


class _Choice(msgspec.Struct):
    text: str | None = None
    finish_reason: str | None = None


class _PromptTokensDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptTokensDetails | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode


class ServerClient:
    """Speaks to one OpenAI-compatible server. Use as an asynchronous context manager."""

    def __init__(
        self, base_url: str, *, model: str | None = None, api_key: str | None = None, timeout_s: float = 600.0
    ) -> None:
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self.model = model or ""
        self.options: dict[str, Any] = {}
        self._timeout_s = timeout_s
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> ServerClient:
        self._session = aiohttp.ClientSession(
            # A connection per request, as many as there are clients: none is measured waiting for another.
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=30.0, sock_read=self._timeout_s),
            headers=self._headers,
        )
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        assert self._session is not None
        await self._session.close()

    async def prepare(self) -> None:
        """Find the model's name and the options that the server takes. Raises `BenchError`."""
        if not self.model:
            self.model = await self._find_model()
        answers = []
        for options in _OPTION_SETS:
            self.options = options
            status, answer = await self.post("/v1/completions", self._body("Hello", 1))
            if status == 200:
                return
            answers.append(f"HTTP {status}: {_error_text(answer)}")
            if status not in _REFUSED:
                break
        raise BenchError(f"{self.base_url}/v1/completions refuses a plain completion: {answers[0]}")

    async def _find_model(self) -> str:
        status, answer = await self._request("GET", "/v1/models", None)
        if status in (401, 403):
            raise BenchError(f"{self.base_url} wants an API key (--api-key): HTTP {status}")
        try:
            return str(answer["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            # A server of one model may do without the list, and ignore the name.
            return "default"

    async def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and answer (parsed where it is JSON). Raises `BenchError` where nothing answers."""
        return await self._request("POST", path, body)

    async def _request(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        assert self._session is not None
        try:
            async with self._session.request(method, self.base_url + path, json=body) as response:
                content = await response.read()
                status = response.status
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise BenchError(f"{self.base_url} does not answer: {_describe(error)}") from error
        try:
            return status, msgspec.json.decode(content)
        except msgspec.DecodeError:
            return status, content.decode(errors="replace")

    def _body(self, prompt: str, max_tokens: int) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            **self.options,
        }

    async def complete(
        self,
        prompt: str,
        max_tokens: int,
        *,
        headers: Mapping[str, str] | None = None,
        fields: Mapping[str, Any] | None = None,
    ) -> RequestRecord:
        """Stream one completion. A failure is a record with `error`, never an exception.

        `headers` and `fields` (of the body) come on top of what every request has.
        """
        assert self._session is not None
        stream = _Stream()
        start_s = time.perf_counter()
        try:
            async with self._session.post(
                f"{self.base_url}/v1/completions",
                json={**self._body(prompt, max_tokens), **(fields or {})},
                headers=headers,
            ) as response:
                if response.status != 200:
                    stream.error = f"HTTP {response.status}: {_error_text(await response.read())}"
                else:
                    async for content in response.content.iter_any():
                        stream.feed(content, time.perf_counter() - start_s)
                    stream.end()
        except asyncio.CancelledError:
            raise
        except Exception as error:
            stream.error = _describe(error)
        return stream.to_record(time.perf_counter() - start_s)


class _Stream:
    """Server-sent events, fed as they come off the wire, gathered into one record."""

    def __init__(self) -> None:
        self.error: str | None = None
        self._rest = b""
        self._times_s: list[float] = []
        self._usage: _Usage | None = None
        self._has_ended = False

    def feed(self, content: bytes, now_s: float) -> None:
        *lines, self._rest = (self._rest + content).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._feed_data(line[5:].strip(), now_s)

    def _feed_data(self, data: bytes, now_s: float) -> None:
        if data == b"[DONE]":
            self._has_ended = True
            return
        chunk = _decode_chunk(data)
        if chunk.error is not None:
            self.error = _error_text({"error": chunk.error})
        if chunk.usage is not None:
            self._usage = chunk.usage
        for choice in chunk.choices or ():
            self._has_ended |= choice.finish_reason is not None
            if choice.text:
                self._times_s.append(now_s)

    def end(self) -> None:
        if not self._has_ended and self.error is None:
            self.error = "the stream ended before the answer did"

    def to_record(self, elapsed_s: float) -> RequestRecord:
        usage = self._usage or _Usage()
        details = usage.prompt_tokens_details
        return RequestRecord(
            elapsed_s=elapsed_s,
            chunk_times_s=tuple(self._times_s),
            num_prompt_tokens=usage.prompt_tokens,
            num_output_tokens=usage.completion_tokens or len(self._times_s),
            num_cached_tokens=details.cached_tokens if details else None,
            error=self.error,
        )


def _error_text(answer: Any) -> str:
    """The message within an error answer, whatever its shape; at most 300 characters on one line."""
    if isinstance(answer, bytes):
        try:
            answer = msgspec.json.decode(answer)
        except msgspec.DecodeError:
            answer = answer.decode(errors="replace")
    if isinstance(answer, dict):
        answer = answer.get("error", answer.get("detail", answer))
    if isinstance(answer, dict):
        answer = answer.get("message", answer)
    return " ".join(str(answer).split())[:300]


def _describe(error: Exception) -> str:
    text = str(error) or type(error).__name__
    if isinstance(error, TimeoutError):
        text = "no word within the time limit"
    return " ".join(text.split())[:300]
