"""Builders for tests of LoRA adapters: folders that `peft` saved, and random matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pelton.weights.dequantize import dequantize
from pelton.weights.lora.adapter import LoraModule, LoraWeights
from pelton.weights.tensors import WeightTensor

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EVERYTHING = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


def save_adapter(
    model: Any, folder: Path, *, seed: int = 0, std: float = 0.1, dtype: Any = None, **options: Any
) -> Any:
    """`model` with a random adapter of `peft.LoraConfig(**options)`, which is saved in `folder`.

    Both matrices are random (peft leaves B at zero), so that a short test sees what the adapter does.
    """
    import peft
    import torch

    generator = torch.Generator().manual_seed(seed)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                values = torch.empty(parameter.shape).normal_(std=std, generator=generator)
                parameter.copy_(values if dtype is None else values.to(dtype).float())
    if dtype is not None and dtype is not torch.float32:
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)
    adapted.save_pretrained(folder)
    return adapted.eval()


@dataclass(frozen=True)
class RandomModule:
    module: LoraModule

    @property
    def decoded(self) -> tuple[np.ndarray, np.ndarray, float]:
        """A, B and scale, float64."""
        a, b = (dequantize(matrix).astype(np.float64) for matrix in (self.module.a, self.module.b))
        return a, b, self.module.scale


def random_module(
    name: str, rank: int, shape: tuple[int, int], *, seed: int = 0, dtype: str = "F32", std: float = 0.3
) -> RandomModule:
    rng = np.random.default_rng([seed, *name.encode()])

    def matrix(rows: int, columns: int) -> WeightTensor:
        values = rng.standard_normal((rows, columns), dtype=np.float32) * np.float32(std)
        bits = (values.view(np.uint32) >> 16).astype(np.uint16) if dtype == "BF16" else values
        return WeightTensor(name, (rows, columns), dtype, bits.reshape(-1).view(np.uint8))

    return RandomModule(LoraModule(matrix(rank, shape[1]), matrix(shape[0], rank), 0.5 + seed))


def random_weights(modules: Mapping[str, LoraModule], lora_id: str = "x") -> LoraWeights:
    return LoraWeights(lora_id, dict(modules), None)


def save_adapter_for(
    config: Any, folder: Path, *, seed: int = 0, std: float = 0.05, dtype: Any = None, **options: Any
) -> None:
    """The same for a model of `config` whose own weights are never made: for a large one."""
    import peft
    import torch
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
        adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    generator = torch.Generator().manual_seed(seed)
    for module in adapted.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            for side in (module.lora_A, module.lora_B):
                for linear in side.values():
                    values = torch.empty(linear.weight.shape).normal_(std=std, generator=generator)
                    linear.weight = torch.nn.Parameter(values.to(dtype or torch.float32))
    adapted.save_pretrained(folder)
