"""Main of a rank's process; `sharded.py` starts it and talks to it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from pelton.core.errors import PeltonError
from pelton.worker.executors.build_worker import build_rank
from pelton.worker.executors.sharded import serve_rank

_LAST_STEP_S = 10.0
_LOOK_S = 1.0


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first rank ends this one, after its last step
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    # What is written by accident goes where errors go: standard output is for answers.
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    settings = sys.stdin.buffer.readline()
    try:
        executor = build_rank(settings, lambda: answers.write(b"ready\n"))
    except PeltonError as error:
        print(f"a rank cannot start: {error}", file=sys.stderr)
        return 1
    serve_rank(executor, sys.stdin.buffer, answers.write)
    # A step that waits for ranks that are gone must not keep the process.
    threading.Timer(_LAST_STEP_S, os._exit, (1,)).start()
    executor.close()
    os._exit(0)


def _end_with_parent(parent_id: int) -> None:
    """A rank that waits for others, and not for commands, would not hear that the first one is gone."""
    while os.getppid() == parent_id:
        time.sleep(_LOOK_S)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
