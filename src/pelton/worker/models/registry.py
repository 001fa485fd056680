"""Architectures by name, and models made from files or from nothing."""

from __future__ import annotations

from typing import Protocol

import torch

from pelton.core.errors import UnsupportedModelError
from pelton.core.model_spec import ModelSpec
from pelton.weights.tensors import ModelFiles
from pelton.worker.forward_batch import ForwardBatch
from pelton.worker.kernels.ops import Kernels, make_kernels
from pelton.worker.kv_storage import KVStorage
from pelton.worker.models.decoder import DecoderModel
from pelton.worker.models.gemma2 import Gemma2Model
from pelton.worker.models.gemma3 import Gemma3Model
from pelton.worker.models.llama import LlamaModel
from pelton.worker.models.mistral import MistralModel
from pelton.worker.models.model_parts import ModelParts
from pelton.worker.models.qwen2 import Qwen2Model
from pelton.worker.models.qwen3 import Qwen3Model
from pelton.worker.models.weight_source import FileWeights, RandomWeights, WeightSource

ARCHITECTURES: dict[str, type[DecoderModel]] = {
    "llama": LlamaModel,
    "mistral": MistralModel,
    "qwen2": Qwen2Model,
    "qwen3": Qwen3Model,
    "gemma2": Gemma2Model,
    "gemma3": Gemma3Model,
}


class Model(Protocol):
    """A loaded model. Call it under `torch.inference_mode`. Legend as in `forward_batch.py`."""

    spec: ModelSpec

    def forward(self, batch: ForwardBatch, kv: KVStorage) -> torch.Tensor:
        """Writes the KV of all tokens. Returns hidden states [T, H]."""
        ...

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [S, H] of the rows wanted -> [S, V] float32."""
        ...


def load_model(files: ModelFiles, dtype: torch.dtype, kernels: Kernels | None = None) -> Model:
    """Decode the tensors of `files` one by one; in the end one copy of the weights is in memory.

    Raises `ModelFileError` for a tensor that is missing or misshapen, `UnsupportedModelError` for an
    architecture without a row here. That a file holds nothing else is checked when it is opened.
    """
    return _make_model(files.spec, FileWeights(files), dtype, kernels)


def make_dummy_model(spec: ModelSpec, dtype: torch.dtype, kernels: Kernels | None = None) -> Model:
    """Random weights of the spec's shapes, the same ones every time."""
    return _make_model(spec, RandomWeights(), dtype, kernels)


def _make_model(spec: ModelSpec, source: WeightSource, dtype: torch.dtype, kernels: Kernels | None) -> Model:
    if spec.architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"architecture {spec.architecture!r} is not supported; supported are {', '.join(ARCHITECTURES)}"
        )
    with torch.inference_mode():
        return ARCHITECTURES[spec.architecture](ModelParts(spec, source, kernels or make_kernels("reference"), dtype))
