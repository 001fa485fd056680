"""Text to token ids and back, from a GGUF file or a Hugging Face folder; no pickle, no network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pelton.weights.tokenizer.load import load_decoder, load_tokenizer

if TYPE_CHECKING:
    from pelton.weights.tokenizer.tokenizer import Tokenizer

__all__ = ["Tokenizer", "load_decoder", "load_tokenizer"]


def __getattr__(name: str) -> Any:
    # Late: a decoder needs no library for encoding.
    if name == "Tokenizer":
        from pelton.weights.tokenizer.tokenizer import Tokenizer

        return Tokenizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
