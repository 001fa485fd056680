"""The one dispatch: what a kernel backend offers, and which backends there are.

A backend implements `Kernels`. Weights are held by objects that a backend makes, so that it can keep them
packed as it likes, and so are arrays: what passes through a model is of the backend's own type. Layers do
nothing with an array but hand it to an op, so that a forward pass can be recorded as well as run.

Law 3: a row of a result depends only on that row's inputs, bit for bit: not on the number of rows, its
place among them, or what the other rows hold. A backend that cannot promise it says so.

Legend: T tokens of the step, R requests, S rows, H hidden size, F intermediate size, V vocabulary,
N query heads, K key-value heads, D head size, B blocks in a table, I and O in and out features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pelton.core.errors import ConfigError
from pelton.core.step_size import StepSize
from pelton.weights.lora.adapter import LoraWeights
from pelton.weights.tensors import ModelFiles, WeightTensor
from pelton.worker.config import WorkerConfig, has_gpu, require_torch, require_triton
from pelton.worker.forward_batch import Adapters, ForwardBatch
from pelton.worker.kernels.block_copies import BlockCopies
from pelton.worker.sampling.sampler import Sampler

# numpy.ndarray for native kernels, torch.Tensor for the reference, or a value that is being recorded.
Array = Any

# Types of activations and caches, with the bytes of an element.
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What is the same for every attention layer of a KV group."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    sliding_window: int | None  # tokens seen, the current one included


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Where a layer's keys and values live."""

    group_id: int
    keys: Array  # [num_blocks, block_size, K, D]
    values: Array


@dataclass(frozen=True, slots=True)
class AttentionContext:
    """What a layer's attention needs of the step. All but the caches is shared by the layers of a KV group."""

    cos: Array  # [T, rotary_dim / 2]
    sin: Array
    slot_mapping: Array  # [T]
    plan: Any  # the backend's
    key_cache: Array  # [num_blocks, block_size, K, D]
    value_cache: Array


@dataclass(frozen=True, slots=True)
class LoraSite:
    """A product that adapters may change: matrices [O_i, I] of a weight, one below another."""

    modules: tuple[tuple[str, int], ...]  # name, out features
    num_inputs: int

    @property
    def num_outputs(self) -> int:
        return sum(size for _, size in self.modules)


