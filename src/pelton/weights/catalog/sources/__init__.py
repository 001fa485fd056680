"""Where models come from: one file per kind of source.

A source brings files into a staging folder, resuming what an earlier try left there, and says what
hash each should have. It does not verify, install or lock: `pull.py` does.
"""

from collections.abc import Callable

from pelton.weights.catalog.sources.hub import HubModel
from pelton.weights.catalog.sources.packages import PackageParts
from pelton.weights.catalog.sources.source import Fetched, Source, WantedFile
from pelton.weights.catalog.sources.url import UrlFile

# What a user may type instead of a catalog name, tried in order: (text, revision) -> source or None.
SOURCE_PARSERS: tuple[Callable[[str, str | None], Source | None], ...] = (UrlFile.try_parse, HubModel.try_parse)

__all__ = ["SOURCE_PARSERS", "Fetched", "HubModel", "PackageParts", "Source", "UrlFile", "WantedFile"]
