"""FlashInfer beside the own attention kernel on prompts, in results and speed; nothing where it is not installed."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from benchmarks.gpu.attention import LLAMA, QWEN
from benchmarks.gpu.parts import in_parts

from pelton.worker.kernels.ops import AttentionShape, LayerCache
from pelton.worker.kernels.triton.flashinfer_attention import (
    FlashInferAttention,
    compare,
    is_installed,
    wrapper_maker,
)

_BLOCK_SIZE = 16
_TOKENS = (2048, 8192)


def beside_flashinfer(device: torch.device) -> Iterator[dict[str, Any]]:
    """The first call compiles its kernels, where they did not come compiled: minutes, once."""
    if not is_installed(device):
        return iter([{"flashinfer": "not installed"}])
    heads = {"8B": LLAMA, "0.5B": QWEN}
    work = [(name, num_tokens) for name in heads for num_tokens in _TOKENS]
    return in_parts((f"{name} {num}", partial(_compared, name, heads[name], num, device)) for name, num in work)


def _compared(
    name: str, heads: tuple[int, int, int], num_tokens: int, device: torch.device
) -> Iterator[dict[str, Any]]:
    num_heads, num_kv_heads, head_dim = heads
    shape = AttentionShape(num_heads, num_kv_heads, head_dim, _BLOCK_SIZE, None)
    caches = torch.zeros(
        (2, num_tokens // _BLOCK_SIZE + 1, _BLOCK_SIZE, num_kv_heads, head_dim), dtype=torch.bfloat16, device=device
    )
    rival = FlashInferAttention(wrapper_maker(device), shape, torch.bfloat16)
    difference, own_ms, other_ms = compare(rival, shape, LayerCache(0, *caches), torch.bfloat16, num_tokens)
    yield {
        "name": f"{name}, prompt of {num_tokens}",
        "own_ms": own_ms,
        "flashinfer_ms": other_ms,
        "own_beside_flashinfer": other_ms / own_ms,
        "difference": difference,
    }
