"""Building blocks over the `tokenizers` library; its errors and panics become `ModelFileError`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import tokenizers
from tokenizers import AddedToken, processors

from pelton.core.errors import ModelFileError, PeltonError


@contextmanager
def tokenizer_errors(path: object) -> Iterator[None]:
    """A Rust panic arrives as a BaseException that no `except Exception` sees."""
    try:
        yield
    except PeltonError:
        raise
    except Exception as error:
        raise ModelFileError(path, f"the tokenizer cannot be built: {error}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ModelFileError(path, f"the tokenizer cannot be built: {error}") from error


def set_bos_eos(backend: tokenizers.Tokenizer, bos: str | None, eos: str | None) -> None:
    """Make `add_special_tokens` put `bos` before and `eos` after a text."""
    template: list[str] = [*([bos] if bos is not None else []), "$A", *([eos] if eos is not None else [])]
    special_tokens = [(token, backend.token_to_id(token)) for token in {bos, eos} if token is not None]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=special_tokens)


def ids_of(backend: tokenizers.Tokenizer, tokens: Iterable[str | None]) -> list[int]:
    """Ids of those tokens that the vocabulary has."""
    ids = (backend.token_to_id(token) for token in tokens if token is not None)
    return [token_id for token_id in ids if token_id is not None]


def added_token(text: str, *, special: bool) -> AddedToken:
    return AddedToken(text, normalized=False, special=special)


def literal_sibling(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A tokenizer over the same vocabulary in memory that reads special tokens in text as plain text."""
    sibling = tokenizers.Tokenizer(backend.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if getattr(backend, part) is not None:
            setattr(sibling, part, getattr(backend, part))
    # In the order of ids, so that tokens outside the model's vocabulary get the same ones.
    sibling.add_tokens([token for _, token in sorted(backend.get_added_tokens_decoder().items())])
    sibling.encode_special_tokens = True
    return sibling
