"""Probabilities up to a factor, as integers: 2**39 for the most likely token.

Integers add up to the same sum in any order and on any processor; every weight is made of float32
operations that all of them round alike. What is less likely than 2**-39 of the best has weight 0.

Legend: K tokens.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from pelton.worker.sampling.selection import Row

Weights = npt.NDArray[np.int64]  # [K]

ONE = 2**39

# A smaller one has no reciprocal in float32; at this one everything but the maximum has weight 0.
MIN_TEMPERATURE = 1e-30


def weights_of(logits: Row, max_logit: float, temperature: float) -> Weights:
    """exp((logits - max_logit) / temperature) in units of 1 / ONE, rounded down; max_logit is finite.

    exp(x) is 2**n * exp(r) with n = round(x / log 2), r in two parts, and Cephes' polynomial of degree 7.
    """
    inverse = np.float32(1.0 / max(temperature, MIN_TEMPERATURE))
    with np.errstate(over="ignore"):
        x = np.maximum((logits - np.float32(max_logit)) * inverse, np.float32(-40.0))
    n = np.rint(x * np.float32(1.44269504))
    r = x - n * np.float32(0.693359375) - n * np.float32(-2.12194440e-4)
    p = np.full_like(r, 1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * r + np.float32(coefficient)
    y = p * (r * r) + (r + np.float32(1.0))  # in (0.7, 1.5)
    mantissas = (y * np.float32(2**24)).astype(np.int64) << 15
    return mantissas >> (-n).astype(np.int64)


def least_weight(min_p: float) -> int:
    """The least weight that min-p keeps."""
    return math.ceil(min_p * ONE)


def head_weight(top_p: float, total: int) -> int:
    """What the most likely tokens must weigh together to be top-p of `total`."""
    return min(math.ceil(top_p * total), total)


def drawn_weight(uniform: float, total: int) -> int:
    """A number in [0, total): the token whose interval of the cumulative weights holds it is drawn."""
    return int(uniform * 2**53) * total >> 53
