"""Blocks between two processes by every connector that runs here, and every way in which that can go wrong."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import mmap
import os
import resource
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from pelton.cluster.config import TransferConfig
from pelton.cluster.transfer import MOVERS, cuda_ipc, nixl, outlet, peer, wire
from pelton.cluster.transfer.connector import PeerConnector
from pelton.core.errors import ConfigError
from tests.cluster.make import BLOCK_BYTES, KEYS, UNKNOWN, content, fetch, make_connector, peer_process

CONNECTORS = [
    "shared_memory",
    pytest.param("cuda_ipc", marks=pytest.mark.torch),
    pytest.param("nixl", marks=pytest.mark.skipif(find_spec("nixl") is None, reason="nixl is not installed")),
]


@pytest.fixture(scope="module")
def cuda_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.cluster import fake_cuda

    return fake_cuda.build(tmp_path_factory.mktemp("cuda"))


@pytest.fixture(params=CONNECTORS)
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """A connector, and what another process is told to use it."""
    if request.param != "cuda_ipc":
        yield {"kv_connector": request.param}
        return
    from tests.cluster.fake_cuda import FakeDriver, use

    monkeypatch.setattr(cuda_ipc, "CudaDriver", FakeDriver)
    library = str(request.getfixturevalue("cuda_library"))
    use(library)
    yield {"kv_connector": request.param, "fake_cuda": library}


@pytest.fixture
def asking(tmp_path: Path) -> Iterator[Callable[..., PeerConnector]]:
    """Makes connectors that ask at `tmp_path / "a"`."""
    made = []

    def make(**settings: Any) -> PeerConnector:
        made.append(make_connector(**({"kv_peers": (f"unix:{tmp_path / 'a'}",)} | settings)))
        return made[-1]

    yield make
    for connector in made:
        connector.close()


def test_blocks_come_whole(how: dict[str, str], tmp_path: Path, asking: Callable[..., PeerConnector]) -> None:
    with peer_process(tmp_path / "a", **how):
        connector = asking(kv_connector=how["kv_connector"])
        assert fetch(connector, KEYS[:5]) == (True,) * 5
        assert fetch(connector, KEYS[3:11]) == (True,) * 8  # the slots of the first ones again
        assert fetch(connector, UNKNOWN) == (False,)
        assert fetch(connector, [*KEYS[:2], *UNKNOWN]) == (True, True, False)
        assert connector.can_fetch


def test_an_outbox_of_three_slots_serves_two_readers(
    how: dict[str, str], tmp_path: Path, asking: Callable[..., PeerConnector]
) -> None:
    with peer_process(tmp_path / "a", **how, num_slots=3):
        connector = asking(kv_connector=how["kv_connector"], num_slots=40)
        futures = [connector.fetch(list(range(low, low + 8)), KEYS[low : low + 8]) for low in range(0, 40, 8)]
        for future in futures:
            result = future.result(20)
            # A source that has no slot at all for the moment offers nothing: `KVTransfer` would wait.
            assert list(result.loaded) == sorted(result.loaded, reverse=True)
        assert sum(map(sum, (future.result().loaded for future in futures))) >= 8


@pytest.mark.parametrize("problem", ["damage", "cut"])
def test_what_was_changed_on_its_way_is_not_taken(
    how: dict[str, str],
    problem: str,
    tmp_path: Path,
    asking: Callable[..., PeerConnector],
    capfd: pytest.CaptureFixture[str],
) -> None:
    with peer_process(tmp_path / "a", **how, problem=problem):
        connector = asking(kv_connector=how["kv_connector"])
        assert fetch(connector, KEYS[:3]) == (True, False, False)
        assert not connector.can_fetch  # for a while
    assert "a KV block came damaged" in capfd.readouterr().err


def test_an_engine_killed_in_mid_transfer(
    how: dict[str, str], tmp_path: Path, asking: Callable[..., PeerConnector]
) -> None:
    """What had come is used, what had not is computed, nobody waits; and another one at its address is found."""
    path = tmp_path / "a"
    with peer_process(path, **how, problem="die", num_slots=3) as process:
        connector = asking(kv_connector=how["kv_connector"])
        assert fetch(connector, KEYS[:8]) == (True,) * 3 + (False,) * 5
        assert process.wait(10) == -signal.SIGKILL
        assert not connector.can_fetch
        assert fetch(connector, KEYS[:8]) == (False,) * 8
    with peer_process(path, **how):  # where a dead one's socket lies
        wait_until(lambda: connector.can_fetch and fetch(connector, KEYS[:8]) == (True,) * 8)


def wait_until(is_so: Callable[[], bool]) -> None:
    for _ in range(1000):
        if is_so():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come to that")


@pytest.mark.parametrize("is_frozen", [False, True])
def test_an_engine_without_answers(
    is_frozen: bool, tmp_path: Path, asking: Callable[..., PeerConnector], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer, "ANSWER_S", 0.3)
    with peer_process(tmp_path / "a", problem="" if is_frozen else "hang") as process:
        connector = asking()
        if is_frozen:
            assert fetch(connector, KEYS[:2]) == (True, True)
            process.send_signal(signal.SIGSTOP)
        assert fetch(connector, KEYS[:2]) == (False, False)
        assert not connector.can_fetch


def test_nobody_there(asking: Callable[..., PeerConnector], capfd: pytest.CaptureFixture[str]) -> None:
    connector = asking()
    for _ in range(3):
        assert connector.can_fetch
        assert fetch(connector, KEYS[:2]) == (False, False)
        assert not connector.can_fetch
        wait_until(lambda: connector.can_fetch)
    assert capfd.readouterr().err.count("No such file") == 1  # it says so once


def test_the_next_peer_has_the_rest(tmp_path: Path, asking: Callable[..., PeerConnector]) -> None:
    with peer_process(tmp_path / "b", problem="damage"), peer_process(tmp_path / "c"):
        connector = asking(kv_peers=tuple(f"unix:{tmp_path / name}" for name in "abc"))
        assert fetch(connector, KEYS[:4]) == (True,) * 4


@pytest.mark.parametrize("theirs", [{"identity": "other model"}, {"kv_connector": "nixl"}])
def test_another_model_is_refused(
    theirs: dict[str, Any],
    tmp_path: Path,
    asking: Callable[..., PeerConnector],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if "kv_connector" in theirs:
        monkeypatch.setitem(MOVERS, "nixl", MOVERS["shared_memory"])
    with peer_process(tmp_path / "a"):
        assert fetch(asking(**theirs), KEYS[:2]) == (False, False)
    said = capfd.readouterr().err
    assert ("model" if "identity" in theirs else "connector is shared_memory, not nixl") in said


# -- what comes from an engine that is broken or none at all -------------------------------------------


Answer = Callable[[socket.socket, wire.Hello], None]


def hello() -> wire.Hello:
    identity = hashlib.blake2b(b"model", digest_size=16).digest()
    return wire.Hello(wire.VERSION, "shared_memory", identity, BLOCK_BYTES)


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


# -- what comes from those who ask ----------------------------------------------------------------------


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[PeerConnector]:
    connector = make_connector(kv_listen=f"unix:{tmp_path / 'a'}")
    yield connector
    connector.close()


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
        link.sendall(data if name in ("noise", "a long message") else len(data).to_bytes(4, "little") + data)
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


def wait_for_wanted(connector: PeerConnector) -> list[Any]:
    found: list[Any] = []
    wait_until(lambda: bool(found.extend(connector.take_wanted()) or found))
    return found


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


def test_shared_memory_that_cannot_be_had(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (BLOCK_BYTES, limits[1]))
    try:
        with pytest.raises(ConfigError, match="GiB of shared memory cannot be had: File too large"):
            make_connector(kv_listen=f"unix:{tmp_path / 'a'}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with pytest.raises(ConfigError, match="too little for one KV block"):
        make_connector(num_slots=0, kv_listen=f"unix:{tmp_path / 'a'}")


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"kv_listen": "here"}, "must be unix:/path or tcp:host:port"),
        ({"kv_peers": ("tcp:host",)}, "must be unix:/path or tcp:host:port"),
        ({"kv_peers": ("tcp:host:99999",)}, "must be unix:/path or tcp:host:port"),
        ({"kv_peers": ("tcp:host:1",)}, "works on one host"),
        ({"kv_listen": "unix:/a", "kv_peers": ("unix:/a",)}, "own address"),
        ({"kv_transfer_gb": 0.0}, "must be positive"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        make_connector(**settings) if "kv_transfer_gb" not in settings else TransferConfig(**settings)


def test_nixl_that_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(nixl, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'pelton\[nixl\]'"):
        make_connector(kv_connector="nixl", kv_listen=f"unix:{tmp_path / 'a'}")


@pytest.mark.skipif(find_spec("nixl") is None, reason="nixl is not installed")
def test_nixl_over_tcp() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"tcp:127.0.0.1:{free.getsockname()[1]}"
    source = make_connector(kv_connector="nixl", kv_listen=address)
    connector = make_connector(kv_connector="nixl", kv_peers=(address,))
    future = connector.fetch([0, 1], KEYS[:2])
    (wanted,) = wait_for_wanted(source)
    for slot_id in (5, 6):
        source.outbox[slot_id][:] = content(KEYS[slot_id - 5])
    wanted.offer.set_result((5, 6))
    assert future.result(20).loaded == (True, True)
    assert (connector.inbox[1] == content(KEYS[1])).all()
    connector.close()
    source.close()


class DeviceMemory:
    """What is written is there once somebody has waited for it."""

    is_cuda, device = True, "cuda:0"

    def __init__(self, num_slots: int, queued: list[Callable[[], None]]) -> None:
        self.values = [-1] * num_slots
        self.queued = queued

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> DeviceSlot:
        return DeviceSlot(self, index)


class DeviceSlot:
    def __init__(self, memory: DeviceMemory, index: int) -> None:
        self.memory, self.index = memory, index

    def __setitem__(self, _: slice, source: DeviceSlot) -> None:
        def write() -> None:
            self.memory.values[self.index] = source.memory.values[source.index]

        self.memory.queued.append(write)


@pytest.mark.torch
def test_nixl_waits_for_a_device_before_it_reads_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    queued: list[Callable[[], None]] = []

    class FakeStream:
        def __init__(self, _: object) -> None:
            pass

        def synchronize(self) -> None:
            while queued:
                queued.pop(0)()

    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    bounce = DeviceMemory(16, queued)

    class FakeMover:
        inbox = DeviceMemory(40, queued)

        def read(self, _: str, __: object, slot_ids: list[int], bounce: DeviceMemory) -> None:
            bounce.values[: len(slot_ids)] = slot_ids

    remote: Any = None
    outbox = nixl.NixlOutbox(FakeMover(), "other", remote, (bounce, None))  # type: ignore[arg-type]
    outbox.read(list(range(100, 140)), list(range(40)))
    assert FakeMover.inbox.values == list(range(100, 140))
