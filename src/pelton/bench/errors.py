"""Why a measurement could not be made."""

from __future__ import annotations

from pelton.core.errors import PeltonError


class BenchError(PeltonError):
    """The server cannot be reached, refuses the workload, or failed all of it."""

    code = "bench_failed"
