"""`LoraWeights`: the matrices of an adapter by module, checked against the model, and named by their content.

Legend: r rank, I and O in and out features of the module that is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

from pelton.core.errors import ModelFileError
from pelton.core.model_spec import ModelSpec
from pelton.weights.mapped_file import shown

if TYPE_CHECKING:
    from pelton.weights.tensors import WeightTensor

_ID_BYTES = 16
_MAX_SCALE = 1e30  # what float32 holds, and more than enough


@dataclass(frozen=True, slots=True)
class LoraModule:
    """y += scale * B (A x)."""

    a: WeightTensor  # [r, I]
    b: WeightTensor  # [O, r]
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, slots=True)
class LoraWeights:
    lora_id: str
    modules: Mapping[str, LoraModule]  # by the name of the module that is changed, as Hugging Face has it
    base_model: str | None

    @property
    def rank(self) -> int:
        return max(module.rank for module in self.modules.values())


@dataclass(frozen=True, slots=True)
class LoraTensors:
    """What a file holds, before it is checked: tensors by module."""

    path: Path
    a: Mapping[str, WeightTensor]
    b: Mapping[str, WeightTensor]
    base_model: str | None
    scale_of: Callable[[str, int], float]  # of a module and its rank


def module_shapes(spec: ModelSpec) -> Iterator[tuple[str, tuple[int, int]]]:
    """Name and [O, I] of every matrix that an adapter may change."""
    hidden, width = spec.hidden_size, spec.num_heads * spec.head_dim
    kv_width = spec.num_kv_heads * spec.head_dim
    for layer in range(spec.num_layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.self_attn.q_proj", (width, hidden)
        yield f"{prefix}.self_attn.k_proj", (kv_width, hidden)
        yield f"{prefix}.self_attn.v_proj", (kv_width, hidden)
        yield f"{prefix}.self_attn.o_proj", (hidden, width)
        if not spec.num_experts:
            yield f"{prefix}.mlp.gate_proj", (spec.intermediate_size, hidden)
            yield f"{prefix}.mlp.up_proj", (spec.intermediate_size, hidden)
            yield f"{prefix}.mlp.down_proj", (hidden, spec.intermediate_size)
    yield "lm_head", (spec.vocab_size, hidden)


def check_adapter(tensors: LoraTensors, spec: ModelSpec, max_rank: int) -> LoraWeights:
    """The tensors copied into memory of their own. Raises `ModelFileError` for what does not fit the model."""
    path, known = tensors.path, dict(module_shapes(spec))
    if not tensors.a:
        raise ModelFileError(path, "holds no LoRA matrices")
    for name in sorted(tensors.a.keys() ^ tensors.b.keys()):
        raise ModelFileError(path, f"module {shown(name)} has one of its two matrices only")
    modules: dict[str, LoraModule] = {}
    digest = blake2b(digest_size=_ID_BYTES)
    for name in sorted(tensors.a):
        if name not in known:
            raise ModelFileError(path, f"module {shown(name)} is not one that the model has and an adapter may change")
        rank = _check_shapes(path, name, (tensors.a[name], tensors.b[name]), known[name])
        if rank > max_rank:
            raise ModelFileError(
                path, f"module {shown(name)} has rank {rank}, more than max_lora_rank allows ({max_rank})"
            )
        scale = tensors.scale_of(name, rank)
        if scale > _MAX_SCALE:
            raise ModelFileError(
                path, f"module {shown(name)} is scaled by {scale:g}; at most {_MAX_SCALE:g} is possible"
            )
        module = LoraModule(_copy(path, tensors.a[name]), _copy(path, tensors.b[name]), scale)
        modules[name] = module
        digest.update(f"{name}\0{rank}\0{module.scale.hex()}\0{module.a.format}\0{module.b.format}\0".encode())
        digest.update(module.a.data.data)
        digest.update(module.b.data.data)
    return LoraWeights(digest.hexdigest(), modules, tensors.base_model)


def _check_shapes(path: Path, name: str, matrices: tuple[WeightTensor, WeightTensor], wanted: tuple[int, int]) -> int:
    """The rank."""
    a, b = (tuple(matrix.shape) for matrix in matrices)
    num_outputs, num_inputs = wanted
    rank = a[0] if len(a) == 2 else 0
    if rank < 1 or a != (rank, num_inputs) or b != (num_outputs, rank):
        raise ModelFileError(
            path,
            f"the matrices of module {shown(name)} are {list(a)} and {list(b)}; the model wants [r, {num_inputs}] and "
            f"[{num_outputs}, r]",
        )
    return rank


def _copy(path: Path, tensor: WeightTensor) -> WeightTensor:
    """In memory of its own, which nobody writes to later; float16 and packed formats as float32, which holds them."""
    import numpy as np

    from pelton.weights.dequantize import dequantize

    values = dequantize(tensor)
    if not np.isfinite(values).all():
        raise ModelFileError(path, f"tensor {shown(tensor.name)} holds values that are not finite")
    if tensor.format == "BF16":
        return replace(tensor, data=np.array(tensor.data))
    return replace(tensor, format="F32", data=values.reshape(-1).view(np.uint8))
