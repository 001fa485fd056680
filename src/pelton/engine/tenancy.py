"""`Tenancy`: what the engine knows of those it serves: bounds on what they send, sessions, pins.

The engine tells it what happens to a request; it refuses, remembers and answers questions, and decides nothing
about what runs next.
"""

from __future__ import annotations

import contextlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping

from pelton.core.batch import ScheduledBatch, StepResult
from pelton.core.errors import ConfigError, DeadlineUnreachableError, QueueFullError, TenantLimitError
from pelton.core.events import EngineInfo
from pelton.core.protocols import Clock
from pelton.core.request import FinishReason, Request, Submission
from pelton.core.session import TenancyStats, TenantInfo
from pelton.core.tenant import Tenants
from pelton.engine.kv.costs import KVCosts
from pelton.engine.kv.pins import PinTable
from pelton.engine.load import Load
from pelton.engine.scheduler import Scheduler
from pelton.engine.sessions import Sessions
from pelton.engine.wire import (
    DeleteSession,
    DescribeTenants,
    ListSessions,
    SessionDeleted,
    SessionList,
    TenancyQuery,
    TenancyReply,
    TenantReport,
)

# The part of the queue (one in so many places) that tenants without a bound of their own leave to others.
PART_FOR_OTHERS = 5
OTHERS_WINDOW_S = 60.0
MAX_TENANTS_SEEN = 1024
# Looking for pins that have to yield takes as long as scheduling does, so steps that go on without it are let go on.
STEPS_BETWEEN_TRIES = 8


