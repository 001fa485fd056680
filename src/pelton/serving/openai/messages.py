"""Chat messages of the API to what templates expect."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from msgspec import Raw

from pelton.core.errors import InvalidRequestError
from pelton.serving.openai.requests import ChatMessage, ContentPart, check_supported
from pelton.serving.request_body import decode_inner

# What only messages of a role can say; of others, no template would read it.
_ROLE_OF = {
    "tool_calls": "assistant",
    "reasoning_content": "assistant",
    "reasoning": "assistant",
    "parsed": "assistant",
    "tool_call_id": "tool",
}


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Plain dictionaries with text contents. Raises `InvalidRequestError` for what is not text."""
    return [_template_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _template_message(message: ChatMessage, path: str) -> dict[str, Any]:
    check_supported(message, f"{path}.")
    _check_fields(message, path)
    # Templates know no developer role: most would leave such a message out without a word.
    role = "system" if message.role == "developer" else message.role
    content = _text(message.content, f"{path}.content")
    if content is None and not (message.role == "assistant" and message.tool_calls):
        raise InvalidRequestError(f"{path}.content is null; a message of {message.role!r} needs text", param=path)
    result: dict[str, Any] = {"role": role, "content": content or ""}
    reasoning = message.reasoning_content if message.reasoning_content is not None else message.reasoning
    found = {"name": message.name, "tool_call_id": message.tool_call_id, "reasoning_content": reasoning}
    result.update((name, value) for name, value in found.items() if value is not None)
    if message.tool_calls:
        result["tool_calls"] = [
            {
                "type": "function",
                "id": call.id,
                "function": {
                    "name": call.function.name,
                    "arguments": _arguments(call.function.arguments, f"{path}.tool_calls[{index}].function.arguments"),
                },
            }
            for index, call in enumerate(message.tool_calls)
        ]
    return result


def _check_fields(message: ChatMessage, path: str) -> None:
    for name, role in _ROLE_OF.items():
        if getattr(message, name) and message.role != role:
            raise InvalidRequestError(
                f"{path} is of role {message.role!r}, which has no {name}; that belongs to {role!r}",
                param=f"{path}.{name}",
                code="unknown_parameter",
            )
    sent = {message.reasoning_content, message.reasoning} - {None}
    if len(sent) > 1:
        raise InvalidRequestError(
            f"{path}.reasoning and {path}.reasoning_content name the same: send one", param=f"{path}.reasoning"
        )


def _text(content: str | list[Raw] | None, path: str) -> str | None:
    if not isinstance(content, list):
        return content
    texts = []
    for index, raw in enumerate(content):
        place = f"{path}[{index}]"
        part = decode_inner(raw, ContentPart, place, _check_kind)
        _check_kind({"type": part.type}, place)
        check_supported(part, f"{place}.")
        if part.text is None:
            raise InvalidRequestError(
                f"{place}.text is required", param=f"{place}.text", code="missing_required_parameter"
            )
        texts.append(part.text)
    return "\n".join(texts)


def _check_kind(part: Any, path: str) -> None:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind != "text":
        raise InvalidRequestError(
            f"{path} is of type {kind[:64]!r}; the model reads text only",
            param=f"{path}.type",
            code="unsupported_content_type",
        )


def _arguments(arguments: str, path: str) -> Any:
    """Templates write arguments with `tojson`, so they want the object, not its text."""
    try:
        value = json.loads(arguments) if arguments else {}
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InvalidRequestError(f"{path} must be the text of a JSON object", param=path)
    return value
