"""A vocabulary as files that carry no tokenizer.json store it, and the tokenizer built from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING

from pelton.core.errors import ModelFileError

if TYPE_CHECKING:
    import tokenizers


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

    def special_tokens(self) -> list[str]:
        """Control tokens and those with a role, in the order of a tokenizer.json made of them."""
        named = (self.bos_token, self.eos_token, self.pad_token, self.unk_token)
        return list(dict.fromkeys([*self.of_type(TokenType.CONTROL), *(token for token in named if token is not None)]))

    def of_type(self, *types: TokenType) -> list[str]:
        kinds = frozenset(map(int, types))
        return [token for token, kind in zip(self.tokens, self.token_types, strict=True) if kind in kinds]


def complete_backend(vocabulary: Vocabulary, backend: tokenizers.Tokenizer) -> None:
    """Add to a model's `backend` the tokens that are matched whole in text, BOS and EOS."""
    from pelton.weights.tokenizer.backend import added_token, set_bos_eos

    special = vocabulary.special_tokens()
    backend.add_special_tokens([added_token(token, special=True) for token in special])
    known = set(special)
    in_text = [token for token in vocabulary.of_type(TokenType.USER_DEFINED) if token not in known]
    backend.add_tokens([added_token(token, special=False) for token in in_text])
    set_bos_eos(
        backend,
        vocabulary.bos_token if vocabulary.add_bos else None,
        vocabulary.eos_token if vocabulary.add_eos else None,
    )


class VocabularyDecoder:
    """Ids to bytes and nothing else. Implements `core.protocols.TokenDecoder` as `Tokenizer` does."""

    def __init__(self, vocabulary: Vocabulary, to_bytes: Callable[[str], bytes], end_tokens: Iterable[str]) -> None:
        """`to_bytes`: from a spelling to the bytes that it adds in mid-text. `end_tokens` end a turn."""
        self._tokens = vocabulary.tokens
        self._to_bytes = to_bytes
        special = set(vocabulary.special_tokens())
        whole = special.union(vocabulary.of_type(TokenType.USER_DEFINED))
        ends = set(end_tokens)
        marked = whole | ends
        found = [(token_id, token) for token_id, token in enumerate(self._tokens) if token in marked]
        self._special_ids = frozenset(token_id for token_id, token in found if token in special)
        self._bytes_of_id = {token_id: token.encode() for token_id, token in found if token in whole}
        self.eos_token_ids = frozenset(token_id for token_id, token in found if token in ends)

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes that the token adds in mid-text; b"" for an id outside the vocabulary."""
        found = self._bytes_of_id.get(token_id)
        if found is None:
            if not 0 <= token_id < len(self._tokens):
                return b""
            found = self._bytes_of_id[token_id] = self._to_bytes(self._tokens[token_id])
        return found

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids
