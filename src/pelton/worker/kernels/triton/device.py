"""Where tensors of the Triton backend live: the CUDA device, or the CPU where kernels are interpreted."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy.typing as npt
import torch
import triton

from pelton.core.errors import ConfigError

# The driver's words, and those of a library that could not make its workspace.
_FULL = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_interpreted() -> bool:
    """Whether kernels run as numpy on the CPU: as TRITON_INTERPRET said when Triton was first imported."""
    return bool(triton.knobs.runtime.interpret)


def find_device(index: int = 0) -> torch.device:
    """The `index`-th. Raises `ConfigError` where there is no CUDA device, and kernels are not interpreted either."""
    if is_interpreted():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            "Triton kernels need an NVIDIA GPU, and torch finds none: check nvidia-smi and that this torch was built "
            "for CUDA, or use --kernel-backend native (TRITON_INTERPRET=1 interprets them, which only tests can bear)"
        )
    if index >= torch.cuda.device_count():
        raise ConfigError(f"{index + 1} GPUs are wanted, and there are {torch.cuda.device_count()}")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    if torch.cuda.get_device_capability(device) < (8, 0):
        raise ConfigError(
            f"Triton kernels need a GPU of compute capability 8.0 or more; {torch.cuda.get_device_name(device)} has "
            f"{'.'.join(map(str, torch.cuda.get_device_capability(device)))}"
        )
    return device


def has_float8(device: torch.device) -> bool:
    """Whether kernels may convert to and from float8 there."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether that is what it came of: torch has a type for it, others have words, and other errors may follow."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _FULL):
            return True
        error = error.__context__
    return False


@contextmanager
def memory_errors(release: Callable[[], None] = lambda: None) -> Iterator[None]:
    """What torch says when the device is full, as the rest of the house knows it: MemoryError. What the work held, what
    `release` gives up and what torch keeps for later is free by then."""
    try:
        yield
        return
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        problem = str(error)
        traceback.clear_frames(error.__traceback__)
    release()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    raise MemoryError(problem)


def send(values: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """To the device, without waiting for what it does: from memory that is not pinned a copy would."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def num_free_bytes(device: torch.device) -> int | None:
    """Of the device's memory, what other tensors gave back included; None where it is the host's."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]
