"""Tokenizers from GGUF metadata (`tokenizer.ggml.*`): byte-level BPE and SentencePiece BPE."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from pelton.core.errors import ModelFileError, UnsupportedModelError
from pelton.weights.tokenizer.backend import ids_of, tokenizer_errors
from pelton.weights.tokenizer.byte_level import byte_level_backend
from pelton.weights.tokenizer.gguf_vocabulary import (
    BYTE_LEVEL,
    end_tokens,
    is_gemma,
    read_array,
    read_vocabulary,
    tokenizer_kind,
    with_visible_spaces,
)
from pelton.weights.tokenizer.merges import Merges, order_of_scores
from pelton.weights.tokenizer.sentencepiece import sentencepiece_backend
from pelton.weights.tokenizer.split_patterns import SPLIT_RULES, SplitRule
from pelton.weights.tokenizer.stop_tokens import turn_end_ids
from pelton.weights.tokenizer.tokenizer import Tokenizer
from pelton.weights.tokenizer.vocabulary import Vocabulary, complete_backend


def tokenizer_from_gguf(path: Path, metadata: Mapping[str, Any]) -> Tokenizer:
    """Raises `ModelFileError` for a broken vocabulary, `UnsupportedModelError` for an unknown kind."""
    kind = tokenizer_kind(path, metadata)
    with tokenizer_errors(path):
        if kind == BYTE_LEVEL:
            rule = _split_rule(path, metadata)
            vocabulary = read_vocabulary(path, metadata, add_bos=rule.add_bos)
            backend = byte_level_backend(vocabulary, _merges(path, metadata) or [], rule)
        else:
            vocabulary = read_vocabulary(path, metadata, add_bos=True)
            vocabulary, backend = _sentencepiece(vocabulary, metadata)
        complete_backend(vocabulary, backend)
        ends = end_tokens(path, metadata, vocabulary)
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
    if is_gemma(metadata):
        # Gemma's scores do not follow its merge order; its ids do.
        vocabulary = with_visible_spaces(vocabulary)
    elif merges is None:
        scores = read_array(vocabulary.path, metadata, "scores", float)
        if len(scores) != len(vocabulary.tokens):
            raise ModelFileError(
                vocabulary.path, f"tokenizer.ggml.scores has {len(scores)} entries for {len(vocabulary.tokens)} tokens"
            )
        order = order_of_scores(scores)
    return vocabulary, sentencepiece_backend(vocabulary, merges, order, prefix_space=prefix_space)


def _merges(path: Path, metadata: Mapping[str, Any]) -> Merges | None:
    if "tokenizer.ggml.merges" not in metadata:
        return None
    merges: Merges = [merge.partition(" ")[::2] for merge in read_array(path, metadata, "merges", str)]
    return merges
