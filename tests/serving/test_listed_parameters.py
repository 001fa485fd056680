"""Calls that are enforced name listed parameters alone, and stay valid by the schema as it was sent."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from pelton.serving.tools.listed_parameters import with_listed_only

TEXT: dict[str, Any] = {"type": "string"}
SONG = {"type": "object", "properties": {"title": TEXT}, "required": ["title"]}
A = {"title": "a"}
MORE = {"title": "a", "title2": "b"}


@pytest.mark.parametrize(
    ("schema", "kept", "left_out"),
    [
        (SONG, A, MORE),
        ({"properties": {"song": SONG}}, {"song": A}, {"song": MORE}),
        ({"properties": {"songs": {"type": "array", "items": SONG}}}, {"songs": [A, A]}, {"songs": [A, MORE]}),
        ({"properties": {"song": {"anyOf": [SONG, {"type": "null"}]}}}, {"song": None}, {"song": MORE}),
        ({"properties": {"song": {"$ref": "#/$defs/s"}}, "$defs": {"s": SONG}}, {"song": A}, {"song": MORE}),
        (
            {"properties": {"by_year": {"additionalProperties": SONG}}},
            {"by_year": {"1999": A}},
            {"by_year": {"1": MORE}},
        ),
        ({"type": "object", "properties": {}}, {}, {"x": 1}),
        # A parameter may have any name.
        ({"properties": {"not": TEXT, "oneOf": TEXT}}, {"not": "x"}, {"if": "x"}),
    ],
    ids=json.dumps,
)
def test_only_what_is_listed(schema: dict[str, Any], kept: Any, left_out: Any) -> None:
    before = json.dumps(schema)
    found = jsonschema.Draft202012Validator(with_listed_only(schema))
    assert found.is_valid(kept)
    assert not found.is_valid(left_out)
    assert jsonschema.Draft202012Validator(schema).is_valid(left_out)
    assert json.dumps(schema) == before


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        {"properties": {"x": {"type": "object", "properties": {}}}, "additionalProperties": False},
        {**SONG, "additionalProperties": True},
        {**SONG, "additionalProperties": {"type": "integer"}},
        {**SONG, "patternProperties": {"^x": TEXT}},
        {**SONG, "minProperties": 3},
        {"properties": {"title": TEXT}, "required": ["artist"]},
        # Each branch would forbid what the other one lists, or an alternative become the only one.
        {"allOf": [SONG, {"properties": {"artist": TEXT}, "required": ["artist"]}]},
        {**SONG, "anyOf": [{"properties": {"artist": TEXT}}, {"properties": {"year": TEXT}}]},
        {**SONG, "$ref": "#/$defs/s", "$defs": {"s": {"properties": {"artist": TEXT}}}},
        {"oneOf": [SONG, {"properties": {"title": TEXT, "artist": TEXT}}]},
        {**SONG, "if": {"required": ["artist"]}, "then": {"properties": {"artist": TEXT}}},
        {"properties": {"x": {"not": {"properties": {"title": TEXT}, "required": ["title"]}}}},
    ],
    ids=json.dumps,
)
def test_what_says_more_of_an_object_stays(schema: dict[str, Any]) -> None:
    assert with_listed_only(schema) == schema
