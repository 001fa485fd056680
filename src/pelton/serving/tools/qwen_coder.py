"""Qwen2.5-Coder: taught the Hermes format, it mostly writes the bare object, a fenced block, or `<tools>` tags.

Whatever is not between `<tool_call>` tags counts as a call only where it names a tool that was offered.
"""

from __future__ import annotations

from functools import partial

from pelton.serving.parsing.answer import ReadAnswer
from pelton.serving.parsing.reader import Steps, TextReader
from pelton.serving.parsing.sink import AnswerSink
from pelton.serving.tools.format import CallSyntax, SpellMarker
from pelton.serving.tools.hermes import CLOSE, OPEN, HermesFormat, read_hermes, read_tagged_calls
from pelton.serving.tools.json_calls import read_calls
from pelton.serving.tools.lark import call_json, lark_string

# What may open a call, and what then closes it.
_CLOSING = {OPEN: CLOSE, "<tools>": "</tools>", "```json\n": "```", "```\n": "```", "\n": ""}


class QwenCoderFormat(HermesFormat):
    name = "qwen_coder"

    def detect(self, template: str, model_name: str) -> bool:
        return super().detect(template, model_name) and "coder" in model_name.lower()

    def reader(self, tool_names: frozenset[str], *, starts_only: bool = False) -> ReadAnswer:
        return partial(_read, tool_names=tool_names, starts_only=starts_only)

    def syntax(self, spell: SpellMarker) -> CallSyntax:
        """The bare objects that it writes of its own accord, a line each; where calls must come, those of its template.

        After a bare object it always ends; after a `</tool_call>` it goes on where several calls are wanted.
        """
        return CallSyntax(call=call_json, separator=lark_string("\n"), required=super().syntax(spell))


def _read(reader: TextReader, sink: AnswerSink, *, tool_names: frozenset[str], starts_only: bool) -> Steps[None]:
    yield from read_calls(reader, sink, tool_names)
    if starts_only:
        if (yield from reader.take((OPEN,))):
            yield from read_tagged_calls(reader, sink, OPEN, CLOSE)
            yield from read_hermes(reader, sink)
        return
    openings = tuple(_CLOSING)
    while (opening := (yield from reader.until(openings, sink.content))) is not None:
        yield from read_tagged_calls(
            reader, sink, opening, _CLOSING[opening], tool_names=None if opening == OPEN else tool_names
        )
