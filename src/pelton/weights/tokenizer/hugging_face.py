"""Tokenizers from a Hugging Face folder: tokenizer.json, or tokenizer.model where there is none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from pelton.core.errors import ModelFileError
from pelton.weights.tokenizer.backend import ids_of, tokenizer_errors
from pelton.weights.tokenizer.sentencepiece_model import read_sentencepiece
from pelton.weights.tokenizer.stop_tokens import turn_end_ids
from pelton.weights.tokenizer.tokenizer import Tokenizer

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MORE_TOKENS = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")


def tokenizer_from_folder(folder: Path) -> Tokenizer:
    """Raises `ModelFileError` for broken files, `UnsupportedModelError` for an unknown kind."""
    if (folder / "tokenizer.json").is_file():
        return tokenizer_from_json(folder / "tokenizer.json")
    path = folder / "tokenizer.model"
    if not path.is_file():
        raise ModelFileError(folder, "holds neither tokenizer.json nor tokenizer.model")
    config = _read_config(folder)
    vocabulary, backend = read_sentencepiece(
        path,
        is_gemma=str(_read_json(folder / "config.json").get("model_type", "")).startswith("gemma"),
        add_bos=bool(config.get("add_bos_token", True)),
        add_eos=bool(config.get("add_eos_token", False)),
    )
    spelled = {"bos_token": vocabulary.bos_token, "eos_token": vocabulary.eos_token, "pad_token": vocabulary.pad_token}
    named = {name: value for name, value in spelled.items() if value is not None}
    return _tokenizer(backend, path, {**named, **config})


def tokenizer_from_json(path: Path) -> Tokenizer:
    """`path` is a tokenizer.json; the files that usually lie beside it are read where they exist.

    As in `transformers` 5, tokenizer.json itself says whether BOS and EOS are added, and the other
    files name them and may add tokens.
    """
    with tokenizer_errors(path):
        backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        backend.no_truncation()
        backend.no_padding()
    return _tokenizer(backend, path, _read_config(path.parent))


def _read_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json; before it listed added tokens, two other files did, and went before it."""
    config = _read_json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" in config:
        return config
    added = _read_json(folder / "added_tokens.json")
    if not all(type(token_id) is int for token_id in added.values()):
        raise ModelFileError(folder / "added_tokens.json", "must map tokens to ids")
    listed = {str(token_id): {"content": text} for text, token_id in added.items()}
    return {**config, **_read_json(folder / "special_tokens_map.json"), "added_tokens_decoder": listed}


def _tokenizer(backend: tokenizers.Tokenizer, path: Path, config: Mapping[str, Any]) -> Tokenizer:
    config_path = path.with_name("tokenizer_config.json")
    with tokenizer_errors(config_path):
        _add_tokens(backend, config_path, config)
    bos, eos, pad = (
        _token_text(config_path, name, config.get(name)) for name in ("bos_token", "eos_token", "pad_token")
    )
    return Tokenizer(
        backend,
        path,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        eos_token_ids=[*ids_of(backend, [eos]), *_stop_ids(path, backend)],
    )


def _add_tokens(backend: tokenizers.Tokenizer, path: Path, config: Mapping[str, Any]) -> None:
    """The listed tokens in the order of their ids, then the named ones that are still missing."""
    listed = config.get("added_tokens_decoder", {})
    if not isinstance(listed, dict):
        raise ModelFileError(path, "added_tokens_decoder must be an object")
    wanted = [
        _added_token(path, f"added_tokens_decoder[{token_id}]", listed[token_id], special=False)
        for token_id in sorted(listed, key=lambda text: int(text) if text.isdecimal() else -1)
    ]
    named = [(name, config.get(name)) for name in _NAMED_TOKENS]
    named += [(name, token) for name in _MORE_TOKENS for token in _as_list(config.get(name))]
    wanted += [_added_token(path, name, value, special=True) for name, value in named if value]
    seen = {token.content for token in backend.get_added_tokens_decoder().values()}
    fresh: list[AddedToken] = []
    for token in wanted:
        if token.content not in seen:
            seen.add(token.content)
            fresh.append(token)
    backend.add_tokens(fresh)


def _added_token(path: Path, name: str, value: Any, *, special: bool) -> AddedToken:
    text = _token_text(path, name, value)
    if not text:
        raise ModelFileError(path, f"{name} is {value!r}; it must be a token's text")
    entry = value if isinstance(value, dict) else {}
    flags = {key: bool(entry[key]) for key in _FLAGS if key in entry}
    return AddedToken(text, special=special or bool(entry.get("special", False)), **flags)


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
    return turn_end_ids(backend)


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
