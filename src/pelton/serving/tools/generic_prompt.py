"""Tools for a chat template that knows none: told in the system prompt, their calls and results as plain messages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pelton.serving.tools.choice import ToolUse

_INTRODUCTION = """You can call these functions, given as JSON:
{tools}

To call functions, answer with nothing but a JSON array of calls, such as
[{{"name": "function_name", "arguments": {{"parameter": "value"}}}}]
The results come back to you. Otherwise, answer in plain text."""


def with_tools_in_text(messages: Sequence[dict[str, Any]], use: ToolUse) -> list[dict[str, Any]]:
    """Messages of the roles system, user and assistant only, with the tools in the first one."""
    found = [_plain(message) for message in messages]
    if not use.may_call:
        return found
    tools = "\n".join(
        json.dumps(
            {"name": tool.name, "description": tool.description or "", "parameters": tool.parameters},
            ensure_ascii=False,
        )
        for tool in use.tools
    )
    introduction = _INTRODUCTION.format(tools=tools)
    if found and found[0]["role"] == "system":
        first = {**found[0], "content": f"{found[0]['content']}\n\n{introduction}"}
        return [first, *found[1:]]
    return [{"role": "system", "content": introduction}, *found]


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"Result of the call: {message['content']}"}
    calls = message.get("tool_calls")
    if not calls:
        return message
    text = json.dumps(
        [{"name": call["function"]["name"], "arguments": call["function"]["arguments"]} for call in calls],
        ensure_ascii=False,
    )
    content = f"{message['content']}\n{text}" if message.get("content") else text
    return {"role": message["role"], "content": content}
