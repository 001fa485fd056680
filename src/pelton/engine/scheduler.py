"""`Scheduler`: which tokens of which requests make the next step (laws 1 and 2).

One token budget a step, spent as in Sarathi-Serve (Algorithm 3): requests that want one token, then
those that want more (chunks of prompts, recompute after preemption), then new requests. There is no
prefill or decode phase: each request's `num_computed_tokens` catches up with its `num_tokens`.
Order, victims and charges belong to the policy, blocks to the KV manager.
"""

from __future__ import annotations

import logging
from collections import deque

from pelton.core.batch import PENDING_TOKEN_ID, KVOp, RequestContext, ScheduledBatch, ScheduledRequest, StepResult
from pelton.core.events import EventKind, RequestEvent
from pelton.core.protocols import Clock, SchedulingPolicy
from pelton.core.request import Request, RequestStatus
from pelton.engine.background import takers
from pelton.engine.kv.manager import KVManager
from pelton.engine.kv.prefix_match import PrefixMatch
from pelton.engine.step import Row, SchedulerCounters, Step
from pelton.engine.step_budget import FixedBudget, StepBudget

# How far past a request that does not fit the waiting line is searched, and how many may overtake it.
MAX_LOOKAHEAD = 8
MAX_OVERTAKEN = 64
# Steps after which refused requests are tried again though there is no more room: more of a prefix may be cached.
REFUSED_STEPS = 8
# Blocks on their way to disk that are copied to host memory in a step, and in one that has nothing to compute.
SAVED_PER_STEP = 8
SAVED_WHEN_IDLE = 64
_log = logging.getLogger("pelton.engine")
_RUNNING = RequestStatus.RUNNING
_FINISHED = RequestStatus.FINISHED
_new = tuple.__new__  # a `NamedTuple` without the checks of its constructor
_ONE_PENDING = (PENDING_TOKEN_ID,)


