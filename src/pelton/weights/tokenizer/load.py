"""Which reader takes which path."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pelton.core.errors import ModelFileError, ModelNotFoundError
from pelton.core.protocols import TokenDecoder
from pelton.weights.gguf.reader import read_gguf

# Each reader is imported where it is needed: a decoder needs no library for encoding.
if TYPE_CHECKING:
    from pelton.weights.tokenizer.tokenizer import Tokenizer


def load_tokenizer(path: Path, override: str | None = None) -> Tokenizer:
    """The tokenizer of a model (a .gguf file or a Hugging Face folder), or the one at `override`.

    `override` may also be a tokenizer.json. Raises `ModelNotFoundError` for a missing path,
    `ModelFileError` for broken files and `UnsupportedModelError` for an unknown kind of tokenizer.
    """
    source = _source(path, override)
    if source.suffix == ".gguf" and not source.is_dir():
        from pelton.weights.tokenizer.gguf_metadata import tokenizer_from_gguf

        return tokenizer_from_gguf(source, read_gguf(source).metadata)
    from pelton.weights.tokenizer.hugging_face import tokenizer_from_folder, tokenizer_from_json

    if source.is_dir():
        return tokenizer_from_folder(source)
    if source.suffix == ".json":
        return tokenizer_from_json(source)
    raise ModelFileError(source, "must be a .gguf file, a tokenizer.json, or a folder with a tokenizer")


def load_decoder(path: Path, override: str | None = None) -> TokenDecoder:
    """Ids to bytes as `load_tokenizer(path, override)` has them; quickly, where it is a .gguf file."""
    source = _source(path, override)
    if source.suffix == ".gguf" and not source.is_dir():
        from pelton.weights.tokenizer.gguf_vocabulary import decoder_from_gguf

        return decoder_from_gguf(source, read_gguf(source).metadata)
    return load_tokenizer(path, override)


def _source(path: Path, override: str | None) -> Path:
    source = Path(override).expanduser() if override is not None else path
    if not source.exists():
        raise ModelNotFoundError(f"no tokenizer at {source}: there is no such file or folder")
    return source
