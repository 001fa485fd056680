"""How long to keep a session's KV after a turn: pure maths over the pauses seen so far.

Continuum (arXiv 2511.02230): keep for tau* = argmax P(tau) * (T * eta + PR) - tau over the observed durations
and 0. P is the empirical distribution of pauses, PR the seconds to have the context back, T the mean queue
delay of turns that came back to find it gone, eta how far the number of turns left falls with those done.
A session that never came back counts as an endless pause, so that P stays below 1.
"""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections import OrderedDict, deque
from collections.abc import Sequence

# Continuum's cold start: with no more observations than this, a coarser distribution is used.
MIN_OBSERVATIONS = 100
# What a distribution remembers; older pauses are forgotten.
MAX_OBSERVATIONS = 512
MAX_TOOLS = 64
MAX_TENANTS = 1024
# A mean or correlation counts an observation half after so many later ones.
_DECAY: float = 0.5 ** (1 / 64)


def best_keep_s(pauses_s: Sequence[float], gain_s: float, limit_s: float = math.inf) -> float:
    """tau* over ascending `pauses_s` (math.inf: never came back) and 0, none above `limit_s`.

    `gain_s` is T * eta + PR: what it saves to find the context in place.
    """
    best_s, best_gain_s = 0.0, 0.0
    num_pauses = len(pauses_s)
    for index, pause_s in enumerate(pauses_s):
        if pause_s > limit_s or pause_s >= gain_s:  # P is 1 at most
            break
        # Of equal pauses the last one counts them all.
        net_s = (index + 1) / num_pauses * gain_s - pause_s
        if net_s > best_gain_s:
            best_s, best_gain_s = pause_s, net_s
    return best_s


def default_keep_s(gain_s: float, limit_s: float = math.inf) -> float:
    """tau* where nothing is known and pauses are taken for Exp(1): max(0, ln(T + PR)), with eta = 1."""
    return min(limit_s, math.log(gain_s)) if gain_s > 1.0 else 0.0


class _Window:
    """The latest pauses, in order of time and of length."""

    def __init__(self) -> None:
        self.ascending_s: list[float] = []
        self._latest: deque[float] = deque()

    def add(self, pause_s: float) -> None:
        insort(self.ascending_s, pause_s)
        self._latest.append(pause_s)
        if len(self._latest) > MAX_OBSERVATIONS:
            del self.ascending_s[bisect_right(self.ascending_s, self._latest.popleft()) - 1]


class _TenantPauses:
    def __init__(self) -> None:
        self.all = _Window()
        self.by_tool: OrderedDict[str, _Window] = OrderedDict()


class PauseTimes:
    """Pauses by tenant and tool. Apart, because one tenant's tools must not decide over another's KV."""

    def __init__(self, min_observations: int = MIN_OBSERVATIONS) -> None:
        self._min_observations = min_observations
        self._tenants: OrderedDict[str, _TenantPauses] = OrderedDict()

    def observe(self, tenant_id: str, tool_name: str | None, pause_s: float) -> None:
        """A session came back after `pause_s`, or never did (math.inf); `tool_name` is what it waited for."""
        tenant = self._tenants.pop(tenant_id, None) or _TenantPauses()
        self._tenants[tenant_id] = tenant
        if len(self._tenants) > MAX_TENANTS:
            self._tenants.popitem(last=False)
        tenant.all.add(pause_s)
        if tool_name is None:
            return
        window = tenant.by_tool.pop(tool_name, None) or _Window()
        tenant.by_tool[tool_name] = window
        if len(tenant.by_tool) > MAX_TOOLS:
            tenant.by_tool.popitem(last=False)
        window.add(pause_s)

    def keep_s(self, tenant_id: str, tool_name: str | None, gain_s: float, limit_s: float) -> float:
        """How long it pays to keep a context; by the tool's pauses, else the tenant's, else by default."""
        tenant = self._tenants.get(tenant_id)
        if tenant is None or len(tenant.all.ascending_s) <= self._min_observations:
            return default_keep_s(gain_s, limit_s)
        window = tenant.by_tool.get(tool_name) if tool_name is not None else None
        if window is None or len(window.ascending_s) <= self._min_observations:
            window = tenant.all
        return best_keep_s(window.ascending_s, gain_s, limit_s)


class QueueDelay:
    """T: sliding mean of the seconds that turns waited whose KV was gone when they came back."""

    def __init__(self) -> None:
        self._sum = 0.0
        self._weight = 0.0

    def observe(self, delay_s: float) -> None:
        self._sum = self._sum * _DECAY + delay_s
        self._weight = self._weight * _DECAY + 1.0

    @property
    def mean_s(self) -> float:
        return self._sum / self._weight if self._weight else 0.0


class TurnCorrelation:
    """eta = -Corr(k, N - k) over turns k of ended sessions of N turns: 1 where N is fixed, 0 where it is geometric."""

    def __init__(self) -> None:
        self._sums = [0.0] * 6  # of 1, k, N - k, k^2, (N - k)^2, k * (N - k)

    def observe(self, num_turns: int) -> None:
        """A session ended after N = `num_turns` turns: its pairs (k, N - k) for k = 1 .. N, in closed form."""
        n = float(num_turns)
        sum_k = n * (n + 1) / 2
        sum_rest = n * (n - 1) / 2
        sum_k2 = n * (n + 1) * (2 * n + 1) / 6
        sum_rest2 = (n - 1) * n * (2 * n - 1) / 6
        new = (n, sum_k, sum_rest, sum_k2, sum_rest2, n * sum_k - sum_k2)
        self._sums = [old * _DECAY + value for old, value in zip(self._sums, new, strict=True)]

    @property
    def eta(self) -> float:
        """Between 0 and 1; 1 until there is something to tell."""
        n, k, rest, k2, rest2, product = self._sums
        variance = (n * k2 - k * k) * (n * rest2 - rest * rest)
        if variance <= 1e-9:
            return 1.0
        return min(1.0, max(0.0, -(n * product - k * rest) / math.sqrt(variance)))
