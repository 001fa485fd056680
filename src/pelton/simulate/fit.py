"""Fits `StepCost` to measured steps: least absolute relative errors, no coefficient below zero."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pelton.core.errors import ConfigError
from pelton.simulate.cost import StepCost, StepShape
from pelton.simulate.step_log import MeasuredStep

Array = npt.NDArray[np.float64]

MIN_STEPS = 50
_KNOTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_MIN_STEPS_PER_KNOT = 3
_NUM_ITERATIONS = 1000
# Least squares, weighted again and again by what is left, come to least absolute errors: steps that something else on
# the machine disturbed weigh little.
_NUM_REWEIGHTINGS = 6
_SMALLEST_RESIDUAL = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class FitError:
    """Of predicted step times, on steps that the fit did not see. `total` is the error of their sum."""

    num_steps: int
    median: float
    p90: float
    total: float


def fit_cost(
    steps: Sequence[MeasuredStep], name: str, num_kv_tokens: int, kv_bytes_per_token: int, source: str
) -> tuple[StepCost, FitError]:
    """Every fourth step is kept from the fit, to measure its error. Raises `ConfigError` for too few steps."""
    if len(steps) < MIN_STEPS:
        raise ConfigError(f"{len(steps)} steps are too few for a fit; {MIN_STEPS} are the least")
    seen = [step for number, step in enumerate(steps) if number % 4]
    unseen = [step for number, step in enumerate(steps) if number % 4 == 0]
    knots = _choose_knots(seen)
    kv_ops = sorted({name for step in seen for name in step.shape.moved_kv_tokens})
    features = np.array([_features(step.shape, knots, kv_ops) for step in seen])
    seconds = np.array([step.elapsed_s for step in seen])
    relative = features / seconds[:, None]
    weights = _solve(relative, np.ones(len(seen)))
    for _ in range(_NUM_REWEIGHTINGS):
        weights = _solve(relative, 1 / np.maximum(np.abs(relative @ weights - 1), _SMALLEST_RESIDUAL))
    base = np.cumsum(weights[: len(knots)])
    sample_s, decode_context_s, prefill_pair_s, *kv_op_s = (float(weight) for weight in weights[len(knots) :])
    cost = StepCost(
        name=name,
        knots=tuple(zip(knots, map(float, base), strict=True)),
        sample_s=sample_s,
        decode_context_s=decode_context_s,
        prefill_pair_s=prefill_pair_s,
        kv_op_s=dict(zip(kv_ops, kv_op_s, strict=True)),
        num_kv_tokens=num_kv_tokens,
        kv_bytes_per_token=kv_bytes_per_token,
        source=source,
    )
    return cost, measure_error(cost, unseen)


def measure_error(cost: StepCost, steps: Sequence[MeasuredStep]) -> FitError:
    predicted = np.array([cost.step_s(step.shape) for step in steps])
    seconds = np.array([step.elapsed_s for step in steps])
    off = np.abs(predicted / seconds - 1)
    return FitError(
        num_steps=len(steps),
        median=round(float(np.median(off)), 4),
        p90=round(float(np.percentile(off, 90)), 4),
        total=round(float(predicted.sum() / seconds.sum() - 1), 4),
    )


def _choose_knots(steps: Sequence[MeasuredStep]) -> tuple[int, ...]:
    """Powers of two around which there are steps, from the smallest step to the largest."""
    tokens = np.array([step.shape.num_tokens for step in steps])
    low, high = int(tokens.min()), int(tokens.max())
    inner = [
        knot
        for knot in _KNOTS
        if low < knot < high and ((tokens > knot / 2) & (tokens < knot * 2)).sum() >= _MIN_STEPS_PER_KNOT
    ]
    return (low, *inner, max(high, low + 1))


def _features(shape: StepShape, knots: Sequence[int], kv_ops: Sequence[str]) -> list[float]:
    """What the coefficients are multiplied with. The base comes as its rises from knot to knot: it never falls."""
    rises = [min(1.0, max(0.0, (shape.num_tokens - low) / (high - low))) for low, high in itertools.pairwise(knots)]
    own = [shape.num_samples, shape.num_decode_positions, shape.num_prefill_pairs]
    return [1.0, *rises, *map(float, own), *(float(shape.moved_kv_tokens.get(name, 0)) for name in kv_ops)]


def _solve(relative: Array, importance: Array) -> Array:
    """min sum(importance * (relative @ x - 1)^2) with x >= 0, by coordinate descent on the normal equations."""
    scale = np.maximum(np.linalg.norm(relative, axis=0), 1e-300)
    scaled = relative / scale
    gram = scaled.T @ (scaled * importance[:, None])
    target = scaled.T @ importance
    weights = np.zeros(len(scale))
    for _ in range(_NUM_ITERATIONS):
        for index in range(len(weights)):
            slope = gram[index] @ weights - target[index]
            weights[index] = max(0.0, weights[index] - slope / max(float(gram[index, index]), 1e-300))
    solution: Array = weights / scale
    return solution
