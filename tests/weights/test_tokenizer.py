"""The `Tokenizer` face: bytes of tokens, special tokens in user text, stop ids, hostile files."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pelton.core.errors import (
    InvalidRequestError,
    ModelFileError,
    ModelNotFoundError,
    PeltonError,
    UnsupportedModelError,
)
from pelton.core.protocols import TokenDecoder
from pelton.weights.catalog import resolve_model
from pelton.weights.config import ModelConfig
from pelton.weights.model_files import open_model
from pelton.weights.tokenizer import Tokenizer, load_decoder, load_tokenizer
from pelton.weights.tokenizer.gguf_metadata import tokenizer_from_gguf
from pelton.weights.tokenizer.gguf_vocabulary import decoder_from_gguf
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

FAMILIES = {
    "byte-level": byte_level_metadata,
    "llama": sentencepiece_metadata,
    "gemma": lambda: sentencepiece_metadata("gemma3", **GEMMA_OPTIONS),
}


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    return {family: tokenizer_from_gguf(Path(family), make()) for family, make in FAMILIES.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_of_tokens_make_the_text(family: str, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers[family]
    for text in TEXTS:
        if family != "byte-level":
            text = text.replace("\u2581", "_")  # is a space to SentencePiece
        ids = tokenizer.encode(text, add_special_tokens=False)
        joined = b"".join(tokenizer.token_bytes(token_id) for token_id in ids).decode()
        # Only the first token of a text can carry a space that the text does not have.
        assert joined.removeprefix(" ") == text.removeprefix(" ")
        in_mid_text = tokenizer.encode("x" + text, add_special_tokens=False)
        joined = b"".join(tokenizer.token_bytes(token_id) for token_id in in_mid_text).decode()
        assert joined.removeprefix(" ") == tokenizer.decode(in_mid_text, skip_special_tokens=False) == "x" + text


@settings(deadline=None, max_examples=200)
@given(text=st.text())
def test_any_text_comes_back(text: str) -> None:
    tokenizer = _byte_level()
    for parse_special in (True, False):
        ids = tokenizer.encode(text, parse_special=parse_special)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


_CACHE: list[Tokenizer] = []


def _byte_level() -> Tokenizer:
    if not _CACHE:
        _CACHE.append(tokenizer_from_gguf(Path("byte-level"), byte_level_metadata()))
    return _CACHE[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_user_text_makes_no_control_tokens(family: str, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers[family]
    control = [tokenizer.token_text(i) for i in range(tokenizer.vocab_size) if tokenizer.is_special(i)]
    assert len(control) >= 3
    text = "a" + " b ".join(control)
    assert any(tokenizer.is_special(i) for i in tokenizer.encode(text, add_special_tokens=False))
    ids = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
    assert not any(tokenizer.is_special(i) for i in ids)
    assert tokenizer.decode(ids) == text


def test_byte_tokens_are_not_made_from_their_spelling(tokenizers: dict[str, Tokenizer]) -> None:
    for family in ("llama", "gemma"):
        ids = tokenizers[family].encode("x<0x41>", add_special_tokens=False)
        assert tokenizers[family].decode(ids) == "x<0x41>"
        assert b"A" not in [
            tokenizers[family].token_bytes(i) for i in ids if tokenizers[family].token_text(i) == "<0x41>"
        ]


def test_added_bos_and_eos_stay_in_literal_mode() -> None:
    metadata = byte_level_metadata() | {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    tokenizer = tokenizer_from_gguf(Path("model"), metadata)
    for parse_special in (True, False):
        ids = tokenizer.encode("hi", parse_special=parse_special)
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.token_text(ids[-1]) == tokenizer.eos_token


def test_stop_ids_name_every_end_of_a_turn(tokenizers: dict[str, Tokenizer]) -> None:
    texts = {family: {t.token_text(i) for i in t.eos_token_ids} for family, t in tokenizers.items()}
    assert texts["byte-level"] == {"<|im_end|>", "<|endoftext|>"}
    assert texts["llama"] == {"</s>"}
    assert texts["gemma"] == {"<eos>", "<end_of_turn>"}


def assert_decodes_alike(decoder: TokenDecoder, tokenizer: Tokenizer) -> None:
    ids = [-(2**40), -1, *range(tokenizer.vocab_size + 2), 2**32, 2**70]
    assert [decoder.token_bytes(i) for i in ids] == [tokenizer.token_bytes(i) for i in ids]
    assert [decoder.is_special(i) for i in ids] == [tokenizer.is_special(i) for i in ids]
    assert decoder.eos_token_ids == tokenizer.eos_token_ids


def _with_empty_token(metadata: dict[str, Any]) -> dict[str, Any]:
    tokens = ["", *metadata["tokenizer.ggml.tokens"][1:]]
    return metadata | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": []}


DECODER_CASES: dict[str, dict[str, Any]] = {
    **{family: make() for family, make in FAMILIES.items()},
    # A token that ends a turn by its role, though it is none of the control tokens.
    "plain end": byte_level_metadata() | {"tokenizer.ggml.eot_token_id": 5},
    "no types": {k: v for k, v in byte_level_metadata().items() if k != "tokenizer.ggml.token_type"},
    "empty spelling": _with_empty_token(byte_level_metadata()),
}


@pytest.mark.parametrize("case", DECODER_CASES)
def test_the_quick_decoder_decodes_as_the_tokenizer(case: str) -> None:
    metadata = DECODER_CASES[case]
    path = Path("model.gguf")
    assert_decodes_alike(decoder_from_gguf(path, metadata), tokenizer_from_gguf(path, metadata))


@pytest.mark.model
@pytest.mark.parametrize("model", ["qwen2.5-coder-0.5b-instruct", "gemma-3-270m"])
def test_the_quick_decoder_on_real_vocabularies(model: str) -> None:
    path = resolve_model(ModelConfig(model=model))
    files = open_model(path)
    assert_decodes_alike(load_decoder(path, None, files), load_tokenizer(path))


@pytest.mark.parametrize("case", ["no tokenizer", "unknown kind", "no tokens", "too few types", "EOS outside"])
def test_the_quick_decoder_refuses_what_the_tokenizer_refuses(case: str) -> None:
    metadata, error, message = BROKEN_METADATA[case]
    with pytest.raises(error, match=message):
        decoder_from_gguf(Path("dir/model.gguf"), metadata)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config": {"eos_token_id": [5, 7]}}, {5, 7}),
        ({"generation_config": {"eos_token_id": 5}, "tokenizer_config": {"eos_token": "<|im_end|>"}}, {5, 702}),
        ({"config": {"eos_token_id": 6}, "generation_config": {}}, {6}),
        ({"tokenizer_config": {"eos_token": "<|im_end|>"}}, {700, 702}),
    ],
)
def test_stop_ids_of_a_folder(files: dict[str, Any], expected: set[int], tmp_path: Path) -> None:
    assert load_tokenizer(write_folder(tmp_path, **files)).eos_token_ids == expected


def test_ids_outside_the_vocabulary(tokenizers: dict[str, Tokenizer]) -> None:
    for tokenizer in tokenizers.values():
        for token_id in (-1, tokenizer.vocab_size, 2**32, 2**70):
            assert tokenizer.token_bytes(token_id) == b""
            assert tokenizer.token_text(token_id) == ""
            assert not tokenizer.is_special(token_id)
            assert tokenizer.decode([token_id]) == ""


def test_unpaired_surrogates_are_refused(tokenizers: dict[str, Tokenizer]) -> None:
    with pytest.raises(InvalidRequestError, match="surrogate at character 2"):
        tokenizers["byte-level"].encode("ab\ud800")


def test_threads_share_one_tokenizer() -> None:
    tokenizer = tokenizer_from_gguf(Path("model"), byte_level_metadata())
    texts = [text for text in TEXTS if len(text) < 1000]
    alone = _byte_level()
    expected = [(alone.encode(text), alone.encode(text, parse_special=False)) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        found = list(
            pool.map(lambda text: (tokenizer.encode(text), tokenizer.encode(text, parse_special=False)), texts)
        )
    assert found == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("unit", ["a", " ", "\n", "中", " \t", "\u0301", "<|im_end|>", "ab "])
def test_long_runs_take_bounded_time(family: str, unit: str, tokenizers: dict[str, Tokenizer]) -> None:
    text = "x" + unit * (200_000 // len(unit))  # quadratic work would take minutes
    assert tokenizers[family].decode(tokenizers[family].encode(text), skip_special_tokens=False).endswith(text)


def test_override_wins(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "other", tokenizer_config={"eos_token": "<|im_end|>"})
    model = write_gguf(tmp_path / "model.gguf", sentencepiece_metadata())
    assert load_tokenizer(model).eos_token == "</s>"
    for override in (folder, folder / "tokenizer.json"):
        assert load_tokenizer(model, str(override)).eos_token == "<|im_end|>"


def test_tokens_added_beside_a_sentencepiece_model(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece())
    write_folder(
        tmp_path,
        tokenizer=None,
        added_tokens={"<|im_start|>": 1000, "<|im_end|>": 1001},
        tokenizer_config={"eos_token": "<|im_end|>"},
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("<|im_start|>x<|im_end|>")[-1] == 1001
    assert 1001 in tokenizer.eos_token_ids
    assert tokenizer.token_bytes(1000) == b"<|im_start|>"


def _metadata(**changes: Any) -> dict[str, Any]:
    metadata = byte_level_metadata()
    for key, value in changes.items():
        name = f"tokenizer.ggml.{key}"
        if value is None:
            del metadata[name]
        else:
            metadata[name] = value
    return metadata


_NO_IDS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "padding_token_id": None, "merges": []}
BROKEN_METADATA: dict[str, tuple[dict[str, Any], type[PeltonError], str]] = {
    "no tokenizer": (_metadata(model=None), UnsupportedModelError, "--tokenizer"),
    "unknown kind": (_metadata(model="rwkv"), UnsupportedModelError, "rwkv"),
    "unknown pattern": (_metadata(pre="nosuch"), UnsupportedModelError, "known are .*llama-bpe.*qwen2"),
    "pattern of a wrong type": (_metadata(pre=[1]), UnsupportedModelError, "known are"),
    "no tokens": (_metadata(tokens=None), ModelFileError, "tokens is missing"),
    "empty vocabulary": (_metadata(tokens=[], token_type=[], **_NO_IDS), ModelFileError, "empty"),
    "tokens of a wrong type": (_metadata(tokens=[1, 2]), ModelFileError, "only str"),
    "a number for the tokens": (_metadata(tokens=5), ModelFileError, "array of str"),
    "too few types": (_metadata(token_type=[1]), ModelFileError, "1 token types"),
    "a token twice": (_metadata(tokens=["a", "a"], token_type=[1, 1], **_NO_IDS), ModelFileError, "'a' more than once"),
    "merge of unknown tokens": (_metadata(merges=["nosuch token"]), ModelFileError, "out of vocabulary"),
    "merge without a space": (_metadata(merges=["nospace"]), ModelFileError, "cannot be built"),
    "EOS outside": (_metadata(eos_token_id=10**6), ModelFileError, "eos_token_id is 1000000"),
    "EOS of a wrong type": (_metadata(eos_token_id="x"), ModelFileError, "eos_token_id is 'x'"),
    "no scores": (_metadata(model="llama", merges=None), ModelFileError, "scores is missing"),
    "too few scores": (_metadata(model="llama", merges=None, scores=[1.0]), ModelFileError, "scores has 1 entries"),
}


@pytest.mark.parametrize("case", BROKEN_METADATA)
def test_broken_gguf_metadata(case: str) -> None:
    metadata, error, message = BROKEN_METADATA[case]
    with pytest.raises(error, match=message) as caught:
        tokenizer_from_gguf(Path("dir/model.gguf"), metadata)
    assert "dir/model.gguf" in str(caught.value)


def _json_with(**changes: Any) -> str:
    return json.dumps(json.loads(train_byte_level().to_str()) | changes)


_DEEP = '{"version":"1.0","decoder":' + '{"type":"Sequence","decoders":[' * 50_000
BROKEN_FOLDERS: dict[str, dict[str, Any]] = {
    "not JSON": {"tokenizer": "{"},
    "empty": {"tokenizer": ""},
    "another shape": {"tokenizer": "[1]"},
    "nested without end": {"tokenizer": _DEEP},
    "merge of unknown tokens": {
        "tokenizer": _json_with(model={"type": "BPE", "vocab": {"a": 0}, "merges": [["b", "c"]]}),
    },
    "bad pattern": {
        "tokenizer": _json_with(
            pre_tokenizer={"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}
        )
    },
    "config not JSON": {"tokenizer_config": "{"},
    "config of another shape": {"tokenizer_config": [1]},
    "token of a wrong type": {"tokenizer_config": {"eos_token": 5}},
    "added tokens of a wrong type": {"tokenizer_config": {"added_tokens_decoder": [1]}},
    "added token without text": {"tokenizer_config": {"added_tokens_decoder": {"5": {"special": True}}}},
    "stop ids of a wrong type": {"generation_config": {"eos_token_id": "x"}},
    "nothing": {"tokenizer": None},
}


@pytest.mark.parametrize("case", BROKEN_FOLDERS)
def test_broken_folder(case: str, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=str(tmp_path)):
        load_tokenizer(write_folder(tmp_path / "model", **BROKEN_FOLDERS[case]))


def test_word_piece_is_refused(tmp_path: Path) -> None:
    decoder = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    with pytest.raises(UnsupportedModelError, match="WordPiece"):
        load_tokenizer(write_folder(tmp_path, tokenizer=_json_with(decoder=decoder)))


def test_missing_paths(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="nosuch"):
        load_tokenizer(tmp_path / "nosuch")
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ModelFileError, match="weights"):
        load_tokenizer(tmp_path / "weights.bin")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "unigram", "vocab_size": 500}, "unigram"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalization"),
    ],
)
def test_unsupported_sentencepiece_models(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece(**options))
    with pytest.raises(UnsupportedModelError, match=message):
        load_tokenizer(tmp_path)


def test_damaged_sentencepiece_models(tmp_path: Path) -> None:
    whole = train_sentencepiece()
    path = tmp_path / "tokenizer.model"
    cases = [whole[:cut] for cut in range(1, len(whole), len(whole) // 100)]
    cases += [b"\xff" * 50, b"\x0a\xff\xff\xff\xff\x0f", b"GGUF" + whole]
    for i in range(0, len(whole), len(whole) // 100):
        cases.append(whole[:i] + bytes([whole[i] ^ 0xFF]) + whole[i + 1 :])
    num_refused = 0
    for data in cases:
        path.write_bytes(data)
        try:
            load_tokenizer(tmp_path).encode("hello")
        except (ModelFileError, UnsupportedModelError):
            num_refused += 1
    assert num_refused > len(cases) // 3  # the others read as smaller or slightly different vocabularies


def test_control_tokens_spelled_outside_the_byte_alphabet() -> None:
    end = "<\uff5cend\u2581of\u2581sentence\uff5c>"  # DeepSeek's
    metadata = byte_level_metadata()
    metadata["tokenizer.ggml.tokens"] += [end, "   "]
    metadata["tokenizer.ggml.token_type"] += [3, 4]
    tokenizer = tokenizer_from_gguf(Path("model"), metadata)
    end_id, spaces_id = tokenizer.vocab_size - 2, tokenizer.vocab_size - 1
    assert tokenizer.encode(f"x{end}   ")[1:] == [end_id, spaces_id]
    assert tokenizer.token_bytes(end_id) == end.encode()
    assert tokenizer.decode([end_id, spaces_id]) == "   "
    assert end_id in tokenizer.eos_token_ids
    assert tokenizer.vocab_size == len(metadata["tokenizer.ggml.tokens"])


def test_patterns_that_differ_from_transformers_follow_the_model() -> None:
    """`transformers` cuts SmolLM's digits together and adds no BOS for Llama 3, against both models' own files."""
    digits = tokenizer_from_gguf(Path("model"), byte_level_metadata("smollm")).encode("1234")
    assert len(digits) == 4
    metadata = byte_level_metadata("llama-bpe")
    del metadata["tokenizer.ggml.add_bos_token"]
    tokenizer = tokenizer_from_gguf(Path("model"), metadata)
    assert tokenizer.encode("hi")[0] == tokenizer.bos_token_id
