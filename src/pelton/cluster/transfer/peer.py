"""`Peer`: an engine that is asked for blocks, and the links to it."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence

from pelton.cluster.transfer.checksum import checksums
from pelton.cluster.transfer.mover import LinkClosedError, Mover, RemoteOutbox, TransferError
from pelton.cluster.transfer.wire import (
    Get,
    Hello,
    Offer,
    Taken,
    Welcome,
    connect,
    difference,
    receive,
    receive_with_files,
    send,
)
from pelton.core.batch import BlockKey

CONNECT_S = 1.0
# The longest that any answer is waited for; a request stops to wait for its blocks long before.
ANSWER_S = 5.0
# An engine that cannot be reached, or whose blocks cannot be used, is left alone for so long, and for so many times
# what it took to find that out: requests wait meanwhile.
RETRY_S = 1.0
RETRY_TIMES = 4.0


class Peer:
    """Callable from several threads, each of which has a link of its own."""

    def __init__(self, address: str, hello: Hello, mover: Mover) -> None:
        self.address = address
        self._hello = hello
        self._mover = mover
        self._own = threading.local()
        self._links: set[Link] = set()
        self._lock = threading.Lock()
        self._paused_until_s = 0.0
        self._problem = ""  # that was complained of last
        self._is_closed = False

    @property
    def is_paused(self) -> bool:
        return time.monotonic() < self._paused_until_s

    def fetch(self, slot_ids: Sequence[int], keys: Sequence[BlockKey]) -> tuple[int, float]:
        """Bring the first so many of `keys` that the other engine has into inbox slots; returns how many are there
        and whole, and how long they were read."""
        num_loaded, read_s = 0, 0.0
        start_s = time.monotonic()
        while True:
            is_new = self._open_link() is None
            try:
                for number, elapsed_s in self._link().fetch(slot_ids, keys):
                    num_loaded += number
                    read_s += elapsed_s
                self._problem = ""
            # Not only what it should raise: an exception would end the engine that asks.
            except Exception as error:
                self._close_link()
                if isinstance(error, ConnectionError | LinkClosedError) and not is_new and not num_loaded:
                    continue  # that link was one to an engine that has been started again since
                problem = getattr(error, "strerror", None) or str(error) or type(error).__name__
                self._pause(problem, max(RETRY_S, RETRY_TIMES * (time.monotonic() - start_s)))
            return num_loaded, read_s

    def _open_link(self) -> Link | None:
        link: Link | None = getattr(self._own, "link", None)
        return link

    def _link(self) -> Link:
        link = self._open_link()
        if link is None:
            link = Link(self.address, self._hello, self._mover)
            with self._lock:
                if self._is_closed:
                    link.close()
                    raise TransferError("closed")
                self._links.add(link)
            self._own.link = link
        return link

    def _close_link(self) -> None:
        link = self._open_link()
        if link is not None:
            self._own.link = None
            with self._lock:
                self._links.discard(link)
            link.close()

    def _pause(self, problem: str, retry_s: float) -> None:
        self._paused_until_s = time.monotonic() + retry_s
        if problem != self._problem and not self._is_closed:
            self._problem = problem
            print(
                f"pelton: no KV blocks from {self.address}: {problem}; tried again after {retry_s:.0f} s",
                file=sys.stderr,
                flush=True,
            )

    def interrupt(self) -> None:
        """End what its threads wait for, and begin nothing more."""
        with self._lock:
            self._is_closed = True
            for link in self._links:
                link.interrupt()

    def close(self) -> None:
        """No thread is in it any more."""
        for link in self._links:
            link.close()


class Link:
    """A connection to another engine, and its outbox."""

    def __init__(self, address: str, hello: Hello, mover: Mover) -> None:
        """Raises `OSError`, `TransferError`."""
        self._mover = mover
        self._socket = connect(address, CONNECT_S)
        self._outbox: RemoteOutbox | None = None
        try:
            self._socket.settimeout(ANSWER_S)
            send(self._socket, hello)
            welcome, files = receive_with_files(self._socket, Welcome)
            if (problem := difference(hello, welcome.hello)) is not None:
                for file in files:
                    os.close(file)
                raise TransferError(problem)
            self._num_slots = welcome.num_slots
            self._outbox = mover.open(welcome.description, files, welcome.num_slots)
        except BaseException:
            self._socket.close()
            raise

    def fetch(self, slot_ids: Sequence[int], keys: Sequence[BlockKey]) -> Iterator[tuple[int, float]]:
        """As `Peer.fetch`, for each offer. Raises `OSError` and `TransferError`."""
        assert self._outbox is not None
        start = 0
        while start < len(keys):
            send(self._socket, Get(tuple(keys[start:])))
            offer = receive(self._socket, Offer)
            if not offer.slot_ids:
                return
            self._check(offer, len(keys) - start)
            inbox_ids = slot_ids[start : start + len(offer.slot_ids)]
            start_s = time.perf_counter()
            self._outbox.read(offer.slot_ids, inbox_ids)
            found = checksums(self._mover.inbox, inbox_ids)
            elapsed_s = time.perf_counter() - start_s
            send(self._socket, Taken())
            whole = [own == theirs for own, theirs in zip(found, offer.checksums, strict=True)]
            yield [*whole, False].index(False), elapsed_s
            if not all(whole):
                raise TransferError("a KV block came damaged")
            start += len(offer.slot_ids)

    def _check(self, offer: Offer, num_wanted: int) -> None:
        if len(offer.slot_ids) > num_wanted or len(offer.slot_ids) != len(offer.checksums):
            raise TransferError("it offers other blocks than it was asked for")
        if not all(0 <= slot_id < self._num_slots for slot_id in offer.slot_ids):
            raise TransferError("it offers blocks that are not in its outbox")

    def interrupt(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()
        if self._outbox is not None:
            self._outbox.close()
            self._outbox = None
