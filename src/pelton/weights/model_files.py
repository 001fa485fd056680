"""`open_model`: a GGUF file or a Hugging Face folder as `ModelFiles`. Reads headers only."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pelton.core.errors import ModelFileError, ModelNotFoundError, UnsupportedModelError
from pelton.core.model_spec import ModelSpec
from pelton.weights.architectures import expected_tensors
from pelton.weights.generation import (
    defaults_from_folder,
    defaults_from_gguf,
    template_from_folder,
    template_from_gguf,
)
from pelton.weights.gguf.names import IGNORED_TENSORS, expert_names, hf_name, restore_layout
from pelton.weights.gguf.reader import GGUFFile, read_gguf
from pelton.weights.gguf.spec import spec_from_gguf
from pelton.weights.mapped_file import read_json_object
from pelton.weights.presets import PresetFiles, is_preset
from pelton.weights.safetensors import SafetensorsFile, holds_safetensors, open_safetensors_folder
from pelton.weights.specs import compression_from_config, spec_from_config
from pelton.weights.tensors import GenerationDefaults, ModelFiles, WeightTensor

# Buffers that old checkpoints carry and nothing needs.
_IGNORED_BUFFERS = re.compile(r".*\.(rotary_emb\.inv_freq|masked_bias)")
# The image side of Gemma 3, and the places where its wrapper puts the text model.
_IMAGE_PREFIXES = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")
_TEXT_PREFIXES = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
)


def open_model(path: Path, *, tokenizer: str | None = None) -> ModelFiles:
    """Open a `.gguf` file, or a folder with config.json and safetensors or with exactly one `.gguf`.

    `tokenizer` names a folder (or a tokenizer.json in it) whose chat template is preferred. Raises
    `ModelNotFoundError` where nothing is there, `ModelFileError` for a damaged or incomplete file,
    `UnsupportedModelError` for a model that Pelton does not implement.
    """
    template = _override_template(tokenizer)
    if is_preset(path):
        return PresetFiles(path)
    if not path.is_dir():
        return GGUFModelFiles(read_gguf(path), template)
    gguf_files = sorted(path.glob("*.gguf"))
    if (path / "config.json").exists() and (holds_safetensors(path) or not gguf_files):
        return SafetensorsModelFiles(path, template)
    if len(gguf_files) == 1:
        return GGUFModelFiles(read_gguf(gguf_files[0]), template)
    if gguf_files:
        names = ", ".join(file.name for file in gguf_files[:8])
        raise ModelFileError(path, f"holds {len(gguf_files)} .gguf files; name one of them: {names}")
    raise ModelNotFoundError(f"{path}: no model here; a folder needs config.json with safetensors, or one .gguf file")


def _override_template(tokenizer: str | None) -> str | None:
    if tokenizer is None:
        return None
    path = Path(tokenizer)
    return template_from_folder(path if path.is_dir() else path.parent)


class GGUFModelFiles:
    """Implements `ModelFiles`; names and layouts are Hugging Face's."""

    def __init__(self, file: GGUFFile, chat_template: str | None = None) -> None:
        self.path = file.path
        self.spec: ModelSpec = spec_from_gguf(file)
        self.generation_defaults: GenerationDefaults = defaults_from_gguf(file.path, file.metadata)
        self.chat_template = chat_template or template_from_gguf(file.path, file.metadata)
        self.tokenizer_metadata: Mapping[str, Any] | None = file.metadata
        self._file = file
        self._shapes = expected_tensors(self.spec)
        # Name -> that in the file, and which of the experts that lie there together.
        self._places: dict[str, tuple[str, int | None]] = {}
        unknown: list[str] = []
        for gguf_name in file.tensors:
            name = hf_name(gguf_name, self.spec.architecture)
            if name in self._shapes:
                self._places[name] = gguf_name, None
            elif experts := expert_names(gguf_name, self.spec):
                self._places |= {expert: (gguf_name, i) for i, expert in enumerate(experts) if expert in self._shapes}
            elif not IGNORED_TENSORS.fullmatch(gguf_name):
                unknown.append(gguf_name)
        _refuse_unknown(self.path, self.spec, unknown)

    def tensor_names(self) -> list[str]:
        return list(self._places)

    def tensor(self, name: str) -> WeightTensor:
        if name not in self._places:
            raise ModelFileError(self.path, f"tensor {name} is missing")
        gguf_name, expert = self._places[name]
        info, shape = self._file.tensors[gguf_name], self._shapes[name]
        data = self._file.tensor_data(gguf_name)
        if expert is None:
            _check_shape(self.path, name, info.shape, shape)
            return restore_layout(WeightTensor(name, shape, info.format, data), self.spec)
        _check_shape(self.path, gguf_name, info.shape, (self.spec.num_experts, *shape))
        return WeightTensor(name, shape, info.format, data.reshape(self.spec.num_experts, -1)[expert])

    def drop_pages(self) -> None:
        self._file.drop_pages()


