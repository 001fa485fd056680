"""The executor's thread, and how it is sized to the model and the machine."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pelton.core.batch import KVOp, KVOpKind, RequestContext, ScheduledBatch, ScheduledRequest
from pelton.core.errors import ConfigError, EngineStepError
from pelton.core.model_spec import ModelSpec, RopeSpec, make_kv_groups
from pelton.core.sampling_params import SamplingParams
from pelton.core.step_size import StepSize
from pelton.engine.config import EngineConfig
from pelton.weights.config import ModelConfig
from pelton.weights.tensors import GenerationDefaults, WeightTensor
from pelton.worker.config import WorkerConfig
from pelton.worker.executors import kv_plan
from pelton.worker.executors.build_worker import build_executor
from pelton.worker.executors.host_resources import num_available_cores, num_available_memory_bytes
from pelton.worker.executors.in_process import InProcessExecutor
from pelton.worker.executors.kv_plan import num_blocks_of_request, plan_kv_cache
from pelton.worker.kernels.block_copies import CopyTimes
from pelton.worker.kernels.reference import ReferenceKernels
from pelton.worker.kernels.reference.block_copies import TensorCopies
from pelton.worker.kv_format import KV_FORMATS
from pelton.worker.model_runner import ModelRunner
from tests.worker.native import CPU_BACKENDS

pytestmark = pytest.mark.torch

GIB = 2**30
SPEC = ModelSpec(
    architecture="llama",
    num_layers=2,
    hidden_size=32,
    intermediate_size=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=90,
    max_model_len=512,
    rms_norm_eps=1e-6,
    rope=RopeSpec(theta=10_000.0, rotary_dim=8),
    kv_groups=make_kv_groups([None, None]),
)
SLIDING = replace(SPEC, num_layers=6, kv_groups=make_kv_groups([64, 64, None] * 2))
ENGINE = EngineConfig(max_num_seqs=4, max_num_batched_tokens=32)
DUMMY = ModelConfig(load_format="dummy")


@dataclass
class SpecOnly:
    """`ModelFiles` of a model that exists on paper; its tensors, if any, only have shapes."""

    spec: ModelSpec = SPEC
    shapes: tuple[tuple[int, ...], ...] = ()
    path: Path = Path("nowhere")
    generation_defaults: GenerationDefaults = field(default_factory=GenerationDefaults)
    chat_template: str | None = None

    def tensor_names(self) -> list[str]:
        return [str(i) for i in range(len(self.shapes))]

    def tensor(self, name: str) -> WeightTensor:
        return WeightTensor(name, self.shapes[int(name)], "F32", None)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def keep_thread_count() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(params=CPU_BACKENDS)
def executor(request: pytest.FixtureRequest) -> Iterator[InProcessExecutor]:
    config = WorkerConfig(threads=1, kernel_backend=request.param)
    built, _ = build_executor(SpecOnly(), DUMMY, config, ENGINE, eos_token_ids={0})
    assert isinstance(built, InProcessExecutor)
    yield built
    built.close()


def make_batch(step_id: int, token_id: int = 5, table: tuple[int, ...] = (1,)) -> ScheduledBatch:
    """A prompt of one token, greedy."""
    context = RequestContext((token_id,), (), 0)
    sampling = SamplingParams(temperature=0.0)
    request = ScheduledRequest("a", (token_id,), 0, (table,), sampling, samples=True, context=context)
    return ScheduledBatch(step_id, (request,))


def test_steps_run_in_order_and_one_future_each(executor: InProcessExecutor) -> None:
    done: list[int] = []
    futures = [executor.submit(make_batch(step_id, token_id=step_id)) for step_id in range(1, 21)]
    for step_id, future in enumerate(futures, start=1):
        future.add_done_callback(lambda _, step_id=step_id: done.append(step_id))
    results = [future.result(timeout=30) for future in futures]
    assert [result.step_id for result in results] == list(range(1, 21))
    assert done == sorted(done)
    assert len({result.sampled_token_ids for result in results}) > 3


def test_a_broken_step_fails_its_own_future_only(executor: InProcessExecutor) -> None:
    expected = executor.submit(make_batch(1)).result(timeout=30)
    broken = executor.submit(make_batch(2, table=(10**9,)))  # a block that does not exist
    after = executor.submit(make_batch(3))
    assert isinstance(broken.exception(timeout=30), IndexError | RuntimeError)
    assert after.result(timeout=30).sampled_token_ids == expected.sampled_token_ids


def test_a_queued_step_cannot_be_cancelled(executor: InProcessExecutor) -> None:
    futures = [executor.submit(make_batch(step_id)) for step_id in range(5)]
    assert not any(future.cancel() for future in futures)
    assert [future.result(timeout=30).step_id for future in futures] == list(range(5))


def test_close_finishes_what_is_queued_and_ends_the_thread() -> None:
    executor, _ = build_executor(SpecOnly(), DUMMY, WorkerConfig(threads=1), ENGINE, eos_token_ids=())
    futures = [executor.submit(make_batch(step_id)) for step_id in range(5)]
    executor.close()
    executor.close()
    assert all(future.done() and future.exception() is None for future in futures)
    assert not any(thread.name == "pelton-executor" and thread.is_alive() for thread in threading.enumerate())
    with pytest.raises(EngineStepError, match=r"step 9 .* closed"):
        executor.submit(make_batch(9))


def test_torchs_thread_count_holds_on_the_executors_thread() -> None:
    config = WorkerConfig(threads=1, kernel_backend="reference")
    executor, _ = build_executor(SpecOnly(), DUMMY, config, ENGINE, eos_token_ids={0})
    seen: list[int] = []
    future = executor.submit(make_batch(1))
    future.add_done_callback(lambda _: seen.append(torch.get_num_threads()))
    future.result(timeout=30)
    executor.close()
    assert seen[:1] == [1]


def test_engine_info_tells_what_was_decided() -> None:
    config = replace(ENGINE, num_kv_blocks=20, max_model_len=400, enable_prefix_caching=False)
    executor, info = build_executor(SpecOnly(), DUMMY, WorkerConfig(threads=1), config, eos_token_ids={0})
    executor.close()
    assert (info.num_blocks, info.block_size, info.max_model_len) == (20, 16, 19 * 16)
    assert (info.max_num_seqs, info.max_num_batched_tokens) == (4, 32)
    assert (info.dtype, info.device, info.vocab_size, info.num_threads) == ("float32", "cpu", 90, 1)
    assert not info.enable_prefix_caching
    assert info.load_s > 0


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (256, 8192)),
        ({"max_num_seqs": 7}, (7, 8192)),
        ({"max_num_batched_tokens": 100}, (100, 100)),
        ({"max_num_seqs": 10_000}, (10_000, 10_000)),
        ({"max_num_seqs": 4, "max_num_batched_tokens": 32}, (4, 32)),
    ],
    ids=str,
)
def test_a_device_chooses_the_size_of_a_step_that_is_left_open(
    settings: dict[str, int], expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ReferenceKernels, "step_size", StepSize(256, 8192))
    config = WorkerConfig(threads=1, kernel_backend="reference")
    executor, info = build_executor(
        SpecOnly(), DUMMY, config, EngineConfig(num_kv_blocks=20, **settings), eos_token_ids={0}
    )
    executor.close()
    assert (info.max_num_seqs, info.max_num_batched_tokens) == expected


def test_without_a_device_a_step_has_the_size_for_a_cpu() -> None:
    executor, info = build_executor(
        SpecOnly(), DUMMY, WorkerConfig(threads=1), EngineConfig(num_kv_blocks=20), eos_token_ids={0}
    )
    executor.close()
    assert (info.max_num_seqs, info.max_num_batched_tokens) == (64, 256)


class TimedCopies(TensorCopies):
    def take_running(self) -> TimedCopies:
        return self

    def wait(self) -> CopyTimes:
        return CopyTimes(loads_s=0.25, stores_s=0.5)


def test_copies_that_a_device_makes_have_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's clock sees how long it takes to ask for them, which is nothing."""
    monkeypatch.setattr(ReferenceKernels, "make_block_copies", lambda _: TimedCopies())
    config = replace(ENGINE, num_kv_blocks=20, host_kv_cache_gb=0.001)
    worker = WorkerConfig(threads=1, kernel_backend="reference")
    executor, _ = build_executor(SpecOnly(), DUMMY, worker, config, eos_token_ids={0})
    batch = replace(make_batch(1), kv_ops=(KVOp(KVOpKind.STORE, 2, 1, "host"),))
    result = executor.submit(batch).result(timeout=30)
    plain = executor.submit(make_batch(2)).result(timeout=30)
    executor.close()
    assert (result.kv_copy_s, result.kv_moved_s) == (0.25, 0.75)
    assert (plain.kv_copy_s, plain.kv_moved_s) == (0.0, None)


