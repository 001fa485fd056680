"""Prompts to pooled values: what embeddings, scores and rankings are made of."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pelton.core.errors import InvalidRequestError
from pelton.core.pooling import PoolingParams
from pelton.core.sampling_params import SamplingParams
from pelton.serving.caller import Caller, caller_of
from pelton.serving.context import ServingContext
from pelton.serving.errors import ClientDisconnectedError
from pelton.serving.generation import collect
from pelton.serving.openai.parameters import cut
from pelton.serving.openai.pooling_requests import PoolingRequest, PoolingUsage

# Prompts of one request that are with the engine at a time: the queue is everybody's.
MAX_SUBMITTED = 32


@dataclass(frozen=True, slots=True)
class Pooled:
    """float32 values of each prompt, little-endian."""

    values: list[bytes]
    num_prompt_tokens: int

    @property
    def usage(self) -> PoolingUsage:
        return PoolingUsage(prompt_tokens=self.num_prompt_tokens, total_tokens=self.num_prompt_tokens)


class Pooling:
    """One HTTP request's prompts on their way through the engine."""

    def __init__(self, context: ServingContext, request: PoolingRequest, http_request: Request, answer_id: str) -> None:
        self._context = context
        self._request = request
        self._caller: Caller = caller_of(http_request, request)
        self._answer_id = answer_id

    async def tokenize(self, parts: Sequence[str | list[int]], param: str) -> list[list[int]]:
        """Texts one by one, so that other requests get their turn; then what `truncate_prompt_tokens` leaves."""
        context, request = self._context, self._request

        def encode(text: str) -> list[int]:
            return context.encode(text, add_special_tokens=request.add_special_tokens is not False, param=param)

        prompts = []
        for index, part in enumerate(parts):
            prompt = await context.prepare(encode, part) if isinstance(part, str) else part
            num_kept = request.truncate_prompt_tokens
            if num_kept is not None:
                num_kept = num_kept if num_kept >= 0 else context.max_model_len
                prompt = cut(prompt, num_kept, request.truncation_side)
            if not prompt:
                raise InvalidRequestError(f"{param}[{index}] holds no token; it must hold at least one", param=param)
            prompts.append(prompt)
        return prompts

    async def run(self, prompts: Sequence[list[int]], params: PoolingParams) -> Pooled:
        """Raises what the engine refuses, for all prompts together."""
        sampling = SamplingParams(max_tokens=1, temperature=0.0, pooling=params)
        values: list[bytes] = []
        for first in range(0, len(prompts), MAX_SUBMITTED):
            here = prompts[first : first + MAX_SUBMITTED]
            answer_id = f"{self._answer_id}-{first}" if first else self._answer_id
            generation = self._context.submit(answer_id, here, self._request, sampling, self._caller)
            try:
                results = await collect(generation, 1)
            finally:
                generation.close()
            assert results is not None
            pooled = [result.sequences[0].pooled for result in results]
            values += [value for value in pooled if value is not None]
        return Pooled(values, sum(map(len, prompts)))


class ComputedAnswer(Response):
    """Answers with what `compute` makes; a client that goes away ends it within one step."""

    def __init__(self, compute: Callable[[], Awaitable[msgspec.Struct | Sequence[msgspec.Struct]]]) -> None:
        super().__init__(media_type="application/json")
        self._compute = compute

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        computing = asyncio.ensure_future(self._compute())
        watching = asyncio.ensure_future(_until_disconnect(receive))
        try:
            await asyncio.wait((computing, watching), return_when=asyncio.FIRST_COMPLETED)
            if not computing.done():
                raise ClientDisconnectedError
            answer = msgspec.json.encode(await computing)
        finally:
            watching.cancel()
            computing.cancel()
        await Response(answer, media_type="application/json")(scope, receive, send)


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
