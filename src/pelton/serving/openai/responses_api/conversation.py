"""Items of /v1/responses to the messages of a chat: what was thought, said and called in one go is one message."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Any

from msgspec import Raw

from pelton.core.errors import InvalidRequestError
from pelton.serving.openai.requests import check_supported
from pelton.serving.openai.responses_api.items import InputItem, InputPart, item_type, part_text
from pelton.serving.openai.responses_api.requests import ResponseTool
from pelton.serving.request_body import decode_inner

Message = dict[str, Any]
# Before what a conversation was compacted to.
SUMMARY_HEAD = "Summary of the conversation so far:\n"


def seal(text: str) -> str:
    """`encrypted_content`: no secret, since the text stands beside it, but all that a stateless client keeps."""
    return base64.urlsafe_b64encode(text.encode()).decode()


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
        elif kind == "compaction":
            self._add_compaction(item, path)
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

    def _add_compaction(self, item: InputItem, path: str) -> None:
        """The user's messages before it are one from here on: many templates know no two in a row."""
        text = _unseal(_required(item.encrypted_content, f"{path}.encrypted_content"), path)
        messages = self.messages
        while len(messages) > 1 and messages[-1]["role"] == messages[-2]["role"] == "user":
            last = messages.pop()
            messages[-1]["content"] += "\n\n" + last["content"]
        messages.append({"role": "assistant", "content": SUMMARY_HEAD + text})

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
    return "\n".join(part_text(part, f"{path}[{index}]") for index, part in enumerate(content))


def _reasoning(item: InputItem, path: str) -> str:
    if item.content:
        return _text(item.content, f"{path}.content")
    if item.encrypted_content is None:
        return "\n".join(part.text for part in item.summary or ())
    return _unseal(item.encrypted_content, path)


def _unseal(sealed: str, path: str) -> str:
    try:
        return base64.b64decode(sealed.encode(), altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        raise InvalidRequestError(
            f"{path}.encrypted_content was not made by this server", param=f"{path}.encrypted_content"
        ) from None


def response_tools(tools: Sequence[Raw] | None, path: str = "tools") -> list[ResponseTool]:
    """Raises `InvalidRequestError` for what is no function."""
    found = []
    for index, raw in enumerate(tools or ()):
        place = f"{path}[{index}]"
        tool = decode_inner(raw, ResponseTool, place, _check_tool_kind)
        _check_tool_kind({"type": tool.type}, place)
        check_supported(tool, f"{place}.")
        _required(tool.name, f"{place}.name")
        found.append(tool)
    return found


def _check_tool_kind(tool: Any, path: str) -> None:
    kind = tool.get("type") if isinstance(tool, dict) else None
    if isinstance(kind, str) and kind != "function":
        raise InvalidRequestError(
            f"{path} is of type {kind[:64]!r}; tools are of type 'function', and the client runs them",
            param=f"{path}.type",
            code="unsupported_parameter",
        )


def chat_tools(tools: Sequence[Raw] | None, path: str = "tools") -> list[dict[str, Any]]:
    """As /v1/chat/completions takes them."""
    found = []
    for tool in response_tools(tools, path):
        values = {name: getattr(tool, name) for name in ("name", "description", "parameters", "strict")}
        function = {name: value for name, value in values.items() if value is not None}
        found.append({"type": "function", "function": function})
    return found
