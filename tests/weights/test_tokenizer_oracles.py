"""Token for token what `transformers` and `sentencepiece` say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pelton.weights.tokenizer import Tokenizer, load_tokenizer
from tests.weights.make_tokenizers import (
    GEMMA_OPTIONS,
    byte_level_metadata,
    sentencepiece_metadata,
    train_byte_level,
    train_sentencepiece,
    write_folder,
    write_gguf,
)
from tests.weights.text_corpus import TEXTS


def assert_same(ours: Tokenizer, theirs: Any) -> None:
    """Ids with and without special tokens added, and the text they decode to."""
    for text in TEXTS:
        for add_special in (True, False):
            ids = theirs.encode(text, add_special_tokens=add_special)
            assert ours.encode(text, add_special_tokens=add_special) == ids, repr(text[:100])
        for skip in (True, False):
            expected = theirs.decode(ids, skip_special_tokens=skip)
            assert ours.decode(ids, skip_special_tokens=skip) == expected, repr(text[:100])


GGUF_CASES = {
    "qwen2": lambda: byte_level_metadata("qwen2"),
    "gpt-2": lambda: byte_level_metadata("gpt-2"),
    "llama-bpe": lambda: byte_level_metadata("llama-bpe"),
    "tekken": lambda: byte_level_metadata("tekken"),
    "gpt-4o": lambda: byte_level_metadata("gpt-4o"),
    "qwen35": lambda: byte_level_metadata("qwen35"),
    "adds BOS": lambda: byte_level_metadata() | {"tokenizer.ggml.add_bos_token": True},
    "adds EOS": lambda: byte_level_metadata() | {"tokenizer.ggml.add_eos_token": True},
    "llama": lambda: sentencepiece_metadata("llama"),
    "gemma3": lambda: sentencepiece_metadata("gemma3", **GEMMA_OPTIONS),
    "gemma3 with spaces in the file": lambda: _with_runs_of_spaces(sentencepiece_metadata("gemma3", **GEMMA_OPTIONS)),
}


def _with_runs_of_spaces(metadata: dict[str, Any]) -> dict[str, Any]:
    """As Gemma 3 files have them: spelled as spaces, marked as matched in text."""
    runs = [" " * n for n in range(2, 6)]
    tokens = metadata["tokenizer.ggml.tokens"]
    keep = [i for i, token in enumerate(tokens) if token.strip("\u2581") or len(token) < 2]
    columns = {"tokens": runs, "scores": [-1000.0] * len(runs), "token_type": [4] * len(runs)}
    for key, added in columns.items():
        metadata[f"tokenizer.ggml.{key}"] = [metadata[f"tokenizer.ggml.{key}"][i] for i in keep] + added
    return metadata


@pytest.mark.torch
@pytest.mark.parametrize("case", GGUF_CASES)
def test_gguf_equals_transformers(case: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = write_gguf(tmp_path / "model.gguf", GGUF_CASES[case]())
    assert_same(load_tokenizer(path), AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name))


_TOKENS = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
FOLDER_CASES: dict[str, dict[str, Any]] = {
    "tokenizer.json alone": {},
    "config": {"tokenizer_config": _TOKENS},
    "adds BOS and EOS": {"tokenizer_config": _TOKENS | {"add_bos_token": True, "add_eos_token": True}},
    "says that it adds none": {"tokenizer_config": _TOKENS | {"add_bos_token": False}},
    "tokens as objects": {
        "tokenizer_config": {"eos_token": {"__type": "AddedToken", "content": "<eos>", "lstrip": True}}
    },
    "special tokens map": {"special_tokens_map": _TOKENS, "tokenizer_config": {"pad_token": "<pad>"}},
    "tokens added by the config": {
        "tokenizer_config": _TOKENS
        | {
            "added_tokens_decoder": {
                "900": {"content": "<eos>", "special": True, "normalized": False},
                "899": {"content": "</s>", "special": False, "lstrip": True, "rstrip": True, "normalized": False},
            }
        }
    },
    "more special tokens": {"tokenizer_config": _TOKENS | {"additional_special_tokens": ["<pad>", "<|im_start|>"]}},
}


@pytest.mark.torch
@pytest.mark.parametrize("case", FOLDER_CASES)
def test_folder_equals_transformers(case: str, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    folder = write_folder(tmp_path / "model", **FOLDER_CASES[case])
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    ours = load_tokenizer(folder)
    assert_same(ours, theirs)
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == (theirs.bos_token, theirs.eos_token, theirs.pad_token)


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_tokenizer_model_equals_sentencepiece(family: str, tmp_path: Path) -> None:
    import sentencepiece

    model = train_sentencepiece(**(GEMMA_OPTIONS if family == "gemma" else {}))
    (tmp_path / "tokenizer.model").write_bytes(model)
    write_folder(tmp_path, config={"model_type": family}, tokenizer=None)
    ours, theirs = load_tokenizer(tmp_path), sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in TEXTS:
        # By design, as in `transformers`: no second space before a text that begins with one.
        if text.startswith((" ", "\u2581")) and family == "llama":
            continue
        if "\x00" not in text:  # where SentencePiece's own text ends
            ids = ours.encode(text, add_special_tokens=False, parse_special=False)
            assert ids == theirs.encode(text), repr(text[:100])


@pytest.mark.model
def test_default_model_equals_transformers(default_model_path: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(default_model_path.parent, gguf_file=default_model_path.name)
    assert_same(load_tokenizer(default_model_path), theirs)


@pytest.mark.parametrize("pre", ["qwen2", "llama-bpe", "smollm", "deepseek-coder", "deepseek-v3", "tekken", "gpt-4o"])
def test_gguf_equals_the_tokenizer_it_was_made_from(pre: str, tmp_path: Path) -> None:
    ours, original = (
        load_tokenizer(write_gguf(tmp_path / "model.gguf", byte_level_metadata(pre))),
        train_byte_level(pre),
    )
    for text in TEXTS:
        assert ours.encode(text, add_special_tokens=False) == original.encode(text).ids, repr(text[:100])
