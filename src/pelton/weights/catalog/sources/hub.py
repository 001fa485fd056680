"""A model hub, through the optional `huggingface_hub` package and the settings it reads itself."""

from __future__ import annotations

import fnmatch
import importlib
import importlib.util
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pelton.core.errors import DownloadError, ModelNotFoundError, PeltonError
from pelton.weights.catalog.sources.source import Fetched, ReportBytes, WantedFile

_TIMEOUT_S = 5.0  # for the first answer: a closed machine must come to the next mirror soon
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<file>[\w./-]+\.gguf))?")
# Of a repository of safetensors: what Pelton reads, and no pickled weights.
_FOLDER_FILES = ("*.safetensors", "*.json", "tokenizer.model", "*.jinja")


@dataclass(frozen=True, slots=True)
class HubModel:
    """`owner/name`, a folder of safetensors or the only .gguf in it, or one file `owner/name/file.gguf`."""

    repo_id: str
    file_name: str | None = None
    revision: str | None = None
    endpoint: str | None = None  # None: the one that huggingface_hub is set up with

    kind = "hub"

    @classmethod
    def try_parse(cls, text: str, revision: str | None) -> HubModel | None:
        match = _HUB_ID.fullmatch(text)
        return cls(match["repo"], match["file"], revision) if match else None

    @property
    def description(self) -> str:
        file_name = f"/{self.file_name}" if self.file_name else ""
        return f"{self.repo_id}{file_name}" + (f"@{self.revision}" if self.revision else "")

    @property
    def default_name(self) -> str:
        return self.description.removesuffix(".gguf").replace("/", "--")

    def fetch(self, staging: Path, wanted: WantedFile, report: ReportBytes) -> Fetched:
        if importlib.util.find_spec("huggingface_hub") is None:
            raise DownloadError(f"{self.repo_id}: hub ids need an extra package: pip install 'pelton[hub]'")
        with _hub_errors(self.description):
            from huggingface_hub import HfApi

            info = HfApi(endpoint=self.endpoint).model_info(
                self.repo_id, revision=self.revision, files_metadata=True, timeout=_TIMEOUT_S
            )
            siblings = {sibling.rfilename: sibling for sibling in info.siblings or () if _is_inside(sibling.rfilename)}
            names = self._choose(list(siblings))
            hashes = {name: lfs.sha256 for name in names if (lfs := siblings[name].lfs) is not None}
            if wanted.sha256 is not None and hashes.get(names[0], wanted.sha256) != wanted.sha256:
                raise DownloadError(f"{self.description} holds another file than the catalog pins (by its SHA-256)")
            sizes = {name: siblings[name].size or 0 for name in names}
            self._download(staging, sizes, info.sha, report)
        return Fetched(staging, tuple(names), hashes)

    def _choose(self, names: list[str]) -> list[str]:
        if self.file_name is not None:
            if self.file_name not in names:
                raise ModelNotFoundError(f"{self.repo_id} has no file {self.file_name}{_gguf_choice(names)}")
            return [self.file_name]
        chosen = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in _FOLDER_FILES)]
        if "config.json" in chosen and any(name.endswith(".safetensors") for name in chosen):
            return chosen
        files = [name for name in names if name.endswith(".gguf")]
        if len(files) != 1:
            raise ModelNotFoundError(
                f"{self.repo_id} is neither a folder of safetensors nor a single .gguf{_gguf_choice(names)}"
            )
        return files

    def _download(self, staging: Path, sizes: dict[str, int], commit: str | None, report: ReportBytes) -> None:
        from huggingface_hub import hf_hub_download

        num_done, total = 0, sum(sizes.values())
        report(num_done, total)
        for name, size in sizes.items():
            bar = _reporting_bar(report, num_done, total)
            hf_hub_download(
                self.repo_id, name, revision=commit, local_dir=staging, endpoint=self.endpoint, tqdm_class=bar
            )
            num_done += size
            report(num_done, total)


def _is_inside(name: str) -> bool:
    """Whether a repository's file stays within the folder that it is put into."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _gguf_choice(names: list[str]) -> str:
    files = sorted(name for name in names if name.endswith(".gguf"))
    return f"; its .gguf files, to be named as owner/name/file.gguf: {', '.join(files)}" if files else ""


@contextmanager
def _hub_errors(description: str) -> Iterator[None]:
    from huggingface_hub import errors

    try:
        yield
    except PeltonError:
        raise
    except errors.GatedRepoError as error:
        raise DownloadError(f"{description} is gated: accept its terms on the hub and log in there first") from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        raise ModelNotFoundError(f"the hub has no {description}") from error
    except errors.OfflineModeIsEnabled as error:
        raise DownloadError(f"{description}: huggingface_hub is set to offline") from error
    except OSError as error:
        if error.filename is not None:
            raise  # of the local disk
        raise DownloadError(f"{description}: {error}") from error
    except Exception as error:  # the transport's own errors, which change with the package's version
        raise DownloadError(f"{description}: the hub cannot be reached ({type(error).__name__}: {error})") from error


def _reporting_bar(report: ReportBytes, num_done: int, total: int) -> Any:
    """A silent tqdm class; huggingface_hub offers no other way to watch a download."""
    tqdm: Any = importlib.import_module("tqdm").tqdm

    def start(bar: Any, *args: Any, **options: Any) -> None:
        options.pop("name", None)  # huggingface_hub's own extension
        tqdm.__init__(bar, *args, **(options | {"file": io.StringIO(), "disable": False}))

    def update(bar: Any, num_bytes: float = 1) -> None:
        tqdm.update(bar, num_bytes)
        report(num_done + int(bar.n), total)

    return type("ReportingBar", (tqdm,), {"__init__": start, "update": update})
