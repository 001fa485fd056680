"""Nothing is accepted and ignored: what a request says has an effect, or is refused by its place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from pelton.serving.openapi import build_openapi
from pelton.serving.routes import ROUTES
from tests.serving.make import RunningServer

CHAT, RESPONSES, MESSAGES, TOKENIZE = "/v1/chat/completions", "/v1/responses", "/v1/messages", "/tokenize"
HI: Any = [{"role": "user", "content": "hi"}]
FUNCTION: Any = {"name": "f", "parameters": {"type": "object"}}
SCHEMA: Any = {"name": "a", "schema": {"type": "object"}}
RESPONSE_TOOLS: Any = [{"type": "function", **FUNCTION}]
MESSAGE_TOOLS: Any = [{"name": "f", "input_schema": {"type": "object"}}]
CALL: Any = {"type": "tool_use", "id": "t", "name": "f", "input": {}}


def chat(**fields: Any) -> Any:
    return {"messages": HI, "tools": [{"type": "function", "function": FUNCTION}], **fields}


def chat_with(**fields: Any) -> Any:
    return {"messages": [{"role": "user", "content": "hi", **fields}]}


def response(**fields: Any) -> Any:
    return {"input": "hi", "tools": RESPONSE_TOOLS, **fields}


def response_to(*content: Any) -> Any:
    return {"input": [{"role": "user", "content": list(content)}]}


def message(**fields: Any) -> Any:
    return {"messages": HI, "max_tokens": 1, "tools": MESSAGE_TOOLS, **fields}


def said(*blocks: Any, role: str = "user") -> Any:
    return {"messages": [{"role": role, "content": list(blocks)}], "max_tokens": 1}


def answered(**fields: Any) -> Any:
    result = {"type": "tool_result", "tool_use_id": "t", **fields}
    return message(messages=[*HI, *said(CALL, role="assistant")["messages"], *said(result)["messages"]])


def allowed(**fields: Any) -> Any:
    return {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}], **fields}


UNKNOWN, UNSUPPORTED = "unknown_parameter", "unsupported_parameter"
KIND, VALUE = "unsupported_content_type", "invalid_value"
CASES: list[tuple[str, Any, str, str]] = [
    # Choices of tools.
    (
        CHAT,
        chat(tool_choice={"type": "function", "function": {"name": "f", "x": 1}}),
        "tool_choice.function.x",
        UNKNOWN,
    ),
    (CHAT, chat(tool_choice={"type": "function", "function": {"name": "f"}, "x": 1}), "tool_choice.x", UNKNOWN),
    (RESPONSES, response(tool_choice={"type": "function", "name": "f", "x": 1}), "tool_choice.x", UNKNOWN),
    (RESPONSES, response(tool_choice={"type": "function", "name": "f", "mode": "auto"}), "tool_choice.mode", UNKNOWN),
    (RESPONSES, response(tool_choice=allowed(name="f")), "tool_choice.name", UNKNOWN),
    (RESPONSES, response(tool_choice=allowed(tools=RESPONSE_TOOLS)), "tool_choice.tools[0].parameters", UNKNOWN),
    (RESPONSES, response(tool_choice={"x": 1, "type": "mcp"}), "tool_choice.type", UNSUPPORTED),
    (
        RESPONSES,
        response(tool_choice=allowed(tools=[{"server_label": "s", "type": "mcp"}])),
        "tool_choice.tools[0].type",
        UNSUPPORTED,
    ),
    (MESSAGES, message(tool_choice={"type": "tool", "name": "f", "x": 1}), "tool_choice.x", UNKNOWN),
    (MESSAGES, message(tool_choice={"type": "any", "name": "f"}), "tool_choice.name", UNKNOWN),
    (MESSAGES, message(tools=[], tool_choice={"type": "auto", "name": "f"}), "tool_choice.name", UNKNOWN),
    # Tools.
    (
        CHAT,
        {"messages": HI, "tools": [{"type": "function", "function": {**FUNCTION, "x": 1}}]},
        "tools[0].function.x",
        UNKNOWN,
    ),
    (RESPONSES, {"input": "hi", "tools": [{"type": "function", **FUNCTION, "x": 1}]}, "tools[0].x", UNKNOWN),
    (MESSAGES, message(tools=[{**MESSAGE_TOOLS[0], "x": 1}]), "tools[0].x", UNKNOWN),
    (
        MESSAGES,
        message(tools=[{"max_uses": 1, "name": "w", "type": "web_search_20250305"}]),
        "tools[0].type",
        UNSUPPORTED,
    ),
    # Formats of the answer.
    (CHAT, chat(response_format={"type": "text", "json_schema": SCHEMA}), "response_format.json_schema", UNKNOWN),
    (
        CHAT,
        chat(response_format={"type": "json_object", "json_schema": SCHEMA}),
        "response_format.json_schema",
        UNKNOWN,
    ),
    (
        CHAT,
        chat(response_format={"type": "json_schema", "json_schema": {**SCHEMA, "x": 1}}),
        "response_format.json_schema.x",
        UNKNOWN,
    ),
    (RESPONSES, response(text={"format": {"type": "text", **SCHEMA}}), "text.format.schema", UNKNOWN),
    (RESPONSES, response(text={"format": {"type": "json_object", "strict": True}}), "text.format.strict", UNKNOWN),
    (
        MESSAGES,
        message(output_config={"format": {"type": "json_schema", "schema": {}, "name": "a"}}),
        "output_config.format.name",
        UNKNOWN,
    ),
    # Messages, items, blocks and their parts.
    (CHAT, chat_with(tool_calls=[{"function": {"name": "f", "arguments": "{}"}}]), "messages[0].tool_calls", UNKNOWN),
    (CHAT, chat_with(tool_call_id="t"), "messages[0].tool_call_id", UNKNOWN),
    (CHAT, chat_with(reasoning_content="hm"), "messages[0].reasoning_content", UNKNOWN),
    (CHAT, chat_with(content=[{"type": "text", "text": "a", "x": 1}]), "messages[0].content[0].x", UNKNOWN),
    (CHAT, chat_with(role="assistant", reasoning="a", reasoning_content="b"), "messages[0].reasoning", VALUE),
    (RESPONSES, response_to({"type": "input_text", "text": "a", "x": 1}), "input[0].content[0].x", UNKNOWN),
    (
        RESPONSES,
        response_to({"type": "input_text", "text": "a", "refusal": "b"}),
        "input[0].content[0].refusal",
        UNKNOWN,
    ),
    (
        RESPONSES,
        response_to({"type": "input_text", "text": "a", "logprobs": [{}]}),
        "input[0].content[0].logprobs",
        UNKNOWN,
    ),
    (MESSAGES, said({"type": "text", "text": "a", "x": 1}), "messages[0].content[0].x", UNKNOWN),
    (MESSAGES, said({"type": "text", "text": "a", "is_error": True}), "messages[0].content[0].is_error", UNKNOWN),
    (MESSAGES, said({"type": "text", "text": "a", "citations": [{}]}), "messages[0].content[0].citations", UNSUPPORTED),
    (
        MESSAGES,
        said({**CALL, "caller": {"type": "code_execution_20250825", "tool_id": "x"}}, role="assistant"),
        "messages[0].content[0].caller",
        UNSUPPORTED,
    ),
    (MESSAGES, said({"source": {}, "type": "image"}), "messages[0].content[0]", KIND),
    (
        MESSAGES,
        answered(content=[{"type": "text", "text": "a", "x": 1}]),
        "messages[2].content[0].content[0].x",
        UNKNOWN,
    ),
    (MESSAGES, answered(content=[{"source": {}, "type": "image"}]), "messages[2].content[0].content[0]", KIND),
    (MESSAGES, answered(name="f"), "messages[2].content[0].name", UNKNOWN),
    (MESSAGES, message(system=[{"type": "text", "text": "a", "x": 1}]), "system[0].x", UNKNOWN),
    (
        MESSAGES,
        message(system=[{"type": "text", "text": "a", "cache_control": {"type": "ephemeral", "x": 1}}]),
        "system[0].cache_control.x",
        UNKNOWN,
    ),
    (
        MESSAGES,
        message(context_management={"edits": [{"type": "clear_thinking_20251015"}]}),
        "context_management",
        UNSUPPORTED,
    ),
    (CHAT, chat_with(type="message"), "messages[0].type", VALUE),
    (
        CHAT,
        chat_with(content=[{"type": "text", "text": "a", "cache_control": {"type": "ephemeral", "x": 1}}]),
        "messages[0].content[0].cache_control.x",
        UNKNOWN,
    ),
    (
        RESPONSES,
        response_to({"type": "input_text", "text": "a", "parsed": {"a": 1}}),
        "input[0].content[0].parsed",
        UNKNOWN,
    ),
    # Options that another option leaves without a meaning.
    (MESSAGES, message(thinking={"type": "disabled", "budget_tokens": 9}), "thinking.budget_tokens", UNKNOWN),
    (MESSAGES, message(thinking={"type": "adaptive", "budget_tokens": 9}), "thinking.budget_tokens", UNKNOWN),
    (MESSAGES, message(thinking={"type": "disabled", "display": "omitted"}), "thinking.display", UNKNOWN),
    (TOKENIZE, {"prompt": "a", "tools": [{"type": "function", "function": FUNCTION}]}, "tools", VALUE),
    (TOKENIZE, {"prompt": "a", "chat_template_kwargs": {"a": 1}}, "chat_template_kwargs", VALUE),
    (TOKENIZE, {"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt", VALUE),
    ("/v1/rerank", {"query": "a", "documents": [{"text": "b", "x": 1}]}, "documents[0].x", UNKNOWN),
    (
        "/v1/batches",
        {
            "input_file_id": "f",
            "endpoint": CHAT,
            "completion_window": "24h",
            "output_expires_after": {"anchor": "created_at", "seconds": 3600, "x": 1},
        },
        "output_expires_after.x",
        UNKNOWN,
    ),
    # Queries of routes that take none.
    (f"{CHAT}?stream=true", chat(), "stream", UNKNOWN),
    (f"{MESSAGES}?limit=1", message(), "limit", UNKNOWN),
    ("/v1/embeddings?dimensions=1", {"input": "a"}, "dimensions", UNKNOWN),
]


@pytest.mark.parametrize(("path", "body", "place", "code"), CASES, ids=[f"{row[0]} {row[2]}" for row in CASES])
def test_what_would_be_ignored_is_refused_by_its_place(
    http: httpx2.Client, path: str, body: Any, place: str, code: str
) -> None:
    refused = http.post(path, json=body)
    assert refused.status_code == 400, refused.text
    error = refused.json()["error"]
    if path.startswith(MESSAGES):  # whose envelope has no field for it
        assert place in error["message"]
    else:
        assert (error["param"], error["code"]) == (place, code)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (RESPONSES, response(tool_choice=allowed())),
        (RESPONSES, response_to({"type": "output_text", "text": "a", "annotations": [], "logprobs": []})),
        (CHAT, chat_with(tool_calls=[], reasoning_content=None)),
        (CHAT, chat(response_format={"type": "text", "json_schema": None})),
        (MESSAGES, said({"type": "text", "text": "a", "citations": None, "parsed_output": {"a": 1}})),
        (
            MESSAGES,
            message(
                messages=[
                    *HI,
                    *said({**CALL, "caller": {"type": "direct"}}, role="assistant")["messages"],
                    *said({"type": "tool_result", "tool_use_id": "t"})["messages"],
                ]
            ),
        ),
        (f"{MESSAGES}?beta=true", message()),
        (MESSAGES, message(context_management={"edits": [{"keep": "all", "type": "clear_thinking_20251015"}]})),
        (CHAT, chat_with(type="text")),
        (CHAT, chat(logprobs=False, top_logprobs=0)),
        (TOKENIZE, {"prompt": "a", "tools": [], "chat_template_kwargs": {}, "add_generation_prompt": False}),
        (CHAT, chat_with(content=[{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}])),
    ],
)
def test_what_clients_send_back_is_taken(tool_server: RunningServer, path: str, body: Any) -> None:
    answer = httpx2.post(tool_server.url + path, json=body)
    assert answer.status_code == 200, answer.text


def test_every_object_of_a_body_is_closed() -> None:
    """A new field that nobody decodes cannot slip in."""
    document = build_openapi(ROUTES, "test", has_key=False)
    schemas = document["components"]["schemas"]
    names = set()
    for operations in document["paths"].values():
        for operation in operations.values():
            names |= set(_references(operation.get("requestBody", {}), schemas, set()))
    assert {"ChatRequest", "ContentPart", "InputItem", "InputPart", "ResponseTool", "SaidBlock", "AllowedTool"} <= names
    assert len(names) > 50
    # What is decoded one by one is in the document all the same.
    assert schemas["ChatMessage"]["properties"]["content"]["anyOf"][1]["items"] == {
        "$ref": "#/components/schemas/ContentPart"
    }
    objects = {name for name in names if "properties" in schemas[name]}
    assert [name for name in sorted(objects) if schemas[name].get("additionalProperties") is not False] == []


def _references(value: Any, schemas: dict[str, Any], seen: set[str]) -> Iterator[str]:
    if isinstance(value, list):
        for inner in value:
            yield from _references(inner, schemas, seen)
    elif isinstance(value, dict):
        name = str(value.get("$ref", "")).rpartition("/")[2]
        if name and name not in seen:
            seen.add(name)
            yield name
            yield from _references(schemas[name], schemas, seen)
        for inner in value.values():
            yield from _references(inner, schemas, seen)
