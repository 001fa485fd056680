"""What a request says about reasoning, and what a chat template makes of it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]

# Where a template knows levels, they are gpt-oss's three.
_LEVELS: dict[str, str] = {"minimal": "low", "low": "low", "medium": "medium", "high": "high"}
# Where it knows none, an effort is a budget of tokens; the higher ones leave it to the model.
EFFORT_BUDGETS: dict[str, int] = {"none": 0, "minimal": 512, "low": 1024, "medium": 8192}
_SWITCHES = {
    "enable_thinking": re.compile(r"\benable_thinking\b"),
    "thinking": re.compile(r"\bthinking\s+is\s+(?:not\s+)?defined\b|\bif\s+(?:not\s+)?thinking\b"),
}
_HAS_LEVELS = re.compile(r"\breasoning_effort\b")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningOptions:
    """`budget` is the most tokens of reasoning; `is_shown` tells whether the client gets to see it."""

    effort: Effort | None = None
    budget: int | None = None
    is_shown: bool = True


@dataclass(frozen=True, slots=True)
class ReasoningSwitches:
    """What a template lets a request choose."""

    has_levels: bool = False
    names: tuple[str, ...] = field(default=())

    @classmethod
    def of(cls, template: str) -> ReasoningSwitches:
        names = tuple(name for name, pattern in _SWITCHES.items() if pattern.search(template))
        return cls(_HAS_LEVELS.search(template) is not None, names)

    def variables(self, options: ReasoningOptions) -> dict[str, Any]:
        """Of the template, for the effort that a request asks for."""
        found: dict[str, Any] = {}
        effort = options.effort
        if effort is not None:
            found.update((name, effort != "none") for name in self.names)
            if self.has_levels and effort != "none":
                found["reasoning_effort"] = _LEVELS.get(effort, "high")
        elif options.budget is not None:
            found.update((name, options.budget > 0) for name in self.names)
        return found

    def budget(self, options: ReasoningOptions) -> int | None:
        """The tokens that a request leaves for reasoning; None: no limit."""
        if options.budget is not None or options.effort is None or self.has_levels:
            return options.budget
        return EFFORT_BUDGETS.get(options.effort)
