"""Architectures by name, and models made from files or from nothing."""

from __future__ import annotations

from typing import Protocol

from pelton.core.errors import UnsupportedModelError
from pelton.core.model_spec import ModelSpec
from pelton.weights.shards import shard_spec
from pelton.weights.tensors import ModelFiles
from pelton.worker.kernels.ops import AttentionShape, Forward, Kernels, LoraSite, Program
from pelton.worker.kv_storage import KVStorage
from pelton.worker.models.decoder import DecoderModel
from pelton.worker.models.gemma2 import Gemma2Model
from pelton.worker.models.gemma3 import Gemma3Model
from pelton.worker.models.llama import LlamaModel
from pelton.worker.models.mistral import MistralModel
from pelton.worker.models.model_parts import ModelParts
from pelton.worker.models.qwen2 import Qwen2Model
from pelton.worker.models.qwen3 import Qwen3Model
from pelton.worker.models.qwen3_moe import Qwen3MoeModel
from pelton.worker.models.weight_source import FileWeights, RandomWeights, WeightSource
from pelton.worker.parallel import Ranks, SharedWeights

ARCHITECTURES: dict[str, type[DecoderModel]] = {
    "llama": LlamaModel,
    "mistral": MistralModel,
    "qwen2": Qwen2Model,
    "qwen3": Qwen3Model,
    "qwen3_moe": Qwen3MoeModel,
    "gemma2": Gemma2Model,
    "gemma3": Gemma3Model,
}


class Model(Forward, Protocol):
    """A loaded model."""

    spec: ModelSpec
    kernels: Kernels
    lora_sites: tuple[LoraSite, ...]  # products that adapters may change, as `Ops.adapt` counts them


def load_model(files: ModelFiles, kernels: Kernels, ranks: Ranks | None = None) -> Model:
    """Decode the tensors of `files` one by one; in the end one copy of the weights is in memory, or the share of one
    of `ranks`.

    Raises `ModelFileError` for a tensor that is missing or misshapen, `UnsupportedModelError` for an
    architecture without a row here. That a file holds nothing else is checked when it is opened.
    """
    return _make_model(files.spec, FileWeights(files), kernels, ranks)


def make_dummy_model(spec: ModelSpec, kernels: Kernels, ranks: Ranks | None = None) -> Model:
    """Random weights of the spec's shapes, the same ones every time; with other `ranks` other ones."""
    return _make_model(spec, RandomWeights(), kernels, ranks)


def compile_model(model: Model, kv: KVStorage) -> Program:
    """The model over its cache, ready for steps."""
    return model.kernels.compile(model, attention_shapes(model.spec, kv.block_size), kv.layer_caches())


def attention_shapes(spec: ModelSpec, block_size: int) -> list[AttentionShape]:
    """One per KV group."""
    return [
        AttentionShape(spec.num_heads, spec.num_kv_heads, spec.head_dim, block_size, group.sliding_window)
        for group in spec.kv_groups
    ]


def _make_model(spec: ModelSpec, source: WeightSource, kernels: Kernels, ranks: Ranks | None) -> Model:
    if spec.architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"architecture {spec.architecture!r} is not supported; supported are {', '.join(ARCHITECTURES)}"
        )
    if ranks is not None:
        spec, source = shard_spec(spec, ranks.size), SharedWeights(source, ranks)
    return ARCHITECTURES[spec.architecture](ModelParts(spec, source, kernels, ranks))
