"""Tokenizers from GGUF metadata (`tokenizer.ggml.*`): byte-level BPE and SentencePiece BPE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from pelton.core.errors import ModelFileError, UnsupportedModelError
from pelton.weights.tokenizer.backend import added_token, set_bos_eos, tokenizer_errors
from pelton.weights.tokenizer.merges import Merges, derive_merges, ranks_from_scores
from pelton.weights.tokenizer.split_patterns import SPLIT_RULES
from pelton.weights.tokenizer.stop_tokens import TURN_ENDS, ids_of
from pelton.weights.tokenizer.tokenizer import Tokenizer

KINDS = ("gpt2", "llama")
SPACE = "\u2581"  # SentencePiece's visible space


class TokenType(IntEnum):
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class GGUFVocabulary:
    """The checked `tokenizer.ggml.*` entries of one file. `token_types` is aligned with `tokens`."""

    path: Path
    metadata: Mapping[str, Any]
    tokens: list[str]
    token_types: list[int]

    def get(self, key: str) -> Any:
        return self.metadata.get(f"tokenizer.ggml.{key}")

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key)
        return default if value is None else bool(value)

    def token(self, key: str) -> str | None:
        """The token that `<key>_token_id` names."""
        value = self.get(f"{key}_token_id")
        if value is None:
            return None
        if not isinstance(value, int) or not 0 <= value < len(self.tokens):
            raise ModelFileError(
                self.path, f"tokenizer.ggml.{key}_token_id is {value!r}; the vocabulary has {len(self.tokens)} tokens"
            )
        return self.tokens[value]

    def ids_of_type(self, *types: TokenType) -> list[int]:
        return [token_id for token_id, kind in enumerate(self.token_types) if kind in types]

    def token_ids(self, tokens: Sequence[str]) -> dict[str, int]:
        ids = {token: token_id for token_id, token in enumerate(tokens)}
        if len(ids) != len(tokens):
            twice = next(token for token_id, token in enumerate(tokens) if ids[token] != token_id)
            raise ModelFileError(self.path, f"tokenizer.ggml.tokens lists {twice!r} more than once")
        return ids


def tokenizer_from_gguf(path: Path, metadata: Mapping[str, Any]) -> Tokenizer:
    """Raises `ModelFileError` for a broken vocabulary, `UnsupportedModelError` for an unknown kind."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in KINDS:
        raise UnsupportedModelError(
            f"{path}: tokenizer.ggml.model is {kind!r}; supported are {', '.join(KINDS)}"
            if kind is not None
            else f"{path}: the file holds no tokenizer; name a folder or tokenizer.json that does with --tokenizer"
        )
    vocabulary = read_vocabulary(path, metadata)
    with tokenizer_errors(path):
        if kind == "gpt2":
            backend, add_bos = _byte_level_backend(vocabulary)
        else:
            backend, add_bos = _sentencepiece_backend(vocabulary), True
        return _finish(vocabulary, backend, add_bos)


def read_vocabulary(path: Path, metadata: Mapping[str, Any]) -> GGUFVocabulary:
    tokens = _array(path, metadata, "tokens", str)
    if not tokens:
        raise ModelFileError(path, "tokenizer.ggml.tokens is empty")
    # An empty spelling can be neither typed nor printed; it only holds its id.
    tokens = [token or f"[EMPTY_{token_id}]" for token_id, token in enumerate(tokens)]
    token_types = [int(TokenType.NORMAL)] * len(tokens)
    if "tokenizer.ggml.token_type" in metadata:
        token_types = _array(path, metadata, "token_type", int)
    if len(token_types) != len(tokens):
        raise ModelFileError(path, f"tokenizer.ggml.token_type has {len(token_types)} entries for {len(tokens)} tokens")
    return GGUFVocabulary(path, metadata, tokens, token_types)


