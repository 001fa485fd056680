"""Which reader takes which path."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pelton.core.errors import ModelFileError, ModelNotFoundError
from pelton.core.protocols import TokenDecoder
from pelton.weights.gguf.reader import read_gguf
from pelton.weights.tensors import ModelFiles

# Each reader is imported where it is needed: a decoder needs no library for encoding.
if TYPE_CHECKING:
    from pelton.weights.tokenizer.tokenizer import Tokenizer


def load_tokenizer(path: Path, override: str | None = None, files: ModelFiles | None = None) -> Tokenizer:
    """The tokenizer of a model (a .gguf file or a Hugging Face folder), or the one at `override`.

    `override` may also be a tokenizer.json; `files` are the model's, where they are open already. Raises
    `ModelNotFoundError` for a missing path, `ModelFileError` for broken files and `UnsupportedModelError` for an
    unknown kind of tokenizer.
    """
    source = _source(path, override)
    metadata = _gguf_metadata(source, override, files)
    if metadata is not None:
        from pelton.weights.tokenizer.gguf_metadata import tokenizer_from_gguf

        return tokenizer_from_gguf(source, metadata)
    from pelton.weights.tokenizer.hugging_face import tokenizer_from_folder, tokenizer_from_json

    if source.is_dir():
        return tokenizer_from_folder(source)
    if source.suffix == ".json":
        return tokenizer_from_json(source)
    raise ModelFileError(source, "must be a .gguf file, a tokenizer.json, or a folder with a tokenizer")


def load_decoder(path: Path, override: str | None = None, files: ModelFiles | None = None) -> TokenDecoder:
    """Ids to bytes as `load_tokenizer` with the same arguments has them; quickly, where it is a .gguf file."""
    source = _source(path, override)
    metadata = _gguf_metadata(source, override, files)
    if metadata is None:
        return load_tokenizer(path, override)
    from pelton.weights.tokenizer.gguf_vocabulary import decoder_from_gguf

    return decoder_from_gguf(source, metadata)


def _source(path: Path, override: str | None) -> Path:
    source = Path(override).expanduser() if override is not None else path
    if not source.exists():
        raise ModelNotFoundError(f"no tokenizer at {source}: there is no such file or folder")
    return source


def _gguf_metadata(source: Path, override: str | None, files: ModelFiles | None) -> Mapping[str, Any] | None:
    if source.is_dir() or source.suffix != ".gguf":
        return None
    if override is None and files is not None and files.tokenizer_metadata is not None:
        return files.tokenizer_metadata
    return read_gguf(source).metadata
