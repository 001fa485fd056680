"""`run_server`: uvicorn around the application, from the listening socket to the last drained request."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from functools import partial
from typing import cast

import uvicorn
import uvloop
from starlette.types import ASGIApp

from pelton.core.errors import ConfigError, PeltonError
from pelton.engine.client import EngineClient
from pelton.serving.config import ServerConfig
from pelton.serving.logs import Logger, configure_logs
from pelton.serving.middleware import with_server_send
from pelton.serving.protocol import BoundedProtocol

# For answers to leave once the engine is done with them.
FLUSH_TIMEOUT_S = 2
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_log = Logger()


class AddressError(PeltonError):
    """The server cannot listen where it was told to."""

    code = "address_unavailable"


def run_server(make_app: Callable[[], ASGIApp], client: EngineClient, config: ServerConfig) -> int:
    """Start the engine, serve, and drain on SIGTERM or SIGINT; returns the exit code.

    `make_app` runs while the engine starts, and `/live` answers as soon as it is done. A second signal ends
    the process at once. Raises `AddressError`, what `make_app` raises, or the typed error that kept the
    engine from starting.
    """
    configure_logs(config.log_level)
    _allow_connections()
    with listen(config.host, config.port) as listener, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(make_app, client, config, listener))


def _allow_connections() -> None:
    """As many open files as the system lets a process have: every connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises `AddressError`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise AddressError(f"cannot listen on {host} port {port}: {reason}; choose another --host or --port") from None
    # Connections inherit it. Head and body are written apart, and Nagle's algorithm would hold the
    # second back for 40 ms; asyncio turns it off only for sockets made in a certain way.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # A client that has vanished without a word is found out, so that its request ends.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return listener


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are ours: a drain keeps answering, where uvicorn would stop to listen first."""
        yield


async def _serve(
    make_app: Callable[[], ASGIApp], client: EngineClient, config: ServerConfig, listener: socket.socket
) -> int:
    starting = asyncio.create_task(client.start())
    try:
        server = _Server(uvicorn_config(with_server_send(await asyncio.to_thread(make_app)), config))
    except BaseException:
        await _give_up(starting)
        raise
    stop = _stop_on_signals()
    serving = asyncio.create_task(server.serve([listener]))
    host, port = listener.getsockname()[:2]
    scheme = "http" if config.ssl_certfile is None else "https"
    _log.info("listening", url=f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}")
    try:
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait((starting, stopping, serving), return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            gc.freeze()
            gc.enable()  # off where this process began for it (build.py)
            _log_ready(client)
            await asyncio.wait((stopping, serving), return_when=asyncio.FIRST_COMPLETED)
        else:
            await _give_up(starting)
        _log.info("draining", num_requests=client.num_requests)
    finally:
        await client.close(drain_timeout_s=config.drain_timeout_s)
        server.should_exit = True
        await serving
    _log.info("stopped")
    return 0


def uvicorn_config(app: ASGIApp, config: ServerConfig) -> uvicorn.Config:
    """Raises `ConfigError` for a certificate or key that cannot be used."""
    protocol = partial(
        BoundedProtocol, max_header_bytes=config.max_header_bytes, header_timeout_s=config.header_timeout_s
    )
    made = uvicorn.Config(
        app,
        http=cast("type[asyncio.Protocol]", protocol),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=FLUSH_TIMEOUT_S,
        ssl_certfile=config.ssl_certfile,
        ssl_keyfile=config.ssl_keyfile,
    )
    try:
        made.load()
    except OSError as error:  # ssl.SSLError is one
        reason = getattr(error, "reason", None) or error.strerror or error
        raise ConfigError(f"ssl_certfile and ssl_keyfile cannot be used: {reason}") from None
    return made


async def _give_up(starting: asyncio.Task[None]) -> None:
    starting.cancel()
    with contextlib.suppress(asyncio.CancelledError, PeltonError):
        await starting


def _log_ready(client: EngineClient) -> None:
    info = client.info
    assert info is not None
    _log.info(
        "ready",
        kernels=info.kernels,
        threads=info.num_threads,
        dtype=info.dtype,
        max_model_len=info.max_model_len,
        kv_cache_tokens=(info.num_blocks - 1) * info.block_size,
        max_num_seqs=info.max_num_seqs,
        load_s=round(info.load_s, 2),
    )


def _stop_on_signals() -> asyncio.Event:
    """Set by the first signal. The second ends the process; engine and helpers end with it."""
    stop = asyncio.Event()

    def take(number: int) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    for number in _SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, take, number)
    return stop
