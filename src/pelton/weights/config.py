"""Settings that choose the model and how its files are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pelton.core.config import setting

DEFAULT_MODEL = "qwen2.5-coder-0.5b-instruct"
QUANTIZATIONS = ("w8a8",)
DEFAULT_CACHE_DIR = "~/.cache/pelton/models"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    model: str = setting(DEFAULT_MODEL, "catalog name, hub id, URL, local folder, or .gguf file")
    tokenizer: str | None = setting(None, "folder or tokenizer.json to use instead of the model's own")
    revision: str | None = setting(None, "branch, tag or commit of a hub id")
    cache_dir: str | None = setting(None, "where pulled models are kept; default: ~/.cache/pelton/models")
    load_format: str = setting(
        "auto", "how weights are read; dummy: random ones", choices=("auto", "gguf", "safetensors", "dummy")
    )
    quantization: str | None = setting(
        None,
        "round weights as they are loaded; w8a8: feed-forward layers to 8 bits, one scale per output, their "
        "activations one per token: faster in batches and prompts, slower for a single stream than 4 or 5 bits",
        choices=QUANTIZATIONS,
    )


def model_cache_root(cache_dir: str | Path | None) -> Path:
    """The folder of pulled models, given the setting."""
    return Path(cache_dir or DEFAULT_CACHE_DIR).expanduser().absolute()
