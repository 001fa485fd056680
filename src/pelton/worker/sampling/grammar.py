"""Grammars in the worker: which tokens may come next, for all rows of a step.

A request's matcher follows the tokens that were sampled here, so that a step may be scheduled before the one
ahead of it has finished, and is made again from the request's context after a preemption.

Legend: S rows, W = ceil(V / 32) words of a mask over a vocabulary of V tokens.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from pelton.core.grammar import Grammar
from pelton.core.protocols import TokenDecoder
from pelton.core.sampling_params import SamplingParams
from pelton.weights.tokenizer.grammar import GrammarCompiler, GrammarVocabulary, first_line
from pelton.worker.sampling.sampler import TokenMask

if TYPE_CHECKING:
    from llguidance import LLMatcher

# Compiled grammars that are kept for requests to come, and the bytes of their sources: each may take 40 times as many.
_MAX_KEPT, _MAX_KEPT_BYTES = 64, 8 << 20
# Lexers make states as masks are computed, up to 150 MB in a second of the processor's time. What may have gone into
# those that are kept, in sum: the largest goes first, and a popular one is made afresh now and then.
_MAX_KEPT_MASK_S = 2.0
# One that took longer is not compiled again for a request alone: that happens between two steps.
_MAX_AGAIN_S = 0.05
_CONTINUATION_BYTES = bytes(range(0x80, 0xC0))


@dataclass(slots=True, eq=False)
class CompiledGrammar:
    """A matcher at the start of the text. Its copies share a lexer, whose states they make as they go.

    A lexer that has met a limit stays without any use, so that all its matchers fail.
    """

    matcher: LLMatcher
    compile_s: float
    mask_s: float = 0.0  # processor's time that went into masks


class GrammarMatchers:
    """Makes matchers on a thread of its own, the vocabulary's part once, on first use.

    Without `shares`, every request has a lexer of its own: where it meets a limit depends on that request alone and on
    no clock, as ranks have to agree.
    """

    def __init__(self, decoder: TokenDecoder, vocab_size: int, *, shares: bool = True) -> None:
        self._shares = shares
        self.eos_token_ids = decoder.eos_token_ids
        self._decoder = decoder
        self._vocab_size = vocab_size
        self._compiler: GrammarCompiler | None = None
        self._kept: OrderedDict[Grammar, Future[CompiledGrammar]] = OrderedDict()
        self._num_kept_bytes = 0
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, "pelton-grammar")

    def start(self, grammar: Grammar) -> Future[CompiledGrammar]:
        """Compile `grammar`, or find it compiled. The future fails with `GrammarError`."""
        if not self._shares:
            return self._thread.submit(self._compile, grammar)
        with self._lock:
            future = self._drop(grammar) or self._thread.submit(self._compile, grammar)
            self._kept[grammar] = future
            self._num_kept_bytes += len(grammar.source)
            while len(self._kept) > _MAX_KEPT or (self._num_kept_bytes > _MAX_KEPT_BYTES and len(self._kept) > 1):
                self._drop(next(iter(self._kept)))
            self._drop_largest(grammar)
        return future

    def _drop_largest(self, wanted: Grammar) -> None:
        """Lexers beyond what is kept of them in all; neither `wanted` nor what takes long to compile again."""
        made = {one: future.result() for one, future in self._kept.items() if one != wanted and _is_made(future)}
        sizes = {one: compiled.mask_s for one, compiled in made.items() if compiled.compile_s <= _MAX_AGAIN_S}
        while sum(sizes.values()) > _MAX_KEPT_MASK_S:
            largest = max(sizes, key=sizes.__getitem__)
            del sizes[largest]
            self._drop(largest)

    def _drop(self, grammar: Grammar) -> Future[CompiledGrammar] | None:
        future = self._kept.pop(grammar, None)
        if future is not None:
            self._num_kept_bytes -= len(grammar.source)
        return future

    def prepare(self, grammar: Grammar) -> Future[None]:
        """Done when a request with this grammar can run without waiting; fails with `GrammarError`."""
        ready: Future[None] = Future()

        def tell(compiled: Future[CompiledGrammar]) -> None:
            error = compiled.exception()
            ready.set_result(None) if error is None else ready.set_exception(error)

        self.start(grammar).add_done_callback(tell)
        return ready

    def follow(self, sampling: SamplingParams, output_token_ids: Sequence[int]) -> RequestGrammar | None:
        """The place in the grammar of `sampling`, if it has one, after `output_token_ids`."""
        grammar = sampling.grammar
        if grammar is None:
            return None
        free_text = FreeText(grammar.starts_after, self._decoder) if grammar.starts_after else None
        return RequestGrammar(self.start(grammar), sampling, output_token_ids, free_text, partial(self._again, grammar))

    def _compile(self, grammar: Grammar) -> CompiledGrammar:
        if self._compiler is None:
            self._compiler = GrammarCompiler(GrammarVocabulary.of(self._decoder, self._vocab_size))
        start_s = time.perf_counter()
        matcher = self._compiler.compile(grammar)
        return CompiledGrammar(matcher, time.perf_counter() - start_s)

    def _again(self, grammar: Grammar, failed: CompiledGrammar) -> LLMatcher | None:
        """A matcher with a lexer of its own, after the one of `failed` has met a limit; None where that takes long.

        Requests to come do not get `failed` any more.
        """
        with self._lock:
            kept = self._kept.get(grammar)
            if kept is not None and _is_made(kept) and kept.result() is failed:
                self._drop(grammar)
        return self._compile(grammar).matcher if self._shares and failed.compile_s <= _MAX_AGAIN_S else None


def _is_made(future: Future[CompiledGrammar]) -> bool:
    return future.done() and future.exception() is None


class FreeText:
    """Where a text is before the marker that a grammar starts after.

    As long as no part of the marker is at its end, every token may follow that could at the start: that mask is
    computed once, where one of a state of text costs a millisecond.
    """

    def __init__(self, marker: str, decoder: TokenDecoder) -> None:
        self._marker = marker.encode()
        self._decoder = decoder
        self._tail = b""
        self.has_ended = False
        self.mask: TokenMask | None = None  # at the start

    def add(self, token_id: int) -> None:
        text = self._tail + self._decoder.token_bytes(token_id)
        self.has_ended = self.has_ended or self._marker in text
        self._tail = text[-max(len(self._marker) - 1, 3) :]

    @property
    def is_at_start(self) -> bool:
        """Whether the same may follow as at the start: the text is whole characters, and no part of the marker."""
        if self.has_ended or any(self._marker.startswith(self._tail[i:]) for i in range(len(self._tail))):
            return False
        try:
            self._tail.lstrip(_CONTINUATION_BYTES).decode()
        except UnicodeDecodeError:
            return False
        return True


class RequestGrammar:
    """Where one request is in its grammar."""

    def __init__(
        self,
        compiled: Future[CompiledGrammar],
        sampling: SamplingParams,
        output_token_ids: Sequence[int],
        free_text: FreeText | None = None,
        again: Callable[[CompiledGrammar], LLMatcher | None] | None = None,
    ) -> None:
        """`again` makes a matcher that shares nothing with those of other requests."""
        self._compiled = compiled
        self._again = again
        self.free_text = free_text
        if free_text is not None:
            for token_id in output_token_ids:
                free_text.add(token_id)
        self._token_ids = list(output_token_ids)  # that the matcher has been told, or is to be
        self._matcher: LLMatcher | None = None
        self._min_tokens = sampling.min_tokens
        self._num_tokens = len(output_token_ids)
        self.ignore_eos = sampling.ignore_eos
        self.problem: str | None = None

    def matcher(self) -> LLMatcher | None:
        """None, and a `problem`, where the grammar cannot be followed. Waits where it is still compiled."""
        if self._matcher is None and self.problem is None:
            error = self._compiled.exception()
            if error is not None:
                self.problem = f"the grammar cannot be used: {error}"
                return None
            self._follow(self._compiled.result().matcher.deep_copy())
        if self.problem is None and self._matcher is not None and self._matcher.is_error():
            self._follow_alone(first_line(self._matcher.get_error()))
        return self._matcher if self.problem is None else None

    def _follow(self, matcher: LLMatcher) -> None:
        self._matcher = matcher
        if matcher.try_consume_tokens(self._token_ids) != len(self._token_ids) and not matcher.is_error():
            self.problem = "the tokens generated so far do not follow the grammar"

    def _follow_alone(self, problem: str) -> None:
        """After an error: it may be another request that has brought the lexer to its limits."""
        again, self._again = self._again, None
        matcher = again(self._compiled.result()) if again is not None else None
        if matcher is not None:
            self._follow(matcher)
            problem = first_line(matcher.get_error()) if matcher.is_error() else ""
        if problem and self.problem is None:
            self.problem = f"the grammar cannot be followed further: {problem}"

    def compute_mask(self, matcher: LLMatcher, words: TokenMask) -> None:
        """`matcher` is what `matcher()` has given."""
        start_s = time.thread_time()
        matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        self._compiled.result().mask_s += time.thread_time() - start_s

    def add_output(self, token_id: int) -> None:
        self._num_tokens += 1
        if self.free_text is not None and not self.free_text.has_ended:
            self.free_text.add(token_id)
        if self._matcher is None:
            return
        # After the end comes what a step in flight computes in vain.
        if not self._matcher.is_stopped():
            self._token_ids.append(token_id)
            self._matcher.consume_token(token_id)

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow but the end, which `min_tokens` does not forbid."""
        matcher = self._matcher
        return (
            matcher is not None
            and self._num_tokens >= self._min_tokens
            and matcher.is_stopped()
            and not matcher.is_error()
        )


