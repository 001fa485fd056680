"""One model on several devices: a process for each rank, all of which compute every step on their share of it.

Hidden states and logits are whole on every rank; so are the choices of tokens, which are made alike by all.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pelton.weights.shards import cut_outputs, share_of, whole_shape
from pelton.weights.tensors import WeightTensor
from pelton.worker.kernels.ops import Array, Ops
from pelton.worker.layers.linear import Product
from pelton.worker.models.weight_source import WeightSource


@dataclass(frozen=True, slots=True)
class RankPlace:
    rank: int
    size: int
    store: str  # a file that all ranks see, and that is not there yet: where they meet


MEETING_S = 300.0
_LOOK_S = 0.01


def wait_for_all(place: RankPlace, timeout_s: float = MEETING_S) -> None:
    """Until all ranks have come to the folder of the store: who waits in a library's own meeting cannot be called off.

    Raises `ConnectionError` where the folder is gone, since somebody has given up, and where one stays away.
    """
    folder = Path(place.store).parent
    end_s = time.monotonic() + timeout_s
    try:
        (folder / f"rank-{place.rank}").touch()
        while missing := [rank for rank in range(place.size) if not (folder / f"rank-{rank}").exists()]:
            if not folder.exists():
                raise FileNotFoundError(folder)
            if time.monotonic() > end_s:
                raise ConnectionError(f"rank {place.rank} waited {timeout_s:.0f} s in vain for ranks {missing}")
            time.sleep(_LOOK_S)
    except FileNotFoundError as error:
        raise ConnectionError(f"rank {place.rank} was called off: {error}") from error


class Ranks(Protocol):
    """Those of a model. Every rank makes the same calls in the same order."""

    rank: int
    size: int

    def add_up(self, x: Array) -> Array:
        """x [T, H] of all ranks, added up in their order, whatever T is (law 3)."""
        ...

    def gather(self, x: Array, num_columns: int) -> Array:
        """x [S, V'] of all ranks side by side: [S, num_columns]. All but the last have as many columns as that leaves
        to each, rounded up."""
        ...

    def least(self, values: Sequence[int]) -> list[int]:
        """The least of each value over all ranks."""
        ...

    def leave(self) -> None:
        """No calls come after this one; does not wait for the others."""
        ...


class SharedWeights:
    """Implements `WeightSource`: a rank's share of another."""

    def __init__(self, source: WeightSource, ranks: Ranks) -> None:
        self._source = source
        self._ranks = ranks

    def tensor(self, name: str, shape: tuple[int, ...]) -> WeightTensor:
        whole = self._source.tensor(name, whole_shape(name, shape, self._ranks.size))
        return share_of(whole, self._ranks.rank, self._ranks.size)


class Summed:
    """A layer whose results are parts of a sum over ranks."""

    def __init__(self, layer: Product, ranks: Ranks) -> None:
        self._layer = layer
        self._ranks = ranks

    def __call__(self, ops: Ops, x: Array) -> Array:
        return self._ranks.add_up(self._layer(ops, x))


class Gathered:
    """A layer of whose `num_outputs` each rank has some (`head_share`)."""

    def __init__(self, linear: Product, ranks: Ranks, num_outputs: int) -> None:
        self._linear = linear
        self._ranks = ranks
        self._num_outputs = num_outputs

    def __call__(self, ops: Ops, x: Array) -> Array:
        return self._ranks.gather(self._linear(ops, x), self._num_outputs)


def head_share(matrix: WeightTensor, ranks: Ranks) -> WeightTensor:
    """A rank's outputs of the head [V, H]."""
    count = -(-matrix.shape[0] // ranks.size)
    return cut_outputs(matrix, ranks.rank * count, min((ranks.rank + 1) * count, matrix.shape[0]))