class SafetensorsModelFiles:
    """Implements `ModelFiles` for a folder of Hugging Face."""

    tokenizer_metadata: Mapping[str, Any] | None = None

    def __init__(self, folder: Path, chat_template: str | None = None) -> None:
        self.path = folder
        config = read_json_object(folder / "config.json")
        self.spec: ModelSpec = spec_from_config(folder / "config.json", config)
        self.generation_defaults: GenerationDefaults = defaults_from_folder(folder, config)
        self.chat_template = chat_template or template_from_folder(folder)
        self._shapes = expected_tensors(self.spec)
        self._scheme = compression_from_config(folder / "config.json", config)
        self._places: dict[str, tuple[SafetensorsFile, str]] = {}
        # Of compressed matrices: name -> ending -> where that part is stored.
        self._parts: dict[str, dict[str, tuple[SafetensorsFile, str]]] = {}
        unknown: list[str] = []
        for stored_name, file in open_safetensors_folder(folder).items():
            name = _text_name(stored_name)
            if name is None or (name == "lm_head.weight" and self.spec.tie_word_embeddings):
                continue
            if self._place_part(name, file, stored_name):
                continue
            if name in self._places:
                raise ModelFileError(folder, f"tensor {name} occurs twice, also as {stored_name}")
            if name in self._shapes:
                self._places[name] = (file, stored_name)
            else:
                unknown.append(stored_name)
        _refuse_unknown(folder, self.spec, unknown)

    def _place_part(self, name: str, file: SafetensorsFile, stored_name: str) -> bool:
        """Whether the tensor is a part of a compressed matrix; then it is noted as such. The embedding is none:
        its rows are read from the file's own bytes."""
        module, _, part = name.rpartition(".")
        matrix = f"{module}.weight"
        if self._scheme is None or part not in self._scheme.parts or len(self._shapes.get(matrix, ())) != 2:
            return False
        if module == "model.embed_tokens":
            return False
        if part == "weight" and file.tensors[stored_name].dtype not in ("I8", "F8_E4M3"):
            return False
        self._parts.setdefault(matrix, {})[part] = (file, stored_name)
        return True

    def tensor_names(self) -> list[str]:
        return [*self._places, *(name for name in self._parts if name not in self._places)]

    def tensor(self, name: str) -> WeightTensor:
        if name in self._parts:
            if name in self._places:
                raise ModelFileError(self.path, f"tensor {name} is there both as it is and compressed")
            from pelton.weights.compressed.fp8 import Fp8Tensor  # needs numpy
            from pelton.weights.compressed.tensor import CompressedTensor

            assert self._scheme is not None
            kind = Fp8Tensor if self._scheme.layout == "fp8" else CompressedTensor
            parts = {part: file.part(stored_name) for part, (file, stored_name) in self._parts[name].items()}
            return kind(self.path, name, self._shapes[name], self._scheme, parts)
        if name not in self._places:
            raise ModelFileError(self.path, f"tensor {name} is missing")
        file, stored_name = self._places[name]
        stored = file.tensor(stored_name)
        _check_shape(self.path, name, stored.shape, self._shapes[name])
        return WeightTensor(name, stored.shape, stored.format, stored.data)

    def drop_pages(self) -> None:
        places = [*self._places.values(), *(place for parts in self._parts.values() for place in parts.values())]
        for file in {id(file): file for file, _ in places}.values():
            file.drop_pages()


def _text_name(stored_name: str) -> str | None:
    """The plain name within the text model, or None for what is not part of it."""
    if _IGNORED_BUFFERS.fullmatch(stored_name) or _IMAGE_PREFIXES.match(stored_name):
        return None
    for prefix, replacement in _TEXT_PREFIXES:
        if stored_name.startswith(prefix):
            return replacement + stored_name.removeprefix(prefix)
    return stored_name


def _refuse_unknown(path: Path, spec: ModelSpec, unknown: list[str]) -> None:
    """A tensor that nothing would use means a feature that is not implemented: refuse, do not guess."""
    if unknown:
        raise UnsupportedModelError(
            f"{path}: {len(unknown)} tensors are not part of a {spec.architecture} model of this configuration, "
            f"for example {unknown[0]}"
        )


def _check_shape(path: Path, name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if shape != expected:
        raise ModelFileError(
            path, f"tensor {name} has shape {list(shape)}; the configuration asks for {list(expected)}"
        )
