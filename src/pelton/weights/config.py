"""Settings that choose the model and how its files are read."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

from pelton.core.config import setting
from pelton.core.errors import ConfigError
from pelton.core.lora import NamedLora

DEFAULT_MODEL = "qwen2.5-coder-0.5b-instruct"
QUANTIZATIONS = ("w8a8", "w4a8", "fp8", "int4")
DEFAULT_CACHE_DIR = "~/.cache/pelton/models"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    model: str = setting(DEFAULT_MODEL, "catalog name, hub id, URL, local folder, or .gguf file")
    tokenizer: str | None = setting(None, "folder or tokenizer.json to use instead of the model's own")
    revision: str | None = setting(None, "branch, tag or commit of a hub id")
    cache_dir: str | None = setting(None, "where pulled models are kept; default: ~/.cache/pelton/models")
    load_format: str = setting(
        "auto",
        "how weights are read; dummy: random ones, of a model or of a shape such as llama-3.1-8b",
        choices=("auto", "gguf", "safetensors", "dummy"),
    )
    quantization: str | None = setting(
        None,
        "round weights as they are loaded, most of a layer's and the output's to one scale per output and their "
        "activations to one per token: w8a8 to 8 bits, faster in batches and prompts; w4a8 to 4 bits in steps of 8, "
        "faster everywhere, less exact; on a GPU fp8: all matrices, a scale per output, activations one per token, "
        "or int4: a scale per 128 inputs",
        choices=QUANTIZATIONS,
    )
    lora_modules: tuple[str, ...] = setting(
        (), "LoRA adapters to load, as NAME=PATH (a folder of peft or a .gguf file); NAME is what clients ask for"
    )
    max_loras: int = setting(16, "most LoRA adapters in memory; any number of them may share a step")
    max_lora_rank: int = setting(64, "largest rank of a LoRA adapter")

    def __post_init__(self) -> None:
        for name in ("max_loras", "max_lora_rank"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        parse_lora_modules(self.lora_modules)


def parse_lora_modules(entries: tuple[str, ...]) -> tuple[NamedLora, ...]:
    """NAME=PATH, or vLLM's JSON: {"name": ..., "path": ..., "base_model_name": ...}. Raises `ConfigError`."""
    modules: list[NamedLora] = []
    for entry in entries:
        value: object = None
        if entry.lstrip().startswith("{"):
            with contextlib.suppress(ValueError, RecursionError):
                value = json.loads(entry)
        else:
            value = dict(zip(("name", "path"), entry.split("=", 1), strict=False))
        name, path = (value.get("name"), value.get("path")) if isinstance(value, dict) else (None, None)
        if not (isinstance(name, str) and isinstance(path, str) and name and path):
            raise ConfigError(f'lora_modules: {entry!r} is not NAME=PATH, nor {{"name": NAME, "path": PATH}}')
        if name in (module.name for module in modules):
            raise ConfigError(f"lora_modules: the name {name!r} is there twice")
        modules.append(NamedLora(name, path))
    return tuple(modules)


def model_cache_root(cache_dir: str | Path | None) -> Path:
    """The folder of pulled models, given the setting."""
    return Path(cache_dir or DEFAULT_CACHE_DIR).expanduser().absolute()
