"""A server for test_peers.py.   usage: fake_peer.py NAME PORT   (the name "broken" ends at once)"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from aiohttp import web

from tests.bench.server import FakeServer


def main(name: str, port: int) -> None:
    if name == "broken":
        sys.exit("cannot load the model")
    server = FakeServer()
    app = web.Application()
    app.router.add_post("/v1/completions", server.completions)
    app.router.add_get("/v1/models", server.models)
    web.run_app(app, host="127.0.0.1", port=port, print=None)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
