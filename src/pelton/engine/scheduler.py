"""`Scheduler`: which tokens of which requests make the next step (laws 1 and 2).

One token budget a step, spent as in Sarathi-Serve (Algorithm 3): requests that want one token, then
those that want more (chunks of prompts, recompute after preemption), then new requests. There is no
prefill or decode phase: each request's `num_computed_tokens` catches up with its `num_tokens`.
Order, victims and charges belong to the policy, blocks to the KV manager.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pelton.core.batch import PENDING_TOKEN_ID, KVOp, RequestContext, ScheduledBatch, ScheduledRequest, StepResult
from pelton.core.events import EventKind, RequestEvent
from pelton.core.protocols import Clock, SchedulingPolicy
from pelton.core.request import Request, RequestStatus
from pelton.engine.kv.manager import KVManager, PrefixMatch

# How far past a request that does not fit the waiting line is searched, and how many may overtake it.
MAX_LOOKAHEAD = 8
MAX_OVERTAKEN = 64
_ONE_PENDING = (PENDING_TOKEN_ID,)


@dataclass(slots=True)
class SchedulerCounters:
    """Only grow; read by the engine's statistics."""

    num_prefix_queries: int = 0
    num_prefix_hits: int = 0
    num_preemptions: int = 0
    num_recomputed_tokens: int = 0
    num_prompt_tokens: int = 0


