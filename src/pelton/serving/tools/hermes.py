"""Hermes, Qwen 2.5 and Qwen 3: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, once per call.

https://github.com/NousResearch/Hermes-Function-Calling
"""

from __future__ import annotations

from pelton.serving.parsing.answer import ReadAnswer
from pelton.serving.parsing.reader import Steps, TextReader
from pelton.serving.parsing.sink import AnswerSink
from pelton.serving.tools.format import CallSyntax, CommonCallIds, SpellMarker, ToolDefinition
from pelton.serving.tools.json_calls import read_calls
from pelton.serving.tools.lark import call_json, lark_string

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class HermesFormat(CommonCallIds):
    name = "hermes"
    markers: tuple[str, ...] = (OPEN, CLOSE)

    def detect(self, template: str, model_name: str) -> bool:
        return OPEN in template

    def reader(self, tool_names: frozenset[str], *, starts_only: bool = False) -> ReadAnswer:
        return read_hermes

    def syntax(self, spell: SpellMarker) -> CallSyntax:
        newline = lark_string("\n")

        def call(tool: ToolDefinition) -> str:
            return f"{newline} {call_json(tool)} {newline} {spell(CLOSE)}"

        return CallSyntax(call=call, trigger=OPEN, separator=f"{newline} {spell(OPEN)}")


def read_hermes(reader: TextReader, sink: AnswerSink) -> Steps[None]:
    while (yield from reader.until((OPEN,), sink.content)):
        yield from read_tagged_calls(reader, sink, OPEN, CLOSE)


def read_tagged_calls(
    reader: TextReader, sink: AnswerSink, opening: str, closing: str, tool_names: frozenset[str] | None = None
) -> Steps[None]:
    """What stands between an opening tag, already passed, and its closing one; no calls are content, tags included."""
    if not (yield from read_calls(reader, sink, tool_names)):
        sink.content(opening)
        return
    yield from reader.skip_space()
    yield from reader.take((closing,))
