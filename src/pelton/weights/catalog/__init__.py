"""The model catalog: names to files on disk, pulled once, checked by hash, kept in a folder."""

from pelton.weights.catalog.catalog import Catalog, ModelDetails
from pelton.weights.catalog.progress import PullPhase, PullProgress
from pelton.weights.catalog.resolve import resolve_model
from pelton.weights.catalog.store import InstalledModel

__all__ = ["Catalog", "InstalledModel", "ModelDetails", "PullPhase", "PullProgress", "resolve_model"]
