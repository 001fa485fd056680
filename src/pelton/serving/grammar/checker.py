"""`GrammarChecker`: grammars are compiled in a helper process before admission, and remembered (laws 7 and 8)."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import msgspec

from pelton.core.errors import QueueFullError
from pelton.core.grammar import Grammar
from pelton.core.protocols import TokenDecoder
from pelton.serving.grammar.worker import CheckAnswer
from pelton.serving.helper_process import HelperLimitError, HelperPool, HelperSpec
from pelton.weights.tokenizer.grammar import GrammarError, GrammarVocabulary

TIME_LIMIT_S = 1.5
MEMORY_LIMIT_BYTES = 1 << 30
NUM_PROCESSES = 2
MAX_SOURCE_BYTES = 1 << 20
MAX_CHECKING = 64
# Answers that are kept, with their sources.
MAX_KEPT = 256
MAX_KEPT_BYTES = 1 << 24
# For a helper's own start: it reads the vocabulary and makes a trie of it.
START_LIMIT_S = 20.0


class GrammarChecker:
    """To be used on one event loop; what is slow runs on threads that only wait for the helpers."""

    def __init__(self, decoder: TokenDecoder, vocab_size: int) -> None:
        def setup() -> bytes:
            return msgspec.msgpack.encode(GrammarVocabulary.of(decoder, vocab_size))

        self._helpers = HelperPool(
            HelperSpec(
                module="pelton.serving.grammar.worker",
                setup=setup,
                work="grammar",
                time_limit_s=TIME_LIMIT_S,
                memory_limit_bytes=MEMORY_LIMIT_BYTES,
                num_processes=NUM_PROCESSES,
                start_limit_s=START_LIMIT_S,
            )
        )
        self._threads = ThreadPoolExecutor(NUM_PROCESSES, "pelton-grammar")
        self._known: OrderedDict[Grammar, CheckAnswer] = OrderedDict()
        self._num_known_bytes = 0
        self._checking: dict[Grammar, asyncio.Task[CheckAnswer]] = {}

    async def check(self, grammar: Grammar, param: str) -> Grammar:
        """`grammar` as the worker is to have it.

        Raises `GrammarError` (with `param`) for one that cannot be enforced or is too large, `QueueFullError` and
        `ServiceUnavailableError` where too many are being checked.
        """
        answer = self._known.get(grammar)
        if answer is not None:
            self._known.move_to_end(grammar)
        else:
            answer = await asyncio.shield(self._task(grammar, param))
        if answer.grammar is None:
            raise GrammarError(f"{param}: {answer.problem}", param=param)
        return answer.grammar

    def _task(self, grammar: Grammar, param: str) -> asyncio.Task[CheckAnswer]:
        task = self._checking.get(grammar)
        if task is None:
            if len(grammar.source) > MAX_SOURCE_BYTES:
                raise GrammarError(f"{param} is longer than {MAX_SOURCE_BYTES} bytes", param=param)
            if len(self._checking) >= MAX_CHECKING:
                raise QueueFullError(f"{MAX_CHECKING} grammars are being checked; try again later")
            task = self._checking[grammar] = asyncio.create_task(self._check(grammar))
        return task

    async def _check(self, grammar: Grammar) -> CheckAnswer:
        try:
            answer = await asyncio.get_running_loop().run_in_executor(self._threads, self._call, grammar)
        finally:
            del self._checking[grammar]
        self._known[grammar] = answer
        self._num_known_bytes += len(grammar.source)
        while len(self._known) > MAX_KEPT or self._num_known_bytes > MAX_KEPT_BYTES:
            dropped, _ = self._known.popitem(last=False)
            self._num_known_bytes -= len(dropped.source)
        return answer

    def _call(self, grammar: Grammar) -> CheckAnswer:
        try:
            return msgspec.msgpack.decode(self._helpers.call(msgspec.msgpack.encode(grammar)), type=CheckAnswer)
        except HelperLimitError:
            return CheckAnswer(None, f"takes more than {TIME_LIMIT_S:g} s or too much memory to compile; simplify it")

    def close(self) -> None:
        """End the helpers; checks in progress fail."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._helpers.close()
