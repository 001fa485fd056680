"""`Grammar`: what the text of an answer must look like. Compiled where it is checked and where it is applied."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class GrammarKind(StrEnum):
    JSON_OBJECT = "json_object"  # any JSON object; `source` is empty
    JSON_SCHEMA = "json_schema"  # `source` is the schema as JSON
    REGEX = "regex"  # the whole text matches `source`
    LARK = "lark"  # `source` is a grammar in llguidance's Lark dialect, which may hold %json and special tokens
    CHOICE = "choice"  # `source` is a JSON array of strings


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """A constraint on the generated text; `starts_after` leaves all text free up to and with that marker."""

    kind: GrammarKind
    source: str = ""
    starts_after: str = ""  # for example the end of reasoning; empty: from the first token
