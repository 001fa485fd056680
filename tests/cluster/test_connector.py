"""Blocks between two processes by every connector that runs here, and every way in which that can go wrong."""

from __future__ import annotations

import contextlib
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest

from pelton.cluster.config import TransferConfig
from pelton.cluster.transfer import MOVERS, cuda_ipc, nixl, peer
from pelton.cluster.transfer.connector import PeerConnector
from pelton.cluster.transfer.mover import MoverSize, TransferError
from pelton.core.errors import ConfigError
from tests.cluster.make import (
    BLOCK_BYTES,
    KEYS,
    UNKNOWN,
    content,
    fetch,
    make_connector,
    peer_process,
    wait_for_wanted,
    wait_until,
)

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


@pytest.mark.parametrize("is_frozen", [False, True])
def test_an_engine_without_answers(
    is_frozen: bool, tmp_path: Path, asking: Callable[..., PeerConnector], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer, "ANSWER_S", 0.3)
    monkeypatch.setattr(peer, "RETRY_S", 0.0)  # what it has cost counts
    with peer_process(tmp_path / "a", problem="" if is_frozen else "hang") as process:
        connector = asking()
        if is_frozen:
            assert fetch(connector, KEYS[:2]) == (True, True)
            process.send_signal(signal.SIGSTOP)
            wait_until(lambda: Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T")
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


@pytest.mark.parametrize("connector", MOVERS)
def test_another_system(connector: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(ConfigError, match="work on Linux only, not on darwin"):
        make_connector(kv_connector=connector, kv_listen=f"unix:{tmp_path / 'a'}")


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


def test_nixl_keeps_no_memory_of_a_link_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[Any] = []

    class Agent:
        def __init__(self, *_: Any) -> None: ...

        def register_memory(self, regions: Any, _: str) -> Any:
            registered.append(regions)
            return regions

        def deregister_memory(self, regions: Any) -> None:
            registered.remove(regions)

        def add_remote_agent(self, _: bytes) -> None:
            raise RuntimeError("no way there")

    api: Any = ModuleType("nixl._api")
    api.nixl_agent, api.nixl_agent_config = Agent, lambda backends: backends
    monkeypatch.setattr(nixl, "find_spec", lambda _: True)
    monkeypatch.setattr(nixl, "import_module", lambda _: api)
    mover = nixl.NixlMover(MoverSize(4, 0, BLOCK_BYTES), "cpu")
    with pytest.raises(TransferError, match="no way there"):
        mover.open(msgspec.msgpack.encode(nixl._Description(b"", 0, "DRAM", 0)), (), 4)
    assert not registered


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
