"""Attention of steps that are not captured (prompts, mixed steps) by FlashInfer, where it is installed and was faster.

Only without `batch_invariance`: its tiles of keys follow from its tiles of queries, and these from how many new tokens
the requests of a step have on average, so a row's sums depend on its company; `fixed_split_size` fixes where contexts
are cut, and not this. Decodes stay with the captured launches, since it plans anew for every step. Its kernels are
compiled when they are first asked for, if they did not come compiled.

Unproven: nothing of it has run on a GPU. Legend: T tokens, R requests, B blocks in a table.
"""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pelton.worker.kernels.ops import AttentionShape, LayerCache
from pelton.worker.kernels.triton.attention import AttentionPlan, paged_attention, plan_attention

Ints = npt.NDArray[np.int64]

_log = logging.getLogger("pelton.worker")
_HEAD_DIMS = (64, 128, 256)
_DTYPES = (torch.bfloat16, torch.float16)
_WORKSPACE_BYTES = 128 << 20
_TRIAL_TOKENS = 2048
_TRIAL_CALLS = 5
_MOST_SHARE = 0.95  # of the own kernel's time: nearer than that is noise
_MOST_DIFFERENCE = 2e-2  # of results, as norms: both round to 8 bits


class FlashInferAttention:
    """Of the layers of one KV group, over a dense cache."""

    def __init__(self, make_wrapper: Callable[[], Any], shape: AttentionShape, dtype: torch.dtype) -> None:
        """`make_wrapper` makes a `flashinfer.BatchPrefillWithPagedKVCacheWrapper`; `dtype` of queries and cache."""
        self._make_wrapper = make_wrapper
        self._shape = shape
        self._dtype = dtype
        self._wrappers: dict[
            float, tuple[Any, torch.cuda.Event | None]
        ] = {}  # by scale, with when it has read its plan

    def plan(self, own: AttentionPlan, query_start_loc: Ints, seq_lens: Ints, block_tables: Ints) -> FlashInferPlan:
        """`own` is of the same step, for what only the own kernel does."""
        return FlashInferPlan(
            own, self, page_arguments(query_start_loc, seq_lens, block_tables, self._shape.block_size)
        )

    def begin(self, arguments: dict[str, torch.Tensor], scale: float) -> Any:
        """A wrapper that has planned a step."""
        shape = self._shape
        wrapper, has_read = self._wrappers.get(scale) or (self._make_wrapper(), None)
        if has_read is not None:
            has_read.synchronize()  # it plans in one pinned buffer, which the device may still be to copy from
        wrapper.plan(
            **arguments,
            num_qo_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim_qk=shape.head_dim,
            page_size=shape.block_size,
            causal=True,
            sm_scale=scale,
            q_data_type=self._dtype,
            kv_data_type=self._dtype,
        )
        if torch.cuda.is_available():
            has_read = torch.cuda.Event()
            has_read.record()
        self._wrappers[scale] = wrapper, has_read
        return wrapper


