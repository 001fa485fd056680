"""Tokens that end a turn, known by their text: files often name only one of them as EOS."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
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


def turn_end_ids(backend: tokenizers.Tokenizer) -> list[int]:
    """Ids of the special tokens of `backend` that are known to end a turn."""
    from pelton.weights.tokenizer.backend import ids_of

    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    return ids_of(backend, TURN_ENDS & special)
