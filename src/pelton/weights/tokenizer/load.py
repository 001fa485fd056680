"""Which reader takes which path."""

from __future__ import annotations

from pathlib import Path

from pelton.core.errors import ModelFileError, ModelNotFoundError
from pelton.weights.gguf.reader import read_gguf
from pelton.weights.tokenizer.gguf_metadata import tokenizer_from_gguf
from pelton.weights.tokenizer.hugging_face import tokenizer_from_folder, tokenizer_from_json
from pelton.weights.tokenizer.tokenizer import Tokenizer


def load_tokenizer(path: Path, override: str | None = None) -> Tokenizer:
    """The tokenizer of a model (a .gguf file or a Hugging Face folder), or the one at `override`.

    `override` may also be a tokenizer.json. Raises `ModelNotFoundError` for a missing path,
    `ModelFileError` for broken files and `UnsupportedModelError` for an unknown kind of tokenizer.
    """
    source = Path(override).expanduser() if override is not None else path
    if not source.exists():
        raise ModelNotFoundError(f"no tokenizer at {source}: there is no such file or folder")
    if source.is_dir():
        return tokenizer_from_folder(source)
    if source.suffix == ".gguf":
        return tokenizer_from_gguf(source, read_gguf(source).metadata)
    if source.suffix == ".json":
        return tokenizer_from_json(source)
    raise ModelFileError(source, "must be a .gguf file, a tokenizer.json, or a folder with a tokenizer")