@dataclass(slots=True)
class _Step:
    """The batch being made."""

    num_budget_tokens: int
    scheduled: list[ScheduledRequest] = field(default_factory=list)
    kv_ops: list[KVOp] = field(default_factory=list)
    starts: dict[str, int] = field(default_factory=dict)  # request id -> first position computed in this step


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
    ) -> None:
        self.policy = policy
        self.kv = kv
        self.clock = clock
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_chunk = long_prefill_chunk or max_num_batched_tokens
        self.requests: dict[str, Request] = {}  # all that have not ended
        self.running: list[Request] = []  # in order of admission
        self.counters = SchedulerCounters()
        self.events: list[RequestEvent] = []  # taken by the engine after every step
        self._ended_ids: list[str] = []  # told to the worker with the next batch
        self._preempted_ids: list[str] = []
        self._num_steps = 0
        self._blocked_id = ""
        self._num_overtaken = 0

    # -- requests come and go ---------------------------------------------------------------------

    def add(self, request: Request) -> None:
        self.kv.prepare(request)
        self.requests[request.request_id] = request
        self.policy.add(request)

    def remove(self, request: Request) -> None:
        """The request has ended, for whatever reason; its blocks are free at once."""
        if self.requests.pop(request.request_id, None) is not None:  # else it was never added
            self.policy.finish(request)
            if request.status is RequestStatus.RUNNING:
                self.running.remove(request)
                self.kv.free(request)
                self._ended_ids.append(request.request_id)
        request.status = RequestStatus.FINISHED

    # -- a step -----------------------------------------------------------------------------------

    def schedule(self) -> ScheduledBatch | None:
        """The next step, or None where nothing can be computed now."""
        step = _Step(self.max_num_batched_tokens)
        one_token: list[tuple[Request, int]] = []
        many_tokens: list[tuple[Request, int]] = []
        for request in self.running:
            num_wanted = self._num_wanted(request)
            if num_wanted == 1:
                one_token.append((request, 1))
            elif num_wanted:
                many_tokens.append((request, num_wanted))
        num_preemptions = self.counters.num_preemptions
        for request, num_wanted in one_token + many_tokens:
            if step.num_budget_tokens == 0:
                break
            if request.status is RequestStatus.RUNNING:  # and not a victim of this very step
                self._continue(request, num_wanted, step)
        calm = self.counters.num_preemptions == num_preemptions or not step.scheduled
        if calm and len(self.policy):
            self._admit_waiting(step)
        if not step.scheduled:
            return None
        self._num_steps += 1
        preempted_ids, self._preempted_ids = self._preempted_ids, []
        ended_ids, self._ended_ids = self._ended_ids, []
        return ScheduledBatch(
            self._num_steps, tuple(step.scheduled), tuple(step.kv_ops), tuple(preempted_ids), tuple(ended_ids)
        )

    def _num_wanted(self, request: Request) -> int:
        # The last token a request may have is never computed: nothing follows it.
        num_tokens, most = request.num_tokens, request.max_num_tokens - 1
        return (num_tokens if num_tokens < most else most) - request.num_computed_tokens

    def _continue(self, request: Request, num_wanted: int, step: _Step) -> None:
        num_tokens = num_wanted if num_wanted == 1 else min(num_wanted, step.num_budget_tokens, self.max_chunk)
        while (kv_ops := self.kv.try_extend(request, num_tokens)) is None:
            candidates = [other for other in self.running if other.request_id not in step.starts]
            victim = self.policy.choose_victim(candidates, request) or request
            self._preempt(victim)
            if victim is request:
                return
        self._choose(request, num_tokens, kv_ops, step)

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self.counters.num_preemptions += 1
        self._record(request, EventKind.PREEMPTED, request.num_computed_tokens)
        request.num_preemptions += 1
        request.num_lost_tokens = request.num_computed_tokens
        request.status = RequestStatus.PREEMPTED
        self.kv.free(request)
        self._preempted_ids.append(request.request_id)
        self.policy.preempt(request)

    def _admit_waiting(self, step: _Step) -> None:
        # Kept for the running: what their known tokens still need, and one block each to go on.
        num_reserved = sum(self._num_unreached_blocks(request) + 1 for request in self.running)
        num_refused = 0
        for request in self.policy.waiting():
            if step.num_budget_tokens == 0 or len(self.running) >= self.max_num_seqs:
                break
            if self._try_admit(request, num_reserved, step):
                num_reserved += self._num_unreached_blocks(request) + 1
                self._num_overtaken += num_refused > 0
                continue
            num_refused += 1
            if num_refused == 1 and request.request_id != self._blocked_id:
                self._blocked_id, self._num_overtaken = request.request_id, 0
            # Smaller requests may pass one that does not fit, but not for ever (law 6).
            if num_refused == MAX_LOOKAHEAD or self._num_overtaken >= MAX_OVERTAKEN:
                break

    def _try_admit(self, request: Request, num_reserved_blocks: int, step: _Step) -> bool:
        if request.num_steps_in_flight:  # preempted while a step computes it: its result must not count for new blocks
            return False
        match = self._match_leader(request, step) or self.kv.match(request)
        if not self.kv.can_admit(request, match, num_reserved_blocks):
            return False
        self.kv.admit(request, match)
        num_tokens = min(self._num_wanted(request), step.num_budget_tokens, self.max_chunk)
        kv_ops = self.kv.try_extend(request, num_tokens)
        if kv_ops is None:
            self.kv.free(request)
            return False
        self._count_admission(request, match.num_tokens)
        self.policy.admit(request, match.num_tokens)
        self.running.append(request)
        request.status = RequestStatus.RUNNING
        context = RequestContext(
            tuple(request.prompt_token_ids), tuple(request.output_token_ids), request.sampling.seed or 0
        )
        self._choose(request, num_tokens, kv_ops, step, context)
        return True

    def _match_leader(self, request: Request, step: _Step) -> PrefixMatch | None:
        leader = self.requests.get(request.fork_of) if request.fork_of else None
        if leader is None:
            return None
        # Copies come before the step's own writes: only what earlier steps computed can be shared.
        num_written = step.starts.get(leader.request_id, leader.num_computed_tokens)
        return self.kv.match_leader(request, leader, num_written)

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
        if request.num_tokens - request.num_computed_tokens <= 1:
            return 0
        return self.kv.num_blocks_to_reach(request, request.num_tokens)

    def _choose(
        self, request: Request, num_tokens: int, kv_ops: list[KVOp], step: _Step, context: RequestContext | None = None
    ) -> None:
        start = request.num_computed_tokens
        end = start + num_tokens
        if request.scheduled_block_tables is None:
            request.scheduled_block_tables = tuple(map(tuple, request.block_tables))
        num_known = len(request.prompt_token_ids) + len(request.output_token_ids)
        samples = end == num_known + request.num_pending_tokens
        token_ids = _ONE_PENDING if start >= num_known and num_tokens == 1 else self._token_ids(request, start, end)
        request.num_computed_tokens = end
        request.num_pending_tokens += samples
        request.num_steps_in_flight += 1
        step.num_budget_tokens -= num_tokens
        step.starts[request.request_id] = start
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
        grown = []
        failed_ids = result.failed or {}
        alive, commit, charge = self.requests, self.kv.commit, self.policy.charge
        for row, (scheduled, sampled) in enumerate(zip(batch.requests, result.sampled_token_ids, strict=True)):
            request_id, token_ids, start = scheduled[:3]
            request = alive.get(request_id)
            if request is None:  # ended while the step ran
                continue
            num_tokens, num_sampled = len(token_ids), len(sampled)
            request.num_steps_in_flight -= 1
            request.num_pending_tokens -= scheduled.samples
            request.output_token_ids += sampled
            # What a failed request computed (NaN, say) must not be found by others.
            if request.status is RequestStatus.RUNNING and request_id not in failed_ids:
                commit(request, start, start + num_tokens)
            if sampled:
                charge(request, num_sampled)
                grown.append((request, row))
        return grown

    def _record(self, request: Request, kind: EventKind, num_tokens: int) -> None:
        self.events.append(RequestEvent(request.request_id, kind, self.clock.now_s(), num_tokens))
