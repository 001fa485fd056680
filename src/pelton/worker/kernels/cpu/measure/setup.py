"""What every measurement of kernels needs: the model's sizes, the machine's ceilings, random rows, repetition."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from pelton.bench.roofline import Ceilings, KernelBenchPlan
from pelton.core.model_spec import ModelSpec
from pelton.worker.kernels.cpu import pelton_cpu

# The arithmetic that an instruction set's kernels are built on: names of native/ceilings_x86.cpp.
_PRODUCT_CEILINGS = {
    "amx": ("bf16_amx",),
    "avx512": ("int8_avx512_vnni",),
    "avx_vnni": ("int8_avx_vnni",),
    "avx2": ("int8_avx2",),
}
_ATTENTION_CEILINGS = {
    "amx": ("bf16_amx",),
    "avx512": ("bf16_avx512", "fp32_avx512"),
    "avx_vnni": ("fp32_avx2",),
    "avx2": ("fp32_avx2",),
}

BLOCK_SIZE = 16  # positions
MAX_LOGITS_ROWS = 64  # as the model runner has them at once
_MIN_CALLS, _MAX_CALLS = 4, 200

Floats = npt.NDArray[np.float32]


class Setup:
    def __init__(self, spec: ModelSpec, runtime: pelton_cpu.Runtime, ceilings: Ceilings, plan: KernelBenchPlan) -> None:
        self.spec = spec
        self.runtime = runtime
        self.ceilings = ceilings
        self.plan = plan
        self.rng = np.random.default_rng(0)
        self.dram = ceilings.best(("dram",))
        self.products = ceilings.best(_PRODUCT_CEILINGS.get(runtime.isa, ("int8_plain",)))
        self.attention = ceilings.best(_ATTENTION_CEILINGS.get(runtime.isa, ("fp32_plain",)))

    def floats(self, *shape: int) -> Floats:
        return self.rng.standard_normal(shape, dtype=np.float32)


def repeats(budget_s: float) -> Iterator[int]:
    """0, 1, 2 ... for about `budget_s`. The first round warms up: `make_figure` drops its time."""
    start_s = time.perf_counter()
    for index in range(_MAX_CALLS):
        if index >= _MIN_CALLS and time.perf_counter() - start_s > budget_s:
            return
        yield index
