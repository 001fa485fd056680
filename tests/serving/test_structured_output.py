"""Parameters of structured output: which grammar they come to, and which are refused."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest

from pelton.core.grammar import Grammar, GrammarKind
from tests.serving.make import RunningServer

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PROMPTS: dict[str, Any] = {CHAT: {"messages": [{"role": "user", "content": "x"}]}, COMPLETIONS: {"prompt": "x"}}
# Keys in an order of their own, a number that no float holds.
SCHEMA = '{"type":"object","properties":{"z":{"const":12345678901234567},"a":{"type":"null"}}}'
AS_SCHEMA = Grammar(kind=GrammarKind.JSON_SCHEMA, source=SCHEMA)
AS_OBJECT = Grammar(kind=GrammarKind.JSON_OBJECT)
AS_REGEX = Grammar(kind=GrammarKind.REGEX, source="a+")
AS_CHOICE = Grammar(kind=GrammarKind.CHOICE, source='["a","b"]')
AS_LARK = Grammar(kind=GrammarKind.LARK, source='start: "a"')


def json_schema(schema: str) -> str:
    return (
        f'{{"response_format":{{"type":"json_schema","json_schema":{{"name":"n","strict":true,"schema":{schema}}}}}}}'
    )


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ('{"response_format":{"type":"text"}}', None),
        ('{"response_format":{"type":"json_object"}}', AS_OBJECT),
        (json_schema(SCHEMA), AS_SCHEMA),
        (json_schema(SCHEMA).replace('"name":"n",', ""), AS_SCHEMA),
        (f'{{"response_format":{{"type":"json_object","schema":{SCHEMA}}}}}', AS_SCHEMA),
        (f'{{"json_schema":{SCHEMA}}}', AS_SCHEMA),
        ('{"grammar":"start: \\"a\\""}', AS_LARK),
        (f'{{"guided_json":{SCHEMA}}}', AS_SCHEMA),
        (json.dumps({"guided_json": SCHEMA}), AS_SCHEMA),
        ('{"guided_regex":"a+","guided_json":null,"guided_decoding_backend":"auto"}', AS_REGEX),
        ('{"guided_choice":["a","b"]}', AS_CHOICE),
        ('{"guided_grammar":"start: \\"a\\""}', AS_LARK),
        (f'{{"structured_outputs":{{"json":{SCHEMA}}}}}', AS_SCHEMA),
        ('{"structured_outputs":{"regex":"a+"},"response_format":{"type":"text"}}', AS_REGEX),
        ('{"structured_outputs":{"choice":["a","b"]}}', AS_CHOICE),
        ('{"structured_outputs":{"grammar":"start: \\"a\\""}}', AS_LARK),
        ('{"structured_outputs":{"json_object":true}}', AS_OBJECT),
    ],
)
def test_the_grammar_reaches_the_worker(
    server: RunningServer, http: httpx2.Client, path: str, fields: str, grammar: Grammar | None
) -> None:
    server.executor.batches.clear()
    body = json.dumps(PROMPTS[path])[:-1] + "," + fields[1:]
    answer = http.post(path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 200, answer.text
    (scheduled, *_) = server.executor.batches[0].requests
    assert scheduled.sampling.grammar == grammar


def format_of(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}}


@pytest.mark.parametrize(
    ("fields", "code", "param", "message"),
    [
        (
            format_of({"properties": {"a": {"uniqueItems": True}}}),
            "invalid_grammar",
            "response_format",
            "#/properties/a/uniqueItems",
        ),
        (format_of(7), "invalid_type", "response_format.json_schema.schema", "object"),
        (format_of("{}"), "invalid_type", "response_format.json_schema.schema", "object"),
        ({"response_format": {"type": "json_schema"}}, "invalid_value", "response_format.json_schema", "needs"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
            "missing_required_parameter",
            "response_format.json_schema.schema",
            "required",
        ),
        (
            {"response_format": {"type": "text", "schema": {}}},
            "invalid_value",
            "response_format.schema",
            "belongs to",
        ),
        (
            {"response_format": {"type": "json_object", "schema": 123}},
            "invalid_type",
            "response_format.schema",
            "object",
        ),
        ({"json_schema": {"type": "hiccup"}}, "invalid_grammar", "json_schema", "hiccup"),
        ({"grammar": "a", "guided_regex": "a"}, "invalid_value", "grammar", "exclude"),
        ({"response_format": {"type": "yaml"}}, "invalid_value", "response_format.type", "yaml"),
        ({"guided_regex": "(("}, "invalid_grammar", "guided_regex", "unclosed"),
        ({"guided_regex": 7}, "invalid_type", "guided_regex", "str"),
        ({"guided_json": "["}, "invalid_type", "guided_json", "object"),
        ({"guided_json": '{"a'}, "invalid_grammar", "guided_json", "JSON"),
        ({"guided_choice": []}, "invalid_value", "guided_choice", "length"),
        ({"guided_grammar": "start: missing"}, "invalid_grammar", "guided_grammar", "missing"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "invalid_value", "guided_choice", "exclude"),
        (format_of({}) | {"structured_outputs": {"regex": "a"}}, "invalid_value", "structured_outputs.regex", "excl"),
        ({"structured_outputs": {}}, "invalid_value", "structured_outputs", "one of"),
        ({"structured_outputs": {"regex": "a", "whitespace_pattern": " "}}, "unsupported_parameter", None, "whites"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "unsupported_parameter", None, "structural_tag"),
        (format_of({"type": "integer", "multipleOf": 999983}), "invalid_grammar", "response_format", "takes more than"),
        ({"guided_regex": "a" * (1 << 20 | 1)}, "invalid_grammar", "guided_regex", "longer"),
    ],
)
def test_what_is_refused(http: httpx2.Client, fields: Any, code: str, param: str | None, message: str) -> None:
    for path in (CHAT, COMPLETIONS):
        answer = http.post(path, json=PROMPTS[path] | fields)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["code"] == code
        assert param is None or error["param"] == param
        assert message in error["message"]


def test_a_deep_schema_costs_its_own_request(http: httpx2.Client) -> None:
    for depth in (200, 20000):
        schema = '{"items":' * depth + "{}" + "}" * depth
        body = json.dumps(PROMPTS[CHAT])[:-1] + "," + json_schema(schema)[1:]
        answer = http.post(CHAT, content=body, headers={"content-type": "application/json"})
        assert answer.status_code in (200, 400), answer.text
    assert http.post(CHAT, json=PROMPTS[CHAT] | {"guided_regex": "a"}).status_code == 200
