"""What `make gpu-check` says of attention's errors, under the interpreter: small, and large where a kernel is wrong."""

from __future__ import annotations

import pytest
import torch
from benchmarks.gpu import attention
from benchmarks.gpu.attention import MOST_ERROR, Case

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:overflow encountered")]


@pytest.mark.parametrize("kv_format", list(MOST_ERROR))
def test_errors_are_those_of_rounding(kv_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_CACHE_BYTES", 1)
    batch = attention._Batch(Case("some", [(1, 100), (2, 40)], (2, 1, 64), kv_format), torch.device("cpu"))
    error, most = batch.error(), MOST_ERROR[kv_format]
    # The interpreter cuts float8 where a GPU rounds.
    assert (0 if kv_format == "bfloat16" else most / 20) < error <= most * (2 if kv_format == "fp8" else 1)
    assert batch.has_same_bits()
    batch._plain_query = -batch._plain_query  # as if the kernel had read other queries
    assert batch.error() > 2 * most
