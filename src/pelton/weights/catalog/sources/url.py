"""A single file behind http or https, resumed with Range requests."""

from __future__ import annotations

import hashlib
import re
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

from pelton.core.errors import DownloadError, ModelNotFoundError
from pelton.weights.catalog.sources.source import Fetched, ReportBytes, WantedFile

_SHA256 = re.compile(r"sha256=([0-9a-f]{64})", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class UrlFile:
    """`url` may end in `#sha256=...`, which is then checked."""

    url: str

    kind = "url"

    @classmethod
    def try_parse(cls, text: str, revision: str | None) -> UrlFile | None:  # noqa: ARG003 - a URL has no revisions
        return cls(text) if text.startswith(("http://", "https://")) else None

    @property
    def description(self) -> str:
        parts = urllib.parse.urlsplit(self.url)
        # Neither a password nor a signed query belongs in logs and manifests.
        return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))

    @property
    def default_name(self) -> str:
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(self._path).stem).strip("-.") or "model"
        return f"{stem}--{hashlib.sha256(self._bare_url.encode()).hexdigest()[:8]}"

    @property
    def _path(self) -> str:
        return urllib.parse.unquote(urllib.parse.urlsplit(self.url).path)

    @property
    def _bare_url(self) -> str:
        return urllib.parse.urldefrag(self.url).url

    def fetch(self, staging: Path, wanted: WantedFile, report: ReportBytes) -> Fetched:
        from pelton.weights.catalog.sources.download import download

        name = wanted.file_name or Path(self._path).name
        if not name.endswith(".gguf"):
            raise ModelNotFoundError(f"{self.description} does not end in .gguf; only single .gguf files can be pulled")
        partial = staging / "data"
        download(self._bare_url, self.description, partial, report)
        with partial.open("rb") as file:
            if file.read(4) != b"GGUF":
                partial.unlink()
                raise DownloadError(f"{self.description} did not send a GGUF file (a login or error page?)")
        partial.replace(staging / name)
        match = _SHA256.search(urllib.parse.urldefrag(self.url).fragment)
        return Fetched(staging, (name,), {name: match[1].lower()} if match else {})
