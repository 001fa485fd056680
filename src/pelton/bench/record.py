"""One request as its client saw it: times and token counts."""

from __future__ import annotations

import itertools
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """One request. Times in seconds from the moment it was sent; `error` is None where it went well.

    `chunk_times_s` are the arrivals of chunks with text. Token counts are the server's own; where it
    reports none, output tokens are chunks and `num_prompt_tokens` is 0.
    """

    elapsed_s: float
    chunk_times_s: tuple[float, ...] = ()
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int | None = None
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        return self.chunk_times_s[0] if self.chunk_times_s else self.elapsed_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first; None where there was only one."""
        if self.num_output_tokens < 2 or not self.chunk_times_s:
            return None
        return (self.chunk_times_s[-1] - self.chunk_times_s[0]) / (self.num_output_tokens - 1)

    @property
    def gaps_s(self) -> list[float]:
        """Times between chunks: what a reader feels as stutter (ITL)."""
        return [later - earlier for earlier, later in itertools.pairwise(self.chunk_times_s)]
