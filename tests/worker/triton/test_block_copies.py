"""Copies beside the steps: each step is billed for its own, though the next one's are on their way by then.

Streams and events are stood in for: a copy takes a millisecond of a clock that only moves when one is recorded.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import pytest
import torch

from pelton.core.batch import KVOp, KVOpKind, RequestContext, ScheduledBatch, ScheduledRequest
from pelton.core.sampling_params import SamplingParams
from pelton.weights.config import ModelConfig
from pelton.worker.config import WorkerConfig
from pelton.worker.executors.build_worker import build_executor
from pelton.worker.kernels.block_copies import ArrayCopies
from pelton.worker.kernels.triton import block_copies
from pelton.worker.kernels.triton.backend import TritonKernels
from pelton.worker.kernels.triton.block_copies import CudaCopies
from pelton.worker.kernels.triton.sampling import LateTokens
from pelton.worker.kv_storage import KVStorage
from pelton.worker.model_runner import ModelRunner
from pelton.worker.models.registry import make_dummy_model
from tests.make import EOS_TOKEN_ID
from tests.worker.triton.test_engine import ENGINE, SPEC, SpecOnly

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:overflow encountered")]


class FakeStream:
    def __init__(self, *_: Any) -> None:
        pass

    def wait_stream(self, other: object) -> None:
        pass

    def synchronize(self) -> None:
        pass


class FakeEvent:
    clock_ms = 0
    waited_ms = 0  # for what was recorded until then

    def __init__(self, **_: Any) -> None:
        self.time_ms = -1

    def record(self, _: FakeStream) -> None:
        FakeEvent.clock_ms += 1
        self.time_ms = FakeEvent.clock_ms

    def synchronize(self) -> None:
        assert self.time_ms >= 0
        FakeEvent.waited_ms = self.time_ms

    def elapsed_time(self, end: FakeEvent) -> float:
        return float(end.time_ms - self.time_ms)


class FakedCopies(CudaCopies):
    empty_host = ArrayCopies.empty_host  # nothing can be pinned


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> ModelRunner:
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", FakeStream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    monkeypatch.setattr(TritonKernels, "make_block_copies", lambda self: FakedCopies(self.device))
    kernels = TritonKernels("float32")
    storage = KVStorage(SPEC, 12, 4, "float32", kernels, num_host_blocks=6)
    sampler = kernels.make_sampler(SPEC.vocab_size, {EOS_TOKEN_ID})
    return ModelRunner(make_dummy_model(SPEC, kernels), storage, sampler, block_size=4)


def make_batch(step_id: int, *moves: tuple[KVOpKind, int, int]) -> ScheduledBatch:
    """A prompt of one token, and blocks that are moved."""
    name = f"request {step_id}"
    request = ScheduledRequest(
        name, (5,), 0, ((step_id,),), SamplingParams(temperature=0.0), samples=True, context=RequestContext((5,), (), 0)
    )
    return ScheduledBatch(step_id, (request,), kv_ops=tuple(KVOp(*move, "host") for move in moves))


STORE, LOAD = KVOpKind.STORE, KVOpKind.LOAD


def test_a_step_is_billed_for_its_own_copies(runner: ModelRunner) -> None:
    first = runner.begin_step(make_batch(1, (STORE, 8, 1), (STORE, 9, 2)))
    second = runner.begin_step(make_batch(2, (STORE, 10, 3), (LOAD, 1, 11), (LOAD, 2, 8)))
    third = runner.begin_step(make_batch(3))
    assert not first.is_done  # its token is late, as on a device
    results = [runner.end_step(step) for step in (first, second, third)]
    assert [(result.kv_copy_s, result.kv_moved_s) for result in results] == [(0.0, 2e-3), (2e-3, 3e-3), (0.0, None)]


def test_blocks_come_back_as_they_were(runner: ModelRunner) -> None:
    cache = runner._kv.layer_cache(1)
    cache.keys[8] = 3.0
    runner.run_step(make_batch(1, (STORE, 8, 1)))
    cache.keys[8] = 4.0
    runner.run_step(make_batch(2, (LOAD, 1, 9), (LOAD, 1, 10)))
    runner.run_step(replace(make_batch(3), kv_ops=(KVOp(KVOpKind.COPY, 9, 11),)))
    assert [float(cache.keys[block].min()) for block in (8, 9, 10, 11)] == [4.0, 3.0, 3.0, 3.0]


def fail(*_: object) -> None:
    raise RuntimeError("a defect")


@pytest.mark.parametrize("is_late", [False, True])
def test_a_step_that_fails_has_ended_its_copies(
    is_late: bool, runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine gives the slots to others, to the disk or to another engine, as soon as it is told."""
    if is_late:
        monkeypatch.setattr(LateTokens, "result", fail)
    else:
        monkeypatch.setattr(runner, "_forward", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        runner.run_step(make_batch(1, (STORE, 8, 1), (STORE, 9, 2)))
    assert FakeEvent.waited_ms == FakeEvent.clock_ms


def test_a_full_device_waits_for_the_blocks_before(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, empty, calls = runner._kv.layer_cache(1), torch.empty, list[str]()
    cache.keys[8] = 3.0

    def empty_once_there_is_room(*args: Any, **options: Any) -> torch.Tensor:
        if "arrived" not in calls:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return empty(*args, **options)

    monkeypatch.setattr(torch, "empty", empty_once_there_is_room)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: calls.append("arrived"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("given back"))
    runner._kv.move((KVOp(STORE, 8, 1, "host"), KVOp(LOAD, 1, 9, "host")))
    assert calls == ["arrived", "given back"]
    assert float(cache.keys[9].min()) == 3.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8, torch.float32, torch.float8_e4m3fn])
