"""`MessageBuilder`: deltas of one generation to the blocks of a message, and to the events that tell of them."""

from __future__ import annotations

import base64
import hashlib
import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from pelton.core.errors import PeltonError
from pelton.core.output import RequestOutput
from pelton.core.request import FinishReason
from pelton.serving.anthropic.errors import anthropic_error
from pelton.serving.anthropic.objects import (
    Content,
    Message,
    MessageUsage,
    StopReason,
    TextContent,
    ThinkingContent,
    ToolUseContent,
)
from pelton.serving.generation import Batch
from pelton.serving.parsing.answer import AnswerPlan
from pelton.serving.parsing.events import AnswerEvent, ArgumentsDelta, ContentDelta, ReasoningDelta, ToolCallStart

_encode = msgspec.json.Encoder().encode
_DELTAS: dict[type, tuple[str, str]] = {
    TextContent: ("text_delta", "text"),
    ThinkingContent: ("thinking_delta", "thinking"),
    ToolUseContent: ("input_json_delta", "partial_json"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageOptions:
    plan: AnswerPlan
    num_prompt_tokens: int
    stop_sequences: tuple[str, ...] = ()
    # As many tokens as these, from the prompt's start, are cached once it is computed.
    num_cacheable_tokens: int = 0
    is_context_limited: bool = False  # max_tokens was more than the context has room for
    emits: bool = True  # False: nobody reads the events


class MessageBuilder:
    """Also the encoder of its stream (`serving.sse.ChunkEncoder`)."""

    def __init__(self, message: Message, options: MessageOptions, find_cached_tokens: Callable[[], int]) -> None:
        self.message = message
        self._find_cached_tokens = find_cached_tokens
        self.is_finished = False
        self._options = options
        self._parser = replace(options.plan, make_call_id=_new_tool_use_id).make_parser()
        self._events: list[bytes] = []
        self._open: Content | None = None
        self._parts: list[str] = []
        self._frame = b""
        self._has_calls = False

    # -- the stream's encoder -----------------------------------------------------------------------------

    def first(self) -> bytes:
        self.message.usage = self.usage(self._find_cached_tokens(), 0)
        self._event("message_start", message=self.message)
        self._event("ping")
        return self._take()

    def encode(self, batch: Batch) -> bytes:
        for _, outputs in batch:
            for output in outputs:
                self._add_output(output)
        return self._take()

    def last(self) -> bytes:
        message = self.message
        delta = {"stop_reason": message.stop_reason, "stop_sequence": message.stop_sequence}
        self._event("message_delta", delta=delta, usage=message.usage)
        self._event("message_stop")
        return self._take()

    def fail(self, error: PeltonError) -> bytes:
        return b"event: error\ndata: " + _encode(anthropic_error(error)) + b"\n\n"

    # -- deltas to blocks ---------------------------------------------------------------------------------

    def _add_output(self, output: RequestOutput) -> None:
        for event in self._parser.push(output.text, output.token_ids):
            self._add_event(event)
        if output.finish_reason is None:
            return
        for event in self._parser.finish():
            self._add_event(event)
        self._close()
        self.is_finished = True
        message = self.message
        message.stop_reason = self._stop_reason(output)
        if message.stop_reason == "stop_sequence":
            message.stop_sequence = str(output.stop_reason)
        if output.usage is not None:
            message.usage = self.usage(output.usage.num_cached_tokens, output.usage.num_output_tokens)

    def usage(self, num_cached_tokens: int, num_output_tokens: int) -> MessageUsage:
        num_created = max(0, self._options.num_cacheable_tokens - num_cached_tokens)
        return MessageUsage(
            input_tokens=self._options.num_prompt_tokens - num_cached_tokens - num_created,
            cache_creation_input_tokens=num_created,
            cache_read_input_tokens=num_cached_tokens,
            output_tokens=num_output_tokens,
        )

    def _stop_reason(self, output: RequestOutput) -> StopReason:
        if output.finish_reason is FinishReason.LENGTH:
            return "model_context_window_exceeded" if self._options.is_context_limited else "max_tokens"
        if output.stop_reason in self._options.stop_sequences:
            return "stop_sequence"
        return "tool_use" if self._has_calls else "end_turn"

    def _add_event(self, event: AnswerEvent) -> None:
        if isinstance(event, ContentDelta):
            if not isinstance(self._open, TextContent):
                self._start(TextContent(text=""))
            self._delta(event.text)
        elif isinstance(event, ReasoningDelta):
            if not isinstance(self._open, ThinkingContent):
                self._start(ThinkingContent(thinking="", signature=""))
            self._delta(event.text)
        elif isinstance(event, ToolCallStart):
            self._has_calls = True
            self._start(ToolUseContent(id=event.call_id, name=event.name, input={}))
        elif isinstance(event, ArgumentsDelta):
            self._delta(event.text)
        else:
            self._close()

    def _start(self, block: Content) -> None:
        self._close()
        self.message.content.append(block)
        self._open = block
        self._parts = []
        index = len(self.message.content) - 1
        kind, name = _DELTAS[type(block)]
        head = f'{{"type":"content_block_delta","index":{index},"delta":{{"type":"{kind}","{name}":'
        self._frame = b"event: content_block_delta\ndata: " + head.encode()
        self._event("content_block_start", index=index, content_block=block)

    def _delta(self, text: str) -> None:
        self._parts.append(text)
        if self._options.emits:
            self._events.append(self._frame + _encode(text) + b"}}\n\n")

    def _close(self) -> None:
        block, text, index = self._open, "".join(self._parts), len(self.message.content) - 1
        if block is None:
            return
        self._open = None
        if isinstance(block, TextContent):
            block.text = text
        elif isinstance(block, ToolUseContent):
            block.input = _arguments(text)
        else:
            block.thinking = text
            block.signature = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            delta = {"type": "signature_delta", "signature": block.signature}
            self._event("content_block_delta", index=index, delta=delta)
        self._event("content_block_stop", index=index)

    def _event(self, kind: str, **fields: Any) -> None:
        if self._options.emits:
            body = _encode({"type": kind, **fields})
            self._events.append(b"event: " + kind.encode() + b"\ndata: " + body + b"\n\n")

    def _take(self) -> bytes:
        data = b"".join(self._events)
        self._events = []
        return data


def _new_tool_use_id() -> str:
    return f"toolu_{uuid.uuid4().hex[:24]}"


def _arguments(text: str) -> dict[str, Any]:
    """What is no JSON object, for example since it was cut off, is told as it is."""
    try:
        value = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"INVALID_JSON": text}
