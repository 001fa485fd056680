"""What comes from an engine that is broken, or none at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from pelton.cluster.transfer import peer, wire
from pelton.cluster.transfer.connector import PeerConnector
from tests.cluster.make import (
    BLOCK_BYTES,
    KEYS,
    fetch,
    frame,
    hello,
    peer_process,
)

Answer = Callable[[socket.socket, wire.Hello], None]


def memory(num_bytes: int, seals: int = 0) -> int:
    file = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.truncate(file, num_bytes)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
    return file


def welcome(link: socket.socket, num_slots: int = 4, file: int | None = None) -> None:
    file = memory(num_slots * BLOCK_BYTES, fcntl.F_SEAL_SHRINK) if file is None else file
    wire.send(link, wire.Welcome(hello(), b"", num_slots), [file] if file >= 0 else [])


def offer(*slot_ids: int, num_checksums: int | None = None) -> Answer:
    def answer(link: socket.socket, _: wire.Hello) -> None:
        welcome(link)
        wire.receive(link, wire.Get)
        number = len(slot_ids) if num_checksums is None else num_checksums
        wire.send(link, wire.Offer(slot_ids, (b"x" * 16,) * number))
        link.recv(1)

    return answer


ANSWERS: dict[str, tuple[Answer, str]] = {
    "noise": (lambda link, _: link.sendall(b"\x05\0\0\0noise"), "is no message"),
    "a long message": (lambda link, _: link.sendall(b"\xff\xff\xff\x7f" + b"x" * 100), "too long"),
    "no text": (
        lambda link, _: link.sendall(frame(msgspec.msgpack.encode(wire.Refused("why")).replace(b"why", b"\xff!!"))),
        "is no message",
    ),
    "a deep message": (
        lambda link, _: link.sendall(frame(b"\x83\xa4type\xa7refused\xa6reason\xa1a\xa1x" + b"\x91" * 900_000)),
        "is no message",
    ),
    "half a message": (lambda link, _: link.sendall(b"\x50\0\0\0half"), "closed the connection"),
    "another message": (lambda link, _: wire.send(link, wire.Taken()), "Welcome was expected, not Taken"),
    "another version": (
        lambda link, asked: wire.send(link, wire.Welcome(msgspec.structs.replace(asked, version=9), b"", 1)),
        "version 1 of the protocol, not 9",
    ),
    "no memory": (lambda link, _: welcome(link, file=-1), "handed over no shared memory"),
    "short memory": (lambda link, _: welcome(link, file=memory(99)), "not what it says"),
    "memory that may shrink": (lambda link, _: welcome(link, file=memory(4 * BLOCK_BYTES)), "not what it says"),
    "no slots": (lambda link, _: welcome(link, num_slots=0), "not what it says"),
    "a slot too far": (offer(4), "not in its outbox"),
    "a slot before the first": (offer(-1), "not in its outbox"),
    "more than was asked for": (offer(0, 1, 2), "other blocks than"),
    "too few checksums": (offer(0, 1, num_checksums=1), "other blocks than"),
    "checksums of something else": (offer(0), "came damaged"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_that_are_none(
    name: str, tmp_path: Path, asking: Callable[..., PeerConnector], capfd: pytest.CaptureFixture[str]
) -> None:
    answer, problem = ANSWERS[name]
    server = wire.listen(f"unix:{tmp_path / 'a'}")

    def serve() -> None:
        link, _ = server.accept()
        with link:
            answer(link, wire.receive(link, wire.Hello))

    thread = threading.Thread(target=serve)
    thread.start()
    num_files = len(os.listdir("/proc/self/fd"))
    assert fetch(asking(), KEYS[:2]) == (False, False)
    thread.join()
    server.close()
    assert problem in capfd.readouterr().err
    assert len(os.listdir("/proc/self/fd")) <= num_files + 2  # the test's own memory and the link's end


def test_an_answer_in_many_pieces_has_the_time_of_one(
    tmp_path: Path, asking: Callable[..., PeerConnector], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer, "ANSWER_S", 0.3)
    server = wire.listen(f"unix:{tmp_path / 'a'}")
    num_sent = 0

    def serve() -> None:
        nonlocal num_sent
        link, _ = server.accept()
        with link, contextlib.suppress(OSError):
            link.sendall((100).to_bytes(4, "little"))
            for num_sent in range(100):  # noqa: B007
                link.sendall(b"x")
                time.sleep(0.05)

    thread = threading.Thread(target=serve)
    thread.start()
    assert fetch(asking(), KEYS[:2]) == (False, False)
    thread.join()
    server.close()
    assert num_sent < 99


def test_nothing_that_goes_wrong_ends_who_asks(
    tmp_path: Path, asking: Callable[..., PeerConnector], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine takes what `fetch` promises on its own thread."""

    def run_out(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(peer, "checksums", run_out)
    with peer_process(tmp_path / "a"):
        connector = asking()
        assert fetch(connector, KEYS[:2]) == (False, False)
        assert not connector.can_fetch
