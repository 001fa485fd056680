"""Items in parts: what one raises costs the others nothing, unless it breaks the device."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

Row = dict[str, Any]
_MOST_CHARACTERS = 2000  # of a traceback, its end


def in_parts(parts: Iterable[tuple[str, Callable[[], Iterable[Row]]]]) -> Iterator[Row]:
    """The rows of all `parts` (name, function) as they come; of one that raises a row that says so in `failed`."""
    for name, part in parts:
        try:
            yield from part()
        except Exception:
            yield {"part": name, "failed": traceback.format_exc()[-_MOST_CHARACTERS:]}
            if not _device_answers():
                yield {"part": "the rest", "failed": f"not run: {name} left the device unusable for this process"}
                return
        free_memory()


def free_memory() -> None:
    """What parts before have left in cycles, and what torch keeps for later."""
    gc.collect()
    if torch.cuda.is_available() and _device_answers():
        torch.cuda.empty_cache()


def _device_answers() -> bool:
    """Some errors stay: every later call then raises them again."""
    if not torch.cuda.is_available():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
