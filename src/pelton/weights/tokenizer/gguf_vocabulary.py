"""The vocabulary in GGUF metadata (`tokenizer.ggml.*`), without what it takes to encode with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pelton.core.errors import ModelFileError, UnsupportedModelError
from pelton.weights.tokenizer.stop_tokens import TURN_ENDS
from pelton.weights.tokenizer.token_bytes import byte_level_bytes, sentencepiece_bytes
from pelton.weights.tokenizer.vocabulary import TokenType, Vocabulary, VocabularyDecoder

BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"
SPACE = "\u2581"  # what stands for a space inside a SentencePiece vocabulary
_END_KEYS = ("eos", "eot", "eom")


def tokenizer_kind(path: Path, metadata: Mapping[str, Any]) -> str:
    """`BYTE_LEVEL` or `SENTENCEPIECE`. Raises `UnsupportedModelError`."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None:
        raise UnsupportedModelError(
            f"{path}: the file holds no tokenizer; --tokenizer can name a folder or file that does"
        )
    if kind not in (BYTE_LEVEL, SENTENCEPIECE):
        raise UnsupportedModelError(
            f"{path}: tokenizer.ggml.model is {kind!r}; supported are {BYTE_LEVEL!r} and {SENTENCEPIECE!r}"
        )
    return str(kind)


def decoder_from_gguf(path: Path, metadata: Mapping[str, Any]) -> VocabularyDecoder:
    """What `tokenizer_from_gguf` decodes to, in a sixth of the time and memory."""
    kind = tokenizer_kind(path, metadata)
    vocabulary = read_vocabulary(path, metadata, add_bos=False)
    if kind == SENTENCEPIECE and is_gemma(metadata):
        vocabulary = with_visible_spaces(vocabulary)
    to_bytes = byte_level_bytes if kind == BYTE_LEVEL else sentencepiece_bytes
    ends = end_tokens(path, metadata, vocabulary)
    return VocabularyDecoder(vocabulary, to_bytes, {*ends, *TURN_ENDS.intersection(vocabulary.special_tokens())})


def end_tokens(path: Path, metadata: Mapping[str, Any], vocabulary: Vocabulary) -> list[str]:
    """Spellings of the tokens that the file says end a turn."""
    named = (_named(path, metadata, vocabulary.tokens, key) for key in _END_KEYS)
    return [token for token in named if token is not None]


def is_gemma(metadata: Mapping[str, Any]) -> bool:
    return str(metadata.get("general.architecture", "")).startswith("gemma")


def with_visible_spaces(vocabulary: Vocabulary) -> Vocabulary:
    """Runs of spaces, which Gemma's files may spell as spaces, as the ordinary pieces that merges reach."""
    tokens, token_types = list(vocabulary.tokens), list(vocabulary.token_types)
    for token_id, token in enumerate(tokens):
        if not token.strip(" ") or not token.strip(SPACE):
            tokens[token_id] = SPACE * len(token)
            token_types[token_id] = TokenType.NORMAL
    return replace(vocabulary, tokens=tokens, token_types=token_types)


def read_vocabulary(path: Path, metadata: Mapping[str, Any], *, add_bos: bool) -> Vocabulary:
    """`add_bos`: what holds where the file does not say. Raises `ModelFileError`."""
    # An empty spelling can be neither typed nor printed; it only holds its id.
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(read_array(path, metadata, "tokens", str))]
    token_types = [int(TokenType.NORMAL)] * len(tokens)
    if "tokenizer.ggml.token_type" in metadata:
        token_types = read_array(path, metadata, "token_type", int)
    return Vocabulary(
        path=path,
        tokens=tokens,
        token_types=token_types,
        bos_token=_named(path, metadata, tokens, "bos"),
        eos_token=_named(path, metadata, tokens, "eos"),
        pad_token=_named(path, metadata, tokens, "padding"),
        unk_token=_named(path, metadata, tokens, "unknown"),
        add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", add_bos)),
        add_eos=bool(metadata.get("tokenizer.ggml.add_eos_token", False)),
    )


def _named(path: Path, metadata: Mapping[str, Any], tokens: list[str], key: str) -> str | None:
    token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
    if token_id is None:
        return None
    if not isinstance(token_id, int) or not 0 <= token_id < len(tokens):
        raise ModelFileError(
            path, f"tokenizer.ggml.{key}_token_id is {token_id!r}; the vocabulary has {len(tokens)} tokens"
        )
    return tokens[token_id]


def read_array(path: Path, metadata: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    """`tokenizer.ggml.<key>`, whose entries must all be of `kind`."""
    value = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(value, list):
        found = "missing" if value is None else f"a {type(value).__name__}"
        raise ModelFileError(path, f"tokenizer.ggml.{key} is {found}; it must be an array of {kind.__name__}")
    if not set(map(type, value)) <= {kind}:
        raise ModelFileError(path, f"tokenizer.ggml.{key} must hold only {kind.__name__} entries")
    return value