class Ops(Protocol):
    """What layers are written in."""

    def linear(self, x: Array, weight: Any, bias: Array | None = None) -> Array:
        """x [S, I] times weight [O, I] transposed, plus bias [O]. Returns [S, O] in x's dtype. A result far wider than
        its input (logits, gates) may be overwritten by the next call of its width."""
        ...

    def adapt(self, y: Array, x: Array, site: int) -> Array:
        """y [S, O], a product of x [S, I], with what the rows' LoRA adapters add at `site`. May write over y."""
        ...

    def embedding(self, token_ids: Array, table: Any, scale: float = 1.0) -> Array:
        """Rows `token_ids` [T] of `table` [V, H], which is `Kernels.load_embedding`'s, times `scale`, which is rounded
        to the dtype of the result first, as Gemma was trained. Returns [T, H]."""
        ...

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        """x / sqrt(mean(x^2) + eps) * weight over the last axis; weight is float32, and so is the sum."""
        ...

    def add_rms_norm(self, x: Array, residual: Array, weight: Array, eps: float) -> tuple[Array, Array]:
        """(rms_norm(x + residual), x + residual). May reuse the memory of either input."""
        ...

    def split_heads(self, x: Array, num_heads: int, num_kv_heads: int) -> tuple[Array, Array, Array]:
        """Views of x [T, (N + 2 K) D]: query [T, N, D], key and value [T, K, D]."""
        ...

    def rotate_and_store(
        self,
        query: Array,
        key: Array,
        value: Array,
        cos: Array,
        sin: Array,
        key_cache: Array,
        value_cache: Array,
        slot_mapping: Array,
    ) -> Array:
        """Rotary embedding of query [T, N, D] and key [T, K, D], then key and value into the cache.

        Halves are rotated (NeoX order): pairs (j, j + r/2) of the first r dimensions; cos and sin are
        float32 [T, r/2]; dimensions from r on stay as they are. Keys and values [T, K, D] go to slots [T]
        of caches [num_blocks, block_size, K, D]. Returns the rotated query; may reuse the inputs' memory.
        """
        ...

    def paged_attention(
        self,
        query: Array,
        key_cache: Array,
        value_cache: Array,
        plan: Any,
        scale: float,
        softcap: float | None = None,
    ) -> Array:
        """Causal attention of query [T, N, D] over the cached positions of each request.

        Request r's last query is at position seq_lens[r] - 1. Query head n reads key-value head
        n // (N / K). Scores are query . key * scale, then softcap * tanh(score / softcap) where given
        (Gemma 2). Slots outside a request's positions or window are never read. Returns [T, N * D].
        """
        ...

    def silu_mul(self, gate_up: Array) -> Array:
        """silu(gate) * up for gate_up [T, 2F] = (gate, up). Returns [T, F]."""
        ...

    def gelu_tanh_mul(self, gate_up: Array) -> Array:
        """gelu(gate) * up with the tanh approximation. Returns [T, F]."""
        ...

    def moe(self, x: Array, logits: Array, experts: Any, num_chosen: int, normalizes: bool) -> Array:
        """The results of the `num_chosen` experts whose `logits` [T, E] are greatest for a row of x [T, H], added up
        in their order, each times its softmax: over all E, or over those chosen alone if `normalizes`. [T, H].

        An expert is down(silu_mul(gate_up(x))). `experts` are of `Kernels.make_experts`.
        """
        ...

    def softcap(self, x: Array, cap: float) -> Array:
        """cap * tanh(x / cap) in float32. May reuse the memory of x."""
        ...


class LinearLoader(Protocol):
    """Makes weights in the backend's own layout. Lives while a model is loaded: it may keep a buffer to
    decode into, so that loading neither fragments nor doubles the memory."""

    def load(self, tensors: Sequence[WeightTensor]) -> Any:
        """The matrices `tensors` [O_i, I] one below another, as `linear` wants them."""
        ...


class Forward(Protocol):
    """A model's formula, written once for arrays that are there and for values that are recorded."""

    def forward(self, ops: Ops, token_ids: Array, contexts: Sequence[AttentionContext]) -> Array:
        """token_ids [T] and one context per layer -> hidden states [T, H]; writes the KV of all tokens."""
        ...

    def compute_logits(self, ops: Ops, hidden: Array) -> Array:
        """hidden [S, H] of the rows wanted -> [S, V]."""
        ...


class Program(Protocol):
    """A model bound to its KV cache, ready for steps: compiled, captured, or run op by op."""

    def forward(
        self, batch: ForwardBatch, late_tokens: Array = None, late_rows: npt.NDArray[np.int64] | None = None
    ) -> None:
        """Write the KV of all tokens; keep the hidden states [T, H] until the next call.

        `late_rows` [T] says which tokens are rows of `late_tokens` (`LateSamples.tokens`, of this backend's sampler)
        instead of what `batch` has; -1: none.
        """
        ...

    def logits(self, rows: npt.NDArray[np.int64], adapters: Adapters = ()) -> Array:
        """float32 [S, V] of `rows` [S] among the tokens of the last step, as the backend's sampler takes them; may be
        overwritten by the next call. `adapters` are those of the step."""

    def try_argmax(self, rows: npt.NDArray[np.int64], adapters: Adapters = ()) -> list[int] | None:
        """Each row's token of the greatest of `logits`, of equal ones the first, found while they are made; None
        where there is no way to, or a row is not finite."""

    def hidden(self, first: int, num_rows: int) -> npt.NDArray[np.float32]:
        """Hidden states [num_rows, H] of tokens of the last step; may be overwritten by the next `forward`."""
        ...


