"""Items of /v1/responses to the messages of a chat: what was thought, said and called in one go is one message."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Any

from pelton.core.errors import InvalidRequestError
from pelton.serving.openai.responses_api.requests import ITEM_TYPES, InputItem, InputPart, ResponseTool

Message = dict[str, Any]
_TEXT_PARTS = ("input_text", "output_text", "text", "reasoning_text")


def seal_reasoning(text: str) -> str:
    """`encrypted_content`: no secret, since the text stands beside it, but all that a stateless client keeps."""
    return base64.urlsafe_b64encode(text.encode()).decode()


def input_items(input: str | list[InputItem]) -> list[InputItem]:
    return [InputItem(type="message", role="user", content=input)] if isinstance(input, str) else input


def item_type(item: InputItem, path: str) -> str:
    kind = item.type
    if kind is None:
        kind = "message" if item.role is not None else "item_reference"
    if kind not in ITEM_TYPES:
        raise InvalidRequestError(
            f"{path} is of type {kind[:64]!r}, which is not supported; items may be {', '.join(ITEM_TYPES)}",
            param=f"{path}.type",
            code="unsupported_parameter",
        )
    return kind


class Conversation:
    """Collects messages, item by item. Raises `InvalidRequestError` for what cannot be one."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self._call_ids: set[str] = set()

    def add_all(self, items: Sequence[InputItem], path: str = "input") -> None:
        for index, item in enumerate(items):
            self.add(item, f"{path}[{index}]")

    def add(self, item: InputItem, path: str) -> None:
        kind = item_type(item, path)
        if kind == "message":
            self._add_message(item, path)
        elif kind == "reasoning":
            text = _reasoning(item, path)
            if text:
                self.messages.append({"role": "assistant", "content": "", "reasoning_content": text})
        elif kind == "function_call":
            self._add_call(item, path)
        elif kind == "function_call_output":
            self._add_output(item, path)
        else:
            raise InvalidRequestError(f"{path} refers to an item that is not stored here", param=f"{path}.id")

    def _add_message(self, item: InputItem, path: str) -> None:
        role = _required(item.role, f"{path}.role")
        content = _text(_required(item.content, f"{path}.content"), f"{path}.content")
        last = self.messages[-1] if self.messages else {}
        if role == "assistant" and _is_thought(last):
            last["content"] = content
        else:
            self.messages.append({"role": role, "content": content})

    def _add_call(self, item: InputItem, path: str) -> None:
        call_id = _required(item.call_id, f"{path}.call_id")
        self._call_ids.add(call_id)
        function = {"name": _required(item.name, f"{path}.name"), "arguments": item.arguments or "{}"}
        call = {"id": call_id, "type": "function", "function": function}
        last = self.messages[-1] if self.messages else {}
        if last.get("role") == "assistant":
            last.setdefault("tool_calls", []).append(call)
        else:
            self.messages.append({"role": "assistant", "content": "", "tool_calls": [call]})

    def _add_output(self, item: InputItem, path: str) -> None:
        call_id = _required(item.call_id, f"{path}.call_id")
        if call_id not in self._call_ids:
            raise InvalidRequestError(
                f"{path} answers the call {call_id!r}, which is not there before it", param=f"{path}.call_id"
            )
        text = _text(_required(item.output, f"{path}.output"), f"{path}.output")
        self.messages.append({"role": "tool", "tool_call_id": call_id, "content": text})


def _is_thought(message: Message) -> bool:
    """Nothing but reasoning so far."""
    return "reasoning_content" in message and not message["content"] and "tool_calls" not in message


def _required(value: Any, path: str) -> Any:
    if value is None:
        raise InvalidRequestError(f"{path} is required", param=path, code="missing_required_parameter")
    return value


def _text(content: str | list[InputPart], path: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for index, part in enumerate(content):
        where = f"{path}[{index}]"
        if part.type == "refusal":
            texts.append(_required(part.refusal, f"{where}.refusal"))
        elif part.type in _TEXT_PARTS:
            texts.append(_required(part.text, f"{where}.text"))
        else:
            raise InvalidRequestError(
                f"{where} is of type {part.type[:64]!r}; the model reads text only",
                param=f"{where}.type",
                code="unsupported_content_type",
            )
    return "\n".join(texts)


def _reasoning(item: InputItem, path: str) -> str:
    if item.content:
        return _text(item.content, f"{path}.content")
    if item.encrypted_content is None:
        return "\n".join(part.text for part in item.summary or ())
    try:
        return base64.b64decode(item.encrypted_content.encode(), altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        raise InvalidRequestError(
            f"{path}.encrypted_content was not made by this server", param=f"{path}.encrypted_content"
        ) from None


def chat_tools(tools: Sequence[ResponseTool] | None) -> list[dict[str, Any]]:
    """As /v1/chat/completions takes them."""
    return [_chat_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools or ())]


def _chat_tool(tool: ResponseTool, path: str) -> dict[str, Any]:
    if tool.type != "function":
        raise InvalidRequestError(
            f"{path} is of type {tool.type[:64]!r}; tools are of type 'function', and the client runs them",
            param=f"{path}.type",
            code="unsupported_parameter",
        )
    function = {"name": _required(tool.name, f"{path}.name")}
    for name in ("description", "parameters", "strict"):
        if getattr(tool, name) is not None:
            function[name] = getattr(tool, name)
    return {"type": "function", "function": function}
