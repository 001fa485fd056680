"""Launches with as many stages of loads under way as the device has shared memory for.

Tables are made for the 227 KiB of an H100 and for 16 bits; other devices have 99, and float32 takes twice as much. No
sum depends on stages (law 3).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

from triton.runtime.errors import OutOfResources

_fitting: dict[Hashable, int] = {}  # where it was not what the table says


def launch_with_stages(key: Hashable, num_stages: int, launch: Callable[[int], object]) -> None:
    """`key`: kernel, shapes and types, all that its use of shared memory follows from. Raises `OutOfResources` where
    one stage is too much."""
    num_stages = _fitting.get(key, num_stages)
    while True:
        try:
            launch(num_stages)
            return
        except OutOfResources as error:
            if error.name != "shared memory" or num_stages == 1:
                raise
        num_stages -= 1
        _fitting[key] = num_stages
