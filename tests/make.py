"""Builders for tests: requests, schedulers, engines; none of them needs torch."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import blake2b
from itertools import count
from typing import Any

from pelton.core.batch import (
    INBOX,
    NULL_BLOCK_ID,
    OUTBOX,
    PENDING_TOKEN_ID,
    BlockKey,
    KVOp,
    KVOpKind,
    ScheduledBatch,
    StepResult,
)
from pelton.core.events import EngineInfo
from pelton.core.model_spec import KVGroupSpec
from pelton.core.output import RequestOutput, TokenLogprobs
from pelton.core.protocols import BlockRead, MonotonicClock
from pelton.core.request import Request, Submission
from pelton.core.sampling_params import SamplingParams
from pelton.core.tenant import parse_tenants
from pelton.engine.engine import Engine
from pelton.engine.kv.block_pool import BlockPool
from pelton.engine.kv.costs import KVCosts
from pelton.engine.kv.disk import DiskTier
from pelton.engine.kv.eviction import EVICTIONS
from pelton.engine.kv.manager import KVManager
from pelton.engine.kv.tiers import KVTiers
from pelton.engine.kv.transfer import KVTransfer
from pelton.engine.policies import POLICIES
from pelton.engine.policies.context import PolicyContext
from pelton.engine.scheduler import Scheduler
from pelton.engine.step_budget import make_budget

VOCAB_SIZE = 300
EOS_TOKEN_ID = 256
FULL_ATTENTION = (KVGroupSpec((0,)),)

_ids = count()


class ByteDecoder:
    """A tokenizer whose token ids are bytes; 256 ends a text and is special, as all above it."""

    eos_token_ids = frozenset({EOS_TOKEN_ID})

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if 0 <= token_id < 256 else b""

    def is_special(self, token_id: int) -> bool:
        return token_id >= 256


class ManualClock:
    def __init__(self) -> None:
        self.time_s = 0.0

    def now_s(self) -> float:
        return self.time_s


class ContextExecutor:
    """An executor without a model whose tokens depend on everything that a model's would.

    It keeps what a KV cache would keep (the token id of every slot, per group) and computes the next
    token from what it reads back through the block tables. A wrong block, a missing copy, a stale
    placeholder or a lost window changes the text; a slot that does not hold the context's token is
    an error at once. `delay_s` per step; runs on its own thread as a real executor does.
    """

    def __init__(
        self,
        groups: Sequence[KVGroupSpec] = FULL_ATTENTION,
        *,
        num_blocks: int = 256,
        block_size: int = 4,
        vocab_size: int = 256,
        delay_s: float = 0.0,
        in_thread: bool = False,
        num_host_blocks: int = 0,
    ) -> None:
        self.groups = groups
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.delay_s = delay_s
        self.batches: list[ScheduledBatch] = []
        self.fail_next: Exception | None = None
        self.fails_before_moving = False  # where `fail_next` is set
        self.tells_prompt_logprobs = False
        self._slots = [[-7] * block_size for _ in range(num_blocks)]
        self.host_slots = [[-8] * block_size for _ in range(num_host_blocks)]
        self.tiers = {"host": self.host_slots}
        self._contexts: dict[str, list[int]] = {}
        self._num_prompt_tokens: dict[str, int] = {}
        self._thread = ThreadPoolExecutor(1) if in_thread else None

    def submit(self, batch: ScheduledBatch) -> Future[StepResult]:
        self.batches.append(batch)
        if self._thread is not None:
            return self._thread.submit(self._execute, batch)
        future: Future[StepResult] = Future()
        try:
            future.set_result(self._execute(batch))
        except Exception as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown()

    def _execute(self, batch: ScheduledBatch) -> StepResult:
        if self.delay_s:
            time.sleep(self.delay_s)
        if self.fail_next is None or not self.fails_before_moving:
            self._move(batch.kv_ops)
        for request_id in (*batch.preempted_ids, *batch.finished_ids):
            self._contexts.pop(request_id, None)
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error
        sampled = tuple(self._compute(scheduled) for scheduled in batch.requests)
        told = tuple(map(self._prompt_logprobs, batch.requests)) if self.tells_prompt_logprobs else ()
        return StepResult(batch.step_id, sampled, prompt_logprobs=told, elapsed_s=self.delay_s)

    def _move(self, kv_ops: Iterable[KVOp]) -> None:
        device = self._slots
        for op in kv_ops:
            assert (op.tier == "device") == (op.kind is KVOpKind.COPY)
            host = self.tiers.get(op.tier, device)
            source, destination = {
                KVOpKind.COPY: (device, device),
                KVOpKind.STORE: (device, host),
                KVOpKind.LOAD: (host, device),
            }[op.kind]
            destination[op.destination] = list(source[op.source])

    def _prompt_logprobs(self, scheduled: Any) -> tuple[TokenLogprobs, ...] | None:
        if scheduled.sampling.prompt_logprobs is None:
            return None
        prompt = self._contexts[scheduled.request_id][: self._num_prompt_tokens[scheduled.request_id]]
        start = scheduled.num_computed_tokens + 1
        return tuple(TokenLogprobs(token_id, 0.0, 1) for token_id in prompt[start : start + len(scheduled.token_ids)])

    def _compute(self, scheduled: Any) -> tuple[int, ...]:
        if scheduled.context is not None:
            self._num_prompt_tokens[scheduled.request_id] = len(scheduled.context.prompt_token_ids)
            self._contexts[scheduled.request_id] = [
                *scheduled.context.prompt_token_ids,
                *scheduled.context.output_token_ids,
            ]
        context = self._contexts[scheduled.request_id]
        end = scheduled.num_computed_tokens
        for token_id in scheduled.token_ids:
            assert token_id in (context[end], PENDING_TOKEN_ID)
            for table in scheduled.block_tables:
                assert table[end // self.block_size] != NULL_BLOCK_ID, "a token would be written to the null block"
                self._slots[table[end // self.block_size]][end % self.block_size] = context[end]
            end += 1
        assert scheduled.samples == (end == len(context)), "`samples` must be true at the request's end only"
        if not scheduled.samples:
            return ()
        seen = [self._read(scheduled, group_id, end) for group_id in range(len(self.groups))]
        for group, tokens in zip(self.groups, seen, strict=True):
            window = end if group.sliding_window is None else min(end, group.sliding_window)
            assert tokens == context[end - window : end], "the KV read back is not the request's context"
        sampling = scheduled.sampling
        data = ",".join(map(str, [*context, 0 if sampling.is_greedy else sampling.seed])).encode()
        token_id = blake2b(data, digest_size=8).digest()[0] % self.vocab_size
        context.append(token_id)
        return (token_id,)

    def _read(self, scheduled: Any, group_id: int, end: int) -> list[int]:
        window = self.groups[group_id].sliding_window
        start = 0 if window is None else max(0, end - window)
        table = scheduled.block_tables[group_id]
        return [self._slots[table[p // self.block_size]][p % self.block_size] for p in range(start, end)]


class SlowBlockStore:
    """A disk for a `ContextExecutor`: it does one thing at each `tick`, so that everything else can come between.

    `problems` are taken one by one as reads and writes come: true where this one goes wrong.
    """

    file_bytes = 1

    def __init__(self, problems: Iterable[bool] = ()) -> None:
        self.files: dict[BlockKey, list[int]] = {}
        self.host_slots: list[list[int]] = []
        self.num_closed = 0
        self.problems = iter(problems)
        self._waiting: deque[Callable[[], None]] = deque()

    def scan(self, max_bytes: int) -> list[BlockKey]:
        del max_bytes
        self._waiting.clear()
        return list(self.files)

    def tick(self) -> bool:
        if self._waiting:
            self._waiting.popleft()()
            return True
        return False

    def store(self, slot_id: int, key: BlockKey) -> Future[bool]:
        future: Future[bool] = Future()

        def write() -> None:
            is_good = not next(self.problems, False)
            if is_good:
                self.files[key] = list(self.host_slots[slot_id])
            future.set_result(is_good)

        self._waiting.append(write)
        return future

    def load(self, slot_ids: Sequence[int], keys: Sequence[BlockKey]) -> Future[BlockRead]:
        future: Future[BlockRead] = Future()

        def read() -> None:
            loaded = []
            for slot_id, key in zip(slot_ids, keys, strict=True):
                is_good = key in self.files and not next(self.problems, False)
                self.host_slots[slot_id] = list(self.files[key]) if is_good else [-9] * len(self.host_slots[slot_id])
                loaded.append(is_good)
            future.set_result(BlockRead(tuple(loaded), 1e-9))

        self._waiting.append(read)
        return future

    def remove(self, keys: Sequence[BlockKey]) -> None:
        self._waiting.append(lambda: [self.files.pop(key, None) for key in keys] and None)

    def close(self) -> None:
        self.num_closed += 1


def make_info(**changes: Any) -> EngineInfo:
    values: dict[str, Any] = {
        "max_model_len": 256,
        "num_blocks": 256,
        "block_size": 4,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 32,
        "max_num_waiting": 64,
        "dtype": "float32",
        "vocab_size": VOCAB_SIZE,
        "device": "cpu",
        "kernels": "none",
        "num_threads": 1,
        "enable_prefix_caching": True,
    }
    return EngineInfo(**(values | changes))


def make_engine(
    *,
    groups: Sequence[KVGroupSpec] = FULL_ATTENTION,
    policy: str = "fcfs",
    tenants: Sequence[str] = (),
    enable_overlap: bool = True,
    long_prefill_chunk: int | None = None,
    tpot_slo_ms: float | None = None,
    clock: Any = None,
    executor: Any = None,
    num_host_blocks: int = 0,
    disk: SlowBlockStore | None = None,
    num_disk_blocks: int = 10**6,
    eviction: str = "lru",
    connector: Any = None,
    **info: Any,
) -> Engine:
    """An engine over a `ContextExecutor`; further arguments as in `EngineInfo`."""
    engine_info = make_info(**info)
    clock = clock or MonotonicClock()
    executor = executor or ContextExecutor(
        groups,
        num_blocks=engine_info.num_blocks,
        block_size=engine_info.block_size,
        num_host_blocks=num_host_blocks,
    )
    costs = KVCosts(chunk=engine_info.max_num_batched_tokens)
    tiers = None
    if num_host_blocks:
        host = BlockPool(num_host_blocks, EVICTIONS[eviction](clock, lambda _: 1.0))
        if disk is not None:
            disk.host_slots = executor.host_slots
        disk_tier = None if disk is None else DiskTier(disk, host, costs, max_bytes=num_disk_blocks)
        tiers = KVTiers(host, costs, disk=disk_tier)
    kv = KVManager(
        tuple(groups),
        BlockPool(engine_info.num_blocks, EVICTIONS[eviction](clock, lambda _: 1.0)),
        engine_info.block_size,
        enable_prefix_caching=engine_info.enable_prefix_caching,
        tiers=tiers,
    )
    if connector is not None:
        executor.tiers |= {INBOX: connector.inbox, OUTBOX: connector.outbox}
        kv.transfer = KVTransfer(connector, kv.pool, tiers, kv.ops, costs)
    context = PolicyContext(
        tenants=parse_tenants(tenants),
        clock=clock,
        num_blocks=engine_info.num_blocks,
        num_cached_tokens=lambda request: kv.match(request).num_tokens,
        num_blocks_needed=lambda request: kv.num_blocks_to_reach(request, request.num_tokens),
    )
    scheduler = Scheduler(
        POLICIES[policy](context),
        kv,
        clock,
        max_num_seqs=engine_info.max_num_seqs,
        max_num_batched_tokens=engine_info.max_num_batched_tokens,
        long_prefill_chunk=long_prefill_chunk,
        budget=make_budget(tpot_slo_ms, engine_info.max_num_batched_tokens),
    )
    return Engine(
        scheduler,
        executor,
        ByteDecoder(),
        clock,
        engine_info,
        tenants=context.tenants,
        costs=costs,
        enable_overlap=enable_overlap,
    )


def make_submission(prompt_token_ids: Iterable[int], request_id: str | None = None, **options: Any) -> Submission:
    """Greedy unless told otherwise; options are those of `Submission` and `SamplingParams`."""
    own = {name: options.pop(name) for name in list(options) if name in Submission.__dataclass_fields__}
    sampling = SamplingParams(**({"temperature": 0.0, "max_tokens": 8} | options))
    return Submission(
        request_id=request_id or f"r{next(_ids)}", prompt_token_ids=list(prompt_token_ids), sampling=sampling, **own
    )


def check_ledger(engine: Engine) -> None:
    """Law 4: blocks are held by running requests only, and their counts add up."""
    scheduler = engine.scheduler
    for request in scheduler.requests.values():
        if request not in scheduler.running:
            assert not request.block_tables, f"{request.request_id} holds blocks while it is {request.status}"
    scheduler.kv.check(scheduler.running)


def step(engine: Engine) -> list[RequestOutput]:
    """One turn of the loop, with the ledger checked."""
    engine.expire()
    engine.dispatch()
    if engine.num_in_flight:
        engine.collect()
    check_ledger(engine)
    update = engine.take_update()
    return list(update.outputs) if update is not None else []


def run(engine: Engine, *, max_steps: int = 10_000) -> list[RequestOutput]:
    """Until nothing is left to do."""
    outputs = []
    for _ in range(max_steps):
        if not engine.has_work:
            update = engine.take_update()
            return outputs + (list(update.outputs) if update is not None else [])
        outputs += step(engine)
    raise AssertionError("requests wait for ever")


def generate(engine: Engine, *submissions: Submission) -> dict[tuple[str, int], list[int]]:
    """Token ids by (request id, index); every sequence must end without an error."""
    for submission in submissions:
        engine.submit(submission)
    token_ids: dict[tuple[str, int], list[int]] = {}
    for output in run(engine):
        assert output.error is None, output.error
        token_ids.setdefault((output.request_id, output.index), []).extend(output.token_ids)
    return token_ids


def make_request(prompt_token_ids: Iterable[int] = range(10), **fields: Any) -> Request:
    values: dict[str, Any] = {
        "request_id": f"r{next(_ids)}",
        "prompt_token_ids": list(prompt_token_ids),
        "sampling": SamplingParams(temperature=0.0, max_tokens=8),
        "arrival_time_s": 0.0,
        "max_num_tokens": 64,
    }
    return Request(**(values | fields))
