"""What a run of agents comes to: completion times, time to first token by turn, tokens computed again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pelton.bench.agent_run import AgentRecord, TurnRecord
from pelton.bench.report import percentile, rounded_percentile


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentReport:
    """Completion time is from an agent's first request to its last answer, tools and forks included; only agents
    that came to their end count. `num_recomputed_tokens` are prompt tokens that the server had been given before
    and did not find in its cache; None where it does not say. Percentiles are None where nothing was measured.
    """

    workload: str
    num_agents: int
    num_concurrent: int
    num_errors: int  # agents that gave up
    num_turns: int
    elapsed_s: float
    completion_mean_s: float | None
    completion_p50_s: float | None
    completion_p95_s: float | None
    pause_share: float | None  # of completion time, waiting for tools
    ttft_first_p50_ms: float | None  # of first turns
    ttft_p50_ms: float | None  # of all others
    ttft_p95_ms: float | None
    ttft_p99_ms: float | None
    tpot_p50_ms: float | None
    output_tokens_per_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    num_seen_tokens: int
    num_cached_tokens: int | None
    num_recomputed_tokens: int | None
    first_error: str | None = None

    @property
    def recomputed_share(self) -> float | None:
        """Of all prompt tokens that were computed."""
        if self.num_recomputed_tokens is None or self.num_cached_tokens is None:
            return None
        return self.num_recomputed_tokens / max(1, self.num_prompt_tokens - self.num_cached_tokens)


def make_agent_report(
    workload: str, num_concurrent: int, records: Sequence[AgentRecord], elapsed_s: float
) -> AgentReport:
    done = [record for record in records if record.error is None]
    turns = [turn for record in records for turn in record.turns if turn.record.error is None]
    completions = [record.completion_s for record in done]
    later = [turn.record.ttft_s for turn in turns if turn.call.number > 0]
    tpots = [turn.record.tpot_s for turn in turns if turn.record.tpot_s is not None]
    num_output_tokens = sum(turn.record.num_output_tokens for turn in turns)
    total_s = sum(completions)
    return AgentReport(
        workload=workload,
        num_agents=len(records),
        num_concurrent=num_concurrent,
        num_errors=len(records) - len(done),
        num_turns=len(turns),
        elapsed_s=round(elapsed_s, 3),
        completion_mean_s=round(total_s / len(done), 3) if done else None,
        completion_p50_s=_rounded(completions, 50, 1),
        completion_p95_s=_rounded(completions, 95, 1),
        pause_share=round(sum(record.pause_s for record in done) / total_s, 3) if total_s else None,
        ttft_first_p50_ms=_rounded([turn.record.ttft_s for turn in turns if turn.call.number == 0], 50, 1000),
        ttft_p50_ms=_rounded(later, 50, 1000),
        ttft_p95_ms=_rounded(later, 95, 1000),
        ttft_p99_ms=_rounded(later, 99, 1000),
        tpot_p50_ms=_rounded(tpots, 50, 1000),
        output_tokens_per_s=round(num_output_tokens / elapsed_s, 2) if elapsed_s else 0.0,
        num_prompt_tokens=sum(turn.record.num_prompt_tokens for turn in turns),
        num_output_tokens=num_output_tokens,
        num_seen_tokens=sum(turn.num_seen_tokens for turn in turns),
        num_cached_tokens=_total([turn.record.num_cached_tokens for turn in turns]),
        num_recomputed_tokens=_total([turn.num_recomputed_tokens for turn in turns]),
        first_error=next((record.error for record in records if record.error is not None), None),
    )


def ttft_by_turn_ms(turns: Sequence[TurnRecord]) -> list[tuple[int, float]]:
    """Median over the agents of each turn's time to first token."""
    by_number: dict[int, list[float]] = {}
    for turn in turns:
        if turn.record.error is None:
            by_number.setdefault(turn.call.number, []).append(turn.record.ttft_s)
    return [(number, (percentile(values, 50) or 0.0) * 1000) for number, values in sorted(by_number.items())]


def _rounded(values_s: Sequence[float], percent: float, factor: float) -> float | None:
    return rounded_percentile(values_s, percent, factor, 3)


def _total(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if known else None
