"""Shapes of published models, for `--load-format dummy`: a config.json each, and no weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pelton.core.errors import ModelFileError
from pelton.core.model_spec import ModelSpec
from pelton.weights.mapped_file import read_json_object
from pelton.weights.specs import spec_from_config
from pelton.weights.tensors import GenerationDefaults, WeightTensor

_FOLDER = Path(__file__).parent


def preset_names() -> list[str]:
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


def try_preset(name: str) -> Path | None:
    """The file of a preset, which `open_model` takes."""
    return _FOLDER / f"{name}.json" if name in preset_names() else None


class PresetFiles:
    """Implements `ModelFiles` without a tensor. The tokenizer is another model's, where one is wanted."""

    generation_defaults = GenerationDefaults()
    chat_template: str | None = None
    tokenizer_metadata: Mapping[str, Any] | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        self.spec: ModelSpec = spec_from_config(path, read_json_object(path))

    def tensor_names(self) -> list[str]:
        return []

    def tensor(self, name: str) -> WeightTensor:
        raise ModelFileError(self.path, f"is a shape without weights, so there is no {name}: use --load-format dummy")

    def drop_pages(self) -> None:
        pass


def is_preset(path: Path) -> bool:
    return path.parent == _FOLDER
