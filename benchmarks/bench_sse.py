"""What the serving layer's own Python costs per streamed chunk: `python benchmarks/bench_sse.py`.

Drives the middleware, the response and the encoder with deltas that are ready at once and a client
that takes everything at once, so that no socket, engine or event loop's wait is in the figures. A step
of 32 requests costs 32 chunks.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from pelton.core.output import RequestOutput, TokenLogprobs, Usage
from pelton.core.request import FinishReason
from pelton.serving.generation import Generation
from pelton.serving.logs import configure_logs
from pelton.serving.metrics import ServerMetrics
from pelton.serving.middleware import RequestMiddleware
from pelton.serving.openai.chunks import AnswerOptions, ChatChunkEncoder, CompletionChunkEncoder
from pelton.serving.openai.logprobs import TokenSpelling
from pelton.serving.sse import EventStream

NUM_CHUNKS = 20_000
NUM_REPEATS = 5
SCOPE: dict[str, Any] = {"type": "http", "method": "POST", "path": "/", "headers": []}


class ReadyStream:
    """Deltas of one sequence, one per read, without a wait."""

    def __init__(self, outputs: list[RequestOutput]) -> None:
        self._outputs = iter(outputs)

    async def __anext__(self) -> list[RequestOutput]:
        for output in self._outputs:
            return [output]
        raise StopAsyncIteration

    def cancel(self) -> None:
        pass


class ByteSpelling(TokenSpelling):
    def __init__(self) -> None:
        pass

    def text(self, token_id: int) -> str:
        return chr(97 + token_id % 26)

    def bytes(self, token_id: int) -> bytes:
        return bytes([97 + token_id % 26])

    def is_special(self, token_id: int) -> bool:
        return token_id > 1000


def make_outputs(num_top: int | None) -> list[RequestOutput]:
    logprobs = None
    if num_top is not None:
        logprobs = (TokenLogprobs(5, -0.5, 1, tuple((index, -0.5 - index) for index in range(num_top))),)
    delta = RequestOutput("r", 0, (5,), " word", None, None, logprobs)
    last = RequestOutput("r", 0, (5,), ".", FinishReason.STOP, 5, logprobs, usage=Usage(10, NUM_CHUNKS))
    return [delta] * (NUM_CHUNKS - 1) + [last]


def make_options(num_top: int | None) -> AnswerOptions:
    return AnswerOptions(
        answer_id="chatcmpl-0123456789abcdef0123456789abcdef",
        created=1_700_000_000,
        model="qwen2.5-coder-0.5b-instruct",
        fingerprint="fp_0123456789ab",
        prompts=[[1] * 10],
        n=1,
        spelling=ByteSpelling(),
        logprobs=num_top,
    )


async def run(encoder_class: Any, num_top: int | None) -> tuple[float, int]:
    """(seconds of processor time, bytes) of one streamed answer."""
    metrics = ServerMetrics("m")
    num_bytes = 0

    async def send(message: Any) -> None:
        nonlocal num_bytes
        num_bytes += len(message.get("body", b""))

    async def receive() -> Any:
        await asyncio.Event().wait()

    outputs = make_outputs(num_top)
    stream: Any = ReadyStream(outputs)
    generation = Generation([stream], metrics.observe_gap)
    app = RequestMiddleware(
        EventStream(generation, encoder_class(make_options(num_top))), api_key=None, metrics=metrics
    )
    started_s = time.process_time()
    await app(dict(SCOPE), receive, send)
    return time.process_time() - started_s, num_bytes


def main() -> None:
    configure_logs("warning")
    print(f"{'stream':<28}{'us per chunk':>14}{'bytes per chunk':>18}")
    for name, encoder_class, num_top in (
        ("chat", ChatChunkEncoder, None),
        ("completions", CompletionChunkEncoder, None),
        ("chat, 5 top logprobs", ChatChunkEncoder, 5),
        ("completions, 5 top logprobs", CompletionChunkEncoder, 5),
    ):
        results = [asyncio.run(run(encoder_class, num_top)) for _ in range(NUM_REPEATS)]
        best_s, num_bytes = min(results)
        print(f"{name:<28}{best_s / NUM_CHUNKS * 1e6:>14.1f}{num_bytes / NUM_CHUNKS:>18.0f}")


if __name__ == "__main__":
    main()
