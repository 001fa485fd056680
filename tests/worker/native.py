"""What the tests of the native kernels share: instruction sets, torch's tensors, random packed matrices."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from pelton.weights.dequantize import dequantize
from pelton.weights.gguf.formats import FORMATS
from pelton.weights.tensors import WeightTensor
from pelton.worker.kernels.cpu import pelton_cpu
from pelton.worker.kernels.cpu.backend import NativeKernels

# Of ops.BACKENDS, those made for a CPU. Triton's kernels, interpreted, have tests of their own, on smaller shapes.
CPU_BACKENDS = ["native", "reference"]

# Where the float16 scales and minima of a block lie; every other byte may be anything.
_HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "INT4": (),
    "INT8": (),
    "IQ4_XS": (0,),
}
_SINGLES = {"INT4": (0, 4), "INT8": (0,)}  # the same of float32
PACKED_FORMATS = [name for name in _HALVES if name != "IQ4_XS"]  # which has no kernel of its own
DENSE_FORMATS = ["F32", "F16", "BF16"]


def _runs(isa: str) -> bool:
    try:
        pelton_cpu.Runtime(isa, 1, [])
    except ValueError:
        return False
    return True


ISAS = [isa for isa in ("amx", "avx512", "avx2_vnni", "avx2", "neon_dotprod", "portable") if _runs(isa)]


class OnTensors:
    """Kernels of any backend called with tensors, which share their memory with what the backend is given."""

    def __init__(self, kernels: Any) -> None:
        self.kernels = kernels

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.kernels, name)
        if not callable(attribute) or not isinstance(self.kernels, NativeKernels):
            return attribute
        return lambda *args, **options: _to_tensors(attribute(*map(_to_array, args), **options))

    def plan_attention(self, shape: Any, query_start_loc: Sequence[int], seq_lens: Sequence[int], tables: Any) -> Any:
        tables = _to_array(tables) if isinstance(self.kernels, NativeKernels) else tables
        starts, lens = (np.array(values, dtype=np.int64) for values in (query_start_loc, seq_lens))
        return self.kernels.plan_attention(shape, starts, lens, tables)


def _to_array(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.view(torch.uint16).numpy() if value.dtype is torch.bfloat16 else value.numpy()


def _to_tensors(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_to_tensors, value))
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


@cache
def native(isa: str, num_threads: int = 1, activation_dtype: str = "auto") -> NativeKernels:
    return NativeKernels(num_threads, isa, activation_dtype=activation_dtype)


def on_tensors(isa: str, num_threads: int = 1, activation_dtype: str = "auto") -> OnTensors:
    return OnTensors(native(isa, num_threads, activation_dtype))


def uses_tiles(kernels: NativeKernels | OnTensors) -> bool:
    """Products of bfloat16; elsewhere activations have 8 bits."""
    return bool(kernels.runtime.isa == "amx")


def random_packed(format_name: str, num_outputs: int, num_inputs: int, seed: int = 0) -> WeightTensor:
    """Every code, sub-scale and sub-minimum equally likely; scales of either sign."""
    rng = np.random.default_rng(seed)
    layout = FORMATS[format_name]
    if format_name in DENSE_FORMATS:
        values = rng.standard_normal((num_outputs, num_inputs), dtype=np.float32) * np.float32(0.1)
        bits = {
            "F32": values,
            "F16": values.astype(np.float16),
            "BF16": (values.view(np.uint32) >> 16).astype(np.uint16),
        }
        return WeightTensor("w", values.shape, format_name, bits[format_name].reshape(-1).view(np.uint8))
    num_blocks = num_outputs * num_inputs // layout.block_size
    blocks = rng.integers(0, 256, (num_blocks, layout.block_bytes), dtype=np.uint8)
    for offset in _HALVES[format_name]:
        halves = (rng.uniform(0.001, 0.02, num_blocks) * rng.choice([-1, 1], num_blocks)).astype(np.float16)
        blocks[:, offset : offset + 2] = halves.view(np.uint8).reshape(-1, 2)
    for offset in _SINGLES.get(format_name, ()):
        singles = (rng.uniform(0.001, 0.02, num_blocks) * rng.choice([-1, 1], num_blocks)).astype(np.float32)
        blocks[:, offset : offset + 4] = singles.view(np.uint8).reshape(-1, 4)
    return WeightTensor("w", (num_outputs, num_inputs), format_name, blocks.reshape(-1))


def decoded(tensors: Sequence[WeightTensor]) -> torch.Tensor:
    """float64 [all outputs, inputs]."""
    return torch.cat([torch.from_numpy(dequantize(tensor)) for tensor in tensors]).double()