class Tenancy:
    def __init__(self, scheduler: Scheduler, clock: Clock, info: EngineInfo, tenants: Tenants, costs: KVCosts) -> None:
        self.costs = costs
        self.pins = PinTable(scheduler.kv.pool, tenants, clock, self._charge_kv)
        self.sessions = Sessions(scheduler.kv, clock, costs, self.pins)
        self.load = Load(costs, max_num_seqs=info.max_num_seqs, max_num_batched_tokens=info.max_num_batched_tokens)
        self._scheduler = scheduler
        self._clock = clock
        self._info = info
        self._tenants = tenants
        self._num_alive: Counter[str] = Counter()
        self._seen_s: OrderedDict[str, float] = OrderedDict()  # tenant -> latest arrival, refused ones too
        self._num_steps_to_skip = 0
        self._pinned_block_s: OrderedDict[str, float] = OrderedDict()
        scheduler.kv.pins = self.pins

    # -- admission --------------------------------------------------------------------------------

    def admit(self, submission: Submission, make: Callable[[], list[Request]]) -> list[Request]:
        """The submission's requests, with their session and program, as `make` makes them.

        Raises `QueueFullError`, or one of its kinds: the tenant's own bound, a deadline out of reach.
        """
        now_s = self._clock.now_s()
        self._see(submission.tenant_id, now_s)
        self._check_room(submission, now_s)
        requests = make()
        first = requests[0]
        self._scheduler.kv.prepare(first)
        num_tokens = first.num_prompt_tokens - self._scheduler.kv.match(first).num_tokens
        self._check_deadline(submission, num_tokens, now_s)
        if submission.sampling.pooling is None:  # an embedding is no turn of a conversation
            self.sessions.arrive(submission, requests)
        for request in requests:
            self._num_alive[request.tenant_id] += 1
            self.load.add(request, num_tokens if request is first else 0)
        return requests

    def set_tenant(self, tenant_id: str, changes: Mapping[str, int | float]) -> None:
        """Settings that cannot be are not taken; whoever changes them has checked them."""
        with contextlib.suppress(ConfigError):
            self._tenants.change(tenant_id, changes)
            self._scheduler.policy.settings_changed(tenant_id)

    def _see(self, tenant_id: str, now_s: float) -> None:
        self._seen_s[tenant_id] = now_s
        self._seen_s.move_to_end(tenant_id)
        if len(self._seen_s) > MAX_TENANTS_SEEN:
            self._seen_s.popitem(last=False)

    def _has_others(self, tenant_id: str, now_s: float) -> bool:
        latest_s = next((seen_s for other, seen_s in reversed(self._seen_s.items()) if other != tenant_id), None)
        return latest_s is not None and latest_s > now_s - OTHERS_WINDOW_S

    def _check_room(self, submission: Submission, now_s: float) -> None:
        tenant_id, num_new = submission.tenant_id, submission.sampling.n
        capacity = self._info.max_num_seqs + self._info.max_num_waiting
        excess = self._num_alive.total() + num_new - capacity
        if excess > 0:
            raise QueueFullError(
                f"{self._num_alive.total()} requests are running or waiting, as many as allowed; try again later",
                retry_after_s=self.load.rate.time_for_s(excess, now_s),
            )
        excess = self._num_alive[tenant_id] + num_new - self._bound_of(tenant_id, capacity, now_s)
        if excess > 0:
            raise TenantLimitError(
                f"tenant {tenant_id} has {self._num_alive[tenant_id]} requests running or waiting, as many as it "
                "may; try again later",
                retry_after_s=self.load.rate.time_for_s(excess, now_s),
            )

    def _bound_of(self, tenant_id: str, capacity: int, now_s: float) -> int:
        """Most requests of a tenant at one time.

        Where several tenants have come lately, the last places are for those who have few requests here, so that
        no one and no two of them keep the others out.
        """
        settings = self._tenants.of(tenant_id)
        if settings.max_num_waiting is not None:
            return (settings.max_num_running or self._info.max_num_seqs) + settings.max_num_waiting
        num_kept = self._info.max_num_waiting // PART_FOR_OTHERS
        if not num_kept or not self._has_others(tenant_id, now_s):
            return capacity
        num_free = capacity - num_kept - self._num_alive.total()
        return max(num_kept // 2, self._num_alive[tenant_id] + num_free)

    def _check_deadline(self, submission: Submission, num_tokens: int, now_s: float) -> None:
        if submission.timeout_s is None or not self._num_alive:
            return  # an idle engine always tries: it may have been measured at a bad moment
        num_running = len(self._scheduler.running)
        first_token_s = self.load.first_token_s(submission.tenant_id, num_tokens, num_running, now_s)
        if first_token_s is not None and first_token_s > submission.timeout_s:
            raise DeadlineUnreachableError(
                f"the first token could come in {first_token_s:.1f} s at best, after the deadline of "
                f"{submission.timeout_s:g} s; try again later, or allow more time",
                retry_after_s=max(1.0, first_token_s - submission.timeout_s),
            )

    # -- what happens to requests -----------------------------------------------------------------

    def scheduled(self, batch: ScheduledBatch) -> None:
        """A step has been made; requests that come with a context have just been admitted."""
        for scheduled in batch.requests:
            if scheduled.context is not None:
                self.load.admitted(scheduled.request_id)
                self.sessions.admitted(scheduled.request_id)

    def make_room(self) -> bool:
        """After a step was made: end the pins that have to yield to the first of those still waiting."""
        scheduler = self._scheduler
        if not len(self.pins) or not len(scheduler.policy) or len(scheduler.running) >= self._info.max_num_seqs:
            return False
        if scheduler.running and self._num_steps_to_skip:
            self._num_steps_to_skip -= 1
            return False
        head = next(iter(scheduler.policy.waiting()), None)
        if head is None or head.num_steps_in_flight:
            return False
        kv = scheduler.kv
        # As the scheduler reserves: what prompts under way still need, and a block each to go on.
        num_reserved = len(scheduler.running) + sum(
            kv.num_blocks_to_reach(other, other.num_tokens)
            for other in scheduler.running
            if other.num_computed_tokens + 1 < other.num_prompt_tokens
        )
        num_short = kv.num_blocks_short(head, kv.match(head), num_reserved)
        has_yielded = num_short > 0 and self.pins.try_yield_to_head(head, num_short, is_idle=not scheduler.running)
        self._num_steps_to_skip = 0 if has_yielded else STEPS_BETWEEN_TRIES
        return has_yielded

    def computed(self, batch: ScheduledBatch, result: StepResult) -> None:
        """A step has run; called before its tokens are appended."""
        self.costs.prefill.observe_step(batch, result.elapsed_s - result.kv_copy_s)
        pending = self.load.pending
        for scheduled in batch.requests:
            if scheduled.request_id in pending:
                self.load.computed(scheduled.request_id, len(scheduled.token_ids))

    def ended(self, request: Request, reason: FinishReason) -> float:
        """A request ends and still holds its blocks. Returns how long they are kept, in seconds; 0: not at all."""
        tenant_id = request.tenant_id
        self.load.remove(request.request_id)
        self.load.rate.count(self._clock.now_s())
        self._num_alive[tenant_id] -= 1
        if not self._num_alive[tenant_id]:
            del self._num_alive[tenant_id]
        others = sum(other.num_computed_tokens for other in self._scheduler.running if other is not request)
        is_complete = reason in (FinishReason.STOP, FinishReason.LENGTH)
        return self.sessions.end(request, is_complete=is_complete, num_other_tokens=others)

    def expire(self) -> None:
        self.sessions.expire()

    @property
    def next_expiry_s(self) -> float | None:
        return self.sessions.next_expiry_s

    def _charge_kv(self, tenant_id: str, num_block_seconds: float) -> None:
        self._pinned_block_s[tenant_id] = self._pinned_block_s.pop(tenant_id, 0.0) + num_block_seconds
        if len(self._pinned_block_s) > MAX_TENANTS_SEEN:
            self._pinned_block_s.popitem(last=False)
        self._scheduler.policy.charge_kv(tenant_id, num_block_seconds)

    # -- questions --------------------------------------------------------------------------------

    def answer(self, query: TenancyQuery) -> TenancyReply:
        match query:
            case ListSessions(query_id=query_id, tenant_id=tenant_id):
                return SessionList(query_id, tuple(self.sessions.infos(tenant_id)))
            case DeleteSession(query_id=query_id, tenant_id=tenant_id, session_id=session_id):
                return SessionDeleted(query_id, self.sessions.delete(tenant_id, session_id))
            case DescribeTenants(query_id=query_id):
                return TenantReport(query_id, self.stats())

    def stats(self) -> TenancyStats:
        self.pins.charge()
        service = self._scheduler.policy.tenant_stats()
        waiting = [tenant.virtual_service for tenant in service if tenant.num_waiting]
        tenant_ids = dict.fromkeys((*self._pinned_block_s, *self.sessions.tenant_ids()))
        return TenancyStats(
            service=service,
            tenants=tuple(
                TenantInfo(
                    tenant_id=tenant_id,
                    num_sessions=self.sessions.num_of(tenant_id),
                    num_pinned_blocks=self.pins.num_blocks(tenant_id),
                    pinned_block_s_total=self._pinned_block_s.get(tenant_id, 0.0),
                )
                for tenant_id in tenant_ids
            ),
            fairness_gap=max(waiting) - min(waiting) if waiting else 0.0,
            num_sessions=len(self.sessions),
            num_pins=len(self.pins),
            num_pins_ended_total=tuple((reason.value, number) for reason, number in self.pins.num_ended.items()),
        )
