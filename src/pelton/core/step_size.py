"""`StepSize`: how much one step may hold."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepSize:
    num_requests: int
    num_tokens: int


# A CPU computes a token in milliseconds: small steps keep decodes smooth beside prompts.
CPU_STEP = StepSize(64, 256)
