"""Pelton: an LLM serving engine made for agents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pelton.core.grammar import Grammar, GrammarKind
from pelton.core.sampling_params import SamplingParams

if TYPE_CHECKING:
    from pelton.llm import LLM

__all__ = ["LLM", "Grammar", "GrammarKind", "SamplingParams"]


def __getattr__(name: str) -> Any:
    # Late: `import pelton` by the command line must not cost what the class needs.
    if name == "LLM":
        from pelton.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
