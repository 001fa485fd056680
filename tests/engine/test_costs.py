"""The cost model: fits find the truth they were given, and decisions flip where the formulas say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pelton.core.batch import ScheduledBatch, ScheduledRequest
from pelton.core.sampling_params import SamplingParams
from pelton.engine.kv import costs
from pelton.engine.kv.costs import CopyFit, KVCosts, PrefillCoefficients, PrefillFit

GREEDY = SamplingParams(temperature=0.0)


def batch_of(*chunks: tuple[int, int]) -> ScheduledBatch:
    """(first position, number of tokens) of every request."""
    return ScheduledBatch(
        1,
        tuple(
            ScheduledRequest(f"r{i}", (0,) * count, start, ((),), GREEDY, False)
            for i, (start, count) in enumerate(chunks)
        ),
    )


@pytest.mark.parametrize(
    "truth",
    [
        PrefillCoefficients(0.004, 0.0011, 2e-7),
        PrefillCoefficients(0.0, 0.002, 0.0),
        PrefillCoefficients(0.01, 0.0005, 0.0),
        PrefillCoefficients(0.0, 1e-5, 1e-8),
    ],
)
def test_the_fit_finds_the_coefficients(truth: PrefillCoefficients) -> None:
    fit = PrefillFit()
    for size in (32, 100, 256, 512):
        for start in (0, 512, 2048, 8192):
            fit.observe_step(batch_of((start, size)), truth.compute_s(start, start + size))
    for start, end in ((0, 4096), (8192, 8300), (100, 200)):
        assert fit.coefficients.compute_s(start, end) == pytest.approx(truth.compute_s(start, end), rel=0.01)


def test_a_fit_of_equal_steps_still_predicts_them() -> None:
    fit = PrefillFit()
    for _ in range(10):
        fit.observe_step(batch_of((0, 512)), 0.5)
    assert fit.coefficients.compute_s(0, 512) == pytest.approx(0.5, rel=0.01)
    assert min(fit.coefficients.step_s, fit.coefficients.token_s, fit.coefficients.position_s) >= 0.0


def test_decode_steps_do_not_price_prefill() -> None:
    fit = PrefillFit()
    for _ in range(50):
        fit.observe_step(batch_of((100, 1), (200, 1)), 1.0)
    assert fit.most_tokens == 0
    fit.observe_step(batch_of((0, 500), (300, 1)), 0.501)
    assert fit.coefficients.compute_s(0, 500) == pytest.approx(0.5, rel=0.01)


def test_old_speeds_fade() -> None:
    fit, copies = PrefillFit(), CopyFit()
    for elapsed_s in [1.0] * 200 + [0.1] * 2000:
        fit.observe(100, 0.0, elapsed_s)
        copies.observe(1000, elapsed_s)
    assert fit.coefficients.compute_s(0, 100) == pytest.approx(0.1, rel=0.05)
    assert copies.bytes_per_s == pytest.approx(10_000, rel=0.05)


@given(st.lists(st.tuples(st.integers(1, 4096), st.integers(0, 100_000), st.floats(1e-6, 100.0)), max_size=30))
def test_no_measurement_makes_a_price_negative(steps: list[tuple[int, int, float]]) -> None:
    fit = PrefillFit()
    for num_tokens, start, elapsed_s in steps:
        fit.observe_step(batch_of((start, num_tokens)), elapsed_s)
    found = fit.coefficients
    assert found.step_s >= 0.0
    assert found.token_s >= 0.0
    assert found.position_s >= 0.0


def test_nonsense_is_not_measured() -> None:
    fit, copies = PrefillFit(), CopyFit(bytes_per_s=5.0)
    fit.observe_step(batch_of((0, 16)), 0.0)
    fit.observe(0, 0.0, 1.0)
    copies.observe(0, 1.0)
    copies.observe(10, 0.0)
    assert fit.most_tokens == 0
    assert copies.copy_s(10) == 2.0


def test_load_or_recompute_follows_the_speeds() -> None:
    prices = KVCosts(bytes_per_token=1000, chunk=512)
    for start in (0, 512, 1024):
        prices.prefill.observe_step(batch_of((start, 512)), 0.512)  # 1 ms a token
    prices.copies_from("host").observe(10_000_000, 1.0)  # 0.1 ms a token
    prices.copies_from("disk").observe(100_000, 1.0)  # 10 ms a token
    assert prices.load_s("host", 512) < prices.recompute_s(0, 512) < prices.load_s("disk", 512)
    assert prices.return_s(1000) == pytest.approx(1.0, rel=0.02)
    prices.tiers = ("host", "disk")
    assert prices.return_s(1000) == pytest.approx(0.1, rel=0.02)


def test_a_context_is_kept_no_longer_than_giving_it_up_would_cost() -> None:
    prices = KVCosts(bytes_per_token=1000, chunk=500)
    prices.prefill.observe_step(batch_of((0, 500)), 0.5)
    # Alone, half of its own recompute; beside others, their wait too.
    assert prices.keep_limit_s(1000, 0) == pytest.approx(0.5)
    assert prices.keep_limit_s(1000, 3000) == pytest.approx(0.5 + 3.0)
    prices.tiers = ("host",)
    prices.copies_from("host").observe(10_000_000, 1.0)
    assert prices.keep_limit_s(1000, 3000) == pytest.approx(2 * 0.1 * 4)
    assert prices.keep_limit_s(0, 3000) == 0.0


def test_recompute_pays_for_every_step() -> None:
    coefficients = PrefillCoefficients(0.01, 0.001, 0.0)
    assert coefficients.compute_s(0, 1000, 256) == pytest.approx(4 * 0.01 + 1.0)
    assert coefficients.compute_s(0, 0) == 0.0


@given(
    st.floats(1e-3, 10.0), st.floats(1e-3, 1.0), st.integers(1, 50), st.integers(1, 100_000), st.integers(0, 100_000)
)
def test_keeping_pays_until_the_pause_that_infercept_names(
    recompute_s: float, chunk_s: float, num_chunks: int, num_tokens: int, num_others: int
) -> None:
    flip_s = (recompute_s * num_tokens / 2 + num_chunks * chunk_s * num_others) / num_tokens
    discard = costs.chunk_discard_waste(recompute_s, chunk_s, num_chunks, (num_tokens, num_others), 1000)
    assert costs.preserve_waste(flip_s * 0.99, num_tokens, 1000) < discard
    assert costs.preserve_waste(flip_s * 1.01, num_tokens, 1000) > discard


def test_discarding_in_chunks_never_wastes_more_than_in_one_step() -> None:
    coefficients = PrefillCoefficients(0.0, 0.001, 1e-6)
    whole_s = coefficients.compute_s(0, 8192)
    chunk_s = coefficients.compute_s(0, 512)
    chunked = costs.chunk_discard_waste(whole_s, chunk_s, 16, (8192, 4000), 1000)
    assert chunked < whole_s * (8192 + 4000) * 1000  # in one step
    assert costs.swap_waste(0.01, 12_192, 1000) < chunked
