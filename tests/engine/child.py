"""An engine process over a `ContextExecutor`: what `ProcessTransport` starts in tests.

Settings: arguments of `make_engine`, `delay_s` of a step, `fail` to refuse to start, `hang` to start for ever.
"""

from __future__ import annotations

import sys
import time

import msgspec

from pelton.core.errors import ConfigError
from pelton.engine.child import run_engine_process
from pelton.engine.engine import Engine
from tests.make import ContextExecutor, make_engine


def build(settings: bytes) -> Engine:
    options = msgspec.json.decode(settings)
    if options.pop("fail", False):
        raise ConfigError("told to fail")
    if options.pop("hang", False):
        time.sleep(10**6)
    executor = ContextExecutor(delay_s=options.pop("delay_s", 0.0), in_thread=True)
    return make_engine(executor=executor, **options)


if __name__ == "__main__":
    sys.exit(run_engine_process(build))
