"""Linear layer: a weight in the backend's layout and an optional bias."""

from __future__ import annotations

from typing import Any, Protocol

from pelton.worker.kernels.ops import Array, Ops


class Product(Protocol):
    """A `Linear`, or one whose result comes together from several ranks."""

    def __call__(self, ops: Ops, x: Array) -> Array: ...


class Linear:
    """y [T, O] = x [T, I] W^T + b, and what adapters add. Several matrices of a file may lie one below another in W.

    `site` is the place of the product among those of the model that adapters may change.
    """

    def __init__(self, weight: Any, bias: Array | None, site: int) -> None:
        self._weight = weight
        self._bias = bias
        self._site = site

    def __call__(self, ops: Ops, x: Array) -> Array:
        return ops.adapt(ops.linear(x, self._weight, self._bias), x, self._site)
