"""Anthropic's messages to those of a chat. Turns of one role in a row are one, as Anthropic has it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pelton.core.errors import InvalidRequestError
from pelton.serving.anthropic.requests import (
    ContentBlock,
    InnerBlock,
    MessageParam,
    SaidBlock,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)
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
        blocks: list[ContentBlock] = [SaidBlock(text=content)] if isinstance(content, str) else content
        if self.open_calls and not any(isinstance(block, ToolResultBlock) for block in blocks):
            raise InvalidRequestError(
                f"{path} follows a tool_use and has no tool_result for {min(self.open_calls)!r}", param=path
            )
        if message.role == "assistant" or not blocks:
            self._open(message.role)  # also a turn without a word is one
        for index, block in enumerate(blocks):
            where = f"{path}.content[{index}]"
            check_supported(block, f"{where}.")
            if isinstance(block, SaidBlock):
                self._add_text(message.role, block.text)
            elif isinstance(block, ToolResultBlock):
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

    def _add_of_assistant(self, role: str, block: ThinkingBlock | ToolUseBlock, path: str) -> None:
        if role != "assistant":
            kind = "thinking" if isinstance(block, ThinkingBlock) else "tool_use"
            raise InvalidRequestError(f"{path}: a {kind} belongs to an assistant message", param=path)
        message = self._open(role)
        if isinstance(block, ThinkingBlock):
            message["reasoning_content"] = message.get("reasoning_content", "") + block.thinking
            return
        function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
        message.setdefault("tool_calls", []).append({"id": block.id, "type": "function", "function": function})
        self.open_calls.add(block.id)

    def _add_result(self, role: str, block: ToolResultBlock, path: str) -> None:
        call_id = block.tool_use_id
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
    for index, block in enumerate(content):
        check_supported(block, f"{path}[{index}].")
    return "\n".join(block.text for block in content)
