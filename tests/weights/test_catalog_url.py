"""Pulls over HTTP: resume, changed files, broken and lying servers, kill -9, two at once."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pelton.core.errors import DownloadError, ModelNotFoundError
from pelton.weights.catalog import Catalog, PullPhase, PullProgress
from pelton.weights.catalog.sources import download
from tests.wait import wait_until
from tests.weights.model_server import ModelServer, serve_models

CONTENT = b"GGUF" + bytes(range(256)) * 8192  # 2 MiB and a little
SHA256 = hashlib.sha256(CONTENT).hexdigest()
PATH = "/models/tiny-model.gguf"


@pytest.fixture
def server() -> Iterator[ModelServer]:
    with serve_models() as server:
        server.files[PATH] = CONTENT
        yield server


@pytest.fixture
def catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Catalog:
    monkeypatch.setattr(download, "_RETRY_DELAY_S", 0.01)
    return Catalog(tmp_path / "cache")


def leftovers(catalog: Catalog) -> list[Path]:
    return [path for path in (catalog.store.root / ".partial").rglob("*") if path.is_file()]


def test_pull_installs_once(server: ModelServer, catalog: Catalog) -> None:
    seen: list[PullProgress] = []
    path = catalog.pull(server.url(PATH), seen.append)
    assert path.read_bytes() == CONTENT
    assert path.name == "tiny-model.gguf"
    assert [p.phase for p in seen if p.phase != PullPhase.DOWNLOADING] == ["connecting", "verifying", "done"]
    assert seen[-1].num_bytes == seen[-1].total_bytes == len(CONTENT)
    assert not leftovers(catalog)
    [model] = catalog.store.installed()
    assert (model.source, model.num_bytes, model.sha256) == (server.url(PATH), len(CONTENT), {path.name: SHA256})
    server.requests.clear()
    assert catalog.pull(server.url(PATH)) == path
    assert server.requests == []


def test_broken_connections_are_resumed(server: ModelServer, catalog: Catalog) -> None:
    server.break_after = [300_000, 500_000, 1]
    assert catalog.pull(server.url(PATH)).read_bytes() == CONTENT
    assert server.ranges_asked() == [None, "bytes=300000-", "bytes=800000-", "bytes=800001-"]


def test_server_without_ranges_starts_again(server: ModelServer, catalog: Catalog) -> None:
    server.ranges, server.break_after = False, [300_000]
    assert catalog.pull(server.url(PATH)).read_bytes() == CONTENT


def test_without_a_validator_nothing_is_resumed(server: ModelServer, catalog: Catalog) -> None:
    server.etag, server.break_after = False, [300_000]
    assert catalog.pull(server.url(PATH)).read_bytes() == CONTENT
    assert server.ranges_asked() == [None, None]


def test_file_that_changed_between_pulls(server: ModelServer, catalog: Catalog) -> None:
    server.break_after = [300_000, 0, 0, 0, 0]
    with pytest.raises(DownloadError, match="300000 bytes are kept"):
        catalog.pull(server.url(PATH))
    server.break_after = []
    server.files[PATH] = changed = b"GGUF" + b"new" * 300_000
    assert catalog.pull(server.url(PATH)).read_bytes() == changed


def test_complete_download_that_was_never_checked(server: ModelServer, catalog: Catalog) -> None:
    server.break_after = [len(CONTENT) - 1, 0, 0, 0, 0]
    with pytest.raises(DownloadError):
        catalog.pull(server.url(PATH))
    [data] = [path for path in leftovers(catalog) if path.name == "data"]
    data.write_bytes(CONTENT)
    server.break_after = []
    assert catalog.pull(server.url(PATH)).read_bytes() == CONTENT
    assert server.ranges_asked()[-1] == f"bytes={len(CONTENT)}-"


def test_hash_in_the_url(server: ModelServer, catalog: Catalog) -> None:
    with pytest.raises(DownloadError, match=f"SHA-256 {SHA256}, expected 0000"):
        catalog.pull(server.url(PATH) + "#sha256=" + "0" * 64)
    assert not leftovers(catalog)
    assert catalog.store.installed() == []
    assert catalog.pull(server.url(PATH) + "#sha256=" + SHA256.upper()).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("status", "body", "error", "message"),
    [
        (404, b"", ModelNotFoundError, "answers 404"),
        (403, b"", DownloadError, "answers 403"),
        (503, b"", DownloadError, "answers 503"),
        (200, b"<html>please log in</html>", DownloadError, "GGUF"),
        (200, b"", DownloadError, "GGUF"),
    ],
)
def test_answers_that_are_no_model(
    status: int, body: bytes, error: type[Exception], message: str, server: ModelServer, catalog: Catalog
) -> None:
    server.answers[PATH] = (status, body)
    with pytest.raises(error, match=message):
        catalog.pull(server.url(PATH))
    assert catalog.store.installed() == []


def test_only_gguf_urls(server: ModelServer, catalog: Catalog) -> None:
    with pytest.raises(ModelNotFoundError, match=r"\.gguf"):
        catalog.pull(server.url("/models/model.bin"))


def test_credentials_stay_out_of_the_manifest(server: ModelServer, catalog: Catalog) -> None:
    catalog.pull(f"http://127.0.0.1:{server.port}{PATH}?token=secret")
    [model] = catalog.store.installed()
    assert model.source == server.url(PATH)


def test_no_room_on_the_disk(server: ModelServer, catalog: Catalog) -> None:
    class Huge(bytes):
        def __len__(self) -> int:
            return 1 << 60

    server.files[PATH] = Huge(b"GGUF")
    with pytest.raises(DownloadError, match=r"needs 1,099,511,627,\d+ MiB more .* are free"):
        catalog.pull(server.url(PATH))


def test_disk_that_refuses_the_bytes(server: ModelServer, tmp_path: Path) -> None:
    code = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20));" + PULL
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "cache"), server.url(PATH)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "DownloadError" in found.stderr.splitlines()[-1]
    assert "could not be written" in found.stderr.splitlines()[-1]


PULL = """
import sys
from pelton.weights.catalog import Catalog
print(Catalog(sys.argv[1]).pull(sys.argv[2]))
"""


def start_pull(cache: Path, name: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", PULL, str(cache), name], stdout=subprocess.PIPE, text=True)


def test_killed_pull_leaves_nothing_half_valid(server: ModelServer, catalog: Catalog) -> None:
    server.delay_s = 0.05
    data = catalog.store.root / ".partial"
    process = start_pull(catalog.store.root, server.url(PATH))
    wait_until(lambda: any(p.stat().st_size > 200_000 for p in data.rglob("data")), "no bytes came")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert catalog.store.installed() == []
    [kept] = data.rglob("data")
    num_kept = kept.stat().st_size
    assert 200_000 < num_kept < len(CONTENT)
    server.delay_s = 0.0
    server.requests.clear()
    assert catalog.pull(server.url(PATH)).read_bytes() == CONTENT
    assert server.ranges_asked() == [f"bytes={num_kept}-"]
    assert not leftovers(catalog)


def test_two_pulls_at_once_download_once(server: ModelServer, catalog: Catalog) -> None:
    server.delay_s = 0.01
    pulls = [start_pull(catalog.store.root, server.url(PATH)) for _ in range(3)]
    outputs = {pull.communicate(timeout=60)[0].strip() for pull in pulls}
    assert [pull.returncode for pull in pulls] == [0, 0, 0]
    [path] = outputs
    assert Path(path).read_bytes() == CONTENT
    assert server.ranges_asked() == [None]


def test_waiting_for_another_pull_is_told(server: ModelServer, catalog: Catalog) -> None:
    server.delay_s = 0.02
    process = start_pull(catalog.store.root, server.url(PATH))
    wait_until(lambda: server.requests, "the pull did not begin")
    seen: list[PullProgress] = []
    catalog.pull(server.url(PATH), seen.append)
    assert process.wait() == 0
    assert [progress.phase for progress in seen] == [PullPhase.WAITING]
