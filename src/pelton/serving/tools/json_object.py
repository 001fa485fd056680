"""Any model: the answer is `{"name": ..., "arguments": {...}}` or an array of those, as the system prompt tells it.

For models whose chat template does not know tools.
"""

from __future__ import annotations

from functools import partial

from pelton.serving.parsing.answer import ReadAnswer
from pelton.serving.parsing.reader import Steps, TextReader
from pelton.serving.parsing.sink import AnswerSink
from pelton.serving.tools.format import CallSyntax, CommonCallIds, SpellMarker
from pelton.serving.tools.hermes import read_tagged_calls
from pelton.serving.tools.json_calls import read_calls
from pelton.serving.tools.lark import call_json, lark_string

_FENCES = {"```json\n": "```", "```\n": "```"}


class JsonFormat(CommonCallIds):
    name = "json"
    markers: tuple[str, ...] = ()

    def detect(self, template: str, model_name: str) -> bool:
        return True

    def reader(self, tool_names: frozenset[str], *, starts_only: bool = False) -> ReadAnswer:
        return partial(_read, tool_names=tool_names, starts_only=starts_only)

    def syntax(self, spell: SpellMarker) -> CallSyntax:
        bracket, end = lark_string("["), lark_string("]")
        return CallSyntax(call=call_json, opening=bracket, separator=lark_string(", "), closing=end)


def _read(reader: TextReader, sink: AnswerSink, *, tool_names: frozenset[str], starts_only: bool) -> Steps[None]:
    yield from read_calls(reader, sink, tool_names)
    if starts_only:
        return
    while (fence := (yield from reader.until(tuple(_FENCES), sink.content))) is not None:
        yield from read_tagged_calls(reader, sink, fence, _FENCES[fence], tool_names=tool_names)
