"""Main of the engine's process; `engine/process.py` starts it and talks to it."""

from __future__ import annotations

import os
import sys

from pelton.build import build_engine_from_settings
from pelton.engine.child import run_engine_process

# Read when torch loads its OpenMP: threads that spin while idle would take cores from the native kernels'
# threads, and from every other process.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if __name__ == "__main__":
    sys.exit(run_engine_process(build_engine_from_settings))
