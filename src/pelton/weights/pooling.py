"""The pooling that a folder made for sentence-transformers names."""

from __future__ import annotations

from pathlib import Path

from pelton.core.errors import ModelFileError
from pelton.weights.mapped_file import read_json_object

_METHODS = {
    "pooling_mode_lasttoken": "last",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
}


def declared_pooling(model: Path) -> str | None:
    """From 1_Pooling/config.json; None where there is none. Raises `ModelFileError` for one that we do not have."""
    path = model / "1_Pooling" / "config.json"
    if not path.exists():
        return None
    modes = [
        name for name, value in read_json_object(path).items() if name.startswith("pooling_mode_") and value is True
    ]
    if len(modes) != 1 or modes[0] not in _METHODS:
        raise ModelFileError(path, f"pooling {' and '.join(modes) or 'without a mode'} is not supported")
    return _METHODS[modes[0]]
