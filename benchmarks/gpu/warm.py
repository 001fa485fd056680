"""Compiles what the items of `make gpu-check` launch, before they do, on cores that would be idle:

    python -m benchmarks.gpu.warm 3 8 90         the fourth of eight shares, for compute capability 9.0

A kernel takes about a second to compile, and there are some two hundred: one after another they would be a third of the
check's time. Nothing is run; an engine that is asked for tokens gets none that mean anything.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch


def main() -> int:
    share, num_shares, capability = map(int, sys.argv[1:4])
    from benchmarks.gpu.absent_packages import stand_in

    stand_in()
    from benchmarks.gpu.compile_only import compile_only

    compile_only(Launchers().make, capability)
    for number, (label, launch) in enumerate(work()):
        if number % num_shares == share:
            try:
                launch()
            except AssertionError:  # nothing has been computed
                pass
            except Exception:  # it will be compiled when it is launched, or fail there
                print(f"{label}: {traceback.format_exc()[-1000:]}", file=sys.stderr)
    return 0


class Launchers:
    """Triton makes C of each signature of a kernel, and has it compiled when such a kernel is first launched: as long
    again as the kernel. Not where there is no driver to link with."""

    def __init__(self) -> None:
        self._made: set[tuple[Any, ...]] = set()

    def make(self, kernel: Any) -> None:
        from triton.backends.nvidia.driver import CudaLauncher

        signature = tuple(kernel.src.signature.values())
        if signature not in self._made:
            self._made.add(signature)
            with suppress(Exception):
                CudaLauncher(kernel.src, kernel.metadata)


def work() -> Iterator[tuple[str, Callable[[], object]]]:
    """What is launched first comes first."""
    from benchmarks.gpu import attention_cases, compile_cases, hand_over, kernel_items
    from benchmarks.gpu.engine_items import equal_text_model, preset

    yield from kernel_items.launches()
    yield from compile_cases.sampling()
    text = equal_text_model(tiny=False)
    for num_tokens in (1, 20, 60):
        yield f"same text, {num_tokens}", partial(step, text, "float32", None, num_tokens)
    spec = preset("llama-3.1-8b", num_layers=1)
    for quantization, kv_dtype in ((None, "bfloat16"), ("fp8", "bfloat16"), ("int4", "bfloat16"), ("fp8", "fp8")):
        for num_tokens in (1, 30, 60, 300):
            label = f"{quantization} {kv_dtype}, {num_tokens}"
            yield label, partial(step, spec, "bfloat16", quantization, num_tokens, kv_dtype)
    yield from attention_cases.cases()
    for num_tokens in (1, 20, 1000):
        yield f"hand-over, {num_tokens}", partial(step, hand_over.WIDE, "bfloat16", None, num_tokens)


@contextmanager
def without_values() -> Iterator[None]:
    """Matrices are made without looking at what would be in them."""
    from pelton.worker.kernels.triton import backend, linear

    made = linear.make_weight, backend.load_dense
    linear.make_weight = _empty_weight
    backend.load_dense = lambda tensor, dtype, device: torch.empty(tensor.shape, dtype=dtype, device=device)
    try:
        yield
    finally:
        linear.make_weight, backend.load_dense = made


def _empty_weight(tensors: Sequence[Any], dtype: torch.dtype, device: torch.device, quantization: str | None) -> Any:
    from pelton.worker.kernels.triton.weights import DenseWeight, PackedWeight

    outputs, inputs = sum(tensor.shape[0] for tensor in tensors), tensors[0].shape[1]
    if quantization == "int4":
        words = torch.empty((inputs // 128, outputs, 16), dtype=torch.int32, device=device)
        return PackedWeight(4, 128, words, torch.empty((inputs // 128, outputs), dtype=torch.float16), None, inputs)
    if quantization == "fp8":
        matrix = torch.empty((outputs, inputs), dtype=torch.float8_e4m3fn, device=device)
        return DenseWeight("fp8", matrix, torch.empty(outputs))
    return DenseWeight("float", torch.empty((outputs, inputs), dtype=dtype, device=device))


def step(spec: Any, dtype: str, quantization: str | None, num_tokens: int, kv_dtype: str | None = None) -> None:
    """A prompt of so many tokens; of one, a decode after a long context."""
    from dataclasses import replace

    from pelton.core.batch import RequestContext, ScheduledBatch, ScheduledRequest
    from pelton.core.model_spec import make_kv_groups
    from pelton.core.sampling_params import SamplingParams
    from pelton.worker.kernels.triton.backend import TritonKernels
    from pelton.worker.kv_storage import KVStorage
    from pelton.worker.model_runner import ModelRunner
    from pelton.worker.models.registry import make_dummy_model

    spec = replace(spec, num_layers=1, kv_groups=make_kv_groups([None]))
    kernels = TritonKernels(dtype, torch.device("cpu"))
    if quantization is not None:
        kernels.round_weights(quantization)
    with without_values():
        model = make_dummy_model(spec, kernels)
    storage = KVStorage(spec, 128, 16, kv_dtype or dtype, kernels)
    runner = ModelRunner(model, storage, kernels.make_sampler(spec.vocab_size, ()), block_size=16)
    num_computed = 1500 if num_tokens == 1 else 0
    context = RequestContext((5,) * (num_computed + num_tokens), (), 0)
    request = ScheduledRequest(
        "a",
        (5,) * num_tokens,
        num_computed,
        (tuple(range(1, 2 + (num_computed + num_tokens) // 16)),),
        SamplingParams(temperature=0.0),
        samples=True,
        context=context,
    )
    runner.run_step(ScheduledBatch(1, (request,)))


if __name__ == "__main__":
    sys.exit(main())
