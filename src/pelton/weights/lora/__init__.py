"""LoRA adapters: files of `peft` and GGUF -> checked matrices by module."""

from __future__ import annotations

from pathlib import Path

from pelton.core.model_spec import ModelSpec
from pelton.weights.lora.adapter import LoraWeights


def open_adapter(path: Path, spec: ModelSpec, max_rank: int) -> LoraWeights:
    """The adapter in a folder of `peft` or in a GGUF file, for a model of `spec`; everything is read and copied.

    Raises `ModelNotFoundError`, `ModelFileError` for files that are damaged or do not fit the model, and
    `UnsupportedModelError` for a kind of adapter that is not plain LoRA.
    """
    if path.suffix == ".gguf":
        from pelton.weights.lora.gguf import read_gguf_adapter

        return read_gguf_adapter(path, spec, max_rank)
    from pelton.weights.lora.peft import read_peft_adapter

    return read_peft_adapter(path, spec, max_rank)
