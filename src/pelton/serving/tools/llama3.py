"""Llama 3.1 to 3.3: the answer is `{"name": ..., "parameters": {...}}`, perhaps after `<|python_tag|>`.

https://github.com/meta-llama/llama-models/blob/main/models/llama3_1/prompt_format.md
"""

from __future__ import annotations

from functools import partial

from pelton.serving.parsing.answer import ReadAnswer
from pelton.serving.parsing.reader import Steps, TextReader
from pelton.serving.parsing.sink import AnswerSink
from pelton.serving.tools.format import CallSyntax, CommonCallIds, SpellMarker
from pelton.serving.tools.json_calls import read_calls
from pelton.serving.tools.lark import call_json, lark_string

PYTHON_TAG = "<|python_tag|>"


class Llama3Format(CommonCallIds):
    name = "llama3_json"
    markers: tuple[str, ...] = (PYTHON_TAG,)

    def detect(self, template: str, model_name: str) -> bool:
        return "<|start_header_id|>" in template and '"parameters": ' in template

    def reader(self, tool_names: frozenset[str], *, starts_only: bool = False) -> ReadAnswer:
        return partial(_read, tool_names=tool_names)

    def syntax(self, spell: SpellMarker) -> CallSyntax:
        return CallSyntax(call=lambda tool: call_json(tool, "parameters"), separator=lark_string("; "))


def _read(reader: TextReader, sink: AnswerSink, *, tool_names: frozenset[str]) -> Steps[None]:
    yield from read_calls(reader, sink, tool_names)
    while (yield from reader.until((PYTHON_TAG,), sink.content)):
        yield from read_calls(reader, sink, tool_names)