class Kernels(Ops, Protocol):
    name: str
    dtype: str  # of activations
    kv_dtypes: tuple[str, ...]  # that a cache may have; the first where the user leaves it open
    device_name: str  # "cpu", or the GPU's own
    step_size: StepSize  # that suits the device, where the user leaves it open
    max_logits_rows: int  # that are asked of a program, and given to the sampler, at a time

    def num_free_bytes(self) -> int | None:
        """Of the device's own memory, for weights and caches; None: they live in the host's."""
        ...

    def num_promised_bytes(self) -> int:
        """Of the host's memory, what loaded weights will take that they have not yet."""
        ...

    def num_weight_bytes(self, tensor: WeightTensor) -> int:
        """Memory that `tensor` takes once it is loaded for products, at most."""
        ...

    def make_linear_loader(self) -> LinearLoader: ...

    def load_embedding(self, table: WeightTensor) -> Any:
        """`table` [V, H] as `embedding` wants it."""
        ...

    def make_experts(self, gate_up: Sequence[Sequence[WeightTensor]], down: Sequence[WeightTensor]) -> Any:
        """The experts of a layer for `Ops.moe`: of each its gate and up projection [F, H], and its down projection
        [H, F]. Raises `UnsupportedModelError` where the backend has no mixtures of experts."""
        ...

    def round_weights(self, quantization: str) -> None:
        """Weights that are loaded from now on and are floats in the files: "fp8" or "int4". Raises `ConfigError` where
        the backend has no products with these."""
        ...

    def weight_cache(self, files: ModelFiles, path: Path | None) -> AbstractContextManager[None]:
        """Within it, loaders map weights of `files` that an earlier start left at `path` in the backend's layout,
        or leave theirs there. A cache that is off (None), or cannot be read or written, costs time, never a start."""
        ...

    def from_numpy(self, values: npt.NDArray[Any]) -> Array:
        """The same numbers in the same type; may share the memory."""
        ...

    def to_numpy(self, x: Array) -> npt.NDArray[np.float32]:
        """Float32 whatever the dtype of x; may share the memory."""
        ...

    def take_pages(self, cache: Array) -> None:
        """Take the memory of a contiguous part of a cache now, not as it is first written; what it holds stays."""
        ...

    def empty_cache(self, shape: tuple[int, ...], dtype: str) -> Array:
        """Memory that is not touched (so not really taken) before it is written. Raises MemoryError."""
        ...

    def make_block_copies(self) -> BlockCopies: ...

    def make_adapter(self, weights: LoraWeights, sites: Sequence[LoraSite]) -> Any:
        """An adapter in the backend's own layout, for a model whose products are `sites`; `Adapters` hold such."""
        ...

    def add_lora(self, y: Array, x: Array, site: int, adapters: Adapters) -> Array:
        """y [S, O] with scale * B A x [S, I] added in the rows of each of `adapters`. May write over y."""
        ...

    def select_rows(self, x: Array, rows: npt.NDArray[np.int64]) -> Array:
        """Rows `rows` [S] of x [T, H]."""
        ...

    def plan_attention(
        self,
        shape: AttentionShape,
        query_start_loc: npt.NDArray[np.int64],
        seq_lens: npt.NDArray[np.int64],
        block_tables: Array,
    ) -> Any:
        """Work shared by all layers of a KV group in one step. block_tables [R, B]; see `ForwardBatch`."""
        ...

    def compile(self, model: Forward, shapes: Sequence[AttentionShape], caches: Sequence[LayerCache]) -> Program:
        """`model` over `caches`, one per layer; `shapes` are those of the KV groups."""
        ...

    def make_sampler(self, vocab_size: int, eos_token_ids: Iterable[int]) -> Sampler:
        """Chooser of tokens; it bans `eos_token_ids` until a request's `min_tokens`."""
        ...


