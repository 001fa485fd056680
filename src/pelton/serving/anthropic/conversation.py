"""Anthropic's messages to those of a chat. Turns of one role in a row are one, as Anthropic has it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pelton.core.errors import InvalidRequestError
from pelton.serving.anthropic.requests import BLOCK_TYPES, ContentBlock, InnerBlock, MessageParam, TextBlock
from pelton.serving.openai.requests import check_supported

Message = dict[str, Any]


def chat_messages(system: str | Sequence[TextBlock] | None, messages: Sequence[MessageParam]) -> list[Message]:
    """Raises `InvalidRequestError` for what is not text or is out of place."""
    conversation = _Conversation()
    if system:
        for index, block in enumerate(system):
            if isinstance(block, TextBlock):
                check_supported(block, f"system[{index}].")
        text = system if isinstance(system, str) else "\n".join(block.text for block in system)
        conversation.messages.append({"role": "system", "content": text})
    for index, message in enumerate(messages):
        conversation.add(message, f"messages[{index}]")
    if conversation.open_calls:
        raise InvalidRequestError(
            "the conversation ends with a tool_use; its tool_result must follow in a user message", param="messages"
        )
    return conversation.messages


class _Conversation:
    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.open_calls: set[str] = set()  # calls of the last turn that have no result yet

    def add(self, message: MessageParam, path: str) -> None:
        content = message.content
        blocks = [ContentBlock(type="text", text=content)] if isinstance(content, str) else content
        if self.open_calls and not any(block.type == "tool_result" for block in blocks):
            raise InvalidRequestError(
                f"{path} follows a tool_use and has no tool_result for {min(self.open_calls)!r}", param=path
            )
        if message.role == "assistant" or not blocks:
            self._open(message.role)  # also a turn without a word is one
        for index, block in enumerate(blocks):
            where = f"{path}.content[{index}]"
            if block.type not in BLOCK_TYPES:
                problem = "the model reads text only" if block.type in ("image", "document") else "it is not supported"
                raise InvalidRequestError(
                    f"{where} is of type {block.type[:64]!r}; {problem}. Blocks may be {', '.join(BLOCK_TYPES)}",
                    param=f"{where}.type",
                    code="unsupported_content_type",
                )
            if block.type == "text":
                self._add_text(message.role, _required(block.text, f"{where}.text"))
            elif block.type == "tool_result":
                self._add_result(message.role, block, where)
            else:
                self._add_of_assistant(message.role, block, where)
        if message.role == "user" and self.open_calls:
            raise InvalidRequestError(f"{path} has no tool_result for {min(self.open_calls)!r}", param=path)

    def _open(self, role: str) -> Message:
        if not self.messages or self.messages[-1]["role"] != role:
            self.messages.append({"role": role, "content": ""})
        return self.messages[-1]

    def _add_text(self, role: str, text: str) -> None:
        message = self._open(role)
        message["content"] = f"{message['content']}\n{text}" if message["content"] else text

    def _add_of_assistant(self, role: str, block: ContentBlock, path: str) -> None:
        if role != "assistant":
            raise InvalidRequestError(f"{path}: a {block.type} belongs to an assistant message", param=path)
        message = self._open(role)
        if block.type == "thinking":
            text = _required(block.thinking, f"{path}.thinking")
            message["reasoning_content"] = message.get("reasoning_content", "") + text
            return
        call_id = _required(block.id, f"{path}.id")
        function = {
            "name": _required(block.name, f"{path}.name"),
            "arguments": json.dumps(_required(block.input, f"{path}.input"), ensure_ascii=False),
        }
        message.setdefault("tool_calls", []).append({"id": call_id, "type": "function", "function": function})
        self.open_calls.add(call_id)

    def _add_result(self, role: str, block: ContentBlock, path: str) -> None:
        call_id = _required(block.tool_use_id, f"{path}.tool_use_id")
        if role != "user" or call_id not in self.open_calls:
            raise InvalidRequestError(
                f"{path} answers the tool_use {call_id[:128]!r}, which the message before it does not have", param=path
            )
        self.open_calls.discard(call_id)
        text = _result_text(block.content, f"{path}.content")
        # Templates have no other place for it.
        content = f"Error: {text}" if block.is_error else text
        self.messages.append({"role": "tool", "tool_call_id": call_id, "content": content})


def _result_text(content: str | Sequence[InnerBlock] | None, path: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for index, block in enumerate(content):
        if block.type != "text":
            raise InvalidRequestError(
                f"{path}[{index}] is of type {block.type[:64]!r}; the model reads text only",
                param=f"{path}[{index}].type",
                code="unsupported_content_type",
            )
        texts.append(_required(block.text, f"{path}[{index}].text"))
    return "\n".join(texts)


def _required(value: Any, path: str) -> Any:
    if value is None:
        raise InvalidRequestError(f"{path} is required", param=path, code="missing_required_parameter")
    return value
