"""`Tokenizer`: the one face of every vocabulary, whatever file it came from."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path

import tokenizers

from pelton.core.errors import InvalidRequestError
from pelton.weights.tokenizer.backend import literal_sibling
from pelton.weights.tokenizer.token_bytes import spelling_rule

_MAX_TOKEN_ID = 2**32 - 1


class Tokenizer:
    """Thread-safe. Implements `core.protocols.TokenDecoder`."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        path: Path,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        pad_token: str | None = None,
        eos_token_ids: Iterable[int] = (),
    ) -> None:
        """`path` is where it came from. Raises `UnsupportedModelError` for an unknown kind of decoder."""
        self.path = path
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.pad_token = pad_token
        self.bos_token_id: int | None = backend.token_to_id(bos_token) if bos_token is not None else None
        self.eos_token_ids = frozenset(eos_token_ids)
        added_tokens = backend.get_added_tokens_decoder()
        # Ids may have holes, so the count of entries is not the bound.
        self.vocab_size: int = max(backend.get_vocab_size(with_added_tokens=True), max(added_tokens, default=-1) + 1)
        self._backend = backend
        self._literal: tokenizers.Tokenizer | None = None
        self._literal_lock = threading.Lock()
        self._special_ids = frozenset(token_id for token_id, token in added_tokens.items() if token.special)
        self._to_bytes = spelling_rule(backend, path)
        self._bytes_of_id: dict[int, bytes] = {
            token_id: token.content.encode() for token_id, token in added_tokens.items()
        }

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of `text`.

        `add_special_tokens` adds BOS and EOS where the model wants them. `parse_special=False` takes
        the text of control tokens such as `<|im_end|>` as plain text: for text that users write.
        Raises `InvalidRequestError` for text that is not valid Unicode (unpaired surrogates).
        """
        backend = self._backend if parse_special else self._literal_backend()
        try:
            # Unlike encode(), the batch call lets other threads run, and it skips the offsets.
            [encoding] = backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except (TypeError, UnicodeEncodeError):
            _check_unicode(text)
            raise
        return list(encoding.ids)

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of a whole sequence; bytes that are not UTF-8 become U+FFFD, unknown ids nothing."""
        known = [token_id for token_id in token_ids if 0 <= token_id <= _MAX_TOKEN_ID]
        return str(self._backend.decode(known, skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes that the token adds in mid-text; b"" for an id outside the vocabulary."""
        found = self._bytes_of_id.get(token_id)
        if found is None:
            spelling = self.token_text(token_id)
            found = self._to_bytes(spelling) if spelling else b""
            if 0 <= token_id < self.vocab_size:  # a race stores the same bytes twice
                self._bytes_of_id[token_id] = found
        return found

    def token_text(self, token_id: int) -> str:
        """The vocabulary's own spelling, such as `Ġthe` or `▁the`; "" for an unknown id."""
        if not 0 <= token_id <= _MAX_TOKEN_ID:
            return ""
        return self._backend.id_to_token(token_id) or ""

    def token_id(self, text: str) -> int | None:
        """The id of a vocabulary entry by its own spelling."""
        return self._backend.token_to_id(text)

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def _literal_backend(self) -> tokenizers.Tokenizer:
        with self._literal_lock:
            if self._literal is None:
                self._literal = literal_sibling(self._backend)
            return self._literal


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"the text holds an unpaired surrogate at character {error.start}; it must be valid Unicode"
        ) from error
