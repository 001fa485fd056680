"""Launches that compile and run nothing, on tensors of the CPU: for a GPU that is not there, or is busy.

What is compiled goes to Triton's cache, where a launch on the device finds it: a kernel's key is its source, types,
constants, which pointers and numbers are multiples of 16, options and target.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

H100 = 90
MOST_SHARED_BYTES = 227 << 10  # of a program there


class _AbsentDevice:
    """Enough of a driver to compile for."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device

    def get_current_target(self) -> GPUTarget:
        return self._target


def compile_only(on_kernel: Callable[[Any], object], capability: int = H100) -> None:
    """From now on, in this process. `on_kernel` is given each launch's compiled kernel."""
    driver.set_active(_AbsentDevice(capability))
    run = JITFunction.run

    def compile_it(function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        del warmup
        kernel = run(function, *args, grid=grid, warmup=True, **kwargs)
        if kernel.metadata.shared > MOST_SHARED_BYTES:  # as a driver does
            raise OutOfResources(kernel.metadata.shared, MOST_SHARED_BYTES, "shared memory")
        on_kernel(kernel)
        return kernel

    JITFunction.run = compile_it
