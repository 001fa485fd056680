"""What a run comes to: rates, percentiles, medians over runs, ratios between servers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from pelton.bench.record import RequestRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """One run of one workload. Rates count successful requests over the whole run's time.

    A percentile is None where nothing was measured: TPOT and ITL need two tokens or chunks.
    """

    workload: str
    num_requests: int
    num_errors: int
    elapsed_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float  # prompt tokens, cached or not, and output tokens
    requests_per_s: float
    ttft_p50_ms: float | None
    ttft_p99_ms: float | None
    tpot_p50_ms: float | None
    tpot_p99_ms: float | None
    itl_p99_ms: float | None
    e2e_p50_ms: float | None
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int | None  # None: the server does not say
    first_error: str | None = None


# Of these a larger figure is better, of the other measured ones a smaller.
RATES = ("output_tokens_per_s", "total_tokens_per_s", "requests_per_s")
LATENCIES = ("ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms", "itl_p99_ms", "e2e_p50_ms")


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Linear between the two nearest ranks, as numpy's default; None for no values."""
    if not values:
        return None
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (rank - below)


def make_report(workload: str, records: Sequence[RequestRecord], elapsed_s: float) -> RunReport:
    done = [record for record in records if record.error is None]
    errors = [record.error for record in records if record.error is not None]
    ttfts = [record.ttft_s for record in done]
    tpots = [record.tpot_s for record in done if record.tpot_s is not None]
    gaps = [gap for record in done for gap in record.gaps_s]
    cached = [record.num_cached_tokens for record in done if record.num_cached_tokens is not None]
    num_prompt_tokens = sum(record.num_prompt_tokens for record in done)
    num_output_tokens = sum(record.num_output_tokens for record in done)
    return RunReport(
        workload=workload,
        num_requests=len(records),
        num_errors=len(errors),
        elapsed_s=round(elapsed_s, 3),
        output_tokens_per_s=round(num_output_tokens / elapsed_s, 2),
        total_tokens_per_s=round((num_prompt_tokens + num_output_tokens) / elapsed_s, 2),
        requests_per_s=round(len(done) / elapsed_s, 3),
        ttft_p50_ms=_ms(ttfts, 50),
        ttft_p99_ms=_ms(ttfts, 99),
        tpot_p50_ms=_ms(tpots, 50),
        tpot_p99_ms=_ms(tpots, 99),
        itl_p99_ms=_ms(gaps, 99),
        e2e_p50_ms=_ms([record.elapsed_s for record in done], 50),
        num_prompt_tokens=num_prompt_tokens,
        num_output_tokens=num_output_tokens,
        num_cached_tokens=sum(cached) if cached else None,
        first_error=errors[0] if errors else None,
    )


def rounded_percentile(values: Sequence[float], percent: float, factor: float, num_digits: int) -> float | None:
    """A percentile times `factor`, for a report; None where nothing was measured."""
    value = percentile(values, percent)
    return None if value is None else round(value * factor, num_digits)


def _ms(values_s: Sequence[float], percent: float) -> float | None:
    return rounded_percentile(values_s, percent, 1000, 2)


def median_report(reports: Sequence[RunReport]) -> RunReport:
    """The median of every figure over runs of one workload; errors are added up."""
    values: dict[str, Any] = asdict(reports[0])
    for report_field in fields(RunReport):
        figures = [getattr(report, report_field.name) for report in reports]
        known = [figure for figure in figures if figure is not None]
        if report_field.name in (*RATES, *LATENCIES, "elapsed_s"):
            values[report_field.name] = round(statistics.median(known), 3) if known else None
        elif report_field.name.startswith("num_") and known:
            values[report_field.name] = statistics.median_low(known)
    values["num_errors"] = sum(report.num_errors for report in reports)
    values["first_error"] = next((report.first_error for report in reports if report.first_error), None)
    return RunReport(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """`name` against `other`: the median over the passes of figure by figure, and their range."""

    workload: str
    name: str
    other: str
    figure: str
    median: float
    lowest: float
    highest: float


def pairwise_ratios(reports: dict[str, list[RunReport]], figures: Iterable[str]) -> list[Ratio]:
    """Every pair of servers once, pass by pass: what changed on the machine between passes cancels out.

    `reports` holds the passes of one workload by server name, in the same order for all.
    """
    names = list(reports)
    ratios = []
    for index, name in enumerate(names):
        for other in names[index + 1 :]:
            for figure in figures:
                pairs = [
                    (getattr(mine, figure), getattr(theirs, figure))
                    for mine, theirs in zip(reports[name], reports[other], strict=True)
                ]
                quotients = [mine / theirs for mine, theirs in pairs if mine is not None and theirs]
                if quotients:
                    ratios.append(
                        Ratio(
                            workload=reports[name][0].workload,
                            name=name,
                            other=other,
                            figure=figure,
                            median=round(statistics.median(quotients), 3),
                            lowest=round(min(quotients), 3),
                            highest=round(max(quotients), 3),
                        )
                    )
    return ratios
