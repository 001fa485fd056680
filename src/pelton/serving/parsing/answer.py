"""`AnswerParser`: one sequence's text to events, piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pelton.serving.parsing.events import (
    AnswerEvent,
    ArgumentsDelta,
    ContentDelta,
    ReasoningDelta,
    ToolCallStart,
)
from pelton.serving.parsing.reader import Steps, TextReader
from pelton.serving.parsing.sink import AnswerSink, new_call_id

# Reads an answer to its end, or to the end of its part of it.
ReadAnswer = Callable[[TextReader, AnswerSink], Steps[None]]


def read_content(reader: TextReader, sink: AnswerSink) -> Steps[None]:
    """What no format claims."""
    while (yield from reader.peek()):
        sink.content(reader.text[reader.position :])
        reader.position = len(reader.text)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerPlan:
    """How the answers of a request are to be read: one parser per sequence is made from it.

    `reasoning` reads what comes ahead of the answer; `answer` the rest.
    """

    reasoning: ReadAnswer | None = None
    answer: ReadAnswer = read_content
    make_call_id: Callable[[], str] = new_call_id
    max_calls: int | None = None
    # The one token that ends reasoning, where the vocabulary has it: reasoning tokens are counted up to it.
    reasoning_end_id: int | None = None
    hides_reasoning: bool = False

    def make_parser(self) -> AnswerParser:
        return AnswerParser(self)


class AnswerParser:
    """Feed it deltas with `push`, and end with `finish`. The events do not depend on how the text was cut."""

    def __init__(self, plan: AnswerPlan) -> None:
        self.num_reasoning_tokens = 0
        self._num_waiting = 0  # tokens that have not led to an event yet
        self._plan = plan
        self._reader = TextReader()
        self._sink = AnswerSink(plan.make_call_id, plan.max_calls)
        self._steps = _read(plan, self._reader, self._sink)
        next(self._steps, None)

    @property
    def num_calls(self) -> int:
        return self._sink.num_calls

    def push(self, text: str, token_ids: Sequence[int] = ()) -> list[AnswerEvent]:
        """Events of a delta; `token_ids` are those that it is made of, for the count of reasoning tokens."""
        was_reasoning, num_before = self._sink.is_reasoning, self._sink.num_reasonings
        if text:
            self._reader.push(text)
            next(self._steps, None)
        events = self._take()
        if was_reasoning or self._sink.num_reasonings > num_before:
            self._count(token_ids)
        else:  # perhaps of a marker that begins reasoning
            self._num_waiting = 0 if events else self._num_waiting + len(token_ids)
        return events

    def finish(self) -> list[AnswerEvent]:
        """Events of what was held back."""
        self._reader.is_complete = True
        for _ in self._steps:
            pass
        self._sink.finish()
        return self._take()

    def _take(self) -> list[AnswerEvent]:
        events = self._sink.take()
        if self._plan.hides_reasoning:
            return [event for event in events if not isinstance(event, ReasoningDelta)]
        return events

    def _count(self, token_ids: Sequence[int]) -> None:
        self.num_reasoning_tokens += self._num_waiting
        self._num_waiting = 0
        end_id = self._plan.reasoning_end_id
        if end_id is not None and end_id in token_ids:
            self.num_reasoning_tokens += list(token_ids).index(end_id) + 1
        else:
            self.num_reasoning_tokens += len(token_ids)


def _read(plan: AnswerPlan, reader: TextReader, sink: AnswerSink) -> Steps[None]:
    if plan.reasoning is not None:
        yield from plan.reasoning(reader, sink)
    yield from plan.answer(reader, sink)
    yield from read_content(reader, sink)


@dataclass(slots=True)
class ParsedToolCall:
    call_id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class ParsedAnswer:
    """A whole answer. `content` and `reasoning` are None where there is none."""

    content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ParsedToolCall] = field(default_factory=list)

    def add(self, events: Sequence[AnswerEvent]) -> None:
        for event in events:
            if isinstance(event, ContentDelta):
                self.content = (self.content or "") + event.text
            elif isinstance(event, ReasoningDelta):
                self.reasoning = (self.reasoning or "") + event.text
            elif isinstance(event, ToolCallStart):
                self.tool_calls.append(ParsedToolCall(event.call_id, event.name))
            elif isinstance(event, ArgumentsDelta):
                self.tool_calls[event.index].arguments += event.text


def parse_answer(plan: AnswerPlan, text: str) -> ParsedAnswer:
    parser = plan.make_parser()
    answer = ParsedAnswer()
    answer.add(parser.push(text))
    answer.add(parser.finish())
    return answer
