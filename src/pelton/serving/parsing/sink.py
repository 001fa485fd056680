"""`AnswerSink`: where formats put what they have read; it keeps the events in order and the white space tidy."""

from __future__ import annotations

import uuid
from collections.abc import Callable

from pelton.serving.parsing.events import (
    AnswerEvent,
    ArgumentsDelta,
    ContentDelta,
    ReasoningDelta,
    ToolCallEnd,
    ToolCallStart,
)


def new_call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


class AnswerSink:
    """White space at the end of content is held back: around calls it belongs to the markup.

    After `max_calls` calls, further ones are dropped.
    """

    def __init__(self, make_call_id: Callable[[], str] = new_call_id, max_calls: int | None = None) -> None:
        self.num_calls = 0
        self.is_reasoning = False
        self.num_reasonings = 0  # times that it has begun
        self._make_call_id = make_call_id
        self._max_calls = max_calls
        self._events: list[AnswerEvent] = []
        self._space = ""  # of the content, or of the reasoning while that goes on
        self._trims_start = False
        self._has_content = False
        self._is_dropping = False

    def take(self) -> list[AnswerEvent]:
        """What has come since the last time."""
        events, self._events = self._events, []
        return events

    def content(self, text: str) -> None:
        if self._trims_start:
            text = text.lstrip()
            if not text:
                return
            self._trims_start = False
        text = self._hold_space(text)
        if text:
            self._has_content = True
            self._add(ContentDelta(text))

    def start_reasoning(self) -> None:
        self._flush_space()
        self.is_reasoning = True
        self.num_reasonings += 1
        self._trims_start = True

    def reasoning(self, text: str) -> None:
        if self._trims_start:
            text = text.lstrip()
            if not text:
                return
            self._trims_start = False
        text = self._hold_space(text)
        if text:
            self._add(ReasoningDelta(text))

    def end_reasoning(self) -> None:
        self.is_reasoning = False
        self._space = ""
        self._trims_start = True

    def start_call(self, name: str) -> None:
        if not self._has_content:
            self._space = ""
        self._trims_start = True
        self._is_dropping = self._max_calls is not None and self.num_calls >= self._max_calls
        if not self._is_dropping:
            self._events.append(ToolCallStart(self.num_calls, self._make_call_id(), name))
            self.num_calls += 1

    def arguments(self, text: str) -> None:
        if text and not self._is_dropping:
            self._add(ArgumentsDelta(self.num_calls - 1, text))

    def end_call(self) -> None:
        if not self._is_dropping:
            self._events.append(ToolCallEnd(self.num_calls - 1))

    def finish(self) -> None:
        """The text has ended."""
        if not self.num_calls and not self.is_reasoning:
            self._flush_space()

    def _hold_space(self, text: str) -> str:
        """What of `text` can go out."""
        body = text.rstrip()
        if not body:
            self._space += text
            return ""
        out, self._space = self._space + body, text[len(body) :]
        return out

    def _flush_space(self) -> None:
        if self._space:
            self._add(ContentDelta(self._space))
            self._space = ""

    def _add(self, event: ContentDelta | ReasoningDelta | ArgumentsDelta) -> None:
        last = self._events[-1] if self._events else None
        if isinstance(event, ArgumentsDelta):
            if isinstance(last, ArgumentsDelta):
                self._events[-1] = ArgumentsDelta(event.index, last.text + event.text)
                return
        elif type(last) is type(event):
            assert isinstance(last, (ContentDelta, ReasoningDelta))
            self._events[-1] = type(event)(last.text + event.text)
            return
        self._events.append(event)
