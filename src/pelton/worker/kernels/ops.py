"""The one dispatch: what a kernel backend offers, and which backends there are.

A backend implements `Kernels`; a new one may subclass `ReferenceKernels` and replace only what it does
faster. Weights are held by objects that a backend makes, so that it can keep them packed as it likes.

Law 3: a row of a result depends only on that row's inputs, bit for bit: not on the number of rows, its
place among them, or what the other rows hold. A backend that cannot promise it says so.

Legend: T tokens of the step, R requests, S rows, H hidden size, F intermediate size, V vocabulary,
N query heads, K key-value heads, D head size, B blocks in a table, I and O in and out features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from pelton.core.errors import ConfigError
from pelton.weights.tensors import ModelFiles, WeightTensor


class LinearLoader(Protocol):
    """Makes weights in the backend's own layout. Lives while a model is loaded: it may keep a buffer to
    decode into, so that loading neither fragments nor doubles the memory."""

    def load(self, tensors: Sequence[WeightTensor]) -> Any:
        """The matrices `tensors` [O_i, I] one below another, as `linear` wants them."""
        ...


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What is the same for every attention layer of a KV group."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    sliding_window: int | None  # tokens seen, the current one included


class Kernels(Protocol):
    name: str
    kv_dtype: torch.dtype | None  # of the cache, where the user leaves it open; None: as the activations

    def num_weight_bytes(self, tensor: WeightTensor, dtype: torch.dtype) -> int:
        """Memory that `tensor` takes once it is loaded for products in `dtype`, at most."""
        ...

    def make_linear_loader(self, dtype: torch.dtype) -> LinearLoader:
        """Loader of weights for products in `dtype`."""
        ...

    def weight_cache(self, files: ModelFiles, path: Path | None) -> AbstractContextManager[None]:
        """Within it, loaders map weights of `files` that an earlier start left at `path` in the backend's layout,
        or leave theirs there. A cache that is off (None), or cannot be read or written, costs time, never a start."""
        ...

    def linear(self, x: torch.Tensor, weight: Any, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [S, I] times weight [O, I] transposed, plus bias [O]. Returns [S, O] in x's dtype.

        A result far wider than its input (logits, gates) may be overwritten by the next call of its width.
        """
        ...

    def embedding(self, token_ids: torch.Tensor, table: WeightTensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows `token_ids` [T] of `table` [V, H], decoded from the file's own bytes. Returns [T, H]."""
        ...

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last axis; weight is float32, and so is the sum."""
        ...

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(rms_norm(x + residual), x + residual). May reuse the memory of either input."""
        ...

    def rotate_and_store(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> torch.Tensor:
        """Rotary embedding of query [T, N, D] and key [T, K, D], then key and value into the cache.

        Halves are rotated (NeoX order): pairs (j, j + r/2) of the first r dimensions; cos and sin are
        float32 [T, r/2]; dimensions from r on stay as they are. Keys and values [T, K, D] go to slots [T]
        of caches [num_blocks, block_size, K, D]. Returns the rotated query; may reuse the inputs' memory.
        """
        ...

    def plan_attention(
        self,
        shape: AttentionShape,
        query_start_loc: Sequence[int],
        seq_lens: Sequence[int],
        block_tables: torch.Tensor,
    ) -> Any:
        """Work shared by all layers of a KV group in one step. block_tables [R, B]; see `GroupBatch`."""
        ...

    def paged_attention(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        plan: Any,
        scale: float,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """Causal attention of query [T, N, D] over the cached positions of each request.

        Request r's last query is at position seq_lens[r] - 1. Query head n reads key-value head
        n // (N / K). Scores are query . key * scale, then softcap * tanh(score / softcap) where given
        (Gemma 2). Slots outside a request's positions or window are never read. Returns [T, N * D].
        """
        ...

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up for gate_up [T, 2F] = (gate, up). Returns [T, F]."""
        ...

    def gelu_tanh_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """gelu(gate) * up with the tanh approximation. Returns [T, F]."""
        ...

    def softcap(self, x: torch.Tensor, cap: float) -> torch.Tensor:
        """cap * tanh(x / cap)."""
        ...


def _reference(num_threads: int, activation_dtype: str) -> Kernels:
    from pelton.worker.kernels.reference import ReferenceKernels

    del num_threads  # torch has its own setting
    if activation_dtype != "auto":
        raise ConfigError(
            f"activation_dtype is {activation_dtype}, but only native kernels round activations; the reference keeps "
            "them as dtype says"
        )
    return ReferenceKernels()


def _native(num_threads: int, activation_dtype: str) -> Kernels:
    from pelton.worker.kernels.cpu.backend import NativeKernels

    try:
        return NativeKernels(num_threads, activation_dtype=activation_dtype)
    except ValueError as error:
        raise ConfigError(f"activation_dtype is {activation_dtype}: {error}") from error


# Name -> maker, imported on demand: a backend may need a compiled module or a GPU.
BACKENDS: dict[str, Callable[[int, str], Kernels]] = {"native": _native, "reference": _reference}


def make_kernels(
    backend: str = "auto", dtype: torch.dtype = torch.float32, num_threads: int = 1, activation_dtype: str = "auto"
) -> Kernels:
    """Raises `ConfigError` for an unknown name, or activations that the backend does not round to.

    "auto" is the fastest backend for activations of `dtype`: native for float32, which is what it
    computes in, else the reference. `activation_dtype` is what they are rounded to within products.
    """
    if backend == "auto":
        backend = "native" if dtype is torch.float32 else "reference"
    if backend not in BACKENDS:
        raise ConfigError(f"kernel backend {backend!r} is unknown; known are auto, {', '.join(BACKENDS)}")
    return BACKENDS[backend](num_threads, activation_dtype)
