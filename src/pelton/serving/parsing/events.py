"""What an answer consists of. Every endpoint that speaks of tools or reasoning is made from these events."""

from __future__ import annotations

from typing import NamedTuple


class ContentDelta(NamedTuple):
    text: str


class ReasoningDelta(NamedTuple):
    text: str


class ToolCallStart(NamedTuple):
    """A call begins. `index` counts the calls of an answer from 0; the name is complete."""

    index: int  # type: ignore[assignment]  # hides tuple.index
    call_id: str
    name: str


class ArgumentsDelta(NamedTuple):
    """More of the arguments' JSON text."""

    index: int  # type: ignore[assignment]
    text: str


class ToolCallEnd(NamedTuple):
    index: int  # type: ignore[assignment]


AnswerEvent = ContentDelta | ReasoningDelta | ToolCallStart | ArgumentsDelta | ToolCallEnd
