"""What comes from those who ask, and the address where they do."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import socket
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from pelton.cluster.transfer import outlet, wire
from pelton.cluster.transfer.connector import PeerConnector
from pelton.core.errors import ConfigError
from tests.cluster.make import (
    BLOCK_BYTES,
    KEYS,
    content,
    frame,
    hello,
    make_connector,
    wait_for_wanted,
    wait_until,
)


def link_to(path: Path) -> socket.socket:
    link = wire.connect(f"unix:{path}", 5.0)
    wire.send(link, hello())
    _, files = wire.receive_with_files(link, wire.Welcome)
    for file in files:
        os.close(file)
    return link


QUESTIONS: dict[str, bytes] = {
    "noise": b"\x05\0\0\0noise",
    "a long message": b"\xff\xff\xff\x7f" + b"x" * 100,
    "too many keys": msgspec.msgpack.encode(wire.Get(((0, b"k" * 16),) * 2000)),
    "a private key": msgspec.msgpack.encode(wire.Get(((0, b"k" * 17),))),
    "another message": msgspec.msgpack.encode(wire.Taken()),
}


@pytest.mark.parametrize("name", QUESTIONS)
@pytest.mark.usefixtures("listening")
def test_questions_that_are_none_end_the_link(name: str, tmp_path: Path, listening: PeerConnector) -> None:
    data = QUESTIONS[name]
    with link_to(tmp_path / "a") as link:
        link.sendall(data if name in ("noise", "a long message") else frame(data))
        with contextlib.suppress(ConnectionResetError):  # it has not read all
            assert link.recv(1) == b""
    assert not listening.take_wanted()


def test_who_never_says_that_it_has_read(
    tmp_path: Path, listening: PeerConnector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outlet, "TAKEN_S", 0.2)
    with link_to(tmp_path / "a") as link:
        wire.send(link, wire.Get(tuple(KEYS[:2])))
        (wanted,) = wait_for_wanted(listening)
        wanted.offer.set_result((0, 1))
        assert len(wire.receive(link, wire.Offer).checksums) == 2
        wanted.taken.result(10)


def test_who_is_gone_before_its_blocks_are_there(
    tmp_path: Path, listening: PeerConnector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outlet, "OFFER_S", 0.2)
    with link_to(tmp_path / "a") as link:
        wire.send(link, wire.Get(tuple(KEYS[:2])))
        (wanted,) = wait_for_wanted(listening)
    wanted.taken.result(10)
    wanted.offer.set_result((0, 1))  # nobody minds


def test_others_cannot_write_what_they_read(tmp_path: Path, listening: PeerConnector) -> None:
    listening.outbox[0][:] = content(KEYS[0])
    with wire.connect(f"unix:{tmp_path / 'a'}", 5.0) as link:
        wire.send(link, hello())
        found, (file,) = wire.receive_with_files(link, wire.Welcome)
    size = found.num_slots * BLOCK_BYTES
    with pytest.raises(PermissionError):
        mmap.mmap(file, size)
    with pytest.raises(PermissionError):
        os.ftruncate(file, 10)
    assert (np.frombuffer(mmap.mmap(file, size, prot=mmap.PROT_READ), np.uint8)[:BLOCK_BYTES] == content(KEYS[0])).all()
    os.close(file)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600


def test_an_address_that_is_taken(tmp_path: Path, listening: PeerConnector) -> None:
    with pytest.raises(ConfigError, match="another engine listens there"):
        make_connector(kv_listen=f"unix:{tmp_path / 'a'}")
    with pytest.raises(ConfigError, match="kv_listen"):
        make_connector(kv_listen=f"unix:{tmp_path / 'no folder' / 'a'}")
    listening.close()
    assert not (tmp_path / "a").exists()
    make_connector(kv_listen=f"unix:{tmp_path / 'a'}").close()


def test_a_file_at_the_address_is_kept(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a model, say")
    with pytest.raises(ConfigError, match="there is a file, and no socket"):
        make_connector(kv_listen=f"unix:{tmp_path / 'a'}")
    assert (tmp_path / "a").read_text() == "a model, say"


def test_the_path_goes_while_it_is_still_its_own(
    tmp_path: Path, listening: PeerConnector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later it may be the next engine's, which takes a path that nobody listens at."""
    unlink, was_own = os.unlink, []

    def note(path: str) -> None:
        with contextlib.suppress(OSError):
            wire.connect(f"unix:{path}", 5.0).close()
            was_own.append(path)
        unlink(path)

    monkeypatch.setattr(os, "unlink", note)
    listening.close()
    assert was_own == [str(tmp_path / "a")]


def test_no_file_left_for_a_link(tmp_path: Path, listening: PeerConnector, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits between attempts."""
    own: Any = listening._outlet
    sleeps: list[float] = []
    monkeypatch.setattr(outlet, "time", SimpleNamespace(sleep=sleeps.append))

    class Full:
        def accept(self) -> None:
            own._is_closed = len(sleeps) == 3
            raise OSError(errno.EMFILE, "too many")

    server, own._server = own._server, Full()
    wire.connect(f"unix:{tmp_path / 'a'}", 5.0).close()
    own._thread.join(10)
    own._server = server
    assert sleeps == [outlet.ACCEPT_AGAIN_S] * 3


def test_links_over_a_network_end_with_the_other_host() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"tcp:127.0.0.1:{free.getsockname()[1]}"
    source = outlet.Outlet(address, hello(), SimpleNamespace())  # type: ignore[arg-type]
    with wire.connect(address, 5.0):
        wait_until(lambda: bool(source._links))
        (link,) = source._links
        assert link.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    source.close()