@dataclass(frozen=True, slots=True)
class FlashInferPlan:
    """Of one step. The first layer makes it, with the scale that only layers know."""

    own: AttentionPlan
    attention: FlashInferAttention
    arguments: dict[str, torch.Tensor]
    begun: dict[float, Any] = field(default_factory=dict)

    def attend(
        self, query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """As `ops.Ops.paged_attention`."""
        wrapper = self.begun.get(scale)
        if wrapper is None:
            wrapper = self.begun[scale] = self.attention.begin(self.arguments, scale)
        result: torch.Tensor = wrapper.run(query.contiguous(), (key_cache, value_cache))
        return result.flatten(1)


def page_arguments(
    query_start_loc: Ints, seq_lens: Ints, block_tables: Ints, block_size: int
) -> dict[str, torch.Tensor]:
    """int32 arrays on the host: where requests begin, and their blocks one request's after another's."""
    num_blocks = -(-seq_lens // block_size)
    is_used = np.arange(block_tables.shape[1])[None, :] < num_blocks[:, None]
    arrays = {
        "qo_indptr": query_start_loc,
        "paged_kv_indptr": np.concatenate([[0], np.cumsum(num_blocks)]),
        "paged_kv_indices": block_tables[is_used],
        "paged_kv_last_page_len": (seq_lens - 1) % block_size + 1,
    }
    return {name: torch.from_numpy(values.astype(np.int32)) for name, values in arrays.items()}


def find_rivals(
    shapes: Sequence[AttentionShape], caches: Sequence[LayerCache], dtype: torch.dtype, device: torch.device
) -> list[FlashInferAttention | None]:
    """For each KV group FlashInfer, if it is there, does what the group needs, and won a trial on its cache, whose
    blocks nobody uses yet. What it raises only costs it the trial."""
    nobody: list[FlashInferAttention | None] = [None] * len(shapes)
    if not is_installed(device):
        return nobody
    try:
        make_wrapper = wrapper_maker(device)
    except Exception as error:
        _log.warning("FlashInfer is installed, but cannot be used: %s", error)
        return nobody
    found: list[FlashInferAttention | None] = []
    for group_id, shape in enumerate(shapes):
        cache = next(cache for cache in caches if cache.group_id == group_id)
        rival = FlashInferAttention(make_wrapper, shape, dtype)
        found.append(rival if can_serve(shape, cache.keys, dtype) and _wins(rival, shape, cache, dtype) else None)
    return found


def wrapper_maker(device: torch.device) -> Callable[[], Any]:
    """Makes wrappers that share one workspace, since they run one after another. Raises what the import does."""
    wrapper = importlib.import_module("flashinfer").BatchPrefillWithPagedKVCacheWrapper
    workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    return lambda: wrapper(workspace, "NHD")


def is_installed(device: torch.device) -> bool:
    return device.type == "cuda" and find_spec("flashinfer") is not None


def can_serve(shape: AttentionShape, cache: torch.Tensor, dtype: torch.dtype) -> bool:
    return (
        shape.sliding_window is None
        and shape.head_dim in _HEAD_DIMS
        and cache.dtype is dtype
        and dtype in _DTYPES
        and len(cache) > 2
    )


def _wins(rival: FlashInferAttention, shape: AttentionShape, cache: LayerCache, dtype: torch.dtype) -> bool:
    """On a prompt of random numbers: near enough, and faster than the own kernel."""
    try:
        difference, own_ms, other_ms = compare(rival, shape, cache, dtype)
    except Exception as error:
        _log.warning("FlashInfer is not used for attention: %s", error)
        return False
    wins = difference <= _MOST_DIFFERENCE and other_ms <= _MOST_SHARE * own_ms
    _log.info(
        "FlashInfer is %s for attention: %.3f ms where the own kernel takes %.3f, results %.1e apart",
        *("used" if wins else "not used", other_ms, own_ms, difference),
    )
    return wins


def compare(
    rival: FlashInferAttention,
    shape: AttentionShape,
    cache: LayerCache,
    dtype: torch.dtype,
    most_tokens: int | None = None,
) -> tuple[float, float, float]:
    """(difference of results over their norm, the own kernel's milliseconds, the other's), for one prompt of as many
    tokens as the cache holds, or as are wanted."""
    num_blocks = min((most_tokens or _TRIAL_TOKENS) // shape.block_size, len(cache.keys) - 1)
    num_tokens = num_blocks * shape.block_size
    starts, lens, tables = np.array([0, num_tokens]), np.array([num_tokens]), np.arange(1, num_blocks + 1)[None, :]
    for blocks in (cache.keys, cache.values):
        blocks[1 : num_blocks + 1].normal_()
    device = cache.keys.device
    query = torch.randn((num_tokens, shape.num_heads, shape.head_dim), device=device).to(dtype)
    own = plan_attention(shape, starts, lens, torch.from_numpy(tables).to(device))
    plan, scale = rival.plan(own, starts, lens, tables), shape.head_dim**-0.5
    launches = (
        lambda: paged_attention(query, cache.keys, cache.values, own, scale),
        lambda: plan.attend(query, cache.keys, cache.values, scale),
    )
    first, second = (launch().float() for launch in launches)
    difference = float((first - second).norm() / first.norm())
    own_ms, other_ms = (time_ms(launch, device) for launch in launches)
    return difference, own_ms, other_ms


def time_ms(launch: Callable[[], object], device: torch.device) -> float:
    """Of one of a few calls in a row, the first ones aside."""
    for number in range(2 * _TRIAL_CALLS):
        if number == _TRIAL_CALLS:
            _finish(device)
            start_s = time.perf_counter()
        launch()
    _finish(device)
    return 1e3 * (time.perf_counter() - start_s) / _TRIAL_CALLS


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