@pytest.mark.parametrize("place", ["_forward", "_take_samples"])
def test_copies_of_a_failed_step_have_ended_with_it(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their blocks are others' from then on."""
    waits = []
    monkeypatch.setattr(TimedCopies, "wait", lambda _: waits.append(1))
    monkeypatch.setattr(ReferenceKernels, "make_block_copies", lambda _: TimedCopies())

    def fail(_: ModelRunner, __: object, step: Any) -> None:
        if place == "_forward":
            raise MemoryError("no room")
        step.samples = Future()
        step.samples.set_exception(MemoryError("no room"))

    monkeypatch.setattr(ModelRunner, "_forward", fail)
    config = replace(ENGINE, num_kv_blocks=20, host_kv_cache_gb=0.001)
    worker = WorkerConfig(threads=1, kernel_backend="reference")
    executor, _ = build_executor(SpecOnly(), DUMMY, worker, config, eos_token_ids={0})
    batch = replace(make_batch(1), kv_ops=(KVOp(KVOpKind.STORE, 2, 1, "host"),))
    with pytest.raises(MemoryError, match="no room"):
        executor.submit(batch).result(timeout=30)
    executor.close()
    assert waits == [1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_explicit_dtype_is_used(dtype: str) -> None:
    config = WorkerConfig(dtype=dtype, threads=1)
    executor, info = build_executor(SpecOnly(), DUMMY, config, ENGINE, eos_token_ids={0})
    assert info.dtype == dtype
    assert len(executor.submit(make_batch(1)).result(timeout=30).sampled_token_ids[0]) == 1
    executor.close()


def test_a_longer_context_than_the_models_is_refused_before_loading() -> None:
    files = SpecOnly(shapes=((10**9, 10**9),))
    with pytest.raises(ConfigError, match="max_model_len is 513, but the model supports at most 512"):
        build_executor(files, ModelConfig(), WorkerConfig(), replace(ENGINE, max_model_len=513), eos_token_ids=())


def test_weights_beyond_the_free_memory_are_refused() -> None:
    files = SpecOnly(shapes=((10**6, 10**6), (7, 7)))
    with pytest.raises(ConfigError, match=r"weights take 3725\.29 GiB as float32, but .* are free"):
        build_executor(files, ModelConfig(), WorkerConfig(), ENGINE, eos_token_ids=())


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_failed_allocation_is_a_typed_error(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine claims more memory than an address space holds, so that the backend itself refuses."""
    monkeypatch.setattr(kv_plan, "num_available_memory_bytes", lambda: 2**80)
    config = replace(ENGINE, kv_cache_memory_gb=float(2**30))
    worker_config = WorkerConfig(threads=1, kernel_backend=backend)
    with pytest.raises(ConfigError, match="could not be allocated: lower num_kv_blocks or kv_cache_memory_gb"):
        build_executor(SpecOnly(), DUMMY, worker_config, config, eos_token_ids=())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dtype": "bfloat16", "kernel_backend": "native"}, "compute in float32, not bfloat16"),
        ({"kv_cache_dtype": "float16"}, "kv_cache_dtype is float16, but native .* store bfloat16 or float32"),
    ],
    ids=str,
)
def test_types_that_a_backend_lacks_are_refused(settings: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_executor(SpecOnly(), DUMMY, WorkerConfig(threads=1, **settings), ENGINE, eos_token_ids=())


FLOAT32 = KV_FORMATS["float32"]
BLOCK_BYTES = SPEC.kv_bytes_per_block(16, 4)  # 2 layers x (K, V) x 16 x 2 heads x 8 x 4 bytes = 4 KiB


@pytest.mark.parametrize(
    ("settings", "num_free_bytes", "num_blocks", "max_model_len"),
    [
        # Default: a quarter of what is free, at most 4 GiB, and no more than max_num_seqs long requests need.
        ({}, 400 * BLOCK_BYTES, 100, 512),
        ({}, 40 * BLOCK_BYTES, 10, 9 * 16),
        ({}, 100 * GIB, 1 + 4 * 32, 512),
        ({"max_num_seqs": 2**18, "max_num_batched_tokens": 2**18}, 100 * GIB, 4 * GIB // BLOCK_BYTES, 512),
        ({"kv_cache_memory_gb": 10 * BLOCK_BYTES / GIB}, GIB, 10, 144),
        ({"num_kv_blocks": 1000}, GIB, 1000, 512),
        ({"num_kv_blocks": 1000, "kv_cache_memory_gb": 0.1}, GIB, 1000, 512),
        ({"num_kv_blocks": 1000, "max_model_len": 100}, GIB, 1000, 100),
        ({"num_kv_blocks": 3}, GIB, 3, 32),
        ({"num_kv_blocks": 2, "max_model_len": 9}, GIB, 2, 9),
    ],
    ids=str,
)
def test_kv_cache_size(settings: dict[str, float], num_free_bytes: int, num_blocks: int, max_model_len: int) -> None:
    plan = plan_kv_cache(SPEC, replace(ENGINE, **settings), FLOAT32, num_free_bytes)
    assert (plan.num_blocks, plan.max_model_len) == (num_blocks, max_model_len)


@pytest.mark.parametrize(
    ("settings", "num_free_bytes", "words"),
    [
        ({"num_kv_blocks": 2}, GIB, "holds 2 blocks, too few to serve anything: at least 3 are needed, and 33 .*512"),
        ({"kv_cache_memory_gb": 1e-9}, GIB, "holds 0 blocks"),
        ({}, 0, "holds 0 blocks"),
        ({"num_kv_blocks": 1001}, 1000 * BLOCK_BYTES, "1001 KV blocks take .* ask for at most 1000"),
        ({"kv_cache_memory_gb": 2.0}, GIB, r"take 2.00 GiB, but 1.00 GiB are free"),
    ],
    ids=str,
)
def test_a_kv_cache_that_cannot_work_is_refused(settings: dict[str, float], num_free_bytes: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan_kv_cache(SPEC, replace(ENGINE, **settings), FLOAT32, num_free_bytes)


def test_a_sliding_window_group_needs_no_more_than_its_window() -> None:
    """Two full and four windowed layers make one group of each... of equal size: 1 full, 2 windowed."""
    assert [group.sliding_window for group in SLIDING.kv_groups] == [None, 64, 64]
    assert num_blocks_of_request(SLIDING, ENGINE, 64) == 3 * 4
    # Beyond window + step + a block at either end = 64 + 32 + 32 tokens, only the full group grows.
    assert num_blocks_of_request(SLIDING, ENGINE, 512) == 32 + 2 * 8
    plan = plan_kv_cache(SLIDING, replace(ENGINE, num_kv_blocks=1 + 20 + 2 * 8), FLOAT32, GIB)
    assert plan.max_model_len == 20 * 16


def write_files(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


MEMINFO = "MemTotal: 64000 kB\nMemAvailable: 32000 kB\n"


@pytest.mark.parametrize(
    ("membership", "files", "num_cores", "num_kib"),
    [
        ("0::/\n", {}, 8, 32000),
        ("", {}, 8, 32000),
        ("0::/\n", {"cpu.max": "max 100000", "memory.max": "max"}, 8, 32000),
        ("0::/app\n", {"app/cpu.max": "250000 100000"}, 2, 32000),
        ("0::/app/one\n", {"app/cpu.max": "300000 100000", "app/one/cpu.max": "max 100000"}, 3, 32000),
        ("0::/app\n", {"app/cpu.max": "10000 100000"}, 1, 32000),
        (
            "0::/app\n",
            {
                "app/memory.max": str(9000 * 1024),
                "app/memory.current": str(5000 * 1024),
                "app/memory.stat": f"anon 5\ninactive_file {1000 * 1024}\n",
            },
            8,
            5000,
        ),
        ("0::/app\n", {"app/memory.max": "4096", "app/memory.current": "8192"}, 8, 0),
        # Inside a container the named folder is the host's; the limits are at the root.
        ("0::/../host/path\n", {"cpu.max": "200000 100000"}, 2, 32000),
        (
            "4:memory:/job\n3:cpu,cpuacct:/job\n",
            {
                "cpu/job/cpu.cfs_quota_us": "150000",
                "cpu/job/cpu.cfs_period_us": "50000",
                "memory/job/memory.limit_in_bytes": str(8000 * 1024),
                "memory/job/memory.usage_in_bytes": str(1000 * 1024),
                "memory/job/memory.stat": f"total_inactive_file {500 * 1024}\n",
            },
            3,
            7500,
        ),
        ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8, 32000),
    ],
    ids=str,
)
def test_limits_of_control_groups(
    tmp_path: Path,
    membership: str,
    files: dict[str, str],
    num_cores: int,
    num_kib: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    write_files(tmp_path, {f"cgroup/{name}": text for name, text in files.items()})
    write_files(tmp_path, {"self": membership, "meminfo": MEMINFO})
    paths = tmp_path / "cgroup", tmp_path / "self"
    assert num_available_cores(*paths) == num_cores
    assert num_available_memory_bytes(*paths, tmp_path / "meminfo") == num_kib * 1024


def test_this_machine_has_cores_and_memory() -> None:
    assert num_available_cores() >= 1
    assert num_available_memory_bytes() > 2**20
