"""Waiting for what another thread or process does."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(is_so: Callable[[], object], what: str = "it does not come to pass", timeout_s: float = 30.0) -> None:
    """Looks every few milliseconds; fails with `what` once the time is up."""
    deadline_s = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.005)


def is_alive(pid: int) -> bool:
    """Whether a process goes on: one that has ended may be left with nobody to ask how."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
