"""What it costs to have KV again: computing it, or copying it back from a tier. Measured, then pure maths.

Prefill is fitted as `step_s * steps + token_s * tokens + position_s * (end^2 - start^2) / 2`: linear layers
cost the same for every token, attention grows with the position (Continuum's quadratic fit). Copies are
bytes over a measured speed. The waste formulas are InferCept's (arXiv 2402.01869, section 4): memory held
in vain, in byte seconds, so that ways to bridge a pause can be compared. Times in seconds, sizes in bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pelton.core.batch import ScheduledBatch
from pelton.engine.least_squares import Row, solve_chosen

# An observation counts half after so many later ones: speeds follow load and temperature, not the last step.
HALF_LIFE_OBSERVATIONS = 128
# Assumed until something has been measured.
DEFAULT_TOKEN_S = 1e-3
DEFAULT_COPY_BYTES_PER_S = 1e9
_DECAY: float = 0.5 ** (1 / HALF_LIFE_OBSERVATIONS)
_MAX_OBSERVATIONS = 1.0 / (1.0 - _DECAY)  # what all weights add up to at most
# Coefficients to fit with. Where steps are alike many fit equally well, and the first of them is taken.
_SUBSETS = ((1,), (0,), (2,), (0, 1), (1, 2), (0, 2), (0, 1, 2))


@dataclass(frozen=True, slots=True)
class PrefillCoefficients:
    """Seconds a step, a token, and a (token, earlier position) pair; none is negative."""

    step_s: float = 0.0
    token_s: float = DEFAULT_TOKEN_S
    position_s: float = 0.0

    def compute_s(self, start: int, end: int, chunk: int | None = None) -> float:
        """Seconds to compute positions [start, end) in steps of `chunk` tokens (default: one step)."""
        num_tokens = end - start
        if num_tokens <= 0:
            return 0.0
        num_steps = 1 if chunk is None else -(-num_tokens // chunk)
        return self.step_s * num_steps + self.token_s * num_tokens + self.position_s * _num_pairs(start, end)


class PrefillFit:
    """Least squares over relative errors, older steps fading out; coefficients are kept at or above zero."""

    def __init__(self) -> None:
        self._products = [[0.0] * 3 for _ in range(3)]
        self._targets = [0.0] * 3
        self._coefficients: PrefillCoefficients | None = PrefillCoefficients()
        self.most_tokens = 0  # of a step that was measured

    def observe(self, num_tokens: int, num_pairs: float, elapsed_s: float) -> None:
        """A step computed `num_tokens` tokens over `num_pairs` (token, earlier position) pairs."""
        if num_tokens < 1 or not elapsed_s > 0.0:
            return
        row = (1.0 / elapsed_s, num_tokens / elapsed_s, num_pairs / elapsed_s)
        for i in range(3):
            self._targets[i] = self._targets[i] * _DECAY + row[i]
            for j in range(3):
                self._products[i][j] = self._products[i][j] * _DECAY + row[i] * row[j]
        self._coefficients = None
        self.most_tokens = max(self.most_tokens, num_tokens)

    def observe_step(self, batch: ScheduledBatch, elapsed_s: float) -> None:
        """Take a step in which at least half of the tokens belong to chunks; decodes have another price."""
        num_tokens = batch.num_tokens
        num_chunk_tokens = num_tokens - sum(1 for scheduled in batch.requests if len(scheduled.token_ids) == 1)
        if not num_tokens or 2 * num_chunk_tokens < num_tokens:
            return
        num_pairs = 0.0
        for scheduled in batch.requests:
            start = scheduled.num_computed_tokens
            num_pairs += _num_pairs(start, start + len(scheduled.token_ids))
        self.observe(num_tokens, num_pairs, elapsed_s)

    @property
    def coefficients(self) -> PrefillCoefficients:
        if self._coefficients is None:
            self._coefficients = self._solve()
        return self._coefficients

    def _solve(self) -> PrefillCoefficients:
        """The best fit among those with no negative coefficient: of three, all subsets are tried."""
        best, best_loss = (0.0, DEFAULT_TOKEN_S, 0.0), float("inf")
        for chosen in _SUBSETS:
            found = solve_chosen(self._products, self._targets, chosen)
            if found is None or min(found) < 0.0:
                continue
            loss = self._loss(found)
            if loss < best_loss * (1.0 - 1e-6) - 1e-9:
                best, best_loss = found, loss
        return PrefillCoefficients(*best)

    def _loss(self, row: Row) -> float:
        """Sum of squared relative errors, up to a constant that keeps it positive."""
        quadratic = linear = 0.0
        for i in range(3):
            linear += row[i] * self._targets[i]
            for j in range(3):
                quadratic += row[i] * self._products[i][j] * row[j]
        return quadratic - 2 * linear + _MAX_OBSERVATIONS


class CopyFit:
    """Speed of one way between two tiers: bytes over seconds, older copies fading out."""

    def __init__(self, bytes_per_s: float = DEFAULT_COPY_BYTES_PER_S) -> None:
        self._default_bytes_per_s = bytes_per_s
        self._num_bytes = 0.0
        self._seconds = 0.0

    def observe(self, num_bytes: int, elapsed_s: float) -> None:
        if num_bytes > 0 and elapsed_s > 0.0:
            self._num_bytes = self._num_bytes * _DECAY + num_bytes
            self._seconds = self._seconds * _DECAY + elapsed_s

    @property
    def bytes_per_s(self) -> float:
        return self._num_bytes / self._seconds if self._seconds else self._default_bytes_per_s

    def copy_s(self, num_bytes: int) -> float:
        return num_bytes / self.bytes_per_s


class KVCosts:
    """The one place where KV has a price; fed by the engine after every step and by the tiers after every copy."""

    def __init__(self, bytes_per_token: int = 0, *, chunk: int | None = None) -> None:
        self.bytes_per_token = bytes_per_token  # over all KV groups; 0: unknown, copies are then free
        self.chunk = chunk  # tokens of one request that a step computes at most
        self.tiers: tuple[str, ...] = ()  # where a block goes that is evicted from the device
        self.prefill = PrefillFit()
        self._copies: dict[str, CopyFit] = {}

    def copies_from(self, tier: str) -> CopyFit:
        """Speed from `tier` ("host", "disk") to the device; stores are measured as `"host:store"` and so on."""
        if tier not in self._copies:
            self._copies[tier] = CopyFit()
        return self._copies[tier]

    def recompute_s(self, start: int, end: int) -> float:
        """Seconds to compute positions [start, end) again."""
        return self.prefill.coefficients.compute_s(start, end, self.chunk)

    def load_s(self, tier: str, num_tokens: int) -> float:
        """Seconds to copy the KV of so many tokens from a tier to the device."""
        return self.copies_from(tier).copy_s(num_tokens * self.bytes_per_token)

    def return_s(self, num_tokens: int) -> float:
        """Seconds until an evicted context is back: the fastest of recompute and the tiers (Continuum's PR)."""
        return min(self.recompute_s(0, num_tokens), *(self.load_s(tier, num_tokens) for tier in self.tiers), math.inf)

    def keep_limit_s(self, num_tokens: int, num_other_tokens: int) -> float:
        """The pause from which on keeping a context wastes more memory than giving it up (InferCept).

        `num_other_tokens`: context of the running others, which wait while this one is recomputed or copied.
        """
        if num_tokens < 1:
            return 0.0
        chunk = min(self.chunk or num_tokens, num_tokens)
        num_chunks = -(-num_tokens // chunk)
        recompute_s = self.recompute_s(0, num_tokens)
        waste = chunk_discard_waste(
            recompute_s, recompute_s / num_chunks, num_chunks, (num_tokens, num_other_tokens), 1
        )
        for tier in self.tiers:
            waste = min(waste, swap_waste(self.load_s(tier, num_tokens), num_tokens + num_other_tokens, 1))
        return waste / preserve_waste(1.0, num_tokens, 1)


# -- InferCept: memory held in vain, in byte seconds ---------------------------------------------------


def preserve_waste(pause_s: float, num_tokens: int, bytes_per_token: int) -> float:
    """Keep the context of `num_tokens` on the device for the whole pause."""
    return pause_s * num_tokens * bytes_per_token


def chunk_discard_waste(
    recompute_s: float, chunk_recompute_s: float, num_chunks: int, sizes: tuple[int, int], bytes_per_token: int
) -> float:
    """Compute it again in `num_chunks` steps of `chunk_recompute_s` each; on average half of it is held.

    `sizes`: tokens of the context, tokens of the running others.
    """
    num_tokens, num_other_tokens = sizes
    held = recompute_s * num_tokens / 2 + num_chunks * chunk_recompute_s * num_other_tokens
    return held * bytes_per_token


def swap_waste(copy_s: float, num_batch_tokens: int, bytes_per_token: int) -> float:
    """Copy it out and in again while a batch of `num_batch_tokens` waits; nothing where copies overlap steps."""
    return 2 * copy_s * num_batch_tokens * bytes_per_token


def _num_pairs(start: int, end: int) -> float:
    """Sum of positions in [start, end): what attention of these tokens looks back at."""
    return (end * (end - 1) - start * (start - 1)) / 2
