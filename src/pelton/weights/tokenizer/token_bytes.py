"""From a vocabulary's spelling of a token to the bytes it adds to the text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pelton.core.errors import UnsupportedModelError

if TYPE_CHECKING:
    import tokenizers

SpellingToBytes = Callable[[str], bytes]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_alphabet() -> dict[int, int]:
    """GPT-2's printable stand-ins: code point -> byte.

    Printable Latin-1 characters stand for themselves, the other 68 bytes for U+0100 onwards.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {byte: byte for byte in printable} | {0x100 + i: byte for i, byte in enumerate(others)}


_ALPHABET = byte_alphabet()


def byte_level_bytes(spelling: str) -> bytes:
    try:
        return spelling.translate(_ALPHABET).encode("latin-1")
    except UnicodeEncodeError:  # not spelled in the alphabet: a token written as plain text
        return spelling.encode()


def _replaced(old: str, new: str) -> SpellingToBytes:
    return lambda spelling: spelling.replace(old, new).encode()


def _with_byte_tokens(plain: SpellingToBytes) -> SpellingToBytes:
    def to_bytes(spelling: str) -> bytes:
        match = _BYTE_TOKEN.fullmatch(spelling)
        return bytes([int(match[1], 16)]) if match else plain(spelling)

    return to_bytes


sentencepiece_bytes = _with_byte_tokens(_replaced("\u2581", " "))


def spelling_rule(backend: tokenizers.Tokenizer, path: Path) -> SpellingToBytes:
    """The rule that the tokenizer's decoder applies to each token in mid-text.

    Raises `UnsupportedModelError` for decoders whose output depends on the neighbours (WordPiece, CTC).
    """
    state: dict[str, Any] = {"type": "Fuse"}
    if backend.decoder is not None:
        state = json.loads(backend.decoder.__getstate__())  # JSON, as in a tokenizer.json
    steps: list[dict[str, Any]] = state["decoders"] if state["type"] == "Sequence" else [state]
    replacements: list[tuple[str, str]] = []
    has_byte_tokens = False
    for step in steps:
        kind = step["type"]
        if kind == "ByteLevel":
            return byte_level_bytes
        elif kind == "ByteFallback":
            has_byte_tokens = True
        elif kind == "Replace" and "String" in step["pattern"]:
            replacements.append((step["pattern"]["String"], step["content"]))
        elif kind == "Metaspace":
            replacements.append((step["replacement"], " "))
        elif kind not in ("Fuse", "Strip"):  # these two touch only the ends of a text
            raise UnsupportedModelError(
                f"{path}: tokenizers with a {kind} decoder are not supported; "
                "supported are ByteLevel, Metaspace, Replace, ByteFallback, Fuse and Strip"
            )
    if len(replacements) > 1:
        raise UnsupportedModelError(f"{path}: tokenizers with several Replace decoders are not supported")
    plain = _replaced(*replacements[0]) if replacements else str.encode
    return _with_byte_tokens(plain) if has_byte_tokens else plain
