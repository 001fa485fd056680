"""`pelton models`: the models that can be pulled, and those on disk."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

if TYPE_CHECKING:
    from pelton.weights.catalog import Catalog, ModelDetails

app = App(name="models", help="List, pull, show and remove models.")

ModelArgument = Annotated[str, Parameter(help="catalog name, hub id, URL, folder or .gguf file")]
CacheFlag = Annotated[
    Path | None, Parameter(help="where pulled models are kept; default: PELTON_CACHE_DIR or ~/.cache/pelton/models")
]
JsonFlag = Annotated[bool, Parameter(name="--json", negative=(), help="print JSON")]


@app.command(name="list")
def list_models(*, cache_dir: CacheFlag = None, as_json: JsonFlag = False) -> int:
    """List the built-in models and all that were pulled."""
    details = _catalog(cache_dir).list()
    if as_json:
        print(json.dumps([_as_json(model) for model in details], indent=1))
        return 0
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for title in ("name", "size", "on disk", "description"):
        table.add_column(title, justify="right" if title == "size" else "left", no_wrap=title != "description")
    for model in details:
        table.add_row(model.name, _format_bytes(model.num_bytes), "yes" if model.installed else "", model.description)
    Console().print(table)
    return 0


@app.command
def pull(
    model: ModelArgument,
    *,
    revision: Annotated[str | None, Parameter(help="branch, tag or commit of a hub id")] = None,
    cache_dir: CacheFlag = None,
) -> int:
    """Bring a model to disk, checked by its hash. A pull that was broken off goes on where it was."""
    from pelton.cli.pull import pull_model
    from pelton.weights.config import ModelConfig

    folder = _cache_dir(cache_dir)
    config = ModelConfig(model=model, revision=revision, cache_dir=str(folder) if folder else None)
    print(pull_model(config))
    return 0


@app.command
def show(model: ModelArgument, *, cache_dir: CacheFlag = None, as_json: JsonFlag = False) -> int:
    """Show what is known of a model: sources, licence, and what its file says."""
    details = _catalog(cache_dir).show(model)
    if as_json:
        print(json.dumps(_as_json(details), indent=1))
        return 0
    values = {**_as_json(details), "size": _format_bytes(details.num_bytes)}
    known = {name: value for name, value in values.items() if value not in (None, "", [], ()) and name != "num_bytes"}
    width = max(len(name) for name in known)
    for name, value in known.items():
        if isinstance(value, dict):
            value = " ".join(f"{file} {digest}" for file, digest in value.items())
        text = ", ".join(value) if isinstance(value, list | tuple) else value
        print(f"{name.replace('_', ' '):<{width}}  {text}")
    return 0


@app.command
def remove(model: ModelArgument, *, cache_dir: CacheFlag = None) -> int:
    """Delete a pulled model from disk."""
    _catalog(cache_dir).remove(model)
    print(f"removed {model}")
    return 0


def _cache_dir(given: Path | None) -> Path | None:
    text = os.environ.get("PELTON_CACHE_DIR")
    return given or (Path(text) if text else None)


def _catalog(cache_dir: Path | None) -> Catalog:
    from pelton.weights.catalog import Catalog

    return Catalog(_cache_dir(cache_dir))


def _as_json(details: ModelDetails) -> dict[str, Any]:
    values = asdict(details)
    values["path"] = str(details.path) if details.path else None
    return values


def _format_bytes(num_bytes: int | None) -> str:
    if num_bytes is None:
        return ""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"
