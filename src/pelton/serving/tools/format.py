"""What a tool-call format is: how a model of one family writes calls, to be read and to be enforced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from pelton.serving.parsing.answer import ReadAnswer
from pelton.serving.parsing.sink import new_call_id


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolDefinition:
    """A function that the model may call. `parameters` is a JSON schema of an object."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool = False


# A marker as an expression of the grammar: its text, or the special token that it is.
SpellMarker = Callable[[str], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class CallSyntax:
    """How calls are written, as Lark expressions: `before` `trigger` `opening` `call` (`separator` `call`)* `closing`.

    `trigger` is a marker's text, "" where calls begin without one. A format that writes one call per answer has no
    `separator`. `free` is an answer without calls, where it is not just any text that does not begin like calls.
    `required` is how they are written where they must come, if in another way.
    """

    call: Callable[[ToolDefinition], str]
    before: str = ""
    trigger: str = ""
    separator: str | None = None
    opening: str = ""
    closing: str = ""
    free: str = ""
    required: CallSyntax | None = None


class ToolCallFormat(Protocol):
    """One file in `tools/`, one row in its table."""

    @property
    def name(self) -> str: ...

    @property
    def markers(self) -> tuple[str, ...]:
        """What the reader looks for: where a vocabulary has it as a special token, no text shows it otherwise."""
        ...

    def detect(self, template: str, model_name: str) -> bool:
        """Whether a model with this chat template writes calls this way."""
        ...

    def reader(self, tool_names: frozenset[str], *, starts_only: bool = False) -> ReadAnswer:
        """Reads the answer to a request that offers `tool_names`.

        With `starts_only` a format without a trigger looks for calls at the start alone, where they can be enforced.
        """
        ...

    def syntax(self, spell: SpellMarker) -> CallSyntax:
        """How calls are enforced, in llguidance's Lark dialect; `reader` reads all that it allows."""
        ...

    def make_call_id(self) -> str: ...


class CommonCallIds:
    """Ids as OpenAI makes them."""

    def make_call_id(self) -> str:
        return new_call_id()
