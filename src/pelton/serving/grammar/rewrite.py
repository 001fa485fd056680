"""Schemas in other words: what llguidance refuses, said with what it enforces. Every step keeps the language.

The oracle is the `jsonschema` package: `format` names outside of the specification say nothing to it, nor here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_TYPES = ("null", "boolean", "object", "array", "number", "string")
# Of all drafts (https://json-schema.org/draft/2020-12/json-schema-validation#section-7.3).
_FORMATS = (
    "date-time date time duration email idn-email hostname idn-hostname ipv4 ipv6 uri uri-reference iri iri-reference "
    "uuid uri-template json-pointer relative-json-pointer regex"
)
_ANNOTATIONS = "$comment $id $schema default deprecated description examples id readOnly title writeOnly"
# Keyword -> (type it speaks of, its opposite, what is added to the number).
_OPPOSITES = {
    "minLength": ("string", "maxLength", -1),
    "maxLength": ("string", "minLength", 1),
    "minItems": ("array", "maxItems", -1),
    "maxItems": ("array", "minItems", 1),
    "minProperties": ("object", "maxProperties", -1),
    "maxProperties": ("object", "minProperties", 1),
    "minimum": ("number", "exclusiveMaximum", 0),
    "maximum": ("number", "exclusiveMinimum", 0),
    "exclusiveMinimum": ("number", "maximum", 0),
    "exclusiveMaximum": ("number", "minimum", 0),
}
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_MAPS = ("$defs", "definitions", "dependentSchemas", "patternProperties", "properties")
_SINGLE = ("additionalItems", "additionalProperties", "contains", "else", "if", "items", "not", "then")
_MAX_REFERENCES = 8
# Alternatives of one `oneOf` that are set against each other.
_MAX_ALTERNATIVES = 32

Schema = Any  # a dict, or a boolean


def rewritten(schema: Schema) -> Schema:
    """`schema` with `not`, `oneOf`, `if`, dependencies and free `format` names replaced where that is exact."""
    return _Rewriter(schema).rewrite(schema)


class _Rewriter:
    def __init__(self, root: Schema) -> None:
        self._root = root

    def rewrite(self, node: Schema) -> Schema:
        if not isinstance(node, dict):
            return node
        node = self._with_children(node)
        if isinstance(node.get("format"), str) and node["format"] not in _FORMATS.split():
            del node["format"]
        more: list[Schema] = []
        self._replace_condition(node, more)
        for key in ("not", "oneOf", "dependencies", "dependentRequired", "dependentSchemas"):
            if key in node:
                found = self._in_other_words(key, node)
                if found is not None:
                    del node[key]
                    more.append(found)
        if more:
            node["allOf"] = [*node.get("allOf", ()), *more]
        return node

    def _in_other_words(self, key: str, node: dict[str, Any]) -> Schema | None:
        if key == "not":
            return negated(node[key])
        if key == "oneOf":
            return self._one_of(node[key], node)
        return _dependent(node[key])

    def _with_children(self, node: dict[str, Any]) -> dict[str, Any]:
        copy = dict(node)
        for key in _SINGLE:
            if isinstance(copy.get(key), dict):
                copy[key] = self.rewrite(copy[key])
        for key in (*_LISTS, "items"):
            if isinstance(copy.get(key), list):
                copy[key] = [self.rewrite(child) for child in copy[key]]
        for key in (*_MAPS, "dependencies"):
            if isinstance(copy.get(key), dict):
                copy[key] = {name: self.rewrite(child) for name, child in copy[key].items()}
        return copy

    def _replace_condition(self, node: dict[str, Any], more: list[Schema]) -> None:
        if "if" not in node:
            node.pop("then", None)
            node.pop("else", None)
        elif "then" not in node and "else" not in node:
            del node["if"]
        elif (opposite := negated(node["if"])) is not None:
            condition = node.pop("if")
            then, otherwise = node.pop("then", True), node.pop("else", True)
            more.append({"anyOf": [{"allOf": [condition, then]}, {"allOf": [opposite, otherwise]}]})

    # -- exactly one of ---------------------------------------------------------------------------

    def _one_of(self, branches: Any, parent: dict[str, Any]) -> Schema | None:
        if not isinstance(branches, list) or not 0 < len(branches) <= _MAX_ALTERNATIVES:
            return None
        allowed = _types_of(parent)
        clashes = [
            [j for j, other in enumerate(branches) if j != i and not self._are_disjoint(branch, other, allowed, 0)]
            for i, branch in enumerate(branches)
        ]
        alternatives = []
        for branch, others in zip(branches, clashes, strict=True):
            opposites = [negated(branches[j]) for j in others]
            if None in opposites:
                return None
            alternatives.append({"allOf": [branch, *opposites]} if opposites else branch)
        return {"anyOf": alternatives}

    def _are_disjoint(self, a: Schema, b: Schema, allowed: frozenset[str], depth: int) -> bool:
        """Whether no value of an `allowed` type satisfies both; False where that is not plain to see."""
        a, b = self._resolved(a), self._resolved(b)
        if a is False or b is False:
            return True
        if not isinstance(a, dict) or not isinstance(b, dict) or depth > _MAX_REFERENCES:
            return False
        common = _types_of(a) & _types_of(b) & allowed
        if not common:
            return True
        values_a, values_b = _values_of(a), _values_of(b)
        if values_a is not None and values_b is not None and not any(value in values_b for value in values_a):
            return True
        if common != {"object"}:
            return False
        required_a, required_b = _required(a), _required(b)
        if any(_excludes(b, name) for name in required_a) or any(_excludes(a, name) for name in required_b):
            return True
        return any(
            self._are_disjoint(_property(a, name), _property(b, name), frozenset(_TYPES), depth + 1)
            for name in required_a
            if name in required_b
        )

    def _resolved(self, node: Schema) -> Schema:
        """What a reference within the document leads to; all that satisfies the node satisfies that."""
        for _ in range(_MAX_REFERENCES):
            if not isinstance(node, dict) or not isinstance(node.get("$ref"), str):
                return node
            if not node["$ref"].startswith("#"):
                return True
            target = self._root
            for part in node["$ref"][1:].split("/")[1:]:
                name = part.replace("~1", "/").replace("~0", "~")
                if not isinstance(target, dict) or name not in target:
                    return True
                target = target[name]
            node = target
        return True


def negated(node: Schema) -> Schema | None:
    """What everything satisfies that `node` does not; None where it cannot be said exactly."""
    if isinstance(node, bool):
        return not node
    if not isinstance(node, dict):
        return None
    alternatives = []
    for key, value in node.items():
        if key in _ANNOTATIONS.split() or _says_nothing(key, value):
            continue
        opposite = _negated_keyword(key, value, node)
        if opposite is None:
            return None
        alternatives.append(opposite)
    if not alternatives:
        return False
    return alternatives[0] if len(alternatives) == 1 else {"anyOf": alternatives}


def _negated_keyword(key: str, value: Any, node: dict[str, Any]) -> Schema | None:
    if key == "not":
        return value
    if key == "type":
        return _other_types(value)
    if key == "required" and isinstance(value, list):
        return {"type": "object", "anyOf": [{"properties": {name: False}} for name in value]} if value else False
    if key in ("allOf", "anyOf") and isinstance(value, list):
        opposites = [negated(branch) for branch in value]
        return None if None in opposites else {"anyOf" if key == "allOf" else "allOf": opposites}
    if key == "oneOf" and isinstance(value, list) and len(value) == 1:
        return negated(value[0])
    if key in _OPPOSITES and isinstance(value, int | float) and not isinstance(value, bool):
        kind, opposite, change = _OPPOSITES[key]
        if any(isinstance(node.get(bound), bool) for bound in ("exclusiveMinimum", "exclusiveMaximum")):
            return None  # draft 4: a flag of the other keyword
        return {"type": kind, opposite: value + change} if value + change >= 0 or change == 0 else False
    return None


def _says_nothing(key: str, value: Any) -> bool:
    if key in ("additionalProperties", "items", "propertyNames", "additionalItems"):
        return value is True or value == {}
    if key in ("properties", "patternProperties") and isinstance(value, dict):
        return all(child is True or child == {} for child in value.values())
    return key in ("definitions", "$defs")


def _other_types(value: Any) -> Schema | None:
    kinds = _names(value)
    if "integer" in kinds and "number" not in kinds:
        return None
    others = [kind for kind in _TYPES if kind not in kinds]
    return {"type": others} if others else False


def _dependent(rules: Any) -> Schema | None:
    """`dependencies` and its heirs: without the property, or with what it asks for."""
    if not isinstance(rules, dict):
        return None
    found = []
    for name, rule in rules.items():
        wanted = {"required": rule} if isinstance(rule, list) else rule
        found.append({"anyOf": [{"properties": {name: False}}, wanted]})
    return {"allOf": found}


def _names(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [name for name in value or () if isinstance(name, str)]


def _types_of(node: dict[str, Any]) -> frozenset[str]:
    if "type" not in node:
        return frozenset(_TYPES)
    return frozenset("number" if name == "integer" else name for name in _names(node["type"]))


def _values_of(node: dict[str, Any]) -> list[Any] | None:
    if "const" in node:
        return [node["const"]]
    return node["enum"] if isinstance(node.get("enum"), list) else None


def _required(node: dict[str, Any]) -> Iterable[str]:
    return _names(node.get("required"))


def _property(node: dict[str, Any], name: str) -> Schema:
    properties = node.get("properties")
    return properties.get(name, True) if isinstance(properties, dict) else True


def _excludes(node: dict[str, Any], name: str) -> bool:
    """Whether an object that satisfies `node` cannot have the property."""
    if _property(node, name) is False:
        return True
    is_listed = name in node.get("properties", {})
    return node.get("additionalProperties") is False and not is_listed and not node.get("patternProperties")
