"""What a chat template takes and how it fails, for those who do not run it: jinja2 is slow to import."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pelton.core.errors import InvalidRequestError

Message = Mapping[str, Any]


class ChatTemplateError(InvalidRequestError):
    """The template refused these messages, or failed on them."""

    code = "chat_template_error"

    def __init__(self, message: str) -> None:
        super().__init__(message, param="messages")