class GrammarMasks:
    """The masks of a step's rows, in memory that is used again for the next step."""

    def __init__(self, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        self._words = np.zeros((0, -(-vocab_size // 32)), dtype=np.uint32)
        self._eos_token_ids = np.array(sorted(eos_token_ids), dtype=np.int64)
        self._thread = ThreadPoolExecutor(1, "pelton-masks")

    def start(self, grammars: Sequence[RequestGrammar | None]) -> Future[list[TokenMask | None]] | None:
        """`fill` on a thread of its own, beside the forward pass; None where all rows are free.

        Until it is done, nothing else may be done with `grammars`.
        """
        if all(grammar is None for grammar in grammars):
            return None
        return self._thread.submit(self.fill, grammars)

    def fill(self, grammars: Sequence[RequestGrammar | None]) -> list[TokenMask | None]:
        """One mask per row [W], or None for a row that is free. A row whose grammar has a `problem` is masked whole."""
        constrained = [(row, grammar) for row, grammar in enumerate(grammars) if grammar is not None]
        if len(self._words) < len(constrained):
            self._words = np.zeros((len(constrained), self._words.shape[1]), dtype=np.uint32)
        masks: list[TokenMask | None] = [None] * len(grammars)
        for (row, grammar), words in zip(constrained, self._words, strict=False):
            masks[row] = words
            self._fill_row(words, grammar)
        return masks

    def _fill_row(self, words: TokenMask, grammar: RequestGrammar) -> None:
        free_text = grammar.free_text if grammar.free_text is not None and grammar.free_text.is_at_start else None
        if free_text is not None and free_text.mask is not None:
            words[:] = free_text.mask
            return
        matcher, before = grammar.matcher(), None
        while matcher is not None and matcher is not before:
            grammar.compute_mask(matcher, words)
            # An error of the mask is noted here, or another matcher found.
            before, matcher = matcher, grammar.matcher()
        if matcher is None:
            words.fill(0)
        elif free_text is not None:
            free_text.mask = words.copy()
        elif grammar.ignore_eos:
            self._forbid_end(words)

    def _forbid_end(self, words: TokenMask) -> None:
        """Unless nothing else may come."""
        before = words[self._eos_token_ids // 32].copy()
        np.bitwise_and.at(
            words, self._eos_token_ids // 32, ~(np.uint32(1) << (self._eos_token_ids % 32).astype(np.uint32))
        )
        if not words.any():
            words[self._eos_token_ids // 32] = before
