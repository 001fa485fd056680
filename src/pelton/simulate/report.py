"""What a replayed trace comes to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pelton.bench.record import RequestRecord
from pelton.bench.report import rounded_percentile
from pelton.simulate.server import SimulatedServer


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayReport:
    """Virtual seconds, but for `wall_s`. `busy_share` is of the time until the last request ended."""

    num_requests: int
    num_errors: int
    virtual_s: float
    wall_s: float
    busy_share: float
    num_steps: int
    num_prompt_tokens: int
    num_output_tokens: int
    cached_share: float  # of prompt tokens, found in the prefix cache
    num_preemptions: int
    num_recomputed_tokens: int  # by preemptions
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    tpot_p50_ms: float | None
    tpot_p99_ms: float | None
    e2e_p50_s: float | None
    first_error: str | None = None


def make_replay_report(
    server: SimulatedServer, records: Sequence[RequestRecord], virtual_s: float, wall_s: float
) -> ReplayReport:
    stats = server.stats
    done = [record for record in records if record.error is None]
    tpots = [record.tpot_s for record in done if record.tpot_s is not None]
    num_prompt_tokens = sum(record.num_prompt_tokens for record in done)
    num_cached_tokens = sum(record.num_cached_tokens or 0 for record in done)
    return ReplayReport(
        num_requests=len(records),
        num_errors=len(records) - len(done),
        virtual_s=round(virtual_s, 3),
        wall_s=round(wall_s, 2),
        busy_share=round(server.executor.busy_s / virtual_s, 4) if virtual_s else 0.0,
        num_steps=stats.num_steps_total,
        num_prompt_tokens=num_prompt_tokens,
        num_output_tokens=sum(record.num_output_tokens for record in done),
        cached_share=round(num_cached_tokens / max(1, num_prompt_tokens), 4),
        num_preemptions=stats.num_preemptions_total,
        num_recomputed_tokens=stats.num_recomputed_tokens_total,
        ttft_p50_s=_rounded([record.ttft_s for record in done], 50),
        ttft_p99_s=_rounded([record.ttft_s for record in done], 99),
        tpot_p50_ms=_rounded([1000 * tpot for tpot in tpots], 50),
        tpot_p99_ms=_rounded([1000 * tpot for tpot in tpots], 99),
        e2e_p50_s=_rounded([record.elapsed_s for record in done], 50),
        first_error=next((record.error for record in records if record.error is not None), None),
    )


def _rounded(values: Sequence[float], percent: float) -> float | None:
    return rounded_percentile(values, percent, 1, 4)
