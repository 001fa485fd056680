"""Settings that choose the model and how its files are read."""

from __future__ import annotations

from dataclasses import dataclass

from pelton.core.config import setting

DEFAULT_MODEL = "qwen2.5-coder-0.5b-instruct"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    model: str = setting(DEFAULT_MODEL, "catalog name, hub id, URL, local folder, or .gguf file")
    tokenizer: str | None = setting(None, "folder or tokenizer.json to use instead of the model's own")
    revision: str | None = setting(None, "branch, tag or commit of a hub id")
    cache_dir: str | None = setting(None, "where pulled models are kept; default: ~/.cache/pelton/models")
    load_format: str = setting(
        "auto", "how weights are read; dummy: random ones", choices=("auto", "gguf", "safetensors", "dummy")
    )