class Scheduler:
    def __init__(
        self,
        policy: SchedulingPolicy,
        kv: KVManager,
        clock: Clock,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        long_prefill_chunk: int | None = None,
        budget: StepBudget | None = None,
    ) -> None:
        self.policy = policy
        self.kv = kv
        self.clock = clock
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.budget = budget or FixedBudget(max_num_batched_tokens)
        self.max_chunk = long_prefill_chunk or max_num_batched_tokens
        self.requests: dict[str, Request] = {}  # all that have not ended
        self.running: list[Request] = []  # in order of admission
        self.counters = SchedulerCounters()
        self.events: list[RequestEvent] = []  # taken by the engine after every step
        self._ended_ids: list[str] = []  # told to the worker with the next batch
        self._preempted_ids: list[str] = []
        self._num_steps = self._num_background = 0  # steps made, background requests that have not ended
        self._in_flight: deque[tuple[int, list[Row]]] = deque()  # by step id, oldest first
        self._refused_room = 0  # free blocks when waiting requests were last refused
        self._refused_until_step = 0

    # -- requests come and go ---------------------------------------------------------------------

    def add(self, request: Request) -> None:
        self.kv.prepare(request)
        self.requests[request.request_id] = request
        self._num_background += request.is_background
        self.policy.add(request)
        self._refused_until_step = 0

    def remove(self, request: Request) -> None:
        """The request has ended, for whatever reason; its blocks are free at once."""
        if self.requests.pop(request.request_id, None) is not None:  # else it was never added
            self._num_background -= request.is_background
            self.policy.finish(request)
            self._refused_until_step = 0
            self.kv.forget(request)
            if request.status is RequestStatus.RUNNING:
                self.running.remove(request)
                self.kv.free(request)
                self._ended_ids.append(request.request_id)
        request.status = RequestStatus.FINISHED

    # -- a step -----------------------------------------------------------------------------------

    def schedule(self) -> ScheduledBatch | None:
        """The next step, or None where nothing can be computed now."""
        step = Step(self.max_num_batched_tokens)
        num_preemptions = self.counters.num_preemptions
        step.chunks = self._continue_decodes(step)
        num_decodes = len(step.scheduled)
        num_tokens = min(self.max_num_batched_tokens, self.budget.num_tokens(num_decodes)) - num_decodes
        step.num_budget_tokens = self.policy.narrow(num_tokens)
        if len(step.chunks) > 1:
            self.policy.order(step.chunks)
        for request in tuple(step.chunks):
            if not step.has_refused and len(self.policy) and self.counters.num_preemptions == num_preemptions:
                num_running = len(self.running)
                self._admit_waiting(step, request)
                if len(self.running) > num_running:  # who goes ahead is not slowed by what it has passed
                    step.is_closed = True
                    break
            self._continue(request, step)
        calm = self.counters.num_preemptions == num_preemptions or not step.scheduled
        if calm and not step.is_closed and len(self.policy):
            self._admit_waiting(step)
        step.kv_ops += self.kv.take_moves(SAVED_PER_STEP if step.scheduled else SAVED_WHEN_IDLE)
        if not step.scheduled and not step.kv_ops:
            return None
        self._num_steps += 1
        self._in_flight.append((self._num_steps, step.rows))
        preempted_ids, self._preempted_ids = self._preempted_ids, []
        ended_ids, self._ended_ids = self._ended_ids, []
        return ScheduledBatch(
            self._num_steps, tuple(step.scheduled), tuple(step.kv_ops), tuple(preempted_ids), tuple(ended_ids)
        )

    def _continue_decodes(self, step: Step) -> list[Request]:
        """Choose the requests that want one token; returns those that want more.

        Runs for every request of every step: `_continue` in line for the usual one, whose token goes to a
        block that it has already.
        """
        chunks: list[Request] = []
        append, append_row = step.scheduled.append, step.rows.append
        for request in takers(self.running, self._num_background, self._num_steps):
            start = request.num_computed_tokens
            outputs = request.output_token_ids
            num_known = len(request.prompt_token_ids) + len(outputs)
            num_pending = request.num_pending_tokens
            num_tokens = num_known + num_pending
            if start + 1 != num_tokens or start >= request.num_writable_tokens:
                num_wanted = self._num_wanted(request)
                if num_wanted > 1:
                    chunks.append(request)
                elif num_wanted:
                    self._continue(request, step)
            elif num_tokens < request.max_num_tokens and step.num_budget_tokens:
                tables = request.scheduled_block_tables
                if tables is None or not outputs:
                    self._continue(request, step)
                    continue
                token_ids = _ONE_PENDING if start >= num_known else (outputs[-1],)
                request.num_kv_tokens = request.num_computed_tokens = num_tokens
                request.num_pending_tokens = num_pending + 1
                request.num_steps_in_flight += 1
                step.num_budget_tokens -= 1
                entry = (request.request_id, token_ids, start, tables, request.sampling, True, (), None)
                append(_new(ScheduledRequest, entry))
                append_row((request, start, num_tokens, True))
        return chunks

    def _num_wanted(self, request: Request) -> int:
        # The last token a request may have is never computed: nothing follows it.
        return min(request.num_tokens, request.max_num_tokens - 1) - request.num_computed_tokens

    def _continue(self, request: Request, step: Step) -> None:
        if not step.num_budget_tokens or request.status is not RequestStatus.RUNNING:  # a victim of this very step
            return
        num_wanted = self._num_wanted(request)
        num_tokens = num_wanted if num_wanted == 1 else min(num_wanted, step.num_budget_tokens, self.max_chunk)
        while (kv_ops := self.kv.try_extend(request, num_tokens)) is None:
            if not self._make_room(request, step):
                return
        self._choose(request, num_tokens, kv_ops, step)

    def _make_room(self, request: Request, step: Step) -> bool:
        """Preempt somebody so that `request` can go on; False: it cannot, in this step."""
        candidates = [
            other
            for other in self.running
            if (not other.num_preemptions or step.has_progressed(other)) and other is not request
        ]
        victim = self.policy.choose_victim(candidates, request)
        if victim is None and not step.has_progressed(request):
            # It waits with what it has while others go on: nobody is preempted twice for nothing.
            if step.scheduled or any(other.num_steps_in_flight for other in self.running):
                return False
            victim = candidates[-1] if candidates else request
        victim = victim or request
        self._withdraw(victim, step)
        self._preempt(victim, request)
        return victim is not request

    def _withdraw(self, request: Request, step: Step) -> None:
        """Undo `_choose`. Copies made for the request stay: nobody reads where they go before writing it."""
        row = step.withdraw(request)
        if row is not None:
            _, start, end, samples = row
            step.num_budget_tokens += end - start
            request.num_computed_tokens = start
            request.num_pending_tokens -= samples
            request.num_steps_in_flight -= 1

    def _preempt(self, request: Request, beneficiary: Request) -> None:
        num_lost = request.num_computed_tokens
        self.running.remove(request)
        self.counters.num_preemptions += 1
        whom = "itself" if request is beneficiary else f"{beneficiary.request_id} (tenant {beneficiary.tenant_id})"
        self._record(request, EventKind.PREEMPTED, num_lost, f"no free KV block for {whom}")
        _log.info(
            "preempted %s (tenant %s): no free KV block for %s; up to %d tokens will be computed again",
            request.request_id,
            request.tenant_id,
            whom,
            num_lost,
        )
        request.num_preemptions += 1
        request.num_lost_tokens = num_lost
        request.status = RequestStatus.PREEMPTED
        self.kv.preempt(request)
        self._preempted_ids.append(request.request_id)
        self.policy.preempt(request)
        self._refused_until_step = 0

    def _admit_waiting(self, step: Step, ahead_of: Request | None = None) -> None:
        """Start waiting requests; with `ahead_of` only those that the policy puts before that one's next chunk."""
        if not step.num_budget_tokens or len(self.running) >= self.max_num_seqs:
            return
        # Kept for the running: what their known tokens still need, and one block each to go on.
        num_reserved = len(self.running) + sum(map(self._num_unreached_blocks, step.chunks))
        room = self.kv.pool.num_available - num_reserved
        if room <= self._refused_room and self._num_steps < self._refused_until_step and self.running:
            return  # what was refused lately would be refused again
        num_refused, refused_first, is_memory_short = 0, None, True
        for request in self.policy.waiting():
            if ahead_of is not None and not self.policy.precedes(request, ahead_of):
                break
            if self._try_admit(request, num_reserved, step):
                num_reserved += self._num_unreached_blocks(request) + 1
                step.chunks.append(request)
                if refused_first is not None:
                    refused_first.num_overtaken += 1
                if not step.num_budget_tokens or len(self.running) >= self.max_num_seqs:
                    break
                continue
            step.has_refused = True
            refused_first = refused_first or request
            num_refused += 1
            is_memory_short = is_memory_short and not request.num_steps_in_flight
            # Smaller requests may pass one that does not fit, but not for ever (law 6).
            if num_refused == MAX_LOOKAHEAD or refused_first.num_overtaken >= MAX_OVERTAKEN:
                break
        if num_refused and is_memory_short and ahead_of is None:
            self._refused_room = self.kv.pool.num_available - num_reserved
            self._refused_until_step = self._num_steps + REFUSED_STEPS

    def _try_admit(self, request: Request, num_reserved_blocks: int, step: Step) -> bool:
        if request.num_steps_in_flight:  # preempted while a step computes it: its result must not count for new blocks
            return False
        match = self._match_leader(request, step) or self.kv.match(request)
        if not self.kv.can_admit(request, match, num_reserved_blocks):
            return False
        self.kv.admit(request, match)
        num_tokens = min(self._num_wanted(request), step.num_budget_tokens, self.max_chunk)
        kv_ops = self.kv.try_extend(request, num_tokens)
        if kv_ops is None:
            self.kv.preempt(request)
            return False
        self._count_admission(request, match.num_tokens)
        self.policy.admit(request, match.num_tokens)
        self.running.append(request)
        request.status = RequestStatus.RUNNING
        context = RequestContext(
            tuple(request.prompt_token_ids),
            tuple(request.output_token_ids),
            request.sampling.seed or 0,
            request.lora_id,
        )
        self._choose(request, num_tokens, kv_ops, step, context)
        return True

    def _match_leader(self, request: Request, step: Step) -> PrefixMatch | None:
        leader = self.requests.get(request.fork_of) if request.fork_of else None
        if leader is None:
            return None
        # Copies come before the step's own writes: only what earlier steps computed can be shared.
        return self.kv.match_leader(request, leader, step.start_of(leader))

    def _count_admission(self, request: Request, num_matched_tokens: int) -> None:
        if request.num_preemptions:
            self.counters.num_recomputed_tokens += max(0, request.num_lost_tokens - num_matched_tokens)
        elif request.fork_of is None:
            request.num_cached_tokens = num_matched_tokens
            self.counters.num_prefix_queries += request.num_prompt_tokens
            self.counters.num_prefix_hits += num_matched_tokens
            self.counters.num_prompt_tokens += request.num_prompt_tokens
        self._record(request, EventKind.SCHEDULED, num_matched_tokens)

    def _num_unreached_blocks(self, request: Request) -> int:
        if request.status is not _RUNNING or request.num_remaining_tokens <= 1:
            return 0
        return self.kv.num_blocks_to_reach(request, request.num_tokens)

    def _choose(
        self, request: Request, num_tokens: int, kv_ops: list[KVOp], step: Step, context: RequestContext | None = None
    ) -> None:
        start = request.num_computed_tokens
        end = start + num_tokens
        if request.scheduled_block_tables is None:
            request.scheduled_block_tables = tuple(map(tuple, request.block_tables))
        num_known = len(request.prompt_token_ids) + len(request.output_token_ids)
        samples = end == num_known + request.num_pending_tokens
        token_ids = _ONE_PENDING if start >= num_known and num_tokens == 1 else self._token_ids(request, start, end)
        if start < request.num_prompt_tokens:
            self._charge_prompt(request, end)
        request.num_computed_tokens = end
        request.num_pending_tokens += samples
        request.num_steps_in_flight += 1
        step.num_budget_tokens -= num_tokens
        step.rows.append((request, start, end, samples))
        if kv_ops:
            step.kv_ops += kv_ops
        step.scheduled.append(
            ScheduledRequest(
                request.request_id,
                token_ids,
                start,
                request.scheduled_block_tables,
                request.sampling,
                samples,
                (),
                context,
            )
        )

    def _charge_prompt(self, request: Request, end: int) -> None:
        start = max(request.num_computed_tokens, request.num_charged_tokens)
        end = min(end, request.num_prompt_tokens)
        if end > start:
            request.num_charged_tokens = end
            self.policy.charge_prefill(request, end - start)

    def _token_ids(self, request: Request, start: int, end: int) -> tuple[int, ...]:
        num_known = request.num_known_tokens
        if start >= num_known:
            return (PENDING_TOKEN_ID,) * (end - start)
        known = request.known_token_ids(start, min(end, num_known))
        return (*known, *(PENDING_TOKEN_ID,) * (end - start - len(known)))

    # -- and its result ---------------------------------------------------------------------------

    def update(self, batch: ScheduledBatch, result: StepResult) -> list[tuple[Request, int]]:
        """Take a step's result: publish its KV, append its tokens.

        Returns each request that is still alive and got tokens, with its row in the batch.
        """
        if batch.requests:  # and not blocks on their way to disk alone
            self.budget.observe(batch, result.elapsed_s - result.kv_copy_s)
        grown = []
        failed_ids = result.failed or {}
        commit, block_size = self.kv.commit, self.kv.block_size
        num_output_tokens: dict[str, int] = {}  # by tenant
        while self._in_flight[0][0] != batch.step_id:  # steps that failed
            self._in_flight.popleft()
        rows = self._in_flight.popleft()[1]
        for index, ((request, start, end, samples), sampled) in enumerate(
            zip(rows, result.sampled_token_ids, strict=True)
        ):
            if request.status is _FINISHED:  # while the step ran
                continue
            request.num_steps_in_flight -= 1
            request.num_pending_tokens -= samples
            # What a failed request computed (NaN, say) must not be found by others.
            fills_block = start // block_size != end // block_size
            if sampled:
                request.output_token_ids += sampled
                tenant_id = request.tenant_id
                num_output_tokens[tenant_id] = num_output_tokens.get(tenant_id, 0) + len(sampled)
                grown.append((request, index))
            if fills_block and request.status is _RUNNING and request.request_id not in failed_ids:
                commit(request, start, end)
        for tenant_id, number in num_output_tokens.items():
            self.policy.charge(tenant_id, number)
        return grown

    def _record(self, request: Request, kind: EventKind, num_tokens: int, detail: str = "") -> None:
        self.events.append(RequestEvent(request.request_id, kind, self.clock.now_s(), num_tokens, detail))
