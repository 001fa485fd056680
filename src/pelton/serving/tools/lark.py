"""Grammars that force calls: what a format writes, with the arguments of every tool held to its schema.

In the Lark dialect of llguidance (https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pelton.serving.tools.format import CallSyntax, SpellMarker, ToolDefinition

# Of one answer that is constrained: a small model does not always find an end.
MAX_PARALLEL_CALLS = 16
_ANY_OBJECT: dict[str, Any] = {"type": "object"}
# As Python's json writes, which is what chat templates show to models.
_SPACING = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}


def lark_string(text: str) -> str:
    return json.dumps(text)


def arguments_json(tool: ToolDefinition) -> str:
    """The arguments as an expression."""
    schema = {**tool.parameters, "x-guidance": _SPACING}
    if "type" not in schema and "$ref" not in schema:
        schema["type"] = "object"
    return f"%json {json.dumps(schema)}"


def call_json(tool: ToolDefinition, arguments_key: str = "arguments") -> str:
    """`{"name": ..., "arguments": ...}` as an expression."""
    head = f'{{"name": {json.dumps(tool.name)}, "{arguments_key}": '
    return f"{lark_string(head)} {arguments_json(tool)} {lark_string('}')}"


def without_schema(tool: ToolDefinition) -> ToolDefinition:
    """The same tool, taking any object."""
    return ToolDefinition(name=tool.name, description=tool.description, parameters=_ANY_OBJECT)


def calls_grammar(
    syntax: CallSyntax, tools: Sequence[ToolDefinition], spell: SpellMarker, *, is_parallel: bool, before: str = ""
) -> str:
    """An answer that is calls of `tools` and nothing else; `before` is an expression for what comes ahead."""
    trigger = spell(syntax.trigger) if syntax.trigger else ""
    return _grammar(f"{before} {syntax.before} {trigger} calls", syntax, tools, is_parallel=is_parallel)


def triggered_grammar(syntax: CallSyntax, tools: Sequence[ToolDefinition], *, is_parallel: bool) -> str:
    """What follows the trigger, which the model wrote of its own accord."""
    return _grammar("calls", syntax, tools, is_parallel=is_parallel)


def optional_calls_grammar(
    syntax: CallSyntax, tools: Sequence[ToolDefinition], *, is_parallel: bool, before: str = ""
) -> str:
    """For a syntax without a trigger: calls, or a text that does not begin like one."""
    return _grammar(rf"{before} (calls | /(?s:[^\[{{<\s].*)?/)", syntax, tools, is_parallel=is_parallel)


def _grammar(start: str, syntax: CallSyntax, tools: Sequence[ToolDefinition], *, is_parallel: bool) -> str:
    more = ""
    if is_parallel and syntax.separator is not None:
        more = f"({syntax.separator} call){{0,{MAX_PARALLEL_CALLS - 1}}}"
    lines = [
        f"start: {start}",
        f"calls: {syntax.opening} call {more} {syntax.closing}",
        "call: " + " | ".join(f"call_{number}" for number in range(len(tools))),
        *(f"call_{number}: {syntax.call(tool)}" for number, tool in enumerate(tools)),
    ]
    return "\n".join(lines) + "\n"
