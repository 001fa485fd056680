"""Mistral: `[TOOL_CALLS][{"name": ..., "arguments": {...}}]`; since 2025 `[TOOL_CALLS]name[ARGS]{...}` for each call.

https://github.com/mistralai/mistral-common
"""

from __future__ import annotations

import re
import secrets
import string

from pelton.serving.parsing.answer import ReadAnswer
from pelton.serving.parsing.reader import Steps, TextReader
from pelton.serving.parsing.sink import AnswerSink
from pelton.serving.tools.format import CallSyntax, SpellMarker, ToolDefinition
from pelton.serving.tools.json_calls import pass_arguments, read_calls
from pelton.serving.tools.lark import arguments_json, call_json, lark_string

TOOL_CALLS, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_NAME = re.compile(r"[\w.:-]+")
_ID = re.compile(r"\w+")
_ALPHABET = string.ascii_letters + string.digits


class MistralFormat:
    name = "mistral"
    markers: tuple[str, ...] = (TOOL_CALLS, CALL_ID, ARGS)

    def detect(self, template: str, model_name: str) -> bool:
        return TOOL_CALLS in template and ARGS not in template

    def reader(self, tool_names: frozenset[str], *, starts_only: bool = False) -> ReadAnswer:
        return _read

    def syntax(self, spell: SpellMarker) -> CallSyntax:
        bracket, end = lark_string("["), lark_string("]")
        return CallSyntax(call=call_json, trigger=TOOL_CALLS, opening=bracket, separator=lark_string(", "), closing=end)

    def make_call_id(self) -> str:
        """Nine letters or digits: Mistral's templates refuse others."""
        return "".join(secrets.choice(_ALPHABET) for _ in range(9))


class MistralNamedFormat(MistralFormat):
    name = "mistral_v11"

    def detect(self, template: str, model_name: str) -> bool:
        return TOOL_CALLS in template and ARGS in template

    def syntax(self, spell: SpellMarker) -> CallSyntax:
        def call(tool: ToolDefinition) -> str:
            return f"{lark_string(tool.name)} {spell(ARGS)} {arguments_json(tool)}"

        return CallSyntax(call=call, trigger=TOOL_CALLS, separator=spell(TOOL_CALLS))


def _read(reader: TextReader, sink: AnswerSink) -> Steps[None]:
    while (yield from reader.until((TOOL_CALLS,), sink.content)):
        if not (yield from read_calls(reader, sink, None)) and not (yield from _read_named(reader, sink)):
            sink.content(TOOL_CALLS)


def _read_named(reader: TextReader, sink: AnswerSink) -> Steps[bool]:
    reader.mark()
    yield from reader.skip_space()
    name = yield from reader.scan(_NAME)
    if (yield from reader.take((CALL_ID,))):
        yield from reader.scan(_ID)
    yield from reader.take((ARGS,))
    if not name or (yield from reader.skip_space()) != "{":
        reader.rewind()
        return False
    reader.release()
    sink.start_call(name)
    yield from pass_arguments(reader, sink)
    return True
