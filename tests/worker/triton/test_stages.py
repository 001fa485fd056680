"""Fewer stages where shared memory is short, and the same results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources

from pelton.worker.kernels.triton import attention, stages
from pelton.worker.kernels.triton import linear as linear_module
from pelton.worker.kernels.triton.device import find_device
from pelton.worker.kernels.triton.linear import Scratch, TritonLinearLoader, linear
from tests.worker.triton.attention_case import Requests
from tests.worker.triton.test_linear import random_tensor

pytestmark = pytest.mark.torch


class ShortOfMemory:
    """A kernel that has room for so many stages."""

    def __init__(self, kernel: Any, option: str, most: int) -> None:
        self.kernel, self.option, self.most = kernel, option, most
        self.tried: list[int] = []

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> Any:
            self.tried.append(options[self.option])
            if self.tried[-1] > self.most:
                raise OutOfResources(300_000, 232_448, "shared memory")
            return self.kernel[grid](*args, **options)

        return launch


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "_fitting", {})


@pytest.mark.parametrize(("kind", "kernel"), [("F32", "product_kernel"), ("Q4_0", "packed_product_kernel")])
def test_products_take_the_stages_that_fit(kind: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = find_device()
    weight = TritonLinearLoader(torch.float32, device, Scratch(device)).load([random_tensor(kind, 70, 256)])
    x = torch.randn(3, 256)
    expected = linear(x, weight)
    short = ShortOfMemory(getattr(linear_module, kernel), "num_stages", 4)
    monkeypatch.setattr(linear_module, kernel, short)
    stages._fitting.clear()
    for _ in range(2):
        assert torch.equal(linear(x, weight), expected)
    first = {"F32": 8, "Q4_0": 6}[kind]
    assert short.tried == [*range(first, 3, -1), 4]  # and it is remembered


def test_attention_takes_the_stages_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Requests([(1, 50), (3, 20)], (4, 2, 16))
    expected = case.run_all()
    short = ShortOfMemory(attention.attention_kernel, "STAGES", 1)
    monkeypatch.setattr(attention, "attention_kernel", short)
    stages._fitting.clear()
    assert all(map(torch.equal, case.run_all(), expected))
    assert short.tried[0] > short.tried[-1] == 1


def test_what_never_fits_is_raised() -> None:
    def launch(num_stages: int) -> None:
        raise OutOfResources(num_stages, 0, "shared memory")

    with pytest.raises(OutOfResources) as raised:
        stages.launch_with_stages("key", 3, launch)
    assert raised.value.required == 1
    with pytest.raises(OutOfResources, match="threads"):
        stages.launch_with_stages("other", 3, lambda _: (_ for _ in ()).throw(OutOfResources(1, 0, "threads")))
