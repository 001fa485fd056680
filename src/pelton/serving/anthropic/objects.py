"""What /v1/messages answers."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]


class TextContent(Struct, kw_only=True, tag_field="type", tag="text"):
    text: str
    citations: None = None


class ThinkingContent(Struct, kw_only=True, tag_field="type", tag="thinking"):
    """`signature` is a checksum of the text, for clients that keep no thinking without one."""

    thinking: str
    signature: str


class ToolUseContent(Struct, kw_only=True, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]


Content = TextContent | ThinkingContent | ToolUseContent


class MessageUsage(Struct, kw_only=True):
    """The prompt's tokens are the sum of the first three."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class Message(Struct, kw_only=True):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[Content]
    usage: MessageUsage
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None


class MessageEvent(Struct, kw_only=True):
    """Of a stream: `type` says which, and which fields there are more."""

    type: str


class TokenCount(Struct, kw_only=True):
    input_tokens: int
