import statistics

import numpy as np
import pytest

from pelton.bench.record import RequestRecord
from pelton.bench.report import make_report, median_report, pairwise_ratios, percentile


@pytest.mark.parametrize("percent", [0, 1, 50, 90, 99, 100])
@pytest.mark.parametrize("values", [[3.0], [2.0, 1.0], [5.0, 1.0, 4.0, 2.0], [float(i * i % 17) for i in range(101)]])
def test_percentile_equals_numpy(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)))


def test_percentile_of_nothing() -> None:
    assert percentile([], 50) is None


def record(*chunk_times_s: float, tokens: int, **values: object) -> RequestRecord:
    return RequestRecord(
        elapsed_s=chunk_times_s[-1],
        chunk_times_s=chunk_times_s,
        num_output_tokens=tokens,
        **{"num_prompt_tokens": 10, **values},  # type: ignore[arg-type]
    )


def test_report_counts_what_was_served() -> None:
    records = [
        record(0.5, 0.7, 0.9, tokens=3, num_cached_tokens=4),
        record(0.1, 0.5, tokens=5, num_cached_tokens=6),  # several tokens in one chunk
        RequestRecord(elapsed_s=0.2, chunk_times_s=(0.1,), num_output_tokens=1, error="HTTP 503: full"),
    ]
    report = make_report("W1", records, elapsed_s=2.0)
    assert (report.num_requests, report.num_errors, report.first_error) == (3, 1, "HTTP 503: full")
    assert report.output_tokens_per_s == 4.0
    assert report.total_tokens_per_s == 14.0
    assert report.requests_per_s == 1.0
    assert report.ttft_p50_ms == 300.0
    assert report.tpot_p50_ms == 150.0  # 0.4 s over 2 gaps and 0.4 s over 4
    assert report.itl_p99_ms == pytest.approx(396.0)  # of gaps 200, 200, 400
    assert report.num_cached_tokens == 10


def test_one_token_has_no_tpot() -> None:
    report = make_report("W1", [record(0.5, tokens=1)], elapsed_s=1.0)
    assert report.tpot_p50_ms is None
    assert report.itl_p99_ms is None
    assert report.num_cached_tokens is None


def test_no_text_counts_to_the_end() -> None:
    assert RequestRecord(elapsed_s=0.4).ttft_s == 0.4


def test_median_is_taken_figure_by_figure_and_errors_add_up() -> None:
    runs = [
        make_report("W1", [record(0.1 * run, 1.0, tokens=run), RequestRecord(elapsed_s=1, error="x")], elapsed_s=1.0)
        for run in (3, 1, 2)
    ]
    median = median_report(runs)
    assert median.output_tokens_per_s == 2.0
    assert median.ttft_p50_ms == 200.0
    assert median.tpot_p50_ms == pytest.approx(statistics.median([1000 * 0.7 / 2, 1000 * 0.8]))
    assert median.num_errors == 3


def test_ratios_pair_the_passes() -> None:
    def passes(*rates: int) -> list:
        return [make_report("W2", [record(0.5, 1.0, tokens=rate)], elapsed_s=1.0) for rate in rates]

    # The machine was half as fast in the second pass: each server against itself says nothing.
    reports = {"a": passes(20, 10, 30), "b": passes(10, 5, 10), "c": passes(10, 5, 10)}
    ratios = pairwise_ratios(reports, ["output_tokens_per_s", "ttft_p50_ms"])
    assert [(r.name, r.other) for r in ratios if r.figure == "ttft_p50_ms"] == [("a", "b"), ("a", "c"), ("b", "c")]
    first = ratios[0]
    assert (first.median, first.lowest, first.highest, first.workload) == (2.0, 2.0, 3.0, "W2")
