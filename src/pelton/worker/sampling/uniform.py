"""A stateless random number per (seed, output position).

Nothing is stored between draws, so a request that was preempted and computed again draws what it
would have drawn before, and no other request's draws move its own.
"""

from __future__ import annotations

_MASK = 2**64 - 1
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15


def uniform_at(seed: int, position: int) -> float:
    """Uniform in [0, 1) with 53 random bits: SplitMix64 (Steele et al., OOPSLA 2014) as a counter hash.

    The seed is mixed before the position is added, so that no two seeds share a stream with a shift.
    """
    return (_mix(_mix(seed & _MASK) + _GOLDEN_GAMMA * (position + 1)) >> 11) * 2.0**-53


def _mix(value: int) -> int:
    value = (value + _GOLDEN_GAMMA) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
