"""LoRA adapters (Hu et al., arXiv:2106.09685) as values: what every room knows of one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """An adapter in the worker's memory. Names are given to it in front of the engine; here it is its content."""

    lora_id: str  # hash of its weights and scales: another content has another id, a copy has the same
    path: str  # where it came from
    rank: int  # the largest of its matrices
    num_bytes: int  # of memory
    base_model: str | None = None  # what it says that it was made for


@dataclass(frozen=True, slots=True)
class NamedLora:
    """What a client may ask for by `name`, in place of the model's."""

    name: str
    path: str
