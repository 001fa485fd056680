"""Matrix products on a GPU beside what it can do: copy bandwidth for few rows, torch's own product for many.

    python -m benchmarks.gpu.products          needs a GPU; run(device) is what `make gpu-check` calls

Bytes are those of the weight, its scales, and the rows; operations 2 S O I. Weights rotate through sets that together
are larger than the L2 cache. Their values are random; times are the median of device events.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
import triton.testing
from benchmarks.gpu.parts import in_parts

from pelton.worker.kernels.triton.linear import LinearWeight, Scratch, expand, linear
from pelton.worker.kernels.triton.weights import (
    DenseWeight,
    PackedWeight,
    Weight,
    Weights,
    quantize_to_int4,
    quantize_weight,
)

# [O, I] of Llama 3.1 8B.
SHAPES = {"qkv": (6144, 4096), "out": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
KINDS = ("bf16", "int8", "fp8", "fp8_block", "int4 g128")
FEW_ROWS = (1, 8, 16, 32, 64)
MANY_ROWS = 8192
_CACHE_BYTES = 200 << 20


@dataclass(frozen=True, slots=True)
class ProductRow:
    """A result; `share` is of what was measured beside it: `copy_gb_s` for few rows, `torch_tflop_s` for many."""

    kind: str
    shape: str
    num_rows: int
    batch_invariant: bool
    time_us: float
    gb_s: float
    tflop_s: float
    reference: float
    share: float
    error: float  # of a few rows against float64, as a norm
    same_bits: bool | None  # of the first row, alone and among the others; None: not looked at


def run(device: torch.device) -> Iterator[dict[str, object]]:
    """All rows."""
    copy_gb_s = measure_copy(device)
    work = [(kind, shape) for shape in SHAPES for kind in KINDS]
    return in_parts(
        (f"{kind} {shape}", partial(_measure_shape, kind, shape, copy_gb_s, device)) for kind, shape in work
    )


def measure_copy(device: torch.device) -> float:
    """GB/s of a large copy on the device, bytes read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / _median_ms(lambda: target.copy_(source)) / 1e6


def _measure_shape(kind: str, shape: str, copy_gb_s: float, device: torch.device) -> Iterator[dict[str, object]]:
    outputs, inputs = SHAPES[shape]
    torch.manual_seed(0)
    matrix = torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16) * 0.02
    weight, rounded = make(kind, matrix)
    num_bytes = sum(each.nbytes for each in _tensors(weight))
    num_sets = max(2, -(-_CACHE_BYTES // num_bytes))
    weights = [weight, *(_copied(weight) for _ in range(num_sets - 1))]
    for num_rows in (*FEW_ROWS, MANY_ROWS):
        x = torch.randn(num_rows, inputs, device=device, dtype=torch.bfloat16)
        reference = copy_gb_s
        if num_rows == MANY_ROWS:
            dense = _median_ms(lambda x=x: torch.nn.functional.linear(x, matrix))
            reference = 2 * num_rows * outputs * inputs / dense / 1e9
        for batch_invariant in (True, False):
            scratch = Scratch(device)
            scratch.reserve(weight)
            sets = [LinearWeight(Weights((each,)), scratch, batch_invariant) for each in weights]
            calls: list[Callable[[], object]] = [lambda x=x, each=each: linear(x, each) for each in sets]
            time_ms = _median_ms(*calls)
            moved = num_bytes + x.nbytes + num_rows * outputs * 2
            gb_s, tflop_s = moved / time_ms / 1e6, 2 * num_rows * outputs * inputs / time_ms / 1e9
            achieved = tflop_s if num_rows == MANY_ROWS else gb_s
            yield asdict(
                ProductRow(
                    kind,
                    shape,
                    num_rows,
                    batch_invariant,
                    time_ms * 1e3,
                    gb_s,
                    tflop_s,
                    reference,
                    achieved / reference,
                    _error(x, sets[0], rounded),
                    torch.equal(linear(x[:1], sets[0]), linear(x, sets[0])[:1]) if batch_invariant else None,
                )
            )


def make(kind: str, matrix: torch.Tensor) -> tuple[Weight, torch.Tensor]:
    """The weight, and what it stands for in float64."""
    if kind == "bf16":
        return DenseWeight("float", matrix), matrix.double()
    if kind != "int4 g128":
        weight = quantize_weight(matrix, kind)
        assert weight.scales is not None
        scales = weight.scales.double()
        if kind == "fp8_block":
            wide = scales.repeat_interleave(128, dim=0).repeat_interleave(128, dim=1)
            scales = wide[: matrix.shape[0], : matrix.shape[1]]
            return weight, weight.matrix.double() * scales
        return weight, weight.matrix.double() * scales[:, None]
    packed = quantize_to_int4(matrix)
    return packed, expand(packed, torch.float32).double()


def _tensors(weight: Weight) -> list[torch.Tensor]:
    fields = (
        (weight.words, weight.scales, weight.minima)
        if isinstance(weight, PackedWeight)
        else (
            weight.matrix,
            weight.scales,
        )
    )
    return [each for each in fields if each is not None]


def _copied(weight: Weight) -> Weight:
    scales = None if weight.scales is None else weight.scales.clone()
    if isinstance(weight, DenseWeight):
        return DenseWeight(weight.kind, weight.matrix.clone(), scales)
    assert scales is not None
    return PackedWeight(weight.bits, weight.group, weight.words.clone(), scales, None, weight.num_inputs)


def _error(x: torch.Tensor, weight: LinearWeight, exact: torch.Tensor) -> float:
    """Of the first rows; includes what rounding the rows to 8 bits costs."""
    y, expected = linear(x[:64], weight).double(), x[:64].double() @ exact.T
    return float((y - expected).norm() / expected.norm())


def _median_ms(*calls: Callable[[], object]) -> float:
    """Of one call, each in its turn."""

    def all_of_them() -> None:
        for call in calls:
            call()

    return float(triton.testing.do_bench(all_of_them, return_mode="median")) / len(calls)


def show(rows: Sequence[dict[str, object]]) -> str:
    names = (
        "kind",
        "shape",
        "num_rows",
        "batch_invariant",
        "time_us",
        "gb_s",
        "tflop_s",
        "share",
        "error",
        "same_bits",
    )
    lines = ["  ".join(f"{name:>15}" for name in names)]
    for row in rows:
        values = (row[name] for name in names)
        lines.append("  ".join(f"{value:>15.4g}" if isinstance(value, float) else f"{value!s:>15}" for value in values))
    return "\n".join(lines)


if __name__ == "__main__":
    print(show(list(run(torch.device("cuda")))))