def _array(path: Path, metadata: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    value = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(value, list):
        found = "missing" if value is None else f"a {type(value).__name__}"
        raise ModelFileError(path, f"tokenizer.ggml.{key} is {found}; it must be an array of {kind.__name__}")
    if not all(type(entry) is kind for entry in value):
        raise ModelFileError(path, f"tokenizer.ggml.{key} must hold only {kind.__name__} entries")
    return value


def _byte_level_backend(vocabulary: GGUFVocabulary) -> tuple[tokenizers.Tokenizer, bool]:
    name = vocabulary.get("pre")
    rule = SPLIT_RULES.get("default" if name is None else str(name))
    if rule is None:
        raise UnsupportedModelError(
            f"{vocabulary.path}: tokenizer.ggml.pre is {name!r}; known are {', '.join(sorted(SPLIT_RULES))}"
        )
    merges = _stored_merges(vocabulary)
    model = models.BPE(vocab=vocabulary.token_ids(vocabulary.tokens), merges=merges, ignore_merges=rule.ignore_merges)
    backend = tokenizers.Tokenizer(model)
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in rule.patterns]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend, rule.add_bos


def _stored_merges(vocabulary: GGUFVocabulary) -> Merges:
    merges: Merges = []
    for merge in _array(vocabulary.path, vocabulary.metadata, "merges", str):
        left, _, right = merge.partition(" ")
        merges.append((left, right))
    return merges


def _sentencepiece_backend(vocabulary: GGUFVocabulary) -> tokenizers.Tokenizer:
    is_gemma = str(vocabulary.metadata.get("general.architecture", "")).startswith("gemma")
    tokens = vocabulary.tokens
    # GGUF spells runs of spaces as spaces; the model's own vocabulary as visible ones.
    if is_gemma:
        tokens = [SPACE * len(token) if token.isspace() and set(token) == {" "} else token for token in tokens]
    token_ids = vocabulary.token_ids(tokens)
    if "tokenizer.ggml.merges" in vocabulary.metadata:
        merges = _stored_merges(vocabulary)
    else:
        unreachable = vocabulary.ids_of_type(TokenType.CONTROL, TokenType.UNKNOWN, TokenType.BYTE)
        # Gemma's scores do not follow its merge order; its ids do.
        ranks = None if is_gemma else ranks_from_scores(_array(vocabulary.path, vocabulary.metadata, "scores", float))
        merges = derive_merges(token_ids, ranks, frozenset(unreachable))
    unknown = vocabulary.token("unknown")
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=token_ids, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if is_gemma:
        backend.normalizer = normalizers.Replace(" ", SPACE)
    else:
        prefix = vocabulary.flag("add_space_prefix", True)
        backend.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement=SPACE, prepend_scheme="first" if prefix else "never", split=False
        )
        if prefix:
            steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(steps)
    return backend


def _finish(vocabulary: GGUFVocabulary, backend: tokenizers.Tokenizer, add_bos: bool) -> Tokenizer:
    named = {key: vocabulary.token(key) for key in ("bos", "eos", "padding", "unknown")}
    control = [vocabulary.tokens[token_id] for token_id in vocabulary.ids_of_type(TokenType.CONTROL)]
    special = dict.fromkeys([*control, *(token for token in named.values() if token is not None)])
    backend.add_special_tokens([added_token(token, special=True) for token in special])
    in_text = [vocabulary.tokens[token_id] for token_id in vocabulary.ids_of_type(TokenType.USER_DEFINED)]
    # A respelled run of spaces is an ordinary entry, reached by merges.
    backend.add_tokens(
        [added_token(token, special=False) for token in in_text if backend.token_to_id(token) is not None]
    )
    bos = named["bos"] if vocabulary.flag("add_bos_token", add_bos) else None
    eos = named["eos"] if vocabulary.flag("add_eos_token", False) else None
    set_bos_eos(backend, bos, eos)
    ends = {vocabulary.token(key) for key in ("eos", "eot", "eom")} | TURN_ENDS.intersection(special)
    return Tokenizer(
        backend,
        bos_token=named["bos"],
        eos_token=named["eos"],
        pad_token=named["padding"],
        eos_token_ids=ids_of(backend, ends),
    )
