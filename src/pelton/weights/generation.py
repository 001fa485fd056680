"""Generation defaults and chat templates, from the files of a folder or from GGUF metadata."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pelton.core.errors import ModelFileError
from pelton.weights.fields import Fields
from pelton.weights.mapped_file import read_json_object, read_text
from pelton.weights.tensors import GenerationDefaults

MAX_TEMPLATE_BYTES = 2**20
# Sampling keys of generation_config.json that have the same name in `GenerationDefaults`.
_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty")
_GGUF_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


def defaults_from_folder(folder: Path, config: Mapping[str, Any]) -> GenerationDefaults:
    """From generation_config.json; end-of-sequence ids also from config.json.

    `do_sample: false` reads as temperature 0. Raises `ModelFileError` for values of a wrong type.
    """
    path = folder / "generation_config.json"
    values = read_json_object(path) if path.exists() else {}
    fields = Fields(path, values)
    numbers = {key: fields.optional_number(key, positive=False) for key in _NUMBERS}
    if values.get("do_sample") is False:
        numbers["temperature"] = 0.0
    text_config = config.get("text_config")
    sources = [(path, values), (folder / "config.json", config)]
    if isinstance(text_config, dict):
        sources.append((folder / "config.json", text_config))
    # Each file may name only some of them: a base model's end token here, the chat's there.
    eos_token_ids = tuple(dict.fromkeys(token_id for source in sources for token_id in _eos_token_ids(*source)))
    return GenerationDefaults(top_k=_top_k(fields), eos_token_ids=eos_token_ids, **numbers)


def _top_k(fields: Fields) -> int | None:
    """Some files say -1 for off."""
    top_k = fields.optional_integer("top_k", low=-1)
    return None if top_k is None else max(top_k, 0)


def _eos_token_ids(path: Path, values: Mapping[str, Any]) -> tuple[int, ...]:
    value = values.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if len(ids) > 1024 or any(type(token_id) is not int or token_id < 0 for token_id in ids):
        raise ModelFileError(path, "eos_token_id must be a token id or a list of token ids")
    return tuple(dict.fromkeys(ids))


def defaults_from_gguf(path: Path, metadata: Mapping[str, Any]) -> GenerationDefaults:
    """From `general.sampling.*` and the end tokens of `tokenizer.ggml.*`."""
    sampling = Fields(path, metadata, "general.sampling.")
    tokenizer = Fields(path, metadata, "tokenizer.ggml.")
    end_ids = (tokenizer.optional_integer(key, low=0, high=(1 << 32) - 1) for key in _GGUF_END_KEYS)
    return GenerationDefaults(
        temperature=sampling.optional_number("temp", positive=False),
        top_k=_top_k(sampling),
        top_p=sampling.optional_number("top_p", positive=False),
        min_p=sampling.optional_number("min_p", positive=False),
        repetition_penalty=sampling.optional_number("penalty_repeat", positive=False),
        eos_token_ids=tuple(dict.fromkeys(token_id for token_id in end_ids if token_id is not None)),
    )


def template_from_folder(folder: Path) -> str | None:
    """chat_template.jinja, else chat_template.json, else tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return read_text(path, MAX_TEMPLATE_BYTES)
    for name in ("chat_template.json", "tokenizer_config.json"):
        path = folder / name
        if path.exists():
            template = _pick_template(path, read_json_object(path).get("chat_template"))
            if template is not None:
                return template
    return None


def _pick_template(path: Path, value: Any) -> str | None:
    """One template, or a list of {name, template} of which "default" is taken, else the first."""
    if isinstance(value, list):
        if not all(isinstance(item, dict) and isinstance(item.get("template"), str) for item in value):
            raise ModelFileError(path, "chat_template must be a string or a list of {name, template} objects")
        named = {item.get("name"): item["template"] for item in reversed(value)}
        value = named.get("default", value[0]["template"] if value else None)
    return _check_template(path, value)


def template_from_gguf(path: Path, metadata: Mapping[str, Any]) -> str | None:
    return _check_template(path, metadata.get("tokenizer.chat_template"))


def _check_template(path: Path, value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or len(value) > MAX_TEMPLATE_BYTES:
        raise ModelFileError(path, f"chat_template must be a string of at most {MAX_TEMPLATE_BYTES} characters")
    return value
