"""From what a user typed as the model to files on disk."""

from __future__ import annotations

from pathlib import Path

from pelton.core.errors import ModelNotFoundError
from pelton.weights.catalog.catalog import Catalog
from pelton.weights.catalog.local import looks_like_path, try_local_model
from pelton.weights.catalog.progress import ProgressCallback, no_progress
from pelton.weights.config import ModelConfig
from pelton.weights.presets import try_preset


def resolve_model(config: ModelConfig, progress: ProgressCallback = no_progress) -> Path:
    """The .gguf file or folder of `config.model`, pulled first where it has to be.

    A path of a model wins over a catalog name, a catalog name over a hub id; for dummy weights a preset's name does,
    too. Raises
    `ModelNotFoundError` for a name that nothing knows and `DownloadError` for a failed pull.
    """
    if (path := try_local_model(config.model)) is not None:
        return path
    if config.load_format == "dummy" and (path := try_preset(config.model)) is not None:
        return path
    if looks_like_path(config.model):
        raise ModelNotFoundError(
            f"no model at {config.model}: it must be a .gguf file, or a folder with config.json or one .gguf file"
        )
    return Catalog(config.cache_dir).pull(config.model, progress, revision=config.revision)
