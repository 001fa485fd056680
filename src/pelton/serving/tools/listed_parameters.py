"""A function takes the parameters that its schema lists: calls that are enforced name no others.

JSON schema lets an object have any further properties unless it says otherwise, and models make use of that: asked for
two songs, one writes `"duration": 20, "duration2": 15`, with which no function can be called.
"""

from __future__ import annotations

from typing import Any

from pelton.serving.grammar.check import walk

# With these an object is described in several places, none of which can say that nothing else comes.
_COMBINING = frozenset(
    ("allOf", "dependencies", "dependentSchemas", "else", "if", "not", "oneOf", "then", "unevaluatedProperties")
)
_BESIDE_PROPERTIES = frozenset(("$ref", "anyOf"))
# What says itself which other properties there are.
_SAYS = frozenset(("additionalProperties", "minProperties", "patternProperties", "propertyNames"))
_SINGLE = ("additionalProperties", "items")
_LISTS = ("anyOf", "items", "prefixItems")
_MAPS = ("$defs", "definitions", "patternProperties", "properties")


def with_listed_only(parameters: dict[str, Any]) -> dict[str, Any]:
    """`parameters`, but objects have no properties that are not listed; whatever satisfies the result satisfies them.

    An object that says anything of further properties stays as it is, and so does a schema that combines several
    descriptions of one object.
    """
    if any(_combines(node) for _, node in walk(parameters)):
        return parameters
    found: dict[str, Any] = _closed(parameters)
    if parameters.get("properties") == {} and not parameters.keys() & _SAYS and not parameters.get("required"):
        found["additionalProperties"] = False  # a function without parameters
    return found


def _combines(node: dict[str, Any]) -> bool:
    return bool(node.keys() & _COMBINING) or ("properties" in node and bool(node.keys() & _BESIDE_PROPERTIES))


def _closed(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    found = dict(node)
    for key in _SINGLE:
        if isinstance(node.get(key), dict):
            found[key] = _closed(node[key])
    for key in _LISTS:
        if isinstance(node.get(key), list):
            found[key] = [_closed(child) for child in node[key]]
    for key in _MAPS:
        if isinstance(node.get(key), dict):
            found[key] = {name: _closed(child) for name, child in node[key].items()}
    listed = node.get("properties")
    if (
        isinstance(listed, dict)
        and listed
        and not node.keys() & _SAYS
        and _names(node.get("required")) <= listed.keys()
    ):
        found["additionalProperties"] = False
    return found


def _names(required: Any) -> set[str]:
    return {name for name in required if isinstance(name, str)} if isinstance(required, list) else set()
