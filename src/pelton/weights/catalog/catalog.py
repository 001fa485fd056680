"""`Catalog`: what can be pulled and what is there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from pelton.core.errors import ModelNotFoundError
from pelton.weights.catalog.entries import ENTRIES, CatalogEntry
from pelton.weights.catalog.local import try_local_model
from pelton.weights.catalog.progress import ProgressCallback, no_progress
from pelton.weights.catalog.pull import pull_model
from pelton.weights.catalog.sources import SOURCE_PARSERS, Source, WantedFile
from pelton.weights.catalog.store import InstalledModel, ModelStore


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDetails:
    """What is known of a model. The fields after `path` are None until it is pulled."""

    name: str
    description: str = ""
    license: str = ""
    aliases: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    num_bytes: int | None = None
    path: Path | None = None
    sha256: dict[str, str] | None = None
    pulled_at: str | None = None
    architecture: str | None = None
    quantization: str | None = None
    max_model_len: int | None = None
    num_layers: int | None = None
    vocab_size: int | None = None

    @property
    def installed(self) -> bool:
        return self.path is not None


class Catalog:
    """Safe to use from several processes: pulls of one model take turns."""

    def __init__(self, cache_dir: str | Path | None = None, entries: tuple[CatalogEntry, ...] = ENTRIES) -> None:
        self.store = ModelStore(cache_dir)
        self.entries = entries

    def find(self, name: str) -> CatalogEntry | None:
        wanted = name.lower()
        for entry in self.entries:
            if wanted in (entry.name.lower(), *(alias.lower() for alias in entry.aliases)):
                return entry
        return None

    def list(self) -> list[ModelDetails]:
        """The built-in models, then others that were pulled; reads no model file."""
        known = [_details(entry, self.store.try_installed(entry.name)) for entry in self.entries]
        names = {entry.name for entry in self.entries}
        return known + [_details(None, model) for model in self.store.installed() if model.name not in names]

    def show(self, name: str) -> ModelDetails:
        """A built-in, a pulled or a local model; of one on disk, what its file says too."""
        entry = self.find(name)
        if (path := try_local_model(name)) is not None:
            return _with_header(ModelDetails(name=name, path=path, num_bytes=_num_bytes(path)))
        model = self.store.try_installed(entry.name) if entry else self._find_installed(name)
        if entry is None and model is None:
            raise self.not_found(name)
        details = _details(entry, model)
        return _with_header(details) if details.installed else details

    def pull(self, name: str, progress: ProgressCallback = no_progress, *, revision: str | None = None) -> Path:
        """Bring a model (catalog name or alias, hub id, URL) to disk, unless it is there.

        Raises `ModelNotFoundError` for a name that nothing knows, `DownloadError` where no mirror
        could send it whole.
        """
        entry = self.find(name)
        if entry is not None:
            return pull_model(self.store, entry.name, entry.mirrors, entry.file, progress).path
        if (model := self._find_installed(name)) is not None and revision is None:
            return model.path
        source = _parse_source(name, revision)
        if source is None:
            raise self.not_found(name)
        return pull_model(self.store, source.default_name, [source], WantedFile(), progress).path

    def remove(self, name: str) -> None:
        """Delete a pulled model, or what an unfinished pull has left of it."""
        entry = self.find(name)
        model = self._find_installed(name)
        source = _parse_source(name, None)
        folder = entry.name if entry else model.name if model else source.default_name if source else None
        if folder is None or not self.store.remove(folder):
            raise ModelNotFoundError(f"{name} is not on disk in {self.store.root}")

    def not_found(self, name: str) -> ModelNotFoundError:
        import difflib

        known = [entry.name for entry in self.entries] + [model.name for model in self.store.installed()]
        near = difflib.get_close_matches(name.lower(), dict.fromkeys(known), n=3, cutoff=0.4)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        return ModelNotFoundError(
            f"no model is called {name!r}{hint} (`pelton models list` shows the known ones; "
            "a hub id owner/name, a URL, a folder and a .gguf file will do too)"
        )

    def _find_installed(self, name: str) -> InstalledModel | None:
        """By the name that `list` shows, or by the source it was pulled from."""
        return next((model for model in self.store.installed() if name in (model.name, model.source)), None)


def _parse_source(text: str, revision: str | None) -> Source | None:
    return next((source for parse in SOURCE_PARSERS if (source := parse(text, revision)) is not None), None)


def _details(entry: CatalogEntry | None, model: InstalledModel | None) -> ModelDetails:
    details = ModelDetails(name=entry.name if entry else model.name if model else "")
    if entry is not None:
        details = replace(
            details,
            description=entry.description,
            license=entry.license,
            aliases=entry.aliases,
            sources=tuple(mirror.description for mirror in entry.mirrors),
            num_bytes=entry.file.num_bytes,
        )
    if model is not None:
        details = replace(
            details,
            sources=details.sources or (model.source,),
            num_bytes=model.num_bytes,
            path=model.path,
            sha256=dict(model.sha256),
            pulled_at=model.pulled_at,
        )
    return details


def _with_header(details: ModelDetails) -> ModelDetails:
    from pelton.weights.model_files import open_model

    assert details.path is not None
    spec = open_model(details.path).spec
    return replace(
        details,
        architecture=spec.architecture,
        quantization=spec.quantization,
        max_model_len=spec.max_model_len,
        num_layers=spec.num_layers,
        vocab_size=spec.vocab_size,
    )


def _num_bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.iterdir())
