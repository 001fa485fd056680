"""Token ids to text, one token at a time.

Bytes go through an incremental UTF-8 decoder that starts empty at the first output token: a character
is never split, and nothing of the prompt can leak. Text that may be the start of a stop string is
held back until it is clear.
"""

from __future__ import annotations

import codecs
import contextlib
from collections.abc import Collection, Sequence

from pelton.core.protocols import TokenDecoder

_UTF8 = codecs.getincrementaldecoder("utf-8")


class TokenTexts:
    """Texts of tokens that are whole characters, whoever generates them: most tokens are, and most are common."""

    def __init__(self, decoder: TokenDecoder) -> None:
        self.decoder = decoder
        self.known: dict[int, str] = {}

    def learn(self, token_id: int, data: bytes) -> None:
        """Keep the text of `data`, the token's bytes, if it stands for itself."""
        if data and not self.decoder.is_special(token_id):
            with contextlib.suppress(UnicodeDecodeError):
                self.known[token_id] = data.decode()


class IncrementalDetokenizer:
    def __init__(
        self,
        texts: TokenTexts,
        stop: Sequence[str] = (),
        *,
        skip_special_tokens: bool = True,
        shown_token_ids: Collection[int] = (),
        include_stop_str_in_output: bool = False,
    ) -> None:
        self._texts = texts
        self._is_between_characters = True
        self._utf8 = _UTF8("replace")
        self.stop = stop
        self._skip_special_tokens = skip_special_tokens
        self._shown_token_ids = shown_token_ids
        self._include_stop = include_stop_str_in_output
        self._held = ""
        self.matched_stop: str | None = None

    def push(self, token_id: int, *, check_stop: bool = True) -> str:
        """Text that is now certain. Once `matched_stop` is set, the text has ended."""
        text = self._texts.known.get(token_id) if self._is_between_characters else None
        if text is None:
            text = self._decode(token_id)
        if not self.stop or not check_stop:
            return text
        return self._release(text)

    def flush(self) -> str:
        """What is left at the end; an incomplete character becomes U+FFFD."""
        text = self._held + self._utf8.decode(b"", final=True)
        self._held = ""
        return text

    def _decode(self, token_id: int) -> str:
        decoder = self._texts.decoder
        if self._skip_special_tokens and decoder.is_special(token_id) and token_id not in self._shown_token_ids:
            return ""
        data = decoder.token_bytes(token_id)
        self._texts.learn(token_id, data)
        text = self._utf8.decode(data)
        self._is_between_characters = not self._utf8.getstate()[0]
        return text

    def _release(self, text: str) -> str:
        text = self._held + text
        found = [(start, stop) for stop in self.stop if (start := text.find(stop)) >= 0]
        if found:
            start, self.matched_stop = min(found, key=lambda match: match[0])
            self._held = ""
            return text[: start + len(self.matched_stop)] if self._include_stop else text[:start]
        num_held = max(_overlap(text, stop) for stop in self.stop)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` starts with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
