"""Errors of what endpoints share, in the words of the endpoint that was called."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from pelton.core.errors import InvalidRequestError


@contextmanager
def renamed_params(names: Mapping[str, str]) -> Iterator[None]:
    """`names`: from a chat's parameter, with all below it, to ours."""
    try:
        yield
    except InvalidRequestError as error:
        for theirs, ours in names.items():
            rest = (error.param or "").removeprefix(theirs)
            if rest != error.param and rest[:1] in ("", ".", "["):
                error.param = ours + rest if rest[:1] == "." else ours
                break
        raise
