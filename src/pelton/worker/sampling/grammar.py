"""Grammars in the worker: which tokens may come next, for all rows of a step.

A request's matcher follows the tokens that were sampled here, so that a step may be scheduled before the one
ahead of it has finished, and is made again from the request's context after a preemption.

Legend: S rows, W = ceil(V / 32) words of a mask over a vocabulary of V tokens.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from pelton.core.grammar import Grammar
from pelton.core.protocols import TokenDecoder
from pelton.core.sampling_params import SamplingParams
from pelton.weights.tokenizer.grammar import GrammarCompiler, GrammarVocabulary, first_line
from pelton.worker.sampling.sampler import TokenMask

if TYPE_CHECKING:
    from llguidance import LLMatcher

# Compiled grammars that are kept for requests to come; a large one takes some megabytes.
_MAX_KEPT = 64
_CONTINUATION_BYTES = bytes(range(0x80, 0xC0))


class GrammarMatchers:
    """Makes matchers on a thread of its own, the vocabulary's part once, on first use."""

    def __init__(self, decoder: TokenDecoder, vocab_size: int) -> None:
        self.eos_token_ids = decoder.eos_token_ids
        self._decoder = decoder
        self._vocab_size = vocab_size
        self._compiler: GrammarCompiler | None = None
        self._kept: OrderedDict[Grammar, Future[LLMatcher]] = OrderedDict()
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, "pelton-grammar")

    def start(self, grammar: Grammar) -> Future[LLMatcher]:
        """Compile `grammar`, or find it compiled: a matcher at the start of the text, to be copied.

        The future fails with `GrammarError`.
        """
        with self._lock:
            future = self._kept.pop(grammar, None) or self._thread.submit(self._compile, grammar)
            self._kept[grammar] = future
            if len(self._kept) > _MAX_KEPT:
                self._kept.popitem(last=False)
        return future

    def prepare(self, grammar: Grammar) -> Future[None]:
        """Done when a request with this grammar can run without waiting; fails with `GrammarError`."""
        ready: Future[None] = Future()

        def tell(compiled: Future[LLMatcher]) -> None:
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
        return RequestGrammar(self.start(grammar), sampling, output_token_ids, free_text)

    def _compile(self, grammar: Grammar) -> LLMatcher:
        if self._compiler is None:
            self._compiler = GrammarCompiler(GrammarVocabulary.of(self._decoder, self._vocab_size))
        return self._compiler.compile(grammar)


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
        compiled: Future[LLMatcher],
        sampling: SamplingParams,
        output_token_ids: Sequence[int],
        free_text: FreeText | None = None,
    ) -> None:
        self._compiled = compiled
        self.free_text = free_text
        if free_text is not None:
            for token_id in output_token_ids:
                free_text.add(token_id)
        self._told = list(output_token_ids)  # until the matcher is there
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
            self._matcher = self._compiled.result().deep_copy()
            if self._matcher.try_consume_tokens(self._told) != len(self._told):
                self.problem = "the tokens generated so far do not follow the grammar"
            self._told.clear()
        if self.problem is None and self._matcher is not None and self._matcher.is_error():
            self.problem = f"the grammar cannot be followed further: {first_line(self._matcher.get_error())}"
        return self._matcher if self.problem is None else None

    def add_output(self, token_id: int) -> None:
        self._num_tokens += 1
        if self.free_text is not None and not self.free_text.has_ended:
            self.free_text.add(token_id)
        # After the end comes what a step in flight computes in vain.
        if self._matcher is not None and not self._matcher.is_stopped():
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

    def fill(self, grammars: Sequence[RequestGrammar | None]) -> list[TokenMask | None] | None:
        """One mask per row [W], or None for a row that is free; None where all are.

        A row whose grammar has a `problem` is masked whole.
        """
        constrained = [(row, grammar) for row, grammar in enumerate(grammars) if grammar is not None]
        if not constrained:
            return None
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
        matcher = grammar.matcher()
        if matcher is not None:
            matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
            matcher = grammar.matcher()  # an error of the mask is noted here
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
