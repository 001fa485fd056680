"""A device whose memory is the host's: what `cuda_ipc.py` says to the driver is heard by a library with its types."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from pelton.cluster.transfer import cuda_ipc

SOURCE = Path(__file__).parent / "fake_cuda.c"


def build(folder: Path) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    library = folder / "libfakecuda.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-Wall", "-Werror", "-o", library, SOURCE], check=True)
    return library


class FakeDriver(cuda_ipc.CudaDriver):
    """But for its memory as torch sees it."""

    library = ""

    def __init__(self) -> None:
        super().__init__(self.library)

    def tensor(self, pointer: int, shape: tuple[int, int]) -> Any:
        memory = (ctypes.c_ubyte * (shape[0] * shape[1])).from_address(pointer)
        return torch.frombuffer(memory, dtype=torch.uint8).view(shape)


def use(library: str) -> None:
    """In this process, from now on."""
    FakeDriver.library = library
    cuda_ipc.CudaDriver = FakeDriver  # type: ignore[misc]
