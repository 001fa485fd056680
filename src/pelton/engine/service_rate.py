"""How fast requests finish, for Retry-After and for deadlines."""

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

    def expected_s(self, num_requests: int, now_s: float) -> float | None:
        """Seconds until `num_requests` more will have finished; None: nothing has, lately."""
        while self._times_s and self._times_s[0] < now_s - WINDOW_S:
            self._times_s.popleft()
        if not self._times_s:
            return None
        return num_requests * max(now_s - self._times_s[0], 0.1) / len(self._times_s)

    def time_for_s(self, num_requests: int, now_s: float) -> float:
        """The same between 1 second and a minute, as one would ask a client to wait."""
        expected_s = self.expected_s(num_requests, now_s)
        return WINDOW_S if expected_s is None else min(MAX_RETRY_AFTER_S, max(1.0, expected_s))
