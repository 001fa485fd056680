"""Tokenizers from a SentencePiece `tokenizer.model` (sentencepiece_model.proto)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import tokenizers

from pelton.core.errors import ModelFileError, UnsupportedModelError
from pelton.weights.tokenizer.backend import tokenizer_errors
from pelton.weights.tokenizer.gguf_vocabulary import with_visible_spaces
from pelton.weights.tokenizer.merges import order_of_scores
from pelton.weights.tokenizer.protobuf import as_bytes, as_float, as_int, read_fields
from pelton.weights.tokenizer.sentencepiece import sentencepiece_backend
from pelton.weights.tokenizer.vocabulary import TokenType, Vocabulary, complete_backend

# Field numbers of ModelProto, SentencePiece, TrainerSpec and NormalizerSpec.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE, _SCORE, _TYPE = 1, 2, 3
_MODEL_TYPE, _UNK_ID, _BOS_ID, _EOS_ID, _PAD_ID = 3, 40, 41, 42, 43
_CHARSMAP, _ADD_DUMMY_PREFIX, _REMOVE_EXTRA_SPACES = 2, 3, 4

_BPE = 2
_MODEL_TYPE_NAMES = {1: "unigram", 2: "BPE", 3: "word", 4: "char"}


@dataclass(slots=True)
class _Model:
    pieces: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    model_type: int = 1
    special_ids: dict[int, int] = field(default_factory=lambda: {_UNK_ID: 0, _BOS_ID: 1, _EOS_ID: 2, _PAD_ID: -1})
    has_charsmap: bool = False
    add_dummy_prefix: bool = True
    remove_extra_spaces: bool = True


def read_sentencepiece(
    path: Path, *, is_gemma: bool, add_bos: bool, add_eos: bool
) -> tuple[Vocabulary, tokenizers.Tokenizer]:
    """Raises `ModelFileError` for a broken file, `UnsupportedModelError` for other kinds than plain BPE."""
    try:
        model = _read_model(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelFileError(path, f"not a SentencePiece model: {error}") from error
    if model.model_type != _BPE:
        kind = _MODEL_TYPE_NAMES.get(model.model_type, str(model.model_type))
        raise UnsupportedModelError(
            f"{path}: a SentencePiece {kind} model; only BPE can be read without tokenizer.json"
        )
    if model.has_charsmap or model.remove_extra_spaces:
        raise UnsupportedModelError(f"{path}: its text normalization needs a tokenizer.json beside it")
    vocabulary = Vocabulary(
        path=path,
        tokens=model.pieces,
        token_types=model.types,
        bos_token=_special(path, model, _BOS_ID),
        eos_token=_special(path, model, _EOS_ID),
        pad_token=_special(path, model, _PAD_ID),
        unk_token=_special(path, model, _UNK_ID),
        add_bos=add_bos,
        add_eos=add_eos,
    )
    with tokenizer_errors(path):
        # As in GGUF files: Gemma's scores do not follow its merge order; its ids do.
        if is_gemma:
            vocabulary = with_visible_spaces(vocabulary)
        order = None if is_gemma else order_of_scores(model.scores)
        backend = sentencepiece_backend(vocabulary, None, order, prefix_space=model.add_dummy_prefix)
        complete_backend(vocabulary, backend)
    return vocabulary, backend


def _read_model(data: bytes) -> _Model:
    model = _Model()
    for number, value in read_fields(data):
        if number == _PIECES:
            _read_piece(as_bytes(value), model)
        elif number == _TRAINER:
            for key, entry in read_fields(as_bytes(value)):
                if key == _MODEL_TYPE:
                    model.model_type = as_int(entry)
                elif key in model.special_ids:
                    model.special_ids[key] = as_int(entry)
        elif number == _NORMALIZER:
            for key, entry in read_fields(as_bytes(value)):
                if key == _CHARSMAP:
                    model.has_charsmap = bool(as_bytes(entry))
                elif key == _ADD_DUMMY_PREFIX:
                    model.add_dummy_prefix = bool(as_int(entry))
                elif key == _REMOVE_EXTRA_SPACES:
                    model.remove_extra_spaces = bool(as_int(entry))
    return model


def _read_piece(data: bytes, model: _Model) -> None:
    piece, score, kind = "", 0.0, int(TokenType.NORMAL)
    for number, value in read_fields(data):
        if number == _PIECE:
            piece = as_bytes(value).decode()
        elif number == _SCORE:
            score = as_float(value)
        elif number == _TYPE:
            kind = as_int(value)
    model.pieces.append(piece)
    model.scores.append(score)
    model.types.append(kind)


def _special(path: Path, model: _Model, key: int) -> str | None:
    token_id = model.special_ids[key]
    if token_id < 0:
        return None
    if token_id >= len(model.pieces):
        raise ModelFileError(path, f"a special token has id {token_id}; the vocabulary has {len(model.pieces)} pieces")
    return model.pieces[token_id]