@dataclass(frozen=True, slots=True)
class KernelSettings:
    """What a backend is made with."""

    dtype: str = "float32"
    num_threads: int | None = None
    activation_dtype: str = "auto"
    batch_invariance: bool = True
    device_index: int = 0  # among GPUs


def _reference(settings: KernelSettings) -> Kernels:
    activation_dtype = settings.activation_dtype
    if activation_dtype != "auto":
        raise ConfigError(
            f"activation_dtype is {activation_dtype}, but only native kernels round activations; the reference keeps "
            "them as dtype says"
        )
    require_torch()
    from pelton.worker.kernels.reference import ReferenceKernels

    return ReferenceKernels(settings.dtype, settings.num_threads)


def _native(settings: KernelSettings) -> Kernels:
    from pelton.worker.kernels.cpu.backend import NativeKernels

    if settings.dtype != "float32":
        raise ConfigError(f"native kernels compute in float32, not {settings.dtype}: use --kernel-backend reference")
    try:
        return NativeKernels(settings.num_threads or 1, activation_dtype=settings.activation_dtype)
    except ValueError as error:
        raise ConfigError(f"activation_dtype is {settings.activation_dtype}: {error}") from error


def _triton(settings: KernelSettings) -> Kernels:
    if settings.activation_dtype != "auto":
        raise ConfigError(
            f"activation_dtype is {settings.activation_dtype}, but only native kernels round activations; Triton "
            "kernels keep them as dtype says"
        )
    require_triton()
    from pelton.worker.kernels.triton.backend import TritonKernels
    from pelton.worker.kernels.triton.device import find_device

    device = find_device(settings.device_index)
    return TritonKernels(settings.dtype, device, batch_invariant=settings.batch_invariance)


# Name -> maker, imported on demand: a backend may need a compiled module, a large package or a GPU.
BACKENDS: dict[str, Callable[[KernelSettings], Kernels]] = {
    "native": _native,
    "reference": _reference,
    "triton": _triton,
}


def make_kernels(
    backend: str = "auto",
    dtype: str = "float32",
    num_threads: int | None = None,
    activation_dtype: str = "auto",
    *,
    batch_invariance: bool = True,
    device_index: int = 0,
) -> Kernels:
    """Raises `ConfigError` for an unknown name and for a backend that cannot run here or not in these types.

    "auto" is the fastest backend for activations of `dtype`: native for float32, which is what it
    computes in, else the reference. `activation_dtype` is what they are rounded to within products.
    """
    if backend == "auto":
        backend = "native" if dtype == "float32" else "reference"
    if backend not in BACKENDS:
        raise ConfigError(f"kernel backend {backend!r} is unknown; known are auto, {', '.join(BACKENDS)}")
    return BACKENDS[backend](KernelSettings(dtype, num_threads, activation_dtype, batch_invariance, device_index))


def choose_kernels(config: WorkerConfig, num_threads: int | None = None, device_index: int = 0) -> Kernels:
    """The backend that `config` comes to here. Raises as `make_kernels`."""
    backend = config.kernel_backend
    if backend == "auto" and (config.device == "cuda" or (config.device == "auto" and has_gpu())):
        backend = "triton"
    if backend == "auto" and config.tensor_parallel_size > 1:
        backend = "reference"  # native kernels run on one rank
    on_gpu = backend == "triton" and has_gpu()
    if config.device == "cpu" and on_gpu:
        raise ConfigError("device is cpu, but Triton kernels would run on the GPU: use native or reference kernels")
    dtype = config.dtype if config.dtype != "auto" else "bfloat16" if on_gpu else "float32"
    return make_kernels(
        backend,
        dtype,
        num_threads,
        config.activation_dtype,
        batch_invariance=config.batch_invariance,
        device_index=device_index,
    )
