"""Paged attention on the device: a plan's arrays, and the launches over them.

Grids depend on `PlanSizes` alone; what is in a plan beyond that is read on the device, where an item or a merge
of zeros ends at once. So a launch can be captured once for each size, with arrays at the same addresses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton.language as tl

from pelton.worker.kernels.ops import AttentionShape
from pelton.worker.kernels.triton.attention_config import AttentionConfig, choose_config, padded_head_dim
from pelton.worker.kernels.triton.attention_kernels import attention_kernel, merge_kernel
from pelton.worker.kernels.triton.attention_plan import HostPlan, Ints, PlanSizes, make_plan
from pelton.worker.kernels.triton.device import is_interpreted
from pelton.worker.kernels.triton.kv_tiles import codes_and_scales, format_number, format_of
from pelton.worker.kernels.triton.stages import launch_with_stages
from pelton.worker.kv_format import KVFormat

_LOG2_E = math.log2(math.e)
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """A `HostPlan` on the device: int32 arrays, parts of one."""

    shape: AttentionShape
    config: AttentionConfig
    sizes: PlanSizes
    num_slots: int  # of partial results that there must be room for
    num_blocks: int  # that a cache must have
    narrow_items: torch.Tensor
    wide_items: torch.Tensor
    merges: torch.Tensor
    tile_tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    tables: torch.Tensor


def plan_on_device(host: HostPlan, words: torch.Tensor, sizes: PlanSizes, num_slots: int) -> AttentionPlan:
    """The plan whose `HostPlan.pack(sizes)` is, or will be, at `words`. For a graph, `num_slots` is the most that a
    step may need (`AttentionConfig.max_slots`)."""
    return AttentionPlan(host.shape, host.config, sizes, num_slots, host.num_blocks, *sizes.views(words))


def plan_attention(
    shape: AttentionShape,
    query_start_loc: Ints,
    seq_lens: Ints,
    block_tables: torch.Tensor,
    config: AttentionConfig | None = None,
) -> AttentionPlan:
    """As `ops.Kernels.plan_attention`, with one copy to the device of `block_tables` [R, B]."""
    tables = block_tables.cpu().numpy() if isinstance(block_tables, torch.Tensor) else block_tables
    host = make_plan(shape, query_start_loc, seq_lens, tables, config or choose_config(shape))
    words = torch.from_numpy(host.pack(host.sizes))
    if isinstance(block_tables, torch.Tensor):
        words = words.to(block_tables.device)
    return plan_on_device(host, words, host.sizes, host.num_slots)


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    plan: AttentionPlan,
    scale: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """As `ops.Ops.paged_attention`; the caches may be of any format of `worker/kv_format.py`.

    query [T, N, D]; T may be more than the plan's tokens, and the rest of the result then is undefined.
    """
    if len(key_cache) < plan.num_blocks:
        raise IndexError(f"a block table names block {plan.num_blocks - 1}, and the cache has {len(key_cache)}")
    num_tokens, num_heads, head_dim = query.shape
    if query.stride(-1) != 1:
        query = query.contiguous()
    out = torch.empty(num_tokens, num_heads * head_dim, dtype=query.dtype, device=query.device)
    parts = torch.empty(max(1, plan.num_slots), num_heads, head_dim + 2, dtype=torch.float32, device=query.device)
    sums, stats = parts.view(-1)[: -2 * num_heads * len(parts)], parts.view(-1)[-2 * num_heads * len(parts) :]
    launch = _Launch(query, key_cache, value_cache, plan, format_of(key_cache))
    launch.attend(out, (sums, stats), scale, softcap)
    if plan.sizes.num_merges:
        merge_kernel[(plan.sizes.num_merges, num_heads)](
            out,
            sums,
            stats,
            plan.merges,
            NUM_HEADS=num_heads,
            HEAD_DIM=head_dim,
            BLOCK_D=padded_head_dim(head_dim),
            num_warps=1,
            enable_fp_fusion=False,
        )
    return out


@dataclass(frozen=True, slots=True)
class _Launch:
    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    plan: AttentionPlan
    kv_format: KVFormat

    def attend(
        self, out: torch.Tensor, parts: tuple[torch.Tensor, torch.Tensor], scale: float, softcap: float | None
    ) -> None:
        config, sizes = self.plan.config, self.plan.sizes
        for num_items, items, num_rows in (
            (sizes.num_wide, self.plan.wide_items, config.wide_rows),
            (sizes.num_narrow, self.plan.narrow_items, config.narrow_rows),
        ):
            if num_items:
                self._attend(out, parts, (items, num_items, num_rows), scale, softcap)

    def _attend(
        self,
        out: torch.Tensor,
        parts: tuple[torch.Tensor, torch.Tensor],
        work: tuple[torch.Tensor, int, int],
        scale: float,
        softcap: float | None,
    ) -> None:
        plan, shape, config = self.plan, self.plan.shape, self.plan.config
        items, num_items, num_rows = work
        codes_bytes = self.kv_format.codes_bytes(shape.block_size, shape.num_kv_heads, shape.head_dim)
        product = self._product_type()
        key_cache, key_scales = codes_and_scales(self.key_cache, codes_bytes)
        value_cache, value_scales = codes_and_scales(self.value_cache, codes_bytes)
        padded = padded_head_dim(shape.head_dim)
        arguments = (
            *(self.query, key_cache, value_cache, key_scales, value_scales, out, *parts),
            *(items, plan.tile_tokens, plan.positions, plan.slots, plan.tables),
            scale * _LOG2_E if softcap is None else 2 * scale * _LOG2_E / softcap,
            0.0 if softcap is None else softcap * _LOG2_E,
        )
        options = {
            "QUERY_STRIDE": self.query.stride(0),
            "QUERY_HEAD_STRIDE": self.query.stride(1),
            **self._cache_strides(),
            "FORMAT": format_number(self.kv_format),
            "NUM_KV_HEADS": shape.num_kv_heads,
            "GROUP": shape.num_heads // shape.num_kv_heads,
            "HEAD_DIM": shape.head_dim,
            "BLOCK_D": padded,
            "BLOCK_SIZE": shape.block_size,
            "ROWS": num_rows,
            "TILE": config.tile_positions,
            "CHUNK": config.chunk_positions,
            "WINDOW": shape.sliding_window or 0,
            "SOFTCAP": softcap is not None,
            "PRODUCT": product,
            # Weights times the scales of values are too small for float16.
            "VALUE_PRODUCT": tl.bfloat16 if self.kv_format.is_packed and product is tl.float16 else product,
            # A product of float32 on plain multipliers needs more registers than there are.
            "PRECISION": "tf32x3" if product is tl.float32 and not is_interpreted() else "ieee",
            "num_warps": config.num_warps(num_rows, shape.head_dim),
            "enable_fp_fusion": False,
        }
        launch_with_stages(
            ("attention", padded, num_rows, self.query.dtype, self.kv_format.name),
            config.num_stages(shape.head_dim, self.key_cache.element_size()),
            lambda stages: attention_kernel[(num_items, shape.num_kv_heads)](*arguments, STAGES=stages, **options),
        )

    def _cache_strides(self) -> dict[str, int]:
        if not self.kv_format.is_packed:
            block, slot, head, _ = self.key_cache.stride()
        else:
            head = self.plan.shape.head_dim * self.kv_format.element_bits // 8
            slot = head * self.plan.shape.num_kv_heads
            block = self.key_cache.stride(0)
        return {"BLOCK_STRIDE": block, "SLOT_STRIDE": slot, "HEAD_STRIDE": head}

    def _product_type(self) -> tl.dtype:
        """That of the queries, or the cache's where it is the narrower one. The interpreter multiplies in float32: it
        takes bfloat16 for integers."""
        if is_interpreted():
            return tl.float32
        if not self.kv_format.is_packed and self.query.dtype is torch.float32:
            return _TYPES[self.key_cache.dtype]
        return _TYPES[self.query.dtype]
