"""How fast requests finish, for Retry-After."""

from __future__ import annotations

from collections import deque

WINDOW_S = 30.0
MAX_RETRY_AFTER_S = 60.0


class ServiceRate:
    """Completions within a sliding window."""

    def __init__(self) -> None:
        self._times_s: deque[float] = deque(maxlen=1024)

    def count(self, now_s: float) -> None:
        self._times_s.append(now_s)

    def time_for_s(self, num_requests: int, now_s: float) -> float:
        """Seconds until `num_requests` more will have finished, between 1 and a minute."""
        while self._times_s and self._times_s[0] < now_s - WINDOW_S:
            self._times_s.popleft()
        if not self._times_s:
            return WINDOW_S
        span_s = max(now_s - self._times_s[0], 0.1)
        return min(MAX_RETRY_AFTER_S, max(1.0, num_requests * span_s / len(self._times_s)))
