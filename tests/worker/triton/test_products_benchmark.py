"""That the benchmark of products computes what it times, every kind of weight; nothing is timed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from benchmarks.gpu import products

from pelton.worker.kernels.triton.device import find_device

pytestmark = pytest.mark.torch


def test_every_kind_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    def call_once(*calls: Callable[[], object]) -> float:
        for call in calls:
            call()
        return 1.0

    for name, value in (
        ("SHAPES", {"small": (64, 128)}),
        ("FEW_ROWS", (1,)),
        ("MANY_ROWS", 5),
        ("_CACHE_BYTES", 1),
        ("_median_ms", call_once),
        ("measure_copy", lambda device: 1.0 if isinstance(device, torch.device) else None),
    ):
        monkeypatch.setattr(products, name, value)
    rows = list(products.run(find_device()))
    assert {row["kind"] for row in rows} == set(products.KINDS)
    assert all(float(row["error"]) < (5e-3 if row["kind"] in ("bf16", "int4 g128") else 1e-1) for row in rows)
    assert all(row["same_bits"] is not False for row in rows)
    assert len(products.show(rows).splitlines()) == len(rows) + 1
