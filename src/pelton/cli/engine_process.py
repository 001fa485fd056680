"""Main of the engine's process; `engine/process.py` starts it and talks to it."""

from __future__ import annotations

import sys

from pelton.build import build_engine_from_settings
from pelton.engine.process import run_engine_process

if __name__ == "__main__":
    sys.exit(run_engine_process(build_engine_from_settings))
