"""What is enforced is enforced exactly, in whatever words; what is not is refused with its place."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import jsonschema
import pytest

from pelton.core.grammar import Grammar, GrammarKind
from pelton.serving.grammar.check import check_grammar, check_without_vocabulary
from pelton.serving.grammar.rewrite import negated, rewritten
from pelton.weights.tokenizer.grammar import GrammarCompiler, GrammarError, GrammarVocabulary

BYTES = GrammarVocabulary([bytes([i]) for i in range(256)] + [b"<end>", b"<think>"], [256, 257], [256])
VALUES: list[Any] = [
    None, True, False, 0, 1, 5, 7.5, 12, "", "a", "ab", "x1", "abcd", [], [1], ["a"], [1, 2, 3], {},
    {"a": 1}, {"b": 1}, {"a": 1, "b": 1}, {"a": "x", "b": "y", "c": 1}, {"kind": "p", "v": 1}, {"kind": "q", "v": "s"},
    {"kind": "p", "v": "s"}, {"c": 3},
]  # fmt: skip


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(BYTES)


def schema(value: Any) -> Grammar:
    return Grammar(kind=GrammarKind.JSON_SCHEMA, source=json.dumps(value))


def accepts(compiler: GrammarCompiler, grammar: Grammar, text: str) -> bool:
    matcher = compiler.compile(grammar)
    token_ids = list(text.encode())
    return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()


def orders(value: Any) -> list[Any]:
    """An object with its keys in every order: the mask knows one."""
    if not isinstance(value, dict):
        return [value]
    return [dict(items) for items in itertools.permutations(value.items())]


KINDS = {
    "definitions": {
        "p": {
            "type": "object",
            "properties": {"kind": {"enum": ["p"]}, "v": {"type": "integer"}},
            "required": ["kind"],
        },
        "q": {"type": "object", "properties": {"kind": {"const": "q"}, "v": {"type": "string"}}, "required": ["kind"]},
    },
    "oneOf": [{"$ref": "#/definitions/p"}, {"$ref": "#/definitions/q"}],
}


@pytest.mark.parametrize(
    "value",
    [
        {"not": {"type": "object"}},
        {"not": {"type": ["number", "string"]}},
        {"not": {"not": {"type": "array"}}},
        {"not": False},
        {"type": "object", "not": {"required": ["a"]}},
        {"not": {"required": ["a", "b"]}},
        {"not": {"type": "string", "minLength": 2}},
        {"not": {"maximum": 5}},
        {"not": {"anyOf": [{"type": "string"}, {"type": "null"}]}},
        {"oneOf": [{"const": 1}, {"const": 5}]},
        {"oneOf": [{"type": "string"}, {"type": ["number", "null"]}]},
        {"type": "object", "oneOf": [{"required": ["a"]}, {"required": ["b"]}]},
        {"type": "object", "properties": {"a": {}}, "oneOf": [{"required": ["a"]}, {"required": ["b", "c"]}]},
        KINDS,
        {"dependencies": {"a": ["b"]}},
        {"dependentRequired": {"a": ["b"]}, "type": ["object", "string"]},
        {"dependencies": {"c": {"required": ["a"]}}},
        {"if": {"type": "number"}, "then": {"maximum": 5}, "else": {"type": "string"}},
        {"if": {"required": ["a"]}, "then": {"required": ["b"]}, "type": "object"},
        {"type": "string", "format": "country-code"},
        {"then": {"type": "string"}},
    ],
    ids=json.dumps,
)
def test_other_words_say_the_same(compiler: GrammarCompiler, value: Any) -> None:
    grammar = check_grammar(compiler, schema(value))
    validator = jsonschema.Draft202012Validator(value)
    # `dependencies` is a word of draft 7.
    if "dependencies" in value:
        validator = jsonschema.Draft7Validator(value)
    for instance in VALUES:
        accepted = any(accepts(compiler, grammar, json.dumps(order)) for order in orders(instance))
        assert accepted == validator.is_valid(instance), instance


@pytest.mark.parametrize(
    ("value", "place", "problem"),
    [
        (
            {"properties": {"a/b": {"type": "array", "uniqueItems": True}}},
            "#/properties/a~1b/uniqueItems",
            "uniqueItems",
        ),
        ({"items": {"contains": {"type": "null"}}}, "#/items/contains", "contains"),
        ({"properties": {"a": {"format": "json-pointer"}}}, "#/properties/a", "json-pointer"),
        ({"anyOf": [{"type": "string"}, {"type": "string", "pattern": "(?=a)b"}]}, "#/anyOf/1", "look-ahead"),
        ({"properties": {"a": {"not": {"type": "integer"}}}}, "#/properties/a/not", "not"),
        ({"properties": {"a": {"oneOf": [{"minLength": 2}, {"pattern": "x"}]}}}, "#/properties/a", "oneOf"),
        ({"properties": {"a": {"if": {"pattern": "a"}, "then": False}}}, "#/properties/a/if", "if"),
        ({"$ref": "https://example.com/schema"}, "#", "example.com"),
        ({"type": "strin"}, "#", "strin"),
        (False, "", "object"),
        ([], "", "object"),
    ],
)
def test_what_cannot_be_enforced_is_refused_with_its_place(
    compiler: GrammarCompiler, value: Any, place: str, problem: str
) -> None:
    with pytest.raises(GrammarError, match=problem) as error:
        check_grammar(compiler, schema(value))
    assert not place or f"at {place} of the schema" in str(error.value)
    assert error.value.code == "invalid_grammar"


def test_whitespace_ends(compiler: GrammarCompiler) -> None:
    grammar = Grammar(kind=GrammarKind.JSON_OBJECT)
    assert accepts(compiler, grammar, '{"a": [\n    1,\n    2\n  ]\n}')
    assert not accepts(compiler, grammar, "{" + " " * 40 + '"a": 1}')
    assert not accepts(compiler, grammar, '{\n\n"a": 1}')
    # A schema cannot loosen it.
    loose = {"type": "object", "x-guidance": {"whitespace_pattern": "[ ]*", "lenient": True}}
    assert not accepts(compiler, check_grammar(compiler, schema(loose)), "{" + " " * 40 + "}")


@pytest.mark.parametrize(
    ("kind", "source", "good", "bad"),
    [
        (GrammarKind.REGEX, "[a-c]{2}|x+", ["ab", "xxx"], ["a", "abx", ""]),
        (GrammarKind.CHOICE, '["yes", "yes please", "\\"q\\" \\\\ é\\n"]', ["yes", "yes please", '"q" \\ é\n'], ["ye"]),
        (GrammarKind.LARK, 'start: "n=" /[0-9]+/ tail?\ntail: %json {"type": "null"}', ["n=12", "n=1null"], ["n="]),
        (GrammarKind.LARK, 'root ::= "a" b*\nb ::= [0-9]', ["a", "a12"], ["b", "aa"]),
    ],
)
def test_other_kinds(
    compiler: GrammarCompiler, kind: GrammarKind, source: str, good: list[str], bad: list[str]
) -> None:
    for check in (lambda grammar: check_grammar(compiler, grammar), check_without_vocabulary):
        grammar = check(Grammar(kind=kind, source=source))
        assert [text for text in good + bad if accepts(compiler, grammar, text)] == good


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        (GrammarKind.REGEX, "(("),
        (GrammarKind.LARK, "start: missing"),
        (GrammarKind.LARK, "root ::= ("),
        (GrammarKind.JSON_SCHEMA, "{"),
        (GrammarKind.JSON_SCHEMA, '{"items":' * 5000 + "1" + "}" * 5000),
    ],
)
def test_broken_and_explosive_grammars(compiler: GrammarCompiler, kind: GrammarKind, source: str) -> None:
    with pytest.raises((GrammarError, RecursionError)):
        check_grammar(compiler, Grammar(kind=kind, source=source))


@pytest.mark.parametrize(
    ("kind", "source", "good", "bad"),
    [
        (GrammarKind.REGEX, "(a?){30}a{30}", ["a" * 30, "a" * 60], ["a" * 29, "a" * 61]),
        (GrammarKind.REGEX, "(x{1000}){2}", ["x" * 2000], ["x" * 1999, "x" * 2001]),
        (GrammarKind.REGEX, "(a+)+b", ["a" * 500 + "b"], ["a" * 500]),
        (GrammarKind.REGEX, "(a|b)*a(a|b){20}", ["ab" * 10 + "a"], ["b" * 21]),
        (GrammarKind.LARK, 'start: a{100}\na: b{100}\nb: "x"', ["x" * 10000], ["x" * 9999]),
    ],
)
def test_what_would_take_other_engines_for_ever(
    compiler: GrammarCompiler, kind: GrammarKind, source: str, good: list[str], bad: list[str]
) -> None:
    grammar = check_grammar(compiler, Grammar(kind=kind, source=source))
    assert [text for text in good + bad if accepts(compiler, grammar, text)] == good


@pytest.mark.parametrize(
    ("kind", "source", "problem"),
    [
        (GrammarKind.LARK, 'start: s\ns: s s | "a" | "b" |', "[Tt]oo many items|items; max"),
        (GrammarKind.LARK, 'start: (a | c)*\na: "x" a | "x"\nc: c c | "x"', "[Tt]oo many items|items; max"),
        (GrammarKind.REGEX, "((a{1,1000}){1,1000}){1,1000}", "too many expressions"),
    ],
)
def test_what_grows_without_end_meets_a_limit(
    monkeypatch: pytest.MonkeyPatch, kind: GrammarKind, source: str, problem: str
) -> None:
    monkeypatch.setattr("pelton.weights.tokenizer.grammar._STEP_MAX_ITEMS", 1000)  # to be there sooner
    compiler = GrammarCompiler(BYTES)
    matcher = compiler.compile(check_grammar(compiler, Grammar(kind=kind, source=source)))
    letter = ord("x") if "x" in source else ord("a")
    for _ in range(3000):
        matcher.compute_bitmask()
        if matcher.is_error():
            break
        matcher.consume_token(letter)
    assert re.search(problem, matcher.get_error())


@pytest.mark.parametrize(("marker", "token_ids"), [("END", list(b"END")), ("<think>", [257])])
def test_text_is_free_until_the_marker(compiler: GrammarCompiler, marker: str, token_ids: list[int]) -> None:
    matcher = compiler.compile(Grammar(kind=GrammarKind.REGEX, source="[0-9]{3}", starts_after=marker))
    assert matcher.consume_tokens([*b"whatever, EN\n 12", *token_ids])
    assert not matcher.is_accepting()
    assert matcher.try_consume_tokens(list(b"1x")) == 1
    assert matcher.consume_tokens(list(b"23"))
    assert matcher.is_accepting()


def test_what_has_no_exact_opposite_is_left_alone() -> None:
    assert negated({"type": "integer"}) is None
    assert negated({"pattern": "a"}) is None
    assert negated({"minimum": 3, "exclusiveMinimum": True}) is None
    kept = {"not": {"enum": [1]}, "format": "email", "title": "t"}
    assert rewritten(kept) == kept
