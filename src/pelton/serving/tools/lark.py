"""Grammars that force calls: what a format writes, with the arguments of every tool held to its schema.

In the Lark dialect of llguidance (https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from pelton.core.grammar import Grammar, GrammarKind
from pelton.serving.tools.format import CallSyntax, SpellMarker, ToolDefinition
from pelton.serving.tools.listed_parameters import with_listed_only

# Of one answer that is constrained: a small model does not always find an end.
MAX_PARALLEL_CALLS = 16
_ANY_OBJECT: dict[str, Any] = {"type": "object"}
# As Python's json writes, which is what chat templates show to models.
_SPACING = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}


def lark_string(text: str) -> str:
    return _json(text)


def _json(value: Any) -> str:
    # What holds "::=" passes for GBNF.
    return json.dumps(value).replace("::=", "::\\u003d")


def arguments_json(tool: ToolDefinition) -> str:
    """The arguments as an expression."""
    schema = {**with_listed_only(tool.parameters), "x-guidance": _SPACING}
    if "type" not in schema and "$ref" not in schema:
        schema["type"] = "object"
    return f"%json {_json(schema)}"


def call_json(tool: ToolDefinition, arguments_key: str = "arguments") -> str:
    """`{"name": ..., "arguments": ...}` as an expression."""
    head = f'{{"name": {json.dumps(tool.name)}, "{arguments_key}": '
    return f"{lark_string(head)} {arguments_json(tool)} {lark_string('}')}"


def without_schema(tool: ToolDefinition) -> ToolDefinition:
    """The same tool, taking any object."""
    return ToolDefinition(name=tool.name, description=tool.description, parameters=_ANY_OBJECT)


def thought_rule(opening: str, closing: str, spell: SpellMarker, *, is_open: bool) -> str:
    """Reasoning ahead of what a grammar is about: the model has begun it, or may begin it or not."""
    end = spell(closing)
    if end.startswith("<["):
        rules = f"thought_text: /(?s:.*)/ {end}"
    else:
        rules = f"thought_text[suffix={end}]: /(?s:.*)/"
    space = r"/\n{0,2}/"
    thought = f"thought_text {space}" if is_open else f"({spell(opening)} thought_text {space})?"
    return f"thought: {thought}\n{rules}"


def calls_grammar(
    syntax: CallSyntax, tools: Sequence[ToolDefinition], spell: SpellMarker, *, is_parallel: bool, thought: str = ""
) -> str:
    """An answer that is calls of `tools` and nothing else, after a `thought_rule`."""
    start = f"{'thought' if thought else ''} {syntax.before} {_trigger(syntax, spell)} calls"
    return _grammar(start, syntax, tools, is_parallel=is_parallel, rules=thought)


def answer_text(grammar: Grammar) -> str | None:
    """An answer that follows `grammar`, as an expression; None for kinds that cannot stand within another one."""
    if grammar.kind is GrammarKind.CHOICE:
        return f"({' | '.join(map(_json, json.loads(grammar.source)))})"
    if grammar.kind is GrammarKind.JSON_OBJECT:
        return f"%json {_json({**_ANY_OBJECT, 'x-guidance': _SPACING})}"
    if grammar.kind is GrammarKind.JSON_SCHEMA:
        schema = json.loads(grammar.source)
        return f"%json {_json({**(schema if isinstance(schema, dict) else {}), 'x-guidance': _SPACING})}"
    return None


def text_grammar(text: str, thought: str) -> str:
    """An answer that is what the expression `text` says, after a `thought_rule`."""
    return f"start: {'thought' if thought else ''} answer\nanswer: {text}\n{thought}\n"


def free_grammar(
    syntax: CallSyntax, tools: Sequence[ToolDefinition], spell: SpellMarker, *, is_parallel: bool, thought: str = ""
) -> str:
    """An answer that may be text, or begin with text, but whose calls are calls of `tools`."""
    trigger = _trigger(syntax, spell)
    rules = [thought] if thought else []
    if syntax.free:
        answer = f"{syntax.free} | {trigger} calls"
    elif not trigger:
        answer = rf"calls | {_FREE_START}"
    elif trigger.startswith("<["):
        answer = f"/(?s:.*)/ ({trigger} calls)?"
    else:
        answer = "FREE_TEXT | lead calls"
        rules.append(f"lead[suffix={trigger}]: /(?s:.*)/")
        rules.append(f"FREE_TEXT: /(?s:.*)/ & ~/(?s:.*){_regex_text(syntax.trigger)}(?s:.*)/")
    start = f"{'thought' if thought else ''} {syntax.before} ({answer})"
    return _grammar(start, syntax, tools, is_parallel=is_parallel, rules="\n".join(rules))


# Text that does not begin as calls do that have no trigger.
_FREE_START = r"/(?s:[^\[{<`\s].*)?/"


def _trigger(syntax: CallSyntax, spell: SpellMarker) -> str:
    return spell(syntax.trigger) if syntax.trigger else ""


def _regex_text(text: str) -> str:
    return re.sub(r"([\[\]|(){}.*+?^$/\\])", r"\\\1", text)


def _grammar(start: str, syntax: CallSyntax, tools: Sequence[ToolDefinition], *, is_parallel: bool, rules: str) -> str:
    more = ""
    if is_parallel and syntax.separator is not None:
        more = f"({syntax.separator} call){{0,{MAX_PARALLEL_CALLS - 1}}}"
    lines = [
        f"start: {start}",
        f"calls: {syntax.opening} call {more} {syntax.closing}",
        "call: " + " | ".join(f"call_{number}" for number in range(len(tools))),
        *(f"call_{number}: {syntax.call(tool)}" for number, tool in enumerate(tools)),
        rules,
    ]
    return "\n".join(lines) + "\n"
