"""Events of an answer as chat completions show them."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import UNSET

from pelton.serving.openai.responses import (
    CalledFunction,
    ChatDelta,
    ChatResponseMessage,
    FinishReasonName,
    FunctionDelta,
    ResponseToolCall,
    ToolCallDelta,
)
from pelton.serving.parsing.answer import ParsedAnswer
from pelton.serving.parsing.events import AnswerEvent, ArgumentsDelta, ContentDelta, ReasoningDelta, ToolCallStart


def finish_reason_name(reason: str, num_calls: int, *, is_named: bool) -> FinishReasonName:
    """As OpenAI has it: a call that the client itself had named ends with "stop"."""
    if reason == "length":
        return "length"
    return "tool_calls" if num_calls and not is_named else "stop"


def add_events(delta: ChatDelta, events: Iterable[AnswerEvent]) -> None:
    """What came at once goes into one delta."""
    calls: list[ToolCallDelta] = []
    for event in events:
        if isinstance(event, ContentDelta):
            delta.content = event.text if delta.content is UNSET else f"{delta.content}{event.text}"
        elif isinstance(event, ReasoningDelta):
            text = event.text if delta.reasoning is UNSET else f"{delta.reasoning}{event.text}"
            delta.reasoning = delta.reasoning_content = text
        elif isinstance(event, ToolCallStart):
            function = FunctionDelta(name=event.name, arguments="")
            calls.append(ToolCallDelta(index=event.index, id=event.call_id, type="function", function=function))
        elif isinstance(event, ArgumentsDelta):
            if not calls or calls[-1].index != event.index:
                calls.append(ToolCallDelta(index=event.index, function=FunctionDelta(arguments="")))
            calls[-1].function.arguments += event.text
    if calls:
        delta.tool_calls = calls


def response_message(answer: ParsedAnswer, before: str = "", *, reports_reasoning: bool = False) -> ChatResponseMessage:
    """`before` is text that goes ahead of the content. A model that reasons tells where there was none, too."""
    content = before + (answer.content or "")
    message = ChatResponseMessage(content=content if content or not answer.tool_calls else None)
    if answer.reasoning is not None or reports_reasoning:
        message.reasoning = message.reasoning_content = answer.reasoning
    if answer.tool_calls:
        message.tool_calls = [
            ResponseToolCall(id=call.call_id, function=CalledFunction(name=call.name, arguments=call.arguments))
            for call in answer.tool_calls
        ]
    return message
