"""Tokenizers from a Hugging Face folder: tokenizer.json, or tokenizer.model where there is none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from pelton.core.errors import ModelFileError
from pelton.weights.tokenizer.backend import ids_of, set_bos_eos, tokenizer_errors
from pelton.weights.tokenizer.sentencepiece_model import tokenizer_from_sentencepiece
from pelton.weights.tokenizer.stop_tokens import TURN_ENDS
from pelton.weights.tokenizer.tokenizer import Tokenizer

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MORE_TOKENS = ("additional_special_tokens", "extra_special_tokens")


def tokenizer_from_folder(folder: Path) -> Tokenizer:
    """Raises `ModelFileError` for broken files, `UnsupportedModelError` for an unknown kind."""
    if (folder / "tokenizer.json").is_file():
        return tokenizer_from_json(folder / "tokenizer.json")
    if (folder / "tokenizer.model").is_file():
        config = _read_json(folder / "tokenizer_config.json")
        model_type = str(_read_json(folder / "config.json").get("model_type", ""))
        return tokenizer_from_sentencepiece(
            folder / "tokenizer.model",
            is_gemma=model_type.startswith("gemma"),
            add_bos=bool(config.get("add_bos_token", True)),
            add_eos=bool(config.get("add_eos_token", False)),
        )
    raise ModelFileError(folder, "holds neither tokenizer.json nor tokenizer.model")


def tokenizer_from_json(path: Path) -> Tokenizer:
    """`path` is a tokenizer.json; the files that usually lie beside it are read where they exist.

    What is not in tokenizer.json itself (tokens added later, BOS and EOS) comes from
    tokenizer_config.json and special_tokens_map.json, as `transformers` has it.
    """
    config_path = path.with_name("tokenizer_config.json")
    config = {**_read_json(path.with_name("special_tokens_map.json")), **_read_json(config_path)}
    named = {name: _token_text(config_path, name, config.get(name)) for name in _NAMED_TOKENS}
    with tokenizer_errors(path):
        backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        backend.no_truncation()
        backend.no_padding()
    with tokenizer_errors(config_path):
        _add_tokens(backend, config_path, config, named)
        if "add_bos_token" in config or "add_eos_token" in config or backend.post_processor is None:
            set_bos_eos(
                backend,
                named["bos_token"] if config.get("add_bos_token") else None,
                named["eos_token"] if config.get("add_eos_token") else None,
            )
    return Tokenizer(
        backend,
        path,
        bos_token=named["bos_token"],
        eos_token=named["eos_token"],
        pad_token=named["pad_token"],
        eos_token_ids=[*ids_of(backend, [named["eos_token"]]), *_stop_ids(path, backend)],
    )


def _add_tokens(
    backend: tokenizers.Tokenizer, path: Path, config: Mapping[str, Any], named: Mapping[str, str | None]
) -> None:
    present = {token.content for token in backend.get_added_tokens_decoder().values()}
    listed = config.get("added_tokens_decoder", {})
    if not isinstance(listed, dict):
        raise ModelFileError(path, "added_tokens_decoder must be an object")
    wanted: list[AddedToken] = []
    for token_id in sorted(listed, key=_as_id):
        entry = listed[token_id]
        text = _token_text(path, f"added_tokens_decoder[{token_id}]", entry)
        flags = {key: bool(entry[key]) for key in ("lstrip", "rstrip", "single_word", "normalized") if key in entry}
        wanted.append(AddedToken(text, special=bool(entry.get("special", False)), **flags))
    more = [_token_text(path, key, token) for key in _MORE_TOKENS for token in _as_list(config.get(key))]
    wanted += [AddedToken(text, special=True) for text in (*named.values(), *more) if text]
    # The first mention of a token wins: the one with flags.
    fresh = {token.content: token for token in reversed(wanted) if token.content not in present}
    backend.add_tokens([token for token in wanted if fresh.get(token.content) is token])


def _stop_ids(path: Path, backend: tokenizers.Tokenizer) -> list[int]:
    """What generation_config.json or config.json says; else the well-known ends of a turn."""
    for name in ("generation_config.json", "config.json"):
        value = _read_json(path.with_name(name)).get("eos_token_id")
        if value is None:
            continue
        ids = _as_list(value)
        if not all(type(token_id) is int and token_id >= 0 for token_id in ids):
            raise ModelFileError(path.with_name(name), f"eos_token_id is {value!r}; it must be token ids")
        return ids
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    return ids_of(backend, TURN_ENDS & special)


def _token_text(path: Path, name: str, value: Any) -> str | None:
    """A token is written as its text or as an object with `content`."""
    text = value.get("content") if isinstance(value, dict) else value
    if text is not None and not isinstance(text, str):
        raise ModelFileError(path, f"{name} is {value!r}; it must be a token's text")
    return text


def _as_list(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else [] if value is None else [value]


def _as_id(text: str) -> int:
    return int(text) if text.isdecimal() else -1


def _read_json(path: Path) -> dict[str, Any]:
    """An empty one where the file does not exist."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFileError(path, f"not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelFileError(path, "must be a JSON object")
    return value
