"""Tokens that end a turn, known by their text: files often name only one of them as EOS."""

from __future__ import annotations

from collections.abc import Iterable

import tokenizers

# Qwen and ChatML, Llama 3, Gemma, Phi, DeepSeek, and base models' end of document.
TURN_ENDS = frozenset(
    {
        "<|im_end|>",
        "<|endoftext|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end_of_text|>",
        "<end_of_turn>",
        "<|end|>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
    }
)


def ids_of(backend: tokenizers.Tokenizer, tokens: Iterable[str | None]) -> list[int]:
    """Ids of those tokens that the vocabulary has."""
    ids = (backend.token_to_id(token) for token in tokens if token is not None)
    return [token_id for token_id in ids if token_id is not None]
