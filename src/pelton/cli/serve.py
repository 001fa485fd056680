"""`pelton serve`: the HTTP server."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from pelton.cli.flags import with_settings
from pelton.cli.pull import pull_model
from pelton.cli.settings import resolve_settings

ConfigFlag = Annotated[Path | None, Parameter(help="YAML file with settings; flags and PELTON_* variables win over it")]


@with_settings(("model", "engine", "worker", "server", "store", "transfer"))
def serve(*, config: ConfigFlag = None, **settings: Any) -> int:
    """Serve a model over HTTP, as OpenAI's API does."""
    resolved = resolve_settings(settings, os.environ, config)
    resolved.worker.require_packages()

    from pelton.build import serve as run_server

    pull_model(resolved.model)
    return run_server(resolved)
