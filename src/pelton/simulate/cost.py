"""What a step costs: a function of its shape, with coefficients that are measured or estimated.

    seconds = base(tokens) + sample_s * sampled rows + decode_context_s * positions that single tokens attend to
            + prefill_pair_s * (query, key) pairs of longer chunks + the KV operations

`base` is piecewise linear in the tokens of the step: weights are read once whatever the batch, and tiles of a
matrix product fill up. The two attention terms are apart because one token per request is bound by memory,
a chunk by arithmetic (Vidur and DistServe's simulator split them alike). Windows of attention are not modelled.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from pelton.core.batch import KVOp, ScheduledBatch
from pelton.core.errors import ConfigError


class StepShape(msgspec.Struct, frozen=True):
    """All that the cost of a step depends on."""

    num_tokens: int
    num_samples: int
    num_decode_positions: int  # attended to by requests with one token in the step
    num_prefill_pairs: int  # of (query, key), in requests with more than one
    moved_kv_tokens: dict[str, int] = {}  # by `kv_op_name`: tokens whose KV operations move


def kv_op_name(op: KVOp) -> str:
    return f"{op.kind}:{op.tier}"


def shape_of(batch: ScheduledBatch, block_size: int) -> StepShape:
    num_tokens = num_samples = num_decode_positions = num_prefill_pairs = 0
    for scheduled in batch.requests:
        num_new, start = len(scheduled.token_ids), scheduled.num_computed_tokens
        num_tokens += num_new
        num_samples += scheduled.samples
        if num_new == 1:
            num_decode_positions += start + 1
        else:
            num_prefill_pairs += num_new * start + num_new * (num_new + 1) // 2
    moved = _moved_kv_tokens(batch.kv_ops, block_size) if batch.kv_ops else {}
    return StepShape(num_tokens, num_samples, num_decode_positions, num_prefill_pairs, moved)


def _moved_kv_tokens(kv_ops: Iterable[KVOp], block_size: int) -> dict[str, int]:
    moved: dict[str, int] = {}
    for op in kv_ops:
        name = kv_op_name(op)
        moved[name] = moved.get(name, 0) + block_size
    return moved


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """Coefficients in seconds; `kv_op_s` for the KV of one token. `knots` are (tokens, seconds) of `base`, by rising
    tokens; beyond the last one the last slope goes on. `num_kv_tokens` is the KV cache of that machine.
    """

    name: str
    knots: tuple[tuple[int, float], ...]
    sample_s: float = 0.0
    decode_context_s: float = 0.0
    prefill_pair_s: float = 0.0
    kv_op_s: dict[str, float] = field(default_factory=dict)
    num_kv_tokens: int = 65536
    kv_bytes_per_token: int = 131_072
    source: str = ""

    def __post_init__(self) -> None:
        tokens = [num_tokens for num_tokens, _ in self.knots]
        if len(tokens) < 2 or tokens != sorted(set(tokens)):
            raise ConfigError(f"cost {self.name}: knots must be two or more (tokens, seconds), by rising tokens")
        numbers = [second for _, second in self.knots] + [self.sample_s, self.decode_context_s, self.prefill_pair_s]
        if min(*numbers, *self.kv_op_s.values()) < 0 or self.num_kv_tokens < 1:
            raise ConfigError(f"cost {self.name}: no coefficient may be negative")

    def base_s(self, num_tokens: int) -> float:
        upper = min(max(1, bisect_right(self.knots, (num_tokens, float("inf")))), len(self.knots) - 1)
        (low, low_s), (high, high_s) = self.knots[upper - 1], self.knots[upper]
        share = max(0.0, (num_tokens - low) / (high - low))
        return low_s + share * (high_s - low_s)

    def step_s(self, shape: StepShape) -> float:
        seconds = (
            self.base_s(shape.num_tokens)
            + self.sample_s * shape.num_samples
            + self.decode_context_s * shape.num_decode_positions
            + self.prefill_pair_s * shape.num_prefill_pairs
        )
        return seconds + self.kv_copy_s(shape) if shape.moved_kv_tokens else seconds

    def kv_copy_s(self, shape: StepShape) -> float:
        """What of a step is KV operations."""
        return sum(self.kv_op_s.get(name, 0.0) * count for name, count in shape.moved_kv_tokens.items())


# Estimates from the roofline, for studies of scheduling; only a fit of measured steps tells how fast a machine is.
_ESTIMATE = (
    "estimate: bf16 weights and KV read at 80% of the memory's rate, products at 50% of the peak, 50 GB/s to the host"
)
COSTS: dict[str, StepCost] = {
    cost.name: cost
    for cost in (
        StepCost(
            name="h100-8b",
            knots=((1, 0.0062), (160, 0.0075), (512, 0.0185), (2048, 0.070), (8192, 0.275)),
            sample_s=2e-6,
            decode_context_s=5e-8,
            prefill_pair_s=1.2e-9,
            kv_op_s={"store:host": 2.6e-6, "load:host": 2.6e-6, "copy:device": 1e-7},
            num_kv_tokens=400_000,
            source=_ESTIMATE,
        ),
        StepCost(
            name="4xh100-8b",
            knots=((1, 0.0024), (160, 0.0028), (512, 0.0058), (2048, 0.0205), (8192, 0.078)),
            sample_s=1e-6,
            decode_context_s=1.4e-8,
            prefill_pair_s=3.2e-10,
            kv_op_s={"store:host": 8e-7, "load:host": 8e-7, "copy:device": 3e-8},
            num_kv_tokens=2_000_000,
            source=_ESTIMATE + ", over four devices at 80% of linear",
        ),
    )
}


def load_cost(name: str) -> StepCost:
    """One of `COSTS`, or a file that `save_cost` wrote. Raises `ConfigError`."""
    if name in COSTS:
        return COSTS[name]
    path = Path(name)
    if not path.is_file():
        raise ConfigError(f"there is no cost {name!r}: it is neither a file nor one of {', '.join(COSTS)}")
    try:
        return msgspec.json.decode(path.read_bytes(), type=StepCost)
    except (msgspec.DecodeError, ConfigError) as error:
        raise ConfigError(f"{path}: is not a cost file: {error}") from error


def save_cost(cost: StepCost, path: Path, **more: Any) -> None:
    """`more` is kept beside the coefficients, for readers."""
    document = {**msgspec.to_builtins(cost), **more}
    path.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n")
