"""Which reader takes which path."""

from __future__ import annotations

from pathlib import Path

from pelton.core.errors import ModelFileError, ModelNotFoundError
from pelton.weights.gguf.reader import read_gguf
from pelton.weights.tokenizer.gguf_vocabulary import tokenizer_from_gguf
from pelton.weights.tokenizer.tokenizer import Tokenizer


def load_tokenizer(path: Path, override: str | None = None) -> Tokenizer:
    """The tokenizer of a model (a .gguf file or a Hugging Face folder), or the one at `override`.

    Raises `ModelNotFoundError` for a missing path, `ModelFileError` for broken files and
    `UnsupportedModelError` for a kind of tokenizer that Pelton does not know.
    """
    source = Path(override).expanduser() if override is not None else path
    if not source.exists():
        raise ModelNotFoundError(f"no tokenizer at {source}: the path does not exist")
    if source.suffix == ".gguf":
        return tokenizer_from_gguf(source, read_gguf(source).metadata)
    raise ModelFileError(source, "unsupported")
