"""A vocabulary as files that carry no tokenizer.json store it, and the tokenizer built from it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import tokenizers

from pelton.core.errors import ModelFileError
from pelton.weights.tokenizer.backend import added_token, set_bos_eos


class TokenType(IntEnum):
    """Numbered alike in GGUF and in SentencePiece models."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """`tokens[i]` is the spelling of token i and `token_types[i]` its kind; spellings are unique."""

    path: Path
    tokens: list[str]
    token_types: list[int]
    bos_token: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None
    unk_token: str | None = None
    add_bos: bool = False
    add_eos: bool = False

    def __post_init__(self) -> None:
        if not self.tokens:
            raise ModelFileError(self.path, "the vocabulary is empty")
        if len(self.token_types) != len(self.tokens):
            raise ModelFileError(
                self.path, f"the vocabulary has {len(self.tokens)} tokens but {len(self.token_types)} token types"
            )

    def ids(self) -> dict[str, int]:
        """Raises `ModelFileError` where two tokens are spelled alike."""
        ids = {token: token_id for token_id, token in enumerate(self.tokens)}
        if len(ids) != len(self.tokens):
            twice = next(token for token_id, token in enumerate(self.tokens) if ids[token] != token_id)
            raise ModelFileError(self.path, f"the vocabulary lists {twice!r} more than once")
        return ids

    def of_type(self, *types: TokenType) -> list[str]:
        kinds = frozenset(types)
        return [token for token, kind in zip(self.tokens, self.token_types, strict=True) if kind in kinds]


def complete_backend(vocabulary: Vocabulary, backend: tokenizers.Tokenizer) -> None:
    """Add to a model's `backend` the tokens that are matched whole in text, BOS and EOS."""
    named = (vocabulary.bos_token, vocabulary.eos_token, vocabulary.pad_token, vocabulary.unk_token)
    special = dict.fromkeys([*vocabulary.of_type(TokenType.CONTROL), *(token for token in named if token is not None)])
    backend.add_special_tokens([added_token(token, special=True) for token in special])
    in_text = [token for token in vocabulary.of_type(TokenType.USER_DEFINED) if token not in special]
    backend.add_tokens([added_token(token, special=False) for token in in_text])
    set_bos_eos(
        backend,
        vocabulary.bos_token if vocabulary.add_bos else None,
        vocabulary.eos_token if vocabulary.add_eos else None,
    )
