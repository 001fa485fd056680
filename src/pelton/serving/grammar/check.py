"""What is done to a grammar before admission: made sure that it compiles, or said where it does not.

Runs in a helper process of a server (`worker.py`): a schema is data that a client sent, and may be built to explode.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

from pelton.core.grammar import Grammar, GrammarKind
from pelton.serving.grammar.rewrite import rewritten
from pelton.weights.tokenizer.grammar import GrammarCompiler, GrammarError, GrammarVocabulary

# Looking for the place of a problem compiles one subschema after another, for this long at most.
_SEARCH_LIMIT_S = 0.5
_SUBSCHEMAS = (
    "additionalItems",
    "additionalProperties",
    "contains",
    "else",
    "if",
    "items",
    "not",
    "propertyNames",
    "then",
)
_SUBSCHEMA_LISTS = ("allOf", "anyOf", "items", "oneOf", "prefixItems")
_SUBSCHEMA_MAPS = ("$defs", "definitions", "dependentSchemas", "patternProperties", "properties")
_UNIMPLEMENTED = re.compile(r"Unimplemented keys: (\[.*\])")

Pointer = tuple[str, ...]


@cache
def _byte_compiler() -> GrammarCompiler:
    return GrammarCompiler(GrammarVocabulary([bytes([i]) for i in range(256)] + [b"<end>"], [256], [256]))


def check_without_vocabulary(grammar: Grammar) -> Grammar:
    """As `check_grammar`, for a program that trusts its own grammars. One that may name special tokens is left to
    the worker."""
    if grammar.kind is GrammarKind.LARK:
        return replace(grammar, source=_lark_of_gbnf(grammar.source)) if "::=" in grammar.source else grammar
    return replace(
        check_grammar(_byte_compiler(), replace(grammar, starts_after="")), starts_after=grammar.starts_after
    )


def check_grammar(compiler: GrammarCompiler, grammar: Grammar) -> Grammar:
    """`grammar` as the worker is to have it. Raises `GrammarError`; for a schema it names the path."""
    if grammar.kind is GrammarKind.LARK and "::=" in grammar.source:
        grammar = replace(grammar, source=_lark_of_gbnf(grammar.source))
    try:
        matcher = compiler.compile(grammar)
    except GrammarError:
        if grammar.kind is not GrammarKind.JSON_SCHEMA:
            raise
        original = _parsed(grammar.source)
        schema = rewritten(original)
        grammar = replace(grammar, source=json.dumps(schema))
        try:
            matcher = compiler.compile(grammar)
        except GrammarError as error:
            raise _with_path(compiler, schema, original, str(error)) from None
    matcher.compute_bitmask()
    if matcher.is_error():
        raise GrammarError("the grammar is too complex")
    return grammar


def _lark_of_gbnf(source: str) -> str:
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return str(any_to_lark(source))
    except Exception as error:  # a parser of its own, which fails in its own ways
        raise GrammarError(f"the grammar is neither Lark nor GBNF: {error}") from None


def _parsed(source: str) -> Any:
    try:
        return json.loads(source)
    except ValueError as error:
        raise GrammarError(f"the schema is not JSON: {error}") from None


def _with_path(compiler: GrammarCompiler, schema: Any, original: Any, problem: str) -> GrammarError:
    """`schema` is `original` in other words; the path is that of the latter."""
    match = _UNIMPLEMENTED.search(problem)
    if match is not None:
        keys = set(json.loads(match[1]))
        pointer = next((pointer for pointer, node in walk(schema) if keys <= node.keys()), ())
        pointer, problem = (*pointer, min(keys)), f"{', '.join(sorted(keys))} cannot be enforced"
    else:
        pointer, problem = _find(compiler, schema, problem), _in_our_words(problem)
    path = "".join("/" + _escaped(name) for name in _known_part(original, pointer))
    return GrammarError(f"{problem}, at #{path} of the schema")


def _known_part(node: Any, pointer: Pointer) -> Pointer:
    """As much of `pointer` as leads somewhere."""
    for i, name in enumerate(pointer):
        if isinstance(node, list) and name.isdecimal() and int(name) < len(node):
            node = node[int(name)]
        elif isinstance(node, dict) and name in node:
            node = node[name]
        else:
            return pointer[:i]
    return pointer


def _in_our_words(problem: str) -> str:
    if problem.startswith("oneOf constraints"):
        return "oneOf cannot be enforced where its alternatives may overlap; anyOf can"
    return problem


def walk(node: Any, pointer: Pointer = ()) -> Iterator[tuple[Pointer, dict[str, Any]]]:
    """Every subschema that is an object, outer ones first."""
    if isinstance(node, dict):
        yield pointer, node
        for name, child in children(node):
            yield from walk(child, (*pointer, *name))


def children(node: dict[str, Any]) -> Iterator[tuple[Pointer, Any]]:
    """The direct subschemas, by their path within `node`."""
    for key in _SUBSCHEMAS:
        if isinstance(node.get(key), dict | bool):
            yield (key,), node[key]
    for key in _SUBSCHEMA_LISTS:
        if isinstance(node.get(key), list):
            yield from (((key, str(i)), child) for i, child in enumerate(node[key]))
    for key in _SUBSCHEMA_MAPS:
        if isinstance(node.get(key), dict):
            yield from (((key, name), child) for name, child in node[key].items())


def _find(compiler: GrammarCompiler, schema: Any, problem: str) -> Pointer:
    """The innermost subschema that fails alone as the whole does."""
    until_s = time.monotonic() + _SEARCH_LIMIT_S
    definitions = {key: schema[key] for key in ("$schema", "$defs", "definitions") if key in schema}
    pointer: Pointer = ()
    node, is_inner = schema, True
    while is_inner and isinstance(node, dict):
        is_inner = False
        for name, child in children(node):
            if time.monotonic() > until_s:
                return pointer
            if isinstance(child, dict) and _problem_of(compiler, {**definitions, **child}) == problem:
                pointer, node, is_inner = (*pointer, *name), child, True
                break
    return pointer


def _problem_of(compiler: GrammarCompiler, schema: dict[str, Any]) -> str | None:
    try:
        compiler.compile(Grammar(kind=GrammarKind.JSON_SCHEMA, source=json.dumps(schema)))
    except GrammarError as error:
        return str(error)
    return None


def _escaped(name: str) -> str:
    """Of a JSON pointer (RFC 6901)."""
    return name.replace("~", "~0").replace("/", "~1").encode(errors="backslashreplace").decode()
