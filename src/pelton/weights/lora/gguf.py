"""Adapters in GGUF files, as llama.cpp's convert_lora_to_gguf.py writes them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pelton.core.errors import ModelFileError, UnsupportedModelError
from pelton.core.model_spec import ModelSpec
from pelton.weights.fields import Fields
from pelton.weights.gguf.names import hf_name, restore_layout
from pelton.weights.gguf.reader import read_gguf
from pelton.weights.lora.adapter import LoraTensors, LoraWeights, check_adapter
from pelton.weights.mapped_file import shown
from pelton.weights.tensors import WeightTensor

_SIDES = {".lora_a": "a", ".lora_b": "b"}


def read_gguf_adapter(path: Path, spec: ModelSpec, max_rank: int) -> LoraWeights:
    """See `open_adapter`."""
    file = read_gguf(path)
    fields = Fields(path, file.metadata)
    if fields.text("general.type", "model") != "adapter" or fields.text("adapter.type", "lora") != "lora":
        raise UnsupportedModelError(f"{path}: not an adapter of type lora")
    architecture = fields.text("general.architecture")
    if architecture != spec.architecture:
        raise ModelFileError(path, f"made for architecture {shown(architecture)}; the model is {spec.architecture}")
    alpha = fields.number("adapter.lora.alpha", positive=False)
    sides: dict[str, dict[str, WeightTensor]] = {"a": {}, "b": {}}
    for name, info in file.tensors.items():
        base, side = name[: -len(".lora_a")], _SIDES.get(name[-len(".lora_a") :])
        module = hf_name(base, architecture) if side is not None else None
        if side is None or module is None or not module.endswith(".weight"):
            raise ModelFileError(path, f"tensor {shown(name)} is not a matrix of LoRA for {architecture}")
        tensor = WeightTensor(module, info.shape, info.format, file.tensor_data(name))
        if side == "b" and len(info.shape) == 2 and info.format in ("F32", "F16", "BF16"):
            tensor = _restored(path, tensor, spec)
        sides[side][module.removesuffix(".weight")] = replace(tensor, name=name)
    # llama.cpp takes an alpha of 0 for a scale of 1.
    tensors = LoraTensors(path, sides["a"], sides["b"], None, lambda _, rank: alpha / rank if alpha else 1.0)
    return check_adapter(tensors, spec, max_rank)


def _restored(path: Path, tensor: WeightTensor, spec: ModelSpec) -> WeightTensor:
    try:
        return restore_layout(tensor, spec)
    except ValueError as error:
        raise ModelFileError(path, f"tensor {shown(tensor.name)} has a shape that does not fit the model") from error
