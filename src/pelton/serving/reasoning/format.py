"""What a reasoning format is: how a model of one family marks what it thinks before it answers."""

from __future__ import annotations

from typing import Protocol

from pelton.serving.parsing.answer import ReadAnswer


class ReasoningFormat(Protocol):
    """One row in `reasoning/`'s table."""

    @property
    def name(self) -> str: ...

    @property
    def markers(self) -> tuple[str, ...]:
        """What the reader looks for, where a vocabulary may have it as a special token."""
        ...

    @property
    def opening(self) -> str:
        """The marker that begins it, where the model writes it."""
        ...

    @property
    def closing(self) -> str: ...

    @property
    def tells_tool_calls(self) -> bool:
        """Whether the reader reads the whole answer, its calls too."""
        ...

    def detect(self, template: str) -> bool:
        """Whether a model with this chat template reasons this way."""
        ...

    def is_open(self, prompt: str) -> bool:
        """Whether a rendered prompt ends within reasoning."""
        ...

    def is_over(self, prompt: str) -> bool:
        """Whether a rendered prompt ends after a reasoning that the template closed: the model will not think."""
        ...

    def reader(self, *, is_open: bool) -> ReadAnswer:
        """Reads the reasoning that an answer begins with, if there is one."""
        ...
