"""Tokenizers from GGUF metadata (`tokenizer.ggml.*`): byte-level BPE and SentencePiece BPE."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from pelton.core.errors import ModelFileError, UnsupportedModelError
from pelton.weights.tokenizer.backend import ids_of, tokenizer_errors
from pelton.weights.tokenizer.byte_level import byte_level_backend
from pelton.weights.tokenizer.merges import Merges, order_of_scores
from pelton.weights.tokenizer.sentencepiece import sentencepiece_backend, with_visible_spaces
from pelton.weights.tokenizer.split_patterns import SPLIT_RULES, SplitRule
from pelton.weights.tokenizer.stop_tokens import turn_end_ids
from pelton.weights.tokenizer.tokenizer import Tokenizer
from pelton.weights.tokenizer.vocabulary import TokenType, Vocabulary, complete_backend

BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"


def tokenizer_from_gguf(path: Path, metadata: Mapping[str, Any]) -> Tokenizer:
    """Raises `ModelFileError` for a broken vocabulary, `UnsupportedModelError` for an unknown kind."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None:
        raise UnsupportedModelError(
            f"{path}: the file holds no tokenizer; --tokenizer can name a folder or file that does"
        )
    with tokenizer_errors(path):
        if kind == BYTE_LEVEL:
            rule = _split_rule(path, metadata)
            vocabulary = _vocabulary(path, metadata, add_bos=rule.add_bos)
            backend = byte_level_backend(vocabulary, _merges(path, metadata) or [], rule)
        elif kind == SENTENCEPIECE:
            vocabulary = _vocabulary(path, metadata, add_bos=True)
            vocabulary, backend = _sentencepiece(vocabulary, metadata)
        else:
            raise UnsupportedModelError(
                f"{path}: tokenizer.ggml.model is {kind!r}; supported are {BYTE_LEVEL!r} and {SENTENCEPIECE!r}"
            )
        complete_backend(vocabulary, backend)
        ends = [_named(path, metadata, vocabulary.tokens, key) for key in ("eos", "eot", "eom")]
        return Tokenizer(
            backend,
            path,
            bos_token=vocabulary.bos_token,
            eos_token=vocabulary.eos_token,
            pad_token=vocabulary.pad_token,
            eos_token_ids=[*ids_of(backend, ends), *turn_end_ids(backend)],
        )


def _split_rule(path: Path, metadata: Mapping[str, Any]) -> SplitRule:
    name = metadata.get("tokenizer.ggml.pre", "default")
    rule = SPLIT_RULES.get(name) if isinstance(name, str) else None
    if rule is None:
        raise UnsupportedModelError(
            f"{path}: tokenizer.ggml.pre is {name!r}; known are {', '.join(sorted(SPLIT_RULES))}"
        )
    return rule


def _sentencepiece(vocabulary: Vocabulary, metadata: Mapping[str, Any]) -> tuple[Vocabulary, tokenizers.Tokenizer]:
    merges = _merges(vocabulary.path, metadata)
    prefix_space = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    order = None
    if str(metadata.get("general.architecture", "")).startswith("gemma"):
        # Gemma's scores do not follow its merge order; its ids do.
        vocabulary = with_visible_spaces(vocabulary)
    elif merges is None:
        scores = _array(vocabulary.path, metadata, "scores", float)
        if len(scores) != len(vocabulary.tokens):
            raise ModelFileError(
                vocabulary.path, f"tokenizer.ggml.scores has {len(scores)} entries for {len(vocabulary.tokens)} tokens"
            )
        order = order_of_scores(scores)
    return vocabulary, sentencepiece_backend(vocabulary, merges, order, prefix_space=prefix_space)


def _vocabulary(path: Path, metadata: Mapping[str, Any], *, add_bos: bool) -> Vocabulary:
    """`add_bos`: what holds where the file does not say."""
    # An empty spelling can be neither typed nor printed; it only holds its id.
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(_array(path, metadata, "tokens", str))]
    token_types = [int(TokenType.NORMAL)] * len(tokens)
    if "tokenizer.ggml.token_type" in metadata:
        token_types = _array(path, metadata, "token_type", int)
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


def _merges(path: Path, metadata: Mapping[str, Any]) -> Merges | None:
    if "tokenizer.ggml.merges" not in metadata:
        return None
    merges: Merges = []
    for merge in _array(path, metadata, "merges", str):
        left, _, right = merge.partition(" ")
        merges.append((left, right))
    return merges


def _array(path: Path, metadata: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    value = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(value, list):
        found = "missing" if value is None else f"a {type(value).__name__}"
        raise ModelFileError(path, f"tokenizer.ggml.{key} is {found}; it must be an array of {kind.__name__}")
    if not all(type(entry) is kind for entry in value):
        raise ModelFileError(path, f"tokenizer.ggml.{key} must hold only {kind.__name__} entries")
    return value
