"""A helper that waits for something else: `python -m tests.serving.sleepy_helper FD`."""

from __future__ import annotations

import time

from pelton.serving.helper_worker import run_helper


def answer(frame: bytes) -> bytes:
    if frame == b"sleep":
        time.sleep(0.6)
    while frame == b"compute":
        pass
    return frame


if __name__ == "__main__":
    run_helper(lambda _: answer)
