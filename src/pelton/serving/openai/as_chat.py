"""Requests of other endpoints as those of a chat."""

from __future__ import annotations

from typing import Any

import msgspec

from pelton.core.errors import InvalidRequestError
from pelton.serving.openai.requests import ChatRequest

_decoder = msgspec.json.Decoder(ChatRequest)


def as_chat(body: dict[str, Any]) -> ChatRequest:
    """By way of JSON: schemas are kept as the text that they came as. Raises `InvalidRequestError`."""
    try:
        return _decoder.decode(msgspec.json.encode(body))
    except msgspec.ValidationError as error:
        raise InvalidRequestError(f"the request is not usable as a chat: {error}") from None
    except RecursionError:
        raise InvalidRequestError("the request is nested too deeply", code="invalid_json") from None
