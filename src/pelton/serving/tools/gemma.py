"""FunctionGemma and Gemma 4: `call:NAME{key:value,...}` between markers, strings between markers of their own.

https://ai.google.dev/gemma/docs/functiongemma/formatting-and-best-practices
"""

from __future__ import annotations

import contextlib
import json
import re
from functools import partial

from pelton.serving.parsing.answer import ReadAnswer
from pelton.serving.parsing.json_text import MAX_DEPTH, MalformedError, pass_value, read_string
from pelton.serving.parsing.reader import Emit, Steps, TextReader
from pelton.serving.parsing.sink import AnswerSink
from pelton.serving.tools.format import CallSyntax, CommonCallIds, SpellMarker, ToolDefinition
from pelton.serving.tools.lark import arguments_json, lark_string

_NAME = re.compile(r"[\w.-]+")
_KEY = re.compile(r"[^:\s{}\[\],\"<]+")
_SCALAR = re.compile(r"[^,}\]{\[\"]+")


class FunctionGemmaFormat(CommonCallIds):
    name = "functiongemma"
    opening, closing, quote = "<start_function_call>", "<end_function_call>", "<escape>"

    @property
    def markers(self) -> tuple[str, ...]:
        return (self.opening, self.closing, self.quote)

    def detect(self, template: str, model_name: str) -> bool:
        return self.opening in template

    def reader(self, tool_names: frozenset[str], *, starts_only: bool = False) -> ReadAnswer:
        return partial(_read, markers=self.markers)

    def syntax(self, spell: SpellMarker) -> CallSyntax:
        """Arguments as plain JSON: strings between markers could not be held to a pattern or a length."""

        def call(tool: ToolDefinition) -> str:
            return f"{lark_string(f'call:{tool.name}')} {arguments_json(tool)} {spell(self.closing)}"

        return CallSyntax(call=call, trigger=self.opening, separator=spell(self.opening))


class Gemma4Format(FunctionGemmaFormat):
    name = "gemma4"
    opening, closing, quote = "<|tool_call>", "<tool_call|>", '<|"|>'


def _read(reader: TextReader, sink: AnswerSink, *, markers: tuple[str, ...]) -> Steps[None]:
    opening, closing, quote = markers
    while (yield from reader.until((opening,), sink.content)):
        reader.mark()
        yield from reader.skip_space()
        is_call = yield from reader.take(("call:",))
        name = yield from reader.scan(_NAME)
        if not is_call or not name or (yield from reader.skip_space()) != "{":
            reader.rewind()
            sink.content(opening)
            continue
        reader.release()
        sink.start_call(name)
        with contextlib.suppress(MalformedError):
            yield from _pass_object(reader, sink.arguments, quote, 0)
        sink.end_call()
        yield from reader.skip_space()
        yield from reader.take((closing,))


def _pass_object(reader: TextReader, emit: Emit, quote: str, depth: int) -> Steps[None]:
    reader.position += 1
    emit("{")
    comma = ""
    while (yield from _passes_separator(reader, "}")):
        key = yield from _read_key(reader, quote)
        if (yield from reader.skip_space()) != ":":
            raise MalformedError
        reader.position += 1
        emit(f"{comma}{json.dumps(key, ensure_ascii=False)}: ")
        yield from _pass_value(reader, emit, quote, depth + 1)
        comma = ", "
    emit("}")


def _pass_array(reader: TextReader, emit: Emit, quote: str, depth: int) -> Steps[None]:
    reader.position += 1
    emit("[")
    comma = ""
    while (yield from _passes_separator(reader, "]")):
        emit(comma)
        yield from _pass_value(reader, emit, quote, depth + 1)
        comma = ", "
    emit("]")


def _passes_separator(reader: TextReader, closing: str) -> Steps[bool]:
    """Pass commas and white space. False, and `closing` passed, where that comes; raises at the end of the text."""
    while (following := (yield from reader.skip_space())) == ",":
        reader.position += 1
    if following == "":
        raise MalformedError
    if following == closing:
        reader.position += 1
    return following != closing


def _read_key(reader: TextReader, quote: str) -> Steps[str]:
    parts: list[str] = []
    if (yield from reader.take((quote,))):
        yield from reader.until((quote,), parts.append)
    elif (yield from reader.peek()) == '"':
        key = yield from read_string(reader)
        if key is None:
            raise MalformedError
        return key
    else:
        parts.append((yield from reader.scan(_KEY)))
    if not "".join(parts):
        raise MalformedError
    return "".join(parts)


def _pass_value(reader: TextReader, emit: Emit, quote: str, depth: int) -> Steps[None]:
    if depth > MAX_DEPTH:
        raise MalformedError
    first = yield from reader.skip_space()
    if (yield from reader.take((quote,))):
        emit('"')
        if not (yield from reader.until((quote,), lambda text: emit(_inside_string(text)))):
            raise MalformedError
        emit('"')
    elif first == "{":
        yield from _pass_object(reader, emit, quote, depth)
    elif first == "[":
        yield from _pass_array(reader, emit, quote, depth)
    elif first == '"':
        if not (yield from pass_value(reader, emit)):
            raise MalformedError
    else:
        scalar = (yield from reader.scan(_SCALAR)).strip()
        if not scalar or not (yield from reader.peek()):
            raise MalformedError
        emit(_scalar_json(scalar))


def _inside_string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _scalar_json(text: str) -> str:
    try:
        json.loads(text)
    except ValueError:
        return json.dumps(text, ensure_ascii=False)
    return text
