"""`Dialect`: how the served model writes tool calls and reasoning, and what its chat template takes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pelton.serving.reasoning import detect_reasoning_format, reasoning_format
from pelton.serving.reasoning.options import ReasoningSwitches
from pelton.serving.tools import detect_tool_call_format, tool_call_format
from pelton.serving.tools.lark import lark_string

if TYPE_CHECKING:
    from pelton.weights.tokenizer import Tokenizer

_TAKES_OBJECTS = re.compile(r"arguments\s*\|\s*(?:tojson|items)|function\s*\|\s*tojson|tool_call\s*\|\s*tojson")
_TAKES_TEXT = re.compile(r"arguments('\]|\"\])?\s*[+~]|[+~]\s*[\w.\[\]']*arguments")


class Dialect:
    """Made once, from the chat template and two settings. Immutable."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str | None,
        model_name: str,
        *,
        tool_call_parser: str | None = None,
        reasoning_parser: str | None = None,
    ) -> None:
        template = template or ""
        self.knows_tools = re.search(r"\btools\b", template) is not None
        # A template that shows no tools also has no way to write a call: the generic format tells of its own.
        self.tool_format = (
            tool_call_format(tool_call_parser)
            if tool_call_parser is not None
            else detect_tool_call_format(template if self.knows_tools else "", model_name)
        )
        self.reasoning_format = (
            reasoning_format(reasoning_parser) if reasoning_parser is not None else detect_reasoning_format(template)
        )
        self.switches = ReasoningSwitches.of(template)
        self.takes_argument_text = bool(_TAKES_TEXT.search(template)) and not _TAKES_OBJECTS.search(template)
        self._tokenizer = tokenizer

    def special_token_id(self, marker: str) -> int | None:
        """The special token that a marker is in this vocabulary; None where it is plain text."""
        token_id = self._tokenizer.token_id(marker)
        return token_id if token_id is not None and self._tokenizer.is_special(token_id) else None

    def special_token_ids(self, markers: Sequence[str]) -> tuple[int, ...]:
        found = (self.special_token_id(marker) for marker in markers)
        return tuple(token_id for token_id in found if token_id is not None)

    def spell(self, marker: str) -> str:
        """A marker in a grammar."""
        token_id = self.special_token_id(marker)
        return lark_string(marker) if token_id is None else f"<[{token_id}]>"

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of text with markers in it."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def single_token_id(self, marker: str) -> int | None:
        return self._tokenizer.token_id(marker)
