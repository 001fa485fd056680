"""`GrammarCompiler`: a `Grammar` to a matcher of llguidance over a model's vocabulary.

llguidance (https://github.com/guidance-ai/llguidance) refuses what it cannot enforce, and is linear in the number of
tokens: an Earley parser over derivatives of regular expressions. It is imported here and nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pelton.core.errors import InvalidRequestError
from pelton.core.grammar import Grammar, GrammarKind
from pelton.core.protocols import TokenDecoder

if TYPE_CHECKING:
    from llguidance import LLMatcher

# Between two tokens of JSON: one line break and an indentation. Whatever a model prefers, it cannot go on for ever.
JSON_WHITESPACE = r"\n?[ ]{0,20}"
# For the `x-guidance` key of a schema that stands in a Lark grammar (`%json {...}`).
JSON_OPTIONS = {"whitespace_pattern": JSON_WHITESPACE}
# Per grammar and per mask: a mask takes 10 to 100 us, and a row that is out of fuel fails after 10 ms. Items cost more
# the more there are: an ambiguous grammar took seconds for a mask at twice as many, and real schemas need half of them.
_MAX_LEXER_STATES, _STEP_LEXER_FUEL, _STEP_MAX_ITEMS = 50_000, 100_000, 12_000
# Text that a grammar leaves no choice about may be spelled in any tokens: those the model prefers, found without
# a tokenizer.
_NO_FORCING = '%llguidance {"no_forcing": true}\n'


class GrammarError(InvalidRequestError):
    """No matcher can be made of a grammar; the message is for whoever wrote it."""

    code = "invalid_grammar"


@dataclass(frozen=True, slots=True)
class GrammarVocabulary:
    """`tokens[i]` is what token i adds to the text; `special_ids` are matched by name alone."""

    tokens: list[bytes]
    special_ids: list[int]
    eos_token_ids: list[int]

    @classmethod
    def of(cls, decoder: TokenDecoder, vocab_size: int) -> GrammarVocabulary:
        """Slow: goes over the whole vocabulary."""
        tokens = [decoder.token_bytes(token_id) for token_id in range(vocab_size)]
        special_ids = [token_id for token_id in range(vocab_size) if decoder.is_special(token_id)]
        for token_id in special_ids:
            # One without a name would be allowed everywhere.
            tokens[token_id] = tokens[token_id] or f"<special-{token_id}>".encode()
        return cls(tokens, special_ids, sorted(decoder.eos_token_ids))


class _WrappedVocabulary:
    """The attributes that llguidance reads. It never tokenizes: nothing is forced."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: GrammarVocabulary) -> None:
        self.tokens = vocabulary.tokens
        self.special_token_ids = vocabulary.special_ids
        self.eos_token_id = vocabulary.eos_token_ids[0]

    def __call__(self, text: bytes | str) -> list[int]:
        raise NotImplementedError


class GrammarCompiler:
    """Thread-safe. Making one takes most of a second and 100 MB for a vocabulary of 150,000 tokens."""

    def __init__(self, vocabulary: GrammarVocabulary) -> None:
        """Raises `GrammarError` for a vocabulary in which nothing can end a text."""
        from llguidance import LLParserLimits, LLTokenizer

        if not vocabulary.eos_token_ids:
            raise GrammarError("the model has no end-of-sequence token, so nothing could end a constrained answer")
        self._tokenizer = LLTokenizer(
            _WrappedVocabulary(vocabulary),  # type: ignore[arg-type]
            n_vocab=len(vocabulary.tokens),
            eos_token=vocabulary.eos_token_ids,
        )
        self._special_ids = {vocabulary.tokens[token_id]: token_id for token_id in vocabulary.special_ids}
        self._limits = LLParserLimits(
            max_lexer_states=_MAX_LEXER_STATES,
            step_lexer_fuel=_STEP_LEXER_FUEL,
            step_max_items=_STEP_MAX_ITEMS,
            verbose_errors=False,
        )

    def compile(self, grammar: Grammar) -> LLMatcher:
        """A matcher at the start of the text. Lets other threads run. Raises `GrammarError`."""
        from llguidance import LLMatcher

        marker_id = self._special_ids.get(grammar.starts_after.encode())
        text = llguidance_text(grammar, marker_id)
        matcher = LLMatcher(self._tokenizer, text, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise GrammarError(first_line(matcher.get_error()))
        return matcher


def first_line(text: str) -> str:
    """What a matcher says is wrong, without its state. A regular expression's error shows the place in lines."""
    head, _, _ = text.partition("\n<state>")
    return " ".join(head.split())[:500]


def llguidance_text(grammar: Grammar, marker_id: int | None = None) -> str:
    """`grammar` as llguidance reads it: JSON with a list of grammars, the first of which is the start.

    `marker_id`: where what it starts after is a special token, which is no part of any text.
    """
    lark = "start: @body"
    if marker_id is not None:
        lark = f"start: FREE <[{marker_id}]> @body\nFREE: /(.|\\n)*/"
    elif grammar.starts_after:
        # The free text ends at the first marker, wherever that lies among the tokens.
        lark = f"start: free @body\nfree[suffix={json.dumps(grammar.starts_after)}]: /(.|\\n)*/"
    body = {**_BODIES[grammar.kind](grammar.source), "name": "body"}
    return json.dumps({"grammars": [{"name": "start", "lark_grammar": _NO_FORCING + lark}, body]})


def _json_schema(source: str) -> dict[str, Any]:
    try:
        schema = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"the schema is not JSON: {error}") from None
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise GrammarError("the schema must be a JSON object that something satisfies")
    return {"json_schema": {**schema, "x-guidance": JSON_OPTIONS}}


def _json_object(_: str) -> dict[str, Any]:
    return {"json_schema": {"type": "object", "x-guidance": JSON_OPTIONS}}


def _choice(source: str) -> dict[str, Any]:
    texts = json.loads(source)
    return {"lark_grammar": "start: " + " | ".join(map(json.dumps, texts))}


def _regex(source: str) -> dict[str, Any]:
    from llguidance import LLMatcher

    body: dict[str, Any] = json.loads(LLMatcher.grammar_from_regex(source))["grammars"][0]
    return body


_BODIES: dict[GrammarKind, Callable[[str], dict[str, Any]]] = {
    GrammarKind.JSON_OBJECT: _json_object,
    GrammarKind.JSON_SCHEMA: _json_schema,
    GrammarKind.REGEX: _regex,
    GrammarKind.LARK: lambda source: {"lark_grammar": source},
    GrammarKind.CHOICE: _choice,
}
