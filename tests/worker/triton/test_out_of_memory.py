"""A device without memory for a step: the step is computed in pieces, or the one request that needs too much fails."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from inspect import getattr_static
from typing import Any

import pytest
import torch

from pelton.build import join_engine
from pelton.core.errors import EngineStepError
from pelton.core.output import RequestOutput
from pelton.core.pooling import PoolingParams
from pelton.core.protocols import MonotonicClock
from pelton.engine.engine import Engine
from pelton.weights.config import ModelConfig
from pelton.worker.config import WorkerConfig
from pelton.worker.executors.build_worker import build_executor
from pelton.worker.kernels.reference import ReferenceKernels
from pelton.worker.kernels.triton import graphs
from pelton.worker.kernels.triton.backend import TritonKernels
from pelton.worker.kernels.triton.device import memory_errors
from pelton.worker.kernels.triton.embedding import embedding
from pelton.worker.kernels.triton.quantize_rows import quantize_rows
from pelton.worker.kv_storage import KVStorage
from pelton.worker.model_runner import ModelRunner
from pelton.worker.models.registry import make_dummy_model
from pelton.worker.step_pieces import OUT_OF_MEMORY, StepLimit
from tests.make import EOS_TOKEN_ID, ByteDecoder, make_submission, run
from tests.worker.triton.test_block_copies import make_batch
from tests.worker.triton.test_engine import ENGINE, SPEC, SpecOnly

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:overflow encountered")]

CONFIG = replace(ENGINE, max_num_batched_tokens=14, enable_prefix_caching=False)
TOO_LARGE = 200  # a token


@pytest.fixture(params=["reference"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    num_threads = torch.get_num_threads()
    worker = WorkerConfig(kernel_backend=request.param, threads=1)
    model = ModelConfig(load_format="dummy")
    executor, info = build_executor(SpecOnly(), model, worker, CONFIG, eos_token_ids={EOS_TOKEN_ID})
    yield join_engine(CONFIG, executor, info, ByteDecoder(), MonotonicClock(), SPEC.kv_groups)
    executor.close()
    torch.set_num_threads(num_threads)


def answers(engine: Engine) -> dict[str, list[RequestOutput]]:
    """Of three requests that share steps: told prompts, late tokens, draws; and of one that is pooled."""
    engine.submit(make_submission(list(range(40, 57)), "told", max_tokens=3, ignore_eos=True, prompt_logprobs=1))
    engine.submit(make_submission([5, 6, 7], "greedy", max_tokens=6, ignore_eos=True))
    engine.submit(make_submission([9] * 4, "drawn", max_tokens=4, ignore_eos=True, temperature=0.9, seed=3))
    engine.submit(make_submission([8] * 5, "pooled", max_tokens=1, pooling=PoolingParams(method="mean")))
    found: dict[str, list[RequestOutput]] = {}
    for output in run(engine):
        found.setdefault(output.request_id, []).append(output)
    return found


def content(outputs: list[RequestOutput]) -> tuple[Any, ...]:
    return (
        [token for output in outputs for token in output.token_ids],
        [each for output in outputs for each in output.prompt_logprobs or ()],
        [output.pooled for output in outputs if output.pooled is not None],
        outputs[-1].finish_reason,
    )


def refuse(
    name: str, when: Callable[[torch.Tensor], bool], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> list[int]:
    """Let an op find no memory; returns the rows of those that were refused, as they come."""
    refused: list[int] = []
    on_device = "triton" in engine.info.kernels
    kernels = TritonKernels if on_device else ReferenceKernels
    op = getattr(kernels, name)
    is_static = isinstance(getattr_static(kernels, name), staticmethod)

    def run_or_refuse(*args: Any) -> torch.Tensor:
        x = args[0 if is_static else 1]
        if when(x):
            refused.append(len(x))
            raise torch.OutOfMemoryError("CUDA out of memory") if on_device else MemoryError
        return op(*args)

    monkeypatch.setattr(kernels, name, staticmethod(run_or_refuse) if is_static else run_or_refuse)
    return refused


@pytest.mark.parametrize(("engine", "most"), [("triton", 8), ("reference", 5), ("reference", 1)], indirect=["engine"])
def test_a_step_that_does_not_fit_is_computed_in_pieces(
    engine: Engine, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {name: content(outputs) for name, outputs in answers(engine).items()}
    refused = refuse("linear", lambda x: len(x) > most, engine, monkeypatch)
    found = {name: content(outputs) for name, outputs in answers(engine).items()}
    assert found == expected
    assert refused
    assert [len(expected[name][0]) for name in ("told", "greedy", "drawn")] == [3, 6, 4]
    assert len(expected["told"][1]) == 16
    assert len(expected["pooled"][2]) == 1


def test_memory_that_gives_out_within_a_step_loses_nothing(engine: Engine) -> None:
    """At any product: of a layer, of a told prompt, of the rows that sample. What was told is not told twice."""
    expected = {name: content(outputs) for name, outputs in answers(engine).items()}
    for number in range(14):
        calls = iter(range(10**9))
        with pytest.MonkeyPatch.context() as once:
            refused = refuse("linear", lambda _, calls=calls, number=number: next(calls) == number, engine, once)
            found = answers(engine)
        assert not [output.error for outputs in found.values() for output in outputs if output.error is not None]
        assert {name: content(outputs) for name, outputs in found.items()} == expected
        assert len(refused) == 1


def test_what_does_not_fit_alone_fails_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {name: content(outputs) for name, outputs in answers(engine).items()}
    refused = refuse("embedding", lambda ids: bool((ids == TOO_LARGE).any()), engine, monkeypatch)
    engine.submit(make_submission([4, 4, TOO_LARGE, 4], "too large", max_tokens=3))
    found = answers(engine)
    (failed,) = found.pop("too large")
    assert failed.error is not None
    assert (failed.error.code, failed.error.message) == (EngineStepError.code, OUT_OF_MEMORY)
    assert {name: content(outputs) for name, outputs in found.items()} == expected
    assert refused[-1] == 1


def test_after_a_while_larger_steps_are_tried_again() -> None:
    limit = StepLimit()
    assert limit.holds(1000)
    limit.failed(100)
    assert (limit.holds(50), limit.holds(51)) == (True, False)
    for _ in range(256):
        limit.begin_step()
        assert not any(limit.holds(51) for _ in range(300))  # asking as often as a step has pieces is no step
    limit.begin_step()
    assert (limit.holds(100), limit.holds(101)) == (True, False)


@pytest.mark.parametrize(
    ("error", "becomes"),
    [
        (torch.OutOfMemoryError("full"), MemoryError),
        (RuntimeError("Triton Error [CUDA]: out of memory"), MemoryError),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), MemoryError),
        (RuntimeError("an illegal memory access was encountered"), RuntimeError),
    ],
)
def test_errors_of_a_full_device_are_told_from_others(error: Exception, becomes: type[Exception]) -> None:
    given_up: list[bool] = []

    @memory_errors(lambda: given_up.append(True))
    def work() -> None:
        raise error

    with pytest.raises(becomes) as raised:
        work()
    assert type(raised.value) is becomes
    assert given_up == ([True] if becomes is MemoryError else [])


def test_what_is_kept_between_products_and_steps_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = TritonKernels("float32")
    storage = KVStorage(SPEC, 8, 4, "float32", kernels)
    runner = ModelRunner(
        make_dummy_model(SPEC, kernels), storage, kernels.make_sampler(SPEC.vocab_size, ()), block_size=4
    )
    runner.run_step(make_batch(1))
    normed = torch.ones(4, 128)
    kernels._scratch.keep_rounded(normed, "int8", quantize_rows(normed, "int8"))
    kept = [weakref.ref(normed), weakref.ref(runner._program._hidden)]  # type: ignore[attr-defined]
    del normed
    held: list[bool] = []

    def refuse_once(*args: Any) -> torch.Tensor:
        held.append(any(each() is not None for each in kept))
        if len(held) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return embedding(*args)

    monkeypatch.setattr(TritonKernels, "embedding", staticmethod(refuse_once))
    assert runner.run_step(make_batch(2)).failed is None
    assert held == [True, False]


def test_a_graph_that_finds_no_memory_leaves_the_step_as_it_was_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture, streams and events are stood in for: none of them exists without a device."""

    class Nothing:
        def __init__(self, *_: Any, **options: Any) -> None:
            self.options = options

        def __enter__(self) -> None:
            if "pool" in self.options:
                raise torch.OutOfMemoryError("CUDA out of memory")

        def __exit__(self, *error: object) -> None:
            pass

        def wait_stream(self, other: object) -> None:
            pass

    for name in ("Stream", "CUDAGraph", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, Nothing)
    monkeypatch.setattr(torch.cuda, "current_stream", Nothing)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 1)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    captured = graphs.CudaGraphs()
    for _ in range(2):
        assert captured.run("key", lambda: torch.tensor([3])).tolist() == [3]
