"""A server over a scripted engine, a process: `python -m tests.serving.child PORT DELAY_S DRAIN_S [DATA_DIR [URL]]`."""

from __future__ import annotations

import sys

from pelton.core.errors import PeltonError
from pelton.engine.client import EngineClient
from pelton.engine.thread import ThreadTransport
from pelton.serving.app import create_app
from pelton.serving.config import ServerConfig
from pelton.serving.context import ModelCard
from pelton.serving.server import run_server
from pelton.store.config import StoreConfig
from pelton.store.opener import Store
from tests.make import make_engine
from tests.serving.make import TEMPLATE, ByteTokenizer, ScriptedExecutor


def main() -> int:
    port, delay_s, drain_s = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
    config = ServerConfig(port=port, drain_timeout_s=drain_s)
    data_dir, database_url = (*sys.argv[4:], None, None)[:2]
    store = Store(StoreConfig(data_dir=data_dir or "/nonexistent", database_url=database_url or None))

    def build() -> object:
        if delay_s < 0:
            raise PeltonError("told to fail")
        return make_engine(executor=ScriptedExecutor(delay_s=delay_s), max_model_len=2048, num_blocks=4096)

    client = EngineClient(ThreadTransport(build), restart=False)  # type: ignore[arg-type]
    model = ModelCard(names=("scripted",), root="scripted", max_model_len=2048, created=1)
    app = create_app(client, ByteTokenizer(), model, config, chat_template=TEMPLATE, store=store)  # type: ignore[arg-type]
    try:
        return run_server(lambda: app, client, config)
    except PeltonError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
