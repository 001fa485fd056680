"""What the worker remembers of each request between steps.

Steps run in order on one thread, so by the time batch N + 1 is looked at, what batch N sampled is
here, even where the engine scheduled N + 1 before it knew.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from pelton.core.batch import PENDING_TOKEN_ID, RequestContext, ScheduledBatch, ScheduledRequest
from pelton.core.sampling_params import SamplingParams
from pelton.worker.pooling import make_pooler
from pelton.worker.sampling.banned_sequences import BannedSequences
from pelton.worker.sampling.grammar import GrammarMatchers, RequestGrammar
from pelton.worker.sampling.sampler import Sampler, SamplingRow
from pelton.worker.sampling.thinking import ThinkingLimit


class RequestState:
    """One request: its tokens so far, and what its sampling needs."""

    __slots__ = (
        "_tables",
        "banned",
        "grammar",
        "late_row",
        "lora_id",
        "num_late",
        "output_token_ids",
        "pooler",
        "prompt_token_ids",
        "sampling",
        "sampling_row",
        "takes_greatest",
        "thinking",
    )

    def __init__(
        self, context: RequestContext, sampling: SamplingParams, sampler: Sampler, grammar: RequestGrammar | None = None
    ) -> None:
        self.prompt_token_ids = context.prompt_token_ids
        self.output_token_ids = list(context.output_token_ids)
        self.lora_id = context.lora_id
        self.sampling = sampling
        self.takes_greatest = sampling.takes_greatest
        self.grammar = grammar
        self.sampling_row: SamplingRow = sampler.make_row(sampling, context.seed)
        self.sampling_row.add_prompt(self.prompt_token_ids)
        self.sampling_row.add_output(self.output_token_ids)
        self.thinking = None if sampling.thinking is None else ThinkingLimit(sampling.thinking)
        if self.thinking is not None:
            self.thinking.add_output(self.output_token_ids)
        self.banned: BannedSequences | None = None
        self.num_late = 0  # tokens after `output_token_ids` that are still on the device
        self.late_row = 0  # where the last of those is among the samples of its step
        self.pooler = make_pooler(sampling.pooling) if sampling.pooling is not None else None
        self._tables: dict[int, tuple[tuple[int, ...], npt.NDArray[np.int64]]] = {}

    def add_output(self, token_id: int) -> None:
        self.output_token_ids.append(token_id)
        self.sampling_row.add_output((token_id,))
        if self.thinking is not None:
            self.thinking.add_output((token_id,))
        if self.grammar is not None:
            self.grammar.add_output(token_id)

    @property
    def num_outputs(self) -> int:
        """Output tokens, those that are late included."""
        return len(self.output_token_ids) + self.num_late

    @property
    def may_be_late(self) -> bool:
        """Whether nothing here needs to know a token before the next is sampled."""
        return (
            self.grammar is None
            and self.thinking is None
            and self.banned is None
            and not self.sampling.logprob_token_ids  # which are read from logits that are not edited yet
        )

    def known_token_ids(self, scheduled: ScheduledRequest) -> tuple[int, ...]:
        """The step's tokens, with what was sampled here in place of `PENDING_TOKEN_ID`; it stays where that is late.

        Raises IndexError where the token was never sampled.
        """
        token_ids = scheduled.token_ids
        if PENDING_TOKEN_ID not in token_ids:
            return token_ids
        first_output = scheduled.num_computed_tokens - len(self.prompt_token_ids)
        return tuple(
            self._output_token_id(first_output + i) if token_id == PENDING_TOKEN_ID else token_id
            for i, token_id in enumerate(token_ids)
        )

    def _output_token_id(self, index: int) -> int:
        if self.num_late and index == len(self.output_token_ids):
            return PENDING_TOKEN_ID
        return self.output_token_ids[index]

    def block_table(self, group: int, table: tuple[int, ...]) -> npt.NDArray[np.int64]:
        """`table` as an array [B], converted only when it differs from the last step's."""
        last = self._tables.get(group)
        if last is not None and last[0] == table:
            return last[1]
        array = np.array(table, dtype=np.int64)
        self._tables[group] = (table, array)
        return array


class RequestStates:
    """The states by request id, kept in step with the batches."""

    def __init__(self, sampler: Sampler, vocab_size: int, matchers: GrammarMatchers | None = None) -> None:
        """`matchers`: None where no request may have a grammar."""
        self._sampler = sampler
        self._matchers = matchers
        self._vocab_size = vocab_size
        self._states: dict[str, RequestState] = {}

    def __len__(self) -> int:
        return len(self._states)

    def forget_failed(self, request_id: str, state: RequestState) -> None:
        """Unless the request has begun anew since."""
        if self._states.get(request_id) is state:
            del self._states[request_id]

    def get(self, request_id: str) -> RequestState | None:
        return self._states.get(request_id)

    def update(self, batch: ScheduledBatch) -> dict[str, str]:
        """Forget and learn what `batch` says; return the requests that cannot run, with the reason.

        A context replaces an older state: it is how a preempted request comes back.
        """
        self.forget(batch.preempted_ids)
        self.forget(batch.finished_ids)
        failed: dict[str, str] = {}
        for scheduled in batch.requests:
            if scheduled.context is not None:
                self.forget((scheduled.request_id,))
                problem = self._learn(scheduled, scheduled.context)
            elif scheduled.request_id not in self._states:
                problem = "an earlier step of this request failed"
            else:
                continue
            if problem is not None:
                failed[scheduled.request_id] = problem
        return failed

    def forget(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._states.pop(request_id, None)

    def _learn(self, scheduled: ScheduledRequest, context: RequestContext) -> str | None:
        for token_ids in (context.prompt_token_ids, context.output_token_ids):
            if token_ids and not 0 <= min(token_ids) <= max(token_ids) < self._vocab_size:
                return f"a token id is outside the model's vocabulary of {self._vocab_size}"
        sampling, grammar = scheduled.sampling, None
        if sampling.grammar is not None:
            if self._matchers is None:
                return "the worker has no vocabulary to apply a grammar with"
            grammar = self._matchers.follow(sampling, context.output_token_ids)
        state = self._states[scheduled.request_id] = RequestState(context, sampling, self._sampler, grammar)
        if sampling.banned_sequences:
            state.banned = BannedSequences(sampling.banned_sequences, self._vocab_size)
        return None
