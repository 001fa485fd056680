"""What runs between a handler and the engine: the streams of one HTTP request, read as one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pelton.core.errors import PeltonError
from pelton.core.output import RequestOutput, TokenLogprobs, Usage
from pelton.core.request import FinishReason
from pelton.engine.client import RequestStream

# (prompt index, what came for it) of everything that came since the last read.
Batch = list[tuple[int, list[RequestOutput]]]


class Generation:
    """The streams of one HTTP request, one per prompt, read as one; `cancel` ends them.

    `observe_gap(seconds, num_tokens)` is told the time between the deltas of a sequence.
    """

    def __init__(self, streams: Sequence[RequestStream], observe_gap: Callable[[float, int], None]) -> None:
        self.streams = streams
        self.is_cancelled = False
        self.num_output_tokens = 0
        self._observe_gap = observe_gap
        self._last_s: dict[tuple[int, int], float] = {}
        self._merged = _MergedStreams(streams) if len(streams) > 1 else None

    async def read(self) -> Batch | None:
        """The next deltas; None at the end. Raises the typed error that ended a stream."""
        try:
            if self._merged is None:
                batch = [(0, await self.streams[0].__anext__())]
            else:
                batch = await self._merged.read()
        except StopAsyncIteration:
            return None
        for prompt_index, outputs in batch:
            self._observe(prompt_index, outputs)
        return batch

    def write_through(self, write: Callable[[Batch], None]) -> None:
        """Hand deltas to `write` as they arrive, without waking whoever waits in `read`; the deltas that
        end a sequence still go to `read`. Only a single prompt's can be handed over."""
        if self._merged is not None:
            return

        def sink(outputs: list[RequestOutput]) -> bool:
            for output in outputs:
                if output.finish_reason is not None:
                    return False
            self._observe(0, outputs)
            write([(0, outputs)])
            return True

        self.streams[0].sink = sink

    def cancel(self) -> None:
        self.is_cancelled = True
        self.close()

    def close(self) -> None:
        """Give everything back; streams that have not ended are cancelled."""
        for stream in self.streams:
            stream.cancel()
        if self._merged is not None:
            self._merged.close()

    def _observe(self, prompt_index: int, outputs: list[RequestOutput]) -> None:
        now_s = time.monotonic()
        times_s = self._last_s
        for output in outputs:
            num_tokens = len(output.token_ids)
            if num_tokens:
                self.num_output_tokens += num_tokens
                key = (prompt_index, output.index)
                if key in times_s:
                    self._observe_gap(now_s - times_s[key], num_tokens)
                times_s[key] = now_s


class _MergedStreams:
    """Several streams read by a task each; the reader wakes once for all that came meanwhile."""

    def __init__(self, streams: Sequence[RequestStream]) -> None:
        self._ready: Batch = []
        self._error: PeltonError | None = None
        self._num_open = len(streams)
        self._wake = asyncio.Event()
        self._tasks = [asyncio.create_task(self._pump(index, stream)) for index, stream in enumerate(streams)]

    async def _pump(self, prompt_index: int, stream: RequestStream) -> None:
        try:
            async for outputs in stream:
                self._ready.append((prompt_index, outputs))
                self._wake.set()
        except PeltonError as error:
            self._error = error
        finally:
            self._num_open -= 1
            self._wake.set()

    async def read(self) -> Batch:
        while not self._ready:
            if self._error is not None:
                raise self._error
            if not self._num_open:
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()
        ready, self._ready = self._ready, []
        return ready

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()


@dataclass(slots=True)
class SequenceResult:
    """Everything one sequence produced."""

    deltas: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    usage: Usage | None = None
    pooled: bytes | None = None

    @property
    def text(self) -> str:
        return "".join([text for text, _ in self.deltas])


@dataclass(slots=True)
class PromptResult:
    """Everything that came of one prompt."""

    sequences: list[SequenceResult]
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)


def empty_results(num_prompts: int, num_sequences: int) -> list[PromptResult]:
    return [PromptResult([SequenceResult() for _ in range(num_sequences)]) for _ in range(num_prompts)]


def add_batch(results: list[PromptResult], batch: Batch) -> None:
    for prompt_index, outputs in batch:
        result = results[prompt_index]
        for output in outputs:
            if output.prompt_logprobs:
                result.prompt_logprobs += output.prompt_logprobs
            _add(result.sequences[output.index], output)


async def collect(generation: Generation, num_sequences: int) -> list[PromptResult] | None:
    """Read to the end; None where the client went away meanwhile. Raises the streams' typed errors."""
    results = empty_results(len(generation.streams), num_sequences)
    while (batch := await generation.read()) is not None:
        add_batch(results, batch)
    if generation.is_cancelled:
        return None
    return results


def _add(sequence: SequenceResult, output: RequestOutput) -> None:
    sequence.deltas.append((output.text, output.token_ids))
    sequence.token_ids += output.token_ids
    if output.logprobs:
        sequence.logprobs += output.logprobs
    if output.finish_reason is not None:
        sequence.pooled = output.pooled
        sequence.finish_reason = output.finish_reason
        sequence.stop_reason = output.stop_reason
        sequence.usage = output.usage
