"""`Engine`: admit, schedule, execute, emit; no thread and no clock of its own.

`dispatch()` keeps up to two steps with the executor: the next one is scheduled while one runs, with
`PENDING_TOKEN_ID` for tokens not sampled yet. `collect()` takes the oldest result. A request that
turns out to have ended by a stop costs at most one token computed in vain.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from pelton.core.batch import ScheduledBatch, StepResult
from pelton.core.errors import (
    DeadlineExceededError,
    EngineStepError,
    ErrorInfo,
    PeltonError,
    RequestCancelledError,
)
from pelton.core.events import EngineInfo, EngineStats, EventKind, RequestEvent
from pelton.core.output import RequestOutput
from pelton.core.protocols import Clock, Executor, TokenDecoder
from pelton.core.request import FinishReason, Request, Submission
from pelton.core.tenant import Tenants
from pelton.engine.adapters import AdapterTable
from pelton.engine.admission import check_submission, make_requests
from pelton.engine.grammar_hold import GrammarHold
from pelton.engine.kv.costs import KVCosts
from pelton.engine.kv.kv_wait import KVWait
from pelton.engine.output_processor import OutputProcessor, error_output, pooled_output, prompt_logprobs_output
from pelton.engine.scheduler import Scheduler
from pelton.engine.tenancy import Tenancy
from pelton.engine.wire import EngineUpdate, LoadAdapter, Query, Reply, UnloadAdapter

# Part of a step's expected time after which the next one is scheduled: late, but so that the executor never waits.
SCHEDULE_AFTER = 0.75


@dataclass(slots=True)
class _Timings:
    schedule_s: float = 0.0
    execute_s: float = 0.0
    postprocess_s: float = 0.0


class Engine:
    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        decoder: TokenDecoder,
        clock: Clock,
        info: EngineInfo,
        *,
        tenants: Tenants | None = None,
        costs: KVCosts | None = None,
        enable_overlap: bool = True,
    ) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.clock = clock
        self.info = info
        self.tenancy = Tenancy(
            scheduler, clock, info, tenants or Tenants(), costs or KVCosts(chunk=info.max_num_batched_tokens)
        )
        self.adapters = AdapterTable()
        self._processor = OutputProcessor(decoder)
        self._max_in_flight = 2 if enable_overlap else 1
        self._in_flight: deque[tuple[ScheduledBatch, Future[StepResult]]] = deque()
        self._schedule_at_s: float | None = None  # when the step after the running one is made
        self._submissions: dict[str, list[Request]] = {}  # sequences of a submission that have not ended
        self.grammars = GrammarHold()
        self._kv_wait = KVWait(scheduler.kv, clock)
        self._forks: dict[str, list[Request]] = {}  # leader's id -> siblings that wait for its prompt
        self._deadlines: list[tuple[float, str]] = []  # heap of (deadline, submission id)
        self._outputs: list[RequestOutput] = []
        self._replies: list[Reply] = []
        self._timings = _Timings()
        self._num_output_tokens = 0
        self._num_steps = 0
        self._num_prefill_tokens = 0

    # -- requests ---------------------------------------------------------------------------------

    def submit(self, submission: Submission) -> None:
        """Admit a submission to the queue; what is wrong with it comes out as its output."""
        try:
            check_submission(submission, self.info)
            self.adapters.check(submission.lora_id)
            if submission.request_id in self._submissions:
                raise PeltonError(f"request id {submission.request_id} is in use")
            requests = self.tenancy.admit(
                submission, lambda: make_requests(submission, self.clock.now_s(), self.info.max_model_len)
            )
        except PeltonError as error:
            info = ErrorInfo.of(error)
            self._outputs += [
                RequestOutput(submission.request_id, index, finish_reason=FinishReason.ERROR, error=info)
                for index in range(submission.sampling.n)
            ]
            return
        self._submissions[submission.request_id] = list(requests)
        for request in requests:
            self._processor.add(request)
            self.adapters.begin(request)
            self._record(request, EventKind.QUEUED, request.num_prompt_tokens, request.tenant_id)
        if len(requests) > 1:
            self._forks[requests[0].request_id] = requests[1:]
        if requests[0].deadline_s is not None:
            heapq.heappush(self._deadlines, (requests[0].deadline_s, submission.request_id))
        if not self.grammars.try_hold(requests[0]):
            self._wait_for_kv(requests[0])

    def _wait_for_kv(self, request: Request) -> None:
        if not self._kv_wait.try_hold(request):
            self.scheduler.add(request)

    def cancel(self, request_id: str) -> None:
        """End a submission at its client's wish; unknown ids have ended already."""
        self._fail(request_id, RequestCancelledError("the request was cancelled"), FinishReason.CANCELLED)

    def ask(self, query: Query) -> None:
        """The reply comes with the next update, or a later one."""
        if isinstance(query, LoadAdapter | UnloadAdapter):
            self.adapters.ask(query)
        else:
            self._replies.append(self.tenancy.answer(query))

    def expire(self) -> None:
        """End the submissions whose deadline has passed, and what else has had its time."""
        self.tenancy.expire()
        while self._deadlines and self._deadlines[0][0] <= self.clock.now_s():
            _, request_id = heapq.heappop(self._deadlines)
            self._fail(request_id, DeadlineExceededError("the request's deadline passed before it finished"))

    @property
    def next_deadline_s(self) -> float | None:
        """When `expire` or `dispatch` has something to do even if nothing else happens."""
        deadline_s = self._deadlines[0][0] if self._deadlines else None
        times_s = (deadline_s, self.tenancy.next_expiry_s, self._kv_wait.next_deadline_s, self._schedule_at_s)
        return min((time_s for time_s in times_s if time_s is not None), default=None)

    @property
    def num_waiting(self) -> int:
        return len(self.scheduler.policy) + self._num_deferred

    @property
    def _num_deferred(self) -> int:
        """Waiting for something else than room."""
        return len(self.grammars) + len(self._kv_wait) + sum(map(len, self._forks.values()))

    @property
    def has_work(self) -> bool:
        return bool(self._submissions or self._in_flight)

    # -- steps ------------------------------------------------------------------------------------

    def dispatch(self, on_done: Callable[[Future[StepResult]], None] | None = None) -> None:
        """Hand steps to the executor until it has enough; `on_done` may run on another thread."""
        for request, error in self.grammars.take_ready():
            if error is None:
                self._wait_for_kv(request)
            else:
                problem = (
                    error if isinstance(error, PeltonError) else PeltonError(f"the grammar cannot be used: {error}")
                )
                self._fail(request.parent_id or request.request_id, problem)
        for request in self._kv_wait.take_ready():
            self.scheduler.add(request)
        while len(self._in_flight) < self._max_in_flight:
            started_s = self.clock.now_s()
            if self._schedule_at_s is not None and started_s < self._schedule_at_s and not self.is_step_done:
                return
            self._schedule_at_s = None
            batch = self.scheduler.schedule()
            if self.tenancy.make_room() and batch is None:
                batch = self.scheduler.schedule()
            self._timings.schedule_s += self.clock.now_s() - started_s
            if batch is None:
                return
            self.tenancy.scheduled(batch)
            future = self.executor.submit(batch)
            self._in_flight.append((batch, future))
            self._set_schedule_time()
            if on_done is not None:
                future.add_done_callback(on_done)

    def _set_schedule_time(self) -> None:
        """The next step is made late in the one that starts to run, so that who comes meanwhile is in it."""
        self._schedule_at_s = None
        if len(self._in_flight) == 1 and self._max_in_flight > 1:
            expected_s = self.scheduler.budget.time_s(self._in_flight[0][0])
            self._schedule_at_s = self.clock.now_s() + SCHEDULE_AFTER * expected_s

    def wake_with(self, wake: Callable[[], None]) -> None:
        """`wake` is called, on another thread, when `dispatch` has something to do that no step tells of."""
        self.grammars.wake = wake
        self.adapters.on_done = wake
        tiers, transfer = self.scheduler.kv.tiers, self.scheduler.kv.transfer
        if tiers is not None and tiers.disk is not None:
            tiers.disk.on_done = wake
        if transfer is not None:
            transfer.wake_with(wake)

    @property
    def is_step_done(self) -> bool:
        return bool(self._in_flight) and self._in_flight[0][1].done()

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    def collect(self) -> None:
        """Take the oldest step's result, waiting for it where it is not done."""
        batch, future = self._in_flight[0]
        try:
            result = future.result()
        except Exception as error:
            self._in_flight.popleft()
            self._set_schedule_time()
            lost = self.scheduler.kv.lose(batch.kv_ops, [op for later, _ in self._in_flight for op in later.kv_ops])
            self.scheduler.kv.complete(batch.kv_ops)
            self._fail_step(batch, error, lost)
            return
        self._in_flight.popleft()
        self._set_schedule_time()
        moved_s = result.kv_copy_s if result.kv_moved_s is None else result.kv_moved_s
        self.scheduler.kv.complete(batch.kv_ops, moved_s)
        started_s = self.clock.now_s()
        self._num_steps += 1
        self._take_prompt_logprobs(batch, result)
        self._record_chunks(batch)
        self.tenancy.computed(batch, result)
        for request, row in self.scheduler.update(batch, result):
            self._take_tokens(request, result, row)
        for request_id, pooled in (result.pooled or {}).items():
            self._take_pooled(request_id, pooled)
        for request_id, problem in (result.failed or {}).items():
            failed = self.scheduler.requests.get(request_id)
            if failed is not None:
                self._fail(failed.parent_id or request_id, EngineStepError(problem))
        self._timings.execute_s += result.elapsed_s
        self._timings.postprocess_s += self.clock.now_s() - started_s

    def take_update(self) -> EngineUpdate | None:
        """What happened since the last call; None where nothing did."""
        outputs, events = self.take_outputs()
        replies, self._replies = self._replies + self.adapters.take_replies(), []
        self.adapters.settle(self._in_flight[0][0].step_id if self._in_flight else None)
        if not outputs and not events and not replies:
            return None
        return EngineUpdate(tuple(outputs), tuple(events), self.stats(), tuple(replies))

    def take_outputs(self) -> tuple[list[RequestOutput], list[RequestEvent]]:
        """Of an update, what concerns requests."""
        outputs, self._outputs = self._outputs, []
        events, self.scheduler.events = self.scheduler.events, []
        return outputs, events

    def stats(self) -> EngineStats:
        pool = self.scheduler.kv.pool
        counters = self.scheduler.counters
        tiers = self.scheduler.kv.tier_stats()
        return EngineStats(
            time_s=self.clock.now_s(),
            num_running=len(self.scheduler.running),
            num_waiting=self.num_waiting,
            num_deferred=self._num_deferred,
            num_blocks_total=pool.num_total,
            num_blocks_used=pool.num_used,
            num_blocks_cached=pool.num_cached,
            num_prefix_queries_total=counters.num_prefix_queries,
            num_prefix_hits_total=counters.num_prefix_hits,
            num_preemptions_total=counters.num_preemptions,
            num_recomputed_tokens_total=counters.num_recomputed_tokens,
            num_prompt_tokens_total=counters.num_prompt_tokens,
            num_output_tokens_total=self._num_output_tokens,
            **tiers,
            num_steps_total=self._num_steps,
            num_step_tokens_total=self._num_prefill_tokens + self._num_output_tokens,
            schedule_s_total=self._timings.schedule_s,
            execute_s_total=self._timings.execute_s,
            postprocess_s_total=self._timings.postprocess_s,
        )

    # -- results ----------------------------------------------------------------------------------

    def _take_tokens(self, request: Request, result: StepResult, row: int) -> None:
        sampled = result.sampled_token_ids[row]
        if len(request.output_token_ids) == len(sampled):
            self._record(request, EventKind.FIRST_TOKEN)
            for sibling in self._forks.pop(request.request_id, ()):
                self.scheduler.add(sibling)
        output = self._processor.output(request, sampled, result, row)
        self._num_output_tokens += len(output.token_ids)
        self._outputs.append(output)
        if output.finish_reason is not None:
            self._end(request, output.finish_reason, output.finish_reason)

    def _take_pooled(self, request_id: str, pooled: bytes) -> None:
        request = self.scheduler.requests.get(request_id)
        if request is not None:  # else it was cancelled meanwhile
            self._outputs.append(pooled_output(request, pooled))
            self._end(request, FinishReason.STOP, FinishReason.STOP)

    def _take_prompt_logprobs(self, batch: ScheduledBatch, result: StepResult) -> None:
        for scheduled, logprobs in zip(batch.requests, result.prompt_logprobs, strict=False):
            request = self.scheduler.requests.get(scheduled.request_id)
            if not logprobs or request is None:
                continue
            # A recompute after preemption tells some of them again.
            new = logprobs[max(0, request.num_prompt_logprobs - scheduled.num_computed_tokens) :]
            request.num_prompt_logprobs += len(new)
            if new:
                self._outputs.append(prompt_logprobs_output(request, new))

    def _record_chunks(self, batch: ScheduledBatch) -> None:
        for scheduled in batch.requests:
            request, num_tokens = self.scheduler.requests.get(scheduled.request_id), len(scheduled.token_ids)
            if request is not None and (
                scheduled.num_computed_tokens < request.num_prompt_tokens or scheduled.context is not None
            ):
                self._num_prefill_tokens += num_tokens
                self._record(request, EventKind.COMPUTED, num_tokens)

    def _end(self, request: Request, reason: FinishReason, detail: str) -> None:
        request.finish_reason = reason
        self.grammars.drop(request)
        self._kv_wait.drop(request)
        keep_s = self.tenancy.ended(request, reason)
        if keep_s > 0.0:
            self._record(request, EventKind.PINNED, request.num_computed_tokens, f"{keep_s:.3f}")
        self.scheduler.remove(request)
        self._processor.remove(request)
        self.adapters.end(request, self._in_flight[-1][0].step_id if self._in_flight else -1)
        self._record(request, EventKind.FINISHED, request.num_output_tokens, detail)
        submission_id = request.parent_id or request.request_id
        siblings = self._submissions[submission_id]
        siblings.remove(request)
        if not siblings:
            del self._submissions[submission_id]

    def _fail(self, submission_id: str, error: PeltonError, reason: FinishReason = FinishReason.ERROR) -> None:
        info = ErrorInfo.of(error)
        for request in list(self._submissions.get(submission_id, ())):
            self._forks.pop(request.request_id, None)
            self._outputs.append(error_output(request, info, reason))
            self._end(request, reason, error.code)

    def _fail_step(self, batch: ScheduledBatch, error: Exception, lost: set[int]) -> None:
        """A broken step costs the requests that were in it or read a `lost` block; the others go on (law 7)."""
        problem = EngineStepError(f"the step failed: {type(error).__name__}: {error}")
        failed_ids = [scheduled.request_id for scheduled in batch.requests]
        for request in self.scheduler.running if lost else ():
            if any(not lost.isdisjoint(table) for table in request.block_tables):
                failed_ids.append(request.request_id)
        for request_id in failed_ids:
            found = self.scheduler.requests.get(request_id)
            if found is not None:
                self._fail(found.parent_id or found.request_id, problem)

    def _record(self, request: Request, kind: EventKind, num_tokens: int = 0, detail: str = "") -> None:
        self.scheduler.events.append(RequestEvent(request.request_id, kind, self.clock.now_s(), num_tokens, detail))
