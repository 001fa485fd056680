"""Where a model's repacked weights are kept, and what tells whether they still are that model's.

    <model cache>/.packed/<name of the model>-<hash of its path>.weights   one for each model file or folder

The worker writes and maps these files; here are only their names and the identity of what they were made from.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from pelton.weights.config import QUANTIZATIONS, ModelConfig, model_cache_root

PACKED_FOLDER = ".packed"
_SUFFIX = ".weights"
_SAMPLE_BYTES = 1 << 16


def packed_folder(config: ModelConfig) -> Path:
    return model_cache_root(config.cache_dir) / PACKED_FOLDER


def packed_path(folder: Path, model: Path, quantization: str | None = None) -> Path:
    """The file in `folder` for the model file or folder `model`: a later version of it replaces the earlier.

    One for each way to quantize it further.
    """
    source = os.path.realpath(model)
    digest = hashlib.blake2b(os.fsencode(source), digest_size=8).hexdigest()
    kind = "" if quantization is None else f"-{quantization}"
    return folder / f"{Path(source).stem[:80]}-{digest}{kind}{_SUFFIX}"


def packed_paths(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{_SUFFIX}"))


def content_identity(model: Path) -> str:
    """A hash that changes when the content of `model` does, without reading all of it.

    Of every file: inode, size, time of the last write and of the last change of the inode (which no program
    can set back), and its first and last 64 KiB against clocks and file systems that lie. Raises `OSError`.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(model.iterdir()) if model.is_dir() else [model]:
        if not path.is_file():
            continue
        with path.open("rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            facts = (path.name, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
            digest.update(repr(facts).encode())
            digest.update(file.read(_SAMPLE_BYTES))
            file.seek(max(0, status.st_size - _SAMPLE_BYTES))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def remove_packed(folder: Path, model: Path) -> None:
    """Delete what is kept for `model`, and what a writer that was killed has left."""
    for path in (packed_path(folder, model, quantization) for quantization in (None, *QUANTIZATIONS)):
        for each in (path, path.with_suffix(".tmp"), path.with_suffix(".lock")):
            each.unlink(missing_ok=True)
