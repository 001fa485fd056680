"""Generation defaults and chat templates, wherever models keep them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pelton.core.errors import ModelFileError
from pelton.weights.generation import (
    MAX_TEMPLATE_BYTES,
    defaults_from_folder,
    defaults_from_gguf,
    template_from_folder,
    template_from_gguf,
)
from pelton.weights.tensors import GenerationDefaults

FILE = Path("model.gguf")


def write(folder: Path, **files: Any) -> Path:
    """Files by stem; a string is written as it is, the rest as JSON."""
    for stem, value in files.items():
        name = f"{stem}.jinja" if isinstance(value, str) else f"{stem}.json"
        (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, {}, GenerationDefaults()),
        (None, {"eos_token_id": 2}, GenerationDefaults(eos_token_ids=(2,))),
        (None, {"text_config": {"eos_token_id": [1, 106]}}, GenerationDefaults(eos_token_ids=(1, 106))),
        (
            {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0, "repetition_penalty": 1.05},
            {},
            GenerationDefaults(temperature=0.6, top_k=20, top_p=0.95, min_p=0.0, repetition_penalty=1.05),
        ),
        ({"eos_token_id": [7, 5]}, {"eos_token_id": 5}, GenerationDefaults(eos_token_ids=(7, 5))),
        ({"eos_token_id": 7}, {"eos_token_id": 5}, GenerationDefaults(eos_token_ids=(7, 5))),
        ({"do_sample": False, "temperature": 0.6}, {}, GenerationDefaults(temperature=0.0)),
        ({"do_sample": True, "temperature": None, "top_k": -1}, {}, GenerationDefaults(top_k=0)),
    ],
)
def test_defaults_of_a_folder(
    tmp_path: Path, generation: dict[str, Any] | None, config: dict[str, Any], expected: GenerationDefaults
) -> None:
    if generation is not None:
        write(tmp_path, generation_config=generation)
    assert defaults_from_folder(tmp_path, config) == expected


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, GenerationDefaults()),
        (
            {
                "general.sampling.temp": 0.5,
                "general.sampling.top_k": 40,
                "general.sampling.top_p": 0.9,
                "general.sampling.min_p": 0.1,
                "general.sampling.penalty_repeat": 1.1,
            },
            GenerationDefaults(temperature=0.5, top_k=40, top_p=0.9, min_p=0.1, repetition_penalty=1.1),
        ),
        (
            {"tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.eot_token_id": 106, "tokenizer.ggml.eom_token_id": 1},
            GenerationDefaults(eos_token_ids=(1, 106)),
        ),
    ],
)
def test_defaults_of_gguf(metadata: dict[str, Any], expected: GenerationDefaults) -> None:
    assert defaults_from_gguf(FILE, metadata) == expected


@pytest.mark.parametrize(
    ("generation", "problem"),
    [
        ({"temperature": "warm"}, "temperature is 'warm'"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_k": 2.5}, "top_k is 2.5"),
        ({"top_k": -2}, "top_k is -2"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be a token id or a list"),
        ({"eos_token_id": [1, -1]}, "eos_token_id must be a token id or a list"),
        ({"eos_token_id": [True]}, "eos_token_id must be a token id or a list"),
        ([], "an object is expected"),
    ],
)
def test_bad_defaults_are_a_typed_error(tmp_path: Path, generation: Any, problem: str) -> None:
    with pytest.raises(ModelFileError, match=problem) as caught:
        defaults_from_folder(write(tmp_path, generation_config=generation), {})
    assert "generation_config.json" in str(caught.value)


NAMED = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"tokenizer_config": {}}, None),
        ({"tokenizer_config": {"chat_template": None}}, None),
        ({"tokenizer_config": {"chat_template": "a"}}, "a"),
        ({"tokenizer_config": {"chat_template": NAMED}}, "plain"),
        ({"tokenizer_config": {"chat_template": NAMED[:1]}}, "tools"),
        ({"tokenizer_config": {"chat_template": []}}, None),
        ({"tokenizer_config": {"chat_template": "a"}, "chat_template": {"chat_template": "b"}}, "b"),
        ({"tokenizer_config": {"chat_template": "a"}, "chat_template": "{{ c }}\n"}, "{{ c }}\n"),
    ],
)
def test_template_of_a_folder(tmp_path: Path, files: dict[str, Any], expected: str | None) -> None:
    assert template_from_folder(write(tmp_path, **files)) == expected


@pytest.mark.parametrize("value", [7, {"default": "a"}, ["a"], [{"name": "default"}], "x" * (MAX_TEMPLATE_BYTES + 1)])
def test_bad_template_is_a_typed_error(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ModelFileError, match="chat_template must be"):
        template_from_folder(write(tmp_path, tokenizer_config={"chat_template": value}))
    if not isinstance(value, list):
        with pytest.raises(ModelFileError, match="chat_template must be"):
            template_from_gguf(FILE, {"tokenizer.chat_template": value})


def test_template_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ModelFileError, match="not valid UTF-8"):
        template_from_folder(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("x" * (MAX_TEMPLATE_BYTES + 1))
    with pytest.raises(ModelFileError, match="larger than"):
        template_from_folder(tmp_path)
