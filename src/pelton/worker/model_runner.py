"""`ModelRunner`: a `ScheduledBatch` in, a `StepResult` out. It obeys; it decides nothing (law 1).

Legend: T tokens in the step, R requests, S rows whose logits are wanted, H hidden size, V vocabulary.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

import numpy as np

from pelton.core.batch import PENDING_TOKEN_ID, ScheduledBatch, StepResult
from pelton.core.output import TokenLogprobs
from pelton.worker.adapters import LoadedAdapters
from pelton.worker.forward_batch import Adapters, ForwardBatch, Ints
from pelton.worker.kernels.block_copies import RunningCopies
from pelton.worker.kernels.ops import Array
from pelton.worker.kv_storage import KVStorage
from pelton.worker.layers.rotary import rotary_tables
from pelton.worker.models.registry import Model, compile_model
from pelton.worker.pooling.pooler import Pooler
from pelton.worker.request_state import RequestState, RequestStates
from pelton.worker.sampling.grammar import GrammarMasks, GrammarMatchers
from pelton.worker.sampling.picked_logprobs import picked_logprobs, with_picked
from pelton.worker.sampling.sampler import LateSamples, Sampler, Samples, TokenMask
from pelton.worker.sampling.thinking import only
from pelton.worker.step_arrays import prepare_forward_batch
from pelton.worker.step_pieces import OUT_OF_MEMORY, StepLimit, StepRow, halves, num_tokens_of


@dataclass(slots=True)
class _Answers:
    """The tuples of a `StepResult` while they are filled in."""

    sampled_token_ids: list[tuple[int, ...]]
    logprobs: list[tuple[TokenLogprobs, ...] | None]
    prompt_logprobs: list[tuple[TokenLogprobs, ...] | None]
    complete_ids: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    pooled: dict[str, bytes] = field(default_factory=dict)
    # By index of a request: the position up to which its prompt has been told or pooled.
    taken: dict[int, int] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class RunningStep:
    """A step whose tokens may still be on the device; later steps can begin on them there."""

    batch: ScheduledBatch
    start_s: float
    answers: _Answers
    copies: RunningCopies | None = None
    kv_copy_s: float = 0.0
    kv_moved_s: float | None = None
    rows: Sequence[StepRow] = ()  # that sample late
    samples: LateSamples | None = None
    result: StepResult | None = None
    error: BaseException | None = None

    @property
    def is_done(self) -> bool:
        return self.result is not None or self.error is not None

    def wait(self) -> None:
        """Until the device has done it. Callable from any thread."""
        if self.samples is not None:
            self.samples.wait()


class ModelRunner:
    """Runs steps one after another; not thread-safe.

    A step that raises leaves no state of its requests behind: they come back with a context, or are
    reported in `StepResult.failed` by the steps that were already in flight.
    """

    def __init__(
        self,
        model: Model,
        kv: KVStorage,
        sampler: Sampler,
        *,
        block_size: int,
        matchers: GrammarMatchers | None = None,
        adapters: LoadedAdapters | None = None,
        computes_in_pieces: bool = True,
    ) -> None:
        """Without `matchers` requests with a grammar fail; without `computes_in_pieces` a step that does not fit into
        memory."""
        self._computes_in_pieces = computes_in_pieces
        self._kv = kv
        self._sampler = sampler
        self._program = compile_model(model, kv)
        self._to_numpy = model.kernels.to_numpy
        self._max_logits_rows = model.kernels.max_logits_rows
        self._running: deque[RunningStep] = deque()  # begun and not ended, oldest first
        self._last_end_s = 0.0
        self._rotary_tables = rotary_tables(model.spec)
        self._block_size = block_size
        self._limit = StepLimit()
        self._states = RequestStates(sampler, model.spec.vocab_size, matchers)
        self._masks = GrammarMasks(model.spec.vocab_size, matchers.eos_token_ids if matchers is not None else ())
        self._adapters = adapters

    def run_step(self, batch: ScheduledBatch) -> StepResult:
        """KV operations, then one forward pass, then sampling. Raises what the model or the kernels raise."""
        return self.end_step(self.begin_step(batch))

    def begin_step(self, batch: ScheduledBatch) -> RunningStep:
        """As `run_step`, but where tokens are chosen on a device and nothing here needs them, they are not waited for;
        the step has its result only after `end_step`. Steps are ended in the order in which they began."""
        start_s = time.perf_counter()
        count = len(batch.requests)
        step = RunningStep(batch, start_s, _Answers([()] * count, [None] * count, [None] * count))
        try:
            # First of all: later steps count on it, whatever becomes of this one.
            if batch.kv_ops:
                step.copies = self._kv.move(batch.kv_ops)
            step.kv_copy_s = time.perf_counter() - start_s if batch.kv_ops else 0.0
            step.answers.failed.update(self._states.update(batch))
            rows = self._select_rows(batch, step.answers)
            if rows:
                self._forward(rows, step)
        except BaseException:
            self._break_off(step)
            raise
        self._states.forget(step.answers.failed)
        self._running.append(step)
        if step.samples is None:
            self.end_step(step)
        return step

    def end_step(self, step: RunningStep) -> StepResult:
        """Wait for the tokens of `step` and of those before it. Raises what broke it."""
        while not step.is_done:
            self._end_oldest()
        if step.error is not None:
            raise step.error
        assert step.result is not None
        return step.result

    def _end_oldest(self) -> None:
        step = self._running.popleft()
        answers = step.answers
        try:
            if step.samples is not None:
                self._take_samples(step.rows, step.samples.result(), answers)
            if step.copies is not None and (copied := step.copies.wait()) is not None:
                step.kv_copy_s, step.kv_moved_s = copied.loads_s, copied.loads_s + copied.stores_s
        except BaseException as error:
            self._break_off(step)
            step.error = error
            return
        now_s = time.perf_counter()
        step.result = StepResult(
            step_id=step.batch.step_id,
            sampled_token_ids=tuple(answers.sampled_token_ids),
            logprobs=tuple(answers.logprobs),
            prompt_logprobs=tuple(answers.prompt_logprobs),
            complete_ids=tuple(answers.complete_ids),
            failed=answers.failed or None,
            pooled=answers.pooled or None,
            elapsed_s=now_s - max(step.start_s, self._last_end_s),
            kv_copy_s=step.kv_copy_s,
            kv_moved_s=step.kv_moved_s,
        )
        self._last_end_s = now_s

    def _break_off(self, step: RunningStep) -> None:
        """What a failed step copies from and to has others' blocks next: its copies end first."""
        self._states.forget(scheduled.request_id for scheduled in step.batch.requests)
        if step.copies is not None:
            with suppress(Exception):
                step.copies.wait()

    def _select_rows(self, batch: ScheduledBatch, answers: _Answers) -> list[StepRow]:
        """The requests that can run, with their tokens known."""
        rows = []
        for index, scheduled in enumerate(batch.requests):
            state = self._states.get(scheduled.request_id)
            if state is None:
                continue
            adapter = None
            if state.lora_id:
                adapter = self._adapters.get(state.lora_id) if self._adapters is not None else None
                if adapter is None:
                    answers.failed[scheduled.request_id] = f"the adapter {state.lora_id} is not loaded"
                    continue
            rows.append(StepRow(index, scheduled, state, state.known_token_ids(scheduled), adapter))
        return rows

    def _forward(self, rows: Sequence[StepRow], step: RunningStep) -> None:
        """All at once, or where memory is short in ever smaller pieces; what does not fit alone fails alone."""
        num_tokens = num_tokens_of(rows)
        self._limit.begin_step()
        if fits := self._limit.holds(num_tokens):
            try:
                return self._compute(rows, step)
            except MemoryError:
                if not self._computes_in_pieces:
                    raise
                self._limit.failed(num_tokens)
        while self._running:  # pieces take their tokens from the host
            self._end_oldest()
        for row in rows:
            row.token_ids = row.state.known_token_ids(row.scheduled)
        pieces = [list(rows)] if not fits or num_tokens == 1 else [*reversed(halves(rows))]
        alone: set[tuple[int, int]] = set()
        while pieces:
            piece = [row for row in pieces.pop() if row.scheduled.request_id not in step.answers.failed]
            num_tokens = num_tokens_of(piece)
            if num_tokens > 1 and not self._limit.holds(num_tokens):
                pieces += reversed(halves(piece))
                continue
            try:
                if piece:
                    self._compute(piece, step, is_whole=False)
            except MemoryError:
                self._limit.failed(num_tokens)
                if num_tokens > 1:
                    pieces += reversed(halves(piece))
                elif (piece[0].index, piece[0].end) not in alone:  # once more: others may have had the memory
                    alone.add((piece[0].index, piece[0].end))
                    pieces.append(piece)
                else:
                    step.answers.failed[piece[0].scheduled.request_id] = OUT_OF_MEMORY
        return None

    def _compute(self, rows: Sequence[StepRow], step: RunningStep, *, is_whole: bool = True) -> None:
        """Raises MemoryError, and can be called again for the same rows then, or parts of them."""
        answers = step.answers
        wanted = [not answers.sampled_token_ids[row.index] for row in rows if row.samples]
        sampling_rows = list(compress((row for row in rows if row.samples), wanted))
        # What may follow is known before the logits are: no row with a grammar is late.
        masks = self._masks.start([row.state.grammar for row in sampling_rows])
        batch = prepare_forward_batch(rows, self._rotary_tables, self._block_size)
        self._kv.take_ahead(max(int(group.slot_mapping.max()) for group in batch.groups) // self._block_size)
        self._program.forward(batch, *self._late_inputs(rows, batch))
        for row, start in zip(rows, batch.query_start_loc.tolist(), strict=False):
            if answers.taken.get(row.index, -1) >= row.end:
                continue
            if row.state.sampling.prompt_logprobs is not None:
                self._add_prompt_logprobs(row, start, batch.adapters, answers)
            if row.state.pooler is not None:
                self._pool(row, row.state.pooler, start, batch.adapters, answers)
            answers.taken[row.index] = row.end
        logits_indices = batch.logits_indices[wanted]
        for low in range(0, len(sampling_rows), self._max_logits_rows):
            here = slice(low, low + self._max_logits_rows)
            if self._try_take_greatest(sampling_rows[here], logits_indices[here], batch.adapters, answers):
                continue
            logits = self._program.logits(logits_indices[here], batch.adapters)
            if not (
                is_whole
                and len(sampling_rows) <= self._max_logits_rows
                and self._try_sample_late(sampling_rows, logits, step)
            ):
                self._sample(sampling_rows[here], logits, None if masks is None else masks.result()[here], answers)

    def _try_take_greatest(
        self, rows: Sequence[StepRow], logits_indices: Ints, adapters: Adapters, answers: _Answers
    ) -> bool:
        """The next tokens of `rows` without their logits, where the greatest is all they want of them."""
        if not all(row.state.takes_greatest for row in rows):
            return False
        token_ids = self._program.try_argmax(logits_indices, adapters)
        if token_ids is None:
            return False
        self._take_samples(rows, Samples(token_ids, {}, {}), answers)
        return True

    def _late_inputs(self, rows: Sequence[StepRow], batch: ForwardBatch) -> tuple[Any, Ints | None]:
        """The samples that the last step left on the device, and for each token its row there; see `ops.Program`."""
        if not self._running or PENDING_TOKEN_ID not in batch.token_ids:
            return None, None
        late_rows = np.full(len(batch.token_ids), -1)
        late = np.flatnonzero(batch.token_ids == PENDING_TOKEN_ID)
        owners = np.searchsorted(batch.query_start_loc, late, side="right") - 1
        late_rows[late] = [rows[owner].state.late_row for owner in owners.tolist()]
        batch.token_ids[late] = 0
        samples = self._running[-1].samples
        return (None if samples is None else samples.tokens), late_rows

    def _try_sample_late(self, rows: Sequence[StepRow], logits: Array, step: RunningStep) -> bool:
        """Whether the tokens of `rows`, all of the step's, come later."""
        if not all(row.state.may_be_late for row in rows):
            return False
        samples = self._sampler.try_sample_late(
            logits, [row.state.sampling_row for row in rows], [row.state.num_outputs for row in rows]
        )
        if samples is None:
            return False
        step.rows, step.samples = rows, samples
        for place, row in enumerate(rows):
            row.state.num_late += 1
            row.state.late_row = place
        return True

    def _sample(
        self, rows: Sequence[StepRow], logits: Array, masks: list[TokenMask | None] | None, answers: _Answers
    ) -> None:
        """The next token of each of `rows`, from their logits [S, V] and what their grammars allow."""
        while self._running:  # penalties follow from all tokens before
            self._end_oldest()
        states = [row.state for row in rows]
        picked = picked_logprobs(self._sampler, logits, [state.sampling for state in states])
        samples = self._sampler.sample(
            logits,
            [state.sampling_row for state in states],
            [len(state.output_token_ids) for state in states],
            with_forced_tokens(_without_banned(states, masks), states, logits.shape[1]),
        )
        samples.logprobs.update(with_picked(samples.logprobs, picked))
        self._take_samples(rows, samples, answers)

    def _take_samples(self, rows: Sequence[StepRow], samples: Samples, answers: _Answers) -> None:
        for row, token_id in zip(rows, samples.token_ids, strict=True):
            row.state.num_late = max(0, row.state.num_late - 1)
            if token_id >= 0:
                row.state.add_output(token_id)
                answers.sampled_token_ids[row.index] = (token_id,)
                if row.state.grammar is not None and row.state.grammar.is_complete:
                    answers.complete_ids.append(row.scheduled.request_id)
        for i, problem in samples.problems.items():
            request_id, state = rows[i].scheduled.request_id, rows[i].state
            answers.failed[request_id] = (state.grammar and state.grammar.problem) or problem
            self._states.forget_failed(request_id, state)
        for i, logprobs in samples.logprobs.items():
            answers.logprobs[rows[i].index] = (logprobs,)

    def _pool(self, row: StepRow, pooler: Pooler, start: int, adapters: Adapters, answers: _Answers) -> None:
        """Hand the hidden states of this step to a pooling request; `start` is its first row."""
        request_id, num_rows = row.scheduled.request_id, len(row.token_ids)
        if pooler.params.needs_all_tokens and pooler.num_tokens != row.scheduled.num_computed_tokens:
            answers.failed[request_id] = "tokens that pooling needs were taken from the cache"
            return
        hidden = self._program.hidden(start, num_rows)
        pooler.add(hidden)
        if row.scheduled.samples:
            logits = None
            if pooler.reads_logits:
                try:
                    found = self._program.logits(np.array([start + num_rows - 1]), adapters)
                except MemoryError:  # its pooler cannot be given these again
                    answers.failed[request_id] = OUT_OF_MEMORY
                    return
                logits = (found if isinstance(found, np.ndarray) else self._to_numpy(found))[0]
            values = pooler.finish(logits)
            if np.isfinite(values).all():
                answers.pooled[request_id] = values.astype("<f4").tobytes()
            else:
                answers.failed[request_id] = "the model's hidden states are not finite"

    def _add_prompt_logprobs(self, row: StepRow, start: int, adapters: Adapters, answers: _Answers) -> None:
        """Logprobs of the prompt tokens that follow this step's positions; `start` is the request's first row."""
        first = row.scheduled.num_computed_tokens + 1
        targets = row.state.prompt_token_ids[first : first + len(row.token_ids)]
        num_top = row.state.sampling.prompt_logprobs or 0
        entries: list[TokenLogprobs] = []
        for low in range(0, len(targets), self._max_logits_rows):
            targets_here = targets[low : low + self._max_logits_rows]
            logits = self._program.logits(np.arange(start + low, start + low + len(targets_here)), adapters)
            found = self._sampler.token_logprobs(logits, targets_here, num_top)
            if found is None:
                answers.failed[row.scheduled.request_id] = "the model's logits for the prompt are not finite"
                return
            entries += found
        answers.prompt_logprobs[row.index] = (*(answers.prompt_logprobs[row.index] or ()), *entries)


def with_forced_tokens(
    masks: list[TokenMask | None] | None, states: Sequence[RequestState], vocab_size: int
) -> list[TokenMask | None] | None:
    """`masks`, but for rows whose thinking budget is spent: those are left the one token that ends it."""
    for i, state in enumerate(states):
        if state.thinking is not None and (token_id := state.thinking.forced_token_id()) is not None:
            masks = masks or [None] * len(states)
            masks[i] = only(token_id, vocab_size)
    return masks


def _without_banned(
    states: Sequence[RequestState], masks: list[TokenMask | None] | None
) -> list[TokenMask | None] | None:
    """The grammars' masks without tokens that would complete a banned word."""
    if all(state.banned is None for state in states):
        return masks
    known = masks or [None] * len(states)
    return [
        mask if state.banned is None else state.banned.narrow(mask, state.output_token_ids)
        for state, mask in zip(states, known, strict=True)
    ]
