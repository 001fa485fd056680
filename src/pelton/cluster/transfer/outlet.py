"""`Outlet`: other engines come here and ask for blocks. A thread for each of them; none waits for ever."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError

from pelton.cluster.transfer.checksum import checksums
from pelton.cluster.transfer.mover import Mover, TransferError
from pelton.cluster.transfer.wire import (
    MAX_KEYS,
    Get,
    Hello,
    Offer,
    Refused,
    Taken,
    Welcome,
    difference,
    keep_alive,
    listen,
    receive,
    send,
    unlisten,
)
from pelton.core.errors import ConfigError
from pelton.core.protocols import WantedBlocks
from pelton.engine.kv.block_hash import HASH_BYTES

MAX_LINKS = 64
# Until the other engine has said who it is, until a step has copied the blocks, until the other engine has read them.
HELLO_S = 5.0
OFFER_S = 10.0
TAKEN_S = 10.0
CLOSE_S = 2.0
ACCEPT_AGAIN_S = 0.1  # where the process has no file left for a link


class Outlet:
    def __init__(self, address: str, hello: Hello, mover: Mover) -> None:
        """Raises `ConfigError` where nobody can listen at `address`."""
        self.wake: Callable[[], None] = lambda: None
        self._address = address
        self._hello = hello
        self._mover = mover
        self._wanted: queue.SimpleQueue[WantedBlocks] = queue.SimpleQueue()
        self._pending: set[WantedBlocks] = set()
        self._links: dict[socket.socket, threading.Thread] = {}
        self._lock = threading.Lock()
        self._is_closed = False
        try:
            self._server = listen(address)
        except OSError as error:
            raise ConfigError(f"kv_listen: {address} cannot be listened at: {error.strerror or error}") from error
        self._thread = threading.Thread(target=self._accept, name="pelton-kv-listen", daemon=True)
        self._thread.start()

    def take_wanted(self) -> list[WantedBlocks]:
        wanted = []
        with contextlib.suppress(queue.Empty):
            while True:
                wanted.append(self._wanted.get_nowait())
        return wanted

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            links, pending = dict(self._links), list(self._pending)
        unlisten(self._server, self._address)
        for link in links:
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
        for wanted in pending:
            wanted.offer.cancel()
        self._thread.join()
        for thread in links.values():
            if thread.ident is not None:  # started
                thread.join(CLOSE_S)

    def _accept(self) -> None:
        while True:
            try:
                link, _ = self._server.accept()
            except OSError:
                if self._is_closed:
                    return
                time.sleep(ACCEPT_AGAIN_S)
                continue
            keep_alive(link)
            with self._lock:
                if self._is_closed or len(self._links) >= MAX_LINKS:
                    link.close()
                    continue
                thread = threading.Thread(target=self._serve, args=(link,), name="pelton-kv-send", daemon=True)
                self._links[link] = thread
            thread.start()

    def _serve(self, link: socket.socket) -> None:
        # What goes wrong ends the link; who was served by it computes what it has not got.
        try:
            with link, contextlib.suppress(OSError, TransferError):
                link.settimeout(HELLO_S)
                problem = difference(self._hello, receive(link, Hello))
                if problem is not None:
                    send(link, Refused(problem))
                    return
                description, files = self._mover.describe()
                send(link, Welcome(self._hello, description, len(self._mover.outbox)), files)
                while True:
                    link.settimeout(None)
                    get = receive(link, Get)
                    link.settimeout(TAKEN_S)
                    self._give(link, get)
        finally:
            with self._lock:
                self._links.pop(link, None)

    def _give(self, link: socket.socket, get: Get) -> None:
        if len(get.keys) > MAX_KEYS or any(len(block_hash) != HASH_BYTES for _, block_hash in get.keys):
            raise TransferError("what it asks for are no keys of blocks")
        wanted = WantedBlocks(get.keys)
        with self._lock:
            if self._is_closed:
                return
            self._pending.add(wanted)
        try:
            self._wanted.put(wanted)
            self.wake()
            try:
                slot_ids = wanted.offer.result(OFFER_S)
            except (TimeoutError, CancelledError):
                raise TransferError("the engine has not copied the blocks in time") from None
            send(link, Offer(slot_ids, tuple(checksums(self._mover.outbox, slot_ids))))
            if slot_ids:
                receive(link, Taken)
        finally:
            with self._lock:
                self._pending.discard(wanted)
            wanted.taken.set_result(None)
