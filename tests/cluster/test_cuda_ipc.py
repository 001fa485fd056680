"""What `cuda_ipc` says to the driver and to others. That a GPU does it is for `make gpu-check`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pelton.cluster.transfer import cuda_ipc
from pelton.cluster.transfer.checksum import checksums
from pelton.cluster.transfer.mover import MoverSize, TransferError
from pelton.core.errors import ConfigError

HANDLE = bytes(range(64))
SIZE = MoverSize(4, 4, 10_000)


def description(handle: bytes = HANDLE, num_bytes: int = 40_000, process_id: int = 1) -> bytes:
    return cuda_ipc.Description(handle, num_bytes, process_id).encode()


def test_a_handle_is_64_bytes_by_value() -> None:
    handle = cuda_ipc.IpcHandle((cuda_ipc.ctypes.c_ubyte * 64)(*HANDLE))
    assert cuda_ipc.ctypes.sizeof(handle) == 64
    assert bytes(handle.reserved) == HANDLE  # zeros and all
    assert cuda_ipc.decode(description()).handle == HANDLE


def test_no_driver() -> None:
    with pytest.raises(ConfigError, match="needs an NVIDIA driver"):
        cuda_ipc.CudaDriver("libthere-is-none.so.1")
    with pytest.raises(ConfigError, match="runs on a CPU: use shared_memory"):
        cuda_ipc.CudaIpcMover(SIZE, "cpu")


@pytest.mark.torch
class TestWithAFakeDriver:
    @pytest.fixture
    def driver(self, tmp_path: Path) -> cuda_ipc.CudaDriver:
        from tests.cluster.fake_cuda import FakeDriver, build

        FakeDriver.library = str(build(tmp_path))
        return FakeDriver()

    def test_no_device(self, driver: cuda_ipc.CudaDriver, tmp_path: Path) -> None:
        del driver
        with pytest.raises(ConfigError, match=r"the device cannot be used: cuDeviceGet: invalid argument \(1\)"):
            cuda_ipc.CudaDriver(str(tmp_path / "libfakecuda.so"), device_id=7)

    def test_no_memory(self, driver: cuda_ipc.CudaDriver) -> None:
        with pytest.raises(ConfigError, match="cuMemAlloc_v2: out of memory"):
            cuda_ipc.CudaIpcMover(MoverSize(1, 2, 1 << 30), "A GPU", driver)

    @pytest.mark.parametrize(
        ("data", "problem"),
        [
            (b"noise", "described in 5 bytes, not 80"),
            (description(num_bytes=1), "not what it says"),
            (description(process_id=os.getpid()), "within one process"),
            (description(b"\0" + b"99999999/fd/1".ljust(63, b"\0")), r"invalid resource handle \(400\)"),
            (description(b"\1" * 64), r"invalid argument \(1\)"),
        ],
        ids=["noise", "size", "own process", "process gone", "foreign handle"],
    )
    def test_what_describes_no_memory(self, driver: cuda_ipc.CudaDriver, data: bytes, problem: str) -> None:
        mover = cuda_ipc.CudaIpcMover(SIZE, "A GPU", driver)
        with pytest.raises(TransferError, match=problem):
            mover.open(data, (), 4)
        mover.close()

    def test_a_copy_that_fails_leaves_none_behind(self, driver: cuda_ipc.CudaDriver) -> None:
        """A slot of the inbox is another block's next: nothing may come to it later."""
        mover = cuda_ipc.CudaIpcMover(SIZE, "A GPU", driver)
        said: list[str] = []
        outbox = cuda_ipc.MappedOutbox(driver, mover.describe()[0][:64], mover.inbox)
        copy, wait = driver.copy, driver.wait

        def fail_second(*arguments: Any) -> None:
            said.append("copy")
            if len(said) == 2:
                raise cuda_ipc.CudaError("no")
            copy(*arguments)

        driver.copy = fail_second  # type: ignore[method-assign]
        driver.wait = lambda stream: (said.append("wait"), wait(stream))[1]  # type: ignore[func-returns-value, method-assign]
        with pytest.raises(TransferError, match="cannot be read: no"):
            outbox.read([0, 1, 2], [0, 1, 2])
        assert said == ["copy", "copy", "wait"]
        outbox.close()
        mover.close()

    def test_memory_that_cannot_be_mapped_costs_no_stream(self, driver: cuda_ipc.CudaDriver) -> None:
        mover = cuda_ipc.CudaIpcMover(SIZE, "A GPU", driver)
        streams: list[int] = []
        make = driver.make_stream
        driver.make_stream = lambda: streams.append(1) or make()  # type: ignore[func-returns-value, method-assign]
        with pytest.raises(TransferError, match="cannot be mapped"):
            mover.open(description(b"\1" * 64), (), 4)
        assert not streams
        mover.close()

    def test_an_address_that_is_gone(self, driver: cuda_ipc.CudaDriver) -> None:
        mover = cuda_ipc.CudaIpcMover(SIZE, "A GPU", driver)
        mover.close()
        with pytest.raises(cuda_ipc.CudaError, match="cuMemFree_v2"):
            driver.free(1234)
        with pytest.raises(cuda_ipc.CudaError, match="cuMemcpyDtoDAsync_v2"):
            driver.copy(0, 0, 10, 99)


@pytest.mark.torch
@pytest.mark.parametrize("num_bytes", [8, 4096, 4104, 12_296, 196_608])
def test_checksums_are_those_of_numpy(num_bytes: int) -> None:
    import torch

    blocks = np.random.default_rng(1).integers(0, 256, (3, num_bytes), dtype=np.uint8)
    assert checksums(torch.from_numpy(blocks), [2, 0]) == checksums(blocks, [2, 0])


def test_a_checksum_sees_every_byte_and_the_order() -> None:
    rng = np.random.default_rng(2)
    block = rng.integers(0, 256, (1, 20_000), dtype=np.uint8)
    (whole,) = checksums(block, [0])
    for place in [0, 1, 4095, 4096, 19_999, *rng.integers(0, 20_000, 200)]:
        damaged = block.copy()
        damaged[0, place] ^= 1 << rng.integers(8)
        assert checksums(damaged, [0]) != [whole]
    swapped = block.copy()
    swapped[0, :8], swapped[0, 8:16] = block[0, 8:16], block[0, :8]
    assert checksums(swapped, [0]) != [whole]
    cut = block.copy()
    cut[0, 10_000:] = 0
    assert checksums(cut, [0]) != [whole]
