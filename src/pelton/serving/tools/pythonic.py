"""Llama 4 and others: a list of Python calls, `[get_weather(city="Oslo"), add(a=1, b=2)]`.

https://github.com/meta-llama/llama-models/blob/main/models/llama4/prompt_format.md
"""

from __future__ import annotations

import ast
import json
import re
from functools import partial
from typing import Any

from pelton.serving.parsing.answer import ReadAnswer
from pelton.serving.parsing.json_text import MAX_DEPTH
from pelton.serving.parsing.reader import Steps, TextReader
from pelton.serving.parsing.sink import AnswerSink
from pelton.serving.tools.format import CallSyntax, CommonCallIds, SpellMarker, ToolDefinition
from pelton.serving.tools.json_calls import pass_arguments
from pelton.serving.tools.lark import arguments_json, lark_string

START, END = "<|python_start|>", "<|python_end|>"
_NAME = re.compile(r"[\w.-]+")
_RUN = re.compile(r"[^\"'()\[\]{},\\]+")
_CLOSING = {"(": ")", "[": "]", "{": "}"}
_JSON_NAMES: dict[str, Any] = {"true": True, "false": False, "null": None}


class PythonicFormat(CommonCallIds):
    name = "pythonic"
    markers: tuple[str, ...] = (START, END)

    def detect(self, template: str, model_name: str) -> bool:
        return START in template or "func_name1(params_name1=" in template

    def reader(self, tool_names: frozenset[str], *, starts_only: bool = False) -> ReadAnswer:
        return partial(_read, tool_names=tool_names)

    def syntax(self, spell: SpellMarker) -> CallSyntax:
        """The arguments as `**{...}`, valid Python too: keywords of their own could not be held to every schema."""

        def call(tool: ToolDefinition) -> str:
            return f"{lark_string(tool.name + '(**')} {arguments_json(tool)} {lark_string(')')}"

        return CallSyntax(call=call, opening=lark_string("["), separator=lark_string(", "), closing=lark_string("]"))


def _read(reader: TextReader, sink: AnswerSink, *, tool_names: frozenset[str]) -> Steps[None]:
    yield from _read_list(reader, sink, tool_names)
    while (yield from reader.until((START,), sink.content)):
        yield from _read_list(reader, sink, tool_names)
        yield from reader.take((END,))


def _read_list(reader: TextReader, sink: AnswerSink, tool_names: frozenset[str]) -> Steps[None]:
    """Calls of tools that were offered, in brackets; anything else is left where it stands."""
    reader.mark()
    yield from reader.skip_space()
    if not (yield from reader.take(("[",))) or not (yield from _read_call(reader, sink, tool_names)):
        reader.rewind()
        return
    reader.release()
    while (yield from reader.skip_space()) == ",":
        reader.position += 1
        if not (yield from _read_call(reader, sink, tool_names)):
            return
    yield from reader.take(("]",))
    yield from reader.skip_space()


def _read_call(reader: TextReader, sink: AnswerSink, tool_names: frozenset[str]) -> Steps[bool]:
    reader.mark()
    yield from reader.skip_space()
    name = yield from reader.scan(_NAME)
    if name not in tool_names or (yield from reader.skip_space()) != "(":
        reader.rewind()
        return False
    reader.release()
    reader.position += 1
    sink.start_call(name)
    yield from reader.skip_space()
    if (yield from reader.take(("**",))):
        yield from reader.skip_space()
        yield from pass_arguments(reader, sink)
        yield from reader.skip_space()
        yield from reader.take((")",))
        return True
    yield from _pass_keywords(reader, sink)
    sink.end_call()
    return True


def _pass_keywords(reader: TextReader, sink: AnswerSink) -> Steps[None]:
    """`key=value, ...)` as the members of an object. A value that is no literal becomes its own text."""
    lead = "{"
    while (yield from reader.skip_space()) != ")":
        key = yield from reader.scan(_NAME)
        if not key or (yield from reader.skip_space()) != "=":
            break
        reader.position += 1
        source = yield from _read_expression(reader)
        if source is None:
            break
        sink.arguments(f"{lead}{json.dumps(key)}: {_literal_json(source.strip())}")
        lead = ", "
        if (yield from reader.peek()) == ",":
            reader.position += 1
    if (yield from reader.take((")",))):
        sink.arguments("}" if lead == ", " else "{}")
    elif lead == "{":
        sink.arguments("{")


def _read_expression(reader: TextReader) -> Steps[str | None]:
    """Source up to a comma or bracket that is not its own; None where the text ends before."""
    parts: list[str] = []
    closers: list[str] = []
    while True:
        char = yield from reader.peek()
        if char == "" or len(closers) > MAX_DEPTH:
            return None
        if not closers and char in ",)]}":
            return "".join(parts)
        if char in "\"'":
            parts.append((yield from _read_string(reader, char)))
        elif (run := _RUN.match(reader.text, reader.position)) is not None:
            reader.position = run.end()
            parts.append(run.group())
        else:
            reader.position += 1
            parts.append(char)
            if char in _CLOSING:
                closers.append(_CLOSING[char])
            elif closers and char == closers[-1]:
                closers.pop()


def _read_string(reader: TextReader, quote: str) -> Steps[str]:
    parts = [quote]
    reader.position += 1
    while (char := (yield from reader.peek())) not in ("", quote):
        reader.position += 1
        parts.append(char)
        if char == "\\":
            parts.append((yield from reader.peek()))
            reader.position += len(parts[-1])
    parts.append(char)
    reader.position += len(char)
    return "".join(parts)


def _literal_json(source: str) -> str:
    try:
        json.loads(source)
        return source
    except ValueError:
        pass
    try:
        value = _value_of(ast.parse(source, mode="eval").body)
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return json.dumps(source, ensure_ascii=False)


def _value_of(node: ast.expr) -> Any:
    """A literal's value. Raises `ValueError` for what is none."""
    if isinstance(node, ast.Name) and node.id in _JSON_NAMES:
        return _JSON_NAMES[node.id]
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value_of(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        keys = [_value_of(key) if key is not None else None for key in node.keys]
        if not all(isinstance(key, str) for key in keys):
            raise ValueError("not an object of JSON")
        return {key: _value_of(value) for key, value in zip(keys, node.values, strict=True)}
    return ast.literal_eval(node)