def test_a_block_is_copied_in_one_launch_wherever_it_lies(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between layers that are more than 2**31 bytes apart, too, in a pool of which only two blocks are touched."""
    launches: list[Any] = []
    kernel = block_copies.copy_block_kernel
    monkeypatch.setattr(block_copies, "copy_block_kernel", CountedLaunches(kernel, launches))
    num_blocks = 2**30 // (3000 * dtype.itemsize) + 10
    pool = torch.empty((2, 2, num_blocks, 3, 1000), dtype=dtype)
    values = torch.randint(0, 100, (2, 2, 3, 1000)).to(dtype)
    block_copies.copy_block(pool[:, :, 5], values)
    block_copies.copy_block(pool[:, :, num_blocks - 2], pool[:, :, 5])
    packed = torch.empty_like(values)
    block_copies.copy_block(packed, pool[:, :, num_blocks - 2])
    assert torch.equal(packed.float(), values.float())
    assert len(launches) == 3


class CountedLaunches:
    def __init__(self, kernel: Any, launches: list[Any]) -> None:
        self._kernel, self._launches = kernel, launches

    def __getitem__(self, grid: Any) -> Any:
        self._launches.append(grid)
        return self._kernel[grid]


class FakeRuntime:
    """Of the pinning calls of CUDA's runtime."""

    def __init__(self, status: int) -> None:
        self.status = status
        self.kept = 0  # what went wrong, until the next kernel is asked for
        self.pinned: dict[int, int] = {}

    def cudaHostRegister(self, address: int, num_bytes: int, _: int) -> int:
        self.pinned[address] = num_bytes
        self.kept = self.status
        return self.status

    def launch(self, *_: Any, **__: Any) -> None:
        status, self.kept = self.kept, 0
        if status:
            raise RuntimeError(f"CUDA error {status}")

    def cudaHostUnregister(self, address: int) -> int:
        del self.pinned[address]
        return 0


def test_as_much_host_memory_is_pinned_as_was_asked_for(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no longer than it is there: the next one may come to lie at the same place."""
    del runner  # for its streams
    runtime = FakeRuntime(0)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    copies = CudaCopies(torch.device("cpu"))
    assert copies.empty_host(0, 64).shape == (0, 64)
    blocks = copies.empty_host(5, 1000)
    assert list(runtime.pinned.items()) == [(blocks.ctypes.data, 5000)]
    block = blocks[3]
    del blocks
    assert runtime.pinned
    block[:] = 7
    del block
    assert not runtime.pinned
    runtime.status = 801
    monkeypatch.setattr(torch, "zeros", runtime.launch)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, dtype, **_: empty(*args, dtype=dtype))
    assert copies.empty_host(5, 1000).shape == (5, 1000)  # as torch pins it
    runtime.launch()  # the next kernel is not told that the first way failed
    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(MemoryError, match="5000 bytes of host memory could not be pinned: CUDA error 801, "):
        copies.empty_host(5, 1000)


def test_an_executor_passes_them_on() -> None:
    """Without a device: what is not timed beside the steps is timed by the host's clock."""
    config = WorkerConfig(kernel_backend="triton", threads=1)
    executor, _ = build_executor(SpecOnly(), ModelConfig(load_format="dummy"), config, ENGINE, eos_token_ids={0})
    result = executor.submit(make_batch(1, (STORE, 8, 1))).result(timeout=30)
    executor.close()
    assert result.kv_copy_s > 0
    assert result.kv_moved_s is None
